"""Layer 5. The label index: queries -> the best labels. Before it: encoder and label table; after it: the predictor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from xmc_midx.cells import LabelCells
from xmc_midx.compiled import compiled
from xmc_midx.device import multiplies_bfloat16
from xmc_midx.intrinsics import AHEAD, fetch_row
from xmc_midx.products import rough_rows
from xmc_midx.quantization import StoredTable, row_product
from xmc_midx.scan import list_rough, scan_topk
from xmc_midx.selection import insert_best
from xmc_midx.sketches import MULTIPLIES_BYTES
from xmc_midx.topk import best_of, exact_topk, rescored_topk
from xmc_midx.types import LabelIndex, TopK

__all__ = [
    "CellIndex",
    "Effort",
    "ExactIndex",
    "HalfPrecisionIndex",
    "Reach",
    "ScanIndex",
    "StoredIndex",
    "build_index",
    "excluded_of",
    "insert_logits",
    "tune_effort",
]

_MIN_LABELS = {"cpu": 4096, "cuda": 16_384}
"""Labels from which the rough scan is faster than the exact one (EXPERIMENTS.md, "Label index"; on a GPU not
measured)."""
_SLACK = 32
"""Labels beyond those asked for whose exact logits are computed."""
_TARGET_RECALL, _TARGET_K = 0.992, 5
"""Of the held-out instances' best labels, found by the index: what its effort is set to."""
_FEWEST = (1000, 100)
"""Sketches read and logits computed, at the least."""
_STEP = 1.4
"""By which the effort grows."""
_FIRST_PART, _FIRST_SLACK = 4, 0.002
"""One in so many of the queries says how the effort grows and, up to a recall less by the second, whether it has to."""
_MANY_ROWS, _SHARE = 64, 16
"""Queries, and labels for each that gets an exact logit, from which a scan of all rows in bfloat16 is faster than the
exact one (EXPERIMENTS.md, "Label index")."""
_FOR_EACH, _FOR_ALL = 1 / 32, 3.0
"""What a scan of all sketches takes for each of its queries, and for all together, in sketches that a search by cells
reads, for each label. It too has exact logits of few of the labels (EXPERIMENTS.md, "Label index")."""
_CPU = torch.device("cpu")
_SCAN_ROWS = 1 << 12
"""Rows in float32 at once, when all are scanned."""

Reach = Literal["cells", "all", "exact"]
"""Which labels a search by cells looks at: those of the cells; all, in bfloat16 where the CPU multiplies it, so that
almost surely the exact best are found; all, in float32."""
_Find = Callable[..., TopK]
"""`LabelCells.search` or `LabelCells.scan`."""


class ExactIndex:
    """The full scan of the label table, in chunks: the reference for every faster search.

    Parameters
    ----------
    label_table_LD, bias_L : (L, D) and (L,) float32, the bias on the queries' device.
    """

    def __init__(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        self.label_table_LD, self.bias_L = label_table_LD, bias_L

    @property
    def num_labels(self) -> int:
        return self.bias_L.shape[0]

    def search(
        self,
        query_BD: torch.Tensor,
        k: int,
        *,
        allow: torch.Tensor | None = None,
        deny: torch.Tensor | None = None,
    ) -> TopK:
        """The k labels with the largest logits.

        Parameters
        ----------
        query_BD : (B, D) float32.
        k : results for each query; padded with -1 where fewer labels may be returned.
        allow : label ids (A,) that may be returned; None allows all.
        deny : label ids that may not; wins over `allow`.
        """
        excluded_L = self._excluded(allow, deny)
        return exact_topk(query_BD, self.label_table_LD, self.bias_L, k, excluded_L=excluded_L)

    @property
    def source(self) -> None:
        """Nothing is missed."""
        return None

    def _excluded(self, allow: torch.Tensor | None, deny: torch.Tensor | None) -> torch.Tensor | None:
        excluded_L = excluded_of(self.num_labels, allow, deny)
        return None if excluded_L is None else excluded_L.to(self.bias_L.device)


class ScanIndex(ExactIndex):
    """The full scan in bfloat16 on a CPU, and the exact logits of the best that it finds (`xmc_midx.scan`).

    A label is missed only where rounding ranks it more than 32 places too low.

    Parameters
    ----------
    label_table_LD, bias_L : as of `ExactIndex`, on the CPU.
    """

    def __init__(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        super().__init__(label_table_LD, bias_L)
        self._table = StoredTable.of(label_table_LD.numpy())

    def search(
        self,
        query_BD: torch.Tensor,
        k: int,
        *,
        allow: torch.Tensor | None = None,
        deny: torch.Tensor | None = None,
    ) -> TopK:
        """As `ExactIndex.search`; the logits are exact, the labels almost surely. With label lists, and for few queries
        or many results, the scan is exact."""
        exact = super().search
        if allow is not None or deny is not None:
            return exact(query_BD, k, allow=allow, deny=deny)
        return _scan_rows(query_BD, self._table, self.bias_L.numpy(), k, exact)


class HalfPrecisionIndex(ExactIndex):
    """The full scan in bfloat16 on a GPU, and the exact logits of the best that it finds.

    A label is missed only where rounding ranks it more than 32 places too low.

    Parameters
    ----------
    label_table_LD, bias_L : as of `ExactIndex`, on one device.
    """

    def __init__(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        super().__init__(label_table_LD, bias_L)
        self._rough_LD = label_table_LD.bfloat16()

    def search(
        self,
        query_BD: torch.Tensor,
        k: int,
        *,
        allow: torch.Tensor | None = None,
        deny: torch.Tensor | None = None,
    ) -> TopK:
        """As `ExactIndex.search`; the logits are exact, the labels almost surely."""
        tables = self.label_table_LD, self.bias_L, self._rough_LD
        return rescored_topk(query_BD, *tables, k, slack=_SLACK, excluded_L=self._excluded(allow, deny))


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How far a search by cells goes, for up to `width / 2` results, and a scan of all sketches."""

    depth: int
    """Labels whose sketches a search reads, at least."""
    width: int
    """Labels whose exact logits it computes, at least."""
    scan_width: int
    """Labels whose exact logits a scan computes, at least."""
    recall: float
    """Of the five best labels of held-out instances that a search finds."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Effort:
        """Of what `CellIndex.as_arrays` gave; a ValueError or LookupError where it is not that."""
        numbers = [int(number) for number in arrays["effort"].tolist()]
        # Earlier runs have one width for both searches.
        depth, width, scan_width = numbers if len(numbers) == 3 else (*numbers, numbers[-1])
        if min(depth, width, scan_width) < 1:
            raise ValueError("an effort is at least one label")
        return cls(depth=depth, width=width, scan_width=scan_width, recall=float(arrays["recall"][0]))


class StoredIndex:
    """All labels of a table that stays as it is stored, in few bytes or float32, mapped or not; on the CPU. The logits
    are those of its rows.

    Parameters
    ----------
    table, bias : (L, D) and (L,).
    """

    def __init__(self, table: StoredTable, bias_L: NDArray[np.float32]) -> None:
        self.table, self.bias_L = table, bias_L

    @property
    def num_labels(self) -> int:
        return int(self.bias_L.shape[0])

    def search(
        self,
        query_BD: torch.Tensor,
        k: int,
        *,
        allow: torch.Tensor | None = None,
        deny: torch.Tensor | None = None,
    ) -> TopK:
        """As `ScanIndex.search`."""
        query_BD = query_BD.cpu()
        if allow is not None or deny is not None:
            return self._exact(query_BD, k, excluded_of(self.num_labels, allow, deny))
        return self._scan(query_BD, k)

    @property
    def source(self) -> tuple[StoredTable, NDArray[np.float32]]:
        """Where the logits of labels are that a search may have missed."""
        return self.table, self.bias_L

    def _scan(self, query_BD: torch.Tensor, k: int) -> TopK:
        """The k best of all labels, found in bfloat16 where that pays."""
        if not multiplies_bfloat16(_CPU):
            return self._exact(query_BD, k)
        return _scan_rows(query_BD, self.table, self.bias_L, k, self._exact)

    def _exact(self, query_BD: torch.Tensor, k: int, excluded_L: torch.Tensor | None = None) -> TopK:
        """The k best of all labels that are not excluded, in float32."""
        best: TopK | None = None
        for begin in range(0, self.num_labels, _SCAN_ROWS):
            rows = slice(begin, min(begin + _SCAN_ROWS, self.num_labels))
            part = exact_topk(
                query_BD,
                torch.from_numpy(self.table.rows(rows)),
                torch.from_numpy(self.bias_L[rows]),
                k + _SLACK,
                excluded_L=None if excluded_L is None else excluded_L[rows],
            )
            part = TopK(label_ids=np.where(part.label_ids < 0, -1, part.label_ids + begin), scores=part.scores)
            best = part if best is None else best_of([best, part], k + _SLACK)
        assert best is not None, "a label table has at least one row"
        # The same arithmetic as that of a search by cells, so that both rank alike, bit for bit.
        ids = np.maximum(best.label_ids, 0)
        logits = self.table.products(query_BD.contiguous().numpy(), ids) + self.bias_L[ids]
        logits[best.label_ids < 0] = -np.inf
        return best_of([TopK(label_ids=best.label_ids, scores=logits)], k)


class CellIndex(StoredIndex):
    """The labels of the cells that a query points to: sketches first, exact logits of the best (`xmc_midx.cells`).

    Parameters
    ----------
    table, bias : as of `StoredIndex`.
    cells, effort : of this table.
    reach : which labels a search looks at.
    """

    def __init__(
        self,
        table: StoredTable,
        bias_L: NDArray[np.float32],
        cells: LabelCells,
        effort: Effort,
        *,
        reach: Reach = "cells",
    ) -> None:
        super().__init__(table, bias_L)
        self.cells, self.effort, self.reach = cells, effort, reach

    def with_reach(self, reach: Reach) -> CellIndex:
        """The same index, that looks at other labels."""
        return CellIndex(self.table, self.bias_L, self.cells, self.effort, reach=reach)

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """Cells and effort: what `from_arrays` reads beside the table."""
        return self.cells.as_arrays() | {
            "effort": np.array([self.effort.depth, self.effort.width, self.effort.scan_width]),
            "recall": np.array([self.effort.recall]),
        }

    @classmethod
    def from_arrays(
        cls,
        table: StoredTable,
        bias_L: NDArray[np.float32],
        arrays: Mapping[str, NDArray[Any]],
        *,
        reach: Reach = "cells",
    ) -> CellIndex:
        """The index of `as_arrays`; a ValueError or LookupError where it is not that of this table."""
        cells = LabelCells.from_arrays(arrays, *table.shape)
        return cls(table, bias_L, cells, Effort.from_arrays(arrays), reach=reach)

    def search(
        self,
        query_BD: torch.Tensor,
        k: int,
        *,
        allow: torch.Tensor | None = None,
        deny: torch.Tensor | None = None,
    ) -> TopK:
        """As `ExactIndex.search`. With label lists, or where half of the labels would get an exact logit, all are
        scanned.

        Of many queries at once, a CPU that multiplies bytes reads the sketches of all labels: then a label may be found
        that a search of the same query alone misses.
        """
        # More results need more exact logits; not more sketches, which the best labels are found by in any case.
        width = max(self.effort.width, 2 * k)
        depth = max(self.effort.depth, width)
        if self.reach == "exact" or allow is not None or deny is not None or 2 * width > self.num_labels:
            return self._exact(query_BD, k, excluded_of(self.num_labels, allow, deny))
        if self.reach == "all":
            return self._scan(query_BD, k)
        # All sketches, where that is the faster way to the same labels, and more.
        num_queries = query_BD.shape[0]
        is_faster = depth * num_queries >= self.num_labels * (num_queries * _FOR_EACH + _FOR_ALL)
        # The width was tuned for the five best.
        scan_width = max(min(self.effort.scan_width * -(-k // _TARGET_K), width), 2 * k)
        if MULTIPLIES_BYTES and is_faster and _SHARE * scan_width <= self.num_labels:
            widths = {"width": width, "scan_width": scan_width}
            return self.cells.scan(query_BD, self.table, self.bias_L, k, depth=depth, **widths)
        return self.cells.search(query_BD, self.table, self.bias_L, k, depth=depth, width=width)


def _scan_rows(
    query_BD: torch.Tensor,
    table: StoredTable,
    bias_L: NDArray[np.float32],
    k: int,
    exact: Callable[[torch.Tensor, int], TopK],
) -> TopK:
    """The k best labels by a scan of their rough rows, or by the exact search where that does not pay."""
    num_labels, width = len(bias_L), k + _SLACK

    def rough(rows: slice) -> torch.Tensor:
        # Part by part, as they are needed: a copy of the whole table would be half of it once more.
        return rough_rows(torch.from_numpy(table.rows(rows)), torch.from_numpy(bias_L[rows]))

    if query_BD.shape[0] < _MANY_ROWS or _SHARE * width > num_labels:
        return exact(query_BD, k)
    return scan_topk(
        query_BD,
        table,
        bias_L,
        k,
        above=lambda part, wanted: list_rough(query_BD[part], rough, num_labels, wanted),
        label_ids=np.arange(num_labels, dtype=np.int32),
        width=width,
        otherwise=lambda left: exact(query_BD[left], k),
    )


@compiled
def insert_logits(query: Any, table: Any, bias: Any, ids: Any, found_K: Any, score_K: Any) -> None:
    """Give labels that a search should have found their places among the K best, unless they are there."""
    codes, scales = table
    last, end = found_K.shape[0] - 1, ids.shape[0] - 1
    for place in range(ids.shape[0]):
        fetch_row(codes, ids[min(place + AHEAD, end)])
        label = ids[place]
        logit = row_product(query, codes, scales, label) + bias[label]
        if found_K[last] < 0 or logit >= score_K[last]:
            known = False
            for other in found_K:
                known |= other == label
            if not known:
                insert_best(found_K, score_K, label, logit)


def tune_effort(table: StoredTable, bias_L: NDArray[np.float32], cells: LabelCells, query_ND: torch.Tensor) -> Effort:
    """A small effort that finds 99.2% of the five best labels of the queries (N, D), held-out ones; these are found by
    a scan of all labels. Where there is no scan of sketches, it has the width of the search by cells."""
    num_labels = bias_L.shape[0]
    least = Effort(depth=1, width=1, scan_width=1, recall=0.0)
    exact_NK = CellIndex(table, bias_L, cells, least, reach="all").search(query_ND, _TARGET_K).label_ids

    def recall(find: _Find, depth: int, width: int, every: int = 1) -> float:
        found = find(query_ND[::every], table, bias_L, _TARGET_K, depth=depth, width=width).label_ids
        exact = exact_NK[::every]
        hits = (found[:, :, None] == exact[:, None, :]) & (exact[:, None, :] >= 0)
        return float(hits.any(axis=1).sum() / max((exact >= 0).sum(), 1))

    depth, width, reached = _tune_cells(functools.partial(recall, cells.search), num_labels, len(query_ND))
    scan_width = min(_FEWEST[1], width) if MULTIPLIES_BYTES else width
    while scan_width < width:
        if recall(functools.partial(cells.scan, scan_width=scan_width), depth, width) >= _TARGET_RECALL:
            break
        scan_width = min(round(_STEP * scan_width), width)
    return Effort(depth=depth, width=width, scan_width=scan_width, recall=reached)


def _tune_cells(recall: Callable[[int, int, int], float], num_labels: int, num_queries: int) -> tuple[int, int, float]:
    """Depth, width and recall of a search by cells; `recall` is that of both, of one in so many of the queries."""
    depth, width = (min(fewest, num_labels) for fewest in _FEWEST)
    part, every = recall(depth, width, _FIRST_PART), _FIRST_PART
    while True:
        # With exact logits of half of the labels, a search scans them all.
        is_most = not num_queries or (depth == num_labels and 2 * width > num_labels)
        if part >= _TARGET_RECALL - _FIRST_SLACK or is_most:
            reached = part if every == 1 else recall(depth, width, 1)
            if reached >= _TARGET_RECALL or is_most:
                return depth, width, reached
            if part >= _TARGET_RECALL:
                # The part is no guide any more.
                every = 1
        # More sketches or more logits: whatever finds more.
        ways = {(min(round(_STEP * depth), num_labels), width), (depth, min(round(_STEP * width), num_labels))}
        part, depth, width = max((recall(*way, every), *way) for way in ways - {(depth, width)})


def excluded_of(num_labels: int, allow: torch.Tensor | None, deny: torch.Tensor | None) -> torch.Tensor | None:
    """(L,) bool: the labels that may not be returned; None where all may."""
    if allow is None and deny is None:
        return None
    excluded_L = torch.full((num_labels,), allow is not None)
    if allow is not None:
        excluded_L[allow] = False
    if deny is not None:
        excluded_L[deny] = True
    return excluded_L


def build_index(label_table_LD: torch.Tensor, bias_L: torch.Tensor, *, exact: bool = False) -> LabelIndex:
    """The fastest search for a label table on its device; with `exact` the full scan in float32."""
    device = label_table_LD.device
    if exact or not multiplies_bfloat16(device) or bias_L.shape[0] < _MIN_LABELS[device.type]:
        return ExactIndex(label_table_LD, bias_L)
    return (ScanIndex if device.type == "cpu" else HalfPrecisionIndex)(label_table_LD, bias_L)
