"""Generation with a key/value cache: greedy, temperature, top-k, top-p, seeded, many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Unpack

import numpy as np

from minilora.decoding import plan
from minilora.decoding.kv_cache import KVCache, cached_attention
from minilora.decoding.requests import check_request
from minilora.decoding.sampling import Sampling, sample
from minilora.functional import Array
from minilora.layers import Block
from minilora.threads import Workers, single_blas
from minilora.transformer import Transformer


class Piece(NamedTuple):
    """New tokens on their way through the blocks; x may hold the B · T rows in another order of axes."""

    x: Array  # (B, T, C), or (1, B, C)
    positions: Array  # (B, T)
    rope: tuple[Array, Array]


def prefill(model: Transformer, ids: Array, kv_cache: KVCache, workers: Workers | None = None) -> Array:
    """Run right-padded prompts (B, T) through the blocks; return hidden states (B, T, C).

    Their keys and values are stored. A long prompt runs `PREFILL_POSITIONS` at a time: the same numbers, up
    to rounding.
    """
    B, T = ids.shape
    parts = []
    for start in range(0, T, plan.PREFILL_POSITIONS):
        positions = np.arange(start, min(start + plan.PREFILL_POSITIONS, T))
        pieces = []
        for columns in plan.token_pieces(model, len(positions)):
            some = positions[columns]
            x, _ = model.embedding.forward(ids[:, some])
            pieces.append(Piece(x, np.broadcast_to(some, (B, len(some))), model.rope(some)))
        parts += run_blocks(model, pieces, kv_cache, workers or Workers(1))
    return model.norm.forward(np.concatenate(parts, axis=1))[0]


def decode(model: Transformer, tokens: Array, positions: Array, kv_cache: KVCache) -> Array:
    """Run one new token (B,) of each sequence at its own position (B,); return hidden states (B, C)."""
    B = len(tokens)
    rows = (1, B) if plan.is_wide(model) else (B, 1)
    x, _ = model.embedding.forward(tokens.reshape(rows))  # (1, B, C) or (B, 1, C)
    piece = Piece(x, positions[:, None], model.rope(positions.reshape(rows)))
    (x,) = run_blocks(model, [piece], kv_cache, Workers(1))
    return model.norm.forward(x)[0].reshape(B, -1)


def run_blocks(model: Transformer, pieces: list[Piece], kv_cache: KVCache, workers: Workers) -> list[Array]:
    """Run pieces of the same sequences through all blocks; return x of each.

    In each block all pieces store their keys and values before any of them attends.
    """
    for i, block in enumerate(model.blocks):
        keys, values = kv_cache.keys[i], kv_cache.values[i]
        queries = workers.map(partial(_store, block, keys, values), pieces)
        jobs = list(zip(pieces, queries, strict=True))
        pieces = workers.map(partial(_attend, block, keys, values), jobs)
    return [piece.x for piece in pieces]


def _store(block: Block, keys: Array, values: Array, piece: Piece) -> Array:
    """Store a piece's keys and values; return its queries (B, T, H, D)."""
    B, T = piece.positions.shape
    q, k, v, _ = block.attention.project(block.input_norm.forward(piece.x)[0], piece.rope)
    rows = np.arange(B)[:, None]
    keys[rows, :, piece.positions] = k.reshape(B, T, *k.shape[2:])
    values[rows, :, piece.positions] = v.reshape(B, T, *v.shape[2:])
    return q.reshape(B, T, *q.shape[2:])


def _attend(block: Block, keys: Array, values: Array, job: tuple[Piece, Array]) -> Piece:
    """Finish the block for a piece, from its queries and all that is stored up to its end."""
    (x, positions, rope), q = job
    seen = int(positions.max()) + 1
    mixed = cached_attention(q, keys[:, :, :seen], values[:, :, :seen], positions)  # (B, T, H, D)
    x = x + block.attention.o_proj.forward(mixed.reshape(*x.shape[:2], -1))[0]
    return Piece(x + block.mlp.forward(block.post_norm.forward(x)[0])[0], positions, rope)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos: int | Collection[int] | None = None,
    threads: int | None = None,
    **sampling: Unpack[Sampling],
) -> list[list[int]]:
    """Continue each prompt; return the new tokens only, without the one of `eos` that ended them.

    A text also ends after `max_new_tokens`, or when the context is full. Greedy results do not depend, up to
    rounding, on which other prompts share the call.

    Parameters
    ----------
    eos : int or collection of int, optional
        Tokens that end a text.
    threads : int, optional
        By default one for each core; any number gives the same bytes.
    **sampling
        `rng`, `temperature`, `top_k` and `top_p` of `sample`; the default is greedy.

    Raises
    ------
    ValueError
        For an empty or too long prompt, and for settings that cannot be.
    """
    stops = check_request(model.config, prompts, max_new_tokens, eos, sampling)
    choose = partial(sample, **sampling)
    results: list[list[int]] = [[] for _ in prompts]
    with single_blas():
        for made in _decoded(model, prompts, max_new_tokens, choose, stops, threads):
            for sequence, token in made:
                results[sequence].append(token)
    return results


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    eos: int | Collection[int] | None = None,
    threads: int | None = None,
    **sampling: Unpack[Sampling],
) -> Iterator[int]:
    """Continue one prompt as `generate` does, and yield each token as soon as it is made.

    Bad input is refused at once.
    """
    stops = check_request(model.config, [prompt], max_new_tokens, eos, sampling)
    steps = _decoded(model, [prompt], max_new_tokens, partial(sample, **sampling), stops, threads)

    def tokens() -> Iterator[int]:
        while True:
            with single_blas():  # only while a token is made: between two, BLAS is the caller's
                made = next(steps, None)
            if not made:
                return
            yield made[0][1]

    return tokens()


def _decoded(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Callable[[Array], Array],
    stops: frozenset[int],
    threads: int | None,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, the new (prompt's number, token) of all sequences that go on."""
    lengths = np.array([len(p) for p in prompts])
    room = min(model.config.context_length, int(lengths.max()) + max_new_tokens)
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    kv_cache = KVCache(model, len(prompts), room)
    alive, positions = np.arange(len(prompts)), lengths.copy()
    with Workers(threads) as workers, plan.NextLogits(model, kv_cache, workers, decode) as next_logits:
        hidden = prefill(model, ids, kv_cache, workers)[alive, lengths - 1]  # (B, C): each prompt's last
        logits = model.head.forward(hidden)[0]
        for count in range(1, max_new_tokens + 1):
            tokens = choose(logits)
            new = [i for i, token in enumerate(tokens) if int(token) not in stops]
            yield [(int(alive[i]), int(tokens[i])) for i in new]
            going = [i for i in new if positions[i] < room]
            if not going or count == max_new_tokens:
                return
            if len(going) < len(alive):
                alive, positions, tokens = alive[going], positions[going], tokens[going]
                kv_cache.select(np.array(going))
            logits = next_logits(tokens, positions)
            positions = positions + 1
