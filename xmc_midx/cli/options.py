"""Layer 7. Arguments and options that mean the same in several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xmc_midx.errors import UsageError

__all__ = ["AsJson", "ConfigFile", "Data", "Fetch", "Preset", "Sets", "TestFile", "require_file"]

Data = Annotated[str, typer.Argument(metavar="DATA", help="Name in `datasets`, directory, .txt, .svm or .npz.")]
TestFile = Annotated[str | None, typer.Option("--test", metavar="FILE", help="Sparse file to evaluate on at the end.")]
ConfigFile = Annotated[str | None, typer.Option("--config", metavar="FILE", help="Configuration in YAML.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, as in model.dim=256; repeatable."),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="fast, default or best: how long what is derived may take."),
]
Fetch = Annotated[bool, typer.Option("--download", help="Fetch DATA first if it is a name and not on disk.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def require_file(option: str, path: str) -> None:
    """Refuse what is not there, or is a directory; a pipe will do."""
    if not Path(path).exists() or Path(path).is_dir():
        raise UsageError(f"{option} {path}: is no file.")
