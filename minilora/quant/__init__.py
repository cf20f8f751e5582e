"""Quantized weights: codebooks (NF2, NF3, NF4, NF8, FP4) and affine groups (2, 3, 4, 8 bits), in packed storage."""

from minilora.quant.weights import AffineWeight, CodebookWeight, DoubleQuant, quantize_weight, warm_up

__all__ = ["AffineWeight", "CodebookWeight", "DoubleQuant", "quantize_weight", "warm_up"]
