"""Claims about `xmc_midx.encoder`: its dropout drops what it says, wherever a coordinate stands."""

from __future__ import annotations

import pytest
import torch

from xmc_midx.encoder import SparseEncoder
from xmc_midx.types import SparseRows


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999])
def test_dropout_drops_its_share_of_every_coordinate_and_keeps_the_mean(rate: float) -> None:
    encoder = SparseEncoder(1, 203, activation="none", dropout=rate)
    encoder.dropout.generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        encoder.embedding.fill_(1.0)
    count = 4001
    rows = SparseRows(
        feature_ids=torch.zeros(count, dtype=torch.int64), values=torch.ones(count), offsets=torch.arange(count + 1)
    )
    found = encoder(rows).detach()
    dropped = min(round(256 * rate), 255) / 256
    share = (found == 0).float().mean(dim=0)
    # Five standard errors: 203 coordinates, and the runs of eight that share a random number.
    assert (share - dropped).abs().max() <= 5 * (dropped * (1 - dropped) / count) ** 0.5
    torch.testing.assert_close(found[found != 0], torch.full_like(found[found != 0], 1 / (1 - dropped)))
    together = torch.corrcoef(found[:, :24].T) if dropped > 0 else torch.eye(24)
    assert (together - torch.eye(24)).abs().max() < 5 / count**0.5
    assert torch.equal(encoder.eval()(rows), torch.ones(count, 203)), "nothing is dropped outside training"


def test_the_same_seed_drops_the_same() -> None:
    values = []
    for _ in range(2):
        encoder = SparseEncoder(1, 9, activation="none", dropout=0.5)
        encoder.dropout.generator = torch.Generator().manual_seed(7)
        values.append(encoder.dropout(torch.ones(5, 9)))
    assert torch.equal(*values)
