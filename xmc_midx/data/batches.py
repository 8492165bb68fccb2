"""Layer 3. A training split -> batches, in a seeded order that can be taken up again at any step.

Before it: the dataset; after it: the encoder. The order of an epoch depends on the seed and the epoch alone, so a
position is two numbers, and a resumed run sees the batches that the interrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmc_midx.padding import rounded_up
from xmc_midx.rows import sparse_rows
from xmc_midx.types import Batch, SparseRows

__all__ = ["BatchStream", "made_ahead"]

_T = TypeVar("_T")


class BatchStream:
    """Shuffled batches of a training split.

    Parameters
    ----------
    features : (N, F) float32.
    labels : (N, L); a stored value is a positive, whatever its size.
    batch_size : B; the last batch of an epoch holds what is left.
    seed : of the orders.
    row_numbers : (N,) what the batches call the instances; None: 0..N-1.
    """

    def __init__(
        self,
        features: csr_matrix,
        labels: csr_matrix,
        *,
        batch_size: int,
        seed: int,
        row_numbers: np.ndarray | None = None,
    ) -> None:
        assert features.shape[0] == labels.shape[0], "features and labels are rows of the same instances"
        self.features, self.labels, self.row_numbers = features, labels, row_numbers
        self.batch_size, self.seed = batch_size, seed

    @property
    def num_instances(self) -> int:
        return int(self.features.shape[0])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_instances // self.batch_size)

    def epoch(self, epoch: int, *, first_step: int = 0, sizes: tuple[int, int] | None = None) -> Iterator[Batch]:
        """The batches of one epoch (counted from 1), from step `first_step` (counted from 0) on; with pads up to
        `sizes`, where they are given."""
        order = self._order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            batch = self._batch(order[step * self.batch_size : (step + 1) * self.batch_size])
            yield batch if sizes is None else self._padded(batch, *sizes)

    def sizes(self, epoch: int) -> tuple[int, int]:
        """Feature entries and positives of an epoch's largest batches, rounded up: epochs have few different sizes."""
        order, begins = self._order(epoch), np.arange(0, self.num_instances, self.batch_size)
        largest = (np.add.reduceat(np.diff(rows.indptr)[order], begins).max() for rows in (self.features, self.labels))
        num_entries, num_positives = (rounded_up(max(int(size), 1)) for size in largest)
        return num_entries, num_positives

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_instances)

    def _padded(self, batch: Batch, num_entries: int, num_positives: int) -> Batch:
        rows = batch.features
        features = SparseRows(
            feature_ids=_filled(rows.feature_ids, num_entries, self.features.shape[1]),
            values=_filled(rows.values, num_entries, 0.0),
            offsets=rows.offsets,
        )
        positives = _filled(batch.positives, num_positives, self.labels.shape[1])
        return replace(batch, features=features, positives=positives)

    def _batch(self, instances: np.ndarray) -> Batch:
        labels = self.labels[instances]
        return Batch(
            features=sparse_rows(self.features[instances]),
            positives=torch.from_numpy(labels.indices.astype(np.int64)),
            positive_offsets=torch.from_numpy(labels.indptr.astype(np.int64)),
            instance_ids=torch.from_numpy(instances if self.row_numbers is None else self.row_numbers[instances]),
        )


def _filled(values: torch.Tensor, size: int, pad: float) -> torch.Tensor:
    filled = values.new_full((size,), pad)
    filled[: values.shape[0]] = values
    return filled


def made_ahead(things: Iterator[_T]) -> Iterator[_T]:
    """The same things in the same order; a thread makes the next one while the last one is in use.

    What making one raises is raised here, in its turn.
    """
    end = object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, things, end)
        while (thing := following.result()) is not end:
            following = pool.submit(next, things, end)
            yield thing  # type: ignore[misc]  # not the end
