"""Layer 5. The last step of a prediction: the model's shortlist, the labels of the nearest training instances and the
linear ranker's margins, in one ranking.

With the model's probability p over the shortlist, the neighbours' votes v (`xmc_midx.neighbors`), the margin m of the
linear ranker (`xmc_midx.ranker`), cut to -1..1, and the largest part t of it that one feature makes, cut to 0..1, the
score of a label with n training instances is

    model log p + mixture log(p + v) + votes log(v + 1e-3) + frequency log(n + 1) + outside [not in the shortlist]
    + margin m + peak log(1 + t / 0.03),

where p of a label outside the shortlist is 1/e of the shortlist's smallest. (A label outside of it that no neighbour
votes for has a score below all others, in the order of the logits.) The encoder generalises, the neighbours remember,
the ranker sees each feature as it is, and whether a single one gives a label away, which no sum says; a negative
frequency term moves mass to the tail (a logit adjustment). The seven coefficients minimise, on held-out training
instances, the loss of the training itself, each positive weighted by a power of its inverse propensity so that the tail
counts; terms that do not pay stay 0. Source: ours, after kNN-LM (arXiv 1911.00172), logit adjustment (arXiv 2007.07314)
and stacking (Wolpert 1992); the figures are in EXPERIMENTS.md, "The last step" and "Linear ranker".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.errors import DataError
from xmc_midx.metrics import instance_scores, inverse_propensity
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.newton import minimize_convex
from xmc_midx.ranker import Margins
from xmc_midx.selection import insert_best
from xmc_midx.threads import in_threads, zeros
from xmc_midx.types import DEFAULT_KS, DEFAULT_PROPENSITY, TopK

__all__ = [
    "SHORTLIST",
    "Candidates",
    "Interpolation",
    "drop_hopeless",
    "empty_candidates",
    "fit_interpolation",
    "interpolate",
    "scale_of",
    "score_behind",
    "score_candidates",
    "score_label",
    "score_margin",
]

SHORTLIST = 100
"""Labels of the model that take part."""
_TEMPERATURES = (0.05, 0.1)
_LEAST_TEMPERATURE = 1e-6
"""That is read from a file: a softmax still is a number."""
_NO_VOTES = 1e-3
"""What a label without votes has, so that its logarithm is finite."""
_NO_PEAK = 0.03
"""What is added to a peak, so that its logarithm is finite; in margins, which are 1 where a label is sure."""
_MOST_FREQUENT = math.log1p(2**31)
"""The frequency term of a label that more instances have than there can be."""
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
_ADDED_LATER = ("margin", "budget", "idf_power", "peak")
_NAMES = ("model", "mixture", "votes", "frequency", "outside", "margin", "peak")
_NUM_SUMS = 1 + len(_NAMES) + len(_NAMES) ** 2
"""Of an instance: its loss and the derivatives."""
_POSITIVE = (0.0, np.inf)
_BOUNDS = (_POSITIVE, _POSITIVE, _POSITIVE, (-np.inf, np.inf), (-np.inf, 0.0), _POSITIVE, _POSITIVE)
"""Of the coefficients: more mass, votes, margin or peak never lower a score, absence from the shortlist never raises
it."""
_ALONE, _WITH_RANKER, _WITH_NEIGHBORS, _EVERYTHING = (0, 3), (0, 3, 5, 6), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5, 6)
"""Coefficients that are fitted, by what takes part."""

_Floats = NDArray[np.float64]
MarginOf = Callable[[NDArray[np.int64], NDArray[np.int64]], Margins]
"""Row numbers, which never fall, and label ids -> what the ranker has for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolation:
    """How model and neighbours are added; the default is the model alone. The first seven are the coefficients."""

    model: float = 1.0
    mixture: float = 0.0
    votes: float = 0.0
    frequency: float = 0.0
    outside: float = 0.0
    margin: float = 0.0
    peak: float = 0.0
    temperature: float = 0.1
    """Of the softmax over the neighbours' cosines."""
    count: int = 50
    """Neighbours of an instance."""
    budget: int = 8192
    """Entries of the neighbours' lists that an instance reads (`xmc_midx.neighbors.tune_budget`)."""
    idf_power: float = 0.0
    """Of the neighbours' features (`xmc_midx.neighbors.choose_idf_power`)."""

    @property
    def coefficients(self) -> _Floats:
        """(7,), in the order of the formula."""
        return np.array([getattr(self, name) for name in _NAMES])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Interpolation:
        """What `as_dict` gave; anything else is a DataError."""
        try:
            # What older runs do not say has its default.
            known = {name: getattr(cls(), name) for name in _ADDED_LATER} | dict(values)
            typed = {field.name: float(known[field.name]) for field in fields(cls)}
            is_sound = (
                typed["budget"] >= 1
                and typed["count"] >= (typed["mixture"] > 0 or typed["votes"] > 0)
                and typed["temperature"] >= _LEAST_TEMPERATURE
                and abs(typed["idf_power"]) <= 10
                and all(low <= typed[name] <= high for name, (low, high) in zip(_NAMES, _BOUNDS, strict=True))
            )
            if not (np.isfinite([*typed.values()]).all() and is_sound):
                raise ValueError("a number that is out of range")
            return cls(**typed | {name: int(known[name]) for name in ("count", "budget")})  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{error!r}; expected what `train` wrote.") from None

    @property
    def is_identity(self) -> bool:
        return self.mixture == self.votes == self.frequency == self.margin == self.peak == 0.0

    @property
    def needs_neighbors(self) -> bool:
        return self.mixture > 0.0 or self.votes > 0.0

    @property
    def needs_ranker(self) -> bool:
        return self.margin > 0.0 or self.peak > 0.0

    @property
    def margin_span(self) -> float:
        """By how much the ranker's part of the score can differ between two labels."""
        return 2.0 * self.margin + self.peak * math.log1p(1.0 / _NO_PEAK)


@dataclass(frozen=True, slots=True)
class _Terms:
    """Labels of the shortlists and of the neighbours, a row each, sorted by instance and label."""

    instance: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    terms: _Floats
    """(candidates, 7): what the coefficients are multiplied by."""


def interpolate(
    shortlist: TopK,
    votes: csr_matrix | None,
    label_frequencies: NDArray[np.integer[Any]],
    settings: Interpolation,
    k: int,
    *,
    margin_of: MarginOf | None = None,
    reference: TopK | None = None,
) -> TopK:
    """Rescore a shortlist together with the neighbours' labels.

    Parameters
    ----------
    shortlist : (B, S) logits of the model. What no neighbour votes for and the reference does not hold stands behind
        all that is scored, in the order of the logits: so the first results do not depend on how many are asked for.
    votes : (B, L) of the neighbours; None for none.
    label_frequencies : (L,) of the training split.
    k : results.
    margin_of : of the ranker for the same instances; None where the settings do not need it.
    reference : the (B, S) shortlist of all labels where `shortlist` is of chosen ones only: their probabilities, and
        which are outside, are what they are there, so that a choice of labels changes no order.

    Returns
    -------
    TopK : (B, k); scores in nats, ties to the smaller id.
    """
    num_rows, width = shortlist.label_ids.shape
    reference = reference or shortlist
    if votes is None or not settings.needs_neighbors:
        votes = csr_matrix((num_rows, label_frequencies.shape[0]))
    found: Candidates = empty_candidates(num_rows, num_rows * width + votes.nnz)
    score_candidates(
        (shortlist.label_ids, shortlist.scores),
        (reference.label_ids, reference.scores),
        (votes.indptr, votes.indices, votes.data),
        label_frequencies,
        settings.coefficients,
        1.0,
        zeros(label_frequencies.shape[0], np.float64),
        found,
    )
    drop_hopeless(found, k, settings.margin_span)
    used = found.offsets[-1]
    instance = np.repeat(np.arange(num_rows), np.diff(found.offsets))
    label_ids, scores = found.label_ids[:used], found.scores[:used]
    if settings.needs_ranker:
        assert margin_of is not None, "a margin comes with its ranker"
        asked = np.flatnonzero(~found.is_behind[:used])
        margin_term, peak_term = _margin_terms(*margin_of(instance[asked], label_ids[asked]))
        scores[asked] += settings.margin * margin_term + settings.peak * peak_term
    return _best(instance, label_ids, scores, num_rows, k)


class Candidates(NamedTuple):
    """Labels that may be among the results of some instances, one instance after the other, as compiled code takes
    them."""

    offsets: NDArray[np.int64]
    """(B + 1,)"""
    label_ids: NDArray[np.int64]
    scores: _Floats
    is_behind: NDArray[np.bool_]
    """Whether a label's place is behind all others, whatever its margin."""


@numba.njit(nogil=True, cache=True)
def empty_candidates(num_rows: Any, room: Any) -> Any:
    """With room for so many labels of all instances."""
    offsets, label_ids = np.zeros(num_rows + 1, dtype=np.int64), np.empty(room, dtype=np.int64)
    return Candidates(offsets, label_ids, np.empty(room), np.empty(room, dtype=np.bool_))


@numba.njit(nogil=True, cache=True)
def score_candidates(
    shortlist: Any,
    reference: Any,
    votes: Any,
    label_frequencies: Any,
    coefficients: Any,
    share: float,
    vote_of: Any,
    found: Any,
) -> None:
    """The labels of the shortlists and the votes, and `share` times their scores without margins; `vote_of` (L,) is
    zeros, and left so."""
    vote_offsets, vote_ids, vote_values = votes
    shortlist_BS, logit_BS = shortlist
    reference_BS, reference_logit_BS = reference
    width, used = shortlist_BS.shape[1], 0
    for row in range(shortlist_BS.shape[0]):
        begin, end = vote_offsets[row], vote_offsets[row + 1]
        for entry in range(begin, end):
            vote_of[vote_ids[entry]] += vote_values[entry]
        # Of labels with the least logit, those with the smallest ids are in the reference.
        peak, smallest, last_tied = -np.inf, np.inf, -1
        for place in range(reference_BS.shape[1]):
            label, logit = reference_BS[row, place], np.float64(reference_logit_BS[row, place])
            if label >= 0 and logit > -np.inf:
                last_tied = label if logit < smallest else max(last_tied, label) if logit == smallest else last_tied
                peak, smallest = max(peak, logit), min(smallest, logit)
        shift, floor = scale_of(reference_BS[row], reference_logit_BS[row], peak, smallest, coefficients)
        # The shortlist first; its labels' votes are then used up, and what is left is outside of it.
        for place in range(width + end - begin):
            listed = place < width
            label = shortlist_BS[row, place] if listed else vote_ids[begin + place - width]
            if label < 0 or (not listed and vote_of[label] < 0.0):
                continue
            logit = np.float64(logit_BS[row, place] if listed else 0.0)
            inside = listed and (logit > smallest or (logit == smallest and label <= last_tied))
            vote = max(vote_of[label], 0.0)
            vote_of[label] = -1.0
            is_behind = not inside and vote == 0.0
            if is_behind:
                score = score_behind(floor, coefficients) + (min(logit - smallest, 0.0) if peak > -np.inf else 0.0)
            else:
                log_p = logit - shift if inside else floor
                score = score_label(log_p, vote, label_frequencies[label], not inside, coefficients)
            found.label_ids[used], found.scores[used], found.is_behind[used] = label, share * score, is_behind
            used += 1
        found.offsets[row + 1] = used
        for place in range(width):
            if shortlist_BS[row, place] >= 0:
                vote_of[shortlist_BS[row, place]] = 0.0
        for entry in range(begin, end):
            vote_of[vote_ids[entry]] = 0.0


@numba.njit(nogil=True, cache=True)
def scale_of(label_ids: Any, logits: Any, peak: float, smallest: float, coefficients: Any) -> Any:
    """Of a reference with these extremes: the logarithm of the sum of its labels' exponentials, which makes log p of a
    logit, and log p of a label outside of it. Where nothing is added to the model, its logits stay what they are."""
    mass, added = 0.0, 0.0
    for coefficient in coefficients[1:]:
        added += abs(coefficient)
    if added == 0.0 and coefficients[0] == 1.0:
        return 0.0, smallest - 1.0 if peak > -np.inf else -1.0
    for place in range(label_ids.shape[0]):
        logit = np.float64(logits[place])
        if label_ids[place] >= 0 and logit > -np.inf:
            mass += math.exp(logit - peak)
    shift = peak + math.log(mass) if mass > 0.0 else 0.0
    return shift, smallest - shift - 1.0 if mass > 0.0 else -1.0


@numba.njit(nogil=True, cache=True)
def score_label(log_p: Any, vote: Any, num_instances: Any, is_outside: Any, coefficients: Any) -> Any:
    """The formula, without what the ranker has."""
    model, mixture, voted, frequency, outside, _, _ = coefficients
    score = model * log_p + frequency * math.log1p(num_instances)
    if mixture != 0.0:
        score += mixture * math.log(math.exp(log_p) + vote + 1e-300)
    if voted != 0.0:
        score += voted * math.log(vote + _NO_VOTES)
    return score + outside if is_outside else score


@numba.njit(nogil=True, cache=True)
def score_margin(margin: Any, peak: Any, coefficients: Any) -> Any:
    """The ranker's part of the formula."""
    margin_term, peak_term = _terms_of(margin, peak)
    return coefficients[5] * margin_term + coefficients[6] * peak_term


@numba.njit(nogil=True, cache=True)
def _terms_of(margin: Any, peak: Any) -> Any:
    """What the last two coefficients are multiplied by."""
    cut = min(max(np.float64(margin), -1.0), 1.0)
    return cut, math.log1p(min(np.float64(peak), 1.0) / _NO_PEAK)


@numba.njit(nogil=True, cache=True)
def _margin_terms(margins: Any, peaks: Any) -> Any:
    """`_terms_of` each of C pairs, (2, C) float64."""
    terms = np.empty((2, margins.shape[0]))
    for place in range(margins.shape[0]):
        terms[0, place], terms[1, place] = _terms_of(margins[place], peaks[place])
    return terms


@numba.njit(nogil=True, cache=True)
def score_behind(floor: Any, coefficients: Any) -> Any:
    """Below the least that a label can have that is not behind all others."""
    model, mixture, voted, frequency, outside, margin, _ = coefficients
    least = (model + mixture) * floor + voted * math.log(_NO_VOTES) + outside - margin
    return least + min(frequency, 0.0) * _MOST_FREQUENT


@numba.njit(nogil=True, cache=True)
def drop_hopeless(found: Any, k: int, span: float) -> None:
    """Leave those that may be among the k best when numbers that differ by `span` at most have been added to all."""
    best_ids, best_scores = np.empty(k, dtype=np.int64), np.empty(k)
    used, last = 0, np.int64(0)
    for row in range(found.offsets.shape[0] - 1):
        first, last = last, found.offsets[row + 1]
        least = -np.inf
        if last - first > k:
            best_ids[:], best_scores[:] = -1, -np.inf
            for place in range(first, last):
                insert_best(best_ids, best_scores, found.label_ids[place], found.scores[place])
            # A little less, for rounding.
            least = best_scores[k - 1] - span - 1e-9 * (1.0 + abs(best_scores[k - 1]))
        for place in range(first, last):
            if found.scores[place] >= least:
                found.label_ids[used], found.scores[used] = found.label_ids[place], found.scores[place]
                found.is_behind[used] = found.is_behind[place]
                used += 1
        found.offsets[row + 1] = used


@numba.njit(nogil=True, cache=True)
def _keep_best(instance: Any, label_ids: Any, scores: Any, found_BK: Any, score_BK: Any) -> None:
    for place in range(instance.shape[0]):
        row = instance[place]
        insert_best(found_BK[row], score_BK[row], label_ids[place], scores[place])


def _candidates(
    shortlist: TopK,
    votes: csr_matrix | None,
    label_frequencies: NDArray[np.integer[Any]],
    margin_of: MarginOf | None = None,
) -> _Terms:
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
        *(np.zeros((2, log_p.shape[0])) if margin_of is None else _margin_terms(*margin_of(instance, label_ids))),
    ]
    return _Terms(instance, label_ids, np.stack(terms, axis=1))


def _best(instance: NDArray[np.int64], label_ids: NDArray[np.int64], scores: _Floats, num_rows: int, k: int) -> TopK:
    """The k best candidates of each instance, ties to the smaller id."""
    result = TopK.empty(num_rows, k)
    scores_BK = np.full((num_rows, k), -np.inf)
    _keep_best(instance, label_ids, scores, result.label_ids, scores_BK)
    result.scores[:] = scores_BK
    return result


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
        scores = candidates.terms @ settings.coefficients
        top = _best(candidates.instance, candidates.label_ids, scores, labels.shape[0], max(DEFAULT_KS))
        a, b = propensity
        return settings, instance_scores(top, labels, label_frequencies, num_train, A=a, B=b)

    def fit(part: _Part, power: float) -> _Trial:
        candidates, free, temperature = part
        named = dict(zip(_NAMES, _fit(candidates, labels, weight_L**power, [*free]).tolist(), strict=True))
        return scored(candidates, Interpolation(**named, temperature=temperature, count=count))

    no_votes = _candidates(shortlist, None, label_frequencies, margin_of)
    parts: list[_Part] = [(no_votes, _ALONE, _TEMPERATURES[0])]
    if margin_of is not None:
        parts.append((no_votes, _WITH_RANKER, _TEMPERATURES[0]))
    if neighbors is not None and found is not None:
        sets = [_WITH_NEIGHBORS] if margin_of is None else [_WITH_NEIGHBORS, _EVERYTHING]
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


def _fit(candidates: _Terms, labels: csr_matrix, weight_L: _Floats, free: list[int]) -> _Floats:
    """The coefficients with the least decoupled softmax loss over the candidates; those that are not `free` stay
    the model's alone.

    The loss is convex: the mean over the positives p among the candidates, weighted by `weight_L` and by 1/|Y|, of
    log(1 + exp(S - s_p)), with S the log of the summed exponentials of the instance's negatives among the candidates,
    summed over the instances, plus `_PULL` times the squared distance from the model alone, in standard deviations.
    """
    positive = _is_positive(candidates, labels)
    start = Interpolation().coefficients
    if not positive.any() or positive.all():
        return start
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
    lower[free], upper[free] = np.array(_BOUNDS)[free].T
    found = minimize_convex(loss, start, lower, upper)
    negligible = np.abs(found) * np.where(is_constant, 1.0, spread) < _NEGLIGIBLE
    return np.where(negligible, 0.0, found)


@numba.njit(nogil=True, cache=True)
def _losses(terms: Any, weight: Any, offsets: Any, coefficients: Any, found: Any, begin: int, end: int) -> None:
    """Of each instance, into its row of `found`: the loss, its gradient and its second derivatives. The candidates of
    an instance follow one another; those with a weight are its positives."""
    size = coefficients.shape[0]
    mean, square = np.empty(size), np.empty((size, size))
    for row in range(begin, end):
        found[row] = 0.0
        first, last = offsets[row], offsets[row + 1]
        score = np.empty(last - first)
        peak = -np.inf
        for place in range(first, last):
            total = 0.0
            for term in range(size):
                total += coefficients[term] * terms[place, term]
            score[place - first] = total
            if weight[place] == 0.0:
                peak = max(peak, total)
        if peak == -np.inf:
            # Without negatives there is nothing to rank.
            continue
        mass, mean[:], square[:] = 0.0, 0.0, 0.0
        for place in range(first, last):
            if weight[place] == 0.0:
                share = math.exp(score[place - first] - peak)
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
            margin = peak + math.log(mass) - score[place - first]
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
_Part = tuple[_Terms, tuple[int, ...], float]
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
