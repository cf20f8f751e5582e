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
    times_few,
    times_narrow,
)
from minilora.fused.vectors import LANES, LOW, NARROW
from minilora.jit import kernel

NEAR = 48
"""Rows whose gradients are taken together: still in the cache, and few enough for the processor to read ahead in each."""


@kernel
def add_outer(
    a: Array, at: int, r: int, x: Array, x_at: int, width: int, rows: int, one: int, scratch: Array, written: Array, ragged: int,
    out: Array, add: bool,
) -> None:  # fmt: skip
    """out (r, width) (+)= Σ_n a[at + n·r + i] x[x_at + n·width + j] over a few rows n, with x where it lies."""
    for j in range(0, width, NARROW):
        n = min(NARROW, width - j)
        if n == NARROW:
            times_narrow(a, at, one, r, rows, x, x_at + j, width, scratch, out, j, width, r, n, add)
        else:
            pack_panel(x, x_at + j, width, one, rows, n, scratch, ragged, NARROW * one)
            times_narrow(a, at, one, r, rows, written, ragged, NARROW * one, scratch, out, j, width, r, n, add)


@kernel
def adapter_gradients(
    dy: Array, h: Array, p: Array, b: Array, written: Array, dh_written: Array, m: int, n: int, k: int, r: int, one: int,
    scratch: Array, dh: Array, db: Array, da: Array,
) -> None:  # fmt: skip
    """dh = dy b, db = hᵀ dy, da = dhᵀ p, NEAR rows after the other.

    dy (m, n), h and dh (m, r), p (m, k), b (n, r); db (r, n) is the transpose of b's gradient, da (r, k). ``written`` is scratch,
    and ``dh_written`` dh, to be read.
    """
    group = groups_of(r, n)
    ragged = LOW * NARROW + aligned(scratch)
    panels = ragged + NEAR * NARROW
    if group:
        pack_few(b, r, one, n, r, group, scratch, panels)
    for j in range(0, 0 if group else r, NARROW):
        pack_panel(b, j, r, one, n, min(NARROW, r - j), scratch, panels + j * n, NARROW * one)
    for first in range(0, m, NEAR):
        rows = min(NEAR, m - first)
        if group:
            times_few(dy, first * n, n, written, panels, group, scratch, dh, first * r, rows, r)
        for j in range(0, 0 if group else r, NARROW):
            times_narrow(dy, first * n, n, one, n, written, panels + j * n, NARROW * one, scratch, dh, first * r + j, r, rows,
                         min(NARROW, r - j), one < 1)
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
    size = LOW * NARROW + LANES - 1 + NEAR * NARROW + n * -(-r // NARROW) * NARROW
    scratch = np.empty(size, np.float32, like=dy)
    if isinstance(dy, np.ndarray):
        adapter_gradients(flat(dy), flat(h), flat(p), flat(b), flat(scratch), flat(dh), m, n, k, r, 1, scratch, dh.reshape(-1),
                          db.reshape(-1), da.reshape(-1))
    return dh, db.T.copy(), da
