"""A configuration and its base → the model of a run, ready to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.config import ADAPTERS, QuantConfig, expand_modules, require
from minilora.data.tasks import Task
from minilora.injection import full, inject_lora, subset
from minilora.quant.blocks import GGUF_BLOCK, BlockWeight
from minilora.quant.model import dequantize_model, quantize_model
from minilora.sweep.inputs import base_of, make_run_task
from minilora.sweep.settings import RunConfig, rounded_to_nearest
from minilora.transformer import Transformer

CALIBRATION_EXAMPLES = 128
"""Training examples that calibrate GPTQ."""


def build(config: RunConfig, base: Transformer) -> Transformer:
    """Return the model of a run before training: what is frozen, what is quantized, what trains."""
    # Initialisation has a stream of its own, as data and dropout have. r is part of its key, so that adapters
    # of two ranks do not share the first rows of A.
    r = config.lora.r if config.method in ADAPTERS else 0
    rng = np.random.default_rng([config.seed, 0, r])
    if config.method == "full":
        return full(dequantize_model(base))
    if config.method == "subset":
        return subset(dequantize_model(base), expand_modules(config.subset_modules))
    if config.method == "qlora" and config.lora.init_lora_weights == "loftq":
        return inject_lora(dequantize_model(base), config.adapter(), rng, quant=config.base_storage())
    model = frozen_base(config, base)
    return inject_lora(model, config.adapter(), rng) if config.method in ADAPTERS else model


def frozen_base(config: RunConfig, base: Transformer) -> Transformer:
    """Return the base under the adapter, as it is stored.

    The weights of a GGUF are rounded already. LoRA stands on them dequantized. QLoRA, and QA-LoRA of other
    bits, round them again. QA-LoRA takes Q4_1 as it is, which is int4 in groups of 32. The embedding, which
    is never trained, stays as stored.
    """
    if config.method == "base":
        return base
    if not config.quantized:
        return dequantize_model(base, table=False)
    quant = config.base_storage()
    as_stored = quant == QuantConfig("int4", group_size=GGUF_BLOCK) and all(
        isinstance(linear.weight, BlockWeight) and linear.weight.offset_group
        for block in base.blocks
        for _, _, linear in block.linears()
    )
    if as_stored:
        return base
    return quantize_model(base, quant, calibration(config) if quant.quantizer == "gptq" else ())


def under_adapter(config: RunConfig, base: Transformer) -> Transformer:
    """Return the base of a trained adapter that only computes; LoRA's may stay in its blocks."""
    return base if config.method == "lora" else frozen_base(config, base)


def calibration(config: RunConfig) -> list[Any]:
    """Return token ids of training examples for GPTQ, drawn by the run's seed; never of another split."""
    task = make_run_task(config)
    order = np.random.default_rng([config.seed, 3]).permutation(task.n_train)
    return unpadded(task, order[:CALIBRATION_EXAMPLES])


def unpadded(task: Task, examples: Sequence[int] | np.ndarray) -> list[Any]:
    """Return token ids (1, T) of training examples without padding, which GPTQ would take for input."""
    batch = task.batch(examples)
    # Padding is what follows the last target. The token alone does not tell: a real model may pad with one
    # that texts hold too.
    ends = batch.mask.shape[1] - batch.mask[:, ::-1].argmax(axis=1)
    return [row[:end][None] for row, end in zip(batch.ids, ends, strict=True)]


def check_buildable(configs: Sequence[RunConfig]) -> None:
    """Build each kind of model once, to refuse a rank, group size or module that does not fit."""
    kinds = {_kind(config): config for config in configs}
    for config in kinds.values():
        base = base_of(config.model).model
        nearest = rounded_to_nearest(config.storage()) if config.quantized else None
        build(replace(config, quant=nearest), base)
        check_gptq_blocks(config, base)


def _kind(config: RunConfig) -> tuple[Any, ...]:
    """Return what decides whether a model can be built."""
    quant = config.storage() if config.quantized else None
    lora = config.lora if config.method in ADAPTERS else None
    patterns = None if lora is None else (str(lora.rank_pattern), str(lora.alpha_pattern))
    return config.model, config.method, config.subset_modules, quant, lora, patterns


def check_gptq_blocks(config: RunConfig, base: Transformer) -> None:
    """Refuse blocks that cross rows: GPTQ rounds column by column, so each row needs its own scales."""
    if not config.quantized or config.storage().quantizer != "gptq":
        return
    quant = config.storage()
    size, name = (quant.group_size, "group_size") if quant.affine else (quant.block_size, "block_size")
    for block in base.blocks:
        for _, _, linear in block.linears():
            require(
                linear.shape[1] % size == 0,
                name,
                size,
                f"quantizer='gptq' needs a divisor of in={linear.shape[1]} ({linear.name})",
            )
