"""Compile the kernels of quantized weights ahead of time."""

from __future__ import annotations

import time

import numpy as np

from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.weights import CodebookWeight


def compile_kernels() -> float:
    """Compile every kernel that Numba's cache on disk does not hold yet, and return the seconds it took.

    With a full cache it takes about 0.2 s. Call it before worker processes start: otherwise each of them
    compiles the same kernels.
    """
    start = time.perf_counter()
    for width in (8, 64):  # the loops, and, where the processor has them, the vectors
        w = np.eye(2, width, dtype=np.float32)
        for weight in (CodebookWeight.quantize(w), AffineWeight.quantize(w, group_size=width)):
            weight.matmul(w[:1])  # matvec
            weight.rows(np.arange(2))  # dequantize
            weight.unpacked()
    blocks = BlockWeight.quantize(np.eye(2, 32, dtype=np.float32), "Q4_1")  # its kernels hold all types
    blocks.matmul(blocks.dense())
    return time.perf_counter() - start
