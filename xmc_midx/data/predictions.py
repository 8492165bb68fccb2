"""Layer 2. Predictions of any tool as text: `label:score label:score ...`, one line an instance.

Before it: `table` (lines -> CSR). After it: `metrics` through `evaluate --predictions`, and `predict
--output`.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np

from xmc_midx.data.files import LineChunks, atomic_write
from xmc_midx.data.parser import Rules
from xmc_midx.data.problems import raise_error
from xmc_midx.data.table import RowTable, pair_texts, row_texts
from xmc_midx.errors import DataError
from xmc_midx.types import TopK

__all__ = ["read_predictions", "write_predictions"]

_HEADER = re.compile(rb"[ \t]*(\d{1,18})[ \t]+(\d{1,18})[ \t]*\r?")
MAX_ENTRIES = 2**31
"""Largest N x K: one row with very many predictions must not fill the memory with pads."""


def read_predictions(
    path: str | Path, num_labels: int, *, num_instances: int | None = None, k: int | None = None
) -> TopK:
    """Predictions from text: `label:score label:score ...` a line, ids from 0, in any order.

    A first line of two numbers `num_instances num_labels` is a header, as pyxclib and napkinXC write it.
    Without one, every line is an instance; a blank line is an instance without predictions.

    Parameters
    ----------
    path : plain, .gz, .bz2 or .xz.
    num_labels : labels are 0..num_labels-1.
    num_instances : number of rows to expect; None takes the header's or the number of lines.
    k : keep the best k of each row; None keeps all.

    Returns
    -------
    (N, K) with K the longest row: falling float32 scores, ties to the smaller id, padded with -1 and -inf.

    Raises
    ------
    DataError : with `file:line`; the same strictness as `read_xmc`.
    """
    path = Path(path)
    lines = LineChunks(path, raise_error)
    chunks = iter(lines)
    source = f"expected {num_instances} as the data has"
    first = next(chunks, None)
    if first is not None:
        head, _, rest = first[1].partition(b"\n")
        if match := _HEADER.fullmatch(head):
            found = int(match[1]), int(match[2])
            expected = found[0] if num_instances is None else num_instances, num_labels
            if found != expected:
                fact = f"the header says {found[0]} instances and {found[1]} labels"
                raise DataError(
                    f"{path}:1: {fact}, expected {expected[0]} and {expected[1]}.",
                    hint="Are these the predictions of another data set?",
                )
            num_instances, source = found[0], f"the header says {found[0]}"
            first = (2, rest) if rest else None
    rules = Rules(
        file=str(path),
        num_features=num_labels,
        num_labels=0,
        feature="label",
        pair="label:score",
        num_features_source=f"there are {num_labels} labels",
    )
    table = RowTable(rules, raise_error, num_rows=num_instances, source=source)
    table.read(lines, itertools.chain([first] if first else [], chunks))
    return _best(path, table, k)


def _best(path: Path, table: RowTable, k: int | None) -> TopK:
    scores = table.features()
    num_rows = scores.shape[0]
    counts = np.diff(scores.indptr).astype(np.int64)
    rows = np.repeat(np.arange(num_rows), counts)
    order = np.lexsort((scores.indices, -scores.data, rows))
    ranks = np.arange(len(rows)) - np.repeat(scores.indptr[:-1].astype(np.int64), counts)
    width = int(counts.max(initial=0))
    width = width if k is None else min(width, k)
    if num_rows * width > MAX_ENTRIES:
        raise DataError(
            f"{path}: {num_rows} rows of up to {width} predictions, expected at most {MAX_ENTRIES} in all.",
            hint="Keep the best few of each row.",
        )
    best_ids = np.full((num_rows, width), -1, dtype=np.int64)
    best_scores = np.full((num_rows, width), -np.inf, dtype=np.float32)
    kept = ranks < width
    best_ids[rows[kept], ranks[kept]] = scores.indices[order][kept]
    best_scores[rows[kept], ranks[kept]] = scores.data[order][kept]
    return TopK(label_ids=best_ids, scores=best_scores)


def write_predictions(path: str | Path, predictions: TopK, num_labels: int) -> None:
    """Write predictions with a header `num_instances num_labels`, best first; pads are left out.

    `read_predictions` reads them back to equal arrays, but for columns that are all pads.

    Raises
    ------
    DataError : a label is not in -1..num_labels-1, or the score of a label is not finite.
    ResourceError : the file cannot be written.
    """
    path = Path(path)
    ids, scores = predictions.label_ids, predictions.scores
    is_label = ids >= 0
    if ids.size and not (ids.min() >= -1 and ids.max() < num_labels and np.isfinite(scores[is_label]).all()):
        raise DataError(f"{path}: predictions hold a label outside 0..{num_labels - 1} or a score not finite.")
    offsets = np.concatenate([[0], np.cumsum(is_label.sum(axis=1))])
    lines = row_texts(pair_texts(ids[is_label], scores[is_label]), offsets, " ")
    with atomic_write(path) as file:
        file.write(f"{len(ids)} {num_labels}\n".encode())
        # A blank keeps the line of a row without predictions visible where a last newline is lost.
        file.writelines(f"{line or ' '}\n".encode() for line in lines)
