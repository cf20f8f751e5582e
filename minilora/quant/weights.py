"""Quantized weights that multiply without ever being dense: ``CodebookWeight`` and ``AffineWeight``.

Both store packed codes and, for each block of the flattened row-major tensor, a scale (and an offset):

    w[i] = levels[code[i]] · scale[i // block_size] + offset[i // block_size]

A codebook's levels are NF4's or FP4's values, its scale is the block's max|w|, its offset 0. An affine weight's levels are
0, 1, 2, …; since a group never crosses a row, groups along the input are blocks of the flattened tensor too.

A product decodes one tile of rows at a time into a small scratch of its thread and hands it to BLAS. Keeping the dense matrix
instead would silently undo QLoRA.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minilora.config import QuantConfig, require, require_in
from minilora.quant import codebooks, kernels

Array = NDArray[Any]

TILE = 256 * 1024
"""Weights decoded at once, 1 MiB of float32 a thread: with a quarter of it products are up to a third slower (measured)."""

NESTED_BLOCK_SIZE = 256
"""Block size of double quantization (QLoRA, arXiv 2305.14314, section 3)."""


def frozen(array: ArrayLike, dtype: Any) -> Array:
    """Return the array as contiguous, read-only ``dtype``: the same object if it is that already, else a copy.

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


_NO_OFFSETS = frozen([], np.float32)
_scratch = threading.local()


def _tile(size: int) -> Array:
    """Return this thread's scratch: two threads may multiply by one weight at once."""
    buffer: Array | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _scratch.buffer = np.empty(max(size, TILE), np.float32)
    return buffer[:size]


@cache
def _table(quant_type: str) -> Array:
    bits = int(quant_type[-1])
    levels = np.arange(2**bits, dtype=np.float32) if quant_type.startswith("int") else codebooks.code_map(quant_type)
    return kernels.lookup_table(levels, bits)


@cache
def _dynamic_table() -> Array:
    return kernels.lookup_table(codebooks.dynamic_map(), 8)


@cache
def _thresholds(quant_type: str) -> tuple[Array, Array]:
    values = codebooks.dynamic_map() if quant_type == "dynamic" else codebooks.code_map(quant_type)
    midpoints, order = codebooks.thresholds(values)
    padded = np.full(15 if midpoints.size <= 15 else 255, np.inf, np.float32)  # the sizes that the kernel knows
    padded[: midpoints.size] = midpoints
    return frozen(padded, np.float32), frozen(order, np.uint8)


class PackedWeight(ABC):
    """What the two classes share: W (out, in) as packed codes, decoded in tiles. Frozen: it has no gradient.

    ``codes`` is 1-D uint8, packed as the kernels module says. Products and rows are float32 (float64 for float64 input).
    """

    dtype = np.dtype(np.float32)
    trainable = False

    def __init__(self, codes: Array, shape: tuple[int, int], quant_type: str, block_size: int):
        out_features, in_features = map(int, shape)
        require(out_features > 0 and in_features > 0, "shape", shape, "must be (out, in), both at least 1")
        self.shape = (out_features, in_features)
        self.bits = int(quant_type[-1])
        self.block_size = int(block_size)
        self.quant_type = quant_type
        self.codes = frozen(codes, np.uint8)
        expected = (kernels.packed_size(out_features * in_features, self.bits),)
        require(self.codes.shape == expected, "codes.shape", self.codes.shape,
                f"{out_features}·{in_features} codes of {self.bits} bits need {expected}")  # fmt: skip
        self._table = _table(quant_type)

    # ---- products

    def matmul(self, x: Array) -> Array:
        """Return x Wᵀ: x (…, in) -> (…, out).

        A single float32 row, as in decoding text, takes a kernel that multiplies while it decodes.
        """
        out_features, in_features = self.shape
        x2 = self._flat(x, in_features)
        y = np.empty((len(x2), out_features), np.result_type(x2.dtype, np.float32))
        if len(x2) == 1 and x2.dtype == np.float32:
            row = np.array(x2[0])  # contiguous and writable: the one signature of the kernel
            for first, last in self._tiles(4 * TILE):
                start, stop = first * in_features, last * in_features
                scales, offsets = self._window(start, stop)
                kernels.matvec(self.codes, self.bits, self._table, scales, offsets, self.block_size, start, row, y[0, first:last])
        else:
            for first, last in self._tiles(TILE):
                np.matmul(x2, self._decode(first, last).T, out=y[:, first:last])
        return y.reshape(*x.shape[:-1], out_features)

    def matmul_t(self, dy: Array) -> Array:
        """Return dy W: dy (…, out) -> (…, in)."""
        out_features, in_features = self.shape
        dy2 = self._flat(dy, out_features)
        dx = np.empty((len(dy2), in_features), np.result_type(dy2.dtype, np.float32))
        part = dx  # the first tile's product is written in place, the others are added
        for first, last in self._tiles(TILE):
            np.matmul(dy2[:, first:last], self._decode(first, last), out=part)
            if first > 0:
                dx += part
            elif last < out_features:
                part = np.empty_like(dx)
        return dx.reshape(*dy.shape[:-1], in_features)

    def rows(self, ids: Array) -> Array:
        """Return rows of W as float32: ids (…) whole numbers -> (…, in). Each distinct row is decoded once."""
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

    def unpacked(self) -> NDArray[np.uint8]:
        """Return the codes, one a byte: a fresh uint8 array (out, in)."""
        codes = np.empty(self.shape, np.uint8)
        kernels.unpack(self.codes, self.bits, codes.reshape(-1))
        return codes

    # ---- bytes

    @abstractmethod
    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by class: codes, scales, offsets, code_maps (constants that all weights share)."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by class of array."""
        return {name: sum(a.nbytes for a in arrays) for name, arrays in self.arrays().items()}

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: 8·(codes + scales + offsets)/(out·in); the shared code maps are not counted."""
        stored = self.nbytes
        return 8 * (stored["codes"] + stored["scales"] + stored["offsets"]) / (self.shape[0] * self.shape[1])

    # ---- decoding

    @abstractmethod
    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        """Return read-only float32 (scales, offsets) of blocks first … last - 1; empty offsets mean 0."""

    def _window(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and offsets of the blocks that hold the flattened weights start … stop - 1."""
        return self._block_values(start // self.block_size, -(-stop // self.block_size))

    def _decode_into(self, start: int, out: Array) -> None:
        scales, offsets = self._window(start, start + out.size)
        kernels.dequantize(self.codes, self.bits, self._table, scales, offsets, self.block_size, start, out)

    def _decode(self, first: int, last: int) -> Array:
        """Return rows first … last - 1 in the thread's scratch, valid until the next call."""
        tile = _tile((last - first) * self.shape[1])
        self._decode_into(first * self.shape[1], tile)
        return tile.reshape(last - first, self.shape[1])

    def _tiles(self, size: int) -> list[tuple[int, int]]:
        """Cut the rows into tiles of about ``size`` weights; multiples of 8 rows, so that each begins with a whole byte."""
        step = max(8, size // self.shape[1] // 8 * 8)
        return [(first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step)]

    @staticmethod
    def _flat(x: Array, width: int) -> Array:
        if x.ndim == 0 or x.shape[-1] != width:
            raise ValueError(f"x.shape={x.shape}: the last axis must be {width} long")
        return x.reshape(-1, width)


@dataclass(frozen=True)
class DoubleQuant:
    """Block scales that are quantized themselves: absmax = dynamic_map[codes]·absmax2[block // 256] + offset.

    ``codes`` (blocks,) uint8 · ``absmax`` (⌈blocks/256⌉,) float32 · ``offset`` (1,) float32, the mean of the scales.
    """

    codes: Array
    absmax: Array
    offset: Array

    def __post_init__(self) -> None:
        for name, dtype in (("codes", np.uint8), ("absmax", np.float32), ("offset", np.float32)):
            object.__setattr__(self, name, frozen(np.reshape(getattr(self, name), -1), dtype))
        expected = -(-self.codes.size // NESTED_BLOCK_SIZE)
        require(self.absmax.size == expected, "absmax.size", self.absmax.size, f"{self.codes.size} blocks need {expected}")
        require(self.offset.size == 1, "offset.size", self.offset.size, "one number for the whole weight")

    @classmethod
    def quantize(cls, scales: Array) -> DoubleQuant:
        """Quantize positive float32 block scales (blocks,) to 8 bits around their mean."""
        offset = np.float32(scales.mean(dtype=np.float64))
        codes, absmax = _quantize_blocks(frozen(scales - offset, np.float32), "dynamic", NESTED_BLOCK_SIZE)
        return cls(codes, absmax, np.array([offset]))

    def decode(self, first: int, last: int) -> Array:
        """Return the scales of blocks first … last - 1, read-only float32."""
        scales = np.empty(last - first, np.float32)
        kernels.dequantize(self.codes, 8, _dynamic_table(), self.absmax[first // NESTED_BLOCK_SIZE :], _NO_OFFSETS,
                           NESTED_BLOCK_SIZE, first, scales)  # fmt: skip
        scales += self.offset
        scales.flags.writeable = False
        return scales


class CodebookWeight(PackedWeight):
    """W (out, in) as codes of a NormalFloat or FP4 codebook times max|w| of each block of the flattened tensor.

    w = code_map[code]·absmax[block] (QLoRA, arXiv 2305.14314, section 3). NF4 and FP4 codes, packing and decoding are
    bitsandbytes', bit by bit; the last block may be short. ``scales`` is float32 absmax (blocks,) or a ``DoubleQuant``.

    >>> w = np.array([[0.5, -1.0, 0.25, 0.0], [2.0, 1.0, 0.0, -2.0]], np.float32)
    >>> q = CodebookWeight.quantize(w, "nf4", block_size=4, double_quant=False)
    >>> print(q.dense().round(2))
    [[ 0.44 -1.    0.25  0.  ]
     [ 2.    0.88  0.   -2.  ]]
    """

    def __init__(
        self, codes: Array, scales: Array | DoubleQuant, shape: tuple[int, int], quant_type: str = "nf4", block_size: int = 64
    ):
        self.code_map = codebooks.code_map(quant_type)
        require(block_size >= 1, "block_size", block_size, "must be at least 1")
        super().__init__(codes, shape, quant_type, block_size)
        self.scales = scales if isinstance(scales, DoubleQuant) else frozen(scales, np.float32)
        stored = (self.scales.codes if isinstance(self.scales, DoubleQuant) else self.scales).shape
        expected = (-(-self.shape[0] * self.shape[1] // self.block_size),)
        require(stored == expected, "scales.shape", stored, f"one scale for each block of {block_size}: {expected}")

    @classmethod
    def quantize(cls, w: Array, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True) -> CodebookWeight:
        """Quantize w (out, in), block by block: the code of the nearest value to w/absmax; a tie takes the lower value.

        Raises ``ValueError`` if a weight is not finite, or for an unknown ``quant_type``.
        """
        w = _checked(w)
        codebooks.code_map(quant_type)  # an unknown name is refused here
        require(block_size >= 1, "block_size", block_size, "must be at least 1")
        codes, absmax = _quantize_blocks(w.reshape(-1), quant_type, block_size)
        scales = DoubleQuant.quantize(absmax) if double_quant else absmax
        shape = (w.shape[0], w.shape[1])
        return cls(_packed(codes, int(quant_type[-1])), scales, shape, quant_type, block_size)

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are quantized too."""
        return isinstance(self.scales, DoubleQuant)

    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by class."""
        if isinstance(self.scales, DoubleQuant):
            scales = [self.scales.codes, self.scales.absmax, self.scales.offset]
            maps = [self.code_map, codebooks.dynamic_map()]
        else:
            scales, maps = [self.scales], [self.code_map]
        return {"codes": [self.codes], "scales": scales, "offsets": [], "code_maps": maps}

    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        if isinstance(self.scales, DoubleQuant):
            return self.scales.decode(first, last), _NO_OFFSETS
        return self.scales[first:last], _NO_OFFSETS


class AffineWeight(PackedWeight):
    """W (out, in) as w = scale·q + offset, q a whole number of ``bits`` bits, for each group of ``group_size`` inputs of a row.

    ``scale`` (out, in/group_size) float16 · ``offset`` likewise, float16, or float32 after a merge. It is QA-LoRA's
    W̃ = α·q + β (arXiv 2309.14717, eq. 1) and GGUF's Q4_1; GPTQ's zero point is -offset/scale. Because the offset is a
    real number, ΔW that is constant within each group merges into it exactly.

    >>> q = AffineWeight.quantize(np.array([[0.0, 0.4, 1.0, 3.0]], np.float32), bits=2, group_size=4)
    >>> q.unpacked().tolist(), q.scale.tolist(), q.offset.tolist()
    ([[0, 0, 1, 3]], [[1.0]], [[0.0]])
    >>> q.with_offset(q.offset - 1).dense().tolist()
    [[-1.0, -1.0, 0.0, 2.0]]
    """

    def __init__(self, codes: Array, scale: Array, offset: Array, shape: tuple[int, int], bits: int, group_size: int):
        require_in(bits, (2, 3, 4, 8), "bits")
        _check_group_size(group_size, int(shape[1]))
        super().__init__(codes, shape, f"int{bits}", group_size)
        self.scale = frozen(scale, np.float16)
        self.offset = frozen(offset, np.float32 if np.asarray(offset).dtype.itemsize > 2 else np.float16)
        expected = (self.shape[0], self.shape[1] // group_size)
        for name, array in (("scale", self.scale), ("offset", self.offset)):
            require(array.shape == expected, f"{name}.shape", array.shape, f"one number for each group: {expected}")
            if not np.isfinite(array).all():
                where = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
                raise ValueError(f"{name}{list(where)}={array[where]}: must be finite ({array.dtype}; float16 ends at 65504)")

    @classmethod
    def quantize(cls, w: Array, bits: int = 4, group_size: int = 32) -> AffineWeight:
        """Quantize w (out, in): offset = min, scale = (max - min)/(2^bits - 1) of each group, q = rint((w - offset)/scale).

        Scale and offset are rounded to float16 first, and q fitted to the rounded ones. A group whose scale rounds to 0 (all
        its weights equal) gets scale 1 and codes 0. Raises ``ValueError`` for a weight that is not finite or beyond float16,
        for ``bits`` outside 2, 3, 4, 8 and for a ``group_size`` that does not divide ``in``.
        """
        require_in(bits, (2, 3, 4, 8), "bits")
        w = _checked(w)
        _check_group_size(group_size, w.shape[1])
        flat, largest, groups = w.reshape(-1), 2**bits - 1, w.size // group_size
        low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
        kernels.group_range(flat, group_size, low, high)
        with np.errstate(over="ignore"):  # too large for float16 becomes inf, which the check below names
            scale = ((high - low) / np.float32(largest)).astype(np.float16)
            offset = low.astype(np.float16)
        for name, values in (("scale", scale), ("offset", offset)):
            if not np.isfinite(values).all():
                row, group = divmod(int(np.flatnonzero(~np.isfinite(values))[0]), w.shape[1] // group_size)
                raise ValueError(f"{name} of row {row}, group {group} exceeds float16's 65504: scale the weights down first")
        scale[scale == 0] = 1
        codes = np.empty(w.size, np.uint8)
        kernels.quantize_affine(flat, frozen(scale, np.float32), frozen(offset, np.float32), group_size, largest, codes)
        shape = (w.shape[0], w.shape[1])
        per_row = (w.shape[0], -1)
        return cls(_packed(codes, bits), scale.reshape(per_row), offset.reshape(per_row), shape, bits, group_size)

    @property
    def group_size(self) -> int:
        """Inputs that share one scale and one offset."""
        return self.block_size

    def with_offset(self, offset: Array) -> AffineWeight:
        """Return a weight with other float32 offsets (out, in/group_size) and the very same codes and scales (not copies)."""
        return AffineWeight(self.codes, self.scale, frozen(offset, np.float32), self.shape, self.bits, self.group_size)

    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by class."""
        return {"codes": [self.codes], "scales": [self.scale], "offsets": [self.offset], "code_maps": []}

    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        return _as_float32(self.scale, first, last), _as_float32(self.offset, first, last)


def quantize_weight(w: Array, config: QuantConfig) -> CodebookWeight | AffineWeight:
    """Quantize w (out, in) as the configuration says.

    >>> quantize_weight(np.eye(64, dtype=np.float32), QuantConfig("int8", group_size=64)).bits_per_weight
    8.5
    """
    if config.affine:
        return AffineWeight.quantize(w, config.bits, config.group_size)
    return CodebookWeight.quantize(w, config.quant_type, config.block_size, config.double_quant)


def warm_up() -> float:
    """Compile every kernel that Numba's cache on disk does not hold yet, and return the seconds it took (cached: about 0.2).

    Call it before worker processes start: otherwise each of them compiles the same kernels.
    """
    start = time.perf_counter()
    w = np.eye(2, 8, dtype=np.float32)
    for weight in (CodebookWeight.quantize(w), AffineWeight.quantize(w, group_size=8)):
        weight.matmul(w[:1])  # matvec
        weight.rows(np.arange(2))  # dequantize
        weight.unpacked()
    return time.perf_counter() - start


def _checked(w: Array) -> Array:
    """Return w as read-only contiguous float32, refusing what cannot be quantized."""
    w = np.asarray(w)
    require(w.ndim == 2 and w.size > 0, "w.shape", w.shape, "must be (out, in), both at least 1")
    w = np.ascontiguousarray(w, np.float32).view()
    w.flags.writeable = False
    finite = np.isfinite(w)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"w[{row}, {column}]={w[row, column]}: weights must be finite float32 before they are quantized")
    return w


def _check_group_size(group_size: int, in_features: int) -> None:
    if group_size < 1 or in_features % group_size:
        divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
        require(False, "group_size", group_size, f"must divide in={in_features}; these do: {', '.join(map(str, divisors))}")


def _quantize_blocks(flat: Array, quant_type: str, block_size: int) -> tuple[Array, Array]:
    """Return (codes (n,) uint8, absmax (blocks,) float32) of a flat read-only float32 array."""
    midpoints, order = _thresholds(quant_type)
    absmax, ranks = np.empty(-(-flat.size // block_size), np.float32), np.empty(flat.size, np.uint8)
    kernels.quantize_codebook(flat, midpoints, block_size, absmax, ranks)
    return (order[ranks] if quant_type == "fp4" else ranks), absmax  # elsewhere a code is its rank


def _packed(codes: Array, bits: int) -> Array:
    packed = np.empty(kernels.packed_size(codes.size, bits), np.uint8)
    kernels.pack(codes, bits, packed)
    packed.flags.writeable = False
    return packed


def _as_float32(values: Array, first: int, last: int) -> Array:
    """Return values[first:last] of the flattened array, read-only float32."""
    part = values.reshape(-1)[first:last]
    if part.dtype == np.float16:
        out = np.empty(part.size, np.float32)
        kernels.half_to_float(part.view(np.uint16), out)
        out.flags.writeable = False
        return out
    return part
