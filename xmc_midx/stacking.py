"""Layer 5. The fit of the last step (`xmc_midx.interpolation`): its coefficients, and which parts pay.

Before it: a model's answers to held-out instances, what the neighbours and the ranker have for them; after it: the
settings that a run keeps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.compiled import compiled
from xmc_midx.interpolation import (
    BOUNDS,
    NO_VOTES,
    Coefficients,
    Interpolation,
    MarginOf,
    margin_terms,
)
from xmc_midx.metrics import instance_scores, inverse_propensity
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.newton import minimize_convex
from xmc_midx.selection import insert_best
from xmc_midx.threads import in_threads
from xmc_midx.types import DEFAULT_KS, DEFAULT_PROPENSITY, TopK

__all__ = ["fit_interpolation"]

_TEMPERATURES = (0.05, 0.1)
_PROPENSITY_POWERS = {0.5: 0.0, 0.25: 1.0, 0.0: 2.0}
"""Of the inverse propensity, as the weight of a positive: 0 ranks for P@k, 1 for PSP@k at the price of P@k. Half is
mostly free and a quarter nearly always, so each of the lower ones has to be better in P by more than chance: by so many
standard errors of the paired difference (EXPERIMENTS.md, "The last step")."""
_MOST_VOTED = 300
"""Labels of the neighbours that an instance of the fit brings, at most: of instances with many labels, thousands are
voted for, nearly all of them by next to nothing."""
_PULL = 3.0
"""Of the coefficients towards the model alone, in instances: what a few hundred held-out ones say is half believed."""
_CONSTANT = 1e-9
"""Standard deviation up to which a term is the same for all candidates, but for rounding."""
_NEGLIGIBLE = 1e-3
"""A coefficient this close to 0, in standard deviations of its term, is 0."""
_STANDARD_ERRORS_ALONE = 2.0
"""By how many the model alone must be better for nothing to be added: what is added pays on every dataset measured, so
that a little more on a few hundred instances is chance (EXPERIMENTS.md, "The last step")."""
_WORTH = 5e-4
"""What neighbours or ranker must add to the mean of P and PSP to be kept: they cost space and time."""
_ENOUGH = 1000
"""Held-out instances from which that can be told; fewer keep all that is there, and the fit weighs it."""
_ALONE, _OF_RANKER, _OF_NEIGHBORS = ("model", "frequency"), ("margin", "peak"), ("mixture", "votes", "outside")
"""Coefficients that are fitted, by what takes part."""
_NUM_SUMS = 1 + len(Coefficients._fields) + len(Coefficients._fields) ** 2
"""Of an instance: its loss and the derivatives."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Terms:
    """Labels of the shortlists and of the neighbours, a row each, sorted by instance and label."""

    instance: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    terms: _Floats
    """(candidates, 7): what the coefficients are multiplied by."""


def fit_interpolation(
    shortlist: TopK,
    neighbors: NeighborIndex | None,
    found: tuple[NDArray[np.int64], NDArray[np.float32]] | None,
    labels: csr_matrix,
    label_frequencies: NDArray[np.integer[Any]],
    num_train: int,
    *,
    margin_of: MarginOf | None = None,
    propensity: tuple[float, float] = DEFAULT_PROPENSITY,
) -> Interpolation:
    """Fit the coefficients on held-out instances, and keep of neighbours and ranker what pays.

    The tail is weighed as far as it costs nothing: a gain in PSP@k is never paid for with P@k (the mean of both is
    over k = 1, 3, 5) by more than chance.

    Parameters
    ----------
    shortlist : (N, S) logits of the model for the held-out instances.
    neighbors, found : the index over the other training instances, and what it found for the held-out ones; None: no
        neighbours.
    labels : (N, L) true labels.
    label_frequencies, num_train : of the training split.
    margin_of : of a ranker that was trained without the held-out instances; None: no ranker.
    propensity : A and B of the propensity model.
    """
    count = 0 if found is None else found[0].shape[1]
    weight_L = inverse_propensity(label_frequencies, num_train, *propensity)

    def scored(candidates: _Terms, settings: Interpolation) -> _Trial:
        scores = candidates.terms @ np.array(settings.coefficients)
        top = _best(candidates.instance, candidates.label_ids, scores, labels.shape[0], max(DEFAULT_KS))
        a, b = propensity
        return settings, instance_scores(top, labels, label_frequencies, num_train, A=a, B=b)

    def fit(part: _Part, power: float) -> _Trial:
        candidates, free, temperature = part
        fitted = _fit(candidates, labels, weight_L**power, free)._asdict()
        return scored(candidates, Interpolation(**fitted, temperature=temperature, count=count))

    no_votes = _candidates(shortlist, None, label_frequencies, margin_of)
    parts: list[_Part] = [(no_votes, _ALONE, _TEMPERATURES[0])]
    if margin_of is not None:
        parts.append((no_votes, _ALONE + _OF_RANKER, _TEMPERATURES[0]))
    if neighbors is not None and found is not None:
        sets: list[tuple[str, ...]] = [_ALONE + _OF_NEIGHBORS]
        if margin_of is not None:
            sets.append(_ALONE + _OF_NEIGHBORS + _OF_RANKER)
        best: tuple[float, _Part] | None = None
        for temperature in _TEMPERATURES:
            votes = _most_voted(neighbors.votes(*found, temperature))
            part = (_candidates(shortlist, votes, label_frequencies, margin_of), sets[-1], temperature)
            quality = _mean(fit(part, max(_PROPENSITY_POWERS))[1])
            if best is None or quality > best[0]:
                best = quality, part
        assert best is not None, "there is a temperature"
        parts += [(best[1][0], free, best[1][2]) for free in sets]
    power, whole = _highest_power([(power, fit(parts[-1], power)) for power in _PROPENSITY_POWERS])
    plain = scored(no_votes, Interpolation(count=count))
    if _p_is_higher(plain[1], whole[1], _STANDARD_ERRORS_ALONE):
        return plain[0]
    if labels.shape[0] < _ENOUGH:
        return whole[0]
    for part in parts[:-1]:
        smaller = fit(part, power)
        if _mean(smaller[1]) > _mean(whole[1]) - _WORTH:
            return smaller[0]
    return whole[0]


def _most_voted(votes: csr_matrix) -> csr_matrix:
    """The `_MOST_VOTED` largest votes of each row."""
    counts = np.diff(votes.indptr)
    if not (counts > _MOST_VOTED).any():
        return votes
    kept = np.ones(votes.nnz, dtype=bool)
    for row in np.flatnonzero(counts > _MOST_VOTED):
        mine = np.arange(votes.indptr[row], votes.indptr[row + 1])
        # Of equal votes those of the smaller labels, whatever their order here.
        order = np.lexsort((votes.indices[mine], -votes.data[mine]))
        kept[mine[order[_MOST_VOTED:]]] = False
    offsets = np.concatenate([[0], np.cumsum(np.minimum(counts, _MOST_VOTED))])
    return csr_matrix((votes.data[kept], votes.indices[kept], offsets), shape=votes.shape)


def _fit(candidates: _Terms, labels: csr_matrix, weight_L: _Floats, free: Sequence[str]) -> Coefficients:
    """The coefficients with the least decoupled softmax loss over the candidates; those that are not `free` stay
    the model's alone.

    The loss is convex: the mean over the positives p among the candidates, weighted by `weight_L` and by 1/|Y|, of
    log(1 + exp(S - s_p)), with S the log of the summed exponentials of the instance's negatives among the candidates,
    summed over the instances, plus `_PULL` times the squared distance from the model alone, in standard deviations.
    """
    positive = _is_positive(candidates, labels)
    start = np.array(Interpolation().coefficients)
    if not positive.any() or positive.all():
        return Coefficients(*start.tolist())
    # A term after the other: of all at once, the deviations would be as large as the terms.
    spread = np.array([term.std() for term in candidates.terms.T])
    is_constant = spread < _CONSTANT
    num_rows, mine = labels.shape[0], candidates.instance[positive]
    weight = np.zeros(positive.shape[0])
    weight[positive] = weight_L[candidates.label_ids[positive]] / np.bincount(mine, minlength=num_rows)[mine]
    weight *= num_rows / weight.sum()
    offsets = np.searchsorted(candidates.instance, np.arange(num_rows + 1))
    pull = np.where(is_constant, 1e9, _PULL * spread**2)

    def loss(coefficients: _Floats) -> tuple[float, _Floats, _Floats]:
        found = np.empty((num_rows, _NUM_SUMS))
        in_threads(functools.partial(_losses, candidates.terms, weight, offsets, coefficients, found), num_rows)
        value, *sums = found.sum(axis=0)
        slope, curvature = np.array(sums[: len(start)]), np.array(sums[len(start) :]).reshape(len(start), -1)
        away = coefficients - start
        return value + pull @ away**2, slope + 2 * pull * away, curvature + np.diag(2 * pull)

    lower, upper = start.copy(), start.copy()
    for place, name in enumerate(Coefficients._fields):
        if name in free:
            lower[place], upper[place] = BOUNDS[name]
    found = minimize_convex(loss, start, lower, upper)
    negligible = np.abs(found) * np.where(is_constant, 1.0, spread) < _NEGLIGIBLE
    return Coefficients(*np.where(negligible, 0.0, found).tolist())


@compiled
def _losses(terms: Any, weight: Any, offsets: Any, coefficients: Any, found: Any, begin: int, end: int) -> None:
    """Of each instance, into its row of `found`: the loss, its gradient and its second derivatives. The candidates of
    an instance follow one another; those with a weight are its positives."""
    size = coefficients.shape[0]
    mean, square = np.empty(size), np.empty((size, size))
    for row in range(begin, end):
        found[row] = 0.0
        first, last = offsets[row], offsets[row + 1]
        score = np.empty(last - first)
        largest = -np.inf
        for place in range(first, last):
            total = 0.0
            for term in range(size):
                total += coefficients[term] * terms[place, term]
            score[place - first] = total
            if weight[place] == 0.0:
                largest = max(largest, total)
        if largest == -np.inf:
            # Without negatives there is nothing to rank.
            continue
        mass, mean[:], square[:] = 0.0, 0.0, 0.0
        for place in range(first, last):
            if weight[place] == 0.0:
                share = math.exp(score[place - first] - largest)
                mass += share
                for term in range(size):
                    part = share * terms[place, term]
                    mean[term] += part
                    for other in range(term + 1):
                        square[term, other] += part * terms[place, other]
        slope, curvature = found[row, 1 : 1 + size], found[row, 1 + size :]
        for place in range(first, last):
            if weight[place] == 0.0:
                continue
            margin = largest + math.log(mass) - score[place - first]
            low = math.exp(-abs(margin))
            found[row, 0] += weight[place] * (max(margin, 0.0) + math.log1p(low))
            chance = (1.0 if margin >= 0.0 else low) / (1.0 + low)
            for term in range(size):
                away = mean[term] / mass - terms[place, term]
                slope[term] += weight[place] * chance * away
                for other in range(term + 1):
                    spread = square[term, other] / mass - mean[term] * mean[other] / mass**2
                    spread += (1.0 - chance) * away * (mean[other] / mass - terms[place, other])
                    curvature[term * size + other] += weight[place] * chance * spread
        for term in range(size):
            for other in range(term):
                curvature[other * size + term] = curvature[term * size + other]


def _is_positive(candidates: _Terms, labels: csr_matrix) -> NDArray[np.bool_]:
    rows = np.repeat(np.arange(labels.shape[0]), np.diff(labels.indptr))
    keys = candidates.instance * labels.shape[1] + candidates.label_ids
    return np.isin(keys, rows * labels.shape[1] + labels.indices)


_Scores = tuple[_Floats, _Floats]
"""Of each instance: P@k and PSP@k, each averaged over k."""
_Trial = tuple[Interpolation, _Scores]
_Part = tuple[_Terms, tuple[str, ...], float]
"""Candidates, the coefficients that are free, and the temperature of the candidates' votes."""


def _highest_power(trials: list[tuple[float, _Trial]]) -> tuple[float, _Trial]:
    """The first of the falling powers that no later one beats in P by more than chance."""
    for place, (power, trial) in enumerate(trials):
        later = trials[place + 1 :]
        if not any(_p_is_higher(other[1], trial[1], _PROPENSITY_POWERS[lower]) for lower, other in later):
            return power, trial
    raise AssertionError("nothing comes after the last")


def _p_is_higher(scores: _Scores, reference: _Scores, errors: float) -> bool:
    """By more than so many standard errors of a paired comparison."""
    gain = scores[0] - reference[0]
    error = gain.std() / np.sqrt(max(gain.shape[0], 1))
    return bool(gain.mean() > errors * error)


def _mean(scores: _Scores) -> float:
    return float(scores[0].mean() + scores[1].mean()) / 2


def _candidates(
    shortlist: TopK,
    votes: csr_matrix | None,
    label_frequencies: NDArray[np.integer[Any]],
    margin_of: MarginOf | None = None,
) -> _Terms:
    num_rows, num_labels = shortlist.label_ids.shape[0], label_frequencies.shape[0]
    found_BS = shortlist.label_ids >= 0
    logits_BS = np.where(found_BS, shortlist.scores.astype(np.float64), -np.inf)
    largest_B = np.max(logits_BS, axis=1, initial=-1e300)
    log_sum_B = np.log(np.maximum(np.exp(logits_BS - largest_B[:, None]).sum(1), 1e-300))
    log_p_BS = logits_BS - (largest_B + log_sum_B)[:, None]
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
        np.log(vote + NO_VOTES),
        np.log1p(label_frequencies[label_ids]),
        ~shortlisted,
        *(np.zeros((2, log_p.shape[0])) if margin_of is None else margin_terms(*margin_of(instance, label_ids))),
    ]
    return _Terms(instance, label_ids, np.stack(terms, axis=1))


@compiled
def _keep_best(instance: Any, label_ids: Any, scores: Any, found_BK: Any, score_BK: Any) -> None:
    for place in range(instance.shape[0]):
        row = instance[place]
        insert_best(found_BK[row], score_BK[row], label_ids[place], scores[place])


def _best(instance: NDArray[np.int64], label_ids: NDArray[np.int64], scores: _Floats, num_rows: int, k: int) -> TopK:
    """The k best candidates of each instance, ties to the smaller id."""
    result = TopK.empty(num_rows, k)
    scores_BK = np.full((num_rows, k), -np.inf)
    _keep_best(instance, label_ids, scores, result.label_ids, scores_BK)
    result.scores[:] = scores_BK
    return result
