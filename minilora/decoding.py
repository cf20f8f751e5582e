"""One token of one sequence through a model of GGUF blocks, in one compiled function that several threads run together.

From Python a token takes some two thousand small operations, which cost more than the products themselves. Here each thread
computes its own rows of every product and its own heads of attention, and all meet at a barrier before anybody reads what
others wrote. A row is computed in the same way whoever does it, so results are the same bytes for any number of threads.

The plain path is ``generation.decode``, which this must equal up to rounding, and which does everything else: several sequences,
other weights, DoRA, processors without AVX2.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from minilora import barrier
from minilora.barrier import bytes_at, meet
from minilora.layers import Array, Linear
from minilora.lora import LoraLinear
from minilora.quant import blocks_simd
from minilora.quant.blocks import BLOCK_BYTES, BlockWeight
from minilora.quant.blocks_simd import multiply_rows, order_input
from minilora.quant.kernels import kernel
from minilora.threads import available_threads
from minilora.transformer import Transformer

MOST_THREADS = 4
"""Beyond this many, products of a small model are shorter than the waits between them."""

PERIOD = 100
"""Tokens until threads together are compared with one again. Results are the same, so that nothing but time depends on it."""


class Decoder:
    """The compiled way of a single sequence, for a model that ``Decoder.fits``.

    ``keys`` and ``values`` (L, K, S, D) float32 are the sequence's, and are written to. Threads: as many as there are cores,
    or ``threads``, and one while that is faster, as where other processes want the cores too; ``close`` ends them.
    """

    def __init__(self, model: Transformer, keys: Array, values: Array, threads: int | None = None):
        self.model, self.keys, self.values = model, keys, values
        self.threads = min(threads or available_threads(), MOST_THREADS) if barrier.available else 1
        self._adapters: list[Array] = []  # whose addresses are in the tables
        self._table = np.array([[self._entry(linear) for _, _, linear in block.linears()] for block in model.blocks], np.int64)
        self._head = np.array([self._entry(model.head)], np.int64)
        norms = [norm.weight.data for block in model.blocks for norm in (block.input_norm, block.post_norm)]
        self._norms = np.array([*norms, model.norm.weight.data])  # (2L + 1, C)
        c = model.config
        self._shared = np.empty((7, max(c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)), np.float32)
        self._sync = np.zeros(2, np.int64)
        self._steps, self._seconds, self._faster = 0, {True: 0.0, False: 0.0}, True
        self._pool = ThreadPoolExecutor(self.threads - 1, "minilora-decode") if self.threads > 1 else None

    @staticmethod
    def fits(model: Transformer) -> bool:
        """Whether all matrices are GGUF blocks, perhaps with LoRA or QA-LoRA, the MLP is SwiGLU, and the processor has AVX2."""
        return (
            blocks_simd.available()
            and barrier.available
            and model.embedding.weight.dtype == np.float32
            and all(_fits(linear) for _, linear in model.linears())
            and all(block.mlp.gate_proj is not None for block in model.blocks)
        )

    def _entry(self, linear: Any) -> tuple[int, ...]:
        """A row of the tables: where the blocks lie, bytes of a block, rows; rank, group, where A and scaling·B lie."""
        base = linear.base if isinstance(linear, LoraLinear) else linear
        found = (base.weight.blocks.ctypes.data, BLOCK_BYTES[base.weight.quant_type], base.shape[0])
        if base is linear:
            return (*found, 0, 1, 0, 0)
        a, b = (np.ascontiguousarray(m, np.float32) for m in (linear.lora_A.data, linear.lora_B.data * linear.scaling))
        self._adapters += [a, b]
        return (*found, len(a), linear.pool, a.ctypes.data, b.ctypes.data)

    def step(self, token: int, position: int) -> Array:
        """Run a token at its position, store its keys and values, and return the next one's logits (V,)."""
        c = self.model.config
        x = np.array(self.model.embedding.forward(np.array([token]))[0][0], np.float32)  # (C,), which becomes the residual stream
        cos, sin = (table[0] for table in self.model.rope(np.array([position])))
        logits = np.empty((1, c.vocab_size), np.float32)
        arguments = (x, self._table, self._head, self._norms, np.float32(c.rms_norm_eps), cos, sin, self.keys, self.values,
                     position, c.num_attention_heads, c.intermediate_size, self._shared, logits)  # fmt: skip
        start, together = time.perf_counter(), self._together()
        threads = self.threads if together else 1
        self._sync[:] = 0
        others = []
        try:
            for thread in range(1, threads):
                if self._pool is not None:
                    others.append(self._pool.submit(decode_token, *arguments, thread, threads, self._sync))
            decode_token(*arguments, 0, threads, self._sync)
        finally:
            self._sync[1] = 1  # should this thread have been interrupted before it began, the others must not wait for it
            for other in others:
                other.result()
        if (self._steps - 1) % PERIOD:  # the first token does not count: it may also load the compiled code
            self._seconds[together] += time.perf_counter() - start
        return logits[0]

    def _together(self) -> bool:
        """Whether the threads share this token: of each ``PERIOD``, three that count and three of one thread decide the rest."""
        turn = self._steps % PERIOD
        self._steps += 1
        if turn == 0:
            self._seconds = {True: 0.0, False: 0.0}
        if turn == 7:
            self._faster = self._seconds[True] <= self._seconds[False]
        return turn < 4 if turn < 7 else self._faster

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _fits(linear: Any) -> bool:
    base = linear.base if isinstance(linear, LoraLinear) and linear.magnitude is None else linear
    return type(base) is Linear and isinstance(base.weight, BlockWeight)


# ---- kernels; letters of the shapes: see the functional module


@kernel
def decode_token(
    x: Array, table: Array, head: Array, norms: Array, eps: Any, cos: Array, sin: Array, keys: Array, values: Array,
    position: int, H: int, F: int, shared: Array, logits: Array, thread: int, threads: int, sync: Array,
) -> None:  # fmt: skip
    """Do one thread's part of a token: ``x`` (C,) is its embedding and is used up, ``shared`` is what threads tell each other."""
    C, K, D = x.size, keys.shape[1], keys.shape[3]
    q, k, v, y, gate, up, mixed = shared[0], shared[1], shared[2], shared[3, :C], shared[4, :F], shared[5, :F], shared[6, : H * D]
    normed = np.empty(C, np.float32)
    mine, mine_of_k, mine_of_f, phase = _share(C, thread, threads), _share(K, thread, threads), _share(F, thread, threads), 1
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
            a, b = bytes_at(weights[i, 5], 4 * rank * (x.size // group)), bytes_at(weights[i, 6], 4 * rows * rank)
            _add_adapter(a.view(np.float32), b.view(np.float32), rank, group, x, first, last, out[i])


@kernel
def _add_adapter(a: Array, b: Array, rank: int, group: int, x: Array, first: int, last: int, out: Array) -> None:
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
    q: Array, k: Array, v: Array, cos: Array, sin: Array, keys: Array, values: Array, position: int, head: int, group: int,
    out: Array,
) -> None:  # fmt: skip
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
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts, of which the first is short
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    power = (np.int32(n) + np.int32(127)) << np.int32(23)
    return p * np.int32(power).view(np.float32)
