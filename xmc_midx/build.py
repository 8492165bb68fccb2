"""Layer 5. A resolved configuration -> the parts it describes: encoder, sampler, label softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from xmc_midx.config import Config, SamplerConfig
from xmc_midx.device import find_precision
from xmc_midx.encoder import SparseEncoder
from xmc_midx.recipe import require_estimator
from xmc_midx.samplers.dense import SoftmaxSampler
from xmc_midx.samplers.dynamic import HardNegativeSampler
from xmc_midx.samplers.kernel import QuadraticKernelSampler, RandomFeatureSampler
from xmc_midx.samplers.lsh import LshSampler
from xmc_midx.samplers.midx import MidxSampler
from xmc_midx.samplers.static import FrequencySampler, InBatchSampler, UniformSampler
from xmc_midx.softmax import LabelSoftmax, MIDXSoftmax
from xmc_midx.types import Sampler

__all__ = ["build_encoder", "build_sampler", "build_softmax"]


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
    frequencies : (L,) integers, instances of each label among those that train the model.
    num_instances : N, of those that train the model.
    device : of training.

    Raises
    ------
    UsageError : the sampler cannot do with a label table in the host's memory.
    """
    model, options = config.model, config.sampler
    assert isinstance(model.dim, int) and isinstance(options.num_draws, int), "the configuration is resolved"
    assert isinstance(options.pool_instances, int) and options.gradient_negatives != "auto", (
        "the configuration is resolved"
    )
    frequency_L = torch.from_numpy(frequencies).to(device)
    common: dict[str, Any] = {
        "estimator": options.estimator,
        "num_draws": options.num_draws,
        "pool_instances": options.pool_instances,
        "gradient_negatives": None if options.gradient_negatives == "all" else options.gradient_negatives,
        "correction_power": options.correction_power,
        "bias": model.label_bias,
        "weighting": config.loss.weighting,
        "decoupled": config.loss.decoupled,
        "sparse": True,
        "precision": find_precision(config.training.precision, device, len(frequencies)),
        "seed": config.training.seed,
        "device": device,
        "table_device": "cpu" if model.label_memory == "host" else None,
        "dtype": torch.bfloat16 if model.label_precision == "bfloat16" else torch.float32,
    }
    size = {"num_labels": frequencies.shape[0], "dim": model.dim}
    sampled = options.positives == "sampled"
    if options.name.startswith("midx-"):
        common |= _midx_options(options, frequency_L) | {"num_instances": num_instances if sampled else None}
        return MIDXSoftmax(**size, **common)
    sampler = build_sampler(config, frequency_L, num_instances)
    in_batch = InBatchSampler(frequency_L, num_instances=num_instances) if sampled else None
    return LabelSoftmax(**size, sampler=sampler, in_batch=in_batch, **common)


def build_sampler(config: Config, frequency_L: torch.Tensor, num_instances: int) -> Sampler | None:
    """The sampler that a resolved configuration names, not yet fitted to a table; None for the full softmax.

    Parameters
    ----------
    frequency_L : (L,) instances of each label, on the device of training.
    num_instances : N.

    Raises
    ------
    UsageError : the sampler does not go with the estimator.
    """
    options, seed, num_labels = config.sampler, config.training.seed, frequency_L.shape[0]
    if options.name.startswith("midx-"):
        return MidxSampler(**_midx_options(options, frequency_L), seed=seed)
    require_estimator(options)
    samplers: dict[str, Callable[[], Sampler | None]] = {
        "uniform": lambda: UniformSampler(num_labels),
        "frequency": lambda: FrequencySampler(frequency_L, power=options.frequency_power),
        "in-batch": lambda: InBatchSampler(frequency_L, num_instances=num_instances),
        "quadratic-kernel": QuadraticKernelSampler,
        "rff": lambda: RandomFeatureSampler(seed=seed),
        "lsh": lambda: LshSampler(seed=seed),
        "hard-negatives": HardNegativeSampler,
        "softmax": SoftmaxSampler,
        "full": lambda: None,
    }
    return samplers[options.name]()


def _midx_options(options: SamplerConfig, frequency_L: torch.Tensor) -> dict[str, Any]:
    """What `MIDXSoftmax` and `MidxSampler` take alike."""
    assert isinstance(options.num_codewords, int), "the configuration is resolved"
    return {
        "quantizer": options.name.removeprefix("midx-"),
        "num_codewords": options.num_codewords,
        "prior": options.prior,
        "label_frequencies": frequency_L,
        "frequency_power": options.frequency_power,
        "refresh_iterations": options.refresh_iterations,
    }
