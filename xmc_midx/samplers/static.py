"""Layer 3. Proposals that do not look at the query: uniform, label frequency, and the batch's own positives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from xmc_midx.compiled import compiled
from xmc_midx.samplers.draws import distinct, draw, draw_pool
from xmc_midx.types import LabelSample

__all__ = ["FrequencySampler", "InBatchSampler", "UniformSampler", "inclusion"]


class UniformSampler:
    """`Q(i) = 1 / L`. Log weights are in the queries' dtype."""

    fitted = True

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def refresh(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        """Nothing depends on the table but the device."""
        self._follow(bias_L.device)

    def sample_pool(
        self,
        query_BD: torch.Tensor,
        num_draws: int,
        generator: torch.Generator,
        certain: torch.Tensor | None = None,
        *,
        padded: bool = False,
    ) -> LabelSample:
        """Distinct labels for the whole batch (`draw_pool`); `padded`, all `num_draws` of them, with the log weight
        +inf where one was drawn before."""

        def probability(label_ids: torch.Tensor) -> torch.Tensor:
            return self._probability(label_ids).to(query_BD.dtype)

        drawn = distinct(lambda count: self._draw((count,), generator), probability, padded=padded)
        return draw_pool(drawn, probability, num_draws, certain)

    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        label_ids = self._draw((query_BD.shape[0], num_draws), generator)
        log_weight = self.log_proposal(query_BD, label_ids) + math.log(num_draws)
        return LabelSample(label_ids=label_ids, log_weight=log_weight)

    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        log_probability = self._probability(label_ids).log().to(query_BD.dtype)
        return log_probability if label_ids.dim() == 2 else log_probability.expand(query_BD.shape[0], -1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Nothing to restore; only the device may have changed."""
        self._follow(bias_L.device)

    def _follow(self, device: torch.device) -> None:
        """Move what the constructor was given to the device of the table."""

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.num_labels, shape, generator=generator, device=generator.device)

    def _probability(self, label_ids: torch.Tensor) -> torch.Tensor:
        """Q(i), of the shape of `label_ids`, float64."""
        return torch.full(label_ids.shape, 1.0 / self.num_labels, dtype=torch.float64, device=label_ids.device)


class FrequencySampler(UniformSampler):
    """`Q(i) ~ (n_i + 1)^power`: the unigram proposal. The 1 keeps every label reachable.

    Parameters
    ----------
    label_frequencies : (L,) training instances of each label.
    power : 1 is the plain unigram, 0 is uniform.
    """

    def __init__(self, label_frequencies: torch.Tensor, *, power: float = 1.0) -> None:
        super().__init__(label_frequencies.shape[0])
        weight_L = (label_frequencies.double() + 1.0).pow(power)
        self._probability_L = weight_L / weight_L.sum()
        self._cumulative_L = torch.cumsum(self._probability_L, 0)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return draw(self._cumulative_L, math.prod(shape), generator).view(shape)

    def _probability(self, label_ids: torch.Tensor) -> torch.Tensor:
        return self._probability_L[label_ids]

    def _follow(self, device: torch.device) -> None:
        self._probability_L, self._cumulative_L = self._probability_L.to(device), self._cumulative_L.to(device)


class InBatchSampler(UniformSampler):
    """The positives of the batch are each other's negatives; nothing is drawn.

    To an instance that does not have label i, the batch is B - 1 other instances of the N - 1 that there are, without
    replacement: one of them has the label with probability `1 - C(N-1-n, B-1) / C(N-1, B-1)`, and as a negative it is
    weighted by the inverse of that (the logQ correction). There is no density to state: labels that no instance has
    are never negatives, so the estimate of the partition function covers the labels seen in training alone.

    Parameters
    ----------
    label_frequencies : (L,) training instances of each label, n.
    num_instances : N, the training instances.
    """

    def __init__(self, label_frequencies: torch.Tensor, *, num_instances: int) -> None:
        super().__init__(label_frequencies.shape[0])
        self.num_instances = num_instances
        self.positives_per_instance = float(label_frequencies.sum()) / num_instances
        self.label_frequencies = label_frequencies

    def sample_pool(
        self,
        query_BD: torch.Tensor,
        num_draws: int,
        generator: torch.Generator,
        certain: torch.Tensor | None = None,
        *,
        padded: bool = False,
    ) -> LabelSample:
        nothing = torch.empty(0, device=query_BD.device)
        return LabelSample(label_ids=nothing.long(), log_weight=nothing)

    def log_inclusion(self, label_ids: torch.Tensor, num_others: int) -> torch.Tensor:
        """(P,) float64 log probability that one of `num_others` random other instances has the label; -inf for a label
        that none has.

        `n log(1 - (B-1) / (N-1 - (n-1)/2))` stands for the logarithm of the quotient of binomials: exact for n = 1, and
        without the cancellation of large logarithms. How near it is elsewhere depends on B: within 2e-3 of the
        probability for B = 8 and most n (where nearly every instance has a label and B is 2, it may be 0.1 off),
        1e-4 for 32, 1e-5 for 128.
        """
        frequency_P = self.label_frequencies[label_ids].double()
        left_P = (self.num_instances - 1 - (frequency_P - 1.0) / 2).clamp_(min=max(num_others, 1))
        log_missed_P = frequency_P * torch.log1p(-num_others / left_P)
        return torch.log(-torch.expm1(log_missed_P.masked_fill_(frequency_P <= 0, 0.0)))

    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        raise NotImplementedError("in-batch negatives are shared by the batch: there are no draws of an instance")

    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("in-batch negatives have no density over the labels")

    def _follow(self, device: torch.device) -> None:
        self.label_frequencies = self.label_frequencies.to(device)


@compiled
def inclusion(frequency: float, num_instances: int, num_others: int) -> Any:
    """The probability of `InBatchSampler.log_inclusion`, for compiled code."""
    if frequency <= 0.0:
        return 0.0
    left = max(num_instances - 1 - (frequency - 1.0) / 2, max(num_others, 1))
    return -np.expm1(frequency * np.log1p(-num_others / left))
