"""Layer 2. What could be read of the files of a split: matrices, and the place of each row.

Before it: `problems` and `files`. After it: every reader of a format (`formats`, `pairs`, `svmlight`, `npz`) makes a
`SplitScan`, so that `dataset` and `check` need not know the format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks
from xmc_midx.data.problems import Problem, Report, excerpt

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "MAX_SIZE",
    "MatrixScan",
    "RowPlaces",
    "SplitScan",
    "canonical",
    "join_scans",
    "ones_like",
    "read_header",
    "warn_of_cut",
]

_WORD = re.compile(rb"[A-Za-z\x80-\xff]{2}")
MAX_SIZE = 2**31 - 1
"""Largest number of instances, features or labels: ids are int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlaces:
    """Where the rows of a matrix stand in its file."""

    file: str
    first_line: int | None = None
    """Of row 0; None where the file has no lines, and rows are counted from 0."""
    comment_lines: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Numbers of the lines after `first_line` that are no rows, ascending."""

    def of(self, row: int) -> dict[str, Any]:
        """The `file`, `line` and `row` of a `Problem` of that row."""
        if self.first_line is None:
            return {"file": self.file, "row": int(row)}
        rows_before = self.comment_lines - self.first_line - np.arange(len(self.comment_lines))
        num_comments = int(np.searchsorted(rows_before, row, side="right"))
        return {"file": self.file, "line": self.first_line + int(row) + num_comments}


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixScan:
    """One matrix, as far as it could be read."""

    matrix: csr_matrix[Any]
    """float32, ids ascending in each row, without duplicates, finite."""
    num_rows: int
    """That the file states; a file that ends before is a fault of its own."""
    places: RowPlaces


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitScan:
    """What could be read of a split; without errors, all of it."""

    features: csr_matrix[Any]
    """(rows, F) float32, ids ascending in each row."""
    labels: csr_matrix[Any]
    """(rows, L) float32, all ones, ids ascending in each row."""
    features_at: RowPlaces
    labels_at: RowPlaces


def join_scans(features: MatrixScan, labels: MatrixScan, report: Report) -> SplitScan:
    """A split of two files; another number of rows is a fault of the labels, kind `rows`."""
    if features.num_rows != labels.num_rows:
        name = Path(features.places.file).name
        text = f"there are {labels.num_rows} rows of labels, expected {features.num_rows} as of features in {name}."
        line = 1 if labels.places.first_line else None
        hint = "Are both files of the same split?"
        report(Problem(kind="rows", file=labels.places.file, line=line, text=text, hint=hint))
    least = min(features.matrix.shape[0], labels.matrix.shape[0])
    return SplitScan(
        features=_head(features.matrix, least),
        labels=ones_like(_head(labels.matrix, least), labels.places, report),
        features_at=features.places,
        labels_at=labels.places,
    )


def _head(matrix: csr_matrix[Any], num_rows: int) -> csr_matrix[Any]:
    return matrix if matrix.shape[0] == num_rows else canonical(matrix[:num_rows])


def ones_like(labels: csr_matrix[Any], places: RowPlaces, report: Report) -> csr_matrix[Any]:
    """A label matrix with relevances -> one of ones: what is stored and not 0 is a positive.

    A negative value is a fault, kind `label-weight`; others that are not 1 are worth a warning of that kind.
    """

    def first(odd: NDArray[np.bool_]) -> dict[str, Any]:
        entry = int(np.flatnonzero(odd)[0])
        return places.of(int(np.searchsorted(labels.indptr, entry, side="right")) - 1)

    negative, other = labels.data < 0, (labels.data >= 0) & (labels.data != 1)
    if negative.any():
        text = f"{negative.sum()} labels have a negative value, expected 1; this is the first."
        report(Problem(kind="label-weight", text=text, **first(negative)))
    if other.any():
        text = f"{other.sum()} labels have a value other than 1, which is read as 1, and 0 as no label; "
        text += "this is the first."
        report(Problem(level="warning", kind="label-weight", text=text, **first(other)))
        labels = labels.copy()
        labels.eliminate_zeros()
    return canonical(csr_matrix((np.ones(labels.nnz, np.float32), labels.indices, labels.indptr), shape=labels.shape))


def canonical(matrix: csr_matrix[Any]) -> csr_matrix[Any]:
    """The matrix itself, whose rows are known to ascend."""
    matrix.has_canonical_format = True
    return matrix


def read_header(path: Path, line: bytes, names: Sequence[str], report: Report) -> tuple[int, ...] | None:
    """The numbers of a first line; None after a fault, kind `header`.

    Parameters
    ----------
    names : what the numbers count, such as `instances`; instances may be none, the others are at least 1.
    """
    expected = f"expected the header `{' '.join(f'num_{name}' for name in names)}`."
    shown, words = excerpt(line.strip()), line.split()
    hint = None
    if not line:
        fact = "the file is empty"
    elif line.lstrip()[:1] == b"{" or (_WORD.search(line) and (b"\t" in line or b":" not in line)):
        fact = f"the first line is {shown}"
        hint = "Is this raw text? `xmc-midx prepare FILE --out DIR` makes a dataset of it."
    elif b":" in line:
        fact = "the file starts with an instance"
        hint = f"Put the {'three' if len(names) == 3 else 'two'} numbers into a line of their own before it."
        if len(names) == 3:
            hint += " A file that never had them is called .svm: its ids then say how many there are."
    elif len(words) == len(names) and all(_is_integer(word) for word in words):
        # int() refuses thousands of digits.
        sizes = tuple(int(word) if len(word) < 19 else 2**63 for word in words)
        for name, word, size in zip(names, words, sizes, strict=True):
            least = 0 if name == "instances" else 1
            if not least <= size <= MAX_SIZE:
                text = f"the header says {excerpt(word)[1:-1]} {name}, expected {least} to {MAX_SIZE}."
                report(Problem(kind="header", file=str(path), line=1, text=text))
                return None
        return sizes
    else:
        fact = f"the first line is {shown}"
        if len(words) == 2 and all(word.isdigit() for word in words):
            hint = "A file of features or labels alone has two numbers; it is called trn_X_Xf.txt or trn_X_Y.txt."
    report(Problem(kind="header", file=str(path), line=1, text=f"{fact}, {expected}", hint=hint))
    return None


def _is_integer(word: bytes) -> bool:
    return word.removeprefix(b"-").isdigit()


def warn_of_cut(lines: LineChunks, report: Report) -> None:
    """A last line without a newline is worth a warning: a file that was cut mostly has none."""
    if not lines.final_newline:
        text = "the last line has no newline."
        problem = Problem(
            level="warning",
            kind="final-newline",
            file=str(lines.path),
            line=lines.num_lines,
            text=text,
            hint="Is the file cut?",
        )
        report(problem)
