"""What the rows show, as sentences: paired differences, and whether they exceed the noise between seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from minilora.config import ADAPTERS
from minilora.report.labels import Metric, main_metrics, setting_name, variant_columns
from minilora.report.series import MIB, deployed_pairs
from minilora.report.statistics import mean_interval, paired_difference
from minilora.sweep.results import Row, successful

Rows = Sequence[Mapping[str, Any]]


def findings(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, Metric], list[str]]:
    """Return sentences about the base, rank, bits, deployment and memory, by task and metric.

    A difference is called clear when its 95 % t-interval over at least three paired seeds leaves out zero.
    Settings that occur in several variants (two learning rates, two group sizes …) are left to the table.
    """
    rows = successful(rows)
    found: dict[tuple[str, Metric], list[str]] = {}
    for task in sorted({row["task"] for row in rows}):
        here = [row for row in rows if row["task"] == task]
        if variant_columns(here):
            continue
        metrics = main_metrics(here, task)
        for metric in metrics:
            told = [
                _base(here, metric),
                *_against_full(here, metric),
                *_rank(here, metric),
                *_bits(here, metric),
            ]
            told += _deployed(here, metric, task)
            found[task, metric] = [sentence for sentence in told if sentence]
        found[task, metrics[-1]] += _memory(here)
    return {case: sentences for case, sentences in found.items() if sentences}


def compare(a: Rows, b: Rows, metric: Metric, column: str | None = None) -> str:
    """Return in words how `a` differs from `b`: the difference, its interval, and whether it is clear."""
    column = column or metric.column
    difference = paired_difference(a, b, column)
    text = metric.text(difference.mean, signed=True).replace(" %", " points")
    if all(float(metric.text(x, signed=True).split()[0]) == 0 for x in difference[:3] if x == x):
        return "no difference in the digits shown"
    if len(difference.seeds) < 3:
        seeds = "1 seed" if len(difference.seeds) == 1 else f"{len(difference.seeds)} seeds"
        return f"{text} ({seeds}, no interval)"
    low, high = (metric.text(end, signed=True).replace(" %", "") for end in (difference.low, difference.high))
    clear = difference.low > 0 or difference.high < 0
    return f"{text} [{low}, {high}], {'clear' if clear else 'not told apart from the noise between seeds'}"


def _mean(rows: Rows, metric: Metric, column: str | None = None) -> str:
    return metric.text(mean_interval([row[column or metric.column] for row in rows]).mean)


def _pick(rows: Rows, metric: Metric, **where: Any) -> list[Row]:
    found = [dict(row) for row in rows if all(row.get(name) == value for name, value in where.items())]
    return [row for row in found if row.get(metric.column) is not None]


def _base(rows: Rows, metric: Metric) -> str:
    base, full = _pick(rows, metric, method="base"), _pick(rows, metric, method="full")
    if not (base and full):
        return ""
    return f"The base has {_mean(base, metric)}, full fine-tuning {_mean(full, metric)}."


def _against_full(rows: Rows, metric: Metric) -> list[str]:
    full = _pick(rows, metric, method="full")
    sentences = []
    for method in ADAPTERS:
        mine = _pick(rows, metric, method=method)
        if not (mine and full):
            continue
        widths = {row["bits"] for row in mine}
        bits = 4 if 4 in widths else max(widths)  # LoRA has 32 only
        ranks = {row["r"] for row in mine if row["bits"] == bits}
        r = 8 if 8 in ranks else min(ranks)
        chosen = _pick(mine, metric, r=r, bits=bits)
        share = 100 * chosen[0]["trainable_params"] / full[0]["trainable_params"]
        sentences.append(
            f"{setting_name(chosen[0], rank=True)} against full fine-tuning, with {share:.1f} % of its "
            f"trainable parameters: {compare(chosen, full, metric)}."
        )
    return sentences


def _rank(rows: Rows, metric: Metric) -> list[str]:
    sentences = []
    for method in ADAPTERS:
        mine = _pick(rows, metric, method=method)
        for bits in sorted({row["bits"] for row in mine}, reverse=True):
            ranks = sorted({row["r"] for row in mine if row["bits"] == bits})
            if len(ranks) > 1:
                low, high = (_pick(mine, metric, bits=bits, r=r) for r in (ranks[0], ranks[-1]))
                change = f"from r = {ranks[0]} to r = {ranks[-1]}"
                sentences.append(f"{setting_name(low[0])}, {change}: {compare(high, low, metric)}.")
    return sentences


def _bits(rows: Rows, metric: Metric) -> list[str]:
    sentences = []
    for method in ("qlora", "qalora"):
        mine = _pick(rows, metric, method=method)
        for r in sorted({row["r"] for row in mine}):
            widths = sorted({row["bits"] for row in mine if row["r"] == r})
            for less, more in reversed(list(pairwise(widths))):
                low, high = (_pick(mine, metric, r=r, bits=bits) for bits in (less, more))
                name = setting_name({**low[0], "bits": 32}, rank=True)
                sentences.append(f"{name}, from {more} to {less} bits: {compare(low, high, metric)}.")
    return sentences


def _deployed(rows: Rows, metric: Metric, task: str) -> list[str]:
    sentences = []
    for pair in deployed_pairs(rows, metric.column, task):
        if pair["bits"] == 32:
            continue
        mine = _pick(rows, metric, method=pair["method"], bits=pair["bits"], r=pair["r"])
        after = [row | {metric.column: row[f"deployed_{metric.column}"]} for row in mine]
        name = setting_name(mine[0], rank=True)
        sentences.append(f"{name}, deployed against with its adapter: {compare(after, mine, metric)}.")
    return sentences


def _memory(rows: Rows) -> list[str]:
    """Compare memory with full fine-tuning: that of the frozen base, and that of training itself."""
    kept = ("bytes_weights", "bytes_scales_offsets", "bytes_code_maps")
    added = ("bytes_adapters", "bytes_gradients", "bytes_optimizer", "bytes_activations")

    def total(row: Mapping[str, Any], columns: Sequence[str]) -> float:
        return sum(row.get(column) or 0 for column in columns) / MIB

    full = [row for row in rows if row["method"] == "full" and row.get("bytes_weights") is not None]
    sentences = []
    for method in ADAPTERS:
        mine = [row for row in rows if row["method"] == method and row.get("bytes_weights") is not None]
        if not (mine and full):
            continue
        row = min(mine, key=lambda row: (abs(row["r"] - 8), abs(row["bits"] - 4), row["seed"]))
        sentences.append(
            f"{setting_name(row, rank=True)} holds {total(row, kept):.1f} MiB of frozen weights and "
            f"{total(row, added):.1f} MiB for training; full fine-tuning {total(full[0], kept):.1f} and "
            f"{total(full[0], added):.1f} MiB."
        )
    return sentences
