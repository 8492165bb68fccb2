"""Layer 3. Proposals that are evaluated for every label: the softmax itself, and the base of its kin.

A batch costs O(B L D), as much as the full softmax, so these are references and baselines, not a way to scale. They
read the label table as it is at each step: `refresh` keeps the table itself, not a copy (but for half precision).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from xmc_midx.samplers.draws import distinct, draw, draw_pool
from xmc_midx.types import LabelSample

__all__ = ["DenseSampler", "SoftmaxSampler"]

_CHUNK_ELEMENTS = 1 << 24
"""Log probabilities held at once: whole rows of a few instances, one where a row is longer than this."""


class DenseSampler:
    """A proposal that is a function of an instance's logits; a child says which in `_log_law`."""

    def __init__(self) -> None:
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
        """Distinct labels drawn from the mean proposal of the batch (`draw_pool`)."""
        sums_L = torch.stack([log_law.exp_().sum(0) for log_law in self._log_laws(query_BD)]).sum(0)
        mean_L = sums_L / query_BD.shape[0]
        cumulative = torch.cumsum(mean_L, 0, dtype=torch.float64)
        drawn = distinct(lambda count: draw(cumulative, count, generator), mean_L.__getitem__)
        return draw_pool(drawn, mean_L.__getitem__, num_draws, certain)

    @torch.no_grad()
    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        """`num_draws` i.i.d. labels for each instance."""
        ids, log_q = [], []
        for log_law in self._log_laws(query_BD):
            ids.append(draw(torch.cumsum(log_law.exp(), 1, dtype=torch.float64), num_draws, generator))
            log_q.append(log_law.gather(1, ids[-1]))
        return LabelSample(label_ids=torch.cat(ids), log_weight=torch.cat(log_q) + math.log(num_draws))

    @torch.no_grad()
    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """log Q(i|z), (B, P) for `label_ids` (P,), or (B, M) for `label_ids` (B, M); nats."""
        if label_ids.dim() == 1:
            return torch.cat([log_law[:, label_ids] for log_law in self._log_laws(query_BD)])
        rows = torch.split(label_ids, self._rows_at_once())
        return torch.cat([law.gather(1, ids) for law, ids in zip(self._log_laws(query_BD), rows, strict=True)])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing: the label table is the whole state."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Nothing: `refresh` with the restored table restores the proposal."""

    def _log_laws(self, query_BD: torch.Tensor) -> Iterator[torch.Tensor]:
        """(b, L) log Q of a few instances after the other, in the table's dtype."""
        assert self._table is not None, "refresh before use"
        table_LD, bias_L = self._table
        for part_bD in torch.split(query_BD.to(table_LD.dtype), self._rows_at_once()):
            yield self._log_law(torch.addmm(bias_L, part_bD, table_LD.T))

    def _rows_at_once(self) -> int:
        assert self._table is not None, "refresh before use"
        return max(1, _CHUNK_ELEMENTS // self._table[0].shape[0])

    def _log_law(self, logits_BL: torch.Tensor) -> torch.Tensor:
        """log Q of all labels from their logits, normalised along the rows; may overwrite the logits."""
        raise NotImplementedError


class SoftmaxSampler(DenseSampler):
    """`Q(i|z) = exp(o_i) / sum_j exp(o_j)`: the softmax itself, the best proposal there is. For reference."""

    def _log_law(self, logits_BL: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits_BL, dim=1)
