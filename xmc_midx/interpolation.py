"""Layer 5. The formula of the last step: the model's shortlist, the labels of the nearest training instances and the
linear ranker's margins, in one score.

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

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xmc_midx.compiled import compiled
from xmc_midx.errors import DataError
from xmc_midx.ranker import Margins
from xmc_midx.selection import insert_best

__all__ = [
    "BOUNDS",
    "NO_VOTES",
    "SHORTLIST",
    "Candidates",
    "Coefficients",
    "Interpolation",
    "MarginOf",
    "drop_hopeless",
    "empty_candidates",
    "margin_terms",
    "scale_of",
    "score_behind",
    "score_candidates",
    "score_label",
    "score_margin",
]

SHORTLIST = 100
"""Labels of the model that take part."""
_LEAST_TEMPERATURE = 1e-6
"""That is read from a file: a softmax still is a number."""
NO_VOTES = 1e-3
"""What a label without votes has, so that its logarithm is finite."""
_NO_PEAK = 0.03
"""What is added to a peak, so that its logarithm is finite; in margins, which are 1 where a label is sure."""
_MOST_FREQUENT = math.log1p(2**31)
"""The frequency term of a label that more instances have than there can be."""
_ADDED_LATER = ("margin", "budget", "idf_power", "peak")
_POSITIVE = (0.0, np.inf)
BOUNDS = {
    "model": _POSITIVE,
    "mixture": _POSITIVE,
    "votes": _POSITIVE,
    "frequency": (-np.inf, np.inf),
    "outside": (-np.inf, 0.0),
    "margin": _POSITIVE,
    "peak": _POSITIVE,
}
"""Of the coefficients: more mass, votes, margin or peak never lower a score, absence from the shortlist never raises
it."""
_Floats = NDArray[np.float64]
MarginOf = Callable[[NDArray[np.int64], NDArray[np.int64]], Margins]
"""Row numbers, which never fall, and label ids -> what the ranker has for them."""


class Coefficients(NamedTuple):
    """Of the formula, in its order."""

    model: float
    mixture: float
    votes: float
    frequency: float
    outside: float
    margin: float
    peak: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolation:
    """How model and neighbours are added; the default is the model alone. The first seven are the `Coefficients`."""

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
    def coefficients(self) -> Coefficients:
        """As compiled code takes them."""
        return Coefficients(*(float(getattr(self, name)) for name in Coefficients._fields))

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
                and all(low <= typed[name] <= high for name, (low, high) in BOUNDS.items())
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


class Candidates(NamedTuple):
    """Labels that may be among the results of some instances, one instance after the other, as compiled code takes
    them."""

    offsets: NDArray[np.int64]
    """(B + 1,)"""
    label_ids: NDArray[np.int64]
    scores: _Floats
    is_behind: NDArray[np.bool_]
    """Whether a label's place is behind all others, whatever its margin."""


@compiled
def empty_candidates(num_rows: Any, room: Any) -> Any:
    """With room for so many labels of all instances."""
    offsets, label_ids = np.zeros(num_rows + 1, dtype=np.int64), np.empty(room, dtype=np.int64)
    return Candidates(offsets, label_ids, np.empty(room), np.empty(room, dtype=np.bool_))


@compiled
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
        largest, smallest, last_tied = -np.inf, np.inf, -1
        for place in range(reference_BS.shape[1]):
            label, logit = reference_BS[row, place], np.float64(reference_logit_BS[row, place])
            if label >= 0 and logit > -np.inf:
                last_tied = label if logit < smallest else max(last_tied, label) if logit == smallest else last_tied
                largest, smallest = max(largest, logit), min(smallest, logit)
        shift, floor = scale_of(reference_BS[row], reference_logit_BS[row], largest, smallest, coefficients)
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
                score = score_behind(floor, coefficients) + (min(logit - smallest, 0.0) if largest > -np.inf else 0.0)
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


@compiled
def scale_of(label_ids: Any, logits: Any, largest: float, smallest: float, coefficients: Any) -> Any:
    """Of a reference with these extremes: the logarithm of the sum of its labels' exponentials, which makes log p of a
    logit, and log p of a label outside of it. Where nothing is added to the model, its logits stay what they are."""
    mass, added = 0.0, 0.0
    for coefficient in coefficients:
        added += abs(coefficient)
    if added == coefficients.model == 1.0:
        return 0.0, smallest - 1.0 if largest > -np.inf else -1.0
    for place in range(label_ids.shape[0]):
        logit = np.float64(logits[place])
        if label_ids[place] >= 0 and logit > -np.inf:
            mass += math.exp(logit - largest)
    shift = largest + math.log(mass) if mass > 0.0 else 0.0
    return shift, smallest - shift - 1.0 if mass > 0.0 else -1.0


@compiled
def score_label(log_p: Any, vote: Any, num_instances: Any, is_outside: Any, coefficients: Any) -> Any:
    """The formula, without what the ranker has."""
    score = coefficients.model * log_p + coefficients.frequency * math.log1p(num_instances)
    if coefficients.mixture != 0.0:
        score += coefficients.mixture * math.log(math.exp(log_p) + vote + 1e-300)
    if coefficients.votes != 0.0:
        score += coefficients.votes * math.log(vote + NO_VOTES)
    return score + coefficients.outside if is_outside else score


@compiled
def score_margin(margin: Any, peak: Any, coefficients: Any) -> Any:
    """The ranker's part of the formula."""
    margin_term, peak_term = _terms_of(margin, peak)
    return coefficients.margin * margin_term + coefficients.peak * peak_term


@compiled
def _terms_of(margin: Any, peak: Any) -> Any:
    """What `margin` and `peak` are multiplied by."""
    cut = min(max(np.float64(margin), -1.0), 1.0)
    return cut, math.log1p(min(np.float64(peak), 1.0) / _NO_PEAK)


@compiled
def margin_terms(margins: Any, peaks: Any) -> Any:
    """What `margin` and `peak` are multiplied by for each of C pairs, (2, C) float64."""
    terms = np.empty((2, margins.shape[0]))
    for place in range(margins.shape[0]):
        terms[0, place], terms[1, place] = _terms_of(margins[place], peaks[place])
    return terms


@compiled
def score_behind(floor: Any, coefficients: Any) -> Any:
    """Below the least that a label can have that is not behind all others."""
    least = (coefficients.model + coefficients.mixture) * floor + coefficients.votes * math.log(NO_VOTES)
    least += coefficients.outside - coefficients.margin
    return least + min(coefficients.frequency, 0.0) * _MOST_FREQUENT


@compiled
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
