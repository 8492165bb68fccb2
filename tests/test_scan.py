"""Claims about `xmc_midx.scan`: one product in bfloat16 finds the exact best, and says of which queries it cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xmc_midx import scan as module
from xmc_midx.products import rough_queries, rough_rows
from xmc_midx.quantization import StoredTable
from xmc_midx.scan import Lists, scan_topk
from xmc_midx.types import TopK


def tables(num_labels: int, dim: int, num_queries: int = 133) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_labels + dim)
    return (
        torch.randn(num_labels, dim, generator=generator),
        torch.randn(num_labels, generator=generator) - 8.0,
        torch.randn(num_queries, dim, generator=generator),
    )


def scan(
    table: torch.Tensor, bias: torch.Tensor, queries: torch.Tensor, k: int, width: int, order: np.ndarray | None = None
) -> tuple[TopK, np.ndarray]:
    """With the rows themselves as rough ones, those of `order` if it is another than the ids'; and which queries are
    left to another search, which finds nothing."""
    ids = np.arange(len(bias)) if order is None else order
    rough = rough_rows(table, bias)[ids]
    stored, labels = StoredTable.of(table.numpy()), ids.astype(np.int32)
    left = np.empty(0, dtype=np.int64)

    def otherwise(rows: np.ndarray) -> TopK:
        nonlocal left
        left = rows
        return TopK.empty(len(rows), k)

    def above(part: slice, wanted: int) -> Lists:
        return module.list_rough(queries[part], rough.__getitem__, len(ids), wanted)

    how = {"above": above, "label_ids": labels, "width": width, "otherwise": otherwise}
    return scan_topk(queries, stored, bias.numpy(), k, **how), left  # type: ignore[arg-type]


def brute_force(
    table: torch.Tensor, bias: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[np.ndarray, np.ndarray]:
    logits = (queries.double() @ table.double().T + bias.double()).numpy()
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(logits, order, axis=1)


@pytest.mark.parametrize(("num_labels", "dim"), [(501, 3), (4097, 40), (9001, 130)])
@pytest.mark.parametrize("k", [1, 5, 23])
def test_the_exact_best_and_their_logits(num_labels: int, dim: int, k: int) -> None:
    table, bias, queries = tables(num_labels, dim)
    found, left = scan(table, bias, queries, k, k + 32)
    assert len(left) < len(queries) / 20, "an exception"
    answered = np.delete(np.arange(len(queries)), left)
    ids, logits = brute_force(table, bias, queries, k)
    np.testing.assert_array_equal(found.label_ids[answered], ids[answered])
    np.testing.assert_allclose(found.scores[answered], logits[answered], rtol=1e-4, atol=1e-4)
    assert (found.label_ids[left] == -1).all() and np.isneginf(found.scores[left]).all()


def test_parts_and_the_order_of_the_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, queries = tables(3001, 24)
    expected, left = scan(table, bias, queries, 7, 60)
    order = np.random.default_rng(0).permutation(3001)
    for rows, at_once in ((7, 1 << 10), (63, 50), (1000, 1), (1 << 12, 1 << 10)):
        monkeypatch.setattr(module, "_ROWS", rows)
        monkeypatch.setattr(module, "_QUERIES", at_once)
        found, again = scan(table, bias, queries, 7, 60)
        np.testing.assert_array_equal(again, left)
        np.testing.assert_array_equal(found.label_ids, expected.label_ids)
        found, again = scan(table, bias, queries, 7, 60, order)
        both = np.setdiff1d(np.arange(len(queries)), np.union1d(left, again))
        assert len(both) > 100
        np.testing.assert_array_equal(found.label_ids[both], expected.label_ids[both])


def test_a_sample_that_misleads_is_noticed_or_does_no_harm() -> None:
    """One row in so many is looked at beforehand: where these alone are good, too few others are above; where these
    alone are bad, all others are, in a list that cannot hold them."""
    generator = torch.Generator().manual_seed(0)
    table, bias, queries = torch.rand(4000, 5, generator=generator), torch.zeros(4000), torch.ones(150, 5)
    sampled = torch.arange(4000) % module._EVERY == 0
    table[:, 1:] = 0.0
    good, bad = table.clone(), table.clone()
    good[sampled, 0] += 1000.0
    _, left = scan(good, bias, queries, 5, 300)
    np.testing.assert_array_equal(left, np.arange(150))
    bad[sampled, 0] -= 10.0
    # In rising order, few of them alike in bfloat16: the list is full again and again.
    bad[~sampled, 0] = torch.linspace(0.0, 90.0, int((~sampled).sum()))
    found, left = scan(bad, bias, queries, 5, 300)
    assert not len(left)
    np.testing.assert_array_equal(found.label_ids, brute_force(bad, bias, queries, 5)[0])


@pytest.mark.parametrize(
    "queries",
    [
        pytest.param(torch.zeros(3, 16), id="all rows alike"),
        pytest.param(torch.full((2, 16), float("nan")), id="nan"),
        pytest.param(torch.full((2, 16), float("inf")), id="inf"),
        pytest.param(torch.full((2, 16), 3e38), id="products that overflow"),
    ],
)
def test_queries_without_a_ranking_are_left(queries: torch.Tensor) -> None:
    table, _, usual = tables(2000, 16)
    found, left = scan(table, torch.zeros(2000), torch.cat([usual, queries]), 3, 40)
    assert set(range(len(usual), len(usual) + len(queries))) <= set(left)
    assert ((found.label_ids >= -1) & (found.label_ids < 2000)).all()


def test_more_rows_alike_than_a_list_holds_are_left() -> None:
    table, bias, queries = tables(5000, 16)
    table[1000:4000], bias[1000:4000] = 1.0, 5.0
    queries = queries.abs()
    _, left = scan(table, bias, queries, 3, 40)
    np.testing.assert_array_equal(left, np.arange(len(queries)))
    # A few of them do no harm: ties go to the smaller id.
    table[1100:4000], bias[1100:4000] = -1.0, -20.0
    found, left = scan(table, bias, queries, 3, 200)
    answered = np.delete(np.arange(len(queries)), left)
    assert len(answered) > 100
    np.testing.assert_array_equal(found.label_ids[answered], np.tile([1000, 1001, 1002], (len(answered), 1)))


@pytest.mark.parametrize("width", [1, 2, 5, 9, 15, 16, 40])
def test_a_list_that_is_full_of_rows_alike_has_room_for_another_group(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it may be kept where its rows are alike: then a whole group comes at once. Not compiled, where a place
    beyond the list is an IndexError."""
    monkeypatch.setattr(module, "reaching", lambda bits, first, above: module._tail(bits[: first + 64], first, above))
    monkeypatch.setattr(module, "_tail", module._tail.py_func)
    monkeypatch.setattr(module, "lowest", lambda word: (int(word) & -int(word)).bit_length() - 1)
    places, rng = module._places(width), np.random.default_rng(width)
    for _ in range(60):
        num_groups = 4 + places // 16
        # Groups of few or many rows, all of a group alike, better from group to group.
        bits = np.repeat(np.arange(num_groups) * 100, 64).astype(np.int16)
        bits[rng.random(bits.size) < np.repeat(rng.choice([0.0, 0.3, 0.8], num_groups), 64)] = -1
        lists = np.zeros(1, dtype=np.int64), np.empty((1, places), np.int32), np.empty((1, places), np.float32)
        module._collect.py_func(bits[None], 0, np.zeros(1, dtype=np.int16), lists, width, 0, 1)
        count = lists[0][0]
        assert count == -1 or count <= places


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 128, 1001])
def test_what_comes_up_to_a_score_is_listed(num_rows: int) -> None:
    """Bit by bit against a comparison, from no row of a word to all 64, and the least number of 16 bits."""
    rng = np.random.default_rng(num_rows)
    share = rng.choice([0.0, 0.02, 0.5, 1.0], size=(40, 1))
    bits = np.where(rng.random((40, num_rows)) < share, rng.integers(50, 1 << 15, (40, num_rows)), 49).astype(np.int16)
    bits[rng.random(bits.shape) < 0.1] = -(1 << 15)
    lists = np.zeros(40, dtype=np.int64), np.empty((40, 4200), np.int32), np.empty((40, 4200), np.float32)
    module._collect(bits, 7000, np.full(40, 50, dtype=np.int16), lists, 1000, 0, 40)
    for row in range(40):
        expected = np.flatnonzero(bits[row] >= 50)
        assert lists[0][row] == len(expected)
        np.testing.assert_array_equal(lists[1][row, : len(expected)], 7000 + expected)
        np.testing.assert_array_equal(lists[2][row, : len(expected)], bits[row, expected])


def test_many_results_are_found_in_parts_of_few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, queries = tables(9000, 8)
    expected, left = scan(table, bias, queries, 100, 200)
    asked, find = [], module.list_rough
    monkeypatch.setattr(module, "_PLACES", 10 * module._places(200) + 1)

    def watched(short: torch.Tensor, *rest: Any) -> Lists:
        asked.append(len(short))
        return find(short, *rest)

    monkeypatch.setattr(module, "list_rough", watched)
    found, again = scan(table, bias, queries, 100, 200)
    assert sum(asked) == 133 and max(asked) == 10 and len(asked) == 14
    np.testing.assert_array_equal(again, left)
    np.testing.assert_array_equal(found.label_ids, expected.label_ids)


def test_no_query_few_rows() -> None:
    table, bias, queries = tables(40, 8)
    found, left = scan(table, bias, queries[:0], 3, 9)
    assert found.label_ids.shape == (0, 3) and not len(left)
    np.testing.assert_array_equal(scan(table, bias, queries, 3, 40)[1], np.arange(len(queries)))


def test_what_is_added_keeps_sixteen_bits_in_the_product() -> None:
    _, bias, queries = tables(300, 8)
    bias *= 100.0
    rough = rough_rows(torch.zeros(300, 8), bias)
    assert rough.dtype == torch.bfloat16 and rough.shape == (300, 32) and not rough[:, 12:].any()
    query = rough_queries(queries[:1])[0]
    np.testing.assert_allclose(rough.double() @ query.double(), bias.double(), rtol=2.0**-16)
    less = rough_queries(queries[:3], bias[:3])
    np.testing.assert_allclose((less.double() @ rough[:3].double().T).diagonal(), np.zeros(3), atol=2.0**-9)


def test_batches_of_all_sizes_are_products_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps some 0.8 MB for each shape that it meets."""
    table, bias, queries = tables(1000, 8, 1024)
    shapes, product = set(), module._bits

    def watched(query_BK: torch.Tensor, rough_RK: torch.Tensor, *memory: torch.Tensor) -> np.ndarray:
        shapes.add((query_BK.shape, rough_RK.shape))
        return product(query_BK, rough_RK, *memory)

    monkeypatch.setattr(module, "_bits", watched)
    for size in range(513, 1025, 7):
        scan(table, bias, queries[:size], 1, 20)
    assert len(shapes) == 2 * 16
