"""Layer 1. The product of rows with a table, by the fastest library that torch brings."""

from __future__ import annotations

import platform

import torch

from xmc_midx.padding import rounded_up

__all__ = ["linear"]

_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(
    rows: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None = None, *, table_varies: bool = False
) -> torch.Tensor:
    """`rows @ table.T + bias`, without a gradient.

    torch multiplies float32 by MKL, which is slow at this product on processors that are not Intel's: oneDNN, which
    torch has too, takes half of its time there (EXPERIMENTS.md, "Products"). But it keeps 0.8 MB of code for each shape
    that it meets, so there are few: rows are filled up to one of sixteen numbers between a power of two and the next.

    Parameters
    ----------
    rows, table : (N, D) and (L, D) of one dtype and device.
    bias : (L,), or None for none.
    table_varies : whether L is another at each call: then the table is filled up too, which copies it.
    """
    rows, table, bias = rows.detach(), table.detach(), None if bias is None else bias.detach()
    if not (_ONEDNN and rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.numel() and table.numel()):
        product = rows @ table.T
        return product if bias is None else product.add_(bias)
    num_rows, num_labels = rows.shape[0], table.shape[0]
    rows = _filled_up(rows)
    if table_varies:
        table, bias = _filled_up(table), None if bias is None else _filled_up(bias)
    filled: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, table, bias, "none", [], "")
    return filled[:num_rows, :num_labels]


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    """The rows and zeros, to a number that is rounded up."""
    missing = rounded_up(rows.shape[0]) - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
