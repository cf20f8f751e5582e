"""Golden arrays: transformers' logits, loss and gradients, made by tests/golden/make_golden.py, checked here
without torch."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close

from minilora.building import build_model, parameter_shapes
from minilora.config import ModelConfig
from minilora.data.tasks import Batch
from minilora.parameters import Gradients
from minilora.training.loss import shard_loss

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.npz"))
EPS = float(np.finfo(np.float32).eps)


def rounding(config: ModelConfig) -> float:
    """Relative error to expect between two float32 programs, in units of an array's largest element.

    A block adds up about 9 sums of at most `intermediate_size` or `hidden_size` terms, each with a relative
    error of about √n·eps/2 (see helpers.close_rtol); they pass through the residual stream and again, in
    reverse, through the backward pass. So 2·9·layers sums, whose errors are independent and add up as their
    root. Factor 4: two programs, the worst element.
    """
    widest = max(config.hidden_size, config.intermediate_size, config.vocab_size)
    return 4 * EPS * (widest * 2 * 9 * config.num_hidden_layers) ** 0.5


def load(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The configuration, the weights, and everything else."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    about = json.loads(str(found.pop("about")))
    config = ModelConfig(
        **{field.name: about[field.name] for field in fields(ModelConfig) if field.name in about}
    )
    return config, {k[2:]: v for k, v in found.items() if k.startswith("w.")}, found


every_file = pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])


def test_the_files_are_there_cover_the_architecture_and_are_small():
    configs = [load(path)[0] for path in FILES]
    assert len(configs) >= 5 and sum(path.stat().st_size for path in FILES) < 600_000
    assert (
        {c.tie_word_embeddings for c in configs} == {True, False} == {c.hidden_act != "silu" for c in configs}
    )
    assert any(1 < c.num_key_value_heads < c.num_attention_heads for c in configs) and any(
        c.num_key_value_heads == 1 for c in configs
    )
    assert any(c.intermediate_size % 2 and c.vocab_size % 2 for c in configs)


@every_file
def test_logits_equal_transformers(path):
    config, arrays, golden = load(path)
    logits = build_model(config, arrays).logits(golden["ids"])
    assert logits.dtype == np.float32
    assert_close(logits, golden["logits"], rounding(config))


@every_file
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_loss_and_all_gradients_equal_transformers(path, checkpoint):
    config, arrays, golden = load(path)
    model = build_model(config, arrays, trainable=True)
    grads = Gradients(model.trainable())
    batch = Batch(golden["ids"].astype(np.int64), golden["targets"].astype(np.int64), golden["mask"])
    loss = shard_loss(model, batch, float(batch.mask.sum()), grads, checkpoint=checkpoint)
    assert abs(loss - float(golden["loss"])) <= rounding(config) * float(golden["loss"])
    assert (
        {p.name for p in grads}
        == set(parameter_shapes(config))
        == {k[2:] for k in golden if k.startswith("g.")}
    )
    for p, g in grads.items():
        assert np.abs(g).max() > 1e-3  # a gradient of nothing would prove nothing
        assert_close(g, golden[f"g.{p.name}"], rounding(config), p.name)


@every_file
def test_float64_agrees_as_well(path):
    """The same formulas in double precision: what remains is torch's float32 alone (its rotary tables are
    float32 by design)."""
    config, arrays, golden = load(path)
    model = build_model(config, {name: a.astype(np.float64) for name, a in arrays.items()})
    assert_close(model.logits(golden["ids"]), golden["logits"], rounding(config))


@every_file
def test_the_check_would_notice_a_wrong_model(path):
    """Each of these mistakes moves the logits by far more than the tolerance."""
    config, arrays, golden = load(path)
    wrong = dict(arrays)
    name = next(n for n in arrays if n.endswith("k_proj.weight"))
    wrong[name] = -arrays[name]
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(build_model(config, wrong).logits(golden["ids"]), golden["logits"], rounding(config))
    model = build_model(config, arrays)
    original = model.rope
    model.rope = lambda positions: original(positions + positions)  # angles twice as large
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(model.logits(golden["ids"]), golden["logits"], rounding(config))
