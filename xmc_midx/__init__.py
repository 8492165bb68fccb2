"""Extreme multi-label classification with a label softmax sampled by an inverted multi-index (MIDX).

The names below are the public API. They are resolved when they are first used: importing the package imports neither
torch nor scipy.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read by the OpenMP runtime when torch is first imported. By default its threads spin while they wait; on a machine
# that does anything else, a step of many small operations then takes 5 to 10 times as long (EXPERIMENTS.md, "Waiting
# threads"). A setting of your own wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read by torch and by oneDNN at the first product that oneDNN makes on a CPU. Each shape leaves about 0.5 MB of
# compiled code in either cache; by default they keep 1,024 shapes, 1.2 GB.
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

if TYPE_CHECKING:
    from xmc_midx.config import Config, load_config
    from xmc_midx.data.dataset import XmcDataset, load_dataset
    from xmc_midx.data.download import download
    from xmc_midx.errors import XmcMidxError
    from xmc_midx.pipeline import evaluate, export, predict, resume, train
    from xmc_midx.predictor import Predictor
    from xmc_midx.softmax import MIDXSoftmax
    from xmc_midx.types import MetricReport, TopK

__all__ = [
    "Config",
    "MIDXSoftmax",
    "MetricReport",
    "Predictor",
    "TopK",
    "XmcDataset",
    "XmcMidxError",
    "download",
    "evaluate",
    "export",
    "load_config",
    "load_dataset",
    "predict",
    "resume",
    "train",
]

_HOMES = {
    "Config": "config",
    "MIDXSoftmax": "softmax",
    "MetricReport": "types",
    "Predictor": "predictor",
    "TopK": "types",
    "XmcDataset": "data.dataset",
    "XmcMidxError": "errors",
    "download": "data.download",
    "evaluate": "pipeline",
    "export": "pipeline",
    "load_config": "config",
    "load_dataset": "data.dataset",
    "predict": "pipeline",
    "resume": "pipeline",
    "train": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
