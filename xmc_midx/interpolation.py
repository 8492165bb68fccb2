"""Layer 5. The last step of a prediction: the model's shortlist, discounted by frequency, plus the labels of the
neighbours.

With the model's probabilities p over the shortlist and the neighbours' votes v (`xmc_midx.neighbors`), the score of a
label is

    log(p_i + weight * v_i),    p = softmax over the shortlist of (logit_i - discount * log(n_i + 1)).

The encoder generalises, the neighbours remember; the discount moves mass to the tail (a logit adjustment). All three
numbers are chosen on held-out training instances, and stay 0 where they do not pay. Source: ours, after kNN-LM (arXiv
1911.00172) and logit adjustment (arXiv 2007.07314); the figures are in EXPERIMENTS.md, "Neighbours".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.errors import DataError
from xmc_midx.metrics import instance_scores
from xmc_midx.neighbors import NeighborIndex
from xmc_midx.types import DEFAULT_KS, TopK

__all__ = ["SHORTLIST", "Interpolation", "fit_interpolation", "interpolate", "keep_labels"]

SHORTLIST = 100
"""Labels of the model that take part."""
_WEIGHTS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_TEMPERATURES = (0.05, 0.1)
_DISCOUNTS = (0.1, 0.2, 0.3, 0.5)
_MIN_STANDARD_ERRORS = 1.0
"""A value other than 0 has to win by this many standard errors of the paired difference: small splits choose nothing
by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolation:
    """How model and neighbours are added; the default is the model alone."""

    weight: float = 0.0
    """Of the neighbours' votes, >= 0."""
    temperature: float = 0.1
    """Of the softmax over the neighbours' cosines."""
    count: int = 50
    """Neighbours of an instance."""
    discount: float = 0.0
    """Logits lose this times log(label frequency + 1), nats."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Interpolation:
        """What `as_dict` gave; anything else is a DataError."""
        try:
            return cls(
                weight=float(values["weight"]),
                temperature=float(values["temperature"]),
                count=int(values["count"]),
                discount=float(values["discount"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"interpolation.json: {error!r}; expected what `train` wrote.") from None

    @property
    def is_identity(self) -> bool:
        return self.weight == 0.0 and self.discount == 0.0


def interpolate(
    shortlist: TopK,
    votes: csr_matrix | None,
    label_frequencies: NDArray[np.integer[Any]],
    settings: Interpolation,
    k: int,
) -> TopK:
    """Rescore a shortlist and merge the neighbours' labels into it.

    Parameters
    ----------
    shortlist : (B, S) logits of the model.
    votes : (B, L) of the neighbours; None for none.
    label_frequencies : (L,) of the training split.
    k : results.

    Returns
    -------
    TopK : (B, k); scores are log masses in nats, ties to the smaller id.
    """
    num_rows, num_labels = shortlist.label_ids.shape[0], label_frequencies.shape[0]
    found_BS = shortlist.label_ids >= 0
    logits_BS = shortlist.scores.astype(np.float64)
    logits_BS -= settings.discount * np.log1p(label_frequencies[np.maximum(shortlist.label_ids, 0)])
    logits_BS[~found_BS] = -np.inf
    peak_B1 = np.max(logits_BS, axis=1, keepdims=True, initial=-1e300)
    mass_BS = np.exp(logits_BS - peak_B1)
    mass_BS /= np.maximum(mass_BS.sum(1, keepdims=True), 1e-300)
    offsets = np.concatenate([[0], np.cumsum(found_BS.sum(1))])
    mass = csr_matrix((mass_BS[found_BS], shortlist.label_ids[found_BS], offsets), shape=(num_rows, num_labels))
    if votes is not None and settings.weight > 0:
        mass = csr_matrix(mass + settings.weight * votes)
    return _topk_of_rows(mass, k)


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


def _topk_of_rows(mass: csr_matrix, k: int) -> TopK:
    num_rows = mass.shape[0]
    rows = np.repeat(np.arange(num_rows), np.diff(mass.indptr))
    order = np.lexsort((mass.indices, -mass.data, rows))
    rank = np.arange(order.shape[0]) - mass.indptr[rows]
    kept = order[rank < k]
    result = TopK(
        label_ids=np.full((num_rows, k), -1, dtype=np.int64), scores=np.full((num_rows, k), -np.inf, dtype=np.float32)
    )
    place = (rows[kept], rank[rank < k])
    result.label_ids[place] = mass.indices[kept]
    with np.errstate(divide="ignore"):
        result.scores[place] = np.log(mass.data[kept])
    # A mass that underflowed to 0 is no result.
    result.label_ids[np.isneginf(result.scores)] = -1
    return result


def fit_interpolation(
    shortlist: TopK,
    neighbors: NeighborIndex | None,
    found: tuple[NDArray[np.int64], NDArray[np.float32]] | None,
    labels: csr_matrix,
    label_frequencies: NDArray[np.integer[Any]],
    num_train: int,
) -> Interpolation:
    """Choose weight, temperature and discount together, on held-out instances.

    What is maximised is the mean of P@k and PSP@k at k = 1, 3, 5, so that the tail counts; but a gain in PSP is never
    paid for with P: the mean of P@k must not fall, neither against the model alone, nor, for a discount, against the
    best settings without one.

    Parameters
    ----------
    shortlist : (N, S) logits of the model for the held-out instances.
    neighbors, found : the index over the other training instances, and what it found for the held-out ones; None: no
    neighbours. labels : (N, L) true labels. label_frequencies, num_train : of the training split.
    """
    count = 0 if found is None else found[0].shape[1]
    plain = Interpolation(count=count)
    votes: dict[float, csr_matrix] = {}
    if neighbors is not None and found is not None:
        votes = {temperature: neighbors.votes(*found, temperature) for temperature in _TEMPERATURES}

    def scores(settings: Interpolation) -> _Scores:
        mine = votes[settings.temperature] if settings.weight > 0 else None
        top = interpolate(shortlist, mine, label_frequencies, settings, max(DEFAULT_KS))
        return instance_scores(top, labels, label_frequencies, num_train)

    def best_of(start: tuple[Interpolation, _Scores], discounts: tuple[float, ...]) -> tuple[Interpolation, _Scores]:
        """The best of all settings with one of the discounts that wins against `start`."""
        best = start
        blends = (
            [(0.0, plain.temperature), *itertools.product(_WEIGHTS, votes)] if votes else [(0.0, plain.temperature)]
        )
        for discount, (weight, temperature) in itertools.product(discounts, blends):
            trial = Interpolation(weight=weight, temperature=temperature, count=count, discount=discount)
            trial_scores = scores(trial)
            if _mean(trial_scores) > _mean(best[1]) and _wins(trial_scores, start[1]):
                best = trial, trial_scores
        return best

    without = best_of((plain, scores(plain)), (0.0,))
    return best_of(without, _DISCOUNTS)[0]


_Scores = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Of each instance: P@k and PSP@k, each averaged over k."""


def _mean(scores: _Scores) -> float:
    return float(scores[0].mean() + scores[1].mean()) / 2


def _wins(scores: _Scores, reference: _Scores) -> bool:
    """Whether P does not fall and the mean of P and PSP is higher by more than chance: a paired comparison."""
    difference = (scores[0] - reference[0] + scores[1] - reference[1]) / 2
    error = difference.std() / np.sqrt(max(difference.shape[0], 1))
    return bool(scores[0].mean() >= reference[0].mean() and difference.mean() > _MIN_STANDARD_ERRORS * error)
