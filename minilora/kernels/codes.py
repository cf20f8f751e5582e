"""Packed codes, compiled: pack, quantize, dequantize and multiply as `minilora.quant.reference` does.

The public functions have the names, arguments and results of the reference: read that first. Only `matvec`
has none: its reference is a product with the decoded rows. Each makes its inputs read-only, so that Numba
compiles one signature of each kernel, and calls a loop of this file. For 4 bits three of them call
`codes_vectors` instead, where the processor has vectors. Kernels never validate; they take C-contiguous
arrays and write into the last one. Loops stand where a slice assignment would do: compiling one `out[:] =
codes` takes Numba two seconds, for its error messages.

`tests/test_kernels.py` compares each loop, compiled and run by Python, with the reference and with the loops
of `tests/naive.py`: the same bits, and products within the bound of their rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.kernels import codes_vectors
from minilora.kernels.codes_vectors import SMALLEST_ABSMAX
from minilora.kernels.jit import kernel

Array = NDArray[Any]


def read_only(a: Array) -> Array:
    """Return the array, or a read-only view if it is writable: another type to Numba."""
    if a.flags.writeable:
        a = a.view()
        a.flags.writeable = False
    return a


# ---- packing


def pack(codes: Array, bits: int) -> Array:
    """Do what `reference.pack` does."""
    size = -(-codes.size // 8) * 3 if bits == 3 else -(-codes.size * bits // 8)
    out = np.empty(size, np.uint8)
    _pack(read_only(codes), bits, out)
    return out


@kernel
def _pack(codes: Array, bits: int, out: Array) -> None:
    """Pack 8 codes into `bits` bytes at a time; code 0 pads the end."""
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


def unpack(packed: Array, bits: int, count: int, start: int = 0) -> Array:
    """Do what `reference.unpack` does."""
    out = np.empty(count, np.uint8)
    _unpack(read_only(packed), bits, start, out)
    return out


@kernel
def _unpack(packed: Array, bits: int, start: int, out: Array) -> None:
    for i in range(out.size):
        out[i] = _code_at(packed, bits, start + i)


@kernel
def _code_at(packed: Array, bits: int, i: int) -> np.uint32:
    """Return code i wherever it lies: a 3-bit code may straddle two bytes."""
    byte, bit = i * bits // 8, i * bits % 8
    word = np.uint32(packed[byte]) << np.uint32(8)
    if bit + bits > 8:
        word |= np.uint32(packed[byte + 1])
    return (word >> np.uint32(16 - bit - bits)) & np.uint32((1 << bits) - 1)


# ---- quantizing


def quantize_codebook(
    w: Array, midpoints: Array, block_size: int, out: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """Do what `reference.quantize_codebook` does, written to `out` = (ranks, absmax) if that is given.

    Up to 15 midpoints are compared one by one; 255 take a table.
    """
    ranks, absmax = out or (np.empty(w.size, np.uint8), np.empty(-(-w.size // block_size), np.float32))
    w, (midpoints, below) = read_only(w), _search_tables(midpoints.tobytes())
    whole = block_size % 32 == 0 and w.size % block_size == 0
    if below.size:
        _quantize_by_table(w, midpoints, below, block_size, absmax, ranks)
    elif whole and codes_vectors.available():
        codes_vectors.quantize_codebook(w, midpoints, block_size, absmax, ranks)
    else:
        _quantize_by_comparing(w, midpoints, block_size, absmax, ranks)
    return ranks, absmax


@cache
def _search_tables(midpoints: bytes) -> tuple[Array, Array]:
    """Return up to 15 midpoints padded to 15 and nothing, or 255 and their `rank_table`."""
    values = np.frombuffer(midpoints, np.float32)
    if values.size > 15:
        return values, rank_table(values)
    padded = np.full(15, np.inf, np.float32)
    padded[: values.size] = values
    return read_only(padded), read_only(np.empty(0, np.uint8))


@kernel
def _inverse_absmax(w: Array, block_size: int, absmax: Array, inverse: Array) -> None:
    """Write max|w| of each block, and 1/max|w|.

    The reciprocals go through memory: with a single use, LLVM would turn x·(1/absmax) into x/absmax, which
    rounds otherwise.
    """
    w_bits, absmax_bits = w.view(np.uint32), absmax.view(np.uint32)
    for block in range(absmax.size):
        x_bits, largest = w_bits[block * block_size : (block + 1) * block_size], np.uint32(0)
        for i in range(x_bits.size):  # the bits of |x| as whole numbers are ordered as |x| is, and vectorise
            largest = max(largest, x_bits[i] & np.uint32(0x7FFFFFFF))
        absmax_bits[block] = largest
        inverse[block] = np.float32(1) / max(absmax[block], SMALLEST_ABSMAX)


@kernel
def _quantize_by_comparing(w: Array, midpoints: Array, block_size: int, absmax: Array, out: Array) -> None:
    """Count the midpoints below each w·(1/absmax): 15 ascending ones, +inf where the codebook has fewer."""
    at_once = max(1, 8192 // block_size)  # blocks that stay in the first-level cache
    inverse, ranks = np.empty(at_once, np.float32), np.empty(min(block_size, w.size), np.int32)
    for first in range(0, absmax.size, at_once):
        run = absmax[first : first + at_once]
        _inverse_absmax(w[first * block_size : (first + at_once) * block_size], block_size, run, inverse)
        for block in range(run.size):
            start = (first + block) * block_size
            x, codes = w[start : start + block_size], out[start : start + block_size]
            reciprocal = inverse[block]
            for i in range(x.size):
                value = x[i] * reciprocal
                count = np.int32(0)
                for j in range(15):  # a constant, so that LLVM unrolls this loop and vectorises that over i
                    count += np.int32(value > midpoints[j])
                ranks[i] = count
            for i in range(x.size):
                codes[i] = ranks[i]


@kernel
def _quantize_by_table(
    w: Array, midpoints: Array, below: Array, block_size: int, absmax: Array, out: Array
) -> None:
    """Find the rank among 255 midpoints by a table: four times faster than a search.

    `below` = `rank_table(midpoints)` gives each number's bucket the rank of its lower end. One comparison
    decides the rest.
    """
    inverse, scaled = np.empty(absmax.size, np.float32), np.empty(min(block_size, w.size), np.float32)
    _inverse_absmax(w, block_size, absmax, inverse)
    scaled_bits = scaled.view(np.int32)
    half = np.int32(below.size // 2)
    for block in range(absmax.size):
        start, end = block * block_size, (block + 1) * block_size
        x, codes = w[start:end], out[start:end]
        for i in range(x.size):
            scaled[i] = x[i] * inverse[block]
        for i in range(x.size):
            bucket = ((scaled_bits[i] & np.int32(0x7FFFFFFF)) >> np.int32(16)) - np.int32(FIRST_BUCKET)
            bucket = min(max(bucket, np.int32(0)), half - np.int32(1))
            rank = np.int32(below[bucket + half * np.int32(scaled_bits[i] < 0)])
            codes[i] = rank + np.int32(rank < 255 and scaled[i] > midpoints[min(rank, np.int32(254))])


FIRST_BUCKET = int(np.float32(2.0**-24).view(np.int32)) >> 16


def rank_table(midpoints: Array) -> Array:
    """Return how many midpoints lie below all numbers of each bucket: (255,) float32 → (2·buckets,) uint8.

    A bucket holds the numbers whose float32 begins with the same 16 bits: sign, exponent and 7 bits of the
    fraction. Numbers closer to 0 than 2^-24 share the first bucket, those from 1 on the last. Positive
    buckets come first.

    Raises
    ------
    ValueError
        If a bucket holds two midpoints. Those of NF8 and of the dynamic maps lie far enough apart.
    """
    last = int(np.float32(1).view(np.int32)) >> 16
    edges = (np.arange(FIRST_BUCKET, last + 2, dtype=np.int32) << 16).view(np.float32)
    low, high = edges[:-1].copy(), edges[1:].copy()
    low[0], high[-1] = 0, np.inf
    below = [np.searchsorted(midpoints, low, "left"), np.searchsorted(midpoints, -high, "right")]
    up_to = [np.searchsorted(midpoints, high, "left"), np.searchsorted(midpoints, -low, "left")]
    if (np.concatenate(up_to) - np.concatenate(below)).max() > 1:
        raise ValueError(
            "midpoints: two lie so close together that their float32 numbers begin with the same 16 bits; "
            "a table of ranks needs at most one in each bucket"
        )
    return read_only(np.concatenate(below).astype(np.uint8))


def group_range(w: Array, group_size: int) -> tuple[Array, Array]:
    """Do what `reference.group_range` does."""
    low, high = (np.empty(w.size // group_size, np.float32) for _ in range(2))
    _group_range(read_only(w), group_size, low, high)
    return low, high


@kernel
def _group_range(w: Array, group_size: int, low: Array, high: Array) -> None:
    for group in range(low.size):
        least = greatest = w[group * group_size]
        for i in range(group * group_size, (group + 1) * group_size):
            least, greatest = min(least, w[i]), max(greatest, w[i])
        low[group], high[group] = least, greatest


def quantize_affine(w: Array, scales: Array, offsets: Array, bits: int) -> Array:
    """Do what `reference.quantize_affine` does."""
    out = np.empty(w.size, np.uint8)
    _quantize_affine(read_only(w), read_only(scales), read_only(offsets), 2**bits - 1, out)
    return out


@kernel
def _quantize_affine(w: Array, scales: Array, offsets: Array, largest: int, out: Array) -> None:
    top, group_size = np.float32(largest), w.size // scales.size
    for group in range(scales.size):
        scale, offset = scales[group], offsets[group]
        for i in range(group * group_size, (group + 1) * group_size):
            code = np.rint((w[i] - offset) / scale)
            out[i] = np.uint8(min(max(code, np.float32(0)), top))


# ---- dequantizing and multiplying


def in_vectors(bits: int, width: int, block_size: int) -> bool:
    """Return whether vectors decode pieces that begin and end at multiples of `width` weights."""
    return bits == 4 and width % 32 == 0 and block_size % 32 == 0 and codes_vectors.available()


def dequantize(
    packed: Array, levels: Array, scales: Array, offsets: Array, block_size: int, start: int, out: Array
) -> None:
    """Do what `reference.dequantize` does."""
    bits, table = _lookup_table(levels.tobytes())
    vectors = in_vectors(bits, start | out.size, block_size)  # a | b is a multiple of 32 if both are
    decode = codes_vectors.dequantize if vectors else _dequantize
    numbers = _numbers(scales, offsets, vectors)
    decode(read_only(packed), bits, table, *numbers, block_size, start, out)


def matvec(
    packed: Array,
    levels: Array,
    scales: Array,
    offsets: Array,
    block_size: int,
    start: int,
    x: Array,
    out: Array,
) -> None:
    """Multiply rows of W, from weight `start` on, by x (in,) while decoding them: `out` (rows,).

    Other arguments as for `dequantize`; x must be contiguous and writable.
    """
    bits, table = _lookup_table(levels.tobytes())
    vectors = in_vectors(bits, start | x.size, block_size)
    multiply = codes_vectors.matvec if vectors else _matvec
    numbers = _numbers(scales, offsets, vectors)
    multiply(read_only(packed), bits, table, *numbers, block_size, start, x, out)


def _numbers(scales: Array, offsets: Array, vectors: bool) -> tuple[Array, Array]:
    """Return scales and offsets as float32, or where vectors read both in float16, as its bits."""
    if vectors and scales.itemsize == offsets.itemsize == 2:
        return read_only(scales.view(np.uint16)), read_only(offsets.view(np.uint16))
    if scales.itemsize == 2:
        scales = half_to_float(scales)
    if offsets.itemsize == 2:
        offsets = half_to_float(offsets)
    return read_only(scales), read_only(offsets)


@cache
def _lookup_table(levels: bytes) -> tuple[int, Array]:
    """Return the bits of a code, and the levels of all codes in one index: a byte, or for 3-bit codes 6 bits.

    The table is (256, 8/bits) float32, for 3 bits (64, 2).
    """
    values = np.frombuffer(levels, np.float32)
    bits = values.size.bit_length() - 1
    index_bits = 6 if bits == 3 else 8
    shifts = np.arange(index_bits - bits, -1, -bits)
    return bits, read_only(values[(np.arange(2**index_bits)[:, None] >> shifts) & (2**bits - 1)])


@kernel
def _lookup(packed: Array, bits: int, table: Array, start: int, out: Array) -> None:
    """Write the levels of codes start, start + 1, …: 8 codes at a time where a byte begins, else singly."""
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
        # two float32 travel as one 8-byte word: 1.2 times faster
        pairs, o = table.view(np.uint64), whole.view(np.uint64)
        if bits == 4:
            for j in range(o.size):
                o[j] = pairs[p[j], 0]
        elif bits == 2:
            for j in range(o.size // 2):
                o[2 * j], o[2 * j + 1] = pairs[p[j], 0], pairs[p[j], 1]
        else:
            for j in range(o.size // 4):
                high, middle, low = np.uint32(p[3 * j]), np.uint32(p[3 * j + 1]), np.uint32(p[3 * j + 2])
                word = high << np.uint32(16) | middle << np.uint32(8) | low
                for k in range(4):
                    o[4 * j + k] = pairs[(word >> np.uint32(18 - 6 * k)) & np.uint32(63), 0]
    while i < out.size:
        out[i] = table[_code_at(packed, bits, start + i) << np.uint32(first), 0]
        i += 1


@kernel
def _scale(scales: Array, offsets: Array, block_size: int, start: int, first_block: int, out: Array) -> None:
    """Turn levels into weights in place, block by block; out[0] is weight `start` of the tensor."""
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
def _dequantize(
    packed: Array,
    bits: int,
    table: Array,
    scales: Array,
    offsets: Array,
    block_size: int,
    start: int,
    out: Array,
) -> None:
    for i in range(0, out.size, 4096):  # 16 KiB: levels are scaled while they are in the first-level cache
        piece = out[i : i + 4096]
        _lookup(packed, bits, table, start + i, piece)
        _scale(scales, offsets, block_size, start + i, start // block_size, piece)


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
    """Decode a few rows at a time into the first-level cache, and multiply each by x."""
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


def half_to_float(half: Array) -> Array:
    """Do what `reference.half_to_float` does for finite numbers, several times faster than NumPy's cast."""
    out = np.empty(half.size, np.float32)
    _half_to_float(read_only(half.view(np.uint16)), out)
    return out


@kernel
def _half_to_float(half_bits: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = half_number(np.uint32(half_bits[i]))


@kernel
def half_number(h: np.uint32) -> Any:
    """Return a finite float16, given as its bits, as float32.

    Exponent and mantissa move to their float32 places. The bias differs by 127 - 15, so a factor 2^112
    completes the number: exactly, also if it is subnormal.
    """
    moved = (h & np.uint32(0x8000)) << np.uint32(16) | (h & np.uint32(0x7FFF)) << np.uint32(13)
    return np.uint32(moved).view(np.float32) * np.float32(2.0**112)
