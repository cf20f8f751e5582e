"""GGUF's blocks, compiled: decode as `minilora.quant.reference` does, and multiply meanwhile.

The public functions choose the vectors of `block_vectors`, where the processor has them, or the loops here.
Formats: see `minilora.quant.blocks`. Kernels take the bytes of all blocks in a row, and the bytes of one of
them, which tell the type. `tests/test_blocks.py` compares loops and vectors with the reference and with
struct.unpack.
"""

from __future__ import annotations

import numpy as np

from minilora.kernels import block_vectors
from minilora.kernels.codes import Array, half_number, read_only
from minilora.kernels.jit import kernel


def few_rows() -> int:
    """Return up to how many rows `multiply_blocks` is faster than BLAS on decoded tiles."""
    return 16 if block_vectors.available() else 1


def dequantize_blocks(blocks: Array, out: Array) -> None:
    """Do what `reference.dequantize_blocks` does."""
    decode = block_vectors.dequantize_blocks if block_vectors.available() else _dequantize_blocks
    decode(read_only(blocks.reshape(-1)), blocks.shape[1], 0, out)


def multiply_blocks(blocks: Array, x: Array) -> Array:
    """Return x Wᵀ (B, out), decoding W on the way: blocks (n, bytes) row by row, x (B, in).

    x must be contiguous and writable.
    """
    out = np.empty((len(x), 32 * len(blocks) // x.shape[1]), np.float32)
    multiply = block_vectors.multiply_blocks if block_vectors.available() else _multiply_blocks
    multiply(read_only(blocks.reshape(-1)), blocks.shape[1], x, 0, out.shape[1], out)
    return out


@kernel
def _half(low: int, high: int) -> np.float32:
    """Return a finite float16, given as its two bytes, as float32."""
    return half_number(np.uint32(low) | np.uint32(high) << np.uint32(8))


@kernel
def _dequantize_blocks(blocks: Array, size: int, first: int, out: Array) -> None:
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


@kernel
def _multiply_blocks(blocks: Array, size: int, x: Array, first: int, last: int, out: Array) -> None:
    """Decode a few rows at a time into the first-level cache, and multiply each by all rows of x."""
    width = x.shape[1]
    at_once = max(1, 2048 // width)  # several short rows: a store is slow to be read back at once
    w = np.empty(at_once * width, np.float32)
    for top in range(first, last, at_once):
        end = min(top + at_once, last)
        _dequantize_blocks(blocks, size, top * (width // 32), w[: (end - top) * width])
        for r in range(top, end):
            row = w[(r - top) * width : (r - top + 1) * width]
            for i in range(len(x)):
                dot = np.float32(0)
                for c in range(width):
                    dot += row[c] * x[i, c]
                out[i, r] = dot
