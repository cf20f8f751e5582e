"""Shapes of well-known models by short name, for the planner; nothing is downloaded."""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial
from typing import Any

from minilora.config import TINY, ConfigError, ModelConfig

_llama = partial(
    ModelConfig, vocab_size=32000, context_length=2048, rope_theta=10000.0, tie_word_embeddings=False
)
_llama3 = partial(
    ModelConfig, vocab_size=128256, context_length=8192, rope_theta=500000.0, tie_word_embeddings=False
)
_smollm2 = partial(ModelConfig, vocab_size=49152, context_length=8192, rope_theta=100000.0)


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


ARCHITECTURES: dict[str, ModelConfig] = {
    TINY: ModelConfig(),
    "smollm2-135m": _smollm2(**_shape(576, 1536, 30, 9, 3)),
    "smollm2-360m": _smollm2(**_shape(960, 2560, 32, 15, 5)),
    "smollm2-1.7b": _smollm2(**_shape(2048, 8192, 24, 32, 32), rope_theta=130000.0),
    "tinyllama-1.1b": _llama(**_shape(2048, 5632, 22, 32, 4)),
    "llama-7b": _llama(**_shape(4096, 11008, 32, 32, 32)),
    "llama-13b": _llama(**_shape(5120, 13824, 40, 40, 40)),
    "llama-33b": _llama(**_shape(6656, 17920, 60, 52, 52)),
    "llama-65b": _llama(**_shape(8192, 22016, 80, 64, 64)),
    "llama-3-8b": _llama3(**_shape(4096, 14336, 32, 32, 8)),
    "llama-3-70b": _llama3(**_shape(8192, 28672, 80, 64, 8)),
    "gpt3-175b": ModelConfig(
        vocab_size=50257,
        context_length=2048,
        hidden_act="gelu_pytorch_tanh",
        **_shape(12288, 49152, 96, 96, 96),
    ),
}
"""Name → shape.

GPT-3 (arXiv 2005.14165, table 2.1) stands for what minilora could build: the same matrices, without biases
and position table, and with one vector per norm instead of two. That leaves out 38 million parameters, 0.02
%.
"""


def architecture(name: str) -> ModelConfig:
    """Return the shape of a built-in architecture.

    Raises
    ------
    ConfigError
        The name is unknown; the message lists the known ones.

    Examples
    --------
    >>> architecture("llama-7b").intermediate_size
    11008
    """
    found = ARCHITECTURES.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), ARCHITECTURES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"model={name!r}: {hint}there are {', '.join(ARCHITECTURES)}; or give smollm2 (the installed "
            "package), a .gguf file, a Hugging Face folder, or its config.json"
        )
    return found
