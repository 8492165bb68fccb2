"""Claims about `xmc_midx.laststep`: it is what the reference does in pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from reference import interpolate

from xmc_midx.index import ExactIndex, StoredIndex
from xmc_midx.interpolation import Interpolation
from xmc_midx.laststep import LastStep, Scorer
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.quantization import StoredTable, quantize
from xmc_midx.ranker import LinearRanker, Margins
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
        weights.data = 4 * (weights.data - 0.5)
        self.ranker = LinearRanker(weights, rng.normal(size=L).astype(np.float16) / 2)
        self.query = torch.from_numpy(rng.normal(size=(B, 6)).astype(np.float32))
        self.table, self.bias = rng.normal(size=(L, 6)).astype(np.float32), rng.normal(size=L).astype(np.float32)
        self.exact = ExactIndex(torch.from_numpy(self.table), torch.from_numpy(self.bias))
        self.stored = StoredIndex(StoredTable.of(self.table), self.bias)
        self.step = self.step_with(None)

    def step_with(self, source: Any) -> LastStep:
        scorer = Scorer(settings=self.settings, source=source, ranker=self.ranker)
        return LastStep([scorer], self.frequencies, self.neighbors)

    @property
    def queries(self) -> list[np.ndarray]:
        return [self.query.numpy()]

    def votes(self) -> sp.csr_matrix:
        found = self.neighbors.search(self.asked, self.settings.count, budget=self.settings.budget)
        return self.neighbors.votes(*found, self.settings.temperature)

    def expected(self, top: TopK, k: int, votes: sp.csr_matrix, **options: Any) -> TopK:
        def margin_of(instance: np.ndarray, label_ids: np.ndarray) -> Margins:
            return self.ranker.margins(self.asked, instance, label_ids)

        return interpolate(top, votes, self.frequencies, self.settings, k, margin_of=margin_of, **options)


def random_settings(seed: int) -> Interpolation:
    rng = np.random.default_rng(1000 + seed)
    model, mixture, votes, margin, peak = rng.random(5) * (rng.random(5) < 0.7)
    return Interpolation(
        model=model + 0.1,
        mixture=mixture,
        votes=votes,
        frequency=rng.normal() / 3,
        outside=-rng.random(),
        margin=margin,
        peak=peak,
        count=int(rng.integers(1, 9)),
        temperature=0.1,
    )


def same(found: TopK, expected: TopK) -> None:
    """But for the order of labels whose scores differ by rounding alone."""
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    for row in range(len(found.label_ids)):
        for ids in (found.label_ids[row], expected.label_ids[row]):
            assert len(set(ids[ids >= 0].tolist())) == (ids >= 0).sum()
        score_of = dict(zip(expected.label_ids[row].tolist(), expected.scores[row].tolist(), strict=True))
        last = min(expected.scores[row], default=0.0)
        for label, score in zip(found.label_ids[row].tolist(), found.scores[row].tolist(), strict=True):
            assert score_of.get(label, last) == pytest.approx(score, rel=1e-5, abs=1e-6), (row, label)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_interpolation(seed: int) -> None:
    alone = {6: {"margin": 0.0, "peak": 1.5}, 7: {"margin": 1.5, "peak": 0.0}}
    parts = Parts(seed, replace(random_settings(seed), **alone.get(seed, {})))
    top = parts.exact.search(parts.query, 12)
    for k in (1, 5, 12, 40):
        found = parts.step.rank(top, parts.asked, parts.step.find(parts.asked), k, queries=parts.queries)
        same(found, parts.expected(top, k, parts.votes()))
        for row in (0, B - 1):
            mine = slice(row, row + 1)
            asked, query = parts.asked[mine], [parts.queries[0][mine]]
            one = TopK(label_ids=top.label_ids[mine], scores=top.scores[mine])
            alone = parts.step.rank(one, asked, parts.step.find(asked), k, queries=query)
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
    step = parts.step_with(parts.stored.source)
    found = step.rank(missed, parts.asked, step.find(parts.asked), 8, queries=parts.queries)
    np.testing.assert_array_equal(missed.label_ids, ids)
    same(found, parts.expected(completed, 8, votes))


@pytest.mark.parametrize("seed", range(6))
def test_a_choice_of_labels_leaves_the_others_where_they_are(seed: int) -> None:
    parts = Parts(seed, random_settings(seed))
    allowed = np.random.default_rng(seed).random(L) < 0.4
    chosen = torch.from_numpy(np.flatnonzero(allowed))
    reference, top = parts.exact.search(parts.query, 12), parts.exact.search(parts.query, 20, allow=chosen)
    near = parts.step.find(parts.asked)
    options = {"reference": reference, "allowed": allowed, "queries": parts.queries}
    found = parts.step.rank(top, parts.asked, near, 9, **options)  # type: ignore[arg-type]
    votes = parts.votes().multiply(allowed).tocsr()
    same(found, parts.expected(top, 9, votes, reference=reference))
    assert allowed[found.label_ids[found.label_ids >= 0]].all()


def test_without_neighbours_and_ranker_there_are_the_frequencies() -> None:
    settings = Interpolation(frequency=-0.3)
    parts = Parts(7, settings)
    step = LastStep([Scorer(settings=settings, source=None, ranker=None)], parts.frequencies, None)
    top = parts.exact.search(parts.query, 12)
    assert step.find(parts.asked) is None
    found = step.rank(top, parts.asked, None, 4, queries=parts.queries)
    same(found, interpolate(top, None, parts.frequencies, settings, 4))


@pytest.mark.parametrize("storage", ["int4", "float32"])
@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_several_models_rank_by_the_mean_of_their_scores(
    seed: int, chosen: bool, num_models: int, storage: str
) -> None:
    """Written out in dense arrays. Seed 3: nothing is added to the second model; seed 2: few labels are listed."""
    settings = [random_settings(10 * number + seed) for number in range(num_models)]
    if seed == 3:
        settings[1] = Interpolation(count=settings[0].count)
    models = [Parts(seed, one) for one in settings]
    rng = np.random.default_rng(seed)
    for one in models[1:]:
        one.table, one.bias = rng.normal(size=(L, 6)).astype(np.float32), rng.normal(size=L).astype(np.float32)
        one.query = torch.from_numpy(rng.normal(size=(B, 6)).astype(np.float32))
        one.ranker = LinearRanker(one.ranker.weights[rng.permutation(L)], one.ranker.bias)
    for one in models[1:]:
        kept = StoredTable.take(quantize({"t": one.table}, storage, large={"t"}), "t")
        one.stored, one.table = StoredIndex(kept, one.bias), kept.rows()
    first, width = models[0], 12
    allowed = rng.random(L) < 0.5 if chosen else np.ones(L, dtype=bool)
    scorers = [
        Scorer(
            settings=one.settings,
            source=one.stored.source if number else None,
            ranker=one.ranker,
        )
        for number, one in enumerate(models)
    ]
    count = {one.settings.count for one in models if one.settings.needs_neighbors}
    step = LastStep(scorers, first.frequencies, first.neighbors)
    reference = first.exact.search(first.query, width)
    if seed == 2:
        reference.label_ids[::2, 3:], reference.scores[::2, 3:] = -1, -np.inf
    top = (
        first.exact.search(first.query, width, allow=torch.from_numpy(np.flatnonzero(allowed))) if chosen else reference
    )
    near = step.find(first.asked)
    assert (near is not None) == bool(count)
    queries = [one.query.numpy() for one in models]
    options: dict[str, Any] = {"reference": reference, "allowed": allowed} if chosen else {}
    found = step.rank(top, first.asked, near, 5, queries=queries, **options)
    for row in range(B):
        total, voted = np.zeros(L), np.zeros(L, dtype=bool)
        known = reference.label_ids[row][reference.label_ids[row] >= 0]
        for number, one in enumerate(models):
            votes = np.zeros(L)
            if near is not None:
                mine = near[0][row : row + 1], near[1][row : row + 1]
                votes = first.neighbors.votes(*mine, one.settings.temperature).toarray()[0]
                voted |= votes > 0
            logits = (one.query[row].numpy() @ one.table.T + one.bias).astype(np.float64)
            shift, least = np.log(np.exp(logits[known]).sum()), logits[known].min()
            inside = np.isin(np.arange(L), known) if number == 0 else logits >= least
            # The logits of a model to which nothing is added stay what they are.
            shift = 0.0 if one.settings.is_identity and one.settings.model == 1.0 else shift
            log_p = np.where(inside, logits - shift, least - shift - 1.0)
            margins, peaks = one.ranker.margins(first.asked[row], np.zeros(L, dtype=np.int64), np.arange(L))
            s = one.settings
            total += (
                s.model * log_p
                + s.mixture * np.log(np.exp(log_p) + votes + 1e-300)
                + s.votes * np.log(votes + 1e-3)
                + s.frequency * np.log1p(one.frequencies)
                + s.outside * ~inside
                + s.margin * np.clip(margins, -1, 1)
                + s.peak * np.log1p(np.minimum(peaks, 1) / 0.03)
            ) / num_models
        candidates = (np.isin(np.arange(L), known) | voted) & allowed
        expected = np.argsort(np.where(candidates, -total, np.inf), kind="stable")[: min(5, candidates.sum())]
        mine_ids = found.label_ids[row, : len(expected)]
        np.testing.assert_allclose(found.scores[row, : len(expected)], total[expected], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(total[mine_ids], total[expected], atol=1e-4)
        # Those behind come in the order of the first model's logits.
        behind = [label for label in top.label_ids[row].tolist() if label >= 0 and not candidates[label]]
        assert found.label_ids[row, len(expected) :].tolist() == (behind + [-1] * 5)[: 5 - len(expected)]


def test_parts_that_do_not_fit_are_refused() -> None:
    parts = Parts(0, random_settings(0))
    scorer = Scorer(settings=parts.settings, source=None, ranker=parts.ranker)
    further = Scorer(settings=parts.settings, source=parts.stored.source, ranker=parts.ranker)
    LastStep([scorer, further], parts.frequencies, parts.neighbors)
    with pytest.raises(ValueError, match="votes come"):
        LastStep([Scorer(settings=Interpolation(votes=1.0), source=None, ranker=None)], parts.frequencies, None)
    for alone in (Interpolation(margin=1.0), Interpolation(peak=1.0)):
        with pytest.raises(ValueError, match="a margin comes"):
            LastStep([Scorer(settings=alone, source=None, ranker=None)], parts.frequencies, None)
    with pytest.raises(ValueError, match="by its table"):
        LastStep([scorer, scorer], parts.frequencies, parts.neighbors)
    with pytest.raises(ValueError, match=r"parts of \[69, 70\] labels"):
        LastStep([scorer], parts.frequencies[1:], parts.neighbors)
    other = LinearRanker(parts.ranker.weights[:, :-1], parts.ranker.bias)
    with pytest.raises(ValueError, match=r"\[39, 40\] features"):
        LastStep([Scorer(settings=parts.settings, source=None, ranker=other)], parts.frequencies, parts.neighbors)
    with pytest.raises(AssertionError, match="the same features"):
        top = parts.exact.search(parts.query, 3)
        parts.step.rank(top, sp.csr_matrix((B, F + 1), dtype=np.float32), None, 2, queries=parts.queries)
