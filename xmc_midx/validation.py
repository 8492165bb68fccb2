"""Layer 5. The held-out instances, and how the model answers, in training or as it is stored.

Before it: the trainer; after it: sessions, and what follows their epochs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.data.features import AS_GIVEN, row_hashes
from xmc_midx.encoder import SparseEncoder
from xmc_midx.index import CellIndex, Reach, StoredIndex, build_index
from xmc_midx.metrics import evaluate_topk
from xmc_midx.predictor import Predictor
from xmc_midx.topk import concatenate_topk
from xmc_midx.trainer import Trainer
from xmc_midx.types import DEFAULT_KS, Reporter, TopK

__all__ = ["Validator", "hold_out"]

_CHUNK, _CHUNK_SCORES = (512, 4096), 1 << 27
"""Instances between two looks at the signals, at the least and most, and scores of labels: a few seconds."""
_COPIED = 512 << 20
"""Bytes of a label table on a GPU up to which validation may copy it."""
_MOST_COPIES = 10
"""An instance that alone would be more than this part of the held-out ones is not held out."""


def hold_out(
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


def _do_nothing() -> None:
    pass


class Validator:
    """Asks the model of a training, as it stands.

    Parameters
    ----------
    trainer : its model answers, until `stored` does.
    held_out : (n, F) features, scaled, and (n, L) labels; None where no instances are held out.
    label_frequencies : (L,) integers, of the instances that train the model.
    propensity : A and B of the propensity model.
    reporter : receives the progress of long predictions.
    """

    def __init__(
        self,
        trainer: Trainer,
        held_out: tuple[csr_matrix, csr_matrix] | None,
        *,
        label_frequencies: NDArray[np.int32],
        propensity: tuple[float, float],
        reporter: Reporter,
    ) -> None:
        self.trainer, self.held_out, self.label_frequencies = trainer, held_out, label_frequencies
        self.propensity, self.reporter = propensity, reporter
        self.check: Callable[[], None] = _do_nothing
        """Called between the chunks of a prediction, where a training may stop: what it raises goes on."""
        self.stored: tuple[SparseEncoder, StoredIndex] | None = None
        """The finished model as it is stored, on the CPU: the tables that it was trained in are given back."""

    @property
    def encoder(self) -> SparseEncoder:
        """Of the model that answers."""
        return self.trainer.encoder if self.stored is None else self.stored[0]

    def validate(self) -> dict[str, float]:
        """The metrics of the held-out instances; empty where there are none."""
        return {} if self.held_out is None else self.metrics(self.predict(self.held_out[0], max(DEFAULT_KS)))

    def predict(self, features: csr_matrix, k: int, *, stage: str | None = None, reach: Reach = "all") -> TopK:
        """The model's best labels, k or all.

        Parameters
        ----------
        features : (N, F) rows, scaled.
        stage : as which this is reported; None: not at all.
        reach : how far the search of a stored model with label cells goes (`xmc_midx.index`).
        """
        predictor, parts = self._predictor(reach), []
        if stage is not None:
            self.reporter.start(stage, features.shape[0])
        fewest, most = _CHUNK
        chunk = min(max(fewest, _CHUNK_SCORES // self.label_frequencies.shape[0]), most)
        for begin in range(0, features.shape[0], chunk):
            self.check()
            rows = features[begin : begin + chunk]
            parts.append(predictor.predict(rows, k=min(k, self.label_frequencies.shape[0])))
            if stage is not None:
                self.reporter.step(rows.shape[0])
        return concatenate_topk(parts)

    def metrics(self, top: TopK) -> dict[str, float]:
        """Of results for the held-out instances."""
        assert self.held_out is not None
        report = evaluate_topk(
            top,
            self.held_out[1],
            ks=DEFAULT_KS,
            label_frequencies=self.label_frequencies,
            num_train=self.trainer.stream.num_instances,
            A=self.propensity[0],
            B=self.propensity[1],
        )
        return {name: report.metrics[name] for name in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")}

    def _predictor(self, reach: Reach) -> Predictor:
        """The model as it stands; its rows come scaled already."""
        if self.stored is not None:
            encoder, stored = self.stored
            found = stored.with_reach(reach) if isinstance(stored, CellIndex) else stored
            return Predictor(encoder, found, scaling=AS_GIVEN)
        softmax = self.trainer.softmax
        weight_LD = softmax.weight.detach()
        # A faster search needs the table in float32 and on the queries' device; on a GPU it copies half of it.
        whole = weight_LD.dtype != torch.float32 or weight_LD.device != softmax.bias.device
        whole = whole or (weight_LD.is_cuda and weight_LD.nbytes > _COPIED)
        index = build_index(weight_LD, softmax.bias.detach(), exact=whole)
        return Predictor(self.trainer.encoder, index, scaling=AS_GIVEN)
