"""Layer 7. `xmc-midx evaluate`: a run, or any tool's predictions -> `pipeline.evaluate` -> metrics."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from xmc_midx.cli import options, render
from xmc_midx.errors import UsageError

if TYPE_CHECKING:
    from xmc_midx.pipeline import Evaluation

EPILOG = """\b
Examples:
  xmc-midx evaluate runs/debtags debtags
  xmc-midx evaluate runs/a data/test.txt --k 1,3,5,10 --json
  xmc-midx evaluate - debtags --predictions scores.npz --breakdown deciles

\b
FILE of --predictions, by its content (text also as .gz, .bz2, .xz):
  XMC   label:score label:score ..., an instance a line
  TSV   instance, rank, label, score, name; or instance, label, score
  JSONL {"instance": 0, "labels": [{"label": 7, "score": 3.2}, ...]}
  npz   label_ids and scores, instances x k; or a SciPy CSR matrix of scores"""


class Breakdown(StrEnum):
    """Groups of labels by training frequency."""

    HEAD_TAIL = "head-tail"
    DECILES = "deciles"


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or - with --predictions.")],
    data: options.Data,
    k: Annotated[str, typer.Option("--k", "-k", metavar="K,K,...", help="Cut-offs of the metrics.")] = "1,3,5",
    predictions: Annotated[
        str | None,
        typer.Option("--predictions", metavar="FILE", help="Of any tool, in a format below (-: stdin)."),
    ] = None,
    breakdown: Annotated[
        Breakdown, typer.Option("--breakdown", metavar="NAME", help="Labels by head-tail or deciles.")
    ] = Breakdown.HEAD_TAIL,
    a: Annotated[float | None, typer.Option("--A", metavar="A", help="Propensity A; else the registry's.")] = None,
    b: Annotated[float | None, typer.Option("--B", metavar="B", help="Propensity B; else the registry's.")] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compute the model's hashes.")] = False,
    fetch: options.Fetch = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure P, nDCG, recall, PSP and PSnDCG at k on the test split.

    The instances are DATA's test split, or the file itself; PSP also needs the label frequencies of a
    training split.
    """
    ks = parse_ks(k)
    source = None if run == "-" else run
    if source is None and predictions is None:
        raise UsageError(
            "RUN is -, so there is nothing to evaluate.", hint="Give a run directory or --predictions FILE."
        )
    if predictions == "-":
        predictions = "/dev/stdin"
    if predictions is not None:
        options.require_file("--predictions", predictions)

    from xmc_midx import pipeline
    from xmc_midx.data.download import download_if_missing

    with render.progress(as_json=as_json) as reporter:
        if fetch:
            download_if_missing(data, reporter=reporter)
        evaluation = pipeline.evaluate(
            source,
            data=data,
            ks=ks,
            predictions=predictions,
            breakdown=breakdown.value,
            A=a,
            B=b,
            device=device,
            verify=not no_verify,
            reporter=reporter,
        )
    if as_json:
        render.print_json(evaluation.as_dict())
    else:
        print_evaluation(evaluation, title=f"{predictions or run} on {data}")


def parse_ks(text: str) -> tuple[int, ...]:
    """`"1,3,5"` -> `(1, 3, 5)`, sorted and without repeats.

    Raises
    ------
    UsageError : a part is no whole number of 1 or more.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 10_000 for part in parts):
        raise UsageError(f"--k {text}: expected whole numbers from 1 to 10,000, such as 1,3,5.")
    return tuple(sorted({int(part) for part in parts}))


def print_evaluation(evaluation: Evaluation, *, title: str) -> None:
    """The metrics, recall by label frequency where it is known, and the definitions."""
    metrics = evaluation.report.metrics
    k = max(int(name.partition("@")[2]) for name in metrics)
    render.print_metrics(metrics, title=title)
    render.print_line()
    if evaluation.breakdown:
        _print_breakdown(evaluation, k=k)
        render.print_line()
    render.print_definitions(metrics, report=evaluation.report, source=evaluation.propensity_source)
    if number := evaluation.num_without_predictions:
        render.print_line(f"Without predictions: {number:,}; all their labels count as missed.")
    if evaluation.most_predictions is not None and evaluation.most_predictions < k:
        render.print_line(f"Longest list: {evaluation.most_predictions:,}; places beyond it count as misses.")
    render.print_line(f"Evaluated in {render.duration(evaluation.seconds)}.")


def _print_breakdown(evaluation: Evaluation, *, k: int) -> None:
    from xmc_midx.metrics import BREAKDOWNS

    heads = ("labels", "instances each", "number", "of the true", "of the hits", f"recall@{k}")
    rows = []
    for group in evaluation.breakdown:
        least, most = group["min_frequency"], group["max_frequency"]
        span = f"over {least - 1:,}" if most is None else f"{least:,} to {most:,}" if most > least else f"{least:,}"
        recall = "" if group["recall"] is None else render.percent(group["recall"])
        shares = render.percent(group["share_of_true"]), render.percent(group["share_of_hits"])
        rows.append((group["group"], span, f"{group['num_labels']:,}", *shares, recall))
    render.print_table(heads, rows, title="By training frequency of the label; shares in %", right=range(1, 6))
    definition = BREAKDOWNS[evaluation.breakdown_by]
    render.print_text(f"{definition[0].upper()}{definition[1:]}.")
    render.print_text(
        f"of the true, of the hits: the group's share of the true labels, and of those in the top {k}; equal for a "
        f"ranking that does not look at frequency. recall@{k}: hits of the group / its true labels, all instances "
        "together.",
        indent="  ",
    )
