"""Layer 3. Locality-sensitive hashing: the labels that share a bucket with the query, at their true probability.

SimHash (the signs of random projections) sees angles; the softmax wants inner products. So each label row gets its
bias, against a query coordinate of 1, and a coordinate that completes its length to the largest of all, against a query
coordinate of 0 (Neyshabur and Srebro 2015, arXiv 1410.5518): then the angle to the query orders the labels
as their logits do.
"""

from __future__ import annotations

import math

import torch

from xmc_midx.samplers.draws import distinct, draw_pool
from xmc_midx.types import LabelSample

__all__ = ["LshSampler"]

_ROWS_AT_ONCE = 65_536
"""Rows of the table that are hashed at once."""


class LshSampler:
    """A table t of T hashes labels and query to K bits each; a draw picks a table, then a label of the query's bucket:

        Q(i|z) = (1 - e) (1/T) sum_t [h_t(i) = h_t(z)] / n_t(z) + e / L,

    n_t(z) the labels in the query's bucket of table t; a table where that bucket is empty draws from all labels. This
    is the probability given the tables, which the draws follow; the probability over random tables, which is often
    put in its place, is another law, of which no draw is made. Drawing costs O(T K D) a query and O(1) a draw.

    Parameters
    ----------
    num_tables : T. Codes and order of all labels are kept: 8 T L bytes.
    num_bits : K; None derives it from L.
    uniform_share : e > 0, drawn from all labels, which bounds every importance weight.
    seed : of the projections, of which each refresh draws others.
    """

    def __init__(
        self, *, num_tables: int = 32, num_bits: int | None = None, uniform_share: float = 0.1, seed: int = 0
    ) -> None:
        self.num_tables = num_tables
        self.num_bits = num_bits
        self.uniform_share = uniform_share
        self.seed = seed
        self._num_refreshes = 0
        self._codes_TL: torch.Tensor | None = None

    @property
    def fitted(self) -> bool:
        return self._codes_TL is not None

    # ---------------------------------------------------------------- refresh

    @torch.no_grad()
    def refresh(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        """Draw projections, hash all labels and sort them by bucket: O(L D T K)."""
        device, (num_labels, dim) = label_table_LD.device, label_table_LD.shape
        num_bits = self.num_bits or _auto_num_bits(num_labels)
        generator = torch.Generator(device).manual_seed(self.seed + self._num_refreshes)
        projections = torch.randn(dim + 2, self.num_tables * num_bits, generator=generator, device=device)
        projections = projections.to(label_table_LD.dtype)
        squares_L = torch.linalg.vector_norm(label_table_LD, dim=1).square() + bias_L.square()
        tail_L2 = torch.stack([bias_L, (squares_L.max() - squares_L).sqrt()], 1)
        codes_TL = torch.empty(self.num_tables, num_labels, dtype=torch.int32, device=device)
        for begin in range(0, num_labels, _ROWS_AT_ONCE):
            rows = slice(begin, begin + _ROWS_AT_ONCE)
            products = torch.addmm(tail_L2[rows] @ projections[-2:], label_table_LD[rows], projections[:-2])
            codes_TL[:, rows] = self._hash(products).T.int()
        self._num_refreshes += 1
        self._use(codes_TL, projections)

    def _use(self, codes_TL: torch.Tensor, projections: torch.Tensor) -> None:
        """Take the labels' codes and the projections (D + 2, T K), and sort the labels into buckets."""
        self._codes_TL, self._projections = codes_TL, projections
        num_buckets = 1 << (projections.shape[1] // self.num_tables)
        self._order = torch.argsort(codes_TL, dim=1, stable=True).int().flatten()
        self._table_T = torch.arange(self.num_tables, device=codes_TL.device)
        self._sizes = torch.bincount((codes_TL + num_buckets * self._table_T[:, None]).flatten())
        self._sizes = torch.nn.functional.pad(self._sizes, (0, self.num_tables * num_buckets - self._sizes.shape[0]))
        self._starts = torch.cumsum(self._sizes, 0) - self._sizes
        self._num_buckets = num_buckets

    def _hash(self, products: torch.Tensor) -> torch.Tensor:
        """(N, T K) projections -> (N, T) int64 codes, one sign a bit."""
        bits = (products > 0).view(products.shape[0], self.num_tables, -1)
        return (bits << torch.arange(bits.shape[2], device=bits.device)).sum(2)

    # ------------------------------------------------------------------ draws

    @torch.no_grad()
    def sample_pool(
        self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator, certain: torch.Tensor | None = None
    ) -> LabelSample:
        """Distinct labels drawn from the mean proposal of the batch (`draw_pool`), each from a random query's table."""
        assert self._codes_TL is not None, "refresh before use"
        codes_TL, keys_BT = self._codes_TL, self._keys(query_BD)
        # Q(i) = sum over the T buckets of i: how often the batch asks for it / its size.
        keys, counts = torch.unique(keys_BT, return_counts=True)
        weight = counts.double() / keys_BT.numel()
        size = self._sizes[keys]
        filled = size > 0
        spread = self.uniform_share + (1.0 - self.uniform_share) * weight[~filled].sum()
        weight = torch.where(filled, weight / size.clamp(min=1), 0.0)

        def draw_labels(count: int) -> torch.Tensor:
            pair = torch.randint(keys_BT.numel(), (count,), generator=generator, device=keys_BT.device)
            return self._draw_in_buckets(keys_BT.flatten()[pair], generator)

        def probability(label_ids: torch.Tensor) -> torch.Tensor:
            own_TP = codes_TL[:, label_ids] + self._num_buckets * self._table_T[:, None]
            position = torch.searchsorted(keys, own_TP).clamp_(max=keys.shape[0] - 1)
            share_P = torch.where(keys[position] == own_TP, weight[position], 0.0).sum(0)
            mixed_P: torch.Tensor = (1.0 - self.uniform_share) * share_P + spread / codes_TL.shape[1]
            return mixed_P.to(self._projections.dtype)

        return draw_pool(distinct(draw_labels, probability), probability, num_draws, certain)

    @torch.no_grad()
    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        """`num_draws` i.i.d. labels for each instance."""
        keys_BT = self._keys(query_BD)
        shape = (query_BD.shape[0], num_draws)
        table_BM = torch.randint(self.num_tables, shape, generator=generator, device=keys_BT.device)
        label_ids = self._draw_in_buckets(keys_BT.gather(1, table_BM), generator)
        log_weight = self._log_proposal(keys_BT, label_ids) + math.log(num_draws)
        return LabelSample(label_ids=label_ids, log_weight=log_weight)

    @torch.no_grad()
    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """log Q(i|z), (B, P) for `label_ids` (P,), or (B, M) for `label_ids` (B, M); nats."""
        return self._log_proposal(self._keys(query_BD), label_ids)

    # --------------------------------------------------------------- internals

    def _keys(self, query_BD: torch.Tensor) -> torch.Tensor:
        """(B, T) int64: the query's bucket in each table, numbered over all tables."""
        assert self._codes_TL is not None, "refresh before use"
        # The query's last two coordinates are 1, against the bias, and 0, against the completed length.
        projections, bias_projection = self._projections[:-2], self._projections[-2]
        products = torch.addmm(bias_projection, query_BD.to(projections.dtype), projections)
        return self._hash(products) + self._num_buckets * self._table_T

    def _log_proposal(self, keys_BT: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        assert self._codes_TL is not None
        sizes_BT = self._sizes[keys_BT].double()
        rest = 1.0 - self.uniform_share
        share_BT = torch.where(sizes_BT > 0, rest / self.num_tables / sizes_BT.clamp(min=1), 0.0)
        spread_B1 = self.uniform_share + rest * (sizes_BT == 0).double().mean(1, keepdim=True)
        share_BT, total = (x.to(self._projections.dtype) for x in (share_BT, spread_B1 / self._codes_TL.shape[1]))
        for t in range(self.num_tables):
            own = self._codes_TL[t][label_ids] + t * self._num_buckets
            total = total + torch.where(own == keys_BT[:, t, None], share_BT[:, t, None], 0.0)
        return total.log()

    def _draw_in_buckets(self, keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One label of each given bucket, or of all labels: where it is empty, and in `uniform_share` of the draws."""
        assert self._codes_TL is not None
        coin, uniform = torch.rand((2, *keys.shape), dtype=torch.float64, generator=generator, device=keys.device)
        sizes = self._sizes[keys]
        anywhere = (sizes == 0) | (coin < self.uniform_share)
        size = torch.where(anywhere, self._codes_TL.shape[1], sizes)
        position = torch.minimum((uniform * size).long(), size - 1)
        inside = self._order[torch.where(anywhere, 0, self._starts[keys] + position)]
        return torch.where(anywhere, position, inside.long())

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The labels' codes at the last refresh and the projections; the buckets are rebuilt from them."""
        if self._codes_TL is None:
            return {}
        return {
            "codes": self._codes_TL,
            "projections": self._projections,
            "num_refreshes": torch.tensor(self._num_refreshes),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Restore `state_dict()`; the bias is part of the codes. Of nothing: not fitted."""
        self._codes_TL, self._num_refreshes = None, 0
        if state:
            self._num_refreshes = int(state["num_refreshes"])
            self.num_tables = state["codes"].shape[0]
            self._use(state["codes"], state["projections"])


def _auto_num_bits(num_labels: int) -> int:
    """K from L: log2(L) / 5, so that buckets are large.

    Queries and label rows of a trained model stand at angles near 90 degrees, where two bits agree hardly more often
    than by chance, and a draw costs the same from any bucket. Measured, gnd-tib after training, L = 41,218, D = 512, 32
    tables, two seeds, KL(P||Q): 8.5 with 2 bits, 8.4 with 3, 8.9 with 4, 9.5 with 6, 9.8 with 8; uniform draws 9.8.
    """
    return max(1, round(math.log2(num_labels) / 5))
