"""The micro-kernel: a tile of sums held in registers, the heart of all products.

For each k it adds one number of each row times a few vectors of columns, by fused multiply-adds:

    c[m, n] = Σ_k a[m, k] · panel[k, n]  +  Σ_j a2[m, j] · panel[depth + j, n]

Numba knows no vectors, so the tile is written in LLVM's language. Its instructions are LLVM's own and not a
processor's: AVX-512, AVX2 and NEON differ in `LANES` and in how many vectors find room in the registers.

The order of the sum is that of k, whatever lies around the tile. So an element of a product does not depend
on how rows are divided among tiles, shards or threads. tests/test_compiled_math.py compares products with
float64.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types

from minilora.kernels.intrinsics import (
    F32,
    I64,
    broadcast,
    intrinsic,
    multiply_add,
    number,
    pick,
    pointer,
    vector,
)
from minilora.kernels.jit import AVX2, AVX512, NEON

AVAILABLE = AVX512 or AVX2 or NEON
"""Whether the processor has vectors and fused multiply-adds that repay products of our own."""
LANES = 16 if AVX512 else 8 if AVX2 else 4
"""Numbers in a vector."""
MR = 6
"""Rows of the main tile."""
NR = (2 if AVX2 and not AVX512 else 4) * LANES
"""Columns of the main tile: 24 vectors of sums in 32 registers, or with AVX2 12 in 16."""
MR_NARROW = 4 if AVX2 and not AVX512 else 8
"""Rows of the narrow tiles: a divisor of the blocks of queries in attention."""
NR_NARROW = 2 * LANES
"""Columns of the widest narrow tile, for heads of 32 or 64 and large ranks. The others: LANES and LANES /
2."""

VECTOR = vector(F32, LANES)


def _vector_at(builder: Any, place: Any, index: int = 0) -> Any:
    """Return the pointer to the vector that begins `index` numbers after a place."""
    return builder.bitcast(builder.gep(place, [number(index)]), VECTOR.as_pointer())


def _rows(builder: Any, height: int, rows: Any) -> list[Any]:
    """Return 0 … rows − 1, and the last again, to the height of a tile."""
    last = builder.sub(rows, number(1))
    return [builder.select(builder.icmp_signed("<", number(m), last), number(m), last) for m in range(height)]


def _add_products(
    builder: Any, sums: list[Any], rows: list[Any], step: Any, panel: Any, line: Any, depth: Any, pair: bool
) -> list[Any]:
    """Return sums[m, j] + Σ_k rows[m][k·step] · panel[k·line + j·LANES …] for k < depth: a loop over k.

    With `pair` a row gives two numbers, from rows[m][k·step] on, which are repeated over the vector.
    """
    vectors, before = len(sums) // len(rows), builder.block
    loop, body, after = (builder.append_basic_block(name) for name in ("k", "k.body", "k.end"))
    builder.branch(loop)
    builder.position_at_end(loop)
    k, old = builder.phi(I64), [builder.phi(VECTOR) for _ in sums]
    for phi, value in zip([k, *old], [number(0), *sums], strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", k, depth), body, after)
    builder.position_at_end(body)
    right_at, left_at, new = builder.gep(panel, [builder.mul(k, line)]), builder.mul(k, step), list(old)
    right = [builder.load(_vector_at(builder, right_at, LANES * j), align=4) for j in range(vectors)]
    for m, row in enumerate(rows):
        place = builder.gep(row, [left_at])
        if pair:
            two = builder.load(builder.bitcast(place, vector(F32, 2).as_pointer()), align=4)
            left = pick(builder, two, [0, 1] * (LANES // 2))
        else:
            left = broadcast(builder, builder.load(place, align=4), LANES)
        for j in range(vectors):
            new[m * vectors + j] = multiply_add(builder, left, right[j], new[m * vectors + j])
    for phi, value in zip([k, *old], [builder.add(k, number(1)), *new], strict=True):
        phi.add_incoming(value, body)
    builder.branch(loop)
    builder.position_at_end(after)
    return old


def _tile(height: int, columns: int) -> Any:
    """Return the intrinsic of a tile of height × columns.

    With LANES / 2 columns two steps of k share a vector: a line of the panel holds panel[2k, n], panel[2k +
    1, n] for one n after the other, and the two sums are added at the end. It needs step = 1 and has no a2.
    """
    vectors, pair = max(1, columns // LANES), columns < LANES

    @intrinsic
    def tile(
        typing: Any,
        a: Any,
        at: Any,
        row: Any,
        step: Any,
        depth: Any,
        a2: Any,
        a2_at: Any,
        a2_depth: Any,
        panel: Any,
        panel_at: Any,
        line: Any,
        c: Any,
        c_at: Any,
        c_row: Any,
        rows: Any,
        add: Any,
    ) -> Any:
        """Write, or with `add` add to, c[c_at + m·c_row + n] the sum above for m < rows.

        a[m, k] is a[at + m·row + k·step], a2 (…, a2_depth) has whole rows, lines of the panel are `line`
        apart. Rows from `rows` on are computed as copies of the last one: c must have room for `height` of
        them.
        """

        def build(context: Any, builder: Any, signature: Any, v: Any) -> Any:
            _, _, row, step, depth, _, _, a2_depth, _, _, line, _, _, c_row, rows, add = v
            a, a2, panel, c = (pointer(context, builder, signature, v, i) for i in (0, 5, 8, 11))
            index = _rows(builder, height, rows)
            a_rows = [builder.gep(a, [builder.mul(i, row)]) for i in index]
            a2_rows = [builder.gep(a2, [builder.mul(i, a2_depth)]) for i in index]
            sums = [ir.Constant(VECTOR, [0.0] * LANES)] * (height * vectors)
            if pair:
                half = builder.lshr(depth, number(1))
                sums = _add_products(builder, sums, a_rows, number(2), panel, line, half, pair)
                odd_even = [[pick(builder, v, range(i, LANES, 2)) for i in (0, 1)] for v in sums]
                sums = [builder.fadd(*both) for both in odd_even]
            else:
                sums = _add_products(builder, sums, a_rows, step, panel, line, depth, pair)
                rest = builder.gep(panel, [builder.mul(depth, line)])
                sums = _add_products(builder, sums, a2_rows, number(1), rest, line, a2_depth, pair)
            with builder.if_else(add) as (then, otherwise):
                for branch, adds in ((then, True), (otherwise, False)):
                    with branch:
                        for i, value in enumerate(sums):
                            at = builder.mul(number(i // vectors), c_row)
                            place = builder.gep(c, [builder.add(at, number(i % vectors * LANES))])
                            place = builder.bitcast(place, value.type.as_pointer())
                            value = builder.fadd(value, builder.load(place, align=4)) if adds else value
                            builder.store(value, place, align=4)
            return context.get_dummy_value()

        i = types.intp
        return types.void(a, i, i, i, i, a2, i, i, panel, i, i, c, i, i, i, types.boolean), build

    return tile


tile_main = _tile(MR, NR)
tile_two = _tile(MR_NARROW, NR_NARROW)
tile_one = _tile(MR_NARROW, LANES)
tile_half = _tile(MR_NARROW, LANES // 2)


@intrinsic
def transpose(
    typing: Any, source: Any, at: Any, row: Any, target: Any, target_at: Any, target_row: Any
) -> Any:
    """Write the transpose of LANES × LANES numbers, row i of which begins at source[at + i·row]."""

    def build(context: Any, builder: Any, signature: Any, v: Any) -> Any:
        place, goal = (pointer(context, builder, signature, v, i) for i in (0, 3))
        lines = []
        for i in range(LANES):
            line = builder.gep(place, [builder.mul(number(i), v[2])])
            lines.append(builder.load(_vector_at(builder, line), align=4))
        # Lines i and i + half, interleaved, become lines 2i and 2i + 1: log2(LANES) times give the transpose.
        half, width = LANES // 2, LANES
        orders = [[part + i // 2 + LANES * (i % 2) for i in range(LANES)] for part in (0, half)]
        while width > 1:
            lines = [pick(builder, lines[i], order, lines[i + half]) for i in range(half) for order in orders]
            width //= 2
        for i, line in enumerate(lines):
            to = builder.gep(goal, [builder.mul(number(i), v[5])])
            builder.store(line, _vector_at(builder, to), align=4)
        return context.get_dummy_value()

    i = types.intp
    return types.void(source, i, i, target, i, i), build


@intrinsic
def move(typing: Any, source: Any, at: Any, target: Any, target_at: Any) -> Any:
    """Do target[target_at : target_at + LANES] = source[at : at + LANES]."""

    def build(context: Any, builder: Any, signature: Any, v: Any) -> Any:
        place, goal = (pointer(context, builder, signature, v, i) for i in (0, 2))
        builder.store(builder.load(_vector_at(builder, place), align=4), _vector_at(builder, goal), align=4)
        return context.get_dummy_value()

    i = types.intp
    return types.void(source, i, target, i), build
