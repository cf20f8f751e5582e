"""What a run starts from: its base, its task, and whether both fit into memory."""

from __future__ import annotations

from functools import lru_cache

from minilora import memory
from minilora.config import CONTROLS, ConfigError
from minilora.data.examples import read_jsonl, split_examples
from minilora.data.sft import SFTTask, products_chat
from minilora.data.tasks import Task, make_task
from minilora.formats.bases import Pretrained, load_pretrained, shape_of, stored_bytes
from minilora.quant.blocks import GGUF_BLOCK
from minilora.sweep.settings import TINY, RunConfig


@lru_cache(maxsize=2)
def base_of(name: str) -> Pretrained:
    """The base of a run, kept for the next run of this process."""
    return load_pretrained(name)


@lru_cache(maxsize=2)
def _task(
    model: str,
    name: str,
    text_path: str | None,
    data: str | None,
    n_train: int,
    n_eval: int,
    max_length: int,
    packing: bool,
) -> Task:
    if model == TINY and name != "jsonl":
        return make_task(name, text_path=text_path, n_train=n_train, n_eval=n_eval)
    base = base_of(model)
    tokenizer, max_length = base.tokenizer, min(max_length, base.model.config.context_length)
    if name == "products":
        return products_chat(
            tokenizer, n_train=n_train, n_eval=n_eval, max_length=max_length, packing=packing
        )
    if name == "jsonl":
        examples = split_examples(read_jsonl(data or ""), n_eval)
        return SFTTask(tokenizer, examples, max_length=max_length, packing=packing)
    return make_task(
        name, text_path=text_path, n_eval=n_eval, window=min(max_length, 128), tokenizer=tokenizer
    )


def make_run_task(config: RunConfig) -> Task:
    """The task of a run, kept for the next run of this process."""
    return _task(
        config.model,
        config.task,
        config.text_path,
        config.data,
        config.n_train,
        config.n_eval,
        config.max_length,
        config.packing,
    )


def planned(config: RunConfig) -> memory.Ledger:
    """The planner's ledger of a run on its longest usual batch; nothing is loaded."""
    longest = min(config.max_length, shape_of(config.model).context_length)
    usual = longest if config.packing or config.task == "jsonl" else min(longest, 128)
    return _plan(
        memory.PlanConfig(
            model=config.model,
            method=config.method,
            r=config.r or 8,
            target_modules=config.target_modules or "all-linear",
            subset_modules=config.subset_modules if config.method == "subset" else None,
            quant_type=config.quant_type,
            group_size=config.group_size or GGUF_BLOCK,
            block_size=config.block_size or 64,
            double_quant=config.double_quant is not False,
            use_dora=config.use_dora,
            lora_dropout=config.lora_dropout,
            optimizer=config.optimizer,
            batch_size=config.batch_size,
            context=usual,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_checkpointing=config.gradient_checkpointing,
            logits_chunk=config.logits_chunk,
        )
    )


_plan = lru_cache(maxsize=64)(memory.plan)


def _shares_base(config: RunConfig, ledger: memory.Ledger) -> bool:
    """Whether the run trains over the very arrays that were loaded, as LoRA does over dense ones and QA-LoRA
    over Q4_1."""
    if config.method == "qalora":
        return any(e.what == "Q4_1" and e.layer.startswith("layers.") for e in ledger.entries)
    _, stored = memory.model_shape(config.model)
    return config.method == "lora" and (
        stored is None or stored("model.layers.0.self_attn.q_proj.weight", (1, GGUF_BLOCK)) is None
    )


def check_memory(config: RunConfig, available: int | None = None, processes: int = 1) -> int:
    """Refuse a run that will not fit into memory, before anything is loaded; returns the estimate in bytes.

    ``processes`` such runs share what is ``available``, by default what the system says. What is counted is
    the planner's bound, all shards at work at once, and the base as it was loaded, which stays beside weights
    that are made from it.
    """
    need = stored_bytes(config.model)
    if config.method not in CONTROLS:
        ledger = planned(config)
        need = ledger.bound(ledger.shards) + (0 if _shares_base(config, ledger) else need)
    available = memory.available_bytes() if available is None else available
    if available is not None and need * processes > available:
        many = f" in each of {processes} processes" if processes > 1 else ""
        longest = min(config.max_length, shape_of(config.model).context_length)
        raise ConfigError(
            f"model={config.model!r}, method={config.method!r}, batch_size={config.batch_size}, max_length={longest}: needs "
            f"about {memory.format_bytes(need)} of memory{many}, {memory.format_bytes(available)} are free; take qalora, a "
            "smaller batch_size and gradient_accumulation_steps, a smaller max_length, gradient_checkpointing or logits_chunk"
        )
    return need
