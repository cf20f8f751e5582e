"""Fits of affine groups and storage of their offsets: formulae by loops, optimality, exactness, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.config import FITS, OFFSET_STORES, ConfigError, QuantConfig
from minilora.quant import AffineWeight, fits, quantize_weight
from minilora.quant.zero_points import ZeroPointWeight

BITS = (2, 3, 4, 8)


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(q, w):
    return np.abs(q.dense() - w)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("store", OFFSET_STORES)
@pytest.mark.parametrize("fit", FITS)
def test_every_weight_takes_the_nearest_value_of_its_group(bits, store, fit):
    w = matrix(5, 24, seed=bits)
    q = AffineWeight.quantize(w, bits, 8, fit, store)
    values = (
        q.scale.astype(np.float64)[..., None] * np.arange(2**bits) + q.offset.astype(np.float64)[..., None]
    )
    best = np.abs(w.reshape(5, 3, 8, 1) - values[:, :, None]).min(axis=-1).reshape(5, 24)
    # the codes are found in float32: a weight half way between two values may take either, at an ulp of
    # difference
    np.testing.assert_allclose(
        error(q, w), best, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(values).max()
    )


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_has_the_middle_code_at_zero(bits):
    w = matrix(4, 16)
    q = AffineWeight.quantize(w, bits, 8, "symmetric", "zero")
    assert (q.zeros == 2 ** (bits - 1)).all()
    largest = np.abs(w.reshape(4, 2, 8)).max(axis=2)
    np.testing.assert_allclose(q.scale, 2 * largest / (2**bits - 1), rtol=np.finfo(np.float16).eps)
    floats = AffineWeight.quantize(w, bits, 8, "symmetric")
    assert np.array_equal(floats.dense(), q.dense())  # −2^(k−1)·scale is a float16 too


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("store", OFFSET_STORES)
def test_mse_is_the_best_of_the_grid(bits, store):
    w = matrix(3, 16, seed=3) ** 3  # heavy tails, so that shrinking pays
    scale, offset = fits.fit_groups(w, bits, "mse", store)
    q = AffineWeight.quantize(w, bits, 16, "mse", store)
    assert np.array_equal(q.scale[:, 0], scale)
    plain = best = 0.0
    for row in range(3):
        losses = []
        low, high = (
            (min(w[row].min(), 0), max(w[row].max(), 0)) if store == "zero" else (w[row].min(), w[row].max())
        )
        for i in range(80):
            p = np.float32(1 - i / 100)
            s = np.float16(p * (high - low) / np.float32(2**bits - 1))
            o = np.float32(p * low)
            if store == "zero":
                o = -np.float32(s) * min(max(np.rint(-o / np.float32(s)), 0), 2**bits - 1)
            elif store == "float16":
                o = np.float32(np.float16(o))
            values = np.float32(s) * np.arange(2**bits, dtype=np.float32) + o
            losses.append((np.abs(w[row][:, None] - values).min(axis=1).astype(np.float64) ** 2.4).sum())
        found = (error(q, w)[row].astype(np.float64) ** 2.4).sum()
        assert found == pytest.approx(min(losses), rel=1e-5)
        plain, best = plain + losses[0], best + found
    assert best < plain or bits == 8  # better than min/max


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_the_error_that_it_minimises(bits):
    w = matrix(64, 128, seed=5)
    plain, fitted = (error(AffineWeight.quantize(w, bits, 64, fit), w) for fit in ("minmax", "hqq"))
    assert fitted.mean() < plain.mean()
    assert np.array_equal(
        AffineWeight.quantize(w, bits, 64, "hqq").scale, AffineWeight.quantize(w, bits, 64).scale
    )


def test_zero_points_are_exact_and_take_their_bits():
    for bits in BITS:
        q = AffineWeight.quantize(matrix(8, 64, seed=bits), bits, 32, store="zero")
        assert q.zeros.dtype == np.uint8 and q.zeros.max() < 2**bits
        exact = q.scale.astype(np.float64).repeat(32, axis=1) * (
            q.unpacked().astype(np.float64) - q.zeros.repeat(32, axis=1)
        )
        assert np.array_equal(q.dense(), exact)  # 11 bits of scale times 9 bits fit float32
        assert q.bits_per_weight == bits + 16 / 32 + bits / 32
        x = matrix(3, 64, seed=9)
        bound = (
            65 * np.finfo(np.float32).eps * (np.abs(x).astype(np.float64) @ np.abs(exact).T)
        )  # a sum of 64 products
        for rows in (x, x[:1]):
            assert (np.abs(q.matmul(rows) - rows.astype(np.float64) @ exact.T) <= bound[: len(rows)]).all()
        assert np.array_equal(q.rows(np.array([3, 5])), q.dense()[[3, 5]])


def test_the_three_stores_of_a_merged_weight():
    q = AffineWeight.quantize(matrix(16, 64), 4, 32)
    merged = q.with_offset(q.offset + 0.3 * matrix(16, 2, seed=1))
    sizes, errors = {}, {}
    for store in OFFSET_STORES:
        again, worst = merged.stored(store)
        assert again.codes is merged.codes and again.scale is merged.scale
        assert (
            worst
            == np.abs(again.offset - merged.offset).max()
            == pytest.approx(error(again, merged.dense()).max(), rel=1e-5)
        )
        sizes[store], errors[store] = again.bits_per_weight, worst
    assert sizes == {"float32": 5.5, "float16": 5.0, "zero": 4.625}
    assert errors["float32"] == 0 < errors["float16"] <= np.abs(merged.offset).max() * 2**-11 < errors["zero"]
    inside = (-merged.offset >= 0) & (-merged.offset <= 15 * merged.scale)
    zero = merged.stored("zero")[0]
    assert (
        np.abs(zero.offset - merged.offset)[inside] <= merged.scale[inside] / 2
    ).all()  # else half a step, or clipped


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(BITS), st.sampled_from(FITS), st.sampled_from(OFFSET_STORES)
)
@settings(max_examples=60, deadline=None)
def test_any_finite_group_is_fitted(seed, bits, fit, store):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((2, 8)) * 10.0 ** rng.integers(-9, 4)).astype(np.float32)
    w[rng.random(w.shape) < 0.3] = 0
    q = AffineWeight.quantize(w, bits, 8, fit, store)
    assert np.isfinite(q.dense()).all() and np.isfinite(q.scale).all() and (q.scale > 0).all()
    if fit == "minmax" and store == "float32":
        low, high = w.min(), w.max()
        # half a step, the scale's rounding over the range, and float16's smallest step for tiny groups
        assert error(q, w).max() <= (high - low) * (0.5 / (2**bits - 1) + 2**-10) + 2**bits * 2.0**-24


def test_what_cannot_be_is_refused():
    w = matrix(2, 8)
    with pytest.raises(ConfigError, match="fit='best': choose one of minmax, symmetric, mse, hqq"):
        AffineWeight.quantize(w, 4, 8, "best")
    with pytest.raises(ConfigError, match="offset_dtype='int'"):
        AffineWeight.quantize(w, 4, 8, store="int")
    q = AffineWeight.quantize(w, 4, 8, store="zero")
    for bad in (np.full((2, 1), 16), np.full((2, 1), -1), np.full((2, 1), 1.5)):
        with pytest.raises(ValueError, match="whole numbers from 0 to 15"):
            ZeroPointWeight(q.codes, q.scale, bad, q.shape, 4, 8)
    with pytest.raises(ConfigError, match=r"zeros.shape=\(1, 2\)"):
        ZeroPointWeight(q.codes, q.scale, np.zeros((1, 2), int), q.shape, 4, 8)
    for bad in (
        {"quantizer": "awq"},
        {"fit": "mse"},
        {"offset_dtype": "zero"},
        {"quantizer": "hqq"},
        {"damp_percent": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            QuantConfig("nf4", **bad)
    with pytest.raises(ConfigError, match="static_groups=True: quantizer='rtn' has no such option"):
        QuantConfig("int4", static_groups=True)
    with pytest.raises(ConfigError, match="desc_act=True: needs static_groups=True.*neighbouring"):
        QuantConfig("int4", quantizer="gptq", desc_act=True)
    with pytest.raises(ConfigError, match="calibration"):
        quantize_weight(w, QuantConfig("int4", group_size=8, quantizer="gptq"))
