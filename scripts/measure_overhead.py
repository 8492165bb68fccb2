"""What the safety of a training costs: epochs with saves and checks beside epochs without, in one training.

    python scripts/measure_overhead.py DATA... [--epochs 13] [--set key=value]

Of each two epochs that follow one another, one has all of it (checks of every step and of the model, the save of the
epoch to the end of its pruning, metrics.jsonl) and the other nothing; which comes first changes from pair to pair. The
first epoch, which compiles, is left out, and so is all that follows the last, where nothing is saved.

`waits`: what training stands still for, which is steady; the rest of a save goes on beside the validation. `more`: what
a guarded epoch takes more than its neighbour, with the quartiles of the pairs; it needs an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xmc_midx import pipeline, session, trainer
from xmc_midx.config import load_config
from xmc_midx.rundir import RunDirectory


class Finished(Exception):  # noqa: N818  # nothing is wrong
    """The last epoch is over."""


class Switch:
    """Turns the guards off and on again, and takes the times of the epochs."""

    def __init__(self) -> None:
        self.epochs: list[tuple[bool, float, float, float]] = []
        """Whether guarded; seconds: of the epoch, of all processors, of the guards in the foreground."""
        self._waited, self._inside = 0.0, False
        for owner, name, instead in (
            (trainer.Trainer, "_sum_of_gradients", torch.zeros(())),
            (session.TrainingSession, "_after_step", None),
            (session.TrainingSession, "_begin_save", None),
            (session.TrainingSession, "_save", None),
            (RunDirectory, "write_metrics", None),
        ):
            self._guard(owner, name, instead)
        self._time_epochs()

    @property
    def guarded(self) -> bool:
        """The first epoch; then on, off, off, on, on, off, ..."""
        return len(self.epochs) % 4 < 2

    def _guard(self, owner: type, name: str, instead: Any) -> None:
        work = getattr(owner, name)
        setattr(owner, name, lambda *given, **named: self._wait(work, *given, **named) if self.guarded else instead)

    def _wait(self, work: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Take the time; not again of a guard inside a guard."""
        if self._inside:
            return work(*given, **named)
        self._inside, started = True, time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            self._inside = False
            self._waited += time.perf_counter() - started

    def _time_epochs(self) -> None:
        run_epoch, end_epoch = trainer.Trainer.run_epoch, session.TrainingSession._end_epoch
        started = [0.0, 0.0]

        def timed_run(this: trainer.Trainer, *given: Any, **named: Any) -> Any:
            self._waited = 0.0
            started[:] = time.perf_counter(), time.process_time()
            return run_epoch(this, *given, **named)

        def timed_end(this: session.TrainingSession, *given: Any) -> None:
            end_epoch(this, *given)
            seconds, processors = time.perf_counter() - started[0], time.process_time() - started[1]
            self.epochs.append((self.guarded, seconds, processors, self._waited))
            this.store.settle()  # what is left of the pruning belongs to no epoch

        def stop(*_: Any) -> None:
            raise Finished

        trainer.Trainer.run_epoch = timed_run  # type: ignore[method-assign]
        session.TrainingSession._end_epoch = timed_end  # type: ignore[method-assign]
        session.TrainingSession._conclude = stop  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--epochs", type=int, default=13, help="odd: one to begin with, then pairs")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="key=value")
    arguments = parser.parse_args()
    options = [f"training.epochs={arguments.epochs}", "training.patience=null", *arguments.sets]
    switch = Switch()
    print("| data | pairs | s an epoch | waits % | more % | more processor time % |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for data in arguments.data:
        switch.epochs.clear()
        with tempfile.TemporaryDirectory(dir=".") as directory:
            try:
                pipeline.train(data, output=f"{directory}/run", config=load_config(assignments=options))
            except Finished:
                print(summary(data.name, switch.epochs[1:]), flush=True)


def summary(name: str, epochs: list[tuple[bool, float, float, float]]) -> str:
    """A line of the table; the first epoch of all, which is guarded, is not among `epochs`."""
    pairs = [sorted(pair, reverse=True) for pair in zip(epochs[::2], epochs[1::2], strict=False)]
    assert all(on[0] and not off[0] for on, off in pairs), "one of two is guarded"
    seconds, processors = ([100 * (on[i] / off[i] - 1) for on, off in pairs] for i in (1, 2))
    waits = statistics.median(100 * on[3] / (on[1] - on[3]) for on, _ in pairs)
    of_one = statistics.median(epoch[1] for epoch in epochs if not epoch[0])
    return f"| {name} | {len(pairs)} | {of_one:.2f} | {waits:.2f} | {_spread(seconds)} | {_spread(processors)} |"


def _spread(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
