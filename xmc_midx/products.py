"""Layer 1. The product of rows with a table, by the fastest library that torch brings; rough ones in bfloat16."""

from __future__ import annotations

import platform

import torch

from xmc_midx.padding import rounded_up

__all__ = ["linear", "rough_queries", "rough_rows"]

_TILE = 32
"""Numbers of bfloat16 that a processor multiplies together."""
_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(
    rows: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None = None, *, table_varies: bool = False
) -> torch.Tensor:
    """`rows @ table.T + bias`, without a gradient: a product in the rows' dtype, and from there on in the bias's.

    torch multiplies float32 by MKL, which is slow at this product on processors that are not Intel's: oneDNN, which
    torch has too, takes half of its time there. It is oneDNN too that multiplies bfloat16 on a CPU. But it makes code
    for each shape that it meets, which takes milliseconds and 0.5 to 0.8 MB, so there are few shapes: rows are filled
    up to one of sixteen numbers between a power of two and the next (EXPERIMENTS.md, "Products" and "Precision").

    Parameters
    ----------
    rows, table : (N, D) and (L, D) of one device; the table is cast to the rows' dtype.
    bias : (L,) of any float dtype, or None for none.
    table_varies : whether L is another at each call: then the table is filled up too, which copies it.

    Returns
    -------
    (N, L) in the bias's dtype; without one, the rows'.
    """
    rows, table, bias = rows.detach(), table.detach(), None if bias is None else bias.detach()
    num_rows, num_labels = rows.shape[0], table.shape[0]
    by_onednn = _ONEDNN and rows.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    has_shapes = rows.device.type == "cpu" and (by_onednn or rows.dtype == torch.bfloat16)
    if not (has_shapes and rows.numel() and num_labels):
        return _added(rows @ table.to(rows.dtype).T, bias)
    rows, table = _filled_up(rows), _filled_up(table, rows.dtype) if table_varies else table.to(rows.dtype)
    if not by_onednn:
        return _added((rows @ table.T)[:num_rows, :num_labels], bias)
    if bias is not None and table_varies:
        bias = _filled_up(bias)
    filled: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, table, bias, "none", [], "")
    return filled[:num_rows, :num_labels]


def rough_rows(row_RK: torch.Tensor, base_R: torch.Tensor) -> torch.Tensor:
    """(R, K') bfloat16: rows (R, K) of any dtype, with what is added to their products, (R,) float32.

    The product of `rough_queries` with them is bfloat16, and what is added loses little in it. K' is K + 4, up to whole
    tiles of a processor.
    """
    size = row_RK.shape[1]
    found = torch.zeros(row_RK.shape[0], _rough_size(size), dtype=torch.bfloat16)
    found[:, :size] = row_RK
    found[:, size : size + 2] = _halves(base_R)
    found[:, size + 2 : size + 4] = 1.0
    return found


def rough_queries(query_BK: torch.Tensor, less_B: torch.Tensor | None = None) -> torch.Tensor:
    """(B', K') bfloat16: queries (B, K) as they are multiplied with `rough_rows`, and what is taken off their products,
    (B,) float32. B' is B, up to a number of few: oneDNN keeps code for each shape that it meets."""
    num_queries, size = query_BK.shape
    found = torch.zeros(rounded_up(num_queries), _rough_size(size), dtype=torch.bfloat16)
    found[:num_queries, :size] = query_BK
    found[:num_queries, size : size + 2] = 1.0
    if less_B is not None:
        found[:num_queries, size + 2 : size + 4] = _halves(-less_B)
    return found


def _rough_size(size: int) -> int:
    """Of K numbers, two that are added and two that are taken off, up to whole tiles."""
    return -(-(size + 4) // _TILE) * _TILE


def _halves(value_R: torch.Tensor) -> torch.Tensor:
    """(R, 2): float32 values as the sum of two numbers, which lose little in bfloat16."""
    high_R = value_R.bfloat16().float()
    return torch.stack([high_R, value_R - high_R], dim=1)


def _added(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product and the bias, if any, in the bias's dtype."""
    return product if bias is None else product.to(bias.dtype).add_(bias)


def _filled_up(rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The rows and zeros, to a number that is rounded up; not copied where there is nothing to do."""
    num_rows, dtype = rows.shape[0], dtype or rows.dtype
    if rounded_up(num_rows) == num_rows:
        return rows.to(dtype)
    filled = rows.new_empty(rounded_up(num_rows), *rows.shape[1:], dtype=dtype)
    filled[:num_rows] = rows
    filled[num_rows:] = 0.0
    return filled
