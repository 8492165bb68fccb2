"""Layer 2. What is done to feature rows between a file and the encoder, alike in training and prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.errors import DataError

__all__ = ["normalize_rows", "rows_from_pairs"]


def normalize_rows(features: csr_matrix) -> csr_matrix:
    """Rows of Euclidean length 1.

    Parameters
    ----------
    features : (N, F) float32.

    Returns
    -------
    (N, F) float32, sharing ids and offsets with `features`; a row without features, or of zeros, stays as it is.
    """
    counts = np.diff(features.indptr)
    # reduceat needs every offset to be a valid position, and gives an empty row its successor's first entry.
    squares = np.add.reduceat(np.append(features.data.astype(np.float64) ** 2, 0.0), features.indptr[:-1])
    length = np.sqrt(np.where((counts > 0) & (squares > 0), squares, 1.0))
    values = (features.data / np.repeat(length, counts)).astype(np.float32)
    return csr_matrix((values, features.indices, features.indptr), shape=features.shape)


def rows_from_pairs(
    rows: Iterable[Mapping[int, float] | Sequence[tuple[int, float]]], num_features: int
) -> csr_matrix[Any]:
    """Rows `{feature: value}` or `[(feature, value), ...]` as a matrix.

    Returns
    -------
    (N, F) float32, ids ascending in each row.

    Raises
    ------
    DataError : a row is neither, an id is not in 0..F-1 or occurs twice, or a value is not a finite number.
    """
    ids: list[int] = []
    values: list[float] = []
    offsets = [0]
    for number, row in enumerate(rows):
        try:
            pairs = sorted(
                ((int(feature.__index__()), float(value)) for feature, value in _pairs(row)), key=lambda pair: pair[0]
            )
        except (TypeError, ValueError, AttributeError):
            raise DataError(
                f"Instance {number}: is no row of features; expected {{feature: value}} or [(feature, value), ...]."
            ) from None
        before = -1
        for feature, value in pairs:
            if not 0 <= feature < num_features:
                raise DataError(f"Instance {number}: feature id {feature} is outside 0..{num_features - 1}.")
            if feature == before:
                raise DataError(f"Instance {number}: feature id {feature} occurs twice, expected once.")
            if not math.isfinite(value):
                raise DataError(f"Instance {number}: the value of feature {feature} is not finite.")
            before = feature
            ids.append(feature)
            values.append(value)
        offsets.append(len(ids))
    with np.errstate(over="ignore"):
        stored = np.array(values, dtype=np.float32)
    arrays = (stored, np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64))
    return csr_matrix(arrays, shape=(len(offsets) - 1, num_features))


def _pairs(row: Mapping[int, float] | Sequence[tuple[int, float]]) -> Iterable[tuple[int, float]]:
    return row.items() if isinstance(row, Mapping) else row
