"""Layer 7. `xmc-midx prepare`: raw text -> `prepare` -> a dataset directory, and what was noticed on the way."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from xmc_midx.cli import options, render

if TYPE_CHECKING:
    from xmc_midx.data.prepare import Preparation, PreparedSplit

EPILOG = """\b
Files (.gz, .bz2, .xz as well):
  TSV    labels TAB text
  CSV    columns text and labels, or --text-column and --label-column
  JSONL  {"text": "...", "labels": ["a", "b"]}; or the XMC repository's
         trn.json.gz

\b
Examples:
  xmc-midx prepare train.tsv --test test.tsv --out data/mine
  xmc-midx prepare posts.csv --text-column title --text-column body \\
      --label-column tags --label-separator ' ' --test-fraction .1 --out posts
  xmc-midx prepare trn.json.gz --test tst.json.gz \\
      --label-names lbl.json.gz --out data/LF-AmazonTitles-131K"""


class Form(StrEnum):
    """How raw text is kept in a file."""

    TSV = "tsv"
    CSV = "csv"
    JSONL = "jsonl"


class Kind(StrEnum):
    """What the labels of a text are."""

    AUTO = "auto"
    IDS = "ids"
    NAMES = "names"


def prepare(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Texts and labels: TSV, CSV or JSON lines.")],
    out: Annotated[str, typer.Option("--out", "--output", "-o", metavar="DIR", help="Dataset directory to make.")],
    test: Annotated[
        str | None, typer.Option("--test", metavar="FILE", help="The test split: a file of the same layout.")
    ] = None,
    test_fraction: Annotated[
        float | None,
        typer.Option(
            "--test-fraction",
            metavar="X",
            help="Hold out about this share as the test split; equal texts stay together.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of --test-fraction.")] = 0,
    form: Annotated[
        Form | None, typer.Option("--format", metavar="NAME", help="tsv, csv or jsonl; else the file's name says it.")
    ] = None,
    text_columns: Annotated[
        list[str] | None,
        typer.Option("--text-column", metavar="NAME", help="Column or key of the text; repeatable: joined by a blank."),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", metavar="NAME", help="Column or key of the labels.")
    ] = None,
    label_separator: Annotated[
        str, typer.Option("--label-separator", metavar="S", help="Between labels (TSV, CSV).")
    ] = ",",
    delimiter: Annotated[
        str, typer.Option("--delimiter", metavar="C", help="Between the fields of CSV: a character or tab.")
    ] = ",",
    label_kind: Annotated[
        Kind, typer.Option("--label-kind", metavar="NAME", help="ids, names or auto: ids if all are numbers.")
    ] = Kind.AUTO,
    label_names: Annotated[
        str | None,
        typer.Option(
            "--label-names", metavar="FILE", help="Name of label 0, 1, ... on each line, or JSON lines (title)."
        ),
    ] = None,
    min_df: Annotated[int, typer.Option("--min-df", metavar="N", min=1, help="Texts that must have a token.")] = 2,
    max_features: Annotated[
        int | None, typer.Option("--max-features", metavar="N", min=1, help="Keep the most frequent tokens.")
    ] = None,
    ngrams: Annotated[
        int, typer.Option("--ngrams", metavar="N", min=1, max=5, help="Longest run of words that is a token.")
    ] = 1,
    compress: Annotated[bool, typer.Option("--compress", help="Write .txt.gz.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the dataset that is in DIR.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a dataset directory of raw text, with its vocabulary.

    Labels that are all whole numbers are ids from 0, others are names, numbered in alphabetical order.
    """
    from xmc_midx.data import prepare as stage
    from xmc_midx.data.raw import TextLayout

    with render.progress(as_json=as_json) as reporter:
        result = stage.prepare(
            text,
            output=out,
            test=test,
            test_fraction=test_fraction,
            seed=seed,
            layout=TextLayout(
                form=None if form is None else form.value,
                text_columns=tuple(text_columns or ()),
                label_column=label_column,
                label_separator=label_separator,
                delimiter="\t" if delimiter == "tab" else delimiter,
            ),
            label_kind=label_kind.value,
            label_names=label_names,
            min_document_frequency=min_df,
            max_features=max_features,
            max_ngram=ngrams,
            compress=compress,
            force=force,
            reporter=reporter,
        )
    if as_json:
        render.print_json(result.as_dict())
    else:
        _print_result(result)


def _print_result(result: Preparation) -> None:
    render.print_line(f"{result.directory}: {', '.join(result.files)}")
    render.print_line()
    splits = {"train": result.train} | ({} if result.test is None else {"test": result.test})
    rows = [(name, *(render.number(figure(split)) for split in splits.values())) for name, figure in _FIGURES.items()]
    render.print_table(("", *splits), rows, right=range(1, len(splits) + 1))
    kind = "numbered as in the text" if result.label_kind == "ids" else "known by name"
    render.print_text(f"{result.num_features:,} features; {result.num_labels:,} labels, {kind}.")
    if number := result.num_unseen_labels:
        subject, rest = ("label is", "it, yet it counts") if number == 1 else ("labels are", "them, yet they count")
        render.print_text(
            f"{number:,} {subject} in the test split alone: no training instance has {rest} in the metrics."
        )
    render.print_text(f"Prepared in {render.duration(result.seconds)}.")
    render.print_line()
    render.print_line("Next:")
    directory = shlex.quote(result.directory)
    render.print_line(f"  xmc-midx train {directory} --output RUN")
    if result.test is not None:
        render.print_line(f"  xmc-midx evaluate RUN {directory}")
    render.print_line('  echo "a text" | xmc-midx predict RUN -')


_FIGURES: dict[str, Callable[[PreparedSplit], float]] = {
    "instances": lambda split: split.num_instances,
    "features per instance": lambda split: split.num_feature_values / split.num_instances,
    "labels per instance": lambda split: split.num_positives / split.num_instances,
    "instances without labels": lambda split: split.num_without_labels,
    "instances without features": lambda split: split.num_without_features,
    "empty texts": lambda split: split.num_empty_texts,
}
