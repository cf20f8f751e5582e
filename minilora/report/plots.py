"""Figures of a sweep: each function draws rows on axes and returns them.

All functions take the `rows` of a sweep and the axes `ax` to draw on (by default those of a new figure).
`metric` is a column, `task` one of the rows' tasks; it may be left out if there is only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, ScalarFormatter

from minilora.config import ADAPTERS, CONTROLS
from minilora.report.drawing import (
    Label,
    draw_runs,
    extent,
    finish,
    legend_of_bits,
    limits,
    method_line,
    new_figure,
    save_figure,
)
from minilora.report.labels import (
    BIT_MARKERS,
    GREY,
    METHOD_COLOURS,
    METHOD_NAMES,
    deployed_metric,
    main_metrics,
    metric_of,
    task_of,
)
from minilora.report.series import (
    COSTS,
    accuracy_points,
    deployed_pairs,
    memory_bars,
    rank_curves,
    references,
)
from minilora.report.statistics import summarize
from minilora.sweep.results import MEMORY_CLASSES, ResultsError, successful

MEMORY_COLOURS = dict(
    zip(
        MEMORY_CLASSES,
        ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#CCCCCC"),
        strict=True,
    )
)
"""Okabe and Ito's colours, and light grey for the activations, which are freed again."""
TITLE_PADS = {"memory": 20.0, "learning_rate": 8.0}
"""Points between title and axes; the other figures have a legend there."""


class Figures(NamedTuple):
    """The files written, and the reason for each figure or panel that could not be drawn."""

    paths: list[Path]
    skipped: dict[str, str]


def plot_against_rank(
    rows: Iterable[Mapping[str, Any]],
    ax: Axes | None = None,
    *,
    metric: str = "loss",
    task: str | None = None,
) -> Axes:
    """Draw a metric against rank, a line for each method and bit-width.

    Large markers are means over seeds, small dots single runs, bars 95 % t-intervals (from three seeds on).
    Horizontal lines are full fine-tuning, subset and the base. A line far outside is named at the edge with
    its value.

    Raises
    ------
    ResultsError
        No finished run of an adapter has this metric, or rows of different data are mixed.
    """
    rows = list(rows)
    curves = rank_curves(rows, metric, task)
    if not curves:
        raise ResultsError(f"no finished lora, qlora or qalora run has {metric!r}")
    ax = ax or new_figure().add_subplot()
    about = metric_of(metric)
    labels = []
    for curve in curves:
        points, colour = curve["points"], METHOD_COLOURS[curve["method"]]
        dodge = 0.13 * (ADAPTERS.index(curve["method"]) - 1)  # methods side by side, not on top of each other
        x, runs_x = ([point["r"] * 2**shift for point in points] for shift in (dodge, dodge + 0.06))
        draw_runs(
            ax,
            x,
            runs_x,
            points,
            {"color": colour, "marker": BIT_MARKERS[curve["bits"]]},
            line=len(points) > 1,
        )
        if len(points) > 1 or len(curves) <= 3:
            labels.append(Label(points[-1]["mean"], curve["name"], colour))
    around = [value for curve in curves for point in curve["points"] for value in extent(point)]
    low, high = limits(around, [line["mean"] for line in references(rows, metric, task)])
    for line in references(rows, metric, task):
        mean, text, colour = line["mean"], line["name"], METHOD_COLOURS[line["method"]]
        if low <= mean <= high:
            ax.axhline(mean, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        else:
            text += f": {about.text(mean)} {'↑' if mean > high else '↓'}"
        labels.append(Label(mean, text, colour))
    ranks = sorted({point["r"] for curve in curves for point in curve["points"]})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(r) for r in ranks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(ranks[0] / 1.25, ranks[-1] * 1.25)
    ax.set_ylim(low, high)
    ax.set_xlabel("rank r")
    finish(ax, about, labels)
    legend_of_bits(ax, {curve["bits"] for curve in curves})
    method_line(ax, [name for name in ADAPTERS if any(curve["method"] == name for curve in curves)])
    return ax


def plot_memory(
    rows: Iterable[Mapping[str, Any]], ax: Axes | None = None, *, against: str = "r", task: str | None = None
) -> Axes:
    """Draw what training holds in memory as stacked bars (MiB by class), against rank or bits.

    A line above each bar is the measured peak.

    Raises
    ------
    ResultsError
        No finished training run has its bytes.
    """
    bars = memory_bars(rows, against, task)
    if not bars:
        raise ResultsError("no finished training run has its bytes by class")
    ax = ax or new_figure(width=8.0).add_subplot()
    x: list[float] = []
    for i, bar in enumerate(bars):
        x.append(0.0 if i == 0 else x[-1] + (1.0 if bar["group"] == bars[i - 1]["group"] else 1.7))
    bottoms = [0.0] * len(bars)
    for column, label in MEMORY_CLASSES.items():
        heights = [bar["mib"][column] for bar in bars]
        if any(heights):
            ax.bar(
                x,
                heights,
                width=0.84,
                bottom=bottoms,
                color=MEMORY_COLOURS[column],
                label=label,
                edgecolor="white",
                linewidth=0.4,
            )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    # measured by tracemalloc: the classes, and what lives only for a moment (logits, temporaries)
    tops = [bar["peak"] or total for bar, total in zip(bars, bottoms, strict=True)]
    if any(bar["peak"] for bar in bars):
        ax.hlines(
            tops,
            [place - 0.42 for place in x],
            [place + 0.42 for place in x],
            color="black",
            linewidth=1.0,
            label="peak of a step, measured",
        )
    for place, total in zip(x, tops, strict=True):
        ax.text(
            place,
            total,
            f"{total:.1f}" if total < 9.95 else f"{total:.0f}",
            ha="center",
            va="bottom",
            fontsize=7,
        )
    ax.set_xticks(
        x, [bar["name"].replace("full fine-tuning", "full") for bar in bars], rotation=90, fontsize=8
    )
    for group in dict.fromkeys(bar["group"] for bar in bars):
        places = [place for place, bar in zip(x, bars, strict=True) if bar["group"] == group]
        if against == "bits":
            name = "float32" if group == 32 else f"{group} bits"
        else:
            name = f"r = {group}" if group else "no adapter"
        ax.text(
            (places[0] + places[-1]) / 2,
            1.0,
            name,
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.5,
        )
    ax.set_ylabel("memory while training (MiB)")
    ax.set_ylim(0, 1.06 * max(tops))
    ax.spines[["top", "right"]].set_visible(False)
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], names[::-1], frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return ax


def plot_accuracy_against_memory(
    rows: Iterable[Mapping[str, Any]],
    ax: Axes | None = None,
    *,
    metric: str = "loss",
    task: str | None = None,
    cost: str = "effective_bits",
) -> Axes:
    """Draw a metric against memory, with the Pareto front; the points on it are numbered and named.

    The controls compete with nobody. Where they lie far outside the rest they are named, not drawn.

    Parameters
    ----------
    cost
        `effective_bits` (of the frozen base), `deployed_effective_bits` (of the merged weights, with their
        own metric) or `training_mib`.

    Raises
    ------
    ResultsError
        No finished run has both the metric and the cost.
    """
    points = accuracy_points(rows, metric, task, cost)
    if not points:
        raise ResultsError(f"no finished run has both {metric!r} and {cost!r}")
    ax = ax or new_figure(width=8.0).add_subplot()
    about = metric_of(metric)
    trained = [point["mean"] for point in points if point["method"] not in CONTROLS]
    low, high = limits(trained or [point["mean"] for point in points], [point["mean"] for point in points])
    for point in (point for point in points if low <= point["mean"] <= high):
        colour = METHOD_COLOURS[point["method"]]
        ax.plot(
            point["cost"],
            point["mean"],
            linestyle="",
            marker=BIT_MARKERS[point["bits"]],
            markersize=7,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=3,
        )
        if "front" in point:
            ax.annotate(
                str(point["front"]),
                (point["cost"], point["mean"]),
                xytext=(4, 4),
                textcoords="offset points",
                zorder=5,
                fontsize=8,
            )
    front = sorted((point for point in points if "front" in point), key=lambda point: int(point["front"]))
    ax.step(
        [point["cost"] for point in front],
        [point["mean"] for point in front],
        where="post",
        color=GREY,
        linewidth=1.2,
    )
    ax.set_ylim(low, high)
    if cost.endswith("bits"):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_xlabel(f"{COSTS[cost]}{', log scale' if cost.endswith('bits') else ''}")
    finish(ax, about)
    lines = ["On the Pareto front:", *(f"{point['front']}  {point['name']}" for point in front)]
    for method in CONTROLS:  # training moves results far from them: drawing them would squash the rest
        outside = [
            point["mean"]
            for point in points
            if point["method"] == method and not low <= point["mean"] <= high
        ]
        if outside:
            ends = dict.fromkeys(about.text(value) for value in (min(outside), max(outside)))
            lines += ["", f"Outside: {METHOD_NAMES[method]}", "   " + " to ".join(ends)]
    ax.text(1.02, 1.0, "\n".join(lines), transform=ax.transAxes, fontsize=7.5, va="top", linespacing=1.35)
    methods = [name for name in METHOD_NAMES if any(point["method"] == name for point in points)]
    legend_of_bits(ax, {point["bits"] for point in points})
    method_line(ax, methods)
    return ax


def plot_deployed(
    rows: Iterable[Mapping[str, Any]],
    ax: Axes | None = None,
    *,
    metric: str = "loss",
    task: str | None = None,
    r: int | None = None,
) -> Axes:
    """Draw a metric against bits: with the adapter (filled), and merged into weights of these bits (hollow).

    Raises
    ------
    ResultsError
        No finished adapter run has a deployed result.
    """
    pairs = deployed_pairs(rows, metric, task, r)
    if not pairs:
        raise ResultsError(f"no finished adapter run has 'deployed_{metric}'")
    ax = ax or new_figure().add_subplot()
    bits = sorted({pair["bits"] for pair in pairs})
    taken: dict[tuple[int, str], int] = {}
    for pair in pairs:
        again = taken[pair["bits"], pair["method"]] = taken.get((pair["bits"], pair["method"]), -1) + 1
        centre = bits.index(pair["bits"]) + 0.08 * again
        if pair["bits"] != 32:  # methods side by side
            centre += 0.25 * (ADAPTERS.index(pair["method"]) - 1)
        x, colour = (centre - 0.05, centre + 0.05), METHOD_COLOURS[pair["method"]]
        ax.plot(x, [pair["adapter"]["mean"], pair["deployed"]["mean"]], color=colour, linewidth=1.4, zorder=2)
        style = {"color": colour, "marker": BIT_MARKERS[pair["bits"]]}
        draw_runs(ax, x[:1], [x[0] - 0.035], [pair["adapter"]], style)
        draw_runs(ax, x[1:], [x[1] + 0.035], [pair["deployed"]], style | {"markerfacecolor": "white"})
    ax.set_xticks(range(len(bits)), ["float32" if bit == 32 else f"{bit} bits" for bit in bits])
    ax.set_xlim(-0.6, len(bits) - 0.4)
    ax.set_xlabel(f"weights of the frozen base (r = {pairs[0]['r']})")
    finish(ax, metric_of(metric))
    faces = {"with the adapter": GREY, "deployed: merged, same bits": "white"}
    state = [
        Line2D([], [], linestyle="", marker="o", color=GREY, markerfacecolor=face, label=label)
        for label, face in faces.items()
    ]
    ax.legend(
        handles=state,
        frameon=False,
        fontsize=8.5,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.1,
    )
    method_line(ax, [name for name in ADAPTERS if any(pair["method"] == name for pair in pairs)])
    return ax


def plot_learning_rates(
    rows: Iterable[Mapping[str, Any]], ax: Axes | None = None, *, task: str | None = None
) -> Axes:
    """Draw the search: validation loss against learning rate, a line for each method, the choice ringed.

    Raises
    ------
    ResultsError
        There are no rows of a search.
    """
    rows = [
        dict(row)
        for row in rows
        if row.get("stage") == "search" and row["status"] == "success" and row.get("loss") is not None
    ]
    if not rows:
        raise ResultsError("no finished run of a learning-rate search")
    task = task_of(rows, task)
    ax = ax or new_figure().add_subplot()
    labels = []
    methods = [
        name for name in METHOD_NAMES if any(row["method"] == name and row["task"] == task for row in rows)
    ]
    for method in methods:
        points = summarize(
            (row for row in rows if row["task"] == task and row["method"] == method),
            ("learning_rate",),
            "loss",
        )
        x, y = [point["learning_rate"] for point in points], [point["mean"] for point in points]
        ax.plot(x, y, color=METHOD_COLOURS[method], marker="o", markersize=4, linewidth=1.4)
        best = min(range(len(y)), key=y.__getitem__)
        ax.plot(x[best], y[best], "o", markersize=11, markerfacecolor="none", color=METHOD_COLOURS[method])
        labels.append(Label(y[-1], METHOD_NAMES[method], METHOD_COLOURS[method]))
    ax.set_xscale("log")
    ax.set_yscale("log")
    rates = sorted({row["learning_rate"] for row in rows})
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel("learning rate (ringed: the choice)")
    finish(ax, metric_of("loss")._replace(name="validation loss"), labels)
    return ax


def save_figures(rows: Iterable[Mapping[str, Any]], folder: str | Path) -> Figures:
    """Draw what the rows allow and write PNG and SVG files; the same rows give the same bytes.

    The figures are `rank`, `memory`, `accuracy_memory`, `deployed` and `learning_rate`, each with a panel for
    every task and metric.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    skipped: dict[str, str] = {}
    for name, panels in _panels([dict(row) for row in rows]).items():
        drawn = []
        for title, draw in panels.items():
            try:
                draw(new_figure().add_subplot())  # a rehearsal: only then is the number of panels known
                drawn.append((title, draw))
            except ResultsError as error:
                skipped[f"{name}: {title}"] = str(error)
        if not drawn:
            skipped.setdefault(name, "there are no finished runs to draw")
            continue
        figure = new_figure(width=8.0, height=4.4 * len(drawn))
        for ax, (title, draw) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
            draw(ax)
            ax.set_title(title, fontsize=10, loc="left", pad=TITLE_PADS.get(name, 24))
        paths += save_figure(figure, folder / name)
    return Figures(paths, skipped)


def _panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, Callable[[Axes], Axes]]]:
    """Return the figures and the panels of each: title → function that draws it on given axes."""
    good = successful(rows)
    tasks = sorted({row["task"] for row in good})
    cases = [(task, metric) for task in tasks for metric in main_metrics(good, task)]
    searched = sorted({row["task"] for row in rows if row.get("stage") == "search"})
    panels: dict[str, dict[str, Callable[[Axes], Axes]]] = {
        "rank": {
            f"{task}: {metric.name} against rank": partial(
                plot_against_rank, rows, metric=metric.column, task=task
            )
            for task, metric in cases
        },
        "memory": {
            f"{task}: memory against {name}": partial(plot_memory, rows, against=against, task=task)
            for task in tasks[:1]
            for against, name in (("r", "rank"), ("bits", "bits"))
        },
        "accuracy_memory": {
            f"{task}: {metric.name} against {COSTS[cost]}": partial(
                plot_accuracy_against_memory, rows, metric=metric.column, task=task, cost=cost
            )
            for task in tasks
            for metric, cost in (
                (deployed_metric(good, task), "deployed_effective_bits"),
                (main_metrics(good, task)[-1], "training_mib"),
            )
        },
        "deployed": {
            f"{task}: {metric.name}, adapter and deployed": partial(
                plot_deployed, rows, metric=metric.column, task=task
            )
            for task, metric in cases
        },
    }
    if searched:
        panels["learning_rate"] = {
            f"{task}: search on the validation split": partial(plot_learning_rates, rows, task=task)
            for task in searched
        }
    return panels
