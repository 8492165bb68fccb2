"""Layer 2. What is done to feature rows between a file and the encoder, alike in training and prediction."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

__all__ = ["normalize_rows"]


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
