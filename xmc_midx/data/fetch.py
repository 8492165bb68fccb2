"""Layer 2. One address -> one complete file: HTTP with resume, and no file under its name before all of it is there.

Before it: `drive` knows Google's pages. After it: `download` tries the addresses of a data set one after the other.
The bytes go to `<name>.part`; beside it `<name>.part.json` says of which file they are, so that a later call goes on
where this one ended, and starts anew where the file at the address has changed.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.cookiejar import CookieJar
from pathlib import Path
from typing import BinaryIO

from xmc_midx.data.drive import looks_like_page, read_page
from xmc_midx.data.files import atomic_write
from xmc_midx.errors import DownloadError, ResourceError
from xmc_midx.types import Reporter

__all__ = ["discard", "fetch", "free_bytes", "part_of"]

TIMEOUT_S = 30.0
"""Without a byte for so long, a connection counts as lost."""
MAX_BYTES = 256 * 2**30
"""A longer body is refused: the largest archive of the field has about 10 GB."""
MAX_FRUITLESS = 4
"""Attempts in a row that bring the file no further, after which an address is given up."""
WAIT_S = 1.0
"""Before the second attempt; doubled after each fruitless one."""
BLOCK_BYTES = 2**18
PAGE_BYTES = 2**20
"""At most so much of a web page is read."""
MAX_CONFIRMATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Of which file the bytes of a part are."""

    key: str
    total: int | None
    """Bytes of the whole file; None if the server does not say."""
    etag: str | None
    """A strong one; a weak one promises nothing about bytes."""
    modified: str | None


class _Lost(Exception):  # noqa: N818 - an event of the network, not an error of anyone's
    """The connection broke, or the server is busy: worth another attempt."""


def part_of(final: Path) -> Path:
    """Where the bytes of `final` are until all are there."""
    return final.with_name(f"{final.name}.part")


def discard(final: Path) -> None:
    """Remove what was received of `final`."""
    for path in (final, part_of(final), _origin_path(final)):
        path.unlink(missing_ok=True)


def fetch(url: str, final: Path, *, key: str, sha256: str | None, reporter: Reporter) -> str:
    """Download `url` to `final` and return the sha256 of the file.

    Parameters
    ----------
    url : http or https.
    final : appears when it is complete and, where the hash is known, right. Its directory exists.
    key : the name of the file at whichever address; a part with another key is not gone on with.
    sha256 : of the whole file; None if it is not known.
    reporter : stage `download`, a step for each byte, with the fact `bytes_per_second`.

    Raises
    ------
    DownloadError : the address does not give the file (the message says why, without the address), or gives another.
    ResourceError : the disk is full; what was received stays for the next call.
    """
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    part = part_of(final)
    furthest, fruitless, wait = _size(part), 0, WAIT_S
    earlier = furthest > 0
    while True:
        try:
            _attempt(opener, url, final, key, sha256, reporter)
            found = _hash(part, reporter)
            if sha256 is None or found == sha256:
                break
            discard(final)
            if not earlier:
                raise DownloadError(f"its sha256 is {found}, expected {sha256}")
            earlier, furthest = False, 0
            reporter.message("what an earlier download left does not fit; starting anew")
        except _Lost as lost:
            reached = _size(part)
            fruitless = 0 if reached > furthest else fruitless + 1
            furthest = max(furthest, reached)
            if fruitless >= MAX_FRUITLESS:
                raise DownloadError(f"{lost} ({furthest:,} bytes are kept)") from None
            reporter.message(f"{lost}; trying again from byte {reached:,}")
            wait = WAIT_S if fruitless == 0 else wait * 2
            time.sleep(wait)
    with _writing(part):
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(final)
        _origin_path(final).unlink(missing_ok=True)
    return found


def _attempt(
    opener: urllib.request.OpenerDirector, url: str, final: Path, key: str, sha256: str | None, reporter: Reporter
) -> None:
    """One connection, confirmations included, until the part is complete."""
    part = part_of(final)
    origin, have = _read_origin(final), _size(part)
    # Without a validator only the hash of the whole can tell whether two halves belong together.
    resumable = origin is not None and origin.key == key and have > 0
    if not resumable or origin is None or not (origin.etag or origin.modified or sha256):
        origin, have = None, 0
    if origin and have == origin.total:
        return
    for _ in range(MAX_CONFIRMATIONS):
        with _request(opener, url, final, origin, have) as response:
            status, headers = response.status, response.headers
            head = _read_head(response)
            if looks_like_page(headers.get("Content-Type", ""), head):
                text = (head + _read(response, PAGE_BYTES)).decode("utf-8", "replace")
                page = read_page(text, response.url)
                if page.confirmed_url is None:
                    raise DownloadError(page.reason)
                url = page.confirmed_url
                continue
            if headers.get("Content-Encoding", "identity") != "identity":
                raise DownloadError(f"it sends an encoding ({headers['Content-Encoding']}) that was not asked for")
            start, total = _extent(status, headers)
            now = _Origin(
                key=key, total=total, etag=_strong(headers.get("ETag")), modified=headers.get("Last-Modified")
            )
            if start and (start != have or origin is None or not _same(origin, now)):
                discard(final)
                raise _Lost("the file at the server has changed")
            _receive(response, head, part, final, now, start, reporter)
            return
    raise DownloadError("it asks for a confirmation again and again")


@contextmanager
def _request(
    opener: urllib.request.OpenerDirector, url: str, final: Path, origin: _Origin | None, have: int
) -> Iterator[http.client.HTTPResponse]:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "xmc-midx"})
    if origin and have:
        request.add_header("Range", f"bytes={have}-")
        if validator := origin.etag or origin.modified:
            request.add_header("If-Range", validator)
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            yield response
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                discard(final)  # our part is no part of what is there now
                raise _Lost("the file at the server has changed") from None
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _Lost(f"the server answers {error.code} {error.reason}") from None
            text = error.read(PAGE_BYTES).decode("utf-8", "replace")
            quota = read_page(text, url).reason if "quota" in text.lower() else ""
            raise DownloadError(quota or f"the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _Lost(f"no connection ({error.reason})") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Lost(_describe(error)) from None


def _extent(status: int, headers: http.client.HTTPMessage) -> tuple[int, int | None]:
    """First byte and size of the whole file."""
    if status != 206:
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not found:
        raise DownloadError(f"it sends a part without saying which ({headers.get('Content-Range')!r})")
    return int(found[1]), int(found[2]) if found[2].isdigit() else None


def _receive(
    response: http.client.HTTPResponse,
    head: bytes,
    part: Path,
    final: Path,
    now: _Origin,
    start: int,
    reporter: Reporter,
) -> None:
    if now.total is not None:
        if now.total > MAX_BYTES:
            raise DownloadError(f"it has {now.total:,} bytes, more than the limit of {MAX_BYTES:,}")
        need, free = now.total - start, free_bytes(part.parent)
        if need > free:
            raise ResourceError(
                f"{part.parent}: the archive needs {need:,} more bytes, {free:,} are free.",
                hint="Free some space, or set XMC_MIDX_CACHE to a larger disk.",
            )
    if start == 0:
        part.unlink(missing_ok=True)  # never an older part under the new origin
        with atomic_write(_origin_path(final)) as file:
            file.write(json.dumps(asdict(now)).encode())
    reporter.start("download", None if now.total is None else now.total - start)
    with _writing(part), part.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        _copy(response, head, file, now.total, reporter)


def _copy(
    response: http.client.HTTPResponse, block: bytes, file: BinaryIO, total: int | None, reporter: Reporter
) -> None:
    began, received = time.monotonic(), 0
    while block:
        file.write(block)
        file.flush()
        received += len(block)
        if file.tell() > MAX_BYTES:
            raise DownloadError(f"it sends more than the limit of {MAX_BYTES:,} bytes")
        reporter.step(len(block), bytes_per_second=received / max(time.monotonic() - began, 1e-3))
        block = _read(response, BLOCK_BYTES)
    if total is not None and file.tell() < total:
        raise _Lost(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _read(response: http.client.HTTPResponse, size: int) -> bytes:
    """Some bytes, empty at the end. Whatever came before a fault is given before the fault is."""
    try:
        return response.read1(size)
    except (http.client.HTTPException, OSError) as error:
        raise _Lost(_describe(error)) from None


def _read_head(response: http.client.HTTPResponse) -> bytes:
    """Enough of the body to tell a page from an archive, however few bytes come at a time."""
    head = b""
    while len(head) < 64 and (block := _read(response, 1024)):
        head += block
    return head


def _describe(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no byte came for {TIMEOUT_S:g} s"
    return f"the connection broke ({' '.join(str(error).split()) or type(error).__name__})"


def _same(origin: _Origin, now: _Origin) -> bool:
    """Whether what is sent goes on what is there, as far as the server says."""
    pairs = (origin.total, now.total), (origin.etag, now.etag), (origin.modified, now.modified)
    return all(a is None or b is None or a == b for a, b in pairs)


def _strong(etag: str | None) -> str | None:
    return None if etag is None or etag.startswith("W/") else etag


def _origin_path(final: Path) -> Path:
    return final.with_name(f"{final.name}.part.json")


def _read_origin(final: Path) -> _Origin | None:
    """None if there is none or it is damaged: the download starts anew."""
    try:
        return _Origin(**json.loads(_origin_path(final).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash(path: Path, reporter: Reporter) -> str:
    digest = hashlib.sha256()
    reporter.start("verify", path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            reporter.step(len(block))
    return digest.hexdigest()


def free_bytes(directory: Path) -> int:
    """Bytes that are free where `directory` is."""
    return shutil.disk_usage(directory).free


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        hint = "Free some space; the next download goes on." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}.", hint=hint) from error
