"""Small-sample statistics of rows: t-intervals over seeds, paired differences, Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from minilora.sweep.results import Row, check_one_corpus, group_rows


class Interval(NamedTuple):
    """A mean and the two ends of its confidence interval; the ends are NaN where there are too few values."""

    mean: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Mean of `a - b` over the seeds that both have, with its interval."""

    mean: float
    low: float
    high: float
    seeds: tuple[Any, ...]


def mean_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Return the mean and its two-sided t-interval, mean ± t · s / √n with n - 1 degrees of freedom.

    With one value the ends are NaN: one seed says nothing about the noise between seeds. Equal values have an
    interval of width 0, where `scipy.stats.t.interval` returns NaN.

    >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]

    Raises
    ------
    ValueError
        There is no value, one is not finite, or the level is not inside (0, 1).
    """
    data = [float(value) for value in values]
    if not data:
        raise ValueError("values=[]: a mean takes at least one value")
    if not all(math.isfinite(value) for value in data):
        raise ValueError(f"values={data!r}: all must be finite; leave failed runs out")
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: must lie between 0 and 1, for example 0.95")
    n, mean = len(data), fmean(data)
    if n == 1:
        return Interval(mean, math.nan, math.nan)
    from scipy.special import stdtrit  # Student's t quantile; a quarter of a second that only tables need

    half = float(stdtrit(n - 1, (1 + level) / 2)) * stdev(data) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def summarize(
    rows: Iterable[Mapping[str, Any]], by: Sequence[str], value: str, level: float = 0.95
) -> list[Row]:
    """Return one dict for each group of rows equal in `by`: those columns, n, mean, low, high, values, seeds.

    Rows without the value (None) are left out, and so are groups without any.

    >>> rows = [{"r": 1, "seed": s, "loss": 1.0 + s} for s in range(2)]
    >>> [(g["r"], g["n"], g["mean"]) for g in summarize(rows, by=("r",), value="loss")]
    [(1, 2, 1.5)]

    Raises
    ------
    ValueError
        Rows of one task have different hashes of corpus or base.
    """
    present = [row for row in rows if row.get(value) is not None]
    summaries = []
    for names, members in group_rows(present, by).items():
        values = [float(row[value]) for row in members]
        interval = mean_interval(values, level)._asdict()
        seeds = [row.get("seed") for row in members]
        summaries.append(
            dict(zip(by, names, strict=True))
            | {"n": len(values), **interval, "values": values, "seeds": seeds}
        )
    return sorted(summaries, key=lambda group: [_order(group[name]) for name in by])


def _order(value: Any) -> tuple[int, float, str]:
    """Sort None first, then numbers, then strings."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, (bool, int, float)) else (2, 0.0, str(value))


def paired_difference(
    a: Iterable[Mapping[str, Any]], b: Iterable[Mapping[str, Any]], value: str, level: float = 0.95
) -> PairedDifference:
    """Return the mean over seeds of `a[value] - b[value]` and its t-interval.

    Runs of one seed share data order and initialisation. Pairing takes their common noise out of the
    difference. An interval without 0 is an effect larger than the noise between seeds.

    >>> low = [{"seed": s, "loss": 1.0 + s} for s in range(3)]
    >>> high = [{"seed": s, "loss": 1.5 + s} for s in range(3)]
    >>> paired_difference(high, low, "loss")
    PairedDifference(mean=0.5, low=0.5, high=0.5, seeds=(0, 1, 2))

    Raises
    ------
    ValueError
        A seed occurs twice on one side (the rows are not one setting), or no seed is on both sides.
    """
    sides = [_by_seed(rows, value, name) for rows, name in ((list(a), "a"), (list(b), "b"))]
    check_one_corpus([row for side in sides for row in side.values()])
    seeds = tuple(seed for seed in sides[0] if seed in sides[1])
    if not seeds:
        raise ValueError(
            f"seed: no seed has {value!r} on both sides (a: {sorted(sides[0])}, b: {sorted(sides[1])})"
        )
    interval = mean_interval(
        [float(sides[0][seed][value]) - float(sides[1][seed][value]) for seed in seeds], level
    )
    return PairedDifference(*interval, seeds)


def _by_seed(rows: list[Mapping[str, Any]], value: str, side: str) -> dict[Any, Mapping[str, Any]]:
    found: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        if row.get(value) is None:
            continue
        if row["seed"] in found:
            raise ValueError(
                f"seed={row['seed']!r}: occurs twice in {side}; choose rows that differ in nothing but the "
                "seed"
            )
        found[row["seed"]] = row
    return found


def pareto_front(points: Sequence[tuple[float, float]], maximize: bool = False) -> list[int]:
    """Return the indices of the points (cost, value) that no other point beats, in order of cost.

    A point is beaten by another one that costs no more, is no worse, and is better in one of the two. Less
    cost is better. Less value is better too (a loss), unless `maximize` (an accuracy). Points with a NaN are
    never on the front.

    >>> pareto_front([(4.0, 0.5), (2.0, 0.9), (8.0, 0.5), (3.0, 1.0)])
    [1, 0]
    """
    sign = -1.0 if maximize else 1.0
    finite = [i for i, point in enumerate(points) if not any(math.isnan(x) for x in point)]
    front: list[int] = []
    best = (math.nan, math.inf)
    for i in sorted(finite, key=lambda i: (points[i][0], sign * points[i][1])):
        cost, value = points[i][0], sign * points[i][1]
        if value < best[1] or (cost, value) == best:  # equal points stand or fall together
            front.append(i)
            best = (cost, value)
    return front
