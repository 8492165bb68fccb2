"""Layer 1. The minimum of a convex loss of a few numbers between bounds, by Newton's method.

For the last step and the calibration: a handful of coefficients, a loss over half a million candidates. Each of its
evaluations is dear, and with second derivatives a few of them are enough, where a quasi-Newton method takes dozens.
Source: projected Newton (Bertsekas 1982, doi 10.1137/0320018).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["minimize_convex"]

_MOST_STEPS, _MOST_HALVINGS = 100, 50
_ENOUGH = 1e-12
"""Of the loss: a step that promises less is the last."""
_SUFFICIENT = 1e-4
"""Of the promised decrease that a step must bring."""

_Floats = NDArray[np.float64]
Loss = Callable[[_Floats], tuple[float, _Floats, _Floats]]
"""Numbers (K,) -> the loss, its gradient (K,) and its second derivatives (K, K), which are positive definite."""


def minimize_convex(loss: Loss, start: _Floats, lower: _Floats, upper: _Floats) -> _Floats:
    """The numbers (K,) between `lower` and `upper` (K,), which may be infinite or equal, with the least loss.

    Parameters
    ----------
    start : (K,); what is outside of the bounds is moved to them.

    Returns
    -------
    (K,), where no step of Newton's leads further down, or after 100 of them.

    Raises
    ------
    numpy.linalg.LinAlgError : the second derivatives are singular.
    """
    best: _Floats = np.clip(start, lower, upper)
    value, slope, curvature = loss(best)
    for _ in range(_MOST_STEPS):
        step = _step(best, slope, curvature, lower, upper)
        if -(slope @ step) <= _ENOUGH * (1.0 + abs(value)):
            break
        for halvings in range(_MOST_HALVINGS):
            tried = np.clip(best + step / 2.0**halvings, lower, upper)
            found = loss(tried)
            if found[0] <= value + _SUFFICIENT * (slope @ (tried - best)):
                break
        else:
            break
        best, (value, slope, curvature) = tried, found
    return best


def _step(best: _Floats, slope: _Floats, curvature: _Floats, lower: _Floats, upper: _Floats) -> _Floats:
    """To the minimum of the quadratic, but for the numbers that a bound holds back. One that the others would take
    beyond its bound is kept there by the caller, which only adds to the descent: its own slope leads inward."""
    free = ~(((best <= lower) & (slope >= 0)) | ((best >= upper) & (slope <= 0)))
    step = np.zeros_like(best)
    step[free] = np.linalg.solve(curvature[np.ix_(free, free)], -slope[free])
    return step
