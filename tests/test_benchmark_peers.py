"""scripts/benchmark_peers.py: medians, tables, failures as rows, and the stages with xmc-midx on a tiny dataset."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, load_script
from scipy.sparse import load_npz, save_npz

from xmc_midx.data.formats import read_xmc
from xmc_midx.pipeline import evaluate

SCRIPT = ROOT / "scripts" / "benchmark_peers.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("benchmark_peers")


def make_run(bench: ModuleType, value: float, **changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(bench.FIGURES, value)
    return {"title": "peer", "metrics": dict.fromkeys(bench.METRICS, value / 10), **figures, **changes}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_row_is_the_median_of_the_runs_that_ended(bench: ModuleType) -> None:
    failed = {"title": "peer", "error": "killed by SIGKILL"}
    row = bench.summarize([make_run(bench, 1.0), make_run(bench, 9.0), make_run(bench, 2.0), failed])
    assert row["num_runs"] == 3 and row["errors"] == ["killed by SIGKILL"]
    assert row["P@1"] == row["PSP@5"] == pytest.approx(0.2)
    assert row["train_seconds"] == row["peak_memory_bytes"] == 2.0
    assert row["range"] == {"P@1": [0.1, 0.9], "train_seconds": [1.0, 9.0]}


def test_row_over_two_versions_of_the_code_is_marked(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    first = bench.hash_source(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    second = bench.hash_source(tmp_path)
    assert first != second
    runs = [make_run(bench, 1.0, source=source) for source in (first, second)]
    assert not bench.summarize(runs)["one_source"] and bench.summarize(runs[:1])["one_source"]
    assert not bench.summarize([make_run(bench, 1.0, source=first, source_changed=True)])["one_source"]


def test_table_shows_percent_megabytes_and_reasons(bench: ModuleType) -> None:
    good = make_run(bench, 1.0, model_bytes=2_500_000, peak_memory_bytes=1_230_000_000, us_per_instance=1234.56)
    table = bench.markdown_table(
        [bench.summarize([good]), bench.summarize([{"title": "other", "error": "exit code 1: a | b"}])]
    )
    head, rule, first, second = table.splitlines()
    assert cells(head)[0] == "system" and len(cells(head)) == len(cells(rule)) == len(cells(first)) == 13
    assert cells(first) == ["peer", *["10.00"] * 7, "1.00", "1.000", "1,234.6", "2.5", "1.23"]
    assert second.startswith("| other | failed: exit code 1: a \\| b |")


def test_failure_is_told_in_one_line(bench: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("Traceback ...\nValueError: no rows\n\nnote: run with `RUST_BACKTRACE=1`\n")
    assert bench.explain_failure(1, "", log) == "exit code 1: ValueError: no rows"
    assert bench.explain_failure(-9, "not JSON", log) == "killed by SIGKILL: ValueError: no rows"
    assert bench.explain_failure(3, '{"error": {"message": "No labels."}}', log) == "exit code 3: No labels."
    log.write_text("")
    assert bench.explain_failure(3, "", log) == "exit code 3"


def test_each_word_of_arguments_is_a_row(bench: ModuleType) -> None:
    words = ["data", "--systems", "xmc-midx,pecos", "--xmc-midx-args", "", "--xmc-midx-args", "--set model.dim=8"]
    _, systems = bench.parse(words)
    assert [system.name for system in systems] == ["xmc-midx", "xmc-midx-1", "pecos"]
    assert systems[1].title == "xmc-midx --set model.dim=8" and systems[1].arguments == ("--set", "model.dim=8")


def test_missing_interpreter_is_a_reason(bench: ModuleType, tmp_path: Path) -> None:
    children = bench.Bench(str(tmp_path / "python"), 1)
    with pytest.raises(bench.RunError, match="No such file"):
        children.call("train", {}, tmp_path, peer=True)


@pytest.fixture(scope="module")
def topics_report(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """xmc-midx, a peer that this interpreter has (a development dependency) and one that it has not."""
    work = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(SCRIPT), str(topic_dir), "--systems", "omikuji,napkinxc,xmc-midx", "--threads", "1"]
    command += ["--work", str(work), "--peers-python", sys.executable, "--json", str(work / "report.json")]
    command += ["--plot", str(work / "report.png")]
    command += ["--output", str(work / "report.md"), "--xmc-midx-args", "--epochs 3 --dim 16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((work / "report.json").read_text()) | {"work": work, "stderr": done.stderr}


def find_run(report: dict[str, Any], system: str) -> dict[str, Any]:
    (found,) = (run for run in report["datasets"][0]["runs"] if run["system"] == system)
    return found


def test_the_plot_is_a_picture(bench: ModuleType, topics_report: dict[str, Any], tmp_path: Path) -> None:
    assert (topics_report["work"] / "report.png").read_bytes().startswith(b"\x89PNG")
    bench.plot_report({"datasets": [{"name": "x", "error": "not there"}]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_systems_get_the_normalised_rows(topics_report: dict[str, Any], topic_dir: Path) -> None:
    directory = topics_report["work"] / "data-0"
    for split in ("train", "test"):
        raw, _ = read_xmc(topic_dir / f"{split}.txt")
        features = load_npz(directory / f"{split}_features.npz")
        length = np.sqrt(np.asarray(raw.multiply(raw).sum(axis=1)))
        np.testing.assert_allclose(features.toarray(), raw.toarray() / np.where(length > 0, length, 1.0), rtol=1e-6)
        np.testing.assert_array_equal(read_xmc(directory / f"{split}.txt")[0].toarray(), features.toarray())
    without = int((features.getnnz(axis=1) == 0).sum())
    assert without == topics_report["datasets"][0]["num_train_without_features"] == 2  # alike in both splits
    assert read_xmc(directory / "train_omikuji.txt")[0].shape[0] == 320 - without
    assert "trained without 2 training rows" in (topics_report["work"] / "report.md").read_text()


def test_a_dataset_whose_arrays_cannot_be_written_is_prepared_alike(
    topics_report: dict[str, Any], topic_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "work").mkdir()
    for name, short in (("train", "trn"), ("test", "tst")):
        for letter, matrix in zip("XY", read_xmc(topic_dir / f"{name}.txt"), strict=True):
            save_npz(tmp_path / "data" / f"{letter}.{short}.npz", matrix)
    load_script("peers/stages").prepare({"data": str(tmp_path / "data"), "work": str(tmp_path / "work")})
    for split in ("train", "test"):
        found, expected = (
            load_npz(d / f"{split}_features.npz") for d in (tmp_path / "work", topics_report["work"] / "data-0")
        )
        np.testing.assert_array_equal(found.toarray(), expected.toarray())


def test_xmc_midx_is_measured_and_scored_as_evaluate_does(topics_report: dict[str, Any]) -> None:
    directory = topics_report["work"] / "data-0"
    run = find_run(topics_report, "xmc-midx")
    assert run["metrics"] == evaluate(directory / "xmc-midx" / "model", data=directory).report.metrics
    assert run["train"]["epochs"] == 3 and run["train_seconds"] == run["train"]["seconds"] > 0
    assert run["train"]["config"]["training"]["num_threads"] == 1
    assert run["predict_seconds"] > 0 and run["us_per_instance"] == pytest.approx(run["predict_seconds"] / 150 * 1e6)
    assert run["model_bytes"] > 0
    # What the process says of itself and what the system says of the process.
    assert run["peak_memory_bytes"] == pytest.approx(run["train"]["peak_memory_bytes"], rel=0.05)
    assert topics_report["versions"]["xmc-midx"] and topics_report["machine"]["cores"] >= 1


def test_peer_is_scored_by_the_same_metrics(topics_report: dict[str, Any]) -> None:
    pytest.importorskip("napkinxc")
    run = find_run(topics_report, "napkinxc")
    assert "error" not in run
    directory = topics_report["work"] / "data-0"
    predictions = directory / "napkinxc" / "predictions.txt"
    assert run["metrics"] == evaluate(None, data=directory, predictions=predictions).report.metrics
    assert run["metrics"]["P@1"] > 0.5  # the dataset can be learned; shuffled rows or labels could not
    assert run["model_bytes"] > 0 and run["train_seconds"] > 0


def test_failed_system_is_a_row(topics_report: dict[str, Any]) -> None:
    if importlib.util.find_spec("omikuji"):
        pytest.skip("omikuji is installed here")
    reason = "exit code 1: ModuleNotFoundError: No module named 'omikuji'"
    assert find_run(topics_report, "omikuji")["error"] == reason
    assert f"| Omikuji (Parabel, 3 trees) | failed: {reason} |" in (topics_report["work"] / "report.md").read_text()


def test_unreadable_dataset_is_named(topic_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "half"
    directory.mkdir()
    shutil.copy(topic_dir / "train.txt", directory)
    command = [sys.executable, str(SCRIPT), str(directory), "--systems", "xmc-midx", "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "half: has no test split" in done.stdout and "half: has no test split" in done.stderr
