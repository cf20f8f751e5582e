"""What generation accepts: checks of prompts and stop tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from minilora.config import ModelConfig
from minilora.decoding.sampling import Sampling, check_sampling


def check_request(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: int | Collection[int] | None,
    sampling: Sampling,
) -> frozenset[int]:
    """Return the tokens that end a text; raise ValueError for anything that cannot be."""
    check_prompts(config, prompts, max_new_tokens)
    check_sampling(**sampling)
    return stop_tokens(eos)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError unless each prompt has tokens of the vocabulary and leaves room for another."""
    limit, vocabulary = config.context_length, config.vocab_size
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("prompts: each must hold at least one token; start an empty one with BOS")
    longest = max(map(len, prompts))
    if longest >= limit:
        raise ValueError(
            f"prompts: {longest} tokens leave no room in context_length={limit}: shorten the prompt by "
            f"{longest - limit + 1} or more"
        )
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"prompts: token {low if low < 0 else high} outside the vocabulary 0…{vocabulary - 1}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")


def stop_tokens(eos: int | Collection[int] | None) -> frozenset[int]:
    """Return the tokens that end a text; raises ValueError for what is no token."""
    if eos is None:
        return frozenset()
    stops = eos if isinstance(eos, Collection) else [eos]
    for token in stops:
        if not isinstance(token, int | np.integer):
            raise ValueError(f"eos={eos!r}: must be a token's number or several, as the tokenizer gives them")
    return frozenset(map(int, stops))
