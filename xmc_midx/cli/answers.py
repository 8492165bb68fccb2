"""Layer 7. Predictions as text or npz, chunk by chunk. Before it: `pipeline.PredictionStream`; after it: a stream."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from xmc_midx.cli import render
from xmc_midx.types import TopK

__all__ = ["Format", "NpzWriter", "lines", "records"]


class Format(StrEnum):
    """How predictions are written."""

    TSV = "tsv"
    JSONL = "jsonl"
    XMC = "xmc"
    NPZ = "npz"


def records(first: int, top: TopK, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """An instance as a JSON object; the first one's number is `first`."""
    for instance, row in _rows(first, top):
        labels: list[dict[str, Any]] = [{"label": label, "score": float(score)} for label, score in row]
        if names is not None:
            labels = [{**entry, "name": names[entry["label"]]} for entry in labels]
        yield {"instance": instance, "labels": labels}


def lines(first: int, top: TopK, names: Sequence[str] | None, form: Format) -> Iterator[str]:
    """The lines of a chunk in one of the text formats."""
    if form is Format.JSONL:
        for record in records(first, top, names):
            yield json.dumps(record, ensure_ascii=False) + "\n"
        return
    for instance, row in _rows(first, top):
        if form is Format.XMC:
            yield " ".join(f"{label}:{score}" for label, score in row) + "\n"
            continue
        for rank, (label, score) in enumerate(row, start=1):
            name = "" if names is None else f"\t{render.printable(names[label])}"
            yield f"{instance}\t{rank}\t{label}\t{score}{name}\n"


def _rows(first: int, top: TopK) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Instance -> its labels and the shortest text of their scores that reads back to the same float32."""
    for instance, (label_ids, scores) in enumerate(
        zip(top.label_ids.tolist(), top.scores.astype(str).tolist(), strict=True), start=first
    ):
        yield instance, [(label, score) for label, score in zip(label_ids, scores, strict=True) if label >= 0]


class NpzWriter:
    """Arrays `label_ids` and `scores`, (N, K), of any N: the rows wait in temporary files until N is known.

    Parameters
    ----------
    directory : of the temporary files: where the result has room, they have.
    k : K, where there is no row.
    """

    def __init__(self, directory: Path, k: int) -> None:
        self._k, self._num_rows = k, 0
        self._spools = {
            "label_ids": ("<i8", tempfile.TemporaryFile(dir=directory)),  # noqa: SIM115
            "scores": ("<f4", tempfile.TemporaryFile(dir=directory)),  # noqa: SIM115
        }

    def add(self, top: TopK) -> None:
        for name, (dtype, spool) in self._spools.items():
            spool.write(getattr(top, name).astype(dtype).tobytes())
        self._num_rows += len(top.label_ids)
        self._k = top.label_ids.shape[1]

    def finish(self, stream: BinaryIO) -> None:
        """Write the archive: equal predictions, equal bytes."""
        import shutil

        from numpy.lib import format as npy

        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, (dtype, spool) in self._spools.items():
                entry = zipfile.ZipInfo(f"{name}.npy")
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as target, spool:
                    header = {"descr": dtype, "fortran_order": False, "shape": (self._num_rows, self._k)}
                    npy.write_array_header_1_0(target, header)
                    spool.seek(0)
                    shutil.copyfileobj(spool, target, 2**20)
