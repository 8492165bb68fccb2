"""Claims about `xmc_midx.ranker`: the optimum of liblinear, margins, threads, files that lie."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse import csr_matrix
from sklearn.svm import LinearSVC

from xmc_midx import ranker
from xmc_midx.data.features import normalize_rows
from xmc_midx.ranker import LinearRanker


def problem(num_rows: int = 120, num_features: int = 31, num_labels: int = 7) -> tuple[sp.csr_matrix, ...]:
    """Rows, labels that depend on them, and rivals: some labels twice, some rows without any."""
    rng = np.random.default_rng(3)
    rows = sp.random(num_rows, num_features, 0.3, format="csr", random_state=rng, dtype=np.float32)
    scores = rows @ rng.normal(size=(num_features, num_labels))
    truth = (scores > np.quantile(scores, 0.75, axis=0)).astype(np.float32)
    truth[:, 5] = 0.0  # a label without positives
    rivals = (rng.random(truth.shape) < 0.5).astype(np.float32)
    rivals[::4] = 0.0
    truth[:, 6] = rivals[:, 6] = 0.0  # a label that no instance knows
    return rows, sp.csr_matrix(truth), sp.csr_matrix(rivals)


def dense(found: LinearRanker) -> np.ndarray:
    """(L, F + 1): the weights, then the bias."""
    weights = sp.csr_matrix((found.weights.data.astype(np.float64), found.weights.indices, found.weights.indptr))
    weights.resize(found.num_labels, found.num_features)
    return np.hstack([weights.toarray(), found.bias.astype(np.float64)[:, None]])


def test_each_label_is_liblinears_optimum_over_its_positives_and_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranker, "_PASSES", 3000)
    monkeypatch.setattr(ranker, "_TOLERANCE", 1e-5)
    monkeypatch.setattr(ranker, "_SMALLEST", 0.0)
    rows, truth, rivals = problem()
    found = dense(LinearRanker.fit(rows, truth, rivals))
    for label in range(5):
        positive = truth.toarray()[:, label] > 0
        mine = np.flatnonzero(positive | (rivals.toarray()[:, label] > 0))
        reference = LinearSVC(C=1.0, loss="squared_hinge", dual=True, tol=1e-8, max_iter=100_000, random_state=0)
        reference.fit(rows[mine], positive[mine])
        expected = np.append(reference.coef_[0], reference.intercept_)
        np.testing.assert_allclose(found[label], expected, atol=4e-3)  # float16
    assert (found[5] <= 0).all() or found[5, -1] < 0, "only negatives: below zero"
    assert not found[6].any()


def test_margins_of_long_labels_and_of_features_whose_marks_are_the_same() -> None:
    """More weights than are looked through at once, and pairs of features that lie where the marks begin anew."""
    rng = np.random.default_rng(11)
    num_features, apart = 40_000, ranker._SPOTS
    lengths = (0, 1, ranker._STRETCH - 1, ranker._STRETCH, ranker._STRETCH + 1, 3000, num_features)
    weights = np.zeros((len(lengths), num_features), dtype=np.float16)
    for label, length in enumerate(lengths):
        ids = rng.choice(num_features, length, replace=False)
        weights[label, ids] = rng.normal(size=length)
    weights[1:, [5, 5 + apart]] = [[0.5, 4.0]]
    bias = rng.normal(size=len(lengths)).astype(np.float16)
    stored = sp.csr_matrix(weights.astype(np.float32))
    half = csr_matrix((stored.data.astype(np.float16), stored.indices, stored.indptr), shape=stored.shape)
    rows = np.zeros((4, num_features), dtype=np.float32)
    for row in rows[1:]:
        row[rng.choice(num_features, 200, replace=False)] = rng.normal(size=200)
    rows[1, [5, 5 + apart]], rows[2, [5, 5 + apart]] = (1.0, 0.0), (0.0, 1.0)  # one of the two is the row's
    instance, label = np.divmod(np.arange(4 * len(lengths)), len(lengths))
    found = LinearRanker(half, bias).margins(csr_matrix(rows), instance, label)
    products = rows[instance].astype(np.float64) * weights[label].astype(np.float64)
    np.testing.assert_allclose(found.margins, products.sum(axis=1) + bias[label], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.peaks, products.max(axis=1, initial=0.0), rtol=1e-6)


def test_few_passes_separate_and_small_weights_are_dropped() -> None:
    rows, truth, rivals = problem()
    rows = normalize_rows(rows)
    found = LinearRanker.fit(rows, truth, rivals)
    weights = found.weights.data
    assert np.abs(weights).min() >= 0.24 and weights.size < 5 * 31
    instance, label = np.divmod(np.arange(120 * 5), 5)
    margins = found.margins(rows, instance, label).margins.reshape(120, 5)
    known = (truth + rivals).toarray()[:, :5] > 0
    right = (margins > 0) == (truth.toarray()[:, :5] > 0)
    assert right[known].mean() > 0.9


def test_rows_of_another_length_or_of_many_values_keep_their_classifiers() -> None:
    rng = np.random.default_rng(5)
    centers = rng.normal(size=(20, 512))
    dense = centers[np.arange(200) % 20] + 2.0 * rng.normal(size=(200, 512))
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    truth = sp.csr_matrix((np.ones(200, dtype=np.float32), (np.arange(200), np.arange(200) % 20)), shape=(200, 20))
    everything = sp.csr_matrix(np.ones((200, 20), dtype=np.float32))
    instance, label = np.divmod(np.arange(2000), 20)
    for size in (1.0, 20.0, 0.5):
        rows = sp.csr_matrix((size * dense).astype(np.float32))
        found = LinearRanker.fit(rows[:100], truth[:100], everything[:100])
        assert 0.05 < found.weights.nnz / (20 * 512) < 0.95, "the small ones are dropped"
        margins = found.margins(rows[100:], instance, label).margins.reshape(100, 20)
        assert (margins.argmax(axis=1) == np.arange(100) % 20).mean() > 0.85


def test_margins_are_the_product_and_peaks_its_largest_part() -> None:
    rows, truth, rivals = problem()
    found = LinearRanker.fit(rows, truth, rivals)
    rng = np.random.default_rng(5)
    instance = np.sort(rng.integers(120, size=333))
    label = rng.integers(7, size=333)
    model = dense(found)
    expected = np.hstack([rows.toarray(), np.ones((120, 1))]) @ model.T
    margins, peaks = found.margins(rows, instance, label)
    np.testing.assert_allclose(margins, expected[instance, label], atol=1e-5)
    parts = rows.toarray()[instance] * model[label, :-1]
    assert (parts < 0).any(axis=1).any() and (parts <= 0).all(axis=1).any()
    np.testing.assert_allclose(peaks, parts.max(axis=1, initial=0.0), atol=1e-5)
    nothing = found.margins(rows[:0], np.empty(0, np.int64), np.empty(0, np.int64))
    assert nothing.margins.shape == nothing.peaks.shape == (0,)


@pytest.mark.parametrize("block", [1, 40, 1 << 21])
def test_neither_threads_nor_blocks_change_a_bit(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    rows, truth, rivals = problem()
    expected = LinearRanker.fit(rows, truth, rivals, num_threads=1).as_arrays()
    monkeypatch.setattr(ranker, "_BLOCK", block)
    found = LinearRanker.fit(rows, truth, rivals, num_threads=3).as_arrays()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_label_learns_from_no_instance_but_its_own_and_its_rivals() -> None:
    rows, truth, rivals = problem()
    found = dense(LinearRanker.fit(rows, truth, rivals))
    stranger = np.flatnonzero((truth + rivals).toarray()[:, 0] == 0)
    other = rows.toarray()
    other[stranger] *= 100
    again = dense(LinearRanker.fit(sp.csr_matrix(other), truth, rivals))
    np.testing.assert_array_equal(found[0], again[0])
    assert (found[1] != again[1]).any()


def test_arrays_are_read_back_equal_and_lies_are_refused() -> None:
    rows, truth, rivals = problem()
    found = LinearRanker.fit(rows, truth, rivals)
    arrays = found.as_arrays()
    again = LinearRanker.from_arrays(arrays)
    np.testing.assert_array_equal(dense(again), dense(found))
    for name in arrays:
        np.testing.assert_array_equal(again.as_arrays()[name], arrays[name])
    for lie in (
        {"shape": arrays["shape"] + 1},
        {"gaps": arrays["gaps"][:-1]},
        {"bias": arrays["bias"][:-1]},
        {"bias": arrays["bias"][:, None]},
        {"bias": arrays["bias"].astype(np.float32)},
    ):
        with pytest.raises(ValueError, match=r"fit|damaged"):
            LinearRanker.from_arrays(arrays | lie)
    with pytest.raises(LookupError):
        LinearRanker.from_arrays({name: array for name, array in arrays.items() if name != "bias"})


def test_a_rival_that_is_stored_twice_is_a_rival() -> None:
    features = csr_matrix(np.eye(4, dtype=np.float32))
    labels = csr_matrix(np.array([[1.0], [0], [0], [0]]))
    once = csr_matrix((np.ones(1), np.array([0]), np.array([0, 0, 1, 1, 1])), shape=(4, 1))
    twice = csr_matrix((np.ones(2), np.array([0, 0]), np.array([0, 0, 2, 2, 2])), shape=(4, 1))
    margins = [
        LinearRanker.fit(features, labels, rivals).margins(features, np.arange(4), np.zeros(4, dtype=np.int64)).margins
        for rivals in (once, twice)
    ]
    assert margins[0][1] < 0
    np.testing.assert_array_equal(margins[0], margins[1])
