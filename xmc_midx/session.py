"""Layer 5. A training from start or checkpoint to its end: the trainer's epochs, validation, the best one, and what
is saved when.

Before it: run directory and trainer; after it: the pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.build import build_encoder, build_softmax
from xmc_midx.calibration import BACKGROUND, fit_calibration
from xmc_midx.cells import fit_cells
from xmc_midx.checkpoint import CheckpointStore, refuse_misfits
from xmc_midx.crash import crash_point
from xmc_midx.data.batches import BatchStream
from xmc_midx.data.cache import page_out
from xmc_midx.data.dataset import Split
from xmc_midx.data.features import AS_GIVEN, IDF, FeatureScaling, row_hashes
from xmc_midx.device import find_device, keep_freed_memory, release_freed_memory
from xmc_midx.encoder import SparseEncoder, stored_encoder
from xmc_midx.errors import DataError, DivergedError
from xmc_midx.index import CellIndex, Effort, Reach, StoredIndex, build_index, tune_effort
from xmc_midx.interpolation import SHORTLIST, Interpolation, interpolate
from xmc_midx.metrics import evaluate_topk
from xmc_midx.neighbors import NeighborIndex, choose_idf_power, is_compiled, tune_budget
from xmc_midx.predictor import Predictor
from xmc_midx.quantization import StoredTable, quantize
from xmc_midx.ranker import LinearRanker
from xmc_midx.recipe import CELLS_FROM
from xmc_midx.rundir import RunDirectory
from xmc_midx.signals import PendingSignal, deferred_signals
from xmc_midx.stacking import fit_interpolation
from xmc_midx.topk import concatenate_topk
from xmc_midx.trainer import Trainer
from xmc_midx.types import DEFAULT_KS, DEFAULT_PROPENSITY, EpochStats, Reporter, TopK

__all__ = ["TrainingSession"]

_CHUNK, _CHUNK_SCORES = (512, 4096), 1 << 27
"""Instances between two looks at the signals, at the least and most, and scores of labels: a few seconds."""
_COPIED = 512 << 20
"""Bytes of a label table on a GPU up to which validation may copy it."""
_SMALL_MODEL = 64 << 20
"""Bytes of a model whose checkpoint memory may hold in place of the disk."""
_SAVE_SHARE = 0.005
"""Of the time, that training may stand still for saves of a small model."""

_MOST_COPIES = 10
"""An instance that alone would be more than this part of the held-out ones is not held out."""

_TABLES = ("encoder.embedding", "labels.weight")
"""The large ones."""
_MEAN_QUERIES = 4096
"""Training instances whose mean query it is."""
_CELL_QUERIES = 20_000, 2_000
"""Training instances that the label cells are fitted to, and held-out ones that their effort is tuned on."""


class TrainingSession:
    """A training in a run directory.

    Parameters
    ----------
    run : the run directory, locked by the caller, with a resolved configuration.
    training : the training split, before the validation instances are held out.
    reporter : receives the progress.
    deadline : of `time.monotonic()`, after which the training is saved and stops; None: no limit.
    propensity : A and B of the propensity model, for PSP@k of the held-out instances and what is chosen by it.
    first : of a further model of an ensemble, the run directory of the finished first one, which finds labels and
        neighbours for all.
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
        self.config = config = run.config
        self.propensity = propensity
        device = find_device(config.training.device)
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        if device.type == "cpu":
            keep_freed_memory()
        self._scaling = FeatureScaling.fit(config.data, training.features)
        features = self._scaling(training.features)
        assert isinstance(config.data.validation_fraction, float), "the configuration is resolved"
        kept, held_out = _hold_out(features, training.labels, config.data.validation_fraction, config.training.seed)
        self.held_out = (features[held_out], training.labels[held_out]) if held_out.size else None
        labels = training.labels
        self._training = training
        if held_out.size:
            features, labels = features[kept], labels[kept]
        self.frequencies = _label_counts(labels)
        """(L,) int32, of the instances that train the model."""
        whole = self.frequencies if not held_out.size else _label_counts(training.labels)
        self._known = {
            "train.label_frequencies": torch.from_numpy(whole),
            "train.num_instances": torch.tensor(training.labels.shape[0]),
        }
        if self._scaling.idf is not None:
            self._known[IDF] = torch.from_numpy(self._scaling.idf)
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
        self.loss = float("nan")
        self.finished = False
        """Whether `run` came to the end, rather than to the deadline."""
        self._stored: tuple[SparseEncoder, StoredIndex] | None = None
        """The finished model as it is stored, on the CPU: the tables that it was trained in are given back."""
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
        self._signals = PendingSignal()

    def run(self) -> None:
        """Train to the end: all epochs, or until the validation score has not risen for `patience` epochs.

        SIGINT and SIGTERM wait for the end of the running step or validation chunk; then all is saved, and
        KeyboardInterrupt or its child `Terminated` is raised. The deadline is obeyed after a step or an epoch.

        Raises
        ------
        DivergedError : a loss, a gradient or a weight is not finite; the checkpoints that are there stay.
        ResourceError : a checkpoint cannot be written.
        """
        started = time.perf_counter() - self.seconds
        if self.trainer.step == 0:
            self.reporter.start("initialize", None)
            self.trainer.initialize(self.config.model.label_init, self.config.training.seed)
            release_freed_memory()
        # A kill may have left other lines than the checkpoint's.
        self.run_directory.write_metrics(self.history)
        with deferred_signals() as self._signals:
            try:
                try:
                    self._run_epochs(started)
                except (KeyboardInterrupt, _DeadlinePassed) as stop:
                    self.seconds = time.perf_counter() - started
                    self._save()
                    if isinstance(stop, _DeadlinePassed):
                        return
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
        self._conclude(started)
        self.run_directory.write_metrics(self.history)
        self.finished = True
        self.run_directory.finish(self.seconds)

    def release(self) -> None:
        """Give tables and training rows back: what follows a finished training reads the run directory."""
        for name in ("trainer", "_training", "held_out", "_stored"):
            self.__dict__.pop(name, None)
        release_freed_memory()

    def _run_epochs(self, started: float) -> None:
        patience = self.config.training.patience
        while self._pending is not None or (
            self.trainer.step < self.trainer.total_steps and (patience is None or self.stale < patience)
        ):
            if self._pending is None:
                self._announce_epoch()
                self._pending = self.trainer.run_epoch(self.reporter, after_step=lambda: self._after_step(started))
            self._end_epoch(self._pending, started)
            self._stop_if_asked()

    def _conclude(self, started: float) -> None:
        """Keep the best model, and choose what is added to it, unless a resumed run has both already."""
        run = self.run_directory
        # No step follows; recorded ones hold the memory of a step, and the trainer that holds them.
        self.trainer.graphs = None
        added = self.held_out is not None
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
        if self.best_step not in (0, self.trainer.step):
            # Into the trainer's own tables: a second model beside them would be the peak of the whole training.
            self.trainer.load_model(self.store.load("best", ["model"]).parts["model"])
        crash_point("model.begun")
        stored = self._quantized()
        run.write_model(stored)
        self._keep(stored)
        del stored
        release_freed_memory()
        if added and chosen is None:
            crash_point("neighbours.begun")
            self._choose_interpolation()
        crash_point("model.unsealed")
        run.seal_model()
        self.seconds = time.perf_counter() - started

    def _model_arrays(self) -> dict[str, np.ndarray]:
        tensors = self.trainer.model_tensors() | self._known
        return {name: _float32(tensor).cpu().numpy() for name, tensor in tensors.items()}

    def _quantized(self) -> dict[str, np.ndarray]:
        """The model as it is stored, each label's mean logit what it was: without that, most of what is rounded away
        would be products with the mean query."""
        model = self.config.model
        arrays = self._model_arrays()
        stored = quantize(arrays, model.storage, large=_TABLES)
        if model.label_bias and "labels.weight" not in stored:
            features = self.trainer.stream.features
            order = np.random.default_rng((self.config.training.seed, 5)).permutation(features.shape[0])
            some = features[np.sort(order[:_MEAN_QUERIES])]
            before_D, after_D = (
                _queries(encoder, some).mean(dim=0).numpy()
                for encoder in (self.trainer.encoder, stored_encoder(stored, model))
            )
            table = StoredTable.take(stored, "labels.weight")
            bias_L = arrays["labels.bias"] + table.mean_error(arrays["labels.weight"], before_D, after_D)
            stored["labels.bias"] = bias_L.astype(np.float32)
        return stored

    def _keep(self, stored: Mapping[str, np.ndarray]) -> None:
        """Let the stored model answer from now on: what is fitted to its answers is fitted to what will predict."""
        if self.trainer.device.type != "cpu":
            self.trainer.load_stored(stored)
        else:
            # Another copy of the model beside what follows would be the peak of the whole training.
            self.trainer.release_tables()
            release_freed_memory()
            index = StoredIndex(StoredTable.take(stored, "labels.weight"), stored["labels.bias"])
            self._stored = stored_encoder(stored, self.config.model), index
        if stored["labels.bias"].shape[0] >= CELLS_FROM:
            self._build_cells(StoredTable.take(stored, "labels.weight"), stored["labels.bias"])

    def _build_cells(self, table: StoredTable, bias: NDArray[np.float32]) -> None:
        """Keep where a search for labels begins; of a further model for this training alone, by the first's effort."""
        known = None if self.first is None else self.first.map_cells()
        if self.first is not None and known is None:
            return
        effort = None if known is None else Effort.from_arrays(known)
        self.reporter.start("label cells", None)
        features = self.trainer.stream.features
        order = np.random.default_rng((self.config.training.seed, 2)).permutation(features.shape[0])
        fitted, tuned = np.split(order[: _CELL_QUERIES[0] + _CELL_QUERIES[1]], [_CELL_QUERIES[0]])
        encoder = self.trainer.encoder if self._stored is None else self._stored[0]
        cells = fit_cells(table, bias, _queries(encoder, features[fitted]), seed=self.config.training.seed)
        if effort is None:
            held_out = features[tuned if len(tuned) else fitted] if self.held_out is None else self.held_out[0]
            effort = tune_effort(table, bias, cells, _queries(encoder, held_out[: _CELL_QUERIES[1]]))
        index = CellIndex(table, bias, cells, effort)
        if self.first is None:
            self.run_directory.write_cells(index.as_arrays())
            self.reporter.message(
                f"label cells: a search reads {effort.depth:,} of {bias.shape[0]:,} labels and finds "
                f"{effort.recall:.2%} of the five best"
            )
        if self._stored is not None:
            self._stored = encoder, index

    def _choose_interpolation(self) -> None:
        """Let the held-out instances say how much the neighbours' labels, the linear ranker and the label frequencies
        are worth."""
        assert self.held_out is not None
        features, labels = self.held_out
        shortlist = self._predict(features, SHORTLIST, stage="shortlist")
        release_freed_memory()
        neighbors, found, ranker, margin_of = None, None, None, None
        if self.config.neighbors.enabled:
            self.reporter.start("neighbours", None)
            if not is_compiled():
                self.reporter.message("the first training after an installation compiles code, for some 15 s, once")
            known = self.trainer.stream.features, self.trainer.stream.labels
            count = min(self.config.neighbors.count, self.trainer.stream.num_instances)
            shared = None if self.first is None else self.first.settings_of_rows()
            if shared is None:
                idf_power = choose_idf_power(*known, count, seed=self.config.training.seed)
            else:
                idf_power = shared.idf_power
            neighbors = NeighborIndex(*known, idf_power=idf_power)
            budget = tune_budget(neighbors, features, count)
            found = neighbors.search(features, count, budget=budget)
        if self.config.ranker.enabled:
            ranker = self._train_ranker()
            margin_of = functools.partial(ranker.margins, features)
        release_freed_memory()
        self.reporter.start("interpolation", None)
        if neighbors is None and ranker is None:
            calibration = fit_calibration(shortlist, labels)
            self.run_directory.write_interpolation(Interpolation(), validation=self.validation, calibration=calibration)
            return
        num_train = self.trainer.stream.num_instances
        chosen = fit_interpolation(
            shortlist,
            neighbors,
            found,
            labels,
            self.frequencies,
            num_train,
            margin_of=margin_of,
            propensity=self.propensity,
        )
        if neighbors is not None:
            chosen = dataclasses.replace(chosen, budget=budget, idf_power=idf_power)
        votes = None
        if neighbors is not None and found is not None:
            votes = neighbors.votes(*found, chosen.temperature)
        top = shortlist
        if not chosen.is_identity:
            top = interpolate(shortlist, votes, self.frequencies, chosen, BACKGROUND, margin_of=margin_of)
        self.validation = self._metrics(top)
        before = self.history[self.best_epoch - 1]["validation"]["P@1"]
        self.reporter.message(
            f"used: {'neighbours, ' * chosen.needs_neighbors}{'ranker, ' * chosen.needs_ranker}frequency "
            f"{chosen.frequency:+.2f}; validation P@1 {100 * before:.2f}% -> {100 * self.validation['P@1']:.2f}%"
        )
        calibration = fit_calibration(top, labels)
        del neighbors, found, votes, shortlist, top
        release_freed_memory()
        # What is kept knows all training rows, the held-out ones too.
        rows = None
        if chosen.needs_neighbors and (self.first is None or self.first.settings_of_rows() is None):
            rows = self._scaling(self._training.features), self._training.labels
        kept = ranker if chosen.needs_ranker else None
        self.run_directory.write_interpolation(
            chosen, training_rows=rows, ranker=kept, validation=self.validation, calibration=calibration
        )

    def _train_ranker(self) -> LinearRanker:
        """Classifiers that tell the labels which the model confuses apart, on the training instances."""
        features, labels = self.trainer.stream.features, self.trainer.stream.labels
        order = np.random.default_rng((self.config.training.seed, 1)).permutation(features.shape[0])
        assert isinstance(self.config.ranker.num_instances, int), "the configuration is resolved"
        rows = np.sort(order[: self.config.ranker.num_instances])
        top = self._predict(features[rows], self.config.ranker.num_rivals, stage="rivals", reach="cells")
        release_freed_memory()
        self.reporter.start("ranker", None)
        found = top.label_ids >= 0
        row_BK = np.broadcast_to(rows[:, None], found.shape)
        rivals = csr_matrix(
            (np.ones(int(found.sum()), dtype=np.float32), (row_BK[found], top.label_ids[found])), shape=labels.shape
        )
        return LinearRanker.fit(features, labels, rivals, num_threads=torch.get_num_threads())

    def _predict(self, features: csr_matrix, k: int, *, stage: str | None = None, reach: Reach = "all") -> TopK:
        """The model's best labels, k or all, with a look at the signals now and again; `stage` reports."""
        predictor, parts = self._predictor(reach), []
        if stage is not None:
            self.reporter.start(stage, features.shape[0])
        fewest, most = _CHUNK
        chunk = min(max(fewest, _CHUNK_SCORES // self.frequencies.shape[0]), most)
        for begin in range(0, features.shape[0], chunk):
            self._signals.check()
            rows = features[begin : begin + chunk]
            parts.append(predictor.predict(rows, k=min(k, self.frequencies.shape[0])))
            if stage is not None:
                self.reporter.step(rows.shape[0])
        return concatenate_topk(parts)

    def _announce_epoch(self) -> None:
        steps = self.trainer.stream.steps_per_epoch
        epoch, done = divmod(self.trainer.step, steps)
        self.reporter.start(f"epoch {epoch + 1}/{self.trainer.num_epochs}", steps)
        if done:
            self.reporter.step(done)

    def _end_epoch(self, stats: EpochStats, started: float) -> None:
        is_saved = self._epoch_is_saved()
        if is_saved:
            self._begin_save()
        crash_point("validation.begun")
        release_freed_memory()
        validation = self._validate()
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
        self.seconds = time.perf_counter() - started
        if is_saved:
            self._save()
        elif self.best_step == self.trainer.step:
            self._postpone()
        self.seconds = time.perf_counter() - started
        self.run_directory.append_metrics(self.history[-1])
        self.reporter.epoch(stats)

    def _validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        return self._metrics(self._predict(self.held_out[0], max(DEFAULT_KS)))

    def _predictor(self, reach: Reach) -> Predictor:
        """The model as it stands; its rows come scaled already."""
        if self._stored is not None:
            encoder, stored = self._stored
            found = stored.with_reach(reach) if isinstance(stored, CellIndex) else stored
            return Predictor(encoder, found, scaling=AS_GIVEN)
        softmax = self.trainer.softmax
        weight_LD = softmax.weight.detach()
        # A faster search needs the table in float32 and on the queries' device; on a GPU it copies half of it.
        whole = weight_LD.dtype != torch.float32 or weight_LD.device != softmax.bias.device
        whole = whole or (weight_LD.is_cuda and weight_LD.nbytes > _COPIED)
        index = build_index(weight_LD, softmax.bias.detach(), exact=whole)
        return Predictor(self.trainer.encoder, index, scaling=AS_GIVEN)

    def _metrics(self, top: TopK) -> dict[str, float]:
        assert self.held_out is not None
        report = evaluate_topk(
            top,
            self.held_out[1],
            ks=DEFAULT_KS,
            label_frequencies=self.frequencies,
            num_train=self.trainer.stream.num_instances,
            A=self.propensity[0],
            B=self.propensity[1],
        )
        return {name: report.metrics[name] for name in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")}

    # ------------------------------------------------------------ checkpoints

    def _after_step(self, started: float) -> None:
        """Between two steps: save if it is time, and stop if asked to."""
        if self.trainer.step % self.trainer.stream.steps_per_epoch == 0:
            return  # the end of the epoch saves and stops
        if self._save_is_due():
            self.seconds = time.perf_counter() - started
            self._save()
        self._stop_if_asked()

    def _save_is_due(self) -> bool:
        steps, minutes = self.config.training.save_every_steps, self.config.training.save_every_minutes
        by_steps = steps is not None and self.trainer.step % steps == 0
        return by_steps or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def _stop_if_asked(self) -> None:
        self._signals.check()
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise _DeadlinePassed

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


class _DeadlinePassed(Exception):  # noqa: N818  # nothing is wrong
    """The time limit is over; what there is has to be saved."""


def _require_finite(model: Mapping[str, torch.Tensor], step: int) -> None:
    """A model that is not finite is not saved: every checkpoint can be gone on with."""
    for name, tensor in model.items():
        # The sum first: one pass and no temporary; it may overflow where the terms do not.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise DivergedError(
                f"The model is not finite after step {step}: {name}.",
                hint="Lower training.encoder_learning_rate and training.label_learning_rate.",
            )


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    """A bfloat16 table as NumPy can hold it; all else as it is."""
    return tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()


def _label_counts(labels: csr_matrix) -> NDArray[np.int32]:
    """Instances of each label: N is at most 2^31, and four bytes a label count at 10^7 labels."""
    counts: NDArray[np.int32] = np.bincount(labels.indices, minlength=labels.shape[1]).astype(np.int32)
    return counts


def _hold_out(
    features: csr_matrix, labels: csr_matrix, fraction: float, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rising row numbers to train on, and to validate on; the latter is empty where a fraction is less than a row.

    An instance and its copies, features and labels equal, go together: with its copy in training, a held-out instance
    would be remembered, and what is chosen by it would trust memory. An instance of many copies is trained on.
    """
    num_instances = features.shape[0]
    count = int(num_instances * fraction)
    order = np.random.default_rng((seed, 0)).permutation(num_instances)
    # Odd factor: a feature row and a label row that trade places are another instance.
    keys = row_hashes(features) * np.uint64(0x9E3779B97F4A7C15) + row_hashes(labels)
    _, first, copies = np.unique(keys[order], return_index=True, return_counts=True)
    # Each distinct instance by its first row in the random order.
    by_chance = np.argsort(first)
    copies = copies[by_chance]
    few = copies <= max(count // _MOST_COPIES, int(copies.min()) if copies.size else 1)
    taken = first[by_chance][few][np.cumsum(copies[few]) <= count]
    is_held_out = np.isin(keys, keys[order][taken]) if count else np.zeros(num_instances, dtype=bool)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _queries(encoder: SparseEncoder, features: csr_matrix) -> torch.Tensor:
    """(N, D) on the CPU, of all rows at once."""
    query_ND = torch.empty(features.shape[0], encoder.embedding.shape[1])
    for rows, query_BD in encoder.encode(features):
        query_ND[rows] = query_BD
    return query_ND


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
