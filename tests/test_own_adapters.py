"""Adapters of one's own: the documentation's LoRA-FA and VeRA, trained, merged, counted, checked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    GQA,
    FakeTask,
    adapters,
    assert_close,
    close_rtol,
    fill_adapters,
    make_linear,
    make_model,
    random_batch,
)

import minilora
from minilora.config import ConfigError, LoraConfig, QuantConfig, TrainConfig
from minilora.formats.peft import save_adapter
from minilora.injection import inject, inject_lora
from minilora.lora import LoraLinear
from minilora.memory import arrays_in, count_parameters, measure, model_bytes, unique_bytes
from minilora.merging import merge
from minilora.parameters import Gradients
from minilora.quant.model import quantize_model
from minilora.training.gradcheck import gradcheck
from minilora.training.trainer import Trainer
from minilora.variants import DoraLinear, adapt

ROOT = Path(__file__).parent.parent
IDS = np.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
RNG = np.random.default_rng


def _examples():
    spec = importlib.util.spec_from_file_location("own_adapters", ROOT / "docs" / "own_adapters.py")
    module = sys.modules["own_adapters"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


own = _examples()


def lora_fa(linear, seed=0):
    return own.LoraFALinear(linear, r=3, scaling=2.0, rng=RNG(seed))


def vera_maker(dtype=np.float32):
    a, b = (x.astype(dtype) for x in own.vera_matrices(5, 20, RNG(1)))
    return lambda linear: own.VeraLinear(linear, a, b)


MAKERS = {"LoRA-FA": lambda: lora_fa, "VeRA": vera_maker}
every_adapter = pytest.mark.parametrize("name", MAKERS)


def randomized(layer):
    rng = RNG(4)
    for p in layer.trained():
        p.data = rng.standard_normal(p.data.shape).astype(p.data.dtype)
    return layer


@every_adapter
def test_the_example_is_short(name):
    source = (ROOT / "docs" / "own_adapters.py").read_text(encoding="utf-8")
    body = source.split(f"class {'LoraFALinear' if name == 'LoRA-FA' else 'VeraLinear'}")[1].split("\n\n\n")[
        0
    ]
    code = [line for line in body.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 30, len(code)


@every_adapter
def test_its_gradients_pass_the_check(name):
    linear = make_linear(7, 12)
    layer = randomized(vera_maker(np.float64)(linear) if name == "VeRA" else lora_fa(linear))
    x, weights = RNG(6).standard_normal((3, 12)), RNG(7).standard_normal((3, 7))
    _, cache = layer.forward(x)
    grads = Gradients(layer.trained())
    dx = layer.backward(weights.copy(), cache, grads)
    arrays = {"x": x} | {p.name: p.data for p in layer.trained()}
    found = {"x": dx} | {p.name: g for p, g in grads.items()}
    gradcheck(lambda: float((layer.forward(x)[0] * weights).sum()), arrays, found)
    onto = np.ones_like(dx)
    assert layer.backward(weights.copy(), cache, Gradients(layer.trained()), onto=onto) is onto
    assert_close(onto, dx + 1, close_rtol(np.float64, 12))
    assert layer.backward(weights.copy(), cache, Gradients(layer.trained()), need_dx=False) is None


@every_adapter
@pytest.mark.parametrize("quant", [None, QuantConfig("nf4", 32)], ids=["dense", "nf4"])
def test_it_trains_merges_and_is_counted(name, quant):
    base = make_model(dtype=np.float32, trainable=False)
    base = base if quant is None else quantize_model(base, quant)
    model = inject(base, MAKERS[name](), ("q_proj", "v_proj", "down_proj"))
    assert np.array_equal(model.logits(IDS), base.logits(IDS))  # it starts as the base
    own_size = sum(p.data.size for linear in adapters(model) for p in linear.trained())
    assert count_parameters(model) == (own_size, count_parameters(base)[1] + own_size)
    assert model_bytes(model)["adapters"] == 4 * own_size
    task = FakeTask()
    trainer = Trainer(model, task, TrainConfig(steps=40, batch_size=6, learning_rate=3e-2))
    history = trainer.train()
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]
    ledger = measure(model, task.batch(range(4)), trainer.config, trainer.optimizer)
    shared = {
        id(a): a.nbytes
        for linear in adapters(model)
        for a in vars(linear).values()
        if isinstance(a, np.ndarray)
    }
    assert ledger.by_kind()["adapters"] >= 4 * own_size and shared
    assert ledger.by_kind()["optimizer"] == 8 * own_size
    merged, errors = merge(model)
    # the sums of the two low-rank products, through two blocks
    assert_close(merged.logits(IDS), model.logits(IDS), close_rtol(np.float32, *[GQA.intermediate_size] * 27))
    assert len(errors) == len(adapters(model)) == 6


def test_it_is_swept_and_its_rows_are_kept(tmp_path):
    runs = [own.VeraRun(r, steps=12, n_eval=20) for r in (4, 16)]
    rows = minilora.run_sweep(runs, tmp_path, run=own.run_vera, progress=False)
    assert [(row["status"], row["method"], row["r"]) for row in rows] == [
        ("success", "vera", r) for r in (4, 16)
    ]
    layers = 4 * (4 * 128 + 2 * 512 + 128)  # the outputs of seven projections in four blocks
    assert [row["trainable_params"] for row in rows] == [layers + 28 * r for r in (4, 16)]
    # merging W + ΔW in float32 rounds each weight once, and the loss moves by as little
    assert all(row["deployed_loss"] == pytest.approx(row["loss"], rel=1e-4) for row in rows)
    again = minilora.run_sweep(runs, tmp_path, run=lambda config, folder: 1 / 0, progress=False)
    assert again == rows  # nothing is done twice


def test_vera_learns_the_task():
    before = own.run_vera(own.VeraRun(64, steps=1, n_eval=20))["loss"]
    assert own.run_vera(own.VeraRun(64, steps=40, n_eval=20))["loss"] < 0.9 * before


def test_a_checkpoint_of_training_resumes_to_the_same_bytes(tmp_path):
    def trainer(steps):
        model = inject(make_model(dtype=np.float32, trainable=False), vera_maker(), ("q_proj",))
        config = TrainConfig(steps=steps, batch_size=6, checkpoint_every=3, gradient_checkpointing=True)
        return Trainer(model, FakeTask(), config, folder=tmp_path)

    whole = trainer(6)
    whole.train()
    again = trainer(6)
    again.load(tmp_path / "checkpoint.safetensors")
    again.train()
    assert all(
        np.array_equal(p.data, q.data)
        for p, q in zip(whole.model.trainable(), again.model.trainable(), strict=True)
    )


def test_an_offset_takes_up_only_what_is_constant_within_its_group():
    """An adapter that says it pools, and does not, is refused: its columns between would be lost."""

    class Liar(own.LoraFALinear):
        pool = 4

    base = quantize_model(make_model(dtype=np.float32, trainable=False), QuantConfig("int4", group_size=4))
    model = inject(base, lambda linear: randomized(Liar(linear, 2, 1.0, RNG(0))), ("q_proj",))
    with pytest.raises(ConfigError, match="varies within groups of 4 inputs; use dense"):
        merge(model, "offsets")
    assert merge(model, "dense")[1]


def test_peft_has_no_form_for_an_adapter_of_ones_own(tmp_path):
    model = inject(make_model(dtype=np.float32, trainable=False), lora_fa, ("q_proj",))
    with pytest.raises(ConfigError, match="q_proj has a LoraFALinear, for which PEFT has no form; merge it"):
        save_adapter(model, LoraConfig(r=3), tmp_path)


def test_what_is_no_adapter_is_refused_with_the_fix():
    base = make_model(dtype=np.float32, trainable=False)
    with pytest.raises(
        ConfigError, match=r"make: returned a Linear for model.layers.0.self_attn.q_proj; it must return"
    ):
        inject(base, lambda linear: linear, ("q_proj",))
    with pytest.raises(ConfigError, match="target_modules='nothing': matches no module"):
        inject(base, lora_fa, ("nothing",))
    once = inject(base, lora_fa, ("q_proj",))
    with pytest.raises(ConfigError, match="already injected"):
        inject(once, lora_fa, ("v_proj",))
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (minilora.Adapter,), {"trained": lambda self: []})(make_linear(3, 4))


# --- frozen parameters of any adapter -----------------------------------------------------------------------


def freeze(model, ending):
    for linear in adapters(model):
        for p in linear.trained():
            p.trainable = p.trainable and not p.name.endswith(ending)
    return model


@pytest.mark.parametrize("ending", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_a_frozen_parameter_gets_no_gradient_state_or_change(ending, options):
    base = make_model(dtype=np.float32, trainable=False)
    model = fill_adapters(inject_lora(base, LoraConfig(r=2, **options), RNG(0)))
    everything = [p for linear in adapters(model) for p in linear.trained()]
    freeze(model, ending)
    frozen = [p for p in everything if not p.trainable]
    before = [p.data.copy() for p in frozen]
    trainer = Trainer(model, FakeTask(), TrainConfig(steps=5, batch_size=6, weight_decay=0.1))
    trainer.train()
    assert all(np.array_equal(a, p.data) for a, p in zip(before, frozen, strict=True))
    names = {p.name for p in frozen}
    assert not any(name.split(".", 1)[1] in names for name in trainer.optimizer.state())
    assert count_parameters(model)[0] == sum(p.data.size for p in everything if p.trainable)


def test_gradients_of_what_still_trains_do_not_depend_on_what_is_frozen():
    rng = RNG(3)
    x, dy = rng.standard_normal((40, 12)).astype(np.float32), rng.standard_normal((40, 7)).astype(np.float32)
    found = {}
    for frozen in ("", "lora_A", "lora_B"):
        layer = fill_adapters(LoraLinear(make_linear(7, 12, dtype=np.float32), LoraConfig(r=2), RNG(0)))
        for p in layer.trained():
            p.trainable = frozen == "" or frozen not in p.name
        grads = Gradients(layer.trained())
        dx = layer.backward(dy, layer.forward(x)[1], grads)
        found[frozen] = {p.name: g for p, g in grads.items()} | {"dx": dx}
    for frozen in ("lora_A", "lora_B"):
        assert {*found[""]} - {*found[frozen]} == {f"q_proj.{frozen}.weight"}
        assert all(np.array_equal(g, found[""][name]) for name, g in found[frozen].items())


# --- an adapter that can never train ------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_can_never_train_is_warned_of(dora):
    def dead(linear):
        made = adapt(linear, LoraConfig(r=2, use_dora=dora), RNG(0))
        lora = made.lora if isinstance(made, DoraLinear) else made
        lora.lora_A.data[...] = 0
        return made

    base = make_model(dtype=np.float32, trainable=False)
    with pytest.warns(UserWarning, match=r"q_proj: A = 0 and B = 0, so both gradients are 0"):
        inject(base, dead, ("q_proj",))


@pytest.mark.parametrize("frozen, start", [("lora_A", "A"), ("lora_B", "B")])
def test_one_factor_frozen_at_zero_is_warned_of_when_training_starts(frozen, start):
    model = inject_lora(make_model(dtype=np.float32, trainable=False), LoraConfig(r=2), RNG(0))
    for linear in adapters(model):
        for p in linear.trained():
            if frozen in p.name:
                p.data[...] = 0
                p.trainable = False
            else:
                p.data[...] = 1
    with pytest.warns(UserWarning, match=f"{start} = 0 is frozen"):
        Trainer(model, FakeTask(), TrainConfig(steps=1))


def test_the_cache_of_lora_fa_is_smaller_than_loras():
    x = np.ones((3, 12), np.float32)
    linear = make_linear(7, 12, dtype=np.float32)
    kept = [
        unique_bytes(arrays_in(layer.forward(x)[1]))
        for layer in (lora_fa(linear), LoraLinear(linear, LoraConfig(r=3), RNG(0)))
    ]
    assert kept == [4 * 3 * 3, 4 * 3 * (12 + 3)]


def test_random_batches_of_a_model_with_any_adapter_pass_the_gradient_check():
    from minilora.training.loss import shard_loss

    model = inject(make_model(trainable=False), vera_maker(np.float64), ("q_proj", "up_proj"))
    for linear in adapters(model):
        randomized(linear)
    batch, grads = random_batch(GQA), Gradients(model.trainable())
    count = float(batch.mask.sum())
    shard_loss(model, batch, count, grads)
    gradcheck(
        lambda: shard_loss(model, batch, count),
        {p.name: p.data for p in grads},
        {p.name: g for p, g in grads.items()},
    )
