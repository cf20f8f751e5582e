"""Figures of quantized weights and models: `plot_…` draws on axes, `draw_…` fills a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from minilora.config import QuantConfig
from minilora.parameters import Array
from minilora.report.drawing import light_frame, new_figure, save_figure
from minilora.report.labels import BIT_MARKERS, GREY, PALETTE
from minilora.sweep.results import ResultsError
from minilora.sweep.weight_errors import block_errors, crossover, level_data, size_rows

BLACK, BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = PALETTE[:7]
HISTOGRAM = "#A9C4DA"
SPARE_COLOURS = ("#8B5A2B", "#6B8E23", "#B03060", "#4B5D67")


class Series(NamedTuple):
    """How one way of quantizing is drawn; `affine`, `quantizer`, `fit` and `kind` say which rows it has."""

    name: str
    affine: bool
    quantizer: str
    fit: str | None
    colour: str
    kind: str = ""
    """How its types begin; empty: any."""

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a row belongs to the series."""
        quant_type = row["quant_type"] or ""
        if quant_type.startswith("int") != self.affine or not quant_type.startswith(self.kind):
            return False
        return (row["quantizer"], row["fit"]) == (self.quantizer, self.fit)


def series_of(rows: Sequence[Mapping[str, Any]], known: Sequence[Series]) -> list[Series]:
    """Return the known series that have rows, then a new series for each way that is not in `SERIES`."""
    found = [series for series in known if any(series.has(row) for row in rows)]
    for row in rows:
        if not any(series.has(row) for series in (*SERIES, *found)):
            affine = row["fit"] is not None
            kind = "int" if affine else row["quant_type"].rstrip("2348")
            name = f"{kind}, {row['quantizer']}"
            if row["fit"] not in (None, "minmax"):
                name += f" {row['fit']}"
            colour = SPARE_COLOURS[len(found) % len(SPARE_COLOURS)]
            found.append(Series(name, affine, row["quantizer"], row["fit"], colour, kind))
    return found


RTN, HQQ, GPTQ, NF, NF_GPTQ, FP4, SYMMETRIC, MSE, GPTQ_MSE = (
    Series("int, rounded (rtn)", True, "rtn", "minmax", BLUE),
    Series("int, HQQ", True, "hqq", "hqq", GREEN),
    Series("int, GPTQ", True, "gptq", "minmax", ORANGE),
    Series("nf, rounded (rtn)", False, "rtn", None, PINK, "nf"),
    Series("nf, GPTQ", False, "gptq", None, BLACK, "nf"),
    Series("fp4, rounded (rtn)", False, "rtn", None, GREY, "fp4"),
    Series("int, rtn symmetric", True, "rtn", "symmetric", SKY),
    Series("int, rtn mse", True, "rtn", "mse", YELLOW),
    Series("int, GPTQ mse", True, "gptq", "mse", "#6A3D9A"),
)
QUANTIZERS, FITS = (RTN, HQQ, GPTQ, NF, NF_GPTQ), (RTN, SYMMETRIC, MSE, GPTQ, GPTQ_MSE)
WEIGHT_SERIES = (RTN, HQQ, GPTQ, NF, NF_GPTQ, FP4)  # the other fits would lie between these
SERIES = (*WEIGHT_SERIES, SYMMETRIC, MSE, GPTQ_MSE)


# ---- levels over a histogram


def plot_levels(data: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw a histogram of weights, and the levels that codes stand for, from `weight_errors.level_data`."""
    ax = ax or new_figure().add_subplot()
    values, levels = data["values"], data["levels"]
    low, high = min(values.min(), levels[0]), max(values.max(), levels[-1])
    margin = 0.03 * (high - low)
    ax.hist(values, bins=90, range=(low, high), density=True, color=HISTOGRAM, zorder=1)
    top = ax.get_ylim()[1]
    ax.vlines(levels, 0, top, color=ORANGE, linewidth=1.1, zorder=2)
    ax.set_xlim(low - margin, high + margin)
    ax.set_ylim(0, top)
    ax.set_yticks([])
    ax.set_xlabel(
        "place from first to last level" if data["affine"] else "w / absmax of its block", fontsize=9
    )
    ax.set_title(f"{data['name']}: relative error {100 * data['relative']:.1f} %", fontsize=9.5, loc="left")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def draw_levels(panels: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw one panel of `plot_levels` for each item, three in a row."""
    rows = -(-len(panels) // 3)
    figure = new_figure(width=9.0, height=2.4 * rows + 0.3)
    axes = figure.subplots(rows, 3, squeeze=False).reshape(-1)
    for ax, data in zip(axes, panels, strict=False):
        plot_levels(data, ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [
        Line2D([], [], color=HISTOGRAM, linewidth=6, label="weights"),
        Line2D([], [], color=ORANGE, linewidth=1.1, label="levels"),
    ]
    figure.legend(handles=handles, frameon=False, fontsize=9, ncols=2, loc="outside upper left")
    return figure


# ---- error of each block


def plot_blocks(data: Mapping[str, Any], ax: Axes | None = None, colour: str = BLUE) -> Axes:
    """Draw the rms error of each block against its largest weight, from `weight_errors.block_errors`.

    The line is proportionality: rms = c · absmax with the median c.
    """
    ax = ax or new_figure().add_subplot()
    some = (data["absmax"] > 0) & (data["rms"] > 0)
    absmax, rms = data["absmax"][some], data["rms"][some]
    ax.plot(absmax, rms, "o", color=colour, markersize=2.6, alpha=0.55, markeredgewidth=0, rasterized=True)
    if absmax.size:
        slope = float(np.median(rms / absmax))
        ends = np.array([absmax.min(), absmax.max()])
        ax.plot(ends, slope * ends, color=BLACK, linewidth=1.1, label="rms = median ratio · largest |w|")
        ax.set_title(f"{data['name']}: median {slope:.3f} of absmax", fontsize=9.5, loc="left")
    ax.set_xlabel("largest |w| of the block")
    ax.set_ylabel("rms error")
    light_frame(ax, "both")
    return ax


def draw_blocks(panels: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw one panel of `plot_blocks` for each item, two in a row."""
    rows = -(-len(panels) // 2)
    figure = new_figure(width=9.0, height=2.9 * rows + 0.3)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True).reshape(-1)
    for ax, data in zip(axes, panels, strict=False):
        plot_blocks(data, ax, BLUE if data["affine"] else PINK)
        ax.set_ylim(0, 1.05 * float(data["rms"].max()) or 1.0)
        ax.tick_params(labelbottom=True)  # sharing the axis leaves them to the last row
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = axes[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside upper left")
    return figure


# ---- error against bits


def plot_errors(
    rows: Iterable[Mapping[str, Any]],
    ax: Axes | None = None,
    *,
    error: str = "relative",
    known: Sequence[Series] = SERIES,
) -> Axes:
    """Draw `relative` or `output_error` against bits per weight, a line for each series and number of bits.

    Raises
    ------
    ResultsError
        No row has this error.
    """
    rows = [row for row in rows if row.get(error)]
    if not rows:
        raise ResultsError(f"no row has {error!r}; output errors need a Hessian")
    ax = ax or new_figure().add_subplot()
    for series in series_of(rows, known):
        for bits, marker in BIT_MARKERS.items():
            line = sorted(
                (row["bits_per_weight"], row[error])
                for row in rows
                if series.has(row) and row["bits"] == bits
            )
            if line:
                ax.plot(
                    *zip(*line, strict=True),
                    color=series.colour,
                    marker=marker,
                    markersize=4.5,
                    linewidth=1.2,
                )
    ax.set_yscale("log")
    low, high = min(row[error] for row in rows) / 1.12, max(row[error] for row in rows) * 1.12
    steps = (1, 2, 3, 5) if high / low < 100 else (1, 3)
    ticks = [step * 10.0**decade for decade in range(-6, 2) for step in steps]
    ax.set_ylim(low, high)
    ax.set_yticks(
        [tick for tick in ticks if low <= tick <= high],
        [f"{100 * tick:g} %" for tick in ticks if low <= tick <= high],
    )
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("effective bits per weight")
    light_frame(ax, "both")
    ax.set_ylabel("‖W − Ŵ‖ / ‖W‖" if error == "relative" else "‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖")
    return ax


def draw_errors(rows: Iterable[Mapping[str, Any]], known: Sequence[Series] = SERIES) -> Figure:
    """Draw the error of the weights beside that of the outputs.

    `known` restricts the figure to some of `SERIES`.
    """
    rows = list(rows)
    figure = new_figure(width=9.5, height=4.8)
    panels = [("relative", "the weights")]
    if any(row.get("output_error") for row in rows):
        panels.append(("output_error", "the outputs"))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (error, title) in zip(axes, panels, strict=True):
        plot_errors(rows, ax, error=error, known=known)
        ax.set_title(f"Error of {title}", fontsize=10, loc="left")
    handles = [
        Line2D([], [], color=series.colour, linewidth=1.6, label=series.name)
        for series in series_of(rows, known)
    ]
    markers = [
        Line2D([], [], linestyle="", marker=BIT_MARKERS[bits], color=GREY, label=f"{bits} bits")
        for bits in sorted({row["bits"] for row in rows})
    ]
    figure.legend(handles=handles, frameon=False, fontsize=9, ncols=3, loc="outside upper left")
    figure.legend(handles=markers, frameon=False, fontsize=9, ncols=4, loc="outside upper right")
    return figure


# ---- bytes


def plot_memory_bits(rows: Iterable[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Draw NF4's bits per weight in memory against block size, with and without double quantization.

    The rows are those of `weight_errors.size_rows`.
    """
    ax = ax or new_figure().add_subplot()
    rows = [row for row in rows if row.get("bits_per_weight") is not None]
    for double_quant, colour, name in (
        (False, BLUE, "float32 scales"),
        (True, ORANGE, "double-quantized scales"),
    ):
        line = [
            (row["block_size"], row["bits_per_weight"]) for row in rows if row["double_quant"] is double_quant
        ]
        ax.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4, linewidth=1.4, label=name)
    blocks = sorted({row["block_size"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(blocks, [str(block) for block in blocks])
    ax.set_xlabel("block size")
    ax.set_ylabel("bits per weight in memory")
    return _sizes(ax)


def plot_file_bits(rows: Iterable[Mapping[str, Any]], crossing: int, ax: Axes | None = None) -> Axes:
    """Draw NF4's bits per weight in bitsandbytes' file against the size of the tensor.

    `crossing` is the size at which the lines meet.
    """
    ax = ax or new_figure().add_subplot()
    rows = [row for row in rows if row.get("file_bits_per_weight") is not None]
    for double_quant, colour, name in (
        (False, BLUE, "float32 scales"),
        (True, ORANGE, "double-quantized scales"),
    ):
        line = [
            (row["weights"], row["file_bits_per_weight"])
            for row in rows
            if row["double_quant"] is double_quant
        ]
        ax.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
    top = max(row["file_bits_per_weight"] for row in rows)
    ax.axvline(crossing, color=BLACK, linewidth=1, linestyle=(0, (5, 3)))
    ax.text(
        crossing * 1.12, top, f"double quantization\npays from {crossing:,}\nweights on", fontsize=9, va="top"
    )
    ax.set_xscale("log", base=2)
    ticks = [2**k for k in range(11, 21, 2)]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set_xlabel("weights of the tensor")
    ax.set_ylabel("bits per weight in the file")
    return _sizes(ax)


def _sizes(ax: Axes) -> Axes:
    ax.xaxis.set_minor_locator(NullLocator())
    light_frame(ax)
    return ax


def draw_bytes(rows: Iterable[Mapping[str, Any]], crossing: int) -> Figure:
    """Draw the bits per weight in memory beside those in a file."""
    rows = list(rows)
    figure = new_figure(width=9.5, height=3.9)
    left, right = figure.subplots(1, 2)
    plot_memory_bits(rows, left).set_title("NF4 in memory, any size", fontsize=10, loc="left")
    plot_file_bits(rows, crossing, right).set_title(
        "One NF4 tensor in bitsandbytes' file, blocks of 64", fontsize=10, loc="left"
    )
    figure.legend(
        handles=left.get_legend_handles_labels()[0],
        frameon=False,
        fontsize=9,
        ncols=2,
        loc="outside upper left",
    )
    return figure


# ---- loss


def plot_losses(
    rows: Iterable[Mapping[str, Any]], ax: Axes | None = None, *, series: Sequence[Series] = QUANTIZERS
) -> Axes:
    """Draw the loss above full precision against bits, from the rows of `model_table` of one task.

    The scale is symmetric logarithmic, and the line at 0 is full precision. Bars are intervals paired over
    batches, small dots GPTQ's single seeds.

    Raises
    ------
    ResultsError
        No row belongs to a series.
    """
    rows = list(rows)
    chosen = [(i, one, row) for i, one in enumerate(series) for row in rows if one.has(row)]
    if not chosen:
        raise ResultsError("no quantized model in the rows; model_table makes them")
    ax = ax or new_figure().add_subplot()
    bits = sorted({row["bits"] for _, _, row in chosen})
    for i, one, row in chosen:
        x = bits.index(row["bits"]) + 0.15 * (i - (len(series) - 1) / 2)
        half = row["above_half"] or 0.0
        ax.errorbar(
            x,
            row["above"],
            half,
            color=one.colour,
            marker=BIT_MARKERS[row["bits"]],
            markersize=5.5,
            capsize=2.5,
            linewidth=1.1,
            zorder=3,
        )
        if len(row["losses"]) > 1:
            above = [loss - row["full_precision_loss"] for loss in row["losses"]]
            ax.plot(
                [x + 0.055] * len(above),
                above,
                "o",
                color=one.colour,
                markersize=2.6,
                alpha=0.65,
                markeredgewidth=0,
            )
    base = chosen[0][2]["full_precision_loss"]
    ax.axhline(0, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    ax.annotate(
        f"full precision: {base:.3f}",
        (0.01, 0),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        va="bottom",
        textcoords="offset points",
        fontsize=8.5,
        color=GREY,
    )  # few bits are far from this line
    ax.set_yscale("symlog", linthresh=0.01, linscale=1.0)
    ticks = [-0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3]
    low, high = ax.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(shown, [f"{tick:+g}" if tick else "0" for tick in shown])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(range(len(bits)), [f"{bit} bits" for bit in bits])
    ax.set_xlim(-0.5, len(bits) - 0.5)
    ax.set_ylabel("held-out loss above full precision\n(nats per token)", fontsize=9)
    light_frame(ax)
    return ax


def draw_losses(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw two panels for each task: quantizers, and fits of the integers."""
    rows = list(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(width=9.5, height=3.7 * len(tasks) + 0.6)
    for axes, task in zip(figure.subplots(len(tasks), 2, squeeze=False, sharey="row"), tasks, strict=True):
        for ax, series, title in zip(
            axes, (QUANTIZERS, FITS), ("quantizers", "fits of the integers"), strict=True
        ):
            plot_losses([row for row in rows if row["task"] == task], ax, series=series)
            ax.set_title(f"{task}: {title}", fontsize=10, loc="left")
            ax.label_outer()
    handles = [
        Line2D([], [], color=one.colour, linestyle="", marker="o", label=one.name)
        for one in dict.fromkeys([*QUANTIZERS, *FITS])
        if any(one.has(row) for row in rows)
    ]
    figure.legend(handles=handles, frameon=False, fontsize=9, ncols=4, loc="outside upper left")
    return figure


def write_weight_figures(
    w: Array, rows: Sequence[Mapping[str, Any]], folder: str | Path, grid: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Write `levels`, `blocks`, `errors` and `bytes` as PNG, of a weight (out, in) and its error rows.

    Levels and blocks have one panel for each type and fit. They show plain rounding to these levels.

    Parameters
    ----------
    rows
        Rows of `weight_errors`.
    grid
        Rows of many block and group sizes, which make lines of the errors.
    """
    configs: dict[tuple[Any, ...], QuantConfig] = {}
    for row in rows:
        key = (row["quant_type"], row["fit"])
        given = {
            name: row[name]
            for name in ("block_size", "group_size", "double_quant", "fit", "offset_dtype")
            if row[name] is not None
        }
        configs.setdefault(key, QuantConfig(row["quant_type"], **given))
    shown = list(configs.values())
    figures = {
        "levels": draw_levels([level_data(w, config) for config in shown]),
        "blocks": draw_blocks([block_errors(w, config) for config in shown]),
        "errors": draw_errors(grid or rows),
        "bytes": draw_bytes(size_rows(), crossover()),
    }
    return [
        path for name, figure in figures.items() for path in save_figure(figure, Path(folder) / name, ["png"])
    ]
