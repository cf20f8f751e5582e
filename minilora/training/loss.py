"""Loss and gradients of a batch, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora.data.tasks import Batch
from minilora.kernels import cross_entropy_backward, cross_entropy_forward
from minilora.layers import Key
from minilora.parameters import Array, Gradients
from minilora.threads import Workers
from minilora.training.shards import add_gradients, split_batch
from minilora.transformer import Transformer


def shard_loss(
    model: Transformer,
    batch: Batch,
    normalizer: float,
    grads: Gradients | None = None,
    key: Key = None,
    checkpoint: bool = False,
    logits_chunk: int = 0,
) -> float:
    """Return the masked cross-entropy of one shard, Σ over its counted targets / normalizer, in nats.

    With `grads` the backward pass follows, which adds to them. Only hidden states whose target counts reach
    the head. The other arguments are those of `loss_and_grads`.
    """
    wanted = grads is not None
    hidden, cache = model.forward(batch.ids, key, checkpoint, batch.segments, with_cache=wanted)  # (B, T, C)
    rows = np.flatnonzero(batch.mask)
    targets = batch.targets.reshape(-1)[rows]
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, dflat = head_loss(model, flat, rows, targets, normalizer, grads, key, logits_chunk)
    if grads is not None and dflat is not None:
        del hidden, flat, targets
        model.backward(dflat.reshape(*batch.ids.shape, -1), cache, grads)
    return loss


def head_loss(
    model: Transformer,
    hidden: Array,
    rows: Array,
    targets: Array,
    normalizer: float,
    grads: Gradients | None,
    key: Key = None,
    chunk: int = 0,
) -> tuple[float, Array | None]:
    """Run the head and its loss on `rows` of hidden (N, C); return the loss and, with `grads`, dhidden.

    At most `chunk` rows run at a time, forward and then backward (0: all), so that the logits, the largest
    array of a step, never exist as a whole.
    """
    dhidden = None if grads is None else np.zeros_like(hidden)
    loss = 0.0
    for index, start in enumerate(range(0, len(rows), chunk or max(1, len(rows)))):
        part = slice(start, start + chunk if chunk else None)
        if key is not None and index > 0:
            key = (*key[:3], index)  # an adapted head draws its dropout anew for each chunk
        logits, cache_head = model.head.forward(hidden[rows[part]], key)  # (n, V)
        # logits, probabilities and gradient take the same array in turn
        part_loss, cache_loss = cross_entropy_forward(logits, targets[part], normalizer, out=logits)
        loss += part_loss
        if grads is not None and dhidden is not None:
            dlogits = cross_entropy_backward(cache_loss, out=logits)
            # x = hidden[rows]: the gradient goes back to the rows it came from, the others get none
            dhidden[rows[part]] = model.head.backward(dlogits, cache_head, grads)
            del dlogits
        del logits, cache_head, cache_loss  # before the next chunk's are made
    return loss, dhidden


def loss_and_grads(
    model: Transformer,
    batches: Batch | Sequence[Batch],
    workers: Workers,
    *,
    shards: int = 2,
    stream: tuple[int, int] | None = None,
    checkpoint: bool = False,
    logits_chunk: int = 0,
) -> tuple[float, Gradients]:
    """Return the mean loss over the counted targets of a batch, in nats, and its gradients.

    Each shard's gradients start from zero and are added in order, so any number of threads gives the same
    bytes.

    Parameters
    ----------
    batches : Batch or sequence of Batch
        Several run one after another and count as one (gradient accumulation).
    shards : int
        Pieces that each batch is cut into; a worker runs one at a time.
    stream : tuple of int, optional
        (seed, step), the seed of dropout; without it there is none.
    checkpoint : bool
        Keep only what is expensive to recompute, as in `Transformer.forward`: less memory, more time.
    logits_chunk : int
        Rows of logits at a time, as in `head_loss`: less memory, more time.
    """
    batches = [batches] if isinstance(batches, Batch) else batches
    count = sum(int(batch.mask.sum()) for batch in batches)
    if count == 0:
        raise ValueError("batch: no target counts (empty mask); is the prompt longer than the context?")
    parameters = model.trainable()

    def one(job: tuple[int, Batch]) -> tuple[float, Gradients]:
        index, piece = job
        grads = Gradients(parameters)
        key = None if stream is None else (*stream, index)
        with np.errstate(over="ignore", invalid="ignore"):  # the trainer looks at the result
            return shard_loss(model, piece, count, grads, key, checkpoint, logits_chunk), grads

    loss, total = 0.0, Gradients(())  # the first shard's gradients become the total
    for i, batch in enumerate(batches):
        for part_loss, grads in workers.map(
            one, list(enumerate(split_batch(batch, shards), start=i * shards))
        ):
            loss += part_loss
            if total:
                add_gradients(total, grads, workers)
            else:
                total = grads
        del grads  # the next batch begins without the last shard's
    return loss, total
