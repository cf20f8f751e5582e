"""`minilora.plain()`: what one reads is what runs, and both ways agree to rounding."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import GQA, FakeTask, assert_close, fill_adapters, make_model, random_batch

import minilora
from minilora import functional, kernels
from minilora.config import LoraConfig, QuantConfig, TrainConfig
from minilora.generation import generate
from minilora.injection import full, inject_lora
from minilora.parameters import Gradients
from minilora.quant import BlockWeight
from minilora.quant.model import quantize_model
from minilora.quant.weights import quantize_weight
from minilora.training.loss import shard_loss
from minilora.training.trainer import Trainer

EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng
NF4, INT4 = QuantConfig("nf4", 32), QuantConfig("int4", group_size=4)


def dense():
    return make_model(GQA, dtype=np.float32, trainable=False)


def adapted(quant=None, **config):
    base = dense() if quant is None else quantize_model(dense(), quant)
    return fill_adapters(inject_lora(base, LoraConfig(r=2, lora_alpha=3, **config), RNG(0)))


METHODS = {
    "full": lambda: full(dense()),
    "lora": adapted,
    "lora with dropout": lambda: adapted(lora_dropout=0.3),
    "dora": lambda: adapted(use_dora=True),
    "qlora": lambda: adapted(NF4),
    "qlora nf2": lambda: adapted(QuantConfig("nf2", 32, double_quant=False)),
    "qalora": lambda: adapted(INT4, use_qalora=True),
    "qalora 3 bits": lambda: adapted(QuantConfig("int3", group_size=4), use_qalora=True),
}
every_method = pytest.mark.parametrize("method", METHODS)

# Both ways sum the same products in another order: a sum of n errs by √n·eps/2 of its largest term, and about
# nine sums follow one another in a block, forward and backward (Higham, §3.1). The factor is the margin.
SUMS = 2 * 9 * GQA.num_hidden_layers
RTOL = 8 * EPS * (GQA.intermediate_size * SUMS) ** 0.5


def gradients(model, batch):
    grads = Gradients(model.trainable())
    loss = shard_loss(model, batch, float(batch.mask.sum()), grads, key=(0, 0, 0))
    return loss, {p.name: g for p, g in grads.items()}


@every_method
def test_loss_and_gradients_agree_to_rounding(method):
    batch = random_batch(GQA, B=4, T=9)
    loss, grads = gradients(METHODS[method](), batch)
    with minilora.plain():
        plain_loss, plain = gradients(METHODS[method](), batch)
    assert plain_loss == pytest.approx(loss, rel=RTOL)
    assert plain.keys() == grads.keys()
    for name, g in grads.items():
        assert g.dtype == plain[name].dtype == np.float32
        assert_close(plain[name], g, RTOL, name)


@every_method
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_agrees_to_rounding(method, optimizer):
    # A step of AdamW is lr·m/(√v + eps). With this eps a gradient's rounding δ moves it by lr·δ/eps at most,
    # also where the gradient is no larger than its rounding: 8 steps add up to less than δ itself.
    settings = {"eps": 1e-2, "learning_rate": 1e-3, "optimizer": optimizer}
    config = TrainConfig(steps=8, batch_size=6, warmup_steps=0, **settings)
    compiled = [s["loss"] for s in Trainer(METHODS[method](), FakeTask(), config).train().steps]
    with minilora.plain():
        plain = [s["loss"] for s in Trainer(METHODS[method](), FakeTask(), config).train().steps]
    assert plain == pytest.approx(compiled, rel=2 * RTOL)
    assert len(set(plain)) == 8


@every_method
def test_generation_writes_the_same_tokens(method):
    prompts = [[1, 2, 3], [7, 5]]
    expected = generate(METHODS[method](), prompts, 12, threads=1)
    with minilora.plain():
        assert generate(METHODS[method](), prompts, 12, threads=1) == expected


QUANTS = [
    *(QuantConfig(kind, 64) for kind in ("nf2", "nf3", "nf4", "nf8", "fp4")),
    QuantConfig("nf4", 64, double_quant=False),
    *(QuantConfig(kind, group_size=16) for kind in ("int2", "int3", "int4", "int8")),
    QuantConfig("int4", group_size=32, quantizer="hqq"),
    QuantConfig("int4", group_size=32, offset_dtype="zero"),
]


@pytest.mark.parametrize("config", QUANTS, ids=lambda c: f"{c.quant_type} {c.quantizer} {c.double_quant}")
@pytest.mark.parametrize("shape", [(8, 64), (3, 96), (33, 128)], ids=str)
def test_quantized_weights_have_the_same_bytes(config, shape):
    w = RNG(1).standard_normal(shape).astype(np.float32)
    w[0, :16] = 0
    x = RNG(2).standard_normal((20, shape[1])).astype(np.float32)
    compiled = quantize_weight(w, config)
    with minilora.plain():
        plain = quantize_weight(w, config)
        decoded, product = compiled.dense(), compiled.matmul(x)
    for kind, arrays in compiled.arrays().items():
        for a, b in zip(arrays, plain.arrays()[kind], strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), kind
    assert np.array_equal(decoded, compiled.dense())
    bound = (shape[1] + 4) * EPS * (np.abs(x) @ np.abs(decoded).T)
    assert (np.abs(product - compiled.matmul(x)) <= bound).all()


@pytest.mark.parametrize("quant_type", ["Q4_0", "Q4_1", "Q8_0"])
def test_ggufs_blocks_decode_to_the_same_bits(quant_type):
    w = RNG(1).standard_normal((5, 96)).astype(np.float32)
    weight = BlockWeight.quantize(w, quant_type)
    expected = weight.dense()
    with minilora.plain():
        assert np.array_equal(weight.dense(), expected)
        assert np.array_equal(BlockWeight.quantize(w, quant_type).blocks, weight.blocks)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig("int4", group_size=4, quantizer="gptq"),
        QuantConfig("nf4", 32, quantizer="gptq", double_quant=False),
    ],
    ids=["int4", "nf4"],
)
def test_gptq_finds_the_same_codes(config):
    ids = [RNG(3).integers(GQA.vocab_size, size=(4, 20))]
    model = make_model(
        GQA.__class__(**{**GQA.__dict__, "hidden_size": 32, "intermediate_size": 32}),
        dtype=np.float32,
        trainable=False,
    )
    compiled = quantize_model(model, config, ids)
    with minilora.plain():
        plain = quantize_model(model, config, ids)
    # the inputs differ by rounding, so a code on an edge may differ: not one in a thousand
    pairs = [
        (a.weight.unpacked(), b.weight.unpacked())
        for (_, a), (_, b) in zip(compiled.linears(), plain.linears(), strict=True)
        if hasattr(a.weight, "unpacked")
    ]
    assert sum((a != b).sum() for a, b in pairs) <= 1e-3 * sum(a.size for a, _ in pairs)


def test_changing_a_function_changes_training(monkeypatch):
    """The point of it all: edit `functional`, and a float32 training run follows."""
    config = TrainConfig(steps=2, batch_size=6)

    def losses():
        return [s["loss"] for s in Trainer(METHODS["lora"](), FakeTask(), config).train().steps]

    original = functional.swiglu_forward
    with minilora.plain():
        before = losses()
        monkeypatch.setattr(functional, "swiglu_forward", lambda gate, up: original(gate, 2 * up))
        assert losses() != before
    monkeypatch.undo()


CORE = [
    "linear_forward",
    "linear_dx",
    "low_rank_forward",
    "low_rank_backward",
    "rms_norm_forward",
    "rms_norm_backward",
    "rope_forward",
    "attention_forward",
    "attention_backward",
    "swiglu_forward",
    "swiglu_backward",
    "cross_entropy_forward",
    "cross_entropy_backward",
    "group_sum",
    "adamw",
]


def test_every_function_of_the_mathematics_is_run_by_training(monkeypatch):
    called = set()

    def spy(name):
        original = getattr(functional, name)

        def watched(*args, **kwargs):
            called.add(name)
            return original(*args, **kwargs)

        return watched

    for name in CORE:
        monkeypatch.setattr(functional, name, spy(name))
    with minilora.plain():
        Trainer(METHODS["qalora"](), FakeTask(), TrainConfig(steps=1, batch_size=6)).train()
    assert called == set(CORE)


PROGRAM = """
import sys
import numpy as np
import minilora
from minilora.config import *
from minilora.data.tasks import make_task
from minilora.quant import BlockWeight

config = ModelConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
base, task = minilora.init_model(config, np.random.default_rng(0), trainable=False), make_task(
    "products", n_train=40, n_eval=10
)
models = [minilora.full(base)]
for kind, pooled in ((None, False), ("nf4", False), ("fp4", False), ("int3", True)):
    stored = base if kind is None else minilora.quantize_model(base, QuantConfig(kind))
    models.append(minilora.inject_lora(stored, LoraConfig(r=2, use_qalora=pooled), np.random.default_rng(0)))
ids = [np.arange(64).reshape(2, 32)]
minilora.quantize_model(base, QuantConfig("int4", quantizer="gptq"), ids)
for optimizer in ("adamw", "adamw_8bit", "sgd"):
    for model in models:
        minilora.Trainer(model, task, TrainConfig(steps=1, batch_size=2, optimizer=optimizer)).train()
minilora.generate(models[1], [[1, 2]], 3)
blocks = BlockWeight.quantize(np.ones((2, 32), np.float32), "Q4_1")
blocks.matmul(blocks.dense())
minilora.merge(models[-1])
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite"))[:3])
"""


def test_the_environment_variable_keeps_numba_out_of_the_process():
    environment = os.environ | {"MINILORA_PLAIN": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


def test_plain_nests_reaches_threads_and_children_and_ends():
    assert not kernels.is_plain()
    with minilora.plain():
        with minilora.plain():
            pass
        assert kernels.is_plain() and os.environ["MINILORA_PLAIN"] == "1"
    assert not kernels.is_plain() and "MINILORA_PLAIN" not in os.environ
    with pytest.raises(KeyError), minilora.plain():
        raise KeyError
    assert not kernels.is_plain()
