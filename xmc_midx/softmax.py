"""Layer 4. The softmax over the labels, estimated from a sample. Before it: encoder and sampler; after it: the
optimiser.

With logits o_i = z.W_i + b_i and the positives Y of an instance, the loss of a positive p is

    decoupled:      log(1 + exp(S - o_p)),                 S = log sum_{i not in Y} exp(o_i)
    not decoupled:  log(exp(S) + sum_{y in Y} exp(o_y)) - o_p

and the estimators replace S by a sum over sampled labels, each logit less its log weight (METHOD.md, section 2):

- `pool`: positives of the whole batch, or of a group of its instances, and labels drawn for the batch, every instance
  scored against all of them by one matrix product. Both are samples: the positives of the other instances of its B,
  who are a random part of the training set, come with the chance `1 - C(N-1-n, B-1) / C(N-1, B-1)`, the draws with
  their own. The two estimates of exp(S) are added with fixed parts for each label (multiple importance sampling), so
  that exp(S) is unbiased over batches and draws. Where the label frequencies are unknown, the positives count once and
  the draws estimate the rest: unbiased for each batch by itself, with far more variance where draws are few, because
  rare labels are estimated by the draws alone.
- `instance`: M draws of each instance's own proposal, weighted by M Q(i|z); accidental hits on Y are left out, which
  keeps exp(S) unbiased. This is the paper's estimator, with its positives exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from xmc_midx.device import empty_table, without_autocast
from xmc_midx.estimators import (
    PoolLoss,
    Positives,
    Rounding,
    Targets,
    logsumexp_or_empty,
    pool_chunk,
)
from xmc_midx.recipe import auto_num_codewords, auto_num_draws
from xmc_midx.rows import gather_rows
from xmc_midx.samplers.midx import MidxSampler
from xmc_midx.samplers.pools import beside, two_samples
from xmc_midx.samplers.static import InBatchSampler, UniformSampler
from xmc_midx.slopes import rounds_slopes
from xmc_midx.topk import exact_topk
from xmc_midx.types import Sampler, TopK

__all__ = ["LabelSoftmax", "MIDXSoftmax"]


class LabelSoftmax(nn.Module):
    """The label table, its bias, and a loss estimated with any sampler.

    `state_dict()` holds, besides `weight` and `bias`, what the next draws depend on, as plain tensors: the sampler's
    own state (`sampler.*`), the bias that it was fitted with where the fit depends on it (`bias_at_refresh`) and the
    state of the draws' `generator`. Loaded into another module it goes on as this one would, draw for draw. A state
    without sampler is loaded too: the sampler is then fitted to the loaded table at its first use. The generator's
    state is taken over from the same kind of device only.

    Parameters
    ----------
    num_labels, dim : L and D.
    sampler : where the negatives come from; None scores all labels (the full softmax, in chunks).
    in_batch : the law by which labels are positives of a batch; given, a pool takes the batch's positives for a random
        sample of the labels, beside the draws. None: it takes them as given, with weight 1.
    estimator : `"pool"` or `"instance"`.
    num_draws : labels drawn for a batch (pool) or for each instance (instance). A pool of `num_draws >= num_labels`
        holds every label once, so that the loss is the full softmax's.
    pool_instances : where the positives are a sample (`in_batch`) and labels are drawn besides, the instances that
        share a pool, at most: a larger batch is cut into groups, each with its own positives and the batch's draws.
        Its products then cost what small batches' do, its updates of rows what a large one's do. None: the whole batch
        is one.
    gradient_negatives : negatives of an instance that the gradient of a pool is made of, in the mean over the instances
        and at most: drawn from the pool in proportion to their share in the gradient, which they leave without bias
        (`xmc_midx.slopes`). The loss is exact. It takes effect where the loss is float32 on the CPU, where it is
        faster, and a pool's logits are kept whole. None: all of the pool.
    correction_power : what the log weights of sampled labels are multiplied by: 1 estimates the full softmax without
        bias, 0 counts each label of the pool once. Below 1 the loss has less variance, and labels that are drawn often
        weigh more than the softmax gives them.
    bias : whether labels have a bias.
    weighting : weight of a positive: `"mean"` 1/|Y| of its instance, `"sum"` 1.
    decoupled : whether an instance's other positives are masked.
    sparse : row-sparse gradients of table and bias, for `RowAdam`, `torch.optim.SparseAdam` or `torch.optim.SGD`; off,
        the gradients are dense and any optimiser will do, at a cost that grows with L.
    precision : dtype of the product of a pool's logits, and of the gradient's two where slopes are not rounded. None:
        bfloat16 where the table or an enclosing `torch.autocast` has it, else the table's, float32 at the least. Never
        float16: a slope is a share of 1/Y, for most labels of a pool below the smallest float16 (6e-8).
    seed : of the draws and of the table's start.
    device, dtype : of the table, as of any module of torch; the bias is float32 at the least.
    table_device : where the table lies, if not on `device`: in the host's memory, `"cpu"`, where it is too large for
        the device, to which the rows of each pool then move and from which their gradients come back. Needs `sparse`
        and a sampler that reads the table at a refresh alone: MIDX or a static one. `.to()` moves it like any
        parameter.

    Raises
    ------
    ValueError : an option is none of those above.
    """

    def __init__(
        self,
        num_labels: int,
        dim: int,
        *,
        sampler: Sampler | None,
        in_batch: InBatchSampler | None = None,
        estimator: str = "pool",
        num_draws: int = 2048,
        pool_instances: int | None = None,
        gradient_negatives: int | None = None,
        correction_power: float = 1.0,
        bias: bool = True,
        weighting: str = "mean",
        decoupled: bool = True,
        sparse: bool = False,
        precision: torch.dtype | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        table_device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if estimator not in ("pool", "instance"):
            raise ValueError(f"estimator {estimator!r}: expected 'pool' or 'instance'")
        for name, size in (("pool_instances", pool_instances), ("gradient_negatives", gradient_negatives)):
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}: expected at least 1")
        if weighting not in ("mean", "sum"):
            raise ValueError(f"weighting {weighting!r}: expected 'mean' or 'sum'")
        if precision not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"precision {precision}: expected None, bfloat16, float32 or float64")
        self.num_labels, self.dim = num_labels, dim
        self.sampler, self.in_batch, self.estimator, self.num_draws = sampler, in_batch, estimator, num_draws
        self.pool_instances, self.gradient_negatives = pool_instances, gradient_negatives
        self.correction_power = correction_power
        self.weighting, self.decoupled, self.sparse, self.precision = weighting, decoupled, sparse, precision
        if table_device is not None and not (sparse and isinstance(sampler, MidxSampler | UniformSampler)):
            raise ValueError("a table on another device: expected sparse=True, and a MIDX or a static sampler")
        self.weight = nn.Parameter(empty_table(num_labels, dim, device=table_device or device, dtype=dtype))
        self.bias = nn.Parameter(
            torch.zeros(num_labels, device=device, dtype=_at_least_float32(dtype)), requires_grad=bias
        )
        self.has_bias = bias
        self.seed = seed
        self.generator = _seeded(self.bias.device, seed)
        self.pool_size: int | torch.Tensor = 0
        """Labels in the last pool, the mean of a batch's: a diagnostic. A number on the device with static shapes."""
        self.static_shapes = False
        """Whether `forward` never asks the device what it found, so that its work can be captured as a CUDA graph: pool
        and gradients then end in pads (`xmc_midx.padding`), and so may the positives; the whole batch shares a pool.
        Only where `allows_static_shapes` says so."""
        # A fit that does not depend on the bias needs no copy of it: four bytes a label.
        self._keeps_bias = not (isinstance(sampler, MidxSampler) and sampler.prior != "bias")
        self._bias_at_refresh = self.bias.detach().clone() if self._keeps_bias else None
        self._outdated = False
        """Whether the table was loaded without a state of the sampler."""
        with torch.no_grad():
            self.weight.normal_(0.0, 1.0 / math.sqrt(dim), generator=_seeded(self.weight.device, seed))
        self._place_generator()

    def extra_repr(self) -> str:
        sampler = None if self.sampler is None else type(self.sampler).__name__
        return (
            f"{self.num_labels}, {self.dim}, sampler={sampler}, estimator={self.estimator!r}, "
            f"num_draws={self.num_draws}, bias={self.has_bias}, sparse={self.sparse}"
        )

    # ------------------------------------------------------------------- loss

    def forward(self, queries: torch.Tensor, positives: Positives) -> torch.Tensor:
        """The loss in nats per positive, a scalar of the table's dtype (float32 at the least), under autocast too.

        Parameters
        ----------
        queries : (..., D) float of any dtype; the gradient is returned in it.
        positives : label ids of the leading shape (one a query), or a pair `(label_ids (Y,), offsets (B+1,))` for B the
            product of the leading shape: query i owns `label_ids[offsets[i]:offsets[i+1]]`, which may be empty.
            Integers. Without any positive the loss is 0.

        Raises
        ------
        ValueError : shapes that do not fit, or a label id outside 0..L-1.
        """
        if torch.compiler.is_compiling():
            # Draws, ragged targets and sparse gradients do not fit a graph: one clean break, instead of one at each of
            # them. Not a decorator: that loads the compiler, 70 MB and two seconds, where nothing is compiled.
            apart = torch.compiler.disable(self._loss)  # type: ignore[no-untyped-call]
            loss: torch.Tensor = apart(queries, positives)
            return loss
        return self._loss(queries, positives)

    def _loss(self, queries: torch.Tensor, positives: Positives) -> torch.Tensor:
        precision = self._product_dtype(queries.device.type)
        with without_autocast(queries.device.type):
            query_BD = self._typed(queries).reshape(-1, self.dim)
            if isinstance(positives, torch.Tensor) and positives.shape != queries.shape[:-1]:
                given, of = tuple(positives.shape), tuple(queries.shape)
                raise ValueError(f"positives of shape {given} for queries of {of}: expected {of[:-1]}, one a query")
            targets = Targets.build(positives, query_BD, self.weighting, padded=self.static_shapes)
            if targets.label_ids.shape[0] == 0:
                # 0 whatever the tables hold, and a loss of theirs too: queries may come from an encoder that is kept.
                (rows_PD,), (bias_P,) = self._rows([targets.label_ids])
                return query_BD[:0].sum() + rows_PD.sum() + bias_P.sum()
            if self.static_shapes:
                return self._static_loss(query_BD, targets, precision)
            low, high = torch.stack(torch.aminmax(targets.label_ids)).tolist()
            if low < 0 or high >= self.num_labels:
                # Unchecked, a search in the pool would take -1 (a padding label, elsewhere) for label 0.
                raise ValueError(f"positives hold {low} to {high}: expected label ids 0 to {self.num_labels - 1}")
            if self.estimator == "instance" and self.sampler is not None and self.num_draws < self.num_labels:
                return self._instance_loss(query_BD, targets)
            return self._pool_loss(query_BD, targets, precision)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the loss and of the sampler's law: the table's, float32 at the least."""
        return _at_least_float32(self.weight.dtype)

    @property
    def _bias(self) -> torch.Tensor:
        """The bias of the loss: without one it stays at 0, even if all parameters are told to learn."""
        return self.bias if self.has_bias else self.bias.detach()

    def _product_dtype(self, device_type: str) -> torch.dtype:
        if self.precision is not None:
            return self.precision
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        if self._dtype == torch.float32 and torch.bfloat16 in (self.weight.dtype, autocast):
            return torch.bfloat16
        return self._dtype

    def _typed(self, queries: torch.Tensor) -> torch.Tensor:
        if queries.shape[-1:] != (self.dim,):
            raise ValueError(f"queries of shape {tuple(queries.shape)}: expected (..., {self.dim})")
        return queries.to(self._dtype)

    def _pool_loss(self, query_BD: torch.Tensor, targets: Targets, precision: torch.dtype) -> torch.Tensor:
        sizes = self._sizes_of_groups(query_BD.shape[0])
        groups = targets.split([0, *itertools.accumulate(sizes)]) if len(sizes) > 1 else [targets]
        pools = self._pools(query_BD, [group.label_ids for group in groups], sizes)
        self.pool_size = round(sum(len(label_ids) for label_ids, _ in pools) / len(pools))
        rows, biases = self._rows([label_ids for label_ids, _ in pools])
        loss = query_BD.new_zeros(())
        for query, group, (label_ids, log_weight_P), rows_PD, bias_P in zip(
            torch.split(query_BD, sizes), groups, pools, rows, biases, strict=True
        ):
            positions_Y = torch.searchsorted(label_ids, group.label_ids)
            loss = loss + PoolLoss.apply(  # type: ignore[no-untyped-call]
                query,
                rows_PD,
                bias_P,
                log_weight_P,
                positions_Y,
                group,
                self.decoupled,
                precision,
                sum(sizes),
                self._rounding(query),
            )
        return loss

    def allows_static_shapes(self, batch_size: int, num_positives: int) -> bool:
        """Whether a batch of so many instances and positives, pads counted, can be computed with static shapes."""
        if self.estimator != "pool" or not self.sparse or self.weight.device != self.bias.device:
            return False
        if self._pool_is_all:
            pool_size = self.num_labels
        elif isinstance(self.sampler, MidxSampler | UniformSampler):
            law, num_draws = self._two_sources(self.sampler)
            if law is None:
                return False
            pool_size = num_positives + num_draws
        else:
            return False
        return pool_chunk(batch_size, pool_size + 1, self.bias.device) > pool_size

    def _static_loss(self, query_BD: torch.Tensor, targets: Targets, precision: torch.dtype) -> torch.Tensor:
        label_ids, log_weight_P = self._static_pool(query_BD, targets.label_ids)
        self.pool_size = torch.isfinite(log_weight_P).sum()
        (rows_PD,), (bias_P,) = self._rows([label_ids])
        positions_Y = torch.searchsorted(label_ids, targets.label_ids)
        arguments = (query_BD, rows_PD, bias_P, log_weight_P, positions_Y, targets)
        loss: torch.Tensor = PoolLoss.apply(*arguments, self.decoupled, precision, query_BD.shape[0], None)  # type: ignore[no-untyped-call]
        return loss

    def _static_pool(self, query_BD: torch.Tensor, positives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rising label ids (P,), pads at the end, and their log weights (P,)."""
        if self._pool_is_all:
            # One pad, for those among the positives.
            label_ids = torch.arange(self.num_labels + 1, device=query_BD.device)
            is_pad = label_ids == self.num_labels
            return label_ids, query_BD.new_zeros(self.num_labels + 1).masked_fill_(is_pad, torch.inf)
        sampler = self._fitted_sampler()
        law, num_draws = self._two_sources(sampler)
        assert law is not None and isinstance(sampler, MidxSampler | UniformSampler), "see allows_static_shapes"
        sample = sampler.sample_pool(query_BD.detach(), num_draws, self.generator, padded=True)
        others = query_BD.shape[0] - 1
        label_ids, log_weight_P = two_samples(positives, sample, law, others, num_draws, padded=True)
        # Infinite ones count nothing, whatever the power.
        corrected_P = torch.where(torch.isfinite(log_weight_P), self.correction_power * log_weight_P, log_weight_P)
        return label_ids, corrected_P.to(query_BD.dtype)

    def _rounding(self, query_BD: torch.Tensor) -> Rounding | None:
        if self.gradient_negatives is None or not rounds_slopes(query_BD.device, query_BD.dtype):
            return None
        offsets = torch.rand(query_BD.shape[0], generator=self.generator, dtype=torch.float32)
        return Rounding(self.gradient_negatives, offsets)

    @property
    def _pool_is_all(self) -> bool:
        """Whether a pool holds every label: there is no sampler, or it is asked for as many draws as labels. In-batch
        negatives are a pool without draws."""
        if self.sampler is None:
            return True
        return self.num_draws >= self.num_labels and not isinstance(self.sampler, InBatchSampler)

    def _sizes_of_groups(self, num_rows: int) -> list[int]:
        """Instances of each group that shares a pool; groups only where labels are drawn beside positives that are a
        sample."""
        size = self.pool_instances
        if size is None or self.in_batch is None or self._pool_is_all or isinstance(self.sampler, InBatchSampler):
            return [num_rows]
        num_groups = max(1, -(-num_rows // size))
        return [(i + 1) * num_rows // num_groups - i * num_rows // num_groups for i in range(num_groups)]

    def _pools(
        self, query_BD: torch.Tensor, positives: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each group of so many instances and with these positives, the rising label ids (P,) of its pool and their
        log weights (P,)."""
        if self._pool_is_all:
            label_ids = torch.arange(self.num_labels, device=query_BD.device)
            return [(label_ids, query_BD.new_zeros(self.num_labels))]
        sampler = self._fitted_sampler()
        law, num_draws = self._two_sources(sampler)
        if law is None:
            certain = torch.unique(positives[0])
            sample = sampler.sample_pool(query_BD.detach(), num_draws, self.generator, certain)
            pools = [beside(certain, sample)]
        else:
            sample = sampler.sample_pool(query_BD.detach(), num_draws, self.generator)
            pools = [
                two_samples(ids, sample, law, size - 1, num_draws) for ids, size in zip(positives, sizes, strict=True)
            ]
        return [(label_ids, self.correction_power * weight_P.to(query_BD.dtype)) for label_ids, weight_P in pools]

    def _two_sources(self, sampler: Sampler) -> tuple[InBatchSampler | None, int]:
        """The law by which labels are positives of a batch, where they are a sample of all labels, and the draws beside
        them."""
        return (sampler, 0) if isinstance(sampler, InBatchSampler) else (self.in_batch, self.num_draws)

    def _instance_loss(self, query_BD: torch.Tensor, targets: Targets) -> torch.Tensor:
        sample = self._fitted_sampler().sample(query_BD.detach(), self.num_draws, self.generator)
        # One gather for positives and draws together: a row's gradient is complete when the optimiser sees it.
        both = torch.cat([targets.label_ids, sample.label_ids.flatten()])
        label_ids, inverse = torch.unique(both, return_inverse=True)
        self.pool_size = label_ids.shape[0]
        (rows_PD,), (bias_P,) = self._rows([label_ids])
        positives_Y, drawn_BM = inverse.split([targets.label_ids.shape[0], sample.label_ids.numel()])
        drawn_BM = drawn_BM.view_as(sample.label_ids)
        log_weight_BM = self.correction_power * sample.log_weight.to(query_BD.dtype)
        logits_BM = torch.einsum("bd,bmd->bm", query_BD, rows_PD[drawn_BM]) + bias_P[drawn_BM] - log_weight_BM
        logits_BM = logits_BM.masked_fill(targets.hits(sample.label_ids, self.num_labels), -torch.inf)
        log_negatives_B = logsumexp_or_empty(logits_BM)
        logits_Y = (query_BD[targets.instance] * rows_PD[positives_Y]).sum(1) + bias_P[positives_Y]
        log_rest_Y = log_negatives_B[targets.instance]
        if not self.decoupled:
            others_B = targets.logsumexp(logits_Y, query_BD.shape[0])
            log_all_Y = torch.logaddexp(log_negatives_B, others_B)[targets.instance]
            return (targets.weight * (log_all_Y - logits_Y)).sum()
        return (targets.weight * F.softplus(log_rest_Y - logits_Y)).sum()

    def _fitted_sampler(self) -> Sampler:
        """The sampler. One that was never refreshed is fitted now: at construction the table is still random, and
        codebooks of random rows are a poor start for the first refresh."""
        assert self.sampler is not None
        if self._outdated or not self.sampler.fitted:
            self.refresh()
        return self.sampler

    def _rows(self, pools: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Rows (P, D) and biases (P,) of each pool of label ids."""
        tables = self.weight, self._bias
        found = (gather_rows(t, pools) if self.sparse else [t[label_ids] for label_ids in pools] for t in tables)
        rows, biases = ([part.to(self._dtype) for part in parts] for parts in found)
        return rows, biases

    # ---------------------------------------------------------------- the rest

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the sampler up to date with the table; call it now and again, such as at the start of each epoch.

        An old sampler's estimate of the partition function is without bias too, but noisier the further the table has
        moved. The first use refreshes by itself.
        """
        if self.sampler is not None:
            # The codebooks read a table of any dtype in chunks, a static law none; what others compute with is a copy.
            by_chunks = isinstance(self.sampler, MidxSampler | UniformSampler)
            dtype = self.weight.dtype if by_chunks else self._dtype
            with without_autocast(self.bias.device.type):
                self.sampler.refresh(self.weight.to(dtype), self.bias.to(self._dtype))
            self._bias_at_refresh = self.bias.detach().clone() if self._keeps_bias else None
            self._outdated = False

    def log_prob(self, queries: torch.Tensor) -> torch.Tensor:
        """The full softmax: (..., D) queries -> (..., L) log probabilities in nats. Allocates the whole result.

        Equals `log_softmax(queries @ weight.T + bias)` and differentiates like it; in the table's dtype (float32 at the
        least), under autocast too.
        """
        with without_autocast(queries.device.type):
            weight_LD = self.weight.to(self.bias.device, self._dtype)
            logits = F.linear(self._typed(queries), weight_LD, self._bias.to(self._dtype))
            return torch.log_softmax(logits, dim=-1)

    def topk(self, queries: torch.Tensor, k: int) -> TopK:
        """The k best labels of each query by a full scan: (..., D) queries -> (N, K), N the product of the leading
        shape."""
        with without_autocast(queries.device.type):
            query_ND = self._typed(queries.detach()).reshape(-1, self.dim)
            return exact_topk(query_ND, self.weight.detach(), self.bias.to(self._dtype), k)

    # ------------------------------------------------------------------- state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}generator"] = self.generator.get_state()
        state = {} if self.sampler is None or self._outdated else self.sampler.state_dict()
        if state:
            if self._bias_at_refresh is not None:
                destination[f"{prefix}bias_at_refresh"] = self._bias_at_refresh
            destination.update({f"{prefix}sampler.{name}": tensor for name, tensor in state.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        generator, bias_L = state_dict.get(f"{prefix}generator"), state_dict.get(f"{prefix}bias_at_refresh")
        start = f"{prefix}sampler."
        state = {key.removeprefix(start): tensor for key, tensor in state_dict.items() if key.startswith(start)}
        ours = {f"{prefix}generator", f"{prefix}bias_at_refresh", *(start + name for name in state)}
        others = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._place_generator()
        if generator is not None and generator.shape == self.generator.get_state().shape:
            self.generator.set_state(generator.cpu())
        if not self.has_bias and bool(self.bias.detach().any()):
            self.bias.detach().zero_()
            error_msgs.append(f"`{prefix}bias` is not 0, but this softmax has no bias: bias=True would take it.")
        if f"{prefix}weight" not in state_dict:
            return
        self._outdated = True
        if self.sampler is not None and not state:
            # As it is before its first use: what it was fitted to is another table.
            self.sampler.load_state_dict({}, self.bias.detach())
        if state and self.sampler is not None:
            try:
                self._restore_sampler(state, self.bias.detach() if bias_L is None else bias_L)
                self._outdated = False
            except (KeyError, TypeError, RuntimeError) as error:
                error_msgs.append(f"`{start}*` is no state of a {type(self.sampler).__name__}: {error}")
        if strict:
            known = {} if self.sampler is None else self.sampler.state_dict()
            unexpected_keys += [start + name for name in state if name not in known]

    def _restore_sampler(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Give the sampler copies on the bias's device and in the table's dtype."""
        assert self.sampler is not None
        device, dtype = self.bias.device, self._dtype
        bias_L = bias_L.to(device, dtype, copy=self._keeps_bias)
        own = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in state.items()
        }
        if isinstance(self.sampler, MidxSampler) and own:
            self.sampler.require_shape(own, self.dim)
        self.sampler.load_state_dict(own, bias_L)
        self._bias_at_refresh = bias_L if self._keeps_bias else None

    def _place_generator(self) -> None:
        """On the bias's device, from the seed: the state of one kind of generator says nothing to another."""
        if self.in_batch is not None:
            self.in_batch.load_state_dict({}, self.bias.detach())
        if self.generator.device != self.bias.device:
            self.generator = _seeded(self.bias.device, self.seed)

    def _apply(self, fn: Any, recurse: bool = True) -> LabelSoftmax:
        before = self.bias.device, self.weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_generator()
        if self._bias_at_refresh is not None:
            self._bias_at_refresh = fn(self._bias_at_refresh)
        if self.sampler is not None and before != (self.bias.device, self.weight.dtype):
            bias_L = self.bias.detach() if self._bias_at_refresh is None else self._bias_at_refresh
            self._restore_sampler(self.sampler.state_dict(), bias_L)
        return self


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    """On the device; for the meta device, which draws nothing, on the CPU."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def _at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class MIDXSoftmax(LabelSoftmax):
    """A softmax over many labels whose training step does not grow with their number.

    With one label a query, `loss = softmax(queries, label_ids)` equals, up to the sampling of the negatives,

        log_prob = torch.log_softmax(queries @ weight.T + bias, dim=-1)
        loss = -log_prob[torch.arange(len(queries)), label_ids].mean()

    and is exactly that, gradients included, where `num_draws >= num_labels`. With several labels a query, given ragged,
    each positive is told from the labels that are not its query's positives (`decoupled`), and each query counts as one
    (`weighting`); the formulas stand at the head of this module.

    `weight` (L, D) and `bias` (L,) are parameters like those of a linear layer. `softmax(queries, positives)` takes
    queries (..., D) of any float dtype and returns a scalar; `log_prob(queries)` is the full softmax (..., L) and
    `topk(queries, k)` the best labels (N, K). Both read the table alone, as it is.

    **Refresh.** Negatives are drawn from the softmax of a quantised table: two codebooks, fitted by `refresh()` in
    O(L C D) and not changed by the steps after it. The first loss fits them by itself; from then on call `refresh()`
    as often as the table moves much, such as at the start of each epoch. Old codebooks leave the estimate of the
    partition function without bias, only noisier.

    **Draws** come from a generator of the module's own, so that a training does not depend on torch's global one. A
    loss that is computed a second time has others: leave it outside of `torch.utils.checkpoint`.

    Parameters
    ----------
    num_labels, dim : L and D.
    num_codewords : C in each of the two codebooks; `"auto"`: 1.25 sqrt(L), at most 320.
    quantizer : `"pq"` or `"rq"`.
    estimator, pool_instances, gradient_negatives, correction_power, bias, weighting, decoupled, sparse, precision,
    seed, device, table_device, dtype : as in `LabelSoftmax`, which also says what `state_dict()` holds.
    num_draws : `"auto"`: 2,048 a batch, or all labels where they are few; 64 for each instance.
    prior, label_frequencies, frequency_power, refresh_iterations : as in `MidxSampler`; frequencies are (L,) counts.
        The default prior, the bias, needs none: a trained bias is about the log frequency.
    num_instances : N, instances that the frequencies were counted over, of which each batch is a random part. Given
        with the frequencies, a pool makes much more of few draws (`LabelSoftmax`, `in_batch`).

    Raises
    ------
    ValueError : an option is none of those named, or the frequency prior has no frequencies.

    Examples
    --------
    >>> softmax = MIDXSoftmax(num_labels=50_000, dim=64)
    >>> queries, label_ids = torch.randn(32, 64, requires_grad=True), torch.arange(32)
    >>> softmax(queries, label_ids).backward()
    >>> softmax.topk(queries, 5).label_ids.shape
    (32, 5)
    """

    def __init__(
        self,
        num_labels: int,
        dim: int,
        *,
        num_codewords: int | str = "auto",
        quantizer: str = "pq",
        estimator: str = "pool",
        num_draws: int | str = "auto",
        pool_instances: int | None = None,
        gradient_negatives: int | None = None,
        correction_power: float = 1.0,
        prior: str = "bias",
        label_frequencies: torch.Tensor | None = None,
        num_instances: int | None = None,
        frequency_power: float = 1.0,
        refresh_iterations: int = 2,
        bias: bool = True,
        weighting: str = "mean",
        decoupled: bool = True,
        sparse: bool = False,
        precision: torch.dtype | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        table_device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("num_labels", num_labels), ("num_codewords", num_codewords), ("num_draws", num_draws)):
            if isinstance(size, str) and (size != "auto" or name == "num_labels"):
                raise ValueError(f"{name} is {size!r}: expected a number{'' if name == 'num_labels' else ' or auto'}")
            if not isinstance(size, str) and size < 1:
                raise ValueError(f"{name} is {size}: expected at least 1")
        if num_instances is not None and num_instances < 1:
            raise ValueError(f"num_instances is {num_instances}: expected at least 1")
        if label_frequencies is not None:
            label_frequencies = torch.as_tensor(label_frequencies)
            if label_frequencies.shape != (num_labels,):
                shape = tuple(label_frequencies.shape)
                raise ValueError(f"label_frequencies has the shape {shape}: expected ({num_labels},), a count a label")
        codewords = auto_num_codewords(num_labels) if isinstance(num_codewords, str) else num_codewords
        if isinstance(num_draws, str):
            num_draws = auto_num_draws(num_labels) if estimator == "pool" else 64
        in_batch = None
        if num_instances is not None:
            if label_frequencies is None:
                raise ValueError("num_instances goes with label_frequencies")
            in_batch = InBatchSampler(label_frequencies, num_instances=num_instances)
        super().__init__(
            num_labels,
            dim,
            in_batch=in_batch,
            sampler=MidxSampler(
                quantizer=quantizer,
                num_codewords=codewords,
                prior=prior,
                label_frequencies=label_frequencies,
                frequency_power=frequency_power,
                refresh_iterations=refresh_iterations,
                seed=seed,
            ),
            estimator=estimator,
            num_draws=num_draws,
            pool_instances=pool_instances,
            gradient_negatives=gradient_negatives,
            correction_power=correction_power,
            bias=bias,
            weighting=weighting,
            decoupled=decoupled,
            sparse=sparse,
            precision=precision,
            seed=seed,
            device=device,
            table_device=table_device,
            dtype=dtype,
        )
