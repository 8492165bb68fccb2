"""Newton's method between bounds, against SciPy's quasi-Newton method and the conditions of a minimum."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from xmc_midx.newton import Loss, minimize_convex


def logistic(seed: int, size: int, ridge: float = 0.1) -> Loss:
    """A logistic regression whose terms differ in size by factors of a thousand and go together."""
    rng = np.random.default_rng(seed)
    terms = rng.normal(size=(300, size)) @ rng.normal(size=(size, size)) * 10.0 ** rng.uniform(-1.5, 1.5, size)
    positive = rng.random(300) < expit(terms[:, 0] / np.abs(terms[:, 0]).max())

    def loss(values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        logits = terms @ values
        chance = expit(logits)
        value = np.logaddexp(0.0, np.where(positive, -logits, logits)).sum() + ridge * values @ values
        curvature = terms.T @ (terms * (chance * (1 - chance))[:, None]) + 2 * ridge * np.eye(size)
        return float(value), terms.T @ (chance - positive) + 2 * ridge * values, curvature

    return loss


@pytest.mark.parametrize("seed", range(20))
def test_it_is_where_a_quasi_newton_method_ends(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    size = int(rng.integers(1, 8))
    loss, start = logistic(seed, size), rng.normal(size=size)
    free = minimize(lambda x: loss(x)[:2], np.zeros(size), jac=True, method="L-BFGS-B").x
    # About half of the bounds hold something back.
    lower = np.where(rng.random(size) < 0.4, free + rng.normal(size=size) * np.abs(free), -np.inf)
    upper = np.where(rng.random(size) < 0.3, np.maximum(lower, free + rng.normal(size=size) * np.abs(free)), np.inf)
    upper[rng.random(size) < 0.1] = np.inf
    found = minimize_convex(loss, start, lower, upper)
    assert (lower <= found).all() and (found <= upper).all()
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000, "maxfun": 100_000}
    bounds = list(zip(lower, upper, strict=True))
    other = minimize(lambda x: loss(x)[:2], found, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    assert loss(found)[0] <= other.fun + 1e-8 * (1 + abs(other.fun))
    _, slope, _ = loss(found)
    moved = np.clip(found - slope, lower, upper) - found
    scale = np.abs(loss(np.clip(start, lower, upper))[1]).max()
    assert np.abs(moved).max() <= 1e-5 * (1 + scale), "no way leads down that the bounds allow"


def test_few_evaluations_are_enough() -> None:
    calls = []

    def counted(values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        calls.append(values)
        return logistic(1, 6)(values)

    minimize_convex(counted, np.ones(6), np.full(6, 0.0), np.full(6, np.inf))
    assert len(calls) < 30


def test_numbers_that_may_not_move_stay() -> None:
    start = np.array([0.5, -3.0, 2.0])
    lower, upper = np.array([0.5, -np.inf, 0.0]), np.array([0.5, np.inf, 1.0])
    found = minimize_convex(logistic(2, 3), start, lower, upper)
    assert found[0] == 0.5 and 0.0 <= found[2] <= 1.0 and found[1] != -3.0


def test_a_bound_that_only_another_number_pushes_against_does_not_stop_it() -> None:
    """At the start both slopes lead inward, the step of one of them beyond its bound."""

    def loss(values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        curvature = np.array([[1.0, 0.9], [0.9, 1.0]])
        away = values - np.array([2.0, -1.5])
        return float(away @ curvature @ away) / 2, curvature @ away, curvature

    found = minimize_convex(loss, np.zeros(2), np.zeros(2), np.full(2, np.inf))
    np.testing.assert_allclose(found, [2.0 - 0.9 * 1.5, 0.0], atol=1e-12)
