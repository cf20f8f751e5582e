"""Loss and gradients of a batch, shard by shard, and evaluation without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.data.tasks import Batch
from minilora.layers import Gradients
from minilora.threads import Workers, single_blas
from minilora.transformer import Transformer


def split(batch: Batch, shards: int) -> list[Batch]:
    """Cut a batch by sequences into at most ``shards`` pieces, uneven where needed."""
    pieces = np.array_split(np.arange(len(batch.ids)), min(shards, len(batch.ids)))
    return [Batch(batch.ids[i], batch.targets[i], batch.mask[i]) for i in pieces]


def shard_loss(model: Transformer, batch: Batch, normalizer: float, grads: Gradients | None = None,
               key: tuple[int, int, int] | None = None, checkpoint: bool = False) -> float:
    """Masked cross-entropy of one shard, Σ over its counted targets / normalizer; with ``grads`` also the backward pass.

    Targets outside the mask cost no head computation: only the masked rows of the hidden states reach the head.
    """
    hidden, cache = model.forward(batch.ids, key, checkpoint)  # (B, T, C)
    rows = np.flatnonzero(batch.mask)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits, cache_head = model.head.forward(flat[rows], key)  # (N, V)
    loss, cache_loss = F.cross_entropy_forward(logits, batch.targets.reshape(-1)[rows], normalizer)
    if grads is not None:
        del logits
        dflat = np.zeros_like(flat)
        # rows = flat[rows]: the gradient goes back to the places it came from, the others get none
        dflat[rows] = model.head.backward(F.cross_entropy_backward(cache_loss), cache_head, grads)
        del hidden, flat, cache_head, cache_loss
        model.backward(dflat.reshape(*batch.ids.shape, -1), cache, grads)
    return loss


def loss_and_grads(model: Transformer, batch: Batch, workers: Workers, *, shards: int = 2,
                   stream: tuple[int, int] | None = None, checkpoint: bool = False) -> tuple[float, Gradients]:
    """Mean loss over the batch's counted targets, in nats, and its gradients.

    Each shard starts from zero and the shards are added in order, so the bytes do not depend on the number of threads.
    ``stream`` = (seed, step) turns dropout on.
    """
    count = int(batch.mask.sum())
    if count == 0:
        raise ValueError("batch: no target counts (the mask is empty); is the prompt longer than the context?")
    parameters = model.trainable()

    def one(job: tuple[int, Batch]) -> tuple[float, Gradients]:
        index, piece = job
        grads = Gradients(parameters)
        key = None if stream is None else (*stream, index)
        with np.errstate(over="ignore", invalid="ignore"):  # a thread has its own; the trainer looks at the result
            return shard_loss(model, piece, count, grads, key, checkpoint), grads

    results = workers.map(one, list(enumerate(split(batch, shards))))
    loss, total = results[0]
    for other_loss, other in results[1:]:
        loss += other_loss
        for parameter, gradient in other.items():
            total[parameter] += gradient
    return loss, total


@single_blas()
def evaluate(model: Transformer, batches: Sequence[Batch], workers: Workers | None = None) -> dict[str, float]:
    """Mean loss in nats over all counted targets, and the same in bits (bits per byte for a byte-level model)."""
    count = sum(int(batch.mask.sum()) for batch in batches)
    if count == 0:
        raise ValueError("batches: no target counts; evaluation needs at least one")
    own = workers or Workers(1)

    def total(batch: Batch) -> float:
        return shard_loss(model, batch, 1.0)

    try:
        loss = sum(own.map(total, batches)) / count
    finally:
        if workers is None:
            own.close()
    return {"loss": loss, "bpb": loss / float(np.log(2))}


def find_nonfinite(model: Transformer, ids: Any) -> str:
    """Name the first place where a forward pass of ``ids`` meets NaN or infinity, for the error message."""
    for parameter in model.parameters():
        if not np.isfinite(parameter.data).all():
            return f"parameter {parameter.name}"
    x, _ = model.embedding.forward(ids)
    rope = model.rope(np.arange(ids.shape[1]))
    for i, block in enumerate(model.blocks):
        x, _ = block.forward(x, rope)
        if not np.isfinite(x).all():
            return f"output of model.layers.{i}"
    return "output of model.norm or the head"
