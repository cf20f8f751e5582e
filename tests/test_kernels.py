"""Packed codes: vectors = compiled loops = plain Python = NumPy = loop oracle, on sizes with every rest."""

import json
import os
import subprocess
import sys
import types

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora.config import QuantConfig
from minilora.kernels import codes, codes_vectors
from minilora.kernels.intrinsics import wide
from minilora.quant import AffineWeight, BlockWeight, CodebookWeight, codebooks, quantize_weight, reference
from minilora.quant.packed import NO_OFFSETS, frozen

EPS = np.finfo(np.float32).eps
BITS = (2, 3, 4, 8)
SIZES = (1, 2, 3, 5, 7, 8, 9, 16, 63, 65)
CODEBOOKS = ("nf2", "nf3", "nf4", "nf8", "fp4")
AFFINE = ("int2", "int3", "int4", "int8")
BLOCKS = ("Q4_0", "Q4_1", "Q8_0")


def loops(name, compiled=True):
    """The function without vectors; or without Numba too, so that each line is also run as it is read."""
    found = dict(vars(codes))
    found["codes_vectors"] = types.SimpleNamespace(available=lambda: False)
    for key, function in vars(codes).items():
        inner = getattr(function, "py_func", None)  # of a kernel
        if isinstance(function, types.FunctionType) or (inner and not compiled):
            function = inner or function
            found[key] = types.FunctionType(function.__code__, found, key, function.__defaults__)
    return found[name]


def versions(name):
    """The function as it is called, by compiled loops, by plain Python, and in NumPy."""
    plain = matvec_in_numpy if name == "matvec" else getattr(reference, name)
    return [getattr(codes, name), loops(name), loops(name, compiled=False), plain]


def matvec_in_numpy(packed, levels, scales, offsets, block_size, start, x, out):
    w = np.empty(out.size * x.size, np.float32)
    reference.dequantize(packed, levels, scales, offsets, block_size, start, w)
    out[:] = w.reshape(out.size, x.size) @ x


def midpoints_of(quant_type):
    return codebooks.thresholds(codebooks.code_map(quant_type))[0]


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def random_codes(rng, bits, count):
    return rng.integers(0, 2**bits, count).astype(np.uint8)


def packed_of(codes, bits):
    return frozen(naive.pack(codes, bits), np.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", SIZES)
def test_pack_and_unpack_equal_binary_digits(bits, count):
    given = random_codes(np.random.default_rng(count), bits, count)
    expected = naive.pack(given, bits)
    assert reference.packed_size(count, bits) == naive.packed_size(count, bits) == len(expected)
    for pack in versions("pack"):
        assert pack(given, bits).tolist() == expected
    assert naive.unpack(expected, bits, count) == given.tolist()
    for unpack in versions("unpack"):
        for start, stop in [(0, count), (count // 2, count), (0, 1), (count - 1, count), (count, count)]:
            found = unpack(frozen(expected, np.uint8), bits, stop - start, start)
            assert found.dtype == np.uint8 and found.tolist() == given[start:stop].tolist()


def test_first_code_takes_the_highest_bits():
    cases = [(2, [1, 2, 3, 0], [0b01101100]), (3, [1, 0, 0, 0, 0, 0, 0, 7], [32, 0, 7]), (4, [10, 3], [0xA3])]
    for bits, numbers, expected in cases:
        for pack in versions("pack"):
            assert pack(np.array(numbers, np.uint8), bits).tolist() == expected


def codebook_case(seed, count, block_size, quant_type):
    """Flat weights with exact ties, an all-zero block, a subnormal block and large numbers among them."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(count).astype(np.float32)
    midpoints, order = codebooks.thresholds(codebooks.code_map(quant_type))
    w[::3] = rng.choice(midpoints, w[::3].shape)
    w[::block_size] = 1  # absmax 1 at least: where nothing is larger, the midpoints above are exact ties
    w[block_size : 2 * block_size] = 0
    w[2 * block_size : 3 * block_size] = np.float32(1e-41)
    w[3 * block_size : 4 * block_size] *= np.float32(1e37)
    return frozen(np.clip(w, np.float32(-3e38), np.float32(3e38)), np.float32), order


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("count, block_size", [(37, 8), (64, 16), (50, 64), (5, 1), (192, 64)])
def test_quantize_codebook_equals_the_oracle_with_ties_zeros_and_extremes(quant_type, count, block_size):
    w, order = codebook_case(7, count, block_size, quant_type)
    expected, absmax = naive.quantize_codebook(w, codebooks.code_map(quant_type), block_size)
    for quantize in versions("quantize_codebook"):
        ranks, largest = quantize(w, midpoints_of(quant_type), block_size)
        assert largest.dtype == np.float32 and largest.tolist() == [float(a) for a in absmax]
        assert order[ranks].tolist() == expected


def test_a_tie_takes_the_lower_code_and_the_next_float_the_higher():
    midpoints = midpoints_of("nf4")
    for quantize in versions("quantize_codebook"):
        for rank, t in enumerate(midpoints):
            w = frozen([1, t, np.nextafter(t, np.float32(2))], np.float32)
            assert quantize(w, midpoints, 4)[0].tolist() == [15, rank, rank + 1]


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("width", [1, 2])
def test_numbers_beside_a_threshold_are_multiplied_by_the_reciprocal(quant_type, width):
    """Each number is within an ulp of a tie: w·(1/absmax) and w/absmax would differ."""
    midpoints, order = codebooks.thresholds(codebooks.code_map(quant_type))
    absmax = np.random.default_rng(0).uniform(0.01, 10, (100, 1)).astype(np.float32)
    w = np.concatenate([absmax, midpoints * absmax], axis=1)
    w = frozen(np.tile(w, width).reshape(-1), np.float32)
    block_size = (len(midpoints) + 1) * width  # 2·16 weights are whole vectors
    expected, _ = naive.quantize_codebook(w, codebooks.code_map(quant_type), block_size)
    for quantize in versions("quantize_codebook"):
        assert order[quantize(w, midpoints, block_size)[0]].tolist() == expected


def dynamic_numbers(signed, n=4 * 65536 + 77, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 10.0 ** rng.uniform(-9, 0, n)).astype(np.float32)
    x[256:512] = 0  # a block of nothing
    return x if signed else np.abs(x)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_of_ranks_gives_the_codes_of_the_search(signed):
    midpoints = codebooks.thresholds(codebooks.dynamic_map(signed))[0]
    around = [np.nextafter(midpoints, to, dtype=np.float32) for to in (-2, 2)]
    specials = [0, -0.0, 1, -1, 1e-45, -1e-45, 1e-30, 2.0**-24, -(2.0**-24)]
    edges = np.concatenate([midpoints, *around, specials]).astype(np.float32)
    # a 1 in each block, so that nothing is scaled
    edges = np.stack([np.ones_like(edges), edges], axis=1).reshape(-1)
    for values in (dynamic_numbers(signed), edges if signed else np.abs(edges)):
        found, expected = (m.quantize_codebook(values, midpoints, 256) for m in (codes, reference))
        assert all(map(same_bits, found, expected))
        assert len(np.unique(found[0])) == 256  # every code is met


def test_a_table_too_coarse_for_its_midpoints_is_refused():
    close = np.linspace(0.5, 0.6, 255, dtype=np.float32)
    with pytest.raises(ValueError, match="two lie so close"):
        codes.rank_table(close)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups, group_size", [(5, 8), (3, 7), (4, 1)])
def test_quantize_affine_equals_the_oracle(bits, groups, group_size):
    rng = np.random.default_rng(bits)
    w = frozen(rng.standard_normal(groups * group_size) * 3 - 1, np.float32)
    expected, scales, offsets = naive.quantize_affine(w, bits, group_size)
    for fit in versions("group_range"):
        low, high = fit(w, group_size)
        assert low.tolist() == [float(min(w[i] for i in b)) for b in naive.blocks(len(w), group_size)]
        assert high.tolist() == [float(max(w[i] for i in b)) for b in naive.blocks(len(w), group_size)]
    for quantize in versions("quantize_affine"):
        found = quantize(w, frozen(scales, np.float32), frozen(offsets, np.float32), bits)
        assert found.dtype == np.uint8 and found.tolist() == expected


def test_affine_rounds_halves_to_even():
    w = frozen([0.5, 1.5, 2.5, -0.5, 3.5, 99], np.float32)
    one, zero = frozen([1], np.float32), frozen([0], np.float32)
    for quantize in versions("quantize_affine"):
        assert quantize(w, one, zero, 4).tolist() == [0, 2, 2, 0, 4, 15]


def test_half_to_float_is_exact_for_every_finite_half():
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[(every & 0x7C00) != 0x7C00]
    expected = np.array([naive.half_from_bits(b) for b in finite], np.float32)
    public, compiled, plain_python, plain = versions("half_to_float")
    for convert in (public, compiled, plain):
        assert same_bits(convert(finite.view(np.float16)), expected)
    assert same_bits(plain_python(finite[::4001].view(np.float16)), expected[::4001].copy())


def dequantize_case(bits, count, block_size, affine, seed=0):
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    given = random_codes(rng, bits, count)
    n_blocks = -(-count // block_size)
    scales = frozen(rng.random(n_blocks), np.float32)
    offsets = frozen(rng.standard_normal(n_blocks), np.float32) if affine else NO_OFFSETS
    w = np.array(naive.dequantize_codebook(given, scales, levels, block_size))
    if affine:
        w = w + np.repeat(offsets, block_size)[:count]
    return packed_of(given, bits), levels, scales, offsets, w


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("block_size", [1, 6, 8, 64])
def test_dequantize_equals_the_oracle_from_any_start(bits, affine, block_size):
    packed, levels, scales, offsets, w = dequantize_case(bits, 77, block_size, affine)
    for start, stop in [(0, 77), (8, 77), (8, 9), (3, 70), (70, 77), (76, 77), (16, 48), (5, 5), (0, 64)]:
        first = start // block_size
        for dequantize in versions("dequantize"):
            out = np.full(stop - start, np.nan, np.float32)
            dequantize(packed, levels, scales[first:], offsets[first:], block_size, start, out)
            assert np.array_equal(out, w[start:stop])


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_of_more_than_one_cache_piece_equals_numpy(bits):
    packed, levels, scales, offsets, w = dequantize_case(bits, 9001, 24, True)
    for module in (codes, reference):
        out = np.empty(9001 - 11, np.float32)
        module.dequantize(packed, levels, scales, offsets, 24, 11, out)
        assert np.array_equal(out, w[11:])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 200), st.integers(1, 70), st.booleans(), st.data())
def test_dequantize_any_window(bits, count, block_size, affine, data):
    packed, levels, scales, offsets, w = dequantize_case(bits, count, block_size, affine, seed=count)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    first = start // block_size
    for module in (codes, reference):
        guarded = np.full(stop - start + 2, 7, np.float32)
        out = guarded[1:-1]
        module.dequantize(packed, levels, scales[first:], offsets[first:], block_size, start, out)
        assert np.array_equal(out, w[start:stop]) and guarded[0] == guarded[-1] == 7


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("block_size", [6, 32])
def test_float16_scales_and_offsets_decode_as_the_same_numbers_in_float32(affine, block_size):
    packed, levels, scales, offsets, _ = dequantize_case(4, 192, block_size, affine)
    halves = [frozen(a, np.float16) for a in (scales, offsets)]
    floats = [frozen(a, np.float32) for a in halves]
    expected, x = np.empty(192, np.float32), np.ones(96, np.float32)
    reference.dequantize(packed, levels, *floats, block_size, 0, expected)
    for numbers in (halves, floats, [halves[0], floats[1]]):
        for dequantize, matvec in zip(versions("dequantize"), versions("matvec"), strict=True):
            out, y = np.empty(192, np.float32), np.empty(2, np.float32)
            dequantize(packed, levels, *numbers, block_size, 0, out)
            assert same_bits(out, expected)
            matvec(packed, levels, *numbers, block_size, 0, x, y)
            bound = 100 * EPS * np.abs(expected.astype(np.float64)).reshape(2, 96).sum(axis=1)
            # |scale·level| + |offset| is what the vectors sum
            bound += 100 * EPS * 96 * (np.abs(floats[1]).max() if affine else 0)
            assert (np.abs(y - expected.astype(np.float64).reshape(2, 96).sum(axis=1)) <= bound).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("rows, width, block_size", [(6, 20, 8), (3, 7, 64), (1, 1, 1), (5, 3000, 100)])
def test_matvec_equals_exact_sums(bits, affine, rows, width, block_size):
    packed, levels, scales, offsets, w = dequantize_case(bits, (rows + 1) * width, block_size, affine)
    x = np.random.default_rng(1).standard_normal(width).astype(np.float32)
    matrix = w[width:].reshape(rows, width)  # start at the second row
    expected = np.array([float(np.dot(row.astype(np.float64), x)) for row in matrix])
    if width < 100:
        np.testing.assert_allclose(expected, naive.matmul(matrix, x[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    # error of a float32 sum in any order
    bound = (width + 1) * EPS * (np.abs(matrix).astype(np.float64) @ np.abs(x))
    first = width // block_size
    for matvec in versions("matvec") if width < 100 else [codes.matvec, matvec_in_numpy]:
        out = np.full(rows, np.nan, np.float32)
        matvec(packed, levels, scales[first:], offsets[first:], block_size, width, x, out)
        assert (np.abs(out - expected) <= bound).all()


def test_nan_and_infinity_survive_fast_math():
    packed, levels, _, _, _ = dequantize_case(4, 16, 8, False)
    levels, scales = np.abs(levels) + 1, frozen([np.nan, np.inf], np.float32)
    out, y = np.empty(16, np.float32), np.empty(2, np.float32)
    codes.dequantize(packed, levels, scales, NO_OFFSETS, 8, 0, out)
    assert np.isnan(out[:8]).all() and np.isposinf(out[8:]).all()
    codes.matvec(packed, levels, scales, NO_OFFSETS, 8, 0, np.ones(8, np.float32), y)
    assert np.isnan(y[0]) and np.isposinf(y[1])


@pytest.mark.parametrize("bits", BITS)
def test_lookup_table_lists_the_levels_of_every_index(bits):
    found, table = codes._lookup_table(np.arange(2**bits, dtype=np.float32).tobytes())
    width = 6 if bits == 3 else 8
    assert found == bits
    for index in (0, 1, 2**width - 1, 2 ** (width - 1) + 3):
        digits = format(index, f"0{width}b")
        assert table[index].tolist() == [int(digits[i : i + bits], 2) for i in range(0, width, bits)]


# ---- plain mode: the same bytes and weights


@st.composite
def matrices(draw, multiple=1):
    """Weights of any size, among them zeros of both signs, blocks of zeros, denormals and ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 9)), multiple * draw(st.integers(1, 80 // multiple))
    w = (rng.standard_normal(shape) * 10.0 ** draw(st.integers(-8, 3))).astype(np.float32)
    midpoints = codebooks.thresholds(codebooks.code_map("nf4"))[0]
    for special in (midpoints, [0.0, -0.0], [1e-45, -1e-41, 1e-38], [0.5, 1, -1]):
        share = draw(st.sampled_from([0, 0, 0.3, 1]))
        w = np.where(rng.random(shape) < share, rng.choice(special, shape), w).astype(np.float32)
    return w


def in_both_modes(make):
    """What is made compiled and plain, and each of the two decoded in the other mode."""
    compiled = make()
    with minilora.kernels.plain():
        plain = make()
        decoded_plain, unpacked_plain = (
            compiled.dense(),
            getattr(compiled, "unpacked", lambda: compiled.codes)(),
        )
    assert same_bits(plain.dense(), compiled.dense()) and same_bits(decoded_plain, plain.dense())
    assert np.array_equal(unpacked_plain, getattr(plain, "unpacked", lambda: plain.codes)())
    ids = np.array([0, len(plain.dense()) - 1])
    with minilora.kernels.plain():
        rows = compiled.rows(ids)
    assert same_bits(rows, compiled.rows(ids))
    return compiled, plain


@settings(max_examples=80, deadline=None)
@given(matrices(), st.sampled_from(CODEBOOKS), st.sampled_from([1, 3, 32, 64, 100]), st.booleans())
def test_plain_codebook_weights_have_the_same_bits(w, quant_type, block_size, double_quant):
    compiled, plain = in_both_modes(lambda: CodebookWeight.quantize(w, quant_type, block_size, double_quant))
    for a, b in zip(sum(compiled.arrays().values(), []), sum(plain.arrays().values(), []), strict=True):
        assert same_bits(a, b)


@settings(max_examples=80, deadline=None)
@given(matrices(), st.sampled_from(BITS), st.sampled_from(["minmax", "mse", "hqq"]), st.data())
def test_plain_affine_weights_have_the_same_bits(w, bits, fit, data):
    width = w.shape[1]
    group = data.draw(st.sampled_from([g for g in range(1, width + 1) if width % g == 0]))
    store = data.draw(st.sampled_from(["float16", "float32", "zero"]))
    compiled, plain = in_both_modes(lambda: AffineWeight.quantize(w, bits, group, fit, store))
    # which of two zeros is a group's least weight is not defined
    assert same_bits(compiled.codes, plain.codes) and same_bits(compiled.scale, plain.scale)
    assert np.array_equal(compiled.offset, plain.offset)


@settings(max_examples=40, deadline=None)
@given(matrices(multiple=32), st.sampled_from(BLOCKS))
def test_plain_block_weights_have_the_same_bits(w, quant_type):
    compiled, plain = in_both_modes(lambda: BlockWeight.quantize(w, quant_type))
    assert same_bits(compiled.blocks, plain.blocks)


@pytest.mark.parametrize("quant_type", [*CODEBOOKS, *AFFINE, *BLOCKS])
@pytest.mark.parametrize("width", [32, 96, 1024])
def test_plain_products_agree_up_to_rounding(quant_type, width):
    rng = np.random.default_rng(width)
    w, x, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((19, width), (5, width), (5, 19)))
    if quant_type in BLOCKS:
        q = BlockWeight.quantize(w, quant_type)
    else:
        q = quantize_weight(w, QuantConfig(quant_type, 32, group_size=32))
    dense = np.abs(q.dense().astype(np.float64))
    # vectors sum scale·level and offset apart: |scale·level| + |offset| ≤ |w| + 2·|offset|
    offset = q.offset if isinstance(q, AffineWeight) else q.offsets if quant_type == "Q4_1" else 0
    if quant_type == "Q4_0":
        offset = 8 * q.scales.astype(np.float64)
    parts = dense + 2 * np.abs(np.repeat(offset, 32, axis=1).astype(np.float64) if np.ndim(offset) else 0)
    for rows in (x, x[:1], x[0]):
        with minilora.kernels.plain():
            plain = q.matmul(rows)
        bound = (width + 4) * EPS * (np.abs(rows) @ parts.T)  # of each of the two, half as much
        assert plain.dtype == np.float32 and (np.abs(q.matmul(rows) - plain) <= bound).all()
    with minilora.kernels.plain():
        plain = q.matmul_t(dy)
    assert (np.abs(q.matmul_t(dy) - plain) <= (19 + 4) * EPS * (np.abs(dy) @ dense)).all()


# ---- vectors of the processor

vectors = pytest.mark.skipif(not codes_vectors.available(), reason="this processor lacks AVX2, FMA or F16C")


@vectors
@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "nf4", "fp4"])
@pytest.mark.parametrize("count, block_size", [(640, 32), (640, 64), (96, 96), (8192, 4096)])
def test_vectors_quantize_as_the_loops(quant_type, count, block_size):
    w, _ = codebook_case(7, count, block_size, quant_type)
    midpoints = midpoints_of(quant_type)
    out, absmax = np.full(count + 2, 99, np.uint8), np.full(count // block_size + 2, np.nan, np.float32)
    padded = codes._search_tables(midpoints.tobytes())[0]
    codes_vectors.quantize_codebook(w, padded, block_size, absmax[1:-1], out[1:-1])
    assert out[0] == out[-1] == 99 and np.isnan(absmax[[0, -1]]).all()
    for quantize in (loops("quantize_codebook"), reference.quantize_codebook):
        ranks, expected = quantize(w, midpoints, block_size)
        assert same_bits(out[1:-1], ranks) and same_bits(absmax[1:-1], expected)


def vectors_case(affine, count, block_size, zeros=False):
    packed, levels, scales, offsets, _ = dequantize_case(4, count, block_size, affine, seed=count)
    if zeros:  # FP4's two
        levels = codebooks.code_map("fp4")
    return packed, levels, scales, offsets


@vectors
@pytest.mark.parametrize("affine, zeros", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("block_size", [32, 64, 96, 4096])
def test_vectors_dequantize_as_the_loops_and_as_numpy(affine, zeros, block_size):
    packed, levels, scales, offsets = vectors_case(affine, 4800, block_size, zeros)
    for start, stop in [(0, 4800), (32, 4800), (96, 128), (64, 1600), (4768, 4800), (32, 32)]:
        first = start // block_size
        results = []
        for dequantize in (codes.dequantize, loops("dequantize"), reference.dequantize):
            out = np.full(stop - start + 2, 7, np.float32)  # two more, so that vectors are not aligned
            dequantize(packed, levels, scales[first:], offsets[first:], block_size, start, out[1:-1])
            assert out[0] == out[-1] == 7
            results.append(out)
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@vectors
def test_vectors_read_float16_where_it_lies():
    """Scales and offsets of every size, among them subnormal ones and both zeros."""
    every = np.arange(0, 2**16, 37, dtype=np.uint16)
    finite = every[(every & 0x7C00) != 0x7C00].view(np.float16)
    packed, levels, _, _ = vectors_case(True, 32 * finite.size, 32)
    halves = finite, finite[::-1].copy()
    floats = [a.astype(np.float32) for a in halves]
    x, found = np.ones(32, np.float32), []
    for scales, offsets in (halves, floats):
        w, y = np.empty(32 * finite.size, np.float32), np.empty(finite.size, np.float32)
        codes.dequantize(packed, levels, scales, offsets, 32, 0, w)
        codes.matvec(packed, levels, scales, offsets, 32, 0, x, y)
        found.append((w, y))
    assert all(map(same_bits, *found))


@vectors
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "rows, width, block_size", [(5, 32, 32), (3, 96, 64), (9, 160, 96), (2, 4096, 64), (4, 64, 4096)]
)
def test_vectors_multiply_in_the_order_that_they_promise(affine, rows, width, block_size):
    packed, levels, scales, offsets = vectors_case(affine, (rows + 1) * width, block_size)
    x = np.random.default_rng(1).standard_normal(width).astype(np.float32)
    first = width // block_size  # start at the second row
    w, out = np.empty(rows * width, np.float32), np.full(rows, np.nan, np.float32)
    reference.dequantize(packed, levels, scales[first:], offsets[first:], block_size, width, w)
    lanes = np.zeros((rows, 32), np.float32)
    for piece in np.split(
        w.reshape(rows, width).astype(np.float64) * x, width // 32, axis=1
    ):  # exact: 48 bits
        lanes = (lanes + piece).astype(np.float32)  # rounded once, but for a tie in 2^29 cases
    sums = ((lanes[:, :8] + lanes[:, 8:16]) + lanes[:, 16:24]) + lanes[:, 24:]
    for half in (4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    table = codes._lookup_table(levels.tobytes())[1]
    codes_vectors.matvec(packed, 4, table, scales[first:], offsets[first:], block_size, width, x, out)
    assert np.array_equal(out, sums[:, 0])


@vectors
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "block_size, width",
    [
        (32, 32),
        (32, 160),
        (64, 64),
        (64, 4096),
        (64, 576),
        (96, 96),
        (128, 128),
        (128, 384),
        (192, 384),
        (4096, 256),
        (32, 1024),
        (128, 1152),
        (64, 1088),
        (256, 1024),
        (4096, 1024),
        (4096, 4096),
        (192, 3072),
    ],
)
def test_vectors_multiply_within_rounding_and_each_row_by_itself(affine, block_size, width):
    rows = 7
    packed, levels, scales, offsets = vectors_case(affine, (rows + 1) * width, block_size)
    x = np.random.default_rng(2).standard_normal(width).astype(np.float32)
    scaled = np.repeat(scales, block_size)[width : (rows + 1) * width].astype(np.float64)
    scaled *= levels[reference.unpack(packed, 4, rows * width, width)]
    constants = np.repeat(offsets, block_size)[width : (rows + 1) * width] if affine else np.zeros(1)
    expected = (scaled + constants).reshape(rows, width) @ x
    bound = (width + 4) * (EPS / 2) * ((np.abs(scaled) + np.abs(constants)).reshape(rows, width) @ np.abs(x))
    found = np.full((2, rows), np.nan, np.float32)
    for some, at_once in zip(found, (rows, 1), strict=True):
        for r in range(0, rows, at_once):
            start = (1 + r) * width
            first = start // block_size
            out = some[r : r + at_once]
            codes.matvec(packed, levels, scales[first:], offsets[first:], block_size, start, x, out)
    assert (np.abs(found[0] - expected) <= bound).all() and np.array_equal(*found)


@vectors
@pytest.mark.parametrize("width", [64, 1024])
def test_vectors_keep_a_row_that_is_not_finite_apart(width):
    packed, levels, scales, _ = vectors_case(False, 3 * width, 64)
    x, y, sick = np.ones(width, np.float32), np.empty(3, np.float32), np.empty(3, np.float32)
    codes.matvec(packed, levels, scales, NO_OFFSETS, 64, 0, x, y)
    changed = scales.copy()
    changed[width // 64 : 2 * width // 64] = np.nan
    codes.matvec(packed, levels, changed, NO_OFFSETS, 64, 0, x, sick)
    assert np.isnan(sick[1]) and np.array_equal(sick[[0, 2]], y[[0, 2]])


@vectors
def test_vectors_keep_nan_and_infinity():
    packed, levels, _, _ = vectors_case(False, 64, 32)
    levels, scales = np.abs(levels) + 1, frozen([np.nan, np.inf], np.float32)
    out, y = np.empty(64, np.float32), np.empty(2, np.float32)
    codes.dequantize(packed, levels, scales, NO_OFFSETS, 32, 0, out)
    codes.matvec(packed, levels, scales, NO_OFFSETS, 32, 0, np.ones(32, np.float32), y)
    assert np.isnan(out[:32]).all() and np.isposinf(out[32:]).all() and np.isnan(y[0]) and np.isposinf(y[1])


def test_weights_are_the_same_without_the_vectors(monkeypatch):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((24, 192)).astype(np.float32), rng.standard_normal((1, 192)).astype(np.float32)

    def results():
        found = []
        for q in (
            CodebookWeight.quantize(w),
            CodebookWeight.quantize(w, "fp4", 32, False),
            AffineWeight.quantize(w),
        ):
            found.append(
                (q.codes, *q.arrays()["scales"], q.dense(), q.rows(np.array([3, 5, 6])), q.matmul(x))
            )
        return found

    fast = results()
    monkeypatch.setattr(codes_vectors, "available", lambda: False)
    for a, b in zip(fast, results(), strict=True):
        assert all(np.array_equal(v, u) for v, u in zip(a[:-1], b[:-1], strict=True))
        np.testing.assert_allclose(
            a[-1], b[-1], rtol=0, atol=193 * EPS * float(np.abs(w).max(0) @ np.abs(x[0]))
        )


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("block_size", [24, 64])
def test_a_weight_that_is_not_finite_is_named_by_loops_and_vectors(value, block_size):
    w = np.ones((4, 192), np.float32)
    w[2, 77] = value
    with pytest.raises(ValueError, match=r"w\[2, 77\]=-?(nan|inf): weights must be finite"):
        CodebookWeight.quantize(w, block_size=block_size)


def run_compiled_for(features, *arguments):
    """Run Python with Numba compiling for a processor that has no more than these features."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {
        **os.environ,
        "PYTHONPATH": root,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": features,
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=root
    )


AVX2 = "+avx2,+fma,+f16c"


@pytest.mark.parametrize(
    "features, expected", [("", "False False"), ("+avx2", "False False"), (AVX2, "True False")]
)
def test_vectors_need_avx2_and_wide_ones_avx512(features, expected):
    run = run_compiled_for(
        features,
        "-c",
        "from minilora.kernels import codes_vectors, intrinsics\n"
        "print(codes_vectors.available(), intrinsics.wide())",
    )
    assert run.stdout == f"{expected}\n", run.stderr


@pytest.mark.skipif(
    not (codes_vectors.available() and wide()), reason="runs above in AVX2 already, if at all"
)
def test_avx2_does_what_avx512_does():
    """The tests of the vectors above once more, compiled without AVX-512."""
    run = run_compiled_for(
        AVX2, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_vectors_ and not need"
    )
    assert run.returncode == 0, run.stdout


COUNT_SIGNATURES = """
import json, numpy as np
from numba.core.dispatcher import Dispatcher
from minilora.config import QuantConfig
from minilora.kernels import block_codes, block_vectors, codes, codes_vectors
from minilora.quant import BlockWeight, quantize_weight
from minilora.quant.compilation import compile_kernels
def count():
    modules = (codes, codes_vectors, block_codes, block_vectors)
    found = {f"{m.__name__}.{n}": f for m in modules for n, f in vars(m).items() if isinstance(f, Dispatcher)}
    own = {name: f for name, f in found.items() if f.py_func.__module__ == name.rpartition(".")[0]}
    return {name: len(f.signatures) for name, f in own.items()}
compile_kernels()
warmed = count()
for quant_type in ("nf2", "nf3", "nf4", "nf8", "fp4", "int2", "int3", "int4", "int8"):
    for double_quant in (False, True):
        w = np.eye(24, 64, dtype=np.float32)
        w.flags.writeable = double_quant
        q = quantize_weight(w, QuantConfig(quant_type, double_quant=double_quant))
        x = np.ones((2, 64), np.float32)
        x.flags.writeable = double_quant
        q.matmul(x), q.matmul(x[:1]), q.matmul_t(q.matmul(x)), q.rows(np.array([3])), q.dense(), q.unpacked()
        if hasattr(q, "with_offset"):
            q.with_offset(q.offset + np.float32(1)).matmul(x)
for quant_type in ("Q4_0", "Q4_1", "Q8_0"):
    q = BlockWeight.quantize(np.eye(24, 64, dtype=np.float32), quant_type)
    q = BlockWeight(np.array(q.blocks), quant_type, q.shape)
    q.matmul(np.ones((2, 64), np.float32)), q.matmul(x[:1]), q.matmul(x[0]), q.rows(np.array([3])), q.dense()
print(json.dumps([warmed, count()]))
"""

USED = {
    "codes": "_pack _unpack _quantize_by_comparing _quantize_by_table _group_range _quantize_affine "
    "_dequantize _matvec _half_to_float",
    "codes_vectors": "quantize_codebook dequantize matvec",
    "block_codes": "_dequantize_blocks _multiply_blocks",
    "block_vectors": "dequantize_blocks multiply_blocks",
}


def test_each_kernel_compiles_one_signature_or_two_where_scales_differ():
    """A second signature is another part of the user's first minute; a read-only array is another type to
    Numba."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    for _ in range(2):  # from the cache: a kernel that is compiled here would bring those that it calls
        command = [sys.executable, "-c", COUNT_SIGNATURES]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    vectors = codes_vectors.available()
    modules = ["codes", "codes_vectors", "block_vectors"] if vectors else ["codes", "block_codes"]
    expected = {f"minilora.kernels.{module}.{name}" for module in modules for name in USED[module].split()}
    for found in json.loads(run.stdout):  # after the warm-up, and after all that a weight can do
        used = {name: n for name, n in found.items() if n}
        assert set(used) == expected, used
        twice = {name for name, n in used.items() if n > 1}  # for scales in float32 and in float16
        assert twice <= {f"minilora.kernels.codes_vectors.{name}" for name in ("dequantize", "matvec")}, twice
        assert max(used.values()) <= 2


WITHOUT_NUMBA = """
import sys, numpy as np
import minilora.kernels
from minilora.config import QuantConfig
from minilora.quant import BlockWeight, quantize_weight
from minilora.quant.dynamic import dynamic_decode, dynamic_encode
from minilora.quant.gptq import Hessian, gptq
w, x = np.eye(24, 64, dtype=np.float32), np.ones((3, 64), np.float32)
hessian = Hessian(64)
hessian.add(np.eye(64))
made = [quantize_weight(w, QuantConfig(t, 32)) for t in ("nf4", "nf8", "int4", "int3")]
made += [gptq(w, hessian.value(), QuantConfig(t, 32, quantizer="gptq"))[0] for t in ("nf4", "int4")]
made += [BlockWeight.quantize(w, t) for t in ("Q4_0", "Q4_1", "Q8_0")]
for q in made:
    q.matmul(x), q.matmul(x[0]), q.matmul_t(q.matmul(x)), q.rows(np.array([3])), q.dense(), q.bits_per_weight
codes, absmax = np.empty(w.size, np.uint8), np.empty(-(-w.size // 256), np.float32)
dynamic_encode(w.reshape(-1), codes, absmax)
dynamic_decode(codes, absmax)
print(minilora.kernels.is_plain(), "numba" in sys.modules, "llvmlite" in sys.modules)
"""


def test_plain_mode_never_imports_numba():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root, "MINILORA_PLAIN": "1"}
    command = [sys.executable, "-c", WITHOUT_NUMBA]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout == "True False False\n", run.stderr
