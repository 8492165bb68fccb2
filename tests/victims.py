"""What the child processes of test_faults.py do: train, and be stopped at a point, by a signal or for want of memory.

The children are forked from a server that has loaded what this module imports, so that each starts in milliseconds.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # torch's optimisers load it when they are first used: half a second

from xmc_midx import crash, pipeline
from xmc_midx.cli import app
from xmc_midx.config import load_config
from xmc_midx.pipeline import training
from xmc_midx.signals import interrupt_on_signals
from xmc_midx.types import SilentReporter


class Progress(SilentReporter):
    """Writes the number of steps done where the parent sees it."""

    def __init__(self, shared: Any, first: int) -> None:
        self.shared, self.done = shared, first

    def start(self, stage: str, total: int | None) -> None:
        self.training = stage.startswith("epoch")

    def step(self, advance: int = 1, **facts: float) -> None:
        if "loss" in facts and self.shared is not None:
            self.done += 1
            self.shared.value = self.done


def work(data: str, run: str, options: list[str], point: str | None, shared: Any, first: int) -> None:
    """Train, or go on where there is something to go on with; die at `point`."""
    crash.arm(point)
    reporter = Progress(shared, first)
    if (Path(run) / "config.yaml").exists():
        pipeline.resume(run, reporter=reporter)
    else:
        pipeline.train(data, output=run, config=load_config(assignments=options), reporter=reporter)


def command(words: list[str], points: str | None, number: int, log: str, loading: bool) -> None:
    """A command line, with its output in a file; a signal comes at each of `points`, or while the data is read."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["xmc-midx", *words]
    interrupt_on_signals()
    crash.arm(points, number)
    if loading:
        read = training.load_dataset

        def interrupted(*arguments: Any, **options: Any) -> Any:
            os.kill(os.getpid(), number)
            return read(*arguments, **options)

        training.load_dataset = interrupted
    code = app.run(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def predict(words: list[str], points: str | None, number: int, log: str) -> None:
    """`predict`, whose progress is noted at every batch."""
    from xmc_midx.data import resumable

    resumable._MARK_SECONDS = 0
    command(["predict", *words], points, number, log, False)


def starve(words: list[str], extra: int, log: str, blind: bool) -> None:
    """A command line with `extra` bytes of address space left; `blind`: the system does not say so."""
    from xmc_midx import device

    if blind:
        device.available_memory_bytes = lambda: None  # type: ignore[assignment]
    limit = 1024 * device._status("VmSize") + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    command(words, None, signal.SIGTERM, log, False)
