"""Batches and the training loop: what is seen and when, rates, start values, resuming, divergence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from xmc_midx.build import build_encoder, build_softmax
from xmc_midx.config import Config, load_config
from xmc_midx.data.batches import BatchStream, made_ahead
from xmc_midx.data.features import normalize_rows
from xmc_midx.errors import DivergedError, UsageError
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.rows import sparse_rows
from xmc_midx.trainer import Trainer
from xmc_midx.types import SilentReporter

TopicMaker = Callable[..., tuple[csr_matrix, csr_matrix]]
OPTIONS = (
    "model.dim=12",
    "model.dropout=0.3",
    "training.epochs=3",
    "training.batch_size=32",
    "training.label_learning_rate=0.05",
    "training.encoder_learning_rate=0.2",
    "sampler.num_codewords=3",
    "sampler.num_draws=8",
)


class Interruption(BaseException):
    """Stands for a kill."""


def make_config(*assignments: str) -> Config:
    config = load_config(assignments=[*OPTIONS, *assignments])
    return resolve(config, DataShape(num_instances=130, num_features=40, num_labels=23, num_positives=400))


def make_trainer(
    data: tuple[csr_matrix, csr_matrix],
    *assignments: str,
    initialize: bool = True,
    device: str = "cpu",
    static_shapes: bool | None = None,
) -> Trainer:
    config = make_config(*assignments)
    features, labels = normalize_rows(data[0]), data[1]
    assert isinstance(config.training.batch_size, int)
    stream = BatchStream(features, labels, batch_size=config.training.batch_size, seed=config.training.seed)
    frequencies = np.bincount(labels.indices, minlength=labels.shape[1])
    softmax = build_softmax(config, frequencies, features.shape[0], torch.device(device))
    every = config.sampler.refresh_every
    trainer = Trainer(
        build_encoder(config, features.shape[1]).to(device),
        softmax,
        stream,
        config.training,
        refresh_every=every if isinstance(every, int) else None,
        static_shapes=static_shapes,
    )
    if initialize:
        trainer.initialize(config.model.label_init, config.training.seed)
    return trainer


@pytest.fixture(scope="module")
def data(topic_data: TopicMaker) -> tuple[csr_matrix, csr_matrix]:
    """130 instances: four batches of 32 and one of 2."""
    return topic_data(130)


# ------------------------------------------------------------------------- batches


class TestBatchStream:
    def make(self, data: tuple[csr_matrix, csr_matrix], *, batch_size: int = 32, seed: int = 0) -> BatchStream:
        return BatchStream(*data, batch_size=batch_size, seed=seed)

    def ids(self, stream: BatchStream, epoch: int, **options: int) -> list[int]:
        return torch.cat([batch.instance_ids for batch in stream.epoch(epoch, **options)]).tolist()

    @pytest.mark.parametrize(("batch_size", "sizes"), [(32, [32] * 4 + [2]), (65, [65, 65]), (1000, [130])])
    def test_an_epoch_holds_every_instance_once(
        self, data: tuple[csr_matrix, csr_matrix], batch_size: int, sizes: list[int]
    ) -> None:
        stream = self.make(data, batch_size=batch_size)
        assert [batch.num_instances for batch in stream.epoch(1)] == sizes
        assert stream.steps_per_epoch == len(sizes)
        assert sorted(self.ids(stream, 1)) == list(range(130))

    def test_the_order_depends_on_seed_and_epoch_alone(self, data: tuple[csr_matrix, csr_matrix]) -> None:
        stream = self.make(data)
        assert self.ids(stream, 2) == self.ids(stream, 2) == self.ids(self.make(data, batch_size=7), 2)
        orders = [self.ids(stream, 1), self.ids(stream, 2), self.ids(self.make(data, seed=1), 1), list(range(130))]
        assert len({tuple(order) for order in orders}) == 4

    def test_a_stream_is_taken_up_at_any_step(self, data: tuple[csr_matrix, csr_matrix]) -> None:
        stream = self.make(data)
        whole = self.ids(stream, 3)
        for step in range(5):
            assert self.ids(stream, 3, first_step=step) == whole[32 * step :]
        assert list(stream.epoch(3, first_step=5)) == []

    def test_a_batch_holds_the_rows_that_it_names(self, data: tuple[csr_matrix, csr_matrix]) -> None:
        features, labels = data
        for batch in self.make(data).epoch(1):
            rows = batch.features
            assert rows.num_rows == batch.num_instances
            for place, instance in enumerate(batch.instance_ids.tolist()):
                mine = slice(int(rows.offsets[place]), int(rows.offsets[place + 1]))
                assert rows.feature_ids[mine].tolist() == features[[instance]].indices.tolist()
                assert rows.values[mine].tolist() == features[[instance]].data.tolist()
                own = slice(int(batch.positive_offsets[place]), int(batch.positive_offsets[place + 1]))
                assert batch.positives[own].tolist() == labels[[instance]].indices.tolist()


# --------------------------------------------------------------------------- start


def test_labels_start_at_the_mean_of_their_encoded_instances_and_at_their_log_frequency(
    data: tuple[csr_matrix, csr_matrix],
) -> None:
    trainer = make_trainer(data)
    with torch.no_grad():
        query_ND = trainer.encoder.eval()(sparse_rows(normalize_rows(data[0]))).double().numpy()
    labels = data[1].toarray().astype(bool)
    for label in range(23):
        mean = query_ND[labels[:, label]].mean(0) if labels[:, label].any() else np.zeros(12)
        np.testing.assert_allclose(trainer.softmax.weight[label].detach().numpy(), mean, atol=1e-5)
    expected = np.log(labels.sum(0) + 1.0)
    np.testing.assert_allclose(trainer.softmax.bias.detach().numpy(), expected, rtol=1e-6)
    assert expected[22] == 0, "label 22 has no instance"


def test_a_random_start_and_a_missing_bias_are_left_as_they_are(data: tuple[csr_matrix, csr_matrix]) -> None:
    trainer = make_trainer(data, "model.label_init=random", "model.label_bias=false")
    assert trainer.softmax.weight.abs().sum() > 0 and not trainer.softmax.bias.any()
    trainer.run_epoch(SilentReporter())
    assert not trainer.softmax.bias.any()


# ---------------------------------------------------------------------------- loop


def test_the_loss_falls_and_is_the_mean_of_the_steps(data: tuple[csr_matrix, csr_matrix]) -> None:
    trainer = make_trainer(data, "training.epochs=6")
    seen: list[float] = []

    class Recorder(SilentReporter):
        def step(self, advance: int = 1, **facts: float) -> None:
            seen.append(facts["loss"])

    epochs = [trainer.run_epoch(Recorder()) for _ in range(6)]
    assert [stats.epoch for stats in epochs] == [1, 2, 3, 4, 5, 6]
    assert [stats.num_steps for stats in epochs] == [5, 10, 15, 20, 25, 30]
    assert epochs[-1].loss < 0.85 * epochs[0].loss
    # The running mean at an epoch's last step is the epoch's loss.
    assert [seen[5 * i + 4] for i in range(6)] == [stats.loss for stats in epochs]
    assert all(0 < stats.sampler["pool_size"] <= 23 and stats.instances_per_second > 0 for stats in epochs)


def test_the_feature_table_sums_its_squares_and_the_label_table_averages_them(
    data: tuple[csr_matrix, csr_matrix],
) -> None:
    trainer = make_trainer(data)
    trainer.run_epoch(SilentReporter())
    state = trainer.optimizer.state
    assert "table_moment" in state[trainer.encoder.embedding] and "count" not in state[trainer.encoder.embedding]
    assert "count" in state[trainer.softmax.weight]


def test_the_steps_are_those_that_autograd_and_the_optimiser_take(data: tuple[csr_matrix, csr_matrix]) -> None:
    """The gradient does not go back to the feature table on its own: the optimiser makes it of the bags'."""
    options = ("model.num_hidden_layers=1", "model.dropout=0")
    trainer, twin = (make_trainer(data, *options) for _ in range(2))
    trainer.run_epoch(SilentReporter())
    twin.encoder.train()
    for batch in twin.stream.epoch(1):
        if twin._refresh_is_due():
            twin.softmax.refresh()
        twin._set_rates()
        twin.softmax(twin.encoder(batch.features), (batch.positives, batch.positive_offsets)).backward()
        assert twin.encoder.embedding.grad is not None
        twin.optimizer.step()
        twin.optimizer.zero_grad()
        twin.step += 1
    assert trainer.step == twin.step == 5
    for name, tensor in twin.model_tensors().items():
        torch.testing.assert_close(trainer.model_tensors()[name], tensor, rtol=1e-4, atol=1e-5)


def test_rates_rise_linearly_and_fall_to_zero(data: tuple[csr_matrix, csr_matrix]) -> None:
    trainer = make_trainer(data, "training.warmup_fraction=0.2")
    rates: list[list[float]] = []
    step = trainer.optimizer.step

    def recording(*arguments: Any) -> None:
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        step(*arguments)

    trainer.optimizer.step = recording  # type: ignore[method-assign]
    for _ in range(3):
        trainer.run_epoch(SilentReporter())
    expected = [min((i + 1) / 3, 1.0) * (1 - i / 15) for i in range(15)]
    np.testing.assert_allclose(rates, np.outer(expected, [0.2, 0.025, 0.05]))


@pytest.mark.parametrize(("every", "steps"), [("epoch", [0, 5, 10]), ("4", [0, 4, 8, 12])])
def test_the_sampler_is_refreshed_when_due(
    data: tuple[csr_matrix, csr_matrix], every: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(data, f"sampler.refresh_every={every}")
    refreshed: list[int] = []
    monkeypatch.setattr(trainer.softmax, "refresh", lambda: refreshed.append(trainer.step))
    trainer.softmax.sampler.refresh(trainer.softmax.weight, trainer.softmax.bias)  # type: ignore[union-attr]
    for _ in range(3):
        trainer.run_epoch(SilentReporter())
    assert refreshed == steps


def test_the_first_refresh_fits_the_codebooks_to_the_start_of_training_not_to_a_random_table(
    data: tuple[csr_matrix, csr_matrix],
) -> None:
    trainer = make_trainer(data)
    table_LD = trainer.softmax.weight.detach().clone()
    trainer.softmax.refresh()
    used = trainer.softmax.sampler.state_dict()  # type: ignore[union-attr]
    fresh = make_trainer(data).softmax.sampler
    fresh.refresh(table_LD, trainer.softmax.bias)  # type: ignore[union-attr]
    for name, tensor in fresh.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(used[name], tensor), name


@pytest.mark.fault("R10")
def test_instances_without_labels_or_features_take_part_without_harm(data: tuple[csr_matrix, csr_matrix]) -> None:
    features, labels = data
    nothing = csr_matrix(labels.shape, dtype=np.float32)
    for broken in ((features, nothing), (csr_matrix(features.shape, dtype=np.float32), labels)):
        trainer = make_trainer(broken)
        for _ in range(3):
            assert np.isfinite(trainer.run_epoch(SilentReporter()).loss)
        for tensor in trainer.model_tensors().values():
            assert torch.isfinite(tensor).all()


# ----------------------------------------------------------------------- divergence


@pytest.mark.fault("R11")
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_instances(
    data: tuple[csr_matrix, csr_matrix],
) -> None:
    features = data[0].copy()
    trainer = make_trainer((features, data[1]), "sampler.name=full")
    victim = int(next(trainer.stream.epoch(1, first_step=2)).instance_ids[0])
    trainer.stream.features.data[
        trainer.stream.features.indptr[victim] : trainer.stream.features.indptr[victim + 1]
    ] = np.inf
    snapshots: list[dict[str, torch.Tensor]] = []

    def snapshot() -> None:
        snapshots.append({name: tensor.clone() for name, tensor in trainer.model_tensors().items()})

    with pytest.raises(DivergedError) as caught:
        trainer.run_epoch(SilentReporter(), after_step=snapshot)
    assert caught.value.exit_code == 6
    assert "The loss became" in str(caught.value) and "step 3" in str(caught.value)
    assert f"on the training instances {victim} (" in str(caught.value)
    assert trainer.step == 2
    for name, tensor in trainer.model_tensors().items():
        assert torch.equal(tensor, snapshots[-1][name]) and torch.isfinite(tensor).all()


# ------------------------------------------------------------------------- resuming

VARIANTS = (
    (),
    ("sampler.name=midx-rq", "sampler.prior=bias", "sampler.refresh_every=3"),
    ("sampler.name=midx-pq", "sampler.estimator=instance", "sampler.prior=uniform"),
    ("sampler.name=frequency", "model.num_hidden_layers=2"),
    ("sampler.name=full", "training.precision=bfloat16", "model.label_bias=false"),
)


def finish(trainer: Trainer) -> dict[str, torch.Tensor]:
    while trainer.step < trainer.total_steps:
        trainer.run_epoch(SilentReporter())
    return {**trainer.model_tensors(), **trainer.training_tensors()}


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.fault("R5")
def test_a_state_taken_at_any_step_continues_bit_for_bit(
    data: tuple[csr_matrix, csr_matrix], options: tuple[str, ...]
) -> None:
    expected = {name: tensor.clone() for name, tensor in finish(make_trainer(data, *options)).items()}
    for stop in (1, 4, 5, 7, 14):
        trainer = make_trainer(data, *options)

        def interrupt(trainer: Trainer = trainer, stop: int = stop) -> None:
            if trainer.step == stop:
                raise Interruption

        with pytest.raises(Interruption):
            while True:
                trainer.run_epoch(SilentReporter(), after_step=interrupt)
        model, training = (
            {name: tensor.clone() for name, tensor in tensors.items()}
            for tensors in (trainer.model_tensors(), trainer.training_tensors())
        )
        other = make_trainer(data, *options, initialize=False)
        other.load(model, training, dict(trainer.counters()))
        assert other.step == stop
        found = finish(other)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (stop, name)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_model_is_the_encoder_and_the_table_and_the_rest_is_of_training(
    data: tuple[csr_matrix, csr_matrix], options: tuple[str, ...]
) -> None:
    trainer = make_trainer(data, *options)
    trainer.run_epoch(SilentReporter())
    model, training = trainer.model_tensors(), trainer.training_tensors()
    encoder = {f"encoder.{name}" for name in trainer.encoder.state_dict()}
    assert model.keys() == encoder | {"labels.weight", "labels.bias"} and not model.keys() & training.keys()
    assert {f"labels.{name}" for name in trainer.softmax.state_dict()} <= model.keys() | training.keys()


@pytest.mark.parametrize("options", VARIANTS)
def test_training_leaves_the_global_generators_alone(
    data: tuple[csr_matrix, csr_matrix], options: tuple[str, ...]
) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trainer = make_trainer(data, *options)
    trainer.run_epoch(SilentReporter())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


@pytest.mark.parametrize("options", VARIANTS)
def test_the_seed_decides_the_model(data: tuple[csr_matrix, csr_matrix], options: tuple[str, ...]) -> None:
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(models))
        models.append(finish(make_trainer(data, *options, f"training.seed={seed}")))
    weights = [model["labels.weight"] for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_is_made_ahead_comes_in_order_and_raises_in_its_turn() -> None:
    def count() -> Iterator[int]:
        yield from range(3)
        raise ValueError("the fourth")

    got = []
    with pytest.raises(ValueError, match="the fourth"):
        for number in made_ahead(count()):
            got.append(number)
    assert got == [0, 1, 2] and list(made_ahead(iter("ab"))) == ["a", "b"] and list(made_ahead(iter(""))) == []


def test_one_thing_is_made_while_the_last_is_used() -> None:
    made: list[int] = []
    second = threading.Event()

    def count() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    things = made_ahead(count())
    assert next(things) == 0 and second.wait(10)
    things.close()  # type: ignore[attr-defined]
    assert len(made) == 2, "no more than one is made ahead, and none after the end"


def test_a_bfloat16_label_table_learns_as_well(topic_data: TopicMaker) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(topic_data(130), f"model.label_precision={precision}", "sampler.pool_instances=8")
        assert trainer.softmax.weight.dtype == getattr(torch, precision)
        losses.append([trainer.run_epoch(SilentReporter()).loss for _ in range(3)])
    assert losses[1][2] < 0.9 * losses[1][0] and losses[1] == pytest.approx(losses[0], rel=0.05)


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_on_any_device_has_the_losses_of_the_cpu(
    topic_data: TopicMaker, device: str, precision: str
) -> None:
    # Nothing is drawn: the streams of two devices differ.
    options = (
        "sampler.name=full",
        "model.dropout=0",
        f"model.label_precision={precision}",
        "training.precision=float32",
    )
    losses = []
    for place in ("cpu", device):
        trainer = make_trainer(topic_data(130), *options, initialize=False, device=place)
        with torch.no_grad():
            trainer.encoder.embedding.copy_(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)))
            trainer.softmax.weight.copy_(torch.randn(23, 12, generator=torch.Generator().manual_seed(1)))
        losses.append([trainer.run_epoch(SilentReporter()).loss for _ in range(3)])
        assert trainer.softmax.weight.device.type == place
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "float32" else 2e-2)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["midx-pq", "midx-rq", "uniform", "in-batch"])
def test_a_label_table_in_the_hosts_memory_trains_as_one_on_the_device(
    topic_data: TopicMaker, device: str, name: str
) -> None:
    losses, tables = [], []
    for memory in ("device", "host"):
        options = (f"sampler.name={name}", "sampler.num_draws=6", "sampler.pool_instances=8")
        # A graph's batch shares one pool, and a table elsewhere has none.
        options += ("training.precision=float32", "training.cuda_graphs=false")
        trainer = make_trainer(topic_data(130), *options, f"model.label_memory={memory}", device=device)
        assert trainer.softmax.weight.device.type == ("cpu" if memory == "host" else device)
        assert trainer.softmax.bias.device.type == trainer.device.type == device
        losses.append([trainer.run_epoch(SilentReporter()).loss for _ in range(3)])
        tables.append(trainer.softmax.weight.detach().cpu())
        queries = torch.ones(2, trainer.softmax.dim, device=device)
        assert trainer.softmax.topk(queries, 3).label_ids.shape == (2, 3)
        moments = trainer.optimizer.state[trainer.softmax.weight]["second_moment"]
        assert moments.device == trainer.softmax.weight.device
    # On a GPU one rounding changes what is drawn.
    tolerance = 0.0 if device == "cpu" else 0.05
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    if device == "cpu":
        assert torch.equal(tables[0], tables[1])


@pytest.mark.parametrize("name", ["full", "rff", "lsh", "hard-negatives"])
def test_a_sampler_that_reads_the_table_at_each_step_wants_it_on_the_device(topic_data: TopicMaker, name: str) -> None:
    with pytest.raises(UsageError, match=f"label_memory=host: sampler {name} reads"):
        make_trainer(topic_data(40), f"sampler.name={name}", "model.label_memory=host")
