"""Make the tiny base: next-byte prediction on real text and generated catalogue pages."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import minilora
from minilora.building import init_model
from minilora.composed import PretrainConfig
from minilora.config import ModelConfig, require
from minilora.data.corpora import corpus_sha256, pretraining_tokens
from minilora.data.tasks import Batch
from minilora.formats.checkpoint import save_model
from minilora.threads import Workers, available_threads
from minilora.training.evaluation import evaluate
from minilora.training.induction import start_with_induction
from minilora.training.resume import CHECKPOINT
from minilora.training.trainer import Trainer


class RowsTask:
    """Rows of tokens of one length; every target counts, and the last 2 % of the rows are held out.

    Parameters
    ----------
    tokens : ndarray
        Token ids (n,), cut into rows in this order; the rest is dropped.
    window : int
        Tokens of a row, one more than its targets.
    """

    name, splits, max_new_tokens = "pretrain", ("validation",), 0

    def __init__(self, tokens: np.ndarray, window: int):
        rows = tokens[: len(tokens) // window * window].reshape(-1, window)
        held_out = max(1, len(rows) // 50)
        require(
            len(rows) > held_out,
            "text",
            f"{len(tokens)} tokens",
            f"too short: at least {2 * window} are needed",
        )
        self.rows, self.held_out, self.n_train = rows[:-held_out], rows[-held_out:], len(rows) - held_out
        self.sha256 = hashlib.sha256(np.ascontiguousarray(tokens, "<u2").tobytes()).hexdigest()

    def _batch(self, rows: np.ndarray) -> Batch:
        rows = rows.astype(np.int64)
        return Batch(rows[:, :-1], rows[:, 1:], np.ones((len(rows), rows.shape[1] - 1), bool))

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return rows of the training part."""
        return self._batch(self.rows[np.asarray(indices)])

    def eval_batches(self, split: str, batch_size: int = 32) -> list[Batch]:
        """Return at most 512 rows of the held-out part."""
        return [
            self._batch(self.held_out[i : i + batch_size])
            for i in range(0, min(len(self.held_out), 512), batch_size)
        ]

    def prompts(self, split: str) -> list[list[int]]:
        """Return nothing: the base is judged by its loss."""
        return []

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        """Return no score."""
        return {}


def pretrain(config: PretrainConfig, progress: bool = True) -> Path:
    """Train a fresh base and write `base.safetensors` (float16); return its path.

    The metadata say how it was made. An interrupted run is continued from its checkpoint in `config.out`.
    """
    out = Path(config.out)
    window = config.tokens + 1
    n_tokens = int(config.train.steps * config.train.batch_size / 0.98 + 1) * window  # each row is seen once
    share = 0.7 if config.text is None else 0.0
    tokens = pretraining_tokens(
        config.train.seed, n_tokens, window=window, catalogue_share=share, text_path=config.text
    )
    task = RowsTask(tokens, window)
    rng = np.random.default_rng([config.train.seed, 0])
    model = init_model(ModelConfig(), rng)
    start_with_induction(model, rng)
    trainer = Trainer(model, task, config.training(), threads=config.threads, folder=out)
    if (out / CHECKPOINT).is_file():
        trainer.load(out / CHECKPOINT)
    trainer.train(progress)
    with Workers(config.threads or available_threads()) as workers:
        held_out = evaluate(model, task.eval_batches("validation"), workers)
    path = out / "base.safetensors"
    save_model(
        model,
        path,
        np.float16,
        {
            "made_by": {
                "command": config.command(),
                "corpus_sha256": corpus_sha256(config.text),
                "tokens_seen": config.train.steps * config.train.batch_size * config.tokens,
                "python_version": platform.python_version(),
                "minilora_version": minilora.__version__,
                "held_out_bits_per_byte": round(held_out["bpb"], 4),
            }
        },
    )
    return path
