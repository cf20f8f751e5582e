"""A model's twin: the same model over arrays without data, run by the same code.

base_twin(config, quant=…)   the base of a model that need not exist
twin_of(model)               the twin of one that does
run_step(twin, …)            one training step in one worker; returns the meter that watched it
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np

from minilora.adapter import Adapter, AnyLinear
from minilora.building import build_model, parameter_shapes
from minilora.config import ModelConfig, QuantConfig
from minilora.data.tasks import Batch
from minilora.layers import Embedding, Linear, RMSNorm
from minilora.lora import LoraLinear
from minilora.memory.shape_weights import ShapeWeight
from minilora.memory.shapes import Meter, ShapeArray, metered
from minilora.parameters import Array, DenseWeight, Parameter
from minilora.threads import Workers
from minilora.training.loss import loss_and_grads
from minilora.transformer import Transformer
from minilora.variants import lora_of

BATCHES_ALIKE = 3
"""Batches of gradient accumulation that run: the first, one that finds a sum, and one for the rest."""


class Draws:
    """Stands for a random generator whose numbers do not matter."""

    def standard_normal(self, shape: tuple[int, ...]) -> Any:
        """Return float64, as NumPy does."""
        return ShapeArray.new(shape, np.float64)


# ---- twins


def base_twin(
    config: ModelConfig,
    dtype: Any = np.float32,
    quant: QuantConfig | None = None,
    stored: Callable[[str, tuple[int, int]], ShapeWeight | None] = lambda name, shape: None,
) -> Transformer:
    """Return a frozen base of this shape.

    Parameters
    ----------
    config : ModelConfig
        The shape.
    dtype : numpy.dtype
        Dtype of dense arrays.
    quant : QuantConfig, optional
        How block projections are quantized.
    stored : callable, optional
        (name, shape) of a matrix → its weight as a file stores it, or None.
    """
    arrays: dict[str, Any] = {}
    for name, shape in parameter_shapes(config).items():
        found = None
        if len(shape) == 2:
            size = (shape[0], shape[1])
            found = stored(name, size)
            if found is None and quant is not None and name.startswith("model.layers."):
                found = ShapeWeight.quantized(size, quant)
        arrays[name] = ShapeArray.new(shape, dtype) if found is None else found
    return build_model(config, arrays)


def twin_of(model: Transformer) -> Transformer:
    """Return the twin of a real model, adapters and what trains included.

    Arrays that the model shares, the twin shares too.
    """
    copies = _Copies()
    twin = model.map_linears(copies.linear)
    twin.embedding = Embedding(model.embedding.name, copies.weight(model.embedding.weight))
    for block in twin.blocks:
        block.input_norm, block.post_norm = copies.norm(block.input_norm), copies.norm(block.post_norm)
    twin.norm = copies.norm(model.norm)
    return twin


class _Copies:
    """Makes each part of a twin once."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept, so that no id is used twice

    def _once(self, original: Any, make: Callable[[], Any]) -> Any:
        if id(original) not in self._made:
            self._made[id(original)] = make()
            self._originals.append(original)
        return self._made[id(original)]

    def array(self, a: Any) -> ShapeArray:
        return self._once(a, lambda: ShapeArray.new(a.shape, a.dtype))

    def parameter(self, p: Parameter) -> Parameter:
        def make() -> Parameter:
            data: Any = ShapeArray.new(p.data.shape, p.data.dtype)
            return Parameter(p.name, data, p.trainable)

        return self._once(p, make)

    def weight(self, w: Any) -> Any:
        if isinstance(w, DenseWeight):
            return self._once(w, lambda: DenseWeight(self.parameter(w.param)))
        return self._once(w, lambda: ShapeWeight.of(w))

    def norm(self, n: RMSNorm) -> RMSNorm:
        return RMSNorm(self.parameter(n.weight), n.eps)

    def linear(self, old: AnyLinear) -> Any:
        """Return the twin of a Linear, or of an adapter of any class."""
        if isinstance(old, Linear):
            return Linear(old.name, self.weight(old.weight))
        new = copy.copy(old)
        for name, value in vars(old).items():
            setattr(new, name, self._of_adapter(value))
        return new

    def _of_adapter(self, value: Any) -> Any:
        """Return the twin of an adapter's attribute: base, parameters and arrays; others stay."""
        if isinstance(value, Linear | Adapter):
            return self.linear(value)
        if isinstance(value, Parameter):
            return self.parameter(value)
        if isinstance(value, np.ndarray | ShapeArray):
            return self.array(value)
        if type(value) in (list, tuple):
            return type(value)(map(self._of_adapter, value))
        return value


def tile_bytes(model: Transformer) -> int:
    """Return the scratch that a worker keeps for decoded tiles, once the twin has run a step."""
    weights = [linear.base.weight for _, linear in model.linears()]
    largest = max((w.largest_tile for w in weights if isinstance(w, ShapeWeight)), default=0)
    return 4 * largest


def shape_batch(config: ModelConfig, batch_size: int, tokens: int) -> Batch:
    """Return a batch of ids that mean nothing; all targets count."""
    ids = np.zeros((batch_size, tokens), np.int64)
    return Batch(ids, ids, np.ones(ids.shape, bool))


# ---- a step


def run_step(
    twin: Transformer,
    batch: Batch,
    *,
    shards: int = 2,
    accumulation: int = 1,
    checkpoint: bool = False,
    logits_chunk: int = 0,
    watch: Callable[[str, Any], None] | None = None,
) -> Meter:
    """Run a forward and a backward pass in one worker, by the code that trains; return its meter.

    The meter's `marks` say when each block, and the head, began. `watch` sees ("forward", (x, cache)),
    ("restored attention 3", cache), ("head", (logits, cache)) as they come, to name what they keep.
    """
    model = copy.copy(twin)
    model.blocks = [copy.copy(block) for block in twin.blocks]
    meter = Meter(layer_names(twin) | {id(block): f"layers.{i}" for i, block in enumerate(model.blocks)})
    model.rope = MethodType(_rope, model)  # type: ignore[method-assign]
    for _, linear in model.linears():
        lora = lora_of(linear)
        if lora is not None:
            lora.dropout_mask = MethodType(_dropout_mask, lora)  # type: ignore[method-assign]
    _observe(model, meter, watch or (lambda what, value: None))
    with metered(meter), Workers(1) as one:
        loss_and_grads(
            model,
            [batch] * accumulation,
            one,
            shards=shards,
            stream=(0, 0),
            checkpoint=checkpoint,
            logits_chunk=logits_chunk,
        )
    return meter


def layer_names(model: Transformer) -> dict[int, str]:
    """Return id of a layer → its name, for everything that computes."""
    names: dict[int, str] = {id(model): "model", id(model.embedding): "embed_tokens", id(model.norm): "norm"}
    for i, block in enumerate(model.blocks):
        parts = {
            "": block,
            ".self_attn": block.attention,
            ".mlp": block.mlp,
            ".input_layernorm": block.input_norm,
            ".post_attention_layernorm": block.post_norm,
        }
        names |= {id(part): f"layers.{i}{name}" for name, part in parts.items()}
    names |= {id(linear): linear.name.removeprefix("model.") for _, linear in model.linears()}
    return names


def _rope(self: Transformer, positions: Array) -> tuple[Any, Any]:
    shape, dtype = (len(positions), self.config.head_dim // 2), self.embedding.weight.dtype
    return ShapeArray.new(shape, dtype), ShapeArray.new(shape, dtype)


def _dropout_mask(self: LoraLinear, p: Any, key: Any) -> Any:
    return ShapeArray.new(p.shape, np.float32) >= np.float32(self.dropout)


def _observe(model: Transformer, meter: Meter, watch: Callable[[str, Any], None]) -> None:
    """Mark in the meter what begins, and show `watch` what it returns."""

    def mark(owner: Any, method: str, name: str, show: str = "") -> None:
        original = getattr(owner, method)

        def observed(*args: Any, **kwargs: Any) -> Any:
            meter.mark(name)
            result = original(*args, **kwargs)
            if show:
                watch(show, result)
            return result

        setattr(owner, method, observed)

    mark(model, "forward", "embedding", "forward")
    for i, block in enumerate(model.blocks):
        mark(block, "forward", f"forward pass of layers.{i}")
        for half in ("mlp", "attention"):
            mark(block, f"restore_{half}", f"backward pass of layers.{i}", f"restored {half} {i}")
        mark(block, "backward", f"backward pass of layers.{i}")
    model.head = copy.copy(model.head)
    mark(model.head, "forward", "head and loss", "head")
