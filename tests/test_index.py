"""Claims about `xmc_midx.index`: the rough scan finds what the exact one finds, with the exact logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xmc_midx import device, topk
from xmc_midx import index as module
from xmc_midx.index import ExactIndex, HalfPrecisionIndex, ScanIndex, build_index


def tables(num_labels: int, dim: int = 24, num_queries: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_labels)
    return (
        torch.randn(num_labels, dim, generator=generator),
        torch.randn(num_labels, generator=generator),
        torch.randn(num_queries, dim, generator=generator),
    )


@pytest.mark.parametrize("kind", [HalfPrecisionIndex, ScanIndex])
@pytest.mark.parametrize("num_labels", [1, 7, 30, 1000, 5003])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_rough_scan_finds_the_exact_best_and_their_logits(
    num_labels: int, k: int, kind: type[HalfPrecisionIndex | ScanIndex]
) -> None:
    table, bias, queries = tables(num_labels, num_queries=137)
    exact = ExactIndex(table, bias).search(queries, k)
    found = kind(table, bias).search(queries, k)
    np.testing.assert_array_equal(found.label_ids, exact.label_ids)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-5, atol=1e-5)


def test_chunks_and_lists_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, queries = tables(801)
    allow, deny = torch.arange(100, 160), torch.arange(150, 900)[:600]
    expected = ExactIndex(table, bias).search(queries, 60, allow=allow, deny=deny)
    assert (expected.label_ids == -1).any() and set(expected.label_ids.ravel()) <= {-1, *range(100, 150)}
    for elements in (1, 3000, 1 << 24):
        monkeypatch.setattr(topk, "_CHUNK_ELEMENTS", elements)
        found = HalfPrecisionIndex(table, bias).search(queries, 60, allow=allow, deny=deny)
        np.testing.assert_array_equal(found.label_ids, expected.label_ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    found = ScanIndex(table, bias).search(torch.cat([queries] * 4), 60, allow=allow, deny=deny)
    np.testing.assert_array_equal(found.label_ids, np.tile(expected.label_ids, (4, 1)))
    for kind in (HalfPrecisionIndex, ScanIndex):
        assert kind(table, bias).search(queries[:0], 3).label_ids.shape == (0, 3)


def test_a_query_that_the_scan_has_no_answer_to_is_answered_exactly() -> None:
    table, bias, queries = tables(5003, num_queries=140)
    queries[5] = 0.0
    bias[:] = 0.0
    found = ScanIndex(table, bias).search(queries, 6)
    np.testing.assert_array_equal(found.label_ids, ExactIndex(table, bias).search(queries, 6).label_ids)
    np.testing.assert_array_equal(found.label_ids[5], np.arange(6))


def test_ties_of_exact_logits_go_to_the_smaller_id() -> None:
    table, bias = torch.ones(50, 4), torch.zeros(50)
    found = HalfPrecisionIndex(table, bias).search(torch.ones(2, 4), 10)
    assert (np.diff(found.label_ids, axis=1) > 0).all(), "rising, among those that the scan found"


def test_products_are_bfloat16_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for is_fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda is_fast=is_fast: is_fast, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda is_fast=is_fast: is_fast)
        fast = torch.bfloat16 if is_fast else torch.float32
        for where in (cpu, cuda):
            assert device.multiplies_bfloat16(where) == is_fast
            assert device.find_precision("auto", where, 4096) == fast
            assert device.find_precision("bfloat16", where, 10) == torch.bfloat16
            assert device.find_precision("float32", where, 4096) == torch.float32
        assert device.find_precision("auto", cpu, 4095) == torch.float32, "takes no longer"
        assert device.find_precision("auto", cuda, 4095) == fast


def test_the_rough_scan_is_for_many_labels_and_fast_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, _ = tables(60)
    monkeypatch.setattr(module, "_MIN_LABELS", {"cpu": 50})
    for is_fast, kind in ((True, ScanIndex), (False, ExactIndex)):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device, is_fast=is_fast: is_fast)
        assert type(build_index(table, bias)) is kind
        assert type(build_index(table, bias, exact=True)) is ExactIndex
        assert type(build_index(table[:40], bias[:40])) is ExactIndex
