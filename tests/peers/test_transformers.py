"""Live against transformers and torch: logits, loss, all gradients, greedy text, optimizers, on random small
configurations."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close, close_rtol

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_golden import random_arrays, random_batch, reference, torch_model

from minilora.building import build_model
from minilora.config import ModelConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.generation import generate
from minilora.parameters import Gradients, Parameter
from minilora.training.loss import shard_loss
from minilora.training.optimizers import clip_, make_optimizer

pytestmark = pytest.mark.peers
EPS = float(np.finfo(np.float32).eps)


def random_config(seed: int) -> ModelConfig:
    """Any small shape: grouped queries, odd widths, tied or not, gated or not."""
    rng = np.random.default_rng([seed, 99])
    kv, groups, head_dim = int(rng.integers(1, 4)), int(rng.integers(1, 4)), 2 * int(rng.integers(1, 7))
    return ModelConfig(
        vocab_size=int(rng.integers(11, 90)),
        hidden_size=kv * groups * head_dim,
        intermediate_size=int(rng.integers(5, 70)),
        num_hidden_layers=int(rng.integers(1, 5)),
        num_attention_heads=kv * groups,
        num_key_value_heads=kv,
        context_length=48,
        rope_theta=float(rng.choice([100.0, 10000.0, 1e6])),
        rms_norm_eps=float(rng.choice([1e-6, 1e-3])),
        tie_word_embeddings=bool(seed % 2),
        hidden_act="gelu_pytorch_tanh" if seed % 4 == 3 else "silu",
    )


def rounding(config: ModelConfig, T: int) -> float:
    """As in test_golden: 2·9·layers sums of at most `widest` terms, independent, factor 4; and angles up to
    T, which transformers keeps in float32, so that a rotation is off by up to T·eps/2."""
    widest = max(config.hidden_size, config.intermediate_size, config.vocab_size, T)
    return 4 * EPS * (widest * 2 * 9 * config.num_hidden_layers) ** 0.5 + T * EPS


@pytest.mark.parametrize("seed", range(8))
def test_logits_loss_and_all_gradients(torch, transformers, seed):
    config = random_config(seed)
    arrays, (ids, targets, mask) = random_arrays(config, seed), random_batch(config, seed, B=2, T=40)
    logits, loss, gradients = reference(config, arrays, ids, targets, mask)
    model = build_model(config, arrays, trainable=True)
    grads = Gradients(model.trainable())
    found = shard_loss(model, Batch(ids, targets, mask), float(mask.sum()), grads)
    rtol = rounding(config, 40)
    assert_close(model.logits(ids), logits, rtol, "logits")
    assert abs(found - loss) <= rtol * loss
    assert {p.name for p in grads} == set(gradients)
    for p, g in grads.items():
        assert_close(g, gradients[p.name], rtol, p.name)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_greedy_text(torch, transformers, seed):
    config = random_config(seed)
    arrays = random_arrays(config, seed)
    prompt = np.random.default_rng(seed).integers(config.vocab_size, size=7)
    with torch.no_grad():
        theirs = torch_model(config, arrays).generate(
            torch.from_numpy(prompt[None]),
            attention_mask=torch.ones(1, 7, dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert generate(build_model(config, arrays), [prompt.tolist()], 20)[0] == theirs[0, 7:].tolist()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name, momentum", [("adamw", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
def test_optimizers_and_clipping(torch, name, momentum, decay):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape) for shape in ((5, 7), (3,))]
    ours = [Parameter(str(i), a.copy(), True) for i, a in enumerate(start)]
    theirs = [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in start]
    config = TrainConfig(optimizer=name, momentum=momentum, weight_decay=decay)
    optimizer = make_optimizer(ours, config)
    # ours decouples weight decay for SGD too; torch does not, so there it is applied by hand
    peer = (
        torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay)
        if name == "adamw"
        else torch.optim.SGD(theirs, lr=1e-2, momentum=momentum)
    )
    for _ in range(20):
        grads = Gradients(ours)
        for p, q in zip(ours, theirs, strict=True):
            grads[p][...] = rng.standard_normal(p.data.shape)
            q.grad = torch.from_numpy(grads[p].copy())
        norm = clip_(grads, 1.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 1.0)), rel=1e-12)
        optimizer.step(grads, 1e-2)
        if name == "sgd":
            with torch.no_grad():
                for q in theirs:
                    q *= 1 - 1e-2 * decay
        peer.step()
    for p, q in zip(ours, theirs, strict=True):
        # clip_grad_norm_ divides by norm + 1e-6
        assert_close(p.data, q.detach().numpy(), 1e-6 + close_rtol(np.float64, 20))
