"""One token of one sequence through a model of GGUF blocks: the arithmetic that several threads run together.

`minilora.decoding` knows models and calls this. Norm, rotation, SwiGLU and exp are those of `rows`. Letters
of the shapes: see `minilora.functional`. tests/test_decoding.py compares with the plain path,
`generation.decode`.
"""

from __future__ import annotations

import numpy as np

from minilora.kernels.barrier import bytes_at, meet
from minilora.kernels.block_vectors import multiply_rows, order_input
from minilora.kernels.jit import kernel
from minilora.kernels.rows import ONE, exp, group_sum, largest, rms_norm_forward, rope, swiglu_forward

Array = np.ndarray


@kernel
def decode_token(
    x: Array,
    table: Array,
    head: Array,
    norms: Array,
    eps: float,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    position: int,
    H: int,
    F: int,
    shared: Array,
    logits: Array,
    thread: int,
    threads: int,
    sync: Array,
) -> None:
    """Do one thread's part of a token.

    x (C,) is the token's embedding and is overwritten. `table` (L, 7, 7) and `head` (1, 7) describe the
    weights (see `Decoder._entry`), `norms` is (2L + 1, C), keys and values are (L, K, S, D). Threads hand
    results to each other in `shared` (7, widest); logits (1, V) are the result.
    """
    C, K, D = x.size, keys.shape[1], keys.shape[3]
    q, k, v, y = shared[0, : H * D], shared[1], shared[2], shared[3, :C]
    gate, up, mixed, hidden = shared[4, :F], shared[5, :F], shared[6, : H * D], shared[6, :F]
    normed, rstd = np.empty(C, np.float32), np.empty(1, np.float32)
    mine, my_heads, mine_of_f = (
        _share(C, thread, threads),
        _share(K, thread, threads),
        _share(F, thread, threads),
    )
    phase = 1
    for layer in range(len(table)):
        w = table[layer]
        rms_norm_forward(x, norms[2 * layer], eps, normed, rstd)
        _multiply(w[:3], normed, shared[:3], thread, threads)  # q, k, v
        phase = meet(sync, phase, threads)
        for j in range(my_heads[0], my_heads[1]):
            _attend(q, k, v, cos, sin, keys[layer, j], values[layer, j], position, j, H // K, mixed)
        phase = meet(sync, phase, threads)
        _multiply(w[3:4], mixed, shared[3:4], thread, threads)  # o
        for i in range(mine[0], mine[1]):
            x[i] += y[i]
        phase = meet(sync, phase, threads)
        rms_norm_forward(x, norms[2 * layer + 1], eps, normed, rstd)
        _multiply(w[4:6], normed, shared[4:6], thread, threads)  # gate, up
        part = slice(mine_of_f[0], mine_of_f[1])
        swiglu_forward(gate[part], up[part], hidden[part])
        phase = meet(sync, phase, threads)
        _multiply(w[6:], hidden, shared[3:4], thread, threads)  # down
        for i in range(mine[0], mine[1]):
            x[i] += y[i]
        phase = meet(sync, phase, threads)
    rms_norm_forward(x, norms[-1], eps, normed, rstd)
    _multiply(head, normed, logits, thread, threads)


@kernel
def _share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """Return which of `count` rows or heads, first to last - 1, are this thread's."""
    return count * thread // threads, count * (thread + 1) // threads


@kernel
def _multiply(weights: Array, x: Array, out: Array, thread: int, threads: int) -> None:
    """Write this thread's rows of W x to a row of `out` for each weight (a row of `Decoder`'s tables)."""
    ordered, sums = np.empty(x.size, np.float32), np.empty(x.size // 32, np.float32)
    order_input(x, ordered, sums)
    for i in range(len(weights)):
        size, rows, rank, group = weights[i, 1], weights[i, 2], weights[i, 3], weights[i, 4]
        blocks = bytes_at(weights[i, 0], rows * sums.size * size)
        first, last = _share(rows, thread, threads)
        multiply_rows(blocks, size, x if size == 34 else ordered, sums, first, last, out[i])
        if rank:
            a = bytes_at(weights[i, 5], 4 * rank * (x.size // group)).view(np.float32)
            b = bytes_at(weights[i, 6], 4 * rows * rank).view(np.float32)
            _add_adapter(a, b, rank, group, x, first, last, out[i])


@kernel
def _add_adapter(
    a: Array, b: Array, rank: int, group: int, x: Array, first: int, last: int, out: Array
) -> None:
    """Add rows of B A p to `out`: p is x or the sums of its groups, A (r, in/g) and B (out, r) are flat."""
    pooled, hidden = x, np.empty(rank, np.float32)
    if group > 1:
        pooled = np.empty(x.size // group, np.float32)
        group_sum(x, group, pooled)
    for r in range(rank):
        row, dot = a[r * pooled.size : (r + 1) * pooled.size], np.float32(0)
        for i in range(pooled.size):
            dot += row[i] * pooled[i]
        hidden[r] = dot
    for i in range(first, last):
        dot = np.float32(0)
        for r in range(rank):
            dot += b[i * rank + r] * hidden[r]
        out[i] += dot


@kernel
def _attend(
    q: Array,
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    position: int,
    head: int,
    group: int,
    out: Array,
) -> None:
    """Rotate and store one key head, and write what its query heads see: keys and values (S, D)."""
    D = keys.shape[1]
    rope(cos, sin, 1, D, 1.0, k[head * D : (head + 1) * D])
    rope(cos, sin, group, D, 1.0, q[head * group * D : (head + 1) * group * D])
    for i in range(D):
        keys[position, i] = k[head * D + i]
        values[position, i] = v[head * D + i]
    scale, scores = ONE / np.sqrt(np.float32(D)), np.empty(position + 1, np.float32)
    for h in range(head * group, (head + 1) * group):
        query, mixed = q[h * D : (h + 1) * D], out[h * D : (h + 1) * D]
        for s in range(scores.size):
            key, dot = keys[s], np.float32(0)
            for i in range(D):
                dot += query[i] * key[i]
            scores[s] = dot
        top, total = largest(scores), np.float32(0)
        for s in range(scores.size):
            scores[s] = exp((scores[s] - top) * scale)
            total += scores[s]
        for i in range(D):
            mixed[i] = np.float32(0)
        for s in range(scores.size):
            value, weight = values[s], scores[s] / total
            for i in range(D):
                mixed[i] += weight * value[i]
