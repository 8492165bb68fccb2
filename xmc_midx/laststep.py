"""Layer 5. The last step of a prediction (`xmc_midx.interpolation`), an instance after the other in compiled code.

It is made of many small steps: what their arrays take between them would be longer than an answer to one instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.index import insert_logits
from xmc_midx.interpolation import Interpolation, score_candidates
from xmc_midx.neighbors import NeighborIndex, Neighbors, count_votes, sum_votes
from xmc_midx.quantization import read_only
from xmc_midx.ranker import LinearRanker, row_margins
from xmc_midx.selection import insert_best
from xmc_midx.threads import in_threads, zeros
from xmc_midx.types import TopK

if TYPE_CHECKING:
    from xmc_midx.types import Logits

__all__ = ["LastStep"]


class LastStep:
    """What is added to a model's scores, and how.

    Parameters
    ----------
    settings : not the identity.
    label_frequencies : (L,) integers of the training split.
    neighbors, ranker : where the settings need them; None: there is none.
    """

    def __init__(
        self,
        settings: Interpolation,
        label_frequencies: NDArray[np.integer[Any]],
        neighbors: NeighborIndex | None,
        ranker: LinearRanker | None,
    ) -> None:
        assert neighbors is not None or not settings.needs_neighbors, "votes come with their neighbours"
        assert ranker is not None or not settings.needs_ranker, "a margin comes with its ranker"
        self.settings, self.frequencies = settings, read_only(label_frequencies)
        self.neighbors = neighbors if settings.needs_neighbors else None
        self._labels = _NO_LABELS if neighbors is None else (neighbors.labels.indptr, neighbors.labels.indices)
        self._ranker = _NO_RANKER if ranker is None or not settings.needs_ranker else ranker.arrays
        self._num_weights = 0 if ranker is None else ranker.num_features
        self._numbers = settings.coefficients, 1.0 / settings.temperature

    def find(self, features: csr_matrix) -> Neighbors | None:
        """The neighbours of (B, F) rows."""
        if self.neighbors is None:
            return None
        return self.neighbors.search(features, self.settings.count, budget=self.settings.budget)

    def rank(
        self,
        top: TopK,
        features: csr_matrix,
        found: Neighbors | None,
        k: int,
        *,
        logits: Logits | None = None,
        reference: TopK | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> TopK:
        """The k best labels.

        Parameters
        ----------
        top : (B, S) logits of the model; with `logits`, what the neighbours vote for takes its place in it.
        features : (B, F) rows, scaled like those of training.
        found : the neighbours, as of `find`.
        logits : of the model, for labels that its search may have missed; None: it misses none.
        reference : as of `interpolation.interpolate`, and with `logits` completed like `top`; None: `top`.
        allowed : (L,) the labels that may be returned; None: all.
        """
        num_rows = len(top.label_ids)
        result = TopK.empty(num_rows, k)
        if found is None:
            found = np.empty((num_rows, 0), dtype=np.int64), np.empty((num_rows, 0), dtype=np.float32)
        shortlist = top.label_ids, top.scores
        other = shortlist if reference is None else (reference.label_ids, reference.scores)
        rows = features.indptr, features.indices.astype(np.int32, copy=False), features.data
        kept = _ALL if allowed is None else read_only(allowed)
        arrays = (rows, shortlist, other, reference is None, found, self._labels, logits or _NO_LOGITS, self._ranker)

        def run(first: int, last: int) -> None:
            work = zeros(len(self.frequencies), np.float64), zeros(self._num_weights, np.float32)
            numbers = self._numbers
            _rank(*arrays, self.frequencies, *numbers, kept, *work, result.label_ids, result.scores, first, last)

        in_threads(run, num_rows)
        return result


_NO_LOGITS: Logits = (
    np.empty((0, 0), dtype=np.float32),
    read_only(np.empty((0, 0), dtype=np.int8)),
    read_only(np.empty(0, dtype=np.float32)),
    read_only(np.empty(0, dtype=np.float32)),
)
_NO_LABELS = np.zeros(1, dtype=np.int32), np.empty(0, dtype=np.int32)
_NO_RANKER = (
    np.zeros(1, dtype=np.int64),
    np.empty(0, dtype=np.int32),
    np.empty(0, dtype=np.float32),
    np.empty(0, dtype=np.float32),
)
_ALL = read_only(np.empty(0, dtype=np.bool_))


@numba.njit(nogil=True, cache=True)
def _rank(
    rows: Any,
    shortlist: Any,
    reference: Any,
    is_all: bool,
    found: Any,
    labels: Any,
    logits: Any,
    ranker: Any,
    frequencies: Any,
    coefficients: Any,
    sharpness: float,
    allowed: Any,
    vote_of: Any,
    dense: Any,
    best_BK: Any,
    score_BK: Any,
    begin: int,
    end: int,
) -> None:
    """For the instances begin..end; `vote_of` (L,) and `dense` (F,) are zeros, and left so. With `is_all`, `shortlist`
    is `reference`."""
    row_offsets, feature_ids, values = rows
    near_BN, near_score_BN = found
    query_BD, codes, scales, bias = logits
    short_BS, logit_BS = shortlist
    reference_BS, reference_logit_BS = reference
    k = best_BK.shape[1]
    offsets, score_K = np.zeros(2, dtype=np.int64), np.empty(k)
    for row in range(begin, end):
        one = slice(row, row + 1)
        room = count_votes(near_BN[one], labels[0])
        ids, shares = np.empty(room, dtype=np.int64), np.empty(room)
        num_votes = sum_votes(near_BN[one], near_score_BN[one], sharpness, labels, vote_of, offsets, ids, shares)
        if codes.shape[0]:
            table, voted = (codes, scales), ids[:num_votes]
            insert_logits(query_BD[row], table, bias, voted, reference_BS[row], reference_logit_BS[row])
        if allowed.shape[0]:
            num_votes = _keep(allowed, ids, shares, num_votes)
            offsets[1] = num_votes
        if codes.shape[0] and not is_all:
            insert_logits(query_BD[row], (codes, scales), bias, ids[:num_votes], short_BS[row], logit_BS[row])
        room = short_BS.shape[1] + num_votes
        instance, label_ids = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
        scores, is_behind = np.empty(room), np.empty(room, dtype=np.bool_)
        used = score_candidates(
            (short_BS[one], logit_BS[one]),
            (reference_BS[one], reference_logit_BS[one]),
            (offsets, ids, shares),
            frequencies,
            coefficients,
            vote_of,
            min(k, room),
            (instance, label_ids, scores, is_behind),
        )
        if ranker[3].shape[0]:
            first, last = row_offsets[row], row_offsets[row + 1]
            margins = np.empty(used, dtype=np.float32)
            row_margins(feature_ids[first:last], values[first:last], label_ids[:used], ranker, dense, margins)
            for place in range(used):
                if not is_behind[place]:
                    scores[place] += coefficients[5] * min(max(np.float64(margins[place]), -1.0), 1.0)
        best_BK[row], score_K[:] = -1, -np.inf
        for place in range(used):
            insert_best(best_BK[row], score_K, label_ids[place], scores[place])
        score_BK[row] = score_K


@numba.njit(nogil=True, cache=True)
def _keep(allowed: Any, ids: Any, shares: Any, count: int) -> int:
    """Move what is allowed of the first `count` to the front; returns how many."""
    kept = 0
    for place in range(count):
        if allowed[ids[place]]:
            ids[kept], shares[kept] = ids[place], shares[place]
            kept += 1
    return kept
