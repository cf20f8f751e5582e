"""Hugging Face's `config.json`, read and written: shape, rotary scaling and quantization.

The keys of transformers 4 and 5 are known. A value that our architecture cannot hold is refused by its key.
"""

from __future__ import annotations

import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from minilora.config import ConfigError, ModelConfig, require
from minilora.formats.files import FileError
from minilora.transformer import Transformer

BYTE_TOKENS = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257}
"""Written for models with the vocabulary of `minilora.data.tokenizer`; other vocabularies have other ids."""

_INT32_MAX = 2**31 - 1
_ORIGINAL_LENGTH = "original_max_position_embeddings"
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_LENGTH),
}
"""`rope_type` → the settings that it needs."""


class Quantization(NamedTuple):
    """What `quantization_config` says.

    bitsandbytes has a `quant_type`. GPTQ has `bits`, a `group_size` (−1: the whole row) and a `version`.
    """

    method: str
    quant_type: str = ""
    bits: int = 0
    group_size: int = 0
    version: int = 0


# ---- writing


def settings_of(model: Transformer, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of a model, with the keys of transformers 5 and 4.

    Raises
    ------
    ConfigError
        `LlamaConfig` has no name for it: the two-matrix MLP, or unknown `rope_factors`.
    """
    config = model.config
    require(
        config.hidden_act == "silu",
        "hidden_act",
        config.hidden_act,
        "transformers' Llama has the gated MLP (silu) only; save_model writes minilora's own file",
    )
    rope = _rope_settings(config)
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if config.vocab_size == BYTE_TOKENS["vocab_size"]:
        tokens = dict(BYTE_TOKENS)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": model.tied,  # a merged head is no longer tied
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | (rope or {}),
        "dtype": dtype,
        "torch_dtype": dtype,
        **tokens,
    }


def _rope_settings(config: ModelConfig) -> dict[str, Any] | None:
    """Return `rope_scaling` for a model's factors: linear, or Llama 3's with the numbers of its releases."""
    factors = config.rope_factors
    if factors is None:
        return None
    if len(set(factors)) == 1:
        return {"rope_type": "linear", "factor": factors[0]}
    found = {
        "rope_type": "llama3",
        "factor": round(max(factors), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        _ORIGINAL_LENGTH: 8192,
    }
    expected = _llama3_factors(found, config.rope_theta, config.head_dim)
    if not np.allclose(expected, factors, rtol=1e-6, atol=0):  # those of a GGUF are float32
        raise ConfigError(
            f"rope_factors={reprlib.repr(factors)}: config.json has no name for them; save_model and "
            "save_gguf keep them"
        )
    return found


def _llama3_factors(rope: dict[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """Return Llama 3.1's divisors of the rotary speeds, one per pair.

    With L the original context length: `factor` for wavelengths above L/low_freq_factor, 1 for wavelengths
    below L/high_freq_factor, and a mixture between them.
    """
    speeds = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope[_ORIGINAL_LENGTH] * speeds / (2 * np.pi)  # turns of each pair over the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)  # share of a pair's speed that is kept
    return tuple((1 / ((1 - kept) / rope["factor"] + kept)).tolist())


# ---- reading


def _refuse(where: Path, field: str, value: Any, allowed: str) -> NoReturn:
    raise FileError(f"{where}: {field}={reprlib.repr(value)}, {allowed}")


def _one_of(where: Path, field: str, value: Any, *allowed: Any) -> Any:
    """Return the value if it equals an allowed one in type too: True is not 1."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        _refuse(where, field, value, f"can be {' or '.join(repr(a) for a in allowed if a is not None)} only")
    return value


def _whole(where: Path, field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _INT32_MAX:
        _refuse(where, field, value, f"must be a whole number from 1 to {_INT32_MAX}")
    return value


def _number(where: Path, field: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e30:
        _refuse(where, field, value, "must be a number from 0 to 1e30")
    return float(value)


def read_config(settings: dict[str, Any], where: Path) -> ModelConfig:
    """Return the architecture; missing keys have `LlamaConfig`'s defaults.

    Raises
    ------
    FileError
        A key has a value that our architecture cannot hold; the message names both.
    """
    get = settings.get
    _one_of(where, "model_type", get("model_type"), "llama")
    _one_of(where, "hidden_act", get("hidden_act", "silu"), "silu")
    for field in ("attention_bias", "mlp_bias"):
        _one_of(where, field, get(field), False, None)
    _one_of(where, "partial_rotary_factor", get("partial_rotary_factor"), 1.0, None)
    _one_of(where, "rope_interleaved", get("rope_interleaved"), False, None)
    heads, kv = get("num_attention_heads"), get("num_key_value_heads")
    theta = _rope_theta(settings, where)
    try:
        config = ModelConfig(
            vocab_size=_whole(where, "vocab_size", get("vocab_size")),
            hidden_size=_whole(where, "hidden_size", get("hidden_size")),
            intermediate_size=_whole(where, "intermediate_size", get("intermediate_size")),
            num_hidden_layers=_whole(where, "num_hidden_layers", get("num_hidden_layers")),
            num_attention_heads=_whole(where, "num_attention_heads", heads),
            num_key_value_heads=_whole(where, "num_key_value_heads", heads if kv is None else kv),
            context_length=_whole(where, "max_position_embeddings", get("max_position_embeddings")),
            rope_theta=theta,
            rms_norm_eps=_number(where, "rms_norm_eps", get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=_one_of(
                where, "tie_word_embeddings", get("tie_word_embeddings", False), True, False
            ),
        )
        config = replace(config, rope_factors=_rope_factors(settings, theta, config.head_dim, where))
    except ConfigError as error:
        raise FileError(f"{where}: {error}") from None
    _one_of(where, "head_dim", get("head_dim"), config.head_dim, None)  # hidden_size / num_attention_heads
    return config


def _rope_theta(settings: dict[str, Any], where: Path) -> float:
    """Return the base of the rotary angles, which version 5 of transformers has in `rope_parameters`."""
    thetas = {"rope_theta": settings.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        thetas[f"{key}.rope_theta"] = _object(settings, key, where).get("rope_theta")
    given = {key: _number(where, key, value) for key, value in thetas.items() if value is not None}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{key}={value:g}" for key, value in given.items())
        raise FileError(f"{where}: {said} contradict one another: keep one of them")
    return next(iter(given.values()), 10000.0)


def _object(settings: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        _refuse(where, key, value, "must be an object")
    return value or {}


def _rope_factors(
    settings: dict[str, Any], theta: float, head_dim: int, where: Path
) -> tuple[float, ...] | None:
    """Return the divisors of the rotary speeds from `rope_parameters` or `rope_scaling`, or None."""
    found: dict[str, tuple[float, ...] | None] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = dict(_object(settings, key, where))
        rope.pop("rope_theta", None)
        kinds = [rope.pop(field) for field in ("rope_type", "type") if field in rope]
        for kind in kinds:
            _one_of(where, f"{key}.rope_type", kind, "default", "linear", "llama3")
        if len(set(kinds)) > 1:
            raise FileError(
                f"{where}: {key}.rope_type={kinds[0]!r}, {key}.type={kinds[1]!r} contradict one another"
            )
        kind = kinds[0] if kinds else "default"
        _one_of(where, f"{key}.partial_rotary_factor", rope.pop("partial_rotary_factor", None), 1.0, None)
        fields = _ROPE_FIELDS[kind]
        extra = sorted(rope.keys() - set(fields) - {_ORIGINAL_LENGTH})
        if extra:
            _refuse(where, f"{key}.{extra[0]}", rope[extra[0]], f"is no setting of rope_type={kind!r}")
        numbers = {field: _number(where, f"{key}.{field}", rope.get(field)) for field in fields}
        for field, value in numbers.items():
            if value == 0:
                _refuse(where, f"{key}.{field}", rope[field], "must be above 0")
        if kind == "linear":
            found[key] = (numbers["factor"],) * (head_dim // 2)
        elif kind == "llama3":
            high = numbers["high_freq_factor"]
            if high <= numbers["low_freq_factor"]:
                _refuse(
                    where,
                    f"{key}.high_freq_factor",
                    rope["high_freq_factor"],
                    "must be above low_freq_factor",
                )
            found[key] = _llama3_factors(numbers, theta, head_dim)
        elif kinds:
            found[key] = None
    if len(set(found.values())) > 1:
        raise FileError(f"{where}: rope_parameters and rope_scaling contradict one another")
    return next(iter(found.values()), None)


def read_quantization(settings: Any, where: Path) -> Quantization | None:
    """Return what `quantization_config` says, or None if there is none.

    Raises
    ------
    FileError
        A method or setting that our weights cannot hold.
    """
    if settings is None:
        return None
    if not isinstance(settings, dict):
        _refuse(where, "quantization_config", settings, "must be an object")

    def only(field: str, *allowed: Any) -> Any:
        """Return a setting if it is allowed; a missing one is the first that is."""
        return _one_of(where, f"quantization_config.{field}", settings.get(field, allowed[0]), *allowed)

    if settings.get("load_in_4bit") is True and "quant_method" not in settings:  # transformers before 4.34
        settings = settings | {"quant_method": "bitsandbytes"}
    _one_of(where, "quantization_config.quant_method", settings.get("quant_method"), "bitsandbytes", "gptq")
    if settings["quant_method"] == "bitsandbytes":
        only("load_in_4bit", None, True)
        only("load_in_8bit", False)
        only("bnb_4bit_quant_storage", "uint8", None)
        return Quantization("bitsandbytes", quant_type=only("bnb_4bit_quant_type", "fp4", "nf4"))
    only("desc_act", False)  # act-order scatters the groups
    only("dynamic", None, {})
    form = only("checkpoint_format", only("format", "gptq", "gptq_v2"), "gptq", "gptq_v2")
    bits = _one_of(where, "quantization_config.bits", settings.get("bits"), 2, 3, 4, 8)
    group_size = settings.get("group_size")
    if group_size != -1:
        group_size = _whole(where, "quantization_config.group_size", group_size)
    return Quantization("gptq", bits=bits, group_size=group_size, version=1 if form == "gptq" else 2)
