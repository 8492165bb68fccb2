"""Layer 1. The product of rows with a table, by the fastest library that torch brings."""

from __future__ import annotations

import platform

import torch

__all__ = ["linear"]

_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(rows: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ table.T + bias`, without a gradient.

    torch multiplies float32 by MKL, which is slow at this product on processors that are not Intel's: oneDNN, which
    torch has too, takes half of its time there (EXPERIMENTS.md, "Products").

    Parameters
    ----------
    rows, table : (N, D) and (L, D) of one dtype and device.
    bias : (L,), or None for none.
    """
    rows, table, bias = rows.detach(), table.detach(), None if bias is None else bias.detach()
    if _ONEDNN and rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.numel() and table.numel():
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, table, bias, "none", [], "")
        return found
    product = rows @ table.T
    return product if bias is None else product.add_(bias)
