"""Ensembles: models of their own that a run holds together, averaged at prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PRESETS
from scipy.sparse import csr_matrix

from xmc_midx import Predictor, evaluate, load_config, recipe, resume, train
from xmc_midx.calibration import calibrate
from xmc_midx.cells import fit_cells
from xmc_midx.cli import app
from xmc_midx.config import Config
from xmc_midx.data.dataset import load_dataset
from xmc_midx.errors import DataError
from xmc_midx.interpolation import Interpolation
from xmc_midx.pipeline import TrainResult, plan
from xmc_midx.pipeline.prediction import _model_digest
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.session import TrainingSession
from xmc_midx.types import SilentReporter, TopK

OPTIONS = (
    "model.dim=16",
    "training.epochs=2",
    "training.batch_size=32",
    "training.label_learning_rate=0.05",
    "training.encoder_learning_rate=0.2",
    "training.seed=5",
    "sampler.num_draws=8",
    "data.validation_fraction=0.2",
)
L = 23


def make_config(*assignments: str) -> Config:
    return load_config(assignments=[*OPTIONS, *assignments])


@pytest.fixture(scope="module")
def trained(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """An ensemble of three. Read only."""
    output = tmp_path_factory.mktemp("runs") / "three"
    return train(topic_dir, output=output, config=make_config("training.ensemble_size=3"), test=topic_dir / "test.txt")


def members_of(run: str | Path) -> list[Path]:
    return [Path(run), Path(run) / "members" / "2", Path(run) / "members" / "3"]


def dense(top: TopK) -> np.ndarray:
    """(N, L) scores; -inf where a label is not in the result."""
    found = np.full((len(top.label_ids), L), -np.inf)
    rows, places = np.nonzero(top.label_ids >= 0)
    found[rows, top.label_ids[rows, places]] = top.scores[rows, places]
    return found


def test_each_model_is_the_run_of_its_seed(trained: TrainResult, topic_dir: Path, tmp_path: Path) -> None:
    assert (trained.num_models, trained.finished) == (3, True)
    for number, path in enumerate(members_of(trained.run)):
        alone = tmp_path / str(number)
        train(topic_dir, output=alone, config=make_config(f"training.seed={5 + number}", "training.ensemble_size=1"))
        assert (path / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
        lines = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (path, alone)]
        assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
        settings = [json.loads((p / "interpolation.json").read_text()) for p in (path, alone)]
        rows_of_all = [values.pop("neighbors_sha256", None) for values in settings]
        assert settings[0] == settings[1]
        # The training rows are the same for all.
        assert rows_of_all == [None if number else rows_of_all[1], rows_of_all[1]]
        assert (path / "neighbors.safetensors").exists() == (number == 0)
    with pytest.raises(DataError, match="is of an ensemble") as refused:
        Predictor.load(members_of(trained.run)[1])
    assert refused.value.hint == f"Use {trained.run}."
    sizes = [
        sum(
            (path / f"{name}.safetensors").stat().st_size
            for name in ("model", "neighbors", "ranker")
            if (path / f"{name}.safetensors").exists()
        )
        for path in members_of(trained.run)
    ]
    assert trained.model_bytes == sum(sizes)


def test_scores_are_averaged_and_what_each_calibration_makes_of_them(trained: TrainResult, topic_dir: Path) -> None:
    rows = load_dataset(topic_dir).split("test").features
    whole = Predictor.load(trained.run)
    first = Predictor.load(trained.run)
    first.members = ()
    singles = [first, *whole.members]
    assert len(singles) == 3 and all(one.neighbors is whole.neighbors for one in whole.members)
    mean = np.mean([dense(one.predict(rows, k=L)) for one in singles], axis=0)
    order = np.argsort(-mean, axis=1, kind="stable")
    top = TopK(label_ids=order, scores=np.take_along_axis(mean, order, axis=1).astype(np.float32))
    calibrations = [one.calibration for one in singles if one.calibration is not None]
    assert len(calibrations) == 3
    chances = np.mean([dense(calibrate(top, one)) for one in calibrations], axis=0)
    for scores, expected in (("logits", mean), ("probabilities", chances)):
        for k in (1, 5, L):
            found = whole.predict(rows, k=k, scores=scores)  # type: ignore[arg-type]
            best = np.sort(expected, axis=1)[:, ::-1][:, :k]
            np.testing.assert_allclose(found.scores, best, atol=1e-5)
            np.testing.assert_allclose(np.take_along_axis(expected, found.label_ids, axis=1), best, atol=1e-5)
    allowed = whole.predict(rows, k=4, allow=[3, 1, 7])
    assert set(np.unique(allowed.label_ids)) <= {-1, 1, 3, 7} and (allowed.label_ids[:, 3] == -1).all()
    above = whole.predict(rows, k=5, scores="probabilities", threshold=0.4)
    assert (above.scores[above.label_ids >= 0] >= 0.4).all() and (above.label_ids == -1).any()
    one = whole.predict(rows[7], k=3)
    np.testing.assert_array_equal(one.label_ids[0], whole.predict(rows, k=3).label_ids[7])
    assert trained.test is not None
    assert evaluate(trained.run, data=topic_dir).report.metrics == pytest.approx(trained.test.metrics)


@pytest.mark.parametrize("cells", [False, True])
def test_models_to_which_nothing_is_added_keep_their_logits(
    topic_dir: Path, tmp_path: Path, cells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is calibrated on these is a probability of their mean."""
    if cells:
        monkeypatch.setattr("xmc_midx.finish.CELLS_FROM", 2)
    plain = ("neighbors.enabled=false", "ranker.enabled=false", "training.ensemble_size=3", "model.storage=int4")
    train(topic_dir, output=tmp_path / "run", config=make_config(*plain))
    assert (tmp_path / "run" / "cells.safetensors").exists() == cells
    assert not list((tmp_path / "run" / "members").rglob("cells.safetensors"))
    rows = load_dataset(topic_dir).split("test").features
    whole, first = Predictor.load(tmp_path / "run"), Predictor.load(tmp_path / "run")
    first.members = ()
    assert all(one.index.source[0].codes.dtype == np.uint8 for one in whole.members)
    singles = [first, *whole.members]
    mean = np.mean([dense(one.predict(rows, k=L)) for one in singles], axis=0)
    found = whole.predict(rows, k=L)
    np.testing.assert_allclose(dense(found), mean, atol=1e-5)
    calibrations = [one.calibration for one in singles if one.calibration is not None]
    chances = np.mean([calibrate(found, one).scores for one in calibrations], axis=0)
    np.testing.assert_allclose(whole.predict(rows, k=L, scores="probabilities").scores, chances, atol=1e-6)


@pytest.mark.parametrize(
    ("scanned", "enabled", "expected"),
    [((0, 10**9), True, 3), ((10**6, 0), True, 3), ((10**6, 10**9), True, 1), ((0, 0), False, 1)],
)
def test_a_further_model_builds_cells_where_many_instances_ask(
    topic_dir: Path,
    tmp_path: Path,
    scanned: tuple[int, int],
    enabled: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It needs them for its rivals alone; of few instances, all labels are looked at sooner."""
    built = []
    monkeypatch.setattr("xmc_midx.finish.CELLS_FROM", 2)
    monkeypatch.setattr("xmc_midx.finish._SCANNED", scanned)
    monkeypatch.setattr("xmc_midx.finish.multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(
        "xmc_midx.finish.fit_cells", lambda *args, **given: built.append(1) or fit_cells(*args, **given)
    )
    train(
        topic_dir, output=tmp_path / "run", config=make_config("training.ensemble_size=3", f"ranker.enabled={enabled}")
    )
    assert len(built) == expected
    assert evaluate(tmp_path / "run", data=topic_dir).report.metrics["P@1"] > 0.6


def test_the_training_rows_are_with_the_first_model_that_needs_them(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = iter([Interpolation(), *2 * [Interpolation(model=0.5, votes=0.4, count=7)]])
    monkeypatch.setattr("xmc_midx.finish.fit_interpolation", lambda *_, **__: next(settings))
    train(topic_dir, output=tmp_path / "run", config=make_config("training.ensemble_size=3", "neighbors.count=7"))
    kept = [(path / "neighbors.safetensors").exists() for path in members_of(tmp_path / "run")]
    assert kept == [False, True, False]
    whole = Predictor.load(tmp_path / "run")
    assert whole.neighbors is None and whole.members[0].neighbors is whole.members[1].neighbors is not None
    rows = load_dataset(topic_dir).split("test").features
    mean = dense(whole.predict(rows, k=L))
    first = Predictor.load(tmp_path / "run")
    first.members = ()
    expected = np.mean([dense(one.predict(rows, k=L)) for one in (first, *whole.members)], axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-5)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Predictor, csr_matrix]:
    """Three models of 300 labels, and rows."""
    rng, directory = np.random.default_rng(8), tmp_path_factory.mktemp("many")
    lines = [
        f"{','.join(map(str, sorted({i % 300, int(rng.integers(300))})))} {i % 50}:1 {50 + i % 7}:0.5"
        for i in range(600)
    ]
    (directory / "train.txt").write_text("\n".join(["600 57 300", *lines]) + "\n")
    options = ["model.dim=8", "training.epochs=2", "training.ensemble_size=3", "data.validation_fraction=0.2"]
    train(directory, output=directory / "run", config=load_config(assignments=options))
    return Predictor.load(directory / "run"), csr_matrix(
        rng.random((40, 57)) * (rng.random((40, 57)) < 0.1), dtype=np.float32
    )


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_an_ensemble_ranks_alike_whatever_is_asked_for(many: tuple[Predictor, csr_matrix], scores: Any) -> None:
    predictor, rows = many
    whole = predictor.predict(rows, k=300, scores=scores)
    assert (np.sort(whole.label_ids, axis=1) == np.arange(300)).all() and (np.diff(whole.scores) <= 0).all()
    if scores == "probabilities":
        assert whole.scores.min() >= 0 and whole.scores.max() <= 1
    for k in (1, 20, 100, 101):
        found = predictor.predict(rows, k=k, scores=scores)
        np.testing.assert_array_equal(found.label_ids, whole.label_ids[:, :k])
        np.testing.assert_allclose(found.scores, whole.scores[:, :k], rtol=1e-5, atol=1e-7)
    rng = np.random.default_rng(3)
    for size in (1, 7, 150):
        chosen = rng.choice(300, size, replace=False)
        others = np.setdiff1d(np.arange(300), chosen)
        for options in ({"allow": chosen}, {"deny": others}):
            found = predictor.predict(rows, k=5, scores=scores, **options)
            for row in range(len(found.label_ids)):
                kept = np.isin(whole.label_ids[row], chosen)
                expected = whole.label_ids[row, kept][:5]
                assert found.label_ids[row, : len(expected)].tolist() == expected.tolist()
                np.testing.assert_allclose(
                    found.scores[row, : len(expected)], whole.scores[row, kept][:5], rtol=1e-5, atol=1e-7
                )


def test_what_is_finished_needs_no_checkpoint_and_what_is_damaged_can_be_trained_again(
    trained: TrainResult, topic_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    run, messages = tmp_path / "run", list[str]()

    class Listener(SilentReporter):
        def message(self, text: str) -> None:
            messages.append(text)

    shutil.copytree(trained.run, run)
    shutil.rmtree(run / "members" / "3" / "checkpoints")
    again = resume(run, max_seconds=1e-6, reporter=Listener())
    assert again.finished and messages[-1] == "the run is finished already"
    of_each = [json.loads((path / "run.json").read_text())["seconds"] for path in members_of(run)]
    assert again.seconds == pytest.approx(sum(of_each), abs=1e-6) and again.num_finished == 3
    (run / "members" / "3" / "model.json").unlink()
    evaluate(run, data=topic_dir, reporter=Listener())
    assert "of which 2 can predict" in messages[-1]
    (run / "members" / "3" / "config.yaml").write_text("nonsense: 1\n")
    with pytest.raises(DataError) as refused:
        resume(run)
    assert refused.value.hint is not None and refused.value.hint.startswith(f"Remove {run / 'members' / '3'}: --resume")
    shutil.rmtree(run / "members" / "3")
    assert resume(run).finished
    for name in ("model.safetensors", "interpolation.json"):
        assert (run / "members/3" / name).read_bytes() == (Path(trained.run) / "members/3" / name).read_bytes()


def test_an_ensemble_of_fewer_models_is_another_one(trained: TrainResult, tmp_path: Path) -> None:
    """So a prediction that was begun with it is not gone on with."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    model = _model_digest(run)
    (run / "members" / "2" / "model.json").unlink()
    assert _model_digest(run) != model


def test_the_summary_says_how_far_an_ensemble_is(topic_dir: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["train", str(topic_dir), "--output", str(tmp_path / "run"), "--set", "training.ensemble_size=3"]
    assert app.run([*words, "--max-time", "0.001s", *(w for o in OPTIONS for w in ("--set", o))]) == 0
    assert "0 of 3 models in " in capsys.readouterr().out


@pytest.mark.parametrize("stopped_at", [2, 3])
def test_an_interrupted_ensemble_goes_on_and_predicts_with_what_is_there(
    trained: TrainResult, topic_dir: Path, tmp_path: Path, stopped_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, begun = tmp_path / "run", []
    original = TrainingSession._end_epoch

    def stop(self: TrainingSession, *arguments: Any) -> None:
        original(self, *arguments)
        if self.run_directory.path not in begun:
            begun.append(self.run_directory.path)
            if len(begun) == stopped_at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "_end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=make_config("training.ensemble_size=3"))
    assert len(Predictor.load(run).members) == stopped_at - 2
    assert app.run(["train", str(topic_dir), "--output", str(run)]) == 2, "an unfinished run is not begun anew"
    messages: list[str] = []

    class Listener(SilentReporter):
        def message(self, text: str) -> None:
            messages.append(text)

    result = resume(run, reporter=Listener())
    assert result.finished and result.num_models == 3 and "the run is finished already" not in messages
    for mine, whole in zip(members_of(run), members_of(trained.run), strict=True):
        assert (mine / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    again = resume(run, reporter=Listener())
    assert "the run is finished already" in messages and again.model_bytes == trained.model_bytes
    assert len(Predictor.load(run).members) == 2


def test_a_time_limit_between_two_models_is_obeyed(topic_dir: Path, tmp_path: Path) -> None:
    result = train(topic_dir, output=tmp_path / "run", config=make_config("training.ensemble_size=2"), max_seconds=1e-3)
    assert not result.finished and not (tmp_path / "run" / "members").exists()
    assert resume(tmp_path / "run").finished


def test_a_member_of_other_data_and_a_damaged_one_are_refused(
    trained: TrainResult, topic_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    path = run / "members" / "3" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors: is not what model\.json says"):
        Predictor.load(run)
    (tmp_path / "other.txt").write_text("4 3 2\n0 0:1\n1 1:1\n0 2:1\n1 1:2\n")
    shutil.rmtree(run / "members" / "3")
    train(
        tmp_path / "other.txt",
        output=run / "members" / "3",
        config=load_config(assignments=["training.ensemble_size=1"]),
    )
    with pytest.raises(DataError, match="is of other features or labels"):
        Predictor.load(run)


def test_what_takes_one_model_says_which(trained: TrainResult, topic_dir: Path, tmp_path: Path, capsys: Any) -> None:
    assert app.run(["export", trained.run, str(tmp_path / "out")]) == 0
    assert "its first model alone" in " ".join(capsys.readouterr().err.split())
    assert app.run(["diagnose", trained.run, str(topic_dir), "--num-draws", "4", "--samplers", "uniform"]) == 0
    assert "its first model alone" in " ".join(capsys.readouterr().err.split())


def test_force_replaces_an_ensemble(trained: TrainResult, topic_dir: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    options = [word for option in (*OPTIONS, "training.ensemble_size=1") for word in ("--set", option)]
    assert app.run(["train", str(topic_dir), "--output", str(run), "--force", *options]) == 0
    assert not (run / "members").exists()
    assert "models of" not in capsys.readouterr().out


def test_the_forecast_counts_every_model(topic_dir: Path) -> None:
    one, two, three = (
        plan(topic_dir, config=make_config(f"training.ensemble_size={n}", "training.models_at_once=1")).forecast
        for n in (1, 2, 3)
    )
    # But the training rows, which all share.
    assert two.disk_bytes < 2 * one.disk_bytes and three.disk_bytes - two.disk_bytes == two.disk_bytes - one.disk_bytes
    assert three.host_bytes == one.host_bytes
    assert one.finish_seconds is not None and three.finish_seconds == pytest.approx(3 * one.finish_seconds)


def test_best_and_few_instances_make_an_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_PRESETS", PRESETS)

    def size(num_instances: int, *assignments: str) -> object:
        shape = DataShape(num_instances=num_instances, num_features=9, num_labels=9, num_positives=num_instances)
        return resolve(load_config(assignments=assignments), shape).training.ensemble_size

    counts = (1, 13_107, 13_108, 14_564, 21_845, 21_846, 10**6)
    assert [size(n, "training.preset=best") for n in counts] == [10, 10, 9, 8, 6, 5, 5]
    assert size(10**6) == 2 and size(10**6, "training.preset=fast") == 1
    assert [size(n) for n in (1, 1000, 1638, 1639, 2048, 2730, 4096, 4097)] == [5, 5, 5, 4, 4, 3, 2, 2]
    assert size(10, "training.preset=fast") == 1 and size(10, "training.ensemble_size=2") == 2

    def epochs(*assignments: str) -> int:
        shape = DataShape(num_instances=90_000, num_features=9, num_labels=9, num_positives=90_000)
        found = resolve(load_config(assignments=assignments), shape).training.epochs
        assert isinstance(found, int)
        return found

    # A model that is alone has all of them, and one of `best` more.
    assert (epochs(), epochs("training.ensemble_size=3"), epochs("training.ensemble_size=1")) == (6, 6, 10)
    best = "training.preset=best"
    assert (epochs(best), epochs(best, "training.ensemble_size=1")) == (6, 11)
