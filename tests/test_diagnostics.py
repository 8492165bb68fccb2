"""Samplers against the full softmax: every figure against an independent reference, on small tables and a run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.special import logsumexp, rel_entr, softmax

from xmc_midx import diagnostics
from xmc_midx.build import build_sampler
from xmc_midx.checkpoint import CheckpointStore
from xmc_midx.cli import app
from xmc_midx.config import SAMPLER_NAMES, Config, load_config
from xmc_midx.data.dataset import load_split
from xmc_midx.data.features import FeatureScaling, normalize_rows
from xmc_midx.data.known_labels import KnownLabels
from xmc_midx.device import find_device
from xmc_midx.diagnostics import Instances, TrainedModel, choose_instances, diagnose_samplers
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import DataError, ResourceError, UsageError, XmcMidxError
from xmc_midx.pipeline import Diagnosis, diagnose, train
from xmc_midx.quantization import dequantize
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.rundir import RunDirectory
from xmc_midx.types import SamplerDiagnosis, SilentReporter, Spread

NAMES = tuple(name for name in SAMPLER_NAMES if name != "full")
WITHOUT_DENSITY = {"in-batch", "hard-negatives"}
BOUNDED = (*(name for name in NAMES if name.startswith("midx-")), "uniform", "frequency")
L, D, B = 60, 6, 40


def make_config(*assignments: str) -> Config:
    options = ("sampler.num_codewords=4", f"training.batch_size={B}", f"model.dim={D}", *assignments)
    shape = DataShape(num_instances=500, num_features=7, num_labels=L, num_positives=1500)
    return resolve(load_config(assignments=options), shape)


def make_model(*assignments: str) -> TrainedModel:
    """A random label table of 60 labels, with a bias and falling frequencies."""
    generator = torch.Generator().manual_seed(0)
    frequencies = (400.0 / torch.arange(1, L + 1)).long()
    frequencies[-1] = 0
    return TrainedModel(
        config=make_config(*assignments),
        encoder=SparseEncoder(7, D),
        label_table=torch.randn(L, D, generator=generator),
        bias=torch.randn(L, generator=generator),
        frequencies=frequencies,
        num_train=500,
        scaling=FeatureScaling(),
        known_labels=KnownLabels(num_labels=L),
    )


def make_instances(count: int = B, *, seed: int = 1) -> Instances:
    """Random queries with one to three positives each."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((count, L), dtype=np.float32)
    for row in labels:
        row[rng.choice(L, size=rng.integers(1, 4), replace=False)] = 1.0
    queries = torch.from_numpy(rng.normal(size=(count, D)).astype(np.float32))
    return Instances.build(queries, csr_matrix(labels))


def measure(
    *names: str,
    model: TrainedModel | None = None,
    num_draws: int = 20,
    repeats: int = 8,
    count: int = B,
    **options: Any,
) -> dict[str, SamplerDiagnosis]:
    diagnoses = diagnose_samplers(
        model or make_model(),
        make_instances(count),
        names=names,
        num_draws=num_draws,
        num_instances=options.pop("num_instances", count),
        repeats=repeats,
        **options,
    )
    assert [one.name for one in diagnoses] == list(names)
    return {one.name: one for one in diagnoses}


def float64_logits(model: TrainedModel, instances: Instances) -> np.ndarray:
    table, bias = model.label_table.double().numpy(), model.bias.double().numpy()
    return instances.queries.double().numpy() @ table.T + bias


def assert_spread(spread: Spread | None, values: np.ndarray, **tolerance: float) -> None:
    assert spread is not None
    expected = (values.mean(), *np.percentile(values, [10, 90], method="nearest"))
    assert dataclasses.astuple(spread) == pytest.approx(expected, **tolerance)


# ------------------------------------------------------------------------- the proposal


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_DENSITY])
def test_the_proposal_figures_are_those_of_brute_force_in_float64(name: str) -> None:
    model, instances = make_model(), make_instances()
    found = measure(name)[name]
    config = model.config.model_copy(update={"sampler": model.config.sampler.model_copy(update={"name": name})})
    sampler = build_sampler(config, model.frequencies, model.num_train)
    assert sampler is not None
    sampler.refresh(model.label_table, model.bias)
    q_BL = sampler.log_proposal(instances.queries, torch.arange(L)).double().exp().numpy()
    p_BL = softmax(float64_logits(model, instances), axis=1)
    assert_spread(found.kl_from_softmax, rel_entr(q_BL, p_BL).sum(1), rel=1e-4, abs=1e-5)
    assert_spread(found.kl_to_softmax, rel_entr(p_BL, q_BL).sum(1), rel=1e-4, abs=1e-5)
    assert_spread(found.effective_share, 1 / (1 + ((p_BL - q_BL) ** 2 / q_BL).sum(1)), rel=1e-4)
    assert_spread(found.log10_max_weight, np.log10((p_BL / q_BL).max(1)), rel=1e-4, abs=1e-5)


def test_two_query_free_proposals_against_their_formulas() -> None:
    """Without the code of a sampler: uniform is 1/L, frequency is (n + 1)^power."""
    model, instances = make_model("sampler.frequency_power=0.7"), make_instances()
    found = measure("uniform", "frequency", model=model)
    logits_BL = float64_logits(model, instances)
    p_BL = softmax(logits_BL, axis=1)
    weight_L = (model.frequencies.numpy() + 1.0) ** 0.7
    range_B = logits_BL.max(1) - logits_BL.min(1)
    for name, q_L in (("uniform", np.full(L, 1 / L)), ("frequency", weight_L / weight_L.sum())):
        assert_spread(found[name].kl_from_softmax, rel_entr(q_L, p_BL).sum(1), rel=1e-4)
        assert_spread(found[name].effective_share, 1 / (p_BL**2 / q_L).sum(1), rel=1e-4)
        assert_spread(found[name].kl_bound, range_B + math.log(L * q_L.max()), rel=1e-4)


def test_the_softmax_is_its_own_best_proposal() -> None:
    found = measure("softmax")["softmax"]
    assert_spread(found.kl_from_softmax, np.zeros(1), abs=1e-9)
    assert_spread(found.kl_to_softmax, np.zeros(1), abs=1e-9)
    assert_spread(found.effective_share, np.ones(1), rel=1e-6)
    assert_spread(found.log10_max_weight, np.zeros(1), abs=1e-5)


def test_the_effective_share_is_the_one_that_draws_have() -> None:
    """Kish's effective sample size of 2,000 importance-weighted draws, which the exact figure predicts."""
    found = measure("frequency", count=1)["frequency"]
    model, instances = make_model(), make_instances(1)
    p_L = softmax(float64_logits(model, instances), axis=1)[0]
    q_L = model.frequencies.numpy() + 1.0
    q_L /= q_L.sum()
    weights = (p_L / q_L)[np.random.default_rng(0).choice(L, size=200_000, p=q_L)]
    assert found.effective_share is not None
    assert found.effective_share.mean == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / weights.size, rel=0.05)


def test_samplers_without_a_density_have_gradient_figures_alone() -> None:
    for name, one in measure(*sorted(WITHOUT_DENSITY), "rff").items():
        figures = (one.kl_from_softmax, one.kl_to_softmax, one.effective_share, one.log10_max_weight)
        assert [figure is None for figure in figures] == [name in WITHOUT_DENSITY] * 4
        assert one.gradient_error > 0 and one.pool_size > 0


def test_only_samplers_with_a_theory_have_a_bound() -> None:
    found = measure(*NAMES)
    assert {name for name, one in found.items() if one.kl_bound is not None} == set(BOUNDED)


def test_a_proposal_that_leaves_out_a_label_is_infinitely_far() -> None:
    logits_BL = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    log_q_BL = torch.log(torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64))
    figures = diagnostics._compare("rff", logits_BL, log_q_BL)
    p_L = softmax([0.0, 1.0, 2.0])
    assert figures["kl_from_softmax"][0].item() == pytest.approx(0.5 * np.log(0.25 / p_L[0] / p_L[1]))
    assert figures["kl_to_softmax"].tolist() == [math.inf, pytest.approx(np.log(32 / 27) / 3)]
    assert figures["effective_share"].tolist() == [0.0, pytest.approx(1 / (1 / 9 * (4 + 4 + 2)))]
    assert math.isinf(figures["log10_max_weight"][0].item())


def test_the_number_of_instances_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure("midx-rq", repeats=2)["midx-rq"]
    monkeypatch.setattr(diagnostics, "_CHUNK_ELEMENTS", 3 * L)
    parts = measure("midx-rq", repeats=2)["midx-rq"]
    for name in ("kl_from_softmax", "kl_bound", "effective_share"):
        assert dataclasses.astuple(getattr(parts, name)) == pytest.approx(
            dataclasses.astuple(getattr(whole, name)), rel=1e-5
        )


# ------------------------------------------------------------------------- the gradient


def full_gradient(model: TrainedModel, instances: Instances) -> np.ndarray:
    """Of the decoupled loss with weights 1/|Y| by the queries, in float64, an instance after the other.

    `log(1 + exp(S - o_p))` with S over the labels that are no positives; the weights sum to 1.
    """
    logits_BL, table = float64_logits(model, instances), model.label_table.double().numpy()
    gradient_BD = np.zeros((logits_BL.shape[0], D))
    for i, logits in enumerate(logits_BL):
        own = instances.positives[instances.offsets[i] : instances.offsets[i + 1]].numpy()
        others = np.setdiff1d(np.arange(L), own)
        for p in own:
            log_rest = logsumexp(logits[others])
            share = 1 / (1 + np.exp(logits[p] - log_rest)) / own.size / logits_BL.shape[0]
            gradient_BD[i] += share * (softmax(logits[others]) @ table[others] - table[p])
    return gradient_BD


def test_with_all_labels_drawn_the_gradient_is_the_full_softmax_s() -> None:
    for one in measure(*NAMES, num_draws=L, repeats=3).values():
        if one.name != "in-batch":
            assert max(one.gradient_bias, one.gradient_deviation, one.gradient_error) == 0.0
            assert one.pool_size == L


def test_the_gradient_figures_are_those_of_independent_repeats() -> None:
    """Bias, deviation and error by NumPy, from the same draws and the reference's gradient."""
    model, instances = make_model(), make_instances()
    found = measure("midx-pq", num_draws=7, repeats=12, seed=5)["midx-pq"]
    loss = diagnostics._softmax(model, 7)
    loss.sampler = diagnostics._build(model, "midx-pq")
    loss.sampler.refresh(model.label_table, model.bias)
    loss.generator = torch.Generator().manual_seed(5)
    gradients = []
    for count in range(12):
        query_BD = instances.queries.clone().requires_grad_()
        loss(query_BD, (instances.positives, instances.offsets)).backward()
        assert query_BD.grad is not None
        gradients.append(query_BD.grad.double().numpy())
        if count < diagnostics._NUM_TIMED:
            loss.sampler.sample_pool(instances.queries, 7, loss.generator, torch.unique(instances.positives))
    stack, full_BD = np.stack(gradients), full_gradient(model, instances)
    length = np.linalg.norm(full_BD)
    deviation = np.sqrt(stack.var(0, ddof=1).sum()) / length
    assert found.gradient_bias == pytest.approx(np.linalg.norm(stack.mean(0) - full_BD) / length, rel=1e-4)
    assert found.gradient_deviation == pytest.approx(deviation, rel=1e-4)
    assert found.gradient_noise == pytest.approx(deviation / np.sqrt(12), rel=1e-4)
    squares = ((stack - full_BD) ** 2).sum((1, 2))
    assert found.gradient_error == pytest.approx(np.sqrt(squares.mean()) / length, rel=1e-4)


@pytest.mark.parametrize("name", ["midx-pq", "uniform", "softmax"])
@pytest.mark.parametrize("estimator", ["pool", "instance"])
def test_more_draws_lower_the_gradient_s_deviation_and_bias(name: str, estimator: str) -> None:
    model = make_model(f"sampler.estimator={estimator}", "training.batch_size=6")
    few, some, many = (measure(name, model=model, num_draws=m, repeats=200)[name] for m in (2, 8, 40))
    assert few.gradient_deviation > some.gradient_deviation > 1.25 * many.gradient_deviation > 0
    assert few.gradient_error > some.gradient_error > 1.25 * many.gradient_error
    assert few.gradient_bias > some.gradient_bias > many.gradient_bias


def test_the_gradient_is_that_of_the_run_s_estimator() -> None:
    """A pool holds the positives and the labels of about M draws; per-instance draws bring M for each instance."""
    about = len(set(make_instances().first(6).positives.tolist())) + 5
    sizes = {}
    for estimator in ("pool", "instance"):
        model = make_model(f"sampler.estimator={estimator}", "training.batch_size=6")
        sizes[estimator] = measure("uniform", model=model, num_draws=5)["uniform"].pool_size
    assert sizes["pool"] < about + 2 < sizes["instance"]


def test_in_batch_negatives_do_not_vary_and_do_not_depend_on_the_draws() -> None:
    few, many = (measure("in-batch", num_draws=m)["in-batch"] for m in (3, 300))
    assert few.gradient_deviation == few.gradient_noise == 0.0
    assert few.gradient_bias == many.gradient_bias == few.gradient_error > 0


def test_the_figures_do_not_depend_on_the_company_and_repeat() -> None:
    def without_clock(one: SamplerDiagnosis) -> SamplerDiagnosis:
        return dataclasses.replace(one, refresh_seconds=0, draw_microseconds=0, draw_share=0)

    alone, others = measure("lsh"), measure("midx-pq", "lsh", "softmax")
    assert without_clock(alone["lsh"]) == without_clock(others["lsh"])
    assert measure("lsh", seed=1)["lsh"].gradient_bias != alone["lsh"].gradient_bias


def test_the_batch_has_the_run_s_size_and_the_proposals_the_asked_number() -> None:
    batches = []
    model = make_model(f"training.batch_size={B // 4}")

    class Recorder(SilentReporter):
        def start(self, stage: str, total: int | None) -> None:
            batches.append((stage, total))

    half = measure("uniform", model=model, num_instances=B // 2, reporter=Recorder(), repeats=4)["uniform"]
    assert batches == [("diagnose", 1 + 4)]
    p_BL = softmax(float64_logits(model, make_instances())[: B // 2], axis=1)
    assert_spread(half.kl_from_softmax, rel_entr(np.full(L, 1 / L), p_BL).sum(1), rel=1e-4)
    # In-batch: the pool is the positives of the batch.
    positives = make_instances().first(B // 4).positives
    assert measure("in-batch", model=model)["in-batch"].pool_size == len(set(positives.tolist()))


def test_times_are_shares_of_a_whole() -> None:
    for one in measure(*NAMES).values():
        assert one.refresh_seconds >= 0 and one.draw_microseconds > 0 and 0 < one.draw_share <= 1


# ---------------------------------------------------------------------- a trained model

OPTIONS = (
    "model.dim=16",
    "model.dropout=0.3",
    "training.epochs=4",
    "training.batch_size=32",
    "training.label_learning_rate=0.05",
    "training.encoder_learning_rate=0.2",
    "sampler.num_codewords=3",
    "sampler.num_draws=8",
    "neighbors.enabled=false",
    "ranker.enabled=false",
)


@pytest.fixture(scope="module")
def run(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the topics. Read only."""
    output = tmp_path_factory.mktemp("runs") / "topics"
    train(topic_dir, output=output, config=load_config(assignments=OPTIONS))
    return output


@pytest.fixture(scope="module")
def diagnosis(run: Path, topic_dir: Path) -> Diagnosis:
    return diagnose(run, data=topic_dir, num_instances=100, repeats=40)


def test_the_bounds_of_the_theory_hold_for_every_instance_of_a_trained_model(run: Path, topic_dir: Path) -> None:
    """KL(Q||P) <= max |log Q/P| <= 2 max|r|; for the uniform and the unigram proposal with the logits themselves."""
    model = TrainedModel.load(RunDirectory.open(run), find_device("cpu"))
    features = normalize_rows(load_split(topic_dir / "train.txt").features)
    queries = model.encode(features)
    logits_BL = queries.double().numpy() @ model.label_table.double().numpy().T + model.bias.double().numpy()
    log_p_BL = logits_BL - logsumexp(logits_BL, axis=1, keepdims=True)
    largest_B = np.abs(logits_BL).max(1)
    for name in BOUNDED:
        sampler = diagnostics._build(model, name)
        sampler.refresh(model.label_table, model.bias)
        log_q_BL = sampler.log_proposal(queries, torch.arange(23)).double()
        found = {
            key: value.numpy()
            for key, value in diagnostics._compare(name, torch.from_numpy(logits_BL), log_q_BL).items()
        }
        ratio_B = np.abs(log_q_BL.numpy() - log_p_BL).max(1)
        assert (found["kl_from_softmax"] <= ratio_B + 1e-5).all()
        assert (ratio_B <= found["kl_bound"] + 1e-5).all()
        if name.startswith("midx-"):
            codebook = sampler.codebook  # type: ignore[attr-defined]
            score1_BC, score2_BC = (scores.double().numpy() for scores in codebook.scores(queries))
            log_prior_L = np.log(model.frequencies.numpy() + 1.0)
            residual_BL = logits_BL - score1_BC[:, codebook.codes1] - score2_BC[:, codebook.codes2] - log_prior_L
            # The table is small: no score is clamped, and the residual is the paper's up to a constant.
            np.testing.assert_allclose(found["kl_bound"], residual_BL.max(1) - residual_BL.min(1), rtol=1e-4)
            assert (found["kl_bound"] <= 2 * np.abs(residual_BL).max(1) + 1e-5).all()
        else:
            q_L = np.exp(log_q_BL[0].numpy())
            assert (found["kl_bound"] <= 2 * largest_B + np.log(23 * q_L.max()) + 1e-5).all()


def test_a_diagnosis_says_what_it_measured(diagnosis: Diagnosis, run: Path, topic_dir: Path) -> None:
    assert tuple(one.name for one in diagnosis.samplers) == NAMES
    assert (diagnosis.num_labels, diagnosis.num_instances, diagnosis.batch_size) == (23, 100, 32)
    assert (diagnosis.estimator, diagnosis.num_draws, diagnosis.repeats) == ("pool", 8, 40)
    assert (diagnosis.dropout, diagnosis.seed, diagnosis.plot) == (0.0, 0, None)
    assert (diagnosis.run, diagnosis.data) == (str(run), str(topic_dir)) and diagnosis.seconds > 0


def test_on_a_trained_model_the_theory_orders_the_samplers(diagnosis: Diagnosis) -> None:
    found = {one.name: one for one in diagnosis.samplers}
    for name in BOUNDED:
        kl, bound = found[name].kl_from_softmax, found[name].kl_bound
        assert kl is not None and bound is not None and 0 < kl.mean <= bound.mean
        assert kl.p10 <= kl.mean <= kl.p90 and kl.p90 <= bound.p90
    kl_of = {name: one.kl_from_softmax.mean for name, one in found.items() if one.kl_from_softmax is not None}
    assert max(kl_of["midx-pq"], kl_of["midx-rq"]) < kl_of["uniform"]


def test_a_diagnosis_is_of_the_run_s_model_on_scaled_rows(diagnosis: Diagnosis, run: Path, topic_dir: Path) -> None:
    """The uniform proposal from the model's tensors alone: relu(x E + e) W^T + b, x of length 1."""
    split = load_split(topic_dir / "train.txt")
    table = {name: array.astype(float) for name, array in dequantize(RunDirectory.open(run).map_model()).items()}
    rows = split.features[choose_instances(split.labels, 100, seed=0)].toarray().astype(float)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    queries = np.maximum(rows @ table["encoder.embedding"] + table["encoder.bias"], 0.0)
    p_BL = softmax(queries @ table["labels.weight"].T + table["labels.bias"], axis=1)
    (uniform,) = (one for one in diagnosis.samplers if one.name == "uniform")
    assert_spread(uniform.kl_from_softmax, rel_entr(np.full(23, 1 / 23), p_BL).sum(1), rel=1e-4)


def test_the_document_of_a_diagnosis_is_json(diagnosis: Diagnosis) -> None:
    document = json.loads(json.dumps(diagnosis.as_dict()))
    assert set(document) == {field.name for field in dataclasses.fields(Diagnosis)} | {"positives"}
    by_name = {one["name"]: one for one in document["samplers"]}
    assert set(by_name["uniform"]["kl_from_softmax"]) == {"mean", "p10", "p90"}
    assert by_name["in-batch"]["kl_from_softmax"] is None and by_name["in-batch"]["gradient_bias"] > 0
    assert by_name["lsh"]["kl_bound"] is None


def test_queries_are_encoded_as_at_prediction_or_as_in_training(run: Path, topic_dir: Path) -> None:
    model = TrainedModel.load(RunDirectory.open(run), find_device("cpu"))
    features = normalize_rows(load_split(topic_dir / "train.txt").features)[:50]
    plain = torch.cat([part for _, part in model.encoder.encode(features)])
    assert torch.equal(model.encode(features), plain)
    dropped = model.encode(features, dropout=True, seed=3)
    assert not model.encoder.training
    assert torch.equal(dropped, model.encode(features, dropout=True, seed=3))
    active = plain > 0
    kept = dropped[active] != 0
    assert 0.6 < kept.double().mean() < 0.8
    assert torch.allclose(dropped[active][kept], plain[active][kept] / (1 - 77 / 256))  # the rate in 256ths
    assert torch.equal(model.encode(features), plain), "and off again"
    options: dict[str, Any] = {"data": topic_dir, "samplers": ["uniform"], "repeats": 2}
    noisy, calm = diagnose(run, dropout=True, **options), diagnose(run, **options)
    assert (noisy.dropout, calm.dropout) == (0.3, 0.0)
    assert noisy.samplers[0].kl_from_softmax != calm.samplers[0].kl_from_softmax


def test_instances_are_random_and_have_labels(topic_data: Callable[..., tuple[csr_matrix, csr_matrix]]) -> None:
    labels = topic_data(60)[1]
    rows = choose_instances(labels, 20, seed=0)
    assert rows.size == len(set(rows.tolist())) == 20 and not {3, 5} & set(
        choose_instances(labels, 99, seed=0).tolist()
    )
    assert choose_instances(labels, 99, seed=0).size == 58
    assert (
        rows.tolist() == choose_instances(labels, 20, seed=0).tolist() != choose_instances(labels, 20, seed=1).tolist()
    )


def test_options_are_taken(run: Path, topic_dir: Path) -> None:
    result = diagnose(
        run, data=topic_dir, samplers=["rff", "midx-rq", "rff"], num_draws=5, num_instances=10**6, repeats=2, seed=4
    )
    assert [one.name for one in result.samplers] == ["rff", "midx-rq"]
    assert (result.num_draws, result.num_instances, result.repeats, result.seed) == (5, 318, 2, 4)


def test_per_instance_runs_are_measured_without_in_batch(topic_dir: Path, tmp_path: Path) -> None:
    config = load_config(assignments=[*OPTIONS, "sampler.estimator=instance", "training.epochs=1"])
    train(topic_dir, output=tmp_path / "run", config=config)
    result = diagnose(tmp_path / "run", data=topic_dir, repeats=3)
    assert [one.name for one in result.samplers] == [name for name in NAMES if name != "in-batch"]
    assert result.estimator == "instance"
    with pytest.raises(UsageError, match=r"sampler\.estimator=pool"):
        diagnose(tmp_path / "run", data=topic_dir, samplers=["in-batch"])


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samplers": ["unifrom"]}, "Sampler 'unifrom' is unknown; expected .*midx-pq.* Did you mean uniform?"),
        ({"samplers": [""]}, "Sampler '' is unknown"),
        ({"samplers": ["uniform", "full"]}, "full draws nothing"),
        ({"samplers": []}, "no sampler"),
        ({"num_draws": 0}, "draws is 0; expected at least 1"),
        ({"num_instances": 0}, "instances is 0"),
        ({"repeats": 1}, "repeats is 1; expected at least 2"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_wrong_options_are_refused(run: Path, topic_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        diagnose(run, data=topic_dir, **options)


def test_data_of_other_sizes_is_refused(run: Path, tmp_path: Path) -> None:
    for header, message in (
        ("1 7 23\n2 0:1.0\n", "7 features; the model was trained with 40"),
        ("1 40 5\n2 0:1.0\n", "5 labels; the model was trained with 23"),
        ("1 40 23\n 0:1.0\n", "no instance has a label"),
    ):
        (tmp_path / "data.txt").write_text(header, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            diagnose(run, data=tmp_path / "data.txt")


def test_a_run_that_does_not_know_its_label_frequencies_is_refused(run: Path, topic_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "model.json").unlink()  # an unfinished run: the checkpoint's model
    store = CheckpointStore(copy / "checkpoints")
    saved = store.load("best", ["model"])
    step = store.step_of("best")
    assert step is not None
    model = {name: tensor for name, tensor in saved.parts["model"].items() if not name.startswith("train.")}
    store.save(step, {"model": model}, saved.state)
    with pytest.raises(DataError, match="does not hold the label frequencies"):
        diagnose(copy, data=topic_dir)


def test_errors_have_the_documented_exit_codes(run: Path, topic_dir: Path, tmp_path: Path) -> None:
    def code(*words: Path | str) -> int:
        return app.run(["diagnose", *map(str, words)])

    assert code(run, topic_dir, "--samplers", "midx") == 2
    assert code(run, topic_dir, "--plot", tmp_path / "x.gif") == 2
    assert code(topic_dir, topic_dir) == 3
    assert code(run, tmp_path / "absent") == 3
    assert code(run, topic_dir, "--plot", tmp_path / "absent" / "x.png") == 4


# ------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def plots() -> Any:
    pytest.importorskip("matplotlib")
    from xmc_midx import plots

    return plots


@pytest.mark.parametrize("ending", ["PNG", "svg", "pdf"])
def test_a_figure_is_written(ending: str, plots: Any, diagnosis: Diagnosis, tmp_path: Path) -> None:
    path = tmp_path / f"samplers.{ending}"
    plots.plot_samplers(diagnosis.samplers, path, title="topics")
    assert path.read_bytes()[:200].startswith((b"\x89PNG", b"%PDF", b"<?xml"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_figure_that_cannot_be_finished_leaves_the_old_one(
    plots: Any, diagnosis: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(self: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill_the_disk)
    with pytest.raises(ResourceError, match=r"old\.png: cannot be written: No space left"):
        plots.plot_samplers(diagnosis.samplers, path, title="topics")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_diagnose_draws_the_figure(plots: Any, run: Path, topic_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.svg"
    result = diagnose(run, data=topic_dir, samplers=["midx-pq"], repeats=2, plot=path)
    assert result.plot == str(path) and path.stat().st_size > 1000


def drawn_names(plots: Any, diagnoses: list[SamplerDiagnosis]) -> tuple[Any, list[Any]]:
    """The gradient panel of a figure, and the names in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    plots._draw_gradient(axes, diagnoses)
    figure.draw_without_rendering()
    return axes, [text for text in axes.texts if text.get_text()]


def test_names_stand_inside_and_touch_neither_one_another_nor_a_point(plots: Any, diagnosis: Diagnosis) -> None:
    rng = np.random.default_rng(0)
    crowd = [
        dataclasses.replace(one, gradient_error=0.4 + 0.02 * rng.random(), draw_microseconds=10 * (1 + rng.random()))
        for one in diagnosis.samplers
    ]
    for diagnoses in (list(diagnosis.samplers), crowd):
        axes, names = drawn_names(plots, diagnoses)
        assert sorted(name.get_text() for name in names) == sorted(NAMES)
        boxes = [name.get_window_extent() for name in names]
        inside = axes.get_window_extent().padded(1)
        assert all(inside.contains(*corner) for box in boxes for corner in box.corners())
        assert all(box.count_overlaps(boxes) == 1 for box in boxes)
        points = axes.transData.transform(np.stack(axes.lines[0].get_data(), 1))
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_figures_that_are_absent_zero_or_infinite_are_drawn_in_words(
    plots: Any, diagnosis: Diagnosis, tmp_path: Path
) -> None:
    infinite = Spread(mean=math.inf, p10=1.0, p90=math.inf)
    nothing = Spread(mean=0.0, p10=0.0, p90=0.0)
    odd = [
        dataclasses.replace(
            diagnosis.samplers[0],
            kl_from_softmax=kl,
            kl_bound=kl,
            effective_share=kl,
            gradient_error=math.nan,
            draw_microseconds=0.0,
        )
        for kl in (None, infinite, nothing)
    ]
    for diagnoses in (odd, odd[:1], [dataclasses.replace(odd[0], gradient_error=0.0)]):
        plots.plot_samplers(diagnoses, tmp_path / "odd.svg", title="odd")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots._draw_divergence(axes, odd)
    assert [text.get_text() for text in axes.texts] == ["no density", "infinite", "under 0.001"]


def test_a_figure_is_refused_before_the_work(plots: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[str, type[XmcMidxError], str]] = [
        ("x.gif", UsageError, r"x\.gif: its ending names no format of a figure; expected \.png, \.svg or \.pdf"),
        ("x", UsageError, "its ending"),
        ("absent/x.png", ResourceError, "cannot be written"),
    ]
    for name, kind, message in refused:
        with pytest.raises(kind, match=message):
            diagnose(tmp_path / "no run", data="nothing", plot=tmp_path / name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"matplotlib, which is not installed\. .*pip install") as caught:
        diagnose(tmp_path / "no run", data="nothing", plot=tmp_path / "x.png")
    assert caught.value.exit_code == 2
