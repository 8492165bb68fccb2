"""Claims about `xmc_midx.cells` and the index on it: all effort is the exact search, less finds nearly all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xmc_midx import index as index_module
from xmc_midx.cells import LabelCells, fit_cells
from xmc_midx.index import CellIndex, Effort, insert_logits, tune_effort
from xmc_midx.quantization import StoredTable, quantize
from xmc_midx.sketches import MULTIPLIES_BYTES
from xmc_midx.types import TopK

ALL = 1 << 30


@pytest.fixture(autouse=True)
def by_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that multiplies neither bfloat16 nor bytes, whatever this one does."""
    monkeypatch.setattr(index_module, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(index_module, "MULTIPLIES_BYTES", False)


by_bytes = pytest.mark.skipif(not MULTIPLIES_BYTES, reason="a scan of sketches needs AVX512-VNNI")


def tables(
    num_labels: int, dim: int, storage: str = "int8", num_queries: int = 300
) -> tuple[StoredTable, np.ndarray, torch.Tensor, torch.Tensor]:
    """Rows in clumps, as trained ones are, queries near some of them, and as many others to measure with."""
    rng = np.random.default_rng(num_labels)
    centers = 2 * rng.normal(size=(max(1, num_labels // 20), dim))
    rows = centers[rng.integers(0, len(centers), num_labels)] + rng.normal(size=(num_labels, dim))
    stored = quantize({"t": rows.astype(np.float32)}, storage, large={"t"})
    near = rng.integers(0, num_labels, 2 * num_queries)
    queries = np.maximum(rows[near] + rng.normal(size=(2 * num_queries, dim)), 0).astype(np.float32)
    fitted, measured = torch.from_numpy(queries).split(num_queries)
    return StoredTable.take(stored, "t"), rng.normal(size=num_labels).astype(np.float32), fitted, measured


def brute_force(table: StoredTable, bias: np.ndarray, queries: torch.Tensor, k: int) -> np.ndarray:
    logits = queries.double().numpy() @ table.rows().astype(np.float64).T + bias
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.pad(order, ((0, 0), (0, k - order.shape[1])), constant_values=-1)


@pytest.mark.parametrize("storage", ["int4", "int8", "float32"])
@pytest.mark.parametrize(("num_labels", "dim"), [(1, 3), (7, 200), (900, 16), (3001, 160)])
def test_all_cells_are_the_exact_search_bit_for_bit(num_labels: int, dim: int, storage: str) -> None:
    table, bias, fitted, queries = tables(num_labels, dim, storage)
    cells = fit_cells(table, bias, fitted)
    exact = CellIndex(table, bias, cells, Effort(depth=1, width=1, recall=1.0, scan_width=1), reach="exact")
    for k in (1, 5, 12):
        expected = exact.search(queries, k)
        found = cells.search(queries, table, bias, k, depth=ALL, width=ALL)
        np.testing.assert_array_equal(expected.label_ids, brute_force(table, bias, queries, k))
        np.testing.assert_array_equal(found.label_ids, expected.label_ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
        single = cells.search(queries[:1], table, bias, k, depth=ALL, width=ALL)
        np.testing.assert_array_equal(single.label_ids, expected.label_ids[:1])


def test_the_tuned_effort_keeps_its_promise_on_other_queries_and_is_small() -> None:
    table, bias, fitted, queries = tables(6000, 48)
    cells = fit_cells(table, bias, fitted)
    effort = tune_effort(table, bias, cells, fitted)
    assert effort.recall >= 0.99 and effort.depth < 6000 / 2
    index = CellIndex(table, bias, cells, effort)

    def recall(index: CellIndex) -> float:
        """Of all queries that the effort was tuned on, not of the part that it began with."""
        hits = index.search(fitted, 5).label_ids[:, :, None] == brute_force(table, bias, fitted, 5)[:, None, :]
        return float(hits.any(axis=1).mean())

    assert recall(index) == pytest.approx(effort.recall, abs=1e-9)
    assert recall(index.with_reach("exact")) == 1.0
    found = index.search(queries, 5)
    exact = brute_force(table, bias, queries, 5)
    assert (found.label_ids[:, :, None] == exact[:, None, :]).any(axis=1).mean() > 0.97
    assert (np.diff(found.scores, axis=1) <= 0).all()
    logits = np.take_along_axis(queries.numpy() @ table.rows().T + bias, found.label_ids, axis=1)
    np.testing.assert_allclose(found.scores, logits, rtol=1e-4, atol=1e-4)


@by_bytes
def test_a_scan_has_a_width_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads all sketches, so that it needs fewer exact logits than a search by cells; stored with the index."""
    monkeypatch.setattr(index_module, "MULTIPLIES_BYTES", True)
    monkeypatch.setattr(index_module, "_FEWEST", (20, 5))
    monkeypatch.setattr(index_module, "_tune_cells", lambda *_: (900, 60, 0.99))
    table, bias, fitted, _ = tables(6000, 300)
    cells = fit_cells(table, bias, fitted)
    effort = tune_effort(table, bias, cells, fitted)
    exact = brute_force(table, bias, fitted, 5)

    def recall(width: int) -> float:
        found = cells.scan(fitted, table, bias, 5, depth=1, width=5, scan_width=width).label_ids
        return float((found[:, :, None] == exact[:, None, :]).any(axis=1).mean())

    assert 5 < effort.scan_width < effort.width == 60
    assert recall(effort.scan_width) >= 0.992 > recall(round(effort.scan_width / index_module._STEP))
    arrays = CellIndex(table, bias, cells, effort).as_arrays()
    assert CellIndex.from_arrays(table, bias, arrays).effort == effort
    widths, scan = [], LabelCells.scan

    def watched(self: LabelCells, *arguments: Any, **options: Any) -> TopK:
        widths.append((options["width"], options["scan_width"]))
        return scan(self, *arguments, **options)

    monkeypatch.setattr(LabelCells, "scan", watched)
    index = CellIndex(table, bias, cells, effort)
    for k in (5, 6, 50):
        index.search(fitted, k)
    assert widths == [(60, effort.scan_width), (60, 2 * effort.scan_width), (100, 100)]
    # Of earlier runs, and of machines that do not scan, both searches have the same.
    earlier = CellIndex.from_arrays(table, bias, arrays | {"effort": arrays["effort"][:2]}).effort
    assert (earlier.depth, earlier.width, earlier.scan_width) == (effort.depth, effort.width, effort.width)
    monkeypatch.setattr(index_module, "MULTIPLIES_BYTES", False)
    assert tune_effort(table, bias, cells, fitted).scan_width == effort.width


def test_the_effort_is_checked_on_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the part that says how it grows are easy here, and the others need more logits."""
    table, bias, fitted, _ = tables(3000, 48)
    cells = fit_cells(table, bias, fitted)
    exact = brute_force(table, bias, fitted, 5)
    asked = []

    def search(self: LabelCells, queries: torch.Tensor, *_: Any, depth: int, width: int) -> TopK:
        asked.append((len(queries), depth, width))
        if len(queries) == len(fitted):
            found = exact if width >= 250 else np.where(np.arange(len(fitted))[:, None] % 4, -1, exact)
        else:
            found = exact[::4]
        return TopK(label_ids=found, scores=np.zeros(found.shape, dtype=np.float32))

    monkeypatch.setattr(LabelCells, "search", search)
    effort = tune_effort(table, bias, cells, fitted)
    assert effort.recall == 1.0 and effort.width >= 250
    assert [number for number, *_ in asked[:2]] == [75, 300], "a fourth first, then all"


@by_bytes
def test_many_queries_are_answered_by_a_scan_of_all_sketches_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads them all, so that it finds what the search by cells does, and more; its logits are exact too."""
    table, bias, fitted, queries = tables(6000, 48)
    cells = fit_cells(table, bias, fitted)
    index = CellIndex(table, bias, cells, Effort(depth=500, width=60, recall=0.5, scan_width=60))
    exact = brute_force(table, bias, queries, 5)
    called, scan = [], LabelCells.scan

    def watched(cells: LabelCells, queries: torch.Tensor, *arguments: Any, **options: Any) -> TopK:
        called.append(len(queries))
        return scan(cells, queries, *arguments, **options)

    monkeypatch.setattr(LabelCells, "scan", watched)
    found = {}
    for is_fast in (False, True):
        monkeypatch.setattr(index_module, "MULTIPLIES_BYTES", is_fast)
        found[is_fast] = index.search(queries, 5)
        index.search(queries[:20], 5)
    assert called == [len(queries)], "few queries, or other hardware: by cells"
    called.clear()
    by_cells, by_scan = (
        (found[is_fast].label_ids[:, :, None] == exact[:, None, :]).any(axis=1).mean() for is_fast in (False, True)
    )
    assert by_scan > max(by_cells, 0.995)
    logits = np.take_along_axis(queries.numpy() @ table.rows().T + bias, found[True].label_ids, axis=1)
    np.testing.assert_allclose(found[True].scores, logits, rtol=1e-4, atol=1e-4)
    # Where cells read a small part of the labels, they are faster, the more so the fewer the queries.
    for depth, sizes in ((100, []), (260, [300]), (600, [300, 60]), (1200, [300, 60, 20])):
        called.clear()
        for size in (300, 60, 20, 3):
            CellIndex(table, bias, cells, Effort(depth=depth, width=60, recall=0.5, scan_width=60)).search(
                queries[:size], 5
            )
        assert called == sizes


def test_few_queries_are_projected_as_many_are() -> None:
    table, bias, fitted, queries = tables(900, 160)
    cells = fit_cells(table, bias, fitted)
    many = cells._short(queries)
    for few in (queries[:3], queries.T.contiguous().T[:3], queries[:7]):
        torch.testing.assert_close(cells._short(few), many[: len(few)], rtol=1e-4, atol=1e-3)


def test_all_labels_in_bfloat16_are_the_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, fitted, queries = tables(3001, 48)
    queries[5] = 0.0
    bias[:] = 0.0
    index = CellIndex(
        table, bias, fit_cells(table, bias, fitted), Effort(depth=50, width=20, recall=0.5, scan_width=20), reach="all"
    )
    asked: list[int] = []
    exact = CellIndex._exact

    def watched(index: CellIndex, queries: torch.Tensor, k: int, *excluded: torch.Tensor | None) -> TopK:
        asked.append(len(queries))
        return exact(index, queries, k, *excluded)

    expected = index.with_reach("exact").search(queries, 12)
    monkeypatch.setattr(CellIndex, "_exact", watched)
    for is_fast in (True, False):
        monkeypatch.setattr(index_module, "multiplies_bfloat16", lambda device, is_fast=is_fast: is_fast)
        found = index.search(queries, 12)
        np.testing.assert_array_equal(found.label_ids, brute_force(table, bias, queries, 12))
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert asked == [1, len(queries)], "of the query whose logits are all alike; of all, without the hardware"


@by_bytes
def test_a_query_that_the_scan_has_no_answer_to_is_searched_by_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, fitted, queries = tables(6000, 48)
    cells = fit_cells(table, bias, fitted)
    mixed = queries.clone()
    mixed[[3, 200]] = torch.full((48,), float("nan"))
    mixed[7] = 3e38
    efforts, search = [], LabelCells.search

    def watched(self: LabelCells, *arguments: Any, depth: int, width: int) -> TopK:
        efforts.append((depth, width))
        return search(self, *arguments, depth=depth, width=width)

    monkeypatch.setattr(LabelCells, "search", watched)
    found = cells.scan(mixed, table, bias, 5, depth=900, width=90, scan_width=60)
    assert efforts == [(900, 90)]
    usual = np.delete(np.arange(len(queries)), [3, 7, 200])
    expected = cells.scan(queries, table, bias, 5, depth=900, width=90, scan_width=60)
    np.testing.assert_array_equal(found.label_ids[usual], expected.label_ids[usual])
    by_cells = cells.search(mixed[[3, 7, 200]], table, bias, 5, depth=900, width=90)
    np.testing.assert_array_equal(found.label_ids[[3, 7, 200]], by_cells.label_ids)


def test_lists_and_many_results_are_answered_exactly() -> None:
    table, bias, fitted, queries = tables(500, 16)
    index = CellIndex(
        table, bias, fit_cells(table, bias, fitted), Effort(depth=60, width=20, recall=1.0, scan_width=20)
    )
    allow, deny = torch.arange(100, 130), torch.arange(120, 400)
    found = index.search(queries, 30, allow=allow, deny=deny)
    assert set(found.label_ids[:, :20].ravel()) == set(range(100, 120)) and (found.label_ids[:, 20:] == -1).all()
    assert np.isneginf(found.scores[:, 20:]).all()
    many, expected = index.search(queries, 400).label_ids, brute_force(table, bias, queries, 400)
    # Of logits that are equal but for float32's last bits, either label may be first.
    logits = queries.double().numpy() @ table.rows().astype(np.float64).T + bias
    assert all(len(set(row)) == 400 for row in many.tolist()) and (many == expected).mean() > 0.999
    by_rank = [np.take_along_axis(logits, ids, axis=1) for ids in (many, expected)]
    np.testing.assert_allclose(*by_rank, atol=1e-5)


def test_labels_that_the_search_missed_are_added_by_their_logits() -> None:
    table, bias, fitted, queries = tables(400, 16)
    index = CellIndex(
        table, bias, fit_cells(table, bias, fitted), Effort(depth=400, width=400, recall=1.0, scan_width=400)
    )
    exact = index.search(queries, 10)
    kept = np.delete(exact.label_ids, [1, 4], axis=1)
    top = TopK(label_ids=kept, scores=np.delete(exact.scores, [1, 4], axis=1))
    # Those that are there already and a poor one change nothing but the places of the two.
    for row, ids in enumerate(exact.label_ids):
        insert_logits(queries[row].numpy(), table.arrays, bias, ids, top.label_ids[row], top.scores[row])
    np.testing.assert_array_equal(top.label_ids, exact.label_ids[:, :8])
    np.testing.assert_array_equal(top.scores, exact.scores[:, :8])


def test_no_query_and_odd_queries() -> None:
    table, bias, fitted, queries = tables(900, 16)
    cells = fit_cells(table, bias, fitted)
    assert cells.search(queries[:0], table, bias, 3, depth=50, width=9).label_ids.shape == (0, 3)
    odd = [torch.full((1, 16), value) for value in (0.0, 1e20, 3e38, float("inf"), float("nan"))]
    for query in [*odd, 1e38 * queries[:1]]:
        found = cells.search(query, table, bias, 3, depth=50, width=9)
        assert (found.label_ids >= -1).all() and (found.label_ids < 900).all()


def test_without_queries_the_effort_is_the_least_and_no_search_is_a_scan() -> None:
    table, bias, fitted, _ = tables(1000, 48)
    cells = fit_cells(table, bias, fitted)
    effort = tune_effort(table, bias, cells, fitted[:0])
    assert (effort.depth, effort.width) == (1000, 100)
    # Where no effort is enough, it ends where a search scans all labels anyway.
    shuffled = fit_cells(table, bias, fitted)
    shuffled.sketches[:] = np.random.default_rng(0).permutation(shuffled.sketches)
    effort = tune_effort(table, bias, shuffled, fitted[:50])
    assert effort.depth <= 1000 and effort.width <= 0.5 * 1000 * 1.4 + 1


@pytest.mark.parametrize("name", ["offsets", "label_ids", "sketches", "cell_means"])
def test_arrays_that_do_not_fit_are_refused(name: str) -> None:
    table, bias, fitted, _ = tables(300, 16)
    arrays = fit_cells(table, bias, fitted).as_arrays()
    assert LabelCells.from_arrays(arrays, 300, 16).num_labels == 300
    older = arrays | {"cell_means": arrays["cell_means"].astype(np.float32) + np.float32(0.3)}
    np.testing.assert_array_equal(LabelCells.from_arrays(older, 300, 16).cell_means, arrays["cell_means"])
    for damaged in (arrays[name][:-1], arrays[name].astype(np.float64), arrays[name] + 1):
        if (
            name in ("sketches", "cell_means")
            and damaged.dtype == arrays[name].dtype
            and len(damaged) == len(arrays[name])
        ):
            continue  # other numbers, but sound ones
        with pytest.raises(ValueError, match="fit together"):
            LabelCells.from_arrays(arrays | {name: damaged}, 300, 16)


def test_more_results_compute_more_logits_and_do_not_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, fitted, queries = tables(1000, 48)
    cells = fit_cells(table, bias, fitted)
    index = CellIndex(table, bias, cells, Effort(depth=400, width=50, recall=0.99, scan_width=50))
    exact = brute_force(table, bias, queries, 5)
    monkeypatch.setattr(CellIndex, "_exact", lambda *_: pytest.fail("all labels are scanned"))
    top = index.search(queries, 100)
    assert (top.label_ids >= 0).all()
    assert (top.label_ids[:, :5, None] == exact[:, None, :]).any(axis=1).mean() > 0.97
