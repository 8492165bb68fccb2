"""Layer 2. Files of tensors (safetensors), written, hashed and brought to the disk in one pass.

Before it: `data.files`. After it: checkpoints, and the finished model with what is added to it. The library reads them.

Its own writer leaves a whole file in the page cache, to be hashed and synced after that. Here a window of the file is
written while the one before it is hashed and goes to the disk, from where it leaves the cache: a checkpoint does not
push out the data, and the next window takes the same pages (EXPERIMENTS.md, "Saves").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["StoredTensor", "write_arrays", "write_tensors"]

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""Of the format, by the names that NumPy and torch share, in the order of the format: the widest come first."""
_RANKS = {name: rank for rank, name in enumerate(_CODES)}
_WINDOW = 16 * 2**20
"""Bytes between two syncs; 8 and 32 MiB take as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as it goes into a file."""

    dtype: str
    """As NumPy and torch call it: `"float32"`."""
    shape: tuple[int, ...]
    data: memoryview
    """Its bytes, row by row; not copied."""


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Write a file of tensors and bring it to the disk; its name is not (`sync_directory`).

    The bytes are those of `safetensors.numpy.save_file`.

    Returns
    -------
    The sha256 of what was written, in hexadecimal.

    Raises
    ------
    OSError : it cannot be written; a part of it may be there.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        hashes: list[Future[None]] = []
        syncs: list[Future[None]] = []
        for window in _windows(tensors):
            if window.nbytes < _WINDOW:
                if hashes:
                    hashes[-1].result()
                digest.update(window)
            else:
                hashes.append(hashing.submit(digest.update, window))
            _write_all(file.fileno(), window)
            if window.nbytes == _WINDOW:
                if len(syncs) > 1:
                    syncs[-2].result()
                syncs.append(syncing.submit(_sync_and_forget, file.fileno()))
        for job in [*hashes, *syncs]:
            job.result()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> str:
    """`write_tensors` of NumPy's arrays."""
    stored = {}
    for name, array in arrays.items():
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        stored[name] = StoredTensor(dtype=array.dtype.name, shape=array.shape, data=data)
    return write_tensors(path, stored)


def _windows(tensors: Mapping[str, StoredTensor]) -> Iterator[memoryview]:
    names = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.data.nbytes
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    # Small tensors are joined: a file of them is written and synced at once.
    small = [memoryview(len(header).to_bytes(8, "little") + header)]
    for name in names:
        data = tensors[name].data
        if sum(piece.nbytes for piece in small) + data.nbytes <= _WINDOW:
            small.append(data)
            continue
        yield memoryview(b"".join(small))
        small = []
        for begin in range(0, data.nbytes, _WINDOW):
            yield data[begin : begin + _WINDOW]
    yield memoryview(b"".join(small))


def _write_all(descriptor: int, window: memoryview) -> None:
    while window:
        window = window[os.write(descriptor, window) :]


def _sync_and_forget(descriptor: int) -> None:
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
