"""Layer 1. Row-sparse differentiation: read a few rows of a large table, and return a gradient for those rows only.

`bag_rows` and `gather_rows` give `weight.grad` as a `torch.sparse_coo_tensor` with unique, rising row ids, which the
optimisers of `xmc_midx.optim` and `torch.optim.SparseAdam` take. Nothing of the size of the table is allocated.
Measured in EXPERIMENTS.md ("Row gathers"): torch's own `embedding_bag` is as fast on two CPU cores as fused numba
kernels, so there are none here. Where there are Triton's kernels (`device.has_kernels`), they sum the bags, shapes are
static, and the row ids of a gradient end in pads, the number of the table's rows (`xmc_midx.padding`), which `RowAdam`
alone leaves alone; so do those of `gather_rows` of parts with pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled
from xmc_midx.device import has_kernels
from xmc_midx.padding import distinct_sorted, owners
from xmc_midx.types import SparseRows

__all__ = ["bag_gradient", "bag_rows", "gather_rows", "sparse_rows", "transpose"]


def sparse_rows(features: csr_matrix) -> SparseRows:
    """A CSR matrix (B, F) as the record that the encoder takes; float32 values are shared, not copied."""
    return SparseRows(
        feature_ids=torch.from_numpy(features.indices.astype(np.int64)),
        values=torch.from_numpy(features.data.astype(np.float32, copy=False)),
        offsets=torch.from_numpy(features.indptr.astype(np.int64)),
    )


def gather_rows(weight: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """`weight[row_ids]` for each of the parts, with one row-sparse gradient: a row may be in several.

    The table may lie in the host's memory and the row ids on a device: then the rows of all parts move there, each
    once, and their gradient comes back.

    Parameters
    ----------
    weight : (R, D) or (R,) float.
    parts : each (U,) int64, unique and rising; a single one may end in pads, R.

    Returns
    -------
    (U, D) or (U,) of weight's dtype, for each part, where its row ids are; what stands for a pad is some row.
    """
    return _GatherRows.apply(weight, *parts)  # type: ignore[no-any-return,no-untyped-call]


def bag_rows(weight: torch.Tensor, rows: SparseRows) -> torch.Tensor:
    """The product of sparse rows with a table, with a row-sparse gradient.

    Equals `csr_array((values, feature_ids, offsets)) @ weight`; an empty row gives zeros.

    Parameters
    ----------
    weight : (F, D) float32.
    rows : B sparse rows over F columns, perhaps with pads behind them.

    Returns
    -------
    (B, D) float32.
    """
    ids, values = _entries(rows)
    return _BagRows.apply(weight, ids, values, rows.offsets)  # type: ignore[no-any-return,no-untyped-call]


def transpose(rows: SparseRows, num_features: int) -> tuple[torch.Tensor, SparseRows]:
    """The features of B rows, and the instances of each.

    Returns
    -------
    (U,) int64, rising; pads, F, at the end where shapes are static. And U rows over the B instances: the gradient of a
    table by `bag_rows` is their product with the gradients of the bags.
    """
    ids, values = _entries(rows)
    by_kernel = has_kernels(ids.device)
    if ids.device.type == "cpu" and not by_kernel and values.dtype == torch.float32:
        return _transposed_on_host(ids.numpy(), values.numpy(), rows.offsets.numpy())
    transposed = _transposed_padded if by_kernel else _transposed
    row_ids, offsets, order, instance = transposed(ids, rows.offsets, num_features)
    return row_ids, SparseRows(feature_ids=instance[order], values=values[order], offsets=offsets)


def bag_gradient(rows: SparseRows, grad_BD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The row-sparse gradient (F, D) of a table by `bag_rows`, from the gradients (B, D) of the bags."""
    row_ids, instances = transpose(rows, shape[0])
    grad_UD = _bag(instances.feature_ids, grad_BD.contiguous(), instances.values, instances.offsets)
    return _row_gradient(row_ids, grad_UD, shape, has_pads=has_kernels(grad_BD.device))


def _entries(rows: SparseRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values; without pads where there is no kernel, which alone leaves them alone."""
    if has_kernels(rows.offsets.device):
        return rows.feature_ids, rows.values
    size = int(rows.offsets[-1])
    return rows.feature_ids[:size], rows.values[:size]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*parts)
        ctx.shape, ctx.device = weight.shape, weight.device
        if not _lies_apart(weight, parts[0]):
            # Pads read the last row.
            return tuple(weight.index_select(0, row_ids.clamp(max=weight.shape[0] - 1)) for row_ids in parts)
        row_ids = torch.unique(torch.cat(parts))
        rows = _moved_rows(weight, row_ids)
        return tuple(rows.index_select(0, torch.searchsorted(row_ids, part)) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = ctx.saved_tensors
        row_ids, total = parts[0], grads[0]
        if len(parts) > 1:
            row_ids = torch.unique(torch.cat(parts))
            # What several parts give a row is summed before it is rounded to the table's dtype.
            wide = torch.promote_types(grads[0].dtype, torch.float32)
            total = grads[0].new_zeros(row_ids.shape[0], *ctx.shape[1:], dtype=wide)
            for part, grad in zip(parts, grads, strict=True):
                total.index_add_(0, torch.searchsorted(row_ids, part), grad.to(wide))
            total = total.to(grads[0].dtype)
        return _row_gradient(row_ids.to(ctx.device), total.to(ctx.device), ctx.shape), *(None for _ in parts)


class _BagRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, feature_ids: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(feature_ids, values, offsets)
        ctx.shape = weight.shape
        return _bag(feature_ids, weight, values, offsets)

    @staticmethod
    def backward(ctx: Any, grad_BD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        feature_ids, values, offsets = ctx.saved_tensors
        rows = SparseRows(feature_ids=feature_ids, values=values, offsets=offsets)
        return bag_gradient(rows, grad_BD, ctx.shape), None, None, None


def _transposed(
    feature_ids: torch.Tensor, offsets: torch.Tensor, num_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The features that are there (U,), where each begins (U+1,) in the order (n,) of the entries by feature, and the
    instance of each entry (n,), not in that order."""
    sorted_ids, order = torch.sort(feature_ids, stable=True)
    row_ids, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    instance = torch.repeat_interleave(
        torch.arange(offsets.shape[0] - 1, device=offsets.device), offsets.diff(), output_size=feature_ids.shape[0]
    )
    row_offsets = torch.zeros(row_ids.shape[0] + 1, dtype=torch.int64, device=offsets.device)
    torch.cumsum(counts, 0, out=row_offsets[1:])
    return row_ids, row_offsets, order, instance


def _transposed_on_host(ids: Any, values: Any, offsets: Any) -> tuple[torch.Tensor, SparseRows]:
    """As `transpose`, of ids below 2^31. NumPy's sort of numbers is quicker than torch's, which has to say where each
    went (EXPERIMENTS.md, "Row gathers"): so each id brings its place along."""
    keys = (ids.astype(np.int64, copy=False) << 32) | np.arange(len(ids))
    keys.sort()
    row_ids, row_offsets = np.empty(len(ids), dtype=np.int64), np.zeros(len(ids) + 1, dtype=np.int64)
    instances, row_values = np.empty(len(ids), dtype=np.int64), np.empty(len(ids), dtype=np.float32)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    count = _unpack(keys, owner, values, row_ids, row_offsets, instances, row_values)
    found = SparseRows(
        feature_ids=torch.from_numpy(instances),
        values=torch.from_numpy(row_values),
        offsets=torch.from_numpy(row_offsets[: count + 1]),
    )
    return torch.from_numpy(row_ids[:count]), found


@compiled
def _unpack(keys: Any, owner: Any, values: Any, row_ids: Any, row_offsets: Any, instances: Any, row_values: Any) -> int:
    """Sorted keys, an id above a place in `owner` and `values`, as `transpose` has them; returns the number of ids."""
    count = 0
    for entry in range(keys.shape[0]):
        row, place = keys[entry] >> 32, keys[entry] & 0xFFFFFFFF
        if count == 0 or row_ids[count - 1] != row:
            row_ids[count] = row
            count += 1
        row_offsets[count] = entry + 1
        instances[entry], row_values[entry] = owner[place], values[place]
    return count


def _transposed_padded(
    feature_ids: torch.Tensor, offsets: torch.Tensor, num_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_transposed`, of static shapes: U is the number of entries, and pads have none."""
    # Half of the bits take half of the time to sort.
    sorted_ids, order = torch.sort(feature_ids.int(), stable=True)
    row_ids, place = distinct_sorted(sorted_ids, num_features)
    starts = torch.searchsorted(place, torch.arange(place.shape[0] + 1, device=place.device))
    return row_ids.long(), torch.minimum(starts, offsets[-1]), order, owners(offsets, feature_ids.shape[0])


def _lies_apart(weight: torch.Tensor, row_ids: torch.Tensor) -> bool:
    return weight.device != row_ids.device


def _moved_rows(weight: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
    """`weight[row_ids]` on the device of the row ids, by way of pinned memory: the table itself need not be pinned."""
    rows = torch.empty(row_ids.shape[0], *weight.shape[1:], dtype=weight.dtype, pin_memory=torch.cuda.is_available())
    torch.index_select(weight, 0, row_ids.to(weight.device), out=rows)
    return rows.to(row_ids.device, non_blocking=True)


def _bag(ids: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if has_kernels(weight.device) and weight.dtype == torch.float32 and weight.is_contiguous():
        from xmc_midx import triton_rows  # Triton comes with CUDA alone

        return triton_rows.bag(ids, values, offsets, weight)
    return F.embedding_bag(
        ids, weight, offsets, mode="sum", per_sample_weights=values.to(weight.dtype), include_last_offset=True
    )


def _row_gradient(
    row_ids: torch.Tensor, grad: torch.Tensor, shape: torch.Size, *, has_pads: bool = False
) -> torch.Tensor:
    return torch.sparse_coo_tensor(row_ids[None], grad, shape, is_coalesced=not has_pads, check_invariants=False)
