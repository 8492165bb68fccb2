"""Layer 6. What a command is given, data and a run: the training split, its shape and origin, and whether all fits.

Before it: datasets and run directories; after it: the commands.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xmc_midx import __version__
from xmc_midx.data.dataset import Split, XmcDataset, training_faults
from xmc_midx.data.registry import match_spec
from xmc_midx.errors import DataError, UsageError
from xmc_midx.recipe import DataShape
from xmc_midx.rundir import RunDirectory, timestamp
from xmc_midx.types import DEFAULT_KS, DEFAULT_PROPENSITY, Reporter

if TYPE_CHECKING:
    from xmc_midx.predictor import Predictor


def training_split(dataset: XmcDataset, data: str | Path) -> Split:
    """The split to train on, once it has no faults that a training would trip over."""
    split = dataset.train
    if split is None:
        raise DataError(f"{data}: has no training split.", hint="Expected train.txt, or one sparse feature file.")
    for _, error in training_faults(split):
        raise error
    return split


def shape_of(dataset: XmcDataset, training: Split) -> DataShape:
    """What the recipe derives open values from."""
    from xmc_midx.data.features import are_counts

    return DataShape(
        num_instances=training.features.shape[0],
        num_features=dataset.num_features,
        num_labels=dataset.num_labels,
        num_positives=training.labels.nnz,
        has_counts=are_counts(training.features),
    )


def propensity(
    a: float | None, b: float | None, dataset: XmcDataset, num_train: int | None
) -> tuple[float, float, str]:
    """A, B and where they come from."""
    if a is not None and b is not None:
        return a, b, "flags"
    if (a is None) != (b is None):
        raise UsageError("Propensity: A and B go together; only one of them was given.")
    spec = dataset.spec
    if spec is None and num_train is not None:
        spec = match_spec(None if dataset.vocabulary else dataset.num_features, dataset.num_labels, num_train)
    if spec is not None:
        return spec.propensity_a, spec.propensity_b, f"registry: {spec.name}"
    return (*DEFAULT_PROPENSITY, "default")


def provenance_of(dataset: XmcDataset, data: str | Path, test: str | Path | None) -> dict[str, Any]:
    """What `run.json` says of a training's origin: data, command, versions and hardware."""
    import torch

    return {
        "data": _absolute(data),
        "test": None if test is None else _absolute(test),
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "command": sys.argv,
        "started": timestamp(),
        "versions": {
            "xmc-midx": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "hardware": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _absolute(data: str | Path) -> str:
    """A path as it can be found from anywhere; a dataset's name as it is."""
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() else str(data)


def check_sizes(dataset: XmcDataset, *, num_features: int, num_labels: int) -> None:
    """Data of other sizes than the model's is refused."""
    for what, found, expected in (
        ("features", dataset.num_features, num_features),
        ("labels", dataset.num_labels, num_labels),
    ):
        if found != expected:
            raise DataError(
                f"{dataset.name} has {found} {what}; the model was trained with {expected}.",
                hint="Is this the model of another dataset?",
            )


def check_k(k: int, num_labels: int) -> None:
    """A k beyond the labels is refused."""
    # Of fewer labels than that, the default is all of them.
    if not 1 <= k <= max(num_labels, *DEFAULT_KS):
        raise UsageError(f"k is {k}; expected 1 to {num_labels}, the number of labels.")


def open_predictor(run: str | Path, reporter: Reporter, *, device: str, verify: bool, exact: bool = False) -> Predictor:
    """The model of a run, and a word on what it lacks, or on code that is compiled first."""
    from xmc_midx.predictor import Predictor
    from xmc_midx.quantization import is_compiled

    reporter.start("load", None)
    if not is_compiled():
        reporter.message("the first prediction after an installation compiles code, for some 20 s, and keeps it")
    predictor = Predictor.load(run, device=device, verify=verify, exact=exact)
    directory = RunDirectory.open(run)
    there, size = 1 + len(directory.finished_members), 1 + len(directory.members)
    go_on = f"`xmc-midx train DATA --output {directory.path} --resume`"
    if not directory.has_model:
        reporter.message(
            f"warning: {directory.path} is not finished: results are of the encoder alone, its scores no probabilities "
            f"and of another kind than those of the finished run; {go_on} finishes it"
        )
    elif there < size:
        reporter.message(
            f"warning: {directory.path} is an ensemble of {size} models, of which {there} can predict: results are of "
            f"{'that one' if there == 1 else 'those'}; {go_on} trains the others"
        )
    return predictor


def say_which(run: RunDirectory, reporter: Reporter) -> None:
    """Say that a command looks at the first model of an ensemble alone."""
    if run.members:
        reporter.message(f"{run.path} is an ensemble of {1 + len(run.members)}; this is of its first model alone")
