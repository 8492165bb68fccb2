"""Layer 7. `xmc-midx export`: `pipeline.export` -> files, recall against the exact search, bytes, time."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from xmc_midx.cli import options, render

if TYPE_CHECKING:
    from xmc_midx.exporting.source import Measurement
    from xmc_midx.pipeline import ExportResult

EPILOG = """\b
Formats:
  midx   the whole model as an inverted multi-index: safetensors, JSON, text;
         scripts/read_midx.py reads it with NumPy alone
  faiss  the label table as hnsw.faiss and ivf.faiss, by inner product
  onnx   the encoder: sparse rows -> queries

\b
OUT also holds labels and vocabulary, where the run has them, and SHA256SUMS.

\b
Examples:
  xmc-midx export runs/a exports/a
  xmc-midx export runs/a exports/a-faiss --format faiss --data data/
  cd exports/a && sha256sum -c SHA256SUMS"""


class Format(StrEnum):
    """What is written."""

    MIDX = "midx"
    FAISS = "faiss"
    ONNX = "onnx"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="New directory.")],
    form: Annotated[
        Format, typer.Option("--format", metavar="NAME", help="midx (default), faiss or onnx.", show_default=False)
    ] = Format.MIDX,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Measure recall on this; else on the run's own data.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Export the best model of RUN for other programs.

    Prints how many of the exact best labels the export finds, its size and the time of a query.
    """
    from xmc_midx import pipeline

    with render.progress(as_json=as_json) as reporter:
        result = pipeline.export(run, output=output, format=form.value, data=data, reporter=reporter)
    if as_json:
        render.print_json(result.as_dict())
    else:
        _print_export(result, run)


def _print_export(result: ExportResult, run: str) -> None:
    files = [(name, render.size(size)) for name, size in result.files.items()]
    total = render.size(sum(result.files.values()))
    title = f"{run} as {result.format}: {result.output}, {total}"
    render.print_table(("", ""), files, title=title, right=(1,))
    render.print_line()
    if result.measured_on is None:
        render.print_text(
            "Recall was not measured: the run's data is not there any more. Give some with --data, to a new OUT."
        )
    else:
        title = f"Against the exact search over {result.num_label_rows:,} labels; recall in %"
        heads = ("", "recall@1", "recall@5", "µs/query", "set to")
        render.print_table(heads, map(_row, result.measured), title=title, right=(1, 2, 3))
        render.print_text(
            f"Over {result.num_instances:,} instances of {result.measured_on}, of the model alone; "
            "times of one query at a time."
        )
    if result.validation is not None and result.validation[0] != result.validation[1]:
        alone, whole = (render.percent(metrics["P@1"]) for metrics in result.validation)
        render.print_text(
            f"On the run's held-out instances the model alone has a P@1 of {alone}%, and predict, which adds "
            f"neighbours, linear ranker and label frequencies, {whole}%."
        )
    render.print_line(f"Exported in {render.duration(result.seconds)}.")


def _row(one: Measurement) -> tuple[str, ...]:
    recalls = ("" if value is None else render.percent(value) for value in (one.recall_1, one.recall_5))
    time = "" if one.microseconds is None else f"{one.microseconds:,.0f}"
    return (one.name, *recalls, time, ", ".join(f"{name} {value:,}" for name, value in one.settings.items()))
