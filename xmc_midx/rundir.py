"""Layer 5. A run directory: what lies where, who may write, how a finished one is recognised.

config.yaml          the resolved configuration          run.json       versions, seed, data, hardware, command
checkpoints/<step>/  see `xmc_midx.checkpoint`           metrics.jsonl  one line an epoch
best, latest         each names a checkpoint             labels.txt, vocabulary.txt   where they are known
model.safetensors    the finished model, quantised       model.json     hashes of what a prediction reads, last
cells.safetensors    where a search for labels begins (`xmc_midx.cells`), and how far it goes
members/<n>/         the further models of an ensemble, from 2 on: run directories without what the first has for all:
                     names, vocabulary, label cells, training rows
interpolation.json   what is added to the model: neighbors.safetensors (training rows), ranker.safetensors, or neither;
                     and what makes probabilities of the scores
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xmc_midx.calibration import Calibration
from xmc_midx.config import Config, dump_config, load_config
from xmc_midx.crash import crash_point
from xmc_midx.data.files import atomic_write, read_json, sha256_of
from xmc_midx.errors import DataError, ResourceError, UsageError
from xmc_midx.interpolation import Interpolation
from xmc_midx.neighbors import NeighborIndex, save_rows
from xmc_midx.packing import pack_tables, unpack_tables
from xmc_midx.paths import home_path
from xmc_midx.ranker import LinearRanker
from xmc_midx.tensorfile import write_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from xmc_midx.data.vocabulary import Vocabulary

__all__ = ["Added", "Provenance", "RunDirectory"]

_Part = TypeVar("_Part", NeighborIndex, LinearRanker)
_MODEL, _MODEL_RECORD = "model.safetensors", "model.json"
_MODEL_FORMAT, _READ_FORMATS = 4, (1, 2, 3, 4)
"""The second may hold tables in int4, the third packed ones, the fourth rows of those labels alone that training
instances have."""
_CELLS = "cells.safetensors"
_INTERPOLATION = "interpolation.json"
_NEIGHBORS, _RANKER = "neighbors.safetensors", "ranker.safetensors"
_LABELS, _VOCABULARY = "labels.txt", "vocabulary.txt"
_MEMBERS = "members"
_OURS = {
    *("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "best", "latest", ".lock", _LABELS, _VOCABULARY),
    *(_MODEL, _MODEL_RECORD, _CELLS, _INTERPOLATION, _NEIGHBORS, _RANKER, _MEMBERS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What `run.json` says of a training; None where it says nothing."""

    data: str | None
    """None where it was in memory, too."""
    test: str | None
    fingerprint: str | None
    seconds: float | None
    """Of a finished training."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Added:
    """What is added to a model's scores, and what makes probabilities of them; the default is nothing."""

    settings: Interpolation = field(default_factory=Interpolation)
    neighbors: NeighborIndex | None = None
    ranker: LinearRanker | None = None
    calibration: Calibration | None = None


class RunDirectory:
    """A run directory that exists.

    Parameters
    ----------
    path : of the directory.
    config : its resolved configuration.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def members(self) -> list[Path]:
        """The run directories of the further models of an ensemble, whether they are there yet or not; the first model
        is this directory's own."""
        size = self.config.training.ensemble_size
        return [self.path / _MEMBERS / str(number) for number in range(2, 1 + (size if isinstance(size, int) else 1))]

    @property
    def finished_members(self) -> list[Path]:
        """Those of `members` that can predict."""
        return [path for path in self.members if (path / _MODEL_RECORD).exists()]

    @property
    def is_complete(self) -> bool:
        """Whether all its models can predict."""
        return self.has_model and self.finished_members == self.members

    @classmethod
    def open(cls, run: str | Path) -> RunDirectory:
        """An existing run directory.

        Raises
        ------
        DataError : there is no such directory, or it is not one that `train` wrote.
        """
        path = home_path(run)
        aside = aside_of(path)
        hint = None
        if aside.exists():
            hint = f"The run is in {aside}: another replaces it now, or was killed; then `xmc-midx train` puts it back."
        if not path.is_dir():
            raise DataError(
                f"{path}: there is no such run directory.",
                hint=hint or "Train one: xmc-midx train DATA --output RUN.",
            )
        if not (path / "config.yaml").is_file():
            raise DataError(f"{path}: is no run directory: it has no config.yaml.", hint=hint or "Is this a dataset?")
        try:
            return cls(path, load_config(path / "config.yaml"))
        except UsageError as error:
            raise DataError(error.message, hint=error.hint) from None

    @classmethod
    @contextmanager
    def create(
        cls,
        run: str | Path,
        config: Config,
        *,
        provenance: Mapping[str, Any] | None = None,
        label_names: Sequence[str] | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> Iterator[RunDirectory]:
        """A new, locked run directory.

        Parameters
        ----------
        run : its path; a directory that is there must be empty.
        config : resolved.
        provenance : what goes into `run.json`.
        label_names, vocabulary : what turns ids into names and texts into features; None where unknown.

        Raises
        ------
        UsageError : the directory holds a run or other files already.
        ResourceError : it cannot be written, or another training is using it.
        """
        path = home_path(run)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be made: {error.strerror}.") from None
        if not _is_run(path):
            # Before the lock file is made: a directory that is not ours stays as it is.
            _refuse_strangers(path)
        with cls.lock(path):
            if _is_run(path):
                raise _holds_a_run(path)
            _refuse_strangers(path)
            directory = cls(path, config)
            directory.write_json("run.json", provenance or {})
            directory.write_names(label_names, vocabulary)
            # Last: a directory with a configuration is a run that can be resumed.
            directory.write_text("config.yaml", dump_config(config))
            crash_point("run.begun")
            yield directory

    @staticmethod
    def require_replaceable(path: Path) -> None:
        """A UsageError where a directory is no run, or holds more than one: what nobody asked for is not deleted."""
        if not _is_run(path):
            _refuse_strangers(path)
        strangers = sorted(entry.name for entry in path.iterdir() if not _is_ours(entry.name))
        if strangers:
            raise UsageError(
                f"{path}: holds {strangers[0]}, which is not of the run.",
                hint="--force replaces the whole directory: move that away, or choose another --output.",
            )

    @staticmethod
    @contextmanager
    def lock(path: Path) -> Iterator[None]:
        """Hold the directory's lock, which the system drops when the process ends, however it ends.

        What a killed writer left is cleared once the lock is held.
        """
        lock = FileLock(path / ".lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResourceError(
                f"{path}: another training is using this run directory.",
                hint="Wait for it, or choose another --output.",
            ) from None
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror}.") from None
        try:
            for stray in path.glob(".*.tmp"):
                stray.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    # ------------------------------------------------------------------ files

    def write_text(self, name: str, text: str) -> None:
        """Write a file beside its name, bring it to the disk and rename it there."""
        with atomic_write(self.path / name) as file:
            file.write(text.encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """`metrics.jsonl`, whole: a line an epoch; the checkpoints have the same lines."""
        self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """A line more of `metrics.jsonl`, which the end of the training, or a resumed one, writes whole.

        Raises
        ------
        ResourceError : the disk is full or the directory cannot be written.
        """
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror or error}.") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a DataError where one is cut or is none."""
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            found = [json.loads(line) for line in lines]
        except ValueError as error:
            raise DataError(f"{path}: is not what `train` wrote: {error}.") from None
        if not all(isinstance(line, dict) for line in found):
            raise DataError(f"{path}: is not what `train` wrote; expected an object a line.")
        return found

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object that `write_json` wrote; a DataError where it is missing or damaged."""
        value = read_json(self.path / name)
        if not isinstance(value, dict):
            raise DataError(f"{self.path / name}: expected a JSON object.")
        return value

    def provenance(self) -> Provenance:
        """What `run.json` says of the training; a DataError where the file is missing, damaged or edited."""
        record = self.read_json("run.json")
        texts = {name: record.get(name) for name in ("data", "test", "fingerprint")}
        seconds = record.get("seconds")
        if not (
            all(value is None or isinstance(value, str) for value in texts.values())
            and (seconds is None or (isinstance(seconds, int | float) and seconds >= 0))
        ):
            raise DataError(f"{self.path / 'run.json'}: is not what `train` wrote.", hint="It was edited.")
        return Provenance(**texts, seconds=seconds)

    def finish(self, seconds: float) -> float:
        """Note in `run.json` that the training has come to its end, after so long; a second note changes nothing.

        Returns
        -------
        float : the seconds that are noted; those given, where an older release noted none.
        """
        record = self.read_json("run.json")
        if "finished" not in record:
            record |= {"finished": timestamp(), "seconds": round(seconds, 3)}
            self.write_json("run.json", record)
        return float(record.get("seconds") or seconds)

    # ------------------------------------------------------------ finished model

    @property
    def has_model(self) -> bool:
        """Whether `seal_model` was here: the training has come to its end."""
        return (self.path / _MODEL_RECORD).exists()

    def write_model(self, stored: Mapping[str, NDArray[Any]]) -> None:
        """Keep the finished model: the tensors of a checkpoint's part `model`, as of `quantization.quantize`."""
        self._write_tensors(_MODEL, lambda path: write_arrays(path, pack_tables(stored)))

    def write_cells(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what a search for labels begins with (`index.CellIndex.as_arrays`)."""
        self._write_tensors(_CELLS, lambda path: write_arrays(path, pack_tables(arrays)))

    def map_cells(self) -> dict[str, NDArray[Any]] | None:
        """What `write_cells` was given, mapped but for small tables; None where it was not called. `map_model` has
        verified the file.

        Raises
        ------
        DataError : it is not what was written.
        """
        path = self.path / _CELLS
        return _map(path) if self.has_model and path.exists() else None

    def seal_model(self) -> None:
        """Note sizes and hashes of what a prediction reads, last of all: from now on the run has a model."""
        names = (_MODEL, _CELLS, _INTERPOLATION, _LABELS, _VOCABULARY, "config.yaml")
        paths = [self.path / name for name in names if (self.path / name).exists()]
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
        self.write_json(_MODEL_RECORD, {"format": _MODEL_FORMAT, "files": files})

    def map_model(self, *, verify: bool = True) -> dict[str, NDArray[Any]]:
        """What `write_model` was given, mapped from the file but for small tables: only what is used is read.

        Parameters
        ----------
        verify : whether the hashes are computed; the sizes are compared in any case.

        Raises
        ------
        DataError : a file is missing or damaged, or of a newer format.
        """
        record = self.read_json(_MODEL_RECORD)
        files, form = record.get("files"), record.get("format")
        if form not in _READ_FORMATS:
            raise DataError(
                f"{self.path / _MODEL_RECORD}: has model format {form}; this release reads up to {_MODEL_FORMAT}.",
                hint="Install a newer xmc-midx, or train anew.",
            )
        if (
            not isinstance(files, dict)
            or _MODEL not in files
            or not all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in files.values())
        ):
            raise DataError(f"{self.path / _MODEL_RECORD}: is no record of a model.", hint="It was damaged or edited.")
        for name, expected in files.items():
            path = self.path / name
            if path.parent != self.path or not path.is_file():
                raise DataError(f"{path}: is missing; {_MODEL_RECORD} names it.", hint="Was the run copied in part?")
            damaged = path.stat().st_size != expected["bytes"] or (verify and sha256_of(path) != expected["sha256"])
            if damaged:
                raise DataError(f"{path}: is not what {_MODEL_RECORD} says it is.", hint="It was damaged or edited.")
        return _map(self.path / _MODEL)

    @property
    def model_bytes(self) -> int:
        """Bytes of the finished model, of what is added to it, and of its ensemble; 0 before the end."""
        files = [self.path / name for name in (_MODEL, _CELLS, _NEIGHBORS, _RANKER)]
        if not self.has_model:
            return 0
        own = sum(file.stat().st_size for file in files if file.exists())
        return own + sum(RunDirectory.open(path).model_bytes for path in self.finished_members)

    def _write_tensors(self, name: str, write: Callable[[Path], str]) -> str:
        """A file of tensors, written beside its name and renamed there; its sha256."""
        path = self.path / name
        beside = path.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            digest = write(beside)
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ResourceError(
                f"{path}: cannot be written: {error.strerror or error}.", hint="Is the disk full?"
            ) from None
        return digest

    # ------------------------------------------------------- what is added to it

    def write_interpolation(
        self,
        interpolation: Interpolation,
        *,
        training_rows: tuple[csr_matrix, csr_matrix] | None = None,
        ranker: LinearRanker | None = None,
        validation: Mapping[str, float],
        calibration: Calibration | None = None,
    ) -> None:
        """Keep what is added to the model's scores, the training rows (features, labels) and the ranker if it needs
        them, what it gained, and what makes probabilities of the scores."""
        values = interpolation.as_dict() | {"validation": dict(validation)}
        if calibration is not None:
            values["calibration"] = calibration.as_dict()
        if training_rows is not None:
            values["neighbors_sha256"] = self._write_tensors(_NEIGHBORS, lambda path: save_rows(path, *training_rows))
        if ranker is not None:
            arrays = ranker.as_arrays()
            values["ranker_sha256"] = self._write_tensors(_RANKER, lambda path: write_arrays(path, arrays))
        self.write_json(_INTERPOLATION, values)

    def settings_of_rows(self) -> Interpolation | None:
        """`settings` of the first model of this ensemble that keeps training rows, for all; None where none does."""
        for run in (self, *map(RunDirectory.open, self.finished_members)):
            if run.settings() is not None and "neighbors_sha256" in run.read_json(_INTERPOLATION):
                return run.settings()
        return None

    def interpolation_validation(self) -> dict[str, float] | None:
        """The validation metrics with what `write_interpolation` kept; None where it was not called."""
        if not (self.path / _INTERPOLATION).exists():
            return None
        return dict(self.read_json(_INTERPOLATION).get("validation", {}))

    def calibration(self) -> Calibration | None:
        """What makes probabilities of the scores; None where no instances were held out, or by an older version."""
        if not (self.path / _INTERPOLATION).exists():
            return None
        values = self.read_json(_INTERPOLATION).get("calibration")
        return None if values is None else Calibration.from_dict(values)

    def settings(self) -> Interpolation | None:
        """How that is added which `write_interpolation` kept; None where it was not called.

        Raises
        ------
        DataError : the file is damaged.
        """
        if not (self.path / _INTERPOLATION).exists():
            return None
        try:
            return Interpolation.from_dict(self.read_json(_INTERPOLATION))
        except DataError as error:
            hint = "It was edited, or an earlier version wrote it: train anew."
            raise DataError(f"{self.path / _INTERPOLATION}: {error.message}", hint=hint) from None

    def added(self, *, verify: bool = True, neighbors: NeighborIndex | None = None) -> Added:
        """What `write_interpolation` kept; nothing where it was not called.

        Parameters
        ----------
        verify : whether the hash of the training rows is computed.
        neighbors : of the models of its ensemble before it, whose training rows are its own.

        Raises
        ------
        DataError : a file is missing or damaged.
        """
        settings = self.settings()
        if settings is None:
            return Added()
        values = self.read_json(_INTERPOLATION)
        if neighbors is None or not settings.needs_neighbors:
            read_rows = functools.partial(NeighborIndex.load, idf_power=settings.idf_power)
            neighbors = self._read_added(values, _NEIGHBORS, "neighbors_sha256", read_rows, verify)
        ranker = self._read_added(
            values, _RANKER, "ranker_sha256", lambda path: LinearRanker.from_arrays(load_file(path)), verify
        )
        ensemble = self.path.absolute().parent
        if settings.needs_neighbors and neighbors is None and ensemble.name == _MEMBERS:
            raise DataError(
                f"{self.path}: is of an ensemble, of which one model keeps the training rows for all.",
                hint=f"Use {ensemble.parent}.",
            )
        if (settings.needs_neighbors and neighbors is None) or (settings.needs_ranker and ranker is None):
            raise DataError(f"{self.path / _INTERPOLATION}: names no file of what it needs.", hint="It was edited.")
        return Added(settings=settings, neighbors=neighbors, ranker=ranker, calibration=self.calibration())

    def _read_added(
        self, values: Mapping[str, Any], name: str, hash_name: str, read: Callable[[Path], _Part], verify: bool
    ) -> _Part | None:
        expected = values.get(hash_name)
        if expected is None:
            return None
        path = self.path / name
        if not path.is_file():
            raise DataError(f"{path}: is missing; {_INTERPOLATION} names it.", hint="Was the run copied in part?")
        if verify and sha256_of(path) != expected:
            raise DataError(f"{path}: its sha256 is not the one in {_INTERPOLATION}.", hint="It was damaged or edited.")
        try:
            return read(path)
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path}: is not what `train` wrote: {error}.",
                hint="It was edited, or an earlier version wrote it: train anew.",
            ) from None

    # --------------------------------------------------------- names and words

    def write_names(self, label_names: Sequence[str] | None, vocabulary: Vocabulary | None) -> None:
        """Keep what turns ids into names and texts into features with the model."""
        if label_names is not None:
            self.write_text(_LABELS, "".join(f"{name}\n" for name in label_names))
        if vocabulary is not None:
            vocabulary.save(self.path / _VOCABULARY)

    def label_names(self) -> tuple[str, ...] | None:
        path = self.path / _LABELS
        # Not as text: a carriage return may be part of a name.
        return tuple(path.read_bytes().decode("utf-8").split("\n")[:-1]) if path.exists() else None

    def vocabulary(self) -> Vocabulary | None:
        path = self.path / _VOCABULARY
        if not path.exists():
            return None
        from xmc_midx.data.vocabulary import Vocabulary

        return Vocabulary.load(path)


def _map(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, mapped; tables that are packed, in memory."""
    from safetensors.torch import load_file as map_file  # the NumPy one copies

    try:
        return unpack_tables({name: tensor.numpy() for name, tensor in map_file(path).items()})
    except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
        raise DataError(f"{path}: is not what `train` wrote: {error}.", hint="It was edited.") from None


def _holds_a_run(path: Path) -> UsageError:
    """What to type instead."""
    anew = f"choose another --output, or --force to replace {path}."
    try:
        record = read_json(path / "run.json")
        directory = RunDirectory.open(path)
        data = record["data"]
        finished = "finished" in record and directory.is_complete
    except (DataError, LookupError, TypeError):
        data, finished = "DATA", False
    if finished:
        return UsageError(f"{path}: holds a run already, a finished one.", hint=anew[0].upper() + anew[1:])
    go_on = f"xmc_midx.resume({str(path)!r}, data=(X, Y)), the data in memory as it was"
    if data is not None:
        go_on = shlex.join(["xmc-midx", "train", str(data), "--output", str(path), "--resume"])
    return UsageError(f"{path}: holds a run already, an unfinished one.", hint=f"Go on with: {go_on}; or {anew}")


def timestamp() -> str:
    """Now, as `run.json` says it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def aside_of(run: Path) -> Path:
    """Where a run waits while another replaces it."""
    run = run.absolute()
    return run.with_name(f".{run.name}.replaced")


def _is_run(path: Path) -> bool:
    """`config.yaml` alone is anyone's; ours has the record of the training beside it, which is written before it."""
    return (path / "config.yaml").exists() and (path / "run.json").exists()


def _is_ours(name: str) -> bool:
    return name in _OURS or (name.startswith(".") and name.endswith(".tmp"))


def _refuse_strangers(path: Path) -> None:
    # A start that was killed before config.yaml leaves files of these names; the next start writes them anew.
    ours = {"run.json", _LABELS, _VOCABULARY}
    strangers = sorted(
        entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.name not in ours
    )
    if strangers:
        raise UsageError(f"{path}: is not empty ({strangers[0]}, ...).", hint="Choose a new --output directory.")
