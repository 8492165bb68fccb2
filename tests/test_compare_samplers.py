"""scripts/compare_samplers.py and scripts/benchmark_samplers.py: the plan, the tables, and both run on little data."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import load_script


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return load_script("compare_samplers")


def make_run(compare: ModuleType, sampler: str, seed: int, p_at_1: float, **changes: Any) -> dict[str, Any]:
    run = {"data": "data/topics", "sampler": sampler, "num_draws": 64, "seed": seed, "set": [], "seconds": 10.0 + seed}
    test = dict.fromkeys(compare.METRICS, 0.25) | {"P@1": p_at_1}
    return run | {"test": test, "pool_size": 100.0, "kl_from_softmax": 2.0 + seed, "kl_to_softmax": 1.0} | changes


def rows_of(report: str) -> list[list[str]]:
    lines = [line for line in report.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_a_row_is_mean_and_spread_over_the_seeds_and_the_best_comes_first(compare: ModuleType) -> None:
    runs = [make_run(compare, "uniform", seed, 0.3) for seed in (0, 1)]
    runs += [make_run(compare, "midx-pq", seed, value) for seed, value in enumerate((0.40, 0.42, 0.47))]
    head, best, other = rows_of(compare._report(runs))
    assert head == ["sampler", *compare.METRICS, "KL(Q,P)", "KL(P,Q)", "pool", "train s"]
    assert best == ["midx-pq", "43.00 ± 3.61", *["25.00 ± 0.00"] * 5, "3.00 ± 1.00", "1.00 ± 0.00", "100", "11"]
    assert other[:2] == ["uniform", "30.00 ± 0.00"]


def test_runs_without_draws_stand_in_each_table_and_settings_do_not_mix(compare: ModuleType) -> None:
    nothing = {"num_draws": None, "kl_from_softmax": None, "kl_to_softmax": None}
    runs = [make_run(compare, "full", 0, 0.5, **nothing)]
    runs += [make_run(compare, "uniform", 0, 0.4, num_draws=draws) for draws in (64, 512)]
    runs += [make_run(compare, "uniform", 0, 0.2, set=["model.dim=8"])]
    report = compare._report(runs)
    assert [row[:2] for row in rows_of(report) if row[0] != "sampler"] == [
        *[["full", "50.00"], ["uniform", "40.00"]] * 2,
        ["uniform", "20.00"],
    ]
    assert rows_of(report)[1][7:9] == ["", ""], "no density"
    titles = [line for line in report.splitlines() if line.startswith(("### ", "Seeds"))]
    assert titles[0::2] == [
        "### topics, 64 draws a batch",
        "### topics, 512 draws a batch",
        "### topics, 64 draws a batch",
    ]
    assert titles[1::2] == ["Seeds 0.", "Seeds 0.", "Seeds 0. With model.dim=8."]


def test_a_comparison_trains_each_once_and_goes_on_where_it_stopped(
    compare: ModuleType, topic_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--draws", "5", "--work", str(tmp_path), "--output", str(tmp_path / "report.md")]
    fixed += [word for setting in ("training.epochs=2", "model.dim=8") for word in ("--set", setting)]
    assert compare.main([str(topic_dir), "--samplers", "midx-pq", "--seeds", "0", *fixed]) == 0
    first = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert compare.main([str(topic_dir), "--samplers", "midx-pq,in-batch", "--seeds", "0", *fixed]) == 0
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["sampler"] for line in runs] == ["midx-pq", "in-batch"]
    assert (tmp_path / "runs.jsonl").read_text().splitlines()[:1] == first, "it was not trained again"
    assert runs[0]["kl_from_softmax"] > 0 and runs[1]["kl_from_softmax"] is None
    assert 0 < runs[1]["pool_size"] <= runs[0]["pool_size"] <= 23, "draws come beside the positives"
    assert 0 < runs[0]["test"]["P@1"] <= 1 and runs[0]["seconds"] > 0
    assert {row[0] for row in rows_of((tmp_path / "report.md").read_text())} == {
        "sampler",
        "midx-pq",
        "in-batch",
    }
    assert not (tmp_path / "run").exists()
    capsys.readouterr()


def test_a_training_that_fails_is_said_and_is_tried_again_next_time(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "absent"), "--samplers", "uniform", "--draws", "5", "--seeds", "0"]
    assert compare.main([*arguments, "--work", str(tmp_path)]) == 1
    assert "xmc-midx train: " in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_wrong_sampler_is_refused(compare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["data", "--samplers", "midx-qp"])
    assert "midx-qp" in capsys.readouterr().err


def test_the_cost_of_a_sampler_is_measured_beside_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load_script("benchmark_samplers")
    small = ["--labels", "500", "--dim", "8", "--batch", "16", "--draws", "20", "--steps", "4", "--threads", "1"]
    assert benchmark.main([*small, "--samplers", "midx-pq,uniform", "--json", str(tmp_path / "costs.json")]) == 0
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert [cost["sampler"] for cost in costs] == ["midx-pq", "uniform"]
    for cost in costs:
        assert cost["draw_milliseconds"] > 0 and cost["step_milliseconds"] > 0 and 0 < cost["share"] < 1
        assert 20 < cost["pool_size"] < 16 * 3 + 60
    assert len(rows_of(capsys.readouterr().out)) == 3
