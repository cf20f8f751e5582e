"""The loss over a split, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from minilora.data.tasks import Batch
from minilora.threads import Workers, single_blas
from minilora.training.loss import shard_loss
from minilora.transformer import Transformer

EVALUATION_LOGITS_BYTES = 64 * 2**20
"""Most bytes of logits at a time in an evaluation; SmolLM2's for 32 × 128 tokens would be 800 MB."""


@single_blas()
def evaluate(
    model: Transformer, batches: Sequence[Batch], workers: Workers | None = None, progress: bool = False
) -> dict[str, float]:
    """Return the mean loss over all counted targets, in nats (`loss`) and in bits (`bpb`, for bytes)."""
    count = sum(int(batch.mask.sum()) for batch in batches)
    if count == 0:
        raise ValueError("batches: no target counts; evaluation needs at least one")
    chunk = max(
        1, EVALUATION_LOGITS_BYTES // (model.config.vocab_size * model.embedding.weight.dtype.itemsize)
    )
    bar = tqdm(None, "evaluate", len(batches), disable=not progress, leave=False, unit="batch")

    def total(batch: Batch) -> float:
        loss = shard_loss(model, batch, 1.0, logits_chunk=chunk)
        bar.update()
        return loss

    with bar, Workers(1) as alone:
        loss = sum((workers or alone).map(total, batches)) / count
    return {"loss": loss, "bpb": loss / float(np.log(2))}
