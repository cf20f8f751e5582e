"""How A and B start: at random with B = 0, or from the singular values of the weight (PiSSA) or of its
rounding error (LoftQ).

All take W (out, in) and give A (r, in), B (out, r); ``scaling`` is the factor s in front of B A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.config import LoraConfig

Array = np.ndarray


def init_a(config: LoraConfig, shape: tuple[int, int], in_features: int, rng: np.random.Generator) -> Array:
    """Draw A. ``in_features`` is the layer's true input width also when the input is pooled (√g too large
    otherwise).

    normal N(0, 1/(3·in)) · kaiming U(±1/√in), PEFT's default, of the same variance · gaussian N(0, 1/r²),
    which depends on r.
    """
    if config.init_lora_weights == "kaiming":
        return rng.uniform(-1, 1, shape) / in_features**0.5
    std = 1 / config.r if config.init_lora_weights == "gaussian" else (3 * in_features) ** -0.5
    return rng.standard_normal(shape) * std


def low_rank(matrix: Array, r: int, scaling: float) -> tuple[Array, Array]:
    """Return A (r, in), B (out, r), float64, whose s·B A approximates M best: M = U S Vᵀ, A = √(S/s) Vᵀ, B =
    U √(S/s).

    Signs are arbitrary in a decomposition; here the largest element of each row of A is positive.

    >>> A, B = low_rank(np.diag([8.0, 1.0]), 1, scaling=2.0)
    >>> (A.tolist(), B.tolist())
    ([[2.0, 0.0]], [[2.0], [0.0]])
    """
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    root = np.sqrt(s[:r] / scaling)
    sign = np.sign(vt[np.arange(r), np.abs(vt[:r]).argmax(axis=1)])
    sign[sign == 0] = 1
    return (root * sign)[:, None] * vt[:r] + 0.0, u[:, :r] * (root * sign) + 0.0


def pissa(w: Array, r: int, scaling: float) -> tuple[Array, Array, Array]:
    """Return (residual W − s·B A, A, B): the adapter starts as the r principal directions of W, which then
    train.

    PiSSA (arXiv 2404.02948, section 3). W = residual + s·B A: nothing has changed yet.
    """
    a, b = (x.astype(w.dtype) for x in low_rank(w, r, scaling))
    residual = w - scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return residual.astype(w.dtype), a, b


def loftq(
    w: Array, r: int, scaling: float, quantize: Callable[[Array], Any], steps: int = 1
) -> tuple[Any, Array, Array]:
    """Return (quantized weight, A, B) with Q + s·B A ≈ W: the adapter starts as the best answer to the
    rounding error.

    for t in 1 … steps:  Q = quantize(W − s·B A);  s·B A = svd_r(W − Q)        LoftQ (arXiv 2310.08659, Algorithm 1)

    The decomposition is divided by s. PEFT leaves that out, so that its start is right only when α = r.
    """
    low: Array = np.zeros_like(w)
    for _ in range(steps):
        weight = quantize((w - low).astype(np.float32))
        a, b = (x.astype(w.dtype) for x in low_rank(w - weight.dense(), r, scaling))
        low = scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return weight, a, b
