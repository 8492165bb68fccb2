"""Layer 2. Products of sketches with queries: 128 whole numbers, a byte each.

A processor with AVX512-VNNI multiplies 64 bytes by 64 others and adds the products up in fours, in one instruction. One
side of it has no sign: the sketches', 128 more in each number; what that adds to a sum depends on the query alone. For
many queries, 64 rows at a time are laid side by side: then each has its lane, and no sum is put together from several.
With AMX the same 64 rows are four tiles, and 32 queries two. A query knows beforehand what it will keep, by a sample of
the rows; what leaves the loop are the bits of the rows that come up to it: but for the sample's, only the scores of a
block are in memory.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.codegen import get_host_cpu_features
from numpy.typing import NDArray

from xmc_midx.compiled import compiled
from xmc_midx.intrinsics import WORD, for_compiled_code, lowest
from xmc_midx.scan import Lists, empty_lists, make_room, sample_of
from xmc_midx.selection import least_of_best
from xmc_midx.threads import in_threads, num_workers

__all__ = ["MAX_CODE", "MULTIPLIES_BYTES", "SIZE", "list_above", "products", "round_query"]

SIZE, MAX_CODE = 128, 127
"""Numbers of a sketch, and the largest size of one, a query's too."""
_LANES, _FOUR = 16, 4
"""Sums of a vector, and bytes of each; also rows of a tile, and queries that meet a block of rows at once by lanes."""
_BY_TILES = 2 * _LANES
"""Queries that meet a block of rows at once by tiles."""
_FEWEST, _MOST = 32, 256
"""Queries for which a thread goes through all rows."""
_PLATFORM = sys.platform
_BYTE, _INT, _PLACE, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, _LANES), ir.VectorType(_FLOAT, _LANES)


def _has(*features: str) -> bool:
    """Whether what numba compiles for has all of these: of the processor, but for numba's settings."""
    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    known: str = get_host_cpu_features() if chosen is None else chosen  # type: ignore[no-untyped-call]
    return {f"+{feature}" for feature in features} <= set(known.split(","))


MULTIPLIES_BYTES = _has("avx512vnni")
"""Whether products of bytes have instructions of their own here."""


@functools.cache
def _tiles() -> NDArray[np.uint8] | None:
    """How the tiles of AMX are set up: eight of 16 rows of 64 bytes; None where there are none, or the kernel does not
    grant them, for which it is asked once."""
    if not (_PLATFORM == "linux" and _has("amx-tile", "amx-int8")):
        return None
    arch_prctl, request, tile_data = 158, 0x1023, 18
    if ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) != 0:
        return None
    palette, width, height = slice(0, 1), slice(16, 32), slice(48, 56)
    found = np.zeros(64, dtype=np.uint8)
    found[palette], found[width].view(np.uint16)[:], found[height] = 1, _LANES * _FOUR, _LANES
    return found


def list_above(
    short_BK: NDArray[np.float32], table: tuple[NDArray[np.int8], NDArray[np.float32]], wanted: int
) -> Lists:
    """The rows that score highest for a query, about `wanted` and more rather than fewer, where `MULTIPLIES_BYTES`.

    Parameters
    ----------
    short_BK : (B, K) queries.
    table : sketches (L, K) and what is added to their products, (L,).
    """
    sketches, base = table
    every, kept = sample_of(len(base), wanted)
    sample = sketches[::every].copy(), base[::every].copy()
    lists, tiles = empty_lists(len(short_BK), wanted), _tiles()

    # Two parts a thread: of more, each would read the table once more.
    together = min(max(-(-len(short_BK) // (2 * num_workers())), _FEWEST), _MOST)

    def run(first: int, last: int) -> None:
        for number in range(first, last):
            part = slice(number * together, (number + 1) * together)
            count_B, ids_BC, score_BC = (array[part] for array in lists)
            _list(short_BK[part], table, sample, kept, wanted, tiles, (count_B, ids_BC, score_BC))

    in_threads(run, -(-len(short_BK) // together), least=2)
    return lists


@compiled
def round_query(short: Any, whole: Any) -> Any:
    """A query's whole numbers, into `whole`; returns what one of them stands for, and what is to be taken off its
    products with rows that are 128 more in each number."""
    largest = np.float32(1e-30)
    for column in range(SIZE):
        largest = max(largest, abs(short[column]))
    unit, total = largest / np.float32(MAX_CODE), np.int32(0)
    for column in range(SIZE):
        whole[column] = np.int8(np.rint(short[column] / unit))
        total += np.int32(whole[column])
    return unit, np.int32(total * (MAX_CODE + 1))


@compiled(fastmath={"reassoc", "contract"})
def _plain_products(query: Any, table: Any, first: Any, last: Any, score: Any) -> None:
    whole, unit, _ = query
    sketches, base = table
    for position in range(last - first):
        total = np.int32(0)
        # A constant number of turns, and products kept in 32 bits: eight of them at once.
        for column in range(SIZE):
            total = np.int32(total + np.int32(whole[column]) * np.int32(sketches[first + position, column]))
        score[position] = np.float32(total) * unit + base[first + position]


@compiled(fastmath={"contract"})
def _products_of_bytes(query: Any, table: Any, first: Any, last: Any, score: Any) -> None:
    whole, unit, less = query
    sketches, base = table
    for position in range(last - first):
        total = _sum_of_products(sketches, first + position, whole) - less
        score[position] = np.float32(total) * unit + base[first + position]


products = _products_of_bytes if MULTIPLIES_BYTES else _plain_products
"""`products((whole, unit, less), (sketches, base), first, last, score)`, compiled: `unit whole . sketch + base` of the
rows first..last, into `score`; the query is as of `round_query`."""


@compiled
def _list(short_BK: Any, table: Any, sample: Any, kept: int, wanted: int, tiles: Any, lists: Any) -> None:
    """With tiles or None: two functions to numba, of which the second has no instruction of AMX."""
    count_B, ids_BC, score_BC = lists
    num_queries, num_rows, num_sampled = short_BK.shape[0], table[1].shape[0], sample[1].shape[0]
    together = _FOUR if tiles is None else _BY_TILES
    filled = -(-num_queries // together) * together
    whole, less = np.zeros((filled, SIZE), dtype=np.int8), np.zeros(filled, dtype=np.int32)
    # Nothing comes up to what is not a number.
    unit, above = np.zeros(filled, dtype=np.float32), np.full(filled, np.nan, dtype=np.float32)
    for row in range(num_queries):
        if np.isfinite(short_BK[row].sum()):
            unit[row], less[row] = round_query(short_BK[row], whole[row])
    base = np.empty(WORD, dtype=np.float32)
    block, queries = (np.empty(WORD * SIZE, dtype=np.uint8), base), (whole, less, unit, above)
    sums, words = np.empty((together, WORD), dtype=np.int32), np.empty(together, dtype=np.uint64)
    sampled, nothing = np.empty((num_queries, num_sampled), dtype=np.float32), np.empty(0, dtype=np.int32)
    if tiles is not None:
        _set_up(tiles)
    for start in range(0, num_sampled, WORD):
        size = _lay_side_by_side(sample, start, *block)
        for first in range(0, filled, together):
            _meet(tiles, block, queries, first, sums, words)
            for lane in range(min(together, num_queries - first)):
                for place in range(size):
                    score = np.float32(sums[lane, place] - less[first + lane]) * unit[first + lane] + base[place]
                    sampled[first + lane, start + place] = score
    for row in range(num_queries):
        least = least_of_best(sampled[row], nothing, kept, num_sampled)
        # A query that is not finite was left at zero.
        is_guide = np.isfinite(least) and unit[row] > 0.0
        count_B[row] = 0 if is_guide else -1
        above[row] = least if is_guide else np.nan
    for start in range(0, num_rows, WORD):
        _lay_side_by_side(table, start, *block)
        for first in range(0, filled, together):
            _meet(tiles, block, queries, first, sums, words)
            for lane in range(min(together, num_queries - first)):
                word, row = words[lane], first + lane
                if word == 0:
                    continue
                count = count_B[row]
                while word:
                    lowest_place = np.int64(lowest(word))
                    ids_BC[row, count] = start + lowest_place
                    score_BC[row, count] = (
                        np.float32(sums[lane, lowest_place] - less[row]) * unit[row] + base[lowest_place]
                    )
                    count += 1
                    word &= word - np.uint64(1)
                if count > ids_BC.shape[1] - WORD:
                    count, least = make_room(ids_BC[row], score_BC[row], count, wanted)
                    above[row] = least if count >= 0 else np.nan
                count_B[row] = count
    if tiles is not None:
        _release()


@compiled
def _meet(tiles: Any, block: Any, queries: Any, first: Any, sums: Any, words: Any) -> None:
    rows, base = block
    whole, less, unit, above = queries
    if tiles is None:
        _multiply(rows, base, whole, less, unit, above, first, sums, words)
    else:
        _multiply_tiles(rows, base, whole, less, unit, above, first, sums, words)


@compiled
def _lay_side_by_side(table: Any, start: int, rows: Any, base: Any) -> Any:
    """64 rows from `start` on, or as many as there are; none of the others comes up to anything."""
    sketches, base_L = table
    size = min(WORD, base_L.shape[0] - start)
    if size == WORD:
        _transpose(sketches, start, rows)
    else:
        filled = np.zeros((WORD, SIZE), dtype=np.int8)
        filled[:size] = sketches[start:]
        _transpose(filled, 0, rows)
    base[:size] = base_L[start : start + size]
    base[size:] = -np.inf
    return size


def _number(value: int) -> Any:
    return ir.Constant(_PLACE, value)


def _data(
    target: Any, builder: Any, signature: Any, arguments: Any, number: int, row: Any = None, size: int = 0
) -> Any:
    """Where an array's bytes are, from a row of `size` bytes on."""
    array = target.make_array(signature.args[number])(target, builder, arguments[number])
    first = builder.bitcast(array.data, _BYTE.as_pointer())
    return first if row is None else builder.gep(first, [builder.mul(row, _number(size))])


def _at(builder: Any, first: Any, place: int, kind: Any) -> Any:
    return builder.bitcast(builder.gep(first, [_number(place)]), kind.as_pointer())


def _load(builder: Any, first: Any, place: int, kind: Any) -> Any:
    return builder.load(_at(builder, first, place, kind), align=1)


def _store(builder: Any, value: Any, first: Any, place: int) -> None:
    builder.store(value, _at(builder, first, place, value.type), align=1)


def _in_all_lanes(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(value.type, _LANES), ir.Undefined)
    single = builder.insert_element(nothing, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(single, nothing, ir.Constant(_INTS, [0] * _LANES))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kinds = [argument.type for argument in arguments]
    return builder.call(builder.module.declare_intrinsic(name, (), ir.FunctionType(result, kinds)), arguments)


def _multiply_add(builder: Any, total: Any, rows: Any, query: Any) -> Any:
    """16 sums, each and the products of four bytes without a sign with four that have one."""
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, total, rows, query)


def _without_sign(builder: Any, rows: Any) -> Any:
    return builder.xor(rows, ir.Constant(_INTS, [0x80808080] * _LANES))


@for_compiled_code
def _sum_of_products(context: Any, sketches: Any, row: Any, whole: Any) -> Any:
    """Of a row that is 128 more in each number with a query."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers = _data(target, builder, signature, arguments, 0, arguments[1], SIZE)
        query = _data(target, builder, signature, arguments, 2)
        total = ir.Constant(_INTS, [0] * _LANES)
        for place in range(0, SIZE, _LANES * _FOUR):
            part = _without_sign(builder, _load(builder, numbers, place, _INTS))
            total = _multiply_add(builder, total, part, _load(builder, query, place, _INTS))
        return _call(builder, "llvm.vector.reduce.add.v16i32", _INT, total)

    return types.int32(sketches, types.intp, whole), generate


@for_compiled_code
def _transpose(context: Any, sketches: Any, start: Any, rows: Any) -> Any:
    """64 sketches from `start` on, 128 more in each number, 16 of them side by side: four bytes of each, the next four
    of each, and so on."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers = _data(target, builder, signature, arguments, 0, arguments[1], SIZE)
        out, size, half = _data(target, builder, signature, arguments, 2), _LANES * _FOUR, _LANES // 2
        low = ir.Constant(_INTS, [place // 2 + _LANES * (place % 2) for place in range(_LANES)])
        high = ir.Constant(_INTS, [half + place // 2 + _LANES * (place % 2) for place in range(_LANES)])
        for group in range(0, WORD, _LANES):
            for part in range(0, SIZE, size):
                square = [_load(builder, numbers, (group + row) * SIZE + part, _INTS) for row in range(_LANES)]
                for _ in range(4):
                    # A row's and a column's number, of four bits each, turn by one bit as one number of eight.
                    pairs = list(zip(square[:half], square[half:], strict=True))
                    square = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in (low, high)]
                for number, vector in enumerate(square):
                    place = group * SIZE + (part // _FOUR + number) * size
                    _store(builder, _without_sign(builder, vector), out, place)
        return target.get_dummy_value()

    return types.void(sketches, types.intp, rows), generate


def _note(builder: Any, data: Any, query: int, totals: Any) -> None:
    """Which of a query's scores, of its sums with 64 rows, come up to `above`: a word of bits."""
    base, less, unit, above, words = data
    taken = _in_all_lanes(builder, _load(builder, less, 4 * query, _INT))
    one, least = (_in_all_lanes(builder, _load(builder, first, 4 * query, _FLOAT)) for first in (unit, above))
    word = _number(0)
    for group, total in enumerate(totals):
        product = builder.fmul(builder.sitofp(builder.sub(total, taken), _FLOATS), one)
        score = builder.fadd(product, _load(builder, base, 4 * group * _LANES, _FLOATS))
        bits = builder.bitcast(builder.fcmp_ordered(">=", score, least), ir.IntType(_LANES))
        word = builder.or_(word, builder.shl(builder.zext(bits, _PLACE), _number(group * _LANES)))
    _store(builder, word, words, 8 * query)


def _multiplication(generate: Any) -> Any:
    """Compiled code: the sums of products of 64 `rows`, as of `_transpose`, with queries from `first` on, and which of
    them, as scores, come up to `above`: a bit of each."""

    def define(
        context: Any,
        rows: Any,
        base: Any,
        whole: Any,
        less: Any,
        unit: Any,
        above: Any,
        first: Any,
        sums: Any,
        words: Any,
    ) -> Any:
        def generate_all(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = functools.partial(_data, target, builder, signature, arguments)
            first = arguments[6]
            rows, base, sums, words = data(0), data(1), data(7), data(8)
            whole, less, unit, above = data(2, first, SIZE), data(3, first, 4), data(4, first, 4), data(5, first, 4)
            note = functools.partial(_note, builder, (base, less, unit, above, words))
            generate(builder, rows, whole, sums, note)
            return target.get_dummy_value()

        kinds = (rows, base, whole, less, unit, above, types.intp, sums, words)
        return types.void(*kinds), generate_all

    return for_compiled_code(define)


@_multiplication
def _multiply(builder: Any, rows: Any, whole: Any, sums: Any, note: Any) -> None:
    """For four queries."""
    groups, queries = range(WORD // _LANES), range(_FOUR)
    totals = [[ir.Constant(_INTS, [0] * _LANES) for _ in groups] for _ in queries]
    for part in range(0, SIZE, _FOUR):
        vectors = [_load(builder, rows, (group * SIZE + part) * _LANES, _INTS) for group in groups]
        for query in queries:
            four = _in_all_lanes(builder, _load(builder, whole, query * SIZE + part, _INT))
            totals[query] = [_multiply_add(builder, totals[query][group], vectors[group], four) for group in groups]
    for query in queries:
        for group in groups:
            _store(builder, totals[query][group], sums, 4 * (query * WORD + group * _LANES))
        note(query, totals[query])


@_multiplication
def _multiply_tiles(builder: Any, rows: Any, whole: Any, sums: Any, note: Any) -> None:
    """For 32 queries: two tiles of sums, then of queries the first and the last 64 numbers of each 16, then of rows."""
    parts, width = (0, 1), _LANES * _FOUR

    def run(name: str, *arguments: Any) -> None:
        _call(builder, f"llvm.x86.{name}", ir.VoidType(), *arguments)

    def tile(number: int) -> Any:
        return ir.Constant(_BYTE, number)

    for half in parts:
        for part in parts:
            place = _at(builder, whole, half * _LANES * SIZE + part * width, _BYTE)
            run("tileloadd64", tile(2 + 2 * half + part), place, _number(SIZE))
    for group in range(WORD // _LANES):
        for part in parts:
            place = _at(builder, rows, group * _LANES * SIZE + part * _LANES * width, _BYTE)
            run("tileloadd64", tile(6 + part), place, _number(width))
        for half in parts:
            run("tilezero", tile(half))
        for part in parts:
            for half in parts:
                # Queries have a sign, rows have none.
                run("tdpbsud", tile(half), tile(2 + 2 * half + part), tile(6 + part))
        for half in parts:
            place = _at(builder, sums, 4 * (half * _LANES * WORD + group * _LANES), _BYTE)
            run("tilestored64", tile(half), place, _number(4 * WORD))
    for query in range(_BY_TILES):
        note(query, [_load(builder, sums, 4 * (query * WORD + lane), _INTS) for lane in range(0, WORD, _LANES)])


@for_compiled_code
def _set_up(context: Any, tiles: Any) -> Any:
    """Of this thread, until `_release`. (If memory ends in between, they stay: other libraries set up their own.)"""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), _data(target, builder, signature, arguments, 0))
        return target.get_dummy_value()

    return types.void(tiles), generate


@for_compiled_code
def _release(context: Any) -> Any:
    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return target.get_dummy_value()

    return types.void(), generate
