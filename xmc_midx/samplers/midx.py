"""Layer 3. The MIDX proposal: an inverted multi-index over the label table (arXiv 2501.08563, section 4).

With codes (k1, k2) of label i, codebook scores s1, s2 of a query and a query-free prior pi,

    Q(i|z) = pi_i exp(s1[k1] + s2[k2]) / Z(z),    Z(z) = sum_k1 exp(s1[k1]) sum_k2 omega[k1, k2] exp(s2[k2]),

where omega is the prior's mass in a cell. Setting up a batch costs O(B C D + B C^2), a draw O(log L); L enters only in
`refresh`. Scores are clamped to within `_SCORE_RANGE` nats of the query's best: the clamped law is the law that is
drawn from and the law that `log_proposal` states, so nothing underflows and nothing is approximated.
"""

from __future__ import annotations

import math

import torch

from xmc_midx.codebook import Codebook, code_dtype, fit_codebook
from xmc_midx.samplers.draws import draw, draw_pool
from xmc_midx.samplers.order import CellOrder
from xmc_midx.types import LabelSample

__all__ = ["MidxSampler"]

_SCORE_RANGE = 30.0
"""Nats. exp(-30) for each codebook: the product with a cell mass of 1e-10 is still a normal float32."""
_COLD_ITERATIONS = 10
_MEAN_QUERIES = 16
"""Queries of a batch that its mean proposal is taken over: more give a pool of the same variance (EXPERIMENTS.md,
"Pools") and cost a longer set-up."""
_DRAW_CHUNK = 1 << 24
"""Elements of the largest temporary of a per-instance draw."""


class MidxSampler:
    """Draws labels near the softmax at a cost that does not grow with their number.

    Parameters
    ----------
    quantizer : `"pq"` or `"rq"`.
    num_codewords : C in each of the two codebooks.
    prior : `"uniform"` (pi = 1, the paper's), `"frequency"` (pi = (n + 1)^power) or `"bias"` (pi = exp(b), exact for
        the part of the logit that does not depend on the query).
    label_frequencies : (L,) training instances of each label; needed by the frequency prior.
    frequency_power : the power in the frequency prior.
    refresh_iterations : of Lloyd's algorithm in a refresh, from the codewords that are there; 0 only assigns the labels
        anew. The first fit takes 10.
    seed : of the codebooks' start.
    """

    def __init__(
        self,
        *,
        quantizer: str,
        num_codewords: int,
        prior: str = "frequency",
        label_frequencies: torch.Tensor | None = None,
        frequency_power: float = 1.0,
        refresh_iterations: int = 2,
        seed: int = 0,
    ) -> None:
        if quantizer not in ("pq", "rq"):
            raise ValueError(f"quantizer {quantizer!r}: expected 'pq' or 'rq'")
        if prior not in ("uniform", "frequency", "bias"):
            raise ValueError(f"prior {prior!r}: expected 'uniform', 'frequency' or 'bias'")
        if prior == "frequency" and label_frequencies is None:
            raise ValueError("the frequency prior needs label_frequencies")
        self.quantizer = quantizer
        self.num_codewords = num_codewords
        self.prior = prior
        self.refresh_iterations = refresh_iterations
        self.seed = seed
        self.codebook: Codebook | None = None
        self._frequency_L, self._power = label_frequencies, frequency_power

    @property
    def fitted(self) -> bool:
        return self.codebook is not None

    # ---------------------------------------------------------------- refresh

    @torch.no_grad()
    def refresh(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        """Fit the codebooks to the table (from the previous ones, where there are any) and rebuild the cells, on the
        bias's device: the table may lie elsewhere, and is read by chunks."""
        generator = torch.Generator(bias_L.device).manual_seed(self.seed)
        codebook = fit_codebook(
            label_table_LD,
            quantizer=self.quantizer,
            num_codewords=self.num_codewords,
            generator=generator,
            start=self.codebook,
            num_iterations=_COLD_ITERATIONS if self.codebook is None else self.refresh_iterations,
            device=bias_L.device,
        )
        self.set_codebook(codebook, bias_L)

    def set_codebook(self, codebook: Codebook, bias_L: torch.Tensor) -> None:
        """Use `codebook` as it is; `bias_L` (L,) is read by the bias prior alone, which copies it."""
        if self._frequency_L is not None:
            self._frequency_L = self._frequency_L.to(bias_L.device)
        self._bias_L = bias_L.detach().clone() if self.prior == "bias" else None
        num_codewords, dtype = codebook.num_codewords, codebook.codewords1.dtype
        self.codebook = codebook
        self._order = CellOrder.build(codebook, self._log_prior)
        self._cell_mass_CC = self._order.cell_mass().to(dtype).view(num_codewords, num_codewords)

    def _log_prior(self, label_ids: torch.Tensor) -> torch.Tensor:
        """Unnormalised, float64, of the shape of `label_ids`."""
        if self._bias_L is not None:
            return self._bias_L[label_ids].double()
        if self.prior == "frequency":
            assert self._frequency_L is not None
            return self._power * torch.log(self._frequency_L[label_ids].double() + 1.0)
        return torch.zeros(label_ids.shape, dtype=torch.float64, device=label_ids.device)

    def _log_mass(self, label_ids: torch.Tensor) -> torch.Tensor:
        """log pi_i of a prior that sums to one, in the codewords' dtype."""
        assert self.codebook is not None, "refresh before use"
        return (self._log_prior(label_ids) - self._order.log_total).to(self.codebook.codewords1.dtype)

    # ------------------------------------------------------------------ draws

    @torch.no_grad()
    def sample_pool(
        self,
        query_BD: torch.Tensor,
        num_draws: int,
        generator: torch.Generator,
        certain: torch.Tensor | None = None,
        *,
        padded: bool = False,
    ) -> LabelSample:
        """Distinct labels drawn from the mean proposal of the batch's first 16 instances, `Q(i) = mean_b Q(i|z_b)`
        (`draw_pool`); `padded`, all `num_draws` of them, with the log weight +inf where one was drawn before.

        The mean over the queries of a cell's probability is one (C, B) x (B, C) product, so neither the set-up nor the
        weights need a (B, P) matrix, and the inclusion probability is exact.
        """
        ratio = self._mean_ratio(query_BD).flatten()
        cell_mass = self._cell_mass_CC.flatten()

        def draw_labels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self._order.draw_distinct(ratio, cell_mass, count, generator, padded=padded)

        def probability(label_ids: torch.Tensor) -> torch.Tensor:
            codes1, codes2 = self._codes(label_ids)
            return self._log_mass(label_ids).exp() * ratio[codes1 * self.num_codewords + codes2]

        return draw_pool(draw_labels, probability, num_draws, certain)

    @torch.no_grad()
    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        """`num_draws` i.i.d. labels for each instance: first code, second code given the first, label in the cell."""
        codewords = self.num_codewords
        chunk = max(1, _DRAW_CHUNK // (num_draws * codewords))
        parts = []
        for begin in range(0, query_BD.shape[0], chunk):
            factor1_BC, factor2_BC = self._factors(query_BD[begin : begin + chunk])
            psi_BC = factor2_BC @ self._cell_mass_CC.T
            first_BM = draw(torch.cumsum(factor1_BC * psi_BC, 1, dtype=torch.float64), num_draws, generator)
            second_BMC = self._cell_mass_CC[first_BM] * factor2_BC[:, None, :]
            second_BM = draw(torch.cumsum(second_BMC, 2, dtype=torch.float64), 1, generator)[..., 0]
            parts.append(self._order.draw_in(first_BM * codewords + second_BM, generator))
        label_ids = torch.cat(parts)
        log_weight = self.log_proposal(query_BD, label_ids) + math.log(num_draws)
        return LabelSample(label_ids=label_ids, log_weight=log_weight)

    @torch.no_grad()
    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """log Q(i|z), (B, P) for `label_ids` (P,), or (B, M) for `label_ids` (B, M); nats."""
        assert self.codebook is not None, "refresh before use"
        log_factor1_BC, log_factor2_BC = self._log_factors(query_BD)
        psi_BC = log_factor2_BC.exp() @ self._cell_mass_CC.T
        log_partition_B1 = torch.log((log_factor1_BC.exp() * psi_BC).sum(1, keepdim=True))
        codes1, codes2 = self._codes(label_ids)
        if label_ids.dim() == 1:
            scores = log_factor1_BC[:, codes1] + log_factor2_BC[:, codes2]
        else:
            scores = log_factor1_BC.gather(1, codes1) + log_factor2_BC.gather(1, codes2)
        return scores + self._log_mass(label_ids) - log_partition_B1

    # --------------------------------------------------------------- internals

    def _codes(self, label_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.codebook is not None, "refresh before use"
        return self.codebook.codes1[label_ids].long(), self.codebook.codes2[label_ids].long()

    def _log_factors(self, query_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.codebook is not None, "refresh before use"
        scores1_BC, scores2_BC = self.codebook.scores(query_BD.to(self.codebook.codewords1.dtype))
        return tuple(  # type: ignore[return-value]
            (scores - scores.amax(1, keepdim=True)).clamp_(min=-_SCORE_RANGE) for scores in (scores1_BC, scores2_BC)
        )

    def _factors(self, query_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_factor1_BC, log_factor2_BC = self._log_factors(query_BD)
        return log_factor1_BC.exp_(), log_factor2_BC.exp_()

    def _mean_ratio(self, query_BD: torch.Tensor) -> torch.Tensor:
        """(C, C): the mean over the queries of `exp(s1 + s2) / Z`, so that `Q(i) = pi_i * ratio[cell of i]`."""
        query_BD = query_BD[:_MEAN_QUERIES]
        factor1_BC, factor2_BC = self._factors(query_BD)
        partition_B1 = (factor1_BC * (factor2_BC @ self._cell_mass_CC.T)).sum(1, keepdim=True)
        return (factor1_BC / (partition_B1 * query_BD.shape[0])).T @ factor2_BC

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Codebooks and codes; the cells are rebuilt from them."""
        if self.codebook is None:
            return {}
        names = ("codewords1", "codewords2", "codes1", "codes2")
        return {name: getattr(self.codebook, name) for name in names}

    def require_shape(self, state: dict[str, torch.Tensor], dim: int) -> None:
        """A RuntimeError where the codebooks of a state are not those of this quantizer for rows of D numbers."""
        sizes = [int(state[name].shape[1]) for name in ("codewords1", "codewords2")]
        expected = [dim // 2, dim - dim // 2] if self.quantizer == "pq" else [dim, dim]
        if sizes != expected:
            raise RuntimeError(f"codewords of {sizes} numbers, expected {expected} of {self.quantizer!r}")

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        """Restore `state_dict()`; `bias_L` is the bias at the time of the refresh (read by the bias prior alone).

        Raises
        ------
        RuntimeError : the state is that of another number of codewords.
        """
        self.codebook = None
        if state:
            # Checkpoints of 0.1 have codes of four bytes.
            dtype = code_dtype(self.num_codewords)
            codes = {name: state[name].to(dtype) for name in ("codes1", "codes2")}
            codebook = Codebook(quantizer=self.quantizer, **(state | codes))
            if codebook.num_codewords != self.num_codewords:
                raise RuntimeError(f"codebooks of {codebook.num_codewords} codewords, expected {self.num_codewords}")
            self.set_codebook(codebook, bias_L)
