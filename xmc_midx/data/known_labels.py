"""Layer 2. The labels that training instances have: they alone get rows in a model.

A label that no instance has is a negative of every step and a positive of none: its row learns to stay away, and costs
what the others cost. Vocabularies of libraries are full of them. Before it: the training split. After it: the trainer,
and whatever answers with its label ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.config import DataConfig
from xmc_midx.data.features import columns, kept_columns, used_columns

__all__ = ["LABEL_IDS", "NUM_LABELS", "KnownLabels"]

LABEL_IDS, NUM_LABELS = "train.label_ids", "train.num_labels"
"""What a model calls them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KnownLabels:
    """Which of L labels a model has rows for, and which row each has."""

    num_labels: int
    """L, of the data."""
    ids: NDArray[np.int32] | None = None
    """(R,) rising ids, row by row; None: all L."""

    @classmethod
    def fit(cls, config: DataConfig, labels: csr_matrix) -> KnownLabels:
        """Of the training split (N, L), as a resolved configuration says."""
        ids = used_columns(labels) if config.unused_labels == "drop" else None
        return cls(num_labels=labels.shape[1], ids=ids)

    @classmethod
    def of(cls, config: DataConfig, model: Mapping[str, Any], num_rows: int) -> KnownLabels:
        """Those of a trained model; a LookupError or ValueError where an array is not there, or of another table.

        Parameters
        ----------
        model : holds what `arrays` gave.
        num_rows : R, of the label table.
        """
        if config.unused_labels != "drop":
            return cls(num_labels=num_rows)
        ids, num_labels = kept_columns(model, LABEL_IDS, NUM_LABELS, num_rows)
        return cls(num_labels=num_labels, ids=ids)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a model keeps of it."""
        return {} if self.ids is None else {LABEL_IDS: self.ids, NUM_LABELS: np.array(self.num_labels, dtype=np.int64)}

    def equals(self, other: KnownLabels) -> bool:
        """Whether both number the same labels alike."""
        if self.ids is None or other.ids is None:
            return self.ids is other.ids and self.num_labels == other.num_labels
        return self.num_labels == other.num_labels and np.array_equal(self.ids, other.ids)

    def __call__(self, labels: csr_matrix) -> csr_matrix:
        """(N, L) -> (N, R): of each instance the labels that have a row."""
        return labels if self.ids is None else columns(labels, self.ids)

    def rows_of(self, label_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of labels in 0..L-1, of those that have one."""
        if self.ids is None:
            return label_ids
        rows = np.minimum(np.searchsorted(self.ids, label_ids), len(self.ids) - 1)
        found: NDArray[np.int64] = rows[self.ids[rows] == label_ids]
        return found

    def labels_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The label of each row; -1 of -1."""
        return rows if self.ids is None else np.where(rows < 0, np.int64(-1), self.ids[rows])

    def take(self, values: NDArray[Any]) -> NDArray[Any]:
        """(L, ...) of the labels -> (R, ...) of the rows."""
        return values if self.ids is None else values[self.ids]

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """(R, ...) of the rows -> (L, ...) of the labels, zeros where there is no row."""
        if self.ids is None:
            return values
        found = np.zeros((self.num_labels, *values.shape[1:]), dtype=values.dtype)
        found[self.ids] = values
        return found
