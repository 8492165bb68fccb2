"""Layer 2. Tables in one byte a coordinate, or half of one: each row whole numbers with a scale of its own.

What that costs is in EXPERIMENTS.md, "The saved model".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled, is_kept
from xmc_midx.intrinsics import AHEAD, fetch_row, for_each_type
from xmc_midx.threads import in_threads

__all__ = ["StoredTable", "dequantize", "is_compiled", "quantize", "read_only", "require_one_model", "row_product"]

_BYTES, _HALVES, _SCALES = ".int8", ".int4", ".scale"
_CHUNK_ROWS = 1 << 12
_MAX_CODE, _MAX_HALF = 127, 7
_SHARES = np.linspace(0.4, 1.0, 13, dtype=np.float32)
"""Of a row's largest coordinate, that the largest code may stand for where codes are few: what is larger is cut off."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTable:
    """A float table as it is stored, perhaps mapped from a file: row r is `codes[r] * scales[r]`."""

    codes: NDArray[Any]
    """(R, D) int8 or float32; or (R, D / 2) uint8, codes of four bits: below, those of the first half of a row."""
    scales: NDArray[np.float32]
    """(R,)."""

    @classmethod
    def of(cls, table_RD: NDArray[np.float32]) -> StoredTable:
        """A table in float32, not copied."""
        return cls(codes=table_RD, scales=np.ones(table_RD.shape[0], dtype=np.float32))

    @classmethod
    def take(cls, arrays: Arrays, name: str) -> StoredTable:
        """A table of what `quantize` gave; a LookupError or ValueError where it is not there, or damaged."""
        kind = _HALVES if name + _HALVES in arrays else _BYTES
        if name + kind not in arrays:
            table = np.ascontiguousarray(arrays[name], dtype=np.float32)
            if table.ndim != 2:
                raise ValueError(f"{name}: {table.ndim} dimensions, expected 2")
            return cls.of(table)
        codes, scales = arrays[name + kind], arrays[name + _SCALES]
        expected = np.uint8 if kind == _HALVES else np.int8
        if codes.dtype != expected or codes.ndim != 2 or scales.dtype != np.float32:
            raise ValueError(f"{name}: expected {np.dtype(expected).name} codes and float32 scales")
        if scales.shape != codes.shape[:1]:
            raise ValueError(f"{name}: {codes.shape[0]} rows and scales of shape {scales.shape}")
        return cls(codes=codes, scales=scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * (2 if self.codes.dtype == np.uint8 else 1)

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """What compiled code takes: as of a mapped file, so that it is compiled for one kind of array."""
        return read_only(self.codes), read_only(self.scales)

    def products(self, query_BD: NDArray[np.float32], ids_BW: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, W): the inner products of each query with the rows of its own ids."""
        found_BW = np.empty(ids_BW.shape, dtype=np.float32)
        in_threads(lambda first, last: _products(query_BD, *self.arrays, ids_BW, found_BW, first, last), len(query_BD))
        return found_BW

    def bag(self, features: csr_matrix) -> NDArray[np.float32]:
        """(B, D): `features @ table` of (B, R) sparse rows."""
        found_BD = np.zeros((features.shape[0], self.shape[1]), dtype=np.float32)
        rows = (features.indptr, features.indices, features.data)
        in_threads(lambda first, last: _bag(rows, *self.arrays, found_BD, first, last), len(found_BD))
        return found_BD

    def rows(self, part: slice = slice(None)) -> NDArray[np.float32]:
        """The rows, or part of them, in float32; not copied where they are stored so."""
        if self.codes.dtype == np.float32:
            return self.codes[part]
        if self.codes.dtype == np.int8:
            return self.codes[part] * self.scales[part, None]
        codes, scales = self.codes[part], self.scales[part]
        found_RD = np.empty((len(codes), self.shape[1]), dtype=np.float32)
        in_threads(lambda first, last: _unpack(codes, scales, found_RD, first, last), len(codes))
        return found_RD

    def mean_error(
        self, table_RD: NDArray[np.float32], before_D: NDArray[np.float32], after_D: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """(R,): `table @ before - rows @ after`, of the table that this one stands for and two mean queries."""
        found_R = np.empty(self.shape[0], dtype=np.float32)
        for begin in range(0, self.shape[0], _CHUNK_ROWS):
            rows = slice(begin, begin + _CHUNK_ROWS)
            found_R[rows] = table_RD[rows] @ before_D - self.rows(rows) @ after_D
        return found_R


def require_one_model(arrays: Arrays) -> None:
    """That tables, biases and label frequencies are of the same labels and the same D: compiled code follows sizes
    without looking.

    Parameters
    ----------
    arrays : of a whole model, as `quantize` gave them.

    Raises
    ------
    ValueError, LookupError : they are not, or one is missing.
    """
    labels, features = (StoredTable.take(arrays, name).shape for name in ("labels.weight", "encoder.embedding"))
    vectors = {name: (arrays[name].shape, labels[:1]) for name in ("labels.bias", "train.label_frequencies")}
    vectors["encoder.bias"] = arrays["encoder.bias"].shape, features[1:]
    for name, (found, expected) in vectors.items():
        if found != expected:
            raise ValueError(f"{name}: shape {found}, expected {expected}")
    if labels[1] != features[1]:
        raise ValueError(f"labels of {labels[1]} numbers and features of {features[1]}")


def is_compiled() -> bool:
    """Whether the code that reads a stored table was compiled on this machine before, as each prediction needs it."""
    return is_kept(_bag)


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """The array as one that is not written to."""
    if not array.flags.writeable:
        return array
    found = array.view()
    found.flags.writeable = False
    return found


def quantize(arrays: Arrays, storage: str = "int8", *, large: Collection[str] = ()) -> dict[str, NDArray[Any]]:
    """The float tables (two dimensions) in fewer bytes; all other arrays as they are.

    Parameters
    ----------
    arrays : name -> array.
    storage : `"int8"`: `name.int8` holds the codes (R, D) and `name.scale` (R,) float32 what a code of row r stands
        for, the row's largest absolute value / 127, so that a coordinate is off by at most half a scale; `"int4"`: of
        the tables `large` with an even D, `name.int4` holds codes from -7 to 7, as of `StoredTable`, and of 13 scales
        `name.scale` the one with the least squared error, all others int8; `"float16"`; `"float32"`: as they are.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if storage == "float32" or array.ndim != 2 or array.dtype.kind != "f":
            found[name] = array
        elif storage == "float16":
            found[name] = array.astype(np.float16)
        elif storage == "int4" and name in large and array.shape[1] % 2 == 0:
            found[name + _HALVES], found[name + _SCALES] = _pack_rows(array)
        else:
            found[name + _BYTES], found[name + _SCALES] = _quantize_rows(array)
    return found


def dequantize(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """What `quantize` was given, tables in float32.

    Raises
    ------
    KeyError : codes without their scales. ValueError : scales that are not one a row.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if name.endswith((_BYTES, _HALVES)):
            table = name.removesuffix(_BYTES).removesuffix(_HALVES)
            found[table] = StoredTable.take(arrays, table).rows()
        elif not name.endswith(_SCALES):
            found[name] = array.astype(np.float32) if array.dtype == np.float16 else array
    return found


def _quantize_rows(table_RD: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    codes_RD = np.empty(table_RD.shape, dtype=np.int8)
    scale_R = np.empty(table_RD.shape[0], dtype=np.float32)
    for begin in range(0, table_RD.shape[0], _CHUNK_ROWS):
        rows = slice(begin, begin + _CHUNK_ROWS)
        scale_R[rows] = np.abs(table_RD[rows]).max(axis=1, initial=0.0) / _MAX_CODE
        # A row of zeros has the scale 0: any divisor gives zeros again.
        codes_RD[rows] = np.rint(table_RD[rows] / np.maximum(scale_R[rows, None], 1e-38))
    return codes_RD, scale_R


def _pack_rows(table_RD: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    table_RD = np.ascontiguousarray(table_RD, dtype=np.float32)
    codes_RH = np.empty((table_RD.shape[0], table_RD.shape[1] // 2), dtype=np.uint8)
    scale_R = np.empty(table_RD.shape[0], dtype=np.float32)
    in_threads(lambda first, last: _pack(table_RD, codes_RH, scale_R, first, last), len(table_RD))
    return codes_RH, scale_R


@compiled(fastmath={"reassoc", "contract"})
def _pack(table_RD: Any, codes_RH: Any, scale_R: Any, begin: int, end: int) -> None:
    half = codes_RH.shape[1]
    for row in range(begin, end):
        values = table_RD[row]
        largest = np.float32(0.0)
        for column in range(2 * half):
            largest = max(largest, abs(values[column]))
        # Below, the divisor would not be a normal number: such a row is zeros.
        best, least = np.float32(0.0), np.float32(np.inf)
        if largest > np.float32(1e-36):
            for share in _SHARES:
                scale = share * largest / np.float32(_MAX_HALF)
                inverse, error = np.float32(1.0) / scale, np.float32(0.0)
                for column in range(2 * half):
                    # In units of the largest coordinate: squares of tiny numbers are zeros.
                    away = values[column] * inverse - np.float32(_half_code(values[column] * inverse))
                    error += away * away
                error *= share * share
                if error < least:
                    best, least = scale, error
        scale_R[row] = best
        inverse = np.float32(1.0) / best if best > 0.0 else np.float32(0.0)
        for column in range(half):
            low = np.int32(_half_code(values[column] * inverse))
            high = np.int32(_half_code(values[half + column] * inverse))
            codes_RH[row, column] = np.uint8((low & 15) | (high & 15) << 4)


@compiled
def _half_code(value: Any) -> Any:
    return np.rint(min(max(value, np.float32(-_MAX_HALF)), np.float32(_MAX_HALF)))


@compiled
def _halves(both: Any) -> Any:
    # In 32 bits: numba would compute with 64, and half as many at once.
    wide = np.int32(np.int8(both))
    low, high = np.int32(np.int32(wide << np.int32(28)) >> np.int32(28)), np.int32(wide >> np.int32(4))
    return np.float32(low), np.float32(high)


@compiled
def _unpack(codes_RH: Any, scale_R: Any, found_RD: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        found_RD[row] = 0.0
        _add_row(found_RD[row], scale_R[row], codes_RH, row)


@compiled
def row_product(query: Any, codes: Any, scales: Any, row: Any) -> Any:
    """The inner product of a query with a row, in float32."""
    return _product(query, codes, row) * scales[row]


@for_each_type(fastmath={"reassoc", "contract"})
def _product(query: Any, codes: Any, row: Any) -> Any:
    """Of a query with the codes of a row."""

    def of_numbers(query: Any, codes: Any, row: Any) -> Any:
        total = np.float32(0.0)
        for column in range(query.shape[0]):
            total += query[column] * np.float32(codes[row, column])
        return total

    def of_halves(query: Any, codes: Any, row: Any) -> Any:
        # A number without a sign is no place from the end, which numba would look for.
        half, total = np.uint64(codes.shape[1]), np.float32(0.0)
        for number in range(half):
            column = np.uint64(number)
            low, high = _halves(codes[row, column])
            total += query[column] * low + query[column + half] * high
        return total

    return of_halves if codes.dtype == numba.uint8 else of_numbers


@for_each_type(fastmath={"contract"})
def _add_row(total: Any, weight: Any, codes: Any, row: Any) -> Any:
    """`total += weight * codes[row]`."""

    def of_numbers(total: Any, weight: Any, codes: Any, row: Any) -> None:
        for column in range(total.shape[0]):
            total[column] += weight * np.float32(codes[row, column])

    def of_halves(total: Any, weight: Any, codes: Any, row: Any) -> None:
        half = np.uint64(codes.shape[1])
        for number in range(half):
            column = np.uint64(number)
            low, high = _halves(codes[row, column])
            total[column] += weight * low
            total[column + half] += weight * high

    return of_halves if codes.dtype == numba.uint8 else of_numbers


@compiled
def _products(query_BD: Any, codes: Any, scales: Any, ids_BW: Any, found_BW: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        for place in range(ids_BW.shape[1]):
            found_BW[row, place] = row_product(query_BD[row], codes, scales, ids_BW[row, place])


@compiled(fastmath={"contract"})
def _bag(rows: Any, codes: Any, scales: Any, found_BD: Any, begin: int, end: int) -> None:
    offsets, ids, values = rows
    for row in range(begin, end):
        last = offsets[row + 1] - 1
        for entry in range(offsets[row], last + 1):
            fetch_row(codes, ids[min(entry + AHEAD, last)])
            _add_row(found_BD[row], np.float32(values[entry]) * scales[ids[entry]], codes, ids[entry])
