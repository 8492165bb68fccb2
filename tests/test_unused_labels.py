"""Labels that no training instance has: they get no row, and nothing else changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from xmc_midx import Config, Predictor, evaluate, export, resume, train
from xmc_midx.config import DataConfig
from xmc_midx.data.known_labels import LABEL_IDS, NUM_LABELS, KnownLabels
from xmc_midx.errors import DataError
from xmc_midx.index import CellIndex
from xmc_midx.pipeline import diagnose, plan, predict
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.types import SilentReporter

READER = Path(__file__).parents[1] / "scripts" / "read_midx.py"
NUM_NAMED = 911
QUICK: dict[str, Any] = {"training": {"epochs": 3, "ensemble_size": 2}, "model": {"dim": 16, "storage": "float32"}}
Pair = tuple[csr_matrix, csr_matrix]


def spread(labels: csr_matrix, ids: np.ndarray) -> csr_matrix:
    """Label l as `ids[l]` of `NUM_NAMED`."""
    return csr_matrix((labels.data, ids[labels.indices], labels.indptr), shape=(labels.shape[0], NUM_NAMED))


@pytest.fixture(scope="module")
def splits(topic_data: Callable[..., Pair]) -> tuple[Pair, Pair, np.ndarray]:
    """Training and test split with the labels that the training has alone, and their rising ids in a vocabulary."""
    (X, Y), (X_test, Y_test) = topic_data(320, seed=0), topic_data(150, seed=1)
    used = np.flatnonzero(Y.getnnz(axis=0))
    ids = np.sort(np.random.default_rng(3).permutation(NUM_NAMED)[: len(used)])
    return (X, Y[:, used]), (X_test, Y_test[:, used]), ids


@pytest.fixture(scope="module")
def runs(splits: tuple[Pair, Pair, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the few labels, and of those in the vocabulary."""
    (X, Y), _, ids = splits
    directory = tmp_path_factory.mktemp("runs")
    few = train((X, Y), output=directory / "few", config=QUICK)
    result = train((X, spread(Y, ids)), output=directory / "named", config=QUICK)
    assert (few.config.data.unused_labels, result.config.data.unused_labels) == ("keep", "drop")
    rows = {"data": result.config.data.model_copy(update={"unused_labels": "keep"})}
    assert few.config == result.config.model_copy(update=rows) and few.validation == result.validation
    return directory / "few", directory / "named"


def test_a_model_is_that_of_the_used_labels(runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray]) -> None:
    _, (X_test, Y_test), ids = splits
    for member in (".", "members/2"):
        few, named = (load_file(run / member / "model.safetensors") for run in runs)
        assert (named.pop(LABEL_IDS) == ids).all() and named.pop(NUM_LABELS) == NUM_NAMED
        assert few.keys() == named.keys()
        assert all(np.array_equal(few[name], named[name]) for name in few)
    few_predictor, predictor = (Predictor.load(run) for run in runs)
    assert predictor.num_labels == NUM_NAMED != few_predictor.num_labels == len(ids)
    assert predictor.label_frequencies is not None and few_predictor.label_frequencies is not None
    frequencies = np.zeros(NUM_NAMED)
    frequencies[ids] = few_predictor.label_frequencies
    assert (predictor.label_frequencies == frequencies).all()
    for options in ({"k": 5}, {"k": 3, "scores": "probabilities"}, {"k": 40}, {"k": 4, "threshold": -1.0}):
        expected, found = few_predictor.predict(X_test, **options), predictor.predict(X_test, **options)
        assert (np.where(expected.label_ids < 0, -1, ids[expected.label_ids]) == found.label_ids).all()
        assert (expected.scores == found.scores).all() and found.label_ids.shape[1] == options["k"]
    reports = (
        evaluate(runs[0], data=(X_test, Y_test)).report,
        evaluate(runs[1], data=(X_test, spread(Y_test, ids))).report,
    )
    assert reports[0] == reports[1]


def test_a_training_says_how_many_they_are(splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path) -> None:
    (X, Y), _, ids = splits
    messages: list[str] = []

    class Listener(SilentReporter):
        def message(self, text: str) -> None:
            messages.append(text)

    # A sampler that is chosen is said to draw all rows, not all labels.
    chosen = {"training": {"epochs": 1, "ensemble_size": 1}, "sampler": {"name": "uniform"}}
    train((X, spread(Y, ids)), output=tmp_path / "named", config=chosen, reporter=Listener())
    assert sum("889 of 911 labels have no training instance" in text for text in messages) == 1
    assert sum("22 draws hold all 22 labels" in text for text in messages) == 1
    messages.clear()
    train((X, Y), output=tmp_path / "few", config=chosen, reporter=Listener())
    assert "labels have no training instance" not in "".join(messages)


def test_a_true_label_without_a_row_is_missed(runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray]) -> None:
    """It counts in what there was to find, as a label that was never ranked first does."""
    _, (X_test, Y_test), ids = splits
    unknown = int(np.setdiff1d(np.arange(NUM_NAMED), ids)[5])
    more = spread(Y_test, ids).tolil()
    more[:, unknown] = 1.0
    before, after = (evaluate(runs[1], data=(X_test, csr_matrix(Y))).report for Y in (spread(Y_test, ids), more))
    assert after.metrics["P@5"] == before.metrics["P@5"] > 0.2
    assert 0.2 < after.metrics["R@5"] < before.metrics["R@5"]


def test_lists_of_labels(runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray]) -> None:
    _, (X_test, _), ids = splits
    few_predictor, predictor = (Predictor.load(run) for run in runs)
    unknown = np.setdiff1d(np.arange(NUM_NAMED), ids)
    for lists in ({"allow": [2, 7, 11]}, {"deny": [1, 3]}, {"allow": [2, 7, 11, 5], "deny": [7]}):
        expected = few_predictor.predict(X_test, 3, **lists)
        named = {name: [*ids[some], *unknown[:4]] for name, some in lists.items()}
        found = predictor.predict(X_test, 3, **named)
        assert (np.where(expected.label_ids < 0, -1, ids[expected.label_ids]) == found.label_ids).all()
        assert (expected.scores == found.scores).all()
    none = predictor.predict(X_test, 2, allow=unknown[:3])
    assert (none.label_ids == -1).all() and np.isneginf(none.scores).all()
    assert (predictor.predict(X_test, deny=unknown).label_ids == predictor.predict(X_test).label_ids).all()


def test_label_cells_and_packed_tables_know_them(
    splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmc_midx.finish.CELLS_FROM", 2)
    (X, Y), (X_test, _), ids = splits
    stored = QUICK | {"model": {"dim": 16, "storage": "int4"}}
    train((X, Y), output=tmp_path / "few", config=stored)
    train((X, spread(Y, ids)), output=tmp_path / "named", config=stored)
    few_predictor, predictor = Predictor.load(tmp_path / "few"), Predictor.load(tmp_path / "named")
    assert isinstance(predictor.index, CellIndex)
    expected, found = few_predictor.predict(X_test), predictor.predict(X_test)
    assert (ids[expected.label_ids] == found.label_ids).all() and (expected.scores == found.scores).all()
    assert found.label_ids.dtype == expected.label_ids.dtype == np.int64
    # A list that denies what has no row denies nothing.
    unknown = np.setdiff1d(np.arange(NUM_NAMED), ids)
    assert (predictor.predict(X_test, deny=unknown).scores == found.scores).all()


def test_a_list_of_names_without_rows_is_said_to_be_one(
    runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path
) -> None:
    _, (X_test, _), ids = splits
    unknown = np.setdiff1d(np.arange(NUM_NAMED), ids)
    messages: list[str] = []

    class Listener(SilentReporter):
        def message(self, text: str) -> None:
            messages.append(text)

    (tmp_path / "allow.txt").write_text(f"{unknown[0]}\n{ids[3]}\n{unknown[9]}\n")
    top = predict(runs[1], input=X_test, allow=tmp_path / "allow.txt", reporter=Listener()).top
    assert set(top.label_ids[:, 0].tolist()) == {ids[3]} and (top.label_ids[:, 1:] == -1).all()
    assert sum("2 of its 3 labels have no training instance" in text for text in messages) == 1
    messages.clear()
    (tmp_path / "allow.txt").write_text(f"{ids[3]}\n")
    predict(runs[1], input=X_test, allow=tmp_path / "allow.txt", reporter=Listener())
    assert "have no training instance" not in "".join(messages)


@pytest.mark.parametrize("format", ["midx", "onnx", "faiss"])
def test_exports_answer_with_the_ids_that_labels_have(
    format: str, runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip({"midx": "numpy", "onnx": "onnxruntime"}.get(format, format))
    _, (X_test, Y_test), ids = splits
    result = export(runs[1], output=tmp_path / "out", format=format, data=(X_test, spread(Y_test, ids)))
    assert result.num_instances > 0 and result.measured[0].recall_5 > 0.98 and result.num_labels == NUM_NAMED
    assert result.as_dict()["num_label_rows"] == len(ids)
    facts = json.loads((tmp_path / "out" / "export.json").read_bytes())
    assert (facts["model"]["num_labels"], facts["model"]["num_label_rows"]) == (NUM_NAMED, len(ids))
    few = load_file(runs[0] / "model.safetensors")
    row = X_test[0]
    length = np.sqrt((row.data**2).sum())
    query = np.maximum((row.data / length) @ few["encoder.embedding"][row.indices] + few["encoder.bias"], 0)
    logits = few["labels.weight"] @ query + few["labels.bias"]
    best = [int(label) for label in ids[np.argsort(-logits, kind="stable")[:5]]]
    if format == "midx":
        assert facts["version"] == 4
        command = [sys.executable, str(READER), str(tmp_path / "out")]
        line = " ".join(f"{f}:{v:.9g}" for f, v in zip(row.indices, row.data, strict=True))
        done = subprocess.run(command, input=line, text=True, capture_output=True, check=True, timeout=60)
        assert [int(pair.split(":")[0]) for pair in done.stdout.split()] == best
    elif format == "faiss":
        import faiss

        asked = np.concatenate([query, [1.0, 0.0]])[None].astype(np.float32)
        for name in ("hnsw", "ivf"):
            found = faiss.read_index(str(tmp_path / "out" / f"{name}.faiss")).search(asked, 5)
            assert set(found[1][0].tolist()) == set(best)


def test_the_other_commands_know_them(
    splits: tuple[Pair, Pair, np.ndarray], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    (X, Y), _, ids = splits
    named = X, spread(Y, ids)
    diagnosis = diagnose(runs[1], data=named, num_instances=20, repeats=2)
    expected = diagnose(runs[0], data=(X, Y), num_instances=20, repeats=2)
    assert diagnosis.num_labels == len(ids)
    assert [one.kl_from_softmax for one in diagnosis.samplers] == [one.kl_from_softmax for one in expected.samplers]
    unknown = np.setdiff1d(np.arange(NUM_NAMED), ids)[: len(ids)]
    with pytest.raises(DataError, match="no instance has a label that the model has a row for"):
        diagnose(runs[1], data=(X, spread(Y, unknown)), num_instances=20, repeats=2)
    few, whole = (plan(data, config=QUICK) for data in ((X, Y), named))
    assert few.forecast.host["tables"] == whole.forecast.host["tables"]
    assert few.forecast.checkpoint_bytes == whole.forecast.checkpoint_bytes
    begun = train(named, output=tmp_path / "run", config=QUICK, max_seconds=0.0)
    assert not begun.finished and resume(tmp_path / "run", data=named).finished
    for member in (".", "members/2"):
        model = member + "/model.safetensors"
        assert (tmp_path / "run" / model).read_bytes() == (runs[1] / model).read_bytes()


@pytest.mark.fault("R7")
def test_a_member_of_other_labels_is_refused(splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path) -> None:
    """Its rows would be taken for those of other labels."""
    (X, Y), _, ids = splits
    others = np.sort((ids + 1) % NUM_NAMED)
    plain = QUICK | {"neighbors": {"enabled": False}, "ranker": {"enabled": False}}
    for name, some in (("whole", ids), ("others", others)):
        train((X, spread(Y, some)), output=tmp_path / name, config=plain)
    Predictor.load(tmp_path / "whole")
    member = tmp_path / "others" / "members" / "2"
    shutil.rmtree(member)
    shutil.copytree(tmp_path / "whole" / "members" / "2", member)
    with pytest.raises(DataError, match="is of other features or labels than"):
        Predictor.load(tmp_path / "others")


def test_they_are_dropped_where_they_are_more_than_a_twentieth_or_as_asked() -> None:
    shape = DataShape(num_instances=500, num_features=10, num_labels=1000, num_positives=900)
    for used, expected in ((None, "keep"), (1000, "keep"), (950, "keep"), (949, "drop"), (0, "drop")):
        assert resolve(Config(), replace(shape, num_used_labels=used)).data.unused_labels == expected
    kept = Config.model_validate({"data": {"unused_labels": "keep"}})
    assert resolve(kept, replace(shape, num_used_labels=10)).data.unused_labels == "keep"
    # What is derived is derived from the rows that there are.
    dropped, few = resolve(Config(), replace(shape, num_used_labels=70)), replace(shape, num_labels=70)
    assert dropped.sampler == resolve(Config(), few).sampler != resolve(Config(), shape).sampler


def test_known_labels_number_anew_and_read_what_they_wrote() -> None:
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((40, 60)) < 0.1, 1, 0).astype(np.float32)
    dense[:, rng.permutation(60)[:25]] = 0
    config = DataConfig.model_validate({"unused_labels": "drop"})
    known, used = KnownLabels.fit(config, csr_matrix(dense)), np.flatnonzero(dense.any(axis=0))
    whole = KnownLabels.fit(DataConfig.model_validate({"unused_labels": "keep"}), csr_matrix(dense))
    others = csr_matrix(rng.random((7, 60)).astype(np.float32))
    assert (known(others).toarray() == others.toarray()[:, used]).all() and whole(others) is others
    asked = np.array([59, *used[[4, 0, 7]], 0, used[-1]])
    assert known.labels_of(known.rows_of(asked)).tolist() == [label for label in asked if label in used]
    assert known.labels_of(np.array([[2, -1]])).tolist() == [[used[2], -1]]
    assert (known.take(known.spread(np.arange(len(used)))) == np.arange(len(used))).all()
    assert known.spread(np.ones(len(used))).sum() == len(used) and known.spread(np.ones(len(used))).shape == (60,)
    assert not whole.arrays() and whole.rows_of(asked) is asked and whole.equals(KnownLabels(num_labels=60))
    arrays = known.arrays()
    again = KnownLabels.of(config, arrays, len(used))
    assert again.equals(known) and not again.equals(whole) and not whole.equals(again) and again.num_labels == 60
    assert not KnownLabels(num_labels=61, ids=known.ids).equals(known)
    for name, value in (
        (LABEL_IDS, arrays[LABEL_IDS][::-1]),
        (LABEL_IDS, arrays[LABEL_IDS][:-1]),
        (LABEL_IDS, arrays[LABEL_IDS].astype(np.int64)),
        (LABEL_IDS, arrays[LABEL_IDS] - 60),
        (NUM_LABELS, arrays[LABEL_IDS].max().astype(np.int64)),
        (NUM_LABELS, np.array(np.inf)),
        (NUM_LABELS, np.array([60])),
        (NUM_LABELS, np.array(2**40)),
    ):
        with pytest.raises(ValueError, match=r"train\.(label_ids|num_labels)"):
            KnownLabels.of(config, arrays | {name: value}, len(used))
    with pytest.raises(LookupError):
        KnownLabels.of(config, {}, len(used))
    nothing = KnownLabels.fit(config, csr_matrix((3, 5), dtype=np.float32))
    assert nothing(csr_matrix(np.ones((2, 5), dtype=np.float32))).shape == (2, 1)
