"""Layer 0. Named points at which a test lets the process die, as if the power had failed there.

`XMC_MIDX_CRASH_AT=save.renamed` kills the process with SIGKILL where `crash_point("save.renamed")` stands, and
`save.renamed:3` at the third passage. Unset, a point is one comparison; the points stand at files, never in a loop over
data. Used by the fault-injection tests alone.
"""

from __future__ import annotations

import os
import signal

__all__ = ["POINTS", "VARIABLE", "arm", "crash_point"]

VARIABLE = "XMC_MIDX_CRASH_AT"
POINTS = (
    "run.begun",
    "step.done",
    "refresh.begun",
    "refresh.done",
    "save.begun",
    "save.part-written",
    "save.manifest-written",
    "save.old-aside",
    "save.renamed",
    "save.pointer-written",
    "save.pointed",
    "save.pruned",
    "validation.begun",
    "validation.done",
    "model.begun",
    "neighbours.begun",
    "output.noted",
    "export.written",
    "export.renamed",
    "model.unsealed",
    "file.written",
    "file.renamed",
    "directory.written",
    "directory.aside",
    "directory.renamed",
)
"""All points. `file.*` are those of every file that is written beside its name and renamed there,
`directory.*` those of a dataset directory that `prepare` makes."""

_armed: dict[str, int] = {}
_signal = getattr(signal, "SIGKILL", signal.SIGTERM)


def arm(points: str | None, number: int = _signal) -> None:
    """Send this process a signal at each of some points (`name,name`), or at its n-th passage from now (`name:n`).

    None disarms all.
    """
    global _signal
    _armed.clear()
    _signal = number
    for point in points.split(",") if points else ():
        name, _, count = point.partition(":")
        assert name in POINTS, f"{name} is not in the list of points"
        _armed[name] = int(count or 1)


def crash_point(name: str) -> None:
    """Die here if this point is armed; else nothing."""
    if _armed:
        _pass(name)


def _pass(name: str) -> None:
    assert name in POINTS, f"{name} is not in the list of points"
    if name in _armed:
        _armed[name] -= 1
        if _armed[name] == 0:
            os.kill(os.getpid(), _signal)


arm(os.environ.get(VARIABLE))
