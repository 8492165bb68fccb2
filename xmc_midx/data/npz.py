"""Layer 2. A split as two SciPy matrices on disk, such as `X.trn.npz` and `Y.trn.npz`, as PECOS and pyxclib read them.

Before it: `scans`. After it: `sources`. A file is what `scipy.sparse.save_npz` writes of a CSR matrix. Nothing in it is
run or believed: no pickles, and sizes, offsets, ids and values are compared with one another before a matrix is made.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import atomic_write
from xmc_midx.data.problems import Problem, Report
from xmc_midx.data.scans import MAX_SIZE, MatrixScan, RowPlaces, SplitScan, canonical, join_scans
from xmc_midx.data.table import float32_rows
from xmc_midx.errors import ResourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["scan_npz", "scan_npz_pair", "write_npz"]

_MAX_HEADER_BYTES = 10_000
"""Of one array; NumPy's take 128."""
_BLOCK_BYTES = 2**20
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
)
"""What zipfile and NumPy raise on a damaged file."""

Column = Literal["feature", "label"]


def scan_npz_pair(features: Path, labels: Path, report: Report) -> SplitScan | None:
    """Read both files, giving each fault to `report`; None if one is no matrix at all."""
    rows, positives = scan_npz(features, report), scan_npz(labels, report, column="label")
    return join_scans(rows, positives, report) if rows and positives else None


def scan_npz(path: Path, report: Report, *, column: Column = "feature") -> MatrixScan | None:
    """Read a CSR matrix of SciPy, giving each fault to `report`; faulty entries are left out where it returns.

    Ids may be out of order in a row; stored zeros are kept. Kinds: `file`, `array` (the arrays are not those of a CSR
    matrix), `feature-range`, `feature-duplicate` or the same of `label`, and `value`. The faults of one kind are one
    problem, which counts them and names the first row, from 0.
    """

    def fault(kind: str, text: str, hint: str | None = None) -> None:
        report(Problem(kind=kind, file=str(path), text=text, hint=hint))

    try:
        with zipfile.ZipFile(path) as archive:
            arrays, shape = _read_arrays(archive)
    except _NotCsrError as error:
        fault("array", error.text, error.hint)
    except MemoryError:
        raise ResourceError(f"{path}: its arrays do not fit into the memory.") from None
    except OSError as error:
        fault("file", f"cannot be read: {error.strerror or error}.")
    except _DAMAGE as error:
        fault("file", f"is no .npz file or a damaged one ({str(error).rstrip('.')[:80]}).", "Copy it again.")
    else:
        places = RowPlaces(file=str(path))
        return MatrixScan(matrix=_checked(*arrays, shape, places, column, report), places=places)
    return None


class _NotCsrError(Exception):
    """The file holds something else than a CSR matrix."""

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.hint = hint


def _read_arrays(archive: zipfile.ZipFile) -> tuple[tuple[NDArray[Any], NDArray[Any], NDArray[Any]], tuple[int, int]]:
    """Values, ids and offsets of a CSR matrix, whose sizes fit one another, and its shape."""
    names = set(archive.namelist())
    wanted = {"format", "shape", "data", "indices", "indptr"}
    kind = _read_array(archive, "format", "SU") if "format.npy" in names else None
    is_csr = kind is not None and kind.size == 1 and kind.item() in (b"csr", "csr")
    if kind is None or (is_csr and not {f"{name}.npy" for name in wanted} <= names):
        shown = ", ".join(sorted(name.removesuffix(".npy") for name in names)[:6]) or "nothing"
        text = f"holds {shown}, expected the arrays {', '.join(sorted(wanted))} of a CSR matrix."
        raise _NotCsrError(text, "`scipy.sparse.save_npz` writes them.")
    if not is_csr:
        shown = ascii(kind.tolist())[:40]
        raise _NotCsrError(f"holds a matrix of the format {shown}, expected csr.", "Save `matrix.tocsr()`.")
    shape = _read_array(archive, "shape", "iu").tolist()
    if not (isinstance(shape, list) and len(shape) == 2 and 0 <= shape[0] <= MAX_SIZE and 1 <= shape[1] <= MAX_SIZE):
        raise _NotCsrError(f"holds a matrix of the shape {str(shape)[:60]}, expected two sizes up to {MAX_SIZE}.")
    offsets = _read_array(archive, "indptr", "iu")
    if offsets.shape != (shape[0] + 1,):
        raise _NotCsrError(f"holds {offsets.size} offsets, expected {shape[0] + 1} as its shape has {shape[0]} rows.")
    ids, values = _read_array(archive, "indices", "iu"), _read_array(archive, "data", "fbiu")
    if not (ids.ndim == values.ndim == 1 and ids.size == values.size == offsets[-1]):
        text = f"holds {ids.size} ids, {values.size} values and offsets up to {offsets[-1]}, expected one number."
        raise _NotCsrError(text)
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
        raise _NotCsrError("its offsets do not rise from 0, so it is not known where the rows are.")
    return (values, ids, offsets), (shape[0], shape[1])


def _read_array(archive: zipfile.ZipFile, name: str, kinds: str) -> NDArray[Any]:
    """An array of at most one dimension whose type is one of `kinds`, and as long as it states."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_MAX_HEADER_BYTES)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream, max_header_size=_MAX_HEADER_BYTES)
        else:
            raise ValueError(f"array {name} of the version {version}")
        if dtype.hasobject or dtype.kind not in kinds or len(shape) > 1:
            expected = {"SU": "a word", "iu": "integers"}.get(kinds, "numbers")
            raise _NotCsrError(f"its array {name!r} is of {len(shape)} dimensions and {dtype}, expected {expected}.")
        size = math.prod(shape) * dtype.itemsize
        content = _read_exactly(stream, size)
    array: NDArray[Any] = np.frombuffer(content, dtype=dtype)
    return array.reshape(shape)


def _read_exactly(stream: IO[bytes], size: int) -> bytearray:
    """The bytes up to the end, where zipfile compares the checksum; what the array states is not believed."""
    content = bytearray()
    while len(content) <= size and (block := stream.read(_BLOCK_BYTES)):
        content += block
    if len(content) != size:
        raise ValueError("an array is not as long as it states")
    return content


def _checked(
    values: NDArray[Any],
    ids: NDArray[Any],
    offsets: NDArray[Any],
    shape: tuple[int, int],
    places: RowPlaces,
    column: Column,
    report: Report,
) -> csr_matrix[Any]:
    """The matrix without its faulty entries, float32, ids ascending in each row."""
    starts = offsets.astype(np.int64)
    counts: NDArray[np.int64] = starts[1:] - starts[:-1]
    rows = np.repeat(np.arange(shape[0], dtype=np.int32), counts)
    name = "feature id" if column == "feature" else "label"

    def fault(kind: str, faulty: NDArray[np.bool_], text: str, hint: str | None = None) -> None:
        """`text` is about the first one."""
        number, first = int(faulty.sum()), int(np.argmax(faulty))
        text = text.format(id=ids[first], value=values[first])
        more = f" So are {number - 1} others." if number > 1 else ""
        report(Problem(kind=kind, text=text + more, hint=hint, **places.of(int(rows[first]))))

    outside = (ids < 0) | (ids >= shape[1])
    if outside.any():
        text = f"{name} {{id}} is outside 0..{shape[1] - 1} (the shape has {shape[1]} columns)."
        past_end = bool((ids[outside] == shape[1]).all())
        hint = f"Do the {column} ids start from 1?" if past_end else None
        fault(f"{column}-past-end" if past_end else f"{column}-range", outside, text, hint)
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    odd = ~np.isfinite(numbers)
    if odd.any():
        is_number = np.isfinite(values[int(np.argmax(odd))])
        end = "beyond the range of float32" if is_number else "not finite"
        fault("value", odd, f"the value {{value}} of {name} {{id}} is {end}.")
    kept = ~(outside | odd)
    if not kept.all():
        rows, ids, numbers, values = rows[kept], ids[kept], numbers[kept], values[kept]
    falls = (rows[1:] == rows[:-1]) & (ids[1:] <= ids[:-1])
    if falls.any():
        order = np.lexsort((ids, rows))
        rows, ids, numbers, values = rows[order], ids[order], numbers[order], values[order]
        twice = np.concatenate([[False], (rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1])])
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
