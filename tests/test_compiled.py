"""Claims about `xmc_midx.compiled`: where compiled code is kept, and where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CODE = """
import numpy as np
from xmc_midx.compiled import is_kept
from xmc_midx.data import features
assert features.all_finite(np.zeros(3, dtype=np.float32))
print(is_kept(features.all_finite))
"""


def run(package: Path, code: str = CODE, **environment: str) -> str:
    """In a process that finds `package` first, and no directory of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XMC_MIDX_", "XDG_"))}
    paths = {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=package, env=kept | paths | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package in which numba finds a file where its directory would be."""
    ignore = shutil.ignore_patterns("__pycache__", "embedded")
    shutil.copytree(ROOT / "xmc_midx", tmp_path / "copy" / "xmc_midx", ignore=ignore)
    for directory in (tmp_path / "copy" / "xmc_midx").rglob("*"):
        if directory.is_dir():
            (directory / "__pycache__").touch()
    (tmp_path / "nobody").touch()
    return tmp_path / "copy"


def test_beside_the_source_code_is_kept(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "xmc_midx", tmp_path / "xmc_midx", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    assert run(tmp_path) == "True"
    assert list((tmp_path / "xmc_midx" / "data" / "__pycache__").glob("features.all_finite-*.nbi"))


def test_where_nothing_can_be_written_it_is_kept_in_the_cache_or_nowhere(package: Path, tmp_path: Path) -> None:
    nobody = str(tmp_path / "nobody" / "home")
    assert run(package, HOME=nobody) == "False"
    assert run(package, HOME=nobody, XMC_MIDX_CACHE=str(tmp_path / "cache")) == "True"
    assert list((tmp_path / "cache" / "compiled").rglob("features.all_finite-*.nbi"))


def test_code_of_an_older_source_is_not_kept(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "xmc_midx", tmp_path / "xmc_midx", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    assert run(tmp_path) == "True"
    code = (
        "from xmc_midx.compiled import is_kept; from xmc_midx.data import features; print(is_kept(features.all_finite))"
    )
    assert run(tmp_path, code=code) == "True"
    later = time.time() + 100
    os.utime(tmp_path / "xmc_midx" / "data" / "features.py", (later, later))
    assert run(tmp_path, code=code) == "False"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no modes")
def test_a_place_that_others_can_write_is_not_trusted(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / "compiled").mkdir(parents=True)
    (tmp_path / "cache" / "compiled").chmod(0o777)
    assert run(package, HOME=str(tmp_path / "nobody" / "home"), XMC_MIDX_CACHE=str(tmp_path / "cache")) == "False"
    assert not list((tmp_path / "cache" / "compiled").iterdir())
