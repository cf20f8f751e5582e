"""GGUF's blocks, decoded and multiplied in plain loops; beside each kernel its readable NumPy version.

Formats: see ``minilora.quant.blocks``. Kernels take the raw bytes of all blocks, (blocks·size,) uint8, of which one has ``size``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.codes import Array
from minilora.kernels.jit import kernel

BLOCK = 32
HALF = np.dtype("<f2")


@kernel
def _half(low: int, high: int) -> Any:
    """Return a finite float16, given as its two bytes, as float32: ``kernels.half_to_float`` for one number."""
    h = np.uint32(low) | np.uint32(high) << np.uint32(8)
    moved = (h & np.uint32(0x8000)) << np.uint32(16) | (h & np.uint32(0x7FFF)) << np.uint32(13)
    return np.uint32(moved).view(np.float32) * np.float32(2.0**112)


@kernel
def dequantize_blocks(blocks: Array, size: int, first: int, out: Array) -> None:
    """Write the weights of blocks first, first + 1, … into ``out`` (32·n,) float32."""
    at = first * size
    if size == 18:  # Q4_0
        for i in range(0, out.size, 32):
            q, w = blocks[at + 2 : at + 18], out[i : i + 32]
            d = _half(blocks[at], blocks[at + 1])
            for j in range(16):
                w[j] = d * np.float32(np.int32(q[j] & np.uint8(15)) - np.int32(8))
                w[16 + j] = d * np.float32(np.int32(q[j] >> np.uint8(4)) - np.int32(8))
            at += size
    elif size == 20:  # Q4_1
        for i in range(0, out.size, 32):
            q, w = blocks[at + 4 : at + 20], out[i : i + 32]
            d, m = _half(blocks[at], blocks[at + 1]), _half(blocks[at + 2], blocks[at + 3])
            for j in range(16):
                w[j] = d * np.float32(q[j] & np.uint8(15)) + m
                w[16 + j] = d * np.float32(q[j] >> np.uint8(4)) + m
            at += size
    else:  # Q8_0
        signed = blocks.view(np.int8)
        for i in range(0, out.size, 32):
            s, w = signed[at + 2 : at + 34], out[i : i + 32]
            d = _half(blocks[at], blocks[at + 1])
            for j in range(32):
                w[j] = d * np.float32(s[j])
            at += size


def dequantize_blocks_numpy(blocks: Array, size: int, first: int, out: Array) -> None:
    """Do what ``dequantize_blocks`` does."""
    b = blocks.reshape(-1, size)[first : first + out.size // 32]
    d = b[:, :2].view(HALF).astype(np.float32)
    if size == 34:
        w = d * b[:, 2:].view(np.int8)
    elif size == 18:
        w = d * (np.concatenate([b[:, 2:] & 15, b[:, 2:] >> 4], axis=1).astype(np.float32) - 8)
    else:
        w = d * np.concatenate([b[:, 4:] & 15, b[:, 4:] >> 4], axis=1) + b[:, 2:4].view(HALF).astype(
            np.float32
        )
    out[:] = w.reshape(-1)


@kernel
def multiply_blocks(blocks: Array, size: int, x: Array, first: int, last: int, out: Array) -> None:
    """Write out[i, r] = Σ_c W[r, c]·x[i, c] for rows r = first … last - 1 of W; x (B, in), ``out`` (B, out), float32.

    A few rows at a time are decoded into the first-level cache, as by ``kernels.matvec``.
    """
    width = x.shape[1]
    at_once = max(1, 2048 // width)  # several short rows: a store is slow to be read back at once
    w = np.empty(at_once * width, np.float32)
    for top in range(first, last, at_once):
        end = min(top + at_once, last)
        dequantize_blocks(blocks, size, top * (width // 32), w[: (end - top) * width])
        for r in range(top, end):
            row = w[(r - top) * width : (r - top + 1) * width]
            for i in range(len(x)):
                dot = np.float32(0)
                for c in range(width):
                    dot += row[c] * x[i, c]
                out[i, r] = dot


def multiply_blocks_numpy(blocks: Array, size: int, x: Array, first: int, last: int, out: Array) -> None:
    """Do what ``multiply_blocks`` does, up to float32 rounding (sums in another order)."""
    w = np.empty((last - first, x.shape[1]), np.float32)
    dequantize_blocks_numpy(blocks, size, first * x.shape[1] // BLOCK, w.reshape(-1))
    out[:, first:last] = x @ w.T
