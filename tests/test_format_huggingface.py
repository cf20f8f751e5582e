"""Hugging Face folders: what is written is read back bit by bit; foreign, damaged or hostile folders are
refused by name."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from helpers import CONFIGS, GQA, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open, serialize_file
from safetensors.numpy import load_file, save_file

from minilora.config import LoraConfig, ModelConfig
from minilora.data import tokenizer
from minilora.formats.files import FileError, read_json, stored_tensors
from minilora.formats.huggingface import load_huggingface, save_huggingface
from minilora.formats.huggingface_config import BYTE_TOKENS
from minilora.injection import inject_lora
from minilora.layers import Linear
from minilora.merging import merge
from minilora.parameters import DenseWeight
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.weights import CodebookWeight
from minilora.transformer import Transformer

IDS = np.array([[1, 2, 3, 4]])
SILU = {name: config for name, config in CONFIGS.items() if config.hidden_act == "silu"}
WIDE = replace(GQA, hidden_size=64, intermediate_size=96)  # GPTQ's words of 32 bits want multiples of 32
TIED = CONFIGS["mha tied"]
UP = "model.layers.1.mlp.up_proj.weight"
fuzz = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def base(config=GQA, **kw):
    return make_model(config, dtype=np.float32, trainable=False, **kw)


def quantized(model, way, head=False):
    """Every projection of the blocks, and with ``head`` the head, is ``way`` of its dense matrix."""
    return model.map_linears(
        lambda linear: (
            linear if linear is model.head and not head else Linear(linear.name, way(linear.weight.dense()))
        )
    )


def codebook(model, *settings):
    return quantized(model, lambda w: CodebookWeight.quantize(w, *settings))


def fp4(w):
    return CodebookWeight.quantize(w, "fp4")


def whole(w):
    return AffineWeight.quantize(w, store="zero")


def affine(model, bits=4, group_size=8, head=False):
    """With whole zero points, as GPTQ has them."""
    return quantized(model, lambda w: AffineWeight.quantize(w, bits, group_size, store="zero"), head)


def same(found, model):
    """The same configuration and the same bytes, quantized or not."""
    assert found.config == model.config and found.tied == model.tied and not found.trainable()
    assert {p.name: p.data.tobytes() for p in found.parameters()} == {
        p.name: p.data.tobytes() for p in model.parameters()
    }
    for (name, a), (_, b) in zip(found.linears(), model.linears(), strict=True):
        assert type(a.weight) is type(b.weight), name
        if not isinstance(a.weight, DenseWeight):
            for field in ("shape", "quant_type", "block_size"):
                assert getattr(a.weight, field) == getattr(b.weight, field), name
            assert a.weight.codes.tobytes() == b.weight.codes.tobytes(), name
            assert a.weight.dense().tobytes() == b.weight.dense().tobytes(), name
    assert np.array_equal(found.logits(IDS), model.logits(IDS))


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path, change):
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, {"format": "pt"})


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 3000, 1])
@pytest.mark.parametrize("name", SILU)
def test_dense_models_come_back_bit_by_bit(tmp_path, name, max_shard_bytes):
    model = base(SILU[name])
    files = save_huggingface(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    assert sorted(files) == sorted((tmp_path / "m").iterdir()) and files[-1].name == "config.json"
    same(load_huggingface(tmp_path / "m"), model)


def test_float16_is_half_the_size_and_loads_as_float32(tmp_path):
    model = base()
    save_huggingface(model, tmp_path, np.float16)
    assert {a.dtype for a in load_file(tmp_path / "model.safetensors").values()} == {np.dtype(np.float16)}
    assert read_json(tmp_path / "config.json")["dtype"] == "float16"
    for p, old in zip(load_huggingface(tmp_path).parameters(), model.parameters(), strict=True):
        assert p.data.dtype == np.float32 and np.array_equal(p.data, old.data.astype(np.float16))


def test_shards_are_filled_in_order_up_to_the_limit_and_indexed(tmp_path):
    model = base()
    save_huggingface(model, tmp_path, max_shard_bytes=3000)
    index = read_json(tmp_path / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 3 and files == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    sizes = []
    for file in files:
        arrays = load_file(tmp_path / file)  # an independent reader
        assert {name for name, where in index["weight_map"].items() if where == file} == set(arrays)
        sizes.append(sum(a.nbytes for a in arrays.values()))
        with safe_open(tmp_path / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert max(sizes) <= 3000 and sum(sizes) == index["metadata"]["total_size"] == sum(
        p.data.nbytes for p in model.parameters()
    )
    assert list(index["weight_map"]) == [p.name for p in model.parameters()]


def test_saving_again_leaves_no_shards_of_before_and_no_other_file_away(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model-00001-of-00002.bin").write_text("not a shard of ours")
    model = base()
    for limit in (3000, 10**9, 6000, 3000):
        files = save_huggingface(model, tmp_path, max_shard_bytes=limit)
        assert {p.name for p in tmp_path.iterdir()} == {p.name for p in files} | {
            "README.md",
            "model-00001-of-00002.bin",
        }
        same(load_huggingface(tmp_path), model)


def test_the_configuration_says_it_for_both_versions_of_transformers(tmp_path):
    save_huggingface(base(), tmp_path)
    found = read_json(tmp_path / "config.json")
    assert found["architectures"] == ["LlamaForCausalLM"] and found["model_type"] == "llama"
    assert (
        found["rope_theta"] == found["rope_parameters"]["rope_theta"] == GQA.rope_theta
        and found["rope_scaling"] is None
    )
    assert (
        found["dtype"] == found["torch_dtype"] == "float32"
        and found["max_position_embeddings"] == GQA.context_length
    )
    assert (
        found["bos_token_id"] is None and found["eos_token_id"] is None
    )  # a vocabulary of 19 has no such tokens


def test_byte_models_name_their_specials(tmp_path):
    assert BYTE_TOKENS == {
        "vocab_size": tokenizer.VOCAB_SIZE,
        "bos_token_id": tokenizer.BOS,
        "eos_token_id": tokenizer.EOS,
    }
    save_huggingface(base(replace(GQA, vocab_size=259)), tmp_path)
    found = read_json(tmp_path / "config.json")
    assert (found["bos_token_id"], found["eos_token_id"]) == (256, 257)


def test_a_head_that_was_merged_is_stored_untied(tmp_path):
    adapted = inject_lora(base(TIED), LoraConfig(r=2, target_modules=("lm_head",)), np.random.default_rng(0))
    adapted.head.lora_B.data += 0.5
    merged, _ = merge(adapted)
    save_huggingface(merged, tmp_path)
    assert read_json(tmp_path / "config.json")["tie_word_embeddings"] is False
    assert np.array_equal(load_huggingface(tmp_path).logits(IDS), merged.logits(IDS))


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codebooks_come_back_bit_by_bit_in_bitsandbytes_form(tmp_path, quant_type, double_quant, block_size):
    model = codebook(base(), quant_type, block_size, double_quant)
    save_huggingface(model, tmp_path, max_shard_bytes=4000)
    found = read_json(tmp_path / "config.json")["quantization_config"]
    assert found["quant_method"] == "bitsandbytes" and found["load_in_4bit"] is True
    assert found["bnb_4bit_quant_type"] == quant_type and found["bnb_4bit_use_double_quant"] is double_quant
    assert found["llm_int8_skip_modules"] == ["lm_head"]
    same(load_huggingface(tmp_path), model)


@pytest.mark.parametrize("group_size", [8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine_weights_come_back_bit_by_bit_in_gptq_form(tmp_path, bits, group_size):
    model = affine(base(WIDE), bits, group_size)
    save_huggingface(model, tmp_path, max_shard_bytes=9000)
    found = read_json(tmp_path / "config.json")["quantization_config"]
    assert (found["quant_method"], found["bits"], found["group_size"], found["desc_act"]) == (
        "gptq",
        bits,
        group_size,
        False,
    )
    again = load_huggingface(tmp_path)
    same(again, model)
    for (_, a), (_, b) in list(zip(again.linears(), model.linears(), strict=True))[:-1]:
        assert (
            np.array_equal(a.weight.zeros, b.weight.zeros)
            and a.weight.scale.tobytes() == b.weight.scale.tobytes()
        )


@pytest.mark.parametrize("fit, version, sym", [("symmetric", "gptq", True), ("minmax", "gptq_v2", False)])
def test_only_symmetric_weights_are_written_in_version_1(tmp_path, fit, version, sym):
    """GPTQModel opens version 1 of other programs only if sym is true; version 2 it opens in any case."""
    model = quantized(base(WIDE), lambda w: AffineWeight.quantize(w, 4, 32, fit, "zero"))
    save_huggingface(model, tmp_path)
    found = read_json(tmp_path / "config.json")["quantization_config"]
    assert (found["checkpoint_format"], found["sym"]) == (version, sym)
    same(load_huggingface(tmp_path), model)


def test_version_1_with_any_zero_points_is_read(tmp_path):
    model = affine(base(WIDE), group_size=32)
    save_huggingface(model, tmp_path)

    def change(
        arrays,
    ):  # zero - 1 in each of a word's eight places; no zero here is 0, or it would borrow from the next
        for name in arrays:
            if name.endswith(".qzeros"):
                arrays[name] = (arrays[name].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)

    assert min(int(linear.weight.zeros.min()) for name, linear in model.linears() if name != "lm_head") >= 1
    edit_tensors(tmp_path / "model.safetensors", change)
    edit(tmp_path / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq"))
    same(load_huggingface(tmp_path), model)


def test_heads_may_be_quantized_too(tmp_path):
    config = replace(WIDE, vocab_size=32)
    model = quantized(base(config), CodebookWeight.quantize, head=True)
    save_huggingface(model, tmp_path / "bnb")
    assert read_json(tmp_path / "bnb" / "config.json")["quantization_config"]["llm_int8_skip_modules"] == []
    same(load_huggingface(tmp_path / "bnb"), model)
    model = affine(base(config), head=True)
    save_huggingface(model, tmp_path / "gptq")
    assert read_json(tmp_path / "gptq" / "config.json")["quantization_config"]["lm_head"] is True
    same(load_huggingface(tmp_path / "gptq"), model)


# --- what cannot be written ---------------------------------------------------------------------------------


def mixed(first, second):
    """Quantize the projections one way, all up_projs another; a way is a function of the dense matrix, or
    None."""
    model = base(WIDE)

    def change(linear):
        way = second if "up" in linear.name else first
        return (
            linear if linear is model.head or way is None else Linear(linear.name, way(linear.weight.dense()))
        )

    return model.map_linears(change)


CANNOT = {
    "gelu": (
        lambda: base(CONFIGS["gelu tied"]),
        {},
        "hidden_act='gelu_pytorch_tanh': transformers' Llama has the gated MLP",
    ),
    "adapter": (
        lambda: inject_lora(base(), LoraConfig(r=2), np.random.default_rng(0)),
        {},
        "q_proj: has an adapter; merge",
    ),
    "dtype": (base, {"dtype": np.float64}, "dtype='float64': choose one of float32, float16"),
    "shard": (base, {"max_shard_bytes": 0}, "max_shard_bytes=0: must be a whole number"),
    "nf3": (lambda: codebook(base(), "nf3"), {}, "quant_type='nf3': bitsandbytes has nf4 and fp4 only"),
    "block": (lambda: codebook(base(), "nf4", 16), {}, "block_size=16: choose one of 32"),
    "offsets": (
        lambda: quantized(base(), lambda w: AffineWeight.quantize(w, 4, 4)),
        {},
        "has float offsets, but GPTQ stores whole",
    ),
    "some dense": (
        lambda: mixed(CodebookWeight.quantize, None),
        {},
        "up_proj is dense, .*q_proj is nf4, .*quantize all alike",
    ),
    "some fp4": (lambda: mixed(CodebookWeight.quantize, fp4), {}, "up_proj is fp4, .*q_proj is nf4"),
    "some int": (lambda: mixed(CodebookWeight.quantize, whole), {}, "up_proj is int4, .*q_proj is nf4"),
    "groups": (lambda: affine(base(), group_size=4), {}, "gate_proj: out=20: must be a multiple of 8"),
}


@pytest.mark.parametrize("make, options, message", CANNOT.values(), ids=CANNOT.keys())
def test_what_the_format_cannot_say_is_refused_with_the_reason(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        save_huggingface(make(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad, dtype", [(np.nan, np.float32), (np.inf, np.float32), (1e5, np.float16)])
def test_values_that_do_not_fit_the_dtype_are_refused_by_array(tmp_path, bad, dtype):
    model = base()
    model.blocks[1].mlp.up_proj.weight.param.data[0, 0] = bad
    with pytest.raises(ValueError, match=f"{UP}: holds NaN, infinity or a value beyond"):
        save_huggingface(model, tmp_path, dtype)
    assert not list(tmp_path.iterdir())


# --- tensors ------------------------------------------------------------------------------------------------


def write_types(folder, dtype, to_bytes):
    """Rewrite a folder's one file in another dtype, by safetensors' own writer."""
    from safetensors import TensorSpec

    arrays = load_file(folder / "model.safetensors")
    data = {name: np.frombuffer(to_bytes(a), np.uint8).copy() for name, a in arrays.items()}
    specs = {
        name: TensorSpec(
            dtype=dtype, shape=a.shape, data_ptr=data[name].ctypes.data, data_len=data[name].nbytes
        )
        for name, a in arrays.items()
    }
    serialize_file(specs, str(folder / "model.safetensors"), {"format": "pt"})


def test_bfloat16_is_widened_exactly(tmp_path):
    model = base()
    for p in model.parameters():
        p.data = (p.data.view(np.uint32) & 0xFFFF0000).view(np.float32)  # what bfloat16 can hold
    save_huggingface(model, tmp_path)
    write_types(
        tmp_path, "bfloat16", lambda a: b"".join(struct.pack("<f", x)[2:] for x in a.reshape(-1).tolist())
    )
    assert {t.dtype for t in stored_tensors(tmp_path / "model.safetensors").values()} == {"BF16"}
    same(load_huggingface(tmp_path), model)


def test_float64_is_refused_because_float32_cannot_hold_it(tmp_path):
    save_huggingface(base(), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda a: a.update({UP: a[UP].astype(np.float64)}))
    with pytest.raises(FileError, match=r"up_proj.weight' has dtype='F64', can read F32, F16, BF16"):
        load_huggingface(tmp_path)


def test_a_tied_head_may_be_absent_or_equal(tmp_path):
    model = base(TIED)
    save_huggingface(model, tmp_path)
    path = tmp_path / "model.safetensors"
    assert "lm_head.weight" not in load_file(path)
    edit_tensors(path, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"].copy()}))
    same(load_huggingface(tmp_path), model)
    edit_tensors(path, lambda a: a["lm_head.weight"].__setitem__((3, 3), 7))
    with pytest.raises(
        FileError, match="tie_word_embeddings=True, but lm_head.weight differs from model.embed_tokens.weight"
    ):
        load_huggingface(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    model = base()
    save_huggingface(model, tmp_path)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    edit_tensors(
        tmp_path / "model.safetensors",
        lambda a: a.update({name.format(i): np.ones(2, np.float32) for i in range(2)}),
    )
    same(load_huggingface(tmp_path), model)


TENSORS = {
    "missing": (lambda a: a.pop(UP), f"{UP} is missing, config.json asks for \\(20, 16\\)"),
    "no head": (
        lambda a: a.pop("lm_head.weight"),
        "lm_head.weight is missing, .*tie_word_embeddings=True if",
    ),
    "bias": (
        lambda a: a.update({UP.replace("weight", "bias"): np.ones(20, np.float32)}),
        "unknown tensors .*up_proj.bias",
    ),
    "unknown": (lambda a: a.update({"value_head": np.ones(20, np.float32)}), "unknown tensors .*value_head"),
    "third layer": (lambda a: a.update({UP.replace("1", "2"): a[UP].copy()}), "unknown tensors .*layers.2"),
    "shape": (
        lambda a: a.update({UP: np.ones((16, 20), np.float32)}),
        r"up_proj.weight is F32 \(16, 20\), .*asks .* \(20, 16\)",
    ),
    "flat": (lambda a: a.update({UP: np.ones(320, np.float32)}), r"is F32 \(320,\)"),
    "integers": (
        lambda a: a.update({UP: np.ones((20, 16), np.int32)}),
        r"is I32 \(20, 16\), .*asks for F32, F16 or BF16",
    ),
    "bytes": (lambda a: a.update({UP: np.ones((20, 16), np.uint8)}), r"is U8 \(20, 16\)"),
    "nan": (lambda a: a[UP].__setitem__((0, 0), np.nan), f"{UP} holds NaN or infinity"),
    "infinity": (lambda a: a[UP].__setitem__((0, 0), -np.inf), f"{UP} holds NaN or infinity"),
    "no plan": (lambda a: a.update({UP + ".absmax": np.ones(20, np.float32)}), "unknown tensors .*absmax"),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    save_huggingface(base(), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", change)
    with pytest.raises(FileError, match=message) as caught:
        load_huggingface(tmp_path)
    assert str(tmp_path) in str(caught.value)


PACKED = {
    "missing": (lambda a: a.pop(UP + ".absmax"), "up_proj.weight.absmax is missing"),
    "codes": (lambda a: a.pop(UP), "up_proj.weight is missing"),
    "bias": (
        lambda a: a.update({UP.replace("weight", "bias"): np.ones(20, np.float32)}),
        "unknown .*up_proj.bias.* beside",
    ),
    "shape": (
        lambda a: a.update({k: a[k.replace("up", "down")].copy() for k in a if "1.mlp.up" in k}),
        r"up_proj.weight is quantized from \(16, 20\), config.json asks for \(20, 16\)",
    ),
    "swapped": (
        lambda a: a.update({"model.norm.weight.absmax": np.ones(1, np.float32)}),
        "unknown tensors .*norm.weight.absmax",
    ),
}


@pytest.mark.parametrize("change, message", PACKED.values(), ids=PACKED.keys())
def test_quantized_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    save_huggingface(codebook(base(), "nf4", 64, False), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", change)
    with pytest.raises(FileError, match=message):
        load_huggingface(tmp_path)


def test_one_projection_may_have_been_left_dense_by_the_quantizer(tmp_path):
    model = codebook(base(), "nf4")
    save_huggingface(model, tmp_path)
    dense = model.blocks[1].mlp.up_proj.weight.dense()

    def change(arrays):
        for name in [name for name in arrays if name.startswith(UP)]:
            del arrays[name]
        arrays[UP] = dense

    edit_tensors(tmp_path / "model.safetensors", change)
    found = load_huggingface(tmp_path)
    assert isinstance(found.blocks[1].mlp.up_proj.weight, DenseWeight) and np.array_equal(
        found.logits(IDS), model.logits(IDS)
    )


def header(path, change):
    """Change a safetensors header as JSON, or write the text that ``change`` returns; the data stay."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    value = json.loads(raw[8 : 8 + n])
    text = change(value)
    text = (json.dumps(value) if text is None else text).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def overlapping(h):
    h[UP]["data_offsets"] = h[UP.replace("1.mlp.up", "0.mlp.up")]["data_offsets"]


HEADERS = {
    "overlap": (overlapping, "a tensor ends at byte .*, but the next"),
    "hole": (lambda h: h.pop(UP) and None, "a tensor ends at byte"),
    "far": (lambda h: h[UP].update(data_offsets=[10**12, 10**12 + 1280]), "a tensor ends at byte"),
    "backwards": (lambda h: h[UP]["data_offsets"].reverse(), "has -1280 bytes"),
    "negative": (lambda h: h[UP].update(data_offsets=[-1280, 0]), r"data_offsets=\[-1280, 0\]"),
    "floats": (lambda h: h[UP].update(data_offsets=[0.0, 1280.0]), r"data_offsets=\[0.0, 1280.0\]"),
    "booleans": (lambda h: h[UP].update(shape=[True, 320]), r"shape=\[True, 320\]"),
    "huge": (lambda h: h[UP].update(shape=[2**62, 2**62]), "shape="),
    "many axes": (lambda h: h[UP].update(shape=[1] * 90), "shape="),
    "wrong size": (lambda h: h[UP].update(shape=[20, 17]), r"has 1280 bytes, F32 \[20, 17\] needs 1360"),
    "dtype": (lambda h: h[UP].update(dtype="F8_E4M3"), "has dtype='F8_E4M3', can read F32"),
    "no dtype": (lambda h: h[UP].pop("dtype") and None, "needs dtype, shape and data_offsets"),
    "list dtype": (lambda h: h[UP].update(dtype=["F32"]), r"has dtype=\['F32'\]"),
    "entry": (lambda h: h.update({UP: 3}), "is 3, needs dtype"),
    "twice": (lambda h: json.dumps(h)[:-1] + f', "{UP}": {json.dumps(h[UP])}}}', "a name comes twice"),
    "list": (lambda h: "[]", "no JSON object"),
    "no JSON": (lambda h: "{", "no JSON"),
    "deep": (lambda h: "[" * 10**5, "no JSON"),
    "utf-16": (lambda h: "\x00{", "no JSON"),
}


@pytest.mark.parametrize("change, message", HEADERS.values(), ids=HEADERS.keys())
def test_damaged_headers_are_refused_before_anything_is_read(tmp_path, change, message):
    save_huggingface(base(), tmp_path)
    header(tmp_path / "model.safetensors", change)
    with pytest.raises(FileError, match=f"model.safetensors: .*{message}"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    save_huggingface(base(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match="model.safetensors: not a complete safetensors file"):
        load_huggingface(tmp_path)


def test_a_header_longer_than_the_file_takes_no_memory(tmp_path):
    save_huggingface(base(), tmp_path)
    for length in (2**64 - 1, 2**40, 10**6):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(50))
        with pytest.raises(FileError, match=f"a header of {length} bytes in a file of 58"):
            load_huggingface(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    save_huggingface(base(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = stored_tensors(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FileError, match="ends within 'model.norm.weight'"):
        tensors["model.norm.weight"].read()
    path.unlink()
    with pytest.raises(FileError, match="cannot be read"):
        tensors["model.norm.weight"].read()


# --- config.json --------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
REFUSED = [
    ({"model_type": "qwen2"}, "model_type='qwen2', can be 'llama' only"),
    ({"model_type": "mistral"}, "model_type='mistral', can be 'llama' only"),
    ({"model_type": None}, "model_type=None"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu', can be 'silu' only"),
    ({"attention_bias": True}, "attention_bias=True, can be False only"),
    ({"mlp_bias": True}, "mlp_bias=True, can be False only"),
    ({"mlp_bias": 0}, "mlp_bias=0"),
    ({"head_dim": 8}, "head_dim=8, can be 4 only"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, can be 1.0 only"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.low_freq_factor=None, must be a number",
    ),
    (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "rope_scaling.high_freq_factor=1.0, must be above low_freq_factor",
    ),
    (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
        "original_max_position_embeddings=None",
    ),
    (
        {"rope_scaling": LLAMA3 | {"attention_factor": 1.0}},
        "attention_factor=1.0, is no setting of rope_type='llama3'",
    ),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None, must be a number"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0, must be above 0"),
    (
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
        "='default', .*type='linear' contradict",
    ),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters and rope_scaling contradict"),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type='dynamic', can be 'default' or 'linear'",
    ),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type='longrope'"),
    (
        {"rope_parameters": {"factor": 2.0}},
        "rope_parameters.factor=2.0, is no setting of rope_type='default'",
    ),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5, can be 1.0 only",
    ),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_parameters.rope_type='yarn'"),
    ({"rope_interleaved": True}, "rope_interleaved=True, can be False only"),
    ({"rope_parameters": [1]}, r"rope_parameters=\[1\], must be an object"),
    ({"rope_theta": 1e4}, "rope_theta=10000, rope_parameters.rope_theta=500000 contradict"),
    ({"rope_theta": 0, "rope_parameters": None}, "rope_theta=0.0: must be a finite number above 0"),
    ({"rope_theta": "10000"}, "rope_theta='10000', must be a number"),
    ({"rope_theta": 10**400}, "rope_theta=1000.*, must be a number"),
    ({"rope_theta": float("nan")}, "rope_theta=nan, must be a number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06, must be a number"),
    ({"rms_norm_eps": True}, "rms_norm_eps=True"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1, can be True or False only"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True, but lm_head.weight differs"),
    ({"vocab_size": None}, "vocab_size=None, must be a whole number"),
    ({"vocab_size": 20}, r"embed_tokens.weight is F32 \(19, 16\), .*\(20, 16\)"),
    ({"hidden_size": 16.0}, "hidden_size=16.0, must be a whole number"),
    ({"hidden_size": 0}, "hidden_size=0"),
    (
        {"intermediate_size": 2**31},
        "intermediate_size=2147483648, must be a whole number from 1 to 2147483647",
    ),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, but there are 21 tensors in all"),
    ({"num_hidden_layers": 3}, "layers.2.*is missing"),
    ({"num_hidden_layers": 1}, "unknown tensors .*layers.1"),
    ({"num_attention_heads": 3}, "num_attention_heads=3: must divide hidden_size=16"),
    ({"num_attention_heads": "4"}, "num_attention_heads='4'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide"),
    ({"num_key_value_heads": 4}, "k_proj.weight is F32"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0, must be a whole number"),
    ({"max_position_embeddings": None}, "max_position_embeddings=None"),
    ({"quantization_config": 3}, "quantization_config=3, must be an object"),
    (
        {"quantization_config": {}},
        "quantization_config.quant_method=None, can be 'bitsandbytes' or 'gptq' only",
    ),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "load_in_8bit=True, can be False only",
    ),
    (
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}},
        "bnb_4bit_quant_storage='bfloat16'",
    ),
    (
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}},
        "bnb_4bit_quant_type='nf3'",
    ),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 5, "group_size": 8}},
        "bits=5, can be 2 or 3 or 4 or 8 only",
    ),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}},
        "group_size=0, must be a whole",
    ),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "group_size=None, must be a whole"),
    ({"quantization_config": {"quant_method": "gptq", "desc_act": True}}, "desc_act=True, can be False only"),
    (
        {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
        "checkpoint_format='marlin'",
    ),
    ({"quantization_config": {"quant_method": "gptq", "dynamic": {"+:.*down.*": {"bits": 8}}}}, "dynamic="),
]


@pytest.mark.parametrize(
    "changes, message", REFUSED, ids=lambda x: json.dumps(x)[:50] if isinstance(x, dict) else ""
)
def test_architectures_and_settings_that_differ_from_ours_are_refused(tmp_path, changes, message):
    save_huggingface(base(), tmp_path)
    edit(tmp_path / "config.json", lambda c: c.update(changes))
    with pytest.raises(FileError, match=message) as caught:
        load_huggingface(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 400


def test_a_quant_type_other_than_the_one_announced_is_refused(tmp_path):
    save_huggingface(codebook(base(), "nf4"), tmp_path)
    edit(tmp_path / "config.json", lambda c: c["quantization_config"].update(bnb_4bit_quant_type="fp4"))
    with pytest.raises(FileError, match="q_proj is nf4, config.json says bnb_4bit_quant_type=fp4"):
        load_huggingface(tmp_path)


def test_the_configuration_may_leave_out_what_transformers_fills_in(tmp_path):
    config = replace(GQA, num_key_value_heads=4, rope_theta=10000.0, rms_norm_eps=1e-6)
    model = base(config)
    save_huggingface(model, tmp_path)
    needed = {
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    }
    everything = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in everything.items() if k in needed}))
    same(load_huggingface(tmp_path), model)
    for name in needed:
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in everything.items() if k in needed - {name}})
        )
        with pytest.raises(FileError, match=f"{name}=None"):
            load_huggingface(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000.0, "rope_parameters": None},  # version 4
        {"rope_theta": None, "rope_scaling": {"type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500000}},
        {"pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False, "transformers_version": "4.40.0"},
        {"head_dim": None, "attention_bias": None, "quantization_config": None, "some_future_key": [1]},
    ],
    ids=str,
)
def test_older_and_newer_ways_to_say_the_same_are_read(tmp_path, changes):
    model = base()
    save_huggingface(model, tmp_path)
    edit(tmp_path / "config.json", lambda c: c.update(changes))
    same(load_huggingface(tmp_path), model)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 10**5, '{"a": \ud800}', '{"hidden_size": ' + "9" * 5000 + "}"]
)
def test_config_files_that_are_no_json_object_are_refused(tmp_path, text):
    save_huggingface(base(), tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileError, match="config.json: (not JSON|expected a JSON object)"):
        load_huggingface(tmp_path)


# --- the index and the folder -------------------------------------------------------------------------------


def point(name, file):
    return lambda i: i["weight_map"].update({name: file})


INDEXES = {
    "outside": (point(UP, "../model.safetensors"), "must be the plain name of a .safetensors file"),
    "absolute": (point(UP, "/etc/passwd"), "='/etc/passwd', must be the plain name"),
    "backslash": (point(UP, "..\\model.safetensors"), "must be the plain name"),
    "dots": (point(UP, ".."), "must be the plain name"),
    "hidden": (point(UP, ".model.safetensors"), "must be the plain name"),
    "newline": (point(UP, "model.safetensors\n"), "must be the plain name"),
    "nul": (point(UP, "model\x00.safetensors"), "must be the plain name"),
    "pickle": (point(UP, "pytorch_model.bin"), "must be the plain name of a .safetensors"),
    "number": (point(UP, 3), "=3, must be the plain name"),
    "no such shard": (
        point(UP, "model-00099-of-00099.safetensors"),
        "lies in model-00099-of-00099.safetensors",
    ),
    "no shards": (
        lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], "m.safetensors")),
        "m.safetensors: no such file",
    ),
    "other shard": (
        point(UP, "model-00001-of-00005.safetensors"),
        f"holds '{UP}', which according to .*index.json lies in",
    ),
    "not listed": (
        lambda i: i["weight_map"].pop(UP),
        f"holds '{UP}', which according to .*index.json is not there",
    ),
    "not there": (
        point("model.extra", "model-00001-of-00005.safetensors"),
        "should lie in model-00001.*does not hold",
    ),
    "total": (lambda i: i["metadata"].update(total_size=1), "total_size=1, but the tensors have"),
    "total type": (lambda i: i["metadata"].update(total_size="1"), "total_size='1', but the tensors have"),
    "empty": (lambda i: i.update(weight_map={}), "weight_map={}"),
    "list": (lambda i: i.update(weight_map=[1]), r"weight_map=\[1\]"),
    "metadata": (lambda i: i.update(metadata=3), "metadata=3"),
    "nothing": (lambda i: i.clear(), "weight_map=None"),
}


@pytest.fixture
def sharded(tmp_path):
    save_huggingface(base(), tmp_path, max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5
    return tmp_path


@pytest.mark.parametrize("change, message", INDEXES.values(), ids=INDEXES.keys())
def test_indexes_that_do_not_fit_are_refused(sharded, change, message):
    edit(sharded / "model.safetensors.index.json", change)
    with pytest.raises(FileError, match=message) as caught:
        load_huggingface(sharded)
    assert str(sharded) in str(caught.value)


def test_an_index_without_sizes_and_one_with_a_whole_float_are_fine(sharded):
    index = sharded / "model.safetensors.index.json"
    edit(index, lambda i: i["metadata"].update(total_size=float(i["metadata"]["total_size"])))
    same(load_huggingface(sharded), base())
    edit(index, lambda i: i.pop("metadata"))
    same(load_huggingface(sharded), base())


def test_a_tensor_in_two_shards_is_refused(sharded):
    file = read_json(sharded / "model.safetensors.index.json")["weight_map"][UP]
    other = next(p for p in sorted(sharded.glob("model-*.safetensors")) if p.name != file)
    edit_tensors(other, lambda a: a.update({UP: np.zeros((20, 16), np.float32)}))
    with pytest.raises(FileError, match=f"{other.name}: holds '{UP}', which according to .* lies in {file}"):
        load_huggingface(sharded)


def test_missing_files_are_named(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(FileError, match="model-00002-of-00005.safetensors: no such file"):
        load_huggingface(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(FileError, match="has neither model.safetensors nor model.safetensors.index.json$"):
        load_huggingface(sharded)
    (sharded / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(FileError, match="pytorch_model.bin is another format"):
        load_huggingface(sharded)
    (sharded / "config.json").unlink()
    with pytest.raises(FileError, match="config.json: no such file"):
        load_huggingface(sharded)
    with pytest.raises(FileError, match="config.json: no such file"):
        load_huggingface(sharded / "nowhere")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00002-of-00005.safetensors"]
)
def test_links_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "m"
    save_huggingface(base(), folder, max_shard_bytes=4000)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(FileError, match=f"{name}: is a link to .*, outside the folder"):
        load_huggingface(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    with pytest.raises(FileError, match=f"{name}: cannot be opened|{name}: no such file|has neither"):
        load_huggingface(folder)


def test_links_into_the_blobs_of_the_hubs_cache_are_how_it_stores_models(tmp_path):
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b" / "blobs"
    save_huggingface(base(), folder, max_shard_bytes=4000)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    same(load_huggingface(folder), base())


# --- anything at all ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    config = ModelConfig(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        context_length=8,
        tie_word_embeddings=False,
    )
    dense = base(config)
    save_huggingface(dense, path / "dense", max_shard_bytes=300)
    save_huggingface(codebook(dense, "nf4"), path / "nf4")
    return path


def refused_or_valid(folder):
    try:
        model = load_huggingface(folder)
    except FileError:
        return
    assert isinstance(model, Transformer)
    with np.errstate(all="ignore"):
        assert model.logits(np.array([[0]])).shape == (1, 1, model.config.vocab_size)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 40)
    | st.integers()
    | st.just(10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["llama", "silu", "default", "gptq", "bitsandbytes", "nf4", "uint8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def mutated(data, value, depth=0):
    """Change, drop or add one entry, somewhere in an object."""
    if not isinstance(value, dict) or not value or (depth and data.draw(st.booleans())):
        return data.draw(values)
    key = data.draw(
        st.sampled_from(sorted(value)) | st.sampled_from(["quantization_config", "rope_scaling", "head_dim"])
    )
    if data.draw(st.integers(0, 9)) == 0:
        return {k: v for k, v in value.items() if k != key}
    return value | {key: mutated(data, value.get(key), depth + 1)}


@fuzz
@given(data=st.data())
@pytest.mark.parametrize("name", ["nf4/config.json", "dense/model.safetensors.index.json"])
def test_any_json_value_is_refused_or_gives_a_model(folder, name, data):
    path = folder / name
    original = path.read_bytes()
    try:
        value = json.loads(original)
        for _ in range(data.draw(st.integers(1, 2))):
            value = mutated(data, value)
        path.write_text(json.dumps(value))
        refused_or_valid(path.parent)
    finally:
        path.write_bytes(original)


@fuzz
@given(data=st.data())
@pytest.mark.parametrize("name", ["nf4/model.safetensors", "dense/model-00002-of-{:05}.safetensors"])
def test_any_bytes_are_refused_or_give_a_model(folder, name, data):
    path = folder / name.format(len(list((folder / "dense").glob("model-*"))))
    original = path.read_bytes()
    changed = bytearray(original)
    header_end = 8 + min(int.from_bytes(original[:8], "little"), 2000)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(header_end, len(changed)) - 1) | st.integers(0, len(changed) - 1))
        end = at + data.draw(st.integers(0, 4))
        changed[at:end] = data.draw(st.binary(max_size=4) | st.sampled_from([b"9", b"0", b"[", b"-1"]))
    try:
        path.write_bytes(bytes(changed[: data.draw(st.none() | st.integers(0, len(changed)))]))
        refused_or_valid(path.parent)
        agrees_with_safetensors(path)
    finally:
        path.write_bytes(original)


def agrees_with_safetensors(path):
    """What both readers accept, both understand alike."""
    try:
        ours = stored_tensors(path)
        with safe_open(path, "numpy") as file:
            theirs = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file
            }
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileError, SafetensorError, TypeError):
        return
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == theirs
    for name, array in arrays.items():
        if array.dtype.kind != "f" or np.isfinite(array).all():
            assert ours[name].read().tobytes() == array.tobytes()


# --- scaled rotary positions (that transformers means the same is among the peers) --------------------------

LONG = replace(
    GQA, rope_theta=500000.0, hidden_size=32, num_attention_heads=2, num_key_value_heads=1
)  # 8 pairs


def llama3_factors(theta, pairs, factor=8.0, low=1.0, high=4.0, original=8192):
    """The formula as transformers states it, in wavelengths, one pair at a time."""
    factors = []
    for i in range(pairs):
        wavelength = 2 * np.pi * theta ** (i / pairs)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def test_rope_scaling_becomes_factors(tmp_path):
    save_huggingface(base(LONG), tmp_path)
    edit(tmp_path / "config.json", lambda c: c.update(rope_parameters=LLAMA3 | {"rope_theta": 5e5}))
    found = load_huggingface(tmp_path).config.rope_factors
    np.testing.assert_allclose(found, llama3_factors(5e5, 8), rtol=1e-12)
    assert found[0] == 1 and found[-1] == 8 and any(1 < factor < 8 for factor in found)
    edit(
        tmp_path / "config.json",
        lambda c: c.update(rope_parameters={"type": "linear", "factor": 4, "rope_theta": 5e5}),
    )
    assert load_huggingface(tmp_path).config.rope_factors == (4.0,) * 8


@pytest.mark.parametrize(
    "factors", [(2.5,) * 8, llama3_factors(5e5, 8), np.float32(llama3_factors(5e5, 8, 32.0)).tolist()]
)
def test_rope_factors_come_back(tmp_path, factors):
    """Linear ones and Llama 3's exactly; those that a GGUF has rounded to float32 are recognised too."""
    model = base(replace(LONG, rope_factors=tuple(factors)))
    save_huggingface(model, tmp_path)
    found = load_huggingface(tmp_path).config
    assert replace(found, rope_factors=None) == LONG
    np.testing.assert_allclose(found.rope_factors, factors, rtol=2**-23)


def test_rope_factors_that_have_no_name_there_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"rope_factors=\(1.*config.json has no name for them; save_model and save_gguf"
    ):
        save_huggingface(base(replace(LONG, rope_factors=(1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0))), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_embedding_of_blocks_has_no_form_there(tmp_path):
    model = base(LONG)
    model.embedding.weight = BlockWeight.quantize(model.embedding.weight.dense(), "Q8_0")
    with pytest.raises(
        ValueError, match="model.embed_tokens: BlockWeight has no form in a Hugging Face folder; save_gguf"
    ):
        save_huggingface(model, tmp_path)
    assert not list(tmp_path.iterdir())
