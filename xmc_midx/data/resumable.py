"""Layer 2. An output file that is written in the order of its input, and can be gone on with after a kill.

The bytes go to `FILE.partial`, and about every second `FILE.partial.json` says how far they are good: up to which
instance, how many bytes, the sha256 of the input's lines so far, and under which settings. When all is written, the
partial file takes the name FILE. What went on after a kill has the bytes of what was never killed.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xmc_midx.crash import crash_point
from xmc_midx.data.files import atomic_write, read_json, sync_directory
from xmc_midx.errors import DataError, ResourceError, UsageError

try:
    import fcntl
except ImportError:  # Windows: two writers of one file are not told apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["Progress", "ResumableFile"]

_FORMAT = "xmc-midx partial output"
_MARK_SECONDS = 1.0
"""Between two notes of the progress: each waits for the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an output is good."""

    next_instance: int
    """Number of the first instance that is not in it, from 0."""
    num_bytes: int
    input_sha256: str
    """Of the input's lines before that instance."""


class ResumableFile:
    """Made by `open`."""

    def __init__(self, path: Path, stream: BinaryIO, settings: Mapping[str, Any], done: Progress | None) -> None:
        self.done = done
        """What an earlier process wrote, and this one goes on from; None starts anew."""
        self._path, self._stream, self._settings = path, stream, dict(settings)
        self._latest = done
        self._num_bytes = 0 if done is None else done.num_bytes
        self._marked_at = time.monotonic()
        self._finished = False

    @classmethod
    @contextmanager
    def open(cls, path: Path, settings: Mapping[str, Any], *, resume: bool) -> Iterator[ResumableFile]:
        """The file for one writing; it appears under `path` when the block ends without an exception.

        Parameters
        ----------
        path : of the finished file.
        settings : what the bytes depend on besides the input; plain values, as JSON keeps them.
        resume : go on from what is there, and after an exception keep what there is. Else start anew, and then leave
            nothing.

        Raises
        ------
        UsageError : what is there was written under other settings.
        DataError : what is there is damaged.
        ResourceError : the file cannot be written, or another process is writing it.
        """
        partial, notes = _names(path)
        try:
            stream = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise ResourceError(f"{partial}: cannot be written: {error.strerror}.") from None
        with stream:
            _lock(stream, path)
            done = _read_notes(path, settings, os.fstat(stream.fileno()).st_size) if resume else None
            stream.truncate(0 if done is None else done.num_bytes)
            stream.seek(0, os.SEEK_END)
            if done is None:
                notes.unlink(missing_ok=True)
            file = cls(path, stream, settings, done)
            try:
                yield file
                file._finish()
            except OSError as error:
                hint = "Free some space." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
                raise ResourceError(f"{path}: cannot be written: {error.strerror or error}.", hint=hint) from error
            finally:
                if resume and not file._finished:
                    with suppress(OSError, ResourceError):
                        file._note()
                elif not file._finished:
                    partial.unlink(missing_ok=True)
                    notes.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._num_bytes += len(data)

    def mark(self, next_instance: int, input_sha256: str) -> None:
        """All that was written is good up to this instance."""
        self._latest = Progress(next_instance=next_instance, num_bytes=self._num_bytes, input_sha256=input_sha256)
        if time.monotonic() - self._marked_at >= _MARK_SECONDS:
            self._note()
            self._marked_at = time.monotonic()
            crash_point("output.noted")

    def _note(self) -> None:
        if self._latest is None:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        notes = {
            "format": _FORMAT,
            "settings": self._settings,
            "next_instance": self._latest.next_instance,
            "bytes": self._latest.num_bytes,
            "input_sha256": self._latest.input_sha256,
        }
        with atomic_write(_names(self._path)[1]) as file:
            file.write(json.dumps(notes, indent=1).encode() + b"\n")

    def _finish(self) -> None:
        partial, notes = _names(self._path)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        crash_point("file.written")
        partial.replace(self._path)
        self._finished = True
        notes.unlink(missing_ok=True)
        sync_directory(self._path.parent)
        crash_point("file.renamed")


def _names(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.partial.json")


def _lock(stream: BinaryIO, path: Path) -> None:
    """The system drops the lock when the process ends, however it ends."""
    if fcntl is None:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other process may have finished between our opening and our lock: this is then its file.
        is_ours = os.path.samestat(os.fstat(stream.fileno()), _names(path)[0].stat())
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    except OSError:  # a file system without locks
        return
    if not is_ours:
        raise ResourceError(
            f"{path}: another process is writing this file.", hint="Wait for it, or choose another --output."
        )


def _read_notes(path: Path, settings: Mapping[str, Any], size: int) -> Progress | None:
    notes = _names(path)[1]
    if size == 0 or not notes.exists():
        return None  # also where a kill came between the last rename and the removal of the notes
    anew = f"Remove {notes} to start anew."
    values = read_json(notes)
    try:
        if values["format"] != _FORMAT:
            raise ValueError(values["format"])
        kept = values["settings"]
        done = Progress(
            next_instance=int(values["next_instance"]),
            num_bytes=int(values["bytes"]),
            input_sha256=str(values["input_sha256"]),
        )
        if not (isinstance(kept, dict) and done.next_instance >= 0 and 0 <= done.num_bytes <= size):
            raise ValueError(done)
    except (LookupError, TypeError, ValueError):
        raise DataError(f"{notes}: does not fit {_names(path)[0].name}; it was damaged or edited.", hint=anew) from None
    for name, value in settings.items():
        if kept.get(name) != value:
            raise UsageError(
                f"{path}: was begun with another {name}: {kept.get(name)!r}, now {value!r}.",
                hint=f"Go on as it was begun. {anew}",
            )
    return done
