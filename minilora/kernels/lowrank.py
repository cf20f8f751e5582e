"""The gradients of a low-rank path, in one pass over dy: it is much larger than all else, and is read from
memory once."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.gemm import (
    Array,
    aligned,
    flat,
    groups_of,
    pack_few,
    pack_panel,
    times_few,
    times_narrow,
)
from minilora.kernels.jit import kernel
from minilora.kernels.microkernel import LANES, LOW, NARROW

NEAR = 48
"""Rows whose gradients are taken together: still in the cache, and few enough for the processor to read ahead
in each."""


@kernel
def add_outer(
    a: Array,
    at: int,
    r: int,
    x: Array,
    x_at: int,
    width: int,
    rows: int,
    one: int,
    scratch: Array,
    written: Array,
    ragged: int,
    out: Array,
    add: bool,
) -> None:
    """out (r, width) (+)= Σ_n a[at + n·r + i] x[x_at + n·width + j] over a few rows n, with x where it
    lies."""
    for j in range(0, width, NARROW):
        n = min(NARROW, width - j)
        if n == NARROW:
            times_narrow(a, at, one, r, rows, x, x_at + j, width, scratch, out, j, width, r, n, add)
        else:
            pack_panel(x, x_at + j, width, one, rows, n, scratch, ragged, NARROW * one)
            times_narrow(
                a, at, one, r, rows, written, ragged, NARROW * one, scratch, out, j, width, r, n, add
            )


@kernel
def adapter_gradients(
    dy: Array,
    h: Array,
    p: Array,
    b: Array,
    written: Array,
    dh_written: Array,
    scale: Any,
    m: int,
    n: int,
    k: int,
    r: int,
    one: int,
    scratch: Array,
    dh: Array,
    db_t: Array,
    da_s: Array,
    db: Array,
    da: Array,
) -> None:
    """dh = dy b, db += scale · dyᵀ h, da += scale · dhᵀ p, NEAR rows after the other.

    dy (m, n), h and dh (m, r), p (m, k), b and db (n, r), da (r, k). ``written`` is scratch, and
    ``dh_written`` dh, to be read; db_t (r, n) and da_s (r, k) hold the sums until they are added.
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
            times_narrow(
                dy,
                first * n,
                n,
                one,
                n,
                written,
                panels + j * n,
                NARROW * one,
                scratch,
                dh,
                first * r + j,
                r,
                rows,
                min(NARROW, r - j),
                one < 1,
            )
        add_outer(h, first * r, r, dy, first * n, n, rows, one, scratch, written, ragged, db_t, first > 0)
        add_outer(
            dh_written, first * r, r, p, first * k, k, rows, one, scratch, written, ragged, da_s, first > 0
        )
    for i in range(r):
        row = db_t[i * n : (i + 1) * n]
        for j in range(n):
            db[j * r + i] += scale * row[j]
    for i in range(da.size):
        da[i] += scale * da_s[i]


def adapter_backward(dy: Array, h: Array, p: Array, b: Array, s: float, db: Array, da: Array) -> Array:
    """The gradients of y = s·h bᵀ with h = p aᵀ: returns dh = dy b, that of s·h; db += s·dyᵀ h, da += s·dhᵀ
    p.

    Shapes: dy (…, out), h and dh (…, r), p (…, in), b and db (out, r), da (r, in). All in one call, since
    threads that make many short ones wait for each other's interpreter lock.
    """
    (n, r), k = b.shape, p.shape[-1]
    m = dy.size // n
    db = np.zeros((n, r), np.float32, like=dy) if db is None else db
    da = np.zeros((r, k), np.float32, like=dy) if da is None else da
    dh, db_t, da_s = (np.empty(shape, np.float32, like=dy) for shape in (h.shape, (r, n), (r, k)))
    size = LOW * NARROW + LANES - 1 + NEAR * NARROW + n * -(-r // NARROW) * NARROW
    scratch = np.empty(size, np.float32, like=dy)
    if isinstance(dy, np.ndarray):
        adapter_gradients(
            flat(dy),
            flat(h),
            flat(p),
            flat(b),
            flat(scratch),
            flat(dh),
            np.float32(s),
            m,
            n,
            k,
            r,
            1,
            scratch,
            dh.reshape(-1),
            db_t.reshape(-1),
            da_s.reshape(-1),
            db.reshape(-1),
            da.reshape(-1),
        )
    return dh
