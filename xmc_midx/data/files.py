"""Layer 2. Bytes on disk: text streams in chunks of whole lines, and files that appear whole or not at all.

Before it: `problems`. After it: `formats` makes matrices of the lines. Nothing here knows what a line means.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import select
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

from xmc_midx.crash import crash_point
from xmc_midx.data.problems import Problem, Report
from xmc_midx.errors import DataError, ResourceError

__all__ = [
    "MAX_LINE_BYTES",
    "SUFFIXES",
    "LineChunks",
    "atomic_write",
    "find_variant",
    "plain_name",
    "read_json",
    "sha256_of",
    "sync_directory",
    "sync_file",
]

SUFFIXES = ("", ".gz", ".bz2", ".xz")
"""What may follow the name of a text file: plain, gzip, bzip2, xz."""

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is an error: it bounds the memory that a damaged file can take."""

CHUNK_BYTES = 2**20
"""Read at a time; on gnd-tib larger chunks take the same time and more memory."""

_PATIENCE_SECONDS = 0.001
"""For which a chunk of a live stream waits for more, if there was much already: what writes without pause fills it."""
_MUCH_BYTES = 4096
"""A block of a program's output; one question is shorter, and is answered at once."""

_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00"}
_BOM = b"\xef\xbb\xbf"
# What the three decompressors raise on a damaged stream; OSError without errno is theirs as well.
_STREAM_ERRORS = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class LineChunks:
    r"""Iterates over a text file in chunks of whole lines, `(number of the first line, bytes)`.

    Lines are counted from 1. Each chunk ends with a newline, which is added to a last line that has none. A
    UTF-8 byte order mark is dropped. At most one chunk and one line are in memory. Faults of the stream go
    to `report`; if that returns, iteration ends.

    Parameters
    ----------
    path : the file; its name says how it is compressed. With `stream`, what messages call it.
    report : receives the faults: kinds `file` (missing, unreadable), `compression` and `line-length`.
    stream : read instead of the file, as it is; left open.
    live : give whole lines as soon as nothing more is at hand, rather than when a chunk is full: someone waits for
        what is made of them.
    """

    def __init__(self, path: Path, report: Report, *, stream: BufferedIOBase | None = None, live: bool = False) -> None:
        self.path = path
        self._stream, self._live = stream, live
        self.num_lines = 0
        """Lines given so far."""
        self.complete = False
        """Whether the end of the file was reached without a fault."""
        self.final_newline = True
        """False if the last line has no newline: such a file may be cut."""
        self.report = report
        """May be replaced at any time."""

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        pieces: list[bytes] = []
        pending = 0
        for block in self._blocks():
            first_end, end = block.find(b"\n"), block.rfind(b"\n") + 1
            if pending + (first_end if end else len(block)) > MAX_LINE_BYTES:
                self._fault("line-length", f"the line is longer than {MAX_LINE_BYTES:,} bytes.")
                return
            if not end:
                pieces.append(block)
                pending += len(block)
                continue
            chunk = b"".join([*pieces, block[:end]])
            pieces, pending = [block[end:]], len(block) - end
            yield self._numbered(chunk)
        rest = b"".join(pieces)
        if self.complete and rest:
            self.final_newline = False
            yield self._numbered(rest + b"\n")

    def _numbered(self, chunk: bytes) -> tuple[int, bytes]:
        first = self.num_lines + 1
        self.num_lines += chunk.count(b"\n")
        return first, chunk

    def _blocks(self) -> Iterator[bytes]:
        try:
            with _open_read(self.path) if self._stream is None else nullcontext(self._stream) as stream:
                block, error = _read_block(stream, live=self._live)
                block = block.removeprefix(_BOM)
                while block:
                    yield block
                    if error:
                        break
                    block, error = _read_block(stream, live=self._live)
            if error:
                raise error
            self.complete = True
        except _STREAM_ERRORS as error:
            self._damaged(error)
        except DataError as error:
            self._unreadable(error.message, error.hint)
        except OSError as error:
            if error.errno is None:
                self._damaged(error)
            else:
                packed = [self.path.with_name(self.path.name + ending) for ending in (".gz", ".bz2", ".xz")]
                found = next((path for path in packed if path.exists()), None)
                hint = None if found is None or self.path.exists() else f"Did you mean {found}?"
                self._unreadable(f"cannot be read: {error.strerror}.", hint)

    def _unreadable(self, text: str, hint: str | None) -> None:
        self.report(Problem(kind="file", file=str(self.path), line=None, text=text, hint=hint))

    def _damaged(self, error: Exception) -> None:
        reason = str(error).rstrip(".")
        text = f"the {self.path.suffix} stream is cut or damaged here ({reason})."
        self._fault("compression", text, hint="Fetch or copy the file again.")

    def _fault(self, kind: str, text: str, hint: str | None = None) -> None:
        line = self.num_lines + 1
        self.report(Problem(kind=kind, file=str(self.path), line=line, text=text, hint=hint))


def _read_block(stream: BufferedIOBase, *, live: bool = False) -> tuple[bytes, Exception | None]:
    """The next bytes, empty at the end, and the fault that cut them short."""
    pieces: list[bytes] = []
    size = 0
    try:
        while size < CHUNK_BYTES and (piece := stream.read1(CHUNK_BYTES - size)):
            pieces.append(piece)
            size += len(piece)
            if live and not _has_more(stream, _PATIENCE_SECONDS if size >= _MUCH_BYTES else 0.0):
                break
    except (OSError, *_STREAM_ERRORS) as error:
        return b"".join(pieces), error
    return b"".join(pieces), None


def _has_more(stream: BufferedIOBase, seconds: float) -> bool:
    """Whether a stream gives more bytes, or its end, within some seconds."""
    try:
        return bool(select.select([stream], [], [], seconds)[0])
    except (OSError, ValueError):  # no descriptor behind it; on Windows, no socket
        return False


def _open_read(path: Path) -> BufferedIOBase:
    """The decompressed bytes; a name that does not fit the content is a `DataError` without the path."""
    if path.is_dir():
        raise DataError("is a directory, expected a file.")
    if path.exists() and not path.is_file():
        return path.open("rb")  # a pipe: its first bytes can be read only once
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"PK\x03\x04"):
        raise DataError("is a zip archive, expected text or one compressed file.", hint="Unpack it first.")
    suffix = path.suffix if path.suffix in _MAGIC else ""
    actual = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "")
    if suffix and not head:
        raise DataError(f"is empty, expected a {suffix} stream.", hint="Was the file cut?")
    if suffix != actual:
        is_upper = not suffix and path.suffix.lower() == actual != ""
        name = path.stem + actual if is_upper else path.name.removesuffix(suffix) + actual
        expected = f"a {suffix} stream" if suffix else "text"
        found = f"a {actual} stream" if actual else "something else"
        raise DataError(f"is {found}, expected {expected}.", hint=f"Is its right name {name}?")
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix:
        return BufferedReader(_Streams(path, bz2.BZ2Decompressor if suffix == ".bz2" else lzma.LZMADecompressor))
    return path.open("rb")


class _Streams(RawIOBase):
    """The bytes of all streams of a .bz2 or .xz file. Python's own readers take what is no stream, behind the first,
    for the end of the file: of a file of several, one wrong bit would cut the rest off."""

    def __init__(self, path: Path, decompressor: type[bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file, self._decompressor = path.open("rb"), decompressor
        self._stream = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            piece = b""
            if self._stream.eof:
                piece = self._stream.unused_data
                while not piece.lstrip(b"\0"):  # xz pads its streams with zeros
                    piece = self._file.read(CHUNK_BYTES)
                    if not piece:
                        return 0
                piece = piece.lstrip(b"\0")
                self._stream = self._decompressor()
            elif self._stream.needs_input:
                piece = self._file.read(CHUNK_BYTES)
                if not piece:
                    raise EOFError("the file ended before its last stream did")
            if found := self._stream.decompress(piece, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def plain_name(path: Path) -> str:
    """The name of a file without what says that it is compressed."""
    return path.name.removesuffix(path.suffix) if path.suffix and path.suffix in SUFFIXES else path.name


def find_variant(directory: Path, name: str) -> Path | None:
    """`directory/name`, plain or compressed; None if there is none.

    Raises
    ------
    DataError : there are two or more, such as train.txt and train.txt.gz.
    """
    found = [path for suffix in SUFFIXES if (path := directory / f"{name}{suffix}").exists()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{directory}: holds {names}, expected one of them.", hint="Move all but one away.")
    return found[0] if found else None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary stream whose bytes appear under `path`, all of them, when the block ends without an exception.

    The bytes go to a hidden file beside `path`, compressed as its name says, are synchronised to the disk,
    and the file is renamed. After an exception nothing is left and an older `path` is untouched. The same
    bytes give the same file.

    Raises
    ------
    ResourceError : the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            with _open_write(file, path.suffix) as stream:
                yield stream
            file.flush()
            os.fsync(file.fileno())
        crash_point("file.written")
        temporary.replace(path)
        sync_directory(path.parent)
        crash_point("file.renamed")
    except OSError as error:
        hint = "Free some space." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}.", hint=hint) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _open_write(file: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    if suffix == ".gz":
        # Neither name nor time in the stream: equal content, equal file.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0) as stream:
            yield cast("BinaryIO", stream)
    elif suffix == ".bz2":
        with bz2.open(file, "wb") as stream:
            yield cast("BinaryIO", stream)
    elif suffix == ".xz":
        with lzma.open(file, "wb") as stream:
            yield cast("BinaryIO", stream)
    else:
        yield file


def sync_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk: a rename is only then there for good."""
    if os.name == "nt":  # Windows has no handle for a directory; its renames are journalled.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, *, max_bytes: int = 64 * 2**20) -> Any:
    """The value in a JSON file.

    Raises
    ------
    DataError : the file is missing, larger than `max_bytes`, not JSON in UTF-8, or nested too deeply.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: is missing.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(content) > max_bytes:
        raise DataError(f"{path}: is larger than {max_bytes:,} bytes, more than we ever write there.")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON; it was damaged or edited.") from None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
