"""Claims about `xmc_midx.encoder`: its dropout drops what it says, few instances are encoded as many are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import random as random_rows

from xmc_midx.config import ModelConfig
from xmc_midx.encoder import SparseEncoder, stored_encoder
from xmc_midx.quantization import quantize
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


@pytest.mark.parametrize("storage", ["int4", "int8", "float32"])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize(("num_hidden_layers", "residual"), [(0, True), (1, True), (1, False), (3, True), (2, False)])
def test_few_instances_of_a_stored_model_are_encoded_as_many_are(
    num_hidden_layers: int, residual: bool, activation: str, storage: str
) -> None:
    """By compiled code those, by torch these."""
    settings = {"num_hidden_layers": num_hidden_layers, "activation": activation, "residual": residual}
    dim = 34 if storage == "int4" else 33
    encoder = SparseEncoder(60, dim, **settings)
    generator = torch.Generator().manual_seed(num_hidden_layers)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    arrays = {f"encoder.{name}": tensor.numpy() for name, tensor in encoder.state_dict().items()}
    kept = quantize(arrays, storage, large={"encoder.embedding"})
    assert (f"encoder.embedding.{storage}" in kept) == (storage != "float32")
    stored = stored_encoder(kept, ModelConfig(dim=dim, **settings))
    features = random_rows(40, 60, density=0.2, format="csr", dtype=np.float32, random_state=0)
    features.data -= 0.3
    many = torch.cat([query for _, query in stored.encode(features)])
    assert (many < 0).any() == (activation == "none")
    for few in (1, 3, 7):
        found = torch.cat([query for _, query in stored.encode(features[:few])])
        assert not found.requires_grad
        torch.testing.assert_close(found, many[:few], rtol=1e-5, atol=1e-5)
