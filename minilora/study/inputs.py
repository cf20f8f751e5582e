"""What a run starts from: its base, its task, and whether both fit into memory."""

from __future__ import annotations

import math
from functools import lru_cache

from minilora import memory
from minilora.config import ConfigError, expand_modules, matches
from minilora.data.sft import SFTTask, products_chat, read_jsonl
from minilora.data.tasks import Task, make_task
from minilora.pretrained import Pretrained, load_pretrained, shape_of, stored_bytes
from minilora.quant.blocks import BLOCK
from minilora.study.results import ADAPTERS
from minilora.study.settings import TINY, RunConfig
from minilora.transformer import parameter_shapes


@lru_cache(maxsize=2)
def base_of(name: str) -> Pretrained:
    """The base of a run, kept for the next run of this process."""
    return load_pretrained(name)


@lru_cache(maxsize=2)
def _task(model: str, name: str, text_path: str | None, data: str | None, n_train: int, n_eval: int, max_length: int,
          packing: bool) -> Task:  # fmt: skip
    if model == TINY and name != "jsonl":
        return make_task(name, text_path=text_path, n_train=n_train, n_eval=n_eval)
    base = base_of(model)
    tokenizer, max_length = base.tokenizer, min(max_length, base.model.config.context_length)
    if name == "products":
        return products_chat(tokenizer, n_train=n_train, n_eval=n_eval, max_length=max_length, packing=packing)
    if name == "jsonl":
        return SFTTask(tokenizer, read_jsonl(data or ""), max_length=max_length, packing=packing, n_eval=n_eval)
    return make_task(name, text_path=text_path, n_eval=n_eval, window=min(max_length, 128), tokenizer=tokenizer)


def make_run_task(config: RunConfig) -> Task:
    """The task of a run, kept for the next run of this process."""
    return _task(config.model, config.task, config.text_path, config.data, config.n_train, config.n_eval, config.max_length,
                 config.packing)


NEW_BYTES = {"lora": 4.0, "full": 8.0, "subset": 4.0, "qlora": 0.52}
"""Bytes that a method adds for each number of the blocks to what is loaded: dense float32 (twice: full trains a copy), NF4."""


def check_memory(config: RunConfig, available: int | None = None, processes: int = 1) -> int:
    """Refuse a run that will not fit into memory, before anything is loaded; returns the estimate in bytes.

    ``processes`` such runs share what is ``available``, by default what the system says.
    """
    shape, sizes = shape_of(config.model), stored_bytes(config.model)
    groups = (config.group_size or BLOCK) if config.method == "qalora" else 1
    trainable = 0
    for name, size in parameter_shapes(shape).items():
        module = name.removesuffix(".weight")
        if config.method in ADAPTERS and len(size) == 2 and any(matches(module, t) for t in config.lora().target_modules):
            trainable += config.lora().r * (size[0] + size[1] // groups)
        elif config.method == "full" or (config.method == "subset" and any(
                f".{m}." in f".{module}." for m in expand_modules(config.subset_modules))):
            trainable += math.prod(size)
    blocks = sum(math.prod(size) for name, size in parameter_shapes(shape).items() if name.startswith("model.layers."))
    longest = min(config.max_length, shape.context_length)
    usual = longest if config.packing or config.task == "jsonl" else min(longest, 128)
    need = memory.training_bytes(shape, sizes + int(NEW_BYTES.get(config.method, 0.0) * blocks), trainable,
                                 config.batch_size * usual, usual, config.gradient_checkpointing, config.logits_chunk)
    available = memory.available_bytes() if available is None else available
    if available is not None and need * processes > available:
        many = f" in each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"model={config.model!r}, method={config.method!r}, batch_size={config.batch_size}, max_length={longest}: needs "
            f"about {memory.format_bytes(need)} of memory{many}, {memory.format_bytes(available)} are free; take qalora, a "
            "smaller batch_size and gradient_accumulation_steps, a smaller max_length, gradient_checkpointing or logits_chunk")
    return need
