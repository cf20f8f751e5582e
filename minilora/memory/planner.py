"""The planner: the ledger of a training run from its configuration alone; nothing is loaded, and nothing of
size allocated.

The model's own code runs over arrays without data (``shapes``), so what is predicted is what the code does.
Blocks that are all alike are run four deep and counted as many as there are; token ids are the only numbers
that are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora.building import parameter_shapes
from minilora.config import ModelConfig, PlanConfig, QuantConfig, expand_modules, require
from minilora.formats.bases import shape_of
from minilora.formats.files import read_json
from minilora.formats.gguf import GGUFFile
from minilora.formats.huggingface_config import read_config
from minilora.formats.llama_gguf import find_model, gguf_name
from minilora.injection import full, inject_lora, subset
from minilora.memory.architectures import ARCHITECTURES, architecture
from minilora.memory.counting import count_parameters, effective_bits
from minilora.memory.ledger import Entry, Ledger, deepen, held_entries
from minilora.memory.profile import profile
from minilora.memory.shapes import Meter, ShapeArray, metered
from minilora.memory.twin import (
    BLOCK_FORMATS,
    Draws,
    ShapeWeight,
    base_twin,
    code_maps,
    shape_batch,
    tile_bytes,
)
from minilora.parameters import Parameter
from minilora.training.states import state_bytes, state_layout
from minilora.transformer import Transformer

Stored = Callable[[str, tuple[int, int]], ShapeWeight | None]
MOST_LAYERS = 1000
"""Of a planned model."""
SAME = 3
"""Batches of gradient accumulation that are run: the first, one that finds a sum, and another; all later ones
are alike."""
DEPTH = 4
"""Blocks that are run where all are alike: the first, the last, one that stands for those in the middle, and
its neighbour."""


def plan(config: PlanConfig | str = "tiny", **changes: Any) -> Ledger:
    """The ledger of a run that need not exist: every class of bytes, by layer, at the peak of a step.

    Give a PlanConfig, or a model's name and fields of one. Raises ConfigError for what cannot be.

    >>> plan("llama-7b", method="lora", r=64).trainable
    159907840
    """
    known = [f.name for f in fields(PlanConfig)]
    for name in changes:
        require(name in known, name, changes[name], f"no such setting; there are {', '.join(known)}")
    c = replace(config, **changes) if isinstance(config, PlanConfig) else PlanConfig(config, **changes)
    shape, stored = model_shape(c.model)
    tokens = c.context or min(512, shape.context_length)
    c = replace(c, context=tokens)
    require(
        stored is None or c.dtype == "float32",
        "dtype",
        c.dtype,
        f"{c.model} is a file, whose weights are what they are",
    )
    blocks = shape.num_hidden_layers
    require(blocks <= MOST_LAYERS, "num_hidden_layers", blocks, f"must be at most {MOST_LAYERS}")
    require(
        tokens <= shape.context_length,
        "context",
        tokens,
        f"{c.model} has positions for {shape.context_length} tokens",
    )
    named = any(
        part.isdigit() for target in c.lora().target_modules for part in target.split(".")
    )  # layers.3.…: one block's own
    alike = c.method != "subset" and not named and shape.num_hidden_layers > DEPTH
    alike = alike and (stored is None or _stored_alike(shape, stored))
    layers = shape.num_hidden_layers if alike else None
    with metered(Meter()):
        twin = planned_twin(c, replace(shape, num_hidden_layers=DEPTH) if alike else shape, stored)
        trainable_parameters = twin.trainable()
        states = planned_states(trainable_parameters, c.optimizer)
        maps = (
            code_maps("dynamic", "dynamic, unsigned")
            if any(a.dtype == np.uint8 for a in states.values())
            else []
        )
        held = held_entries(twin, {} if c.optimizer.startswith("paged") else states, maps)
    found = profile(
        twin,
        shape_batch(shape, c.batch_size, tokens),
        shards=c.shards,
        checkpoint=c.gradient_checkpointing,
        accumulation=min(c.gradient_accumulation_steps, SAME),
        logits_chunk=c.logits_chunk,
        layers=layers,
    )
    trainable, parameters = _counts(twin, layers)
    gradients = sum(p.data.nbytes for p in trainable_parameters)
    on_disk = sum(a.nbytes for a in states.values()) if c.optimizer.startswith("paged") else 0
    if layers is not None:
        held = deepen(held, DEPTH, layers)
        per_block = sum(p.data.nbytes for p in twin.blocks[1].parameters() if p.trainable)
        per_state = sum(a.nbytes for name, a in states.items() if ".layers.1." in name)
        gradients += (layers - DEPTH) * per_block
        on_disk += (layers - DEPTH) * per_state * bool(on_disk)
    if tile := tile_bytes(twin):
        held.append(Entry("tiles", "worker", "decoded weights", tile))
    entries, moment = with_update(found.entries, found.moment, gradients, c.optimizer, trainable_parameters)
    return Ledger(
        c.title,
        (*held, *entries),
        tuple(found.kept),
        moment,
        trainable,
        parameters,
        effective_bits(twin),
        min(c.shards, c.batch_size),
        found.shard,
        gradients,
        gradients * (c.gradient_accumulation_steps > 1),
        on_disk,
    )


def planned_twin(c: PlanConfig, shape: ModelConfig, stored: Stored | None = None) -> Transformer:
    """The model of a plan, ready to train, without data."""
    as_stored = (
        stored is not None
        and c.method == "qalora"
        and c.quant() == QuantConfig("int4", group_size=32)
        and all(
            stored(name, (1, 32)) is not None and stored(name, (1, 32)).offset_group  # type: ignore[union-attr]
            for name in _projections(shape)
        )
    )
    if stored is None:
        base = base_twin(shape, np.dtype(c.dtype), c.quant() if c.quantized else None)
    elif as_stored:
        base = base_twin(shape, stored=stored)
    else:  # the projections are dequantized, and perhaps quantized anew; the table stays as it is unless it trains
        table = c.method in ("full", "subset")
        base = base_twin(
            shape,
            quant=c.quant() if c.quantized else None,
            stored=lambda name, size: (
                None if table or name.startswith("model.layers.") else stored(name, size)
            ),
        )
    if c.method == "full":
        return full(base)
    if c.method == "subset":
        return subset(base, expand_modules(c.subset_modules or f"layers.{shape.num_hidden_layers - 1}"))
    return inject_lora(base, c.lora(), Draws())  # type: ignore[arg-type]


def planned_states(parameters: list[Parameter], optimizer: str) -> dict[str, Any]:
    """The optimizer's state arrays, without data."""
    return {
        name: ShapeArray.new(shape, dtype)
        for name, (shape, dtype) in state_layout(parameters, optimizer).items()
    }


def with_update(
    entries: list[Entry], moment: str, gradients: int, optimizer: str, parameters: list[Parameter]
) -> tuple[list[Entry], str]:
    """The peak of the whole step: that of both passes, or of the update that follows, where all gradients and
    a scratch live."""
    scratch = state_bytes(optimizer, [p.data.size for p in parameters], parameters[0].data.dtype.itemsize)[
        "scratch"
    ]
    if gradients + scratch <= sum(e.nbytes for e in entries):
        return entries, moment
    return [
        Entry("gradients", "", "of all that trains", gradients),
        Entry("temporaries", "optimizer", "scratch of the update", scratch),
    ], "the optimizer's update"


def _counts(twin: Transformer, layers: int | None) -> tuple[int, int]:
    """(trainable, all) parameters of the model that the twin stands for."""
    trainable, parameters = count_parameters(twin)
    if layers is None:
        return trainable, parameters
    block = twin.blocks[1]
    more = layers - len(twin.blocks)
    of_block = [p.data.size for p in block.parameters()]
    of_block += [
        math.prod(w.shape) for _, _, x in block.linears() if isinstance(w := x.base.weight, ShapeWeight)
    ]
    return trainable + more * sum(
        p.data.size for p in block.parameters() if p.trainable
    ), parameters + more * sum(of_block)


# ---- models by name


def model_shape(name: str) -> tuple[ModelConfig, Stored | None]:
    """(configuration, for a GGUF how its matrices are stored) of a built-in architecture or of a file's
    head."""
    path = Path(name)
    if name.lower() in ARCHITECTURES:
        return architecture(name), None
    if path.name.endswith(".json"):
        return read_config(read_json(path), path), None
    if name != "smollm2" and not path.exists() and path.suffix != ".gguf" and len(path.parts) < 2:
        return architecture(name), None  # which refuses it, and says what there is
    return _file_shape(name)


@lru_cache(maxsize=8)
def _file_shape(name: str) -> tuple[ModelConfig, Stored | None]:
    path, shape = find_model(name), shape_of(name)
    if path.suffix != ".gguf":
        return shape, None
    types = {stored: info.type for stored, info in GGUFFile(path).tensors.items()}

    def stored(name: str, size: tuple[int, int]) -> ShapeWeight | None:
        kind = types.get(gguf_name(name))
        return ShapeWeight.stored(size, kind) if kind in BLOCK_FORMATS else None

    return shape, stored


def _stored_alike(shape: ModelConfig, stored: Stored) -> bool:
    """Whether a file stores all blocks in the same formats."""
    kinds: dict[str, set[tuple[int, int]]] = {}
    for name in _projections(shape):
        weight = stored(name, (1, 32))
        kinds.setdefault(name.split(".", 3)[-1], set()).add(
            (0, 0) if weight is None else (weight.bits, weight.offset_group)
        )
    return all(len(found) == 1 for found in kinds.values())


def _projections(shape: ModelConfig) -> list[str]:
    return [name for name in parameter_shapes(shape) if "_proj" in name]
