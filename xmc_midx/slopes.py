"""Layer 1. The slopes of a pool's logits, rounded at random to a few entries, and their products with dense tables.

The slope of a negative is its share of the softmax. After little training most of a pool's are near nothing, but in a
dense product each costs as much as any other. Rounded to 0 or to a threshold, with the chance that leaves its mean what
it is, an instance keeps few of them, drawn in proportion to the softmax itself: the proposal that sampled softmaxes
strive for, at hand here, because the logits are known. Compiled, for float32 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from xmc_midx.threads import in_threads, scratch

__all__ = ["SparseSlopes", "round_slopes", "rounds_slopes"]

_WIDTH = 4
"""Rows added at once: the sum is then read and written once for all of them."""


@dataclass(frozen=True, slots=True)
class SparseSlopes:
    """A sparse (B, P) float32 matrix: row b has the entries `starts[b] .. starts[b] + counts[b]`."""

    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[np.float32]
    num_columns: int

    def times(self, rows_PD: torch.Tensor) -> torch.Tensor:
        """The (B, D) product with (P, D) float32 on the CPU."""
        found_BD = rows_PD.new_empty(len(self.starts), rows_PD.shape[1])
        arrays = (self.starts, self.counts, self.columns, self.values, rows_PD.numpy(), found_BD.numpy())
        in_threads(lambda begin, end: _combine(*arrays, begin, end), len(self.starts))
        return found_BD

    def scaled(self, factor: float) -> SparseSlopes:
        """The matrix times a number."""
        return replace(self, values=self.values * np.float32(factor))

    def transposed(self) -> SparseSlopes:
        """The (P, B) matrix."""
        num_rows = len(self.starts)
        counts = np.zeros(self.num_columns, dtype=np.int64)
        num_entries = int(self.counts.sum())
        columns, values = np.empty(num_entries, dtype=np.int32), np.empty(num_entries, dtype=np.float32)
        starts = _transpose(self.starts, self.counts, self.columns, self.values, counts, columns, values)
        return SparseSlopes(starts, counts, columns, values, num_rows)

    def sum_rows(self) -> torch.Tensor:
        """(B,) sums of the rows."""
        return torch.from_numpy(_sums(self.starts, self.counts, self.values))


def rounds_slopes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether slopes of this dtype and device can be rounded: elsewhere dense products are the faster ones."""
    return dtype == torch.float32 and device.type == "cpu"


def round_slopes(slopes_BP: torch.Tensor, threshold: float, offset_B: torch.Tensor) -> SparseSlopes:
    """Entries in [0, threshold) become 0 or the threshold, without bias; all others stay what they are.

    Systematic sampling (Madow and Madow 1944): an entry is kept where the running sum of its row, from a random start,
    passes a multiple of the threshold; the sum of a row moves by less than one threshold.

    Parameters
    ----------
    slopes_BP : (B, P) float32 on the CPU; what is not finite is kept too.
    threshold : at least 0, which keeps all.
    offset_B : (B,) float32 in [0, 1), uniform: where the running sums start, in thresholds.
    """
    slopes, offsets = slopes_BP.numpy(), offset_B.numpy()
    num_rows, num_columns = slopes.shape
    counts = np.empty(num_rows, dtype=np.int64)
    # Room for all: what is not written takes no memory.
    columns, values = (scratch(slopes.size, dtype).reshape(slopes.shape) for dtype in (np.int32, np.float32))
    arrays = (slopes, np.float32(threshold), offsets, counts, columns, values)
    in_threads(lambda begin, end: _round(*arrays, begin, end), num_rows)
    starts = np.cumsum(counts) - counts
    return SparseSlopes(starts, counts, _packed(columns, starts, counts), _packed(values, starts, counts), num_columns)


@numba.njit(nogil=True, cache=True)
def _round(
    slopes: Any, threshold: Any, offsets: Any, counts: Any, columns: Any, values: Any, begin: int, end: int
) -> None:
    for row in range(begin, end):
        count, total = 0, offsets[row] * threshold
        for column in range(slopes.shape[1]):
            value = slopes[row, column]
            if np.float32(0.0) <= value < threshold:
                total += value
                if total < threshold:
                    continue
                total -= threshold
                value = threshold
            if value != 0.0:
                columns[row, count], values[row, count] = column, value
                count += 1
        counts[row] = count


@numba.njit(nogil=True, cache=True)
def _packed(rows: Any, starts: Any, counts: Any) -> Any:
    """The first `counts[i]` entries of each row, one after the other."""
    found = np.empty(counts.sum(), dtype=rows.dtype)
    for row in range(starts.shape[0]):
        for place in range(counts[row]):
            found[starts[row] + place] = rows[row, place]
    return found


@numba.njit(nogil=True, cache=True)
def _transpose(
    starts: Any, counts: Any, columns: Any, values: Any, found_counts: Any, found_columns: Any, found_values: Any
) -> Any:
    for row in range(starts.shape[0]):
        for entry in range(starts[row], starts[row] + counts[row]):
            found_counts[columns[entry]] += 1
    found_starts = np.cumsum(found_counts) - found_counts
    ends = found_starts.copy()
    for row in range(starts.shape[0]):
        for entry in range(starts[row], starts[row] + counts[row]):
            place = ends[columns[entry]]
            found_columns[place], found_values[place] = row, values[entry]
            ends[columns[entry]] = place + 1
    return found_starts


@numba.njit(nogil=True, cache=True)
def _sums(starts: Any, counts: Any, values: Any) -> Any:
    found = np.zeros(starts.shape[0], dtype=values.dtype)
    for row in range(starts.shape[0]):
        for entry in range(starts[row], starts[row] + counts[row]):
            found[row] += values[entry]
    return found


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _combine(starts: Any, counts: Any, columns: Any, values: Any, table: Any, found: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        found[row] = 0.0
        entry, last = starts[row], starts[row] + counts[row]
        while entry + _WIDTH <= last:
            a, b, c, d = columns[entry], columns[entry + 1], columns[entry + 2], columns[entry + 3]
            p, q, r, s = values[entry], values[entry + 1], values[entry + 2], values[entry + 3]
            for i in range(found.shape[1]):
                found[row, i] += p * table[a, i] + q * table[b, i] + r * table[c, i] + s * table[d, i]
            entry += _WIDTH
        for rest in range(entry, last):
            for i in range(found.shape[1]):
                found[row, i] += values[rest] * table[columns[rest], i]
