"""Features that no training instance has: of hashed texts, most. They cost nothing and say nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix, hstack

from xmc_midx import Config, Predictor, evaluate, export, resume, train
from xmc_midx.config import DataConfig
from xmc_midx.data.features import FEATURE_IDS, IDF, NUM_FEATURES, FeatureScaling, normalize_rows
from xmc_midx.errors import DataError
from xmc_midx.pipeline import diagnose, plan
from xmc_midx.recipe import DataShape, resolve

READER = Path(__file__).parents[1] / "scripts" / "read_midx.py"
NUM_HASHED = 5003
QUICK = {"training": {"epochs": 3, "ensemble_size": 2}, "model": {"dim": 16, "storage": "float32"}}
Pair = tuple[csr_matrix, csr_matrix]


def spread(features: csr_matrix, ids: np.ndarray) -> csr_matrix:
    """Feature f as `ids[f]` of `NUM_HASHED`."""
    return csr_matrix((features.data, ids[features.indices], features.indptr), shape=(features.shape[0], NUM_HASHED))


@pytest.fixture(scope="module")
def splits(topic_data: Callable[..., Pair]) -> tuple[Pair, Pair, np.ndarray]:
    """Training and test split with the features that the training has alone, and their hashed, rising ids."""
    (X, Y), (X_test, Y_test) = topic_data(320, seed=0), topic_data(150, seed=1)
    used = np.flatnonzero(X.getnnz(axis=0))
    ids = np.sort(np.random.default_rng(3).permutation(NUM_HASHED)[: len(used)])
    return (X[:, used], Y), (X_test[:, used], Y_test), ids


@pytest.fixture(scope="module")
def runs(splits: tuple[Pair, Pair, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the few features, and of the hashed ones."""
    (X, Y), _, ids = splits
    directory = tmp_path_factory.mktemp("runs")
    train((X, Y), output=directory / "few", config=QUICK)
    result = train((spread(X, ids), Y), output=directory / "hashed", config=QUICK)
    assert result.config.data.unused_features == "drop"
    return directory / "few", directory / "hashed"


def test_a_model_of_hashed_features_is_that_of_the_used_ones(
    runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray]
) -> None:
    _, (X_test, Y_test), ids = splits
    for member in (".", "members/2"):
        few, hashed = (load_file(run / member / "model.safetensors") for run in runs)
        assert (hashed.pop(FEATURE_IDS) == ids).all() and hashed.pop(NUM_FEATURES) == NUM_HASHED
        assert few.keys() == hashed.keys()
        assert all(np.array_equal(few[name], hashed[name]) for name in few)
    few_predictor, predictor = (Predictor.load(run) for run in runs)
    assert predictor.num_features == NUM_HASHED != few_predictor.num_features
    expected, found = few_predictor.predict(X_test), predictor.predict(spread(X_test, ids))
    assert (expected.label_ids == found.label_ids).all() and (expected.scores == found.scores).all()
    row = X_test[0]
    one = predictor.predict({int(ids[f]): float(v) for f, v in zip(row.indices, row.data, strict=True)})
    assert (one.label_ids[0] == expected.label_ids[0]).all()
    reports = (
        evaluate(runs[0], data=(X_test, Y_test)).report,
        evaluate(runs[1], data=(spread(X_test, ids), Y_test)).report,
    )
    assert reports[0] == reports[1]


def test_an_unknown_feature_takes_its_part_of_the_length_and_no_more(
    runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray]
) -> None:
    _, (X_test, _), ids = splits
    unknown = np.setdiff1d(np.arange(NUM_HASHED), ids)[[0, 7, -1]]
    extra = csr_matrix((np.full(3, 2.0), unknown, [0, 3]), shape=(1, NUM_HASHED), dtype=np.float32)
    rows = spread(X_test, ids) + csr_matrix(np.ones((X_test.shape[0], 1), dtype=np.float32)) @ extra
    scaled = normalize_rows(hstack([X_test, np.full((X_test.shape[0], 3), 2.0)], format="csr", dtype=np.float32))
    few_predictor, predictor = (Predictor.load(run) for run in runs)
    few_predictor.scaling = FeatureScaling(normalize="none")
    expected, found = few_predictor.predict(scaled[:, :-3]), predictor.predict(rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert (found.label_ids == expected.label_ids).mean() > 0.99
    alone = predictor.read([{int(f): 1.0 for f in unknown}, {}, {int(unknown[0]): 1.0, int(ids[5]): 0.1}])
    answers = predictor.predict(alone).label_ids
    assert (answers[0] == answers[1]).all() and predictor.num_without_features(alone) == 2
    assert few_predictor.num_without_features(few_predictor.read([{}, {3: 1.0}])) == 1


def read_midx(directory: Path, lines: list[str]) -> list[dict[int, float]]:
    """What the reader answers to each line."""
    command = [sys.executable, str(READER), str(directory)]
    done = subprocess.run(command, input="\n".join(lines), text=True, capture_output=True, check=True, timeout=60)
    pairs = ([one.split(":") for one in line.split()] for line in done.stdout.splitlines())
    return [{int(label): float(score) for label, score in line} for line in pairs]


@pytest.mark.parametrize("format", ["midx", "onnx", "faiss"])
def test_exports_take_the_ids_that_rows_have(
    format: str, runs: tuple[Path, Path], splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip({"midx": "numpy", "onnx": "onnxruntime"}.get(format, format))
    _, (X_test, Y_test), ids = splits
    result = export(runs[1], output=tmp_path / "out", format=format, data=(spread(X_test, ids), Y_test))
    assert result.num_instances > 0 and result.measured[0].recall_5 > 0.98
    if format == "midx":
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        few = load_file(runs[0] / "model.safetensors")
        table = tensors["encoder.embedding"]
        assert table.shape[0] == NUM_HASHED and np.array_equal(table[ids], few["encoder.embedding"])
        assert not np.delete(table, ids, axis=0).any() and (tensors["features.ids"] == ids).all()
        assert json.loads((tmp_path / "out" / "export.json").read_bytes())["version"] == 3
        row = X_test[0]
        line = " ".join(f"{ids[f]}:{v:.9g}" for f, v in zip(row.indices, row.data, strict=True))
        # A feature that the model does not know makes the row longer, and no more.
        unknown = int(np.setdiff1d(np.arange(NUM_HASHED), ids)[0])
        plain, longer = read_midx(tmp_path / "out", [line, f"{line} {unknown}:2"])
        length = np.sqrt((row.data**2).sum())
        for found, scale in ((plain, 1.0), (longer, length / np.sqrt(length**2 + 4))):
            query = np.maximum(
                scale * (row.data / length) @ few["encoder.embedding"][row.indices] + few["encoder.bias"], 0
            )
            logits = few["labels.weight"] @ query + few["labels.bias"]
            assert found and all(abs(logits[label] - score) < 1e-4 for label, score in found.items())


def test_the_other_commands_know_them(
    splits: tuple[Pair, Pair, np.ndarray], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    (X, Y), _, ids = splits
    hashed = spread(X, ids), Y
    assert diagnose(runs[1], data=hashed, num_instances=20, repeats=2).as_dict()["samplers"]
    forecasts = [plan(data, config=QUICK).forecast for data in ((X, Y), hashed)]
    assert forecasts[0].host["tables"] == forecasts[1].host["tables"]
    begun = train(hashed, output=tmp_path / "run", config=QUICK, max_seconds=0.0)
    assert not begun.finished and resume(tmp_path / "run", data=hashed).finished
    for member in (".", "members/2"):
        model = member + "/model.safetensors"
        assert (tmp_path / "run" / model).read_bytes() == (runs[1] / model).read_bytes()


@pytest.mark.fault("R7")
def test_a_member_of_other_features_is_refused(splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path) -> None:
    """Its table would be read where it has no rows."""
    (X, Y), _, ids = splits
    fewer = spread(X[:, : X.shape[1] // 2], ids)
    others = spread(X, (ids + 1) % NUM_HASHED)
    others.sort_indices()
    plain = QUICK | {"neighbors": {"enabled": False}, "ranker": {"enabled": False}}
    for name, features in (("whole", spread(X, ids)), ("fewer", fewer), ("others", others)):
        train((features, Y), output=tmp_path / name, config=plain)
    Predictor.load(tmp_path / "whole")
    for name in ("fewer", "others"):
        member = tmp_path / name / "members" / "2"
        shutil.rmtree(member)
        shutil.copytree(tmp_path / "whole" / "members" / "2", member)
        with pytest.raises(DataError, match="is of other features or labels than"):
            Predictor.load(tmp_path / name)


def test_counts_keep_their_weights(splits: tuple[Pair, Pair, np.ndarray], tmp_path: Path) -> None:
    (X, Y), (X_test, _), ids = splits
    counts, tests = X.copy(), X_test.copy()
    counts.data, tests.data = np.ceil(3 * counts.data), np.ceil(3 * tests.data)
    train((counts, Y), output=tmp_path / "few", config=QUICK)
    result = train((spread(counts, ids), Y), output=tmp_path / "hashed", config=QUICK)
    assert (result.config.data.weighting, result.config.data.unused_features) == ("tf-idf", "drop")
    expected = Predictor.load(tmp_path / "few").predict(tests)
    found = Predictor.load(tmp_path / "hashed").predict(spread(tests, ids))
    assert (expected.label_ids == found.label_ids).all() and (expected.scores == found.scores).all()


def test_they_are_dropped_where_they_are_more_than_a_tenth_or_as_asked() -> None:
    shape = DataShape(num_instances=500, num_features=1000, num_labels=20, num_positives=900)
    for used, expected in ((None, "keep"), (1000, "keep"), (900, "keep"), (899, "drop"), (0, "drop")):
        assert resolve(Config(), replace(shape, num_used_features=used)).data.unused_features == expected
    kept = Config.model_validate({"data": {"unused_features": "keep"}})
    assert resolve(kept, replace(shape, num_used_features=10)).data.unused_features == "keep"


def test_scaling_drops_columns_and_reads_what_it_wrote() -> None:
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((40, 60)) < 0.1, rng.random((40, 60)), 0).astype(np.float32)
    dense[:, rng.permutation(60)[:25]] = 0
    rows = csr_matrix(dense)
    for weighting in ("none", "tf-idf"):
        config = DataConfig.model_validate({"weighting": weighting, "unused_features": "drop"})
        scaling = FeatureScaling.fit(config, rows)
        whole = FeatureScaling.fit(config.model_copy(update={"unused_features": "keep"}), rows)
        used = np.flatnonzero(dense.any(axis=0))
        found = scaling(rows)
        assert found.has_canonical_format and found.indices.dtype == np.int32
        assert (found.toarray() == whole(rows).toarray()[:, used]).all()
        others = csr_matrix(rng.random((7, 60)).astype(np.float32))
        assert (scaling(others).toarray() == whole(others).toarray()[:, used]).all()
        assert scaling(rows[:0]).shape == (0, len(used))
        arrays = scaling.arrays()
        again = FeatureScaling.of(config, arrays, len(used))
        assert (again(others) != scaling(others)).nnz == 0 and again.num_features == 60
        assert (IDF in arrays) == (weighting == "tf-idf") and whole.kept is None
        for name, value in (
            (FEATURE_IDS, arrays[FEATURE_IDS][::-1]),
            (FEATURE_IDS, arrays[FEATURE_IDS][:-1]),
            (FEATURE_IDS, arrays[FEATURE_IDS].astype(np.int64)),
            (FEATURE_IDS, arrays[FEATURE_IDS] - 60),
            (NUM_FEATURES, arrays[FEATURE_IDS].max().astype(np.int64)),
            (NUM_FEATURES, np.array(np.inf)),
            (NUM_FEATURES, np.array([60])),
            (NUM_FEATURES, np.array(2**40)),
        ):
            with pytest.raises(ValueError, match=r"train\.(feature_ids|idf|num_features)"):
                FeatureScaling.of(config, arrays | {name: value}, len(used))
        with pytest.raises(LookupError):
            FeatureScaling.of(config, {IDF: arrays.get(IDF)}, len(used))
    nothing = FeatureScaling.fit(
        DataConfig(unused_features="drop", weighting="none"), csr_matrix((3, 5), dtype=np.float32)
    )
    assert nothing(csr_matrix(np.ones((2, 5), dtype=np.float32))).shape == (2, 1)
