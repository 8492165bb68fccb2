"""The last step of a prediction of one model, label by label in float64, as `xmc_midx.interpolation` states it: the
reference of `xmc_midx.laststep`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.interpolation import Interpolation
from xmc_midx.ranker import Margins
from xmc_midx.types import TopK


def interpolate(
    shortlist: TopK,
    votes: csr_matrix | None,
    label_frequencies: np.ndarray,
    settings: Interpolation,
    k: int,
    *,
    margin_of: Callable[[np.ndarray, np.ndarray], Margins] | None = None,
    reference: TopK | None = None,
) -> TopK:
    """The k best of the labels of a shortlist and of those that neighbours vote for; parameters as of `LastStep.rank`,
    with the votes (B, L) for the neighbours and the ranker's answers for the ranker."""
    top, reference, s = TopK.empty(len(shortlist.label_ids), k), reference or shortlist, settings
    alone = s.is_identity and s.outside == 0.0 and s.model == 1.0
    for row in range(len(top.label_ids)):
        known = {
            int(label): float(logit)
            for label, logit in zip(reference.label_ids[row], reference.scores[row], strict=True)
            if label >= 0 and logit > -np.inf
        }
        smallest = min(known.values(), default=np.inf)
        last_tied = max((label for label, logit in known.items() if logit == smallest), default=-1)
        shift = 0.0 if alone or not known else float(np.logaddexp.reduce([*known.values()]))
        floor = smallest - shift - 1.0 if known else -1.0
        vote_of = {}
        if votes is not None and s.needs_neighbors:
            mine = slice(votes.indptr[row], votes.indptr[row + 1])
            vote_of = dict(zip(votes.indices[mine].tolist(), votes.data[mine].tolist(), strict=True))
        listed = zip(shortlist.label_ids[row].tolist(), shortlist.scores[row].tolist(), strict=True)
        logit_of = {label: logit for label, logit in listed if label >= 0}
        found = []
        for label in sorted({*logit_of, *vote_of}):
            logit, vote, count = logit_of.get(label, 0.0), vote_of.get(label, 0.0), label_frequencies[label]
            inside = label in logit_of and (logit > smallest or (logit == smallest and label <= last_tied))
            if not inside and vote == 0.0:
                least = (s.model + s.mixture) * floor + s.votes * math.log(1e-3) + s.outside - s.margin
                below = min(logit - smallest, 0.0) if known else 0.0
                found.append((least + min(s.frequency, 0.0) * math.log1p(2**31) + below, label))
                continue
            log_p = logit - shift if inside else floor
            score = s.model * log_p + s.frequency * math.log(count + 1) + s.votes * math.log(vote + 1e-3)
            score += s.mixture * math.log(math.exp(log_p) + vote + 1e-300) + s.outside * (not inside)
            if s.needs_ranker:
                assert margin_of is not None
                (margin,), (peak,) = margin_of(np.array([row]), np.array([label]))
                score += s.margin * min(max(margin, -1.0), 1.0) + s.peak * math.log(1.0 + min(peak, 1.0) / 0.03)
            found.append((score, label))
        found.sort(key=lambda one: (-one[0], one[1]))
        for place, (score, label) in enumerate(found[:k]):
            top.label_ids[row, place], top.scores[row, place] = label, score
    return top
