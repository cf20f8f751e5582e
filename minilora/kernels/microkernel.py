"""Vectors of float32 for Numba, which knows none: each ``@intrinsic`` writes the LLVM code of one operation.

``tile`` is the heart of all products. It holds height × ``columns`` sums in registers, and for each k adds
one number of each row times one vector of each ``LANES`` columns, a fused multiply-add:

    c[m, n] = Σ_k a[m, k] · panel[k, n]  +  Σ_j more[m, j] · panel[depth + j, n]

The order of the sum is that of k, whatever lies around the tile: an element of a product does not depend on
how rows are divided among tiles, shards or threads. ``few``, for half a vector of columns or less, adds every
second or fourth k, and those sums at the end: that, too, depends on k and the columns alone. The instructions
are LLVM's own, not a processor's: AVX-512, AVX2 and NEON differ in ``LANES`` and in how many vectors of
columns find room in the registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending
from numba.core import cgutils, types

from minilora.kernels.jit import FEATURES, TRIPLE

intrinsic: Any = extending.intrinsic
AVX512, AVX2, NEON = (
    {"+avx512f", "+fma"} <= FEATURES,
    {"+avx2", "+fma"} <= FEATURES,
    TRIPLE.startswith(("aarch64", "arm64")),
)
AVAILABLE = AVX512 or AVX2 or NEON
"""Whether the processor has vectors and fused multiply-adds that are worth a product of our own."""
LANES = 16 if AVX512 else 8 if AVX2 else 4
"""Numbers in a vector."""
ROWS = 6
COLUMNS = (2 if AVX2 and not AVX512 else 4) * LANES
"""Rows and columns of a full tile: 24 vectors of sums in 32 registers, with AVX2 12 in 16."""
LOW, NARROW = (4 if AVX2 and not AVX512 else 8), 2 * LANES
"""Rows and columns of a tile for what comes in multiples of 8, as ranks and a block of queries do, and in
heads of 32 or 64."""
FEW_ROWS = 8
"""Rows of a tile for few columns."""
LINE = 16
"""Numbers in a line of the cache."""
TURN = 4
"""Steps of k in a turn of a tile's loop: with a panel in the second-level cache a tenth faster than one. With
steps and lines that are no constants LLVM would run out of registers for their addresses."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)


def _number(i: int) -> Any:
    return ir.Constant(_I64, i)


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, array: int) -> Any:
    """Pointer to element arguments[array + 1] of the flat array arguments[array]."""
    data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
    return builder.gep(data, [arguments[array + 1]])


def _vector_at(builder: Any, place: Any, index: int = 0) -> Any:
    return builder.bitcast(builder.gep(place, [_number(index)]), _VECTOR.as_pointer())


def _shuffle(builder: Any, value: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, len(order)), order))


def _spread(builder: Any, place: Any, group: int) -> Any:
    """A vector that repeats the ``group`` numbers at a place."""
    numbers = builder.load(builder.bitcast(place, ir.VectorType(_F32, group).as_pointer()), align=4)
    return _shuffle(builder, numbers, [i % group for i in range(LANES)])


def _folded(builder: Any, value: Any, group: int) -> Any:
    """The sums of each ``group`` neighbours of a vector."""
    for n in (LANES // 2, LANES // 4)[: group // 2]:
        value = builder.fadd(*(_shuffle(builder, value, [2 * i + odd for i in range(n)]) for odd in (0, 1)))
    return value


def prefetch(builder: Any, place: Any, write: bool, level: int) -> None:
    """Ask for the line of the cache around a place, into all levels (3) or from the second on (2).

    The place may lie outside of all arrays.
    """
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    flags = [ir.Constant(_I32, int(flag)) for flag in (write, level, True)]  # of data, not of code
    name = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(name, [builder.bitcast(place, byte), *flags])


def _rows(builder: Any, height: int, rows: Any) -> list[Any]:
    """0 … rows − 1, and the last again, to the height of a tile."""
    last = builder.sub(rows, _number(1))
    return [
        builder.select(builder.icmp_signed("<", _number(m), last), _number(m), last) for m in range(height)
    ]


def _sweep(
    builder: Any,
    sums: list[Any],
    starts: list[Any],
    step: Any,
    panel: Any,
    line: Any,
    first: Any,
    end: Any,
    turn: int,
    group: int = 1,
    soon: Any = None,
    soon_row: Any = None,
) -> list[Any]:
    """sums[m, j] += Σ_k starts[m][k·step] · panel[k·line + j·LANES …] for first ≤ k < end, ``turn`` of them
    at once.

    With a group it is so many numbers from starts[m][k·step] on, repeated, by which a line of the panel is
    multiplied. With ``soon`` each turn asks for 64 bytes that are read later: of COLUMNS numbers there, then
    of those ``soon_row`` further on, ….
    """
    vectors, before = len(sums) // len(starts), builder.block
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )
    loop, body, after = (builder.append_basic_block(name) for name in ("k", "k.body", "k.end"))
    builder.branch(loop)
    builder.position_at_end(loop)
    k, old = builder.phi(_I64), [builder.phi(_VECTOR) for _ in sums]
    for phi, value in zip([k, *old], [first, *sums], strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", k, end), body, after)
    builder.position_at_end(body)
    new, next_k = list(old), k
    if soon is not None:
        turns = builder.udiv(k, _number(TURN))
        row, part = (divide(turns, _number(COLUMNS // LINE)) for divide in (builder.udiv, builder.urem))
        place = builder.gep(soon, [builder.add(builder.mul(row, soon_row), builder.mul(part, _number(LINE)))])
        prefetch(builder, place, write=False, level=2)
    for _ in range(turn):
        numbers, place = builder.gep(panel, [builder.mul(next_k, line)]), builder.mul(next_k, step)
        right = [builder.load(_vector_at(builder, numbers, LANES * j), align=4) for j in range(vectors)]
        for m, start in enumerate(starts):
            left = _spread(builder, builder.gep(start, [place]), group)
            for j in range(vectors):
                new[m * vectors + j] = builder.call(fma, [left, right[j], new[m * vectors + j]])
        next_k = builder.add(next_k, _number(1))
    for phi, value in zip([k, *old], [next_k, *new], strict=True):
        phi.add_incoming(value, body)
    builder.branch(loop)
    builder.position_at_end(after)
    return old


def _tile(height: int, columns: int, ahead: bool = False) -> Any:
    """The intrinsic of a tile of height × columns, ``ahead`` with the memory that its last three arguments
    say."""
    vectors = columns // LANES

    @intrinsic
    def tile(
        typing: Any,
        a: Any,
        at: Any,
        row: Any,
        step: Any,
        depth: Any,
        more: Any,
        more_at: Any,
        more_depth: Any,
        panel: Any,
        panel_at: Any,
        line: Any,
        c: Any,
        c_at: Any,
        c_row: Any,
        rows: Any,
        add: Any,
        later: Any,
        soon_at: Any,
        soon_row: Any,
    ) -> Any:
        """c[c_at + m·c_row + n] = (or, with add, +=) the sum above for m < rows.

        a[m, k] is a[at + m·row + k·step], more (…, more_depth) has whole rows, lines of the panel are
        ``line`` apart. Rows from ``rows`` on are computed as copies of the last one: c must have room for
        ``height`` of them.
        """

        def build(context: Any, builder: Any, signature: Any, v: Any) -> Any:
            _, _, row, step, depth, _, _, more_depth, _, _, line, _, _, c_row, rows, add, _, _, soon_row = v
            index = _rows(builder, height, rows)
            a, more, panel, c = (_pointer(context, builder, signature, v, i) for i in (0, 5, 8, 11))
            starts = [builder.gep(a, [builder.mul(i, row)]) for i in index]
            starts2 = [builder.gep(more, [builder.mul(i, more_depth)]) for i in index]
            sums = [ir.Constant(_VECTOR, [0.0] * LANES)] * (height * vectors)
            zero, one, width = _number(0), _number(1), _number(columns)
            usual = builder.and_(builder.icmp_signed("==", step, one), builder.icmp_signed("==", line, width))
            whole = builder.select(usual, builder.and_(depth, _number(-TURN)), zero)
            soon = _pointer(context, builder, signature, v, 16) if ahead else None
            sums = _sweep(builder, sums, starts, one, panel, width, zero, whole, TURN, 1, soon, soon_row)
            sums = _sweep(builder, sums, starts, step, panel, line, whole, depth, 1)
            sums = _sweep(
                builder,
                sums,
                starts2,
                one,
                builder.gep(panel, [builder.mul(depth, line)]),
                line,
                zero,
                more_depth,
                1,
            )
            with builder.if_else(add) as (then, otherwise):
                for branch, adds in ((then, True), (otherwise, False)):
                    with branch:
                        for m in range(height):
                            numbers = builder.gep(c, [builder.mul(_number(m), c_row)])
                            for j in range(vectors):
                                place, value = _vector_at(builder, numbers, LANES * j), sums[m * vectors + j]
                                value = builder.fadd(value, builder.load(place, align=4)) if adds else value
                                builder.store(value, place, align=4)
            return context.get_dummy_value()

        i = types.intp
        return types.void(
            a, i, i, i, i, more, i, i, panel, i, i, c, i, i, i, types.boolean, later, i, i
        ), build

    return tile


tile_1, tile_2, tile_4 = _tile(ROWS, LANES), _tile(ROWS, NARROW), _tile(ROWS, COLUMNS)
tile_ahead = _tile(ROWS, COLUMNS, ahead=True)
tile_low = _tile(LOW, NARROW)


def _few(group: int) -> Any:
    """The intrinsic of a tile of FEW_ROWS × LANES / group columns, whose panel has ``group`` steps of k in a
    line."""

    @intrinsic
    def few(
        typing: Any,
        a: Any,
        at: Any,
        row: Any,
        groups: Any,
        panel: Any,
        panel_at: Any,
        c: Any,
        c_at: Any,
        rows: Any,
    ) -> Any:
        """c[c_at + m·LANES/group + n] = Σ_k a[at + m·row + k] panel[panel_at + k//group·LANES + n·group +
        k%group] for m < rows.

        The sum runs over ``groups`` lines. Rows from ``rows`` on are computed as copies of the last one.
        """

        def build(context: Any, builder: Any, signature: Any, v: Any) -> Any:
            _, _, row, groups, _, _, _, _, rows = v
            a, panel, c = (_pointer(context, builder, signature, v, i) for i in (0, 4, 6))
            starts = [builder.gep(a, [builder.mul(i, row)]) for i in _rows(builder, FEW_ROWS, rows)]
            sums = [ir.Constant(_VECTOR, [0.0] * LANES)] * FEW_ROWS
            whole, line = builder.and_(groups, _number(-TURN)), _number(LANES)
            sums = _sweep(builder, sums, starts, _number(group), panel, line, _number(0), whole, TURN, group)
            sums = _sweep(builder, sums, starts, _number(group), panel, line, whole, groups, 1, group)
            for m, value in enumerate(sums):
                value = _folded(builder, value, group)
                place = builder.gep(c, [_number(m * LANES // group)])
                builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=4)
            return context.get_dummy_value()

        i = types.intp
        return types.void(a, i, i, i, panel, i, c, i, i), build

    return few


few_1, few_2, few_4 = _few(1), _few(2), _few(4)


@intrinsic
def transpose(
    typing: Any, source: Any, at: Any, row: Any, target: Any, target_at: Any, target_row: Any
) -> Any:
    """Write LANES × LANES numbers, row i of them at source[at + i·row], as their transpose."""

    def build(context: Any, builder: Any, signature: Any, v: Any) -> Any:
        place, goal = (_pointer(context, builder, signature, v, i) for i in (0, 3))
        lines = [
            builder.load(_vector_at(builder, builder.gep(place, [builder.mul(_number(i), v[2])])), align=4)
            for i in range(LANES)
        ]
        half = LANES // 2
        # line i and line i + half, interleaved, become lines 2i and 2i + 1: after log2(LANES) times it is the
        # transpose
        orders = [
            ir.Constant(ir.VectorType(_I32, LANES), [part + i // 2 + LANES * (i % 2) for i in range(LANES)])
            for part in (0, half)
        ]
        width = LANES
        while width > 1:
            lines = [
                builder.shuffle_vector(lines[i], lines[i + half], order)
                for i in range(half)
                for order in orders
            ]
            width //= 2
        for i, line in enumerate(lines):
            builder.store(
                line, _vector_at(builder, builder.gep(goal, [builder.mul(_number(i), v[5])])), align=4
            )
        return context.get_dummy_value()

    i = types.intp
    return types.void(source, i, i, target, i, i), build


@intrinsic
def move(typing: Any, source: Any, at: Any, target: Any, target_at: Any) -> Any:
    """target[target_at : target_at + LANES] = source[at : at + LANES]."""

    def build(context: Any, builder: Any, signature: Any, v: Any) -> Any:
        place, goal = (_pointer(context, builder, signature, v, i) for i in (0, 2))
        builder.store(builder.load(_vector_at(builder, place), align=4), _vector_at(builder, goal), align=4)
        return context.get_dummy_value()

    i = types.intp
    return types.void(source, i, target, i), build


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once; LLVM makes vectors of it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_F32, [_F32] * 3), "llvm.fma.f32"
        )
        return builder.call(name, arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def power_of_two(typing: Any, n: Any) -> Any:
    """2^n of a whole float32 number −127 ≤ n ≤ 127 (2^−127 is 0), put together from its bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # 1.5·2^23 + n has the whole number n in its last bits; a conversion to an integer would be undefined
        # for NaN
        shifted = builder.fadd(arguments[0], ir.Constant(_F32, 1.5 * 2**23), flags=("nsz",))
        whole = builder.add(builder.bitcast(shifted, _I32), ir.Constant(_I32, 127 - 0x4B400000))
        return builder.bitcast(builder.shl(whole, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.float32), build


@intrinsic
def to_bits(typing: Any, x: Any) -> Any:
    """The 32 bits of a float32 number."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], _I32
    )


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    """The float32 number of 32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], _F32
    )
