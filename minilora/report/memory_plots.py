"""Figures of planned memory: by method, against rank, bits, context and batch, and through one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tqdm import tqdm

from minilora.composed import PlanConfig
from minilora.config import ADAPTERS
from minilora.formats.files import writable_folder
from minilora.memory.budget import most_r
from minilora.memory.compare import compare, settings_of
from minilora.memory.ledger import HELD, PASSING, Ledger
from minilora.memory.planner import model_shape, plan, planned_twin
from minilora.memory.profile import profile
from minilora.memory.shapes import Meter, metered
from minilora.memory.twin import shape_batch
from minilora.parameters import Array
from minilora.report.drawing import new_figure, save_figure
from minilora.report.labels import METHOD_NAMES

CLASS_COLOURS = {
    "weights": "#0072B2",
    "codes": "#56B4E9",
    "scales": "#004D40",
    "offsets": "#1B8A6B",
    "absmax": "#009E73",
    "nested": "#7BCCB0",
    "code maps": "#C7E9DD",
    "adapters": "#D55E00",
    "optimizer": "#E69F00",
    "tiles": "#8C6D31",
    "gradients": "#CC79A7",
    "activations": "#CCCCCC",
    "recomputed": "#999999",
    "logits": "#F0E442",
    "temporaries": "#555555",
    "objects": "#000000",
}
"""Okabe and Ito's colours for large classes, greens for scales, greys for what one step frees again."""
COMPARED = ("full", *ADAPTERS)
POINTS = 1500
"""Largest number of moments drawn; each stands for the fullest of its neighbours."""


@dataclass(frozen=True)
class Course:
    """Live bytes through one step."""

    title: str
    moments: Array
    """Counted in allocations and frees."""
    kinds: dict[str, Array]
    """Class → bytes at each moment."""
    phases: list[tuple[int, str]]
    """(moment, what begins)."""
    end: int

    @property
    def total(self) -> Array:
        """All classes together."""
        return np.sum(list(self.kinds.values()), axis=0)


def course(config: PlanConfig) -> Course:
    """Return the live bytes of one worker through both passes, at the model's full depth.

    Every allocation and every free is one moment. Weights, adapters and optimizer states are there
    throughout. The optimizer's update, which follows, is not part of it.
    """
    ledger = plan(config)
    shape, stored = model_shape(config.model)
    c = replace(config, context=config.context or min(512, shape.context_length))
    with metered(Meter()):
        twin = planned_twin(c, shape, stored)
    meter = profile(
        twin,
        shape_batch(shape, c.batch_size, c.context or 1),
        shards=c.shards,
        checkpoint=c.gradient_checkpointing,
        accumulation=c.gradient_accumulation_steps,
        logits_chunk=c.logits_chunk,
    ).meter
    change = {kind: np.zeros(meter.clock + 1, np.int64) for kind in PASSING}
    for b in meter.log:
        changed = change[b.kind or "temporaries"]
        changed[b.born] += b.nbytes
        if b.died <= meter.clock:
            changed[int(b.died)] -= b.nbytes
    live = {kind: changed.cumsum() for kind, changed in change.items()}
    total = np.sum(list(live.values()), axis=0)
    pieces = np.array_split(np.arange(meter.clock + 1), min(POINTS, meter.clock + 1))
    fullest = np.array([piece[total[piece].argmax()] for piece in pieces])
    held = {kind: np.full(len(fullest), n) for kind, n in ledger.by_kind().items() if kind in HELD}
    kinds = held | {kind: series[fullest] for kind, series in live.items() if series.any()}
    return Course(ledger.title, fullest, kinds, _phases(meter), meter.clock)


def _phases(meter: Meter) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for moment, mark in meter.marks:
        name = next((name for name in ("head", "backward") if mark.startswith(name)), "forward")
        if not found or found[-1][1] != name:
            found.append((moment, name))
    return found


def against(config: PlanConfig) -> dict[str, dict[str, PlanConfig]]:
    """Return axis → label → the configuration with only that setting changed, as far as the model goes.

    The axes are rank, kind of weights, context and batch. They take powers of two, and all bit-widths.
    """
    adapter = config if config.method in ADAPTERS else replace(config, method="lora", subset_modules=None)
    settings = {
        name: getattr(adapter, name)
        for name in PlanConfig.__dataclass_fields__
        if name not in ("model", "method", "bits", "quant_type")
    }
    longest = model_shape(config.model)[0].context_length
    largest = most_r(config.model, {"target_modules": config.target_modules})

    def of(method: str, kind: str) -> PlanConfig:
        own = settings_of(method, settings) | ({} if method == "lora" else {"quant_type": kind})
        return PlanConfig(config.model, method, **own)

    kinds = {
        "lora": [config.dtype],
        "qlora": ["nf8", "nf4", "nf3", "nf2"],
        "qalora": ["int8", "int4", "int3", "int2"],
    }
    if adapter.use_dora:
        del kinds["qalora"]
    return {
        f"rank r ({METHOD_NAMES[adapter.method]})": {
            str(r): replace(adapter, r=r) for r in _powers(1, min(128, largest))
        },
        "weights of LoRA, QLoRA and QA-LoRA": {
            kind: of(method, kind) for method, those in kinds.items() for kind in those
        },
        f"context: tokens of a sequence ({METHOD_NAMES[config.method]})": {
            str(n): replace(config, context=n) for n in _powers(max(1, min(128, longest // 16)), longest)[:6]
        },
        f"batch: sequences ({METHOD_NAMES[config.method]})": {
            str(n): replace(config, batch_size=n) for n in _powers(1, 32)
        },
    }


def _powers(low: int, high: int) -> list[int]:
    return [low * 2**i for i in range(20) if low * 2**i <= high]


def unit(n: float) -> tuple[float, str]:
    """Return (bytes, name) of the largest decimal unit that is no larger than a number.

    >>> unit(35_065_317_376)
    (1000000000.0, 'GB')
    """
    return next(
        (size, name)
        for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if n >= size
    )


def plot_ledgers(ledgers: Mapping[str, Ledger], ax: Axes | None = None) -> Axes:
    """Draw the peak of each ledger as a stacked bar; a dash above it bounds a step of several workers."""
    ax = ax or new_figure().add_subplot()
    most = max(max(x.peak, x.bound(x.shards)) for x in ledgers.values())
    size, name = unit(min(x.peak for x in ledgers.values()))
    bottoms = np.zeros(len(ledgers))
    sums = [x.by_kind() for x in ledgers.values()]
    for kind, colour in CLASS_COLOURS.items():
        heights = np.array([kinds.get(kind, 0) / size for kinds in sums])
        if heights.any():
            ax.bar(
                range(len(ledgers)),
                heights,
                0.8,
                bottom=bottoms,
                color=colour,
                label=kind,
                edgecolor="white",
                linewidth=0.3,
            )
        bottoms += heights
    for x, (ledger, top) in enumerate(zip(ledgers.values(), bottoms, strict=True)):
        bound = ledger.bound(ledger.shards) / size
        if ledger.shards > 1:
            ax.plot([x - 0.4, x + 0.4], [bound, bound], color="black", linewidth=1.2, zorder=3)
        above = float(top)
        if ledger.shards > 1 and bound - top < 0.05 * most / size:
            above = bound  # the dash would cross the number
        ax.text(
            x,
            above + 0.008 * most / size,
            _digits(top),
            ha="center",
            va="bottom",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    ax.set_xticks(range(len(ledgers)), list(ledgers), fontsize=8.5)
    ax.set_ylim(0, 1.1 * most / size)
    ax.set_ylabel(f"peak of a step, one worker ({name})")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_course(found: Course, ax: Axes | None = None) -> Axes:
    """Draw live bytes by class through a step, with the passes named and the peak marked."""
    ax = ax or new_figure(width=9.0).add_subplot()
    total = found.total
    size, name = unit(float(total.max()))
    kinds = [kind for kind in CLASS_COLOURS if kind in found.kinds]
    ax.stackplot(
        found.moments,
        [found.kinds[kind] / size for kind in kinds],
        colors=[CLASS_COLOURS[kind] for kind in kinds],
        labels=kinds,
        linewidth=0,
    )
    top = int(total.argmax())
    x, y = found.moments[top], total[top] / size
    side = "center"
    if x > 0.8 * found.end:
        side = "right"
    elif x < 0.2 * found.end:
        side = "left"
    ax.plot([x], [y], "o", color="black", markersize=5, clip_on=False)
    ax.annotate(
        f"peak {_digits(y)} {name}",
        (x, y),
        (0, 7),
        textcoords="offset points",
        fontsize=9,
        va="bottom",
        zorder=5,
        ha=side,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
    ends = [start for start, _ in found.phases[1:]] + [found.end]
    for (start, what), end in zip(found.phases, ends, strict=True):
        if start:
            ax.axvline(start, color="black", linewidth=0.6, linestyle=(0, (4, 3)))
        ax.text(
            (start + end) / 2,
            1.0,
            what,
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.5,
        )
    ax.set_xlim(0, found.end)
    ax.set_ylim(0, 1.12 * y)
    ax.set_xlabel("course of the step: allocations and frees in order")
    ax.set_ylabel(f"live memory, one worker ({name})")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def save_memory_figures(
    model: str,
    folder: str | Path,
    method: str = "lora",
    methods: Sequence[str] = (),
    *,
    progress: bool = False,
    **settings: Any,
) -> list[Path]:
    """Write `methods`, `against` and `step` (PNG and SVG) for one configuration.

    The same configuration gives the same bytes.

    Parameters
    ----------
    methods
        What the first figure shows side by side; by default full, lora, qlora and qalora. The other two
        figures show the last of them, or `method` if none is chosen.
    settings
        Fields of `PlanConfig`.
    """
    folder = Path(folder)
    writable_folder(folder)
    shown = methods or tuple(dict.fromkeys((*COMPARED, method)))
    method = methods[-1] if methods else method
    config = PlanConfig(model, method, **settings_of(method, settings))
    panels = against(config)
    steps = tqdm(
        total=sum(map(len, panels.values())) + 2,
        desc="drawing",
        unit="plan",
        disable=None if progress else True,
    )
    ledgers: dict[str, dict[str, Ledger]] = {}
    for axis, configs in panels.items():
        ledgers[axis] = {}
        for label, c in configs.items():
            ledgers[axis][label] = plan(c)
            steps.update()
    written = _methods(compare(model, shown, **settings).ledgers, folder)
    steps.update()
    figure = new_figure(width=12.0, height=8.0)
    for ax, (axis, those) in zip(figure.subplots(2, 2).flat, ledgers.items(), strict=True):
        plot_ledgers(those, ax).set_xlabel(axis)
    handles = _legend(ledger for those in ledgers.values() for ledger in those.values())
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside right center")
    figure.suptitle(_wrapped(plan(config).title, 130), fontsize=10)
    written += save_figure(figure, folder / "against")
    figure = new_figure(width=9.5, height=4.8)
    found = course(config)
    ax = plot_course(found, figure.add_subplot())
    ax.set_title(_wrapped(found.title, 110), fontsize=9, loc="left", pad=20)
    ax.legend(
        *(side[::-1] for side in ax.get_legend_handles_labels()),
        frameon=False,
        fontsize=8.5,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    steps.update()
    steps.close()
    return written + save_figure(figure, folder / "step")


def _methods(ledgers: Mapping[str, Ledger], folder: Path) -> list[Path]:
    figure = new_figure(width=8.0)
    ax = plot_ledgers(
        {METHOD_NAMES[method]: ledger for method, ledger in ledgers.items()}, figure.add_subplot()
    )
    ax.legend(
        handles=_legend(ledgers.values()),
        frameon=False,
        fontsize=8.5,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    *others, last = [ledger.title.split(" · ") for ledger in ledgers.values()]
    common = [part for part in last if part.startswith("r = ") or all(part in other for other in others)]
    ax.set_title(_wrapped(" · ".join(common), 100), fontsize=9, loc="left")
    return save_figure(figure, folder / "methods")


def _legend(ledgers: Iterable[Ledger]) -> list[Patch | Line2D]:
    """Return a handle for each class that is at least 1/500 of some bar, top first, and one for the dash."""
    ledgers = list(ledgers)
    kinds = {kind for ledger in ledgers for kind, n in ledger.by_kind().items() if n >= ledger.peak / 500}
    handles: list[Patch | Line2D] = [
        Patch(color=colour, label=kind) for kind, colour in reversed(CLASS_COLOURS.items()) if kind in kinds
    ]
    if (shards := max(ledger.shards for ledger in ledgers)) > 1:
        handles.insert(0, Line2D([], [], color="black", linewidth=1.2, label=f"{shards} workers, at most"))
    return handles


def _wrapped(title: str, width: int) -> str:
    """Break a title between two of its parts."""
    lines = [""]
    for part in title.split(" · "):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += (" · " if lines[-1] else "") + part
    return "\n".join(lines)


def _digits(n: float) -> str:
    """Return a number with three significant digits: 9.37, 11.0, 1,053."""
    return f"{n:,.0f}" if n >= 100 else f"{n:#.3g}"
