"""Layer 2. Two codebooks over the label table (product or residual), and the cells that they form.

Before it: the label table; after it: the MIDX sampler and the label index. A label has two codes; labels that share
both form a cell, numbered `code1 * C + code2`, and are stored together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from xmc_midx.compiled import compiled
from xmc_midx.device import multiplies_bfloat16
from xmc_midx.products import rough_queries, rough_rows
from xmc_midx.threads import in_threads

__all__ = ["Codebook", "RowSource", "code_dtype", "fit_codebook", "kmeans"]

_ASSIGN_CHUNK = {"cpu": 4096, "cuda": 65_536}
"""Rows assigned at once: bounds the (rows, C) distance matrix, whatever L is. On a CPU it stays in the cache: half the
time of 65,536 (EXPERIMENTS.md, "Scale")."""
_POINTS_PER_CODEWORD = 1024
"""Rows that train a codeword at most, so that k-means costs the same for 10^6 labels and 10^8. A quarter of it (faiss's
own bound) left KL(P||Q) on gnd-tib at 4.3 nats instead of 3.9 (EXPERIMENTS.md, "The proposal")."""
_ROUGH_FROM = 1 << 28
"""Multiplications of an assignment from which it is computed in bfloat16, where a CPU multiplies it: a row between two
codewords may go to either (EXPERIMENTS.md, "K-means")."""
_COLUMNS = 128
"""Of rows that a thread sums at once."""
_PERMUTE = 1 << 22
"""Rows up to which a sample is taken without replacement: a permutation takes eight bytes a row, and of 10^8 more time
than the clustering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """Two codebooks and the codes of all labels."""

    quantizer: str
    """`"pq"`: codebooks over the two halves of a row; `"rq"`: over the row and over what the first leaves."""
    codewords1: torch.Tensor
    """(C, D/2) for pq (the first half may be one shorter than the second), (C, D) for rq; float32."""
    codewords2: torch.Tensor
    """(C, D - D/2) for pq, (C, D) for rq; float32."""
    codes1: torch.Tensor
    """(L,) in 0..C-1, of `code_dtype(C)`."""
    codes2: torch.Tensor
    """(L,), likewise."""

    @property
    def num_codewords(self) -> int:
        return self.codewords1.shape[0]

    @property
    def num_labels(self) -> int:
        return self.codes1.shape[0]

    def cells(self) -> torch.Tensor:
        """(L,) int64 cell of each label."""
        return self.codes1.long() * self.num_codewords + self.codes2.long()

    def scores(self, query_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inner products of the queries with both codebooks: two (B, C) matrices, whose sum over a label's codes
        approximates the label's logit without its bias."""
        if self.quantizer == "rq":
            return query_BD @ self.codewords1.T, query_BD @ self.codewords2.T
        half = self.codewords1.shape[1]
        return query_BD[:, :half] @ self.codewords1.T, query_BD[:, half:] @ self.codewords2.T

    def reconstruct(self, label_ids: torch.Tensor) -> torch.Tensor:
        """(P, D) quantised rows of the labels `label_ids` (P,)."""
        first = self.codewords1[self.codes1[label_ids].long()]
        second = self.codewords2[self.codes2[label_ids].long()]
        return first + second if self.quantizer == "rq" else torch.cat([first, second], dim=1)


def code_dtype(num_codewords: int) -> torch.dtype:
    """The smallest integers that number so many codewords and are signed."""
    return torch.int16 if num_codewords <= torch.iinfo(torch.int16).max else torch.int32


def fit_codebook(
    label_table_LD: torch.Tensor,
    *,
    quantizer: str,
    num_codewords: int,
    generator: torch.Generator,
    start: Codebook | None = None,
    num_iterations: int = 10,
    device: torch.device | None = None,
) -> Codebook:
    """Quantise a label table.

    Parameters
    ----------
    label_table_LD : (L, D) float32, D >= 2.
    quantizer : `"pq"` or `"rq"`.
    num_codewords : C in each codebook; more than L is allowed, the surplus cells stay empty.
    generator : on `device`.
    start : a codebook of an earlier table, whose codewords start the iterations (a refresh).
    num_iterations : of Lloyd's algorithm, for each codebook.
    device : where it is computed, chunk by chunk of the table; None: where the table lies.
    """
    device = device or label_table_LD.device
    if start is not None and (start.num_codewords != num_codewords or start.quantizer != quantizer):
        start = None

    def fit(rows: _Rows, words: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return kmeans(rows, num_codewords, generator=generator, start=words, num_iterations=num_iterations)

    if quantizer == "pq":
        half = label_table_LD.shape[1] // 2
        first, second = _Rows(label_table_LD[:, :half], device), _Rows(label_table_LD[:, half:], device)
        words1, codes1 = fit(first, None if start is None else start.codewords1)
        words2, codes2 = fit(second, None if start is None else start.codewords2)
    elif quantizer == "rq":
        words1, codes1 = fit(_Rows(label_table_LD, device), None if start is None else start.codewords1)
        residual = _Rows(label_table_LD, device, less=(words1, codes1))
        words2, codes2 = fit(residual, None if start is None else start.codewords2)
    else:
        raise ValueError(f"quantizer {quantizer!r}: expected 'pq' or 'rq'")
    return Codebook(quantizer=quantizer, codewords1=words1, codewords2=words2, codes1=codes1, codes2=codes2)


class RowSource(Protocol):
    """Rows that k-means asks for, a few at a time."""

    shape: torch.Size
    device: torch.device

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        """(n, D) float32 or wider."""
        ...


class _Rows:
    """Rows of a table on `device`, float32 at the least, less a codeword each: made when they are read, so that neither
    a residual nor another dtype is a second table."""

    def __init__(
        self, table_ND: torch.Tensor, device: torch.device, *, less: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        self.table_ND, self.less = table_ND, less
        self.shape, self.device = table_ND.shape, device

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        there = index.to(self.table_ND.device) if isinstance(index, torch.Tensor) else index
        rows_nD = self.table_ND[there].to(self.device, torch.promote_types(self.table_ND.dtype, torch.float32))
        if self.less is None:
            return rows_nD
        words_CD, codes_N = self.less
        return rows_nD - words_CD[codes_N[index].long()]


@torch.no_grad()
def kmeans(
    rows_ND: torch.Tensor | RowSource,
    num_codewords: int,
    *,
    generator: torch.Generator,
    start: torch.Tensor | None = None,
    num_iterations: int = 10,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm in squared Euclidean distance, on 1,024 rows a codeword at most, then one assignment of all.

    Returns
    -------
    (C, D) codewords and (N,) codes of `code_dtype(C)`. A codeword that loses all its rows restarts beside a populous
    one.
    """
    sample_ND = _sample_rows(rows_ND, _POINTS_PER_CODEWORD * num_codewords, generator)
    if rows_ND.device.type == "cpu":
        # Of rows that lie side by side, the sums take half of the time.
        sample_ND = sample_ND.contiguous()
    words_CD = _random_rows(sample_ND, num_codewords, generator) if start is None else start.clone()
    for _ in range(num_iterations):
        codes = _assign(sample_ND, words_CD)
        counts = torch.bincount(codes.long(), minlength=num_codewords)
        sums_CD = _sums(sample_ND, codes, num_codewords)
        words_CD = torch.where((counts > 0)[:, None], sums_CD / counts.clamp(min=1)[:, None], words_CD)
        _split_populous(words_CD, counts, generator)
    return words_CD, _assign(rows_ND, words_CD)


def _sample_rows(rows_ND: torch.Tensor | RowSource, count: int, generator: torch.Generator) -> torch.Tensor:
    num_rows, device = rows_ND.shape[0], rows_ND.device
    if num_rows <= count:
        return rows_ND[:]
    if num_rows <= _PERMUTE:
        return rows_ND[torch.randperm(num_rows, generator=generator, device=device)[:count]]
    return rows_ND[torch.randint(num_rows, (count,), generator=generator, device=device)]


def _random_rows(rows_ND: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(rows_ND.shape[0], generator=generator, device=rows_ND.device)
    # More codewords than rows: the rows repeat, slightly apart; the copies stay empty and harm nothing.
    picked_CD = rows_ND[order.repeat(-(-count // rows_ND.shape[0]))[:count]].clone()
    if count > rows_ND.shape[0]:
        noise = torch.randn(picked_CD.shape, generator=generator, device=rows_ND.device, dtype=picked_CD.dtype)
        picked_CD += 1e-6 * noise * picked_CD.abs().mean().clamp(min=1e-6)
    return picked_CD


def _assign(rows_ND: torch.Tensor | RowSource, words_CD: torch.Tensor) -> torch.Tensor:
    device = rows_ND.device
    codes = torch.empty(rows_ND.shape[0], dtype=code_dtype(words_CD.shape[0]), device=device)
    size = _ASSIGN_CHUNK["cpu" if device.type == "cpu" else "cuda"]
    likeness = _likeness(words_CD, rows_ND.shape[0])
    for begin in range(0, rows_ND.shape[0], size):
        chunk = slice(begin, begin + size)
        score_NC = likeness(rows_ND[chunk])
        # NumPy's is three times as fast as torch's on a CPU.
        nearest = torch.from_numpy(score_NC.numpy().argmax(1)) if device.type == "cpu" else score_NC.argmax(1)
        codes[chunk] = nearest
    return codes


def _likeness(words_CD: torch.Tensor, num_rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows (n, D) -> (n, C), the larger the nearer a codeword: half of a squared distance, negative, but for a number
    that all codewords share."""
    is_large = num_rows * words_CD.numel() >= _ROUGH_FROM
    if words_CD.device.type != "cpu" or not is_large or not multiplies_bfloat16(words_CD.device):
        half_norms_C = words_CD.square().sum(1) / 2
        return lambda rows_nD: torch.addmm(-half_norms_C, rows_nD, words_CD.T)
    # Without what all rows share, what is rounded is small.
    mean_D = words_CD.mean(0)
    centered_CD = words_CD - mean_D
    rough_CK = rough_rows(centered_CD, -centered_CD.square().sum(1) / 2)
    return lambda rows_nD: (rough_queries(rows_nD - mean_D) @ rough_CK.T)[: rows_nD.shape[0]].float()


def _sums(rows_ND: torch.Tensor, codes: torch.Tensor, num_codewords: int) -> torch.Tensor:
    """(C, D): the sum of a codeword's rows."""
    sums_CD = rows_ND.new_zeros(num_codewords, rows_ND.shape[1])
    if rows_ND.device.type != "cpu":
        return sums_CD.index_add_(0, codes.long(), rows_ND)
    arrays = rows_ND.numpy(), codes.numpy(), sums_CD.numpy()
    num_parts = -(-rows_ND.shape[1] // _COLUMNS)
    in_threads(lambda begin, end: _add_up(*arrays, begin * _COLUMNS, end * _COLUMNS), num_parts, least=2)
    return sums_CD


@compiled
def _add_up(rows_ND: Any, codes: Any, sums_CD: Any, first: int, last: int) -> None:
    """Columns first..last alone."""
    last = min(last, rows_ND.shape[1])
    for row in range(rows_ND.shape[0]):
        code = codes[row]
        for column in range(first, last):
            sums_CD[code, column] += rows_ND[row, column]


def _split_populous(words_CD: torch.Tensor, counts_C: torch.Tensor, generator: torch.Generator) -> None:
    """Move each empty codeword beside one of the most populous ones, in place; the next iteration shares its rows."""
    empty = torch.nonzero(counts_C == 0).flatten()
    num_split = min(empty.shape[0], int((counts_C > 1).sum()))
    if num_split == 0:
        return
    donors = torch.topk(counts_C, num_split).indices
    size = num_split, words_CD.shape[1]
    noise = torch.randn(size, generator=generator, device=words_CD.device, dtype=words_CD.dtype)
    scale = words_CD.abs().mean().clamp(min=1e-6)
    words_CD[empty[:num_split]] = words_CD[donors] + 1e-3 * scale * noise
