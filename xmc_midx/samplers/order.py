"""Layer 3. The labels in the order of their cells: what the MIDX sampler keeps of them, and how it draws from them.

A draw is two searches, one for the cell in a law that changes with the batch and one for the label in the mass of its
cell. For a pool on the CPU they are compiled: one walk through the law finds the cells, for the draws come in order;
and for the labels all draws take a step of a binary search before any takes the next, so that the processor waits for
many places of memory at once. Elsewhere torch searches. Both find the same labels from the same random numbers, but
for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xmc_midx.codebook import Codebook
from xmc_midx.compiled import compiled
from xmc_midx.device import empty_table
from xmc_midx.intrinsics import fetch

__all__ = ["CellOrder"]

_LABEL_CHUNK = 1 << 18
"""Labels of which temporaries are made at once."""
_BLOCK, _AHEAD = 16, 16
"""Cells of a step of the walk through their law; draws whose labels are asked for while one is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellOrder:
    """A query-free prior over the labels, in the order of the C^2 cells; `build` makes it.

    A label takes 12 bytes here, four for its place and eight for its mass.
    """

    labels: torch.Tensor
    """(L,) by cell and, inside a cell, by id; int32 where L allows."""
    cell_starts: torch.Tensor
    """(C^2 + 1,) int64: cell c owns `labels[cell_starts[c]:cell_starts[c + 1]]`."""
    cumulative_mass: torch.Tensor
    """(L,) float64: of the prior, in the order of `labels`; 1 at the end. 10^8 labels leave it exact to 1e-16."""
    mass_before_cell: torch.Tensor
    """(C^2 + 1,) float64: the cumulative mass where a cell starts."""
    log_total: torch.Tensor
    """() float64: the log of the prior's sum before it was made 1."""

    @classmethod
    def build(cls, codebook: Codebook, log_prior: Callable[[torch.Tensor], torch.Tensor]) -> CellOrder:
        """`log_prior`: (P,) labels -> (P,) unnormalised, float64. All that is made on the way is of a chunk's size."""
        labels, counts = _sort_by_cell(codebook)
        cell_starts = torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])
        cumulative_mass, log_total = _accumulate(labels, log_prior)
        before = cumulative_mass[(cell_starts - 1).clamp(min=0)]
        return cls(
            labels=labels,
            cell_starts=cell_starts,
            cumulative_mass=cumulative_mass,
            mass_before_cell=torch.where(cell_starts > 0, before, 0.0),
            log_total=log_total,
        )

    def cell_mass(self) -> torch.Tensor:
        """(C^2,) float64: of the prior; sums to 1."""
        return self.mass_before_cell.diff()

    def draw_distinct(
        self,
        ratio: torch.Tensor,
        cell_mass: torch.Tensor,
        num_draws: int,
        generator: torch.Generator,
        *,
        padded: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`num_draws` draws, a cell from the law `ratio * cell_mass` (C^2,), unnormalised, and a label of it from the
        prior; each once.

        One random number a draw: how far it falls into its cell is uniform whatever the cell, and says which label of
        it. The numbers rise, so the cells and the places do, and nothing is sorted to find what was drawn twice.

        Returns
        -------
        labels (P,) int64, in the order of their cells, and of each the prior times the cell's `ratio`, (P,) in its
        dtype. `padded`: P is `num_draws`, and of what was drawn before this is 0.
        """
        uniform = torch.rand(num_draws + 1, dtype=torch.float64, generator=generator, device=ratio.device)
        if ratio.device.type == "cpu" and not padded:
            return _distinct(self, ratio, cell_mass, uniform)
        return _distinct_by_torch(self, ratio, cell_mass, uniform, padded=padded)

    def draw_in(self, cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One label from the prior inside each given (non-empty) cell; int64, of the shape of `cells`."""
        inside = torch.rand(cells.shape, dtype=torch.float64, generator=generator, device=cells.device)
        return self.labels[_places(self, cells, inside)].long()


# ------------------------------------------------------------------ building


def _sort_by_cell(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels in the order of their cells, by id inside a cell, int32 where L allows; labels in each of the C^2 cells.

    Equals `argsort(cells, stable=True)` and `bincount(cells)`: a counting sort, whose temporaries are a chunk's.
    """
    num_labels, device = codebook.num_labels, codebook.codes1.device

    def cells(begin: int) -> torch.Tensor:
        chunk = slice(begin, begin + _LABEL_CHUNK)
        return codebook.codes1[chunk].long() * codebook.num_codewords + codebook.codes2[chunk]

    counts = torch.zeros(codebook.num_codewords**2, dtype=torch.int64, device=device)
    for begin in range(0, num_labels, _LABEL_CHUNK):
        counts += torch.bincount(cells(begin), minlength=counts.shape[0])
    dtype = torch.int32 if num_labels <= torch.iinfo(torch.int32).max else torch.int64
    order_L = empty_table(num_labels, dtype=dtype, device=device)
    free = torch.cumsum(counts, 0) - counts
    for begin in range(0, num_labels, _LABEL_CHUNK):
        sorted_cells, order = torch.sort(cells(begin), stable=True)
        found, sizes = torch.unique_consecutive(sorted_cells, return_counts=True)
        starts = torch.cumsum(sizes, 0) - sizes
        shift = torch.repeat_interleave(free[found] - starts, sizes, output_size=order.shape[0])
        order_L[torch.arange(order.shape[0], device=device) + shift] = (order + begin).to(dtype)
        free[found] += sizes
    return order_L, counts


def _accumulate(
    labels: torch.Tensor, log_prior: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cumulative mass (L,) of the labels in this order, and the log of what it was before its total was 1."""
    cumulative_L = empty_table(labels.shape[0], dtype=torch.float64, device=labels.device)
    chunks = [slice(begin, begin + _LABEL_CHUNK) for begin in range(0, labels.shape[0], _LABEL_CHUNK)]
    largest = torch.stack([log_prior(labels[chunk]).max() for chunk in chunks]).max()
    total = torch.zeros_like(largest)
    for chunk in chunks:
        torch.cumsum((log_prior(labels[chunk]) - largest).exp_(), 0, out=cumulative_L[chunk])
        total = cumulative_L[chunk].add_(total)[-1].clone()
    return cumulative_L.div_(total), largest + torch.log(total)


# ------------------------------------------------------------------- drawing


def _distinct(
    order: CellOrder, ratio: torch.Tensor, cell_mass: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_draws = uniform.shape[0] - 1
    labels, mass = np.empty(num_draws, dtype=np.int64), np.empty(num_draws)
    probability = torch.empty(num_draws, dtype=ratio.dtype)
    count = _draw_rising(
        ratio.numpy(),
        cell_mass.numpy(),
        uniform.numpy(),
        order.labels.numpy(),
        order.cell_starts.numpy(),
        order.cumulative_mass.numpy(),
        order.mass_before_cell.numpy(),
        labels,
        mass,
        probability.numpy(),
    )
    return torch.from_numpy(labels[:count]), probability[:count]


def _distinct_by_torch(
    order: CellOrder, ratio: torch.Tensor, cell_mass: torch.Tensor, uniform: torch.Tensor, *, padded: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    cumulative = torch.cumsum(ratio * cell_mass, 0, dtype=torch.float64)
    # The sums of exponential numbers, over the sum of one more, are uniform numbers in order.
    rising = torch.cumsum(-torch.log1p(-uniform), 0)
    target = rising[:-1] * (cumulative[-1] / rising[-1])
    last = torch.searchsorted(cumulative, cumulative[-1:])
    # The second bound matters for a law of NaN alone: the loss will be NaN and say so, an index error would not.
    cells = torch.minimum(torch.searchsorted(cumulative, target, right=True), last).clamp_(max=cumulative.shape[0] - 1)
    below = cumulative[(cells - 1).clamp(min=0)].masked_fill_(cells == 0, 0.0)
    inside = ((target - below) / (cumulative[cells] - below)).clamp_(0.0, 1.0)
    places = _places(order, cells, inside)
    is_new = places.diff(prepend=places.new_full((1,), -1)) != 0
    if not padded:
        places, cells = places[is_new], cells[is_new]
    before = order.cumulative_mass[(places - 1).clamp(min=0)].masked_fill_(places == 0, 0.0)
    mass = order.cumulative_mass[places] - before
    probability = mass.to(ratio.dtype) * ratio[cells]
    return order.labels[places].long(), probability * is_new if padded else probability


def _places(order: CellOrder, cells: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The places, in the order of the cells, of the labels at a share `inside` (0 to 1) of the mass of each given
    (non-empty) cell."""
    low, high = order.mass_before_cell[cells], order.mass_before_cell[cells + 1]
    position = torch.searchsorted(order.cumulative_mass, low + inside * (high - low), right=True)
    return torch.minimum(torch.maximum(position, order.cell_starts[cells]), order.cell_starts[cells + 1] - 1)


@compiled
def _draw_rising(
    ratio: Any,
    cell_mass: Any,
    uniform: Any,
    labels: Any,
    cell_starts: Any,
    cumulative_mass: Any,
    mass_before_cell: Any,
    found: Any,
    target: Any,
    probability: Any,
) -> int:
    """`_distinct_by_torch` into `found` and `probability`; returns how many are distinct. `target` is room."""
    num_draws, cell_law = found.shape[0], ratio * cell_mass
    sums = np.empty(-(-cell_law.shape[0] // _BLOCK))
    total = _sum_blocks(cell_law, sums)
    inside, cells, sizes = np.empty(num_draws), np.empty(num_draws, dtype=np.int64), np.empty(num_draws, dtype=np.int64)
    rising = 0.0
    for draw in range(num_draws):
        rising -= np.log1p(-uniform[draw])
        target[draw] = rising
    scale = total / (rising - np.log1p(-uniform[num_draws]))
    for draw in range(num_draws):
        target[draw] *= scale
    _find_cells(cell_law, sums, target, cells, inside)

    place = found
    for draw in range(num_draws):
        cell = cells[draw]
        low, high = mass_before_cell[cell], mass_before_cell[cell + 1]
        target[draw] = low + inside[draw] * (high - low)
        place[draw] = cell_starts[cell]
        # A law of NaN may take an empty cell, at the end of all labels too.
        sizes[draw] = max(1, cell_starts[cell + 1] - cell_starts[cell])
    _search(cumulative_mass, target, place, sizes)

    count, previous = 0, -1
    for draw in range(num_draws):
        ahead = min(place[min(draw + _AHEAD, num_draws - 1)], labels.shape[0] - 1)
        fetch(labels, ahead, ahead + 1)
        fetch(cumulative_mass, max(ahead - 1, 0), ahead + 1)
        here = min(place[draw], labels.shape[0] - 1)
        if here != previous:
            previous = here
            found[count] = labels[here]
            mass = cumulative_mass[here] - (cumulative_mass[here - 1] if here > 0 else 0.0)
            probability[count] = mass * ratio[cells[draw]]
            count += 1
    return count


@compiled(fastmath={"reassoc"})
def _sum_blocks(law: Any, sums: Any) -> Any:
    """The sum of each block of the law, float64; returns that of all."""
    total = 0.0
    for block in range(sums.shape[0]):
        begin = block * _BLOCK
        part = 0.0
        if begin + _BLOCK <= law.shape[0]:
            for place in range(_BLOCK):
                part += np.float64(law[begin + place])
        else:
            for place in range(begin, law.shape[0]):
                part += np.float64(law[place])
        sums[block] = part
        total += part
    return total


@compiled
def _find_cells(law: Any, sums: Any, target: Any, cells: Any, inside: Any) -> None:
    """The cell into which each target falls, and how far. They rise, so one walk finds them all: a block of cells a
    step, for a sum waits for the one before. A target is never below what the walk has reached, so that a cell in which
    one lies has mass."""
    draw, num_draws = 0, target.shape[0]
    before = 0.0
    for block in range(sums.shape[0]):
        after = before + sums[block]
        if draw < num_draws and target[draw] < after:
            cell, end, reached = block * _BLOCK, min((block + 1) * _BLOCK, law.shape[0]), before
            while draw < num_draws and target[draw] < after:
                while cell < end and not target[draw] < reached + law[cell]:
                    reached += law[cell]
                    cell += 1
                if cell < end:
                    cells[draw], inside[draw] = cell, max((target[draw] - reached) / law[cell], 0.0)
                else:
                    # At the very end of a block, whose sum is rounded in another order.
                    cells[draw], inside[draw] = _last_with_mass(law, end), 1.0
                draw += 1
        before = after
    # At the very end of all; and where the law is not a number.
    cells[draw:], inside[draw:] = _last_with_mass(law, law.shape[0]), 1.0


@compiled
def _last_with_mass(law: Any, end: int) -> int:
    cell = end - 1
    while cell > 0 and not law[cell] > 0.0:
        cell -= 1
    return cell


@compiled
def _search(rising: Any, target: Any, place: Any, sizes: Any) -> None:
    """Move each place to the first of the `sizes` rising values from it on that is above its target, or to the last of
    them. `sizes`, at least 1, are 1 afterwards.

    All take a step before any takes the next: one search after the other waits for memory, or for the comparison
    before, at each step (EXPERIMENTS.md, "What a draw costs").
    """
    largest = sizes.max()
    while largest > 1:
        for draw in range(place.shape[0]):
            # No branch, for those that have arrived neither: the processor would guess wrong.
            half = sizes[draw] // 2
            middle = place[draw] + half
            place[draw] = middle if rising[max(middle - 1, 0)] <= target[draw] else place[draw]
            sizes[draw] -= half
        largest -= largest // 2
