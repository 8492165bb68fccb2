"""Layer 3. What a pool holds, and what each of its labels counts: the batch's positives beside the labels drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from xmc_midx.compiled import compiled
from xmc_midx.intrinsics import fetch
from xmc_midx.padding import distinct_padded
from xmc_midx.samplers.static import InBatchSampler, inclusion
from xmc_midx.types import LabelSample

__all__ = ["beside", "two_samples"]

_AHEAD = 16
"""Labels whose frequencies are asked for while one is weighed."""
_FREQUENT = 512
"""Frequency from which on each label's chance is computed for itself."""


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
    if positives.device.type == "cpu" and not padded:
        return _two_samples_on_host(positives, sample, law, num_others, num_draws)
    return _two_samples_by_torch(positives, sample, law, num_others, num_draws, padded=padded)


def _two_samples_by_torch(
    positives: torch.Tensor,
    sample: LabelSample,
    law: InBatchSampler,
    num_others: int,
    num_draws: int,
    *,
    padded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    # A label that is in every batch leaves nothing to a draw of it. (What is not a number stays: the loss will say so.)
    kept = torch.nonzero(~(weight_P <= 0)).flatten()
    return label_ids[kept], -torch.log(weight_P[kept])


def _two_samples_on_host(
    positives: torch.Tensor, sample: LabelSample, law: InBatchSampler, num_others: int, num_draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one loop over the labels, which are sorted with their places by NumPy."""
    keys = np.concatenate([positives.numpy(), sample.label_ids.numpy()]).astype(np.int64, copy=False)
    bits = keys.shape[0].bit_length()
    keys <<= bits
    keys |= np.arange(keys.shape[0])
    keys.sort()
    # Compiled code follows the ids without looking.
    if keys.shape[0] and not 0 <= keys[0] >> bits <= keys[-1] >> bits < law.num_labels:
        raise IndexError(f"label ids {keys[0] >> bits}..{keys[-1] >> bits}: expected those of {law.num_labels} labels")
    label_ids, log_weight = np.empty_like(keys), np.empty(keys.shape[0])
    numbers = law.num_instances, law.positives_per_instance * (num_others + 1), num_others, num_draws
    drawn = positives.shape[0], sample.log_weight.detach().numpy()
    count = _weigh(keys, bits, drawn, law.label_frequencies.numpy(), numbers, label_ids, log_weight)
    return torch.from_numpy(label_ids[:count]), torch.from_numpy(log_weight[:count])


@compiled
def _weigh(keys: Any, bits: int, drawn: Any, frequency_L: Any, numbers: Any, label_ids: Any, log_weight: Any) -> int:
    """`_two_samples_by_torch` of sorted keys, a label and below it its place among positives and draws; returns how
    many labels are left."""
    num_positives, log_weight_M = drawn
    num_instances, expected, num_others, num_draws = numbers
    count, place, num_keys = 0, 0, keys.shape[0]
    # Most labels are rare, and many equally so.
    known = np.full(_FREQUENT, -1.0)
    while place < num_keys:
        label, ahead = keys[place] >> bits, keys[min(place + _AHEAD, num_keys - 1)] >> bits
        fetch(frequency_L, ahead, ahead + 1)
        in_batch, draw = False, np.int64(-1)
        while place < num_keys and keys[place] >> bits == label:
            which = keys[place] & ((np.int64(1) << bits) - 1)
            in_batch |= which < num_positives
            # A label is drawn once at most, and its draw comes last.
            draw = which - num_positives
            place += 1
        frequency = np.float64(frequency_L[label])
        rank = np.int64(min(max(frequency, 0.0), _FREQUENT - 1.0))
        chance = known[rank] if rank == frequency else -1.0
        if chance < 0.0:
            chance = inclusion(frequency, num_instances, num_others)
            if rank == frequency:
                known[rank] = chance
        part = chance + (1.0 - chance) * expected / (expected + num_draws) if chance > 0.0 else 0.0
        weight = 0.0
        if in_batch:
            weight += part / chance if chance > 0.0 else 1.0
        if draw >= 0:
            weight += (1.0 - part) * np.exp(-np.float64(log_weight_M[draw]))
        # A label that is in every batch leaves nothing to a draw of it. (What is not a number stays.)
        if not weight <= 0.0:
            label_ids[count], log_weight[count] = label, -np.log(weight)
            count += 1
    return count
