"""Shared parts of all figures: axes, labels, legends, and the one function that saves a figure.

Figures are made without pyplot, so no global state changes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from minilora.formats.files import write_file
from minilora.report.labels import BIT_MARKERS, GREY, METHOD_COLOURS, METHOD_NAMES, Metric
from minilora.sweep.results import Row

SAVED: dict[str, dict[str, Any]] = {
    "png": {"dpi": 150, "metadata": {"Software": None}, "pil_kwargs": {"optimize": True}},
    "svg": {"dpi": 150, "metadata": {"Date": None, "Creator": None}},
}
"""How a figure is saved, by format. No date and no version: the same rows give the same bytes."""


class Label(NamedTuple):
    """A text to put beside the axes at the height of a value."""

    value: float
    text: str
    colour: str


def new_figure(width: float = 7.0, height: float = 4.6) -> Figure:
    """Return a figure (inches) with constrained layout, not registered with pyplot."""
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write `path.png` and `path.svg`, each file whole or not at all, and return the paths.

    Parameters
    ----------
    path
        Where the files go, without a suffix.
    formats
        Which of "png" (150 dpi) and "svg" to write.
    """
    written = []
    for kind in formats:
        data = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "minilora"}):
            figure.savefig(data, format=kind, **SAVED[kind])
        figure.set_layout_engine("none")  # the second format keeps the layout of the first
        written.append(write_file(Path(path).with_suffix(f".{kind}"), data.getvalue()))
    return written


def light_frame(ax: Axes, grid: Literal["y", "both"] = "y") -> None:
    """Draw a light grid, and no frame at the top and on the right."""
    ax.grid(True, axis=grid, color=GREY, alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def draw_runs(
    ax: Axes,
    x: Sequence[float],
    runs_x: Sequence[float],
    points: Sequence[Row],
    style: Mapping[str, Any],
    line: bool = False,
) -> None:
    """Draw means as large markers, single runs as dots, and intervals from three runs on.

    Parameters
    ----------
    x
        Where the means and their intervals go.
    runs_x
        Where the single runs go, beside the means.
    points
        Summaries of `statistics.summarize`.
    style
        Keyword arguments of `Axes.plot`, `color` among them.
    line
        Whether the means are joined.
    """
    colour = style["color"]
    ax.plot(
        x, [point["mean"] for point in points], markersize=6, linewidth=1.6 if line else 0, zorder=4, **style
    )
    for place, beside, point in zip(x, runs_x, points, strict=True):
        if point["n"] > 1:
            ax.plot(
                [beside] * point["n"],
                point["values"],
                "o",
                color=colour,
                markersize=2.6,
                alpha=0.65,
                markeredgewidth=0,
                zorder=3,
            )
        if point["n"] >= 3:  # with fewer an interval says more of the t distribution than of the runs
            ends = [[point["mean"] - point["low"]], [point["high"] - point["mean"]]]
            ax.errorbar(place, point["mean"], ends, color=colour, capsize=2.5, linewidth=1, zorder=2)


def extent(point: Mapping[str, Any]) -> list[float]:
    """Return the values that an axis must hold: all runs, and the interval within three times their range."""
    values = list(point["values"])
    if point["n"] >= 3:
        reach = 3 * (max(values) - min(values))
        values += [max(point["low"], point["mean"] - reach), min(point["high"], point["mean"] + reach)]
    return values


def limits(values: Sequence[float], lines: Sequence[float]) -> tuple[float, float]:
    """Return axis limits around the values, and around those lines that lie near them."""
    low, high = min(values), max(values)
    span = max(high - low, 0.02 * max(abs(high), abs(low))) or 0.02
    near = [line for line in lines if low - 0.6 * span <= line <= high + 0.6 * span]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * max(high - low, span)
    return low - margin, high + margin


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Return the positions nearest to the wanted ones, in their order, at least `gap` apart.

    The lowest position lies in [low, high]. Nearest is meant in the sense of least squares: without the gaps
    this is isotonic regression.

    >>> [round(y, 2) for y in spread([0.5, 0.52, 0.1], 0.1)]
    [0.46, 0.56, 0.1]
    """
    from scipy.optimize import isotonic_regression  # loads in half a second, and only labels need it

    if not wanted:
        return []
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    # Least squares: without the steps, the positions only have to be in order.
    positions = isotonic_regression(np.asarray(wanted, np.float64)[order] - steps).x
    positions = np.clip(positions, low, max(low, high - steps[-1])) + steps
    found = np.empty(len(wanted))
    found[order] = positions
    return found.tolist()


def finish(ax: Axes, metric: Metric, labels: Sequence[Label] = ()) -> None:
    """Name the y axis and write labels to the right of the axes, as near to their values as there is room."""
    ax.set_ylabel(metric.label)
    if metric.maximize:
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    light_frame(ax)
    ax.get_ylim()  # settles the limits, which the positions depend on
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [min(1.0, max(0.0, float(to_axes.transform((1.0, label.value))[1]))) for label in labels]
    for label, start, height in zip(labels, heights, spread(heights, 0.058), strict=True):
        ax.annotate(
            label.text,
            xy=(1.0, start),
            xytext=(1.045, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=label.colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def legend_of_bits(ax: Axes, bits: Iterable[int], extra: Sequence[Line2D] = ()) -> None:
    """Explain the markers above the axes, where there is no data."""
    names = {bit: "float32" if bit == 32 else f"{bit} bits" for bit in sorted(bits, reverse=True)}
    handles = [
        Line2D([], [], linestyle="", marker=BIT_MARKERS.get(bit, "o"), color=GREY, label=name)
        for bit, name in names.items()
    ]
    ax.legend(
        handles=[*handles, *extra],
        frameon=False,
        fontsize=8.5,
        ncols=len(handles) + len(extra),
        columnspacing=1.2,
        handletextpad=0.3,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.1,
    )


def method_line(ax: Axes, methods: Sequence[str]) -> None:
    """Name the colours in a second legend, below the x label."""
    first = ax.get_legend()
    handles = [
        Line2D([], [], linestyle="", marker="o", color=METHOD_COLOURS[name], label=METHOD_NAMES[name])
        for name in methods
    ]
    ax.legend(
        handles=handles,
        frameon=False,
        fontsize=8.5,
        ncols=4,
        loc="upper left",
        bbox_to_anchor=(0.0, -0.14),
        columnspacing=1.2,
        handletextpad=0.2,
        borderaxespad=0.0,
    )
    if first is not None:
        ax.add_artist(first)
