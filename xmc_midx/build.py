"""Layer 5. A resolved configuration -> the parts it describes: encoder, sampler, label softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from xmc_midx.config import Config
from xmc_midx.device import find_precision
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import UsageError
from xmc_midx.samplers.dense import SoftmaxSampler
from xmc_midx.samplers.dynamic import HardNegativeSampler
from xmc_midx.samplers.kernel import QuadraticKernelSampler, RandomFeatureSampler
from xmc_midx.samplers.lsh import LshSampler
from xmc_midx.samplers.static import FrequencySampler, InBatchSampler, UniformSampler
from xmc_midx.softmax import LabelSoftmax, MIDXSoftmax
from xmc_midx.types import Sampler

__all__ = ["build_encoder", "build_softmax"]


def build_encoder(config: Config, num_features: int) -> SparseEncoder:
    """The encoder that a resolved configuration describes, on the CPU, its table not yet filled."""
    model = config.model
    assert isinstance(model.dim, int) and not isinstance(model.dropout, str), "the configuration is resolved"
    return SparseEncoder(
        num_features,
        model.dim,
        num_hidden_layers=model.num_hidden_layers,
        activation=model.activation,
        residual=model.residual,
        dropout=model.dropout,
    )


def build_softmax(config: Config, frequencies: np.ndarray, num_instances: int, device: torch.device) -> LabelSoftmax:
    """The label table with its sampler, on `device`.

    Parameters
    ----------
    config : resolved.
    frequencies : (L,) int64, instances of each label among those that train the model.
    num_instances : N, of those that train the model.
    device : of training.
    """
    model, options, seed = config.model, config.sampler, config.training.seed
    assert isinstance(model.dim, int) and isinstance(options.num_draws, int), "the configuration is resolved"
    common: dict[str, Any] = {
        "estimator": options.estimator,
        "num_draws": options.num_draws,
        "bias": model.label_bias,
        "weighting": config.loss.weighting,
        "decoupled": config.loss.decoupled,
        "sparse": True,
        "precision": find_precision(config.training.precision, device),
        "seed": seed,
    }
    counts_L = torch.from_numpy(frequencies).to(device)
    num_labels = frequencies.shape[0]
    if options.name.startswith("midx-"):
        assert isinstance(options.num_codewords, int), "the configuration is resolved"
        softmax: LabelSoftmax = MIDXSoftmax(
            num_labels,
            model.dim,
            num_codewords=options.num_codewords,
            quantizer=options.name.removeprefix("midx-"),
            prior=options.prior,
            label_frequencies=counts_L,
            frequency_power=options.frequency_power,
            **common,
        )
        return softmax.to(device)
    sampler: Sampler | None = None
    if options.name == "uniform":
        sampler = UniformSampler(num_labels)
    elif options.name == "frequency":
        sampler = FrequencySampler(counts_L, power=options.frequency_power)
    elif options.name == "in-batch":
        if options.estimator != "pool":
            raise UsageError("sampler in-batch shares its negatives: it needs sampler.estimator=pool.")
        sampler = InBatchSampler(counts_L, num_instances=num_instances)
    elif options.name == "quadratic-kernel":
        sampler = QuadraticKernelSampler()
    elif options.name == "rff":
        sampler = RandomFeatureSampler(seed=seed)
    elif options.name == "lsh":
        sampler = LshSampler(seed=seed)
    elif options.name == "hard-negatives":
        sampler = HardNegativeSampler()
    elif options.name == "softmax":
        sampler = SoftmaxSampler()
    return LabelSoftmax(num_labels, model.dim, sampler=sampler, **common).to(device)
