"""Options that save memory change nothing else: logits in chunks, gradient accumulation."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from helpers import GQA, FakeTask, assert_close, close_rtol, digest, fill_adapters, make_model, random_batch

import minilora.training.evaluation
from minilora.config import LoraConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.formats.files import FileError
from minilora.injection import full, inject_lora
from minilora.memory import arrays_in, peak_bytes
from minilora.parameters import Gradients
from minilora.threads import Workers
from minilora.training.evaluation import evaluate
from minilora.training.loss import loss_and_grads, shard_loss
from minilora.training.resume import CHECKPOINT
from minilora.training.trainer import Trainer

QUICK = TrainConfig(steps=4, batch_size=2, warmup_steps=2, learning_rate=1e-2)
ROUNDING = close_rtol(np.float64, *[21] * 20)


def adapted(dtype=np.float64, **options):
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=("q_proj", "down_proj", "lm_head"), **options)
    return fill_adapters(
        inject_lora(make_model(GQA, dtype=dtype, trainable=False), lora, np.random.default_rng(0))
    )


MODELS = {
    "full": lambda: make_model(GQA),
    "tied": lambda: make_model(replace(GQA, tie_word_embeddings=True)),
    "adapted": adapted,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def gradients(model, batches, **options):
    with Workers(1) as workers:
        return loss_and_grads(model, batches, workers, **options)


def assert_same(found, expected):
    (loss, grads), (wanted_loss, wanted) = found, expected
    assert abs(loss - wanted_loss) <= ROUNDING * wanted_loss
    assert grads.keys() == wanted.keys()
    for p, g in grads.items():
        assert_close(g, wanted[p], ROUNDING, p.name)


# --- logits in chunks ---------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("chunk", [1, 2, 5, 10**6])
def test_logits_in_chunks_give_the_same_loss_and_gradients(make, chunk):
    model, batch = make(), random_batch(GQA, B=4, T=9)
    assert_same(gradients(model, batch, logits_chunk=chunk), gradients(model, batch))


@pytest.mark.parametrize("chunk, sizes", [(0, [13]), (5, [5, 5, 3]), (13, [13]), (20, [13])])
def test_the_head_sees_so_many_rows_at_a_time(chunk, sizes):
    model = make_model(GQA)
    batch = random_batch(GQA)
    batch.mask[...] = np.arange(21).reshape(3, 7) < 13
    seen = []
    forward = model.head.forward
    model.head.forward = lambda x, key=None: seen.append(len(x)) or forward(x, key)
    shard_loss(model, batch, 1.0, Gradients(model.trainable()), logits_chunk=chunk)
    assert seen == sizes


def test_a_shard_without_targets_adds_nothing():
    model, batch = make_model(GQA), random_batch(GQA)
    batch.mask[...] = False
    for chunk in (0, 4):
        grads = Gradients(model.trainable())
        assert shard_loss(model, batch, 1.0, grads, logits_chunk=chunk) == 0
        assert not any(g.any() for g in grads.values())


def test_an_adapted_heads_dropout_draws_anew_for_each_chunk_and_repeats_itself():
    model, batch = adapted(lora_dropout=0.5), random_batch(GQA, share=1.0)
    seen = []
    forward = model.head.forward
    model.head.forward = lambda x, key=None: seen.append(key) or forward(x, key)
    losses = [
        shard_loss(model, batch, 1.0, Gradients(model.trainable()), (5, 6, 7), logits_chunk=7)
        for _ in range(2)
    ]
    assert losses[0] == losses[1]
    assert seen == [(5, 6, 7), (5, 6, 7, 1), (5, 6, 7, 2)] * 2


def test_chunks_take_less_memory():
    model = inject_lora(
        make_model(replace(GQA, vocab_size=5000), dtype=np.float32, trainable=False),
        LoraConfig(r=2),
        np.random.default_rng(0),
    )
    batch = random_batch(GQA, B=4, T=24, share=1.0)
    whole, chunked = (
        peak_bytes(lambda c=c: gradients(model, batch, shards=1, logits_chunk=c)) for c in (0, 8)
    )
    logits = 4 * 24 * 5000 * 4
    assert logits < whole < 1.6 * logits  # logits, probabilities and gradient are one array in turn
    assert chunked < whole - 0.8 * logits  # 8 of 96 rows at a time


def test_evaluation_takes_bounded_chunks_and_one_for_the_tiny_base(monkeypatch):
    model, batch = make_model(GQA), random_batch(GQA)
    seen = []
    forward = model.head.forward
    model.head.forward = lambda x, key=None: seen.append(len(x)) or forward(x, key)
    expected = evaluate(model, [batch])["loss"]
    assert seen == [batch.mask.sum()]
    assert (
        minilora.training.evaluation.EVALUATION_LOGITS_BYTES // (259 * 4) > 32 * 256
    )  # the shipped base: a batch of its longest rows
    seen.clear()
    monkeypatch.setattr(minilora.training.evaluation, "EVALUATION_LOGITS_BYTES", 3 * 19 * 8 + 1)
    assert abs(evaluate(model, [batch])["loss"] - expected) <= ROUNDING * expected
    assert max(seen) == 3 and sum(seen) == batch.mask.sum()


# --- gradient accumulation ----------------------------------------------------------------------------------


def rows_of(batch, start, stop):
    return Batch(batch.ids[start:stop], batch.targets[start:stop], batch.mask[start:stop])


@every_model
@pytest.mark.parametrize("cuts", [[0, 3, 6], [0, 1, 3, 6], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_batches_one_after_another_equal_the_big_batch(make, cuts):
    """Each with its own number of targets: the mean is over all of them, not a mean of means."""
    model, batch = make(), random_batch(GQA, B=6)
    batch.mask[0] = False  # a batch without targets is no mistake as long as another has some
    parts = [rows_of(batch, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert_same(gradients(model, parts), gradients(model, batch))


def test_no_target_in_any_batch_is_refused():
    model, batch = make_model(GQA), random_batch(GQA)
    batch.mask[...] = False
    with pytest.raises(ValueError, match="no target counts"):
        gradients(model, [batch, batch])


def test_each_batch_draws_its_own_dropout():
    model = inject_lora(make_model(GQA), LoraConfig(r=2, lora_dropout=0.5), np.random.default_rng(0))
    batch = random_batch(GQA, B=2)
    seen = []
    forward = model.forward
    model.forward = lambda ids, key=None, *rest, **more: seen.append(key) or forward(ids, key, *rest, **more)
    gradients(model, [batch, batch], stream=(1, 2))
    assert seen == [(1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3)]


def test_training_with_accumulation_equals_training_with_the_big_batch():
    big, small = make_model(GQA), make_model(GQA)
    Trainer(big, FakeTask(), replace(QUICK, batch_size=6)).train()
    Trainer(small, FakeTask(), replace(QUICK, gradient_accumulation_steps=3)).train()
    start = make_model(GQA)
    for p, q, first in zip(big.trainable(), small.trainable(), start.trainable(), strict=True):
        assert_close(
            q.data - first.data, p.data - first.data, 1e-6, p.name
        )  # AdamW divides by √v̂, which can be near 0


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {"logits_chunk": 2},
        {"gradient_accumulation_steps": 2, "logits_chunk": 3, "gradient_checkpointing": True},
    ],
    ids=["accumulation", "chunks", "everything"],
)
def test_bytes_do_not_depend_on_threads_nor_on_an_interruption(options, tmp_path):
    config = replace(QUICK, shards=3, batch_size=3, checkpoint_every=2, **options)
    found = []
    for threads in (1, 2, 3):
        model = adapted(np.float32, lora_dropout=0.2)
        Trainer(model, FakeTask(), config, threads=threads, folder=tmp_path).train()
        found.append(digest(p.data for p in model.trainable()))
    assert len(set(found)) == 1
    model = adapted(np.float32, lora_dropout=0.2)
    trainer = Trainer(model, FakeTask(), config, threads=2)

    def interrupt(step, info):
        if step == 1:
            trainer.save(tmp_path / CHECKPOINT)
            raise KeyboardInterrupt

    trainer.callbacks.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = adapted(np.float32, lora_dropout=0.2)
    again = Trainer(resumed, FakeTask(), config, threads=1)
    again.load(tmp_path / CHECKPOINT)
    again.train()
    assert digest(p.data for p in resumed.trainable()) == found[0]


def test_accumulation_holds_one_batch_at_a_time():
    model = inject_lora(
        make_model(GQA, dtype=np.float32, trainable=False), LoraConfig(r=2), np.random.default_rng(0)
    )
    batch = random_batch(GQA, B=8, T=24, share=1.0)
    parts = [rows_of(batch, i, i + 2) for i in range(0, 8, 2)]
    whole, parted = (peak_bytes(lambda b=b: gradients(model, b, shards=1)) for b in (batch, parts))
    own = 3 * sum(p.data.nbytes for p in model.trainable())  # the sum, this batch's gradients, one product
    assert parted < whole / 4 + own + 2**17  # and NumPy's buffers


# --- the trainer --------------------------------------------------------------------------------------------


def test_callbacks_hear_how_many_tokens_a_step_had():
    seen = []
    task = FakeTask()
    Trainer(
        full(make_model(GQA)),
        task,
        replace(QUICK, gradient_accumulation_steps=2),
        callbacks=[lambda step, info: seen.append(info["tokens"])],
    ).train()
    order = np.random.default_rng([0, 1, 0]).permutation(12)
    assert seen[0] == sum(task.batch(order[i : i + 2]).ids.size for i in (0, 2))


def test_the_bar_shows_loss_and_tokens_a_second(capsys):
    Trainer(full(make_model(GQA)), FakeTask(), QUICK).train(progress=True)
    shown = capsys.readouterr().err
    assert "loss=" in shown and "tokens/s=" in shown and "4/4" in shown


def test_a_checkpoint_of_other_memory_options_is_refused(tmp_path):
    path = tmp_path / "old.safetensors"
    Trainer(adapted(), FakeTask(), QUICK).save(path)
    for change in ({"logits_chunk": 8}, {"gradient_accumulation_steps": 2}):
        name = next(iter(change))
        with pytest.raises(FileError, match=f"{name}: {asdict(QUICK)[name]} there, {change[name]} here"):
            Trainer(adapted(), FakeTask(), replace(QUICK, **change)).load(path)


# --- checkpointed blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapt_all(),
        lambda: adapt_all(use_dora=True),
        lambda: adapt_all(lora_dropout=0.3),
        lambda: make_model(GQA),
        lambda: make_model(replace(GQA, hidden_act="gelu_pytorch_tanh", num_key_value_heads=1)),
    ],
    ids=["lora", "dora", "dropout", "full", "gelu"],
)
def test_a_checkpointed_block_computes_the_same_cache_again(make):
    block, rope = make().blocks[0], make().rope(np.arange(5))
    x, segments = (
        np.random.default_rng(1).standard_normal((2, 5, 16)),
        np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]]),
    )
    _, expected = block.forward(x, rope, (0, 1, 2), segments)
    found = restored(block, expected, rope, (0, 1, 2), segments)
    pairs = list(zip(arrays_in(found), arrays_in(expected), strict=True))
    assert len(pairs) > 12 and all(np.array_equal(a, b) for a, b in pairs)


def restored(block, cache, rope, key=None, segments=None):
    kept = block.checkpoint(cache)
    return block.restore_attention(kept, rope, key, segments), block.restore_mlp(kept, key)


def adapt_all(**options):
    return fill_adapters(inject_lora(make_model(GQA), LoraConfig(r=2, **options), np.random.default_rng(0)))


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_computed_again_multiplies_by_gate_and_up_alone(dora):
    model = adapt_all(use_dora=dora)
    block, rope, multiplied = model.blocks[0], model.rope(np.arange(5)), []
    _, cache = block.forward(np.random.default_rng(1).standard_normal((2, 5, 16)), rope)
    for _, name, linear in block.linears():
        matmul = linear.base.weight.matmul
        linear.base.weight.matmul = lambda x, *p, n=name, m=matmul: (
            (multiplied.append(n) if x.ndim == 3 else None) or m(x, *p)
        )
    restored(block, cache, rope)
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
    # DoRA keeps its result, and so needs it
    assert sorted(multiplied) == sorted(everything if dora else {"up_proj", "gate_proj"})


def test_frozen_and_full_linears_keep_the_same_without_the_product():
    for model in (make_model(GQA), make_model(GQA, trainable=False)):
        linear = model.blocks[0].mlp.down_proj
        x = np.ones((3, 20))
        (_, expected), found = linear.forward(x), linear.cache_of(x)
        assert len(found) == len(expected) == linear.weight.trainable and all(a is x for a in found)
