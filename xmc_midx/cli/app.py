"""Layer 7. The entry point: one command line -> one exit code, and every error as one line.

Before it: the shell. After it: the command's own module. Exit codes: 0 ok, 1 bug, 2 usage, 3 data or model
file, 4 resources, 5 download, 6 diverged, 130 SIGINT, 143 SIGTERM. A reader that closes our stdout early has
what it wanted: 0.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from xmc_midx import __version__
from xmc_midx.cli import (
    check,
    convert,
    datasets,
    demo,
    diagnose,
    download,
    evaluate,
    export,
    plan,
    predict,
    prepare,
    render,
    train,
)
from xmc_midx.errors import XmcMidxError
from xmc_midx.paths import home_path
from xmc_midx.signals import Terminated, interrupt_on_signals

__all__ = ["main", "run"]

PROGRAM = "xmc-midx"
RESOURCE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EBADF),
}


class _Command(TyperCommand):
    """A command whose help writes `DATA` where typer writes `{DATA}` and `DATA <str>`."""

    def get_help(self, ctx: Any) -> str:
        usage, newline, rest = super().get_help(ctx).partition("\n")
        return usage.replace("{", "").replace("}", "") + newline + rest.replace(" <str>", "")


app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nStart here:\n  xmc-midx demo\n  xmc-midx train --help",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere in the line).")
    ] = False,
) -> None:
    """Extreme multi-label classification: train on sparse features, evaluate, predict."""


for _module, _function in (
    (train, train.train),
    (evaluate, evaluate.evaluate),
    (predict, predict.predict),
    (export, export.export),
    (diagnose, diagnose.diagnose),
    (prepare, prepare.prepare),
    (check, check.check),
    (convert, convert.convert),
    (plan, plan.plan),
    (datasets, datasets.datasets),
    (download, download.download),
    (demo, demo.demo),
):
    app.command(cls=_Command, epilog=_module.EPILOG)(_function)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What the user is told of an exception."""

    code: str
    exit_code: int
    message: str
    hint: str | None = None


def main() -> NoReturn:
    """Entry point of the `xmc-midx` script: prepare the process, run `sys.argv`, exit with its code."""
    _prepare_streams()
    if not sys.warnoptions and "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
    interrupt_on_signals()
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command line.

    Parameters
    ----------
    argv : the words after the program's name.

    Returns
    -------
    The exit code. Errors have been shown: on stderr as one line, or with `--json` on stdout as one document.
    """
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    # A shell expands `~/a`, but not `--output=~/a`.
    own = [re.sub(r"^(--[a-z-]+=)(~/.*)", lambda word: word[1] + str(home_path(word[2])), word) for word in own]
    words = [word for word in own if word != "--debug"] + list(argv[len(own) :])
    try:
        failure = _attempt(words or ["--help"], debug="--debug" in own)
        if isinstance(failure, int):
            return failure
        _show(failure, as_json="--json" in own)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return 0
    except OSError:  # neither the results nor the error could be written
        _discard_stdout()
        return 4
    return failure.exit_code


def _attempt(words: list[str], *, debug: bool) -> Failure | int:
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, words) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        sys.stdout.flush()
        return done.exit_code
    except BrokenPipeError:
        raise
    except BaseException as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _explain(error)
    return 0


def _explain(error: BaseException) -> Failure:
    match error:
        case XmcMidxError():
            return Failure(code=error.code, exit_code=error.exit_code, message=error.message, hint=error.hint)
        case KeyboardInterrupt():
            name, exit_code = ("Terminated", 143) if isinstance(error, Terminated) else ("Interrupted", 130)
            hint = " ".join(getattr(error, "__notes__", [])) or None
            return Failure(code="interrupted", exit_code=exit_code, message=f"{name}.", hint=hint)
        case MemoryError():
            return Failure(code="resources", exit_code=4, message="The memory of this machine is used up.")
        case OSError() if error.errno in RESOURCE_ERRNOS:
            place = error.filename if error.filename is not None else "standard output"
            return Failure(code="resources", exit_code=4, message=f"{place}: {error.strerror}.")
    if hasattr(error, "format_message"):
        return _explain_usage(error)
    return Failure(
        code="bug",
        exit_code=1,
        message=f"This is a bug in {PROGRAM}: {type(error).__name__}: {error}.",
        hint="Please report it with the traceback that --debug shows.",
    )


def _explain_usage(error: Any) -> Failure:
    """Typer vendors click's errors in newer versions: they are known by their method, not by their class."""
    message, hint = error.message, None
    if possible := getattr(error, "possibilities", None):
        hint = f"Did you mean {' or '.join(sorted(possible))}?"
    else:
        message = error.format_message()
        if "Did you mean" not in message:
            context = getattr(error, "ctx", None)
            hint = f"See {context.command_path if context else PROGRAM} --help."
    message = " ".join(message.replace("Value error, ", "").split())
    return Failure(code="usage", exit_code=2, message=message if message[-1:] in ".?!" else f"{message}.", hint=hint)


def _show(failure: Failure, *, as_json: bool) -> None:
    if as_json:
        facts = {"code": failure.code, "message": failure.message, "hint": failure.hint}
        render.print_json({"error": facts})
        return
    # A hint may have lines of its own: commands to type.
    first, *commands = (failure.hint or "").split("\n")
    width = render.terminal_width(sys.stderr)
    for text in (f"Error: {failure.message} {first}".strip(), *commands):
        line = render.printable(text)
        if width is not None:
            line = textwrap.fill(line, max(width, 20), break_long_words=False, break_on_hyphens=False)
        sys.stderr.write(f"{line}\n")


def _prepare_streams() -> None:
    """Closed descriptors become the null device, and no character is unprintable, whatever the locale."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter's own flush would complain at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
