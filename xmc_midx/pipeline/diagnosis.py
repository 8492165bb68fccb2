"""Layer 6. Samplers against the full softmax of a trained model: `diagnose`."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xmc_midx.config import SAMPLER_NAMES
from xmc_midx.data.dataset import Data, load_dataset
from xmc_midx.errors import DataError, UsageError
from xmc_midx.pipeline.inputs import called, check_sizes, say_which, training_split
from xmc_midx.rundir import RunDirectory
from xmc_midx.types import Reporter, SamplerDiagnosis, SilentReporter

__all__ = ["REFERENCE_SAMPLER", "Diagnosis", "diagnose"]

REFERENCE_SAMPLER = "full"
"""Of `SAMPLER_NAMES`, the one that is no proposal: it scores all labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Samplers against the full softmax of a trained model, with all that is needed to read the figures."""

    samplers: Sequence[SamplerDiagnosis]
    """In the order of `config.SAMPLER_NAMES`, or as they were asked for."""
    run: str
    data: str
    num_labels: int
    num_instances: int
    """Over which the proposals are averaged."""
    batch_size: int
    """Instances of the batch whose gradient is measured."""
    estimator: str
    """The run's: `"pool"` or `"instance"`."""
    num_draws: int
    """M: for the batch (pool), for each instance (instance)."""
    repeats: int
    """Draws of the gradient."""
    dropout: float
    """Of the queries' coordinates; 0: queries as at prediction."""
    seed: int
    seconds: float
    """Without reading the data."""
    plot: str | None
    """The figure that was written; None where none was asked for."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `diagnose`."""
        samplers = [asdict(one) for one in self.samplers]
        return asdict(self) | {"positives": "certain", "seconds": round(self.seconds, 3), "samplers": samplers}


def diagnose(
    run: str | Path,
    *,
    data: Data,
    samplers: Sequence[str] | None = None,
    num_draws: int | None = None,
    num_instances: int = 256,
    repeats: int = 32,
    dropout: bool = False,
    seed: int = 0,
    device: str = "auto",
    plot: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Diagnosis:
    """Measure how near samplers come to the full softmax of a trained model, and what they cost.

    Gradients are those of an estimator in which the batch's positives count once each (`sampler.positives = certain`),
    so that nothing but the sampler is measured: by default a training takes them for the random sample that they are,
    and its gradients deviate less.

    Parameters
    ----------
    run : run directory; its best model, its loss, its estimator and its batch size.
    data : what the run was trained on, or other data of its features and labels; the training split is used.
    samplers : names; None takes all that go with the run's estimator.
    num_draws : M, the same for all; None takes the run's.
    num_instances : random labelled instances over which the proposals are averaged, >= 1.
    repeats : draws of one batch's gradient, >= 2.
    dropout : whether queries drop coordinates as in training, which is the law that training draws against.
    seed : of the instances, the dropout and the draws.
    device : where all this runs.
    plot : .png, .svg or .pdf file to draw the figures into (needs matplotlib); None draws none.

    Raises
    ------
    XmcMidxError : a name, a number or a file is at fault, or data and model do not fit each other.
    """
    from xmc_midx.plots import plot_samplers, require_plotting

    for what, number, least in (
        ("draws", num_draws, 1),
        ("instances", num_instances, 1),
        ("repeats", repeats, 2),
        ("seed", seed, 0),
    ):
        if number is not None and number < least:
            raise UsageError(f"{what} is {number}; expected at least {least}.")
    if plot is not None:
        require_plotting(Path(plot))
    if samplers is not None and not samplers:
        raise UsageError("There is no sampler to diagnose: expected at least one name.")
    for name in samplers or ():
        _check_sampler(name)
    reporter = reporter or SilentReporter()
    directory = RunDirectory.open(run)
    names = _sampler_names(samplers, directory.config.sampler.estimator)

    from xmc_midx.device import find_device
    from xmc_midx.diagnostics import Instances, TrainedModel, choose_instances, diagnose_samplers

    say_which(directory, reporter)
    reporter.start("read", None)
    model = TrainedModel.load(directory, find_device(device))
    config = model.config
    dataset = load_dataset(data)
    split = training_split(dataset, data)
    check_sizes(dataset, num_features=model.num_features, num_labels=model.known_labels.num_labels)
    batch_size, draws = config.training.batch_size, num_draws or config.sampler.num_draws
    assert isinstance(batch_size, int) and isinstance(draws, int), "the configuration is resolved"
    started = time.perf_counter()
    labels = model.known_labels(split.labels)
    rows = choose_instances(labels, max(num_instances, batch_size), seed)
    if not rows.size:
        raise DataError(
            f"{called(dataset, data)}: no instance has a label that the model has a row for.",
            hint="Give the data that it was trained on.",
        )
    features = model.scaling(split.features[rows])
    figures = diagnose_samplers(
        model,
        Instances.build(model.encode(features, dropout=dropout, seed=seed), labels[rows]),
        names=names,
        num_draws=draws,
        num_instances=num_instances,
        repeats=repeats,
        seed=seed,
        reporter=reporter,
    )
    if plot is not None:
        plot_samplers(figures, Path(plot), title=f"{Path(run).name}: samplers against the full softmax")
    return Diagnosis(
        samplers=figures,
        run=str(run),
        data=called(dataset, data),
        num_labels=labels.shape[1],
        num_instances=min(num_instances, rows.size),
        batch_size=min(batch_size, rows.size),
        estimator=config.sampler.estimator,
        num_draws=draws,
        repeats=repeats,
        dropout=model.encoder.dropout.rate if dropout else 0.0,
        seed=seed,
        seconds=time.perf_counter() - started,
        plot=None if plot is None else str(plot),
    )


def _sampler_names(asked: Sequence[str] | None, estimator: str) -> tuple[str, ...]:
    if asked is not None:
        return tuple(dict.fromkeys(asked))
    # In-batch negatives are shared by the batch: they have no draws of an instance.
    excluded = {REFERENCE_SAMPLER} | ({"in-batch"} if estimator == "instance" else set())
    return tuple(name for name in SAMPLER_NAMES if name not in excluded)


def _check_sampler(name: str) -> None:
    known = [known for known in SAMPLER_NAMES if known != REFERENCE_SAMPLER]
    if name == REFERENCE_SAMPLER:
        raise UsageError(
            f"Sampler {name} draws nothing: it is the softmax over all labels, which the others are measured against."
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else None
        raise UsageError(f"Sampler {name!r} is unknown; expected some of {', '.join(known)}.", hint=hint)
