"""What `xmc_midx.intrinsics` says in LLVM's own instructions, against NumPy."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from xmc_midx.intrinsics import AHEAD, WORD, fetch, fetch_row, lowest, reaching


@numba.njit
def words(values: Any, least: Any) -> Any:
    found = np.empty(values.shape[0] - WORD + 1, dtype=np.uint64)
    for first in range(found.shape[0]):
        found[first] = reaching(values, first, least)
    return found


@numba.njit
def lowest_of(word: Any) -> Any:
    return lowest(word)


@numba.njit
def row_sums(table: Any, rows: Any) -> Any:
    found = np.zeros(rows.shape[0])
    for place in range(rows.shape[0]):
        fetch_row(table, rows[min(place + AHEAD, rows.shape[0] - 1)])
        fetch(rows, place, rows.shape[0])
        for column in range(table.shape[1]):
            found[place] += table[rows[place], column]
    return found


@pytest.mark.parametrize("least", [-(1 << 15), -1, 0, 1, 77, (1 << 15) - 1])
def test_a_word_has_the_bits_of_a_comparison(least: int) -> None:
    """At any place, in step with nothing."""
    rng = np.random.default_rng(0)
    values = rng.choice([-(1 << 15), -5, -1, 0, 1, 76, 77, 78, (1 << 15) - 1], 200).astype(np.int16)
    found = words(values, np.int16(least))
    for first, word in enumerate(found.tolist()):
        bits = [bool(word >> place & 1) for place in range(WORD)]
        assert bits == (values[first : first + WORD] >= least).tolist()


def test_the_lowest_bit_of_every_word_of_one_or_two() -> None:
    for low in range(WORD):
        assert lowest_of(np.uint64(1 << low)) == low
        assert lowest_of(np.uint64(1 << low | 1 << WORD - 1)) == low


@pytest.mark.parametrize("dtype", [np.int8, np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 63, 600])
def test_what_is_asked_for_ahead_is_read_as_ever(dtype: type, width: int) -> None:
    rng = np.random.default_rng(width)
    table = rng.integers(-100, 100, (50, width)).astype(dtype)
    rows = rng.integers(0, 50, 31)
    np.testing.assert_array_equal(row_sums(table, rows), table[rows].astype(np.float64).sum(1))
    assert row_sums(table, rows[:0]).shape == (0,)
    # Nothing shows that a hint was given, but the code.
    assert all("@llvm.prefetch" in code for code in row_sums.inspect_llvm().values())
