"""DoRA, PiSSA, LoftQ, rank and alpha patterns: gradients, exact starts, merging, files, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import GQA, adapters, assert_close, fill_adapters, make_linear, make_model, random_batch

from minilora.config import ConfigError, LoraConfig, QuantConfig, TrainConfig
from minilora.formats.files import FileError, read_json, read_tensors
from minilora.formats.peft import fill_adapter, load_adapter, save_adapter
from minilora.injection import inject_lora
from minilora.layers import Linear
from minilora.memory import count_parameters, model_bytes
from minilora.merging import merge, merge_linear
from minilora.parameters import Gradients
from minilora.quant import AffineWeight, CodebookWeight, quantize_weight
from minilora.quant.model import quantize_model
from minilora.training.gradcheck import gradcheck
from minilora.training.loss import shard_loss
from minilora.variants import adapt, loftq, pissa, svd_factors

IDS = np.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
RNG = np.random.default_rng
NF4 = QuantConfig("nf4", 32)
# as in peers/test_peft: 4·eps·√(widest · 2·9·layers), and an adapter adds two sums to each of the 9
RTOL = (
    4 * float(np.finfo(np.float32).eps) * (GQA.intermediate_size * 2 * 9 * GQA.num_hidden_layers * 3) ** 0.5
)


def config(**settings):
    return LoraConfig(**({"r": 3, "lora_alpha": 5} | settings))


def dora(quant=None, dtype=np.float64, seed=1):
    """A DoRA layer with random A, B and lengths that differ from ‖W + sBA‖."""
    base = make_linear(7, 12, dtype=dtype)
    base = base if quant is None else Linear(base.name, quantize_weight(base.weight.dense(), quant))
    layer = fill_adapters(adapt(base, config(use_dora=True), RNG(0)), seed)
    layer.magnitude.data = layer.magnitude.data * RNG(5).uniform(0.5, 1.5, 7).astype(dtype)
    return layer


def explicit(layer, x):
    """y = x W'ᵀ with W' = m ∘ (W + sBA)/‖W + sBA‖, by the definition."""
    whole = (
        layer.base.weight.dense().astype(np.float64)
        + layer.lora.scaling * layer.lora.lora_B.data @ layer.lora.lora_A.data
    )
    return x @ (layer.magnitude.data[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)).T


def check_gradients(layer):
    """dx and the gradients of all that trains, against central differences of a random projection of the
    output."""
    x, weights = RNG(6).standard_normal((3, 12)), RNG(7).standard_normal((3, 7))
    y, cache = layer.forward(x)
    grads = Gradients(layer.trained())
    dx = layer.backward(weights.copy(), cache, grads)
    arrays = {"x": x} | {p.name: p.data for p in layer.trained()}
    checks = gradcheck(
        lambda: float((layer.forward(x)[0] * weights).sum()),
        arrays,
        {"x": dx} | {p.name: g for p, g in grads.items()},
    )
    assert len(checks) == len(layer.trained()) + 1 and all(check.passed for check in checks)


# --- DoRA ---------------------------------------------------------------------------------------------------


def test_dora_starts_as_the_base():
    layer = adapt(make_linear(7, 12), config(use_dora=True), RNG(0))
    x = RNG(2).standard_normal((4, 12))
    np.testing.assert_allclose(layer.forward(x)[0], layer.base.forward(x)[0], rtol=1e-14)
    np.testing.assert_allclose(
        layer.magnitude.data, np.linalg.norm(layer.base.weight.dense(), axis=1), rtol=1e-14
    )
    assert [p.name for p in layer.trained()] == [
        "q_proj.lora_A.weight",
        "q_proj.lora_B.weight",
        "q_proj.lora_magnitude_vector",
    ]


@pytest.mark.parametrize("quant", [None, QuantConfig("int4", group_size=4), NF4])
def test_dora_is_its_formula_and_merges(quant):
    layer, x = dora(quant), RNG(3).standard_normal((2, 5, 12))
    np.testing.assert_allclose(
        layer.forward(x)[0], explicit(layer, x), rtol=1e-5 if quant else 1e-12, atol=1e-6 if quant else 0
    )
    merged, error = merge_linear(layer, "dense")
    np.testing.assert_allclose(x @ merged.dense().T, explicit(layer, x), rtol=1e-5, atol=1e-6)
    assert error.max_abs < 1e-6


def test_a_row_of_zeros_has_no_direction_and_gives_no_nan():
    base = make_linear(4, 6, dtype=np.float32)
    base.weight.param.data[1] = 0
    layer = adapt(base, config(use_dora=True), RNG(0))
    y, cache = layer.forward(np.ones((2, 6), np.float32))
    grads = Gradients(layer.trained())
    dx = layer.backward(np.ones_like(y), cache, grads)
    assert (
        np.isfinite(y).all() and np.isfinite(dx).all() and all(np.isfinite(g).all() for g in grads.values())
    )
    assert np.isfinite(merge_linear(layer)[0].dense()).all()


def test_dora_gradients_with_the_norm_held_constant():
    """The paper holds n constant (section 4.3); with n frozen at its value the backward must be the
    derivative."""
    layer = dora()
    n = layer.row_norms()
    layer.row_norms = lambda: n
    check_gradients(layer)


def test_dora_trains_a_model_and_counts_its_lengths(fake_task):
    from minilora.training.trainer import Trainer

    model = inject_lora(make_model(dtype=np.float32, trainable=False), config(use_dora=True), RNG(0))
    outs = sum(linear.shape[0] for linear in adapters(model))
    plain = inject_lora(make_model(dtype=np.float32, trainable=False), config(), RNG(0))
    assert count_parameters(model)[0] == count_parameters(plain)[0] + outs
    assert model_bytes(model)["adapters"] == model_bytes(plain)["adapters"] + 4 * outs
    before = [linear.magnitude.data.copy() for linear in adapters(model)]
    history = Trainer(model, fake_task, TrainConfig(steps=30, batch_size=6, learning_rate=1e-2)).train()
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]
    assert all(
        not np.array_equal(b, linear.magnitude.data)
        for b, linear in zip(before, adapters(model), strict=True)
    )
    merged, _ = merge(model)
    assert_close(merged.logits(IDS), model.logits(IDS), RTOL)


# --- PiSSA --------------------------------------------------------------------------------------------------


def test_low_rank_is_the_best_approximation():
    m = RNG(0).standard_normal((9, 14))
    a, b = svd_factors(m, 4, 2.5)
    singular = np.linalg.svd(m, compute_uv=False)
    assert np.linalg.norm(m - 2.5 * b @ a) == pytest.approx(
        np.sqrt((singular[4:] ** 2).sum()), rel=1e-12
    )  # Eckart and Young
    np.testing.assert_allclose((a * a).sum(axis=1), (b * b).sum(axis=0), rtol=1e-12)  # S is shared evenly
    assert (a[np.arange(4), np.abs(a).argmax(axis=1)] > 0).all()


def test_pissa_changes_nothing_at_first_and_takes_the_principal_part():
    w = RNG(1).standard_normal((9, 14)).astype(np.float32)
    residual, a, b = pissa(w, 3, 5 / 3)
    np.testing.assert_allclose(residual + 5 / 3 * b @ a, w, atol=4e-6)
    assert np.linalg.norm(residual) < np.linalg.norm(w) and np.linalg.matrix_rank(residual, tol=1e-4) == 6
    base = make_model(dtype=np.float32, trainable=False)
    model = inject_lora(base, config(init_lora_weights="pissa"), RNG(0))
    assert_close(model.logits(IDS), base.logits(IDS), RTOL)
    assert all(linear.lora_B.data.any() for linear in adapters(model))
    assert base.blocks[0].attention.q_proj.weight is not adapters(model)[0].base.weight


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_saved_as_an_ordinary_adapter_of_twice_the_rank(tmp_path, rslora):
    base = make_model(dtype=np.float32, trainable=False)
    settings = config(
        init_lora_weights="pissa", use_rslora=rslora, rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 7}
    )
    model = inject_lora(base, settings, RNG(0))
    for linear in adapters(model):  # "training"
        linear.lora_A.data += 0.1 * RNG(2).standard_normal(linear.lora_A.data.shape).astype(np.float32)
    save_adapter(model, settings, tmp_path)
    found, loaded = load_adapter(base, tmp_path)
    assert loaded.r == 6 and loaded.init_lora_weights == "normal"
    assert_close(found.logits(IDS), model.logits(IDS), RTOL)


# --- LoftQ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [3.0, 24.0])
def test_loftq_divides_by_the_scaling_which_peft_forgets(alpha):
    """With α ≠ r the start without 1/s is further from W than no adapter at all."""
    w, s = RNG(3).standard_normal((24, 32)).astype(np.float32), alpha / 3

    def quantize(x):
        return quantize_weight(x, QuantConfig("nf2", 32))

    weight, a, b = loftq(w, 3, s, quantize)
    plain = np.linalg.norm(w - weight.dense())
    right = np.linalg.norm(w - weight.dense() - s * b @ a)
    forgotten = np.linalg.norm(
        w - weight.dense() - s * (s * b @ a)
    )  # PEFT's A and B hold the whole residual, and s comes again
    assert right < plain
    assert (forgotten > plain) if alpha > 6 else forgotten == pytest.approx(right, rel=1e-6)
    _, a1, b1 = loftq(w, 3, 1.0, quantize)
    np.testing.assert_allclose(s * b @ a, b1 @ a1, atol=1e-5)  # the product does not depend on s


def test_more_rounds_of_loftq_come_closer():
    w = RNG(4).standard_normal((24, 32)).astype(np.float32)
    errors = []
    for steps in (1, 5):
        weight, a, b = loftq(w, 4, 2.0, lambda x: quantize_weight(x, QuantConfig("nf2", 32)), steps)
        errors.append(np.linalg.norm(w - weight.dense() - 2.0 * b @ a))
    assert errors[1] < errors[0]


def test_loftq_in_a_model_is_closer_to_the_dense_one_than_qlora(tmp_path):
    base = make_model(dtype=np.float32, trainable=False)
    quant = QuantConfig("nf2", 32)
    settings = config(init_lora_weights="loftq", loftq_iter=3, lora_alpha=24)
    found = inject_lora(base, settings, RNG(0), quant=quant)
    plain = inject_lora(quantize_model(base, quant), config(), RNG(0))
    assert all(isinstance(linear.base.weight, CodebookWeight) for linear in adapters(found))

    def far(model):
        return sum(
            np.linalg.norm(linear.base.weight.dense() + linear.delta() - w.weight.dense())
            for linear, (_, w) in zip(adapters(model), base.linears(), strict=False)
        )

    assert far(found) < 0.9 * far(plain)
    fill_adapters(found)
    save_adapter(found, settings, tmp_path)
    again = inject_lora(base, settings, RNG(0), quant=quant)
    fill_adapter(again, tmp_path)
    assert np.array_equal(again.logits(IDS), found.logits(IDS))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_starts_train_and_pass_the_gradient_check_of_any_adapter(init):
    layer = adapt(
        make_linear(7, 12), config(init_lora_weights=init), RNG(0), quant=QuantConfig("int4", group_size=4)
    )
    assert isinstance(layer.base.weight, AffineWeight)
    for p in layer.trained():  # a check needs float64; a quantized base makes float32 adapters
        p.data = p.data.astype(np.float64)
    check_gradients(layer)


# --- patterns -----------------------------------------------------------------------------------------------


def test_patterns_give_modules_their_own_rank_and_alpha(tmp_path):
    settings = config(
        target_modules=("q_proj", "up_proj"),
        rank_pattern={"layers.1.mlp.up_proj": 5, "q_proj": 1},
        alpha_pattern={"up_proj": 9},
    )
    base = make_model(dtype=np.float32, trainable=False)
    model = fill_adapters(inject_lora(base, settings, RNG(0)))
    found = {
        linear.name.removeprefix("model.layers."): (len(linear.lora_A.data), linear.scaling)
        for linear in adapters(model)
    }
    assert found == {
        "0.self_attn.q_proj": (1, 5.0),
        "1.self_attn.q_proj": (1, 5.0),
        "0.mlp.up_proj": (3, 3.0),
        "1.mlp.up_proj": (5, 9 / 5),
    }
    save_adapter(model, settings, tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["rank_pattern"] == settings.rank_pattern
    again, loaded = load_adapter(base, tmp_path)
    assert np.array_equal(again.logits(IDS), model.logits(IDS)) and dict(loaded.alpha_pattern) == {
        "up_proj": 9
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern='nothing': matches no module"),
        ({"alpha_pattern": {"nothing": 2}}, "alpha_pattern='nothing': matches no module"),
        ({"rank_pattern": {"q_proj": 17}}, "r=17: must be at most 16"),
        ({"init_lora_weights": "loftq"}, "answers the error of a quantizer"),
    ],
)
def test_what_cannot_be_injected_is_refused(base, settings, message):
    with pytest.raises(ConfigError, match=message):
        inject_lora(base, config(**settings), RNG(0))


def test_what_contradicts_itself_is_refused(base):
    with pytest.raises(ConfigError, match="use_dora=True: use_qalora merges ΔW into offsets"):
        config(use_dora=True, use_qalora=True)
    with pytest.raises(ConfigError, match="init_lora_weights='pissa': starts from a decomposition"):
        config(init_lora_weights="pissa", use_qalora=True)
    with pytest.raises(ConfigError, match=r"rank_pattern=\[1\]: must map"):
        config(rank_pattern=[1])
    with pytest.raises(ConfigError, match=r"rank_pattern\['q_proj'\]=0"):
        config(rank_pattern={"q_proj": 0})
    for init in ("pissa", "loftq"):
        with pytest.raises(ConfigError, match="is quantized already"):
            inject_lora(quantize_model(base, NF4), config(init_lora_weights=init), RNG(0), quant=NF4)


# --- QA-LoRA in PEFT's form ---------------------------------------------------------------------------------


def test_qalora_is_written_as_ordinary_lora_and_comes_back_pooled(tmp_path):
    base = quantize_model(make_model(dtype=np.float32, trainable=False), QuantConfig("int4", group_size=4))
    settings = config(use_qalora=True)
    model = fill_adapters(inject_lora(base, settings, RNG(0)))
    save_adapter(model, settings, tmp_path)
    written = read_json(tmp_path / "adapter_config.json")
    assert written["use_qalora"] is False
    arrays, metadata = read_tensors(tmp_path / "adapter_model.safetensors")
    wide = arrays["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert metadata == {"group_size": 4} and wide.shape == (3, 16)
    again, loaded = load_adapter(base, tmp_path)
    assert loaded.use_qalora and np.array_equal(again.logits(IDS), model.logits(IDS))
    assert adapters(again)[0].lora_A.data.shape == (3, 4)
    with pytest.raises(FileError, match="needs a base weight with a float offset"):
        load_adapter(make_model(dtype=np.float32, trainable=False), tmp_path)


def test_the_loss_of_a_batch_has_gradients_for_all_that_trains():
    model = inject_lora(make_model(trainable=False), config(use_dora=True, init_lora_weights="pissa"), RNG(0))
    batch, grads = random_batch(GQA), Gradients(model.trainable())
    shard_loss(model, batch, float(batch.mask.sum()), grads)
    assert all(g.any() for g in grads.values()) and len(grads) == 3 * len(adapters(model))


def test_adapters_that_mean_nothing_without_their_base_are_not_written_or_read_alone(base, tmp_path):
    settings = config(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="the residual W - s·B A was quantized"):
        save_adapter(inject_lora(base, settings, RNG(0), quant=NF4), settings, tmp_path)
    settings = config(init_lora_weights="loftq", loftq_iter=3)
    save_adapter(inject_lora(base, settings, RNG(0), quant=NF4), settings, tmp_path)
    with pytest.raises(FileError, match="a LoftQ adapter of 3 rounds"):
        load_adapter(quantize_model(base, NF4), tmp_path)
    settings = config(init_lora_weights="loftq")
    model = inject_lora(base, settings, RNG(0), quant=NF4)
    save_adapter(model, settings, tmp_path)
    found, _ = load_adapter(
        quantize_model(base, NF4), tmp_path
    )  # after one round the base is the rounded model
    assert np.array_equal(found.logits(IDS), model.logits(IDS))
    with pytest.raises(ConfigError, match="r=9: PiSSA .* takes at most"):
        inject_lora(base, config(r=9, init_lora_weights="pissa"), RNG(0))
    with pytest.raises(ConfigError, match="would be rounded twice"):
        inject_lora(quantize_model(base, NF4), config(), RNG(0), quant=NF4)


def test_an_adapter_folder_with_a_link_that_leads_out_is_refused(base, tmp_path):
    save_adapter(fill_adapters(inject_lora(base, config(), RNG(0))), config(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="is a link to .*elsewhere, outside the folder"):
        load_adapter(base, tmp_path / "a")
