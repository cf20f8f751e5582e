"""An affine weight with groups of 32 is llama.cpp's Q4_1: the gguf package decodes our arrays to our weights."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.quant.weights import AffineWeight

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("out", "in_"), [(1, 32), (5, 96), (64, 256)])
def test_int4_in_groups_of_32_is_q4_1(out, in_):
    w = np.random.default_rng(out).standard_normal((out, in_)).astype(np.float32)
    weight = AffineWeight.quantize(w, bits=4, group_size=32)
    codes = weight.unpacked().reshape(-1, 32)
    # a block: float16 scale d, float16 minimum m, 16 bytes with code j in the low half and j + 16 in the high
    d, m = (np.ascontiguousarray(a).reshape(-1, 1).view(np.uint8) for a in (weight.scale, weight.offset))
    blocks = np.concatenate([d, m, codes[:, :16] | codes[:, 16:] << 4], axis=1).reshape(out, -1)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
    # both compute d·q + m in float32, and may fuse the multiplication with the addition: one rounding of d·q apart
    largest = np.abs(weight.scale.astype(np.float32)).max() * 15
    np.testing.assert_allclose(weight.dense(), theirs, rtol=0, atol=np.finfo(np.float32).eps * largest)
