"""One adapter, merged in every way: what each way costs, measured against the unmerged model.

- *full-precision base*: W + ΔW in float32. The adapter was trained over another base, if that was quantized.
- *dequantized base*: Ŵ + ΔW in float32. Exact up to rounding, but no longer in few bits.
- *re-quantized*: quantize(Ŵ + ΔW). Few bits again, and part of ΔW is rounded away.
- *offsets*: scale·q + (offset + ΔW), QA-LoRA's way. Exact, and still in few bits. The offsets are stored as
  float32, float16 or whole zero points. Whole zero points already harm a base that was fitted with real
  offsets; the *control* measures that alone.

ΔW of a QA-LoRA adapter is s·B A with A repeated over its groups, an ordinary LoRA update, so the first three
ways apply to it too. Re-quantized to min/max groups of its own size it even keeps its codes, because a whole
group moves together.

References
----------
QA-LoRA, arXiv 2309.14717, section 3.3.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from tqdm import tqdm

from minilora.adapter import Adapter
from minilora.config import ConfigError, QuantConfig
from minilora.data.tasks import Batch
from minilora.formats.checkpoint import load_base
from minilora.formats.files import write_file
from minilora.layers import Linear
from minilora.memory import effective_bits, model_bytes, projection_bytes
from minilora.merging import merge
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.affine import AffineWeight
from minilora.report.statistics import mean_interval
from minilora.sweep.deploying import requantize
from minilora.sweep.environment import environment
from minilora.sweep.inputs import make_run_task
from minilora.sweep.run_models import build, calibration
from minilora.sweep.settings import RunConfig
from minilora.tables import markdown_table
from minilora.threads import available_threads, single_blas
from minilora.training.trainer import Trainer
from minilora.transformer import Transformer
from minilora.variants import merged_over

Row = dict[str, Any]
COLUMNS = {
    "way": "merged into",
    "loss": "loss",
    "kl": "KL to unmerged, nats",
    "logit_error": "largest logit error",
    "bits": "bits per weight",
    "bytes": "bytes of the projections",
}


@single_blas()
def compare_merges(
    model: Transformer,
    base: Transformer,
    batches: Sequence[Batch],
    quants: Sequence[QuantConfig],
    calibration: Sequence[Any] = (),
    progress: bool = False,
) -> list[Row]:
    """Merge the adapters of `model` in every way and return one row for each, the unmerged model first.

    Parameters
    ----------
    base
        The dense model that the adapted one was made from.
    batches
        What loss and logits are measured on.
    quants
        What to re-quantize to.
    calibration
        Token ids (B, T), batch by batch, for GPTQ.

    Returns
    -------
    rows
        `loss` and `kl` = KL(unmerged ‖ merged) are means over the counted targets, in nats per token.
        `logit_error` is the largest difference of any logit there. `bits` are effective bits per weight.
        `bytes` are those of the block projections as stored, and of adapters still beside them. A way that is
        impossible has the reason in `refused` instead of numbers.
    """
    ways: dict[str, Callable[[], Transformer]] = {"not merged": lambda: model}
    ways["full-precision base"] = lambda: merge_into_dense(model, base)
    ways["dequantized base"] = lambda: merge(model, "dense")[0]  # for LoRA the same: its base is dense
    for quant in quants:
        ways[f"re-quantized: {describe(quant)}"] = partial(requantize, model, quant, calibration)
    if any(isinstance(linear.base.weight, AffineWeight) and linear.pool > 1 for linear in _adapted(model)):
        ways["control: not merged, base on whole zero points"] = lambda: round_base_offsets(model)
    stores = {"float32": "float32", "float16": "float16", "zero": "whole zero points"}
    for store, name in stores.items():
        ways[f"offsets, {name}"] = partial(merge_offsets, model, store)
    reference = [_logits(model, batch) for batch in batches]
    rows = []
    for way, make in tqdm(ways.items(), desc="merging", unit="way", disable=not progress):
        try:
            merged = make()
        except ConfigError as error:
            rows.append({"way": way, "refused": str(error)})
            continue
        row = {"way": way, **_distance(merged, batches, reference), "bits": effective_bits(merged)}
        rows.append(row | {"bytes": projection_bytes(merged)[0] + model_bytes(merged)["adapters"]})
    return rows


def merge_into_dense(model: Transformer, base: Transformer) -> Transformer:
    """Return W + ΔW for the full-precision W of `base`, whatever base the adapter was trained over."""
    adapted = {linear.name: linear for linear in _adapted(model)}

    def change(linear: Any) -> Any:
        if linear.name not in adapted:
            return linear
        w = merged_over(adapted[linear.name], linear.weight.dense()).astype(np.float32)
        return Linear(linear.name, DenseWeight(Parameter(f"{linear.name}.weight", w)))

    merged = base.map_linears(change)
    if base.config.tie_word_embeddings and not merged.tied:
        merged.config = replace(base.config, tie_word_embeddings=False)
    return merged


def merge_offsets(model: Transformer, store: str = "float32") -> Transformer:
    """Merge QA-LoRA adapters into offsets stored as `float32`, `float16` or `zero` (whole zero points)."""
    adapted = {linear.name for linear in _adapted(model)}
    merged = merge(model, "offsets")[0]
    return merged.map_linears(
        lambda linear: (
            Linear(linear.name, linear.weight.stored(store)[0]) if linear.name in adapted else linear
        )
    )


def round_base_offsets(model: Transformer) -> Transformer:
    """Return the unmerged model over a base with whole zero points: what those cost without any merge."""

    def change(linear: Any) -> Any:
        if not isinstance(linear, Adapter):
            return linear
        changed, weight = copy.copy(linear), linear.base.weight
        if isinstance(weight, AffineWeight):
            changed.base = Linear(linear.name, weight.stored("zero")[0])
        return changed

    return model.map_linears(change)


def quants_to_compare(quant: QuantConfig, both: bool = True) -> list[QuantConfig]:
    """Return what `--compare` re-quantizes to.

    The quantizer asked for comes first; `both` adds GPTQ. Integers are tried with whole zero points too, as
    in files.

    >>> [describe(q) for q in quants_to_compare(QuantConfig("int4"))][2:]
    ['int4, g = 32, whole zero points', 'int4, g = 32, whole zero points, gptq']
    """
    found = [quant]
    if both:
        found.append(replace(quant, quantizer="gptq"))
    if quant.affine:
        found += [replace(q, offset_dtype="zero") for q in found]
    return found


def describe(quant: QuantConfig) -> str:
    """Return a quantizer in a few words.

    >>> describe(QuantConfig("int4")), describe(QuantConfig("nf4", quantizer="gptq"))
    ('int4, g = 32', 'nf4, block 64, gptq')
    """
    words = [quant.quant_type, f"g = {quant.group_size}" if quant.affine else f"block {quant.block_size}"]
    if quant.offset_dtype == "zero":
        words.append("whole zero points")
    if quant.quantizer != "rtn":
        words.append(quant.quantizer)
    return ", ".join(words)


def format_merges(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, followed by sentences about the ways that are impossible."""
    formats = {"way": "{}", "bits": "{:.3f}", "bytes": "{:,}", "loss": "{:.5f}"}

    def cell(row: Row, name: str) -> str:
        form = formats.get(name, "{:.1e}")
        half = row.get(f"{name}_half")
        return form.format(row[name]) + ("" if half is None else f" ± {form.format(half)}")

    cells = [[cell(row, name) for name in COLUMNS] for row in rows if "refused" not in row]
    refused = {row["refused"]: row["way"] for row in reversed(rows) if "refused" in row}
    sentences = [f"Not possible: {way.split(',')[0]}: {why}" for why, way in refused.items()]
    return "\n\n".join([markdown_table(list(COLUMNS.values()), cells), *sentences])


STUDY = (("qalora", "int4"), ("qalora", "int2"), ("qlora", "nf4"), ("qlora", "nf2"), ("lora", None))


def merge_study(
    folder: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    kinds: Sequence[tuple[str, str | None]] = STUDY,
    progress: bool = True,
    **settings: Any,
) -> str:
    """Train an adapter of each kind and seed on `products`, merge it in every way, and return the page.

    Rows and page are written into `folder`. loss and KL are means ± half the 95 % t-interval over seeds. The
    logit error is the largest of all seeds.

    Parameters
    ----------
    kinds
        Pairs of method and quant_type.
    settings
        Fields of `RunConfig`; by default 200 steps of 8 examples, and 64 held-out examples.
    """
    start, rows = time.perf_counter(), []
    jobs = [(kind, seed) for kind in kinds for seed in seeds]
    for (method, quant_type), seed in tqdm(jobs, desc="merge study", unit="adapter", disable=not progress):
        chosen: dict[str, Any] = {"steps": 200, "batch_size": 8, "n_eval": 64} | settings
        config = RunConfig.of(method=method, quant_type=quant_type, seed=seed, **chosen)
        base, task = load_base(), make_run_task(config)
        model = build(config, base)
        Trainer(model, task, config.training(), threads=available_threads()).train()
        quants = quants_to_compare(config.storage())
        found = compare_merges(model, base, task.eval_batches("test"), quants, calibration(config))
        rows += [
            {"method": method, "quant_type": quant_type, "seed": seed, **row, **environment()}
            for row in found
        ]
    text = page(rows, str(folder), minutes=(time.perf_counter() - start) / 60)
    write_file(Path(folder) / "merging.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_file(Path(folder) / "README.md", text)
    return text


def page(rows: Sequence[Row], folder: str, minutes: float) -> str:
    """Return the study's page from its rows."""
    command = f"python -c \"from minilora.claims.merge_study import merge_study; merge_study('{folder}')\""
    first, seeds = rows[0], {row["seed"] for row in rows}
    versions = (
        f"Python {first['python_version']}, NumPy {first['numpy_version']}, Numba {first['numba_version']}"
    )
    parts = [
        "# One adapter, merged in every way",
        f"Written by `{command}` in {minutes:.0f} minutes ({first['machine']}; {versions}). Task products, "
        f"{len(seeds)} seeds. ± is half the 95 % t-interval over seeds; the logit error is the largest of "
        "all seeds. Bytes are those of the block projections and of adapters beside them. GPTQ files hold "
        "whole zero points.",
    ]
    kinds = dict.fromkeys((row["method"], row["quant_type"]) for row in rows)
    for method, quant_type in kinds:
        mine = [row for row in rows if (row["method"], row["quant_type"]) == (method, quant_type)]
        parts += [f"## {method}, {quant_type or 'float32'}", format_merges(_over_seeds(mine))]
    return "\n\n".join(parts) + "\n"


def _over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each way: means, and half the interval where there is one."""
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        row = dict(mine[0])
        if "refused" not in row:
            row["logit_error"] = max(r["logit_error"] for r in mine)
            for name in ("loss", "kl"):
                interval = mean_interval(r[name] for r in mine)
                row[name], half = interval.mean, interval.high - interval.mean
                row[f"{name}_half"] = half if np.isfinite(half) else None  # one seed has no interval
        found.append(row)
    return found


def _adapted(model: Transformer) -> list[Any]:
    found = [linear for _, linear in model.linears() if isinstance(linear, Adapter)]
    if not found:
        raise ConfigError("model: has no adapter to merge; inject_lora makes one")
    return found


def _logits(model: Transformer, batch: Batch) -> Any:
    """Logits (n, V) of the counted targets."""
    hidden = model.forward(batch.ids, with_cache=False)[0]
    return model.head.forward(hidden[batch.mask])[0]


def _distance(model: Transformer, batches: Sequence[Batch], reference: Sequence[Any]) -> Row:
    loss = kl = largest = 0.0
    count = sum(len(r) for r in reference)
    for batch, before in zip(batches, reference, strict=True):
        after = _logits(model, batch)
        p, q = (log_softmax(logits.astype(np.float64), axis=-1) for logits in (before, after))
        loss -= float(q[np.arange(len(q)), batch.targets[batch.mask]].sum())
        kl += float((np.exp(p) * (p - q)).sum())
        largest = max(largest, float(np.abs(after - before).max(initial=0)))
    return {"loss": loss / count, "kl": max(0.0, kl / count), "logit_error": largest}
