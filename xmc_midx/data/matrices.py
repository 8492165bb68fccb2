"""Layer 2. Matrices that are in memory already, or whose arrays were read from a file, as a split may have them.

Before it: `scans`. After it: `npz` and `dataset`. Nothing in a matrix is believed: compiled code follows its ids
without looking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmc_midx.data.problems import Problem, Report, raise_error
from xmc_midx.data.scans import MAX_SIZE, MatrixScan, RowPlaces, SplitScan, canonical, join_scans
from xmc_midx.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Column", "checked_matrix", "scan_matrices"]

Column = Literal["feature", "label"]


def scan_matrices(features: Any, labels: Any, *, kind: str = "") -> SplitScan:
    """A split of two matrices, each a SciPy matrix or array of any format, or a NumPy array of two dimensions.

    What can be shared with them is; they are not changed. Entries that occur twice are summed, as SciPy does.

    Parameters
    ----------
    features : (N, F) numbers.
    labels : (N, L), not 0 where a label applies.
    kind : of the split, such as `"test "`, before "features" and "labels" in messages.

    Raises
    ------
    UsageError : one of them is no matrix of numbers.
    DataError : ids, values or sizes are at fault, with the row.
    """
    rows, positives = _scan(features, "feature", f"{kind}features"), _scan(labels, "label", f"{kind}labels")
    return join_scans(rows, positives, raise_error)


def _scan(given: Any, column: Column, name: str) -> MatrixScan:
    if not issparse(given):
        try:
            given = np.asarray(given)
        except ValueError:  # lists of different lengths
            given = np.asarray(given, dtype=object)
    if given.ndim != 2 or given.dtype.kind not in "fbiu":
        raise UsageError(
            f"The {name} are of {given.ndim} dimensions and {given.dtype}; expected a matrix of numbers, an instance a "
            "row.",
            hint="Of lists of labels, sklearn.preprocessing.MultiLabelBinarizer(sparse_output=True) makes one.",
        )
    if not issparse(given) and given.dtype.kind == "f" and given.dtype.itemsize < 4:
        given = given.astype(np.float32)  # SciPy knows no half precision
    if not 1 <= given.shape[1] <= MAX_SIZE or given.shape[0] > MAX_SIZE:
        raise DataError(f"{name}: a matrix of {given.shape[0]} x {given.shape[1]}, expected sizes up to {MAX_SIZE}.")
    if issparse(given):
        _require_sound(given, name)
    matrix = csr_matrix(given)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    places = RowPlaces(file=name)
    offsets = matrix.indptr.astype(np.int64, copy=False)
    matrix = checked_matrix(matrix.data, matrix.indices, offsets, matrix.shape, places, column, raise_error)
    return MatrixScan(matrix=matrix, num_rows=matrix.shape[0], places=places)


def _require_sound(given: Any, name: str) -> None:
    """Refuse offsets and ids that SciPy's compiled code would follow out of its arrays; the ids of CSR are looked at
    with their rows (`checked_matrix`)."""
    ids: list[tuple[NDArray[Any], int]] = []
    if given.format in ("csr", "csc", "bsr"):
        offsets, found = given.indptr, given.indices
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or offsets[-1] > len(found):
            raise DataError(f"{name}: the matrix's offsets do not rise from 0, so it is not known where its rows are.")
        if given.format == "csc":
            ids = [(found, given.shape[0])]
        elif given.format == "bsr":
            ids = [(found, given.shape[1] // given.blocksize[1])]
    elif given.format == "coo":
        ids = [(given.row, given.shape[0]), (given.col, given.shape[1])]
    for found, size in ids:
        if found.size and not 0 <= found.min() <= found.max() < size:
            raise DataError(
                f"{name}: the matrix holds ids from {found.min()} to {found.max()}, expected 0 to {size - 1}."
            )


def checked_matrix(
    values: NDArray[Any],
    ids: NDArray[Any],
    offsets: NDArray[np.int64],
    shape: tuple[int, int],
    places: RowPlaces,
    column: Column,
    report: Report,
) -> csr_matrix[Any]:
    """The matrix of some CSR arrays without its faulty entries, float32, ids ascending in each row.

    Each fault goes to `report`: kinds `feature-range`, `feature-past-end` and `feature-duplicate` or the same of
    `label`, and `value`. The faults of one kind are one problem, which counts them and names the first row, from 0.
    """
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
