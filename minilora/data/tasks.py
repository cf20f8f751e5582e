"""Tasks: training batches, fixed evaluation batches and prompts, and scores of generated text."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from minilora.config import require, require_in
from minilora.data.corpora import python_source, read_text, token_stream
from minilora.data.products import (
    N_PLANS,
    Product,
    describe,
    draw_product,
    longest_description,
    score_descriptions,
    task_sha256,
)
from minilora.data.tokenizer import BOS, EOS, PAD, Tokenizer, encode

TASK_NAMES = ("products", "python", "text")


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences padded on the right.

    Attributes
    ----------
    ids : ndarray of int64, (B, T)
        Input tokens.
    targets : ndarray of int64, (B, T)
        `targets[b, t]` is the token after `ids[b, t]`.
    mask : ndarray of bool, (B, T)
        Which targets count in the loss.
    segments : ndarray of int, (B, T), or None
        Examples packed into one row have different numbers, and do not see each other.
    """

    ids: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    segments: np.ndarray | None = None


class Task(Protocol):
    """What training and evaluation need from a task."""

    @property
    def name(self) -> str:
        """The name that `make_task` takes."""
        ...

    @property
    def sha256(self) -> str:
        """The hash of everything the task is made from; the same for every seed."""
        ...

    @property
    def n_train(self) -> int:
        """The number of training examples."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the evaluation splits."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The most tokens a completion needs, EOS included; 0 for tasks without generation."""
        ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return training examples 0..n_train-1 by index."""
        ...

    def eval_batches(self, split: str, batch_size: int = 32) -> list[Batch]:
        """Return the fixed evaluation examples of a split, the same for every seed."""
        ...

    def prompts(self, split: str) -> list[list[int]]:
        """Return the prompts to complete; empty for tasks without generation."""
        ...

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        """Return the measures of one completion for each prompt."""
        ...


def pad_batch(sequences: Sequence[Sequence[int]], n_prompt: Sequence[int]) -> Batch:
    """Return a batch of sequences (prompt, answer, EOS) whose tokens after the prompt are targets.

    Parameters
    ----------
    sequences : sequence of sequences of int
        Token ids.
    n_prompt : sequence of int
        Number of prompt tokens in each sequence.

    Examples
    --------
    >>> pad_batch([[BOS, 7, 8, EOS], [BOS, 9, EOS]], n_prompt=[2, 2]).mask.tolist()
    [[False, True, True], [False, True, False]]
    """
    shape = (len(sequences), max(map(len, sequences)) - 1)
    ids, targets = np.full(shape, PAD, np.int64), np.full(shape, PAD, np.int64)
    mask = np.zeros(shape, np.bool_)
    for b, (sequence, start) in enumerate(zip(sequences, n_prompt, strict=True)):
        n = len(sequence) - 1
        ids[b, :n], targets[b, :n] = sequence[:-1], sequence[1:]
        mask[b, start - 1 : n] = True
    return Batch(ids, targets, mask)


def check_indices(indices: Sequence[int] | np.ndarray, n_train: int) -> list[int]:
    """Return the indices as a list; raise ConfigError if there is none, or one outside 0..n_train-1."""
    chosen = [int(i) for i in indices]
    allowed = f"give training examples 0..{n_train - 1}"
    require(len(chosen) > 0, "indices", chosen, allowed)
    bad = next((i for i in chosen if not 0 <= i < n_train), None)
    require(bad is None, "indices", bad, allowed)
    return chosen


def check_split(split: str, splits: tuple[str, ...]) -> None:
    """Raise ConfigError for a split that the task does not have."""
    require(split in splits, "split", split, f"this task has {', '.join(splits)}")


class ProductsTask:
    """The products task (`minilora.data.products`) for the byte tokenizer; the prompt is masked.

    Training example i depends on (seed, i) only. Evaluation examples depend on neither.

    Parameters
    ----------
    n_train : int
        Number of training examples.
    n_eval : int
        Number of prompts in each evaluation split.
    seed : int
        Decides which training examples are drawn.
    """

    name = "products"
    splits = ("validation", "test", "test_values")

    def __init__(self, n_train: int = 4096, n_eval: int = 256, seed: int = 0) -> None:
        self.n_train = n_train
        self.n_eval = n_eval
        self.seed = seed
        self.max_new_tokens = longest_description() + 1
        self._products: dict[str, tuple[list[Product], list[int]]] = {}

    @property
    def sha256(self) -> str:
        """The hash of words, frames, plans, generator and descriptions; the same for every seed."""
        return task_sha256()

    def example(self, index: int) -> tuple[Product, int]:
        """Return the product and the sentence plan of training example `index`."""
        rng = random.Random(f"products train {self.seed} {index}")
        return draw_product(rng, "train"), rng.randrange(N_PLANS)

    def evaluation(self, split: str) -> tuple[list[Product], list[int]]:
        """Return the products of an evaluation split, all different, and their sentence plans."""
        check_split(split, self.splits)
        if split not in self._products:
            rng = random.Random(f"products {split}")
            chosen: dict[Product, int] = {}
            while len(chosen) < self.n_eval:
                chosen.setdefault(draw_product(rng, split), rng.randrange(N_PLANS))
            self._products[split] = (list(chosen), list(chosen.values()))
        return self._products[split]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return training examples 0..n_train-1 by index."""
        return _product_batch([self.example(i) for i in check_indices(indices, self.n_train)])

    def eval_batches(self, split: str, batch_size: int = 32) -> list[Batch]:
        """Return the fixed evaluation examples of a split, in the order of `prompts`."""
        examples = list(zip(*self.evaluation(split), strict=True))
        return [_product_batch(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]

    def prompts(self, split: str) -> list[list[int]]:
        """Return BOS and the instruction of each evaluation example."""
        return [[BOS, *encode(product.prompt())] for product in self.evaluation(split)[0]]

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        """Return `recall` and `exact` of one completion for each prompt (`score_descriptions`)."""
        return score_descriptions(self.evaluation(split)[0], completions)


def _product_batch(examples: Sequence[tuple[Product, int]]) -> Batch:
    sequences, n_prompt = [], []
    for product, plan in examples:
        prompt = encode(product.prompt())
        sequences.append([BOS, *prompt, *encode(describe(product, plan)), EOS])
        n_prompt.append(len(prompt) + 1)
    return pad_batch(sequences, n_prompt)


class WindowTask:
    """Next-token prediction in windows of a token stream.

    With the byte tokenizer, the loss divided by ln 2 is bits per byte; BOS and EOS are no targets. Windows
    lie evenly over their stream. The seed shifts the training windows only.

    Parameters
    ----------
    name : str
        The task's name.
    streams : dict of str to ndarray
        Tokens of "train", "validation" and "test".
    n_train : int, optional
        Number of training windows; by default as many as fit without overlap.
    n_eval : int
        Number of evaluation windows in each split.
    seed : int
        Shifts the training windows.
    window : int
        Tokens per window.
    targets : int
        Ids below this one are targets; by default all bytes.
    """

    splits = ("validation", "test")
    max_new_tokens = 0

    def __init__(
        self,
        name: str,
        streams: dict[str, np.ndarray],
        n_train: int | None = None,
        n_eval: int = 256,
        seed: int = 0,
        window: int = 128,
        targets: int = BOS,
    ) -> None:
        for split in ("train", *self.splits):
            require(
                len(streams[split]) > window,
                f"{name}: tokens of the {split} split",
                len(streams[split]),
                f"must be more than window, which is {window}: give more text or a smaller window",
            )
        self.name = name
        free = len(streams["train"]) - window  # possible starts
        self.n_train = n_train or max(1, free // window)
        self.n_eval = n_eval
        self._streams = streams
        self._window = window
        self._targets = targets
        self._shift = random.Random(f"{name} train {seed}").random()

    @cached_property
    def sha256(self) -> str:
        """The hash of the three streams."""
        digest = hashlib.sha256()
        for split in ("train", *self.splits):
            stored = self._streams[split].astype("<u2" if self._targets == BOS else "<u4")
            digest.update(hashlib.sha256(stored.tobytes()).digest())
        return digest.hexdigest()

    def _batch(self, split: str, starts: np.ndarray) -> Batch:
        rows = self._streams[split][starts[:, None] + np.arange(self._window + 1)].astype(np.int64)
        targets = rows[:, 1:].copy()
        return Batch(rows[:, :-1].copy(), targets, targets < self._targets)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return training windows 0..n_train-1 by index."""
        chosen = np.array(check_indices(indices, self.n_train))
        free = len(self._streams["train"]) - self._window  # possible starts
        return self._batch("train", ((chosen + self._shift) * free / self.n_train).astype(np.int64))

    def eval_batches(self, split: str, batch_size: int = 32) -> list[Batch]:
        """Return the fixed evaluation windows of a split."""
        check_split(split, self.splits)
        starts = np.linspace(0, len(self._streams[split]) - self._window - 1, self.n_eval).astype(np.int64)
        return [self._batch(split, starts[i : i + batch_size]) for i in range(0, self.n_eval, batch_size)]

    def prompts(self, split: str) -> list[list[int]]:
        """Return no prompts: this task is measured by its loss."""
        check_split(split, self.splits)
        return []

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        """Return no scores: this task is measured by its loss."""
        check_split(split, self.splits)
        return {}


def make_task(
    name: str,
    *,
    text_path: str | os.PathLike[str] | None = None,
    n_train: int | None = None,
    n_eval: int = 256,
    seed: int = 0,
    window: int = 128,
    tokenizer: Tokenizer | None = None,
) -> Task:
    """Return a task by name.

    Parameters
    ----------
    name : {"products", "python", "text"}
        Product descriptions, the standard library's source, or any UTF-8 file.
    text_path : path, optional
        The file of "text". Its last 10 % are the test split, the 10 % before them validation.
    n_train : int, optional
        Number of training examples; by default 4096 products, or all windows that fit without overlap.
    n_eval : int
        Number of examples in each evaluation split.
    seed : int
        Decides which training examples are drawn. Evaluation examples do not depend on it.
    window : int
        Tokens per window of "python" and "text".
    tokenizer : Tokenizer, optional
        For "text"; by default a byte is a token.

    Raises
    ------
    ConfigError
        The name is unknown, a size is below 1, the text file cannot be used, or the standard library has no
        source.

    Examples
    --------
    >>> make_task("products", n_train=8).batch([0, 1]).ids.shape[0]
    2
    """
    require_in(name, TASK_NAMES, "task")
    for field, value in (("n_train", n_train), ("n_eval", n_eval), ("window", window)):
        require(value is None or value >= 1, field, value, "must be at least 1")
    require(
        (name == "text") == (text_path is not None),
        "text_path",
        text_path,
        f"the task 'text' needs it, the others take none; task is {name!r}",
    )
    if name == "products":
        return ProductsTask(n_train or 4096, n_eval, seed)
    if name == "python":
        streams = {
            split: token_stream(python_source(split).values()) for split in ("train", "validation", "test")
        }
        return WindowTask("python", streams, n_train, n_eval, seed, window)
    text = read_text(text_path or "", 10 * (window + 1))
    if tokenizer is None:
        tokens = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)
        targets = BOS
    else:
        tokens = np.array(tokenizer.encode(text, add_special=False), np.uint32)
        targets = tokenizer.vocab_size
    first, second = len(tokens) * 8 // 10, len(tokens) * 9 // 10
    streams = {"train": tokens[:first], "validation": tokens[first:second], "test": tokens[second:]}
    return WindowTask("text", streams, n_train, n_eval, seed, window, targets)
