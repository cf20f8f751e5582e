"""Generation with a key/value cache: greedy, temperature, top-k, top-p, seeded, many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora import functional as F
from minilora.layers import Array
from minilora.threads import single_blas
from minilora.transformer import Transformer


class KVCache:
    """Keys and values of each block, (B, K, S, D); slot t holds position t, so shorter prompts need no padding on the left."""

    def __init__(self, model: Transformer, batch: int, slots: int):
        c, dtype = model.config, model.embedding.weight.dtype
        shape = (batch, c.num_key_value_heads, slots, c.head_dim)
        self.keys = [np.zeros(shape, dtype) for _ in model.blocks]
        self.values = [np.zeros(shape, dtype) for _ in model.blocks]

    def keep(self, rows: Array) -> None:
        """Drop all sequences but ``rows``."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


def prefill(model: Transformer, ids: Array, kv_cache: KVCache) -> Array:
    """Run right-padded prompts (B, T) through the blocks, store their keys and values, return hidden states (B, T, C)."""
    B, T = ids.shape
    x, _ = model.embedding.forward(ids)
    rope = model.rope(np.arange(T))
    for i, block in enumerate(model.blocks):
        attention = block.attention
        q, k, v, _ = attention.project(block.input_norm.forward(x)[0], rope)  # (B, T, H or K, D)
        kv_cache.keys[i][:, :, :T] = k.transpose(0, 2, 1, 3)
        kv_cache.values[i][:, :, :T] = v.transpose(0, 2, 1, 3)
        mixed, _ = F.attention_forward(q, k, v)
        x = x + attention.o_proj.forward(mixed.reshape(B, T, -1))[0]
        x = x + block.mlp.forward(block.post_norm.forward(x)[0])[0]
    return model.norm.forward(x)[0]


def decode(model: Transformer, tokens: Array, positions: Array, kv_cache: KVCache) -> Array:
    """One new token (B,) a sequence at its own position (B,): hidden states (B, C)."""
    B = len(tokens)
    rows = np.arange(B)
    x, _ = model.embedding.forward(tokens[:, None])  # (B, 1, C)
    rope = model.rope(positions[:, None])  # (B, 1, D/2)
    filled = int(positions.max()) + 1
    for i, block in enumerate(model.blocks):
        attention = block.attention
        q, k, v, _ = attention.project(block.input_norm.forward(x)[0], rope)  # (B, 1, H or K, D)
        keys, values = kv_cache.keys[i], kv_cache.values[i]
        keys[rows, :, positions] = k[:, 0]
        values[rows, :, positions] = v[:, 0]
        mixed = F.attention_decode(q[:, 0], keys[:, :, :filled], values[:, :, :filled], positions + 1)  # (B, H, D)
        x = x + attention.o_proj.forward(mixed.reshape(B, 1, -1))[0]
        x = x + block.mlp.forward(block.post_norm.forward(x)[0])[0]
    return model.norm.forward(x)[0][:, 0]


def sample(logits: Array, rng: np.random.Generator | None, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """Next tokens (B,) from logits (B, V).

    temperature 0 takes the largest (greedy) · top_k keeps the k largest · top_p keeps the smallest set of largest whose
    probability reaches p (arXiv 1904.09751), always at least one.
    """
    if temperature == 0:
        return logits.argmax(axis=-1)
    if rng is None:
        raise ValueError("rng=None: sampling with temperature > 0 needs a numpy Generator, e.g. np.random.default_rng(0)")
    order = np.argsort(-logits, axis=-1, kind="stable")  # (B, V), largest first
    probs = F.softmax(np.take_along_axis(logits, order, -1).astype(np.float64) / temperature)
    if top_k:
        probs[:, top_k:] = 0
    before = probs.cumsum(-1) - probs
    probs[before >= top_p * probs.sum(-1, keepdims=True)] = 0
    cumulative = (probs / probs.sum(-1, keepdims=True)).cumsum(-1)
    picked = (cumulative < rng.random((len(probs), 1))).sum(-1)  # inverse of the cumulative distribution
    last = (probs > 0).sum(-1) - 1
    return np.take_along_axis(order, np.minimum(picked, last)[:, None], -1)[:, 0]


@single_blas()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: np.random.Generator | None = None,
    eos: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens only, without ``eos``.

    Stops at ``eos``, after ``max_new_tokens``, or when the context is full. Greedy results do not depend on which other
    prompts share the call, up to rounding.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    lengths = np.array([len(p) for p in prompts])
    room = min(model.config.context_length, int(lengths.max()) + max_new_tokens)
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    kv_cache = KVCache(model, len(prompts), room)
    hidden = prefill(model, ids, kv_cache)[np.arange(len(prompts)), lengths - 1]  # (B, C) at each prompt's last token

    results: list[list[int]] = [[] for _ in prompts]
    alive, positions = np.arange(len(prompts)), lengths.copy()
    while True:
        tokens = sample(model.head.forward(hidden)[0], rng, temperature, top_k, top_p)
        going = []
        for i, (sequence, token) in enumerate(zip(alive, tokens, strict=True)):
            if token == eos:
                continue
            results[sequence].append(int(token))
            if len(results[sequence]) < max_new_tokens and positions[i] < room:
                going.append(i)
        if not going:
            return results
        if len(going) < len(alive):
            alive, positions, tokens = alive[going], positions[going], tokens[going]
            kv_cache.keep(np.array(going))
        hidden = decode(model, tokens, positions, kv_cache)
        positions = positions + 1


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int,
           top_p: float) -> None:
    limit = model.config.context_length
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("prompts: each must hold at least one token; start an empty one with BOS")
    if max(map(len, prompts)) >= limit:
        raise ValueError(f"prompts: {max(map(len, prompts))} tokens leave no room in context_length={limit}; shorten the prompt")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(f"prompts: token {low if low < 0 else high} outside the vocabulary 0…{model.config.vocab_size - 1}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not (temperature >= 0 and temperature < float("inf")):
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: must be 0 (off) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
