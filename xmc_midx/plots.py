"""Layer 2. Figures as files: sampler diagnoses -> one picture. Before it: the diagnostics; after it: the reader's eye.

matplotlib is imported here alone, and only when something is drawn; it comes with the extra `report`. No window is
opened and no global state of matplotlib is changed.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xmc_midx.errors import ResourceError, UsageError
from xmc_midx.types import SamplerDiagnosis, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

__all__ = ["plot_samplers", "require_plotting"]

_FORMATS = (".png", ".svg", ".pdf")


def require_plotting(path: Path) -> None:
    """Find out before the work whether a figure can be written to `path`.

    Raises
    ------
    UsageError : the file's ending is none of ours, or matplotlib is not installed.
    ResourceError : there is no such directory.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"{path}: its ending names no format of a figure; expected .png, .svg or .pdf.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "A figure needs matplotlib, which is not installed.",
            hint="Install it: pip install 'xmc-midx[report]', or pip install matplotlib.",
        )
    if path.is_dir() or not path.parent.is_dir():
        raise ResourceError(f"{path}: cannot be written: expected a file in a directory that is there.")


def plot_samplers(diagnoses: Sequence[SamplerDiagnosis], path: Path, *, title: str) -> None:
    """Draw KL(Q||P) with its bound, the effective sample size, and the gradient's error against the draws' time.

    Parameters
    ----------
    diagnoses : at least one; from top to bottom in this order.
    path : .png, .svg or .pdf; complete or, after an error, as it was before.
    title : above the figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height = 1.6 + 0.3 * max(len(diagnoses), 8)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, height), layout=ConstrainedLayoutEngine(w_pad=0.1))
        left, middle, right = figure.subplots(1, 3, width_ratios=(4, 3, 5))
        figure.suptitle(title, fontsize=11, fontweight="bold")
        _draw_divergence(left, diagnoses)
        _draw_effective_share(middle, diagnoses)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
        _draw_gradient(right, diagnoses)
        try:
            figure.savefig(beside, format=path.suffix.lower()[1:], dpi=150)
            beside.replace(path)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror}.") from None
        finally:
            beside.unlink(missing_ok=True)


_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#606060"
"""Of Okabe and Ito's palette: told apart by people who see no red or no green. The markers differ as well."""
_LEAST = 1e-3
"""The smallest figure that a logarithmic axis shows; of a smaller mean it is said in words."""
_PLACES = (
    *((7, 0), (-7, 0), (0, 6), (0, -6)),
    *((dx, dy) for reach in (14, 26, 38, 50, 62) for dy in (reach, -reach) for dx in (14, -14)),
)
"""Where a name may stand from its point, in points of 1/72 inch: beside it, or further away at the end of a line."""


def _draw_divergence(axes: Axes, diagnoses: Sequence[SamplerDiagnosis]) -> None:
    _draw_rows(axes, len(diagnoses))
    axes.set_yticks(range(len(diagnoses)), [one.name for one in diagnoses])
    _draw_spreads(axes, [one.kl_from_softmax for one in diagnoses])
    bounds = [(row, one.kl_bound.mean) for row, one in enumerate(diagnoses) if one.kl_bound is not None]
    shown = [(row, bound) for row, bound in bounds if _LEAST <= bound < math.inf]
    if shown:
        axes.plot(
            [bound for _, bound in shown],
            [row for row, _ in shown],
            marker="D",
            markersize=5,
            markerfacecolor="white",
            linestyle="none",
            color=_ORANGE,
            label="theory: at most (mean)",
        )
    axes.set_title("Divergence of the proposal, KL(Q||P)")
    axes.set_xlabel("nats; less is better")


def _draw_effective_share(axes: Axes, diagnoses: Sequence[SamplerDiagnosis]) -> None:
    _draw_rows(axes, len(diagnoses))
    axes.set_yticks(range(len(diagnoses)), [""] * len(diagnoses))
    _draw_spreads(axes, [_in_percent(one.effective_share) for one in diagnoses])
    axes.set_title("Effective sample size")
    axes.set_xlabel("% of the draws; more is better")


def _in_percent(share: Spread | None) -> Spread | None:
    return share and Spread(mean=100 * share.mean, p10=100 * share.p10, p90=100 * share.p90)


def _draw_rows(axes: Axes, count: int) -> None:
    """A row for each sampler, the first on top, and a logarithmic axis."""
    _scale(axes)
    axes.set_ylim(count - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _scale(axes: Axes) -> None:
    """A logarithmic horizontal axis with plain numbers, and a grid."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(1, 10)
    axes.set_autoscalex_on(True)
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_spreads(axes: Axes, spreads: Sequence[Spread | None]) -> None:
    """Dots at the means, lines from the 10th to the 90th percentile; a word where there is nothing to draw."""
    label = "mean, 10th to 90th percentile"
    for row, spread in enumerate(spreads):
        if spread is not None and _LEAST <= spread.mean < math.inf:
            axes.plot([max(spread.p10, _LEAST), max(spread.p90, _LEAST)], [row, row], color=_BLUE, linewidth=1.5)
            axes.plot([spread.mean], [row], marker="o", linestyle="none", color=_BLUE, label=label)
            label = "_"  # one that the legend leaves out
        else:
            words = "no density" if spread is None else f"under {_LEAST:g}" if spread.mean < _LEAST else "infinite"
            where = axes.get_yaxis_transform()
            axes.text(0.03, row, words, transform=where, va="center", color=_GREY, style="italic")


def _draw_gradient(axes: Axes, diagnoses: Sequence[SamplerDiagnosis]) -> None:
    axes.set_title("Gradient of a batch against the time of its draws")
    axes.set_xlabel("draws, µs per instance; less is better")
    axes.set_ylabel("distance to the full softmax's, %")
    _scale(axes)
    points = [
        (max(one.draw_microseconds, _LEAST), 100 * one.gradient_error)
        for one in diagnoses
        if math.isfinite(one.gradient_error)
    ]
    names = [one.name for one in diagnoses if math.isfinite(one.gradient_error)]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", linestyle="none", color=_BLUE)
        axes.margins(x=0.2)
        axes.set_ylim(0.0, max(1.0, 1.15 * max(error for _, error in points)))
        _label_points(axes, points, names)


def _label_points(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write each name beside its point, at the first place where it touches no other name, no point and no edge."""
    from matplotlib.transforms import Bbox

    # Once the layout is known, places can be compared in pixels.
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(points)]
    for point, name in zip(points, names, strict=True):
        for place in _PLACES:
            label = _write(axes, name, point, place)
            box = label.get_window_extent()
            if not box.count_overlaps(taken) and all(inside.contains(x, y) for x, y in box.corners()):
                break
            label.remove()
        else:
            place = _PLACES[0]
            box = _write(axes, name, point, place).get_window_extent()
        taken.append(box)
        if min(map(abs, place)) > 0:
            line = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", point, place, textcoords="offset points", arrowprops=line)


def _write(axes: Axes, name: str, point: tuple[float, float], place: tuple[int, int]) -> Annotation:
    dx, dy = place
    label = axes.annotate(
        name,
        point,
        place,
        textcoords="offset points",
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
    )
    # Or the layout would make room for it, and all that was compared would move.
    label.set_in_layout(False)
    return label
