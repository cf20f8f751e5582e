"""Tasks: batches for training, fixed batches and prompts for evaluation, and scores for generated text."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

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

    Attributes:
        ids: (B, T) int64, the input tokens. targets: (B, T) int64; `targets[b, t]` is the token after `ids[b,
        t]`. mask: (B, T) bool, which targets count in the loss. segments: (B, T) integers or None; examples
        packed into one row have different numbers and do not see each other.
    """

    ids: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    segments: np.ndarray | None = None


class Task(Protocol):
    """What training and evaluation need to know of a task."""

    @property
    def name(self) -> str:
        """The name by which `make_task` knows it."""
        ...

    @property
    def sha256(self) -> str:
        """The hash of everything it is made from, the same for every seed."""
        ...

    @property
    def n_train(self) -> int:
        """The number of training examples."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits for evaluation."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """How many tokens a completion may need, EOS included; 0 for tasks without generation."""
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
    """Return a batch of whole sequences (prompt, answer, EOS) in which all but the first `n_prompt` tokens
    are targets.

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
    """Return the indices as a list; raises ValueError if there is none, or one outside 0..n_train-1."""
    chosen = [int(i) for i in indices]
    bad = next((i for i in chosen if not 0 <= i < n_train), None)
    if not chosen or bad is not None:
        raise ValueError(
            f"indices has {'no entry' if bad is None else bad}: give training examples 0..{n_train - 1}"
        )
    return chosen


def check_split(split: str, splits: tuple[str, ...]) -> None:
    """Raise ValueError for a split that the task does not have."""
    if split not in splits:
        raise ValueError(f"split is {split!r}: this task has {', '.join(splits)}")


class ProductsTask:
    """Instruction with attributes to product description (`minilora.data.products`); the prompt is masked.

    Training example i depends on (seed, i) only; the evaluation examples on neither.

    Args:
        n_train: number of training examples.
        n_eval: number of prompts of each evaluation split.
        seed: which training examples are drawn.
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
    """Next-byte prediction in windows of a token stream; the loss divided by ln 2 is bits per byte.

    Targets that are no bytes (BOS, EOS) are masked. Training windows lie evenly over the train stream,
    shifted by the seed; evaluation windows lie evenly over theirs and do not depend on it.

    Args:
        name: the task's name.
        streams: tokens of "train", "validation" and "test".
        n_train: number of training windows; by default as many as fit without overlap.
        n_eval: number of evaluation windows of each split.
        seed: shifts the training windows.
        window: tokens a window.
        targets: ids from here on are no targets; by default the byte tokenizer's specials.
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
            if len(streams[split]) <= window:
                raise ValueError(
                    f"{name}: the {split} split has {len(streams[split])} tokens, more than {window} are needed"
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
        """Return no prompts: this task is judged by its loss."""
        check_split(split, self.splits)
        return []

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        """Return no measures: this task is judged by its loss."""
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
    """Return a task by name: "products", "python" (standard library source) or "text" (any UTF-8 file).

    Args:
        name: which task.
        text_path: the file of the text task: its last 10 % are the test split, the 10 % before it validation.
        n_train: number of training examples; default 4096 products, or all windows that fit without overlap.
        n_eval: number of examples of each evaluation split.
        seed: which training examples are drawn; the evaluation examples never depend on it.
        window: tokens a window of "python" and "text".
        tokenizer: of "text"; without one a byte is a token.

    >>> make_task("products", n_train=8).batch([0, 1]).ids.shape[0]
    2

    Raises:
        ValueError: an unknown name, sizes below 1, an unusable text file, no standard library source.
    """
    if name not in TASK_NAMES:
        raise ValueError(f"task is {name!r}: choose one of {', '.join(TASK_NAMES)}")
    for field, value in (("n_train", n_train), ("n_eval", n_eval), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{field} is {value}: it must be 1 or more")
    if (name == "text") != (text_path is not None):
        raise ValueError(
            f"text_path is {text_path!r}: the task 'text' needs it, the others take none (task is {name!r})"
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
        tokens, known = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16), BOS
    else:
        tokens, known = np.array(tokenizer.encode(text, add_special=False), np.uint32), tokenizer.vocab_size
    first, second = len(tokens) * 8 // 10, len(tokens) * 9 // 10
    streams = {"train": tokens[:first], "validation": tokens[first:second], "test": tokens[second:]}
    return WindowTask("text", streams, n_train, n_eval, seed, window, known)
