"""Layer 1. Loops compiled by numba: each is compiled once, and kept for the processes that follow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import numba

__all__ = ["compiled", "is_kept"]

_PLACE = "compiled"
"""In `XMC_MIDX_CACHE`."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


@overload
def compiled(function: _Function, /) -> _Function: ...


@overload
def compiled(**options: Any) -> Callable[[_Function], _Function]: ...


def compiled(function: Any = None, /, **options: Any) -> Any:
    """`numba.njit` without the GIL and with these options, as a decorator; other threads go on while it runs.

    What is compiled lies beside the source, else where numba keeps it for the user. In a container that may write
    neither, it lies in `XMC_MIDX_CACHE`, or is compiled by every process.
    """
    if function is None:
        return lambda one: _compile(one, options)
    return _compile(function, {})


def is_kept(function: Any) -> bool:
    """Whether what `compiled` gave was compiled before, as it stands, and is kept."""
    place, code = function.stats.cache_path, function.py_func.__code__
    if place is None:
        return False
    source = Path(code.co_filename)
    found = Path(place).glob(f"{source.stem}.{code.co_name}-{code.co_firstlineno}.*.nbi")
    # Of another source, numba throws away what is there.
    return any(one.stat().st_mtime >= source.stat().st_mtime for one in found)


def _compile(function: Any, options: Mapping[str, Any]) -> Any:
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # numba finds no directory that it can write
        cache = os.environ.get("XMC_MIDX_CACHE")
        if cache and not numba.config.CACHE_DIR and _is_our_own(Path(cache, _PLACE)):  # type: ignore[attr-defined]
            numba.config.CACHE_DIR = str(Path(cache, _PLACE))  # type: ignore[attr-defined]
            return _compile(function, options)
        return numba.njit(nogil=True, **options)(function)


def _is_our_own(place: Path) -> bool:
    """Whether nobody else can put there what this process would run; made if it is not there."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
    except OSError:
        return False
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
