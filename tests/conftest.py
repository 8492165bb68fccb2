"""What several test modules share: small datasets in memory and on disk, and the way to the shared ones."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array

from xmc_midx import recipe

ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str) -> ModuleType:
    """`scripts/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Before torch starts its threads: the tests' tensors are tiny, and two threads that wait for each other on a busy
# machine take twice the time of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's kernels run by its interpreter, for which they have to be asked before Triton is loaded.
if not any(Path("/dev").glob("nvidia[0-9]*")) and shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The tests leave the user's cache alone; those of the cache have their own.
os.environ["XMC_MIDX_NO_CACHE"] = "1"

# Of so few instances the default is an ensemble: the same test five times. test_ensemble.py is about those.
PRESETS = recipe._PRESETS
recipe._PRESETS = {name: replace(effort, most_models=1) for name, effort in PRESETS.items()}

SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fault that a test is about goes into its report, for scripts/fault_table.py."""
    for item in items:
        for marker in item.iter_markers("fault"):
            item.user_properties.append(("fault", marker.args[0]))


@pytest.fixture
def shared_data() -> Path:
    """The directory of the development datasets."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the development datasets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def processes() -> Any:
    """Forks from a server that has loaded what `victims` imports, and has no threads. `victims` itself it would not
    find: before Python 3.12.8, it leaves out what is not on its own path, without a word (python/cpython, 117378)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "xmc_midx.session", "xmc_midx.diagnostics", "xmc_midx.cli.app"])
    return context


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of torch, and so of compiled code."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., csr_matrix]:
    """Random sparse rows: `random_rows(N, F, density=, seed=)`; the second row is empty."""

    def make(num_rows: int, num_columns: int, *, density: float = 0.2, seed: int = 0) -> csr_matrix:
        matrix = random_array(
            (num_rows, num_columns), density=density, rng=np.random.default_rng(seed), dtype=np.float32, format="lil"
        )
        if num_rows > 1:
            matrix[1] = 0.0
        return csr_matrix(matrix.tocsr())

    return make


@pytest.fixture(scope="session")
def topic_data() -> Callable[..., tuple[csr_matrix, csr_matrix]]:
    """A learnable dataset: `topic_data(N, seed=) -> (features, labels)`, 40 features and 23 labels.

    Each label has features of its own and each instance shows those of its one or two labels, with noise. Label 22 has
    no instance; instance 3 has no label, instance 4 no feature, instance 5 neither.
    """

    def make(num_instances: int, *, seed: int = 0) -> tuple[csr_matrix, csr_matrix]:
        num_features, num_labels = 40, 23
        rng = np.random.default_rng(seed)
        own_features = np.random.default_rng(1234).permuted(np.tile(np.arange(num_features), (num_labels, 1)), axis=1)
        own_features = own_features[:, :4]
        popularity = 1.0 / np.arange(1, num_labels) ** 0.5
        features = np.zeros((num_instances, num_features), dtype=np.float32)
        labels = np.zeros((num_instances, num_labels), dtype=np.float32)
        for i in range(num_instances):
            mine = rng.choice(num_labels - 1, size=rng.integers(1, 3), replace=False, p=popularity / popularity.sum())
            labels[i, mine] = 1.0
            features[i, own_features[mine].ravel()] = rng.uniform(0.5, 1.5, 4 * mine.size)
            features[i, rng.choice(num_features, 2, replace=False)] += 0.3
        labels[[3, 5]] = 0.0
        features[[4, 5]] = 0.0
        return csr_matrix(features), csr_matrix(labels)

    return make


def _xmc_text(features: csr_matrix, labels: csr_matrix) -> str:
    lines = [f"{features.shape[0]} {features.shape[1]} {labels.shape[1]}"]
    for i in range(features.shape[0]):
        own = ",".join(str(label) for label in labels[[i]].indices)
        row = features[[i]]
        pairs = " ".join(f"{j}:{float(v)!r}" for j, v in zip(row.indices, row.data, strict=True))
        lines.append(f"{own} {pairs}".rstrip() if own else f" {pairs}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def topic_dir(
    tmp_path_factory: pytest.TempPathFactory, topic_data: Callable[..., tuple[csr_matrix, csr_matrix]]
) -> Path:
    """`topic_data` as a dataset directory in XMC text: 320 training and 150 test instances. Read only."""
    directory = tmp_path_factory.mktemp("topics")
    for name, num_instances, seed in (("train", 320, 0), ("test", 150, 1)):
        (directory / f"{name}.txt").write_text(_xmc_text(*topic_data(num_instances, seed=seed)), encoding="utf-8")
    return directory
