"""Layer 5. The last step of a prediction: a ranking by the scores of `xmc_midx.interpolation`, of a model or of several
of one ensemble.

The first model finds labels and neighbours; what is among its hundred best or voted for is a candidate. Every model
scores all candidates, by logits, votes and margins of its own, and the mean of the scores ranks them. It is made of
many small steps, in compiled code: what their arrays take between them would be longer than an answer to one instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled
from xmc_midx.index import insert_logits
from xmc_midx.interpolation import (
    Coefficients,
    Interpolation,
    drop_hopeless,
    empty_candidates,
    scale_of,
    score_behind,
    score_candidates,
    score_label,
    score_margin,
)
from xmc_midx.intrinsics import AHEAD, fetch_row
from xmc_midx.neighbors import NeighborIndex, Neighbors, count_votes, sum_votes
from xmc_midx.quantization import StoredTable, read_only, row_product
from xmc_midx.ranker import LinearRanker, Margins, row_margins
from xmc_midx.selection import insert_best
from xmc_midx.threads import in_threads, zeros
from xmc_midx.types import TopK

__all__ = ["LastStep", "Scorer"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scorer:
    """What a model's scores are made of."""

    settings: Interpolation
    source: tuple[StoredTable, NDArray[np.float32]] | None
    """Label table and bias, for logits that no search has brought; None where a first model's search misses none."""
    ranker: LinearRanker | None
    """Where the settings need it."""


class _Model(NamedTuple):
    """What compiled code scores a label by."""

    codes: NDArray[Any]
    scales: NDArray[np.float32]
    """The label table's arrays, as of `StoredTable`; empty where a first model's search misses no label."""
    bias: NDArray[np.float32]
    coefficients: Coefficients
    share: float
    """Of the ensemble's score."""
    sharpness: float
    """Of the softmax over the neighbours' cosines: 1 / temperature."""


class _Ranking(NamedTuple):
    """What a model's linear ranker adds."""

    arrays: tuple[NDArray[Any], ...]
    coefficients: Coefficients
    span: float
    """By how much that can differ between two labels."""


class LastStep:
    """Adds what there is to the scores of models.

    Parameters
    ----------
    scorers : of the first model, and of those that score what it finds.
    label_frequencies : (L,) integers of the training split.
    neighbors : where the settings of any model need them.

    Raises
    ------
    ValueError : the parts do not fit together; compiled code would not notice.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        label_frequencies: NDArray[np.integer[Any]],
        neighbors: NeighborIndex | None,
    ) -> None:
        _require_fit(scorers, len(label_frequencies), neighbors)
        needing = [one.settings for one in scorers if one.settings.needs_neighbors]
        self.frequencies = read_only(label_frequencies)
        self.neighbors, self._labels = None, _NO_LABELS
        if neighbors is not None and needing:
            self.neighbors, self._searched = neighbors, needing[0]
            self._labels = neighbors.labels.indptr, neighbors.labels.indices
        self._share = 1.0 / len(scorers)
        self._models = [_model_of(one, self._share) for one in scorers]
        self._rankings = [
            _Ranking(one.ranker.arrays, one.settings.coefficients, self._share * one.settings.margin_span)
            for one in scorers
            if one.ranker is not None and one.settings.needs_ranker
        ]
        self._num_features = next((one.ranker.num_features for one in scorers if one.ranker is not None), None)

    def find(self, features: csr_matrix) -> Neighbors | None:
        """The neighbours of (B, F) rows; None where no model needs them."""
        if self.neighbors is None:
            return None
        return self.neighbors.search(features, self._searched.count, budget=self._searched.budget)

    def rank(
        self,
        top: TopK,
        features: csr_matrix,
        found: Neighbors | None,
        k: int,
        *,
        queries: Sequence[NDArray[np.float32]],
        reference: TopK | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> TopK:
        """The k best labels.

        Parameters
        ----------
        top : (B, S) logits of the first model. Where its search may have missed labels, those that the neighbours vote
            for take their places there.
        features : (B, F) rows, scaled like those of training.
        found : the neighbours, as of `find`.
        queries : (B, D) of each model.
        reference : (B, S) logits of all labels where `top` is of chosen ones only, completed like it: their
            probabilities, and which are outside of the shortlist, are what they are there, so that a choice of labels
            changes no order; None: `top`.
        allowed : (L,) the labels that may be returned; None: all.
        """
        num_rows, num_labels = len(top.label_ids), len(self.frequencies)
        num_features = features.shape[1]
        assert self._num_features in (None, num_features), "instances and training rows have the same features"
        result = TopK.empty(num_rows, k)
        if found is None:
            found = np.empty((num_rows, 0), dtype=np.int64), np.empty((num_rows, 0), dtype=np.float32)
        rows = features.indptr, features.indices.astype(np.int32, copy=False), features.data
        is_all, share = reference is None, self._share
        listed, known = (top.label_ids, top.scores), (top.label_ids, top.scores)
        if reference is not None:
            known = reference.label_ids, reference.scores
        kept = _ALL if allowed is None else read_only(allowed)

        def run(begin: int, end: int) -> None:
            total, part = zeros(num_labels, np.float64), slice(begin, end)
            near = found[0][part], found[1][part]
            known_part = known[0][part], known[1][part]
            candidates = _first(
                queries[0][part],
                self._models[0],
                (listed[0][part], listed[1][part]),
                known_part,
                is_all,
                near,
                self._labels,
                self.frequencies,
                kept,
                total,
            )
            for query_BD, model in zip(queries[1:], self._models[1:], strict=True):
                _add(
                    query_BD[part],
                    model,
                    known_part[0],
                    is_all,
                    near,
                    self._labels,
                    self.frequencies,
                    total,
                    candidates,
                )
            for place, one in enumerate(self._rankings):
                # To look at their weights takes the longest.
                drop_hopeless(candidates, k, sum(later.span for later in self._rankings[place:]))
                dense = zeros(num_features, np.float32)
                _add_margins(rows, begin, one.arrays, one.coefficients, share, dense, candidates)
            _write(candidates, result.label_ids[part], result.scores[part])

        in_threads(run, num_rows)
        return result


def _require_fit(scorers: Sequence[Scorer], num_labels: int, neighbors: NeighborIndex | None) -> None:
    sources = [one.source for one in scorers if one.source is not None]
    rankers = [one.ranker for one in scorers if one.ranker is not None]
    labels = [*(ranker.num_labels for ranker in rankers), *(len(bias) for _, bias in sources)]
    labels += [table.shape[0] for table, _ in sources] + ([] if neighbors is None else [neighbors.labels.shape[1]])
    features = {ranker.num_features for ranker in rankers} | (set() if neighbors is None else {neighbors.num_features})
    if {num_labels, *labels} != {num_labels} or len(features) > 1:
        raise ValueError(f"parts of {sorted({num_labels, *labels})} labels and {sorted(features)} features")
    if any(one.source is None for one in scorers[1:]):
        raise ValueError("a further model scores labels by its table")
    if neighbors is None and any(one.settings.needs_neighbors for one in scorers):
        raise ValueError("votes come with their neighbours")
    if any(one.settings.needs_ranker and one.ranker is None for one in scorers):
        raise ValueError("a margin comes with its ranker")


_ALL = read_only(np.empty(0, dtype=np.bool_))
_NO_LABELS = np.zeros(1, dtype=np.int32), np.empty(0, dtype=np.int32)
_NO_NUMBERS = read_only(np.empty(0, dtype=np.float32))
_NO_CODES = read_only(np.empty((0, 0), dtype=np.int8)), _NO_NUMBERS, _NO_NUMBERS


def _model_of(one: Scorer, share: float) -> _Model:
    """As compiled code takes it."""
    codes, scales, bias = _NO_CODES if one.source is None else (*one.source[0].arrays, read_only(one.source[1]))
    return _Model(codes, scales, bias, one.settings.coefficients, share, 1.0 / one.settings.temperature)


@compiled
def _first(
    query_BD: Any,
    model: Any,
    shortlist: Any,
    reference: Any,
    is_all: bool,
    near: Any,
    labels: Any,
    frequencies: Any,
    allowed: Any,
    total: Any,
) -> Any:
    """The candidates, with the first model's part of their scores; `total` (L,) is zeros, and left so. With `is_all`,
    `shortlist` is `reference`."""
    num_rows = query_BD.shape[0]
    room = count_votes(near[0], labels[0])
    offsets, ids, shares = np.zeros(num_rows + 1, dtype=np.int64), np.empty(room, dtype=np.int64), np.empty(room)
    sum_votes(near[0], near[1], model.sharpness, labels, total, offsets, ids, shares)
    if model.codes.shape[0]:
        _complete(query_BD, model, offsets, ids, reference)
    if allowed.shape[0]:
        _keep(allowed, offsets, ids, shares)
    if model.codes.shape[0] and not is_all:
        _complete(query_BD, model, offsets, ids, shortlist)
    found = empty_candidates(num_rows, num_rows * shortlist[0].shape[1] + offsets[-1])
    votes = (offsets, ids, shares)
    score_candidates(shortlist, reference, votes, frequencies, model.coefficients, model.share, total, found)
    return found


@compiled
def _complete(query_BD: Any, model: Any, offsets: Any, ids: Any, top: Any) -> None:
    table = (model.codes, model.scales)
    for row in range(query_BD.shape[0]):
        voted = ids[offsets[row] : offsets[row + 1]]
        insert_logits(query_BD[row], table, model.bias, voted, top[0][row], top[1][row])


@compiled
def _keep(allowed: Any, offsets: Any, ids: Any, shares: Any) -> None:
    """Leave the votes for what is allowed."""
    used, last = 0, np.int64(0)
    for row in range(offsets.shape[0] - 1):
        first, last = last, offsets[row + 1]
        for entry in range(first, last):
            if allowed[ids[entry]]:
                ids[used], shares[used] = ids[entry], shares[entry]
                used += 1
        offsets[row + 1] = used


@compiled
def _add(
    query_BD: Any,
    model: Any,
    reference_BS: Any,
    is_all: bool,
    near: Any,
    labels: Any,
    frequencies: Any,
    total: Any,
    found: Any,
) -> None:
    """Add another model's part to the candidates' scores. A label is in its shortlist if its logit is no less than the
    least that it gives to the first model's. With `is_all`, the first candidates are those labels, in their order."""
    codes, scales, bias, coefficients, share, sharpness = model
    logit_S = np.empty(reference_BS.shape[1], dtype=np.float32)
    one = np.zeros(2, dtype=np.int64)
    for row in range(query_BD.shape[0]):
        mine = slice(row, row + 1)
        room = count_votes(near[0][mine], labels[0])
        ids, shares = np.empty(room, dtype=np.int64), np.empty(room)
        num_votes = sum_votes(near[0][mine], near[1][mine], sharpness, labels, total, one, ids, shares)
        for entry in range(num_votes):
            total[ids[entry]] = shares[entry]
        known = reference_BS[row]
        largest, smallest, last = -np.inf, np.inf, known.shape[0] - 1
        for place in range(known.shape[0]):
            fetch_row(codes, max(known[min(place + AHEAD, last)], 0))
            label = known[place]
            logit_S[place] = row_product(query_BD[row], codes, scales, label) + bias[label] if label >= 0 else -np.inf
            if label >= 0:
                logit = np.float64(logit_S[place])
                largest, smallest = max(largest, logit), min(smallest, logit)
        shift, floor = scale_of(known, logit_S, largest, smallest, coefficients)
        begin, end = found.offsets[row], found.offsets[row + 1]
        for place in range(begin, end):
            label = found.label_ids[place]
            if found.is_behind[place]:
                found.scores[place] += share * score_behind(floor, coefficients)
                continue
            if is_all and place - begin < known.shape[0] and known[place - begin] == label:
                logit = np.float64(logit_S[place - begin])
            else:
                logit = np.float64(row_product(query_BD[row], codes, scales, label) + bias[label])
            log_p = logit - shift if logit >= smallest else floor
            score = score_label(log_p, total[label], frequencies[label], logit < smallest, coefficients)
            found.scores[place] += share * score
        for entry in range(num_votes):
            total[ids[entry]] = 0.0


@compiled
def _add_margins(rows: Any, begin: int, ranker: Any, coefficients: Any, share: float, dense: Any, found: Any) -> None:
    """Of the candidates that are not behind all others; `dense` (F,) is zeros, and left so."""
    offsets, feature_ids, values = rows
    for row in range(found.offsets.shape[0] - 1):
        mine = slice(offsets[begin + row], offsets[begin + row + 1])
        asked = found.offsets[row] + np.flatnonzero(~found.is_behind[found.offsets[row] : found.offsets[row + 1]])
        both = np.empty((2, asked.shape[0]), dtype=np.float32)
        row_margins(feature_ids[mine], values[mine], found.label_ids[asked], ranker, dense, Margins(both[0], both[1]))
        for number in range(asked.shape[0]):
            found.scores[asked[number]] += share * score_margin(both[0, number], both[1, number], coefficients)


@compiled
def _write(found: Any, best_BK: Any, score_BK: Any) -> None:
    score_K = np.empty(best_BK.shape[1])
    for row in range(best_BK.shape[0]):
        score_K[:] = -np.inf
        for place in range(found.offsets[row], found.offsets[row + 1]):
            insert_best(best_BK[row], score_K, found.label_ids[place], found.scores[place])
        score_BK[row] = score_K
