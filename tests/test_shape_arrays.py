"""Arrays without data have the shape, dtype, strides and memory that NumPy's own results have, operation by
operation."""

from __future__ import annotations

import tracemalloc
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.memory.shapes import Meter, ShapeArray, metered

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def array_of(shape, dtype=F32, order=None):
    """A real array of this shape whose axes lie in memory in this order, from the slowest on."""
    order = tuple(range(len(shape))) if order is None else order
    made = np.ones([shape[a] for a in order], dtype)
    return made.transpose(np.argsort(order))


def shape_of(real):
    """The same without data, strides and all."""
    order = sorted(range(real.ndim), key=lambda a: -real.strides[a])
    fresh = ShapeArray.new(tuple(real.shape[a] for a in order), real.dtype)
    return fresh.transpose(*np.argsort(order)) if real.ndim else fresh


def owner(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def lengthy(array):
    """Strides along the axes that are more than one long; the others never matter."""
    return tuple(s for n, s in zip(array.shape, array.strides, strict=True) if n > 1)


def assert_alike(operation, *operands):
    """Run it on real arrays and on their shapes; compare the result, and whether it is new."""
    shapes = [shape_of(x) if isinstance(x, np.ndarray) else x for x in operands]
    for x, s in zip(operands, shapes, strict=True):
        if isinstance(x, np.ndarray):
            assert (s.shape, s.dtype, lengthy(s.ghost)) == (x.shape, x.dtype, lengthy(x)), (
                "the operand itself"
            )
    with metered(Meter()) as meter:
        found, expected = operation(*shapes), operation(*operands)
        assert isinstance(found, ShapeArray)
        assert (found.shape, found.dtype, found.size, found.ndim, found.nbytes) == (
            expected.shape,
            expected.dtype,
            expected.size,
            expected.ndim,
            expected.nbytes,
        )
        assert found.flags.c_contiguous == expected.flags.c_contiguous
        if expected.size:
            assert lengthy(found.ghost) == lengthy(expected)
        mine = [s.buffer for s in shapes if isinstance(s, ShapeArray)]
        theirs = [owner(x) for x in operands if isinstance(x, np.ndarray)]
        assert [found.buffer is b for b in mine] == [owner(expected) is o for o in theirs]
        fresh = not any(found.buffer is b for b in mine)
        assert meter.live == (owner(expected).nbytes if fresh else 0)
    return found


A, B, ROW, COLUMN = (2, 3, 4, 5), (3, 1, 5), (5,), (2, 3, 4, 1)
ROWS, COLUMNS = np.array([0, 2, 1, 1]), np.array([3, 0, 1, 2])

CASES = {
    "+": (lambda a, b: a + b, A, A),
    "- broadcast": (lambda a, b: a - b, A, B),
    "* row": (lambda a, b: a * b, A, ROW),
    "/ column": (lambda a, b: a / b, A, COLUMN),
    "row on the left": (lambda a, b: b * a, A, ROW),
    "both grow": (lambda a, b: a + b, (4, 1), (3, 1, 5)),
    "negative": (lambda a: -a, A),
    "abs": (lambda a: np.abs(a), A),
    "python int": (lambda a: 1 + a, A),
    "python float": (lambda a: a * 0.5, A),
    "1 - x": (lambda a: 1 - a, A),
    "float32 scalar": (lambda a: a * np.float32(2), A),
    "scalar on the left": (lambda a: np.float32(2) * a, A),
    "float64 scalar": (lambda a: np.float64(2) * a, A),
    "int64 scalar": (lambda a: a * np.int64(2), A),
    "comparison": (lambda a, b: a >= b, A, ROW),
    "comparison with a number": (lambda a: a >= np.float32(0.1), A),
    "equal": (lambda a, b: a == b, A, A),
    "exp": (np.exp, A),
    "sqrt of a product": (lambda a: np.sqrt(a * a), A),
    "maximum": (lambda a: np.maximum(a, np.float32(1)), A),
    "reciprocal": (np.reciprocal, A),
    "negative()": (np.negative, A),
    "out=": (lambda a, b: np.subtract(a, b, out=a), A, A),
    "third is out": (lambda a, b: np.multiply(a, b, a), A, ROW),
    "in place": (lambda a, b: a.__iadd__(b), A, ROW),
    "in place, scalar": (lambda a: a.__imul__(np.float32(2)), A),
    "in place, other type": (
        lambda a: (
            a.__imul__(np.ones(A, np.uint8))
            if isinstance(a, np.ndarray)
            else a.__imul__(ShapeArray.new(A, np.uint8))
        ),
        A,
    ),
    "matmul": (lambda a, b: a @ b, (3, 4), (4, 5)),
    "matmul, batch": (lambda a, b: a @ b, (2, 3, 4, 5), (3, 5, 2)),
    "matmul, transposed": (lambda a, b: a @ b.T, (3, 4), (5, 4)),
    "matmul broadcast": (lambda a, b: a @ b, (2, 1, 4, 5), (3, 5, 2)),
    "matmul out=": (lambda a, b: np.matmul(a, a, out=b[:, 1:4]), (3, 3), (3, 8)),
    "reshape": (lambda a: a.reshape(6, 20), A),
    "reshape with -1": (lambda a: a.reshape(-1, 5), A),
    "reshape a tuple": (lambda a: a.reshape((2, 12, -1)), A),
    "flat": (lambda a: a.reshape(-1), A),
    "reshape of a transpose": (lambda a: a.transpose(0, 2, 1, 3).reshape(2, 4, 15), A),
    "reshape that splits": (lambda a: a.swapaxes(1, 2).reshape(2, 2, 2, 3, 5), A),
    "reshape of a slice": (lambda a: a[..., 1:3].reshape(-1, 2), A),
    "T": (lambda a: a.T, A),
    "transpose": (lambda a: a.transpose(0, 2, 3, 1), A),
    "swapaxes": (lambda a: a.swapaxes(-1, -2), A),
    "view": (lambda a: a.view(), A),
    "slice": (lambda a: a[:, 1:], A),
    "ellipsis": (lambda a: a[..., :2], A),
    "step": (lambda a: a[:, ::2], A),
    "integer": (lambda a: a[1], A),
    "None": (lambda a: a[:, None], A),
    "None at the end": (lambda a: a[..., None], A),
    "None twice": (lambda a: a[:, :, None, 2:, None], A),
    "rows": (lambda a: a[ROWS % 2], A),
    "rows of a matrix": (lambda a: a[ROWS], (3, 4)),
    "rows by two axes": (lambda a: a[ROWS.reshape(2, 2)], (3, 4)),
    "rows and columns": (lambda a: a[ROWS, COLUMNS], (3, 4)),
    "copy": (lambda a: a.copy(), A),
    "copy of a transpose": (lambda a: a.T.copy(), A),
    "astype": (lambda a: a.astype(np.float64), A),
    "astype the same": (lambda a: a.astype(np.float32), A),
    "astype of a transpose": (lambda a: a.swapaxes(1, 2).astype(np.float16), A),
    "sum": (lambda a: a.sum(axis=-1), A),
    "sum, keepdims": (lambda a: a.sum(axis=1, keepdims=True), A),
    "max": (lambda a: a.max(axis=-1, keepdims=True), A),
    "sum of two axes": (lambda a: a.sum(axis=(0, 2)), A),
    "empty_like": (np.empty_like, A),
    "zeros_like": (np.zeros_like, A),
    "zeros_like, dtype": (lambda a: np.zeros_like(a, np.int32), A),
    "zeros_like, shape": (lambda a: np.zeros_like(a, shape=(7, 2)), A),
    "empty_like of a transpose": (lambda a: np.empty_like(a.swapaxes(1, 2)), A),
    "empty, like": (lambda a: np.empty((3, 4), np.float32, like=a), A),
    "zeros, like": (lambda a: np.zeros(3, like=a), A),
    "arange, like": (lambda a: np.arange(7, like=a), A),
    "place": (lambda a: np.arange(7, like=a)[:, None] >= np.arange(7, like=a), A),
    "mean of squares": (lambda a: np.einsum("...c,...c->...", a, a), A),
    "products of columns": (lambda a, b: np.einsum("nc,nc->c", a, b), (4, 5), (4, 5)),
    "concatenate": (lambda a, b: np.concatenate([a, b], axis=-1), A, (2, 3, 4, 1)),
    "concatenate rows": (lambda a: np.concatenate([-a, a]), A),
    "where": (lambda a: np.where(a >= np.float32(1), np.float32(0), np.float32(-1)), A),
    "repeat": (lambda a: np.repeat(a, 3, axis=-1), A),
    "packbits": (lambda a: np.packbits(a >= np.float32(1)), A),
    "unpackbits": (lambda a: np.unpackbits(np.packbits(a >= np.float32(1)), count=119), A),
    "unpackbits, reshaped": (
        lambda a: np.unpackbits(np.packbits(a >= np.float32(1)), count=120).reshape(A),
        A,
    ),
}
MIXED = (
    "+",
    "- broadcast",
    "* row",
    "/ column",
    "comparison",
    "matmul",
    "matmul, batch",
    "matmul, transposed",
    "concatenate",
    "products of columns",
)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_an_operation_gives_what_numpys_does(case, dtype):
    operation, *shapes = case
    assert_alike(operation, *(array_of(shape, dtype) for shape in shapes))


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize(
    "dtypes", [(F32, F64), (F64, F32), (F32, np.dtype(np.uint8)), (np.dtype(np.float16), F32)], ids=str
)
def test_types_are_mixed_as_numpys(name, dtypes):
    operation, *shapes = CASES[name]
    assert_alike(operation, *(array_of(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))


# ---- order in memory


permutations = st.permutations(range(4))
lengths = st.tuples(*[st.sampled_from((1, 2, 3, 5))] * 4)


@settings(max_examples=300, deadline=None)
@given(lengths, permutations)
def test_one_operand_hands_its_order_on(shape, order):
    names = (
        "negative()",
        "python float",
        "empty_like",
        "astype",
        "copy",
        "T",
        "flat",
        "swapaxes",
        "copy of a transpose",
    )
    for operation in (
        *(CASES[name][0] for name in names),
        lambda a: a == a,
        lambda a: a.reshape(a.shape[0], -1),
    ):
        assert_alike(operation, array_of(shape, order=order))


@settings(max_examples=400, deadline=None)
@given(lengths, permutations, permutations)
def test_two_operands_agree_on_an_order_as_numpys_do(shape, first, second):
    assert_alike(lambda a, b: a + b, array_of(shape, order=first), array_of(shape, order=second))


@settings(max_examples=400, deadline=None)
@given(lengths, st.tuples(*[st.booleans()] * 4), st.integers(0, 3), permutations, permutations)
def test_an_operand_that_is_repeated_has_no_say_there(shape, ones, dropped, first, second):
    smaller = tuple(1 if one else n for n, one in zip(shape, ones, strict=True))
    a, b = array_of(shape, order=first), array_of(smaller, order=second)
    assert_alike(lambda a, b: a * b[(0,) * dropped], a, b)  # fewer axes, too
    assert_alike(lambda a, b: b[(0,) * dropped] * a, a, b)


@settings(max_examples=400, deadline=None)
@given(
    lengths,
    st.lists(permutations, min_size=1, max_size=3),
    st.lists(st.tuples(*[st.booleans()] * 4), min_size=3, max_size=3),
)
def test_the_order_of_up_to_three_operands_is_that_of_numpys_iterator(shape, orders, ones):
    operands = [
        array_of(tuple(1 if one else n for n, one in zip(shape, chosen, strict=True)), order=order)
        for order, chosen in zip(orders, ones, strict=False)
    ]
    iterator = np.nditer([*operands, None], order="K")
    expected = iterator.operands[-1]
    found = ShapeArray.new(expected.shape, F32, tuple(operands))
    assert lengthy(found.ghost) == lengthy(expected)


@settings(max_examples=300, deadline=None)
@given(lengths, permutations, st.tuples(*[st.integers(0, 1)] * 4), permutations)
def test_slices_are_views_with_numpys_strides(shape, order, starts, axes):
    a = array_of(shape, order=order)
    index = tuple(slice(min(s, n - 1), None) for s, n in zip(starts, shape, strict=True))
    assert_alike(lambda a: a[index], a)
    assert_alike(lambda a: a.transpose(*axes)[..., None, :], a)


@settings(max_examples=300, deadline=None)
@given(lengths, permutations, st.data())
def test_reshape_is_a_view_where_numpys_is(shape, order, data):
    a = array_of(shape, order=order)
    left, sizes = prod(shape), []
    for _ in range(data.draw(st.integers(0, 3))):
        n = data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        sizes.append(n)
        left //= n
    assert_alike(lambda a: a.reshape(*sizes, left), a)


# ---- what is counted


def test_memory_is_free_when_its_last_view_is():
    with metered(Meter()) as meter:
        a = ShapeArray.new((10, 4), F32)
        view = a[2:].T
        other = view.reshape(8, 4)  # a copy: its rows do not lie in a row
        assert (meter.live, meter.peak, len(meter.log)) == (160 + 128, 160 + 128, 2)
        del a
        assert meter.live == 288
        del view
        assert (meter.live, meter.peak) == (128, 288)
        del other
        assert (meter.live, meter.peak, meter.clock) == (0, 288, 4)
    assert meter.curve().tolist() == [0, 160, 288, 128, 0]
    assert [b.nbytes for b in meter.alive(2)] == [160, 128] and [b.nbytes for b in meter.alive(3)] == [128]
    assert meter.alive(0) == meter.alive(4) == []


def test_meters_nest_and_what_is_freed_goes_to_the_one_that_counted_it():
    with metered(Meter()) as outer:
        a = ShapeArray.new((5,), F32)
        with metered(Meter()) as inner:
            b = a + a
            del a
            assert (outer.live, inner.live) == (0, 20)
        c = b * b
        del b
        assert (outer.live, inner.live, outer.peak, inner.peak) == (20, 0, 20, 20)
        with pytest.raises(ZeroDivisionError), metered(Meter()) as failed:
            ShapeArray.new((9,), F32)
            raise ZeroDivisionError
        d = ShapeArray.new((5,), F32)
        assert (failed.live, failed.peak, outer.live) == (0, 36, 40)
    del c, d
    assert outer.live == 0


def test_marks_say_when_something_began():
    with metered(Meter()) as meter:
        meter.mark("first")
        kept = ShapeArray.new((5,), F32)
        meter.mark("second")
        assert meter.marks == [(0, "first"), (1, "second")] and kept.buffer.born == 1


def test_arrays_without_data_take_none():
    tracemalloc.start()
    try:
        with metered(Meter()) as meter:
            a = ShapeArray.new((10**6, 10**5), F32)
            b = (a * a).astype(np.float64) @ a.T[:, :7]
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert b.shape == (10**6, 7) and meter.live == 4 * 10**11 + 8 * 7 * 10**6


def rise(work):
    """Bytes that a call holds at most beyond its result, as tracemalloc has it; the second time."""
    work()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = work()
        held, peak = tracemalloc.get_traced_memory()
        return peak - before - (result.nbytes if held - before >= result.nbytes else 0)
    finally:
        tracemalloc.stop()


PASSING = {  # 8192 elements are NumPy's buffer
    "same types": (lambda a, b: a * b, ((300, 300), F32), ((300, 300), F32), 0),
    "converted": (lambda a, b: a * b, ((300, 300), F64), ((300, 300), F32), 8 * 8192),
    "few, converted": (lambda a, b: a * b, ((10, 30), F64), ((10, 30), F32), 8 * 300),
    "converted in place": (lambda a, b: a.__imul__(b), ((300, 300), F32), ((300, 300), np.uint8), 4 * 8192),
    "row repeated": (lambda a, b: a * b, ((300, 300), F32), ((300,), F32), 4 * 8192),
    "column repeated": (lambda a, b: a * b, ((300, 300), F32), ((300, 1), F32), 4 * 8192),
    "long row repeated": (lambda a, b: a * b, ((3, 9000), F32), ((9000,), F32), 0),
    "one repeated": (lambda a, b: a * b, ((300, 300), F32), ((1, 1), F32), 0),
    "product": (lambda a, b: a @ b, ((64, 300), F32), ((300, 300), F32), 0),
    "product, right converted": (lambda a, b: a @ b, ((64, 300), F64), ((300, 300), F32), 8 * 300 * 300),
    "product, left converted": (lambda a, b: a @ b, ((64, 300), F32), ((300, 300), F64), 8 * 64 * 300),
}


@pytest.mark.parametrize("operation, a, b, expected", PASSING.values(), ids=PASSING.keys())
def test_buffers_inside_numpy_are_counted_while_they_last(operation, a, b, expected):
    real = [np.ones(shape, dtype) for shape, dtype in (a, b)]
    with metered(Meter()):
        shapes = [ShapeArray.new(*x) for x in (a, b)]
    with metered(Meter()) as meter:
        result = operation(*shapes)
        assert meter.peak - meter.live == expected
        del result
    assert 0 <= rise(lambda: operation(*real)) - expected < 4096  # the iterator itself, and Python's objects


# ---- what is not supported


@pytest.mark.parametrize(
    "function",
    [
        np.sort,
        np.linalg.norm,
        np.cumsum,
        lambda a: np.stack([a, a]),
        np.tile,
        np.argsort,
        lambda a: np.linalg.svd(a),
    ],
    ids=[
        "sort",
        "norm",
        "cumsum",
        "stack",
        "tile",
        "argsort",
        "svd",
    ],  # no addresses: xdist compares the names
)
def test_a_function_that_is_not_known_is_no_silence(function):
    with pytest.raises(TypeError):
        function(ShapeArray.new((3, 4), F32))


def test_what_would_need_data_is_refused():
    a = ShapeArray.new((3, 4), F32)
    for work in (lambda: np.add.reduce(a), lambda: np.add.accumulate(a)):
        with pytest.raises(TypeError):
            work()
    with pytest.raises(NotImplementedError, match="slices beside arrays"):
        a[ROWS, :]
    with pytest.raises(ValueError, match="broadcast"):
        a + ShapeArray.new((5,), F32)
    with pytest.raises(TypeError):
        bool(a > a)


def test_numbers_that_nothing_depends_on_are_zero():
    a = ShapeArray.new((3, 4), F32)
    assert np.vdot(a, a) == 0.0 and float(a.sum()) == 0.0
    a[1:] = 3
    a[ROWS] += a[ROWS]
    np.add.at(a, ROWS, a[ROWS])
    assert len(a) == 3 and repr(a) == "ShapeArray((3, 4), float32)"
