"""scripts/remove_safeguards.py and scripts/measure_overhead.py know the code that they change: neither runs with CI."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, load_script


@pytest.fixture(scope="module")
def safeguards() -> ModuleType:
    return load_script("remove_safeguards")


def test_each_safeguard_stands_where_it_is_removed_from(safeguards: ModuleType) -> None:
    for removal in safeguards.REMOVALS:
        assert (ROOT / "xmc_midx" / removal.module).read_text(encoding="utf-8").count(removal.old) == 1, removal.name


def test_the_tests_that_should_miss_a_safeguard_exist(safeguards: ModuleType) -> None:
    for test in {test for removal in safeguards.REMOVALS for test in removal.tests}:
        file, _, name = test.partition("::")
        pattern = rf"^def {name}" if name else "^def test_"
        assert re.search(pattern, (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_the_overhead_of_saves_is_measured_in_pairs_of_trainings(topic_dir: Path, tmp_path: Path) -> None:
    words = [str(topic_dir), "--repeats", "2", "--set", "model.dim=16", "--set", "training.epochs=5"]
    command = [sys.executable, str(ROOT / "scripts" / "measure_overhead.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, pairs, seconds, saves, waits, beside = (cell.strip() for cell in done.stdout.splitlines()[-1].split("|")[1:7])
    assert (name, pairs) == (topic_dir.name, "2")
    assert float(seconds) > 0 and int(saves) >= 1 and float(waits) > 0 and float(beside) > 0
    assert list(tmp_path.iterdir()) == []
