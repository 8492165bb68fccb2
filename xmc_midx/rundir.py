"""Layer 5. A run directory: what lies where, who may write, how a finished one is recognised.

config.yaml          the resolved configuration          run.json       versions, seed, data, hardware, command
checkpoints/<step>/  see `xmc_midx.checkpoint`           metrics.jsonl  one line an epoch
best, latest         each names a checkpoint             labels.txt, vocabulary.txt   where they are known
interpolation.json   what is added to the model, and     neighbors.safetensors        the training rows, if they are
                     what makes probabilities of it
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from xmc_midx.calibration import Calibration
from xmc_midx.config import Config, dump_config, load_config
from xmc_midx.crash import crash_point
from xmc_midx.data.files import atomic_write, read_json, sha256_of
from xmc_midx.errors import DataError, ResourceError, UsageError
from xmc_midx.interpolation import Interpolation
from xmc_midx.neighbors import NeighborIndex, save_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from xmc_midx.data.vocabulary import Vocabulary

__all__ = ["RunDirectory"]

_INTERPOLATION = "interpolation.json"
_NEIGHBORS = "neighbors.safetensors"


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

    @classmethod
    def open(cls, run: str | Path) -> RunDirectory:
        """An existing run directory.

        Raises
        ------
        DataError : there is no such directory, or it is not one that `train` wrote.
        """
        path = Path(run)
        if not path.is_dir():
            raise DataError(
                f"{path}: there is no such run directory.",
                hint="Train one: xmc-midx train DATA --output RUN.",
            )
        if not (path / "config.yaml").is_file():
            raise DataError(f"{path}: is no run directory: it has no config.yaml.", hint="Is this a dataset?")
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
        path = Path(run)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be made: {error.strerror}.") from None
        if not (path / "config.yaml").exists():
            # Before the lock file is made: a directory that is not ours stays as it is.
            _refuse_strangers(path)
        with cls.lock(path):
            if (path / "config.yaml").exists():
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
        """`metrics.jsonl`, whole: a line an epoch."""
        self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def read_metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object that `write_json` wrote; a DataError where it is missing or damaged."""
        value = read_json(self.path / name)
        if not isinstance(value, dict):
            raise DataError(f"{self.path / name}: expected a JSON object.")
        return value

    def finish(self) -> None:
        """Note in `run.json` that the training has come to its end; a second note changes nothing."""
        record = self.read_json("run.json")
        if "finished" not in record:
            self.write_json("run.json", record | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    # -------------------------------------------------------------- neighbours

    def write_interpolation(
        self,
        interpolation: Interpolation,
        training_rows: tuple[csr_matrix, csr_matrix] | None,
        validation: Mapping[str, float],
        calibration: Calibration | None = None,
    ) -> None:
        """Keep what is added to the model's scores, the training rows (features, labels) if it needs them, what it
        gained, and what makes probabilities of the scores."""
        values = interpolation.as_dict() | {"validation": dict(validation)}
        if calibration is not None:
            values["calibration"] = calibration.as_dict()
        if training_rows is not None:
            path = self.path / _NEIGHBORS
            beside = path.with_name(f".{_NEIGHBORS}.{os.getpid()}.tmp")
            try:
                save_rows(beside, *training_rows)
                values["neighbors_sha256"] = sha256_of(beside)
                beside.replace(path)
            except (OSError, SafetensorError) as error:
                beside.unlink(missing_ok=True)
                reason = getattr(error, "strerror", None) or error
                raise ResourceError(f"{path}: cannot be written: {reason}.", hint="Is the disk full?") from None
        self.write_json(_INTERPOLATION, values)

    @property
    def neighbors_bytes(self) -> int:
        """Bytes of the training rows that are kept for neighbours; 0 where none are."""
        path = self.path / _NEIGHBORS
        return path.stat().st_size if path.exists() else 0

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

    def interpolation(self, *, verify: bool = True) -> tuple[Interpolation | None, NeighborIndex | None]:
        """What `write_interpolation` kept; None where it was not called, or had no neighbours.

        Parameters
        ----------
        verify : whether the hash of the training rows is computed.

        Raises
        ------
        DataError : a file is missing or damaged.
        """
        if not (self.path / _INTERPOLATION).exists():
            return None, None
        values = self.read_json(_INTERPOLATION)
        expected = values.get("neighbors_sha256")
        if expected is None:
            return Interpolation.from_dict(values), None
        path = self.path / _NEIGHBORS
        if not path.is_file():
            raise DataError(f"{path}: is missing; interpolation.json names it.", hint="Was the run copied in part?")
        if verify and sha256_of(path) != expected:
            raise DataError(
                f"{path}: its sha256 is not the one in interpolation.json.", hint="It was damaged or edited."
            )
        try:
            return Interpolation.from_dict(values), NeighborIndex.load(path)
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: holds no training rows: {error}.", hint="It was edited.") from None

    # --------------------------------------------------------- names and words

    def write_names(self, label_names: Sequence[str] | None, vocabulary: Vocabulary | None) -> None:
        """Keep what turns ids into names and texts into features with the model."""
        if label_names is not None:
            self.write_text("labels.txt", "".join(f"{name}\n" for name in label_names))
        if vocabulary is not None:
            vocabulary.save(self.path / "vocabulary.txt")

    def label_names(self) -> tuple[str, ...] | None:
        path = self.path / "labels.txt"
        return tuple(path.read_text(encoding="utf-8").split("\n")[:-1]) if path.exists() else None

    def vocabulary(self) -> Vocabulary | None:
        path = self.path / "vocabulary.txt"
        if not path.exists():
            return None
        from xmc_midx.data.vocabulary import Vocabulary

        return Vocabulary.load(path)


def _holds_a_run(path: Path) -> UsageError:
    """What to type instead."""
    anew = f"choose another --output, or --force to replace {path}."
    try:
        record = read_json(path / "run.json")
        data, finished = str(record["data"]), "finished" in record
    except (DataError, LookupError, TypeError):
        data, finished = "DATA", False
    if finished:
        return UsageError(f"{path}: holds a run already, a finished one.", hint=anew[0].upper() + anew[1:])
    go_on = shlex.join(["xmc-midx", "train", data, "--output", str(path), "--resume"])
    return UsageError(f"{path}: holds a run already, an unfinished one.", hint=f"Go on with: {go_on}; or {anew}")


def _refuse_strangers(path: Path) -> None:
    # A start that was killed before config.yaml leaves files of these names; the next start writes them anew.
    ours = {"run.json", "labels.txt", "vocabulary.txt"}
    strangers = sorted(
        entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.name not in ours
    )
    if strangers:
        raise UsageError(f"{path}: is not empty ({strangers[0]}, ...).", hint="Choose a new --output directory.")
