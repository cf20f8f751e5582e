"""The model: embedding, blocks, final norm and head, forward and backward. It knows nothing of LoRA.

Parameter names are those of transformers' `LlamaForCausalLM`, so checkpoints and adapters carry over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minilora import functional
from minilora.config import ModelConfig
from minilora.layers import Block, BlockCache, Cache, Checkpoint, Embedding, Key, Linear, RMSNorm, Rope
from minilora.parameters import Array, DenseWeight, Gradients, Parameter, Weight


class ForwardCache(NamedTuple):
    """Cache of `Transformer.forward`. A block below the lowest trainable one has None."""

    embedding: Cache
    rope: Rope
    key: Key
    blocks: list[BlockCache | Checkpoint | None]
    norm: Cache
    segments: Array | None


class Transformer:
    """A Llama-family language model.

    >>> from minilora import init_model
    >>> config = ModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> model = init_model(config, np.random.default_rng(0))
    >>> model.logits(np.array([[1, 2, 3]])).shape
    (1, 3, 259)
    """

    def __init__(
        self, config: ModelConfig, embedding: Embedding, blocks: list[Block], norm: RMSNorm, head: Any
    ):
        self.config, self.embedding, self.blocks, self.norm, self.head = config, embedding, blocks, norm, head

    def linears(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, linear) of each projection from the lowest block up, and of the head."""
        for block in self.blocks:
            for _, _, linear in block.linears():
                yield linear.name, linear
        yield self.head.name, self.head

    def parameters(self) -> list[Parameter]:
        """Return each parameter once (a tied head is the embedding's), in a fixed order."""
        found = dict.fromkeys(self.embedding.parameters())
        for block in self.blocks:
            found.update(dict.fromkeys(block.parameters()))
        found.update(dict.fromkeys(self.norm.parameters()))
        found.update(dict.fromkeys(self.head.parameters()))
        return list(found)

    def trainable(self) -> list[Parameter]:
        """Return the parameters that train."""
        return [p for p in self.parameters() if p.trainable]

    @property
    def tied(self) -> bool:
        """Whether the head reads the embedding's own table."""
        return isinstance(self.head, Linear) and self.head.weight is self.embedding.weight

    def map_linears(self, change: Callable[[Any], Any]) -> Transformer:
        """Return a new model with `change(linear)` for each linear and the head; all else is shared."""
        new = copy.copy(self)
        new.blocks = []
        for old in self.blocks:
            block = copy.copy(old)
            block.attention, block.mlp = copy.copy(old.attention), copy.copy(old.mlp)
            for owner, attribute, linear in list(block.linears()):
                setattr(owner, attribute, change(linear))
            new.blocks.append(block)
        new.head = change(self.head)
        return new

    def map_parameters(self, change: Callable[[Parameter], Parameter]) -> Transformer:
        """Return a new model with `change(p)` in place of each dense parameter. A tied head stays tied."""
        done: dict[Parameter, Parameter] = {}
        weights: dict[int, DenseWeight] = {}

        def parameter(p: Parameter) -> Parameter:
            if p not in done:
                done[p] = change(p)
            return done[p]

        def weight(w: Weight) -> Weight:
            if not isinstance(w, DenseWeight):
                return w
            if id(w) not in weights:
                weights[id(w)] = DenseWeight(parameter(w.param))
            return weights[id(w)]

        def norm(n: RMSNorm) -> RMSNorm:
            return RMSNorm(parameter(n.weight), n.eps)

        new = self.map_linears(lambda linear: Linear(linear.name, weight(linear.weight)))
        new.embedding = Embedding(self.embedding.name, weight(self.embedding.weight))
        for block in new.blocks:
            block.input_norm, block.post_norm = norm(block.input_norm), norm(block.post_norm)
        new.norm = norm(self.norm)
        return new

    def lowest_trainable(self) -> int:
        """Return the lowest block that trains: −1 for the embedding, len(blocks) if no block trains."""
        if any(p.trainable for p in self.embedding.parameters()):
            return -1
        for i, block in enumerate(self.blocks):
            if any(p.trainable for p in block.parameters()):
                return i
        return len(self.blocks)

    def rope(self, positions: Array) -> Rope:
        """Return rotation tables in the model's dtype."""
        c = self.config
        dtype = self.embedding.weight.dtype
        return functional.rope_tables(positions, c.head_dim, c.rope_theta, dtype, c.rope_factors)

    def forward(
        self,
        ids: Array,
        key: Key = None,
        checkpoint: bool = False,
        segments: Array | None = None,
        *,
        with_cache: bool = True,
    ) -> tuple[Array, ForwardCache]:
        """Map token ids (B, T) to hidden states (B, T, C) after the last norm. The caller applies the head.

        `checkpoint` keeps only what is expensive to recompute (arXiv 1604.06174; `Block.checkpoint`).
        `segments` (B, T) number the packed examples, which do not attend to each other. `with_cache=False`
        keeps no cache for a backward pass. Raises ValueError for ids outside the vocabulary or beyond the
        context.
        """
        check_ids(ids, self.config)
        if segments is not None and segments.shape != ids.shape:
            raise ValueError(
                f"segments: shape {segments.shape}, but the ids have {ids.shape}; number each token's example"
            )
        x, cache_embedding = self.embedding.forward(ids)  # (B, T, C)
        rope = self.rope(np.arange(ids.shape[1]))
        lowest = self.lowest_trainable()
        caches: list[BlockCache | Checkpoint | None] = []
        for i, block in enumerate(self.blocks):
            y, cache = block.forward(x, rope, key, segments)
            if i < lowest or not with_cache:
                caches.append(None)
            else:
                caches.append(block.checkpoint(cache) if checkpoint else cache)
            del cache
            x = y
        x, cache_norm = self.norm.forward(x)
        return x, ForwardCache(cache_embedding, rope, key, caches, cache_norm, segments)

    def backward(self, dx: Array, cache: ForwardCache, grads: Gradients) -> None:
        """Add gradients to `grads`, from dx (B, T, C) down to the lowest trainable layer; empty the cache."""
        lowest = self.lowest_trainable()
        if lowest == len(self.blocks) and not self.norm.weight.trainable:
            return
        dx = self.norm.backward(dx, cache.norm, grads)
        for i in reversed(range(max(lowest, 0), len(self.blocks))):
            block, kept, need_dx = self.blocks[i], cache.blocks.pop(), i != lowest
            if isinstance(kept, Checkpoint):  # restore one half at a time: only its cache is in memory
                dx = block.backward_mlp(dx, block.restore_mlp(kept, cache.key), grads)
                half = block.restore_attention(kept, cache.rope, cache.key, cache.segments)
                dx = block.backward_attention(dx, half, grads, need_dx)
                del half
            elif kept is not None:
                dx = block.backward(dx, kept, grads, need_dx)
            del kept
        if lowest == -1:
            self.embedding.backward(dx, cache.embedding, grads)

    def logits(self, ids: Array) -> Array:
        """Map token ids (B, T) to logits (B, T, V)."""
        return self.head.forward(self.forward(ids, with_cache=False)[0])[0]

    def __repr__(self) -> str:
        names = ", ".join(sorted({type(linear).__name__ for _, linear in self.linears()}))
        return f"Transformer({self.config}, linears: {names}, trainable arrays: {len(self.trainable())})"


def check_ids(ids: Array, config: ModelConfig) -> None:
    """Raise ValueError unless ids are integers (B, T) inside the vocabulary and the context length."""
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids: must be an integer array (batch, time), not {ids.dtype} {ids.shape}")
    if ids.shape[1] > config.context_length:
        raise ValueError(
            f"ids: {ids.shape[1]} tokens exceed context_length={config.context_length}; shorten the text"
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < config.vocab_size):
        raise ValueError(
            f"ids: values {ids.min()}…{ids.max()} outside the vocabulary 0…{config.vocab_size - 1}"
        )
