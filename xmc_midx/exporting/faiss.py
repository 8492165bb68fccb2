"""Layer 5. The label table as stock faiss indexes, HNSW and IVF, by inner product.

A label's vector is (row, bias, sqrt(M^2 - |row|^2 - bias^2)), (D + 2,), with M the longest of (row, bias); a query is
(z, 1, 0). Their inner product is the logit, and the last coordinate gives all vectors the length M, without which a
graph or a clustering by inner product misses what it looks for: on gnd-tib, recall@5 of HNSW 0.99 instead of 0.49
(EXPERIMENTS.md, "Exports"; the reduction is Bachrach et al.'s, RecSys 2014). The ids that a search returns are label
ids: the positions, or, where the model does not know all labels, what an IndexIDMap makes of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmc_midx.errors import UsageError
from xmc_midx.exporting.midx import FORMAT, VERSION
from xmc_midx.exporting.source import MEASURED_K, ExportSource, Measurement, Queries, Search, tune

__all__ = ["export_faiss", "require_faiss"]

_LINKS = 32
_BUILD_EFFORT = 200
_MOST_EFFORT = 2048
"""Of a search in the graph: candidates held."""


def require_faiss() -> Any:
    """faiss, or what to install."""
    try:
        import faiss
    except ImportError:
        raise UsageError("--format faiss needs faiss.", hint="pip install 'xmc-midx[export]', or faiss-cpu.") from None
    return faiss


def export_faiss(source: ExportSource, queries: Queries | None, target: Path) -> Sequence[Measurement]:
    """Write `hnsw.faiss`, `ivf.faiss` and `export.json` into `target`, an empty directory, and measure both."""
    faiss = require_faiss()
    vectors = _equally_long(np.column_stack([source.table(), source.bias()]))
    dim = vectors.shape[1]

    hnsw = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = _BUILD_EFFORT
    label_ids, graph = source.model.known_labels.labels_of(np.arange(source.num_rows)), hnsw
    if source.num_rows < source.num_labels:
        graph = faiss.IndexIDMap(hnsw)
        graph.add_with_ids(vectors, label_ids)
    else:
        graph.add(vectors)
    most = min(_MOST_EFFORT, max(16, source.num_rows))

    def hnsw_at(effort: int) -> Search:
        def search(query_BD: NDArray[np.float32]) -> NDArray[np.int64]:
            hnsw.hnsw.efSearch = effort
            return _search(graph, query_BD)

        return search

    effort = tune(queries, hnsw_at, first=16, last=most)
    hnsw.hnsw.efSearch = effort

    num_lists = max(1, min(source.num_rows // 39, round(4 * math.sqrt(source.num_rows))))
    quantizer = faiss.IndexFlatIP(dim)
    ivf = faiss.IndexIVFFlat(quantizer, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    ivf.train(vectors)
    ivf.add_with_ids(vectors, label_ids)

    def ivf_at(num_probes: int) -> Search:
        def search(query_BD: NDArray[np.float32]) -> NDArray[np.int64]:
            ivf.nprobe = num_probes
            return _search(ivf, query_BD)

        return search

    num_probes = tune(queries, ivf_at, first=1, last=num_lists)
    ivf.nprobe = num_probes

    faiss.write_index(graph, str(target / "hnsw.faiss"))
    faiss.write_index(ivf, str(target / "ivf.faiss"))
    source.copy_names(target)
    kinds: list[tuple[str, Search, dict[str, int]]] = [
        ("hnsw", hnsw_at(effort), {"efSearch": effort}),
        ("ivf", ivf_at(num_probes), {"nprobe": num_probes, "nlist": num_lists}),
    ]
    if queries is None:
        measured = [Measurement.missing(name, settings) for name, _, settings in kinds]
    else:
        measured = [queries.measure(name, search, settings) for name, search, settings in kinds] + [queries.exact()]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "faiss",
        "model": source.facts(),
        "index": {
            "dim": dim,
            "metric": "inner product",
            "query": "the encoder's output, then 1, then 0",
            "hnsw": {"M": _LINKS, "efConstruction": _BUILD_EFFORT, "efSearch": effort},
            "ivf": {"nlist": num_lists, "nprobe": num_probes},
        },
        "measured": [one.as_dict() for one in measured],
    }
    (target / "export.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return measured


def _equally_long(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors with one more coordinate, which gives them the length of the longest."""
    squares = np.square(vectors, dtype=np.float64).sum(axis=1)
    return np.ascontiguousarray(np.column_stack([vectors, np.sqrt(squares.max() - squares)]), dtype=np.float32)


def _search(index: Any, query_BD: NDArray[np.float32]) -> NDArray[np.int64]:
    extended = np.column_stack([query_BD, np.ones(len(query_BD)), np.zeros(len(query_BD))])
    found: NDArray[np.int64] = index.search(np.ascontiguousarray(extended, dtype=np.float32), MEASURED_K)[1]
    return found
