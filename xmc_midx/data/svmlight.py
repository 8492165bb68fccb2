"""Layer 2. XMC text without a header, which is svmlight with several labels: `l1,l2,... f:v f:v ...` on each line.

Before it: `table` (lines -> CSR). After it: `sources`. Nothing in such a file says how many features and labels there
are: the largest ids do, and `dataset` takes those of both splits together.

Ids are taken as they are. Where features count from 1, as LIBSVM has them, feature 0 is one that never occurs: it costs
a row of a table, and there is no guess that could turn out otherwise for the next file.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks, atomic_write
from xmc_midx.data.formats import split_lines
from xmc_midx.data.parser import Rules
from xmc_midx.data.problems import Problem, Report, excerpt, raise_error
from xmc_midx.data.scans import MAX_SIZE, RowPlaces, SplitScan, canonical, warn_of_cut
from xmc_midx.data.table import RowTable

__all__ = ["read_svmlight", "scan_svmlight", "write_svmlight"]

_HEADER = re.compile(rb"\s*\d+[ \t]+\d+[ \t]+\d+\s*")


def read_svmlight(path: str | Path) -> tuple[csr_matrix[Any], csr_matrix[Any]]:
    """Features and labels of text without a header (plain, .gz, .bz2, .xz).

    Each line is an instance, a blank one too: it has neither labels nor features. A line that starts with a blank (or
    with `id:value`) has no labels. What follows a `#` is a comment; a line of nothing else is no instance. `qid:N` is
    passed over. As in XMC text, CRLF, a byte order mark, unsorted ids, tabs and zero values may be there.

    Returns
    -------
    features : (N, F) float32 CSR, F the largest feature id + 1.
    labels : (N, L) float32 CSR of ones, L the largest label + 1.

    Raises
    ------
    DataError : with `file:line` of the first fault.
    """
    scan = scan_svmlight(Path(path), raise_error)
    assert scan is not None  # raise_error raises
    return scan.features, scan.labels


def scan_svmlight(path: Path, report: Report, *, line_by_line: bool = False) -> SplitScan | None:
    """Read text without a header, giving each fault to `report`; see `read_svmlight` and `scan_xmc`."""
    lines = LineChunks(path, report)
    chunks = iter(lines)
    first = next(chunks, None)
    if first is None:
        if lines.complete:
            text = "the file is empty, expected an instance `label,label feature:value ...` on each line."
            report(Problem(kind="rows", file=str(path), line=1, text=text))
        return None
    head = first[1].partition(b"\n")[0]
    if _HEADER.fullmatch(head):
        text = f"the first line is {excerpt(head.strip())}, a header; expected an instance."
        hint = "Text with a header is called .txt, as in train.txt."
        report(Problem(kind="header", file=str(path), line=1, text=text, hint=hint))
        return None
    rules = Rules(
        file=str(path),
        num_features=MAX_SIZE,
        num_labels=MAX_SIZE,
        num_features_source="ids have 31 bits",
        num_labels_source="ids have 31 bits",
        svmlight=True,
    )
    table = RowTable(rules, report, num_rows=None, source="", line_by_line=line_by_line)
    table.read(lines, itertools.chain([first], chunks))
    warn_of_cut(lines, report)
    places = RowPlaces(file=str(path), first_line=1, comment_lines=table.comment_lines())
    features, labels = (_fitted(matrix) for matrix in (table.features(), table.labels()))
    return SplitScan(features=features, labels=labels, features_at=places, labels_at=places)


def _fitted(matrix: csr_matrix[Any]) -> csr_matrix[Any]:
    """With as many columns as the largest id asks for, at least one."""
    num_columns = int(matrix.indices.max(initial=0)) + 1
    shape = (matrix.shape[0], num_columns)
    return canonical(csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=shape))


def write_svmlight(path: str | Path, features: csr_matrix[Any], labels: csr_matrix[Any]) -> None:
    """Write text without a header; see `write_xmc`. Columns after the last that is used are not there when it is read.

    Raises
    ------
    DataError, ResourceError : as `write_xmc`.
    """
    path = Path(path)
    lines = split_lines(path, features, labels)
    with atomic_write(path) as file:
        file.writelines(lines)
