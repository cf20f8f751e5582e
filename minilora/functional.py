"""The mathematics of the transformer: forward/backward pairs without state.

Each backward stands right under its forward, undoes it in reverse order and quotes the line that it
differentiates. ``dx`` is the gradient of the loss with respect to ``x``. One legend for the whole package:

    B batch   T time   C hidden size   H heads   K key/value heads   D head size   V vocabulary
    F width of the MLP   r rank   g group size   N any number of rows

No function here changes its inputs; float32 stays float32 and float64 stays float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray
Cache = tuple[Any, ...]


def embedding_backward(dy: Array, ids: Array, V: int) -> Array:
    """y = table[ids]: each row of dy (…, C) is added to the row of dtable (V, C) that its token, of ids (…),
    took."""
    dtable = np.zeros((V, dy.shape[-1]), dy.dtype, like=dy)
    np.add.at(dtable, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return dtable


def rms_norm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, Cache]:
    """Root-mean-square normalisation, y = weight · x / √(mean(x²) + eps) over the last axis (arXiv
    1910.07467, eq. 4).

    Shapes: x (…, C), weight (C,) → y (…, C).
    """
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / x.dtype.type(x.shape[-1])  # (…, 1)
    rstd = 1 / np.sqrt(mean_square + x.dtype.type(eps))
    y = x * rstd
    y *= weight
    return y, (x, rstd)


def rms_norm_backward(
    dy: Array, weight: Array, cache: Cache, need_dweight: bool = True
) -> tuple[Array, Array | None]:
    """Return dx (…, C) and, unless the weight is frozen, dweight (C,) of :func:`rms_norm_forward`."""
    x, rstd = cache
    # y = x * rstd * weight
    xhat = x * rstd
    C = x.shape[-1]
    dweight = np.einsum("nc,nc->c", dy.reshape(-1, C), xhat.reshape(-1, C)) if need_dweight else None
    dxhat = dy * weight
    # rstd = (mean(x²) + eps)^-½, so each xhat pulls x back along itself:
    pull = np.einsum("...c,...c->...", dxhat, xhat)[..., None] / x.dtype.type(x.shape[-1])
    xhat *= pull
    dxhat -= xhat
    dxhat *= rstd
    return dxhat, dweight


def rope_tables(
    positions: Array,
    head_dim: int,
    theta: float,
    dtype: np.dtype[Any],
    factors: tuple[float, ...] | None = None,
) -> tuple[Array, Array]:
    """Return cos and sin of position · theta^(−2i/D) / factors[i] (arXiv 2104.09864), tables (…, D/2) for
    positions (…)."""
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (D/2,)
    if factors is not None:
        inverse = inverse / np.array(factors)
    angle = np.asarray(positions)[..., None] * inverse
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def rope_forward(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pair (x[i], x[i + D/2]) of each head by its position's angle, in transformers' half-split
    layout.

    Shapes: x (B, T, H, D), cos and sin (T, D/2) or (B, T, D/2).
    """
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    y[..., :half], y[..., half:] = x[..., half:], x[..., :half]  # (second, first)
    # (first, second) → (first·cos − second·sin, second·cos + first·sin)
    y *= np.concatenate([-sin, sin], axis=-1)[..., None, :]  # (…, T, 1, D)
    y += x * np.concatenate([cos, cos], axis=-1)[..., None, :]
    return y


def rope_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """A rotation's transpose is the rotation back: dx = rope_forward(dy, cos, −sin)."""
    return rope_forward(dy, cos, -sin)


def softmax(x: Array, out: Array | None = None) -> Array:
    """exp(x − max) / Σ exp(x − max) over the last axis; ``out`` may be ``x`` itself."""
    y = np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


def attention_mask(T: int, segments: Array | None, like: Array) -> Array:
    """What is added to the scores: 0 where a query may look, −inf where not; (T, T), or (B, 1, 1, T, T) with
    segments.

    A query sees its own past, and of that only its own segment: examples packed into one row do not see each
    other. Their positions need no reset, because rotary scores depend on the distance between query and key
    alone. ``like`` gives the dtype.
    """
    place = np.arange(T, like=like)
    seen = place[:, None] >= place  # (T, T)
    if segments is not None:
        seen = (seen & (segments[:, :, None] == segments[:, None, :]))[:, None, None]  # (B, 1, 1, T, T)
    return np.where(seen, like.dtype.type(0), like.dtype.type(-np.inf))


def attention_forward(q: Array, k: Array, v: Array, segments: Array | None = None) -> tuple[Array, Cache]:
    """Causal grouped-query attention, y = softmax(q kᵀ / √D + mask) v (arXiv 1706.03762, 2305.13245).

    Shapes: q (B, T, H, D), k and v (B, T, K, D) with K dividing H → y (B, T, H, D). Query head h reads key
    head h // (H/K). ``segments`` (B, T) integers: places with different numbers do not see each other
    (:func:`attention_mask`).
    """
    return attention_again(
        q * q.dtype.type(q.shape[-1] ** -0.5), k, v, segments
    )  # cheaper here than on the T × T scores


def attention_again(q: Array, k: Array, v: Array, segments: Array | None = None) -> tuple[Array, Cache]:
    """:func:`attention_forward` from the first three arrays of its cache, whose q is divided by √D already:
    the same bits."""
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
    return y, (q, k, v, probs)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Return dq (B, T, H, D), dk and dv (B, T, K, D) of :func:`attention_forward`."""
    q, k, v, probs = cache  # q is already divided by √D
    B, T, H, D = q.shape
    K, G = k.shape[2], H // k.shape[2]
    q5 = q.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, D)
    k5 = k.transpose(0, 2, 1, 3)[:, :, None]  # (B, K, 1, T, D)
    v5 = v.transpose(0, 2, 1, 3)[:, :, None]  # (B, K, 1, T, D)
    dy5 = dy.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, D)
    # y = probs @ v; the G query heads that share a value head add up
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
    """σ(z) = 1 / (1 + exp(−z))."""
    y = np.negative(z)
    with np.errstate(over="ignore"):  # exp(−z) = inf is right: it gives σ = 0
        np.exp(y, out=y)
    y += 1
    return np.reciprocal(y, out=y)


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, Cache]:
    """SwiGLU, y = silu(gate) · up with silu(z) = z · σ(z) (arXiv 2002.05202). Shapes: all (…, F)."""
    y = sigmoid(gate)
    y *= gate
    y *= up
    return y, (gate, up)


def swiglu_backward(dy: Array, cache: Cache) -> tuple[Array, Array]:
    """Return dgate and dup (…, F) of :func:`swiglu_forward`."""
    gate, up = cache
    sigma = sigmoid(
        gate
    )  # again: to keep it would cost a fifth of a block's memory, to compute it 1 % of its time
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
    """GELU in its tanh form, y = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))) (arXiv 1606.08415, §2)."""
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
    """Return dx of :func:`gelu_forward`."""
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
    """Cross-entropy in nats, loss = Σ (log Σ exp logits − logits[target]) / normalizer.

    Shapes: logits (N, V), targets (N,). The normalizer is the number of targets of the whole batch, so that
    shards add up. The sum runs in float64: it is a result that people compare. ``out``, for the
    probabilities, may be ``logits`` itself.
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
    """dlogits = (softmax(logits) − onehot(target)) / normalizer, shape (N, V); ``out`` may be the cached
    probabilities."""
    probs, targets, normalizer = cache
    dlogits = np.divide(probs, probs.dtype.type(normalizer), out=out)
    dlogits[np.arange(len(targets)), targets] -= probs.dtype.type(1 / normalizer)
    return dlogits


def group_sum(x: Array, g: int) -> Array:
    """Sum each group of g neighbours of the last axis (QA-LoRA's pooling, arXiv 2309.14717, Algorithm 1): (…,
    in) → (…, in/g).

    The paper's text averages and multiplies by g again; the sum is that, said once. With g = 1 it is the
    identity.

    >>> group_sum(np.array([1., 2., 3., 4.]), 2)
    array([3., 7.])
    """
    return x if g == 1 else x.reshape(*x.shape[:-1], x.shape[-1] // g, g).sum(axis=-1)


def group_repeat(dy: Array, g: int) -> Array:
    """The backward of :func:`group_sum`: each member of a group gets the group's gradient, (…, in/g) → (…,
    in)."""
    return dy if g == 1 else np.repeat(dy, g, axis=-1)


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    t: int,
) -> None:
    """Take step t = 1, 2, … of AdamW (arXiv 1711.05101, Algorithm 2); p, m and v are updated in place.

    Shapes: all of p, its gradient g, and the running means m of g and v of g² are alike.
    """
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    p -= lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
