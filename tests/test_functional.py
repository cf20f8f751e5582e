"""The mathematics against loops in double precision, its derivatives against finite differences, and its
properties."""

import naive
import numpy as np
import pytest
from helpers import assert_close, close_rtol
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import functional as F
from minilora.training.gradcheck import gradcheck

DTYPES = [np.float32, np.float64]
rng0 = np.random.default_rng(0)


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- forward against loops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_rms_norm_equals_loop(dtype, eps):
    x, weight = normal(2, 3, 9, dtype=dtype), normal(9, dtype=dtype, seed=1)
    y, _ = F.rms_norm_forward(x, weight, eps)
    expected = [[naive.rms_norm(row, weight.astype(float), eps) for row in rows.astype(float)] for rows in x]
    assert y.dtype == dtype
    assert_close(y, expected, close_rtol(dtype, 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, theta", [(2, 10000.0), (6, 10000.0), (8, 500.0)])
def test_rope_equals_complex_rotation(dtype, head_dim, theta):
    x, positions = normal(2, 5, 3, head_dim, dtype=dtype), np.array([0, 1, 2, 7, 100])
    y = F.rope_forward(x, *F.rope_tables(positions, head_dim, theta, np.dtype(dtype)))
    expected = [
        [[naive.rope(x[b, t, h].astype(float), positions[t], theta) for h in range(3)] for t in range(5)]
        for b in range(2)
    ]
    assert y.dtype == dtype
    assert_close(y, expected, close_rtol(dtype, 2))


def test_rope_tables_take_positions_for_each_sequence():
    x, positions = normal(2, 1, 3, 4), np.array([[3], [11]])
    y = F.rope_forward(x, *F.rope_tables(positions, 4, 100.0, np.dtype(np.float64)))
    for b in range(2):
        one = F.rope_forward(x[b : b + 1], *F.rope_tables(positions[b], 4, 100.0, np.dtype(np.float64)))
        assert np.array_equal(y[b : b + 1], one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv", [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 5])
def test_attention_equals_loop(dtype, heads, kv, T):
    q, k, v = (
        normal(2, T, heads, 3, dtype=dtype),
        normal(2, T, kv, 3, dtype=dtype, seed=1),
        normal(2, T, kv, 3, dtype=dtype, seed=2),
    )
    y, _ = F.attention_forward(q, k, v)
    assert y.dtype == dtype
    assert_close(
        y, naive.attention(q.astype(float), k.astype(float), v.astype(float)), close_rtol(dtype, 3, T)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_gelu_equal_loops(dtype):
    gate, up = 4 * normal(3, 40, dtype=dtype), normal(3, 40, dtype=dtype, seed=1)
    y, _ = F.swiglu_forward(gate, up)
    assert y.dtype == dtype
    assert_close(
        y,
        [
            [naive.silu(float(g)) * float(u) for g, u in zip(gs, us, strict=True)]
            for gs, us in zip(gate, up, strict=True)
        ],
        close_rtol(dtype, 1),
    )
    y, _ = F.gelu_forward(gate)
    assert y.dtype == dtype
    assert_close(y, [[naive.gelu_tanh(float(g)) for g in row] for row in gate], close_rtol(dtype, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_equals_loop(dtype):
    logits, targets = 3 * normal(7, 11, dtype=dtype), np.arange(7) % 11
    loss, _ = F.cross_entropy_forward(logits, targets, 5.0)
    assert isinstance(loss, float)
    assert abs(loss - naive.cross_entropy(logits.astype(float), targets) / 5) <= close_rtol(dtype, 11) * abs(
        loss
    )


@pytest.mark.parametrize("g", [1, 2, 3, 6])
def test_group_sum_equals_loop(g):
    x = normal(2, 3, 6)
    assert_close(
        F.group_sum(x, g),
        [[naive.group_sum(row, g) for row in rows] for rows in x],
        close_rtol(np.float64, g),
    )


# --- derivatives --------------------------------------------------------------------------------------------


def check(forward, arrays, gradients):
    """gradcheck of Σ forward()·dy."""
    gradcheck(forward, arrays, gradients, rtol=1e-6)


def test_rms_norm_gradient():
    x, weight, dy = normal(3, 2, 7), normal(7, seed=1), normal(3, 2, 7, seed=2)
    dx, dweight = F.rms_norm_backward(dy, weight, F.rms_norm_forward(x, weight, 1e-2)[1])
    check(
        lambda: float((F.rms_norm_forward(x, weight, 1e-2)[0] * dy).sum()),
        {"x": x, "weight": weight},
        {"x": dx, "weight": dweight},
    )


def test_rms_norm_backward_skips_a_frozen_weight():
    x, weight, dy = normal(3, 7), normal(7, seed=1), normal(3, 7, seed=2)
    cache = F.rms_norm_forward(x, weight, 1e-5)[1]
    dx, dweight = F.rms_norm_backward(dy, weight, cache, need_dweight=False)
    assert dweight is None and np.array_equal(dx, F.rms_norm_backward(dy, weight, cache)[0])


def test_rope_gradient_is_the_rotation_back():
    x, dy = normal(2, 5, 3, 6), normal(2, 5, 3, 6, seed=1)
    tables = F.rope_tables(np.arange(5), 6, 100.0, np.dtype(np.float64))
    check(
        lambda: float((F.rope_forward(x, *tables) * dy).sum()), {"x": x}, {"x": F.rope_backward(dy, *tables)}
    )
    assert_close(F.rope_backward(F.rope_forward(x, *tables), *tables), x, close_rtol(np.float64, 2))


@pytest.mark.parametrize("heads, kv", [(2, 2), (4, 2), (3, 1)])
def test_attention_gradient(heads, kv):
    q, k, v, dy = (
        normal(2, 4, heads, 3),
        normal(2, 4, kv, 3, seed=1),
        normal(2, 4, kv, 3, seed=2),
        normal(2, 4, heads, 3, seed=3),
    )
    gradients = F.attention_backward(dy, F.attention_forward(q, k, v)[1])
    check(
        lambda: float((F.attention_forward(q, k, v)[0] * dy).sum()),
        {"q": q, "k": k, "v": v},
        dict(zip("qkv", gradients, strict=True)),
    )


def test_swiglu_and_gelu_gradients():
    gate, up, dy = 2 * normal(4, 9), normal(4, 9, seed=1), normal(4, 9, seed=2)
    dgate, dup = F.swiglu_backward(dy, F.swiglu_forward(gate, up)[1])
    check(
        lambda: float((F.swiglu_forward(gate, up)[0] * dy).sum()),
        {"gate": gate, "up": up},
        {"gate": dgate, "up": dup},
    )
    check(
        lambda: float((F.gelu_forward(gate)[0] * dy).sum()),
        {"x": gate},
        {"x": F.gelu_backward(dy, F.gelu_forward(gate)[1])},
    )


def test_cross_entropy_gradient():
    logits, targets = normal(5, 9), np.array([0, 8, 3, 3, 1])
    dlogits = F.cross_entropy_backward(F.cross_entropy_forward(logits, targets, 3.0)[1])
    check(lambda: F.cross_entropy_forward(logits, targets, 3.0)[0], {"logits": logits}, {"logits": dlogits})
    assert np.abs(dlogits.sum(-1)).max() <= close_rtol(
        np.float64, 9
    )  # probabilities sum to one whatever the logits


@pytest.mark.parametrize("g", [1, 2, 3])
def test_group_repeat_is_the_transpose_of_group_sum(g):
    x, dy = normal(4, 6), normal(4, 6 // g, seed=1)
    assert (
        abs(float((F.group_sum(x, g) * dy).sum()) - float((x * F.group_repeat(dy, g)).sum()))
        < close_rtol(np.float64, 24) * 24
    )
    assert F.group_repeat(dy, g).shape == x.shape


# --- properties ---------------------------------------------------------------------------------------------

FUNCTIONS = {
    "rms_norm": lambda x: F.rms_norm_backward(x, x[0, 0, 0], F.rms_norm_forward(x, x[0, 0, 0], 1e-5)[1]),
    "rope": lambda x: (
        F.rope_backward(
            F.rope_forward(x, *(tables := F.rope_tables(np.arange(4), 6, 100.0, x.dtype))), *tables
        ),
    ),
    "softmax": lambda x: (F.softmax(x),),
    "attention": lambda x: F.attention_backward(x, F.attention_forward(x, x, x)[1]),
    "swiglu": lambda x: F.swiglu_backward(x, F.swiglu_forward(x, x)[1]),
    "gelu": lambda x: (F.gelu_backward(x, F.gelu_forward(x)[1]),),
    "cross_entropy": lambda x: (
        F.cross_entropy_backward(F.cross_entropy_forward(x[0, 0], np.arange(4), 3)[1]),
    ),
    "group": lambda x: (F.group_repeat(F.group_sum(x, 3), 3),),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtype_is_kept_and_inputs_stay_untouched(name, dtype):
    x = normal(2, 4, 4, 6, dtype=dtype)
    x.flags.writeable = False  # a function that writes into its input raises
    for result in FUNCTIONS[name](x):
        assert result.dtype == dtype, f"{name} turned {np.dtype(dtype)} into {result.dtype}"
        assert np.isfinite(result).all()


def test_backwards_leave_the_cache_untouched():
    """A cache may be read twice: checkpointing and gradient checks do."""
    x, dy = normal(2, 4, 3, 6), normal(2, 4, 3, 6, seed=1)
    for forward, backward in (
        (lambda: F.rms_norm_forward(x, x[0, 0, 0], 1e-5), lambda c: F.rms_norm_backward(dy, x[0, 0, 0], c)),
        (lambda: F.attention_forward(x, x, x), lambda c: F.attention_backward(dy, c)),
        (lambda: F.swiglu_forward(x, x), lambda c: F.swiglu_backward(dy, c)),
        (lambda: F.gelu_forward(x), lambda c: (F.gelu_backward(dy, c),)),
        (lambda: F.cross_entropy_forward(x[0, 0], np.arange(3), 3), lambda c: (F.cross_entropy_backward(c),)),
    ):
        cache = forward()[1]
        first, second = backward(cache), backward(cache)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_rms_norm_output_has_unit_rms_and_ignores_scale():
    x = normal(4, 50)
    y, _ = F.rms_norm_forward(x, np.ones(50), 0.0)
    assert np.allclose(np.sqrt((y**2).mean(-1)), 1, rtol=close_rtol(np.float64, 50))
    assert_close(F.rms_norm_forward(1000 * x, np.ones(50), 0.0)[0], y, close_rtol(np.float64, 50))


def test_rms_norm_of_zeros_is_zero_not_nan():
    y, cache = F.rms_norm_forward(np.zeros((2, 4), np.float32), np.ones(4, np.float32), 1e-5)
    dx, _ = F.rms_norm_backward(np.ones((2, 4), np.float32), np.ones(4, np.float32), cache)
    assert not y.any() and np.isfinite(dx).all()


@given(shift=st.integers(0, 200), m=st.integers(0, 50), n=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_rope_scores_depend_on_the_distance_only(shift, m, n):
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(i, j):
        turn = [F.rope_tables(np.array([p]), 8, 100.0, np.dtype(np.float64)) for p in (i, j)]
        return float((F.rope_forward(q, *turn[0]) * F.rope_forward(k, *turn[1])).sum())

    # an angle of size a has a rounding of a·eps/2; positions reach 250 and the products add up to about 8
    assert abs(score(m, n) - score(m + shift, n + shift)) < 250 * 8 * 4 * np.finfo(np.float64).eps


def test_rope_keeps_lengths_and_leaves_position_zero_alone():
    x = normal(1, 6, 2, 8)
    y = F.rope_forward(x, *F.rope_tables(np.arange(6), 8, 10000.0, np.dtype(np.float64)))
    assert np.array_equal(y[:, 0], x[:, 0]) and not np.allclose(y[:, 1], x[:, 1])
    assert_close((y**2).sum(-1), (x**2).sum(-1), close_rtol(np.float64, 8))


def test_softmax_of_minus_infinity_and_of_huge_numbers():
    assert np.array_equal(F.softmax(np.array([[0.0, -np.inf, 0.0]])), [[0.5, 0.0, 0.5]])
    assert np.array_equal(F.softmax(np.array([[1e30, 0.0]], np.float32)), [[1.0, 0.0]])


def test_attention_is_causal_bitwise():
    q, k, v = (normal(2, 6, 4, 3, seed=s) for s in range(3))
    y = F.attention_forward(q, k, v)[0]
    k2, v2 = k.copy(), v.copy()
    k2[:, 4:], v2[:, 4:] = 7, -9
    y2 = F.attention_forward(q, k2, v2)[0]
    assert np.array_equal(y[:, :4], y2[:, :4]) and not np.allclose(y[:, 4:], y2[:, 4:])


def test_grouped_queries_equal_repeated_keys():
    """Query head h reads key head h // (H/K): heads that share are neighbours, as in transformers'
    repeat_kv."""
    q, k, v, dy = (
        normal(2, 5, 6, 3),
        normal(2, 5, 2, 3, seed=1),
        normal(2, 5, 2, 3, seed=2),
        normal(2, 5, 6, 3, seed=3),
    )
    y, cache = F.attention_forward(q, k, v)
    wide, wide_cache = F.attention_forward(q, k.repeat(3, axis=2), v.repeat(3, axis=2))
    assert_close(y, wide, close_rtol(np.float64, 5))
    dq, dk, dv = F.attention_backward(dy, cache)
    wide_dq, wide_dk, wide_dv = F.attention_backward(dy, wide_cache)
    assert_close(dq, wide_dq, close_rtol(np.float64, 5))
    assert_close(dk, wide_dk.reshape(2, 5, 2, 3, 3).sum(3), close_rtol(np.float64, 15))
    assert_close(dv, wide_dv.reshape(2, 5, 2, 3, 3).sum(3), close_rtol(np.float64, 15))


def test_attention_of_equal_keys_is_the_mean_of_the_past():
    q, v = normal(1, 4, 2, 3), normal(1, 4, 2, 3, seed=1)
    y, _ = F.attention_forward(q, np.ones((1, 4, 2, 3)), v)
    assert_close(y, np.cumsum(v, 1) / np.arange(1, 5)[:, None, None], close_rtol(np.float64, 4))


@pytest.mark.parametrize("dtype, extreme", [(np.float32, 1e4), (np.float64, 1e6)])
def test_swiglu_of_extreme_gates_is_finite_and_silent(dtype, extreme):
    """silu(−z) → 0 and silu(z) → z; exp(z) overflows on the way, which must not warn (warnings are errors
    here)."""
    gate, up = np.array([-extreme, -100, 100, extreme], dtype), np.ones(4, dtype)
    y, cache = F.swiglu_forward(gate, up)
    dgate, dup = F.swiglu_backward(np.ones(4, dtype), cache)
    tiny = 100 * np.exp(-100.0)
    assert np.allclose(y, [0, 0, 100, extreme], rtol=close_rtol(dtype, 1), atol=2 * tiny)
    assert np.allclose(dgate, [0, 0, 1, 1], rtol=close_rtol(dtype, 1), atol=2 * tiny) and np.array_equal(
        dup, y
    )


def test_gelu_of_extremes():
    y, cache = F.gelu_forward(np.array([-1e4, -50, 0, 50, 1e4], np.float32))
    assert np.array_equal(y, np.array([0, 0, 0, 50, 1e4], np.float32))
    assert np.array_equal(
        F.gelu_backward(np.ones(5, np.float32), cache), np.array([0, 0, 0.5, 1, 1], np.float32)
    )


def test_cross_entropy_of_uniform_logits_is_log_v():
    loss, _ = F.cross_entropy_forward(np.full((3, 50), 7.0, np.float32), np.array([0, 1, 49]), 3)
    assert abs(loss - np.log(50)) < close_rtol(np.float32, 50) * np.log(50)


def test_cross_entropy_survives_huge_logits():
    loss, cache = F.cross_entropy_forward(
        np.array([[1e30, 0.0], [-1e30, 0.0]], np.float32), np.array([0, 1]), 1
    )
    assert loss == 0.0 and not F.cross_entropy_backward(cache).any()


def test_cross_entropy_of_pieces_adds_up_to_the_whole():
    logits, targets = normal(6, 5), np.arange(6) % 5
    whole, cache = F.cross_entropy_forward(logits, targets, 6.0)
    parts = [F.cross_entropy_forward(logits[i], targets[i], 6.0) for i in (slice(0, 1), slice(1, 6))]
    assert abs(whole - sum(p[0] for p in parts)) < close_rtol(np.float64, 6) * whole
    assert np.array_equal(
        F.cross_entropy_backward(cache), np.concatenate([F.cross_entropy_backward(p[1]) for p in parts])
    )


def test_cross_entropy_of_no_rows_is_zero():
    loss, cache = F.cross_entropy_forward(np.zeros((0, 5), np.float32), np.zeros(0, np.int64), 4)
    assert loss == 0.0 and F.cross_entropy_backward(cache).shape == (0, 5)


def test_group_of_one_costs_nothing():
    x = normal(2, 4)
    assert F.group_sum(x, 1) is x and F.group_repeat(x, 1) is x
