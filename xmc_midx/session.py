"""Layer 5. A training from start or checkpoint to its end: the trainer's epochs, validation, the best one, and what
is saved when.

Before it: run directory and trainer; after it: the pipeline.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xmc_midx.build import build_encoder, build_softmax
from xmc_midx.checkpoint import CheckpointStore
from xmc_midx.data.batches import BatchStream
from xmc_midx.data.dataset import Split
from xmc_midx.data.features import normalize_rows
from xmc_midx.device import find_device, keep_freed_memory
from xmc_midx.index import ExactIndex
from xmc_midx.interpolation import SHORTLIST, fit_interpolation, interpolate
from xmc_midx.metrics import evaluate_topk
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.predictor import Predictor
from xmc_midx.rundir import RunDirectory
from xmc_midx.trainer import Trainer
from xmc_midx.types import DEFAULT_KS, EpochStats, Reporter, TopK

__all__ = ["TrainingSession"]


class TrainingSession:
    """A training in a run directory.

    Parameters
    ----------
    run : the run directory, locked by the caller, with a resolved configuration.
    training : the training split, before the validation instances are held out.
    reporter : receives the progress.
    """

    def __init__(self, run: RunDirectory, training: Split, reporter: Reporter) -> None:
        self.run_directory, self.reporter = run, reporter
        self.config = config = run.config
        device = find_device(config.training.device)
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        if device.type == "cpu":
            keep_freed_memory()
        features = normalize_rows(training.features) if config.data.normalize == "l2" else training.features
        kept, held_out = _hold_out(features.shape[0], config.data.validation_fraction, config.training.seed)
        self.held_out = (features[held_out], training.labels[held_out]) if held_out.size else None
        labels = training.labels
        self._whole = (features, labels)
        if held_out.size:
            features, labels = features[kept], labels[kept]
        num_labels = labels.shape[1]
        self.frequencies = np.bincount(labels.indices, minlength=num_labels)
        """(L,) int64, of the instances that train the model."""
        self._known = {
            "train.label_frequencies": torch.from_numpy(np.bincount(training.labels.indices, minlength=num_labels)),
            "train.num_instances": torch.tensor(training.labels.shape[0]),
        }
        assert isinstance(config.training.batch_size, int)
        stream = BatchStream(features, labels, batch_size=config.training.batch_size, seed=config.training.seed)
        softmax = build_softmax(config, self.frequencies, stream.num_instances, device)
        every = config.sampler.refresh_every
        self.trainer = Trainer(
            build_encoder(config, features.shape[1]).to(device),
            softmax,
            stream,
            config.training,
            refresh_every=every if isinstance(every, int) else None,
        )
        self.store = CheckpointStore(run.checkpoints)
        self.history: list[dict[str, Any]] = []
        self.best_step, self.best_epoch, self.best_score, self.stale = 0, 0, -1.0, 0
        self.validation: dict[str, float] = {}
        """Of the best epoch; at the end, with neighbours and frequencies, which the same instances chose."""
        self.seconds = 0.0
        self.loss = float("nan")

    def run(self) -> None:
        """Train to the end: all epochs, or until the validation score has not risen for `patience` epochs."""
        started = time.perf_counter() - self.seconds
        if self.trainer.step == 0:
            self.reporter.start("initialize", None)
            self.trainer.initialize(self.config.model.label_init, self.config.training.seed)
        if self.history:
            # A kill may have come between the last checkpoint and its line.
            self.run_directory.write_metrics(self.history)
        patience = self.config.training.patience
        while self.trainer.step < self.trainer.total_steps and (patience is None or self.stale < patience):
            self._announce_epoch()
            stats = self.trainer.run_epoch(self.reporter, after_step=lambda: self._save_inside_epoch(started))
            self._end_epoch(stats, started)
        if self.config.neighbors.enabled and self.held_out is not None:
            validation = self.run_directory.interpolation_validation()
            if validation is not None:
                self.validation = validation
            else:
                self._choose_interpolation()
                self.seconds = time.perf_counter() - started

    def _choose_interpolation(self) -> None:
        """Let the held-out instances say how much the neighbours' labels and the label frequencies are worth."""
        assert self.held_out is not None
        self.reporter.start("neighbours", None)
        features, labels = self.held_out
        if self.best_step != self.trainer.step:
            # Into the trainer's own tables: a second model beside them would be the peak of the whole training.
            self.trainer.load_model(self.store.load("best", ["model"]).parts["model"])
        shortlist = self._predictor().predict(features, k=min(SHORTLIST, labels.shape[1]))
        neighbors = NeighborIndex(self.trainer.stream.features, self.trainer.stream.labels)
        found = neighbors.search(features, self.config.neighbors.count)
        num_train = self.trainer.stream.num_instances
        chosen = fit_interpolation(shortlist, neighbors, found, labels, self.frequencies, num_train)
        votes = neighbors.votes(*found, chosen.temperature)
        top = interpolate(shortlist, votes, self.frequencies, chosen, max(DEFAULT_KS))
        self.validation = self._metrics(top)
        self.reporter.message(
            f"neighbours: {'used' if chosen.needs_neighbors else 'not used'}, frequency {chosen.frequency:+.2f}; "
            f"validation P@1 {100 * self.history[self.best_epoch - 1]['validation']['P@1']:.2f}% -> "
            f"{100 * self.validation['P@1']:.2f}%"
        )
        # What is kept knows all training rows, the held-out ones too.
        rows = self._whole if chosen.needs_neighbors else None
        self.run_directory.write_interpolation(chosen, rows, self.validation)

    def _announce_epoch(self) -> None:
        steps = self.trainer.stream.steps_per_epoch
        epoch, done = divmod(self.trainer.step, steps)
        self.reporter.start(f"epoch {epoch + 1}/{self.trainer.num_epochs}", steps)
        if done:
            self.reporter.step(done)

    def _end_epoch(self, stats: EpochStats, started: float) -> None:
        validation = self._validate()
        stats = dataclasses.replace(stats, validation=validation)
        score = _score(validation)
        self.loss = stats.loss
        if score is None or score > self.best_score:
            self.best_step, self.best_epoch, self.stale = stats.num_steps, stats.epoch, 0
            self.validation = validation
            self.best_score = -1.0 if score is None else score
        else:
            self.stale += 1
        self.history.append(_history_line(stats))
        self.seconds = time.perf_counter() - started
        self._save()
        self.seconds = time.perf_counter() - started
        self.run_directory.write_metrics(self.history)
        self.reporter.epoch(stats)

    def _validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        features, _ = self.held_out
        return self._metrics(self._predictor().predict(features, k=max(DEFAULT_KS)))

    def _predictor(self) -> Predictor:
        """The model as it stands; its rows come normalised already."""
        softmax = self.trainer.softmax
        index = ExactIndex(softmax.weight.detach(), softmax.bias.detach())
        return Predictor(self.trainer.encoder, index, normalize="none")

    def _metrics(self, top: TopK) -> dict[str, float]:
        assert self.held_out is not None
        report = evaluate_topk(
            top,
            self.held_out[1],
            ks=DEFAULT_KS,
            label_frequencies=self.frequencies,
            num_train=self.trainer.stream.num_instances,
        )
        return {name: report.metrics[name] for name in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")}

    # ------------------------------------------------------------ checkpoints

    def _save_inside_epoch(self, started: float) -> None:
        every = self.config.training.save_every_steps
        if every is None or self.trainer.step % every or self.trainer.step % self.trainer.stream.steps_per_epoch == 0:
            return
        self.seconds = time.perf_counter() - started
        self._save()

    def _save(self) -> None:
        step = self.trainer.step
        state = {
            "counters": self.trainer.counters(),
            "history": self.history,
            "best": [self.best_step, self.best_epoch, self.best_score, self.stale],
            "seconds": self.seconds,
            "loss": self.loss if self.history else None,
        }
        parts = {
            "model": self.trainer.model_tensors() | self._known,
            "training": self.trainer.training_tensors(),
        }
        self.store.save(step, parts, state)
        if self.best_step == step:
            self.store.point("best", step)
        self.store.point("latest", step)
        self.store.prune({step, self.best_step})

    def load(self) -> None:
        """Take up the latest checkpoint."""
        saved = self.store.load("latest", ["model", "training"])
        self.trainer.load(saved.parts["model"], saved.parts["training"], saved.state["counters"])
        self.history = list(saved.state["history"])
        self.best_step, self.best_epoch, self.best_score, self.stale = saved.state["best"]
        self.validation = dict(self.history[self.best_epoch - 1]["validation"]) if self.best_epoch else {}
        self.seconds = float(saved.state["seconds"])
        self.loss = float(saved.state["loss"]) if self.history else float("nan")


def _hold_out(num_instances: int, fraction: float | str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rising row numbers to train on, and to validate on; the latter is empty where a fraction is less than a row."""
    assert not isinstance(fraction, str), "the configuration is resolved"
    order = np.random.default_rng((seed, 0)).permutation(num_instances)
    count = int(num_instances * fraction)
    return np.sort(order[count:]), np.sort(order[:count])


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
