"""Layer 2. XMC text and label names <-> matrices; every error carries file and line.

Before it: `files` (streams of lines) and `parser` (lines -> rows). After it: `sources`. A file is read in one
pass with bounded memory beyond the result, whatever its header says, and every row keeps its place.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks, atomic_write
from xmc_midx.data.parser import Rules
from xmc_midx.data.predictions import read_predictions, write_predictions
from xmc_midx.data.problems import Problem, Report, excerpt, raise_error
from xmc_midx.data.scans import RowPlaces, SplitScan, read_header, warn_of_cut
from xmc_midx.data.table import RowTable, float32_rows, pair_texts, row_texts
from xmc_midx.errors import DataError

__all__ = [
    "read_labels",
    "read_predictions",
    "read_xmc",
    "scan_xmc",
    "split_lines",
    "write_predictions",
    "write_xmc",
]

_WRITE_ROWS = 4096
_NUMBERED = re.compile(rb"[ ]*(\d{1,18})[ ]*\t[ ]*[^ \t]")
"""A line of label names that begins with a number."""


def read_xmc(path: str | Path) -> tuple[csr_matrix[Any], csr_matrix[Any]]:
    """Features and labels of an XMC text file (plain, .gz, .bz2, .xz).

    The first line is `num_instances num_features num_labels`; then one line an instance, `l1,l2,... f:v f:v
    ...`, ids from 0. A line that starts with a blank (or with `id:value`) has no labels, a blank line
    neither. Accepted as well: CRLF, a byte order mark, unsorted ids, tabs or several spaces, a missing last
    newline, and blank lines after the last instance. Zero values are kept as stored zeros.

    Returns
    -------
    features : (N, F) float32 CSR, ids ascending in each row; an absent feature is 0.
    labels : (N, L) float32 CSR of ones, ids ascending in each row.

    Raises
    ------
    DataError : with `file:line` of the first fault. Nothing is repaired, dropped or shifted.
    """
    scan = scan_xmc(Path(path), raise_error)
    assert scan is not None  # raise_error raises
    return scan.features, scan.labels


def scan_xmc(path: Path, report: Report, *, line_by_line: bool = False) -> SplitScan | None:
    """Read XMC text, giving each fault to `report`; faulty parts are left out where `report` returns.

    Parameters
    ----------
    path, report : the file and who hears of its faults: those of `LineChunks` and `parse_lines`, `header` and
        `rows`; and of the warning `final-newline`.
    line_by_line : use the strict reader for all lines: the reference of the tests.

    Returns
    -------
    What was read, None if there is no usable header.
    """
    lines = LineChunks(path, report)
    chunks = iter(lines)
    _, chunk = next(chunks, (1, b""))
    if not chunk and not lines.complete:
        return None  # the fault of the stream is known
    head, newline, rest = chunk.partition(b"\n")
    header = read_header(path, head + newline, ("instances", "features", "labels"), report)
    if header is None:
        return None
    num_rows, num_features, num_labels = header
    rules = Rules(
        file=str(path),
        num_features=num_features,
        num_labels=num_labels,
        num_features_source=f"the header says {num_features} features",
        num_labels_source=f"the header says {num_labels} labels",
    )
    source = f"the header says {num_rows}"
    table = RowTable(rules, report, num_rows=num_rows, source=source, line_by_line=line_by_line)
    table.read(lines, itertools.chain([(2, rest)] if rest else [], chunks))
    warn_of_cut(lines, report)
    places = RowPlaces(file=str(path), first_line=2)
    return SplitScan(features=table.features(), labels=table.labels(), features_at=places, labels_at=places)


def write_xmc(path: str | Path, features: csr_matrix[Any], labels: csr_matrix[Any]) -> None:
    """Write XMC text that `read_xmc` reads back to equal matrices; the name says how it is compressed.

    Parameters
    ----------
    path : appears complete or not at all.
    features : (N, F), finite in float32. Values are written with the fewest digits that give the same
    float32. labels : (N, L); every stored value other than 0 is a label.

    Raises
    ------
    DataError : the matrices do not fit together, or a value is not finite.
    ResourceError : the file cannot be written.
    """
    path = Path(path)
    lines = split_lines(path, features, labels)
    with atomic_write(path) as file:
        file.write(f"{features.shape[0]} {features.shape[1]} {labels.shape[1]}\n".encode())
        file.writelines(lines)


def split_lines(path: Path, features: csr_matrix[Any], labels: csr_matrix[Any]) -> Iterator[bytes]:
    """The lines of `write_xmc` after the header; what it raises is raised before the first of them."""
    features, labels = float32_rows(path, features), float32_rows(path, labels)
    labels.eliminate_zeros()
    if features.shape[0] != labels.shape[0]:
        raise DataError(f"{path}: {features.shape[0]} rows of features, {labels.shape[0]} of labels.")

    def lines() -> Iterator[bytes]:
        for start in range(0, features.shape[0], _WRITE_ROWS):
            stop = start + _WRITE_ROWS
            for ids, pairs in zip(_label_texts(labels[start:stop]), _feature_texts(features[start:stop]), strict=True):
                # A row without labels starts with a blank, also where it is all there is in the line.
                yield f"{ids} {pairs}".rstrip().encode() + b"\n" if ids else f" {pairs}\n".encode()

    return lines()


def _feature_texts(features: csr_matrix[Any]) -> list[str]:
    return row_texts(pair_texts(features.indices, features.data), features.indptr, " ")


def _label_texts(labels: csr_matrix[Any]) -> list[str]:
    return row_texts([str(label) for label in labels.indices.tolist()], labels.indptr, ",")


def read_labels(path: str | Path, num_labels: int | None = None, *, report: Report = raise_error) -> tuple[str, ...]:
    """Names of the labels: line i names label i.

    Where a line has columns (`id TAB name`), the second is the name, or the first if the second is empty. A
    line without either is shown as the label's number.

    Parameters
    ----------
    path : UTF-8 text, plain, .gz, .bz2 or .xz.
    num_labels : number of names to expect, None takes what there is.
    report : receives the faults; kinds `encoding` and `rows`, and those of `LineChunks`.

    Raises
    ------
    DataError : a line is not UTF-8, or there are more or fewer names than labels.
    """
    path = Path(path)
    names: list[str] = []
    numbers: list[int] = []
    lines = LineChunks(path, report)
    num_used = 0
    for _, text in lines:
        for line in text.removesuffix(b"\n").split(b"\n"):
            names.append(_label_name(path, line, len(names), report))
            if match := _NUMBERED.match(line):
                numbers.append(int(match[1]))
            if line.strip():
                num_used = len(names)
    if lines.complete:
        # Blank lines after the last label are no labels.
        del names[max(num_labels or 0, num_used) :]
        is_numbered = len(numbers) == len(names) and sorted(numbers) in _countings(len(names))
        if is_numbered and numbers != sorted(numbers):
            label = next(label for label, number in enumerate(numbers) if number != min(numbers) + label)
            fact = f"the line begins with {numbers[label]}, but names label {label}: names go by their lines alone."
            report(Problem(kind="rows", file=str(path), line=label + 1, text=fact, hint="Sort the file: sort -n."))
        if num_labels is not None and len(names) != num_labels:
            fact = f"the file holds {len(names)} names, expected one for each of {num_labels} labels."
            line_number = min(len(names), num_labels + 1)
            hint = "Are these the labels of another data set?"
            report(Problem(kind="rows", file=str(path), line=line_number, text=fact, hint=hint))
    return tuple(names)


def _countings(size: int) -> tuple[list[int], list[int]]:
    """0 to `size` - 1, and 1 to `size`."""
    return list(range(size)), list(range(1, size + 1))


def _label_name(path: Path, line: bytes, label: int, report: Report) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", errors="replace")
        fact = f"{excerpt(line)} is not UTF-8."
        report(Problem(kind="encoding", file=str(path), line=label + 1, text=fact, hint="Convert the file."))
    columns = text.split("\t")
    second = columns[1].strip() if len(columns) > 1 else ""
    return second or columns[0].strip() or str(label)
