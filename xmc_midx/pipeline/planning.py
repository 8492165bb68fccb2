"""Layer 6. What a training will need beside what there is: `plan`, and the refusal of a training that does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xmc_midx.config import Config, GivenConfig, as_config
from xmc_midx.data.dataset import Data, Split, XmcDataset, load_dataset
from xmc_midx.errors import ResourceError
from xmc_midx.paths import home_path
from xmc_midx.pipeline.inputs import shape_of, training_split
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.types import Reporter, SilentReporter

if TYPE_CHECKING:
    import torch

    from xmc_midx.forecast import Forecast, TrainingData

__all__ = ["Plan", "fit_to_memory", "memory_failures", "models_at_once", "plan", "refuse_what_does_not_fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a training will need, beside what there is."""

    forecast: Forecast
    available_memory: int | None
    """Bytes that the process can get in all; None where the system does not say."""
    available_disk: int
    """Bytes free where the run directory would be."""
    config: Config
    """Resolved."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `plan`."""
        return {
            "memory_bytes": self.forecast.host_bytes,
            "memory": dict(self.forecast.host),
            "available_memory_bytes": self.available_memory,
            "device_memory_bytes": self.forecast.device_bytes,
            "device_memory": dict(self.forecast.device),
            "disk_bytes": self.forecast.disk_bytes,
            "checkpoint_bytes": self.forecast.checkpoint_bytes,
            "available_disk_bytes": self.available_disk,
            "seconds": self.forecast.seconds,
            "finish_seconds": self.forecast.finish_seconds,
            "step_seconds": dict(self.forecast.step),
            "bound": self.bound,
            "config": self.config.model_dump(),
        }

    @property
    def bound(self) -> str | None:
        """What limits the training: `memory` where it does not fit, else the longest part of a step."""
        too_large = self.available_memory is not None and self.forecast.host_bytes > self.available_memory
        return "memory" if too_large else self.forecast.bound


def plan(
    data: Data | TrainingData,
    *,
    output: str | Path = ".",
    config: GivenConfig | None = None,
    test: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Plan:
    """Forecast memory, disk and time of a training, without training.

    Parameters
    ----------
    data, config, test : as in `train`; or the counts of a collection (`TrainingData.of_shape`).
    output : where the run directory would be.
    """
    from xmc_midx.device import available_memory_bytes, find_device, find_precision, measure_speed, used_memory_bytes
    from xmc_midx.forecast import Speed, TrainingData, forecast
    from xmc_midx.slopes import rounds_slopes

    reporter = reporter or SilentReporter()
    config = as_config(config)
    if isinstance(data, TrainingData):
        shape = DataShape(
            num_instances=data.num_instances,
            num_features=data.feature_counts.shape[0],
            num_labels=data.label_counts.shape[0],
            num_positives=int(data.label_counts.sum()),
            num_used_features=int(np.count_nonzero(data.feature_counts)),
            num_used_labels=int(np.count_nonzero(data.label_counts)),
        )
    else:
        reporter.start("read", None)
        dataset = load_dataset(data, test=test)
        training = training_split(dataset, data)
        shape, data = shape_of(dataset, training), _training_data(dataset, training)
        del dataset, training
    resolved = resolve(config, shape)
    available = available_memory_bytes()
    if available is not None:
        available += used_memory_bytes()
    batch, dim, draws = resolved.training.batch_size, resolved.model.dim, resolved.sampler.num_draws
    assert isinstance(batch, int) and isinstance(dim, int) and isinstance(draws, int), "the configuration is resolved"
    device = find_device(resolved.training.device)
    num_labels = shape.of_rows(resolved.data).num_labels
    precision = find_precision(resolved.training.precision, device, num_labels)
    size = min(batch, shape.num_instances, 4096), min(draws, num_labels, 8192), min(dim, 4096)
    flops, rate = measure_speed(*size, precision, device)
    speed = Speed(flops=flops, bytes=rate, rounds_slopes=rounds_slopes(device))
    if config.training.models_at_once == "auto":
        resolved = _fitted(resolved, data, device)
    return Plan(
        forecast=forecast(_as_trained(resolved, device), data, cuda=device.type == "cuda", speed=speed),
        available_memory=available,
        available_disk=_free_disk(home_path(output)),
        config=resolved,
    )


_CERTAINTY = 0.8
"""A training is refused where even this share of its forecast is not there; the forecast is good to 20%."""


def fit_to_memory(config: Config, dataset: XmcDataset, training: Split, reporter: Reporter) -> Config:
    """The resolved configuration; with models one after the other, where memory does not hold as many at once."""
    from xmc_midx.device import find_device

    device = find_device(config.training.device)
    if models_at_once(config, device) == 1:
        return config
    fitted = _fitted(config, _training_data(dataset, training), device)
    if fitted != config:
        reporter.message("the models are trained one after the other: memory does not hold several at once")
    return fitted


def refuse_what_does_not_fit(
    config: Config, dataset: XmcDataset, training: Split, output: Path, reporter: Reporter
) -> None:
    """Before the first epoch, and before anything is written."""
    from xmc_midx.device import available_memory_bytes, find_device, used_memory_bytes
    from xmc_midx.forecast import cheaper_options, forecast

    device = find_device(config.training.device)
    config, cuda = _as_trained(config, device), device.type == "cuda"
    data = _training_data(dataset, training)
    needs = forecast(config, data, cuda=cuda)
    free = _free_disk(output)
    if needs.disk_bytes > free:
        raise ResourceError(
            f"{output}: training needs {needs.disk_bytes:,} bytes on disk; {free:,} are free.",
            hint="Free some space, choose another --output, or lower training.keep_checkpoints or model.dim.",
        )
    more, available = needs.host_bytes - used_memory_bytes(), available_memory_bytes()
    if available is None or more <= available:
        return
    options = "; ".join(f"{name} ({size:,})" for name, size in cheaper_options(config, data, cuda=cuda))
    fact = (
        f"Training needs about {needs.host_bytes:,} bytes of memory, {max(more, 0):,} more than now; "
        f"{available:,} are available."
    )
    hint = f"Lower it (to about so many bytes) with --set {options}."
    if _CERTAINTY * more > available:
        raise ResourceError(fact, hint=hint)
    reporter.message(f"warning: {fact} {hint}")


def models_at_once(config: Config, device: torch.device) -> int:
    """Models of an ensemble whose epochs run at once: on a CPU, no more than threads; on a GPU, busy with one, one."""
    import torch

    training = config.training
    assert isinstance(training.models_at_once, int) and isinstance(training.ensemble_size, int), "it is resolved"
    num_threads = training.num_threads or torch.get_num_threads()
    return 1 if device.type != "cpu" else min(training.models_at_once, training.ensemble_size, num_threads)


def _as_trained(config: Config, device: torch.device) -> Config:
    return _with_at_once(config, models_at_once(config, device))


def _fitted(config: Config, data: TrainingData, device: torch.device) -> Config:
    from xmc_midx.device import available_memory_bytes, used_memory_bytes
    from xmc_midx.forecast import forecast

    trained, available = _as_trained(config, device), available_memory_bytes()
    if trained.training.models_at_once == 1 or available is None:
        return config
    more = forecast(trained, data).host_bytes - used_memory_bytes()
    return config if more <= available else _with_at_once(config, 1)


def _with_at_once(config: Config, number: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"models_at_once": number})})


@contextmanager
def memory_failures(config: Config, dataset: XmcDataset, training: Split) -> Iterator[None]:
    """An allocation that fails is said with the options that lower the peak."""
    from xmc_midx.device import find_device, is_out_of_memory
    from xmc_midx.forecast import cheaper_options

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        device, data = find_device(config.training.device), _training_data(dataset, training)
        cheaper = cheaper_options(_as_trained(config, device), data, cuda=device.type == "cuda")
        options = ", ".join(name for name, _ in cheaper)
        raise ResourceError(
            "The memory is used up; the run is saved up to its last checkpoint.",
            hint=f"Train anew with --set {options}, or --resume where there is more memory.",
        ) from error


def _training_data(dataset: XmcDataset, training: Split) -> TrainingData:
    from xmc_midx.data.features import column_counts
    from xmc_midx.forecast import TrainingData

    matrices = [
        m for split in (dataset.train, dataset.test) if split is not None for m in (split.features, split.labels)
    ]
    return TrainingData(
        num_instances=training.num_instances,
        feature_counts=column_counts(training.features),
        label_counts=column_counts(training.labels),
        loaded_bytes=sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in matrices),
    )


def _free_disk(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
