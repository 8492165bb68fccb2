"""Layer 3. Dynamic negative sampling: the hardest of some random labels, without a density."""

from __future__ import annotations

import torch

from xmc_midx.types import LabelSample

__all__ = ["HardNegativeSampler"]


class HardNegativeSampler:
    """Draws candidates uniformly and keeps those of the highest logits (Zhang et al. 2013, "Optimizing top-N
    collaborative filtering via dynamic negative item sampling").

    Which labels are kept depends on the whole set of candidates, so a kept label has no density to correct by: its
    `log_weight` is 0, and the estimate of the partition function is that of the kept labels alone. The kept labels are
    the ones with the highest logits of the table as it is at each step: `refresh` keeps the table itself, not a copy.

    Parameters
    ----------
    candidates_per_draw : candidates scored for each label kept; 1 is uniform sampling without correction.
    """

    def __init__(self, *, candidates_per_draw: int = 4) -> None:
        self.candidates_per_draw = candidates_per_draw
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def fitted(self) -> bool:
        return self._table is not None

    def refresh(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        """Use this table from now on, with all changes that are made to it in place."""
        self._table = (label_table_LD, bias_L)

    @torch.no_grad()
    def sample_pool(
        self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator, certain: torch.Tensor | None = None
    ) -> LabelSample:
        """The `num_draws` candidates outside `certain` that have the highest logit with any query of the batch."""
        candidates = self._candidates(num_draws, generator)
        if certain is not None:
            candidates = candidates[~torch.isin(candidates, certain, assume_unique=True)]
        hardest = self._logits(query_BD, candidates).amax(0)
        kept = torch.topk(hardest, min(num_draws, candidates.shape[0])).indices
        label_ids = torch.sort(candidates[kept]).values
        return LabelSample(label_ids=label_ids, log_weight=torch.zeros_like(hardest[: label_ids.shape[0]]))

    @torch.no_grad()
    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        """Of candidates that the batch shares, the `num_draws` with the highest logits of each instance; all of them,
        where fewer are distinct."""
        candidates = self._candidates(num_draws, generator)
        kept = torch.topk(self._logits(query_BD, candidates), min(num_draws, candidates.shape[0]))
        return LabelSample(label_ids=candidates[kept.indices], log_weight=torch.zeros_like(kept.values))

    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("hard negatives are the best of a set of candidates: they have no density")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing: the label table is the whole state."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Nothing: `refresh` with the restored table restores the sampler."""

    def _candidates(self, num_draws: int, generator: torch.Generator) -> torch.Tensor:
        """Distinct rising labels: a label that is drawn twice would count twice, without a weight to correct it."""
        assert self._table is not None, "refresh before use"
        bias_L = self._table[1]
        count = num_draws * self.candidates_per_draw
        label_ids = torch.randint(bias_L.shape[0], (count,), generator=generator, device=bias_L.device)
        distinct: torch.Tensor = torch.unique(label_ids)
        return distinct

    def _logits(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        assert self._table is not None
        table_LD, bias_L = self._table
        return torch.addmm(bias_L[label_ids], query_BD.to(table_LD.dtype), table_LD[label_ids].T)
