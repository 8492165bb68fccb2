"""The cache of parsed files: never other matrices than the source's, whatever happens to it (R2, R6, R15)."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmc_midx.data import cache, dataset
from xmc_midx.data.dataset import load_dataset, load_split
from xmc_midx.data.formats import read_xmc
from xmc_midx.data.sources import Source, read_source
from xmc_midx.errors import DataError

ROOT = Path(__file__).parents[1]
ROWS = b"0,2 0:1 3:0.5\n 1:-2\n3 4:1.5e-2\n\n"
TEXT = b"400 5 4\n" + ROWS * 100


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the entries; in a fresh cache, for files of every size and age."""
    monkeypatch.delenv("XMC_MIDX_NO_CACHE")
    monkeypatch.setenv("XMC_MIDX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**18))
    return tmp_path / "cache" / "parsed"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_bytes(TEXT)
    return path


def names(directory: Path) -> list[str]:
    """Sorted suffixes of what is in a directory."""
    return sorted(path.suffix for path in directory.iterdir())


class Reads:
    """Counts the times that a source is parsed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        monkeypatch.setattr(dataset, "read_source", self)

    def __call__(self, source: Source) -> cache.Matrices:
        self.number += 1
        return read_source(source)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def assert_same(split: dataset.Split, path: Path) -> None:
    features, labels = read_xmc(path)
    for found, expected in ((split.features, features), (split.labels, labels)):
        assert found.shape == expected.shape
        assert found.has_canonical_format
        for name in ("indptr", "indices", "data"):
            left, right = getattr(found, name), getattr(expected, name)
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes()


# --- What it keeps


def test_a_file_is_parsed_once_and_then_mapped(parsed: Path, source: Path, reads: Reads) -> None:
    for _ in range(3):
        split = load_split(source)
        assert_same(split, source)
        assert split.path == str(source)
    assert reads.number == 1
    assert names(parsed) == [".csr", ".seen"]


def test_an_empty_split_and_empty_rows_are_kept(parsed: Path, source: Path, reads: Reads) -> None:
    for text in (b"0 5 4\n", b"3 5 4\n\n\n\n", b"1 2147483647 2147483647\n2147483646 2147483646:1\n"):
        source.write_bytes(text)
        for _ in range(2):
            assert_same(load_split(source), source)
    assert reads.number == 3


def test_mapped_matrices_may_be_changed_and_the_cache_does_not_see_it(parsed: Path, source: Path, reads: Reads) -> None:
    load_split(source)
    split = load_split(source)
    split.features.data *= 2
    split.features.indices[:] = 0
    split.labels.indptr[:] = 0
    assert_same(load_split(source), source)
    assert reads.number == 1


def test_the_key_is_the_content_and_the_suffix(parsed: Path, source: Path, reads: Reads, tmp_path: Path) -> None:
    load_split(source)
    other = tmp_path / "elsewhere" / "test.txt"
    other.parent.mkdir()
    shutil.copy(source, other)
    load_split(other)
    assert reads.number == 1
    other.write_bytes(TEXT.replace(b"1.5", b"2.5"))
    assert_same(load_split(other), other)
    assert reads.number == 2
    # Renamed, a gzip stream is no text, and the reader says so.
    packed = tmp_path / "train.txt.gz"
    packed.write_bytes(gzip.compress(TEXT))
    load_split(packed)
    renamed = packed.rename(tmp_path / "renamed.txt")
    with pytest.raises(DataError, match=r"is a \.gz stream, expected text"):
        load_split(renamed)


def test_a_change_that_leaves_size_and_time_is_seen(parsed: Path, source: Path, reads: Reads) -> None:
    before = source.stat()
    load_split(source)
    time.sleep(0.02)  # the clock of the file system
    source.write_bytes(TEXT.replace(b"0.5", b"0.7"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    assert_same(load_split(source), source)
    assert reads.number == 2


def test_a_known_file_is_not_hashed_again(
    parsed: Path, source: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(cache, "sha256_of", lambda path: hashed.append(path) or "0" * 64)
    for _ in range(3):
        load_split(source)
    assert len(hashed) == 1
    os.utime(source)
    load_split(source)
    assert len(hashed) == 2
    # What changed just now may change again within the same tick of the clock.
    monkeypatch.setattr(cache, "_SETTLED_NS", 2 * 10**9)
    for path in parsed.glob("*.seen"):
        path.unlink()
    for _ in range(2):
        load_split(source)
    assert len(hashed) == 4
    assert reads.number == 1


def test_another_reader_has_entries_of_its_own(parsed: Path, source: Path) -> None:
    one, two = csr_matrix(np.eye(2, dtype=np.float32)), csr_matrix(np.ones((2, 3), dtype=np.float32))
    for _ in range(2):
        for reader, features in (("a", one), ("b", two)):
            found, labels = cache.read_cached(lambda given=features: (given, one), reader=reader, sources=[source])
            assert (found != features).nnz == (labels != one).nnz == 0
    assert names(parsed) == [".csr", ".csr", ".seen", ".seen"]


def test_several_sources_are_one_entry(parsed: Path, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "labels.txt"
    other.write_bytes(b"a")
    matrix = csr_matrix(np.eye(2, dtype=np.float32))
    read = [0]

    def reader() -> cache.Matrices:
        read[0] += 1
        return matrix, matrix

    for _ in range(2):
        cache.read_cached(reader, reader="pair", sources=[source, other])
    assert read == [1]
    other.write_bytes(b"b")
    cache.read_cached(reader, reader="pair", sources=[source, other])
    assert read == [2]


def test_real_data_comes_back_bit_for_bit(parsed: Path, reads: Reads, shared_data: Path) -> None:
    path = shared_data / "gnd-tib" / "test.txt.gz"
    for _ in range(2):
        split = load_split(path)
    assert reads.number == 1
    assert_same(split, path)


# --- When there is no cache


@pytest.mark.parametrize("way", ["off", "small", "no directory", "no home", "no lock", "no room", "too large"])
def test_without_a_cache_the_file_is_read(
    parsed: Path, source: Path, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    if way == "off":
        monkeypatch.setenv("XMC_MIDX_NO_CACHE", "1")
    elif way == "small":
        monkeypatch.setattr(cache, "SMALL_BYTES", len(TEXT) + 1)
    elif way == "no directory":
        monkeypatch.setenv("XMC_MIDX_CACHE", str(source / "cache"))
    elif way == "no home":
        monkeypatch.delenv("XMC_MIDX_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif way == "no lock":
        monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    elif way == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    else:
        monkeypatch.setattr(cache, "MAX_BYTES", 100)
    for _ in range(2):
        assert_same(load_split(source), source)
    assert reads.number == 2
    assert not parsed.exists() or ".csr" not in names(parsed)


def test_a_cache_that_cannot_be_written_still_serves_what_it_has(
    parsed: Path, source: Path, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_split(source)
    monkeypatch.setattr(Path, "open", _read_only(Path.open))
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    assert_same(load_split(source), source)
    assert reads.number == 1


def _read_only(original: object) -> object:
    def opened(self: Path, mode: str = "r", *rest: object, **options: object) -> object:
        if set(mode) & set("wxa+"):
            raise OSError(errno.EROFS, "read-only file system")
        return original(self, mode, *rest, **options)  # type: ignore[operator]

    return opened


def test_a_pipe_is_read_once_and_not_kept(parsed: Path, reads: Reads, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(TEXT,))
    writer.start()
    assert load_split(pipe).num_instances == 400
    writer.join()
    assert reads.number == 1
    assert not parsed.exists()


def test_a_faulty_source_is_an_error_each_time_and_leaves_nothing(parsed: Path, source: Path) -> None:
    source.write_bytes(TEXT.replace(b"0.5", b"nan", 1))
    for _ in range(2):
        with pytest.raises(DataError, match=r"train\.txt:2: the value 'nan'"):
            load_split(source)
    assert names(parsed) == [".seen"]
    with pytest.raises(DataError, match="No such file"):
        load_split(source.with_name("no.txt"))


def test_a_disk_that_fills_up_costs_the_entry_alone(
    parsed: Path, source: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_same(load_split(source), source)
    assert list(parsed.iterdir()) == []
    load_split(source)
    load_split(source)
    assert reads.number == 2


def test_a_source_that_changes_while_it_is_read_is_not_kept(
    parsed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_late(files: Source) -> cache.Matrices:
        time.sleep(0.02)
        source.write_bytes(TEXT.replace(b"0.5", b"0.7"))
        return read_source(files)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_source", read_late)
        load_split(source)
    assert ".csr" not in names(parsed)
    source.write_bytes(TEXT)
    assert_same(load_split(source), source)


# --- Damage


def entry_of(parsed: Path) -> Path:
    (entry,) = parsed.glob("*.csr")
    return entry


def test_a_damaged_entry_is_refused_and_written_anew(parsed: Path, source: Path, reads: Reads) -> None:
    source.write_bytes(b"4 5 4\n" + ROWS)
    load_split(source)
    entry = entry_of(parsed)
    whole = entry.read_bytes()
    rng = random.Random(0)
    flips = [(place, 1 << rng.randrange(8)) for place in range(0, len(whole), 7)]
    damaged = [whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :] for place, bit in flips]
    damaged += [whole[:size] for size in (0, 1, 31, 32, 33, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"\0", bytes(len(whole)), whole[64:], b"not an entry at all"]
    for number, content in enumerate(damaged):
        entry.write_bytes(content)
        assert_same(load_split(source), source)
        assert reads.number == number + 2
        assert entry.read_bytes() == whole
    assert number > 100


def test_the_entry_of_another_source_is_refused(parsed: Path, source: Path, reads: Reads) -> None:
    load_split(source)
    first = entry_of(parsed)
    kept = first.rename(first.with_suffix(".kept"))
    other = source.with_name("other.txt")
    other.write_bytes(TEXT.replace(b"0.5", b"0.7"))
    load_split(other)
    shutil.copy(kept, entry_of(parsed))
    assert_same(load_split(other), other)
    assert reads.number == 3


@pytest.mark.parametrize("arrays", ["row beyond", "id beyond", "negative id", "object", "short"])
def test_an_entry_that_lies_under_a_right_hash_is_refused(
    parsed: Path, source: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, arrays: str
) -> None:
    """Such as another program might write: nothing in it reaches beyond its arrays, or runs."""

    def lie(features: csr_matrix) -> csr_matrix:
        features = features.copy()
        if arrays == "row beyond":
            features.indptr[-1] += 10**6
        elif arrays == "id beyond":
            features.indices[3] = 10**6
        elif arrays == "negative id":
            features.indices[3] = -1
        elif arrays == "short":
            features.data = features.data[:-5]
        else:
            features.data = features.data.astype(object)
        return features

    write = cache._write
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", lambda file, found, key: write(file, (lie(found[0]), found[1]), key))
        load_split(source)
    assert ".csr" in names(parsed)
    assert_same(load_split(source), source)
    assert reads.number == 2


def test_damaged_notes_of_known_files_are_passed_over(parsed: Path, source: Path, reads: Reads) -> None:
    load_split(source)
    (seen,) = parsed.glob("*.seen")
    whole = json.loads(seen.read_text())
    for content in (b"", b"\xff", b"[]", b"{}", b"null", b'{"facts": 1}', json.dumps({**whole, "key": "0"}).encode()):
        seen.write_bytes(content)
        assert_same(load_split(source), source)
    assert reads.number <= 2  # once more for the key that has no entry


# --- Two at once, and killed ones

CHILD = """
import os, sys, time
from pathlib import Path
from xmc_midx.data import cache, dataset
from xmc_midx.data.sources import read_source
cache.SMALL_BYTES = 0
source, go, point = map(Path, sys.argv[1:4])
def read(files):
    print("read")
    time.sleep(0.5)
    return read_source(files)
dataset.read_source = read
def die(*_):
    os._exit(9)
class Half:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        self.file.write(data[:40])
        self.file.flush()
        os._exit(9)
write = cache._write
if point.name == "half":
    cache._write = lambda file, *rest: write(Half(file), *rest)
elif point.name == "written":
    os.fsync = die
elif point.name == "synced":
    Path.replace = die
elif point.name == "kept":
    cache._prune = die
print("ready", flush=True)
while not go.exists():
    time.sleep(0.002)
split = dataset.load_split(source)
print(split.features.nnz, split.labels.nnz, float(split.features.sum()))
"""


def start(source: Path, go: Path, point: str = "-") -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(go), point], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def test_of_several_processes_one_reads_and_the_others_open_what_it_wrote(parsed: Path, source: Path) -> None:
    """R15."""
    go = source.with_name("go")
    children = [start(source, go) for _ in range(3)]
    go.touch()
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sorted(len(output) for output in outputs) == [1, 1, 2]
    assert len({output[-1] for output in outputs}) == 1
    assert set(names(parsed)) <= {".csr", ".seen"}
    assert len(list(parsed.glob("*.csr"))) == 1


@pytest.mark.parametrize("point", ["half", "written", "synced", "kept"])
def test_a_killed_process_leaves_nothing_under_the_name_of_an_entry(
    parsed: Path, source: Path, reads: Reads, point: str
) -> None:
    """R2: exit at each point of a cache build."""
    go = source.with_name("go")
    go.touch()
    child = start(source, go, point)
    child.communicate(timeout=60)
    assert child.returncode == 9
    entries = list(parsed.glob("*.csr"))
    assert len(entries) == (point == "kept")
    assert_same(load_split(source), source)
    assert reads.number == 1 - len(entries)
    assert_same(load_split(source), source)
    assert reads.number == 1 - len(entries)
    # A half note of a source's time (`.seen`) goes when it is old.
    assert list(parsed.glob(".*.csr.*.tmp")) == []


def test_a_lock_that_is_held_for_long_is_not_waited_for(
    parsed: Path, source: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_split(source)
    entry = entry_of(parsed)
    entry.unlink()
    monkeypatch.setattr(cache, "_WAIT_SECONDS", 0.1)
    with filelock.FileLock(entry.with_suffix(".lock")):
        assert_same(load_split(source), source)
    assert reads.number == 2
    assert not entry.exists()


# --- Size


def test_the_entries_that_were_not_used_for_longest_go(
    parsed: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    for number in range(4):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(TEXT.replace(b"0.5", b"0.%d" % (number + 1)))
        sources.append(path)
    load_split(sources[0])
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * entry_of(parsed).stat().st_size)
    for path in sources[1:3]:
        time.sleep(0.02)
        load_split(path)
    time.sleep(0.02)
    load_split(sources[0])
    stray = parsed / ".x.csr.0.tmp"
    stray.touch()
    os.utime(stray, (0, 0))
    fresh = parsed / ".y.csr.0.tmp"
    fresh.touch()
    time.sleep(0.02)
    assert reads.number == 3
    load_split(sources[3])
    assert len(list(parsed.glob("*.csr"))) == len(list(parsed.glob("*.seen"))) == 3
    assert not stray.exists() and fresh.exists()
    assert reads.number == 4
    for path in (sources[0], sources[2], sources[3]):
        load_split(path)
    assert reads.number == 4
    assert_same(load_split(sources[1]), sources[1])
    assert reads.number == 5


def test_a_dataset_is_read_through_the_cache(parsed: Path, source: Path, reads: Reads) -> None:
    (source.parent / "test.txt").write_bytes(TEXT.replace(b"0.5", b"0.7"))
    fingerprints = {load_dataset(source.parent).fingerprint() for _ in range(2)}
    assert len(fingerprints) == 1
    assert reads.number == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are counted by /proc")
def test_pages_that_are_given_back_come_again_with_what_was_changed(parsed: Path, source: Path) -> None:
    def resident() -> int:
        """Pages of the entry that this process holds, of 4 KiB."""
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
        at = next(number for number, line in enumerate(lines) if line.endswith(".csr"))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:")) // 4

    source.write_bytes(b"80000 5 4\n" + ROWS * 20_000)
    load_split(source)
    mapped = load_split(source)
    mapped.features.data[7] = -3.0
    before = resident()
    cache.page_out((mapped.features, mapped.labels))
    assert before > 300 and resident() < before / 10
    expected = read_xmc(source)[0]
    assert mapped.features.data[7] == -3.0
    mapped.features.data[7] = expected.data[7]
    assert np.array_equal(mapped.features.data, expected.data)
    assert np.array_equal(mapped.features.indices, expected.indices)
    cache.page_out((expected, expected))
    assert expected.data[7] != -3.0
