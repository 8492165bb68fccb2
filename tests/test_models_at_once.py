"""Models of an ensemble whose epochs run at once: those of models one after the other, whatever comes between."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_pipeline
import torch
import victims
from conftest import PRESETS
from test_ensemble import make_config

from xmc_midx import Predictor, load_config, recipe, resume, train
from xmc_midx.checkpoint import CheckpointStore
from xmc_midx.data.dataset import load_dataset
from xmc_midx.errors import DataError, DivergedError, ResourceError
from xmc_midx.forecast import Speed, TrainingData, cheaper_options, forecast
from xmc_midx.pipeline import TrainResult, members, plan, planning
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.rundir import RunDirectory
from xmc_midx.session import TrainingSession
from xmc_midx.types import EpochStats, SilentReporter
from xmc_midx.validation import Validator

THREE = ("training.ensemble_size=3", "training.num_threads=5")


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.epochs: list[int] = []

    def start(self, stage: str, total: int | None) -> None:
        if stage in ("neighbours", "waiting for the others"):
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
    # Who ends first leaves the others a part of the machine that nobody counts.
    assert 0.25 * clock.now < result.seconds <= clock.now


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException, at_once: int, *, others_wait: bool = False
) -> None:
    """Let the first epoch of one model end with an error, when those of the others have ended, which go on, or wait
    until they are halted."""
    end_epoch, ended = TrainingSession._end_epoch, {n: threading.Event() for n in range(1, at_once + 1)}

    def end(self: TrainingSession, stats: EpochStats) -> None:
        end_epoch(self, stats)
        if number_of(self) == number:
            assert all(other.wait(timeout=60) for n, other in ended.items() if n != number)
            raise error
        if number_of(self) in ended:
            ended[number_of(self)].set()
            assert not others_wait or self.halted.wait(timeout=60)

    monkeypatch.setattr(TrainingSession, "_end_epoch", end)


def steps_of(run: Path, *numbers: int) -> list[int]:
    """That the latest checkpoints of these models have done."""
    paths = [run if number == 1 else run / "members" / str(number) for number in numbers]
    saved = [CheckpointStore(path / "checkpoints").load("latest", []) for path in paths]
    return [checkpoint.state["counters"]["step"] for checkpoint in saved]


def test_what_stops_the_first_saves_the_others(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", make_config(*THREE, "training.models_at_once=3")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt(), 3)
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=config)
    assert not any((path / "model.json").exists() for path in (run, run / "members/2", run / "members/3"))
    steps = steps_of(run, 1, 2, 3)
    assert steps[0] == 8 and min(steps[1:]) >= 8, "an epoch of each"
    assert resume(run).finished
    assert what_predicts(run) == alone


def test_an_interruption_while_the_first_waits_saves_the_others(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ready, waited, wait = tmp_path / "run", threading.Event(), list[bool](), members.wait
    end_epoch = TrainingSession._end_epoch

    def end(self: TrainingSession, stats: EpochStats) -> None:
        end_epoch(self, stats)
        if number_of(self) == 2 and self.trainer.step < self.trainer.total_steps:
            ready.set()
            assert self.halted.wait(timeout=60)

    def interrupted(futures: Any, timeout: float) -> Any:
        if timeout and not waited:
            waited.append(ready.wait(timeout=60))
            raise KeyboardInterrupt
        return wait(futures, timeout=timeout)

    listener = Listener()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "_end_epoch", end)
        patch.setattr(members, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"), reporter=listener)
    assert waited == [True] and listener.said[-1] == "waiting for the others"
    assert steps_of(run, 1, 2) == [16, 8]
    assert resume(run).finished
    assert what_predicts(run) == alone


def test_what_cannot_be_saved_at_an_interruption_is_said(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = tmp_path / "run", TrainingSession._save

    def full(self: TrainingSession) -> None:
        if number_of(self) == 2 and self.halted.is_set():
            raise ResourceError("The disk is full.")
        save(self)

    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt(), 2, others_wait=True)
        patch.setattr(TrainingSession, "_save", full)
        with pytest.raises(KeyboardInterrupt) as raised:
            train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"))
    assert raised.value.__notes__ == ["Saved at step 8 of 16.", "Model 2: The disk is full."]
    assert resume(run).finished
    assert what_predicts(run) == alone


def test_an_error_of_another_waits_until_the_first_is_there(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, listener = tmp_path / "run", Listener()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, DivergedError("It diverged.", hint="Lower it."), 2)
        with pytest.raises(DivergedError) as raised:
            train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"), reporter=listener)
    expected = f"Remove {run / 'members' / '2'}: --resume trains that model anew, and until then the others predict."
    assert raised.value.hint is not None and raised.value.hint.endswith(expected)
    assert any(text.startswith("model 2 of 3: stopped: It diverged.") for text in listener.said)
    assert RunDirectory.open(run).has_model and not Predictor.load(run).members
    assert not (run / "members" / "3").exists()
    # The others go on without the first, the second where it was saved.
    listener = Listener()
    assert resume(run, reporter=listener).finished
    assert listener.said[0] == "models 2 and 3 of 3 at once; the progress is that of model 2"
    assert listener.epochs == [2] and "model 3 of 3" in listener.said
    assert what_predicts(run) == alone


def test_a_model_that_cannot_be_opened_keeps_no_other_from_its_end(
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt(), 2)
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"))
    (run / "members" / "2" / "config.yaml").write_text("nonsense: 1\n")
    with pytest.raises(DataError) as raised:
        resume(run)
    assert raised.value.hint == f"Remove {run / 'members' / '2'}: --resume trains that model anew."
    assert RunDirectory.open(run).has_model and not Predictor.load(run).members
    shutil.rmtree(run / "members" / "2")
    assert resume(run).finished
    assert what_predicts(run) == alone


@pytest.mark.parametrize(("at_once", "number"), [(1, 2), (2, 3), (3, 2)])
def test_an_error_of_any_further_model_says_what_to_remove_and_stops_none_beside_it(
    topic_dir: Path,
    tmp_path: Path,
    alone: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    number: int,
) -> None:
    run, end_epoch = tmp_path / "run", TrainingSession._end_epoch

    def end(self: TrainingSession, stats: EpochStats) -> None:
        end_epoch(self, stats)
        if number_of(self) == number:
            raise DivergedError("It diverged.", hint="Lower it.")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "_end_epoch", end)
        with pytest.raises(DivergedError) as raised:
            train(topic_dir, output=run, config=make_config(*THREE, f"training.models_at_once={at_once}"))
    place = run / "members" / str(number)
    expected = f"Remove {place}: --resume trains that model anew, and until then the others predict."
    assert raised.value.hint is not None and raised.value.hint.endswith(expected)
    others = [n for n in (2, 3) if n != number and (at_once == 3 or n < number)]
    assert [path.name for path in RunDirectory.open(run).finished_members] == [str(n) for n in others]
    assert resume(run).finished
    assert what_predicts(run) == alone


def test_a_model_that_waits_gives_its_tables_back_and_goes_on_with_its_best_epoch(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose first epoch it is here."""
    metrics, waiting, conclude = Validator.metrics, dict[int, TrainingSession](), TrainingSession.conclude
    init = TrainingSession.__init__

    def falling(self: Validator, top: Any) -> dict[str, float]:
        return dict.fromkeys(metrics(self, top), 1.0 / (1 + self.trainer.step))

    def noted(self: TrainingSession, *given: Any, **named: Any) -> None:
        init(self, *given, **named)
        waiting[number_of(self)] = self

    def looked_at(self: TrainingSession) -> None:
        if number_of(self) == 1 and 2 in waiting and waiting[2].epochs_are_done:
            trainer = waiting[2].trainer
            tables = trainer.softmax.weight, trainer.encoder.embedding
            seen.append([*(table.numel() for table in tables), len(trainer.optimizer.state)])
        conclude(self)

    monkeypatch.setattr(Validator, "metrics", falling)
    monkeypatch.setattr(TrainingSession, "__init__", noted)
    monkeypatch.setattr(TrainingSession, "conclude", looked_at)
    seen: list[list[int]] = []
    models = []
    for at_once in (1, 2):
        waiting.clear()
        options = ("training.ensemble_size=2", "training.num_threads=2", f"training.models_at_once={at_once}")
        result = train(topic_dir, output=tmp_path / str(at_once), config=make_config(*options))
        assert result.best_epoch == 1
        models.append(what_predicts(tmp_path / str(at_once)))
    assert seen == [[0, 0, 0]] and models[0] == models[1]


def test_an_error_of_the_first_stops_the_others(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupt_at(monkeypatch, 1, DivergedError("It diverged."), 3)
    with pytest.raises(DivergedError, match="It diverged") as raised:
        train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=3", "training.epochs=400"))
    assert "Remove" not in (raised.value.hint or "")
    assert all(8 <= step < 400 * 8 for step in steps_of(run, 2, 3)), "they were stopped, and saved"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("beside")], "and are gone"


def test_a_halt_is_obeyed_within_a_validation(topic_dir: Path, tmp_path: Path) -> None:
    split = load_dataset(topic_dir).split("train")
    with RunDirectory.create(tmp_path / "run", test_pipeline.make_config()) as directory:
        session = TrainingSession(directory, split, SilentReporter())
        predict = session.validator.predict

        def halted(*given: Any, **named: Any) -> Any:
            session.halted.set()
            return predict(*given, **named)

        session.validator.predict = halted  # type: ignore[method-assign]
        assert not session.run_epochs() and not session.epochs_are_done
    saved = CheckpointStore(tmp_path / "run" / "checkpoints").load("latest", [])
    assert saved.state["counters"]["step"] == test_pipeline.STEPS and saved.state["pending"] is not None


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
    options = ["training.ensemble_size=2", "training.num_threads=2", "training.epochs=3000", "model.dim=16"]
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
    assert all(0 < step < 3000 for step in steps), "within an epoch that is not the last"


def test_a_gpu_and_a_single_thread_train_one_at_a_time() -> None:
    cpu, before = torch.device("cpu"), torch.get_num_threads()

    def at_once(asked: int, size: int, device: torch.device = cpu, *more: str) -> int:
        options = (f"training.models_at_once={asked}", f"training.ensemble_size={size}", *more)
        return planning.models_at_once(load_config(assignments=options), device)

    try:
        torch.set_num_threads(3)
        assert [at_once(n, 5) for n in (1, 2, 3, 4)] == [1, 2, 3, 3]
        assert at_once(2, 1) == at_once(2, 5, torch.device("cuda")) == 1
        assert at_once(9, 9, cpu, "training.num_threads=7") == 7
        torch.set_num_threads(1)
        assert at_once(2, 5) == 1
    finally:
        torch.set_num_threads(before)


def test_large_tables_are_trained_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_PRESETS", PRESETS)

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
    topic_dir: Path, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_midx import device

    options = ["training.ensemble_size=2", "training.num_threads=2", "model.dim=4096"]
    options += ["neighbors.enabled=false", "ranker.enabled=false"]
    needs = [
        plan(topic_dir, config=make_config(*options, f"training.models_at_once={n}")).forecast.host_bytes
        for n in (1, 2)
    ]
    assert needs[1] > needs[0]
    monkeypatch.setattr(device, "used_memory_bytes", lambda: 0)
    monkeypatch.setattr(device, "available_memory_bytes", lambda: needs[0])
    assert plan(topic_dir, config=make_config(*options)).config.training.models_at_once == 1
    listener, said = Listener(), "the models are trained one after the other: memory does not hold several at once"
    result = _train_little(topic_dir, tmp_path / "one", *options, reporter=listener)
    assert result.config.training.models_at_once == 1 and said in listener.said
    assert "models_at_once: 1\n" in (tmp_path / "one" / "config.yaml").read_text()
    monkeypatch.setattr(planning, "_CERTAINTY", 1.0)
    with pytest.raises(ResourceError, match="Training needs about"):
        _train_little(topic_dir, tmp_path / "two", *options, "training.models_at_once=2")
    monkeypatch.setattr(device, "available_memory_bytes", lambda: needs[1])
    assert plan(topic_dir, config=make_config(*options)).config.training.models_at_once == 2
    # What was begun with more memory goes on with less.
    run = tmp_path / "three"
    monkeypatch.setattr(device, "available_memory_bytes", lambda: None)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt(), 2)
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=make_config(*THREE, "training.models_at_once=2"))
    monkeypatch.setattr(device, "available_memory_bytes", lambda: 0)
    listener = Listener()
    assert resume(run, reporter=listener).finished and said in listener.said
    assert not any("at once;" in text for text in listener.said)
    assert what_predicts(run) == alone
    listener = Listener()
    assert resume(run, reporter=listener).config.training.models_at_once == 2
    assert listener.said == ["the run is finished already"]


def _train_little(data: Path, run: Path, *options: str, reporter: Listener | None = None) -> TrainResult:
    return train(data, output=run, config=make_config(*options, "training.epochs=1"), reporter=reporter)


def test_one_at_a_time_is_an_option_where_memory_is_lacking() -> None:
    data = TrainingData.of_shape(10_000, 200_000, 10_000, values=10, positives=2)
    shape = DataShape(num_instances=10_000, num_features=200_000, num_labels=10_000, num_positives=20_000)
    config = resolve(make_config(*THREE, "training.models_at_once=2", "model.dim=384"), shape)
    options = dict(cheaper_options(config, data))
    alone = config.model_copy(update={"training": config.training.model_copy(update={"models_at_once": 1})})
    assert options["training.models_at_once=1"] == forecast(alone, data).host_bytes < forecast(config, data).host_bytes
    assert "training.models_at_once=1" not in dict(cheaper_options(alone, data))
    assert "training.models_at_once=1" not in dict(cheaper_options(config, data, cuda=True))


def test_the_forecast_knows_how_many_are_trained_at_once() -> None:
    data = TrainingData.of_shape(10_000, 2_000, 1_000, values=10, positives=2)
    shape = DataShape(num_instances=10_000, num_features=2_000, num_labels=1_000, num_positives=20_000)
    speed = Speed(flops=1e11, bytes=1e10)
    one, two, three = (
        forecast(resolve(make_config(*THREE, f"training.models_at_once={n}"), shape), data, speed=speed)
        for n in (1, 2, 3)
    )
    for part in ("training rows", "tables", "optimiser", "sampler"):
        assert (two.host[part], three.host[part]) == (2 * one.host[part], 3 * one.host[part])
    assert one.disk_bytes == two.disk_bytes and one.finish_seconds == two.finish_seconds
    # Three after the other, two and one, and all three at once.
    assert one.seconds is not None and two.seconds is not None and three.seconds is not None
    assert one.seconds - two.seconds == pytest.approx(two.seconds - three.seconds)
    num_steps = 2 * -(-8_000 // 32)
    assert one.seconds - two.seconds == pytest.approx(num_steps * one.step["overhead"])
