"""Layer 2. Tables in one byte a coordinate: each row int8 with a scale of its own.

What that costs is in EXPERIMENTS.md, "The saved model".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["dequantize", "quantize"]

_CODES, _SCALES = ".int8", ".scale"
_CHUNK_ROWS = 1 << 14
_MAX_CODE = 127

Arrays = Mapping[str, NDArray[Any]]


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
