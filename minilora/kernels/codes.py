"""The Numba kernels: pack, quantize, dequantize and multiply; beside each one its readable NumPy version.

Packing, for all widths: codes lie in row-major order, the first in the highest bits of a byte (bitsandbytes'
order). 2 bits: 4 codes a byte; 3 bits: 8 codes in 3 bytes, a 24-bit big-endian number; 4 bits: 2 a byte; 8
bits: as is. Code 0 pads the end.

One formula serves codebooks and affine groups, because an affine code is a codebook with the values 0, 1, 2,
…:

    w[i] = levels[code[i]] · scales[block] + offsets[block],    block = i // block_size,  i in the flattened row-major tensor

Where the processor has AVX2 or AVX-512, the simd module does three of these for 4 bits in vectors.

Kernels never validate; they take C-contiguous arrays and write into ``out``. Callers pass codes, tables,
scales and offsets read-only always, so that Numba compiles one signature of each kernel. Loops stand where
slice assignment would do: compiling one ``out[:] = codes`` takes Numba two seconds, for its error messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.kernels.jit import kernel

Array = NDArray[Any]

UNIT = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
"""Bits of a code -> (codes, bytes) of the smallest whole piece of packed data."""

SMALLEST_ABSMAX = np.float32(1e-38)


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes ``count`` codes of ``bits`` bits take.

    >>> packed_size(9, 3), packed_size(9, 4)
    (6, 5)
    """
    codes, size = UNIT[bits]
    return -(-count // codes) * size


# ---- packing


@kernel
def pack(codes: Array, bits: int, out: Array) -> None:
    """Pack ``codes`` (n,) uint8 into ``out`` (packed_size(n, bits),) uint8: 8 codes become ``bits`` bytes at
    a time."""
    done = 0
    if bits == 8:
        done = codes.size
        for i in range(done):
            out[i] = codes[i]
    elif bits == 4:  # the common width: 30 times faster than the general loop
        done = codes.size // 8 * 8
        for i in range(done // 2):
            out[i] = codes[2 * i] << 4 | codes[2 * i + 1]
    for first in range(done, codes.size, 8):
        word = np.uint64(0)
        for i in range(first, first + 8):
            word <<= np.uint64(bits)
            if i < codes.size:
                word |= np.uint64(codes[i])
        byte = first // 8 * bits
        for j in range(min(bits, out.size - byte)):
            out[byte + j] = np.uint8((word >> np.uint64(8 * (bits - 1 - j))) & np.uint64(255))


def pack_numpy(codes: Array, bits: int, out: Array) -> None:
    """Do what ``pack`` does, through one array of single bits."""
    padded = np.zeros(8 * out.size // bits, np.uint8)
    padded[: codes.size] = codes
    out[:] = np.packbits(np.unpackbits(padded[:, None], axis=1)[:, 8 - bits :])


@kernel
def unpack(packed: Array, bits: int, out: Array) -> None:
    """Unpack the first n codes into ``out`` (n,) uint8."""
    for i in range(out.size):
        out[i] = _code_at(packed, bits, i)


def unpack_numpy(packed: Array, bits: int, out: Array) -> None:
    """Do what ``unpack`` does, through one array of single bits."""
    single = np.unpackbits(packed)[: bits * out.size].reshape(-1, bits)
    out[:] = np.packbits(single, axis=1)[:, 0] >> (8 - bits)


@kernel
def _code_at(packed: Array, bits: int, i: int) -> np.uint32:
    """Return code i wherever it lies: a 3-bit code may straddle two bytes."""
    byte, bit = i * bits // 8, i * bits % 8
    word = np.uint32(packed[byte]) << np.uint32(8)
    if bit + bits > 8:
        word |= np.uint32(packed[byte + 1])
    return (word >> np.uint32(16 - bit - bits)) & np.uint32((1 << bits) - 1)


# ---- quantizing


@kernel
def quantize_codebook(w: Array, midpoints: Array, block_size: int, absmax: Array, out: Array) -> None:
    """Write each block's max|w| and each weight's rank among the sorted values: the count of midpoints below
    w/absmax.

    ``w`` (n,) float32, ``midpoints`` (15,) or (255,) ascending float32, +inf where the codebook has fewer,
    ``absmax`` (blocks,) float32, ``out`` (n,) uint8.
    """
    w_bits, absmax_bits = w.view(np.uint32), absmax.view(np.uint32)
    ranks = np.empty(min(block_size, w.size), np.int32)
    for block in range(absmax.size):
        start = block * block_size
        end = min(start + block_size, w.size)
        x, x_bits, rank, codes = w[start:end], w_bits[start:end], ranks[: end - start], out[start:end]
        largest = np.uint32(0)
        for i in range(
            x.size
        ):  # the bits of |x|, read as whole numbers, are ordered as |x| is, and vectorise
            largest = max(largest, x_bits[i] & np.uint32(0x7FFFFFFF))
        absmax_bits[block] = largest
        inverse = np.float32(1) / max(absmax[block], SMALLEST_ABSMAX)
        if (
            midpoints.size == 15
        ):  # a constant, so that LLVM unrolls the loop over j and vectorises the one over i
            for i in range(x.size):
                value = x[i] * inverse
                count = np.int32(0)
                for j in range(15):
                    count += np.int32(value > midpoints[j])
                rank[i] = count
        else:  # binary search of all weights in step: value > midpoints[rank - 1] holds throughout
            for i in range(x.size):
                rank[i] = 0
            step = np.int32((midpoints.size + 1) // 2)
            while step:
                for i in range(x.size):
                    rank[i] += step * np.int32(x[i] * inverse > midpoints[rank[i] + step - np.int32(1)])
                step //= np.int32(2)
        for i in range(x.size):
            codes[i] = rank[i]


def quantize_codebook_numpy(w: Array, midpoints: Array, block_size: int, absmax: Array, out: Array) -> None:
    """Do what ``quantize_codebook`` does."""
    starts = np.arange(0, w.size, block_size)
    absmax[:] = np.maximum.reduceat(np.abs(w), starts)
    inverse = np.float32(1) / np.maximum(absmax, SMALLEST_ABSMAX)
    out[:] = np.searchsorted(midpoints, w * inverse[np.arange(w.size) // block_size], side="left")


@kernel
def quantize_by_table(
    w: Array, midpoints: Array, below: Array, block_size: int, absmax: Array, out: Array
) -> None:
    """Do what ``quantize_codebook`` does with 255 midpoints, by a table instead of a search: four times
    faster.

    ``below`` = ``rank_table(midpoints)`` gives each number's bucket the rank of its lower end; one comparison
    decides the rest.
    """
    w_bits, absmax_bits = w.view(np.uint32), absmax.view(np.uint32)
    inverse = np.empty(
        absmax.size, np.float32
    )  # through memory: else LLVM makes x/absmax of x·(1/absmax), and rounds otherwise
    for block in range(absmax.size):
        largest = np.uint32(0)
        for bits in w_bits[block * block_size : (block + 1) * block_size]:
            largest = max(largest, bits & np.uint32(0x7FFFFFFF))
        absmax_bits[block] = largest
        inverse[block] = np.float32(1) / max(absmax[block], SMALLEST_ABSMAX)
    scaled = np.empty(min(block_size, w.size), np.float32)
    scaled_bits = scaled.view(np.int32)
    half = np.int32(below.size // 2)
    for block in range(absmax.size):
        x, codes = (
            w[block * block_size : (block + 1) * block_size],
            out[block * block_size : (block + 1) * block_size],
        )
        for i in range(x.size):
            scaled[i] = x[i] * inverse[block]
        for i in range(x.size):
            bucket = ((scaled_bits[i] & np.int32(0x7FFFFFFF)) >> np.int32(16)) - np.int32(FIRST_BUCKET)
            bucket = min(max(bucket, np.int32(0)), half - np.int32(1))
            rank = np.int32(below[bucket + half * np.int32(scaled_bits[i] < 0)])
            codes[i] = rank + np.int32(rank < 255 and scaled[i] > midpoints[min(rank, np.int32(254))])


FIRST_BUCKET = int(np.float32(2.0**-24).view(np.int32)) >> 16


def rank_table(midpoints: Array) -> Array:
    """Return how many midpoints lie below all numbers of each bucket: 255 ascending float32 -> (2·buckets,)
    uint8.

    A bucket holds the numbers whose float32 begins with the same 16 bits, sign, exponent and 7 bits of the
    fraction; those closer to 0 than 2^-24 share the first one, those from 1 on the last. Positive ones come
    first. Each must hold at most one midpoint, as with the dynamic maps; raises ``ValueError`` if one holds
    more.
    """
    last = int(np.float32(1).view(np.int32)) >> 16
    edges = (np.arange(FIRST_BUCKET, last + 2, dtype=np.int32) << 16).view(np.float32)
    low, high = edges[:-1].copy(), edges[1:].copy()
    low[0], high[-1] = 0, np.inf
    below = np.concatenate(
        [np.searchsorted(midpoints, low, "left"), np.searchsorted(midpoints, -high, "right")]
    )
    up_to = np.concatenate(
        [np.searchsorted(midpoints, high, "left"), np.searchsorted(midpoints, -low, "left")]
    )
    if (up_to - below).max() > 1:
        raise ValueError(
            "midpoints: two lie so close that one comparison does not tell their sides; use quantize_codebook"
        )
    table = below.astype(np.uint8)
    table.flags.writeable = False
    return table


@kernel
def group_range(w: Array, group_size: int, low: Array, high: Array) -> None:
    """Write the least and the greatest weight of each group: ``w`` (groups·group_size,), ``low`` and ``high``
    (groups,)."""
    for group in range(low.size):
        least = greatest = w[group * group_size]
        for i in range(group * group_size, (group + 1) * group_size):
            least, greatest = min(least, w[i]), max(greatest, w[i])
        low[group], high[group] = least, greatest


def group_range_numpy(w: Array, group_size: int, low: Array, high: Array) -> None:
    """Do what ``group_range`` does."""
    groups = w.reshape(-1, group_size)
    low[:], high[:] = groups.min(axis=1), groups.max(axis=1)


@kernel
def quantize_affine(
    w: Array, scales: Array, offsets: Array, group_size: int, largest: int, out: Array
) -> None:
    """Write code = clip(rint((w - offset) / scale), 0, largest); all floats float32, ``out`` (n,) uint8."""
    top = np.float32(largest)
    for group in range(scales.size):
        scale, offset = scales[group], offsets[group]
        for i in range(group * group_size, (group + 1) * group_size):
            code = np.rint((w[i] - offset) / scale)
            out[i] = np.uint8(min(max(code, np.float32(0)), top))


def quantize_affine_numpy(
    w: Array, scales: Array, offsets: Array, group_size: int, largest: int, out: Array
) -> None:
    """Do what ``quantize_affine`` does."""
    codes = np.rint((w.reshape(-1, group_size) - offsets[:, None]) / scales[:, None])
    out[:] = np.clip(codes, 0, largest).reshape(-1).astype(np.uint8)


# ---- dequantizing and multiplying


def lookup_table(levels: Array, bits: int) -> Array:
    """Return the levels of all codes in one index, which is a byte, (256, 8/bits), or for 3-bit codes 6 bits,
    (64, 2).

    >>> lookup_table(np.arange(16, dtype=np.float32), 4)[0x2F].tolist()
    [2.0, 15.0]
    """
    index_bits = 6 if bits == 3 else 8
    shifts = np.arange(index_bits - bits, -1, -bits)
    table = levels[(np.arange(2**index_bits)[:, None] >> shifts) & (2**bits - 1)]
    table.flags.writeable = False
    return table


@kernel
def _lookup(packed: Array, bits: int, table: Array, start: int, out: Array) -> None:
    """Write the levels of codes start, start + 1, … into ``out``: 8 codes at a time where a byte begins, else
    singly."""
    first = 6 - bits if bits == 3 else 8 - bits  # table[code << first, 0] is the level of a single code
    i = 0
    while i < out.size and (start + i) % 8 != 0:
        out[i] = table[_code_at(packed, bits, start + i) << np.uint32(first), 0]
        i += 1
    p = packed[(start + i) * bits // 8 :]
    whole = out[i : out.size - (out.size - i) % 8]
    i += whole.size
    if bits == 8:
        for j in range(whole.size):
            whole[j] = table[p[j], 0]
    else:
        pairs, o = (
            table.view(np.uint64),
            whole.view(np.uint64),
        )  # two float32 travel as one 8-byte word: 1.2 times faster
        if bits == 4:
            for j in range(o.size):
                o[j] = pairs[p[j], 0]
        elif bits == 2:
            for j in range(o.size // 2):
                o[2 * j], o[2 * j + 1] = pairs[p[j], 0], pairs[p[j], 1]
        else:
            for j in range(o.size // 4):
                word = (
                    np.uint32(p[3 * j]) << np.uint32(16)
                    | np.uint32(p[3 * j + 1]) << np.uint32(8)
                    | np.uint32(p[3 * j + 2])
                )
                for k in range(4):
                    o[4 * j + k] = pairs[(word >> np.uint32(18 - 6 * k)) & np.uint32(63), 0]
    while i < out.size:
        out[i] = table[_code_at(packed, bits, start + i) << np.uint32(first), 0]
        i += 1


@kernel
def _scale(scales: Array, offsets: Array, block_size: int, start: int, first_block: int, out: Array) -> None:
    """Turn levels into weights in place: out·scale + offset, block by block; out[0] is weight ``start`` of
    the tensor."""
    block = start // block_size
    end = (block + 1) * block_size - start
    block -= first_block
    i = 0
    while i < out.size:
        piece = out[i : min(end, out.size)]
        scale = scales[block]
        if offsets.size:
            offset = offsets[block]
            for j in range(piece.size):
                piece[j] = piece[j] * scale + offset
        else:
            for j in range(piece.size):
                piece[j] *= scale
        i = end
        end += block_size
        block += 1


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
    """Write w[start : start + n] of the flattened tensor into ``out`` (n,) float32.

    ``packed`` is the whole tensor's; ``scales`` and ``offsets`` (float32; ``offsets`` empty means 0) begin
    with the block that holds ``start``.
    """
    for i in range(
        0, out.size, 4096
    ):  # 16 KiB: levels are still in the first-level cache when they are scaled
        piece = out[i : i + 4096]
        _lookup(packed, bits, table, start + i, piece)
        _scale(scales, offsets, block_size, start + i, start // block_size, piece)


def dequantize_numpy(
    packed: Array,
    bits: int,
    table: Array,
    scales: Array,
    offsets: Array,
    block_size: int,
    start: int,
    out: Array,
) -> None:
    """Do what ``dequantize`` does."""
    codes = np.empty(start + out.size, np.uint8)
    unpack_numpy(packed, bits, codes)
    levels = table[:: table.shape[0] >> bits, 0]
    block = np.arange(start, start + out.size) // block_size - start // block_size
    out[:] = levels[codes[start:]] * scales[block]
    if offsets.size:
        out += offsets[block]


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
    """Write out[r] = Σ_c w[start + r·in + c]·x[c] for x (in,), ``out`` (rows,), float32; a few rows at a time
    are decoded, into the first-level cache.

    Other arguments as for ``dequantize``.
    """
    at_once = max(1, 2048 // x.size)  # several short rows: a store is slow to be read back at once
    w = np.empty(at_once * x.size, np.float32)
    for first in range(0, out.size, at_once):
        last = min(first + at_once, out.size)
        decoded = w[: (last - first) * x.size]
        _lookup(packed, bits, table, start + first * x.size, decoded)
        _scale(scales, offsets, block_size, start + first * x.size, start // block_size, decoded)
        for r in range(first, last):
            row = decoded[(r - first) * x.size : (r - first + 1) * x.size]
            dot = np.float32(0)
            for c in range(x.size):
                dot += row[c] * x[c]
            out[r] = dot


def matvec_numpy(
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
    """Do what ``matvec`` does, up to float32 rounding (sums in another order)."""
    w = np.empty(out.size * x.size, np.float32)
    dequantize_numpy(packed, bits, table, scales, offsets, block_size, start, w)
    out[:] = w.reshape(out.size, x.size) @ x


@kernel
def half_to_float(half_bits: Array, out: Array) -> None:
    """Write finite float16 numbers, given as their uint16 bits, as float32: several times faster than NumPy's
    cast.

    Exponent and mantissa move to their float32 places; the bias differs by 127 - 15, so a factor 2^112
    completes the number, exactly, subnormal ones included.
    """
    out_bits = out.view(np.uint32)
    for i in range(out.size):
        h = np.uint32(half_bits[i])
        out_bits[i] = (h & np.uint32(0x8000)) << np.uint32(16) | (h & np.uint32(0x7FFF)) << np.uint32(13)
    for i in range(out.size):
        out[i] *= np.float32(2.0**112)


def half_to_float_numpy(half_bits: Array, out: Array) -> None:
    """Do what ``half_to_float`` does."""
    out[:] = half_bits.view(np.float16)
