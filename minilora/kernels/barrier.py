"""What threads need inside a compiled function: a barrier, and arrays behind addresses.

A thread that waits looks again and again, since to sleep and to be woken takes longer than most waits here;
but now and then it offers its core to others, without which two threads on one core would wait for each
other's whole time slices.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, extending
from numba.core import cgutils, types

from minilora.kernels.codes import Array
from minilora.kernels.jit import kernel

intrinsic: Any = extending.intrinsic
available = sys.platform != "win32"  # there is no sched_yield

SPINS = 2000
"""How often a thread looks before it offers its core: about 50 µs."""


@kernel
def meet(sync: Array, phase: int, threads: int) -> int:
    """Wait until all threads have come here, in their meeting number ``phase``, and return the number of the
    next.

    ``sync`` (2,) int64, zeros at the start: how many have arrived, all meetings together, and whether to wait
    no longer. What a thread wrote before it came is seen by all that have left.
    """
    if threads > 1:
        _add(sync, 0, 1)
        spins = 0
        while _read(sync, 0) < phase * threads and _read(sync, 1) == 0:
            spins += 1
            _pause()
            if spins % SPINS == 0:
                _yield()
    return phase + 1


@kernel
def bytes_at(address: int, count: int) -> Any:
    """Return the ``count`` bytes at an address as an array; whoever passes the address keeps them alive."""
    return carray(_to_pointer(address), count, np.uint8)


def _element(context: Any, builder: Any, signature: Any, array: Any, i: Any) -> Any:
    return builder.gep(context.make_array(signature.args[0])(context, builder, array).data, [i])


@intrinsic
def _add(typing: Any, array: Any, i: Any, value: Any) -> Any:
    """Do array[i] += value at once, for all threads to see."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.atomic_rmw(
            "add", _element(context, builder, signature, *arguments[:2]), arguments[2], "acq_rel"
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), build


@intrinsic
def _read(typing: Any, array: Any, i: Any) -> Any:
    """Return array[i] as it is now."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_element(context, builder, signature, *arguments), "acquire", 8)

    return types.int64(array, types.intp), build


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell an x86 processor that this loop waits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _yield(typing: Any) -> Any:
    """Call the C library's sched_yield."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _to_pointer(typing: Any, address: Any) -> Any:
    """Return a whole number as a pointer to bytes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), build
