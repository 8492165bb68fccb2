"""R8: each of the 26 classes of damage to a data file, on its own, has the outcome that is written here.

In a file of three rows and deep inside one of thousands, in the first file of a directory and through the command line.
Either the file is refused with its name, the line and the reason, or it is taken and has the rows that its header says.
XMC text has a case or more of each class, the other text formats of each class that they can show; for matrices in .npz
see test_npz.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmc_midx.cli import app
from xmc_midx.data import files, table
from xmc_midx.data.check import check_dataset
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.formats import read_xmc, scan_xmc
from xmc_midx.data.pairs import scan_sparse
from xmc_midx.data.problems import raise_error
from xmc_midx.data.svmlight import scan_svmlight
from xmc_midx.errors import DataError

ROWS = [b"0,2 0:1 3:0.5", b" 1:-2", b"3 4:1.5e-2"]
Lines = list[bytes]


@dataclass(frozen=True)
class Damage:
    """One way to damage a file."""

    apply: Callable[[Lines, int], object]
    """Changes the lines, at the row of that line number where it is about a row; lines[line - 1] is `ROWS[0]`."""
    refused: str | None = None
    """What the message says after `file:line: `; None where the file is taken."""
    line: int | Callable[[int, int], int] | None = None
    """Of the message: a number, or made of the damaged line and of the number of rows; None: the damaged line."""
    row: tuple[list[int], dict[int, float]] | None = None
    """Labels and features of the row in a file that is taken; None: unchanged."""
    end: bytes = b"\n"
    pack: Callable[[bytes], bytes] = bytes
    suffix: str = ""


def header(text: bytes) -> Callable[[Lines, int], object]:
    """The header in other words; N is the number of rows."""
    return lambda lines, _: lines.__setitem__(0, text.replace(b"N", lines[0].split()[0]))


def row(text: bytes) -> Callable[[Lines, int], object]:
    """Another row in place of `0,2 0:1 3:0.5`."""
    return lambda lines, line: lines.__setitem__(line - 1, text)


def at_end(_: int, num_rows: int) -> int:
    return num_rows + 1


UNCHANGED = ([0, 2], {0: 1.0, 3: 0.5})

CLASSES: dict[str, list[Damage]] = {
    "header missing": [
        Damage(lambda lines, _: lines.pop(0), "the file starts with an instance, expected the header", 1),
        Damage(lambda lines, _: lines.clear(), "the file is empty, expected the header", 1, end=b""),
        Damage(header(b""), "the first line is '', expected the header", 1),
    ],
    "header extra": [
        Damage(header(b"N 5 4 7"), "the first line is 'N 5 4 7', expected the header", 1),
        Damage(lambda lines, _: lines.insert(1, b"3 5 4"), "'5' is not `id:value`.", 2),
        Damage(header(b"N 5"), "the first line is 'N 5', expected the header", 1),
    ],
    "header negative": [
        Damage(header(b"-1 5 4"), "the header says -1 instances, expected 0 to 2147483647.", 1),
        Damage(header(b"N -5 4"), "the header says -5 features, expected 1 to 2147483647.", 1),
        Damage(header(b"N 5 -4"), "the header says -4 labels, expected 1 to 2147483647.", 1),
    ],
    "header huge": [
        Damage(header(b"2147483648 5 4"), "the header says 2147483648 instances, expected 0 to", 1),
        Damage(header(b"N " + b"9" * 5000 + b" 4"), "the header says 9999999999", 1),
        Damage(header(b"2147483647 5 4"), "the file ends after N instances, the header says 2147483647", at_end),
        Damage(header(b"N 2147483647 2147483647"), row=UNCHANGED),
    ],
    "too few rows": [
        Damage(lambda lines, _: lines.pop(), "the file ends after M instances, the header says N.", lambda _, n: n),
        Damage(lambda lines, _: lines.__delitem__(slice(1, None)), "the file ends after 0 instances", 1),
    ],
    "too many rows": [
        Damage(lambda lines, _: lines.append(b"1 1:1"), "a row too many, the header says N.", lambda _, n: n + 2),
        Damage(lambda lines, _: lines.extend([b"", b" 1:1"]), "a row too many, the header says N", lambda _, n: n + 3),
        Damage(lambda lines, _: lines.extend([b"", b" \t"]), row=UNCHANGED),
    ],
    "ids out of range": [
        Damage(
            row(b"0 5:1"), "feature id 5 is outside 0..4 (the header says 5 features). Do the ids of this file start"
        ),
        Damage(
            row(b"0 7:1"), "feature id 7 is outside 0..4 (the header says 5 features). Is this the header of another"
        ),
        Damage(
            row(b"0,4 1:1"), "label 4 is outside 0..3 (the header says 4 labels). Do the ids of this file start from"
        ),
    ],
    "ids negative": [
        Damage(row(b"0 -1:1"), "feature id -1 is outside 0..4"),
        Damage(row(b"0,-1 1:1"), "label -1 is outside 0..3"),
        Damage(row(b"0 -0:1"), "feature id -0 is outside 0..4"),
    ],
    "ids beyond int32": [
        Damage(row(b"0 4294967297:1"), "feature id 4294967297 is outside 0..4"),
        Damage(row(b"2147483648 1:1"), "label 2147483648 is outside 0..3"),
    ],
    "ids beyond int64": [
        Damage(row(b"0 18446744073709551617:1"), "feature id 18446744073709551617 is outside 0..4"),
        Damage(row(b"9223372036854775808 1:1"), "label 9223372036854775808 is outside 0..3"),
        Damage(row(b"0 " + b"1" * 5000 + b":1"), "feature id 1111111111"),
    ],
    "unsorted": [
        Damage(row(b"2,0 3:0.5 0:1"), row=UNCHANGED),
        Damage(row(b"3,1,2,0 4:4 3:3 0:5 2:2 1:1"), row=([0, 1, 2, 3], {0: 5, 1: 1, 2: 2, 3: 3, 4: 4})),
    ],
    "duplicate feature": [
        Damage(row(b"0 1:1 1:1"), "feature id 1 occurs twice, expected once."),
        Damage(row(b"0 1:1 3:1 1:2"), "feature id 1 occurs twice, expected once."),
    ],
    "duplicate label": [
        Damage(row(b"2,2 1:1"), "label 2 occurs twice, expected once."),
        Damage(row(b"2,0,02 1:1"), "label 2 occurs twice, expected once."),
    ],
    "no label": [
        Damage(row(b" 0:1 3:0.5"), row=([], {0: 1.0, 3: 0.5})),
        Damage(row(b"0:1 3:0.5"), row=([], {0: 1.0, 3: 0.5})),
        Damage(row(b", 0:1"), "a label is missing."),
        Damage(row(b"0, 0:1"), "a label is missing."),
    ],
    "no feature": [
        Damage(row(b"0,2"), row=([0, 2], {})),
        Damage(row(b"0,2 "), row=([0, 2], {})),
        Damage(row(b"0,2 :1"), "a feature id is missing."),
    ],
    "blank row": [
        Damage(row(b""), row=([], {})),
        Damage(row(b" \t "), row=([], {})),
    ],
    "NaN, inf, 1e400": [
        Damage(row(b"0 3:nan"), "the value 'nan' of feature id 3 is not finite."),
        Damage(row(b"0 3:-NaN"), "the value '-NaN' of feature id 3 is not finite."),
        Damage(row(b"0 3:inf"), "the value 'inf' of feature id 3 is not finite."),
        Damage(row(b"0 3:-Infinity"), "the value '-Infinity' of feature id 3 is not finite."),
        Damage(row(b"0 3:1e400"), "the value '1e400' of feature id 3 is beyond the range of float32."),
        Damage(row(b"0 3:-1e39"), "the value '-1e39' of feature id 3 is beyond the range of float32."),
    ],
    "missing value": [
        Damage(row(b"0 3:"), "the value of feature id 3 is missing."),
        Damage(row(b"0 3: 4:1"), "the value of feature id 3 is missing."),
        Damage(row(b"0 3"), "'3' is not `id:value`."),
        Damage(row(b"0 3:-"), "the value '-' of feature id 3 is not a number."),
        Damage(row(b"0 3:1e"), "the value '1e' of feature id 3 is not a number."),
    ],
    "CRLF": [
        Damage(lambda lines, _: None, row=UNCHANGED, end=b"\r\n"),
        Damage(row(ROWS[0] + b"\r"), row=UNCHANGED),
        Damage(row(ROWS[0] + b"\r\r"), "the value '0.5\\r' of feature id 3 is not a number."),
        Damage(lambda lines, _: None, "the file starts with an instance, expected the header", 1, end=b"\r"),
    ],
    "BOM": [
        Damage(lambda lines, _: None, row=UNCHANGED, pack=lambda text: b"\xef\xbb\xbf" + text),
        Damage(row(b"\xef\xbb\xbf" + ROWS[0]), "byte 0xef in column 1 is no part of ASCII"),
        Damage(lambda lines, _: None, "the first line is", 1, pack=lambda text: text.decode().encode("utf-16")),
    ],
    "NUL": [
        Damage(row(b"0,2 0:1 3:\x000.5"), "the line holds a NUL byte, expected text."),
        Damage(row(b"\0" * 20), "the line holds a NUL byte, expected text."),
        Damage(row(ROWS[0] + b"\0"), "the line holds a NUL byte, expected text."),
    ],
    "tab": [
        Damage(row(b"0,2\t0:1\t3:0.5"), row=UNCHANGED),
        Damage(row(b"0,2 \t 0:1  3:0.5\t"), row=UNCHANGED),
        Damage(row(b"\t0:1"), row=([], {0: 1.0})),
        Damage(row(b"0,2\x0b0:1 3:0.5"), "'0,2\\x0b0' is not an integer, expected a feature id."),
    ],
    "comment": [
        Damage(row(ROWS[0] + b" # a note"), "the line holds a `#`, and the format has no comments."),
        Damage(row(b"# a note"), "the line holds a `#`, and the format has no comments."),
    ],
    "float label": [
        Damage(row(b"0,2.0 1:1"), "'2.0' is not an integer, expected a label."),
        Damage(row(b"2. 1:1"), "'2.' is not an integer, expected a label."),
        Damage(row(b"1e0 1:1"), "'1e0' is not an integer, expected a label."),
        Damage(row(b"+1 1:1"), "'+1' is not an integer, expected a label."),
    ],
    "not UTF-8": [
        Damage(row(ROWS[0] + b"\xff"), "byte 0xff in column 14 is no part of ASCII, expected numbers."),
        Damage(row(b"0 1:\xb2"), "byte 0xb2 in column 5 is no part of ASCII, expected numbers."),
    ],
    "cut gzip": [
        Damage(
            lambda lines, _: None,
            "the .gz stream is cut or damaged here",
            lambda _, n: n + 2,  # all the text is there, its checksum is not
            pack=lambda text: gzip.compress(text)[:-4],
            suffix=".gz",
        ),
        Damage(lambda lines, _: None, "is empty, expected a .gz stream.", 0, pack=lambda _: b"", suffix=".gz"),
        Damage(lambda lines, _: None, "is something else, expected a .gz stream.", 0, suffix=".gz"),
        Damage(lambda lines, _: None, "is a .gz stream, expected text.", 0, pack=gzip.compress),
    ],
}

OUT_OF_RANGE = "is outside 0..4 (the header says 5 features)."
HEADER_OF_TWO = "expected the header `num_instances num_features`."

FEATURES: dict[str, list[Damage]] = {
    "header missing": [
        Damage(lambda lines, _: lines.pop(0), f"the file starts with an instance, {HEADER_OF_TWO}", 1),
        Damage(lambda lines, _: lines.clear(), f"the file is empty, {HEADER_OF_TWO}", 1, end=b""),
    ],
    "header extra": [
        Damage(header(b"N 5 4"), "the first line is 'N 5 4', expected the header", 1),
        Damage(lambda lines, _: lines.insert(1, b"3 5"), "'3' is not `id:value`.", 2),
    ],
    "header negative": [Damage(header(b"N -5"), "the header says -5 features, expected 1 to 2147483647.", 1)],
    "header huge": [
        Damage(header(b"N 2147483648"), "the header says 2147483648 features, expected 1 to", 1),
        Damage(header(b"2147483647 5"), "the file ends after N instances, the header says 2147483647", at_end),
        Damage(header(b"N 2147483647"), row=UNCHANGED),
    ],
    "too few rows": [
        Damage(lambda lines, _: lines.pop(), "the file ends after M instances, the header says N.", lambda _, n: n)
    ],
    "too many rows": [
        Damage(lambda lines, _: lines.append(b"1:1"), "a row too many, the header says N.", lambda _, n: n + 2),
        Damage(lambda lines, _: lines.extend([b"", b" \t"]), row=UNCHANGED),
    ],
    "ids out of range": [
        Damage(row(b"5:1"), f"feature id 5 {OUT_OF_RANGE} Do the ids of this file start"),
        Damage(row(b"7:1"), f"feature id 7 {OUT_OF_RANGE} Is this the header of another"),
    ],
    "ids negative": [Damage(row(b"-1:1"), f"feature id -1 {OUT_OF_RANGE}")],
    "ids beyond int32": [Damage(row(b"4294967297:1"), f"feature id 4294967297 {OUT_OF_RANGE}")],
    "ids beyond int64": [Damage(row(b"18446744073709551617:1"), f"feature id 18446744073709551617 {OUT_OF_RANGE}")],
    "unsorted": [Damage(row(b"3:0.5 0:1"), row=UNCHANGED)],
    "duplicate feature": [Damage(row(b"0:1 3:1 0:2"), "feature id 0 occurs twice, expected once.")],
    "no feature": [Damage(row(b":1"), "a feature id is missing.")],
    "blank row": [Damage(row(b""), row=([0, 2], {})), Damage(row(b" \t "), row=([0, 2], {}))],
    "NaN, inf, 1e400": [
        Damage(row(b"3:nan"), "the value 'nan' of feature id 3 is not finite."),
        Damage(row(b"3:1e400"), "the value '1e400' of feature id 3 is beyond the range of float32."),
    ],
    "missing value": [
        Damage(row(b"3:"), "the value of feature id 3 is missing."),
        Damage(row(b"3"), "'3' is not `id:value`."),
    ],
    "CRLF": [Damage(lambda lines, _: None, row=UNCHANGED, end=b"\r\n")],
    "BOM": [Damage(lambda lines, _: None, row=UNCHANGED, pack=lambda text: b"\xef\xbb\xbf" + text)],
    "NUL": [Damage(row(b"0:1 3:\x000.5"), "the line holds a NUL byte, expected text.")],
    "tab": [Damage(row(b"\t0:1\t 3:0.5"), row=UNCHANGED)],
    "comment": [Damage(row(b"0:1 # a note"), "the line holds a `#`, and the format has no comments.")],
    "not UTF-8": [Damage(row(b"0:1 3:0.5\xff"), "byte 0xff in column 10 is no part of ASCII, expected numbers.")],
    "cut gzip": [
        Damage(
            lambda lines, _: None,
            "the .gz stream is cut or damaged here",
            lambda _, n: n + 2,
            pack=lambda text: gzip.compress(text)[:-4],
            suffix=".gz",
        )
    ],
}
LABELS: dict[str, list[Damage]] = {
    "header missing": [Damage(lambda lines, _: lines.pop(0), "the file starts with an instance, expected", 1)],
    "header huge": [Damage(header(b"N 2147483648"), "the header says 2147483648 labels, expected 1 to", 1)],
    "too few rows": [
        Damage(lambda lines, _: lines.pop(), "the file ends after M instances, the header says N.", lambda _, n: n)
    ],
    "ids out of range": [
        Damage(row(b"4:1"), "label 4 is outside 0..3 (the header says 4 labels). Do the ids of this file start from")
    ],
    "ids negative": [Damage(row(b"-1:1"), "label -1 is outside 0..3")],
    "unsorted": [Damage(row(b"2:1 0:1"), row=UNCHANGED)],
    "duplicate label": [Damage(row(b"2:1 2:1"), "label 2 occurs twice, expected once.")],
    "no label": [
        Damage(row(b""), row=([], {0: 1.0, 3: 0.5})),
        Damage(row(b"0,2"), "'0,2' is not `id:value`."),
    ],
    "NaN, inf, 1e400": [Damage(row(b"2:nan"), "the value 'nan' of label 2 is not finite.")],
    "missing value": [Damage(row(b"2:"), "the value of label 2 is missing.")],
    "float label": [Damage(row(b"2.0:1"), "'2.0' is not an integer, expected a label.")],
}
IDS_ARE_INT32 = "is outside 0..2147483646 (ids have 31 bits)."
SVMLIGHT: dict[str, list[Damage]] = {
    "header missing": [
        Damage(lambda lines, _: None, row=UNCHANGED),
        Damage(lambda lines, _: lines.clear(), "the file is empty, expected an instance", 1, end=b""),
    ],
    "header extra": [
        Damage(lambda lines, _: lines.insert(0, b"3 5 4"), "the first line is '3 5 4', a header", 1),
        Damage(lambda lines, _: lines.insert(0, b"3 5"), "'5' is not `id:value`.", 1),
    ],
    "header negative": [Damage(lambda lines, _: lines.insert(0, b"-3 5 4"), "label -3 is outside 0..", 1)],
    "ids negative": [
        Damage(row(b"0 -1:1"), f"feature id -1 {IDS_ARE_INT32}"),
        Damage(row(b"-1 1:1"), f"label -1 {IDS_ARE_INT32}"),
    ],
    "ids beyond int32": [
        Damage(row(b"0 2147483647:1"), f"feature id 2147483647 {IDS_ARE_INT32}"),
        Damage(row(b"4294967296 1:1"), f"label 4294967296 {IDS_ARE_INT32}"),
    ],
    "ids beyond int64": [Damage(row(b"0 18446744073709551617:1"), f"feature id 18446744073709551617 {IDS_ARE_INT32}")],
    "unsorted": [Damage(row(b"2,0 3:0.5 0:1"), row=UNCHANGED)],
    "duplicate feature": [Damage(row(b"0 1:1 3:1 1:2"), "feature id 1 occurs twice, expected once.")],
    "duplicate label": [Damage(row(b"2,0,02 1:1"), "label 2 occurs twice, expected once.")],
    "no label": [Damage(row(b"0:1 3:0.5"), row=([], {0: 1.0, 3: 0.5}))],
    "no feature": [Damage(row(b"0,2"), row=([0, 2], {})), Damage(row(b"0,2 :1"), "a feature id is missing.")],
    "blank row": [Damage(row(b""), row=([], {})), Damage(row(b" \t "), row=([], {}))],
    "NaN, inf, 1e400": [
        Damage(row(b"0 3:nan"), "the value 'nan' of feature id 3 is not finite."),
        Damage(row(b"0 3:1e400"), "the value '1e400' of feature id 3 is beyond the range of float32."),
    ],
    "missing value": [Damage(row(b"0 3:"), "the value of feature id 3 is missing.")],
    "CRLF": [Damage(lambda lines, _: None, row=UNCHANGED, end=b"\r\n")],
    "BOM": [Damage(lambda lines, _: None, row=UNCHANGED, pack=lambda text: b"\xef\xbb\xbf" + text)],
    "NUL": [Damage(row(b"0,2 0:1 3:\x000.5"), "the line holds a NUL byte, expected text.")],
    "tab": [Damage(row(b"0,2\t0:1\t3:0.5"), row=UNCHANGED)],
    "comment": [
        Damage(row(ROWS[0] + b" # a note, in UTF-8: \xc3\xa4"), row=UNCHANGED),
        Damage(row(b"0,2 qid:7 0:1 3:0.5#"), row=UNCHANGED),
        Damage(row(b"0,2 0:1 qid:x 3:0.5"), "'qid' is not an integer, expected a feature id."),
    ],
    "float label": [Damage(row(b"0,2.0 1:1"), "'2.0' is not an integer, expected a label.")],
    "not UTF-8": [Damage(row(ROWS[0] + b"\xff"), "byte 0xff in column 14 is no part of ASCII, expected numbers.")],
    "cut gzip": [
        Damage(
            lambda lines, _: None,
            "the .gz stream is cut or damaged here",
            lambda _, n: n + 1,
            pack=lambda text: gzip.compress(text)[:-4],
            suffix=".gz",
        )
    ],
}


@dataclass(frozen=True)
class Layout:
    """A format of the data, one file of which is damaged."""

    name: str
    """Of the damaged file."""
    cases: dict[str, list[Damage]]
    head: bytes | None
    """Its first line, N for the number of rows; None where it has none."""
    rows: list[bytes]
    beside: tuple[str, bytes, list[bytes]] | None = None
    """Name, first line and rows of the other file of a pair."""


FEATURE_ROWS, LABEL_ROWS = [b"0:1 3:0.5", b"1:-2", b"4:1.5e-2"], [b"0:1 2:1", b"", b"3:1.0"]
LAYOUTS = {
    "xmc": Layout("train.txt", CLASSES, b"N 5 4", ROWS),
    "features": Layout("trn_X_Xf.txt", FEATURES, b"N 5", FEATURE_ROWS, ("trn_X_Y.txt", b"N 4", LABEL_ROWS)),
    "labels": Layout("trn_X_Y.txt", LABELS, b"N 4", LABEL_ROWS, ("trn_X_Xf.txt", b"N 5", FEATURE_ROWS)),
    "svmlight": Layout("train.svm", SVMLIGHT, None, ROWS),
}
CASES = [
    pytest.param(layout, damage, id=f"{kind}-{name}-{number}")
    for kind, layout in LAYOUTS.items()
    for name, cases in layout.cases.items()
    for number, damage in enumerate(cases)
]
SIZES = {"short": (3, 2), "long": (6000, 4001)}
"""Rows, and the number of the damaged line."""


@pytest.fixture(autouse=True)
def quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SHORT_BYTES", 0)
    monkeypatch.setattr(files, "CHUNK_BYTES", 10_000)  # the long file has seven chunks


def sound(layout: Layout, num_rows: int) -> Lines:
    """The lines of a file, the header first."""
    head = [] if layout.head is None else [layout.head.replace(b"N", b"%d" % num_rows)]
    return [*head, *(layout.rows[row % 3] for row in range(num_rows))]


def make(directory: Path, layout: Layout, damage: Damage, size: str) -> tuple[Path, str]:
    """The file to read, one of whose files has that damage, and the beginning of the message."""
    num_rows, line = SIZES[size]
    line -= layout.head is None
    lines = sound(layout, num_rows)
    damage.apply(lines, line)
    path = directory / f"{layout.name}{damage.suffix}"
    path.write_bytes(damage.pack(b"".join(text + damage.end for text in lines)))
    place = damage.line(line, num_rows) if callable(damage.line) else line if damage.line is None else damage.line
    reason = re.sub(r"'N 5", f"'{num_rows} 5", damage.refused or "")
    reason = re.sub(r"\bN\b", str(num_rows), re.sub(r"\bM\b", str(num_rows - 1), reason))
    message = f"{path}:{place}: {reason}" if place else f"{path}: {reason}"
    if layout.beside:
        name, head, rows = layout.beside
        other = directory / name
        other.write_bytes(b"".join(text + b"\n" for text in sound(Layout(name, {}, head, rows), num_rows)))
        path = next(file for file in (path, other) if "_X_Xf" in file.name)
    return path, message


def scan(path: Path, layout: Layout, *, line_by_line: bool) -> tuple[csr_matrix, csr_matrix]:
    """Features and labels, in one of the two ways of the text readers."""
    if layout.beside:
        features, labels = (path, path.with_name(layout.beside[0]))
        if "_X_Y" in layout.name:
            features, labels = path, next(path.parent.glob("*_X_Y.txt*"))
        rows = scan_sparse(features, raise_error, line_by_line=line_by_line)
        positives = scan_sparse(labels, raise_error, column="label", line_by_line=line_by_line)
        assert rows is not None and positives is not None
        return rows.matrix, positives.matrix
    found = (scan_svmlight if layout.head is None else scan_xmc)(path, raise_error, line_by_line=line_by_line)
    assert found is not None
    return found.features, found.labels


def test_these_are_the_26_classes() -> None:
    assert len(CLASSES) == 26
    assert all(layout.cases.keys() <= CLASSES.keys() for layout in LAYOUTS.values())


@pytest.mark.fault("R8")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("layout", "damage"), CASES)
def test_damage_has_its_outcome(tmp_path: Path, layout: Layout, damage: Damage, size: str) -> None:
    path, message = make(tmp_path, layout, damage, size)
    num_rows, line = SIZES[size]
    if damage.refused is None:
        expected_labels, expected_features = damage.row or UNCHANGED
        for line_by_line in (False, True):
            features, labels = scan(path, layout, line_by_line=line_by_line)
            assert features.shape[0] == labels.shape[0] == num_rows
            row_features, row_labels = features[[line - 2]], labels[[line - 2]]
            assert row_labels.indices.tolist() == expected_labels
            assert (
                dict(zip(row_features.indices.tolist(), row_features.data.tolist(), strict=True)) == expected_features
            )
            # Its neighbours are where they were.
            if line < num_rows:
                assert features[[line - 1]].data.tolist() == [-2.0]
                assert features[[line]].data.tolist() == [np.float32(0.015)]
        assert load_dataset(tmp_path).split("train").num_instances == num_rows
        return
    for line_by_line in (False, True):
        with pytest.raises(DataError) as caught:
            scan(path, layout, line_by_line=line_by_line)
        assert str(caught.value).startswith(message)
        assert len(str(caught.value)) < len(str(path)) + 330
    with pytest.raises(DataError, match=re.escape(message)):
        load_dataset(tmp_path)


@pytest.mark.fault("R8")
@pytest.mark.parametrize(("layout", "damage"), CASES)
def test_the_command_line_says_so_with_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Layout, damage: Damage
) -> None:
    path, message = make(tmp_path, layout, damage, "short")
    exit_code = app.run(["check", str(path), "--json"])
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert shown.err == ""
    # Sizes that nothing fills can be read, and are what no training takes.
    is_refused = damage.refused is not None or b" 2147483647" in path.read_bytes().partition(b"\n")[0]
    assert exit_code == (3 if is_refused else 0)
    assert report["ok"] == (not is_refused)
    if damage.refused:
        first = next(problem for problem in report["problems"] if problem["level"] == "error")
        place = first["file"] if first["line"] is None else f"{first['file']}:{first['line']}"
        found = f"{place}: {first['text']} {first['hint'] or ''}"
        assert found.startswith(message)
        assert len(report["problems"]) < 10


@pytest.mark.fault("R8")
@pytest.mark.parametrize("size", [3, 200])
def test_a_file_cut_at_every_byte_is_refused_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, record_property: Callable[[str, int], None]
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    whole = b"\n".join([*sound(LAYOUTS["xmc"], size), b""])
    path = tmp_path / "train.txt"
    path.write_bytes(whole)
    features, labels = read_xmc(path)
    taken = []
    lengths = range(0, len(whole), 1 if size == 3 else 3)
    record_property("count", len(lengths))
    for length in lengths:
        path.write_bytes(whole[:length])
        try:
            cut_features, cut_labels = read_xmc(path)
        except DataError as error:
            assert re.match(rf"{re.escape(str(path))}:\d+: ", str(error))
            continue
        taken.append(length)
        assert cut_features.shape == features.shape and cut_labels.shape == labels.shape
        assert (cut_features[: size - 1] != features[: size - 1]).nnz == 0
        assert (cut_labels[: size - 1] != labels[: size - 1]).nnz == 0
    # Text has no checksum: a cut inside the last row's numbers can look like a whole file, and `check` warns of it.
    last_row = len(whole) - 1 - len(whole.rsplit(b"\n", 2)[-2])
    assert all(length > last_row for length in taken)
    path.write_bytes(whole[:-1])
    assert [problem.kind for problem in check_dataset(path).problems if "newline" in problem.text] == ["final-newline"]
