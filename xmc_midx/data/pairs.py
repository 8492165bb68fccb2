"""Layer 2. A split in two files: `trn_X_Xf.txt`, the features, and `trn_X_Y.txt`, the labels, as pyxclib has them.

Before it: `table` (lines -> CSR). After it: `sources`. Each file has a header `num_instances num_features` (or
`num_labels`) and then, for each instance, a line `id:value id:value ...`, ids from 0.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks, atomic_write
from xmc_midx.data.parser import Rules
from xmc_midx.data.problems import Report, raise_error
from xmc_midx.data.scans import MatrixScan, RowPlaces, SplitScan, join_scans, read_header, warn_of_cut
from xmc_midx.data.table import RowTable, float32_rows, row_texts

__all__ = ["read_sparse", "scan_pair", "scan_sparse", "write_sparse"]

_WRITE_ROWS = 4096


def scan_pair(features: Path, labels: Path, report: Report) -> SplitScan | None:
    """Read both files, giving each fault to `report`; None if one has no usable header."""
    rows, positives = scan_sparse(features, report), scan_sparse(labels, report, column="label")
    return join_scans(rows, positives, report) if rows and positives else None


def read_sparse(path: str | Path) -> csr_matrix[Any]:
    """A matrix in sparse text (plain, .gz, .bz2, .xz), float32; what pyxclib calls a sparse file.

    Zero values are kept as stored zeros, unsorted ids are sorted.

    Raises
    ------
    DataError : with `file:line` of the first fault.
    """
    scan = scan_sparse(Path(path), raise_error)
    assert scan is not None  # raise_error raises
    return scan.matrix


def scan_sparse(
    path: Path, report: Report, *, column: Literal["feature", "label"] = "feature", line_by_line: bool = False
) -> MatrixScan | None:
    """Read sparse text, giving each fault to `report`; faulty parts are left out where `report` returns.

    Parameters
    ----------
    path, report : the file and who hears of its faults: those of `LineChunks` and `parse_lines`, `header` and `rows`.
    column : what a column is, for the messages.
    line_by_line : use the strict reader for all lines: the reference of the tests.
    """
    lines = LineChunks(path, report)
    chunks = iter(lines)
    _, chunk = next(chunks, (1, b""))
    if not chunk and not lines.complete:
        return None  # the fault of the stream is known
    head, newline, rest = chunk.partition(b"\n")
    header = read_header(path, head + newline, ("instances", f"{column}s"), report)
    if header is None:
        return None
    num_rows, num_columns = header
    rules = Rules(
        file=str(path),
        num_features=num_columns,
        num_labels=0,
        kind=column,
        feature="feature id" if column == "feature" else "label",
        num_features_source=f"the header says {num_columns} {column}s",
    )
    source = f"the header says {num_rows}"
    table = RowTable(rules, report, num_rows=num_rows, source=source, line_by_line=line_by_line)
    table.read(lines, itertools.chain([(2, rest)] if rest else [], chunks))
    warn_of_cut(lines, report)
    return MatrixScan(matrix=table.features(), num_rows=num_rows, places=RowPlaces(file=str(path), first_line=2))


def write_sparse(path: str | Path, matrix: csr_matrix[Any]) -> None:
    """Write sparse text that `read_sparse` reads back equal, the same bytes as pyxclib's `write_sparse_file`.

    Parameters
    ----------
    path : appears complete or not at all; its name says how it is compressed.
    matrix : finite in float32, in which it is written: each value with all digits of its float64.

    Raises
    ------
    DataError : a value is not finite.
    ResourceError : the file cannot be written.
    """
    path = Path(path)
    matrix = float32_rows(path, matrix)
    with atomic_write(path) as file:
        file.write(f"{matrix.shape[0]} {matrix.shape[1]}\n".encode())
        for start in range(0, matrix.shape[0], _WRITE_ROWS):
            part = matrix[start : start + _WRITE_ROWS]
            pairs = zip(part.indices.tolist(), part.data.astype(np.float64).tolist(), strict=True)
            texts = [f"{column}:{value}" for column, value in pairs]
            file.writelines(f"{line}\n".encode() for line in row_texts(texts, part.indptr, " "))
