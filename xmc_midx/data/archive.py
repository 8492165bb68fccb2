"""Layer 2. A zip archive -> files in a new directory, or nothing: no member may reach outside or surprise.

Before it: `fetch`. After it: `download`. Everything that the archive's directory says is checked before the first byte
is written, and every member against its size and CRC while it is. Python's `extractall` renames or overwrites where
this refuses.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from xmc_midx.data.fetch import free_bytes
from xmc_midx.errors import DownloadError, ResourceError
from xmc_midx.types import Reporter

__all__ = ["Limits", "extract"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a benchmark's archive stays far below."""

    total_bytes: int = 512 * 2**30
    ratio: float = 200.0
    """Bytes out for a byte in, of a member of a megabyte or more and of the whole; text reaches 3 to 20."""
    num_members: int = 10_000


_SMALL = 2**20
_DEFAULT_LIMITS = Limits()
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x1
_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error),
    *(NotImplementedError, RuntimeError, ValueError, OverflowError),
)
"""What zipfile raises on an archive that is damaged, or packed in a way it does not know."""


def extract(archive: Path, target: Path, *, reporter: Reporter, limits: Limits = _DEFAULT_LIMITS) -> dict[str, str]:
    """Extract `archive` into `target` and return the sha256 of each file by its path in `target`.

    A folder that all members share is left out, and so is what macOS and Windows add (`__MACOSX`, `.DS_Store`,
    `Thumbs.db`). Files get no permissions from the archive.

    Parameters
    ----------
    target : an empty directory. After an error it may hold files; the caller removes it.
    reporter : stage `unpack`, a step for each byte.

    Raises
    ------
    DownloadError : the archive is damaged, or holds a path outside, a link, a duplicate, too much.
    ResourceError : the disk has not enough room.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = _checked(file, archive, limits)
            need = sum(info.file_size for info, _ in members)
            free = free_bytes(target)
            if need > free:
                raise ResourceError(f"{target.parent}: the files need {need:,} bytes, {free:,} are free.")
            reporter.start("unpack", need)
            return {str(path): _write(file, info, target, path, archive, reporter) for info, path in members}
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise  # of the disk; a decompressor's has no number, and a seek to a damaged offset is invalid
        raise _unsound(archive, error) from None
    except _FAULTS as error:
        raise _unsound(archive, error) from None


def _checked(file: zipfile.ZipFile, archive: Path, limits: Limits) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The members that are files, with their paths in the target; an error for the first that is not harmless."""
    infos = file.infolist()
    if len(infos) > limits.num_members:
        raise _refusal(archive, f"holds {len(infos):,} members, more than the limit of {limits.num_members:,}")
    size, packed = sum(i.file_size for i in infos), archive.stat().st_size
    if size > limits.total_bytes:
        raise _refusal(archive, f"unpacks to {size:,} bytes, more than the limit of {limits.total_bytes:,}")
    if size > _SMALL and size > limits.ratio * packed:
        raise _refusal(archive, f"unpacks to {size / max(packed, 1):,.0f} times its size, over {limits.ratio:g}")
    seen: set[str] = set()
    members = []
    for info in infos:
        path = _safe_path(info, archive)
        if info.flag_bits & _ENCRYPTED:
            raise _refusal(archive, f"{info.filename!r} is encrypted")
        if info.file_size > _SMALL and info.file_size > limits.ratio * max(info.compress_size, 1):
            raise _refusal(archive, f"{info.filename!r} is packed by more than {limits.ratio:g} to 1")
        # Where upper and lower case are the same, the second would overwrite the first.
        if (folded := str(path).casefold()) in seen:
            raise _refusal(archive, f"holds {info.filename!r} twice")
        seen.add(folded)
        if not info.is_dir() and not _is_litter(path):
            members.append((info, path))
    _refuse_overlap(infos, archive)
    files = {str(path).casefold() for _, path in members}
    for info, path in members:
        if any(str(parent).casefold() in files for parent in path.parents):
            raise _refusal(archive, f"{info.filename!r} lies in a file")
    if not members:
        raise _refusal(archive, "holds no file")
    return _without_common_folder(members)


def _safe_path(info: zipfile.ZipInfo, archive: Path) -> PurePosixPath:
    # zipfile cuts a name at a NUL and turns the system's separator into /; the original name is judged.
    name = info.orig_filename
    parts = name.removesuffix("/").split("/")
    if name.startswith("/") or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise _refusal(archive, f"{name!r} is no path inside the archive")
    if not name.isprintable() or len(name.encode()) > 1000:
        raise _refusal(archive, f"{name[:100]!r} is no sound name")
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refusal(archive, f"{name!r} is a link or a device, expected a file")
    return PurePosixPath(*parts)


def _refuse_overlap(infos: Sequence[zipfile.ZipInfo], archive: Path) -> None:
    """Members that share bytes: how a small archive unpacks to a huge one."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    for info, after in itertools.pairwise(ordered):
        if info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size > after.header_offset:
            raise _refusal(archive, f"{info.filename!r} and {after.filename!r} overlap")


def _is_litter(path: PurePosixPath) -> bool:
    return path.parts[0] == "__MACOSX" or path.name in (".DS_Store", "Thumbs.db")


def _without_common_folder(
    members: list[tuple[zipfile.ZipInfo, PurePosixPath]],
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    while all(len(path.parts) > 1 for _, path in members) and len({path.parts[0] for _, path in members}) == 1:
        members = [(info, PurePosixPath(*path.parts[1:])) for info, path in members]
    return members


def _write(
    file: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, path: PurePosixPath, archive: Path, reporter: Reporter
) -> str:
    place = target / path
    place.parent.mkdir(parents=True, exist_ok=True)
    digest, crc, size = hashlib.sha256(), 0, 0
    with file.open(info) as source, place.open("xb") as sink:
        while block := source.read(2**20):
            size += len(block)
            if size > info.file_size:
                break
            crc = zlib.crc32(block, crc)
            digest.update(block)
            sink.write(block)
            reporter.step(len(block))
        sink.flush()
        os.fsync(sink.fileno())
    # Checked here as well: the standard library has returned short members as good.
    if size != info.file_size or crc != info.CRC:
        raise _refusal(archive, f"{info.filename!r} is damaged: {size:,} bytes of {info.file_size:,}, or a wrong CRC")
    return digest.hexdigest()


def _unsound(archive: Path, error: Exception) -> DownloadError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return DownloadError(f"{archive.name}: is no sound zip archive ({reason}).")


def _refusal(archive: Path, fact: str) -> DownloadError:
    return DownloadError(f"{archive.name}: {fact}; it is not unpacked.")
