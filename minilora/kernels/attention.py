"""Causal attention head by head: scores exist for QUERIES rows at a time, and only up to the diagonal, in
whole tiles.

    forward    S = q kᵀ / √D,  P = exp(S − top) / total with top = max S and total = Σ exp(S − top) kept,  y = P v
    backward   P again;  dv = Pᵀ dy,  dP = dy vᵀ,  dS = P (dP − Σ P dP) / √D,  dq = dS k,  dk = dSᵀ q

as in FlashAttention (arXiv 2205.14135), but with whole rows of scores, which the cache holds. All arrays are
flat float32: q, y and their gradients (B, T, H, D), k and v (B, T, K, D), tops and totals (B, H, T);
``segments`` (B·T,) or empty.

``scratch`` holds an edge (see ``times_narrow``), panels and blocks of scores; ``written`` is the same memory,
read-only, since of what is called Numba would compile a version for each mixture of arrays, and for each
constant: so ``one`` is a variable.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.gemm import aligned, pack_panel, times_narrow
from minilora.kernels.jit import kernel
from minilora.kernels.microkernel import LANES, LOW, NARROW
from minilora.kernels.rows import ONE, exp, largest

Array = np.ndarray

QUERIES = 64
NO_SEGMENTS = np.empty(0, np.int64)


def sizes(T: int, D: int) -> tuple[int, int, int]:
    """The size of a head's panels; numbers from one row of scores to the next; 1."""
    whole = -(-T // NARROW) * NARROW
    stride = whole + 16  # not a power of two, whose rows would share a place in the cache
    return whole * -(-D // NARROW) * NARROW, stride, 1


def scratch_size(T: int, D: int, panels: int, blocks: int) -> int:
    """What a kernel needs: an edge, panels, and blocks of scores."""
    size, stride, _ = sizes(T, D)
    return LOW * NARROW + LANES - 1 + panels * size + blocks * min(QUERIES, T) * stride


@kernel
def pack_keys(
    x: Array, b: int, head: int, T: int, K: int, D: int, one: int, scratch: Array, place: int
) -> None:
    """The transposed keys of a head as panels of NARROW keys, D deep: what a query is multiplied by."""
    for j in range(0, T, NARROW):
        at = ((b * T + j) * K + head) * D
        pack_panel(x, at, one, K * D, D, min(NARROW, T - j), scratch, place + j * D, NARROW * one)


@kernel
def pack_values(x: Array, at: int, row: int, m: int, D: int, one: int, scratch: Array, place: int) -> None:
    """m rows of D numbers as panels of up to NARROW of them: what a row of probabilities is multiplied by."""
    for j in range(0, D, NARROW):
        pack_panel(x, at + j, row, one, m, min(NARROW, D - j), scratch, place + j * m, NARROW * one)


@kernel
def times_keys(
    q: Array,
    at: int,
    row: int,
    m: int,
    D: int,
    first: int,
    one: int,
    written: Array,
    keys: int,
    scratch: Array,
    place: int,
    stride: int,
) -> None:
    """scratch[place + i·stride + j] = q_i · k_j for m queries from ``first`` on and keys up to theirs, in
    whole tiles."""
    for j in range(0, first + m, NARROW):
        above = max(0, j - first) // LOW * LOW  # queries before key j
        times_narrow(
            q,
            at + above * row,
            row,
            one,
            D,
            written,
            keys + j * D,
            NARROW * one,
            scratch,
            scratch,
            place + above * stride + j,
            stride,
            m - above,
            min(NARROW, first + m - j),
            one < 1,
        )


@kernel
def times_values(
    written: Array,
    p: int,
    stride: int,
    m: int,
    first: int,
    values: int,
    deep: int,
    D: int,
    one: int,
    scratch: Array,
    y: Array,
    at: int,
    row: int,
) -> None:
    """y_i = Σ_j P[i, j] v_j for m queries from ``first`` on, with P[i, j] = written[p + i·stride + j],
    ``deep`` values packed."""
    for i in range(0, m, LOW):
        rows = min(LOW, m - i)
        for j in range(0, D, NARROW):
            times_narrow(
                written,
                p + i * stride,
                stride,
                one,
                first + i + rows,
                written,
                values + j * deep,
                NARROW * one,
                scratch,
                y,
                at + i * row + j,
                row,
                rows,
                min(NARROW, D - j),
                one < 1,
            )


@kernel
def times_queries(
    written: Array,
    p: int,
    stride: int,
    m: int,
    first: int,
    queries: int,
    D: int,
    one: int,
    scratch: Array,
    y: Array,
    at: int,
    row: int,
) -> None:
    """y_j += Σ_i P[i, j] q_i for keys up to those of m queries from ``first`` on, all of which are packed."""
    for j in range(0, first + m, LOW):
        above, rows = max(0, j - first), min(LOW, first + m - j)  # queries before key j
        for d in range(0, D, NARROW):
            times_narrow(
                written,
                p + above * stride + j,
                one,
                stride,
                m - above,
                written,
                queries + d * m + above * NARROW,
                NARROW * one,
                scratch,
                y,
                at + j * row + d,
                row,
                rows,
                min(NARROW, D - d),
                one > 0,
            )


@kernel
def row_of(x: Array, p: int, stride: int, first: int, m: int, i: int) -> Any:
    """What is computed of row i of a block of scores: up to its query, in whole tiles."""
    return x[p + i * stride : p + i * stride + min(first + m, (first + i) // NARROW * NARROW + NARROW)]


@kernel
def hide(segments: Array, at: int, first: int, m: int, stride: int, scratch: Array, p: int) -> None:
    """Make scores −∞ where a query may not look: at later keys, and at other segments' keys (the sequence's
    are from ``at`` on).

    All rows before the first is read: a vector whose last numbers have just been written one by one must wait
    for them.
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
    """scratch = exp(S / √D − top) in place of S, for m queries from ``first`` on; their top and total = Σ
    from tops[at] on."""
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
    """P in place of S and dS in place of dP for m queries from ``first`` on."""
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
    written: Array,
    B: int,
    T: int,
    H: int,
    K: int,
    D: int,
    size: int,
    stride: int,
    one: int,
    scratch: Array,
    y: Array,
    tops: Array,
    totals: Array,
) -> None:
    """Write y, tops and totals, with two panels and one block of scores."""
    keys = LOW * NARROW + aligned(scratch)
    values, p = keys + size, keys + 2 * size
    scale = ONE / np.sqrt(np.float32(D))
    for b in range(B):
        for group in range(K):
            pack_keys(k, b, group, T, K, D, one, scratch, keys)
            pack_values(v, (b * T * K + group) * D, K * D, T, D, one, scratch, values)
            for h in range(group * (H // K), (group + 1) * (H // K)):
                for first in range(0, T, QUERIES):
                    m, query = min(QUERIES, T - first), (b * H + h) * T + first
                    at = ((b * T + first) * H + h) * D
                    times_keys(q, at, H * D, m, D, first, one, written, keys, scratch, p, stride)
                    hide(segments, b * T, first, m, stride, scratch, p)
                    softmax_forward(first, m, scale, stride, query, scratch, p, tops, totals)
                    times_values(written, p, stride, m, first, values, T, D, one, scratch, y, at, H * D)
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
    written: Array,
    B: int,
    T: int,
    H: int,
    K: int,
    D: int,
    size: int,
    stride: int,
    one: int,
    scratch: Array,
    dq: Array,
    dk: Array,
    dv: Array,
) -> None:
    """Write dq, dk and dv, with four panels and two blocks of scores."""
    keys_t = LOW * NARROW + aligned(scratch)
    values_t, keys, few, p = keys_t + size, keys_t + 2 * size, keys_t + 3 * size, keys_t + 4 * size
    dp = p + min(QUERIES, T) * stride
    scale = ONE / np.sqrt(np.float32(D))
    for i in range(dk.size):
        dk[i] = dv[i] = 0
    for b in range(B):
        for group in range(K):
            key_at = (b * T * K + group) * D
            pack_keys(k, b, group, T, K, D, one, scratch, keys_t)
            pack_keys(v, b, group, T, K, D, one, scratch, values_t)
            pack_values(k, key_at, K * D, T, D, one, scratch, keys)
            for h in range(group * (H // K), (group + 1) * (H // K)):
                for first in range(0, T, QUERIES):
                    m, query = min(QUERIES, T - first), (b * H + h) * T + first
                    at = ((b * T + first) * H + h) * D
                    times_keys(q, at, H * D, m, D, first, one, written, keys_t, scratch, p, stride)
                    times_keys(dy, at, H * D, m, D, first, one, written, values_t, scratch, dp, stride)
                    hide(segments, b * T, first, m, stride, scratch, p)
                    softmax_backward(first, m, scale, stride, query, tops, totals, scratch, p, dp)
                    times_values(written, dp, stride, m, first, keys, T, D, one, scratch, dq, at, H * D)
                    # the queries, and heads, that look at a key add up
                    pack_values(dy, at, H * D, m, D, one, scratch, few)
                    times_queries(written, p, stride, m, first, few, D, one, scratch, dv, key_at, K * D)
                    pack_values(q, at, H * D, m, D, one, scratch, few)
                    times_queries(written, dp, stride, m, first, few, D, one, scratch, dk, key_at, K * D)
