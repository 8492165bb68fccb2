"""Layer 2. A directory that is complete, with the sha256 of every file in it, or is not there at all.

`SHA256SUMS` is what `sha256sum` writes and `sha256sum -c` checks: a reader needs none of our code to know that a copy
is whole. A killed writer leaves a hidden directory beside the final name, which the next one removes.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xmc_midx.crash import crash_point
from xmc_midx.data.files import sha256_of, sync_directory, sync_file
from xmc_midx.errors import ResourceError, UsageError

__all__ = ["SUMS", "sealed_directory"]

SUMS = "SHA256SUMS"


@contextmanager
def sealed_directory(path: Path) -> Iterator[Path]:
    """A new directory whose files appear under `path`, with their sums, when the block ends without an exception.

    Parameters
    ----------
    path : not there yet, or an empty directory.

    Raises
    ------
    UsageError : `path` is a file, or a directory that is not empty or where this process is.
    ResourceError : the disk is full or the place cannot be written.
    """
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path}: is not empty.", hint="Choose a new directory, or remove this one.")
    if path.resolve() == Path.cwd():
        raise UsageError(f"{path}: is the directory you are in.", hint="Name one to make in it.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file, expected a new directory.")
    beside = path.parent / f".{path.name}.{os.getpid()}.unfinished"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_strays(path)
        beside.mkdir()
        yield beside
        _seal(beside)
        crash_point("export.written")
        if path.is_dir():
            path.rmdir()  # empty; where it is not any more, this fails
        beside.rename(path)
        sync_directory(path.parent)
        crash_point("export.renamed")
    except OSError as error:
        hint = "Free some space." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}.", hint=hint) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _seal(directory: Path) -> None:
    files = sorted(directory.iterdir())
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")
    mode = (directory / SUMS).stat().st_mode
    for file in (*files, directory / SUMS):
        file.chmod(mode)  # safetensors lets the owner alone read what it writes
        sync_file(file)
    sync_directory(directory)


def _remove_strays(path: Path) -> None:
    for stray in path.parent.glob(f".{path.name}.*.unfinished"):
        pid = stray.name.removesuffix(".unfinished").rpartition(".")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(stray, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return pid != os.getpid()
