"""Claims about `xmc_midx.interpolation`: the formula, the choice on held-out instances, forbidden labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from xmc_midx import interpolation
from xmc_midx.data.features import normalize_rows
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import DataError
from xmc_midx.index import ExactIndex
from xmc_midx.interpolation import Interpolation, fit_interpolation, interpolate
from xmc_midx.metrics import evaluate_topk, instance_scores
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.predictor import Predictor
from xmc_midx.ranker import Margins
from xmc_midx.topk import exact_topk
from xmc_midx.types import TopK

FREQUENCIES = np.array([50, 3, 7, 0, 1])


def shortlist_of(logits: np.ndarray) -> TopK:
    order = np.argsort(-logits, axis=1, kind="stable")
    return TopK(label_ids=order.astype(np.int64), scores=np.take_along_axis(logits, order, 1).astype(np.float32))


def no_margin(instance: np.ndarray, label_ids: np.ndarray) -> Margins:
    return Margins(*np.zeros((2, len(label_ids)), dtype=np.float32))


def formula(
    log_p: np.ndarray, votes: np.ndarray, outside: np.ndarray, settings: Interpolation, known: Margins
) -> np.ndarray:
    """The head of the module, over all labels."""
    return (
        settings.model * log_p
        + settings.mixture * np.log(np.exp(log_p) + votes)
        + settings.votes * np.log(votes + 1e-3)
        + settings.frequency * np.log(FREQUENCIES + 1.0)
        + settings.outside * outside
        + settings.margin * np.clip(known.margins, -1, 1)
        + settings.peak * np.log(1 + np.minimum(known.peaks, 1) / 0.03)
    )


SETTINGS = Interpolation(model=0.9, mixture=0.4, votes=0.7, frequency=-0.3, outside=-0.6, margin=0.8, peak=0.5)


def random_margins(rng: np.random.Generator, *shape: int) -> Margins:
    """A third of the margins are beyond -1..1, some of the peaks are nothing and some beyond 1."""
    margins = rng.normal(size=shape).astype(np.float32)
    return Margins(margins, np.maximum(rng.normal(size=shape), 0).astype(np.float32))


MARGINS = random_margins(np.random.default_rng(9), 4, 5)
"""Of the ranker, for four instances."""


def margin_of(instance: np.ndarray, label_ids: np.ndarray) -> Margins:
    assert (np.diff(instance) >= 0).all(), "as the ranker asks"
    return Margins(*(known[instance, label_ids] for known in MARGINS))


def test_the_score_is_the_formula() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 5)) * 2
    votes = sp.random(4, 5, 0.5, format="csr", random_state=np.random.default_rng(1))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = formula(log_p, votes.toarray(), np.zeros((4, 5)), SETTINGS, MARGINS)
    top = interpolate(shortlist_of(logits), sp.csr_matrix(votes), FREQUENCIES, SETTINGS, 5, margin_of=margin_of)
    np.testing.assert_array_equal(top.label_ids, np.argsort(-scores, axis=1, kind="stable"))
    np.testing.assert_allclose(top.scores, -np.sort(-scores), rtol=1e-5)


def test_a_label_outside_the_shortlist_has_an_eth_of_its_smallest_probability() -> None:
    shortlist = TopK(label_ids=np.array([[2, 0, -1]]), scores=np.array([[1.0, 0.5, -np.inf]], dtype=np.float32))
    votes = sp.csr_matrix(np.array([[0.0, 0.9, 0.1, 0.0, 0.0]]))
    top = interpolate(shortlist, votes, FREQUENCIES, SETTINGS, 4, margin_of=margin_of)
    p = np.exp([1.0, 0.5]) / np.exp([1.0, 0.5]).sum()
    log_p = np.log([p[1], p[1] / np.e, p[0], 1.0, 1.0])
    known = Margins(MARGINS.margins[0], MARGINS.peaks[0])
    scores = formula(log_p, votes.toarray()[0], np.array([0, 1, 0, 0, 0]), SETTINGS, known)
    expected = sorted([0, 1, 2], key=lambda label: -scores[label])
    assert top.label_ids.tolist() == [[*expected, -1]]
    np.testing.assert_allclose(top.scores[0, :3], scores[expected], rtol=1e-5)


def test_a_peak_alone_needs_the_ranker_and_can_put_a_label_before_all_others() -> None:
    settings = Interpolation(peak=2.0)
    assert settings.needs_ranker and not settings.is_identity and not settings.needs_neighbors
    assert settings.margin_span == pytest.approx(2.0 * np.log(1 + 1 / 0.03))
    # The last label's logit is less by nearly what a peak can add.
    logits = np.array([[0.0, -0.1, -0.2, -0.3, 0.1 - settings.margin_span]])
    known = Margins(np.zeros((1, 5), dtype=np.float32), np.array([[0, 0, 0, 0, 7.0]], dtype=np.float32))
    top = interpolate(
        shortlist_of(logits),
        None,
        FREQUENCIES,
        settings,
        1,
        margin_of=lambda row, label: Margins(*(values[row, label] for values in known)),
    )
    assert top.label_ids.tolist() == [[4]]


def test_an_instance_without_shortlist_and_votes_has_no_result() -> None:
    shortlist = TopK(label_ids=np.array([[-1], [3]]), scores=np.array([[-np.inf], [0.0]], dtype=np.float32))
    top = interpolate(shortlist, sp.csr_matrix((2, 5)), FREQUENCIES, SETTINGS, 2, margin_of=margin_of)
    assert top.label_ids.tolist() == [[-1, -1], [3, -1]]
    assert np.isneginf(top.scores[0]).all()


def test_by_default_the_ranking_is_the_models() -> None:
    logits = np.random.default_rng(2).normal(size=(6, 5))
    top = interpolate(shortlist_of(logits), None, FREQUENCIES, Interpolation(), 3)
    np.testing.assert_array_equal(top.label_ids, shortlist_of(logits).label_ids[:, :3])


def test_the_instance_scores_average_to_the_report() -> None:
    rng = np.random.default_rng(3)
    labels = sp.csr_matrix((rng.random((40, 5)) < 0.3).astype(np.float32))
    top = shortlist_of(rng.normal(size=(40, 5)))
    report = evaluate_topk(top, labels, label_frequencies=FREQUENCIES, num_train=60)
    for scores, family in zip(instance_scores(top, labels, FREQUENCIES, 60), ("P", "PSP"), strict=True):
        mean = np.mean([report.metrics[f"{family}@{k}"] for k in (1, 3, 5)])
        assert scores.mean() == pytest.approx(mean, rel=1e-9)


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


@pytest.mark.parametrize("frequency", [-0.4, 0.3])
@pytest.mark.parametrize("is_voted", [True, False])
def test_the_first_results_do_not_depend_on_how_many_are_asked_for(frequency: float, is_voted: bool) -> None:
    rng = np.random.default_rng(15)
    num_rows, num_labels, listed = 20, 300, 100
    settings = replace(SETTINGS, frequency=frequency)
    frequencies = np.where(rng.random(num_labels) < 0.5, 0, rng.integers(1, 10**6, num_labels))
    known = random_margins(rng, num_rows, num_labels)
    votes = sp.csr_matrix(rng.random((num_rows, num_labels)) * (rng.random((num_rows, num_labels)) < 0.05) * is_voted)
    full = shortlist_of(rng.normal(size=(num_rows, num_labels)) / 2)
    reference = TopK(label_ids=full.label_ids[:, :listed], scores=full.scores[:, :listed])

    def margin_of(instance: np.ndarray, label_ids: np.ndarray) -> Margins:
        return Margins(*(values[instance, label_ids] for values in known))

    def ranked(top: TopK, k: int) -> TopK:
        return interpolate(top, votes, frequencies, settings, k, margin_of=margin_of, reference=reference)

    few, all_of_them = ranked(reference, listed), ranked(full, num_labels)
    np.testing.assert_array_equal(all_of_them.label_ids[:, :listed], few.label_ids)
    np.testing.assert_array_equal(all_of_them.scores[:, :listed], few.scores)
    assert (np.sort(all_of_them.label_ids, axis=1) == np.arange(num_labels)).all()
    for row in range(num_rows):
        scored = set(reference.label_ids[row]) | set(votes[row].indices)
        behind = [label for label in full.label_ids[row].tolist() if label not in scored]
        assert all_of_them.label_ids[row, len(scored) :].tolist() == behind, "the rest as the model ranks them"
    assert (np.diff(all_of_them.scores) <= 0).all() and np.isfinite(all_of_them.scores).all()


def test_ties_at_the_end_of_the_shortlist_do_not_depend_on_how_many_are_asked_for() -> None:
    rng = np.random.default_rng(16)
    num_labels, listed = 300, 100
    settings = replace(SETTINGS, outside=-3.0)
    frequencies = rng.integers(1, 9, num_labels)
    votes = sp.csr_matrix(rng.random((20, num_labels)) * (rng.random((20, num_labels)) < 0.3))
    full = shortlist_of(rng.integers(0, 4, (20, num_labels)) / 4.0)
    reference = TopK(label_ids=full.label_ids[:, :listed], scores=full.scores[:, :listed])
    few, more = (
        interpolate(top, votes, frequencies, settings, 20, margin_of=no_margin, reference=reference)
        for top in (reference, full)
    )
    np.testing.assert_array_equal(few.label_ids, more.label_ids)
    np.testing.assert_array_equal(few.scores, more.scores)


def test_a_choice_of_labels_filters_the_ranking_of_all() -> None:
    rng = np.random.default_rng(14)
    num_labels = 60
    frequencies = rng.integers(1, 40, num_labels)
    logits = rng.normal(size=(25, num_labels)) * 3
    votes = sp.csr_matrix(rng.random((25, num_labels)) * (rng.random((25, num_labels)) < 0.2))
    full = shortlist_of(logits)
    reference = TopK(label_ids=full.label_ids[:, :20], scores=full.scores[:, :20])
    ranked = interpolate(reference, votes, frequencies, SETTINGS, 30, margin_of=no_margin)
    allowed = rng.choice(num_labels, 25, replace=False)
    kept = np.where(np.isin(np.arange(num_labels), allowed), logits, -np.inf)
    chosen = shortlist_of(kept)
    chosen = TopK(
        label_ids=np.where(np.isneginf(chosen.scores), -1, chosen.label_ids)[:, :20], scores=chosen.scores[:, :20]
    )
    allowed_votes = votes.multiply(np.isin(np.arange(num_labels), allowed)).tocsr()
    found = interpolate(chosen, allowed_votes, frequencies, SETTINGS, 3, margin_of=no_margin, reference=reference)
    for row in range(25):
        score = dict(zip(ranked.label_ids[row].tolist(), ranked.scores[row].tolist(), strict=True))
        for label, value in zip(found.label_ids[row].tolist(), found.scores[row].tolist(), strict=True):
            if label in set(reference.label_ids[row].tolist()):
                assert value == pytest.approx(score[label], rel=1e-5), "what it has among all labels"


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
    candidates = interpolation._candidates(
        shortlist, votes, FREQUENCIES, lambda row, label: Margins(*(values[row, label] for values in known))
    )
    weight_L = np.linspace(1.0, 2.0, 5)
    fitted = interpolation._fit(candidates, labels, weight_L, [0, 1, 2, 3, 4, 5, 6])
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
    assert interpolation._highest_power(trials)[0] == chosen


def test_two_standard_errors_add_nothing() -> None:
    spread = np.tile([0.9, -0.9], 200)
    error = spread.std() / np.sqrt(len(spread))
    for errors, alone in ((1.9, False), (2.1, True)):
        gain = spread + errors * error
        scores, reference = (gain, gain), (np.zeros(400), np.zeros(400))
        assert interpolation._p_is_higher(scores, reference, interpolation._STANDARD_ERRORS_ALONE) is alone


def test_of_many_votes_the_largest_take_part_in_the_fit() -> None:
    rng = np.random.default_rng(11)
    dense = rng.permuted(np.tile(np.arange(1.0, 701.0), (4, 1)), axis=1)
    dense[1, rng.permutation(700)[:500]] = 0.0
    dense[2] = 0.0
    dense[3] = 1.0
    kept = interpolation._most_voted(sp.csr_matrix(dense)).toarray()
    assert (kept[kept > 0] == dense[kept > 0]).all()
    assert sorted(kept[0][kept[0] > 0]) == list(range(401, 701))
    np.testing.assert_array_equal(kept[1:3], dense[1:3])
    assert np.flatnonzero(kept[3]).tolist() == list(range(300)), "of equal votes the smaller labels"


def test_settings_survive_their_dictionary_and_a_damaged_one_is_a_data_error() -> None:
    settings = Interpolation(model=0.8, votes=0.5, outside=-0.2, temperature=0.05, count=30)
    for one in (settings, SETTINGS):
        assert Interpolation.from_dict(one.as_dict()) == one
    with pytest.raises(DataError, match="expected what `train` wrote"):
        Interpolation.from_dict(settings.as_dict() | {"votes": "many"})
    later = ("margin", "budget", "idf_power", "peak")
    old = {name: value for name, value in settings.as_dict().items() if name not in later}
    assert Interpolation.from_dict(old) == settings
    lies = {"idf_power": 11.0}, {"idf_power": float("nan")}, {"budget": 0}, {"votes": float("inf")}, {"peak": -0.1}
    for wrong in (*lies, {"margin": -1.0}):
        with pytest.raises(DataError, match="out of range"):
            Interpolation.from_dict(settings.as_dict() | wrong)


def test_exact_search_and_interpolation_agree_on_pads() -> None:
    import torch

    top = exact_topk(torch.eye(2), torch.eye(3, 2), None, 5)
    merged = interpolate(top, None, FREQUENCIES[:3], Interpolation(), 5)
    assert (merged.label_ids[:, 3:] == -1).all()
    assert np.isneginf(merged.scores[:, 3:]).all()


def test_the_best_labels_do_not_depend_on_how_many_are_asked_for() -> None:
    """The coefficients are fitted to a shortlist of a hundred, and mean something else for a longer one."""
    rng = np.random.default_rng(12)
    table, bias = torch.from_numpy(rng.normal(size=(400, 8)).astype(np.float32)), torch.zeros(400)
    encoder = SparseEncoder(num_features=12, dim=8, activation="none", dropout=0.0)
    encoder.reset_parameters(torch.Generator().manual_seed(0))
    rows = sp.random(300, 12, density=0.5, format="csr", dtype=np.float32, random_state=1)
    labels = sp.csr_matrix((np.ones(600), rng.integers(400, size=600), np.arange(0, 601, 2)), shape=(300, 400))
    predictor = Predictor(
        encoder,
        ExactIndex(table, bias),
        label_frequencies=rng.integers(1, 50, 400),
        num_train=300,
        interpolation=Interpolation(model=0.5, mixture=0.3, votes=0.4, outside=-1.0, temperature=0.1, count=5),
        neighbors=NeighborIndex(normalize_rows(rows), labels),
    )
    few = predictor.predict(rows[:60], k=5)
    for k in (100, 101, 300):
        many = predictor.predict(rows[:60], k=k)
        np.testing.assert_array_equal(many.label_ids[:, :5], few.label_ids)
        np.testing.assert_allclose(many.scores[:, :5], few.scores, atol=1e-5)
    # A few rows are not shared by threads.
    for count in (1, 7):
        alone = predictor.predict(rows[:count], k=5)
        np.testing.assert_array_equal(alone.label_ids, few.label_ids[:count])
        np.testing.assert_allclose(alone.scores, few.scores[:count], atol=1e-5)
