"""Claims about `xmc_midx.quantization`: error bounds, odd rows, what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from xmc_midx import quantization
from xmc_midx.quantization import StoredTable, dequantize, quantize


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


def half_bytes(dim: int = 14) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    table = arrays()["labels.weight"]
    table = np.concatenate([table, table[:, :1] / 3], axis=1)[:, :dim]
    return table, quantize({"t": table, "other": table.copy()}, "int4", large={"t"})


def test_half_a_byte_is_the_nearest_of_fifteen_numbers() -> None:
    table, stored = half_bytes()
    assert {name: (array.dtype.name, array.shape) for name, array in stored.items()} == {
        "t.int4": ("uint8", (37, 7)),
        "t.scale": ("float32", (37,)),
        "other.int8": ("int8", (37, 14)),
        "other.scale": ("float32", (37,)),
    }
    found, scale = dequantize(stored)["t"].astype(np.float64), stored["t.scale"][:, None].astype(np.float64)
    codes = np.arange(-7, 8)
    rows = scale[:, 0] > 0
    assert not rows[5] and not rows[6] and rows.sum() == 35 and not found[~rows].any()
    nearest = np.abs(table[rows, :, None] / scale[rows, :, None] - codes).min(axis=2)
    np.testing.assert_allclose(np.abs(table - found)[rows] / scale[rows], nearest, atol=1e-4)


def test_the_scale_of_half_a_byte_has_the_least_squared_error_of_all() -> None:
    table, stored = half_bytes()
    found = dequantize(stored)["t"].astype(np.float64)
    for row in np.flatnonzero(stored["t.scale"]):
        largest = np.abs(table[row]).max()
        errors = []
        for share in np.linspace(0.4, 1.0, 13):
            scale = share * largest / 7
            errors.append(np.square(np.clip(np.rint(table[row] / scale), -7, 7) * scale - table[row]).sum())
        assert np.square(found[row] - table[row]).sum() <= min(errors) * (1 + 1e-4)
    # A large coordinate is cut off where that helps all others.
    spread = np.append(np.random.default_rng(3).normal(size=255), 4.0).astype(np.float32)[None]
    scale = quantize({"t": spread}, "int4", large={"t"})["t.scale"]
    assert scale[0] < np.abs(spread).max() / 7


@pytest.mark.parametrize("storage", ["int4", "int8", "float32"])
def test_products_and_bags_are_those_of_the_rows_in_float32(storage: str) -> None:
    rng = np.random.default_rng(4)
    table = StoredTable.take(quantize({"t": rng.normal(size=(50, 38)).astype(np.float32)}, storage, large={"t"}), "t")
    rows = table.rows().astype(np.float64)
    assert table.shape == (50, 38) and (table.codes.dtype == np.uint8) == (storage == "int4")
    np.testing.assert_array_equal(table.rows(slice(7, 20)), rows[7:20].astype(np.float32))
    query, ids = rng.normal(size=(9, 38)).astype(np.float32), rng.integers(0, 50, (9, 6))
    expected = np.einsum("bd,bwd->bw", query.astype(np.float64), rows[ids])
    np.testing.assert_allclose(table.products(query, ids), expected, atol=1e-5)
    features = scipy.sparse.random(11, 50, 0.2, format="csr", dtype=np.float32, random_state=0)
    np.testing.assert_allclose(table.bag(features), features.astype(np.float64) @ rows, atol=1e-5)


def test_an_odd_dimension_has_no_halves() -> None:
    assert set(half_bytes(13)[1]) == {"t.int8", "t.scale", "other.int8", "other.scale"}


def test_halves_of_another_type_are_refused() -> None:
    stored = half_bytes()[1]
    with pytest.raises(ValueError, match="expected uint8 codes"):
        dequantize(stored | {"t.int4": stored["t.int4"].view(np.int8)})
