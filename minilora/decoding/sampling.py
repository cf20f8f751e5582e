"""Sampling: the next token of each sequence from its logits."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from minilora.functional import softmax
from minilora.parameters import Array


class Sampling(TypedDict, total=False):
    """How the next token is drawn; `sample` says what each setting does."""

    rng: np.random.Generator | None
    temperature: float
    top_k: int
    top_p: float


def check_sampling(
    rng: np.random.Generator | None = None, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> None:
    """Raise ValueError for a setting that cannot be."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if temperature > 0 and rng is None:
        raise ValueError(
            "rng=None: sampling with temperature > 0 needs a numpy Generator, e.g. np.random.default_rng(0)"
        )
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: must be 0 (off) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")


def sample(
    logits: Array,
    rng: np.random.Generator | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Array:
    """Draw the next tokens (B,) from logits (B, V).

    `temperature` 0 takes the largest (greedy) · `top_k` keeps the k largest · `top_p` keeps the smallest set
    of largest whose probability reaches p (arXiv 1904.09751), always at least one.
    """
    check_sampling(rng, temperature, top_k, top_p)
    if temperature == 0 or rng is None:
        return logits.argmax(axis=-1)
    order = np.argsort(-logits, axis=-1, kind="stable")  # (B, V), largest first
    probs = softmax(np.take_along_axis(logits, order, -1).astype(np.float64) / temperature)
    if top_k:
        probs[:, top_k:] = 0
    before = probs.cumsum(-1) - probs
    probs[before >= top_p * probs.sum(-1, keepdims=True)] = 0
    cumulative = (probs / probs.sum(-1, keepdims=True)).cumsum(-1)
    picked = (cumulative < rng.random((len(probs), 1))).sum(-1)  # inverse of the cumulative distribution
    last = (probs > 0).sum(-1) - 1
    return np.take_along_axis(order, np.minimum(picked, last)[:, None], -1)[:, 0]
