"""Layer 2. Files that were parsed once are mapped from the disk the next time.

Before it: `files`, and `registry`, which says where the cache is. After it: `dataset`. The cache is a convenience and
no more: without a place to write, or with a damaged entry, the source is read as if there were none. The variable
`XMC_MIDX_NO_CACHE` turns it off, and whatever lies in `parsed` may be deleted at any time.

`parsed/KEY.csr` holds both matrices of a split as NumPy arrays in the format of `.npy`, one after the other, each
padded to 64 bytes, and the SHA-256 of KEY and all that. KEY is a hash over the content of the source, so that an entry
can be of no other. `parsed/NAME.seen` holds the key of a path's source with its size and times, which saves hashing it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import atomic_write, sha256_of
from xmc_midx.data.registry import cache_directory
from xmc_midx.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["page_out", "read_cached"]

MAX_BYTES = 16 * 2**30
"""The entries that were used last are kept up to this size."""
SMALL_BYTES = 2**20
"""A smaller source is read faster than it is looked up."""

_FORMAT = 1
"""Of the entries, and of what the readers make of a source: a change of either changes all keys."""
_DIGEST_BYTES = 32
_ALIGNMENT = 64
_SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago may change again without another time: FAT counts in steps of 2 s."""
_STRAY_SECONDS = 24 * 3600
"""After this a temporary file is one that a killed process left."""
_MADV_PAGEOUT = 21
"""Of Linux, from 5.4 on; Python has no name for it."""
_WAIT_SECONDS = 300.0
"""For another process that reads the same source; after that, both do."""

Matrices = tuple[csr_matrix[Any], csr_matrix[Any]]
"""Features (N, F) float32 and labels (N, L) float32 of ones, both canonical."""


def read_cached(read: Callable[[], Matrices], *, reader: str, sources: Sequence[str | Path]) -> Matrices:
    """What `read` returns, from the cache if it has it; else it is kept for the next time.

    The arrays of a cached matrix are mapped copy-on-write: they may be changed, and the cache does not see it. Two
    processes that come at once read the source once: the second waits and opens what the first wrote.

    Parameters
    ----------
    read : reads the sources. Its errors pass; nothing is kept then.
    reader : name of what `read` makes of them: another reader has other entries.
    sources : all the files that it reads.

    Raises
    ------
    Only what `read` raises.
    """
    paths = [Path(source).absolute() for source in sources]
    try:
        cache = _Cache(reader, paths) if _is_wanted(paths) else None
    except (OSError, UsageError):
        cache = None
    if cache is None:
        return read()
    found = cache.open()
    if found is not None:
        return found
    with cache.lock() as is_mine:
        found = cache.open() if is_mine else None
        if found is None:
            found = read()
            if is_mine:
                cache.keep(found)
                # From now on what was read is the kernel's to take back (`page_out`).
                found = cache.open() or found
    return found


def page_out(matrices: Matrices) -> None:
    """Give the memory of mapped matrices back, until they are read again; changes of theirs stay. On Linux alone, and
    nothing for matrices that are not mapped."""
    for matrix in matrices:
        base: Any = matrix.indices
        while isinstance(base, np.ndarray | memoryview):
            base = base.obj if isinstance(base, memoryview) else base.base
        if isinstance(base, mmap.mmap) and sys.platform.startswith("linux"):
            with suppress(OSError, ValueError):
                base.madvise(_MADV_PAGEOUT)


def _is_wanted(paths: list[Path]) -> bool:
    """Whether there is a cache, and these are files (no pipes) of some size."""
    if os.environ.get("XMC_MIDX_NO_CACHE", "") not in ("", "0"):
        return False
    facts = [path.stat() for path in paths]
    return all(stat.S_ISREG(fact.st_mode) for fact in facts) and sum(fact.st_size for fact in facts) >= SMALL_BYTES


class _Cache:
    """The entry of some sources. Creating it makes the directory, and hashes sources that it does not know."""

    def __init__(self, reader: str, paths: list[Path]) -> None:
        self.directory = cache_directory() / "parsed"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._paths = paths
        self._facts = self._look()
        name = _digest_of(_FORMAT, reader, [str(path) for path in paths])
        self._seen = self.directory / f"{name}.seen"
        known = self._known_key()
        self._key = known or _digest_of(_FORMAT, reader, [(path.suffix, sha256_of(path)) for path in paths])
        if known is None:
            self._remember()
        self.entry = self.directory / f"{self._key}.csr"

    def _look(self) -> list[list[int]]:
        """What changes when a source does. A program can set the second, not the third."""
        facts = [path.stat() for path in self._paths]
        return [[fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns, fact.st_ino, fact.st_dev] for fact in facts]

    def _known_key(self) -> str | None:
        try:
            seen = json.loads(self._seen.read_text(encoding="utf-8"))
            return str(seen["key"]) if seen["facts"] == self._facts else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self) -> None:
        latest = max(max(fact[1:3]) for fact in self._facts)
        if time.time_ns() - latest < _SETTLED_NS or self._look() != self._facts:
            return
        with suppress(ResourceError), atomic_write(self._seen) as file:
            file.write(json.dumps({"key": self._key, "facts": self._facts}).encode())

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process alone may write the entry; False where nothing can be locked."""
        path = self.entry.with_suffix(".lock")
        lock = filelock.FileLock(path, timeout=_WAIT_SECONDS)
        try:
            lock.acquire()
        except (OSError, NotImplementedError, filelock.Timeout):
            yield False
            return
        try:
            yield True
        finally:
            # Whoever waits for the removed file finds the entry; whoever makes a new one does so too.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            lock.release()

    def open(self) -> Matrices | None:
        """The matrices; None where the entry is missing or is not what was written."""
        try:
            with self.entry.open("rb") as file:
                found = _from_map(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), self._key)
        except (OSError, ValueError):
            return None
        with suppress(OSError):
            os.utime(self.entry)  # the order in which entries go
        return found

    def keep(self, matrices: Matrices) -> None:
        """Write the entry where there is room and the sources are still those that were hashed."""
        size = sum(part.nbytes for matrix in matrices for part in (matrix.indptr, matrix.indices, matrix.data))
        try:
            for stray in self.directory.glob(f".{self.entry.name}.*.tmp"):
                stray.unlink()
            if size > MAX_BYTES or 2 * size > shutil.disk_usage(self.directory).free or self._look() != self._facts:
                return
            with atomic_write(self.entry) as file:
                _write(file, matrices, self._key)
            _prune(self.directory)
        except (OSError, ResourceError):
            return


def _digest_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(file: Any, matrices: Matrices, key: str) -> None:
    features, labels = matrices
    output = _Hashed(file, key)
    sizes = np.array([*features.shape, labels.shape[1]], dtype=np.int64)
    for array in (sizes, features.indptr, features.indices, features.data, labels.indptr, labels.indices):
        np.lib.format.write_array(output, np.ascontiguousarray(array), version=(1, 0))
        output.write(bytes(-output.size % _ALIGNMENT))
    file.write(output.digest.digest())


class _Hashed:
    """A stream that hashes the key and what goes through it."""

    def __init__(self, file: Any, key: str) -> None:
        self.size = 0
        self.digest = hashlib.sha256(key.encode())
        self._file = file

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self.digest.update(data)
        self._file.write(data)


def _from_map(content: mmap.mmap, key: str) -> Matrices:
    """The matrices in the entry of that key, as views of it.

    Raises
    ------
    ValueError : it is not what `_write` writes.
    """
    digest = hashlib.sha256(key.encode())
    digest.update(memoryview(content)[:-_DIGEST_BYTES])
    if digest.digest() != content[-_DIGEST_BYTES:]:
        raise ValueError("damaged")
    sizes, offsets, ids, values, label_offsets, label_ids = (_next_array(content) for _ in range(6))
    num_rows, num_features, num_labels = map(int, sizes)
    ones = np.ones(len(label_ids), dtype=np.float32)
    features = csr_matrix((values, ids, offsets), shape=(num_rows, num_features))
    labels = csr_matrix((ones, label_ids, label_offsets), shape=(num_rows, num_labels))
    for matrix in (features, labels):
        matrix.check_format(full_check=True)
        matrix.has_canonical_format = True
    return features, labels


def _next_array(content: mmap.mmap) -> NDArray[Any]:
    """The array that begins at the position of `content`, which moves to the next one."""
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError("another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    begin = content.tell()
    array = np.frombuffer(content, dtype=dtype, count=shape[0], offset=begin)
    end = begin + array.nbytes
    content.seek(end + -end % _ALIGNMENT)
    return array


def _prune(directory: Path) -> None:
    """Remove the entries beyond `MAX_BYTES` that were used longest ago, and what belongs to none."""
    entries = [(path.stat(), path) for path in directory.glob("*.csr")]
    room = MAX_BYTES
    for fact, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
        room -= fact.st_size
        if room < 0:
            path.unlink()
    for path in directory.glob("*.seen"):
        with suppress(ValueError, KeyError, TypeError):
            if (directory / f"{json.loads(path.read_text(encoding='utf-8'))['key']}.csr").exists():
                continue
        path.unlink()
    for path in directory.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > _STRAY_SECONDS:
            path.unlink()
