"""One run: a configuration goes in, one flat row comes out.

What is in a row is listed in `minilora.sweep.results.COLUMNS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora import memory
from minilora.config import ADAPTERS, TINY, TRAINED
from minilora.data.sft import SFTTask
from minilora.data.tasks import Batch, Task
from minilora.formats.checkpoint import save_model
from minilora.formats.peft import save_adapter
from minilora.sweep.environment import environment
from minilora.sweep.inputs import base_of, check_memory, make_run_task
from minilora.sweep.judging import judge
from minilora.sweep.run_models import build, check_gptq_blocks
from minilora.sweep.saved_runs import ADAPTER, claim_folder
from minilora.sweep.settings import RunConfig
from minilora.threads import Workers
from minilora.training.resume import CHECKPOINT
from minilora.training.schedule import batch_indices
from minilora.training.trainer import Trainer
from minilora.transformer import Transformer


def run(
    config: RunConfig,
    folder: str | Path | None = None,
    threads: int = 1,
    progress: bool = False,
    built: Callable[[Transformer], None] | None = None,
) -> dict[str, Any]:
    """Train and measure one configuration, and return its row.

    Parameters
    ----------
    config
        The run. With `train.checkpoint_every`, training continues from a checkpoint in the folder.
    folder
        Folder for what was learnt. One that holds another run is refused.
    threads
        Worker threads; they change the speed and never the result.
    progress
        Show progress, and predicted and measured memory.
    built
        Called with the model before it trains.

    Raises
    ------
    ValueError
        Bad input, or, as `NonFiniteError`, a loss that is not finite.

    Examples
    --------
    >>> row = run(RunConfig.of(method="base", n_eval=2, write_all=False))
    >>> row["status"], row["trainable_params"], 0 < row["loss"] < 6
    ('success', 0, True)
    """
    start = time.perf_counter()
    trains = config.method in TRAINED
    if trains and config.model != TINY:
        check_memory(config)
    base = base_of(config.model)
    check_gptq_blocks(config, base.model)
    task = make_run_task(config)
    if progress and isinstance(task, SFTTask):
        print(f"data: {task.report}")
    model = build(config, base.model)
    if built is not None:
        built(model)
    if folder is not None:
        claim_folder(Path(folder), config, base.sha256)
    row: dict[str, Any] = {"key": config.key(), **config.row(), "status": "success", "error": None}
    with Workers(threads) as workers:
        trainer = None
        if trains:
            trainer = Trainer(model, task, config.training(), threads=threads, folder=folder)
            row |= _train(trainer, first_batch(config, task), progress)
        if folder is not None:  # saved before it is measured: what was learnt outlasts a failing evaluation
            row["bytes_adapter_file"] = _save(config, model, Path(folder))
        row |= ledger(config, model, task, trainer)  # before merged weights stand beside the model's
        if progress and trainer is not None:
            batch, settings = first_batch(config, task), trainer.config
            measured = memory.measure(model, batch, settings, trainer.optimizer, warm_up=False)
            print(f"measured:  {measured.short()}", flush=True)
        trainer = None  # frees the optimizer's state
        row |= judge(config, model, task, base.tokenizer, workers, progress)
    if progress and trains:
        print(f"after evaluation too, {memory.resident_line()}")
    if config.model != TINY:  # a token is not a byte
        for name in ("bpb", "deployed_bpb"):
            row.pop(name, None)
    row |= {"corpus_sha256": task.sha256, "base_sha256": base.sha256}
    return row | environment() | {"seconds": time.perf_counter() - start}


def _train(trainer: Trainer, batch: Batch, progress: bool) -> dict[str, Any]:
    """Train, from the checkpoint if there is one; return the columns about it."""
    config, folder = trainer.config, trainer.folder
    if folder is not None and config.checkpoint_every and (folder / CHECKPOINT).is_file():
        trainer.load(folder / CHECKPOINT)
        if progress:
            print(f"continuing at step {trainer.step} of {config.steps}, from {folder / CHECKPOINT}")
    if progress:
        predicted = memory.measure(trainer.model, batch, config, trainer.optimizer, run=False)
        print(f"predicted: {predicted.short()}", flush=True)
    steps = trainer.train(progress).steps
    if progress:
        print(f"after training, {memory.resident_line()}", flush=True)
    losses = [step["loss"] for step in steps[-20:]]
    timed = [step["seconds"] for step in steps if "seconds" in step]  # steps from a checkpoint carry no time
    median = float(np.median(timed)) if timed else None
    return {"train_loss": sum(losses) / len(losses), "step_seconds": median}


def _save(config: RunConfig, model: Transformer, folder: Path) -> int | None:
    """Save what was learnt; return the bytes of the adapter's file, if it is an adapter."""
    if config.method in ADAPTERS:
        return save_adapter(model, config.adapter(), folder / ADAPTER)
    if config.method in TRAINED:
        save_model(model, folder / "model.safetensors")
    return None


def ledger(config: RunConfig, model: Transformer, task: Task, trainer: Trainer | None) -> dict[str, Any]:
    """Return the columns of bytes, parameter counts and effective bits.

    They come from the ledger of one more forward and backward pass. Activations and peak are those of the
    whole batch at once, as when every shard has a thread.
    """
    trainable, total = memory.count_parameters(model)
    row: dict[str, Any] = {
        "trainable_params": trainable,
        "all_params": total,
        "effective_bits": memory.effective_bits(model),
    }
    row |= {f"bytes_{kind}": n for kind, n in memory.model_bytes(model).items()}
    row |= {"bytes_gradients": 0, "bytes_optimizer": 0, "bytes_activations": 0}
    if trainer is None:
        return row
    whole = replace(trainer.config, shards=1)
    found = memory.measure(model, first_batch(config, task), whole, trainer.optimizer, warm_up=False)
    kinds = found.by_kind()
    for kind in ("gradients", "optimizer", "logits", "tiles", "temporaries"):
        row[f"bytes_{kind}"] = kinds.get(kind, 0)
    row["bytes_activations"] = sum(entry.nbytes for entry in found.kept)
    row |= {"bytes_on_disk": found.on_disk, "bytes_peak": found.measured, "bytes_peak_predicted": found.peak}
    return row


def first_batch(config: RunConfig, task: Task) -> Batch:
    """Return the batch of the first step."""
    return task.batch(batch_indices(task.n_train, config.train.batch_size, 0, config.seed))
