"""How generation shares its work: pieces for threads, rows of one product, the compiled decoder.

None of this changes what is generated, up to rounding, and the number of threads does not change a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.decoding.kv_cache import KVCache
from minilora.kernels import is_plain
from minilora.parameters import Array
from minilora.threads import Workers
from minilora.transformer import Transformer

if TYPE_CHECKING:
    from minilora.decoding.token_decoder import Decoder

Decode = Callable[[Transformer, Array, Array, KVCache], Array]

PREFILL_POSITIONS = 512
"""Positions of a prompt that run at once; scores and hidden layers of a longer one would need much memory."""

WIDE_HIDDEN_SIZE = 256
"""Hidden size of a model whose weights do not fit into the processor's cache."""

FEWEST_TOKENS, MOST_TOKENS = 32, 128
"""Of a piece of a prompt: shorter ones would spend their time on decoding the weights, each for itself."""

FEWEST_SEQUENCES, MOST_SEQUENCES = 4, 32
"""Of a piece of a batch: its sequences share the decoding of each quantization block."""


def is_wide(model: Transformer) -> bool:
    """Return whether sequences are rows of one product, which reads each weight once.

    In a smaller model each sequence is a product of its own: batching them would change the last bits of
    committed results.
    """
    return model.config.hidden_size >= WIDE_HIDDEN_SIZE


def token_pieces(model: Transformer, tokens: int) -> list[slice]:
    """Return the pieces of a prompt that threads run side by side."""
    return cut(tokens, FEWEST_TOKENS, MOST_TOKENS) if is_wide(model) else [slice(None)]


def sequence_pieces(model: Transformer, sequences: int) -> list[slice]:
    """Return the pieces of a batch that threads run side by side."""
    return cut(sequences, FEWEST_SEQUENCES, MOST_SEQUENCES) if is_wide(model) else [slice(None)]


def cut(count: int, fewest: int, most: int) -> list[slice]:
    """Cut `count` tokens or sequences into two pieces, if each has at least `fewest`.

    Where one would have more than `most` there are more. The number of threads does not count: the last bits
    of a product of few rows depend on how many there are.

    >>> cut(7, 4, 32), cut(10, 4, 32)
    ([slice(0, 7, None)], [slice(0, 5, None), slice(5, 10, None)])
    """
    pieces = max(min(2, count // fewest), -(-count // most))
    return [slice(first, end) for first, end in pairwise(count * i // pieces for i in range(pieces + 1))]


class NextLogits:
    """Decode a token of each sequence, by the compiled decoder where one sequence is left and it can.

    Parameters
    ----------
    model : Transformer
        Decodes the tokens and has the head.
    kv_cache : KVCache
        Filled with the prompts; sequences that end are dropped from it by the caller.
    workers : Workers
        Run pieces of the batch side by side.
    decode : callable
        `generation.decode`: (model, tokens, positions, kv_cache) → hidden states (B, C).
    """

    def __init__(self, model: Transformer, kv_cache: KVCache, workers: Workers, decode: Decode):
        self.model, self.kv_cache, self.workers, self.decode = model, kv_cache, workers, decode
        self._decoder: Decoder | None = None
        self._may_compile = not is_plain()

    def __call__(self, tokens: Array, positions: Array) -> Array:
        """Return logits (B, V) after one token (B,) of each sequence, at its position (B,)."""
        if len(tokens) == 1 and self._may_compile:
            self._decoder, self._may_compile = self._compiled(), False
        if self._decoder is not None:
            return self._decoder.step(int(tokens[0]), int(positions[0]))[None]

        def logits(rows: slice) -> Array:
            hidden = self.decode(self.model, tokens[rows], positions[rows], self.kv_cache.part(rows))
            return self.model.head.forward(hidden)[0]

        return np.concatenate(self.workers.map(logits, sequence_pieces(self.model, len(tokens))))

    def _compiled(self) -> Decoder | None:
        """Return a decoder that goes on from a copy of the cache's one sequence, if the model fits."""
        from minilora.decoding.token_decoder import Decoder

        if not Decoder.fits(self.model):
            return None
        cache = self.kv_cache
        keys, values = (np.ascontiguousarray(stored[:, 0]) for stored in (cache.keys, cache.values))
        return Decoder(self.model, keys, values, self.workers.threads)

    def __enter__(self) -> NextLogits:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._decoder is not None:
            self._decoder.close()
