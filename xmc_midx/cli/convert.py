"""Layer 7. `xmc-midx convert`: DATA -> `convert` -> a directory in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from xmc_midx.cli import options, render
from xmc_midx.errors import UsageError

EPILOG = """\b
Examples:
  xmc-midx convert data/ data-npz --format npz
  xmc-midx convert debtags debtags-pair --format pair --json"""

FORMATS = ("xmc", "pair", "svmlight", "npz")


def convert(
    data: options.Data,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to make.")],
    form: Annotated[
        str,
        typer.Option("--format", metavar="NAME", help="xmc: train.txt; pair: trn_X_Xf.txt; svmlight; npz: X.trn.npz."),
    ],
    test: Annotated[str | None, typer.Option("--test", metavar="FILE", help="File in place of the test split.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write DATA in another format, with what lies beside it.

    All commands read all of them. `pair` is what pyxclib reads, `npz` what PECOS and SciPy read, `svmlight` XMC text
    without a header.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form}: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    from xmc_midx.data.convert import convert as library

    result = library(data, output=out, format=form, test=test)  # type: ignore[arg-type]  # checked above
    if as_json:
        render.print_json(result.as_dict())
        return
    render.print_facts([("directory", result.directory), ("format", result.format), ("files", ", ".join(result.files))])
