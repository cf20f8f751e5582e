"""How long a sweep will take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minilora.config import ADAPTERS, TRAINED, LoraConfig
from minilora.injection import inject_lora
from minilora.quant.model import dequantize_model
from minilora.sweep.inputs import base_of, make_run_task
from minilora.sweep.judging import write
from minilora.sweep.run import first_batch
from minilora.sweep.settings import RunConfig
from minilora.sweep.warm import warm_kernels
from minilora.threads import Workers, single_blas
from minilora.training.evaluation import evaluate
from minilora.training.loss import loss_and_grads

TIMED_PROMPTS = 25
"""Prompts written for the estimate."""


def estimate_seconds(configs: Sequence[RunConfig]) -> float:
    """Return the mean seconds of a run in one thread.

    A step and an evaluation of each task are timed now, after the kernels are compiled.
    """
    warm_kernels()
    total = 0.0
    for name in {config.data.task for config in configs}:
        mine = [config for config in configs if config.data.task == name]
        step, loss, text = _time_task(mine[0])
        total += sum(_seconds_of(config, step, loss, text) for config in mine)
    return total / len(configs)


def _time_task(config: RunConfig) -> tuple[float, float, float]:
    """Return the seconds of a step, of an evaluation and of writing all test prompts."""
    base, task = base_of(config.model), make_run_task(config)
    model = inject_lora(dequantize_model(base.model), LoraConfig(), np.random.default_rng(0))
    batch, batches = first_batch(config, task), task.eval_batches("test")
    prompts = task.prompts("test")
    some = prompts[:TIMED_PROMPTS]
    with single_blas(), Workers(1) as one:
        step = _seconds(lambda: loss_and_grads(model, batch, one))
        loss = _seconds(lambda: evaluate(model, batches[:1])) * len(batches)
        text = 0.0
        if prompts:
            seconds = _seconds(lambda: write(model, some, task.max_new_tokens, base.tokenizer))
            text = seconds * len(prompts) / TIMED_PROMPTS
    return step, loss, text


def _seconds_of(config: RunConfig, step: float, loss: float, text: float) -> float:
    """Return the seconds of one run from those of a step, an evaluation and a set of texts."""
    deployed = config.method in ADAPTERS  # measured too
    texts = 0
    if config.data.split == "test":
        texts = 2 + deployed if config.write_all else 1
    steps = config.train.steps * config.train.gradient_accumulation_steps
    return loss * (1 + deployed) + text * texts + (step * steps if config.method in TRAINED else 0.0)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
