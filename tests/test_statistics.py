"""Intervals, quantiles, paired differences and Pareto fronts, against scipy and by definition."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from minilora.report.statistics import mean_interval, paired_difference, pareto_front, summarize

EPS = np.finfo(float).eps
finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("n", "level", "quantile"),
    [  # a printed table of Student's t, two-sided
        (2, 0.95, 12.706),
        (3, 0.90, 2.920),
        (3, 0.95, 4.303),
        (4, 0.95, 3.182),
        (5, 0.99, 4.604),
        (31, 0.95, 2.042),
    ],
)
def test_the_interval_has_the_tables_width(n, level, quantile):
    values = np.linspace(-1, 1, n)
    _, low, high = mean_interval(values, level)
    expected = quantile * values.std(ddof=1) / n**0.5
    assert (high - low) / 2 == pytest.approx(expected, rel=0.0005 / quantile)  # the table has three decimals


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_the_interval_is_scipys(level):
    values = [0.31, 0.29, 0.345, 0.302]
    expected = scipy.stats.t.interval(
        level, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
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
    ("values", "level", "name"),
    [([], 0.95, "values"), ([1.0, math.nan], 0.95, "values"), ([1.0], 1.0, "level")],
)
def test_bad_values_are_refused_by_name(values, level, name):
    with pytest.raises(ValueError, match=f"{name}="):
        mean_interval(values, level)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(
        low <= 0 <= high for _, low, high in (mean_interval(rng.normal(size=3), 0.8) for _ in range(800))
    )
    # Binomial(800, 0.8): standard deviation 11.3; four of them.
    assert abs(hits - 640) < 46


def rows(**columns):
    length = len(next(iter(columns.values())))
    return [
        {"task": "products", **{name: values[i] for name, values in columns.items()}} for i in range(length)
    ]


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
        (
            rows(seed=[0], loss=[1.0], corpus_sha256=["x"]),
            rows(seed=[0], loss=[1.0], corpus_sha256=["y"]),
            "corpus_sha256",
        ),
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
