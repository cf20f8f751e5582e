"""bitsandbytes reads what we write and we read what it writes, in its own words: QuantState's dictionary and
Linear4bit's state.

Decoding is compared where a row is a multiple of the block size: bitsandbytes' AVX-512 decoder is said to
take wrong scales where a block crosses a row. Arrays and settings are compared for other shapes too.
"""

import numpy as np
import pytest

from minilora.formats.bitsandbytes import from_arrays, is_quantized, to_arrays
from minilora.formats.files import read_tensors, write_tensors
from minilora.quant import CodebookWeight, DoubleQuant

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
safetensors_torch = pytest.importorskip("safetensors.torch")

NAME = "layer.weight"
CASES = [
    ((8, 64), 64),
    ((33, 96), 32),
    ((64, 128), 128),
    ((40, 4096), 64),
    ((16, 4096), 4096),
    ((1, 512), 256),
]
BOTH = [(q, d) for q in ("nf4", "fp4") for d in (False, True)]


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def theirs(w, quant_type, block_size, nested):
    """bitsandbytes' packed weight, its QuantState, and both as the NumPy arrays of a file."""
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
    )
    arrays = {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return packed, state, {key: value.numpy() for key, value in arrays.items()}


def split(arrays):
    """The packed weight and the dictionary that QuantState.from_dict takes, as tensors."""
    tensors = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
    packed = tensors.pop(NAME)
    return packed, {key.removeprefix(f"{NAME}."): value for key, value in tensors.items()}


@pytest.mark.parametrize("quant_type, nested", BOTH)
@pytest.mark.parametrize("shape, block_size", CASES)
def test_what_we_write_decodes_there_to_the_same_bits(shape, block_size, quant_type, nested):
    weight = CodebookWeight.quantize(matrix(*shape), quant_type, block_size, nested)
    packed, items = split(to_arrays(NAME, weight))
    state = bnb.functional.QuantState.from_dict(items, device=torch.device("cpu"))
    assert state.nested == nested and tuple(state.shape) == shape and state.dtype == torch.float32
    decoded = bnb.functional.dequantize_4bit(packed, state).numpy()
    assert decoded.shape == shape and np.array_equal(decoded, weight.dense())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quant_type, nested", BOTH)
@pytest.mark.parametrize("shape, block_size", [*CASES, ((5, 13), 64), ((7, 33), 32), ((3, 1001), 256)])
def test_what_they_write_is_read_bit_by_bit(shape, block_size, quant_type, nested, dtype):
    w = torch.from_numpy(matrix(*shape, seed=1)).to(getattr(torch, dtype))
    packed, state, arrays = theirs(w, quant_type, block_size, nested)
    given = dict(arrays)
    assert is_quantized(arrays, NAME)
    weight = from_arrays(NAME, arrays, "theirs")
    assert not arrays and (weight.shape, weight.block_size, weight.quant_type) == (
        shape,
        block_size,
        quant_type,
    )
    assert np.array_equal(weight.codes, packed.numpy().reshape(-1)) and weight.double_quant == nested
    if isinstance(weight.scales, DoubleQuant):
        assert np.array_equal(weight.scales.codes, state.absmax.numpy())
        assert np.array_equal(weight.scales.absmax, state.state2.absmax.numpy())
        assert weight.scales.offset.item() == state.offset.item()
    else:
        assert np.array_equal(weight.scales, state.absmax.numpy())
    if shape[1] % block_size == 0:
        decoded = bnb.functional.dequantize_4bit(packed, state)
        assert torch.equal(
            torch.from_numpy(weight.dense()).to(decoded.dtype), decoded
        )  # they round to the model's dtype
    # written again, every array is the same bytes under the same key in the same order; only the dtype
    # becomes float32
    again = to_arrays(NAME, weight)
    assert list(again) == list(given)
    for key, array in again.items():
        expected = given[key].tobytes()
        if "quant_state" in key:
            expected = expected.replace(f'"dtype": "{dtype}"'.encode(), b'"dtype": "float32"', 1)
        assert array.tobytes() == expected and array.dtype == given[key].dtype, key


def linear4bit(quant_type, nested, block_size=64, features=(128, 96)):
    layer = bnb.nn.Linear4bit(*features, bias=False, quant_type=quant_type, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        torch.from_numpy(matrix(features[1], features[0], seed=2)),
        quant_type=quant_type,
        compress_statistics=nested,
        blocksize=block_size,
        module=layer,
    )
    return layer.to("cpu")  # quantizes


def assert_same_product(layer, weight):
    """Both products decode the same matrix; what differs is the order of sums, √in·eps relative to the
    largest term."""
    x = torch.from_numpy(
        matrix(5, weight.shape[1], seed=3)
    ).requires_grad_()  # with a gradient: no bfloat16 repacking in eval
    y = layer(x).detach().numpy()
    ours = weight.matmul(x.detach().numpy())
    assert y.shape == ours.shape == (5, weight.shape[0])
    bound = (
        weight.shape[1] * np.finfo(np.float32).eps * (np.abs(x.detach().numpy()) @ np.abs(weight.dense().T))
    )
    assert (np.abs(y - ours) <= bound).all()


@pytest.mark.parametrize("quant_type, nested", BOTH)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_the_state_of_a_linear4bit_is_read_from_its_file(tmp_path, quant_type, nested, block_size):
    layer = linear4bit(quant_type, nested, block_size)
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file({f"layer.{key}": value for key, value in layer.state_dict().items()}, path)
    arrays, _ = read_tensors(path)
    weight = from_arrays(NAME, arrays, str(path))
    assert not arrays and weight.block_size == block_size
    assert np.array_equal(
        weight.dense(), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).numpy()
    )
    assert_same_product(layer, weight)


@pytest.mark.parametrize("quant_type, nested", BOTH)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_our_file_makes_a_linear4bit(tmp_path, quant_type, nested, block_size):
    weight = CodebookWeight.quantize(matrix(96, 128, seed=4), quant_type, block_size, nested)
    path = tmp_path / "model.safetensors"
    write_tensors(path, to_arrays(NAME, weight), {}, plain={"format": "pt"})
    tensors = safetensors_torch.load_file(path)
    layer = bnb.nn.Linear4bit(128, 96, bias=False, quant_type=quant_type, compute_dtype=torch.float32)
    packed = tensors.pop(NAME)
    layer.weight = bnb.nn.Params4bit.from_prequantized(packed, tensors, device="cpu", module=layer)
    assert layer.weight.quant_type == quant_type and layer.weight.blocksize == block_size
    assert_same_product(layer, weight)
    # and what the layer would save is what we wrote
    saved = safetensors_torch.save({f"layer.{key}": value for key, value in layer.state_dict().items()})
    found = safetensors_torch.load(saved)
    assert {k: v.numpy().tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in to_arrays(NAME, weight).items()
    }
