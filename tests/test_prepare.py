"""Claims about `xmc_midx.data.prepare` and `labelset`: raw text -> a dataset directory that is whole or absent."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from sklearn.feature_extraction.text import TfidfVectorizer

from xmc_midx.cli import app
from xmc_midx.crash import POINTS
from xmc_midx.data import prepare as module
from xmc_midx.data.check import check_dataset
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.labelset import read_label_names
from xmc_midx.data.prepare import prepare
from xmc_midx.data.raw import TextLayout
from xmc_midx.data.vocabulary import Vocabulary
from xmc_midx.errors import DataError, ResourceError, UsageError
from xmc_midx.types import SilentReporter

WORDS = [f"word{n}" for n in range(40)]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def corpus(num_instances: int, seed: int, *, names: bool = True) -> list[tuple[list[str], str]]:
    """(labels, text) of some instances: each label has a word of its own; some have no label, some no word."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_instances):
        labels = rng.choice(12, rng.integers(0, 4), replace=False)
        words = [WORDS[label] for label in labels] + rng.choice(WORDS[12:], rng.integers(0, 6)).tolist()
        rows.append(([f"topic {label}" if names else str(label) for label in labels], " ".join(words)))
    return rows


def tsv(path: Path, rows: list[tuple[list[str], str]]) -> Path:
    return write(path, *(f"{','.join(labels)}\t{text}" for labels, text in rows))


class Messages(SilentReporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


# ----------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize("compress", [False, True])
def test_the_directory_holds_what_scikit_learn_and_the_rows_say(compress: bool, tmp_path: Path) -> None:
    train, test = corpus(101, 0), corpus(37, 1)
    files = tsv(tmp_path / "a.tsv", train), tsv(tmp_path / "b.tsv", test)
    out = tmp_path / "data sets" / "mine"
    result = prepare(files[0], output=out, test=files[1], compress=compress)
    suffix = ".txt.gz" if compress else ".txt"
    assert sorted(path.name for path in out.iterdir()) == sorted(result.files)
    assert {f"{name}{suffix}" for name in ("train", "test", "labels", "vocabulary")} == set(result.files)
    dataset = load_dataset(out)
    theirs = TfidfVectorizer(token_pattern=r"[^\W_]{2,}", sublinear_tf=True, min_df=2)
    expected = theirs.fit_transform([text for _, text in train])
    np.testing.assert_allclose(dataset.split("train").features.toarray(), expected.toarray(), atol=1e-6)
    expected = theirs.transform([text for _, text in test])
    np.testing.assert_allclose(dataset.split("test").features.toarray(), expected.toarray(), atol=1e-6)
    names = dataset.label_names
    assert names is not None and list(names) == sorted({label for labels, _ in train for label in labels})
    for split, rows in (("train", train), ("test", test)):
        labels = dataset.split(split).labels
        assert [{names[label] for label in labels[[i]].indices} for i in range(len(rows))] == [set(r) for r, _ in rows]
    vocabulary = dataset.vocabulary
    assert vocabulary is not None and vocabulary.tokens == tuple(theirs.get_feature_names_out())
    np.testing.assert_array_equal(
        vocabulary.transform([text for _, text in train]).toarray(), dataset.split("train").features.toarray()
    )
    assert result.train.num_instances == 101 and result.test is not None and result.test.num_instances == 37
    assert result.train.num_without_labels == sum(not labels for labels, _ in train) > 0
    assert result.train.num_empty_texts == sum(not text for _, text in train) > 0
    assert (result.num_features, result.num_labels) == (dataset.num_features, 12)
    assert check_dataset(out).ok


def test_the_same_data_in_three_forms_gives_the_same_directory(tmp_path: Path) -> None:
    rows = corpus(60, 2)
    tsv(tmp_path / "a.tsv", rows)
    write(tmp_path / "a.csv", "labels,text", *(f'"{",".join(labels)}",{text}' for labels, text in rows))
    write(tmp_path / "a.jsonl", *(json.dumps({"text": text, "labels": labels}) for labels, text in rows))
    contents = []
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        prepare(tmp_path / name, output=tmp_path / f"{name}.out")
        contents.append({path.name: path.read_bytes() for path in (tmp_path / f"{name}.out").iterdir()})
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"min_document_frequency": 5}, {"min_df": 5}),
        ({"max_features": 7}, {"min_df": 2, "max_features": 7}),
        ({"max_ngram": 2}, {"min_df": 2, "ngram_range": (1, 2)}),
        ({"max_ngram": 3, "min_document_frequency": 1}, {"ngram_range": (1, 3)}),
    ],
)
def test_options_of_the_vocabulary(options: dict[str, int], theirs: dict[str, object], tmp_path: Path) -> None:
    rows = corpus(80, 3)
    prepare(tsv(tmp_path / "a.tsv", rows), output=tmp_path / "out", **options)
    dataset = load_dataset(tmp_path / "out")
    vectorizer = TfidfVectorizer(token_pattern=r"[^\W_]{2,}", sublinear_tf=True, **theirs)
    expected = vectorizer.fit_transform([text for _, text in rows])
    assert dataset.vocabulary is not None and dataset.vocabulary.max_ngram == options.get("max_ngram", 1)
    assert dataset.vocabulary.tokens == tuple(vectorizer.get_feature_names_out())
    np.testing.assert_allclose(dataset.split("train").features.toarray(), expected.toarray(), atol=1e-6)


def test_a_fraction_is_held_out_by_text(tmp_path: Path) -> None:
    rows = [([f"t{n // 2}"], f"text number {n // 2} of many") for n in range(2000)]  # each text twice, with a label
    first = prepare(tsv(tmp_path / "a.tsv", rows), output=tmp_path / "a", test_fraction=0.2)
    assert first.test is not None
    assert first.train.num_instances + first.test.num_instances == 2000
    assert 300 < first.test.num_instances < 500
    # Each label is on one side alone, and so is its text.
    assert first.num_unseen_labels == first.test.num_instances // 2
    # Another order, the same split; another seed, another split.
    again = prepare(tsv(tmp_path / "b.tsv", rows[::-1]), output=tmp_path / "b", test_fraction=0.2)
    assert again.test == first.test
    lines = [sorted((tmp_path / name / "test.txt").read_text().splitlines()) for name in "ab"]
    assert lines[0] == lines[1]
    prepare(tmp_path / "a.tsv", output=tmp_path / "c", test_fraction=0.2, seed=1)
    assert sorted((tmp_path / "c" / "test.txt").read_text().splitlines()) != lines[0]


# ------------------------------------------------------------------------------------- labels


def test_ids_stay_and_names_are_sorted_with_those_of_the_test_split_last(tmp_path: Path) -> None:
    ids = write(tmp_path / "ids.tsv", "7,0\tan apple", "3\tan apple")
    result = prepare(ids, output=tmp_path / "ids")
    assert (result.num_labels, result.label_kind) == (8, "ids")
    assert load_dataset(tmp_path / "ids").split().labels.indices.tolist() == [0, 7, 3]
    assert not (tmp_path / "ids" / "labels.txt").exists()
    names = write(tmp_path / "names.tsv", "b,Z\tan apple", "ä,a\tan apple")
    test = write(tmp_path / "test.tsv", "Y,b\tan apple", "A\tan apple")
    result = prepare(names, output=tmp_path / "names", test=test)
    assert load_dataset(tmp_path / "names").label_names == ("Z", "a", "b", "ä", "A", "Y")
    assert (result.num_labels, result.label_kind, result.num_unseen_labels) == (6, "names", 2)
    assert load_dataset(tmp_path / "names").split("test").labels.indices.tolist() == [2, 5, 4]


def test_numbers_are_names_where_that_is_said_or_a_zero_leads(tmp_path: Path) -> None:
    numbers = write(tmp_path / "a.tsv", "2001,1999\tan apple", "10\tan apple")
    prepare(numbers, output=tmp_path / "a", label_kind="names")
    assert load_dataset(tmp_path / "a").label_names == ("10", "1999", "2001")
    prepare(write(tmp_path / "b.tsv", "007,040118932\tan apple", "x\tan apple"), output=tmp_path / "b")
    assert load_dataset(tmp_path / "b").label_names == ("007", "040118932", "x")


def test_a_list_of_names_fixes_the_ids(tmp_path: Path) -> None:
    listed = write(tmp_path / "names.txt", "red", "1\tgreen", "blue")
    prepare(write(tmp_path / "a.tsv", "blue\tan apple", "red\tan apple"), output=tmp_path / "a", label_names=listed)
    prepare(write(tmp_path / "b.tsv", "2\tan apple", "0\tan apple"), output=tmp_path / "b", label_names=listed)
    json_names = write(tmp_path / "lbl.json", *(json.dumps({"title": name}) for name in ("red", "green", "blue")))
    prepare(tmp_path / "b.tsv", output=tmp_path / "c", label_names=json_names)
    for name in "abc":
        dataset = load_dataset(tmp_path / name)
        assert dataset.label_names == ("red", "green", "blue")
        assert dataset.split().labels.indices.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["1\tan a", "red\tan a"], {}, "a.tsv:2: the label 'red' is a name, but line 1 has the id 1"),
        (["red\tan a", "1\tan a"], {}, "--label-kind names takes numbers for names as well"),
        (["1;2\tan a", "3\tan a"], {}, "--label-separator ';'"),
        (["3\tan a", "7\tan a"], {"label_names": True}, r"a.tsv:1: the label '3' is outside 0..2, the lines of"),
        (["red\tan a", "pink\tan a"], {"label_names": True}, "a.tsv:2: the label 'pink' is not in"),
        (["red\tan a", "1\tan a"], {"label_kind": "ids"}, "a.tsv:1: the label 'red' is no id"),
        (["2147483647\tan a"] * 2, {}, "is outside 0..2147483646"),
        ([f"{'9' * 400}\tan a"] * 2, {}, "is outside 0..2147483646"),
        (["\tan a", "\tan a"], {}, "a.tsv: no instance has a label, so there is nothing to learn"),
        (["x\tan a", "x\tb c"], {}, "No token is in 2 of the 2 texts"),
        ([], {}, "a.tsv: holds no instance"),
        (["x\tan a", "x"], {}, "a.tsv:2: has no tab"),
        (["x\tan a"] * 2, {"test": True}, "b.tsv:2: a label is empty"),
        (["x\tan a"] * 3, {"test_fraction": 0.0001}, "no instance was held out as the test split"),
        (
            ["x\tan a"] * 3,
            {"test_fraction": 0.9999},
            "no instance is left to train on when 0.9999 of them are the test split",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_left(
    lines: list[str], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    if "label_names" in options:
        options = options | {"label_names": write(tmp_path / "names.txt", "red", "green", "blue")}
    if "test" in options:
        options = options | {"test": write(tmp_path / "b.tsv", "x\tan a", "x,,y\tan a")}
    path = write(tmp_path / "a.tsv", *lines)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as caught:
        prepare(path, output=tmp_path / "out", **options)
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_that_stands_twice_in_the_list_is_refused_for_names_alone(tmp_path: Path) -> None:
    listed = write(tmp_path / "names.txt", "red", "blue", "red")
    with pytest.raises(DataError, match=r"names.txt:3: the name 'red' stands in line 1 already \(2 times in all\)"):
        prepare(write(tmp_path / "a.tsv", "blue\tan a", "red\tan a"), output=tmp_path / "a", label_names=listed)
    prepare(write(tmp_path / "b.tsv", "1\tan a", "2\tan a"), output=tmp_path / "b", label_names=listed)
    with pytest.raises(DataError, match="is empty"):
        read_label_names(write(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,5\tan a", "2\tan a"], "no instance has the label 0"),
        (["0\tan a", "99999\tan a"], "the ids go up to 99,999, but 2 labels occur"),
        (["a;b\tan a", "c;d\tan a"], "--label-separator ';'"),
    ],
)
def test_what_is_worth_a_look_is_said(lines: list[str], message: str, tmp_path: Path) -> None:
    messages = Messages()
    prepare(write(tmp_path / "a.tsv", *lines), output=tmp_path / "out", reporter=messages)
    assert len(messages.texts) == 1 and message in messages.texts[0]
    messages.texts.clear()
    prepare(write(tmp_path / "b.tsv", "0,1\tan a", "2\tan a"), output=tmp_path / "fine", reporter=messages)
    assert messages.texts == []


# ------------------------------------------------------------------------------- the directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tsv(tmp_path / "a.tsv", corpus(30, 5))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_that_holds_something_stays_as_it_is(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prepare(text, output=out)  # an empty one is taken
    before = contents(out)
    with pytest.raises(UsageError, match=r"out: is not empty \(labels.txt, ...\). Choose another .* or --force"):
        prepare(text, output=out)
    (out / "thesis.doc").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="Choose another directory"):
            prepare(text, output=out, force=force)
    assert contents(out) == before | {"thesis.doc": b"mine"}
    (out / "thesis.doc").unlink()
    prepare(text, output=out, force=True, min_document_frequency=1, compress=True)
    assert set(contents(out)) == {"train.txt.gz", "labels.txt.gz", "vocabulary.txt.gz"}
    with pytest.raises(DataError):
        prepare(write(tmp_path / "bad.tsv", "x"), output=out, force=True)
    assert set(contents(out)) == {"train.txt.gz", "labels.txt.gz", "vocabulary.txt.gz"}
    with pytest.raises(DataError):
        prepare(tmp_path / "bad.tsv", output=tmp_path / "new" / "er" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "bad.tsv", "out"]


@pytest.mark.parametrize("role", ["text", "test", "label_names"])
def test_a_directory_that_holds_an_input_is_not_replaced(role: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    inside = out / "train.txt"
    inside.write_bytes(text.read_bytes())
    inputs = {"text": text, role: inside}
    with pytest.raises(UsageError, match=r"train.txt: lies in .*mine, which is made or replaced as a whole"):
        prepare(inputs.pop("text"), output=out, force=True, **inputs)
    assert contents(out) == {"train.txt": text.read_bytes()}


def test_filter_files_beside_the_texts_come_along_where_ids_stay(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    texts = [f'{{"title": "word{i % 3} word", "target_ind": [{i % 4}]}}\n' for i in range(12)]
    (raw / "trn.json").write_text("".join(texts))
    (raw / "tst.json").write_text("".join(texts[:5]))
    (raw / "lbl.json").write_text("".join(f'{{"title": "label {i}"}}\n' for i in range(4)))
    (raw / "filter_labels_train.txt").write_text("0 1\n11 3\n")
    (raw / "filter_labels_test.txt").write_text("4 2\n")
    options: dict[str, Any] = {"test": raw / "tst.json", "label_names": raw / "lbl.json"}
    out = tmp_path / "out"
    for force in (False, True):
        prepare(raw / "trn.json", output=out, force=force, **options)
        dataset = load_dataset(out)
        train, test = dataset.split("train").ignored, dataset.split("test").ignored
        assert train is not None and test is not None
        assert list(zip(*train.nonzero(), strict=True)) == [(0, 1), (11, 3)]
        assert list(zip(*test.nonzero(), strict=True)) == [(4, 2)]
    messages = Messages()
    prepare(raw / "trn.json", output=tmp_path / "other", test_fraction=0.4, reporter=messages)
    assert any("filter_labels_train.txt is left out" in one for one in messages.texts)
    (raw / "filter_labels_test.txt").write_text("5 2\n")
    with pytest.raises(DataError, match=r"filter_labels_test.txt:1: instance 5 is outside 0..4"):
        prepare(raw / "trn.json", output=tmp_path / "third", **options)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("place", [".", "/", ""])
def test_a_name_that_says_nothing_is_no_form(place: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the name does not say what it is"):
        prepare(place, output=tmp_path / "out")
    with pytest.raises(DataError):
        prepare(tsv(tmp_path / "a.tsv", corpus(30, 5)), output=tmp_path / "out", label_names=place)


def test_places_that_cannot_be_made(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is a file"):
        prepare(text, output=text)
    with pytest.raises(ResourceError, match="cannot be written"):
        prepare(text, output="/proc/nowhere/out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="the directory you are in"):
        prepare(text, output=".")
    for options in ({"test": text, "test_fraction": 0.5}, {"test_fraction": 1.0}, {"test_fraction": 0.0}):
        with pytest.raises(UsageError):
            prepare(text, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("R15")
def test_two_at_once_one_says_so(text: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.lock"), pytest.raises(ResourceError, match="another process is preparing it"):
        prepare(text, output=tmp_path / "out")
    prepare(text, output=tmp_path / "out")
    assert not (tmp_path / ".out.lock").exists()


@pytest.mark.fault("R4")
def test_a_full_disk_leaves_the_old_directory(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    prepare(text, output=out)
    before = contents(out)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_xmc", full)
    with pytest.raises(ResourceError, match="out: cannot be written: No space left"):
        prepare(text, output=out, force=True)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "out"]


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "xmc_midx", *map(str, words)]


@pytest.mark.parametrize("point", ["file.written", "file.renamed:2", *(p for p in POINTS if p.startswith("directory"))])
@pytest.mark.fault("R2")
def test_a_death_at_each_point_leaves_the_old_or_the_new_directory_whole(
    point: str, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(text, output=out)
    old = contents(out)
    words = ["prepare", text, "--out", out, "--force", "--compress"]
    died = subprocess.run(command(*words), env=os.environ | {"XMC_MIDX_CRASH_AT": point}, capture_output=True)
    assert died.returncode == -signal.SIGKILL
    if point == "directory.aside":
        assert not out.exists()  # neither; the next call brings the old one back
        with pytest.raises(UsageError, match="is not empty"):
            prepare(text, output=out)
    assert contents(out) == old or set(contents(out)) == {f"{path}.gz" for path in old}
    prepare(text, output=out, force=True)
    assert contents(out) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.fault("R3")
def test_a_signal_leaves_nothing(number: int, code: int, tmp_path: Path) -> None:
    pipe = tmp_path / "a.tsv"
    os.mkfifo(pipe)
    process = subprocess.Popen(command("prepare", pipe, "--out", tmp_path / "out"), stderr=subprocess.DEVNULL)
    with pipe.open("w") as stream:
        stream.write("x\tone two\n" * 10)  # the reader waits for more
        stream.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*.preparing")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv"]


# ----------------------------------------------------------------------------- the command line


def test_the_command_prints_a_summary_and_the_next_step(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my data"
    assert app.run(["prepare", str(text), "--out", str(out), "--test-fraction", "0.4", "--min-df", "1"]) == 0
    shown = capsys.readouterr().out
    assert "labels.txt, test.txt, train.txt, vocabulary.txt" in shown
    assert f"xmc-midx train '{out}' --output RUN" in shown
    assert re.search(r"^\d+ features; \d+ labels, known by name\.$", shown, re.M)
    assert app.run(["prepare", str(text), "--out", str(out), "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["directory"] == str(out) and document["train"]["num_instances"] == 30 and document["test"] is None


def test_the_options_of_the_command_reach_the_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.dat", "kind\tt1\tt2", "x|y\tan apple\tpie", "x|7\tan egg\tpie")
    options = ["--format", "csv", "--delimiter", "tab", "--text-column", "t1", "--text-column", "t2"]
    options += ["--label-column", "kind", "--label-separator", "|", "--label-kind", "names", "--ngrams", "2"]
    options += ["--max-features", "3", "--compress"]
    assert app.run(["prepare", str(source), "--out", str(tmp_path / "out"), *options]) == 0
    dataset = load_dataset(tmp_path / "out")
    assert dataset.label_names == ("7", "x", "y")
    assert dataset.vocabulary is not None and set(dataset.vocabulary.tokens) == {"an", "pie"}
    assert gzip.decompress((tmp_path / "out" / "labels.txt.gz").read_bytes()) == b"7\nx\ny\n"
    capsys.readouterr()
    assert app.run(["prepare", str(source), "--out", str(tmp_path / "other"), *options[:2]]) == 3
    assert "a.dat:1: has the columns" in capsys.readouterr().err


def test_no_torch_is_loaded(text: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from xmc_midx.cli import app; "
        f"assert app.run(['prepare', {str(text)!r}, '--out', {str(tmp_path / 'out')!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_text_becomes_names_by_train_and_predict(tmp_path: Path) -> None:
    """From a file of raw text to a typed sentence: the four commands of the README."""
    from xmc_midx import pipeline
    from xmc_midx.config import load_config

    prepare(tsv(tmp_path / "a.tsv", corpus(300, 6)), output=tmp_path / "data", layout=TextLayout(form="tsv"))
    config = load_config(None, assignments=["training.epochs=6", "model.dim=32", "training.device=cpu"])
    pipeline.train(tmp_path / "data", output=tmp_path / "run", config=config)
    prediction = pipeline.predict(tmp_path / "run", input=["a text on word3", "word7 and Word0"], k=2)
    names = prediction.label_names
    assert names is not None
    found = [{names[label] for label in row} for row in prediction.top.label_ids.tolist()]
    assert "topic 3" in found[0] and found[1] == {"topic 7", "topic 0"}


def test_the_text_of_debian_deps_gives_the_features_that_come_with_it(shared_data: Path, tmp_path: Path) -> None:
    """Token by token, the ready-made features are those of another threshold."""
    source = shared_data / "debian-deps"
    lines = gzip.decompress((source / "test_raw.tsv.gz").read_bytes()).decode().splitlines()
    path = write(tmp_path / "a.tsv", *lines)
    result = prepare(path, output=tmp_path / "out", label_names=source / "labels.txt.gz")
    ready = load_dataset(source).split("test")
    ours = load_dataset(tmp_path / "out").split()
    assert result.num_labels == 42_411
    assert (ours.labels != ready.labels).nnz == 0
    tokens = gzip.decompress((source / "features.txt.gz").read_bytes()).decode().splitlines()
    mine = Vocabulary.load(tmp_path / "out" / "vocabulary.txt").tokens
    common = sorted(set(tokens) & set(mine))
    assert len(common) > 10_000
    columns = {token: n for n, token in enumerate(tokens)}, {token: n for n, token in enumerate(mine)}
    theirs = ready.features.tocsc()[:, [columns[0][token] for token in common]]
    own = ours.features.tocsc()[:, [columns[1][token] for token in common]]
    assert ((theirs != 0) != (own != 0)).nnz == 0
