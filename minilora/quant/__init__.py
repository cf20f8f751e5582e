"""Quantized weights: codebooks (NF2, NF3, NF4, NF8, FP4), affine groups (2, 3, 4, 8 bits) and GGUF's blocks.

Read `codebooks` (which values codes stand for), `reference` (the arithmetic, in plain NumPy), `weights` and
`affine` (the classes), in this order. `packed` multiplies by such weights, `switch` chooses between
`reference` and compiled kernels, and `model` quantizes a whole model.
"""

from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.weights import CodebookWeight, DoubleQuant, quantize_weight

__all__ = ["AffineWeight", "BlockWeight", "CodebookWeight", "DoubleQuant", "quantize_weight"]
