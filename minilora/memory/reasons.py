"""Why a forward pass keeps what it keeps: each array, its layer, and the gradient that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minilora.adapter import AnyLinear
from minilora.layers import Block, BlockCache, Cache, Checkpoint, HalfCache, Linear
from minilora.lora import LoraCache
from minilora.memory.counting import arrays_in
from minilora.transformer import ForwardCache, Transformer
from minilora.variants import DoraCache

Kept = tuple[Any, str, str]
"""(array, layer, reason)."""


def kept_by_model(model: Transformer, cache: ForwardCache) -> Iterator[Kept]:
    """Yield all arrays in the cache of `Transformer.forward`, from the bottom up; some come several times."""
    for ids in cache.embedding:
        yield ids, "embed_tokens", "token ids kept for dW"
    for table in cache.rope:
        yield table, "model", "cos and sin of the positions kept for the rotation back"
    for i, (block, kept) in enumerate(zip(model.blocks, cache.blocks, strict=True)):
        if isinstance(kept, Checkpoint):
            yield from kept_by_checkpoint(kept, f"layers.{i}")
        elif kept is not None:
            yield from kept_by_block(block, kept, f"layers.{i}")
    yield from kept_by_norm(cache.norm, "norm")


def kept_by_checkpoint(kept: Checkpoint, name: str) -> Iterator[Kept]:
    """Yield what `Block.checkpoint` leaves."""
    yield kept.x, name, "input of the block kept to compute the norm again"
    yield kept.mixed, name, "input of its MLP half kept to compute that again"
    for array, letter in zip((kept.q, kept.k, kept.v), "qkv", strict=True):
        reason = f"{letter} kept, which would cost a product with the base to compute again"
        yield array, f"{name}.self_attn", reason


def kept_by_block(block: Block, cache: BlockCache, name: str) -> Iterator[Kept]:
    """Yield the whole cache of `Block.forward`."""
    yield from kept_by_attention(block, cache.attention, name)
    yield from kept_by_mlp(block, cache.mlp, name)


def kept_by_norm(cache: Cache, name: str) -> Iterator[Kept]:
    """Yield the cache of an RMSNorm."""
    x, rstd = cache
    yield x, name, "input kept for dx"
    yield rstd, name, "1/rms kept for dx"


def kept_by_attention(block: Block, half: HalfCache, name: str) -> Iterator[Kept]:
    """Yield the cache of a block's first half."""
    attention, cache = block.attention, half.inner
    yield from kept_by_norm(half.norm, f"{name}.input_layernorm")
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from kept_by_linear(getattr(attention, projection), getattr(cache, projection))
    q, k, v, kept = cache.mix
    where = f"{name}.self_attn"
    yield q, where, "queries kept for dk"
    yield k, where, "keys kept for dq"
    yield v, where, "values kept for the gradient of the probabilities"
    if isinstance(kept, tuple):
        yield kept[0], where, "largest score of each query kept to compute the probabilities again"
        yield kept[1], where, "Σ exp of each query's scores, less the largest, kept for the same"
    else:
        yield kept, where, "probabilities (heads × T × T) kept for dv and the softmax"


def kept_by_mlp(block: Block, half: HalfCache, name: str) -> Iterator[Kept]:
    """Yield the cache of a block's second half."""
    mlp, cache = block.mlp, half.inner
    yield from kept_by_norm(half.norm, f"{name}.post_attention_layernorm")
    if mlp.gate_proj is None:
        x, t = cache.activation
        yield x, f"{name}.mlp", "input of GELU kept for its slope"
        yield t, f"{name}.mlp", "tanh kept for GELU's slope"
    else:
        gate, up = cache.activation
        yield gate, f"{name}.mlp", "gate kept for dup and SiLU's slope"
        yield up, f"{name}.mlp", "up kept for dgate"
        yield from kept_by_linear(mlp.gate_proj, cache.gate_proj)
    yield from kept_by_linear(mlp.up_proj, cache.up_proj)
    yield from kept_by_linear(mlp.down_proj, cache.down_proj)


def kept_by_linear(linear: AnyLinear, cache: Cache) -> Iterator[Kept]:
    """Yield what a linear keeps: nothing if it is frozen, its input if it trains, an adapter its own."""
    name = linear.name.removeprefix("model.")
    if isinstance(linear, Linear):
        for x in cache:
            yield x, name, "input kept for dW"
    elif isinstance(cache, LoraCache):
        yield from _kept_by_lora(cache, linear.pool, name)
    elif isinstance(cache, DoraCache):
        yield from _kept_by_lora(cache.lora, linear.pool, name)
        yield cache.z, name, "result before it takes DoRA's lengths kept for dm"
        yield cache.n, name, "length of each row of W + ΔW"
    else:
        yield from _kept_by_any(cache, type(linear).__name__, name)


def _kept_by_lora(cache: LoraCache, pool: int, name: str) -> Iterator[Kept]:
    what = "input" if pool == 1 else f"input, {pool} neighbours summed,"
    if cache.mask is not None:
        what += " after dropout"
    yield cache.p, name, f"{what} kept for dA"
    yield cache.h, name, "h = x Aᵀ kept for dB"
    if cache.mask is not None:
        yield cache.mask, name, "one bit an element: what dropout left"


def _kept_by_any(cache: Cache, adapter: str, name: str) -> Iterator[Kept]:
    """Yield what an adapter of another class keeps, by field if its cache is a NamedTuple."""
    fields = getattr(cache, "_fields", None)
    if fields is None:
        for array in arrays_in(cache):
            yield array, name, f"kept by {adapter}"
        return
    for field, value in zip(fields, cache, strict=True):
        for array in arrays_in(value):
            yield array, name, f"{field} kept by {adapter}"
