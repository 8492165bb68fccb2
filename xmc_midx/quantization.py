"""Layer 2. Tables in one byte a coordinate: each row int8 with a scale of its own.

What that costs is in EXPERIMENTS.md, "The saved model".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.intrinsics import AHEAD, fetch_row
from xmc_midx.threads import in_threads

__all__ = ["StoredTable", "dequantize", "quantize", "row_product"]

_CODES, _SCALES = ".int8", ".scale"
_CHUNK_ROWS = 1 << 12
_MAX_CODE = 127

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTable:
    """A float table as it is stored, perhaps mapped from a file: row r is `codes[r] * scales[r]`."""

    codes: NDArray[Any]
    """(R, D) int8 or float32."""
    scales: NDArray[np.float32]
    """(R,)."""

    @classmethod
    def of(cls, table_RD: NDArray[np.float32]) -> StoredTable:
        """A table in float32, not copied."""
        return cls(codes=table_RD, scales=np.ones(table_RD.shape[0], dtype=np.float32))

    @classmethod
    def take(cls, arrays: Arrays, name: str) -> StoredTable:
        """A table of what `quantize` gave; a LookupError or ValueError where it is not there, or damaged."""
        if name + _CODES not in arrays:
            return cls.of(np.ascontiguousarray(arrays[name], dtype=np.float32))
        codes, scales = arrays[name + _CODES], arrays[name + _SCALES]
        if codes.dtype != np.int8 or codes.ndim != 2 or scales.dtype != np.float32:
            raise ValueError(f"{name}: expected int8 codes and float32 scales")
        if scales.shape != codes.shape[:1]:
            raise ValueError(f"{name}: {codes.shape[0]} rows and scales of shape {scales.shape}")
        return cls(codes=codes, scales=scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """What compiled code takes."""
        return self.codes, self.scales

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
        return self.codes[part] * self.scales[part, None]


def quantize(arrays: Arrays, storage: str = "int8") -> dict[str, NDArray[Any]]:
    """The float tables (two dimensions) in fewer bytes; all other arrays as they are.

    Parameters
    ----------
    arrays : name -> array.
    storage : `"int8"`: `name.int8` holds the codes (R, D) and `name.scale` (R,) float32 what a code of row r stands
        for, the row's largest absolute value / 127, so that a coordinate is off by at most half a scale; `"float16"`;
        `"float32"`: as they are.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if storage == "float32" or array.ndim != 2 or array.dtype.kind != "f":
            found[name] = array
        elif storage == "float16":
            found[name] = array.astype(np.float16)
        else:
            found[name + _CODES], found[name + _SCALES] = _quantize_rows(array)
    return found


def dequantize(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """What `quantize` was given, tables in float32.

    Raises
    ------
    KeyError : codes without their scales. ValueError : scales that are not one a row.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if name.endswith(_CODES):
            scale_R = arrays[name.removesuffix(_CODES) + _SCALES]
            if scale_R.shape != array.shape[:1]:
                raise ValueError(f"{name}: {array.shape[0]} rows and scales of shape {scale_R.shape}")
            found[name.removesuffix(_CODES)] = array * scale_R[:, None]
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


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def row_product(query: Any, codes: Any, scales: Any, row: Any) -> Any:
    """The inner product of a query with a row, in float32."""
    total = np.float32(0.0)
    for column in range(query.shape[0]):
        total += query[column] * np.float32(codes[row, column])
    return total * scales[row]


@numba.njit(nogil=True, cache=True)
def _products(query_BD: Any, codes: Any, scales: Any, ids_BW: Any, found_BW: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        for place in range(ids_BW.shape[1]):
            found_BW[row, place] = row_product(query_BD[row], codes, scales, ids_BW[row, place])


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _bag(rows: Any, codes: Any, scales: Any, found_BD: Any, begin: int, end: int) -> None:
    offsets, ids, values = rows
    for row in range(begin, end):
        last = offsets[row + 1] - 1
        for entry in range(offsets[row], last + 1):
            fetch_row(codes, ids[min(entry + AHEAD, last)])
            feature = ids[entry]
            weight = np.float32(values[entry]) * scales[feature]
            for column in range(found_BD.shape[1]):
                found_BD[row, column] += weight * np.float32(codes[feature, column])
