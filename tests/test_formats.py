"""Files: what is written is read back bit by bit, complete or not at all, and what is not ours is refused by
name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from helpers import CONFIGS, GQA, adapters, digest, fill_adapters, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minilora.building import init_model
from minilora.config import LoraConfig, ModelConfig, QuantConfig
from minilora.formats.checkpoint import load_model, save_model, sha256
from minilora.formats.files import FileError, atomic, read_json, read_tensors, write_file, write_tensors
from minilora.formats.peft import load_adapter, save_adapter
from minilora.injection import inject_lora
from minilora.lora import LoraLinear
from minilora.merging import merge
from minilora.quant.model import quantize_model

IDS = np.array([[1, 2, 3, 4]])
LORA = LoraConfig(
    r=3, lora_alpha=5, lora_dropout=0.1, target_modules=("q_proj", "v_proj", "down_proj"), use_rslora=True
)


def base(config=GQA, quant=None):
    model = make_model(config, dtype=np.float32, trainable=False)
    return model if quant is None else quantize_model(model, quant)


def lora(model=None, config=LORA):
    return fill_adapters(inject_lora(base() if model is None else model, config, np.random.default_rng(0)))


# --- the common part ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint8, np.int64, bool])
def test_arrays_and_metadata_come_back_bit_by_bit(tmp_path, dtype):
    arrays = {
        "a": (np.random.default_rng(0).standard_normal((3, 4)) * 9).astype(dtype),
        "empty": np.zeros((0, 2), dtype),
        "scalar": np.array(1, dtype),
    }
    metadata = {"n": 3, "text": "ä", "list": [1, {"x": None}], "float": 0.1}
    write_tensors(tmp_path / "f.safetensors", arrays, metadata)
    found, meta = read_tensors(tmp_path / "f.safetensors")
    assert meta == metadata and set(found) == set(arrays)
    for name, array in arrays.items():
        assert (
            found[name].dtype == array.dtype
            and found[name].shape == array.shape
            and np.array_equal(found[name], array)
        )


def test_transposed_and_sliced_arrays_are_written_as_they_look(tmp_path):
    a = np.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "f", {"t": a.T, "s": a[::2, 1:]}, {})
    found, _ = read_tensors(tmp_path / "f")
    assert np.array_equal(found["t"], a.T) and np.array_equal(found["s"], a[::2, 1:])


def test_the_same_content_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_tensors(tmp_path / name, {"x": np.arange(3.0), "y": np.ones(2)}, {"z": {"b": 1, "a": [2]}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_programs_metadata_is_no_metadata_of_ours(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "f", {"format": "pt", "n": "3"})
    assert read_tensors(tmp_path / "f")[1] == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_and_infinity_are_refused_by_array(tmp_path, bad, dtype):
    write_tensors(tmp_path / "f", {"fine": np.ones(2), "broken": np.array([1, bad], dtype)}, {})
    with pytest.raises(FileError, match="broken holds NaN or infinity"):
        read_tensors(tmp_path / "f")


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "f.safetensors"
    write_tensors(path, {"a": np.ones((8, 8))}, {"x": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match="f.safetensors: not a complete safetensors file"):
        read_tensors(path)


@pytest.mark.parametrize(
    "content", [b"not a tensor", b"\x80\x04\x95pickle", b"PK\x03\x04zip", b"\xff" * 64, b"GGUF" + bytes(60)]
)
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(FileError, match="not a complete safetensors file"):
        read_tensors(tmp_path / "f")


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        for read in (read_tensors, read_json):
            with pytest.raises(FileError, match="no such file"):
                read(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("3", "expected .* found int"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(FileError, match=f"f.json: {message}"):
        read_json(tmp_path / "f.json")


def test_json_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "f.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FileError, match="f.json"):
        read_json(tmp_path / "f.json")


def test_an_exception_while_writing_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "f.txt"
    write_file(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_the_old_file_stays_readable_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "f.txt"
    write_file(path, "old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
    assert path.read_text() == "new"


def test_files_get_the_permissions_that_the_umask_allows(tmp_path):
    """safetensors makes its files private, so that nobody else could read a shared base or adapter."""
    (tmp_path / "plain").write_text("x")
    write_tensors(tmp_path / "tensors", {"a": np.ones(2)}, {})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failing_to_serialise_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    write_tensors(path, {"a": np.ones(2)}, {})
    with pytest.raises(TypeError):
        write_tensors(path, {"a": np.zeros(2)}, {"x": object()})
    assert read_tensors(path)[0]["a"].tolist() == [1, 1] and len(list(tmp_path.iterdir())) == 1


def test_folders_are_made_and_impossible_ones_refused(tmp_path):
    write_file(tmp_path / "a" / "b" / "f.txt", "ä")
    assert (tmp_path / "a" / "b" / "f.txt").read_bytes() == "ä".encode()
    with pytest.raises(FileError, match="f.txt: cannot be written"):
        write_file(tmp_path / "a" / "b" / "f.txt" / "g.txt", "below a file")


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_models_come_back_bit_by_bit(tmp_path, name):
    model = base(CONFIGS[name])
    save_model(model, tmp_path / "m.safetensors", metadata={"note": "x"})
    found = load_model(tmp_path / "m.safetensors")
    assert found.config == model.config and found.tied == model.tied and not found.trainable()
    assert {p.name: p.data.tobytes() for p in found.parameters()} == {
        p.name: p.data.tobytes() for p in model.parameters()
    }
    assert np.array_equal(found.logits(IDS), model.logits(IDS)) and sha256(found) == sha256(model)


def test_float16_files_are_half_the_size_and_load_as_float32(tmp_path):
    model = base()
    for dtype in (np.float16, np.float32):
        save_model(model, tmp_path / np.dtype(dtype).name, dtype)
    arrays = load_file(tmp_path / "float16")
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float16)}
    found = load_model(tmp_path / "float16")
    for p, old in zip(found.parameters(), model.parameters(), strict=True):
        assert p.data.dtype == np.float32 and np.array_equal(p.data, old.data.astype(np.float16))


def test_a_tied_model_is_stored_without_a_head(tmp_path):
    save_model(base(CONFIGS["mha tied"]), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m")


def test_a_model_merged_in_its_tied_head_can_be_saved_and_loaded(tmp_path):
    model = lora(base(CONFIGS["mha tied"]), replace(LORA, target_modules=("lm_head", "q_proj")))
    merged, _ = merge(model)
    save_model(merged, tmp_path / "m")
    assert np.array_equal(load_model(tmp_path / "m").logits(IDS), merged.logits(IDS))


def test_a_model_with_an_adapter_is_not_saved_whole(tmp_path):
    with pytest.raises(ValueError, match="model.layers.0.*has an adapter; merge"):
        save_model(lora(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def rewrite(path, change):
    arrays, metadata = read_tensors(path)
    change(arrays, metadata)
    write_tensors(path, arrays, metadata)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, m: m.clear(), "no minilora model"),
        (lambda a, m: m.update(minilora_model=[1]), "no minilora model"),
        (lambda a, m: m["minilora_model"].pop("rope_theta"), "no minilora model"),
        (lambda a, m: m["minilora_model"].update(bias=True), "no minilora model"),
        (
            lambda a, m: m["minilora_model"].update(num_attention_heads=3),
            "num_attention_heads=3: must divide",
        ),
        (lambda a, m: m["minilora_model"].update(hidden_size="16"), "hidden_size='16'"),
        (lambda a, m: m["minilora_model"].update(num_hidden_layers=3), "missing .*layers.2"),
        (
            lambda a, m: m["minilora_model"].update(vocab_size=20),
            r"shape \(19, 16\), but the configuration asks for \(20, 16\)",
        ),
        (lambda a, m: a.pop("model.norm.weight"), "missing .*model.norm.weight"),
        (lambda a, m: a.update(extra=np.ones(1)), "unknown .*extra"),
        (lambda a, m: a.update({"model.norm.weight": np.ones(16, np.int64)}), "not floating point"),
    ],
)
def test_files_that_do_not_describe_a_model_are_refused(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    save_model(base(), path)
    rewrite(path, change)
    with pytest.raises(FileError, match=f"m.safetensors: .*{message}"):
        load_model(path)


def test_the_hash_tells_models_apart():
    model, other = base(), base()
    assert sha256(model) == sha256(other)
    other.blocks[1].mlp.up_proj.weight.param.data[0, 0] += 1e-6
    assert sha256(model) != sha256(other)
    assert sha256(make_model(GQA)) != sha256(model)  # float64
    other = base()
    other.norm.weight.name = "another name"
    assert sha256(other) != sha256(model)


# --- adapters -----------------------------------------------------------------------------------------------


QALORA = LoraConfig(r=2, lora_alpha=3, target_modules=("q_proj", "up_proj"), use_qalora=True)
SETTINGS = {
    "lora": (None, LORA),
    "qlora": (QuantConfig("nf4"), replace(LORA, use_rslora=False)),
    "qalora": (QuantConfig("int4", group_size=4), QALORA),
    "full names": (None, replace(LORA, target_modules=("layers.1.self_attn.q_proj", "lm_head"))),
}


@pytest.mark.parametrize("quant, config", SETTINGS.values(), ids=SETTINGS.keys())
def test_adapters_come_back_bit_by_bit(tmp_path, quant, config):
    model = lora(base(quant=quant), config)
    size = save_adapter(model, config, tmp_path / "a")
    assert size == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    found, loaded = load_adapter(base(quant=quant), tmp_path / "a")
    assert asdict(loaded) == asdict(config) | {"target_modules": tuple(sorted(config.target_modules))}
    assert digest(p.data for p in found.trainable()) == digest(p.data for p in model.trainable())
    assert np.array_equal(found.logits(IDS), model.logits(IDS))
    assert [linear.pool for linear in adapters(found)] == [linear.pool for linear in adapters(model)]


def test_the_folder_holds_a_and_b_alone_under_pefts_names(tmp_path):
    save_adapter(lora(), LORA, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    arrays = load_file(tmp_path / "adapter_model.safetensors")
    assert arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"].shape == (3, 16)
    assert arrays["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (16, 3)
    assert len(arrays) == 2 * 3 * 2 and {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        settings["peft_type"] == "LORA"
        and settings["r"] == 3
        and settings["lora_alpha"] == 5
        and settings["use_rslora"] is True
    )
    assert sorted(settings["target_modules"]) == ["down_proj", "q_proj", "v_proj"]


def test_the_file_is_as_small_as_a_and_b(tmp_path):
    model = lora()
    size = save_adapter(model, LORA, tmp_path)
    assert size < sum(p.data.nbytes for p in model.trainable()) + 3000  # the header names each tensor


def test_loading_leaves_the_base_alone_and_may_be_repeated(tmp_path):
    save_adapter(lora(), LORA, tmp_path)
    model = base()
    before = sha256(model)
    first, second = load_adapter(model, tmp_path)[0], load_adapter(model, tmp_path)[0]
    assert sha256(model) == before and np.array_equal(first.logits(IDS), second.logits(IDS))
    assert first.trainable()[0].data is not second.trainable()[0].data


def test_a_loaded_adapter_trains_on(tmp_path):
    save_adapter(lora(), LORA, tmp_path)
    found, _ = load_adapter(base(), tmp_path)
    assert len(found.trainable()) == 12 and all(p.data.flags.writeable for p in found.trainable())


def test_a_model_without_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model: has no adapter to save"):
        save_adapter(base(), LORA, tmp_path)


def test_a_configuration_that_is_not_the_adapters_is_refused(tmp_path):
    """A wrong r or alpha in the file would load as another model."""
    for wrong in (
        replace(LORA, r=4),
        replace(LORA, lora_alpha=6),
        replace(LORA, use_rslora=False),
        replace(LORA, target_modules=("q_proj",)),
    ):
        with pytest.raises(ValueError, match="config"):
            save_adapter(lora(), wrong, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def change_settings(folder, **changes):
    settings = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA', only LORA"),
        ({"peft_type": None}, "peft_type=None"),
        ({"use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
        ({"rank_pattern": {"q_proj": 4}}, r"is float32 \(3, 16\), this base needs a float array \(4, 16\)"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0: must be a whole number"),
        ({"rank_pattern": {"lm": 2}}, "rank_pattern='lm': matches no module"),
        ({"rank_pattern": {"(a+)+$": 2}}, "no regular expressions"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\] must be an object"),
        ({"alpha_pattern": {"q_proj": "4"}}, r"alpha_pattern\['q_proj'\]='4': must be a finite number"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4' changes the base weights"),
        ({"r": 0}, "r=0"),
        ({"r": "3"}, "r='3'"),
        ({"r": 17}, "r=17: must be at most"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"r": 4}, r"is float32 \(3, 16\), this base needs a float array \(4, 16\)"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["nothing"]}, "target_modules='nothing': matches no module"),
        ({"target_modules": ["q_proj", "v_proj"]}, "unknown tensors .*down_proj"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "k_proj.lora_A.weight is missing"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"target_modules": 3}, "target_modules|iterable"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    save_adapter(lora(), LORA, tmp_path)
    change_settings(tmp_path, **changes)
    with pytest.raises(FileError, match=message) as caught:
        load_adapter(base(), tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_truncated_files_of_the_folder_are_refused(tmp_path, name):
    save_adapter(lora(), LORA, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match=name):
        load_adapter(base(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileError, match=f"{name}: no such file"):
        load_adapter(base(), tmp_path)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(lora(), LORA, tmp_path)
    with pytest.raises(FileError, match="this base needs a float array"):
        load_adapter(base(replace(GQA, hidden_size=24)), tmp_path)
    save_adapter(lora(base(quant=QuantConfig("int4", group_size=2)), QALORA), QALORA, tmp_path)
    with pytest.raises(FileError, match="not constant within the base's groups of 4"):
        load_adapter(base(quant=QuantConfig("int4", group_size=4)), tmp_path)


def test_an_injected_model_takes_no_second_adapter(tmp_path):
    save_adapter(lora(), LORA, tmp_path)
    with pytest.raises(FileError, match="already injected"):
        load_adapter(lora(), tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_adapter_with_nan_is_refused(tmp_path, bad):
    save_adapter(lora(), LORA, tmp_path)
    rewrite(tmp_path / "adapter_model.safetensors", lambda a, m: a[next(iter(a))].__setitem__((0, 0), bad))
    with pytest.raises(FileError, match="holds NaN or infinity"):
        load_adapter(base(), tmp_path)


def test_integer_tensors_are_refused(tmp_path):
    save_adapter(lora(), LORA, tmp_path)
    rewrite(
        tmp_path / "adapter_model.safetensors",
        lambda a, m: a.update({k: v.astype(np.int32) for k, v in a.items()}),
    )
    with pytest.raises(FileError, match=r"is int32 \(3, 16\), this base needs a float array"):
        load_adapter(base(), tmp_path)


def test_pefts_copy_of_an_adapted_heads_weight_must_be_the_bases(tmp_path):
    """PEFT saves `lm_head.base_layer.weight` beside the adapter of a head."""
    config, name = replace(LORA, target_modules=("lm_head",)), "base_model.model.lm_head.base_layer.weight"
    model = lora(config=config)
    save_adapter(model, config, tmp_path)
    head = base().head.weight.dense()
    rewrite(tmp_path / "adapter_model.safetensors", lambda a, m: a.update({name: head}))
    assert np.array_equal(load_adapter(base(), tmp_path)[0].logits(IDS), model.logits(IDS))
    rewrite(tmp_path / "adapter_model.safetensors", lambda a, m: a.update({name: head + 1}))
    with pytest.raises(FileError, match="made over a base whose lm_head differs"):
        load_adapter(base(), tmp_path)


def test_pefts_all_linear_means_all_projections(tmp_path):
    config = LoraConfig(r=2)
    save_adapter(lora(config=config), config, tmp_path)
    change_settings(tmp_path, target_modules="all-linear")
    assert len(adapters(load_adapter(base(), tmp_path)[0])) == 14


QUANTS = [
    QuantConfig("nf4"),
    QuantConfig("nf3", double_quant=False),
    QuantConfig("fp4", block_size=32),
    QuantConfig("int3", group_size=8),
    QuantConfig("int8", group_size=8),
]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: q.quant_type)
def test_quantized_models_come_back_bit_for_bit(quant, tmp_path):
    config = ModelConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        context_length=16,
    )
    model = quantize_model(init_model(config, np.random.default_rng(0)), quant)
    save_model(model, tmp_path / "q.safetensors")
    again = load_model(tmp_path / "q.safetensors")
    for (name, a), (_, b) in zip(model.linears(), again.linears(), strict=True):
        assert type(a.weight) is type(b.weight), name
        assert np.array_equal(a.weight.dense(), b.weight.dense()), name
    ids = np.arange(10)[None]
    assert np.array_equal(model.logits(ids), again.logits(ids))


def test_a_merged_qalora_model_stays_quantized_in_its_file(tmp_path):
    config = ModelConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        context_length=16,
    )
    base = quantize_model(init_model(config, np.random.default_rng(0)), QuantConfig("int4", group_size=8))
    adapted = inject_lora(base, LoraConfig(r=2, use_qalora=True), np.random.default_rng(1))
    for _, linear in adapted.linears():
        if isinstance(linear, LoraLinear):
            linear.lora_B.data += 0.1
    merged = merge(adapted)[0]
    save_model(merged, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    codes = base.blocks[0].mlp.down_proj.weight.codes
    assert again.blocks[0].mlp.down_proj.weight.codes.tobytes() == codes.tobytes()
    ids = np.arange(10)[None]
    assert np.array_equal(merged.logits(ids), again.logits(ids))


# --- every kind of quantized weight -------------------------------------------------------------------------


def kinds_of_weights():
    """Whole zero points of each width, and GGUF's blocks, which a model file must keep bit by bit."""
    from minilora.quant import AffineWeight, BlockWeight

    for bits in (2, 3, 4, 8):
        yield f"int{bits} zero", lambda w, bits=bits: AffineWeight.quantize(w, bits, 8, store="zero")
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        yield kind, lambda w, kind=kind: BlockWeight.quantize(w, kind)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in kinds_of_weights()])
def test_zero_points_and_blocks_come_back_bit_by_bit(tmp_path, make):
    config = replace(GQA, hidden_size=32, intermediate_size=64)
    model = make_model(config, dtype=np.float32, trainable=False)
    head = model.head
    quantized = model.map_linears(lambda x: x if x is head else type(x)(x.name, make(x.weight.dense())))
    save_model(quantized, tmp_path / "m.safetensors")
    found = load_model(tmp_path / "m.safetensors")
    assert np.array_equal(found.logits(IDS), quantized.logits(IDS))
    for (_, a), (_, b) in zip(found.linears(), quantized.linears(), strict=True):
        assert type(a.weight) is type(b.weight)
        if a.weight is not found.head.weight:
            for kind, arrays in b.weight.arrays().items():
                for x, y in zip(a.weight.arrays()[kind], arrays, strict=True):
                    assert x.dtype == y.dtype and np.array_equal(x, y)


def test_zero_points_of_another_length_are_refused(tmp_path):
    from minilora.quant import AffineWeight

    model = base()
    quantized = model.map_linears(
        lambda x: (
            x
            if x is model.head
            else type(x)(x.name, AffineWeight.quantize(x.weight.dense(), 4, 4, store="zero"))
        )
    )
    save_model(quantized, tmp_path / "m.safetensors")
    name = "model.layers.0.self_attn.q_proj.offset"
    rewrite(tmp_path / "m.safetensors", lambda a, m: a.__setitem__(name, a[name][:-1]))
    with pytest.raises(FileError, match="codes.shape"):
        load_model(tmp_path / "m.safetensors")


def test_an_adapter_in_bfloat16_is_widened_exactly(tmp_path):
    """As torch saves half-precision adapters; NumPy has no such type, so the bytes are written here by
    hand."""
    save_adapter(lora(), LORA, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    arrays, _ = read_tensors(path)
    header, body = {}, b""
    for name, a in arrays.items():
        half = (np.ascontiguousarray(a).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(a.shape),
            "data_offsets": [len(body), len(body) + len(half)],
        }
        body += half
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    model, _ = load_adapter(base(), tmp_path)
    for p in model.trainable():
        expected = arrays[f"base_model.model.{p.name}"].view(np.uint32) & 0xFFFF0000
        assert np.array_equal(p.data, expected.view(np.float32))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
def test_types_that_numpy_lacks_are_refused_by_name(tmp_path, dtype):
    size = 8 if dtype == "C64" else 1
    text = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(FileError, match=f"'a' has dtype={dtype}, can read|not a complete safetensors file"):
        read_tensors(tmp_path / "f")


def test_json_that_says_something_twice_or_is_too_long_is_refused(tmp_path):
    (tmp_path / "f.json").write_text('{"r": 1, "r": 2}')
    with pytest.raises(FileError, match="a name comes twice"):
        read_json(tmp_path / "f.json")
    (tmp_path / "f.json").write_text('{"r": 1}' + " " * 100)
    with pytest.raises(FileError, match="has 108 bytes, at most 50 are read"):
        read_json(tmp_path / "f.json", max_bytes=50)


Q = "model.layers.0.self_attn.q_proj"
# what is damaged, in the arrays a or the metadata m of a quantized model, and what must be said of it
DAMAGED_MODELS = {
    "norm": (
        lambda a, m: m["minilora_quantized"].update({"model.norm": m["minilora_quantized"][Q]}),
        "is no projection",
    ),
    "embedding": (
        lambda a, m: m["minilora_quantized"].update({"model.embed_tokens": m["minilora_quantized"][Q]}),
        "is no projection",
    ),
    "infinity": (
        lambda a, m: m["minilora_quantized"][Q].update(block_size=float("inf")),
        "block_size=inf, must be a whole",
    ),
    "layers": (
        lambda a, m: m["minilora_model"].update(num_hidden_layers=10**9),
        "num_hidden_layers=1000000000, but there",
    ),
    "float codes": (
        lambda a, m: a.update({f"{Q}.scale.codes": a[f"{Q}.scale.codes"] + 300.5}),
        "scale.codes: float64, must be",
    ),
    "whole scales": (
        lambda a, m: a.update({f"{Q}.scale.absmax": a[f"{Q}.scale.absmax"].astype(int)}),
        "must be float32",
    ),
    "missing": (lambda a, m: a.pop(f"{Q}.codes"), "codes: missing"),
}


@pytest.mark.parametrize("change, message", DAMAGED_MODELS.values(), ids=DAMAGED_MODELS.keys())
def test_damaged_quantized_models_are_refused(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    save_model(base(quant=QuantConfig("nf4", 32)), path)
    rewrite(path, change)
    with pytest.raises(FileError, match=message):
        load_model(path)


@pytest.fixture(scope="module")
def real_model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    save_model(base(quant=QuantConfig("nf4", 32)), path)
    return path.read_bytes(), path.with_name("changed.safetensors")


@given(
    st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3),
    st.integers(0, 40),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_model_file_is_read_or_refused(real_model_file, changes, cut):
    data, path = bytearray(real_model_file[0]), real_model_file[1]
    for at, value in changes:
        data[at : at + len(value)] = value
    path.write_bytes(data[: len(data) - cut] if cut < 20 else data)
    with np.errstate(all="ignore"):
        try:
            model = load_model(path)
        except FileError as error:
            assert str(path) in str(error)
        else:
            assert model.logits(IDS).shape == (1, 4, model.config.vocab_size)
