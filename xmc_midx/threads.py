"""Layer 1. Compiled code in several threads, and memory that a thread keeps for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["in_threads", "zeros"]

_PARALLEL = 8
"""Rows from which threads are worth their start."""
_PARTS = 4
"""Of the rows for each thread: some take longer than others."""
_LOCAL = threading.local()


def in_threads(work: Callable[[int, int], object], num_rows: int) -> None:
    """`work(first, last)` over parts of 0..num_rows, in as many threads as torch has (numba, where torch is
    not loaded); within such a part, in its own.

    The work is compiled code or NumPy's, which let other threads run.
    """
    torch = sys.modules.get("torch")
    workers: int = numba.get_num_threads() if torch is None else torch.get_num_threads()
    if workers == 1 or num_rows < _PARALLEL or getattr(_LOCAL, "working", False):
        work(0, num_rows)
        return

    def part(number: int) -> None:
        _LOCAL.working = True
        work(number * num_rows // num_parts, (number + 1) * num_rows // num_parts)

    num_parts = min(_PARTS * workers, num_rows)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(part, range(num_parts)))


def zeros(size: int, dtype: type[np.number[Any]]) -> NDArray[Any]:
    """Zeros (size,) of this thread alone, which compiled code leaves as it found them, zeros, for the next caller.

    Of one instance, new ones take longer to get from the kernel than the work that is done on them.
    """
    if not hasattr(_LOCAL, "zeros"):
        _LOCAL.zeros = {}
    found = _LOCAL.zeros.get(dtype)
    if found is None or found.shape[0] < size:
        found = _LOCAL.zeros[dtype] = np.zeros(size, dtype=dtype)
    view: NDArray[Any] = found[:size]
    return view
