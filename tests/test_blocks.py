"""GGUF's blocks of 32: decoded, multiplied and made as plain loops do it; views, never copies; what does not
fit is refused."""

from __future__ import annotations

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora.kernels import block_codes, block_vectors
from minilora.memory import unique_bytes
from minilora.quant import AffineWeight, blocks, packed, reference
from minilora.quant.blocks import BlockWeight

EPS = np.finfo(np.float32).eps
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}
TYPES = tuple(BYTES)


# ---- oracles, one number at a time; float64 holds d·q exactly, and struct rounds to float32 or float16 once


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def f16(x):
    return struct.unpack("<e", struct.pack("<e", x))[0]


def decode_block(quant_type, raw):
    d = struct.unpack_from("<e", raw, 0)[0]
    if quant_type == "Q8_0":
        return [f32(d * q) for q in struct.unpack_from("<32b", raw, 2)]
    header = 4 if quant_type == "Q4_1" else 2
    codes = [byte & 15 for byte in raw[header:]] + [byte >> 4 for byte in raw[header:]]
    if quant_type == "Q4_0":
        return [f32(d * (q - 8)) for q in codes]
    m = struct.unpack_from("<e", raw, 2)[0]
    return [f32(d * q + m) for q in codes]


def decode(quant_type, raw):
    size = BYTES[quant_type]
    raw = np.asarray(raw).tobytes()
    return np.array(
        [decode_block(quant_type, raw[i : i + size]) for i in range(0, len(raw), size)], np.float32
    )


def encode_block(quant_type, xs):
    """The algorithm of ggml's quantize_row_q*_ref; each float operation rounds to float32."""
    if quant_type == "Q8_0":
        d = f32(max(abs(x) for x in xs) / 127)
        inverse = f32(1 / d) if d else 0.0
        scaled = [f32(x * inverse) for x in xs]
        codes = [
            int(math.copysign(math.floor(abs(v)) + (abs(v) - math.floor(abs(v)) >= 0.5), v)) for v in scaled
        ]
        return struct.pack("<e32b", d, *codes)
    if quant_type == "Q4_0":
        largest = 0.0
        for x in xs:
            if abs(x) > abs(largest):
                largest = x
        d = f32(largest / -8)
        inverse = f32(1 / d) if d else 0.0
        codes = [min(15, int(f32(f32(x * inverse) + 8.5))) for x in xs]
        header = struct.pack("<e", d)
    else:
        low = min(xs)
        d = f32(f32(max(xs) - low) / 15)
        inverse = f32(1 / d) if d else 0.0
        codes = [min(15, int(f32(f32(f32(x - low) * inverse) + 0.5))) for x in xs]
        header = struct.pack("<ee", d, low)
    return header + bytes(codes[j] | codes[j + 16] << 4 for j in range(16))


def random_blocks(quant_type, out, in_, seed=0):
    """Any codes; any finite float16 as scale and minimum, subnormal and negative ones and both zeros among
    them."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (out, in_ // 32, BYTES[quant_type]), np.uint8)
    for at in (1, 3) if quant_type == "Q4_1" else (1,):
        special = raw[..., at] & 0x7C == 0x7C
        raw[..., at][special] &= 0x83
    return raw.reshape(out, -1)


def matrix(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def same_bits(a, b):
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def assert_product(actual, a, b):
    """actual = a b up to float32 rounding of a sum of k products, in any order."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = (a.shape[-1] + 1) * EPS * (np.abs(a).astype(np.float64) @ np.abs(b))
    assert actual.shape == exact.shape and (np.abs(actual - exact) <= bound).all()


@pytest.fixture(params=TYPES)
def weight(request):
    return BlockWeight.quantize(matrix(19, 96), request.param)


# ---- decoding


@pytest.mark.parametrize("quant_type", TYPES)
def test_every_byte_decodes_as_the_loop_says_bit_by_bit(quant_type):
    raw = random_blocks(quant_type, 24, 96)
    weight = BlockWeight(raw, quant_type, (24, 96))
    expected = decode(quant_type, raw).reshape(24, 96)
    assert same_bits(weight.dense(), expected)
    with minilora.kernels.plain():
        assert same_bits(weight.dense(), expected) and same_bits(weight.rows(np.array([1])), expected[1:2])
    out, loops = np.empty((2, 96), np.float32)
    reference.dequantize_blocks(raw.reshape(-1, BYTES[quant_type])[3:6], out)
    block_codes._dequantize_blocks.py_func(raw.reshape(-1), BYTES[quant_type], 3, loops)
    assert same_bits(out, expected[1]) and same_bits(loops, expected[1])


@pytest.mark.parametrize("quant_type", TYPES)
def test_all_finite_float16_scales_decode(quant_type):
    halves = np.arange(65536, dtype="<u2")
    halves = halves[np.isfinite(halves.view("<f2"))]
    raw = random_blocks(quant_type, halves.size, 32)
    raw[:, :2] = halves[:, None].view(np.uint8)
    weight = BlockWeight(raw, quant_type, (halves.size, 32))
    plain, loops = np.empty((2, raw.shape[0] * 32), np.float32)
    reference.dequantize_blocks(raw, plain)
    block_codes._dequantize_blocks(raw.reshape(-1), BYTES[quant_type], 0, loops)
    assert same_bits(weight.dense().reshape(-1), plain) and same_bits(loops, plain)
    assert np.array_equal(weight.scales[:, 0].view(np.uint16), halves)


def test_a_block_by_hand():
    nibbles = bytes(j | (15 - j) << 4 for j in range(16))
    rising = np.arange(16.0)
    q4_0 = np.frombuffer(struct.pack("<e", 0.5) + nibbles, np.uint8)[None]
    assert BlockWeight(q4_0, "Q4_0", (1, 32)).dense()[0].tolist() == [*(rising - 8) / 2, *(7 - rising) / 2]
    q4_1 = np.frombuffer(struct.pack("<ee", 0.5, -3) + nibbles, np.uint8)[None]
    assert BlockWeight(q4_1, "Q4_1", (1, 32)).dense()[0].tolist() == [*rising / 2 - 3, *(15 - rising) / 2 - 3]
    q8_0 = np.frombuffer(struct.pack("<e32b", 0.25, -128, 127, *range(30)), np.uint8)[None]
    assert BlockWeight(q8_0, "Q8_0", (1, 32)).dense()[0].tolist() == [-32, 31.75, *np.arange(30) / 4]


def test_rows_are_rows_of_the_dense_matrix(weight):
    dense, ids = weight.dense(), np.array([[3, 3, 0], [18, 4, 5]])
    assert same_bits(weight.rows(ids), dense[ids])
    with pytest.raises(ValueError, match="ids contains 19"):
        weight.rows(np.array([19]))


# ---- products


def test_products_equal_those_of_the_dense_matrix(weight, monkeypatch):
    w = weight.dense()
    for tile in (packed.TILE, 8):  # 8: tiles of 8 rows, the last one of 3
        monkeypatch.setattr(packed, "TILE", tile)
        for lead in ((), (1,), (5,), (2, 3), (0,)):
            x, dy = matrix(*lead, 96, seed=1), matrix(*lead, 19, seed=2)
            assert_product(weight.matmul(x), x, w.T)
            assert_product(weight.matmul_t(dy), dy, w)
            assert weight.matmul(x).dtype == weight.matmul_t(dy).dtype == np.float32


def assert_kernel(actual, weight, x):
    """actual = x Wᵀ by any of the kernels: with w = d·q + m, Σ d·q·x and Σ m·x may be summed apart."""
    w = weight.dense().astype(np.float64)
    d = np.repeat(np.abs(weight.scales.astype(np.float64)), 32, axis=1)
    m = {
        "Q4_0": -8 * d,
        "Q4_1": np.repeat(weight.offsets, 32, axis=1) if weight.offsets is not None else 0,
        "Q8_0": 0,
    }
    m = np.abs(np.broadcast_to(m[weight.quant_type], w.shape)).astype(np.float64)
    x = x.astype(np.float64)
    bound = (x.shape[1] + 4) * EPS / 2 * (np.abs(x) @ (np.abs(w) + 2 * m).T)  # |d·q| ≤ |w| + |m|
    assert actual.shape == (len(x), len(w)) and (np.abs(actual - x @ w.T) <= bound).all()


vectors = pytest.mark.skipif(not block_vectors.available(), reason="this processor lacks AVX2, FMA or F16C")


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize(("out", "in_"), [(1, 32), (9, 64), (70, 96), (3, 4096)])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8])
def test_a_few_rows_are_multiplied_while_the_weight_is_decoded(quant_type, out, in_, batch):
    weight = BlockWeight(random_blocks(quant_type, out, in_, seed=out), quant_type, (out, in_))
    x = matrix(batch, in_, seed=in_)
    assert_kernel(weight.matmul(x), weight, x)
    assert_kernel(block_codes.multiply_blocks(weight.blocks.reshape(-1, BYTES[quant_type]), x), weight, x)
    for multiply in (block_codes._multiply_blocks, block_codes._multiply_blocks.py_func):
        if multiply is block_codes._multiply_blocks.py_func and out * in_ > 1000:
            continue
        y = np.full((batch, out), np.nan, np.float32)
        multiply(weight.blocks.reshape(-1), BYTES[quant_type], x, 0, out, y)
        assert_kernel(y, weight, x)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize(
    "multiply",
    [block_codes._multiply_blocks, pytest.param(block_vectors.multiply_blocks, marks=vectors)],
    ids=["loops", "vectors"],
)
def test_rows_of_a_product_do_not_depend_on_what_is_computed_with_them(quant_type, multiply):
    """Any cut of W's rows, as for two threads, and any company of x's rows, as for several prompts: the same
    bits."""
    weight, x = BlockWeight(random_blocks(quant_type, 21, 96), quant_type, (21, 96)), matrix(7, 96, seed=3)
    raw, size = weight.blocks.reshape(-1), BYTES[quant_type]
    whole = np.empty((7, 21), np.float32)
    multiply(raw, size, x, 0, 21, whole)
    for cut in (1, 8, 20):
        y = np.full((7, 21), np.nan, np.float32)
        multiply(raw, size, x, cut, 21, y)
        assert np.isnan(y[:, :cut]).all() and same_bits(y[:, cut:], whole[:, cut:])
        multiply(raw, size, x, 0, cut, y)
        assert same_bits(y, whole)
    for batch in range(1, 7):
        y = np.full((batch, 21), np.nan, np.float32)
        multiply(raw, size, x[:batch].copy(), 0, 21, y)
        assert same_bits(y, whole[:batch])


@vectors
@pytest.mark.parametrize("quant_type", TYPES)
def test_vectors_decode_the_loops_bits(quant_type):
    raw = random_blocks(quant_type, 24, 96).reshape(-1)
    for first, count in ((0, 72), (5, 9), (71, 1)):
        loops, vector = (np.full(32 * count, np.nan, np.float32) for _ in range(2))
        block_codes._dequantize_blocks(raw, BYTES[quant_type], first, loops)
        block_vectors.dequantize_blocks(raw, BYTES[quant_type], first, vector)
        assert same_bits(vector, loops)


@vectors
@pytest.mark.parametrize("quant_type", TYPES)
def test_every_code_meets_its_own_input(quant_type):
    """With unit vectors as x a product is one weight: whatever order and factors the vectors use, they must
    cancel."""
    raw = random_blocks(quant_type, 5, 64)
    raw.reshape(5, 2, -1)[..., :4:2] = 0  # d and m of few digits, and not large: d·q + m is exact
    for at in (1, 3) if quant_type == "Q4_1" else (1,):
        raw.reshape(5, 2, -1)[..., at] = 0x3C
    weight, y = BlockWeight(raw, quant_type, (5, 64)), np.empty((64, 5), np.float32)
    for batch in (1, 4):
        for i in range(0, 64, batch):
            block_vectors.multiply_blocks(
                raw.reshape(-1),
                BYTES[quant_type],
                np.eye(64, dtype=np.float32)[i : i + batch],
                0,
                5,
                y[i : i + batch],
            )
        assert np.array_equal(y, weight.dense().T)


def test_weights_are_the_same_without_the_vectors(weight, monkeypatch):
    x, dense = matrix(4, 96, seed=5), weight.dense()
    assert_kernel(weight.matmul(x), weight, x)
    monkeypatch.setattr(block_vectors, "available", lambda: False)
    assert same_bits(weight.dense(), dense)
    assert_kernel(weight.matmul(x), weight, x)
    assert_kernel(weight.matmul(x[:1]), weight, x[:1])


@vectors
@pytest.mark.parametrize("quant_type", TYPES)
def test_vectors_keep_nan_and_infinity_of_the_input(quant_type):
    weight = BlockWeight.quantize(np.abs(matrix(3, 64)) + 1, quant_type)
    x = np.ones((3, 64), np.float32)
    x[0, 40], x[1, 7] = np.nan, np.inf
    y = weight.matmul(x)
    assert np.isnan(y[0]).all() and not np.isfinite(y[1]).any() and np.isfinite(y[2]).all()


def test_float64_input_gives_float64_products(weight):
    x, w = matrix(4, 96, seed=7).astype(np.float64), weight.dense().astype(np.float64)
    y = weight.matmul(x)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weight.matmul_t(y), y @ w, rtol=1e-12, atol=1e-12)


def test_a_product_never_makes_the_matrix_dense():
    weight = BlockWeight.quantize(matrix(4096, 512), "Q4_0")
    x = matrix(1, 512)
    weight.matmul(x)
    tracemalloc.start()
    weight.matmul(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4096 * 512 * 4 / 8


# ---- quantizing


@pytest.mark.parametrize("quant_type", TYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_quantizing_gives_the_loops_bytes(quant_type, data):
    kind = data.draw(st.sampled_from(["floats", "ties", "few"]))
    if kind == "floats":
        values = st.floats(-6e4, 6e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)
    elif kind == "ties":  # steps of a half: with ±127 or ±8 or 0 to 15 the scale is 1
        values = st.integers(-254, 254).map(lambda i: i / 2)
    else:
        values = st.sampled_from([0.0, 1.0, -1.0, 127.0, -8.0, 2.5])
    row = data.draw(st.lists(values, min_size=32, max_size=32))
    w = np.array([row], np.float32) + np.float32(
        0
    )  # no -0: which of two zeros is the least is nobody's definition
    assert BlockWeight.quantize(w, quant_type).blocks.tobytes() == encode_block(quant_type, w[0].tolist())


def test_ties_go_away_from_zero_and_half_less_a_bit_does_not():
    w = np.zeros((1, 32), np.float32)
    w[0, :7] = 127, 0.5, -0.5, 1.5, 2.5, -2.5, np.nextafter(np.float32(0.5), np.float32(0))
    assert BlockWeight.quantize(w, "Q8_0").codes.view(np.int8)[0, 0, :8].tolist() == [
        127,
        1,
        -1,
        2,
        3,
        -3,
        0,
        0,
    ]


@pytest.mark.parametrize("quant_type", TYPES)
def test_zeros_and_subnormals_quantize_to_zero(quant_type):
    for value in (0.0, 1e-45, 1e-40, -1e-40):
        w = np.full((2, 32), value, np.float32)
        w[1, 5:] = 0
        assert not BlockWeight.quantize(w, quant_type).dense().any()


@pytest.mark.parametrize("quant_type", TYPES)
def test_quantizing_in_pieces_is_quantizing_row_by_row(quant_type, monkeypatch):
    w = matrix(11, 96)
    whole = BlockWeight.quantize(w, quant_type).blocks
    monkeypatch.setattr(blocks, "PIECE", 128)
    assert np.array_equal(BlockWeight.quantize(w, quant_type).blocks, whole)
    assert np.array_equal(
        np.concatenate([BlockWeight.quantize(row[None], quant_type).blocks for row in w]), whole
    )


def test_the_error_of_quantizing_is_at_most_half_a_step():
    w = matrix(16, 64)
    groups = w.reshape(-1, 32)
    steps = {
        "Q8_0": np.abs(groups).max(1) / 127 / 2,
        "Q4_1": (groups.max(1) - groups.min(1)) / 15 / 2,
        "Q4_0": np.abs(groups).max(1)
        / 8,  # the value opposite to the largest is a whole step beyond the last code
    }
    for quant_type, step in steps.items():
        error = np.abs(BlockWeight.quantize(w, quant_type).dense() - w).reshape(-1, 32).max(1)
        assert (
            error <= step + 2**-10 * np.abs(groups).max(1) * 2
        ).all()  # and what float16 takes from d·q and m


# ---- bytes


def test_bytes_by_class_add_up_to_the_blocks(weight):
    assert weight.bits_per_weight == BITS[weight.quant_type]
    assert sum(weight.nbytes.values()) == weight.blocks.nbytes
    assert weight.nbytes["codes"] == 19 * 96 * weight.bits // 8 and weight.nbytes["scales"] == 19 * 3 * 2
    assert (
        weight.nbytes["offsets"] == (19 * 3 * 2 if weight.quant_type == "Q4_1" else 0)
        and weight.nbytes["code_maps"] == 0
    )
    for kind, arrays in weight.arrays().items():
        assert all(np.shares_memory(a, weight.blocks) and not a.flags.writeable for a in arrays)
        assert (
            unique_bytes([*arrays, *weight.arrays()[kind]]) == weight.nbytes[kind]
        )  # the ledger counts each part once


@pytest.mark.parametrize("quant_type", TYPES)
def test_a_read_only_memory_map_is_used_as_it_is(tmp_path, quant_type):
    raw = random_blocks(quant_type, 8, 64)
    (tmp_path / "raw").write_bytes(b"odd" + raw.tobytes())
    mapped = np.memmap(tmp_path / "raw", np.uint8, "r", 3, raw.shape)
    weight = BlockWeight(mapped, quant_type, (8, 64))
    assert np.shares_memory(weight.blocks, mapped) and weight.blocks.ctypes.data == mapped.ctypes.data
    assert same_bits(weight.dense(), decode(quant_type, raw).reshape(8, 64))
    x = matrix(1, 64)
    assert_product(weight.matmul(x), x, weight.dense().T)


def test_writable_blocks_are_viewed_read_only_and_stay_writable_for_their_owner():
    raw = random_blocks("Q4_0", 2, 32)
    weight = BlockWeight(raw, "Q4_0", (2, 32))
    assert np.shares_memory(weight.blocks, raw) and not weight.blocks.flags.writeable and raw.flags.writeable


# ---- affine groups


def test_q4_1_and_int4_groups_of_32_are_the_same_numbers():
    affine = AffineWeight.quantize(matrix(7, 64), 4, 32)
    block, change = BlockWeight.from_affine(affine)
    assert change == 0 and block.quant_type == "Q4_1" and same_bits(block.dense(), affine.dense())
    back = block.affine()
    assert np.array_equal(back.codes, affine.codes) and np.array_equal(back.scale, affine.scale)
    assert np.array_equal(back.offset, affine.offset) and back.offset.dtype == np.float16
    assert np.array_equal(BlockWeight.from_affine(back)[0].blocks, block.blocks)


def test_any_q4_1_is_affine_bit_by_bit():
    block = BlockWeight(random_blocks("Q4_1", 24, 96), "Q4_1", (24, 96))
    assert same_bits(block.affine().dense(), block.dense())
    assert np.array_equal(BlockWeight.from_affine(block.affine())[0].blocks, block.blocks)


def test_a_merged_offset_is_rounded_to_float16_and_the_change_is_told():
    affine = AffineWeight.quantize(matrix(7, 64), 4, 32)
    merged = affine.with_offset(affine.offset + matrix(7, 2, scale=0.01, seed=1))
    block, change = BlockWeight.from_affine(merged)
    rounded = np.array([f16(float(x)) for x in merged.offset.reshape(-1)])
    assert change == np.abs(rounded - merged.offset.reshape(-1).astype(np.float64)).max() > 0
    assert change <= np.abs(merged.offset).max() * 2**-11
    assert np.array_equal(block.codes[..., 0] & 15, merged.unpacked()[:, ::32])
    assert same_bits(
        block.affine().dense(), merged.with_offset(rounded.reshape(7, 2).astype(np.float32)).dense()
    )


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "Q6_K"}, "quant_type='Q6_K': choose one of Q4_0, Q4_1, Q8_0"),
        ({"shape": (2, 48)}, r"shape=\(2, 48\): in must be a multiple of 32"),
        ({"shape": (0, 32)}, r"shape=\(0, 32\): must be \(out, in\)"),
        ({"shape": (3, 64)}, r"blocks.shape=\(2, 36\): Q4_0 \(3, 64\) takes \(3, 36\) bytes"),
        ({"quant_type": "Q8_0"}, r"blocks.shape=\(2, 36\): Q8_0 \(2, 64\) takes \(2, 68\) bytes"),
        ({"blocks": np.zeros((2, 36), np.int8)}, "blocks.dtype='int8': must be uint8"),
        ({"blocks": np.zeros(72, np.uint8)}, r"blocks.shape=\(72,\)"),
        ({"blocks": np.zeros((36, 2), np.uint8).T}, "blocks.strides.*C-contiguous"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change, message):
    given = {"blocks": np.zeros((2, 36), np.uint8), "quant_type": "Q4_0", "shape": (2, 64)} | change
    with pytest.raises(ValueError, match=message):
        BlockWeight(**given)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    ("quant_type", "at", "name"), [("Q4_0", 0, "d"), ("Q4_1", 0, "d"), ("Q4_1", 2, "m"), ("Q8_0", 0, "d")]
)
def test_a_scale_that_is_not_finite_is_refused_by_row_and_block(quant_type, at, name, bad, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE", 4)  # two rows of blocks at a time
    raw = random_blocks(quant_type, 9, 64)
    raw.reshape(9, 2, -1)[7, 1, at : at + 2] = np.frombuffer(struct.pack("<e", bad), np.uint8)
    with pytest.raises(ValueError, match=rf"{name} of {quant_type} block \[7, 1\]={bad}: must be finite"):
        BlockWeight(raw, quant_type, (9, 64))


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match=r"w.shape=\(2, 33\): in must be a multiple of 32"):
        BlockWeight.quantize(matrix(2, 33), "Q4_0")
    with pytest.raises(ValueError, match="quant_type='Q5_0'"):
        BlockWeight.quantize(matrix(2, 32), "Q5_0")
    with pytest.raises(ValueError, match=r"w\[0, 3\]=nan"):
        BlockWeight.quantize(np.where(np.arange(32) == 3, np.nan, 1)[None], "Q4_0")
    for quant_type, top in (("Q4_0", 8 * 65520), ("Q4_1", 65520), ("Q8_0", 127 * 65520)):
        w = np.zeros((2, 32), np.float32)
        w[1] = top
        with pytest.raises(
            ValueError, match=f"{quant_type}: scale or minimum of block 1 exceeds float16's 65504"
        ):
            BlockWeight.quantize(w, quant_type)
    w = np.array([[-3e38, 3e38] * 16], np.float32)  # max - min is infinite already
    with pytest.raises(ValueError, match="exceeds float16"):
        BlockWeight.quantize(w, "Q4_1")


def test_only_q4_1_is_affine_and_only_int4_groups_of_32_are_q4_1():
    for quant_type in ("Q4_0", "Q8_0"):
        with pytest.raises(ValueError, match=f"quant_type='{quant_type}': only Q4_1"):
            BlockWeight.quantize(matrix(2, 32), quant_type).affine()
    with pytest.raises(ValueError, match="bits=3"):
        BlockWeight.from_affine(AffineWeight.quantize(matrix(2, 32), 3, 32))
    with pytest.raises(ValueError, match="group_size=16"):
        BlockWeight.from_affine(AffineWeight.quantize(matrix(2, 32), 4, 16))
    affine = AffineWeight.quantize(matrix(2, 32), 4, 32)
    with pytest.raises(ValueError, match=r"m of Q4_1 block \[0, 0\]=inf"):
        BlockWeight.from_affine(affine.with_offset(np.full((2, 1), 1e6, np.float32)))
