"""A classifier of one's own on real text: with 64 draws a batch, `MIDXSoftmax` reaches what scoring all labels reaches.

Nothing here is this tool's but the data and the module under test: words -> EmbeddingBag -> ReLU -> Linear -> labels,
trained with torch.optim, two epochs of batches of 32 packages. All heads start from the same values.

Measured, seeds 0 to 7, 2,167 test packages (one standard error of a P@1 is 0.8 points), with all labels scored, and the
mean and the worst difference to it with 64 draws, in points:

    several labels a package, LabelSoftmax(sampler=None):    P@1 84.9, -0.4, -1.3    P@5 52.7, -0.7, -1.0
    one label, cross_entropy on the logits of nn.Linear:     P@1 73.7, -0.4, -1.2    P@5 44.7, -0.5, -1.0

A batch is scored against 128 and 75 of the 495 labels in the mean: its own positives and the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.sparse import csr_matrix
from torch import nn
from torch.utils.data import DataLoader

from xmc_midx import MIDXSoftmax, XmcDataset, load_dataset
from xmc_midx.softmax import LabelSoftmax

DIM, BATCH, EPOCHS, RATE, NUM_DRAWS = 64, 32, 2, 0.01, 64
TOLERANCE = 0.02
"""Of P@1 and P@5, as shares: half as much again as the worst of eight seeds."""


@pytest.fixture(scope="module")
def debtags() -> XmcDataset:
    return load_dataset("debtags")


class Encoder(nn.Module):
    """A bag of weighted words and a hidden layer."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(num_words, DIM, mode="sum", sparse=True)
        self.hidden = nn.Linear(DIM, DIM)

    def forward(self, rows: csr_matrix) -> torch.Tensor:
        ids, offsets = torch.from_numpy(rows.indices).long(), torch.from_numpy(rows.indptr[:-1]).long()
        bags = self.words(ids, offsets, per_sample_weights=torch.from_numpy(rows.data))
        queries: torch.Tensor = self.hidden(torch.relu(bags))
        return queries


def ragged(labels: csr_matrix) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(labels.indices).long(), torch.from_numpy(labels.indptr).long()


def train(
    data: XmcDataset, head: nn.Module, loss_of: Callable[[torch.Tensor, np.ndarray], torch.Tensor], *, seed: int = 0
) -> tuple[Encoder, nn.Module]:
    """`loss_of(queries, rows)`: the head's loss of the training packages `rows`."""
    features = data.train.features
    torch.manual_seed(seed)
    encoder = Encoder(features.shape[1])
    start = nn.Linear(DIM, data.train.labels.shape[1])
    head.load_state_dict(start.state_dict())
    optimizers = [
        torch.optim.SparseAdam(encoder.words.parameters(), lr=RATE),
        torch.optim.AdamW([*encoder.hidden.parameters(), *head.parameters()], lr=RATE, weight_decay=0.0),
    ]
    loader = DataLoader(
        range(features.shape[0]),  # type: ignore[arg-type]
        batch_size=BATCH,
        shuffle=True,
        collate_fn=np.asarray,
        generator=torch.Generator().manual_seed(seed),
    )
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, EPOCHS * len(loader)) for o in optimizers]
    for _ in range(EPOCHS):
        if isinstance(head, LabelSoftmax):
            head.refresh()
        for rows in loader:
            loss = loss_of(encoder(features[rows]), rows)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for step in (*optimizers, *schedules):
                step.step()
    return encoder, head


@torch.no_grad()
def precision(data: XmcDataset, encoder: Encoder, head: nn.Module) -> tuple[float, float]:
    """P@1 and P@5 on the test packages, as shares."""
    queries: Any = encoder(data.test.features)
    top = head.topk(queries, 5).label_ids if isinstance(head, LabelSoftmax) else head(queries).topk(5).indices.numpy()
    hits = np.take_along_axis(data.test.labels.toarray(), top, axis=1)
    return float(hits[:, 0].mean()), float(hits.mean())


def test_with_several_labels_a_package_64_draws_reach_the_full_softmax(debtags: XmcDataset) -> None:
    labels = debtags.train.labels
    sampled, full = (
        MIDXSoftmax(labels.shape[1], DIM, num_draws=NUM_DRAWS),
        LabelSoftmax(labels.shape[1], DIM, sampler=None),
    )
    found, expected = (
        precision(debtags, *train(debtags, head, lambda queries, rows, head=head: head(queries, ragged(labels[rows]))))
        for head in (sampled, full)
    )
    assert full.pool_size == labels.shape[1] == 495 and sampled.pool_size < 495 / 3
    assert expected[0] > 0.82 and expected[1] > 0.5, "there is something to reach"
    assert found[0] > expected[0] - TOLERANCE and found[1] > expected[1] - TOLERANCE


def test_with_one_label_a_package_64_draws_reach_cross_entropy(debtags: XmcDataset) -> None:
    labels = debtags.train.labels
    counts = np.diff(labels.indptr)
    assert counts.min() > 0
    one = torch.from_numpy(labels.indices[labels.indptr[:-1] + np.random.default_rng(0).integers(0, counts)]).long()
    sampled, linear = MIDXSoftmax(labels.shape[1], DIM, num_draws=NUM_DRAWS), nn.Linear(DIM, labels.shape[1])
    found = precision(debtags, *train(debtags, sampled, lambda queries, rows: sampled(queries, one[rows])))
    expected = precision(
        debtags, *train(debtags, linear, lambda queries, rows: F.cross_entropy(linear(queries), one[rows]))
    )
    assert sampled.pool_size <= NUM_DRAWS + BATCH
    assert expected[0] > 0.7 and expected[1] > 0.42, "there is something to reach"
    assert found[0] > expected[0] - TOLERANCE and found[1] > expected[1] - TOLERANCE
