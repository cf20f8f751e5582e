"""Quantized weights in packed storage: codebooks (NF2, NF3, NF4, NF8, FP4), affine groups (2, 3, 4, 8 bits),
GGUF's blocks."""

from minilora.quant.blocks import BlockWeight
from minilora.quant.weights import AffineWeight, CodebookWeight, DoubleQuant, quantize_weight, warm_up

__all__ = ["AffineWeight", "BlockWeight", "CodebookWeight", "DoubleQuant", "quantize_weight", "warm_up"]
