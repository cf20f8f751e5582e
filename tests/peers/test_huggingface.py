"""Live against transformers and bitsandbytes: they open our model folders, we open theirs, and the logits
agree."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_golden import random_arrays, random_batch, torch_model

from minilora.building import build_model
from minilora.config import ModelConfig
from minilora.formats.huggingface import load_huggingface, save_huggingface
from minilora.layers import Linear
from minilora.parameters import DenseWeight
from minilora.quant.weights import CodebookWeight, DoubleQuant

pytestmark = pytest.mark.peers
CONFIGS = {
    "gqa": ModelConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        context_length=32,
        tie_word_embeddings=False,
    ),
    "tied": ModelConfig(
        vocab_size=31,
        hidden_size=20,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        context_length=32,
        rope_theta=500.0,
    ),
    "mqa": ModelConfig(
        vocab_size=37,
        hidden_size=18,
        intermediate_size=13,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        context_length=32,
        rms_norm_eps=1e-3,
        rope_theta=1e6,
        tie_word_embeddings=False,
    ),
    "bytes": ModelConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        context_length=32,
    ),
}
# rows of whole blocks of 64: others meet the fast path of bitsandbytes' CPU kernel that assumes them
# (test_bitsandbytes)
BLOCKS = ModelConfig(
    vocab_size=41,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    context_length=32,
    tie_word_embeddings=False,
)
EPS = float(np.finfo(np.float32).eps)
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def bitsandbytes(transformers):
    """bitsandbytes, which transformers finds for itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def rounding(config, T=11):
    """As in test_transformers."""
    widest = max(config.hidden_size, config.intermediate_size, config.vocab_size, T)
    return 4 * EPS * (widest * 2 * 9 * config.num_hidden_layers) ** 0.5 + T * EPS


def ours(config, seed=0):
    return build_model(config, random_arrays(config, seed))


def ids_of(config):
    return random_batch(config, 0)[0]


def logits_of(torch, model, ids):
    """Logits as in training, where bitsandbytes keeps float32: evaluating, it multiplies in bfloat16 where
    the processor can."""
    with torch.no_grad():
        return model.train()(input_ids=torch.from_numpy(ids)).logits.float().numpy()


def opened(transformers, folder, **options):
    """What AutoModelForCausalLM makes of a folder (with its loading report, if asked for)."""
    options = {"attn_implementation": "eager", "local_files_only": True} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


# --- ours, opened by transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 3000])
@every_config
def test_transformers_opens_our_folders(torch, transformers, tmp_path, name, max_shard_bytes):
    config = CONFIGS[name]
    model = ours(config)
    save_huggingface(model, tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, info = opened(transformers, tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    for p in model.parameters():
        assert state[p.name].tobytes() == p.data.tobytes(), p.name
    assert_close(
        model.logits(ids_of(config)), logits_of(torch, theirs, ids_of(config)), rounding(config), name
    )
    found = theirs.config
    assert (
        found.rope_parameters["rope_theta"] == config.rope_theta
        and found.max_position_embeddings == config.context_length
    )
    assert (
        found.tie_word_embeddings == config.tie_word_embeddings and found.rms_norm_eps == config.rms_norm_eps
    )
    specials = (256, 257) if name == "bytes" else (None, None)
    assert (found.bos_token_id, found.eos_token_id) == specials and theirs.dtype == torch.float32


def test_transformers_opens_our_float16_as_float16(torch, transformers, tmp_path):
    model = ours(CONFIGS["gqa"])
    save_huggingface(model, tmp_path, np.float16)
    theirs = opened(transformers, tmp_path)
    assert theirs.dtype == torch.float16
    for p in model.parameters():
        assert np.array_equal(theirs.state_dict()[p.name].numpy(), p.data.astype(np.float16)), p.name


def test_what_transformers_saves_of_our_folder_is_our_folder_again(torch, transformers, tmp_path):
    model = ours(CONFIGS["tied"])
    save_huggingface(model, tmp_path / "a")
    opened(transformers, tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="3KB")
    found = load_huggingface(tmp_path / "b")
    assert found.config == model.config
    assert {p.name: p.data.tobytes() for p in found.parameters()} == {
        p.name: p.data.tobytes() for p in model.parameters()
    }


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20000])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_transformers_and_bitsandbytes_open_our_4_bit_folders(
    torch, transformers, bitsandbytes, tmp_path, quant_type, double_quant, max_shard_bytes
):
    dense = ours(BLOCKS)
    model = dense.map_linears(
        lambda linear: (
            linear
            if linear is dense.head
            else Linear(
                linear.name, CodebookWeight.quantize(linear.weight.dense(), quant_type, 64, double_quant)
            )
        )
    )
    save_huggingface(model, tmp_path, max_shard_bytes=max_shard_bytes)
    theirs = opened(transformers, tmp_path)
    modules = dict(theirs.named_modules())
    for linear_name, linear in model.linears():
        module = modules[linear_name]
        if isinstance(linear.weight, DenseWeight):
            assert type(module) is torch.nn.Linear, linear_name
            continue
        assert isinstance(module, bitsandbytes.nn.Linear4bit), linear_name
        assert module.weight.data.numpy().tobytes() == linear.weight.codes.tobytes(), linear_name
        decoded = bitsandbytes.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        ).numpy()
        # one product, and with double quantization a sum before it
        assert_close(linear.weight.dense(), decoded, 4 * EPS if double_quant else 0.0, linear_name)
    assert_close(
        model.logits(ids_of(BLOCKS)), logits_of(torch, theirs, ids_of(BLOCKS)), rounding(BLOCKS), quant_type
    )


# --- theirs, opened by us -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["50GB", "3KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@every_config
def test_we_open_folders_of_transformers(torch, transformers, tmp_path, name, dtype, max_shard_size):
    config = CONFIGS[name]
    theirs = torch_model(config, random_arrays(config, 1)).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_size == "3KB")
    model = load_huggingface(tmp_path)
    assert replace(model.config, context_length=config.context_length) == config
    state = {key: value.float().numpy() for key, value in theirs.state_dict().items()}
    for p in model.parameters():
        assert p.data.dtype == np.float32 and p.data.tobytes() == state[p.name].tobytes(), p.name
    # opened anew: .to(bfloat16) has also rounded the angles of the rotary positions, which from_pretrained
    # keeps in float32
    again = opened(transformers, tmp_path, dtype=torch.float32)
    assert_close(
        model.logits(ids_of(config)), logits_of(torch, again, ids_of(config)), rounding(config), name
    )


def test_a_head_that_transformers_was_told_to_store_is_equal_to_the_embedding(torch, transformers, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = torch_model(CONFIGS["tied"], random_arrays(CONFIGS["tied"], 1))
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_huggingface(tmp_path)
    assert model.tied and np.array_equal(
        model.embedding.weight.dense(), theirs.state_dict()["lm_head.weight"].numpy()
    )


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_open_4_bit_folders_of_transformers_and_bitsandbytes(
    torch, transformers, bitsandbytes, tmp_path, quant_type, double_quant, max_shard_size, dtype
):
    torch_model(BLOCKS, random_arrays(BLOCKS, 1)).to(getattr(torch, dtype)).save_pretrained(
        tmp_path / "dense"
    )
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    theirs = opened(transformers, tmp_path / "dense", quantization_config=settings)
    theirs.save_pretrained(tmp_path / "4bit", max_shard_size=max_shard_size)
    assert (
        json.loads((tmp_path / "4bit" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "bitsandbytes"
    )
    model = load_huggingface(tmp_path / "4bit")
    modules = dict(theirs.named_modules())
    for name, linear in model.linears():
        if isinstance(linear.weight, DenseWeight):
            assert (
                linear.weight.dense().tobytes() == modules[name].weight.detach().float().numpy().tobytes()
            ), name
            continue
        weight, state = linear.weight, modules[name].weight.quant_state
        assert (weight.quant_type, weight.block_size, weight.double_quant) == (
            quant_type,
            64,
            double_quant,
        ), name
        assert weight.codes.tobytes() == modules[name].weight.data.numpy().tobytes(), name
        if isinstance(weight.scales, DoubleQuant):
            assert weight.scales.codes.tobytes() == state.absmax.numpy().tobytes(), name
            assert weight.scales.absmax.tobytes() == state.state2.absmax.numpy().tobytes(), name
            assert weight.scales.offset.item() == state.offset.item(), name
        else:
            assert weight.scales.tobytes() == state.absmax.numpy().tobytes(), name
    if dtype == "float32":  # else they round each product to bfloat16
        assert_close(
            model.logits(ids_of(BLOCKS)),
            logits_of(torch, theirs, ids_of(BLOCKS)),
            rounding(BLOCKS),
            quant_type,
        )
