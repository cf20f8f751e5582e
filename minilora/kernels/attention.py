"""Causal attention head by head: scores exist for QUERIES rows at a time, and only up to the diagonal.

    forward    S = q kᵀ / √D,  P = exp(S − top) / total,  y = P v;  kept: top = max S, total = Σ exp(S − top)
    backward   P again;  dv = Pᵀ dy,  dP = dy vᵀ,  dS = P (dP − Σ P dP) / √D,  dq = dS k,  dk = dSᵀ q

as in FlashAttention (arXiv 2205.14135), but with whole rows of scores, which fit into the cache. All arrays
are flat float32: q, y and their gradients (B, T, H, D), k and v (B, T, K, D), tops and totals (B, H, T).
`segments` is (B·T,) int64 or empty. `scratch` holds an edge (see `multiply_panel`), panels of keys and
values, and blocks of scores. tests/test_compiled_math.py compares with `functional` in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.gemm import EDGE, aligned, multiply_panel, pack_panel
from minilora.kernels.intrinsics import read_only
from minilora.kernels.jit import kernel
from minilora.kernels.microkernel import LANES, MR_NARROW, NR_NARROW
from minilora.kernels.rows import ONE, exp, largest

Array = np.ndarray

QUERIES = 64
NO_SEGMENTS = np.empty(0, np.int64)


def sizes(T: int, D: int) -> tuple[int, int]:
    """Return the size of a head's panels, and the numbers from one row of scores to the next."""
    whole = -(-T // NR_NARROW) * NR_NARROW
    stride = whole + 16  # not a power of two, whose rows would share a place in the cache
    return whole * -(-D // NR_NARROW) * NR_NARROW, stride


def scratch_size(T: int, D: int, panels: int, blocks: int) -> int:
    """Return the numbers that a kernel needs for an edge, panels and blocks of scores."""
    size, stride = sizes(T, D)
    return EDGE + LANES - 1 + panels * size + blocks * min(QUERIES, T) * stride


@kernel
def pack_keys(x: Array, b: int, head: int, T: int, K: int, D: int, scratch: Array, place: int) -> None:
    """Pack the transposed keys of a head into panels of NR_NARROW keys, D deep."""
    for j in range(0, T, NR_NARROW):
        at = ((b * T + j) * K + head) * D
        pack_panel(x, at, 1, K * D, D, min(NR_NARROW, T - j), scratch, place + j * D, NR_NARROW)


@kernel
def pack_values(x: Array, at: int, row: int, m: int, D: int, scratch: Array, place: int) -> None:
    """Pack m rows of D numbers into panels of NR_NARROW columns, m deep."""
    for j in range(0, D, NR_NARROW):
        pack_panel(x, at + j, row, 1, m, min(NR_NARROW, D - j), scratch, place + j * m, NR_NARROW)


@kernel
def multiply_narrow(
    a: Array,
    at: int,
    row: int,
    step: int,
    k: int,
    panel_at: int,
    scratch: Array,
    c: Array,
    c_at: int,
    c_row: int,
    m: int,
    n: int,
    add: bool,
) -> None:
    """Do what `multiply_panel` does for a panel of NR_NARROW columns in scratch."""
    panels = read_only(scratch)
    multiply_panel(
        a,
        at,
        row,
        step,
        k,
        a,
        at,
        0,
        panels,
        panel_at,
        NR_NARROW,
        NR_NARROW,
        scratch,
        c,
        c_at,
        c_row,
        m,
        n,
        add,
    )


@kernel
def times_keys(
    q: Array,
    at: int,
    row: int,
    m: int,
    D: int,
    first: int,
    keys: int,
    scratch: Array,
    place: int,
    stride: int,
) -> None:
    """Write scores[i, j] = q_i · k_j of m queries from `first` on, for keys up to theirs, in whole tiles."""
    for j in range(0, first + m, NR_NARROW):
        above = max(0, j - first) // MR_NARROW * MR_NARROW  # queries before key j
        to, columns = place + above * stride + j, min(NR_NARROW, first + m - j)
        multiply_narrow(
            q,
            at + above * row,
            row,
            1,
            D,
            keys + j * D,
            scratch,
            scratch,
            to,
            stride,
            m - above,
            columns,
            False,
        )


@kernel
def times_values(
    p: int,
    stride: int,
    m: int,
    first: int,
    values: int,
    deep: int,
    D: int,
    scratch: Array,
    y: Array,
    at: int,
    row: int,
) -> None:
    """Write y_i = Σ_j P[i, j] v_j for m queries from `first` on: P is at scratch[p], `deep` keys long."""
    for i in range(0, m, MR_NARROW):
        rows = min(MR_NARROW, m - i)
        left, to, keys = p + i * stride, at + i * row, first + i + rows
        for j in range(0, D, NR_NARROW):
            columns = min(NR_NARROW, D - j)
            multiply_narrow(
                read_only(scratch),
                left,
                stride,
                1,
                keys,
                values + j * deep,
                scratch,
                y,
                to + j,
                row,
                rows,
                columns,
                False,
            )


@kernel
def times_queries(
    p: int, stride: int, m: int, first: int, queries: int, D: int, scratch: Array, y: Array, at: int, row: int
) -> None:
    """Add y_j += Σ_i P[i, j] q_i for keys up to those of m queries from `first` on, which are packed."""
    for j in range(0, first + m, MR_NARROW):
        above, rows = max(0, j - first), min(MR_NARROW, first + m - j)  # queries before key j
        left, to = p + above * stride + j, at + j * row
        for d in range(0, D, NR_NARROW):
            panel, columns = queries + d * m + above * NR_NARROW, min(NR_NARROW, D - d)
            multiply_narrow(
                read_only(scratch),
                left,
                1,
                stride,
                m - above,
                panel,
                scratch,
                y,
                to + d,
                row,
                rows,
                columns,
                True,
            )


@kernel
def row_of(x: Array, p: int, stride: int, first: int, m: int, i: int) -> Any:
    """Return the part of row i of a block of scores that is computed: up to its query, in whole tiles."""
    return x[
        p + i * stride : p + i * stride + min(first + m, (first + i) // NR_NARROW * NR_NARROW + NR_NARROW)
    ]


@kernel
def hide(segments: Array, at: int, first: int, m: int, stride: int, scratch: Array, p: int) -> None:
    """Make scores −∞ where a query may not look: at later keys, and at keys of other segments.

    The segments of the sequence begin at segments[at]. All rows are masked before any is read, to avoid a
    store-forwarding stall.
    """
    for i in range(m):
        row = row_of(scratch, p, stride, first, m, i)
        for j in range(first + i + 1, row.size):
            row[j] = -np.inf
        for j in range(min(first + i, segments.size)):
            if segments[at + j] != segments[at + first + i]:
                row[j] = -np.inf


@kernel
def softmax_forward(
    first: int, m: int, scale: Any, stride: int, at: int, scratch: Array, p: int, tops: Array, totals: Array
) -> None:
    """Turn S into exp(S / √D − top) for m queries from `first` on; their top and total begin at tops[at]."""
    for i in range(m):
        row = row_of(scratch, p, stride, first, m, i)
        top, total = largest(row), np.float32(0)
        for j in range(row.size):
            row[j] = exp((row[j] - top) * scale)
            total += row[j]
        tops[at + i], totals[at + i] = top * scale, total


@kernel
def softmax_backward(
    first: int,
    m: int,
    scale: Any,
    stride: int,
    at: int,
    tops: Array,
    totals: Array,
    scratch: Array,
    p: int,
    dp: int,
) -> None:
    """Turn S into P and dP into dS, for m queries from `first` on."""
    for i in range(m):
        row, drow = row_of(scratch, p, stride, first, m, i), row_of(scratch, dp, stride, first, m, i)
        top, inverse, pull = tops[at + i], ONE / totals[at + i], np.float32(0)
        for j in range(row.size):
            row[j] = exp(row[j] * scale - top) * inverse
            pull += row[j] * drow[j]
        for j in range(row.size):
            drow[j] = row[j] * (drow[j] - pull) * scale


@kernel
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    B: int,
    T: int,
    H: int,
    K: int,
    D: int,
    size: int,
    stride: int,
    scratch: Array,
    y: Array,
    tops: Array,
    totals: Array,
) -> None:
    """Write y, tops and totals, with two panels and one block of scores."""
    keys = EDGE + aligned(scratch)
    values, p = keys + size, keys + 2 * size
    scale = ONE / np.sqrt(np.float32(D))
    for b in range(B):
        for group in range(K):
            pack_keys(k, b, group, T, K, D, scratch, keys)
            pack_values(v, (b * T * K + group) * D, K * D, T, D, scratch, values)
            for h in range(group * (H // K), (group + 1) * (H // K)):
                for first in range(0, T, QUERIES):
                    m, query = min(QUERIES, T - first), (b * H + h) * T + first
                    at = ((b * T + first) * H + h) * D
                    times_keys(q, at, H * D, m, D, first, keys, scratch, p, stride)
                    hide(segments, b * T, first, m, stride, scratch, p)
                    softmax_forward(first, m, scale, stride, query, scratch, p, tops, totals)
                    times_values(p, stride, m, first, values, T, D, scratch, y, at, H * D)
                    for i in range(m):
                        inverse = ONE / totals[query + i]
                        for d in range(at + i * H * D, at + i * H * D + D):
                            y[d] *= inverse


@kernel
def attention_backward(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    tops: Array,
    totals: Array,
    segments: Array,
    B: int,
    T: int,
    H: int,
    K: int,
    D: int,
    size: int,
    stride: int,
    scratch: Array,
    dq: Array,
    dk: Array,
    dv: Array,
) -> None:
    """Write dq, dk and dv, with four panels and two blocks of scores."""
    keys_t = EDGE + aligned(scratch)
    values_t, keys, few, p = keys_t + size, keys_t + 2 * size, keys_t + 3 * size, keys_t + 4 * size
    dp = p + min(QUERIES, T) * stride
    scale = ONE / np.sqrt(np.float32(D))
    for i in range(dk.size):
        dk[i] = dv[i] = 0
    for b in range(B):
        for group in range(K):
            key_at = (b * T * K + group) * D
            pack_keys(k, b, group, T, K, D, scratch, keys_t)
            pack_keys(v, b, group, T, K, D, scratch, values_t)
            pack_values(k, key_at, K * D, T, D, scratch, keys)
            for h in range(group * (H // K), (group + 1) * (H // K)):
                for first in range(0, T, QUERIES):
                    m, query = min(QUERIES, T - first), (b * H + h) * T + first
                    at = ((b * T + first) * H + h) * D
                    times_keys(q, at, H * D, m, D, first, keys_t, scratch, p, stride)
                    times_keys(dy, at, H * D, m, D, first, values_t, scratch, dp, stride)
                    hide(segments, b * T, first, m, stride, scratch, p)
                    softmax_backward(first, m, scale, stride, query, tops, totals, scratch, p, dp)
                    times_values(dp, stride, m, first, keys, T, D, scratch, dq, at, H * D)
                    # queries and heads that look at a key add up
                    pack_values(dy, at, H * D, m, D, scratch, few)
                    times_queries(p, stride, m, first, few, D, scratch, dv, key_at, K * D)
                    pack_values(q, at, H * D, m, D, scratch, few)
                    times_queries(dp, stride, m, first, few, D, scratch, dk, key_at, K * D)
