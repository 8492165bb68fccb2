"""Layer 5. Encoder, label index and neighbours: feature rows or raw texts -> the best labels.

Before it: checkpoints and index; after it: metrics and the command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse

from xmc_midx.calibration import BACKGROUND, Calibration, calibrate
from xmc_midx.checkpoint import map_model, refuse_misfits
from xmc_midx.data.features import FeatureScaling, all_finite, rows_from_pairs
from xmc_midx.device import find_device, without_autocast
from xmc_midx.encoder import SparseEncoder, stored_encoder
from xmc_midx.errors import DataError, UsageError
from xmc_midx.index import CellIndex, StoredIndex, build_index
from xmc_midx.interpolation import SHORTLIST, Interpolation
from xmc_midx.laststep import LastStep
from xmc_midx.neighbors import NeighborIndex, Neighbors
from xmc_midx.quantization import StoredTable
from xmc_midx.ranker import LinearRanker
from xmc_midx.rundir import RunDirectory
from xmc_midx.topk import best_of, concatenate_topk, least_of, mean_of
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """For some instances, what the models of an ensemble share."""

    label_ids: np.ndarray
    """(B, K): the labels with the largest logits, and what the neighbours vote for."""
    neighbors: Neighbors | None


class Predictor:
    """A trained model, ready to answer.

    Parameters
    ----------
    encoder, index : of the same model and device.
    scaling : of the feature rows; None: to length 1.
    label_names : L names, or None where they are unknown.
    vocabulary : turns raw texts into features; None where the run has none.
    label_frequencies, num_train : (L,) int64 and N of the training split; None where unknown.
    interpolation, neighbors, ranker : what is added to the model's scores (`xmc_midx.interpolation`); None: nothing.
    calibration : what makes probabilities of the scores; None where no instances were held out.
    members : further models of the same data: of the labels and neighbours that this one finds, the scores of all are
        averaged. Their `neighbors` are this one's, or None.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        index: LabelIndex,
        *,
        scaling: FeatureScaling | None = None,
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
        self.label_names, self.vocabulary = label_names, vocabulary
        self.label_frequencies, self.num_train = label_frequencies, num_train
        self.interpolation, self.neighbors, self.ranker = interpolation or Interpolation(), neighbors, ranker
        self._last_step: LastStep | None = None
        if not self.interpolation.is_identity:
            assert label_frequencies is not None, "an interpolation comes with the label frequencies"
            self._last_step = LastStep(self.interpolation, label_frequencies, neighbors, ranker)
        self.calibration, self.members = calibration, members

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
            tables of a checkpoint are mapped, not copied: without hashes, a prediction on the CPU reads the rows that
            it needs alone.
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
            added = directory.interpolation(verify=verify)
            found = cls._build(directory, model, where, added, cells=cells, exact=exact)
        for path in directory.finished_members if is_finished else ():
            member = RunDirectory.open(path)
            model = member.map_model(verify=verify)
            with refuse_misfits(path):
                added = member.interpolation(verify=verify, neighbors=found.neighbors)
                one = cls._build(member, model, where, added, is_member=True)
            if (one.num_features, one.num_labels) != (found.num_features, found.num_labels):
                raise DataError(f"{path}: is of other features or labels than {directory.path}.", hint="It was edited.")
            found.members = (*found.members, one)
        return found

    @classmethod
    def _build(
        cls,
        directory: RunDirectory,
        model: Mapping[str, np.ndarray],
        device: torch.device,
        added: tuple[Interpolation, NeighborIndex | None, LinearRanker | None] | None,
        *,
        cells: Mapping[str, np.ndarray] | None = None,
        exact: bool = False,
        is_member: bool = False,
    ) -> Predictor:
        """Of a run directory's arrays and what is added to them; a member looks for no labels."""
        table, bias = StoredTable.take(model, "labels.weight"), model["labels.bias"]
        index: LabelIndex
        if cells is not None:
            index = CellIndex.from_arrays(table, bias, cells, reach="exact" if exact else "cells")
        elif is_member and device.type == "cpu":
            index = StoredIndex(table, bias)
        else:
            tensors = torch.from_numpy(table.rows()).to(device), torch.from_numpy(bias).to(device)
            index = build_index(*tensors, exact=exact or is_member)
        label_names = directory.label_names()
        if label_names is not None and len(label_names) != index.num_labels:
            raise DataError(
                f"{directory.path / 'labels.txt'}: holds {len(label_names)} names, expected {index.num_labels}."
            )
        encoder = stored_encoder(model, directory.config.model, device)
        return cls(
            encoder,
            index,
            scaling=FeatureScaling.of(directory.config.data, model, encoder.num_features),
            label_names=label_names,
            vocabulary=directory.vocabulary(),
            label_frequencies=np.asarray(model["train.label_frequencies"]),
            num_train=int(model["train.num_instances"]),
            interpolation=added[0] if added else None,
            neighbors=added[1] if added else None,
            ranker=added[2] if added else None,
            calibration=directory.calibration(),
        )

    @property
    def num_features(self) -> int:
        return self.encoder.num_features

    @property
    def num_labels(self) -> int:
        return self.index.num_labels

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
        k : results an instance, >= 1; rows are padded with -1 where fewer labels may be returned.
        scores : `"logits"`, or the scores of `interpolation` where it is fitted; of an ensemble the mean logarithm, in
            nats and below 0, of a label's share in each model's hundred best; or `"probabilities"`.
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
        allowed, denied = self._label_ids("allow", allow), self._label_ids("deny", deny)
        reporter.start("predict", features.shape[0])
        with without_autocast(self.encoder.bias.device.type):
            parts = []
            for top in (self._mean if self.members else self._answers)(features, k, scores, allowed, denied):
                parts.append(top if threshold is None else _above(top, threshold))
                reporter.step(top.label_ids.shape[0])
        if not parts:
            return TopK.empty(0, k)
        return concatenate_topk(parts)

    def _answers(
        self, features: csr_matrix, k: int, scores: Scores, allowed: np.ndarray | None, denied: np.ndarray | None
    ) -> Iterator[TopK]:
        """This model's own, for some instances after the other."""
        for rows, query_BD in self.encoder.encode(features):
            chunk = features if rows == slice(0, features.shape[0]) else features[rows]
            yield self._answer(query_BD, chunk, rows.start, k, scores, allowed, denied)[0]

    def _answer(
        self,
        query_BD: torch.Tensor,
        features: csr_matrix,
        first: int,
        k: int,
        scores: Scores,
        allowed: np.ndarray | None,
        denied: np.ndarray | None,
        given: _Found | None = None,
    ) -> tuple[TopK, _Found]:
        """Of the instances from `first` on; with `given`, of what another model has found."""
        queries = query_BD.cpu().numpy()
        if not all_finite(queries):
            _require_finite(np.isfinite(queries).all(axis=1), first)
        search = self._search if scores == "logits" else self._probabilities
        top, found = search(query_BD, features, k, allowed, denied, given)
        if np.isnan(top.scores).any():
            _require_finite(np.logical_not(np.isnan(top.scores).any(axis=1)), first)
        return top, found

    def _mean(
        self, features: csr_matrix, k: int, scores: Scores, allowed: np.ndarray | None, denied: np.ndarray | None
    ) -> Iterator[TopK]:
        """The ensemble's: probabilities are averaged as they are, other scores as the logarithms of a label's share in
        a model's hundred best, which are the same for any k and any choice of labels. Behind the labels that are among
        some model's hundred best stand those of the first model, in its order."""
        is_logits = scores == "logits"
        deep = None
        if k > SHORTLIST or allowed is not None or denied is not None:
            deep = self._answers(features, k, scores, allowed, denied)
        for rows, query_BD in self.encoder.encode(features):
            chunk = features if rows == slice(0, features.shape[0]) else features[rows]
            first, found = self._answer(query_BD, chunk, rows.start, SHORTLIST, scores, None, None)
            answers = [first]
            for one in self.members:
                others_BD = torch.cat([part_BD for _, part_BD in one.encoder.encode(chunk)])
                answers.append(one._answer(others_BD, chunk, rows.start, SHORTLIST, scores, None, None, found)[0])
            norm_N1 = _log_sum(first) if is_logits else np.zeros((len(first.label_ids), 1))
            tops = [_less(top, _log_sum(top)) if is_logits else top for top in answers]
            if deep is None:
                yield mean_of(tops, k)
                continue
            mean = mean_of(tops, sum(top.label_ids.shape[1] for top in tops))
            rest = _less(next(deep), norm_N1)
            floor_N1 = np.mean([least_of(top) for top in tops], axis=0)
            own_N1 = least_of(tops[0])
            if is_logits:
                behind = floor_N1 + np.minimum(rest.scores - own_N1, 0.0)
            else:
                behind = floor_N1 * np.minimum(rest.scores / np.maximum(own_N1, np.finfo(np.float32).tiny), 1.0)
            is_behind = (rest.label_ids >= 0) & ~_holds(mean, rest.label_ids, self.num_labels)
            is_kept = mean.label_ids >= 0
            if allowed is not None:
                is_kept &= np.isin(mean.label_ids, allowed)
            if denied is not None:
                is_kept &= ~np.isin(mean.label_ids, denied)
            others = TopK(label_ids=rest.label_ids, scores=behind.astype(np.float32))
            yield best_of([_where(is_kept, mean), _where(is_behind, others)], k)

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
                "The run has no calibration, so its scores are no probabilities: no instances were held out, none of "
                "their labels was found or none missed, or an older version trained it.",
                hint="Train with data.validation_fraction above 0, or use --scores logits.",
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
        query_BD: torch.Tensor,
        features: csr_matrix,
        k: int,
        allow: np.ndarray | None,
        deny: np.ndarray | None,
        given: _Found | None,
    ) -> tuple[TopK, _Found]:
        wide, settings = max(k, BACKGROUND), self.require_calibration()
        top, found = self._search(query_BD, features, wide, allow, deny, given)
        background = None
        if allow is not None or deny is not None:
            background = self._search(query_BD, features, BACKGROUND, None, None, given)[0]
        top = calibrate(top, settings, background=background)
        return TopK(label_ids=top.label_ids[:, :k], scores=top.scores[:, :k]), found

    def _label_ids(self, name: str, ids: Sequence[int] | np.ndarray | None) -> np.ndarray | None:
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
        return found.astype(np.int64)

    def _search(
        self,
        query_BD: torch.Tensor,
        features: csr_matrix,
        k: int,
        allow: np.ndarray | None,
        deny: np.ndarray | None,
        given: _Found | None = None,
    ) -> tuple[TopK, _Found]:
        """The k best labels, and what a model of the same ensemble does not have to look for."""
        plain = self._last_step is None
        if given is not None:
            top = self.index.rank(query_BD, given.label_ids)
        else:
            top = self.index.search(
                query_BD,
                k if plain else max(k, SHORTLIST),
                allow=None if allow is None else torch.from_numpy(allow),
                deny=None if deny is None else torch.from_numpy(deny),
            )
        if plain:
            return top, _Found(label_ids=top.label_ids, neighbors=None)
        # The coefficients are fitted to a shortlist of so many, however many results are asked for.
        reference = top if allow is None and deny is None else self.index.search(query_BD, SHORTLIST)
        if reference.label_ids.shape[1] > SHORTLIST:
            reference = TopK(label_ids=top.label_ids[:, :SHORTLIST], scores=top.scores[:, :SHORTLIST])
        step = self._last_step
        assert step is not None, "the interpolation is not the identity"
        near = step.find(features) if given is None or given.neighbors is None else given.neighbors
        if reference is not top:
            # Both are completed in place.
            reference = TopK(label_ids=reference.label_ids.copy(), scores=reference.scores.copy())
        result = step.rank(
            top,
            features,
            near,
            k,
            logits=self.index.logits(query_BD),
            reference=None if reference is top else reference,
            allowed=_allowed_of(self.num_labels, allow, deny),
        )
        return result, _Found(label_ids=reference.label_ids, neighbors=near)

    def _features(self, instances: Instances) -> csr_matrix:
        features = self._read(instances)
        if features.shape[1] != self.num_features:
            raise DataError(
                f"The instances have {features.shape[1]} features; the model was trained with {self.num_features}.",
                hint="Is this the model of another dataset?",
            )
        if not all_finite(features.data):
            raise DataError("The instances hold a value that is not finite; expected numbers.")
        return self.scaling(features)

    def _read(self, instances: Instances) -> csr_matrix:
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


def _allowed_of(num_labels: int, allow: np.ndarray | None, deny: np.ndarray | None) -> np.ndarray | None:
    """(L,) bool: the labels that may be returned; None where all may."""
    if allow is None and deny is None:
        return None
    allowed_L = np.full(num_labels, allow is None)
    if allow is not None:
        allowed_L[allow] = True
    if deny is not None:
        allowed_L[deny] = False
    return allowed_L


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


def _log_sum(top: TopK) -> np.ndarray:
    """(N, 1) logarithms of the sums of the exponentials; 0 of a row of pads."""
    peak_N1 = _finite(top.scores.max(axis=1, keepdims=True, initial=-np.inf))
    total_N1 = np.exp(top.scores - peak_N1).sum(axis=1, keepdims=True)
    return peak_N1 + np.log(np.where(total_N1 > 0.0, total_N1, 1.0))


def _less(top: TopK, norm_N1: np.ndarray) -> TopK:
    return TopK(label_ids=top.label_ids, scores=(top.scores - norm_N1).astype(np.float32))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, 0.0)


def _holds(top: TopK, label_ids: np.ndarray, num_labels: int) -> np.ndarray:
    """(N, K): whether a row's result holds a label."""
    first_N1 = np.arange(len(label_ids))[:, None] * num_labels
    return np.isin(first_N1 + label_ids, (first_N1 + top.label_ids)[top.label_ids >= 0])


def _where(kept: np.ndarray, top: TopK) -> TopK:
    return TopK(label_ids=np.where(kept, top.label_ids, -1), scores=np.where(kept, top.scores, -np.inf))


def _above(top: TopK, threshold: float) -> TopK:
    return _where(top.scores >= threshold, top)
