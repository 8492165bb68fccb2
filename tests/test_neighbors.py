"""Claims about `xmc_midx.neighbors`: exact neighbours, votes that are shares, rows that survive a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from xmc_midx import neighbors as module
from xmc_midx.data.features import normalize_rows
from xmc_midx.neighbors import NeighborIndex, save_rows


def random_rows(
    num_rows: int, num_features: int, density: float, seed: int, empty: tuple[int, ...] = ()
) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    values = rng.random((num_rows, num_features)) * (rng.random((num_rows, num_features)) < density)
    values[list(empty)] = 0.0
    return sp.csr_matrix(values.astype(np.float32))


@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_neighbours_are_those_of_a_full_scan(count: int) -> None:
    rows = normalize_rows(random_rows(53, 31, 0.15, seed=1))
    queries = normalize_rows(random_rows(17, 31, 0.15, seed=2, empty=(3,)))
    found, scores = NeighborIndex(rows, random_rows(53, 5, 0.3, seed=3)).search(queries, count)
    truth = queries.toarray().astype(np.float64) @ rows.toarray().astype(np.float64).T
    assert found.shape == scores.shape == (17, count)
    for ids, values, expected in zip(found, scores, truth, strict=True):
        kept = ids >= 0
        assert kept.sum() == min(count, np.count_nonzero(expected))
        assert len(set(ids[kept])) == kept.sum()
        np.testing.assert_allclose(values[kept], expected[ids[kept]], rtol=1e-5)
        np.testing.assert_allclose(values[kept], -np.sort(-expected)[: kept.sum()], rtol=1e-5)
    assert (found[3] == -1).all()


def test_equal_neighbours_come_in_the_order_of_their_rows() -> None:
    rows = sp.csr_matrix(np.tile(np.eye(2, dtype=np.float32)[[0]], (9, 1)))
    found, scores = NeighborIndex(rows, sp.csr_matrix(np.ones((9, 1)))).search(rows[:1], 4)
    assert found.tolist() == [[0, 1, 2, 3]]
    assert scores.tolist() == [[1.0, 1.0, 1.0, 1.0]]


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
    values[:, 0] = 1.0
    values[5, 1] = values[6, 1] = 1.0
    rows, labels = sp.csr_matrix(values), sp.csr_matrix(np.ones((40, 1)))
    query = sp.csr_matrix(np.array([[1.0, 1.0, 0.0]], dtype=np.float32))
    assert (NeighborIndex(rows, labels).search(query, 40)[0] >= 0).sum() == 40
    monkeypatch.setattr(module, "_SMALL", 10)
    assert NeighborIndex(rows, labels).search(query, 3)[0].tolist() == [[5, 6, -1]]


def test_saved_rows_give_the_same_votes(tmp_path: Path) -> None:
    rows, labels = normalize_rows(random_rows(30, 12, 0.3, seed=4)), random_rows(30, 6, 0.3, seed=5)
    save_rows(tmp_path / "rows.safetensors", rows, labels)
    before, after = NeighborIndex(rows, labels), NeighborIndex.load(tmp_path / "rows.safetensors")
    assert after.num_instances == 30
    for temperature in (0.05, 0.5):
        first = before.votes(*before.search(rows, 5), temperature)
        second = after.votes(*after.search(rows, 5), temperature)
        # Half precision keeps three digits of a value.
        np.testing.assert_allclose(first.toarray(), second.toarray(), atol=2e-2)


def test_the_rows_have_unit_length_and_empty_ones_stay() -> None:
    rows = random_rows(20, 9, 0.4, seed=6, empty=(0, 19))
    rows.data[:] = np.random.default_rng(7).normal(size=rows.nnz)
    lengths = np.sqrt(np.asarray(normalize_rows(rows).multiply(normalize_rows(rows)).sum(1)).ravel())
    has_features = np.diff(rows.indptr) > 0
    np.testing.assert_allclose(lengths[has_features], 1.0, rtol=1e-6)
    assert not lengths[~has_features].any()
