"""Claims about `xmc_midx.laststep`: it is what `xmc_midx.interpolation` does in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from xmc_midx.index import ExactIndex, StoredIndex
from xmc_midx.interpolation import Interpolation, interpolate
from xmc_midx.laststep import LastStep
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.quantization import StoredTable
from xmc_midx.ranker import LinearRanker
from xmc_midx.types import TopK

L, F, N, B = 70, 40, 90, 37


class Parts:
    """A random model with neighbours and ranker, its queries, and what is expected of it."""

    def __init__(self, seed: int, settings: Interpolation) -> None:
        rng = np.random.default_rng(seed)
        self.settings, self.frequencies = settings, rng.integers(0, 40, L)

        def rows(count: int, width: int, share: float) -> sp.csr_matrix:
            return sp.csr_matrix(rng.random((count, width)) * (rng.random((count, width)) < share), dtype=np.float32)

        self.known, self.asked = rows(N, F, 0.2), rows(B, F, 0.2)
        self.neighbors = NeighborIndex(self.known, rows(N, L, 0.1))
        weights = rows(L, F, 0.3)
        weights.data -= 0.5
        self.ranker = LinearRanker(weights, rng.normal(size=L).astype(np.float16) / 2)
        self.query = torch.from_numpy(rng.normal(size=(B, 6)).astype(np.float32))
        self.table, self.bias = rng.normal(size=(L, 6)).astype(np.float32), rng.normal(size=L).astype(np.float32)
        self.exact = ExactIndex(torch.from_numpy(self.table), torch.from_numpy(self.bias))
        self.stored = StoredIndex(StoredTable.of(self.table), self.bias)
        self.step = LastStep(settings, self.frequencies, self.neighbors, self.ranker)

    def votes(self) -> sp.csr_matrix:
        found = self.neighbors.search(self.asked, self.settings.count, budget=self.settings.budget)
        return self.neighbors.votes(*found, self.settings.temperature)

    def expected(self, top: TopK, k: int, votes: sp.csr_matrix, **options: Any) -> TopK:
        def margin_of(instance: np.ndarray, label_ids: np.ndarray) -> np.ndarray:
            return self.ranker.margins(self.asked, instance, label_ids)

        return interpolate(top, votes, self.frequencies, self.settings, k, margin_of=margin_of, **options)


def random_settings(seed: int) -> Interpolation:
    rng = np.random.default_rng(1000 + seed)
    model, mixture, votes, margin = rng.random(4) * (rng.random(4) < 0.7)
    return Interpolation(
        model=model + 0.1,
        mixture=mixture,
        votes=votes,
        frequency=rng.normal() / 3,
        outside=-rng.random(),
        margin=margin,
        count=int(rng.integers(1, 9)),
        temperature=0.1,
    )


def same(found: TopK, expected: TopK) -> None:
    np.testing.assert_array_equal(found.label_ids, expected.label_ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_interpolation(seed: int) -> None:
    parts = Parts(seed, random_settings(seed))
    top = parts.exact.search(parts.query, 12)
    for k in (1, 5, 12, 40):
        found = parts.step.rank(top, parts.asked, parts.step.find(parts.asked), k)
        same(found, parts.expected(top, k, parts.votes()))
        for row in (0, B - 1):
            mine = slice(row, row + 1)
            alone = parts.step.rank(top.rows(mine), parts.asked[mine], parts.step.find(parts.asked[mine]), k)
            np.testing.assert_array_equal(alone.label_ids[0], found.label_ids[row])
            np.testing.assert_array_equal(alone.scores[0], found.scores[row])


@pytest.mark.parametrize("seed", range(6))
def test_what_the_neighbours_vote_for_and_a_search_missed_gets_its_logit(seed: int) -> None:
    parts = Parts(seed, random_settings(seed))
    votes, whole = parts.votes(), parts.exact.search(parts.query, L)
    if not parts.settings.needs_neighbors:
        votes = sp.csr_matrix((B, L))
    # Of twelve, each third is missed.
    missed = TopK(label_ids=whole.label_ids[:, :36:3].copy(), scores=whole.scores[:, :36:3].copy())
    ids, scores = missed.label_ids.copy(), missed.scores.copy()
    for row in range(B):
        known = set(ids[row]) | set(votes[row].indices)
        kept = np.isin(whole.label_ids[row], [*known])
        ids[row], scores[row] = whole.label_ids[row, kept][:12], whole.scores[row, kept][:12]
    completed = TopK(label_ids=ids, scores=scores)
    logits = parts.stored.logits(parts.query)
    near = parts.step.find(parts.asked)
    found = parts.step.rank(missed, parts.asked, near, 8, logits=logits)
    np.testing.assert_array_equal(missed.label_ids, ids)
    same(found, parts.expected(completed, 8, votes))


@pytest.mark.parametrize("seed", range(6))
def test_a_choice_of_labels_leaves_the_others_where_they_are(seed: int) -> None:
    parts = Parts(seed, random_settings(seed))
    allowed = np.random.default_rng(seed).random(L) < 0.4
    chosen = torch.from_numpy(np.flatnonzero(allowed))
    reference, top = parts.exact.search(parts.query, 12), parts.exact.search(parts.query, 20, allow=chosen)
    near = parts.step.find(parts.asked)
    found = parts.step.rank(top, parts.asked, near, 9, reference=reference, allowed=allowed)
    votes = parts.votes().multiply(allowed).tocsr()
    same(found, parts.expected(top, 9, votes, reference=reference))
    assert allowed[found.label_ids[found.label_ids >= 0]].all()


def test_without_neighbours_and_ranker_there_are_the_frequencies() -> None:
    settings = Interpolation(frequency=-0.3)
    parts = Parts(7, settings)
    step = LastStep(settings, parts.frequencies, None, None)
    top = parts.exact.search(parts.query, 12)
    assert step.find(parts.asked) is None
    same(step.rank(top, parts.asked, None, 4), interpolate(top, None, parts.frequencies, settings, 4))
