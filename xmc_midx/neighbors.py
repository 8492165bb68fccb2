"""Layer 2. The nearest training instances of a feature row, by an inverted list of the training features.

What an encoder of D numbers must forget (a rare word that names a rare label), the training rows remember;
`xmc_midx.predictor` adds the labels of the neighbours to the model's own. Inner products are over the features that
are not in too many rows.

A list is sorted by falling size of its values, to a level (`_LEVELS`), so that a query reads its lists only as far as
their entries matter: the largest products, as many as its budget, nominate candidates, and the best `_CANDIDATES` a
neighbour get their exact inner product (score-at-a-time ranking, arXiv 1505.06690, with rescoring). A query whose lists
hold no more entries than that is answered exactly. How many have to be read depends on the features: `tune_budget` asks
held-out instances. What is missed is measured in EXPERIMENTS.md, "Prediction time". Rows that are not sparse
(`_DENSE`) have no lists: all products are computed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled, is_kept
from xmc_midx.data.features import column_counts, inverse_document_frequency, scale_rows, with_values
from xmc_midx.intrinsics import AHEAD, fetch
from xmc_midx.packing import pack_rows, unpack_rows
from xmc_midx.selection import keep_best, write_best
from xmc_midx.tensorfile import write_arrays
from xmc_midx.threads import in_threads, scratch, zeros
from xmc_midx.types import DEFAULT_KS

__all__ = [
    "NeighborIndex",
    "choose_idf_power",
    "is_compiled",
    "save_rows",
    "tune_budget",
]

_MAX_SHARE = 0.1
"""A feature of more than this share of the rows is left out: such lists are long and say little (EXPERIMENTS.md,
"Neighbours")."""
_SMALL = 20_000
"""Up to so many rows no feature is left out."""
_MIN_MASS = 0.5
"""Of the rows' squares: none is left out either where less than this would remain."""
_DENSE = 0.25
"""Share of values that are stored from which all of them are: a matrix product is then faster than lists."""
_FEW_FEATURES = 16
"""Fewer are sparse in any case: which rows share a feature then says something."""
_BUDGETS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
"""Entries of the inverted lists that a query may read: the least with which held-out instances find `_TARGET_RECALL` of
their `_TARGET_COUNT` nearest, or the most."""
_TARGET_RECALL, _TARGET_COUNT = 0.95, 10
_ASKED = 200
"""Held-out instances that are asked."""
_IDF_POWERS = (0.0, 0.5)
_COMPARED, _COMPARED_QUERIES = 20_000, 500
"""Rows and queries by which they are compared, at most."""
_TEMPERATURE = 0.1
_MOST_READ = 2**63 - 1
_CANDIDATES = 3
"""Rows that are rescored for each neighbour asked for."""
_LEVELS = 40
"""Of the sizes of a list's values, each 2^(-1/2) of the one before: how far a list is read is looked up by level."""
_SHORT_IDS = 1 << 24
"""Features whose ids leave room for a byte in 32 bits."""
_LARGEST = 1e30
"""Of a stored row's values, in units of a 127th."""
_CHUNK = 1 << 22
"""Entries at once, where the lists are made."""


Neighbors = tuple[NDArray[np.int64], NDArray[np.float32]]
"""(B, K) row numbers and (B, K) inner products, as of `NeighborIndex.search`."""


class NeighborIndex:
    """Finds the training instances with the largest inner product.

    Parameters
    ----------
    features : (N, F) float, rows of unit length: the inner product is the cosine. Sparse rows are kept as they are
        saved, a byte a value.
    labels : (N, L); a stored value is a label of the row.
    idf_power : values, of rows and queries, are multiplied by this power of log((N + 1) / (n + 1)) + 1 for a feature of
        n rows, and scaled to unit length again; 0: as they are.
    """

    def __init__(self, features: csr_matrix, labels: csr_matrix, *, idf_power: float = 0.0) -> None:
        assert features.shape[0] == labels.shape[0], "features and labels are rows of the same instances"
        kept = _kept_features(features)
        self._weights = _feature_weights(features, kept, idf_power) if idf_power else None
        self.num_features = int(features.shape[1])
        self.labels = csr_matrix(
            (np.ones(labels.nnz, dtype=np.float32), labels.indices, labels.indptr), shape=labels.shape
        )
        self._dense, self._local = None, threading.local()
        if _is_dense(features):
            self._dense = with_values(features, self._weighted(features)).toarray()
            return
        features = _only(features, kept)
        codes, scale_N = _quantize(features)
        # One fetch of a row brings ids and values: an entry is a feature's id, and below it the byte of the value.
        ids: NDArray[Any] = features.indices.astype(np.uint32 if self.num_features <= _SHORT_IDS else np.uint64)
        entries = ids << 8 | codes.view(np.uint8)
        values = codes.astype(np.float32)
        if self._weights is not None:
            values *= self._weights[features.indices]
            squares = np.asarray(with_values(features, np.square(values)).sum(axis=1), dtype=np.float32).ravel()
            scale_N = np.reciprocal(np.sqrt(np.maximum(squares, np.float32(1e-30))))
        values *= np.repeat(scale_N, np.diff(features.indptr))
        weights_F = np.empty(0, dtype=np.float32) if self._weights is None else self._weights
        self._forward = (features.indptr.astype(np.int64), entries, scale_N, weights_F)
        self._lists = _inverted_lists(with_values(features, values))

    @property
    def num_instances(self) -> int:
        return int(self.labels.shape[0])

    @classmethod
    def load(cls, path: Path, *, idf_power: float = 0.0) -> NeighborIndex:
        """The index over what `save_rows` wrote; a ValueError, LookupError or SafetensorError where it is not that."""
        return cls(*_read_rows(load_file(path)), idf_power=idf_power)

    def _weighted(self, features: csr_matrix) -> NDArray[np.float32]:
        """The rows' values as the index has them."""
        values: NDArray[np.float32] = features.data.astype(np.float32, copy=self._weights is not None)
        if self._weights is not None:
            values *= self._weights[features.indices]
            scale_rows(values, features.indptr)
        return values

    def search(self, features: csr_matrix, count: int, *, budget: int | None = None) -> Neighbors:
        """The `count` nearest training rows of each of B rows.

        Parameters
        ----------
        budget : entries of the lists that are read for a row, at most; None: all.

        Returns
        -------
        (B, count) int64 row numbers and (B, count) float32 inner products: falling, ties to the smaller row; -1 and 0
        where fewer rows share a feature with the query. The inner products with the rows as they are kept are exact
        in any case.
        """
        assert features.shape[1] == self.num_features, "queries and training rows have the same features"
        num_rows, values = features.shape[0], self._weighted(features)
        if self._dense is not None:
            return _dense_search(with_values(features, values).toarray(), self._dense, count)
        rows_BK = np.full((num_rows, count), -1, dtype=np.int64)
        scores_BK = np.zeros((num_rows, count), dtype=np.float32)
        queries = (features.indptr.astype(np.int64), features.indices, values)
        most_read = _MOST_READ if budget is None else min(budget, _MOST_READ)

        def run(begin: int, end: int) -> None:
            limits, found = (most_read, _CANDIDATES * count), (rows_BK, scores_BK)
            _search(queries, self._lists, self._forward, self._workspace(), limits, begin, end, *found)

        if num_rows:
            in_threads(run, num_rows)
        return rows_BK, scores_BK

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def _workspace(self) -> tuple[NDArray[Any], ...]:
        """Of this thread, as `_search` leaves it: to fill it anew would take longer than to answer one query."""
        if not hasattr(self._local, "total"):
            self._local.total = np.full(self.num_instances, np.nan, dtype=np.float32)
        # One more place than rows: the last entry of a list is noted before it is known whether its row is new.
        room = scratch(self.num_instances + 1, np.int32), scratch(self.num_instances, np.float32)
        return self._local.total, zeros(self.num_features, np.float32), *room

    def votes(self, rows_BK: NDArray[np.int64], scores_BK: NDArray[np.float32], temperature: float) -> csr_matrix:
        """The neighbours' labels, (B, L) float64: the share of the neighbours that have a label, each weighted by
        `softmax(score / temperature)`. In [0, 1]; an instance without neighbours has none.
        """
        lists = (self.labels.indptr, self.labels.indices)
        num_rows, num_labels = rows_BK.shape[0], self.labels.shape[1]
        room = count_votes(rows_BK, self.labels.indptr)
        offsets = np.zeros(num_rows + 1, dtype=self.labels.indptr.dtype)
        ids, values = np.empty(room, dtype=self.labels.indices.dtype), np.empty(room)
        total = zeros(num_labels, np.float64)
        used = sum_votes(rows_BK, scores_BK, 1.0 / temperature, lists, total, offsets, ids, values)
        return csr_matrix((values[:used], ids[:used], offsets), shape=(num_rows, num_labels))


def is_compiled() -> bool:
    """Whether the code of this module was compiled on this machine before, as after the first training it is."""
    return is_kept(_search)


def tune_budget(index: NeighborIndex, features: csr_matrix, count: int) -> int:
    """The least budget with which held-out rows (N, F) find nearly all of their nearest neighbours.

    A neighbour counts if it is as near as the last of those that a full search finds. Of few rows all are read.
    """
    if index.num_instances <= _SMALL:
        return _BUDGETS[-1]
    asked = features[:_ASKED]
    exact_BK = index.search(asked, count)[1][:, :_TARGET_COUNT]
    last_B1 = np.min(exact_BK, axis=1, where=exact_BK > 0.0, initial=np.inf, keepdims=True)
    wanted = (exact_BK > 0.0).sum()
    for budget in _BUDGETS[:-1]:
        found_BK = index.search(asked, count, budget=budget)[1][:, :_TARGET_COUNT]
        if (found_BK >= last_B1 * (1.0 - 1e-5)).sum() >= _TARGET_RECALL * wanted:
            return budget
    return _BUDGETS[-1]


def choose_idf_power(features: csr_matrix, labels: csr_matrix, count: int, *, seed: int = 0) -> float:
    """The power with which the neighbours' votes are best: P@1, P@3 and P@5 of some rows by all others.

    Parameters
    ----------
    features, labels : as of `NeighborIndex`; of many rows, a random part is looked at.
    count : neighbours that vote.
    """
    order = np.random.default_rng((seed, 3)).permutation(features.shape[0])
    part = np.sort(order[:_COMPARED])
    features, labels = features[part], labels[part]
    asked = np.sort(np.random.default_rng((seed, 4)).permutation(len(part))[:_COMPARED_QUERIES])
    quality = []
    for power in _IDF_POWERS:
        index = NeighborIndex(features, labels, idf_power=power)
        rows_BK, scores_BK = index.search(features[asked], count + 1, budget=_BUDGETS[-1])
        # A row is its own nearest.
        rows_BK[rows_BK == asked[:, None]] = -1
        votes = index.votes(rows_BK, scores_BK, _TEMPERATURE)
        quality.append(_mean_precision(votes, labels[asked]))
    return _IDF_POWERS[int(np.argmax(quality))]


def _mean_precision(votes: csr_matrix, labels: csr_matrix) -> float:
    """The mean of P@1, P@3 and P@5 of the most voted labels."""
    weight_K = np.array([1 / k for k in DEFAULT_KS]) @ (np.arange(max(DEFAULT_KS)) < np.array(DEFAULT_KS)[:, None])
    total = 0.0
    for row in range(votes.shape[0]):
        mine = slice(votes.indptr[row], votes.indptr[row + 1])
        best = votes.indices[mine][np.lexsort((votes.indices[mine], -votes.data[mine]))[: len(weight_K)]]
        hits = np.isin(best, labels.indices[labels.indptr[row] : labels.indptr[row + 1]])
        total += float(weight_K[: len(hits)] @ hits)
    return total / (len(DEFAULT_KS) * max(votes.shape[0], 1))


def save_rows(path: Path, features: csr_matrix, labels: csr_matrix) -> str:
    """Write training rows (N, F) and their labels (N, L) as safetensors, some two bytes a value; the sha256.

    `features.*` and `labels.*` are packed rows (`xmc_midx.packing`): of the features, values are int8 in units of
    `features.scale` (N,), the row's largest / 127, and those that the index leaves out are not written.
    """
    features = _only(features, _kept_features(features))
    codes, scale = _quantize(features)
    ones = np.ones(labels.nnz, dtype=np.int8)
    parts = {"features": with_values(features, codes), "labels": with_values(labels, ones)}
    packed = {f"{part}.{name}": a for part, rows in parts.items() for name, a in pack_rows(rows).items()}
    return write_arrays(path, packed | {"features.scale": scale})


def _read_rows(arrays: Mapping[str, NDArray[Any]]) -> tuple[csr_matrix, csr_matrix]:
    """What `save_rows` was given, values as exact as they are stored; a ValueError where it is not that."""
    features, labels = (
        unpack_rows({name.removeprefix(part): a for name, a in arrays.items() if name.startswith(part)}, "int8")
        for part in ("features.", "labels.")
    )
    scale = arrays["features.scale"]
    if scale.shape != (features.shape[0],) or labels.shape[0] != features.shape[0]:
        raise ValueError("features, their units and labels are not of the same rows")
    if not (np.abs(scale) < _LARGEST).all():
        raise ValueError("a value of the features is not finite")
    values = features.data.astype(np.float32) * np.repeat(scale, np.diff(features.indptr))
    return with_values(features, values), with_values(labels, np.ones(labels.nnz, dtype=np.float32))


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _inverted_lists(features: csr_matrix) -> tuple[NDArray[Any], ...]:
    """The features' lists one after the other: offsets (F+1,), rows and values (nnz,), and how many entries of a list
    (F, levels) are at least as large as each level, in the last column all. In a list, the levels fall and the rows of
    a level rise."""
    num_rows, num_features = features.shape
    ids, level = features.indices, _levels(features.data)
    prefixes = np.zeros((num_features, _LEVELS + 1), dtype=np.int32)
    _count_levels(ids, level, prefixes)
    # Keys of 16 bits at most: a radix sort each.
    order = np.lexsort((level, (ids & 0xFFFF).astype(np.uint16), (ids >> 16).astype(np.uint16)))
    del ids, level
    rows = np.repeat(np.arange(num_rows, dtype=np.int32), np.diff(features.indptr))[order]
    return _offsets(prefixes[:, -1]), rows, features.data[order], prefixes


@compiled
def _count_levels(ids: Any, level: Any, prefixes: Any) -> None:
    """How many entries of a feature are of a level or a lower one, into `prefixes` (F, levels)."""
    for entry in range(ids.shape[0]):
        prefixes[ids[entry], level[entry]] += 1
    for feature in range(prefixes.shape[0]):
        for column in range(1, prefixes.shape[1]):
            prefixes[feature, column] += prefixes[feature, column - 1]


def _levels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """An entry of level m has 2^(-m/2) <= size; the smallest ones share the last level, which no prefix counts."""
    found = np.empty(len(values), dtype=np.uint8)
    for begin in range(0, len(values), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        with np.errstate(divide="ignore"):
            found[part] = np.clip(np.ceil(-2.0 * np.log2(np.abs(values[part], dtype=np.float32))), 0, _LEVELS)
    return found


def _feature_weights(features: csr_matrix, kept: NDArray[np.bool_], power: float) -> NDArray[np.float32]:
    """(F,): of a feature that is left out, or in no row, 0."""
    counts = column_counts(features)
    idf = inverse_document_frequency(counts, features.shape[0])
    return np.where((counts > 0) & kept, idf**power, 0.0).astype(np.float32)


def _kept_features(features: csr_matrix) -> NDArray[np.bool_]:
    """(F,): False for a feature that is in so many rows that its list is left out."""
    counts = column_counts(features)
    kept = np.asarray(counts <= _MAX_SHARE * features.shape[0])
    squares = np.square(features.data, dtype=np.float64)
    if features.shape[0] <= _SMALL or squares[kept[features.indices]].sum() < _MIN_MASS * squares.sum():
        kept[:] = True
    return kept


def _only(features: csr_matrix, kept: NDArray[np.bool_]) -> csr_matrix:
    """The values of the kept features."""
    mask = kept[features.indices]
    offsets = _offsets(mask)[features.indptr]
    return csr_matrix((features.data[mask], features.indices[mask], offsets), shape=features.shape)


def _quantize(features: csr_matrix) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The values in a byte each (nnz,), and the units of each row (N,): its largest / 127."""
    codes = np.empty(features.nnz, dtype=np.int8)
    scale_N = np.empty(features.shape[0], dtype=np.float32)
    _quantize_rows(features.data, features.indptr, codes, scale_N)
    return codes, scale_N


@compiled
def _quantize_rows(values: Any, offsets: Any, codes: Any, scale: Any) -> None:
    for row in range(scale.shape[0]):
        largest = np.float32(1e-30)
        for entry in range(offsets[row], offsets[row + 1]):
            largest = max(largest, np.float32(abs(values[entry])))
        scale[row] = largest / np.float32(127)
        for entry in range(offsets[row], offsets[row + 1]):
            codes[entry] = np.int8(np.rint(values[entry] / scale[row]))


def _dense_search(
    query_BF: NDArray[np.float32], row_NF: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As `NeighborIndex.search`, from all products."""
    num_rows = query_BF.shape[0]
    rows_BK = np.full((num_rows, count), -1, dtype=np.int64)
    scores_BK = np.zeros((num_rows, count), dtype=np.float32)
    step = max(1, _CHUNK // row_NF.shape[0])
    for begin in range(0, num_rows, step):
        part = slice(begin, begin + step)
        _write_best_rows(query_BF[part] @ row_NF.T, rows_BK[part], scores_BK[part])
    # Without features, no row is nearer than another.
    rows_BK[~query_BF.any(axis=1)] = -1
    return rows_BK, scores_BK


@compiled
def _write_best_rows(products_BN: Any, rows_BK: Any, scores_BK: Any) -> None:
    for query in range(products_BN.shape[0]):
        rows = np.arange(products_BN.shape[1])
        write_best(rows, products_BN[query], products_BN.shape[1], rows_BK[query], scores_BK[query])


def _is_dense(features: csr_matrix) -> bool:
    num_rows, num_features = features.shape
    return bool(num_features >= _FEW_FEATURES and features.nnz > 0 and features.nnz >= _DENSE * num_rows * num_features)


@compiled
def _level(weight: float) -> int:
    """Of a query's value: the level of its product with an entry of level m is at least m + this."""
    size = abs(weight)
    return 1_000_000 if size == 0.0 else math.ceil(-2.0 * math.log2(size))


@compiled
def _plan(query: Any, lists: Any, budget: int, begin: int, end: int, lengths: Any) -> bool:
    """How many entries of each list of the query are read, into `lengths`, and whether that is all of them.

    Within the budget the largest products are read: all those to a level, and of the next the shortest lists first,
    which are those of the rarest features. Of equal values all entries are on one level.
    """
    ids, weights = query[1], query[2]
    offsets, prefixes = lists[0], lists[3]
    total = 0
    for entry in range(begin, end):
        lengths[entry - begin] = offsets[ids[entry] + 1] - offsets[ids[entry]]
        total += lengths[entry - begin]
    if total <= budget:
        return True
    shifts, more = np.empty(end - begin, dtype=np.int64), np.empty(end - begin, dtype=np.int64)
    for entry in range(begin, end):
        shifts[entry - begin] = _level(weights[entry])
    # The last level to which all fit.
    cut, most = -1, 2 * _LEVELS - 1
    while cut < most:
        middle = (cut + most + 1) // 2
        total = 0
        for place in range(end - begin):
            total += _prefix(prefixes, ids[begin + place], middle - shifts[place])
        if total <= budget:
            cut = middle
        else:
            most = middle - 1
    left = budget
    for place in range(end - begin):
        feature = ids[begin + place]
        lengths[place] = _prefix(prefixes, feature, cut - shifts[place])
        more[place] = _prefix(prefixes, feature, cut + 1 - shifts[place]) - lengths[place]
        left -= lengths[place]
    longest = np.int64(1)
    while left > 0 and longest < 2 * budget:
        for place in range(end - begin):
            if longest // 2 < more[place] <= longest:
                taken = min(more[place], left)
                lengths[place] += taken
                left -= taken
        longest *= 2
    return False


@compiled
def _prefix(prefixes: Any, feature: int, level: int) -> int:
    """Entries of a list to a level of its values."""
    return 0 if level < 0 else prefixes[feature, min(level, _LEVELS - 1)]


@compiled
def _search(
    queries: Any,
    lists: Any,
    forward: Any,
    workspace: Any,
    limits: Any,
    begin: int,
    end: int,
    found_BK: Any,
    score_BK: Any,
) -> None:
    """For the queries begin..end: `scores = queries @ training.T`, the best K of each row, without the matrix.

    `workspace`: (N,) NaN and (F,) zeros, left so, and room for rows (N + 1) and scores (N,). `limits`: entries that
    are read, and rows that are rescored.
    """
    query_offsets, query_ids, query_values = queries
    offsets, rows, values = lists[:3]
    row_offsets, row_entries, row_scale, weights = forward
    total, dense, touched, score = workspace
    budget, num_candidates = limits
    lengths = np.empty(np.diff(query_offsets[begin : end + 1]).max(), dtype=np.int64)
    room = np.uint64(total.shape[0])
    for query in range(begin, end):
        first, last = query_offsets[query], query_offsets[query + 1]
        everything = _plan(queries, lists, budget, first, last, lengths)
        count = np.uint64(0)
        for entry in range(first, last):
            feature, weight = query_ids[entry], query_values[entry]
            start, stop = np.uint64(offsets[feature]), np.uint64(offsets[feature] + lengths[entry - first])
            for position in range(start, stop):
                row = np.uint32(rows[position])
                before = total[row]
                # No branch: whether a row is new is a coin toss, and the processor would guess wrong.
                touched[min(count, room)] = row
                is_new = np.isnan(before)
                count += np.uint64(is_new)
                total[row] = weight * values[position] + (np.float32(0.0) if is_new else before)
        # A row whose sum is no number stays new.
        num_touched: Any = np.int64(min(count, room))
        for index in range(num_touched):
            row = np.uint32(touched[index])
            score[index] = total[row]
            total[row] = np.nan
        if everything:
            write_best(touched, score, num_touched, found_BK[query], score_BK[query])
            continue
        for entry in range(first, last):
            weight = query_values[entry]
            dense[query_ids[entry]] += weight * weights[query_ids[entry]] if weights.shape[0] else weight
        num_touched = keep_best(touched, score, num_touched, num_candidates)
        for index in range(num_touched):
            # A row's place in memory is anyone's guess.
            ahead = touched[min(index + AHEAD, num_touched - 1)]
            fetch(row_entries, row_offsets[ahead], row_offsets[ahead + 1])
            row = touched[index]
            product = np.float32(0.0)
            for place in range(np.uint64(row_offsets[row]), np.uint64(row_offsets[row + 1])):
                both = np.uint64(row_entries[place])
                product += dense[both >> np.uint64(8)] * np.float32(np.int8(both & np.uint64(0xFF)))
            score[index] = product * row_scale[row]
        write_best(touched, score, num_touched, found_BK[query], score_BK[query])
        for entry in range(first, last):
            dense[query_ids[entry]] = 0.0


@compiled
def count_votes(rows_BK: Any, label_offsets: Any) -> Any:
    """Labels of the neighbours, repeats counted."""
    count = np.int64(0)
    for row in rows_BK.flat:
        if row >= 0:
            count += label_offsets[row + 1] - label_offsets[row]
    return count


@compiled
def sum_votes(
    rows_BK: Any, score_BK: Any, sharpness: float, lists: Any, total: Any, offsets: Any, ids: Any, values: Any
) -> int:
    """The weights of the neighbours, `softmax(sharpness score)`, summed by label, as the arrays of a CSR matrix;
    `total` (L,) is zeros again."""
    label_offsets, label_ids = lists
    used = 0
    for query in range(rows_BK.shape[0]):
        peak, mass = -np.inf, 0.0
        for place in range(rows_BK.shape[1]):
            if rows_BK[query, place] >= 0:
                peak = max(peak, sharpness * score_BK[query, place])
        for place in range(rows_BK.shape[1]):
            if rows_BK[query, place] >= 0:
                mass += math.exp(sharpness * score_BK[query, place] - peak)
        first = used
        for place in range(rows_BK.shape[1]):
            row = rows_BK[query, place]
            weight = math.exp(sharpness * score_BK[query, place] - peak) / mass if row >= 0 else 0.0
            if weight <= 0.0:
                continue
            for entry in range(np.uint64(label_offsets[row]), np.uint64(label_offsets[row + 1])):
                label = np.uint32(label_ids[entry])
                if total[label] == 0.0:
                    ids[used] = label
                    used += 1
                total[label] += weight
        for entry in range(first, used):
            label = np.uint32(ids[entry])
            values[entry] = total[label]
            total[label] = 0.0
        offsets[query + 1] = used
    return used
