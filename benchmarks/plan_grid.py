"""A grid of fine-tuning runs, each planned from its configuration, then built and measured."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import combinations
from typing import Any

import numpy as np

from minilora.building import init_model
from minilora.config import ModelConfig, TrainConfig, expand_modules
from minilora.data.tasks import Batch
from minilora.injection import full, inject_lora, subset
from minilora.memory import ARCHITECTURES, Ledger, PlanConfig, measure, plan, published
from minilora.memory.ledger import HELD
from minilora.quant.model import quantize_model
from minilora.tables import markdown_table
from minilora.transformer import Transformer

CASES = 112
LEAST, SHARE = 64 * 1024, 0.02
"""What may remain unexplained of the rise: the larger of these bytes and this share."""

_shape = ModelConfig(
    vocab_size=259, hidden_size=64, intermediate_size=192, num_hidden_layers=2, context_length=256
)
SHAPES = {
    "grid-small": _shape,
    "grid-grouped": replace(
        _shape,
        vocab_size=300,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "grid-gelu": replace(
        _shape,
        hidden_act="gelu_pytorch_tanh",
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    "grid-vocabulary": replace(_shape, vocab_size=4000, num_hidden_layers=3, tie_word_embeddings=False),
    "grid-deep": replace(_shape, num_hidden_layers=7, num_key_value_heads=2),
    "grid-wide": replace(_shape, hidden_size=256, intermediate_size=704, num_key_value_heads=1),
}
"""Models with fewer blocks than the planner runs for a deep model, with as many, and with more."""

AXES: dict[str, tuple[Any, ...]] = {
    "model": tuple(SHAPES),
    "method": ("full", "subset", "lora", "qlora", "qalora"),
    "r": (1, 4, 16),
    "target_modules": (
        "all-linear",
        "attention",
        "mlp",
        "q_proj,v_proj",
        "layers.1.mlp.down_proj",
        "lm_head,k_proj",
    ),
    "subset_modules": (None, "q_proj,v_proj", "layers.0", "embed_tokens", "model.norm"),
    "bits": (2, 3, 4, 8),
    "quant_type": (None, "fp4"),
    "group_size": (16, 32, 64),
    "block_size": (32, 64, 256),
    "double_quant": (False, True),
    "use_dora": (False, True),
    "lora_dropout": (0.0, 0.1),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"),
    "batch": ((1, 2), (1, 64), (2, 32), (3, 48), (4, 128), (8, 40)),
    "gradient_checkpointing": (False, True),
    "logits_chunk": (0, 16, 100),
    "shards": (1, 2, 3),
    "gradient_accumulation_steps": (1, 2, 3),
    "dtype": ("float32", "float64"),
}


def cases(count: int = CASES, seed: int = 0) -> list[PlanConfig]:
    """Return the same `count` runs every time.

    Each is the one of a few random runs with most pairs of values not seen before.
    """
    draw = random.Random(seed)
    seen: set[Any] = set()
    found: list[PlanConfig] = []
    while len(found) < count:
        drawn = [applicable({axis: draw.choice(values) for axis, values in AXES.items()}) for _ in range(12)]
        best = max(drawn, key=lambda chosen: len(_pairs(chosen) - seen))
        seen |= _pairs(best)
        batch_size, context = best.pop("batch")
        found.append(PlanConfig(**best, batch_size=batch_size, context=context))
    return found


def applicable(chosen: dict[str, Any]) -> dict[str, Any]:
    """Return only the settings that the chosen method has."""
    method = chosen["method"]
    codebook, adapted = method == "qlora", method in ("lora", "qlora", "qalora")
    if not adapted:
        chosen = {
            k: v for k, v in chosen.items() if k not in ("r", "target_modules", "use_dora", "lora_dropout")
        }
    if method != "subset":
        chosen = {k: v for k, v in chosen.items() if k != "subset_modules"}
    if not codebook:
        chosen = {k: v for k, v in chosen.items() if k not in ("quant_type", "block_size", "double_quant")}
    if method != "qalora":
        chosen = {k: v for k, v in chosen.items() if k != "group_size"}
    if method not in ("qlora", "qalora"):
        chosen = {k: v for k, v in chosen.items() if k != "bits"}
    if method == "qalora":
        chosen = {k: v for k, v in chosen.items() if k != "use_dora"}
        if "lm_head" in chosen["target_modules"]:  # dense, there is no offset to merge into
            chosen["target_modules"] = "k_proj"
    if chosen["model"] == "grid-gelu" and chosen.get("target_modules") == "mlp":
        chosen["target_modules"] = "up_proj,down_proj"
    if chosen.get("quant_type") == "fp4":
        chosen["bits"] = 4
    return chosen


def _pairs(chosen: dict[str, Any]) -> set[Any]:
    return set(combinations(sorted(chosen.items()), 2))


@contextmanager
def shapes() -> Iterator[None]:
    """Make the grid's shapes known to the planner by name, inside the block."""
    ARCHITECTURES.update(SHAPES)
    try:
        yield
    finally:
        for name in SHAPES:
            del ARCHITECTURES[name]


def built(c: PlanConfig, seed: int = 0) -> tuple[Transformer, Batch, TrainConfig]:
    """Build what a plan describes: a model ready to train, a batch where all targets count, the settings."""
    shape = ARCHITECTURES[c.model]
    rng = np.random.default_rng(seed)
    model = init_model(shape, rng, np.dtype(c.dtype), trainable=False)
    if c.quantized:
        model = quantize_model(model, c.quant())
    if c.method == "full":
        model = full(model)
    elif c.method == "subset":
        model = subset(model, expand_modules(c.subset_modules or f"layers.{shape.num_hidden_layers - 1}"))
    else:
        model = inject_lora(model, c.lora(), rng)
    ids = rng.integers(shape.vocab_size, size=(c.batch_size, c.context or 1))
    shared = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(PlanConfig)}
    settings = TrainConfig(**{name: getattr(c, name) for name in shared})
    return model, Batch(ids, ids, np.ones(ids.shape, bool)), settings


def held_by_layer(ledger: Ledger) -> dict[tuple[str, str], int]:
    """Return (class, layer) → bytes that outlast a step."""
    found: dict[tuple[str, str], int] = {}
    for e in ledger.entries:
        if e.kind in HELD:
            found[e.kind, e.layer] = found.get((e.kind, e.layer), 0) + e.nbytes
    return found


def row_of(c: PlanConfig) -> dict[str, Any]:
    """Plan and measure a case: what a step adds at its peak, and whether all else is equal to the byte."""
    planned, found = plan(c), measure(*built(c))
    measured = (found.measured or 0) - found.held
    return {
        "what": planned.title,
        "predicted": planned.rise,
        "measured": measured,
        "difference": measured - planned.rise,
        "share": (measured - planned.rise) / measured,
        "persistent": held_by_layer(planned) == held_by_layer(found),
    }


def measured(say: Any = print) -> list[dict[str, Any]]:
    """Return a row for each case, and one for each published figure."""
    with shapes():
        rows = [row_of(c) | {"kind": "run"} for c in cases()]
    say(worst_cases(rows, count=3))
    return rows + [asdict(row) | {"kind": "published"} for row in published().rows]


def used(row: dict[str, Any]) -> float:
    """Return the difference as a share of what is allowed: 64 KiB, or 2 % of the measured rise."""
    return float(abs(row["difference"]) / max(LEAST, SHARE * row["measured"]))


def worst_cases(rows: list[dict[str, Any]], count: int = 10) -> str:
    """Return a Markdown table of the cases that use up most of what may remain unexplained, worst first."""
    cells = []
    for row in sorted(rows, key=used, reverse=True)[:count]:
        sizes = [f"{row['predicted']:,}", f"{row['measured']:,}", f"{row['difference']:+,}"]
        share, equal = f"{100 * row['share']:+.2f} %", "yes" if row["persistent"] else "NO"
        cells.append([row["what"], *sizes, share, equal])
    heads = ["run", "predicted rise", "measured rise", "difference", "share", "persistent equal"]
    return markdown_table(heads, cells)
