"""Layer 3. What drawing a pool of labels with replacement means for each label: the chance to be in it."""

from __future__ import annotations

import torch

__all__ = ["log_inclusion"]


def log_inclusion(probability: torch.Tensor, num_draws: int) -> torch.Tensor:
    """`log(1 - (1 - q)^M)`: the log probability that M i.i.d. draws contain a label of probability q.

    Computed as `log(-expm1(M log1p(-q)))`, which keeps its digits from q = 1e-30 (where it is `log(M q)`) to q = 1.
    """
    missed = num_draws * torch.log1p(-probability.clamp(max=1.0))
    return torch.log(-torch.expm1(missed))
