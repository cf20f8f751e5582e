"""One token of one sequence through a model of GGUF blocks, in one compiled function run by all threads.

From Python a token takes some two thousand small operations, which cost more than the products themselves.
Here each thread computes its own rows of every product and its own heads of attention. All threads meet at a
barrier before anybody reads what others wrote. A row is computed in the same way whoever does it, so results
are the same bytes for any number of threads.

The plain path is `generation.decode`, which this must equal up to rounding. It does everything else: several
sequences, other weights, DoRA, processors without AVX2.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from minilora.kernels import is_plain, load
from minilora.layers import Linear
from minilora.lora import LoraLinear
from minilora.parameters import Array
from minilora.quant.blocks import BLOCK_BYTES, BlockWeight
from minilora.threads import available_threads
from minilora.transformer import Transformer

MAX_THREADS = 4
"""Beyond this many, products of a small model are shorter than the waits between them."""

TRIAL_PERIOD = 100
"""Tokens between two trials of all threads against one. Results are the same; only time depends on it."""


class Decoder:
    """The compiled way of a single sequence, for a model that `Decoder.fits`.

    A second thread helps on idle cores and hinders on busy ones. So `step` tries both now and then, and keeps
    the faster.

    Parameters
    ----------
    model : Transformer
        A model for which `Decoder.fits` is true.
    keys, values : Array
        What the prompt stored, (L, K, S, D) float32. New positions are written to them.
    threads : int, optional
        Default: one per core, at most `MAX_THREADS`. `close` ends them.
    """

    def __init__(self, model: Transformer, keys: Array, values: Array, threads: int | None = None):
        self.model, self.keys, self.values = model, keys, values
        self.threads = min(threads or available_threads(), MAX_THREADS)
        self._adapters: list[Array] = []  # keeps alive what the tables point to
        self._table = np.array(
            [[self._entry(linear) for _, _, linear in block.linears()] for block in model.blocks], np.int64
        )
        self._head = np.array([self._entry(model.head)], np.int64)
        norms = [norm.weight.data for block in model.blocks for norm in (block.input_norm, block.post_norm)]
        self._norms = np.array([*norms, model.norm.weight.data])  # (2L + 1, C)
        c = model.config
        widest = max(c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)
        self._shared = np.empty((7, widest), np.float32)
        self._sync = np.zeros(2, np.int64)
        self._steps, self._seconds, self._faster = 0, {True: 0.0, False: 0.0}, True
        self._pool = ThreadPoolExecutor(self.threads - 1, "minilora-decode") if self.threads > 1 else None

    @staticmethod
    def fits(model: Transformer) -> bool:
        """Return whether a model can be decoded here.

        All matrices must be GGUF blocks, perhaps with LoRA or QA-LoRA, the MLP SwiGLU, and the processor have
        AVX2.
        """
        if is_plain() or not (load("block_vectors").available() and load("barrier").available):
            return False
        return (
            model.embedding.weight.dtype == np.float32
            and all(_fits(linear) for _, linear in model.linears())
            and all(block.mlp.gate_proj is not None for block in model.blocks)
        )

    def _entry(self, linear: Any) -> tuple[int, ...]:
        """Return (address of blocks, bytes per block, rows, r, group, addresses of A and s·B) of a linear."""
        base: Any = linear.base
        found = (base.weight.blocks.ctypes.data, BLOCK_BYTES[base.weight.quant_type], base.shape[0])
        if base is linear:
            return (*found, 0, 1, 0, 0)
        a, b = (
            np.ascontiguousarray(m, np.float32)
            for m in (linear.lora_A.data, linear.lora_B.data * linear.scaling)
        )
        self._adapters += [a, b]
        return (*found, len(a), linear.pool, a.ctypes.data, b.ctypes.data)

    def step(self, token: int, position: int) -> Array:
        """Run a token at its position, store its keys and values, and return the next token's logits (V,)."""
        c = self.model.config
        # (C,): becomes the residual stream
        x = np.array(self.model.embedding.forward(np.array([token]))[0][0], np.float32)
        cos, sin = (table[0] for table in self.model.rope(np.array([position])))
        logits = np.empty((1, c.vocab_size), np.float32)
        arguments: Any = (
            x,
            self._table,
            self._head,
            self._norms,
            c.rms_norm_eps,
            cos,
            sin,
            self.keys,
            self.values,
            position,
            c.num_attention_heads,
            c.intermediate_size,
            self._shared,
            logits,
        )
        decode_token: Any = load("decode").decode_token
        began, together = time.perf_counter(), self._together()
        threads = self.threads if together else 1
        self._sync[:] = 0
        others = []
        try:
            for thread in range(1, threads):
                if self._pool is not None:
                    submit: Any = self._pool.submit
                    others.append(submit(decode_token, *arguments, thread, threads, self._sync))
            decode_token(*arguments, 0, threads, self._sync)
        finally:
            # if this thread was interrupted before it began, the others must not wait for it
            self._sync[1] = 1
            for other in others:
                other.result()
        if (self._steps - 1) % TRIAL_PERIOD:  # the first token does not count: it may load the compiled code
            self._seconds[together] += time.perf_counter() - began
        return logits[0]

    def _together(self) -> bool:
        """Return whether the threads share this token.

        In each `TRIAL_PERIOD`, three timed tokens of all threads and three of one decide how the rest are
        run.
        """
        turn = self._steps % TRIAL_PERIOD
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
    """Return whether a linear, perhaps adapted by LoRA or QA-LoRA, stores GGUF blocks."""
    known = type(linear) in (Linear, LoraLinear) and type(linear.base) is Linear
    return known and isinstance(linear.base.weight, BlockWeight)
