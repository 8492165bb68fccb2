"""Layer 2. Exact top-k of a score matrix that is never whole: chunks, merged by one tie rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from xmc_midx.products import linear
from xmc_midx.types import TopK

__all__ = ["best_of", "concatenate_topk", "exact_topk", "merge_topk", "rescored_topk"]

_CHUNK_ELEMENTS = 1 << 24
"""Scores held at once (64 MiB in float32)."""
_LABEL_CHUNK = 1 << 17
_MOVED_ROWS = 1 << 14
"""Queries at once, at most, where the table lies on another device."""


@torch.no_grad()
def exact_topk(
    query_ND: torch.Tensor,
    label_table_LD: torch.Tensor,
    bias_L: torch.Tensor | None,
    k: int,
    *,
    excluded_L: torch.Tensor | None = None,
) -> TopK:
    """The k labels with the largest `query . row + bias`: falling scores, ties to the smaller id.

    Parameters
    ----------
    query_ND, label_table_LD : (N, D) and (L, D) float32; a table of another dtype or device is moved by chunks.
    bias_L : (L,) float32 on the queries' device, or None for none.
    k : results; a row that has fewer labels to choose from is padded with -1 and -inf.
    excluded_L : (L,) bool, True for a label that must not be returned.
    """
    num_labels = label_table_LD.shape[0]
    label_chunk = min(num_labels, _LABEL_CHUNK)
    if label_table_LD.device != query_ND.device:
        # Each chunk of rows moves the table once: few chunks of many rows.
        label_chunk = min(label_chunk, max(1, _CHUNK_ELEMENTS // max(1, min(query_ND.shape[0], _MOVED_ROWS))))
    row_chunk = max(1, _CHUNK_ELEMENTS // max(1, label_chunk))
    parts = []
    for begin in range(0, query_ND.shape[0], row_chunk):
        chunk_BD = query_ND[begin : begin + row_chunk]
        best = None
        for first in range(0, num_labels, label_chunk):
            labels = slice(first, first + label_chunk)
            scores_BL = linear(
                chunk_BD, label_table_LD[labels].to(chunk_BD), None if bias_L is None else bias_L[labels]
            )
            if excluded_L is not None:
                scores_BL[:, excluded_L[first : first + label_chunk]] = -torch.inf
            found = _topk_ties_to_smaller_id(scores_BL, min(k, scores_BL.shape[1]), first)
            best = found if best is None else merge_topk(best, found, k)
        assert best is not None, "a label table has at least one row"
        parts.append(best)
    if not parts:
        return TopK.empty(0, k)
    ids_NK = torch.cat([ids for ids, _ in parts]).cpu().numpy()
    scores_NK = torch.cat([scores for _, scores in parts]).cpu().numpy()
    result = TopK.empty(ids_NK.shape[0], k)
    result.label_ids[:, : ids_NK.shape[1]] = np.where(np.isneginf(scores_NK), -1, ids_NK)
    result.scores[:, : ids_NK.shape[1]] = scores_NK
    return result


@torch.no_grad()
def rescored_topk(
    query_ND: torch.Tensor,
    label_table_LD: torch.Tensor,
    bias_L: torch.Tensor,
    rough_table_LD: torch.Tensor,
    k: int,
    *,
    slack: int,
    excluded_L: torch.Tensor | None = None,
) -> TopK:
    """As `exact_topk`, but the labels are found by a table of less precision; their logits are those of the table.

    Parameters
    ----------
    rough_table_LD : the table in the dtype of the product.
    slack : labels beyond k whose logits are computed: those that the rough product may have ranked too low.
    """
    num_labels = label_table_LD.shape[0]
    wide = min(k + slack, num_labels)
    result = TopK.empty(query_ND.shape[0], k)
    chunk = max(1, min(_CHUNK_ELEMENTS // num_labels, _CHUNK_ELEMENTS // (wide * query_ND.shape[1])))
    for begin in range(0, query_ND.shape[0], chunk):
        query_BD = query_ND[begin : begin + chunk]
        rough_BL = (query_BD.to(rough_table_LD.dtype) @ rough_table_LD.T).float().add_(bias_L)
        if excluded_L is not None:
            rough_BL[:, excluded_L] = -torch.inf
        rough_BW, ids_BW = torch.topk(rough_BL, wide, dim=1, sorted=False)
        logits_BW = torch.bmm(label_table_LD[ids_BW], query_BD[:, :, None])[:, :, 0].add_(bias_L[ids_BW])
        logits_BW.masked_fill_(torch.isneginf(rough_BW), -torch.inf)
        ids, scores = (part.cpu().numpy() for part in _sorted(ids_BW, logits_BW, min(k, wide)))
        result.label_ids[begin : begin + chunk, : ids.shape[1]] = np.where(np.isneginf(scores), -1, ids)
        result.scores[begin : begin + chunk, : ids.shape[1]] = scores
    return result


def merge_topk(
    left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of two (ids, scores) pairs over disjoint labels, each (B, *)."""
    ids = torch.cat([left[0], right[0]], dim=1)
    scores = torch.cat([left[1], right[1]], dim=1)
    return _sorted(ids, scores, min(k, ids.shape[1]))


def best_of(parts: Sequence[TopK], k: int) -> TopK:
    """The best k of several results for the same instances, over disjoint labels."""
    ids = np.concatenate([part.label_ids for part in parts], axis=1)
    scores = np.concatenate([part.scores for part in parts], axis=1)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    result = TopK.empty(len(ids), k)
    result.label_ids[:, : order.shape[1]] = np.take_along_axis(ids, order, axis=1)
    result.scores[:, : order.shape[1]] = np.take_along_axis(scores, order, axis=1)
    return result


def concatenate_topk(parts: Sequence[TopK]) -> TopK:
    """The instances of several results, one after the other; at least one part."""
    if len(parts) == 1:
        return parts[0]
    return TopK(
        label_ids=np.concatenate([part.label_ids for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
    )


def _topk_ties_to_smaller_id(scores_BL: torch.Tensor, k: int, first_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    # torch.topk breaks ties arbitrarily. One score more than asked for shows where a tie crosses the border (rare in
    # float32): those rows are sorted whole.
    wide = min(k + 1, scores_BL.shape[1])
    scores_BK, ids_BK = torch.topk(scores_BL, wide, dim=1)
    if wide > k:
        crossing = torch.nonzero(scores_BK[:, k] == scores_BK[:, k - 1]).flatten()
        if crossing.shape[0]:
            order = torch.argsort(scores_BL[crossing], dim=1, descending=True, stable=True)[:, :wide]
            ids_BK[crossing] = order
            scores_BK[crossing] = scores_BL[crossing].gather(1, order)
    ids_BK, scores_BK = _sorted(ids_BK, scores_BK, wide)
    return ids_BK[:, :k] + first_id, scores_BK[:, :k]


def _sorted(ids: torch.Tensor, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    by_id = torch.argsort(ids, dim=1)
    ids, scores = ids.gather(1, by_id), scores.gather(1, by_id)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, order), scores.gather(1, order)
