"""What threads need inside a compiled function: a barrier, and arrays behind addresses.

A waiting thread spins, since to sleep and to be woken takes longer than most waits here. Now and then it
yields its core: two threads on one core would otherwise wait for each other's whole time slices.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray
from numba.core import types

from minilora.kernels.intrinsics import I8, I32, call, intrinsic, pointer
from minilora.kernels.jit import kernel

Array = np.ndarray

available = sys.platform != "win32"  # Windows has no sched_yield

SPINS = 2000
"""How often a thread looks before it yields its core: about 50 µs."""


@kernel
def meet(sync: Array, phase: int, threads: int) -> int:
    """Wait until all threads have come to their meeting number `phase`, and return the number of the next.

    `sync` (2,) int64, zeros at the start, holds how many have arrived in all meetings together, and whether
    to stop waiting. What a thread wrote before it came is seen by all that have left.
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
    """Return the `count` bytes at an address as an array; whoever passes the address keeps them alive."""
    return carray(_to_pointer(address), count, np.uint8)


@intrinsic
def _add(typing: Any, array: Any, i: Any, value: Any) -> Any:
    """Do array[i] += value as one atomic operation that all threads see."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = pointer(context, builder, signature, arguments, 0)
        builder.atomic_rmw("add", place, arguments[2], "acq_rel")
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), build


@intrinsic
def _read(typing: Any, array: Any, i: Any) -> Any:
    """Return array[i] as it is now."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(pointer(context, builder, signature, arguments, 0), "acquire", 8)

    return types.int64(array, types.intp), build


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell an x86 processor that this loop waits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _yield(typing: Any) -> Any:
    """Call the C library's sched_yield."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _to_pointer(typing: Any, address: Any) -> Any:
    """Return an address, an int64, as a pointer to bytes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.CPointer(types.uint8)(types.int64), build
