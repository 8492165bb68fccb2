"""`predict` from end to end: streams, formats, shards, kills, lists, probabilities, memory."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import victims
from scipy.sparse import csr_array, csr_matrix

from xmc_midx.calibration import expected_calibration_error, is_positive
from xmc_midx.cli import app
from xmc_midx.config import load_config
from xmc_midx.data import instances, resumable
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.predictions import read_predictions
from xmc_midx.errors import DataError, ResourceError, UsageError
from xmc_midx.pipeline import predict, predict_stream, train
from xmc_midx.predictor import Predictor

ROOT = Path(__file__).resolve().parents[1]
L, F = 23, 40
OPTIONS = (
    "model.dim=16",
    "model.dropout=0.2",
    "training.epochs=3",
    "training.batch_size=32",
    "training.label_learning_rate=0.05",
    "training.encoder_learning_rate=0.2",
    "sampler.num_codewords=3",
    "data.validation_fraction=0.3",
)


@pytest.fixture(scope="module")
def data(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The topics with a vocabulary and names; two labels have the same name, and one a number's."""
    directory = tmp_path_factory.mktemp("named")
    for name in ("train.txt", "test.txt"):
        (directory / name).write_bytes((topic_dir / name).read_bytes())
    names = [f"topic {label}" for label in range(L)]
    names[4], names[6] = names[3], "2012"
    (directory / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    from xmc_midx.data.vocabulary import Vocabulary

    tokens = tuple(f"word{feature:02}" for feature in range(F))
    Vocabulary(tokens=tokens, idf=np.ones(F, dtype=np.float32)).save(directory / "vocabulary.txt")
    return directory


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with neighbours, calibration, names and vocabulary. Read only."""
    output = tmp_path_factory.mktemp("runs") / "run"
    train(data, output=output, config=load_config(assignments=OPTIONS))
    return output


@pytest.fixture(scope="module")
def big(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test rows over and over, without a header: 6,000 of them, the last batch a short one."""
    path = tmp_path_factory.mktemp("big") / "rows.txt"
    rows = (data / "test.txt").read_bytes().partition(b"\n")[2]
    path.write_bytes(rows * 40)
    return path


def call(*words: str | Path) -> int:
    return app.run(["predict", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def killed(run: Path, processes: Any) -> Callable[..., int]:
    """`killed(words, points, number, log)`: the exit code of a prediction that gets a signal at these points."""

    def start(words: list[str | Path], points: str, number: int, log: Path) -> int:
        arguments = ([str(word) for word in words], points, int(number), str(log))
        process = processes.Process(target=victims.predict, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode is not None, "the child hangs"
        return process.exitcode

    return start


CHILD = "import sys; {setup}; from xmc_midx.cli.app import main; sys.argv[0] = 'xmc-midx'; main()"


def child(*words: str | Path, setup: str = "pass", **environment: str) -> dict[str, Any]:
    """Arguments of a process that predicts."""
    return {
        "args": [sys.executable, "-c", CHILD.format(setup=setup), "predict", *(str(word) for word in words)],
        "env": {**os.environ, "PYTHONPATH": str(ROOT), **environment},
    }


# ----------------------------------------------------------------- streams and formats


def test_all_formats_say_the_same(run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    source = data / "test.txt"
    expected = Predictor.load(run).predict(load_dataset(data).split("test").features, k=4)
    for form in ("tsv", "jsonl", "xmc", "npz"):
        assert call(run, source, "--k", "4", "--format", form, "-o", tmp_path / form) == 0
    with np.load(tmp_path / "npz") as arrays:
        assert np.array_equal(arrays["label_ids"], expected.label_ids)
        assert np.array_equal(arrays["scores"], expected.scores)
    read = read_predictions(tmp_path / "xmc", num_labels=L)
    assert np.array_equal(read.label_ids, expected.label_ids) and np.array_equal(read.scores, expected.scores)
    names = (data / "labels.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in (tmp_path / "tsv").read_text(encoding="utf-8").splitlines()]
    objects = [json.loads(line) for line in (tmp_path / "jsonl").read_text(encoding="utf-8").splitlines()]
    flat = [(one["instance"], rank, label) for one in objects for rank, label in enumerate(one["labels"], start=1)]
    assert len(rows) == len(flat) == 600
    for (instance, rank, label, score, name), (number, place, found) in zip(rows, flat, strict=True):
        assert (int(instance), int(rank), int(label), name) == (number, place, found["label"], found["name"])
        assert expected.label_ids[number, place - 1] == found["label"] and names[found["label"]] == name
        assert np.float32(score) == np.float32(found["score"]) == expected.scores[number, place - 1]
    capsys.readouterr()
    assert call(run, source, "--k", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == objects
    assert call(run, source, "--k", "4", "-o", tmp_path / "tsv.gz") == 0
    assert gzip.decompress((tmp_path / "tsv.gz").read_bytes()) == (tmp_path / "tsv").read_bytes()


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Put bytes on stdin."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_file_its_bytes_on_stdin_and_its_texts_have_the_same_answers(
    run: Path, data: Path, tmp_path: Path, capsys: Any, give: Callable[[bytes], None]
) -> None:
    assert call(run, data / "test.txt") == 0
    whole = capsys.readouterr().out
    give((data / "test.txt").read_bytes())
    assert call(run, "-") == 0
    shown = capsys.readouterr()
    assert shown.out == whole and shown.err.strip().startswith("Instances without any feature")
    features = load_dataset(data).split("test").features
    texts = "".join(" ".join(f"WORD{j:02}!" for j in features[[i]].indices) + "\n" for i in range(20))
    (tmp_path / "texts.txt").write_text(texts, encoding="utf-8")
    assert call(run, tmp_path / "texts.txt") == 0
    ones = csr_matrix((np.ones(features[:20].nnz, np.float32), features[:20].indices, features[:20].indptr), (20, F))
    top = Predictor.load(run).predict(ones)
    found = [int(line.split("\t")[2]) for line in capsys.readouterr().out.splitlines()]
    assert found == top.label_ids.ravel().tolist()


def test_a_line_on_stdin_is_answered_before_the_next_one_is_written(run: Path) -> None:
    process = subprocess.Popen(**child(run, "-", "--k", "1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    for number, line in enumerate([b"word03 word04\n", b"\n", b"word11\n"]):
        process.stdin.write(line)
        process.stdin.flush()
        assert process.stdout.readline().startswith(b"%d\t1\t" % number)
    process.stdin.close()
    assert process.wait(timeout=60) == 0 and process.stdout.read() == b""
    process.stdout.close()


def test_answers_before_a_faulty_line_are_given(run: Path, capsys: Any, give: Callable[[bytes], None]) -> None:
    give(b"0:1\n" * 2048 + b"40:1\n")
    assert call(run, "-", "--k", "1") == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2048
    assert "Error: standard input:2049: feature id 40 is outside 0..39 (the model has 40 features)." in err


def test_prediction_fills_no_cache(
    run: Path, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("XMC_MIDX_NO_CACHE")
    monkeypatch.setenv("XMC_MIDX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("xmc_midx.data.cache.SMALL_BYTES", 0)
    assert call(run, big, "-o", tmp_path / "out") == 0
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------- shards and kills


@pytest.mark.parametrize("num_shards", [2, 7, 30])
def test_the_shards_one_after_the_other_are_the_whole(
    run: Path, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_shards: int
) -> None:
    monkeypatch.setattr(instances, "BATCH_ROWS", 32)
    rows = tmp_path / "rows.txt"
    rows.write_bytes(b"".join(big.read_bytes().splitlines(keepends=True)[:800]))  # 25 batches
    assert call(run, rows, "--k", "2", "-o", tmp_path / "whole") == 0
    shards = b""
    for index in range(1, num_shards + 1):
        assert call(run, rows, "--k", "2", "-o", tmp_path / "part", "--shard", f"{index}/{num_shards}") == 0
        shards += (tmp_path / "part").read_bytes()
    assert shards == (tmp_path / "whole").read_bytes()


def test_instances_in_memory_are_a_stream_like_a_file(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(instances, "BATCH_ROWS", 32)
    features = load_dataset(data).split("test").features
    texts = [f"word{row % F:02}" for row in range(150)]
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    for held, file in (
        (features, data / "test.txt"),
        (features.tocoo(), data / "test.txt"),
        (csr_array(features), data / "test.txt"),
        (features.toarray(), data / "test.txt"),
        (texts, tmp_path / "texts.txt"),
        (np.array(texts), tmp_path / "texts.txt"),
    ):
        whole = [*predict_stream(run, input=file)]
        found = [*predict_stream(run, input=held)]
        assert [chunk.first for chunk in found] == [chunk.first for chunk in whole] == [0, 32, 64, 96, 128]
        for one, other in zip(found, whole, strict=True):
            assert np.array_equal(one.top.label_ids, other.top.label_ids)
        shards = [chunk for i in (1, 2, 3) for chunk in predict_stream(run, input=held, shard=(i, 3))]
        assert [chunk.first for chunk in shards] == [0, 32, 64, 96, 128]
        stream = predict_stream(run, input=held)
        stream.go_on(64, found[1].input_sha256)
        assert [chunk.first for chunk in stream] == [64, 96, 128]
        stream = predict_stream(run, input=held)
        stream.go_on(64, found[0].input_sha256)
        with pytest.raises(DataError, match="its lines differ"):
            list(stream)


def test_shards_that_are_none_are_refused(run: Path, big: Path) -> None:
    for shard in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(UsageError, match="expected 1/"):
            predict_stream(run, input=big, shard=shard)
    with pytest.raises(UsageError, match="A shard needs a file"):
        list(predict_stream(run, input=io.BytesIO(b"0:1\n"), shard=(1, 2)))


@pytest.mark.parametrize("form", ["tsv", "jsonl", "xmc"])
@pytest.mark.fault("R2")
def test_what_goes_on_after_a_kill_has_the_bytes_of_what_was_not_killed(
    run: Path, big: Path, tmp_path: Path, killed: Any, form: str
) -> None:
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    assert call(run, big, "--format", form, "-o", whole) == 0
    words = [run, big, "--format", form, "-o", out, "--resume"]
    kept = []
    # `file.written` stands in the small file of the notes as well: the second passage is the output's own.
    for point in ("output.noted:2", "output.noted:3", "file.written:2"):
        assert killed(words, point, signal.SIGKILL, log) == -signal.SIGKILL
        assert not out.exists()
        kept.append(json.loads((tmp_path / "out.partial.json").read_text(encoding="utf-8"))["next_instance"])
    assert kept == [2048, 5120, 6000]
    assert killed(words, "file.renamed:1", signal.SIGKILL, log) == -signal.SIGKILL
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path / "out.partial").exists()
    # Notes that a kill left without their file: the next start is anew.
    (tmp_path / "out.partial.json").write_text('{"bytes": 7}', encoding="utf-8")
    assert call(*words) == 0 and out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out", "whole"]


@pytest.mark.soak
@pytest.mark.fault("R1")
def test_kills_at_random_moments_change_no_byte(
    run: Path, big: Path, tmp_path: Path, killed: Any, record_property: Any
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(run, big, "-o", whole) == 0
    rng, kills = np.random.default_rng(0), 0
    while kills < 200:
        point = f"{rng.choice(['output.noted', 'file.written', 'file.renamed'])}:{rng.integers(1, 8)}"
        code = killed([run, big, "-o", out, "--resume"], point, signal.SIGKILL, tmp_path / "log")
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
    record_property("count", kills)


def test_without_resume_a_start_is_anew_and_leaves_nothing(run: Path, big: Path, tmp_path: Path, killed: Any) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert killed([run, big, "-o", out], "output.noted:2", signal.SIGKILL, log) == -signal.SIGKILL
    assert (tmp_path / "out.partial").stat().st_size > 0
    assert call(run, big, "--k", "1", "-o", out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]
    assert out.read_bytes().count(b"\n") == 6000


def interrupted(run: Path, big: Path, out: Path) -> Path:
    """A partial output of two batches, as an interruption leaves it."""
    stream = predict_stream(run, input=big)
    with (
        pytest.raises(KeyboardInterrupt),
        resumable.ResumableFile.open(out, {"format": "tsv", **stream.settings}, resume=True) as file,
    ):
        for chunk in stream:
            file.write(b"%d\n" % chunk.first)
            file.mark(chunk.first + len(chunk.top.label_ids), chunk.input_sha256)
            if chunk.first == 1024:
                raise KeyboardInterrupt
    return out.with_name(f"{out.name}.partial.json")


def test_going_on_with_other_options_or_another_input_is_refused(
    run: Path, big: Path, tmp_path: Path, capsys: Any
) -> None:
    out, lists = tmp_path / "out", tmp_path / "list"
    notes = interrupted(run, big, out)
    lists.write_text("3\n5\n")
    for options, name in (
        (["--k", "4"], "k"),
        (["--format", "xmc"], "format"),
        (["--scores", "probabilities"], "scores"),
        (["--threshold", "1"], "threshold"),
        (["--deny", str(lists)], "deny"),
        (["--text"], "text"),
        (["--exact"], "exact"),
        (["--shard", "1/2"], "shard"),
    ):
        assert call(run, big, "-o", out, "--resume", *options) == 2
        assert f"was begun with another {name}: " in capsys.readouterr().err
    lines = big.read_bytes().splitlines(keepends=True)
    for place, code in ((2047, 3), (2048, 0)):
        changed = tmp_path / "changed.txt"
        changed.write_bytes(b"".join([*lines[:place], b"0:9\n", *lines[place + 1 :]]))
        before = (out.with_name("out.partial").read_bytes(), notes.read_bytes())
        assert call(run, changed, "-o", out, "--resume") == code
        if code:
            assert "The input is not the one whose first 2048 instances" in capsys.readouterr().err
            assert (out.with_name("out.partial").read_bytes(), notes.read_bytes()) == before
    notes = interrupted(run, big, out)
    (tmp_path / "short.txt").write_bytes(b"".join(lines[:1500]))
    assert call(run, tmp_path / "short.txt", "-o", out, "--resume") == 3
    assert "its lines differ" in capsys.readouterr().err


@pytest.mark.fault("R6")
def test_damaged_notes_are_refused_and_bytes_beyond_them_cut(run: Path, big: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    notes = interrupted(run, big, out)
    good = json.loads(notes.read_text(encoding="utf-8"))
    for text in ("", "[]", "{", json.dumps(good | {"bytes": 10**9}), json.dumps(good | {"next_instance": -1})):
        notes.write_text(text, encoding="utf-8")
        assert call(run, big, "-o", out, "--resume") == 3
    notes.write_text(json.dumps(good), encoding="utf-8")
    with out.with_name("out.partial").open("ab") as file:
        file.write(b"half a line that the kill cut off")
    assert call(run, big, "-o", out, "--resume") == 0
    assert out.read_bytes().startswith(b"0\n1024\n2048\t1\t")


@pytest.mark.fault("R15")
def test_two_writers_of_one_file_are_told_apart(run: Path, big: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    with resumable.ResumableFile.open(out, {}, resume=False) as file:
        file.write(b"mine")
        assert call(run, big, "-o", out) == 4
        assert "another process is writing this file" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    with (
        pytest.raises(ResourceError, match="cannot be written"),
        resumable.ResumableFile.open(tmp_path / "absent" / "x", {}, resume=False),
    ):
        pass


@pytest.mark.fault("R3")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_with_resume_keeps_what_is_there(
    run: Path, big: Path, tmp_path: Path, killed: Any, number: int
) -> None:
    out, whole, log = tmp_path / "out", tmp_path / "whole", tmp_path / "log"
    assert call(run, big, "-o", whole) == 0
    assert killed([run, big, "-o", out, "--resume"], "output.noted:3", number, log) == 128 + number
    assert "Go on with the same command." in log.read_text(encoding="utf-8")
    assert call(run, big, "-o", out, "--resume") == 0
    assert out.read_bytes() == whole.read_bytes()
    out.unlink()
    assert killed([run, big, "-o", out], "output.noted:3", number, log) == 128 + number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "whole"]


# ------------------------------------------------------- what may leave, and what may not


def test_an_evaluation_says_what_predictions_lack(run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(run, data / "test.txt", "-k", "1", "-o", tmp_path / "p.tsv") == 0
    lines = (tmp_path / "p.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "p.tsv").write_text("".join(lines[:21]))
    capsys.readouterr()
    assert app.run(["evaluate", "-", str(data), "--predictions", str(tmp_path / "p.tsv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_without_predictions"] == 129
    assert app.run(["evaluate", "-", str(data), "--predictions", str(tmp_path / "p.tsv")]) == 0
    shown = capsys.readouterr().out
    assert "Without predictions: 129;" in shown and "Longest list: 1;" in shown
    assert app.run(["evaluate", str(run), str(data)]) == 0
    shown = capsys.readouterr().out
    assert "Without predictions" not in shown and "Longest list" not in shown


def test_a_directory_is_answered_with_its_test_split(run: Path, data: Path, capsys: Any) -> None:
    assert call(run, data) == 3
    assert f"is a directory, expected a file. Its test split is {data / 'test.txt'}." in capsys.readouterr().err


def test_a_threshold_that_nothing_reaches_is_said(run: Path, data: Path, capsys: Any) -> None:
    for scores, threshold in (("logits", "1000"), ("probabilities", "2")):
        assert call(run, data / "test.txt", "--threshold", threshold, "--scores", scores) == 0
        shown = capsys.readouterr()
        assert shown.out.count("\n") <= 1
        assert f"Nothing was predicted for these 150 instances: none of the {scores} reaches {threshold}." in shown.err
    assert call(run, data / "test.txt", "--threshold", "0.2", "--scores", "probabilities") == 0
    assert "Nothing was predicted" not in capsys.readouterr().err


def test_what_the_model_knows_nothing_of_is_counted(
    run: Path, tmp_path: Path, capsys: Any, give: Callable[[bytes], None]
) -> None:
    said = "Instances without any feature, or word, that the model has: 2 of 3. All of them get the same labels."
    for content in ("unheard of\nword03 word04\nxyzzy\n", "3 40\n\n3:1 4:0.5\n\n"):
        give(content.encode())
        assert call(run, "-", "-k", "1") == 0
        shown = capsys.readouterr()
        assert said in " ".join(shown.err.split()) and len(shown.out.splitlines()) == 3
        (tmp_path / "in.txt").write_text(content)
        assert call(run, tmp_path / "in.txt", "-k", "1", "-o", tmp_path / "out.tsv") == 0
        assert said in " ".join(capsys.readouterr().err.split())
        lines = [line.split("\t")[2:4] for line in (tmp_path / "out.tsv").read_text().splitlines()]
        assert lines[0] == lines[2] != lines[1]


def test_no_duplicate_missing_or_pad_ever_leaves(run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(0)
    for case in range(24):
        k = int(rng.integers(1, L + 1))
        allowed = np.arange(L)
        words: list[str | Path] = [
            "--k",
            str(k),
            "--scores",
            ("logits", "probabilities")[case % 2],
            "--format",
            "jsonl",
        ]
        for option in ("--allow", "--deny"):
            if rng.random() < 0.6:
                chosen = rng.choice(L, int(rng.integers(1, 12)), replace=True)
                file = tmp_path / f"{case}{option}"
                file.write_text("".join(f"{label}\n" for label in chosen))
                words += [option, file]
                allowed = np.intersect1d(allowed, chosen) if option == "--allow" else np.setdiff1d(allowed, chosen)
        threshold = float(rng.choice([-np.inf, 0.05, 0.5, 3.0]))
        if np.isfinite(threshold):
            words += ["--threshold", str(threshold)]
        assert call(run, data / "test.txt", *words) == 0
        rows = [json.loads(line)["labels"] for line in capsys.readouterr().out.splitlines()]
        assert len(rows) == 150
        for row in rows:
            labels, scores = [one["label"] for one in row], [one["score"] for one in row]
            assert len(set(labels)) == len(labels) and set(labels) <= set(allowed.tolist())
            assert scores == sorted(scores, reverse=True) and all(np.isfinite(scores))
            assert all(score >= threshold for score in scores)
            if not np.isfinite(threshold):
                assert len(labels) == min(k, len(allowed))


def test_label_lists_hold_ids_and_names(run: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    for text, expected in (
        ("topic 3\n 9 \n\n", {3, 4, 9}),  # two labels are called so
        ("\ufefftopic 0\r\ntopic 1\n", {0, 1}),
        ("20\n2012\n", {20, 6}),  # no id, but a name
    ):
        file.write_text(text, encoding="utf-8")
        top = predict(run, input=data / "test.txt", k=L, allow=file).top
        assert set(np.unique(top.label_ids).tolist()) - {-1} == expected
        top = predict(run, input=data / "test.txt", k=L, deny=file).top
        assert set(np.unique(top.label_ids).tolist()) - {-1} == set(range(L)) - expected
    # Python would take a line separator for the end of the name.
    file.write_text("topic 1\u2028b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"list\.txt:1: 'topic 1\\u2028b' is no label"):
        predict(run, input=data / "test.txt", allow=file)
    for text, message in (
        ("topic 1\ntopic x\n", r"list\.txt:2: 'topic x' is no label; .* Did you mean topic"),
        ("23\n", "'23' is no label id; expected 0 to 22"),
        ("-1\n", "no label"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            predict(run, input=data / "test.txt", allow=file)


def test_values_that_no_score_can_be_made_of_are_refused(data: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    train(data, output=raw, config=load_config(assignments=[*OPTIONS, "data.normalize=none", "training.epochs=1"]))
    predictor = Predictor.load(raw)
    big_values = csr_matrix(np.full((3, F), 3e38, dtype=np.float32) * np.array([[0], [0], [1]], dtype=np.float32))
    with pytest.raises(DataError, match=r"Instance 2: its scores are not finite"):
        predictor.predict(big_values)
    for value in (np.nan, np.inf, 1e39):
        with pytest.raises(DataError, match="not finite"):
            predictor.predict({0: value})
        with pytest.raises(DataError, match="not finite"):
            predictor.predict(csr_matrix(np.full((1, F), value)))
    with pytest.raises(DataError, match=r"(Instances 0 to 2|rows).*not finite"):
        lines = tmp_path / "rows.txt"
        lines.write_text("0:1\n\n" + " ".join(f"{j}:3e38" for j in range(F)) + "\n")
        predict(raw, input=lines)


# ------------------------------------------------------------------------- in Python


def test_rows_of_every_kind_have_the_same_answers(run: Path, data: Path) -> None:
    predictor = Predictor.load(run)
    features = load_dataset(data).split("test").features[:7]
    pairs = [list(zip(row.indices.tolist(), row.data.tolist(), strict=True)) for row in map(features.getrow, range(7))]
    expected = predictor.predict(features, k=3)
    kinds: dict[str, Any] = {
        "array": features.toarray(),
        "csc": features.tocsc(),
        "csr_array": csr_array(features),
        "dictionaries": [dict(row) for row in pairs],
        "pairs": [row[::-1] for row in pairs],
        "lists of lists": [[list(pair) for pair in row] for row in pairs],
        "tuple": tuple(tuple(row) for row in pairs),
    }
    for kind, rows in kinds.items():
        top = predictor.predict(rows, k=3)
        assert np.array_equal(top.label_ids, expected.label_ids), kind
        np.testing.assert_allclose(top.scores, expected.scores, rtol=1e-5)
    for kind, one in {
        "dictionary": dict(pairs[0]),
        "pairs": pairs[0],
        "numpy": {np.int32(pairs[0][0][0]): 1.0},
    }.items():
        assert predictor.predict(one).label_ids.shape == (1, 5), kind
    twice = csr_matrix((np.ones(2, np.float32), [3, 3], [0, 2]), shape=(1, F))
    np.testing.assert_allclose(predictor.predict(twice).scores, predictor.predict({3: 2.0}).scores, rtol=1e-6)
    assert twice.nnz == 2, "the caller's matrix is left alone"
    empty = predictor.predict([])
    assert empty.label_ids.shape == (0, 5)
    texts = ["word01 word02", "", "word07"]
    for kind in (np.array(texts), np.array(texts, dtype=object), Column(texts), iter(texts)):
        assert np.array_equal(predictor.predict(kind).label_ids, predictor.predict(texts).label_ids)

    objects = features.toarray().astype(object)
    assert np.array_equal(predictor.predict(objects, k=3).label_ids, expected.label_ids)
    frame = Column(texts)
    frame.ndim = 2
    for wrong in (frame, set(texts), np.ones(F), np.ones((1, 2, F)), np.array([["a", "b"]])):
        with pytest.raises(UsageError, match=r"expected (rows of features|numbers)"):
            predictor.predict(wrong)
        if isinstance(wrong, np.ndarray):
            with pytest.raises(UsageError, match=r"expected (rows of features|numbers)"):
                predict_stream(run, input=wrong)


class Column:
    """Like a pandas column whose rows are not numbered from 0."""

    ndim = 1

    def __init__(self, values: list[str]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


def test_a_predictor_can_be_sent_and_copied_and_works_under_autocast(run: Path, data: Path) -> None:
    predictor = Predictor.load(run)
    assert predictor.neighbors is not None
    features = load_dataset(data).split("test").features
    expected = predictor.predict(features, k=3)
    for other in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        assert np.array_equal(other.predict(features, k=3).label_ids, expected.label_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        top = predictor.predict(features, k=3)
    assert np.array_equal(top.label_ids, expected.label_ids) and np.array_equal(top.scores, expected.scores)


@pytest.mark.parametrize("feature", [F, 1000, 10**8, -1])
def test_ids_that_scipy_takes_as_they_are_read_no_foreign_memory(run: Path, feature: int) -> None:
    rows = csr_matrix((np.ones(2, np.float32), [3, feature], [0, 1, 2]), shape=(2, F))
    with pytest.raises(DataError, match=rf"feature ids from .*{feature}.*; expected 0 to {F - 1}"):
        Predictor.load(run).predict(rows)


def test_label_ids_in_memory_are_whole_numbers(run: Path) -> None:
    predictor = Predictor.load(run)
    for ids in ([1, 2], {1, 2}, np.array([2, 1], dtype=np.uint8), frozenset((1, 2))):
        assert sorted(predictor.predict({0: 1.0}, k=2, allow=ids).label_ids[0].tolist()) == [1, 2]
    assert predictor.predict({0: 1.0}, k=2, allow=[]).label_ids.tolist() == [[-1, -1]]
    for wrong, hint in ((np.arange(L) < 3, "flatnonzero"), ([1.7, 2.2], None), (["topic 3"], None), ([[1], [2]], None)):
        with pytest.raises(UsageError, match=r"allow: .* expected label ids, whole numbers") as caught:
            predictor.predict({0: 1.0}, allow=wrong)
        assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{0: 1.0}, {40: 1.0}], "Instance 1: feature id 40 is outside 0..39"),
        ([[(0, 1.0), (0, 2.0)]], "Instance 0: feature id 0 occurs twice"),
        ([{"a": 1.0}], "Instance 0: is no row of features"),
        ([{0: "x"}], "Instance 0: is no row of features"),
        ([[1, 2, 3]], "is no row of features"),
        ([{0: 1.0}, "text"], "is no row of features"),
        ([{-1: 1.0}], "feature id -1 is outside"),
        (np.ones((2, 7)), "have 7 features; the model was trained with 40"),
    ],
)
def test_rows_that_are_none_are_refused(run: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Predictor.load(run).predict(rows)


def test_options_out_of_range_are_refused(run: Path) -> None:
    predictor = Predictor.load(run)
    for options, message in (
        ({"k": 0}, "k is 0"),
        ({"scores": "odds"}, "expected 'logits' or 'probabilities'"),
        ({"allow": [23]}, "allow: holds a label id outside 0..22"),
        ({"deny": [-1]}, "deny: holds"),
    ):
        with pytest.raises(UsageError, match=message):
            predictor.predict({0: 1.0}, **options)
    with pytest.raises(UsageError, match="1 dimensions"):
        predictor.predict(np.ones(F))


# --------------------------------------------------------------------- probabilities


def test_probabilities_are_honest_on_instances_that_nobody_saw(
    run: Path, topic_data: Callable[..., tuple[csr_matrix, csr_matrix]]
) -> None:
    features, labels = topic_data(3000, seed=77)
    predictor = Predictor.load(run)
    stated = predictor.predict(features, k=5, scores="probabilities")
    plain = predictor.predict(features, k=5)
    assert np.array_equal(stated.label_ids, plain.label_ids)
    hits = is_positive(stated, labels)
    assert expected_calibration_error(stated.scores, hits) < 0.04
    sure = stated.scores > 0.9
    assert sure.mean() > 0.05 and hits[sure].mean() > 0.85
    # The chances of an instance are those of its labels, not shares of one.
    assert stated.scores.sum(axis=1).max() > 1.2
    # What a label's chance is does not depend on k or on the labels that may be shown.
    np.testing.assert_array_equal(predictor.predict(features, k=2, scores="probabilities").scores, stated.scores[:, :2])
    allowed = predictor.predict(features[:50], k=3, scores="probabilities", allow=[1, 5, 9])
    whole = predictor.predict(features[:50], k=L, scores="probabilities")
    for row in range(50):
        expected = dict(zip(whole.label_ids[row].tolist(), whole.scores[row].tolist(), strict=True))
        found = zip(allowed.label_ids[row].tolist(), allowed.scores[row].tolist(), strict=True)
        assert all(score == pytest.approx(expected[label], rel=1e-5) for label, score in found)


def test_a_run_without_held_out_instances_has_no_probabilities(data: Path, tmp_path: Path, capsys: Any) -> None:
    bare = tmp_path / "bare"
    options = [*OPTIONS, "data.validation_fraction=0", "training.epochs=1"]
    train(data, output=bare, config=load_config(assignments=options))
    assert call(bare, data / "test.txt", "--scores", "probabilities") == 2
    assert "no calibration" in capsys.readouterr().err
    golden = ROOT / "tests" / "golden" / "format-1"
    with pytest.raises(UsageError, match="older version"):
        Predictor.load(golden).predict({0: 1.0}, scores="probabilities")


def test_neighbours_that_are_off_leave_the_probabilities(
    data: Path, tmp_path: Path, topic_data: Callable[..., tuple[csr_matrix, csr_matrix]]
) -> None:
    alone = tmp_path / "alone"
    train(data, output=alone, config=load_config(assignments=[*OPTIONS, "neighbors.enabled=false"]))
    predictor = Predictor.load(alone)
    assert predictor.neighbors is None
    features, labels = topic_data(2000, seed=78)
    stated = predictor.predict(features, scores="probabilities")
    assert expected_calibration_error(stated.scores, is_positive(stated, labels)) < 0.05


# ------------------------------------------------------------------------------ memory


def peak(process: subprocess.Popen[bytes]) -> int:
    """Bytes of the largest resident set so far."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("num_lines", [20_000, pytest.param(1_000_000, marks=[pytest.mark.soak], id="a million lines")])
@pytest.mark.fault("R9")
def test_a_stream_is_answered_in_constant_memory(run: Path, big: Path, num_lines: int, record_property: Any) -> None:
    rows = big.read_bytes().splitlines(keepends=True)[:150]
    block = b"".join(rows[number % 150] for number in range(1000))
    with subprocess.Popen(**child(run, "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def feed() -> None:
            for _ in range(num_lines // 1000):
                stdin.write(block)
            stdin.flush()

        feeder = threading.Thread(target=feed)
        feeder.start()
        answered = early = 0
        while answered < num_lines:
            answered += stdout.readline().split(b"\t", 2)[1] == b"5"
            if answered == 5000:
                early = peak(process)
        late = peak(process)
        feeder.join()
        stdin.close()
        assert stdout.read() == b"" and process.wait(timeout=60) == 0
    record_property("peak bytes", (early, late))
    assert late - early < 24 * 2**20, f"{early:,} bytes after 5,000 lines, {late:,} after {num_lines:,}"


MAPPED = """
import sys
from xmc_midx.device import used_memory_bytes
from xmc_midx.predictor import Predictor
import xmc_midx.neighbors
before = used_memory_bytes()
predictor = Predictor.load(sys.argv[1], checkpoint=sys.argv[2], device="cpu", verify=False)
after = used_memory_bytes()
list(predictor.encoder.encode(predictor._features([{0: 1.0}, {5: 2.0}])))
print("GREW", after - before, used_memory_bytes() - before)
"""


def test_a_model_is_mapped_not_copied(tmp_path: Path) -> None:
    """A table of 160 MB: loading without hashes reads its header, a query reads its rows."""
    data, wide = tmp_path / "wide.txt", tmp_path / "wide"
    data.write_text("4 80000 2\n0 0:1 79999:1\n1 5:1\n0 9:1\n1 7:1\n")
    options = ["model.dim=512", "training.epochs=1", "data.validation_fraction=0", "training.keep_checkpoints=1"]
    train(data, output=wide, config=load_config(assignments=options))
    for checkpoint in ("latest", "best"):  # float32; the finished model, in int8
        process, env = [sys.executable, "-c", MAPPED, str(wide), checkpoint], {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(process, env=env, capture_output=True, timeout=120, check=True, text=True)
        loaded, predicted = (int(word) for word in done.stdout.split("GREW")[1].split())
        # Most of the second is the compiler's, where the loop was not compiled before.
        assert loaded < 30e6 and predicted < 100e6, (checkpoint, loaded, predicted)


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.csv.gz"])
def test_a_file_that_is_called_otherwise_than_it_would_be_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("1:0.5\n")
    assert app.run(["predict", str(run), str(rows), "--output", str(tmp_path / name)]) == 2
    assert not (tmp_path / name).exists()
    assert app.run(["predict", str(run), str(rows), "--output", str(tmp_path / name), "--format", "tsv"]) == 0


def test_of_a_file_that_is_packed_the_hint_names_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gzip.open(tmp_path / "rows.txt.gz", "wt") as file:
        file.write("1:0.5\n")
    assert app.run(["predict", str(run), str(tmp_path / "rows.txt")]) == 3
    assert "rows.txt.gz?" in " ".join(capsys.readouterr().err.split())
