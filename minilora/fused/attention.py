"""Causal attention head by head: scores exist for QUERIES rows at a time, and only up to the diagonal.

    forward    S = q kᵀ / √D,  P = softmax(S) with lse = log Σ exp S kept,  y = P v
    backward   P = exp(S − lse) again;  dv = Pᵀ dy,  dP = dy vᵀ,  dS = P (dP − Σ P dP) / √D,  dq = dS k,  dk = dSᵀ q

as in FlashAttention (arXiv 2205.14135), but with whole rows of scores, which the cache holds. All arrays are flat float32: q, y
and their gradients (B, T, H, D), k and v (B, T, K, D), lse (B, H, T); ``segments`` (B·T,) or empty.
"""

from __future__ import annotations

import numpy as np

from minilora.fused.products import pack_panel, times_panel
from minilora.fused.rows import ONE, exp, largest
from minilora.fused.vectors import COLUMNS, LANES, ROWS
from minilora.jit import kernel

Array = np.ndarray

QUERIES = 64
NO_SEGMENTS = np.empty(0, np.int64)


def sizes(T: int, D: int) -> tuple[int, int, int]:
    """Columns of a panel of values; the size of a panel of keys or values; numbers from one row of scores to the next."""
    width = LANES if D <= LANES else 2 * LANES if D <= 2 * LANES else COLUMNS
    whole = -(-T // COLUMNS) * COLUMNS
    return width, whole * -(-D // width) * width, whole + 16  # not a power of two, whose rows would share a place in the cache


def scratch_size(T: int, D: int, panels: int, blocks: int) -> int:
    """What a kernel needs: panels, and blocks of scores."""
    _, size, stride = sizes(T, D)
    return ROWS * COLUMNS + panels * size + blocks * min(QUERIES, T) * stride


@kernel
def pack_keys(x: Array, b: int, head: int, T: int, K: int, D: int, panels: Array) -> None:
    """The transposed keys of a head as panels of COLUMNS keys, D deep: what a query is multiplied by."""
    for j in range(0, T, COLUMNS):
        at = ((b * T + j) * K + head) * D
        pack_panel(x, at, 1, K * D, D, min(COLUMNS, T - j), panels, j * D, COLUMNS)


@kernel
def pack_values(x: Array, b: int, head: int, T: int, K: int, D: int, width: int, panel: Array) -> None:
    """The values of a head as panels of up to COLUMNS features, T deep: what a row of probabilities is multiplied by."""
    for j in range(0, D, COLUMNS):
        pack_panel(x, (b * T * K + head) * D + j, K * D, 1, T, min(COLUMNS, D - j), panel, j * T, width)


@kernel
def scores(
    q: Array, at: int, row: int, m: int, keys: Array, D: int, seen: int, none: Array, edge: Array, out: Array, stride: int
) -> None:
    """out[i, j] = q_i · k_j for m queries and the first ``seen`` keys."""
    for j in range(0, seen, COLUMNS):
        n = min(COLUMNS, seen - j)
        times_panel(q, at, row, 1, D, none, 0, 0, keys, j * D, COLUMNS, COLUMNS, edge, out, j, stride, m, n, False)


@kernel
def times_values(
    p: Array, stride: int, m: int, seen: int, values: Array, T: int, D: int, width: int, none: Array, edge: Array, y: Array,
    at: int, row: int,
) -> None:  # fmt: skip
    """y[i] = Σ_j p[i, j] v_j over the first ``seen`` values."""
    for j in range(0, D, COLUMNS):
        n = min(COLUMNS, D - j)
        times_panel(p, 0, stride, 1, seen, none, 0, 0, values, j * T, width, width, edge, y, at + j, row, m, n, False)


@kernel
def add_keys(
    p: Array, stride: int, m: int, seen: int, x: Array, at: int, row: int, D: int, width: int, panel: Array, none: Array,
    edge: Array, out: Array, out_at: int, out_row: int,
) -> None:  # fmt: skip
    """out_j += Σ_i p[i, j] x_i for the first ``seen`` keys: the queries, and heads, that look at a key add up."""
    for j in range(0, D, COLUMNS):
        n = min(COLUMNS, D - j)
        pack_panel(x, at + j, row, 1, m, n, panel, 0, width)
        times_panel(p, 0, 1, stride, m, none, 0, 0, panel, 0, width, width, edge, out, out_at + j, out_row, seen, n, True)


@kernel
def mask(segments: Array, b: int, T: int, i: int, row: Array) -> None:
    """−∞ where query i may not look: at later keys, and at those of another segment."""
    for j in range(i + 1, row.size):
        row[j] = -np.inf
    for j in range(min(i, segments.size)):
        if segments[b * T + j] != segments[b * T + i]:
            row[j] = -np.inf


@kernel
def attention_forward(
    q: Array, k: Array, v: Array, segments: Array, B: int, T: int, H: int, K: int, D: int, width: int, size: int, stride: int,
    scratch: Array, y: Array, lse: Array,
) -> None:  # fmt: skip
    """Write y and lse; ``scratch`` holds two panels and a block of scores."""
    edge, none, room = scratch[: ROWS * COLUMNS], scratch[:0], scratch[ROWS * COLUMNS :]
    keys, values, p = room[:size], room[size : 2 * size], room[2 * size :]
    scale = ONE / np.sqrt(np.float32(D))
    for b in range(B):
        for group in range(K):
            pack_keys(k, b, group, T, K, D, keys)
            pack_values(v, b, group, T, K, D, width, values)
            for h in range(group * (H // K), (group + 1) * (H // K)):
                for first in range(0, T, QUERIES):
                    m = min(QUERIES, T - first)
                    seen = first + m
                    at = ((b * T + first) * H + h) * D
                    scores(q, at, H * D, m, keys, D, seen, none, edge, p, stride)
                    for i in range(m):
                        row = p[i * stride : i * stride + seen]
                        mask(segments, b, T, first + i, row)
                        top, total = largest(row), np.float32(0)
                        for j in range(seen):
                            row[j] = exp((row[j] - top) * scale)
                            total += row[j]
                        inverse = ONE / total
                        for j in range(seen):
                            row[j] *= inverse
                        lse[(b * H + h) * T + first + i] = top * scale + np.log(total)
                    times_values(p, stride, m, seen, values, T, D, width, none, edge, y, at, H * D)


@kernel
def attention_backward(
    dy: Array, q: Array, k: Array, v: Array, lse: Array, segments: Array, B: int, T: int, H: int, K: int, D: int, width: int,
    size: int, stride: int, scratch: Array, dq: Array, dk: Array, dv: Array,
) -> None:  # fmt: skip
    """Write dq, dk and dv; ``scratch`` holds four panels and two blocks of scores."""
    edge, none, room = scratch[: ROWS * COLUMNS], scratch[:0], scratch[ROWS * COLUMNS :]
    keys_t, values_t, keys, few = room[:size], room[size : 2 * size], room[2 * size : 3 * size], room[3 * size : 4 * size]
    p, dp = room[4 * size : 4 * size + min(QUERIES, T) * stride], room[4 * size + min(QUERIES, T) * stride :]
    scale = ONE / np.sqrt(np.float32(D))
    for i in range(dk.size):
        dk[i] = dv[i] = 0
    for b in range(B):
        for group in range(K):
            pack_keys(k, b, group, T, K, D, keys_t)
            pack_keys(v, b, group, T, K, D, values_t)
            pack_values(k, b, group, T, K, D, width, keys)
            key_at = (b * T * K + group) * D
            for h in range(group * (H // K), (group + 1) * (H // K)):
                for first in range(0, T, QUERIES):
                    m = min(QUERIES, T - first)
                    seen = first + m
                    at = ((b * T + first) * H + h) * D
                    scores(q, at, H * D, m, keys_t, D, seen, none, edge, p, stride)
                    scores(dy, at, H * D, m, values_t, D, seen, none, edge, dp, stride)
                    for i in range(m):
                        row, drow = p[i * stride : i * stride + seen], dp[i * stride : i * stride + seen]
                        mask(segments, b, T, first + i, row)
                        known, pull = lse[(b * H + h) * T + first + i], np.float32(0)
                        for j in range(seen):
                            row[j] = exp(row[j] * scale - known)
                            pull += row[j] * drow[j]
                        for j in range(seen):
                            drow[j] = row[j] * (drow[j] - pull) * scale
                    times_values(dp, stride, m, seen, keys, T, D, width, none, edge, dq, at, H * D)
                    add_keys(p, stride, m, seen, dy, at, H * D, D, width, few, none, edge, dv, key_at, K * D)
                    add_keys(dp, stride, m, seen, q, at, H * D, D, width, few, none, edge, dk, key_at, K * D)
