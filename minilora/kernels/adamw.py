"""AdamW's update of one array, in one pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.jit import kernel

Array = np.ndarray


def adamw(p: Array, g: Array, m: Array, v: Array, t: int, lr: float, c: Any) -> None:
    """Do what `functional.adamw` does, for arrays (n,) of one dtype, which all numbers take too."""
    one = p.dtype.type
    rate = one(lr)
    means = one(c.beta1), one(1 - c.beta1), one(c.beta2), one(1 - c.beta2)
    correct_v, step = one(1 - c.beta2**t), rate / one(1 - c.beta1**t)
    _update(g, *means, correct_v, one(c.eps), step, rate * one(c.weight_decay), p, m, v)


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
