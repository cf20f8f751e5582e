"""Affine groups: w = scale·q + offset, the form whose offsets QA-LoRA merges into."""

from __future__ import annotations

import numpy as np

from minilora.config import require, require_in
from minilora.kernels import codes as kernels
from minilora.kernels import codes_vectors as simd
from minilora.quant import fits
from minilora.quant.packed import Array, CodedWeight, checked, frozen, packed


class AffineWeight(CodedWeight):
    """W (out, in) as w = scale·q + offset, q a whole number of ``bits`` bits, for each group of
    ``group_size`` inputs of a row.

    ``scale`` (out, in/group_size) float16 · ``offset`` likewise, float16, or float32 after a merge. It is
    QA-LoRA's W̃ = α·q + β (arXiv 2309.14717, eq. 1) and GGUF's Q4_1. Because the offset is a real number, ΔW
    that is constant within each group merges into it exactly. ``from_zeros`` stores whole zero points of
    ``bits`` bits instead, as GPTQ files do: offset = −scale·zero.

    >>> q = AffineWeight.quantize(np.array([[0.0, 0.4, 1.0, 3.0]], np.float32), bits=2, group_size=4)
    >>> q.unpacked().tolist(), q.scale.tolist(), q.offset.tolist()
    ([[0, 0, 1, 3]], [[1.0]], [[0.0]])
    >>> q.with_offset(q.offset - 1).dense().tolist()
    [[-1.0, -1.0, 0.0, 2.0]]
    """

    def __init__(
        self, codes: Array, scale: Array, offset: Array, shape: tuple[int, int], bits: int, group_size: int
    ):
        self._init(codes, scale, shape, bits, group_size)
        self._offset = frozen(offset, np.float32 if np.asarray(offset).dtype.itemsize > 2 else np.float16)
        self._check("offset", self._offset)
        self._zeros: Array | None = None

    @classmethod
    def from_zeros(
        cls, codes: Array, scale: Array, zeros: Array, shape: tuple[int, int], bits: int, group_size: int
    ) -> AffineWeight:
        """Return a weight w = scale·(q − zero) with whole zero points, zeros (out, in/group_size) from 0 to
        2^bits − 1."""
        weight = cls.__new__(cls)
        weight._init(codes, scale, shape, bits, group_size)
        zeros = np.asarray(zeros)
        weight._check("zeros", zeros)
        if zeros.dtype.kind not in "iu" or zeros.min() < 0 or zeros.max() >= 2**bits:
            raise ValueError(
                f"zeros={zeros.dtype} from {zeros.min()} to {zeros.max()}: whole numbers from 0 to {2**bits - 1}"
            )
        weight._zeros = packed(zeros.astype(np.uint8).reshape(-1), bits)
        weight._offset = weight._zeros  # what is stored; ``offset`` says what it means
        return weight

    def _init(self, codes: Array, scale: Array, shape: tuple[int, int], bits: int, group_size: int) -> None:
        require_in(bits, (2, 3, 4, 8), "bits")
        _check_group_size(group_size, int(shape[1]))
        super().__init__(codes, shape, f"int{bits}", group_size)
        self.scale = frozen(scale, np.float16)
        self._check("scale", self.scale)

    def _check(self, name: str, array: Array) -> None:
        expected = (self.shape[0], self.shape[1] // self.block_size)
        require(
            array.shape == expected, f"{name}.shape", array.shape, f"one number for each group: {expected}"
        )
        if not np.isfinite(array).all():
            where = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
            raise ValueError(
                f"{name}{list(where)}={array[where]}: must be finite ({array.dtype}; float16 ends at 65504)"
            )

    @classmethod
    def quantize(
        cls, w: Array, bits: int = 4, group_size: int = 32, fit: str = "minmax", store: str = "float16"
    ) -> AffineWeight:
        """Quantize w (out, in): a scale and an offset for each group, then q = clip(rint((w − offset)/scale),
        0, 2^bits − 1).

        ``fit``: ``minmax``, ``symmetric``, ``mse`` or ``hqq``; ``store``: how the offset is kept,
        ``float16``, ``float32`` or ``zero`` (see ``quant.fits``). Both are rounded to what is stored first,
        and q fitted to the rounded ones. A group whose scale rounds to 0 (all its weights equal) gets scale
        1. Raises ``ValueError`` for a weight that is not finite or beyond float16, for ``bits`` outside 2, 3,
        4, 8 and for a ``group_size`` that does not divide ``in``.
        """
        require_in(bits, (2, 3, 4, 8), "bits")
        w = checked(w)
        _check_group_size(group_size, w.shape[1])
        scale, offset = fits.fit_groups(w.reshape(-1, group_size), bits, fit, store)
        codes = np.empty(w.size, np.uint8)
        kernels.quantize_affine(
            w.reshape(-1),
            frozen(scale, np.float32),
            frozen(fits.offset_of(offset, scale), np.float32),
            group_size,
            2**bits - 1,
            codes,
        )
        return cls.from_stored(packed(codes, bits), scale, offset, (w.shape[0], w.shape[1]), bits, group_size)

    @classmethod
    def from_stored(
        cls, codes: Array, scale: Array, offset: Array, shape: tuple[int, int], bits: int, group_size: int
    ) -> AffineWeight:
        """Return a weight from packed codes, scales and offsets as ``fits.fit_groups`` makes them: uint8 ones
        are zero points."""
        groups = (shape[0], shape[1] // group_size)
        make = cls.from_zeros if offset.dtype == np.uint8 else cls
        return make(codes, scale.reshape(groups), offset.reshape(groups), shape, bits, group_size)

    @property
    def group_size(self) -> int:
        """Inputs that share one scale and one offset."""
        return self.block_size

    offset_group = group_size
    """Inputs that share one offset, into which QA-LoRA merges."""

    @property
    def offset(self) -> Array:
        """(out, in/group_size) float16 or float32; for whole zero points −scale·zero, which float32 holds
        exactly."""
        zeros = self.zeros
        return self._offset if zeros is None else fits.offset_of(zeros, self.scale)

    @property
    def zeros(self) -> Array | None:
        """Whole zero points (out, in/group_size) uint8, or None if the offsets are real numbers."""
        return (
            None if self._zeros is None else self._unpack_zeros(0, self.scale.size).reshape(self.scale.shape)
        )

    def with_offset(self, offset: Array) -> AffineWeight:
        """Return a weight with other float32 offsets (out, in/group_size) and the very same codes and scales
        (not copies)."""
        return AffineWeight(
            self.codes, self.scale, frozen(offset, np.float32), self.shape, self.bits, self.group_size
        )

    def stored(self, store: str) -> tuple[AffineWeight, float]:
        """Return (the same codes and scales with the offsets stored otherwise, largest change of any weight).

        ``float32`` changes nothing; ``float16`` rounds to 11 bits; ``zero`` rounds to whole multiples of the
        scale, all weights of a group alike, and clips to what ``bits`` bits hold.

        >>> q = AffineWeight.quantize(np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), 2, 4).with_offset([[-0.75]])
        >>> q.stored("zero")[0].zeros.tolist(), q.stored("zero")[1]
        ([[1]], 0.25)
        """
        require_in(store, fits.OFFSET_STORES, "store")
        before = self.offset.astype(np.float32)
        offset = fits.stored_offset(before, self.scale, self.bits, store)
        make = AffineWeight.from_zeros if store == "zero" else AffineWeight
        weight = make(self.codes, self.scale, offset, self.shape, self.bits, self.group_size)
        return weight, float(np.abs(weight.offset - before).max())

    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by class."""
        return {"codes": [self.codes], "scales": [self.scale], "offsets": [self._offset], "code_maps": []}

    @property
    def _decodes_scales(self) -> bool:  # vectors read float16 where it lies
        return not (self._kernels is simd and self._zeros is None and self._offset.dtype == np.float16)

    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        if not self._decodes_scales:
            scale_bits, offset_bits = (
                a.view(np.uint16).reshape(-1)[first:last] for a in (self.scale, self._offset)
            )
            return scale_bits, offset_bits
        scale = _as_float32(self.scale, first, last)
        if self._zeros is None:
            return scale, _as_float32(self._offset, first, last)
        return scale, frozen(-scale * self._unpack_zeros(first, last), np.float32)

    def _unpack_zeros(self, first: int, last: int) -> Array:
        start = first // 8 * 8  # 8 zero points fill whole bytes at every width
        zeros = np.empty(last - start, np.uint8)
        kernels.unpack(frozen(self._offset[start * self.bits // 8 :], np.uint8), self.bits, zeros)
        return zeros[first - start :]


def _check_group_size(group_size: int, in_features: int) -> None:
    if group_size < 1 or in_features % group_size:
        divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
        require(
            False,
            "group_size",
            group_size,
            f"must divide in={in_features}; these do: {', '.join(map(str, divisors))}",
        )


def _as_float32(values: Array, first: int, last: int) -> Array:
    """Return values[first:last] of the flattened array, read-only float32."""
    part = values.reshape(-1)[first:last]
    if part.dtype == np.float16:
        out = np.empty(part.size, np.float32)
        kernels.half_to_float(part.view(np.uint16), out)
        out.flags.writeable = False
        return out
    return part
