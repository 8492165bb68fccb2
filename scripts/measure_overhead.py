"""What the safety of a training costs: trainings with saves and checks beside trainings without, in turns.

    python scripts/measure_overhead.py DATA... [--repeats 5] [--set key=value]

A guarded training has all of it (checks of every step and of the model, the saves to the end of their pruning,
metrics.jsonl), the other one nothing. Each is timed from the end of its first epoch, which compiles, to the end of the
last, before what is added to the model; of a pair, which comes first changes from pair to pair.

`waits`: what training stands still for, which is steady. `beside`: processor time of the threads that write, sync and
prune while training goes on, as part of the same seconds: with `waits` it bounds what the safety can cost, as if each
of these threads stopped the training. `more`: what a guarded training takes more than its neighbour, median and
quartiles of the pairs; it needs an idle machine, and many pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmc_midx import checkpoint, pipeline, session, trainer
from xmc_midx.config import load_config
from xmc_midx.rundir import RunDirectory


class Finished(Exception):  # noqa: N818  # nothing is wrong
    """The last epoch is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of a training's epochs."""

    wall: float
    processors: float
    waits: float
    beside: float
    """Of one processor."""


class Guards:
    """Turns saves and checks on and off, and takes the times."""

    def __init__(self) -> None:
        self.on, self.waited, self.beside, self.saves = True, 0.0, 0.0, 0
        self.started = (0.0, 0.0)
        self._inside, self._lock = False, threading.Lock()
        for owner, name, instead in (
            (trainer.Trainer, "_sums_of_gradients", []),
            (session.TrainingSession, "_after_step", None),
            (session.TrainingSession, "_begin_save", None),
            (session.TrainingSession, "_save", None),
            (session.TrainingSession, "_postpone", None),
            (RunDirectory, "append_metrics", None),
        ):
            self._guard(owner, name, instead)
        for place, name in (
            (checkpoint, "_write_part"),
            (checkpoint, "sync_file"),
            (checkpoint, "sync_directory"),
            (checkpoint.CheckpointStore, "_prune"),
        ):
            setattr(place, name, self._counted(getattr(place, name)))
        end_epoch = session.TrainingSession._end_epoch

        def timed_end(this: session.TrainingSession, *given: Any) -> None:
            end_epoch(this, *given)
            if len(this.history) == 1:
                this.store.settle()
                self.waited, self.beside, self.saves = 0.0, 0.0, 0
                self.started = (time.perf_counter(), time.process_time())

        def stop(*_: Any) -> None:
            raise Finished

        session.TrainingSession._end_epoch = timed_end  # type: ignore[method-assign]
        session.TrainingSession.conclude = stop  # type: ignore[method-assign]

    def _guard(self, owner: type, name: str, instead: Any) -> None:
        work = getattr(owner, name)
        setattr(owner, name, lambda *given, **named: self._wait(work, *given, **named) if self.on else instead)

    def _wait(self, work: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Take the time; not again of a guard inside a guard."""
        if self._inside:
            return work(*given, **named)
        self._inside, started = True, time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            self._inside = False
            self.waited += time.perf_counter() - started
            self.saves += work.__name__ == "_save"

    def _counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Add up the processor time of the thread that does the work."""

        def counted(*given: Any) -> Any:
            started = time.thread_time()
            try:
                return work(*given)
            finally:
                with self._lock:
                    self.beside += time.thread_time() - started

        return counted

    def cost(self, data: Path, options: list[str], *, on: bool) -> Cost:
        """Train, guarded or not. The saves are over when `train` returns."""
        self.on = on
        with tempfile.TemporaryDirectory(dir=".") as directory:
            try:
                pipeline.train(data, output=f"{directory}/run", config=load_config(assignments=options))
            except Finished:
                wall, processors = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        return Cost(wall=wall, processors=processors, waits=self.waited, beside=self.beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of trainings, two or more")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="key=value")
    arguments = parser.parse_args()
    guards = Guards()
    print("| data | pairs | s | saves | waits % | beside % | more % | more processor time % |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for data in arguments.data:
        pairs, saves = [], 0
        for pair in range(arguments.repeats):
            costs = {}
            for on in (True, False) if pair % 2 else (False, True):
                costs[on] = guards.cost(data, arguments.sets, on=on)
                saves = guards.saves if on else saves
            pairs.append((costs[True], costs[False]))
        print(summary(data.name, pairs, saves), flush=True)


def summary(name: str, pairs: list[tuple[Cost, Cost]], saves: int) -> str:
    """A line of the table."""
    wall = [100 * (on.wall / off.wall - 1) for on, off in pairs]
    processors = [100 * (on.processors / off.processors - 1) for on, off in pairs]
    waits = statistics.median(100 * on.waits / (on.wall - on.waits) for on, _ in pairs)
    beside = statistics.median(100 * on.beside / (on.wall - on.waits) for on, _ in pairs)
    seconds = statistics.median(off.wall for _, off in pairs)
    return (
        f"| {name} | {len(pairs)} | {seconds:.1f} | {saves} | {waits:.2f} | {beside:.2f} "
        f"| {_spread(wall)} | {_spread(processors)} |"
    )


def _spread(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
