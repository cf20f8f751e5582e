"""GGUF's blocks of 32 weights, multiplied as they lie in the file: `BlockWeight` for Q4_0, Q4_1 and Q8_0.

A block is one scale d, for Q4_1 also one minimum m, both little-endian float16, and then 32 codes:

    Q4_0   d, 16 bytes           w = d·(q - 8)     4.5 bits per weight
    Q4_1   d, m, 16 bytes        w = d·q + m       5.0
    Q8_0   d, 32 signed bytes    w = d·q           8.5

Of the 16 bytes, byte j holds q of weight j in its low half and q of weight j + 16 in its high half.

d has 11 significant bits and q at most 8, so d·q is exact in float32, and each weight is rounded once at
most. That is why a fused multiply-add, NumPy, the gguf package and our kernels all give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minilora.config import ConfigError, require, require_in
from minilora.kernels import is_plain, load
from minilora.quant.affine import AffineWeight
from minilora.quant.packed import Array, PackedWeight, checked, packed
from minilora.quant.switch import implementation

GGUF_BLOCK = 32
"""Weights of a block; a row is a whole number of blocks."""

BLOCK_BYTES = {"Q4_0": 2 + 16, "Q4_1": 2 + 2 + 16, "Q8_0": 2 + 32}
"""Bytes of a block by type; the kernels tell the types apart by this number."""

HALF = np.dtype("<f2")

PIECE = 256 * 1024
"""Weights that are quantized or checked at once: 1 MiB of float32."""


def few_rows() -> int:
    """Return up to how many rows of x are multiplied while blocks are decoded; 0: always decode first."""
    return 0 if is_plain() else int(load("block_codes").few_rows())


class BlockWeight(PackedWeight):
    """W (out, in) as the bytes of GGUF's blocks, which are viewed and never copied.

    Parameters
    ----------
    blocks : Array
        uint8 (out, in/32·bytes of a block), C-contiguous; a read-only memory map will do.
    quant_type : str
        `Q4_0`, `Q4_1` or `Q8_0`.
    shape : tuple of int
        (out, in).

    Raises
    ------
    ValueError
        For another dtype, layout or size, and for a scale or minimum that is not finite.

    Examples
    --------
    >>> q = BlockWeight.quantize(np.arange(32, dtype=np.float32)[None] - 16, "Q4_0")
    >>> q.scales.tolist(), q.dense()[0, [0, 1, 15, 16, 17, 31]].tolist(), q.bits_per_weight
    ([[2.0]], [-16.0, -14.0, 0.0, 0.0, 2.0, 14.0], 4.5)
    """

    def __init__(self, blocks: Array, quant_type: str, shape: tuple[int, int]):
        require_in(quant_type, BLOCK_BYTES, "quant_type")
        super().__init__(shape)
        size, blocks = BLOCK_BYTES[quant_type], np.asarray(blocks)
        allowed = f"in must be a multiple of {GGUF_BLOCK}: a block lies in one row"
        require(self.shape[1] % GGUF_BLOCK == 0, "shape", self.shape, allowed)
        rows = (self.shape[0], self.shape[1] // GGUF_BLOCK)
        kind = str(blocks.dtype)
        require(blocks.dtype == np.uint8, "blocks.dtype", kind, "must be uint8, the bytes of the file")
        expected = (rows[0], rows[1] * size)
        allowed = f"{quant_type} {self.shape} takes {expected} bytes"
        require(blocks.shape == expected, "blocks.shape", blocks.shape, allowed)
        allowed = "must be C-contiguous; np.ascontiguousarray copies"
        require(blocks.flags.c_contiguous, "blocks.strides", blocks.strides, allowed)
        self.quant_type, self.bits, self.block_size = quant_type, int(quant_type[1]), GGUF_BLOCK
        self.blocks = blocks.view()
        self.blocks.flags.writeable = False
        self._flat_blocks = self.blocks.reshape(-1, size)
        header = 4 if quant_type == "Q4_1" else 2
        self.scales = self._part(0, HALF, rows)
        self.offsets = self._part(2, HALF, rows) if quant_type == "Q4_1" else None
        self.codes = self._part(header, np.dtype(np.uint8), (*rows, size - header))
        for name, values in (("d", self.scales), ("m", self.offsets)):
            if values is not None:
                _check_finite(values, f"{name} of {quant_type} block")

    def _part(self, at: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """Return a view of what begins at byte `at` of each block.

        It is no slice: a ledger that counts bytes by the array behind a view would count all blocks for each
        part.
        """
        size = BLOCK_BYTES[self.quant_type]
        first = self._flat_blocks[0, at : at + dtype.itemsize].view(dtype)
        return as_strided(first, shape, (shape[1] * size, size, 1)[: len(shape)], writeable=False)

    @classmethod
    def quantize(cls, w: Array, quant_type: str) -> BlockWeight:
        """Quantize w (out, in) as ggml's `quantize_row_*_ref` do, to the very bytes of the gguf package.

            Q4_0   d = (the weight of largest magnitude)/-8    q = min(15, ⌊w/d + 8.5⌋)
            Q4_1   m = min, d = (max - min)/15                 q = min(15, ⌊(w - m)/d + 0.5⌋)
            Q8_0   d = max|w|/127                              q = w/d, ties away from zero

        The codes are fitted to d before it is rounded to float16, and w/d is w·(1/d).

        Raises
        ------
        ValueError
            For weights that are not finite or too large for float16, and for `in` that is no multiple of 32.
        """
        require_in(quant_type, BLOCK_BYTES, "quant_type")
        w = checked(w)
        require(w.shape[1] % GGUF_BLOCK == 0, "w.shape", w.shape, f"in must be a multiple of {GGUF_BLOCK}")
        blocks = np.empty((w.size // GGUF_BLOCK, BLOCK_BYTES[quant_type]), np.uint8)
        step = PIECE // GGUF_BLOCK
        for first in range(0, len(blocks), step):  # a piece at a time, so that temporaries stay small
            part = slice(first, first + step)
            _quantize(w.reshape(-1, GGUF_BLOCK)[part], quant_type, blocks[part])
        return cls(blocks.reshape(w.shape[0], -1), quant_type, (w.shape[0], w.shape[1]))

    @classmethod
    def from_affine(cls, weight: AffineWeight) -> tuple[BlockWeight, float]:
        """Return int4 groups of 32 as Q4_1 with the same codes, and the largest change of an offset.

        Q4_1 has float16 offsets. After a QA-LoRA merge the change is at most 2^-11 of the largest offset
        (2^-25 for offsets below 2^-14); without one it is 0.

        Raises
        ------
        ValueError
            For other bits or group sizes, and for an offset beyond float16.
        """
        require(weight.bits == 4, "bits", weight.bits, "Q4_1 holds 4-bit codes: quantize with bits=4")
        allowed = f"Q4_1 has groups of {GGUF_BLOCK}"
        require(weight.group_size == GGUF_BLOCK, "group_size", weight.group_size, allowed)
        with np.errstate(over="ignore"):  # the constructor refuses what becomes infinite
            offset = weight.offset.astype(HALF)
        codes = weight.unpacked().reshape(-1, 2, GGUF_BLOCK // 2)
        blocks = np.empty((len(codes), BLOCK_BYTES["Q4_1"]), np.uint8)
        blocks[:, :4].view(HALF)[:] = np.stack([weight.scale.reshape(-1), offset.reshape(-1)], axis=1)
        blocks[:, 4:] = codes[:, 0] | codes[:, 1] << 4
        result = cls(blocks.reshape(weight.shape[0], -1), "Q4_1", weight.shape)
        return result, float(np.abs(offset.astype(np.float64) - weight.offset).max())

    def affine(self) -> AffineWeight:
        """Return a Q4_1 weight as int4 groups of 32: the same numbers, into which QA-LoRA can merge."""
        if self.offsets is None:
            raise ConfigError(
                f"quant_type={self.quant_type!r}: only Q4_1 has an offset for each group; "
                "quantize the weight to int4"
            )
        codes = np.concatenate([self.codes & 15, self.codes >> 4], axis=-1)
        flat, offsets = packed(codes.reshape(-1), 4), np.asarray(self.offsets)
        return AffineWeight(flat, self.scales, offsets, self.shape, 4, GGUF_BLOCK)

    def arrays(self) -> dict[str, list[Array]]:
        """Return views of the stored bytes by class; together they are all bytes of the blocks."""
        offsets = [] if self.offsets is None else [self.offsets]
        return {"codes": [self.codes], "scales": [self.scales], "offsets": offsets, "code_maps": []}

    @property
    def offset_group(self) -> int:  # type: ignore[override]
        """Inputs that share one offset, into which QA-LoRA merges; 0 if there are none."""
        return 0 if self.offsets is None else GGUF_BLOCK

    def _decode_into(self, start: int, out: Array) -> None:
        blocks = self._flat_blocks[start // GGUF_BLOCK : (start + out.size) // GGUF_BLOCK]
        implementation("block_codes").dequantize_blocks(blocks, out)

    @property
    def _few(self) -> int:
        return few_rows()

    def _multiply_few(self, x: Array, out: Array) -> None:
        out[:] = implementation("block_codes").multiply_blocks(self._flat_blocks, x)


def _check_finite(values: Array, what: str) -> None:
    """Refuse float16 infinity and NaN by row and block; a piece at a time, to spare memory."""
    step = max(1, PIECE // values.shape[1])
    for first in range(0, len(values), step):
        bad = ~np.isfinite(values[first : first + step])
        if bad.any():
            row, block = np.argwhere(bad)[0].tolist()
            place, value = f"{what} [{first + row}, {block}]", values[first + row, block]
            raise ValueError(f"{place}={value}: must be finite (float16 ends at 65504)")


def _quantize(x: Array, quant_type: str, out: Array) -> None:
    """Write blocks x (n, 32) float32 as bytes into `out` (n, bytes of a block)."""
    low: Array | None = None
    with np.errstate(divide="ignore", over="ignore"):  # what becomes infinite is mended below, or refused
        if quant_type == "Q4_0":
            d = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1) / np.float32(-8)
        elif quant_type == "Q4_1":
            low = x.min(axis=1, keepdims=True)
            d = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
        else:
            d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        inverse = np.float32(1) / d
        header = d.astype(HALF) if low is None else np.concatenate([d, low], axis=1).astype(HALF)
    if not np.isfinite(header).all():
        block = int(np.argwhere(~np.isfinite(header))[0, 0])
        what = f"{quant_type}: scale or minimum of block {block}"
        raise ValueError(f"{what} exceeds float16's 65504: scale the weights down first")
    inverse[np.isinf(inverse)] = 0
    if quant_type == "Q8_0":
        scaled = x * inverse
        whole = np.trunc(scaled)
        # rint takes ties to even, and ⌊|x| + 0.5⌋ takes 0.49999997 to 1; x - trunc(x) is exact
        codes = (whole + np.trunc(2 * (scaled - whole))).astype(np.int8).view(np.uint8)
    else:
        shifted = x * inverse + np.float32(8.5) if low is None else (x - low) * inverse + np.float32(0.5)
        codes = np.minimum(np.trunc(shifted), 15).astype(np.uint8)
    # where 1/d = ∞, the gguf package's codes are 0, on x86 at least; such a d is 0 in float16 anyway
    codes[((inverse == 0) & (d != 0))[:, 0]] = 0
    out[:, : 2 * header.shape[1]] = header.view(np.uint8)
    out[:, 2 * header.shape[1] :] = codes if quant_type == "Q8_0" else codes[:, :16] | codes[:, 16:] << 4
