"""Compile all kernels before worker processes start, which would otherwise each compile the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

from minilora import kernels
from minilora.building import init_model
from minilora.config import AFFINE_TYPES, CODEBOOK_TYPES, LoraConfig, ModelConfig, QuantConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.generation import generate
from minilora.injection import full, inject_lora
from minilora.kernels.rows import swiglu_forward
from minilora.quant.compilation import compile_kernels
from minilora.quant.model import quantize_model
from minilora.threads import Workers, available_threads, single_blas
from minilora.training.evaluation import evaluate
from minilora.training.loss import loss_and_grads
from minilora.training.optimizers import clip_, make_optimizer
from minilora.transformer import Transformer


def warm_kernels() -> float:
    """Compile, or load from disk, every kernel of a sweep of the tiny base; return the seconds it took.

    Kernels are compiled for types and not for sizes. So a toy model takes the steps of all methods, over all
    kinds of weights. Numba compiles in one thread; if nothing is on disk yet, a second process compiles the
    kernels that quantize.
    """
    start = time.perf_counter()
    sizes: Any = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    shape = ModelConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    toy = init_model(shape, np.random.default_rng(0))
    helper = _start_helper() if _nothing_compiled() and available_threads() > 1 and sys.executable else None
    _touch(full(toy))
    _touch(inject_lora(toy, LoraConfig(), np.random.default_rng(0)))
    if helper:
        helper.wait()  # if it failed, this process compiles its kernels
    for kind in CODEBOOK_TYPES + AFFINE_TYPES:
        config = LoraConfig(use_qalora=kind in AFFINE_TYPES)
        _touch(inject_lora(quantize_model(toy, QuantConfig(kind)), config, np.random.default_rng(0)))
    return time.perf_counter() - start


def _start_helper() -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", "from minilora.sweep.warm import warm_beside; warm_beside()"]
    silent: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment, **silent)


def warm_beside() -> None:
    """Compile in the second process: what quantizes, and an adapter's narrow product."""
    kernels.linear_forward(np.ones((16, 16), np.float32), np.ones((2, 16), np.float32))
    compile_kernels()


def _nothing_compiled() -> bool:
    """Return whether a kernel that all models need was missing in Numba's cache on disk."""
    one = np.ones(1, np.float32)
    kernels.swiglu_forward(one, one)
    kernel: Any = swiglu_forward
    return hasattr(kernel, "stats") and bool(kernel.stats.cache_misses)


def _touch(model: Transformer) -> None:
    ids = np.arange(32).reshape(2, 16)
    batch = Batch(ids, ids, np.ones(ids.shape, bool))
    with single_blas(), Workers(1) as one:
        grads = loss_and_grads(model, batch, one)[1]
        clip_(grads, 1.0)
        make_optimizer(model.trainable(), TrainConfig()).step(grads, 0.0)
        evaluate(model, [batch])
        generate(model, [[1, 2]], 2, threads=1)
