"""The reader of XMC text: what it takes, what it refuses and in which words, and that its two ways are one (R8, R9)."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array
from sklearn.datasets import load_svmlight_file

from xmc_midx.data import files, formats, table
from xmc_midx.data.formats import (
    read_labels,
    read_predictions,
    read_xmc,
    scan_xmc,
    write_predictions,
    write_xmc,
)
from xmc_midx.data.parser import Rows, Rules, parse_chunk, parse_lines
from xmc_midx.data.problems import ProblemList
from xmc_midx.data.svmlight import read_svmlight
from xmc_midx.errors import DataError, ResourceError, XmcMidxError
from xmc_midx.types import TopK

GOOD = b"3 5 4\n0,2 0:1 3:0.5\n 1:-2\n3 4:1.5e-2\n"
FEATURES = np.array([[1, 0, 0, 0.5, 0], [0, -2, 0, 0, 0], [0, 0, 0, 0, 0.015]], dtype=np.float32)
LABELS = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def short_texts_take_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of these tests are short, and would all be left to the strict reader."""
    monkeypatch.setattr(table, "SHORT_BYTES", 0)


def put(directory: Path, text: bytes, name: str = "train.txt") -> Path:
    path = directory / name
    path.write_bytes(text)
    return path


def assert_good(path: Path) -> None:
    features, labels = read_xmc(path)
    assert features.dtype == labels.dtype == np.float32
    np.testing.assert_array_equal(features.toarray(), FEATURES)
    np.testing.assert_array_equal(labels.toarray(), LABELS)


# --- What it takes


@pytest.mark.parametrize("suffix", COMPRESS)
def test_reads_plain_and_compressed_text(tmp_path: Path, suffix: str) -> None:
    assert_good(put(tmp_path, COMPRESS[suffix](GOOD), f"train.txt{suffix}"))


def test_reads_a_file_of_several_gzip_members(tmp_path: Path) -> None:
    assert_good(put(tmp_path, gzip.compress(GOOD[:20]) + gzip.compress(GOOD[20:]), "train.txt.gz"))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GOOD.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(b"\xef\xbb\xbf" + GOOD, id="byte order mark"),
        pytest.param(GOOD.replace(b"0,2 0:1 3:0.5", b"2,0 3:0.5 0:1"), id="unsorted ids"),
        pytest.param(GOOD.replace(b" 3:0.5", b"\t3:0.5").replace(b" 1:-2", b"\t1:-2"), id="tabs"),
        pytest.param(GOOD.replace(b" 3:0.5", b"   3:0.5 \t "), id="several blanks"),
        pytest.param(GOOD.replace(b"\n 1:-2", b"\n1:-2"), id="no blank before the first pair"),
        pytest.param(GOOD[:-1], id="no final newline"),
        pytest.param(GOOD + b"\n \n\t\r\n", id="blank lines after the last row"),
        pytest.param(GOOD.replace(b"0,2 0:1", b"000,02 00:+1."), id="leading zeros, sign, bare point"),
        pytest.param(GOOD.replace(b"0.5", b".5"), id="no digit before the point"),
        pytest.param(GOOD.replace(b"0:1 ", b"00000000000000000000:1 "), id="many leading zeros"),
        pytest.param(GOOD.replace(b"3 5 4", b"  3\t5   4 "), id="blanks in the header"),
    ],
)
def test_reads_the_variants_that_exist_in_the_wild(tmp_path: Path, text: bytes) -> None:
    assert_good(put(tmp_path, text))


def test_every_row_keeps_its_place_also_the_empty_ones(tmp_path: Path) -> None:
    features, labels = read_xmc(put(tmp_path, b"6 3 3\n\n0 0:1\n1\n \n 2:1\n\n"))
    assert np.diff(features.indptr).tolist() == [0, 1, 0, 0, 1, 0]
    assert np.diff(labels.indptr).tolist() == [0, 1, 1, 0, 0, 0]


def test_keeps_zero_values_as_stored_entries(tmp_path: Path) -> None:
    features, _ = read_xmc(put(tmp_path, b"1 3 1\n0 1:0 2:1e-60\n"))
    assert features.indices.tolist() == [1, 2]
    assert features.data.tolist() == [0, 0]


def test_a_file_of_no_instances_is_an_empty_matrix(tmp_path: Path) -> None:
    features, labels = read_xmc(put(tmp_path, b"0 5 4\n"))
    assert features.shape == (0, 5)
    assert labels.shape == (0, 4)


def test_values_are_the_nearest_float32_of_the_text(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [repr(rng.uniform(-1, 1) * 10 ** rng.randint(-30, 30)) for _ in range(500)]
    texts += ["0.1", "16777217", "1.00000017881393432617187500001", "3.4028235e38", "1" + "0" * 30]
    rows = "".join(f"0 0:{text}\n" for text in texts)
    features, _ = read_xmc(put(tmp_path, f"{len(texts)} 1 1\n{rows}".encode()))
    assert features.data.tolist() == [float(np.float32(float(text))) for text in texts]


def test_equals_scikit_learn_where_that_is_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = []
    for _ in range(300):
        labels = rng.choice(20, size=rng.integers(0, 5), replace=False)
        ids = np.sort(rng.choice(50, size=rng.integers(1, 9), replace=False))  # it drops rows without features
        pairs = " ".join(f"{i}:{rng.normal():.5g}" for i in ids)
        lines.append(f"{','.join(map(str, np.sort(labels)))} {pairs}\n")
    path = put(tmp_path, f"300 50 20\n{''.join(lines)}".encode())
    features, labels = read_xmc(path)
    body = put(tmp_path, "".join(lines).encode(), "body.txt")
    expected, targets = load_svmlight_file(str(body), multilabel=True, n_features=50, zero_based=True, dtype=np.float32)
    np.testing.assert_array_equal(features.toarray(), expected.toarray())
    assert [tuple(row.indices) for row in labels] == [tuple(map(int, target)) for target in targets]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bibtex", {"train": (4880, 1836, 159), "test": (2515, 1836, 159)}),
        ("delicious", {"train": (12920, 500, 983), "test": (3185, 500, 983)}),
        ("gnd-tib", {"test": (19949, 88279, 41218)}),
        ("debian-deps", {"train": (48280, 25599, 42411), "test": (8649, 25599, 42411)}),
        ("yso-finna-en", {"test": (96395, 63752, 25147)}),
    ],
)
def test_real_files_have_the_sizes_of_their_readme(name: str, sizes: dict[str, tuple[int, int, int]]) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the shared data is not at {DATA}")
    for split, (num_instances, num_features, num_labels) in sizes.items():
        features, labels = read_xmc(DATA / name / f"{split}.txt.gz")
        assert features.shape == (num_instances, num_features)
        assert labels.shape == (num_instances, num_labels)
        assert len(read_labels(DATA / name / "labels.txt.gz", num_labels)) == num_labels


# --- What it refuses

HUGE = b"9" * 6000
DAMAGE = [
    ("an empty file", b"", "1: the file is empty, expected the header"),
    ("no header", GOOD.split(b"\n", 1)[1], "1: the file starts with an instance, expected the header"),
    ("a header of words", GOOD.replace(b"3 5 4", b"N F L"), "1: the first line is 'N F L', expected the header"),
    ("a header of two", GOOD.replace(b"3 5 4", b"3 5"), "1: the first line is '3 5', expected the header"),
    ("a header of four", GOOD.replace(b"3 5 4", b"3 5 4 1"), "1: the first line is '3 5 4 1'"),
    ("a header of floats", GOOD.replace(b"3 5 4", b"3 5 4.0"), "1: the first line is '3 5 4.0'"),
    ("a second header", GOOD.replace(b"3 5 4", b"3 5 4\n3 5 4"), "2: '5' is not `id:value`"),
    ("a negative header", GOOD.replace(b"3 5 4", b"3 -5 4"), "1: the header says -5 features, expected 1 to"),
    ("no labels at all", GOOD.replace(b"3 5 4", b"3 5 0"), "1: the header says 0 labels, expected 1 to"),
    ("a huge header", GOOD.replace(b"3 5 4", b"3 5 9999999999"), "1: the header says 9999999999 labels"),
    ("a header beyond int64", GOOD.replace(b"3 5 4", HUGE + b" 5 4"), "1: the header says 99999999"),
    ("too few rows", GOOD.replace(b"3 5 4", b"4 5 4"), "4: the file ends after 3 instances, the header says 4"),
    (
        "far too few rows",
        GOOD.replace(b"3 5 4", b"2147483647 5 4"),
        "4: the file ends after 3 instances, the header says 2147483647",
    ),
    ("a lost last row", GOOD.rsplit(b"\n", 2)[0], "3: the file ends after 2 instances"),
    ("too many rows", GOOD.replace(b"3 5 4", b"2 5 4"), "4: a row too many, the header says 2"),
    ("a row after blanks", GOOD + b"\n\n0 0:1\n", "7: a row too many, the header says 3"),
    (
        "a feature out of range",
        GOOD.replace(b"3:0.5", b"7:0.5"),
        "2: feature id 7 is outside 0..4 (the header says 5 features). Is this the header of another file?",
    ),
    (
        "a feature one past the end",
        GOOD.replace(b"4:1.5", b"5:1.5"),
        "4: feature id 5 is outside 0..4 (the header says 5 features). Do the ids of this file start from 1?",
    ),
    (
        "a label out of range",
        GOOD.replace(b"0,2", b"0,12"),
        "2: label 12 is outside 0..3 (the header says 4 labels). Is this the header of another file?",
    ),
    ("a negative feature", GOOD.replace(b"3:0.5", b"-3:0.5"), "2: feature id -3 is outside 0..4"),
    ("a negative label", GOOD.replace(b"0,2", b"0,-2"), "2: label -2 is outside 0..3"),
    ("minus zero", GOOD.replace(b"0,2", b"-0,2"), "2: label -0 is outside 0..3"),
    ("beyond int32", GOOD.replace(b"3:0.5", b"4294967299:0.5"), "2: feature id 4294967299 is outside 0..4"),
    ("beyond int64", GOOD.replace(b"0,2", b"18446744073709551618"), "2: label 18446744073709551618 is outside"),
    ("far beyond int64", GOOD.replace(b"0,2", HUGE), "2: label 9999999999"),
    ("a label that is a float", GOOD.replace(b"0,2", b"0,2.0"), "2: '2.0' is not an integer, expected a label."),
    ("a feature that is a word", GOOD.replace(b"3:0.5", b"x:0.5"), "2: 'x' is not an integer, expected a feature"),
    ("a query id", GOOD.replace(b"3:0.5", b"qid:3"), "2: 'qid' is not an integer, expected a feature id."),
    ("a label missing", GOOD.replace(b"0,2", b"0,,2"), "2: a label is missing."),
    ("a last label missing", GOOD.replace(b"0,2", b"0,"), "2: a label is missing."),
    ("a feature missing", GOOD.replace(b"3:0.5", b":0.5"), "2: a feature id is missing."),
    ("labels with blanks", GOOD.replace(b"0,2", b"0, 2"), "2: a label is missing."),
    ("a blank before the labels", GOOD.replace(b"0,2", b" 0,2"), "2: '0,2' is not `id:value`."),
    ("a label twice", GOOD.replace(b"0,2", b"2,0,2"), "2: label 2 occurs twice, expected once."),
    ("a feature twice", GOOD.replace(b"3:0.5", b"3:0.5 0:1"), "2: feature id 0 occurs twice, expected once."),
    ("NaN", GOOD.replace(b"0.5", b"NaN"), "2: the value 'NaN' of feature id 3 is not finite."),
    ("infinity", GOOD.replace(b"0.5", b"-inf"), "2: the value '-inf' of feature id 3 is not finite."),
    ("1e400", GOOD.replace(b"0.5", b"1e400"), "2: the value '1e400' of feature id 3 is beyond the range of float32"),
    ("1e39", GOOD.replace(b"0.5", b"1e39"), "2: the value '1e39' of feature id 3 is beyond the range of float32"),
    ("a value missing", GOOD.replace(b"3:0.5", b"3:"), "2: the value of feature id 3 is missing."),
    ("a value of words", GOOD.replace(b"0.5", b"abc"), "2: the value 'abc' of feature id 3 is not a number."),
    ("a hexadecimal value", GOOD.replace(b"0.5", b"0x1"), "2: the value '0x1' of feature id 3 is not a number."),
    ("a digit group", GOOD.replace(b"0.5", b"1_0"), "2: the value '1_0' of feature id 3 is not a number."),
    ("two colons", GOOD.replace(b"3:0.5", b"3:0:5"), "2: the value '0:5' of feature id 3 is not a number."),
    ("an id alone", GOOD.replace(b"3:0.5", b"3"), "2: '3' is not `id:value`."),
    ("a comment", GOOD.replace(b"3:0.5", b"3:0.5 # note"), "2: the line holds a `#`"),
    ("a NUL byte", GOOD.replace(b"0.5", b"0\x005"), "2: the line holds a NUL byte"),
    ("a letter of Latin-1", GOOD.replace(b"0.5", b"0.5\xe4"), "2: byte 0xe4 in column 14 is no part of ASCII"),
    ("UTF-8 digits", GOOD.replace(b"0.5", "٣".encode()), "2: byte 0xd9 in column 11 is no part of ASCII"),
    ("UTF-16", GOOD.decode().encode("utf-16"), "1: the first line is"),
    ("a vertical tab", GOOD.replace(b" 3:", b"\x0b3:"), "2: the value '1\\x0b3:0.5' of feature id 0 is not"),
    ("a vertical tab at the end", GOOD.replace(b"0.5", b"0.5\x0b"), "2: the value '0.5\\x0b' of feature id 3 is"),
    ("a form feed at the end", GOOD.replace(b"0.5", b"0.5\x0c"), "2: the value '0.5\\x0c' of feature id 3 is not"),
    ("a carriage return alone", GOOD.replace(b" 3:", b"\r3:"), "2: the value '1\\r3:0.5' of feature id 0 is not"),
    ("old Mac line ends", GOOD.replace(b"\n", b"\r"), "1: the file starts with an instance"),
]


@pytest.mark.fault("R8")
@pytest.mark.parametrize(("text", "message"), [pytest.param(*case[1:], id=case[0]) for case in DAMAGE])
@pytest.mark.parametrize("line_by_line", [False, True], ids=["by chunks", "by lines"])
def test_each_class_of_damage_has_its_message(tmp_path: Path, text: bytes, message: str, line_by_line: bool) -> None:
    path = put(tmp_path, text)
    with pytest.raises(DataError) as caught:
        scan_xmc(path, formats.raise_error, line_by_line=line_by_line)
    assert str(caught.value).startswith(f"{path}:{message}")
    assert len(str(caught.value)) < len(str(path)) + 250


def test_a_missing_file_a_directory_and_a_wrong_name_are_named(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "no.txt", "cannot be read: No such file or directory."),
        (tmp_path, "is a directory, expected a file."),
        (put(tmp_path, GOOD, "a.gz"), "is something else, expected a .gz stream. Is its right name a?"),
        (put(tmp_path, gzip.compress(GOOD), "b.txt"), "is a .gz stream, expected text. Is its right name b.txt.gz?"),
        (put(tmp_path, b"", "c.xz"), "is empty, expected a .xz stream. Was the file cut?"),
    ):
        with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
            read_xmc(path)


@pytest.mark.fault("R8")
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_compressed_file_cut_at_any_byte_is_refused(
    tmp_path: Path, suffix: str, record_property: Callable[[str, int], None]
) -> None:
    whole = COMPRESS[suffix](GOOD)
    record_property("count", len(whole))
    for size in range(len(whole)):
        with pytest.raises(DataError, match=r"train\.txt"):
            read_xmc(put(tmp_path, whole[:size], f"train.txt{suffix}"))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_cut_stream_names_the_line_it_ends_in(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(2)
    rows = [f"{rng.randrange(4)} {rng.randrange(5)}:{rng.random()}\n" for _ in range(60_000)]
    whole = COMPRESS[suffix](f"60000 5 4\n{''.join(rows)}".encode())
    path = put(tmp_path, whole[: len(whole) * 3 // 4], f"train.txt{suffix}")
    with pytest.raises(DataError, match=rf"the {suffix} stream is cut or damaged here") as caught:
        read_xmc(path)
    found = re.search(r":(\d+): ", str(caught.value))
    assert found is not None
    # bzip2 gives nothing of a block that is not whole.
    assert 20_000 < int(found[1]) < 50_000


@pytest.mark.fault("R8")
def test_every_flipped_bit_of_a_gzip_file_is_refused_or_harmless(
    tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    whole = gzip.compress(GOOD, mtime=0)
    record_property("count", len(whole))
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        with contextlib.suppress(DataError):
            assert_good(put(tmp_path, bytes(damaged), "train.txt.gz"))


@pytest.mark.fault("R8")
def test_a_file_cut_at_any_byte_is_refused_or_has_all_its_rows(
    tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    record_property("count", len(GOOD))
    accepted = 0
    for size in range(len(GOOD)):
        try:
            features, labels = read_xmc(put(tmp_path, GOOD[:size]))
        except DataError:
            continue
        accepted += 1
        assert features.shape == (3, 5)
        assert labels.shape == (3, 4)
        np.testing.assert_array_equal(features[:2].toarray(), FEATURES[:2])
    # Only a cut inside the last row can look like a whole file: text holds no checksum.
    assert accepted <= len(b"3 4:1.5e-2\n")


@pytest.mark.fault("R9")
def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(files, "CHUNK_BYTES", 300)
    for line in (b"0" + b" 0:1" * 1000 + b"\n", b"0" * 1001):
        with pytest.raises(DataError, match=r":2: the line is longer than 1,000 bytes"):
            read_xmc(put(tmp_path, b"2 5 4\n" + line))
    assert read_xmc(put(tmp_path, b"1 5 4\n0" + b" " * 998 + b"\n"))[0].shape == (1, 5)


@pytest.mark.fault("R9")
def test_a_huge_line_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"1 2147483647 2147483647\n0")
        for _ in range(200):
            file.write(b" 1234567:1" * 100_000)
    code = (
        "import resource, sys\n"
        "from xmc_midx.data.formats import read_xmc\n"
        "from xmc_midx.errors import DataError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_xmc(sys.argv[1])\n"
        "except DataError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    message, mebibytes = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    assert "train.txt.gz:2: the line is longer than 67,108,864 bytes." in message
    assert int(mebibytes) < 200


# --- Two ways, one result


def random_number(rng: random.Random) -> str:
    """A number as files have it, of one digit or of thirty."""
    digits = rng.choice([1, 4, 5, 6, 8, 15, 16, 17, 19, 20, 30])
    shapes = (
        rng.choice(["1", "0.25", "-3e-2", ".5", "+7.", "0", "-0.0", "00012.50"]),
        f"{rng.random():.{digits}f}",
        f"{rng.uniform(-1, 1) * 10 ** rng.uniform(-50, 38):.{digits}e}",
        repr(rng.gauss(0, 1)),
    )
    return rng.choice(shapes)


def random_file(rng: random.Random) -> bytes:
    num_rows, num_features, num_labels = rng.randint(0, 12), rng.randint(1, 30), rng.randint(1, 12)
    lines = [f"{num_rows} {num_features} {num_labels}"]
    for _ in range(num_rows):
        labels = rng.sample(range(num_labels), rng.randint(0, min(3, num_labels)))
        ids = rng.sample(range(num_features), rng.randint(0, min(6, num_features)))
        ids = sorted(ids) if rng.random() < 0.8 else ids
        blank = rng.choice([" ", " ", " ", "\t", "  "])
        pairs = blank.join(f"{i}:{random_number(rng)}" for i in ids)
        lines.append(",".join(map(str, labels)) + (blank + pairs if pairs or rng.random() < 0.5 else ""))
    return (rng.choice(["\n", "\n", "\r\n"]).join([*lines, ""])).encode()


TOKENS = [b"0", b"7", b"-1", b"99", b":", b",", b" ", b"\n", b"\r", b"\t", b".", b"e", b"e9", b"+", b"nan", b"1e400"]
TOKENS += [
    b"inf",
    b"#",
    b"\0",
    b"\xff",
    b"0:1",
    b"1,1",
    b" 0:1 0:1",
    b"\n\n",
    b"123456789012345678901",
    b"x",
    b"\x0b",
    b"\x0c\n",
    b"",
]


def damage(rng: random.Random, text: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(text))
        choice = rng.random()
        if choice < 0.5:
            text = text[:start] + rng.choice(TOKENS) + text[start + rng.randint(0, 2) :]
        elif choice < 0.65:
            text = text[:start]
        elif choice < 0.85:
            text = text[:start] + text[start + rng.randint(1, 12) :]
        else:
            lines = text.split(b"\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = b"\n".join(lines)
    return text


def outcome(path: Path, *, line_by_line: bool, limit: int | None) -> tuple[object, ...]:
    """Everything that a caller can see; `limit` None reads, else checks."""
    found = ProblemList(limit or 0)
    try:
        scan = scan_xmc(path, formats.raise_error if limit is None else found, line_by_line=line_by_line)
    except XmcMidxError as error:
        return (str(error),)
    if scan is None:
        return tuple(found.problems)
    if limit is None:
        stated = int(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split()[0])
        assert scan.features.shape[0] == scan.labels.shape[0] == stated
    for matrix in (scan.features, scan.labels):
        matrix.check_format(full_check=True)
        assert np.isfinite(matrix.data).all()
        rebuilt = csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape)
        assert rebuilt.has_canonical_format
    arrays = [
        (matrix.shape, matrix.indptr.tolist(), matrix.indices.tolist(), matrix.data.tobytes())
        for matrix in (scan.features, scan.labels)
    ]
    return (*arrays, *found.problems, found.counts)


def fuzz(directory: Path, num_files: int, seed: int) -> int:
    """Number of files that were read; the others were refused with a message."""
    rng = random.Random(seed)
    num_read = 0
    for case in range(num_files):
        text = random_file(rng)
        path = put(directory, damage(rng, text) if case % 4 else text)
        by_chunks = outcome(path, line_by_line=False, limit=None)
        assert by_chunks == outcome(path, line_by_line=True, limit=None)
        assert outcome(path, line_by_line=False, limit=3) == outcome(path, line_by_line=True, limit=3)
        num_read += len(by_chunks) > 1
        if case % 4 == 0:
            assert len(by_chunks) > 1, by_chunks
    return num_read


@pytest.mark.fault("R8")
@pytest.mark.parametrize("chunk_bytes", [1, 37, 2**20])
def test_chunks_and_lines_give_the_same_for_good_and_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, record_property: Callable[[str, int], None]
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    record_property("count", 300)
    num_read = fuzz(tmp_path, 300, seed=chunk_bytes)
    assert 80 < num_read < 220


def test_whole_chunks_of_ordinary_text_are_not_left_to_the_slow_way() -> None:
    rules = Rules(file="", num_features=5, num_labels=4)
    for text in (
        GOOD.split(b"\n", 1)[1],
        b"0:1 1:1\n2,0 4:-1e-3 3:.5\n\n \n1\n",
        b"0,1\t2:1  3:1 \r\n\r\n",
        b"\n",
    ):
        rows = parse_chunk(text, rules)
        assert rows is not None
        expected = parse_lines(text, 1, rules, formats.raise_error)
        for name in Rows.__slots__:
            np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))
            assert getattr(rows, name).dtype == getattr(expected, name).dtype


def test_a_cut_stream_is_one_problem_of_a_check(tmp_path: Path) -> None:
    text = b"9000 5 4\n" + b"".join(b"%d %d:0.%d\n" % (i % 4, i % 5, i * i) for i in range(9000))
    found = ProblemList(10)
    scan = scan_xmc(put(tmp_path, gzip.compress(text)[:-30], "train.txt.gz"), found)
    assert [problem.kind for problem in found.problems] == ["compression"]
    assert scan is not None
    assert 1000 < scan.features.shape[0] < 9000
    # The line that the cut goes through is no row.
    assert found.problems[0].line == 1 + scan.features.shape[0] + 1


def test_fuzzed_predictions_and_names_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(6)
    num_read = 0
    for _ in range(400):
        lines = [" ".join(f"{i}:{rng.random():.3f}" for i in rng.sample(range(9), rng.randint(0, 4))) for _ in range(5)]
        text = "\n".join([*(["5 9"] if rng.random() < 0.5 else []), *lines, ""]).encode()
        path = put(tmp_path, damage(rng, text))
        with contextlib.suppress(XmcMidxError):
            top = read_predictions(path, 9, num_instances=5)
            num_read += 1
            assert len(top.label_ids) == len(top.scores) == 5
            assert ((top.label_ids >= -1) & (top.label_ids < 9)).all()
            assert (np.isfinite(top.scores) == (top.label_ids >= 0)).all()
            assert (top.scores[:, 1:] <= top.scores[:, :-1]).all()
        with contextlib.suppress(XmcMidxError):
            assert len(read_labels(path, 5)) == 5
    assert 20 < num_read < 380


@pytest.mark.fault("R8")
@pytest.mark.soak
def test_ten_thousand_fuzzed_files(tmp_path: Path, record_property: Callable[[str, int], None]) -> None:
    record_property("count", 10_000)
    fuzz(tmp_path, 10_000, seed=3)


# --- Writing


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_written_is_read_back_equal(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(4)
    features = csr_matrix(random_array((9000, 300), density=0.01, rng=rng, dtype=np.float32))
    features.data *= np.float32(10.0) ** rng.integers(-20, 20, features.nnz).astype(np.float32)
    labels = csr_matrix(random_array((9000, 40), density=0.01, rng=rng) > 0)
    path = tmp_path / f"train.txt{suffix}"
    write_xmc(path, features, labels)
    again = read_xmc(path)
    assert (again[0] != features).nnz == 0
    assert (again[1] != labels.astype(np.float32)).nnz == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    write_xmc(path, features, labels)
    assert path.read_bytes() == first


def test_written_text_is_the_plain_format(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    write_xmc(path, csr_matrix(FEATURES), csr_matrix(LABELS))
    assert path.read_bytes() == b"3 5 4\n0,2 0:1 3:0.5\n 1:-2\n3 4:0.015\n"
    write_xmc(path, csr_matrix((2, 3)), csr_matrix([[0, 1], [0, 0]]))
    assert path.read_bytes() == b"2 3 2\n1\n \n"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD)
    with pytest.raises(DataError, match="not finite"):
        write_xmc(path, csr_matrix([[np.nan]]), csr_matrix([[1.0]]))
    with pytest.raises(DataError, match="1 rows of features, 2 of labels"):
        write_xmc(path, csr_matrix([[1.0]]), csr_matrix([[1.0], [1.0]]))
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    with pytest.raises(ResourceError, match="cannot be written: No such file or directory"):
        write_xmc(tmp_path / "no" / "train.txt", csr_matrix([[1.0]]), csr_matrix([[1.0]]))
    assert path.read_bytes() == GOOD
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_takes_its_name_and_an_older_one_is_never_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, GOOD)
    (tmp_path / "same file").hardlink_to(path)
    events: list[tuple[str, bytes]] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        found = Path(f"/proc/self/fd/{descriptor}").readlink()
        # What lies under the name, when the file and then the name is brought to the disk.
        events.append((found.suffix or "directory", path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    with files.atomic_write(path) as file:
        file.write(b"newer")
    assert [kind for kind, _ in events] == [".tmp", "directory"]
    assert [content for _, content in events] == [GOOD, b"newer"]
    assert (tmp_path / "same file").read_bytes() == GOOD


# --- Label names


def test_label_names_are_the_second_column_where_there_is_one(tmp_path: Path) -> None:
    text = "gnd:1\tÄrger\r\nplain\nonly\t\n\ttabbed\tmore\n\n\n\n".encode()
    path = put(tmp_path, text, "labels.txt")
    assert read_labels(path, 5) == ("Ärger", "plain", "only", "tabbed", "4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\nb\n", ":2: the file holds 2 names, expected one for each of 3 labels."),
        (b"a\nb\nc\nd\ne\n", ":4: the file holds 5 names, expected one for each of 3 labels."),
        (b"a\nb\xff\nc\n", ":2: 'b\\xff' is not UTF-8."),
    ],
)
def test_label_names_that_do_not_fit_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = put(tmp_path, text, "labels.txt")
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
        read_labels(path, 3)


# --- Predictions


@pytest.mark.parametrize("header", [b"", b"3 9\n"])
def test_predictions_are_sorted_by_score_then_id_and_padded(tmp_path: Path, header: bytes) -> None:
    path = put(tmp_path, header + b"7:0.5 2:0.5 1:0.9\n\n8:-1.5\n", "scores.txt")
    top = read_predictions(path, 9)
    assert top.label_ids.tolist() == [[1, 2, 7], [-1, -1, -1], [8, -1, -1]]
    assert top.scores.tolist() == [[np.float32(0.9), 0.5, 0.5], [-np.inf] * 3, [-1.5, -np.inf, -np.inf]]
    assert (top.label_ids.dtype, top.scores.dtype) == (np.int64, np.float32)
    assert read_predictions(path, 9, k=2).label_ids.tolist() == [[1, 2], [-1, -1], [8, -1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"0:1\n9:1\n", ":2: label 9 is outside 0..8 (there are 9 labels)."),
        (b"0:1\n3 4:1\n", ":2: '3' is not `label:score`."),
        (b"0:1\n3:nan\n", ":2: the value 'nan' of label 3 is not finite."),
        (b"0:1 0:2\n0:1\n", ":1: label 0 occurs twice, expected once."),
        (b"2 8\n0:1\n0:1\n", ":1: the header says 2 instances and 8 labels, expected 2 and 9."),
        (b"3 9\n0:1\n0:1\n0:1\n", ":1: the header says 3 instances and 9 labels, expected 2 and 9."),
        (b"2 9\n0:1\n", ":2: the file ends after 1 instances, the header says 2."),
        (b"0:1\n", ":1: the file ends after 1 instances, expected 2 as the data has."),
        (b"0:1\n0:1\n0:1\n", ":3: a row too many, expected 2 as the data has."),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = put(tmp_path, text, "scores.txt")
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
        read_predictions(path, 9, num_instances=2)


def test_predictions_written_are_read_back_equal(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    scores = -np.sort(-rng.normal(size=(200, 5)).astype(np.float32), axis=1)
    ids = np.stack([rng.choice(50, size=5, replace=False) for _ in range(200)])
    short = np.arange(5) >= rng.integers(1, 6, size=200)[:, None]
    ids[short], scores[short] = -1, -np.inf
    path = tmp_path / "scores.txt.gz"
    write_predictions(path, TopK(label_ids=ids, scores=scores), 50)
    top = read_predictions(path, 50, num_instances=200)
    np.testing.assert_array_equal(top.label_ids, ids)
    np.testing.assert_array_equal(top.scores, scores)
    with pytest.raises(DataError, match=r"outside 0\.\.9"):
        write_predictions(path, TopK(label_ids=ids, scores=scores), 10)


def test_one_very_long_row_of_predictions_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmc_midx.data.predictions.MAX_ENTRIES", 1000)
    path = put(tmp_path, b"0:1 1:1 2:1 3:1\n" + b"\n" * 299, "scores.txt")
    with pytest.raises(DataError, match="300 rows of up to 4 predictions, expected at most 1000"):
        read_predictions(path, 9)
    assert read_predictions(path, 9, k=1).label_ids.shape == (300, 1)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_file_of_several_streams_is_read_whole_or_refused(tmp_path: Path, suffix: str) -> None:
    text = b"".join(b"%d %d:1\n" % (i % 4, i % 5) for i in range(200))
    first, second = (COMPRESS[suffix](part) for part in (b"200 5 4\n" + text[:600], text[600:]))
    path = tmp_path / f"train.txt{suffix}"
    gap = b"\0" * 8 if suffix == ".xz" else b""
    path.write_bytes(first + gap + second + gap)
    assert read_xmc(path)[0].shape == (200, 5)
    bare = tmp_path / f"train.svm{suffix}"
    for bit in range(len(second)):
        damaged = bytearray(second)
        damaged[bit] ^= 1
        bare.write_bytes(COMPRESS[suffix](text[:600]) + bytes(damaged))
        try:
            num_read = read_svmlight(bare)[0].shape[0]
        except DataError:
            continue
        # A gzip header holds a name and a time, bzip2's first bytes the size of its blocks: some bits say nothing.
        assert num_read == 200
    bare.write_bytes(COMPRESS[suffix](text[:600]) + second[: len(second) // 2])
    with pytest.raises(DataError, match=r"stream is cut or damaged"):
        read_svmlight(bare)


def test_a_name_that_is_nearly_right_is_put_right(tmp_path: Path) -> None:
    (tmp_path / "train.txt.GZ").write_bytes(gzip.compress(GOOD))
    with pytest.raises(DataError) as refused:
        read_xmc(tmp_path / "train.txt.GZ")
    assert refused.value.hint == "Is its right name train.txt.gz?"
    (tmp_path / "train.txt").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(DataError, match="is a zip archive, expected text or one compressed file"):
        read_xmc(tmp_path / "train.txt")


def test_ids_of_thousands_of_zeros_are_numbers(tmp_path: Path) -> None:
    zeros = b"0" * 5000
    path = tmp_path / "train.txt"
    path.write_bytes(b"1 5 4\n" + zeros + b"2 " + zeros + b"1:1\n")
    features, labels = read_xmc(path)
    assert features.indices.tolist() == [1] and labels.indices.tolist() == [2]
    path.write_bytes(b"1 5 4\n" + b"9" * 5000 + b" 1:1\n")
    with pytest.raises(DataError, match=r"is outside 0\.\.3"):
        read_xmc(path)
    path.write_bytes(b"1 5 4\n+1 1:1\n")
    with pytest.raises(DataError) as refused:
        read_xmc(path)
    assert refused.value.hint == "Ids are whole numbers from 0: write +1 and -1 as 0 and 1."


def test_numbered_names_stand_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    for text in ("0\ta\n1\tb\n", "1\ta\n2\tb\n", "7\ta\n3\tb\n", "1\n0\n"):
        path.write_text(text)
        assert len(read_labels(path, 2)) == 2
    path.write_text("1\ta\n3\tc\n2\tb\n")
    with pytest.raises(DataError, match=r"labels.txt:2: the line begins with 3, but names label 1"):
        read_labels(path, 3)
    path.write_text("a\nb\n\n\n")
    assert read_labels(path) == read_labels(path, 2) == ("a", "b")
    assert read_labels(path, 3) == ("a", "b", "2")


def test_the_data_layer_starts_without_torch() -> None:
    modules = "formats, dataset, check, registry, predictions"
    code = f"import sys; from xmc_midx.data import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
