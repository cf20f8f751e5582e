"""Products of float32 matrices, for what BLAS cannot do.

    linear_forward   x wᵀ + s·h bᵀ      linear_dx   dy w + s·dh a      linear_dw   dyᵀ x

BLAS has no low-rank term inside of a product, which would have to be written to memory and read again. And
its rows depend on how many stand beside them: here a row has the same bits in any batch, shard or tile.

The method is that of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, ACM TOMS
34(3), 2008), with the names of that literature. The right factor is packed into panels of KC × NR numbers,
each of which stays in the cache while all rows of the left factor pass it, MR at a time, through the
micro-kernel. README.md in this folder explains the picture; tests/test_compiled_math.py compares with
float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels import LowRank, read_only_flat
from minilora.kernels.intrinsics import read_only
from minilora.kernels.jit import kernel
from minilora.kernels.microkernel import (
    LANES,
    MR,
    MR_NARROW,
    NR,
    NR_NARROW,
    move,
    tile_half,
    tile_main,
    tile_one,
    tile_two,
    transpose,
)

Array = np.ndarray

KC = 640
"""Depth of a panel: KC × NR numbers, 160 KiB with AVX-512, stay in the second-level cache."""
MC = 256
"""Rows of dyᵀ that are packed at a time: MC × KC numbers, half a megabyte."""
EDGE = max(MR * NR, MR_NARROW * NR_NARROW)
"""Numbers of a tile: the scratch for tiles that reach over the edge of a result."""


@kernel
def panel_width(n: int, pair: bool) -> int:
    """Return the columns of the narrowest tile for n; with `pair` two steps of k may share a line."""
    if n <= LANES // 2 and pair:
        return LANES // 2
    return LANES if n <= LANES else NR_NARROW if n <= NR_NARROW else NR


@kernel
def aligned(x: Array) -> int:
    """Return the index of the first whole cache line in x: vectors across two lines load half as fast."""
    return -(x.ctypes.data // 4) % LANES


@kernel
def pack_panel(
    b: Array, at: int, b_k: int, b_n: int, k: int, n: int, panel: Array, panel_at: int, width: int
) -> None:
    """Write panel[panel_at + i·width + j] = b[at + i·b_k + j·b_n] for i < k, j < n, and 0 up to the width."""
    whole = n // LANES * LANES
    done = 0  # rows of the panel whose first `whole` columns are written
    if b_n == 1:
        for i in range(k):
            for j in range(0, whole, LANES):
                move(b, at + i * b_k + j, panel, panel_at + i * width + j)
        done = k
    elif b_k == 1:
        done = k // LANES * LANES
        for j in range(0, whole, LANES):  # LANES rows of b at a time, which the processor can prefetch
            for i in range(0, done, LANES):
                transpose(b, at + i + j * b_n, b_n, panel, panel_at + i * width + j, width)
    if done < k or whole < width:
        for i in range(k):
            line = panel_at + i * width
            for j in range(whole if i < done else 0, n):
                panel[line + j] = b[at + i * b_k + j * b_n]
            for j in range(n, width):
                panel[line + j] = 0


@kernel
def pack_pairs(b: Array, at: int, b_k: int, b_n: int, k: int, n: int, panel: Array, panel_at: int) -> None:
    """Pack n ≤ LANES / 2 columns, two steps of k to a line (see `microkernel._tile`): k is even."""
    for i in range(k):
        for j in range(LANES // 2):
            value = b[at + i * b_k + j * b_n] if j < n else np.float32(0)
            panel[panel_at + i // 2 * LANES + 2 * j + i % 2] = value


@kernel
def multiply_panel(
    a: Array,
    at: int,
    row: int,
    step: int,
    k: int,
    a2: Array,
    a2_at: int,
    a2_k: int,
    panel: Array,
    panel_at: int,
    line: int,
    width: int,
    edge: Array,
    c: Array,
    c_at: int,
    c_row: int,
    m: int,
    n: int,
    add: bool,
) -> None:
    """Write, or with `add` add to, c[i, j] = Σ_k a[i, k] panel[k, j] + Σ_l a2[i, l] panel[k + l, j].

    i < m and j < n; other arguments as in `microkernel.tile`. `width` chooses the tile. `edge` begins with
    EDGE numbers of scratch.
    """
    height = MR if width == NR else MR_NARROW
    for i in range(0, m, height):
        rows = min(height, m - i)
        whole = rows == height and n == width
        out, out_at, out_row = (c, c_at + i * c_row, c_row) if whole else (edge, 0, width)
        left, at2, adds = at + i * row, a2_at + i * a2_k, add and whole
        if width == NR:
            tile_main(
                a, left, row, step, k, a2, at2, a2_k, panel, panel_at, line, out, out_at, out_row, rows, adds
            )
        elif width == NR_NARROW:
            tile_two(
                a, left, row, step, k, a2, at2, a2_k, panel, panel_at, line, out, out_at, out_row, rows, adds
            )
        elif width == LANES:
            tile_one(
                a, left, row, step, k, a2, at2, a2_k, panel, panel_at, line, out, out_at, out_row, rows, adds
            )
        else:
            tile_half(
                a, left, row, step, k, a2, at2, a2_k, panel, panel_at, LANES, out, out_at, out_row, rows, adds
            )
        if not whole:
            for r in range(rows):
                to = c_at + (i + r) * c_row
                for j in range(n):
                    c[to + j] = edge[r * width + j] + (c[to + j] if add else np.float32(0))


@kernel
def multiply(
    a: Array,
    a_at: int,
    a_row: int,
    a_step: int,
    b: Array,
    b_k: int,
    b_n: int,
    a2: Array,
    b2: Array,
    b2_k: int,
    b2_n: int,
    scale: Any,
    rank: int,
    m: int,
    n: int,
    k: int,
    add: bool,
    depth: int,
    scratch: Array,
    c: Array,
    c_at: int,
    c_row: int,
) -> None:
    """Write, or with `add` add to, c[i, j] = Σ_k a[i, k] b[k, j] + Σ_l a2[i, l] · scale · b2[l, j].

    Arrays are flat: a[i, k] = a[a_at + i·a_row + k·a_step], b[k, j] = b[k·b_k + j·b_n], likewise b2; a2 is
    (m, rank); rows of c are c_row apart. Panels are `depth` deep. `scratch` holds an edge, a panel and, where
    a is read by columns, m rows of a: what the tile reads as a row would lie far apart in memory.
    """
    panel = EDGE + aligned(scratch)
    packed_a = panel + (depth + rank) * NR
    packs_a = scratch.size >= packed_a + LANES
    for first in range(0, k, depth):
        deep = min(depth, k - first)
        a2_k = rank if first + deep == k else 0
        left, left_at, left_row, left_step = a, a_at + first * a_step, a_row, a_step
        if packs_a:
            pack_panel(a, left_at, a_row, a_step, m, deep, scratch, packed_a, deep)
            left, left_at, left_row, left_step = read_only(scratch), packed_a, deep, 1
        for j in range(0, n, NR):
            columns = min(NR, n - j)
            width = panel_width(columns, left_step == 1 and rank == 0 and deep % 2 == 0)
            at = first * b_k + j * b_n
            if width < LANES:
                pack_pairs(b, at, b_k, b_n, deep, columns, scratch, panel)
            else:
                pack_panel(b, at, b_k, b_n, deep, columns, scratch, panel, width)
            if a2_k:
                end = panel + deep * width
                pack_panel(b2, j * b2_n, b2_k, b2_n, rank, columns, scratch, end, width)
                for e in range(end, end + rank * width):
                    scratch[e] *= scale
            multiply_panel(
                left,
                left_at,
                left_row,
                left_step,
                deep,
                a2,
                0,
                a2_k,
                read_only(scratch),
                panel,
                width,
                width,
                scratch,
                c,
                c_at + j,
                c_row,
                m,
                columns,
                add or first > 0,
            )


# --- from NumPy --------------------------------------------------------------------------------------------


NONE = read_only_flat(np.empty(0, np.float32))


def _multiply(
    a: Array,
    a_at: int,
    a_row: int,
    a_step: int,
    b: Array,
    b_k: int,
    b_n: int,
    low_rank: LowRank | None,
    m: int,
    n: int,
    k: int,
    c: Array,
    c_at: int = 0,
    add: bool = False,
) -> None:
    """Call `multiply` with scratch, which is counted as any array.

    With arrays without data (`minilora.memory`) that is all.
    """
    rank = low_rank.h.shape[-1] if low_rank else 0
    depth = -(-k // -(-k // KC) // LANES) * LANES  # all blocks equally deep
    rows_of_a = m * depth if a_row == 1 and m > NR else 0
    scratch = np.empty(EDGE + LANES - 1 + (depth + rank) * NR + rows_of_a, np.float32, like=c)
    if isinstance(c, np.ndarray):
        a2, b2 = (read_only_flat(low_rank.h), read_only_flat(low_rank.b)) if low_rank else (NONE, NONE)
        scale = np.float32(low_rank.s if low_rank else 1)
        b2_k, b2_n = (1, rank) if b_k == 1 else (n, 1)
        multiply(
            read_only_flat(a),
            a_at,
            a_row,
            a_step,
            read_only_flat(b),
            b_k,
            b_n,
            a2,
            b2,
            b2_k,
            b2_n,
            scale,
            rank,
            m,
            n,
            k,
            add,
            depth,
            scratch,
            c.reshape(-1),
            c_at,
            c.shape[-1],
        )


def linear_forward(x: Array, w: Array, low_rank: LowRank | None, out: Array | None, column: int) -> Array:
    """Return x wᵀ + s·h bᵀ, written to `out` (N, ≥ out) from a column on if that is given."""
    n, k = w.shape
    y = np.empty((*x.shape[:-1], n), np.float32, like=x) if out is None else out
    _multiply(x, 0, k, 1, w, 1, k, low_rank, x.size // k, n, k, y, column)
    return y


def linear_dx(dy: Array, w: Array, low_rank: LowRank | None, onto: Array | None, column: int) -> Array:
    """Return dy w + s·dh a, added to `onto` if that is given; of dy only columns from `column` on count."""
    k, n = w.shape
    dx = np.empty((*dy.shape[:-1], n), np.float32, like=dy) if onto is None else onto
    row = dy.shape[-1]
    _multiply(dy, column, row, 1, w, n, 1, low_rank, dy.size // row, n, k, dx, add=onto is not None)
    return dx


def linear_dw(dy: Array, x: Array, onto: Array | None) -> Array:
    """Return dyᵀ x over all rows, added to `onto` if that is given."""
    m, n = dy.shape[-1], x.shape[-1]
    k = x.size // n
    dw = np.zeros((m, n), dy.dtype, like=dy) if onto is None else onto
    if n <= NR < m:  # the narrower factor is the cheaper one to read by columns
        dw += linear_dw(x, dy, None).T
    else:
        for first in range(0, m, MC):
            _multiply(dy, first, 1, m, x, n, 1, None, min(MC, m - first), n, k, dw, first * n, add=True)
    return dw
