"""Layer 6. A training and what it leaves behind: `train` begins a run, `resume` goes on with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmc_midx.config import Config, GivenConfig, as_config
from xmc_midx.data.dataset import Data, XmcDataset, is_in_memory, load_dataset
from xmc_midx.errors import DataError
from xmc_midx.metrics import evaluate_topk, without_ignored
from xmc_midx.paths import home_path
from xmc_midx.pipeline.evaluation import predicted, report_dict, with_ignored
from xmc_midx.pipeline.inputs import called, propensity, provenance_of, shape_of, training_split
from xmc_midx.pipeline.members import Member, train_models
from xmc_midx.pipeline.planning import fit_to_memory, memory_failures, refuse_what_does_not_fit
from xmc_midx.recipe import as_started, resolve
from xmc_midx.rundir import RunDirectory
from xmc_midx.types import DEFAULT_KS, MetricReport, Reporter, SilentReporter

if TYPE_CHECKING:
    from xmc_midx.session import TrainingSession

__all__ = ["TrainResult", "resume", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a training left behind."""

    run: str
    num_models: int
    """Of the ensemble; 1 where there is one model alone."""
    num_finished: int
    """Of them, those that are trained to the end."""
    best: str
    """Directory of the best checkpoint; of the latest, where no epoch has ended."""
    epochs: int
    best_epoch: int
    seconds: float
    """Training alone: without reading data, with validation and saving."""
    loss: float
    """Of the last epoch, nats per positive."""
    num_validation: int
    """Held-out instances of a model."""
    validation: Mapping[str, float]
    """Metrics of the best epoch on the held-out instances; empty where none are held out. Of an ensemble, as `best`,
    the epochs and the loss, of its first model: each holds out others."""
    test: MetricReport | None
    """On the test file; None where none was given."""
    evaluate_on: str | None
    """DATA of an evaluation: the test file, or the data where it has a test split; None where neither has instances, or
    they are in memory."""
    propensity: tuple[float, float]
    """A and B of the propensity model, for both."""
    model_bytes: int
    """What prediction reads: the best checkpoint's model, and the training rows where neighbours are used."""
    peak_memory_bytes: int
    config: Config

    @property
    def finished(self) -> bool:
        """False where the time limit came first: the run can be resumed."""
        return self.num_finished == self.num_models

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `train`."""
        return {
            "run": self.run,
            "finished": self.finished,
            "num_models": self.num_models,
            "num_finished": self.num_finished,
            "best": self.best,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "seconds": round(self.seconds, 3),
            "loss": self.loss,
            "num_validation": self.num_validation,
            "validation": dict(self.validation),
            "test": None if self.test is None else report_dict(self.test),
            "propensity": dict(zip("AB", self.propensity, strict=True)),
            "model_bytes": self.model_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "config": self.config.model_dump(),
        }


@contextmanager
def _settings_of_its_own() -> Iterator[None]:
    """A training chooses dtypes and threads itself, whatever the caller has set of torch, and leaves that as it was."""
    import torch

    from xmc_midx.device import without_autocast

    num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with without_autocast("cpu"), without_autocast("cuda"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(num_threads)


@_settings_of_its_own()
def train(
    data: Data,
    *,
    output: str | Path,
    config: GivenConfig | None = None,
    test: str | Path | None = None,
    max_seconds: float | None = None,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a model into a new run directory.

    Parameters
    ----------
    data : name of a dataset, directory, or sparse feature file; a pair of matrices in memory, features (N, F) and
        labels (N, L); or an `XmcDataset`.
    output : the run directory; made here, and refused where it holds anything.
    config : a `Config`, its tree as a dictionary, or the path of a YAML file; open values are derived from the data
        (`xmc_midx.recipe`), and None derives all.
    test : a sparse feature file that is evaluated at the end; it takes no part in training.
    max_seconds : of this call; then the training is saved and stops, to be resumed. None: no limit.
    reporter : receives the progress.

    Raises
    ------
    XmcMidxError : the data, the configuration, the machine or the training is at fault; see the class's children.
    """
    from xmc_midx.session import TrainingSession

    config, output = as_config(config), home_path(output)
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    reporter = reporter or SilentReporter()
    reporter.start("read", None)
    dataset = load_dataset(data, test=test)
    training = training_split(dataset, data)
    if test is not None and dataset.test is not None and not dataset.test.num_instances:
        raise DataError(f"{dataset.test.path}: holds 0 instances, expected some to evaluate on.")
    if not training.source.states_sizes:
        sizes = f"{dataset.num_features} features and {dataset.num_labels} labels"
        reporter.message(f"{training.path}: states no sizes; the largest ids make {sizes}")
    shape = shape_of(dataset, training)
    resolved = resolve(config, shape)
    num_rows = shape.of_rows(resolved.data).num_labels
    if num_rows < dataset.num_labels:
        reporter.message(
            f"{dataset.num_labels - num_rows:,} of {dataset.num_labels:,} labels have no training instance: no row in "
            "the model, and never predicted"
        )
    if config.training.models_at_once == "auto":
        resolved = fit_to_memory(resolved, dataset, training, reporter)
    refuse_what_does_not_fit(resolved, dataset, training, output, reporter)
    if "name" in config.sampler.model_fields_set:
        _say_where_a_sampler_says_nothing(resolved, num_rows, reporter)
    with RunDirectory.create(
        output,
        resolved,
        provenance=provenance_of(dataset, data, test),
        label_names=dataset.label_names,
        vocabulary=dataset.vocabulary,
    ) as run:
        with memory_failures(resolved, dataset, training):
            a_and_b = propensity(None, None, dataset, training.num_instances)[:2]
            session = TrainingSession(run, training, reporter, deadline=deadline, propensity=a_and_b)
            others = train_models(session, training, verify=True)
        return _train_result(session, others, dataset, data, None if test is None else str(test))


def _say_where_a_sampler_says_nothing(resolved: Config, num_labels: int, reporter: Reporter) -> None:
    """Whoever chooses a sampler may compare several."""
    name, draws = resolved.sampler.name, resolved.sampler.num_draws
    if name in ("full", "in-batch") or not isinstance(draws, int) or draws < num_labels:
        return
    reporter.message(
        f"{draws:,} draws hold all {num_labels:,} labels: the loss is the full softmax's, whatever the sampler; "
        "sampler.num_draws asks for fewer"
    )


@_settings_of_its_own()
def resume(
    run: str | Path,
    *,
    data: Data | None = None,
    max_seconds: float | None = None,
    verify: bool = True,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Go on with an interrupted training from its latest checkpoint; of a finished one, return the result.

    A damaged checkpoint is passed over, with a message, for the one before it.

    Parameters
    ----------
    run : run directory.
    data : where the run's data lies now, or the matrices again; None: where it lay.
    max_seconds, reporter : as in `train`.
    verify : whether the checkpoint's hashes are computed; the sizes are compared in any case.

    Raises
    ------
    DataError : the directory holds no run, or the data is no longer what the run was started with.
    """
    from xmc_midx.session import TrainingSession

    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    reporter = reporter or SilentReporter()
    directory = RunDirectory.open(run)
    with RunDirectory.lock(directory.path):
        provenance = directory.provenance()
        data = provenance.data if data is None else data
        if data is None and provenance.fingerprint is not None:
            raise DataError(
                f"{directory.path}: was trained on data in memory, which this machine no longer knows.",
                hint="Give it again, as it was: xmc_midx.resume(run, data=(X, Y)).",
            )
        if data is None or provenance.fingerprint is None:
            raise DataError(
                f"{directory.path / 'run.json'}: does not say what data the run was started with.",
                hint="It was edited.",
            )
        reporter.start("read", None)
        dataset = load_dataset(data, test=provenance.test)
        if dataset.fingerprint() != provenance.fingerprint:
            raise DataError(
                f"{called(dataset, data)}: is not the data that {directory.path} was started with.",
                hint="Start a new run: xmc-midx train DATA --output RUN.",
            )
        training = training_split(dataset, data)
        # What an older release did not know is open in its configuration.
        resolved = resolve(as_started(directory.config), shape_of(dataset, training))
        is_complete = directory.is_complete
        directory.config = resolved if is_complete else fit_to_memory(resolved, dataset, training, reporter)
        with memory_failures(directory.config, dataset, training):
            a_and_b = propensity(None, None, dataset, training.num_instances)[:2]
            session = TrainingSession(directory, training, reporter, deadline=deadline, propensity=a_and_b)
            session.load(verify=verify)
            if is_complete:
                reporter.message("the run is finished already")
            others = train_models(session, training, verify=verify)
        return _train_result(session, others, dataset, data, provenance.test)


def _train_result(
    session: TrainingSession, others: Sequence[Member], dataset: XmcDataset, data: Data, test: str | None
) -> TrainResult:
    from xmc_midx.device import peak_memory_bytes
    from xmc_midx.predictor import Predictor

    run = session.run_directory
    kept = "best" if session.best_step else "latest"
    # Of a finished run, checkpoints may have been removed.
    is_kept = not run.has_model or (session.store.step_of(kept) is not None and session.store.path_of(kept).is_dir())
    best = session.store.path_of(kept) if is_kept else run.path
    report = None
    is_there = dataset.test is not None and dataset.test.num_instances > 0
    # An older release began runs with a test file of nothing.
    if test is not None and run.is_complete and is_there:
        assert dataset.test is not None
        session.release()
        predictor = Predictor.load(run.path, device=run.config.training.device)
        top = predicted(predictor, dataset.test, max(DEFAULT_KS), session.reporter)
        report = evaluate_topk(
            *without_ignored(top, dataset.test.labels, dataset.test.ignored),
            ks=DEFAULT_KS,
            label_frequencies=predictor.label_frequencies,
            num_train=predictor.num_train,
            A=session.propensity[0],
            B=session.propensity[1],
        )
        report = with_ignored(report, dataset.test)
    return TrainResult(
        run=str(run.path),
        num_models=1 + len(run.members),
        num_finished=session.finished + sum(one.finished for one in others),
        best=str(best),
        epochs=len(session.history),
        best_epoch=session.best_epoch,
        seconds=session.seconds + sum(one.seconds for one in others),
        loss=session.loss,
        num_validation=session.num_held_out,
        validation=session.validation,
        test=report,
        evaluate_on=None if not is_there or (test is None and is_in_memory(data)) else (test or str(data)),
        propensity=session.propensity,
        model_bytes=run.model_bytes or (best / "model.safetensors").stat().st_size,
        peak_memory_bytes=peak_memory_bytes(),
        config=run.config,
    )
