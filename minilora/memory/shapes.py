"""Arrays without data: a shape, a dtype and strides, with which the model's own code computes.

They stand in for NumPy arrays. No number is ever computed, so a step of a 175-billion-parameter model takes a
second and no memory. But each result "allocates" what NumPy would, and frees it when Python does, and a
`Meter` writes down every birth and death. So what is predicted is what the code does, not what a formula
beside it claims. (PyTorch calls this fake or meta tensors.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from math import prod
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.lib.stride_tricks import as_strided

Ghost = np.ndarray
"""An array over a single element, which nothing may read; NumPy's own rules of views apply to it."""

ITERATOR_BUFFER = np.getbufsize()
"""Elements that NumPy's iterator converts at a time."""


class Buffer:
    """Memory that an array without data would own; `died` is infinite while it lives.

    `site` and `line` say where it was made, `owner` for which layer. The ledger writes `kind` and `reason`.
    """

    __slots__ = ("nbytes", "born", "died", "site", "line", "owner", "kind", "reason")

    def __init__(self, nbytes: int, born: int):
        self.nbytes, self.born, self.died = nbytes, born, float("inf")
        self.site, self.line, self.owner = "", 0, ""
        self.kind, self.reason = "", ""


class Meter:
    """Counts live bytes; each birth and death is a tick of its clock.

    Parameters
    ----------
    names : dict, optional
        Id of a layer → its name. With it the meter also notes where each buffer was born.

    Attributes
    ----------
    live, peak : int
        Bytes now, and at most so far.
    log : list of Buffer
        All buffers, in the order of their births.
    marks : list of tuple
        (time, what): what began when.
    headers : list of tuple
        (born, died, bytes, buffer) of the array objects themselves, without their data.
    """

    def __init__(self, names: dict[int, str] | None = None):
        self.names, self.clock, self.live, self.peak = names, 0, 0, 0
        self.log: list[Buffer] = []
        self.marks: list[tuple[int, str]] = []
        self.headers: list[tuple[int, int, int, Buffer]] = []

    def allocate(self, nbytes: int) -> Buffer:
        """Count a new buffer."""
        self.clock += 1
        self.live += nbytes
        buffer = Buffer(nbytes, self.clock)
        if self.names is not None:
            self._note(buffer)
        self.peak = max(self.peak, self.live)
        self.log.append(buffer)
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Count the end of a buffer."""
        self.clock += 1
        self.live -= buffer.nbytes
        buffer.died = self.clock

    def mark(self, what: str) -> None:
        """Say what begins now."""
        self.marks.append((self.clock, what))

    def curve(self) -> Ghost:
        """Return the live bytes after each birth and death, int64."""
        change = np.zeros(self.clock + 1, np.int64)
        for b in self.log:
            change[b.born] += b.nbytes
            if b.died <= self.clock:
                change[int(b.died)] -= b.nbytes
        return change.cumsum()

    def alive(self, moment: int) -> list[Buffer]:
        """Return the buffers that existed at a moment."""
        return [b for b in self.log if b.born <= moment < b.died]

    def headers_at(self, moment: int) -> dict[str, int]:
        """Return layer → bytes of array objects, views included, that existed then and are gone by now."""
        found: dict[str, int] = {}
        for born, died, nbytes, buffer in self.headers:
            if born <= moment < died:
                found[buffer.owner] = found.get(buffer.owner, 0) + nbytes
        return found

    def _note(self, buffer: Buffer) -> None:
        """Note the innermost function of the package outside `memory`, and the innermost layer around it."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("minilora.") and not module.startswith("minilora.memory."):
                code = frame.f_code
                if not buffer.site:
                    buffer.site = f"{module.removeprefix('minilora.')}.{code.co_qualname}"
                    buffer.line = frame.f_lineno
                if code.co_varnames[:1] == ("self",):
                    found = frame.f_locals
                    name = self.names.get(id(found["self"])) if self.names else None
                    if isinstance(found, dict):
                        found.clear()  # up to Python 3.12 a copy that would keep the frame's arrays alive
                    if name is not None:
                        buffer.owner = name
                        return
            frame = frame.f_back


_meter = Meter()


@contextmanager
def metered(meter: Meter) -> Iterator[Meter]:
    """Count in this meter what is allocated inside; what is freed goes to the meter that counted it."""
    global _meter
    before, _meter = _meter, meter
    try:
        yield meter
    finally:
        _meter = before


class _Memory:
    """Held by an array and its views; the buffer ends with the last of them."""

    __slots__ = ("buffer", "meter")

    def __init__(self, nbytes: int):
        self.meter = _meter
        self.buffer = _meter.allocate(nbytes)

    def __del__(self) -> None:
        self.meter.free(self.buffer)


class ShapeArray(NDArrayOperatorsMixin):
    """An array without data.

    `ShapeArray.new((2, 3), np.float32)` counts 24 bytes; views count nothing.

    >>> with metered(Meter()) as meter:
    ...     x = ShapeArray.new((1000, 1000), np.float32)
    ...     y = (x @ x.T).sum(axis=0)
    >>> y.shape, y.dtype.name, meter.live, meter.peak
    ((1000,), 'float32', 4004000, 8004000)
    """

    __slots__ = ("ghost", "memory", "meter", "born")
    __array_priority__ = 1000

    def __init__(self, ghost: Ghost, memory: _Memory):
        self.ghost, self.memory = ghost, memory
        self.meter, self.born = _meter, _meter.clock

    def __del__(self) -> None:
        size = 96 + 16 * self.ghost.ndim  # NumPy's array object, and a length and a stride for each axis
        self.meter.headers.append((self.born, self.meter.clock, size, self.memory.buffer))

    @classmethod
    def new(cls, shape: tuple[int, ...], dtype: Any, like: tuple[Ghost, ...] = ()) -> ShapeArray:
        """Return a fresh array, C-contiguous, or with its axes in NumPy's order "K" of the arrays `like`."""
        dtype = np.dtype(dtype)
        ghost = _ghost(shape, dtype, _order(shape, like))
        return cls(ghost, _Memory(dtype.itemsize * prod(shape)))

    # ---- what it is

    shape = property(lambda self: self.ghost.shape)
    dtype = property(lambda self: self.ghost.dtype)
    ndim = property(lambda self: self.ghost.ndim)
    size = property(lambda self: self.ghost.size)
    nbytes = property(lambda self: self.ghost.nbytes)
    flags = property(lambda self: self.ghost.flags)

    @property
    def buffer(self) -> Buffer:
        """The memory behind the array."""
        return self.memory.buffer

    def __len__(self) -> int:
        return len(self.ghost)

    def __float__(self) -> float:
        return 0.0  # a loss or a norm: nothing depends on it

    def __bool__(self) -> bool:
        raise TypeError("an array without data is neither true nor false; code may not depend on its numbers")

    def __repr__(self) -> str:
        return f"ShapeArray({self.shape}, {self.dtype})"

    # ---- views

    def _view(self, ghost: Ghost) -> ShapeArray:
        return ShapeArray(ghost, self.memory)

    @property
    def T(self) -> ShapeArray:
        """All axes reversed."""
        return self._view(self.ghost.T)

    def transpose(self, *axes: int) -> ShapeArray:
        """Return a view with its axes in another order."""
        return self._view(self.ghost.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> ShapeArray:
        """Return a view with two axes exchanged."""
        return self._view(self.ghost.swapaxes(a, b))

    def view(self) -> ShapeArray:
        """Return a view."""
        return self._view(self.ghost.view())

    def reshape(self, *shape: Any) -> ShapeArray:
        """Return a view where NumPy makes one, else a copy."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        try:
            return self._view(np.reshape(self.ghost, shape, copy=False))
        except ValueError:
            given = prod(n for n in shape if n != -1)
            return ShapeArray.new(tuple(self.size // given if n == -1 else n for n in shape), self.dtype)

    def __getitem__(self, index: Any) -> ShapeArray:
        arrays = index if isinstance(index, tuple) else (index,)
        advanced = [i for i in arrays if isinstance(i, (np.ndarray, ShapeArray))]
        if not advanced:
            return self._view(self.ghost[index])
        if len(advanced) < len(arrays):
            raise NotImplementedError(f"index {index!r}: slices beside arrays")
        rows = np.broadcast_shapes(*(a.shape for a in advanced))
        return ShapeArray.new(rows + self.shape[len(advanced) :], self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        return  # writing takes no memory

    def any(self) -> bool:
        """Return True: what is not known may be anything but zero."""
        return True

    # ---- copies and reductions

    def copy(self) -> ShapeArray:
        """Return a C-contiguous copy, as `ndarray.copy` does."""
        return ShapeArray.new(self.shape, self.dtype)

    def astype(self, dtype: Any) -> ShapeArray:
        """Return a copy of another dtype."""
        return ShapeArray.new(self.shape, dtype, (self.ghost,))

    def sum(self, axis: Any = None, keepdims: bool = False) -> ShapeArray:
        """Return fewer axes."""
        return _reduced(self, axis, keepdims)

    max = mean = sum

    # ---- functions

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **kwargs: Any
    ) -> Any:
        if method == "at":
            return None
        if method != "__call__":
            return NotImplemented
        ghosts = [x.ghost if isinstance(x, ShapeArray) else x for x in inputs]
        arrays = tuple(g for g in ghosts if isinstance(g, np.ndarray))
        kinds = [type(g) if type(g) in (int, float) else g.dtype for g in ghosts]
        loop = ufunc.resolve_dtypes((*kinds, out[0].dtype if out else None))
        product = ufunc is np.matmul
        if product:
            a, b = arrays
            shape: tuple[int, ...] = (
                *np.broadcast_shapes(a.shape[:-2], b.shape[:-2]),
                a.shape[-2],
                b.shape[-1],
            )
        else:
            shape = np.broadcast_shapes(*(g.shape for g in arrays))
        result = out[0] if out else ShapeArray.new(shape, loop[-1], () if product else arrays)
        # another dtype is converted on the way: for a product as a whole, else a buffer at a time
        sizes = [
            to.itemsize * (g.size if product else _buffered(g, shape, g.dtype != to))
            for g, to in zip((*ghosts, result.ghost), loop, strict=True)
            if isinstance(g, np.ndarray) and (g.dtype != to or not product)
        ]
        scratch = [_Memory(size) for size in sizes if size]
        del scratch
        return result

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        handler = FUNCTIONS.get(function)
        return NotImplemented if handler is None else handler(*args, **kwargs)


def _ghost(shape: tuple[int, ...], dtype: np.dtype[Any], order: list[int]) -> Ghost:
    """Return a ghost of this shape, with its axes in memory from the slowest to the fastest in `order`."""
    strides, step = [0] * len(shape), dtype.itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= max(1, shape[axis])
    return as_strided(np.zeros(1, dtype), shape, tuple(strides))


def _order(shape: tuple[int, ...], like: tuple[Ghost, ...]) -> list[int]:
    """Return the axes from the slowest to the fastest, as NumPy's iterator chooses them.

    That is C order, unless all operands agree on something else.
    """
    axes = list(range(len(shape)))
    if all(g.flags.c_contiguous for g in like):
        return axes
    strides = [
        (0,) * (len(shape) - g.ndim)
        + tuple(0 if n == 1 else s for n, s in zip(g.shape, g.strides, strict=True))
        for g in like
    ]

    def slower(a: int, b: int) -> bool | None:
        """Return whether axis a should come before b; None if no operand tells."""
        found = [abs(s[a]) >= abs(s[b]) for s in strides if s[a] and s[b]]
        return any(found) if found else None

    done: list[int] = []  # from the fastest
    for axis in reversed(axes):
        place = len(done)
        for i in reversed(range(len(done))):
            before = slower(axis, done[i])
            if before is False:
                place = i
            elif before:
                break
        done.insert(place, axis)
    return done[::-1]


def _buffered(x: Ghost, shape: tuple[int, ...], converted: bool) -> int:
    """Return the elements of the buffer through which NumPy's iterator takes an operand; 0 without one.

    There is one if the operand's type is converted, or if it is repeated along some axes and the run of last
    axes that can be read in one go is shorter than a buffer.
    """
    size = min(prod(shape), ITERATOR_BUFFER)
    if x.shape == shape and not converted:
        return 0
    axes = [
        (n, m == 1)
        for n, m in zip(shape[::-1], (*x.shape[::-1], *(1,) * (len(shape) - x.ndim)), strict=True)
        if n > 1
    ]
    stretch = prod(n for n, _ in takewhile(lambda axis: axis[1] == axes[0][1], axes))
    return size if converted or stretch < size else 0


def _reduced(x: ShapeArray, axis: Any, keepdims: bool) -> ShapeArray:
    if axis is None:
        axes = list(range(x.ndim))
    else:
        axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes)
    return ShapeArray.new(shape, x.dtype)


def _like(x: Any, dtype: Any = None, shape: Any = None) -> ShapeArray:
    if shape is not None:
        return ShapeArray.new(tuple(shape), dtype or x.dtype)
    return ShapeArray.new(x.shape, dtype or x.dtype, (x.ghost,))


def _empty(shape: Any, dtype: Any = np.float64) -> ShapeArray:
    return ShapeArray.new(shape if isinstance(shape, tuple) else (shape,), dtype)


def _einsum(subscripts: str, *operands: ShapeArray) -> ShapeArray:
    inputs, output = subscripts.split("->")
    first = inputs.split(",")[0]
    if first.startswith("..."):  # "...c,...c->...": every operand has all axes
        shape = operands[0].shape[: operands[0].ndim - len(first[3:])]
    else:
        shape = tuple(operands[0].shape[first.index(letter)] for letter in output)
    return ShapeArray.new(shape, np.result_type(*(x.dtype for x in operands)))


def _concatenate(arrays: Any, axis: int = 0) -> ShapeArray:
    shape = list(arrays[0].shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    return ShapeArray.new(tuple(shape), np.result_type(*(a.dtype for a in arrays)))


def _where(condition: ShapeArray, a: Any, b: Any) -> ShapeArray:
    return ShapeArray.new(condition.shape, np.result_type(a, b))


def _repeat(x: ShapeArray, repeats: int, axis: int) -> ShapeArray:
    shape = list(x.shape)
    shape[axis] *= repeats
    return ShapeArray.new(tuple(shape), x.dtype)


FUNCTIONS: dict[Any, Any] = {
    np.empty_like: _like,
    np.zeros_like: _like,
    np.empty: _empty,
    np.zeros: _empty,
    np.einsum: _einsum,
    np.where: _where,
    np.concatenate: _concatenate,
    np.repeat: _repeat,
    np.arange: lambda stop: ShapeArray.new((stop,), np.int64),
    np.vdot: lambda a, b: 0.0,
    np.packbits: lambda x: ShapeArray.new((-(-x.size // 8),), np.uint8),
    np.unpackbits: lambda x, count: ShapeArray.new((count,), np.uint8),
}
"""The NumPy functions that a step calls; another one raises TypeError, which a test of the planner shows."""
