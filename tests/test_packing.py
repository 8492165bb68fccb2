"""Packed sparse rows and tables: what goes in comes out, in few bytes, and a file that lies is refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import scipy.sparse as sp

from xmc_midx import packing
from xmc_midx.packing import pack_rows, pack_tables, unpack_rows, unpack_tables


def rows_of(num_rows: int, num_columns: int, share: float, dtype: str, seed: int) -> sp.csr_matrix:
    """Columns by Zipf's law, some rows empty, values of any bits, ids in no order."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, num_columns + 1)
    sizes = rng.binomial(num_columns, share, num_rows) * (rng.random(num_rows) < 0.9)
    ids = [
        rng.choice(num_columns, size, replace=False, p=weights / weights.sum()) if size else np.empty(0)
        for size in sizes
    ]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    bits = rng.integers(0, 256, (offsets[-1], np.dtype(dtype).itemsize), dtype=np.uint8)
    found = sp.csr_matrix((num_rows, num_columns), dtype=np.int8)
    found.indptr, found.indices = offsets, rng.permutation(num_columns)[np.concatenate([*ids, []]).astype(np.int64)]
    found.data = bits.reshape(-1).view(dtype)
    return found


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (40, 7), (3, 70_000), (0, 5), (5, 0), (300, 1000)])
def test_rows_come_back_bit_for_bit(shape: tuple[int, int], dtype: str) -> None:
    for seed, share in enumerate((0.0, min(0.5, 30 / max(shape[1], 1)), min(1.0, 200 / max(shape[1], 1)))):
        rows = rows_of(*shape, share, dtype, seed)
        found = unpack_rows(pack_rows(rows), dtype)
        assert found.shape == rows.shape and found.data.dtype == dtype
        np.testing.assert_array_equal(found.indptr, rows.indptr)
        for row in range(shape[0]):
            mine = slice(rows.indptr[row], rows.indptr[row + 1])
            order = np.argsort(rows.indices[mine])
            np.testing.assert_array_equal(found.indices[mine], rows.indices[mine][order])
            np.testing.assert_array_equal(found.data[mine].view("u1"), rows.data[mine][order].view("u1"))


def test_words_take_seven_tenths_of_what_ids_of_two_bytes_and_values_of_one_do() -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(8000, 60_000, 50 / 60_000, "int8", 1)
    # As in TF-IDF, a word has about one value wherever it stands.
    rows.data = (rng.integers(20, 100, 60_000)[rows.indices] + rng.integers(0, 2, rows.nnz)).astype(np.int8)
    assert sum(array.nbytes for array in pack_rows(rows).values()) < 0.7 * 3 * rows.nnz


def test_what_lies_is_refused() -> None:
    rows = rows_of(30, 50, 0.2, "int8", 2)
    arrays = pack_rows(rows)

    def packed(values: np.ndarray) -> np.ndarray:
        planes = np.ascontiguousarray(values.astype("<u4").view("u1").reshape(-1, 4).T)
        return np.frombuffer(zlib.compress(planes.tobytes()), dtype=np.uint8)

    sizes, bomb = np.diff(rows.indptr), np.frombuffer(zlib.compress(bytes(10**8)), dtype=np.uint8)
    for lie in (
        {"shape": np.array([30, 10**12])},
        {"shape": np.array([10**15, 50])},
        {"shape": np.array([-30, 50])},
        {"shape": np.array([30, 49])},
        {"shape": np.array([30, 50, 1])},
        {"sizes": packed(sizes[:-1])},
        {"sizes": packed(sizes + 1)},
        {"sizes": packed(np.full(30, 2**32 - 1))},
        {"gaps": packed(np.full(rows.nnz, 50))},
        {"gaps": packed(np.full(rows.nnz, 2**32 - 1))},
        {"gaps": arrays["gaps"][:-5]},
        {"values": arrays["values"][:-1]},
        {"values": arrays["gaps"]},
        {"values": bomb},
        {"values": arrays["values"].view(np.int8)},
        {"values": np.zeros(7, dtype=np.uint8)},
    ):
        with pytest.raises((ValueError, LookupError)):
            unpack_rows(arrays | lie, "int8")
    with pytest.raises(LookupError):
        unpack_rows({name: array for name, array in arrays.items() if name != "gaps"}, "int8")


def codes_of(num_rows: int, num_columns: int, dtype: str, seed: int) -> np.ndarray:
    """Of a bell's frequencies, every fifth row zeros."""
    codes = np.rint(np.random.default_rng(seed).normal(0, 9, (num_rows, num_columns))).astype(np.int8)
    codes[::5] = 0
    return codes.view(dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("shape", [(1, 700), (37, 23), (5000, 13), (700, 1)])
def test_tables_come_back_bit_for_bit(shape: tuple[int, int], dtype: str) -> None:
    table = codes_of(*shape, dtype, 3)
    arrays = {"bias": np.arange(99, dtype=np.int8), "t": table, "u": table[::-1], "w": np.ones((40, 40), "float32")}
    stored = pack_tables(arrays)
    assert stored.keys() == {"bias", "t.packed", "t.shape", "u.packed", "u.shape", "w"}
    assert stored["w"] is arrays["w"], "floats are mapped"
    found = unpack_tables(stored)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].flags.c_contiguous and found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array)


def test_a_table_takes_what_its_codes_are_worth() -> None:
    """Within a twentieth of their entropy, zeros nearly for nothing."""
    table = codes_of(5000, 64, "int8", 5)
    share = np.bincount(table[np.arange(5000) % 5 > 0].view("u1").reshape(-1), minlength=256) / (4000 * 64)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() / 8 * 4000 * 64
    assert entropy < pack_tables({"t": table})["t.packed"].nbytes < 1.05 * entropy < 0.7 * table.nbytes


def test_what_is_large_or_saves_nothing_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    table = codes_of(400, 30, "uint8", 7)
    monkeypatch.setattr(packing, "_LARGEST_TABLE", table.nbytes)
    random = np.random.default_rng(0).integers(0, 256, (300, 30), dtype=np.uint8)
    arrays = {"of all bits": random, "none": table[:0], "t": table, "larger": np.vstack([table, table[:1]])}
    assert pack_tables(arrays).keys() == {"of all bits", "none", "t.packed", "t.shape", "larger"}


def test_a_table_that_lies_is_refused() -> None:
    arrays = pack_tables({"t": codes_of(30, 50, "int8", 2)})
    bomb = np.frombuffer(zlib.compress(bytes(10**8)), dtype=np.int8)
    assert bomb.nbytes < 10**5, "1,030 times what it takes on the disk, and no table that is packed is so large"
    flipped = arrays["t.packed"].copy()
    flipped[flipped.size // 2] ^= 4
    for lie in (
        {"t.shape": np.array([30, 49])},
        {"t.shape": np.array([30, 51])},
        {"t.shape": np.array([-30, -50])},
        {"t.shape": np.array([30, 10**12])},
        {"t.shape": np.array([30])},
        {"t.shape": np.array([3, 10, 50])},
        {"t.packed": arrays["t.packed"][:-1]},
        {"t.packed": flipped},
        {"t.packed": np.zeros(700, dtype=np.int8)},
        {"t.packed": np.zeros(700, dtype=np.float32)},
        {"t.packed": bomb},
        {"t.packed": bomb, "t.shape": np.array([10**4, 10**4])},
        {"t.packed": bomb, "t.shape": np.array([10**4, 10**5])},
    ):
        with pytest.raises((ValueError, LookupError)):
            unpack_tables(arrays | lie)
    with pytest.raises(LookupError):
        unpack_tables({"t.packed": arrays["t.packed"]})
