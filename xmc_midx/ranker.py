"""Layer 2. A sparse linear one-vs-all ranker, trained on the labels that the model confuses.

The encoder squeezes an instance into D numbers; a label's own weights on the features lose nothing. Such a classifier
only has to tell a label from its rivals: its negatives are the instances that have the label among the model's best,
not all others, so that training costs what a few passes over the positives cost. `xmc_midx.interpolation` adds the
margin, and the largest part of it that a single feature makes, to the model's score. Source: the squared hinge loss and
its dual coordinate descent are liblinear's (Hsieh et al. 2008), matching-aware negatives are PECOS's (arXiv
2010.05878); the use beside a sampled softmax is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled
from xmc_midx.data.features import with_values
from xmc_midx.intrinsics import AHEAD, fetch
from xmc_midx.packing import pack_rows, unpack_rows
from xmc_midx.threads import in_threads, zeros

__all__ = ["LinearRanker", "Margins", "row_margins"]

_COST = 1.0
"""Of a violated margin against the norm of the weights."""
_PASSES = 6
"""Over a label's instances, at most."""
_TOLERANCE = 0.1
"""Largest projected gradient at which a label is done."""
_SMALLEST = 0.25
"""Smaller weights are dropped, for rows of length 1 with `_VALUES` values: a tenth of those from 0.1 on is left where
rows are long, half where they are short, and they rank as well (EXPERIMENTS.md, "What a single feature says")."""
_VALUES = 100
"""Of a row: more of them make up a margin by smaller weights."""
_BLOCK = 1 << 21
"""Weights held at once, before the small ones are dropped."""
_TURNS = 4
"""Blocks of each thread, at least: those of the same number of weights do not take the same time."""
_OWN = 2
"""Beside 1 for a rival."""
_SPOTS, _STRETCH = 1 << 14, 1 << 10
"""Places that a row's features are marked at, by their last bits, and weights looked through at once."""


class Margins(NamedTuple):
    """Of pairs of an instance and a label."""

    margins: NDArray[np.float32]
    """(C,) `weights . features + bias`"""
    peaks: NDArray[np.float32]
    """(C,) the largest product of a weight and its feature, at least 0: how much a single feature speaks for the
    label."""


class LinearRanker:
    """A weight vector and a bias for each label.

    Parameters
    ----------
    weights : (L, F) float16, few of a row; ids rising.
    bias : (L,) float16.
    """

    def __init__(self, weights: csr_matrix, bias: NDArray[np.float16]) -> None:
        self.weights, self.bias = weights, bias
        offsets, ids = weights.indptr.astype(np.int64), weights.indices
        self.arrays = (offsets, ids, weights.data.astype(np.float32), bias.astype(np.float32))
        """What compiled code takes: where each label's weights begin (L + 1), their feature ids and values, the biases
        (L,)."""

    @property
    def num_labels(self) -> int:
        return int(self.weights.shape[0])

    @property
    def num_features(self) -> int:
        return int(self.weights.shape[1])

    @classmethod
    def fit(
        cls,
        features: csr_matrix,
        labels: csr_matrix,
        rivals: csr_matrix,
        *,
        num_threads: int | None = None,
    ) -> LinearRanker:
        """Train a classifier a label, independent of the number of threads bit for bit.

        Parameters
        ----------
        features, labels : (N, F) and (N, L) of the training instances.
        rivals : (N, L); a stored value is a label that the model ranks high for the instance. Those of an instance's
            own labels are skipped. Rows may be empty: negatives of some instances are enough.
        num_threads : None: numba's.
        """
        assert labels.shape == rivals.shape and features.shape[0] == labels.shape[0]
        num_features, num_labels = features.shape[1], labels.shape[1]
        # Of a pair that is both, the sum is of its own.
        own = csr_matrix((np.full(labels.nnz, _OWN, dtype=np.int8), labels.indices, labels.indptr), shape=labels.shape)
        others = csr_matrix((np.ones(rivals.nnz, dtype=np.int8), rivals.indices, rivals.indptr), shape=rivals.shape)
        if not others.has_canonical_format:
            others.sum_duplicates()
            others.data[:] = 1
        pairs = (own + others).tocsc()
        pairs.sort_indices()
        counts = np.diff(features.indptr).astype(np.int64)
        entries = np.concatenate([[0], np.cumsum(counts[pairs.indices])])[pairs.indptr]
        ids = features.indices.astype(np.int32, copy=False).view(np.uint32)
        rows = (features.indptr.astype(np.uint64), ids, features.data.astype(np.float32, copy=False))
        squares = np.asarray(features.multiply(features).sum(axis=1)).ravel().astype(np.float32)
        targets = (pairs.indptr.astype(np.int64), pairs.indices, pairs.data >= _OWN)
        num_threads = num_threads or numba.get_num_threads()
        blocks = _blocks(np.minimum(np.diff(entries), num_features), at_least=_TURNS * num_threads)

        def train(block: tuple[int, int]) -> tuple[NDArray[Any], ...]:
            room = int(np.minimum(np.diff(entries[block[0] : block[1] + 1]), num_features).sum())
            ids, weights = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.float32)
            sizes = np.zeros(block[1] - block[0], dtype=np.int64)
            bias = np.zeros(block[1] - block[0], dtype=np.float32)
            limits = (_COST, _PASSES, _TOLERANCE, _SMALLEST)
            used = _train(rows, squares, targets, num_features, limits, *block, ids, weights, sizes, bias)
            return sizes, ids[:used].copy(), weights[:used].astype(np.float16), bias.astype(np.float16)

        with ThreadPoolExecutor(num_threads) as pool:
            parts = list(pool.map(train, blocks))
        sizes, ids, weights, bias = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        assert bias.shape[0] == num_labels
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        # SciPy knows no half precision: it sorts the bits.
        found = csr_matrix((weights.view(np.int16), ids, offsets), shape=(num_labels, num_features))
        found.sort_indices()
        return cls(with_values(found, found.data.view(np.float16)), bias)

    def margins(self, features: csr_matrix, instance: NDArray[np.int64], label_ids: NDArray[np.int64]) -> Margins:
        """Of C pairs of an instance and a label.

        Parameters
        ----------
        features : (B, F) rows, scaled like those of training.
        instance, label_ids : (C,) row numbers, which never fall, and labels.
        """
        assert features.shape[1] == self.num_features, "instances and training rows have the same features"
        num_rows = features.shape[0]
        borders = np.searchsorted(instance, np.arange(num_rows + 1))
        found = Margins(*np.empty((2, label_ids.shape[0]), dtype=np.float32))
        queries = (features.indptr, features.indices, features.data)

        def run(first: int, last: int) -> None:
            dense = zeros(self.num_features, np.float32)
            _margins(queries, borders, label_ids, self.arrays, dense, first, last, found)

        in_threads(run, num_rows)
        return found

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` reads: the weights as packed rows (`xmc_midx.packing`), and the biases."""
        return pack_rows(self.weights) | {"bias": self.bias}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> LinearRanker:
        """The ranker of `as_arrays`; a ValueError or LookupError where it is not that."""
        weights, bias = unpack_rows(arrays, "float16"), arrays["bias"]
        if bias.dtype != np.float16 or bias.shape != weights.shape[:1]:
            raise ValueError("weights and biases do not fit together")
        return cls(weights, bias)


def _blocks(sizes: NDArray[np.int64], *, at_least: int) -> list[tuple[int, int]]:
    """Ranges of labels, some `at_least` of them, with about `_BLOCK` weights each at the most and one label at the
    least."""
    total = np.cumsum(sizes)
    block = min(_BLOCK, int(total[-1]) // at_least + 1)
    borders = np.searchsorted(total, np.arange(block, total[-1] + block, block), side="left") + 1
    borders = np.unique(np.concatenate([[0], np.minimum(borders, sizes.shape[0]), [sizes.shape[0]]]))
    return [(int(begin), int(end)) for begin, end in itertools.pairwise(borders)]


@compiled
def _train(
    rows: Any,
    squares: Any,
    targets: Any,
    num_features: int,
    limits: Any,
    begin: int,
    end: int,
    found_ids: Any,
    found_weights: Any,
    sizes: Any,
    bias: Any,
) -> int:
    """Labels begin..end one after the other, into `sizes` and `bias` and one behind the other into `found_ids` and
    `found_weights`; returns the number of weights that were kept.

    `rows`: offsets (N + 1), feature ids and values of the instances; `squares` (N,) their squared lengths; `targets`:
    offsets (L + 1), instances and, of each, whether the label is its own, or else a rival; `limits`: cost, passes,
    tolerance, smallest weight.
    """
    row_offsets, row_ids, row_values = rows
    offsets, instances, is_own = targets
    weight = np.zeros(num_features, dtype=np.float32)
    cost, passes, tolerance, smallest = limits
    diagonal = np.float32(0.5 / cost)
    used = 0
    for label in range(begin, end):
        first, count = offsets[label], offsets[label + 1] - offsets[label]
        dual = np.zeros(count, dtype=np.float32)
        order = np.arange(count)
        offset = np.float32(0.0)
        state = np.uint64(label + 1)
        for _ in range(passes):
            largest = np.float32(0.0)
            for last in range(count - 1, -1, -1):
                # Fisher-Yates by a linear congruential generator (Knuth's MMIX), of the label alone.
                state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                pick = int((state >> np.uint64(33)) % np.uint64(last + 1))
                order[last], order[pick] = order[pick], order[last]
                place = order[last]
                row = instances[first + place]
                sign = np.float32(1.0 if is_own[first + place] else -1.0)
                margin = offset
                for entry in range(row_offsets[row], row_offsets[row + 1]):
                    margin += weight[row_ids[entry]] * row_values[entry]
                gradient = sign * margin - np.float32(1.0) + dual[place] * diagonal
                if dual[place] == 0.0 and gradient > 0.0:
                    continue
                largest = max(largest, abs(gradient))
                before = dual[place]
                dual[place] = max(before - gradient / (squares[row] + np.float32(1.0) + diagonal), np.float32(0.0))
                change = (dual[place] - before) * sign
                if change != 0.0:
                    for entry in range(row_offsets[row], row_offsets[row + 1]):
                        weight[row_ids[entry]] += change * row_values[entry]
                    offset += change
            if largest < tolerance:
                break
        start = used
        least = smallest * _weight_size(row_offsets, squares, instances[first : first + count], diagonal)
        for place in range(count):
            row = instances[first + place]
            for entry in range(row_offsets[row], row_offsets[row + 1]):
                feature = row_ids[entry]
                if weight[feature] != 0.0 and abs(weight[feature]) >= least:
                    found_ids[used] = feature
                    found_weights[used] = weight[feature]
                    used += 1
                weight[feature] = 0.0
        sizes[label - begin] = used - start
        bias[label - begin] = offset
    return used


@compiled
def _weight_size(row_offsets: Any, squares: Any, instances: Any, diagonal: Any) -> Any:
    """About how large the weights of these rows come out, to those of rows of length 1 with `_VALUES` values or fewer:
    of a single row x with n values, they are x_j / (|x|^2 + diagonal), and x_j is |x| / sqrt(n)."""
    square, values = 0.0, np.int64(0)
    for row in instances:
        square += squares[row] / instances.shape[0]
        values += np.int64(row_offsets[row + 1]) - np.int64(row_offsets[row])
    length = np.sqrt(square) * (1.0 + diagonal) / (square + diagonal)
    return length * np.sqrt(min(1.0, _VALUES * instances.shape[0] / max(values, 1)))


@compiled
def _margins(
    queries: Any, borders: Any, label_ids: Any, model: Any, dense: Any, first: int, last: int, found: Any
) -> None:
    query_offsets, query_ids, query_values = queries
    for row in range(first, last):
        mine, pairs = slice(query_offsets[row], query_offsets[row + 1]), slice(borders[row], borders[row + 1])
        part = Margins(found.margins[pairs], found.peaks[pairs])
        row_margins(query_ids[mine], query_values[mine], label_ids[pairs], model, dense, part)


@compiled
def row_margins(query_ids: Any, query_values: Any, label_ids: Any, model: Any, dense: Any, found: Any) -> None:
    """Of one row, its features and their values, with labels (C,), into `found`; `model` is `LinearRanker.arrays`, and
    `dense` (F,) float32 is zeros, and left so."""
    offsets, feature_ids, weights, bias = model
    marked, spots = np.zeros(_SPOTS, dtype=np.uint8), np.uint32(_SPOTS - 1)
    for entry in range(query_ids.shape[0]):
        dense[query_ids[entry]] = query_values[entry]
        marked[np.uint32(query_ids[entry]) & spots] = 1
    last = label_ids.shape[0] - 1
    shared = np.empty(_STRETCH, dtype=np.uint64)
    for place in range(label_ids.shape[0]):
        ahead = label_ids[min(place + AHEAD, last)]
        fetch(feature_ids, offsets[ahead], offsets[ahead + 1])
        label = label_ids[place]
        margin, peak = bias[label], np.float32(0.0)
        first, end = np.uint64(offsets[label]), np.uint64(offsets[label + 1])
        while first < end:
            stop = min(first + np.uint64(_STRETCH), end)
            # A label has hundreds of features, of which an instance has few: to list those first, without a branch or
            # a sum that waits for the one before, takes a third of the time. Unsigned numbers count from no end.
            count = np.uint64(0)
            for entry in range(first, stop):
                shared[count] = entry
                count += np.uint64(marked[np.uint32(feature_ids[entry]) & spots])
            for number in range(count):
                entry = shared[number]
                product = dense[np.uint32(feature_ids[entry])] * weights[entry]
                margin += product
                peak = max(peak, product)
            first = stop
        found.margins[place], found.peaks[place] = margin, peak
    for entry in range(query_ids.shape[0]):
        dense[query_ids[entry]] = 0.0
