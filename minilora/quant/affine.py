"""Affine groups: w = scale·q + offset, the form whose offsets QA-LoRA merges into."""

from __future__ import annotations

import numpy as np

from minilora.config import require, require_in
from minilora.quant import fits
from minilora.quant.packed import Array, CodedWeight, checked, frozen, packed
from minilora.quant.switch import implementation


class AffineWeight(CodedWeight):
    """W (out, in) as w = scale·q + offset, q a whole number of few bits, for each group of inputs of a row.

    It is QA-LoRA's W̃ = α·q + β (arXiv 2309.14717, eq. 1) and GGUF's Q4_1. Because the offset is a real
    number, a ΔW that is constant within each group merges into it exactly. `quant.zero_points` has whole zero
    points instead, as GPTQ files do.

    Parameters
    ----------
    codes, scale, offset : Array
        (bytes,) uint8, packed; (out, in/group_size) float16, the offset after a merge float32.
    bits, group_size : int
        2, 3, 4 or 8; inputs that share a scale and an offset, a divisor of `in`.

    Examples
    --------
    >>> q = AffineWeight.quantize(np.array([[0.0, 0.4, 1.0, 3.0]], np.float32), bits=2, group_size=4)
    >>> q.unpacked().tolist(), q.scale.tolist(), q.offset.tolist()
    ([[0, 0, 1, 3]], [[1.0]], [[0.0]])
    >>> q.with_offset(q.offset - 1).dense().tolist()
    [[-1.0, -1.0, 0.0, 2.0]]
    """

    zeros: Array | None = None
    """Whole zero points; None, because the offsets are real numbers."""

    def __init__(
        self, codes: Array, scale: Array, offset: Array, shape: tuple[int, int], bits: int, group_size: int
    ):
        require_in(bits, (2, 3, 4, 8), "bits")
        _check_group_size(group_size, int(shape[1]))
        super().__init__(codes, shape, f"int{bits}", group_size)
        self.scale = frozen(scale, np.float16)
        self._check("scale", self.scale)
        self._store_offset(np.asarray(offset))

    def _store_offset(self, offset: Array) -> None:
        self._offset = frozen(offset, np.float32 if offset.dtype.itemsize > 2 else np.float16)
        self._check("offset", self._offset)

    def _check(self, name: str, array: Array) -> None:
        expected = (self.shape[0], self.shape[1] // self.block_size)
        allowed = f"one number for each group: {expected}"
        require(array.shape == expected, f"{name}.shape", array.shape, allowed)
        if not np.isfinite(array).all():
            where = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
            raise ValueError(
                f"{name}{list(where)}={array[where]}: must be finite ({array.dtype}; float16 ends at 65504)"
            )

    @classmethod
    def quantize(
        cls, w: Array, bits: int = 4, group_size: int = 32, fit: str = "minmax", store: str = "float16"
    ) -> AffineWeight:
        """Quantize w (out, in): fit a scale and an offset to each group, and round to the nearest code.

            q = clip(rint((w − offset)/scale), 0, 2^bits − 1)

        Scale and offset are rounded first to what is stored. A group whose scale rounds to 0 (all its weights
        are equal) gets scale 1.

        Parameters
        ----------
        fit : str
            `minmax`, `symmetric`, `mse` or `hqq` (`quant.fits`).
        store : str
            How to store the offset: `float16`, `float32`, or `zero` for whole zero points.

        Raises
        ------
        ValueError
            For a weight that is not finite or beyond float16, for other `bits`, and for a `group_size` that
            does not divide `in`.
        """
        require_in(bits, (2, 3, 4, 8), "bits")
        w = checked(w)
        _check_group_size(group_size, w.shape[1])
        scale, offset = fits.fit_groups(w.reshape(-1, group_size), bits, fit, store)
        numbers = scale.astype(np.float32), fits.offset_of(offset, scale)
        codes = implementation("codes").quantize_affine(w.reshape(-1), *numbers, bits)
        shape, groups = (w.shape[0], w.shape[1]), (w.shape[0], w.shape[1] // group_size)
        stored = packed(codes, bits), scale.reshape(groups), offset.reshape(groups)
        return cls.from_stored(*stored, shape, bits, group_size)

    @staticmethod
    def from_stored(
        codes: Array, scale: Array, offset: Array, shape: tuple[int, int], bits: int, group_size: int
    ) -> AffineWeight:
        """Return a weight of these arrays, a `ZeroPointWeight` if the offsets are uint8."""
        from minilora.quant.zero_points import ZeroPointWeight  # which is an AffineWeight itself

        make = ZeroPointWeight if offset.dtype == np.uint8 else AffineWeight
        return make(codes, scale, offset, shape, bits, group_size)

    @property
    def group_size(self) -> int:
        """Inputs that share one scale and one offset."""
        return self.block_size

    offset_group = group_size  # QA-LoRA pools as many inputs

    @property
    def offset(self) -> Array:
        """(out, in/group_size) float16 or float32."""
        return self._offset

    def with_offset(self, offset: Array) -> AffineWeight:
        """Return a weight with other float32 offsets and the very same codes and scales (not copies)."""
        new = frozen(offset, np.float32)
        return AffineWeight(self.codes, self.scale, new, self.shape, self.bits, self.group_size)

    def stored(self, store: str) -> tuple[AffineWeight, float]:
        """Return the same weight with its offsets stored otherwise, and the largest change of an offset.

        `float32` changes nothing; `float16` rounds to 11 bits; `zero` rounds to whole multiples of the scale,
        all weights of a group alike, and clips to what `bits` bits hold.

        >>> q = AffineWeight.quantize(np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), 2, 4)
        >>> rounded, change = q.with_offset([[-0.75]]).stored("zero")
        >>> rounded.zeros.tolist(), change
        ([[1]], 0.25)
        """
        require_in(store, fits.OFFSET_STORES, "store")
        before = self.offset.astype(np.float32)
        offset = fits.stored_offset(before, self.scale, self.bits, store)
        weight = self.from_stored(self.codes, self.scale, offset, self.shape, self.bits, self.group_size)
        return weight, float(np.abs(weight.offset - before).max())

    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by class."""
        return {"codes": [self.codes], "scales": [self.scale], "offsets": [self._offset], "code_maps": []}

    @property
    def _decodes_scales(self) -> bool:  # vectors read float16 where it lies
        return not (self._in_vectors() and self._offset.dtype == np.float16)

    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        return self.scale.reshape(-1)[first:last], self._offset.reshape(-1)[first:last]


def _check_group_size(group_size: int, in_features: int) -> None:
    if group_size < 1 or in_features % group_size:
        divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
        allowed = f"must divide in={in_features}; these do: {', '.join(map(str, divisors))}"
        require(False, "group_size", group_size, allowed)
