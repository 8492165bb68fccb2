"""Layer 7. `xmc-midx download`: NAME -> `download` -> where it is."""

from __future__ import annotations

from typing import Annotated

import typer

from xmc_midx.cli import options, render
from xmc_midx.errors import UsageError

EPILOG = """\b
Examples:
  xmc-midx download EURLex-4K
  xmc-midx download Wiki10-31K --from-file ~/Downloads/Wiki10.zip
  xmc-midx download Amazon-670K --format raw --dir data/amazon-raw"""


def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name in `datasets`.")],
    directory: Annotated[
        str | None, typer.Option("--dir", metavar="D", help="Directory for its files, in place of the cache.")
    ] = None,
    from_file: Annotated[
        str | None, typer.Option("--from-file", metavar="ZIP", help="Archive that you have fetched yourself.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", metavar="NAME", help="bow (default), bow-v1 (the first features) or raw (text).")
    ] = "bow",
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing, use what is on disk; or set XMC_MIDX_OFFLINE=1.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Fetch and unpack a known dataset, or verify the one on disk.

    An interrupted download goes on where it ended. The cache is XMC_MIDX_CACHE, else xmc-midx in XDG_CACHE_HOME
    or ~/.cache.
    """
    if kind not in ("bow", "bow-v1", "raw"):
        raise UsageError(f"--format {kind}: expected bow, bow-v1 or raw.")
    from xmc_midx.data import download as library

    with render.progress(as_json=as_json) as reporter:
        result = library.download(
            name,
            directory=directory,
            from_file=from_file,
            kind=kind,  # type: ignore[arg-type]  # checked above
            offline=offline,
            reporter=reporter,
        )
    if as_json:
        render.print_json(result.as_dict())
        return
    facts = [("name", result.name), ("directory", result.directory), ("from", result.source)]
    if result.sha256:
        facts.append(("archive's sha256", result.sha256))
    facts.append(("files", ", ".join(result.files)))
    done = "on disk, verified in" if result.was_there else "fetched in"
    if result.source == "disk":
        facts.append(("verified", "no: put there by hand"))
        done = "found in"
    render.print_facts([*facts, (done, render.duration(result.seconds))])
