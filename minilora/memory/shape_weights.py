"""Quantized weights without data: their products take tiles, scales and results as the real ones do."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from minilora.config import QuantConfig, require
from minilora.memory.shapes import Meter, ShapeArray, metered
from minilora.parameters import Array
from minilora.quant.blocks import few_rows
from minilora.quant.packed import PackedWeight, in_vectors
from minilora.quant.reference import packed_size

BLOCK_FORMATS = {"Q4_0": (16, 0), "Q4_1": (16, 2), "Q8_0": (32, 0)}
"""GGUF type → bytes of codes and of the minimum in a block of 32; the scale takes two more."""


class ShapeWeight(PackedWeight):
    """A packed weight without data.

    Parameters
    ----------
    shape : tuple of int
        (out, in).
    arrays : dict of str to list
        Stored arrays without data, by class: codes, scales, offsets, code_maps.
    offset_group : int
        Inputs that share a float offset; 0 without offsets.
    block_size : int
        Weights that share a scale.
    decoded : int
        float32 arrays of one number for each block, which decoding a tile makes.
    few : int
        Most rows of a product that is computed while the weight is decoded.
    bits : int
        Bits of a code, as the real weight's.
    quant_type : str
        Type of the codes, as the real weight's.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        arrays: dict[str, list[Any]],
        *,
        offset_group: int = 0,
        block_size: int = 32,
        decoded: int = 0,
        few: int = 1,
        bits: int = 4,
        quant_type: str = "",
    ):
        super().__init__(shape)
        self._arrays, self._few_rows, self.decoded = arrays, few, decoded
        self.offset_group, self.block_size, self.bits, self.quant_type = (
            offset_group,
            block_size,
            bits,
            quant_type,
        )
        self.largest_tile = 0  # in numbers

    @classmethod
    def of(cls, weight: PackedWeight) -> ShapeWeight:
        """Return the shape of a real weight."""
        arrays = {
            kind: [ShapeArray.new(a.shape, a.dtype) for a in group] for kind, group in weight.arrays().items()
        }
        block_size = getattr(weight, "block_size", 32)
        return cls(
            weight.shape,
            arrays,
            offset_group=weight.offset_group,
            few=weight._few,
            bits=weight.bits,
            block_size=block_size,
            decoded=_decoded(weight.arrays(), weight.bits, weight.shape[1], block_size),
            quant_type=getattr(weight, "quant_type", ""),
        )

    @classmethod
    def quantized(cls, shape: tuple[int, int], config: QuantConfig) -> ShapeWeight:
        """Return the shape of what `quantize_weight` stores.

        codes        ⌈out·in·bits / 8⌉ bytes (3 bits: 3 bytes for 8 codes)
        int2 … int8  scale and offset for each group of inputs, float16 each (or another `offset_dtype`)
        nf2 … fp4    absmax, float32, for each block; with `double_quant` one byte for each block, one mean
                     for all blocks, and one float32 for each 256 of them
        """
        arrays = _affine_arrays(shape, config) if config.affine else _codebook_arrays(shape, config)
        block = config.group_size if config.affine else config.block_size
        return cls(
            shape,
            arrays,
            offset_group=block if config.affine else 0,
            block_size=block,
            decoded=_decoded(arrays, config.bits, shape[1], block),
            bits=config.bits,
            quant_type=config.quant_type,
        )

    @classmethod
    def stored(cls, shape: tuple[int, int], quant_type: str) -> ShapeWeight:
        """Return the shape of a matrix in a GGUF's blocks of 32."""
        rows = (shape[0], shape[1] // 32)
        codes, minima = BLOCK_FORMATS[quant_type]
        arrays: dict[str, list[Any]] = {
            "codes": [ShapeArray.new((*rows, codes), np.uint8)],
            "scales": [ShapeArray.new(rows, np.float16)],
            "offsets": [ShapeArray.new(rows, np.float16)] if minima else [],
            "code_maps": [],
        }
        return cls(
            shape,
            arrays,
            offset_group=32 if minima else 0,
            few=few_rows(),
            bits=int(quant_type[1]),
            quant_type=quant_type,
        )

    def arrays(self) -> dict[str, list[Any]]:
        """Return the stored arrays by class, as the real weight does."""
        return self._arrays

    def dense(self) -> Any:
        """Return a fresh float32 array."""
        return ShapeArray.new(self.shape, np.float32)

    def rows(self, ids: Array) -> Any:
        """Decode each distinct row, and then take it.

        How many are distinct depends on the text; here all that can be.
        """
        table = ShapeArray.new((min(ids.size, self.shape[0]), self.shape[1]), np.float32)
        return table[ids]

    @property
    def _few(self) -> int:
        return self._few_rows

    def _decode(self, first: int, last: int) -> Any:
        size = (last - first) * self.shape[1]
        self.largest_tile = max(self.largest_tile, size)
        blocks = -(-size // self.block_size)
        scales = [ShapeArray.new((blocks,), np.float32) for _ in range(self.decoded)]
        del scales  # they end with the decoding
        with metered(Meter()):  # the tile lies in the worker's scratch, which outlasts the step
            return ShapeArray.new((last - first, self.shape[1]), np.float32)

    def _tiles(self, size: int) -> list[tuple[int, int]]:
        tiles = super()._tiles(size)
        # the second tile adds to the first; the others are like the second
        return [*tiles[:2], tiles[-1]] if len(tiles) > 3 else tiles

    def _decode_into(self, start: int, out: Array) -> None:
        return

    def _multiply_few(self, x: Array, out: Array) -> None:
        return


def _affine_arrays(shape: tuple[int, int], config: QuantConfig) -> dict[str, list[Any]]:
    out, in_ = shape
    require(in_ % config.group_size == 0, "group_size", config.group_size, f"must divide in={in_}")
    groups = (out, in_ // config.group_size)
    if config.offset_dtype == "zero":  # whole numbers, packed as the codes are
        offset = ShapeArray.new((packed_size(prod(groups), config.bits),), np.uint8)
    else:
        offset = ShapeArray.new(groups, config.offset_dtype)
    return {
        "codes": [ShapeArray.new((packed_size(out * in_, config.bits),), np.uint8)],
        "scales": [ShapeArray.new(groups, np.float16)],
        "offsets": [offset],
        "code_maps": [],
    }


def _codebook_arrays(shape: tuple[int, int], config: QuantConfig) -> dict[str, list[Any]]:
    size = prod(shape)
    blocks = -(-size // config.block_size)
    if config.double_quant:
        stored = [((blocks,), np.uint8), ((-(-blocks // 256),), np.float32), ((1,), np.float32)]
        scales, maps = [ShapeArray.new(*s) for s in stored], code_maps(config.quant_type, "dynamic")
    else:
        scales, maps = [ShapeArray.new((blocks,), np.float32)], code_maps(config.quant_type)
    codes = ShapeArray.new((packed_size(size, config.bits),), np.uint8)
    return {"codes": [codes], "scales": scales, "offsets": [], "code_maps": maps}


def _decoded(arrays: dict[str, list[Any]], bits: int, width: int, block_size: int) -> int:
    """Return how many arrays decoding makes.

    float16 and nested scales and offsets become float32; plain float32 ones are views. Vectors, and GGUF
    blocks, read float16 where it lies.
    """
    scales, offsets = arrays["scales"], arrays["offsets"]
    halves = bool(offsets) and offsets[0].dtype == np.float16
    if arrays["codes"][0].ndim > 1 or (halves and in_vectors(bits, width, block_size)):
        return 0
    return sum(bool(group) and group[0].dtype != np.float32 for group in (scales, offsets))


_maps: dict[str, ShapeArray] = {}


def code_maps(*names: str) -> list[Any]:
    """Return tables by name (nf4, …, dynamic): one object for all weights that decode with it."""
    for name in names:
        if name not in _maps:
            size = 256 if name.startswith("dynamic") else 2 ** int(name[-1])
            _maps[name] = ShapeArray.new((size,), np.float32)
    return [_maps[name] for name in names]
