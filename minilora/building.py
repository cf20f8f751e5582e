"""Assemble a `Transformer` from named arrays, or from random numbers; parameter names are transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minilora.config import ATTENTION_MODULES, ModelConfig
from minilora.layers import MLP, Attention, Block, Embedding, Linear, RMSNorm
from minilora.parameters import DenseWeight, Parameter, Weight
from minilora.transformer import Transformer


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by transformers' name; a tied head has none of its own."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    attention = {"q_proj": (H * D, C), "k_proj": (K * D, C), "v_proj": (K * D, C), "o_proj": (C, H * D)}
    mlp = {"gate_proj": (F, C), "up_proj": (F, C), "down_proj": (C, F)}
    if config.hidden_act != "silu":
        del mlp["gate_proj"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, C)}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        shapes[f"{prefix}.input_layernorm.weight"] = (C,)
        shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (C,)
        shapes |= {f"{prefix}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    shapes["model.norm.weight"] = (C,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, C)
    return shapes


def build_model(config: ModelConfig, arrays: Mapping[str, Any], trainable: bool = False) -> Transformer:
    """Assemble a model from arrays by transformers' names, which are used as they are and not copied.

    A `Weight` may stand in place of a matrix, such as a quantized one. A tied head reads the embedding's.
    """
    shapes = parameter_shapes(config)
    missing, extra = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"arrays: missing {missing[:3] or 'none'}, unknown {extra[:3] or 'none'} for {config}"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name}: shape {arrays[name].shape}, but the configuration asks for {shape}")

    def norm(name: str) -> RMSNorm:
        return RMSNorm(Parameter(name, arrays[name], trainable), config.rms_norm_eps)

    def weight(name: str) -> Weight:
        given = arrays[name]
        return given if hasattr(given, "matmul_t") else DenseWeight(Parameter(name, given, trainable))

    def linear(module: str) -> Any:
        name = f"{module}.weight"
        return Linear(module, weight(name)) if name in shapes else None

    embedding = Embedding("model.embed_tokens", weight("model.embed_tokens.weight"))
    blocks = []
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        attention = Attention(config, *(linear(f"{prefix}.self_attn.{name}") for name in ATTENTION_MODULES))
        mlp = MLP(*(linear(f"{prefix}.mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")))
        norms = [norm(f"{prefix}.{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")]
        blocks.append(Block(norms[0], attention, norms[1], mlp))
    head = Linear("lm_head", embedding.weight) if config.tie_word_embeddings else linear("lm_head")
    return Transformer(config, embedding, blocks, norm("model.norm.weight"), head)


def init_model(
    config: ModelConfig, rng: np.random.Generator, dtype: Any = np.float32, trainable: bool = True
) -> Transformer:
    """Return a fresh model: matrices N(0, 0.02²), norms one.

    Matrices that write to the residual stream are divided by √(2·layers), as in GPT-2.
    """
    arrays = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            arrays[name] = np.ones(shape, dtype)
            continue
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * config.num_hidden_layers) ** 0.5
        arrays[name] = (rng.standard_normal(shape) * std).astype(dtype)
    return build_model(config, arrays, trainable)
