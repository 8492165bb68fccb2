"""Layer 5. Checkpoints: directories that are complete, verified and free of code, or are not there at all.

A checkpoint is written beside its final name, every file and the directory are synced, and one rename makes it
visible. It holds one safetensors file for each part (`model`, `training`), `state.json` for what is not a tensor, and
`manifest.json` with the size and the sha256 of every file. `latest` and `best` are one-line text files that name a
checkpoint, replaced by a rename too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xmc_midx.data.files import sha256_of
from xmc_midx.errors import DataError, ResourceError

__all__ = ["FORMAT_VERSION", "Checkpoint", "CheckpointStore"]

FORMAT_VERSION = 1
_FORMAT = "xmc-midx checkpoint"
_UNFINISHED = ".unfinished-"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was read back."""

    path: Path
    parts: Mapping[str, dict[str, torch.Tensor]]
    """Part name -> tensor name -> tensor, on the CPU."""
    state: Mapping[str, Any]
    """The plain values that were saved with them."""


class CheckpointStore:
    """The checkpoints of a run: `<directory>/<step>/` and the pointers beside the directory.

    Parameters
    ----------
    directory : made at the first save.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # ------------------------------------------------------------------ write

    def save(self, step: int, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step and return its directory; an equal step's older checkpoint is replaced.

        Raises
        ------
        ResourceError : the disk is full or the directory cannot be written; what was there before is untouched.
        """
        final = self.directory / str(step)
        beside = self.directory / f"{_UNFINISHED}{step}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            self._write_files(beside, step, parts, state)
            if final.exists():
                shutil.rmtree(final)
            beside.rename(final)
            _sync_directory(self.directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise ResourceError(
                f"{final}: the checkpoint could not be written: {getattr(error, 'strerror', None) or error}.",
                hint="Is the disk full or read-only? Earlier checkpoints are untouched.",
            ) from error
        return final

    def _write_files(self, target: Path, step: int, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        for part, tensors in parts.items():
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, target / f"{part}.safetensors")
        (target / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        files = {}
        for path in sorted(target.iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            _sync_file(path)
        manifest = {"format": _FORMAT, "version": FORMAT_VERSION, "step": step, "files": files}
        (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync_file(target / "manifest.json")
        _sync_directory(target)

    def point(self, name: str, step: int) -> None:
        """Make the pointer `name` (`latest`, `best`) name the checkpoint of `step`."""
        pointer = self.directory.parent / name
        beside = pointer.with_name(f"{_UNFINISHED}{name}-{os.getpid()}")
        try:
            beside.write_text(f"{step}\n", encoding="utf-8")
            _sync_file(beside)
            beside.replace(pointer)
            _sync_directory(pointer.parent)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ResourceError(
                f"{pointer}: could not be written: {error.strerror}.", hint="Is the disk full or read-only?"
            ) from error

    def prune(self, keep: Iterable[int]) -> None:
        """Delete all checkpoints but those of the steps in `keep`, and what a killed writer left behind."""
        kept = {str(step) for step in keep}
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.name not in kept and (path.name.isdigit() or path.name.startswith(_UNFINISHED)):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.parent.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------------- read

    def step_of(self, name: str) -> int | None:
        """The step that a pointer names; None where there is no such pointer."""
        try:
            return int((self.directory.parent / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise DataError(f"{self.directory.parent / name}: names no checkpoint; expected a step number.") from None

    def path_of(self, name: str) -> Path:
        """The directory of the checkpoint that a pointer names."""
        step = self.step_of(name)
        if step is None:
            raise DataError(
                f"{self.directory.parent}: has no `{name}` checkpoint.",
                hint="Is this a run directory of a finished epoch?",
            )
        return self.directory / str(step)

    def load(self, name: str, parts: Iterable[str]) -> Checkpoint:
        """Read and verify the parts of the checkpoint that `name` points to.

        Raises
        ------
        DataError : a file is missing, has another size or hash than the manifest says, or is of an unknown version.
        """
        path = self.path_of(name)
        wanted = [f"{part}.safetensors" for part in parts]
        _verify(path, [*wanted, "state.json"])
        try:
            tensors = {file.removesuffix(".safetensors"): load_file(path / file) for file in wanted}
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: is no checkpoint of ours: {error}.") from None
        return Checkpoint(path=path, parts=tensors, state=state)


def _verify(path: Path, wanted: Iterable[str]) -> None:
    files = _read_manifest(path)
    for name in {*wanted, *files}:
        if name not in files or not (path / name).is_file():
            raise DataError(f"{path / name}: is missing.", hint="The checkpoint is incomplete; use another one.")
        size = (path / name).stat().st_size
        if size != files[name]["bytes"]:
            raise DataError(
                f"{path / name}: has {size} bytes, expected {files[name]['bytes']}.",
                hint="It was cut or edited.",
            )
    for name in wanted:
        if sha256_of(path / name) != files[name]["sha256"]:
            raise DataError(
                f"{path / name}: its sha256 is not the manifest's.",
                hint="It was damaged; use another checkpoint.",
            )


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> size and hash. Nothing else vouches for the manifest, so every field must be what we write."""
    manifest_path = path / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{manifest_path}: is missing, so this is no complete checkpoint.") from None
    except (ValueError, RecursionError):
        manifest = None
    fields = manifest if isinstance(manifest, dict) else {}
    version, files = fields.get("version"), fields.get("files")
    if fields.get("format") == _FORMAT and isinstance(version, int) and version > FORMAT_VERSION:
        raise DataError(
            f"{path}: has checkpoint format {version}; this release reads up to {FORMAT_VERSION}.",
            hint="Install a newer xmc-midx.",
        )
    if (
        not isinstance(files, dict)
        or not all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in files.values())
        or fields != {"format": _FORMAT, "version": FORMAT_VERSION, "step": fields.get("step"), "files": files}
    ):
        raise DataError(f"{manifest_path}: is no checkpoint manifest.", hint="It was damaged or edited.")
    if str(fields["step"]) != path.name:
        raise DataError(f"{manifest_path}: is of step {fields['step']}, expected {path.name}.", hint="Was it moved?")
    return files


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows has no handle for a directory; its renames are journalled.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
