"""Checkpoints: complete and verified, or refused; a failed save leaves what was there before."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from xmc_midx import checkpoint as checkpoint_module
from xmc_midx import tensorfile
from xmc_midx.checkpoint import FORMAT_VERSION, CheckpointStore
from xmc_midx.data import files
from xmc_midx.errors import DataError, ResourceError

PARTS = ("model", "training")


def make_parts(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "encoder.embedding": torch.randn(7, 3, generator=generator),
            "train.num_instances": torch.tensor(seed),
        },
        "training": {
            "optimizer.0.second_moment": torch.rand(7, generator=generator),
            "sampler.codes1": torch.arange(5, dtype=torch.int32),
            "generator.draws": generator.get_state(),
            # Neither a gradient nor a stride travels.
            "transposed": torch.randn(4, 2, generator=generator, requires_grad=True).T,
            "half": torch.ones(3, dtype=torch.bfloat16),
            "nothing": torch.empty(0, 3),
        },
    }


STATE = {"counters": {"step": 4, "loss_sum": 0.1 + 0.2}, "history": [{"epoch": 1}], "loss": None, "name": "Größe"}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A run with checkpoints of steps 4 and 9; `latest` is 9, `best` is 4."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (4, 9):
        store.save(step, make_parts(step), STATE)
    store.point("latest", 9)
    store.point("best", 4)
    return store


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_was_saved_is_read_back_bit_for_bit(store: CheckpointStore) -> None:
    for name, step in (("latest", 9), ("best", 4)):
        saved = store.load(name, PARTS)
        assert saved.path == store.directory / str(step) == store.path_of(name)
        assert saved.state == STATE
        for part, tensors in make_parts(step).items():
            assert saved.parts[part].keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert saved.parts[part][key].dtype == tensor.dtype
                assert torch.equal(saved.parts[part][key], tensor.detach())


def test_a_part_can_be_read_without_the_others(store: CheckpointStore) -> None:
    assert set(store.load("best", ["model"]).parts) == {"model"}


def test_equal_checkpoints_are_equal_bytes(store: CheckpointStore, tmp_path: Path) -> None:
    other = CheckpointStore(tmp_path / "other" / "checkpoints")
    other.save(9, make_parts(9), STATE)
    assert snapshot(other.directory / "9") == snapshot(store.directory / "9")


def test_a_step_saved_again_replaces_its_checkpoint(store: CheckpointStore) -> None:
    store.save(9, make_parts(5), {"again": True})
    saved = store.load("latest", PARTS)
    assert saved.state == {"again": True} and int(saved.parts["model"]["train.num_instances"]) == 5
    assert sorted(path.name for path in store.directory.iterdir()) == ["4", "9"]


def test_no_file_is_a_pickle(store: CheckpointStore) -> None:
    files = [path for path in store.directory.parent.rglob("*") if path.is_file()]
    assert len(files) == 10
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                assert opened.keys()
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            assert path.name in ("best", "latest") and path.read_text(encoding="utf-8").strip().isdigit()


# ------------------------------------------------------------------------- damage


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.fault("R6")
def test_every_single_bit_flip_is_detected(store: CheckpointStore) -> None:
    rng = np.random.default_rng(0)
    files = sorted(path for path in (store.directory / "9").iterdir())
    assert len(files) == 4
    positions = [(path, int(rng.integers(path.stat().st_size))) for path in files for _ in range(15)]
    # Nothing vouches for the manifest but itself: every byte of it.
    manifest = store.directory / "9" / "manifest.json"
    positions += [(manifest, byte) for byte in range(manifest.stat().st_size)]
    for path, byte in positions:
        before = path.read_bytes()
        flip(path, byte, int(rng.integers(8)))
        with pytest.raises(DataError):
            store.load("latest", PARTS)
        path.write_bytes(before)
    store.load("latest", PARTS)


@pytest.mark.soak
@pytest.mark.fault("R6")
def test_every_bit_of_a_checkpoint_is_covered(store: CheckpointStore) -> None:
    for path in sorted((store.directory / "9").iterdir()):
        before = path.read_bytes()
        for position in range(8 * len(before)):
            flip(path, position // 8, position % 8)
            with pytest.raises(DataError):
                store.load("latest", PARTS)
            path.write_bytes(before)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json", "manifest.json"])
@pytest.mark.fault("R6")
def test_a_cut_extended_or_missing_file_is_refused_by_name(store: CheckpointStore, name: str) -> None:
    path = store.directory / "9" / name
    content = path.read_bytes()
    for damaged in (content[:-2], content[: len(content) // 2], b"", content + b"\n{"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            store.load("latest", PARTS)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        store.load("latest", PARTS)
    # The other checkpoint does not suffer.
    store.load("best", PARTS)


@pytest.mark.fault("R6")
def test_the_manifest_or_the_directory_of_another_checkpoint_is_refused(store: CheckpointStore) -> None:
    good = (store.directory / "9" / "manifest.json").read_bytes()
    shutil.copy(store.directory / "4" / "manifest.json", store.directory / "9" / "manifest.json")
    with pytest.raises(DataError):
        store.load("latest", PARTS)
    (store.directory / "9" / "manifest.json").write_bytes(good)
    shutil.copy(store.directory / "4" / "model.safetensors", store.directory / "9" / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        store.load("latest", PARTS)
    shutil.rmtree(store.directory / "9")
    shutil.copytree(store.directory / "4", store.directory / "9")
    with pytest.raises(DataError, match="step 4, expected 9"):
        store.load("latest", PARTS)


def test_a_newer_format_says_so(store: CheckpointStore) -> None:
    path = store.directory / "9" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"version": FORMAT_VERSION + 1, "colour": "red"}), encoding="utf-8")
    with pytest.raises(DataError, match=f"format {FORMAT_VERSION + 1}; this release reads up to {FORMAT_VERSION}"):
        store.load("latest", PARTS)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "xmc-midx checkpoint", "version": 1, "step": 9, "files": []}',
        b'{"format": "xmc-midx checkpoint", "version": 1, "step": 9, "files": {"model.safetensors": 7}}',
        b'{"format": "xmc-midx checkpoint", "version": 1, "step": 9, "files": {"model.safetensors": {"bytes": 1}}}',
        b'{"format": "xmc-midx checkpoint", "version": "1", "step": 9, "files": {}}',
        b'{"format": "another", "version": 1, "step": 9, "files": {}}',
    ],
)
@pytest.mark.fault("R7")
def test_what_is_no_manifest_is_refused(store: CheckpointStore, content: bytes) -> None:
    (store.directory / "9" / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: is no checkpoint manifest"):
        store.load("latest", PARTS)


@pytest.mark.parametrize("content", [b"soon\n", b"", b"\xff", b"9 9"])
def test_a_damaged_pointer_is_refused(store: CheckpointStore, content: bytes) -> None:
    (store.directory.parent / "latest").write_bytes(content)
    with pytest.raises(DataError, match="names no checkpoint"):
        store.load("latest", PARTS)


def test_a_pointer_to_nothing_is_refused(store: CheckpointStore) -> None:
    (store.directory.parent / "latest").write_text("7\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json: is missing"):
        store.load("latest", PARTS)
    assert store.step_of("absent") is None
    with pytest.raises(DataError, match="has no `absent` checkpoint"):
        store.path_of("absent")


# --------------------------------------------------------------------- failed saves


@pytest.mark.parametrize("fails_at", ["first part", "second part", "state.json", "manifest.json", "rename"])
@pytest.mark.fault("R4")
def test_a_failed_save_leaves_everything_as_it_was(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    files = {"first part": "model.safetensors", "second part": "training.safetensors"}

    def failing(work: Callable[..., Any]) -> Callable[..., Any]:
        def work_or_fail(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == files.get(fails_at, fails_at):
                with path.open("wb") as file:
                    file.write(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            return work(path, *arguments, **options)

        return work_or_fail

    def failing_sync(path: Path) -> None:
        if fails_at == "rename" and path.name.startswith(".unfinished"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    sync = checkpoint_module.sync_directory
    for owner, name in ((checkpoint_module, "write_tensors"), (Path, "write_text"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    monkeypatch.setattr(checkpoint_module, "sync_directory", failing_sync)
    before = snapshot(store.directory.parent)
    for step in (12, 9):
        with pytest.raises(ResourceError, match="could not be written") as caught:
            store.save(step, make_parts(1), STATE)
        assert caught.value.exit_code == 4
        assert snapshot(store.directory.parent) == before
        assert sorted(path.name for path in store.directory.iterdir()) == ["4", "9"]
    store.load("latest", PARTS)


def test_a_pointer_that_cannot_be_written_stays_as_it_was(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "sync_file", full)
    before = snapshot(store.directory.parent)
    with pytest.raises(ResourceError, match="No space left"):
        store.point("latest", 4)
    assert snapshot(store.directory.parent) == before


def test_a_pointer_is_replaced_and_never_written_over(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "same file").hardlink_to(store.directory.parent / "latest")
    store.point("latest", 4)
    assert store.step_of("latest") == 4
    assert (tmp_path / "same file").read_text() == "9\n"


def test_a_directory_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ResourceError):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, make_parts(1), STATE)


def test_files_are_on_disk_before_the_rename_and_the_rename_before_the_pointers(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fsync` is watched where it is called; a file is synced after its last write, as its size then shows."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"{path.name} {path.stat().st_size}" if path.is_file() else f"{path.name}/")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"-> {target.name}")
        return (rename if path.is_dir() else replace)(path, target)

    for module in (tensorfile, files):
        monkeypatch.setattr(module.os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", renamed)
    path = store.save(12, make_parts(1), STATE, ["best", "latest"])
    process = os.getpid()
    complete = {f"{file.name} {file.stat().st_size}" for file in path.iterdir()}
    assert len(complete) == 4
    before = (
        complete | {f".unfinished-12-{process}/"} | {f".unfinished-{name}-{process} 3" for name in ("best", "latest")}
    )
    assert set(events[: len(before)]) == before
    assert events[len(before) :] == ["-> 12", "checkpoints/", "-> best", "-> latest", f"{store.directory.parent.name}/"]
    del events[:]
    store.point("latest", 9)
    assert events == [f".unfinished-latest-{process} 2", "-> latest", f"{store.directory.parent.name}/"]


# ------------------------------------------------------------------- in the background


def test_tensors_are_written_before_the_state_is_known(store: CheckpointStore, tmp_path: Path) -> None:
    store.begin(12, make_parts(3))
    assert store.begun == 12
    store.finish({"score": 1.0}, ["best", "latest"])
    assert store.begun is None and (store.step_of("best"), store.step_of("latest")) == (12, 12)
    at_once = CheckpointStore(tmp_path / "other" / "checkpoints")
    at_once.save(12, make_parts(3), {"score": 1.0})
    assert snapshot(at_once.directory / "12") == snapshot(store.directory / "12")


def test_what_was_begun_and_is_given_up_leaves_nothing(store: CheckpointStore) -> None:
    before = snapshot(store.directory.parent)
    store.begin(12, make_parts(3))
    store.settle()
    assert store.begun is None and snapshot(store.directory.parent) == before
    assert sorted(path.name for path in store.directory.iterdir()) == ["4", "9"]


@pytest.mark.fault("R4")
def test_what_goes_wrong_in_the_background_is_said_at_the_end(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(store.directory.parent)
    monkeypatch.setattr(checkpoint_module, "write_tensors", full)
    store.begin(12, make_parts(3))
    with pytest.raises(ResourceError, match="No space left"):
        store.finish(STATE, ["latest"])
    assert snapshot(store.directory.parent) == before and store.begun is None


def test_a_save_waits_for_the_pruning_before_it(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning clears unfinished directories: the next one must not be among them."""
    clean, may_clean = store.clean, threading.Event()

    def late() -> None:
        may_clean.wait(0.3)
        clean()

    monkeypatch.setattr(store, "clean", late)
    store.prune([9], wait=False)
    store.save(12, make_parts(3), STATE, ["latest"])
    may_clean.set()
    store.settle()
    assert store.steps() == [9, 12] and store.load("latest", PARTS).state == STATE


# --------------------------------------------------------------------------- prune


def test_prune_keeps_the_named_steps_and_clears_what_a_killed_writer_left(store: CheckpointStore) -> None:
    (store.directory / ".unfinished-12-999").mkdir()
    (store.directory / ".unfinished-12-999" / "model.safetensors").write_bytes(b"half")
    (store.directory.parent / ".unfinished-latest-999").write_text("12", encoding="utf-8")
    (store.directory / "notes.txt").write_text("mine", encoding="utf-8")
    store.prune({9})
    assert sorted(path.name for path in store.directory.iterdir()) == ["9", "notes.txt"]
    assert sorted(path.name for path in store.directory.parent.iterdir()) == ["best", "checkpoints", "latest"]
    store.load("latest", PARTS)


def test_pruning_an_empty_run_does_nothing(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "checkpoints").prune({1})
    assert list(tmp_path.iterdir()) == []
