"""Probabilities: against scikit-learn's logistic regression and a known law, and what an allow list may not change."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import expit, logsumexp
from sklearn.linear_model import LogisticRegression

from xmc_midx.calibration import (
    Calibration,
    calibrate,
    expected_calibration_error,
    fit_calibration,
    is_positive,
)
from xmc_midx.errors import DataError
from xmc_midx.types import TopK

LAW = Calibration(score=0.8, total=-0.6, tail=-0.3, offset=0.4)
N, L, K = 3000, 150, 100


def scores_and_labels(seed: int, num_instances: int = N) -> tuple[TopK, csr_matrix]:
    """Scores of instances that are sure or unsure, and labels that apply by `LAW`, written out here once more."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(num_instances, L)) * rng.uniform(1.0, 3.0, (num_instances, 1)) - 3.0
    scores += rng.normal(size=(num_instances, 1)) * 2
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    best = np.take_along_axis(scores, ids, axis=1).astype(np.float32)
    total, tail = logsumexp(best, axis=1, keepdims=True), logsumexp(best[:, 10:], axis=1, keepdims=True)
    chance = expit(0.8 * best - 0.6 * total - 0.3 * tail + 0.4)
    rows, ranks = np.nonzero(rng.random(chance.shape) < chance)
    labels = csr_matrix((np.ones(len(rows)), (rows, ids[rows, ranks])), shape=(num_instances, L))
    return TopK(label_ids=ids.astype(np.int64), scores=best), labels


def test_a_known_law_is_found_and_its_probabilities_are_honest() -> None:
    fitted = fit_calibration(*scores_and_labels(0))
    assert fitted is not None
    top, labels = scores_and_labels(1)
    stated = calibrate(top, fitted)
    truth = calibrate(top, LAW)
    assert np.abs(stated.scores[:, :20] - truth.scores[:, :20]).mean() < 0.01
    positive = is_positive(top, labels)
    assert positive.sum() == labels.nnz
    error = expected_calibration_error(stated.scores[:, :5], positive[:, :5])
    softmax = np.exp(top.scores - logsumexp(top.scores, axis=1, keepdims=True))
    assert error < 0.015 < 0.05 < expected_calibration_error(softmax[:, :5], positive[:, :5])
    for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 1.0)):
        chosen = (stated.scores >= low) & (stated.scores < high)
        assert positive[chosen].mean() == pytest.approx(stated.scores[chosen].mean(), abs=0.03)


def test_a_probability_does_not_depend_on_how_many_are_asked_for() -> None:
    rng = np.random.default_rng(3)
    scores = -np.sort(-rng.normal(size=(40, L)) * 3, axis=1).astype(np.float32)
    ids = np.stack([rng.permutation(L) for _ in range(40)])
    whole = calibrate(TopK(label_ids=ids, scores=scores), LAW)
    best = calibrate(TopK(label_ids=ids[:, :K], scores=scores[:, :K]), LAW)
    np.testing.assert_array_equal(whole.scores[:, :K], best.scores)


def test_the_fit_is_the_logistic_regression_over_the_twenty_best() -> None:
    top, labels = scores_and_labels(2, 400)
    fitted = fit_calibration(top, labels)
    assert fitted is not None
    scores = top.scores.astype(np.float64)
    total = np.repeat(logsumexp(scores, axis=1)[:, None], 20, axis=1)
    tail = np.repeat(logsumexp(scores[:, 10:], axis=1)[:, None], 20, axis=1)
    terms = np.stack([scores[:, :20].ravel(), total.ravel(), tail.ravel()], axis=1)
    mean, spread = terms.mean(axis=0), terms.std(axis=0)
    reference = LogisticRegression(C=1 / 0.5, tol=1e-10, max_iter=1000)
    reference.fit((terms - mean) / spread, is_positive(top, labels)[:, :20].ravel())
    expected = reference.predict_proba((terms - mean) / spread)[:, 1].reshape(400, 20)
    assert np.abs(calibrate(top, fitted).scores[:, :20] - expected).max() < 2e-3


def test_the_error_equals_a_loop_over_the_bins() -> None:
    rng = np.random.default_rng(3)
    stated = np.concatenate([rng.random(500), [0.0, 1.0, 1.0, 0.2]])
    positive = rng.random(504) < stated**2
    expected = 0.0
    for low in range(10):
        chosen = (stated >= low / 10) & ((stated < (low + 1) / 10) | (low == 9))
        if chosen.any():
            expected += chosen.mean() * abs(stated[chosen].mean() - positive[chosen].mean())
    assert expected_calibration_error(stated, positive, num_bins=10) == pytest.approx(expected, abs=1e-12)
    assert expected_calibration_error(np.array([]), np.array([], dtype=bool)) == 0.0


def test_the_ranking_stays_and_pads_stay_pads() -> None:
    top, _ = scores_and_labels(4, 50)
    top.label_ids[7, 3:], top.scores[7, 3:] = -1, -np.inf
    top.label_ids[8], top.scores[8] = -1, -np.inf
    stated = calibrate(top, LAW)
    assert np.array_equal(stated.label_ids, top.label_ids)
    assert (np.diff(np.where(top.label_ids >= 0, stated.scores, 0)) <= 0).all()
    found = top.label_ids >= 0
    assert np.isneginf(stated.scores[~found]).all()
    assert ((stated.scores[found] >= 0) & (stated.scores[found] <= 1)).all()


def test_a_label_has_the_same_probability_whatever_else_may_be_shown() -> None:
    top, _ = scores_and_labels(5, 40)
    whole = calibrate(top, LAW)
    rng = np.random.default_rng(6)
    for row in range(40):
        # Of an allow list: labels of the shortlist, whose scores alone came out differently, and one from outside it.
        kept = np.sort(rng.choice(K, 4, replace=False))
        outside = np.setdiff1d(np.arange(L), top.label_ids[row])[:1]
        ids = np.concatenate([top.label_ids[row, kept], outside])[None]
        scores = np.concatenate([top.scores[row, kept] + 1.7, [9.0]]).astype(np.float32)[None]
        one = TopK(label_ids=top.label_ids[row : row + 1], scores=top.scores[row : row + 1])
        found = calibrate(TopK(label_ids=ids, scores=scores), LAW, background=one)
        stated = dict(zip(found.label_ids[0].tolist(), found.scores[0].tolist(), strict=True))
        for rank in kept:
            assert stated[int(top.label_ids[row, rank])] == pytest.approx(float(whole.scores[row, rank]), rel=1e-5)
        assert stated[int(outside[0])] <= whole.scores[row, -1] * (1 + 1e-5), "at most what the last one has"
        assert (np.diff(found.scores[0]) <= 0).all()


def test_labels_from_outside_the_background_keep_their_order() -> None:
    background = TopK(label_ids=np.arange(100)[None], scores=np.linspace(5, 0, 100, dtype=np.float32)[None])
    top = TopK(label_ids=np.array([[900, 500, 700, -1]]), scores=np.array([[3, 2, 1, -np.inf]], dtype=np.float32))
    assert calibrate(top, LAW, background=background).label_ids.tolist() == [[900, 500, 700, -1]]


@pytest.mark.parametrize("num_labels", [1, 2, 7, 10, 11, 12])
def test_few_labels_do_no_harm(num_labels: int) -> None:
    rng = np.random.default_rng(num_labels)
    scores = -np.sort(-rng.normal(size=(200, num_labels)).astype(np.float32), axis=1)
    top = TopK(label_ids=np.tile(np.arange(num_labels), (200, 1)), scores=scores)
    labels = csr_matrix((rng.random((200, num_labels)) < expit(2 * scores - 1)).astype(float))
    fitted = fit_calibration(top, labels)
    assert fitted is not None and fitted.score > 0
    stated = calibrate(top, fitted).scores
    assert np.isfinite(stated).all()
    assert expected_calibration_error(stated, is_positive(top, labels)) < 0.1


def test_labels_that_always_or_never_apply_give_no_calibration() -> None:
    top, labels = scores_and_labels(7, 20)
    assert fit_calibration(top, csr_matrix(labels.shape)) is None
    assert fit_calibration(top, csr_matrix(np.ones(labels.shape))) is None


def test_worthless_scores_keep_their_order() -> None:
    top, _ = scores_and_labels(8, 200)
    against = csr_matrix((np.ones(200), (np.arange(200), top.label_ids[:, 19])), shape=(200, L))
    fitted = fit_calibration(top, against)
    assert fitted is not None and fitted.score > 0


@pytest.mark.parametrize(
    "values",
    [None, 7, {}, {"score": 1.0}, *(LAW.as_dict() | {"score": bad} for bad in ("x", -1.0, float("nan"), float("inf")))],
)
@pytest.mark.fault("R7")
def test_what_is_no_calibration_is_refused(values: object) -> None:
    assert Calibration.from_dict(LAW.as_dict()) == LAW
    with pytest.raises(DataError, match="calibration"):
        Calibration.from_dict(values)
