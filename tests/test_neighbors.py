"""Claims about `xmc_midx.neighbors`: exact neighbours, votes that are shares, rows that survive a file."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.numpy import load_file

from xmc_midx import neighbors as module
from xmc_midx.data.features import normalize_rows
from xmc_midx.neighbors import NeighborIndex, choose_idf_power, save_rows, tune_budget


def random_rows(
    num_rows: int, num_features: int, density: float, seed: int, empty: tuple[int, ...] = ()
) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    values = rng.random((num_rows, num_features)) * (rng.random((num_rows, num_features)) < density)
    values[list(empty)] = 0.0
    return sp.csr_matrix(values.astype(np.float32))


def in_bytes(rows: sp.csr_matrix) -> sp.csr_matrix:
    """As the index keeps them: each value a whole number of 127ths of the row's largest."""
    dense = rows.toarray().astype(np.float64)
    step = np.maximum(np.abs(dense).max(axis=1, keepdims=True), 1e-30) / 127
    return sp.csr_matrix(np.round(dense / step) * step)


@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_neighbours_are_those_of_a_full_scan(count: int) -> None:
    rows = normalize_rows(random_rows(53, 31, 0.15, seed=1))
    queries = normalize_rows(random_rows(17, 31, 0.15, seed=2, empty=(3,)))
    found, scores = NeighborIndex(rows, random_rows(53, 5, 0.3, seed=3)).search(queries, count)
    truth = queries.toarray().astype(np.float64) @ in_bytes(rows).toarray().T
    in_common = np.count_nonzero((queries @ rows.T).toarray(), axis=1)
    assert found.shape == scores.shape == (17, count)
    for ids, values, expected, most in zip(found, scores, truth, in_common, strict=True):
        kept = ids >= 0
        assert kept.sum() == min(count, most)
        assert len(set(ids[kept])) == kept.sum()
        np.testing.assert_allclose(values[kept], expected[ids[kept]], rtol=1e-5)
        np.testing.assert_allclose(values[kept], -np.sort(-expected)[: kept.sum()], rtol=1e-5)
    assert (found[3] == -1).all()


def test_ids_of_any_size_have_room_beside_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = normalize_rows(random_rows(200, 90, 0.2, seed=1)), random_rows(200, 5, 0.3, seed=3)
    rows.data[::3] *= -1.0
    before = NeighborIndex(rows, labels, idf_power=0.5).search(rows, 7, budget=100)
    monkeypatch.setattr(module, "_SHORT_IDS", 80)
    after = NeighborIndex(rows, labels, idf_power=0.5).search(rows, 7, budget=100)
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, second)


def test_equal_neighbours_come_in_the_order_of_their_rows() -> None:
    rows = sp.csr_matrix(np.tile(np.eye(2, dtype=np.float32)[[0]], (9, 1)))
    found, scores = NeighborIndex(rows, sp.csr_matrix(np.ones((9, 1)))).search(rows[:1], 4)
    assert found.tolist() == [[0, 1, 2, 3]]
    assert scores.tolist() == [[1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("num_rows", [9, 1000])
def test_equal_neighbours_of_dense_rows_too(num_rows: int) -> None:
    rows = sp.csr_matrix(np.full((num_rows, 20), 0.25, dtype=np.float32))
    found, scores = NeighborIndex(rows, sp.csr_matrix(np.ones((num_rows, 1)))).search(rows[:2], 3)
    assert found.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(scores, np.full((2, 3), 1.25))


def test_negative_values_are_neighbours_too_and_come_last() -> None:
    rows = sp.csr_matrix(np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    found, scores = NeighborIndex(rows, sp.csr_matrix(np.ones((3, 1)))).search(rows[1:2], 3)
    assert found.tolist() == [[1, 0, -1]]
    assert scores.tolist() == [[1.0, -1.0, 0.0]]


def test_votes_are_the_weighted_share_of_neighbours_with_a_label() -> None:
    rows = sp.csr_matrix(np.eye(3, dtype=np.float32))
    labels = sp.csr_matrix(np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=np.float32))
    index = NeighborIndex(rows, labels)
    found = np.array([[0, 1, -1], [2, -1, -1], [-1, -1, -1]])
    scores = np.array([[0.9, 0.4, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    first = np.exp(0.9 / 0.1) / (np.exp(0.9 / 0.1) + np.exp(0.4 / 0.1))
    votes = index.votes(found, scores, temperature=0.1).toarray()
    np.testing.assert_allclose(votes, [[first, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_a_feature_of_most_rows_is_left_out_of_large_collections_only(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((40, 3), dtype=np.float32)
    values[:, 0] = 0.1
    values[5, 1] = values[6, 1] = 1.0
    rows, labels = sp.csr_matrix(values), sp.csr_matrix(np.ones((40, 1)))
    query = sp.csr_matrix(np.array([[1.0, 1.0, 0.0]], dtype=np.float32))
    assert (NeighborIndex(rows, labels).search(query, 40)[0] >= 0).sum() == 40
    monkeypatch.setattr(module, "_SMALL", 10)
    assert NeighborIndex(rows, labels).search(query, 3)[0].tolist() == [[5, 6, -1]]


def test_a_small_budget_still_finds_most_neighbours_and_their_exact_products() -> None:
    rows = normalize_rows(random_rows(3000, 200, 0.05, seed=8))
    queries = normalize_rows(random_rows(40, 200, 0.05, seed=9, empty=(5,)))
    index = NeighborIndex(rows, random_rows(3000, 5, 0.3, seed=3))
    exact, exact_scores = index.search(queries, 10)
    found, scores = index.search(queries, 10, budget=700)
    truth = (queries @ in_bytes(rows).T).toarray()
    hit = [np.isin(a[a >= 0], b).mean() for a, b in zip(exact, found, strict=True) if (a >= 0).any()]
    assert not np.array_equal(found, exact), "the budget is felt"
    assert np.mean(hit) > 0.8
    kept = found >= 0
    np.testing.assert_allclose(scores[kept], truth[np.nonzero(kept)[0], found[kept]], rtol=1e-5)
    np.testing.assert_array_equal(index.search(queries, 10, budget=10**6)[1], exact_scores)


def test_equal_values_are_read_as_far_as_the_budget_goes_rare_features_first() -> None:
    rng = np.random.default_rng(12)
    # Binary rows of one length: all entries are on one level. Features of falling frequency, as words are.
    rows = np.zeros((3000, 400), dtype=np.float32)
    for row in rows:
        row[rng.choice(400, 20, replace=False, p=np.arange(400, 0, -1) / 80_200)] = 1.0
    features = normalize_rows(sp.csr_matrix(rows))
    index, queries = NeighborIndex(features, random_rows(3000, 5, 0.3, seed=3)), features[:50]
    exact = index.search(queries, 10)[1]
    recalls = []
    for budget in (150, 600, 1500, 2500):
        found, scores = index.search(queries, 10, budget=budget)
        assert (found >= 0).any(axis=1).all(), "something is always read"
        assert (found[:, 0] == np.arange(50)).all() or budget < 600, "a row is its own nearest"
        recalls.append((scores >= exact[:, -1:] - 1e-6).mean())
    assert min(recalls) > 0.3 and recalls[-1] > 0.9, recalls


def test_the_budget_is_the_least_that_finds_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normalize_rows(random_rows(3000, 200, 0.05, seed=8))
    queries = normalize_rows(random_rows(40, 200, 0.05, seed=9, empty=(5,)))
    index = NeighborIndex(rows, random_rows(3000, 5, 0.3, seed=3))
    monkeypatch.setattr(module, "_BUDGETS", (50, 400, 1600, 6400))
    assert tune_budget(index, queries, 10) == 6400, "of few rows all are read"
    monkeypatch.setattr(module, "_SMALL", 10)
    chosen = tune_budget(index, queries, 10)
    exact = index.search(queries, 10)[1]
    recall = {
        budget: ((index.search(queries, 10, budget=budget)[1] >= exact[:, -1:] - 1e-6) & (exact > 0)).sum()
        / (exact > 0).sum()
        for budget in module._BUDGETS
    }
    assert chosen == min(budget for budget, found in recall.items() if found >= 0.95), recall
    assert 50 < chosen < 6400


def words(num_rows: int, *, topic_weight: int, seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Binary rows of common words, and one or more rare ones that name the label."""
    rng = np.random.default_rng(seed)
    values = np.zeros((num_rows, 300), dtype=np.float32)
    classes = rng.integers(50, size=num_rows)
    for row, label in zip(values, classes, strict=True):
        row[rng.choice(50, 20, replace=False)] = 1.0
        row[50 + 5 * label + rng.choice(5, topic_weight, replace=False)] = 1.0
    labels = sp.csr_matrix((np.ones(num_rows), (np.arange(num_rows), classes)), shape=(num_rows, 50))
    return normalize_rows(sp.csr_matrix(values)), labels


def test_rare_features_count_more_where_that_makes_better_neighbours() -> None:
    rows, labels = words(1500, topic_weight=2, seed=1)
    assert choose_idf_power(rows, labels, 20) == 0.5
    # Rare words that say nothing, common ones that name the label.
    rng = np.random.default_rng(2)
    values = np.zeros((1500, 700), dtype=np.float32)
    classes = rng.integers(20, size=1500)
    values[np.arange(1500), classes] = 1.0
    for row in values:
        row[20 + rng.choice(680, 12, replace=False)] = 1.0
    labels = sp.csr_matrix((np.ones(1500), (np.arange(1500), classes)), shape=(1500, 20))
    assert choose_idf_power(normalize_rows(sp.csr_matrix(values)), labels, 20) == 0.0


@pytest.mark.parametrize("small", [10, 20_000])
def test_weighted_neighbours_are_those_of_weighted_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(module, "_SMALL", small)
    monkeypatch.setattr(module, "_MIN_MASS", 0.0)
    rows, labels = words(400, topic_weight=2, seed=3)
    queries, _ = words(30, topic_weight=2, seed=4)
    counts = np.bincount(rows.indices, minlength=300)
    weights = np.sqrt(np.log(401 / (counts + 1)) + 1.0) * (counts > 0)
    if small == 10:
        weights *= counts <= 40
    dense, asked = (part.toarray().astype(np.float64) * weights for part in (rows, queries))
    truth = (asked / np.linalg.norm(asked, axis=1)[:, None]) @ (dense / np.linalg.norm(dense, axis=1)[:, None]).T
    _, scores = NeighborIndex(rows, labels, idf_power=0.5).search(queries, 9)
    np.testing.assert_allclose(scores, -np.sort(-truth, axis=1)[:, :9], atol=1e-5)
    save_rows(tmp_path / "rows.safetensors", rows, labels)
    _, again = NeighborIndex.load(tmp_path / "rows.safetensors", idf_power=0.5).search(queries, 9)
    np.testing.assert_allclose(again, scores, atol=0.02)


def test_dense_rows_have_the_neighbours_of_a_full_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 10)
    rng = np.random.default_rng(6)
    rows = normalize_rows(sp.csr_matrix(rng.normal(size=(500, 24)).astype(np.float32)))
    queries = normalize_rows(sp.csr_matrix(rng.normal(size=(30, 24)).astype(np.float32)))
    labels = random_rows(500, 5, 0.3, seed=3)
    found, scores = NeighborIndex(rows, labels).search(queries, 7, budget=100)
    truth = (queries @ rows.T).toarray()
    np.testing.assert_array_equal(found, np.argsort(-truth, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(scores, -np.sort(-truth, axis=1)[:, :7], rtol=1e-5)
    save_rows(tmp_path / "rows.safetensors", rows, labels)
    again = NeighborIndex.load(tmp_path / "rows.safetensors").search(queries, 7)
    np.testing.assert_allclose(again[1], scores, atol=0.02)


def test_no_feature_is_left_out_where_the_rows_would_lose_most_of_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 10)
    values = np.zeros((200, 40), dtype=np.float32)
    rng = np.random.default_rng(7)
    for row in values:
        row[rng.choice(40, 8, replace=False)] = 1.0
    rows, labels = normalize_rows(sp.csr_matrix(values)), random_rows(200, 5, 0.3, seed=3)
    found, _ = NeighborIndex(rows, labels).search(rows[:20], 3)
    np.testing.assert_array_equal(found[:, 0], np.arange(20))


def test_compiled_code_is_found_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = normalize_rows(random_rows(20, 9, 0.3, seed=1))
    NeighborIndex(rows, sp.csr_matrix((20, 2), dtype=np.float32)).search(rows, 2)
    assert module.is_compiled()
    stats = SimpleNamespace(cache_path=str(tmp_path))
    monkeypatch.setattr(module, "_search", SimpleNamespace(stats=stats, py_func=module._search.py_func))
    for name in ("neighbors._search-1.py311.nbi", "neighbors.count_votes-516.py311.nbi"):  # of an earlier release
        (tmp_path / name).touch()
    assert not module.is_compiled()


def test_saved_rows_give_the_same_votes(tmp_path: Path) -> None:
    rows, labels = normalize_rows(random_rows(30, 12, 0.3, seed=4)), random_rows(30, 6, 0.3, seed=5)
    save_rows(tmp_path / "rows.safetensors", rows, labels)
    before, after = NeighborIndex(rows, labels), NeighborIndex.load(tmp_path / "rows.safetensors")
    assert after.num_instances == 30
    for temperature in (0.05, 0.5):
        first = before.votes(*before.search(rows, 5), temperature)
        second = after.votes(*after.search(rows, 5), temperature)
        # A byte keeps a value to half a 127th of the row's largest.
        np.testing.assert_allclose(first.toarray(), second.toarray(), atol=0.2 * 0.01 / temperature)


@pytest.mark.parametrize("num_features", [9, 65_536, 65_537, 200_000])
def test_rows_are_read_back_to_half_a_step(tmp_path: Path, num_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(num_features)
    rows = sp.random(50, num_features, min(0.3, 400 / num_features), format="csr", random_state=rng, dtype=np.float32)
    rows = sp.csr_matrix(rows + sp.csr_matrix(([-0.5], ([3], [num_features - 1])), shape=rows.shape, dtype=np.float32))
    rows.sort_indices()
    rows.data[rows.indptr[7] : rows.indptr[8]] = 0.0
    rows.eliminate_zeros()
    labels = random_rows(50, 6, 0.3, seed=5)
    labels.data[:] = 1.0
    save_rows(tmp_path / "rows.safetensors", rows, labels)
    found, found_labels = module._read_rows(load_file(tmp_path / "rows.safetensors"))
    np.testing.assert_array_equal(found.indptr, rows.indptr)
    np.testing.assert_array_equal(found.indices, rows.indices)
    step = np.repeat(np.abs(rows).max(axis=1).toarray().ravel() / 127, np.diff(rows.indptr))
    assert (np.abs(found.data - rows.data) <= 0.501 * step).all()
    assert (found_labels != labels).nnz == 0
    assert (tmp_path / "rows.safetensors").stat().st_size < 4 * rows.nnz + 8 * labels.nnz + 4000

    monkeypatch.setattr(module, "_SMALL", 10)
    monkeypatch.setattr(module, "_MIN_MASS", 0.0)
    often = np.bincount(rows.indices, minlength=num_features) > 5
    save_rows(tmp_path / "rows.safetensors", rows, labels)
    found, _ = module._read_rows(load_file(tmp_path / "rows.safetensors"))
    assert not often[found.indices].any() and found.nnz == (~often[rows.indices]).sum()


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    parts = []
    for count in (30, 29):
        rows, labels = normalize_rows(random_rows(count, 12, 0.3, seed=4)), random_rows(count, 6, 0.3, seed=5)
        save_rows(tmp_path / "rows.safetensors", rows, labels)
        parts.append(load_file(tmp_path / "rows.safetensors"))
    arrays, others = parts
    for lie in (
        {name: others[name] for name in others if name.startswith("labels.")},
        {name: others[name] for name in others if name.startswith("features.")},
        {"features.scale": arrays["features.scale"][:-1]},
        {"features.scale": np.full_like(arrays["features.scale"], np.nan)},
        {"features.scale": np.full_like(arrays["features.scale"], np.inf)},
        {"features.values": arrays["features.values"][:-1]},
        {"labels.gaps": others["labels.gaps"]},
        {"labels.shape": np.array([2**40, 6])},
    ):
        with pytest.raises((ValueError, LookupError)):
            module._read_rows(arrays | lie)


def test_the_rows_have_unit_length_and_empty_ones_stay() -> None:
    rows = random_rows(20, 9, 0.4, seed=6, empty=(0, 19))
    rows.data[:] = np.random.default_rng(7).normal(size=rows.nnz)
    lengths = np.sqrt(np.asarray(normalize_rows(rows).multiply(normalize_rows(rows)).sum(1)).ravel())
    has_features = np.diff(rows.indptr) > 0
    np.testing.assert_allclose(lengths[has_features], 1.0, rtol=1e-6)
    assert not lengths[~has_features].any()


def test_sums_that_are_no_numbers_do_not_lead_out_of_bounds() -> None:
    rows = random_rows(40, 60, 0.2, seed=4)
    rows.data[:] = np.where(np.arange(rows.nnz) % 2, 3e38, -3e38)
    queries = random_rows(9, 60, 0.5, seed=6)
    queries.data[:] = 1e3
    # Infinity less infinity: such a row looks new at each of its entries, of which there are far more than rows.
    found, _ = NeighborIndex(rows, random_rows(40, 5, 0.3, seed=5)).search(queries, 5)
    assert ((found >= -1) & (found < 40)).all()


@pytest.mark.parametrize("density", [0.9, 0.1])
def test_without_features_no_row_is_near(density: float) -> None:
    rows = normalize_rows(random_rows(100, 50, density, seed=3))
    index = NeighborIndex(rows, sp.csr_matrix(np.ones((100, 3), dtype=np.float32)))
    queries = sp.csr_matrix(np.vstack([np.zeros((1, 50)), rows[7].toarray()]).astype(np.float32))
    found, scores = index.search(queries, 4)
    assert found[0].tolist() == [-1] * 4 and not scores[0].any() and found[1, 0] == 7
    assert index.votes(found, scores, 0.1)[[0]].nnz == 0
    assert index.search(queries[:0], 4)[0].shape == (0, 4)
    again = pickle.loads(pickle.dumps(index))
    assert np.array_equal(again.search(queries, 4)[0], found)
