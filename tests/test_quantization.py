"""Claims about `xmc_midx.quantization`: error bounds, odd rows, what is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from xmc_midx import quantization
from xmc_midx.quantization import dequantize, quantize


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(37, 13)).astype(np.float32) * np.logspace(-20, 20, 37, dtype=np.float32)[:, None]
    table[5] = 0.0
    table[6] = 1e-44  # below the smallest normal float32
    counts = np.arange(37)
    return {"labels.weight": table, "labels.bias": table[:, 0].copy(), "counts": counts, "number": np.array(7)}


@pytest.mark.parametrize("chunk_rows", [1, 5, 1 << 14])
def test_a_coordinate_is_off_by_half_a_scale_at_most(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    monkeypatch.setattr(quantization, "_CHUNK_ROWS", chunk_rows)
    table = arrays()["labels.weight"]
    stored = quantize({"labels.weight": table})
    assert {name: array.dtype.name for name, array in stored.items()} == {
        "labels.weight.int8": "int8",
        "labels.weight.scale": "float32",
    }
    found = dequantize(stored)["labels.weight"]
    scale = np.abs(table).max(axis=1, keepdims=True) / 127
    assert found.dtype == np.float32 and (np.abs(found - table) <= 0.5001 * scale + 1e-44).all()
    assert not found[5].any() and np.isfinite(found).all()
    # The largest coordinate of a row keeps its value and its sign.
    largest = np.abs(table).argmax(axis=1)
    rows = np.delete(np.arange(37), [5, 6])
    np.testing.assert_allclose(found[rows, largest[rows]], table[rows, largest[rows]], rtol=1e-6)


@pytest.mark.parametrize(("storage", "bound"), [("float32", 0.0), ("float16", 2.0**-11)])
def test_other_storages_keep_what_their_type_keeps(storage: str, bound: float) -> None:
    table = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    found = dequantize(quantize({"t": table}, storage))["t"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, table, rtol=bound)


def test_vectors_and_counts_are_left_as_they_are() -> None:
    given = arrays()
    found = dequantize(quantize(given))
    assert found.keys() == given.keys()
    for name in ("labels.bias", "counts", "number"):
        np.testing.assert_array_equal(found[name], given[name])
        assert found[name].dtype == given[name].dtype


def test_quantizing_again_changes_nothing() -> None:
    once = quantize({"t": np.random.default_rng(2).normal(size=(50, 8)).astype(np.float32)})
    again = quantize(dequantize(once))
    np.testing.assert_array_equal(once["t.int8"], again["t.int8"])
    np.testing.assert_allclose(once["t.scale"], again["t.scale"], rtol=1e-6)


def test_codes_without_fitting_scales_are_refused() -> None:
    stored = quantize({"t": np.ones((4, 2), dtype=np.float32)})
    with pytest.raises(KeyError):
        dequantize({"t.int8": stored["t.int8"]})
    with pytest.raises(ValueError, match="4 rows"):
        dequantize(stored | {"t.scale": stored["t.scale"][:3]})
