"""The recipe: every `"auto"` gets a valid value for any size of data, and given values stay."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from xmc_midx.config import Config, load_config
from xmc_midx.recipe import DataShape, as_started, auto_num_codewords, auto_num_draws, resolve

SIZES = (1, 2, 37, 4_096, 4_097, 10**5, 10**8)


def autos(tree: dict[str, Any]) -> set[str]:
    return {f"{section}.{key}" for section, keys in tree.items() for key, value in keys.items() if value == "auto"}


def data(num_instances: int, num_labels: int, num_features: int = 100, positives: float = 3.0) -> DataShape:
    num_positives = round(min(positives, num_labels) * num_instances)
    return DataShape(
        num_instances=num_instances, num_features=num_features, num_labels=num_labels, num_positives=num_positives
    )


UNTOUCHED = {"training.device", "training.precision"}
"""Not the data's to decide."""


@pytest.mark.parametrize("num_instances", SIZES)
@pytest.mark.parametrize("num_labels", SIZES)
@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("preset", ["fast", "default", "best"])
def test_every_auto_is_resolved_to_a_valid_value(
    num_instances: int, num_labels: int, estimator: str, preset: str
) -> None:
    config = load_config(assignments=[f"sampler.estimator={estimator}", f"training.preset={preset}"])
    for num_features in (1, 10**7):
        shape = data(num_instances, num_labels, num_features)
        resolved = resolve(config, shape)
        tree = resolved.model_dump()
        assert autos(tree) == UNTOUCHED
        # Valid by the rules of the configuration, and of the types that the parts ask for.
        assert Config.model_validate(tree) == resolved
        for section, key in (
            ("training", "epochs"),
            ("training", "batch_size"),
            ("model", "dim"),
            ("sampler", "num_draws"),
            ("sampler", "num_codewords"),
        ):
            assert type(tree[section][key]) is int and tree[section][key] >= 1
        for section, key in (
            ("training", "label_learning_rate"),
            ("training", "encoder_learning_rate"),
            ("model", "dropout"),
            ("data", "validation_fraction"),
        ):
            assert math.isfinite(tree[section][key]) and 0 <= tree[section][key] < 1
        assert tree["sampler"]["num_codewords"] <= 320, "a batch's set-up costs the square of it"
        assert num_instances * tree["data"]["validation_fraction"] <= num_instances - 1 or num_instances == 1


def test_given_values_stay() -> None:
    given = {
        "training.epochs": 7,
        "training.batch_size": 33,
        "training.label_learning_rate": 0.125,
        "training.cuda_graphs": False,
        "training.encoder_learning_rate": 0.25,
        "model.dim": 9,
        "model.dropout": 0.0,
        "model.storage": "float16",
        "data.validation_fraction": 0.0,
        "sampler.num_codewords": 3,
        "sampler.num_draws": 5,
        "sampler.pool_instances": 12,
        "sampler.gradient_negatives": 6,
        "data.weighting": "tf-idf",
        "data.unused_features": "keep",
        "data.unused_labels": "drop",
        "sampler.refresh_every": 3,
        "ranker.num_instances": 11,
        "training.ensemble_size": 2,
        "training.models_at_once": 3,
    }
    config = load_config(assignments=[f"{key}={value}" for key, value in given.items()])
    assert autos(config.model_dump()) == UNTOUCHED
    for size in SIZES:
        assert resolve(config, data(size, size, size)) == config


def test_a_run_of_an_older_release_goes_on_as_it_was_started() -> None:
    """Without weights, one pool a batch, its whole gradient; what a run of this release has says so itself."""
    older = load_config(assignments=["training.batch_size=700"])
    shape = DataShape(num_instances=90_000, num_features=500, num_labels=40_000, num_positives=10**6, has_counts=True)
    resumed = resolve(as_started(older), shape)
    assert (resumed.data.weighting, resumed.sampler.pool_instances) == ("none", 700)
    some_used = replace(shape, num_used_features=200, num_used_labels=9_000)
    assert resolve(as_started(older), some_used) == resumed != resolve(older, some_used)
    assert (resumed.data.unused_features, resumed.data.unused_labels) == ("keep", "keep")
    assert resumed.sampler.gradient_negatives == "all" and resumed.training.cuda_graphs is False
    fresh = resolve(older, shape)
    assert (fresh.data.weighting, fresh.sampler.pool_instances) == ("tf-idf", 512)
    assert fresh.sampler.gradient_negatives == 32 and fresh.training.cuda_graphs is True
    assert as_started(fresh) == fresh


def test_slopes_are_rounded_where_a_pool_has_many_labels() -> None:
    def negatives(num_labels: int, *assignments: str) -> object:
        return resolve(load_config(assignments=assignments), data(5000, num_labels)).sampler.gradient_negatives

    assert [negatives(num_labels) for num_labels in (3, 511, 512, 10**6)] == ["all", "all", 32, 32]
    assert negatives(10**6, "sampler.name=full") == "all"


def test_few_instances_of_many_labels_share_a_pool_and_its_codebooks() -> None:
    """A pool and a rebuild cost as much for few instances as for many."""
    sizes = (2_000, 5_000, 20_000, 48_000, 90_000, 500_000)
    few, many = ([resolve(Config(), data(size, labels)) for size in sizes] for labels in (4_095, 4_096))
    assert [one.training.batch_size for one in few] == [64, 128, 256, 512, 1024, 1024]
    assert [one.training.batch_size for one in many] == [128, 256, 512, 512, 1024, 1024]
    assert [one.sampler.refresh_every for one in few] == ["epoch"] * 6
    assert [one.sampler.refresh_every for one in many] == [64, 64, 64, "epoch", "epoch", "epoch"]


@pytest.mark.parametrize("num_labels", [10, 100_000])
def test_the_default_is_wider_where_instances_are_few(num_labels: int) -> None:
    assert [resolve(Config(), data(size, num_labels)).model.dim for size in (100, 8192, 8193)] == [512, 512, 384]


def test_the_ranker_learns_from_a_share_of_many_instances() -> None:
    def rivalled(num_instances: int, preset: str) -> object:
        config = load_config(assignments=[f"training.preset={preset}"])
        return resolve(config, data(num_instances, 100)).ranker.num_instances

    sizes = (5000, 240_000, 480_000)
    assert [rivalled(size, "default") for size in sizes] == [30_000, 30_000, 60_000]
    assert [rivalled(size, "fast") for size in sizes] == [10_000, 10_000, 20_000]
    assert [rivalled(size, "best") for size in sizes] == [60_000, 60_000, 120_000]


def test_one_given_value_leaves_the_others_open() -> None:
    shape = data(5000, 100)
    plain = resolve(Config(), shape).model_dump()
    tree = resolve(load_config(assignments=["model.dim=9"]), shape).model_dump()
    assert tree["model"].pop("dim") == 9 and plain["model"].pop("dim") != 9
    assert tree == plain


def test_a_preset_costs_no_less_than_the_one_before_it_and_given_values_win() -> None:
    for size in SIZES:
        shape = data(size, size)
        efforts = []
        for preset in ("fast", "default", "best"):
            resolved = resolve(load_config(assignments=[f"training.preset={preset}"]), shape)
            assert isinstance(resolved.training.epochs, int) and isinstance(resolved.model.dim, int)
            efforts.append((resolved.training.epochs, resolved.model.dim, resolved.sampler.num_draws))
            given = resolve(load_config(assignments=[f"training.preset={preset}", "training.epochs=1"]), shape)
            assert given.training.epochs == 1
        for cheaper, dearer in itertools.pairwise(efforts):
            assert all(a <= b for a, b in zip(cheaper, dearer, strict=True)) and cheaper != dearer


def test_resolving_twice_changes_nothing() -> None:
    shape = data(5000, 10_000)
    resolved = resolve(Config(), shape)
    assert resolve(resolved, data(1, 1, 1)) == resolved


def test_larger_data_gets_no_smaller_batches_and_no_more_epochs() -> None:
    shapes = [data(n, 100) for n in SIZES]
    trainings = [resolve(Config(), shape).training for shape in shapes]
    assert [t.epochs for t in trainings] == sorted((t.epochs for t in trainings), reverse=True)  # type: ignore[type-var]
    assert [t.batch_size for t in trainings] == sorted(t.batch_size for t in trainings)  # type: ignore[type-var]


@pytest.mark.parametrize("num_labels", SIZES)
def test_a_pool_is_never_larger_than_the_label_set_and_grows_no_further(num_labels: int) -> None:
    assert 1 <= auto_num_draws(num_labels) <= min(num_labels, 4096)
    assert auto_num_codewords(num_labels) >= 1


def test_draws_times_batch_is_bounded_where_labels_are_many() -> None:
    for preset, most in (("fast", 1 << 19), ("default", 1 << 20), ("best", 1 << 21)):
        config = load_config(assignments=[f"training.preset={preset}"])
        for size in SIZES:
            for num_labels in (5000, 10**6):
                resolved = resolve(config, data(size, num_labels))
                draws, batch = resolved.sampler.num_draws, resolved.training.batch_size
                assert isinstance(draws, int) and isinstance(batch, int)
                assert draws * batch <= most and draws == min(
                    resolve(config, data(1, num_labels)).sampler.num_draws, most // batch
                )
        few = resolve(config, data(10**6, 1000))
        assert few.sampler.num_draws == 1000, "all labels, however large the batch"


def test_fewer_passes_get_less_dropout_and_larger_steps_whoever_set_them() -> None:
    shape = data(90_000, 40_000)
    few, many, most = (
        resolve(load_config(assignments=[f"training.epochs={n}"]), shape).model_dump() for n in (2, 8, 100)
    )
    assert [tree["model"]["dropout"] for tree in (few, many, most)] == [0.1, 0.4, 0.6]
    rates = [tree["training"]["encoder_learning_rate"] for tree in (few, many, most)]
    assert rates[0] == pytest.approx(2 * rates[1]) and rates[1] > rates[2] > 0.03
    # A preset has its own passes, and each of the two values can be given.
    fast = resolve(load_config(assignments=["training.preset=fast"]), shape)
    assert fast.model.dropout == fast.training.epochs / 20 < resolve(Config(), shape).model.dropout  # type: ignore[operator]
    given = resolve(load_config(assignments=["training.preset=fast", "model.dropout=0.6"]), shape)
    assert given.training.encoder_learning_rate == fast.training.encoder_learning_rate


def label_rate(shape: DataShape, *assignments: str) -> float:
    rate = resolve(load_config(assignments=assignments), shape).training.label_learning_rate
    assert isinstance(rate, float)
    return rate


def test_the_label_rate_falls_with_the_updates_of_a_row() -> None:
    large = data(10**5, 40_000, positives=0.1)
    thousand_steps = "training.batch_size=1000", "training.epochs=10"
    rates = [label_rate(large, *thousand_steps, f"sampler.num_draws={n}") for n in (128, 2048, 5000, 40_000)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4
    assert rates[0] == 2e-2 and rates[-1] == 4e-3
    # A fourth of the steps, twice the rate.
    short = "training.batch_size=4000", "training.epochs=10", "sampler.num_draws=40000"
    assert label_rate(large, *short) == pytest.approx(8e-3)
    # Where every step updates all labels, their number does not matter.
    assert label_rate(large, *thousand_steps, "sampler.name=full") == 4e-3
    assert label_rate(data(10**5, 100), *thousand_steps) == 4e-3
    # The positives of a batch are updated too, and drawn labels only where a sampler draws.
    assert label_rate(data(10**5, 40_000, positives=30), *thousand_steps, "sampler.num_draws=128") == pytest.approx(
        1e-3 + 9e-3 * (1 - (30_128 / 40_000) ** 2)
    )
    assert label_rate(large, *thousand_steps, "sampler.name=in-batch", "sampler.num_draws=40000") == 2e-2
    by_instance = "sampler.estimator=instance", "sampler.num_draws=4"
    assert label_rate(large, *thousand_steps, *by_instance) == pytest.approx(4e-3 / math.sqrt(4100 / 40_000))


def test_the_label_rate_has_no_jumps() -> None:
    rates = [label_rate(data(1_186_000, num_labels, 204_000, positives=5.04)) for num_labels in range(4000, 20_000, 50)]
    assert max(after / before for before, after in itertools.pairwise(rates)) < 1.1
    assert max(before / after for before, after in itertools.pairwise(rates)) < 1.1
