"""Layer 4. From sampled logits to the loss and its gradients: the targets of a batch, and the loss of a pool.

Before it: the pool and its log weights (`xmc_midx.samplers.pools`); after it: the softmax, which knows tables and
samplers. The formulas stand at the head of `xmc_midx.softmax`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.sparse import csr_matrix
from torch.autograd.function import once_differentiable

from xmc_midx.device import without_autocast
from xmc_midx.padding import owners
from xmc_midx.products import linear
from xmc_midx.slopes import multiply, round_slopes

__all__ = ["PoolLoss", "Positives", "Rounding", "Targets", "logsumexp_or_empty", "pool_chunk"]

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 25}
"""Logits of a batch held at once: a larger pool is read in chunks. In float32 64 MiB, and 128 MiB on a GPU."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NOWHERE = -1e30
"""The logit of a pad: finite, so that nothing times it is nothing."""

Positives = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Label ids, one a query, or `(label_ids (Y,), offsets (B+1,))`: query i owns `label_ids[offsets[i]:offsets[i+1]]`."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Positives of a batch, flattened, with the weight of each; the weights sum to 1."""

    label_ids: torch.Tensor
    """(Y,) int64."""
    instance: torch.Tensor
    """(Y,) int64: the row of the batch that owns the positive."""
    weight: torch.Tensor
    """(Y,), in the queries' dtype; 0 for a pad, which belongs to the last row."""

    @classmethod
    def build(cls, positives: Positives, query_BD: torch.Tensor, weighting: str, *, padded: bool = False) -> Targets:
        """Of label ids, one a query, or a pair. `padded`: what stands behind the last offset are pads."""
        num_rows, device = query_BD.shape[0], query_BD.device
        is_pair = isinstance(positives, tuple) and len(positives) == 2
        given = positives if is_pair else (positives,)
        if not all(isinstance(one, torch.Tensor) and one.dtype in _INTEGERS for one in given):
            kinds = ", ".join(str(getattr(one, "dtype", type(one).__name__)) for one in given)
            raise ValueError(
                f"positives of {kinds}: expected a tensor of label ids, or a tuple of label ids and offsets, integers"
            )
        if isinstance(positives, torch.Tensor):
            label_ids = positives.reshape(-1).long().contiguous()
            weight = query_BD.new_full((num_rows,), 1.0 / max(num_rows, 1))
            return cls(label_ids, torch.arange(num_rows, device=device), weight)
        label_ids, offsets = positives[0].long().contiguous(), positives[1].long()
        if offsets.shape[0] != num_rows + 1:
            raise ValueError(f"{offsets.shape[0]} offsets for {num_rows} queries: expected one more than queries")
        if padded:
            return cls._build_padded(label_ids, offsets, query_BD, weighting)
        # On another device a look would wait for it.
        if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != label_ids.shape[0]):
            raise ValueError(
                f"the offsets go from {offsets[0]} to {offsets[-1]}: expected 0 to {label_ids.shape[0]}, the positives"
            )
        counts = offsets.diff()
        if offsets.device.type == "cpu" and (counts < 0).any():
            raise ValueError("the offsets fall: expected that each query's positives follow those of the one before")
        instance = torch.repeat_interleave(
            torch.arange(num_rows, device=device), counts, output_size=label_ids.shape[0]
        )
        weight = query_BD.new_ones(label_ids.shape[0])
        if weighting == "mean":
            weight = weight / counts[instance]
        return cls(label_ids, instance, weight / weight.sum())

    @classmethod
    def _build_padded(
        cls, label_ids: torch.Tensor, offsets: torch.Tensor, query_BD: torch.Tensor, weighting: str
    ) -> Targets:
        owner = owners(offsets, label_ids.shape[0])
        instance = owner.clamp(max=query_BD.shape[0] - 1)
        weight = (owner < query_BD.shape[0]).to(query_BD.dtype)
        if weighting == "mean":
            weight = weight / offsets.diff()[instance].clamp(min=1)
        return cls(label_ids, instance, weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))

    def split(self, bounds: Sequence[int]) -> list[Targets]:
        """Those of the instances `bounds[i]..bounds[i + 1]`, for each i: rows count from the first of them."""
        firsts = torch.tensor(bounds, device=self.instance.device)
        places = torch.searchsorted(self.instance, firsts).tolist()
        return [
            Targets(self.label_ids[part], self.instance[part] - first, self.weight[part])
            for first, part in zip(bounds, itertools.starmap(slice, itertools.pairwise(places)), strict=False)
        ]

    def hits(self, drawn_BM: torch.Tensor, num_labels: int) -> torch.Tensor:
        """(B, M) bool: where a draw is one of its instance's positives."""
        own = torch.sort(self.instance * num_labels + self.label_ids).values
        keys = torch.arange(drawn_BM.shape[0], device=drawn_BM.device)[:, None] * num_labels + drawn_BM
        position = torch.searchsorted(own, keys).clamp_(max=own.shape[0] - 1)
        return own[position] == keys

    def logsumexp(self, logits_Y: torch.Tensor, num_rows: int) -> torch.Tensor:
        """(B,): log of the summed exponentials of each instance's positives; -inf for one without."""
        peak_B = logits_Y.new_full((num_rows,), -torch.inf)
        peak_B = peak_B.scatter_reduce(0, self.instance, logits_Y.detach(), "amax")
        total_B = logits_Y.new_zeros(num_rows)
        total_B = total_B.index_add(0, self.instance, torch.exp(logits_Y - peak_B[self.instance]))
        return torch.where(total_B > 0, torch.log(total_B.clamp(min=1e-38)) + peak_B, -torch.inf)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the slopes of a pool are rounded at random."""

    num_negatives: int
    """Negatives of an instance that remain, in the mean over the instances and at most: larger slopes than the
    threshold are kept as they are, and make up for several."""
    offsets: torch.Tensor
    """(B,) float32, uniform in [0, 1): what the rounding depends on."""


class PoolLoss(torch.autograd.Function):
    """The pool loss and its gradients in three matrix products.

    Equals autograd on `logits = query @ rows.T + bias`, negatives less `log_weight`, the loss of the module's
    docstring. Written by hand because the gradient of all negatives of an instance is one softmax row times one
    number: a single (B, P) matrix is kept, in the products' precision, and none at all where those of all groups of
    the batch, `batch_size` instances, would exceed `_CHUNK_ELEMENTS`.

    With `rounding`, for a loss in float32 on the CPU, and where that matrix is kept, the gradients are those of
    slopes that were rounded at random (`xmc_midx.slopes`): the loss is the same, the gradients are in the mean, and two
    of the three products are with a few negatives of each instance.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BD: torch.Tensor,
        rows_PD: torch.Tensor,
        bias_P: torch.Tensor,
        log_weight_P: torch.Tensor,
        positions_Y: torch.Tensor,
        targets: Targets,
        decoupled: bool,
        precision: torch.dtype,
        batch_size: int,
        rounding: Rounding | None,
    ) -> torch.Tensor:
        query = query_BD.to(precision)
        num_rows, pool_size = query_BD.shape[0], rows_PD.shape[0]
        chunk = pool_chunk(batch_size, pool_size, query_BD.device)
        log_negatives_B = query_BD.new_full((num_rows,), -torch.inf)
        logits_Y = query_BD.new_empty(positions_Y.shape[0])
        whole = None
        for begin in range(0, pool_size, chunk):
            logits, mine, column = _chunk_logits(
                query, rows_PD, bias_P - log_weight_P, positions_Y, begin, begin + chunk
            )
            instance = targets.instance[mine]
            own = logits[instance, column] + log_weight_P[positions_Y[mine]]
            logits_Y[mine] = own.masked_fill_(targets.weight[mine] == 0, _NOWHERE)
            logits[instance, column] = logits.new_full((), -torch.inf)
            peak_B1 = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
            logits.sub_(peak_B1).exp_()
            log_chunk_B = peak_B1[:, 0] + torch.log(logits.sum(1))
            log_negatives_B = torch.logaddexp(log_negatives_B, log_chunk_B)
            if chunk >= pool_size:
                whole, scale_B = logits, torch.exp(peak_B1[:, 0] - _finite(log_negatives_B))
        loss, share_B, slope_Y = _loss_and_slopes(logits_Y, log_negatives_B, targets, decoupled)
        ctx.sparse = None
        if whole is not None:
            whole = _slopes(whole, share_B * scale_B, slope_Y, targets.instance, positions_Y)
            if rounding is not None:
                threshold = float(share_B.mean()) / rounding.num_negatives
                ctx.sparse = round_slopes(whole, threshold, rounding.offsets)
                whole = None
            else:
                whole = whole.to(precision)
        ctx.save_for_backward(
            query_BD, rows_PD, bias_P, log_weight_P, positions_Y, log_negatives_B, share_B, slope_Y, whole
        )
        ctx.targets, ctx.precision, ctx.chunk = targets, precision, chunk
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BD, rows_PD, bias_P, log_weight_P, positions_Y, log_negatives_B, share_B, slope_Y, whole = (
            ctx.saved_tensors
        )
        if ctx.sparse is not None:
            sparse: csr_matrix = ctx.sparse * float(grad)
            sums_P = np.bincount(sparse.indices, weights=sparse.data, minlength=sparse.shape[1])
            grads = multiply(sparse, rows_PD), multiply(sparse.T.tocsr(), query_BD), bias_P.new_tensor(sums_P)
            return *grads, *(None,) * 7
        query = query_BD.to(ctx.precision)
        grad_query = torch.zeros_like(query_BD)
        grad_rows, grad_bias = torch.empty_like(rows_PD), torch.empty_like(bias_P)
        with without_autocast(query_BD.device.type):
            for begin in range(0, rows_PD.shape[0], ctx.chunk):
                end = min(begin + ctx.chunk, rows_PD.shape[0])
                if whole is not None:
                    slopes = whole
                else:
                    logits, mine, column = _chunk_logits(query, rows_PD, bias_P - log_weight_P, positions_Y, begin, end)
                    softmax = logits.sub_(_finite(log_negatives_B)[:, None]).exp_()
                    slopes = _slopes(softmax, share_B, slope_Y[mine], ctx.targets.instance[mine], column)
                    slopes = slopes.to(ctx.precision)
                grad_query += slopes @ rows_PD[begin:end].to(ctx.precision)
                grad_rows[begin:end] = slopes.T @ query
                grad_bias[begin:end] = slopes.sum(0, dtype=bias_P.dtype)
        return (grad_query.mul_(grad), grad_rows.mul_(grad), grad_bias.mul_(grad), *(None,) * 7)


def pool_chunk(batch_size: int, pool_size: int, device: torch.device) -> int:
    """Labels of a pool that a batch's logits are held of at once."""
    elements = _CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    return max(1, min(pool_size, elements // batch_size))


def _chunk_logits(
    query: torch.Tensor,
    rows_PD: torch.Tensor,
    offset_P: torch.Tensor,
    positions_Y: torch.Tensor,
    begin: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Corrected logits (B, chunk) of the pool's labels begin..end, which positives lie there, and in which column."""
    logits = linear(query, rows_PD[begin:end], offset_P[begin:end], table_varies=True)
    if begin == 0 and end >= rows_PD.shape[0]:
        return logits, torch.arange(positions_Y.shape[0], device=query.device), positions_Y
    mine = torch.nonzero((positions_Y >= begin) & (positions_Y < end)).flatten()
    return logits, mine, positions_Y[mine] - begin


def _loss_and_slopes(
    logits_Y: torch.Tensor, log_negatives_B: torch.Tensor, targets: Targets, decoupled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the factor (B,) of each instance's softmax over its negatives, and the gradient (Y,) of the
    positives."""
    zeros_B = torch.zeros_like(log_negatives_B)
    if decoupled:
        margin_Y = log_negatives_B[targets.instance] - logits_Y
        slope_Y = targets.weight * torch.sigmoid(margin_Y)
        loss = (targets.weight * F.softplus(margin_Y)).sum()
        return loss, zeros_B.index_add(0, targets.instance, slope_Y), -slope_Y
    weight_B = zeros_B.index_add(0, targets.instance, targets.weight)
    log_all_B = torch.logaddexp(log_negatives_B, targets.logsumexp(logits_Y, log_negatives_B.shape[0]))
    log_all_Y = log_all_B[targets.instance]
    loss = (targets.weight * (log_all_Y - logits_Y)).sum()
    share_B = weight_B * torch.exp(log_negatives_B - _finite(log_all_B))
    return loss, share_B, weight_B[targets.instance] * torch.exp(logits_Y - log_all_Y) - targets.weight


def _slopes(
    softmax: torch.Tensor,
    share_B: torch.Tensor,
    slope_Y: torch.Tensor,
    instance: torch.Tensor,
    column: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the loss by the logits, in place of the softmax over the negatives. A positive that an instance
    states twice counts twice."""
    softmax.mul_(share_B[:, None])
    softmax[instance, column] = softmax.new_zeros(())
    return softmax.index_put_((instance, column), slope_Y, accumulate=True)


def _finite(log_total_B: torch.Tensor) -> torch.Tensor:
    """0 where there is nothing to sum: the terms are exp(-inf) and stay 0 instead of becoming NaN."""
    return log_total_B.masked_fill(torch.isneginf(log_total_B), 0.0)


def logsumexp_or_empty(logits_BM: torch.Tensor) -> torch.Tensor:
    """logsumexp along the rows, with a zero gradient, not NaN, where all of a row is -inf."""
    empty_B = torch.isneginf(logits_BM).all(1)
    safe_BM = torch.where(empty_B[:, None], torch.zeros_like(logits_BM), logits_BM)
    return torch.where(empty_B, -torch.inf, torch.logsumexp(safe_BM, 1))
