"""Layer 6. Metrics of a run, or of any tool's predictions, on a test split: `evaluate`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xmc_midx.data.dataset import Data, Split, XmcDataset, is_in_memory, load_dataset, training_faults
from xmc_midx.data.predictions import read_predictions
from xmc_midx.errors import DataError, UsageError
from xmc_midx.metrics import (
    BREAKDOWNS,
    FREQUENCY_GROUPS,
    breakdown_by_frequency,
    checked_ks,
    evaluate_topk,
    frequency_deciles,
    without_ignored,
)
from xmc_midx.paths import home_path
from xmc_midx.pipeline.inputs import called, check_k, open_predictor, propensity
from xmc_midx.types import DEFAULT_KS, MetricReport, Reporter, SilentReporter, TopK

if TYPE_CHECKING:
    from xmc_midx.predictor import Predictor

__all__ = ["Evaluation", "evaluate", "predicted", "report_dict", "with_ignored"]


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
            **report_dict(self.report),
            "propensity_source": self.propensity_source,
            "num_without_predictions": self.num_without_predictions,
            "seconds": round(self.seconds, 3),
            "breakdown_by": self.breakdown_by,
            "breakdown": [dict(group) for group in self.breakdown],
        }


def evaluate(
    run: str | Path | None,
    *,
    data: Data,
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
    data : name of a dataset, directory (its test split is evaluated), or one sparse feature file; or what is in memory,
        a pair of matrices, features (N, F) and labels (N, L), or an `XmcDataset`.
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
    predictor = (
        None
        if run is None
        else open_predictor(run, reporter, device=device, verify=verify, answers=predictions is None)
    )
    reporter.start("read", None)
    dataset = load_dataset(data, sizes=None if predictor is None else (predictor.num_features, predictor.num_labels))
    split = dataset.test if dataset.test is not None else dataset.train
    assert split is not None, "a dataset has a split"
    if (
        dataset.test is None
        and not isinstance(data, tuple)
        and (isinstance(data, XmcDataset) or home_path(data).is_dir())
    ):
        hint = f"Give the {'pair' if is_in_memory(data) else 'file'} itself."
        raise DataError(f"{called(dataset, data)}: has no test split to evaluate on.", hint=hint)
    frequencies, num_train = _training_frequencies(predictor, dataset)
    a, b, source = propensity(A, B, dataset, num_train)
    seconds = 0.0
    if predictions is not None:
        top = read_predictions(home_path(predictions), dataset.num_labels, num_instances=split.labels.shape[0])
    else:
        if predictor is None:
            raise UsageError("There is nothing to evaluate: expected a run directory or a predictions file.")
        _check_labels(predictor, dataset, max(cuts))
        started = time.perf_counter()
        top = predicted(predictor, split, max(cuts), reporter)
        seconds = time.perf_counter() - started
    counts = (top.label_ids >= 0).sum(axis=1)
    top, labels = without_ignored(top, split.labels, split.ignored)
    report = evaluate_topk(top, labels, ks=cuts, label_frequencies=frequencies, num_train=num_train, A=a, B=b)
    report = with_ignored(report, split)
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


def with_ignored(report: MetricReport, split: Split) -> MetricReport:
    """The report with the number of pairs that were left out of it."""
    return report if split.ignored is None else replace(report, num_ignored=split.ignored.nnz)


def report_dict(report: MetricReport) -> dict[str, Any]:
    """Metrics in a JSON document."""
    return {
        "metrics": dict(report.metrics),
        "num_instances": report.num_instances,
        "num_without_labels": report.num_without_labels,
        "num_ignored": report.num_ignored,
        "propensity": {"A": report.propensity_a, "B": report.propensity_b},
        "definition": report.definition,
    }


def predicted(predictor: Predictor, split: Split, k: int, reporter: Reporter | None) -> TopK:
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


def _check_labels(predictor: Predictor, dataset: XmcDataset, k: int) -> None:
    if predictor.num_labels != dataset.num_labels:
        raise DataError(
            f"{dataset.name} has {dataset.num_labels} labels; the model was trained with {predictor.num_labels}.",
            hint="Is this the model of another dataset?",
        )
    check_k(k, predictor.num_labels)
