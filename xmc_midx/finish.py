"""Layer 5. What follows the epochs of a training: the best model as it is stored, its label cells, and what is added to
its answers.

Before it: the trainer and its validator; after it: a run directory that predicts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.calibration import BACKGROUND, fit_calibration
from xmc_midx.cells import fit_cells
from xmc_midx.data.dataset import Split
from xmc_midx.data.features import FeatureScaling
from xmc_midx.data.known_labels import KnownLabels
from xmc_midx.device import multiplies_bfloat16, release_freed_memory
from xmc_midx.encoder import SparseEncoder, stored_encoder
from xmc_midx.index import CellIndex, Effort, StoredIndex, tune_effort
from xmc_midx.interpolation import SHORTLIST, Interpolation
from xmc_midx.laststep import LastStep, Scorer
from xmc_midx.neighbors import NeighborIndex, Neighbors, choose_idf_power, is_compiled, tune_budget
from xmc_midx.quantization import StoredTable, quantize
from xmc_midx.ranker import LinearRanker
from xmc_midx.recipe import CELLS_FROM
from xmc_midx.rundir import RunDirectory
from xmc_midx.stacking import fit_interpolation
from xmc_midx.trainer import Trainer
from xmc_midx.types import Reporter, TopK
from xmc_midx.validation import Validator

__all__ = ["Finish"]

_TABLES = ("encoder.embedding", "labels.weight")
"""The large ones."""
_MEAN_QUERIES = 4096
"""Training instances whose mean query it is."""
_SHOWN = "P@1", "P@5", "PSP@5"
"""What is added is chosen by P and PSP at 1, 3 and 5 together."""
_CELL_QUERIES = 20_000, 2_000
"""Training instances that the label cells are fitted to, and held-out ones that their effort is tuned on."""
_SCANNED = 20_000, 1 << 30
"""Instances that the ranker learns from, and these times the labels, up to which a further model of an ensemble looks
at all labels for rivals: cells for that alone would take longer (EXPERIMENTS.md, "Few instances, many labels")."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Near:
    """The neighbours of the held-out instances among those that train the model."""

    index: NeighborIndex
    found: Neighbors
    budget: int
    idf_power: float


class Finish:
    """Makes a finished run of a trained model.

    Parameters
    ----------
    run : the run directory, with a resolved configuration.
    trainer : with the best model in its tables.
    validator : asks it, and then the stored one.
    training : the whole training split, the held-out instances too.
    scaling, known_labels : of its rows and labels.
    reporter : receives the progress.
    first : of a further model of an ensemble, the run directory of the finished first one.
    """

    def __init__(
        self,
        run: RunDirectory,
        trainer: Trainer,
        validator: Validator,
        *,
        training: Split,
        scaling: FeatureScaling,
        known_labels: KnownLabels,
        reporter: Reporter,
        first: RunDirectory | None,
    ) -> None:
        self.run_directory, self.config, self.trainer, self.validator = run, run.config, trainer, validator
        self._training, self._scaling, self._known_labels = training, scaling, known_labels
        self.reporter, self.first = reporter, first

    def keep_model(self, known: Mapping[str, torch.Tensor]) -> None:
        """Store the model, and let the stored one answer from now on: what is fitted to its answers is fitted to what
        will predict.

        Parameters
        ----------
        known : what a model knows beside its parameters.
        """
        stored = self._quantized(known)
        self.run_directory.write_model(stored)
        self._answer_by(stored)
        del stored
        release_freed_memory()

    def choose_added(self, before: Mapping[str, float]) -> dict[str, float]:
        """Let the held-out instances say how much the neighbours' labels, the linear ranker and the label frequencies
        are worth, and keep what is.

        Parameters
        ----------
        before : their metrics of the best epoch, of the model alone.

        Returns
        -------
        dict : their metrics with what is added, which the same instances chose.
        """
        assert self.validator.held_out is not None
        features, labels = self.validator.held_out
        shortlist = self.validator.predict(features, SHORTLIST, stage="shortlist")
        release_freed_memory()
        near = self._find_neighbors(features) if self.config.neighbors.enabled else None
        ranker, margin_of = None, None
        if self.config.ranker.enabled:
            ranker = self._train_ranker()
            margin_of = functools.partial(ranker.margins, features)
        release_freed_memory()
        self.reporter.start("interpolation", None)
        if near is None and ranker is None:
            calibration = fit_calibration(shortlist, labels)
            self.run_directory.write_interpolation(Interpolation(), validation=before, calibration=calibration)
            return dict(before)
        frequencies = self.validator.label_frequencies
        chosen = fit_interpolation(
            shortlist,
            None if near is None else near.index,
            None if near is None else near.found,
            labels,
            frequencies,
            self.trainer.stream.num_instances,
            margin_of=margin_of,
            propensity=self.validator.propensity,
        )
        if near is not None:
            chosen = dataclasses.replace(chosen, budget=near.budget, idf_power=near.idf_power)
        top = shortlist if chosen.is_identity else self._rank(shortlist, features, chosen, near, ranker)
        validation = self.validator.metrics(top)
        gains = (f"{name} {100 * before[name]:.2f}% -> {100 * validation[name]:.2f}%" for name in _SHOWN)
        self.reporter.message(
            f"used: {'neighbours, ' * chosen.needs_neighbors}{'ranker, ' * chosen.needs_ranker}frequency "
            f"{chosen.frequency:+.2f}; validation {', '.join(gains)}"
        )
        calibration = fit_calibration(top, labels)
        del near, shortlist, top
        release_freed_memory()
        # What is kept knows all training rows, the held-out ones too.
        rows = None
        if chosen.needs_neighbors and (self.first is None or self.first.settings_of_rows() is None):
            rows = self._scaling(self._training.features), self._known_labels(self._training.labels)
        kept = ranker if chosen.needs_ranker else None
        self.run_directory.write_interpolation(
            chosen, training_rows=rows, ranker=kept, validation=validation, calibration=calibration
        )
        return validation

    def _rank(
        self,
        shortlist: TopK,
        features: csr_matrix,
        chosen: Interpolation,
        near: _Near | None,
        ranker: LinearRanker | None,
    ) -> TopK:
        """As a prediction ranks. The shortlist is of all labels: there are no logits for a search to have missed."""
        scorer = Scorer(settings=chosen, source=None, ranker=ranker)
        step = LastStep([scorer], self.validator.label_frequencies, None if near is None else near.index)
        found = near.found if near is not None and chosen.needs_neighbors else None
        no_queries = np.empty((features.shape[0], 0), dtype=np.float32)
        return step.rank(shortlist, features, found, BACKGROUND, queries=[no_queries])

    def _find_neighbors(self, features: csr_matrix) -> _Near:
        """Of the held-out rows, by what finds most of them; a further model takes what the first has chosen."""
        self.reporter.start("neighbours", None)
        if not is_compiled():
            self.reporter.message("the first training after an installation compiles code, for some 15 s, and keeps it")
        known = self.trainer.stream.features, self.trainer.stream.labels
        count = min(self.config.neighbors.count, self.trainer.stream.num_instances)
        shared = None if self.first is None else self.first.settings_of_rows()
        if shared is None:
            idf_power = choose_idf_power(*known, count, seed=self.config.training.seed)
        else:
            idf_power = shared.idf_power
        index = NeighborIndex(*known, idf_power=idf_power)
        budget = tune_budget(index, features, count)
        found = index.search(features, count, budget=budget)
        return _Near(index=index, found=found, budget=budget, idf_power=idf_power)

    def _quantized(self, known: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """The model as it is stored, each label's mean logit what it was: without that, most of what is rounded away
        would be products with the mean query."""
        model = self.config.model
        tensors = self.trainer.model_tensors() | dict(known)
        arrays = {name: _float32(tensor).cpu().numpy() for name, tensor in tensors.items()}
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

    def _answer_by(self, stored: Mapping[str, np.ndarray]) -> None:
        if self.trainer.device.type != "cpu":
            self.trainer.load_stored(stored)
        else:
            # Another copy of the model beside what follows would be the peak of the whole training.
            self.trainer.release_tables()
            release_freed_memory()
            index = StoredIndex(StoredTable.take(stored, "labels.weight"), stored["labels.bias"])
            self.validator.stored = stored_encoder(stored, self.config.model), index
        if stored["labels.bias"].shape[0] >= CELLS_FROM:
            self._build_cells(StoredTable.take(stored, "labels.weight"), stored["labels.bias"])

    def _build_cells(self, table: StoredTable, bias: NDArray[np.float32]) -> None:
        """Keep where a search for labels begins; of a further model for this training alone, by the first's effort."""
        known = None if self.first is None else self.first.map_cells()
        if self.first is not None and (known is None or not self._searches_for_rivals()):
            return
        effort = None if known is None else Effort.from_arrays(known)
        self.reporter.start("label cells", None)
        features = self.trainer.stream.features
        order = np.random.default_rng((self.config.training.seed, 2)).permutation(features.shape[0])
        fitted, tuned = np.split(order[: _CELL_QUERIES[0] + _CELL_QUERIES[1]], [_CELL_QUERIES[0]])
        encoder = self.validator.encoder
        cells = fit_cells(table, bias, _queries(encoder, features[fitted]), seed=self.config.training.seed)
        if effort is None:
            held_out = self.validator.held_out
            asked = features[tuned if len(tuned) else fitted] if held_out is None else held_out[0]
            effort = tune_effort(table, bias, cells, _queries(encoder, asked[: _CELL_QUERIES[1]]))
        index = CellIndex(table, bias, cells, effort)
        if self.first is None:
            self.run_directory.write_cells(index.as_arrays())
            self.reporter.message(
                f"label cells: a search reads {effort.depth:,} of {bias.shape[0]:,} labels and finds "
                f"{effort.recall:.2%} of the five best"
            )
        if self.validator.stored is not None:
            self.validator.stored = encoder, index

    def _train_ranker(self) -> LinearRanker:
        """Classifiers that tell the labels which the model confuses apart, on the training instances."""
        features, labels = self.trainer.stream.features, self.trainer.stream.labels
        rows = self._rivalled_rows()
        top = self.validator.predict(features[rows], self.config.ranker.num_rivals, stage="rivals", reach="cells")
        release_freed_memory()
        self.reporter.start("ranker", None)
        found = top.label_ids >= 0
        row_BK = np.broadcast_to(rows[:, None], found.shape)
        rivals = csr_matrix(
            (np.ones(int(found.sum()), dtype=np.float32), (row_BK[found], top.label_ids[found])), shape=labels.shape
        )
        return LinearRanker.fit(features, labels, rivals, num_threads=torch.get_num_threads())

    def _searches_for_rivals(self) -> bool:
        rows, pairs = _SCANNED
        asking, num_labels = self._rivalled_rows().size, self.trainer.stream.labels.shape[1]
        is_long = asking > rows or asking * num_labels > pairs or not multiplies_bfloat16(self.trainer.device)
        return self.config.ranker.enabled and is_long

    def _rivalled_rows(self) -> NDArray[np.intp]:
        """Rising row numbers of the training instances that the ranker learns from."""
        assert isinstance(self.config.ranker.num_instances, int), "the configuration is resolved"
        order = np.random.default_rng((self.config.training.seed, 1)).permutation(self.trainer.stream.num_instances)
        return np.sort(order[: self.config.ranker.num_instances])


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    """A bfloat16 table as NumPy can hold it; all else as it is."""
    return tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()


def _queries(encoder: SparseEncoder, features: csr_matrix) -> torch.Tensor:
    """(N, D) on the CPU, of all rows at once."""
    query_ND = torch.empty(features.shape[0], encoder.embedding.shape[1])
    for rows, query_BD in encoder.encode(features):
        query_ND[rows] = query_BD
    return query_ND
