"""Layer 2. The filter files of the LF sets: labels that an evaluation passes over, such as an instance's own page.

Before it: `files`. After it: `dataset` keeps them with a split, and `metrics` leaves them out of predictions and truth.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks, atomic_write
from xmc_midx.data.problems import Problem, Report, excerpt, raise_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ignored_name", "read_ignored", "write_ignored"]

_PAIR = re.compile(rb"[ \t]*(\d{1,18})[ \t]+(\d{1,18})[ \t]*\r?")
_PAIRS = re.compile(rb"(?:\d{1,18} \d{1,18}\n)*")
"""What a chunk mostly is; then NumPy reads it at once."""


def read_ignored(
    path: str | Path, num_instances: int, num_labels: int, *, report: Report = raise_error
) -> csr_matrix[Any]:
    """`instance label` on each line, both from 0 -> (N, L) float32 CSR, 1 for each pair of them.

    A pair may stand there twice; blank lines are passed over; an empty file holds none.

    Parameters
    ----------
    path : plain, .gz, .bz2 or .xz.
    num_instances, num_labels : of the split.
    report : receives the faults; kinds `token` and `pair-range`, and those of `LineChunks`.

    Raises
    ------
    DataError : with `file:line`, a line is no pair, or names an instance or a label that there is not.
    """
    path = Path(path)
    parts: list[NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)]
    sizes = num_instances, num_labels
    for first_line, text in LineChunks(path, report):
        if _PAIRS.fullmatch(text):
            pairs = np.array(text.split(), dtype=np.int64).reshape(-1, 2)
            if not len(pairs) or (pairs < sizes).all():
                parts.append(pairs)
                continue
        parts.append(_read_lines(text, first_line, path, sizes, report))
    found = np.concatenate(parts)
    ones = np.ones(len(found), dtype=np.float32)
    matrix = csr_matrix((ones, (found[:, 0], found[:, 1])), shape=sizes)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def write_ignored(path: Path, ignored: csr_matrix[Any]) -> None:
    """The file that `read_ignored` reads back.

    Raises
    ------
    ResourceError : it cannot be written.
    """
    pairs = ignored.tocoo()
    with atomic_write(path) as file:
        for row, label in zip(pairs.row.tolist(), pairs.col.tolist(), strict=True):
            file.write(b"%d %d\n" % (row, label))


def ignored_name(split: str) -> str:
    """What the filter file of a split is called, uncompressed."""
    return f"filter_labels_{split}.txt"


def _read_lines(text: bytes, first_line: int, path: Path, sizes: tuple[int, int], report: Report) -> NDArray[np.int64]:
    pairs: list[tuple[int, int]] = []
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=first_line):
        if not line.strip():
            continue
        match = _PAIR.fullmatch(line)
        pair = (int(match[1]), int(match[2])) if match else None
        if pair is None:
            fact = f"{excerpt(line)} is not `instance label`."
            report(Problem(kind="token", file=str(path), line=number, text=fact))
        elif pair[0] < sizes[0] and pair[1] < sizes[1]:
            pairs.append(pair)
        else:
            what = "instance" if pair[0] >= sizes[0] else "label"
            size, found = (sizes[0], pair[0]) if what == "instance" else (sizes[1], pair[1])
            fact = f"{what} {found} is outside 0..{size - 1} (the split has {size} {what}s)."
            hint = "Is this the filter file of another split?"
            report(Problem(kind="pair-range", file=str(path), line=number, text=fact, hint=hint))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
