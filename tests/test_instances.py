"""Instances as a stream: against the whole-file reader, however the lines arrive, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix, vstack

from xmc_midx.data import files, instances
from xmc_midx.data.files import LineChunks
from xmc_midx.data.formats import read_xmc, write_xmc
from xmc_midx.data.instances import InstanceBatch, InstanceReader, looks_like_text
from xmc_midx.data.problems import raise_error
from xmc_midx.errors import DataError

F, L = 50, 9


def stream_reader(content: bytes, *, text: bool | None = None, num_features: int = F) -> InstanceReader:
    lines = LineChunks(Path("standard input"), raise_error, stream=io.BufferedReader(io.BytesIO(content)))
    return InstanceReader(lines, num_features=num_features, text=text)


def joined(batches: list[InstanceBatch]) -> csr_matrix:
    return csr_matrix(vstack([batch.rows for batch in batches], format="csr"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, csr_matrix]:
    """A file of 2,600 rows, some without labels or features."""
    rng = np.random.default_rng(5)
    features = csr_matrix(rng.normal(size=(2600, F)) * (rng.random((2600, F)) < 0.3)).astype(np.float32)
    labels = csr_matrix((rng.random((2600, L)) < 0.2).astype(np.float32))
    path = tmp_path_factory.mktemp("instances") / "rows.txt"
    write_xmc(path, features, labels)
    return path, read_xmc(path)[0]


def same(found: csr_matrix, expected: csr_matrix) -> bool:
    return found.shape == expected.shape and (found != expected).nnz == 0 and found.nnz == expected.nnz


@pytest.mark.parametrize("short", [0, 2**30], ids=["compiled", "line by line"])
@pytest.mark.parametrize("chunk", [100, 2**20])
def test_the_stream_gives_the_rows_of_the_whole_file_reader(
    sample: tuple[Path, csr_matrix], monkeypatch: pytest.MonkeyPatch, chunk: int, short: int
) -> None:
    path, expected = sample
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(instances, "SHORT_BYTES", short)
    reader = InstanceReader(LineChunks(path, raise_error), num_features=F, text=None)
    batches = list(reader.batches())
    # The borders are the lines' alone, whatever comes at once.
    assert [(batch.first, batch.num_instances) for batch in batches] == [(0, 1024), (1024, 1024), (2048, 552)]
    assert same(joined(batches), expected)
    assert (reader.num_instances, reader.num_given, reader.is_text) == (2600, 2600, False)


def test_rows_come_with_or_without_header_and_labels(sample: tuple[Path, csr_matrix]) -> None:
    path, expected = sample
    head, _, body = path.read_bytes().partition(b"\n")
    assert head == b"2600 50 9"
    bare = b"".join(line.partition(b" ")[2] + b"\n" for line in body.splitlines())
    forms = {
        "no header": body,
        "features alone": b"2600 50\n" + bare,
        "neither": bare,
        "crlf": body.replace(b"\n", b"\r\n"),
    }
    for name, content in forms.items():
        assert same(joined(list(stream_reader(content).batches())), expected), name
    assert same(joined(list(stream_reader(b"\xef\xbb\xbf" + body.rstrip(b"\n")).batches())), expected)
    # Labels are read past, also those that the model does not have.
    assert same(joined(list(stream_reader(b"70000,3 1:2\n").batches())), csr_matrix(([2.0], ([0], [1])), shape=(1, F)))


def test_long_rows_make_small_batches_whatever_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "_BATCH_BYTES", 1000)
    rng = np.random.default_rng(0)
    lines = [b"1:1" + b" " * int(width) + b"\n" for width in rng.integers(1, 900, 400)]
    borders = []
    for chunk in (64, 999, 5000, 2**20):
        monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
        borders.append([(batch.first, batch.num_instances) for batch in stream_reader(b"".join(lines)).batches()])
    assert borders[0] == borders[1] == borders[2] == borders[3] and len(borders[0]) > 50
    for first, count in borders[0][:-1]:
        sizes = [len(line) for line in lines[first : first + count]]
        assert sum(sizes) >= 1000 > sum(sizes[:-1])


def test_texts_keep_their_places() -> None:
    content = "first\r\n\nthïrd 1:2\n\n".encode()
    batches = list(stream_reader(content, text=True).batches())
    assert [batch.rows for batch in batches] == [["first", "", "thïrd 1:2", ""]]
    reader = stream_reader(b"\n\ntwo words\n5:1\n")
    assert [batch.rows for batch in reader.batches()] == [["", "", "two words", "5:1"]] and reader.is_text
    with pytest.raises(DataError, match=r"standard input:2: is not UTF-8, expected text"):
        list(stream_reader(b"good\n\xff\n").batches())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.tsv", "web,python\tA small web server"),
        ("a.CSV.gz", 'text,labels\n"a, b",c'),
        ("a.jsonl", '{"text": "A small web server", "labels": ["web"]}'),
        ("a.ndjson", '{"text": "A small web server", "labels": ["web"]}'),
        ("a.tab.gz", "web\tA small web server"),
        ("a.txt", "web,python\tA small web server"),
    ],
)
def test_texts_with_their_labels_are_no_texts(name: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(f"{line}\n".encode()) if name.endswith(".gz") else f"{line}\n".encode())
    for text in (None, True):
        reader = InstanceReader(LineChunks(path, raise_error), num_features=9, text=text)
        if text:
            assert next(reader.batches()).rows[0] == line.partition("\n")[0]
        else:
            with pytest.raises(DataError, match="looks like texts with their labels"):
                next(reader.batches())
    bare = tmp_path / "titles.tsv"
    bare.write_text("A small web server\n")
    assert next(InstanceReader(LineChunks(bare, raise_error), num_features=9, text=None).batches()).rows == [
        "A small web server"
    ]


@pytest.mark.parametrize(
    ("line", "is_text"),
    [
        ("two words", True),
        ("In 2019, 3 of 4 won", True),
        ("a: b", True),
        ("Meeting at 10:30 in the lobby", True),
        ("Mix flour 2:1 with water", True),
        ("label 1:0.5 2:x 3:0.3", False),
        ("3 17:0.5", False),
        ("1 2 3", False),
        ("0,1 5:0.5 6:.1", False),
        (" 5:-1", False),
        ("4,5", False),
        ("0 3:nan 4:1", False),
        ("3:nan 4:-inf", False),
        ("3: 4:Infinity", False),
        ("3:nano 4:info", True),
        ("", False),
    ],
)
def test_text_is_told_from_rows(line: str, is_text: bool) -> None:
    assert looks_like_text(line.encode()) == is_text


def test_texts_of_three_columns_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A title\tan author\ta year\n")
    batches = InstanceReader(LineChunks(path, raise_error), num_features=9, text=None).batches()
    assert next(batches).rows == ["A title\tan author\ta year"]


def test_unwanted_batches_are_counted_and_take_part_in_the_digest(sample: tuple[Path, csr_matrix]) -> None:
    path, expected = sample
    reader = InstanceReader(LineChunks(path, raise_error), num_features=F, text=None)
    found, digests = [], []
    for batch in reader.batches(lambda number, first: number == 1 and first == 1024):
        found.append(batch)
        digests.append(reader.digest())
    assert [batch.rows is None for batch in found] == [True, False, True]
    assert same(csr_matrix(found[1].rows), expected[1024:2048])
    changed = path.read_bytes().replace(b"0:", b"1:", 1)
    other = stream_reader(changed.partition(b"\n")[2])
    assert [other.digest() for _ in other.batches(lambda *_: False)] != digests


# ------------------------------------------------------------------------------ live


def test_a_line_is_given_before_the_next_one_comes() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream:
        lines = LineChunks(Path("standard input"), raise_error, stream=stream, live=True)
        batches = InstanceReader(lines, num_features=F, text=True, live=True).batches()
        for number, text in enumerate(["one", "two", "three"]):
            os.write(write, f"{text}\n".encode())
            batch = next(batches)
            assert (batch.first, batch.rows) == (number, [text])
        os.write(write, b"half")
        threading.Timer(0.05, lambda: (os.write(write, b" a line\nand one more\n"), os.close(write))).start()
        assert [batch.rows for batch in batches] == [["half a line", "and one more"]]


def test_lines_that_are_there_already_make_large_batches() -> None:
    read, write = os.pipe()
    os.write(write, b"".join(b"%d:1\n" % (number % F) for number in range(4000)))  # less than a pipe holds
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        lines = LineChunks(Path("standard input"), raise_error, stream=stream, live=True)
        sizes = [b.num_instances for b in InstanceReader(lines, num_features=F, text=None, live=True).batches()]
    assert sizes == [1024, 1024, 1024, 928]


# --------------------------------------------------------------------------- refused

FAULTS: dict[str, tuple[bytes, str]] = {
    "features of another model": (b"1 7 3\n0 1:1\n", ":1: the header says 7 features; the model was trained with 50"),
    "too few rows": (b"3 50 9\n0 1:1\n", ":2: the file ends after 1 instances, the header says 3"),
    "too many rows": (b"1 50 9\n0 1:1\n\n 2:1\n", ":4: a row too many, the header says 1"),
    "huge header": (b"9999999999999999999999 50 9\n", ":1: the header is .*, expected 0 to 2147483647 instances"),
    "feature out of range": (b"0 1:1\n0 50:1\n", ":2: feature id 50 is outside 0..49 .the model has 50 features"),
    "label out of range": (b"1 50 9\n9 1:1\n", ":2: label 9 is outside 0..8 .the header says 9 labels"),
    "label in a file of features": (b"1 50\n3 1:1\n", ":2: '3' is not `id:value`"),
    "not a number": (b"0 1:x\n", ":1: the value 'x' of feature id 1 is not a number"),
    "not finite": (b"0 1:1\n0 1:nan\n", ":2: the value 'nan' of feature id 1 is not finite"),
    "twice": (b"0 1:1 1:2\n", ":1: feature id 1 occurs twice"),
    "compressed": (gzip.compress(b"0 1:1\n"), "is a compressed stream, expected text"),
}


@pytest.mark.parametrize(("content", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.fault("R8")
def test_a_fault_is_named_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="standard input" + message if message[0] == ":" else message):
        list(stream_reader(content, text=False).batches())


def test_text_for_a_model_that_reads_none_is_refused_with_a_hint() -> None:
    with pytest.raises(DataError, match=r"standard input:1: 'two' is not .*The model has no vocabulary"):
        list(stream_reader(b"two words\n", text=False).batches())
    with pytest.raises(DataError) as caught:
        list(stream_reader(b"0 1:1e\n", text=False).batches())
    assert "vocabulary" not in str(caught.value)


def test_the_rows_before_a_fault_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "BATCH_ROWS", 2)
    batches = stream_reader(b"1:1\n" * 4 + b"1:\n").batches()
    assert [next(batches).first, next(batches).first] == [0, 2]
    with pytest.raises(DataError, match=":5: "):
        next(batches)


@pytest.mark.fault("R9")
def test_a_line_of_200_mb_takes_bounded_memory_and_is_refused() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            buffer[:] = b"1" * len(buffer)
            return len(buffer) if self.given < 200 * 2**20 else 0

    source = Endless()
    lines = LineChunks(Path("standard input"), raise_error, stream=io.BufferedReader(source))
    with pytest.raises(DataError, match="longer than"):
        list(InstanceReader(lines, num_features=F, text=True).batches())
    assert source.given < 80 * 2**20
