"""The functions of ``minilora.functional`` again, each in one pass of compiled code over float32: read those
first.

Names, arguments and results are the same, up to float32 rounding; where a cache holds something else, it is
said. With ``in_place`` the result may take the place of the first argument, which saves memory that a
processor must fetch. Layers call these; float64, as in gradient checks, and a processor without vectors take
the mathematics of ``functional`` itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minilora import functional
from minilora.functional import (
    cross_entropy_backward,
    gelu_backward,
    gelu_forward,
    group_repeat,
    rope_tables,
    softmax,
)
from minilora.kernels import attention, rows
from minilora.kernels.gemm import LowRank, compiled, flat, outer, product, product_t
from minilora.kernels.lowrank import adapter_backward

Array = np.ndarray
Cache = tuple[Any, ...]

__all__ = [
    "LowRank",
    "adapter_backward",
    "attention_again",
    "attention_backward",
    "attention_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "embedding_backward",
    "gelu_backward",
    "gelu_forward",
    "group_repeat",
    "group_sum",
    "outer",
    "product",
    "product_t",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_backward",
    "rope_forward",
    "rope_tables",
    "softmax",
    "swiglu_backward",
    "swiglu_forward",
]


_plain = os.environ.get("MINILORA_PLAIN", "0") not in ("", "0")


def is_plain() -> bool:
    """Return whether everything runs through `minilora.functional` and `minilora.quant.reference`."""
    return _plain


@contextmanager
def plain() -> Iterator[None]:
    """Run everything inside through readable NumPy code, in float32 too: what one reads is what runs.

    The environment variable ``MINILORA_PLAIN=1`` does the same for a whole process; processes that are
    started inside inherit it.

    >>> with plain():
    ...     is_plain()
    True
    """
    global _plain
    before, inherited = _plain, os.environ.get("MINILORA_PLAIN")
    _plain, os.environ["MINILORA_PLAIN"] = True, "1"
    try:
        yield
    finally:
        _plain = before
        if inherited is None:
            os.environ.pop("MINILORA_PLAIN", None)
        else:
            os.environ["MINILORA_PLAIN"] = inherited


def _run(
    kernel: Any, inputs: tuple[Array, ...], numbers: tuple[float, ...], outputs: tuple[Array, ...]
) -> Any:
    """Call a kernel with flat arrays; with arrays without data (minilora.memory) there is nothing to
    compute."""
    if not isinstance(outputs[0], np.ndarray):
        return 0.0
    return kernel(*map(flat, inputs), *numbers, *(a.reshape(-1) for a in outputs))


def embedding_backward(dy: Array, ids: Array, V: int) -> Array:
    """Each row of dy (…, C) is added to the row of dtable (V, C) that its token, of ids (…), took."""
    if not compiled(dy):
        return functional.embedding_backward(dy, ids, V)
    dtable = np.zeros((V, dy.shape[-1]), dy.dtype, like=dy)
    _run(rows.embedding_backward, (ids.astype(np.int64), dy), (dy.shape[-1],), (dtable,))
    return dtable


def rms_norm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, Cache]:
    """y = weight · x / √(mean(x²) + eps): x (…, C) → y (…, C)."""
    if not compiled(x, weight):
        return functional.rms_norm_forward(x, weight, eps)
    y, rstd = np.empty_like(x), np.empty((*x.shape[:-1], 1), x.dtype, like=x)
    _run(rows.rms_norm_forward, (x, weight), (eps,), (y, rstd))
    return y, (x, rstd)


def rms_norm_backward(
    dy: Array, weight: Array, cache: Cache, need_dweight: bool = True, *, in_place: bool = False
) -> tuple[Array, Array | None]:
    """Return dx (…, C) and, unless the weight is frozen, dweight (C,)."""
    x, rstd = cache
    if not compiled(dy, weight, x):
        return functional.rms_norm_backward(dy, weight, cache, need_dweight)
    dx, dweight = dy if in_place else dy.copy(), np.zeros_like(weight) if need_dweight else None
    _run(rows.rms_norm_backward, (weight, x, rstd), (), (dx, rows.EMPTY if dweight is None else dweight))
    return dx, dweight


def rope_forward(x: Array, cos: Array, sin: Array, turn: int = 1, *, in_place: bool = False) -> Array:
    """Rotate x (B, T, H, D) by cos and sin (T, D/2) or (B, T, D/2); with ``turn`` −1 back."""
    if not compiled(x, cos, sin):
        return functional.rope_forward(x, cos, turn * sin)
    y = x if in_place else x.copy()
    _run(rows.rope, (cos, sin), (*x.shape[2:], turn), (y,))
    return y


def rope_backward(dy: Array, cos: Array, sin: Array, *, in_place: bool = False) -> Array:
    """A rotation's transpose is the rotation back."""
    return rope_forward(dy, cos, sin, -1, in_place=in_place)


def attention_forward(q: Array, k: Array, v: Array, segments: Array | None = None) -> tuple[Array, Cache]:
    """Causal grouped-query attention: q (B, T, H, D), k and v (B, T, K, D) → y (B, T, H, D).

    The cache keeps no probabilities but, for each query, top = max S and total = Σ exp(S − top), both (B, H,
    T).
    """
    if not compiled(q, k, v):
        return functional.attention_forward(q, k, v, segments)
    B, T, H, D = q.shape
    y, tops, totals = np.empty_like(q), *(np.empty((B, H, T), q.dtype, like=q) for _ in range(2))
    scratch = np.empty(attention.scratch_size(T, D, 2, 1), q.dtype, like=q)
    numbers = (B, T, H, k.shape[2], D, *attention.sizes(T, D))
    _run(
        attention.attention_forward,
        (q, k, v, _numbers(segments), scratch),
        numbers,
        (scratch, y, tops, totals),
    )
    return y, (q, k, v, (tops, totals, segments))


def attention_again(q: Array, k: Array, v: Array, segments: Array | None = None) -> tuple[Array, Cache]:
    """:func:`attention_forward` from the first three arrays of its cache: the same bits."""
    return (attention_forward if compiled(q, k, v) else functional.attention_again)(q, k, v, segments)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Return dq (B, T, H, D), dk and dv (B, T, K, D); probabilities are computed again, a few queries at a
    time."""
    q, k, v, kept = cache
    if not isinstance(kept, tuple):
        return functional.attention_backward(dy, cache)
    tops, totals, segments = kept
    B, T, H, D = q.shape
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    scratch = np.empty(attention.scratch_size(T, D, 4, 2), q.dtype, like=q)
    numbers = (B, T, H, k.shape[2], D, *attention.sizes(T, D))
    inputs = (dy, q, k, v, tops, totals, _numbers(segments), scratch)
    _run(attention.attention_backward, inputs, numbers, (scratch, dq, dk, dv))
    return dq, dk, dv


def _numbers(segments: Array | None) -> Array:
    return attention.NO_SEGMENTS if segments is None else segments.astype(np.int64)


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, Cache]:
    """y = silu(gate) · up, all (…, F)."""
    if not compiled(gate, up):
        return functional.swiglu_forward(gate, up)
    y = np.empty_like(gate)
    _run(rows.swiglu_forward, (gate, up), (), (y,))
    return y, (gate, up)


def swiglu_backward(dy: Array, cache: Cache, *, in_place: bool = False) -> tuple[Array, Array]:
    """Return dgate and dup (…, F), of which dup takes dy's place."""
    if not compiled(dy, *cache):
        return functional.swiglu_backward(dy, cache)
    dgate, dup = np.empty_like(dy), dy if in_place else dy.copy()
    _run(rows.swiglu_backward, cache, (), (dgate, dup))
    return dgate, dup


def cross_entropy_forward(
    logits: Array, targets: Array, normalizer: float, out: Array | None = None
) -> tuple[float, Cache]:
    """Σ (log Σ exp logits − logits[target]) / normalizer in nats: logits (N, V), targets (N,)."""
    if not compiled(logits):
        return functional.cross_entropy_forward(logits, targets, normalizer, out)
    probs = logits.copy() if out is None else out
    if out is not None and out is not logits:
        out[...] = logits
    total = _run(rows.cross_entropy, (targets.astype(np.int64),), (logits.shape[-1],), (probs,))
    return total / normalizer, (probs, targets, normalizer)


def group_sum(x: Array, g: int) -> Array:
    """Sum each group of g neighbours of the last axis: (…, in) → (…, in/g)."""
    if g == 1 or not compiled(x):
        return functional.group_sum(x, g)
    y = np.empty((*x.shape[:-1], x.shape[-1] // g), x.dtype, like=x)
    _run(rows.group_sum, (x,), (g,), (y,))
    return y
