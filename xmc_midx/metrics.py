"""Layer 2. Metrics at k of a ranking against the true labels: P, nDCG, R, PSP, PSnDCG, and a view by label frequency.

Before it: `xmc_midx.types.TopK`, from the predictor or from any tool's file. After it: pipeline and command line.
NumPy and SciPy only: an evaluation of a predictions file starts without torch. Thresholded and macro metrics are not
here.

With `y_i` = 1 where the label at rank i (from 1) is true and 0 where it is not or rank i is a pad, `Y` the true labels
of an instance and `q_l` the inverse propensity of label l:

==========  ==================================================================================================
`P@k`       mean over the instances of `sum_{i<=k} y_i / k`
`nDCG@k`    mean of `sum_{i<=k} y_i / log2(i+1)` over `I(k) = sum_{i<=min(k,|Y|)} 1 / log2(i+1)`
`R@k`       mean of `sum_{i<=k} y_i / |Y|`
`PSP@k`     sum over the instances of `sum_{i<=k} y_i q_i`, over the same sum of the best k labels of each `Y`
`PSnDCG@k`  sum over the instances of `sum_{i<=k} y_i q_i / log2(i+1) / I(k)`, over the same sum of the best k of `Y`
==========  ==================================================================================================

Sources: METHOD.md section 7; Jain et al. 2016 (propensities); napkinXC 0.7, whose figures these equal. An instance
without labels is counted and adds 0 to every mean (napkinXC: `zero_division=0`, its default); to the two ratios of
sums it adds nothing. Where this module leaves napkinXC: a split in which no instance has a label gives PSP and PSnDCG
0 (napkinXC: 0/0, NaN); `inverse_propensity` is never below 1 (napkinXC: below 1 for N <= 2); the same label twice in
one row of predictions is an error (napkinXC counts the hit twice).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.errors import DataError, UsageError
from xmc_midx.types import DEFAULT_KS, DEFAULT_PROPENSITY, MetricReport, TopK

__all__ = [
    "BREAKDOWNS",
    "DEFINITIONS",
    "FREQUENCY_GROUPS",
    "FrequencyGroup",
    "breakdown_by_frequency",
    "evaluate_topk",
    "frequency_deciles",
    "instance_scores",
    "inverse_propensity",
    "without_ignored",
]

DEFINITIONS: Mapping[str, str] = {
    "P": "hits in the top k / k, mean over instances",
    "nDCG": "hits discounted by 1/log2(rank + 1) / the same of an ideal order of min(k, |Y|) hits, mean over instances",
    "R": "hits in the top k / number of true labels, mean over instances",
    "PSP": "sum of the hits' inverse propensities / the largest sum possible at k, a ratio of sums over instances",
    "PSnDCG": "as PSP, each hit discounted by 1/log2(rank + 1) and each instance scaled as in nDCG",
}
"""Family -> its definition in one line, in the order of a report. Instances without labels count as 0."""

FREQUENCY_GROUPS: Sequence[tuple[str, int, int | None]] = (
    ("head", 101, None),
    ("torso", 6, 100),
    ("tail", 1, 5),
    ("unseen", 0, 0),
)
"""(name, fewest, most training instances of a label), both included; None has no upper end."""

BREAKDOWNS: Mapping[str, str] = {
    "head-tail": "head labels have over 100 training instances, torso 6 to 100, tail 1 to 5, unseen none",
    "deciles": "decile 1 holds the most frequent labels, which together have a tenth of the training positives, "
    "decile 2 those with the next tenth, ...; labels of one frequency stay together; unseen labels have no positive",
}
"""Name of a breakdown by training frequency -> the definition of its groups."""

_CHUNK_ELEMENTS = 1 << 20
"""Ranks held at once: the working set stays at some tens of MB for any number of instances."""

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequencyGroup:
    """How the labels of one range of training frequency fare in the top k."""

    group: str
    """`head`, `torso`, `tail` or `unseen`; or `decile 1` to `decile 10`."""
    min_frequency: int
    """Fewest training instances of a label of the group."""
    max_frequency: int | None
    """Most training instances, included; None has no upper end."""
    num_labels: int
    """Labels of the group, in the evaluated split or not."""
    num_true: int
    """True (instance, label) pairs of the group in the evaluated split."""
    num_hits: int
    """Those among them that are in the top k of their instance."""
    share_of_true: float
    """`num_true` over that of all labels, in [0, 1]: what `share_of_hits` would be for a ranking blind to frequency."""
    share_of_hits: float
    """`num_hits` over that of all labels, in [0, 1]; 0 where nothing was hit."""
    recall: float | None
    """`num_hits / num_true`, pooled over the instances; None where the split has no label of the group."""


def evaluate_topk(
    top: TopK,
    labels: csr_matrix,
    *,
    ks: Iterable[int] = DEFAULT_KS,
    label_frequencies: NDArray[Any] | None = None,
    num_train: int | None = None,
    A: float = DEFAULT_PROPENSITY[0],
    B: float = DEFAULT_PROPENSITY[1],
) -> MetricReport:
    """All metrics of this module at each k.

    Parameters
    ----------
    top : (N, K) ranked labels. The order of the columns is the ranking; scores are not looked at, so that ties stay as
        their producer broke them. A pad (-1) is a miss at its rank, and so is a rank beyond K.
    labels : (N, L), a stored value other than 0 marks a true label. A row may be empty.
    ks : cut-offs, each >= 1, in any order.
    label_frequencies : (L,) training instances of each label; None leaves PSP and PSnDCG out.
    num_train : training instances N; needed with `label_frequencies`.
    A, B : constants of the propensity model, see `inverse_propensity`.

    Returns
    -------
    MetricReport with `P@1`, `P@3`, ..., families in the order of `DEFINITIONS`, values in [0, 1].

    Raises
    ------
    DataError : `top`, `labels` and `label_frequencies` do not fit each other, a predicted label is outside 0..L-1 or
        stands twice in a row, or there is no instance.
    UsageError : `ks` is empty or has a k below 1, `num_train` is missing, or A or B is out of its range.
    """
    cuts = checked_ks(ks)
    labels = _canonical(labels)
    _check_predictions(top.label_ids, labels)
    weight_L = None
    if label_frequencies is not None:
        if num_train is None:
            raise UsageError("Label frequencies came without the number of training instances; PSP needs both.")
        _check_frequencies(label_frequencies, labels)
        weight_L = inverse_propensity(label_frequencies, num_train, A, B)
    num_instances = labels.shape[0]
    # (family, k) sums; the two families of ratios keep their denominators in `best`.
    sums = {family: np.zeros(len(cuts)) for family in DEFINITIONS}
    best = {family: np.zeros(len(cuts)) for family in ("PSP", "PSnDCG")}
    rows_at_once = max(1, _CHUNK_ELEMENTS // int(cuts[-1]))
    for begin in range(0, num_instances, rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        _add_chunk(top.label_ids[rows], labels[rows], cuts, weight_L, sums, best)
    for family in ("P", "nDCG", "R"):
        sums[family] /= num_instances
    for family, total in best.items():
        # No label anywhere: nothing could be hit, and nothing was. A perfect ranking must not round to above 1.
        ratio = np.divide(sums[family], total, out=np.zeros_like(total), where=total > 0)
        sums[family] = np.minimum(ratio, 1.0)
    families = [family for family in DEFINITIONS if weight_L is not None or family not in best]
    return MetricReport(
        metrics={f"{f}@{k}": float(sums[f][n]) for f in families for n, k in enumerate(cuts)},
        num_instances=num_instances,
        num_without_labels=int(np.count_nonzero(np.diff(labels.indptr) == 0)),
        propensity_a=None if weight_L is None else float(A),
        propensity_b=None if weight_L is None else float(B),
    )


def without_ignored(top: TopK, labels: csr_matrix, ignored: csr_matrix | None) -> tuple[TopK, csr_matrix]:
    """Predictions and truth without the labels that are passed over; what follows in a ranking moves up.

    Some sets name such labels for each instance in a filter file: the instance itself, where instances are labels too.
    Both of what comes back may go to `evaluate_topk` and `breakdown_by_frequency`.

    Parameters
    ----------
    top, labels : as in `evaluate_topk`. To have k labels left, an instance needs k more than are passed over.
    ignored : (N, L), not 0 where a label is passed over; None passes over nothing.

    Raises
    ------
    DataError : `ignored` is not of the shape of `labels`.
    """
    if ignored is None:
        return top, labels
    if ignored.shape != labels.shape or top.label_ids.shape[0] != labels.shape[0]:
        raise DataError(f"The ignored labels are {ignored.shape}, the true ones {labels.shape}.")
    ignored, labels = _canonical(ignored), _canonical(labels)
    is_out = _hits(top.label_ids, ignored)
    # A stable sort by "is it out?" keeps the ranking of the others and moves the rest to the end.
    order = np.argsort(is_out, axis=1, kind="stable")
    ids = np.take_along_axis(np.where(is_out, -1, top.label_ids), order, axis=1)
    scores = np.take_along_axis(np.where(is_out, -np.inf, top.scores), order, axis=1).astype(np.float32)
    passed = csr_matrix((ignored.data != 0, ignored.indices, ignored.indptr), shape=ignored.shape)
    kept = csr_matrix(labels - labels.multiply(passed))
    kept.eliminate_zeros()
    return TopK(label_ids=ids, scores=scores), kept


def instance_scores(
    top: TopK,
    labels: csr_matrix,
    label_frequencies: NDArray[Any],
    num_train: int,
    *,
    ks: Iterable[int] = DEFAULT_KS,
    A: float = DEFAULT_PROPENSITY[0],
    B: float = DEFAULT_PROPENSITY[1],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each instance adds to the means of P@k and of PSP@k over `ks`; for comparing two predictions in pairs.

    Parameters
    ----------
    top, labels, label_frequencies, num_train, A, B : as in `evaluate_topk`.

    Returns
    -------
    Two (N,) float64 arrays, whose means are those of `P@k` and of `PSP@k` of `evaluate_topk` over all k.
    """
    cuts = checked_ks(ks)
    labels = _canonical(labels)
    weight_L = inverse_propensity(label_frequencies, num_train, A, B)
    hit_NK = _hits(top.label_ids, labels)
    precision_N = (_at_cuts(hit_NK.astype(np.float64), cuts) / cuts).mean(axis=1)
    gain_Nk = _at_cuts(np.where(hit_NK, weight_L[top.label_ids], 0.0), cuts)
    best_k = _at_cuts(_best_gains(labels, weight_L, int(cuts[-1])), cuts).mean(axis=0)
    propensity_scored_N = (gain_Nk / np.where(best_k > 0, best_k, 1.0)).mean(axis=1)
    return precision_N, propensity_scored_N


def inverse_propensity(
    label_frequencies: NDArray[Any],
    num_train: int,
    A: float = DEFAULT_PROPENSITY[0],
    B: float = DEFAULT_PROPENSITY[1],
) -> NDArray[np.float64]:
    """`1 + C (n_l + B)^-A` with `C = (ln N - 1) (B + 1)^A`, the propensity model of Jain et al. 2016.

    Parameters
    ----------
    label_frequencies : (L,) training instances n_l of each label; 0 for one that training never saw.
    num_train : training instances N.
    A, B : Wikipedia sets 0.5 and 0.4, Amazon sets 0.6 and 2.6, others 0.55 and 1.5; the registry says which.

    Returns
    -------
    (L,) float64, at least 1. For N <= 2 the model's C is negative, an inverse propensity below 1: it is taken as 0.

    Raises
    ------
    DataError : a frequency is negative, not a number or above N, or N is below 1.
    UsageError : A is negative, or B is not positive.
    """
    frequency_L = np.asarray(label_frequencies, dtype=np.float64).ravel()
    if num_train < 1:
        raise DataError(f"Propensities need training instances, found {num_train}.")
    # "not all good" and not "any bad": NaN, which is then the least and the largest, compares false with everything.
    if not (frequency_L.size == 0 or (frequency_L.min() >= 0 and frequency_L.max() <= num_train)):
        raise DataError(
            f"A label frequency is outside 0..{num_train}, the number of training instances.",
            hint="Are they counts of instances, each label once an instance, of this training split?",
        )
    if not (np.isfinite(A) and A >= 0 and np.isfinite(B) and B > 0):
        raise UsageError(f"Propensity constants A = {A}, B = {B}: expected A >= 0 and B > 0.")
    with np.errstate(over="ignore", invalid="ignore"):
        C = max(0.0, np.log(num_train) - 1.0) * np.power(B + 1.0, A)
    if not np.isfinite(C):
        raise UsageError(f"Propensity constants A = {A}, B = {B}: too large, (B + 1)^A is no number any more.")
    # In place: at 10^7 labels each temporary would be 80 MB.
    inverse_L: _Floats = frequency_L + B
    np.power(inverse_L, -A, out=inverse_L)
    inverse_L *= C
    inverse_L += 1.0
    return inverse_L


def breakdown_by_frequency(
    top: TopK,
    labels: csr_matrix,
    label_frequencies: NDArray[Any],
    k: int = 5,
    *,
    groups: Sequence[tuple[str, int, int | None]] = FREQUENCY_GROUPS,
) -> list[FrequencyGroup]:
    """Who is hit: share of the hits and recall@k of head, torso, tail and unseen labels.

    A label is *head* with more than 100 training instances, *torso* with 6 to 100, *tail* with 1 to 5 and *unseen* with
    none. Recall is pooled: hits of the group over true labels of the group, all instances together; it is not the mean
    over instances that `R@k` is.

    Parameters
    ----------
    top, labels, label_frequencies : as in `evaluate_topk`.
    k : ranks that count.
    groups : (name, fewest, most training instances), both included, None for no upper end.

    Raises
    ------
    DataError, UsageError : as in `evaluate_topk`.
    """
    (cut,) = checked_ks([k])
    labels = _canonical(labels)
    _check_predictions(top.label_ids, labels)
    _check_frequencies(label_frequencies, labels)
    frequency_L = np.asarray(label_frequencies).ravel()
    ids_NK = top.label_ids[:, :cut]
    hit_ids = ids_NK[_hits(ids_NK, labels)]
    return [_group(name, low, high, frequency_L, labels.indices, hit_ids) for name, low, high in groups]


def frequency_deciles(label_frequencies: NDArray[Any]) -> list[tuple[str, int, int | None]]:
    """Ranges of training frequency that each hold about a tenth of the positives, for `breakdown_by_frequency`.

    With the labels in falling order of frequency, a frequency belongs to decile `floor(10 c) + 1`, c being the share of
    all positives that precede the middle of its own. A frequency with many labels can fill several deciles: then some
    are left out. (As pyxclib's decile plots, but that labels of one frequency stay together; tenths of the labels would
    put half of them, all of one instance, into five groups of ten.)

    Parameters
    ----------
    label_frequencies : (L,) training instances of each label, >= 0.

    Returns
    -------
    (name, fewest, most training instances) of each decile that is there, most frequent first, then `unseen` with 0.
    """
    frequencies, counts = np.unique(np.asarray(label_frequencies, dtype=np.int64), return_counts=True)
    frequencies, counts = frequencies[frequencies > 0][::-1], counts[frequencies > 0][::-1]
    mass = (frequencies * counts).astype(np.float64)
    middles = np.cumsum(mass) - mass / 2
    deciles = np.floor(10 * middles / max(mass.sum(), 1.0)).astype(np.int64) + 1
    groups: list[tuple[str, int, int | None]] = []
    for decile in np.unique(deciles):
        members = frequencies[deciles == decile]
        groups.append((f"decile {decile}", int(members.min()), int(members.max())))
    return [*groups, ("unseen", 0, 0)]


def _group(
    name: str, low: int, high: int | None, frequency_L: NDArray[Any], true_ids: NDArray[Any], hit_ids: _Ints
) -> FrequencyGroup:
    member_L = (frequency_L >= low) & (frequency_L <= (np.inf if high is None else high))
    num_true = int(np.count_nonzero(member_L[true_ids]))
    num_hits = int(np.count_nonzero(member_L[hit_ids]))
    return FrequencyGroup(
        group=name,
        min_frequency=low,
        max_frequency=high,
        num_labels=int(np.count_nonzero(member_L)),
        num_true=num_true,
        num_hits=num_hits,
        share_of_true=num_true / true_ids.size if true_ids.size else 0.0,
        share_of_hits=num_hits / hit_ids.size if hit_ids.size else 0.0,
        recall=num_hits / num_true if num_true else None,
    )


def _add_chunk(
    ids_BK: _Ints,
    labels: csr_matrix,
    cuts: _Ints,
    weight_L: _Floats | None,
    sums: dict[str, _Floats],
    best: dict[str, _Floats],
) -> None:
    """Adds the sums of some instances, one entry a cut, to `sums` and `best`."""
    depth = int(cuts[-1])
    ids_BK = ids_BK[:, :depth]
    num_true_B = np.diff(labels.indptr).astype(np.int64)
    hit_BK = _hits(ids_BK, labels)
    discount_K = 1.0 / np.log2(np.arange(2, depth + 2))
    # I(k) of the module's table, at least that of one label so that empty rows divide 0 by 1.
    ideal_K = np.cumsum(discount_K)
    ideal_Bk = ideal_K[np.minimum(np.maximum(num_true_B, 1)[:, None], cuts) - 1]
    num_hits_Bk = _at_cuts(hit_BK.astype(np.float64), cuts)
    sums["P"] += num_hits_Bk.sum(axis=0) / cuts
    sums["R"] += (num_hits_Bk / np.maximum(num_true_B, 1)[:, None]).sum(axis=0)
    sums["nDCG"] += (_at_cuts(hit_BK * discount_K[: hit_BK.shape[1]], cuts) / ideal_Bk).sum(axis=0)
    if weight_L is None:
        return
    gain_BK = np.where(hit_BK, weight_L[ids_BK], 0.0)
    for total, value_BK in ((sums, gain_BK), (best, _best_gains(labels, weight_L, depth))):
        total["PSP"] += _at_cuts(value_BK, cuts).sum(axis=0)
        total["PSnDCG"] += (_at_cuts(value_BK * discount_K[: value_BK.shape[1]], cuts) / ideal_Bk).sum(axis=0)


def _hits(ids_NK: _Ints, labels: csr_matrix) -> NDArray[np.bool_]:
    """(N, K), True where a predicted label is a true one; `labels` is canonical."""
    num_rows, num_labels = labels.shape
    if labels.nnz == 0:
        return np.zeros(ids_NK.shape, dtype=np.bool_)
    # One sorted list of row * L + label serves all rows: rows ascend, and so do the labels inside a canonical row.
    first_N = np.arange(num_rows, dtype=np.int64) * num_labels
    keys = np.repeat(first_N, np.diff(labels.indptr)) + labels.indices
    wanted_NK = first_N[:, None] + ids_NK
    place_NK = np.minimum(np.searchsorted(keys, wanted_NK), keys.size - 1)
    # A pad's key belongs to the row before: it must not find that row's last label.
    hit_NK: NDArray[np.bool_] = (keys[place_NK] == wanted_NK) & (ids_NK >= 0)
    return hit_NK


def _best_gains(labels: csr_matrix, weight_L: _Floats, depth: int) -> _Floats:
    """(N, depth), the true labels' weights in falling order, 0 behind the last."""
    rows = np.repeat(np.arange(labels.shape[0]), np.diff(labels.indptr))
    weight = weight_L[labels.indices]
    order = np.lexsort((-weight, rows))
    rank = np.arange(rows.size) - np.repeat(labels.indptr[:-1], np.diff(labels.indptr))
    kept = rank < depth
    gain_NK = np.zeros((labels.shape[0], depth))
    gain_NK[rows[kept], rank[kept]] = weight[order][kept]
    return gain_NK


def _at_cuts(value_NK: _Floats, cuts: _Ints) -> _Floats:
    """(N, len(cuts)), the sum of the first k columns for each k; columns that are not there are 0."""
    sum_NK = np.zeros((value_NK.shape[0], value_NK.shape[1] + 1))
    np.cumsum(value_NK, axis=1, out=sum_NK[:, 1:])
    at_Nk: _Floats = sum_NK[:, np.minimum(cuts, value_NK.shape[1])]
    return at_Nk


def checked_ks(ks: Iterable[int]) -> _Ints:
    """The cut-offs, rising, each once; a UsageError where they are none."""
    given = list(ks) if isinstance(ks, Iterable) else None
    if not given or not all(isinstance(k, int | np.integer) and k >= 1 for k in given):
        raise UsageError(f"k = {ks if given is None else given}: expected one or more whole numbers from 1.")
    return np.unique(np.asarray(given, dtype=np.int64))


def _canonical(labels: csr_matrix) -> csr_matrix:
    """Each true label stored once, in rising order: the caller's matrix, or a copy where it is not like that."""
    if not isinstance(labels, csr_matrix):
        labels = csr_matrix(labels)
    if np.all(labels.data != 0) and labels.has_canonical_format:
        return labels
    clean = csr_matrix((labels.data != 0, labels.indices, labels.indptr), shape=labels.shape, copy=True)
    # In this order: a stored 0 beside a 1 of the same label must not erase it, and bool addition keeps True.
    clean.sum_duplicates()
    clean.eliminate_zeros()
    return clean


def _check_predictions(ids_NK: _Ints, labels: csr_matrix) -> None:
    num_instances, num_labels = labels.shape
    if num_instances == 0:
        raise DataError("There is no instance to evaluate; expected at least one.")
    if ids_NK.ndim != 2 or ids_NK.shape[0] != num_instances:
        raise DataError(
            f"Predictions for {ids_NK.shape[0]} instances, but labels of {num_instances}.",
            hint="Do the predictions belong to this file?",
        )
    outside = np.argwhere((ids_NK < -1) | (ids_NK >= num_labels))
    if outside.size:
        row, rank = outside[0]
        raise DataError(
            f"Instance {row}, rank {rank + 1}: predicted label {ids_NK[row, rank]} is outside 0..{num_labels - 1}.",
            hint="Were the predictions made for another label set, or are their ids counted from 1?",
        )
    sorted_NK = np.sort(ids_NK, axis=1)
    twice = np.argwhere((sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0))
    if twice.size:
        row, place = twice[0]
        raise DataError(f"Instance {row}: label {sorted_NK[row, place]} is predicted twice; expected each label once.")


def _check_frequencies(label_frequencies: NDArray[Any], labels: csr_matrix) -> None:
    if np.size(label_frequencies) != labels.shape[1]:
        raise DataError(
            f"Frequencies of {np.size(label_frequencies)} labels, but the labels are 0..{labels.shape[1] - 1}.",
            hint="Do the training split and the evaluated split have the same label set?",
        )
