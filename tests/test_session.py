"""What is saved when: each epoch, and of a small model no more often than saves may take of the time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from test_pipeline import STEPS, TOTAL, Interruption, StopAfter, history, make_config, model_bytes

from xmc_midx import finish, session, validation
from xmc_midx.checkpoint import CheckpointStore
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.registry import find_spec
from xmc_midx.errors import DivergedError
from xmc_midx.pipeline import resume, train
from xmc_midx.rundir import RunDirectory
from xmc_midx.trainer import Trainer
from xmc_midx.types import SilentReporter
from xmc_midx.validation import Validator

EACH_EPOCH = "training.save_every_steps=1000000"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Saves may take no time at all: the first epoch and the last alone are due. -> the steps that are saved."""
    steps: list[int] = []
    begin = CheckpointStore.begin

    def noted(store: CheckpointStore, step: int, parts: Any) -> None:
        steps.append(step)
        begin(store, step, parts)

    monkeypatch.setattr(session, "_SAVE_SHARE", 1e-12)
    monkeypatch.setattr(CheckpointStore, "begin", noted)
    return steps


def best_is(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Let the validations rise to that of one epoch, and fall after it."""
    metrics = Validator.metrics

    def chosen(self: Validator, top: Any) -> dict[str, float]:
        distance = abs(self.trainer.step // STEPS - epoch)
        return dict.fromkeys(metrics(self, top), 1.0 / (1 + distance))

    monkeypatch.setattr(Validator, "metrics", chosen)


def fail_after(monkeypatch: pytest.MonkeyPatch, epochs: int, error: BaseException) -> None:
    """Let the epoch after so many begin with an error."""
    run_epoch = Trainer.run_epoch

    def run(self: Trainer, *given: Any, **named: Any) -> Any:
        if self.step == epochs * STEPS:
            raise error
        return run_epoch(self, *given, **named)

    monkeypatch.setattr(Trainer, "run_epoch", run)


def saved(run: Path) -> list[int]:
    return CheckpointStore(run / "checkpoints").steps()


def test_epochs_that_follow_a_save_too_soon_wait_for_the_next_one(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    best_is(monkeypatch, 3)
    train(topic_dir, output=tmp_path / "few", config=make_config())
    # The best epoch goes along with the last one's save, and only then.
    assert begun == [STEPS, 3 * STEPS, TOTAL]
    begun.clear()
    train(topic_dir, output=tmp_path / "each", config=make_config(EACH_EPOCH))
    assert begun == [STEPS, 2 * STEPS, 3 * STEPS, TOTAL]
    for pointer in ("best", "latest"):
        assert model_bytes(tmp_path / "few", pointer) == model_bytes(tmp_path / "each", pointer)
    assert CheckpointStore(tmp_path / "few" / "checkpoints").step_of("best") == 3 * STEPS
    assert [line["step"] for line in history(tmp_path / "few")] == [STEPS, 2 * STEPS, 3 * STEPS, TOTAL]
    assert saved(tmp_path / "few") == [3 * STEPS, TOTAL], "the best and the last, as of a run that saves each epoch"


def test_a_model_that_memory_should_not_hold_twice_is_saved_each_epoch(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    monkeypatch.setattr(session, "_SMALL_MODEL", 1000)
    train(topic_dir, output=tmp_path / "run", config=make_config())
    assert begun == [STEPS, 2 * STEPS, 3 * STEPS, TOTAL]


@pytest.mark.fault("R5")
@pytest.mark.parametrize("stop", [STEPS + 3, 2 * STEPS + 4, 3 * STEPS + 1])
def test_a_run_that_is_killed_between_two_saves_ends_alike(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int], stop: int
) -> None:
    best_is(monkeypatch, 2)
    train(topic_dir, output=tmp_path / "whole", config=make_config())
    with pytest.raises(Interruption):
        train(topic_dir, output=tmp_path / "run", config=make_config(), reporter=StopAfter(stop))
    assert saved(tmp_path / "run") == [STEPS], "the last save is the first epoch's"
    resume(tmp_path / "run")
    for pointer in ("best", "latest"):
        assert model_bytes(tmp_path / "run", pointer) == model_bytes(tmp_path / "whole", pointer)
    assert history(tmp_path / "run") == history(tmp_path / "whole")


@pytest.mark.fault("R3")
def test_an_interruption_saves_the_best_epoch_too(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    best_is(monkeypatch, 2)
    train(topic_dir, output=tmp_path / "whole", config=make_config())

    class Asked(StopAfter):
        def step(self, num_steps: int, **values: Any) -> None:
            try:
                super().step(num_steps, **values)
            except Interruption:
                raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        train(topic_dir, output=tmp_path / "run", config=make_config(), reporter=Asked(3 * STEPS + 1))
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert (store.step_of("best"), store.step_of("latest")) == (2 * STEPS, 3 * STEPS + 1)
    resume(tmp_path / "run")
    for pointer in ("best", "latest"):
        assert model_bytes(tmp_path / "run", pointer) == model_bytes(tmp_path / "whole", pointer)


@pytest.mark.fault("R11")
def test_a_divergence_keeps_the_best_epoch_that_was_not_on_the_disk_yet(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    best_is(monkeypatch, 4)
    fail_after(monkeypatch, 3, DivergedError("The loss became nan", hint="Lower the rates."))
    with pytest.raises(DivergedError) as caught:
        train(topic_dir, output=tmp_path / "run", config=make_config())
    assert f"checkpoint of step {3 * STEPS} is finite" in str(caught.value.hint)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert (store.step_of("best"), store.step_of("latest")) == (3 * STEPS, 3 * STEPS)
    store.load("latest", ["model", "training"])


@pytest.mark.fault("R3")
def test_an_interruption_at_the_end_of_the_best_epoch_saves_it_once(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    best_is(monkeypatch, 2)
    fail_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(topic_dir, output=tmp_path / "run", config=make_config())
    assert begun == [STEPS, 2 * STEPS]
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert (store.step_of("best"), store.step_of("latest")) == (2 * STEPS, 2 * STEPS)


# ---------------------------------------------------------------------- what is held out, and what it decides


def held_out(features: np.ndarray, labels: np.ndarray, fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    kept, out = validation.hold_out(sp.csr_matrix(features), sp.csr_matrix(labels), fraction, seed)
    assert sorted([*kept, *out]) == list(range(len(features)))
    assert (np.diff(kept) > 0).all() and (np.diff(out) > 0).all()
    return kept.tolist(), out.tolist()


def test_an_instance_and_its_copies_are_held_out_together() -> None:
    rng = np.random.default_rng(0)
    features = rng.random((100, 6), dtype=np.float32)
    labels = rng.integers(0, 2, (100, 4)).astype(np.float32)
    twice, labels_twice = np.vstack([features, features]), np.vstack([labels, labels])
    for seed in range(5):
        kept, out = held_out(twice, labels_twice, 0.1, seed)
        assert len(out) == 20 and {row % 100 for row in kept}.isdisjoint({row % 100 for row in out})
    # Two instances that look alike but have other labels are two instances, and so is a row of chance.
    others = np.vstack([labels, 1 - labels])
    together = [len({row % 100 for row in held_out(twice, others, 0.1, seed)[1]}) for seed in range(5)]
    assert max(together) == 20, "most are held out without the one that looks alike"
    # Without copies it is the first tenth of a random order.
    order = np.random.default_rng((3, 0)).permutation(100)
    assert held_out(features, labels, 0.1, 3)[1] == sorted(order[:10].tolist())


def test_an_instance_of_many_copies_is_trained_on() -> None:
    features = np.vstack([np.eye(60, dtype=np.float32), np.zeros((240, 60), dtype=np.float32)])
    labels = np.ones((300, 1), dtype=np.float32)
    assert max(held_out(features, labels, 0.1)[1]) < 60 and len(held_out(features, labels, 0.1)[1]) == 30
    for rows in ([0] * 40, [0, 1] * 20, list(range(13)) * 3):
        same = np.eye(20, dtype=np.float32)[rows]
        kept, out = held_out(same, labels[: len(rows)], 0.1)
        assert len(out) <= 4 and len(kept) >= 36, "as many as asked for, or none"
    out = held_out(np.vstack([np.eye(20, dtype=np.float32)] * 2), labels[:40], 0.1)[1]
    assert len(out) == 4 and out[2] - out[0] == out[3] - out[1] == 20, "where all have a copy, two of them with theirs"
    assert held_out(features[:5], labels[:5], 0.1)[1] == [] == held_out(features[:0], labels[:0], 0.1)[1]


def test_of_epochs_that_are_equal_the_last_is_kept(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a label an instance each, nothing of what is held out was ever seen: all epochs have 0."""
    monkeypatch.setattr(
        Validator, "metrics", lambda *_: dict.fromkeys(("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5"), 0.0)
    )
    result = train(topic_dir, output=tmp_path / "run", config=make_config())
    assert result.best_epoch == result.epochs == 4
    stopped = train(topic_dir, output=tmp_path / "patient", config=make_config("training.patience=2"))
    assert stopped.epochs == 3, "an equal score is no rise"


def test_propensities_of_a_known_dataset_hold_for_the_held_out_instances_too(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("Amazon-670K")
    monkeypatch.setattr("xmc_midx.pipeline.inputs.match_spec", lambda *_: spec)
    seen: list[tuple[float, float]] = []
    fit = finish.fit_interpolation

    def noted(*given: Any, **named: Any) -> Any:
        seen.append(named["propensity"])
        return fit(*given, **named)

    monkeypatch.setattr(finish, "fit_interpolation", noted)
    known = train(topic_dir, output=tmp_path / "known", config=make_config("ranker.enabled=true"))
    monkeypatch.setattr("xmc_midx.pipeline.inputs.match_spec", lambda *_: None)
    unknown = train(topic_dir, output=tmp_path / "unknown", config=make_config("ranker.enabled=true"))
    assert seen == [known.propensity, unknown.propensity] == [(0.6, 2.6), (0.55, 1.5)]
    first = [history(tmp_path / name)[0]["validation"] for name in ("known", "unknown")]
    assert first[0]["P@1"] == first[1]["P@1"] and first[0]["PSP@1"] != first[1]["PSP@1"]


def test_a_training_that_holds_nothing_out_says_what_it_does_without(topic_dir: Path, tmp_path: Path) -> None:
    class Messages(SilentReporter):
        def __init__(self) -> None:
            self.found: list[str] = []

        def message(self, text: str) -> None:
            self.found.append(text)

    messages = Messages()
    config = make_config("data.validation_fraction=0", "neighbors.enabled=true")
    train(topic_dir, output=tmp_path / "run", config=config, reporter=messages)
    assert any("no instances are held out" in text for text in messages.found)


def test_a_session_that_nobody_holds_is_gone_at_once(topic_dir: Path, tmp_path: Path) -> None:
    """A cycle would keep its tables and rows until the garbage collector looks."""
    split = load_dataset(topic_dir).split("train")
    config = make_config("training.ensemble_size=1")
    gc.collect()
    gc.disable()
    try:
        with RunDirectory.create(tmp_path / "run", config) as run:
            one = session.TrainingSession(run, split, SilentReporter())
            trainer = weakref.ref(one.trainer)
            assert one.run_epochs()
            one.conclude()
            del one
        assert trainer() is None
    finally:
        gc.enable()
