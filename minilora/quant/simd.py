"""Weights of 4 bits, 32 at a time, on processors with AVX2: three functions of the kernels module again, 2 to 3 times as fast.

LLVM finds no vector instruction for a table lookup, but AVX2 has two. ``vpshufb`` looks up 32 bytes in tables of 16; a level
is a float32 of four bytes, so four lookups, their bytes interleaved, give 32 levels. ``vpermilps`` looks up float32 numbers
in tables of 4, which makes a binary search of 4 steps out of the 15 comparisons that a rank takes. Numba knows no vectors:
``_Floats`` is a type of 32 float32 numbers, and each ``@intrinsic`` writes the LLVM code of one operation on it.

Results have the same bits as those of the kernels module: an operation with fast-math flags of its own is not reassociated,
and ``_sum`` adds in the order of the loop that LLVM makes of ``kernels.matvec`` on AVX2. Everything else, and a processor without
AVX2, takes the kernels module, which is the one to read. CPU time at 4096² NF4, Zen 3, one thread, loops → here: ``dequantize``
5.4 → 2.5 ms in the cache, 6.8 → 4.6 ms to memory (a fill takes 4.2); ``matvec`` 5.7 → 2.4 ms; ``quantize_codebook`` 18 → 9 ms.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.registry import cpu_target
from numba.extending import register_model

from minilora.quant.kernels import SMALLEST_ABSMAX, Array, kernel

intrinsic: Any = extending.intrinsic


@cache
def available() -> bool:
    """Whether Numba compiles for a processor with AVX2; its cache on disk goes by the same list of features."""
    return "+avx2" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


# ---- kernels: arguments as in the kernels module, but of 4 bits, and starts, sizes and block sizes are multiples of 32


@kernel
def quantize_codebook(w: Array, midpoints: Array, block_size: int, absmax: Array, out: Array) -> None:
    """Do what ``kernels.quantize_codebook`` does, for 15 midpoints and whole blocks."""
    tables = _search_tables(midpoints)
    for block in range(absmax.size):
        start = block * block_size
        largest = _all(np.float32(0))
        for i in range(start, start + block_size, 32):
            largest = _larger(largest, _load(w, i))
        absmax[block] = _largest(largest)
        inverse = np.float32(1) / max(absmax[block], SMALLEST_ABSMAX)
        for i in range(start, start + block_size, 32):
            _store_ranks(_times(_load(w, i), _all(inverse)), tables, out, i)


@kernel
def dequantize(
    packed: Array, bits: int, table: Array, scales: Array, offsets: Array, block_size: int, start: int, out: Array
) -> None:
    """Do what ``kernels.dequantize`` does."""
    planes = _byte_planes(table)
    first = start // block_size
    for i in range(0, out.size, 32):
        block = np.uint32((start + i) // 32) // np.uint32(block_size // 32) - first  # whole numbers of 32 bits divide fast
        w = _times(_levels(packed, (start + i) // 2, planes), _all(scales[block]))
        if offsets.size:
            w = _plus(w, _all(offsets[block]))
        _store(w, out, i)


@kernel
def matvec(
    packed: Array, bits: int, table: Array, scales: Array, offsets: Array, block_size: int, start: int, x: Array, out: Array
) -> None:
    """Do what ``kernels.matvec`` does: no weight leaves the registers."""
    planes = _byte_planes(table)
    first = start // block_size
    for r in range(out.size):
        row = start + r * x.size
        dot = _all(np.float32(0))
        for c in range(0, x.size, 32):
            block = np.uint32((row + c) // 32) // np.uint32(block_size // 32) - first
            w = _times(_levels(packed, (row + c) // 2, planes), _all(scales[block]))
            if offsets.size:
                w = _plus(w, _all(offsets[block]))
            dot = _plus(dot, _times(w, _load(x, c)))
        out[r] = _sum(dot)


# ---- 32 float32 numbers in registers; helpers that write LLVM code


class _Floats(types.Type):
    """Numba's type of 32 float32 numbers."""


@register_model(_Floats)
class _FloatsModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _F32x32)


_FLOATS = _Floats("float32 x 32")
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_I8x16, _I8x32, _I8x64, _I8x128 = (ir.VectorType(_I8, n) for n in (16, 32, 64, 128))
_I16x16, _I32x8, _I32x32 = ir.VectorType(_I16, 16), ir.VectorType(_I32, 8), ir.VectorType(_I32, 32)
_F32x8, _F32x16, _F32x32 = (ir.VectorType(_F32, n) for n in (8, 16, 32))
_FLAGS = ("nsz",)  # none would become the flags of the policy ``kernel``, which let LLVM change the order of operations


def _ints(kind: Any, values: Any) -> Any:
    values = list(values)
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _pick(builder: Any, v: Any, indices: Any, other: Any = None) -> Any:
    """Return the elements of v, or of v and other in a row, at constant indices."""
    return builder.shuffle_vector(v, v if other is None else other, _ints(_I32, indices))


def _join(builder: Any, parts: list[Any]) -> Any:
    """Return four vectors of eight as one of 32."""
    a, b = (_pick(builder, parts[i], range(16), parts[i + 1]) for i in (0, 2))
    return _pick(builder, a, range(32), b)


def _interleave(builder: Any, a: Any, b: Any) -> list[Any]:
    """Return a0 b0 a1 b1 … of the lower, then of the upper half of both 128-bit lanes: AVX2's unpack instructions."""
    n = a.type.count // 2
    return [
        _pick(builder, a, [i + o for lane in (0, n) for i in range(lane + half, lane + half + n // 2) for o in (0, 2 * n)], b)
        for half in (0, n // 2)
    ]


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _pointer(context: Any, builder: Any, kind: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


# ---- operations


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
        builder.store(arguments[0], _pointer(context, builder, _F32x32, signature.args[1], *arguments[1:]), align=4)
        return context.get_dummy_value()

    return types.void(values, array, i), build


@intrinsic
def _all(typing: Any, value: Any) -> Any:
    """Return one float32 number 32 times."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = builder.insert_element(ir.Constant(_F32x32, ir.Undefined), arguments[0], ir.Constant(_I32, 0))
        return _pick(builder, one, [0] * 32)

    return _FLOATS(types.float32), build


@intrinsic
def _times(typing: Any, a: Any, b: Any) -> Any:
    """Return a·b, number by number."""
    return _FLOATS(a, b), lambda context, builder, signature, arguments: builder.fmul(*arguments, flags=_FLAGS)


@intrinsic
def _plus(typing: Any, a: Any, b: Any) -> Any:
    """Return a + b, number by number."""
    return _FLOATS(a, b), lambda context, builder, signature, arguments: builder.fadd(*arguments, flags=_FLAGS)


@intrinsic
def _sum(typing: Any, a: Any) -> Any:
    """Return the sum of the 32 numbers: four eights, one after another, then halves and halves."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total = _pick(builder, arguments[0], range(8))
        for k in (8, 16, 24):
            total = builder.fadd(total, _pick(builder, arguments[0], range(k, k + 8)), flags=_FLAGS)
        for n in (4, 2, 1):
            total = builder.fadd(_pick(builder, total, range(n)), _pick(builder, total, range(n, 2 * n)), flags=_FLAGS)
        return builder.extract_element(total, ir.Constant(_I32, 0))

    return types.float32(a), build


@intrinsic
def _larger(typing: Any, a: Any, b: Any) -> Any:
    """Return max(a, |b|), number by number, for a of at least 0; by their bits, of which NaN's are the largest."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (builder.bitcast(v, _I32x32) for v in arguments)
        b = builder.and_(b, _ints(_I32, [0x7FFFFFFF] * 32))
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), _F32x32)

    return _FLOATS(a, b), build


@intrinsic
def _largest(typing: Any, a: Any) -> Any:
    """Return the largest of 32 numbers of at least 0, by their bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        largest = _call(builder, "llvm.vector.reduce.umax.v32i32", _I32, builder.bitcast(arguments[0], _I32x32))
        return builder.bitcast(largest, _F32)

    return types.float32(a), build


@intrinsic
def _byte_planes(typing: Any, table: Any) -> Any:
    """Return 128 bytes: the first byte of each of the 16 levels, twice (for two lanes), then the second, third and fourth.

    ``table`` is ``kernels.lookup_table`` of 4 bits, where table[16·code, 0] is the level of a code.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        levels = ir.Constant(_F32x16, ir.Undefined)
        for code in range(16):
            place = _pointer(context, builder, _F32, signature.args[0], arguments[0], ir.Constant(_I64, 2 * 16 * code))
            levels = builder.insert_element(levels, builder.load(place), ir.Constant(_I32, code))
        planes = [4 * code + k for k in range(4) for lane in (0, 1) for code in range(16)]
        return builder.bitcast(_pick(builder, builder.bitcast(levels, _I8x64), planes), _F32x32)

    return _FLOATS(table), build


@intrinsic
def _levels(typing: Any, packed: Any, byte: Any, planes: Any) -> Any:
    """Return the levels of the 32 codes in packed[byte : byte + 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed = builder.load(_pointer(context, builder, _I8x16, signature.args[0], *arguments[:2]), align=1)
        # Each byte twice, in an order that interleaving two times, which cannot leave a lane, puts right.
        order = [4 * group + 2 * lane + i for lane in (0, 1) for group in range(4) for i in (0, 0, 1, 1)]
        twice = builder.bitcast(_pick(builder, packed, order), _I16x16)
        first = builder.and_(builder.lshr(twice, _ints(_I16, [4] * 16)), _ints(_I16, [0x000F] * 16))
        second = builder.and_(twice, _ints(_I16, [0x0F00] * 16))
        codes = builder.bitcast(builder.or_(first, second), _I8x32)

        planes = builder.bitcast(arguments[2], _I8x128)
        tables = [_pick(builder, planes, range(k, k + 32)) for k in (0, 32, 64, 96)]
        found = [_call(builder, "llvm.x86.avx2.pshuf.b", _I8x32, table, codes) for table in tables]
        low, high = (_interleave(builder, *found[k : k + 2]) for k in (0, 2))
        eights = []
        for a, b in zip(low, high, strict=True):
            eights += _interleave(builder, builder.bitcast(a, _I16x16), builder.bitcast(b, _I16x16))
        return _join(builder, [builder.bitcast(eight, _F32x8) for eight in eights])

    return _FLOATS(packed, byte, planes), build


@intrinsic
def _search_tables(typing: Any, midpoints: Any) -> Any:
    """Return five tables of 4: a value of rank k after step s of the search is next compared with entry -k mod 4 of table s.

    After three steps there are 8 ranks: those from 4 on are in the fifth table.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high = (  # of 15 midpoints, the eighth is in both
            builder.load(_pointer(context, builder, _F32x8, signature.args[0], arguments[0], ir.Constant(_I64, k)), align=4)
            for k in (0, 7)
        )
        order = [0] * 32
        for step in range(4):
            for k in range(2**step):
                middle = (2 * k + 1) * 2 ** (3 - step) - 1
                order[4 * (step + k // 4) + -k % 4] = middle if middle < 8 else middle + 1
        return _pick(builder, low, order, high)

    return _FLOATS(midpoints), build


@intrinsic
def _store_ranks(typing: Any, values: Any, tables: Any, out: Any, i: Any) -> Any:
    """Write the count of midpoints below each of 32 values to out[i : i + 32] uint8, by a binary search."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tables = [_pick(builder, arguments[1], 2 * [*range(k, k + 4)]) for k in range(0, 20, 4)]
        ranks = []
        for k in range(0, 32, 8):
            x = _pick(builder, arguments[0], range(k, k + 8))
            rank = upper = _ints(_I32, [0] * 8)  # minus the rank, since true is -1
            for step in range(4):
                middle = _call(builder, "llvm.x86.avx.vpermilvar.ps.256", _F32x8, tables[step], rank)
                if step == 3:
                    last = _call(builder, "llvm.x86.avx.vpermilvar.ps.256", _F32x8, tables[4], rank)
                    middle = builder.select(upper, last, middle)
                above = builder.fcmp_ordered(">", x, middle)
                upper = above if step == 0 else upper
                rank = builder.add(builder.add(rank, rank), builder.sext(above, _I32x8))
            ranks.append(rank)
        codes = builder.neg(builder.trunc(_join(builder, ranks), _I8x32))
        builder.store(codes, _pointer(context, builder, _I8x32, signature.args[2], *arguments[2:]), align=1)
        return context.get_dummy_value()

    return types.void(values, tables, out, i), build
