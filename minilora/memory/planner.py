"""The planner: the ledger of a training run from its configuration alone.

The model's own code runs over arrays without data (`shapes`), so what is predicted is what the code does.
Nothing is loaded, and token ids are the only numbers that are made. Blocks that are all alike are run four
deep and counted as many as there are.
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
from minilora.composed import PlanConfig
from minilora.config import ModelConfig, QuantConfig, expand_modules, require
from minilora.formats.bases import shape_of
from minilora.formats.files import read_json
from minilora.formats.gguf import GGUFFile
from minilora.formats.huggingface_config import read_config
from minilora.formats.llama_gguf import find_model, gguf_name
from minilora.injection import full, inject_lora, subset
from minilora.memory.architectures import ARCHITECTURES, architecture
from minilora.memory.counting import count_parameters, effective_bits
from minilora.memory.entries import Entry, deepen, held_entries
from minilora.memory.ledger import Ledger
from minilora.memory.profile import profile
from minilora.memory.shape_weights import BLOCK_FORMATS, ShapeWeight, code_maps
from minilora.memory.shapes import Meter, ShapeArray, metered
from minilora.memory.twin import BATCHES_ALIKE, Draws, base_twin, shape_batch, tile_bytes
from minilora.parameters import Parameter
from minilora.training.states import state_bytes, state_layout
from minilora.transformer import Transformer

Stored = Callable[[str, tuple[int, int]], ShapeWeight | None]
"""(name, shape) of a matrix → its weight as a file stores it; None for a dense one."""

LARGEST_DEPTH = 1000
"""Most blocks of a planned model."""

BLOCKS_RUN = 4
"""Blocks that run where all are alike: the first, one for all in the middle, its neighbour, the last."""


def plan(config: PlanConfig | str = "tiny", **changes: Any) -> Ledger:
    """Return the ledger of a run that need not exist: every class of bytes, by layer, at a step's peak.

    Parameters
    ----------
    config : PlanConfig or str
        A whole configuration, or a model's name.
    **changes
        Fields of PlanConfig that differ from it.

    Raises
    ------
    ConfigError
        For a model or a setting that cannot be.

    Examples
    --------
    >>> plan("llama-7b", method="lora", r=64).trainable
    159907840
    """
    c, shape, stored, tokens = _resolved(config, changes)
    deep = shape.num_hidden_layers if _blocks_are_alike(c, shape, stored) else None
    paged = c.optimizer.startswith("paged")
    with metered(Meter()):
        run = shape if deep is None else replace(shape, num_hidden_layers=BLOCKS_RUN)
        twin = planned_twin(c, run, stored)
        trained = twin.trainable()
        states = planned_states(trained, c.optimizer)
        in_8bit = any(a.dtype == np.uint8 for a in states.values())
        maps = code_maps("dynamic", "dynamic, unsigned") if in_8bit else []
        held = held_entries(twin, {} if paged else states, maps)
    found = profile(
        twin,
        shape_batch(shape, c.batch_size, tokens),
        shards=c.shards,
        checkpoint=c.gradient_checkpointing,
        accumulation=min(c.gradient_accumulation_steps, BATCHES_ALIKE),
        logits_chunk=c.logits_chunk,
        layers=deep,
    )
    trainable, parameters = _counts(twin, deep)
    gradients = sum(p.data.nbytes for p in trained)
    on_disk = sum(a.nbytes for a in states.values()) if paged else 0
    if deep is not None:
        held = deepen(held, BLOCKS_RUN, deep)
        of_block = {p.name: p.data.nbytes for p in twin.blocks[1].parameters() if p.trainable}
        gradients += (deep - BLOCKS_RUN) * sum(of_block.values())
        if paged:
            of_states = sum(a.nbytes for name, a in states.items() if name.split(".", 1)[1] in of_block)
            on_disk += (deep - BLOCKS_RUN) * of_states
    if tile := tile_bytes(twin):
        held.append(Entry("tiles", "worker", "decoded weights", tile))
    entries, moment = with_update(found.entries, found.moment, gradients, c.optimizer, trained)
    return Ledger(
        title=c.title,
        entries=(*held, *entries),
        kept=tuple(found.kept),
        moment=moment,
        trainable=trainable,
        parameters=parameters,
        effective_bits=effective_bits(twin),
        shards=min(c.shards, c.batch_size),
        shard=found.shard,
        gradients=gradients,
        accumulated=gradients if c.gradient_accumulation_steps > 1 else 0,
        on_disk=on_disk,
    )


def _resolved(
    config: PlanConfig | str, changes: dict[str, Any]
) -> tuple[PlanConfig, ModelConfig, Stored | None, int]:
    """Return the whole configuration, the model's shape, how a file stores it, and the tokens of a row."""
    known = [f.name for f in fields(PlanConfig)]
    for name in changes:
        require(name in known, name, changes[name], f"no such setting; there are {', '.join(known)}")
    c = replace(config, **changes) if isinstance(config, PlanConfig) else PlanConfig(config, **changes)
    shape, stored = model_shape(c.model)
    tokens = c.context or min(512, shape.context_length)
    require(
        stored is None or c.dtype == "float32",
        "dtype",
        c.dtype,
        f"{c.model} is a file, whose weights are what they are",
    )
    blocks = shape.num_hidden_layers
    require(blocks <= LARGEST_DEPTH, "num_hidden_layers", blocks, f"must be at most {LARGEST_DEPTH}")
    require(
        tokens <= shape.context_length,
        "context",
        tokens,
        f"{c.model} has positions for {shape.context_length} tokens",
    )
    return replace(c, context=tokens), shape, stored, tokens


def _blocks_are_alike(c: PlanConfig, shape: ModelConfig, stored: Stored | None) -> bool:
    """Return whether a few blocks can stand for all: none is named, chosen or stored by itself."""
    if c.method == "subset" or shape.num_hidden_layers <= BLOCKS_RUN:
        return False
    targets = c.lora().target_modules
    if any(part.isdigit() for target in targets for part in target.split(".")):  # layers.3.…
        return False
    return stored is None or _stored_alike(shape, stored)


def planned_twin(c: PlanConfig, shape: ModelConfig, stored: Stored | None = None) -> Transformer:
    """Return the model of a plan, ready to train, without data."""
    quant = c.quant() if c.quantized else None
    if stored is None:
        base = base_twin(shape, np.dtype(c.dtype), quant)
    elif c.method == "qalora" and c.quant() == QuantConfig("int4", group_size=32) and _offsets(shape, stored):
        base = base_twin(shape, stored=stored)
    else:
        base = base_twin(shape, quant=quant, stored=_without_projections(c, stored))
    if c.method == "full":
        return full(base)
    if c.method == "subset":
        return subset(base, expand_modules(c.subset_modules or f"layers.{shape.num_hidden_layers - 1}"))
    return inject_lora(base, c.lora(), Draws())  # type: ignore[arg-type]


def _offsets(shape: ModelConfig, stored: Stored) -> bool:
    """Return whether a file stores all projections with float offsets, which QA-LoRA takes as they are."""
    weights = [stored(name, (1, 32)) for name in _projections(shape)]
    return all(weight is not None and weight.offset_group for weight in weights)


def _without_projections(c: PlanConfig, stored: Stored) -> Stored:
    """Leave the projections to be dequantized; the table stays as stored, unless it trains."""
    table_trains = c.method in ("full", "subset")

    def remaining(name: str, size: tuple[int, int]) -> ShapeWeight | None:
        return None if table_trains or name.startswith("model.layers.") else stored(name, size)

    return remaining


def planned_states(parameters: list[Parameter], optimizer: str) -> dict[str, Any]:
    """Return the optimizer's state arrays, without data."""
    layout = state_layout(parameters, optimizer)
    return {name: ShapeArray.new(shape, dtype) for name, (shape, dtype) in layout.items()}


def with_update(
    entries: list[Entry], moment: str, gradients: int, optimizer: str, parameters: list[Parameter]
) -> tuple[list[Entry], str]:
    """Return the peak of the whole step: that of both passes, or that of the update which follows.

    During the update all gradients and the optimizer's scratch live.
    """
    sizes, itemsize = [p.data.size for p in parameters], parameters[0].data.dtype.itemsize
    scratch = state_bytes(optimizer, sizes, itemsize)["scratch"]
    if gradients + scratch <= sum(e.nbytes for e in entries):
        return entries, moment
    return [
        Entry("gradients", "", "of all trained parameters", gradients),
        Entry("temporaries", "optimizer", "scratch of the update", scratch),
    ], "the optimizer's update"


def _counts(twin: Transformer, layers: int | None) -> tuple[int, int]:
    """Return (trainable, all) parameters of the model that the twin stands for."""
    trainable, parameters = count_parameters(twin)
    if layers is None:
        return trainable, parameters
    block = twin.blocks[1]
    weights = [linear.base.weight for _, _, linear in block.linears()]
    packed = sum(math.prod(weight.shape) for weight in weights if isinstance(weight, ShapeWeight))
    of_block = packed + sum(p.data.size for p in block.parameters())
    trained_of_block = sum(p.data.size for p in block.parameters() if p.trainable)
    more = layers - len(twin.blocks)
    return trainable + more * trained_of_block, parameters + more * of_block


# ---- models by name


def model_shape(name: str) -> tuple[ModelConfig, Stored | None]:
    """Return the shape of a built-in architecture or of a file, and how a GGUF file stores its matrices."""
    path = Path(name)
    if name.lower() in ARCHITECTURES:
        return architecture(name), None
    if path.name.endswith(".json"):
        return read_config(read_json(path), path), None
    if name != "smollm2" and not path.exists() and path.suffix != ".gguf" and len(path.parts) < 2:
        return architecture(name), None  # raises, and lists those there are
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
    """Return whether a file stores all blocks in the same formats."""
    kinds: dict[str, set[tuple[int, int]]] = {}
    for name in _projections(shape):
        weight = stored(name, (1, 32))
        kind = (0, 0) if weight is None else (weight.bits, weight.offset_group)
        kinds.setdefault(name.split(".", 3)[-1], set()).add(kind)
    return all(len(found) == 1 for found in kinds.values())


def _projections(shape: ModelConfig) -> list[str]:
    return [name for name in parameter_shapes(shape) if "_proj" in name]
