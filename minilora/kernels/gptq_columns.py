"""GPTQ's inner loop, compiled: round one column after another, and spread each error.

`tests/test_gptq.py` compares it with `minilora.quant.reference.round_columns` and with the elimination of
`tests/naive.py`.
"""

from __future__ import annotations

import numpy as np

from minilora.kernels.codes import SMALLEST_ABSMAX, Array, read_only
from minilora.kernels.jit import kernel


def round_columns(
    w: Array, upper: Array, scale: Array, offset: Array, levels: Array, midpoints: Array
) -> tuple[Array, Array]:
    """Do what `reference.round_columns` does."""
    ranks, errors = np.empty(w.shape, np.uint8), np.empty(w.shape)
    upper, scale, offset, levels, midpoints = (
        read_only(np.ascontiguousarray(a)) for a in (upper, scale, offset, levels, midpoints)
    )
    # divided here: LLVM would turn value·(1/scale) into value/scale, which rounds otherwise
    inverse = read_only(np.float32(1) / np.maximum(scale, SMALLEST_ABSMAX))
    _round_columns(w, upper, scale, inverse, offset, levels, midpoints, ranks, errors)
    return ranks, errors


@kernel
def _round_columns(
    w: Array,
    upper: Array,
    scale: Array,
    inverse: Array,
    offset: Array,
    levels: Array,
    midpoints: Array,
    ranks: Array,
    errors: Array,
) -> None:
    top = np.float32(levels.size - 1)
    for r in range(w.shape[0]):  # a row's errors move nothing but the row
        for i in range(w.shape[1]):
            s, o = scale[r, i], offset[r, i]
            value = np.float32(w[r, i])
            if midpoints.size:
                value *= inverse[r, i]
                rank = 0
                while rank < midpoints.size and value > midpoints[rank]:
                    rank += 1
            else:
                rank = int(min(max(np.rint((value - o) / s), np.float32(0)), top))
            ranks[r, i] = rank
            e = (w[r, i] - np.float64(levels[rank] * s + o)) / upper[i, i]
            errors[r, i] = e
            for j in range(i + 1, w.shape[1]):
                w[r, j] -= e * upper[i, j]
