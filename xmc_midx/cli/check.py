"""Layer 7. `xmc-midx check`: DATA -> `check_dataset` -> statistics, and every problem with file:line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xmc_midx.cli import options, render

if TYPE_CHECKING:
    from xmc_midx.data.check import CheckReport
    from xmc_midx.data.dataset import SplitStatistics

EPILOG = """\b
Examples:
  xmc-midx check data/
  xmc-midx check data/ --json | jq '.problems[]'"""

STATISTICS = {
    "num_instances": "instances",
    "num_features": "features",
    "num_labels": "labels",
    "num_labels_with_positives": "labels with instances",
    "features_per_instance": "features per instance",
    "num_feature_values": "stored feature values",
    "num_positives": "pairs of instance and label",
    "labels_per_instance": "labels per instance",
    "instances_per_label": "instances per label",
    "num_head_labels": "head labels (over 100)",
    "num_torso_labels": "torso labels (6 to 100)",
    "num_tail_labels": "tail labels (0 to 5)",
    "tail_share": "their share of the labels",
    "max_label_frequency": "most frequent label",
    "num_without_labels": "instances without labels",
    "num_without_features": "instances without features",
}
"""Fields of `SplitStatistics` and what they are called in the table."""


def check(
    data: options.Data,
    test: Annotated[str | None, typer.Option("--test", metavar="FILE", help="File in place of the test split.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="Problems shown of each kind in each file.")
    ] = 20,
    fetch: options.Fetch = False,
    as_json: options.AsJson = False,
) -> None:
    """Validate DATA and describe it; exit 3 if it has errors.

    An error is what training would refuse; a warning is worth a look.
    """
    from xmc_midx.data.check import check_dataset

    if fetch:
        from xmc_midx.data.download import download_if_missing

        with render.progress(as_json=as_json) as reporter:
            download_if_missing(data, reporter=reporter)
    report = check_dataset(data, test=test, limit=limit)
    if as_json:
        render.print_json(report.as_dict())
    else:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(3)


def _print_report(report: CheckReport) -> None:
    splits = {file.role: file.statistics for file in report.files if file.statistics is not None}
    for file in report.files:
        render.print_line(f"{file.role}: {file.path}")
    if splits:
        render.print_line()
        _print_statistics(splits)
    if report.num_test_in_train is not None:
        render.print_text(f"Test instances with the features of a training instance: {report.num_test_in_train:,}")
    if (law := report.propensity) is not None:
        span = f"{law.smallest:.4g} to {law.largest:.4g}"
        render.print_text(f"Inverse propensities: {span} (A = {law.a:g}, B = {law.b:g})")
    render.print_line()
    _print_problems(report)


def _print_statistics(splits: Mapping[Any, SplitStatistics]) -> None:
    rows = [
        (name, *(render.number(getattr(statistics, field)) for statistics in splits.values()))
        for field, name in STATISTICS.items()
    ]
    render.print_table(("", *splits), rows, right=range(1, len(splits) + 1))


def _print_problems(report: CheckReport) -> None:
    for problem in report.problems:
        hint = f" {problem.hint}" if problem.hint else ""
        render.print_text(f"{problem.place}: {problem.level}: {problem.text}{hint}", indent="  ")
    shown = Counter(problem.kind for problem in report.problems)
    for kind, number in report.counts.items():
        if number > shown[kind]:
            render.print_text(f"... and {number - shown[kind]:,} more of the kind {kind}")
    render.print_text(f"{_count(report.num_errors, 'error')}, {_count(report.num_warnings, 'warning')}.")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
