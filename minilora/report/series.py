"""The data behind the figures: rows grouped into settings and summarised over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from minilora.config import ADAPTERS, CONTROLS
from minilora.report.labels import METHOD_NAMES, metric_of, setting_name, task_of, variant_columns
from minilora.report.statistics import pareto_front, summarize
from minilora.sweep.results import MEMORY_CLASSES, Row, successful

MIB = 2**20


def rank_curves(
    rows: Iterable[Mapping[str, Any]], metric: str = "loss", task: str | None = None
) -> list[Row]:
    """Return a curve for each method and kind of weights: name, method, bits, and a summary at each rank."""
    rows = successful(rows)
    task = task_of(rows, task)
    rows = [row for row in rows if row["task"] == task and row["method"] in ADAPTERS]
    variants = variant_columns(rows)
    by = ("method", "bits", "r", "quant_type", *variants)
    curves: dict[str, Row] = {}
    for point in summarize(rows, by, metric):
        name = setting_name(point, variants)
        curve = curves.setdefault(
            name, {"name": name, "method": point["method"], "bits": point["bits"], "points": []}
        )
        curve["points"].append(point)
    for curve in curves.values():
        curve["points"].sort(key=lambda point: point["r"])
    return sorted(
        curves.values(), key=lambda curve: (ADAPTERS.index(curve["method"]), -curve["bits"], curve["name"])
    )


def references(rows: Iterable[Mapping[str, Any]], metric: str = "loss", task: str | None = None) -> list[Row]:
    """Return summaries of what has no rank: full fine-tuning, subset, and the base without training."""
    rows = successful(rows)
    task = task_of(rows, task)
    rows = [row for row in rows if row["task"] == task and row["method"] in ("full", "subset", "base")]
    variants = variant_columns(rows)
    found = summarize(rows, by=("method", *variants), value=metric)
    return [point | {"name": setting_name(point, variants)} for point in found]


def memory_bars(rows: Iterable[Mapping[str, Any]], against: str = "r", task: str | None = None) -> list[Row]:
    """Return one bar for each setting: group (rank or bits), name, MiB by class, and the measured peak.

    `against="r"` shows each method at the bits that it has most ranks of. `against="bits"` shows the rank
    that has most bit-widths.
    """
    if against not in ("r", "bits"):
        raise ValueError(f"against={against!r}: choose one of r, bits")
    rows = successful(rows)
    task = task_of(rows, task)
    rows = [
        row
        for row in rows
        if row["task"] == task and row["method"] in METHOD_NAMES and row.get("bytes_weights") is not None
    ]
    rows = [row for row in rows if row["method"] not in ("base", "quantized_base")]
    adapted = [row for row in rows if row["method"] in ADAPTERS]
    if against == "r":
        common = {method: _most_common(adapted, method, "bits", "r") for method in ADAPTERS}
        adapted = [row for row in adapted if row["bits"] == common[row["method"]]]
    else:
        common_rank = _most_common(adapted, None, "r", "bits")
        adapted = [row for row in adapted if row["r"] == common_rank]
    bars: dict[tuple[Any, ...], Row] = {}
    for row in [row for row in rows if row["method"] not in ADAPTERS] + adapted:
        rank = row["r"] if row["method"] in ADAPTERS else 0
        group = rank if against == "r" else -row["bits"]
        place = (group, list(METHOD_NAMES).index(row["method"]), row.get("quant_type") or "")
        bar = bars.setdefault(
            place, {"group": abs(group), "name": setting_name(row), "method": row["method"], "all": []}
        )
        bar["all"].append([(row.get(column) or 0) / MIB for column in MEMORY_CLASSES])
        bar.setdefault("peaks", []).extend([row["bytes_peak"] / MIB] if row.get("bytes_peak") else [])
    for bar in bars.values():
        peaks = bar.pop("peaks")
        bar["peak"] = math.fsum(peaks) / len(peaks) if peaks else None
        parts = bar.pop("all")
        bar["mib"] = dict(
            zip(
                MEMORY_CLASSES,
                [math.fsum(part) / len(parts) for part in zip(*parts, strict=True)],
                strict=True,
            )
        )
    return [bars[place] for place in sorted(bars)]


def _most_common(rows: Iterable[Mapping[str, Any]], method: str | None, column: str, counted: str) -> Any:
    """Return the value of `column` with most values of `counted`; ties: r = 8, 4 bits, or the greatest."""
    seen: dict[Any, set[Any]] = {}
    for row in rows:
        if method in (None, row["method"]):
            seen.setdefault(row[column], set()).add(row[counted])
    usual = {"r": 8, "bits": 4}[column]
    return max(seen, key=lambda value: (len(seen[value]), value == usual, value), default=None)


COSTS = {
    "effective_bits": "bits per weight of the frozen base",
    "deployed_effective_bits": "bits per weight, deployed",
    "training_mib": "memory while training (MiB)",
}


def accuracy_points(
    rows: Iterable[Mapping[str, Any]],
    metric: str = "loss",
    task: str | None = None,
    cost: str = "effective_bits",
) -> list[Row]:
    """Return one point for each setting: name, cost, mean, and `front` (1, 2 …) on the Pareto front.

    The front is that of trained settings: the controls compete with nobody.

    Parameters
    ----------
    cost
        One of `COSTS`. With `deployed_effective_bits` the metric is that of the deployed weights too; a run
        without an adapter is deployed as it is.
    """
    if cost not in COSTS:
        raise ValueError(f"cost={cost!r}: choose one of {', '.join(COSTS)}")
    rows = successful(rows)
    task = task_of(rows, task)
    points = []
    for row in (row for row in rows if row["task"] == task):
        row["training_mib"] = sum(row.get(column) or 0 for column in MEMORY_CLASSES) / MIB
        column = f"deployed_{metric}" if cost.startswith("deployed") and row["method"] in ADAPTERS else metric
        row["value"] = row.get(column)
        row["cost"] = row.get(cost if row["method"] in ADAPTERS else cost.removeprefix("deployed_"))
        if row["value"] is not None and row["cost"] is not None:
            points.append(row)
    variants = variant_columns(points)
    by = ("method", "bits", "r", "quant_type", *variants)
    means = zip(summarize(points, by, "value"), summarize(points, by, "cost"), strict=True)
    settings = [
        value | {"cost": of["mean"], "name": setting_name(value, variants, rank=True)} for value, of in means
    ]
    trained = [point for point in settings if point["method"] not in CONTROLS]
    front = pareto_front([(point["cost"], point["mean"]) for point in trained], metric_of(metric).maximize)
    for position, index in enumerate(front, start=1):
        trained[index]["front"] = position
    return settings


def deployed_pairs(
    rows: Iterable[Mapping[str, Any]], metric: str = "loss", task: str | None = None, r: int | None = None
) -> list[Row]:
    """Return the summaries with the adapter and deployed, for each adapter method and bit-width at one rank.

    `r=None` takes the rank that has most bit-widths.
    """
    rows = successful(rows)
    task = task_of(rows, task)
    rows = [row for row in rows if row["task"] == task and row["method"] in ADAPTERS]
    rows = [row for row in rows if row.get(metric) is not None and row.get(f"deployed_{metric}") is not None]
    r = _most_common(rows, None, "r", "bits") if r is None else r
    rows = [row for row in rows if row["r"] == r]
    variants = variant_columns(rows)
    by = ("method", "bits", "r", "quant_type", *variants)
    pairs = zip(summarize(rows, by, metric), summarize(rows, by, f"deployed_{metric}"), strict=True)
    return [{name: own[name] for name in by} | {"adapter": own, "deployed": merged} for own, merged in pairs]
