"""Affine groups with whole zero points, w = scale·(q − zero): what GPTQ files hold."""

from __future__ import annotations

import numpy as np

from minilora.quant import fits
from minilora.quant.affine import AffineWeight
from minilora.quant.packed import Array, frozen, packed
from minilora.quant.switch import implementation


class ZeroPointWeight(AffineWeight):
    """An `AffineWeight` whose offset is −scale·zero, with zeros of `bits` bits, (out, in/group_size).

    The third argument is the zeros, whole numbers from 0 to 2^bits − 1. A merge of QA-LoRA into its offsets
    makes an `AffineWeight`, because their sum is no whole multiple of the scale.
    """

    def _store_offset(self, offset: Array) -> None:
        self._check("zeros", offset)
        top = 2**self.bits - 1
        if offset.dtype.kind not in "iu" or offset.min() < 0 or offset.max() > top:
            found = f"{offset.dtype} from {offset.min()} to {offset.max()}"
            raise ValueError(f"zeros={found}: whole numbers from 0 to {top}")
        self._offset = packed(offset.astype(np.uint8).reshape(-1), self.bits)

    @property
    def zeros(self) -> Array:  # type: ignore[override]
        """Whole zero points (out, in/group_size) uint8."""
        return self._unpack_zeros(0, self.scale.size).reshape(self.scale.shape)

    @property
    def offset(self) -> Array:
        """−scale·zero (out, in/group_size), which float32 holds exactly."""
        return fits.offset_of(self.zeros, self.scale)

    @property
    def _decodes_scales(self) -> bool:
        return True

    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        scale = implementation("codes").half_to_float(self.scale.reshape(-1)[first:last])
        return frozen(scale, np.float32), frozen(-scale * self._unpack_zeros(first, last), np.float32)

    def _unpack_zeros(self, first: int, last: int) -> Array:
        return implementation("codes").unpack(self._offset, self.bits, last - first, first)
