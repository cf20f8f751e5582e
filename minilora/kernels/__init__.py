"""Choose, call by call, between `minilora.functional` and a compiled kernel. Read `functional` first.

Names and numbers are those of `functional`, up to float32 rounding. Functions whose cache differs say so.
Some arguments and results differ, to save passes over memory: products take a `low_rank` term, gradients are
added to given arrays (`da`, `db`, `onto`), and with `in_place` the result may overwrite the first argument.
Layers call these functions. Four things run the mathematics of `functional` itself:

* everything under `plain()` or with the environment variable ``MINILORA_PLAIN=1``;
* float64, as in gradient checks;
* a processor without vectors (AVX2, AVX-512 or NEON);
* products of at most `BLAS_ROWS` rows, where NumPy's BLAS is as fast.

All compiled code lives in this folder; its README says how to read it. It is imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from minilora import functional
from minilora.functional import AttentionCache, flat

Array = np.ndarray
Cache = tuple[Any, ...]

__all__ = [
    "AttentionCache",
    "LowRank",
    "attention_backward",
    "attention_forward",
    "attention_from_scaled",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "embedding_backward",
    "flat",
    "gelu_backward",
    "gelu_forward",
    "group_repeat",
    "group_sum",
    "is_plain",
    "linear_dw",
    "linear_dx",
    "linear_forward",
    "low_rank_backward",
    "low_rank_forward",
    "multiplied",
    "plain",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_backward",
    "rope_forward",
    "swiglu_backward",
    "swiglu_forward",
]

BLAS_ROWS = 8
"""Products of at most this many rows go to BLAS: packing panels would cost more than it saves."""

# --- the switch --------------------------------------------------------------------------------------------

_plain = os.environ.get("MINILORA_PLAIN", "0") not in ("", "0")


def is_plain() -> bool:
    """Return whether everything runs through `minilora.functional` and `minilora.quant.reference`."""
    return _plain


@contextmanager
def plain() -> Iterator[None]:
    """Run everything inside this block through `functional` and `quant.reference`, in float32 too.

    ``MINILORA_PLAIN=1``, set before minilora is imported, does the same for a whole process. Processes that
    are started inside the block inherit it. Results agree with the compiled ones up to rounding.

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


@cache
def load(name: str) -> Any:
    """Import a module of compiled code on first use."""
    return import_module(f"minilora.kernels.{name}")


@cache
def has_vectors() -> bool:
    """Return whether the processor has the vectors and fused multiply-adds that our kernels need.

    Import the modules of a training step now, so that no later step waits for them.
    """
    for name in ("attention", "gemm", "lowrank", "rows"):
        load(name)
    return bool(load("microkernel").AVAILABLE)


def describe() -> dict[str, str]:
    """Return Numba's threading layer, which our kernels do not use, and the folder of compiled kernels."""
    layer = load("jit").settings.THREADING_LAYER
    cache = load("rows").swiglu_forward.stats.cache_path or "not on disk"
    return {"numba layer": f"{layer} (kernels themselves are single-threaded)", "numba cache": cache}


def compiled(*arrays: Any) -> bool:
    """Return whether compiled code takes these arrays: contiguous float32, vectors, and not `plain()`."""
    return (
        not _plain and all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays) and has_vectors()
    )


def _run(kernel: Any, inputs: Cache, numbers: tuple[float, ...], outputs: Cache) -> Any:
    """Call a kernel with flat arrays; arrays without data (`minilora.memory`) leave nothing to compute."""
    if not isinstance(outputs[0], np.ndarray):
        return 0.0
    return kernel(*map(read_only_flat, inputs), *numbers, *(a.reshape(-1) for a in outputs))


def read_only_flat(a: Array) -> Array:
    """Return a flat read-only view: kernels are compiled once, for such views."""
    view = a.reshape(-1)
    view.flags.writeable = False
    return view


# --- linear and low-rank -----------------------------------------------------------------------------------


class LowRank(NamedTuple):
    """A low-rank term that is not yet multiplied. Compiled products add it without storing it.

    In a forward pass s·h bᵀ with h (…, r), b (out, r); in a backward pass s·dh a with dh (…, r), a (r, in).
    """

    h: Array
    b: Array
    s: float


def linear_forward(
    x: Array, w: Array, low_rank: LowRank | Array | None = None, out: Array | None = None, column: int = 0
) -> Array:
    """Return x wᵀ + low_rank: x (…, in), w (out, in) → (…, out).

    `low_rank` is what `low_rank_forward` returns. The result goes into `out` (N, ≥ out) from `column` on.

    >>> linear_forward(np.ones((2, 3)), np.ones((4, 3)), np.ones((2, 4))).tolist()
    [[4.0, 4.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0]]
    """
    factors = low_rank if isinstance(low_rank, LowRank) else None
    if x.size > BLAS_ROWS * w.shape[1] and compiled(x, w, *(factors or ())[:2]):
        y = load("gemm").linear_forward(x, w, factors, out, column)
    else:
        y = functional.linear_forward(x, w)
        if factors:
            y += (factors.s * factors.h) @ factors.b.T
        if out is not None:
            out[:, column : column + len(w)] = y
            y = out
    if low_rank is not None and factors is None:
        y[..., column : column + len(w)] += low_rank
    return y


def linear_dx(
    dy: Array, w: Array, low_rank: LowRank | Array | None = None, onto: Array | None = None, column: int = 0
) -> Array:
    """Return dy w + low_rank: dy (…, out), w (out, in) → (…, in), added to `onto` if that is given.

    `low_rank` is what `low_rank_backward` returns. Of dy, only the columns from `column` on are used.
    """
    factors = low_rank if isinstance(low_rank, LowRank) else None
    if dy.size > BLAS_ROWS * dy.shape[-1] and compiled(dy, w, *(factors or ())[:2]):
        dx = load("gemm").linear_dx(dy, w, factors, onto, column)
    else:
        dx = functional.linear_dx(dy[..., column : column + len(w)], w)
        if factors:
            dx += (factors.s * factors.h) @ factors.b
        if onto is not None:
            onto += dx
            dx = onto
    if low_rank is not None and factors is None:
        dx += low_rank
    return dx


def linear_dw(dy: Array, x: Array, onto: Array | None = None) -> Array:
    """Return dyᵀ x (out, in) over all rows: dy (…, out), x (…, in); added to `onto` if that is given."""
    if x.size > BLAS_ROWS * x.shape[-1] and compiled(dy, x, *([] if onto is None else [onto])):
        return load("gemm").linear_dw(dy, x, onto)
    dw = functional.linear_dw(dy, x)
    if onto is None:
        return dw
    onto += dw
    return onto


def low_rank_forward(p: Array, a: Array, b: Array, s: float) -> tuple[LowRank | Array, Cache]:
    """Return s·p aᵀ bᵀ and its cache (p, h). Compiled, the last product is left to `linear_forward`."""
    if not compiled(p, a, b):
        return functional.low_rank_forward(p, a, b, s)
    h = linear_forward(p, a)
    return LowRank(h, b, s), (p, h)


def low_rank_backward(
    dy: Array, cache: Cache, a: Array, b: Array, s: float, da: Array | None = None, db: Array | None = None
) -> LowRank | Array:
    """Return dp of `low_rank_forward`; add to da and db. None for a frozen factor skips it.

    Compiled, one kernel reads dy once for all of them, and dp is left to `linear_dx` as a `LowRank`.
    """
    p, h = cache
    if dy.size > BLAS_ROWS * dy.shape[-1] and compiled(dy, p, h, a, b):
        return LowRank(load("lowrank").adapter_backward(dy, h, p, b, s, db, da), a, s)
    dp, da_, db_ = functional.low_rank_backward(dy, cache, a, b, s)
    if da is not None:
        da += da_
    if db is not None:
        db += db_
    return dp


def multiplied(dp: LowRank | Array) -> Array:
    """Multiply out dp of `low_rank_backward`: return it as an array (…, in)."""
    if not isinstance(dp, LowRank):
        return dp
    product = linear_dx(dp.h, dp.b)
    product *= product.dtype.type(dp.s)
    return product


# --- embedding, norm, rotation -----------------------------------------------------------------------------


def embedding_backward(dy: Array, ids: Array, V: int) -> Array:
    """Return dtable (V, C); a kernel would save 1 % of a step."""
    return functional.embedding_backward(dy, ids, V)


def rms_norm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, Cache]:
    """Return y = weight · x / √(mean(x²) + eps): x (…, C) → y (…, C)."""
    if not compiled(x, weight):
        return functional.rms_norm_forward(x, weight, eps)
    y, rstd = np.empty_like(x), np.empty((*x.shape[:-1], 1), x.dtype, like=x)
    _run(load("rows").rms_norm_forward, (x, weight), (eps,), (y, rstd))
    return y, (x, rstd)


def rms_norm_backward(
    dy: Array, weight: Array, cache: Cache, need_dweight: bool = True, *, in_place: bool = False
) -> tuple[Array, Array | None]:
    """Return dx (…, C) and dweight (C,). Without `need_dweight`, dweight is None."""
    x, rstd = cache
    if not compiled(dy, weight, x):
        return functional.rms_norm_backward(dy, weight, cache, need_dweight)
    dx, dweight = dy if in_place else dy.copy(), np.zeros_like(weight) if need_dweight else None
    rows = load("rows")
    _run(rows.rms_norm_backward, (weight, x, rstd), (), (dx, rows.EMPTY if dweight is None else dweight))
    return dx, dweight


def rope_forward(x: Array, cos: Array, sin: Array, turn: int = 1, *, in_place: bool = False) -> Array:
    """Rotate x (B, T, H, D) by cos and sin (T, D/2) or (B, T, D/2); `turn` −1 rotates back."""
    if not compiled(x, cos, sin):
        return functional.rope_forward(x, cos, turn * sin)
    y = x if in_place else x.copy()
    _run(load("rows").rope, (cos, sin), (*x.shape[2:], turn), (y,))
    return y


def rope_backward(dy: Array, cos: Array, sin: Array, *, in_place: bool = False) -> Array:
    """Rotate back."""
    return rope_forward(dy, cos, sin, -1, in_place=in_place)


# --- attention ---------------------------------------------------------------------------------------------


def attention_forward(q: Array, k: Array, v: Array, segments: Any = None) -> tuple[Array, AttentionCache]:
    """Return causal grouped-query attention: q (B, T, H, D), k and v (B, T, K, D) → y (B, T, H, D).

    Instead of probabilities the cache keeps, for each query, top = max S and total = Σ exp(S − top), both
    (B, H, T); its q is not divided by √D.
    """
    if not compiled(q, k, v):
        return functional.attention_forward(q, k, v, segments)
    B, T, H, D = q.shape
    attention = load("attention")
    y, tops, totals = np.empty_like(q), *(np.empty((B, H, T), q.dtype, like=q) for _ in range(2))
    scratch = np.empty(attention.scratch_size(T, D, 2, 1), q.dtype, like=q)
    numbers = (B, T, H, k.shape[2], D, *attention.sizes(T, D))
    inputs = (q, k, v, _numbers(segments))
    _run(attention.attention_forward, inputs, numbers, (scratch, y, tops, totals))
    return y, AttentionCache(q, k, v, (tops, totals, segments))


def attention_from_scaled(q: Array, k: Array, v: Array, segments: Any = None) -> tuple[Array, AttentionCache]:
    """Repeat `attention_forward` from the q, k and v of its cache, with the same bits."""
    again = attention_forward if compiled(q, k, v) else functional.attention_from_scaled
    return again(q, k, v, segments)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Return dq (B, T, H, D), dk and dv (B, T, K, D); the probabilities are computed again."""
    q, k, v, kept = cache
    if not isinstance(kept, tuple):
        return functional.attention_backward(dy, cache)
    tops, totals, segments = kept
    B, T, H, D = q.shape
    attention = load("attention")
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    scratch = np.empty(attention.scratch_size(T, D, 4, 2), q.dtype, like=q)
    numbers = (B, T, H, k.shape[2], D, *attention.sizes(T, D))
    inputs = (dy, q, k, v, tops, totals, _numbers(segments))
    _run(attention.attention_backward, inputs, numbers, (scratch, dq, dk, dv))
    return dq, dk, dv


def _numbers(segments: Array | None) -> Array:
    return load("attention").NO_SEGMENTS if segments is None else segments.astype(np.int64)


# --- MLP, loss, groups -------------------------------------------------------------------------------------


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, Cache]:
    """Return y = silu(gate) · up, all (…, F)."""
    if not compiled(gate, up):
        return functional.swiglu_forward(gate, up)
    y = np.empty_like(gate)
    _run(load("rows").swiglu_forward, (gate, up), (), (y,))
    return y, (gate, up)


def swiglu_backward(dy: Array, cache: Cache, *, in_place: bool = False) -> tuple[Array, Array]:
    """Return dgate and dup (…, F). With `in_place`, dup may overwrite dy."""
    if not compiled(dy, *cache):
        return functional.swiglu_backward(dy, cache)
    dgate, dup = np.empty_like(dy), dy if in_place else dy.copy()
    _run(load("rows").swiglu_backward, cache, (), (dgate, dup))
    return dgate, dup


def cross_entropy_forward(
    logits: Array, targets: Array, normalizer: float, out: Array | None = None
) -> tuple[float, Cache]:
    """Return the loss in nats; a kernel would save 0.4 % of a step."""
    return functional.cross_entropy_forward(logits, targets, normalizer, out)


def cross_entropy_backward(cache: Cache, out: Array | None = None) -> Array:
    """Return dlogits (N, V); NumPy takes two passes, which are not worth a kernel."""
    return functional.cross_entropy_backward(cache, out)


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """Return GELU; it is not compiled, since only the LoRA paper's figure has it."""
    return functional.gelu_forward(x)


def gelu_backward(dy: Array, cache: Cache) -> Array:
    """Return dx of `gelu_forward`."""
    return functional.gelu_backward(dy, cache)


def group_sum(x: Array, g: int) -> Array:
    """Sum each group of g neighbours of the last axis: (…, in) → (…, in/g)."""
    if g == 1 or not compiled(x):
        return functional.group_sum(x, g)
    y = np.empty((*x.shape[:-1], x.shape[-1] // g), x.dtype, like=x)
    _run(load("rows").group_sum, (x,), (g,), (y,))
    return y


def group_repeat(dp: LowRank | Array, g: int) -> Any:
    """Repeat each group's value g times: (…, in/g) → (…, in). Of a `LowRank` term, repeat only a."""
    if isinstance(dp, LowRank):
        return dp._replace(b=functional.group_repeat(dp.b, g))
    return functional.group_repeat(dp, g)
