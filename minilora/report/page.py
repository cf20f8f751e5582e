"""The page of a run folder and the table of a terminal: what the rows say, in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilora.config import ADAPTERS
from minilora.formats.files import write_file
from minilora.report.analysis import plot_rank_of_runs
from minilora.report.drawing import save_figure
from minilora.report.findings import findings
from minilora.report.labels import (
    METHOD_NAMES,
    METRICS,
    Metric,
    deployed_metric,
    main_metrics,
    setting_name,
    variant_columns,
    weights_name,
)
from minilora.report.plots import save_figures
from minilora.report.series import MIB
from minilora.report.statistics import summarize
from minilora.sweep.presets import LEARNING_RATES, choose_learning_rates
from minilora.sweep.results import MEMORY_CLASSES, Row, check_one_corpus, successful, write_csv
from minilora.tables import markdown_table, text_table

TERMINAL = 100
"""Characters of a line, up to which a table is printed with all its columns."""

FIGURES = {
    "rank": (
        "Quality against rank",
        "Large markers are means over seeds. Dots beside them are single runs, bars 95 % t-intervals (from "
        "three seeds on). Dashed lines have no rank: full fine-tuning, subset, and the base without "
        "training. Lower loss and bits per byte are better, and higher recall.",
    ),
    "memory": (
        "Memory while training",
        "Bytes by class: frozen weights with their scales, offsets and code maps; adapters; and what "
        "training adds. That is gradients and optimizer state, for trainable parameters only, and the "
        "activations saved for the backward pass.",
    ),
    "accuracy_memory": (
        "Accuracy against memory",
        "Each point is one setting, a mean over seeds. The grey line is the Pareto front: no trained "
        "setting is better in both directions than a point on it.",
    ),
    "deployed": (
        "With the adapter, and deployed",
        "Filled: the frozen base with its adapter beside it. Hollow: one set of weights, as one would ship "
        "it. LoRA merges into float32. QLoRA merges and rounds to the same bits again, which costs "
        "accuracy. QA-LoRA merges exactly, into the offsets.",
    ),
    "learning_rate": (
        "The learning-rate search",
        "One run for each learning rate of the grid, method and task. It uses the validation split, and a "
        "seed that the study does not use.",
    ),
}
"""For each figure its heading and its caption."""

RANK_VISIBLE = (
    "Above: singular values of the update ΔW of one weight. The effective rank is the exponential of their "
    "entropy. Below: how much of the first i directions of one adapter's A lies in the first j of another's "
    "(φ of the LoRA paper, §7.2). The panels compare two ranks, two seeds, and random matrices, which show "
    "what chance alone gives."
)


class Column(NamedTuple):
    """One column of the result table."""

    title: str
    cells: list[str]


def result_columns(rows: Iterable[Mapping[str, Any]], task: str) -> list[Column]:
    """Return the result table of one task: a line for each setting, means over seeds.

    ± is half the 95 % t-interval, from three seeds on.

    Raises
    ------
    ResultsError
        Rows of different corpora or bases are mixed.
    """
    rows = successful(rows, task=task)
    check_one_corpus(rows)
    variants = variant_columns(rows)
    by = ("method", "bits", "r", "quant_type", *variants)
    for row in rows:
        row["mib"] = sum(row.get(column) or 0 for column in MEMORY_CLASSES) / MIB
    settings: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        settings.setdefault(tuple(row.get(name) for name in by), row)
    order = sorted(settings, key=lambda place: _table_order(settings[place]))
    lines = [settings[place] for place in order]

    def cells(value: str, metric: Metric | None = None, form: str = ".1f") -> list[str]:
        found = {tuple(group[name] for name in by): group for group in summarize(rows, by, value)}
        return [_cell(found.get(place), metric, form) for place in order]

    seeds = [sum(tuple(row.get(name) for name in by) == place for row in rows) for place in order]
    columns = [
        Column(
            "method", [setting_name(row | {"bits": 32}, variants) for row in lines]
        ),  # without the weights
        Column("weights", [weights_name(row) for row in lines]),
        Column("r", [str(row["r"]) if row["method"] in ADAPTERS else "" for row in lines]),
        Column("seeds", [str(count) for count in seeds]),
    ]
    for metric in main_metrics(rows, task):
        columns.append(Column(metric.column, cells(metric.column, metric)))
    if any(row.get("recall_values") is not None for row in rows):
        columns.append(Column("unseen", cells("recall_values", METRICS["recall_values"])))
    metric = deployed_metric(rows, task)
    columns += [
        Column(f"deployed {metric.column}", cells(f"deployed_{metric.column}", metric)),
        Column("bits/w", cells("effective_bits", form=".2f")),
        Column("trainable", [f"{row.get('trainable_params') or 0:,}" for row in lines]),
        Column("MiB", cells("mib")),
        Column("s/run", cells("seconds", form=".0f")),
    ]
    return [column for column in columns if any(cell not in ("", "–") for cell in column.cells)]


def _table_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    place = ["base", "quantized_base", "full", "subset", *ADAPTERS].index(row["method"])
    return place, str(row.get("quant_type") or "").rstrip("0123456789"), -row["bits"], row.get("r") or 0


def _cell(group: Row | None, metric: Metric | None, form: str) -> str:
    if group is None:
        return "–"
    if metric is None:
        return f"{group['mean']:{form}}"
    text = metric.text(group["mean"])
    if group["n"] < 3:
        return text
    half = group["high"] - group["mean"]
    return f"{text.removesuffix(' %')} ± {100 * half:.1f} %" if metric.maximize else f"{text} ± {half:.3f}"


def format_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the result tables of all tasks as aligned text, followed by the failed runs.

    Less important columns are left out until a table fits 100 characters.

    Raises
    ------
    ResultsError
        Rows of different corpora or bases are mixed.
    """
    rows = list(rows)
    parts = []
    for task in _tasks(rows):
        columns = result_columns(rows, task)
        table = text_table(*_transposed(columns))
        for title in ("s/run", "seeds", "trainable", "unseen"):  # the page has all columns
            if max(map(len, table.splitlines())) > TERMINAL:
                columns = [column for column in columns if column.title != title]
                table = text_table(*_transposed(columns))
        parts.append(f"task {task} ({_split(rows, task)} split)\n{table}")
    failed = [row for row in rows if row.get("status") == "failed"]
    if failed:
        lines = [f"  {_run_name(row)}: {row.get('error')}" for row in failed]
        parts.append("\n".join([f"{len(failed)} failed:", *lines]))
    return "\n\n".join(parts) or "no finished runs"


def _transposed(columns: Sequence[Column]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return (heads, rows)."""
    return [title for title, _ in columns], list(zip(*(cells for _, cells in columns), strict=True))


def write_report(
    rows: Iterable[Mapping[str, Any]],
    folder: str | Path,
    title: str = "A sweep",
    intro: str = "",
    command: str | None = None,
) -> Path:
    """Write `README.md`, `results.csv` and the figures into a folder, and return the path of the page.

    The page has findings, tables, how to read them, and provenance.

    Parameters
    ----------
    folder
        The folder of the sweep; the runs that it kept are in its `runs/`.
    intro
        Markdown below the title.
    command
        The command line that made the rows.

    Raises
    ------
    ResultsError
        Rows of different corpora or bases are mixed.
    """
    rows = [dict(row) for row in rows]
    check_one_corpus(rows)
    folder = Path(folder)
    figures = save_figures(rows, folder)
    write_csv(rows, folder / "results.csv")
    parts = [f"# {title}", intro.strip(), _counts(rows)]
    said = findings(rows)
    if said:
        parts.append("## What the rows show")
        parts.append(
            "Means over seeds. Differences are paired by seed. Their 95 % t-interval stands in brackets, "
            "from three seeds on; *clear* says that it leaves out zero."
        )
    for (task, metric), sentences in said.items():
        better = "more" if metric.maximize else "less"
        parts.append(
            f"### {task}: {metric.name} ({metric.unit + ', ' if metric.unit else ''}{better} is better)"
        )
        parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    for task in _tasks(rows):
        parts += [f"## Results: {task}", markdown_table(*_transposed(result_columns(rows, task)))]
    parts += ["How to read the columns:", _how_to_read(rows)]
    for name, (heading, text) in FIGURES.items():
        if any(path.stem == name for path in figures.paths):
            parts += [f"## {heading}", f"![{heading}]({name}.png)", text]
        if name == "learning_rate":
            parts += _search(rows)
    visible, reasons = _rank_visible(rows, folder)
    parts += visible
    if skipped := figures.skipped | reasons:
        parts += ["Not drawn:", "\n".join(f"- {name}: {reason}" for name, reason in skipped.items())]
    failed = [row for row in rows if row.get("status") == "failed"]
    if failed:
        parts += ["## Failed runs", "\n".join(f"- {_run_name(row)}: {row.get('error')}" for row in failed)]
    parts += ["## Where it comes from", _provenance(rows, command)]
    return write_file(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _rank_visible(rows: Sequence[Mapping[str, Any]], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Draw `plot_rank_of_runs` for each task whose runs are kept; else an older figure stays."""
    parts: list[str] = []
    skipped: dict[str, str] = {}
    for task in _tasks(rows):
        name = f"rank_visible_{task}"
        try:
            save_figure(plot_rank_of_runs(rows, folder, task=task), folder / name)
        except ValueError as error:
            if not (folder / f"{name}.png").exists():
                skipped[name] = str(error)
                continue
        parts.append(f"![Rank made visible: {task}]({name}.png)")
    return (["## Rank made visible", *parts, RANK_VISIBLE] if parts else []), skipped


def _tasks(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({row["task"] for row in successful(rows)})


def _split(rows: Iterable[Mapping[str, Any]], task: str) -> str:
    return ", ".join(sorted({str(row.get("split")) for row in successful(rows, task=task)}))


def _run_name(row: Mapping[str, Any]) -> str:
    rate = f" lr={row['learning_rate']:g}" if row.get("learning_rate") is not None else ""
    return f"{setting_name(row, rank=True)}{rate} seed={row.get('seed')} {row.get('task')}"


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    searched = sum(row.get("stage") == "search" for row in rows)
    failed = sum(row.get("status") == "failed" for row in rows)
    text = f"{len(rows)} rows"
    if searched:
        text += f", of which {searched} of the learning-rate search"
    if failed:
        text += f"; {failed} failed"
    seeds = max(len({row["seed"] for row in successful(rows, method=method)}) for method in METHOD_NAMES)
    if seeds < 3:
        noise = "One or two seeds: differences may be noise, and there are no intervals."
    else:
        noise = f"{seeds} seeds; ± is half the 95 % t-interval of the mean over seeds."
    files = "All rows are in [results.csv](results.csv) and [results.jsonl](results.jsonl)."
    return f"{text}. {noise} {files}"


def _how_to_read(rows: Sequence[Mapping[str, Any]]) -> str:
    have = {name for row in successful(rows) for name in row if row.get(name) is not None}
    lines = {
        "loss": "**loss**: cross-entropy on held-out data, in nats per token",
        "bpb": "**bpb**: bits per byte of held-out text",
        "recall": "**recall**: share of attributes stated rightly in generated texts of unseen combinations",
        "recall_values": "**unseen**: the same for attribute values that never occur in training",
        "deployed_loss": "**deployed …**: the same measure after merging into one set of weights",
        "effective_bits": "**bits/w**: bits per weight of the frozen base, scales and offsets included",
        "trainable_params": "**trainable**: parameters that training changes",
        "bytes_weights": "**MiB**: weights, adapters, gradients, optimizer state, saved activations",
        "seconds": "**s/run**: training and evaluation together",
    }
    return "\n".join(f"- {text}" for name, text in lines.items() if name in have)


def _search(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of the learning-rate search, and a warning for each choice on the edge of the grid."""
    choices = choose_learning_rates(rows)
    if not choices:
        return []
    rates = sorted({rate for choice in choices for rate, _ in choice.tried} or set(LEARNING_RATES))
    columns = [Column("task", [choice.task for choice in choices])]
    columns.append(Column("method", [METHOD_NAMES[choice.method] for choice in choices]))
    for rate in rates:
        cells = []
        for choice in choices:
            loss = dict(choice.tried).get(rate)
            text = "failed" if loss is None and rate in dict(choice.tried) else METRICS["loss"].text(loss)
            cells.append(f"**{text}**" if rate == choice.learning_rate else text)
        columns.append(Column(f"lr {rate:g}", cells))
    parts = [markdown_table(*_transposed(columns)), "Validation loss; the choice is bold."]
    for choice in choices:
        if choice.on_edge:
            end = "greatest" if choice.learning_rate == choice.tried[-1][0] else "least"
            chosen = f"{METHOD_NAMES[choice.method]} on {choice.task} chose {choice.learning_rate:g}"
            parts.append(
                f"**On the edge of the grid:** {chosen}, the {end} value tried; a better one may lie outside."
            )
    return parts


def _provenance(rows: Sequence[Mapping[str, Any]], command: str | None) -> str:
    lines = [f"- command: `{command}`"] if command else []
    names = {
        "machine": "machine",
        "python_version": "Python",
        "numpy_version": "NumPy",
        "numba_version": "Numba",
        "minilora_version": "minilora",
        "base_sha256": "SHA-256 of the base",
    }
    for column, name in names.items():
        values = sorted({str(row[column]) for row in rows if row.get(column) is not None})
        if values:
            lines.append(f"- {name}: {', '.join(values)}")
    for task in sorted({str(row.get("task")) for row in rows}):
        hashes = sorted(
            {row["corpus_sha256"] for row in rows if row.get("corpus_sha256") and row.get("task") == task}
        )
        lines += [f"- SHA-256 of the data of {task}: {value}" for value in hashes]
    seconds = sum(row.get("seconds") or 0 for row in rows)
    if seconds:
        lines.append(f"- all runs together: {seconds / 60:.0f} minutes of one core")
    return "\n".join(lines)
