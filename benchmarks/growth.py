"""How one training step grows with the batch, the rank, the context and the width; drawn as `growth.png`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ours import Ours
from benchmarks.timing import Contestant, Sgemm, interleave, ratio, remote, summary
from benchmarks.workload import SIZES, R, Size, flop
from minilora.config import ModelConfig

METHODS = ("lora", "qlora")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """One step to time, at the place `x` of its panel."""

    x: int
    size: Size
    r: int = R


def panels() -> dict[str, list[Point]]:
    """Return what grows → the steps; all else stays fixed, with "context" the tokens of a step."""
    tiny, small = SIZES["tiny"], SIZES["small"]

    def sequences(length: int) -> Size:
        return Size(replace(tiny.config, context_length=length), 4096 // length, length)

    def wide(width: int) -> Size:
        return Size(
            ModelConfig(256, width, 4 * width, 2, width // 64, width // 64, context_length=128), 2, 128
        )

    return {
        "batch": [Point(n, replace(tiny, batch=n)) for n in (1, 2, 4, 8, 16, 32)],
        "r": [Point(r, small, r) for r in (1, 2, 4, 8, 16, 32, 64)],
        "context": [Point(n, sequences(n)) for n in (128, 256, 512, 1024, 2048)],
        "width": [Point(n, wide(n)) for n in (128, 256, 512, 1024, 2048)],
    }


START = {"batch": 4}
"""The place that the others of a panel are compared with; elsewhere the first.

From here on time per token must stay flat.
"""


class Steps:
    """Several models in one process, each with its step."""

    def __init__(self, threads: int):
        self.threads, self.sides = threads, dict[str, Ours]()

    def add(self, label: str, point: Point, method: str) -> None:
        """Prepare a step."""
        self.sides[label] = Ours(self.threads)
        self.sides[label].build(point.size, method, r=point.r)

    def timed(self, label: str, n: int) -> float:
        """Return the seconds of one step, from n in a row."""
        return self.sides[label].timed("step", n)

    def close(self) -> None:
        """Close all sides; needed only where the process lives on."""
        while self.sides:
            self.sides.popitem()[1].close()


def measure(
    repeats: int, threads: int, out: Path, say: Any, points: dict[str, list[Point]] | None = None
) -> Rows:
    """Return one row for each panel, method and place, and write `out/growth.png`.

    All steps of a panel take turns.
    """
    rows: Rows = []
    with remote("benchmarks.timing.Sgemm", threads) as product:
        for panel, steps in (points or panels()).items():
            rows += _panel(panel, steps, threads, partial(product.call, "timed"), repeats)
            for method in METHODS:
                times = (f"{r['x']}: {1e3 * r['seconds']['median']:.1f} ms" for r in of(rows, panel, method))
                say(f"{panel:8s} {method:6s} {'   '.join(times)}")
    for text in verdicts(rows):
        say(text)
    from minilora.report.drawing import save_figure

    save_figure(draw(rows), out / "growth", ["png"])
    return rows


def _panel(panel: str, points: list[Point], threads: int, product: Contestant, repeats: int) -> Rows:
    with remote("benchmarks.growth.Steps", threads) as side:
        turns: dict[str, Contestant] = {}
        for method, point in itertools.product(METHODS, points):
            label = f"{method} {point.x}"
            side.call("add", label, point, method)
            turns[label] = partial(side.call, "timed", label)
        found = interleave(turns | {"sgemm": product}, repeats)
    first = next((p for p in points if p.x == START.get(panel)), points[0])
    rows = []
    for method, point in itertools.product(METHODS, points):
        seconds, work = found[f"{method} {point.x}"], flop(point.size, method, point.r)
        rows.append(
            {
                "panel": panel,
                "method": method,
                "x": point.x,
                "tokens": point.size.tokens,
                "flop": work,
                "seconds": summary(seconds),
                "sgemm_gflops": Sgemm.gflops(found["sgemm"]),
                "limit_share": ratio(Sgemm.seconds(work, found["sgemm"]), seconds),
                "time": ratio(seconds, found[f"{method} {first.x}"])["median"],
                "tokens_of_it": point.size.tokens / first.size.tokens,
                "flop_of_it": work / flop(first.size, method, first.r),
            }
        )
    return rows


def of(rows: Rows, panel: str, method: str) -> Rows:
    """Return a panel's rows of one method."""
    return [r for r in rows if (r["panel"], r["method"]) == (panel, method)]


def per_token(row: dict[str, Any]) -> float:
    """Return microseconds per token."""
    return 1e6 * row["seconds"]["median"] / row["tokens"]


def gflops(row: dict[str, Any]) -> float:
    """Return counted operations per second, in GFLOP/s."""
    return row["flop"] / row["seconds"]["median"] / 1e9


def excess(row: dict[str, Any]) -> float:
    """Return the growth of time over the growth of tokens (batch) or of operations (r); 1 is level."""
    return row["time"] / (row["tokens_of_it"] if row["panel"] == "batch" else row["flop_of_it"])


def fitted(rows: Rows) -> tuple[float, float, float]:
    """Return (a, b, worst): the line a + b·T through µs per token, and its worst relative error.

    Least squares. Over the context the line is straight: only attention grows, quadratic in a sequence.
    """
    x, y = np.array([r["x"] for r in rows], float), np.array([per_token(r) for r in rows])
    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(np.abs(y / (a + b * x) - 1).max())


def verdicts(rows: Rows) -> list[str]:
    """Return sentences that say how far the goals are met."""
    said = []
    for method in METHODS:
        batch = [r for r in of(rows, "batch", method) if r["x"] >= START["batch"]]
        parts = []
        if batch:
            parts.append(
                f"time per token from batch {START['batch']} up at most {max(map(excess, batch)):.2f} of "
                f"that of batch {START['batch']}"
            )
        if ranks := of(rows, "r", method):
            worst = max(ranks, key=excess)
            parts.append(
                f"from r = {ranks[0]['x']} on time grows at most {excess(worst):.2f} times as fast as the "
                f"counted FLOP (r = {worst['x']})"
            )
        if contexts := of(rows, "context", method):
            a, b, error = fitted(contexts)
            parts.append(
                f"µs per token = {a:.1f} + {1e3 * b:.1f}·T/1000, within {100 * error:.0f} % at every context"
            )
        if widths := of(rows, "width", method):
            parts.append(
                "share of the sgemm rate by width: "
                + ", ".join(f"{r['x']}: {100 * r['limit_share']['median']:.0f} %" for r in widths)
            )
        said.append(f"{method}: " + "; ".join(parts) + ".")
    return said


LABELS = {
    "batch": ("sequences of 128 tokens", "µs per token"),
    "r": ("rank r", "time, in units of r = 1"),
    "context": ("tokens per sequence, 4096 per step", "µs per token"),
    "width": ("width (2 layers, 256 tokens)", "GFLOP/s"),
}


HEIGHTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "batch": per_token,
    "r": lambda row: row["time"],
    "context": per_token,
    "width": gflops,
}
"""What each panel draws of a row."""


def draw(rows: Rows) -> Any:
    """Draw four panels: growth with batch, rank, context and width.

    Batch and context show µs per token, rank shows time beside counted FLOP, width shows GFLOP/s.
    """
    from minilora.report.drawing import light_frame, new_figure
    from minilora.report.labels import GREY, METHOD_COLOURS, METHOD_NAMES

    figure = new_figure(9.0, 7.0)
    for ax, (panel, (xlabel, ylabel)) in zip(figure.subplots(2, 2).flat, LABELS.items(), strict=True):
        for method in METHODS:
            mine, colour = of(rows, panel, method), METHOD_COLOURS[method]
            if not mine:
                continue
            x = [r["x"] for r in mine]
            y = [HEIGHTS[panel](r) for r in mine]
            ax.plot(x, y, "o-", color=colour, markersize=4.5, linewidth=1.4, label=METHOD_NAMES[method])
            a, b, _ = fitted(mine)
            dashed = {
                "r": ([r["flop_of_it"] for r in mine], "counted FLOP"),
                "context": ([a + b * t for t in x], "a + b·T"),
                "width": ([r["sgemm_gflops"] for r in mine], "sgemm, 2048³"),
            }
            if panel in dashed:
                label = dashed[panel][1] if method == METHODS[-1] else None  # one entry for all methods
                ax.plot(x, dashed[panel][0], "--", color=GREY, linewidth=1, label=label)
        ticks = sorted({r["x"] for r in rows if r["panel"] == panel})
        if panel == "context":  # where a straight line must look straight
            ticks = [t for t in ticks if 8 * t >= ticks[-1]]
        else:
            ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        light_frame(ax)
        ax.legend(frameon=False, fontsize=8)
    return figure
