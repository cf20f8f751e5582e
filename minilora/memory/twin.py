"""A model's twin without data: built from a configuration or from a real model, and run by the same code as
the real one.

    base_twin(config, quant=…)   the base of a model that need not exist
    twin_of(model)               the shapes of one that does
    run_step(twin, …)            one training step in one worker; returns the meter that watched it
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from types import MethodType
from typing import Any

import numpy as np

from minilora.adapter import Adapter
from minilora.building import build_model, parameter_shapes
from minilora.config import ModelConfig, QuantConfig, require
from minilora.data.tasks import Batch
from minilora.layers import Array, Embedding, Linear, RMSNorm
from minilora.lora import LoraLinear
from minilora.memory.shapes import Meter, ShapeArray, metered
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.blocks import few_rows
from minilora.quant.packed import PackedWeight, in_vectors
from minilora.quant.reference import packed_size
from minilora.threads import Workers
from minilora.training.loss import loss_and_grads
from minilora.transformer import Transformer
from minilora.variants import lora_of

BLOCK_FORMATS = {"Q4_0": (16, 0), "Q4_1": (16, 2), "Q8_0": (32, 0)}
"""Bytes of codes and of minima in a block of 32; the scale takes two more."""


class ShapeWeight(PackedWeight):
    """A packed weight without data: its products take tiles, scales and results as the real one's do."""

    def __init__(
        self,
        shape: tuple[int, int],
        arrays: dict[str, list[Any]],
        *,
        offset_group: int = 0,
        block_size: int = 32,
        decoded: int = 0,
        few: int = 1,
        bits: int = 4,
        quant_type: str = "",
    ):
        super().__init__(shape)
        self._arrays, self.offset_group, self.block_size, self.bits = arrays, offset_group, block_size, bits
        self.decoded, self._rows_of_kernel = (
            decoded,
            few,
        )  # float32 arrays, one number a block, made for a tile
        self.quant_type, self.largest_tile = quant_type, 0  # in numbers

    @classmethod
    def of(cls, weight: PackedWeight) -> ShapeWeight:
        """The shape of a real weight."""
        arrays = {
            kind: [ShapeArray.new(a.shape, a.dtype) for a in group] for kind, group in weight.arrays().items()
        }
        block_size = getattr(weight, "block_size", 32)
        return cls(
            weight.shape,
            arrays,
            offset_group=getattr(weight, "offset_group", 0),
            few=weight._few,
            bits=weight.bits,
            block_size=block_size,
            decoded=_decoded(weight.arrays(), weight.bits, weight.shape[1], block_size),
            quant_type=getattr(weight, "quant_type", ""),
        )

    @classmethod
    def quantized(cls, shape: tuple[int, int], config: QuantConfig) -> ShapeWeight:
        """What ``quantize_weight`` would store.

        codes        ⌈out·in·bits / 8⌉ bytes (3 bits: 3 bytes for 8 codes)
        int2 … int8  scale and offset, float16 each (or another ``offset_dtype``), for each group of inputs
        nf2 … fp4    absmax, float32, for each block; with double_quant one byte for each block, and for all blocks one mean
                     and for each 256 of them one float32
        """
        out, in_ = shape
        size, zero = out * in_, config.offset_dtype == "zero"
        codes = [ShapeArray.new((packed_size(size, config.bits),), np.uint8)]
        if config.affine:
            require(in_ % config.group_size == 0, "group_size", config.group_size, f"must divide in={in_}")
            groups = (out, in_ // config.group_size)
            offset = (
                ShapeArray.new((packed_size(prod(groups), config.bits),), np.uint8)
                if zero
                else ShapeArray.new(groups, config.offset_dtype)
            )
            arrays: dict[str, list[Any]] = {
                "codes": codes,
                "scales": [ShapeArray.new(groups, np.float16)],
                "offsets": [offset],
                "code_maps": [],
            }
            block = config.group_size
        else:
            block, blocks = config.block_size, -(-size // config.block_size)
            nested = [((blocks,), np.uint8), ((-(-blocks // 256),), np.float32), ((1,), np.float32)]
            names = [config.quant_type, "dynamic"] if config.double_quant else [config.quant_type]
            scales = (
                [ShapeArray.new(*n) for n in nested]
                if config.double_quant
                else [ShapeArray.new((blocks,), np.float32)]
            )
            arrays = {"codes": codes, "scales": scales, "offsets": [], "code_maps": code_maps(*names)}
        return cls(
            shape,
            arrays,
            offset_group=block if config.affine else 0,
            block_size=block,
            decoded=_decoded(arrays, config.bits, in_, block),
            bits=config.bits,
            quant_type=config.quant_type,
        )

    @classmethod
    def stored(cls, shape: tuple[int, int], quant_type: str) -> ShapeWeight:
        """A matrix in a GGUF's blocks of 32."""
        rows = (shape[0], shape[1] // 32)
        codes, minima = BLOCK_FORMATS[quant_type]
        few = few_rows()
        arrays: dict[str, list[Any]] = {
            "codes": [ShapeArray.new((*rows, codes), np.uint8)],
            "scales": [ShapeArray.new(rows, np.float16)],
            "offsets": [ShapeArray.new(rows, np.float16)] if minima else [],
            "code_maps": [],
        }
        return cls(
            shape,
            arrays,
            offset_group=32 if minima else 0,
            few=few,
            bits=int(quant_type[1]),
            quant_type=quant_type,
        )

    def arrays(self) -> dict[str, list[Any]]:
        """By class, as the real weight's."""
        return self._arrays

    def dense(self) -> Any:
        """A fresh float32 array."""
        return ShapeArray.new(self.shape, np.float32)

    def rows(self, ids: Array) -> Any:
        """Each distinct row decoded, and then taken; how many are distinct depends on the text: here all that
        can be."""
        table = ShapeArray.new((min(ids.size, self.shape[0]), self.shape[1]), np.float32)
        return table[ids]

    @property
    def _few(self) -> int:
        return self._rows_of_kernel

    def _decode(self, first: int, last: int) -> Any:
        size = (last - first) * self.shape[1]
        self.largest_tile = max(self.largest_tile, size)
        blocks = -(-size // self.block_size)
        scales = [ShapeArray.new((blocks,), np.float32) for _ in range(self.decoded)]
        del (
            scales
        )  # they end with the decoding; the tile lies in the worker's scratch, which outlasts the step
        with metered(Meter()):
            return ShapeArray.new((last - first, self.shape[1]), np.float32)

    def _tiles(self, size: int) -> list[tuple[int, int]]:
        tiles = super()._tiles(size)
        return (
            [*tiles[:2], tiles[-1]] if len(tiles) > 3 else tiles
        )  # the second adds to the first; the others are alike

    def _decode_into(self, start: int, out: Array) -> None:
        return

    def _multiply_few(self, x: Array, out: Array) -> None:
        return


def _decoded(arrays: dict[str, list[Any]], bits: int, width: int, block_size: int) -> int:
    """How many arrays decoding makes anew: float16 and nested scales and offsets become float32, plain
    float32 ones are views.

    Vectors read a scale and an offset in float16 where they lie, as blocks do.
    """
    scales, offsets = arrays["scales"], arrays["offsets"]
    halves = bool(offsets) and offsets[0].dtype == np.float16
    if arrays["codes"][0].ndim > 1 or (halves and in_vectors(bits, width, block_size)):
        return 0
    return sum(bool(group) and group[0].dtype != np.float32 for group in (scales, offsets))


_maps: dict[str, ShapeArray] = {}


def code_maps(*names: str) -> list[Any]:
    """Tables by name (nf4, …, dynamic), shared by all that decode with them, and so the same objects."""
    for name in names:
        if name not in _maps:
            _maps[name] = ShapeArray.new(
                (256 if name.startswith("dynamic") else 2 ** int(name[-1]),), np.float32
            )
    return [_maps[name] for name in names]


class Draws:
    """Stands for a random generator whose numbers do not matter."""

    def standard_normal(self, shape: tuple[int, ...]) -> Any:
        """float64, as NumPy's."""
        return ShapeArray.new(shape, np.float64)


# ---- twins


def base_twin(
    config: ModelConfig,
    dtype: Any = np.float32,
    quant: QuantConfig | None = None,
    stored: Callable[[str, tuple[int, int]], ShapeWeight | None] = lambda name, shape: None,
) -> Transformer:
    """A frozen base of this shape; its block projections as ``quant`` says, matrices of a file as
    ``stored(name, shape)``."""
    arrays: dict[str, Any] = {}
    for name, shape in parameter_shapes(config).items():
        found = stored(name, (shape[0], shape[1])) if len(shape) == 2 else None
        if found is None and quant is not None and len(shape) == 2 and name.startswith("model.layers."):
            found = ShapeWeight.quantized((shape[0], shape[1]), quant)
        arrays[name] = ShapeArray.new(shape, dtype) if found is None else found
    return build_model(config, arrays)


def twin_of(model: Transformer) -> Transformer:
    """The shapes of a real model, adapters and what trains included; arrays that it shares, the twin
    shares."""
    parameters: dict[int, Parameter] = {}
    weights: dict[int, Any] = {}
    arrays: dict[int, ShapeArray] = {}

    def array(a: Any) -> ShapeArray:
        return arrays.setdefault(id(a), ShapeArray.new(a.shape, a.dtype))

    def parameter(p: Parameter) -> Parameter:
        if id(p) not in parameters:
            parameters[id(p)] = Parameter(p.name, ShapeArray.new(p.data.shape, p.data.dtype), p.trainable)  # type: ignore[arg-type]
        return parameters[id(p)]

    def weight(w: Any) -> Any:
        if id(w) not in weights:
            weights[id(w)] = (
                DenseWeight(parameter(w.param)) if isinstance(w, DenseWeight) else ShapeWeight.of(w)
            )
        return weights[id(w)]

    def linear(old: Any) -> Any:
        if isinstance(old, Linear):
            return Linear(old.name, weight(old.weight))
        new = copy.copy(old)
        for name, value in vars(old).items():  # of any adapter: its base, its parameters, its other arrays
            if isinstance(value, Linear | Adapter):
                setattr(new, name, linear(value))
            elif isinstance(value, Parameter):
                setattr(new, name, parameter(value))
            elif isinstance(value, np.ndarray | ShapeArray):
                setattr(new, name, array(value))
        return new

    twin = model.map_linears(linear)
    twin.embedding = Embedding(model.embedding.name, weight(model.embedding.weight))
    for block in twin.blocks:
        block.input_norm = RMSNorm(parameter(block.input_norm.weight), block.input_norm.eps)
        block.post_norm = RMSNorm(parameter(block.post_norm.weight), block.post_norm.eps)
    twin.norm = RMSNorm(parameter(model.norm.weight), model.norm.eps)
    return twin


def tile_bytes(model: Transformer) -> int:
    """Scratch that a worker keeps for decoded tiles, once the twin has run a step."""
    weights = [linear.base.weight for _, linear in model.linears()]
    largest = max((w.largest_tile for w in weights if isinstance(w, ShapeWeight)), default=0)
    return 4 * largest


def layer_names(model: Transformer) -> dict[int, str]:
    """id of a layer → its name, for everything that computes."""
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
    """Forward and backward pass in one worker, by the code that trains; ``watch`` sees caches and logits, to
    name what they keep.

    The meter's ``marks`` say when each block, and the head, began.
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


def _rope(self: Transformer, positions: Array) -> tuple[Any, Any]:
    shape, dtype = (len(positions), self.config.head_dim // 2), self.embedding.weight.dtype
    return ShapeArray.new(shape, dtype), ShapeArray.new(shape, dtype)


def _dropout_mask(self: LoraLinear, p: Any, key: Any) -> Any:
    return ShapeArray.new(p.shape, np.float32) >= np.float32(self.dropout)


def _observe(model: Transformer, meter: Meter, watch: Callable[[str, Any], None]) -> None:
    """Mark in the meter what begins, and show ``watch`` the whole cache, each restored one, and the logits,
    as they come."""

    def before(owner: Any, method: str, mark: str, show: str = "") -> None:
        original = getattr(owner, method)

        def observed(*args: Any, **kwargs: Any) -> Any:
            meter.mark(mark)
            result = original(*args, **kwargs)
            if show:
                watch(show, result)
            return result

        setattr(owner, method, observed)

    before(model, "forward", "embedding", "forward")
    for i, block in enumerate(model.blocks):
        before(block, "forward", f"forward pass of layers.{i}")
        for half in ("mlp", "attention"):
            before(block, f"restore_{half}", f"backward pass of layers.{i}", f"restored {half} {i}")
        before(block, "backward", f"backward pass of layers.{i}")
    model.head = copy.copy(model.head)
    before(model.head, "forward", "head and loss", "head")


def shape_batch(config: ModelConfig, batch_size: int, tokens: int) -> Batch:
    """Ids that need not mean anything; all targets count."""
    ids = np.zeros((batch_size, tokens), np.int64)
    return Batch(ids, ids, np.ones(ids.shape, bool))
