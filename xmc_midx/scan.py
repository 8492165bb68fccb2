"""Layer 2. The best rows of a table by rough scores of all of them, then by their exact logits.

Looking at the scores takes longer than making them. So each query knows beforehand what it will keep, by the scores of
a sample of the rows, and the rows that come up to that are listed. Here the scores are one product in bfloat16, into
which a query brings its own as one more number: the signs of what comes out say which rows are above it, and 64 of them
become bits of a word in few instructions. What bfloat16 rounds is then the distance from that score, least where it
decides. `xmc_midx.sketches` lists rows by products of bytes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from xmc_midx.compiled import compiled
from xmc_midx.intrinsics import AHEAD, WORD, fetch_row, lowest, reaching
from xmc_midx.products import rough_queries
from xmc_midx.quantization import StoredTable, row_product
from xmc_midx.selection import keep_best, least_of_best, write_best
from xmc_midx.threads import in_threads, scratch
from xmc_midx.types import TopK

__all__ = ["Lists", "empty_lists", "list_rough", "make_room", "sample_of", "scan_topk", "write_best_logits"]

_QUERIES, _ROWS, _PLACES = 1 << 11, 1 << 12, 1 << 22
"""Queries and rows whose scores are held at once (16 MiB), at most, and places of all their lists (32 MiB)."""
_EVERY, _SAMPLE = 32, 1 << 13
"""One row in so many is in the sample, and rows of the sample, about, from which on it does not grow (its scores are
32 MiB)."""
_DEVIATIONS, _MORE = 2.0, 4
"""Rows of the sample that are kept beyond those expected, in their deviations, and beyond these."""
_LIST = 4
"""Places of a query's list, in rows wanted."""


Lists = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]
"""(B,) rows found for a query, -1 where it has to be asked otherwise; (B, C) their numbers and scores, of which those
of a query compare."""


def scan_topk(
    query_BD: torch.Tensor,
    table: StoredTable,
    bias_L: NDArray[np.float32],
    k: int,
    *,
    above: Callable[[slice, int], Lists],
    label_ids: NDArray[np.int32],
    width: int,
    otherwise: Callable[[NDArray[np.int64]], TopK],
) -> TopK:
    """The k labels with the largest logits among the `width` best by rough scores.

    Parameters
    ----------
    query_BD : (B, D) float32, for the logits.
    table, bias_L : (L, D) and (L,) float32, the labels' rows and biases.
    k : results, at most `width`.
    above : of these of the queries and `width`, the rows that score highest, as of `list_rough`.
    label_ids : (L,), the label of each of its rows.
    width : labels that get an exact logit, at least.
    otherwise : another search, for the queries of these numbers: where the sample is no guide, or too many rows score
        alike.
    """
    found = TopK.empty(query_BD.shape[0], k)
    is_known_B = np.empty(query_BD.shape[0], dtype=np.bool_)
    queries = query_BD.contiguous().numpy()
    at_once = min(_QUERIES, max(1, _PLACES // _places(width)))
    # Parts alike: the least, too, goes through all rows.
    borders = np.linspace(0, len(queries), -(-len(queries) // at_once) + 1).astype(int)
    for begin, end in itertools.pairwise(borders.tolist()):
        part = slice(begin, end)
        answers = (is_known_B[part], found.label_ids[part], found.scores[part])
        arrays = (queries[part], table.arrays, bias_L, label_ids, above(part, width), width, answers)
        in_threads(functools.partial(_answer, *arrays), len(answers[0]))
    left = np.flatnonzero(~is_known_B)
    if len(left):
        other = otherwise(left)
        found.label_ids[left], found.scores[left] = other.label_ids, other.scores
    return found


def list_rough(short_BK: torch.Tensor, rough: Callable[[slice], torch.Tensor], num_rows: int, wanted: int) -> Lists:
    """The rows that score highest for a query, about `wanted` and more rather than fewer.

    Parameters
    ----------
    short_BK : (B, K), the queries as the rough rows are multiplied with.
    rough : `rough_rows` of a slice of the rows.
    """
    num_queries = short_BK.shape[0]
    every, kept = sample_of(num_rows, wanted)
    least_B = _least(_bits(rough_queries(short_BK), rough(slice(None, None, every))), kept, num_queries)
    is_guide_B = np.isfinite(least_B)
    query_BK = rough_queries(short_BK, torch.from_numpy(np.where(is_guide_B, least_B, np.float32(0.0))))
    lists = empty_lists(num_queries, wanted)
    lists[0][~is_guide_B] = -1
    above_B = np.zeros(num_queries, dtype=np.int16)
    # One memory for all products: new pages take as long as they do.
    score_N = torch.empty(len(query_BK) * min(_ROWS, num_rows), dtype=torch.bfloat16)
    for begin in range(0, num_rows, _ROWS):
        part_RK = rough(slice(begin, min(begin + _ROWS, num_rows)))
        bits = _bits(query_BK, part_RK, score_N[: len(query_BK) * len(part_RK)])
        in_threads(functools.partial(_collect, bits, begin, above_B, lists, wanted), num_queries)
    return lists


def sample_of(num_rows: int, wanted: int) -> tuple[int, int]:
    """One row in how many is in the sample, and how many of the sample are to be above what a query keeps."""
    every = max(_EVERY, num_rows // _SAMPLE)
    expected = wanted / every
    return every, math.ceil(expected + _DEVIATIONS * math.sqrt(expected)) + _MORE


def empty_lists(num_queries: int, wanted: int) -> Lists:
    places = _places(wanted)
    ids, scores = np.empty((num_queries, places), dtype=np.int32), np.empty((num_queries, places), dtype=np.float32)
    return np.zeros(num_queries, dtype=np.int64), ids, scores


def _least(sample_BR: NDArray[np.int16], kept: int, num_queries: int) -> NDArray[np.float32]:
    """(B,): the scores that about `kept` of the sample reach, as of `_guess`."""
    least_B = np.empty(num_queries, dtype=np.float32)

    def run(first: int, last: int) -> None:
        _guess(sample_BR, scratch(sample_BR.shape[1], np.float32), kept, least_B, first, last)

    in_threads(run, num_queries)
    return least_B


def _places(wanted: int) -> int:
    """Of a query's list: what is left when it is full, half of it at most, and a word more fit in any case."""
    return _LIST * wanted + 2 * WORD


def _bits(query_BK: torch.Tensor, rough_RK: torch.Tensor, score_N: torch.Tensor | None = None) -> NDArray[np.int16]:
    """(B, R): the scores, bfloat16, as whole numbers: of those that are not negative, the larger is the larger. In the
    memory of `score_N`, B R numbers, if it is given."""
    out_BR = None if score_N is None else score_N.view(query_BK.shape[0], rough_RK.shape[0])
    found: NDArray[np.int16] = torch.mm(query_BK, rough_RK.T, out=out_BR).view(torch.int16).numpy()
    return found


@compiled
def _guess(bits_BR: Any, score_R: Any, kept: int, least_B: Any, begin: int, end: int) -> None:
    """The score that about `kept` of the sample reach; -inf where that is no guide."""
    nothing = np.empty(0, dtype=np.int32)
    as_bits = score_R.view(np.uint32)
    for row in range(begin, end):
        bits = bits_BR[row]
        for place in range(score_R.shape[0]):
            as_bits[place] = np.uint32(np.uint16(bits[place])) << np.uint32(16)
        least_B[row] = least_of_best(score_R, nothing, kept, score_R.shape[0])


@compiled
def _collect(bits_BR: Any, start: int, above_B: Any, lists: Any, wanted: int, begin: int, end: int) -> None:
    """The rows from `start` on whose scores, int16 as of `_bits`, come up to `above_B`, which rises where a list is
    full, behind those that are found."""
    count_B, ids_BC, score_BC = lists
    places = ids_BC.shape[1]
    num_rows = bits_BR.shape[1]
    for row in range(begin, end):
        bits, ids, scores = bits_BR[row], ids_BC[row], score_BC[row]
        count, above = count_B[row], above_B[row]
        first = 0
        while first < num_rows and count >= 0:
            kept = reaching(bits, first, above) if first + WORD <= num_rows else _tail(bits, first, above)
            while kept:
                place = first + np.int64(lowest(kept))
                ids[count], scores[count] = start + place, bits[place]
                count += 1
                kept &= kept - np.uint64(1)
            if count > places - WORD:
                count, least = make_room(ids, scores, count, wanted)
                above = np.int16(least)
            first += WORD
        count_B[row], above_B[row] = count, above


@compiled
def make_room(ids: Any, scores: Any, count: int, wanted: int) -> Any:
    """Of a list that is full, the best to the front: how many, -1 where too many score alike, and the least score."""
    count = keep_best(ids, scores, count, wanted)
    least = scores[:count].min()
    return (count if 2 * count <= ids.shape[0] else -1), least


@numba.njit(nogil=True, inline="always")
def _tail(bits: Any, first: Any, above: Any) -> Any:
    """As `reaching`, of what is left of a row."""
    kept = np.uint64(0)
    for place in range(first, bits.shape[0]):
        kept |= np.uint64(bits[place] >= above) << np.uint64(place - first)
    return kept


@compiled
def _answer(
    query_BD: Any,
    table: Any,
    bias: Any,
    label_ids: Any,
    lists: Any,
    width: int,
    answers: Any,
    begin: int,
    end: int,
) -> None:
    count_B, ids_BC, score_BC = lists
    is_known_B, found_BK, score_BK = answers
    for row in range(begin, end):
        is_known_B[row] = count_B[row] >= width
        if is_known_B[row]:
            ids, scores = ids_BC[row], score_BC[row]
            count = keep_best(ids, scores, count_B[row], width)
            write_best_logits(query_BD[row], table, bias, label_ids, ids, scores, count, found_BK[row], score_BK[row])


@compiled
def write_best_logits(
    query: Any, table: Any, bias: Any, label_ids: Any, places: Any, score: Any, count: int, found_K: Any, score_K: Any
) -> None:
    """Of the labels of the first `count` places, the K with the largest logits into `found_K`, these into `score_K`.
    What is in `places` and `score` is lost."""
    codes, scales = table
    for place in range(count):
        places[place] = label_ids[places[place]]
    for place in range(count):
        fetch_row(codes, places[min(place + AHEAD, count - 1)])
        score[place] = row_product(query, codes, scales, places[place]) + bias[places[place]]
    write_best(places, score, count, found_K, score_K)
