"""Layer 3. What a pool holds, and what each of its labels counts: the batch's positives beside the labels drawn."""

from __future__ import annotations

import torch

from xmc_midx.padding import distinct_padded
from xmc_midx.samplers.static import InBatchSampler
from xmc_midx.types import LabelSample

__all__ = ["beside", "two_samples"]


def beside(certain: torch.Tensor, sample: LabelSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Rising ids of the batch's positives (log weight 0) and of the labels drawn beside them."""
    label_ids, order = torch.sort(torch.cat([certain, sample.label_ids]))
    log_weight = torch.cat([sample.log_weight.new_zeros(certain.shape[0]), sample.log_weight])
    return label_ids, log_weight[order]


def two_samples(
    positives: torch.Tensor,
    sample: LabelSample,
    law: InBatchSampler,
    num_others: int,
    num_draws: int,
    *,
    padded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rising ids of the labels that the batch (repeats and all) or the sampler (each once) brought, and their log
    weights.

    Multiple importance sampling: with w the batch's part of a label, a label counts w / (its chance to be in the batch)
    where the batch has it, plus (1 - w) / (its chance to be drawn) where it was drawn. Unbiased for every fixed w in
    [0, 1]; the w here lets each sample count by the number of its labels, and a label that is in almost every batch by
    the batch alone.

    `padded`: positives may hold pads (`xmc_midx.padding`), draws repeats; the result ends in pads, and what counts
    nothing has the log weight +inf.
    """
    both, num_labels = torch.cat([positives, sample.label_ids]), law.num_labels
    label_ids, which = distinct_padded(both, num_labels) if padded else torch.unique(both, return_inverse=True)
    chance_P = law.log_inclusion(label_ids.clamp(max=num_labels - 1) if padded else label_ids, num_others).exp()
    in_batch, drawn = which.split([positives.shape[0], sample.label_ids.shape[0]])
    expected = law.positives_per_instance * (num_others + 1)
    part_P = chance_P + (1.0 - chance_P) * expected / (expected + num_draws)
    # A label that no other instance can have: an own positive again, or one that was drawn, and counts by that alone.
    is_elsewhere = chance_P > 0
    part_P = part_P * is_elsewhere
    weight_P = torch.zeros_like(part_P)
    weight_P[in_batch] = (part_P / chance_P).masked_fill_(~is_elsewhere, 1.0)[in_batch]
    weight_P.index_add_(0, drawn, (1.0 - part_P[drawn]) * torch.exp(-sample.log_weight.double()))
    if padded:
        return label_ids, -torch.log(weight_P * (label_ids < num_labels))
    # A label that is in every batch leaves nothing to a draw of it.
    kept = torch.nonzero(weight_P > 0).flatten()
    return label_ids[kept], -torch.log(weight_P[kept])
