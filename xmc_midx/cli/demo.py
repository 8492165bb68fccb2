"""Layer 7. `xmc-midx demo`: `pipeline.demo` on the embedded dataset -> metrics and readable predictions."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from xmc_midx.cli import options, render
from xmc_midx.cli.evaluate import print_evaluation
from xmc_midx.cli.train import trained

EPILOG = """\b
Example:
  xmc-midx demo --output runs/demo"""


def demo(
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="RUN", help="Keep the run here; otherwise it is not kept."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train, evaluate and predict on the embedded dataset.

    Needs no download and ends with the labels of a few sentences.
    """
    from xmc_midx import pipeline

    with tempfile.TemporaryDirectory(prefix="xmc-midx-") as directory, render.progress(as_json=as_json) as reporter:
        result = pipeline.demo(output=Path(output or directory), reporter=reporter)
    training, evaluation = result.training, result.evaluation
    if as_json:
        render.print_json(
            {
                "training": training.as_dict(),
                "evaluation": evaluation.as_dict(),
                "examples": [
                    {"text": text, "labels": [{"name": name, "score": score} for name, score in labels]}
                    for text, labels in result.examples
                ],
            }
        )
        return
    seconds = render.duration(training.seconds)
    done, of_first = trained(training)
    render.print_text(f"Trained {done} in {seconds}; the best{of_first} was epoch {training.best_epoch}.")
    render.print_line()
    print_evaluation(evaluation, title="Test split")
    for text, labels in result.examples:
        render.print_line()
        render.print_text(f"“{text}”", indent=" ")
        render.print_table(("", ""), [(f"  {score:.2f}", name) for name, score in labels])
    render.print_line()
    render.print_line("Next:")
    if output is not None:
        run = shlex.quote(output)
        render.print_line(f'  echo "your own words" | xmc-midx predict {run} -')
    else:
        render.print_line("  xmc-midx demo --output runs/demo")
    render.print_line("  xmc-midx train DATA --output runs/mine")
