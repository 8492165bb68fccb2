"""Layer 5. What is exported, and how well an export finds what the exact search finds.

Before it: a run; after it: the three formats. Recall is that of the model alone, without neighbours: its index is what
an export holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.calibration import Calibration
from xmc_midx.device import find_device
from xmc_midx.diagnostics import TrainedModel
from xmc_midx.interpolation import Interpolation
from xmc_midx.rundir import RunDirectory
from xmc_midx.topk import exact_topk

__all__ = ["MEASURED_K", "TARGET_RECALL", "ExportSource", "Measurement", "Queries", "seconds_each", "tune"]

MEASURED_K = 5
TARGET_RECALL = 0.99
"""Of recall@5: what an index is set to, where it can."""
_TIMED_QUERIES = 200

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Queries (B, D) -> (B, `MEASURED_K`) label ids, -1 where nothing was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One way to search, against the exact scan."""

    name: str
    recall_1: float | None
    """Share of the exact best labels that are found, in [0, 1]; None where there were no instances to measure on."""
    recall_5: float | None
    """Share of the exact five best labels that are among the five found."""
    microseconds: float | None
    """Of a query, one at a time; mean."""
    settings: Mapping[str, int]
    """What was chosen so that recall@5 is 0.99 or more, where it can be."""

    @classmethod
    def missing(cls, name: str, settings: Mapping[str, int]) -> Measurement:
        """Of no instances."""
        return cls(name=name, recall_1=None, recall_5=None, microseconds=None, settings=settings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "recall@1": self.recall_1,
            "recall@5": self.recall_5,
            "microseconds_per_query": self.microseconds,
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportSource:
    """A model on the CPU, with all that a prediction needs."""

    directory: RunDirectory
    model: TrainedModel
    interpolation: Interpolation
    calibration: Calibration | None
    label_names: Sequence[str] | None
    has_vocabulary: bool

    @classmethod
    def load(cls, run: str | Path) -> ExportSource:
        """The best model of a run directory, its files verified.

        Raises
        ------
        DataError : a file is missing or damaged.
        """
        directory = RunDirectory.open(run)
        added = directory.added()
        return cls(
            directory=directory,
            model=TrainedModel.load(directory, find_device("cpu")),
            interpolation=added.settings,
            calibration=added.calibration,
            label_names=directory.label_names(),
            has_vocabulary=directory.vocabulary() is not None,
        )

    @property
    def num_labels(self) -> int:
        """L, of the data."""
        return self.model.known_labels.num_labels

    @property
    def num_rows(self) -> int:
        """R, of the label table: labels that the model knows."""
        return int(self.model.bias.shape[0])

    @property
    def num_features(self) -> int:
        return self.model.num_features

    @property
    def dim(self) -> int:
        return int(self.model.encoder.embedding.shape[1])

    def feature_table(self) -> NDArray[np.float32]:
        """(F, D) feature vectors; zeros of those that the model does not know."""
        rows, kept = self.model.encoder.embedding.detach().float().numpy(), self.model.scaling.kept
        if kept is None:
            return rows
        table_FD = np.zeros((self.num_features, self.dim), dtype=np.float32)
        table_FD[kept] = rows
        return table_FD

    def table(self) -> NDArray[np.float32]:
        """(R, D) label vectors."""
        return self.model.label_table.float().numpy()

    def bias(self) -> NDArray[np.float32]:
        """(R,)."""
        return self.model.bias.float().numpy()

    def exact_ids(self, query_ND: torch.Tensor) -> NDArray[np.int64]:
        """(N, `MEASURED_K`) the best labels by the full scan; -1 where there are fewer."""
        top = exact_topk(query_ND, self.model.label_table, self.model.bias, MEASURED_K)
        return self.model.known_labels.labels_of(top.label_ids)

    def facts(self) -> dict[str, Any]:
        """What every export's JSON says of the model."""
        config = self.model.config.model
        return {
            "num_features": self.num_features,
            "num_labels": self.num_labels,
            "num_label_rows": self.num_rows,
            "dim": self.dim,
            "num_hidden_layers": config.num_hidden_layers,
            "activation": config.activation,
            "residual": config.residual,
            "weighting": "none" if self.model.scaling.idf is None else "tf-idf",
            "normalize": self.model.scaling.normalize,
            "num_train": self.model.num_train,
        }

    def copy_names(self, target: Path) -> None:
        """Label names and vocabulary, where the run has them."""
        for name, there in (("labels.txt", self.label_names is not None), ("vocabulary.txt", self.has_vocabulary)):
            if there:
                (target / name).write_bytes((self.directory.path / name).read_bytes())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Queries:
    """Instances that an export is measured on."""

    features: csr_matrix
    """(N, F), as they come."""
    vectors: NDArray[np.float32]
    """(N, D) float32."""
    exact_ids: NDArray[np.int64]
    """(N, K) int64: the `MEASURED_K` best labels by the full scan; -1 where there are fewer labels."""
    exact_microseconds: float

    @classmethod
    @torch.no_grad()
    def build(cls, source: ExportSource, features: csr_matrix) -> Queries | None:
        """None of no instances."""
        if not features.shape[0]:
            return None
        query_ND = source.model.encode(source.model.scaling(features))
        table, bias = source.model.label_table, source.model.bias
        exact = source.exact_ids(query_ND)
        seconds = seconds_each(lambda row: exact_topk(query_ND[row], table, bias, MEASURED_K), len(query_ND))
        return cls(features=features, vectors=query_ND.numpy(), exact_ids=exact, exact_microseconds=1e6 * seconds)

    def recall(self, found_NK: NDArray[np.int64], k: int) -> float:
        """Mean share of the exact k best labels that are among the k found."""
        exact = self.exact_ids[:, :k]
        hits = (found_NK[:, :k, None] == exact[:, None, :]) & (exact[:, None, :] >= 0)
        return float(hits.any(axis=1).sum() / max((exact >= 0).sum(), 1))

    def measure(self, name: str, search: Search, settings: Mapping[str, int]) -> Measurement:
        found = search(self.vectors)
        seconds = seconds_each(lambda row: search(self.vectors[row]), len(self.vectors))
        return Measurement(
            name=name,
            recall_1=self.recall(found, 1),
            recall_5=self.recall(found, MEASURED_K),
            microseconds=1e6 * seconds,
            settings=settings,
        )

    def exact(self) -> Measurement:
        """The full scan itself."""
        return Measurement(name="exact", recall_1=1.0, recall_5=1.0, microseconds=self.exact_microseconds, settings={})


def tune(queries: Queries | None, search_at: Callable[[int], Search], *, first: int, last: int) -> int:
    """The smallest of first, 1.5 first, 2.25 first, ... that brings recall@5 to `TARGET_RECALL`, at most `last`.

    Without instances to measure on, `last / 8`.
    """
    if queries is None:
        return max(first, last // 8)
    effort = min(first, last)
    while effort < last and queries.recall(search_at(effort)(queries.vectors), MEASURED_K) < TARGET_RECALL:
        effort = min(effort + effort // 2 + 1, last)
    return effort


def seconds_each(search: Callable[[slice], object], num_queries: int) -> float:
    """Mean seconds of a search that is given one query at a time; the first one is not counted."""
    count = min(num_queries, _TIMED_QUERIES)
    search(slice(0, 1))
    started = time.perf_counter()
    for row in range(count):
        search(slice(row, row + 1))
    return (time.perf_counter() - started) / count
