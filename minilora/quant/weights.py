"""Codebook weights, with double-quantized scales, and ``quantize_weight``, which makes these or the affine
module's.

Both kinds store packed codes and, for each block of the flattened row-major tensor, a scale (and an offset):

    w[i] = levels[code[i]] · scale[i // block_size] + offset[i // block_size]

A codebook's levels are NF4's or FP4's values, its scale is the block's max|w|, its offset 0. An affine
weight's levels are 0, 1, 2, …; since a group never crosses a row, groups along the input are blocks of the
flattened tensor too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from minilora.config import ConfigError, QuantConfig, require
from minilora.kernels import codes as kernels
from minilora.kernels import codes_vectors as simd
from minilora.quant import codebooks
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.packed import NO_OFFSETS, Array, CodedWeight, as_matrix, frozen, packed, require_finite

DYNAMIC_BLOCK_SIZE = NESTED_BLOCK_SIZE = 256
"""Block size of what the 8-bit dynamic map stores: the scales of double quantization (QLoRA, arXiv
2305.14314, section 3) and Adam's moments (``minilora.training.states``)."""


@cache
def _dynamic_table(signed: bool = True) -> Array:
    return kernels.lookup_table(codebooks.dynamic_map(signed), 8)


@cache
def thresholds(quant_type: str) -> tuple[Array, Array]:
    """Return (midpoints, padded to the length that the kernel knows; order) of a codebook, or of
    ``"dynamic"``, made once."""
    values = codebooks.dynamic_map() if quant_type == "dynamic" else codebooks.code_map(quant_type)
    midpoints, order = codebooks.thresholds(values)
    padded = np.full(
        15 if midpoints.size <= 15 else 255, np.inf, np.float32
    )  # the sizes that the kernel knows
    padded[: midpoints.size] = midpoints
    return frozen(padded, np.float32), frozen(order, np.uint8)


@cache
def _moment_thresholds(signed: bool) -> tuple[Array, Array]:
    """Midpoints of a dynamic map and their table; unsigned, all that is above 0 rounds to a value above 0."""
    midpoints, _ = codebooks.thresholds(codebooks.dynamic_map(signed))
    if not signed:
        midpoints[0] = 0
    return frozen(midpoints, np.float32), kernels.rank_table(midpoints)


def dynamic_encode(values: Array, codes: Array, absmax: Array, signed: bool = True) -> None:
    """Quantize float32 values (n,), block by block of 256, to the nearest value of the dynamic map times
    max|x| of the block.

    Written to ``codes`` (n,) uint8 and ``absmax`` (⌈n/256⌉,) float32; a tie takes the lower code.
    ``signed=False`` is for values from 0 on, of which one above 0 gets a code above 0, even where 0 is
    nearest: Adam divides by their root.

    >>> codes, absmax = np.empty(3, np.uint8), np.empty(1, np.float32)
    >>> dynamic_encode(np.array([0, 1, -4], np.float32), codes, absmax)
    >>> print(dynamic_decode(codes, absmax).round(2))
    [ 0.    0.99 -3.97]
    """
    flat = values.view()
    flat.flags.writeable = False
    kernels.quantize_by_table(flat, *_moment_thresholds(signed), DYNAMIC_BLOCK_SIZE, absmax, codes)


def dynamic_decode(codes: Array, absmax: Array, signed: bool = True) -> Array:
    """Return what ``dynamic_encode`` stored, dynamic_map[code]·absmax[block], as a new float32 array (n,)."""
    out = np.empty(codes.size, np.float32)
    stored, scales = codes.view(), absmax.view()
    stored.flags.writeable = scales.flags.writeable = False
    kernels.dequantize(stored, 8, _dynamic_table(signed), scales, NO_OFFSETS, DYNAMIC_BLOCK_SIZE, 0, out)
    return out


@dataclass(frozen=True)
class DoubleQuant:
    """Block scales that are quantized themselves: absmax = dynamic_map[codes]·absmax2[block // 256] + offset.

    ``codes`` (blocks,) uint8 · ``absmax`` (⌈blocks/256⌉,) float32 · ``offset`` (1,) float32, the mean of the
    scales.
    """

    codes: Array
    absmax: Array
    offset: Array

    def __post_init__(self) -> None:
        for name, dtype in (("codes", np.uint8), ("absmax", np.float32), ("offset", np.float32)):
            object.__setattr__(self, name, frozen(np.reshape(getattr(self, name), -1), dtype))
        expected = -(-self.codes.size // NESTED_BLOCK_SIZE)
        require(
            self.absmax.size == expected,
            "absmax.size",
            self.absmax.size,
            f"{self.codes.size} blocks need {expected}",
        )
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
        kernels.dequantize(
            self.codes,
            8,
            _dynamic_table(),
            self.absmax[first // NESTED_BLOCK_SIZE :],
            NO_OFFSETS,
            NESTED_BLOCK_SIZE,
            first,
            scales,
        )
        scales += self.offset
        scales.flags.writeable = False
        return scales


class CodebookWeight(CodedWeight):
    """W (out, in) as codes of a NormalFloat or FP4 codebook times max|w| of each block of the flattened
    tensor.

    w = code_map[code]·absmax[block] (QLoRA, arXiv 2305.14314, section 3). NF4 and FP4 codes, packing and
    decoding are bitsandbytes', bit by bit; the last block may be short. ``scales`` is float32 absmax
    (blocks,) or a ``DoubleQuant``.

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
        require(
            stored == expected,
            "scales.shape",
            stored,
            f"one scale for each block of {block_size}: {expected}",
        )

    @classmethod
    def quantize(
        cls, w: Array, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
    ) -> CodebookWeight:
        """Quantize w (out, in), block by block: the code of the nearest value to w/absmax; a tie takes the
        lower value.

        Raises ``ValueError`` if a weight is not finite, or for an unknown ``quant_type``.
        """
        w = as_matrix(w)
        codebooks.code_map(quant_type)  # an unknown name is refused here
        require(block_size >= 1, "block_size", block_size, "must be at least 1")
        codes, absmax = _quantize_blocks(w.reshape(-1), quant_type, block_size)
        if not np.isfinite(absmax).all():  # so is max|w| of a block with a NaN: a pass over w is saved
            require_finite(w)
        scales = DoubleQuant.quantize(absmax) if double_quant else absmax
        shape = (w.shape[0], w.shape[1])
        return cls(packed(codes, int(quant_type[-1])), scales, shape, quant_type, block_size)

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

    @property
    def _decodes_scales(self) -> bool:
        return isinstance(self.scales, DoubleQuant)

    def _block_values(self, first: int, last: int) -> tuple[Array, Array]:
        if isinstance(self.scales, DoubleQuant):
            return self.scales.decode(first, last), NO_OFFSETS
        return self.scales[first:last], NO_OFFSETS


def quantize_weight(w: Array, config: QuantConfig) -> CodebookWeight | AffineWeight:
    """Quantize w (out, in) as the configuration says, each weight by itself: ``rtn`` or ``hqq``; ``gptq``
    needs data.

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


def warm_up() -> float:
    """Compile every kernel that Numba's cache on disk does not hold yet, and return the seconds it took
    (cached: about 0.2).

    Call it before worker processes start: otherwise each of them compiles the same kernels.
    """
    start = time.perf_counter()
    for width in (8, 64):  # the loops, and, where the processor has them, the vectors
        w = np.eye(2, width, dtype=np.float32)
        for weight in (CodebookWeight.quantize(w), AffineWeight.quantize(w, group_size=width)):
            weight.matmul(w[:1])  # matvec
            weight.rows(np.arange(2))  # dequantize
            weight.unpacked()
    blocks = BlockWeight.quantize(np.eye(2, 32, dtype=np.float32), "Q4_1")  # one type: the kernels hold all
    blocks.matmul(blocks.dense())
    return time.perf_counter() - start


def _quantize_blocks(flat: Array, quant_type: str, block_size: int) -> tuple[Array, Array]:
    """Return (codes (n,) uint8, absmax (blocks,) float32) of a flat read-only float32 array."""
    midpoints, order = thresholds(quant_type)
    absmax, ranks = np.empty(-(-flat.size // block_size), np.float32), np.empty(flat.size, np.uint8)
    by_32 = midpoints.size == 15 and block_size % 32 == 0 and flat.size % block_size == 0
    module: Any = simd if by_32 and simd.available() else kernels
    module.quantize_codebook(flat, midpoints, block_size, absmax, ranks)
    return (order[ranks] if quant_type == "fp4" else ranks), absmax  # elsewhere a code is its rank
