"""The two kernels of `block_codes` in vectors: GGUF's blocks Q4_0, Q4_1 and Q8_0. Read `block_codes` first.

`dequantize_blocks` gives the same bits. `multiply_blocks` never forms a weight: with w = d·q + m, a block's
part of a product is

    Σ w·x  =  d · Σ q·x  +  m · Σ x        (Q4_0: m = -8·d;  Q8_0: m = 0)

Σ x is the same for all rows, and one multiplication by d serves 32 weights. Where d·q and m cancel, digits
are lost that the sum of w·x would keep. The error is at most (in + 4)·2^-24·Σ (|d·q| + |m|)·|x|. A quantizer
uses the codes at both ends of a block, so |d·q| + |m| is at most about three times the block's largest |w|.

Codes of four bits are converted where they lie. An int32 holds eight of them: once the others are masked
away, code n is the number 16^n·q, which float32 holds exactly. The factor 16^-n is in the input, which
`order_input` arranges in the order of the codes. tests/test_blocks.py and tests/test_kernels.py compare with
`block_codes` and with exact sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import register_model

from minilora.kernels.intrinsics import (
    F16,
    F32,
    FLOATS,
    I8,
    I32,
    KEEP_ORDER,
    F32x8,
    F32x16,
    F32x32,
    I32x32,
    add_halves,
    available,
    broadcast,
    fetch,
    float_at,
    intrinsic,
    load,
    multiply_add,
    numbers,
    pick,
    plus,
    pointer,
    repeat,
    store,
    times,
    vector,
    wide,
)
from minilora.kernels.jit import kernel

Array = np.ndarray

__all__ = ["available", "dequantize_blocks", "multiply_blocks", "multiply_rows", "order_input"]

PREFETCH = 4096
"""Prefetch distance in bytes. Without it, half of the time is spent waiting for memory."""

LANES = 16 if wide() else 8
"""Numbers in a vector."""

# --- kernels: arguments as in `block_codes` ----------------------------------------------------------------


@kernel
def dequantize_blocks(blocks: Array, size: int, first: int, out: Array) -> None:
    """Do what `block_codes.dequantize_blocks` does."""
    at = first * size
    if size == 18:  # Q4_0
        for i in range(0, out.size, 32):
            fetch(out, i + 512)
            q = plus(_nibbles(blocks, at + 2), repeat(np.float32(-8)))
            store(times(q, repeat(float_at(blocks, at))), out, i)
            at += size
    elif size == 20:  # Q4_1
        for i in range(0, out.size, 32):
            fetch(out, i + 512)
            dq = times(_nibbles(blocks, at + 4), repeat(float_at(blocks, at)))
            store(plus(dq, repeat(float_at(blocks, at + 2))), out, i)
            at += size
    else:  # Q8_0
        for i in range(0, out.size, 32):
            fetch(out, i + 512)
            store(times(_bytes(blocks, at + 2), repeat(float_at(blocks, at))), out, i)
            at += size


@kernel
def multiply_blocks(blocks: Array, size: int, x: Array, first: int, last: int, out: Array) -> None:
    """Do what `block_codes.multiply_blocks` does, up to rounding.

    A row of x gives the same bits alone and among others.
    """
    batch, width = x.shape
    ordered = np.zeros(((batch + 3) // 4 * 4, width), np.float32)
    block_sums = np.zeros((len(ordered), width // 32), np.float32)
    for i in range(batch):
        if size == 34:
            for c in range(width):
                ordered[i, c] = x[i, c]
        else:
            order_input(x[i], ordered[i], block_sums[i])
    for i in range(0, batch, 4):
        if i + 2 < batch:  # four rows of x for each block that is decoded; those beyond the batch are zeros
            _multiply_four(
                blocks, size, ordered[i : i + 4], block_sums[i : i + 4], first, last, out[i : i + 4]
            )
        else:
            for row in range(i, batch):
                multiply_rows(blocks, size, ordered[row], block_sums[row], first, last, out[row])


@kernel
def multiply_rows(
    blocks: Array, size: int, x: Array, block_sums: Array, first: int, last: int, out: Array
) -> None:
    """Write out[r] = Σ_c W[r, c]·x[c] for rows r = first … last - 1.

    x and block_sums are what `order_input` writes; for Q8_0 x is in its own order, and block_sums are not
    read.
    """
    at = first * block_sums.size * size
    for r in range(first, last):
        sums = _zeros()
        for b in range(block_sums.size):
            codes = _bytes(blocks, at + 2) if size == 34 else _nibbles_in_place(blocks, at + size - 16)
            sums = _add_block(sums, blocks, at, codes, load(x, 32 * b), block_sums[b])
            fetch(blocks, at + PREFETCH)
            at += size
        out[r] = _total(sums, size)


@kernel
def _multiply_four(
    blocks: Array, size: int, x: Array, block_sums: Array, first: int, last: int, out: Array
) -> None:
    """Do what `multiply_rows` does for four rows of x (4, in); out (1 to 4, rows) wants the first."""
    width, per_row = x.shape[1], block_sums.shape[1]
    flat, flat_sums = x.reshape(-1), block_sums.reshape(-1)
    at = first * per_row * size
    for r in range(first, last):
        s0 = s1 = s2 = s3 = _zeros()
        for b in range(per_row):
            codes = _bytes(blocks, at + 2) if size == 34 else _nibbles_in_place(blocks, at + size - 16)
            c = 32 * b
            s0 = _add_block(s0, blocks, at, codes, load(flat, c), flat_sums[b])
            s1 = _add_block(s1, blocks, at, codes, load(flat, width + c), flat_sums[per_row + b])
            s2 = _add_block(s2, blocks, at, codes, load(flat, 2 * width + c), flat_sums[2 * per_row + b])
            s3 = _add_block(s3, blocks, at, codes, load(flat, 3 * width + c), flat_sums[3 * per_row + b])
            fetch(blocks, at + PREFETCH)
            at += size
        for i in range(len(out)):
            out[i, r] = _total(s0 if i == 0 else s1 if i == 1 else s2 if i == 2 else s3, size)


@kernel
def _total(sums: Any, size: int) -> Any:
    """Return the product: Σ d·Σx and Σ m·Σx lie beside the sums, and Q4_0's m is -8·d."""
    if size == 20:
        return _sum(sums) + _lane(sums, LANES + 1)
    return _sum(sums) + (np.float32(-8) * _lane(sums, LANES) if size == 18 else np.float32(0))


@kernel
def order_input(x: Array, ordered: Array, block_sums: Array) -> None:
    """Write x (in,) as `_nibbles_in_place` needs it, and the sum of each block."""
    one, two, three = np.float32(2.0**-4), np.float32(2.0**-8), np.float32(2.0**-12)
    for b in range(block_sums.size):
        total = np.float32(0)
        for j in range(32 * b, 32 * b + 32):
            total += x[j]
        block_sums[b] = total
        for i in range(4):  # the 32-bit number
            low, high, to = 32 * b + 4 * i, 32 * b + 16 + 4 * i, 32 * b + i
            ordered[to], ordered[to + 4] = x[low], x[high] * one
            ordered[to + 8], ordered[to + 12] = x[low + 1] * two, x[high + 1] * three
            ordered[to + 16], ordered[to + 20] = x[low + 2], x[high + 2] * one
            ordered[to + 24], ordered[to + 28] = x[low + 3] * two, x[high + 3] * three


# --- operations --------------------------------------------------------------------------------------------


class _Sums(types.Type):
    """Numba's type of 2·LANES float32 numbers: sums of d·q·x, and of block headers times Σx."""


@register_model(_Sums)
class _SumsModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, vector(F32, 2 * LANES))


_SUMS = _Sums(f"float32 x {2 * LANES}")


@intrinsic
def _nibbles(typing: Any, array: Any, at: Any) -> Any:
    """Return 32 codes of four bits in the order of the weights: 16 low halves of bytes, then 16 high."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = builder.load(pointer(context, builder, signature, arguments, 0, vector(I8, 16)), align=1)
        low, high = builder.and_(both, numbers(I8, [15] * 16)), builder.lshr(both, numbers(I8, [4] * 16))
        return builder.sitofp(builder.zext(pick(builder, low, range(32), high), I32x32), F32x32)

    return FLOATS(array, at), build


@intrinsic
def _nibbles_in_place(typing: Any, array: Any, at: Any) -> Any:
    """Return 32 codes in the order and with the factors that ``order_input`` answers."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        four = builder.load(pointer(context, builder, signature, arguments, 0, vector(I32, 4)), align=1)
        lower = pick(builder, four, [0, 1, 2, 3] * 4)
        upper = builder.lshr(lower, numbers(I32, [16] * 16))
        mask = numbers(I32, [0xF << 4 * (i // 4) for i in range(16)])
        low, high = (builder.sitofp(builder.and_(v, mask), F32x16) for v in (lower, upper))
        return pick(builder, low, range(32), high)

    return FLOATS(array, at), build


@intrinsic
def _bytes(typing: Any, array: Any, at: Any) -> Any:
    """Return 32 signed codes of eight bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes = builder.load(pointer(context, builder, signature, arguments, 0, vector(I8, 32)), align=1)
        return builder.sitofp(builder.sext(codes, I32x32), F32x32)

    return FLOATS(array, at), build


@intrinsic
def _zeros(typing: Any) -> Any:
    """Return 2·LANES zeros."""
    return _SUMS(), lambda context, builder, signature, arguments: ir.Constant(
        vector(F32, 2 * LANES), [0.0] * 2 * LANES
    )


@intrinsic
def _add_block(typing: Any, sums: Any, blocks: Any, at: Any, codes: Any, x: Any, total: Any) -> Any:
    """Return the sums with a block added: d·q·x in LANES lanes, and the header times Σx.

    The header is read as eight float16 numbers, of which the first two may be d and m.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, blocks, at, codes, x, total = arguments
        halves = builder.load(pointer(context, builder, signature, arguments, 1, vector(F16, 8)), align=1)
        header = builder.fpext(halves, F32x8)
        whole = pick(builder, header, range(LANES), ir.Constant(F32x8, ir.Undefined))
        parts = [[pick(builder, v, range(k, k + LANES)) for v in (codes, x)] for k in range(0, 32, LANES)]
        product = builder.fmul(*parts[0], flags=KEEP_ORDER)
        for part in parts[1:]:
            product = multiply_add(builder, part[0], part[1], product)
        dots, others = (pick(builder, sums, range(k, k + LANES)) for k in (0, LANES))
        dots = multiply_add(builder, product, pick(builder, header, [0] * LANES), dots)
        others = multiply_add(builder, whole, broadcast(builder, total, LANES), others)
        return pick(builder, dots, range(2 * LANES), others)

    return _SUMS(sums, blocks, at, codes, x, types.float32), build


@intrinsic
def _sum(typing: Any, sums: Any) -> Any:
    """Return the sum of the first LANES numbers, halves and halves."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return add_halves(builder, pick(builder, arguments[0], range(LANES)))

    return types.float32(sums), build


@intrinsic
def _lane(typing: Any, sums: Any, k: Any) -> Any:
    """Return number k of 2·LANES."""
    return types.float32(sums, k), lambda context, builder, signature, arguments: builder.extract_element(
        *arguments
    )
