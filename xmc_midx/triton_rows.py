"""Layer 1. What a training step does with a table's rows on a GPU, in Triton: sums of rows, and RowAdam's step.

Each takes the place of several kernels of torch's, skips pads (`xmc_midx.padding`) and never waits for the device.
Their twins in plain torch are `torch.nn.functional.embedding_bag` and the lines of `xmc_midx.optim` for other devices.
Import it where `xmc_midx.device.has_kernels` says so: Triton comes with torch's builds for CUDA alone. With
TRITON_INTERPRET=1 the kernels run on the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = ["bag", "step_rows"]

_WIDEST = 512
"""Columns of a row that a program holds at once."""
_ENTRIES = 8
"""Rows that are read at once: each waits for memory as long as one."""


def bag(ids: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(B, D): `sum of values[e] * table[ids[e]]` over the entries `offsets[b] <= e < offsets[b+1]` of each row b.

    Parameters
    ----------
    ids, values : (n,) int and float32; entries past the last offset are not read.
    offsets : (B+1,) int64, rising.
    table : (R, D) float32.
    """
    num_bags, dim = offsets.shape[0] - 1, table.shape[1]
    found = table.new_empty(num_bags, dim)
    block = min(_WIDEST, triton.next_power_of_2(dim))
    grid = num_bags, triton.cdiv(dim, block)
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        _bag[grid](ids, values, offsets, table, found, dim, BLOCK=block, ENTRIES=_ENTRIES, num_warps=_warps(block))
    return found


def step_rows(
    table: torch.Tensor,
    row_ids: torch.Tensor,
    grads: torch.Tensor,
    square: torch.Tensor,
    state: dict[str, torch.Tensor],
    *,
    rate: torch.Tensor,
    beta2: float,
    eps: float,
    table_moment: torch.Tensor | None = None,
) -> None:
    """One step of `xmc_midx.optim.RowAdam` for some rows of a table, in place.

    Parameters
    ----------
    table : (R, D) or (R,), float32 or bfloat16, which is rounded at random.
    row_ids : (U,) int, distinct but for pads.
    grads : (U, D) or (U,) float.
    square : (U,) float32: the mean square of each row of `grads`.
    state : `second_moment` (R,); `count` (R,) without a `table_moment`; `rounded` (), of a bfloat16 table: the seed.
    rate : () float32.
    table_moment : () float32: the moment is a sum, and this is added to it. None: it is a mean.
    """
    dim = table.shape[1] if table.dim() > 1 else 1
    block = min(_WIDEST, triton.next_power_of_2(dim))
    is_rounded = table.dtype == torch.bfloat16
    # What is not there is not read.
    moment = state["second_moment"]
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        _step_rows[(row_ids.shape[0],)](
            table,
            row_ids,
            grads.contiguous(),
            square,
            moment,
            state.get("count", moment),
            moment if table_moment is None else table_moment,
            rate,
            state["rounded"] if is_rounded else moment,
            table.shape[0],
            dim,
            beta2,
            math.log(beta2),
            eps,
            IS_SUM=table_moment is not None,
            IS_ROUNDED=is_rounded,
            BLOCK=block,
            num_warps=_warps(block),
        )


def _warps(block: int) -> int:
    return max(1, min(4, block // 128))


@triton.jit  # type: ignore[untyped-decorator]
def _bag(  # type: ignore[no-untyped-def]
    ids,
    values,
    offsets,
    table,
    found,
    dim,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    first = tl.load(offsets + row)
    last = tl.load(offsets + row + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(first, last, ENTRIES):
        entries = begin + tl.arange(0, ENTRIES)
        there = entries < last
        rows = tl.load(ids + entries, mask=there, other=0).to(tl.int64)
        weights = tl.load(values + entries, mask=there, other=0.0)
        wanted = there[:, None] & inside[None, :]
        tile = tl.load(table + rows[:, None] * dim + columns[None, :], mask=wanted, other=0.0)
        total += tl.sum(tile * weights[:, None], axis=0)
    tl.store(found + row.to(tl.int64) * dim + columns, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _step_rows(  # type: ignore[no-untyped-def]
    table,
    row_ids,
    grads,
    square,
    second_moment,
    count,
    table_moment,
    rate,
    rounded,
    num_rows,
    dim,
    beta2,
    log_beta2,
    eps,
    IS_SUM: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ids + place).to(tl.int64)
    if row < num_rows:
        moment = tl.load(second_moment + row)
        if IS_SUM:
            moment += tl.load(square + place)
            root = tl.sqrt(moment + tl.load(table_moment))
        else:
            moment = beta2 * moment + (1.0 - beta2) * tl.load(square + place)
            times = tl.load(count + row) + 1.0
            tl.store(count + row, times)
            # 1 - beta2^times, of which a difference would lose the digits while it is small.
            power = times * log_beta2
            small = -power * (1.0 + power * 0.5 * (1.0 + power / 3.0))
            root = tl.sqrt(moment / tl.where(power > -0.01, small, 1.0 - tl.exp(power)))
        tl.store(second_moment + row, moment)
        factor = -tl.load(rate) / (root + eps)
        for begin in range(0, dim, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < dim
            here = table + row * dim + columns
            grad = tl.load(grads + place * dim + columns, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(here, mask=inside, other=0.0).to(tl.float32) + factor * grad
            if IS_ROUNDED:
                # 16 random bits below the last place, then cut; as `xmc_midx.optim.round_at_random`.
                noise = tl.randint(tl.load(rounded).to(tl.int32), (place * dim + columns).to(tl.int32)).to(tl.int32)
                cut = ((value.to(tl.int32, bitcast=True) + (noise & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)
                value = tl.where(tl.abs(value) < float("inf"), cut, value).to(tl.bfloat16)
            tl.store(here, value, mask=inside)
