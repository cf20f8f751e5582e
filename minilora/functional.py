"""The mathematics of LoRA and of the transformer: forward/backward pairs without state.

Each backward stands right under its forward. It undoes the forward in reverse order and quotes the line that
it differentiates. `dx` is the gradient of the loss with respect to `x`. Inside `with minilora.plain():`,
training runs these functions. One legend for the whole package:

    B batch   T time   C hidden size   H heads   K key/value heads   D head size   V vocabulary
    F width of the MLP   r rank   g group size   N any number of rows

Only `adamw` and `out=` write to an argument. `flat`, and `group_sum` or `group_repeat` with g = 1, return a
view or the argument itself, and a cache holds arguments. All other results are new arrays. float32 stays
float32, and float64 stays float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Cache = tuple[Any, ...]


def flat(x: Array) -> Array:
    """Return x (…, n) as a matrix (N, n): one row for each position of each sequence."""
    return x.reshape(-1, x.shape[-1])


def linear_forward(x: Array, w: Array) -> Array:
    """Return y = x wᵀ: x (…, in), w (out, in) → y (…, out)."""
    return x @ w.T


def linear_backward(dy: Array, x: Array, w: Array) -> tuple[Array, Array]:
    """Return dx (…, in) and dw (out, in) of `linear_forward`."""
    # y = x wᵀ
    return linear_dx(dy, w), linear_dw(dy, x)


def linear_dx(dy: Array, w: Array) -> Array:
    """Return dx = dy w (…, in). It needs no x, so a frozen Linear keeps none."""
    return dy @ w


def linear_dw(dy: Array, x: Array) -> Array:
    """Return dw = dyᵀ x (out, in), summed over all rows."""
    return flat(dy).T @ flat(x)


def low_rank_forward(p: Array, a: Array, b: Array, s: float) -> tuple[Array, Cache]:
    """Return y = s·p aᵀ bᵀ: what LoRA adds to x wᵀ (arXiv 2106.09685, eq. 3).

    Shapes: p (…, in), a (r, in), b (out, r) → h (…, r), y (…, out). The factor s is α/r.
    """
    h = p @ a.T
    return (s * h) @ b.T, (p, h)


def low_rank_backward(dy: Array, cache: Cache, a: Array, b: Array, s: float) -> tuple[Array, Array, Array]:
    """Return dp (…, in), da (r, in) and db (out, r) of `low_rank_forward`.

    With b = 0, as training starts, dh = 0: a gets no gradient in the first step.

    >>> _, cache = low_rank_forward(np.ones((2, 4)), np.ones((1, 4)), np.ones((3, 1)), s=2.0)
    >>> dp, da, db = low_rank_backward(np.ones((2, 3)), cache, np.ones((1, 4)), np.ones((3, 1)), s=2.0)
    >>> da.tolist(), db.T.tolist()
    ([[12.0, 12.0, 12.0, 12.0]], [[16.0, 16.0, 16.0]])
    """
    p, h = cache
    # y = s·h bᵀ
    db = flat(dy).T @ flat(s * h)
    dh = s * (dy @ b)
    # h = p aᵀ
    da = flat(dh).T @ flat(p)
    dp = dh @ a
    return dp, da, db


def embedding_backward(dy: Array, ids: Array, V: int) -> Array:
    """Return dtable (V, C): row i is the sum of dy (…, C) over all positions whose token is i."""
    dtable = np.zeros((V, dy.shape[-1]), dy.dtype, like=dy)
    np.add.at(dtable, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return dtable


def rms_norm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, Cache]:
    """Return y = weight · x / √(mean(x²) + eps), x and y (…, C), weight (C,) (arXiv 1910.07467, eq. 4)."""
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / x.dtype.type(x.shape[-1])  # (…, 1)
    rstd = 1 / np.sqrt(mean_square + x.dtype.type(eps))
    y = x * rstd
    y *= weight
    return y, (x, rstd)


def rms_norm_backward(
    dy: Array, weight: Array, cache: Cache, need_dweight: bool = True
) -> tuple[Array, Array | None]:
    """Return dx (…, C) and dweight (C,) of `rms_norm_forward`. Without `need_dweight`, dweight is None."""
    x, rstd = cache
    # y = x * rstd * weight
    xhat = x * rstd
    C = x.shape[-1]
    dweight = np.einsum("nc,nc->c", dy.reshape(-1, C), xhat.reshape(-1, C)) if need_dweight else None
    dxhat = dy * weight
    # rstd depends on x too: dx = rstd · (dxhat − xhat · mean(dxhat ∘ xhat))
    pull = np.einsum("...c,...c->...", dxhat, xhat)[..., None] / x.dtype.type(x.shape[-1])
    xhat *= pull
    dxhat -= xhat
    dxhat *= rstd
    return dxhat, dweight


def rope_tables(
    positions: Array, head_dim: int, theta: float, dtype: Any, factors: Any = None
) -> tuple[Array, Array]:
    """Return cos and sin (…, D/2) of position (…) · theta^(−2i/D) / factors[i] (arXiv 2104.09864, §3.2)."""
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (D/2,)
    if factors is not None:
        inverse = inverse / np.array(factors)
    angle = np.asarray(positions)[..., None] * inverse
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def rope_forward(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (x[i], x[i + D/2]) of each head: x (B, T, H, D), cos and sin (T or B, T, D/2)."""
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    y[..., :half], y[..., half:] = x[..., half:], x[..., :half]  # (second, first)
    # (first, second) → (first·cos − second·sin, second·cos + first·sin)
    y *= np.concatenate([-sin, sin], axis=-1)[..., None, :]  # (…, T, 1, D)
    y += x * np.concatenate([cos, cos], axis=-1)[..., None, :]
    return y


def rope_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """Rotate back: the transpose of a rotation by an angle is the rotation by minus that angle."""
    return rope_forward(dy, cos, -sin)


def softmax(x: Array, out: Array | None = None) -> Array:
    """Return exp(x − max) / Σ exp(x − max) over the last axis; `out` may be `x` itself."""
    y = np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


class AttentionCache(NamedTuple):
    """Cache of attention: q / √D (B, T, H, D), k and v (B, T, K, D), probs (B, K, G, T, T) with G = H/K."""

    q: Array
    k: Array
    v: Array
    probs: Any


def attention_mask(T: int, segments: Array | None, like: Array) -> Array:
    """Return the mask that is added to the scores: 0 where a query may attend, −inf elsewhere.

    A query attends to keys of its own segment, up to its own position. So packed examples stay separate.
    Positions are not reset for each example: rotary scores depend only on the distance of query and key.

    Shapes: segments (B, T) or None → mask (B, 1, 1, T, T) or (T, T). `like` gives the dtype.
    """
    place = np.arange(T, like=like)
    seen = place[:, None] >= place  # (T, T)
    if segments is not None:
        seen = (seen & (segments[:, :, None] == segments[:, None, :]))[:, None, None]  # (B, 1, 1, T, T)
    return np.where(seen, like.dtype.type(0), like.dtype.type(-np.inf))


def attention_forward(q: Array, k: Array, v: Array, segments: Any = None) -> tuple[Array, AttentionCache]:
    """Return y = softmax(q kᵀ / √D + mask) v: causal grouped-query attention (arXiv 1706.03762, 2305.13245).

    Shapes: q (B, T, H, D), k and v (B, T, K, D) with K dividing H → y (B, T, H, D). Query head h reads key
    head h // (H/K). `segments` (B, T) number the packed examples (`attention_mask`).
    """
    scaled = q * q.dtype.type(q.shape[-1] ** -0.5)  # scaling q costs T·D products, the scores T·T
    return attention_from_scaled(scaled, k, v, segments)


def attention_from_scaled(q: Array, k: Array, v: Array, segments: Any = None) -> tuple[Array, AttentionCache]:
    """Return `attention_forward` for a q already divided by √D, as in the cache. The bits are the same."""
    B, T, H, D = q.shape
    K = k.shape[2]
    G = H // K  # query heads that share one key head
    q5 = q.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, D)
    k5 = k.transpose(0, 2, 1, 3)[:, :, None]  # (B, K, 1, T, D)
    v5 = v.transpose(0, 2, 1, 3)[:, :, None]  # (B, K, 1, T, D)
    scores = q5 @ k5.swapaxes(-1, -2)  # (B, K, G, T, T)
    scores += attention_mask(T, segments, q)
    probs = softmax(scores, out=scores)
    y = (probs @ v5).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
    return y, AttentionCache(q, k, v, probs)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Return dq (B, T, H, D), dk and dv (B, T, K, D) of `attention_forward`."""
    q, k, v, probs = cache  # q is already divided by √D
    B, T, H, D = q.shape
    K, G = k.shape[2], H // k.shape[2]
    q5 = q.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, D)
    k5 = k.transpose(0, 2, 1, 3)[:, :, None]  # (B, K, 1, T, D)
    v5 = v.transpose(0, 2, 1, 3)[:, :, None]  # (B, K, 1, T, D)
    dy5 = dy.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, D)
    # y = probs @ v; sum over the G query heads that share a value head
    dv = (probs.swapaxes(-1, -2) @ dy5).sum(axis=2).transpose(0, 2, 1, 3)  # (B, T, K, D)
    dscores = dy5 @ v5.swapaxes(-1, -2)  # = dprobs (B, K, G, T, T)
    # probs = softmax(scores): dscores = probs ∘ (dprobs − Σ dprobs ∘ probs)
    dscores -= np.einsum("...s,...s->...", dscores, probs)[..., None]
    dscores *= probs
    # scores = q kᵀ with q = original q / √D; masked scores have probs = 0 and so get nothing
    dq = (dscores @ k5).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
    dq *= q.dtype.type(D**-0.5)
    dk = (dscores.swapaxes(-1, -2) @ q5).sum(axis=2).transpose(0, 2, 1, 3)  # (B, T, K, D)
    return dq, dk, dv


def sigmoid(z: Array) -> Array:
    """Return σ(z) = 1 / (1 + exp(−z))."""
    y = np.negative(z)
    with np.errstate(over="ignore"):  # exp(−z) = inf is right: it gives σ = 0
        np.exp(y, out=y)
    y += 1
    return np.reciprocal(y, out=y)


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, Cache]:
    """Return y = silu(gate) · up, all (…, F), with silu(z) = z · σ(z) (SwiGLU, arXiv 2002.05202)."""
    y = sigmoid(gate)
    y *= gate
    y *= up
    return y, (gate, up)


def swiglu_backward(dy: Array, cache: Cache) -> tuple[Array, Array]:
    """Return dgate and dup (…, F) of `swiglu_forward`."""
    gate, up = cache
    # recompute σ: that costs 1 % of a block's time, and keeping it a fifth of a block's memory
    sigma = sigmoid(gate)
    # y = silu(gate) * up
    silu = gate * sigma
    dup = dy * silu
    # silu' = σ (1 + gate (1 − σ)) = σ + silu − silu σ
    dgate = 1 - sigma
    dgate *= silu
    dgate += sigma
    dgate *= up
    dgate *= dy
    return dgate, dup


_GELU = (2 / np.pi) ** 0.5


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """Return y = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))) (GELU, tanh form, arXiv 1606.08415, §2)."""
    one = x.dtype.type
    t = one(0.044715) * x
    t *= x
    t *= x
    t += x
    t *= one(_GELU)
    np.tanh(t, out=t)
    y = 1 + t
    y *= x
    y *= one(0.5)
    return y, (x, t)


def gelu_backward(dy: Array, cache: Cache) -> Array:
    """Return dx of `gelu_forward`."""
    x, t = cache
    one = x.dtype.type
    # y = x/2 (1 + t);  t = tanh(c (x + a x³)), so dt/dx = (1 − t²) c (1 + 3 a x²)
    dt = one(3 * 0.044715) * x
    dt *= x
    dt += 1
    dt *= one(_GELU)
    slope = t * t
    np.subtract(1, slope, out=slope)
    dt *= slope
    # dy/dx = ½ (1 + t + x dt/dx)
    dt *= x
    dt += t
    dt += 1
    dt *= dy
    dt *= one(0.5)
    return dt


def cross_entropy_forward(
    logits: Array, targets: Array, normalizer: float, out: Array | None = None
) -> tuple[float, Cache]:
    """Return the cross-entropy in nats, loss = Σ (log Σ exp logits − logits[target]) / normalizer.

    Shapes: logits (N, V), targets (N,). `normalizer` is the number of targets in the whole batch, so that
    losses of shards can be added. The sum runs in float64. `out`, for the probabilities, may be `logits`.
    """
    probs = np.subtract(logits, logits.max(axis=-1, keepdims=True), out=out)
    rows = np.arange(len(targets))
    picked = probs[rows, targets].astype(np.float64)
    np.exp(probs, out=probs)
    total = probs.sum(axis=-1, keepdims=True)
    loss = float((np.log(total[:, 0].astype(np.float64)) - picked).sum() / normalizer)
    probs /= total
    return loss, (probs, targets, normalizer)


def cross_entropy_backward(cache: Cache, out: Array | None = None) -> Array:
    """Return dlogits = (softmax(logits) − onehot(target)) / normalizer (N, V). `out` may be probs itself."""
    probs, targets, normalizer = cache
    dlogits = np.divide(probs, probs.dtype.type(normalizer), out=out)
    dlogits[np.arange(len(targets)), targets] -= probs.dtype.type(1 / normalizer)
    return dlogits


def group_sum(x: Array, g: int) -> Array:
    """Sum each group of g neighbours of the last axis: (…, in) → (…, in/g).

    This is QA-LoRA's pooling (arXiv 2309.14717, Algorithm 1). The paper's text takes the mean and multiplies
    by g, which is the sum. g = 1 returns x itself.

    >>> group_sum(np.array([1., 2., 3., 4.]), 2)
    array([3., 7.])
    """
    return x if g == 1 else x.reshape(*x.shape[:-1], x.shape[-1] // g, g).sum(axis=-1)


def group_repeat(dy: Array, g: int) -> Array:
    """Repeat each group's value g times, (…, in/g) → (…, in): the backward of `group_sum`."""
    return dy if g == 1 else np.repeat(dy, g, axis=-1)


def adamw(p: Array, g: Array, m: Array, v: Array, t: int, lr: float, c: Any) -> None:
    """Update p, m and v in place by the gradient g of step t = 1, 2, … (arXiv 1711.05101, Algorithm 2).

    All four have one shape. c holds beta1, beta2, eps and weight_decay, as a `TrainConfig` does.
    """
    m[...] = c.beta1 * m + (1 - c.beta1) * g
    v[...] = c.beta2 * v + (1 - c.beta2) * g * g
    mhat = m / (1 - c.beta1**t)
    vhat = v / (1 - c.beta2**t)
    p -= lr * (mhat / (np.sqrt(vhat) + c.eps) + c.weight_decay * p)
