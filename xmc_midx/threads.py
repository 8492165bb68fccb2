"""Layer 1. Compiled code in several threads; memory that a thread keeps for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["in_threads", "num_workers", "scratch", "zeros"]

_PARALLEL = 8
"""Rows from which threads are worth their start."""
_PARTS = 4
"""Of the rows for each thread: some take longer than others."""
_LOCAL = threading.local()
_POOLS: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork: the child starts its own.
    os.register_at_fork(after_in_child=_POOLS.clear)


def in_threads(work: Callable[[int, int], object], num_rows: int, *, least: int = _PARALLEL) -> None:
    """`work(first, last)` over parts of 0..num_rows, in `num_workers` threads, this one among them; within such a part,
    or of fewer rows than `least`, in this one alone.

    The work is compiled code or NumPy's, which let other threads run.
    """
    workers = num_workers()
    if workers == 1 or num_rows < least or getattr(_LOCAL, "working", False):
        work(0, num_rows)
        return
    num_parts = min(_PARTS * workers, num_rows)
    numbers = iter(range(num_parts))

    def work_off() -> None:
        _LOCAL.working = True
        try:
            for number in numbers:
                work(number * num_rows // num_parts, (number + 1) * num_rows // num_parts)
        finally:
            _LOCAL.working = False

    # Callers at once, each with a share of the machine, find a thread for all that they ask for.
    pool = _pool(max(workers, os.cpu_count() or 1) - 1)
    others = [pool.submit(work_off) for _ in range(workers - 1)]
    try:
        work_off()
    finally:
        # What nobody has begun, because the threads work for another caller, is done by now.
        wait(other for other in others if not other.cancel())
    for other in others:
        if not other.cancelled():
            other.result()


def num_workers() -> int:
    """As many as torch has threads, or numba where torch is not loaded."""
    torch = sys.modules.get("torch")
    return int(numba.get_num_threads() if torch is None else torch.get_num_threads())


def _pool(size: int) -> ThreadPoolExecutor:
    """Threads that are kept: to start them takes longer than many a piece of work."""
    if size not in _POOLS:
        _POOLS[size] = ThreadPoolExecutor(size)
    return _POOLS[size]


def zeros(size: int, dtype: type[np.number[Any]]) -> NDArray[Any]:
    """Zeros (size,) of this thread alone, which compiled code leaves as it found them, zeros, for the next caller.

    Of one instance, new ones take longer to get from the kernel than the work that is done on them.
    """
    return _kept("zeros", np.zeros, size, dtype)


def scratch(size: int, dtype: type[np.number[Any]]) -> NDArray[Any]:
    """As `zeros`, but of any contents before and after: of one dtype, there is one array a thread."""
    return _kept("scratch", np.empty, size, dtype)


def _kept(kind: str, make: Callable[..., NDArray[Any]], size: int, dtype: type[np.number[Any]]) -> NDArray[Any]:
    arrays = _LOCAL.__dict__.setdefault(kind, {})
    if dtype not in arrays or arrays[dtype].shape[0] < size:
        arrays[dtype] = make(size, dtype=dtype)
    view: NDArray[Any] = arrays[dtype][:size]
    return view
