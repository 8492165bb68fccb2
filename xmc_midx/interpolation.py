"""Layer 5. The last step of a prediction: the model's shortlist and the labels of the nearest training instances, in
one ranking.

With the model's probability p over the shortlist and the neighbours' votes v (`xmc_midx.neighbors`), the score of a
label with n training instances is

    model log p + mixture log(p + v) + votes log(v + 1e-3) + frequency log(n + 1) + outside [not in the shortlist],

where p of a label outside the shortlist is 1/e of the shortlist's smallest. The encoder generalises, the neighbours
remember; a negative frequency term moves mass to the tail (a logit adjustment). The five coefficients minimise, on
held-out training instances, the loss of the training itself, each positive weighted by the root of its inverse
propensity so that the tail counts; terms that do not pay stay 0. Source: ours, after kNN-LM (arXiv 1911.00172), logit
adjustment (arXiv 2007.07314) and stacking (Wolpert 1992); the figures are in EXPERIMENTS.md, "Neighbours".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit

from xmc_midx.errors import DataError
from xmc_midx.metrics import instance_scores, inverse_propensity
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.types import DEFAULT_KS, TopK

__all__ = ["SHORTLIST", "Interpolation", "fit_interpolation", "interpolate", "keep_labels"]

SHORTLIST = 100
"""Labels of the model that take part."""
_TEMPERATURES = (0.05, 0.1)
_NO_VOTES = 1e-3
"""What a label without votes has, so that its logarithm is finite."""
_PROPENSITY_POWER = 0.5
"""Of the inverse propensity, as the weight of a positive: 0 ranks for P@k, 1 for PSP@k at the price of P@k."""
_PULL = 3.0
"""Of the coefficients towards the model alone, in instances: what a few hundred held-out ones say is half believed."""
_STANDARD_ERRORS = 0.5
"""By how many standard errors of the paired difference P may fall: less is chance."""
_NAMES = ("model", "mixture", "votes", "frequency", "outside")
_BOUNDS = ((0.0, None), (0.0, None), (0.0, None), (None, None), (None, 0.0))
"""Of the coefficients: more mass and more votes never lower a score, absence from the shortlist never raises it."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolation:
    """How model and neighbours are added; the default is the model alone. The first five are the coefficients."""

    model: float = 1.0
    mixture: float = 0.0
    votes: float = 0.0
    frequency: float = 0.0
    outside: float = 0.0
    temperature: float = 0.1
    """Of the softmax over the neighbours' cosines."""
    count: int = 50
    """Neighbours of an instance."""

    @property
    def coefficients(self) -> _Floats:
        """(5,), in the order of the formula."""
        return np.array([getattr(self, name) for name in _NAMES])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Interpolation:
        """What `as_dict` gave; anything else is a DataError."""
        try:
            typed = {field.name: float(values[field.name]) for field in fields(cls)}
            return cls(**typed | {"count": int(values["count"])})  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"interpolation.json: {error!r}; expected what `train` wrote.") from None

    @property
    def is_identity(self) -> bool:
        return self.mixture == self.votes == self.frequency == 0.0

    @property
    def needs_neighbors(self) -> bool:
        return self.mixture > 0.0 or self.votes > 0.0


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Labels of the shortlists and of the neighbours, a row each, sorted by instance and label."""

    instance: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    terms: _Floats
    """(candidates, 5): what the coefficients are multiplied by."""


def interpolate(
    shortlist: TopK,
    votes: csr_matrix | None,
    label_frequencies: NDArray[np.integer[Any]],
    settings: Interpolation,
    k: int,
) -> TopK:
    """Rescore a shortlist together with the neighbours' labels.

    Parameters
    ----------
    shortlist : (B, S) logits of the model.
    votes : (B, L) of the neighbours; None for none.
    label_frequencies : (L,) of the training split.
    k : results.

    Returns
    -------
    TopK : (B, k); scores in nats, ties to the smaller id.
    """
    candidates = _candidates(shortlist, votes if settings.needs_neighbors else None, label_frequencies)
    return _best(candidates, candidates.terms @ settings.coefficients, shortlist.label_ids.shape[0], k)


def keep_labels(votes: csr_matrix, allow: NDArray[np.int64] | None, deny: NDArray[np.int64] | None) -> csr_matrix:
    """The votes for labels that may be returned: those in `allow` (None: all) that are not in `deny`."""
    if allow is None and deny is None:
        return votes
    kept_L = np.full(votes.shape[1], allow is None)
    if allow is not None:
        kept_L[allow] = True
    if deny is not None:
        kept_L[deny] = False
    kept = votes.copy()
    kept.data[~kept_L[kept.indices]] = 0.0
    kept.eliminate_zeros()
    return kept


def _candidates(shortlist: TopK, votes: csr_matrix | None, label_frequencies: NDArray[np.integer[Any]]) -> _Candidates:
    num_rows, num_labels = shortlist.label_ids.shape[0], label_frequencies.shape[0]
    found_BS = shortlist.label_ids >= 0
    logits_BS = np.where(found_BS, shortlist.scores.astype(np.float64), -np.inf)
    peak_B = np.max(logits_BS, axis=1, initial=-1e300)
    log_sum_B = np.log(np.maximum(np.exp(logits_BS - peak_B[:, None]).sum(1), 1e-300))
    log_p_BS = logits_BS - (peak_B + log_sum_B)[:, None]
    floor_B = np.min(log_p_BS, axis=1, where=found_BS, initial=0.0) - 1.0
    keys = (np.arange(num_rows)[:, None] * num_labels + shortlist.label_ids)[found_BS]
    num_shortlisted, vote_of = keys.shape[0], np.zeros(keys.shape[0])
    if votes is not None:
        rows = np.repeat(np.arange(num_rows), np.diff(votes.indptr))
        keys = np.concatenate([keys, rows * num_labels + votes.indices])
        vote_of = np.concatenate([vote_of, votes.data])
    # Of a label in both, the shortlist's entry comes first: the sort is stable.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    vote = np.add.reduceat(vote_of[order], first) if first.size else vote_of
    instance, label_ids = np.divmod(keys[first], num_labels)
    source = order[first]
    shortlisted = source < num_shortlisted
    log_p = floor_B[instance]
    log_p[shortlisted] = log_p_BS[found_BS][source[shortlisted]]
    terms = [
        log_p,
        np.log(np.exp(log_p) + vote + 1e-300),
        np.log(vote + _NO_VOTES),
        np.log1p(label_frequencies[label_ids]),
        ~shortlisted,
    ]
    return _Candidates(instance, label_ids, np.stack(terms, axis=1))


def _best(candidates: _Candidates, scores: _Floats, num_rows: int, k: int) -> TopK:
    order = np.lexsort((candidates.label_ids, -scores, candidates.instance))
    instance = candidates.instance[order]
    rank = np.arange(order.shape[0]) - np.searchsorted(instance, np.arange(num_rows))[instance]
    kept = rank < k
    result = TopK(
        label_ids=np.full((num_rows, k), -1, dtype=np.int64), scores=np.full((num_rows, k), -np.inf, dtype=np.float32)
    )
    place = (instance[kept], rank[kept])
    result.label_ids[place] = candidates.label_ids[order[kept]]
    result.scores[place] = scores[order[kept]]
    return result


def fit_interpolation(
    shortlist: TopK,
    neighbors: NeighborIndex | None,
    found: tuple[NDArray[np.int64], NDArray[np.float32]] | None,
    labels: csr_matrix,
    label_frequencies: NDArray[np.integer[Any]],
    num_train: int,
) -> Interpolation:
    """Fit the coefficients, without neighbours and with them, and keep what pays, on held-out instances.

    Compared is the mean of P@k and PSP@k at k = 1, 3, 5; but a gain in PSP is never paid for with P: the mean of P@k
    must not fall by more than chance.

    Parameters
    ----------
    shortlist : (N, S) logits of the model for the held-out instances.
    neighbors, found : the index over the other training instances, and what it found for the held-out ones; None: no
    neighbours. labels : (N, L) true labels. label_frequencies, num_train : of the training split.
    """
    count = 0 if found is None else found[0].shape[1]
    num_rows = labels.shape[0]
    weight_L = inverse_propensity(label_frequencies, num_train) ** _PROPENSITY_POWER

    def scores(candidates: _Candidates, settings: Interpolation) -> _Scores:
        top = _best(candidates, candidates.terms @ settings.coefficients, num_rows, max(DEFAULT_KS))
        return instance_scores(top, labels, label_frequencies, num_train)

    candidates = _candidates(shortlist, None, label_frequencies)
    best = Interpolation(count=count)
    best_scores = plain = scores(candidates, best)
    fitted = _fit(candidates, labels, weight_L, [0, 3]).tolist()
    without = Interpolation(model=fitted[0], frequency=fitted[3], count=count)
    without_scores = scores(candidates, without)
    if _wins(without_scores, best_scores):
        best, best_scores = without, without_scores
    if neighbors is None or found is None:
        return best
    for temperature in _TEMPERATURES:
        candidates = _candidates(shortlist, neighbors.votes(*found, temperature), label_frequencies)
        fitted = _fit(candidates, labels, weight_L, [0, 1, 2, 3, 4]).tolist()
        trial = Interpolation(**dict(zip(_NAMES, fitted, strict=True)), temperature=temperature, count=count)
        trial_scores = scores(candidates, trial)
        if trial.needs_neighbors and _wins(trial_scores, plain) and _mean(trial_scores) > _mean(best_scores):
            best, best_scores = trial, trial_scores
    return best


def _fit(candidates: _Candidates, labels: csr_matrix, weight_L: _Floats, free: list[int]) -> _Floats:
    """The five coefficients with the least decoupled softmax loss over the candidates; those that are not `free` stay
    the model's alone.

    The loss is convex: the mean over the positives p among the candidates, weighted by `weight_L` and by 1/|Y|, of
    log(1 + exp(S - s_p)), with S the log of the summed exponentials of the instance's negatives among the candidates,
    summed over the instances, plus `_PULL` times the squared distance from the model alone, in standard deviations.
    """
    positive = _is_positive(candidates, labels)
    start = Interpolation().coefficients
    if not positive.any() or positive.all():
        return start
    spread = candidates.terms.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    terms = candidates.terms / scale
    num_rows = labels.shape[0]
    mine, others = candidates.instance[positive], candidates.instance[~positive]
    weight = weight_L[candidates.label_ids[positive]] / np.bincount(mine, minlength=num_rows)[mine]
    weight *= num_rows / weight.sum()
    pull = np.where(spread > 0, _PULL, 1e9)

    def loss(values: _Floats) -> tuple[float, _Floats]:
        coefficients = start * scale
        coefficients[free] = values
        scores = terms @ coefficients
        peak = np.full(num_rows, -1e300)
        np.maximum.at(peak, others, scores[~positive])
        mass = np.exp(scores[~positive] - peak[others])
        total = np.bincount(others, weights=mass, minlength=num_rows)
        margin = np.log(np.maximum(total, 1e-300))[mine] + peak[mine] - scores[positive]
        slope = weight * expit(margin)
        gradient = np.empty_like(scores)
        gradient[positive] = -slope
        gradient[~positive] = (np.bincount(mine, weights=slope, minlength=num_rows) / np.maximum(total, 1e-300))[
            others
        ] * mass
        away = coefficients - start * scale
        value = float((weight * np.logaddexp(0.0, margin)).sum() + (pull * away**2).sum())
        return value, (terms.T @ gradient + 2 * pull * away)[free]

    bounds = [_BOUNDS[i] for i in free]
    result = minimize(loss, (start * scale)[free], jac=True, method="L-BFGS-B", bounds=bounds)
    start[free] = result.x / scale[free]
    return start


def _is_positive(candidates: _Candidates, labels: csr_matrix) -> NDArray[np.bool_]:
    rows = np.repeat(np.arange(labels.shape[0]), np.diff(labels.indptr))
    keys = candidates.instance * labels.shape[1] + candidates.label_ids
    return np.isin(keys, rows * labels.shape[1] + labels.indices)


_Scores = tuple[_Floats, _Floats]
"""Of each instance: P@k and PSP@k, each averaged over k."""


def _mean(scores: _Scores) -> float:
    return float(scores[0].mean() + scores[1].mean()) / 2


def _wins(scores: _Scores, reference: _Scores) -> bool:
    """Whether the mean of P and PSP is higher, and P not lower by more than chance: a paired comparison."""
    loss = reference[0] - scores[0]
    error = loss.std() / np.sqrt(max(loss.shape[0], 1))
    return _mean(scores) > _mean(reference) and bool(loss.mean() <= _STANDARD_ERRORS * error)
