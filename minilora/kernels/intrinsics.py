"""Vectors of 32 float32 numbers for Numba, which knows none: each ``@intrinsic`` writes the LLVM code of one
operation.

A vector is two registers of AVX-512 or four of AVX2. The flags of the policy ``kernel``, which let LLVM
change the order of additions, do not reach these operations: an operation that has flags of its own keeps
them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import register_model

from minilora.kernels.jit import FEATURES
from minilora.kernels.microkernel import prefetch

intrinsic: Any = extending.intrinsic


def wide() -> bool:
    """Whether operations use AVX-512, else AVX2."""
    return "+avx512f" in FEATURES


# ---- the type; helpers that write LLVM code


class _Floats(types.Type):
    """Numba's type of 32 float32 numbers."""


@register_model(_Floats)
class _FloatsModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _F32x32)


_FLOATS = _Floats("float32 x 32")
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_I8x16, _I8x32, _I8x64, _I8x128 = (ir.VectorType(_I8, n) for n in (16, 32, 64, 128))
_I16x16 = ir.VectorType(_I16, 16)
_I32x4, _I32x8, _I32x16, _I32x32 = (ir.VectorType(_I32, n) for n in (4, 8, 16, 32))
_F32x4, _F32x8, _F32x16, _F32x32 = (ir.VectorType(_F32, n) for n in (4, 8, 16, 32))
_FLAGS = (
    "nsz",
)  # none would become the flags of the policy ``kernel``, which let LLVM change the order of operations


def _ints(kind: Any, values: Any) -> Any:
    values = list(values)
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _pick(builder: Any, v: Any, indices: Any, other: Any = None) -> Any:
    """Return the elements of v, or of v and other in a row, at constant indices."""
    return builder.shuffle_vector(v, v if other is None else other, _ints(_I32, indices))


def _spread(builder: Any, value: Any, n: int) -> Any:
    """Return one number n times."""
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, n), ir.Undefined), value, _I32(0))
    return _pick(builder, one, [0] * n)


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _pointer(context: Any, builder: Any, kind: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _lookup16(builder: Any, table: Any, indices: Any) -> Any:
    """Return entries of a table of 16 float32 numbers at 16 indices, of which the lowest four bits count."""
    return _call(builder, "llvm.x86.avx512.permvar.sf.512", _F32x16, table, indices)


def _lookup8(builder: Any, table: Any, indices: Any) -> Any:
    """Return entries of a table of 8 float32 numbers at 8 indices."""
    return _call(builder, "llvm.x86.avx2.permps", _F32x8, table, indices)


# ---- operations: memory


@intrinsic
def _load(typing: Any, array: Any, i: Any) -> Any:
    """Return array[i : i + 32]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer(context, builder, _F32x32, signature.args[0], *arguments), align=4)

    return _FLOATS(array, i), build


@intrinsic
def _store(typing: Any, values: Any, array: Any, i: Any) -> Any:
    """Do array[i : i + 32] = values."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(
            arguments[0], _pointer(context, builder, _F32x32, signature.args[1], *arguments[1:]), align=4
        )
        return context.get_dummy_value()

    return types.void(values, array, i), build


@intrinsic
def _prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Ask for array[i : i + 32], which is soon read, or, if the array is writable, written; it may lie behind
    the end.

    Stores alone wait for their lines one after another: with this, AVX-512 fills the cache, and memory, twice
    as fast.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        place = _pointer(context, builder, _I8, kind, *arguments)
        for byte in range(0, 32 * kind.dtype.bitwidth // 8, 64):
            prefetch(builder, builder.gep(place, [ir.Constant(_I64, byte)]), write=kind.mutable, level=3)
        return context.get_dummy_value()

    return types.void(array, i), build


@intrinsic
def _store_past(typing: Any, before: Any, now: Any, shift: Any, array: Any, i: Any) -> Any:
    """Do array[i : i + 32] = now, of which the last ``shift`` numbers are left to the next call, whose
    ``before`` they are.

    What is written are whole vectors, which begin ``shift`` numbers before array[i], at a multiple of their
    size in memory. ``shift`` is from 0 to 15, of which AVX2 needs the rest of a division by 8.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before, now, shift, array, i = arguments
        n = 16 if wide() else 8
        shift = builder.and_(shift, ir.Constant(shift.type, n - 1))
        every, lanes = _spread(builder, builder.trunc(shift, _I32), n), _ints(_I32, range(n))
        turn = builder.and_(builder.sub(lanes, every), _ints(_I32, [n - 1] * n))
        rotate = _lookup16 if wide() else _lookup8
        parts = [
            _pick(builder, before, range(32 - n, 32)),
            *(_pick(builder, now, range(k, k + n)) for k in range(0, 32, n)),
        ]
        parts = [rotate(builder, part, turn) for part in parts]
        place = _pointer(context, builder, parts[0].type, signature.args[3], array, builder.sub(i, shift))
        for k in range(32 // n):
            line = builder.select(builder.icmp_unsigned("<", lanes, every), parts[k], parts[k + 1])
            store = builder.store(line, builder.gep(place, [_I32(k)]), align=4 * n)
            store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(before, now, shift, array, i), build


@intrinsic
def _fence(typing: Any) -> Any:
    """Finish what ``_store_past`` began, before other threads read it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.sse.sfence", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _number(typing: Any, array: Any, i: Any) -> Any:
    """Return array[i] as float32; uint16 numbers are the bits of float16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type = signature.args[0]
        kind = ir.HalfType() if array_type.dtype == types.uint16 else _F32
        number = builder.load(
            _pointer(context, builder, kind, array_type, *arguments), align=array_type.dtype.bitwidth // 8
        )
        return builder.fpext(number, _F32) if kind != _F32 else number

    return types.float32(array, i), build


# ---- operations: numbers


@intrinsic
def _all(typing: Any, value: Any) -> Any:
    """Return one float32 number 32 times."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0], 32)

    return _FLOATS(types.float32), build


@intrinsic
def _times(typing: Any, a: Any, b: Any) -> Any:
    """Return a·b, number by number."""
    return _FLOATS(a, b), lambda context, builder, signature, arguments: builder.fmul(
        *arguments, flags=_FLAGS
    )


@intrinsic
def _plus(typing: Any, a: Any, b: Any) -> Any:
    """Return a + b, number by number."""
    return _FLOATS(a, b), lambda context, builder, signature, arguments: builder.fadd(
        *arguments, flags=_FLAGS
    )


@intrinsic
def _plus_product(typing: Any, sums: Any, a: Any, b: Any) -> Any:
    """Return sums + a·b, number by number, each rounded once."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.fma.v32f32", _F32x32, *arguments[1:], arguments[0])

    return _FLOATS(sums, a, b), build


@intrinsic
def _sum(typing: Any, a: Any) -> Any:
    """Return the sum of the 32 numbers: four eights, one after another, then halves and halves."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total = _pick(builder, arguments[0], range(8))
        for k in (8, 16, 24):
            total = builder.fadd(total, _pick(builder, arguments[0], range(k, k + 8)), flags=_FLAGS)
        for n in (4, 2, 1):
            total = builder.fadd(
                _pick(builder, total, range(n)), _pick(builder, total, range(n, 2 * n)), flags=_FLAGS
            )
        return builder.extract_element(total, ir.Constant(_I32, 0))

    return types.float32(a), build


@intrinsic
def _larger(typing: Any, a: Any, b: Any) -> Any:
    """Return max(a, |b|), number by number, for a of at least 0; by their bits, of which NaN's are the
    largest."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (builder.bitcast(v, _I32x32) for v in arguments)
        b = builder.and_(b, _ints(_I32, [0x7FFFFFFF] * 32))
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), _F32x32)

    return _FLOATS(a, b), build


@intrinsic
def _largest(typing: Any, a: Any) -> Any:
    """Return the largest of 32 numbers of at least 0, by their bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        largest = _call(
            builder, "llvm.vector.reduce.umax.v32i32", _I32, builder.bitcast(arguments[0], _I32x32)
        )
        return builder.bitcast(largest, _F32)

    return types.float32(a), build


# ---- operations: looking up and searching


def _join(builder: Any, parts: list[Any]) -> Any:
    """Return four vectors of eight as one of 32."""
    a, b = (_pick(builder, parts[i], range(16), parts[i + 1]) for i in (0, 2))
    return _pick(builder, a, range(32), b)


def _interleave(builder: Any, a: Any, b: Any) -> list[Any]:
    """Return a0 b0 a1 b1 … of the lower, then of the upper half of both 128-bit lanes: AVX2's unpack
    instructions."""
    n = a.type.count // 2
    return [
        _pick(
            builder,
            a,
            [i + o for lane in (0, n) for i in range(lane + half, lane + half + n // 2) for o in (0, 2 * n)],
            b,
        )
        for half in (0, n // 2)
    ]


@intrinsic
def _tables(typing: Any, table: Any) -> Any:
    """Return what ``_weights`` looks up in: with AVX-512 the 16 levels, twice.

    With AVX2 it is 128 bytes: the first byte of each level, twice (for two lanes), then the second, third and
    fourth. ``table`` is ``kernels.lookup_table`` of 4 bits, where table[16·code, 0] is the level of a code.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        levels = ir.Constant(_F32x16, ir.Undefined)
        for code in range(16):
            place = _pointer(
                context, builder, _F32, signature.args[0], arguments[0], ir.Constant(_I64, 2 * 16 * code)
            )
            levels = builder.insert_element(levels, builder.load(place), ir.Constant(_I32, code))
        if wide():
            return _pick(builder, levels, 2 * [*range(16)])
        planes = [4 * code + k for k in range(4) for lane in (0, 1) for code in range(16)]
        return builder.bitcast(_pick(builder, builder.bitcast(levels, _I8x64), planes), _F32x32)

    return _FLOATS(table), build


@intrinsic
def _weights(typing: Any, packed: Any, byte: Any, tables: Any, scale: Any, offset: Any) -> Any:
    """Return level·scale + offset of the 32 codes in packed[byte : byte + 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tables, scale, offset = arguments[2:]
        codes = builder.load(_pointer(context, builder, _I8x16, signature.args[0], *arguments[:2]), align=1)
        scaled = lambda v: builder.fadd(builder.fmul(v, scale, flags=_FLAGS), offset, flags=_FLAGS)
        return _find_wide(builder, codes, scaled(tables)) if wide() else scaled(_find(builder, codes, tables))

    return _FLOATS(packed, byte, tables, scale, offset), build


def _find_wide(builder: Any, packed: Any, table: Any) -> Any:
    """Return the entries of 32 codes. Eight lie in a number of 32 bits, which each lane shifts until its code
    is lowest."""
    table, words = _pick(builder, table, range(16)), builder.bitcast(packed, _I32x4)
    shifts = _ints(_I32, 2 * [4, 0, 12, 8, 20, 16, 28, 24])
    a, b = (
        _lookup16(builder, table, builder.lshr(_pick(builder, words, 8 * [k] + 8 * [k + 1]), shifts))
        for k in (0, 2)
    )
    return _pick(builder, a, range(32), b)


def _find(builder: Any, packed: Any, planes: Any) -> Any:
    """Return the levels of 32 codes, byte by byte."""
    # Each byte twice, in an order that interleaving two times, which cannot leave a lane, puts right.
    order = [4 * group + 2 * lane + i for lane in (0, 1) for group in range(4) for i in (0, 0, 1, 1)]
    twice = builder.bitcast(_pick(builder, packed, order), _I16x16)
    first = builder.and_(builder.lshr(twice, _ints(_I16, [4] * 16)), _ints(_I16, [0x000F] * 16))
    second = builder.and_(twice, _ints(_I16, [0x0F00] * 16))
    codes = builder.bitcast(builder.or_(first, second), _I8x32)

    planes = builder.bitcast(planes, _I8x128)
    tables = [_pick(builder, planes, range(k, k + 32)) for k in (0, 32, 64, 96)]
    found = [_call(builder, "llvm.x86.avx2.pshuf.b", _I8x32, table, codes) for table in tables]
    low, high = (_interleave(builder, *found[k : k + 2]) for k in (0, 2))
    eights = []
    for a, b in zip(low, high, strict=True):
        eights += _interleave(builder, builder.bitcast(a, _I16x16), builder.bitcast(b, _I16x16))
    return _join(builder, [builder.bitcast(eight, _F32x8) for eight in eights])


@intrinsic
def _search_tables(typing: Any, midpoints: Any) -> Any:
    """Return what ``_store_ranks`` searches in. After s steps a value of rank k among 2^s is compared with
    the middle of the k-th of 2^s parts of the midpoints.

    With AVX-512 that is entry 2^s + k of one table. With AVX2 it is entry -k mod 4 of table s of five tables
    of 4: after three steps there are 8 ranks, and those from 4 on are in the fifth table.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high = (  # of 15 midpoints, the eighth is in both
            builder.load(
                _pointer(context, builder, _F32x8, signature.args[0], arguments[0], ir.Constant(_I64, k)),
                align=4,
            )
            for k in (0, 7)
        )
        order = [0] * 32
        for step in range(4):
            for k in range(2**step):
                middle = (2 * k + 1) * 2 ** (3 - step) - 1
                entry = 2**step + k if wide() else 4 * (step + k // 4) + -k % 4
                order[entry] = middle if middle < 8 else middle + 1
        return _pick(builder, low, order, high)

    return _FLOATS(midpoints), build


@intrinsic
def _store_ranks(typing: Any, values: Any, tables: Any, out: Any, i: Any) -> Any:
    """Write the count of midpoints below each of 32 values to out[i : i + 32] uint8, by a binary search."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ranks = (_ranks_wide if wide() else _ranks)(builder, *arguments[:2])
        builder.store(ranks, _pointer(context, builder, _I8x32, signature.args[2], *arguments[2:]), align=1)
        return context.get_dummy_value()

    return types.void(values, tables, out, i), build


def _ranks_wide(builder: Any, values: Any, tables: Any) -> Any:
    """Return 32 ranks as bytes. The sign bit of middle - value, 1 if the value is above, becomes the lowest
    bit of the entry."""
    table, found = _pick(builder, tables, range(16)), []
    for k in (0, 16):
        x, entry = _pick(builder, values, range(k, k + 16)), _ints(_I32, [1] * 16)
        for _ in range(4):
            difference = builder.fsub(
                _lookup16(builder, table, entry), x, flags=("arcp",)
            )  # not nsz: a tie is +0
            difference = builder.bitcast(difference, _I32x16)
            entry = _call(builder, "llvm.fshl.v16i32", _I32x16, entry, difference, _ints(_I32, [1] * 16))
        found.append(entry)
    return builder.and_(
        builder.trunc(_pick(builder, found[0], range(32), found[1]), _I8x32), _ints(_I8, [15] * 32)
    )


def _ranks(builder: Any, values: Any, tables: Any) -> Any:
    """Return 32 ranks as bytes. A comparison is -1 if the value is above, so that the rank is counted
    downwards."""
    split = [_pick(builder, tables, 2 * [*range(k, k + 4)]) for k in range(0, 20, 4)]
    ranks = []
    for k in range(0, 32, 8):
        x = _pick(builder, values, range(k, k + 8))
        rank = upper = _ints(_I32, [0] * 8)
        for step in range(4):
            middle = _call(builder, "llvm.x86.avx.vpermilvar.ps.256", _F32x8, split[step], rank)
            if step == 3:
                last = _call(builder, "llvm.x86.avx.vpermilvar.ps.256", _F32x8, split[4], rank)
                middle = builder.select(upper, last, middle)
            above = builder.fcmp_ordered(">", x, middle)
            upper = above if step == 0 else upper
            rank = builder.add(builder.add(rank, rank), builder.sext(above, _I32x8))
        ranks.append(rank)
    return builder.neg(builder.trunc(_join(builder, ranks), _I8x32))


# ---- operations: 128 codes where they lie, AVX-512 alone


@intrinsic
def _dots(typing: Any, packed: Any, byte: Any, tables: Any, ordered: Any, at: Any) -> Any:
    """Return Σ level·x of 128 codes, 4 in each of 32 sums: in 16 lanes codes of even steps, then in 16 those
    of odd steps.

    Lane k holds codes 8k to 8k + 7, in a number of 32 bits: step s looks up the one of its bits 4s to 4s + 3.
    ``ordered``, from ``at`` on, has x in the same order.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, byte, tables, ordered, at = arguments
        words = builder.load(_pointer(context, builder, _I32x16, signature.args[0], packed, byte), align=1)
        table, place = (
            _pick(builder, tables, range(16)),
            _pointer(context, builder, _F32x16, signature.args[3], ordered, at),
        )
        sums = 2 * [ir.Constant(_F32x16, [0.0] * 16)]
        for step in range(8):
            level = _lookup16(builder, table, builder.lshr(words, _ints(_I32, [4 * step] * 16)))
            x = builder.load(builder.gep(place, [_I32(step)]), align=4)
            sums.append(_call(builder, "llvm.fma.v16f32", _F32x16, level, x, sums[step]))
        return _pick(builder, sums[8], range(32), sums[9])

    return _FLOATS(packed, byte, tables, ordered, at), build


@intrinsic
def _lane_blocks(typing: Any, block_size: Any) -> Any:
    """Return, as whole numbers of 32 bits, which of up to 4 blocks each lane of ``_dots`` belongs to."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = _spread(builder, builder.trunc(arguments[0], _I32), 32)
        return builder.bitcast(builder.udiv(_ints(_I32, 2 * [*range(0, 128, 8)]), size), _F32x32)

    return _FLOATS(block_size), build


@intrinsic
def _by_lane(typing: Any, array: Any, block: Any, count: Any, lane_blocks: Any) -> Any:
    """Return array[block : block + count], up to 4 numbers as ``_number`` reads them, each in the lanes of
    its block."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, block, count, lane_blocks = arguments
        half = signature.args[0].dtype == types.uint16
        kind = ir.VectorType(_I16 if half else _I32, 4)
        place = _pointer(context, builder, kind, signature.args[0], array, block)
        there = builder.icmp_unsigned(
            "<", _ints(_I32, range(4)), _spread(builder, builder.trunc(count, _I32), 4)
        )
        name = f"llvm.masked.load.v4i{kind.element.width}.p0"  # what lies behind the array is not read
        four = _call(
            builder, name, kind, place, _I32(kind.element.width // 8), there, _ints(kind.element, [0] * 4)
        )
        four = builder.bitcast(four, ir.VectorType(ir.HalfType(), 4) if half else _F32x4)
        four = builder.fpext(four, _F32x4) if half else four
        lanes = _pick(builder, builder.bitcast(lane_blocks, _I32x32), range(16))
        return _pick(
            builder, _lookup16(builder, _pick(builder, four, 4 * [*range(4)]), lanes), 2 * [*range(16)]
        )

    return _FLOATS(array, block, count, lane_blocks), build
