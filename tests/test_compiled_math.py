"""Compiled functions against `functional` in float64, and products against plain loops."""

import os
import subprocess
import sys

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import functional, kernels
from minilora.config import QuantConfig
from minilora.kernels import LowRank, jit, lowrank, microkernel, rows
from minilora.quant import quantize_weight

EPS = float(np.finfo(np.float32).eps)
pytestmark = pytest.mark.skipif(
    not microkernel.AVAILABLE, reason="this processor has no vectors: functional itself is used"
)


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def double(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x


def within(found, expected, bound):
    """|found − expected| ≤ bound element by element; a NaN anywhere fails."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert (np.abs(found - expected) <= bound).all(), np.abs(found - expected).max()


# ---- products


def sum_bound(a, b, n):
    """Error of sums of n products in any order, each rounded once or twice: (n + 2) eps/2 Σ |a||b| (Higham,
    §3.1)."""
    return (n + 2) * EPS * (np.abs(double(a)) @ np.abs(double(b))) + 1e-30


@settings(max_examples=60, deadline=None)
@given(
    st.integers(9, 150),
    st.integers(1, 140),
    st.integers(1, 140),
    st.integers(0, 17),
    st.integers(0, 2**32 - 1),
)
def test_products_with_a_low_rank_path_are_what_float64_gives(m, k, n, r, seed):
    rng = np.random.default_rng(seed)
    x, w, dy = normal(rng, m, k), normal(rng, n, k), normal(rng, m, n)
    h, b, a = normal(rng, m, r), normal(rng, n, r), normal(rng, r, k)
    low_rank, low_rank_t = (LowRank(h, b, 0.7), LowRank(h, a, 0.7)) if r else (None, None)
    b, a = np.float32(0.7) * b, np.float32(0.7) * a
    left, right = np.concatenate([x, h], 1), np.concatenate([w, b], 1)
    within(
        kernels.linear_forward(x, w, low_rank),
        double(left) @ double(right).T,
        sum_bound(left, right.T, k + r),
    )
    left, right = np.concatenate([dy, h], 1), np.concatenate([w, a], 0)
    within(kernels.linear_dx(dy, w, low_rank_t), double(left) @ double(right), sum_bound(left, right, n + r))
    within(kernels.linear_dw(dy, x), double(dy).T @ double(x), sum_bound(dy.T, x, m))
    onto = w.copy()
    assert kernels.linear_dw(dy, x, onto) is onto
    within(onto, double(w) + double(dy).T @ double(x), sum_bound(dy.T, x, m) + EPS * np.abs(w))


@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [
        (9, 5, 3, 1),
        (100, 128, 64, 8),
        (97, 259, 40, 6),
        (200, 30, 150, 16),
        (250, 64, 70, 33),
        (130, 80, 90, 70),
        (50, 36, 33, 4),
        (61, 32, 70, 3),
        (57, 34, 31, 5),
        (17, 2, 64, 2),
    ],
)
def test_gradients_of_an_adapter_are_what_float64_gives(m, n, k, r):
    rng = np.random.default_rng(m)
    dy, h, p, b = normal(rng, m, n), normal(rng, m, r), normal(rng, m, k), normal(rng, n, r)
    s, before, db, da = 0.7, normal(rng, n, r), normal(rng, n, r), np.zeros((r, k), np.float32)
    db[...] = before
    dh = lowrank.adapter_backward(dy.reshape(1, m, n), h.reshape(1, m, r), p.reshape(1, m, k), b, s, db, da)
    within(dh[0], double(dy) @ double(b), sum_bound(dy, b, n))
    within(db, before + s * double(dy).T @ double(h), sum_bound(dy.T, h, m + 1) + EPS * np.abs(before))
    within(da, s * double(dh[0]).T @ double(p), sum_bound(dh[0].T, p, m + 1))


@pytest.mark.parametrize("frozen", ["a", "b", "both"])
def test_a_frozen_factor_gets_no_gradient(frozen):
    rng = np.random.default_rng(0)
    dy, h, p, b = normal(rng, 70, 40), normal(rng, 70, 6), normal(rng, 70, 90), normal(rng, 40, 6)
    db, da = np.zeros((40, 6), np.float32), np.zeros((6, 90), np.float32)
    dh = lowrank.adapter_backward(dy, h, p, b, 0.7, db, da)
    some_db = None if frozen in ("b", "both") else np.zeros_like(db)
    some_da = None if frozen in ("a", "both") else np.zeros_like(da)
    assert np.array_equal(lowrank.adapter_backward(dy, h, p, b, 0.7, some_db, some_da), dh)
    assert some_db is None or np.array_equal(some_db, db)
    assert some_da is None or np.array_equal(some_da, da)


@pytest.mark.parametrize("k", [2, 3, 4, 6, 16, 18, 21, 132])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9])
def test_few_columns(n, k):
    """Two steps of a sum share a vector if there are few columns and k is even."""
    rng = np.random.default_rng(k)
    for m in (9, 16, 43):
        x, w = normal(rng, m, k), normal(rng, n, k)
        within(kernels.linear_forward(x, w), double(x) @ double(w).T, sum_bound(x, w.T, k))
        within(kernels.linear_dx(x, w.T.copy()), double(x) @ double(w).T, sum_bound(x, w.T, k))


@pytest.mark.parametrize("k", [640, 641, 1300, 2000])
def test_sums_longer_than_a_panel(k):
    rng = np.random.default_rng(k)
    x, w = normal(rng, 20, k), normal(rng, 70, k)
    within(kernels.linear_forward(x, w), double(x) @ double(w).T, sum_bound(x, w.T, k))
    within(kernels.linear_dx(x, w.T.copy()), double(x) @ double(w).T, sum_bound(x, w.T, k))
    within(kernels.linear_dw(w.T.copy(), x.T.copy()), double(w) @ double(x).T, sum_bound(w, x.T, k))


def test_products_agree_with_loops():
    rng = np.random.default_rng(0)
    x, w = normal(rng, 9, 5), normal(rng, 3, 5)
    expected = np.array(naive.matmul(x.tolist(), w.T.tolist()))
    within(kernels.linear_forward(x, w), expected, sum_bound(x, w.T, 5))


def test_a_row_has_the_same_bits_however_many_stand_beside_it():
    """What shards of any size, and tiles of a quantized weight, rely on."""
    rng = np.random.default_rng(1)
    x, w, h, b = normal(rng, 61, 700), normal(rng, 83, 700), normal(rng, 61, 3), normal(rng, 83, 3)
    whole = kernels.linear_forward(x, w, LowRank(h, b, 2.0))
    for first, last in [(0, 9), (9, 22), (30, 61)]:
        assert np.array_equal(
            kernels.linear_forward(x[first:last].copy(), w, LowRank(h[first:last].copy(), b, 2.0)),
            whole[first:last],
        )
    out = np.zeros((61, 83), np.float32)
    for first, last in [(0, 8), (8, 72), (72, 83)]:
        kernels.linear_forward(x, w[first:last], LowRank(h, b[first:last], 2.0), out=out, column=first)
    assert np.array_equal(out, whole)


def test_products_are_added_and_take_columns():
    rng = np.random.default_rng(2)
    dy, w, out = normal(rng, 30, 50), normal(rng, 20, 40), normal(rng, 30, 40)
    before = out.copy()
    assert kernels.linear_dx(dy, w, onto=out, column=7) is out
    within(out, before + double(dy[:, 7:27]) @ double(w), sum_bound(dy[:, 7:27], w, 21) + EPS * np.abs(out))


def test_arguments_keep_their_values_and_may_be_read_only():
    rng = np.random.default_rng(3)
    x, w = normal(rng, 16, 32), normal(rng, 24, 32)
    x.flags.writeable = w.flags.writeable = False
    copies = x.copy(), w.copy()
    y = kernels.linear_forward(x, w)
    assert np.array_equal(x, copies[0]) and np.array_equal(w, copies[1])
    y += 1
    assert kernels.read_only_flat(y).flags.writeable is False and y.flags.writeable


def test_what_is_not_float32_or_not_contiguous_is_left_to_numpy():
    rng = np.random.default_rng(4)
    x, w = rng.standard_normal((20, 30)), rng.standard_normal((40, 30))
    assert (
        np.array_equal(kernels.linear_forward(x, w), x @ w.T)
        and kernels.linear_forward(x, w).dtype == np.float64
    )
    wide = normal(rng, 20, 60)
    assert np.array_equal(
        kernels.linear_forward(wide[:, ::2], double(w).astype(np.float32)),
        wide[:, ::2] @ w.astype(np.float32).T,
    )


@pytest.mark.parametrize("quant_type", ["nf4", "int4", "int3"])
def test_quantized_products_take_the_low_rank_path_in(quant_type):
    rng = np.random.default_rng(5)
    weight = quantize_weight(normal(rng, 80, 64), QuantConfig(quant_type, group_size=32))
    w = weight.dense()
    for shape in [(3, 7), (1,), (2, 40)]:
        x, h, b = normal(rng, *shape, 64), normal(rng, *shape, 5), normal(rng, 80, 5)
        y, left, right = (
            weight.matmul(x, LowRank(h, b, 1.0)),
            np.concatenate([x, h], -1),
            np.concatenate([w, b], -1),
        )
        within(y, double(left) @ double(right).T, sum_bound(left, right.T, 2 * 69))
        dy, a = normal(rng, *shape, 80), normal(rng, 5, 64)
        left, right = np.concatenate([dy, h], -1), np.concatenate([w, a], 0)
        within(
            weight.matmul_t(dy, LowRank(h, a, 1.0)),
            double(left) @ double(right),
            sum_bound(left, right, 2 * 85),
        )


def test_nan_and_infinity_survive():
    x, w = np.ones((12, 20), np.float32), np.ones((30, 20), np.float32)
    x[3, 4], x[5, 6] = np.nan, np.inf
    y = kernels.linear_forward(x, w)
    assert np.isnan(y[3]).all() and np.isinf(y[5]).all() and (y[:3] == 20).all()
    gate = np.array([[np.nan, np.inf, -np.inf, 200, -200] * 8], np.float32)
    with np.errstate(invalid="ignore"):
        expected = functional.swiglu_forward(double(gate), np.ones((1, 40)))[0]
    found = kernels.swiglu_forward(gate, np.ones((1, 40), np.float32))[0]
    assert np.isnan(found[0, 0]) and found[0, 1] == np.inf and found[0, 3] == 200 and abs(found[0, 4]) < 1e-30
    assert np.isnan(expected[0, 0])


def test_a_process_that_compiles_and_one_that_loads_give_the_same_bytes(tmp_path):
    code = """
import hashlib, numpy as np
from minilora import kernels
q, k, v, dy = np.random.default_rng(0).standard_normal((4, 2, 128, 4, 32), np.float32)
y, cache = kernels.attention_forward(q, k, v)
arrays = y, *kernels.attention_backward(dy, cache)
print([hashlib.sha256(a.tobytes()).hexdigest() for a in arrays])
"""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout


def test_a_kernel_is_compiled_once_whatever_literals_callers_pass():
    @jit.kernel
    def scaled(x, k, twice):
        return x * k * (2 if twice else 1)

    @jit.kernel
    def caller(x):
        return scaled(x, 1, True) + scaled(x, 2, False) + scaled(x, x, True)

    assert caller(3) == 6 + 6 + 18
    assert len(scaled.signatures) == 1


# ---- functions of rows


def test_exp_errs_by_two_units_in_the_last_place():
    @rows.kernel
    def exponentials(x, y):
        for i in range(x.size):
            y[i] = rows.exp(x[i])

    x = np.concatenate([np.linspace(-87.3, 88.3, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    exact = np.exp(double(x))
    assert (np.abs(y - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    special = np.array([-np.inf, -1000, -89, 0, 89, 1000, np.inf, np.nan], np.float32)
    y = np.empty_like(special)
    exponentials(special, y)
    assert y[:4].tolist() == [0, 0, 0, 1] and np.isinf(y[4:7]).all() and np.isnan(y[7])


def test_largest_is_numpys_maximum():
    @rows.kernel
    def maximum(x, out):
        out[0] = rows.largest(x)

    rng, out = np.random.default_rng(6), np.empty(1, np.float32)
    for x in (
        normal(rng, 77),
        -np.abs(normal(rng, 13)),
        np.array([-np.inf, -5], np.float32),
        np.array([3, np.inf], np.float32),
    ):
        maximum(x, out)
        assert out[0] == x.max()
    maximum(np.array([1, np.nan, 2], np.float32), out)
    assert np.isnan(out[0])


ROW_CASES = {
    "norm": lambda r, B, T: (
        kernels.rms_norm_forward,
        functional.rms_norm_forward,
        (normal(r, B, T, 48), normal(r, 48), 1e-5),
    ),
    "swiglu": lambda r, B, T: (
        kernels.swiglu_forward,
        functional.swiglu_forward,
        (3 * normal(r, B, T, 37), normal(r, B, T, 37)),
    ),
    "rope": lambda r, B, T: (
        kernels.rope_forward,
        functional.rope_forward,
        (normal(r, B, T, 3, 10), *functional.rope_tables(np.arange(T), 10, 1e4, np.float32)),
    ),
    "rope of packed rows": lambda r, B, T: (
        kernels.rope_forward,
        functional.rope_forward,
        (normal(r, B, T, 2, 8), *functional.rope_tables(r.integers(0, 9, (B, T)), 8, 1e4, np.float32)),
    ),
    "pool": lambda r, B, T: (kernels.group_sum, functional.group_sum, (normal(r, B, T, 96), 32)),
}


@pytest.mark.parametrize("case", ROW_CASES)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 5), (3, 33)])
def test_functions_of_rows_are_what_float64_gives(case, B, T):
    compiled, numpy, arguments = ROW_CASES[case](np.random.default_rng(B * T), B, T)
    found, expected = compiled(*arguments), numpy(*map(double, arguments))
    y, expected_y = (f[0] if isinstance(f, tuple) else f for f in (found, expected))
    # a handful of roundings of numbers no larger than the sums of magnitudes in a row
    within(y, expected_y, 16 * EPS * np.abs(expected_y).max(initial=1))
    if case in ("norm", "swiglu"):
        dy = normal(np.random.default_rng(7), *y.shape)
        backward = {
            "norm": (kernels.rms_norm_backward, functional.rms_norm_backward),
            "swiglu": (kernels.swiglu_backward, functional.swiglu_backward),
        }[case]
        if case == "norm":
            weights = arguments[1], double(arguments[1])
            both = [
                b(d, w, c[1])
                for b, d, w, c in zip(backward, (dy, double(dy)), weights, (found, expected), strict=True)
            ]
            assert kernels.rms_norm_backward(dy, arguments[1], found[1], need_dweight=False)[1] is None
        else:
            both = [b(d, c[1]) for b, d, c in zip(backward, (dy, double(dy)), (found, expected), strict=True)]
        for a, b in zip(*both, strict=True):
            within(a, b, (32 + B * T) * EPS * np.abs(b).max())


@pytest.mark.parametrize("need_dweight", [True, False])
def test_in_place_gives_the_same_bytes_where_the_argument_lay(need_dweight):
    rng = np.random.default_rng(11)
    x, dy, weight, gate = (
        normal(rng, 2, 5, 3, 8),
        normal(rng, 2, 5, 24),
        normal(rng, 24),
        normal(rng, 2, 5, 24),
    )
    tables = functional.rope_tables(np.arange(5), 8, 1e4, np.float32)
    norm, act = kernels.rms_norm_forward(gate, weight, 1e-5)[1], kernels.swiglu_forward(gate, 2 * gate)[1]
    for function, argument, others, place in (
        (kernels.rope_forward, x, tables, None),
        (kernels.rope_backward, x, tables, None),
        (kernels.swiglu_backward, dy, (act,), 1),
        (kernels.rms_norm_backward, dy, (weight, norm, need_dweight), 0),
    ):
        before, own = argument.copy(), argument.copy()
        apart, there = function(argument, *others), function(own, *others, in_place=True)
        assert np.array_equal(argument, before)
        assert (there if place is None else there[place]) is own
        for a, b in zip(
            (apart,) if place is None else apart, (there,) if place is None else there, strict=True
        ):
            assert (a is None and b is None) or a.tobytes() == b.tobytes()


def test_rope_backward_turns_back():
    rng = np.random.default_rng(8)
    x, tables = normal(rng, 2, 7, 3, 16), functional.rope_tables(np.arange(7), 16, 1e4, np.float32)
    within(
        kernels.rope_backward(kernels.rope_forward(x, *tables), *tables), double(x), 8 * EPS * np.abs(x).max()
    )


# ---- attention


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"),
    [
        (1, 1, 1, 1, 2),
        (2, 5, 2, 1, 16),
        (1, 64, 3, 3, 32),
        (2, 77, 6, 2, 48),
        (1, 130, 4, 1, 64),
        (1, 70, 2, 2, 96),
        (3, 129, 2, 1, 6),
    ],
)
def test_attention_is_what_float64_gives(B, T, H, K, D, segmented):
    rng = np.random.default_rng(T)
    q, dy, k, v = (
        normal(rng, B, T, H, D),
        normal(rng, B, T, H, D),
        normal(rng, B, T, K, D),
        normal(rng, B, T, K, D),
    )
    segments = np.sort(rng.integers(0, 3, (B, T)), axis=1) if segmented else None
    y, cache = kernels.attention_forward(q, k, v, segments)
    expected, expected_cache = functional.attention_forward(double(q), double(k), double(v), segments)
    # a score errs by D roundings of a sum of order √D · max; its exponential, and what it multiplies, by as
    # much again
    bound = 8 * EPS * (D**0.5 + T**0.5 + 8)
    within(y, expected, bound * np.abs(v).max())
    again, cache_again = kernels.attention_from_scaled(*cache[:3], segments)
    assert np.array_equal(again, y) and all(map(np.array_equal, cache[3][:2], cache_again[3][:2]))
    gradients = (
        kernels.attention_backward(dy, cache),
        functional.attention_backward(double(dy), expected_cache),
    )
    for found, exact in zip(*gradients, strict=True):
        within(found, exact, 4 * bound * max(1, np.abs(exact).max()))


def test_attention_keeps_two_numbers_a_query_and_head():
    q = np.ones((2, 200, 4, 8), np.float32)
    cache = kernels.attention_forward(q, q[:, :, :2].copy(), q[:, :, :2].copy())[1]
    assert cache[3][0].shape == cache[3][1].shape == (2, 4, 200)
    assert sum(a.nbytes for a in (*cache[:3], *cache[3][:2])) < 2 * 200 * 4 * 200


def test_large_scores_do_not_overflow():
    q = np.full((1, 70, 1, 4), 200, np.float32)
    v = normal(np.random.default_rng(0), 1, 70, 1, 4)
    y, cache = kernels.attention_forward(q, q.copy(), v)
    assert np.isfinite(y).all() and all(
        np.isfinite(g).all() for g in kernels.attention_backward(np.ones_like(q), cache)
    )


# ---- other processors


@pytest.mark.parametrize("features", ["+avx2,+fma", "+sse2"])
def test_a_processor_with_less_gives_the_same_up_to_rounding(features, tmp_path):
    code = """
import sys, numpy as np
from minilora import kernels
from minilora.kernels import LowRank, microkernel
rng = np.random.default_rng(0)
x, w, h, b = (rng.standard_normal(s, np.float32) for s in ((50, 70), (90, 70), (50, 3), (90, 3)))
q = rng.standard_normal((1, 40, 2, 16), np.float32)
y, cache = kernels.attention_forward(q, q, q)
products = kernels.linear_forward(x, w, LowRank(h, b, 1.0)), kernels.linear_dw(h, x)
silu = kernels.swiglu_forward(x, x)[0]
np.savez(sys.argv[1], *products, y, *kernels.attention_backward(q, cache), silu)
print(microkernel.AVAILABLE, microkernel.LANES)
"""
    found = []
    for name, environment in {
        "less": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features},
        "all": {},
    }.items():
        env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)} | environment
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found[0] == (["True", "8"] if "avx2" in features else ["False", "4"])
    with np.load(tmp_path / "less.npz") as less, np.load(tmp_path / "all.npz") as everything:
        for name in everything:
            np.testing.assert_allclose(
                less[name], everything[name], rtol=0, atol=200 * EPS * np.abs(everything[name]).max()
            )
