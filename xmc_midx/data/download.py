"""Layer 2. A name of the registry -> a verified directory: mirrors, hashes, unpacking, sizes.

Before it: `registry` says where an archive is, `fetch` gets it, `archive` unpacks it. After it: `dataset` finds the
directory by the name. Under its final name a directory is complete, or it is not there.

In the cache: `NAME/` the files, under the names that `dataset` looks for; `hashes.json` the sha256 of each archive at
its first download, enforced ever after; `downloads/` archives on their way.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shlex
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from xmc_midx.data.archive import extract
from xmc_midx.data.drive import drive_url, drive_view_url
from xmc_midx.data.fetch import discard, fetch
from xmc_midx.data.files import SUFFIXES, atomic_write, sha256_of
from xmc_midx.data.folds import divide_folds, find_folds
from xmc_midx.data.manifest import read_manifest, verify_directory, write_manifest
from xmc_midx.data.registry import ArchiveFormat, DatasetSpec, Mirror, cache_directory, find_spec
from xmc_midx.errors import DataError, DownloadError, ResourceError, UsageError, XmcMidxError
from xmc_midx.types import Reporter, SilentReporter

__all__ = ["Download", "download", "download_if_missing"]

OFFLINE = "XMC_MIDX_OFFLINE"
"""With this variable set (not empty, not 0) nothing is fetched."""

# What a file of an archive may be called, and what `dataset` calls it. A gzip suffix stays.
_ROLES = {
    "train.txt": r"(?!filter_labels_)(.*[_-])?train\.txt",
    "test.txt": r"(?!filter_labels_)(.*[_-])?test\.txt",
    "filter_labels_train.txt": r"filter_labels_(train|trn)\.txt",
    "filter_labels_test.txt": r"filter_labels_(test|tst)\.txt",
    "trn_X_Xf.txt": r"(trn|train)_X_Xf\.txt",
    "trn_X_Y.txt": r"(trn|train)_X_Y\.txt",
    "tst_X_Xf.txt": r"(tst|test)_X_Xf\.txt",
    "tst_X_Y.txt": r"(tst|test)_X_Y\.txt",
    "trn.json": r"trn(\.raw)?\.json",
    "tst.json": r"tst(\.raw)?\.json",
}

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Where a data set is, and where it came from."""

    name: str
    directory: str
    source: str
    """The address, or the file of `from_file`; `"package"` for an embedded set, `"disk"` for one put there by hand."""
    sha256: str | None
    """Of the archive; None where there was none."""
    files: tuple[str, ...]
    was_there: bool
    """Whether it was on disk already, and was only verified."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `download`."""
        return {**asdict(self), "files": list(self.files), "seconds": round(self.seconds, 3)}


def download(
    name: str | DatasetSpec,
    *,
    directory: str | Path | None = None,
    from_file: str | Path | None = None,
    kind: ArchiveFormat = "bow",
    offline: bool = False,
    reporter: Reporter | None = None,
) -> Download:
    """Fetch, verify and unpack a data set; what is on disk already is verified, byte by byte.

    Parameters
    ----------
    name : an entry of the registry, upper or lower case.
    directory : holds the files afterwards; None means the cache, where a name is found. It must not exist, or be empty.
    from_file : an archive that was fetched by hand.
    kind : `bow` features, `bow-v1` their first release, `raw` text. Only `bow` is found by its name.
    offline : fetch nothing; use what is on disk.

    Raises
    ------
    UsageError : no such entry, or it has no archive of that kind.
    DownloadError : no source gives the archive, or it is not the expected one. The hint says what to do by hand.
    DataError : what is on disk is not what was downloaded.
    ResourceError : the disk is full or cannot be written.
    """
    began = time.monotonic()
    reporter = reporter or SilentReporter()
    spec = name if isinstance(name, DatasetSpec) else find_spec(name)
    if spec.embedded:
        if directory is not None or from_file is not None:
            raise UsageError(
                f"{spec.name}: comes with the package, so there is nothing to download.",
                hint=f"`xmc-midx convert {spec.name} DIRECTORY` writes its files.",
            )
        return _there(spec, spec.directory, "package", began)
    if not spec.sources(kind) and from_file is None:
        raise UsageError(
            f"{spec.name}: the registry knows no {kind} archive.", hint=f"See `xmc-midx datasets {spec.name}`."
        )
    if from_file is not None and not Path(from_file).is_file():
        raise UsageError(f"{from_file}: is no file, expected an archive.")
    target = _place_of(spec, kind) if directory is None else Path(directory).absolute()
    job = _Job(spec=spec, kind=kind, target=target, cache=cache_directory().absolute(), reporter=reporter)
    with _os_errors(), job.alone():
        job.clean()
        if target.is_dir() and any(target.iterdir()):
            return job.verify(began, None if from_file is None else Path(from_file))
        if from_file is not None:
            return job.install_file(Path(from_file), began)
        return job.install(offline=offline or os.environ.get(OFFLINE, "") not in ("", "0"), began=began)


def download_if_missing(data: str | Path, *, reporter: Reporter | None = None) -> None:
    """Download DATA if it is a name of the registry and not on disk; a path is left alone."""
    if Path(data).exists():
        return
    try:
        spec = find_spec(str(data))
    except UsageError:
        return  # whoever reads DATA says so better
    if not spec.directory.is_dir():
        download(spec, reporter=reporter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One download of one data set."""

    spec: DatasetSpec
    kind: ArchiveFormat
    target: Path
    cache: Path
    reporter: Reporter

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Two downloads of one set: the second waits, and finds what the first has fetched."""
        self.downloads.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.downloads / f"{self.spec.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.reporter.message(f"{self.spec.name}: another process is downloading it; waiting")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def clean(self) -> None:
        """Remove what a killed download left unpacked; nobody else is here."""
        if self.target.parent.is_dir():
            for stray in self.target.parent.glob(f".{self.target.name}.*.unpacking"):
                shutil.rmtree(stray)

    def verify(self, began: float, archive: Path | None) -> Download:
        """What is on disk already; of this archive, where one was given."""
        try:
            manifest = read_manifest(self.target)
            verify_directory(self.target, all_bytes=True)
        except DataError as error:
            again = f"Remove {self.target}, then `xmc-midx download {self.spec.name}` fetches it again."
            raise DataError(error.message, hint=again) from None
        if archive is not None and (manifest is None or manifest["archive_sha256"] != sha256_of(archive)):
            fact = f"{self.target}: is not empty, and did not come of {archive}."
            raise UsageError(fact, hint="Remove it, or choose another --dir.")
        if manifest is None:
            return _there(self.spec, self.target, "disk", began)
        if (manifest["name"], manifest["kind"]) != (self.spec.name, self.kind):
            raise UsageError(
                f"{self.target}: holds {manifest['name']} ({manifest['kind']}), expected an empty directory.",
                hint="Choose another --dir.",
            )
        return _there(self.spec, self.target, manifest["source"], began, manifest["archive_sha256"])

    def install(self, *, offline: bool, began: float) -> Download:
        """From the first source that has it."""
        failures: list[str] = []
        for source in self.spec.sources(self.kind):
            url = drive_url(source.drive) if source.drive else str(source.url)
            archive = self._archive(source)
            known = source.sha256 or self._recorded(source.key)
            try:
                if known is not None and archive.exists() and sha256_of(archive) != known:
                    discard(archive)
                if not archive.exists():
                    if offline:
                        raise DownloadError("not on disk, and fetching is switched off (offline)")
                    self.reporter.message(f"{self.spec.name}: fetching {url}")
                    found = fetch(url, archive, key=source.key, sha256=known, reporter=self.reporter)
                    if known is None and not _is_zip(archive):
                        discard(archive)
                        raise DownloadError("what came is no zip archive")
                    known = known or found
                # A part that was complete when an earlier call was killed has no hash yet.
                known = known or sha256_of(archive)
                hashes = self._unpack(archive, source, known, url, key=source.key)
            except (DownloadError, DataError) as error:
                if archive.exists():  # a damaged one must not be the next call's
                    discard(archive)
                failures.append(f"{url}: {error.message.rstrip('.')}")
                continue
            for failure in failures:  # else the error says them
                self.reporter.message(failure)
            return self._done(hashes, url, known, began)
        recorded = any(source.sha256 is None and self._recorded(source.key) for source in self.spec.sources(self.kind))
        place = f" Recorded hashes are in {self._hashes}." if recorded and not offline else ""
        raise DownloadError(f"{self.spec.name}: no source gave it. {'; '.join(failures)}.{place}", hint=self._by_hand())

    def install_file(self, archive: Path, began: float) -> Download:
        """From an archive that a person has fetched; whichever source it came from."""
        found, key = sha256_of(archive), f"file:{self.spec.name}:{self.kind}"
        sources = self.spec.sources(self.kind)
        known = [sha for s in sources if (sha := s.sha256 or self._recorded(s.key))]
        # One source of several may be meant, so a hash is wrong only if that of every source is known.
        if own := self._recorded(key):
            known.append(own)
        if known and found not in known and (own or len(known) == len(sources)):
            raise DownloadError(
                f"{archive}: its sha256 is {found}, expected {' or '.join(known)}.",
                hint=f"Is it whole? If the publisher has changed it, remove its entry from {self._hashes}.",
            )
        source = next((s for s in sources if (s.sha256 or self._recorded(s.key)) == found), None)
        try:
            hashes = self._unpack(archive, source, found, str(archive), key=source.key if source else key)
        except DataError as error:
            raise DownloadError(f"{archive}: {error.message}", hint=self._by_hand()) from None
        except DownloadError as error:
            raise DownloadError(error.message, hint=error.hint or self._by_hand()) from None
        return self._done(hashes, str(archive), found, began)

    def _unpack(self, archive: Path, source: Mirror | None, sha256: str, origin: str, *, key: str) -> dict[str, str]:
        """Into a directory beside the target, which is checked and then renamed to it."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        staging = self.target.with_name(f".{self.target.name}.{uuid.uuid4().hex}.unpacking")
        staging.mkdir()
        try:
            hashes = _arrange(staging, extract(archive, staging, reporter=self.reporter), source)
            _check_sizes(staging, self.spec, features=self.kind == "bow")
            facts = {"name": self.spec.name, "kind": self.kind, "source": origin, "archive_sha256": sha256}
            write_manifest(staging, hashes, facts)
            # Once more from the disk: what was written is what was unpacked.
            self.reporter.start("verify", None)
            verify_directory(staging, all_bytes=True)
            self._record(key, sha256)
            if self.target.is_dir():
                self.target.rmdir()  # empty, or `verify` had it
            staging.rename(self.target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return hashes

    def _done(self, hashes: dict[str, str], source: str, sha256: str, began: float) -> Download:
        for other in self.spec.sources(self.kind):
            discard(self._archive(other))  # also what came of a source that was given up
        return Download(
            name=self.spec.name,
            directory=str(self.target),
            source=source,
            sha256=sha256,
            files=tuple(sorted(hashes)),
            was_there=False,
            seconds=time.monotonic() - began,
        )

    def _archive(self, source: Mirror) -> Path:
        """Where the archive of a source is until it is unpacked."""
        plain = re.sub("[^A-Za-z0-9]+", "-", source.key)[-60:]
        return self.downloads / f"{self.spec.name}-{plain}.zip"

    @property
    def _hashes(self) -> Path:
        return self.cache / "hashes.json"

    def _recorded(self, key: str) -> str | None:
        return self._read_hashes().get(key)

    def _read_hashes(self) -> dict[str, str]:
        if not self._hashes.exists():
            return {}
        try:
            table = json.loads(self._hashes.read_text(encoding="utf-8"))
            if isinstance(table, dict) and all(isinstance(value, str) for value in table.values()):
                return table
        except (ValueError, RecursionError):
            pass
        hint = "Remove it: the next downloads record their hashes anew."
        raise DataError(f"{self._hashes}: is damaged, expected the hashes of earlier downloads.", hint=hint)

    def _record(self, key: str, sha256: str) -> None:
        """Keep a hash; other data sets may be recorded at the same time."""
        with FileLock(self.downloads / "hashes.lock"):
            table = {**self._read_hashes(), key: sha256}
            with atomic_write(self._hashes) as file:
                file.write(json.dumps(table, indent=1, sort_keys=True).encode())

    def _by_hand(self) -> str:
        """What a person can do, in three lines."""
        sources = self.spec.sources(self.kind)
        places = [drive_view_url(s.drive) if s.drive else str(s.url) for s in sources] or [self.spec.homepage]
        is_own = self.target == _place_of(self.spec, self.kind)
        options = "" if self.kind == "bow" else f" --format {self.kind}"
        options += "" if is_own else f" --dir {shlex.quote(str(self.target))}"
        is_found = is_own and self.kind == "bow"
        next_step = f"xmc-midx check {self.spec.name}" if is_found else f"The files are then in {self.target}"
        return (
            f"By hand:\n1. Save the archive with a browser from {' or '.join(places)}"
            f"\n2. xmc-midx download {self.spec.name}{options} --from-file ARCHIVE.zip\n3. {next_step}"
        )


def _place_of(spec: DatasetSpec, kind: ArchiveFormat) -> Path:
    """Where a data set is found by its name, and its other kinds beside it."""
    own = spec.directory if kind == "bow" else spec.directory.with_name(f"{spec.name}.{kind}")
    return own.absolute()


def _there(spec: DatasetSpec, directory: Path, source: str, began: float, sha256: str | None = None) -> Download:
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return Download(
        name=spec.name,
        directory=str(directory),
        source=source,
        sha256=sha256,
        files=tuple(sorted(path.relative_to(directory).as_posix() for path in files)),
        was_there=True,
        seconds=time.monotonic() - began,
    )


def _arrange(directory: Path, hashes: dict[str, str], source: Mirror | None) -> dict[str, str]:
    """Give the files of the splits the names that `dataset` looks for, at the top of the directory.

    Raises
    ------
    DownloadError : a file that the registry expects is missing, or there is no training split, or two.
    """
    found = dict(hashes)
    folds = find_folds(hashes)
    if folds is not None and not (source and source.train):
        data, rows_of = folds
        divide_folds(directory / data, {directory / name: directory / rows for name, rows in rows_of.items()})
        for name in (data, *rows_of.values()):
            (directory / name).unlink()
            del found[name]
        return found | {name: sha256_of(directory / name) for name in rows_of}
    stated = (*source.train, *source.test) if source else ()
    for name in stated:
        if name not in {path.rpartition("/")[2] for path in hashes}:
            shown = ", ".join(sorted(hashes)[:6])
            raise DownloadError(f"the archive holds {shown}, expected {', '.join(stated)}.")
    for path in hashes:
        name = path.rpartition("/")[2]
        if stated and name not in stated and not name.startswith("filter_labels_"):
            continue
        suffix = next((s for s in SUFFIXES if s and name.endswith(s)), "")
        for role, pattern in _ROLES.items():
            if not re.fullmatch(pattern, name.removesuffix(suffix), re.IGNORECASE):
                continue
            final = role + suffix
            if final != path:
                if (directory / final).exists():
                    raise DownloadError(f"the archive holds {path} and {final}, expected one of them.")
                (directory / path).rename(directory / final)
                found[final] = found.pop(path)
    if not any(re.fullmatch(r"(train\.txt|trn_X_Xf\.txt|trn\.json)(\.\w+)?", name) for name in found):
        shown = ", ".join(sorted(hashes)[:6])
        raise DownloadError(f"the archive holds {shown}, expected a training split such as train.txt.")
    return found


def _check_sizes(directory: Path, spec: DatasetSpec, *, features: bool) -> None:
    """Compare the header lines with the registry; raw text has none.

    Parameters
    ----------
    features : whether the number of features is that of the registry; another release may have others.
    """
    for split, rows in (("train", spec.num_train), ("test", spec.num_test)):
        short = {"train": "trn", "test": "tst"}[split]
        num_features = spec.num_features if features else None
        for name, expected in (
            (f"{split}.txt", (rows, num_features, spec.num_labels)),
            (f"{short}_X_Xf.txt", (rows, num_features)),
            (f"{short}_X_Y.txt", (rows, spec.num_labels)),
        ):
            path = next((p for s in SUFFIXES if (p := directory / f"{name}{s}").is_file()), None)
            if path is None:
                continue
            line = _first_line(path)
            parts = line.split()
            numbers = [int(part) for part in parts] if all(re.fullmatch(r"\d{1,18}", part) for part in parts) else []
            if len(numbers) != len(expected):
                raise DownloadError(f"{path.name}:1: is {line[:60]!r}, expected a header of {len(expected)} numbers.")
            if any(want is not None and want != got for want, got in zip(expected, numbers, strict=True)):
                wanted = " ".join("any" if want is None else str(want) for want in expected)
                raise DownloadError(f"{path.name}:1: the header says {line!r}, the registry {wanted!r}.")


def _first_line(path: Path) -> str:
    """Of a plain or compressed text, without what surrounds it; at most 200 bytes are read."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            return bytes(file.readline(200)).decode("utf-8", "replace").strip()
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DownloadError(f"{path.name}: cannot be read ({error}).") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except XmcMidxError:
        raise
    except OSError as error:
        place = error.filename or "the cache"
        raise ResourceError(f"{place}: {error.strerror or error}.", hint="Set XMC_MIDX_CACHE to choose it.") from error
