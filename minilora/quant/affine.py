"""Affine groups: w = scale·q + offset, the form whose offsets QA-LoRA merges into."""

from __future__ import annotations

import numpy as np

from minilora.config import require, require_in
from minilora.quant import kernels
from minilora.quant.packed import Array, CodedWeight, checked, frozen, packed


class AffineWeight(CodedWeight):
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
        w = checked(w)
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
        return cls(packed(codes, bits), scale.reshape(per_row), offset.reshape(per_row), shape, bits, group_size)

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


def _check_group_size(group_size: int, in_features: int) -> None:
    if group_size < 1 or in_features % group_size:
        divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
        require(False, "group_size", group_size, f"must divide in={in_features}; these do: {', '.join(map(str, divisors))}")


def _as_float32(values: Array, first: int, last: int) -> Array:
    """Return values[first:last] of the flattened array, read-only float32."""
    part = values.reshape(-1)[first:last]
    if part.dtype == np.float16:
        out = np.empty(part.size, np.float32)
        kernels.half_to_float(part.view(np.uint16), out)
        out.flags.writeable = False
        return out
    return part
