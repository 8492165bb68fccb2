"""Layer 1. The records and protocols that cross module borders.

Shape legend, used as name suffixes in all mathematical code:

====  ====================================  ====  ====================================
`B`   instances in a batch                  `M`   draws
`N`   instances                             `P`   labels in a pool
`F`   features                              `C`   codewords in a codebook
`L`   labels                                `K`   results kept, or the k of a metric
`D`   embedding size                        `Y`   positives of a batch, flattened
====  ====================================  ====  ====================================

Labels and features are numbered from 0; where a pad is allowed, it is the number of them (`xmc_midx.padding`). Ragged
rows use offsets: row i owns `offsets[i]:offsets[i + 1]`, and an empty range is an empty row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "Batch",
    "EpochStats",
    "LabelIndex",
    "LabelSample",
    "MetricReport",
    "Reporter",
    "Sampler",
    "SamplerDiagnosis",
    "SilentReporter",
    "SparseRows",
    "Spread",
    "TopK",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """Feature rows of a batch, in CSR order. An absent feature has the value 0."""

    feature_ids: torch.Tensor
    """(nnz,) int64, in 0..F-1; behind the last offset there may be pads, F with the value 0 (`xmc_midx.padding`)."""
    values: torch.Tensor
    """(nnz,) float32, finite."""
    offsets: torch.Tensor
    """(B+1,) int64: row i owns `offsets[i]:offsets[i+1]`."""

    @property
    def num_rows(self) -> int:
        return self.offsets.shape[0] - 1

    def to(self, device: torch.device) -> SparseRows:
        return SparseRows(
            feature_ids=self.feature_ids.to(device, non_blocking=True),
            values=self.values.to(device, non_blocking=True),
            offsets=self.offsets.to(device, non_blocking=True),
        )

    def pin_memory(self) -> SparseRows:
        """A copy that `to` moves without waiting; needs CUDA."""
        return SparseRows(
            feature_ids=self.feature_ids.pin_memory(),
            values=self.values.pin_memory(),
            offsets=self.offsets.pin_memory(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Instances of one training step. An instance may have no positives; it then adds nothing to the loss."""

    features: SparseRows
    positives: torch.Tensor
    """(Y,) int64 label ids, in 0..L-1, without duplicates inside a row; behind the last offset there may be pads, L."""
    positive_offsets: torch.Tensor
    """(B+1,) int64: instance i owns `positive_offsets[i]:positive_offsets[i+1]`."""
    instance_ids: torch.Tensor
    """(B,) int64 row numbers in the training split."""

    @property
    def num_instances(self) -> int:
        return self.instance_ids.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What `to` moves."""
        rows = self.features
        return rows.feature_ids, rows.values, rows.offsets, self.positives, self.positive_offsets

    def to(self, device: torch.device) -> Batch:
        return Batch(
            features=self.features.to(device),
            positives=self.positives.to(device, non_blocking=True),
            positive_offsets=self.positive_offsets.to(device, non_blocking=True),
            instance_ids=self.instance_ids,
        )

    def pin_memory(self) -> Batch:
        """A copy that `to` moves without waiting; needs CUDA."""
        return Batch(
            features=self.features.pin_memory(),
            positives=self.positives.pin_memory(),
            positive_offsets=self.positive_offsets.pin_memory(),
            instance_ids=self.instance_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSample:
    """Labels drawn for a batch, and what the estimator subtracts from their logits."""

    label_ids: torch.Tensor
    """(P,) int64 distinct labels shared by the batch, or (B, M) int64 draws of each instance, repeats kept. Among
    the shared, repeats have the log weight +inf, and count nothing."""
    log_weight: torch.Tensor
    """Same shape as `label_ids`, float, in nats: log inclusion probability of a shared label, or `log(M Q)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The best K labels of each instance: falling scores, ties to the smaller label id."""

    label_ids: NDArray[np.int64]
    """(N, K) int64; -1 pads a row that has fewer than K results."""
    scores: NDArray[np.float32]
    """(N, K) float32: logits of a label table, scores of a whole prediction in nats, or probabilities where they were
    asked for; -inf where `label_ids` is -1."""

    @classmethod
    def empty(cls, num_instances: int, k: int) -> TopK:
        """All pads."""
        import numpy as np  # not at the top: `--help` does without

        # NumPy's `full` takes a few rows three times as long.
        found = cls(
            label_ids=np.empty((num_instances, k), dtype=np.int64),
            scores=np.empty((num_instances, k), dtype=np.float32),
        )
        found.label_ids.fill(-1)
        found.scores.fill(-np.inf)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricReport:
    """Metrics of a prediction, with all that is needed to read them."""

    metrics: Mapping[str, float]
    """`"P@1" -> value in [0, 1]`; the families are P, nDCG, R, PSP and PSnDCG."""
    num_instances: int
    """Instances counted; those without labels count as 0 in every mean."""
    num_without_labels: int
    num_ignored: int = 0
    """Pairs of an instance and a label that a filter file leaves out of predictions and truth."""
    propensity_a: float | None = None
    """A of the propensity model; None where no training split gave label frequencies (then there is no PSP)."""
    propensity_b: float | None = None
    definition: str = "xmc-midx/1"
    """Version of the definitions in `xmc_midx.metrics`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStats:
    """What one epoch of training did."""

    epoch: int
    """Counted from 1."""
    num_epochs: int
    num_steps: int
    """Steps since training began."""
    loss: float
    """Mean over the positives, nats per positive."""
    instances_per_second: float
    learning_rate: float
    """Label table's rate at the end of the epoch."""
    seconds: float
    """Of training alone, without validation."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Metrics on the validation split; empty where there is none."""
    sampler: Mapping[str, float] = field(default_factory=dict)
    """Sampler diagnostics: mean pool size, largest cell, and the like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure that every instance has: its mean over the instances, and its 10th and 90th percentile."""

    mean: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerDiagnosis:
    """A sampler against the full softmax, on a trained model; the definitions are `xmc_midx.diagnostics`'s.

    The first five figures are None for a sampler without a density. P is the softmax over all labels, Q the proposal.
    """

    name: str
    kl_from_softmax: Spread | None
    """KL(Q||P) in nats."""
    kl_to_softmax: Spread | None
    """KL(P||Q) in nats; infinite where Q leaves out a label."""
    kl_bound: Spread | None
    """What theory says that KL(Q||P) is at most, in nats; None also where it says nothing of this sampler."""
    effective_share: Spread | None
    """Effective sample size of importance-weighted draws, as a share of the draws, in [0, 1]."""
    log10_max_weight: Spread | None
    """log10 of the largest importance weight, `max_i P_i / Q_i`."""
    gradient_bias: float
    """Length of (mean gradient of the repeats - full softmax's gradient), as a share of the latter's length."""
    gradient_noise: float
    """What `gradient_bias` is for an estimator without bias: the standard error of the mean gradient, same unit."""
    gradient_deviation: float
    """Standard deviation of one repeat's gradient, same unit."""
    gradient_error: float
    """Root mean square distance of one repeat's gradient to the full softmax's, same unit: bias and deviation."""
    pool_size: float
    """Distinct labels that a batch is scored against, positives included; mean over the repeats."""
    refresh_seconds: float
    """Of one fit to the label table."""
    draw_microseconds: float
    """Of the draws alone, for each instance of a batch; median."""
    draw_share: float
    """The draws' part of the time of a batch's loss and its gradient."""


class Sampler(Protocol):
    """A proposal over the labels. `log_proposal` is normalised over all L labels for each query."""

    @property
    def fitted(self) -> bool:
        """Whether labels can be drawn: `refresh` or `load_state_dict` gave all that a draw needs."""
        ...

    def refresh(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        """Rebuild what depends on the label table."""
        ...

    def sample_pool(
        self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator, certain: torch.Tensor | None = None
    ) -> LabelSample:
        """Distinct labels for the whole batch: those of about `num_draws` draws that are not in `certain` (U,) rising.

        `log_weight` is the log probability that a label was drawn at all.
        """
        ...

    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        """`num_draws` i.i.d. labels for each instance; `log_weight` is `log(M Q(i|z))`."""
        ...

    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """log Q(i|z) in nats, (B, P) for `label_ids` (P,) or (B, M) for `label_ids` (B, M)."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `refresh` built from earlier tables and cannot build again from this one."""
        ...

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Restore `state_dict()`; `bias_L` is the bias at the time of the refresh, on the device to work on."""
        ...


class LabelIndex(Protocol):
    """Finds the labels with the largest logits of a query, by their rows in the table: where some labels have none,
    `Predictor` knows which label a row is of."""

    @property
    def num_labels(self) -> int: ...

    def search(
        self,
        query_BD: torch.Tensor,
        k: int,
        *,
        allow: torch.Tensor | None = None,
        deny: torch.Tensor | None = None,
    ) -> TopK: ...

    @property
    def source(self) -> Any:
        """Label table (`quantization.StoredTable`) and bias (L,) where a search may miss labels, else None."""
        ...


class Reporter(Protocol):
    """Receives the progress of a long call. The library never prints."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` steps are expected, None if unknown. A stage ends where the next begins."""
        ...

    def step(self, advance: int = 1, **facts: float) -> None:
        """`advance` steps are done; `facts` are figures worth showing live (loss, instances/s)."""
        ...

    def epoch(self, stats: EpochStats) -> None: ...

    def message(self, text: str) -> None:
        """One line for the user: something chosen, found or repaired. It may come from another thread than steps do."""
        ...


class SilentReporter:
    """A `Reporter` that shows nothing: the default of every library call."""

    def start(self, stage: str, total: int | None) -> None:
        pass

    def step(self, advance: int = 1, **facts: float) -> None:
        pass

    def epoch(self, stats: EpochStats) -> None:
        pass

    def message(self, text: str) -> None:
        pass


DEFAULT_KS: Sequence[int] = (1, 3, 5)
"""The k at which the field reports its metrics."""
DEFAULT_PROPENSITY = (0.55, 1.5)
"""A and B of the propensity model for a set that is not in the registry (Jain et al. 2016)."""
