"""Layer 5. The label index: queries -> the best labels. Before it: encoder and label table; after it: the predictor."""

from __future__ import annotations

import torch

from xmc_midx.device import find_precision
from xmc_midx.topk import exact_topk, rescored_topk
from xmc_midx.types import LabelIndex, TopK

__all__ = ["ExactIndex", "HalfPrecisionIndex", "build_index"]

_MIN_LABELS = 16_384
"""Labels from which the rough scan is faster than the exact one (EXPERIMENTS.md, "Prediction time")."""
_SLACK = 32
"""Labels beyond those asked for whose exact logits are computed."""


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
        excluded_L = self._excluded(allow, deny)
        return exact_topk(query_BD, self.label_table_LD, self.bias_L, k, excluded_L=excluded_L)

    def _excluded(self, allow: torch.Tensor | None, deny: torch.Tensor | None) -> torch.Tensor | None:
        if allow is None and deny is None:
            return None
        excluded_L = torch.full((self.num_labels,), allow is not None, device=self.bias_L.device)
        if allow is not None:
            excluded_L[allow] = False
        if deny is not None:
            excluded_L[deny] = True
        return excluded_L


class HalfPrecisionIndex(ExactIndex):
    """The full scan in bfloat16, and the exact logits of the best that it finds.

    Where the hardware multiplies bfloat16 it takes 0.5 to 0.6 of the exact search's time at 41,218 labels. A label is
    missed only where rounding ranks it more than 32 places too low.

    Parameters
    ----------
    label_table_LD, bias_L : as of `ExactIndex`.
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


def build_index(label_table_LD: torch.Tensor, bias_L: torch.Tensor, *, exact: bool = False) -> LabelIndex:
    """The fastest search for a label table on its device; with `exact` the full scan in float32."""
    rough = find_precision("auto", label_table_LD.device) == torch.bfloat16
    if exact or not rough or bias_L.shape[0] < _MIN_LABELS:
        return ExactIndex(label_table_LD, bias_L)
    return HalfPrecisionIndex(label_table_LD, bias_L)
