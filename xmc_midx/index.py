"""Layer 5. The label index: queries -> the best labels. Before it: encoder and label table; after it: the predictor."""

from __future__ import annotations

import torch

from xmc_midx.topk import exact_topk
from xmc_midx.types import TopK

__all__ = ["ExactIndex"]


class ExactIndex:
    """The full scan of the label table, in chunks: the reference for every faster search.

    Parameters
    ----------
    label_table_LD, bias_L : (L, D) and (L,) float32 on one device.
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
        excluded_L = None
        if allow is not None or deny is not None:
            num_labels, device = self.bias_L.shape[0], self.bias_L.device
            excluded_L = torch.full((num_labels,), allow is not None, device=device)
            if allow is not None:
                excluded_L[allow] = False
            if deny is not None:
                excluded_L[deny] = True
        return exact_topk(query_BD, self.label_table_LD, self.bias_L, k, excluded_L=excluded_L)
