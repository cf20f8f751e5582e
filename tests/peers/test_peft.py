"""Live against PEFT: forward, gradients, merged weights, the printed line, and adapter folders in both
directions."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import adapters, assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_golden import random_arrays, random_batch, torch_model

from minilora.building import build_model
from minilora.config import LoraConfig, ModelConfig
from minilora.data.tasks import Batch
from minilora.formats.peft import load_adapter, save_adapter
from minilora.injection import inject_lora
from minilora.memory import trainable_line
from minilora.merging import merge
from minilora.parameters import Gradients
from minilora.training.loss import shard_loss

pytestmark = pytest.mark.peers
CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=24,
    intermediate_size=34,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    context_length=16,
    tie_word_embeddings=False,
)
ARRAYS = random_arrays(CONFIG, 0)
IDS, TARGETS, MASK = random_batch(CONFIG, 0)
# the rounding of test_golden for this shape: 4·eps·√(widest · 2·9·layers); an adapter adds two sums to each
# of the 9
RTOL = 4 * float(np.finfo(np.float32).eps) * (34 * 2 * 9 * 2 * 3) ** 0.5
SETTINGS = [
    LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj",)),
    LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj", "v_proj")),
    LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules="all-linear"),
    LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=("k_proj", "o_proj", "gate_proj")),
    LoraConfig(r=24, lora_alpha=2, target_modules=("down_proj", "up_proj")),
    LoraConfig(r=2, lora_alpha=3, target_modules=("lm_head", "layers.1.mlp.up_proj")),
]
every_setting = pytest.mark.parametrize(
    "config",
    SETTINGS,
    ids=lambda c: f"r{c.r} a{c.lora_alpha:g} {'rs ' if c.use_rslora else ''}{len(c.target_modules)}",
)


def ours(config):
    """An injected model with random A and B, and those by PEFT's name."""
    model = inject_lora(
        build_model(CONFIG, {k: v.copy() for k, v in ARRAYS.items()}), config, np.random.default_rng(0)
    )
    rng = np.random.default_rng(1)
    for p in model.trainable():
        p.data[...] = 0.3 * rng.standard_normal(p.data.shape)
    return model


def theirs(peft, torch, config, model=None):
    """PEFT's model of the same configuration, with the A and B of ours."""
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    found = peft.get_peft_model(torch_model(CONFIG, ARRAYS), settings)
    if model is not None:
        named = dict(found.named_parameters())
        with torch.no_grad():
            for p in model.trainable():
                named[peft_name(p.name)].copy_(torch.from_numpy(p.data))
    return found.eval()


def peft_name(name):
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


def logits_of(torch, model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.numpy()


@every_setting
def test_forward_and_backward(torch, peft, config):
    model = ours(config)
    peer = theirs(peft, torch, config, model)
    logits = peer(input_ids=torch.from_numpy(IDS)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 29), torch.from_numpy(np.where(MASK, TARGETS, -100)).reshape(-1)
    )
    loss.backward()
    grads = Gradients(model.trainable())
    found = shard_loss(model, Batch(IDS, TARGETS, MASK), float(MASK.sum()), grads)
    assert_close(model.logits(IDS), logits.detach().numpy(), RTOL, "logits")
    assert abs(found - loss.item()) <= RTOL * loss.item()
    trained = {name: p for name, p in peer.named_parameters() if p.requires_grad}
    assert set(trained) == {peft_name(p.name) for p in grads}
    for p, g in grads.items():
        assert_close(g, trained[peft_name(p.name)].grad.numpy(), RTOL, p.name)


@every_setting
def test_merged_weights(torch, peft, config):
    model = ours(config)
    merged = {p.name: p.data for p in merge(model)[0].parameters()}
    peer = theirs(peft, torch, config, model).merge_and_unload()
    state = {name: p.detach().numpy() for name, p in peer.named_parameters()}
    changed = [f"{linear.name}.weight" for linear in adapters(model)]
    for name in merged:
        if name in changed:
            # theirs: float32 product of r terms, one float32 sum; ours is rounded once from double precision
            assert_close(merged[name], state[name], (2 + config.r) * float(np.finfo(np.float32).eps), name)
            assert np.abs(merged[name] - ARRAYS[name]).max() > 1e-3
        else:
            assert np.array_equal(merged[name], state[name]), name


@every_setting
def test_peft_loads_our_folder(torch, peft, config, tmp_path):
    model = ours(config)
    save_adapter(model, config, tmp_path)
    peer = peft.PeftModel.from_pretrained(torch_model(CONFIG, ARRAYS), tmp_path).eval()
    named = dict(peer.named_parameters())
    for p in model.trainable():
        assert np.array_equal(named[peft_name(p.name)].detach().numpy(), p.data), p.name
    assert_close(model.logits(IDS), logits_of(torch, peer), RTOL)
    base = torch_model(CONFIG, ARRAYS)
    assert np.abs(logits_of(torch, base) - model.logits(IDS)).max() > 100 * RTOL  # the adapter does something


@every_setting
def test_we_load_pefts_folder(torch, peft, config, tmp_path):
    model = ours(config)
    theirs(peft, torch, config, model).save_pretrained(tmp_path)
    found, loaded = load_adapter(build_model(CONFIG, ARRAYS), tmp_path)
    assert np.array_equal(found.logits(IDS), model.logits(IDS))
    assert (loaded.r, loaded.lora_alpha, loaded.use_rslora, loaded.scaling) == (
        config.r,
        config.lora_alpha,
        config.use_rslora,
        config.scaling,
    )


@every_setting
def test_the_line_that_peft_prints(torch, peft, config):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        theirs(peft, torch, config).print_trainable_parameters()
    assert trainable_line(ours(config)) == text.getvalue().strip()


def test_their_default_a_has_the_spread_of_ours(torch, peft):
    """PEFT's kaiming(√5) is U(±1/√in), whose standard deviation is 1/√(3·in)."""
    config = LoraConfig(r=16, lora_alpha=16, target_modules=("q_proj", "up_proj", "gate_proj"))
    peer = theirs(peft, torch, config)
    a = np.concatenate(
        [p.detach().numpy().reshape(-1) for name, p in peer.named_parameters() if "lora_A" in name]
    )
    model = inject_lora(build_model(CONFIG, ARRAYS), config, np.random.default_rng(0))
    mine = np.concatenate([linear.lora_A.data.reshape(-1) for linear in adapters(model)])
    for values in (a, mine):
        assert abs(values.std() * (3 * 24) ** 0.5 - 1) < 5 / (2 * values.size) ** 0.5
    assert all(not p.detach().numpy().any() for name, p in peer.named_parameters() if "lora_B" in name)
