"""Layer 5. Encoder, label index and neighbours: feature rows or raw texts -> the best labels.

Before it: checkpoints and index; after it: metrics and the command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse

from xmc_midx.calibration import BACKGROUND, Calibration, calibrate
from xmc_midx.checkpoint import map_model, refuse_misfits
from xmc_midx.data.features import FeatureScaling, all_finite, rows_from_pairs
from xmc_midx.data.known_labels import KnownLabels
from xmc_midx.device import find_device, without_autocast
from xmc_midx.encoder import SparseEncoder, stored_encoder
from xmc_midx.errors import DataError, UsageError
from xmc_midx.index import CellIndex, StoredIndex, build_index, excluded_of
from xmc_midx.interpolation import SHORTLIST, Interpolation
from xmc_midx.laststep import LastStep, Scorer
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.quantization import StoredTable, require_one_model
from xmc_midx.ranker import LinearRanker
from xmc_midx.rundir import Added, RunDirectory
from xmc_midx.topk import concatenate_topk
from xmc_midx.types import LabelIndex, Reporter, SilentReporter, TopK

if TYPE_CHECKING:
    from xmc_midx.data.vocabulary import Vocabulary

__all__ = ["Instances", "Predictor", "Scores"]

Row = Mapping[int, float] | Sequence[tuple[int, float]]
"""Of features: `{id: value}` or `[(id, value), ...]`."""
Instances = csr_matrix | str | Row | Sequence[str] | Sequence[Row] | np.ndarray
"""What `Predictor.predict` takes."""
Scores = Literal["logits", "probabilities"]
"""`logits`: what the ranking is made by, comparable within an instance; `probabilities`: the calibrated chance that the
label applies (`xmc_midx.calibration`), comparable between instances."""


class Predictor:
    """A trained model, ready to answer.

    Parameters
    ----------
    encoder, index : of the same model and device.
    scaling : of the feature rows; None: to length 1.
    known_labels : the labels of the index's rows; None: 0..L-1.
    label_names : L names, or None where they are unknown.
    vocabulary : turns raw texts into features; None where the run has none.
    label_frequencies, num_train : (L,) integers and N of the training split; None where unknown.
    interpolation, neighbors, ranker : what is added to the model's scores (`xmc_midx.interpolation`); None: nothing.
    calibration : what makes probabilities of the scores; None where no instances were held out.
    members : further models of the same data: of the labels and neighbours that this one finds, the scores of all are
        averaged. Their training rows are the same, so one's `neighbors` are for all.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        index: LabelIndex,
        *,
        scaling: FeatureScaling | None = None,
        known_labels: KnownLabels | None = None,
        label_names: Sequence[str] | None = None,
        vocabulary: Vocabulary | None = None,
        label_frequencies: np.ndarray | None = None,
        num_train: int | None = None,
        interpolation: Interpolation | None = None,
        neighbors: NeighborIndex | None = None,
        ranker: LinearRanker | None = None,
        calibration: Calibration | None = None,
        members: Sequence[Predictor] = (),
    ) -> None:
        self.encoder, self.index, self.scaling = encoder.eval(), index, scaling or FeatureScaling()
        self.known_labels = known_labels or KnownLabels(num_labels=index.num_labels)
        self.label_names, self.vocabulary = label_names, vocabulary
        self.label_frequencies, self.num_train = label_frequencies, num_train
        self.interpolation, self.neighbors, self.ranker = interpolation or Interpolation(), neighbors, ranker
        self.calibration, self.members = calibration, members

    @property
    def members(self) -> Sequence[Predictor]:
        """The further models."""
        return self._members

    @members.setter
    def members(self, members: Sequence[Predictor]) -> None:
        self._members, self._last_step = (*members,), None
        self._encoders = [one.encoder for one in members]
        if members or not self.interpolation.is_identity:
            assert self.label_frequencies is not None, "an interpolation comes with the label frequencies"
            scorers = [
                Scorer(settings=one.interpolation, source=one.index.source, ranker=one.ranker)
                for one in (self, *members)
            ]
            neighbors = next((one.neighbors for one in (self, *members) if one.neighbors is not None), None)
            self._last_step = LastStep(scorers, self.known_labels.take(self.label_frequencies), neighbors)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of the rest: its views would be kept as arrays of their own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_last_step", "_encoders")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.members = self._members

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        checkpoint: str = "best",
        device: str = "auto",
        verify: bool = True,
        exact: bool = False,
    ) -> Predictor:
        """The model of a run directory.

        Parameters
        ----------
        run : as `train` wrote it.
        checkpoint : `"best"`, the finished model where there is one; or `"latest"`.
        device : as in `training.device`.
        verify : whether the hashes of the model's files are computed; the sizes are compared in any case. The
            tables of a checkpoint, and large ones of a finished model, are mapped, not copied: without hashes, a
            prediction on the CPU reads the rows that it needs alone.
        exact : whether all labels are scored in float32, where label cells or a scan in bfloat16 would be faster
            (`xmc_midx.index`).

        Raises
        ------
        DataError : the run, its checkpoint or a file beside it is missing, damaged, or of another run.
        """
        directory = RunDirectory.open(run)
        model, source, is_finished = map_model(directory, checkpoint, verify=verify)
        where = find_device(device)
        with refuse_misfits(source):
            cells = directory.map_cells() if is_finished and where.type == "cpu" else None
            added = directory.added(verify=verify)
            found = cls._build(directory, model, where, added, cells=cells, exact=exact)
        neighbors = found.neighbors
        for path in directory.finished_members if is_finished else ():
            member = RunDirectory.open(path)
            model = member.map_model(verify=verify)
            with refuse_misfits(path):
                added = member.added(verify=verify, neighbors=neighbors)
                one = cls._build(member, model, where, added, is_member=True)
            fits = one.known_labels.equals(found.known_labels) and one.scaling.takes_as(found.scaling)
            if not fits or one.encoder.num_features != found.encoder.num_features:
                raise DataError(f"{path}: is of other features or labels than {directory.path}.", hint="It was edited.")
            with refuse_misfits(path):
                found.members = (*found.members, one)
            neighbors = neighbors or one.neighbors
        return found

    @classmethod
    def _build(
        cls,
        directory: RunDirectory,
        model: Mapping[str, np.ndarray],
        device: torch.device,
        added: Added,
        *,
        cells: Mapping[str, np.ndarray] | None = None,
        exact: bool = False,
        is_member: bool = False,
    ) -> Predictor:
        """Of a run directory's arrays and what is added to them; a member looks for no labels."""
        require_one_model(model)
        table, bias = StoredTable.take(model, "labels.weight"), model["labels.bias"]
        index: LabelIndex
        if cells is not None:
            index = CellIndex.from_arrays(table, bias, cells, reach="exact" if exact else "cells")
        elif is_member:
            index = StoredIndex(table, bias)
        else:
            tensors = torch.from_numpy(table.rows()).to(device), torch.from_numpy(bias).to(device)
            index = build_index(*tensors, exact=exact)
        known_labels = KnownLabels.of(directory.config.data, model, index.num_labels)
        num_labels, label_names = known_labels.num_labels, directory.label_names()
        if label_names is not None and len(label_names) != num_labels:
            raise DataError(f"{directory.path / 'labels.txt'}: holds {len(label_names)} names, expected {num_labels}.")
        encoder = stored_encoder(model, directory.config.model, device)
        for part in (added.neighbors, added.ranker):
            if part is not None and part.num_features != encoder.num_features:
                raise ValueError(f"parts of {part.num_features} and {encoder.num_features} features")
        return cls(
            encoder,
            index,
            scaling=FeatureScaling.of(directory.config.data, model, encoder.num_features),
            known_labels=known_labels,
            label_names=label_names,
            vocabulary=directory.vocabulary(),
            label_frequencies=known_labels.spread(np.asarray(model["train.label_frequencies"])),
            num_train=int(model["train.num_instances"]),
            interpolation=added.settings,
            neighbors=added.neighbors,
            ranker=added.ranker,
            calibration=added.calibration,
        )

    @property
    def num_features(self) -> int:
        """F, of what is asked; the encoder may know fewer."""
        return self.scaling.num_features or self.encoder.num_features

    @property
    def num_labels(self) -> int:
        """L, of the data; the index may know fewer."""
        return self.known_labels.num_labels

    def predict(
        self,
        instances: Instances,
        k: int = 5,
        *,
        scores: Scores = "logits",
        threshold: float | None = None,
        allow: Sequence[int] | np.ndarray | None = None,
        deny: Sequence[int] | np.ndarray | None = None,
        reporter: Reporter | None = None,
    ) -> TopK:
        """The k best labels of each instance.

        Parameters
        ----------
        instances : (N, F) feature rows (SciPy sparse or a NumPy array), one row or a sequence of rows as dictionaries
            `{feature: value}` or lists of pairs, one raw text or a sequence of them (with a vocabulary).
        k : results an instance, >= 1; rows are padded with -1 where fewer labels may be returned: no others than those
            of training instances, where the model has no row for others.
        scores : `"logits"`, or the scores of `interpolation` where it is fitted, of an ensemble their mean; or
            `"probabilities"`.
        threshold : labels with a lower score are left out.
        allow, deny : label ids that alone may, or may not, be returned.

        Raises
        ------
        DataError : the rows have other features than the model, or values that are not finite.
        UsageError : there is no vocabulary for a text, no calibration for probabilities, or k is below 1.
        """
        reporter = reporter or SilentReporter()
        features = self._features(instances)
        if k < 1:
            raise UsageError(f"k is {k}; expected at least 1.")
        if threshold is not None and math.isnan(threshold):
            raise UsageError(f"threshold is {threshold}; expected a number.")
        if scores not in ("logits", "probabilities"):
            raise UsageError(f"scores is {scores!r}; expected 'logits' or 'probabilities'.")
        if scores == "probabilities":
            self.require_calibration()
        allowed, denied = self._label_rows("allow", allow), self._label_rows("deny", deny)
        if denied is not None and not denied.size:
            denied = None  # nothing to look out for: the search may be the faster one
        reporter.start("predict", features.shape[0])
        with without_autocast(self.encoder.bias.device.type):
            parts = []
            for top in self._answers(features, k, scores, allowed, denied):
                parts.append(top if threshold is None else _above(top, threshold))
                reporter.step(top.label_ids.shape[0])
        if not parts:
            return TopK.empty(0, k)
        return concatenate_topk(parts)

    def _answers(
        self, features: csr_matrix, k: int, scores: Scores, allow: np.ndarray | None, deny: np.ndarray | None
    ) -> Iterator[TopK]:
        """For some instances after the other."""
        search = self._search if scores == "logits" else self._probabilities
        for rows, query_BD in self.encoder.encode(features):
            chunk = features if rows == slice(0, features.shape[0]) else features[rows]
            queries = [query_BD, *(one.encode_all(chunk) for one in self._encoders)]
            for one_BD in queries:
                values = one_BD.cpu().numpy()
                if not all_finite(values):
                    _require_finite(np.isfinite(values).all(axis=1), rows.start)
            top = search(queries, chunk, k, allow, deny)
            if np.isnan(top.scores).any():
                _require_finite(np.logical_not(np.isnan(top.scores).any(axis=1)), rows.start)
            yield TopK(label_ids=self.known_labels.labels_of(top.label_ids), scores=top.scores)

    def warm_up(self) -> None:
        """Load what the first prediction would: scikit-learn for texts, compiled code."""
        self.predict({0: 1.0})
        if self.vocabulary is not None:
            self.predict(self.vocabulary.tokens[0])

    def require_calibration(self) -> Calibration:
        """What makes probabilities of the scores; the further models of an ensemble have it too.

        Raises
        ------
        UsageError : one of them has none.
        """
        for one in self.members:
            one.require_calibration()
        if self.calibration is None:
            raise UsageError(
                "The run has no calibration, so its scores are no probabilities: its training has not ended, no "
                "instances were held out, none of their labels was found or none missed, or an older version trained "
                "it.",
                hint="Finish it (train --resume), train with data.validation_fraction above 0, or use --scores logits.",
            )
        return self.calibration

    def require_vocabulary(self) -> Vocabulary:
        """What turns raw texts into features.

        Raises
        ------
        UsageError : the run has none.
        """
        if self.vocabulary is None:
            raise UsageError(
                "The run has no vocabulary, so it cannot read raw text; expected sparse feature rows.",
                hint="Train on a dataset directory with a vocabulary.txt.",
            )
        return self.vocabulary

    def _probabilities(
        self,
        queries: Sequence[torch.Tensor],
        features: csr_matrix,
        k: int,
        allow: np.ndarray | None,
        deny: np.ndarray | None,
    ) -> TopK:
        """Of an ensemble, the mean of what its models' calibrations make of the same scores."""
        self.require_calibration()
        top, background = self._search(queries, features, max(k, BACKGROUND), allow, deny), None
        if allow is not None or deny is not None:
            background = self._search(queries, features, BACKGROUND, None, None)
        tops = [calibrate(top, one.require_calibration(), background=background) for one in (self, *self.members)]
        scores = np.mean([one.scores for one in tops], axis=0) if len(tops) > 1 else tops[0].scores
        return TopK(label_ids=tops[0].label_ids[:, :k], scores=scores[:, :k])

    def _label_rows(self, name: str, ids: Sequence[int] | np.ndarray | None) -> np.ndarray | None:
        if ids is None:
            return None
        found = np.asarray(list(ids) if isinstance(ids, Set) else ids)
        if found.size == 0:
            return np.empty(0, dtype=np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise UsageError(
                f"{name}: holds {found.dtype} of {found.ndim} dimensions; expected label ids, whole numbers.",
                hint="Of a mask, numpy.flatnonzero gives the ids." if found.dtype == np.bool_ else None,
            )
        if not 0 <= found.min() <= found.max() < self.num_labels:
            raise UsageError(f"{name}: holds a label id outside 0..{self.num_labels - 1}.")
        return self.known_labels.rows_of(found.astype(np.int64))

    def _search(
        self,
        queries: Sequence[torch.Tensor],
        features: csr_matrix,
        k: int,
        allow: np.ndarray | None,
        deny: np.ndarray | None,
    ) -> TopK:
        query_BD, step = queries[0], self._last_step
        lists = [None if ids is None else torch.from_numpy(ids) for ids in (allow, deny)]
        top = self.index.search(query_BD, k if step is None else max(k, SHORTLIST), allow=lists[0], deny=lists[1])
        if step is None:
            return top
        # The coefficients are fitted to a shortlist of so many, however many results are asked for.
        reference, excluded_L = None, excluded_of(self.index.num_labels, *lists)
        if excluded_L is not None:
            reference = self.index.search(query_BD, SHORTLIST)
        elif top.label_ids.shape[1] > SHORTLIST:
            reference = TopK(label_ids=top.label_ids[:, :SHORTLIST].copy(), scores=top.scores[:, :SHORTLIST].copy())
        return step.rank(
            top,
            features,
            step.find(features),
            k,
            queries=[one_BD.contiguous().cpu().numpy() for one_BD in queries],
            reference=reference,
            allowed=None if excluded_L is None else ~excluded_L.numpy(),
        )

    def _features(self, instances: Instances) -> csr_matrix:
        features = self.read(instances)
        if features.shape[1] != self.num_features:
            raise DataError(
                f"The instances have {features.shape[1]} features; the model was trained with {self.num_features}.",
                hint="Is this the model of another dataset?",
            )
        if not all_finite(features.data):
            raise DataError("The instances hold a value that is not finite; expected numbers.")
        return self.scaling(features)

    def read(self, instances: Instances) -> csr_matrix:
        """The feature rows (N, F) of instances, as `predict` takes them; a row of a text without a known word is empty.

        Raises
        ------
        UsageError : there is no vocabulary for a text, or they are no instances.
        DataError : ids or values are at fault.
        """
        instances = held_rows(instances)
        if issparse(instances):
            features = instances
            if not (isinstance(features, csr_matrix) and features.dtype == np.float32):
                with np.errstate(over="ignore"):
                    features = csr_matrix(features, dtype=np.float32)
            _require_ids(features)
            if not features.has_canonical_format:
                features = features.copy()
                features.sum_duplicates()
            return features
        if isinstance(instances, str):
            return self._read_texts([instances])
        if isinstance(instances, Mapping):
            return rows_from_pairs([instances], self.num_features)
        if isinstance(instances, Set) or getattr(instances, "ndim", 1) != 1:
            kind = type(instances).__name__
            raise UsageError(f"The instances are a {kind}; expected rows of features, or a sequence of rows or texts.")
        # Whatever can be gone through: a pandas column, say, has no place 0.
        given: list[Any] = list(instances)
        if given and _is_pair(given[0]):
            return rows_from_pairs([given], self.num_features)
        if all(isinstance(instance, str) for instance in given):
            return self._read_texts(given)
        return rows_from_pairs(given, self.num_features)

    def num_without_features(self, features: csr_matrix) -> int:
        """Of rows as of `read`, those that hold no feature that the model has: they are all answered alike."""
        if self.scaling.kept is None:
            return int(np.count_nonzero(np.diff(features.indptr) == 0))
        is_known = np.isin(features.indices, self.scaling.kept)
        rows = np.repeat(np.arange(features.shape[0]), np.diff(features.indptr))
        return int(features.shape[0] - np.unique(rows[is_known]).size)

    def _read_texts(self, texts: Sequence[str]) -> csr_matrix:
        if not texts:
            return rows_from_pairs([], self.num_features)
        return self.require_vocabulary().transform(texts)


def held_rows(instances: Any) -> Any:
    """Feature rows in memory, of any kind of array, as a sparse matrix, texts in an array as a list; all else as it is.

    Raises
    ------
    UsageError : an array is neither rows of features (N, F) nor texts (N,).
    """
    if not isinstance(instances, np.ndarray):
        return instances
    if instances.ndim == 1 and instances.dtype.kind in "OU":
        return instances.tolist()
    if instances.ndim != 2:
        raise UsageError(f"The instances have {instances.ndim} dimensions; expected rows of features: (N, F).")
    try:
        with np.errstate(over="ignore"):
            return csr_matrix(instances.astype(np.float32))
    except (TypeError, ValueError):
        raise UsageError(f"The instances are an array of {instances.dtype}; expected numbers.") from None


def _is_pair(value: Any) -> bool:
    """Whether a value is a feature and its value, rather than a row of them."""
    return isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], tuple | list)


def _require_ids(features: csr_matrix) -> None:
    """Refuse ids that SciPy takes as they are: compiled code would read beyond its arrays."""
    if features.nnz and not 0 <= features.indices.min() <= features.indices.max() < features.shape[1]:
        raise DataError(
            f"The instances hold feature ids from {features.indices.min()} to {features.indices.max()}; expected 0 to "
            f"{features.shape[1] - 1}."
        )


def _require_finite(is_finite_B: np.ndarray, first: int) -> None:
    """Refuse an instance whose values are so large that it has no best labels."""
    if not is_finite_B.all():
        raise DataError(
            f"Instance {first + int(np.argmin(is_finite_B))}: its scores are not finite, so it has no best labels.",
            hint="Are its feature values of the size of those that the model was trained with?",
        )


def _where(kept: np.ndarray, top: TopK) -> TopK:
    return TopK(label_ids=np.where(kept, top.label_ids, -1), scores=np.where(kept, top.scores, -np.inf))


def _above(top: TopK, threshold: float) -> TopK:
    return _where(top.scores >= threshold, top)
