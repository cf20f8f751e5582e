"""Loss and gradients of a batch, shard by shard, and evaluation without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from minilora import kernels as F
from minilora.data.tasks import Batch
from minilora.layers import Array, Gradients, Key, Parameter
from minilora.threads import Workers, single_blas
from minilora.transformer import Transformer

LOGITS_BYTES = 64 * 2**20
"""Evaluation takes so many bytes of logits at a time: the tiny base's are never cut, SmolLM2's for 32 × 128
would be 800 MB."""


def split(batch: Batch, shards: int) -> list[Batch]:
    """Cut a batch by sequences into at most ``shards`` pieces, uneven where needed."""
    pieces = np.array_split(np.arange(len(batch.ids)), min(shards, len(batch.ids)))
    segments = batch.segments
    return [
        Batch(batch.ids[i], batch.targets[i], batch.mask[i], None if segments is None else segments[i])
        for i in pieces
    ]


def shard_loss(
    model: Transformer,
    batch: Batch,
    normalizer: float,
    grads: Gradients | None = None,
    key: Key = None,
    checkpoint: bool = False,
    logits_chunk: int = 0,
) -> float:
    """Masked cross-entropy of one shard, Σ over its counted targets / normalizer; with ``grads`` also the
    backward pass.

    Targets outside the mask cost no head computation: only the masked rows of the hidden states reach the
    head.
    """
    hidden, cache = model.forward(
        batch.ids, key, checkpoint, batch.segments, with_cache=grads is not None
    )  # (B, T, C)
    rows = np.flatnonzero(batch.mask)
    flat = hidden.reshape(-1, hidden.shape[-1])
    dflat = None if grads is None else np.zeros_like(flat)
    loss = head_loss(
        model, flat, rows, batch.targets.reshape(-1)[rows], normalizer, dflat, grads, key, logits_chunk
    )
    if grads is not None and dflat is not None:
        del hidden, flat
        model.backward(dflat.reshape(*batch.ids.shape, -1), cache, grads)
    return loss


def head_loss(
    model: Transformer,
    hidden: Array,
    rows: Array,
    targets: Array,
    normalizer: float,
    dhidden: Array | None,
    grads: Gradients | None,
    key: Key = None,
    chunk: int = 0,
) -> float:
    """The head and its loss on ``rows`` of hidden (N, C), at most ``chunk`` of them at a time (0: all).

    Logits, and their gradient, are the largest arrays of a step where the vocabulary is large: in chunks,
    forward and backward one after the other, they never exist as a whole. With ``grads`` the gradient is
    written into those rows of ``dhidden``; the others are not touched.
    """
    loss = 0.0
    for index, start in enumerate(range(0, len(rows), chunk or max(1, len(rows)))):
        part = slice(start, start + chunk if chunk else None)
        if key is not None and index > 0:
            key = (*key[:3], index)  # an adapted head's dropout draws anew for each chunk
        logits, cache_head = model.head.forward(hidden[rows[part]], key)  # (n, V)
        part_loss, cache_loss = F.cross_entropy_forward(logits, targets[part], normalizer, out=logits)
        loss += part_loss
        if grads is not None and dhidden is not None:
            dlogits = F.cross_entropy_backward(
                cache_loss, out=logits
            )  # logits, probabilities and gradient: one array in turn
            # x = hidden[rows]: the gradient goes back to the places it came from, the others get none
            dhidden[rows[part]] = model.head.backward(dlogits, cache_head, grads)
            del dlogits
        del logits, cache_head, cache_loss  # before the next chunk's are made
    return loss


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
    """Mean loss over the counted targets of a batch, in nats, and its gradients.

    Several batches count as one (gradient accumulation): they run one after another, so that memory is that
    of the largest, and all are divided by the targets of all. Each shard starts from zero and the shards are
    added in order, so the bytes do not depend on the number of threads. ``stream`` = (seed, step) turns
    dropout on.
    """
    batches = [batches] if isinstance(batches, Batch) else batches
    count = sum(int(batch.mask.sum()) for batch in batches)
    if count == 0:
        raise ValueError(
            "batch: no target counts (the mask is empty); is the prompt longer than the context?"
        )
    parameters = model.trainable()

    def one(job: tuple[int, Batch]) -> tuple[float, Gradients]:
        index, piece = job
        grads = Gradients(parameters)
        key = None if stream is None else (*stream, index)
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # a thread has its own; the trainer looks at the result
            return shard_loss(model, piece, count, grads, key, checkpoint, logits_chunk), grads

    loss, total = 0.0, Gradients(())  # the first shard's become the total
    for i, batch in enumerate(batches):
        for shard_loss_, grads in workers.map(one, list(enumerate(split(batch, shards), start=i * shards))):
            loss += shard_loss_
            if total:
                _add_all(total, grads, workers)
            else:
                total = grads
        del grads  # the next batch begins without the last shard's
    return loss, total


def _add_all(total: Gradients, grads: Gradients, workers: Workers) -> None:
    def add(p: Parameter) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            total.add(p, grads[p])

    workers.map_arrays(add, list(grads), [p.data.size for p in grads])


@single_blas()
def evaluate(
    model: Transformer, batches: Sequence[Batch], workers: Workers | None = None, progress: bool = False
) -> dict[str, float]:
    """Mean loss in nats over all counted targets, and the same in bits (bits per byte for a byte-level
    model)."""
    count = sum(int(batch.mask.sum()) for batch in batches)
    if count == 0:
        raise ValueError("batches: no target counts; evaluation needs at least one")
    own = workers or Workers(1)
    chunk = max(1, LOGITS_BYTES // (model.config.vocab_size * model.embedding.weight.dtype.itemsize))

    bar = tqdm(total=len(batches), desc="evaluate", unit="batch", disable=not progress, leave=False)

    def total(batch: Batch) -> float:
        loss = shard_loss(model, batch, 1.0, logits_chunk=chunk)
        bar.update()
        return loss

    try:
        with bar:
            loss = sum(own.map(total, batches)) / count
    finally:
        if workers is None:
            own.close()
    return {"loss": loss, "bpb": loss / float(np.log(2))}


def find_nonfinite(model: Transformer, batches: Sequence[Batch]) -> str:
    """Name the first place where a forward pass of the batches meets NaN or infinity, for the error
    message."""
    for parameter in model.parameters():
        if not np.isfinite(parameter.data).all():
            return f"parameter {parameter.name}"
    for batch in batches:
        x, _ = model.embedding.forward(batch.ids)
        rope = model.rope(np.arange(batch.ids.shape[1]))
        for i, block in enumerate(model.blocks):
            x, _ = block.forward(x, rope, segments=batch.segments)
            if not np.isfinite(x).all():
                return f"output of model.layers.{i}"
    return "output of model.norm or the head"
