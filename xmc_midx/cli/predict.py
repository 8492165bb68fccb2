"""Layer 7. `xmc-midx predict`: rows or texts -> `pipeline.predict_stream` -> labels and scores, as they come."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer

from xmc_midx.cli import answers, options, render
from xmc_midx.cli.answers import Format
from xmc_midx.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from xmc_midx.pipeline import PredictionStream
    from xmc_midx.types import Reporter, TopK

EPILOG = """\b
Formats:
  tsv    instance, rank, label, score, name: tab-separated, a label a line
  jsonl  {"instance": 0, "labels": [{"label": 7, "score": 3.2, "name": ...}]}
  xmc    label:score label:score ..., an instance a line; `evaluate` reads it
  npz    arrays label_ids and scores, instances x k, padded with -1

\b
Instances and labels count from 0, ranks from 1. Rows may have a header and
labels or not. With --scores probabilities a score is the chance that the
label applies, as the held-out instances of the training have it.

\b
Examples:
  xmc-midx predict runs/a data/test.txt --k 10 --output top.tsv
  xmc-midx predict runs/a big.txt.gz -o big.tsv --resume
  xmc-midx predict runs/a big.txt --shard 2/8 -o part2.tsv
  echo "sparse linear models" | xmc-midx predict runs/demo -
  tail -f titles.txt | xmc-midx predict runs/demo - --scores probabilities \\
    --threshold 0.5 | awk -F'\\t' '{print $1, $5}'"""

COMPRESSED = (".gz", ".bz2", ".xz")
_FORMATS = {".tsv": Format.TSV, ".jsonl": Format.JSONL, ".npz": Format.NPZ}
"""By the name of a file; a .txt may be any."""


class Scores(StrEnum):
    """What a score is."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"


def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Sparse file, text file, or - for stdin.")],
    k: Annotated[int, typer.Option("--k", "-k", metavar="K", min=1, help="Labels for each instance.")] = 5,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write here (.gz compresses), not to stdout (-)."),
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option("--format", metavar="NAME", help="tsv, jsonl, xmc or npz; by default as FILE is called, or tsv."),
    ] = None,
    scores: Annotated[
        Scores,
        typer.Option(
            "--scores",
            metavar="NAME",
            help="logits or probabilities (that the label applies).",
        ),
    ] = Scores.LOGITS,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="X", help="Leave out labels with a lower score (see --scores)."),
    ] = None,
    allow: Annotated[
        str | None, typer.Option("--allow", metavar="FILE", help="Label ids or names, a line each: only these.")
    ] = None,
    deny: Annotated[
        str | None, typer.Option("--deny", metavar="FILE", help="Label ids or names, a line each: never these.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="INPUT is raw text, also where it could be rows.")] = False,
    shard: Annotated[
        str,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Part I of N of a file; the outputs joined are the whole.",
            show_default=False,
        ),
    ] = "1/1",
    resume: Annotated[
        bool, typer.Option("--resume", help="When interrupted keep FILE.partial, and go on from it.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Score all labels, not those of the best cells.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compute the model's hashes.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Predict the best labels of each instance of INPUT.

    INPUT may be of any size and is answered as it is read; a line on stdin is answered at once. Raw text, one text
    a line, needs a run that was trained with a vocabulary.
    """
    if output == "-":
        output = None
    if form is Format.NPZ and output is None:
        raise UsageError("--format npz: is binary, expected --output FILE with it.")
    if as_json and form is not None and output is None:
        raise UsageError("--json and --format: expected one of them, or --output FILE for the second.")
    for option, file in (("--allow", allow), ("--deny", deny)):
        if file is not None:
            options.require_file(option, file)
    if threshold is not None and math.isnan(threshold):
        raise UsageError("--threshold nan: expected a number.")
    part = _part(shard)
    if output is not None:
        form = _form_of(Path(output), form, {"INPUT": source, "--allow": allow, "--deny": deny})
    if resume and (output is None or form is Format.NPZ or Path(output).suffix in COMPRESSED or _is_special(output)):
        raise UsageError("--resume: expected --output FILE with it, of tsv, jsonl or xmc, not compressed.")
    from xmc_midx import pipeline

    # Nobody waits for single answers that go to a file.
    to_file = output is not None and not _is_special(output)
    to_terminal = output is None and not as_json and sys.stdout.isatty()
    with render.progress(as_json=as_json, live=not to_terminal) as reporter:
        stream = pipeline.predict_stream(
            run,
            input=_stdin() if source == "-" else source,
            k=k,
            scores=scores.value,
            threshold=threshold,
            allow=allow,
            deny=deny,
            text=True if text else None,
            shard=part,
            live=not (to_file or as_json),
            exact=exact,
            device=device,
            verify=not no_verify,
            reporter=reporter,
        )
        if source == "-" and sys.stdin.isatty():
            reporter.message("Reading from the terminal, a line at a time; end with Ctrl-D.")
        form = form or Format.TSV
        if output is not None:
            num_instances = _write_file(stream, Path(output), form, k, resume=resume, reporter=reporter)
            document: dict[str, Any] = {"output": output, "format": form.value, "num_instances": num_instances, "k": k}
        elif as_json:
            found = [one for c in stream for one in answers.records(c.first, c.top, stream.label_names)]
            document = {"num_instances": len(found), "k": k, "predictions": found}
        else:
            for chunk in stream:
                sys.stdout.writelines(answers.lines(chunk.first, chunk.top, stream.label_names, form))
                sys.stdout.flush()
    if as_json:
        render.print_json(document)


def _stdin() -> BinaryIO:
    return cast("BinaryIO", sys.stdin.buffer)


def _part(shard: str) -> tuple[int, int]:
    """Of `2/8`: 2 and 8."""
    part = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    if part is None:
        raise UsageError(f"--shard {shard}: expected I/N, such as 2/8.")
    return int(part[1]), int(part[2])


def _form_of(output: Path, form: Format | None, inputs: Mapping[str, str | None]) -> Format | None:
    """The format of an output that can be written, and is none of the inputs: the given one, or as it is called."""
    from xmc_midx.data.files import plain_name

    _check_writable(output)
    for name, file in inputs.items():
        if file is not None and output.is_file() and Path(file).is_file() and output.samefile(file):
            raise UsageError(f"--output {output}: is the file of {name}, which would be lost.")
    ending = Path(plain_name(output)).suffix
    if form is None and ending in (".csv", ".json", ".parquet"):
        raise UsageError(f"--output {output}: {ending} is no format of predictions; expected .tsv, .jsonl or .npz.")
    form = form or _FORMATS.get(ending)
    if form is Format.NPZ and output.suffix in COMPRESSED:
        raise UsageError(f"--output {output}: an .npz file is compressed already.")
    return form


# Writing


def _write_file(stream: PredictionStream, path: Path, form: Format, k: int, *, resume: bool, reporter: Reporter) -> int:
    """Write all predictions and return how many instances the file has; it appears complete or not at all. A pipe or a
    device is written to as it is.

    Raises
    ------
    ResourceError : the file cannot be written.
    """
    from xmc_midx.data.files import atomic_write
    from xmc_midx.data.resumable import ResumableFile

    started = time.monotonic()
    if _is_special(path):
        with path.open("wb") as file:
            return _write(stream, file, form, k, Path(tempfile.gettempdir()), live=True)
    path = Path(os.path.realpath(path))
    if form is Format.NPZ or path.suffix in COMPRESSED:
        with atomic_write(path) as file:
            num_instances = _write(stream, file, form, k, path.parent)
    else:
        num_instances = 0
        with ResumableFile.open(path, {"format": form.value, **stream.settings}, resume=resume) as target:
            if target.done is not None:
                stream.go_on(target.done.next_instance, target.done.input_sha256)
                reporter.message(f"Going on after {target.done.next_instance:,} instances.")
            try:
                for chunk in stream:
                    target.write(b"".join(_encoded(stream, chunk.first, chunk.top, form)))
                    num_instances += len(chunk.top.label_ids)
                    target.mark(chunk.first + len(chunk.top.label_ids), chunk.input_sha256)
            except KeyboardInterrupt as stop:
                if resume:
                    stop.add_note("Go on with the same command.")
                raise
    seconds = time.monotonic() - started
    rate = f", {num_instances / seconds:,.0f} a second" if seconds > 1 else ""
    reporter.message(f"{num_instances:,} instances in {render.duration(seconds)}{rate}.")
    return num_instances


def _write(stream: PredictionStream, file: BinaryIO, form: Format, k: int, scratch: Path, *, live: bool = False) -> int:
    num_instances = 0
    npz = answers.NpzWriter(scratch, k) if form is Format.NPZ else None
    for chunk in stream:
        num_instances += len(chunk.top.label_ids)
        if npz is not None:
            npz.add(chunk.top)
        else:
            file.write(b"".join(_encoded(stream, chunk.first, chunk.top, form)))
            if live:
                file.flush()
    if npz is not None:
        npz.finish(file)
    return num_instances


def _encoded(stream: PredictionStream, first: int, top: TopK, form: Format) -> Iterator[bytes]:
    for line in answers.lines(first, top, stream.label_names, form):
        yield line.encode("utf-8", errors="backslashreplace")


def _is_special(path: str | Path) -> bool:
    """Whether a path is there and is no regular file: a pipe, a device."""
    return Path(path).exists() and not Path(path).is_file()


def _check_writable(path: Path) -> None:
    """Find out before the work, not after it."""
    if path.is_dir():
        raise UsageError(f"--output {path}: is a directory, expected a file.")
    if _is_special(path):
        return
    try:
        with tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent):
            pass
    except OSError as error:
        raise ResourceError(f"--output {path}: cannot be written: {error.strerror}.") from None
