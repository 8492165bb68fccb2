"""Claims about `xmc_midx.products`: the product of float64, whatever the library, layout and shape."""

from __future__ import annotations

import pytest
import torch

from xmc_midx import products
from xmc_midx.products import linear


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_labels", "dim"), [(1, 1, 1), (7, 13, 5), (33, 257, 64), (0, 9, 4), (5, 0, 4)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_product_is_that_of_float64(
    num_rows: int, num_labels: int, dim: int, dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ONEDNN", products._ONEDNN and onednn)
    generator = torch.Generator().manual_seed(num_rows)
    rows, table, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((num_rows, dim), (num_labels, dim), (num_labels,))
    )
    expected = rows.detach().double() @ table.detach().double().T
    rounding = {torch.bfloat16: 2.0**-8, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    # Of the product: what is added may take most of it away again.
    tolerance = {"rtol": rounding, "atol": rounding * float(expected.abs().max()) if expected.numel() else 0.0}
    found = linear(rows, table)
    assert found.dtype == dtype and not found.requires_grad
    torch.testing.assert_close(found.double(), expected, **tolerance)
    for varies in (False, True):
        found = linear(rows, table, bias, table_varies=varies)
        torch.testing.assert_close(found.double(), expected + bias.detach().double(), **tolerance)


def test_a_bfloat16_product_is_added_to_in_the_dtype_of_what_is_added() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 20, generator=generator).bfloat16()
    table, bias = torch.randn(31, 20, generator=generator), 100.0 + torch.randn(31, generator=generator)
    for varies in (False, True):
        found = linear(rows, table, bias, table_varies=varies)
        assert found.dtype == torch.float32 and found.shape == (9, 31)
        expected = (rows.float() @ table.bfloat16().float().T).bfloat16().float() + bias
        # Products below 32 are off by an eighth at most; near 100, bfloat16's own numbers are a half apart.
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2.0**-3)


def test_a_bias_of_another_dtype_is_added_in_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, table = torch.randn(9, 20, generator=generator), torch.randn(31, 20, generator=generator).double()
    bias = torch.randn(31, generator=generator, dtype=torch.float64)
    for varies in (False, True):
        found = linear(rows, table, bias, table_varies=varies)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, rows.double() @ table.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pools_of_all_sizes_are_products_of_few_shapes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN makes for a shape takes longer than the product itself: 3 ms in bfloat16 became 12."""
    shapes, fill = set(), products._filled_up

    def watched(rows: torch.Tensor, *dtype: torch.dtype) -> torch.Tensor:
        filled = fill(rows, *dtype)
        shapes.add(filled.shape)
        return filled

    monkeypatch.setattr(products, "_ONEDNN", products._ONEDNN or dtype == torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda rows, table, *_: rows @ table.T, raising=False)
    monkeypatch.setattr(products, "_filled_up", watched)
    rows, table = torch.ones(64, 3, dtype=dtype), torch.ones(2048, 3)
    for size in range(1025, 2049):
        found = linear(rows, table[:size].to(torch.float32), table_varies=True)
        assert found.shape == (64, size)
    assert len(shapes) == 1 + 16


def test_few_shapes_are_met_and_none_is_much_larger_than_asked_for() -> None:
    sizes = [len(products._filled_up(torch.ones(count, 1))) for count in range(1, 5000)]
    assert all(count <= size <= 1.07 * count for count, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 16 * 10
    filled = products._filled_up(torch.ones(33, 2))
    assert filled.shape == (34, 2) and filled.sum() == 66


def test_rows_and_tables_may_lie_anyhow() -> None:
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(40, 60, generator=generator)
    rows, table = whole[::2, 3:20], whole[:, 30:47].T.contiguous().T[5:]
    torch.testing.assert_close(linear(rows, table), rows @ table.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        linear(rows, table, whole[0, 1:36]), rows @ table.T + whole[0, 1:36], rtol=1e-4, atol=1e-4
    )
