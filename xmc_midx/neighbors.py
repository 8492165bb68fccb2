"""Layer 2. The nearest training instances of a feature row, by an inverted list of the training features.

What an encoder of D numbers must forget (a rare word that names a rare label), the training rows remember;
`xmc_midx.predictor` adds the labels of the neighbours to the model's own. Inner products are over the features that
are not in too many rows.

A list is sorted by falling size of its values, to a level (`_LEVELS`), so that a query reads its lists only as far as
their entries matter: the largest products, `_BUDGET` of them at most, nominate candidates, and the best `_CANDIDATES` a
neighbour get their exact inner product (score-at-a-time ranking, arXiv 1505.06690, with rescoring). A query whose lists
hold no more entries than that is answered exactly, as every query is with `exact=True`. What this misses is measured in
EXPERIMENTS.md, "Prediction time".
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from xmc_midx.tensorfile import write_arrays
from xmc_midx.threads import in_threads, zeros

__all__ = ["NeighborIndex", "insert_best", "save_rows"]

_MAX_SHARE = 0.1
"""A feature of more than this share of the rows is left out: such lists are long and say little (EXPERIMENTS.md,
"Neighbours")."""
_SMALL = 20_000
"""Up to so many rows no feature is left out."""
_BUDGET = 8192
"""Entries of the inverted lists that a query reads."""
_CANDIDATES = 4
"""Rows that are rescored for each neighbour asked for."""
_LEVELS = 40
"""Of the sizes of a list's values, each 2^(-1/2) of the one before: how far a list is read is looked up by level."""
_CHUNK = 1 << 22
"""Entries at once, where the lists are made."""


class NeighborIndex:
    """Finds the training instances with the largest inner product.

    Parameters
    ----------
    features : (N, F) float, rows of unit length: the inner product is the cosine.
    labels : (N, L); a stored value is a label of the row.
    """

    def __init__(self, features: csr_matrix, labels: csr_matrix) -> None:
        assert features.shape[0] == labels.shape[0], "features and labels are rows of the same instances"
        self.num_features = int(features.shape[1])
        self.labels = csr_matrix(
            (np.ones(labels.nnz, dtype=np.float32), labels.indices, labels.indptr), shape=labels.shape
        )
        self._kept = _kept_features(features)
        self._local = threading.local()
        self._offsets, self._rows, self._values, self._prefixes = _inverted_lists(features, self._kept)
        self._forward = (
            features.indptr.astype(np.int64),
            features.indices.astype(np.int32, copy=False),
            features.data.astype(np.float32, copy=False),
        )

    @property
    def num_instances(self) -> int:
        return int(self.labels.shape[0])

    @classmethod
    def load(cls, path: Path) -> NeighborIndex:
        """The index over what `save_rows` wrote; a ValueError, LookupError or SafetensorError where it is not that."""
        return cls(*_read_rows(load_file(path)))

    def search(
        self, features: csr_matrix, count: int, *, exact: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `count` nearest training rows of each of B rows.

        Parameters
        ----------
        exact : whether every entry of every list is read.

        Returns
        -------
        (B, count) int64 row numbers and (B, count) float32 inner products: falling, ties to the smaller row; -1 and 0
        where fewer rows share a feature with the query. The inner products are exact in any case.
        """
        assert features.shape[1] == self.num_features, "queries and training rows have the same features"
        num_rows = features.shape[0]
        rows_BK = np.full((num_rows, count), -1, dtype=np.int64)
        scores_BK = np.zeros((num_rows, count), dtype=np.float32)
        queries = (features.indptr.astype(np.int64), features.indices, features.data.astype(np.float32))
        lists = (self._offsets, self._rows, self._values, self._prefixes)
        budget = np.iinfo(np.int64).max if exact else _BUDGET

        def run(begin: int, end: int) -> None:
            total, dense = self._workspace()
            most = _CANDIDATES * count
            _search(
                queries, lists, self._forward, self._kept, total, dense, budget, most, begin, end, rows_BK, scores_BK
            )

        in_threads(run, num_rows)
        return rows_BK, scores_BK

    def _workspace(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of this thread, as `_search` leaves it: to fill it anew would take longer than to answer one query."""
        if not hasattr(self._local, "arrays"):
            total = np.full(self.num_instances, np.nan, dtype=np.float32)
            self._local.arrays = total, np.zeros(self.num_features, dtype=np.float32)
        arrays: tuple[NDArray[np.float32], NDArray[np.float32]] = self._local.arrays
        return arrays

    def votes(self, rows_BK: NDArray[np.int64], scores_BK: NDArray[np.float32], temperature: float) -> csr_matrix:
        """The neighbours' labels, (B, L) float64: the share of the neighbours that have a label, each weighted by
        `softmax(score / temperature)`. In [0, 1]; an instance without neighbours has none.
        """
        found_BK = rows_BK >= 0
        logits_BK = np.where(found_BK, scores_BK.astype(np.float64) / temperature, -np.inf)
        peak_B1 = np.max(logits_BK, axis=1, keepdims=True, initial=-1e300)
        weight_BK = np.exp(logits_BK - peak_B1)
        weight_BK /= np.maximum(weight_BK.sum(1, keepdims=True), 1e-300)
        lists = (self.labels.indptr, self.labels.indices)
        num_labels = self.labels.shape[1]
        counts = np.diff(self.labels.indptr)
        room = int(counts[rows_BK[found_BK]].sum())
        offsets = np.zeros(rows_BK.shape[0] + 1, dtype=self.labels.indptr.dtype)
        ids, values = np.empty(room, dtype=self.labels.indices.dtype), np.empty(room)
        used = _votes(rows_BK, weight_BK, lists, zeros(num_labels, np.float64), offsets, ids, values)
        return csr_matrix((values[:used], ids[:used], offsets), shape=(rows_BK.shape[0], num_labels))


def save_rows(path: Path, features: csr_matrix, labels: csr_matrix) -> str:
    """Write training rows (N, F), ids rising, and their labels (N, L) as safetensors, three bytes a value; the sha256.

    `features.counts` (N x blocks) is the number of a row's values in each block of 65,536 features, `features.ids`
    (nnz,) uint16 their places in it, `features.values` (nnz,) int8 their sizes in units of `features.scale` (N,), the
    row's largest / 127. Features that the index leaves out are not written. `labels.counts` (N,), `labels.ids` (Y,).
    """
    assert features.has_sorted_indices, "the blocks of a row follow one another"
    num_rows, num_features = features.shape
    row = np.repeat(np.arange(num_rows), np.diff(features.indptr))
    kept = _kept_features(features)[features.indices]
    row, ids, values = row[kept], features.indices[kept], features.data[kept]
    blocks = _num_blocks(num_features)
    largest = np.zeros(num_rows, dtype=np.float32)
    np.maximum.at(largest, row, np.abs(values))
    scale = np.maximum(largest, np.float32(1e-30)) / np.float32(127)
    arrays: dict[str, NDArray[Any]] = {
        "features.counts": np.bincount(row * blocks + (ids >> 16), minlength=num_rows * blocks).astype(np.uint32),
        "features.ids": (ids & 0xFFFF).astype(np.uint16),
        "features.values": np.rint(values / scale[row]).astype(np.int8),
        "features.scale": scale,
        "labels.counts": np.diff(labels.indptr).astype(np.uint32),
        "labels.ids": labels.indices.astype(np.int32),
        "num_features_and_labels": np.array([num_features, labels.shape[1]], dtype=np.int64),
    }
    return write_arrays(path, arrays)


def _read_rows(arrays: Mapping[str, NDArray[Any]]) -> tuple[csr_matrix, csr_matrix]:
    """What `save_rows` was given, values as exact as they are stored; a ValueError where it is not that."""
    num_features, num_labels = (int(n) for n in arrays["num_features_and_labels"])
    blocks, scale = _num_blocks(num_features), arrays["features.scale"]
    counts, ids = arrays["features.counts"].astype(np.int64), arrays["features.ids"]
    if counts.shape != (scale.shape[0] * blocks,) or counts.sum() != ids.shape[0]:
        raise ValueError("counts and ids of the features do not fit together")
    if arrays["labels.counts"].sum(dtype=np.int64) != arrays["labels.ids"].shape[0]:
        raise ValueError("counts and ids of the labels do not fit together")
    per_row = counts.reshape(-1, blocks).sum(axis=1)
    place = np.repeat(np.tile(np.arange(blocks, dtype=np.int32) << 16, scale.shape[0]), counts)
    values = arrays["features.values"].astype(np.float32) * np.repeat(scale, per_row)
    features = csr_matrix((values, place + ids, _offsets(per_row)), shape=(scale.shape[0], num_features))
    ones = np.ones(arrays["labels.ids"].shape[0], dtype=np.float32)
    offsets = _offsets(arrays["labels.counts"])
    labels = csr_matrix((ones, arrays["labels.ids"], offsets), shape=(scale.shape[0], num_labels))
    for matrix in (features, labels):
        # Compiled code follows these ids without looking: the file must not lead it out of bounds.
        matrix.check_format(full_check=True)
    return features, labels


def _num_blocks(num_features: int) -> int:
    return max(1, -(-num_features // 0x10000))


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _inverted_lists(features: csr_matrix, kept: NDArray[np.bool_]) -> tuple[NDArray[Any], ...]:
    """The kept features' lists one after the other: offsets (F+1,), rows and values (nnz,), and how many entries of a
    list (F, levels) are at least as large as each level. In a list, the levels fall and the rows of a level rise."""
    num_rows, num_features = features.shape
    mask = kept[features.indices]
    ids, level = features.indices[mask], _levels(features.data[mask])
    counts = np.zeros(num_features * (_LEVELS + 1), dtype=np.int64)
    for begin in range(0, len(ids), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        counts += np.bincount(ids[part].astype(np.int64) * (_LEVELS + 1) + level[part], minlength=len(counts))
    prefixes = np.cumsum(counts.reshape(num_features, _LEVELS + 1), axis=1)
    # Keys of 16 bits at most: a radix sort each.
    order = np.lexsort((level, (ids & 0xFFFF).astype(np.uint16), (ids >> 16).astype(np.uint16)))
    del ids, level
    values = features.data[mask].astype(np.float32, copy=False)[order]
    rows = np.repeat(np.arange(num_rows, dtype=np.int32), np.diff(features.indptr))[mask][order]
    return _offsets(prefixes[:, -1]), rows, values, prefixes[:, :_LEVELS].astype(np.int32)


def _levels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """An entry of level m has 2^(-m/2) <= size; the smallest ones share the last level, which no prefix counts."""
    found = np.empty(len(values), dtype=np.uint8)
    for begin in range(0, len(values), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        with np.errstate(divide="ignore"):
            found[part] = np.clip(np.ceil(-2.0 * np.log2(np.abs(values[part], dtype=np.float32))), 0, _LEVELS)
    return found


def _kept_features(features: csr_matrix) -> NDArray[np.bool_]:
    """(F,): False for a feature that is in so many rows that its list is left out."""
    counts = np.bincount(features.indices, minlength=features.shape[1])
    return np.asarray((counts <= _MAX_SHARE * features.shape[0]) | (features.shape[0] <= _SMALL))


@numba.njit(nogil=True, cache=True)
def _level(weight: float) -> int:
    """Of a query's value: the level of its product with an entry of level m is at least m + this."""
    size = abs(weight)
    return 1_000_000 if size == 0.0 else math.ceil(-2.0 * math.log2(size))


@numba.njit(nogil=True, cache=True)
def _cut(query: Any, lists: Any, budget: int, begin: int, end: int) -> int:
    """The last level of products of which all entries can be read within the budget; -1 where every entry can."""
    ids, weights = query[1], query[2]
    offsets, prefixes = lists[0], lists[3]
    total = 0
    for entry in range(begin, end):
        total += offsets[ids[entry] + 1] - offsets[ids[entry]]
    if total <= budget:
        return -1
    counts = np.zeros(2 * _LEVELS, dtype=np.int64)
    for entry in range(begin, end):
        shift = _level(weights[entry])
        for level in range(max(shift, 0), min(shift + _LEVELS, 2 * _LEVELS)):
            counts[level] += prefixes[ids[entry], level - shift]
        for level in range(shift + _LEVELS, 2 * _LEVELS):
            counts[level] += prefixes[ids[entry], _LEVELS - 1]
    cut = 0
    while cut + 1 < 2 * _LEVELS and counts[cut + 1] <= budget:
        cut += 1
    return cut


@numba.njit(nogil=True, cache=True)
def _search(
    queries: Any,
    lists: Any,
    forward: Any,
    kept: Any,
    total: Any,
    dense: Any,
    budget: int,
    num_candidates: int,
    begin: int,
    end: int,
    found_BK: Any,
    score_BK: Any,
) -> None:
    """For the queries begin..end: `scores = queries @ training.T`, the best K of each row, without the matrix.

    `total` (N,) holds NaN, `dense` (F,) zeros; both are left so.
    """
    query_offsets, query_ids, query_values = queries
    offsets, rows, values, prefixes = lists
    row_offsets, row_ids, row_values = forward
    touched = np.empty(total.shape[0], dtype=np.int32)
    for query in range(begin, end):
        first, last = query_offsets[query], query_offsets[query + 1]
        cut = _cut(queries, lists, budget, first, last)
        num_touched = 0
        for entry in range(first, last):
            feature, weight = query_ids[entry], query_values[entry]
            stop = offsets[feature + 1]
            if cut >= 0:
                level = min(cut - _level(weight), prefixes.shape[1] - 1)
                stop = offsets[feature] + (prefixes[feature, level] if level >= 0 else 0)
            for position in range(offsets[feature], stop):
                row = rows[position]
                before = total[row]
                if np.isnan(before):
                    touched[num_touched] = row
                    num_touched += 1
                    total[row] = weight * values[position]
                else:
                    total[row] = before + weight * values[position]
        if cut < 0:
            for index in range(num_touched):
                insert_best(found_BK[query], score_BK[query], touched[index], total[touched[index]])
                total[touched[index]] = np.nan
            continue
        for entry in range(first, last):
            if kept[query_ids[entry]]:
                dense[query_ids[entry]] += query_values[entry]
        least = _least_of_best(total, touched, num_touched, num_candidates)
        for index in range(num_touched):
            row = touched[index]
            if total[row] >= least:
                score = np.float32(0.0)
                for entry in range(row_offsets[row], row_offsets[row + 1]):
                    score += dense[row_ids[entry]] * row_values[entry]
                insert_best(found_BK[query], score_BK[query], row, score)
            total[row] = np.nan
        for entry in range(first, last):
            dense[query_ids[entry]] = 0.0


@numba.njit(nogil=True, cache=True)
def _votes(rows_BK: Any, weight_BK: Any, lists: Any, total: Any, offsets: Any, ids: Any, values: Any) -> int:
    """The weights of the neighbours summed by label, as the arrays of a CSR matrix; `total` (L,) is zeros again."""
    label_offsets, label_ids = lists
    used = 0
    for query in range(rows_BK.shape[0]):
        first = used
        for place in range(rows_BK.shape[1]):
            row, weight = rows_BK[query, place], weight_BK[query, place]
            if row < 0 or weight <= 0.0:
                continue
            for entry in range(label_offsets[row], label_offsets[row + 1]):
                label = label_ids[entry]
                if total[label] == 0.0:
                    ids[used] = label
                    used += 1
                total[label] += weight
        for entry in range(first, used):
            values[entry] = total[ids[entry]]
            total[ids[entry]] = 0.0
        offsets[query + 1] = used
    return used


@numba.njit(nogil=True, cache=True)
def _least_of_best(total: Any, touched: Any, num_touched: int, wanted: int) -> Any:
    """A score that about `wanted` of the touched rows reach, never fewer (where there are so many): a histogram."""
    if num_touched <= wanted:
        return -np.inf
    low = high = total[touched[0]]
    for index in range(num_touched):
        low, high = min(low, total[touched[index]]), max(high, total[touched[index]])
    if not high > low:
        return -np.inf
    num_bins = 1024
    counts = np.zeros(num_bins + 1, dtype=np.int64)
    scale = np.float32(num_bins) / (high - low)
    for index in range(num_touched):
        counts[int((total[touched[index]] - low) * scale)] += 1
    bin_, reached = num_bins, counts[num_bins]
    while reached < wanted:
        bin_ -= 1
        reached += counts[bin_]
    # One bin less, for the rounding of the division.
    return low + (bin_ - 1) / scale


@numba.njit(nogil=True, cache=True)
def insert_best(found_K: Any, score_K: Any, row: int, score: Any) -> None:
    """Keep a row (or label) if it is one of the K best: falling scores, ties to the smaller id, -1 in free places."""
    count = found_K.shape[0]
    place = count
    # From the end: after the first rows nearly every candidate loses to the last place at once.
    while place > 0 and (
        found_K[place - 1] < 0
        or score > score_K[place - 1]
        or (score == score_K[place - 1] and row < found_K[place - 1])
    ):
        place -= 1
    for move in range(count - 1, place, -1):
        found_K[move] = found_K[move - 1]
        score_K[move] = score_K[move - 1]
    if place < count:
        found_K[place] = row
        score_K[place] = score
