"""Layer 1. The slopes of a pool's logits, rounded at random to a few entries, and their products with dense tables.

The slope of a negative is its share of the softmax. After little training most of a pool's are near nothing, but in a
dense product each costs as much as any other. Rounded to 0 or to a threshold, with the chance that leaves its mean what
it is, an instance keeps few of them, drawn in proportion to the softmax itself: the proposal that sampled softmaxes
strive for, at hand here, because the logits are known. Compiled, for float32 on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled
from xmc_midx.threads import in_threads, scratch

__all__ = ["multiply", "round_slopes", "rounds_slopes"]

_WIDTH = 4
"""Rows added at once: the sum is then read and written once for all of them."""


def rounds_slopes(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the slopes of a loss on this device and of this dtype (float32, whatever products and tables are in) can
    be rounded: the kernels are for these, elsewhere the products stay dense."""
    return dtype == torch.float32 and device.type == "cpu"


def round_slopes(slopes_BP: torch.Tensor, threshold: float, offset_B: torch.Tensor) -> csr_matrix:
    """Entries in [0, threshold) become 0 or the threshold, without bias; all others stay what they are.

    Systematic sampling (Madow and Madow 1944): an entry is kept where the running sum of its row, from a random start,
    passes a multiple of the threshold; the sum of a row moves by less than one threshold.

    Parameters
    ----------
    slopes_BP : (B, P) float32 on the CPU; what is not finite is kept too.
    threshold : at least 0, which keeps all.
    offset_B : (B,) float32 in [0, 1), uniform: where the running sums start, in thresholds.

    Returns
    -------
    (B, P) float32.
    """
    slopes, offsets = slopes_BP.numpy(), offset_B.numpy()
    num_rows = slopes.shape[0]
    counts = np.empty(num_rows, dtype=np.int64)
    # Room for all, which the thread keeps: new memory would take longer to get than the rounding does.
    columns, values = (scratch(slopes.size, dtype).reshape(slopes.shape) for dtype in (np.int32, np.float32))
    arrays = (slopes, np.float32(threshold), offsets, counts, columns, values)
    in_threads(lambda begin, end: _round(*arrays, begin, end), num_rows)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return csr_matrix((_packed(values, starts), _packed(columns, starts), starts), shape=slopes.shape)


def multiply(matrix: csr_matrix, table_PD: torch.Tensor) -> torch.Tensor:
    """The product (B, D) of a (B, P) matrix with a (P, D) table on the CPU, in the table's dtype, by all threads."""
    found_BD = table_PD.new_empty(matrix.shape[0], table_PD.shape[1])
    arrays = (matrix.indptr, matrix.indices, matrix.data, table_PD.numpy(), found_BD.numpy())
    in_threads(lambda begin, end: _combine(*arrays, begin, end), matrix.shape[0])
    return found_BD


@compiled
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


@compiled
def _packed(rows: Any, starts: Any) -> Any:
    """The first entries of each row, one after the other: row i's from `starts[i]` to `starts[i + 1]`."""
    found = np.empty(starts[-1], dtype=rows.dtype)
    for row in range(rows.shape[0]):
        first, last = starts[row], starts[row + 1]
        found[first:last] = rows[row, : last - first]
    return found


@compiled(fastmath={"contract"})
def _combine(starts: Any, columns: Any, values: Any, table: Any, found: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        found[row] = 0.0
        entry, last = starts[row], starts[row + 1]
        while entry + _WIDTH <= last:
            a, b, c, d = columns[entry], columns[entry + 1], columns[entry + 2], columns[entry + 3]
            p, q, r, s = values[entry], values[entry + 1], values[entry + 2], values[entry + 3]
            for i in range(found.shape[1]):
                found[row, i] += p * table[a, i] + q * table[b, i] + r * table[c, i] + s * table[d, i]
            entry += _WIDTH
        for rest in range(entry, last):
            for i in range(found.shape[1]):
                found[row, i] += values[rest] * table[columns[rest], i]
