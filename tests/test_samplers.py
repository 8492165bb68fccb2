"""Samplers: one contract for every proposal that has a density, what is particular to each, and those without one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax, logsumexp

from xmc_midx.codebook import Codebook
from xmc_midx.samplers import order as order_module
from xmc_midx.samplers import pools as pools_module
from xmc_midx.samplers.dense import SoftmaxSampler
from xmc_midx.samplers.draws import draw, draw_pool, log_inclusion
from xmc_midx.samplers.dynamic import HardNegativeSampler
from xmc_midx.samplers.exact import ExactDecomposition, exact_decomposition
from xmc_midx.samplers.kernel import QuadraticKernelSampler, RandomFeatureSampler
from xmc_midx.samplers.lsh import LshSampler
from xmc_midx.samplers.midx import _SCORE_RANGE, MidxSampler
from xmc_midx.samplers.order import CellOrder
from xmc_midx.samplers.pools import two_samples
from xmc_midx.samplers.static import FrequencySampler, InBatchSampler, UniformSampler
from xmc_midx.softmax import LabelSoftmax
from xmc_midx.types import LabelSample, Sampler

MIDX = [f"midx-{quantizer}-{prior}" for quantizer in ("pq", "rq") for prior in ("uniform", "frequency", "bias")]
LIVE = ["softmax", "quadratic-kernel"]
"""Those that read the table as it is at each step: they have no state of their own."""
SAMPLERS = [*MIDX, "uniform", "frequency-0.5", "frequency-1.0", *LIVE, "rff", "lsh"]


@dataclass(frozen=True)
class Case:
    """A sampler with the label table that it was refreshed with, and queries."""

    sampler: Sampler
    table: torch.Tensor
    bias: torch.Tensor
    frequency: torch.Tensor
    query: torch.Tensor

    @property
    def num_labels(self) -> int:
        return self.table.shape[0]


def make_case(name: str, shape: str = "ordinary", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(100 + seed)
    num_labels, dim, codewords, num_queries, scale = {
        "ordinary": (53, 8, 4, 3, 1.0),
        "one label": (1, 4, 2, 2, 1.0),
        "two labels, one codeword": (2, 2, 1, 3, 1.0),
        "more codewords than labels": (5, 6, 9, 3, 1.0),
        "many empty cells": (40, 6, 12, 3, 1.0),
        "odd size": (31, 7, 3, 5, 1.0),
        "one query": (29, 4, 3, 1, 1.0),
        "extreme queries": (53, 8, 6, 4, 1e3),
        "zero queries": (53, 8, 6, 2, 0.0),
        "equal labels": (23, 6, 3, 3, 1.0),
    }[shape]
    table_LD = torch.randn(num_labels, dim, generator=generator)
    if shape == "equal labels":
        table_LD = table_LD[:1].repeat(num_labels, 1)
    bias_L = 2.0 * torch.randn(num_labels, generator=generator)
    frequency_L = torch.randint(0, 4, (num_labels,), generator=generator).pow(3)
    query_BD = scale * torch.randn(num_queries, dim, generator=generator)
    table_LD, bias_L, query_BD = table_LD.to(dtype), bias_L.to(dtype), query_BD.to(dtype)
    sampler: Sampler
    if name.startswith("midx"):
        _, quantizer, prior = name.split("-")
        sampler = MidxSampler(
            quantizer=quantizer,
            num_codewords=codewords,
            prior=prior,
            label_frequencies=frequency_L if prior == "frequency" else None,
            frequency_power=0.7,
        )
    elif name.startswith("frequency"):
        sampler = FrequencySampler(frequency_L, power=float(name.split("-")[1]))
    else:
        sampler = {
            "uniform": lambda: UniformSampler(num_labels),
            "softmax": SoftmaxSampler,
            "quadratic-kernel": QuadraticKernelSampler,
            "rff": lambda: RandomFeatureSampler(num_features=12, seed=seed),
            "lsh": lambda: LshSampler(num_tables=5, num_bits=4, seed=seed),
        }[name]()
    sampler.refresh(table_LD, bias_L)
    return Case(sampler, table_LD, bias_L, frequency_L, query_BD)


def reference_law(name: str, case: Case) -> np.ndarray:
    """(B, L) float64 log Q, from the formula, label by label."""
    frequency_L = case.frequency.double().numpy()
    if name == "uniform":
        law = np.zeros((case.query.shape[0], case.num_labels))
    elif name.startswith("frequency"):
        law = np.tile(float(name.split("-")[1]) * np.log(frequency_L + 1), (case.query.shape[0], 1))
    elif name == "softmax":
        law = exact_logits(case) + case.bias.double().numpy()
    elif name == "quadratic-kernel":
        law = np.log(100 * (exact_logits(case) + case.bias.double().numpy()) ** 2 + 1)
    elif name == "rff":
        law = random_feature_law(case)
    elif name == "lsh":
        law = lsh_law(case)
    else:
        assert isinstance(case.sampler, MidxSampler)
        codebook = case.sampler.codebook
        assert codebook is not None
        queries = case.query.double().numpy()
        words1, words2 = codebook.codewords1.double().numpy(), codebook.codewords2.double().numpy()
        if codebook.quantizer == "pq":
            half = case.table.shape[1] // 2
            scores = [queries[:, :half] @ words1.T, queries[:, half:] @ words2.T]
        else:
            scores = [queries @ words1.T, queries @ words2.T]
        scores = [np.maximum(s - s.max(1, keepdims=True), -_SCORE_RANGE) for s in scores]
        prior = {
            "uniform": np.zeros(case.num_labels),
            "frequency": 0.7 * np.log(frequency_L + 1),
            "bias": case.bias.double().numpy(),
        }[name.split("-")[2]]
        law = scores[0][:, codebook.codes1.numpy()] + scores[1][:, codebook.codes2.numpy()] + prior
    return law - logsumexp(law, axis=1, keepdims=True)


def exact_logits(case: Case) -> np.ndarray:
    """(B, L) float64, without the bias."""
    return case.query.double().numpy() @ case.table.double().numpy().T


def random_feature_law(case: Case) -> np.ndarray:
    """The mixture as it is defined: for each query and feature, the feature's weight times its law over the labels."""
    omega = case.sampler.state_dict()["omega"].double().numpy()
    table, bias = case.table.double().numpy(), case.bias.double().numpy()
    length = math.sqrt(np.mean(np.sum(table**2, 1)))
    laws, log_masses = [], []
    for column in omega.T:
        scaled = table * math.sqrt(2.0) / length
        log_feature = bias + scaled @ column - np.sum(scaled**2, 1) / 2
        log_feature = np.maximum(log_feature, log_feature.max() - 30)
        log_masses.append(logsumexp(log_feature))
        laws.append(np.exp(log_feature - log_masses[-1]))
    mixtures = []
    for query in case.query.double().numpy():
        beta = min(1.0, 2.0 / max(np.linalg.norm(query) * length, 1e-30))
        scaled = query * beta * length / math.sqrt(2.0)
        log_gate = np.array(log_masses) + scaled @ omega
        gate = np.exp(np.maximum(log_gate, log_gate.max() - 30))
        mixtures.append(sum(g * law for g, law in zip(gate / gate.sum(), laws, strict=True)))
    return np.log(mixtures)


def lsh_law(case: Case) -> np.ndarray:
    """The hashes and buckets of each table by hand."""
    projections = case.sampler.state_dict()["projections"].double().numpy()
    table, bias = case.table.double().numpy(), case.bias.double().numpy()
    rows = np.column_stack([table, bias])
    norms = np.sum(rows**2, 1)
    rows = np.column_stack([rows, np.sqrt(norms.max() - norms)])
    num_queries, num_labels = case.query.shape[0], case.num_labels
    queries = np.column_stack([case.query.double().numpy(), np.ones(num_queries), np.zeros(num_queries)])
    law = np.full((num_queries, num_labels), 0.1 / num_labels)
    for t in range(5):
        mine = projections[:, 4 * t : 4 * t + 4]
        for i, query in enumerate(queries):
            matches = ((rows @ mine > 0) == (query @ mine > 0)).all(1)
            matches = matches if matches.any() else np.ones(num_labels, dtype=bool)
            law[i] += 0.9 / 5 * matches / matches.sum()
    return np.log(law)


def pooled_chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom, cells of an expectation under 5 taken together."""
    small = expected < 5
    observed, wanted = list(counts[~small]), list(expected[~small])
    if small.any():
        observed.append(counts[small].sum())
        wanted.append(expected[small].sum())
        if wanted[-1] < 5 and len(wanted) > 1:
            observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    return float(sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))), len(wanted) - 1


EDGES = (
    "one label",
    "two labels, one codeword",
    "more codewords than labels",
    "many empty cells",
    "odd size",
    "one query",
    "extreme queries",
    "zero queries",
    "equal labels",
)


@pytest.mark.parametrize("name", SAMPLERS)
class TestContract:
    """What every sampler with a density promises (`xmc_midx.types.Sampler`)."""

    @pytest.mark.parametrize("shape", ["ordinary", *EDGES])
    @pytest.mark.fault("R17")
    def test_log_proposal_is_the_stated_law_and_sums_to_one(self, name: str, shape: str) -> None:
        case = make_case(name, shape)
        log_q = case.sampler.log_proposal(case.query, torch.arange(case.num_labels))
        assert log_q.shape == (case.query.shape[0], case.num_labels)
        assert torch.isfinite(log_q).all()
        np.testing.assert_allclose(log_q.double().exp().sum(1).numpy(), 1.0, atol=2e-5)
        # Scores of a thousand carry float32's error of 1e-7 relative into the exponent.
        tolerance = 2e-3 if shape == "extreme queries" else 2e-5
        np.testing.assert_allclose(log_q.numpy(), reference_law(name, case), atol=tolerance)

    def test_both_shapes_of_label_ids_give_the_same_densities(self, name: str) -> None:
        case = make_case(name)
        shared = case.sampler.log_proposal(case.query, torch.arange(case.num_labels))
        own = torch.randint(0, case.num_labels, (3, 17), generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(case.sampler.log_proposal(case.query, own), shared.gather(1, own))

    @pytest.mark.fault("R17")
    def test_draws_of_an_instance_follow_its_proposal(self, name: str) -> None:
        """10^6 draws at each of 20 seeds, of which every one is another table with three other queries."""
        num_draws, p_values = 10**6 // 3, []
        for seed in range(20):
            case = make_case(name, seed=seed)
            law = np.exp(reference_law(name, case))
            draws = case.sampler.sample(case.query, num_draws, torch.Generator().manual_seed(seed)).label_ids
            for row, probability in zip(draws.numpy(), law, strict=True):
                counts = np.bincount(row, minlength=case.num_labels)
                p_values.append(stats.chi2.sf(*pooled_chi_square(counts, num_draws * probability)))
        # 60 tests of one claim, each of which misses p > 1e-3 by chance once in a thousand times. Fisher's method sees
        # a p that is far too small, the other test many that are somewhat too small or too large.
        assert stats.combine_pvalues(p_values, method="fisher").pvalue > 1e-3
        assert stats.kstest(p_values, "uniform").pvalue > 1e-3

    @pytest.mark.parametrize("shape", ["ordinary", *EDGES])
    def test_the_weight_of_an_own_draw_is_m_times_its_density(self, name: str, shape: str) -> None:
        case = make_case(name, shape)
        sample = case.sampler.sample(case.query, 19, torch.Generator().manual_seed(0))
        assert sample.label_ids.shape == sample.log_weight.shape == (case.query.shape[0], 19)
        assert sample.label_ids.min() >= 0 and sample.label_ids.max() < case.num_labels
        law = np.take_along_axis(reference_law(name, case), sample.label_ids.numpy(), axis=1)
        tolerance = 2e-3 if shape == "extreme queries" else 2e-5
        np.testing.assert_allclose(sample.log_weight.numpy(), law + math.log(19), atol=tolerance)

    @pytest.mark.fault("R17")
    def test_a_label_is_in_the_pool_as_often_as_its_weight_says(self, name: str) -> None:
        case = make_case(name)
        num_draws, repetitions = 25, 1000
        law = np.exp(reference_law(name, case)).mean(0)
        inclusion = 1 - (1 - law) ** num_draws
        generator = torch.Generator().manual_seed(7)
        counts, log_weight, sizes = np.zeros(case.num_labels), np.log(inclusion), []
        for _ in range(repetitions):
            pool = case.sampler.sample_pool(case.query, num_draws, generator)
            counts[pool.label_ids.numpy()] += 1
            log_weight[pool.label_ids.numpy()] = pool.log_weight.numpy()
            sizes.append(pool.label_ids.shape[0])
        np.testing.assert_allclose(log_weight, np.log(inclusion), atol=1e-4)
        # The sizes of the pools, too: a law of one draw fewer would hide in the noise of single labels.
        assert abs(np.mean(sizes) - inclusion.sum()) < 4.5 * np.std(sizes) / math.sqrt(repetitions)
        sure = inclusion > 1 - 1e-9
        assert (counts[sure] == repetitions).all()
        spread = np.sqrt(repetitions * inclusion * (1 - inclusion))[~sure]
        assert np.abs((counts - repetitions * inclusion)[~sure] / spread).max() < 4.5

    @pytest.mark.parametrize("shape", ["ordinary", *EDGES])
    def test_a_pool_holds_distinct_labels_with_finite_weights(self, name: str, shape: str) -> None:
        case = make_case(name, shape)
        pool = case.sampler.sample_pool(case.query, 64, torch.Generator().manual_seed(0))
        assert pool.label_ids.shape == pool.log_weight.shape
        assert 1 <= pool.label_ids.shape[0] <= min(64, case.num_labels)
        assert len(set(pool.label_ids.tolist())) == pool.label_ids.shape[0]
        assert pool.label_ids.min() >= 0 and pool.label_ids.max() < case.num_labels
        assert torch.isfinite(pool.log_weight).all()
        assert (pool.log_weight <= 0).all(), "a log probability"

    def test_the_same_seed_draws_the_same_labels_and_another_seed_others(self, name: str) -> None:
        case = make_case(name)

        def draw(seed: int) -> list[list[int]]:
            generator = torch.Generator().manual_seed(seed)
            own = case.sampler.sample(case.query, 30, generator).label_ids.flatten().tolist()
            return [own, case.sampler.sample_pool(case.query, 30, generator).label_ids.tolist()]

        assert draw(5) == draw(5)
        assert draw(5) != draw(6)

    @pytest.mark.parametrize("shape", ["ordinary", "odd size"])
    def test_labels_that_are_in_the_pool_anyway_cost_no_draws(self, name: str, shape: str) -> None:
        case, repetitions, num_draws = make_case(name, shape), 2000, 9
        mean = np.exp(reference_law(name, case)).mean(0)
        certain = np.sort(np.argsort(-mean)[:4])
        elsewhere = 1 - mean[certain].sum()
        num_made = math.ceil(num_draws / elsewhere)
        assert num_made * elsewhere >= num_draws
        generator = torch.Generator().manual_seed(0)
        counts = np.zeros(case.num_labels)
        for _ in range(repetitions):
            pool = case.sampler.sample_pool(case.query, num_draws, generator, torch.from_numpy(certain))
            counts[pool.label_ids.numpy()] += 1
        chance = 1 - (1 - mean) ** num_made
        np.testing.assert_allclose(pool.log_weight.numpy(), np.log(chance[pool.label_ids.numpy()]), atol=2e-4)
        assert (counts[certain] == 0).all() and len(set(pool.label_ids.tolist())) == pool.label_ids.shape[0]
        chance[certain] = 0
        deviation = np.sqrt(repetitions * chance * (1 - chance))
        assert (np.abs(counts - repetitions * chance) < 4.5 * deviation + 1e-9).all()

    def test_a_pool_that_holds_all_of_the_proposal_draws_nothing(self, name: str) -> None:
        case = make_case(name)
        everything = torch.arange(case.num_labels)
        pool = case.sampler.sample_pool(case.query, 9, torch.Generator().manual_seed(0), everything)
        assert pool.label_ids.shape == pool.log_weight.shape == (0,)

    @pytest.mark.parametrize("shape", ["ordinary", "odd size", "more codewords than labels"])
    def test_float32_and_float64_state_the_same_law(self, name: str, shape: str) -> None:
        single, double = (make_case(name, shape, dtype=dtype) for dtype in (torch.float32, torch.float64))
        labels = torch.arange(single.num_labels)
        laws = [case.sampler.log_proposal(case.query, labels).double() for case in (single, double)]
        np.testing.assert_allclose(laws[0].numpy(), laws[1].numpy(), atol=2e-5)

    def test_the_state_restores_the_law_whatever_the_table_has_become(self, name: str) -> None:
        case = make_case(name)
        if name in LIVE:
            assert case.sampler.state_dict() == {}, "the restored table is the whole state"
            return
        labels = torch.arange(case.num_labels)
        other = make_case(name, seed=1).sampler
        if isinstance(other, FrequencySampler):
            other = FrequencySampler(case.frequency, power=float(name.split("-")[1]))
        elif isinstance(other, MidxSampler):
            other._frequency_L = case.sampler._frequency_L  # type: ignore[attr-defined]
        other.load_state_dict(case.sampler.state_dict(), case.bias)
        assert torch.equal(other.log_proposal(case.query, labels), case.sampler.log_proposal(case.query, labels))


@pytest.mark.parametrize("name", MIDX)
@pytest.mark.fault("R17")
def test_midx_draws_follow_the_law_where_cells_are_empty_and_queries_extreme(name: str) -> None:
    for shape in ("many empty cells", "extreme queries", "more codewords than labels"):
        case = make_case(name, shape)
        law = np.exp(reference_law(name, case))
        draws = case.sampler.sample(case.query, 3000, torch.Generator().manual_seed(1)).label_ids.numpy()
        statistic, freedom = 0.0, 0
        for row, probability in zip(draws, law, strict=True):
            assert (law[0].shape[0] > row).all()
            part = pooled_chi_square(np.bincount(row, minlength=case.num_labels), 3000 * probability)
            statistic, freedom = statistic + part[0], freedom + part[1]
        if freedom:
            assert stats.chi2.sf(statistic, freedom) > 1e-3, shape


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_midx_is_the_softmax_where_the_table_is_its_own_reconstruction(quantizer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codewords, dim = 5, 6
    width = dim // 2 if quantizer == "pq" else dim
    codebook = Codebook(
        quantizer=quantizer,
        codewords1=torch.randn(codewords, width, generator=generator),
        codewords2=torch.randn(codewords, width, generator=generator),
        codes1=torch.randint(0, codewords, (37,), generator=generator).int(),
        codes2=torch.randint(0, codewords, (37,), generator=generator).int(),
    )
    table_LD = codebook.reconstruct(torch.arange(37))
    query_BD = torch.randn(4, dim, generator=generator)
    sampler = MidxSampler(quantizer=quantizer, num_codewords=codewords, prior="uniform")
    sampler.set_codebook(codebook, torch.zeros(37))
    softmax = log_softmax(query_BD.double().numpy() @ table_LD.double().numpy().T, axis=1)
    np.testing.assert_allclose(sampler.log_proposal(query_BD, torch.arange(37)).numpy(), softmax, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 300, 1000])
def test_cells_are_sorted_and_summed_in_chunks_as_at_once(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(order_module, "_LABEL_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 4, (300,), generator=generator).to(torch.int16) for _ in range(2)]
    words = torch.randn(5, 3, generator=generator)
    codebook = Codebook(quantizer="pq", codewords1=words, codewords2=words, codes1=codes[0], codes2=codes[1])
    bias_L = 200 * torch.randn(300, generator=generator)
    order = CellOrder.build(codebook, lambda label_ids: bias_L[label_ids].double())
    order_L, counts = order.labels, order.cell_starts.diff()
    cells = codebook.cells().numpy()
    assert order_L.dtype == torch.int32 and np.array_equal(order_L.numpy(), np.argsort(cells, kind="stable"))
    assert np.array_equal(counts.numpy(), np.bincount(cells, minlength=25))
    law = np.exp(bias_L.double().numpy() - logsumexp(bias_L.double().numpy()))
    expected = np.bincount(cells, weights=law, minlength=25)
    np.testing.assert_allclose(order.cell_mass().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(order.cumulative_mass.numpy(), np.cumsum(law[order_L.numpy()]), atol=1e-12)


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_a_bfloat16_table_is_quantised_as_its_float32_copy(quantizer: str) -> None:
    table_LD = torch.randn(90, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = []
    for table in (table_LD, table_LD.float()):
        sampler = MidxSampler(quantizer=quantizer, num_codewords=7, prior="uniform")
        sampler.refresh(table, torch.zeros(90))
        states.append(sampler.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("prior", ["uniform", "bias"])
@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_midx_is_the_softmax_where_every_label_is_a_codeword(quantizer: str, prior: str) -> None:
    generator = torch.Generator().manual_seed(0)
    table_LD, query_BD = torch.randn(11, 5, generator=generator), torch.randn(3, 5, generator=generator)
    bias_L = torch.randn(11, generator=generator) if prior == "bias" else torch.zeros(11)
    sampler = MidxSampler(quantizer=quantizer, num_codewords=11, prior=prior)
    sampler.refresh(table_LD, bias_L)
    softmax = torch.log_softmax(query_BD @ table_LD.T + bias_L, dim=1)
    torch.testing.assert_close(sampler.log_proposal(query_BD, torch.arange(11)), softmax, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prior", ["uniform", "bias"])
@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_the_residual_bounds_the_distance_of_midx_from_the_softmax(quantizer: str, prior: str) -> None:
    for seed in range(5):
        case = make_case(f"midx-{quantizer}-{prior}", seed=seed)
        assert isinstance(case.sampler, MidxSampler) and case.sampler.codebook is not None
        logits = exact_logits(case)
        approximate = case.query @ case.sampler.codebook.reconstruct(torch.arange(case.num_labels)).T
        bound = 2 * np.abs(logits - approximate.double().numpy()).max(1)
        if prior == "bias":
            logits = logits + case.bias.double().numpy()
        log_p = log_softmax(logits, axis=1)
        log_q = case.sampler.log_proposal(case.query, torch.arange(case.num_labels)).double().numpy()
        assert (np.abs(log_q - log_p).max(1) <= bound + 1e-5).all()
        assert ((np.exp(log_q) * (log_q - log_p)).sum(1) <= bound + 1e-5).all()
        # The bound bites: it is not merely far away.
        assert (np.abs(log_q - log_p).max(1) > 0.1 * bound).all()


@pytest.mark.parametrize("name", ["uniform", "frequency-1.0"])
def test_the_largest_logit_bounds_the_divergence_of_a_static_proposal(name: str) -> None:
    for seed in range(5):
        case = make_case(name, seed=seed)
        logits = exact_logits(case)
        log_p = log_softmax(logits, axis=1)
        log_q = case.sampler.log_proposal(case.query, torch.arange(case.num_labels)).double().numpy()
        bound = 2 * np.abs(logits).max(1) + math.log(case.num_labels) + log_q.max(1)
        assert ((np.exp(log_q) * (log_q - log_p)).sum(1) <= bound + 1e-5).all()


def test_midx_is_nearer_to_the_softmax_than_uniform_draws_are() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(12, 8, generator=generator)
    table_LD = centres[torch.arange(200) % 12] + 0.1 * torch.randn(200, 8, generator=generator)
    query_BD = torch.randn(16, 8, generator=generator)
    log_p = torch.log_softmax(query_BD @ table_LD.T, dim=1)

    def divergence(sampler: Sampler) -> float:
        sampler.refresh(table_LD, torch.zeros(200))
        log_q = sampler.log_proposal(query_BD, torch.arange(200))
        return float((log_p.exp() * (log_p - log_q)).sum(1).mean())

    midx = divergence(MidxSampler(quantizer="pq", num_codewords=16, prior="uniform"))
    assert midx < 0.1 * divergence(UniformSampler(200))


def test_a_refresh_follows_the_table() -> None:
    case = make_case("midx-rq-uniform")
    other = make_case("midx-rq-uniform", seed=9)
    before = case.sampler.log_proposal(case.query, torch.arange(case.num_labels))
    case.sampler.refresh(other.table, other.bias)
    after = case.sampler.log_proposal(case.query, torch.arange(case.num_labels))
    assert (after - before).abs().max() > 0.1
    np.testing.assert_allclose(after.double().exp().sum(1).numpy(), 1.0, atol=2e-5)


def test_a_refresh_starts_from_the_codewords_that_it_finds() -> None:
    case = make_case("midx-rq-uniform")
    assert isinstance(case.sampler, MidxSampler)
    before = {name: tensor.clone() for name, tensor in case.sampler.state_dict().items()}
    case.sampler.refresh_iterations = 0
    case.sampler.refresh(case.table.flip(0), case.bias)
    after = case.sampler.state_dict()
    assert torch.equal(after["codewords1"], before["codewords1"]), "the codewords are kept"
    assert torch.equal(after["codes1"], before["codes1"].flip(0)), "the labels are assigned anew"


def test_a_large_batch_draws_from_the_mean_proposal_of_its_first_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("midx-pq-frequency", "odd size")
    monkeypatch.setattr("xmc_midx.samplers.midx._MEAN_QUERIES", 2)
    pool = case.sampler.sample_pool(case.query, 40, torch.Generator().manual_seed(0))
    mean = np.exp(reference_law("midx-pq-frequency", case))[:2].mean(0)[pool.label_ids]
    np.testing.assert_allclose(pool.log_weight.numpy(), np.log(1 - (1 - mean) ** 40), atol=2e-5)


def test_an_own_draw_does_not_depend_on_how_the_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("midx-pq-frequency", "odd size")
    monkeypatch.setattr("xmc_midx.samplers.midx._DRAW_CHUNK", 1)
    sample = case.sampler.sample(case.query, 2000, torch.Generator().manual_seed(0))
    law = np.exp(reference_law("midx-pq-frequency", case))
    assert sample.label_ids.shape == (5, 2000)
    statistic, freedom = 0.0, 0
    for row, probability in zip(sample.label_ids.numpy(), law, strict=True):
        part = pooled_chi_square(np.bincount(row, minlength=case.num_labels), 2000 * probability)
        statistic, freedom = statistic + part[0], freedom + part[1]
    assert stats.chi2.sf(statistic, freedom) > 1e-3


def test_the_inclusion_probability_keeps_its_digits_from_rare_to_certain() -> None:
    probability = torch.tensor([1e-30, 1e-12, 1e-3, 0.5, 1.0])
    expected = [math.log(-math.expm1(100 * math.log1p(-float(q)))) if q < 1 else 0.0 for q in probability]
    np.testing.assert_allclose(log_inclusion(probability, 100).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "shape", ["ordinary", "one label", "more codewords than labels", "many empty cells", "odd size"]
)
@pytest.mark.parametrize("quantizer", ["pq", "rq"])
class TestExactDecomposition:
    """Three multinomials that multiply out to the softmax, whatever the codebook."""

    def decompose(self, quantizer: str, shape: str) -> tuple[Case, Codebook, ExactDecomposition]:
        case = make_case(f"midx-{quantizer}-uniform", shape, dtype=torch.float64)
        assert isinstance(case.sampler, MidxSampler) and case.sampler.codebook is not None
        codebook = case.sampler.codebook
        return case, codebook, exact_decomposition(codebook, case.query, case.table, case.bias)

    def test_multiplied_out_it_is_the_softmax(self, quantizer: str, shape: str) -> None:
        case, codebook, parts = self.decompose(quantizer, shape)
        codes1, codes2 = codebook.codes1.long(), codebook.codes2.long()
        product = parts.log_first[:, codes1] + parts.log_second[:, codes1, codes2] + parts.log_label
        softmax = log_softmax(exact_logits(case) + case.bias.numpy(), axis=1)
        np.testing.assert_allclose(product.numpy(), softmax, atol=1e-10)

    def test_each_stage_is_a_law(self, quantizer: str, shape: str) -> None:
        _, codebook, parts = self.decompose(quantizer, shape)
        cells, num_codewords = codebook.cells(), codebook.num_codewords
        occupied = torch.bincount(cells, minlength=num_codewords**2).view(num_codewords, -1) > 0
        np.testing.assert_allclose(parts.log_first.exp().sum(1).numpy(), 1.0)
        used = occupied.any(1)
        np.testing.assert_allclose(parts.log_second[:, used].exp().sum(2).numpy(), 1.0)
        assert torch.isneginf(parts.log_first[:, ~used]).all() and torch.isneginf(parts.log_second[:, ~occupied]).all()
        for cell in cells.unique():
            np.testing.assert_allclose(parts.log_label[:, cells == cell].exp().sum(1).numpy(), 1.0)
        assert shape != "many empty cells" or not used.all() or not occupied.all()


class TestLive:
    """Proposals evaluated for every label read the table as it is."""

    @pytest.mark.parametrize("name", LIVE)
    def test_the_law_follows_the_table_without_a_refresh(self, name: str) -> None:
        case = make_case(name)
        case.table.mul_(-0.5).add_(0.3)
        case.bias.sub_(1.0)
        log_q = case.sampler.log_proposal(case.query, torch.arange(case.num_labels))
        np.testing.assert_allclose(log_q.numpy(), reference_law(name, case), atol=2e-5)

    @pytest.mark.parametrize("name", LIVE)
    def test_the_law_does_not_depend_on_how_the_batch_is_cut(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case, labels = make_case(name, "odd size"), torch.arange(31)
        whole = case.sampler.log_proposal(case.query, labels)
        for rows in (1, 2):
            monkeypatch.setattr("xmc_midx.samplers.dense._CHUNK_ELEMENTS", rows * 31)
            torch.testing.assert_close(case.sampler.log_proposal(case.query, labels), whole)
            sample = case.sampler.sample(case.query, 19, torch.Generator().manual_seed(0))
            own = case.sampler.log_proposal(case.query, sample.label_ids)
            torch.testing.assert_close(own, whole.gather(1, sample.label_ids))
            torch.testing.assert_close(sample.log_weight, own + math.log(19))
            pool = case.sampler.sample_pool(case.query, 19, torch.Generator().manual_seed(0))
            probability = whole.exp().mean(0)[pool.label_ids]
            torch.testing.assert_close(pool.log_weight, log_inclusion(probability, 19))

    def test_the_quadratic_kernel_weighs_a_square_by_alpha(self) -> None:
        case = make_case("quadratic-kernel")
        sampler = QuadraticKernelSampler(alpha=3.0)
        sampler.refresh(case.table, case.bias)
        weights = 3.0 * (case.query @ case.table.T + case.bias).square() + 1.0
        expected = torch.log(weights / weights.sum(1, keepdim=True))
        torch.testing.assert_close(sampler.log_proposal(case.query, torch.arange(case.num_labels)), expected)


class TestRandomFeatures:
    """Positive features: an estimate of the softmax at a bearable temperature, and an exact mixture."""

    def test_many_features_approach_the_softmax_at_its_temperature(self) -> None:
        case = make_case("rff", seed=3)
        sampler = RandomFeatureSampler(num_features=100_000)
        sampler.refresh(case.table, case.bias)
        length = case.table.square().sum(1).mean().sqrt()
        beta = (2.0 / (case.query.norm(dim=1, keepdim=True) * length)).clamp(max=1.0)
        expected = torch.log_softmax(beta * (case.query @ case.table.T) + case.bias, 1)
        log_q = sampler.log_proposal(case.query, torch.arange(case.num_labels))
        assert (beta < 1).all()
        # In total variation: the features of the few longest rows, which are improbable, vary most.
        assert (log_q.exp() - expected.exp()).abs().sum(1).max() / 2 < 0.02

    def test_a_short_query_is_not_sharpened(self) -> None:
        case = make_case("rff", seed=3)
        sampler = RandomFeatureSampler(num_features=100_000)
        sampler.refresh(case.table, case.bias)
        query_BD = 0.05 * case.query
        log_q = sampler.log_proposal(query_BD, torch.arange(case.num_labels))
        assert (log_q - torch.log_softmax(query_BD @ case.table.T + case.bias, 1)).abs().max() < 0.05

    def test_a_label_far_below_the_others_stays_reachable_at_its_stated_chance(self) -> None:
        case = make_case("rff")
        case.bias[::2] = -200.0
        case.sampler.refresh(case.table, case.bias)
        log_q = case.sampler.log_proposal(case.query, torch.arange(case.num_labels))
        assert torch.isfinite(log_q).all() and -45 < log_q.min() < -25
        np.testing.assert_allclose(log_q.numpy(), reference_law("rff", case), atol=2e-5)

    def test_a_refresh_draws_one_matrix_and_the_next_another(self) -> None:
        case = make_case("rff")
        first = case.sampler.state_dict()["omega"].clone()
        case.sampler.sample_pool(case.query, 10, torch.Generator())
        assert torch.equal(case.sampler.state_dict()["omega"], first)
        case.sampler.refresh(case.table, case.bias)
        second = case.sampler.state_dict()
        assert not torch.equal(second["omega"], first)
        # A restored sampler goes on with the matrix that would have come next.
        other = RandomFeatureSampler()
        other.load_state_dict(second, case.bias)
        for sampler in (case.sampler, other):
            sampler.refresh(case.table, case.bias)
        assert torch.equal(other.state_dict()["omega"], case.sampler.state_dict()["omega"])

    def test_the_law_does_not_depend_on_how_the_batch_is_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case, labels = make_case("rff", "odd size"), torch.arange(31)
        whole = case.sampler.log_proposal(case.query, labels)
        monkeypatch.setattr("xmc_midx.samplers.kernel._CHUNK_ELEMENTS", 64)
        torch.testing.assert_close(case.sampler.log_proposal(case.query, labels), whole)
        sample = case.sampler.sample(case.query, 5000, torch.Generator().manual_seed(0))
        torch.testing.assert_close(sample.log_weight, whole.gather(1, sample.label_ids) + math.log(5000))
        for row, log_q in zip(sample.label_ids.numpy(), whole, strict=True):
            expected = 5000 * log_q.double().exp().numpy()
            assert stats.chi2.sf(*pooled_chi_square(np.bincount(row, minlength=31), expected)) > 1e-3 / 5


class TestLsh:
    """SimHash of inner products."""

    def test_a_label_collides_with_a_query_by_the_angle_that_its_logit_gives(self) -> None:
        case = make_case("lsh", seed=1)
        table_LD = case.table * 3 * torch.rand(53, 1, generator=torch.Generator().manual_seed(0))
        sampler = LshSampler(num_tables=20_000, num_bits=1)
        sampler.refresh(table_LD, case.bias)
        state = sampler.state_dict()
        query_bits = torch.nn.functional.pad(case.query, (0, 1), value=1.0) @ state["projections"][:-1] > 0
        collisions = (query_bits[:, :, None] == state["codes"].bool()).double().mean(1)
        query_BD, rows_LD, bias_L = case.query.double(), table_LD.double(), case.bias.double()
        longest = (rows_LD.square().sum(1) + bias_L.square()).max().sqrt()
        cosines = (query_BD @ rows_LD.T + bias_L) / (query_BD.square().sum(1, keepdim=True) + 1).sqrt() / longest
        expected = 1 - torch.acos(cosines) / math.pi
        assert ((collisions - expected).abs() < 4.5 * (expected * (1 - expected) / 20_000).sqrt()).all()
        # The order of the angles is the order of the logits.
        logits = case.query @ table_LD.T + case.bias
        assert torch.equal(expected.argsort(1), logits.argsort(1))

    def test_every_label_keeps_its_uniform_share(self) -> None:
        case = make_case("lsh", "odd size")
        log_q = case.sampler.log_proposal(case.query, torch.arange(31))
        np.testing.assert_allclose(log_q.min().item(), math.log(0.1 / 31), atol=1e-6)

    def test_queries_whose_buckets_are_all_empty_draw_from_all_labels(self) -> None:
        case = make_case("lsh", "two labels, one codeword")
        sampler = LshSampler(num_tables=3, num_bits=20)
        sampler.refresh(case.table, case.bias)
        log_q = sampler.log_proposal(case.query, torch.arange(2))
        np.testing.assert_allclose(log_q.numpy(), math.log(0.5), atol=1e-6)
        draws = sampler.sample(case.query, 4000, torch.Generator().manual_seed(0)).label_ids
        assert (draws.double().mean(1) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(4000)

    def test_bits_come_from_the_number_of_labels(self) -> None:
        for num_labels, bits in ((1, 1), (300, 2), (41_218, 3)):
            sampler = LshSampler(num_tables=2)
            sampler.refresh(
                torch.randn(num_labels, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(num_labels)
            )
            assert sampler.state_dict()["projections"].shape == (4, 2 * bits)

    def test_the_tables_do_not_depend_on_how_the_rows_are_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = make_case("lsh").sampler.state_dict()
        monkeypatch.setattr("xmc_midx.samplers.lsh._ROWS_AT_ONCE", 7)
        cut = make_case("lsh").sampler.state_dict()
        assert all(torch.equal(cut[name], whole[name]) for name in whole)

    def test_a_refresh_draws_other_projections(self) -> None:
        case = make_case("lsh")
        before = case.sampler.state_dict()["projections"]
        case.sampler.refresh(case.table, case.bias)
        assert not torch.equal(case.sampler.state_dict()["projections"], before)


class TestHardNegatives:
    """The best of random candidates: no weight, no density."""

    def make(self, candidates_per_draw: int) -> tuple[HardNegativeSampler, Case]:
        case = make_case("uniform")
        sampler = HardNegativeSampler(candidates_per_draw=candidates_per_draw)
        sampler.refresh(case.table, case.bias)
        return sampler, case

    def test_of_all_labels_the_hardest_are_kept(self) -> None:
        sampler, case = self.make(400)
        logits = case.query @ case.table.T + case.bias
        generator = torch.Generator().manual_seed(0)
        own = sampler.sample(case.query, 5, generator)
        assert torch.equal(own.label_ids, torch.topk(logits, 5).indices)
        pool = sampler.sample_pool(case.query, 5, generator)
        assert torch.equal(pool.label_ids, torch.topk(logits.amax(0), 5).indices.sort().values)
        assert not own.log_weight.any() and own.log_weight.shape == own.label_ids.shape
        assert not pool.log_weight.any() and pool.log_weight.shape == pool.label_ids.shape

    def test_the_table_is_read_as_it_is(self) -> None:
        sampler, case = self.make(400)
        case.table.neg_()
        case.bias.neg_()
        own = sampler.sample(case.query, 5, torch.Generator().manual_seed(0))
        assert torch.equal(own.label_ids, torch.topk(case.query @ case.table.T + case.bias, 5).indices)

    def test_with_one_candidate_a_draw_it_is_uniform(self) -> None:
        sampler, case = self.make(1)
        generator = torch.Generator().manual_seed(0)
        pools = [sampler.sample_pool(case.query, 20, generator).label_ids for _ in range(500)]
        counts = torch.bincount(torch.cat(pools), minlength=case.num_labels).double()
        chance = 1 - (1 - 1 / case.num_labels) ** 20
        assert ((counts - 500 * chance).abs() < 4.5 * math.sqrt(500 * chance * (1 - chance))).all()

    def test_labels_are_distinct_and_fewer_where_there_are_fewer(self) -> None:
        sampler, case = self.make(4)
        own = sampler.sample(case.query, 50, torch.Generator().manual_seed(0)).label_ids
        assert own.shape == (3, 50) and all(len(set(row)) == 50 for row in own.tolist())
        assert sampler.sample(case.query, 60, torch.Generator().manual_seed(0)).label_ids.shape[1] <= case.num_labels
        assert (sampler.sample_pool(case.query, 60, torch.Generator().manual_seed(0)).label_ids.diff() > 0).all()

    def test_a_density_is_refused(self) -> None:
        sampler, case = self.make(4)
        with pytest.raises(NotImplementedError, match="no density"):
            sampler.log_proposal(case.query, torch.arange(5))


def test_a_draw_never_takes_an_index_without_mass_and_reaches_beyond_2_to_the_24() -> None:
    generator = torch.Generator().manual_seed(0)
    law = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    found = draw(torch.cumsum(law, 1), 3000, generator)
    assert set(found[0].tolist()) == {1, 3} and set(found[1].tolist()) == {4}
    assert abs((found[0] == 1).double().mean() - 2 / 3) < 4 * math.sqrt(2 / 9 / 3000)
    many = torch.ones((1 << 24) + 1000, dtype=torch.float64)
    many[: 1 << 24] = 0.0
    found = draw(torch.cumsum(many, 0), 3000, generator) - (1 << 24)
    assert found.min() >= 0 and found.max() < 1000 and found.unique().shape[0] > 900


def _order(num_labels: int, codewords: int, seed: int) -> tuple[CellOrder, torch.Tensor]:
    """Labels in cells, of which some are empty and some weigh nothing; by how much a law over the cells is above the
    prior."""
    rng = np.random.default_rng(seed)
    codes = [torch.from_numpy((rng.random(num_labels) ** 2 * codewords).astype(np.int16)) for _ in range(2)]
    words = torch.zeros(codewords, 2)
    codebook = Codebook(quantizer="pq", codewords1=words, codewords2=words, codes1=codes[0], codes2=codes[1])
    log_prior = torch.from_numpy(np.where(rng.random(num_labels) < 0.2, -np.inf, 3 * rng.normal(size=num_labels)))
    log_prior[0] = 0.0
    order = CellOrder.build(codebook, lambda label_ids: log_prior[label_ids])
    ratio = torch.from_numpy(rng.exponential(size=codewords**2))
    return order, ratio.float() if seed % 2 else ratio


@pytest.mark.parametrize(("num_labels", "codewords"), [(1, 1), (2, 3), (37, 5), (999, 7), (40_001, 64)])
def test_compiled_draws_are_those_of_torch(num_labels: int, codewords: int) -> None:
    for seed in range(4):
        order, ratio = _order(num_labels, codewords, seed)
        mass = order.cell_mass().to(ratio.dtype)
        uniform = torch.rand(
            1 + 700 * (seed % 3 + 1), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        found = order_module._distinct(order, ratio, mass, uniform)
        expected = order_module._distinct_by_torch(order, ratio, mass, uniform)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-12 if seed % 2 == 0 else 1e-6, atol=0)
        assert (found[1] > 0).all() and found[0].unique().shape == found[0].shape
        # The prior of a label, times what its cell has more.
        own = torch.zeros(num_labels, dtype=torch.float64)
        own[order.labels.long()] = order.cumulative_mass.diff(prepend=torch.zeros(1))
        cell_of = torch.empty(num_labels, dtype=torch.int64)
        cell_of[order.labels.long()] = torch.repeat_interleave(torch.arange(codewords**2), order.cell_starts.diff())
        torch.testing.assert_close(found[1].double(), (own * ratio[cell_of])[found[0]], rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_one_walk_finds_all_cells(size: int) -> None:
    """Targets on the borders of cells and of all, cells without mass, in blocks and at the end."""
    rng = np.random.default_rng(size)
    law = np.where(rng.random(size) < 0.4, 0.0, rng.integers(1, 9, size)).astype(np.float32)
    law[size // 2] = 3.0
    sums = np.empty(-(-size // order_module._BLOCK))
    total = order_module._sum_blocks(law, sums)
    cumulative = np.cumsum(law.astype(np.float64))
    assert total == cumulative[-1]
    target = np.sort(np.concatenate([rng.random(300) * total, cumulative[cumulative < total], [0.0, total, total]]))
    cells, inside = np.empty(len(target), dtype=np.int64), np.empty(len(target))
    order_module._find_cells(law, sums, target, cells, inside)
    last = np.flatnonzero(law)[-1]
    expected = np.minimum(np.searchsorted(cumulative, target, side="right"), last)
    np.testing.assert_array_equal(cells, expected)
    below = cumulative[expected] - law[expected]
    np.testing.assert_allclose(inside, (target - below) / law[expected], atol=1e-12)
    nothing = np.full(size, np.nan, dtype=np.float32)
    order_module._find_cells(nothing, sums * np.nan, target, cells, inside)
    assert ((cells >= 0) & (cells < size)).all()


@pytest.mark.parametrize("num_labels", [3, 400, 100_000])
def test_compiled_weights_are_those_of_torch(num_labels: int) -> None:
    """Positives with repeats, of labels that no instance, one, or every instance has; draws among them and others."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        frequency = rng.integers(0, [40, 890][seed % 2], num_labels) * (rng.random(num_labels) < 0.8)
        frequency[-1] = 9000
        dtype = (np.int32, np.int64, np.float32, np.float64)[seed % 4]
        law = InBatchSampler(torch.from_numpy(frequency.astype(dtype)), num_instances=9000)
        positives = torch.from_numpy(rng.integers(0, num_labels, rng.integers(1, 900)))
        label_ids = torch.from_numpy(rng.permutation(num_labels)[: rng.integers(0, min(num_labels, 700))])
        log_weight = torch.from_numpy(rng.normal(size=len(label_ids)) - 2.0)
        drawn = LabelSample(label_ids=label_ids, log_weight=log_weight.float() if seed % 2 else log_weight)
        for num_others in (0, 63, 8999):
            found = two_samples(positives, drawn, law, num_others, 700)
            expected = pools_module._two_samples_by_torch(positives, drawn, law, num_others, 700)
            assert torch.equal(found[0], expected[0]) and (found[0].diff() > 0).all()
            torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-9)
    # More instances of a label than there are in all, and shares of one.
    law = InBatchSampler(torch.tensor([17.0, 40.0, 0.5, 3.25]), num_instances=9)
    found, expected = (
        make(torch.arange(4), LabelSample(label_ids=torch.tensor([2]), log_weight=torch.zeros(1)), law, 4, 1)
        for make in (two_samples, pools_module._two_samples_by_torch)
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(IndexError, match="expected those of 4 labels"):
        two_samples(torch.arange(5), drawn, law, 4, 1)


def test_the_number_that_finds_a_cell_finds_its_label_by_the_prior_whatever_the_cell() -> None:
    """Draw one by one, for then none is the repeat of another: chi-square of the labels inside of each cell."""
    labels_per_cell = 9
    codes = torch.arange(4).repeat_interleave(labels_per_cell).to(torch.int16)
    words = torch.zeros(2, 2)
    codebook = Codebook(quantizer="pq", codewords1=words, codewords2=words, codes1=codes // 2, codes2=codes % 2)
    prior = torch.rand(codes.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    order = CellOrder.build(codebook, lambda label_ids: prior[label_ids].log())
    generator = torch.Generator().manual_seed(0)
    law = torch.tensor([2.0, 0.0, 1.0, 0.1], dtype=torch.float64)
    drawn = torch.cat([order.draw_distinct(law, torch.ones_like(law), 1, generator)[0] for _ in range(60_000)])
    count = torch.bincount(drawn, minlength=codes.shape[0])
    assert count[codes == 1].sum() == 0
    for cell in (0, 2, 3):
        mine, share = count[codes == cell], prior[codes == cell] / prior[codes == cell].sum()
        assert stats.chisquare(mine.numpy(), (share * mine.sum()).numpy()).pvalue > 1e-3
        assert abs(mine.sum() - 60_000 * law[cell] / law.sum()) < 4.5 * math.sqrt(mine.sum())


def test_a_pool_holds_no_label_that_is_in_it_anyway() -> None:
    drawn, law = torch.tensor([7, 3, 11, 0]), torch.full((12,), 1 / 12)

    def draw_labels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return drawn, law[drawn]

    for certain, left in (([3, 8], [7, 11, 0]), ([], [7, 3, 11, 0]), ([0, 3, 7, 11], []), ([11], [7, 3, 0])):
        pool = draw_pool(draw_labels, lambda ids: law[ids], 4, torch.tensor(certain, dtype=torch.int64))
        assert pool.label_ids.tolist() == left


class TestInBatch:
    """The batch's positives as negatives: a weight, but no density."""

    frequency = torch.tensor([0, 1, 5, 40, 100])

    def test_the_weight_of_a_positive_is_its_chance_to_be_in_the_rest_of_a_batch(self) -> None:
        """The hypergeometric law of the other instances of a batch, from one label in 4,000 instances to most of 60."""
        for num_instances, batch_size in ((60, 8), (60, 59), (4000, 64), (500_000, 1024)):
            frequencies = sorted({1, 2, 7, num_instances // 50, num_instances // 2, num_instances - batch_size})
            law = stats.hypergeom(num_instances - 1, np.array(frequencies), batch_size - 1)
            sampler = InBatchSampler(torch.tensor(frequencies), num_instances=num_instances)
            found = sampler.log_inclusion(torch.arange(len(frequencies)), batch_size - 1).exp().numpy()
            np.testing.assert_allclose(found, 1 - law.pmf(0), atol=2e-3)
            np.testing.assert_allclose(found[0], (batch_size - 1) / (num_instances - 1), rtol=1e-9)

    def test_labels_that_all_or_none_have_are_certain_or_impossible(self) -> None:
        sampler = InBatchSampler(self.frequency, num_instances=100)
        found = sampler.log_inclusion(torch.tensor([0, 4]), 8).exp()
        assert found[0] == 0.0 and found[1] == pytest.approx(1.0, abs=1e-6)
        assert torch.isneginf(sampler.log_inclusion(torch.arange(5), 0)).all(), "a batch of one has no others"
        assert sampler.positives_per_instance == 1.46

    def test_the_sum_over_random_batches_is_the_sum_over_the_seen_labels(self) -> None:
        rng = np.random.default_rng(0)
        owner = rng.integers(0, 12, size=60)
        frequency_L = torch.from_numpy(np.bincount(owner, minlength=15))
        sampler = InBatchSampler(frequency_L, num_instances=61)
        logits = torch.from_numpy(rng.normal(size=15))
        estimates = []
        for _ in range(3000):
            batch = torch.unique(torch.from_numpy(owner[rng.permutation(60)[:6]]))
            estimates.append(float((logits[batch] - sampler.log_inclusion(batch, 6)).exp().sum()))
        truth = float(logits[frequency_L > 0].exp().sum())
        error = np.std(estimates) / math.sqrt(len(estimates))
        assert abs(np.mean(estimates) - truth) < 4 * error

    def test_a_density_is_refused(self) -> None:
        sampler = InBatchSampler(self.frequency, num_instances=100)
        with pytest.raises(NotImplementedError, match="no density"):
            sampler.log_proposal(torch.zeros(1, 2), torch.arange(5))
        with pytest.raises(NotImplementedError, match="shared by the batch"):
            sampler.sample(torch.zeros(1, 2), 3, torch.Generator())

    def test_nothing_is_drawn(self) -> None:
        sampler = InBatchSampler(self.frequency, num_instances=100)
        pool = sampler.sample_pool(torch.zeros(3, 2), 10, torch.Generator())
        assert pool.label_ids.shape == pool.log_weight.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "opq"}, "quantizer 'opq'"),
        ({"prior": "zipf"}, "prior 'zipf'"),
        ({"prior": "frequency"}, "label_frequencies"),
    ],
)
def test_wrong_options_of_midx_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MidxSampler(**{"quantizer": "pq", "num_codewords": 2, "prior": "uniform", **options})


def test_codebooks_of_another_size_are_refused_and_none_are_forgotten() -> None:
    case = make_case("midx-pq-uniform")
    state = case.sampler.state_dict()
    other = MidxSampler(quantizer="pq", num_codewords=5, prior="uniform")
    with pytest.raises(RuntimeError, match="4 codewords, expected 5"):
        other.load_state_dict(state, case.bias)
    case.sampler.load_state_dict({}, case.bias)
    assert not case.sampler.fitted


def test_random_features_of_a_table_that_is_not_finite_draw_labels_that_are_there() -> None:
    softmax = LabelSoftmax(60, 6, sampler=RandomFeatureSampler(num_features=8), num_draws=10)
    with torch.no_grad():
        softmax.weight[11] = float("nan")
    generator = torch.Generator().manual_seed(0)
    loss = softmax(torch.randn(5, 6, generator=generator), torch.arange(5))
    assert not torch.isfinite(loss)
