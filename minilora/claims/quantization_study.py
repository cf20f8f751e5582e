"""What a model loses when it is quantized, and one weight of it: errors, loss, bytes in memory and in a file.

Two questions have different answers. How far is Ŵ from W (`weight_errors`)? Rounding to the nearest code is
best at that. How much does the loss rise (`model_table`)? There GPTQ can win with a larger error of the
weights, because it keeps the error away from the inputs that are used.

Noise is stated twice: over calibration samples (seeds), and paired over held-out batches. Only a difference
beyond both counts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.config import QuantConfig, require
from minilora.data.tasks import Batch, Task, make_task
from minilora.formats.checkpoint import load_base, sha256
from minilora.formats.files import writable_folder, write_file
from minilora.memory import effective_bits
from minilora.parameters import Array
from minilora.quant.model import find_linear, input_hessian, quantize_model
from minilora.report.quantization_tables import (
    format_model_losses,
    format_weight_errors,
    number,
    quantizer_name,
)
from minilora.report.statistics import Interval, mean_interval
from minilora.sweep.environment import environment
from minilora.sweep.results import Row
from minilora.sweep.run_models import unpadded
from minilora.sweep.weight_errors import (
    block_errors,
    crossover,
    level_data,
    settings,
    size_rows,
    weight_errors,
)
from minilora.threads import Workers, available_threads
from minilora.training.allocator import keep_freed_memory
from minilora.training.evaluation import evaluate
from minilora.transformer import Transformer

Calibration = Callable[[np.random.Generator], Sequence[Array]]
"""Picks token ids (B, T), batch by batch, with the generator that it is given."""

BITS = (2, 3, 4)
CONFIGS = tuple(
    config
    for bits in BITS
    for config in (
        *(QuantConfig(f"int{bits}", quantizer=quantizer) for quantizer in ("rtn", "hqq", "gptq")),
        *(QuantConfig(f"int{bits}", fit=fit) for fit in ("symmetric", "mse")),
        QuantConfig(f"int{bits}", quantizer="gptq", fit="mse"),
        *(QuantConfig(f"nf{bits}", quantizer=quantizer) for quantizer in ("rtn", "gptq")),
    )
)
"""What the study compares on whole models: integers in groups of 32, NormalFloats in double-quantized blocks
of 64."""
WEIGHT = "layers.1.mlp.down_proj"
"""The weight that the study looks at alone: (128, 512) in the shipped base."""
FIGURES = {
    "levels": (
        "Levels over the weights. The histogram shows w/absmax of its block (codebooks), or the place "
        "between the first and the last level of its group (integers). Lines are the levels that the codes "
        "stand for. *mse* narrows the range and clips."
    ),
    "blocks": (
        "Error of each block against its largest weight. Levels are fractions of the scale, so one outlier "
        "makes its whole block coarse: the dots follow the line through 0. NF4's levels are dense near 0, "
        "where most weights of a block with an outlier are, and its error grows more slowly."
    ),
    "errors": (
        "Error against effective bits. Along a line the block grows from 32 to 4096 (codebooks, "
        "double-quantized) or the group from 16 to 128 (integers), and the bits per weight fall. GPTQ's "
        "blocks must lie within rows."
    ),
    "bytes": (
        "What scales cost. Left: in memory. Right: one tensor in bitsandbytes' file, where each tensor "
        "carries its own code maps."
    ),
}
"""Name → what the figure shows, as the page says it."""
COMMAND = (
    'python -c "from minilora.claims.quantization_study import quantization_study; '
    "quantization_study('{folder}')\""
)


# ---- calibration


def calibration_of(task: Task, sequences: int = 64) -> Calibration:
    """Return a function that picks `sequences` training examples of a task, without padding.

    GPTQ would take padded positions for inputs that matter: its results would scatter more between samples.
    """

    def pick(rng: np.random.Generator) -> list[Array]:
        return unpadded(task, rng.choice(task.n_train, min(sequences, task.n_train), replace=False))

    return pick


# ---- a whole model


def model_table(
    model: Transformer,
    calibration: Calibration,
    eval_batches: Sequence[Batch],
    configs: Sequence[QuantConfig],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    threads: int = 1,
    progress: bool = False,
) -> list[Row]:
    """Return the held-out loss of a model quantized in each way; the first row is the model itself.

    The loss is a ratio Σ nats / Σ tokens, so the interval over batches is that of a ratio
    (`paired_over_batches`).

    Parameters
    ----------
    calibration
        Picks token ids (B, T) for GPTQ, once for each seed.

    Returns
    -------
    rows
        Losses are in nats per token.

        - `loss`, the mean over seeds; `loss_half`, half its 95 % t-interval over seeds (None without GPTQ or
          with one seed)
        - `above` = loss − the model's own; `above_half`, half its interval, paired over batches
        - `improvement` = loss of plain rounding (`rtn`, `minmax`, same storage) − loss; `improvement_half`,
          paired over batches; `improvement_seeds_half`, over seeds
        - `verdict`: `better` or `worse` than rounding if the difference exceeds both halves, else `unclear`
    """
    counts = np.array([int(batch.mask.sum()) for batch in eval_batches])
    require(
        counts.size > 0 and bool((counts > 0).all()),
        "eval_batches",
        counts.tolist(),
        "each needs a target that counts",
    )
    plain = {config: _plain_rounding(config) for config in configs}
    jobs = [
        (config, seed)
        for config in dict.fromkeys([*configs, *plain.values()])
        for seed in (seeds if config.quantizer == "gptq" else (None,))
    ]
    samples = {
        seed: calibration(np.random.default_rng(seed)) for seed in seeds if any(seed == s for _, s in jobs)
    }
    lock = threading.Lock()

    def nats(changed: Transformer) -> Array:  # of each batch
        return np.array([evaluate(changed, [batch])["loss"] for batch in eval_batches]) * counts

    with tqdm(total=len(jobs), desc="quantize and evaluate", unit="model", disable=not progress) as bar:

        def one(job: tuple[QuantConfig, int | None]) -> tuple[float, Array, float]:
            start = time.perf_counter()
            config, seed = job
            changed = quantize_model(model, config, () if seed is None else samples[seed])
            found = effective_bits(changed), nats(changed), time.perf_counter() - start
            with lock:
                bar.update()
            return found

        with Workers(threads) as workers:
            done = dict(zip(jobs, workers.map(one, jobs), strict=True))
    base = nats(model)
    common = {"batches": counts.size, "tokens": int(counts.sum())}
    rows = [
        dict.fromkeys(settings(QuantConfig()))
        | {"bits": 32, "effective_bits": effective_bits(model), "loss": float(base.sum() / counts.sum())}
        | common
    ]
    for config in configs:
        runs = [done[job] for job in jobs if job[0] == config]
        sums, rounded = np.array([run[1] for run in runs]), done[plain[config], None][1]
        row = settings(config) | {"effective_bits": runs[0][0], "seeds": len(runs)}
        losses = sums.sum(axis=1) / counts.sum()
        row["losses"] = losses.tolist()
        row["loss"], row["loss_half"] = _half(mean_interval(losses))
        row["above"], row["above_half"] = _half(paired_over_batches(sums.mean(axis=0) - base, counts))
        row["full_precision_loss"] = rows[0]["loss"]
        if config != plain[config]:
            better = rounded - sums
            row["improvement"], row["improvement_half"] = _half(
                paired_over_batches(better.mean(axis=0), counts)
            )
            row["improvement_seeds_half"] = _half(mean_interval(better.sum(axis=1) / counts.sum()))[1]
            row["verdict"] = _verdict(row)
        rows.append(row | common | {"seconds": sum(run[2] for run in runs)})
    return rows


def _plain_rounding(config: QuantConfig) -> QuantConfig:
    """Return the configuration of the same storage that rounds to the nearest code."""
    without_gptq = replace(config, desc_act=False, static_groups=False, damp_percent=0.01)
    return replace(without_gptq, quantizer="rtn", fit="minmax")


def paired_over_batches(differences: Array, counts: Array) -> Interval:
    """Return D = Σ d_b / Σ c_b with its 95 % t-interval over n batches.

    For a ratio, the values v_b = D + n·(d_b − D·c_b)/Σ c have the mean D and, to first order, its scatter.
    With equal counts they are the means of the batches.

    Parameters
    ----------
    differences
        d (n,), in nats.
    counts
        c (n,), in tokens.

    Examples
    --------
    >>> [round(x, 3) for x in paired_over_batches(np.array([10.0, 20.0, 30.0]), np.array([10, 10, 10]))]
    [2.0, -0.484, 4.484]
    """
    mean = differences.sum() / counts.sum()
    return mean_interval(mean + counts.size * (differences - mean * counts) / counts.sum())


def _half(interval: Interval) -> tuple[float, float | None]:
    half = interval.high - interval.mean
    return interval.mean, None if np.isnan(half) else half


def _verdict(row: Row) -> str:
    halves = [row["improvement_half"]]
    if row["quantizer"] == "gptq":
        halves.append(row["improvement_seeds_half"])
    if None in halves:
        return "no interval"
    if abs(row["improvement"]) <= max(halves):
        return "unclear"
    return "better" if row["improvement"] > 0 else "worse"


# ---- the study


def weight_configs(in_features: int) -> list[QuantConfig]:
    """Return every type, block and group size that one weight with this many inputs is measured with."""
    found = []
    for block in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        found += [QuantConfig(name, block_size=block) for name in ("nf2", "nf3", "nf4", "fp4")]
        if in_features % block == 0:  # GPTQ's blocks lie within rows
            found += [QuantConfig(f"nf{bits}", block_size=block, quantizer="gptq") for bits in BITS]
    for group in (size for size in (16, 32, 64, 128) if in_features % size == 0):
        found += [
            QuantConfig(f"int{bits}", group_size=group, quantizer=quantizer)
            for bits in BITS
            for quantizer in ("rtn", "hqq", "gptq")
        ]
        found += [
            QuantConfig(f"int{bits}", group_size=group, quantizer=quantizer, fit=fit)
            for bits in BITS
            for quantizer, fit in (("rtn", "symmetric"), ("rtn", "mse"), ("gptq", "mse"))
        ]
    return found


@dataclass(frozen=True)
class QuantizationStudy:
    """What `quantization_study` quantizes, and on which examples it measures the loss."""

    tasks: tuple[str, ...] = ("products", "python")
    configs: tuple[QuantConfig, ...] = CONFIGS
    """How the whole model is quantized."""
    weight: str = WEIGHT
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws the training examples that GPTQ calibrates on."""
    sequences: int = 48
    """Examples that GPTQ calibrates on, for each seed."""
    n_eval: int = 128
    """Examples of the test split that the loss is measured on."""
    eval_batch_size: int = 8


def quantization_study(
    folder: str | Path,
    study: QuantizationStudy | None = None,
    *,
    model: Transformer | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Quantize one weight and the whole base in every way; write rows, a page and figures into `folder`.

    The files are `quantization.jsonl`, `README.md`, `levels.png`, `blocks.png`, `errors.png`, `bytes.png` and
    `loss.png`, each written whole or not at all. The study takes some minutes on two cores.

    Parameters
    ----------
    study
        What is quantized; by default everything that the committed page shows.
    model
        By default the shipped base.

    Returns
    -------
    rows
        Rows of `weight_errors`, `model_table` and `size_rows`, told apart by `part`.
    """
    from minilora.report import quantization_plots as plots  # matplotlib takes a second to load
    from minilora.report.drawing import save_figure

    study = study or QuantizationStudy()
    folder = Path(folder)
    writable_folder(folder)
    keep_freed_memory()
    start = time.perf_counter()
    base = load_base() if model is None else model
    linear = find_linear(base, study.weight)
    made = {"command": COMMAND.format(folder=folder), "base_sha256": sha256(base)} | environment()
    parts: dict[str, list[Row]] = {"weight": [], "model": [], "size": size_rows()}
    for name in study.tasks:
        task = make_task(name, n_eval=study.n_eval)
        pick = calibration_of(task, study.sequences)
        batches = task.eval_batches("test", study.eval_batch_size)
        rows = model_table(
            base,
            pick,
            batches,
            study.configs,
            study.seeds,
            threads=threads or available_threads(),
            progress=progress,
        )
        common = {
            "task": name,
            "split": "test",
            "n_eval": study.n_eval,
            "calibration_sequences": study.sequences,
            "corpus_sha256": task.sha256,
        }
        parts["model"] += [common | row for row in rows]
    w = linear.weight.dense()
    # on the last task's training split
    hessian = input_hessian(base, linear.name, pick(np.random.default_rng(study.seeds[0])))
    errors = weight_errors(w, weight_configs(w.shape[1]), hessian)
    parts["weight"] = [{"weight": linear.name, "task": name} | row for row in errors]
    rows = [{"part": part} | row | made for part, found in parts.items() for row in found]
    shown = [QuantConfig(kind) for kind in ("nf4", "fp4", "int4", "nf2", "int2")]
    shown.append(QuantConfig("int2", fit="mse"))
    by_block = [QuantConfig(kind, block_size=64, group_size=64) for kind in ("nf4", "int4")]
    figures = {
        "levels": plots.draw_levels([level_data(w, config) for config in shown]),
        "blocks": plots.draw_blocks([block_errors(w, config) for config in by_block]),
        "errors": plots.draw_errors(parts["weight"], plots.WEIGHT_SERIES),
        "bytes": plots.draw_bytes(parts["size"], crossover()),
        "loss": plots.draw_losses(parts["model"]),
    }
    for name, figure in figures.items():
        save_figure(figure, folder / name, ["png"])
    write_file(
        folder / "quantization.jsonl",
        "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows),
    )
    write_file(folder / "README.md", page(rows, time.perf_counter() - start))
    return rows


def findings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what the rows of `model_table` show against plain rounding and against full precision."""
    rows = [row for row in rows if row["quant_type"] is not None]
    texts = {
        "better": "Less loss than plain rounding, beyond both intervals",
        "worse": "**More** loss than plain rounding, beyond both intervals",
        "unclear": "**Rounding not beaten**: no difference from plain rounding beyond the intervals",
    }
    said = []
    for verdict, text in texts.items():
        names = [
            f"{quantizer_name(row)} ({number(row['improvement'], '+.4f')})"
            for row in rows
            if row.get("verdict") == verdict
        ]
        said.append(f"{text}: {'; '.join(names) or 'none'}.")
    below = []
    for row in rows:
        if row["above"] < 0:
            noise = f"± {number(row['above_half'], '.4f')} over batches"
            if row["quantizer"] == "gptq":
                noise += f", ± {number(row['loss_half'], '.4f')} over seeds"
            below.append(f"{quantizer_name(row)} ({row['above']:+.4f} {noise})")
    least = [
        min((row for row in rows if row["bits"] == bits), key=lambda row: row["loss"])
        for bits in sorted({row["bits"] for row in rows})
    ]
    named = "; ".join(f"{quantizer_name(row)} ({row['above']:+.4f} above float32)" for row in least)
    said.append(f"Least loss with each number of bits: {named}.")
    return [*said, f"Below the loss of full precision: {'; '.join(below) or 'none'}."]


def gptq_against_rtn(rows: Iterable[Mapping[str, Any]]) -> tuple[int, int, int]:
    """Count in the rows of `weight_errors` how often GPTQ's errors are larger than those of plain rounding.

    Returns
    -------
    pairs, larger, smaller
        Settings that have both; of these, settings with a larger error of W, and with a smaller one of the
        outputs.
    """
    place = ("quant_type", "block_size", "group_size", "double_quant", "offset_dtype")
    sides: dict[str, dict[tuple[Any, ...], Mapping[str, Any]]] = {"gptq": {}, "rtn": {}}
    for row in rows:
        if row["quantizer"] in sides and row["fit"] in (None, "minmax"):
            sides[row["quantizer"]][tuple(row[name] for name in place)] = row
    pairs = [(row, sides["rtn"][key]) for key, row in sides["gptq"].items() if key in sides["rtn"]]
    return (
        len(pairs),
        sum(a["relative"] > b["relative"] for a, b in pairs),
        sum(a["output_error"] < b["output_error"] for a, b in pairs),
    )


def page(rows: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """Return the study's page: tables, what they show, figures."""
    models = [row for row in rows if row["part"] == "model"]
    weights = [row for row in rows if row["part"] == "weight"]
    first, one = models[0], weights[0]
    pairs, larger, smaller = gptq_against_rtn(weights)
    shown = [row for row in weights if (row["block_size"] or 64) == 64 and (row["group_size"] or 32) == 32]
    versions = ", ".join(
        f"{name} {first[f'{name.lower()}_version']}" for name in ("minilora", "NumPy", "Numba")
    )
    lines = [
        "# What a weight loses when it is quantized",
        f"Written by `{first['command']}` in {seconds / 60:.1f} minutes ({first['machine']}; {versions}). "
        "All rows: [quantization.jsonl](quantization.jsonl).",
        "## The whole model",
        "The shipped base, all block projections quantized, no training. Losses are in nats per token of "
        f"{first['n_eval']} test examples in {first['batches']} batches. GPTQ is calibrated on "
        f"{first['calibration_sequences']} examples of the training split, drawn anew for each seed. ± is "
        "half a 95 % t-interval: over calibration samples (*seeds*), or paired over the evaluation "
        "*batches*. *Better than rtn* is the loss of plain rounding (rtn, minmax) with the same storage, "
        "less this one. The last column says *better* or *worse* where the difference exceeds both halves. "
        "There are many comparisons on few seeds: read a single narrow one with care.",
    ]
    for task in dict.fromkeys(row["task"] for row in models):
        mine = [row for row in models if row["task"] == task]
        lines += [f"### {task}", "\n".join(f"- {text}" for text in findings(mine)), format_model_losses(mine)]
    lines += [
        "![Loss above full precision](loss.png)",
        "Loss above full precision. The scale is symmetric logarithmic, and linear in the middle. Large "
        "markers are means, bars intervals paired over batches, small dots GPTQ's single calibration "
        "samples.",
        "## One weight",
        f"`{one['weight']}`, with the inputs that it sees on the training split of {one['task']}. *Output* "
        f"is ‖X(W − Ŵ)ᵀ‖/‖XWᵀ‖. Of {pairs} settings, GPTQ's weights are further from W than rounded ones in "
        f"{larger}, its outputs nearer in {smaller}. *File bits* count the arrays of this tensor in "
        "bitsandbytes' file, code maps included; double quantization makes them smaller from "
        f"{crossover():,} weights on (blocks of 64).",
        format_weight_errors(shown),
    ]
    for name, text in FIGURES.items():
        lines += [f"![{text.split('.')[0]}]({name}.png)", text]
    return "\n\n".join(lines) + "\n"


def _plain(row: Mapping[str, Any]) -> Row:
    """Return a row as JSON can hold it: None for the infinite SNR of an exact weight."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in row.items()
    }
