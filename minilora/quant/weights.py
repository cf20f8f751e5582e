"""Codebook weights with double-quantized scales, and `quantize_weight`, which makes these or affine ones.

Both store packed codes and, for each block of the flattened row-major tensor, a scale (and an offset):

    w[i] = code_map[code[i]] · scale[i // block_size] + offset[i // block_size]

A codebook weight's code map holds NF4's or FP4's values, its scale is the block's max|w|, its offset 0. An
affine weight's code map is 0, 1, 2, …; since a group never crosses a row, groups along the input are blocks
of the flattened tensor. The arithmetic is in `quant.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minilora.config import ConfigError, QuantConfig, require
from minilora.quant import codebooks
from minilora.quant.affine import AffineWeight
from minilora.quant.dynamic import DYNAMIC_BLOCK_SIZE, dynamic_decode, dynamic_encode
from minilora.quant.packed import NO_OFFSETS, Array, CodedWeight, as_matrix, frozen, packed, require_finite
from minilora.quant.switch import implementation


@dataclass(frozen=True)
class DoubleQuant:
    """Block scales that are quantized themselves (QLoRA, arXiv 2305.14314, section 3).

    scale = dynamic_map[code]·absmax[block // 256] + offset

    Parameters
    ----------
    codes, absmax, offset : Array
        (blocks,) uint8; (⌈blocks/256⌉,) float32; (1,) float32, the mean of the scales.
    """

    codes: Array
    absmax: Array
    offset: Array

    def __post_init__(self) -> None:
        for name, dtype in (("codes", np.uint8), ("absmax", np.float32), ("offset", np.float32)):
            object.__setattr__(self, name, frozen(np.reshape(getattr(self, name), -1), dtype))
        expected = -(-self.codes.size // DYNAMIC_BLOCK_SIZE)
        allowed = f"{self.codes.size} blocks need {expected}"
        require(self.absmax.size == expected, "absmax.size", self.absmax.size, allowed)
        require(self.offset.size == 1, "offset.size", self.offset.size, "one number for the whole weight")

    @classmethod
    def quantize(cls, scales: Array) -> DoubleQuant:
        """Quantize positive float32 block scales (blocks,) to 8 bits around their mean."""
        offset = np.float32(scales.mean(dtype=np.float64))
        blocks = -(-scales.size // DYNAMIC_BLOCK_SIZE)
        codes, absmax = np.empty(scales.size, np.uint8), np.empty(blocks, np.float32)
        dynamic_encode(scales - offset, codes, absmax)
        return cls(codes, absmax, np.array([offset]))

    def decode(self, first: int, last: int) -> Array:
        """Return the scales of blocks first … last - 1, float32."""
        scales = dynamic_decode(self.codes, self.absmax, first=first, last=last)
        scales += self.offset
        return scales


class CodebookWeight(CodedWeight):
    """W (out, in) as codes of a NormalFloat or FP4 code map: w = code_map[code]·scale[block].

    The scale is max|w| of a block of the flattened tensor; the last block may be short. Codes, packing and
    decoding of NF4 and FP4 are bitsandbytes', bit by bit.

    Parameters
    ----------
    codes, scales : Array, Array or DoubleQuant
        (bytes,) uint8, packed; (blocks,) float32, or the same in 8 bits.
    quant_type, block_size : str, int
        `nf2`, `nf3`, `nf4`, `nf8` or `fp4`; weights that share a scale.

    Examples
    --------
    >>> w = np.array([[0.5, -1.0, 0.25, 0.0], [2.0, 1.0, 0.0, -2.0]], np.float32)
    >>> q = CodebookWeight.quantize(w, "nf4", block_size=4, double_quant=False)
    >>> print(q.dense().round(2))
    [[ 0.44 -1.    0.25  0.  ]
     [ 2.    0.88  0.   -2.  ]]
    """

    def __init__(
        self,
        codes: Array,
        scales: Array | DoubleQuant,
        shape: tuple[int, int],
        quant_type: str = "nf4",
        block_size: int = 64,
    ):
        self.code_map = codebooks.code_map(quant_type)
        require(block_size >= 1, "block_size", block_size, "must be at least 1")
        super().__init__(codes, shape, quant_type, block_size)
        self.scales = scales if isinstance(scales, DoubleQuant) else frozen(scales, np.float32)
        stored = (self.scales.codes if isinstance(self.scales, DoubleQuant) else self.scales).shape
        expected = (-(-self.shape[0] * self.shape[1] // self.block_size),)
        allowed = f"one scale for each block of {block_size}: {expected}"
        require(stored == expected, "scales.shape", stored, allowed)

    @classmethod
    def quantize(
        cls, w: Array, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
    ) -> CodebookWeight:
        """Quantize w (out, in): to each weight the nearest value times its block's max|w|; a tie goes down.

        Raises
        ------
        ValueError
            If a weight is not finite, or for an unknown `quant_type`.
        """
        w = as_matrix(w)
        midpoints, order = codebooks.thresholds(codebooks.code_map(quant_type))
        require(block_size >= 1, "block_size", block_size, "must be at least 1")
        codes, absmax = implementation("codes").quantize_codebook(w.reshape(-1), midpoints, block_size)
        if not np.isfinite(absmax).all():  # max|w| of a block with a NaN is NaN: this saves a pass over w
            require_finite(w)
        if quant_type == "fp4":
            codes = order[codes]  # elsewhere a code is its rank
        scales = DoubleQuant.quantize(absmax) if double_quant else absmax
        shape = (w.shape[0], w.shape[1])
        return cls(packed(codes, int(quant_type[-1])), scales, shape, quant_type, block_size)

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are quantized too."""
        return isinstance(self.scales, DoubleQuant)

    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by class."""
        scales, maps = self.scales, [self.code_map]
        if isinstance(scales, DoubleQuant):
            nested = [scales.codes, scales.absmax, scales.offset]
            maps.append(codebooks.dynamic_map())
        else:
            nested = [scales]
        return {"codes": [self.codes], "scales": nested, "offsets": [], "code_maps": maps}

    @property
    def _decodes_scales(self) -> bool:
        return self.double_quant

    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        if isinstance(self.scales, DoubleQuant):
            return self.scales.decode(first, last), NO_OFFSETS
        return self.scales[first:last], NO_OFFSETS


def quantize_weight(w: Array, config: QuantConfig) -> CodebookWeight | AffineWeight:
    """Quantize w (out, in) as the configuration says, by itself: `rtn` or `hqq`; `gptq` needs data.

    >>> quantize_weight(np.eye(64, dtype=np.float32), QuantConfig("int8", group_size=64)).bits_per_weight
    8.5
    """
    if config.quantizer == "gptq":
        raise ConfigError(
            "quantizer='gptq': needs calibration data; quantize_model(model, config, calibration) takes them"
        )
    if config.affine:
        return AffineWeight.quantize(w, config.bits, config.group_size, config.fit, config.offset_dtype)
    return CodebookWeight.quantize(w, config.quant_type, config.block_size, config.double_quant)
