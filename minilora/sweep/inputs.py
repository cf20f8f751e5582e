"""What a run starts from: its base and its task, and whether they fit into memory."""

from __future__ import annotations

from functools import lru_cache

from minilora import memory
from minilora.composed import DataConfig, change, settings_in
from minilora.config import CONTROLS, TINY, ConfigError
from minilora.data.examples import read_jsonl, split_examples
from minilora.data.sft import SFTTask, products_chat
from minilora.data.tasks import Task, make_task
from minilora.formats.bases import Pretrained, load_pretrained, shape_of, stored_bytes
from minilora.quant.blocks import GGUF_BLOCK
from minilora.sweep.settings import RunConfig


@lru_cache(maxsize=2)
def base_of(name: str) -> Pretrained:
    """Return the base of a run, kept for the next run of this process."""
    return load_pretrained(name)


@lru_cache(maxsize=2)
def _task(model: str, data: DataConfig) -> Task:
    if model == TINY and data.task != "jsonl":
        return make_task(data.task, text_path=data.text_path, n_train=data.n_train, n_eval=data.n_eval)
    base = base_of(model)
    tokenizer = base.tokenizer
    longest = min(data.max_length, base.model.config.context_length)
    if data.task == "products":
        sizes = {"n_train": data.n_train, "n_eval": data.n_eval}
        return products_chat(tokenizer, **sizes, max_length=longest, packing=data.packing)
    if data.task == "jsonl":
        examples = split_examples(read_jsonl(data.data or ""), data.n_eval)
        return SFTTask(tokenizer, examples, max_length=longest, packing=data.packing)
    window = min(longest, 128)
    return make_task(
        data.task, text_path=data.text_path, n_eval=data.n_eval, window=window, tokenizer=tokenizer
    )


def make_run_task(config: RunConfig) -> Task:
    """Return the task of a run, kept for the next run of this process."""
    return _task(config.model, config.data)


def planned(config: RunConfig) -> memory.Ledger:
    """Return the planner's ledger of a run on its longest usual batch; nothing is loaded."""
    data = config.data
    longest = min(data.max_length, shape_of(config.model).context_length)
    usual = longest if data.packing or data.task == "jsonl" else min(longest, 128)
    row = config.row() | {"shards": config.train.shards, "context": usual}
    if config.method != "subset":
        row["subset_modules"] = None
    names = settings_in(memory.PlanConfig).keys() & row.keys()
    return _plan(change(memory.PlanConfig(), {name: row[name] for name in names}))


_plan = lru_cache(maxsize=64)(memory.plan)


def _shares_base(config: RunConfig, ledger: memory.Ledger) -> bool:
    """Return whether the run trains over the arrays that were loaded: LoRA dense ones, QA-LoRA Q4_1."""
    if config.method == "qalora":
        return any(entry.what == "Q4_1" and entry.layer.startswith("layers.") for entry in ledger.entries)
    _, stored = memory.model_shape(config.model)
    return config.method == "lora" and (
        stored is None or stored("model.layers.0.self_attn.q_proj.weight", (1, GGUF_BLOCK)) is None
    )


def check_memory(config: RunConfig, available: int | None = None, processes: int = 1) -> int:
    """Refuse a run that will not fit into memory, before anything is loaded; return the estimate in bytes.

    Parameters
    ----------
    config
        The run.
    available
        Free bytes. Default: what the system says.
    processes
        Number of such runs that share them.

    Notes
    -----
    The estimate is the planner's bound, with all shards at work at once. It includes the base as it was
    loaded where other weights are made from it.
    """
    need = stored_bytes(config.model)
    if config.method not in CONTROLS:
        ledger = planned(config)
        need = ledger.bound(ledger.shards) + (0 if _shares_base(config, ledger) else need)
    available = memory.available_bytes() if available is None else available
    if available is not None and need * processes > available:
        each = f" in each of {processes} processes" if processes > 1 else ""
        longest = min(config.data.max_length, shape_of(config.model).context_length)
        raise ConfigError(
            f"model={config.model!r}, method={config.method!r}, batch_size={config.train.batch_size}, "
            f"max_length={longest}: needs about {memory.format_bytes(need)} of memory{each}, "
            f"{memory.format_bytes(available)} are free; take qalora, a smaller batch_size and "
            "gradient_accumulation_steps, a smaller max_length, gradient_checkpointing or logits_chunk"
        )
    return need
