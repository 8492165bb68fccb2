"""Layer 2. A split as two SciPy matrices on disk, such as `X.trn.npz` and `Y.trn.npz`, as PECOS and pyxclib read them.

Before it: `arrays` and `matrices`. After it: `sources`. A file is what `scipy.sparse.save_npz` writes of a CSR matrix.
Nothing in it is run or believed: no pickles, and sizes, offsets, ids and values are compared before a matrix is made.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xmc_midx.data.arrays import ArrayFile, open_arrays
from xmc_midx.data.files import atomic_write
from xmc_midx.data.matrices import Column, checked_matrix
from xmc_midx.data.problems import Problem, Report
from xmc_midx.data.scans import MAX_SIZE, MatrixScan, RowPlaces, SplitScan, join_scans
from xmc_midx.data.table import float32_rows
from xmc_midx.errors import DataError, ResourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

__all__ = ["scan_npz", "scan_npz_pair", "write_npz"]

_MANY = 2**40
"""More entries than any memory holds."""


def scan_npz_pair(features: Path, labels: Path, report: Report) -> SplitScan | None:
    """Read both files, giving each fault to `report`; None if one is no matrix at all."""
    rows, positives = scan_npz(features, report), scan_npz(labels, report, column="label")
    return join_scans(rows, positives, report) if rows and positives else None


def scan_npz(path: Path, report: Report, *, column: Column = "feature") -> MatrixScan | None:
    """Read a CSR matrix of SciPy, giving each fault to `report`; faulty entries are left out where it returns.

    Ids may be out of order in a row; stored zeros are kept. Kinds: `array` (this is no CSR matrix), `feature-range`,
    `feature-past-end` and `feature-duplicate` or the same of `label`, and `value`. The faults of one kind are one
    problem, which counts them and names the first row, from 0.
    """
    try:
        with open_arrays(path) as arrays:
            values, ids, offsets, shape = _read_csr(path, arrays)
    except DataError as error:
        text = error.message.removeprefix(f"{path}: ")
        report(Problem(kind="array", file=str(path), text=text, hint=error.hint))
        return None
    except MemoryError:
        raise ResourceError(f"{path}: its arrays do not fit into the memory.") from None
    places = RowPlaces(file=str(path))
    matrix = checked_matrix(values, ids, offsets, shape, places, column, report)
    return MatrixScan(matrix=matrix, num_rows=shape[0], places=places)


def _read_csr(path: Path, arrays: ArrayFile) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64], tuple[int, int]]:
    """Values, ids and offsets of a CSR matrix, whose sizes fit one another, and its shape.

    Raises
    ------
    DataError : it is none.
    """
    wanted = {"format", "shape", "data", "indices", "indptr"}
    kind = arrays.read("format", kinds="SU", shape=(), most=1).item() if "format" in arrays.names else None
    if kind is None or (kind in (b"csr", "csr") and not wanted <= arrays.names):
        shown = ", ".join(sorted(arrays.names)[:6]) or "nothing"
        text = f"{path}: holds {shown}, expected the arrays {', '.join(sorted(wanted))} of a CSR matrix."
        raise DataError(text, hint="`scipy.sparse.save_npz` writes them.")
    if kind not in (b"csr", "csr"):
        text = f"{path}: holds a matrix of the format {ascii(kind)[:40]}, expected csr."
        raise DataError(text, hint="Save `matrix.tocsr()`.")
    num_rows, num_columns = arrays.read("shape", kinds="iu", shape=(2,), most=2).tolist()
    if not (0 <= num_rows <= MAX_SIZE and 1 <= num_columns <= MAX_SIZE):
        raise DataError(f"{path}: holds a matrix of {num_rows} x {num_columns}, expected sizes up to {MAX_SIZE}.")
    offsets = arrays.read("indptr", kinds="iu", shape=(num_rows + 1,), most=MAX_SIZE)
    num_entries = int(offsets[-1])
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
        raise DataError(f"{path}: its offsets do not rise from 0, so it is not known where the rows are.")
    # There may be room for more behind the last entry, as SciPy allows.
    ids = arrays.read("indices", kinds="iu", shape=(num_entries,), most=_MANY, spare=True)
    values = arrays.read("data", kinds="fbiu", shape=(num_entries,), most=_MANY, spare=True)
    return values[:num_entries], ids[:num_entries], offsets.astype(np.int64), (num_rows, num_columns)


def write_npz(path: str | Path, matrix: csr_matrix[Any]) -> None:
    """Write a float32 CSR matrix that `scipy.sparse.load_npz` and `scan_npz` read back equal.

    Equal matrices give equal files.

    Raises
    ------
    DataError : a value is not finite.
    ResourceError : the file cannot be written.
    """
    path = Path(path)
    matrix = float32_rows(path, matrix)
    arrays = {
        "indices": matrix.indices,
        "indptr": matrix.indptr,
        "format": np.array(b"csr"),
        "shape": np.array(matrix.shape),
        "data": matrix.data,
    }
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # A fixed time: equal content, equal file.
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, version=(1, 0))
