"""Three kernels of `codes` for 4 bits, in vectors of AVX-512 or AVX2. `codes` is the one to read first.

LLVM finds no vector instruction for a table lookup, but processors have them:

* AVX-512's `vpermps` looks up 16 float32 numbers in a table of 16. The table is that of a block: its 16
  levels times its scale plus its offset, so that a lookup gives the weight itself.
* AVX2's `vpshufb` looks up 32 bytes in tables of 16. A level is a float32 of four bytes, so four lookups,
  their bytes interleaved, give 32 levels.
* AVX2's `vpermilps` looks up float32 numbers in tables of 4, enough for a binary search.

Arguments are those of `codes`, but bits = 4, and widths, starts and block sizes are multiples of 32. Weights,
scales and codes have the same bits as those of `codes`; products differ by rounding. tests/test_kernels.py
compares all with `codes` and with exact sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numpy.typing import NDArray

from minilora.kernels.intrinsics import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    KEEP_ORDER,
    F32x8,
    F32x16,
    F32x32,
    available,
    call,
    fetch,
    float_at,
    intrinsic,
    larger,
    largest,
    load,
    number,
    numbers,
    pick,
    plus_product,
    pointer,
    repeat,
    start,
    store,
    times,
    total,
    vector,
    wide,
)
from minilora.kernels.jit import kernel

__all__ = ["available", "dequantize", "matvec", "quantize_codebook"]

Array = NDArray[Any]

SMALLEST_ABSMAX = np.float32(1e-38)
"""Divisor of a block of zeros."""

NO_OFFSET = np.float32(-0.0)
"""The offset that changes no number when added, not even the sign of a zero."""

# --- kernels -----------------------------------------------------------------------------------------------


@kernel
def quantize_codebook(w: Array, midpoints: Array, block_size: int, absmax: Array, out: Array) -> None:
    """Do what `codes.quantize_codebook` does for 15 midpoints other than -0, whole blocks, finite weights."""
    tables = _search_tables(midpoints)
    for block in range(absmax.size):
        first = block * block_size
        highest = repeat(np.float32(0))
        for i in range(first, first + block_size, 32):
            fetch(w, i + 1024)
            highest = larger(highest, load(w, i))
        absmax[block] = largest(highest)
        inverse = np.float32(1) / max(absmax[block], SMALLEST_ABSMAX)
        for i in range(first, first + block_size, 32):
            _store_ranks(times(load(w, i), repeat(inverse)), tables, out, i)


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
    """Do what `codes.dequantize` does."""
    levels = _tables(table)
    block, left = np.uint64(0), block_size - start % block_size
    for i in range(0, out.size, 32):
        if left == 0:
            block += np.uint64(1)
            left = block_size
        left -= 32
        scale = repeat(float_at(scales, block))
        offset = repeat(float_at(offsets, block) if offsets.size else NO_OFFSET)
        fetch(out, i + 512)
        store(_weights(packed, (start + i) // 2, levels, scale, offset), out, i)


@kernel
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
    """Do what `codes.matvec` does, up to rounding: no weight leaves the registers.

    The order of a row's additions depends on its length alone, not on where rows are divided.
    """
    levels = _tables(table)
    block, left = np.uint64(0), block_size - start % block_size
    for r in range(out.size):
        row = start + r * x.size
        dot = repeat(np.float32(0))
        for c in range(0, x.size, 32):
            if left == 0:
                block += np.uint64(1)
                left = block_size
            left -= 32
            scale = repeat(float_at(scales, block))
            offset = repeat(float_at(offsets, block) if offsets.size else NO_OFFSET)
            byte = (row + c) // 2
            fetch(packed, byte + 4096)
            dot = plus_product(dot, _weights(packed, byte, levels, scale, offset), load(x, c))
        out[r] = total(dot)


# --- operations: looking up --------------------------------------------------------------------------------

I8x16, I8x32, I8x64, I8x128 = (vector(I8, n) for n in (16, 32, 64, 128))
I16x16, I32x4, I32x8, I32x16 = vector(I16, 16), vector(I32, 4), vector(I32, 8), vector(I32, 16)


@intrinsic
def _tables(typing: Any, table: Any) -> Any:
    """Return what `_weights` looks up in.

    With AVX-512 it is the 16 levels, twice. With AVX2 it is 128 bytes: the first byte of each level, twice
    (for two lanes), then the second, third and fourth. `table` is `codes.lookup_table` of 4 bits, where
    table[16·code, 0] is the level of a code.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = start(context, builder, signature, arguments, 0)
        levels = ir.Constant(F32x16, ir.Undefined)
        for code in range(16):
            level = builder.load(builder.bitcast(builder.gep(first, [number(32 * code)]), F32.as_pointer()))
            levels = builder.insert_element(levels, level, I32(code))
        if wide():
            return pick(builder, levels, 2 * [*range(16)])
        planes = [4 * code + k for k in range(4) for lane in (0, 1) for code in range(16)]
        return builder.bitcast(pick(builder, builder.bitcast(levels, I8x64), planes), F32x32)

    return FLOATS(table), build


@intrinsic
def _weights(typing: Any, packed: Any, byte: Any, tables: Any, scale: Any, offset: Any) -> Any:
    """Return level·scale + offset of the 32 codes in packed[byte : byte + 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tables, scale, offset = arguments[2:]
        codes = builder.load(pointer(context, builder, signature, arguments, 0, I8x16), align=1)

        def scaled(v: Any) -> Any:
            return builder.fadd(builder.fmul(v, scale, flags=KEEP_ORDER), offset, flags=KEEP_ORDER)

        if wide():
            return _levels_avx512(builder, codes, scaled(tables))
        return scaled(_levels_avx2(builder, codes, tables))

    return FLOATS(packed, byte, tables, scale, offset), build


def _lookup16(builder: Any, table: Any, indices: Any) -> Any:
    """Return entries of a table of 16 float32 numbers: AVX-512's `vpermps`, which reads the lowest 4 bits."""
    return call(builder, "llvm.x86.avx512.permvar.sf.512", F32x16, table, indices)


def _levels_avx512(builder: Any, packed: Any, table: Any) -> Any:
    """Return the entries of 32 codes: an int32 holds eight, and each lane shifts its own to the right."""
    table, words = pick(builder, table, range(16)), builder.bitcast(packed, I32x4)
    shifts = numbers(I32, 2 * [4, 0, 12, 8, 20, 16, 28, 24])
    a, b = (
        _lookup16(builder, table, builder.lshr(pick(builder, words, 8 * [k] + 8 * [k + 1]), shifts))
        for k in (0, 2)
    )
    return pick(builder, a, range(32), b)


def _levels_avx2(builder: Any, packed: Any, planes: Any) -> Any:
    """Return the levels of 32 codes, found byte by byte."""
    # Each byte twice, in an order that two interleavings, which cannot leave a lane, put right.
    order = [4 * group + 2 * lane + i for lane in (0, 1) for group in range(4) for i in (0, 0, 1, 1)]
    twice = builder.bitcast(pick(builder, packed, order), I16x16)
    first = builder.and_(builder.lshr(twice, numbers(I16, [4] * 16)), numbers(I16, [0x000F] * 16))
    second = builder.and_(twice, numbers(I16, [0x0F00] * 16))
    codes = builder.bitcast(builder.or_(first, second), I8x32)

    planes = builder.bitcast(planes, I8x128)
    tables = [pick(builder, planes, range(k, k + 32)) for k in (0, 32, 64, 96)]
    found = [call(builder, "llvm.x86.avx2.pshuf.b", I8x32, table, codes) for table in tables]
    low, high = (_interleave(builder, *found[k : k + 2]) for k in (0, 2))
    eights = []
    for a, b in zip(low, high, strict=True):
        eights += _interleave(builder, builder.bitcast(a, I16x16), builder.bitcast(b, I16x16))
    return _join(builder, [builder.bitcast(eight, F32x8) for eight in eights])


def _join(builder: Any, parts: list[Any]) -> Any:
    """Return four vectors of eight as one of 32."""
    a, b = (pick(builder, parts[i], range(16), parts[i + 1]) for i in (0, 2))
    return pick(builder, a, range(32), b)


def _interleave(builder: Any, a: Any, b: Any) -> list[Any]:
    """Return a0 b0 a1 b1 … of the lower, then of the upper half of both 128-bit lanes: AVX2's unpack."""
    n = a.type.count // 2
    return [
        pick(
            builder,
            a,
            [i + o for lane in (0, n) for i in range(lane + half, lane + half + n // 2) for o in (0, 2 * n)],
            b,
        )
        for half in (0, n // 2)
    ]


# --- operations: searching ---------------------------------------------------------------------------------


@intrinsic
def _search_tables(typing: Any, midpoints: Any) -> Any:
    """Return what `_store_ranks` searches in.

    After s steps a value has one of 2^s ranks k, and is compared with the middle of the k-th of 2^s parts of
    the midpoints. With AVX-512 that is entry 2^s + k of one table. With AVX2 it is entry -k mod 4 of table s
    of five tables of 4: after three steps there are 8 ranks, and those from 4 on are in the fifth table.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = start(context, builder, signature, arguments, 0)
        low, high = (  # of 15 midpoints, the eighth is in both
            builder.load(builder.bitcast(builder.gep(first, [number(k)]), F32x8.as_pointer()), align=4)
            for k in (0, 7)
        )
        order = [0] * 32
        for step in range(4):
            for k in range(2**step):
                middle = (2 * k + 1) * 2 ** (3 - step) - 1
                entry = 2**step + k if wide() else 4 * (step + k // 4) + -k % 4
                order[entry] = middle if middle < 8 else middle + 1
        return pick(builder, low, order, high)

    return FLOATS(midpoints), build


@intrinsic
def _store_ranks(typing: Any, values: Any, tables: Any, out: Any, i: Any) -> Any:
    """Write the number of midpoints below each of 32 values to out[i : i + 32] uint8, by a binary search."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ranks = (_ranks_avx512 if wide() else _ranks_avx2)(builder, *arguments[:2])
        builder.store(ranks, pointer(context, builder, signature, arguments, 2, I8x32), align=1)
        return context.get_dummy_value()

    return types.void(values, tables, out, i), build


def _ranks_avx512(builder: Any, values: Any, tables: Any) -> Any:
    """Return 32 ranks as bytes: the sign of middle - value, 1 if the value is above, is the next bit."""
    table, found = pick(builder, tables, range(16)), []
    for k in (0, 16):
        x, entry = pick(builder, values, range(k, k + 16)), numbers(I32, [1] * 16)
        for _ in range(4):
            # not nsz: the difference of a tie is +0
            difference = builder.fsub(_lookup16(builder, table, entry), x, flags=("arcp",))
            difference = builder.bitcast(difference, I32x16)
            entry = call(builder, "llvm.fshl.v16i32", I32x16, entry, difference, numbers(I32, [1] * 16))
        found.append(entry)
    both = builder.trunc(pick(builder, found[0], range(32), found[1]), I8x32)
    return builder.and_(both, numbers(I8, [15] * 32))


def _ranks_avx2(builder: Any, values: Any, tables: Any) -> Any:
    """Return 32 ranks as bytes. A comparison gives -1 if the value is above: ranks are counted downwards."""
    split = [pick(builder, tables, 2 * [*range(k, k + 4)]) for k in range(0, 20, 4)]
    ranks = []
    for k in range(0, 32, 8):
        x = pick(builder, values, range(k, k + 8))
        rank = upper = numbers(I32, [0] * 8)
        for step in range(4):
            middle = call(builder, "llvm.x86.avx.vpermilvar.ps.256", F32x8, split[step], rank)
            if step == 3:
                last = call(builder, "llvm.x86.avx.vpermilvar.ps.256", F32x8, split[4], rank)
                middle = builder.select(upper, last, middle)
            above = builder.fcmp_ordered(">", x, middle)
            upper = above if step == 0 else upper
            rank = builder.add(builder.add(rank, rank), builder.sext(above, I32x8))
        ranks.append(rank)
    return builder.neg(builder.trunc(_join(builder, ranks), I8x32))
