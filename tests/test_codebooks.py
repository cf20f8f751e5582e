"""Codebooks: each is derived again by other means; the frozen tables are their derivations; thresholds are
the known ones."""

import math

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from minilora.quant import codebooks
from minilora.quant.weights import CodebookWeight, DoubleQuant

EPS = np.finfo(np.float32).eps

# csrc/kernels.cu of bitsandbytes, as listed in the comparison tree of dQuantizeNF4 and of the FP4 quantizer
NF4_THRESHOLDS = [
    -0.8480964005,
    -0.6106329262,
    -0.4599952698,
    -0.3396794349,
    -0.2346074060,
    -0.1379117332,
    -0.0455250181,
    0.0397901498,
    0.1202552505,
    0.2035212517,
    0.2920137718,
    0.3893125355,
    0.5016634166,
    0.6427869201,
    0.8614784181,
]
FP4_THRESHOLDS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]


def same_bits(a, b):
    return np.array_equal(
        np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32)
    )


def test_nf4_table_is_its_derivation():
    """In bitsandbytes' precision bit by bit; the formula in double precision is close."""
    assert same_bits(codebooks.normal_float(4, codebooks.LOFTQ_OFFSET, np.float32), codebooks.code_map("nf4"))
    assert np.abs(codebooks.code_map("nf4") - codebooks.normal_float(4)).max() < 3e-7


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_loftq_takes_the_offset_of_4_bits_for_every_width(bits, dtype):
    half, largest = 2 ** (bits - 1), naive.normal_quantile(0.9677083)
    positive = [
        naive.normal_quantile(0.9677083 + (0.5 - 0.9677083) * i / half) / largest for i in range(half)
    ]
    negative = [
        -naive.normal_quantile(0.9677083 + (0.5 - 0.9677083) * i / (half - 1)) / largest
        for i in range(half - 1)
    ]
    found = codebooks.normal_float(bits, codebooks.LOFTQ_OFFSET, dtype)
    # a probability rounded to float32 (by half an eps at most) moves its quantile by that over the density,
    # which is at least .07
    tolerance = 2 * EPS / 0.07 if dtype == np.float32 else 2 * EPS
    np.testing.assert_allclose(found, sorted([*negative, 0.0, *positive]), rtol=0, atol=tolerance)
    same = np.abs(found - codebooks.normal_float(bits)).max() < 1e-6
    assert same == (bits == 4)


@pytest.mark.parametrize("bits", [1, 0, -4, 9])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(ValueError, match=f"bits={bits}: must be from 2 to 8"):
        codebooks.normal_float(bits)


@pytest.mark.parametrize("offset", [0.5, 1.0, 0.1, 1.5, float("nan")])
def test_offset_out_of_range_is_named(offset):
    with pytest.raises(ValueError, match="offset=.*above 1/2 and below 1"):
        codebooks.normal_float(4, offset)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_equals_bisection_on_the_error_function(bits):
    values = codebooks.normal_float(bits)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, naive.normal_float(bits), rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_has_all_values_zero_and_both_ends(bits):
    values = codebooks.normal_float(bits)
    assert len(values) == 2**bits and (np.diff(values) > 0).all()
    assert values[0] == -1 and values[-1] == 1 and values[2 ** (bits - 1) - 1] == 0


def test_offset_is_the_one_of_bitsandbytes_and_formula():
    assert codebooks.normal_float_offset(4) == pytest.approx(0.9677083, abs=5e-8)
    assert codebooks.normal_float_offset(2) == pytest.approx(1 - (1 / 8 + 1 / 6) / 2, rel=1e-15)
    assert [codebooks.normal_float_offset(k) for k in (2, 3, 4)] == pytest.approx(
        [0.854167, 0.933036, 0.967708], abs=5e-7
    )
    assert pytest.approx(codebooks.normal_float_offset(4), abs=5e-8) == codebooks.LOFTQ_OFFSET


def test_quantiles_are_asymmetric_with_one_more_above_zero():
    negative, positive = codebooks.normal_float_quantiles(4)
    assert (len(negative), len(positive)) == (7, 8)
    assert negative[0] == pytest.approx(-positive[-1], rel=1e-12) and negative[-1] < 0 < positive[0]


def test_nf4_is_not_the_midpoint_quantiles_of_the_folklore():
    folklore = np.array([naive.normal_quantile((i + 0.5) / 16) for i in range(16)])
    assert np.abs(codebooks.code_map("nf4") - folklore / folklore.max()).max() > 0.01


def test_fp4_values_by_bit_pattern():
    magnitudes = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    np.testing.assert_allclose(codebooks.code_map("fp4"), magnitudes + [-m for m in magnitudes], rtol=EPS)


def test_fp4_table_is_its_derivation():
    derived = [codebooks.fp4_value(code) for code in range(16)]
    assert derived == list(codebooks.FP4)
    assert same_bits(np.array(derived, np.float32) / np.float32(max(derived)), codebooks.code_map("fp4"))
    assert not np.signbit(codebooks.code_map("fp4")[8])  # bitsandbytes' table holds +0 twice


def test_fp4_value_by_spelling_out_the_bits():
    """(-1)^s · 1.m · 2^(4-e) in binary, 0.m · 2^-3 for e = 0; a bias of 2 shrinks all but the subnormal by 2,
    which doubles."""
    for code in range(16):
        s, e, m = int(f"{code:04b}"[0]), int(f"{code:04b}"[1:3], 2), int(f"{code:04b}"[3])
        value = (-1) ** s * (2 + m if e else m) / 2 * 2.0 ** (4 - e if e else -3)
        assert codebooks.fp4_value(code) == value
        assert codebooks.fp4_value(code, bias=2) == (value / 2 if e else value * 2)
    for code in (-1, 16):
        with pytest.raises(ValueError, match=f"code={code}: must be from 0 to 15"):
            codebooks.fp4_value(code)


def test_nf4_thresholds_are_the_published_midpoints():
    midpoints, order = codebooks.thresholds(codebooks.code_map("nf4"))
    np.testing.assert_allclose(midpoints, NF4_THRESHOLDS, rtol=EPS, atol=1e-10)
    assert order.tolist() == list(range(16))


def test_fp4_thresholds_are_the_published_midpoints_and_the_order_sorts_the_values():
    values = codebooks.code_map("fp4")
    midpoints, order = codebooks.thresholds(values)
    expected = [-t for t in FP4_THRESHOLDS[::-1]] + [0] + FP4_THRESHOLDS
    np.testing.assert_allclose(midpoints, expected, atol=1e-6)
    assert (np.diff(values[order]) >= 0).all() and sorted(order.tolist()) == list(range(16))


def test_dynamic_map_equals_the_formula_and_is_asymmetric():
    values = codebooks.dynamic_map()
    assert len(values) == 256 and (np.diff(values) > 0).all()
    np.testing.assert_allclose(values, naive.dynamic_map(), rtol=2 * EPS, atol=0)
    assert values[-1] == 1 and values[0] == pytest.approx(-0.99296875) and 0 in values


def test_unsigned_dynamic_map_equals_the_formula():
    values = codebooks.dynamic_map(signed=False)
    expected = [0.0, 1.0]
    for i in range(7):
        count = 2 ** (i + 1)
        expected += [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / count) for j in range(count)]
    np.testing.assert_allclose(values, sorted(expected), rtol=2 * EPS, atol=0)
    assert len(values) == 256 and (np.diff(values) > 0).all() and values[0] == 0 and values[-1] == 1
    assert (
        not values.flags.writeable
        and not codebooks.dynamic_map().flags.writeable
        and codebooks.dynamic_map()[0] < 0
    )


@pytest.mark.parametrize("name", ["nf5", "int4", "", "NF4"])
def test_unknown_codebook_names_the_allowed_ones(name):
    with pytest.raises(ValueError, match="nf2, nf3, nf4, nf8, fp4"):
        codebooks.code_map(name)


@pytest.mark.parametrize("name", ["nf2", "nf3", "nf4", "nf8", "fp4"])
def test_shared_tables_are_read_only_float32(name):
    values = codebooks.code_map(name)
    assert values is codebooks.code_map(name) and values.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0


# tests/test_functional.py of bitsandbytes: mean |error| on N(0, 1), 1024×1024
PUBLISHED = {
    "nf4": {32: 0.067746, 64: 0.072798, 128: 0.076831, 256: 0.080337, 4096: 0.092547},
    "fp4": {32: 0.088925, 64: 0.096543, 128: 0.102969, 256: 0.108684, 4096: 0.129536},
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 4096])
def test_mean_error_on_normal_numbers_is_the_published_one(quant_type, block_size, normal_matrices):
    """To three digits. The published means are of random draws, too: of 2^20 errors, so uncertain by about
    1e-3, most at 4096."""
    errors = [
        np.abs(w - CodebookWeight.quantize(w, quant_type, block_size, double_quant=False).dense()).mean(
            dtype=np.float64
        )
        for w in normal_matrices
    ]
    assert np.mean(errors) == pytest.approx(PUBLISHED[quant_type][block_size], rel=1e-3)


@pytest.fixture(scope="module")
def normal_matrices():
    """N(0, 1) without luck in the values: the 2^20 quantiles, in four random orders; only what shares a block
    is random."""
    quantiles = ndtri((np.arange(2**20) + 0.5) / 2**20).astype(np.float32).reshape(1024, 1024)
    return [
        np.random.default_rng(seed).permuted(quantiles.reshape(-1)).reshape(1024, 1024) for seed in range(4)
    ]


# ---- double quantization, by brute force


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.sampled_from([1e-3, 1.0, 1e6]), st.floats(0, 3), st.integers(0, 2**32 - 1))
def test_nested_codes_are_the_nearest_values_of_the_dynamic_map(count, size, spread, seed):
    """Nearest to (absmax - offset)·(1/absmax2): all 256 distances in float64, where they are exact. The lower
    value on a tie with their midpoint, which is a float32 number and so may be half an ulp beside the middle.
    """
    scales = (size * np.exp(spread * np.random.default_rng(seed).standard_normal(count))).astype(np.float32)
    found = DoubleQuant.quantize(scales)
    offset = np.float32(math.fsum(scales.tolist()) / count)
    # NumPy adds pairwise in float64: the mean rounds to a neighbour at most
    assert abs(float(found.offset[0]) - float(offset)) <= float(np.spacing(offset))
    centred = scales - found.offset
    values = codebooks.dynamic_map()
    for i in range(0, count, 256):
        block = centred[i : i + 256]
        absmax = np.abs(block).max()
        assert found.absmax[i // 256] == absmax
        x = np.clip(block * (np.float32(1) / max(absmax, np.float32(1e-38))), -1, 1)
        nearest = np.abs(x[:, None].astype(np.float64) - values).argmin(axis=1)
        nearest -= (nearest > 0) & (x == (values[nearest - 1] + values[nearest]) / np.float32(2))
        assert found.codes[i : i + 256].tolist() == nearest.tolist()
        decoded = values[nearest] * absmax + found.offset
        assert same_bits(found.decode(i, min(i + 256, count)), decoded)


@pytest.fixture(scope="module")
def normal_matrix():
    return np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)


def test_more_bits_of_normal_float_are_closer(normal_matrix):
    errors = [
        np.abs(normal_matrix - CodebookWeight.quantize(normal_matrix, f"nf{k}").dense()).mean()
        for k in (2, 3, 4, 8)
    ]
    assert all(2 * b < a for a, b in zip(errors, errors[1:], strict=False)) and math.isfinite(errors[0])
