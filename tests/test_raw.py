"""Claims about `xmc_midx.data.raw`: what TSV, CSV and JSON lines hold, and the place and words of each fault."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xmc_midx.data import raw
from xmc_midx.data.raw import TextLayout, read_names, read_texts, text_form
from xmc_midx.errors import DataError, UsageError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(path: Path, **layout) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(record.line, record.text, record.labels) for record in read_texts(path, TextLayout(**layout))]


# ------------------------------------------------------------------------- what is read


def test_tsv_is_labels_tab_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'red, dark blue\tan apple, "quoted\n3\t  two  \n\tno labels\n7\t\n')
    assert pairs(path) == [
        (1, 'an apple, "quoted', ("red", "dark blue")),
        (2, "  two  ", ("3",)),
        (3, "no labels", ()),
        (4, "", ("7",)),
    ]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_a_byte_order_mark_windows_lines_no_last_newline_and_blank_lines_at_the_end(name: str, tmp_path: Path) -> None:
    lines = {
        "a.tsv": ["x,y\tone", "z\ttwo"],
        "a.csv": ["text,labels", 'one,"x,y"', "two,z"],
        "a.jsonl": ['{"text": "one", "labels": ["x", "y"]}', '{"text": "two", "labels": ["z"]}'],
    }[name]
    expected = [("one", ("x", "y")), ("two", ("z",))]
    for content in (
        "\n".join(lines),
        "\ufeff" + "\r\n".join([*lines, ""]),
        "\n".join([*lines, "", "  " if name != "a.csv" else "", ""]),
    ):
        found = pairs(write(tmp_path / name, content))
        assert [(text, labels) for _, text, labels in found] == expected


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files(suffix: str, opener, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.tsv{suffix}", opener.compress(b"x\tone\n"))
    assert pairs(path) == [(1, "one", ("x",))]
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"a\.tsv\S+:\d: the \S+ stream is cut or damaged"):
        pairs(path)


def test_csv_equals_the_standard_library_on_random_tables(tmp_path: Path) -> None:
    """Fields with quotes, delimiters and newlines; the line of a record is where it begins."""
    rng = np.random.default_rng(0)
    for case in range(60):
        delimiter = ",;\t|"[case % 4]
        texts = ["".join(rng.choice(list('ab ,;\t|"\n'), rng.integers(0, 12))) for _ in range(rng.integers(1, 9))]
        rows = [["x", text, "l1/l2"] for text in texts]
        path = tmp_path / "a.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([["id", "text", "label"], *rows])
        found = pairs(path, delimiter=delimiter, label_separator="/")
        assert [(text, labels) for _, text, labels in found] == [(text, ("l1", "l2")) for text in texts]
        starts = 2 + np.cumsum([0, *(text.count("\n") + 1 for text in texts[:-1])])
        assert [line for line, _, _ in found] == starts.tolist()


def test_columns_by_name_in_csv_tsv_and_jsonl(tmp_path: Path) -> None:
    layout = {"text_columns": ("title", "body"), "label_column": "tags", "label_separator": " "}
    expected = [("a b", ("x", "y")), ("c ", ())]
    table = [["tags", "title", "id", "body"], ["x  y", "a", "1", "b"], ["", "c", "2", ""]]
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(tmp_path / name, "\n".join(mark.join(row) for row in table))
        assert [(text, labels) for _, text, labels in pairs(path, **layout)] == expected
    records = [{"title": "a", "body": "b", "tags": ["x", "y"]}, {"title": "c", "body": None, "tags": []}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    assert [(text, labels) for _, text, labels in pairs(path, **layout)] == expected


def test_the_xmc_repository_s_json(tmp_path: Path) -> None:
    lines = [
        '{"uid": "A1", "title": "Apple pie", "content": "of apples", "target_ind": [3, 17, 5], '
        '"target_rel": [1.0, 0.0, 0.5]}',
        '{"uid": "A2", "title": "Pear", "target_ind": [], "target_rel": []}',
        '{"uid": "A3", "title": "Fig", "content": "", "target_ind": [7], "target_rel": [1]}',
    ]
    path = write(tmp_path / "trn.json.gz", gzip.compress("\n".join(lines).encode()))
    assert pairs(path) == [(1, "Apple pie of apples", ("3", "5")), (2, "Pear", ()), (3, "Fig ", ("7",))]
    titles = [" red ", "two\tcolumns\nand lines", "", "x" * 2000, "\ud800"]
    lines = [json.dumps({"uid": "L", "title": title}) for title in titles]
    names = write(tmp_path / "lbl.json.gz", gzip.compress("\n".join(lines).encode()))
    assert list(read_names(names)) == ["red", "two columns and lines", "2", "x" * 2000, "?"]
    with pytest.raises(DataError, match=r":1: has no key 'title'"):
        list(read_names(write(tmp_path / "lbl.json", '{"uid": "L"}')))


def test_numbers_and_strings_of_json_are_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"text": "a", "label": [3, "x y", "0"]}')
    assert pairs(path) == [(1, "a", ("3", "x y", "0"))]


def test_the_name_says_the_form(tmp_path: Path) -> None:
    names = {"a.tsv": "tsv", "a.TXT.gz": "tsv", "b.csv.xz": "csv", "c.jsonl": "jsonl", "trn.json.gz": "jsonl"}
    assert {name: text_form(Path(name)) for name in names} == names
    for name in ("a", "a.gz", "a.xlsx", "a.parquet"):
        with pytest.raises(UsageError, match=r"expected \.tsv, \.csv or \.jsonl"):
            text_form(Path(name))
    assert pairs(write(tmp_path / "a.dat", "x\tone"), form="tsv") == [(1, "one", ("x",))]


def test_the_label_of_very_many_that_stands_twice_is_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(",".join(map(str, [*range(90_000), 89_999])) + "\ttext\n")
    began = time.process_time()
    with pytest.raises(DataError, match="the label '89999' stands there twice"):
        list(read_texts(path))
    assert time.process_time() - began < 5  # each counted by itself: minutes


def test_a_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "x\tone\n" * 500_000 + "wrong\n")
    records = read_texts(path)
    assert next(records).text == "one"
    with pytest.raises(DataError, match=":500001: has no tab"):
        for _ in records:
            pass


# --------------------------------------------------------------------------- the faults

TSV_FAULTS = {
    "x\tone\nx two\n": ":2: has no tab, expected labels TAB text.",
    "a,b one\n": "Is it CSV?",
    '{"text": "a"}\n': "Is it JSON lines?",
    "1\tx\tone\n": ":1: has 3 columns",
    "labels\ttext\n": "is a head line",
    "text\tlabels\nx\tone": "is a head line",
    "x\tone\n\nx\ttwo\n": ":2: the line is blank",
    "x\tone\n \nx\ttwo\n": ":2: the line is blank",
    "x,,y\tone\n": ":1: a label is empty",
    "x,\tone\n": ":1: a label is empty",
    "x, x\tone\n": ":1: the label 'x' stands there twice",
    "x\x01y\tone\n": "'x\\x01y' holds a control character",
    f"{'x' * 501}\tone\n": "has 501 characters, expected at most 500. Are the columns swapped",
    b"x\tone\nx\tcaf\xe9\n": ":2: 'x\\tcaf\\xe9' is not UTF-8.",
    "x\tone\n".encode("utf-16"): "Is it UTF-16?",
    b"x\tone\0two\n": ":1: holds a NUL byte",
}
CSV_FAULTS = {
    "": "is empty, expected a head line",
    "body,tags\na,b\n": "has the columns 'body', 'tags'; expected 'text' and 'labels' (or 'label').",
    "text;labels\na;b\n": "Is the delimiter ';'? --delimiter ';'.",
    "text\tlabels\na\tb\n": "Is the delimiter a tab? --delimiter tab.",
    "text,text,label\na,b,c\n": "has several columns 'text'",
    "text,label\na,x\na,b,x\n": ":3: has 3 fields, expected 2 as in the head line. Does a field hold ',' outside",
    "text,label\na\n": ":2: has 1 fields, expected 2",
    "text,label\na,x\n\nb,x\n": ":3: the line is blank",
    'text,label\na,x\n"a\nb,x\nc,x\n': ':3: the record is no CSV (unexpected end of data). Is a quote " not closed?',
    'text,label\n"a "b" c",x\n': "A quote inside a quoted field is written twice",
    "text,label\ra,x\r": "carriage returns",
    'text,label\n"a\n\xe9",x\n'.encode("latin-1"): ":3: ",
}
JSON_FAULTS = {
    '{"text": "a", "labels": [1]}\n{"text": "a"\n': ":2: is not JSON (expecting ',' delimiter).",
    "[\n{}\n]": "jq -c '.[]' makes that of an array",
    '[{"text": "a", "labels": []}]': "is a list, expected an object a line.",
    '"a"': "is the string 'a', expected an object",
    '{"body": "a", "tags": []}': "has the keys 'body', 'tags'; expected 'text' (or 'title') and 'labels' (or",
    '{"text": "a", "labels": []}\n{"labels": []}': ":2: has no key 'text'.",
    '{"text": "a", "labels": []}\n{"text": "b"}': ":2: has no key 'labels'.",
    '{"text": 3, "labels": []}': "'text' is the number 3, expected a string",
    '{"text": "a", "labels": "x,y"}': "'labels' is the string 'x,y', expected a list",
    '{"text": "a", "labels": [true]}': "'labels' holds true",
    '{"text": "a", "labels": [1.0]}': "'labels' holds the number 1.0",
    '{"text": "a", "labels": [[1]]}': "'labels' holds a list",
    '{"text": "a", "labels": [1, "1"]}': "the label '1' stands there twice",
    '{"text": "a", "labels": [" "]}': "a label is empty",
    '{"text": "a", "labels": ["a\\nb"]}': "holds a control character",
    '{"text": "a", "labels": ["\\ud800"]}': "holds a control character",
    '{"title": "a", "target_ind": [1, 2], "target_rel": [1]}': "'target_rel' is 1 values, expected one for each of 2",
    '{"title": "a", "target_ind": [1], "target_rel": [-1]}': "'target_rel' holds the number -1",
    '{"title": "a", "target_ind": [1], "target_rel": [NaN]}': "'target_rel' holds the number nan",
    '{"text": "a", "labels": [' + "9" * 5000 + "]}": "a number too long",
    "[" * 100_000: ":1: is not JSON",
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (name, content, message)
        for name, faults in (("a.tsv", TSV_FAULTS), ("a.csv", CSV_FAULTS), ("a.jsonl", JSON_FAULTS))
        for content, message in faults.items()
    ],
)
@pytest.mark.fault("R8")
def test_each_fault_is_refused_with_its_place(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        pairs(path)
    assert str(caught.value).startswith(f"{path}:")
    assert message in str(caught.value)


def test_limits_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MAX_LABELS", 3)
    with pytest.raises(DataError, match=r":1: has 4 labels, expected at most 3\."):
        pairs(write(tmp_path / "a.tsv", "a,b,c,d\tone"))
    monkeypatch.setattr(raw, "MAX_LINE_BYTES", 1000)
    limit = csv.field_size_limit()
    with pytest.raises(DataError, match=r":3: the record is no CSV \(field larger than field limit \(1000\)\)"):
        pairs(write(tmp_path / "a.csv", 'text,labels\na,x\n"' + "b\n" * 1000))
    assert csv.field_size_limit() == limit
    # The module's own limit is 131,072.
    monkeypatch.undo()
    assert pairs(write(tmp_path / "a.csv", f"text,labels\n{'b' * 200_000},x"))[0][1] == "b" * 200_000


@pytest.mark.parametrize(
    "layout", [{"delimiter": ""}, {"delimiter": ";;"}, {"delimiter": '"'}, {"label_separator": ""}]
)
def test_delimiters_that_cannot_be_one(layout: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="expected one"):
        TextLayout(**layout)


@pytest.mark.parametrize("num_files", [600, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.fault("R8")
def test_fuzzed_files_are_read_or_refused(num_files: int, tmp_path: Path, record_property: Callable[..., None]) -> None:
    """Bytes changed, lost and doubled: a record for every line that is there, or an error with a place."""
    rng = np.random.default_rng(3)
    sound = {
        "a.tsv": b"x,y\tone two\nz\tthree\n\tfour\n",
        "a.csv": b'text,labels\n"one, ""two""","x,y"\nthree,z\nfour,\n',
        "a.jsonl": b'{"text": "one", "labels": ["x", "y"]}\n{"text": "three", "labels": [3]}\n',
    }
    outcomes = {"read": 0, "refused": 0}
    for case in range(num_files):
        name = list(sound)[case % 3]
        content = bytearray(sound[name])
        for _ in range(rng.integers(1, 3)):
            place = int(rng.integers(len(content)))
            if rng.random() < 0.5:
                content[place] = rng.choice(np.frombuffer(b'\t\n\r",;\x00\xff{}[]1a ', dtype=np.uint8))
            else:
                del content[place : place + int(rng.integers(1, 4))]
        path = write(tmp_path / name, bytes(content))
        try:
            records = pairs(path)
        except DataError as error:
            assert str(error).startswith(f"{path}:")
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            if name != "a.csv":
                assert len(records) == len([line for line in bytes(content).split(b"\n") if line.strip(b" \r")])
    assert min(outcomes.values()) > num_files / 6
    record_property("count", num_files)
