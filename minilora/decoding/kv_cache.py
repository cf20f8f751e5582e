"""The key/value cache of generation, and attention over it."""

from __future__ import annotations

import copy

import numpy as np

from minilora.functional import softmax
from minilora.parameters import Array
from minilora.transformer import Transformer


class KVCache:
    """Keys and values of each block, (L, B, K, S, D).

    Slot s holds position s, so shorter prompts need no padding on the left.
    """

    def __init__(self, model: Transformer, batch: int, slots: int):
        c, dtype = model.config, model.embedding.weight.dtype
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, slots, c.head_dim)
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)

    def part(self, rows: slice) -> KVCache:
        """Return some of the sequences, in the same memory."""
        new = copy.copy(self)
        new.keys, new.values = self.keys[:, rows], self.values[:, rows]
        return new

    def select(self, rows: Array) -> None:
        """Drop all sequences but `rows`, which are in ascending order."""
        for layers in (self.keys, self.values):
            for layer in layers:
                layer[: len(rows)] = layer[rows]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]


def cached_attention(q: Array, k: Array, v: Array, positions: Array) -> Array:
    """Let new queries attend to the stored keys up to their own positions; without gradient.

    Shapes: q (B, T, H, D), k and v (B, K, S, D) by position, positions (B, T) → (B, T, H, D).
    """
    B, T, H, D = q.shape
    K, S = k.shape[1:3]
    grouped = q.reshape(B, T, K, H // K, D).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, D)  # (B, K, T·G, D)
    scores = grouped @ k.swapaxes(-1, -2)  # (B, K, T·G, S)
    scores *= q.dtype.type(D**-0.5)
    if positions.min() < S - 1:
        later = np.arange(S) > positions[..., None]  # (B, T, S)
        np.copyto(scores.reshape(B, K, T, H // K, S), -np.inf, where=later[:, None, :, None])
    mixed = softmax(scores, out=scores) @ v  # (B, K, T·G, D)
    return mixed.reshape(B, K, T, H // K, D).transpose(0, 2, 1, 3, 4).reshape(B, T, H, D)
