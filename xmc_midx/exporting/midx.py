"""Layer 5. The model as an inverted multi-index that NumPy alone can search: safetensors, JSON and text.

A cell holds the labels that share both codewords of a residual quantiser. For a query z the cells are visited in
falling order of

    z . codeword1 + z . codeword2 + bias of the cell, the largest of its labels',

until they hold `num_candidates` labels, which are scored exactly, z . row + bias. docs/commands.md describes the files,
and `scripts/read_midx.py` is the reference reader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from xmc_midx.codebook import fit_codebook
from xmc_midx.exporting.source import MEASURED_K, ExportSource, Measurement, Queries, Search, tune
from xmc_midx.recipe import auto_num_codewords

__all__ = ["FORMAT", "export_midx"]

FORMAT = "xmc-midx export"
VERSION = 1
_WEIGHTED_VERSION, _NUMBERED_VERSION, _KNOWN_VERSION = 2, 3, 4
"""With `features.idf`, with `features.ids`, with `labels.ids`: a reader of an earlier version would leave the weights
out, and take features of neighbours and ranker, and labels, for others."""
_FEWEST = 64
"""Candidates that the search for the right number begins with."""


def export_midx(source: ExportSource, queries: Queries | None, target: Path) -> Sequence[Measurement]:
    """Write the files into `target`, an empty directory, and measure the search.

    Parameters
    ----------
    queries : that the number of candidates is chosen on; None: an eighth of the labels.
    """
    index = _build_index(source)
    table, bias, idf = source.table(), source.bias(), source.model.scaling.idf
    tensors = _encoder_tensors(source) | {
        "labels.weight": table,
        "labels.bias": bias,
        "labels.frequencies": source.model.frequencies.numpy(),
    }
    if idf is not None:
        tensors["features.idf"] = idf
    version = VERSION if idf is None else _WEIGHTED_VERSION
    if source.model.scaling.kept is not None:
        tensors["features.ids"], version = source.model.scaling.kept, _NUMBERED_VERSION
    known_labels = source.model.known_labels
    if known_labels.ids is not None:
        tensors["labels.ids"], version = known_labels.ids, _KNOWN_VERSION
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in (tensors | index).items()}, target / "model.safetensors"
    )

    def search_at(num_candidates: int) -> Search:
        return lambda query_BD: known_labels.labels_of(_search(query_BD, index, table, bias, num_candidates))

    num_candidates = tune(queries, search_at, first=min(_FEWEST, source.num_rows), last=source.num_rows)
    settings = {"num_candidates": num_candidates}
    measured = [Measurement.missing("midx", settings)]
    if queries is not None:
        measured = [queries.measure("midx", search_at(num_candidates), settings), queries.exact()]
    for name, is_needed in (
        ("neighbors.safetensors", source.interpolation.needs_neighbors),
        ("ranker.safetensors", source.interpolation.needs_ranker),
    ):
        if is_needed:
            (target / name).write_bytes((source.directory.path / name).read_bytes())
    source.copy_names(target)
    document = {
        "format": FORMAT,
        "version": version,
        "kind": "midx",
        "model": source.facts(),
        "index": {"quantizer": _QUANTIZER, "num_codewords": len(index["index.codewords1"]), **settings},
        "interpolation": source.interpolation.as_dict(),
        "calibration": None if source.calibration is None else source.calibration.as_dict(),
        "measured": [one.as_dict() for one in measured],
    }
    (target / "export.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return measured


_QUANTIZER = "rq"
"""A product quantiser needs 2.5 times the candidates on gnd-tib (EXPERIMENTS.md, "Exports")."""


def _encoder_tensors(source: ExportSource) -> dict[str, NDArray[Any]]:
    state = source.model.encoder.state_dict()
    found = {f"encoder.{name}": tensor.float().numpy() for name, tensor in state.items()}
    return found | {"encoder.embedding": source.feature_table()}


def _build_index(source: ExportSource) -> dict[str, NDArray[Any]]:
    """The codewords; the cells that hold labels, each with its two codes, its labels and its bias."""
    num_labels, options = source.num_rows, source.model.config.sampler
    num_codewords = options.num_codewords if isinstance(options.num_codewords, int) else auto_num_codewords(num_labels)
    generator = torch.Generator().manual_seed(0)
    table_LD = source.model.label_table.float()
    codebook = fit_codebook(table_LD, quantizer=_QUANTIZER, num_codewords=num_codewords, generator=generator)
    cell_L = codebook.cells().numpy()
    postings = np.argsort(cell_L, kind="stable")
    cells, counts = np.unique(cell_L, return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return {
        "index.codewords1": codebook.codewords1.numpy(),
        "index.codewords2": codebook.codewords2.numpy(),
        "index.cells": np.stack(np.divmod(cells, num_codewords), axis=1).astype(np.int32),
        "index.offsets": offsets.astype(np.int64),
        "index.postings": postings.astype(np.int32),
        "index.cell_bias": np.maximum.reduceat(source.bias()[postings], offsets[:-1]),
    }


def _search(
    query_BD: NDArray[np.float32],
    index: dict[str, NDArray[Any]],
    table: NDArray[np.float32],
    bias: NDArray[np.float32],
    num_candidates: int,
) -> NDArray[np.int64]:
    """What the reference reader does, over arrays that are in memory."""
    first, second = index["index.codewords1"], index["index.codewords2"]
    offsets, postings = index["index.offsets"], index["index.postings"]
    scores1_BC, scores2_BC = query_BD @ first.T, query_BD @ second.T
    found_BK = np.full((len(query_BD), MEASURED_K), -1, dtype=np.int64)
    sizes = np.diff(offsets)
    most = min(num_candidates, len(sizes))
    for row, query in enumerate(query_BD):
        cell_scores = scores1_BC[row, index["index.cells"][:, 0]] + scores2_BC[row, index["index.cells"][:, 1]]
        cell_scores += index["index.cell_bias"]
        best = np.argpartition(-cell_scores, most - 1)[:most] if most < len(sizes) else np.arange(len(sizes))
        best = best[np.argsort(-cell_scores[best], kind="stable")]
        best = best[: 1 + np.searchsorted(np.cumsum(sizes[best]), num_candidates)]
        candidates = np.sort(np.concatenate([postings[offsets[cell] : offsets[cell + 1]] for cell in best]))
        scores = table[candidates] @ query + bias[candidates]
        kept = np.argsort(-scores, kind="stable")[:MEASURED_K]
        found_BK[row, : len(kept)] = candidates[kept]
    return found_BK
