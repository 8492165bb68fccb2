"""Layer 1. Instructions of the processor that numba does not make of plain Python; for compiled code alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from xmc_midx.compiled import compiled

__all__ = ["AHEAD", "WORD", "fetch", "fetch_row", "for_compiled_code", "for_each_type", "lowest", "reaching"]

AHEAD = 4
"""Rows that are asked for while one is read."""
WORD = 64
"""Bits of a word."""
_LINE, _BEGINNING = 64, 512
"""Bytes of a cache line, and of a long row that are asked for."""


def for_compiled_code(define: Any) -> Any:
    """numba's `intrinsic`: what it makes is called without the context that it defines the call with."""
    return intrinsic(define)


def for_each_type(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a function that is given types and returns what is compiled for them, with these options of `numba.njit`, what
    compiled code calls."""

    def decorate(choose: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(choose)
        def chosen(*arguments: Any) -> Any:
            raise NotImplementedError(f"{choose.__name__} is for compiled code alone")

        made: Any = {"jit_options": options}
        overload(chosen, **made)(choose)
        return chosen

    return decorate


@compiled
def fetch(values: Any, first: int, last: int) -> None:
    """Ask for the cache lines of `values[first:last]`, and go on without waiting for them.

    What lies at anyone's guess is asked for some turns before it is used: then the processor waits for many such places
    side by side, and while it computes. To read them ahead gains little: a load is waited for in its turn.
    """
    step = max(1, _LINE // values.itemsize)
    for place in range(first, last, step):
        _prefetch(values, place)


@compiled
def fetch_row(table: Any, row: Any) -> None:
    """`fetch` of a row; of a long one the beginning: once it is read, the processor asks for the rest by itself."""
    fetch(table[row], 0, min(table.shape[1], _BEGINNING // table.itemsize))


@for_compiled_code
def _prefetch(context: Any, values: Any, place: Any) -> Any:
    """Of one cache line."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = target.make_array(signature.args[0])(target, builder, arguments[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", (byte,), ir.FunctionType(ir.VoidType(), (byte, number, number, number))
        )
        # To be read, to be kept, data.
        how = [ir.Constant(number, value) for value in (0, 3, 1)]
        builder.call(function, [builder.bitcast(builder.gep(array.data, [arguments[1]]), byte), *how])
        return target.get_dummy_value()

    return types.void(values, types.intp), generate


@for_compiled_code
def reaching(context: Any, values: Any, first: Any, least: Any) -> Any:
    """Which of 64 numbers from `values[first]` on, int16 side by side in memory, come up to `least`: a bit of each."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, lanes = ir.VectorType(ir.IntType(16), WORD), ir.VectorType(ir.IntType(32), WORD)
        array = target.make_array(signature.args[0])(target, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), vector.as_pointer())
        nothing = ir.Constant(vector, ir.Undefined)
        single = builder.insert_element(nothing, arguments[2], ir.Constant(ir.IntType(32), 0))
        every = builder.shuffle_vector(single, nothing, ir.Constant(lanes, [0] * WORD))
        return builder.bitcast(builder.icmp_signed(">=", builder.load(place, align=2), every), ir.IntType(WORD))

    return types.uint64(values, types.intp, types.int16), generate


@for_compiled_code
def lowest(context: Any, word: Any) -> Any:
    """The number of the lowest bit of a word that is not 0."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate
