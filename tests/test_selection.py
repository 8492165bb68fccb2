"""Claims about `xmc_midx.selection`: the best of many, by falling score, ties to the smaller id."""

from __future__ import annotations

import numpy as np
import pytest

from xmc_midx.selection import insert_best, keep_best, least_of_best, write_best


def reference(ids: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    return np.lexsort((ids, -scores))[:k]


def empty(k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(k, -1, dtype=np.int64), np.full(k, -np.inf, dtype=np.float32)


@pytest.mark.parametrize(("count", "k"), [(0, 3), (1, 1), (2, 5), (37, 5), (1000, 100), (5000, 7)])
@pytest.mark.parametrize("kind", ["normal", "ties", "wide", "equal"])
def test_the_best_are_written_and_inserted_in_order(count: int, k: int, kind: str) -> None:
    rng = np.random.default_rng(count + k)
    ids = rng.permutation(np.arange(0, 3 * count, 3)).astype(np.int32)
    scores = rng.normal(size=count).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)  # zeros of both signs among them
    elif kind == "wide":
        scores *= np.float32(10.0) ** rng.integers(-30, 30, count).astype(np.float32)
    elif kind == "equal":
        scores[:] = -2.5
    best = reference(ids, scores, k)
    inserted, written = empty(k), empty(k)
    for place in range(count):
        insert_best(*inserted, ids[place], scores[place])
    write_best(ids.copy(), scores.copy(), count, *written)
    for found_K, score_K in (inserted, written):
        np.testing.assert_array_equal(found_K[: len(best)], ids[best])
        np.testing.assert_array_equal(score_K[: len(best)], scores[best])
        assert (found_K[len(best) :] == -1).all() and np.isneginf(score_K[len(best) :]).all()


def test_none_of_the_best_is_lost_and_few_others_stay() -> None:
    rng = np.random.default_rng(5)
    scores = rng.normal(size=3000).astype(np.float32)
    ids, kept = np.arange(3000), scores.copy()
    count = keep_best(ids, kept, 3000, 200)
    assert 200 <= count <= 260
    assert set(reference(np.arange(3000), scores, 200)) <= set(ids[:count])
    np.testing.assert_array_equal(kept[:count], scores[ids[:count]])
    assert (np.diff(ids[:count]) > 0).all()
    assert keep_best(np.arange(3000), scores.copy(), 3000, 3000) == 3000


def test_weights_count_and_odd_scores_keep_all_or_nothing() -> None:
    values, weights = np.array([3, 2, 1, 0], dtype=np.float32), np.array([1, 5, 1, 9], dtype=np.int32)
    assert 1 < least_of_best(values, weights, 4, 16) <= 2
    nothing = np.empty(0, dtype=np.int32)
    for odd in ([1.0, np.inf, 2.0], [4.0, 4.0, 4.0], []):
        assert least_of_best(np.array(odd, dtype=np.float32), nothing, 1, 3) == -np.inf


@pytest.mark.parametrize("best", ["sampled", "between", "nan", "infinite", "equal"])
@pytest.mark.parametrize("wanted", [1, 7, 100])
def test_a_sample_of_the_scores_loses_none_of_the_best(best: str, wanted: int) -> None:
    """Every eighth score is looked at first: all of the best are among them, or none, or they are no numbers."""
    rng = np.random.default_rng(wanted)
    scores = rng.normal(size=2000).astype(np.float32)
    places = np.arange(2000)
    if best == "sampled":
        scores[places % 8 == 0] += 20
    elif best == "between":
        scores[places % 8 == 3] += 20
    elif best == "nan":
        scores[places % 8 == 0] = np.nan
    elif best == "infinite":
        scores[::16] = np.inf
    else:
        scores[:] = 1.5
    kept = scores.copy()
    ids = places.astype(np.int32)
    count = keep_best(ids, kept, 2000, wanted)
    assert (np.diff(ids[:count]) > 0).all() and np.array_equal(kept[:count], scores[ids[:count]])
    real = np.where(np.isnan(scores), -np.inf, scores)
    least = np.sort(real)[::-1][wanted - 1]
    assert set(np.flatnonzero(real > least)) <= set(ids[:count].tolist()) and count >= wanted
