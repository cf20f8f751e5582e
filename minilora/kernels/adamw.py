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
    """Move p, m and v, all (n,), in one pass over memory; the numbers are those of ``_Numbers``."""
    for i in range(p.size):
        m[i] = beta1 * m[i] + rest1 * g[i]
        v[i] = beta2 * v[i] + rest2 * g[i] * g[i]
        p[i] -= m[i] / (np.sqrt(v[i] / correct_v) + eps) * rate + decay * p[i]
