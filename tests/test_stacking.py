"""Claims about `xmc_midx.stacking`: the minimum of the loss, and what is chosen on held-out instances."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from reference import interpolate
from test_interpolation import FREQUENCIES, random_margins, shortlist_of

from xmc_midx import stacking
from xmc_midx.interpolation import Coefficients, Interpolation
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.ranker import Margins
from xmc_midx.stacking import fit_interpolation
from xmc_midx.types import TopK


def fit(shortlist: TopK, rows: sp.csr_matrix, labels: sp.csr_matrix, queries: sp.csr_matrix, truth: sp.csr_matrix):  # type: ignore[no-untyped-def]
    index = NeighborIndex(rows, labels)
    frequencies = np.bincount(labels.indices, minlength=labels.shape[1])
    return fit_interpolation(shortlist, index, index.search(queries, 5), truth, frequencies, labels.shape[0])


def test_neighbours_that_know_the_answer_get_weight_and_useless_ones_none() -> None:
    rng = np.random.default_rng(4)
    num_labels, num_rows = 30, 300
    classes = rng.integers(num_labels, size=num_rows)
    rows = sp.csr_matrix(np.eye(num_labels, dtype=np.float32)[classes])
    labels = sp.csr_matrix(np.eye(num_labels, dtype=np.float32)[classes])
    wrong = shortlist_of(rng.normal(size=(num_rows, num_labels)))
    chosen = fit(wrong, rows, labels, rows, labels)
    assert chosen.needs_neighbors and chosen.mixture + chosen.votes > 0.5
    right = shortlist_of(20.0 * labels.toarray())
    assert not fit(right, rows, labels[rng.permutation(num_rows)], rows, labels).needs_neighbors


def test_more_votes_never_lower_a_score() -> None:
    # Neighbours that always vote for a wrong label: a free fit would hold their votes against it.
    rng = np.random.default_rng(5)
    labels = sp.csr_matrix(np.eye(6, dtype=np.float32)[rng.integers(6, size=200)])
    shortlist = shortlist_of(rng.normal(size=(200, 6)) + 1.5 * labels.toarray())
    rows = sp.csr_matrix(labels)
    chosen = fit(shortlist, rows, sp.csr_matrix(np.roll(labels.toarray(), 1, axis=1)), rows, labels)
    assert min(chosen.model, chosen.mixture, chosen.votes) >= 0.0
    assert not chosen.needs_neighbors


def test_a_frequency_term_that_gains_psp_at_the_price_of_p_is_not_chosen() -> None:
    # The head label 0 is right three times in five, the tail label 1 twice; the logits prefer the head by one nat.
    truth = np.zeros((500, 2), dtype=np.float32)
    truth[:300, 0] = truth[300:, 1] = 1.0
    frequencies = np.array([5000, 2])
    shortlist = shortlist_of(np.tile([1.0, 0.0], (500, 1)))
    chosen = fit_interpolation(shortlist, None, None, sp.csr_matrix(truth), frequencies, 5002)
    assert interpolate(shortlist, None, frequencies, chosen, 1).label_ids[0, 0] == 0


def test_logits_that_overrate_the_head_are_corrected() -> None:
    rng = np.random.default_rng(6)
    frequencies = np.array([20000, 2000, 200, 20, 2])
    truth = np.eye(5, dtype=np.float32)[rng.integers(5, size=800)]
    logits = rng.normal(size=(800, 5)) + 2.0 * truth + 0.6 * np.log(frequencies + 1.0)
    chosen = fit_interpolation(shortlist_of(logits), None, None, sp.csr_matrix(truth), frequencies, 22222)
    assert -1.2 < chosen.frequency < -0.4


def test_the_fit_is_a_minimum_of_the_loss() -> None:
    """Against the loss written out instance by instance, in float64."""
    rng = np.random.default_rng(7)
    num_rows = 60
    truth = (rng.random((num_rows, 5)) < 0.4).astype(np.float32)
    shortlist = shortlist_of(rng.normal(size=(num_rows, 5)) + truth)
    labels, votes = sp.csr_matrix(truth), sp.csr_matrix(rng.random((num_rows, 5)) * truth)
    known = Margins(*(values + 0.3 * truth for values in random_margins(rng, num_rows, 5)))
    candidates = stacking._candidates(
        shortlist, votes, FREQUENCIES, lambda row, label: Margins(*(values[row, label] for values in known))
    )
    weight_L = np.linspace(1.0, 2.0, 5)
    fitted = np.array(stacking._fit(candidates, labels, weight_L, Coefficients._fields))
    scale = np.where(candidates.terms.std(0) > 0, candidates.terms.std(0), 1.0)
    start = np.array([1.0, 0, 0, 0, 0, 0, 0])
    pulled = [0, 1, 2, 3, 5, 6]  # no label is outside the shortlist

    def loss(coefficients: np.ndarray) -> float:
        scores = (candidates.terms @ coefficients).reshape(num_rows, 5)
        total = weight = 0.0
        for row in range(num_rows):
            positives = np.flatnonzero(truth[row])
            negatives = np.flatnonzero(truth[row] == 0)
            for label in positives:
                share = weight_L[label] / len(positives)
                rest = np.log(np.exp(scores[row, negatives]).sum()) if len(negatives) else -np.inf
                total += share * np.logaddexp(0.0, rest - scores[row, label])
                weight += share
        return num_rows * total / weight + 3.0 * float((((coefficients - start) * scale) ** 2)[pulled].sum())

    least = loss(fitted)
    assert least < loss(start)
    for step in 0.01 * np.vstack([np.eye(7)[pulled], -np.eye(7)[pulled]]):
        moved = fitted + step
        if (moved[[0, 1, 2, 5, 6]] >= 0).all():
            assert loss(moved) >= least - 1e-9


@pytest.mark.parametrize("place", [0, 1])
def test_a_ranker_that_knows_the_answer_gets_weight_and_a_useless_one_none(place: int) -> None:
    """By its margins or by its peaks."""
    rng = np.random.default_rng(8)
    truth = np.eye(20, dtype=np.float32)[rng.integers(20, size=1200)]
    frequencies = np.full(20, 60)
    for knows in (1.0, 0.0):
        known = [rng.normal(size=(1200, 20)).clip(-1, 1) * 0.5, rng.random((1200, 20)) * 0.5]
        known[place] += knows * truth
        shortlist = shortlist_of(rng.normal(size=(1200, 20)) + (1.0 if knows else 9.0) * truth)
        chosen = fit_interpolation(
            shortlist,
            None,
            None,
            sp.csr_matrix(truth),
            frequencies,
            1200,
            margin_of=lambda row, label, known=known: Margins(*(values[row, label] for values in known)),
        )
        assert chosen.needs_ranker == bool(knows) and not chosen.needs_neighbors
        if knows:
            assert (chosen.margin, chosen.peak)[place] > 0.3


def test_p_is_never_paid_for_psp_where_another_fit_has_more_of_it() -> None:
    """The head label is right more often where the model says nothing; only the unweighted fit knows it."""
    rng = np.random.default_rng(10)
    frequencies = np.array([4000, 4])
    classes = (rng.random(4000) < 0.4).astype(int)
    truth = np.eye(2, dtype=np.float32)[classes]
    logits = np.where(rng.random((4000, 1)) < 0.3, 2.0 * truth, [[-0.5, 0.5]])
    labels = sp.csr_matrix(truth)
    shortlist = shortlist_of(logits)
    chosen = fit_interpolation(shortlist, None, None, labels, frequencies, 4004)
    top = interpolate(shortlist, None, frequencies, chosen, 1)
    best = max(
        (top_of.label_ids[:, 0] == classes).mean()
        for top_of in (
            interpolate(shortlist, None, frequencies, Interpolation(frequency=f), 1) for f in np.linspace(-1, 1, 41)
        )
    )
    assert (top.label_ids[:, 0] == classes).mean() > best - 0.01


@pytest.mark.parametrize(
    ("quarter", "nothing", "chosen"),
    [(0.0, 0.0, 0.5), (0.8, 0.8, 0.5), (1.5, 1.5, 0.25), (0.0, 1.5, 0.5), (0.0, 2.1, 0.0), (1.5, 3.8, 0.0)],
)
def test_the_tail_is_weighed_less_where_p_is_better_by_more_than_chance(
    quarter: float, nothing: float, chosen: float
) -> None:
    """A quarter by one standard error, nothing by two."""
    spread = np.tile([0.9, -0.9], 200)
    error = spread.std() / np.sqrt(len(spread))
    trials = []
    for power, errors in ((0.5, 0.0), (0.25, quarter), (0.0, nothing)):
        scores = (spread * (errors > 0) + errors * error, np.zeros(400))
        trials.append((power, (Interpolation(), scores)))
    assert stacking._highest_power(trials)[0] == chosen


def test_two_standard_errors_add_nothing() -> None:
    spread = np.tile([0.9, -0.9], 200)
    error = spread.std() / np.sqrt(len(spread))
    for errors, alone in ((1.9, False), (2.1, True)):
        gain = spread + errors * error
        scores, reference = (gain, gain), (np.zeros(400), np.zeros(400))
        assert stacking._p_is_higher(scores, reference, stacking._STANDARD_ERRORS_ALONE) is alone


def test_of_many_votes_the_largest_take_part_in_the_fit() -> None:
    rng = np.random.default_rng(11)
    dense = rng.permuted(np.tile(np.arange(1.0, 701.0), (4, 1)), axis=1)
    dense[1, rng.permutation(700)[:500]] = 0.0
    dense[2] = 0.0
    dense[3] = 1.0
    kept = stacking._most_voted(sp.csr_matrix(dense)).toarray()
    assert (kept[kept > 0] == dense[kept > 0]).all()
    assert sorted(kept[0][kept[0] > 0]) == list(range(401, 701))
    np.testing.assert_array_equal(kept[1:3], dense[1:3])
    assert np.flatnonzero(kept[3]).tolist() == list(range(300)), "of equal votes the smaller labels"
