"""Layer 7. `xmc-midx diagnose`: a run and its data -> `pipeline.diagnose` -> samplers against the full softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from xmc_midx.cli import options, render

if TYPE_CHECKING:
    from xmc_midx.pipeline import Diagnosis
    from xmc_midx.types import SamplerDiagnosis, Spread

EPILOG = """\b
Examples:
  xmc-midx diagnose runs/a data/
  xmc-midx diagnose runs/a data/ --samplers midx-rq,uniform --num-draws 512
  xmc-midx diagnose runs/a data/ --plot samplers.png --json"""

PROPOSAL_HEADS = ("", "KL(Q|P)", "10-90%", "at most", "KL(P|Q)", "ESS %", "log10 w")
GRADIENT_HEADS = ("", "pool", "bias", "noise", "dev.", "error", "fit s", "draw µs", "draw %")


def diagnose(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    data: options.Data,
    samplers: Annotated[
        str | None, typer.Option("--samplers", metavar="A,B,...", help="Names as in `train`; else all but full.")
    ] = None,
    num_draws: Annotated[
        int | None, typer.Option("--num-draws", metavar="N", min=1, help="Draws, the same for all; else the run's.")
    ] = None,
    num_instances: Annotated[
        int, typer.Option("--instances", metavar="N", min=1, help="Random instances that proposals are averaged over.")
    ] = 256,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=2, help="Times that the gradient of one batch is drawn.")
    ] = 32,
    dropout: Annotated[
        bool, typer.Option("--dropout", help="Drop coordinates of the queries as in training; else none, as after it.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of instances and draws.")] = 0,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw a figure: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure samplers against the full softmax of a trained model.

    Each sampler is fitted to RUN's label table and drawn from for training instances of DATA: how far its
    proposal and its gradient are from the softmax's, and what that costs. In gradients, the batch's positives count
    once each: nothing else is measured.
    """
    from xmc_midx import pipeline

    with render.progress(as_json=as_json) as reporter:
        diagnosis = pipeline.diagnose(
            run,
            data=data,
            samplers=None if samplers is None else [name.strip() for name in samplers.split(",")],
            num_draws=num_draws,
            num_instances=num_instances,
            repeats=repeats,
            dropout=dropout,
            seed=seed,
            device=device,
            plot=plot,
            reporter=reporter,
        )
    if as_json:
        render.print_json(diagnosis.as_dict())
    else:
        _print_diagnosis(diagnosis)


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    title = f"Proposal Q against the softmax P: means over {diagnosis.num_instances:,} instances; 10-90%: percentiles"
    render.print_table(PROPOSAL_HEADS, map(_proposal_row, diagnosis.samplers), title=title, right=range(1, 7))
    render.print_line()
    each = "a batch" if diagnosis.estimator == "pool" else "each instance"
    title = f"Gradient of {diagnosis.batch_size:,} instances at {diagnosis.num_draws:,} draws for {each}; shares in %"
    render.print_table(GRADIENT_HEADS, map(_gradient_row, diagnosis.samplers), title=title, right=range(1, 9))
    render.print_line()
    _print_definitions(diagnosis)
    render.print_line(f"Diagnosed in {render.duration(diagnosis.seconds)}.")
    if diagnosis.plot is not None:
        render.print_line(f"Figure: {diagnosis.plot}")


def _proposal_row(one: SamplerDiagnosis) -> tuple[str, ...]:
    kl, weight = one.kl_from_softmax, one.log10_max_weight
    return (
        one.name,
        _mean(kl),
        "-" if kl is None else f"{_figure(kl.p10)}-{_figure(kl.p90)}",
        _mean(one.kl_bound),
        _mean(one.kl_to_softmax),
        _mean(one.effective_share, scale=100),
        "-" if weight is None or not math.isfinite(weight.mean) else f"{weight.mean:.1f}",
    )


def _gradient_row(one: SamplerDiagnosis) -> tuple[str, ...]:
    shares = (one.gradient_bias, one.gradient_noise, one.gradient_deviation, one.gradient_error)
    return (
        one.name,
        f"{one.pool_size:,.0f}",
        *(_figure(100 * share) for share in shares),
        f"{one.refresh_seconds:,.1f}",
        _figure(one.draw_microseconds),
        f"{100 * one.draw_share:.1f}",
    )


def _mean(spread: Spread | None, *, scale: float = 1) -> str:
    return "-" if spread is None else _figure(scale * spread.mean)


def _figure(value: float) -> str:
    """Three digits, or two after the point, or one of what is very small; a dash for what is not a number."""
    if not math.isfinite(value):
        return "inf" if value == math.inf else "-"
    if 1e-9 < value < 0.005:
        return f"{value:.0e}"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _print_definitions(diagnosis: Diagnosis) -> None:
    queries = "without dropout" if diagnosis.dropout == 0 else f"with dropout {diagnosis.dropout:g}"
    render.print_facts(
        [
            ("P", f"softmax over all {diagnosis.num_labels:,} labels; queries {queries}; KL in nats"),
            ("at most", "theory's bound on KL(Q|P): the range of the residual logits"),
            ("ESS", "effective sample size of weighted draws, in % of the draws"),
            ("log10 w", "of the largest importance weight P/Q"),
            ("pool", "labels that the batch is scored against, with its positives"),
            ("bias", f"mean gradient of {diagnosis.repeats} draws less the full softmax's, in % of its length"),
            ("noise", "what the bias would show if there were none"),
            ("dev.", "standard deviation of one gradient"),
            ("error", "distance of one gradient to the full softmax's, bias included"),
            ("fit, draw", "to the table; for an instance, and in % of loss and gradient"),
            ("-", "not defined: no proposal over all labels, no bound that is known, or one draw alone"),
        ]
    )
    if diagnosis.estimator == "pool" and diagnosis.num_draws >= diagnosis.num_labels:
        render.print_text("With as many draws as labels, a pool holds every label: the gradient is the full softmax's.")
