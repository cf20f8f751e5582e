"""One run of the sweep (`benchmarks.grid`) with torch + PEFT (+ bitsandbytes)."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.peers import Peers, adapted, llama, quantized, torch
from benchmarks.workload import Run, Text
from minilora.data.tasks import Batch
from minilora.training.schedule import batch_indices


def run_of_grid(run: Run, weights: dict[str, np.ndarray], task: Text) -> dict[str, Any]:
    """Make the model anew, train it on the batches that the Trainer draws, and return its losses."""
    torch.set_num_threads(1)
    model = llama(workload.SIZES[run.size].config, weights)
    if run.method == "qlora":
        model = quantized(model, double_quant=False)
    side, losses, held_out = Peers(threads=1), [], []
    side._ready(adapted(model, run.r), *_arrays(task.batch(range(1))), run.adapters(), run.learning_rate)
    _, step = side.works["step"]
    for t in range(run.steps):
        side.ids, side.targets = _tensors(
            task.batch(batch_indices(task.n_train, run.train().batch_size, t, run.seed))
        )
        losses.append(step())
    # without eval(): only bitsandbytes depends on it here, and would go on in bfloat16
    with torch.inference_mode():
        for batch in task.eval_batches("test"):
            side.ids, side.targets = _tensors(batch)
            held_out.append(float(side._loss()))
    found = torch.stack(losses).tolist()
    return {"loss": float(np.mean(held_out)), "train_loss": float(np.mean(found)), "first_loss": found[0]}


def _arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(batch.ids), np.ascontiguousarray(batch.targets)


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    ids, targets = _arrays(batch)
    return torch.from_numpy(ids), torch.from_numpy(targets)
