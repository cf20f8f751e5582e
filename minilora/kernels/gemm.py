"""Products of float32 matrices, compiled here instead of taken from BLAS, for what BLAS cannot do: a low-rank
path inside the product, sums added to what is there, and the same bits in a row whatever rows stand beside
it.

    product(x, w, (h, b, s))     x wᵀ + s·h bᵀ       product_t(dy, w, (dh, a, s))     dy w + s·dh a       outer(dy, x)     dyᵀ x

The right factor is rearranged into panels of COLUMNS columns, which stay in the second-level cache while rows
of the left pass (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008);
``vectors.tile`` multiplies. Where it has few columns, as an adapter's has, several steps of a sum share a
vector. Other dtypes, a few rows, and processors without vectors are left to NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.jit import kernel
from minilora.kernels.microkernel import (
    COLUMNS,
    FEW_ROWS,
    LANES,
    LINE,
    LOW,
    NARROW,
    ROWS,
    TURN,
    few_1,
    few_2,
    few_4,
    move,
    tile_1,
    tile_2,
    tile_4,
    tile_ahead,
    tile_low,
    transpose,
)

Array = np.ndarray
LowRank = tuple[Array, Array, float]
"""(h, b, s) of s·h bᵀ beside x wᵀ, (dh, a, s) of s·dh a beside dy w."""

DEPTH, BREADTH, SOME = 640, 256, 192
"""A block of the right factor, DEPTH × BREADTH numbers in panels, and so many rows of the left one stay in
the second-level cache while they are multiplied."""
SHALLOW = 128
"""The depth of a block that few rows pass."""
TURNED = 256
"""Rows of dyᵀ that are turned at a time: half a megabyte."""


@kernel
def panel_width(n: int) -> int:
    """The narrowest tile for n columns."""
    return LANES if n <= LANES else NARROW if n <= NARROW else COLUMNS


@kernel
def aligned(x: Array) -> int:
    """Numbers from the start of x to the first whole line of the cache: a vector across two lines takes twice
    as long to load."""
    return -(x.ctypes.data // 4) % LANES


@kernel
def pack_panel(
    b: Array, at: int, b_k: int, b_n: int, k: int, n: int, panel: Array, panel_at: int, width: int
) -> None:
    """panel[panel_at + i·width + j] = b[at + i·b_k + j·b_n] for i < k, j < n, and 0 up to the panel's
    width."""
    whole = n // LANES * LANES
    done = 0
    if b_n == 1:
        for i in range(k):
            for j in range(0, whole, LANES):
                move(b, at + i * b_k + j, panel, panel_at + i * width + j)
        done = k
    elif b_k == 1:
        done = k // LANES * LANES
        for j in range(0, whole, LANES):  # a few rows of b at a time, in which the processor can read ahead
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
def times_panel(
    a: Array,
    at: int,
    row: int,
    step: int,
    k: int,
    more: Array,
    more_at: int,
    more_k: int,
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
    later: Array,
    soon_at: int,
    soon_row: int,
) -> None:
    """c[i, j] (+)= Σ_k a[i, k] panel[k, j] + Σ_l more[i, l] panel[k + l, j] for i < m, j < n.

    Lines of the panel are ``line`` apart; ``edge`` begins with scratch for ROWS·COLUMNS. Unless soon_row is
    0, memory from later[soon_at] on is asked for (see ``_sweep``).
    """
    for i in range(0, m, ROWS):
        rows = min(ROWS, m - i)
        whole = rows == ROWS and n == width
        out, out_at, out_row = (c, c_at + i * c_row, c_row) if whole else (edge, 0, width)
        left, left2, adds, soon = at + i * row, more_at + i * more_k, add and whole, soon_at
        if width == LANES:
            tile_1(
                a,
                left,
                row,
                step,
                k,
                more,
                left2,
                more_k,
                panel,
                panel_at,
                line,
                out,
                out_at,
                out_row,
                rows,
                adds,
                later,
                soon,
                soon_row,
            )
        elif width == NARROW:
            tile_2(
                a,
                left,
                row,
                step,
                k,
                more,
                left2,
                more_k,
                panel,
                panel_at,
                line,
                out,
                out_at,
                out_row,
                rows,
                adds,
                later,
                soon,
                soon_row,
            )
        elif soon_row:
            soon += i // ROWS * (k // TURN // (COLUMNS // LINE)) * soon_row
            tile_ahead(
                a,
                left,
                row,
                step,
                k,
                more,
                left2,
                more_k,
                panel,
                panel_at,
                line,
                out,
                out_at,
                out_row,
                rows,
                adds,
                later,
                soon,
                soon_row,
            )
        else:
            tile_4(
                a,
                left,
                row,
                step,
                k,
                more,
                left2,
                more_k,
                panel,
                panel_at,
                line,
                out,
                out_at,
                out_row,
                rows,
                adds,
                later,
                soon,
                soon_row,
            )
        if not whole:
            for r in range(rows):
                to = c_at + (i + r) * c_row
                for j in range(n):
                    c[to + j] = edge[r * width + j] + (c[to + j] if add else np.float32(0))


@kernel
def times_narrow(
    a: Array,
    at: int,
    row: int,
    step: int,
    k: int,
    panel: Array,
    panel_at: int,
    line: int,
    edge: Array,
    c: Array,
    c_at: int,
    c_row: int,
    m: int,
    n: int,
    add: bool,
) -> None:
    """c[i, j] (+)= Σ_k a[i, k] panel[k, j] for i < m, j < n ≤ NARROW, in tiles of LOW rows; as
    ``times_panel`` otherwise."""
    for i in range(0, m, LOW):
        rows = min(LOW, m - i)
        whole = rows == LOW and n == NARROW
        out, out_at, out_row = (c, c_at + i * c_row, c_row) if whole else (edge, 0, NARROW)
        tile_low(
            a,
            at + i * row,
            row,
            step,
            k,
            a,
            at,
            0,
            panel,
            panel_at,
            line,
            out,
            out_at,
            out_row,
            rows,
            add and whole,
            a,
            at,
            0,
        )
        if not whole:
            for r in range(rows):
                to = c_at + (i + r) * c_row
                for j in range(n):
                    c[to + j] = edge[r * NARROW + j] + (c[to + j] if add else np.float32(0))


@kernel
def multiply(
    a: Array,
    a_at: int,
    a_row: int,
    a_step: int,
    b: Array,
    b_at: int,
    b_k: int,
    b_n: int,
    more: Array,
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
    breadth: int,
    written: Array,
    scratch: Array,
    c: Array,
    c_at: int,
    c_row: int,
) -> None:
    """c[i, j] (+)= Σ_k a[i, k] b[k, j] + Σ_l more[i, l] · scale · b2[l, j] over flat arrays.

    a[i, k] = a[a_at + i·a_row + k·a_step], b[k, j] = b[b_at + k·b_k + j·b_n], likewise b2; more (m, rank);
    c's rows c_row apart. b is rearranged in blocks of ``depth`` × ``breadth``. ``scratch`` holds an edge, the
    panels and, where a is read by columns, a part of its transpose; ``written`` is the same memory, read-only
    as all that is read: of what is called, Numba would otherwise compile a version for each mixture.
    """
    in_place = b_n == 1 and rank == 0 and m <= 2 * ROWS  # too few rows for panels to pay
    panels, size = ROWS * COLUMNS + aligned(scratch), (depth + rank) * COLUMNS
    rows = panels + size * (breadth // COLUMNS)
    turned = scratch.size >= rows + LANES  # dyᵀ x: what the tile reads as a row lies far apart in memory
    for first in range(0, k, depth):
        deep = min(depth, k - first)
        more_k = rank if first + deep == k else 0
        left, left_at, left_row, left_step = a, a_at + first * a_step, a_row, a_step
        if turned:
            pack_panel(a, left_at, a_row, a_step, m, deep, scratch, rows, deep)
            left, left_at, left_row, left_step = written, rows, deep, 1
        for block in range(0, n, breadth):
            end = min(n, block + breadth)
            for j in range(block, end, COLUMNS):
                columns, place = min(COLUMNS, n - j), panels + (j - block) // COLUMNS * size
                width = panel_width(columns)
                if not in_place or columns < width:
                    pack_panel(
                        b, b_at + first * b_k + j * b_n, b_k, b_n, deep, columns, scratch, place, width
                    )
                if more_k:
                    pack_panel(b2, j * b2_n, b2_k, b2_n, rank, columns, scratch, place + deep * width, width)
                    for e in range(place + deep * width, place + (deep + rank) * width):
                        scratch[e] *= scale
            for i in range(0, m, SOME):
                for j in range(block, end, COLUMNS):
                    columns = min(COLUMNS, n - j)
                    width = panel_width(columns)
                    right, right_at, line = written, panels + (j - block) // COLUMNS * size, width
                    if in_place and columns == width:
                        right, right_at, line = b, b_at + first * b_k + j, b_k
                    soon, soon_row = (
                        b_at + first * b_k + (j + COLUMNS) * b_n,
                        COLUMNS if b_k == 1 else b_k,
                    )  # the next panel
                    if j + COLUMNS >= n:
                        soon = b_at + (first + depth) * b_k
                    times_panel(
                        left,
                        left_at + i * left_row,
                        left_row,
                        left_step,
                        deep,
                        more,
                        i * more_k,
                        more_k,
                        right,
                        right_at,
                        line,
                        width,
                        scratch,
                        c,
                        c_at + i * c_row + j,
                        c_row,
                        min(SOME, m - i),
                        columns,
                        add or first > 0,
                        b,
                        soon,
                        soon_row if m <= SOME and not in_place else 0,
                    )


@kernel
def groups_of(n: int, k: int) -> int:
    """Steps of k that share a vector with n columns: 4, 2 or 1, and 0 for more columns than a vector has."""
    return (
        4 if 4 * n <= LANES and k % 4 == 0 else 2 if 2 * n <= LANES and k % 2 == 0 else 1 if n <= LANES else 0
    )


@kernel
def pack_few(b: Array, b_k: int, b_n: int, k: int, n: int, group: int, panel: Array, panel_at: int) -> None:
    """Rearrange b (k, n) for ``times_few``, with 0 for the columns that a vector has room for beside n."""
    for i in range(k):
        at = panel_at + i // group * LANES + i % group
        for j in range(n):
            panel[at + j * group] = b[i * b_k + j * b_n]
        for j in range(n, LANES // group):
            panel[at + j * group] = 0


@kernel
def times_few(
    a: Array,
    at: int,
    k: int,
    panel: Array,
    panel_at: int,
    group: int,
    edge: Array,
    c: Array,
    c_at: int,
    m: int,
    n: int,
) -> None:
    """c[i, j] = Σ_k a[i, k] b[k, j] for m rows and few columns, b from ``pack_few``; rows of a and c follow
    one another."""
    columns = LANES // group
    for i in range(0, m, FEW_ROWS):
        rows = min(FEW_ROWS, m - i)
        whole = rows == FEW_ROWS and n == columns
        out, out_at = (c, c_at + i * n) if whole else (edge, 0)
        if group == 4:
            few_4(a, at + i * k, k, k // 4, panel, panel_at, out, out_at, rows)
        elif group == 2:
            few_2(a, at + i * k, k, k // 2, panel, panel_at, out, out_at, rows)
        else:
            few_1(a, at + i * k, k, k, panel, panel_at, out, out_at, rows)
        if not whole:
            for r in range(rows):
                for j in range(n):
                    c[c_at + (i + r) * n + j] = edge[r * columns + j]


@kernel
def multiply_few(
    a: Array, b: Array, b_k: int, b_n: int, m: int, n: int, k: int, written: Array, scratch: Array, c: Array
) -> None:
    """c (m, n) = a (m, k) times few columns b[k, j] = b[k·b_k + j·b_n]."""
    group, panel = groups_of(n, k), ROWS * COLUMNS + aligned(scratch)
    pack_few(b, b_k, b_n, k, n, group, scratch, panel)
    times_few(a, m * 0, k, written, panel, group, scratch, c, m * 0, m, n)


# ---- from NumPy


def flat(a: Array) -> Array:
    """A read-only view with one axis: kernels are compiled once, for such views."""
    view = a.reshape(-1)
    view.flags.writeable = False
    return view


NONE = flat(np.empty(0, np.float32))


def _multiply(
    a: Array,
    a_at: int,
    a_row: int,
    a_step: int,
    b: Array,
    b_k: int,
    b_n: int,
    path: LowRank | None,
    m: int,
    n: int,
    k: int,
    c: Array,
    c_at: int = 0,
    add: bool = False,
) -> None:
    """Call ``multiply`` with scratch that is counted as any array; with arrays without data (minilora.memory)
    that is all."""
    rank = path[0].shape[-1] if path else 0
    if (a_row, a_step, c.shape[-1]) == (k, 1, n) and not (rank or add) and groups_of(n, k):
        scratch = np.empty(ROWS * COLUMNS + LANES - 1 + k * LANES, np.float32, like=c)
        if isinstance(c, np.ndarray):
            multiply_few(flat(a), flat(b), b_k, b_n, m, n, k, flat(scratch), scratch, c.reshape(-1))
        return
    depth = SHALLOW if b_n == 1 and path is None and m <= 2 * ROWS else DEPTH
    depth = -(-k // -(-k // depth) // LANES) * LANES  # all blocks equally deep
    breadth = COLUMNS if m <= SOME else min(BREADTH, -(-n // COLUMNS) * COLUMNS)
    turned = m * depth if a_row == 1 and m > COLUMNS else 0
    scratch = np.empty(ROWS * COLUMNS + LANES - 1 + (depth + rank) * breadth + turned, np.float32, like=c)
    if isinstance(c, np.ndarray):
        more, b2 = map(flat, path[:2]) if path else (NONE, NONE)
        scale = np.float32(path[2] if path else 1)
        b2_k, b2_n = (1, rank) if b_k == 1 else (n, 1)
        multiply(
            flat(a),
            a_at,
            a_row,
            a_step,
            flat(b),
            0,
            b_k,
            b_n,
            more,
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
            breadth,
            flat(scratch),
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
    if n <= COLUMNS < m:  # few rows are multiplied in place, few columns are not
        dw += linear_dw(x, dy, None).T
    else:
        for first in range(0, m, TURNED):
            _multiply(dy, first, 1, m, x, n, 1, None, min(TURNED, m - first), n, k, dw, first * n, add=True)
    return dw
