"""Layer 7. `xmc-midx check`: DATA -> `check_dataset` -> every problem with file:line, and statistics."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOG = """\b
Example:
  xmc-midx check data/"""


def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Name in `datasets`, directory, or sparse file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Validate DATA and describe it; exit 3 if it has errors."""
