"""Against bitsandbytes on the CPU: packed bytes and absmax equal, decoding bit-equal from the same state."""

import numpy as np
import pytest

from minilora.quant import CodebookWeight, DoubleQuant, codebooks

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

# bitsandbytes' AVX-512 decoder is said to take wrong scales where a block crosses a row, so decoding is compared where a row is
# a multiple of every block size used.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((16, 4096), (64, 128), (33, 96))
WHOLE_BLOCKS = [(shape, block) for shape in SHAPES for block in BLOCK_SIZES if shape[0] * shape[1] % block == 0]


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_maps_are_equal(quant_type):
    assert np.array_equal(codebooks.code_map(quant_type), bnb.get_4bit_type(quant_type, device="cpu").numpy())


def test_dynamic_map_is_equal():
    assert np.array_equal(codebooks.dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape, block_size", WHOLE_BLOCKS)
def test_packed_bytes_and_absmax_are_equal(quant_type, block_size, shape):
    w = matrix(*shape)
    w.reshape(-1)[:block_size] = 0  # a block of zeros
    w[-1, ::7] = 0
    w[-1, ::5] *= np.float32(1e-4)  # near zero FP4's two zeros meet
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=block_size, quant_type=quant_type)
    q = CodebookWeight.quantize(w, quant_type, block_size, double_quant=False)
    assert np.array_equal(q.codes, packed.numpy().reshape(-1))
    assert np.array_equal(q.scales, state.absmax.numpy())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape, block_size", [((5, 13), 64), ((7, 33), 32), ((3, 1001), 256)])
def test_short_last_block_and_odd_length(quant_type, shape, block_size):
    """All codes are equal; the half byte after an odd end is code 0 here, the code of the number 0 there. Nobody reads it.

    In the short block bitsandbytes' CPU path divides by absmax where its CUDA kernel and we multiply by 1/absmax: that could
    only matter within one ulp of a threshold.
    """
    w = matrix(*shape, seed=1)
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=block_size, quant_type=quant_type)
    q = CodebookWeight.quantize(w, quant_type, block_size, double_quant=False)
    assert np.array_equal(q.scales, state.absmax.numpy())
    theirs = packed.numpy().reshape(-1)
    assert np.array_equal(q.codes[:-1], theirs[:-1]) and q.codes[-1] >> 4 == theirs[-1] >> 4


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_exact_ties_take_the_same_code(quant_type):
    midpoints, _ = codebooks.thresholds(codebooks.code_map(quant_type))
    w = np.zeros((1, 64), np.float32)
    w[0, 0], w[0, 1:16] = 1, midpoints
    w[0, 16:31], w[0, 31:46] = np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))
    packed, _ = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type=quant_type)
    assert np.array_equal(CodebookWeight.quantize(w, quant_type, 64, False).codes, packed.numpy().reshape(-1))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_decoding_the_same_state_is_bit_equal(quant_type, block_size, double_quant):
    w = matrix(64, 4096, seed=2)
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(w), blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    absmax = state.absmax.numpy()
    scales = DoubleQuant(absmax, state.state2.absmax.numpy(), state.offset.numpy()) if double_quant else absmax
    q = CodebookWeight(packed.numpy().reshape(-1), scales, w.shape, quant_type, block_size)
    assert np.array_equal(q.dense(), bnb.dequantize_4bit(packed, state).numpy())


@pytest.mark.parametrize("block_size", [32, 64])
def test_double_quant_state_is_equal(block_size):
    """bitsandbytes' own CPU code finds the 8-bit code through a table of 2^16 bins: near a threshold it can be the neighbour."""
    w = matrix(512, 1024, seed=3)
    _, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=block_size, quant_type="nf4", compress_statistics=True)
    scales = CodebookWeight.quantize(w, "nf4", block_size, double_quant=True).scales
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(scales.offset, state.offset.numpy(), rtol=64 * eps)  # a mean summed in another order
    np.testing.assert_allclose(scales.absmax, state.state2.absmax.numpy(), rtol=64 * eps * scales.offset[0] / scales.absmax.min())
    difference = np.abs(scales.codes.astype(int) - state.absmax.numpy().astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_products_agree_with_matmul_4bit():
    w, x = matrix(96, 256, seed=4), matrix(5, 256, seed=5)
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), quant_type="nf4")
    import bitsandbytes

    expected = bitsandbytes.matmul_4bit(torch.from_numpy(x), packed.t(), quant_state=state).numpy()
    q = CodebookWeight.quantize(w, "nf4", 64, double_quant=False)
    bound = 2 * 257 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(q.dense()).T)
    assert (np.abs(q.matmul(x) - expected) <= bound).all()
