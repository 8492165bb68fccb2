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
from xmc_midx.data.dataset import Data, Split, XmcDataset, is_in_memory, training_faults
from xmc_midx.data.registry import match_spec
from xmc_midx.errors import DataError, UsageError
from xmc_midx.paths import home_path
from xmc_midx.recipe import DataShape
from xmc_midx.rundir import RunDirectory, timestamp
from xmc_midx.types import DEFAULT_KS, DEFAULT_PROPENSITY, Reporter

if TYPE_CHECKING:
    from xmc_midx.predictor import Predictor

__all__ = [
    "called",
    "check_k",
    "check_sizes",
    "open_predictor",
    "propensity",
    "provenance_of",
    "say_which",
    "shape_of",
    "training_split",
]


def training_split(dataset: XmcDataset, data: Data) -> Split:
    """The split to train on.

    Raises
    ------
    DataError : there is none, or it has a fault that a training would trip over.
    """
    split = dataset.train
    if split is None:
        hint = None if is_in_memory(data) else "Expected train.txt, or one sparse feature file."
        raise DataError(f"{called(dataset, data)}: has no training split.", hint=hint)
    for _, error in training_faults(split):
        raise error
    return split


def called(dataset: XmcDataset, data: Data) -> str:
    """What messages call the data: what was typed, or the name of what is in memory."""
    return dataset.name if is_in_memory(data) else str(data)


def shape_of(dataset: XmcDataset, training: Split) -> DataShape:
    """What the recipe derives open values from."""
    from xmc_midx.data.features import are_counts, column_counts

    return DataShape(
        num_instances=training.features.shape[0],
        num_features=dataset.num_features,
        num_labels=dataset.num_labels,
        num_positives=training.labels.nnz,
        num_used_features=int(np.count_nonzero(column_counts(training.features))),
        num_used_labels=int(np.count_nonzero(column_counts(training.labels))),
        has_counts=are_counts(training.features),
    )


def propensity(
    a: float | None, b: float | None, dataset: XmcDataset, num_train: int | None
) -> tuple[float, float, str]:
    """A, B and where they come from.

    Raises
    ------
    UsageError : one of the two is given without the other.
    """
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


def provenance_of(dataset: XmcDataset, data: Data, test: str | Path | None) -> dict[str, Any]:
    """What `run.json` says of a training's origin: data, command, versions and hardware."""
    import torch

    return {
        "data": None if is_in_memory(data) else _absolute(data),
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


def _absolute(data: Any) -> str:
    """A path as it can be found from anywhere; a dataset's name as it is."""
    path = home_path(data)
    return str(path.resolve()) if path.exists() else str(data)


def check_sizes(dataset: XmcDataset, *, num_features: int, num_labels: int) -> None:
    """Raise a DataError for data of other sizes than the model's."""
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
    """Raise a UsageError for a k beyond the labels."""
    # Of fewer labels than that, the default is all of them.
    if not 1 <= k <= max(num_labels, *DEFAULT_KS):
        raise UsageError(f"k is {k}; expected 1 to {num_labels}, the number of labels.")


def open_predictor(
    run: str | Path, reporter: Reporter, *, device: str, verify: bool, exact: bool = False, answers: bool = True
) -> Predictor:
    """The model of a run, and a word on what it lacks, and on code that is compiled first.

    Parameters
    ----------
    answers : whether it will be asked; else its sizes and frequencies alone are of use, and nothing is said.

    Raises
    ------
    DataError : as of `Predictor.load`.
    """
    from xmc_midx.device import find_device
    from xmc_midx.predictor import Predictor
    from xmc_midx.quantization import is_compiled

    reporter.start("load", None)
    directory = RunDirectory.open(run)
    if answers and find_device(device).type == "cpu" and not is_compiled():
        reporter.message("code is compiled at the first prediction, for some 20 s, and kept where that is possible")
    predictor = Predictor.load(run, device=device, verify=verify, exact=exact)
    if not answers:
        return predictor
    there, size = 1 + len(directory.finished_members), 1 + len(directory.members)
    go_on = f"`xmc-midx train DATA --output {directory.path} --resume`"
    if not directory.has_model:
        what = "one model" if predictor.calibration else "the encoder alone, its scores no probabilities"
        reporter.message(
            f"warning: {directory.path} is not finished: results are of {what}, and scores of another kind than the "
            f"finished run's; {go_on} finishes it"
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
