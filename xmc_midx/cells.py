"""Layer 2. Labels in cells, each label with a short sketch: which labels are worth an exact logit.

A sketch holds K int8 numbers in place of a row's D. Its directions are those that explain most of the logits' variance
over the queries that the model meets: with the queries' mean m and covariance M, the singular vectors of
M^(1/2) (W - mean row)^T; a label's mean logit w . m + b is kept beside it as it is. Labels with similar sketches share
a cell. For a query the cells are visited in falling order of

    mean score of the cell's labels + 3 standard deviations of them over the mean query,

until they hold `depth` labels; the `width` best of these by their sketches get their exact logits. Source: the order of
cells is the multi-index's (Babenko and Lempitsky 2012), the rest is ours; the figures are in EXPERIMENTS.md, "Label
index".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xmc_midx.codebook import kmeans
from xmc_midx.compiled import compiled
from xmc_midx.intrinsics import fetch
from xmc_midx.quantization import StoredTable
from xmc_midx.scan import scan_topk, write_best_logits
from xmc_midx.selection import keep_best, least_of_best
from xmc_midx.sketches import MAX_CODE, SIZE, list_above, products, round_query
from xmc_midx.threads import in_threads, scratch
from xmc_midx.types import TopK

__all__ = ["LabelCells", "fit_cells"]

_CELLS = 20.0
"""Cells, in roots of the number of labels."""
_DEVIATIONS = 3.0
_ITERATIONS = 8
_CHUNK, _FEW = 1024, 8
"""Queries at once, and from which on torch projects them, not compiled code (EXPERIMENTS.md, "Latency")."""
_CHUNK_ROWS = 1 << 12
_CELLS_AHEAD = 2
"""Cells whose sketches are asked for while one's are read."""

_Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelCells:
    """The cells of a label table. Labels stand in the order of their cells; position p has label `label_ids[p]`."""

    projection: _Floats
    """(D, K): query -> its side of a sketch's product."""
    shift: _Floats
    """(K,): what is added to the projected query."""
    cell_means: NDArray[np.int8]
    """(C, K): the mean sketch of a cell, rounded as sketches are."""
    cell_bias: _Floats
    """(C,): the mean `base` of a cell and its deviations."""
    offsets: NDArray[np.int64]
    """(C+1,): cell c holds the positions `offsets[c]:offsets[c+1]`."""
    label_ids: NDArray[np.int32]
    """(L,)."""
    sketches: NDArray[np.int8]
    """(L, K)."""
    base: _Floats
    """(L,): a label's mean logit."""

    @property
    def num_labels(self) -> int:
        return int(self.label_ids.shape[0])

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` reads."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], num_labels: int, dim: int) -> LabelCells:
        """The cells of `as_arrays`; a ValueError or LookupError where it is not those of a (num_labels, dim) table."""
        cells = cls(**{field.name: arrays[field.name] for field in fields(cls)})
        if cells.cell_means.dtype == np.float32:
            # Earlier runs keep the means as they are.
            cells = replace(cells, cell_means=np.rint(cells.cell_means).astype(np.int8))
        count, size = cells.cell_means.shape
        expected = {
            "projection": ((dim, size), "float32"),
            "shift": ((size,), "float32"),
            "cell_means": ((count, size), "int8"),
            "cell_bias": ((count,), "float32"),
            "offsets": ((count + 1,), "int64"),
            "label_ids": ((num_labels,), "int32"),
            "sketches": ((num_labels, size), "int8"),
            "base": ((num_labels,), "float32"),
        }
        found = {name: (array.shape, array.dtype.name) for name, array in cells.as_arrays().items()}
        # Compiled code follows offsets and ids without looking: the file must not lead it out of bounds.
        if (
            found != expected
            or cells.offsets[0] != 0
            or cells.offsets[-1] != num_labels
            or bool((np.diff(cells.offsets) < 0).any())
            or size != SIZE
            or not np.array_equal(np.sort(cells.label_ids), np.arange(num_labels))
        ):
            raise ValueError("cells, sketches and labels do not fit together")
        return cells

    def search(
        self, query_BD: torch.Tensor, table: StoredTable, bias: _Floats, k: int, *, depth: int, width: int
    ) -> TopK:
        """The k best labels among those that cells and sketches point to, with their exact logits.

        Parameters
        ----------
        query_BD : (B, D) float32.
        table, bias : (L, D) and (L,), the labels' rows and biases.
        k : results, at most `width`.
        depth : labels whose sketches are read, at least.
        width : labels that get an exact logit, at least.
        """
        found = TopK.empty(query_BD.shape[0], k)
        cells = (self.cell_means, self.cell_bias, self.offsets, self.label_ids, self.sketches, self.base)
        queries = (query_BD.contiguous().numpy(), self._short(query_BD).numpy())

        def run(first: int, last: int) -> None:
            workspace = scratch(self.num_labels, np.float32), scratch(self.num_labels, np.int32)
            arrays = (queries, cells, table.arrays, bias, workspace)
            _search(*arrays, depth, width, first, last, found.label_ids, found.scores)

        in_threads(run, query_BD.shape[0])
        return found

    def scan(
        self,
        query_BD: torch.Tensor,
        table: StoredTable,
        bias: _Floats,
        k: int,
        *,
        depth: int,
        width: int,
        scan_width: int,
    ) -> TopK:
        """As `search`, but the sketches of all labels are read, once for many queries, where `MULTIPLIES_BYTES`.

        Parameters
        ----------
        depth, width : of the search of a query to which that does not answer.
        scan_width : labels that get an exact logit, at least; `k` or more.
        """
        short_BK = self._short(query_BD).numpy()
        return scan_topk(
            query_BD,
            table,
            bias,
            k,
            above=lambda part, wanted: list_above(short_BK[part], (self.sketches, self.base), wanted),
            label_ids=self.label_ids,
            width=scan_width,
            otherwise=lambda left: self.search(query_BD[left], table, bias, k, depth=depth, width=width),
        )

    def _short(self, query_BD: torch.Tensor) -> torch.Tensor:
        """(B, K): the queries' side of the sketches' products."""
        if query_BD.shape[0] < _FEW:
            # A library's product of a single row wakes its threads, which takes longer than the product.
            short_BK = np.empty((query_BD.shape[0], SIZE), dtype=np.float32)
            _project(query_BD.contiguous().numpy(), self.projection, self.shift, short_BK)
            return torch.from_numpy(short_BK)
        return torch.addmm(torch.from_numpy(self.shift), query_BD, torch.from_numpy(self.projection))


def fit_cells(table: StoredTable, bias: _Floats, query_ND: torch.Tensor, *, seed: int = 0) -> LabelCells:
    """Build the cells of a label table.

    Parameters
    ----------
    table, bias : (L, D) and (L,).
    query_ND : (N, D) float32, queries as the model will meet them, some thousands.
    """
    mean_D, projection_DK, unprojection_DK = _directions(table, query_ND)
    # Half of a direction's weight on either side: then both round it alike.
    weight_K, largest_K = _weights(table, unprojection_DK)
    unit = (largest_K / weight_K).amax().clamp(min=1e-20) / MAX_CODE
    # A label keeps its sketch in bytes from the beginning: in float32, all of them may be larger than the table.
    points = _Points(table.shape[0], weight_K * unit)
    for begin, rows_BD in _chunks(table):
        part = slice(begin, begin + len(rows_BD))
        points.codes_LK[part] = (rows_BD @ (unprojection_DK / points.scale_K)).round_()
        # What a sketch leaves out of the mean row is the same for all labels.
        points.base_L[part] = rows_BD @ mean_D + torch.from_numpy(bias[part])
    cell_L = _cluster(points, torch.Generator().manual_seed(seed))
    projection_DK = projection_DK * (weight_K * unit)
    square_K = torch.zeros(len(weight_K))
    for query_BD in torch.split(query_ND, _CHUNK):
        square_K += ((query_BD - mean_D) @ projection_DK).square_().sum(dim=0)
    order = torch.argsort(cell_L, stable=True)
    count_C = torch.bincount(cell_L)
    sums_CK = torch.zeros(len(count_C), SIZE + 1)
    for part in points.parts():
        sums_CK.index_add_(0, cell_L[part], points.unscaled(part))
    mean_CK = sums_CK / count_C[:, None]
    variance_C = torch.zeros(len(count_C))
    share_K = torch.cat([square_K / max(len(query_ND), 1), torch.ones(1)])
    for part in points.parts():
        cell_B = cell_L[part]
        variance_C.index_add_(0, cell_B, (points.unscaled(part) - mean_CK[cell_B]).square_() @ share_K)
    return LabelCells(
        projection=projection_DK.numpy(),
        shift=-(mean_D @ projection_DK).numpy(),
        cell_means=mean_CK[:, :-1].round().to(torch.int8).numpy(),
        cell_bias=(mean_CK[:, -1] + _DEVIATIONS * (variance_C / count_C).sqrt()).numpy(),
        offsets=np.concatenate([[0], np.cumsum(count_C.numpy())]),
        label_ids=order.int().numpy(),
        sketches=points.codes_LK[order].numpy(),
        base=points.base_L[order].numpy(),
    )


class _Points:
    """The labels as points: sketches in bytes, each number times its scale, and `base` as the last coordinate."""

    def __init__(self, num_labels: int, scale_K: torch.Tensor) -> None:
        self.codes_LK = torch.empty(num_labels, SIZE, dtype=torch.int8)
        self.base_L = torch.empty(num_labels)
        self.scale_K = scale_K
        self.shape, self.device = torch.Size((num_labels, SIZE + 1)), scale_K.device

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        return torch.cat([self.codes_LK[index] * self.scale_K, self.base_L[index, None]], dim=1)

    def unscaled(self, part: slice) -> torch.Tensor:
        return torch.cat([self.codes_LK[part].float(), self.base_L[part, None]], dim=1)

    def parts(self) -> Iterator[slice]:
        return (slice(begin, begin + _CHUNK_ROWS) for begin in range(0, self.shape[0], _CHUNK_ROWS))


def _weights(table: StoredTable, unprojection_DK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,) the root of the standard deviation of each number of the sketches, and its largest size."""
    sum_K, square_K = (torch.zeros(SIZE, dtype=torch.float64) for _ in range(2))
    largest_K = torch.zeros(SIZE)
    for _, rows_BD in _chunks(table):
        sketch_BK = rows_BD @ unprojection_DK
        sum_K += sketch_BK.sum(dim=0)
        square_K += sketch_BK.square().sum(dim=0)
        largest_K = torch.maximum(largest_K, sketch_BK.abs().amax(dim=0))
    mean_K = sum_K / table.shape[0]
    variance_K = (square_K / table.shape[0] - mean_K.square()).clamp(min=0.0)
    return variance_K.sqrt().clamp(min=1e-12).sqrt().float(), largest_K


def _chunks(table: StoredTable) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows, a block at a time, with the number of its first: a table may be larger than memory."""
    for begin in range(0, table.shape[0], _CHUNK_ROWS):
        yield begin, torch.from_numpy(table.rows(slice(begin, begin + _CHUNK_ROWS)))


def _directions(table: StoredTable, query_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries' mean (D,) and two (D, K): (q - mean) . P and w . U approximate (q - mean) . w in K products."""
    mean_D = query_ND.mean(dim=0)
    moment_DD = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for query_BD in torch.split(query_ND, _CHUNK):
        centered_BD = (query_BD - mean_D).double()
        moment_DD.addmm_(centered_BD.T, centered_BD)
    values, vectors = torch.linalg.eigh(moment_DD / max(len(query_ND), 1))
    # Directions in which the queries do not vary still count a little: others may come.
    length_D = values.clamp(min=1e-6 * values[-1].clamp(min=1e-12)).sqrt()
    row_mean_D = torch.stack([rows_BD.sum(dim=0) for _, rows_BD in _chunks(table)]).sum(dim=0) / table.shape[0]
    gram_DD = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for _, rows_BD in _chunks(table):
        centered_BD = rows_BD - row_mean_D
        gram_DD += (centered_BD.T @ centered_BD).double()
    root = vectors * length_D
    _, singular = torch.linalg.eigh(root.T @ gram_DD @ root)
    best = singular.flip(dims=[1])[:, :SIZE]
    best = torch.nn.functional.pad(best, (0, SIZE - best.shape[1]))
    return mean_D, ((vectors / length_D) @ best).float(), (root @ best).float()


def _cluster(points: _Points, generator: torch.Generator) -> torch.Tensor:
    """(L,) cells 0..C-1 without an empty one: k-means in groups, and in each group again."""
    num_labels = points.shape[0]
    wanted = max(1.0, min(_CELLS * math.sqrt(num_labels), num_labels / 4))
    group_L = kmeans(points, max(1, round(math.sqrt(wanted))), generator=generator, num_iterations=_ITERATIONS)[
        1
    ].long()
    cell_L = torch.empty(num_labels, dtype=torch.int64)
    used = 0
    for group in range(int(group_L.max()) + 1):
        members = torch.nonzero(group_L == group).flatten()
        if not len(members):
            continue
        share = max(1, round(wanted * len(members) / num_labels))
        cell_L[members] = (
            used + kmeans(points[members], share, generator=generator, num_iterations=_ITERATIONS)[1].long()
        )
        used += share
    found: torch.Tensor = torch.unique(cell_L, return_inverse=True)[1]
    return found


@compiled(fastmath={"contract"})
def _project(query_BD: Any, projection_DK: Any, shift_K: Any, short_BK: Any) -> None:
    """`short = query projection + shift`, all float32."""
    for row in range(query_BD.shape[0]):
        short = short_BK[row]
        short[:] = shift_K
        for column in range(query_BD.shape[1]):
            for place in range(short.shape[0]):
                short[place] += query_BD[row, column] * projection_DK[column, place]


@compiled
def _search(
    queries: Any,
    cells: Any,
    table: Any,
    bias: Any,
    workspace: Any,
    depth: int,
    width: int,
    begin: int,
    end: int,
    found_BK: Any,
    score_BK: Any,
) -> None:
    query_BD, short_BK = queries
    means, cell_bias, offsets, label_ids, sketches, base = cells
    num_cells, num_labels = offsets.shape[0] - 1, label_ids.shape[0]
    score, places = workspace
    cell_score = np.empty(num_cells, dtype=np.float32)
    whole = np.empty(SIZE, dtype=np.int8)
    sizes, chosen = (offsets[1:] - offsets[:-1]).astype(np.int32), np.empty(num_cells + 1, dtype=np.int64)
    flat = sketches.reshape(-1)
    for row in range(begin, end):
        query = (whole, *round_query(short_BK[row], whole))
        products(query, (means, cell_bias), 0, num_cells, cell_score)
        least = least_of_best(cell_score, sizes, depth, num_labels)
        num_chosen = 0
        for cell in range(num_cells):
            chosen[num_chosen] = cell
            num_chosen += cell_score[cell] >= least
        count = 0
        for number in range(num_chosen):
            ahead = chosen[min(number + _CELLS_AHEAD, num_chosen - 1)]
            fetch(flat, offsets[ahead] * SIZE, offsets[ahead + 1] * SIZE)
            first, last = offsets[chosen[number]], offsets[chosen[number] + 1]
            products(query, (sketches, base), first, last, score[count:])
            for position in range(first, last):
                places[count] = position
                count += 1
        count = keep_best(places, score, count, width)
        write_best_logits(query_BD[row], table, bias, label_ids, places, score, count, found_BK[row], score_BK[row])
