"""Layer 7. `xmc-midx train`: options -> Config -> `pipeline.train` or `pipeline.resume` -> summary."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xmc_midx.cli import options, render
from xmc_midx.errors import UsageError

if TYPE_CHECKING:
    from xmc_midx.pipeline import TrainResult

PROGRAM = "xmc-midx"
EPILOG = """\b
Examples:
  xmc-midx train debtags --output runs/debtags
  xmc-midx train data/ --output runs/a --epochs 10 --set model.dim=256
  xmc-midx train data/ --output runs/a --resume"""


def train(
    data: options.Data,
    output: Annotated[str, typer.Option("--output", "-o", metavar="RUN", help="Run directory to write.")],
    test: options.TestFile = None,
    config: options.ConfigFile = None,
    sets: options.Sets = None,
    preset: options.Preset = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            metavar="NAME",
            help="Proposal of the negatives: midx-pq (default), midx-rq, uniform, frequency, in-batch, "
            "quadratic-kernel, rff, lsh, hard-negatives, softmax, full.",
        ),
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            "--estimator",
            metavar="NAME",
            help="pool (default): negatives of the batch; instance: of each instance.",
        ),
    ] = None,
    num_draws: Annotated[
        str | None,
        typer.Option("--num-draws", metavar="N", help="Negatives drawn for a batch or an instance."),
    ] = None,
    epochs: Annotated[str | None, typer.Option("--epochs", metavar="N", help="Passes over the training split.")] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", metavar="N", help="Instances in a step.")] = None,
    dim: Annotated[str | None, typer.Option("--dim", metavar="N", help="Embedding size.")] = None,
    seed: Annotated[str | None, typer.Option("--seed", metavar="N", help="Seed of everything drawn.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N.")
    ] = None,
    save_every: Annotated[
        str | None,
        typer.Option("--save-every", metavar="N", help="Steps between checkpoints, or minutes: 500 or 10m (default)."),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option("--max-time", metavar="T", help="Save and stop after this time: 90m, 2h, 1h30m, 45s."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with RUN from its latest checkpoint.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="With --resume: do not compute the checkpoint's hashes.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in RUN.")] = False,
    fetch: options.Fetch = False,
    as_json: options.AsJson = False,
) -> None:
    """Train on DATA, keep the best epoch in RUN.

    What is not given is chosen from the data. An option such as --epochs overrides --set, and --set overrides
    --config; the resolved configuration is in RUN/config.yaml. Ctrl-C, SIGTERM and --max-time save and stop
    after the running step; --resume goes on.
    """
    flags = {
        "training.preset": preset,
        "sampler.name": sampler,
        "sampler.estimator": estimator,
        "sampler.num_draws": num_draws,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "model.dim": dim,
        "training.seed": seed,
        "training.device": device,
        **(_save_interval(save_every) if save_every is not None else {}),
    }
    seconds = None if max_time is None else _seconds(max_time)
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    if resume:
        if force:
            raise UsageError(
                "--resume and --force: expected one of them.", hint="--force starts anew, --resume goes on."
            )
        _refuse_changes(Path(output), test, config, [*(sets or []), *given])
    elif no_verify:
        raise UsageError("--no-verify goes with --resume: a new run has nothing to verify.")
    from xmc_midx.config import load_config

    settings = load_config(config, assignments=[*(sets or []), *given])
    run = Path(output)
    if run.is_symlink():
        # What is replaced is the run, not the link.
        run = run.resolve()
    go_on = _command("train", data, "--output", output, "--resume")
    place = _place_for(run, force=force)

    from xmc_midx import pipeline
    from xmc_midx.data.download import download_if_missing

    with place, render.progress(as_json=as_json) as reporter:
        try:
            if fetch:
                download_if_missing(data, reporter=reporter)
            if resume:
                result = pipeline.resume(run, data=data, max_seconds=seconds, verify=not no_verify, reporter=reporter)
            else:
                result = pipeline.train(
                    data, output=run, config=settings, test=test, max_seconds=seconds, reporter=reporter
                )
        except KeyboardInterrupt as stop:
            if (run / "latest").exists() or (not force and (run / "config.yaml").exists()):
                stop.add_note(f"Go on with: {go_on}")
            else:
                stop.add_note(f"Nothing was trained yet. Start again with: {shlex.join([PROGRAM, *sys.argv[1:]])}")
            raise
    if as_json:
        render.print_json(result.as_dict())
        return
    _print_summary(result)
    render.print_line()
    if not result.finished:
        render.print_line("The time is over. Go on with:")
        render.print_line(f"  {go_on}")
    else:
        render.print_line("Next:")
        if result.evaluate_on is not None:
            render.print_line(f"  {_command('evaluate', output, result.evaluate_on)}")
        render.print_line(f"  {_command('predict', output, test or 'INPUT')}")


def _save_interval(text: str) -> dict[str, str]:
    """`500` -> steps; `10m`, `1h30m`, `90s` -> minutes; what is given is the only interval."""
    if text.isascii() and text.isdigit():
        return {"training.save_every_steps": text, "training.save_every_minutes": "null"}
    return {"training.save_every_minutes": f"{_seconds(text, '--save-every', 'steps as 500 or a time') / 60:g}"}


def _seconds(text: str, option: str = "--max-time", expected: str = "a time") -> float:
    """`90m`, `1h30m`, `45s`, `2.5h` -> seconds."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise UsageError(f"{option} {text}: expected {expected} such as 90m, 2h, 1h30m or 45s.")
    return seconds


def _refuse_changes(run: Path, test: str | None, config: str | None, assignments: list[str]) -> None:
    """A resumed run has its configuration already; a change that were ignored in silence would mislead. What is as the
    run has it, as in the command that began it, changes nothing."""
    if test is config is None and not assignments:
        return
    from xmc_midx.config import changed_keys
    from xmc_midx.rundir import RunDirectory

    directory = RunDirectory.open(run)
    changed = changed_keys(directory.config, config, assignments=assignments)
    if test is not None and os.path.realpath(test) != directory.provenance().test:
        changed.append("--test")
    if changed:
        raise UsageError(
            f"--resume goes on with the run's own configuration; {', '.join(changed)} cannot change it.",
            hint="Leave it out, or train into another directory.",
        )


def _place_for(run: Path, *, force: bool) -> AbstractContextManager[None]:
    """With --force the run that is there is replaced; anything else in the way the pipeline refuses. What a killed
    replacement left is cleared in any case."""
    from xmc_midx.rundir import RunDirectory, aside_of

    aside = aside_of(run)
    if not aside.exists() and not (force and run.is_dir() and any(run.iterdir())):
        return nullcontext()
    has_checkpoint = (run / "latest").exists()
    if (force or not has_checkpoint) and run.resolve() in (Path.cwd(), *Path.cwd().parents):
        fact = f"--force: {run} is the directory you are in."
        if not force:
            fact = f"{aside}: holds the run that a killed --force put aside, and {run} is the directory you are in."
        raise UsageError(fact, hint="Leave it first.")
    if run.exists() and (force or not has_checkpoint):
        RunDirectory.require_replaceable(run)
    with (
        RunDirectory.lock(run) if run.exists() else nullcontext(),
        RunDirectory.lock(aside) if aside.exists() else nullcontext(),
    ):
        if aside.exists():
            # A replacement was killed: before its first checkpoint, the old run is the one to keep.
            if has_checkpoint:
                shutil.rmtree(aside)
            else:
                shutil.rmtree(run, ignore_errors=True)
                aside.rename(run)
        return _replacing(run) if force else nullcontext()


@contextmanager
def _replacing(run: Path) -> Iterator[None]:
    """The old run stands aside until the new one has a checkpoint; without one, the old one comes back."""
    from xmc_midx.rundir import RunDirectory, aside_of

    aside = aside_of(run)
    run.rename(aside)
    with ExitStack() as held:
        try:
            # To the end: whoever finds it free knows that this process was killed.
            held.enter_context(RunDirectory.lock(aside))
            yield
        finally:
            if (run / "latest").exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                shutil.rmtree(run, ignore_errors=True)
                aside.rename(run)


def trained(result: TrainResult) -> tuple[str, str]:
    """What was trained, and of which model one speaks where there are several."""
    size, epochs = result.num_models, f"{result.epochs} epochs"
    if size == 1:
        return epochs, ""
    done = f"{size} models of {epochs}" if result.finished else f"{result.num_finished} of {size} models"
    return done, " of the first model"


def _print_summary(result: TrainResult) -> None:
    done, of_first = trained(result)
    render.print_facts(
        [
            ("run", str(result.run)),
            ("training", f"{done} in {render.duration(result.seconds)}"),
            (f"best epoch{of_first}", str(result.best_epoch)),
            ("model", render.size(result.model_bytes)),
            ("peak memory", render.size(result.peak_memory_bytes)),
        ]
    )
    if result.validation:
        render.print_line()
        title = f"Validation{of_first}, {result.num_validation:,} held-out instances"
        render.print_metrics(result.validation, title=title)
    if result.test is not None:
        render.print_line()
        render.print_metrics(result.test.metrics, title="Test")
    shown = {**result.validation, **(result.test.metrics if result.test is not None else {})}
    if shown:
        render.print_line()
        render.print_definitions(shown, report=result.test, propensity=result.propensity)


def _command(*words: str) -> str:
    return shlex.join([PROGRAM, *words])
