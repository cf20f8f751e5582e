"""Codebooks: the tables against their derivation, the derivation against an independent one, thresholds against known ones."""

import math

import naive
import numpy as np
import pytest

from minilora.quant import codebooks
from minilora.quant.weights import CodebookWeight

EPS = np.finfo(np.float32).eps

# csrc/kernels.cu of bitsandbytes, as listed in the comparison tree of dQuantizeNF4 and of the FP4 quantizer
NF4_THRESHOLDS = [
    -0.8480964005, -0.6106329262, -0.4599952698, -0.3396794349, -0.2346074060, -0.1379117332, -0.0455250181, 0.0397901498,
    0.1202552505, 0.2035212517, 0.2920137718, 0.3893125355, 0.5016634166, 0.6427869201, 0.8614784181,
]  # fmt: skip
FP4_THRESHOLDS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]


def test_nf4_table_is_its_derivation():
    assert np.abs(codebooks.code_map("nf4") - codebooks.normal_float(4)).max() < 3e-7


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
def test_mean_error_on_normal_numbers_is_the_published_one(quant_type, block_size, normal_matrix):
    q = CodebookWeight.quantize(normal_matrix, quant_type, block_size, double_quant=False)
    error = np.abs(normal_matrix - q.dense()).mean(dtype=np.float64)
    # The mean of 2^20 errors has a relative standard deviation of about 1e-3, more for the 256 blocks of 4096 (absmax varies).
    assert error == pytest.approx(PUBLISHED[quant_type][block_size], rel=3e-3 if block_size < 4096 else 1e-2)


@pytest.fixture(scope="module")
def normal_matrix():
    return np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)


def test_more_bits_of_normal_float_are_closer(normal_matrix):
    errors = [np.abs(normal_matrix - CodebookWeight.quantize(normal_matrix, f"nf{k}").dense()).mean() for k in (2, 3, 4, 8)]
    assert all(2 * b < a for a, b in zip(errors, errors[1:], strict=False)) and math.isfinite(errors[0])
