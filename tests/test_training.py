"""Training: optimizers against loops, the same bytes for any number of threads and after any interruption,
and clear stops."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import naive
import numpy as np
import pytest
from helpers import (
    GQA,
    FakeTask,
    adapters,
    assert_close,
    close_rtol,
    digest,
    fill_adapters,
    make_model,
    random_batch,
)

import minilora.threads
from minilora import functional as F
from minilora.config import LoraConfig, ModelConfig, QuantConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.formats.files import FileError, read_tensors, write_tensors
from minilora.injection import full, inject_lora, subset
from minilora.parameters import Gradients, Parameter
from minilora.quant.model import quantize_model
from minilora.threads import Workers, available_threads, single_blas
from minilora.training.evaluation import evaluate
from minilora.training.loss import loss_and_grads, shard_loss
from minilora.training.nonfinite import NonFiniteError, nonfinite_in_forward
from minilora.training.optimizers import AdamW, clip_, make_optimizer
from minilora.training.resume import CHECKPOINT
from minilora.training.schedule import batch_indices, learning_rate
from minilora.training.sgd import SGD
from minilora.training.shards import split_batch
from minilora.training.trainer import Trainer

QUICK = TrainConfig(steps=6, batch_size=4, warmup_steps=2, learning_rate=1e-2)


def lora_model(dtype=np.float32, dropout=0.2, seed=0):
    return inject_lora(
        make_model(GQA, dtype=dtype, trainable=False),
        LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout),
        np.random.default_rng(seed),
    )


MODELS = {
    "full": lambda: full(make_model(GQA, dtype=np.float32)),
    "subset": lambda: subset(make_model(GQA, dtype=np.float32), ("layers.1",)),
    "lora dropout": lora_model,
    "qlora": lambda: inject_lora(
        quantize_model(make_model(GQA, dtype=np.float32), QuantConfig("nf4")),
        LoraConfig(r=2, lora_alpha=3),
        np.random.default_rng(0),
    ),
    "qalora": lambda: inject_lora(
        quantize_model(make_model(GQA, dtype=np.float32), QuantConfig("int4", group_size=4)),
        LoraConfig(r=2, lora_alpha=3, use_qalora=True),
        np.random.default_rng(0),
    ),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def trained(model):
    return digest(p.data for p in model.trainable())


# --- loss ---------------------------------------------------------------------------------------------------


def test_masked_loss_equals_the_full_loss_on_those_targets():
    model, batch = make_model(GQA), random_batch(GQA)
    logits = model.logits(batch.ids)
    expected = naive.cross_entropy(logits[batch.mask], batch.targets[batch.mask]) / batch.mask.sum()
    with Workers(1) as workers:
        loss, grads = loss_and_grads(model, batch, workers, shards=1)
    assert abs(loss - expected) < close_rtol(np.float64, 19, 16) * expected
    # the gradient, too, equals that of all rows with the others' dlogits set to zero
    logits, cache = model.head.forward(*(model.forward(batch.ids)[:1]))
    _, cache_loss = F.cross_entropy_forward(
        logits.reshape(-1, 19), batch.targets.reshape(-1), float(batch.mask.sum())
    )
    dlogits = F.cross_entropy_backward(cache_loss).reshape(logits.shape) * batch.mask[..., None]
    everything = Gradients(model.trainable())
    hidden, cache_model = model.forward(batch.ids)
    model.backward(model.head.backward(dlogits, cache, everything), cache_model, everything)
    for p, g in grads.items():
        assert_close(g, everything[p], close_rtol(np.float64, *[21] * 20), p.name)


def test_what_is_outside_the_mask_does_not_matter():
    model, batch = make_model(GQA), random_batch(GQA)
    targets = np.where(batch.mask, batch.targets, -100)  # not even a token
    assert shard_loss(model, batch, 1.0) == shard_loss(model, Batch(batch.ids, targets, batch.mask), 1.0)


def test_targets_outside_the_mask_cost_no_head_computation():
    model, batch = make_model(GQA), random_batch(GQA)
    seen = []
    forward = model.head.forward
    model.head.forward = lambda x, key=None: seen.append(x.shape) or forward(x, key)
    shard_loss(model, batch, 1.0)
    assert seen == [(batch.mask.sum(), 16)]


def test_padding_on_the_right_changes_nothing():
    model, batch = make_model(GQA), random_batch(GQA)
    padded = Batch(
        np.pad(batch.ids, ((0, 0), (0, 3)), constant_values=5),
        np.pad(batch.targets, ((0, 0), (0, 3))),
        np.pad(batch.mask, ((0, 0), (0, 3))),
    )
    with Workers(1) as workers:
        (loss, grads), (loss2, grads2) = (loss_and_grads(model, b, workers) for b in (batch, padded))
    assert abs(loss - loss2) < close_rtol(np.float64, *[20] * 18) * loss
    for p in grads:
        assert_close(grads2[p], grads[p], close_rtol(np.float64, *[24] * 36), p.name)


@pytest.mark.parametrize("shards, sizes", [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (5, [1] * 5), (9, [1] * 5)])
def test_shards_are_uneven_in_order_and_never_more_than_sequences(shards, sizes):
    batch = random_batch(GQA, B=5)
    pieces = split_batch(batch, shards)
    assert [len(piece.ids) for piece in pieces] == sizes
    for field in ("ids", "targets", "mask"):
        assert np.array_equal(np.concatenate([getattr(p, field) for p in pieces]), getattr(batch, field))


@pytest.mark.parametrize("shards", [2, 3, 5, 9])
def test_loss_and_gradients_do_not_depend_on_the_shards_but_for_rounding(shards):
    """The loss divides by the whole batch's targets, not by each shard's: with uneven masks the two
    differ."""
    model, batch = make_model(GQA), random_batch(GQA, B=5, share=0.3)
    assert len({int(piece.mask.sum()) for piece in split_batch(batch, shards)}) > 1
    with Workers(1) as workers:
        (loss, grads), (loss1, grads1) = (
            loss_and_grads(model, batch, workers, shards=shards),
            loss_and_grads(model, batch, workers, shards=1),
        )
    assert abs(loss - loss1) < close_rtol(np.float64, *[20] * 18) * loss1
    for p in grads:
        assert_close(grads[p], grads1[p], close_rtol(np.float64, *[24] * 36), p.name)


@every_model
def test_a_shard_without_any_target_counts_nothing(make):
    model = fill_adapters(make())
    batch = random_batch(GQA, B=2)
    batch.mask[1] = False
    with Workers(1) as workers:
        loss, grads = loss_and_grads(model, batch, workers, shards=2, stream=(0, 0))
        alone, grads1 = loss_and_grads(model, split_batch(batch, 2)[0], workers, shards=1, stream=(0, 0))
    assert loss == alone and all(np.array_equal(grads[p], grads1[p]) for p in grads)


def test_a_batch_without_any_target_is_refused():
    batch = random_batch(GQA)
    batch.mask[...] = False
    with Workers(1) as workers, pytest.raises(ValueError, match="batch: no target counts"):
        loss_and_grads(make_model(GQA), batch, workers)


def test_evaluation_weights_batches_by_their_targets():
    model, batches = (
        make_model(GQA),
        [random_batch(GQA, B=3, T=7, seed=0), random_batch(GQA, B=1, T=4, seed=1)],
    )
    found = evaluate(model, batches)
    total = sum(naive.cross_entropy(model.logits(b.ids)[b.mask], b.targets[b.mask]) for b in batches)
    expected = total / sum(b.mask.sum() for b in batches)
    assert abs(found["loss"] - expected) < close_rtol(np.float64, *[20] * 18) * expected
    assert found["bpb"] == pytest.approx(found["loss"] / np.log(2), rel=1e-15)


def test_evaluation_of_nothing_is_refused():
    empty = random_batch(GQA)
    empty.mask[...] = False
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="no target"):
            evaluate(make_model(GQA), batches)


def test_evaluation_is_the_same_for_any_number_of_threads_and_without_dropout():
    model = fill_adapters(lora_model(dropout=0.9))
    batches = [random_batch(GQA, seed=s) for s in range(5)]
    results = [evaluate(model, batches)]
    for threads in (1, 2, 3):
        with Workers(threads) as workers:
            results.append(evaluate(model, batches, workers))
    assert all(result == results[0] for result in results)


# --- optimizers ---------------------------------------------------------------------------------------------


def run_optimizer(config, dtype, steps=25):
    rng = np.random.default_rng(0)
    parameters = [
        Parameter("a.lora_A.weight", rng.standard_normal((3, 4)).astype(dtype), True),
        Parameter("a.lora_B.weight", rng.standard_normal((5,)).astype(dtype), True),
    ]
    start = [p.data.copy() for p in parameters]
    optimizer = make_optimizer(parameters, config)
    rates = [0.1 * (t + 1) / steps for t in range(steps)]
    history = []
    for rate in rates:
        grads = Gradients(parameters)
        for p in parameters:
            grads[p][...] = rng.standard_normal(p.data.shape)
        history.append([grads[p].copy() for p in parameters])
        optimizer.step(grads, rate)
    return parameters, start, history, rates


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer, momentum", [("adamw", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_optimizers_equal_loops(dtype, decay, optimizer, momentum, ratio):
    config = TrainConfig(
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=decay,
        beta1=0.8,
        beta2=0.95,
        eps=1e-4,
        lora_plus_ratio=ratio,
    )
    parameters, start, history, rates = run_optimizer(config, dtype)
    for i, (p, factor) in enumerate(zip(parameters, (1.0, ratio), strict=True)):  # LoRA+: every B, and only B
        scaled = [factor * rate for rate in rates]
        expected = np.empty(p.data.shape)
        for index in np.ndindex(p.data.shape):
            grads = [float(step[i][index]) for step in history]
            expected[index] = (
                naive.adamw(float(start[i][index]), grads, scaled, 0.8, 0.95, 1e-4, decay)
                if optimizer == "adamw"
                else naive.sgd(float(start[i][index]), grads, scaled, momentum, decay)
            )
        assert p.data.dtype == dtype
        # each of 25 updates rounds the parameter and the states once or a few times; sums of 25 steps of
        # about factor·0.1
        reach = max(1.0, factor * 0.1 * 25 / (1 - momentum) ** 0.5)
        assert np.abs(p.data - expected).max() <= close_rtol(dtype, 25) * reach * np.abs(expected).max()


def test_the_first_adam_step_is_the_rate_whatever_the_gradients_size():
    for size in (1e-3, 1.0, 1e3):
        p = Parameter("w", np.zeros(3), True)
        grads = Gradients([p])
        grads[p][...] = [size, -size, 2 * size]
        AdamW([p], TrainConfig()).step(grads, 0.01)
        assert np.allclose(p.data, [-0.01, 0.01, -0.01], rtol=1e-4)


def test_a_gradient_of_zero_moves_nothing_and_makes_no_nan():
    for kind in (AdamW, SGD):
        p = Parameter("w", np.ones(3, np.float32), True)
        kind([p], TrainConfig()).step(Gradients([p]), 0.1)
        assert np.array_equal(p.data, np.ones(3, np.float32))


def test_weight_decay_is_decoupled_from_the_gradient():
    p = Parameter("w", np.array([2.0]), True)
    AdamW([p], TrainConfig(weight_decay=0.5)).step(Gradients([p]), 0.1)
    assert p.data[0] == pytest.approx(2.0 - 0.1 * 0.5 * 2.0)


@pytest.mark.parametrize(
    "config, arrays",
    [(TrainConfig(), 2), (TrainConfig(optimizer="sgd"), 0), (TrainConfig(optimizer="sgd", momentum=0.9), 1)],
)
def test_state_exists_for_trainable_parameters_only(config, arrays):
    model = lora_model()
    state = make_optimizer(model.trainable(), config).state()
    assert len(state) == arrays * len(model.trainable())
    assert sum(a.size for a in state.values()) == arrays * sum(p.data.size for p in model.trainable())


# --- schedule and clipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps, warmup", [(10, 0), (10, 3), (10, 10), (5, 8), (1, 0), (1, 1)])
def test_schedule_equals_loop(schedule, steps, warmup):
    config = TrainConfig(steps=steps, warmup_steps=warmup, schedule=schedule, learning_rate=0.3)
    for step in range(steps):
        rate = learning_rate(step, config)
        assert rate == pytest.approx(naive.learning_rate(step, steps, 0.3, warmup, schedule), abs=1e-15)
        assert 0 < rate <= 0.3  # no step is wasted on a rate of zero


def test_cosine_falls_and_warm_up_rises():
    rates = [learning_rate(s, TrainConfig(steps=50, warmup_steps=10, learning_rate=1.0)) for s in range(50)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates[10] == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] < 0.01


@pytest.mark.parametrize("limit", [0.5, 5.0, 1e9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clipping_equals_loop_over_all_arrays_together(limit, dtype):
    parameters = [Parameter("a", np.zeros((3, 4), dtype), True), Parameter("b", np.zeros(5, dtype), True)]
    grads, rng = Gradients(parameters), np.random.default_rng(0)
    for p in parameters:
        grads[p][...] = rng.standard_normal(p.data.shape)
    flat = [float(v) for p in parameters for v in grads[p].reshape(-1)]
    expected, norm = naive.clip(flat, limit)
    before = [grads[p].copy() for p in parameters]
    assert clip_(grads, limit) == pytest.approx(norm, rel=close_rtol(dtype, 17))
    assert_close(np.concatenate([grads[p].reshape(-1) for p in parameters]), expected, close_rtol(dtype, 17))
    if norm <= limit:
        assert all(
            np.array_equal(grads[p], old) for p, old in zip(parameters, before, strict=True)
        )  # not a bit touched
    assert all(g.dtype == dtype for g in grads.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clipping_leaves_what_is_not_finite_to_be_found(bad):
    p = Parameter("w", np.zeros(3, np.float32), True)
    grads = Gradients([p])
    grads[p][1] = bad
    assert not np.isfinite(clip_(grads, 1.0)) and not np.isfinite(grads[p][1])


# --- the trainer --------------------------------------------------------------------------------------------


def test_each_epoch_sees_each_example_once_in_a_new_order():
    epochs = [
        np.concatenate([batch_indices(10, 5, step, seed=3) for step in (2 * e, 2 * e + 1)]) for e in range(3)
    ]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_batches_cross_epochs_and_may_exceed_the_data():
    stream = np.concatenate([batch_indices(5, 3, step, seed=0) for step in range(5)])
    assert all(sorted(stream[5 * e : 5 * e + 5]) == list(range(5)) for e in range(3))
    assert len(batch_indices(3, 8, 0, seed=0)) == 8


def test_batches_depend_on_the_seed():
    assert not np.array_equal(batch_indices(50, 8, 0, seed=0), batch_indices(50, 8, 0, seed=1))


@every_model
def test_training_learns(make):
    model = make()
    history = Trainer(
        model, FakeTask(), TrainConfig(steps=60, batch_size=6, learning_rate=2e-2, warmup_steps=2), threads=1
    ).train()
    losses = [s["loss"] for s in history.steps]
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize(
    "enough", [minilora.threads.FEWEST_TO_SHARE, 1]
)  # 1: gradients are added, clipped and applied by all threads
@every_model
def test_same_bytes_for_1_2_and_3_threads(make, enough, monkeypatch):
    monkeypatch.setattr(minilora.threads, "FEWEST_TO_SHARE", enough)
    found = set()
    for threads in (1, 2, 3):
        model = make()
        history = Trainer(model, FakeTask(), replace(QUICK, shards=3), threads=threads).train()
        found.add(
            (
                trained(model),
                tuple(s["loss"] for s in history.steps),
                tuple(s["grad_norm"] for s in history.steps),
            )
        )
    assert len(found) == 1


def test_more_threads_than_shards_is_fine_and_shards_change_only_rounding():
    results = []
    for shards in (1, 2):
        model = lora_model(dtype=np.float64, dropout=0.0)
        Trainer(model, FakeTask(), replace(QUICK, shards=shards), threads=8).train()
        results.append([p.data for p in model.trainable()])
    for a, b in zip(*results, strict=True):
        # Adam divides by √v, which for B's first steps turns rounding of a small gradient into a relative
        # error of the update
        assert_close(a, b, 1e-6)


@every_model
def test_checkpointing_of_blocks_gives_the_same_bytes(make):
    models = [make(), make()]
    for model, flag in zip(models, (False, True), strict=True):
        Trainer(model, FakeTask(), replace(QUICK, gradient_checkpointing=flag), threads=1).train()
    assert trained(models[0]) == trained(models[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"learning_rate": 2e-2},
        {"lora_plus_ratio": 4.0},
        {"max_grad_norm": 1e-3},
        {"schedule": "constant"},
        {"weight_decay": 0.1},
        {"optimizer": "sgd"},
        {"beta1": 0.5},
    ],
    ids=str,
)
def test_each_setting_matters(changes):
    found = []
    for config in (QUICK, replace(QUICK, **changes)):
        model = lora_model()
        Trainer(model, FakeTask(), config, threads=1).train()
        found.append(trained(model))
    assert found[0] != found[1]


def test_dropout_acts_in_training():
    found = []
    for dropout in (0.0, 0.5):
        model = lora_model(dropout=dropout)
        Trainer(model, FakeTask(), QUICK, threads=1).train()
        found.append(trained(model))
    assert found[0] != found[1]


def test_dropout_draws_from_seed_step_and_shard():
    model, keys = lora_model(), []
    forward = model.forward
    model.forward = lambda ids, key=None, *rest, **more: keys.append(key) or forward(ids, key, *rest, **more)
    Trainer(model, FakeTask(), replace(QUICK, steps=2, shards=3, seed=7), threads=1).train()
    assert keys == [(7, step, shard) for step in range(2) for shard in range(3)]


def test_callbacks_see_each_step():
    seen = []
    trainer = Trainer(
        lora_model(),
        FakeTask(),
        QUICK,
        threads=1,
        callbacks=[lambda step, info: seen.append((step, dict(info)))],
    )
    history = trainer.train()
    assert [step for step, _ in seen] == list(range(6)) and [info for _, info in seen] == history.steps
    assert all(set(info) == {"loss", "learning_rate", "grad_norm", "seconds", "tokens"} for _, info in seen)
    assert [info["learning_rate"] for _, info in seen] == [learning_rate(s, QUICK) for s in range(6)]
    assert all(info["seconds"] > 0 and info["grad_norm"] > 0 for _, info in seen)


def test_evaluation_during_training():
    task = FakeTask()
    model = lora_model()
    history = Trainer(model, task, replace(QUICK, eval_every=2), threads=1).train()
    assert [e["step"] for e in history.evaluations] == [2, 4, 6]
    assert history.evaluations[-1]["loss"] == evaluate(model, task.eval_batches("validation"))["loss"]


def test_evaluating_does_not_change_what_is_learnt():
    found = []
    for every in (0, 1):
        model = lora_model()
        Trainer(model, FakeTask(), replace(QUICK, eval_every=every), threads=2).train()
        found.append(trained(model))
    assert found[0] == found[1]


def test_nothing_trainable_is_refused():
    with pytest.raises(ValueError, match="model: nothing is trainable; use full"):
        Trainer(make_model(GQA, trainable=False), FakeTask(), QUICK)


def test_a_task_without_examples_is_refused():
    with pytest.raises(ValueError, match="task='fake': has no training examples"):
        Trainer(lora_model(), FakeTask(n_train=0), QUICK)


def test_progress_goes_to_stderr_only_when_asked(capsys):
    Trainer(lora_model(), FakeTask(), replace(QUICK, steps=1), threads=1).train()
    assert capsys.readouterr() == ("", "")
    Trainer(lora_model(), FakeTask(), replace(QUICK, steps=1), threads=1).train(progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "train fake" in err and "loss=" in err


# --- checkpoints --------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    "config",
    [QUICK, replace(QUICK, optimizer="sgd", momentum=0.9), replace(QUICK, optimizer="sgd")],
    ids=["adamw", "momentum", "sgd"],
)
def test_interrupted_and_resumed_ends_in_the_same_bytes(make, config, tmp_path):
    task = FakeTask(n_train=10)  # 4 does not divide 10: the interruption falls inside an epoch
    whole = make()
    expected = Trainer(whole, task, config, threads=1)
    expected.train()

    class Interrupted(Exception):
        pass

    def stop(step, info):
        if step == 4:
            raise Interrupted

    first = Trainer(
        make(), task, replace(config, checkpoint_every=3), threads=2, folder=tmp_path, callbacks=[stop]
    )
    with pytest.raises(Interrupted):
        first.train()
    resumed = Trainer(make(), task, config, threads=1, folder=tmp_path)
    resumed.load(tmp_path / CHECKPOINT)
    assert resumed.step == 3
    history = resumed.train()
    assert trained(resumed.model) == trained(whole)
    assert digest(resumed.optimizer.state().values()) == digest(expected.optimizer.state().values())
    assert [s["loss"] for s in history.steps] == [s["loss"] for s in expected.history.steps]
    assert resumed.step == 6 and resumed.optimizer.t == 6
    resumed.save(tmp_path / "a.safetensors")
    expected.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_finished_checkpoint_trains_no_further(tmp_path):
    trainer = Trainer(
        lora_model(), FakeTask(), replace(QUICK, checkpoint_every=6), threads=1, folder=tmp_path
    )
    trainer.train()
    again = Trainer(lora_model(), FakeTask(), QUICK, threads=1)
    again.load(tmp_path / CHECKPOINT)
    assert len(again.train().steps) == 6 and trained(again.model) == trained(trainer.model)


def test_a_checkpoint_keeps_the_evaluations(tmp_path):
    config = replace(QUICK, eval_every=2, checkpoint_every=4)
    expected = Trainer(lora_model(), FakeTask(), config, threads=1, folder=tmp_path).train()
    trainer = Trainer(lora_model(), FakeTask(), config, threads=1)
    trainer.load(tmp_path / CHECKPOINT)
    assert [e["step"] for e in trainer.history.evaluations] == [2, 4]
    assert trainer.train().evaluations == expected.evaluations


def test_no_checkpoints_unless_asked_for(tmp_path):
    Trainer(lora_model(), FakeTask(), QUICK, threads=1, folder=tmp_path).train()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    trainer = Trainer(
        lora_model(), FakeTask(), replace(QUICK, checkpoint_every=2), threads=1, folder=tmp_path
    )
    trainer.train()
    return tmp_path / CHECKPOINT


def refused(path, message, trainer=None):
    trainer = trainer or Trainer(lora_model(), FakeTask(), QUICK, threads=1)
    before = digest([*(p.data for p in trainer.model.trainable()), *trainer.optimizer.state().values()])
    with pytest.raises(FileError, match=message) as caught:
        trainer.load(path)
    assert str(path) in str(caught.value) and isinstance(caught.value, ValueError)
    assert trainer.step == 0  # and nothing has been half loaded
    assert (
        digest([*(p.data for p in trainer.model.trainable()), *trainer.optimizer.state().values()]) == before
    )


def test_a_missing_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint, keep):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:keep])
    refused(checkpoint, "not a complete safetensors file")


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04pickle", b"PK\x03\x04", bytes(1000), b"{}" * 50])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    refused(path, "not a complete safetensors file")


@pytest.mark.parametrize(
    "metadata",
    [{}, {"minilora_checkpoint": 3}, {"minilora_checkpoint": {"step": 1}}, {"minilora_model": {}}],
    ids=str,
)
def test_a_safetensors_file_of_another_kind_is_refused(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    write_tensors(path, {"a": np.ones(2)}, metadata)
    refused(path, "not a minilora training checkpoint")


def test_a_checkpoint_with_nan_is_refused(checkpoint):
    arrays, metadata = read_tensors(checkpoint)
    name = next(n for n in arrays if n.startswith("param."))
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[0] = np.nan
    write_tensors(checkpoint, arrays, metadata)
    refused(checkpoint, "holds NaN or infinity")


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 5e-3),
        ("seed", 1),
        ("steps", 7),
        ("batch_size", 5),
        ("optimizer", "sgd"),
        ("shards", 3),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_by_field(checkpoint, field, value):
    trainer = Trainer(lora_model(), FakeTask(), replace(QUICK, **{field: value}), threads=1)
    refused(
        checkpoint,
        f"made with another configuration .*{field}: {asdict(QUICK)[field]!r} there, {value!r} here",
        trainer,
    )


def test_a_checkpoint_of_other_data_is_refused(checkpoint):
    refused(checkpoint, "made from other data", Trainer(lora_model(), FakeTask(seed=1), QUICK, threads=1))


@pytest.mark.parametrize(
    "make",
    [MODELS["full"], MODELS["qalora"], lambda: lora_model(np.float64)],
    ids=["full", "qalora", "other precision"],
)
def test_a_checkpoint_of_another_model_is_refused(checkpoint, make):
    refused(checkpoint, "arrays do not fit", Trainer(make(), FakeTask(), QUICK, threads=1))


def test_a_checkpoint_holds_only_what_trains_and_says_what_does_not_fit(tmp_path):
    def trainer(*frozen):
        model = fill_adapters(lora_model())
        for p in model.trainable():
            p.trainable = not p.name.endswith(frozen)
        return Trainer(model, FakeTask(), QUICK, threads=1)

    path = tmp_path / "b.safetensors"
    b_alone = trainer("lora_A.weight")
    b_alone.train()
    b_alone.save(path)
    assert not any("lora_A" in name for name in read_tensors(path)[0])
    again = trainer("lora_A.weight")
    again.load(path)
    assert trained(again.model) == trained(b_alone.model)
    refused(path, "lora_A.weight trains here and is not in the file", trainer())
    refused(path, "lora_B.weight is in the file and does not train here", trainer("lora_B.weight"))


# --- NaN and infinity ---------------------------------------------------------------------------------------


def poison(model, at, where):
    def callback(step, info):
        if step == at:
            where(model)

    return callback


POISONS = {
    "parameter": (
        lambda m: adapters(m)[3].lora_B.data.__setitem__((0, 0), np.nan),
        "parameter model.layers.0.self_attn.o_proj.lora_B.weight",
    ),
    "infinite parameter": (
        lambda m: adapters(m)[9].lora_A.data.__setitem__((0, 0), np.inf),
        "parameter model.layers.1.self_attn.v_proj.lora_A",
    ),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("where, place", POISONS.values(), ids=POISONS.keys())
@pytest.mark.parametrize(
    "at, said, kept",
    [(3, "after 4 steps", 2), (4, "step 5: loss nan", 4)],
    ids=["checkpoint due", "checkpoint made"],
)
def test_nan_stops_with_step_and_place_and_keeps_the_last_good_checkpoint(
    where, place, at, said, kept, tmp_path
):
    model = lora_model()
    trainer = Trainer(model, FakeTask(), replace(QUICK, checkpoint_every=2), threads=1, folder=tmp_path)
    good = []
    trainer.callbacks += [lambda step, info: good.append(trained(model)), poison(model, at, where)]
    # after step 3 the next checkpoint is due: it must not replace the good one of 2 steps
    with pytest.raises(NonFiniteError, match=place) as caught:
        trainer.train()
    assert (
        said in str(caught.value)
        and "learning_rate" in str(caught.value)
        and "checkpoint is kept" in str(caught.value)
    )
    assert isinstance(caught.value, ValueError)
    fresh = Trainer(lora_model(), FakeTask(), QUICK, threads=1)
    fresh.load(tmp_path / CHECKPOINT)
    assert fresh.step == kept and trained(fresh.model) == good[kept - 1]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_overflow_in_a_block_is_named():
    model = make_model(GQA, dtype=np.float32)
    model.blocks[1].mlp.down_proj.weight.param.data[...] = 3e38
    assert nonfinite_in_forward(model, [FakeTask().batch([0, 1])]) == "output of model.layers.1"
    trainer = Trainer(full(model), FakeTask(), QUICK, threads=1)
    with pytest.raises(
        NonFiniteError, match="step 0: loss nan.*output of model.layers.1; no checkpoint was asked for"
    ):
        trainer.train()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_gradient_that_overflows_alone_is_named(monkeypatch):
    model = lora_model()
    original = Trainer._one_step

    def one_step(self, workers):
        lora_b = adapters(model)[0].lora_B
        adapters(model)[0].backward = lambda dy, cache, grads, last: (
            grads.add(lora_b, np.float32(np.inf)),
            0 * dy,
        )[1]
        return original(self, workers)

    monkeypatch.setattr(Trainer, "_one_step", one_step)
    with pytest.raises(
        NonFiniteError, match="step 0: .*gradient of model.layers.0.self_attn.q_proj.lora_B.weight"
    ):
        Trainer(model, FakeTask(), QUICK, threads=1).train()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_rate_that_explodes_stops_instead_of_going_on():
    config = TrainConfig(
        steps=20, batch_size=4, optimizer="sgd", learning_rate=1e30, warmup_steps=0, schedule="constant"
    )
    with pytest.raises(NonFiniteError, match="learning_rate below 1e"):
        Trainer(full(make_model(GQA, dtype=np.float32)), FakeTask(), config, threads=2).train()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_parameters_that_overflow_in_the_last_step_stop_it_too():
    """No later loss would show it: the run must not end as if all were well."""
    config = TrainConfig(steps=1, batch_size=4, optimizer="sgd", learning_rate=1e39, warmup_steps=0)
    with pytest.raises(NonFiniteError, match="step"):
        Trainer(full(make_model(GQA, dtype=np.float32)), FakeTask(), config, threads=1).train()


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    steps = []
    with pytest.raises(ValueError, match="file"):
        Trainer(
            lora_model(),
            FakeTask(),
            replace(QUICK, checkpoint_every=1),
            threads=1,
            folder=tmp_path / "file" / "run",
            callbacks=[lambda step, info: steps.append(step)],
        ).train()
    assert not steps


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_workers_keep_the_order_and_pass_errors_on(threads):
    with Workers(threads) as workers:
        assert workers.map(lambda x: x * x, range(20)) == [x * x for x in range(20)]
        with pytest.raises(ZeroDivisionError):
            workers.map(lambda x: 1 // x, [1, 0, 2])
        assert workers.map(str, []) == []


@pytest.mark.parametrize(
    "sizes", [[], [1], [0, 0], [5, 0, 1], [2**20], [1, 2**20, 1], [2**20] * 7, [2**19, 1, 2**19, 2**19]]
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_arrays_are_shared_out_once_each_in_order(threads, sizes):
    with Workers(threads) as workers:
        done = []
        assert workers.map_arrays(lambda i: done.append(i) or -i, range(len(sizes)), sizes) == [
            -i for i in range(len(sizes))
        ]
        assert sorted(done) == list(range(len(sizes)))


def test_the_caller_is_one_of_the_threads_and_an_error_ends_all():
    with Workers(2) as workers:
        together = threading.Barrier(2, timeout=30)  # both items at once, or never
        found = workers.map(lambda _: (together.wait() >= 0, threading.get_ident()), range(2))
        assert all(ok for ok, _ in found) and {ident for _, ident in found} > {threading.get_ident()}
        begun = []

        def fail(item):
            begun.append(item)
            time.sleep(0.01)
            raise KeyError(item)

        with pytest.raises(KeyError):
            workers.map(fail, range(1000))
        assert len(begun) < 500


@pytest.mark.parametrize("threads", [0, -1])
def test_no_workers_is_refused(threads):
    with pytest.raises(ValueError, match=f"threads={threads}: must be at least 1"):
        Workers(threads)


def test_available_threads_is_positive():
    assert available_threads() >= 1


@pytest.fixture
def all_blas():
    """Let single_blas see the libraries that other tests have loaded meanwhile (Numba brings SciPy's, which
    we never call)."""
    minilora.threads._controller.cache_clear()


def test_single_blas_limits_and_restores(all_blas):
    from threadpoolctl import threadpool_info

    def blas():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = blas()
    with single_blas():
        assert set(blas()) == {1}
        with single_blas():
            pass
        assert set(blas()) == {1}
    assert blas() == before and before


def test_single_blas_of_two_threads_may_overlap(all_blas):
    from threadpoolctl import threadpool_info

    def blas():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before, first, second = blas(), single_blas(), single_blas()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(blas()) == {1}
    second.__exit__(None, None, None)
    assert blas() == before


def test_whole_training_runs_with_one_blas_thread(all_blas):
    from threadpoolctl import threadpool_info

    seen = []
    Trainer(
        lora_model(),
        FakeTask(),
        replace(QUICK, steps=1),
        threads=1,
        callbacks=[
            lambda step, info: seen.extend(
                pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"
            )
        ],
    ).train()
    assert seen and set(seen) == {1}


def test_the_default_model_trains_the_same_for_1_and_2_threads():
    """At sizes where BLAS would use several threads and other kernels than on tiny matrices."""
    config = ModelConfig(num_hidden_layers=1)
    task, found = FakeTask(n_train=16, vocab_size=259, longest=40), set()
    for threads in (1, 2):
        model = inject_lora(
            make_model(config, dtype=np.float32, trainable=False),
            LoraConfig(r=4, lora_dropout=0.1),
            np.random.default_rng(0),
        )
        Trainer(model, task, replace(QUICK, steps=2, batch_size=8), threads=threads).train()
        found.add(trained(model))
    assert len(found) == 1


def test_files_are_where_the_trainer_says(tmp_path):
    trainer = Trainer(
        lora_model(),
        FakeTask(),
        replace(QUICK, checkpoint_every=3),
        threads=1,
        folder=tmp_path / "new" / "folder",
    )
    trainer.train()
    assert [p.name for p in Path(tmp_path / "new" / "folder").iterdir()] == [CHECKPOINT]
