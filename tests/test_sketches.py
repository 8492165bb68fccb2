"""Claims about `xmc_midx.sketches`: products of bytes are exact, and rows above a score are found whatever the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from llvmlite import ir
from numba import types

from xmc_midx import sketches as module
from xmc_midx.intrinsics import WORD, for_compiled_code
from xmc_midx.scan import Lists, sample_of
from xmc_midx.sketches import MULTIPLIES_BYTES, SIZE, list_above, products, round_query

by_bytes = pytest.mark.skipif(not MULTIPLIES_BYTES, reason="needs AVX512-VNNI")
WAYS = ["lanes", pytest.param("tiles", marks=pytest.mark.skipif(module._tiles() is None, reason="needs AMX"))]


def tables(num_rows: int, num_queries: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Sketches of all bytes but -128, and the extremes among them; queries of several lengths."""
    rng = np.random.default_rng(num_rows + num_queries)
    sketches = rng.integers(-127, 128, (num_rows, SIZE)).astype(np.int8)
    sketches[0], sketches[-1] = 127, -127
    base = (100.0 * rng.normal(size=num_rows)).astype(np.float32)
    short = rng.normal(size=(num_queries, SIZE)) * rng.choice([0.01, 1.0, 30.0], (num_queries, 1))
    return (sketches, base), short.astype(np.float32)


def scores(short: np.ndarray, table: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(B, L) float32, of the queries rounded to bytes."""
    sketches, base = table
    unit = np.abs(short).max(axis=1, initial=np.float32(1e-30), keepdims=True) / np.float32(127)
    sums = np.rint(short / unit).astype(np.int64) @ sketches.T.astype(np.int64)
    return sums.astype(np.float32) * unit + base


def found_by(way: str, monkeypatch: pytest.MonkeyPatch, short: np.ndarray, table: Any, wanted: int) -> Lists:
    if way == "lanes":
        monkeypatch.setattr(module, "_tiles", lambda: None)
    return list_above(short, table, wanted)


@pytest.mark.parametrize(
    "multiply", [module._plain_products, pytest.param(module._products_of_bytes, marks=by_bytes), products]
)
def test_products_are_exact(multiply: Any) -> None:
    table, short = tables(77, 9)
    short[3], short[4, 1:] = 0.0, 0.0
    expected = scores(short, table)
    for query, row in zip(short, expected, strict=True):
        whole = np.empty(SIZE, dtype=np.int8)
        unit, less = round_query(query, whole)
        assert less == 128 * int(whole.astype(np.int64).sum())
        for first, last in ((0, 77), (5, 6), (13, 13), (60, 77)):
            score = np.full(last - first + 1, 7.0, dtype=np.float32)
            multiply((whole, unit, less), table, first, last, score)
            np.testing.assert_allclose(score[:-1], row[first:last], rtol=1e-6, atol=1e-4)
            assert score[-1] == 7.0


@by_bytes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("num_rows", "num_queries"), [(2049, 1), (1000, 3), (3008, 33), (5000, 130), (64 * 40, 64)])
def test_all_rows_above_a_score_are_found(
    way: str, num_rows: int, num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 64 rows, groups of 4 or 32 queries and threads leave nothing out; scores are those of whole numbers."""
    table, short = tables(num_rows, num_queries)
    expected = scores(short, table)
    counts, ids, found = found_by(way, monkeypatch, short, table, 40)
    every, kept = sample_of(num_rows, 40)
    for row, count in enumerate(counts):
        listed = ids[row, :count]
        np.testing.assert_allclose(found[row, :count], expected[row, listed], rtol=1e-5, atol=1e-3)
        assert len(set(listed)) == count >= 30
        assert set(listed) >= set(np.flatnonzero(expected[row] > found[row, :count].min()))
        # What the sample says, a bin of a histogram less; or the list was full.
        least = np.sort(expected[row, ::every])[-kept]
        is_full = (expected[row] >= least).sum() > ids.shape[1] - 2 * WORD
        assert is_full or set(listed) >= set(np.flatnonzero(expected[row] >= least))


@by_bytes
@pytest.mark.parametrize("way", WAYS)
def test_lists_that_are_full_keep_the_best(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the sample alone are bad: all others come up to what it says, better and better ones."""
    table, short = tables(4000, 37)
    sampled = np.arange(4000) % module.sample_of(4000, 20)[0] == 0
    base = np.where(sampled, -1e6, np.arange(4000) * 3.0).astype(np.float32)
    table = (table[0], base)
    expected = scores(short, table)
    counts, ids, _ = found_by(way, monkeypatch, short, table, 20)
    for row, count in enumerate(counts):
        assert 20 <= count <= ids.shape[1]
        assert set(np.argsort(-expected[row])[:20]) <= set(ids[row, :count])
    # More alike than a list has room for: nothing is known of the query.
    alike = (np.zeros((4000, SIZE), dtype=np.int8), np.where(sampled, -1.0 - np.arange(4000), 5.0).astype(np.float32))
    assert (found_by(way, monkeypatch, short, alike, 20)[0] == -1).all()


@by_bytes
@pytest.mark.parametrize("way", WAYS)
def test_queries_without_a_ranking_are_told(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, short = tables(3000, 41)
    usual = found_by(way, monkeypatch, short, table, 30)
    odd = short.copy()
    odd[3], odd[4, 7], odd[30], odd[40, 0] = np.nan, np.inf, 1e38, -np.inf
    # All numbers are finite, and so is their sum; scores are not.
    odd[20] = 0.0
    odd[20, 3] = 3e37
    counts, ids, _ = list_above(odd, table, 30)
    told = [3, 4, 20, 30, 40]
    assert (counts[told] == -1).all()
    # Nor where few of the scores are not, so few that a list has room for them.
    sketches = table[0].copy()
    sketches[:, 3] = np.where(np.arange(3000) % 64 == 0, 127, 0)
    assert list_above(odd[20:21], (sketches, table[1]), 30)[0].tolist() == [-1]
    others = np.delete(np.arange(41), told)
    np.testing.assert_array_equal(counts[others], usual[0][others])
    for row in others:
        np.testing.assert_array_equal(ids[row, : counts[row]], usual[1][row, : counts[row]])
    assert (list_above(np.zeros_like(short[:2]), (table[0], np.zeros(3000, np.float32)), 30)[0] == -1).all()
    assert list_above(short[:0], table, 30)[0].shape == (0,)


@by_bytes
def test_rows_lie_side_by_side() -> None:
    (sketches, base), _ = tables(130, 1)
    for start in (0, 3, 64, 66, 129):
        rows, of_rows = np.empty(64 * SIZE, dtype=np.uint8), np.empty(64, dtype=np.float32)
        size = module._lay_side_by_side((sketches, base), start, rows, of_rows)
        assert size == min(64, 130 - start)
        # (16 rows, four bytes at a time, row, byte).
        laid = rows.reshape(4, SIZE // 4, 16, 4).transpose(0, 2, 1, 3).reshape(64, SIZE).astype(np.int64) - 128
        np.testing.assert_array_equal(laid[:size], sketches[start : start + size])
        assert not laid[size:].any() and np.isneginf(of_rows[size:]).all()
        np.testing.assert_array_equal(of_rows[:size], base[start : start + size])


@for_compiled_code
def tiles_as_set_up(context: Any, found: Any) -> Any:
    """64 bytes of zeros where they are not."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = module._data(target, builder, signature, arguments, 0)
        module._call(builder, "llvm.x86.sttilecfg", ir.VoidType(), place)
        return target.get_dummy_value()

    return types.void(found), generate


@pytest.mark.skipif(module._tiles() is None, reason="needs AMX")
def test_tiles_are_given_back_to_other_libraries() -> None:
    """oneDNN sets up tiles of its own in the same threads."""

    @numba.njit
    def look(tiles: Any, found: Any) -> None:
        if tiles is not None:
            module._set_up(tiles)
        tiles_as_set_up(found)

    table, short = tables(2000, 300)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).bfloat16() for size in ((300, 96), (96, 200)))
    expected, lists = left @ right, list_above(short, table, 40)
    state = np.empty(64, dtype=np.uint8)
    look(module._tiles(), state)
    np.testing.assert_array_equal(state, module._tiles())
    for _ in range(3):
        again = list_above(short, table, 40)
        look(None, state)
        assert not state.any()
        assert torch.equal(left @ right, expected)
        np.testing.assert_array_equal(again[0], lists[0])


def test_tiles_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without the processor's word nor without the kernel's, nor on another system."""
    asked: list[tuple[int, ...]] = []

    class Library:
        granted = -1

        def __init__(self, name: None) -> None:
            pass

        def syscall(self, *arguments: int) -> int:
            asked.append(arguments)
            return Library.granted

    monkeypatch.setattr(module.ctypes, "CDLL", Library)
    monkeypatch.setattr(module, "_PLATFORM", "linux")
    monkeypatch.setattr(module, "get_host_cpu_features", lambda: "+avx2,+amx-tile,+amx-int8")
    monkeypatch.setattr(module.numba.config, "CPU_FEATURES", None)
    ask = module._tiles.__wrapped__
    assert ask() is None
    Library.granted = 0
    tiles = ask()
    assert tiles is not None and tiles.nbytes == 64 and tiles[0] == 1
    assert tiles[16:32].view(np.uint16).tolist() == [64] * 8 and tiles[48:56].tolist() == [16] * 8
    assert asked == [(158, 0x1023, 18)] * 2
    monkeypatch.setattr(module, "get_host_cpu_features", lambda: "+avx2,+amx-tile,-amx-int8")
    assert ask() is None
    monkeypatch.setattr(module.numba.config, "CPU_FEATURES", "+amx-tile,+amx-int8")
    assert ask() is not None
    monkeypatch.setattr(module, "_PLATFORM", "darwin")
    assert ask() is None and len(asked) == 3
    assert module._tiles() is module._tiles()


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({"NUMBA_ENABLE_AVX": "0"}, False),
        ({"NUMBA_CPU_NAME": "generic"}, False),
        ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx2,-avx512vnni"}, False),
        ({"NUMBA_CPU_FEATURES": "+avx2,+avx512vnni"}, True),
    ],
)
def test_what_numba_compiles_for_decides(settings: dict[str, str], has: bool, tmp_path: Path) -> None:
    """An instruction that it has not been told of would end the process: so the product is compiled where it can be."""
    program = """
import numpy as np
from xmc_midx.sketches import MULTIPLIES_BYTES, products, round_query
print(MULTIPLIES_BYTES)
if MULTIPLIES_BYTES != SKIPPED:
    whole = np.empty(128, dtype=np.int8)
    query = (whole, *round_query(np.arange(128, dtype=np.float32), whole))
    score = np.empty(3, dtype=np.float32)
    products(query, (np.ones((3, 128), dtype=np.int8), np.zeros(3, dtype=np.float32)), 0, 3, score)
    assert np.allclose(score, 127 * 64, rtol=1e-2), score
"""
    # A processor without the instruction cannot run what it is told to have.
    program = program.replace("SKIPPED", str(True if not MULTIPLIES_BYTES else None))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment = {**inherited, **settings, "NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == [str(has)] and ran.returncode == 0, ran.stderr
