"""Intervals, quantiles, paired differences and Pareto fronts, against scipy and by definition."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from minilora.study.statistics import (
    incomplete_beta,
    mean_interval,
    paired_difference,
    pareto_front,
    summarize,
    t_cdf,
    t_quantile,
)

EPS = np.finfo(float).eps
finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize("df", [1, 2, 3, 4.5, 9, 29, 200])
@pytest.mark.parametrize("p", [0.001, 0.025, 0.3, 0.5, 0.75, 0.95, 0.975, 0.995, 0.9999])
def test_t_quantile_is_scipys(p, df):
    # The error of t is that of p divided by the density: far in the tail of few degrees of freedom that is large.
    expected = scipy.stats.t.ppf(p, df)
    tolerance = 1e3 * EPS * (1 + abs(expected) + 1 / scipy.stats.t.pdf(expected, df))
    assert t_quantile(p, df) == pytest.approx(expected, rel=0, abs=tolerance)


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.floats(0, 1))
def test_incomplete_beta_is_scipys(a, b, x):
    assert incomplete_beta(a, b, x) == pytest.approx(scipy.special.betainc(a, b, x), rel=1e-11, abs=1e-13)


@given(st.floats(-100, 100), st.floats(0.5, 300))
def test_t_cdf_is_scipys_and_symmetric(t, df):
    assert t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), rel=1e-9, abs=1e-13)
    assert t_cdf(t, df) + t_cdf(-t, df) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize(("p", "df", "name"), [(0, 3, "p"), (1, 3, "p"), (math.nan, 3, "p"), (0.9, 0, "df"), (0.9, -1, "df")])
def test_bad_quantiles_are_refused_by_name(p, df, name):
    with pytest.raises(ValueError, match=f"{name}="):
        t_quantile(p, df)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_the_interval_is_scipys(level):
    values = [0.31, 0.29, 0.345, 0.302]
    expected = scipy.stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    mean, low, high = mean_interval(values, level)
    assert mean == pytest.approx(np.mean(values), rel=4 * EPS)
    assert (low, high) == pytest.approx(expected, rel=1e-10)


@given(st.lists(finite, min_size=2, max_size=8))
def test_the_interval_holds_its_mean_and_is_symmetric(values):
    mean, low, high = mean_interval(values)
    assert low <= mean <= high
    assert mean - low == pytest.approx(high - mean, abs=1e-6)


def test_one_value_has_no_interval():
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    ("values", "level", "name"), [([], 0.95, "values"), ([1.0, math.nan], 0.95, "values"), ([1.0], 1.0, "level")]
)
def test_bad_values_are_refused_by_name(values, level, name):
    with pytest.raises(ValueError, match=f"{name}="):
        mean_interval(values, level)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(low <= 0 <= high for _, low, high in (mean_interval(rng.normal(size=3), 0.8) for _ in range(800)))
    # Binomial(800, 0.8): standard deviation 11.3; four of them.
    assert abs(hits - 640) < 46


def rows(**columns):
    length = len(next(iter(columns.values())))
    return [{"task": "products", **{name: values[i] for name, values in columns.items()}} for i in range(length)]


def test_summarize_groups_sorts_and_leaves_null_out():
    data = rows(r=[8, None, 2, 8, 8], seed=[0, 0, 0, 1, 2], loss=[1.0, 9.0, 5.0, 3.0, None])
    groups = summarize(data, by=("r",), value="loss")
    assert [(g["r"], g["n"], g["mean"], g["seeds"]) for g in groups] == [
        (None, 1, 9.0, [0]),
        (2, 1, 5.0, [0]),
        (8, 2, 2.0, [0, 1]),
    ]
    assert groups[2]["values"] == [1.0, 3.0] and groups[2]["low"] < 2.0 < groups[2]["high"]


def test_summarize_never_pools_two_corpora():
    data = rows(r=[8, 8], seed=[0, 1], loss=[1.0, 2.0], corpus_sha256=["old", "new"])
    with pytest.raises(ValueError, match="old.*new"):
        summarize(data, by=("r",), value="loss")


def test_pairing_takes_the_seeds_noise_out():
    noise = np.array([0.0, 5.0, -3.0])
    a = rows(seed=[0, 1, 2], loss=(noise + 1.0 + np.array([0.0, 0.1, -0.1])).tolist())
    b = rows(seed=[2, 1, 0, 7], loss=[-3.0, 5.0, 0.0, 99.0])
    difference = paired_difference(a, b, "loss")
    expected = scipy.stats.t.interval(0.95, 2, loc=1.0, scale=scipy.stats.sem([1.0, 1.1, 0.9]))
    assert difference.seeds == (0, 1, 2)
    assert difference[:3] == pytest.approx((1.0, *expected), rel=1e-9)
    assert mean_interval([row["loss"] for row in a]).low < 0 < difference.low


@pytest.mark.parametrize(
    ("a", "b", "hint"),
    [
        (rows(seed=[0, 0], loss=[1.0, 2.0]), rows(seed=[0], loss=[1.0]), "occurs twice in a"),
        (rows(seed=[0], loss=[1.0]), rows(seed=[1], loss=[1.0]), "no seed"),
        (rows(seed=[0], loss=[1.0], corpus_sha256=["x"]), rows(seed=[0], loss=[1.0], corpus_sha256=["y"]), "corpus_sha256"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(a, b, hint):
    with pytest.raises(ValueError, match=hint):
        paired_difference(a, b, "loss")


def beats(p, q, sign):
    """Whether p is no worse than q in both and better in one, by definition."""
    return p[0] <= q[0] and sign * p[1] <= sign * q[1] and (p[0] < q[0] or sign * p[1] < sign * q[1])


points = st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float))


@given(st.lists(points, max_size=12), st.booleans())
def test_the_front_is_what_nobody_beats(data, maximize):
    sign = -1 if maximize else 1
    front = pareto_front(data, maximize)
    assert set(front) == {i for i, q in enumerate(data) if not any(beats(p, q, sign) for p in data)}
    assert [data[i][0] for i in front] == sorted(data[i][0] for i in front)
    assert len(set(front)) == len(front)


def test_points_with_nan_are_never_on_the_front():
    assert pareto_front([(1.0, math.nan), (2.0, 3.0), (math.nan, 0.0)]) == [1]
