"""One adapter, merged in every way there is: what each costs, measured against the unmerged model.

    full-precision base    W + ΔW in float32: not the base that the adapter was trained over, if that was quantized
    dequantized base       Ŵ + ΔW in float32: exact up to rounding, but no longer in few bits
    re-quantized           quantize(Ŵ + ΔW): few bits again, and part of ΔW is rounded away
    offsets                scale·q + (offset + ΔW): QA-LoRA's, exact, and still in few bits; the offsets as float32, float16 or
                           whole zero points. The latter already harm a base that was fitted with real
                           offsets: the control

ΔW of a QA-LoRA adapter is s·B A with A repeated over its groups, an ordinary LoRA update, so it can take the
first three ways too. Re-quantized to min/max groups of its own size it even keeps its codes, because a whole
group moves together.
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
from tqdm import tqdm

from minilora.config import ConfigError, QuantConfig
from minilora.data.tasks import Batch
from minilora.formats.checkpoint import load_base
from minilora.formats.files import write_file
from minilora.layers import DenseWeight, Linear, Parameter
from minilora.lora import LoraLinear
from minilora.memory import effective_bits, model_bytes, projection_bytes
from minilora.merging import merge
from minilora.quant.affine import AffineWeight
from minilora.report.statistics import mean_interval
from minilora.sweep.building import build, calibration
from minilora.sweep.deploying import requantize
from minilora.sweep.environment import environment
from minilora.sweep.inputs import make_run_task
from minilora.sweep.settings import RunConfig
from minilora.threads import available_threads, single_blas
from minilora.training.trainer import Trainer
from minilora.transformer import Transformer

Row = dict[str, Any]
COLUMNS = {
    "way": "merged into",
    "loss": "loss",
    "kl": "KL to unmerged, nats",
    "logit_error": "largest logit error",
    "bits": "bits a weight",
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
    """Merge the adapters of ``model`` in every way; one row each, the first that of the unmerged model.

    ``base`` is the dense model that the adapted one was made from, ``quants`` what to re-quantize to. A way
    that cannot be has its reason in ``refused`` instead of numbers. loss and KL(unmerged ‖ merged) are means
    over the counted targets; ``logit_error`` is the largest difference of any logit there; ``bytes`` are
    those of the block projections, as stored, and of adapters still beside them.
    """
    ways: dict[str, Callable[[], Transformer]] = {"not merged": lambda: model}
    ways["full-precision base"] = lambda: merge_into_dense(model, base)
    ways["dequantized base"] = lambda: merge(model, "dense")[0]  # of LoRA the same: its base is not quantized
    for quant in quants:
        ways[f"re-quantized: {describe(quant)}"] = partial(requantize, model, quant, calibration)
    if any(isinstance(linear.base.weight, AffineWeight) and linear.pool > 1 for linear in _adapted(model)):
        ways["control: not merged, base on whole zero points"] = lambda: round_base_offsets(model)
    for store in ("float32", "float16", "zero"):
        ways[f"offsets, {'whole zero points' if store == 'zero' else store}"] = partial(
            merge_offsets, model, store
        )
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
    """W + ΔW for the full-precision W of ``base``, whatever base the adapter was trained over
    (``LoraLinear.over``)."""
    adapted = {linear.name: linear for linear in _adapted(model)}

    def change(linear: Any) -> Any:
        if linear.name not in adapted:
            return linear
        w = adapted[linear.name].over(linear.weight.dense()).astype(np.float32)
        return Linear(linear.name, DenseWeight(Parameter(f"{linear.name}.weight", w)))

    merged = base.map_linears(change)
    if base.config.tie_word_embeddings and not merged.tied:
        merged.config = replace(base.config, tie_word_embeddings=False)
    return merged


def merge_offsets(model: Transformer, store: str = "float32") -> Transformer:
    """QA-LoRA's merge, with the merged offsets stored as ``float32``, ``float16`` or ``zero``."""
    adapted = {linear.name for linear in _adapted(model)}
    merged = merge(model, "offsets")[0]
    return merged.map_linears(
        lambda linear: (
            Linear(linear.name, linear.weight.stored(store)[0]) if linear.name in adapted else linear
        )
    )


def round_base_offsets(model: Transformer) -> Transformer:
    """The unmerged model over a base whose own offsets are whole zero points: what that costs without any
    merge."""

    def change(linear: Any) -> Any:
        if not isinstance(linear, LoraLinear):
            return linear
        changed = copy.copy(linear)
        changed.base = Linear(linear.name, linear.base.weight.stored("zero")[0])
        return changed

    return model.map_linears(change)


def quants_to_compare(quant: QuantConfig, both: bool = True) -> list[QuantConfig]:
    """What --compare re-quantizes to: as asked; with ``both`` also by GPTQ; and for integers with whole zero
    points, as in files.

    >>> [describe(q) for q in quants_to_compare(QuantConfig("int4"))]
    ['int4, g = 32', 'int4, g = 32, gptq', 'int4, g = 32, whole zero points', 'int4, g = 32, whole zero
    points, gptq']
    """
    found = [quant, *([replace(quant, quantizer="gptq")] if both else [])]
    return found + ([replace(q, offset_dtype="zero") for q in found] if quant.affine else [])


def describe(quant: QuantConfig) -> str:
    """A quantizer in a few words.

    >>> describe(QuantConfig("int4")), describe(QuantConfig("nf4", quantizer="gptq"))
    ('int4, g = 32', 'nf4, block 64, gptq')
    """
    words = f"{quant.quant_type}, " + (
        f"g = {quant.group_size}" if quant.affine else f"block {quant.block_size}"
    )
    words += ", whole zero points" * (quant.offset_dtype == "zero")
    return words + ("" if quant.quantizer == "rtn" else f", {quant.quantizer}")


def format_merges(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; what was refused follows as sentences."""
    formats = {"way": "{}", "bits": "{:.3f}", "bytes": "{:,}", "loss": "{:.5f}"}

    def cell(row: Row, name: str) -> str:
        form = formats.get(name, "{:.1e}")
        half = row.get(f"{name}_half")
        return form.format(row[name]) + ("" if half is None else f" ± {form.format(half)}")

    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --: |" * (len(COLUMNS) - 1)]
    lines += [
        "| " + " | ".join(cell(row, name) for name in COLUMNS) + " |" for row in rows if "refused" not in row
    ]
    refused = {row["refused"]: row["way"] for row in reversed(rows) if "refused" in row}
    return "\n".join(lines + [f"\nNot possible: {way.split(',')[0]}: {why}" for why, way in refused.items()])


STUDY = (("qalora", "int4"), ("qalora", "int2"), ("qlora", "nf4"), ("qlora", "nf2"), ("lora", None))


def merge_study(
    folder: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    kinds: Sequence[tuple[str, str | None]] = STUDY,
    progress: bool = True,
    **settings: Any,
) -> str:
    """Train an adapter of each kind and seed on ``products``, merge it in every way, and write rows and a
    page into ``folder``.

    loss and KL: mean ± half the 95 % t-interval over seeds; the logit error is the largest of all seeds.
    Returns the page.
    """
    start, rows, parts = time.perf_counter(), [], []
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
    for method, quant_type in kinds:
        mine = [row for row in rows if (row["method"], row["quant_type"]) == (method, quant_type)]
        parts.append(f"## {method}, {quant_type or 'float32'}\n\n{format_merges(_over_seeds(mine))}\n")
    command = f"python -c \"from minilora.claims.merge_study import merge_study; merge_study('{folder}')\""
    env = environment()
    page = (
        f"# One adapter, merged in every way\n\nWritten by `{command}` in {(time.perf_counter() - start) / 60:.0f} minutes "
        f"({env['machine']}; Python {env['python_version']}, NumPy {env['numpy_version']}, Numba {env['numba_version']}). "
        f"Task products, {len(seeds)} seeds, ± half the 95 % t-interval over them; the logit error is the largest of all. "
        "Bytes are those of the block projections and of adapters beside them. Whole zero points are what GPTQ files hold."
        "\n\n"
    )
    page += "\n".join(parts)
    write_file(Path(folder) / "merging.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_file(Path(folder) / "README.md", page)
    return page


def _over_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row a way: means, with the interval's half where it is known."""
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


def _adapted(model: Transformer) -> list[LoraLinear]:
    found = [linear for _, linear in model.linears() if isinstance(linear, LoraLinear)]
    if not found:
        raise ConfigError("model: has no adapter to merge; inject_lora makes one")
    return found


def _logits(model: Transformer, batch: Batch) -> Any:
    """Logits (n, V) of the counted targets."""
    hidden = model.forward(batch.ids, keep=False)[0]
    return model.head.forward(hidden[batch.mask])[0]


def _distance(model: Transformer, batches: Sequence[Batch], reference: Sequence[Any]) -> Row:
    loss = kl = largest = 0.0
    count = sum(len(r) for r in reference)
    for batch, before in zip(batches, reference, strict=True):
        after = _logits(model, batch)
        p, q = _log_softmax(before), _log_softmax(after)
        loss -= float(q[np.arange(len(q)), batch.targets[batch.mask]].sum())
        kl += float((np.exp(p) * (p - q)).sum())
        largest = max(largest, float(np.abs(after - before).max(initial=0)))
    return {"loss": loss / count, "kl": max(0.0, kl / count), "logit_error": largest}


def _log_softmax(logits: Any) -> Any:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
