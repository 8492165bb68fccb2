"""Layer 5. Checkpoints: directories that are complete, verified and free of code, or are not there at all.

A checkpoint is written beside its final name, every file and the directory are synced, and one rename makes it
visible. It holds one safetensors file for each part (`model`, `training`), `state.json` for what is not a tensor, and
`manifest.json` with the size and the sha256 of every file. `latest` and `best` are one-line text files that name a
checkpoint, replaced by a rename too, `latest` last. The tensors are written in the background from `begin` to `finish`,
while the model is validated, say: they must stand still. Format 2 may hold an epoch that was not validated yet
(`pending` in the state); format 1, which could not, is read as well.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from xmc_midx.crash import crash_point
from xmc_midx.data.files import read_json, sha256_of, sync_directory, sync_file
from xmc_midx.device import is_out_of_memory
from xmc_midx.errors import DataError, ResourceError
from xmc_midx.quantization import dequantize
from xmc_midx.rundir import RunDirectory
from xmc_midx.tensorfile import StoredTensor, write_tensors

__all__ = ["FORMAT_VERSION", "Checkpoint", "CheckpointStore", "map_model", "read_model", "refuse_misfits"]

FORMAT_VERSION = 2
_FORMAT = "xmc-midx checkpoint"
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"
_MAX_MANIFEST_BYTES = 2**20

_Result = TypeVar("_Result")
Tensors = Mapping[str, torch.Tensor]
_Files = dict[str, dict[str, Any]]
"""File name -> size and hash, as in the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was read back."""

    path: Path
    parts: Mapping[str, dict[str, torch.Tensor]]
    """Part name -> tensor name -> tensor, on the CPU."""
    state: Mapping[str, Any]
    """The plain values that were saved with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A checkpoint whose tensors are being written."""

    step: int
    beside: Path
    num_bytes: int
    files: Future[_Files]


class CheckpointStore:
    """The checkpoints of a run: `<directory>/<step>/` and the pointers beside the directory.

    Parameters
    ----------
    directory : made at the first save.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._begun: _Begun | None = None
        self._pruning: Future[None] | None = None

    # ------------------------------------------------------------------ write

    def save(
        self, step: int, parts: Mapping[str, Tensors], state: Mapping[str, Any], pointers: Sequence[str] = ()
    ) -> Path:
        """`begin` and `finish` at once."""
        self.begin(step, parts)
        return self.finish(state, pointers)

    @property
    def begun(self) -> int | None:
        """The step whose tensors are being written; None where none are."""
        return None if self._begun is None else self._begun.step

    def begin(self, step: int, parts: Mapping[str, Tensors]) -> None:
        """Start to write the tensors of a step, in a thread; they must not change until `finish` or `settle`.

        What goes wrong is raised by `finish`.
        """
        self.settle()
        beside = self.directory / f"{_UNFINISHED}{step}-{os.getpid()}"
        num_bytes = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
        files = _in_background(functools.partial(_write_parts, beside, parts))
        self._begun = _Begun(step=step, beside=beside, num_bytes=num_bytes, files=files)

    def settle(self) -> None:
        """Wait for the background; leave nothing of what was begun and will not be finished."""
        if self._pruning is not None:
            self._pruning.result()
            self._pruning = None
        if self._begun is not None:
            self._begun.files.exception()
            shutil.rmtree(self._begun.beside, ignore_errors=True)
            self._begun = None

    def finish(self, state: Mapping[str, Any], pointers: Sequence[str] = ()) -> Path:
        """Make a checkpoint of the tensors that were begun and return its directory; it replaces one of the same step.

        Parameters
        ----------
        state : the plain values that belong to them.
        pointers : which are to name it, one after the other, once it is on the disk.

        Raises
        ------
        ResourceError : the disk is full or the directory cannot be written; what was there before is untouched.
        """
        assert self._begun is not None, "there is a beginning"
        step, beside, num_bytes = self._begun.step, self._begun.beside, self._begun.num_bytes
        final, aside = self.directory / str(step), self.directory / f"{_REPLACED}{step}"
        try:
            sealed = _seal(beside, step, self._begun.files.result(), state)
            staged = self._stage(pointers, step)
            _sync_all([*sealed, *staged.values()], beside)
            crash_point("save.manifest-written")
            if final.exists():
                # A directory cannot be replaced by a rename. Between these two, `clean` finds the older one.
                final.rename(aside)
                crash_point("save.old-aside")
            beside.rename(final)
            crash_point("save.renamed")
            sync_directory(self.directory)
            shutil.rmtree(aside, ignore_errors=True)
            self._turn(staged)
        except OSError as error:
            self._unstage(pointers)
            if aside.exists() and not final.exists():
                aside.rename(final)
            raise ResourceError(
                f"{final}: the checkpoint could not be written: {error.strerror or error} "
                f"(it needs {num_bytes:,} bytes, {_free_bytes(self.directory):,} are free).",
                hint="Is the disk full or read-only? Earlier checkpoints are untouched.",
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            self._begun = None
        return final

    def point(self, name: str, step: int) -> None:
        """Make the pointer `name` (`latest`, `best`) name the checkpoint of `step`."""
        try:
            staged = self._stage([name], step)
            _sync_all([*staged.values()])
            self._turn(staged)
        except OSError as error:
            self._unstage([name])
            raise ResourceError(
                f"{self.directory.parent / name}: could not be written: {error.strerror}.",
                hint="Is the disk full or read-only?",
            ) from error

    def _beside(self, name: str) -> Path:
        return self.directory.parent / f"{_UNFINISHED}{name}-{os.getpid()}"

    def _stage(self, names: Sequence[str], step: int) -> dict[str, Path]:
        """Pointer -> the file beside it that is to take its name."""
        for name in names:
            self._beside(name).write_text(f"{step}\n", encoding="utf-8")
        return {name: self._beside(name) for name in names}

    def _turn(self, staged: Mapping[str, Path]) -> None:
        for name, path in staged.items():
            crash_point("save.pointer-written")
            path.replace(self.directory.parent / name)
            crash_point("save.pointed")
        if staged:
            sync_directory(self.directory.parent)

    def _unstage(self, names: Sequence[str]) -> None:
        for name in names:
            self._beside(name).unlink(missing_ok=True)

    def unpoint(self, name: str) -> None:
        """Remove a pointer; one that is not there is no error."""
        (self.directory.parent / name).unlink(missing_ok=True)

    def prune(self, keep: Iterable[int], *, wait: bool = True) -> None:
        """Delete all checkpoints but those of the steps in `keep`, and what a killed writer left behind.

        Without `wait` in the background, until the next `begin` or `settle`.
        """
        self.settle()
        self._pruning = _in_background(functools.partial(self._prune, frozenset(keep)))
        if wait:
            self.settle()

    def _prune(self, kept: frozenset[int]) -> None:
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
        self.clean()
        crash_point("save.pruned")

    def clean(self) -> None:
        """Clear what a killed writer left behind, and put back a checkpoint that it was about to replace."""
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.name.startswith(_REPLACED):
                final = self.directory / path.name.removeprefix(_REPLACED)
                if not final.exists():
                    path.rename(final)
            if path.name.startswith((_REPLACED, _UNFINISHED)):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.parent.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------------- read

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, rising."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if _is_step(path.name))

    def step_of(self, name: str) -> int | None:
        """The step that a pointer names; None where there is no such pointer."""
        try:
            with (self.directory.parent / name).open(encoding="utf-8") as file:
                return int(file.read(32))
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

    def load(self, name: str, parts: Iterable[str], *, verify: bool = True) -> Checkpoint:
        """Read and verify the parts of the checkpoint that `name` points to.

        Parameters
        ----------
        verify : whether the hashes are computed; the sizes are compared in any case.

        Raises
        ------
        DataError : a file is missing, has another size or hash than the manifest says, or is of an unknown version.
        """
        return self._load(self.path_of(name), [*parts], verify)

    def load_newest(self, parts: Iterable[str], *, verify: bool = True) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint that `latest` points to or, where that one is damaged, the newest of the others that is whole.

        Returns
        -------
        The checkpoint, None where there is none at all; and for each damaged one that was passed over, what is wrong.

        Raises
        ------
        DataError : there are checkpoints, and all of them are damaged.
        """
        faults: list[DataError] = []
        steps = self.steps()[::-1]
        try:
            latest = self.step_of("latest")
        except DataError as error:
            faults.append(error)
        else:
            steps = [*([] if latest is None else [latest]), *(step for step in steps if step != latest)]
        for step in steps:
            try:
                return self._load(self.directory / str(step), [*parts], verify), [fault.message for fault in faults]
            except DataError as error:
                faults.append(error)
        if not faults:
            return None, []
        raise DataError(
            faults[0].message, hint="There is no other checkpoint to go back to; --force starts the run anew."
        )

    def verify(self, step: int, *, hashes: bool) -> None:
        """A DataError where the model of the checkpoint of a step is missing or is not what its manifest says."""
        _verify(self.directory / str(step), ["model.safetensors"], hashes=hashes)

    def _load(self, path: Path, parts: list[str], verify: bool) -> Checkpoint:
        wanted = [f"{part}.safetensors" for part in parts]
        _verify(path, [*wanted, "state.json"], hashes=verify)
        with refuse_misfits(path):
            tensors = {file.removesuffix(".safetensors"): load_file(path / file) for file in wanted}
            state = read_json(path / "state.json")
        if not isinstance(state, dict):
            raise DataError(f"{path / 'state.json'}: expected a JSON object.")
        return Checkpoint(path=path, parts=tensors, state=state)


def map_model(
    run: RunDirectory, name: str = "best", *, verify: bool = True
) -> tuple[dict[str, NDArray[Any]], Path, bool]:
    """The arrays that predict, mapped and as they are stored (`quantization.StoredTable` takes a table); where they
    lie; and whether they are the finished model: where `name` is `best` and there is one, else the part `model` of a
    checkpoint.

    Raises
    ------
    DataError : a file is missing or damaged.
    """
    if name == "best" and run.has_model:
        return run.map_model(verify=verify), run.path, True
    saved = CheckpointStore(run.checkpoints).load(name, ["model"], verify=verify)
    model = saved.parts["model"]
    # NumPy has no bfloat16.
    arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in model.items()}
    return arrays, saved.path, False


def read_model(run: RunDirectory) -> tuple[dict[str, torch.Tensor], Path]:
    """The tensors of the best model as of `map_model`, tables in float32, and where they lie."""
    arrays, source, _ = map_model(run)
    with refuse_misfits(source):
        return {name: torch.from_numpy(array) for name, array in dequantize(arrays).items()}, source


@contextmanager
def refuse_misfits(path: Path) -> Iterator[None]:
    """Tensors or values of a checkpoint that do not fit what they are read into are the file's fault."""
    try:
        yield
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path}: is no checkpoint of this run: {type(error).__name__}: {reason}.",
            hint="Was it copied here from another run, or edited?",
        ) from error


def _write_parts(beside: Path, parts: Mapping[str, Tensors]) -> _Files:
    """A file for each part, on the disk when this returns."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    crash_point("save.begun")
    files: _Files = {}
    with ThreadPoolExecutor(len(parts)) as pool:
        paths = {part: beside / f"{part}.safetensors" for part in parts}
        jobs = {part: pool.submit(_write_part, paths[part], tensors) for part, tensors in parts.items()}
        for part, job in jobs.items():
            digest = job.result()
            files[paths[part].name] = {"bytes": paths[part].stat().st_size, "sha256": digest}
            crash_point("save.part-written")
    return files


def _write_part(path: Path, tensors: Tensors) -> str:
    stored = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored[name] = StoredTensor(dtype=dtype, shape=tuple(tensor.shape), data=flat.numpy().data)
    return write_tensors(path, stored)


def _seal(beside: Path, step: int, files: _Files, state: Mapping[str, Any]) -> list[Path]:
    """Write the state, and the manifest of all; their paths."""
    content = (json.dumps(state, indent=1) + "\n").encode()
    (beside / "state.json").write_bytes(content)
    files = files | {"state.json": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = {"format": _FORMAT, "version": FORMAT_VERSION, "step": step, "files": dict(sorted(files.items()))}
    (beside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return [beside / "state.json", beside / "manifest.json"]


def _sync_all(files: Sequence[Path], *directories: Path) -> None:
    """Side by side: a file system with a journal brings them to the disk together."""
    with ThreadPoolExecutor(len(files) + len(directories)) as pool:
        jobs = [pool.submit(sync_file, file) for file in files]
        jobs += [pool.submit(sync_directory, directory) for directory in directories]
        for job in jobs:
            job.result()


def _in_background(work: Callable[[], _Result]) -> Future[_Result]:
    thread = ThreadPoolExecutor(1)
    future = thread.submit(work)
    thread.shutdown(wait=False)
    return future


def _verify(path: Path, wanted: Iterable[str], *, hashes: bool) -> None:
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
    for name in wanted if hashes else ():
        if sha256_of(path / name) != files[name]["sha256"]:
            raise DataError(
                f"{path / name}: its sha256 is not the manifest's.",
                hint="It was damaged; use another checkpoint.",
            )


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> size and hash. Nothing else vouches for the manifest, so every field must be what we write."""
    manifest_path = path / "manifest.json"
    if not manifest_path.exists():
        raise DataError(f"{manifest_path}: is missing, so this is no complete checkpoint.")
    try:
        manifest = read_json(manifest_path, max_bytes=_MAX_MANIFEST_BYTES)
    except DataError:
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
        or type(version) is not int
        or not 1 <= version <= FORMAT_VERSION
        or fields != {"format": _FORMAT, "version": version, "step": fields.get("step"), "files": files}
    ):
        raise DataError(f"{manifest_path}: is no checkpoint manifest.", hint="It was damaged or edited.")
    if str(fields["step"]) != path.name:
        raise DataError(f"{manifest_path}: is of step {fields['step']}, expected {path.name}.", hint="Was it moved?")
    return files


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _free_bytes(directory: Path) -> int:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free
