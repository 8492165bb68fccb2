"""Layer 5. Encoder, label index and neighbours: feature rows or raw texts -> the best labels.

Before it: checkpoints and index; after it: metrics and the command line.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmc_midx.checkpoint import CheckpointStore, refuse_misfits
from xmc_midx.data.features import normalize_rows
from xmc_midx.device import find_device
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import DataError, UsageError
from xmc_midx.index import ExactIndex
from xmc_midx.interpolation import SHORTLIST, Interpolation, interpolate, keep_labels
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.ranker import LinearRanker
from xmc_midx.rundir import RunDirectory
from xmc_midx.topk import concatenate_topk, empty_topk
from xmc_midx.types import LabelIndex, Reporter, SilentReporter, TopK

if TYPE_CHECKING:
    from xmc_midx.data.vocabulary import Vocabulary

__all__ = ["Predictor"]


class Predictor:
    """A trained model, ready to answer.

    Parameters
    ----------
    encoder, index : of the same model and device.
    label_names : L names, or None where they are unknown.
    vocabulary : turns raw texts into features; None where the run has none.
    label_frequencies, num_train : (L,) int64 and N of the training split; None where unknown.
    interpolation, neighbors, ranker : what is added to the model's scores (`xmc_midx.interpolation`); None: nothing.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        index: LabelIndex,
        *,
        normalize: str = "l2",
        label_names: Sequence[str] | None = None,
        vocabulary: Vocabulary | None = None,
        label_frequencies: np.ndarray | None = None,
        num_train: int | None = None,
        interpolation: Interpolation | None = None,
        neighbors: NeighborIndex | None = None,
        ranker: LinearRanker | None = None,
    ) -> None:
        self.encoder, self.index, self.normalize = encoder.eval(), index, normalize
        self.label_names, self.vocabulary = label_names, vocabulary
        self.label_frequencies, self.num_train = label_frequencies, num_train
        self.interpolation, self.neighbors, self.ranker = interpolation or Interpolation(), neighbors, ranker

    @classmethod
    def load(cls, run: str | Path, *, checkpoint: str = "best", device: str = "auto", verify: bool = True) -> Predictor:
        """The model of a run directory.

        Parameters
        ----------
        run : as `train` wrote it.
        checkpoint : `"best"`, the finished model where there is one; or `"latest"`.
        device : as in `training.device`.
        verify : whether the hashes of the model's files are computed; the sizes are compared in any case.

        Raises
        ------
        DataError : the run, its checkpoint or a file beside it is missing, damaged, or of another run.
        """
        directory = RunDirectory.open(run)
        if checkpoint == "best" and directory.has_model:
            arrays, source = directory.read_model(verify=verify), directory.path
            model = {name: torch.from_numpy(array) for name, array in arrays.items()}
        else:
            saved = CheckpointStore(directory.checkpoints).load(checkpoint, ["model"], verify=verify)
            model, source = dict(saved.parts["model"]), saved.path
        with refuse_misfits(source):
            return cls._build(directory, model, device)

    @classmethod
    def _build(cls, directory: RunDirectory, model: Mapping[str, torch.Tensor], device: str) -> Predictor:
        config = directory.config.model
        target = find_device(device)
        num_features, dim = model["encoder.embedding"].shape
        encoder = SparseEncoder(
            num_features,
            dim,
            num_hidden_layers=config.num_hidden_layers,
            activation=config.activation,
            residual=config.residual,
        )
        names = {n.removeprefix("encoder."): t for n, t in model.items() if n.startswith("encoder.")}
        encoder.load_state_dict(names, assign=True)
        added = directory.interpolation()
        index = ExactIndex(model["labels.weight"].to(target), model["labels.bias"].to(target))
        label_names = directory.label_names()
        if label_names is not None and len(label_names) != index.num_labels:
            raise DataError(
                f"{directory.path / 'labels.txt'}: holds {len(label_names)} names, expected {index.num_labels}."
            )
        return cls(
            encoder.to(target),
            index,
            normalize=directory.config.data.normalize,
            label_names=label_names,
            vocabulary=directory.vocabulary(),
            label_frequencies=model["train.label_frequencies"].numpy(),
            num_train=int(model["train.num_instances"]),
            interpolation=added[0] if added else None,
            neighbors=added[1] if added else None,
            ranker=added[2] if added else None,
        )

    @property
    def num_features(self) -> int:
        return int(self.encoder.embedding.shape[0])

    @property
    def num_labels(self) -> int:
        return self.index.num_labels

    def predict(
        self,
        instances: csr_matrix | str | Sequence[str],
        k: int = 5,
        *,
        allow: Sequence[int] | None = None,
        deny: Sequence[int] | None = None,
        reporter: Reporter | None = None,
    ) -> TopK:
        """The k best labels of each instance, with logits, or the scores of `interpolation` where it is fitted.

        Parameters
        ----------
        instances : (N, F) feature rows, one raw text, or a sequence of raw texts (with a vocabulary).
        k : results an instance, >= 1; rows are padded with -1 where fewer labels may be returned.
        allow, deny : label ids that alone may, or may not, be returned.
        """
        reporter = reporter or SilentReporter()
        features = self._features(instances)
        if k < 1:
            raise UsageError(f"k is {k}; expected at least 1.")
        allowed = None if allow is None else np.asarray(allow, dtype=np.int64)
        denied = None if deny is None else np.asarray(deny, dtype=np.int64)
        reporter.start("predict", features.shape[0])
        parts = []
        for rows, query_BD in self.encoder.encode(features):
            parts.append(self._search(query_BD, features[rows], k, allowed, denied))
            reporter.step(rows.stop - rows.start)
        if not parts:
            return empty_topk(0, k)
        return concatenate_topk(parts)

    def _search(
        self,
        query_BD: torch.Tensor,
        features: csr_matrix,
        k: int,
        allow: np.ndarray | None,
        deny: np.ndarray | None,
    ) -> TopK:
        plain = self.interpolation.is_identity
        top = self.index.search(
            query_BD,
            k if plain else max(k, SHORTLIST),
            allow=None if allow is None else torch.from_numpy(allow),
            deny=None if deny is None else torch.from_numpy(deny),
        )
        if plain:
            return top
        assert self.label_frequencies is not None, "an interpolation comes with the label frequencies"
        votes = None
        if self.neighbors is not None:
            found = self.neighbors.search(features, self.interpolation.count)
            votes = keep_labels(self.neighbors.votes(*found, self.interpolation.temperature), allow, deny)
        margin_of = None if self.ranker is None else functools.partial(self.ranker.margins, features)
        return interpolate(top, votes, self.label_frequencies, self.interpolation, k, margin_of=margin_of)

    def _features(self, instances: csr_matrix | str | Sequence[str]) -> csr_matrix:
        if isinstance(instances, csr_matrix):
            features = instances
        elif self.vocabulary is None:
            raise UsageError(
                "The run has no vocabulary, so it cannot read raw text; expected sparse feature rows.",
                hint="Train on a dataset directory with a vocabulary.txt.",
            )
        else:
            features = self.vocabulary.transform([instances] if isinstance(instances, str) else instances)
        if features.shape[1] != self.num_features:
            raise DataError(
                f"The instances have {features.shape[1]} features; the model was trained with {self.num_features}.",
                hint="Is this the model of another dataset?",
            )
        return normalize_rows(features) if self.normalize == "l2" else features
