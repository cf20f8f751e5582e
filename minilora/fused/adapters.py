"""The gradients of a low-rank path, in one pass over dy: it is much larger than all else, and is read from memory once."""

from __future__ import annotations

import numpy as np

from minilora.fused.products import (
    FEW,
    Array,
    aligned,
    compiled,
    flat,
    groups_of,
    pack_few,
    pack_panel,
    panel_width,
    times_few,
    times_panel,
)
from minilora.fused.vectors import BROAD, COLUMNS, LANES, ROWS, TALL, tall
from minilora.jit import kernel

NEAR = 96
"""Rows whose gradients are taken together."""


@kernel
def add_outer(
    a: Array, at: int, r: int, x: Array, x_at: int, width: int, rows: int, one: int, scratch: Array, written: Array, ragged: int,
    out: Array, add: bool,
) -> None:  # fmt: skip
    """out (r, width) (+)= Σ_n a[at + n·r + i] x[x_at + n·width + j] over a few rows n, with x where it lies."""
    zero = one - one
    whole = width // BROAD * BROAD
    for j in range(0, whole, BROAD):
        for i in range(0, r, TALL):
            high = min(TALL, r - i)
            if high == TALL:
                tall(a, at + i, one, r, rows, a, at, zero, x, x_at + j, width, out, i * width + j, width, high, add)
            else:
                tall(a, at + i, one, r, rows, a, at, zero, x, x_at + j, width, scratch, zero, BROAD, high, one < 1)
                for n in range(high):
                    for c in range(BROAD):
                        to = (i + n) * width + j + c
                        out[to] = scratch[n * BROAD + c] + (out[to] if add else np.float32(0))
    for j in range(whole, width, COLUMNS):
        n = min(COLUMNS, width - j)
        columns = panel_width(n)
        if n == columns:
            times_panel(a, at, one, r, rows, a, at, zero, x, x_at + j, width, columns, scratch, out, j, width, r, n, add)
        else:
            pack_panel(x, x_at + j, width, one, rows, n, scratch, ragged, columns)
            times_panel(a, at, one, r, rows, a, at, zero, written, ragged, columns, columns, scratch, out, j, width, r, n, add)


@kernel
def adapter_gradients(
    dy: Array, h: Array, p: Array, b: Array, written: Array, dh_written: Array, m: int, n: int, k: int, r: int, one: int,
    scratch: Array, dh: Array, db: Array, da: Array,
) -> None:  # fmt: skip
    """dh = dy b, db = hᵀ dy, da = dhᵀ p, NEAR rows after the other.

    dy (m, n), h and dh (m, r), p (m, k), b (n, r); db (r, n) is the transpose of b's gradient, da (r, k). ``written`` is scratch,
    and ``dh_written`` dh, to be read.
    """
    zero, width, group = one - one, panel_width(r), groups_of(r, n)
    ragged = ROWS * COLUMNS + aligned(scratch)
    panels = ragged + NEAR * COLUMNS
    if group > 1:
        pack_few(b, r, one, n, r, group, scratch, panels)
    for j in range(0, r if group == 1 else 0, COLUMNS):
        pack_panel(b, j, r, one, n, min(COLUMNS, r - j), scratch, panels + j * n, width)
    for first in range(0, m, NEAR):
        rows = min(NEAR, m - first)
        if group > 1:
            times_few(dy, first * n, n, written, panels, group, scratch, dh, first * r, rows, r)
        for j in range(0, r if group == 1 else 0, COLUMNS):
            times_panel(dy, first * n, n, one, n, dy, zero, zero, written, panels + j * n, width, width, scratch, dh, first * r + j,
                        r, rows, min(COLUMNS, r - j), one < 1)
        add_outer(h, first * r, r, dy, first * n, n, rows, one, scratch, written, ragged, db, first > 0)
        add_outer(dh_written, first * r, r, p, first * k, k, rows, one, scratch, written, ragged, da, first > 0)


def adapter_backward(dy: Array, h: Array, p: Array, b: Array) -> tuple[Array, Array, Array]:
    """The gradients of y = h bᵀ with h = p aᵀ: dh = dy b, db = dyᵀ h, da = dhᵀ p.

    Shapes: dy (…, out), h (…, r), p (…, in), b (out, r) → dh (…, r), db (out, r), da (r, in).

    >>> [g.tolist() for g in adapter_backward(np.ones((2, 3)), np.ones((2, 1)), np.ones((2, 4)), np.ones((3, 1)))]
    [[[3.0], [3.0]], [[2.0], [2.0], [2.0]], [[6.0, 6.0, 6.0, 6.0]]]
    """
    (n, r), k = b.shape, p.shape[-1]
    m = dy.size // n
    if m <= FEW or not compiled(dy, h, p, b):
        dh = dy @ b
        return dh, dy.reshape(-1, n).T @ h.reshape(-1, r), dh.reshape(-1, r).T @ p.reshape(-1, k)
    dh, db, da = (np.empty(shape, np.float32, like=dy) for shape in (h.shape, (r, n), (r, k)))
    size = ROWS * COLUMNS + LANES - 1 + NEAR * COLUMNS + n * -(-r // COLUMNS) * COLUMNS
    scratch = np.empty(size, np.float32, like=dy)
    if isinstance(dy, np.ndarray):
        adapter_gradients(flat(dy), flat(h), flat(p), flat(b), flat(scratch), flat(dh), m, n, k, r, 1, scratch, dh.reshape(-1),
                          db.reshape(-1), da.reshape(-1))
    return dh, db.T.copy(), da
