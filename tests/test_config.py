"""Configuration: every bad value is refused when the object is made, with its field, its value and what would
be allowed."""

from dataclasses import FrozenInstanceError

import pytest

from minilora.composed import DataConfig
from minilora.config import (
    AFFINE_TYPES,
    ATTENTION_MODULES,
    CODEBOOK_TYPES,
    LINEAR_MODULES,
    MLP_MODULES,
    ConfigError,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    TrainConfig,
    expand_modules,
    require,
    require_in,
)

NAN, INF = float("nan"), float("inf")
BAD = [
    (ModelConfig, "vocab_size", 0),
    (ModelConfig, "hidden_size", -8),
    (ModelConfig, "hidden_size", 128.0),
    (ModelConfig, "num_hidden_layers", 0),
    (ModelConfig, "num_hidden_layers", True),
    (ModelConfig, "num_attention_heads", 3),
    (ModelConfig, "num_key_value_heads", 3),
    (ModelConfig, "num_key_value_heads", 8),
    (ModelConfig, "num_key_value_heads", 0),
    (ModelConfig, "hidden_act", "relu"),
    (ModelConfig, "rope_theta", 0),
    (ModelConfig, "rope_theta", NAN),
    (ModelConfig, "rms_norm_eps", -1e-6),
    (ModelConfig, "context_length", 0),
    (LoraConfig, "r", 0),
    (LoraConfig, "r", -4),
    (LoraConfig, "r", 2.0),
    (LoraConfig, "r", "8"),
    (LoraConfig, "lora_alpha", 0),
    (LoraConfig, "lora_alpha", NAN),
    (LoraConfig, "lora_alpha", INF),
    (LoraConfig, "lora_alpha", None),
    (LoraConfig, "lora_dropout", -0.1),
    (LoraConfig, "lora_dropout", 1.0),
    (LoraConfig, "target_modules", ()),
    (LoraConfig, "init_lora_weights", "zeros"),
    (QuantConfig, "quant_type", "nf5"),
    (QuantConfig, "quant_type", "int5"),
    (QuantConfig, "quant_type", "NF4"),
    (QuantConfig, "block_size", 65),
    (QuantConfig, "block_size", 0),
    (QuantConfig, "group_size", 0),
    (QuantConfig, "group_size", 32.0),
    (DataConfig, "task", "mnist"),
    (DataConfig, "split", "train"),
    (DataConfig, "n_eval", 0),
    (DataConfig, "max_length", 7),
    (DataConfig, "text_path", "a.txt"),
    (TrainConfig, "steps", 0),
    (TrainConfig, "batch_size", 0),
    (TrainConfig, "shards", 0),
    (TrainConfig, "learning_rate", 0),
    (TrainConfig, "learning_rate", -1e-3),
    (TrainConfig, "learning_rate", NAN),
    (TrainConfig, "weight_decay", -0.1),
    (TrainConfig, "beta1", 1.0),
    (TrainConfig, "beta2", -0.1),
    (TrainConfig, "eps", 0.0),
    (TrainConfig, "momentum", 1.0),
    (TrainConfig, "optimizer", "adam"),
    (TrainConfig, "schedule", "linear"),
    (TrainConfig, "warmup_steps", -1),
    (TrainConfig, "max_grad_norm", 0.0),
    (TrainConfig, "lora_plus_ratio", 0.0),
    (TrainConfig, "eval_every", -1),
    (TrainConfig, "checkpoint_every", 1.5),
    (TrainConfig, "seed", -1),
]


@pytest.mark.parametrize("cls, field, value", BAD, ids=[f"{c.__name__}.{f}={v}" for c, f, v in BAD])
def test_bad_value_is_refused_by_name(cls, field, value):
    with pytest.raises(ConfigError) as caught:
        cls(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}={value!r}: "), message
    assert isinstance(caught.value, ValueError)
    assert len(message) > len(f"{field}={value!r}: ") + 5  # and says what is allowed


def test_odd_head_dimension_is_refused():
    with pytest.raises(ConfigError, match="hidden_size=20.*= 5 must be even"):
        ModelConfig(hidden_size=20, num_attention_heads=4)


@pytest.mark.parametrize("cls", [ModelConfig, LoraConfig, QuantConfig, TrainConfig])
def test_defaults_are_valid_frozen_and_hashable(cls):
    config = cls()
    assert config == cls() and hash(config) == hash(cls())
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    "r, alpha, rslora, expected",
    [
        (8, 16, False, 2.0),
        (64, 16, False, 0.25),
        (16, 8, True, 2.0),
        (1, 3, False, 3.0),
        (1, 3, True, 3.0),
        (4, 0.5, False, 0.125),
    ],
)
def test_scaling_divides_alpha_by_r_or_its_root(r, alpha, rslora, expected):
    assert LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora).scaling == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("all-linear", LINEAR_MODULES),
        ("attention", ATTENTION_MODULES),
        ("mlp", MLP_MODULES),
        ("q_proj", ("q_proj",)),
        (" q_proj , v_proj,", ("q_proj", "v_proj")),
    ],
)
def test_short_names_of_modules(text, expected):
    assert expand_modules(text) == expected
    assert LoraConfig(target_modules=text).target_modules == expected


def test_empty_text_of_modules_is_refused():
    with pytest.raises(ConfigError, match="target_modules"):
        LoraConfig(target_modules=" , ")


@pytest.mark.parametrize(
    "quant_type, bits, affine",
    [
        ("nf2", 2, False),
        ("nf3", 3, False),
        ("nf4", 4, False),
        ("nf8", 8, False),
        ("fp4", 4, False),
        ("int2", 2, True),
        ("int3", 3, True),
        ("int4", 4, True),
        ("int8", 8, True),
    ],
)
def test_bits_and_kind_of_each_type(quant_type, bits, affine):
    config = QuantConfig(quant_type)
    assert (config.bits, config.affine) == (bits, affine)
    assert (quant_type in AFFINE_TYPES) is affine and (quant_type in CODEBOOK_TYPES) is not affine


def test_require_says_field_value_and_what_is_allowed():
    require(True, "r", 1, "anything")
    require_in("a", ("a", "b"), "letter")
    with pytest.raises(ConfigError, match="^letter='c': choose one of a, b$"):
        require_in("c", ("a", "b"), "letter")


def test_head_dim_is_width_over_heads():
    assert ModelConfig(hidden_size=96, num_attention_heads=4).head_dim == 24
