"""Generation with a key/value cache: greedy, temperature, top-k, top-p, seeded, many prompts at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from minilora import functional as F
from minilora.decoding import Decoder
from minilora.layers import Array, Block
from minilora.threads import Workers, single_blas
from minilora.transformer import Transformer


class KVCache:
    """Keys and values of each block, (L, B, K, S, D); slot t holds position t, so shorter prompts need no
    padding on the left."""

    def __init__(self, model: Transformer, batch: int, slots: int):
        c, dtype = model.config, model.embedding.weight.dtype
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, slots, c.head_dim)
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)

    def part(self, rows: slice) -> KVCache:
        """Some of the sequences, in the same memory."""
        new = copy.copy(self)
        new.keys, new.values = self.keys[:, rows], self.values[:, rows]
        return new

    def keep(self, rows: Array) -> None:
        """Drop all sequences but ``rows``, which are in ascending order."""
        for layers in (self.keys, self.values):
            for layer in layers:
                layer[: len(rows)] = layer[rows]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]


WIDE = 256
"""Hidden size from which tokens are divided among threads, and sequences are rows of one product, which reads
each weight once. In a smaller model, whose weights are in the cache anyway, each sequence is a product of its
own; the other way would change last bits of the results that we keep."""


def cut(count: int, least: int, most: int) -> list[slice]:
    """Pieces of ``count`` tokens or sequences: two if each has ``least`` at least, and more if one would have
    more than ``most``.

    The number of threads does not count: where rows are few, the last bits of a product depend on how many
    there are.

    >>> cut(7, 4, 32), cut(10, 4, 32)
    ([slice(0, 7, None)], [slice(0, 5, None), slice(5, 10, None)])
    """
    pieces = max(min(2, count // least), -(-count // most))
    return [slice(first, end) for first, end in pairwise(count * i // pieces for i in range(pieces + 1))]


PREFILL = 512
"""Positions of a prompt that are run at once: scores and hidden layers of a long prompt would not fit
otherwise."""


def prefill(model: Transformer, ids: Array, kv_cache: KVCache, workers: Workers | None = None) -> Array:
    """Run right-padded prompts (B, T) through the blocks, store their keys and values, return hidden states
    (B, T, C).

    Long prompts run ``PREFILL`` positions at a time, which see what is stored before them: the same numbers
    up to rounding.
    """
    parts, workers = [], workers or Workers(1)
    for start in range(0, ids.shape[1], PREFILL):
        part = ids[:, start : start + PREFILL]
        parts.append(_extend(model, part, np.arange(start, start + part.shape[1]), kv_cache, workers))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _extend(model: Transformer, ids: Array, positions: Array, kv_cache: KVCache, workers: Workers) -> Array:
    """Tokens (B, T) at neighbouring positions (T,), the same for all sequences: hidden states (B, T, C).

    In each block all pieces of the text store their keys and values before any of them looks at them.
    """
    # pieces of fewer than 32 tokens would spend their time on decoding the weights, each for itself
    pieces = cut(ids.shape[1], 32, 128) if model.config.hidden_size >= WIDE else [slice(None)]
    places = [positions[piece] for piece in pieces]
    xs = [model.embedding.forward(ids[:, piece])[0] for piece in pieces]  # (B, a piece's T, C)
    ropes = [model.rope(place) for place in places]
    for i, block in enumerate(model.blocks):
        keys, values = kv_cache.keys[i], kv_cache.values[i]
        qs = workers.map(partial(_project, block, keys, values), list(zip(xs, places, ropes, strict=True)))
        xs = workers.map(partial(_finish, block, keys, values), list(zip(xs, places, qs, strict=True)))
    x = xs[0] if len(xs) == 1 else np.concatenate(xs, axis=1)
    return model.norm.forward(x)[0]


def _project(
    block: Block, keys: Array, values: Array, piece: tuple[Array, Array, tuple[Array, Array]]
) -> Array:
    """A piece's queries (B, T, H, D); its keys and values are stored."""
    x, positions, rope = piece
    q, k, v, _ = block.attention.project(block.input_norm.forward(x)[0], rope)  # (B, T, H or K, D)
    keys[:, :, positions[0] : positions[-1] + 1] = k.transpose(0, 2, 1, 3)
    values[:, :, positions[0] : positions[-1] + 1] = v.transpose(0, 2, 1, 3)
    return q


def _finish(block: Block, keys: Array, values: Array, piece: tuple[Array, Array, Array]) -> Array:
    """The block's result for a piece (B, T, C), from its queries and all that is stored up to its end."""
    x, positions, q = piece
    B, T = q.shape[:2]
    seen = positions[-1] + 1
    mixed = cached_attention(q, keys[:, :, :seen], values[:, :, :seen], np.broadcast_to(positions, (B, T)))
    x = x + block.attention.o_proj.forward(mixed.reshape(B, T, -1))[0]
    return x + block.mlp.forward(block.post_norm.forward(x)[0])[0]


def decode(model: Transformer, tokens: Array, positions: Array, kv_cache: KVCache) -> Array:
    """One new token (B,) a sequence at its own position (B,): hidden states (B, C)."""
    B = len(tokens)
    rows = np.arange(B)
    lead = (1, B) if model.config.hidden_size >= WIDE else (B, 1)
    x, _ = model.embedding.forward(tokens.reshape(lead))  # (*lead, C)
    rope = model.rope(positions.reshape(lead))  # (*lead, D/2)
    filled = int(positions.max()) + 1
    for i, block in enumerate(model.blocks):
        attention = block.attention
        q, k, v, _ = attention.project(block.input_norm.forward(x)[0], rope)  # (*lead, H or K, D)
        keys, values = kv_cache.keys[i], kv_cache.values[i]
        keys[rows, :, positions] = k.reshape(B, *k.shape[2:])
        values[rows, :, positions] = v.reshape(B, *v.shape[2:])
        q = q.reshape(B, 1, *q.shape[2:])
        mixed = cached_attention(
            q, keys[:, :, :filled], values[:, :, :filled], positions[:, None]
        )  # (B, 1, H, D)
        x = x + attention.o_proj.forward(mixed.reshape(*lead, -1))[0]
        x = x + block.mlp.forward(block.post_norm.forward(x)[0])[0]
    return model.norm.forward(x)[0].reshape(B, -1)


def cached_attention(q: Array, k: Array, v: Array, positions: Array) -> Array:
    """Attention of new queries over the stored keys up to their own positions (no gradient: for generation).

    Shapes: q (B, T, H, D), k and v (B, K, S, D) by position, positions (B, T) → (B, T, H, D).
    """
    B, T, H, D = q.shape
    K, S = k.shape[1:3]
    grouped = q.reshape(B, T, K, H // K, D).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, D)  # (B, K, T·G, D)
    scores = grouped @ k.swapaxes(-1, -2)  # (B, K, T·G, S)
    scores *= q.dtype.type(D**-0.5)
    if positions.min() < S - 1:
        later = np.arange(S) > positions[..., None]  # (B, T, S)
        np.copyto(scores.reshape(B, K, T, H // K, S), -np.inf, where=later[:, None, :, None])
    mixed = F.softmax(scores, out=scores) @ v  # (B, K, T·G, D)
    return mixed.reshape(B, K, T, H // K, D).transpose(0, 2, 1, 3, 4).reshape(B, T, H, D)


def sample(
    logits: Array,
    rng: np.random.Generator | None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Array:
    """Next tokens (B,) from logits (B, V).

    temperature 0 takes the largest (greedy) · top_k keeps the k largest · top_p keeps the smallest set of
    largest whose probability reaches p (arXiv 1904.09751), always at least one.
    """
    if temperature == 0:
        return logits.argmax(axis=-1)
    if rng is None:
        raise ValueError(
            "rng=None: sampling with temperature > 0 needs a numpy Generator, e.g. np.random.default_rng(0)"
        )
    order = np.argsort(-logits, axis=-1, kind="stable")  # (B, V), largest first
    probs = F.softmax(np.take_along_axis(logits, order, -1).astype(np.float64) / temperature)
    if top_k:
        probs[:, top_k:] = 0
    before = probs.cumsum(-1) - probs
    probs[before >= top_p * probs.sum(-1, keepdims=True)] = 0
    cumulative = (probs / probs.sum(-1, keepdims=True)).cumsum(-1)
    picked = (cumulative < rng.random((len(probs), 1))).sum(-1)  # inverse of the cumulative distribution
    last = (probs > 0).sum(-1) - 1
    return np.take_along_axis(order, np.minimum(picked, last)[:, None], -1)[:, 0]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: np.random.Generator | None = None,
    eos: int | Collection[int] | None = None,
    threads: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens only, without the one of ``eos`` that ended them.

    Stops at ``eos``, a token or several, after ``max_new_tokens``, or when the context is full. Greedy
    results do not depend on which other prompts share the call, up to rounding. ``threads``, by default one a
    core, share prompts, sequences and, of a model of GGUF blocks, a single text, with the same bytes for any
    number.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    choose = partial(sample, rng=rng, temperature=temperature, top_k=top_k, top_p=top_p)
    results: list[list[int]] = [[] for _ in prompts]
    with single_blas():
        for made in _decoded(model, prompts, max_new_tokens, choose, _stops(eos), threads):
            for sequence, token in made:
                results[sequence].append(token)
    return results


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: np.random.Generator | None = None,
    eos: int | Collection[int] | None = None,
    threads: int | None = None,
) -> Iterator[int]:
    """Continue one prompt as ``generate`` does, and yield each token as soon as it is made; bad input is
    refused at once."""
    _check(model, [prompt], max_new_tokens, temperature, top_k, top_p)
    choose = partial(sample, rng=rng, temperature=temperature, top_k=top_k, top_p=top_p)
    steps = _decoded(model, [prompt], max_new_tokens, choose, _stops(eos), threads)

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
    kv_cache, workers = KVCache(model, len(prompts), room), Workers(threads)
    alive, positions, count = np.arange(len(prompts)), lengths.copy(), 0
    decoder: Decoder | None = None
    try:
        hidden = prefill(model, ids, kv_cache, workers)[
            alive, lengths - 1
        ]  # (B, C) at each prompt's last token
        logits = model.head.forward(hidden)[0]
        while True:
            tokens = choose(logits)
            count += 1
            new = [i for i, token in enumerate(tokens) if int(token) not in stops]
            yield [(int(alive[i]), int(tokens[i])) for i in new]
            going = [i for i in new if count < max_new_tokens and positions[i] < room]
            if not going:
                return
            if len(going) < len(alive):
                alive, positions, tokens = alive[going], positions[going], tokens[going]
                kv_cache.keep(np.array(going))
            if len(alive) == 1 and decoder is None and Decoder.fits(model):
                keys, values = (
                    np.ascontiguousarray(stored[:, 0]) for stored in (kv_cache.keys, kv_cache.values)
                )
                decoder = Decoder(model, keys, values, threads)
            if decoder is not None:
                logits = decoder.step(int(tokens[0]), int(positions[0]))[None]
            else:
                # four sequences share the decoding of a block
                pieces = cut(len(alive), 4, 32) if model.config.hidden_size >= WIDE else [slice(None)]
                parts = [(tokens[rows], positions[rows], kv_cache.part(rows)) for rows in pieces]
                logits = np.concatenate(
                    workers.map(lambda part: model.head.forward(decode(model, *part))[0], parts)
                )
            positions = positions + 1
    finally:
        workers.close()
        if decoder is not None:
            decoder.close()


def _stops(eos: int | Collection[int] | None) -> frozenset[int]:
    stops = [] if eos is None else list(eos) if isinstance(eos, Collection) else [eos]
    for token in stops:
        if not isinstance(token, int | np.integer):
            raise ValueError(f"eos={eos!r}: must be a token's number or several, as the tokenizer gives them")
    return frozenset(map(int, stops))


def _check(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    limit = model.config.context_length
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("prompts: each must hold at least one token; start an empty one with BOS")
    if max(map(len, prompts)) >= limit:
        longest = max(map(len, prompts))
        raise ValueError(
            f"prompts: {longest} tokens leave no room in context_length={limit}: shorten the prompt by "
            f"{longest - limit + 1} or more"
        )
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"prompts: token {low if low < 0 else high} outside the vocabulary 0…{model.config.vocab_size - 1}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not (temperature >= 0 and temperature < float("inf")):
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: must be 0 (off) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
