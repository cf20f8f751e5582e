"""What all packed weights share: products that decode one tile of rows at a time, never the dense matrix.

To keep the dense matrix would silently undo QLoRA. A tile lies in its thread's scratch, and is multiplied
there.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minilora.config import require
from minilora.kernels import BLAS_ROWS, LowRank, is_plain, linear_dx, linear_forward, load
from minilora.quant import codebooks
from minilora.quant.reference import packed_size
from minilora.quant.switch import implementation

Array = NDArray[Any]

TILE = 1024 * 1024
"""Weights decoded at once: 4 MiB of float32 a thread. With 1 MiB a step of SmolLM2 takes 9 % longer, because
threads that call more often wait for each other more often."""


def frozen(array: ArrayLike, dtype: Any) -> Array:
    """Return the array as contiguous, read-only `dtype`: the same object if it is that already, else a copy.

    >>> a = frozen([1, 2], np.uint8)
    >>> a.flags.writeable, frozen(a, np.uint8) is a
    (False, True)
    """
    given = np.asarray(array)
    if given.dtype == dtype and given.flags.c_contiguous and not given.flags.writeable:
        return given
    copy = np.array(given, dtype, order="C")
    copy.flags.writeable = False
    return copy


NO_OFFSETS = frozen([], np.float32)
_scratch = threading.local()


def _tile(size: int) -> Array:
    """Return this thread's scratch: two threads may multiply by one weight at once."""
    buffer: Array | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _scratch.buffer = np.empty(size, np.float32)
    return buffer[:size]


def reserve_tile(size: int) -> None:
    """Allocate this thread's scratch now rather than during a step."""
    if size:
        _tile(size)


@cache
def levels_of(quant_type: str) -> Array:
    """Return what codes stand for before scaling: a code map, or 0, 1, 2, … for `int2` to `int8`."""
    if quant_type.startswith("int"):
        return frozen(np.arange(2 ** int(quant_type[-1])), np.float32)
    return codebooks.code_map(quant_type)


def in_vectors(bits: int, width: int, block_size: int) -> bool:
    """Return whether vectors decode a weight of this width in blocks of this size."""
    return not is_plain() and bool(load("codes").in_vectors(bits, width, block_size))


def flat_rows(low_rank: LowRank | Array | None) -> LowRank | None:
    """Return the factors with one row for each position, or None if there are no factors."""
    if not isinstance(low_rank, LowRank):
        return None
    return low_rank._replace(h=low_rank.h.reshape(-1, low_rank.h.shape[-1]))


class PackedWeight(ABC):
    """W (out, in) in few bits, frozen: it has no gradient.

    Products and rows are float32, and float64 for float64 input. A subclass says how to decode weights
    (`_decode_into`) and how to multiply by a few rows while decoding (`_multiply_few`).
    """

    dtype = np.dtype(np.float32)
    trainable = False
    bits: int
    offset_group = 0
    """Inputs that share one float offset, into which QA-LoRA merges; 0 without such offsets."""

    def __init__(self, shape: tuple[int, int]):
        out_features, in_features = map(int, shape)
        require(out_features > 0 and in_features > 0, "shape", shape, "must be (out, in), both at least 1")
        self.shape = (out_features, in_features)

    # ---- products

    def matmul(self, x: Array, low_rank: LowRank | Array | None = None) -> Array:
        """Return x Wᵀ + low_rank: x (…, in) → (…, out).

        A few float32 rows, as in decoding text, take a kernel that multiplies while it decodes.
        """
        out_features, in_features = self.shape
        x2 = self._flat(x, in_features)
        factors = flat_rows(low_rank)
        y = np.empty((len(x2), out_features), np.result_type(x2.dtype, np.float32), like=x2)
        if 1 <= len(x2) <= self._few and x2.dtype == np.float32:
            # contiguous and writable: the one signature of the kernel
            self._multiply_few(np.array(x2, order="C"), y)
            if factors:
                y += (factors.s * factors.h) @ factors.b.T
        else:
            for first, last in self._tiles(TILE):
                part = factors._replace(b=factors.b[first:last]) if factors else None
                linear_forward(x2, self._decode(first, last), part, out=y, column=first)
        y = y.reshape(*x.shape[:-1], out_features)
        if low_rank is not None and factors is None:
            y += low_rank
        return y

    def matmul_t(
        self, dy: Array, low_rank: LowRank | Array | None = None, onto: Array | None = None
    ) -> Array:
        """Return dy W + low_rank: dy (…, out) → (…, in), added to `onto` if that is given."""
        out_features, in_features = self.shape
        dy2 = self._flat(dy, out_features)
        factors = flat_rows(low_rank)
        dx: Any = None if onto is None else onto.reshape(-1, in_features)
        for first, last in self._tiles(TILE):
            dx = linear_dx(dy2, self._decode(first, last), factors if first == 0 else None, dx, first)
        dx = dx.reshape(*dy.shape[:-1], in_features)
        if low_rank is not None and factors is None:
            dx += low_rank
        return dx

    def rows(self, ids: Array) -> Array:
        """Return rows of W as float32: whole numbers ids (…) → (…, in). Each distinct row is decoded once."""
        ids = np.asarray(ids)
        unique, inverse = np.unique(ids, return_inverse=True)
        if unique.size and not 0 <= unique[0] <= unique[-1] < self.shape[0]:
            bad = unique[0] if unique[0] < 0 else unique[-1]
            raise ValueError(f"ids contains {bad}: choose rows from 0 to {self.shape[0] - 1}")
        table = np.empty((unique.size, self.shape[1]), np.float32)
        start = 0
        for end in [*(np.flatnonzero(np.diff(unique) != 1) + 1), unique.size]:  # runs of neighbouring rows
            if end > start:
                self._decode_into(int(unique[start]) * self.shape[1], table[start:end].reshape(-1))
            start = end
        return table[inverse.reshape(ids.shape)]

    def dense(self) -> Array:
        """Return W as a fresh float32 array (out, in)."""
        w = np.empty(self.shape, np.float32)
        self._decode_into(0, w.reshape(-1))
        return w

    # ---- bytes

    @abstractmethod
    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by class: codes, scales, offsets, code_maps (shared constants)."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by class of array."""
        return {name: sum(a.nbytes for a in arrays) for name, arrays in self.arrays().items()}

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: 8·(codes + scales + offsets)/(out·in); shared code maps are not counted."""
        stored = self.nbytes
        return 8 * (stored["codes"] + stored["scales"] + stored["offsets"]) / (self.shape[0] * self.shape[1])

    # ---- decoding

    @abstractmethod
    def _decode_into(self, start: int, out: Array) -> None:
        """Write the flattened weights start, start + 1, … into `out` float32; both ends are ends of rows."""

    @property
    @abstractmethod
    def _few(self) -> int:
        """Up to how many float32 rows `_multiply_few` is faster than BLAS on decoded tiles; 0: never."""

    @abstractmethod
    def _multiply_few(self, x: Array, out: Array) -> None:
        """Write x Wᵀ into `out`: x (n, in) → (n, out) for n from 1 to `_few`."""

    def _decode(self, first: int, last: int) -> Array:
        """Return rows first … last - 1 in the thread's scratch, valid until the next call."""
        tile = _tile((last - first) * self.shape[1])
        self._decode_into(first * self.shape[1], tile)
        return tile.reshape(last - first, self.shape[1])

    def _tiles(self, size: int) -> list[tuple[int, int]]:
        """Cut the rows into tiles of about `size` weights: whole 8 rows, so that each begins with a byte."""
        step = max(8, size // self.shape[1] // 8 * 8)
        return [(first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step)]

    @staticmethod
    def _flat(x: Array, width: int) -> Array:
        if x.ndim == 0 or x.shape[-1] != width:
            raise ValueError(f"x.shape={x.shape}: the last axis must be {width} long")
        return x.reshape(-1, width)


class CodedWeight(PackedWeight):
    """Codes in row-major order, and for each block of the flattened tensor a scale and perhaps an offset.

    `codes` is 1-D uint8, packed as `quant.reference.pack` does.
    """

    def __init__(self, codes: Array, shape: tuple[int, int], quant_type: str, block_size: int):
        super().__init__(shape)
        self.bits = int(quant_type[-1])
        self.block_size = int(block_size)
        self.quant_type = quant_type
        self.codes = frozen(codes, np.uint8)
        expected = (packed_size(self.shape[0] * self.shape[1], self.bits),)
        allowed = f"{self.shape[0]}·{self.shape[1]} codes of {self.bits} bits need {expected}"
        require(self.codes.shape == expected, "codes.shape", self.codes.shape, allowed)
        self._levels = levels_of(quant_type)

    def unpacked(self) -> NDArray[np.uint8]:
        """Return the codes, a byte each: a fresh uint8 array (out, in)."""
        out, in_ = self.shape
        return implementation("codes").unpack(self.codes, self.bits, out * in_).reshape(out, in_)

    @abstractmethod
    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        """Return scales and offsets of blocks first … last - 1, float32 or float16; no offsets are 0."""

    def _window(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and offsets of the blocks that hold the flattened weights start … stop - 1."""
        return self._block_values(start // self.block_size, -(-stop // self.block_size))

    @property
    def _decodes_scales(self) -> bool:
        """Whether scales or offsets are converted before kernels read them; if so, a tile at a time."""
        return True

    def _in_vectors(self) -> bool:
        return in_vectors(self.bits, self.shape[1], self.block_size)

    def _decode_into(self, start: int, out: Array) -> None:
        values = self._window(start, start + out.size)
        implementation("codes").dequantize(self.codes, self._levels, *values, self.block_size, start, out)

    @property
    def _few(self) -> int:
        if is_plain():
            return 0
        return BLAS_ROWS if self._in_vectors() else 1

    def _multiply_few(self, x: Array, out: Array) -> None:
        width, matvec = self.shape[1], implementation("codes").matvec
        for first, last in self._tiles(TILE if self._decodes_scales else self.shape[0] * width):
            values = self._window(first * width, last * width)
            for row, y in zip(x, out[:, first:last], strict=True):
                matvec(self.codes, self._levels, *values, self.block_size, first * width, row, y)


def checked(w: Array) -> Array:
    """Return w as read-only contiguous float32; refuse what cannot be quantized."""
    w = as_matrix(w)
    require_finite(w)
    return w


def as_matrix(w: Array) -> Array:
    """Return w as read-only contiguous float32; refuse all but two axes that hold something."""
    w = np.asarray(w)
    require(w.ndim == 2 and w.size > 0, "w.shape", w.shape, "must be (out, in), both at least 1")
    w = np.ascontiguousarray(w, np.float32).view()
    w.flags.writeable = False
    return w


def require_finite(w: Array) -> None:
    """Raise a `ValueError` that names the first element of w (out, in) that is not finite."""
    finite = np.isfinite(w)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"w[{row}, {column}]={w[row, column]}: weights must be finite float32 before they are quantized"
        )


def packed(codes: Array, bits: int) -> Array:
    """Return codes (n,) uint8 packed, read-only."""
    out = implementation("codes").pack(codes, bits)
    out.flags.writeable = False
    return out


def unpacked(codes: Array, count: int, bits: int) -> Array:
    """Return the first `count` packed codes, a byte each.

    Raises
    ------
    ConfigError
        If the packed codes have another length.

    Examples
    --------
    >>> unpacked(packed(np.array([1, 2, 3], np.uint8), 3), 3, 3).tolist()
    [1, 2, 3]
    """
    size = packed_size(count, bits)
    allowed = f"{count} codes of {bits} bits take ({size},)"
    require(codes.shape == (size,), "codes.shape", codes.shape, allowed)
    return implementation("codes").unpack(frozen(codes, np.uint8), bits, count)
