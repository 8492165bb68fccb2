"""The quick reader of XMC text: the same bits as the strict one, in the file's order, whatever the threads do."""

from __future__ import annotations

import gzip
import math
import os
import random
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from xmc_midx.data import files, parser, table
from xmc_midx.data.formats import read_predictions, read_xmc, scan_xmc
from xmc_midx.data.parser import Rows, Rules, parse_chunk, parse_lines
from xmc_midx.data.problems import ProblemList, raise_error
from xmc_midx.errors import DataError

ROOT = Path(__file__).parents[1]
RULES = Rules(file="f.txt", num_features=100, num_labels=10)


@pytest.fixture(autouse=True)
def short_files_take_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SHORT_BYTES", 0)


def assert_equal(rows: Rows | None, expected: Rows) -> None:
    assert rows is not None
    for name in Rows.__slots__:
        left, right = getattr(rows, name), getattr(expected, name)
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes(), name


# --- Numbers


def float32_bits(text: str) -> int:
    """The definition: the nearest float64 of the text, and the nearest float32 of that."""
    with np.errstate(over="ignore"):
        return int(np.float32(float(text)).view(np.uint32))


def read_numbers(texts: list[str]) -> list[int | None]:
    """Bits of each number as the quick reader has it, None where it leaves it to the strict one."""
    rows = parse_chunk("".join(f" 0:{text}\n" for text in texts).encode(), RULES)
    if rows is not None:
        return rows.values.view(np.uint32).tolist()
    if len(texts) == 1:
        return [None]
    middle = len(texts) // 2
    return read_numbers(texts[:middle]) + read_numbers(texts[middle:])


def distance_from_middle(text: str) -> float:
    """From the nearest middle of two neighbouring float32, relative to the number."""
    number = abs(Fraction(text))
    nearest = np.float32(abs(float(text)))
    around = [Fraction(float(np.nextafter(nearest, np.float32(end)))) for end in (0, np.inf)]
    return float(min(abs(number - (Fraction(float(nearest)) + other) / 2) for other in around) / number)


def decimal_of(number: Fraction, digits: int) -> str:
    """`number`, from 0.001 to 1e9, cut after so many decimals."""
    whole, rest = divmod(number.numerator * 10**digits // number.denominator, 10**digits)
    return f"{whole}.{rest:0{digits}d}"


def numbers_of_all_kinds(rng: random.Random, count: int) -> list[str]:
    texts = []
    for _ in range(count):
        digits = rng.randint(1, 40)
        texts += [
            f"{rng.random():.{digits}f}",
            f"{rng.uniform(-1, 1) * 10 ** rng.uniform(-75, 38):.{digits}e}",
            repr(rng.gauss(0, 1)),
            f"{rng.randrange(10**18)}" + "0" * rng.randint(0, 12) + f"e{rng.randint(-60, 5)}",
            "0" * rng.randint(0, 30)
            + f"{rng.randrange(10**9)}."
            + "0" * rng.randint(0, 30)
            + f"{rng.randrange(10**9)}",
            str(struct.unpack("<f", struct.pack("<I", rng.randrange(0x7F800000)))[0]),  # every exponent, subnormal ones
        ]
    return texts


def test_numbers_have_the_bits_that_python_gives_them() -> None:
    texts = numbers_of_all_kinds(random.Random(0), 20_000)
    found = read_numbers(texts)
    assert len(found) == len(texts) == 120_000
    wrong = [text for text, bits in zip(texts, found, strict=True) if bits not in (None, float32_bits(text))]
    assert wrong == []
    # What it leaves out is so near to the middle of two neighbours that only all digits can tell.
    left = [text for text, bits in zip(texts, found, strict=True) if bits is None]
    assert [text for text in left if distance_from_middle(text) > 2.0**-48] == []
    assert len(left) < len(texts) / 100


def test_numbers_at_the_middle_of_two_float32_are_right_or_left_to_the_strict_reader() -> None:
    rng = random.Random(1)
    texts = []
    for _ in range(4000):
        below = struct.unpack("<f", struct.pack("<I", rng.randrange(0x3A83126F, 0x4E6E6B28)))[0]  # 0.001 to 1e9
        above = float(np.nextafter(np.float32(below), np.float32(np.inf)))
        middle = (Fraction(below) + Fraction(above)) / 2
        distance = Fraction(rng.choice([0, 0, 1, -1, 3, -3]), 10 ** rng.randint(12, 26))
        texts.append(decimal_of(middle + distance, rng.choice([9, 12, 16, 18, 20, 25, 60])))
    for _ in range(20_000):
        below = np.uint32(rng.randrange(0x7F000000)).view(np.float32)  # every exponent
        middle = (Fraction(float(below)) + Fraction(float(np.nextafter(below, np.float32(np.inf))))) / 2
        power = math.floor(math.log10(middle)) - rng.choice([6, 14, 15, 18])
        texts.append(f"{round(middle / Fraction(10) ** power)}e{power}")
    found = read_numbers(texts)
    wrong = [text for text, bits in zip(texts, found, strict=True) if bits not in (None, float32_bits(text))]
    assert wrong == []
    # Both happen, or the cases are not the hard ones.
    assert 200 < sum(bits is None for bits in found[:4000]) < 3800


def test_ends_of_the_range_of_numbers() -> None:
    texts = ["0", "-0", "0e99", "-0.0e-999999999999999999", "1e-400", "-1e-46", "7.1e-46", "1.4e-45"]
    texts += ["1.17549435e-38", "3.4028234e38", "-3.4028235e38", "0." + "0" * 400 + "1e401", "1" + "0" * 300 + "e-300"]
    texts += ["9007199254740993", "9007199254740993e22", "18446744073709551615", "9" * 400 + "e-390"]
    assert read_numbers(texts) == [float32_bits(text) for text in texts]
    for text in ("3.4028236e38", "1e39", "1e400", "1e999999999999999999999", "9" * 40):
        assert read_numbers([text]) == [None]


@pytest.mark.soak
def test_ten_million_numbers_have_the_bits_that_python_gives_them() -> None:
    for seed in range(100):
        texts = numbers_of_all_kinds(random.Random(seed + 1000), 17_000)
        found = read_numbers(texts)
        wrong = [text for text, bits in zip(texts, found, strict=True) if bits not in (None, float32_bits(text))]
        assert wrong == []


# --- Grammar: every short text over the alphabet of the format


@pytest.mark.parametrize("num_labels", [0, 2])
def test_every_short_line_is_read_as_the_strict_reader_reads_it(num_labels: int) -> None:
    rules = Rules(file="f.txt", num_features=2, num_labels=num_labels)
    alphabet = [b"0", b"1", b"2", b",", b":", b" ", b"\t", b"\r", b".", b"-", b"+", b"e"]
    rng = random.Random(num_labels)
    lines = [b""]
    for _ in range(4):
        lines += [line + byte for line in lines if len(line) < 4 for byte in alphabet]
    lines = sorted({*lines, *(b"".join(rng.choices(alphabet, k=rng.randint(5, 11))) for _ in range(20_000))})
    num_read = 0
    for line in lines:
        found = ProblemList(0)
        expected = parse_lines(line + b"\n", 1, rules, found)
        rows = parse_chunk(line + b"\n", rules)
        if rows is None:
            continue
        num_read += 1
        assert not found.counts, line
        assert_equal(rows, expected)
    assert num_read > 100


@pytest.mark.parametrize(
    "line", [b"0,", b"0, 1:1", b"0,,1", b"1,2:3", b" 1", b"0 1", b"0\r", b"0 1:1\r", b"0 1:", b"-0", b"+0", b"0 1:1e"]
)
def test_what_the_strict_reader_refuses_the_quick_one_does_not_take(line: bytes) -> None:
    for text in (line + b"\r\n" if line.endswith(b"\r") else line + b"\n", b"0 1:1\n" + line + b" \r\r\n"):
        with pytest.raises(DataError):
            parse_lines(text, 1, RULES, raise_error)
        assert parse_chunk(text, RULES) is None


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        (b"3,1,2 5:1 4:2 9:3", [[1, 2, 3], [4, 5, 9], [2, 1, 3]]),
        (b"3,4 1:1\t \t2:2 ", [[3, 4], [1, 2], [1, 2]]),
        (b"5:1", [[], [5], [1]]),
        (b"007 00099:1", [[7], [99], [1]]),
        (b"9\r", [[9], [], []]),
        (b"\r", [[], [], []]),
    ],
)
def test_ordinary_lines_are_not_left_to_the_strict_reader(
    monkeypatch: pytest.MonkeyPatch, line: bytes, rows: list[list[float]]
) -> None:
    text = b"1 0:1\n" + line + b"\n\n"
    if line != b"3,1,2 5:1 4:2 9:3":  # nor is anything sorted that is so already
        monkeypatch.setattr(parser, "_ascending", lambda *_: None)
    found = parse_chunk(text, RULES)
    assert found is not None
    assert found.num_labels.tolist() == [1, len(rows[0]), 0]
    assert found.num_features.tolist() == [1, len(rows[1]), 0]
    assert [found.label_ids[1:].tolist(), found.feature_ids[1:].tolist(), found.values[1:].tolist()] == rows
    assert_equal(found, parse_lines(text, 1, RULES, raise_error))


def test_a_fault_leaves_only_its_chunk_to_the_strict_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    lines = [b"%d %d:0.5 %d:1\n" % (i % 10, i % 50, 50 + i % 50) for i in range(5000)]
    lines[3333] = b"1 2:nan 3:1\n"
    path = tmp_path / "train.txt"
    path.write_bytes(b"5000 100 10\n" + b"".join(lines))
    expected = ProblemList(9)
    strict_scan = scan_xmc(path, expected, line_by_line=True)
    strict: list[int] = []
    monkeypatch.setattr(table, "parse_lines", lambda text, *rest: strict.append(len(text)) or parse_lines(text, *rest))
    found = ProblemList(9)
    scan = scan_xmc(path, found)
    assert [problem.line for problem in found.problems] == [3335]
    assert found.problems == expected.problems
    assert scan is not None and strict_scan is not None and (scan.features != strict_scan.features).nnz == 0
    assert len(strict) == 1 and strict[0] <= 1020


def test_short_files_start_without_numba(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"1 5 4\n0 1:1\n")
    code = (
        "import sys\nfrom xmc_midx.data.formats import read_xmc\n"
        "read_xmc(sys.argv[1])\nassert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "train.txt")], check=True, cwd=ROOT)


# --- Chunks and threads


@pytest.mark.parametrize("num_workers", [1, 3])
def test_rows_and_faults_keep_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """Early chunks finish last, and the stream breaks while the rows before the break are not parsed yet."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 200)
    monkeypatch.setattr(table, "_num_workers", lambda: num_workers)
    started: list[int] = []
    lock = threading.Lock()

    def slowly(text: bytes, rules: Rules) -> Rows | None:
        with lock:
            started.append(len(started))
            pause = 0.004 * (2 - started[-1] % 3)
        time.sleep(pause)
        return parse_chunk(text, rules)

    monkeypatch.setattr(table, "parse_chunk", slowly)
    rng = random.Random(2)
    lines = [f"{i % 10} {i % 50}:{rng.random():.6f} {50 + i % 50}:1\n" for i in range(1500)]
    sound = "1500 100 10\n" + "".join(lines)
    for line in (150, 151, 700, 1490):
        lines[line] = "1 2:x\n"
    text = ("1500 100 10\n" + "".join(lines)).encode()
    path = tmp_path / "train.txt.gz"
    path.write_bytes(gzip.compress(text)[:-40])
    found, expected = ProblemList(9), ProblemList(9)
    scan, strict = scan_xmc(path, found), scan_xmc(path, expected, line_by_line=True)
    assert found.problems == expected.problems
    assert [problem.kind for problem in found.problems][:3] == ["value"] * 3
    assert found.problems[-1].kind == "compression"
    assert scan is not None and strict is not None
    assert (scan.features != strict.features).nnz == (scan.labels != strict.labels).nnz == 0
    with pytest.raises(DataError, match=r"train\.txt\.gz:152: "):
        read_xmc(path)
    (tmp_path / "sound.txt").write_text(sound)
    features, labels = read_xmc(tmp_path / "sound.txt")
    assert (labels.indices == np.arange(1500) % 10).all()
    assert (features.indices[::2] == np.arange(1500) % 50).all()
    assert len(started) > 100


def test_a_failed_read_waits_for_its_threads_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    before = threading.active_count()
    path = tmp_path / "train.txt"
    path.write_bytes(b"1000 100 10\n" + b"0 1:x\n" + b"0 1:1\n" * 999)
    with pytest.raises(DataError, match=r":2: the value 'x'"):
        read_xmc(path)
    assert threading.active_count() == before


def test_only_a_few_chunks_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the parser: as many chunks as threads and one, and of long lines not more than the limit."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(table, "_num_workers", lambda: 2)
    path = tmp_path / "train.txt"
    path.write_bytes(b"4000 100 10\n" + b"0 1:1 2:1 3:1\n" * 4000)
    ahead: list[int] = []
    lines = files.LineChunks(path, raise_error)
    original = table.RowTable._take

    def take(self: table.RowTable, chunk: object) -> None:
        ahead.append(self.num_rows - self._columns["num_labels"]._size)
        original(self, chunk)

    monkeypatch.setattr(table.RowTable, "_take", take)
    for limit, most in ((10**9, 3), (1500, 2)):
        monkeypatch.setattr(table, "_PENDING_BYTES", limit)
        read_xmc(path)
        assert max(ahead) <= most * 1000 // 14 + most
        ahead.clear()
    assert lines.num_lines == 0


def child(code: str, *arguments: str, **environment: str) -> list[str]:
    """Lines that `code` prints in a process of its own; `peak()` there is in MiB, above the time of `begin()`."""
    prelude = (
        "import sys\n"
        "from pathlib import Path\n"
        "from xmc_midx.data import parser\n"
        "from xmc_midx.data.formats import read_xmc\n"
        "from xmc_midx.errors import DataError\n"
        "assert parser.parse_chunk(b'0 1:2\\n', parser.Rules(file='', num_features=5, num_labels=4))\n"
        "def status(field):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ':'))\n"
        "def begin():\n"
        "    global before\n"
        "    Path('/proc/self/clear_refs').write_text('5')\n"
        "    before = status('VmRSS')\n"
        "def peak(): return status('VmHWM') - before\n"
        "begin()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


@needs_proc
def test_reading_takes_less_than_twice_the_memory_of_the_matrices(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    row = b"3,141,59 " + b" ".join(b"%d:0.12345" % i for i in range(0, 60_000, 400)) + b"\n"
    path.write_bytes(b"24000 60000 500\n" + row * 24_000)  # 46 MB of text, 28 MiB of matrices
    code = (
        "matrices = read_xmc(sys.argv[1])\n"
        "print(peak())\n"
        "print(sum(part.nbytes for m in matrices for part in (m.data, m.indices, m.indptr)) / 2**20)\n"
    )
    used, size = map(float, child(code, str(path)))
    assert 25 < size < 32
    assert used < 2 * size


@pytest.mark.fault("R9")
@needs_proc
def test_a_row_of_millions_of_features_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.txt.gz"
    num_features = 4_000_000
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"2 %d 3\n1" % num_features)
        for start in range(0, num_features, 100_000):
            file.write(b"".join(b" %d:0.5" % i for i in range(start, start + 100_000)))
        file.write(b"\n2 7:1\n")
    code = (
        "f, y = read_xmc(sys.argv[1])\n"
        "print(f.nnz, f[1].nnz, y.indices.tolist(), f.has_canonical_format)\n"
        "print(peak())\n"
    )
    shown, used = child(code, str(path))
    assert shown == f"{num_features + 1} 1 [1, 2] True"
    # 44 MB of text, its copies and 31 MiB of matrices.
    assert float(used) < 350


@pytest.mark.fault("R9")
@needs_proc
@pytest.mark.parametrize("row", ["digits", "pairs", "labels", "blanks"])
def test_a_line_of_200_megabytes_is_refused_in_bounded_memory(tmp_path: Path, row: str) -> None:
    """R9; the second is a row of 2 * 10^7 features."""
    pieces = {"digits": b"1" * 10, "pairs": b" 1234567:1", "labels": b"123456789,", "blanks": b" \t" * 5}
    path = tmp_path / "train.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"2 2147483647 2147483647\n0 0:1\n0")
        for _ in range(100):
            file.write(pieces[row] * 200_000)
    code = "try: read_xmc(sys.argv[1])\nexcept DataError as error: print(error)\nprint(peak())"
    message, used = child(code, str(path))
    assert message == f"{path}:3: the line is longer than 67,108,864 bytes."
    assert float(used) < 200


@pytest.mark.fault("R9")
def test_a_long_row_that_is_faulty_has_a_short_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"1 1000000 4\n0" + b"".join(b" %d:1" % i for i in range(300_000)) + b" 5:1\n")
    with pytest.raises(DataError, match=r":2: feature id 5 occurs twice, expected once\.$"):
        read_xmc(path)
    path.write_bytes(b"1 5 4\n0 1:" + b"9" * 300_000 + b"\n")
    with pytest.raises(DataError, match=r":2: the value '9{40}\.\.\.' of feature id 1 is beyond the range"):
        read_xmc(path)


def test_predictions_of_some_size_take_the_quick_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []

    def watched(text: bytes, rules: Rules) -> Rows | None:
        rows = parse_chunk(text, rules)
        taken.append(rows is not None)
        return rows

    monkeypatch.setattr(table, "parse_chunk", watched)
    path = tmp_path / "scores.txt"
    path.write_bytes(b"7:0.5 2:0.5 1:0.9\n\n8:-1.5\n" * 100)
    top = read_predictions(path, 9)
    assert taken and all(taken)
    assert top.label_ids[:3].tolist() == [[1, 2, 7], [-1, -1, -1], [8, -1, -1]]
