"""GPTQ's inner loop: round one column after another and spread each error; beside the kernel its readable NumPy version."""

from __future__ import annotations

import numpy as np

from minilora.kernels.codes import SMALLEST_ABSMAX, Array
from minilora.kernels.jit import kernel


@kernel
def round_columns(
    w: Array,
    upper: Array,
    groups: Array,
    scale: Array,
    offset: Array,
    midpoints: Array,
    levels: Array,
    top: int,
    codes: Array,
    errors: Array,
) -> None:
    """Round w (out, n) float64 column by column, spreading each error over the columns to its right; w is used up.

    ``upper`` (n, n) float64 · ``groups`` (n,) int64, each column's · ``scale`` and ``offset`` (out, groups) float32 · ``levels``
    (2^k,) ascending float32 with their ``midpoints``, both empty for affine codes, 0 to ``top`` · ``codes`` (out, n) uint8 ranks
    and ``errors`` (out, n) float64 are written.
    """
    for r in range(w.shape[0]):  # a row's errors move nothing but the row
        for i in range(w.shape[1]):
            s, o = scale[r, groups[i]], offset[r, groups[i]]
            value = np.float32(w[r, i])
            if levels.size == 0:
                code = min(max(np.rint((value - o) / s), np.float32(0)), np.float32(top))
                rounded = code * s + o
                codes[r, i] = np.uint8(code)
            else:
                value *= np.float32(1) / max(s, SMALLEST_ABSMAX)
                rank = 0
                while rank < midpoints.size and value > midpoints[rank]:
                    rank += 1
                rounded = levels[rank] * s
                codes[r, i] = np.uint8(rank)
            e = (w[r, i] - np.float64(rounded)) / upper[i, i]
            errors[r, i] = e
            for j in range(i + 1, w.shape[1]):
                w[r, j] -= e * upper[i, j]


def round_columns_numpy(
    w: Array,
    upper: Array,
    groups: Array,
    scale: Array,
    offset: Array,
    midpoints: Array,
    levels: Array,
    top: int,
    codes: Array,
    errors: Array,
) -> None:
    """Do what ``round_columns`` does, a whole column at a time."""
    for i in range(w.shape[1]):
        s, o, value = scale[:, groups[i]], offset[:, groups[i]], w[:, i].astype(np.float32)
        if levels.size == 0:
            codes[:, i] = np.clip(np.rint((value - o) / s), 0, top)
            rounded = codes[:, i] * s + o
        else:
            codes[:, i] = np.searchsorted(
                midpoints, value * (np.float32(1) / np.maximum(s, SMALLEST_ABSMAX)), side="left"
            )
            rounded = levels[codes[:, i]] * s
        errors[:, i] = (w[:, i] - rounded) / upper[i, i]
        w[:, i + 1 :] -= errors[:, i, None] * upper[i, i + 1 :]
