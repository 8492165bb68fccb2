"""Layer 3. Draws from a cumulative law, in float64: the one way in which every sampler turns a law into labels.

`torch.multinomial` stops at 2^24 categories and is inaccurate well before; a float64 cumulative sum over 10^8 labels is
exact to 1e-16 of its total, and a draw from it is one binary search.
"""

from __future__ import annotations

import torch

__all__ = ["draw"]


def draw(cumulative: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """`num_draws` indices from each unnormalised cumulative law (..., C) float64 -> (..., num_draws) int64.

    Never an index of zero mass: the search is for the first cumulative value above the uniform draw.
    """
    uniform = torch.rand(
        (*cumulative.shape[:-1], num_draws),
        dtype=torch.float64,
        generator=generator,
        device=cumulative.device,
    )
    position = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    # The clamp matters for a law of NaN alone: the loss will be NaN and say so, where an index error would not.
    return torch.minimum(position, last).clamp_(max=cumulative.shape[-1] - 1)
