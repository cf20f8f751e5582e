"""One token of one sequence through a model of GGUF blocks: the arithmetic that several threads run together.

``minilora.decoding`` knows models, and calls this. Letters of the shapes: see the functional module.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.barrier import bytes_at, meet
from minilora.kernels.block_vectors import multiply_rows, order_input
from minilora.kernels.jit import kernel

Array = np.ndarray


@kernel
def decode_token(
    x: Array,
    table: Array,
    head: Array,
    norms: Array,
    eps: Any,
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
    """Do one thread's part of a token: ``x`` (C,) is its embedding and is used up, ``shared`` is what threads tell each other."""
    C, K, D = x.size, keys.shape[1], keys.shape[3]
    q, k, v, y, gate, up, mixed = (
        shared[0],
        shared[1],
        shared[2],
        shared[3, :C],
        shared[4, :F],
        shared[5, :F],
        shared[6, : H * D],
    )
    normed = np.empty(C, np.float32)
    mine, mine_of_k, mine_of_f, phase = (
        _share(C, thread, threads),
        _share(K, thread, threads),
        _share(F, thread, threads),
        1,
    )
    for layer in range(len(table)):
        w = table[layer]
        _norm(x, norms[2 * layer], eps, normed)
        _multiply(w[:3], normed, shared[:3], thread, threads)  # q, k, v
        phase = meet(sync, phase, threads)
        for j in range(mine_of_k[0], mine_of_k[1]):
            _attend(q, k, v, cos, sin, keys[layer, j], values[layer, j], position, j, H // K, mixed)
        phase = meet(sync, phase, threads)
        _multiply(w[3:4], mixed, shared[3:4], thread, threads)  # o
        for i in range(mine[0], mine[1]):
            x[i] += y[i]
        phase = meet(sync, phase, threads)
        _norm(x, norms[2 * layer + 1], eps, normed)
        _multiply(w[4:6], normed, shared[4:6], thread, threads)  # gate, up
        for i in range(mine_of_f[0], mine_of_f[1]):
            gate[i] = gate[i] / (np.float32(1) + _exp(-gate[i])) * up[i]
        phase = meet(sync, phase, threads)
        _multiply(w[6:], gate, shared[3:4], thread, threads)  # down
        for i in range(mine[0], mine[1]):
            x[i] += y[i]
        phase = meet(sync, phase, threads)
    _norm(x, norms[-1], eps, normed)
    _multiply(head, normed, logits, thread, threads)


@kernel
def _share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """Return which of ``count`` things, first to last - 1, are this thread's."""
    return count * thread // threads, count * (thread + 1) // threads


@kernel
def _multiply(weights: Array, x: Array, out: Array, thread: int, threads: int) -> None:
    """Write this thread's rows of W x into a row of ``out`` for each weight, which is a row of ``Decoder``'s tables."""
    ordered, sums = np.empty(x.size, np.float32), np.empty(x.size // 32, np.float32)
    order_input(x, ordered, sums)
    for i in range(len(weights)):
        size, rows, rank, group = weights[i, 1], weights[i, 2], weights[i, 3], weights[i, 4]
        blocks = bytes_at(weights[i, 0], rows * sums.size * size)
        first, last = _share(rows, thread, threads)
        multiply_rows(blocks, size, x if size == 34 else ordered, sums, first, last, out[i])
        if rank:
            a, b = (
                bytes_at(weights[i, 5], 4 * rank * (x.size // group)),
                bytes_at(weights[i, 6], 4 * rows * rank),
            )
            _add_adapter(a.view(np.float32), b.view(np.float32), rank, group, x, first, last, out[i])


@kernel
def _add_adapter(
    a: Array, b: Array, rank: int, group: int, x: Array, first: int, last: int, out: Array
) -> None:
    """Add rows of B A p to ``out``, where p is x or the sums of its groups; A (r, in/g) and B (out, r) are flat."""
    pooled, hidden = x, np.empty(rank, np.float32)
    if group > 1:
        pooled = np.zeros(x.size // group, np.float32)
        for i in range(x.size):
            pooled[i // group] += x[i]
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
def _norm(x: Array, weight: Array, eps: Any, out: Array) -> None:
    """Do what ``functional.rms_norm_forward`` does."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    rstd = np.float32(1) / np.sqrt(total / np.float32(x.size) + eps)
    for i in range(x.size):
        out[i] = x[i] * rstd * weight[i]


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
    """Rotate and store key head ``head``, and write what its ``group`` of query heads see: ``keys`` and ``values`` are (S, D)."""
    D = keys.shape[1]
    _rotate(k[head * D : (head + 1) * D], cos, sin, np.float32(1), keys[position])
    for i in range(D):
        values[position, i] = v[head * D + i]
    query, scores = np.empty(D, np.float32), np.empty(position + 1, np.float32)
    for h in range(head * group, (head + 1) * group):
        mixed = out[h * D : (h + 1) * D]
        _rotate(q[h * D : (h + 1) * D], cos, sin, np.float32(1) / np.sqrt(np.float32(D)), query)
        highest = np.float32(-np.inf)
        for s in range(scores.size):
            key, dot = keys[s], np.float32(0)
            for i in range(D):
                dot += query[i] * key[i]
            scores[s] = dot
            highest = max(highest, dot)
        total = np.float32(0)
        for s in range(scores.size):
            scores[s] = _exp(scores[s] - highest)
            total += scores[s]
        for i in range(D):
            mixed[i] = np.float32(0)
        for s in range(scores.size):
            value, weight = values[s], scores[s] / total
            for i in range(D):
                mixed[i] += weight * value[i]


@kernel
def _rotate(x: Array, cos: Array, sin: Array, factor: Any, out: Array) -> None:
    """Do what ``functional.rope_forward`` does for one head (D,), and multiply by a factor."""
    half = cos.size
    for i in range(half):
        out[i] = (x[i] * cos[i] - x[half + i] * sin[i]) * factor
        out[half + i] = (x[half + i] * cos[i] + x[i] * sin[i]) * factor


@kernel
def _exp(x: Any) -> Any:
    """Return eˣ = 2^n·e^r with |r| ≤ ln(2)/2, to two units in the last place, in operations that have vectors (Cephes' expf)."""
    x = np.float32(-87) if x < np.float32(-87) else x
    x = np.float32(88) if x > np.float32(88) else x
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = (
        x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    )  # ln 2 in two parts, of which the first is short
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    power = (np.int32(n) + np.int32(127)) << np.int32(23)
    return p * np.int32(power).view(np.float32)
