"""Layer 2. From scores to probabilities: the chance that a label applies, calibrated on held-out instances.

A softmax probability is not that chance: an instance has several labels, whose chances need not sum to one, and the
loss sets each positive against the negatives alone. With an instance's scores s of the 100 best labels, falling,

    P(label applies) = sigmoid(score s_i + total log sum_j exp(s_j) + tail log sum_(j >= 10) exp(s_j) + offset),

where the two sums tell a sure instance from an unsure one (the tail's has one more term, e^-1 times the exponential of
the least of the hundred scores: a row of ten labels has a tail too). The four coefficients are the logistic regression
over the 20 best labels of each held-out instance (Platt scaling with two more terms); `score` is positive, so the
ranking stays.
Source: ours; the figures, and the terms that were tried, are in EXPERIMENTS.md, "Probabilities".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import expit, logsumexp

from xmc_midx.errors import DataError
from xmc_midx.newton import minimize_convex
from xmc_midx.types import TopK

__all__ = ["BACKGROUND", "Calibration", "calibrate", "expected_calibration_error", "fit_calibration", "is_positive"]

BACKGROUND = 100
"""Best labels whose scores are summed."""
_HEAD = 10
"""Best labels that the tail's sum leaves out."""
_FITTED = 20
"""Best labels of each held-out instance that the coefficients are fitted to: the ones that are looked at."""
_RIDGE = 0.5
"""Of the coefficients of the standardised terms: keeps them finite where a few instances are told apart perfectly."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The coefficients of the formula above."""

    score: float
    """> 0."""
    total: float
    tail: float
    offset: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """What `as_dict` gave; anything else is a DataError."""
        try:
            found = cls(**{field.name: float(values[field.name]) for field in fields(cls)})
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"calibration: {error!r}; expected what `train` wrote.") from None
        if not all(np.isfinite(value) for value in asdict(found).values()) or found.score <= 0:
            raise DataError("calibration: expected finite coefficients and a positive one of the score.")
        return found


def fit_calibration(top: TopK, labels: csr_matrix) -> Calibration | None:
    """Fit the coefficients to the scores (N, K) of the `BACKGROUND` best labels of held-out instances and their true
    labels (N, L); None where all of them apply, or none does.
    """
    used = np.zeros(top.label_ids.shape, dtype=bool)
    used[:, :_FITTED] = top.label_ids[:, :_FITTED] >= 0
    positive = is_positive(top, labels)[used]
    if not positive.any() or positive.all():
        return None
    terms = np.stack([term[used] for term in _terms(top)], axis=1)
    mean, spread = terms.mean(axis=0), terms.std(axis=0)
    scale = np.where(spread > 1e-9, spread, np.inf)
    standard = np.column_stack([(terms - mean) / scale, np.ones(len(terms))])

    ridge = np.append(np.full(len(scale), _RIDGE), 0.0)

    def loss(values: _Floats) -> tuple[float, _Floats, _Floats]:
        logits = standard @ values
        value = np.logaddexp(0.0, np.where(positive, -logits, logits)).sum() + ridge @ values**2 / 2
        chance = expit(logits)
        curvature = standard.T @ (standard * (chance * (1.0 - chance))[:, None]) + np.diag(ridge)
        return float(value), standard.T @ (chance - positive) + ridge * values, curvature

    # Were the scores worthless, the fit would still keep their order.
    lower = np.array([1e-3, -np.inf, -np.inf, -np.inf])
    found = minimize_convex(loss, np.array([1.0, 0.0, 0.0, 0.0]), lower, np.full(4, np.inf))
    slopes = found[:-1] / np.where(np.isfinite(scale), scale, 1.0)
    offset = found[-1] - float((slopes * np.where(np.isfinite(scale), mean, 0.0)).sum())
    return Calibration(score=float(slopes[0]), total=float(slopes[1]), tail=float(slopes[2]), offset=float(offset))


def calibrate(top: TopK, settings: Calibration, *, background: TopK | None = None) -> TopK:
    """Probabilities in place of scores.

    Parameters
    ----------
    top : (B, K) scores, falling.
    background : (B, `BACKGROUND` or more), of the same instances where `top` is of chosen labels only: whether a label
        applies does not depend on which others may be shown. A label has the score that it has there; one that is not
        there has at most the last score there.

    Returns
    -------
    TopK : (B, K) probabilities in [0, 1], falling, ties in the order of `top`; pads keep -1 and -inf.
    """
    scores = top.scores.astype(np.float64)
    ids = top.label_ids
    if background is not None:
        scores = _scores_in(background, ids, scores)
        order = np.argsort(-scores, axis=1, kind="stable")
        ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    _, total, tail = _terms(top if background is None else background)
    logits = settings.score * scores + (settings.total * total + settings.tail * tail)[:, :1] + settings.offset
    return TopK(label_ids=ids, scores=np.where(ids >= 0, expit(logits), -np.inf).astype(np.float32))


def _scores_in(background: TopK, ids: NDArray[np.int64], scores: _Floats) -> _Floats:
    """The scores that the labels `ids` (B, K) have in `background`, or at most the last one there."""
    last = np.where(background.label_ids >= 0, background.scores, np.inf).min(axis=1, keepdims=True)
    result: _Floats = np.minimum(scores, last.astype(np.float64))
    for row in range(len(ids)):
        common, mine, theirs = np.intersect1d(ids[row], background.label_ids[row], return_indices=True)
        known = common >= 0
        result[row, mine[known]] = background.scores[row, theirs[known]]
    result[ids < 0] = -np.inf
    return result


def _terms(top: TopK) -> tuple[_Floats, _Floats, _Floats]:
    """Score, total and tail of each entry, (N, K); the last two are the row's."""
    scores = np.where(top.label_ids >= 0, top.scores.astype(np.float64), -np.inf)
    head = scores[:, :BACKGROUND]
    lowest = np.min(head, axis=1, where=np.isfinite(head), initial=1e300)
    lowest = np.where(lowest == 1e300, 0.0, lowest)  # a row of pads
    total = np.logaddexp(logsumexp(head, axis=1), lowest - 30.0)
    # A row without a tail has that of a single label a little below all others.
    tail = logsumexp(head[:, _HEAD:], axis=1) if head.shape[1] > _HEAD else np.full(len(head), -np.inf)
    tail = np.logaddexp(tail, lowest - 1.0)
    shape = scores.shape
    return scores, np.broadcast_to(total[:, None], shape), np.broadcast_to(tail[:, None], shape)


def is_positive(top: TopK, labels: csr_matrix) -> NDArray[np.bool_]:
    """(N, K): whether a label of the result is a true one; `labels` is (N, L)."""
    rows = np.repeat(np.arange(labels.shape[0], dtype=np.int64), np.diff(labels.indptr))
    keys = np.arange(labels.shape[0], dtype=np.int64)[:, None] * labels.shape[1] + top.label_ids
    return np.isin(keys, rows * labels.shape[1] + labels.indices) & (top.label_ids >= 0)


def expected_calibration_error(
    probabilities: NDArray[np.floating[Any]], positive: NDArray[np.bool_], *, num_bins: int = 15
) -> float:
    """The mean distance of stated from observed probability: `sum_b |B_b| / N |mean p in B_b - share of positives in
    B_b|` over equal bins of [0, 1] (Guo et al., arXiv 1706.04599).

    Parameters
    ----------
    probabilities, positive : any one shape; each entry is a label of an instance.
    """
    p, y = np.ravel(probabilities).astype(np.float64), np.ravel(positive)
    if not p.size:
        return 0.0
    bins = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
    gap = np.bincount(bins, weights=p - y, minlength=num_bins)
    return float(np.abs(gap).sum() / p.size)
