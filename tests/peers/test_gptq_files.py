"""GPTQ's arrays, decoded by PyTorch.

No GPTQ library runs here: transformers has only the configuration, and AutoGPTQ, GPTQModel and optimum are
not among the peers. So this is no comparison with a program but with AutoGPTQ's documented arithmetic,
written anew: shift the words, mask, add 1 to the zero points, and scales[g_idx]·(weight − zeros[g_idx]) in
half precision. It shares no code with ours and looks up groups through ``g_idx``, as those libraries do.
"""

import numpy as np
import pytest

from minilora.formats.gptq_words import from_arrays, to_arrays
from minilora.quant import AffineWeight
from minilora.quant.zero_points import ZeroPointWeight

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

CASES = [
    (bits, version, shape, group)
    for bits in (2, 3, 4, 8)
    for version in (1, 2)
    for shape, group in (((32, 64), 32), ((96, 128), 128), ((64, 320), 64))
]


def unpack(words, bits):
    """Words (rows, columns) int32 along the first axis -> values, by a table of shifts; a 3-bit value may
    need two words."""
    first = torch.arange(0, 32 * words.shape[0], bits)
    word, shift = first // 32, first % 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    following = torch.cat([wide, torch.zeros_like(wide[:1])])[word + 1]
    both = wide[word] | torch.bitwise_left_shift(
        following, torch.tensor(32)
    )  # 64 bits; only 0 to 2 of the upper half are used
    return torch.bitwise_and(torch.bitwise_right_shift(both & (2**62 - 1), shift[:, None]), 2**bits - 1)


def dequantize(tensors, bits, version):
    """AutoGPTQ's weight (in, out): float16, and as exact float64."""
    weight = unpack(tensors["m.qweight"], bits)
    zeros = unpack(tensors["m.qzeros"].T, bits).T
    if version == 1:
        zeros = (zeros + 1) & (2**bits - 1)
    g_idx, scales = tensors["m.g_idx"].long(), tensors["m.scales"]
    steps = weight - zeros[g_idx]
    return scales[g_idx] * steps.to(torch.int16), scales.double()[g_idx] * steps


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits, version, shape, group_size", CASES)
def test_our_file_decodes_there_to_the_same_bits(tmp_path, bits, version, shape, group_size):
    weight = AffineWeight.quantize(matrix(*shape), bits, group_size, store="zero")
    if version == 1:  # it has no zero of 0
        zeros = np.maximum(weight.zeros, 1)
        weight = ZeroPointWeight(weight.codes, weight.scale, zeros, shape, bits, group_size)
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(
        {k: torch.from_numpy(v) for k, v in to_arrays("m", weight, version).items()}, path
    )
    half, exact = dequantize(safetensors_torch.load_file(path), bits, version)
    assert np.array_equal(weight.dense().T, exact.numpy())
    assert half.dtype == torch.float16 and np.array_equal(weight.dense().T.astype(np.float16), half.numpy())


@pytest.mark.parametrize("bits, version, shape, group_size", CASES)
def test_random_words_decode_alike(bits, version, shape, group_size):
    """Any words at all, as another program may have written them: also zero points of -1 in version 1."""
    (out, columns), rng = shape, np.random.default_rng(1)
    groups = columns // group_size
    arrays = {
        "m.qweight": rng.integers(-(2**31), 2**31, (columns * bits // 32, out)).astype(np.int32),
        "m.qzeros": rng.integers(-(2**31), 2**31, (groups, out * bits // 32)).astype(np.int32),
        "m.scales": rng.standard_normal((groups, out)).astype(np.float16),
        "m.g_idx": (np.arange(columns) // group_size).astype(np.int32),
    }
    half, exact = dequantize({k: torch.from_numpy(v) for k, v in arrays.items()}, bits, version)
    weight = from_arrays("m", dict(arrays), bits, group_size, version, "theirs")
    assert np.array_equal(weight.dense().T, exact.numpy())
    assert np.array_equal(weight.dense().T.astype(np.float16), half.numpy())
    if weight.zeros.all() or version == 2:
        again = to_arrays("m", weight, version)
        assert list(again) == list(arrays) and all(np.array_equal(again[k], arrays[k]) for k in arrays)


def test_a_product_is_that_of_torch():
    weight = AffineWeight.quantize(matrix(64, 128, seed=2), 4, 32, store="zero")
    _, exact = dequantize({k: torch.from_numpy(v) for k, v in to_arrays("m", weight, 2).items()}, 4, 2)
    x = matrix(5, 128, seed=3)
    expected = (torch.from_numpy(x).double() @ exact).numpy()
    bound = (128 + 1) * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(weight.dense().T))
    assert (np.abs(weight.matmul(x) - expected) <= bound).all()
