"""SmolLM2-135M against transformers and PEFT, on the same file; what we save of it, opened by them; RoPE
scaling."""

from __future__ import annotations

import gc
import math
import re
import statistics
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers import assert_close

from minilora.config import LoraConfig, ModelConfig
from minilora.data.tasks import Batch
from minilora.data.text import TextTokenizer
from minilora.formats.files import FileError
from minilora.formats.gguf import GGUFFile
from minilora.formats.gguf_writer import write_gguf
from minilora.formats.huggingface import load_huggingface, save_huggingface
from minilora.formats.llama_gguf import find_model, gguf_name, load_gguf, save_gguf
from minilora.injection import inject_lora
from minilora.merging import merge
from minilora.parameters import Gradients
from minilora.training.loss import shard_loss

pytestmark = pytest.mark.peers
TEXT = re.sub(r"\s+", " ", statistics.__doc__ or "")
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


@pytest.fixture(scope="module")
def path():
    """The file inside the package."""
    try:
        return find_model("smollm2")
    except FileError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def ours(path):
    """Our model of it, all blocks in place."""
    return load_gguf(path)


@pytest.fixture(scope="module")
def text(path):
    """A real text, as ids (1, T) of a few hundred tokens."""
    return np.array([TextTokenizer.from_gguf(GGUFFile(path).metadata).encode(TEXT)])


def opened(torch, transformers, path):
    """transformers' model of a GGUF, which it makes dense in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
        ).eval()


@pytest.fixture(scope="module")
def theirs(torch, transformers, path):
    """One for all tests: opening takes 18 s."""
    pytest.importorskip("gguf")
    return opened(torch, transformers, path)


def logits_of(torch, model, ids):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()


def error_of(found, expected):
    """The largest difference, relative to the range of the logits."""
    return float(np.abs(found - expected).max() / np.ptp(expected))


def perplexity(logits, ids):
    """exp of the mean cross-entropy of each next token, in float64."""
    logits = logits[0, :-1].astype(np.float64)
    top = logits.max(axis=-1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=-1)) + top
    return math.exp((total - logits[np.arange(len(logits)), ids[0, 1:]]).mean())


def test_weights_are_the_numbers_that_transformers_reads(ours, theirs):
    state = theirs.state_dict()
    for name, linear in ours.linears():
        assert np.array_equal(linear.weight.dense(), state[f"{name}.weight"].numpy()), name
    for p in ours.parameters():
        assert np.array_equal(p.data, state[p.name].numpy()), p.name
    assert (
        ours.tied
        and ours.config.head_dim == 64
        and theirs.config.rope_parameters["rope_theta"] == ours.config.rope_theta
    )


def test_logits_and_perplexity_of_a_real_text(torch, ours, theirs, text):
    assert 200 <= text.shape[1] <= 3000
    ids = text[:, :512]
    found, expected = ours.logits(ids), logits_of(torch, theirs, ids)
    error, (a, b) = error_of(found, expected), (perplexity(found, ids), perplexity(expected, ids))
    print(f"logits: {error:.1e} of their range; perplexity of {ids.shape[1]} tokens: {a:.6f} and {b:.6f}")
    assert error < 1e-4 and f"{a:.4g}" == f"{b:.4g}"
    rows = np.random.default_rng(0).integers(0, ours.config.vocab_size, (3, 17))  # any tokens, several rows
    assert error_of(ours.logits(rows), logits_of(torch, theirs, rows)) < 1e-4


def test_gradients_of_all_adapters(torch, peft, ours, theirs, text):
    """r = 8 on all linear layers, B not zero: dA and dB of 210 adapters against PEFT's, 1e-3 relative to the
    largest."""
    model = inject_lora(ours, LORA, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    for p in model.trainable():
        if "lora_B" in p.name:
            p.data[...] = 0.01 * rng.standard_normal(p.data.shape)
    ids = text[0, : 2 * 33].reshape(2, 33)
    batch = Batch(ids[:, :-1], ids[:, 1:], np.ones((2, 32), bool))
    grads = Gradients(model.trainable())
    loss = shard_loss(model, batch, 64.0, grads)
    settings = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=list(LORA.target_modules), task_type="CAUSAL_LM"
    )
    peer = peft.get_peft_model(theirs, settings).eval()
    try:
        named = dict(peer.named_parameters())
        names = {p.name: f"base_model.model.{p.name.removesuffix('.weight')}.default.weight" for p in grads}
        with torch.no_grad():
            for p in grads:
                named[names[p.name]].copy_(torch.from_numpy(p.data))
        logits = peer(input_ids=torch.from_numpy(batch.ids)).logits
        expected = torch.nn.functional.cross_entropy(
            logits.reshape(64, -1), torch.from_numpy(batch.targets).reshape(-1)
        )
        expected.backward()
        assert len(grads) == 2 * 7 * 30 == sum(p.requires_grad for p in peer.parameters())
        assert abs(loss - expected.item()) < 1e-5 * expected.item()
        worst = 0.0
        for p, gradient in grads.items():
            reference = named[names[p.name]].grad.numpy()
            assert np.abs(reference).max() > 0, p.name
            worst = max(worst, float(np.abs(gradient - reference).max() / np.abs(reference).max()))
        print(f"gradients of A and B: {worst:.1e} of the largest of each array")
        assert worst < 1e-3
    finally:
        peer.unload()


def test_what_is_loaded_is_saved_to_the_byte(ours, path, tmp_path):
    assert save_gguf(ours, tmp_path / "again.gguf", like=path) == {}
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def moved(model):
    """QA-LoRA adapters with B not zero, merged: every offset has moved."""
    injected = inject_lora(model, replace(LORA, use_qalora=True), np.random.default_rng(0))
    rng = np.random.default_rng(2)
    for p in injected.trainable():
        if "lora_B" in p.name:
            p.data[...] = 2e-3 * rng.standard_normal(p.data.shape)
    return merge(injected)[0]


def test_a_tuned_file_is_opened_by_gguf_and_transformers(torch, transformers, ours, path, text, tmp_path):
    """Codes bit-identical, offsets rounded to float16, metadata equal; their logits of the file are ours."""
    gguf = pytest.importorskip("gguf")
    tuned = moved(ours)
    changes = save_gguf(tuned, tmp_path / "tuned.gguf", like=path)
    offsets = {
        gguf_name(f"{name}.weight"): linear.weight.offset
        for name, linear in tuned.linears()
        if name != "lm_head"
    }
    assert len(changes) == 210 and all(
        0 < changes[name] <= 2**-11 * np.abs(offset).max() for name, offset in offsets.items()
    )
    print(f"float16 changes an offset by up to {max(changes.values()):.1e}")
    old, new = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "tuned.gguf")
    places = [[(t.name, t.tensor_type, t.data_offset) for t in reader.tensors] for reader in (old, new)]
    assert places[0] == places[1]
    for name, field in old.fields.items():
        same = new.fields[name]
        assert same.types == field.types and same.contents() == field.contents(), name
    for before, after in zip(old.tensors, new.tensors, strict=True):
        a, b = before.data.reshape(-1), after.data.reshape(-1)
        if before.tensor_type.name == "Q4_1":
            a, b = a.reshape(-1, 20), b.reshape(-1, 20)
            assert np.array_equal(a[:, :2], b[:, :2]) and np.array_equal(a[:, 4:], b[:, 4:]), before.name
            assert not np.array_equal(a[:, 2:4], b[:, 2:4]), before.name
        else:
            assert np.array_equal(a, b), before.name
    again, peer = load_gguf(tmp_path / "tuned.gguf"), opened(torch, transformers, tmp_path / "tuned.gguf")
    ids = text[:, :64]
    logits = again.logits(ids)
    assert error_of(logits, logits_of(torch, peer, ids)) < 1e-4 < error_of(logits, ours.logits(ids))
    del peer
    gc.collect()


# ---- small models: what SmolLM2's file does not have

SMALL = {
    "vocab_size": 41,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    # an original length at which the 8 pairs are of all three kinds: kept, in between and slowed
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
EPS = float(np.finfo(np.float32).eps)
ROUNDING = 4 * EPS * (96 * 2 * 9 * 2) ** 0.5 + 64 * EPS  # as in test_transformers, for 64 positions


def random_llama(torch, transformers, rope, **changes):
    torch.manual_seed(0)
    settings = (
        SMALL
        | changes
        | {"rope_parameters": dict(rope), "initializer_range": 0.3, "attn_implementation": "eager"}
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


SMALL_IDS = np.random.default_rng(0).integers(0, 41, (2, 64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_folders_with_scaled_rotary_positions(torch, transformers, tmp_path, rope, tied):
    """Theirs opened by us, and, where the format can say it, ours opened by them."""
    peer = random_llama(torch, transformers, ROPES[rope], tie_word_embeddings=tied)
    peer.save_pretrained(tmp_path / "theirs")
    model = load_huggingface(tmp_path / "theirs")
    expected = logits_of(torch, peer, SMALL_IDS)
    assert_close(model.logits(SMALL_IDS), expected, ROUNDING, rope)
    assert (model.config.rope_factors is None) == (rope == "default")
    if rope != "default":
        plain = model.map_linears(lambda linear: linear)
        plain.config = replace(model.config, rope_factors=None)
        assert error_of(plain.logits(SMALL_IDS), expected) > 1e-3  # the scaling matters
    if rope != "llama3":  # of Llama 3's, those with an original length of 8192 have a name: the next test
        save_huggingface(model, tmp_path / "ours")
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", attn_implementation="eager"
        )
        assert_close(logits_of(torch, again.eval(), SMALL_IDS), expected, EPS, rope)


def test_llama_3_settings_are_recognised_in_its_factors(torch, transformers, tmp_path):
    rope = ROPES["llama3"] | {
        "rope_theta": 500000.0,
        "original_max_position_embeddings": 8192,
        "factor": 32.0,
    }
    peer = random_llama(torch, transformers, rope)
    peer.save_pretrained(tmp_path / "theirs")
    save_huggingface(load_huggingface(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert {key: again.config.rope_parameters[key] for key in rope} == rope
    assert np.array_equal(logits_of(torch, again.eval(), SMALL_IDS), logits_of(torch, peer, SMALL_IDS))


def interleaved(w, heads):
    """As convert_hf_to_gguf.py permutes q and k."""
    return np.ascontiguousarray(
        w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
    )


NAMES = {
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
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture
def small_file(torch, transformers, tmp_path):
    """(their random model with a head of its own, the same as an F32 GGUF)."""
    peer = random_llama(torch, transformers, ROPES["default"])
    tensors = {}
    for name, value in peer.state_dict().items():
        module, w = name.removesuffix(".weight"), value.numpy()
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            w = (
                interleaved(w, 4)
                if rest.endswith("q_proj")
                else interleaved(w, 2)
                if rest.endswith("k_proj")
                else w
            )
            tensors[f"blk.{layer}.{NAMES[rest]}.weight"] = w
        else:
            tensors[f"{OUTSIDE[module]}.weight"] = w
    metadata = {
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": peer.config.rms_norm_eps,
        "llama.vocab_size": 41,
    }
    write_gguf(tmp_path / "small.gguf", tensors, metadata)
    return peer, tmp_path / "small.gguf"


def test_a_file_with_grouped_queries_and_a_head_of_its_own(torch, small_file):
    peer, path = small_file
    model = load_gguf(path)
    assert model.config == replace(
        ModelConfig(**{k: v for k, v in SMALL.items() if k != "max_position_embeddings"}),
        context_length=64,
        rope_theta=10000.0,
        rms_norm_eps=model.config.rms_norm_eps,
    )
    assert_close(model.logits(SMALL_IDS), logits_of(torch, peer, SMALL_IDS), ROUNDING)


@pytest.mark.parametrize("quant_type", ["F32", "F16", "Q8_0", "Q4_1", "Q4_0"])
def test_every_type_that_we_write_is_opened_by_transformers(
    torch, transformers, small_file, tmp_path, quant_type
):
    pytest.importorskip("gguf")
    _, path = small_file
    model = load_gguf(path)
    save_gguf(model, tmp_path / "other.gguf", path, quant_type)
    again, peer = load_gguf(tmp_path / "other.gguf"), opened(torch, transformers, tmp_path / "other.gguf")
    for name, linear in again.linears():
        assert np.array_equal(linear.weight.dense(), peer.state_dict()[f"{name}.weight"].numpy()), name
    expected = logits_of(torch, peer, SMALL_IDS)
    assert_close(again.logits(SMALL_IDS), expected, ROUNDING, quant_type)
    assert (error_of(model.logits(SMALL_IDS), expected) > ROUNDING) == (
        quant_type != "F32"
    )  # what is stored has changed
