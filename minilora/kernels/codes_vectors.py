"""Weights of 4 bits on processors with AVX-512 or AVX2: three functions of the kernels module again, in
vectors.

LLVM finds no vector instruction for a table lookup, but the processors have them. AVX-512's ``vpermps`` looks
up 16 float32 numbers in a table of 16: the levels of a block, multiplied by its scale beforehand, so that a
lookup gives the weight itself. AVX2 has two. ``vpshufb`` looks up 32 bytes in tables of 16; a level is a
float32 of four bytes, so four lookups, their bytes interleaved, give 32 levels. ``vpermilps`` looks up
float32 numbers in tables of 4. Either makes a binary search of 4 steps out of the 15 comparisons that a rank
takes. Kernels are written once, for both, but for AVX-512's ``_matvec_in_place``.

Weights, scales and codes have the same bits as those of the kernels module; products differ by rounding.
Everything else, and a processor without AVX2, takes the kernels module, which is the one to read. Time at
4096² NF4 on an Intel Xeon with AVX-512, one thread, loops → AVX2 → AVX-512: ``dequantize`` 4.0 → 1.6 → 1.3 ms
in the cache (tiles of 1 MiB), 9.5 → 3.3 → 3.0 ms to memory (a NumPy fill takes 8.7); ``matvec`` 4.4 → 1.8 →
0.6 ms; ``quantize_codebook`` 20 → 7.5 → 4.4 ms.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.kernels.intrinsics import (
    _all,
    _by_lane,
    _dots,
    _fence,
    _lane_blocks,
    _larger,
    _largest,
    _load,
    _number,
    _plus_product,
    _prefetch,
    _search_tables,
    _store,
    _store_past,
    _store_ranks,
    _sum,
    _tables,
    _times,
    _weights,
    wide,
)
from minilora.kernels.jit import FEATURES, kernel

Array = NDArray[Any]

SMALLEST_ABSMAX = np.float32(1e-38)
"""Divisor of a block of zeros."""

NO_OFFSET = np.float32(-0.0)
"""What leaves every number as it is when added, zeros with their signs included."""

PAST_CACHES = 4 * 2**20
"""From so many numbers, 16 MiB, on they are written past the caches: measured, it is slower below 8 MiB and
faster above 16, also if all are read right afterwards. A line that is written whole need not be fetched
first."""

LONG = 1024
"""From so many inputs on a product is faster if they are put into another order first: by a third at 4096, a
tenth at 512."""


@cache
def available() -> bool:
    """Whether Numba compiles for a processor with AVX2, fused multiply-add and conversion of float16."""
    return {"+avx2", "+fma", "+f16c"} <= FEATURES


# ---- kernels: arguments as in the kernels module, but of 4 bits, and starts, sizes and block sizes are multi


@kernel
def quantize_codebook(w: Array, midpoints: Array, block_size: int, absmax: Array, out: Array) -> None:
    """Do what ``kernels.quantize_codebook`` does, for 15 midpoints, none of them -0, whole blocks and finite
    weights."""
    tables = _search_tables(midpoints)
    for block in range(absmax.size):
        start = block * block_size
        largest = _all(np.float32(0))
        for i in range(start, start + block_size, 32):
            _prefetch(w, i + 1024)
            largest = _larger(largest, _load(w, i))
        absmax[block] = _largest(largest)
        inverse = np.float32(1) / max(absmax[block], SMALLEST_ABSMAX)
        for i in range(start, start + block_size, 32):
            _store_ranks(_times(_load(w, i), _all(inverse)), tables, out, i)


@kernel
def dequantize(
    packed: Array,
    bits: int,
    table: Array,
    scales: Array,
    offsets: Array,
    block_size: int,
    start: int,
    out: Array,
) -> None:
    """Do what ``kernels.dequantize`` does; a large ``out`` (``PAST_CACHES``) is written to memory and not
    kept in the caches."""
    levels = _tables(table)
    past, shift, before = out.size >= PAST_CACHES, out.ctypes.data // 4 % 16, _all(np.float32(0))
    block, left = np.uint64(0), block_size - start % block_size
    for i in range(0, out.size, 32):
        if left == 0:
            block += np.uint64(1)
            left = block_size
        left -= 32
        scale, offset = (
            _all(_number(scales, block)),
            _all(_number(offsets, block) if offsets.size else NO_OFFSET),
        )
        w = _weights(packed, (start + i) // 2, levels, scale, offset)
        if past and i > 0:
            _store_past(before, w, shift, out, i)
        else:
            _prefetch(out, i + 512)
            _store(w, out, i)
        before = w
    if past:
        _store(before, out, out.size - 32)
        _fence()


def matvec(
    packed: Array,
    bits: int,
    table: Array,
    scales: Array,
    offsets: Array,
    block_size: int,
    start: int,
    x: Array,
    out: Array,
) -> None:
    """Do what ``kernels.matvec`` does, up to rounding: no weight leaves the registers.

    The order of a row's additions depends on its length and on the block size alone, not on where rows are
    divided.
    """
    in_place = (
        wide() and x.size >= LONG and x.size % 128 == 0 and (128 % block_size == 0 or block_size % 128 == 0)
    )
    multiply = _matvec_in_place if in_place else _matvec
    multiply(packed, bits, table, scales, offsets, block_size, start, x, out)


@kernel
def _matvec(
    packed: Array,
    bits: int,
    table: Array,
    scales: Array,
    offsets: Array,
    block_size: int,
    start: int,
    x: Array,
    out: Array,
) -> None:
    levels = _tables(table)
    block, left = np.uint64(0), block_size - start % block_size
    for r in range(out.size):
        row = start + r * x.size
        dot = _all(np.float32(0))
        for c in range(0, x.size, 32):
            if left == 0:
                block += np.uint64(1)
                left = block_size
            left -= 32
            scale, offset = (
                _all(_number(scales, block)),
                _all(_number(offsets, block) if offsets.size else NO_OFFSET),
            )
            byte = (row + c) // 2
            _prefetch(packed, byte + 4096)
            dot = _plus_product(dot, _weights(packed, byte, levels, scale, offset), _load(x, c))
        out[r] = _sum(dot)


@kernel
def _matvec_in_place(
    packed: Array,
    bits: int,
    table: Array,
    scales: Array,
    offsets: Array,
    block_size: int,
    start: int,
    x: Array,
    out: Array,
) -> None:
    """Multiply 128 codes at a time where they lie; they are whole blocks, or part of one block.

    A number of 32 bits holds 8 codes: one of each of 16 numbers is looked up after one shift. So x is put
    into that order beforehand, and scales, one a lane, multiply sums of 8 products:

        Σ w·x  =  Σ scale·(Σ level·x) + Σ offset·(Σ x)

    Where scale·level and offset cancel, digits are lost that the sum of w·x would keep: the error is at most
    (in + 4)·2^-24·Σ (|scale·level| + |offset|)·|x|.
    """
    ordered, sums = np.empty(x.size, np.float32), np.empty(x.size // 4, np.float32)
    _order(x, ordered, sums)
    levels, lane_blocks = _tables(table), _lane_blocks(block_size)
    blocks_at_once, times_a_block = max(1, 128 // block_size), max(1, block_size // 128)
    for r in range(out.size):
        row = start + r * x.size
        block, left = row // block_size - start // block_size, times_a_block - row % block_size // 128
        dot = _all(np.float32(0))
        for c in range(0, x.size, 128):
            if left == 0:
                block += blocks_at_once
                left = times_a_block
            left -= 1
            byte = (row + c) // 2
            _prefetch(packed, byte + 4096)
            dots = _dots(packed, byte, levels, ordered, c)
            dot = _plus_product(dot, dots, _by_lane(scales, block, blocks_at_once, lane_blocks))
            if offsets.size:
                dot = _plus_product(
                    dot, _load(sums, c // 4), _by_lane(offsets, block, blocks_at_once, lane_blocks)
                )
        out[r] = _sum(dot)


@kernel
def _order(x: Array, ordered: Array, sums: Array) -> None:
    """Write x in the order of ``_dots``, and the sums of those numbers that it multiplies in one lane."""
    for i in range(ordered.size):
        step, lane = i % 128 // 16, i % 16
        ordered[i] = x[i // 128 * 128 + 8 * lane + (step ^ 1)]  # the first code of a byte is its higher half
    for i in range(sums.size):
        even = i // 32 * 128 + i % 32  # or odd steps
        sums[i] = ordered[even] + ordered[even + 32] + ordered[even + 64] + ordered[even + 96]
