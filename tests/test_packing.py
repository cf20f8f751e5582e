"""Packed examples: several in one row, which do not see each other, give what they give in rows of their
own."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from helpers import CONFIGS, GQA, assert_close, close_rtol, fill_adapters, make_model

from minilora import functional as F
from minilora.config import LoraConfig
from minilora.data.tasks import Batch
from minilora.injection import inject_lora
from minilora.parameters import Gradients
from minilora.threads import Workers
from minilora.training.evaluation import evaluate
from minilora.training.gradcheck import gradcheck
from minilora.training.loss import loss_and_grads, shard_loss
from minilora.training.shards import split_batch

LENGTHS = [[5, 1, 4], [3, 7], [2, 2, 5]]  # examples of each row; the last row has a place of padding left
WIDTH = 10


def examples(seed=0, vocab=GQA.vocab_size):
    """One (ids, targets, mask) for each example, row by row."""
    rng = np.random.default_rng(seed)
    rows = [
        [(rng.integers(vocab, size=n), rng.integers(vocab, size=n), rng.random(n) < 0.7) for n in row]
        for row in LENGTHS
    ]
    rows[0][1][2][:] = True  # the example of one token counts
    return rows


def packed(rows):
    """All examples of a row side by side, each with a number of its own, padding with another."""
    shape = (len(rows), WIDTH)
    batch = Batch(*(np.zeros(shape, dtype) for dtype in (int, int, bool, int)))
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            stop = start + len(example[0])
            for array, part in zip((batch.ids, batch.targets, batch.mask), example, strict=True):
                array[b, start:stop] = part
            batch.segments[b, start:stop] = number
            start = stop
    return batch


def padded(rows):
    """Each example in a row of its own, padded on the right."""
    flat = [example for row in rows for example in row]
    arrays = [np.zeros((len(flat), WIDTH), dtype) for dtype in (int, int, bool)]
    for b, example in enumerate(flat):
        for array, part in zip(arrays, example, strict=True):
            array[b, : len(part)] = part
    return Batch(*arrays)


def test_attention_of_segments_equals_the_loop_over_each():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, WIDTH, heads, 4)) for heads in (4, 2, 2))
    segments = packed(examples()).segments
    y, _ = F.attention_forward(q, k, v, segments)
    for b, row in enumerate(LENGTHS):
        start = 0
        for n in row:
            part = np.s_[b : b + 1, start : start + n]
            assert_close(
                y[part],
                naive.attention(q[part], k[part], v[part]),
                close_rtol(np.float64, 4, WIDTH),
                f"{b}, {start}",
            )
            start += n


def test_attention_of_segments_that_take_turns():
    """The numbers alone count, not where a segment lies: odd and even places do not see each other."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 8, 2, 4)) for _ in range(3))
    y, _ = F.attention_forward(q, k, v, np.array([[4, -7] * 4]))
    for first in (0, 1):
        part = np.s_[:, first::2]
        assert_close(y[part], naive.attention(q[part], k[part], v[part]), close_rtol(np.float64, 4, 4))


def test_attention_gradient_with_segments():
    rng = np.random.default_rng(2)
    q, k, v, dy = (rng.standard_normal((2, 6, heads, 4)) for heads in (4, 2, 2, 4))
    segments = np.array([[1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 2, 2]])
    gradients = F.attention_backward(dy, F.attention_forward(q, k, v, segments)[1])
    arrays = {"q": q, "k": k, "v": v}
    checks = gradcheck(
        lambda: float((F.attention_forward(q, k, v, segments)[0] * dy).sum()),
        arrays,
        dict(zip(arrays, gradients, strict=True)),
    )
    assert [c.name for c in checks] == ["q", "k", "v"]


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_rows_give_the_loss_and_gradients_of_padded_rows(config, checkpoint):
    model = make_model(config)
    rows = examples()
    with Workers(1) as workers:
        (loss, grads), (expected, wanted) = (
            loss_and_grads(model, batch, workers, shards=2, checkpoint=checkpoint)
            for batch in (packed(rows), padded(rows))
        )
    assert abs(loss - expected) <= close_rtol(np.float64, *[20] * 18) * expected
    for p, g in grads.items():
        assert_close(g, wanted[p], close_rtol(np.float64, *[WIDTH * 9] * 20), p.name)
    # without the numbers the examples would see each other, and the loss is another
    blind = packed(rows)
    with Workers(1) as workers:
        other, _ = loss_and_grads(model, Batch(blind.ids, blind.targets, blind.mask), workers)
    assert abs(other - expected) > 1e-3 * expected


def test_packed_adapters_and_evaluation():
    model = fill_adapters(
        inject_lora(make_model(GQA, trainable=False), LoraConfig(r=2), np.random.default_rng(0))
    )
    rows = examples(seed=3)
    found = [Gradients(model.trainable()) for _ in range(2)]
    losses = [
        shard_loss(model, batch, 7.0, grads)
        for batch, grads in zip((packed(rows), padded(rows)), found, strict=True)
    ]
    assert abs(losses[0] - losses[1]) <= close_rtol(np.float64, *[20] * 18) * losses[1]
    for p in found[0]:
        assert_close(found[0][p], found[1][p], close_rtol(np.float64, *[WIDTH * 9] * 20), p.name)
    one, other = (evaluate(model, [batch])["loss"] for batch in (packed(rows), padded(rows)))
    assert abs(one - other) <= close_rtol(np.float64, *[20] * 18) * other


def test_split_keeps_the_numbers_with_their_rows():
    batch = packed(examples())
    pieces = split_batch(batch, 2)
    assert [len(piece.ids) for piece in pieces] == [2, 1]
    assert np.array_equal(np.concatenate([piece.segments for piece in pieces]), batch.segments)
    assert all(piece.segments is None for piece in split_batch(padded(examples()), 2))


def test_segments_of_another_shape_are_refused():
    batch = packed(examples())
    with pytest.raises(ValueError, match=r"segments: shape \(3, 9\), but the ids have \(3, 10\)"):
        make_model().forward(batch.ids, segments=batch.segments[:, 1:])
