"""Layer 2. The encoder: sparse feature rows -> query vectors. Before it: batches; after it: sampler and softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import nn

from xmc_midx.compiled import compiled
from xmc_midx.config import ModelConfig
from xmc_midx.device import empty_table
from xmc_midx.quantization import StoredTable, dequantize
from xmc_midx.rows import bag_rows, sparse_rows
from xmc_midx.types import SparseRows

__all__ = ["SparseEncoder", "StoredEncoder", "stored_encoder"]


_START_LENGTH = 3.0
"""Length of a feature's random start vector. Long ones keep more of the input's geometry while the table learns
(EXPERIMENTS.md)."""
_TABLE = "encoder.embedding"
_FEW = 8
"""Instances of a stored model from which on torch encodes them, not compiled code (EXPERIMENTS.md, "Latency")."""
_ENCODE_CHUNK = 4096
"""Instances encoded at once outside training."""


class SparseEncoder(nn.Module):
    """An embedding bag, an activation, optional square layers, dropout.

    `z = dropout(act(x E + e))`, then for each hidden layer `z = dropout(z + act(z H + h))` (without the sum where
    `residual` is off). Heavy dropout on ReLU units measured best on every dataset in ten epochs and more, little of it
    in shorter trainings (EXPERIMENTS.md, "Passes, dropout and rate").

    Parameters
    ----------
    num_features : F.
    dim : D, the size of the queries.
    num_hidden_layers : square (D, D) layers after the bag.
    activation : `"relu"` or `"none"`.
    residual : whether a hidden layer adds to its input; such a layer starts at zero, that is, at the identity.
    dropout : share of coordinates dropped in training, in [0, 1); drawn from `dropout.generator`, which the owner sets
        (None: torch's global generator).
    """

    def __init__(
        self,
        num_features: int,
        dim: int,
        *,
        num_hidden_layers: int = 0,
        activation: str = "relu",
        residual: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.embedding = nn.Parameter(empty_table(num_features, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        # skip_init: torch's own start values would draw from the global generator.
        self.hidden = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, dim, dim)  # type: ignore[no-untyped-call]
            for _ in range(num_hidden_layers)
        )
        self.activation: nn.Module = nn.ReLU() if activation == "relu" else nn.Identity()
        self.dropout = _SeededDropout(dropout)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start values: with L2-normalised rows, queries of about the same length whatever F and D."""
        dim = self.embedding.shape[1]
        with torch.no_grad():
            self.embedding.normal_(0.0, _START_LENGTH / math.sqrt(dim), generator=generator)
            self.bias.zero_()
            for layer in self.hidden:
                assert isinstance(layer, nn.Linear)
                layer.bias.zero_()
                if self.residual:
                    layer.weight.zero_()
                else:
                    layer.weight.normal_(0.0, math.sqrt(2.0 / dim), generator=generator)

    def forward(self, rows: SparseRows) -> torch.Tensor:
        """B sparse rows -> (B, D) float32 queries."""
        return self.layers(self.bags(rows))

    def bags(self, rows: SparseRows) -> torch.Tensor:
        """The products of B sparse rows with the feature table, (B, D) float32."""
        return bag_rows(self.embedding, rows)

    def layers(self, bag_BD: torch.Tensor) -> torch.Tensor:
        """What follows `bags`, (B, D) float32 -> (B, D)."""
        query_BD: torch.Tensor = self.dropout(self.activation(bag_BD + self.bias))
        for layer in self.hidden:
            update_BD = self.activation(layer(query_BD))
            query_BD = self.dropout(query_BD + update_BD if self.residual else update_BD)
        return query_BD

    def encode(self, features: csr_matrix) -> Iterator[tuple[slice, torch.Tensor]]:
        """The queries of (N, F) rows without dropout, chunk by chunk: `(rows of the chunk, (chunk, D) queries)`."""
        was_training, num_rows = self.training, features.shape[0]
        # Of a single instance, switching and slicing without need would be a third of the time.
        if was_training:
            self.eval()
        try:
            for begin in range(0, num_rows, _ENCODE_CHUNK):
                rows = slice(begin, min(begin + _ENCODE_CHUNK, num_rows))
                chunk = features if num_rows <= _ENCODE_CHUNK else features[rows]
                yield rows, self._encode(chunk)
        finally:
            if was_training:
                self.train()

    def encode_all(self, features: csr_matrix) -> torch.Tensor:
        """The queries (N, D) of all rows at once."""
        parts = [query_BD for _, query_BD in self.encode(features)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encode(self, features: csr_matrix) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self(sparse_rows(features).to(self.embedding.device))
        return found

    @property
    def num_features(self) -> int:
        return int(self.embedding.shape[0])


class StoredEncoder(SparseEncoder):
    """An encoder that only predicts, on the CPU: its feature table stays as it is stored, perhaps mapped.

    Parameters
    ----------
    table : (F, D).
    num_hidden_layers, activation, residual : as of `SparseEncoder`.
    """

    def __init__(self, table: StoredTable, **options: Any) -> None:
        super().__init__(0, table.shape[1], **options)
        self.table = table

    def _encode(self, features: csr_matrix) -> torch.Tensor:
        bag_BD = self.table.bag(features)
        if features.shape[0] >= _FEW:
            with torch.no_grad():
                return self.layers(torch.from_numpy(bag_BD))
        # Of a single row, torch's calls and the threads that they wake take longer than the arithmetic.
        is_relu = isinstance(self.activation, nn.ReLU)
        _activate(bag_BD, self.bias.detach().numpy(), is_relu)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            weight_DD, bias_D = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            bag_BD = _layer(bag_BD, weight_DD, bias_D, is_relu, self.residual)
        return torch.from_numpy(bag_BD)

    @property
    def num_features(self) -> int:
        return self.table.shape[0]


@compiled
def _activate(query_BD: Any, bias_D: Any, is_relu: bool) -> None:
    """Add the bias to each row; with ReLU, nothing below zero is left."""
    for row in range(query_BD.shape[0]):
        for column in range(query_BD.shape[1]):
            value = query_BD[row, column] + bias_D[column]
            query_BD[row, column] = max(value, np.float32(0.0)) if is_relu else value


@compiled(fastmath={"reassoc", "contract"})
def _layer(query_BD: Any, weight_DD: Any, bias_D: Any, is_relu: bool, is_residual: bool) -> Any:
    """(B, D) float32: the activation of `query weight.T + bias`, and the query besides if residual."""
    found_BD = np.empty_like(query_BD)
    for row in range(query_BD.shape[0]):
        query = query_BD[row]
        for place in range(query.shape[0]):
            weight, total = weight_DD[place], np.float32(0.0)
            for column in range(query.shape[0]):
                total += query[column] * weight[column]
            found_BD[row, place] = total
    _activate(found_BD, bias_D, is_relu)
    return found_BD + query_BD if is_residual else found_BD


def stored_encoder(
    model: Mapping[str, np.ndarray], config: ModelConfig, device: torch.device | str = "cpu"
) -> SparseEncoder:
    """The encoder of a model's arrays, as they are stored; on the CPU its feature table stays so.

    Parameters
    ----------
    model : holds `encoder.*` (`quantization.quantize`); a LookupError, ValueError or RuntimeError where it does not.
    """
    prefix, device = "encoder.", torch.device(device)
    options = config.model_dump(include={"num_hidden_layers", "activation", "residual"})
    table = StoredTable.take(model, _TABLE)
    # All but the table is small.
    others = {name: array for name, array in model.items() if name.startswith(prefix) and not name.startswith(_TABLE)}
    state = {name.removeprefix(prefix): torch.from_numpy(array) for name, array in dequantize(others).items()}
    if device.type == "cpu":
        encoder: SparseEncoder = StoredEncoder(table, **options)
        state["embedding"] = torch.empty(0, table.shape[1])
    else:
        encoder = SparseEncoder(*table.shape, **options)
        state["embedding"] = torch.from_numpy(table.rows())
    encoder.load_state_dict(state, assign=True)
    return encoder.to(device)


class _SeededDropout(nn.Module):
    """Dropout with a generator of its own: a run does not depend on, or disturb, torch's global one.

    The rate is rounded to 256ths, so that one random number of 64 bits decides on eight coordinates.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        dropped = min(round(256 * self.rate), 255)
        if not self.training or dropped == 0:
            return values
        words = torch.empty(-(-values.numel() // 8), dtype=torch.int64, device=values.device)
        words.random_(-(2**63), None, generator=self.generator)
        kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
        return values * (kept * (256.0 / (256.0 - dropped)))
