"""Quantization in plain NumPy: the mathematics of quantized weights, and what runs in plain mode.

NF4 with double quantization (QLoRA), from 32-bit weights to bytes and back:

>>> from minilora.quant.codebooks import code_map, dynamic_map, thresholds
>>> NF4, DYNAMIC, none = code_map("nf4"), dynamic_map(), np.empty(0, np.float32)
>>> w = np.random.default_rng(0).standard_normal(64 * 300).astype(np.float32)
>>> codes, absmax = quantize_codebook(w, thresholds(NF4)[0], 64)  # NF4's codes are ranks
>>> packed = pack(codes, 4)
>>> mean = absmax.mean()  # double quantization: the scales, around their mean, in 8 bits
>>> codes2, absmax2 = quantize_codebook(absmax - mean, thresholds(DYNAMIC)[0], 256)
>>> scales, decoded = np.empty(300, np.float32), np.empty(w.size, np.float32)
>>> dequantize(codes2, DYNAMIC, absmax2, none, 256, 0, scales)
>>> dequantize(packed, NF4, scales + mean, none, 64, 0, decoded)
>>> packed.nbytes + codes2.nbytes + absmax2.nbytes + 4, bool(np.abs(decoded - w).mean() < 0.075)
(9912, True)

`minilora.kernels` has the same functions compiled, in `codes`, `block_codes` and `gptq_columns`, for the same
bits. `minilora.quant.switch` chooses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SMALLEST_ABSMAX = np.float32(1e-38)  # divides a block of zeros


# ---- codes with a scale for each block: from weights to bytes and back


def quantize_codebook(w: Array, midpoints: Array, block_size: int) -> tuple[Array, Array]:
    """Divide each block by its max|w|, and find the rank of each weight among the values of a code map.

    rank (position among the sorted values) = number of midpoints below w·(1/absmax), so a tie takes the lower
    value. The reciprocal is part of the format: w/absmax would round otherwise. (QLoRA, arXiv 2305.14314,
    section 3; block-wise quantization: 8-bit optimizers, arXiv 2110.02861, section 2.)

    Parameters
    ----------
    w : Array
        (n,) float32, the flattened tensor. Its last block may be short.
    midpoints : Array
        (2^k - 1,) float32, ascending, what `codebooks.thresholds` returns.

    Returns
    -------
    ranks, absmax : Array
        (n,) uint8, and (⌈n/block_size⌉,) float32.
    """
    absmax = np.maximum.reduceat(np.abs(w), np.arange(0, w.size, block_size))
    inverse = np.float32(1) / np.maximum(absmax, SMALLEST_ABSMAX)
    scaled = w * np.repeat(inverse, block_size)[: w.size]
    return np.searchsorted(midpoints, scaled, side="left").astype(np.uint8), absmax


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes `count` codes take: whole bytes, and for 3 bits whole units of 3 bytes.

    >>> packed_size(9, 3), packed_size(9, 4)
    (6, 5)
    """
    return -(-count // 8) * 3 if bits == 3 else -(-count * bits // 8)


def pack(codes: Array, bits: int) -> Array:
    """Pack codes (n,) uint8 of 2, 3, 4 or 8 bits: the first in a byte's highest bits, as bitsandbytes does.

    >>> [format(byte, "08b") for byte in pack(np.array([1, 2, 3], np.uint8), 4)]
    ['00010010', '00110000']
    """
    size = packed_size(codes.size, bits)
    padded = np.zeros(8 * size // bits, np.uint8)
    padded[: codes.size] = codes
    return np.packbits(np.unpackbits(padded[:, None], axis=1)[:, 8 - bits :])


def unpack(packed: Array, bits: int, count: int, start: int = 0) -> Array:
    """Return `count` codes, a byte each, from code `start` on: uint8 (count,)."""
    first, last = start * bits, (start + count) * bits
    digits = np.unpackbits(packed[first // 8 : -(-last // 8)])[first % 8 :][: last - first]
    return np.packbits(digits.reshape(count, bits), axis=1)[:, 0] >> (8 - bits)


def dequantize(
    packed: Array, levels: Array, scales: Array, offsets: Array, block_size: int, start: int, out: Array
) -> None:
    """Decode a piece of the flattened tensor: w[i] = levels[code[i]]·scale[block] + offset[block].

    Parameters
    ----------
    packed : Array
        All codes of the tensor, uint8.
    levels : Array
        (2^bits,) float32: a code map, or 0, 1, 2, … for affine groups.
    scales, offsets : Array
        float16 or float32, one for each block, from the block of weight `start` on. Empty offsets are 0.
    start, out : int, Array
        First weight to decode, and (n,) float32 to write n weights to.
    """
    i = np.arange(start, start + out.size)
    block = i // block_size - start // block_size
    codes = unpack(packed, levels.size.bit_length() - 1, out.size, start)
    out[:] = levels[codes] * scales[block].astype(np.float32)
    if offsets.size:
        out += offsets[block].astype(np.float32)


# ---- affine groups: w = scale·q + offset


def group_range(w: Array, group_size: int) -> tuple[Array, Array]:
    """Return the least and the greatest weight of each group: w (groups·group_size,) → two of (groups,)."""
    groups = w.reshape(-1, group_size)
    return groups.min(axis=1), groups.max(axis=1)


def quantize_affine(w: Array, scales: Array, offsets: Array, bits: int) -> Array:
    """Return q = clip(rint((w - offset)/scale), 0, 2^bits - 1), uint8 (n,); a half rounds to even.

    `scales` and `offsets` (groups,) are float32 numbers that are rounded already to what is stored
    (`quant.fits`), so q is the nearest code for the numbers that decode it.
    """
    codes = np.rint((w.reshape(scales.size, -1) - offsets[:, None]) / scales[:, None])
    return np.clip(codes, 0, 2**bits - 1).reshape(-1).astype(np.uint8)


def half_to_float(half: Array) -> Array:
    """Return float16 numbers (n,) as float32."""
    return half.astype(np.float32)


# ---- GGUF's blocks of 32 weights (`quant.blocks`): 18 bytes are Q4_0, 20 are Q4_1, 34 are Q8_0


def dequantize_blocks(blocks: Array, out: Array) -> None:
    """Decode blocks (n, bytes) uint8 into `out` (32·n,) float32: w = d·q + m, float16 d and m come first."""
    d = blocks[:, :2].view("<f2").astype(np.float32)
    header = 4 if blocks.shape[1] == 20 else 2
    if blocks.shape[1] == 34:
        w = d * blocks[:, header:].view(np.int8)
    else:
        q = np.concatenate([blocks[:, header:] & 15, blocks[:, header:] >> 4], axis=1).astype(np.float32)
        w = d * (q - 8) if header == 2 else d * q + blocks[:, 2:4].view("<f2").astype(np.float32)
    out[:] = w.reshape(-1)


# ---- GPTQ


def round_columns(
    w: Array, upper: Array, scale: Array, offset: Array, levels: Array, midpoints: Array
) -> tuple[Array, Array]:
    """Round one column after another, and let the columns to the right make up for each error.

    e = (w[:, i] - ŵ[:, i])/U[i, i], then w[:, j] -= e·U[i, j] for all j > i (arXiv 2210.17323, Algorithm 1).

    Parameters
    ----------
    w, upper : Array
        (out, n) float64, used up; and (n, n), the upper Cholesky factor U of the inverse Hessian.
    scale, offset : Array
        (out, n) float32, those of each weight.
    levels, midpoints : Array
        Sorted values of a code map and their midpoints; for affine codes 0, 1, 2, … and an empty array.

    Returns
    -------
    ranks, errors : Array
        (out, n) uint8 and float64.
    """
    ranks, errors = np.empty(w.shape, np.uint8), np.empty(w.shape)
    for i in range(w.shape[1]):
        s, value = scale[:, i], w[:, i].astype(np.float32)
        if midpoints.size:
            value *= np.float32(1) / np.maximum(s, SMALLEST_ABSMAX)
            ranks[:, i] = np.searchsorted(midpoints, value, side="left")
        else:
            ranks[:, i] = np.clip(np.rint((value - offset[:, i]) / s), 0, levels.size - 1)
        rounded = levels[ranks[:, i]] * s + offset[:, i]
        errors[:, i] = (w[:, i] - rounded) / upper[i, i]
        w[:, i + 1 :] -= errors[:, i, None] * upper[i, i + 1 :]
    return ranks, errors
