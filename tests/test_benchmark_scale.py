"""scripts/benchmark_scale.py: the made-up data, the clock of the stages, and both measurements on little data."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_script


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return load_script("benchmark_scale")


def shape_of(scale: ModuleType, num_labels: int = 400) -> Any:
    return scale.Shape(3000, 900, num_labels, 30, 3.0)


def test_the_data_has_its_shape_its_law_and_its_seed(scale: ModuleType) -> None:
    shape = shape_of(scale)
    features, labels = scale.make_up(shape, 3000, seed=0)
    again, other = scale.make_up(shape, 3000, seed=0), scale.make_up(shape, 3000, seed=1)
    assert features.shape == (3000, 900) and labels.shape == (3000, 400)
    assert (features != again[0]).nnz == 0 and (labels != again[1]).nnz == 0 and (labels != other[1]).nnz > 0
    np.testing.assert_allclose(features.multiply(features).sum(axis=1), 1.0, atol=1e-5)
    # Duplicates inside an instance count once: a little less than asked for.
    assert 2.2 < labels.nnz / 3000 <= 3.1 and 20 < features.nnz / 3000 <= 30
    expected, counts = shape.frequencies(3000), np.bincount(labels.indices, minlength=400)
    assert np.corrcoef(np.log1p(expected), np.log1p(counts))[0, 1] > 0.8
    assert expected.sum() == pytest.approx(9000, rel=0.2)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 97, 100, 1000])
def test_scattered_ids_are_a_permutation(scale: ModuleType, count: int) -> None:
    assert sorted(scale._scattered(np.arange(count), count)) == list(range(count))


def test_a_stage_does_not_count_the_stages_inside_it(scale: ModuleType) -> None:
    clock = scale.StageClock(torch.device("cpu"))
    ticks = iter([0.0, 1.0, 5.0, 7.0, 10.0, 30.0])
    clock.now = lambda: next(ticks)
    inner = clock.timed(lambda: None, "gather")
    clock.timed(inner, "loss")()
    assert clock.seconds["gather"] == 4.0 and clock.seconds["loss"] == 3.0
    clock.timed(lambda: None, "loss")()
    assert clock.seconds["loss"] == 23.0


def test_costs_and_curves_are_measured_written_and_drawn(scale: ModuleType, tmp_path: Path) -> None:
    words = ["--labels", "400", "--features", "900", "--instances", "3000", "--per-instance", "30,3", "--dim", "16"]
    words += ["--batch", "64", "--draws", "40", "--steps", "4", "--threads", "1", "--set", "sampler.num_codewords=4"]
    options = scale._parse(["cost", *words])
    cost = scale.measure_cost("midx-pq", shape_of(scale), options)
    assert torch.Tensor.backward.__name__ == "backward", "what was put under the clock is put back"
    assert cost.tables == 4 * (900 * 16 + 16 + 400 * 17) and cost.codes == 400 * 8
    # A moment for each feature; a moment and a count for each label's row and bias; two numbers of the table's; the
    # layers' moments.
    assert cost.states == 4 * (900 + 2 + 4 * 400) + 4 * (2 * 16 + 1)
    assert 0 < cost.floor < cost.step and all(cost.stages[stage] > 0 for stage in scale.STAGES[:-1])
    assert sum(cost.stages.values()) == pytest.approx(cost.step, rel=3.0) and 40 < cost.pool < 400
    assert "400" in scale._cost_tables([cost])
    scale._plot_costs([cost], tmp_path / "costs.png")
    json.dumps(scale._document([cost], options))

    options = scale._parse(["curve", *words, "--epochs", "3"])
    points = scale.measure_curve("midx-pq", shape_of(scale), options)
    assert [point["epoch"] for point in points] == [1, 2, 3]
    assert points[2]["P@1"] > 0.3 and points[2]["loss"] < points[0]["loss"], "the data can be learned"
    results = [("midx-pq", 400, points)]
    assert f"{100 * points[2]['P@1']:.2f}" in scale._curve_table(results)
    scale._plot_curves(results, tmp_path / "curves.png")
    json.dumps(scale._document(results, options))
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("costs.png", "curves.png"))
