"""Layer 7. `xmc-midx plan`: options of `train` -> `pipeline.plan` -> memory, disk and time beside what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xmc_midx.cli import options, render

if TYPE_CHECKING:
    from xmc_midx.pipeline import Plan

EPILOG = """\b
Examples:
  xmc-midx plan data/
  xmc-midx plan data/ --set model.dim=256 --output /scratch/runs/a"""


def plan(
    data: options.Data,
    output: Annotated[str, typer.Option("--output", "-o", metavar="RUN", help="Where the run would be.")] = ".",
    test: options.TestFile = None,
    config: options.ConfigFile = None,
    sets: options.Sets = None,
    preset: options.Preset = None,
    as_json: options.AsJson = False,
) -> None:
    """Forecast the memory, disk and time of a training on DATA, without training.

    Memory is good to about 20%; time is rough, and short trainings take several times as long. `train` refuses to
    begin what cannot fit.
    """
    from xmc_midx.config import load_config

    given = [] if preset is None else [f"training.preset={preset}"]
    settings = load_config(config, assignments=[*(sets or []), *given])

    from xmc_midx import pipeline

    with render.progress(as_json=as_json) as reporter:
        result = pipeline.plan(data, output=output, config=settings, test=test, reporter=reporter)
    if as_json:
        render.print_json(result.as_dict())
    else:
        _print_plan(result)


def _print_plan(result: Plan) -> None:
    needs = result.forecast
    for title, parts, available in (
        ("Memory", needs.host, result.available_memory),
        ("Memory of the device", needs.device, None),
    ):
        if parts:
            rows = [(name, render.size(size)) for name, size in parts.items()]
            rows.append(("in all", render.size(sum(parts.values()))))
            if available is not None:
                rows.append(("available", render.size(available)))
            render.print_table(("", ""), rows, title=f"{title} at the peak", right=[1])
            render.print_line()
    training = result.config.training
    facts = [
        ("a checkpoint", render.size(needs.checkpoint_bytes)),
        ("disk at the fullest", f"{render.size(needs.disk_bytes)} of {render.size(result.available_disk)} free"),
    ]
    if needs.seconds is not None:
        facts.append(("time", f"roughly {render.duration(needs.seconds)} for {training.epochs} epochs"))
    render.print_facts(facts)
