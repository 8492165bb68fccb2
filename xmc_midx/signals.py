"""Layer 1. SIGINT and SIGTERM: stop where it is safe, and at once when asked twice.

Outside a `deferred_signals` block a signal interrupts at once; inside, the first one waits until the block's owner
calls `check` at a point where everything is saved. A second signal ends the process without any clean-up: files are
written beside their names, so nothing is half there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["PendingSignal", "Terminated", "deferred_signals", "interrupt_on_signals"]

_STOPS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM. A KeyboardInterrupt, because it stops whatever Ctrl-C stops."""


class PendingSignal:
    """Whether a signal has come that was told to wait."""

    number: int | None = None
    """Of the signal that waits; None where none has come, or `check` has raised it."""
    came = False
    """Whether one has come at all."""

    def check(self) -> None:
        """Raise `KeyboardInterrupt` (SIGINT) or `Terminated` (SIGTERM) if a signal waits; it waits no longer."""
        if self.number is not None:
            number, self.number = self.number, None
            raise _interruption(number)


def interrupt_on_signals() -> None:
    """From now on the first signal raises where the program stands, the second exits at once. Main thread only."""
    for number in _STOPS:
        signal.signal(number, _interrupt)


@contextmanager
def deferred_signals() -> Iterator[PendingSignal]:
    """Inside the block a signal is only noted, for `check`; the earlier handlers come back at its end.

    A signal that was never checked for is raised at the end of the block. In another thread than the main one, which
    alone receives signals, nothing is noted.
    """
    pending = PendingSignal()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(number: int, frame: FrameType | None) -> None:
        pending.number, pending.came = number, True
        _exit_on_next()

    earlier = {number: signal.signal(number, note) for number in _STOPS}
    try:
        yield pending
    finally:
        for number, handler in earlier.items():
            # After a first signal the command line is on its way out: the next one is the second.
            if not (pending.came and handler is _interrupt):
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
    pending.check()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _exit_on_next()
    raise _interruption(number)


def _exit_on_next() -> None:
    for number in _STOPS:
        signal.signal(number, _exit_now)


def _exit_now(number: int, frame: FrameType | None) -> NoReturn:
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a live line hides the cursor
    os._exit(128 + number)


def _interruption(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
