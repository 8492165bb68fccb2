"""Layer 3. The labels in the order of their cells: what the MIDX sampler keeps of them, and how it draws from them.

A draw is two binary searches, one for the cell in a law that changes with the batch and one for the label in the mass
of its cell. For a pool on the CPU they are compiled: all draws take a step of their search before any takes the next,
so that the processor waits for many places of memory at once. Elsewhere torch searches. Both find the same labels from
the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from xmc_midx.codebook import Codebook

__all__ = ["CellOrder"]

_LABEL_CHUNK = 1 << 18
"""Labels of which temporaries are made at once."""


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
        self, cell_law: torch.Tensor, num_draws: int, generator: torch.Generator, *, padded: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`num_draws` draws, a cell from `cell_law` (C^2,), unnormalised, and a label of it from the prior; each once.

        One random number a draw: how far it falls into its cell is uniform whatever the cell, and says which label of
        it. The numbers rise, so the cells and the places do, and nothing is sorted to find what was drawn twice.

        Returns
        -------
        labels (P,) int64, in the order of their cells; the prior of each (P,) float64; the cell of each (P,) int64.
        `padded`: P is `num_draws`, and what was drawn before has the prior 0.
        """
        uniform = torch.rand(num_draws + 1, dtype=torch.float64, generator=generator, device=cell_law.device)
        if cell_law.device.type == "cpu" and not padded:
            return _distinct(self, cell_law, uniform)
        return _distinct_by_torch(self, cell_law, uniform, padded=padded)

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
    order_L = torch.empty(num_labels, dtype=dtype, device=device)
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
    cumulative_L = torch.empty(labels.shape[0], dtype=torch.float64, device=labels.device)
    chunks = [slice(begin, begin + _LABEL_CHUNK) for begin in range(0, labels.shape[0], _LABEL_CHUNK)]
    largest = torch.stack([log_prior(labels[chunk]).max() for chunk in chunks]).max()
    total = torch.zeros_like(largest)
    for chunk in chunks:
        torch.cumsum((log_prior(labels[chunk]) - largest).exp_(), 0, out=cumulative_L[chunk])
        total = cumulative_L[chunk].add_(total)[-1].clone()
    return cumulative_L.div_(total), largest + torch.log(total)


# ------------------------------------------------------------------- drawing


def _distinct(
    order: CellOrder, cell_law: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_draws = uniform.shape[0] - 1
    labels, cells = np.empty((2, num_draws), dtype=np.int64)
    mass = np.empty(num_draws)
    count = _draw_rising(
        cell_law.numpy(),
        uniform.numpy(),
        order.labels.numpy(),
        order.cell_starts.numpy(),
        order.cumulative_mass.numpy(),
        order.mass_before_cell.numpy(),
        labels,
        mass,
        cells,
    )
    return torch.from_numpy(labels[:count]), torch.from_numpy(mass[:count]), torch.from_numpy(cells[:count])


def _distinct_by_torch(
    order: CellOrder, cell_law: torch.Tensor, uniform: torch.Tensor, *, padded: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cumulative = torch.cumsum(cell_law, 0, dtype=torch.float64)
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
    return order.labels[places].long(), mass * is_new if padded else mass, cells


def _places(order: CellOrder, cells: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The places, in the order of the cells, of the labels at a share `inside` (0 to 1) of the mass of each given
    (non-empty) cell."""
    low, high = order.mass_before_cell[cells], order.mass_before_cell[cells + 1]
    position = torch.searchsorted(order.cumulative_mass, low + inside * (high - low), right=True)
    return torch.minimum(torch.maximum(position, order.cell_starts[cells]), order.cell_starts[cells + 1] - 1)


@numba.njit(nogil=True, cache=True)
def _draw_rising(
    cell_law: Any,
    uniform: Any,
    labels: Any,
    cell_starts: Any,
    cumulative_mass: Any,
    mass_before_cell: Any,
    found: Any,
    mass: Any,
    cells: Any,
) -> int:
    """`_distinct_by_torch` into `found`, `mass` and `cells`; returns how many are distinct."""
    num_draws, num_cells = found.shape[0], cell_law.shape[0]
    cumulative = np.empty(num_cells)
    total = 0.0
    for cell in range(num_cells):
        total += cell_law[cell]
        cumulative[cell] = total
    last = num_cells - 1
    while last > 0 and cumulative[last - 1] >= total:
        last -= 1

    target, sizes = mass, np.empty(num_draws, dtype=np.int64)
    rising = 0.0
    for draw in range(num_draws):
        rising -= np.log1p(-uniform[draw])
        target[draw], cells[draw], sizes[draw] = rising, 0, last + 1
    scale = total / (rising - np.log1p(-uniform[num_draws]))
    for draw in range(num_draws):
        target[draw] *= scale
    _search(cumulative, target, cells, sizes)

    place = found
    for draw in range(num_draws):
        cell = cells[draw]
        below = cumulative[cell - 1] if cell > 0 else 0.0
        inside = min(max((target[draw] - below) / (cumulative[cell] - below), 0.0), 1.0)
        low, high = mass_before_cell[cell], mass_before_cell[cell + 1]
        target[draw] = low + inside * (high - low)
        place[draw] = cell_starts[cell]
        # A law of NaN may take an empty cell, at the end of all labels too.
        sizes[draw] = max(1, cell_starts[cell + 1] - cell_starts[cell])
    _search(cumulative_mass, target, place, sizes)

    count, previous = 0, -1
    for draw in range(num_draws):
        here = min(place[draw], labels.shape[0] - 1)
        if here != previous:
            previous = here
            found[count], cells[count] = labels[here], cells[draw]
            mass[count] = cumulative_mass[here] - (cumulative_mass[here - 1] if here > 0 else 0.0)
            count += 1
    return count


@numba.njit(nogil=True, cache=True)
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
