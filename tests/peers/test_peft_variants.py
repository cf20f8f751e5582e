"""Live against PEFT: DoRA, PiSSA, LoftQ, rank and alpha patterns, QA-LoRA written as LoRA, LoRA+.

Where PEFT differs from its paper or from itself, a test says so, and fails when PEFT changes:

1. LoftQ: PEFT does not divide by the scaling s, so that its start answers s times the rounding error;
2. patterns: PEFT takes the first that matches, but writes them sorted: a folder of overlapping patterns may
  mean another model;
3. PiSSA with DoRA: PEFT's conversion to ordinary LoRA leaves the lengths out;
4. LoRA+: PEFT gives B's learning rate to DoRA's lengths too.

DoRA is compared without dropout: PEFT drops the inputs of the base too, we only those of A.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from helpers import adapters, assert_close
from test_peft import ARRAYS, CONFIG, IDS, MASK, RTOL, TARGETS, logits_of, peft_name, torch_model

from minilora.building import build_model, parameter_shapes
from minilora.config import LoraConfig, QuantConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.formats.files import FileError, read_json, read_tensors
from minilora.formats.peft import load_adapter, save_adapter
from minilora.injection import inject_lora
from minilora.merging import merge
from minilora.parameters import Gradients
from minilora.quant import CodebookWeight, codebooks, quantize_weight
from minilora.quant.model import quantize_model
from minilora.training.loss import shard_loss
from minilora.training.optimizers import AdamW
from minilora.variants import DoraLinear, loftq, lora_of

pytestmark = pytest.mark.peers
EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng
DORA = [
    LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj",), use_dora=True),
    LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj", "v_proj", "down_proj"), use_dora=True),
    LoraConfig(r=8, lora_alpha=8, use_rslora=True, use_dora=True),
    LoraConfig(r=24, lora_alpha=2, target_modules=("down_proj", "up_proj"), use_dora=True),
    LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=("lm_head", "layers.1.mlp.up_proj"), use_dora=True
    ),
]
PATTERNS = {
    "own names": LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"q_proj": 1, "up_proj": 7},
        alpha_pattern={"q_proj": 5, "o_proj": 0.5},
    ),
    "full names": LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"model.layers.1.self_attn.q_proj": 9},
        alpha_pattern={"model.layers.0.mlp.down_proj": 1},
    ),
    "suffixes": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=("q_proj", "down_proj"),
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "mlp.down_proj": 5},
        alpha_pattern={"1.mlp.down_proj": 9},
    ),
    "first of several": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=("q_proj",),
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 5},
        alpha_pattern={"1.self_attn.q_proj": 7, "q_proj": 3},
    ),
    "with DoRA": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=("v_proj", "lm_head"),
        use_dora=True,
        rank_pattern={"lm_head": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 2},
    ),
}
PISSA = [
    LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj",), init_lora_weights="pissa"),
    LoraConfig(
        r=4, lora_alpha=16, target_modules=("q_proj", "up_proj", "down_proj"), init_lora_weights="pissa"
    ),
    LoraConfig(r=3, lora_alpha=5, use_rslora=True, init_lora_weights="pissa"),
    LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=("q_proj", "down_proj"),
        init_lora_weights="pissa",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 9},
    ),
    LoraConfig(
        r=3, lora_alpha=5, target_modules=("v_proj", "gate_proj"), init_lora_weights="pissa", use_dora=True
    ),
]


def name_of(config):
    """A test's name."""
    rs, dora = "rs " if config.use_rslora else "", "d" if config.use_dora else ""
    return f"r{config.r} a{config.lora_alpha:g} {rs}{len(config.target_modules)}{dora}"


def base():
    """Our dense model."""
    return build_model(CONFIG, {k: v.copy() for k, v in ARRAYS.items()})


def injected(config):
    """An injected model, as it starts."""
    return inject_lora(base(), config, RNG(0))


def trained(config):
    """An injected model with random A and B, and lengths that are not the rows' own."""
    model, rng = injected(config), RNG(1)
    for p in model.trainable():
        if p.data.ndim == 1:
            p.data *= rng.uniform(0.5, 1.5, p.data.shape).astype(np.float32)
        else:
            p.data[...] = 0.3 * rng.standard_normal(p.data.shape)
    return model


def theirs(peft, torch, config, model=None, **settings):
    """PEFT's model of the same configuration; with what trains in ``model``, if given."""
    found = peft.get_peft_model(
        torch_model(CONFIG, ARRAYS),
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=list(config.target_modules),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            task_type="CAUSAL_LM",
            **settings,
        ),
    )
    if model is not None:
        named = dict(found.named_parameters())
        with torch.no_grad():
            for p in model.trainable():
                named[peft_name(p.name)].copy_(torch.from_numpy(p.data))
    return found.eval()


def opened(peft, folder, arrays=ARRAYS, config=CONFIG):
    """PEFT's model of a folder."""
    return peft.PeftModel.from_pretrained(torch_model(config, arrays), folder).eval()


def layers_of(peer):
    """PEFT's adapted layers by our names."""
    return {
        name.removeprefix("base_model.model."): m
        for name, m in peer.named_modules()
        if hasattr(m, "lora_A") and m.lora_A
    }


def same_parameters(model, peer):
    """Every trainable array, bit by bit."""
    named = dict(peer.named_parameters())
    for p in model.trainable():
        assert np.array_equal(named[peft_name(p.name)].detach().numpy(), p.data), p.name


def amplification(model):
    """How the rounding of n² = ‖w‖² + 2s·b·(A w) + s²·b A Aᵀ bᵀ, summed by its terms, grows in n: Σ|terms| /
    n², halved by √."""
    worst = 2.0
    for linear in adapters(model):
        w, a, b = (
            x.astype(np.float64)
            for x in (linear.base.weight.dense(), lora_of(linear).lora_A.data, lora_of(linear).lora_B.data)
        )
        s = lora_of(linear).scaling
        terms = (w * w).sum(1) + (
            np.abs(b) * (2 * s * np.abs(w @ a.T) + s * s * (np.abs(b) @ np.abs(a @ a.T)))
        ).sum(1)
        worst = max(worst, float((terms / np.square(w + s * b @ a).sum(1)).max()))
    return worst / 2


# --- DoRA ---------------------------------------------------------------------------------------------------

every_dora = pytest.mark.parametrize("config", DORA, ids=name_of)


@every_dora
def test_doras_lengths_start_as_theirs(torch, peft, config):
    """Both are ‖row of W‖, ours of a sum in double precision: theirs is off by the rounding of a sum of
    squares."""
    found = {linear.name: linear.magnitude.data for linear in adapters(injected(config))}
    peer = layers_of(theirs(peft, torch, config))
    assert set(found) == set(peer)
    for name, m in found.items():
        np.testing.assert_allclose(
            m, peer[name].lora_magnitude_vector["default"].weight.detach().numpy(), rtol=34**0.5 * EPS
        )


@every_dora
def test_doras_forward_and_backward(torch, peft, config):
    model = trained(config)
    peer = theirs(peft, torch, config, model)
    logits = peer(input_ids=torch.from_numpy(IDS)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 29), torch.from_numpy(np.where(MASK, TARGETS, -100)).reshape(-1)
    )
    loss.backward()
    grads = Gradients(model.trainable())
    found = shard_loss(model, Batch(IDS, TARGETS, MASK), float(MASK.sum()), grads)
    rtol = RTOL * amplification(model)
    assert_close(model.logits(IDS), logits.detach().numpy(), rtol, "logits")
    assert abs(found - loss.item()) <= rtol * loss.item()
    wanted = {name: p.grad.numpy() for name, p in peer.named_parameters() if p.requires_grad}
    assert set(wanted) == {peft_name(p.name) for p in grads} and any("magnitude" in name for name in wanted)
    for p, g in grads.items():
        assert_close(g, wanted[peft_name(p.name)], rtol, p.name)


@every_dora
def test_doras_merged_weights(torch, peft, config):
    model = trained(config)
    merged = {linear.name: linear for _, linear in merge(model)[0].linears()}
    state = dict(theirs(peft, torch, config, model).merge_and_unload().named_parameters())
    for linear in adapters(model):
        weight = merged[linear.name].weight.dense()
        # theirs in float32: a product of r terms, a sum, a norm of 34 squares, a division and a product
        assert_close(
            weight,
            state[f"{linear.name}.weight"].detach().numpy(),
            (4 + config.r + 34**0.5) * EPS,
            linear.name,
        )
        assert np.abs(weight - linear.base.weight.dense()).max() > 1e-2


@every_dora
def test_peft_loads_our_dora_folder(torch, peft, config, tmp_path):
    model = trained(config)
    save_adapter(model, config, tmp_path)
    peer = opened(peft, tmp_path)
    same_parameters(model, peer)
    assert_close(model.logits(IDS), logits_of(torch, peer), RTOL * amplification(model))


@every_dora
def test_we_load_pefts_dora_folder(torch, peft, config, tmp_path):
    model = trained(config)
    theirs(peft, torch, config, model).save_pretrained(tmp_path)
    found, loaded = load_adapter(base(), tmp_path)
    assert loaded.use_dora and np.array_equal(found.logits(IDS), model.logits(IDS))


# --- PiSSA --------------------------------------------------------------------------------------------------

every_pissa = pytest.mark.parametrize("config", PISSA, ids=name_of)


def moved(a, b):
    """A' and B' after "training": products from the right and left, which do not depend on the signs of the
    singular pairs."""
    rng = RNG(3)
    right = np.eye(a.shape[1]) + 0.2 * rng.standard_normal((a.shape[1],) * 2) / a.shape[1] ** 0.5
    left = np.eye(len(b)) + 0.2 * rng.standard_normal((len(b),) * 2) / len(b) ** 0.5
    return (a @ right).astype(np.float32), (left @ b).astype(np.float32)


def svd_rounding(w, r):
    """Largest angle by which float32 turns the first r singular vectors, and their span (Wedin):
    √(out·in)·eps·σ₁ / gap."""
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    error = w.size**0.5 * EPS * s[0]
    gaps = -np.diff(np.append(s, 0.0))
    return error / gaps[:r].min(), error / gaps[r - 1]


@every_pissa
def test_pissa_starts_as_theirs(torch, peft, config):
    model, peer = injected(config), layers_of(theirs(peft, torch, config, init_lora_weights="pissa"))
    assert set(peer) == {linear.name for linear in adapters(model)}
    for linear in adapters(model):
        w, layer = ARRAYS[f"{linear.name}.weight"], peer[linear.name]
        a, b = (getattr(layer, k)["default"].weight.detach().numpy() for k in ("lora_A", "lora_B"))
        angle, span = svd_rounding(w, len(a))
        sign = np.sign((a * lora_of(linear).lora_A.data).sum(axis=1))
        assert_close(lora_of(linear).lora_A.data, sign[:, None] * a, angle, "A")
        assert_close(lora_of(linear).lora_B.data, sign * b, angle, "B")
        # W − s·B A of ours and theirs differ by how the span turns, times σ₁ ≤ the largest element times
        # √(out·in)
        residual = layer.base_layer.weight.detach().numpy()
        difference = np.linalg.norm(linear.base.weight.dense().astype(np.float64) - residual, 2)
        assert difference <= span * np.linalg.norm(w, 2)
        assert np.abs(residual - w).max() > 0.1
    assert_close(
        model.logits(IDS), logits_of(torch, theirs(peft, torch, config, init_lora_weights="pissa")), RTOL
    )


@every_pissa
def test_our_pissa_folder_is_ordinary_lora_for_peft(torch, peft, config, tmp_path):
    """Over the original base, in rank 2r, PEFT computes what our model does over its residual."""
    model = injected(config)
    for linear in adapters(model):
        lora_of(linear).lora_A.data, lora_of(linear).lora_B.data = moved(
            lora_of(linear).lora_A.data, lora_of(linear).lora_B.data
        )
        if isinstance(linear, DoraLinear):
            linear.magnitude.data *= 1.1
    save_adapter(model, config, tmp_path)
    peer = opened(peft, tmp_path)
    for linear in adapters(model):
        layer, own = layers_of(peer)[linear.name], config.of(linear.name)
        assert layer.r["default"] == 2 * own.r and layer.scaling["default"] == pytest.approx(
            own.scaling, rel=1e-15
        )
    assert_close(model.logits(IDS), logits_of(torch, peer), RTOL)
    assert np.abs(model.logits(IDS) - base().logits(IDS)).max() > 0.1


@pytest.mark.parametrize("config", PISSA[:-1], ids=name_of)
def test_pefts_own_conversion_of_pissa_gives_the_same_delta(torch, peft, config, tmp_path):
    peer = theirs(peft, torch, config, init_lora_weights="pissa")
    peer.peft_config["default"].init_lora_weights = True  # as PEFT's documentation of the conversion says
    peer.save_pretrained(tmp_path / "start")
    model = injected(config)
    layers = layers_of(peer)
    for linear in adapters(model):
        lora_of(linear).lora_A.data, lora_of(linear).lora_B.data = moved(
            lora_of(linear).lora_A.data, lora_of(linear).lora_B.data
        )
        a, b = layers[linear.name].lora_A["default"].weight, layers[linear.name].lora_B["default"].weight
        a.data, b.data = map(torch.from_numpy, moved(a.detach().numpy(), b.detach().numpy()))
    peer.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    save_adapter(model, config, tmp_path / "ours")
    (found, converted), (again, own) = (
        load_adapter(base(), tmp_path / "end"),
        load_adapter(base(), tmp_path / "ours"),
    )
    assert (converted.r, dict(converted.rank_pattern)) == (own.r, dict(own.rank_pattern))
    for linear, other in zip(adapters(found), adapters(again), strict=True):
        w = ARRAYS[f"{linear.name}.weight"]
        _, span = svd_rounding(w, len(lora_of(linear).lora_A.data) // 2)
        # the span of the start turns by its rounding; `moved` stretches by at most ‖left‖·‖right‖ < 2²
        assert np.linalg.norm(linear.delta() - other.delta(), 2) <= 4 * span * np.linalg.norm(w, 2), (
            linear.name
        )
        assert np.abs(linear.delta()).max() > 1e-2
    assert_close(found.logits(IDS), again.logits(IDS), RTOL)


def test_pefts_conversion_of_pissa_forgets_doras_lengths(torch, peft, tmp_path):
    """Its folder says use_dora and holds A and B alone: we refuse it, while ours (tested above) has the
    lengths."""
    peer = theirs(peft, torch, PISSA[-1], init_lora_weights="pissa")
    peer.peft_config["default"].init_lora_weights = True
    peer.save_pretrained(tmp_path / "start")
    peer.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(FileError, match="lora_magnitude_vector is missing"):
        load_adapter(base(), tmp_path / "end")


# --- LoftQ --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loftq_init(peft):
    """PEFT's own function, which asks for a GPU, with the one line that names the device changed to the
    CPU."""
    pytest.importorskip("bitsandbytes")
    from peft.utils import loftq_utils

    source = textwrap.dedent(inspect.getsource(loftq_utils.loftq_init))
    asked = 'compute_device = "xpu" if is_xpu_available() else "cuda"'
    assert source.count(asked) == 1
    space = dict(vars(loftq_utils))
    exec(compile(source.replace(asked, 'compute_device = "cpu"'), "loftq_init", "exec"), space)
    return space["loftq_init"]


BNB_NF4 = QuantConfig("nf4", block_size=64, double_quant=False)
"""What their function asks bitsandbytes for."""


def codes_of(dense):
    """Codes and scales of a decoded NF4 matrix of whole blocks: ±absmax is in each of them, or the block is
    zero."""
    blocks = np.asarray(dense, np.float32).reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    return np.abs((blocks / absmax)[..., None] - codebooks.code_map("nf4")).argmin(axis=-1).reshape(
        -1
    ), absmax[:, 0]


# with AVX-512 bitsandbytes 0.50 decodes rows wrongly whose length is a multiple of 16, but no whole number of
# blocks: none here
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shape, r", [((48, 64), 4), ((24, 40), 1), ((32, 128), 16)])
def test_loftq_finds_their_codes_and_product(torch, loftq_init, steps, shape, r):
    w = RNG(r).standard_normal(shape).astype(np.float32)
    theirs_q, their_a, their_b = (x.numpy() for x in loftq_init(torch.from_numpy(w), 4, r, steps))
    weight, a, b = loftq(w, r, 1.0, lambda x: quantize_weight(x, BNB_NF4), steps)
    assert isinstance(weight, CodebookWeight)
    codes, absmax = codes_of(theirs_q)
    assert np.array_equal(weight.unpacked().reshape(-1), codes)
    # the first input of the quantizer is W itself: the same bits; later ones hold a float32 SVD's rounding
    residual = w - weight.dense()
    _, span = svd_rounding(residual, r)
    if steps == 1:
        assert np.array_equal(weight.dense(), theirs_q)
    else:
        assert np.abs(weight.scales - absmax).max() <= span * np.linalg.norm(residual, 2)
    # each round adds its own rounding
    difference = b.astype(np.float64) @ a - their_b.astype(np.float64) @ their_a
    assert np.linalg.norm(difference, 2) <= steps * span * np.linalg.norm(residual, 2)


@pytest.mark.parametrize("alpha, rslora", [(8, False), (32, False), (8, True)])
def test_pefts_loftq_start_is_off_by_the_scaling_and_ours_is_not(
    torch, peft, loftq_init, monkeypatch, alpha, rslora
):
    from peft.tuners.lora import layer as their_layer

    config = LoraConfig(
        r=8, lora_alpha=alpha, target_modules=("q_proj", "v_proj", "o_proj"), use_rslora=rslora
    )
    s = config.scaling
    monkeypatch.setattr(their_layer, "loftq_init", loftq_init)
    peer = layers_of(
        theirs(
            peft, torch, config, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}
        )
    )
    model = inject_lora(base(), replace(config, init_lora_weights="loftq"), RNG(0), quant=BNB_NF4)
    for linear in adapters(model):
        w, q = ARRAYS[f"{linear.name}.weight"], linear.base.weight.dense()
        residual = w - q
        assert w.size % 64 == 0  # bitsandbytes rounds a short last block in another way
        assert np.array_equal(peer[linear.name].base_layer.weight.detach().numpy(), q)
        ours, found = linear.delta(), peer[linear.name].get_delta_weight("default").detach().numpy()
        _, span = svd_rounding(residual, 8)
        assert np.linalg.norm(found - s * ours, 2) <= s * span * np.linalg.norm(residual, 2)
        plain, left, theirs_left = (float(np.linalg.norm(residual - d)) for d in (0 * ours, ours, found))
        # residual − s·(best rank-8 part): its square is the rest's plus (s − 1)² times that part's
        assert left < plain
        assert theirs_left**2 == pytest.approx(
            left**2 + (s - 1) ** 2 * float(np.linalg.norm(ours)) ** 2, rel=1e-4
        )
        assert theirs_left > plain or s == 1


# --- rank and alpha patterns --------------------------------------------------------------------------------

every_pattern = pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS.keys())


def same_modules(model, peer):
    """Rank and scaling of each module."""
    layers = layers_of(peer)
    assert set(layers) == {linear.name for linear in adapters(model)}
    for linear in adapters(model):
        layer = layers[linear.name]
        assert (layer.r["default"], layer.scaling["default"]) == (
            len(lora_of(linear).lora_A.data),
            lora_of(linear).scaling,
        ), linear.name


@every_pattern
def test_patterns_mean_what_they_mean_to_peft(torch, peft, config):
    model = trained(config)
    peer = theirs(peft, torch, config, model)
    same_modules(model, peer)
    assert (
        len({(len(lora_of(linear).lora_A.data), lora_of(linear).scaling) for linear in adapters(model)}) > 1
    )
    assert_close(model.logits(IDS), logits_of(torch, peer), RTOL * amplification(model))


@every_pattern
def test_peft_loads_our_folder_with_patterns(torch, peft, config, tmp_path):
    model = trained(config)
    save_adapter(model, config, tmp_path)
    peer = opened(peft, tmp_path)
    same_modules(model, peer)
    same_parameters(model, peer)
    assert_close(model.logits(IDS), logits_of(torch, peer), RTOL * amplification(model))


@every_pattern
def test_we_load_pefts_folder_with_patterns(torch, peft, config, tmp_path):
    model = trained(config)
    theirs(peft, torch, config, model).save_pretrained(tmp_path)
    found, loaded = load_adapter(base(), tmp_path)
    assert (dict(loaded.rank_pattern), dict(loaded.alpha_pattern)) == (
        dict(config.rank_pattern),
        dict(config.alpha_pattern),
    )
    same_modules(found, opened(peft, tmp_path))
    assert np.array_equal(found.logits(IDS), model.logits(IDS))


def test_peft_sorts_patterns_on_writing_and_so_changes_their_meaning(torch, peft, tmp_path):
    """The first pattern that matches counts; their file has them in another order, and we read it as they
    do."""
    alphas = {"q_proj": 3, "layers.0.self_attn.q_proj": 9}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj",), alpha_pattern=alphas)
    model = trained(config)
    peer = theirs(peft, torch, config, model)
    same_modules(model, peer)
    assert {lora_of(linear).scaling for linear in adapters(model)} == {3 / 4}
    peer.save_pretrained(tmp_path / "theirs")
    assert list(read_json(tmp_path / "theirs" / "adapter_config.json")["alpha_pattern"]) == sorted(
        config.alpha_pattern
    )
    found, again = load_adapter(base(), tmp_path / "theirs")[0], opened(peft, tmp_path / "theirs")
    same_modules(found, again)
    assert {lora_of(linear).scaling for linear in adapters(found)} == {3 / 4, 9 / 4}
    assert_close(found.logits(IDS), logits_of(torch, again), RTOL)
    save_adapter(model, config, tmp_path / "ours")  # ours keeps the order, and so the meaning
    same_modules(model, opened(peft, tmp_path / "ours"))


# --- QA-LoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type, group_size", [("int4", 8), ("int2", 4), ("int3", 16), ("int8", 2)])
def test_peft_opens_our_qalora_as_ordinary_lora_and_merges_it_as_our_offsets(
    torch, peft, tmp_path, quant_type, group_size
):
    shape = replace(CONFIG, hidden_size=48, intermediate_size=64)
    rng = RNG(2)
    arrays = {
        k: (rng.standard_normal(s) * (1.2 / s[-1] ** 0.5)).astype(np.float32)
        if len(s) > 1
        else np.ones(s, np.float32)
        for k, s in parameter_shapes(shape).items()
    }
    quantized = quantize_model(build_model(shape, arrays), QuantConfig(quant_type, group_size=group_size))
    config = LoraConfig(
        r=3, lora_alpha=5, use_qalora=True, target_modules=("q_proj", "v_proj", "down_proj", "gate_proj")
    )
    model = inject_lora(quantized, config, RNG(0))
    for p in model.trainable():
        p.data[...] = 0.1 * rng.standard_normal(p.data.shape)
    save_adapter(model, config, tmp_path)
    dense = arrays | {f"{linear.name}.weight": linear.weight.dense() for _, linear in quantized.linears()}
    peer = opened(peft, tmp_path, dense, shape)
    # the rounding of test_peft for this shape; Σ over a group, then r products, is one sum longer there than
    # here
    rtol = 4 * EPS * (64 * 2 * 9 * 2 * 3) ** 0.5
    logits = logits_of(torch, peer)
    assert_close(model.logits(IDS), logits, rtol)
    assert np.abs(logits - quantized.logits(IDS)).max() > 0.1
    merged, state = merge(model)[0], dict(peer.merge_and_unload().named_parameters())
    changed = {linear.name for linear in adapters(model)}
    for _, linear in merged.linears():
        weight, theirs_weight = linear.weight.dense(), state[f"{linear.name}.weight"].detach().numpy()
        if linear.name in changed:
            # theirs: w, a product of r terms, a sum; ours: the offset once, scale·q + offset; in units of
            # their largest parts
            assert_close(weight, theirs_weight, (4 + config.r) * EPS, linear.name)
        else:
            assert np.array_equal(weight, theirs_weight), linear.name
    assert_close(merged.logits(IDS), logits, rtol)


# --- LoRA+ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_steps_as_theirs(torch, peft, ratio):
    """Three steps of AdamW with a learning rate of B of its own."""
    from peft.optimizers import create_loraplus_optimizer

    config, lr = LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj", "down_proj")), 1e-3
    model = trained(config)
    peer = theirs(peft, torch, config, model)
    optimizer = create_loraplus_optimizer(peer, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio)
    named = {name: p for name, p in peer.named_parameters() if p.requires_grad}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in named.items()} == {
        name: lr * (ratio if "lora_B" in name else 1) for name in named
    }
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    ours, rng, start = AdamW(model.trainable(), TrainConfig(lora_plus_ratio=ratio)), RNG(4), {}
    for _ in range(3):
        grads = Gradients(model.trainable())
        for p in model.trainable():
            start.setdefault(p.name, p.data.copy())
            g = rng.standard_normal(p.data.shape).astype(np.float32)
            grads.add(p, g)
            named[peft_name(p.name)].grad = torch.from_numpy(g.copy())
        ours.step(grads, lr)
        optimizer.step()
    for p in model.trainable():
        found, wanted = p.data - start[p.name], named[peft_name(p.name)].detach().numpy() - start[p.name]
        rate = lr * (ratio if "lora_B" in p.name else 1)
        # each of 3 steps: 8 roundings of an update of at most 3 times its rate, and one of p
        assert np.abs(found - wanted).max() <= 3 * (8 * EPS * 3 * rate + EPS * np.abs(p.data).max())
        assert np.abs(found).max() > rate


def test_pefts_lora_plus_counts_doras_lengths_as_b(torch, peft):
    """LoRA+ is about A and B; PEFT gives its higher rate to every parameter of one axis too."""
    from peft.optimizers import create_loraplus_optimizer

    peer = theirs(peft, torch, DORA[1])
    optimizer = create_loraplus_optimizer(peer, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    fast = {id(p) for group in optimizer.param_groups if group["lr"] > 1e-3 for p in group["params"]}
    named = {name for name, p in peer.named_parameters() if id(p) in fast}
    assert named == {
        name for name, _ in peer.named_parameters() if "lora_B" in name or "lora_magnitude" in name
    }


def test_the_files_of_both_hold_the_same_tensors(torch, peft, tmp_path):
    """The same names and bytes, DoRA's lengths among them."""
    config = replace(DORA[1], rank_pattern={"v_proj": 2})
    model = trained(config)
    save_adapter(model, config, tmp_path / "ours")
    theirs(peft, torch, config, model).save_pretrained(tmp_path / "theirs")
    ours, found = (
        read_tensors(tmp_path / side / "adapter_model.safetensors")[0] for side in ("ours", "theirs")
    )
    assert set(ours) == set(found) and all(ours[k].tobytes() == found[k].tobytes() for k in ours)
