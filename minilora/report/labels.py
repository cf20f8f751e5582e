"""How the study calls and colours things, and which rows are one setting: shared by figures, tables and
reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minilora.composed import settings_in
from minilora.config import ADAPTERS, PROGRESS
from minilora.sweep.results import ResultsError
from minilora.sweep.settings import RunConfig

PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart."""
GREY = "#777777"

METHOD_NAMES = {
    "full": "full fine-tuning",
    "subset": "subset",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "qalora": "QA-LoRA",
    "base": "base",
    "quantized_base": "quantized base",
}
METHOD_COLOURS = {
    "full": "#000000",
    "subset": "#CC79A7",
    "lora": "#0072B2",
    "qlora": "#D55E00",
    "qalora": "#009E73",
    "base": GREY,
    "quantized_base": "#E69F00",
}
BIT_MARKERS = {32: "o", 8: "s", 4: "D", 3: "^", 2: "v"}


class Metric(NamedTuple):
    """A column that measures quality: how to call it, its unit, and which direction is good."""

    column: str
    name: str
    unit: str
    maximize: bool = False

    @property
    def label(self) -> str:
        """Axis label with its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: float | None, signed: bool = False) -> str:
        """Return a value as it is printed: per cent for shares, three decimals otherwise, a dash for null."""
        if value is None or value != value:
            return "–"
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.1f} %" if self.maximize else f"{value:{sign}.3f}"


METRICS = {
    metric.column: metric
    for metric in (
        Metric("loss", "held-out loss", "nats per token"),
        Metric("bpb", "bits per byte on held-out text", ""),
        Metric("recall", "attributes stated rightly", "% of held-out", True),
        Metric("exact", "exact descriptions", "% of held-out", True),
        Metric("recall_values", "unseen values stated rightly", "%", True),
        Metric("exact_values", "exact with unseen values", "%", True),
    )
}


def metric_of(column: str) -> Metric:
    """Return how to call a column, known or not."""
    return METRICS.get(column) or Metric(column, column, "")


ONE_SETTING = ("task", "method", "bits", "quant_type", "r")
"""Columns that tables and figures tell apart by themselves."""
VARIANTS = {  # columns that make two rows different settings, with the way they are written
    "group_size": "g=",
    "block_size": "block ",
    "double_quant": "double quant ",
    "target_modules": "",
    "learning_rate": "lr=",
    "lora_alpha": "alpha=",
    "lora_dropout": "dropout ",
    "use_rslora": "rsLoRA ",
    "lora_plus_ratio": "LoRA+ ",
    "use_dora": "DoRA ",
    "init_lora_weights": "start ",
    "quantizer": "",
    "subset_modules": "",
    "steps": "steps ",
    "batch_size": "batch ",
    "n_train": "n_train ",
    "n_eval": "n_eval ",
    "split": "",
    "preset": "",
}
SETTINGS = settings_in(RunConfig)
VARIANTS |= {  # every other setting, by its name
    name: f"{name} "
    for name, setting in SETTINGS.items()
    if name not in {*VARIANTS, *ONE_SETTING, "seed", "stage", "write_all"} and setting.role != PROGRESS
}


def task_of(rows: Iterable[Mapping[str, Any]], task: str | None) -> str:
    """Return the task to look at: the one asked for, or the only one there is."""
    tasks = sorted({str(row.get("task")) for row in rows})
    if task is None and len(tasks) == 1:
        return tasks[0]
    if task not in tasks:
        have = ", ".join(tasks) or "none"
        raise ResultsError(f"task={task!r}: choose one of those in the rows: {have}")
    return task


def main_metrics(rows: Iterable[Mapping[str, Any]], task: str) -> list[Metric]:
    """Return what to report of a task: loss and recall where it generates, else bits per byte (or the
    loss)."""
    have = {name for row in rows if row.get("task") == task for name in METRICS if row.get(name) is not None}
    wanted = ("loss", "recall") if "recall" in have else ("bpb",) if "bpb" in have else ("loss",)
    return [METRICS[name] for name in wanted]


def deployed_metric(rows: Iterable[Mapping[str, Any]], task: str) -> Metric:
    """Return the last of the main metrics that was measured of the deployed weights too; short runs have
    their loss only."""
    rows = list(rows)
    metrics = main_metrics(rows, task)
    have = {
        m
        for m in metrics
        if any(row.get(f"deployed_{m.column}") is not None for row in rows if row.get("task") == task)
    }
    return next((metric for metric in reversed(metrics) if metric in have), metrics[-1])


def variant_columns(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the columns, beyond method, weights, r and seed, in which rows differ that are otherwise one
    setting.

    They must join the grouping: a mean over two learning rates or two group sizes would mean nothing.

    >>> row = {"task": "python", "method": "qalora", "bits": 4, "r": 8}
    >>> variant_columns([row | {"group_size": 16}, row | {"group_size": 32}])
    ('group_size',)
    """
    seen: dict[tuple[Any, ...], Any] = {}
    found = set()
    for row in rows:
        place = tuple(row.get(name) for name in ONE_SETTING)
        for column in VARIANTS:
            value = row.get(column)
            if value is None:  # an older row: the setting did not exist yet
                value = SETTINGS[column].default
            if seen.setdefault((*place, column), value) != value:
                found.add(column)
    return tuple(column for column in VARIANTS if column in found)


def weights_name(row: Mapping[str, Any]) -> str:
    """Return how the frozen weights are stored: ``nf4``, ``int2`` …, ``float32``, or ``as stored`` in a file
    of few bits."""
    bits = row.get("bits")
    if row.get("method") == "base" and (row.get("effective_bits") or 32) < 32:
        return "as stored"
    return str(row.get("quant_type") or f"{bits} bits") if bits in (2, 3, 4, 8) else "float32"


def setting_name(row: Mapping[str, Any], variants: Sequence[str] = (), rank: bool = False) -> str:
    """Return a setting in a few words: ``QLoRA nf4 r=8``.

    >>> setting_name({"method": "qlora", "bits": 4, "quant_type": "nf4", "r": 8}, rank=True)
    'QLoRA nf4 r=8'
    """
    words = [METHOD_NAMES.get(row["method"], str(row["method"]))]
    if weights_name(row) != "float32":
        words.append(weights_name(row))
    if rank and row["method"] in ADAPTERS:
        words.append(f"r={row['r']}")
    words += [f"{VARIANTS[name]}{row[name]}" for name in variants if row.get(name) is not None]
    return " ".join(words)
