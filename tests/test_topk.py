"""Exact top-k: brute force with ties to the smaller id, whatever the chunks, and the index that wraps it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xmc_midx import topk as topk_module
from xmc_midx.index import ExactIndex
from xmc_midx.topk import exact_topk, merge_topk
from xmc_midx.types import TopK


def brute_force(scores_NL: np.ndarray, k: int, excluded: set[int] = frozenset()) -> TopK:  # type: ignore[assignment]
    """Python's sort of (-score, id), row by row."""
    result = TopK.empty(scores_NL.shape[0], k)
    for i, row in enumerate(scores_NL):
        ranking = sorted((-score, label) for label, score in enumerate(row.tolist()) if label not in excluded)[:k]
        for place, (negative, label) in enumerate(ranking):
            result.label_ids[i, place], result.scores[i, place] = label, -negative
    return result


def assert_same(found: TopK, expected: TopK) -> None:
    assert found.label_ids.dtype == np.int64 and found.scores.dtype == np.float32
    np.testing.assert_array_equal(found.label_ids, expected.label_ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


def integers(*shape: int, low: int = -2, high: int = 3, seed: int = 0) -> torch.Tensor:
    """Small integers in float32: their products are exact and tie often."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture(params=["one chunk", "small chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small chunks":
        monkeypatch.setattr(topk_module, "_LABEL_CHUNK", 6)
        monkeypatch.setattr(topk_module, "_CHUNK_ELEMENTS", 20)


@pytest.mark.usefixtures("chunks")
class TestExactTopK:
    @pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 22, 23, 30])
    @pytest.mark.parametrize("with_bias", [True, False])
    def test_ties_go_to_the_smaller_id(self, k: int, with_bias: bool) -> None:
        query, table = integers(11, 3), integers(23, 3, seed=1)
        bias = integers(23, seed=2) if with_bias else None
        scores = (query @ table.T + (0 if bias is None else bias)).numpy()
        assert len(np.unique(scores)) < 30, "there are many ties"
        assert_same(exact_topk(query, table, bias, k), brute_force(scores, k))

    @pytest.mark.parametrize("k", [1, 4, 23])
    def test_scores_without_ties_fall(self, k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        query, table = torch.randn(7, 5, generator=generator), torch.randn(23, 5, generator=generator)
        assert_same(exact_topk(query, table, None, k), brute_force((query @ table.T).numpy(), k))

    def test_all_scores_equal(self) -> None:
        found = exact_topk(torch.zeros(3, 2), torch.ones(23, 2), None, 9)
        assert found.label_ids.tolist() == [list(range(9))] * 3

    def test_more_results_than_labels_are_padded(self) -> None:
        found = exact_topk(integers(2, 3), integers(4, 3), None, 7)
        assert (found.label_ids[:, 4:] == -1).all() and np.isneginf(found.scores[:, 4:]).all()
        assert (np.sort(found.label_ids[:, :4]) == np.arange(4)).all()

    @pytest.mark.parametrize("k", [1, 3, 30])
    @pytest.mark.parametrize("excluded", [{0}, {0, 1, 2, 3, 4, 5, 9}, set(range(23)) - {8}, set(range(23))])
    def test_excluded_labels_are_never_returned(self, k: int, excluded: set[int]) -> None:
        query, table, bias = integers(5, 3), integers(23, 3, seed=1), integers(23, seed=2)
        mask = torch.tensor([label in excluded for label in range(23)])
        found = exact_topk(query, table, bias, k, excluded_L=mask)
        assert_same(found, brute_force((query @ table.T + bias).numpy(), k, excluded))

    def test_no_instances_give_no_rows(self) -> None:
        found = exact_topk(torch.empty(0, 3), integers(23, 3), None, 4)
        assert found.label_ids.shape == found.scores.shape == (0, 4)

    def test_one_label(self) -> None:
        found = exact_topk(integers(2, 3), integers(1, 3), None, 1)
        assert found.label_ids.tolist() == [[0], [0]]


def test_merging_keeps_the_best_of_both_and_the_tie_rule() -> None:
    left = torch.tensor([[4, 9]]), torch.tensor([[2.0, 1.0]])
    right = torch.tensor([[7, 3, 1]]), torch.tensor([[3.0, 2.0, 0.0]])
    for first, second in ((left, right), (right, left)):
        ids, scores = merge_topk(first, second, 3)
        assert ids.tolist() == [[7, 3, 4]] and scores.tolist() == [[3.0, 2.0, 2.0]]
    ids, _ = merge_topk(left, right, 9)
    assert ids.tolist() == [[7, 3, 4, 9, 1]]


def test_an_empty_result_is_all_pads() -> None:
    result = TopK.empty(2, 3)
    assert (result.label_ids == -1).all() and np.isneginf(result.scores).all()


class TestExactIndex:
    query, table, bias = integers(4, 3), integers(23, 3, seed=1), integers(23, seed=2)

    def search(self, k: int, allow: list[int] | None = None, deny: list[int] | None = None) -> TopK:
        index = ExactIndex(self.table, self.bias)
        assert index.num_labels == 23
        tensors = [None if ids is None else torch.tensor(ids, dtype=torch.int64) for ids in (allow, deny)]
        return index.search(self.query, k, allow=tensors[0], deny=tensors[1])

    @pytest.mark.parametrize(
        ("allow", "deny", "left"),
        [
            (None, None, set(range(23))),
            ([3, 3, 20, 1], None, {1, 3, 20}),
            (None, [0, 22], set(range(1, 22))),
            ([1, 2, 3], [2, 9], {1, 3}),
            ([], None, set()),
            (None, [], set(range(23))),
            ([5], [5], set()),
        ],
    )
    def test_only_what_is_allowed_and_not_denied_is_found(
        self, allow: list[int] | None, deny: list[int] | None, left: set[int]
    ) -> None:
        scores = (self.query @ self.table.T + self.bias).numpy()
        assert_same(self.search(5, allow, deny), brute_force(scores, 5, set(range(23)) - left))
