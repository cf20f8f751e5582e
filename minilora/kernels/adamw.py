"""AdamW's update of one array, in one pass over memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from minilora.kernels.jit import kernel

Array = np.ndarray


def adamw(p: Array, g: Array, m: Array, v: Array, t: int, lr: float, c: Any) -> None:
    """Do what `functional.adamw` does, for arrays (n,) of one dtype, which all numbers take too."""
    update: Any = _update
    update(g, *_numbers(p.dtype, t, lr, c.beta1, c.beta2, c.eps, c.weight_decay), p, m, v)


@lru_cache(maxsize=8)  # the same for all parameters of a step that share dtype and rate
def _numbers(
    dtype: np.dtype[Any], t: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[Any, ...]:
    """Return what a step multiplies by, in the arrays' dtype: a float64 would make float64 of all."""
    one: Any = dtype.type
    rate = one(lr)
    means = one(beta1), one(1 - beta1), one(beta2), one(1 - beta2)
    return *means, one(1 - beta2**t), one(eps), rate / one(1 - beta1**t), rate * one(weight_decay)


@kernel
def _update(
    g: Array,
    beta1: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
    correct_v: Any,
    eps: Any,
    rate: Any,
    decay: Any,
    p: Array,
    m: Array,
    v: Array,
) -> None:
    """Update p, m and v in one pass. Numbers have their dtype: a float64 would make float64 of all."""
    for i in range(p.size):
        m[i] = beta1 * m[i] + rest1 * g[i]
        v[i] = beta2 * v[i] + rest2 * g[i] * g[i]
        p[i] -= m[i] / (np.sqrt(v[i] / correct_v) + eps) * rate + decay * p[i]
