"""The forecast of memory, disk and time: its terms against the parts that are built, and its sense of direction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xmc_midx.build import build_encoder, build_softmax
from xmc_midx.cli import app
from xmc_midx.config import load_config
from xmc_midx.data.dataset import load_dataset
from xmc_midx.forecast import Forecast, Speed, TrainingData, _rows_of_a_batch, cheaper_options, forecast
from xmc_midx.pipeline import plan, train
from xmc_midx.recipe import DataShape, resolve

COUNTS = np.array([90, 40, 3, 0, 1, 77], dtype=np.int64)
DATA = TrainingData(
    num_instances=100, feature_counts=COUNTS, label_counts=np.array([5, 50, 0, 1], dtype=np.int64), loaded_bytes=10**6
)
SHAPE = DataShape(num_instances=100, num_features=6, num_labels=4, num_positives=56)


def resolved(*assignments: str):  # type: ignore[no-untyped-def]
    return resolve(load_config(assignments=assignments), SHAPE)


def test_the_tables_are_those_that_are_built() -> None:
    import torch

    config = resolved("model.dim=12")
    encoder, softmax = build_encoder(config, 6), build_softmax(config, DATA.label_counts, 100, torch.device("cpu"))
    built = sum(p.nbytes for p in [*encoder.parameters(), *softmax.parameters()])
    assert forecast(config, DATA).host["tables"] == pytest.approx(built, rel=0.05)


def test_the_rows_of_a_batch_are_their_expectation() -> None:
    rng = np.random.default_rng(0)
    has = np.array([rng.permutation(100) < count for count in COUNTS])
    seen = [has[:, rng.integers(100, size=16)].any(1).sum() for _ in range(4000)]
    rows, labels, pool, groups = _rows_of_a_batch(resolved("training.batch_size=16"), DATA)
    assert rows == int(np.mean(seen)) and pool == labels <= 4 and groups == 1


def test_an_instance_is_scored_against_the_pool_of_its_group() -> None:
    data = TrainingData(
        num_instances=1000, feature_counts=np.full(9, 10), label_counts=np.full(500, 4), loaded_bytes=1000
    )
    sizes = ["training.batch_size=64", "sampler.num_draws=20"]
    pools = []
    for option in ("sampler.pool_instances=16", "sampler.pool_instances=64", "sampler.positives=certain"):
        _, labels, *pool = _rows_of_a_batch(resolved(*sizes, option), data)
        assert labels == int(20 + 500 * (1 - 0.996**64))
        pools.append(pool)
    assert pools == [[int(20 + 500 * (1 - 0.996**16)), 4], [labels, 1], [labels, 1]]


def test_a_label_table_in_the_hosts_memory_is_no_burden_of_the_device() -> None:
    there, here = (forecast(resolved(f"model.label_memory={memory}"), DATA, cuda=True) for memory in ("host", "device"))
    num_labels, dim = DATA.label_counts.shape[0], resolved().model.dim
    assert isinstance(dim, int)
    assert here.device["tables"] - there.device["tables"] == 4 * num_labels * dim
    assert here.device["optimiser"] - there.device["optimiser"] == 8 * num_labels == there.host["optimiser"]
    assert here.host["tables"] == there.host["tables"]


def test_the_host_is_offered_for_a_device_and_a_sampler_that_allow_it() -> None:
    data = TrainingData(
        num_instances=10**5, feature_counts=np.full(10, 5), label_counts=np.full(10**6, 1), loaded_bytes=10**6
    )
    shape = DataShape(num_instances=10**5, num_features=10, num_labels=10**6, num_positives=10**6)

    def offered(name: str, cuda: bool) -> bool:
        config = resolve(load_config(assignments=[f"sampler.name={name}", "model.dim=512"]), shape)
        return "model.label_memory=host" in dict(cheaper_options(config, data, cuda=cuda))

    assert offered("midx-pq", True)
    assert not offered("midx-pq", False) and not offered("softmax", True)


def test_each_option_lowers_the_peak_and_the_most_useful_comes_first() -> None:
    data = TrainingData(
        num_instances=10**5,
        feature_counts=np.full(10**6, 5),
        label_counts=np.full(10**6, 1),
        loaded_bytes=10**8,
    )
    config = resolve(
        load_config(assignments=["training.batch_size=1024"]),
        DataShape(num_instances=10**5, num_features=10**6, num_labels=10**6, num_positives=10**6),
    )
    peak = forecast(config, data).host_bytes
    options = cheaper_options(config, data)
    assert len(options) == 3 and options[0][0] == "model.dim=96"
    assert all(size < peak for _, size in options) and options == sorted(options, key=lambda pair: pair[1])
    on_cuda = forecast(config, data, cuda=True)
    assert on_cuda.device["tables"] == forecast(config, data).host["tables"]


def test_the_disk_forecast_holds_the_run_directory(topic_dir: Path, tmp_path: Path) -> None:
    config = load_config(assignments=["training.epochs=4", "training.save_every_steps=5"])
    needs = plan(topic_dir, config=config).forecast
    result = train(topic_dir, output=tmp_path / "run", config=config)
    sizes = [sum(f.stat().st_size for f in path.iterdir()) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert needs.checkpoint_bytes == pytest.approx(max(sizes), rel=0.2)
    assert sum(f.stat().st_size for f in Path(result.run).rglob("*") if f.is_file()) <= needs.disk_bytes


def test_plan_prints_what_is_needed_beside_what_there_is(
    topic_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert app.run(["plan", str(topic_dir), "--set", "model.dim=64", "--output", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for word in ("Memory at the peak", "tables", "in all", "a checkpoint", "free", "time"):
        assert word in text
    assert app.run(["plan", str(topic_dir), "--set", "model.dim=64", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["memory_bytes"] == sum(document["memory"].values()) and document["seconds"] > 0
    assert document["config"]["model"]["dim"] == 64 and not (tmp_path / "run").exists()


def test_few_negatives_in_the_gradient_leave_a_third_of_the_products() -> None:
    data = TrainingData.of_shape(100_000, 20_000, 50_000, values=50, positives=5)
    shape = DataShape(num_instances=100_000, num_features=20_000, num_labels=50_000, num_positives=data.num_positives)

    def step(negatives: str, *options: str, rounds_slopes: bool = True) -> dict[str, float]:
        config = resolve(load_config(assignments=[f"sampler.gradient_negatives={negatives}", *options]), shape)
        speed = Speed(flops=1e11, bytes=1e10, rounds_slopes=rounds_slopes)
        return dict(forecast(config, data, speed=speed).step)

    few, whole = step("8"), step("all")
    assert few["products"] == pytest.approx(whole["products"] / 3)
    assert whole["rows"] < few["rows"] < step("64")["rows"] < whole["rows"] + whole["products"]
    assert step("8", rounds_slopes=False) == step("all", rounds_slopes=False) == whole
    # Own draws of each instance are no pool, and a pool whose logits come in chunks is not rounded.
    for option in ("sampler.estimator=instance", "sampler.num_draws=49999"):
        assert step("8", option) == step("all", option)


def test_what_follows_the_epochs_is_part_of_the_time() -> None:
    data = TrainingData.of_shape(100_000, 20_000, 50_000, values=50, positives=5)
    shape = DataShape(num_instances=100_000, num_features=20_000, num_labels=50_000, num_positives=data.num_positives)

    def seconds(*options: str) -> tuple[float, float]:
        result = forecast(resolve(load_config(assignments=options), shape), data, speed=Speed(flops=1e11, bytes=1e10))
        assert result.seconds is not None and result.finish_seconds is not None
        return result.seconds, result.finish_seconds

    one, two, four = (seconds(f"training.epochs={epochs}") for epochs in (1, 2, 4))
    assert one[1] == two[1] == four[1] and four[0] - two[0] == pytest.approx(2 * (two[0] - one[0]))
    plain = seconds("training.epochs=1", "neighbors.enabled=false", "ranker.enabled=false")
    assert one[0] - plain[0] == pytest.approx(one[1] - plain[1]) and 0 < plain[1] < one[1] < one[0]
    fewer = seconds("training.epochs=1", "ranker.num_instances=1000")
    assert plain[1] < fewer[1] < one[1]


def test_plan_takes_a_shape_for_data_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("model.dim=64", "sampler.num_draws=2048", "neighbors.enabled=false", "ranker.enabled=false")
    words = [*(word for option in options for word in ("--set", option)), "--json"]
    assert app.run(["plan", "--shape", "100000,20000,1e7,50,5", *words]) == 0
    wide = json.loads(capsys.readouterr().out)
    assert app.run(["plan", "--shape", "100000,20000,1e5,50,5", *words]) == 0
    narrow = json.loads(capsys.readouterr().out)
    # A step knows the pool, not the labels; the memory knows them.
    assert wide["step_seconds"].keys() == {"products", "rows", "overhead"} and wide["bound"] is not None
    more = (wide["memory"]["tables"] + wide["memory"]["sampler"]) - (
        narrow["memory"]["tables"] + narrow["memory"]["sampler"]
    )
    assert more == pytest.approx((4 * 65 + 24) * 9.9e6, rel=0.01)
    # The label cells are the peak of ten million labels: the int8 tables, and a few hundred bytes a label.
    assert wide["memory"]["cells"] < (64 + 450) * 1e7 + 0.3e9
    half = [*words[:-1], "--set", "model.label_precision=bfloat16", "--json"]
    assert app.run(["plan", "--shape", "100000,20000,1e7,50,5", *half]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["tables"] == pytest.approx(1.32e9 + 5.2e6, rel=0.01)


@pytest.mark.parametrize("shape", ["1,2,3", "a,b,c,d,e", "0,1,1,1,1", "1,1,1,1,nan", "1e300,1,1,1,1", "1,1,1,1,1,1"])
def test_a_shape_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], shape: str) -> None:
    assert app.run(["plan", "--shape", shape]) == 2
    assert "expected five numbers" in capsys.readouterr().err


def test_what_cannot_be_used_is_not_counted() -> None:
    data = TrainingData.of_shape(1000, 1000, 300, values=10, positives=2)
    wide = TrainingData.of_shape(100_000, 1000, 300, values=10, positives=2)
    wide_shape = DataShape(num_instances=100_000, num_features=1000, num_labels=300, num_positives=wide.num_positives)

    def needs(*options: str) -> Forecast:
        return plan(data, config=load_config(assignments=["model.dim=8", *options])).forecast

    assert needs("training.keep_checkpoints=100000000").disk_bytes < 600 * needs().checkpoint_bytes + 10**9
    many, few = (
        forecast(resolve(load_config(assignments=[f"neighbors.count={count}"]), wide_shape), wide).host
        for count in (10**9, 50)
    )
    assert many["neighbours"] - few["neighbours"] >= 10 * (wide.num_instances - 50) * 2000
    assert needs("training.batch_size=1000000000").seconds is not None, "the products of a billion are not timed"
    shape = DataShape(num_instances=1000, num_features=1000, num_labels=300, num_positives=data.num_positives)
    config = resolve(load_config(assignments=["model.dim=8", "sampler.num_codewords=50000"]), shape)
    (best, _), *_ = cheaper_options(config, data)
    assert best == "sampler.num_codewords=22"


def test_plan_names_memory_where_it_does_not_fit() -> None:
    data = TrainingData.of_shape(1000, 1000, 10**6, values=10, positives=2)
    assert data.num_positives >= 2000 and data.label_counts.shape == (10**6,)
    assert plan(data, config=load_config(assignments=["model.dim=64"])).bound != "memory"
    assert plan(data, config=load_config(assignments=["model.dim=10000000"])).bound == "memory"


@pytest.mark.parametrize(("preset", "dim"), [("fast", 256), ("default", 512), ("best", 512)])
def test_plan_knows_the_presets(topic_dir: Path, capsys: pytest.CaptureFixture[str], preset: str, dim: int) -> None:
    assert app.run(["plan", str(topic_dir), "--preset", preset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["model"]["dim"] == dim


def test_the_counts_of_the_data_are_those_of_the_training_split(topic_dir: Path) -> None:
    from xmc_midx.pipeline.planning import _training_data

    dataset = load_dataset(topic_dir)
    assert dataset.train is not None
    data = _training_data(dataset, dataset.train)
    assert (data.num_values, data.num_positives) == (dataset.train.features.nnz, dataset.train.labels.nnz)


def test_a_step_of_static_shapes_counts_twice_and_only_where_a_pool_is_whole() -> None:
    def epoch(name: str, graphs: bool, num_labels: int) -> int:
        shape = DataShape(num_instances=10**5, num_features=2000, num_labels=num_labels, num_positives=5 * 10**5)
        data = TrainingData.of_shape(10**5, 2000, num_labels, values=50, positives=5)
        words = [f"sampler.name={name}", f"training.cuda_graphs={graphs}", "training.batch_size=512"]
        config = resolve(load_config(assignments=words), shape)
        assert ("training.cuda_graphs=false" in dict(cheaper_options(config, data, cuda=True))) <= graphs
        return forecast(config, data, cuda=True).device["epoch"]

    assert 1.2 < epoch("midx-pq", True, 50_000) / epoch("midx-pq", False, 50_000) < 4
    assert 1.5 < epoch("full", True, 60_000) / epoch("full", False, 60_000) < 3
    # So many logits of a batch are never held at once.
    assert epoch("full", True, 70_000) == epoch("full", False, 70_000)
    assert epoch("lsh", True, 50_000) == epoch("lsh", False, 50_000)


def test_what_the_forecast_knows_of_other_modules_is_so() -> None:
    from xmc_midx import codebook, encoder, estimators, finish, forecast, neighbors, stacking, topk, trainer

    assert trainer._START_POSITIVES == forecast._START_POSITIVES
    assert stacking._MOST_VOTED == forecast._MOST_VOTED
    assert finish._CELL_QUERIES == forecast._CELL_QUERIES
    assert codebook._ASSIGN_CHUNK["cpu"] == forecast._ASSIGN_CHUNK
    assert codebook._POINTS_PER_CODEWORD == forecast._POINTS_PER_CODEWORD
    assert encoder._ENCODE_CHUNK == forecast._ENCODE_CHUNK
    assert topk._CHUNK_ELEMENTS == estimators._CHUNK_ELEMENTS["cpu"] == forecast._SCORES_AT_ONCE
    assert estimators._CHUNK_ELEMENTS["cuda"] == forecast._LOGITS_AT_ONCE_CUDA
    assert 4 * (neighbors._LEVELS + 1) == forecast._FEATURE_LEVELS
