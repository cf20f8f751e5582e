"""AdamW's update of one array, in one pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.jit import kernel

Array = np.ndarray


@kernel
def adamw(
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
    """Update p, m and v in place from the gradient g, all (n,) of one dtype, as are the numbers.

    m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − rate · m / (√(v / correct_v) + eps) − decay · p, with
    rest1 = 1 − β₁, rest2 = 1 − β₂, correct_v = 1 − β₂ᵗ, rate = lr / (1 − β₁ᵗ), decay = lr · λ. tests/test_optimizers.py
    compares it with `functional.adamw`.
    """
    for i in range(p.size):
        m[i] = beta1 * m[i] + rest1 * g[i]
        v[i] = beta2 * v[i] + rest2 * g[i] * g[i]
        p[i] -= m[i] / (np.sqrt(v[i] / correct_v) + eps) * rate + decay * p[i]
