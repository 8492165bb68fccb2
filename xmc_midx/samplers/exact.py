"""Layer 3. The softmax as three draws over a codebook's cells, exactly: what MIDX replaces by a query-free prior.

A reference of O(B L D), for tests and for reading beside `xmc_midx.samplers.midx`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from xmc_midx.codebook import Codebook

__all__ = ["ExactDecomposition", "exact_decomposition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactDecomposition:
    """The three multinomials whose product is the softmax; nats, in the label table's dtype."""

    log_first: torch.Tensor
    """(B, C) log P(k1|z); -inf for a first code that no label has."""
    log_second: torch.Tensor
    """(B, C, C) log P(k2|k1, z), along the last dimension; -inf for an empty cell."""
    log_label: torch.Tensor
    """(B, L) log P(i|cell of i, z)."""


@torch.no_grad()
def exact_decomposition(
    codebook: Codebook, query_BD: torch.Tensor, label_table_LD: torch.Tensor, bias_L: torch.Tensor
) -> ExactDecomposition:
    """Factor the softmax over the cells of a codebook (arXiv 2501.08563, section 4; METHOD.md, section 1).

    With the residual logit `r_i = z.w_i + b_i - s1[k1(i)] - s2[k2(i)]`,

        omega[k1, k2] = sum_cell exp(r_i),                 P(i|k1, k2) = exp(r_i) / omega[k1, k2],
        psi[k1] = sum_k2 omega[k1, k2] exp(s2[k2]),        P(k2|k1) = omega[k1, k2] exp(s2[k2]) / psi[k1],
                                                           P(k1) ~ psi[k1] exp(s1[k1]),

    and `P(k1) P(k2|k1) P(i|k1, k2) = softmax(z W^T + b)_i`, whatever the codebook.
    """
    dtype, codewords = label_table_LD.dtype, codebook.num_codewords
    codebook = replace(codebook, codewords1=codebook.codewords1.to(dtype), codewords2=codebook.codewords2.to(dtype))
    query_BD = query_BD.to(dtype)
    scores1_BC, scores2_BC = codebook.scores(query_BD)
    codes1_L, codes2_L, cells_L = codebook.codes1.long(), codebook.codes2.long(), codebook.cells()
    residual_BL = query_BD @ label_table_LD.T + bias_L - scores1_BC[:, codes1_L] - scores2_BC[:, codes2_L]
    log_omega_BCC = _logsumexp_by_cell(residual_BL, cells_L, codewords**2).view(-1, codewords, codewords)
    joint_BCC = log_omega_BCC + scores2_BC[:, None, :]
    log_psi_BC = torch.logsumexp(joint_BCC, 2)
    log_second_BCC = torch.where(torch.isneginf(joint_BCC), -torch.inf, joint_BCC - log_psi_BC[:, :, None])
    return ExactDecomposition(
        log_first=torch.log_softmax(log_psi_BC + scores1_BC, 1),
        log_second=log_second_BCC,
        log_label=residual_BL - log_omega_BCC.flatten(1)[:, cells_L],
    )


def _logsumexp_by_cell(values_BL: torch.Tensor, cells_L: torch.Tensor, num_cells: int) -> torch.Tensor:
    """(B, cells): log of the summed exponentials of each cell's labels; -inf for an empty cell."""
    cells_BL = cells_L.expand_as(values_BL)
    nothing = values_BL.new_full((values_BL.shape[0], num_cells), -torch.inf)
    peak = nothing.scatter_reduce(1, cells_BL, values_BL, "amax")
    total = torch.zeros_like(peak).scatter_add(1, cells_BL, torch.exp(values_BL - peak.gather(1, cells_BL)))
    return torch.where(total > 0, torch.log(total) + peak, -torch.inf)
