"""The label softmax: loss and gradients against autograd in float64, unbiased estimates, edges, training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from xmc_midx import softmax as softmax_module
from xmc_midx.samplers.dense import SoftmaxSampler
from xmc_midx.samplers.kernel import QuadraticKernelSampler, RandomFeatureSampler
from xmc_midx.samplers.lsh import LshSampler
from xmc_midx.samplers.midx import MidxSampler
from xmc_midx.samplers.static import FrequencySampler, InBatchSampler, UniformSampler
from xmc_midx.softmax import LabelSoftmax, MIDXSoftmax
from xmc_midx.types import LabelSample, Sampler

L, D = 17, 5
RAGGED = [[3, 0, 16], [], [5], [2, 3], [], [16, 4, 5, 6, 7], [1]]
"""Positives of seven instances; labels 3, 5 and 16 belong to two of them."""


def offsets_of(positives: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([label for row in positives for label in row], dtype=torch.int64)
    return ids, torch.tensor([0, *np.cumsum([len(row) for row in positives])], dtype=torch.int64)


def make_queries(num_rows: int = len(RAGGED), dim: int = D, *, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_rows, dim, generator=generator)).requires_grad_()


def make_softmax(sampler: Sampler | None, num_labels: int = L, dim: int = D, **options: Any) -> LabelSoftmax:
    softmax = LabelSoftmax(num_labels, dim, sampler=sampler, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        softmax.weight.normal_(generator=generator)
        softmax.bias.normal_(generator=generator)
    softmax.refresh()
    return softmax


class Fixed:
    """A sampler that returns what it is told to: `log_weight[label]` for each label in it."""

    fitted = True

    def __init__(self, pool: dict[int, float], own: Sequence[Sequence[int]] = ()) -> None:
        self.pool, self.own = pool, own

    def refresh(self, label_table_LD: torch.Tensor, bias_L: torch.Tensor) -> None:
        pass

    def sample_pool(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        ids = sorted(self.pool)
        return LabelSample(label_ids=torch.tensor(ids), log_weight=torch.tensor([self.pool[i] for i in ids]))

    def sample(self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator) -> LabelSample:
        assert len(self.own) == query_BD.shape[0]
        weights = [[self.pool[label] for label in row] for row in self.own]
        return LabelSample(label_ids=torch.tensor(self.own), log_weight=torch.tensor(weights))

    def log_proposal(self, query_BD: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor], bias_L: torch.Tensor) -> None:
        pass


class Reference:
    """The loss by its definition: float64, autograd, an instance and a positive at a time."""

    def __init__(self, softmax: LabelSoftmax, query_BD: torch.Tensor) -> None:
        self.query = query_BD.detach().double().requires_grad_()
        self.weight = softmax.weight.detach().double().requires_grad_()
        self.bias = softmax.bias.detach().double().requires_grad_()

    def loss(
        self,
        positives: Sequence[Sequence[int]],
        negatives: Sequence[Sequence[tuple[int, float]]],
        *,
        weighting: str,
        decoupled: bool,
    ) -> torch.Tensor:
        """`negatives[i]`: the (label, log weight) pairs that instance i is scored against, its positives left out."""
        terms, weights = [], []
        for i, row in enumerate(positives):
            logits = self.weight @ self.query[i] + self.bias
            rest = [logits[label] - log_weight for label, log_weight in negatives[i] if label not in row]
            for positive in row:
                others = [logits[positive]] if decoupled else [logits[label] for label in row]
                terms.append(torch.logsumexp(torch.stack(rest + others), 0) - logits[positive])
                weights.append(1.0 / len(row) if weighting == "mean" else 1.0)
        total = torch.stack(terms) * torch.tensor(weights, dtype=torch.float64)
        return total.sum() / sum(weights)


def dense(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def assert_same_loss_and_gradients(
    softmax: LabelSoftmax, query_BD: torch.Tensor, positives: Any, reference: Reference, expected: torch.Tensor
) -> None:
    # A factor, so that the incoming gradient is not 1.
    loss = softmax(query_BD, positives)
    assert loss.shape == () and loss.dtype == torch.float32
    (3.0 * loss).backward()
    (3.0 * expected).backward()
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=2e-6)
    pairs = [
        (query_BD.grad, reference.query.grad),
        (dense(softmax.weight.grad), reference.weight.grad),
        (dense(softmax.bias.grad), reference.bias.grad),
    ]
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=3e-6)
    assert softmax.weight.grad is not None and softmax.weight.grad.is_sparse == softmax.sparse


VARIANTS = pytest.mark.parametrize(
    ("weighting", "decoupled"), [("mean", True), ("mean", False), ("sum", True), ("sum", False)]
)
SPARSE = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@pytest.fixture(params=["whole", "chunked"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths of the pool loss: one matrix of logits, or never more than three columns of it."""
    if request.param == "chunked":
        monkeypatch.setattr(softmax_module, "_CHUNK_ELEMENTS", 3 * len(RAGGED) + 1)


# --------------------------------------------------------------- loss and gradient


@pytest.mark.usefixtures("chunks")
@VARIANTS
@SPARSE
@pytest.mark.parametrize("source", ["full", "uniform", "midx", "all drawn by chance"])
def test_with_all_labels_in_the_pool_it_is_the_full_softmax(
    weighting: str, decoupled: bool, sparse: bool, source: str
) -> None:
    sampler: Sampler | None = {
        "full": None,
        "uniform": UniformSampler(L),
        "midx": MidxSampler(quantizer="pq", num_codewords=3, prior="bias"),
        "all drawn by chance": Fixed(dict.fromkeys(range(L), 0.0)),
    }[source]
    num_draws = 1 if source == "all drawn by chance" else L
    softmax = make_softmax(sampler, num_draws=num_draws, weighting=weighting, decoupled=decoupled, sparse=sparse)
    query_BD = make_queries()
    reference = Reference(softmax, query_BD)
    everything = [[(label, 0.0) for label in range(L)]] * len(RAGGED)
    expected = reference.loss(RAGGED, everything, weighting=weighting, decoupled=decoupled)
    assert_same_loss_and_gradients(softmax, query_BD, offsets_of(RAGGED), reference, expected)
    assert softmax.pool_size == L


@pytest.mark.usefixtures("chunks")
@VARIANTS
@SPARSE
def test_a_pool_is_the_batchs_positives_at_weight_one_and_the_draws_at_theirs(
    weighting: str, decoupled: bool, sparse: bool
) -> None:
    drawn = {1: -2.0, 3: -1.5, 8: -0.7, 9: -3.0, 12: 0.0, 16: -0.1}
    softmax = make_softmax(Fixed(drawn), num_draws=6, weighting=weighting, decoupled=decoupled, sparse=sparse)
    certain = {label for row in RAGGED for label in row}
    pool = [(label, 0.0 if label in certain else drawn[label]) for label in sorted(certain | set(drawn))]
    query_BD = make_queries()
    reference = Reference(softmax, query_BD)
    expected = reference.loss(RAGGED, [pool] * len(RAGGED), weighting=weighting, decoupled=decoupled)
    assert_same_loss_and_gradients(softmax, query_BD, offsets_of(RAGGED), reference, expected)
    assert softmax.pool_size == len(pool)
    if sparse:
        assert softmax.weight.grad is not None
        assert softmax.weight.grad._indices()[0].tolist() == [label for label, _ in pool]


@VARIANTS
@SPARSE
def test_own_draws_count_as_often_as_drawn_and_accidental_hits_do_not(
    weighting: str, decoupled: bool, sparse: bool
) -> None:
    rng = np.random.default_rng(0)
    own = rng.integers(0, L, size=(len(RAGGED), 9)).tolist()
    own[0][:4] = [3, 3, 16, 8]
    own[5] = [16, 4, 5, 6, 7, 4, 5, 6, 7]
    log_weight = dict(enumerate(rng.normal(size=L).astype(np.float32).tolist()))
    softmax = make_softmax(
        Fixed(log_weight, own),
        estimator="instance",
        num_draws=9,
        weighting=weighting,
        decoupled=decoupled,
        sparse=sparse,
    )
    query_BD = make_queries()
    reference = Reference(softmax, query_BD)
    negatives = [[(label, log_weight[label]) for label in row] for row in own]
    expected = reference.loss(RAGGED, negatives, weighting=weighting, decoupled=decoupled)
    assert_same_loss_and_gradients(softmax, query_BD, offsets_of(RAGGED), reference, expected)


@pytest.mark.usefixtures("chunks")
@VARIANTS
def test_in_batch_negatives_are_the_batchs_positives_at_their_weights(weighting: str, decoupled: bool) -> None:
    frequency_L = torch.arange(1, L + 1)
    softmax = make_softmax(
        InBatchSampler(frequency_L, num_instances=100), num_draws=L, weighting=weighting, decoupled=decoupled
    )
    chance = {label: 1 - (1 - (label + 1) / 100) ** len(RAGGED) for row in RAGGED for label in row}
    pool = [(label, math.log(chance[label])) for label in sorted(chance)]
    query_BD = make_queries()
    reference = Reference(softmax, query_BD)
    expected = reference.loss(RAGGED, [pool] * len(RAGGED), weighting=weighting, decoupled=decoupled)
    assert_same_loss_and_gradients(softmax, query_BD, offsets_of(RAGGED), reference, expected)


@pytest.mark.parametrize("decoupled", [True, False])
@SPARSE
def test_one_label_a_query_is_torchs_cross_entropy(decoupled: bool, sparse: bool) -> None:
    softmax = make_softmax(UniformSampler(L), num_draws=L, decoupled=decoupled, sparse=sparse)
    query_BD = make_queries(6)
    target = torch.tensor([3, 3, 0, 16, 8, 1])
    loss = softmax(query_BD, target)
    loss.backward()
    other = query_BD.detach().clone().requires_grad_()
    table, bias = (p.detach().clone().requires_grad_() for p in (softmax.weight, softmax.bias))
    expected = torch.nn.functional.cross_entropy(other @ table.T + bias, target)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(query_BD.grad, other.grad)
    torch.testing.assert_close(dense(softmax.weight.grad), table.grad)
    torch.testing.assert_close(dense(softmax.bias.grad), bias.grad)


@pytest.mark.parametrize("estimator", ["pool", "instance"])
def test_leading_dimensions_are_rows(estimator: str) -> None:
    def make() -> LabelSoftmax:
        return make_softmax(UniformSampler(L), num_draws=8, estimator=estimator, seed=5)

    queries = make_queries(6)
    target = torch.tensor([3, 3, 0, 16, 8, 1])
    flat = make()(queries, target)
    assert torch.equal(make()(queries.view(2, 3, D), target.view(2, 3)), flat)
    assert torch.equal(make()(queries.view(2, 3, D), (target, torch.arange(7))), flat)
    # One target a query is a pair with one label a row.
    assert make()(queries[0], target[:1]).shape == ()


def test_a_label_without_bias_has_none() -> None:
    softmax = LabelSoftmax(L, D, sampler=None, bias=False)
    query_BD = make_queries(3)
    loss = softmax(query_BD, torch.tensor([1, 2, 3]))
    loss.backward()
    expected = torch.nn.functional.cross_entropy(query_BD @ softmax.weight.T, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(loss, expected)
    assert softmax.bias.grad is None and not softmax.bias.any()


def test_a_second_batch_adds_its_gradient_to_the_first() -> None:
    gradients = []
    for sparse in (False, True):
        softmax = make_softmax(Fixed({1: -1.0, 9: -2.0}), num_draws=2, sparse=sparse)
        for seed in (1, 2):
            softmax(make_queries(seed=seed), offsets_of(RAGGED if seed == 1 else RAGGED[::-1])).backward()
        gradients.append(dense(softmax.weight.grad))
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------- unbiasedness

SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    **{
        f"midx-{quantizer}-{prior}": lambda num_labels, quantizer=quantizer, prior=prior: MidxSampler(  # type: ignore[misc]
            quantizer=quantizer, num_codewords=3, prior=prior, label_frequencies=torch.arange(num_labels)
        )
        for quantizer in ("pq", "rq")
        for prior in ("uniform", "frequency", "bias")
    },
    "uniform": UniformSampler,
    "frequency": lambda num_labels: FrequencySampler(torch.arange(num_labels)),
    "softmax": lambda _: SoftmaxSampler(),
    "quadratic-kernel": lambda _: QuadraticKernelSampler(),
    "rff": lambda _: RandomFeatureSampler(num_features=20),
    "lsh": lambda _: LshSampler(num_tables=4, num_bits=2),
}


def assert_unbiased(estimates: torch.Tensor, truth: torch.Tensor) -> None:
    """Means over dimension 0 within 4 standard errors of the truth, and an error small enough to mean something."""
    error = estimates.std(0) / math.sqrt(estimates.shape[0])
    assert (error < 0.1 * truth.abs()).all()
    assert ((estimates.mean(0) - truth).abs() < 4 * error).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_pools_estimate_of_the_partition_function_is_unbiased(name: str) -> None:
    softmax = make_softmax(SAMPLERS[name](L), num_draws=6)
    query_BD = make_queries(len(RAGGED), scale=0.4).detach()
    ids, offsets = offsets_of(RAGGED)
    logits_BL = (query_BD @ softmax.weight.T + softmax.bias).detach().double()
    mine_BL = torch.zeros(len(RAGGED), L, dtype=torch.bool)
    mine_BL[torch.repeat_interleave(torch.arange(len(RAGGED)), offsets.diff()), ids] = True
    logits_BL = logits_BL.masked_fill(mine_BL, -torch.inf)
    estimates = torch.empty(400, len(RAGGED), dtype=torch.float64)
    for repetition in range(400):
        pool, log_weight = softmax._pool(query_BD, ids)
        estimates[repetition] = (logits_BL[:, pool] - log_weight).exp().sum(1)
    assert_unbiased(estimates, logits_BL.exp().sum(1))


@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loss_estimates_the_partition_function_without_bias(name: str, estimator: str) -> None:
    # One instance with positives: decoupled, exp(loss of p) - 1 is exp(S - o_p). The other queries only draw.
    softmax = make_softmax(SAMPLERS[name](L), num_draws=6, estimator=estimator)
    query_BD = make_queries(3, scale=0.4).detach()
    positives = offsets_of([[], [4], []])
    logits_L = (query_BD[1] @ softmax.weight.T + softmax.bias).detach().double()
    others = torch.arange(L) != 4
    with torch.no_grad():
        losses = torch.stack([softmax(query_BD, positives) for _ in range(400)]).double()
    assert_unbiased(torch.expm1(losses) * logits_L[4].exp(), logits_L[others].exp().sum())


@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gradient_of_the_estimated_partition_function_is_unbiased(name: str, estimator: str) -> None:
    # d exp(S - o_p) = exp(loss) d loss.
    softmax = make_softmax(SAMPLERS[name](L), num_draws=8, estimator=estimator)
    query_BD = make_queries(3, scale=0.7)
    positives = offsets_of([[], [4], []])
    reference = query_BD.detach()[1].double().requires_grad_()
    logits_L = softmax.weight.detach().double() @ reference + softmax.bias.detach().double()
    (logits_L[torch.arange(L) != 4].exp().sum() / logits_L[4].exp()).backward()
    estimates = torch.empty(500, D, dtype=torch.float64)
    for repetition in range(500):
        loss = softmax(query_BD, positives)
        (gradient,) = torch.autograd.grad(loss.exp(), query_BD)
        estimates[repetition] = gradient[1]
    assert reference.grad is not None
    error = estimates.std(0) / math.sqrt(500)
    assert ((estimates.mean(0) - reference.grad).abs() < 4 * error).all()
    assert (error < 0.15 * reference.grad.norm()).all()


@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_enough_draws_the_mean_gradient_is_the_full_softmaxs(name: str, estimator: str) -> None:
    """The loss is the log of an unbiased estimate, its gradient a ratio of two: biased by O(1 / draws), which these
    draws put well below the error of the mean."""
    num_labels, repetitions = 2000, 64
    softmax = make_softmax(SAMPLERS[name](num_labels), num_labels, num_draws=1999, estimator=estimator)
    full = make_softmax(None, num_labels)
    query_BD, positives = make_queries(4, scale=0.4), offsets_of([[7], [], [3, 250], [7, 9]])
    # A label's own row is touched by few draws; sums over the labels, with these signs, are near to normal.
    signs = torch.randn(3, num_labels, generator=torch.Generator().manual_seed(3))

    def gradients(module: LabelSoftmax) -> torch.Tensor:
        query, rows, bias = torch.autograd.grad(module(query_BD, positives), (query_BD, module.weight, module.bias))
        return torch.cat([query.flatten(), (signs @ rows).flatten(), signs @ bias]).double()

    estimates, truth = torch.stack([gradients(softmax) for _ in range(repetitions)]), gradients(full)
    error = estimates.std(0) / math.sqrt(repetitions)
    assert ((estimates.mean(0) - truth).abs() < 4 * error + 1e-7).all()
    assert error.norm() < 0.02 * truth.norm()


# ------------------------------------------------------------------------- edges

EDGES: dict[str, tuple[int, list[list[int]]]] = {
    "one label": (1, [[0], [], [0]]),
    "positives fill the pool": (6, [[0, 1], [2, 3], [4, 5]]),
    "all labels are an instance's positives": (6, [[0, 1, 2, 3, 4, 5], [1], []]),
    "all labels are everyone's positives": (6, [[0, 1, 2, 3, 4, 5]] * 3),
    "two labels": (2, [[0], [1], [0, 1]]),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("decoupled", [True, False])
@SPARSE
@pytest.mark.parametrize("how", ["full", "midx pool", "midx instance", "uniform pool", "in-batch"])
@pytest.mark.parametrize(("scale", "chunk"), [(1.0, None), (1e3, None), (1e3, 2)])
def test_edges_have_a_finite_loss_and_finite_gradients(
    edge: str, decoupled: bool, sparse: bool, how: str, scale: float, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(softmax_module, "_CHUNK_ELEMENTS", chunk * 3)
    num_labels, positives = EDGES[edge]
    sampler: Sampler | None = {
        "full": None,
        "midx": MidxSampler(quantizer="rq", num_codewords=4, prior="uniform"),
        "uniform": UniformSampler(num_labels),
        "in-batch": InBatchSampler(torch.zeros(num_labels), num_instances=9),
    }[how.split()[0]]
    softmax = make_softmax(
        sampler,
        num_labels,
        num_draws=max(1, num_labels - 1),
        estimator="instance" if how.endswith("instance") else "pool",
        decoupled=decoupled,
        sparse=sparse,
    )
    query_BD = make_queries(3, scale=scale)
    loss = softmax(query_BD, offsets_of(positives))
    loss.backward()
    assert torch.isfinite(loss) and loss >= 0
    for gradient in (query_BD.grad, dense(softmax.weight.grad), dense(softmax.bias.grad)):
        assert gradient is not None and torch.isfinite(gradient).all()
    if edge == "one label" or (edge == "all labels are everyone's positives" and decoupled):
        assert loss == 0, "there is nothing to tell the positives from"


@pytest.mark.parametrize("estimator", ["pool", "instance"])
@SPARSE
def test_a_batch_without_positives_has_no_loss_and_no_gradient(estimator: str, sparse: bool) -> None:
    softmax = make_softmax(UniformSampler(L), num_draws=4, estimator=estimator, sparse=sparse)
    query_BD = make_queries(3)
    loss = softmax(query_BD, offsets_of([[], [], []]))
    loss.backward()
    assert loss == 0 and query_BD.grad is not None and not query_BD.grad.any()
    assert softmax.weight.grad is None or not softmax.weight.grad.to_dense().any()


@pytest.mark.parametrize("estimator", ["pool", "instance"])
def test_no_queries_have_no_loss(estimator: str) -> None:
    softmax = make_softmax(UniformSampler(L), num_draws=4, estimator=estimator)
    assert softmax(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64)) == 0
    assert softmax(torch.zeros(0, D), offsets_of([])) == 0


def test_an_instance_without_positives_gets_no_gradient() -> None:
    for estimator in ("pool", "instance"):
        softmax = make_softmax(UniformSampler(L), num_draws=4, estimator=estimator)
        query_BD = make_queries()
        softmax(query_BD, offsets_of(RAGGED)).backward()
        assert query_BD.grad is not None
        assert query_BD.grad.abs().sum(1).gt(0).tolist() == [bool(row) for row in RAGGED]


def test_wrong_shapes_and_options_are_refused() -> None:
    softmax = make_softmax(None)
    with pytest.raises(ValueError, match="2 positives for 3 queries"):
        softmax(make_queries(3), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="3 offsets for 3 queries"):
        softmax(make_queries(3), (torch.tensor([1, 2]), torch.tensor([0, 1, 2])))
    for wrong in (-1, -100, L):
        with pytest.raises(ValueError, match=f"expected label ids 0 to {L - 1}"):
            softmax(make_queries(2), torch.tensor([wrong, 3]))
    with pytest.raises(ValueError, match="estimator 'both'"):
        LabelSoftmax(3, 2, sampler=None, estimator="both")
    with pytest.raises(ValueError, match="weighting 'max'"):
        LabelSoftmax(3, 2, sampler=None, weighting="max")


# --------------------------------------------------------------------- precision


@pytest.mark.usefixtures("chunks")
@VARIANTS
def test_bfloat16_products_stay_close_to_float32(weighting: str, decoupled: bool) -> None:
    results = []
    for precision in (torch.float32, torch.bfloat16):
        softmax = make_softmax(None, weighting=weighting, decoupled=decoupled, precision=precision)
        query_BD = make_queries()
        loss = softmax(query_BD, offsets_of(RAGGED))
        loss.backward()
        assert loss.dtype == query_BD.dtype == torch.float32 and query_BD.grad is not None
        results.append((loss.item(), query_BD.grad, dense(softmax.weight.grad), dense(softmax.bias.grad)))
    exact, rounded = results
    # bfloat16 keeps 8 bits: each product is off by 2^-8 of itself, a logit of these sizes by about 0.01.
    assert abs(rounded[0] - exact[0]) < 0.01 * exact[0]
    for coarse, fine in zip(rounded[1:], exact[1:], strict=True):
        assert isinstance(coarse, torch.Tensor) and isinstance(fine, torch.Tensor)
        assert (coarse - fine).norm() < 0.02 * fine.norm()


def test_half_precision_queries_get_gradients_of_their_own_type() -> None:
    softmax = make_softmax(None)
    query_BD = make_queries().detach().bfloat16().requires_grad_()
    softmax(query_BD, offsets_of(RAGGED)).backward()
    assert query_BD.grad is not None and query_BD.grad.dtype == torch.bfloat16


# ------------------------------------------------------------- the rest of the module


def test_log_prob_is_the_full_softmax_and_sums_to_one() -> None:
    softmax = make_softmax(UniformSampler(L), num_draws=3)
    queries = make_queries(6).detach().view(2, 3, D)
    log_prob = softmax.log_prob(queries)
    assert log_prob.shape == (2, 3, L) and not log_prob.requires_grad
    np.testing.assert_allclose(log_prob.double().exp().sum(-1).numpy(), 1.0, atol=1e-5)
    logits = queries.double() @ softmax.weight.detach().double().T + softmax.bias.detach().double()
    np.testing.assert_allclose(log_prob.numpy(), torch.log_softmax(logits, -1).numpy(), atol=1e-5)


def test_topk_is_the_sorted_log_prob() -> None:
    softmax = make_softmax(None)
    queries = make_queries(6)
    found = softmax.topk(queries.view(2, 3, D), 4)
    logits = (queries @ softmax.weight.T + softmax.bias).detach().numpy()
    np.testing.assert_array_equal(found.label_ids, np.argsort(-logits, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(found.scores, -np.sort(-logits, axis=1)[:, :4], rtol=1e-5)


def test_the_state_dict_restores_the_softmax() -> None:
    softmax = make_softmax(UniformSampler(L), num_draws=3)
    other = LabelSoftmax(L, D, sampler=UniformSampler(L), num_draws=3, seed=9)
    assert set(softmax.state_dict()) == {"weight", "bias"}
    other.load_state_dict(softmax.state_dict())
    queries = make_queries().detach()
    assert torch.equal(other.log_prob(queries), softmax.log_prob(queries))


def test_the_seed_decides_table_and_draws_and_the_global_generator_is_left_alone() -> None:
    def loss(seed: int) -> list[float]:
        softmax = MIDXSoftmax(60, D, num_draws=8, num_codewords=4, seed=seed)
        return [softmax(make_queries(), offsets_of(RAGGED)).item() for _ in range(3)]

    before = torch.get_rng_state()
    first = loss(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert loss(1) == first and loss(2) != first
    assert len(set(first)) == 3, "each step draws anew"


def test_a_copied_softmax_goes_on_like_the_original() -> None:
    softmax = MIDXSoftmax(60, D, num_draws=8, num_codewords=4)
    twin = copy.deepcopy(softmax)
    queries = make_queries().detach()
    losses = [[s(queries, offsets_of(RAGGED)).item() for _ in range(3)] for s in (softmax, twin)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_midx_softmax_is_ready_to_use_and_derives_its_sizes(quantizer: str) -> None:
    softmax = MIDXSoftmax(5000, 7, quantizer=quantizer)
    assert softmax.num_draws == 2048
    assert isinstance(softmax.sampler, MidxSampler) and softmax.sampler.num_codewords == round(math.sqrt(5000) / 2)
    assert torch.isfinite(softmax(make_queries(4, 7), torch.tensor([1, 4999, 3, 3])))
    assert softmax.sampler.codebook is not None, "the first use fitted it"
    assert MIDXSoftmax(5000, 7, estimator="instance").num_draws == 64
    assert MIDXSoftmax(100, 7).num_draws == 100


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_midx_softmax_works_for_the_smallest_sizes(quantizer: str) -> None:
    softmax = MIDXSoftmax(1, 2, quantizer=quantizer, num_draws=1, num_codewords=1)
    assert softmax(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)) == 0


@SPARSE
@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_midx_softmax_trains_a_linear_classifier(sparse: bool, estimator: str, quantizer: str) -> None:
    num_classes, dim = 50, 12
    generator = torch.Generator().manual_seed(0)
    centres = 2.5 * torch.randn(num_classes, 20, generator=generator)
    classes = torch.arange(1500) % num_classes
    inputs = centres[classes] + 0.5 * torch.randn(1500, 20, generator=generator)
    torch.manual_seed(0)
    encoder = nn.Linear(20, dim)
    softmax = MIDXSoftmax(
        num_classes, dim, num_codewords=4, num_draws=12, estimator=estimator, quantizer=quantizer, sparse=sparse
    )
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(encoder.parameters(), lr=0.02)]
    table_optimizer = torch.optim.SparseAdam if sparse else torch.optim.Adam
    optimizers.append(table_optimizer(list(softmax.parameters()), lr=0.02))
    losses = []
    for _ in range(6):
        softmax.refresh()
        for part in torch.randperm(1500, generator=generator).split(100):
            loss = softmax(encoder(inputs[part]), classes[part])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
    assert softmax.pool_size < num_classes or estimator == "instance", "the negatives were drawn"
    assert np.mean(losses[-15:]) < 0.25 * losses[0]
    top = softmax.topk(encoder(inputs), 1)
    assert np.mean(top.label_ids[:, 0] == classes.numpy()) > 0.9
