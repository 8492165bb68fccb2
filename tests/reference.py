"""What the last step does, a model's ranking in plain pieces: the reference of `xmc_midx.laststep`."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.interpolation import Interpolation, MarginOf, empty_candidates, margin_terms, score_candidates
from xmc_midx.types import TopK


def interpolate(
    shortlist: TopK,
    votes: csr_matrix | None,
    label_frequencies: np.ndarray,
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
    found = empty_candidates(num_rows, num_rows * width + votes.nnz)
    score_candidates(
        (shortlist.label_ids, shortlist.scores),
        (reference.label_ids, reference.scores),
        (votes.indptr, votes.indices, votes.data),
        label_frequencies,
        settings.coefficients,
        1.0,
        np.zeros(label_frequencies.shape[0]),
        found,
    )
    used = found.offsets[-1]
    instance = np.repeat(np.arange(num_rows), np.diff(found.offsets))
    label_ids, scores = found.label_ids[:used], found.scores[:used]
    if settings.needs_ranker:
        assert margin_of is not None, "a margin comes with its ranker"
        asked = np.flatnonzero(~found.is_behind[:used])
        margin_term, peak_term = margin_terms(*margin_of(instance[asked], label_ids[asked]))
        scores[asked] += settings.margin * margin_term + settings.peak * peak_term
    top = TopK.empty(num_rows, k)
    for row in range(num_rows):
        mine = instance == row
        order = np.lexsort((label_ids[mine], -scores[mine]))[:k]
        top.label_ids[row, : len(order)], top.scores[row, : len(order)] = label_ids[mine][order], scores[mine][order]
    return top
