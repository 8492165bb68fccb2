"""Tensor files: the library's bytes, their hash, and nothing left in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save
from safetensors.torch import save as save_torch

from xmc_midx import tensorfile
from xmc_midx.tensorfile import StoredTensor, write_arrays, write_tensors

FLOATS, INTEGERS = ["float16", "float32", "float64"], ["int8", "int16", "int32", "int64"]
DTYPES = ["bool", *FLOATS, *INTEGERS, *(f"u{name}" for name in INTEGERS)]


def arrays() -> dict[str, np.ndarray]:
    """Of each type; of no dimension, none long, with rows that do not follow one another, with a name to be quoted."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "number": (), "none": (0, 5), 'größe "x"\n': (5,), "long": (71,)}
    made = {f"{d} {name}": rng.integers(0, 100, shape).astype(d) for name, shape in shapes.items() for d in DTYPES}
    return made | {"turned": np.ascontiguousarray(rng.normal(size=(6, 2)).T)}


@pytest.mark.parametrize("window", [16, 100, 1 << 24])
def test_the_bytes_are_the_librarys_and_the_hash_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Of any window: the header, a tensor or the end may fill one, or not."""
    monkeypatch.setattr(tensorfile, "_WINDOW", window)
    digest = write_arrays(tmp_path / "file", arrays())
    written = (tmp_path / "file").read_bytes()
    assert written == save(arrays())
    assert digest == hashlib.sha256(written).hexdigest()


def test_rows_that_do_not_follow_one_another_are_put_in_order(tmp_path: Path) -> None:
    turned = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_arrays(tmp_path / "file", {"a": turned})
    assert (tmp_path / "file").read_bytes() == save({"a": np.ascontiguousarray(turned)})


def test_half_precision_of_torch_is_kept(tmp_path: Path) -> None:
    tensor = torch.arange(5, dtype=torch.bfloat16)
    stored = StoredTensor(dtype="bfloat16", shape=(5,), data=tensor.view(torch.uint8).numpy().data)
    write_tensors(tmp_path / "file", {"a": stored})
    assert (tmp_path / "file").read_bytes() == save_torch({"a": tensor})


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write_arrays(tmp_path / "file", {})
    assert (tmp_path / "file").read_bytes() == save({})


def test_arrays_of_another_byte_order_are_stored_as_all_are(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a", {"a": np.arange(3, dtype=">f4"), "b": np.arange(3, dtype="<i8")})
    found = load_file(tmp_path / "a")
    assert found["a"].tolist() == [0, 1, 2] and found["b"].tolist() == [0, 1, 2]
