"""The label softmax: loss and gradients against autograd in float64, unbiased estimates, edges, training; and what
PyTorch expects of a module: state, dtypes, autocast, compile, optimisers, devices."""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import stats
from torch import nn

from xmc_midx import estimators
from xmc_midx.optim import RowAdam
from xmc_midx.samplers.dense import SoftmaxSampler
from xmc_midx.samplers.dynamic import HardNegativeSampler
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

    def sample_pool(
        self, query_BD: torch.Tensor, num_draws: int, generator: torch.Generator, certain: torch.Tensor | None = None
    ) -> LabelSample:
        ids = sorted(set(self.pool) - set([] if certain is None else certain.tolist()))
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


def loss_and_gradients(softmax: LabelSoftmax, factor: float = 1.0) -> tuple[float, list[torch.Tensor]]:
    """The loss of `RAGGED`, and the gradients of `factor` times it by queries, table and bias."""
    query_BD = make_queries()
    loss = softmax(query_BD, offsets_of(RAGGED))
    (factor * loss).backward()
    return loss.item(), [dense(given.grad) for given in (query_BD, softmax.weight, softmax.bias)]


def assert_same_loss_and_gradients(
    softmax: LabelSoftmax,
    query_BD: torch.Tensor,
    positives: Any,
    reference: Reference,
    expected: torch.Tensor,
    *,
    tolerance: float = 3e-6,
) -> None:
    # A factor, so that the incoming gradient is not 1.
    loss = softmax(query_BD, positives)
    assert loss.shape == () and loss.dtype == softmax.weight.dtype
    (3.0 * loss).backward()
    (3.0 * expected).backward()
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=tolerance)
    pairs = [
        (query_BD.grad, reference.query.grad),
        (dense(softmax.weight.grad), reference.weight.grad),
        (dense(softmax.bias.grad), reference.bias.grad),
    ]
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=tolerance)
    assert softmax.weight.grad is not None and softmax.weight.grad.is_sparse == softmax.sparse


VARIANTS = pytest.mark.parametrize(
    ("weighting", "decoupled"), [("mean", True), ("mean", False), ("sum", True), ("sum", False)]
)
SPARSE = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@pytest.fixture(params=["whole", "chunked"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths of the pool loss: one matrix of logits, or never more than three columns of it."""
    if request.param == "chunked":
        monkeypatch.setattr(estimators, "_CHUNK_ELEMENTS", {"cpu": 3 * len(RAGGED) + 1})


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
    law = stats.hypergeom(99, np.arange(1, L + 1), len(RAGGED) - 1)
    assert isinstance(softmax.sampler, InBatchSampler)
    chances = softmax.sampler.log_inclusion(torch.arange(L), len(RAGGED) - 1).exp().numpy()
    np.testing.assert_allclose(chances, 1 - law.pmf(0), atol=2e-3)
    chance = {label: float(chances[label]) for row in RAGGED for label in row}
    pool = [(label, math.log(chance[label])) for label in sorted(chance)]
    query_BD = make_queries()
    reference = Reference(softmax, query_BD)
    expected = reference.loss(RAGGED, [pool] * len(RAGGED), weighting=weighting, decoupled=decoupled)
    assert_same_loss_and_gradients(softmax, query_BD, offsets_of(RAGGED), reference, expected)


@pytest.mark.usefixtures("chunks")
@VARIANTS
@SPARSE
@pytest.mark.parametrize("sizes", [[7], [2, 2, 3], [1] * 7], ids=["whole", "groups", "each"])
def test_positives_as_a_sample_are_weighed_against_the_draws(
    weighting: str, decoupled: bool, sparse: bool, sizes: list[int]
) -> None:
    """w / P(in the group) where the group has the label, and (1 - w) / P(drawn) where it was drawn: a batch in groups
    shares the draws, a label of several groups has one gradient, and a group may have no positives (of one instance,
    its own are no negatives)."""
    frequency_L = torch.arange(1, L + 1)
    law = InBatchSampler(frequency_L, num_instances=100)
    drawn = {1: -2.0, 3: -1.5, 8: -0.7, 9: -3.0, 12: 0.0, 16: -0.1}
    softmax = make_softmax(
        Fixed(drawn),
        in_batch=law,
        num_draws=6,
        pool_instances=max(sizes),
        weighting=weighting,
        decoupled=decoupled,
        sparse=sparse,
    )
    negatives: list[list[tuple[int, float]]] = []
    for size in sizes:
        chance = law.log_inclusion(torch.arange(L), size - 1).exp().tolist()
        expected_positives = size * sum(range(1, L + 1)) / 100
        certain = {label for row in RAGGED[len(negatives) : len(negatives) + size] for label in row}
        pool = []
        for label in sorted(certain | set(drawn)):
            part = chance[label] + (1 - chance[label]) * expected_positives / (expected_positives + 6)
            part = part if chance[label] > 0 else 0.0
            weight = part / max(chance[label], 1e-9) if label in certain else 0.0
            weight += (1 - part) / math.exp(drawn[label]) if label in drawn else 0.0
            pool += [(label, -math.log(weight))] if weight > 0 else []
        negatives += [pool] * size
    query_BD = make_queries()
    reference = Reference(softmax, query_BD)
    expected = reference.loss(RAGGED, negatives, weighting=weighting, decoupled=decoupled)
    assert_same_loss_and_gradients(softmax, query_BD, offsets_of(RAGGED), reference, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": None, "in_batch": InBatchSampler(torch.arange(1, L + 1), num_instances=100)},
        {
            "sampler": InBatchSampler(torch.arange(1, L + 1), num_instances=100),
            "num_draws": 4,
            "in_batch": InBatchSampler(torch.arange(1, L + 1), num_instances=100),
        },
        {"sampler": UniformSampler(L), "num_draws": 4},
        {
            "sampler": UniformSampler(L),
            "num_draws": L,
            "in_batch": InBatchSampler(torch.arange(1, L + 1), num_instances=100),
        },
    ],
    ids=["full", "in-batch", "positives-certain", "all-labels"],
)
def test_there_are_groups_only_where_labels_are_drawn_beside_positives_that_are_a_sample(
    options: dict[str, Any],
) -> None:
    losses = []
    for pool_instances in (None, 2):
        softmax = make_softmax(**options, pool_instances=pool_instances)
        assert softmax._sizes_of_groups(7) == [7]
        losses.append(softmax(make_queries(), offsets_of(RAGGED)).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    ("pool_instances", "precision"), [(None, torch.float32), (3, torch.float32), (None, torch.bfloat16)]
)
def test_a_gradient_of_few_negatives_has_the_mean_of_the_whole(
    pool_instances: int | None, precision: torch.dtype, decoupled: bool
) -> None:
    """The loss is the same; with so many negatives that none is rounded, the gradients are, too; with two of an
    instance, their mean over seeds is."""

    def trained(gradient_negatives: int | None, seed: int = 0) -> tuple[float, list[torch.Tensor]]:
        softmax = make_softmax(
            Fixed(dict.fromkeys(range(0, L, 2), 0.0)),
            in_batch=InBatchSampler(torch.arange(1, L + 1), num_instances=100),
            num_draws=9,
            pool_instances=pool_instances,
            gradient_negatives=gradient_negatives,
            decoupled=decoupled,
            precision=precision,
            sparse=True,
            seed=seed,
        )
        return loss_and_gradients(softmax, 3.0)

    loss, dense_products = trained(None)
    same_loss, gradients = trained(10**9)
    assert same_loss == loss
    rough = precision == torch.bfloat16
    for found, expected in zip(gradients, dense_products, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2 if rough else 1e-4, atol=1e-2 if rough else 1e-6)
    # The reference is in float32, without what bfloat16 rounds in dense products.
    seeds = 200
    means = [torch.zeros_like(gradient) for gradient in gradients]
    squares = [torch.zeros_like(gradient) for gradient in gradients]
    for seed in range(seeds):
        few_loss, few = trained(2, seed)
        assert few_loss == loss
        for mean, square, gradient, expected in zip(means, squares, few, gradients, strict=True):
            mean += (gradient - expected) / seeds
            square += (gradient - expected) ** 2 / seeds
    for mean, square, gradient in zip(means, squares, gradients, strict=True):
        assert square.sum() > 0.01 * gradient.square().sum(), "something was rounded"
        # The mean of so many independent errors, against its standard error.
        assert mean.square().sum() < 3 * square.sum() / seeds


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_a_gradient_of_few_negatives_has_the_dtypes_of_the_table(dtype: torch.dtype, precision: torch.dtype) -> None:
    options = {"num_draws": L, "dtype": dtype, "precision": precision}
    losses, gradients = zip(
        *(
            loss_and_gradients(make_softmax(UniformSampler(L), gradient_negatives=negatives, **options))
            for negatives in (None, 10**9, 1)
        ),
        strict=True,
    )
    assert losses[0] == losses[1] == losses[2]
    assert {weight.dtype for _, weight, _ in gradients} == {dtype}
    whole, all_kept, rounded = gradients
    rough = precision == torch.bfloat16
    for found, expected in zip(all_kept, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2 if rough else 1e-2, atol=2e-3 if rough else 1e-4)
    # A loss in float64 is not rounded, whatever its products are in.
    assert torch.equal(rounded[1], all_kept[1]) == (dtype == torch.float64)


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {}])
def test_losses_in_float64_and_pools_in_chunks_take_the_whole_gradient(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not options:
        monkeypatch.setattr(estimators, "_CHUNK_ELEMENTS", {"cpu": 5 * len(RAGGED)})
    gradients = []
    for gradient_negatives in (None, 1):
        softmax = make_softmax(UniformSampler(L), num_draws=L, gradient_negatives=gradient_negatives, **options)
        gradients.append(loss_and_gradients(softmax)[1][1])
    assert torch.equal(*gradients)


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
    for shape in ((2, 3), (1, 6, 1), (3, 1, 2)):
        shaped = queries.view(*shape, D)
        assert torch.equal(make()(shaped, target.view(shape)), flat)
        # One target a query is a pair with one label a row.
        assert torch.equal(make()(shaped, (target, torch.arange(7))), flat)
    ids, offsets = offsets_of(RAGGED[:6])
    assert torch.equal(make()(queries.view(2, 3, D), (ids, offsets)), make()(queries, (ids, offsets)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("name", ["full", "uniform", "in-batch"])
def test_label_ids_may_be_any_integers(dtype: torch.dtype, name: str) -> None:
    def loss(positives: Any) -> torch.Tensor:
        found: torch.Tensor = make_softmax(STATEFUL[name](L), num_draws=8, seed=5)(make_queries(), positives)
        return found

    ids, offsets = offsets_of(RAGGED)
    assert torch.equal(loss((ids.to(dtype), offsets.to(dtype))), loss((ids, offsets)))
    assert torch.equal(loss(ids[:7].to(dtype)), loss(ids[:7]))


@pytest.mark.parametrize("estimator", ["pool", "instance"])
def test_a_single_query_is_a_batch_of_one(estimator: str) -> None:
    def make() -> LabelSoftmax:
        return make_softmax(UniformSampler(L), num_draws=8, estimator=estimator, seed=5)

    query = make_queries(1)
    expected = make()(query, torch.tensor([4]))
    assert torch.equal(make()(query[0], torch.tensor(4)), expected)
    assert torch.equal(make()(query[0], (torch.tensor([4]), torch.tensor([0, 1]))), expected)


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
@pytest.mark.fault("R17")
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
        pool, log_weight = softmax._pools(query_BD, [ids], [len(query_BD)])[0]
        estimates[repetition] = (logits_BL[:, pool] - log_weight).exp().sum(1)
    assert_unbiased(estimates, logits_BL.exp().sum(1))


@pytest.mark.parametrize("sizes", [[6], [3, 3]], ids=["whole", "groups"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.fault("R17")
def test_with_positives_as_a_sample_it_is_unbiased_over_random_batches(name: str, sizes: list[int]) -> None:
    """One instance of a collection of 40, in batches of 6 with others that are drawn without replacement."""
    rng = np.random.default_rng(0)
    collection = [rng.choice(L - 2, size=rng.integers(1, 4), replace=False).tolist() for _ in range(40)]
    frequency_L = torch.from_numpy(np.bincount([label for row in collection for label in row], minlength=L))
    assert frequency_L[-1] == 0, "there are labels without instances"
    law = InBatchSampler(frequency_L, num_instances=40)
    softmax = make_softmax(SAMPLERS[name](L), in_batch=law, num_draws=6)
    queries_ND = make_queries(40, scale=0.4).detach()
    logits_L = (queries_ND[0] @ softmax.weight.T + softmax.bias).detach().double()
    logits_L[collection[0]] = -torch.inf
    estimates = torch.empty(1500, 1, dtype=torch.float64)
    for repetition in range(1500):
        batch = [0, *(1 + rng.permutation(39)[:5])]
        groups = [batch[: sizes[0]], batch[sizes[0] :]][: len(sizes)]
        positives = [offsets_of([collection[i] for i in group])[0] for group in groups]
        pool, log_weight = softmax._pools(queries_ND[batch], positives, sizes)[0]
        estimates[repetition] = (logits_L[pool] - log_weight).exp().sum()
    assert_unbiased(estimates, logits_L.exp().sum())


def test_positives_as_a_sample_save_draws() -> None:
    """At few draws the estimate has a fraction of the variance that it has where the draws alone estimate the rest."""
    rng = np.random.default_rng(0)
    num_labels = 400
    # Each label has an instance: those that have none are estimated by the draws alone, either way.
    collection = [[i, *((i + rng.choice(np.arange(1, 400), size=2, replace=False)) % 400)] for i in range(400)]
    frequency_L = torch.from_numpy(np.bincount(np.concatenate(collection), minlength=num_labels))
    queries_ND = make_queries(400, scale=0.4).detach()
    variances = []
    for law in (None, InBatchSampler(frequency_L, num_instances=400)):
        softmax = make_softmax(FrequencySampler(frequency_L), num_labels, in_batch=law, num_draws=5)
        logits_L = (queries_ND[0] @ softmax.weight.T + softmax.bias).detach().double()
        logits_L[collection[0]] = -torch.inf
        estimates = []
        for _ in range(400):
            batch = [0, *(1 + rng.permutation(399)[:30])]
            positives = offsets_of([collection[i] for i in batch])[0]
            pool, log_weight = softmax._pools(queries_ND[batch], [positives], [len(batch)])[0]
            estimates.append(float((logits_L[pool] - log_weight).exp().sum()))
        variances.append(np.var(estimates))
    assert variances[1] < 0.3 * variances[0]


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
@pytest.mark.fault("R17")
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
        monkeypatch.setattr(estimators, "_CHUNK_ELEMENTS", {"cpu": chunk * 3})
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
    for shape in ((0,), (2, 0), (0, 3)):
        queries = torch.zeros(*shape, D, requires_grad=True)
        for positives in (torch.zeros(shape, dtype=torch.int64), offsets_of([])):
            loss = softmax(queries, positives)
            loss.backward()
            assert loss == 0 and loss.shape == ()


def test_an_instance_without_positives_gets_no_gradient() -> None:
    for estimator in ("pool", "instance"):
        softmax = make_softmax(UniformSampler(L), num_draws=4, estimator=estimator)
        query_BD = make_queries()
        softmax(query_BD, offsets_of(RAGGED)).backward()
        assert query_BD.grad is not None
        assert query_BD.grad.abs().sum(1).gt(0).tolist() == [bool(row) for row in RAGGED]


def test_wrong_shapes_and_options_are_refused() -> None:
    softmax = make_softmax(None)
    for queries, shape in (((3, 5), (2,)), ((2, 3, 5), (3, 2)), ((6, 5), (2, 3)), ((5,), (1,))):
        with pytest.raises(ValueError, match=r"expected \(.*\), one a query"):
            softmax(torch.zeros(queries), torch.zeros(shape, dtype=torch.int64))
    ids, offsets = torch.tensor([1, 2]), torch.tensor([0, 1, 2])
    for positives in (
        None,
        (ids,),
        [ids, offsets],
        [1, 2],
        np.array([1, 2]),
        ids.float(),
        ids.bool(),
        (ids.float(), offsets),
        (ids, 2),
    ):
        with pytest.raises(ValueError, match="expected a tensor of label ids, or a tuple"):
            softmax(make_queries(2), positives)
    with pytest.raises(ValueError, match="the offsets fall"):
        softmax(make_queries(3), (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 3, 1, 4])))
    with pytest.raises(ValueError, match="3 offsets for 3 queries"):
        softmax(make_queries(3), (torch.tensor([1, 2]), torch.tensor([0, 1, 2])))
    for wrong in (-1, -100, L):
        with pytest.raises(ValueError, match=f"expected label ids 0 to {L - 1}"):
            softmax(make_queries(2), torch.tensor([wrong, 3]))
    for offsets in ([0, 1], [1, 2], [0, 3]):
        with pytest.raises(ValueError, match="expected 0 to 2, the positives"):
            softmax(make_queries(1), (torch.tensor([1, 2]), torch.tensor(offsets)))
    for options, message in (
        ({"num_draws": 0}, "num_draws is 0"),
        ({"gradient_negatives": 0}, "gradient_negatives is 0"),
        ({"num_codewords": 0}, "num_codewords is 0"),
        ({"label_frequencies": torch.ones(8)}, r"shape \(8,\): expected \(9,\)"),
        ({"label_frequencies": torch.ones(9), "num_instances": 0}, "num_instances is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MIDXSoftmax(9, 4, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="estimator 'both'"):
        LabelSoftmax(3, 2, sampler=None, estimator="both")
    with pytest.raises(ValueError, match="weighting 'max'"):
        LabelSoftmax(3, 2, sampler=None, weighting="max")
    with pytest.raises(ValueError, match=r"precision torch.float16: expected"):
        LabelSoftmax(3, 2, sampler=None, precision=torch.float16)
    # As many numbers as two rows of five, but no rows of five.
    for use in (
        lambda q: softmax(q, torch.zeros(2, dtype=torch.int64)),
        softmax.log_prob,
        lambda q: softmax.topk(q, 1),
    ):
        with pytest.raises(ValueError, match=r"queries of shape \(5, 2\): expected \(\.\.\., 5\)"):
            use(torch.zeros(5, 2))


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_positive_that_is_stated_twice_counts_twice(decoupled: bool) -> None:
    """By finite differences of the loss, in float64."""
    softmax = make_softmax(None, decoupled=decoupled, dtype=torch.float64)
    positives = torch.tensor([1, 3, 1, 1, 2]), torch.tensor([0, 4, 5])
    query_BD = make_queries(2).double().detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: softmax(q, positives), (query_BD,))
    once = softmax(query_BD[:1], (torch.tensor([7]), torch.tensor([0, 1])))
    often = softmax(query_BD[:1], (torch.tensor([7, 7, 7]), torch.tensor([0, 3])))
    if decoupled:
        gradients = [torch.autograd.grad(loss, query_BD)[0] for loss in (once, often)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_queries_that_are_no_numbers_give_a_loss_that_is_none(bad: float) -> None:
    """And no error on the way there, whichever labels are drawn."""
    certain = MIDXSoftmax(5000, 4, num_draws=64)
    queries = make_queries(2, 4).detach()
    queries[0, 0] = bad
    assert not torch.isfinite(certain(queries, torch.tensor([1, 2])))
    counts = {"label_frequencies": torch.full((40,), 2), "num_instances": 100}
    sampled = MIDXSoftmax(40, 4, num_draws=8, num_codewords=3, **counts)  # type: ignore[arg-type]
    for seed in range(40):
        torch.manual_seed(seed)
        queries = torch.randn(8, 4)
        queries[0] = bad
        assert not torch.isfinite(sampled(queries, torch.randperm(40)[:8]))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_batch_without_positives_is_a_loss_of_the_tables_too(sparse: bool) -> None:
    nothing = torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    softmax = MIDXSoftmax(5, 4, sparse=sparse)
    for queries in (torch.ones(2, 4), torch.full((2, 4), torch.inf)):
        loss = softmax(queries, nothing)
        loss.backward()
        assert float(loss.detach()) == 0.0
    for parameter in softmax.parameters():
        assert parameter.grad is not None and float(parameter.grad.to_dense().abs().sum()) == 0.0


def test_a_softmax_without_a_bias_never_learns_one() -> None:
    softmax = MIDXSoftmax(50, 4, bias=False).requires_grad_(False).requires_grad_(True)
    queries = torch.ones(3, 4)
    softmax(queries, torch.tensor([1, 2, 3])).backward()
    softmax.log_prob(queries).sum().backward()
    assert softmax.bias.grad is None and softmax.weight.grad is not None and "bias=False" in repr(softmax)


def test_a_state_of_another_quantizer_is_refused() -> None:
    """The codebooks of one have rows of half as many numbers as those of the other."""
    for kinds in (("pq", "rq"), ("rq", "pq")):
        one, other = (MIDXSoftmax(500, 4, num_draws=64, num_codewords=9, quantizer=kind) for kind in kinds)
        one.refresh()
        with pytest.raises(RuntimeError, match=f"codewords of .* numbers, expected .* of '{kinds[1]}'"):
            other.load_state_dict(one.state_dict())


def test_a_default_dtype_of_float64_refreshes_a_table_of_float32() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        softmax = MIDXSoftmax(500, 8, dtype=torch.float32, num_draws=50, num_codewords=30)
        softmax.weight.data.zero_()
        softmax.refresh()
        few = MIDXSoftmax(3, 8, dtype=torch.float32, num_draws=2, num_codewords=30)
        few.refresh()
    finally:
        torch.set_default_dtype(torch.float32)
    for module in (softmax, few):
        for name, tensor in module.state_dict().items():
            assert not tensor.is_floating_point() or (tensor.dtype == torch.float32 and tensor.isfinite().all()), name


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    query_BD = make_queries()
    loss = make_softmax(None)(query_BD, offsets_of(RAGGED))
    (gradient,) = torch.autograd.grad(loss, query_BD, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("estimator", ["pool", "instance"])
def test_queries_of_any_dtype_get_gradients_in_it(dtype: torch.dtype, estimator: str) -> None:
    query_BD = make_queries().detach().to(dtype).requires_grad_()
    single_BD = query_BD.detach().float().requires_grad_()
    losses = []
    for queries in (query_BD, single_BD):
        softmax = make_softmax(UniformSampler(L), num_draws=8, estimator=estimator)
        losses.append(softmax(queries, offsets_of(RAGGED)))
        losses[-1].backward()
    assert losses[0].dtype == torch.float32 and torch.equal(losses[0], losses[1])
    assert query_BD.grad is not None and single_BD.grad is not None
    assert query_BD.grad.dtype == dtype and torch.equal(query_BD.grad, single_BD.grad.to(dtype))


class Recorder:
    """Another sampler, and what it drew."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.drawn: list[LabelSample] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sample_pool(self, *arguments: Any) -> LabelSample:
        self.drawn.append(self.sampler.sample_pool(*arguments))
        return self.drawn[-1]

    def sample(self, *arguments: Any) -> LabelSample:
        self.drawn.append(self.sampler.sample(*arguments))
        return self.drawn[-1]


def law_of(name: str, sampler: Any, query_BD: torch.Tensor) -> np.ndarray:
    """(B, L) float64 Q(i|z), from the formula."""
    if name == "midx":
        codebook, half = sampler.codebook, D // 2
        queries = query_BD.detach().numpy()
        scores1 = queries[:, :half] @ codebook.codewords1.numpy().T
        scores2 = queries[:, half:] @ codebook.codewords2.numpy().T
        law = np.exp(scores1[:, codebook.codes1.numpy()] + scores2[:, codebook.codes2.numpy()])
    else:
        law = np.tile(np.ones(L) if name == "uniform" else np.sqrt(np.arange(L) + 1.0), (query_BD.shape[0], 1))
    return law / law.sum(1, keepdims=True)


@pytest.mark.usefixtures("chunks")
@SPARSE
@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("name", ["midx", "uniform", "frequency", "full"])
def test_a_module_in_float64_is_exact_to_float64(name: str, estimator: str, sparse: bool) -> None:
    sampler: Sampler = {
        "midx": lambda: MidxSampler(quantizer="pq", num_codewords=3, prior="uniform"),
        "uniform": lambda: UniformSampler(L),
        "frequency": lambda: FrequencySampler(torch.arange(L), power=0.5),
        "full": lambda: UniformSampler(L),
    }[name]()
    num_draws = L if name == "full" else 6
    recorder = Recorder(sampler)
    softmax = make_softmax(recorder, num_draws=num_draws, estimator=estimator, sparse=sparse).double()
    query_BD = make_queries().detach().double().requires_grad_()
    start = softmax.generator.get_state()
    softmax(query_BD, offsets_of(RAGGED))
    softmax.generator.set_state(start)
    if name == "full":
        negatives = [[(label, 0.0) for label in range(L)]] * len(RAGGED)
    else:
        law = law_of(name, sampler, query_BD)
        ids = recorder.drawn[0].label_ids
        if estimator == "instance":
            negatives = [[(label, math.log(6 * law[i, label])) for label in row] for i, row in enumerate(ids.tolist())]
        else:
            certain = {label for row in RAGGED for label in row}
            # As many draws as it takes for 6 of them to be expected elsewhere.
            num_made = math.ceil(6 / (1 - law.mean(0)[sorted(certain)].sum()))
            chance = 1 - (1 - law.mean(0)) ** num_made
            assert not certain & set(ids.tolist())
            drawn = [(label, math.log(chance[label])) for label in ids.tolist()]
            negatives = [[*((label, 0.0) for label in certain), *drawn]] * len(RAGGED)
    reference = Reference(softmax, query_BD)
    expected = reference.loss(RAGGED, negatives, weighting="mean", decoupled=True)
    assert_same_loss_and_gradients(softmax, query_BD, offsets_of(RAGGED), reference, expected, tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["pool", "instance"])
def test_a_half_precision_table_is_read_in_float32_and_gets_gradients_of_its_own_type(
    dtype: torch.dtype, estimator: str
) -> None:
    half = MIDXSoftmax(
        60, D, num_codewords=4, num_draws=8, prior="bias", estimator=estimator, precision=torch.float32
    ).to(dtype)
    single = copy.deepcopy(half).float()
    query_BD = make_queries()
    losses = [softmax(query_BD, offsets_of(RAGGED)) for softmax in (half, single)]
    assert losses[0].dtype == torch.float32 and torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for table, reference in zip(half.parameters(), single.parameters(), strict=True):
        assert table.grad is not None and reference.grad is not None and table.grad.dtype == dtype
        # Two bits more than the type has: a row's gradients are added up in it.
        torch.testing.assert_close(table.grad.float(), reference.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
    assert half.sampler.codebook.codewords1.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(half.log_prob(query_BD), single.log_prob(query_BD))
    np.testing.assert_array_equal(half.topk(query_BD, 5).scores, single.topk(query_BD, 5).scores)


# ------------------------------------------------------------------------ autocast


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("backward", ["inside", "outside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["pool", "instance"])
@SPARSE
def test_autocast_gives_its_bfloat16_to_the_products_of_the_pool_and_changes_nothing_else(
    backward: str, dtype: torch.dtype, estimator: str, sparse: bool
) -> None:
    def make(precision: torch.dtype | None) -> tuple[MIDXSoftmax, torch.Tensor, Recorder]:
        softmax = MIDXSoftmax(
            60, D, num_codewords=4, num_draws=8, estimator=estimator, sparse=sparse, precision=precision
        )
        assert softmax.sampler is not None
        softmax.sampler = recorder = Recorder(softmax.sampler)
        return softmax, make_queries(), recorder

    low = dtype == torch.bfloat16 and estimator == "pool"
    expected, expected_BD, expected_drawn = make(torch.bfloat16 if low else torch.float32)
    expected_loss = expected(expected_BD, offsets_of(RAGGED))
    expected_loss.backward()
    softmax, query_BD, drawn = make(None)
    with torch.autocast("cpu", dtype=dtype):
        loss = softmax(query_BD, offsets_of(RAGGED))
        if backward == "inside":
            loss.backward()
    if backward == "outside":
        loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected_loss)
    # The codebooks were fitted inside of autocast too.
    for name, tensor in expected_drawn.state_dict().items():
        assert torch.equal(drawn.state_dict()[name], tensor), name
    assert torch.equal(drawn.drawn[0].label_ids, expected_drawn.drawn[0].label_ids)
    assert torch.equal(drawn.drawn[0].log_weight, expected_drawn.drawn[0].log_weight)
    assert drawn.drawn[0].log_weight.dtype == torch.float32
    for found, wanted in zip((query_BD, *softmax.parameters()), (expected_BD, *expected.parameters()), strict=True):
        assert found.grad is not None and found.grad.dtype == torch.float32
        if estimator == "pool" or backward == "outside":
            assert torch.equal(dense(found.grad), dense(wanted.grad))
        else:  # the products of torch's own backward pass are autocast
            torch.testing.assert_close(dense(found.grad), dense(wanted.grad), rtol=0.02, atol=0.01)


def test_an_explicit_precision_stands_under_autocast() -> None:
    losses = []
    for enabled in (False, True):
        softmax = make_softmax(None, precision=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(softmax(make_queries(), offsets_of(RAGGED)))
    assert torch.equal(*losses)


def test_a_model_under_autocast_gets_gradients_in_the_dtype_of_its_parameters() -> None:
    torch.manual_seed(0)
    encoder, softmax = nn.Linear(4, D), MIDXSoftmax(60, D, num_codewords=4, num_draws=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queries = encoder(torch.ones(3, 4))
        loss = softmax(queries, torch.tensor([1, 2, 59]))
    loss.backward()
    assert queries.dtype == torch.bfloat16
    for parameter in (*encoder.parameters(), *softmax.parameters()):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any()


def test_refresh_log_prob_and_topk_are_as_exact_under_autocast() -> None:
    sampler = MidxSampler(quantizer="rq", num_codewords=16, prior="uniform")
    softmax, queries = make_softmax(sampler, 500), make_queries()
    twin = copy.deepcopy(softmax)
    twin.refresh()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        softmax.refresh()
        log_prob, top = softmax.log_prob(queries), softmax.topk(queries, 5)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(softmax.state_dict()[name], tensor), name
    assert torch.equal(log_prob, softmax.log_prob(queries))
    np.testing.assert_array_equal(top.scores, softmax.topk(queries, 5).scores)


# ------------------------------------------------------------- the rest of the module


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0,), (2, 0, 3)])
def test_log_prob_is_the_full_softmax_and_sums_to_one(shape: tuple[int, ...]) -> None:
    softmax = make_softmax(UniformSampler(L), num_draws=3)
    queries = make_queries(math.prod(shape)).view(*shape, D)
    log_prob = softmax.log_prob(queries).detach()
    assert log_prob.shape == (*shape, L)
    np.testing.assert_allclose(log_prob.double().exp().sum(-1).numpy(), np.ones(shape), atol=1e-5)
    logits = (queries.double() @ softmax.weight.double().T + softmax.bias.double()).detach()
    np.testing.assert_allclose(log_prob.numpy(), torch.log_softmax(logits, -1).numpy(), atol=1e-5)


def test_log_prob_differentiates_like_log_softmax() -> None:
    softmax = make_softmax(None).double()
    queries = make_queries().detach().double().requires_grad_()
    reference = Reference(softmax, queries)
    factors = torch.randn(len(RAGGED), L, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (factors * softmax.log_prob(queries)).sum().backward()
    (factors * torch.log_softmax(reference.query @ reference.weight.T + reference.bias, 1)).sum().backward()
    pairs = [(queries, reference.query), (softmax.weight, reference.weight), (softmax.bias, reference.bias)]
    for found, wanted in pairs:
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-12)


def test_topk_is_the_sorted_log_prob() -> None:
    softmax = make_softmax(None)
    queries = make_queries(6)
    found = softmax.topk(queries.view(2, 3, D), 4)
    logits = (queries @ softmax.weight.T + softmax.bias).detach().numpy()
    np.testing.assert_array_equal(found.label_ids, np.argsort(-logits, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(found.scores, -np.sort(-logits, axis=1)[:, :4], rtol=1e-5)


def test_the_seed_decides_table_and_draws_and_the_global_generator_is_left_alone() -> None:
    def loss(seed: int) -> list[float]:
        softmax = MIDXSoftmax(60, D, num_draws=8, num_codewords=4, seed=seed)
        return [softmax(make_queries(), offsets_of(RAGGED)).item() for _ in range(3)]

    before = torch.get_rng_state()
    first = loss(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert loss(1) == first and loss(2) != first
    assert len(set(first)) == 3, "each step draws anew"


def test_midx_softmax_takes_positives_for_a_sample_where_it_knows_their_law() -> None:
    frequency_L = torch.arange(1, 5001)
    plain = MIDXSoftmax(5000, 7, label_frequencies=frequency_L)
    knowing = MIDXSoftmax(5000, 7, label_frequencies=frequency_L, num_instances=9000)
    assert plain.in_batch is None and knowing.in_batch is not None
    queries, positives = make_queries(4, 7).detach(), torch.tensor([1, 4999, 3, 3])
    _, certain = plain._pools(queries, [positives], [len(queries)])[0]
    ids, sampled = knowing._pools(queries, [positives], [len(queries)])[0]
    assert (certain == 0).sum() == 3 and sampled[ids == 1] < -3, "a rare positive stands for many that are not there"
    with pytest.raises(ValueError, match="num_instances goes with label_frequencies"):
        MIDXSoftmax(5000, 7, num_instances=9000)


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_midx_softmax_is_ready_to_use_and_derives_its_sizes(quantizer: str) -> None:
    softmax = MIDXSoftmax(5000, 7, quantizer=quantizer)
    assert softmax.num_draws == 2048
    assert isinstance(softmax.sampler, MidxSampler) and softmax.sampler.num_codewords == round(1.25 * math.sqrt(5000))
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
    losses, pools = [], []
    for _ in range(3):
        softmax.refresh()
        for part in torch.randperm(1500, generator=generator).split(25):
            loss = softmax(encoder(inputs[part]), classes[part])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
            pools.append(softmax.pool_size)
    assert np.mean(pools) < 0.8 * num_classes or estimator == "instance", "the negatives were drawn"
    assert np.mean(losses[-15:]) < 0.25 * losses[0]
    top = softmax.topk(encoder(inputs), 1)
    assert np.mean(top.label_ids[:, 0] == classes.numpy()) > 0.9


# --------------------------------------------------------------------------- state

STATEFUL: dict[str, Callable[[int], Sampler | None]] = {
    **SAMPLERS,
    "in-batch": lambda num_labels: InBatchSampler(torch.arange(num_labels), num_instances=400),
    "hard-negatives": lambda _: HardNegativeSampler(),
    "full": lambda _: None,
}
"""All samplers, by the number of labels."""


def make_fresh(name: str, *, seed: int, **options: Any) -> LabelSoftmax:
    """As constructed: never refreshed."""
    return LabelSoftmax(40, D, sampler=STATEFUL[name](40), num_draws=6, seed=seed, **options)


def go_on(softmax: LabelSoftmax, *, first_step: int = 0, refresh_at: int | None = None) -> list[float]:
    """The losses of four steps, with a refresh before one of them."""
    optimizer = torch.optim.SGD([p for p in softmax.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(first_step, first_step + 4):
        if step == refresh_at:
            softmax.refresh()
        loss = softmax(make_queries(seed=step), offsets_of(RAGGED))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def from_disk(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Through safetensors, which takes plain tensors that share no memory, and nothing else."""
    return safetensors.torch.load(safetensors.torch.save(state))


@pytest.mark.parametrize("into", ["a fresh module", "a module fitted to another table", "a parent", "a copy"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_restored_module_goes_on_draw_for_draw(name: str, into: str) -> None:
    softmax = make_fresh(name, seed=1)
    go_on(softmax, refresh_at=1)  # the table has moved since the refresh
    other = make_fresh(name, seed=2)
    if into == "a copy":
        other = copy.deepcopy(softmax)
    elif into == "a parent":
        parents = [nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": head}) for head in (softmax, other)]
        state = parents[0].state_dict()
        assert {key.partition(".")[0] for key in state} == {"encoder", "head"}
        parents[1].load_state_dict(from_disk(state))
    else:
        if into == "a module fitted to another table":
            go_on(other, refresh_at=2)
        other.load_state_dict(from_disk(softmax.state_dict()))
    assert other.state_dict().keys() == softmax.state_dict().keys()
    expected = go_on(softmax, first_step=10, refresh_at=12)
    assert go_on(other, first_step=10, refresh_at=12) == expected and len(set(expected)) == 4


@pytest.mark.parametrize("options", [{"num_codewords": "64"}, {"num_draws": "all"}, {"num_codewords": "foo"}])
def test_a_word_that_is_not_auto_is_no_number(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected a number or auto"):
        MIDXSoftmax(40, D, **options)


def test_the_state_is_table_generator_and_what_the_last_refresh_made() -> None:
    softmax = MIDXSoftmax(40, D, num_draws=6, num_codewords=3, prior="bias")
    assert set(softmax.state_dict()) == {"weight", "bias", "generator"}
    softmax.refresh()
    codes = {f"sampler.{name}" for name in ("codewords1", "codewords2", "codes1", "codes2")}
    assert set(softmax.state_dict()) == {"weight", "bias", "generator", "bias_at_refresh"} | codes
    assert softmax.state_dict()["generator"].dtype == torch.uint8
    with torch.no_grad():
        softmax.bias += 1
    assert not softmax.state_dict()["bias_at_refresh"].any()


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_of_before_the_first_refresh_is_one_too(name: str) -> None:
    softmax, other = make_fresh(name, seed=1), make_fresh(name, seed=2)
    other.load_state_dict(from_disk(softmax.state_dict()))
    assert go_on(other) == go_on(softmax)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_of_before_the_first_refresh_makes_a_used_module_a_fresh_one(name: str) -> None:
    softmax, other = make_fresh(name, seed=1), make_fresh(name, seed=1)
    with torch.no_grad():
        other.weight.mul_(-2.0)
    for _ in range(2):
        other.refresh()
        go_on(other)
    other.load_state_dict(from_disk(softmax.state_dict()))
    assert go_on(other) == go_on(softmax)


@pytest.mark.parametrize("keys", [("weight", "bias"), ("weight", "bias", "generator")])
def test_a_table_without_a_state_of_the_sampler_is_fitted_at_the_first_use(keys: tuple[str, ...]) -> None:
    softmax, other = (MIDXSoftmax(40, D, num_draws=6, num_codewords=3, seed=seed) for seed in (1, 2))
    go_on(other)
    state = {key: tensor for key, tensor in softmax.state_dict().items() if key in keys}
    assert other.load_state_dict(state, strict=True) == ([], [])
    assert not {key for key in other.state_dict() if key.startswith("sampler.")}, (
        "another table's codes are not its own"
    )
    fitted = MidxSampler(quantizer="pq", num_codewords=3, prior="uniform", seed=2)
    fitted.refresh(softmax.weight, softmax.bias)
    other(make_queries(), offsets_of(RAGGED))
    for key, tensor in fitted.state_dict().items():
        assert torch.equal(other.state_dict()[f"sampler.{key}"], tensor)
    # Once: the next use has nothing to fit.
    with torch.no_grad():
        other.weight.zero_()
    other(make_queries(), offsets_of(RAGGED))
    assert torch.equal(other.state_dict()["sampler.codewords1"], fitted.state_dict()["codewords1"])


def test_a_state_without_this_table_leaves_the_sampler_alone() -> None:
    softmax = make_softmax(MidxSampler(quantizer="pq", num_codewords=3, prior="uniform"), num_draws=6)
    parent = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": softmax})
    before = dict(softmax.state_dict())
    parent.load_state_dict(nn.ModuleDict({"encoder": nn.Linear(2, 2)}).state_dict(), strict=False)
    assert softmax.state_dict().keys() == before.keys() and "sampler.codes1" in before


def test_keys_of_no_use_are_unexpected_and_a_state_of_another_sampler_is_refused() -> None:
    midx, lsh = make_fresh("midx-pq-uniform", seed=1), make_fresh("lsh", seed=1)
    for softmax in (midx, lsh):
        softmax.refresh()
    for name in ("full", "uniform"):
        other = make_fresh(name, seed=2)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*sampler\.codewords1"):
            other.load_state_dict(midx.state_dict())
        other.load_state_dict(midx.state_dict(), strict=False)
        assert torch.equal(other.weight, midx.weight)
    with pytest.raises(RuntimeError, match=r"`sampler\.\*` is no state of a MidxSampler"):
        make_fresh("midx-pq-uniform", seed=2).load_state_dict(lsh.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        midx.load_state_dict({"bias": midx.bias})


def test_a_loaded_state_is_copied() -> None:
    softmax, other = make_fresh("midx-pq-bias", seed=1), make_fresh("midx-pq-bias", seed=2)
    softmax.refresh()
    state = {name: tensor.clone() for name, tensor in softmax.state_dict().items()}
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    for name, tensor in softmax.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_the_state_of_another_devices_generator_is_left_out() -> None:
    softmax, other = make_fresh("uniform", seed=1), make_fresh("uniform", seed=1)
    state = softmax.state_dict() | {"generator": torch.zeros(16, dtype=torch.uint8)}  # CUDA's has 16 bytes
    other.load_state_dict(state)
    assert go_on(other) == go_on(softmax)


@pytest.mark.parametrize("name", ["midx-pq-bias", "softmax", "rff"])
def test_an_assigned_table_is_the_one_that_is_used(name: str) -> None:
    softmax, other = make_fresh(name, seed=1), make_fresh(name, seed=2)
    go_on(other)
    go_on(softmax)
    other.load_state_dict({key: tensor.clone() for key, tensor in softmax.state_dict().items()}, assign=True)
    assert go_on(other, first_step=10) == go_on(softmax, first_step=10)


def test_the_representation_names_the_sizes() -> None:
    assert repr(MIDXSoftmax(40, D, num_draws=6)) == (
        "MIDXSoftmax(40, 5, sampler=MidxSampler, estimator='pool', num_draws=6, bias=True, sparse=False)"
    )


# ------------------------------------------------------------------ devices and dtypes

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STATEFUL)
def test_all_that_a_sampler_holds_follows_the_module_to_a_device(name: str, device: str) -> None:
    for fitted in (False, True):
        softmax = make_fresh(name, seed=1)
        if fitted:
            softmax.refresh()
        softmax.to(device)
        query_BD = make_queries().detach().to(device).requires_grad_()
        ids, offsets = offsets_of(RAGGED)
        loss = softmax(query_BD, (ids.to(device), offsets.to(device)))
        loss.backward()
        assert loss.device.type == device and torch.isfinite(loss)
        assert go_on(softmax.cpu()) and softmax.generator.device.type == "cpu"


@pytest.mark.parametrize("way", ["refresh", "load"])
def test_the_frequencies_of_a_sampler_follow_the_table(way: str) -> None:
    # The meta device stands for another one, where there is no other.
    table_LD, bias_L = torch.empty(L, D, device="meta"), torch.empty(L, device="meta")
    for sampler in (FrequencySampler(torch.arange(L)), InBatchSampler(torch.arange(L), num_instances=9)):
        if way == "refresh":
            sampler.refresh(table_LD, bias_L)
        else:
            sampler.load_state_dict({}, bias_L)
        held = [value for value in vars(sampler).values() if isinstance(value, torch.Tensor)]
        assert held and all(tensor.device.type == "meta" for tensor in held)


def test_another_dtype_keeps_the_law_of_the_last_refresh() -> None:
    sampler = MidxSampler(quantizer="pq", num_codewords=3, prior="bias")
    softmax = make_softmax(sampler, num_draws=6)
    queries, labels = make_queries().detach(), torch.arange(L)
    before = sampler.log_proposal(queries, labels)
    with torch.no_grad():
        softmax.bias += torch.arange(L)
    softmax.double()
    after = sampler.log_proposal(queries.double(), labels)
    assert after.dtype == torch.float64
    np.testing.assert_allclose(after.numpy(), before.numpy(), atol=1e-5)
    assert "bias_at_refresh" in softmax.state_dict() and softmax.state_dict()["bias_at_refresh"].dtype == torch.float64


# ------------------------------------------------------------------------- optimisers

OPTIMIZERS: dict[str, tuple[bool, Callable[[Any], torch.optim.Optimizer]]] = {
    "AdamW": (False, lambda tables: torch.optim.AdamW(tables, lr=0.05)),
    "SGD": (False, lambda tables: torch.optim.SGD(tables, lr=2.0, momentum=0.5)),
    "RowAdam, dense": (False, lambda tables: RowAdam(tables, lr=0.05)),
    "SparseAdam": (True, lambda tables: torch.optim.SparseAdam(list(tables), lr=0.05)),
    "SGD, sparse": (True, lambda tables: torch.optim.SGD(tables, lr=2.0)),
    "RowAdam": (True, lambda tables: RowAdam(tables, lr=0.05)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_the_table_however_gradients_are_cleared(
    name: str, bias: bool, estimator: str, dtype: torch.dtype
) -> None:
    sparse, make_optimizer = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(60, 8, generator=generator, dtype=dtype)
    classes = torch.arange(60) % 40
    tables = []
    for set_to_none in (True, False):
        softmax = MIDXSoftmax(40, 8, num_codewords=4, num_draws=8, bias=bias, sparse=sparse, estimator=estimator)
        softmax.to(dtype)
        optimizer = make_optimizer(softmax.parameters())
        before = -softmax.log_prob(queries)[torch.arange(60), classes].mean()
        for step in range(40):
            loss = softmax(queries[step % 3 :: 3], classes[step % 3 :: 3])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert softmax.weight.grad is None or not softmax.weight.grad.to_dense().any()
        after = -softmax.log_prob(queries)[torch.arange(60), classes].mean()
        assert after < 0.6 * before
        assert bias == bool(softmax.bias.any())
        tables.append(softmax.weight.detach())
    torch.testing.assert_close(*tables)


# --------------------------------------------------------------------------- compile


class Classifier(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.head = MIDXSoftmax(300, 8, num_draws=16, num_codewords=4, **options)

    def forward(self, inputs: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.head(torch.relu(self.encoder(inputs)), label_ids)
        return loss


COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"sparse": True, "estimator": "instance"}])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
def test_a_compiled_model_draws_and_learns_as_the_eager_one(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    eager = Classifier(**options)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        inputs = torch.randn(12, 6, generator=generator)
        label_ids = torch.randint(300, (12,), generator=generator)
        losses = [run(inputs, label_ids) for run in (eager, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        # The same draws: another pool would have other rows.
        assert eager.head.pool_size == model.head.pool_size
        assert torch.equal(eager.head.generator.get_state(), model.head.generator.get_state())
        for found, wanted in zip(model.parameters(), eager.parameters(), strict=True):
            assert found.grad is not None and wanted.grad is not None and found.grad.is_sparse == wanted.grad.is_sparse
            torch.testing.assert_close(dense(found.grad), dense(wanted.grad))
        if step == 1:
            eager.head.refresh()
            model.head.refresh()
    # Breaks at the module alone, and one graph before it: the steps after the first compile nothing.
    at_the_module = ("LabelSoftmax._loss", "function `disable`")
    assert all(any(name in why for name in at_the_module) for why in torch._dynamo.utils.counters["graph_break"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_a_bias_none_is_taken_over() -> None:
    there, without = MIDXSoftmax(20, 8, seed=1), MIDXSoftmax(20, 8, bias=False)
    without.load_state_dict(there.state_dict())  # zeros
    with torch.no_grad():
        there.bias += 1.0
    with pytest.raises(RuntimeError, match="`bias` is not 0, but this softmax has no bias"):
        without.load_state_dict(there.state_dict())
    queries = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.log_softmax(queries @ without.weight.detach().T, dim=-1)
    torch.testing.assert_close(without.log_prob(queries).detach(), expected)


# ---------------------------------------------------------------------------- README


def test_the_loop_in_the_readme_trains() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "MIDXSoftmax(" in block]
    for large, small in (("num_labels=1_000_000, dim=128", "num_labels=5_000, dim=16"), ("lr=1e-3", "lr=0.1")):
        assert code.count(large) == 1
        code = code.replace(large, small)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(32, 16, generator=generator), torch.randint(5_000, (32,), generator=generator)) for _ in range(8)
    ]
    found: dict[str, Any] = {"batches": batches}
    exec(code, found)
    softmax = found["softmax"]
    assert 32 < softmax.pool_size < 5_000, "the negatives were drawn"
    for queries, label_ids in batches:
        assert -softmax.log_prob(queries)[torch.arange(32), label_ids].mean() < 0.5 * math.log(5_000)
