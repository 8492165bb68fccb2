"""Claims about `xmc_midx.interpolation`: the formula, the choice on held-out instances, forbidden labels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from xmc_midx.errors import DataError
from xmc_midx.interpolation import Interpolation, fit_interpolation, interpolate, keep_labels
from xmc_midx.metrics import evaluate_topk, instance_scores
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.topk import exact_topk
from xmc_midx.types import TopK

FREQUENCIES = np.array([50, 3, 7, 0, 1])


def shortlist_of(logits: np.ndarray) -> TopK:
    order = np.argsort(-logits, axis=1, kind="stable")
    return TopK(label_ids=order.astype(np.int64), scores=np.take_along_axis(logits, order, 1).astype(np.float32))


def test_the_score_is_the_log_of_the_models_mass_plus_the_weighted_votes() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 5)) * 2
    votes = sp.random(4, 5, 0.5, format="csr", random_state=np.random.default_rng(1))
    settings = Interpolation(weight=0.7, discount=0.3)
    adjusted = logits - 0.3 * np.log(FREQUENCIES + 1.0)
    mass = np.exp(adjusted) / np.exp(adjusted).sum(1, keepdims=True) + 0.7 * votes.toarray()
    top = interpolate(shortlist_of(logits), sp.csr_matrix(votes), FREQUENCIES, settings, 5)
    np.testing.assert_array_equal(top.label_ids, np.argsort(-mass, axis=1, kind="stable"))
    np.testing.assert_allclose(top.scores, -np.sort(-np.log(mass), axis=1), rtol=1e-5)


def test_a_label_outside_the_shortlist_comes_in_by_its_votes_alone() -> None:
    shortlist = TopK(label_ids=np.array([[2, -1]]), scores=np.array([[1.0, -np.inf]], dtype=np.float32))
    votes = sp.csr_matrix(np.array([[0.0, 0.4, 0.0, 0.0, 0.0]]))
    top = interpolate(shortlist, votes, FREQUENCIES, Interpolation(weight=0.5), 3)
    assert top.label_ids.tolist() == [[2, 1, -1]]
    np.testing.assert_allclose(top.scores[0, :2], [0.0, np.log(0.2)], atol=1e-6)


def test_without_neighbours_and_discount_the_ranking_is_the_models() -> None:
    logits = np.random.default_rng(2).normal(size=(6, 5))
    top = interpolate(shortlist_of(logits), None, FREQUENCIES, Interpolation(), 3)
    np.testing.assert_array_equal(top.label_ids, shortlist_of(logits).label_ids[:, :3])


def test_denied_labels_lose_their_votes_and_only_allowed_ones_keep_theirs() -> None:
    votes = sp.csr_matrix(np.array([[0.5, 0.4, 0.3, 0.0, 0.0]]))
    assert keep_labels(votes, np.array([0, 1]), np.array([1])).toarray().tolist() == [[0.5, 0, 0, 0, 0]]
    assert keep_labels(votes, None, np.array([0])).toarray().tolist() == [[0, 0.4, 0.3, 0, 0]]
    assert keep_labels(votes, None, None) is votes


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
    assert fit(wrong, rows, labels, rows, labels).weight >= 0.5
    right = shortlist_of(20.0 * labels.toarray())
    shuffled = labels[rng.permutation(num_rows)]
    assert fit(right, rows, shuffled, rows, labels).weight == 0.0


def test_a_discount_that_gains_psp_at_the_price_of_p_is_not_chosen() -> None:
    # The head label 0 is right three times in five, the tail label 1 twice; the logits prefer the head by one nat.
    truth = np.zeros((500, 2), dtype=np.float32)
    truth[:300, 0] = truth[300:, 1] = 1.0
    frequencies = np.array([5000, 2])
    shortlist = shortlist_of(np.tile([1.0, 0.0], (500, 1)))
    chosen = fit_interpolation(shortlist, None, None, sp.csr_matrix(truth), frequencies, 5002)
    assert chosen.discount == 0.0


def test_settings_survive_their_dictionary_and_a_damaged_one_is_a_data_error() -> None:
    settings = Interpolation(weight=0.5, temperature=0.05, count=30, discount=0.1)
    assert Interpolation.from_dict(settings.as_dict()) == settings
    with pytest.raises(DataError, match=r"interpolation\.json"):
        Interpolation.from_dict({"weight": "much"})


def test_exact_search_and_interpolation_agree_on_pads() -> None:
    import torch

    top = exact_topk(torch.eye(2), torch.eye(3, 2), None, 5)
    merged = interpolate(top, None, FREQUENCIES[:3], Interpolation(), 5)
    assert (merged.label_ids[:, 3:] == -1).all()
    assert np.isneginf(merged.scores[:, 3:]).all()
