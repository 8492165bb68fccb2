"""Layer 5. Every sampler against the full softmax, on a trained model: divergence, weights, gradient, time.

Before it: softmax and samplers; after it: the pipeline. With P the softmax over all labels of a query and Q the
proposal, each instance has, exactly, by a sum over all labels,

    KL(Q||P), KL(P||Q)      in nats
    ESS / M                 1 / sum_i P_i^2 / Q_i = 1 / (1 + chi^2), the effective share of importance-weighted draws
    max_i P_i / Q_i         the largest importance weight

**The bound on KL(Q||P).** P and Q are softmaxes of o and of o - r, for MIDX with the residual logit
`r_i = o_i - s1 - s2 - log pi_i` (bias and prior included, scores clamped as they are drawn from). A constant added to
all r_i changes neither, and `log Q_i / P_i = log sum_j Q_j exp(r_j) - r_i` lies between min r - r_i and max r - r_i. So

    KL(Q||P) <= max_i |log Q_i / P_i| <= max r - min r = 2 min_c max_i |r_i - c|,

the `2 max|r|` of METHOD.md at its best constant c, for which `r = log P - log Q` will do. The uniform proposal is the
case r = o, and a query-free q has `(max o - min o) + log(L max_i q_i)`, the best constants of `2 max|o|` again.

**The gradient** is that of the run's loss by the queries of one batch, under the run's estimator, drawn again and again
for the same queries and positives. The estimate of the partition function is unbiased; its logarithm, and so the
gradient, has a bias that falls with the number of draws. The batch's positives count once each
(`sampler.positives = certain`), so that nothing but the sampler is measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmc_midx.build import build_encoder, build_sampler
from xmc_midx.checkpoint import read_model, refuse_misfits
from xmc_midx.config import Config
from xmc_midx.data.features import FeatureScaling
from xmc_midx.data.known_labels import KnownLabels
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import DataError, UsageError
from xmc_midx.quantization import require_one_model
from xmc_midx.rows import sparse_rows
from xmc_midx.rundir import RunDirectory
from xmc_midx.softmax import LabelSoftmax
from xmc_midx.types import Reporter, Sampler, SamplerDiagnosis, SilentReporter, Spread

__all__ = ["Instances", "TrainedModel", "choose_instances", "diagnose_samplers"]

_CHUNK_ELEMENTS = 1 << 21
"""Elements of one (instances, L) matrix; about six in float64 live at once, besides a sampler's own: 100 MiB."""
_ENCODE_CHUNK = 4096
_NUM_TIMED = 5
"""Repeats that are timed: their median is robust, and a dense sampler's draws take as long as its gradient."""

Tick = Callable[[], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedModel:
    """What a run's checkpoint holds, on one device."""

    config: Config
    """Resolved."""
    encoder: SparseEncoder
    label_table: torch.Tensor
    """(R, D) float32: L without the labels that have no row."""
    bias: torch.Tensor
    """(R,) float32."""
    frequencies: torch.Tensor
    """(R,) integers, training instances of each label."""
    num_train: int
    """N of the training split."""
    scaling: FeatureScaling
    """Of the feature rows."""
    known_labels: KnownLabels
    """The labels of the table's rows."""

    @classmethod
    def load(cls, run: RunDirectory, device: torch.device) -> TrainedModel:
        """The best model of a run directory.

        Raises
        ------
        DataError : there is no sound checkpoint, or it does not know the label frequencies.
        """
        model, source = read_model(run)
        if not {"train.label_frequencies", "train.num_instances"} <= model.keys():
            raise DataError(
                f"{source}: does not hold the label frequencies, which the samplers need.",
                hint="It is of an older release; train again.",
            )
        with refuse_misfits(source):
            require_one_model({name: tensor.numpy() for name, tensor in model.items()})
            num_rows = model["encoder.embedding"].shape[0]
            scaling = FeatureScaling.of(run.config.data, model, num_rows)
            known_labels = KnownLabels.of(run.config.data, model, model["labels.weight"].shape[0])
            encoder = build_encoder(run.config, num_rows)
            names = {n.removeprefix("encoder."): t for n, t in model.items() if n.startswith("encoder.")}
            encoder.load_state_dict(names, assign=True)
        return cls(
            config=run.config,
            encoder=encoder.to(device).eval(),
            label_table=model["labels.weight"].to(device),
            bias=model["labels.bias"].to(device),
            frequencies=model["train.label_frequencies"].to(device),
            num_train=int(model["train.num_instances"]),
            scaling=scaling,
            known_labels=known_labels,
        )

    @property
    def num_features(self) -> int:
        return self.scaling.num_features or self.encoder.num_features

    @torch.no_grad()
    def encode(self, features: csr_matrix, *, dropout: bool = False, seed: int = 0) -> torch.Tensor:
        """(N, F) rows, scaled as in training -> (N, D) queries; with `dropout`, as training draws them."""
        self.encoder.dropout.generator = torch.Generator(self.label_table.device).manual_seed(seed)
        self.encoder.train(dropout)
        parts = [
            self.encoder(sparse_rows(features[begin : begin + _ENCODE_CHUNK]).to(self.label_table.device))
            for begin in range(0, features.shape[0], _ENCODE_CHUNK)
        ]
        self.encoder.eval()
        return torch.cat(parts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instances:
    """Queries and positives of the same instances."""

    queries: torch.Tensor
    """(B, D) float32."""
    positives: torch.Tensor
    """(Y,) int64."""
    offsets: torch.Tensor
    """(B+1,) int64: instance i owns `positives[offsets[i]:offsets[i+1]]`."""

    @classmethod
    def build(cls, query_BD: torch.Tensor, labels: csr_matrix) -> Instances:
        device = query_BD.device
        return cls(
            queries=query_BD,
            positives=torch.from_numpy(labels.indices.astype(np.int64)).to(device),
            offsets=torch.from_numpy(labels.indptr.astype(np.int64)).to(device),
        )

    def first(self, count: int) -> Instances:
        """The first `count` instances, or all where there are fewer."""
        offsets = self.offsets[: count + 1]
        return Instances(queries=self.queries[:count], positives=self.positives[: int(offsets[-1])], offsets=offsets)


def choose_instances(labels: csr_matrix, count: int, seed: int) -> np.ndarray:
    """Up to `count` random rows that have a label; the others add nothing to the loss, whatever is drawn for them."""
    labelled = np.flatnonzero(np.diff(labels.indptr))
    return np.random.default_rng(seed).permutation(labelled)[:count]


def diagnose_samplers(
    model: TrainedModel,
    instances: Instances,
    *,
    names: Sequence[str],
    num_draws: int,
    num_instances: int,
    repeats: int,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> tuple[SamplerDiagnosis, ...]:
    """Fit each sampler to the model's label table and measure it.

    Parameters
    ----------
    instances : the proposals are measured on the first `num_instances` of them, gradients and draws on the run's batch
        size; fewer where there are not so many.
    names : as in `SamplerConfig`, but for `full`, which draws nothing.
    num_draws : M, for a batch or for each instance, as the run's estimator has it.
    repeats : of the gradient, >= 2.
    seed : of the draws; the codebooks' is the run's.

    Raises
    ------
    UsageError : a sampler does not go with the run's estimator.
    """
    reporter = reporter or SilentReporter()
    batch_size = model.config.training.batch_size
    assert isinstance(batch_size, int), "the configuration is resolved"
    measured, batch = instances.first(num_instances).queries, instances.first(batch_size)
    samplers = {name: _build(model, name) for name in names}
    softmax = _softmax(model, num_draws)
    chunk = max(1, _CHUNK_ELEMENTS // model.label_table.shape[0])
    reporter.start("diagnose", len(samplers) * (-(-measured.shape[0] // chunk) + repeats))
    full_BD = _query_gradient(softmax, batch)
    diagnoses = []
    for name in names:
        # The one before is let go first: its tables may be as large as the label table.
        softmax.sampler, sampler = None, samplers.pop(name)
        refresh_seconds = _refresh(sampler, model)
        proposal = _measure_proposal(name, sampler, model, torch.split(measured, chunk), reporter.step)
        softmax.sampler = sampler
        softmax.generator = torch.Generator(model.label_table.device).manual_seed(seed)
        gradient = _measure_gradient(softmax, batch, full_BD, repeats, reporter.step)
        diagnoses.append(
            SamplerDiagnosis(
                name=name,
                kl_from_softmax=proposal.get("kl_from_softmax"),
                kl_to_softmax=proposal.get("kl_to_softmax"),
                kl_bound=proposal.get("kl_bound"),
                effective_share=proposal.get("effective_share"),
                log10_max_weight=proposal.get("log10_max_weight"),
                gradient_bias=gradient.bias,
                gradient_noise=gradient.deviation / math.sqrt(repeats),
                gradient_deviation=gradient.deviation,
                gradient_error=gradient.error,
                pool_size=gradient.pool_size,
                refresh_seconds=refresh_seconds,
                draw_microseconds=1e6 * gradient.draw_seconds / batch.queries.shape[0],
                draw_share=min(1.0, gradient.draw_seconds / gradient.seconds),
            )
        )
    return tuple(diagnoses)


def _refresh(sampler: Sampler, model: TrainedModel) -> float:
    """Seconds of a fit to the model's label table."""
    device = model.label_table.device
    return _timed(device, lambda: sampler.refresh(model.label_table, model.bias))[1]


def _build(model: TrainedModel, name: str) -> Sampler:
    options = model.config.sampler.model_copy(update={"name": name})
    config = model.config.model_copy(update={"sampler": options})
    sampler = build_sampler(config, model.frequencies, model.num_train)
    if sampler is None:
        raise UsageError(f"Sampler {name} draws nothing: it is what the samplers are measured against.")
    return sampler


def _softmax(model: TrainedModel, num_draws: int) -> LabelSoftmax:
    """The run's loss on the trained table, for now over all labels."""
    # On the meta device: the start values that the table would get take as much memory as the table itself.
    with torch.device("meta"):
        softmax = LabelSoftmax(
            *model.label_table.shape,
            sampler=None,
            estimator=model.config.sampler.estimator,
            num_draws=num_draws,
            correction_power=model.config.sampler.correction_power,
            weighting=model.config.loss.weighting,
            decoupled=model.config.loss.decoupled,
        )
    softmax.weight = torch.nn.Parameter(model.label_table, requires_grad=False)
    softmax.bias = torch.nn.Parameter(model.bias, requires_grad=False)
    return softmax


# ---------------------------------------------------------------------- the proposal


@torch.no_grad()
def _measure_proposal(
    name: str, sampler: Sampler, model: TrainedModel, chunks: Sequence[torch.Tensor], tick: Tick
) -> dict[str, Spread]:
    """The figures of `SamplerDiagnosis` that compare P and Q, by name; empty where the sampler has no density."""
    parts: dict[str, list[torch.Tensor]] = {}
    label_ids = torch.arange(model.label_table.shape[0], device=model.label_table.device)
    for query_bD in chunks:
        log_q_bL = _log_proposal(sampler, query_bD, label_ids)
        if log_q_bL is not None:
            logits_bL = torch.addmm(model.bias, query_bD, model.label_table.T)
            for figure, values_b in _compare(name, logits_bL.double(), log_q_bL.double()).items():
                parts.setdefault(figure, []).append(values_b)
        tick()
    return {figure: _spread(torch.cat(values)) for figure, values in parts.items()}


def _log_proposal(sampler: Sampler, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor | None:
    try:
        return sampler.log_proposal(query_BD, label_ids)
    except NotImplementedError:
        return None


def _compare(name: str, logits_BL: torch.Tensor, log_q_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The figures of each instance, (B,) each, from the logits and the proposal of all labels."""
    log_p_BL = torch.log_softmax(logits_BL, 1)
    # Samplers normalise in float32: what is missing to one, 1e-6 nats, is no divergence.
    log_q_BL = torch.log_softmax(log_q_BL, 1)
    residual_BL = log_p_BL - log_q_BL
    figures = {
        "kl_from_softmax": _mean(log_q_BL, -residual_BL).clamp_(min=0.0),
        "kl_to_softmax": _mean(log_p_BL, residual_BL).clamp_(min=0.0),
        "effective_share": torch.exp(-torch.logsumexp(log_p_BL + residual_BL, 1)),
        "log10_max_weight": residual_BL.amax(1) / math.log(10),
    }
    if name.startswith("midx-"):
        figures["kl_bound"] = _range(residual_BL)
    elif name == "uniform":
        figures["kl_bound"] = _range(logits_BL)
    elif name == "frequency":
        figures["kl_bound"] = _range(logits_BL) + math.log(log_q_BL.shape[1]) + log_q_BL.amax(1)
    return figures


def _mean(log_law_BL: torch.Tensor, values_BL: torch.Tensor) -> torch.Tensor:
    """(B,) mean of the values under a law; labels of probability 0 count nothing, be their value infinite."""
    law_BL = log_law_BL.exp()
    return (law_BL * values_BL).masked_fill_(law_BL == 0, 0.0).sum(1)


def _range(values_BL: torch.Tensor) -> torch.Tensor:
    return values_BL.amax(1) - values_BL.amin(1)


def _spread(values_B: torch.Tensor) -> Spread:
    # "nearest": between two infinite values the usual interpolation is NaN.
    p10, p90 = (float(torch.quantile(values_B, q, interpolation="nearest")) for q in (0.1, 0.9))
    return Spread(mean=float(values_B.mean()), p10=p10, p90=p90)


# ---------------------------------------------------------------------- the gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class _GradientFigures:
    bias: float
    deviation: float
    error: float
    pool_size: float
    seconds: float
    """Of the loss and its gradient, draws included; median."""
    draw_seconds: float
    """Of the draws alone; median."""


def _measure_gradient(
    softmax: LabelSoftmax, batch: Instances, full_BD: torch.Tensor, repeats: int, tick: Tick
) -> _GradientFigures:
    """Mean and variance of the gradient over `repeats` draws for the same batch, in one pass (Welford)."""
    mean_BD, squares = torch.zeros_like(full_BD), torch.zeros((), dtype=full_BD.dtype, device=full_BD.device)
    seconds, draw_seconds, pool_sizes = [], [], []
    for count in range(1, repeats + 1):
        gradient_BD, elapsed = _timed(batch.queries.device, lambda: _query_gradient(softmax, batch))
        difference_BD = gradient_BD - mean_BD
        mean_BD += difference_BD / count
        squares += (difference_BD * (gradient_BD - mean_BD)).sum()
        if count <= _NUM_TIMED:
            # Side by side: another process slows both alike, and their ratio stays.
            seconds.append(elapsed)
            draw_seconds.append(_draw(softmax, batch))
        pool_sizes.append(softmax.pool_size)
        tick()
    length = torch.linalg.vector_norm(full_BD)
    bias = torch.linalg.vector_norm(mean_BD - full_BD) / length
    return _GradientFigures(
        bias=float(bias),
        deviation=float((squares / (repeats - 1)).sqrt() / length),
        error=float((bias.square() + squares / repeats / length.square()).sqrt()),
        pool_size=statistics.fmean(pool_sizes),
        seconds=statistics.median(seconds),
        draw_seconds=statistics.median(draw_seconds),
    )


def _query_gradient(softmax: LabelSoftmax, batch: Instances) -> torch.Tensor:
    """(B, D) float64 gradient of the loss by the queries."""
    query_BD = batch.queries.clone().requires_grad_()
    (gradient_BD,) = torch.autograd.grad(softmax(query_BD, (batch.positives, batch.offsets)), query_BD)
    return gradient_BD.double()


def _draw(softmax: LabelSoftmax, batch: Instances) -> float:
    """Seconds of the draws for a batch, as the loss has them made."""
    sampler = softmax.sampler
    assert sampler is not None
    arguments = (batch.queries, softmax.num_draws, softmax.generator)
    if softmax.estimator == "instance":
        return _timed(batch.queries.device, lambda: sampler.sample(*arguments))[1]
    certain = torch.unique(batch.positives)
    return _timed(batch.queries.device, lambda: sampler.sample_pool(*arguments, certain))[1]


def _timed(device: torch.device, call: Callable[[], Result]) -> tuple[Result, float]:
    """A call's result and its seconds, with what it left running on the device."""
    _finish(device)
    started = time.perf_counter()
    result = call()
    _finish(device)
    return result, time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
