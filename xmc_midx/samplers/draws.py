"""Layer 3. Draws: from a law to labels, and from labels drawn with replacement to a pool and its weights.

The one way in which every sampler draws: from a cumulative law, in float64. `torch.multinomial` stops at 2^24
categories and is inaccurate well before; a float64 cumulative sum over 10^8 labels is exact to 1e-16 of its total, and
a draw from it is one binary search.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from xmc_midx.types import LabelSample

__all__ = ["distinct", "draw", "draw_pool", "log_inclusion"]

_MAX_OVERDRAW = 8
"""Draws made for each draw asked for, at most: a batch whose positives hold all of the proposal ends somewhere."""


def draw_pool(
    draw_labels: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    probability: Callable[[torch.Tensor], torch.Tensor],
    num_draws: int,
    certain: torch.Tensor | None,
) -> LabelSample:
    """The labels of i.i.d. draws from one law, each once, without those that are in the pool anyway.

    A draw of the batch's own positives adds nothing, and the better the proposal, the more of its draws are such: so
    many draws are made that `num_draws` of them are expected to be of other labels. The inclusion probability of a
    label is that of all draws made, `1 - (1 - Q(i))^M'`, which keeps the estimate unbiased.

    Parameters
    ----------
    draw_labels : M -> the distinct labels (P,) of M i.i.d. draws from the law, and the Q(i) (P,) of each; `distinct`.
        Repeats may be among them with a Q(i) of 0: their log weight is +inf, which makes them count nothing.
    probability : (P,) labels -> (P,) Q(i), normalised over all labels.
    num_draws : draws that are to count.
    certain : (U,) rising labels that the pool holds with certainty; None for none.
    """
    num_made = num_draws
    if certain is not None:
        elsewhere = 1.0 - float(probability(certain).sum())
        # (Of queries that are not numbers, neither is this: the loss will be NaN and say so.)
        is_enough = elsewhere > 1.0 / _MAX_OVERDRAW
        num_made = math.ceil(num_draws / elsewhere) if is_enough else _MAX_OVERDRAW * num_draws
    label_ids, probability_P = draw_labels(num_made)
    if certain is not None:
        others = (~_is_among(label_ids, certain)).nonzero()[:, 0]
        label_ids, probability_P = label_ids[others], probability_P[others]
    log_weight = log_inclusion(probability_P, num_made).masked_fill_(probability_P == 0, torch.inf)
    return LabelSample(label_ids=label_ids, log_weight=log_weight)


def _is_among(label_ids: torch.Tensor, rising: torch.Tensor) -> torch.Tensor:
    """(P,) bool: which labels are among the rising ones. `torch.isin` sorts both."""
    if not rising.shape[0]:
        return torch.zeros_like(label_ids, dtype=torch.bool)
    return rising[torch.searchsorted(rising, label_ids).clamp_(max=rising.shape[0] - 1)] == label_ids


def distinct(
    draw_labels: Callable[[int], torch.Tensor],
    probability: Callable[[torch.Tensor], torch.Tensor],
    *,
    padded: bool = False,
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Of draws with repeats, what `draw_pool` asks for: each label once, with its probability; `padded`, all of them,
    and repeats with the probability 0."""

    def draw_distinct(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if padded:
            label_ids = torch.sort(draw_labels(count)).values
            is_new = label_ids.diff(prepend=label_ids.new_full((1,), -1)) != 0
            return label_ids, probability(label_ids) * is_new
        label_ids = torch.unique(draw_labels(count))
        return label_ids, probability(label_ids)

    return draw_distinct


def log_inclusion(probability: torch.Tensor, num_draws: int) -> torch.Tensor:
    """`log(1 - (1 - q)^M)`: the log probability that M i.i.d. draws contain a label of probability q.

    Computed as `log(-expm1(M log1p(-q)))`, which keeps its digits from q = 1e-30 (where it is `log(M q)`) to q = 1.
    """
    missed = num_draws * torch.log1p(-probability.clamp(max=1.0))
    return torch.log(-torch.expm1(missed))


def draw(cumulative: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """`num_draws` indices from each unnormalised cumulative law (..., C) float64 -> (..., num_draws) int64.

    Never an index of zero mass: the search is for the first cumulative value above the uniform draw.
    """
    shape = (*cumulative.shape[:-1], num_draws)
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=cumulative.device)
    return _search(cumulative, uniform * cumulative[..., -1:])


def _search(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative value is above each target, or the last one with mass."""
    position = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    # The clamp matters for a law of NaN alone: the loss will be NaN and say so, where an index error would not.
    return torch.minimum(position, last).clamp_(max=cumulative.shape[-1] - 1)
