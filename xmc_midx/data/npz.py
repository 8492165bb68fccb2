"""Layer 2. A split as two SciPy matrices on disk, such as `X.trn.npz` and `Y.trn.npz`, as PECOS and pyxclib read them.

Before it: `arrays` and `scans`. After it: `sources`. A file is what `scipy.sparse.save_npz` writes of a CSR matrix.
Nothing in it is run or believed: no pickles, and sizes, offsets, ids and values are compared before a matrix is made.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.arrays import ArrayFile, open_arrays
from xmc_midx.data.files import atomic_write
from xmc_midx.data.problems import Problem, Report
from xmc_midx.data.scans import MAX_SIZE, MatrixScan, RowPlaces, SplitScan, canonical, join_scans
from xmc_midx.data.table import float32_rows
from xmc_midx.errors import DataError, ResourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["scan_npz", "scan_npz_pair", "write_npz"]

_MANY = 2**40
"""More entries than any memory holds."""

Column = Literal["feature", "label"]


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
    matrix = _checked(values, ids, offsets, shape, places, column, report)
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


def _checked(
    values: NDArray[Any],
    ids: NDArray[Any],
    offsets: NDArray[np.int64],
    shape: tuple[int, int],
    places: RowPlaces,
    column: Column,
    report: Report,
) -> csr_matrix[Any]:
    """The matrix without its faulty entries, float32, ids ascending in each row."""
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32, copy=False)
    outside, odd = (ids < 0) | (ids >= shape[1]), ~np.isfinite(numbers)
    falls = ids[1:] <= ids[:-1]
    starts = offsets[1:-1]
    falls[starts[(starts > 0) & (starts < len(ids))] - 1] = False  # a row may begin with any id
    if not (outside.any() or odd.any() or falls.any()):
        return canonical(csr_matrix((numbers, ids.astype(np.int32, copy=False), offsets), shape=shape))
    rows = np.repeat(np.arange(shape[0], dtype=np.int32), np.diff(offsets).astype(np.int64))
    name = "feature id" if column == "feature" else "label"

    def fault(kind: str, faulty: NDArray[np.bool_], text: str, hint: str | None = None) -> None:
        """`text` is about the first one."""
        number, first = int(faulty.sum()), int(np.argmax(faulty))
        text = text.format(id=ids[first], value=values[first])
        more = f" There are {number} of them." if number > 1 else ""
        report(Problem(kind=kind, text=text + more, hint=hint, **places.of(int(rows[first]))))

    if outside.any():
        text = f"{name} {{id}} is outside 0..{shape[1] - 1} (the shape has {shape[1]} columns)."
        past_end = bool((ids[outside] == shape[1]).all())
        hint = f"Do the {column} ids start from 1?" if past_end else None
        fault(f"{column}-past-end" if past_end else f"{column}-range", outside, text, hint)
    if odd.any():
        end = "beyond the range of float32" if np.isfinite(values[int(np.argmax(odd))]) else "not finite"
        fault("value", odd, f"the value {{value}} of {name} {{id}} is {end}.")
    kept = np.flatnonzero(~(outside | odd))
    order = kept[np.lexsort((ids[kept], rows[kept]))]
    rows, ids, values, numbers = rows[order], ids[order], values[order], numbers[order]
    twice = np.zeros(len(ids), dtype=np.bool_)
    twice[1:] = (rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1])
    if twice.any():
        fault(f"{column}-duplicate", twice, f"{name} {{id}} occurs twice, expected once.")
        rows, ids, numbers = rows[~twice], ids[~twice], numbers[~twice]
    ends = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    return canonical(csr_matrix((numbers, ids.astype(np.int32), ends), shape=shape))


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
