"""Names and colours of methods, metrics and settings, and which columns make two rows different settings."""

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
    """A column that measures quality: its name, its unit, and which direction is good."""

    column: str
    name: str
    unit: str
    maximize: bool = False

    @property
    def label(self) -> str:
        """Axis label with its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: float | None, signed: bool = False) -> str:
        """Return a value as it is printed: per cent for shares, else three decimals; a dash for None."""
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
    """Return the metric of a column; an unknown column is its own name."""
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
    """Return the task asked for, or the only one in the rows."""
    tasks = sorted({str(row.get("task")) for row in rows})
    if task is None and len(tasks) == 1:
        return tasks[0]
    if task not in tasks:
        have = ", ".join(tasks) or "none"
        raise ResultsError(f"task={task!r}: choose one of those in the rows: {have}")
    return task


def main_metrics(rows: Iterable[Mapping[str, Any]], task: str) -> list[Metric]:
    """Return what to report of a task: loss and recall if it has both, else bits per byte or the loss."""
    have = {name for row in rows if row.get("task") == task for name in METRICS if row.get(name) is not None}
    if "recall" in have:
        return [METRICS["loss"], METRICS["recall"]]
    return [METRICS["bpb" if "bpb" in have else "loss"]]


def deployed_metric(rows: Iterable[Mapping[str, Any]], task: str) -> Metric:
    """Return the last main metric that the deployed weights have too; short runs have only their loss."""
    rows = list(rows)
    metrics = main_metrics(rows, task)
    for metric in reversed(metrics):
        column = f"deployed_{metric.column}"
        if any(row.get(column) is not None for row in rows if row.get("task") == task):
            return metric
    return metrics[-1]


def variant_columns(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the columns in which rows of one method, bits, quant_type and r differ.

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
    """Return how the frozen weights are stored: a type such as `nf4`, `float32`, or `as stored` in a file."""
    bits = row.get("bits")
    if row.get("method") == "base" and (row.get("effective_bits") or 32) < 32:
        return "as stored"
    return str(row.get("quant_type") or f"{bits} bits") if bits in (2, 3, 4, 8) else "float32"


def setting_name(row: Mapping[str, Any], variants: Sequence[str] = (), rank: bool = False) -> str:
    """Return a setting in a few words, such as `QLoRA nf4 r=8`.

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
