"""Layer 1. Static shapes: ids whose number a device alone knows, in arrays of a known length.

How many ids of a batch are distinct is known where they lie; a host that asks waits for all that was asked of the
device before. A step of static shapes never asks: arrays are as long as they can get, and the rest of them holds a pad,
the first number that is no id (the number of rows of the table). Pads come last in a rising array, rows of pads are
zero, and no row is read or changed for them.
"""

from __future__ import annotations

import torch

__all__ = ["distinct_padded", "distinct_sorted", "owners", "rounded_up"]


def distinct_sorted(in_order: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ones of rising ids, without a look at the device.

    Parameters
    ----------
    in_order : (n,) int, rising, none above `pad`.

    Returns
    -------
    (n,) the distinct ids, then pads, and (n,) int64, the place of each of `in_order` there. Ids that are pads already
    become the first of the pads.
    """
    place = torch.cumsum(in_order.diff(prepend=in_order.new_full((1,), -1)) != 0, 0) - 1
    return torch.full_like(in_order, pad).scatter_(0, place, in_order), place


def distinct_padded(ids: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.unique(ids, return_inverse=True)` of (n,) ids, the distinct ones filled up to n with pads."""
    in_order, order = torch.sort(ids, stable=True)
    rising, place = distinct_sorted(in_order, pad)
    return rising, torch.empty_like(place).scatter_(0, order, place)


def owners(offsets: torch.Tensor, num_entries: int) -> torch.Tensor:
    """(num_entries,) int64: the row i with `offsets[i] <= entry < offsets[i+1]`; the number of rows, past the last.

    Parameters
    ----------
    offsets : (B+1,) int64, from 0.
    """
    return torch.searchsorted(offsets[1:], torch.arange(num_entries, device=offsets.device), right=True)


def rounded_up(size: int) -> int:
    """To a multiple of a sixteenth of the power of two below: sizes that differ little become the same."""
    step = 1 << max(0, size.bit_length() - 5)
    return -(-size // step) * step
