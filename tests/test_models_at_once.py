"""Models of an ensemble whose epochs run at once: those of models one after the other, whatever comes between."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import victims
from conftest import MOST_MODELS
from test_ensemble import make_config

from xmc_midx import Predictor, load_config, recipe, resume, train
from xmc_midx.checkpoint import CheckpointStore
from xmc_midx.errors import DivergedError, ResourceError
from xmc_midx.pipeline import TrainResult, members, plan, planning
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.session import TrainingSession
from xmc_midx.types import EpochStats, SilentReporter

THREE = ("training.ensemble_size=3", "training.num_threads=5")


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.epochs: list[int] = []

    def start(self, stage: str, total: int | None) -> None:
        if stage in ("initialize", "neighbours"):
            self.said.append(stage)

    def epoch(self, stats: EpochStats) -> None:
        self.epochs.append(stats.epoch)

    def message(self, text: str) -> None:
        self.said.append(text)


def what_predicts(run: Path) -> dict[str, bytes]:
    """The files of all its models that predict, and the losses of their epochs."""
    files = sorted(path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts)
    found = {str(path.relative_to(run)): path.read_bytes() for path in [*files, *run.rglob("interpolation.json")]}
    for path in run.rglob("metrics.jsonl"):
        losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        found[str(path.relative_to(run))] = json.dumps(losses).encode()
    return found


def number_of(session: TrainingSession) -> int:
    return 1 if session.first is None else int(session.run_directory.path.name)


@pytest.fixture(scope="module")
def alone(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Of three models that were trained one after the other."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=1"))
    return what_predicts(run)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Method, model and torch's number of threads of each call of `run_epochs` and `conclude`, in their order."""
    calls: list[tuple[str, int, int]] = []

    def note(name: str) -> None:
        original = getattr(TrainingSession, name)

        def called(self: TrainingSession) -> Any:
            calls.append((name, number_of(self), torch.get_num_threads()))
            return original(self)

        monkeypatch.setattr(TrainingSession, name, called)

    note("run_epochs")
    note("conclude")
    return calls


@pytest.mark.parametrize(("at_once", "share"), [(2, 2), (3, 1), (9, 1)])
def test_models_at_once_are_those_of_one_after_the_other(
    topic_dir: Path,
    tmp_path: Path,
    alone: dict[str, bytes],
    noted: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    share: int,
) -> None:
    together = threading.Barrier(min(at_once, 3))
    run_epochs = TrainingSession.run_epochs

    def meet(self: TrainingSession) -> bool:
        if at_once != 2 or number_of(self) < 3:
            together.wait(timeout=60)  # breaks where they are not at once
        return run_epochs(self)

    monkeypatch.setattr(TrainingSession, "run_epochs", meet)
    before, listener = torch.get_num_threads(), Listener()
    result = train(
        topic_dir,
        output=tmp_path / "run",
        config=make_config(*THREE, f"training.models_at_once={at_once}"),
        reporter=listener,
    )
    assert result.finished and torch.get_num_threads() == before
    assert what_predicts(tmp_path / "run") == alone
    # The epochs by their share of the threads, what follows by all of them.
    assert {call for call in noted if call[0] == "run_epochs"} == {("run_epochs", n, share) for n in (1, 2, 3)}
    assert [call for call in noted if call[0] == "conclude"] == [("conclude", n, 5) for n in (1, 2, 3)]
    if at_once == 2:
        assert [call[:2] for call in noted[2:]] == [
            ("conclude", 1),
            ("conclude", 2),
            ("run_epochs", 3),
            ("conclude", 3),
        ]
        assert listener.epochs == [1, 2, 1, 2], "of the first and the third"
        names = [text for text in listener.said if text.startswith("model") or text == "neighbours"]
        assert names == [
            "models 1 and 2 of 3 at once; the progress is that of model 1",
            *("neighbours", "model 2 of 3", "neighbours", "model 3 of 3", "neighbours"),
        ]


def test_time_is_counted_once(topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models at once share it, and none counts what it waited for another."""
    clock = SimpleNamespace(now=0.0)
    lock = threading.Lock()

    def perf_counter() -> float:
        with lock:
            clock.now += 1.0
            return clock.now

    from xmc_midx import session

    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=perf_counter, monotonic=session.time.monotonic))
    result = train(topic_dir, output=tmp_path / "run", config=make_config(*THREE, "training.models_at_once=3"))
    assert 0.5 * clock.now < result.seconds <= clock.now


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException, others_wait: bool = True) -> None:
    """Let the first epoch of one model end with an error, the others having begun."""
    end_epoch, begun = TrainingSession._end_epoch, threading.Event()

    def end(self: TrainingSession, stats: EpochStats) -> None:
        end_epoch(self, stats)
        if number_of(self) == number:
            assert begun.wait(timeout=60)
            raise error
        begun.set()

    monkeypatch.setattr(TrainingSession, "_end_epoch", end)


def test_what_stops_the_first_saves_the_others(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", make_config(*THREE, "training.models_at_once=3")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=config)
    assert not any((path / "model.json").exists() for path in (run, run / "members/2", run / "members/3"))
    for path in (run, run / "members/2", run / "members/3"):
        store = CheckpointStore(path / "checkpoints")
        assert store.step_of("latest") is not None or not (path / "metrics.jsonl").read_text()
    assert resume(run).finished
    assert what_predicts(run) == alone


def test_an_interruption_while_the_first_waits_saves_the_others(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ready = tmp_path / "run", threading.Event()
    end_epoch = TrainingSession._end_epoch

    def end(self: TrainingSession, stats: EpochStats) -> None:
        end_epoch(self, stats)
        if number_of(self) == 2 and self.trainer.step < self.trainer.total_steps:
            ready.set()
            assert self.halted.wait(timeout=60)

    def interrupted(futures: Any) -> None:
        assert ready.wait(timeout=60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "_end_epoch", end)
        patch.setattr(members, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"))
    first, second = (CheckpointStore(path / "checkpoints").load("latest", []) for path in (run, run / "members/2"))
    assert first.state["counters"]["step"] == 2 * second.state["counters"]["step"] > 0
    assert resume(run).finished
    assert what_predicts(run) == alone


def test_an_error_of_another_waits_until_the_first_is_there(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, DivergedError("It diverged.", hint="Lower it."))
        with pytest.raises(DivergedError) as raised:
            train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"))
    expected = f"Remove {run / 'members' / '2'}: --resume trains that model anew, and until then the others predict."
    assert raised.value.hint is not None and raised.value.hint.endswith(expected)
    assert not Predictor.load(run).members
    assert resume(run).finished
    assert what_predicts(run) == alone


def test_an_error_of_the_first_stops_the_others(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupt_at(monkeypatch, 1, DivergedError("It diverged."))
    with pytest.raises(DivergedError, match="It diverged") as raised:
        train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=3", "training.epochs=400"))
    assert "Remove" not in (raised.value.hint or "")
    for number in (2, 3):
        store = CheckpointStore(run / "members" / str(number) / "checkpoints")
        assert store.load("latest", []).state["counters"]["step"] < 400 * 8, "it was stopped"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("beside")], "and is gone"


def test_a_time_limit_stops_all_and_each_goes_on(topic_dir: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    run = tmp_path / "run"
    begun = train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"), max_seconds=1e-3)
    assert (begun.finished, begun.num_finished) == (False, 0)
    assert sorted(path.name for path in (run / "members").iterdir()) == ["2"]
    assert resume(run).finished
    assert what_predicts(run) == alone


@pytest.mark.fault("R1")
@pytest.mark.parametrize(
    "point", ["run.begun:2", "step.done:5", "save.renamed:2", "validation.begun:3", "model.unsealed:1", "model.begun:2"]
)
def test_a_kill_of_models_at_once_loses_nothing(topic_dir: Path, tmp_path: Path, processes: Any, point: str) -> None:
    options = ["training.ensemble_size=2", "training.num_threads=2", "training.models_at_once=2", "training.epochs=2"]
    options += ["model.dim=16", "training.batch_size=32", "data.validation_fraction=0.2", "training.save_every_steps=3"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(topic_dir, output=whole, config=load_config(assignments=options))
    for expected, at in ((-signal.SIGKILL, point), (0, None)):
        child = processes.Process(target=victims.work, args=(str(topic_dir), str(run), options, at, None, 0))
        child.start()
        child.join()
        assert child.exitcode == expected
    assert what_predicts(run) == what_predicts(whole) and len(Predictor.load(run).members) == 1


@pytest.mark.fault("R3")
def test_a_signal_saves_every_model_at_once(topic_dir: Path, tmp_path: Path, processes: Any) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["training.ensemble_size=2", "training.num_threads=2", "training.epochs=300", "model.dim=16"]
    words = ["train", str(topic_dir), "--output", str(run), *(w for o in options for w in ("--set", o))]
    child = processes.Process(target=victims.command, args=(words, "step.done:30", signal.SIGTERM, str(log), False))
    child.start()
    child.join()
    text = " ".join(log.read_text().split())
    assert child.exitcode == 128 + signal.SIGTERM and "Go on with: xmc-midx train" in text and "Traceback" not in text
    steps = [
        CheckpointStore(path / "checkpoints").load("latest", []).state["counters"]["step"]
        for path in (run, run / "members" / "2")
    ]
    assert all(step > 0 for step in steps) and sum(steps) < 300


def test_a_gpu_and_a_single_thread_train_one_at_a_time() -> None:
    def session(device: str, asked: int, size: int) -> Any:
        training = SimpleNamespace(models_at_once=asked, ensemble_size=size)
        return SimpleNamespace(
            config=SimpleNamespace(training=training), trainer=SimpleNamespace(device=torch.device(device))
        )

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert [members._num_at_once(session("cpu", n, 5)) for n in (1, 2, 3, 4)] == [1, 2, 3, 3]
        assert members._num_at_once(session("cpu", 2, 1)) == members._num_at_once(session("cuda", 2, 5)) == 1
        torch.set_num_threads(1)
        assert members._num_at_once(session("cpu", 2, 5)) == 1
    finally:
        torch.set_num_threads(before)


def test_large_tables_are_trained_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_MOST_MODELS", MOST_MODELS)

    def at_once(num_labels: int, num_features: int, *assignments: str, used: int | None = None) -> object:
        shape = DataShape(
            num_instances=10**6,
            num_features=num_features,
            num_labels=num_labels,
            num_positives=10**6,
            num_used_features=used,
        )
        return resolve(load_config(assignments=assignments), shape).training.models_at_once

    rows = 2**30 // (4 * 384)
    assert at_once(10, 10) == at_once(rows - 10, 10) == at_once(10, rows - 10) == 2
    assert at_once(rows - 9, 10) == at_once(10, rows - 9) == 1
    assert at_once(10, 2 * rows, used=100) == 2 and at_once(10, 2 * rows, "training.models_at_once=3") == 3
    assert at_once(10, 10, "training.preset=fast") == at_once(10, 10, "training.ensemble_size=1") == 1


def test_where_memory_is_scarce_models_are_trained_one_at_a_time(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_midx import device

    options = ["training.ensemble_size=2", "model.dim=4096"]
    needs = [
        plan(topic_dir, config=make_config(*options, f"training.models_at_once={n}")).forecast.host_bytes
        for n in (1, 2)
    ]
    assert needs[1] > needs[0]
    monkeypatch.setattr(device, "used_memory_bytes", lambda: 0)
    monkeypatch.setattr(device, "available_memory_bytes", lambda: needs[0])
    assert plan(topic_dir, config=make_config(*options)).config.training.models_at_once == 1
    result = _train_little(topic_dir, tmp_path / "one", *options)
    assert (
        result.config.training.models_at_once == 1
        and "models_at_once: 1\n" in (tmp_path / "one/config.yaml").read_text()
    )
    monkeypatch.setattr(planning, "_CERTAINTY", 1.0)
    with pytest.raises(ResourceError, match="Training needs about") as refused:
        _train_little(topic_dir, tmp_path / "two", *options, "training.models_at_once=2")
    assert "training.models_at_once=1 (" in (refused.value.hint or "")
    monkeypatch.setattr(device, "available_memory_bytes", lambda: needs[1])
    assert plan(topic_dir, config=make_config(*options)).config.training.models_at_once == 2


def _train_little(data: Path, run: Path, *options: str) -> TrainResult:
    return train(data, output=run, config=make_config(*options, "training.epochs=1"))


def test_the_forecast_knows_how_many_are_trained_at_once(topic_dir: Path) -> None:
    one, two = (
        plan(topic_dir, config=make_config("training.ensemble_size=2", f"training.models_at_once={n}")).forecast
        for n in (1, 2)
    )
    for part in ("training rows", "tables", "optimiser", "sampler"):
        assert two.host[part] == 2 * one.host[part]
    assert one.disk_bytes == two.disk_bytes and one.seconds is not None and two.seconds is not None
    assert two.finish_seconds == pytest.approx(one.finish_seconds)
    assert two.seconds < one.seconds * 1.5  # two measurements of the machine's speed
