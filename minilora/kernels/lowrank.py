"""The gradients of a low-rank path in one pass over dy, which is much larger than all else and is read once.

The formulas are those of `functional.low_rank_backward`. tests/test_compiled_math.py compares with float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels import read_only_flat
from minilora.kernels.gemm import EDGE, Array, aligned, multiply_panel, pack_pairs, pack_panel, panel_width
from minilora.kernels.intrinsics import read_only
from minilora.kernels.jit import kernel
from minilora.kernels.microkernel import LANES, NR_NARROW

EMPTY = np.empty(0, np.float32)
BLOCK = 48
"""Rows of dy and p taken together: they are still in the cache when they are multiplied again."""


@kernel
def add_outer(
    a: Array,
    at: int,
    r: int,
    x: Array,
    x_at: int,
    n: int,
    rows: int,
    scratch: Array,
    ragged: int,
    out: Array,
    add: bool,
) -> None:
    """Write, or with `add` add to, out[i, j] = Σ_k a[at + k·r + i] x[x_at + k·n + j] over a few rows k.

    out is (r, n). x is multiplied where it lies; only a last panel that is not full is packed, to
    scratch[ragged].
    """
    for j in range(0, n, NR_NARROW):
        columns = min(NR_NARROW, n - j)
        panel, panel_at, line = x, x_at + j, n
        if columns < NR_NARROW:
            pack_panel(x, x_at + j, n, 1, rows, columns, scratch, ragged, NR_NARROW)
            panel, panel_at, line = read_only(scratch), ragged, NR_NARROW
        multiply_panel(
            a, at, 1, r, rows, a, at, 0, panel, panel_at, line, NR_NARROW, scratch, out, j, n, r, columns, add
        )


@kernel
def low_rank_gradients(
    dy: Array,
    h: Array,
    p: Array,
    b: Array,
    scale: Any,
    m: int,
    n: int,
    k: int,
    r: int,
    scratch: Array,
    dh: Array,
    db_t: Array,
    da_s: Array,
    db: Array,
    da: Array,
) -> None:
    """Write dh = dy b; add scale · dyᵀ h to db and scale · dhᵀ p to da, each unless it is empty.

    dy (m, n), h and dh (m, r), p (m, k), b and db (n, r), da (r, k), all flat. db_t (r, n) and da_s (r, k)
    hold the sums until they are added.
    """
    ragged = EDGE + aligned(scratch)
    panels = ragged + BLOCK * NR_NARROW
    for j in range(0, r, NR_NARROW):
        columns = min(NR_NARROW, r - j)
        width = panel_width(columns, n % 2 == 0)
        if width < LANES:
            pack_pairs(b, j, r, 1, n, columns, scratch, panels + j * n)
        else:
            pack_panel(b, j, r, 1, n, columns, scratch, panels + j * n, width)
    for first in range(0, m, BLOCK):
        rows = min(BLOCK, m - first)
        for j in range(0, r, NR_NARROW):
            columns = min(NR_NARROW, r - j)
            panel, width = panels + j * n, panel_width(columns, n % 2 == 0)
            multiply_panel(
                dy,
                first * n,
                n,
                1,
                n,
                dy,
                0,
                0,
                read_only(scratch),
                panel,
                width,
                width,
                scratch,
                dh,
                first * r + j,
                r,
                rows,
                columns,
                False,
            )
        if db.size:
            add_outer(h, first * r, r, dy, first * n, n, rows, scratch, ragged, db_t, first > 0)
        if da.size:
            add_outer(read_only(dh), first * r, r, p, first * k, k, rows, scratch, ragged, da_s, first > 0)
    if db.size:
        for i in range(r):
            row = db_t[i * n : (i + 1) * n]
            for j in range(n):
                db[j * r + i] += scale * row[j]
    for i in range(da.size):
        da[i] += scale * da_s[i]


def adapter_backward(
    dy: Array, h: Array, p: Array, b: Array, s: float, db: Array | None, da: Array | None
) -> Array:
    """Return dh = dy b, and add to the gradients of y = s·h bᵀ, h = p aᵀ: db += s·dyᵀ h, da += s·dhᵀ p.

    Shapes: dy (…, out), h and dh (…, r), p (…, in), b and db (out, r), da (r, in). A gradient that is None
    (its factor is frozen) is skipped. All in one call: threads that make many short calls wait for each
    other's interpreter lock.
    """
    (n, r), k = b.shape, p.shape[-1]
    m = dy.size // n
    sums = [np.empty(0 if d is None else d.size, np.float32, like=dy) for d in (db, da)]
    dh = np.empty(h.shape, np.float32, like=dy)
    size = EDGE + LANES - 1 + BLOCK * NR_NARROW + n * -(-r // NR_NARROW) * NR_NARROW
    scratch = np.empty(size, np.float32, like=dy)
    if isinstance(dy, np.ndarray):
        low_rank_gradients(
            read_only_flat(dy),
            read_only_flat(h),
            read_only_flat(p),
            read_only_flat(b),
            np.float32(s),
            m,
            n,
            k,
            r,
            scratch,
            dh.reshape(-1),
            *sums,
            *(EMPTY if d is None else d.reshape(-1) for d in (db, da)),
        )
    return dh
