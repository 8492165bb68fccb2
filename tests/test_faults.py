"""Faults, on real trainings in processes of their own: kills, signals, crash points, want of memory, damaged files.

Each test bears the name of its fault in the table of docs/reliability.md (`scripts/fault_table.py` prints it).
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import victims
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix

from xmc_midx import crash
from xmc_midx.checkpoint import CheckpointStore
from xmc_midx.config import load_config
from xmc_midx.data.files import sha256_of
from xmc_midx.errors import DataError, DivergedError, ResourceError, UsageError
from xmc_midx.exporting.source import ExportSource
from xmc_midx.finish import Finish
from xmc_midx.interpolation import Interpolation
from xmc_midx.packing import pack_rows, unpack_tables
from xmc_midx.pipeline import evaluate, resume, train
from xmc_midx.predictor import Predictor
from xmc_midx.rundir import RunDirectory
from xmc_midx.trainer import Trainer
from xmc_midx.types import SilentReporter

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = [
    "model.dim=16",
    "training.epochs=3",
    "training.batch_size=32",
    "sampler.num_codewords=3",
    "sampler.num_draws=8",
    "data.validation_fraction=0.1",
    "training.save_every_steps=1",
    "training.ensemble_size=1",
]
"""288 training instances: 9 steps an epoch, 27 in all, each of them saved, and neighbours at the end."""
STEPS, TOTAL = 9, 27

Fault = Callable[..., None]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where the system has such a place: a kill does not ask the disk, and each save syncs eight times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        yield Path(directory)


def run_child(processes: Any, target: Callable[..., None], *arguments: Any) -> int:
    child = processes.Process(target=target, args=arguments)
    child.start()
    child.join(300)  # as long as a busy machine may take
    hangs = child.exitcode is None
    child.kill()
    assert not hangs, "the child hangs"
    return int(child.exitcode)


def weights(run: Path) -> dict[str, bytes]:
    """The final tensors, of the model and of training, and what the neighbours add."""
    files = {}
    for pointer in ("best", "latest"):
        path = CheckpointStore(run / "checkpoints").path_of(pointer)
        files |= {f"{pointer}/{part}": (path / f"{part}.safetensors").read_bytes() for part in ("model", "training")}
    finished = {name: (run / name).read_bytes() for name in ("model.safetensors", "interpolation.json")}
    sealed = json.loads((run / "model.json").read_bytes())
    # How often it saves is the configuration's, and changes nothing.
    sealed["files"].pop("config.yaml")
    return files | finished | {"model.json": json.dumps(sealed).encode()}


def strays(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*") if path.name != ".lock"]


def clean(run: Path) -> None:
    """What every start does first."""
    with RunDirectory.lock(run):
        CheckpointStore(run / "checkpoints").clean()


@pytest.fixture(scope="module")
def whole(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory, processes: Any) -> Path:
    """The uninterrupted run. Read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_child(processes, victims.work, str(topic_dir), str(run), OPTIONS, None, None, 0) == 0
    return run


# --------------------------------------------------------------------------- R1: kill -9


def kill_at_random(
    processes: Any,
    data: Path,
    whole: Path,
    options: list[str],
    directory: Path,
    num_kills: int,
    seconds: float,
    interval: int = 1,
) -> dict[str, int]:
    """Kill, look, go on, until so many kills; a run that ends must equal `whole`, and another one starts.

    Parameters
    ----------
    seconds : within which a process is killed, from its start or, where saves are more than a step apart (`interval`),
        from its first step.
    """
    rng = np.random.default_rng(0)
    steps = processes.Value("q", 0, lock=False)
    counts = {"kills": 0, "unreadable": 0, "lost": 0, "strays": 0, "finished runs": 0}
    run = directory / "run"
    while counts["kills"] < num_kills:
        store = CheckpointStore(run / "checkpoints")
        begin, _ = store.load_newest([])
        first = 0 if begin is None else begin.state["counters"]["step"]
        steps.value = first
        child = processes.Process(target=victims.work, args=(str(data), str(run), options, None, steps, first))
        child.start()
        while interval > 1 and steps.value == first and child.is_alive():
            time.sleep(0.01)
        child.join(float(rng.uniform(0, seconds)))
        child.kill()
        child.join()
        if child.exitcode == 0:
            assert weights(run) == weights(whole) and strays(run) == []
            counts["finished runs"] += 1
            shutil.rmtree(run)
            continue
        assert child.exitcode == -signal.SIGKILL
        counts["kills"] += 1
        if not run.exists():
            continue
        clean(run)
        counts["strays"] += len(strays(run))
        try:
            saved, faults = store.load_newest(["model", "training"])
        except DataError:
            counts["unreadable"] += 1
            continue
        counts["unreadable"] += len(faults)
        # Step s is counted before it is saved: what is on disk is at most one interval older.
        newest = 0 if saved is None else saved.state["counters"]["step"]
        counts["lost"] += newest < steps.value - interval
    assert run_child(processes, victims.work, str(data), str(run), options, None, None, 0) == 0
    assert weights(run) == weights(whole) and strays(run) == []
    counts["finished runs"] += 1
    return counts


@pytest.mark.fault("R1")
@pytest.mark.parametrize("point", ["run.begun:2", "step.done:40", "model.unsealed:2"])
def test_a_kill_in_a_further_model_of_an_ensemble_loses_nothing(
    topic_dir: Path, whole: Path, tmp_path: Path, processes: Any, point: str
) -> None:
    run, options = tmp_path / "run", [*OPTIONS, "training.ensemble_size=2"]
    assert run_child(processes, victims.work, str(topic_dir), str(run), options, point, None, 0) == -signal.SIGKILL
    assert (run / "members" / "2").exists() and weights(run) == weights(whole)
    assert not Predictor.load(run).members
    assert run_child(processes, victims.work, str(topic_dir), str(run), options, None, None, 0) == 0
    assert strays(run) == [] and len(Predictor.load(run).members) == 1
    alone = tmp_path / "alone"
    train(topic_dir, output=alone, config=load_config(assignments=[*OPTIONS, "training.seed=1"]))
    # The training rows are with the first model.
    mine, its = weights(run / "members" / "2"), weights(alone)
    for one in (mine, its):
        settings = json.loads(one.pop("interpolation.json"))
        settings.pop("neighbors_sha256", None)
        sealed = json.loads(one.pop("model.json"))
        sealed["files"].pop("interpolation.json")
        one["others"] = json.dumps([settings, sealed]).encode()
    assert mine == its


@pytest.mark.fault("R1")
def test_kills_at_random_moments_lose_nothing(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path, record_property: Fault
) -> None:
    counts = kill_at_random(processes, topic_dir, whole, OPTIONS, tmp_path, 30, 0.8)
    record_property("count", counts["kills"])
    assert (counts["unreadable"], counts["lost"], counts["strays"]) == (0, 0, 0), counts
    assert counts["finished runs"] >= 1


@pytest.mark.soak
@pytest.mark.fault("R1")
def test_a_thousand_kills_lose_nothing(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path, record_property: Fault
) -> None:
    counts = kill_at_random(processes, topic_dir, whole, OPTIONS, tmp_path, 1000, 0.8)
    record_property("count", counts["kills"])
    assert (counts["unreadable"], counts["lost"], counts["strays"]) == (0, 0, 0), counts


@pytest.mark.soak
@pytest.mark.fault("R1")
def test_kills_in_a_training_on_delicious_lose_nothing(
    shared_data: Path, processes: Any, tmp_path: Path, record_property: Fault
) -> None:
    options = ["training.epochs=3", "training.save_every_steps=20"]
    data, whole = shared_data / "delicious", tmp_path / "whole"
    assert run_child(processes, victims.work, str(data), str(whole), options, None, None, 0) == 0
    counts = kill_at_random(processes, data, whole, options, tmp_path, 30, 5.0, interval=20)
    record_property("count", counts["kills"])
    assert (counts["unreadable"], counts["lost"], counts["strays"]) == (0, 0, 0), counts
    assert counts["finished runs"] >= 1


# --------------------------------------------------------------------------- R2: crash points

LATER = {
    "step.done": 13,
    "refresh.begun": 2,
    "refresh.done": 2,
    "save.begun": 11,
    "save.part-written": 21,
    "save.manifest-written": 11,
    "save.renamed": 11,
    "save.pointer-written": 12,
    "save.pointed": 12,
    "save.pruned": 11,
    "validation.begun": 2,
    "validation.done": 2,
    "file.written": 4,
    "file.renamed": 4,
}
"""A later passage of each point, in the middle of the run."""
CRASHES = [
    f"{name}:{LATER.get(name, 1)}" for name in crash.POINTS if not name.startswith(("directory.", "output.", "export."))
]
FIRST = [f"{name}:1" for name in LATER]


def crash_and_resume(processes: Any, data: Path, whole: Path, directory: Path, points: list[str]) -> None:
    run = directory / "run"
    if points[0].startswith("save.old-aside"):
        # A checkpoint is only replaced where an epoch was saved before its validation.
        words = ["train", str(data), "-o", str(run), *sets()]
        interrupted = (words, "validation.begun", signal.SIGTERM, str(directory / "log"), False)
        assert run_child(processes, victims.command, *interrupted) == 143
    for point in points:
        code = run_child(processes, victims.work, str(data), str(run), OPTIONS, point, None, 0)
        assert code == -signal.SIGKILL, point
    assert run_child(processes, victims.work, str(data), str(run), OPTIONS, None, None, 0) == 0
    assert weights(run) == weights(whole)
    assert strays(run) == []


@pytest.mark.fault("R2")
@pytest.mark.parametrize("point", CRASHES)
def test_a_crash_at_each_point_is_resumed_to_the_same_result(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path, point: str
) -> None:
    crash_and_resume(processes, topic_dir, whole, tmp_path, [point])


@pytest.mark.soak
@pytest.mark.fault("R2")
@pytest.mark.parametrize("point", FIRST)
def test_crashes_at_the_first_passage_and_in_the_saves_after_it(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path, point: str
) -> None:
    crash_and_resume(processes, topic_dir, whole, tmp_path, [point, "save.renamed:3", "save.pointer-written:2"])


@pytest.mark.fault("R2")
def test_the_environment_names_the_point(topic_dir: Path, tmp_path: Path) -> None:
    words = ["train", str(topic_dir), "--output", str(tmp_path / "run"), *sets()]
    done = subprocess.run(
        [sys.executable, "-m", "xmc_midx", *words],
        env={**os.environ, crash.VARIABLE: "save.renamed:4"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps()[-1] == 4


# --------------------------------------------------------------------------- R3: signals


def sets(options: list[str] = OPTIONS) -> list[str]:
    return [word for option in options for word in ("--set", option)]


SAVE_AT_EPOCHS = [*OPTIONS[:-1], "training.save_every_steps=null"]
PLACES = {
    # A point that is passed inside a stage -> the step that must be saved.
    "step": ("step.done:4", 4),
    "evaluation": ("validation.begun:2", 2 * STEPS),
    "refresh": ("refresh.begun:2", STEPS + 1),
    "saving": ("save.manifest-written:1", STEPS),
}


@pytest.mark.fault("R3")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path, place: str, number: int
) -> None:
    run, log = tmp_path / "my run", tmp_path / "log"
    words = ["train", str(topic_dir), "--output", str(run), *sets(SAVE_AT_EPOCHS)]
    point, step = PLACES[place]
    # That it stopped within the step, or the chunk of a validation, is seen in what it saved; how long it took to start
    # and to be waited for says nothing of that.
    assert run_child(processes, victims.command, words, point, number, str(log), False) == 128 + number
    text = " ".join(log.read_text().split())
    assert f"Saved at step {step} of {TOTAL}. Go on with: xmc-midx train {topic_dir} --output '{run}' --resume" in text
    assert "Traceback" not in text and strays(run) == []
    saved = CheckpointStore(run / "checkpoints").load("latest", ["model", "training"])
    assert saved.state["counters"]["step"] == step
    assert (saved.state["pending"] is not None) == (place == "evaluation")
    # Word for word what was said.
    assert run_child(processes, victims.command, [*words[:4], "--resume"], None, number, str(log), False) == 0
    assert weights(run) == weights(whole)


@pytest.mark.fault("R3")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_reading_stops_at_once(topic_dir: Path, processes: Any, tmp_path: Path, number: int) -> None:
    log = tmp_path / "log"
    words = ["train", str(topic_dir), "--output", str(tmp_path / "run"), *sets()]
    assert run_child(processes, victims.command, words, None, number, str(log), True) == 128 + number
    assert "Nothing was trained yet. Start again with: xmc-midx train" in log.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("R3")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once_without_a_half_save(
    topic_dir: Path, processes: Any, tmp_path: Path, number: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train", str(topic_dir), "--output", str(run), *sets(SAVE_AT_EPOCHS)]
    points = f"step.done:{STEPS + 3},save.part-written:3"  # the second save, asked for by the first signal
    assert run_child(processes, victims.command, words, points, number, str(log), False) == 128 + number
    store = CheckpointStore(run / "checkpoints")
    assert store.steps() == [STEPS] and store.load("latest", ["model", "training"]).state["counters"]["step"] == STEPS
    assert strays(run) != [], "the save was under way"
    clean(run)
    assert strays(run) == []


@pytest.mark.fault("R3")
def test_a_signal_during_prediction_leaves_no_output(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "out.tsv"
    out.write_text("older")
    words = ["predict", str(whole), str(topic_dir / "test.txt"), "--output", str(out)]
    for number in (signal.SIGTERM, signal.SIGINT):
        assert run_child(processes, victims.command, words, None, number, str(log), False) == 0
        before = out.read_bytes()
        assert run_child(processes, victims.command, [*words, "--k", "7"], "file.written", number, str(log), False) in (
            0,
            128 + number,
        )
        assert out.read_bytes() == before or out.stat().st_size > len(before)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out.tsv"]


@pytest.mark.soak
@pytest.mark.fault("R3")
def test_a_signal_at_any_step_is_resumed(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path, record_property: Fault
) -> None:
    cases = [(number, step) for number in (signal.SIGTERM, signal.SIGINT) for step in range(1, TOTAL)]
    for number, step in cases:
        run, log = tmp_path / "run", tmp_path / "log"
        words = ["train", str(topic_dir), "--output", str(run), *sets(SAVE_AT_EPOCHS)]
        assert (
            run_child(processes, victims.command, words, f"step.done:{step}", number, str(log), False) == 128 + number
        )
        assert CheckpointStore(run / "checkpoints").step_of("latest") == step
        assert run_child(processes, victims.command, [*words[:4], "--resume"], None, number, str(log), False) == 0
        assert weights(run) == weights(whole)
        shutil.rmtree(run)
    record_property("count", len(cases))


@pytest.mark.soak
@pytest.mark.fault("R3")
@pytest.mark.parametrize("point", ["validation.begun", "refresh.begun", "save.manifest-written"])
def test_twenty_signals_in_each_place_are_resumed(
    topic_dir: Path, processes: Any, tmp_path: Path, record_property: Fault, point: str
) -> None:
    """At the end of each of twenty epochs, each of which is saved."""
    options = [*OPTIONS[:-1], "training.save_every_steps=1000000", "training.epochs=21"]
    whole = tmp_path / "whole"
    assert run_child(processes, victims.work, str(topic_dir), str(whole), options, None, None, 0) == 0
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train", str(topic_dir), "--output", str(run), *sets(options)]
    for passage in range(1, 21):
        number = (signal.SIGTERM, signal.SIGINT)[passage % 2]
        code = run_child(processes, victims.command, words, f"{point}:{passage}", number, str(log), False)
        assert code == 128 + number, (point, passage)
        # A signal in a refresh waits for the end of its step, the first of an epoch.
        step = STEPS * (passage - 1) + 1 if point == "refresh.begun" else STEPS * passage
        assert CheckpointStore(run / "checkpoints").step_of("latest") == step
        assert run_child(processes, victims.command, [*words[:4], "--resume"], None, number, str(log), False) == 0
        assert weights(run) == weights(whole) and strays(run) == []
        shutil.rmtree(run)
    record_property("count", 20)


# ----------------------------------------------------------------- time limit, unfinished runs


def test_the_time_limit_saves_and_the_resumed_run_equals_the_whole(
    topic_dir: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = train(topic_dir, output=run, config=load_config(assignments=SAVE_AT_EPOCHS), max_seconds=0.0)
    assert not result.finished and result.best_epoch == 0 and Path(result.best).name == "1"
    with pytest.raises(UsageError, match=r"an unfinished one.*Go on with: xmc-midx train .* --resume"):
        train(topic_dir, output=run)
    for _ in range(2 * TOTAL):
        result = resume(run, max_seconds=0.0)
        if result.finished:
            break
    else:
        pytest.fail("one step a call, and the run does not come to its end")
    assert weights(run) == weights(whole)
    with pytest.raises(UsageError, match="a finished one"):
        train(topic_dir, output=run)


# --------------------------------------------------------------------------- R4: disk


def parts_of(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"a": torch.randn(700, 30, generator=generator), "b": torch.randn(50, generator=generator)},
        "training": {"c": torch.randn(300, 30, generator=generator)},
    }


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Checkpoints of steps 4 and 9, `latest` is 9."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step in (4, 9):
        store.save(step, parts_of(step), {"counters": {"step": step}, "filler": "x" * 5000})
        store.point("latest", step)
    return store


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def fill_disk_at(store: CheckpointStore, num_points: int) -> None:
    """A file may not grow beyond b bytes: the write that would is cut there and fails, as on a full disk."""
    before = content(store.directory.parent)
    largest = max(len(value) for value in before.values())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in np.linspace(0, largest - 1, num_points).astype(int).tolist():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(ResourceError, match=r"it needs [\d,]+ bytes, [\d,]+ are free") as caught:
                store.save(12, parts_of(12), {"counters": {"step": 12}, "filler": "x" * 5000})
                store.point("latest", 12)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert caught.value.exit_code == 4
        assert content(store.directory.parent) == before and strays(store.directory.parent) == []
    assert store.load("latest", ["model", "training"]).state["counters"]["step"] == 9


@pytest.mark.fault("R4")
def test_a_disk_that_is_full_at_any_byte_leaves_the_old_checkpoint(
    store: CheckpointStore, record_property: Fault
) -> None:
    record_property("count", 50)
    fill_disk_at(store, 50)


@pytest.mark.soak
@pytest.mark.fault("R4")
def test_a_disk_that_is_full_at_500_bytes(store: CheckpointStore, record_property: Fault) -> None:
    record_property("count", 500)
    fill_disk_at(store, 500)


@pytest.mark.fault("R4")
def test_too_little_disk_is_said_before_the_first_epoch(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_midx.pipeline import planning

    monkeypatch.setattr(planning, "_free_disk", lambda path: 1234)
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes on disk; 1,234 are free.*keep_checkpoints"):
        train(topic_dir, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- R6: damage


def damage(store: CheckpointStore, rng: np.random.Generator) -> None:
    """Something wrong with the latest checkpoint: a bit, a cut, a missing file, another checkpoint's file."""
    files = sorted((store.directory / "9").iterdir())
    path = files[rng.integers(len(files))]
    data = bytearray(path.read_bytes())
    match rng.integers(4):
        case 0:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
        case 1:
            path.write_bytes(data[: rng.integers(len(data))])
        case 2:
            path.unlink()
        case 3:
            shutil.copy(store.directory / "4" / path.name, path)


def damage_and_load(store: CheckpointStore, num_damages: int) -> None:
    rng = np.random.default_rng(0)
    good = content(store.directory / "9")
    for _ in range(num_damages):
        damage(store, rng)
        saved, faults = store.load_newest(["model", "training"])
        assert saved is not None and saved.path.name == "4" and len(faults) == 1 and "9" in faults[0]
        for name, value in good.items():
            (store.directory / "9" / name).write_bytes(value)
    saved, faults = store.load_newest(["model", "training"])
    assert saved is not None and saved.path.name == "9" and faults == []


@pytest.mark.fault("R6")
def test_every_damage_is_detected_and_the_checkpoint_before_it_is_taken(
    store: CheckpointStore, record_property: Fault
) -> None:
    record_property("count", 200)
    damage_and_load(store, 200)


@pytest.mark.soak
@pytest.mark.fault("R6")
def test_five_thousand_damages_are_detected(store: CheckpointStore, record_property: Fault) -> None:
    record_property("count", 5000)
    damage_and_load(store, 5000)


def test_latest_is_turned_last(topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between the two, `best` is ahead, which the start after it puts back; `latest` never is."""
    turned, replace = [], Path.replace

    def recorded(path: Path, target: Path) -> Path:
        turned.append(Path(target).name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", recorded)
    train(topic_dir, output=tmp_path / "run", config=load_config(assignments=[*SAVE_AT_EPOCHS, "training.epochs=1"]))
    assert [name for name in turned if name in ("best", "latest")] == ["best", "latest"]


def test_a_damaged_pointer_is_passed_over_and_a_run_without_a_whole_checkpoint_is_refused(
    store: CheckpointStore,
) -> None:
    (store.directory.parent / "latest").write_text("soon")
    saved, faults = store.load_newest(["model"])
    assert saved is not None and saved.path.name == "9" and "names no checkpoint" in faults[0]
    for step in store.steps():
        (store.directory / str(step) / "state.json").unlink()
    with pytest.raises(DataError, match="no other checkpoint to go back to"):
        store.load_newest(["model"])


def test_hashes_are_skipped_on_request_and_sizes_are_not(store: CheckpointStore) -> None:
    path = store.directory / "9" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="sha256"):
        store.load("latest", ["model"])
    assert store.load("latest", ["model"], verify=False).path.name == "9"
    path.write_bytes(data[:-4])
    with pytest.raises(DataError, match="bytes, expected"):
        store.load("latest", ["model"], verify=False)


@pytest.mark.fault("R6")
def test_a_run_goes_back_past_a_damaged_checkpoint_with_a_warning_to_the_same_result(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path
) -> None:
    for point in ("step.done:13", "validation.begun:3"):
        run, log = tmp_path / point, tmp_path / "log"
        assert run_child(processes, victims.work, str(topic_dir), str(run), OPTIONS, point, None, 0) == -signal.SIGKILL
        latest = CheckpointStore(run / "checkpoints").path_of("latest")
        (latest / "model.safetensors").write_bytes(b"")
        words = ["train", str(topic_dir), "--output", str(run), "--resume"]
        assert run_child(processes, victims.command, words, None, signal.SIGTERM, str(log), False) == 0
        text = log.read_text()
        assert f"warning: {latest / 'model.safetensors'}: has 0 bytes" in text
        assert f"warning: going back to the checkpoint of step {int(latest.name) - 1}" in text
        assert weights(run) == weights(whole)


def test_checkpoints_are_kept_with_the_best_that_each_of_them_knows(topic_dir: Path, tmp_path: Path) -> None:
    # A save at each end of an epoch, however soon after the last one.
    each = "training.save_every_steps=1000000"
    config = load_config(assignments=[*OPTIONS[:-1], each, "training.keep_checkpoints=3", "training.epochs=6"])
    train(topic_dir, output=tmp_path / "run", config=config)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    best = {store._load(store.directory / str(s), [], True).state["best"][0] for s in (36, 45, 54)}
    assert store.steps() == sorted({36, 45, 54} | best)


# --------------------------------------------------------------------------- older formats


@pytest.mark.parametrize("golden", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_checkpoints_of_older_formats_are_read(golden: Path) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    store = CheckpointStore(golden / "checkpoints")
    for pointer in ("latest", "best"):
        saved = store.load(pointer, ["model", "training"])
        assert saved.path.name == str(expected[pointer])
        assert saved.state["counters"]["step"] == expected[pointer]
    predictor = Predictor.load(golden)
    from scipy.sparse import csr_matrix

    top = predictor.predict(csr_matrix(np.eye(40, dtype=np.float32)[:6]), k=3)
    assert top.label_ids.tolist() == expected["label_ids"]
    np.testing.assert_allclose(top.scores, expected["scores"], rtol=1e-5)


# --------------------------------------------------------------------------- R7: malicious files


def seal(checkpoint: Path) -> None:
    """A manifest that vouches for whatever lies there: what an attacker would write."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(checkpoint.iterdir())
        if path.name != "manifest.json"
    }
    manifest = {"format": "xmc-midx checkpoint", "version": 2, "step": int(checkpoint.name), "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.mark}",))


def _object_npz(mark: Path) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, a=np.array([Bomb(mark)], dtype=object))

    return write


def malicious_models(mark: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    import pickle

    def header(text: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
        blob = struct.pack("<Q", len(text) if length is None else length) + text + data
        return lambda path: path.write_bytes(blob) and None

    one = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    yield "pickle", lambda path: path.write_bytes(pickle.dumps(Bomb(mark))) and None
    yield "renamed .pt", lambda path: torch.save({"a": Bomb(mark)}, path)
    yield "object npz", _object_npz(mark)
    yield "2^60 header", header(b"{}", length=2**60)
    yield "overlapping tensors", header(one, b"\0" * 12)
    yield "2^40 elements", header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}', b"\0" * 8)
    yield "negative shape", header(b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', b"\0" * 8)
    yield "deep JSON", header(b"[" * 100_000)
    yield "other tensors", lambda path: save_file({"x": torch.zeros(2)}, path)
    yield "empty", lambda path: path.write_bytes(b"") and None


@pytest.mark.fault("R7")
@pytest.mark.parametrize("kind", range(10))
def test_a_malicious_model_file_is_refused_and_runs_nothing(whole: Path, tmp_path: Path, kind: int) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(whole, run)
    best = CheckpointStore(run / "checkpoints").path_of("best")
    _, write = list(malicious_models(mark))[kind]
    write(run / "model.safetensors")
    RunDirectory.open(run).seal_model()
    write(best / "model.safetensors")
    seal(best)
    for _ in range(2):
        started = time.process_time()
        with pytest.raises(DataError):
            Predictor.load(run)
        assert time.process_time() - started < 2 and not mark.exists()
        (run / "model.json").unlink(missing_ok=True)  # now the checkpoint's


@pytest.mark.fault("R7")
def test_sealed_tensors_of_wrong_shapes_and_ids_are_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "model.json").unlink()
    best = CheckpointStore(run / "checkpoints").path_of("best")
    model = load_file(best / "model.safetensors")
    for name, tensor in model.items():
        if name.startswith("encoder."):
            save_file({**model, name: tensor[:-1].clone()}, best / "model.safetensors")
            seal(best)
            if name == "encoder.embedding":
                continue  # a smaller table is a model of fewer features
            with pytest.raises(DataError, match="is no checkpoint of this run"):
                Predictor.load(run)


@pytest.mark.fault("R7")
@pytest.mark.parametrize("name", ["labels.bias", "labels.weight", "train.label_frequencies", "encoder.bias", "D", "F"])
def test_arrays_of_a_finished_model_that_do_not_fit_together_are_refused(
    whole: Path, tmp_path: Path, name: str
) -> None:
    """Compiled code reads as many numbers as one of them has: of the others, whatever lies behind."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    model = unpack_tables(load_arrays(run / "model.safetensors"))
    for stored in [known for known in model if known.removesuffix(".int8").removesuffix(".scale") == name]:
        model[stored] = model[stored][:-1].copy()
    if name == "F":
        assert (run / "neighbors.safetensors").exists() or (run / "ranker.safetensors").exists()
        for stored in ("encoder.embedding.int8", "encoder.embedding.scale"):
            model[stored] = model[stored][:-1].copy()
    if name == "D":
        model["labels.weight.int8"] = model["labels.weight.int8"][:, :-1].copy()
    save_arrays(model, run / "model.safetensors")
    RunDirectory.open(run).seal_model()
    with pytest.raises(DataError, match="is no checkpoint of this run: ValueError"):
        Predictor.load(run)
    if name != "F":  # a model of fewer features alone
        with pytest.raises(DataError, match="is no checkpoint of this run: ValueError"):
            ExportSource.load(run)


@pytest.mark.fault("R7")
@pytest.mark.parametrize("record", [{}, {"data": 5}, {"test": 5}, {"fingerprint": []}, {"seconds": "long"}])
def test_an_edited_record_of_a_training_is_refused(whole: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    known = json.loads((run / "run.json").read_text()) if record else {}
    (run / "run.json").write_text(json.dumps(known | record))
    with pytest.raises(DataError, match=r"run\.json: (is not what|does not say)"):
        resume(run)


@pytest.mark.fault("R7")
@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "training: !!python/name:os.system",
        "training: {epochs: " + "[" * 50_000,
        "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 8)}]\n" for p, c in pairwise("abcdefghijk")),
        "bomb: &a [x]\ntraining:\n  epochs: &b [1,1,1,1,1,1,1,1,1]\n  seed: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "  batch_size: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n  patience: &e [*d,*d,*d,*d,*d,*d,*d,*d]\n"
        "  num_threads: &f [*e,*e,*e,*e,*e,*e,*e,*e]\n  device: &g [*f,*f,*f,*f,*f,*f,*f,*f]\n"
        "  precision: &h [*g,*g,*g,*g,*g,*g,*g,*g]\n  epochs: [*h,*h,*h,*h,*h,*h,*h,*h,*h]\n",
        "x" * 2_000_000,
    ],
    ids=["object", "name", "deep", "aliases", "aliases in values", "large"],
)  # fmt: skip
def test_a_malicious_configuration_is_refused_quickly(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(text.replace("MARK", str(tmp_path / "mark")))
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        Predictor.load(tmp_path / "run")
    assert time.process_time() - started < 3 and not (tmp_path / "mark").exists()
    assert len(str(caught.value)) < 4000


@pytest.mark.fault("R7")
def test_malicious_json_and_training_rows_are_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for text in ("[" * 200_000, "7", "{}", '{"format": 2}', '{"format": 1, "files": {"../x": {}}}'):
        (run / "model.json").write_text(text)
        with pytest.raises(DataError):
            Predictor.load(run)
    (run / "model.json").unlink()
    best = CheckpointStore(run / "checkpoints").path_of("best")
    state = (best / "state.json").read_bytes()
    for text in (b"[" * 200_000, b"[1]", b'{"a": NaN', b"\xff\xfe"):
        (best / "state.json").write_bytes(text)
        seal(best)
        with pytest.raises(DataError):
            Predictor.load(run)
    (best / "state.json").write_bytes(state)
    seal(best)
    changes = (
        {"temperature": 0.0},
        {"temperature": 1e-320},
        {"count": -3},
        {"count": 0, "votes": 1.0},
        {"votes": -1.0},
        {"outside": 0.5},
    )
    edited = [json.dumps(Interpolation().as_dict() | change) for change in changes]
    for text in ("[" * 200_000, "7", '{"weight": "x"}', "{}", *edited):
        (run / "interpolation.json").write_text(text)
        with pytest.raises(DataError):
            Predictor.load(run)
    rows = run / "neighbors.safetensors"
    features = csr_matrix(([1, 1], ([0, 1], [0, 39])), shape=(2, 40), dtype=np.int8)
    labels = csr_matrix(([1, 1], ([0, 1], [0, 1])), shape=(2, 23), dtype=np.int8)
    arrays = {"features.scale": np.ones(2, dtype=np.float32)}
    for part, matrix in (("features", features), ("labels", labels)):
        arrays |= {f"{part}.{name}": array for name, array in pack_rows(matrix).items()}

    def keep(stored: dict[str, np.ndarray]) -> None:
        save_arrays(stored, rows)
        values = Interpolation(votes=1.0).as_dict() | {"neighbors_sha256": sha256_of(rows)}
        (run / "interpolation.json").write_text(json.dumps(values))

    keep(arrays)
    Predictor.load(run)
    for change in (
        {"features.shape": np.array([2, 39])},
        {"features.shape": np.array([3, 40])},
        {"features.gaps": arrays["features.gaps"][:-1]},
        {"labels.sizes": arrays["features.gaps"]},
        {"labels.shape": np.array([2, 10**12])},
        {"features.scale": np.ones(3, dtype=np.float32)},
    ):
        keep(arrays | change)
        with pytest.raises(DataError, match=r"neighbors\.safetensors: is not what"):
            Predictor.load(run)
    (run / "interpolation.json").write_text(json.dumps(Interpolation(margin=1.0).as_dict()))
    with pytest.raises(DataError, match="names no file"):
        Predictor.load(run)


@pytest.mark.fault("R7")
def test_a_model_of_an_older_format_is_read_and_one_of_a_newer_is_refused(whole: Path, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", csr_matrix(np.eye(40, dtype=np.float32))
    shutil.copytree(whole, run)
    expected, stored = Predictor.load(run).predict(rows, k=3), load_arrays(run / "model.safetensors")
    assert "labels.weight.int8.packed" in stored
    save_arrays(unpack_tables(stored), run / "model.safetensors")
    RunDirectory.open(run).seal_model()
    record = json.loads((run / "model.json").read_text())
    for version in (1, 2, 3):
        (run / "model.json").write_text(json.dumps(record | {"format": version}))
        found = Predictor.load(run).predict(rows, k=3)
        np.testing.assert_array_equal(found.label_ids, expected.label_ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
    (run / "model.json").write_text(json.dumps(record | {"format": 5}))
    with pytest.raises(DataError, match=r"has model format 5; this release reads up to 4\."):
        Predictor.load(run)


@pytest.mark.fault("R7")
def test_a_sealed_table_that_cannot_be_unpacked_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    stored = load_arrays(run / "model.safetensors")
    stored["labels.weight.int8.packed"] = stored["labels.weight.int8.packed"][:-9].copy()
    save_arrays(stored, run / "model.safetensors")
    RunDirectory.open(run).seal_model()
    with pytest.raises(DataError, match=r"model\.safetensors: is not what `train` wrote: sizes do not fit"):
        Predictor.load(run)


@pytest.mark.fault("R6")
def test_each_of_200_flipped_bits_of_a_finished_model_is_found(whole: Path, tmp_path: Path) -> None:
    """Of every file that a prediction reads; a flip in a file's name in `model.json` is a file that is missing."""
    run, rng = tmp_path / "run", np.random.default_rng(6)
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints"))
    candidates = ("labels.txt", "vocabulary.txt", "neighbors.safetensors", "ranker.safetensors")
    names = ["model.safetensors", "model.json", "interpolation.json", "config.yaml"]
    names += [name for name in candidates if (run / name).exists()]
    Predictor.load(run)
    for number in range(200):
        path = run / names[number % len(names)]
        sound = path.read_bytes()
        bit = int(rng.integers(8 * len(sound)))
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            Predictor.load(run)
        path.write_bytes(sound)


@pytest.mark.fault("R6")
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_damaged_best_checkpoint_is_gone_on_without(topic_dir: Path, tmp_path: Path, is_gone: bool) -> None:
    run, messages = tmp_path / "run", list[str]()

    class Listener(SilentReporter):
        def message(self, text: str) -> None:
            messages.append(text)

    options = [*OPTIONS, "training.epochs=6", "training.keep_checkpoints=9", "training.save_every_steps=5"]
    falling = iter(range(9, 0, -1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xmc_midx.session._score", lambda _: next(falling) / 10)
        patch.setattr(Finish, "keep_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(topic_dir, output=run, config=load_config(assignments=options))
    store = CheckpointStore(run / "checkpoints")
    best = store.step_of("best")
    assert best is not None and best != store.step_of("latest")
    path = store.path_of("best")
    if is_gone:
        shutil.rmtree(path)
    else:
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)
    result = resume(run, reporter=Listener())
    assert result.finished and any("going on without the best checkpoint" in one for one in messages)
    assert Predictor.load(run).num_labels > 0


@pytest.mark.fault("R6")
@pytest.mark.parametrize("name", ["model.safetensors", "interpolation.json"])
def test_a_finished_model_that_is_cut_or_gone_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    sound = (run / name).read_bytes()
    (run / name).write_bytes(sound[:-3])
    with pytest.raises(DataError, match=r"is not what model\.json says"):
        Predictor.load(run, verify=False)
    (run / name).unlink()
    with pytest.raises(DataError, match="is missing"):
        Predictor.load(run, verify=False)


def test_a_finished_run_needs_its_checkpoints_no_more(whole: Path, topic_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints", "best", "latest", "metrics.jsonl"))
    expected = evaluate(whole, data=topic_dir).report.metrics
    assert evaluate(run, data=topic_dir).report.metrics == expected


@pytest.mark.parametrize("gone", [(), ("best", "latest"), ("metrics.jsonl",)])
def test_a_finished_run_without_checkpoints_is_not_trained_again(
    whole: Path, tmp_path: Path, gone: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, expected = tmp_path / "run", resume(whole)
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints", *gone))
    monkeypatch.setattr(Trainer, "run_epoch", None)
    found, others = resume(run), {"run", "best", "peak_memory_bytes", "seconds"}
    assert found.finished and found.seconds == pytest.approx(expected.seconds, abs=0.01) and Path(found.best) == run
    if "metrics.jsonl" not in gone:
        same = {key: value for key, value in found.as_dict().items() if key not in others}
        assert same == {key: value for key, value in expected.as_dict().items() if key not in others}
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_whoever_may_read_the_configuration_may_read_the_model(whole: Path) -> None:
    mode = (whole / "config.yaml").stat().st_mode
    assert {path.stat().st_mode for path in whole.rglob("*") if path.is_file() and path.name != ".lock"} == {mode}


def test_a_kill_at_the_end_leaves_a_run_that_ends_alike(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path
) -> None:
    for point in ("model.begun", "neighbours.begun", "model.unsealed"):
        run = tmp_path / point
        child = (str(topic_dir), str(run), OPTIONS, f"{point}:1", None, 0)
        assert run_child(processes, victims.work, *child) == -signal.SIGKILL
        assert not RunDirectory.open(run).has_model
        assert resume(run).finished and weights(run) == weights(whole) and not strays(run)


# --------------------------------------------------------------------------- R11: divergence


@pytest.mark.fault("R11")
def test_a_poisoned_row_is_named_and_the_last_finite_checkpoint_stays(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_midx.data.batches import BatchStream

    make, victim = BatchStream._batch, []

    def poisoned(self: BatchStream, instances: np.ndarray) -> Any:
        batch = make(self, instances)
        if len(victim) == STEPS + 3:
            row = int(batch.features.offsets.diff()[5:].argmax()) + 5
            batch.features.values[batch.features.offsets[row]] = float("inf")
            victim.append(int(batch.instance_ids[row]))
        else:
            victim.append(-1)
        return batch

    monkeypatch.setattr(BatchStream, "_batch", poisoned)
    config = load_config(assignments=SAVE_AT_EPOCHS)
    with pytest.raises(DivergedError, match=f"The loss became (inf|nan) at step {STEPS + 4}") as caught:
        train(topic_dir, output=tmp_path / "run", config=config)
    assert f"on the training instances {max(victim)} (" in caught.value.message
    assert f"The checkpoint of step {STEPS} is finite and stays." in str(caught.value) and caught.value.exit_code == 6
    assert evaluate(tmp_path / "run", data=topic_dir).report.num_instances == 150


@pytest.mark.fault("R11")
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_midx.softmax import LabelSoftmax

    forward, calls = LabelSoftmax.forward, [0]

    def poisoned(self: LabelSoftmax, *arguments: Any) -> torch.Tensor:
        loss = forward(self, *arguments)
        calls[0] += 1
        if calls[0] == 5:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(LabelSoftmax, "forward", poisoned)
    with pytest.raises(DivergedError, match="A gradient is not finite at step 5"):
        train(topic_dir, output=tmp_path / "run", config=load_config(assignments=OPTIONS))
    saved = CheckpointStore(tmp_path / "run" / "checkpoints").load("latest", ["model"])
    assert saved.path.name == "4" and all(torch.isfinite(t).all() for t in saved.parts["model"].values())


@pytest.mark.fault("R11")
def test_a_model_that_is_not_finite_is_never_saved(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_midx.trainer import Trainer

    step = Trainer._train_step

    def overflowing(self: Trainer, batch: Any) -> float:
        loss = step(self, batch)
        if self.step == 5:
            with torch.no_grad():
                self.softmax.weight[3, 2] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "_train_step", overflowing)
    with pytest.raises(DivergedError, match=r"not finite after step 5: labels\.weight.*step 4 is finite"):
        train(topic_dir, output=tmp_path / "run", config=load_config(assignments=OPTIONS))
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [3, 4]


# --------------------------------------------------------------------------- R12: memory


@pytest.mark.fault("R12")
@pytest.mark.parametrize("blind", [False, True], ids=["forecast", "allocation"])
def test_too_little_memory_names_three_options_that_lower_it(
    topic_dir: Path, processes: Any, tmp_path: Path, blind: bool
) -> None:
    log = tmp_path / "log"
    words = ["train", str(topic_dir), "--output", str(tmp_path / "run"), "--set", "model.dim=4000000"]
    words += ["--set", "training.ensemble_size=1"]
    code = run_child(processes, victims.starve, words, 600_000_000, str(log), blind)
    text = " ".join(log.read_text().split())
    assert code == 4, text
    found = re.findall(
        r"model\.dim=\d+|training\.batch_size=\d+|sampler\.num_draws=\d+|neighbors\.enabled|model\.label_init", text
    )
    assert len(set(found)) == 3 and "model.dim=1000000" in found and "Traceback" not in text
    assert ("are available" in text) != blind and ("is used up" in text) == blind
    assert blind or not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- R15: two at once


@pytest.mark.fault("R15")
def test_of_two_trainings_in_one_directory_one_wins_and_the_other_says_so(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["train", str(topic_dir), "--output", str(run), *sets()]
    logs = [str(tmp_path / "a"), str(tmp_path / "b")]
    children = [
        processes.Process(target=victims.command, args=(words, None, signal.SIGTERM, log, False)) for log in logs
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    codes = sorted(child.exitcode for child in children)
    assert codes[0] == 0 and codes[1] in (2, 4), codes
    text = "".join(Path(log).read_text() for log in logs)
    assert "another training is using this run directory" in text or "holds a run already" in text
    assert weights(run) == weights(whole)


# --------------------------------------------------------------------------- R18: surroundings


@pytest.mark.fault("R18")
def test_paths_of_any_name_and_a_place_that_cannot_be_written(
    topic_dir: Path, whole: Path, processes: Any, tmp_path: Path
) -> None:
    place = tmp_path / "Läufe – 运行 'x'"
    place.mkdir()
    data, log = place / "Daten 1", tmp_path / "log"
    shutil.copytree(topic_dir, data)
    words = ["train", str(data), "--output", str(place / "run $1"), *sets()]
    assert run_child(processes, victims.command, words, None, signal.SIGTERM, str(log), False) == 0
    assert weights(place / "run $1") == weights(whole)
    (tmp_path / "file").write_text("")
    words = ["train", str(data), "--output", str(tmp_path / "file" / "run"), *sets()]
    assert run_child(processes, victims.command, words, None, signal.SIGTERM, str(log), False) == 4
    assert "Traceback" not in log.read_text()


@pytest.mark.fault("R18")
def test_without_a_home_and_a_locale_commands_answer() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "LC_ALL")}
    for words, code in ((["datasets"], 0), (["check", "/nowhere"], 3)):
        done = subprocess.run(
            [sys.executable, "-m", "xmc_midx", *words], env=environment, capture_output=True, check=False
        )
        assert done.returncode == code and b"Traceback" not in done.stderr
