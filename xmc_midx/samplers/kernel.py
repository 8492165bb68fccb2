"""Layer 3. Proposals whose density is a kernel of query and label row: quadratic (dense) and random features.

The quadratic kernel is evaluated for every label: the tree of its paper costs O(D^2 log L) a draw, for D >= 256 more
than the product with a label row for each of the batch's draws, and the dense evaluation is the same law. Random
features make the exponential kernel a mixture of R query-free laws, so that a draw costs O(log L).
"""

from __future__ import annotations

import math

import torch

from xmc_midx.samplers.dense import DenseSampler
from xmc_midx.samplers.draws import distinct, draw, draw_pool
from xmc_midx.types import LabelSample

__all__ = ["QuadraticKernelSampler", "RandomFeatureSampler"]

_SCORE_RANGE = 30.0
"""Nats below its best that a log weight can lie: keeps every label reachable in float32."""
_BLOCK = 16
"""Labels whose feature mass is summed up in advance: a draw searches the blocks, then inside one."""
_CHUNK_ELEMENTS = 1 << 20
"""Elements of the largest temporary of a per-instance draw; what fits a cache is drawn three times as fast."""


class QuadraticKernelSampler(DenseSampler):
    """`Q(i|z) ~ alpha (z.w_i + b_i)^2 + 1` (Blanc and Rendle 2018, arXiv 1712.00527).

    The kernel is even: a label of a large negative logit is as likely as one of a large positive logit. The paper
    trains an absolute softmax to match; here it is the proposal alone, for the usual softmax.

    Parameters
    ----------
    alpha : weight of the square; the paper's 100.
    """

    def __init__(self, *, alpha: float = 100.0) -> None:
        super().__init__()
        self.alpha = alpha

    def _log_law(self, logits_BL: torch.Tensor) -> torch.Tensor:
        weights_BL = logits_BL.square_().mul_(self.alpha).add_(1.0)
        return weights_BL.div_(weights_BL.sum(1, keepdim=True)).log_()


class RandomFeatureSampler:
    """The exponential kernel by positive random features.

    With x the scaled query, y_i the scaled row of label i and omega_r ~ N(0, I), `phi_r(x) = exp(omega_r.x - |x|^2/2)`
    has `E[phi_r(x) phi_r(y)] = exp(x.y)` (Choromanski et al. 2021, arXiv 2009.14794, lemma 1), and

        Q(i|z) ~ exp(b_i) sum_r phi_r(x) phi_r(y_i)
               = sum_r g_r(z) p_ri,    g_r ~ phi_r(x) Phi_r,    p_ri = exp(b_i) phi_r(y_i) / Phi_r,
        Phi_r  = sum_i exp(b_i) phi_r(y_i),

    a mixture of R laws over the labels that do not depend on the query: draw r, then i. The trigonometric features of
    the RF-softmax (Rawat et al. 2019, arXiv 1907.10747) can be negative, and are then no density.

    **Scale.** The relative variance of a feature's product is `exp(|x + y|^2) - 1`: long vectors need many features.
    The RF-softmax therefore normalises queries and rows and softens the kernel, and so does this. Rows are scaled to a
    mean square length of `sharpness`, a query so that `x.y_i = beta z.w_i` with `beta = min(1, sharpness / (|z| s))`,
    s the root mean square of the rows' lengths. The proposal is the softmax at temperature 1 / beta (with the whole
    bias), never sharper than the softmax itself.

    Log weights are clamped to within `_SCORE_RANGE` nats of the best of their law: the clamped law is the one that is
    drawn from and stated.

    Parameters
    ----------
    num_features : R. The features of all labels are kept: 4 R L bytes.
    sharpness : the largest product of a query's and a row's scaled (root mean square) length. Measured, gnd-tib after
        training, L = 41,218, R = 512, two seeds, KL(P||Q): 7.6 at 1, 7.4 at 2, 7.7 at 4, 9.6 at 8; uniform draws 9.8.
    seed : of the random matrix, of which each refresh draws another.
    """

    def __init__(self, *, num_features: int = 512, sharpness: float = 2.0, seed: int = 0) -> None:
        self.num_features = num_features
        self.sharpness = sharpness
        self.seed = seed
        self._num_refreshes = self._num_labels = 0
        self._features_LR: torch.Tensor | None = None

    @property
    def fitted(self) -> bool:
        return self._features_LR is not None

    # ---------------------------------------------------------------- refresh

    @torch.no_grad()
    def refresh(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        """Draw a random matrix and evaluate the features of all labels: O(L D R)."""
        device, dtype = label_table_LD.device, label_table_LD.dtype
        generator = torch.Generator(device).manual_seed(self.seed + self._num_refreshes)
        num_labels, dim = label_table_LD.shape
        omega_DR = torch.randn(dim, self.num_features, generator=generator, device=device).to(dtype)
        features_LR = torch.zeros(-(-num_labels // _BLOCK) * _BLOCK, self.num_features, device=device, dtype=dtype)
        weights_LR = features_LR[:num_labels]
        squares_L = torch.linalg.vector_norm(label_table_LD, dim=1).square()
        length = squares_L.mean().sqrt().clamp(min=1e-12)
        stretch = math.sqrt(self.sharpness) / length
        torch.matmul(label_table_LD, omega_DR * stretch, out=weights_LR)
        weights_LR += (bias_L - squares_L * (stretch.square() / 2))[:, None]
        peak_R = weights_LR.amax(0)
        weights_LR.sub_(peak_R).clamp_(min=-_SCORE_RANGE).exp_()
        mass_R = self._block_sums(features_LR).sum(0)
        weights_LR.div_(mass_R.to(dtype))
        self._num_refreshes += 1
        self._num_labels = num_labels
        self._use(features_LR, omega_DR, peak_R + mass_R.log().to(dtype), length)

    def _use(
        self, features_LR: torch.Tensor, omega_DR: torch.Tensor, log_mass_R: torch.Tensor, length: torch.Tensor
    ) -> None:
        """Take the features p_ri (padded by labels of no mass to whole blocks), and sum their blocks up."""
        self._features_LR, self._omega_DR, self._log_mass_R, self._length = features_LR, omega_DR, log_mass_R, length
        blocks_NR = self._block_sums(features_LR)
        cumulative_RN = torch.cumsum(blocks_NR.T.contiguous(), 1)
        cumulative_RN /= cumulative_RN[:, -1:].clone()
        # One rising sequence, feature r from r to r + 1: a search needs no copy of a feature's row.
        feature_R1 = torch.arange(self.num_features, dtype=torch.float64, device=features_LR.device)[:, None]
        self._num_blocks = blocks_NR.shape[0]
        self._cumulative = (cumulative_RN + feature_R1).flatten()

    def _block_sums(self, features_LR: torch.Tensor) -> torch.Tensor:
        """(blocks, R) float64: the mass of each block of labels."""
        return features_LR.view(-1, _BLOCK, self.num_features).sum(1).double()

    # ------------------------------------------------------------------ draws

    @torch.no_grad()
    def sample_pool(
        self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator, certain: torch.Tensor | None = None
    ) -> LabelSample:
        """Distinct labels drawn from the mean proposal of the batch (`draw_pool`): the mixture of the mean gate."""
        gate_R = self._gate(query_BD).mean(0)
        cumulative_R = torch.cumsum(gate_R, 0, dtype=torch.float64)
        assert self._features_LR is not None
        features_LR = self._features_LR

        def draw_labels(count: int) -> torch.Tensor:
            return self._draw_labels(draw(cumulative_R, count, generator), generator)

        def probability(label_ids: torch.Tensor) -> torch.Tensor:
            return features_LR[label_ids] @ gate_R

        return draw_pool(distinct(draw_labels, probability), probability, num_draws, certain)

    @torch.no_grad()
    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        """`num_draws` i.i.d. labels for each instance: a feature from its gate, a label from the feature."""
        features_BM = draw(torch.cumsum(self._gate(query_BD), 1, dtype=torch.float64), num_draws, generator)
        label_ids = self._draw_labels(features_BM, generator)
        log_weight = self.log_proposal(query_BD, label_ids) + math.log(num_draws)
        return LabelSample(label_ids=label_ids, log_weight=log_weight)

    @torch.no_grad()
    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """log Q(i|z), (B, P) for `label_ids` (P,), or (B, M) for `label_ids` (B, M); nats."""
        gate_BR = self._gate(query_BD)
        assert self._features_LR is not None
        if label_ids.dim() == 1:
            chunk = max(1, _CHUNK_ELEMENTS // self.num_features)
            return torch.cat([gate_BR @ self._features_LR[ids].T for ids in torch.split(label_ids, chunk)], 1).log_()
        chunk = max(1, _CHUNK_ELEMENTS // (label_ids.shape[1] * self.num_features))
        parts = [
            (self._features_LR[ids_bM] @ gate_bR[:, :, None])[..., 0]
            for gate_bR, ids_bM in zip(torch.split(gate_BR, chunk), torch.split(label_ids, chunk), strict=True)
        ]
        return torch.cat(parts).log_()

    # --------------------------------------------------------------- internals

    def _gate(self, query_BD: torch.Tensor) -> torch.Tensor:
        """(B, R) g_r(z), the law of the feature. The query's own `exp(-|x|^2/2)` cancels."""
        assert self._features_LR is not None, "refresh before use"
        query_BD = query_BD.to(self._omega_DR.dtype)
        spread_B1 = query_BD.norm(dim=1, keepdim=True) * self._length
        # x = z beta s / sqrt(sharpness), so that x.y = beta z.w.
        factor_B1 = (self.sharpness / spread_B1.clamp(min=1e-12)).clamp(max=1.0) * self._length
        scores_BR = torch.addmm(self._log_mass_R, query_BD * (factor_B1 / math.sqrt(self.sharpness)), self._omega_DR)
        return torch.softmax((scores_BR - scores_BR.amax(1, keepdim=True)).clamp_(min=-_SCORE_RANGE), 1)

    def _draw_labels(self, features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One label from the law of each given feature; same shape."""
        parts = [self._draw_few(part, generator) for part in torch.split(features.flatten(), _CHUNK_ELEMENTS // _BLOCK)]
        return torch.cat(parts).view_as(features)

    def _draw_few(self, features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(M,) labels: a block of labels by the sums that are ready, then a label of the block."""
        assert self._features_LR is not None
        uniform = torch.rand(features.shape, dtype=torch.float64, generator=generator, device=features.device)
        position = torch.searchsorted(self._cumulative, features + uniform, right=True)
        first = (position - features * self._num_blocks).clamp_(0, self._num_blocks - 1) * _BLOCK
        members = first[:, None] + torch.arange(_BLOCK, device=features.device)
        inside = self._features_LR.flatten()[members * self.num_features + features[:, None]]
        found = first + draw(torch.cumsum(inside, 1, dtype=torch.float64), 1, generator)[:, 0]
        # Of a table that is not finite a pad may be drawn.
        return found.clamp_(max=self._num_labels - 1)

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The features of the labels at the last refresh, and what the queries' features need."""
        if self._features_LR is None:
            return {}
        return {
            "features": self._features_LR,
            "omega": self._omega_DR,
            "log_mass": self._log_mass_R,
            "length": self._length,
            "num_refreshes": torch.tensor(self._num_refreshes),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Restore `state_dict()`; the bias is part of the features. Of nothing: not fitted."""
        self._features_LR, self._num_refreshes = None, 0
        if state:
            self._num_refreshes, self._num_labels = int(state["num_refreshes"]), bias_L.shape[0]
            self.num_features = state["omega"].shape[1]
            self._use(state["features"], state["omega"], state["log_mass"], state["length"])
