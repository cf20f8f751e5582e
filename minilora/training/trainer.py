"""The trainer: steps, evaluation, progress, checkpoints.

Step t depends on the configuration, the seed and t alone: its batch is drawn from (seed, epoch), its dropout
from (seed, step, shard, layer). So a resumed run ends in the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from minilora.config import TrainConfig
from minilora.data.tasks import Task
from minilora.formats.files import writable_folder
from minilora.threads import Workers, single_blas
from minilora.training.allocator import keep_freed_memory
from minilora.training.evaluation import evaluate
from minilora.training.loss import loss_and_grads
from minilora.training.nonfinite import NonFiniteError, nonfinite_in_arrays, nonfinite_in_step
from minilora.training.optimizers import clip_, make_optimizer
from minilora.training.paging import hand_back
from minilora.training.resume import CHECKPOINT, History, Progress, read_checkpoint, write_checkpoint
from minilora.training.schedule import batch_indices, learning_rate
from minilora.transformer import Transformer
from minilora.variants import warn_if_it_cannot_train

Callback = Callable[[int, dict[str, float]], None]


class Trainer:
    """Train what is trainable in a model, on a task.

    Parameters
    ----------
    model : Transformer
        From `full`, `subset` or `inject_lora`; its trainable parameters are updated in place.
    task : Task
        Gives batches by example number.
    config : TrainConfig
        Steps, optimizer, schedule, shards, seed.
    threads : int, optional
        At most one for each shard, which is the default. They change the speed and nothing else.
    callbacks : sequence of callable
        Called after each step as `f(step, {"loss", "learning_rate", "grad_norm", "seconds", "tokens"})`;
        `tokens` counts padding too.
    folder : path, optional
        Where checkpoints are written, every `config.checkpoint_every` steps.
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
        for _, linear in model.linears():
            warn_if_it_cannot_train(linear)
        if task.n_train < 1:
            raise ValueError(f"task={task.name!r}: has no training examples")
        config = replace(config, learning_rate=config.peak_learning_rate)
        self.model, self.task, self.config = model, task, config
        self.callbacks, self.folder = list(callbacks), None if folder is None else Path(folder)
        self.optimizer = make_optimizer(parameters, config, self.folder)
        self.threads, self.step, self.history = threads, 0, History()

    def train(self, progress: bool = False) -> History:
        """Run the remaining steps; after Ctrl-C the last checkpoint is still there.

        Raises NonFiniteError on NaN or infinity.
        """
        if self.folder:
            writable_folder(self.folder)
        keep_freed_memory()
        c, task = self.config, self.task.name
        tokens, seconds = 0.0, 0.0  # of the steps alone, without evaluation
        bar = tqdm(None, f"train {task}", c.steps, disable=not progress, initial=self.step, unit="step")
        with single_blas(), Workers(min(self.threads or c.shards, c.shards)) as workers, bar:
            while self.step < c.steps:
                info = self._one_step(workers)
                tokens, seconds = tokens + info["tokens"], seconds + info["seconds"]
                speed = {"loss": f"{info['loss']:.3f}", "tokens/s": f"{tokens / seconds:,.0f}"}
                bar.set_postfix(speed, refresh=False)
                bar.update()
                for callback in self.callbacks:
                    callback(self.step - 1, info)
                if c.eval_every and self.step % c.eval_every == 0:
                    found = evaluate(self.model, self.task.eval_batches("validation"), workers)
                    self.history.evaluations.append({"step": self.step, **found})
                    if progress:
                        tqdm.write(f"step {self.step}: validation loss {found['loss']:.4f}", file=sys.stderr)
                if self.folder and c.checkpoint_every and self.step % c.checkpoint_every == 0:
                    self.save(self.folder / CHECKPOINT)
        self._check_finite()  # no later loss would show what the last step did
        return self.history

    @np.errstate(over="ignore", invalid="ignore")  # an error with the layer's name replaces the warnings
    def _one_step(self, workers: Workers) -> dict[str, float]:
        start, c = time.perf_counter(), self.config
        parts = c.gradient_accumulation_steps
        chosen = batch_indices(self.task.n_train, c.batch_size * parts, self.step, c.seed)
        batches = [self.task.batch(part) for part in np.split(chosen, parts)]
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
            where = nonfinite_in_step(self.model, batches, loss, grads)
            raise NonFiniteError(
                f"step {self.step}: loss {loss}, gradient norm {norm}: not finite, first seen in {where}; "
                + self._advice()
            )
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

    def _advice(self) -> str:
        kept = "no checkpoint was asked for"
        if self.folder and self.config.checkpoint_every:
            kept = "the last checkpoint is kept"
        rate = self.config.peak_learning_rate
        return f"{kept}. A learning_rate below {rate:g} or more warmup_steps usually helps"

    def _check_finite(self) -> None:
        where = nonfinite_in_arrays(self._arrays())
        if where is not None:
            raise NonFiniteError(f"after {self.step} steps: {where} is not finite; {self._advice()}")

    def _arrays(self) -> dict[str, np.ndarray]:
        return {f"param.{p.name}": p.data for p in self.optimizer.parameters} | self.optimizer.state()

    def save(self, path: str | Path) -> None:
        """Write a checkpoint; raises NonFiniteError, and writes nothing, if an array is not finite."""
        self._check_finite()
        progress = Progress(self.step, self.config, self.task.sha256, self.history)
        write_checkpoint(Path(path), self._arrays(), progress)
        for array in self.optimizer.state().values():
            hand_back(array)

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint; raises FileError if it belongs to another run."""
        progress = read_checkpoint(Path(path), self._arrays(), self.config, self.task.sha256)
        self.step = self.optimizer.t = progress.step
        self.history = progress.history
