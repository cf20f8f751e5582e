"""Shards of a batch: how it is cut, and how their gradients are added."""

from __future__ import annotations

import numpy as np

from minilora.data.tasks import Batch
from minilora.parameters import Gradients, Parameter
from minilora.threads import Workers


def split_batch(batch: Batch, shards: int) -> list[Batch]:
    """Cut a batch by sequences into at most `shards` pieces, uneven where needed."""
    pieces = np.array_split(np.arange(len(batch.ids)), min(shards, len(batch.ids)))
    segments = batch.segments
    return [
        Batch(batch.ids[i], batch.targets[i], batch.mask[i], None if segments is None else segments[i])
        for i in pieces
    ]


def add_gradients(total: Gradients, grads: Gradients, workers: Workers) -> None:
    """Add a shard's gradients to the total, in place."""

    def add(p: Parameter) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            total.add(p, grads[p])

    workers.map_arrays(add, list(grads), [p.data.size for p in grads])
