"""Quantize a whole model: its block projections one by one, or layer by layer with GPTQ and calibration data.

Embedding, norms and head stay as they are, as in bitsandbytes and GPTQ.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from minilora.config import ConfigError, QuantConfig, matches, require
from minilora.layers import Block, Cache, Embedding, Key, Linear
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.blocks import BlockWeight
from minilora.quant.gptq import Hessian, gptq
from minilora.quant.packed import Array
from minilora.quant.weights import quantize_weight
from minilora.threads import single_blas

if TYPE_CHECKING:
    from minilora.transformer import Transformer

STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that read the same input. A later input has passed through the quantized earlier stages."""


def quantize_model(
    model: Transformer,
    config: QuantConfig,
    calibration: Sequence[Array] = (),
    progress: bool = False,
    only: Collection[str] | None = None,
) -> Transformer:
    """Return a new model whose block projections are stored in few bits.

    Parameters
    ----------
    model : Transformer
        Without adapters. It stays as it is.
    config : QuantConfig
        The type, block or group size, and quantizer.
    calibration : sequence of Array
        Token ids (B, T), batch by batch; for `quantizer="gptq"` alone.
    progress : bool
        Show a bar over the layers of GPTQ.
    only : collection of str, optional
        Names of the projections to quantize; all by default.

    Raises
    ------
    ConfigError
        For a model with adapters, and for GPTQ without data.
    """
    if any(not isinstance(linear, Linear) for _, linear in model.linears()):
        raise ConfigError(
            "model: has an adapter; quantize the base model first and inject the adapter into that"
        )
    if config.quantizer != "gptq":
        names = set(_names(model)) if only is None else set(_names(model)) & set(only)

        def quantized(linear: Linear) -> Linear:
            if linear.name not in names:
                return linear
            return Linear(linear.name, quantize_weight(linear.weight.dense(), config))

        return model.map_linears(quantized)
    for ids in calibration:
        ok = (
            ids.ndim == 2
            and ids.dtype.kind in "iu"
            and ids.size
            and ids.min() >= 0
            and ids.max() < model.config.vocab_size
        )
        require(
            bool(ok) and ids.shape[1] <= model.config.context_length,
            "calibration",
            f"{ids.dtype} {ids.shape}",
            f"token ids (B, T) from 0 to {model.config.vocab_size - 1}, "
            f"T up to {model.config.context_length}",
        )
    require(
        sum(ids.size for ids in calibration) > 0,
        "calibration",
        "no tokens",
        "quantizer='gptq' needs token ids to see each layer's inputs, a few dozen sequences at least",
    )
    done = quantize_by_layer(model, config, calibration, progress, only)
    return model.map_linears(lambda linear: done.get(linear.name, linear))


def dequantize_model(model: Transformer, table: bool = True) -> Transformer:
    """Return a new model with every weight dense in float32; a tied head stays tied.

    With `table=False` embedding and head keep their blocks, the same numbers in a quarter of the memory. They
    are copied, so that the file need not stay mapped.
    """
    dense: dict[int, Any] = {}
    tables = (model.embedding.weight, getattr(model.head, "weight", None))

    def weight(name: str, stored: Any) -> Any:
        if isinstance(stored, DenseWeight):
            return stored
        if id(stored) not in dense:
            if not table and isinstance(stored, BlockWeight) and any(stored is other for other in tables):
                dense[id(stored)] = BlockWeight(stored.blocks.copy(), stored.quant_type, stored.shape)
            else:
                dense[id(stored)] = DenseWeight(Parameter(f"{name}.weight", stored.dense()).freeze())
        return dense[id(stored)]

    embedding = Embedding(model.embedding.name, weight(model.embedding.name, model.embedding.weight))
    new = model.map_linears(lambda linear: Linear(linear.name, weight(linear.name, linear.weight)))
    new.embedding = embedding
    return new


@single_blas()
def quantize_by_layer(
    model: Transformer,
    config: QuantConfig,
    calibration: Sequence[Array],
    progress: bool = False,
    only: Collection[str] | None = None,
) -> dict[str, Linear]:
    """Run GPTQ through the model's own forward pass; return the quantized linears by name.

    Each block reads what the quantized blocks below it compute, so that later layers also make up for earlier
    ones. Memory holds the hidden states of the calibration data, one block, and the Hessian of one input.

    References
    ----------
    GPTQ, arXiv 2210.17323, section 4.
    """
    hidden = [model.embedding.forward(ids)[0] for ids in calibration]
    ropes = [model.rope(np.arange(ids.shape[1])) for ids in calibration]
    done: dict[str, Linear] = {}
    for block in tqdm(model.blocks, desc="gptq", unit="layer", disable=not progress):
        block = _copy(block)
        for stage in STAGES:
            members = [
                (owner, name, linear)
                for owner, name, linear in block.linears()
                if name in stage and (only is None or linear.name in only)
            ]
            if not members:
                continue
            owner, name, first = members[0]
            recorder = _Recorder(first, stop=True)
            setattr(owner, name, recorder)
            for x, rope in zip(hidden, ropes, strict=True):
                with suppress(_SeenError):  # what comes after the recorder is not needed yet
                    block.forward(x, rope)
            hessian = recorder.hessian.value()
            for owner, name, linear in members:
                weight, _ = gptq(linear.weight.dense(), hessian, config)
                done[linear.name] = Linear(linear.name, weight)
                setattr(owner, name, done[linear.name])
        hidden = [block.forward(x, rope)[0] for x, rope in zip(hidden, ropes, strict=True)]
    return done


@single_blas()
def input_hessian(model: Transformer, name: str, calibration: Sequence[Array]) -> Array:
    """Return H = 2·XᵀX/n (in, in) of the inputs X of one projection, named by the end of its name."""
    linear = find_linear(model, name)
    recorder = _Recorder(linear)
    watched = model.map_linears(lambda other: recorder if other is linear else other)
    for ids in calibration:
        watched.forward(ids)
    return recorder.hessian.value()


def find_linear(model: Transformer, name: str) -> Any:
    """Return the one block projection whose name ends in `name`; `ConfigError` if none or several do."""
    names = _names(model)
    found = [
        linear for block in model.blocks for _, _, linear in block.linears() if matches(linear.name, name)
    ]
    if len(found) != 1:
        some = ", ".join((names if not found else [linear.name for linear in found])[:7])
        raise ConfigError(
            f"weight={name!r}: matches {len(found)} projections, choose one, by the end of its name: {some} …"
        )
    return found[0]


def _names(model: Transformer) -> list[str]:
    return [linear.name for block in model.blocks for _, _, linear in block.linears()]


class _SeenError(Exception):
    """The recorder has its input."""


class _Recorder(Linear):
    """A Linear that also adds its inputs to a Hessian, and may end the forward pass there."""

    def __init__(self, linear: Linear, stop: bool = False):
        super().__init__(linear.name, linear.weight)
        self.hessian, self.stop = Hessian(linear.shape[1]), stop

    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        self.hessian.add(x)
        if self.stop:
            raise _SeenError
        return super().forward(x, key)


def _copy(block: Block) -> Any:
    """Return a block whose linears can be replaced without touching the model's."""
    new = copy.copy(block)
    new.attention, new.mlp = copy.copy(block.attention), copy.copy(block.mlp)
    return new
