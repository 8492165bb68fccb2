"""Layer 2. What is done to feature rows between a file and the encoder, alike in training and prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled
from xmc_midx.config import DataConfig
from xmc_midx.errors import DataError

__all__ = [
    "AS_GIVEN",
    "FEATURE_IDS",
    "IDF",
    "NUM_FEATURES",
    "FeatureScaling",
    "all_finite",
    "are_counts",
    "column_counts",
    "columns",
    "inverse_document_frequency",
    "kept_columns",
    "normalize_rows",
    "row_hashes",
    "rows_from_pairs",
    "scale_rows",
    "used_columns",
    "with_values",
]

_PART = 1 << 20
"""Values that are looked at at once, about."""
IDF, FEATURE_IDS, NUM_FEATURES = "train.idf", "train.feature_ids", "train.num_features"
"""What a model calls them."""
_DENSE = 0.25
"""Share of values from which rows are measurements, not words."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureScaling:
    """What is done to the values of feature rows before the model sees them.

    With `idf`, a count v becomes `(1 + ln v) idf`, as `prepare` weights texts; between -1 and 1 a value counts as it
    is, and a negative one like its opposite. Then, with `normalize="l2"`, rows get length 1. Of the features, those of
    `kept` are left at last, numbered anew.
    """

    normalize: str = "l2"
    """`"l2"` or `"none"`."""
    idf: NDArray[np.float32] | None = None
    """(F,), or None: the values as given."""
    kept: NDArray[np.int32] | None = None
    """(R,) rising ids of the features that the model knows; None: all F."""
    num_features: int | None = None
    """F, where some are not kept."""

    @classmethod
    def fit(cls, config: DataConfig, features: csr_matrix) -> FeatureScaling:
        """As a resolved configuration says, with the idf of all training rows."""
        idf, kept = None, None
        if config.weighting == "tf-idf":
            idf = inverse_document_frequency(column_counts(features), features.shape[0])
        if config.unused_features == "drop":
            kept = used_columns(features)
        return cls(
            normalize=config.normalize,
            idf=idf,
            kept=kept,
            num_features=None if kept is None else features.shape[1],
        )

    @classmethod
    def of(cls, config: DataConfig, model: Mapping[str, Any], num_rows: int) -> FeatureScaling:
        """That of a trained model; a LookupError or ValueError where an array of it is not there, or of other features.

        Parameters
        ----------
        model : holds what `arrays` gave.
        num_rows : R, of the model's feature table.
        """
        kept, idf, num_features = None, None, num_rows
        if config.unused_features == "drop":
            kept, num_features = kept_columns(model, FEATURE_IDS, NUM_FEATURES, num_rows)
        if config.weighting == "tf-idf":
            idf = np.asarray(model[IDF])
            if idf.dtype != np.float32 or idf.shape != (num_features,) or not np.isfinite(idf).all():
                raise ValueError(f"{IDF}: expected a finite float32 number for each feature")
        return cls(normalize=config.normalize, idf=idf, kept=kept, num_features=None if kept is None else num_features)

    def takes_as(self, other: FeatureScaling) -> bool:
        """Whether both number the features alike, so that the rows of one are those of the other."""
        if self.kept is None or other.kept is None:
            return self.kept is other.kept
        return self.num_features == other.num_features and np.array_equal(self.kept, other.kept)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a model keeps of it."""
        found: dict[str, NDArray[Any]] = {} if self.idf is None else {IDF: self.idf}
        if self.kept is not None:
            found |= {FEATURE_IDS: self.kept, NUM_FEATURES: np.array(self.num_features, dtype=np.int64)}
        return found

    def __call__(self, features: csr_matrix) -> csr_matrix:
        """(N, F) -> (N, F) float32, sharing ids and offsets with `features`; (N, R) where not all are kept."""
        if self.idf is not None:
            values = features.data.astype(np.float32)
            _weigh(values, features.indices, self.idf)
            features = with_values(features, values)
        features = normalize_rows(features) if self.normalize == "l2" else features
        return features if self.kept is None else columns(features, self.kept)


AS_GIVEN = FeatureScaling(normalize="none")
"""Of rows that are scaled already."""


def are_counts(features: csr_matrix) -> bool:
    """Whether the values are how often a word occurs: whole numbers from 1, some above 1, in sparse rows."""
    if features.nnz >= _DENSE * features.shape[0] * features.shape[1]:
        return False
    largest = 0.0
    for begin in range(0, features.nnz, _PART):
        part = features.data[begin : begin + _PART]
        if not (np.floor(part) == part).all() or part.min() < 1:
            return False
        largest = max(largest, float(part.max()))
    return largest > 1


def column_counts(matrix: csr_matrix) -> NDArray[np.int64]:
    """(F,): the rows that have an entry in a column, each of which a row has once at most."""
    return np.bincount(matrix.indices, minlength=matrix.shape[1])


def inverse_document_frequency(frequencies: NDArray[Any], num_rows: int) -> NDArray[np.float32]:
    """(F,): `log((N + 1) / (n + 1)) + 1`, as scikit-learn smooths it, of features that n of N rows have."""
    return (np.log((num_rows + 1.0) / (frequencies + 1.0)) + 1.0).astype(np.float32)


def normalize_rows(features: csr_matrix) -> csr_matrix:
    """Rows of Euclidean length 1.

    Parameters
    ----------
    features : (N, F) float32.

    Returns
    -------
    (N, F) float32, sharing ids and offsets with `features`; a row without features, or of zeros, stays as it is.
    """
    values = features.data.astype(np.float32)
    scale_rows(values, features.indptr)
    return with_values(features, values)


def with_values(features: csr_matrix, values: NDArray[Any]) -> csr_matrix:
    """The same matrix with other values (nnz,), which are not copied, nor are ids and offsets.

    SciPy's constructor checks what is known to be sound here, which takes a single row seven times as long.
    """
    found = copy.copy(features)
    found.data = values
    return found


def used_columns(matrix: csr_matrix) -> NDArray[np.int32]:
    """(R,): the rising ids of the columns that some row has an entry in; of none the first, for a table has a row."""
    used = np.flatnonzero(column_counts(matrix))
    return (used if used.size else np.zeros(1)).astype(np.int32)


def kept_columns(model: Mapping[str, Any], ids: str, number: str, num_rows: int) -> tuple[NDArray[np.int32], int]:
    """Which columns the rows of a model's table are of, and how many columns there are.

    Parameters
    ----------
    ids, number : what the model calls the two.
    num_rows : R, of the table.

    Raises
    ------
    ValueError, LookupError : one of them is not there, or of another table.
    """
    kept, count = np.asarray(model[ids]), np.asarray(model[number])
    if count.dtype != np.int64 or count.shape or not 1 <= count <= np.iinfo(np.int32).max:
        raise ValueError(f"{number}: expected the number of columns")
    rises = kept.dtype == np.int32 and kept.shape == (num_rows,) and (kept[1:] > kept[:-1]).all()
    if not rises or not kept.size or not 0 <= kept[0] <= kept[-1] < count:
        raise ValueError(f"{ids}: expected rising ids, one a row of the table")
    return kept, int(count)


def columns(features: csr_matrix, ids: NDArray[np.int32]) -> csr_matrix:
    """(N, F) or (N, L) -> (N, R): the columns of R rising ids."""
    places = np.searchsorted(ids, features.indices).astype(np.int32)
    is_there = ids[np.minimum(places, len(ids) - 1)] == features.indices
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(is_there)])[features.indptr]
    arrays = features.data[is_there], places[is_there], offsets.astype(features.indptr.dtype)
    found = csr_matrix(arrays, shape=(features.shape[0], len(ids)))
    found.has_canonical_format = features.has_canonical_format
    return found


@compiled
def all_finite(values: Any) -> bool:
    """Whether all numbers of an array are finite. (NumPy's way takes a single row several times as long.)"""
    for value in values.flat:  # noqa: SIM110  # numba knows no generators
        if not np.isfinite(value):
            return False
    return True


@compiled
def _weigh(values: Any, ids: Any, idf: Any) -> None:
    """`values = sign(v) (min(|v|, 1) + ln max(|v|, 1)) idf`, in place."""
    for place in range(values.shape[0]):
        size = abs(values[place])
        weight = (min(size, 1.0) + math.log(max(size, 1.0))) * idf[ids[place]]
        values[place] = weight if values[place] >= 0 else -weight


@compiled
def scale_rows(values: Any, offsets: Any) -> None:
    """Bring the rows `values[offsets[i]:offsets[i+1]]` to length 1, in place; rows of zeros stay."""
    for row in range(offsets.shape[0] - 1):
        square = 0.0
        for place in range(offsets[row], offsets[row + 1]):
            square += np.float64(values[place]) * np.float64(values[place])
        length = math.sqrt(square)
        if length > 0.0:
            for place in range(offsets[row], offsets[row + 1]):
                values[place] = np.float32(values[place] / length)


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


def row_hashes(matrix: csr_matrix[Any]) -> NDArray[np.uint64]:
    """(N,) 64-bit hashes: equal rows have equal ones, and rows without entries 0.

    The sum over the row of `mix(id, bits of the value)`, splitmix64's finaliser (Steele et al. 2014). Two
    different rows of 10^6 agree by chance with probability 3e-8.
    """
    hashes = np.zeros(matrix.shape[0], dtype=np.uint64)
    # Some rows at once: what is made on the way takes eight times the room of the ids.
    step = max(1, matrix.shape[0] * _PART // max(matrix.nnz, 1))
    for begin in range(0, matrix.shape[0], step):
        offsets = matrix.indptr[begin : begin + step + 1]
        part = slice(offsets[0], offsets[-1])
        bits = matrix.data[part].astype("<f4").view("<u4").astype(np.uint64)
        mixed = (matrix.indices[part].astype(np.uint64) << np.uint64(32)) | bits
        mixed += np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        hashes[begin : begin + step] = sums[offsets[1:] - offsets[0]] - sums[offsets[:-1] - offsets[0]]
    return hashes
