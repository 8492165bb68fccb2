"""Layer 7. Results on stdout, progress on stderr.

Before it: the records of the pipeline. After it: the terminal. Tables go through rich; in a pipe they are
plain text of their natural width. Progress is one live line on a terminal, and one plain line an epoch
anywhere else.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, TextIO

from xmc_midx.types import EpochStats, MetricReport, Reporter, SilentReporter

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = [
    "duration",
    "number",
    "percent",
    "print_definitions",
    "print_facts",
    "print_json",
    "print_line",
    "print_metrics",
    "print_table",
    "print_text",
    "printable",
    "progress",
    "size",
    "terminal_width",
]

STAGES = {
    "read": "reading",
    "load": "loading the model",
    "initialize": "preparing",
    "label cells": "making label cells",
    "shortlist": "asking the model",
    "neighbours": "finding neighbours",
    "rivals": "finding rivals",
    "ranker": "training the ranker",
    "interpolation": "fitting the last step",
    "predict": "predicting",
    "diagnose": "diagnosing",
    "export": "writing and measuring",
    "download": "downloading",
    "unpack": "unpacking",
    "verify": "verifying",
    "write": "writing",
}
"""What a stage of the pipeline is called on the live line."""

BAR_WIDTHS = 8, 30


# Figures


def percent(share: float) -> str:
    """`0.51234` -> `51.23`; the sign is the table's title's to say."""
    return f"{100 * share:.2f}"


def number(value: float) -> str:
    """Counts with thousands marks, other numbers with four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def size(num_bytes: int) -> str:
    """`1234567` -> `1.2 MB`, in powers of 1,000."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """`16.23` -> `16.2 s`, `83` -> `1:23`, `3723` -> `1:02:03`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    return _clock(round(seconds))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """`text` on one line and without control characters, which a file name or a label name may hold."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else f"\\x{ord(c):02x}" for c in text)


# Streams


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal behind `stream`; None if there is none."""
    if not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def _decorated(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = terminal_width(stream)
    return Console(
        file=stream,
        width=width if width is not None else 10_000,
        force_terminal=_decorated(stream),
        color_system="auto" if _decorated(stream) else None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )


# Results


def print_json(document: Any) -> None:
    """One JSON document on stdout; numbers that are not finite become null, as JSON has none."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    text = json.dumps(_plain(document), indent=2, ensure_ascii=not unicode, allow_nan=False)
    sys.stdout.write(f"{text}\n")


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return _plain(value.tolist())
    return str(value)


def print_line(text: str = "") -> None:
    """One line on stdout as it is, however long: something to copy."""
    sys.stdout.write(f"{printable(text)}\n")


def print_text(text: str, *, indent: str = "") -> None:
    """A sentence on stdout, wrapped at the terminal's width with the later lines indented."""
    width = terminal_width(sys.stdout)
    text = printable(text)
    if width is not None:
        text = textwrap.fill(text, max(width, 20), subsequent_indent=indent, break_long_words=False)
    sys.stdout.write(f"{text}\n")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: Sequence[int] = (),
) -> None:
    """A table on stdout.

    Parameters
    ----------
    columns : heads; all empty for a table without a head.
    rows : cells, one for each column.
    title : a line above the table.
    right : columns that are aligned to the right: the numbers.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(columns), header_style="bold")
    for position, head in enumerate(columns):
        numeric = position in right
        table.add_column(Text(head), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if title:
        print_text(title)
    _print_rich(table)


def _print_rich(table: Table) -> None:
    """Wrapped between words only: where a word is wider than its column, the terminal breaks the line."""
    console = _console(sys.stdout)
    unbounded = console.options.update(max_width=10_000)
    longest_words = console.measure(table, options=unbounded).minimum + 2 * len(table.columns)
    console.width = max(console.width, longest_words)
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Name and value, a line each, the values aligned."""
    print_table(("", ""), list(facts))


def print_metrics(metrics: Mapping[str, float], *, title: str) -> None:
    """Families by k, in percent; `title` says of what."""
    values: dict[str, dict[int, float]] = {}
    for name, value in metrics.items():
        family, _, k = name.partition("@")
        values.setdefault(family, {})[int(k)] = value
    ks = sorted({k for row in values.values() for k in row})
    rows = [(f, *(percent(row[k]) if k in row else "" for k in ks)) for f, row in values.items()]
    print_table(("", *(f"@{k}" for k in ks)), rows, title=f"{title}, in %", right=range(1, len(ks) + 1))


def print_definitions(
    metrics: Mapping[str, float],
    *,
    report: MetricReport | None,
    propensity: tuple[float, float] | None = None,
    source: str | None = None,
) -> None:
    """What the families that were printed mean, over which instances, with which propensities.

    Parameters
    ----------
    metrics : the metrics that were printed.
    report : counts, A and B; None where only the definitions are known.
    propensity : A and B where there is no report.
    source : where A and B come from.
    """
    from xmc_midx.metrics import DEFINITIONS

    present = {name.partition("@")[0] for name in metrics}
    indent = max((len(f) for f in present), default=0) + 4
    for family, text in DEFINITIONS.items():
        if family in present:
            print_text(f"{f'{family}@k':<{indent}}{text}", indent=" " * indent)
    if report is None:
        if propensity is not None:
            print_text("Propensities: A = {:g}, B = {:g}.".format(*propensity))
        return
    counted = f"Over {report.num_instances:,} instances"
    if report.num_without_labels:
        counted += f"; the {report.num_without_labels:,} without labels count as 0"
    print_text(f"{counted}.")
    if report.num_ignored:
        print_text(f"{report.num_ignored:,} pairs of a filter file are passed over.")
    if report.propensity_a is None or report.propensity_b is None:
        print_text("PSP and PSnDCG need label frequencies, and no training split gave them.")
    else:
        origin = f" ({source})" if source else ""
        print_text(f"Propensities: A = {report.propensity_a:g}, B = {report.propensity_b:g}{origin}.")


# Progress


@contextmanager
def progress(*, as_json: bool, live: bool = True) -> Iterator[Reporter]:
    """The reporter for one call of the pipeline, on stderr; its live line is gone when the block ends.

    On a terminal a live line; elsewhere, and where `live` is off because the results go to the same terminal, a plain
    line for each epoch and message, or nothing with --json.
    """
    if live and _decorated(sys.stderr):
        with _LiveReporter().running() as reporter:
            yield reporter
    elif as_json and not sys.stderr.isatty():
        yield SilentReporter()
    else:
        yield _PlainReporter()


def _epoch_line(stats: EpochStats) -> str:
    width = len(str(stats.num_epochs))
    parts = [
        f"epoch {stats.epoch:>{width}}/{stats.num_epochs}",
        f"loss {stats.loss:.4f}",
        f"{stats.instances_per_second:,.0f} instances/s",
        *([f"validation P@1 {percent(stats.validation['P@1'])}%"] if "P@1" in stats.validation else []),
        duration(stats.seconds),
    ]
    return "  ".join(parts)


class _PlainReporter(SilentReporter):
    """A line for each epoch and message."""

    def epoch(self, stats: EpochStats) -> None:
        self.message(_epoch_line(stats))

    def message(self, text: str) -> None:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()


class _LiveReporter:
    """One line that is redrawn, with the epochs done and the messages above it."""

    def __init__(self) -> None:
        self.console = _console(sys.stderr)
        self.stage = ""
        self.total: int | None = None
        self.done = 0
        self.since = time.monotonic()
        self.facts: dict[str, float] = {}
        self.last: EpochStats | None = None
        self.num_stages_left = 0
        """Stages as long as this one that follow: the epochs after the current one."""

    @contextmanager
    def running(self) -> Iterator[_LiveReporter]:
        from rich.live import Live

        live = Live(
            get_renderable=self.line,
            console=self.console,
            transient=True,
            refresh_per_second=5,
            redirect_stdout=False,
        )
        with live:
            yield self

    def start(self, stage: str, total: int | None) -> None:
        self.total, self.done, self.facts = total, 0, {}
        self.since = time.monotonic()
        if stage == "train" and self.last is not None:
            stage = f"epoch {self.last.epoch + 1}/{self.last.num_epochs}"
        self.stage = STAGES.get(stage, stage)
        epoch = re.fullmatch(r"epoch (\d+)/(\d+)", self.stage)
        self.num_stages_left = int(epoch[2]) - int(epoch[1]) if epoch else 0

    def step(self, advance: int = 1, **facts: float) -> None:
        self.done += advance
        self.facts.update(facts)

    def epoch(self, stats: EpochStats) -> None:
        self.last = stats
        self.console.print(_epoch_line(stats))

    def message(self, text: str) -> None:
        self.console.print(printable(text))

    def line(self) -> RenderableType:
        """Stage, bar, facts and time left: what fits in the width, the least important left out first."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        stage, total, done = printable(self.stage), self.total, self.done
        parts = self._parts(total, done)
        while parts and len(stage) + sum(len(p) + 2 for p in parts) + BAR_WIDTHS[0] + 2 > self.console.width:
            parts.pop(min(range(len(parts)), key=lambda n: _IMPORTANCE.get(parts[n].split()[0], 1)))
        room = self.console.width - len(stage) - sum(len(p) + 2 for p in parts) - 3
        grid = Table.grid(padding=(0, 2, 0, 0))
        cells: list[RenderableType] = [Text(stage, style="bold", no_wrap=True, overflow="ellipsis")]
        if room >= BAR_WIDTHS[0] and stage:
            elapsed = time.monotonic() - self.since
            bar = ProgressBar(total=total, completed=done, width=min(room, BAR_WIDTHS[1]), animation_time=elapsed)
            cells.append(bar)
        grid.add_row(*cells, *(Text(p, no_wrap=True) for p in parts))
        return grid

    def _parts(self, total: int | None, done: int) -> list[str]:
        parts = [f"{100 * done // total}%"] if total else [f"{done:,}"] if done else []
        if "loss" in self.facts:
            parts.append(f"loss {self.facts['loss']:.3f}")
        if "instances_per_second" in self.facts:
            parts.append(f"{self.facts['instances_per_second']:,.0f}/s")
        if "bytes_per_second" in self.facts:
            parts.append(f"{size(int(self.facts['bytes_per_second']))}/s")
        if self.last is not None and "P@1" in self.last.validation:
            parts.append(f"P@1 {percent(self.last.validation['P@1'])}%")
        if total and 0 < done <= total:
            steps_left = total - done + total * self.num_stages_left
            parts.append(f"left {_clock((time.monotonic() - self.since) * steps_left / done)}")
        return parts


_IMPORTANCE = {"left": 5, "loss": 4, "P@1": 3}
