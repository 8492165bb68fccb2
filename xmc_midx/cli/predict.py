"""Layer 7. `xmc-midx predict`: rows or texts -> `pipeline.predict` -> labels and scores."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from xmc_midx.cli import options, render
from xmc_midx.errors import DataError, ResourceError, UsageError, XmcMidxError

if TYPE_CHECKING:
    from xmc_midx.pipeline import Prediction

EPILOG = """\b
Formats:
  tsv    instance, rank, label, score, name: tab-separated, a label a line
  jsonl  {"instance": 0, "labels": [{"label": 7, "score": 3.2, "name": ...}]}
  xmc    label:score label:score ..., an instance a line; `evaluate` reads it
  npz    arrays label_ids and scores, instances x k, padded with -1

\b
Instances and labels count from 0, ranks from 1; scores are logits.

\b
Examples:
  xmc-midx predict runs/a data/test.txt --k 10 --output top.tsv
  echo "sparse linear models" | xmc-midx predict runs/demo -
  xmc-midx predict runs/a rows.txt | awk -F'\\t' '$2 == 1 {print $3}'"""


COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
"""How gzip, bzip2 and xz files begin."""


class Format(StrEnum):
    """How predictions are written."""

    TSV = "tsv"
    JSONL = "jsonl"
    XMC = "xmc"
    NPZ = "npz"


def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Sparse file, text file, or - for stdin.")],
    k: Annotated[int, typer.Option("--k", "-k", metavar="K", min=1, help="Labels for each instance.")] = 5,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write here (.gz compresses), not to stdout."),
    ] = None,
    form: Annotated[
        Format | None, typer.Option("--format", metavar="NAME", help="tsv (default), jsonl, xmc or npz.")
    ] = None,
    allow: Annotated[
        str | None, typer.Option("--allow", metavar="FILE", help="Label ids, one a line: predict only these.")
    ] = None,
    deny: Annotated[
        str | None, typer.Option("--deny", metavar="FILE", help="Label ids, one a line: never predict these.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="INPUT is raw text, also where it could be rows.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Score all labels, as this release always does.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compute the model's hashes.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Predict the best labels of each instance of INPUT.

    Raw text, one text a line, needs a run that was trained with a vocabulary.
    """
    if form is Format.NPZ and output is None:
        raise UsageError("--format npz: is binary, expected --output FILE with it.")
    if as_json and form is not None and output is None:
        raise UsageError("--json and --format: expected one of them, or --output FILE for the second.")
    for option, file in (("--allow", allow), ("--deny", deny)):
        if file is not None and not Path(file).is_file():
            raise UsageError(f"{option} {file}: is no file.")
    if output is not None:
        _check_writable(Path(output))

    from xmc_midx import pipeline

    with _input(source, run=run, text=text) as rows, render.progress(as_json=as_json) as reporter:
        prediction = pipeline.predict(
            run,
            input=rows,
            k=k,
            allow=Path(allow) if allow is not None else None,
            deny=Path(deny) if deny is not None else None,
            device=device,
            verify=not no_verify,
            reporter=reporter,
        )
    num_instances = len(prediction.top.label_ids)
    if output is not None:
        write(prediction, Path(output), form or Format.TSV)
        if as_json:
            render.print_json(
                {
                    "output": output,
                    "format": (form or Format.TSV).value,
                    "num_instances": num_instances,
                    "k": k,
                }
            )
    elif as_json:
        render.print_json({"num_instances": num_instances, "k": k, "predictions": list(_records(prediction))})
    else:
        sys.stdout.writelines(_lines(prediction, form or Format.TSV))


@contextmanager
def _input(source: str, *, run: str, text: bool) -> Iterator[str | Path | list[str]]:
    """What the pipeline reads: a path, or texts. Rows on stdin go to a file first."""
    if source != "-":
        from xmc_midx.data.sources import is_named

        path = Path(source)
        as_text = path.is_file() and (text or (not is_named(path) and _looks_like_text(_first_line(path), run)))
        yield _texts(path.read_bytes(), source) if as_text else source
        return
    if sys.stdin.isatty():
        sys.stderr.write("Reading from the terminal; end with Ctrl-D.\n")
    content = sys.stdin.buffer.read()
    if text or _looks_like_text(content.partition(b"\n")[0], run):
        yield _texts(content, "standard input")
        return
    with tempfile.TemporaryDirectory(prefix="xmc-midx-") as directory:
        path = Path(directory) / "stdin.txt"
        path.write_bytes(content)
        try:
            yield path
        except XmcMidxError as error:
            error.message = error.message.replace(str(path), "standard input")
            raise


def _first_line(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.readline(65536)


def _looks_like_text(line: bytes, run: str) -> bool:
    """Whether a first line is neither a header nor sparse features, and the run can read text.

    In doubt it is not: rows that were taken for text would be answered, and wrongly, without a complaint.
    """
    if not (Path(run) / "vocabulary.txt").exists() or line.startswith(COMPRESSED):
        return False
    return not re.fullmatch(rb"(\xef\xbb\xbf)?[\d\s.,+-]*|.*\d:[\d.+-].*", line.strip(), re.DOTALL)


def _texts(content: bytes, name: str) -> list[str]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError:
            raise DataError(f"{name}:{number}: is not UTF-8, expected text.") from None
    return texts


# Writing


def write(prediction: Prediction, path: Path, form: Format) -> None:
    """Write predictions; the file appears complete or not at all. A pipe or a device is written to as it is.

    Raises
    ------
    ResourceError : the file cannot be written.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            _write(prediction, stream, form)
        return
    from xmc_midx.data.files import atomic_write

    with atomic_write(Path(os.path.realpath(path))) as stream:
        _write(prediction, stream, form)


def _write(prediction: Prediction, stream: BinaryIO, form: Format) -> None:
    if form is Format.NPZ:
        import numpy as np

        np.savez_compressed(stream, label_ids=prediction.top.label_ids, scores=prediction.top.scores)
    else:
        stream.writelines(line.encode("utf-8", errors="backslashreplace") for line in _lines(prediction, form))


def _check_writable(path: Path) -> None:
    """Find out before the work, not after it."""
    if path.is_dir():
        raise UsageError(f"--output {path}: is a directory, expected a file.")
    if path.exists() and not path.is_file():
        return
    try:
        with tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent):
            pass
    except OSError as error:
        raise ResourceError(f"--output {path}: cannot be written: {error.strerror}.") from None


def _rows(prediction: Prediction) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Instance -> its labels and the shortest text of their scores that reads back to the same float32."""
    top = prediction.top
    for instance, (label_ids, scores) in enumerate(
        zip(top.label_ids.tolist(), top.scores.astype(str).tolist(), strict=True)
    ):
        yield instance, [(label, score) for label, score in zip(label_ids, scores, strict=True) if label >= 0]


def _records(prediction: Prediction) -> Iterator[dict[str, Any]]:
    names = prediction.label_names
    for instance, row in _rows(prediction):
        labels: list[dict[str, Any]] = [{"label": label, "score": float(score)} for label, score in row]
        if names is not None:
            labels = [{**entry, "name": names[entry["label"]]} for entry in labels]
        yield {"instance": instance, "labels": labels}


def _lines(prediction: Prediction, form: Format) -> Iterator[str]:
    if form is Format.JSONL:
        for record in _records(prediction):
            yield json.dumps(record, ensure_ascii=False) + "\n"
        return
    names = prediction.label_names
    for instance, row in _rows(prediction):
        if form is Format.XMC:
            yield " ".join(f"{label}:{score}" for label, score in row) + "\n"
            continue
        for rank, (label, score) in enumerate(row, start=1):
            name = "" if names is None else f"\t{render.printable(names[label])}"
            yield f"{instance}\t{rank}\t{label}\t{score}{name}\n"
