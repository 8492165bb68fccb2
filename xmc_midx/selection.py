"""Layer 1. Which of many scores are the best, inside compiled code: falling scores, ties to the smaller id."""

from __future__ import annotations

from typing import Any

import numpy as np

from xmc_midx.compiled import compiled

__all__ = ["insert_best", "keep_best", "least_of_best", "write_best"]

_BINS = 1024
_EVERY = 8
"""Of many scores, every eighth says first which are far from the best."""


@compiled
def least_of_best(values: Any, weights: Any, wanted: Any, total: Any) -> Any:
    """A value that entries of about `wanted` of the `total` weight reach, never less, by a histogram; without weights
    each counts 1."""
    count = values.shape[0]
    low = high = values[0] if count else np.float32(0.0)
    for index in range(count):
        low, high = min(low, values[index]), max(high, values[index])
    if wanted >= total or not 0.0 < high - low < np.inf:
        return np.float32(-np.inf)
    counts = np.zeros(_BINS + 1, dtype=np.int64)
    scale = np.float32(_BINS) / (high - low)
    for index in range(count):
        # Scores that are not finite have no bin of their own.
        bin_ = min(max(int((values[index] - low) * scale), 0), _BINS)
        counts[bin_] += weights[index] if weights.shape[0] else 1
    bin_, reached = _BINS, counts[_BINS]
    while reached < wanted and bin_ > 0:
        bin_ -= 1
        reached += counts[bin_]
    # One bin less, for the rounding of the division.
    return low + np.float32(bin_ - 1) / scale


@compiled
def keep_best(ids: Any, scores: Any, count: int, wanted: int) -> int:
    """Of the first `count` ids and float32 scores, move those to the front that are among the `wanted` best, or little
    below; returns how many. Their order stays."""
    nothing = np.empty(0, dtype=np.int32)
    if _EVERY * wanted < count:
        sample = scores[:count:_EVERY].copy()
        # Half as many again, so that seldom too few are left.
        least = least_of_best(sample, nothing, 3 * wanted // (2 * _EVERY) + 4, sample.shape[0])
        if (scores[:count] >= least).sum() >= wanted:
            count = _keep(ids, scores, count, least)
    return _keep(ids, scores, count, least_of_best(scores[:count], nothing, wanted, count))


@compiled
def _keep(ids: Any, scores: Any, count: int, least: Any) -> int:
    kept = 0
    for place in range(count):
        # No branch: the processor would guess wrong.
        is_kept = scores[place] >= least
        ids[kept], scores[kept] = ids[place], scores[place]
        kept += is_kept
    return kept


@compiled
def write_best(ids: Any, scores: Any, count: int, found_K: Any, score_K: Any) -> None:
    """The K best of the first `count` distinct ids (below 2^32) and float32 scores, in order, into `found_K` and
    `score_K`; places beyond `count` stay. What is in `ids` and `scores` is lost.

    A key is sorted instead of two arrays: the score's bits, turned so that they fall with the score, above the id.
    """
    count = keep_best(ids, scores, count, found_K.shape[0])
    keys = np.empty(count, dtype=np.uint64)
    sign = np.uint32(1 << 31)
    for place in range(count):
        # No negative zero: it would come behind the positive one.
        scores[place] += np.float32(0.0)
    bits = scores[:count].view(np.uint32)
    for place in range(count):
        falling = bits[place] if bits[place] & sign else ~(bits[place] | sign)
        keys[place] = np.uint64(np.uint32(falling)) << np.uint64(32) | np.uint64(ids[place])
    keys.sort()
    written = score_K.view(np.uint32)
    for place in range(min(count, found_K.shape[0])):
        found_K[place] = keys[place] & np.uint64(0xFFFFFFFF)
        falling = np.uint32(keys[place] >> np.uint64(32))
        written[place] = falling if falling & sign else ~falling & ~sign


@compiled
def insert_best(found_K: Any, score_K: Any, row: int, score: Any) -> None:
    """Keep an id if it is one of the K best, -1 in free places: for a few out of many, one after the other."""
    count = found_K.shape[0]
    place = count
    # From the end: after the first ones nearly every candidate loses to the last place at once.
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
