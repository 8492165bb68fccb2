"""Claims about `xmc_midx.interpolation`: the formula, files that lie, how many results are asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from reference import interpolate

from xmc_midx.data.features import normalize_rows
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import DataError
from xmc_midx.index import ExactIndex
from xmc_midx.interpolation import Interpolation
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
