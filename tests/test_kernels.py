"""Kernels: jitted = plain Python = NumPy version = loop oracle, on sizes that leave every kind of rest."""

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

from minilora.kernels import block_vectors as blocks_simd
from minilora.kernels import codes as kernels
from minilora.kernels import codes_vectors as simd
from minilora.kernels.intrinsics import wide
from minilora.quant import AffineWeight, CodebookWeight, codebooks
from minilora.quant.packed import NO_OFFSETS, frozen
from minilora.quant.weights import thresholds

EPS = np.finfo(np.float32).eps
BITS = (2, 3, 4, 8)
SIZES = (1, 2, 3, 5, 7, 8, 9, 16, 63, 65)


def plain_python(name):
    """The kernel and all kernels it calls as Python functions, so that each line is also run as it is
    read."""
    functions = {n: f.py_func for n, f in vars(kernels).items() if hasattr(f, "py_func")}
    namespace = dict(vars(kernels))
    namespace |= {n: types.FunctionType(f.__code__, namespace) for n, f in functions.items()}
    return namespace[name]


def versions(name):
    """The kernel as compiled, as plain Python, and its NumPy twin."""
    return [getattr(kernels, name), plain_python(name), getattr(kernels, f"{name}_numpy")]


def random_codes(rng, bits, count):
    return rng.integers(0, 2**bits, count).astype(np.uint8)


def packed_of(codes, bits):
    return frozen(naive.pack(codes, bits), np.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", SIZES)
def test_pack_and_unpack_equal_binary_digits(bits, count):
    codes = random_codes(np.random.default_rng(count), bits, count)
    expected = naive.pack(codes, bits)
    assert kernels.packed_size(count, bits) == naive.packed_size(count, bits) == len(expected)
    for pack in versions("pack"):
        out = np.full(len(expected), 255, np.uint8)
        pack(codes, bits, out)
        assert out.tolist() == expected
    for unpack in versions("unpack"):
        out = np.full(count, 255, np.uint8)
        unpack(frozen(expected, np.uint8), bits, out)
        assert out.tolist() == codes.tolist() == naive.unpack(expected, bits, count)


def test_first_code_takes_the_highest_bits():
    cases = [(2, [1, 2, 3, 0], [0b01101100]), (3, [1, 0, 0, 0, 0, 0, 0, 7], [32, 0, 7]), (4, [10, 3], [0xA3])]
    for bits, codes, expected in cases:
        out = np.empty(len(expected), np.uint8)
        kernels.pack(np.array(codes, np.uint8), bits, out)
        assert out.tolist() == expected


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


@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "nf4", "fp4", "nf8"])
@pytest.mark.parametrize("count, block_size", [(37, 8), (64, 16), (50, 64), (5, 1)])
def test_quantize_codebook_equals_the_oracle_with_ties_zeros_and_extremes(quant_type, count, block_size):
    w, order = codebook_case(7, count, block_size, quant_type)
    codes, absmax = naive.quantize_codebook(w, codebooks.code_map(quant_type), block_size)
    for quantize in versions("quantize_codebook"):
        out, largest = np.full(count, 255, np.uint8), np.full(len(absmax), np.nan, np.float32)
        quantize(w, thresholds(quant_type)[0], block_size, largest, out)
        assert largest.tolist() == [float(a) for a in absmax]
        assert order[out].tolist() == codes


def test_a_tie_takes_the_lower_code_and_the_next_float_the_higher():
    midpoints, _ = thresholds("nf4")
    for rank, t in enumerate(midpoints):
        w = frozen([1, t, np.nextafter(t, np.float32(2))], np.float32)
        out, absmax = np.empty(3, np.uint8), np.empty(1, np.float32)
        kernels.quantize_codebook(w, midpoints, 4, absmax, out)
        assert out.tolist() == [15, rank, rank + 1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups, group_size", [(5, 8), (3, 7), (4, 1)])
def test_quantize_affine_equals_the_oracle(bits, groups, group_size):
    rng = np.random.default_rng(bits)
    w = frozen(rng.standard_normal(groups * group_size) * 3 - 1, np.float32)
    codes, scales, offsets = naive.quantize_affine(w, bits, group_size)
    for fit in versions("group_range"):
        low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
        fit(w, group_size, low, high)
        assert low.tolist() == [float(min(w[i] for i in b)) for b in naive.blocks(len(w), group_size)]
        assert high.tolist() == [float(max(w[i] for i in b)) for b in naive.blocks(len(w), group_size)]
    for quantize in versions("quantize_affine"):
        out = np.full(w.size, 255, np.uint8)
        quantize(w, frozen(scales, np.float32), frozen(offsets, np.float32), group_size, 2**bits - 1, out)
        assert out.tolist() == codes


def test_affine_rounds_halves_to_even():
    w = frozen([0.5, 1.5, 2.5, -0.5, 3.5, 99], np.float32)
    one, zero = frozen([1], np.float32), frozen([0], np.float32)
    for quantize in versions("quantize_affine"):
        out = np.empty(6, np.uint8)
        quantize(w, one, zero, 6, 15, out)
        assert out.tolist() == [0, 2, 2, 0, 4, 15]


def test_half_to_float_is_exact_for_every_finite_half():
    every = np.arange(2**16, dtype=np.uint16)
    finite = frozen(every[(every & 0x7C00) != 0x7C00], np.uint16)
    expected = [naive.half_from_bits(b) for b in finite]
    for convert in (kernels.half_to_float, kernels.half_to_float_numpy):
        out = np.empty(finite.size, np.float32)
        convert(finite, out)
        assert np.array_equal(out, expected) and np.array_equal(np.signbit(out), finite >= 0x8000)
    few = finite[::4001]
    out = np.empty(few.size, np.float32)
    plain_python("half_to_float")(few, out)
    assert np.array_equal(out, expected[::4001])


def dequantize_case(bits, count, block_size, affine, seed=0):
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    codes = random_codes(rng, bits, count)
    n_blocks = -(-count // block_size)
    scales = frozen(rng.random(n_blocks), np.float32)
    offsets = frozen(rng.standard_normal(n_blocks), np.float32) if affine else NO_OFFSETS
    w = np.array(naive.dequantize_codebook(codes, scales, levels, block_size))
    if affine:
        w = w + np.repeat(offsets, block_size)[:count]
    return packed_of(codes, bits), kernels.lookup_table(levels, bits), scales, offsets, w


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("block_size", [1, 6, 8, 64])
def test_dequantize_equals_the_oracle_from_any_start(bits, affine, block_size):
    packed, table, scales, offsets, w = dequantize_case(bits, 77, block_size, affine)
    for start, stop in [(0, 77), (8, 77), (8, 9), (3, 70), (70, 77), (76, 77), (16, 48), (5, 5)]:
        first = start // block_size
        for dequantize in versions("dequantize"):
            out = np.full(stop - start, np.nan, np.float32)
            dequantize(packed, bits, table, scales[first:], offsets[first:], block_size, start, out)
            assert np.array_equal(out, w[start:stop])


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_of_more_than_one_cache_piece_equals_numpy(bits):
    packed, table, scales, offsets, w = dequantize_case(bits, 9001, 24, True)
    out, twin = np.empty((2, 9001 - 11), np.float32)
    kernels.dequantize(packed, bits, table, scales, offsets, 24, 11, out)
    kernels.dequantize_numpy(packed, bits, table, scales, offsets, 24, 11, twin)
    assert np.array_equal(out, twin) and np.array_equal(out, w[11:])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 200), st.integers(1, 70), st.booleans(), st.data())
def test_dequantize_any_window(bits, count, block_size, affine, data):
    packed, table, scales, offsets, w = dequantize_case(bits, count, block_size, affine, seed=count)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    guarded = np.full(stop - start + 2, 7, np.float32)
    first = start // block_size
    kernels.dequantize(packed, bits, table, scales[first:], offsets[first:], block_size, start, guarded[1:-1])
    assert np.array_equal(guarded[1:-1], w[start:stop]) and guarded[0] == guarded[-1] == 7


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("rows, width, block_size", [(6, 20, 8), (3, 7, 64), (1, 1, 1), (5, 3000, 100)])
def test_matvec_equals_exact_sums(bits, affine, rows, width, block_size):
    packed, table, scales, offsets, w = dequantize_case(bits, (rows + 1) * width, block_size, affine)
    x = np.random.default_rng(1).standard_normal(width).astype(np.float32)
    matrix = w[width:].reshape(rows, width)  # start at the second row
    expected = np.array([float(np.dot(row.astype(np.float64), x)) for row in matrix])
    if width < 100:
        np.testing.assert_allclose(expected, naive.matmul(matrix, x[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    bound = (
        (width + 1) * EPS * (np.abs(matrix).astype(np.float64) @ np.abs(x))
    )  # error of a float32 sum in any order
    first = width // block_size
    candidates = versions("matvec") if width < 100 else [kernels.matvec, kernels.matvec_numpy]
    for matvec in candidates:
        out = np.full(rows, np.nan, np.float32)
        matvec(packed, bits, table, scales[first:], offsets[first:], block_size, width, x, out)
        assert (np.abs(out - expected) <= bound).all()


def test_nan_and_infinity_survive_fast_math():
    packed, table, _, _, _ = dequantize_case(4, 16, 8, False)
    table = frozen(np.abs(table) + 1, np.float32)
    out = np.empty(16, np.float32)
    kernels.dequantize(packed, 4, table, frozen([np.nan, np.inf], np.float32), NO_OFFSETS, 8, 0, out)
    assert np.isnan(out[:8]).all() and np.isposinf(out[8:]).all()
    y = np.empty(2, np.float32)
    x = np.ones(8, np.float32)
    kernels.matvec(packed, 4, table, frozen([np.nan, np.inf], np.float32), NO_OFFSETS, 8, 0, x, y)
    assert np.isnan(y[0]) and np.isposinf(y[1])


@pytest.mark.parametrize("bits", BITS)
def test_lookup_table_lists_the_levels_of_every_index(bits):
    levels = np.arange(2**bits, dtype=np.float32)
    table = kernels.lookup_table(levels, bits)
    width = 6 if bits == 3 else 8
    for index in (0, 1, 2**width - 1, 2 ** (width - 1) + 3):
        digits = format(index, f"0{width}b")
        assert table[index].tolist() == [int(digits[i : i + bits], 2) for i in range(0, width, bits)]


# ---- vectors of the processor

vectors = pytest.mark.skipif(not simd.available(), reason="this processor lacks AVX2, FMA or F16C")


@vectors
@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "nf4", "fp4"])
@pytest.mark.parametrize("count, block_size", [(640, 32), (640, 64), (96, 96), (8192, 4096)])
def test_vectors_quantize_as_the_loops(quant_type, count, block_size):
    w, _ = codebook_case(7, count, block_size, quant_type)
    found = []
    for quantize in (simd.quantize_codebook, kernels.quantize_codebook_numpy):
        out, absmax = np.full(count + 2, 99, np.uint8), np.full(count // block_size + 2, np.nan, np.float32)
        quantize(w, thresholds(quant_type)[0], block_size, absmax[1:-1], out[1:-1])
        assert out[0] == out[-1] == 99 and np.isnan(absmax[[0, -1]]).all()
        found.append((out.tolist(), absmax[1:-1].tolist()))
    assert found[0] == found[1]


def vectors_case(affine, count, block_size, zeros=False):
    packed, table, scales, offsets, _ = dequantize_case(4, count, block_size, affine, seed=count)
    if zeros:  # FP4's two, of which the second is negative
        table = kernels.lookup_table(codebooks.code_map("fp4"), 4)
    return packed, table, scales, offsets


@vectors
@pytest.mark.parametrize("affine, zeros", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("block_size", [32, 64, 96, 4096])
def test_vectors_dequantize_as_the_loops_and_as_numpy(affine, zeros, block_size):
    packed, table, scales, offsets = vectors_case(affine, 4800, block_size, zeros)
    for start, stop in [(0, 4800), (32, 4800), (96, 128), (64, 1600), (4768, 4800), (32, 32)]:
        first = start // block_size
        results = []
        for dequantize in (simd.dequantize, kernels.dequantize, kernels.dequantize_numpy):
            out = np.full(
                stop - start + 2, 7, np.float32
            )  # two numbers more, so that the vectors are not aligned
            dequantize(packed, 4, table, scales[first:], offsets[first:], block_size, start, out[1:-1])
            assert out[0] == out[-1] == 7
            results.append(out.view(np.uint32))  # the sign of a zero counts
        assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@vectors
def test_vectors_read_float16_where_it_lies():
    """Scales and offsets of every size, among them subnormal ones and both zeros."""
    every = np.arange(0, 2**16, 37, dtype=np.uint16)
    bits = frozen(every[(every & 0x7C00) != 0x7C00], np.uint16)  # finite
    packed, table, _, _ = vectors_case(True, 32 * bits.size, 32)
    halves, floats = (bits, frozen(bits[::-1], np.uint16)), []
    for half_bits in halves:
        converted = np.empty(bits.size, np.float32)
        kernels.half_to_float(half_bits, converted)
        floats.append(frozen(converted, np.float32))
    x, found = np.ones(32, np.float32), []
    for scales, offsets in (halves, floats):
        w, y = np.empty(32 * bits.size, np.float32), np.empty(bits.size, np.float32)
        simd.dequantize(packed, 4, table, scales, offsets, 32, 0, w)
        simd.matvec(packed, 4, table, scales, offsets, 32, 0, x, y)
        found.append((w.view(np.uint32), y.view(np.uint32)))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@vectors
@pytest.mark.parametrize("misaligned", [0, 1, 4, 15])
def test_vectors_write_past_the_caches_what_the_loops_write(misaligned):
    block_size, count = 64, simd.PAST_CACHES + 96
    rng = np.random.default_rng(misaligned)
    packed, scales = (
        frozen(rng.integers(0, 256, count // 2), np.uint8),
        frozen(rng.random(-(-count // block_size)), np.float32),
    )
    table, memory = kernels.lookup_table(codebooks.code_map("nf4"), 4), np.full(count + 48, 7, np.float32)
    begin = 16 - memory.ctypes.data // 4 % 16 + misaligned  # numbers behind a multiple of 64 bytes
    out, expected = memory[begin : begin + count], np.empty(count, np.float32)
    simd.dequantize(packed, 4, table, scales, NO_OFFSETS, block_size, 0, out)
    kernels.dequantize(packed, 4, table, scales, NO_OFFSETS, block_size, 0, expected)
    assert (
        np.array_equal(out, expected) and (memory[:begin] == 7).all() and (memory[begin + count :] == 7).all()
    )


@vectors
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "rows, width, block_size", [(5, 32, 32), (3, 96, 64), (9, 160, 96), (2, 4096, 64), (4, 64, 4096)]
)
def test_vectors_multiply_in_the_order_that_they_promise(affine, rows, width, block_size):
    packed, table, scales, offsets = vectors_case(affine, (rows + 1) * width, block_size)
    x = np.random.default_rng(1).standard_normal(width).astype(np.float32)
    first = width // block_size  # start at the second row
    w, out = np.empty(rows * width, np.float32), np.full(rows, np.nan, np.float32)
    kernels.dequantize_numpy(packed, 4, table, scales[first:], offsets[first:], block_size, width, w)
    lanes = np.zeros((rows, 32), np.float32)
    for piece in np.split(
        w.reshape(rows, width).astype(np.float64) * x, width // 32, axis=1
    ):  # exact: 48 bits
        lanes = (lanes + piece).astype(np.float32)  # rounded once, but for a tie in 2^29 cases
    sums = ((lanes[:, :8] + lanes[:, 8:16]) + lanes[:, 16:24]) + lanes[:, 24:]
    for half in (4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    simd._matvec(packed, 4, table, scales[first:], offsets[first:], block_size, width, x, out)
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
    packed, table, scales, offsets = vectors_case(affine, (rows + 1) * width, block_size)
    x = np.random.default_rng(2).standard_normal(width).astype(np.float32)
    levels = np.repeat(scales, block_size)[width : (rows + 1) * width].astype(np.float64)
    codes = np.empty((rows + 1) * width, np.uint8)
    kernels.unpack(packed, 4, codes)
    levels *= table[::16, 0][codes[width:]]
    constants = np.repeat(offsets, block_size)[width : (rows + 1) * width] if affine else np.zeros(1)
    expected = (levels + constants).reshape(rows, width) @ x
    bound = (width + 4) * (EPS / 2) * ((np.abs(levels) + np.abs(constants)).reshape(rows, width) @ np.abs(x))
    found = np.full((2, rows), np.nan, np.float32)
    for some, at_once in zip(found, (rows, 1), strict=True):
        for r in range(0, rows, at_once):
            start = (1 + r) * width
            first = start // block_size
            simd.matvec(
                packed, 4, table, scales[first:], offsets[first:], block_size, start, x, some[r : r + at_once]
            )
    assert (np.abs(found[0] - expected) <= bound).all() and np.array_equal(*found)


@vectors
@pytest.mark.parametrize("width", [64, 1024])
def test_vectors_keep_a_row_that_is_not_finite_apart(width):
    packed, table, scales, _ = vectors_case(False, 3 * width, 64)
    x, y, sick = np.ones(width, np.float32), np.empty(3, np.float32), np.empty(3, np.float32)
    simd.matvec(packed, 4, table, scales, NO_OFFSETS, 64, 0, x, y)
    changed = scales.copy()
    changed[width // 64 : 2 * width // 64] = np.nan
    simd.matvec(packed, 4, table, frozen(changed, np.float32), NO_OFFSETS, 64, 0, x, sick)
    assert np.isnan(sick[1]) and np.array_equal(sick[[0, 2]], y[[0, 2]])


@vectors
def test_vectors_keep_nan_and_infinity():
    packed, table, _, _ = vectors_case(False, 64, 32)
    table, scales = frozen(np.abs(table) + 1, np.float32), frozen([np.nan, np.inf], np.float32)
    out, y = np.empty(64, np.float32), np.empty(2, np.float32)
    simd.dequantize(packed, 4, table, scales, NO_OFFSETS, 32, 0, out)
    simd.matvec(packed, 4, table, scales, NO_OFFSETS, 32, 0, np.ones(32, np.float32), y)
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
    monkeypatch.setattr(simd, "available", lambda: False)
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
        "from minilora.kernels import codes_vectors, intrinsics; print(codes_vectors.available(), intrinsics.wide())",
    )
    assert run.stdout == f"{expected}\n", run.stderr


@pytest.mark.skipif(not (simd.available() and wide()), reason="runs above in AVX2 already, if at all")
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
from minilora.quant import blocks, quantize_weight, warm_up
from minilora.kernels import block_vectors as blocks_simd, codes as kernels, codes_vectors as simd
def count(module):
    return {f"{module.__name__}.{n}": len(f.signatures) for n, f in vars(module).items() if isinstance(f, Dispatcher)}
modules = [kernels, simd, blocks, blocks_simd]
warm_up()
warmed = {n: k for module in modules for n, k in count(module).items()}
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
    q = blocks.BlockWeight.quantize(np.eye(24, 64, dtype=np.float32), quant_type)
    q = blocks.BlockWeight(np.array(q.blocks), quant_type, q.shape)
    q.matmul(np.ones((2, 64), np.float32)), q.matmul(x[:1]), q.matmul(x[0]), q.rows(np.array([3])), q.dense()
found = {n: k for module in modules for n, k in count(module).items()}
print(json.dumps([warmed, found]))
"""


def test_each_kernel_compiles_one_signature_or_two_where_scales_differ():
    """A second signature is another part of the user's first minute; a read-only array is another type to
    Numba."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    for _ in range(
        2
    ):  # from the cache: a kernel that is compiled here would bring those with it that it calls
        command = [sys.executable, "-c", COUNT_SIGNATURES]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for found in json.loads(run.stdout):  # after the warm-up, and after all that a weight can do
        public = {name: n for name, n in found.items() if "._" not in name}
        used = {name: n for name, n in public.items() if n}
        blocks = "blocks_simd" if blocks_simd.available() else "blocks"
        expected = ["kernels"] * 8 + ["simd"] * 2 * simd.available() + [blocks] * 2
        assert sorted(name.split(".")[-2] for name in used) == sorted(expected), public
        twice = {name for name, n in used.items() if n > 1}  # for scales in float32 and in float16
        assert twice <= {"minilora.kernels.codes_vectors.dequantize"} and max(used.values()) <= 2, public
