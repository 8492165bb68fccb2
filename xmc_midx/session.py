"""Layer 5. A training from start or checkpoint to its end: the trainer's epochs, validation, the best one, and what
is saved when.

Before it: run directory and trainer; after it: the pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xmc_midx.build import build_encoder, build_softmax
from xmc_midx.checkpoint import CheckpointStore, refuse_misfits
from xmc_midx.crash import crash_point
from xmc_midx.data.batches import BatchStream
from xmc_midx.data.cache import page_out
from xmc_midx.data.dataset import Split
from xmc_midx.data.features import FeatureScaling, column_counts
from xmc_midx.data.known_labels import KnownLabels
from xmc_midx.device import find_device, keep_freed_memory, release_freed_memory
from xmc_midx.errors import DataError, DivergedError
from xmc_midx.finish import Finish
from xmc_midx.rundir import RunDirectory
from xmc_midx.signals import PendingSignal, deferred_signals
from xmc_midx.trainer import Trainer
from xmc_midx.types import DEFAULT_KS, DEFAULT_PROPENSITY, EpochStats, Reporter
from xmc_midx.validation import Validator, hold_out

__all__ = ["TrainingSession"]

_SMALL_MODEL = 64 << 20
"""Bytes of a model whose checkpoint memory may hold in place of the disk."""
_SAVE_SHARE = 0.005
"""Of the time, that training may stand still for saves of a small model."""


class TrainingSession:
    """A training in a run directory.

    Parameters
    ----------
    run : the run directory, locked by the caller, with a resolved configuration.
    training : the training split, before the validation instances are held out.
    reporter : receives the progress.
    deadline : of `time.monotonic()`, after which the training is saved and stops; None: no limit.
    propensity : A and B of the propensity model, for PSP@k of the held-out instances and what is chosen by it.
    first : of a further model of an ensemble, the run directory of the first one, which finds labels and neighbours
        for all: finished before this one is concluded.
    """

    def __init__(
        self,
        run: RunDirectory,
        training: Split,
        reporter: Reporter,
        *,
        deadline: float | None = None,
        propensity: tuple[float, float] = DEFAULT_PROPENSITY,
        first: RunDirectory | None = None,
    ) -> None:
        self.run_directory, self.reporter, self.deadline, self.first = run, reporter, deadline, first
        self.halted = threading.Event()
        """Once it is set, the training is saved and stops, as at the deadline."""
        self.starting = threading.Lock()
        """Held while the tables get their start values: of models at once, one at a time takes the memory for it."""
        self.num_at_once = 1
        """Trainings whose epochs share the machine: each counts its part of the time, whoever ends first."""
        self.config = config = run.config
        self.propensity = propensity
        device = find_device(config.training.device)
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        if device.type == "cpu":
            keep_freed_memory()
        self._scaling = FeatureScaling.fit(config.data, training.features)
        self._known_labels = KnownLabels.fit(config.data, training.labels)
        features, labels = self._scaling(training.features), self._known_labels(training.labels)
        assert isinstance(config.data.validation_fraction, float), "the configuration is resolved"
        kept, held_out = hold_out(features, labels, config.data.validation_fraction, config.training.seed)
        self.num_held_out = int(held_out.size)
        asked = (features[held_out], labels[held_out]) if held_out.size else None
        whole = column_counts(labels).astype(np.int32)  # four bytes a label count at 10^7 of them
        self._training = training
        if held_out.size:
            features, labels = features[kept], labels[kept]
        self.frequencies = column_counts(labels).astype(np.int32)
        """(R,) int32, of the instances that train the model, of the labels that have a row."""
        self._known = {
            "train.label_frequencies": torch.from_numpy(whole),
            "train.num_instances": torch.tensor(training.num_instances),
        }
        arrays = self._scaling.arrays() | self._known_labels.arrays()
        self._known |= {name: torch.from_numpy(array) for name, array in arrays.items()}
        assert isinstance(config.training.batch_size, int)
        stream = BatchStream(
            features, labels, batch_size=config.training.batch_size, seed=config.training.seed, row_numbers=kept
        )
        softmax = build_softmax(config, self.frequencies, stream.num_instances, device)
        every = config.sampler.refresh_every
        self.trainer = Trainer(
            build_encoder(config, features.shape[1]).to(device),
            softmax,
            stream,
            config.training,
            refresh_every=every if isinstance(every, int) else None,
        )
        self._signals = PendingSignal()
        self.validator = Validator(
            self.trainer,
            asked,
            label_frequencies=self.frequencies,
            propensity=propensity,
            reporter=reporter,
        )
        self.store = CheckpointStore(run.checkpoints)
        self.store.clean()
        del features, labels
        release_freed_memory()
        if held_out.size:
            # What trains is a copy; the whole is read again at the end.
            page_out((training.features, training.labels))
        self.history: list[dict[str, Any]] = []
        self.best_step, self.best_epoch, self.best_score, self.stale = 0, 0, -1.0, 0
        self.validation: dict[str, float] = {}
        """Of the best epoch; at the end, with neighbours and frequencies, which the same instances chose."""
        self.seconds = 0.0
        """Of training so far, without the time in which it waited."""
        self._clock = 0.0
        """When it would have begun, had it not waited; of `time.perf_counter()`."""
        self.loss = float("nan")
        self.finished = False
        """Whether it came to the end, rather than to the deadline."""
        self._is_aside = False
        """Whether the tables are given back."""
        self._pending: EpochStats | None = None
        """An epoch whose steps are done and whose validation is not."""
        self._saves: list[list[int]] = []
        """The checkpoints that are kept, oldest first: step, and the best step known then (0: none)."""
        self._saved: tuple[int, bool] | None = None
        """Step of the last save, and whether an epoch was pending; None before the first."""
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        """That training stood still for the last save."""
        self._postponed: _Postponed | None = None

    @property
    def epochs_are_done(self) -> bool:
        """Whether `run_epochs` has nothing left to do."""
        patience = self.config.training.patience
        is_over = self.trainer.step >= self.trainer.total_steps or (patience is not None and self.stale >= patience)
        return self._pending is None and is_over

    def run_epochs(self) -> bool:
        """Train all epochs, or until the validation score has not risen for `patience` of them.

        SIGINT and SIGTERM wait for the end of the running step or validation chunk; then all is saved, and
        KeyboardInterrupt or its child `Terminated` is raised. The deadline is obeyed after a step or an epoch. In
        another thread than the main one, which alone receives signals, `halted` is what stops it.

        Returns
        -------
        bool : whether all are done; False where the deadline was first, or `halted` is set.

        Raises
        ------
        DivergedError : a loss, a gradient or a weight is not finite; the checkpoints that are there stay.
        ResourceError : a checkpoint cannot be written.
        """
        self._clock = time.perf_counter() - self.seconds * self.num_at_once
        if self.trainer.step == 0:
            self.reporter.start("initialize", None)
            with self.starting:
                self.trainer.initialize(self.config.model.label_init, self.config.training.seed)
                release_freed_memory()
        # A kill may have left other lines than the checkpoint's.
        self.run_directory.write_metrics(self.history)
        with deferred_signals() as self._signals:
            self.validator.check = functools.partial(_check, self._signals, self.halted)
            try:
                try:
                    self._run_epochs()
                except (KeyboardInterrupt, _Halted) as stop:
                    if isinstance(stop, KeyboardInterrupt):
                        self.halted.set()  # others save while this does
                    self._look_at_clock()
                    self._save()
                    if isinstance(stop, _Halted):
                        return False
                    stop.add_note(f"Saved at step {self.trainer.step} of {self.trainer.total_steps}.")
                    raise
            except DivergedError as error:
                self._write_postponed()
                kept = self.store.step_of("latest")
                if kept is not None:
                    error.hint = f"{error.hint} The checkpoint of step {kept} is finite and stays."
                raise
            finally:
                self.store.settle()
        self._look_at_clock()
        return True

    def put_aside(self) -> None:
        """After `run_epochs`, where others are concluded first: give back what the checkpoints hold. `conclude` reads
        the best model from them; nothing can be trained or saved any more."""
        self._is_aside = True
        self.trainer.release_tables()
        release_freed_memory()

    def conclude(self) -> None:
        """Make a finished run of what `run_epochs` trained."""
        self.num_at_once = 1
        self._clock = time.perf_counter() - self.seconds
        self._keep_best()
        self.run_directory.write_metrics(self.history)
        self.finished = True
        self.seconds = self.run_directory.finish(self.seconds)

    def release(self) -> None:
        """Give tables and training rows back: what follows a finished training reads the run directory."""
        for name in ("trainer", "validator", "_training"):
            self.__dict__.pop(name, None)
        release_freed_memory()

    def _run_epochs(self) -> None:
        while not self.epochs_are_done:
            if self._pending is None:
                self._announce_epoch()
                self._pending = self.trainer.run_epoch(self.reporter, after_step=self._after_step)
            self._end_epoch(self._pending)
            self._stop_if_asked()

    def _keep_best(self) -> None:
        """Keep the best model, and choose what is added to it, unless a resumed run has both already."""
        run = self.run_directory
        # No step follows; recorded ones hold the memory of a step, and the trainer that holds them.
        self.trainer.graphs = None
        added = self.validator.held_out is not None
        if not added:
            self.reporter.message(
                "no instances are held out: nothing can choose the best epoch, what neighbours and linear ranker are "
                "worth, or what is a probability; the last epoch's model alone is kept"
            )
        chosen = run.interpolation_validation() if added else None
        if chosen is not None:
            self.validation = chosen
        if run.has_model:
            return
        if self._is_aside:
            self.trainer.take_model(self.store.load("best", ["model"]).parts["model"])
        elif self.best_step not in (0, self.trainer.step):
            # Into the trainer's own tables: a second model beside them would be the peak of the whole training.
            self.trainer.load_model(self.store.load("best", ["model"]).parts["model"])
        crash_point("model.begun")
        finish = Finish(
            run,
            self.trainer,
            self.validator,
            training=self._training,
            scaling=self._scaling,
            known_labels=self._known_labels,
            reporter=self.reporter,
            first=self.first,
        )
        finish.keep_model(self._known)
        if added and chosen is None:
            crash_point("neighbours.begun")
            self.validation = finish.choose_added(self.history[self.best_epoch - 1]["validation"])
        crash_point("model.unsealed")
        run.seal_model()
        self._look_at_clock()

    def _announce_epoch(self) -> None:
        steps = self.trainer.stream.steps_per_epoch
        epoch, done = divmod(self.trainer.step, steps)
        self.reporter.start(f"epoch {epoch + 1}/{self.trainer.num_epochs}", steps)
        if done:
            self.reporter.step(done)

    def _end_epoch(self, stats: EpochStats) -> None:
        is_saved = self._epoch_is_saved()
        if is_saved:
            self._begin_save()
        crash_point("validation.begun")
        release_freed_memory()
        validation = self.validator.validate()
        release_freed_memory()
        crash_point("validation.done")
        stats = dataclasses.replace(stats, validation=validation)
        score = _score(validation)
        self.loss = stats.loss
        better = score is None or score > self.best_score
        self.stale = 0 if better else self.stale + 1
        # Of equals the later one: it has learned more, even if the held-out instances cannot tell.
        if better or score == self.best_score:
            self.best_step, self.best_epoch = stats.num_steps, stats.epoch
            self.validation = validation
            self.best_score = -1.0 if score is None else score
        self.history.append(_history_line(stats))
        self._pending = None
        self._look_at_clock()
        if is_saved:
            self._save()
        elif self.best_step == self.trainer.step:
            self._postpone()
        self._look_at_clock()
        self.run_directory.append_metrics(self.history[-1])
        self.reporter.epoch(stats)

    # ------------------------------------------------------------ checkpoints

    def _after_step(self) -> None:
        """Between two steps: save if it is time, and stop if asked to."""
        if self.trainer.step % self.trainer.stream.steps_per_epoch == 0:
            return  # the end of the epoch saves and stops
        if self._save_is_due():
            self._look_at_clock()
            self._save()
        self._stop_if_asked()

    def _save_is_due(self) -> bool:
        steps, minutes = self.config.training.save_every_steps, self.config.training.save_every_minutes
        by_steps = steps is not None and self.trainer.step % steps == 0
        return by_steps or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def _stop_if_asked(self) -> None:
        _check(self._signals, self.halted)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise _Halted

    def _look_at_clock(self) -> None:
        self.seconds = (time.perf_counter() - self._clock) / self.num_at_once

    def _epoch_is_saved(self) -> bool:
        """Whether the end of this epoch is on the disk before the next: unless the model is small and the last save so
        recent that saves would take more than their share of the time."""
        patience = self.config.training.patience
        is_last = self.trainer.step == self.trainer.total_steps or (patience is not None and self.stale + 1 >= patience)
        if is_last or self.config.training.save_every_steps is not None:
            return True
        if sum(tensor.nbytes for tensor in self.trainer.model_tensors().values()) > _SMALL_MODEL:
            return True
        return time.monotonic() - self._saved_at >= self._save_seconds / _SAVE_SHARE

    def _parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint; a DivergedError where the model is not finite."""
        self.trainer.settle()
        model = self.trainer.model_tensors()
        _require_finite(model, self.trainer.step)
        return {"model": model | self._known, "training": self.trainer.training_tensors()}

    def _state(self, saves: list[list[int]]) -> dict[str, Any]:
        """The plain part of a checkpoint."""
        return {
            "counters": self.trainer.counters(),
            "history": [*self.history],
            "best": [self.best_step, self.best_epoch, self.best_score, self.stale],
            "seconds": self.seconds,
            "loss": self.loss if self.history else None,
            "pending": None if self._pending is None else dataclasses.asdict(self._pending),
            "saves": saves,
        }

    def _postpone(self) -> None:
        """Hold the best epoch in memory: a later one that is saved takes it along, a better one takes its place."""
        copies = {name: {key: tensor.clone() for key, tensor in part.items()} for name, part in self._parts().items()}
        state = self._state(self._saves_with(self.trainer.step))
        self._postponed = _Postponed(step=self.trainer.step, parts=copies, state=state)

    def _write_postponed(self) -> None:
        held, self._postponed = self._postponed, None
        if held is not None:
            self.store.save(held.step, held.parts, held.state, ["best", "latest"])
            self._saves = held.state["saves"]

    def _saves_with(self, step: int) -> list[list[int]]:
        """The checkpoints that are kept once that of a step is there."""
        saves = [save for save in self._saves if save[0] != step] + [[step, self.best_step]]
        return saves[-self.config.training.keep_checkpoints :]

    def _begin_save(self) -> None:
        """Let the tensors be written while nothing changes them."""
        if self.store.begun is not None:
            return
        started = time.perf_counter()
        if self._postponed is not None and self._postponed.step == self.trainer.step:
            self._postponed = None  # it is what is saved now
        self._write_postponed()
        self.store.begin(self.trainer.step, self._parts())
        self._save_seconds = time.perf_counter() - started

    def _save(self) -> None:
        """Save what there is, unless it was saved just now."""
        step, moment = self.trainer.step, (self.trainer.step, self._pending is not None)
        if moment == self._saved:
            return
        self._begin_save()
        started = time.perf_counter()
        saves = self._saves_with(step)
        self.store.finish(self._state(saves), ["best", "latest"] if self.best_step == step else ["latest"])
        self._saves = saves
        self.store.prune([kept for save in saves for kept in save], wait=False)
        self._saved, self._saved_at = moment, time.monotonic()
        self._save_seconds += time.perf_counter() - started

    def load(self, *, verify: bool = True) -> None:
        """Take up the latest checkpoint, or the one before it where the latest is damaged; nothing where none is.

        Raises
        ------
        DataError : all checkpoints are damaged, or they are not of this run.
        """
        if self.run_directory.has_model and not self.store.steps():
            self._load_records()
            return
        saved, faults = self.store.load_newest(["model", "training"], verify=verify)
        if saved is None:
            return
        with refuse_misfits(saved.path):
            state = saved.state
            self.trainer.load(saved.parts["model"], saved.parts["training"], state["counters"])
            self.history = list(state["history"])
            self.best_step, self.best_epoch, self.best_score, self.stale = state["best"]
            self.validation = dict(self.history[self.best_epoch - 1]["validation"]) if self.best_epoch else {}
            self.seconds = float(state["seconds"])
            self.loss = float(state["loss"]) if self.history else float("nan")
            self._pending = EpochStats(**state["pending"]) if state.get("pending") else None
            self._saves = [list(save) for save in state.get("saves", [[self.trainer.step, self.best_step]])]
        for fault in faults:
            self.reporter.message(f"warning: {fault}")
        if faults:
            self.reporter.message(f"warning: going back to the checkpoint of step {self.trainer.step}")
        if self.best_step not in (0, self.trainer.step) and not self.run_directory.has_model:
            try:
                self.store.verify(self.best_step, hashes=verify)
            except DataError as error:
                self._forget_best(error)
        if self.run_directory.has_model:
            # The checkpoints were saved before the end.
            self.seconds = self.run_directory.provenance().seconds or self.seconds
        self._saved = (self.trainer.step, self._pending is not None)
        self._point_back()

    def _load_records(self) -> None:
        """Of a finished training whose checkpoints were removed, what it wrote down: nothing is left to train."""
        self.trainer.step = self.trainer.total_steps
        self.seconds = self.run_directory.provenance().seconds or 0.0
        with refuse_misfits(self.run_directory.path / "metrics.jsonl"):
            self.history = self.run_directory.read_metrics()
            for line in self.history:
                score, self.loss = _score(line["validation"]), float(line["loss"])
                if score is None or score >= self.best_score:
                    self.best_step, self.best_epoch = int(line["step"]), int(line["epoch"])
                    self.best_score, self.validation = -1.0 if score is None else score, dict(line["validation"])

    def _forget_best(self, error: DataError) -> None:
        """The best checkpoint is damaged: the model goes on without it."""
        self.reporter.message(f"warning: {error.message}")
        self.reporter.message(f"warning: going on without the best checkpoint, of epoch {self.best_epoch}")
        self.best_step, self.best_epoch, self.best_score, self.stale, self.validation = 0, 0, -1.0, 0, {}
        if self.history and self.history[-1]["step"] == self.trainer.step:
            self.best_step, self.best_epoch = self.trainer.step, len(self.history)
            self.validation = dict(self.history[-1]["validation"])
            self.best_score = _score(self.validation) or -1.0

    def _point_back(self) -> None:
        """Let the pointers name what this checkpoint knows; they may be ahead of it after a kill or a damage."""
        if self._pointed("latest") != self.trainer.step:
            self.store.point("latest", self.trainer.step)
        if self.best_step == 0:
            self.store.unpoint("best")
        elif self._pointed("best") != self.best_step:
            self.store.point("best", self.best_step)

    def _pointed(self, name: str) -> int | None:
        try:
            return self.store.step_of(name)
        except DataError:
            return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Postponed:
    """A checkpoint in memory: that of the best epoch, where it is not on the disk yet."""

    step: int
    parts: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


class _Halted(Exception):  # noqa: N818  # nothing is wrong
    """The time limit is over, or another stops; what there is has to be saved."""


def _check(signals: PendingSignal, halted: threading.Event) -> None:
    signals.check()
    if halted.is_set():
        raise _Halted


def _require_finite(model: Mapping[str, torch.Tensor], step: int) -> None:
    """A model that is not finite is not saved: every checkpoint can be gone on with."""
    for name, tensor in model.items():
        # The sum first: one pass and no temporary; it may overflow where the terms do not.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise DivergedError(
                f"The model is not finite after step {step}: {name}.",
                hint="Lower training.encoder_learning_rate and training.label_learning_rate.",
            )


def _score(validation: Mapping[str, float]) -> float | None:
    """What the best epoch is best in: the mean of P@1, P@3 and P@5, less noisy than any of them."""
    return float(np.mean([validation[f"P@{k}"] for k in DEFAULT_KS])) if validation else None


def _history_line(stats: EpochStats) -> dict[str, Any]:
    return {
        "epoch": stats.epoch,
        "step": stats.num_steps,
        "loss": stats.loss,
        "learning_rate": stats.learning_rate,
        "instances_per_second": stats.instances_per_second,
        "seconds": stats.seconds,
        "validation": dict(stats.validation),
        "sampler": dict(stats.sampler),
    }
