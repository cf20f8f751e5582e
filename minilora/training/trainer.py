"""The trainer: steps, evaluation, progress, checkpoints and resuming.

What step t does depends on the configuration, the seed and t alone: the batch is drawn from (seed, epoch),
dropout from (seed, step, shard, layer). So a checkpoint holds arrays and a step number, and a resumed run
ends in the same bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from minilora.config import TrainConfig
from minilora.data.tasks import Batch, Task
from minilora.formats.files import FileError, read_tensors, writable_folder, write_tensors
from minilora.threads import Workers, keep_memory, single_blas
from minilora.training.loss import evaluate, find_nonfinite, loss_and_grads
from minilora.training.optimizers import clip_, learning_rate, make_optimizer
from minilora.training.states import hand_back, piece, pieces
from minilora.transformer import Transformer

CHECKPOINT = "checkpoint.safetensors"
RECORDED = (
    "loss",
    "learning_rate",
    "grad_norm",
)  # what a checkpoint keeps of each step; seconds would make its bytes differ
LATER = (
    "logits_chunk",
    "gradient_accumulation_steps",
)  # fields that older checkpoints lack: their defaults change nothing
Callback = Callable[[int, dict[str, float]], None]


class NonFiniteError(ValueError):
    """Training met NaN or infinity; the message says at which step and layer."""


@dataclass
class History:
    """What a run recorded: one entry a step, one entry an evaluation."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Examples of one step: consecutive pieces of a fresh permutation of 0…n−1 for each epoch.

    >>> sorted(np.concatenate([batch_indices(6, 2, s, seed=0) for s in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, 1, epoch]).permutation(n) for epoch in set((places // n).tolist())
    }
    return np.array([orders[place // n][place % n] for place in places.tolist()])


class Trainer:
    """Trains what is trainable in a model, on a task, as a TrainConfig says.

    ``callbacks`` are called as f(step, {"loss", "learning_rate", "grad_norm", "seconds", "tokens"}) after
    each step; tokens are the places of the step's batches, padding included. ``threads`` changes the speed
    and nothing else.
    """

    def __init__(
        self,
        model: Transformer,
        task: Task,
        config: TrainConfig,
        *,
        threads: int | None = None,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | None = None,
    ):
        parameters = model.trainable()
        if not parameters:
            raise ValueError(
                "model: nothing is trainable; use full(model), subset(model, ...) or inject_lora(model, ...)"
            )
        if task.n_train < 1:
            raise ValueError(f"task={task.name!r}: has no training examples")
        config = replace(config, learning_rate=config.peak_learning_rate)
        self.model, self.task, self.config = model, task, config
        self.callbacks, self.folder = list(callbacks), None if folder is None else Path(folder)
        self.optimizer = make_optimizer(parameters, config, self.folder)
        self.threads, self.step, self.history = threads, 0, History()

    def train(self, progress: bool = False) -> History:
        """Run the remaining steps. Ctrl-C leaves the last checkpoint in place; raises NonFiniteError on NaN
        or infinity."""
        if self.folder:
            writable_folder(self.folder)
        keep_memory()
        tokens, seconds = 0.0, 0.0  # of the steps alone: evaluation does not count
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            disable=not progress,
            desc=f"train {self.task.name}",
            unit="step",
        )
        with (
            single_blas(),
            Workers(min(self.threads or self.config.shards, self.config.shards)) as workers,
            bar,
        ):
            while self.step < self.config.steps:
                info = self._one_step(workers)
                tokens, seconds = tokens + info["tokens"], seconds + info["seconds"]
                bar.set_postfix(
                    {"loss": f"{info['loss']:.3f}", "tokens/s": f"{tokens / seconds:,.0f}"}, refresh=False
                )
                bar.update()
                for callback in self.callbacks:
                    callback(self.step - 1, info)
                if self.config.eval_every and self.step % self.config.eval_every == 0:
                    found = evaluate(self.model, self.task.eval_batches("validation"), workers)
                    self.history.evaluations.append({"step": self.step, **found})
                    if progress:
                        tqdm.write(f"step {self.step}: validation loss {found['loss']:.4f}", file=sys.stderr)
                if (
                    self.folder
                    and self.config.checkpoint_every
                    and self.step % self.config.checkpoint_every == 0
                ):
                    self.save(self.folder / CHECKPOINT)
        self._check_finite()  # no later loss would show what the last step did
        return self.history

    @np.errstate(
        over="ignore", invalid="ignore"
    )  # what is not finite ends in an error that says more than a warning
    def _one_step(self, workers: Workers) -> dict[str, float]:
        start, c = time.perf_counter(), self.config
        chosen = batch_indices(
            self.task.n_train, c.batch_size * c.gradient_accumulation_steps, self.step, c.seed
        )
        batches = [self.task.batch(part) for part in np.split(chosen, c.gradient_accumulation_steps)]
        loss, grads = loss_and_grads(
            self.model,
            batches,
            workers,
            shards=c.shards,
            stream=(c.seed, self.step),
            checkpoint=c.gradient_checkpointing,
            logits_chunk=c.logits_chunk,
        )
        norm = clip_(grads, c.max_grad_norm, workers)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise NonFiniteError(self._explain(loss, norm, batches, grads))
        rate = learning_rate(self.step, c)
        self.optimizer.step(grads, rate, workers)
        self.step += 1
        info = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "seconds": time.perf_counter() - start,
            "tokens": float(sum(batch.ids.size for batch in batches)),
        }
        self.history.steps.append(info)
        return info

    def _explain(self, loss: float, norm: float, batches: list[Batch], grads: dict[Any, np.ndarray]) -> str:
        if not np.isfinite(loss):
            where = find_nonfinite(self.model, batches)
        else:
            broken = (p.name for p, g in grads.items() if not np.isfinite(g).all())
            where = "gradient of " + next(broken, "all parameters: their norm overflows")
        return f"step {self.step}: loss {loss}, gradient norm {norm}: not finite, first seen in {where}; {self._advice()}"

    def _advice(self) -> str:
        kept = (
            "the last checkpoint is kept"
            if self.folder and self.config.checkpoint_every
            else "no checkpoint was asked for"
        )
        return f"{kept}. A learning_rate below {self.config.peak_learning_rate:g} or more warmup_steps usually helps"

    def _check_finite(self) -> None:
        for name, array in self._arrays().items():
            finite = all(np.isfinite(piece(array, where)).all() for where in pieces(array.size))
            hand_back(array)
            if not finite:
                what = (
                    f"parameter {name.removeprefix('param.')}"
                    if name.startswith("param.")
                    else f"optimizer state {name}"
                )
                raise NonFiniteError(f"after {self.step} steps: {what} is not finite; {self._advice()}")

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, np.ndarray]:
        return {f"param.{p.name}": p.data for p in self.optimizer.parameters} | self.optimizer.state()

    def save(self, path: str | Path) -> None:
        """Write everything that training needs to go on; atomically, so that a crash leaves the previous one.

        Raises NonFiniteError, and writes nothing, if a parameter has become NaN or infinite.
        """
        self._check_finite()
        steps = [[info[name] for name in RECORDED] for info in self.history.steps]
        write_tensors(
            Path(path),
            self._arrays() | {"history": np.array(steps, np.float64).reshape(-1, len(RECORDED))},
            {
                "minilora_checkpoint": {
                    "step": self.step,
                    "config": asdict(self.config),
                    "task": self.task.sha256,
                    "evaluations": self.history.evaluations,
                }
            },
        )
        for array in self.optimizer.state().values():  # paged ones have been read as a whole
            hand_back(array)

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint; raises FileError if it belongs to another configuration, task or
        model."""
        path = Path(path)
        arrays, metadata = read_tensors(path)
        saved = metadata.get("minilora_checkpoint")
        if not isinstance(saved, dict) or not {"step", "config", "task", "evaluations"} <= set(saved):
            raise FileError(f"{path}: not a minilora training checkpoint")
        mine = {k: v for k, v in asdict(self.config).items() if k not in ("eval_every", "checkpoint_every")}
        theirs = {name: asdict(TrainConfig())[name] for name in LATER} | saved["config"]
        different = [
            f"{k}: {theirs.get(k)!r} there, {mine[k]!r} here" for k in mine if theirs.get(k) != mine[k]
        ]
        if different:
            raise FileError(
                f"{path}: made with another configuration ({'; '.join(different)}); use the same or another folder"
            )
        if saved["task"] != self.task.sha256:
            raise FileError(
                f"{path}: made from other data (task hash {saved['task'][:12]}, here {self.task.sha256[:12]})"
            )
        targets = self._arrays()
        history = arrays.pop("history", np.zeros((0, len(RECORDED))))
        if {n: (a.shape, a.dtype) for n, a in arrays.items()} != {
            n: (a.shape, a.dtype) for n, a in targets.items()
        }:
            raise FileError(f"{path}: its arrays do not fit what trains in this model")
        for name, array in targets.items():
            array[...] = arrays.pop(name)
            hand_back(array)
        self.step = self.optimizer.t = int(saved["step"])
        self.history = History(
            [dict(zip(RECORDED, row, strict=True)) for row in history.tolist()], saved["evaluations"]
        )
