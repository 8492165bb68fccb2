"""Layer 6. The whole chain, a function a command: the only module that knows all stages.

The stages that compute with torch are imported by the functions that need them, so that predictions of another tool are
evaluated without it.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmc_midx import __version__
from xmc_midx.config import SAMPLER_NAMES, Config
from xmc_midx.data.dataset import Split, XmcDataset, find_files, load_dataset, load_features, training_faults
from xmc_midx.data.predictions import read_predictions
from xmc_midx.data.registry import match_spec
from xmc_midx.errors import DataError, DivergedError, ResourceError, UsageError
from xmc_midx.metrics import (
    BREAKDOWNS,
    FREQUENCY_GROUPS,
    breakdown_by_frequency,
    checked_ks,
    evaluate_topk,
    frequency_deciles,
    without_ignored,
)
from xmc_midx.recipe import DataShape, as_started, resolve
from xmc_midx.rundir import RunDirectory, timestamp
from xmc_midx.types import (
    DEFAULT_KS,
    DEFAULT_PROPENSITY,
    MetricReport,
    Reporter,
    SamplerDiagnosis,
    SilentReporter,
    TopK,
)

if TYPE_CHECKING:
    from io import BufferedIOBase

    from xmc_midx.data.instances import HeldInstances, InstanceReader
    from xmc_midx.exporting.source import ExportSource, Measurement
    from xmc_midx.forecast import Forecast, TrainingData
    from xmc_midx.predictor import Predictor, Scores
    from xmc_midx.session import TrainingSession

__all__ = [
    "DemoResult",
    "Diagnosis",
    "Evaluation",
    "ExportResult",
    "Plan",
    "Prediction",
    "PredictionChunk",
    "PredictionStream",
    "TrainResult",
    "demo",
    "diagnose",
    "evaluate",
    "export",
    "plan",
    "predict",
    "predict_stream",
    "resume",
    "train",
]


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
    validation: Mapping[str, float]
    """Metrics of the best epoch on the held-out instances; empty where none are held out. Of an ensemble, as `best`,
    the epochs and the loss, of its first model: each holds out others."""
    test: MetricReport | None
    """On the test file; None where none was given."""
    evaluate_on: str | None
    """DATA of an evaluation: the test file, or the data where it has a test split; None where neither has instances."""
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
            "validation": dict(self.validation),
            "test": None if self.test is None else _report_dict(self.test),
            "propensity": dict(zip("AB", self.propensity, strict=True)),
            "model_bytes": self.model_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "config": self.config.model_dump(),
        }


_OF_ITS_OWN = "started", "finished", "seconds"
"""What `run.json` says of one training alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """The training of a further model of an ensemble."""

    finished: bool
    seconds: float


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics, and where the constants in them come from."""

    report: MetricReport
    propensity_source: str
    """`"flags"`, `"registry: NAME"` or `"default"`."""
    seconds: float
    """Of prediction; 0 where predictions were read from a file."""
    breakdown: Sequence[Mapping[str, Any]]
    """Recall by label frequency; empty where the training frequencies are unknown."""
    breakdown_by: str = "head-tail"
    """The groups: a key of `xmc_midx.metrics.BREAKDOWNS`."""
    num_without_predictions: int = 0
    """Instances for which nothing was predicted."""
    most_predictions: int | None = None
    """Labels of the longest list."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `evaluate`."""
        return {
            **_report_dict(self.report),
            "propensity_source": self.propensity_source,
            "num_without_predictions": self.num_without_predictions,
            "seconds": round(self.seconds, 3),
            "breakdown_by": self.breakdown_by,
            "breakdown": [dict(group) for group in self.breakdown],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The best labels of each instance, with names where the run knows them."""

    top: TopK
    label_names: Sequence[str] | None


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
        return asdict(self) | {"seconds": round(self.seconds, 3), "samplers": [asdict(one) for one in self.samplers]}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The whole chain on the embedded dataset."""

    training: TrainResult
    evaluation: Evaluation
    examples: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    """Raw text -> its best labels: (name, logit)."""


# -------------------------------------------------------------------------- train


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
    data: str | Path,
    *,
    output: str | Path,
    config: Config | None = None,
    test: str | Path | None = None,
    max_seconds: float | None = None,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a model into a new run directory.

    Parameters
    ----------
    data : name of a dataset, directory, or sparse feature file.
    output : the run directory; made here, and refused where it holds anything.
    config : open values are derived from the data (`xmc_midx.recipe`); None derives all.
    test : a sparse feature file that is evaluated at the end; it takes no part in training.
    max_seconds : of this call; then the training is saved and stops, to be resumed. None: no limit.
    reporter : receives the progress.

    Raises
    ------
    XmcMidxError : the data, the configuration, the machine or the training is at fault; see the class's children.
    """
    from xmc_midx.session import TrainingSession

    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    reporter = reporter or SilentReporter()
    reporter.start("read", None)
    dataset = load_dataset(data, test=test)
    training = _training_split(dataset, data)
    if test is not None and dataset.test is not None and not dataset.test.num_instances:
        raise DataError(f"{dataset.test.path}: holds 0 instances, expected some to evaluate on.")
    if not training.source.states_sizes:
        sizes = f"{dataset.num_features} features and {dataset.num_labels} labels"
        reporter.message(f"{training.path}: states no sizes; the largest ids make {sizes}")
    resolved = resolve(config or Config(), _shape(dataset, training))
    _refuse_what_does_not_fit(resolved, dataset, training, Path(output), reporter)
    with RunDirectory.create(
        output,
        resolved,
        provenance=_provenance(dataset, data, test),
        label_names=dataset.label_names,
        vocabulary=dataset.vocabulary,
    ) as run:
        with _memory_failures(resolved, dataset, training):
            a_and_b = _propensity(None, None, dataset, training.num_instances)[:2]
            session = TrainingSession(run, training, reporter, deadline=deadline, propensity=a_and_b)
            session.run()
            others = _train_members(session, training, verify=True)
        return _train_result(session, others, dataset, data, None if test is None else str(test))


@_settings_of_its_own()
def resume(
    run: str | Path,
    *,
    data: str | Path | None = None,
    max_seconds: float | None = None,
    verify: bool = True,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Go on with an interrupted training from its latest checkpoint; of a finished one, return the result.

    A damaged checkpoint is passed over, with a message, for the one before it.

    Parameters
    ----------
    run : run directory.
    data : where the run's data lies now; None: where it lay.
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
        provenance = directory.read_json("run.json")
        reporter.start("read", None)
        data = provenance["data"] if data is None else data
        dataset = load_dataset(data, test=provenance["test"])
        if dataset.fingerprint() != provenance["fingerprint"]:
            raise DataError(
                f"{data}: is not the data that {directory.path} was started with.",
                hint="Start a new run: xmc-midx train DATA --output RUN.",
            )
        training = _training_split(dataset, data)
        # What an older release did not know is open in its configuration.
        directory.config = resolve(as_started(directory.config), _shape(dataset, training))
        with _memory_failures(directory.config, dataset, training):
            a_and_b = _propensity(None, None, dataset, training.num_instances)[:2]
            session = TrainingSession(directory, training, reporter, deadline=deadline, propensity=a_and_b)
            session.load(verify=verify)
            if directory.is_complete:
                reporter.message("the run is finished already")
            session.run()
            others = _train_members(session, training, verify=verify)
        return _train_result(session, others, dataset, data, provenance["test"])


def _train_members(first: TrainingSession, training: Split, *, verify: bool) -> list[_Member]:
    """The further models of an ensemble, once the first is there: each from where it stands, or anew."""
    from xmc_midx.session import TrainingSession

    run, found = first.run_directory, list[_Member]()
    if not first.finished or not run.members:
        return found
    first.release()
    for number, path in enumerate(run.members, start=2):
        if path in run.finished_members:
            seconds = RunDirectory.open(path).read_json("run.json").get("seconds", 0.0)
            found.append(_Member(finished=True, seconds=float(seconds)))
            continue
        if first.deadline is not None and time.monotonic() >= first.deadline:
            break
        tree = run.config.model_dump()
        tree["training"] |= {"seed": (run.config.training.seed + number - 1) % 2**63, "ensemble_size": 1}
        provenance = {key: value for key, value in run.read_json("run.json").items() if key not in _OF_ITS_OWN}
        provenance["started"] = timestamp()
        first.reporter.message(f"model {number} of {1 + len(run.members)}")
        is_there, config = (path / "config.yaml").exists(), Config.model_validate(tree)
        try:
            with _opened(path) if is_there else RunDirectory.create(path, config, provenance=provenance) as directory:
                session = TrainingSession(
                    directory,
                    training,
                    first.reporter,
                    deadline=first.deadline,
                    propensity=first.propensity,
                    first=run,
                )
                if is_there:
                    session.load(verify=verify)
                session.run()
        except (DataError, UsageError, DivergedError) as error:
            own = f"{error.hint} " if isinstance(error, DivergedError) and error.hint else ""
            error.hint = f"{own}Remove {path}: --resume trains that model anew, and until then the others predict."
            raise
        found.append(_Member(finished=session.finished, seconds=session.seconds))
        if not session.finished:
            break
        session.release()
    return found


@contextmanager
def _opened(path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory.open(path)
    with RunDirectory.lock(path):
        yield directory


# --------------------------------------------------------------------------- plan


def plan(
    data: str | Path | TrainingData,
    *,
    output: str | Path = ".",
    config: Config | None = None,
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
    if isinstance(data, TrainingData):
        shape = DataShape(
            num_instances=data.num_instances,
            num_features=data.feature_counts.shape[0],
            num_labels=data.label_counts.shape[0],
            num_positives=int(data.label_counts.sum()),
        )
    else:
        reporter.start("read", None)
        dataset = load_dataset(data, test=test)
        training = _training_split(dataset, data)
        shape, data = _shape(dataset, training), _training_data(dataset, training)
        del dataset, training
    resolved = resolve(config or Config(), shape)
    available = available_memory_bytes()
    if available is not None:
        available += used_memory_bytes()
    batch, dim, draws = resolved.training.batch_size, resolved.model.dim, resolved.sampler.num_draws
    assert isinstance(batch, int) and isinstance(dim, int) and isinstance(draws, int), "the configuration is resolved"
    device = find_device(resolved.training.device)
    precision = find_precision(resolved.training.precision, device, shape.num_labels)
    size = min(batch, shape.num_instances, 4096), min(draws, shape.num_labels, 8192), min(dim, 4096)
    flops, rate = measure_speed(*size, precision, device)
    speed = Speed(flops=flops, bytes=rate, rounds_slopes=rounds_slopes(device))
    return Plan(
        forecast=forecast(resolved, data, cuda=device.type == "cuda", speed=speed),
        available_memory=available,
        available_disk=_free_disk(Path(output)),
        config=resolved,
    )


_CERTAINTY = 0.8
"""A training is refused where even this share of its forecast is not there; the forecast is good to 20%."""


def _refuse_what_does_not_fit(
    config: Config, dataset: XmcDataset, training: Split, output: Path, reporter: Reporter
) -> None:
    """Before the first epoch, and before anything is written."""
    from xmc_midx.device import available_memory_bytes, find_device, used_memory_bytes
    from xmc_midx.forecast import cheaper_options, forecast

    cuda = find_device(config.training.device).type == "cuda"
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
    options = "; ".join(f"{name} ({size:,})" for name, size in cheaper_options(config, data))
    fact = (
        f"Training needs about {needs.host_bytes:,} bytes of memory, {max(more, 0):,} more than now; "
        f"{available:,} are available."
    )
    hint = f"Lower it (to about so many bytes) with --set {options}."
    if _CERTAINTY * more > available:
        raise ResourceError(fact, hint=hint)
    reporter.message(f"warning: {fact} {hint}")


@contextmanager
def _memory_failures(config: Config, dataset: XmcDataset, training: Split) -> Iterator[None]:
    """An allocation that fails is said with the options that lower the peak."""
    from xmc_midx.device import find_device, is_out_of_memory
    from xmc_midx.forecast import cheaper_options

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cuda = find_device(config.training.device).type == "cuda"
        data = _training_data(dataset, training)
        options = ", ".join(name for name, _ in cheaper_options(config, data, cuda=cuda))
        raise ResourceError(
            "The memory is used up; the run is saved up to its last checkpoint.",
            hint=f"Train anew with --set {options}, or --resume where there is more memory.",
        ) from error


def _training_data(dataset: XmcDataset, training: Split) -> TrainingData:
    from xmc_midx.forecast import TrainingData

    matrices = [
        m for split in (dataset.train, dataset.test) if split is not None for m in (split.features, split.labels)
    ]
    return TrainingData(
        num_instances=training.num_instances,
        feature_counts=np.bincount(training.features.indices, minlength=dataset.num_features),
        label_counts=np.bincount(training.labels.indices, minlength=dataset.num_labels),
        loaded_bytes=sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in matrices),
    )


def _free_disk(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _train_result(
    session: TrainingSession, others: Sequence[_Member], dataset: XmcDataset, data: str | Path, test: str | None
) -> TrainResult:
    from xmc_midx.device import peak_memory_bytes
    from xmc_midx.predictor import Predictor

    run = session.run_directory
    best = session.store.path_of("best" if session.best_step else "latest")
    report = None
    is_there = dataset.test is not None and dataset.test.num_instances > 0
    # An older release began runs with a test file of nothing.
    if test is not None and run.is_complete and is_there:
        assert dataset.test is not None
        session.release()
        predictor = Predictor.load(run.path, device=run.config.training.device)
        top = _predicted(predictor, dataset.test, max(DEFAULT_KS), session.reporter)
        report = evaluate_topk(
            *without_ignored(top, dataset.test.labels, dataset.test.ignored),
            ks=DEFAULT_KS,
            label_frequencies=predictor.label_frequencies,
            num_train=predictor.num_train,
            A=session.propensity[0],
            B=session.propensity[1],
        )
        report = _with_ignored(report, dataset.test)
    return TrainResult(
        run=str(run.path),
        num_models=1 + len(run.members),
        num_finished=session.finished + sum(one.finished for one in others),
        best=str(best),
        epochs=len(session.history),
        best_epoch=session.best_epoch,
        seconds=session.seconds + sum(one.seconds for one in others),
        loss=session.loss,
        validation=session.validation,
        test=report,
        evaluate_on=(test or str(data)) if is_there else None,
        propensity=session.propensity,
        model_bytes=run.model_bytes or (best / "model.safetensors").stat().st_size,
        peak_memory_bytes=peak_memory_bytes(),
        config=run.config,
    )


# ----------------------------------------------------------------------- evaluate


def evaluate(
    run: str | Path | None,
    *,
    data: str | Path,
    ks: Iterable[int] = DEFAULT_KS,
    predictions: str | Path | None = None,
    breakdown: str = "head-tail",
    A: float | None = None,
    B: float | None = None,
    device: str = "auto",
    verify: bool = True,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Metrics of a run, or of any tool's predictions, on a test split.

    Parameters
    ----------
    run : run directory; None with `predictions`.
    data : name of a dataset, directory (its test split is evaluated), or one sparse feature file.
    ks : the k of the metrics.
    predictions : scored instead of the run's model: XMC text, TSV or .npz, see `xmc_midx.data.predictions`.
    breakdown : groups of labels by training frequency: `"head-tail"` or `"deciles"`.
    A, B : propensity constants; None takes the registry's for a dataset of known sizes, else 0.55 and 1.5.
    device : where the model runs.
    verify : whether the hashes of the model's files are computed.

    Raises
    ------
    XmcMidxError : a file is invalid, or model, data and predictions do not fit one another.
    """
    cuts: list[int] = checked_ks(ks).tolist()
    if breakdown not in BREAKDOWNS:
        raise UsageError(f"breakdown is {breakdown!r}; expected {' or '.join(BREAKDOWNS)}.")
    reporter = reporter or SilentReporter()
    reporter.start("read", None)
    predictor = None
    if run is not None:
        from xmc_midx.predictor import Predictor

        predictor = Predictor.load(run, device=device, verify=verify)
        _say_what_is_missing(run, reporter)
    dataset = load_dataset(data, sizes=None if predictor is None else (predictor.num_features, predictor.num_labels))
    split = dataset.test if dataset.test is not None else dataset.train
    assert split is not None, "a dataset has a split"
    if dataset.test is None and Path(data).is_dir():
        raise DataError(f"{data}: has no test split to evaluate on.", hint="Give the file itself.")
    frequencies, num_train = _training_frequencies(predictor, dataset)
    a, b, source = _propensity(A, B, dataset, num_train)
    seconds = 0.0
    if predictions is not None:
        top = read_predictions(predictions, dataset.num_labels, num_instances=split.labels.shape[0])
    else:
        if predictor is None:
            raise UsageError("There is nothing to evaluate: expected a run directory or a predictions file.")
        _check_labels(predictor, dataset, max(cuts))
        started = time.perf_counter()
        top = _predicted(predictor, split, max(cuts), reporter)
        seconds = time.perf_counter() - started
    counts = (top.label_ids >= 0).sum(axis=1)
    top, labels = without_ignored(top, split.labels, split.ignored)
    report = evaluate_topk(top, labels, ks=cuts, label_frequencies=frequencies, num_train=num_train, A=a, B=b)
    report = _with_ignored(report, split)
    groups: Sequence[Any] = ()
    if frequencies is not None:
        ranges = FREQUENCY_GROUPS if breakdown == "head-tail" else frequency_deciles(frequencies)
        groups = breakdown_by_frequency(top, labels, frequencies, k=max(cuts), groups=ranges)
    return Evaluation(
        report=report,
        propensity_source=source,
        seconds=seconds,
        breakdown=[asdict(group) for group in groups],
        breakdown_by=breakdown,
        num_without_predictions=int((counts == 0).sum()),
        most_predictions=int(counts.max(initial=0)),
    )


def _with_ignored(report: MetricReport, split: Split) -> MetricReport:
    return report if split.ignored is None else replace(report, num_ignored=split.ignored.nnz)


def _predicted(predictor: Predictor, split: Split, k: int, reporter: Reporter | None) -> TopK:
    """The k best labels of each instance that are not passed over."""
    num_instances, num_labels = split.labels.shape
    if split.ignored is None:
        return predictor.predict(split.features, k=min(k, num_labels), reporter=reporter)
    found = TopK.empty(num_instances, min(k, num_labels))
    # As many more as an instance needs, or up to twice as many: one with thousands must not cost all others theirs.
    more_N = 2 ** np.ceil(np.log2(np.diff(split.ignored.indptr) + 1)).astype(np.int64) - 1
    for more in np.unique(more_N).tolist():
        rows = np.flatnonzero(more_N == more)
        top = predictor.predict(split.features[rows], k=min(k + more, num_labels), reporter=reporter)
        top, _ = without_ignored(top, split.labels[rows], split.ignored[rows])
        found.label_ids[rows], found.scores[rows] = top.label_ids[:, :k], top.scores[:, :k]
    return found


def _training_frequencies(
    predictor: Predictor | None, dataset: XmcDataset
) -> tuple[np.ndarray[Any, Any] | None, int | None]:
    """Of the run's training data, else of the dataset's train split; None where neither is there."""
    if predictor is not None and predictor.label_frequencies is not None:
        return predictor.label_frequencies, predictor.num_train
    if dataset.train is not None and dataset.test is not None:
        for kind, fault in training_faults(dataset.train):
            if kind == "gaps":
                raise fault
        return dataset.label_frequencies(), dataset.train.labels.shape[0]
    return None, None


def _propensity(
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


def _check_labels(predictor: Predictor, dataset: XmcDataset, k: int) -> None:
    if predictor.num_labels != dataset.num_labels:
        raise DataError(
            f"{dataset.name} has {dataset.num_labels} labels; the model was trained with {predictor.num_labels}.",
            hint="Is this the model of another dataset?",
        )
    _check_k(k, predictor.num_labels)


def _check_k(k: int, num_labels: int) -> None:
    # Of fewer labels than that, the default is all of them.
    if not 1 <= k <= max(num_labels, *DEFAULT_KS):
        raise UsageError(f"k is {k}; expected 1 to {num_labels}, the number of labels.")


# ------------------------------------------------------------------------ predict


def predict(
    run: str | Path,
    *,
    input: str | Path | Sequence[str] | csr_matrix | np.ndarray[Any, Any],
    k: int = 5,
    scores: Scores = "logits",
    threshold: float | None = None,
    allow: str | Path | None = None,
    deny: str | Path | None = None,
    device: str = "auto",
    verify: bool = True,
    reporter: Reporter | None = None,
) -> Prediction:
    """The best labels of each instance of a file, or of raw texts, all at once; `predict_stream` for more than fits.

    Parameters
    ----------
    input : a sparse feature file or a file of raw texts, a sequence of raw texts, or feature rows (N, F).
    The others : as in `predict_stream`.
    """
    options: dict[str, Any] = {"k": k, "scores": scores, "threshold": threshold, "allow": allow, "deny": deny}
    stream = predict_stream(run, input=input, **options, device=device, verify=verify, reporter=reporter)
    return Prediction(top=_concatenate([chunk.top for chunk in stream], k), label_names=stream.label_names)


def predict_stream(
    run: str | Path,
    *,
    input: str | Path | BinaryIO | Sequence[str] | csr_matrix | np.ndarray[Any, Any],
    k: int = 5,
    scores: Scores = "logits",
    threshold: float | None = None,
    allow: str | Path | None = None,
    deny: str | Path | None = None,
    text: bool | None = None,
    shard: tuple[int, int] = (1, 1),
    live: bool = False,
    exact: bool = False,
    device: str = "auto",
    verify: bool = True,
    reporter: Reporter | None = None,
) -> PredictionStream:
    """The best labels of each instance, batch by batch, in constant memory. The model is loaded at once, the input read
    as it is asked for.

    Parameters
    ----------
    run : run directory.
    input : a file of feature rows, with or without header and labels (which are not looked at), or of raw texts, a line
        each; a binary stream of the same; or what is in memory already: raw texts, or feature rows (N, F), a SciPy
        matrix of any format or a NumPy array.
    k : labels an instance, 1 to L.
    scores : `"logits"`: what the ranking is made by; `"probabilities"`: calibrated, that the label applies.
    threshold : labels with a lower score are left out.
    allow, deny : files of label ids or names, one a line, that alone may, or may not, be predicted.
    text : whether the input is raw text; None looks at it, where the run has a vocabulary.
    shard : (i, n): the i-th of n parts of a file, from 1; the parts' results, one after the other, are the whole's.
    live : answer the lines of a stream as they come, in batches of what is at hand.
    exact : score all labels in float32, where label cells or a scan in bfloat16 would be faster.
    device : where the model runs.
    verify : whether the hashes of the model's files are computed.

    Raises
    ------
    XmcMidxError : an option or the model is at fault; faults of the input are raised when the stream comes to them.
    """
    from xmc_midx.data.sources import is_named
    from xmc_midx.predictor import Predictor, held_rows

    index, num_shards = shard
    if not 1 <= index <= num_shards:
        raise UsageError(f"shard {index}/{num_shards}: expected 1/{max(num_shards, 1)} to {num_shards}/{num_shards}.")
    reporter = reporter or SilentReporter()
    reporter.start("load", None)
    predictor = Predictor.load(run, device=device, verify=verify, exact=exact)
    _say_what_is_missing(run, reporter)
    _check_k(k, predictor.num_labels)
    if scores == "probabilities":
        predictor.require_calibration()
    source: Any = held_rows(input)
    if issparse(input):
        source = csr_matrix(input)
    if isinstance(source, str | Path) and Path(source).is_dir():
        found = find_files(source)
        split = found.test or found.train
        hint = f"Its {'test' if found.test else 'training'} split is {split.features}." if split else None
        raise DataError(f"{source}: is a directory, expected a file.", hint=hint)
    if not text and isinstance(source, str | Path) and is_named(Path(source)):
        # Formats that are read whole: svmlight, npz, the halves of a pair.
        source = load_features(source, predictor.num_features)
    if text is None and predictor.vocabulary is None:
        text = False
    if text:
        predictor.require_vocabulary()
    if live and not isinstance(source, str | Path | Sequence | csr_matrix):
        # Someone may wait for the first answer: what is loaded at first use is loaded before it.
        predictor.warm_up()
    options = {
        "k": min(k, predictor.num_labels),
        "scores": scores,
        "threshold": threshold,
        "allow": None if allow is None else _read_label_ids(Path(allow), predictor),
        "deny": None if deny is None else _read_label_ids(Path(deny), predictor),
    }
    return PredictionStream(
        predictor,
        source,
        options,
        exact=exact,
        text=text,
        shard=shard,
        live=live,
        reporter=reporter,
        model=_model_digest(Path(run)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionChunk:
    """The answers to consecutive instances."""

    first: int
    """Number of the first one, from 0."""
    top: TopK
    input_sha256: str
    """Of the input's lines up to the last one of these."""


class PredictionStream:
    """Made by `predict_stream`; iterated once."""

    def __init__(
        self,
        predictor: Predictor,
        source: str | Path | BinaryIO | Sequence[str] | csr_matrix,
        options: Mapping[str, Any],
        *,
        exact: bool,
        text: bool | None,
        shard: tuple[int, int],
        live: bool,
        reporter: Reporter,
        model: str,
    ) -> None:
        self._predictor, self._source, self._options, self._text = predictor, source, options, text
        self._exact = exact
        self._shard, self._live, self._reporter, self._model = shard, live, reporter, model
        self._next, self._input_sha256 = 0, ""
        self._num_answered, self._seconds, self._has_labels = 0, 0.0, False

    @property
    def label_names(self) -> Sequence[str] | None:
        return self._predictor.label_names

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on besides the input; plain values."""
        lists = {name: self._options[name] for name in ("allow", "deny")}
        return {
            "model": self._model,
            "index": type(self._predictor.index).__name__,
            "exact": self._exact,
            **self._options,
            **{name: None if ids is None else _digest_of(ids) for name, ids in lists.items()},
            "text": self._text,
            "shard": list(self._shard),
        }

    def go_on(self, next_instance: int, input_sha256: str) -> None:
        """Leave out the instances before `next_instance`, the end of an earlier chunk; their lines must have this
        sha256."""
        self._next, self._input_sha256 = next_instance, input_sha256

    def __iter__(self) -> Iterator[PredictionChunk]:
        reader = self._reader()
        chosen, total = self._chosen()
        started = False
        for batch in reader.batches(lambda number, first: number in chosen and first >= self._next):
            self._check_place(reader, batch.first, batch.num_instances)
            if not started:
                known = total if total is not None else reader.num_instances
                self._reporter.start("predict", known)
                started = True
            if batch.rows is None:
                self._reporter.step(batch.num_instances if total is None else 0)
                continue
            yield self._answer(batch.first, batch.rows, reader.digest())
        if self._next > reader.num_given:
            raise self._another_input()
        if self._num_answered and not self._has_labels:
            threshold, scores = self._options["threshold"], self._options["scores"]
            why = "" if threshold is None else f": none of the {scores} reaches {threshold:g}"
            self._reporter.message(f"Nothing was predicted for these {self._num_answered:,} instances{why}.")

    def _answer(self, first: int, rows: csr_matrix | list[str], digest: str) -> PredictionChunk:
        began = time.monotonic()
        try:
            top = self._predictor.predict(rows, **self._options)
        except DataError as error:
            raise DataError(
                f"Instances {first} to {first + _length(rows) - 1}: {error.message}", hint=error.hint
            ) from None
        self._num_answered += _length(rows)
        self._has_labels |= bool((top.label_ids >= 0).any())
        self._seconds += time.monotonic() - began
        self._reporter.step(_length(rows), instances_per_second=self._num_answered / max(self._seconds, 1e-9))
        return PredictionChunk(first=first, top=top, input_sha256=digest)

    def _reader(self) -> InstanceReader | HeldInstances:
        from xmc_midx.data.files import LineChunks
        from xmc_midx.data.instances import HeldInstances, InstanceReader
        from xmc_midx.data.problems import raise_error

        num_features, source = self._predictor.num_features, self._source
        if isinstance(source, csr_matrix) or (isinstance(source, Sequence) and not isinstance(source, str)):
            return HeldInstances(source)
        if isinstance(source, str | Path):
            live = self._live and not Path(source).is_file()
            lines = LineChunks(Path(source), raise_error, live=live)
        else:
            live = self._live
            stream = cast("BufferedIOBase", source)
            lines = LineChunks(Path("standard input"), raise_error, stream=stream, live=live)
        return InstanceReader(lines, num_features=num_features, text=self._text, live=live)

    def _chosen(self) -> tuple[range, int | None]:
        """The numbers of the shard's batches, and its instances (None: not counted)."""
        index, num_shards = self._shard
        if num_shards == 1:
            return range(sys.maxsize), None
        source = self._source
        is_stream = not isinstance(source, str | Path | Sequence | csr_matrix)
        if is_stream or (isinstance(source, str | Path) and not Path(source).is_file()):
            raise UsageError(
                "A shard needs a file: its instances are counted first.",
                hint="Split a stream before it comes here, or give each part its own file.",
            )
        self._reporter.start("read", None)
        counts = [batch.num_instances for batch in self._reader().batches(lambda number, first: False)]
        chosen = range(len(counts) * (index - 1) // num_shards, len(counts) * index // num_shards)
        return chosen, sum(counts[chosen.start : chosen.stop])

    def _check_place(self, reader: InstanceReader | HeldInstances, first: int, count: int) -> None:
        end = first + count
        if first < self._next and (end > self._next or (end == self._next and reader.digest() != self._input_sha256)):
            raise self._another_input()

    def _another_input(self) -> DataError:
        return DataError(
            f"The input is not the one whose first {self._next} instances are answered already: its lines differ.",
            hint="Remove the partial output to start anew.",
        )


def _length(rows: csr_matrix | list[str]) -> int:
    return len(rows) if isinstance(rows, list) else int(rows.shape[0])


def _concatenate(parts: list[TopK], k: int) -> TopK:
    from xmc_midx.topk import concatenate_topk

    return concatenate_topk(parts) if parts else TopK.empty(0, k)


def _model_digest(run: Path) -> str:
    """sha256 of what names the model: the manifest of its best checkpoint, which has the hashes of its files, and what
    is added to it."""
    from xmc_midx.checkpoint import CheckpointStore

    digest = hashlib.sha256()
    manifest = run / "model.json"
    if not manifest.exists():
        manifest = CheckpointStore(run / "checkpoints").path_of("best") / "manifest.json"
    for path in (manifest, run / "interpolation.json", run / "vocabulary.txt"):
        digest.update(path.read_bytes() if path.exists() else b"-")
    for member in RunDirectory.open(run).finished_members if manifest.name == "model.json" else ():
        digest.update(_model_digest(member).encode())
    return digest.hexdigest()


def _digest_of(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.unique(np.asarray(ids, dtype="<i8")).tobytes()).hexdigest()


def _read_label_ids(path: Path, predictor: Predictor) -> list[int]:
    """The labels of a list: an id or a name a line. Digits are an id, and a name may belong to several labels."""
    try:
        # As `labels.txt` is read: a name may hold what else Python takes for the end of a line.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}.") from None
    num_labels, names = predictor.num_labels, predictor.label_names
    ids_of: dict[str, list[int]] = {}
    for label, name in enumerate(names or ()):
        ids_of.setdefault(name, []).append(label)
    ids: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if text.isascii() and text.isdigit() and int(text[:20]) < num_labels and len(text) < 20:
            ids.append(int(text))
        elif text in ids_of:
            ids += ids_of[text]
        elif names is None or re.fullmatch(r"[+-]?[\d.]+", text):
            raise DataError(f"{path}:{number}: {text[:60]!r} is no label id; expected 0 to {num_labels - 1}.")
        else:
            near = difflib.get_close_matches(text, ids_of, n=1)
            hint = f"Did you mean {near[0]}?" if near else None
            raise DataError(
                f"{path}:{number}: {text[:60]!r} is no label; expected a name or an id, 0 to {num_labels - 1}.",
                hint=hint,
            )
    return ids


# ------------------------------------------------------------------------- export

EXPORT_FORMATS = ("midx", "faiss", "onnx")
_MEASURED_INSTANCES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written, and how well it finds what the exact search finds."""

    output: str
    format: str
    files: Mapping[str, int]
    """Name -> bytes, SHA256SUMS included."""
    measured: Sequence[Measurement]
    """What was exported, and last the run itself; without figures where there were no instances to measure on."""
    measured_on: str | None
    """The data; None where it was not found."""
    num_instances: int
    """Measured on."""
    num_labels: int
    validation: tuple[Mapping[str, float], Mapping[str, float]] | None
    """Metrics on the run's held-out instances, of the model alone, which the export's search is made of, and with the
    neighbours, the linear ranker and the frequencies that `predict` adds; None where nothing was held out."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `export`."""
        alone, whole = (None, None) if self.validation is None else map(dict, self.validation)
        return {
            "output": self.output,
            "format": self.format,
            "files": dict(self.files),
            "bytes": sum(self.files.values()),
            "measured": [one.as_dict() for one in self.measured],
            "measured_on": self.measured_on,
            "num_instances": self.num_instances,
            "num_labels": self.num_labels,
            "validation": {"model": alone, "predict": whole},
            "seconds": round(self.seconds, 3),
        }


def export(
    run: str | Path,
    *,
    output: str | Path,
    format: str = "midx",
    data: str | Path | None = None,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Write a run's best model as files that other programs load, with the sha256 of each, and measure them.

    Parameters
    ----------
    run : run directory.
    output : a new directory; it appears complete or not at all.
    format : `"midx"`: the whole model, as an inverted multi-index that NumPy alone can search; `"faiss"`: the label
        table as stock indexes, HNSW and IVF; `"onnx"`: the encoder.
    data : whose instances (of the test split, where there is one) recall is measured on and the search is set by; None
        takes what the run was trained on, if it is still there.

    Raises
    ------
    UsageError : `output` is not empty, or the format is unknown or needs a package that is not installed.
    """
    from xmc_midx.exporting.faiss import export_faiss, require_faiss
    from xmc_midx.exporting.midx import export_midx
    from xmc_midx.exporting.onnx import export_onnx, require_onnx
    from xmc_midx.exporting.sealed import sealed_directory
    from xmc_midx.exporting.source import ExportSource, Queries

    writers = {"midx": export_midx, "faiss": export_faiss, "onnx": export_onnx}
    if format not in writers:
        raise UsageError(f"format is {format!r}; expected {', '.join(EXPORT_FORMATS)}.")
    if format == "faiss":
        require_faiss()
    if format == "onnx":
        require_onnx()
    started = time.perf_counter()
    reporter = reporter or SilentReporter()
    target = Path(output)
    with sealed_directory(target) as directory:
        reporter.start("load", None)
        source = ExportSource.load(run)
        _say_which(source.directory, reporter)
        reporter.start("read", None)
        features, measured_on = _instances_to_measure(source, data)
        reporter.start("export", None)
        queries = Queries.build(source, features)
        measured = writers[format](source, queries, directory)
    return ExportResult(
        output=str(output),
        format=format,
        files={file.name: file.stat().st_size for file in sorted(target.iterdir())},
        measured=measured,
        measured_on=measured_on,
        num_instances=features.shape[0],
        num_labels=source.num_labels,
        validation=_validation_of(source.directory),
        seconds=time.perf_counter() - started,
    )


def _say_what_is_missing(run: str | Path, reporter: Reporter | None) -> None:
    directory = RunDirectory.open(run)
    there, size = 1 + len(directory.finished_members), 1 + len(directory.members)
    if reporter is not None and there < size and directory.has_model:
        reporter.message(
            f"warning: {directory.path} is an ensemble of {size} models, of which {there} can predict: results are of "
            f"{'that one' if there == 1 else 'those'}; `xmc-midx train DATA --output {directory.path} --resume` trains "
            "the others"
        )


def _say_which(run: RunDirectory, reporter: Reporter) -> None:
    if run.members:
        reporter.message(f"{run.path} is an ensemble of {1 + len(run.members)}; this is of its first model alone")


def _validation_of(run: RunDirectory) -> tuple[Mapping[str, float], Mapping[str, float]] | None:
    """Of the model alone, and of all that predicts; None where the record of the epochs, which no export needs, is
    missing or damaged."""
    from xmc_midx.checkpoint import CheckpointStore

    try:
        whole, best = run.interpolation_validation(), CheckpointStore(run.checkpoints).step_of("best")
        alone = [line.get("validation") for line in run.read_metrics() if line.get("step") == best]
    except DataError:
        return None
    return (alone[-1], whole) if alone and alone[-1] and whole else None


def _instances_to_measure(source: ExportSource, data: str | Path | None) -> tuple[csr_matrix, str | None]:
    """Some instances of the data, the same each time; none where the run's data is gone."""
    place = data
    if place is None:
        record = source.directory.read_json("run.json")
        place = record.get("data")
        if not isinstance(place, str):
            place = None
    try:
        dataset = None if place is None else load_dataset(place)
    except DataError:
        if data is not None:
            raise
        dataset = None
    if dataset is None:
        return csr_matrix(np.empty((0, source.num_features), dtype=np.float32)), None
    _check_sizes(dataset, num_features=source.num_features, num_labels=source.num_labels)
    split = dataset.test if dataset.test is not None and dataset.test.num_instances else dataset.split()
    count = min(_MEASURED_INSTANCES, split.num_instances)
    rows = np.sort(np.random.default_rng(0).permutation(split.num_instances)[:count])
    return split.features[rows], str(place)


# ----------------------------------------------------------------------- diagnose

REFERENCE_SAMPLER = "full"
"""Of `SAMPLER_NAMES`, the one that is no proposal: it scores all labels."""


def diagnose(
    run: str | Path,
    *,
    data: str | Path,
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

    _say_which(directory, reporter)
    reporter.start("read", None)
    model = TrainedModel.load(directory, find_device(device))
    config = model.config
    dataset = load_dataset(data)
    split = _training_split(dataset, data)
    _check_sizes(dataset, num_features=model.encoder.embedding.shape[0], num_labels=model.label_table.shape[0])
    batch_size, draws = config.training.batch_size, num_draws or config.sampler.num_draws
    assert isinstance(batch_size, int) and isinstance(draws, int), "the configuration is resolved"
    started = time.perf_counter()
    rows = choose_instances(split.labels, max(num_instances, batch_size), seed)
    features = model.scaling(split.features[rows])
    figures = diagnose_samplers(
        model,
        Instances.build(model.encode(features, dropout=dropout, seed=seed), split.labels[rows]),
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
        data=str(data),
        num_labels=dataset.num_labels,
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


def _check_sizes(dataset: XmcDataset, *, num_features: int, num_labels: int) -> None:
    for what, found, expected in (
        ("features", dataset.num_features, num_features),
        ("labels", dataset.num_labels, num_labels),
    ):
        if found != expected:
            raise DataError(
                f"{dataset.name} has {found} {what}; the model was trained with {expected}.",
                hint="Is this the model of another dataset?",
            )


# --------------------------------------------------------------------------- demo

_DEMO_DATASET = "debtags"
_DEMO_TEXTS = (
    "a small web server written in Python, with TLS and virtual hosts",
    "puzzle game with 3D graphics for children",
    "command line tool that converts audio files between formats",
    "header files for developing programs with the OpenGL library",
)


def demo(*, output: str | Path, config: Config | None = None, reporter: Reporter | None = None) -> DemoResult:
    """Train on the embedded dataset, evaluate, and predict for a few sentences typed as raw text."""
    training = train(_DEMO_DATASET, output=output, config=config, reporter=reporter)
    evaluation = evaluate(output, data=_DEMO_DATASET, reporter=reporter)
    prediction = predict(output, input=_DEMO_TEXTS, k=5, reporter=reporter)
    names = prediction.label_names
    assert names is not None, "the embedded dataset has label names"
    rows = zip(_DEMO_TEXTS, prediction.top.label_ids.tolist(), prediction.top.scores.tolist(), strict=True)
    examples = [
        (text, [(names[label], score) for label, score in zip(labels, scores, strict=True)])
        for text, labels, scores in rows
    ]
    return DemoResult(training=training, evaluation=evaluation, examples=examples)


# ---------------------------------------------------------------------- the parts


def _training_split(dataset: XmcDataset, data: str | Path) -> Split:
    split = dataset.train
    if split is None:
        raise DataError(f"{data}: has no training split.", hint="Expected train.txt, or one sparse feature file.")
    for _, error in training_faults(split):
        raise error
    return split


def _shape(dataset: XmcDataset, training: Split) -> DataShape:
    from xmc_midx.data.features import are_counts

    return DataShape(
        num_instances=training.features.shape[0],
        num_features=dataset.num_features,
        num_labels=dataset.num_labels,
        num_positives=training.labels.nnz,
        has_counts=are_counts(training.features),
    )


def _report_dict(report: MetricReport) -> dict[str, Any]:
    return {
        "metrics": dict(report.metrics),
        "num_instances": report.num_instances,
        "num_without_labels": report.num_without_labels,
        "num_ignored": report.num_ignored,
        "propensity": {"A": report.propensity_a, "B": report.propensity_b},
        "definition": report.definition,
    }


def _provenance(dataset: XmcDataset, data: str | Path, test: str | Path | None) -> dict[str, Any]:
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
    return str(Path(data).resolve()) if Path(data).exists() else str(data)
