"""Operations that Numba lacks, each written as LLVM code by one `@intrinsic`.

Three kinds of reader use them:

* `microkernel` takes the helpers, such as `pointer` and `pick`, and writes its own tiles;
* `rows` takes operations on one number: `fma`, `power_of_two`, `to_bits`, `from_bits`;
* `codes_vectors` and `block_vectors` take vectors of 32 float32 numbers, which are two registers of AVX-512
  or four of AVX2. Numba sees such a vector as one value of type `FLOATS`.

An operation with flags of its own keeps them. An operation without flags gets those of the policy `kernel`,
which let LLVM change the order of additions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.imputils import impl_ret_borrowed
from numba.extending import register_model

from minilora.kernels.jit import AVX2, AVX512, F16C

intrinsic: Any = extending.intrinsic


@cache
def available() -> bool:
    """Return whether the processor has what vectors of 32 numbers need: AVX2, FMA and float16 conversion."""
    return AVX2 and F16C


def wide() -> bool:
    """Return whether operations use AVX-512 rather than AVX2."""
    return AVX512


# --- helpers that write LLVM code --------------------------------------------------------------------------

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
KEEP_ORDER = ("nsz",)
"""Flags of an operation: without any it would get the policy's, and LLVM might reorder additions."""


def vector(kind: Any, n: int) -> Any:
    """Return LLVM's type of n numbers."""
    return ir.VectorType(kind, n)


def number(i: int) -> Any:
    """Return a constant int64."""
    return ir.Constant(I64, i)


def numbers(kind: Any, values: Iterable[Any]) -> Any:
    """Return a constant vector."""
    values = list(values)
    return ir.Constant(vector(kind, len(values)), values)


def pick(builder: Any, v: Any, indices: Iterable[int], other: Any = None) -> Any:
    """Return the elements of v, or of v and then other, at constant indices."""
    return builder.shuffle_vector(v, v if other is None else other, numbers(I32, indices))


def broadcast(builder: Any, value: Any, n: int) -> Any:
    """Return one number n times."""
    one = builder.insert_element(ir.Constant(vector(value.type, n), ir.Undefined), value, I32(0))
    return pick(builder, one, [0] * n)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call a function of LLVM or of the C library."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a·b + c, rounded once: numbers or vectors of float32."""
    suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    return call(builder, f"llvm.fma.{suffix}", a.type, a, b, c)


def start(context: Any, builder: Any, signature: Any, arguments: Any, array: int) -> Any:
    """Return the pointer to the first element of the flat array arguments[array]."""
    return context.make_array(signature.args[array])(context, builder, arguments[array]).data


def pointer(context: Any, builder: Any, signature: Any, arguments: Any, array: int, kind: Any = None) -> Any:
    """Return the pointer, to `kind`, to element arguments[array + 1] of the flat array arguments[array]."""
    place = builder.gep(start(context, builder, signature, arguments, array), [arguments[array + 1]])
    return place if kind is None else builder.bitcast(place, kind.as_pointer())


def prefetch(builder: Any, place: Any, write: bool, level: int) -> None:
    """Fetch the cache line around a place, into all caches (`level` 3) or from the second on (2).

    The place may lie outside all arrays.
    """
    flags = [I32(int(flag)) for flag in (write, level, True)]  # the last: of data, not of code
    call(builder, "llvm.prefetch.p0", ir.VoidType(), builder.bitcast(place, I8.as_pointer()), *flags)


# --- arrays and single numbers -----------------------------------------------------------------------------


@intrinsic
def read_only(typing: Any, array: Any) -> Any:
    """Return the same array, typed as one that is only read.

    Numba compiles a kernel once per mixture of writable and read-only arguments. All our kernels read from
    read-only arrays, so a kernel that reads its own scratch passes `read_only(scratch)`.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return impl_ret_borrowed(context, builder, signature.return_type, arguments[0])

    return array.copy(readonly=True)(array), build


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a·b + c, rounded once. LLVM makes vectors of it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return multiply_add(builder, *arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def power_of_two(typing: Any, n: Any) -> Any:
    """Return 2^n of a whole float32 number −127 ≤ n ≤ 127, made from its bits; 2^−127 gives 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # The last bits of 1.5·2^23 + n are n. Converting NaN to an integer would be undefined.
        shifted = builder.fadd(arguments[0], ir.Constant(F32, 1.5 * 2**23), flags=KEEP_ORDER)
        whole = builder.add(builder.bitcast(shifted, I32), I32(127 - 0x4B400000))
        return builder.bitcast(builder.shl(whole, I32(23)), F32)

    return types.float32(types.float32), build


@intrinsic
def to_bits(typing: Any, x: Any) -> Any:
    """Return the 32 bits of a float32 number as int32."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], I32
    )


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    """Return the float32 number of 32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], F32
    )


# --- vectors of 32 numbers: memory -------------------------------------------------------------------------


class Floats(types.Type):
    """Numba's type of 32 float32 numbers."""


@register_model(Floats)
class _FloatsModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, F32x32)


FLOATS = Floats("float32 x 32")
I32x32, F32x8, F32x16, F32x32 = vector(I32, 32), vector(F32, 8), vector(F32, 16), vector(F32, 32)


@intrinsic
def load(typing: Any, array: Any, i: Any) -> Any:
    """Return array[i : i + 32]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(pointer(context, builder, signature, arguments, 0, F32x32), align=4)

    return FLOATS(array, i), build


@intrinsic
def store(typing: Any, values: Any, array: Any, i: Any) -> Any:
    """Do array[i : i + 32] = values."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[0], pointer(context, builder, signature, arguments, 1, F32x32), align=4)
        return context.get_dummy_value()

    return types.void(values, array, i), build


@intrinsic
def fetch(typing: Any, array: Any, i: Any) -> Any:
    """Prefetch array[i : i + 32], to be read or, if the array is writable, written. It may lie past the end.

    AVX-512 stores alone would wait for one cache line after another.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        place = pointer(context, builder, signature, arguments, 0, I8)
        for byte in range(0, 32 * kind.dtype.bitwidth // 8, 64):
            prefetch(builder, builder.gep(place, [number(byte)]), write=kind.mutable, level=3)
        return context.get_dummy_value()

    return types.void(array, i), build


@intrinsic
def float_at(typing: Any, array: Any, i: Any) -> Any:
    """Return array[i] as float32. In uint16 it is a float16; in uint8, bytes i and i + 1 are one."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype = signature.args[0].dtype
        kind = F32 if dtype == types.float32 else F16
        place = pointer(context, builder, signature, arguments, 0, kind)
        value = builder.load(place, align=dtype.bitwidth // 8)
        return builder.fpext(value, F32) if kind != F32 else value

    return types.float32(array, i), build


# --- vectors of 32 numbers: arithmetic ---------------------------------------------------------------------


@intrinsic
def repeat(typing: Any, value: Any) -> Any:
    """Return one float32 number 32 times."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return broadcast(builder, arguments[0], 32)

    return FLOATS(types.float32), build


@intrinsic
def times(typing: Any, a: Any, b: Any) -> Any:
    """Return a·b, number by number."""
    return FLOATS(a, b), lambda context, builder, signature, arguments: builder.fmul(
        *arguments, flags=KEEP_ORDER
    )


@intrinsic
def plus(typing: Any, a: Any, b: Any) -> Any:
    """Return a + b, number by number."""
    return FLOATS(a, b), lambda context, builder, signature, arguments: builder.fadd(
        *arguments, flags=KEEP_ORDER
    )


@intrinsic
def plus_product(typing: Any, sums: Any, a: Any, b: Any) -> Any:
    """Return sums + a·b, number by number, each rounded once."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, a, b = arguments
        return multiply_add(builder, a, b, sums)

    return FLOATS(sums, a, b), build


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """Return the sum of the 32 numbers: four vectors of eight in order, then halves and halves."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums = pick(builder, arguments[0], range(8))
        for k in (8, 16, 24):
            sums = builder.fadd(sums, pick(builder, arguments[0], range(k, k + 8)), flags=KEEP_ORDER)
        return add_halves(builder, sums)

    return types.float32(a), build


def add_halves(builder: Any, v: Any) -> Any:
    """Return the sum of a vector: its two halves are added until one number is left."""
    n = v.type.count
    while n > 1:
        n //= 2
        v = builder.fadd(pick(builder, v, range(n)), pick(builder, v, range(n, 2 * n)), flags=KEEP_ORDER)
    return builder.extract_element(v, I32(0))


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """Return max(a, |b|), number by number, for a ≥ 0. It compares bits, so that NaN is the largest."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (builder.bitcast(v, I32x32) for v in arguments)
        b = builder.and_(b, numbers(I32, [0x7FFFFFFF] * 32))
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), F32x32)

    return FLOATS(a, b), build


@intrinsic
def largest(typing: Any, a: Any) -> Any:
    """Return the largest of 32 numbers ≥ 0, by their bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], I32x32)
        return builder.bitcast(call(builder, "llvm.vector.reduce.umax.v32i32", I32, bits), F32)

    return types.float32(a), build
