"""Why a forward pass keeps what it keeps: each array of a cache, the layer that holds it, and the gradient
that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minilora.layers import Block, Cache, Linear
from minilora.lora import LoraLinear
from minilora.transformer import Transformer

Kept = tuple[Any, str, str]
"""(array, layer, reason)."""


def kept_by_model(model: Transformer, cache: Cache) -> Iterator[Kept]:
    """Everything in the cache of ``Transformer.forward``, from the bottom up; an array may come several
    times."""
    cache_embedding, rope, _, checkpoint, caches, (x, rstd), _ = cache
    for ids in cache_embedding:
        yield ids, "embed_tokens", "token ids kept for dW"
    for table in rope:
        yield table, "model", "cos and sin of the positions kept for the rotation back"
    for i, (block, found) in enumerate(zip(model.blocks, caches, strict=True)):
        if found:
            yield from (kept_by_checkpoint if checkpoint else kept_by_block)(block, found, f"layers.{i}")
    yield x, "norm", "input kept for dx"
    yield rstd, "norm", "1/rms kept for dx"


def kept_by_checkpoint(block: Block, cache: Cache, name: str) -> Iterator[Kept]:
    """What ``Block.checkpoint`` leaves."""
    x, mixed, qkv = cache
    yield x, name, "input of the block kept to compute the norm again"
    yield mixed, name, "input of its MLP half kept to compute that again"
    for array, letter in zip(qkv, "qkv", strict=True):
        yield (
            array,
            f"{name}.self_attn",
            f"{letter} kept, which would cost a product with the base to compute again",
        )


def kept_by_block(block: Block, cache: Cache, name: str) -> Iterator[Kept]:
    """The whole cache of ``Block.forward``."""
    attention_half, mlp_half = cache
    yield from kept_by_attention(block, attention_half, name)
    yield from kept_by_mlp(block, mlp_half, name)


def kept_by_norm(cache: Cache, name: str) -> Iterator[Kept]:
    """The cache of an RMSNorm."""
    x, rstd = cache
    yield x, name, "input kept for dx"
    yield rstd, name, "1/rms kept for dx"


def kept_by_attention(block: Block, cache: Cache, name: str) -> Iterator[Kept]:
    """The cache of a block's first half."""
    cache_norm, (_, cache_qkv, (q, k, v, kept), cache_o) = cache
    attention = block.attention
    yield from kept_by_norm(cache_norm, f"{name}.input_layernorm")
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    for linear, found in zip(projections, (*cache_qkv, cache_o), strict=True):
        yield from kept_by_linear(linear, found)
    where = f"{name}.self_attn"
    yield q, where, "queries kept for dk"
    yield k, where, "keys kept for dq"
    yield v, where, "values kept for the gradient of the probabilities"
    if isinstance(kept, tuple):
        yield kept[0], where, "largest score of each query kept to compute the probabilities again"
        yield kept[1], where, "Σ exp of each query's scores, less the largest, kept for the same"
    else:
        yield kept, where, "probabilities (heads × T × T) kept for dv and the softmax"


def kept_by_mlp(block: Block, cache: Cache, name: str) -> Iterator[Kept]:
    """The cache of a block's second half."""
    cache_norm, (cache_gate, cache_up, cache_act, cache_down) = cache
    mlp = block.mlp
    yield from kept_by_norm(cache_norm, f"{name}.post_attention_layernorm")
    if mlp.gate_proj is None:
        x, t = cache_act
        yield x, f"{name}.mlp", "input of GELU kept for its slope"
        yield t, f"{name}.mlp", "tanh kept for GELU's slope"
    else:
        gate, up = cache_act
        yield gate, f"{name}.mlp", "gate kept for dup and SiLU's slope"
        yield up, f"{name}.mlp", "up kept for dgate"
        yield from kept_by_linear(mlp.gate_proj, cache_gate)
    yield from kept_by_linear(mlp.up_proj, cache_up)
    yield from kept_by_linear(mlp.down_proj, cache_down)


def kept_by_linear(linear: Any, cache: Cache) -> Iterator[Kept]:
    """A frozen Linear keeps nothing, one that trains its input, an adapter its own input and h."""
    name = linear.name.removeprefix("model.")
    if isinstance(linear, Linear):
        for x in cache:
            yield x, name, "input kept for dW"
    elif isinstance(linear, LoraLinear):
        p, h, mask, *stretched = cache
        what = "input" if linear.pool == 1 else f"input, {linear.pool} neighbours summed,"
        yield p, name, f"{what} kept for dA" if mask is None else f"{what} after dropout kept for dA"
        yield h, name, "h = x Aᵀ kept for dB"
        if mask is not None:
            yield mask, name, "one bit an element: what dropout left"
        if stretched:
            yield stretched[0], name, "result before it takes DoRA's lengths kept for dm"
            yield stretched[1], name, "length of each row of W + ΔW"
