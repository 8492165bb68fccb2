"""Layer 7. `xmc-midx plan`: options of `train` -> `pipeline.plan` -> memory, disk and time beside what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xmc_midx.cli import options, render
from xmc_midx.errors import UsageError

if TYPE_CHECKING:
    from xmc_midx.forecast import TrainingData
    from xmc_midx.pipeline import Plan

EPILOG = """\b
Examples:
  xmc-midx plan data/
  xmc-midx plan data/ --set model.dim=256 --output /scratch/runs/a
  xmc-midx plan --shape 490449,135909,670091,76,5.45 --set model.dim=256"""


def plan(
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="As in `train`; or --shape in its place.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="N,F,L,V,P", help="Instances, features, labels; values and positives an instance."),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="RUN", help="Where the run would be.")] = ".",
    test: options.TestFile = None,
    config: options.ConfigFile = None,
    sets: options.Sets = None,
    preset: options.Preset = None,
    as_json: options.AsJson = False,
) -> None:
    """Forecast memory, disk and time of a training, without training.

    Also says what a step is bound by: products, the rows that it moves, or operations that are neither. Memory is
    good to about 20%; time is rough, and of an idle machine. `train` refuses to begin what cannot fit.
    """
    from xmc_midx.config import load_config

    if (data is None) == (shape is None):
        raise UsageError("plan needs DATA or --shape, one of them.")
    given = [] if preset is None else [f"training.preset={preset}"]
    settings = load_config(config, assignments=[*(sets or []), *given])

    from xmc_midx import pipeline

    with render.progress(as_json=as_json) as reporter:
        result = pipeline.plan(
            _parse_shape(shape) if data is None else data, output=output, config=settings, test=test, reporter=reporter
        )
    if as_json:
        render.print_json(result.as_dict())
    else:
        _print_plan(result)


def _parse_shape(text: str | None) -> TrainingData:
    from xmc_midx.forecast import TrainingData

    try:
        numbers = [float(word) for word in (text or "").split(",")]
        num_instances, num_features, num_labels = (int(number) for number in numbers[:3])
        values, positives = numbers[3:]
    except (ValueError, OverflowError):
        numbers = []
    if not numbers or not all(0 < number < 1e12 for number in numbers) or min(numbers[:3]) < 1:
        raise UsageError(
            f"--shape {text}: expected five numbers, N,F,L,V,P, as in 490449,135909,670091,76,5.45.",
            hint="V is the mean number of values, P that of positives an instance.",
        )
    return TrainingData.of_shape(num_instances, num_features, num_labels, values=values, positives=positives)


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
    if needs.seconds is not None and needs.finish_seconds is not None:
        models = f"{training.ensemble_size} models of " if training.ensemble_size != 1 else ""
        after = f"{render.duration(needs.finish_seconds)} of it after them"
        facts.append(
            ("time", f"roughly {render.duration(needs.seconds)} for {models}{training.epochs} epochs, {after}")
        )
        stages = ", ".join(f"{1e3 * seconds:.1f} ms {part}" for part, seconds in needs.step.items())
        facts.append(("a step", f"{1e3 * sum(needs.step.values()):.1f} ms: {stages}"))
    if result.bound is not None:
        facts.append(("bound by", result.bound))
    render.print_facts(facts)
