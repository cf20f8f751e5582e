"""minilora's side of every comparison, run in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.timing import peak_mib, reset_peak, resident_mib, timed
from minilora.building import build_model
from minilora.config import LoraConfig, QuantConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.formats.checkpoint import load_base
from minilora.generation import generate
from minilora.injection import full, inject_lora
from minilora.lora import LoraLinear
from minilora.memory import packed_weights
from minilora.quant.model import quantize_model
from minilora.quant.weights import CodebookWeight, DoubleQuant, quantize_weight
from minilora.threads import Workers, single_blas
from minilora.training.allocator import keep_freed_memory
from minilora.training.loss import loss_and_grads
from minilora.training.optimizers import clip_, make_optimizer
from minilora.transformer import Transformer

Array = np.ndarray
SMALL = {"checkpoint": True, "logits_chunk": 32}
"""What saves memory: the backward pass computes blocks again, and logits come 32 rows at a time."""


class Ours:
    """Build a model or a kernel call, show its result, and time it.

    As in the Trainer, each shard has one BLAS thread.
    """

    def __init__(self, threads: int = 2, keep: bool = True, shards: int | None = None):
        if keep:
            keep_freed_memory()
        self._blas = single_blas()
        self._blas.__enter__()  # for the life of this process
        self.threads, self.shards = threads, shards or threads
        self.workers = cache(Workers)  # a pool for each number of threads
        self.works: dict[str, Callable[[], Any]] = {}
        self.model: Any = None
        self.optimizer: Any = None

    def close(self) -> None:
        """Give the BLAS its threads back; needed only where the process lives on."""
        self._blas.__exit__(None, None, None)

    def timed(self, label: str, n: int) -> float:
        """Return the seconds of one call of a prepared work, from n in a row."""
        return timed(self.works[label], n)

    def result(self, label: str) -> Any:
        """Return what a prepared work returns."""
        return self.works[label]()

    def reset_peak(self) -> None:
        """Forget the largest memory so far."""
        reset_peak()

    def peak_mib(self) -> float | None:
        """Return the largest memory of this process since then."""
        return peak_mib()

    def loaded_mib(self) -> float | None:
        """Return the resident memory before the first step, and count the peak from here.

        Every stored array is read once first: the pages of a mapped file belong to what is loaded.
        """
        keep_freed_memory()  # as the Trainer does when it starts
        for array in [p.data for p in self.model.parameters()] + [
            a for w in packed_weights(self.model) for arrays in w.arrays().values() for a in arrays
        ]:
            array.max()  # a mapped file's pages belong to what is loaded
        reset_peak()
        return resident_mib()

    # ---- training step

    def build(
        self,
        name: str | workload.Size,
        method: str,
        states: dict[str, tuple[Array, ...]] | None = None,
        r: int = workload.R,
    ) -> None:
        """Make a model of a size ready for a method.

        `states` are bitsandbytes' quantized weights, so that both sides compute with the same.
        """
        self.works.clear()
        self.model = self.optimizer = None
        size = workload.SIZES[name] if isinstance(name, str) else name
        base = build_model(size.config, workload.weights(size))
        if method == "qlora" and states is not None:
            base = base.map_linears(lambda linear: adopt(linear, states))
        elif method == "qlora":
            base = quantize_model(base, QuantConfig("nf4"))
        elif method == "qalora":
            base = quantize_model(base, QuantConfig("int4", group_size=workload.GROUP_SIZE))
        if method == "full":
            model = full(base)
        else:
            config = LoraConfig(r, workload.ALPHA, use_qalora=method == "qalora")
            model = inject_lora(base, config, np.random.default_rng(0))
            set_adapters(model, workload.adapters(size, workload.GROUP_SIZE if method == "qalora" else 1, r))
        del base
        self._ready(model, *workload.batch(size))

    def _ready(self, model: Transformer, ids: Array, targets: Array) -> None:
        """Keep the model and its batch; the work "step" trains it once."""
        self.model, self.batch = model, Batch(ids, targets, np.ones(ids.shape, bool))
        self.optimizer = make_optimizer(model.trainable(), TrainConfig(shards=self.shards))
        self.grads: dict[str, Array] = {}
        self.works |= {"step": self._step, "fast": self._step, "small": partial(self._step, **SMALL)}

    def _loss_and_grads(self, **memory: Any) -> tuple[float, Any]:
        return loss_and_grads(
            self.model, self.batch, self.workers(self.threads), shards=self.shards, stream=(0, 0), **memory
        )

    def _step(self, **memory: Any) -> None:
        _, grads = self._loss_and_grads(**memory)
        clip_(grads, workload.MAX_NORM, self.workers(self.threads))
        self.optimizer.step(grads, workload.LEARNING_RATE, self.workers(self.threads))

    def loss(self) -> tuple[float, list[str]]:
        """Return the loss, and the names of the arrays whose gradients `gradient` returns one by one."""
        loss, grads = self._loss_and_grads()
        self.grads = {p.name: g for p, g in grads.items()}
        return loss, list(self.grads)

    def gradient(self, name: str) -> Array:
        """Return the gradient of one array, and forget it."""
        return self.grads.pop(name)

    def dense_weights(self) -> dict[str, Array]:
        """Return the quantized projections as float32."""
        adapted = [linear for _, linear in self.model.linears() if isinstance(linear, LoraLinear)]
        return {f"{linear.name}.weight": linear.base.weight.dense() for linear in adapted}

    # ---- kernels

    def prepare(self, label: str, op: str, kind: str, n: int, batch: int, threads: int) -> None:
        """Prepare an operation on a weight (n, n).

        Parameters
        ----------
        op
            "quantize", "dequantize", "product", "fill" or "copy".
        kind
            "nf4", "int4" or "dense".
        """
        workers = self.workers(threads)
        w, x = workload.matrices(n, batch)
        quant = QuantConfig(
            kind if kind in ("nf4", "int4") else "nf4", double_quant=False, group_size=workload.GROUP_SIZE
        )
        if op in ("fill", "copy"):
            sources, targets = np.array_split(w, threads), np.array_split(np.empty_like(w), threads)
            change = (
                (lambda i: targets[i].fill(1))
                if op == "fill"
                else (lambda i: np.copyto(targets[i], sources[i]))
            )
            self.works[label] = lambda: workers.map(change, range(threads))
        elif op == "quantize":  # each thread quantizes half of the rows
            rows = np.array_split(w, threads)
            self.works[label] = lambda: [
                _packed(q) for q in workers.map(lambda part: quantize_weight(part, quant), rows)
            ]
        elif op == "dequantize":
            parts = [quantize_weight(part, quant) for part in np.array_split(w, threads)]
            self.works[label] = lambda: workers.map(lambda part: part.dense(), parts)
        elif batch == 1:  # each thread multiplies the input by half of the rows
            parts = [
                part if kind == "dense" else quantize_weight(part, quant)
                for part in np.array_split(w, threads)
            ]
            times = (lambda part: x @ part.T) if kind == "dense" else (lambda part: part.matmul(x))
            self.works[label] = lambda: [np.concatenate(workers.map(times, parts), axis=1)]
        else:  # each thread multiplies half of the inputs by the whole weight, as shards do in training
            multiply = (lambda part: part @ w.T) if kind == "dense" else quantize_weight(w, quant).matmul
            pieces = np.array_split(x, min(threads, batch))
            self.works[label] = lambda: workers.map(multiply, pieces)

    # ---- generation

    def prepare_generation(self, batch: int, tokens: int) -> dict[str, Array]:
        """Prepare greedy text from the shipped base, and return the base's weights."""
        base, prompts = load_base(), workload.prompts(batch)
        self.works["generate"] = lambda: generate(base, prompts, tokens)
        self.works["logits"] = lambda: _last_logits(base, np.array(prompts))
        return {p.name: p.data for p in base.parameters()}


def set_adapters(model: Transformer, values: dict[str, Array]) -> None:
    """Set every trainable array to the value of its name."""
    for p in model.trainable():
        p.data[...] = values[p.name]


def adopt(linear: Any, states: dict[str, tuple[Array, ...]]) -> Any:
    """Return the linear with bitsandbytes' quantized weight, if there is one."""
    if linear.name not in states:
        return linear
    codes, scale_codes, absmax, offset = states[linear.name]
    weight = CodebookWeight(codes, DoubleQuant(scale_codes, absmax, offset), linear.shape, "nf4", 64)
    return type(linear)(linear.name, weight)


def _packed(weight: Any) -> tuple[Array, Array]:
    return weight.codes, weight.arrays()["scales"][0]


def _last_logits(model: Transformer, ids: Array) -> Array:
    return model.logits(ids)[:, -1]
