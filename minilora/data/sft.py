"""Supervised fine-tuning: examples to ids, and to padded or packed batches."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from minilora.config import ConfigError, require
from minilora.data.examples import Example
from minilora.data.products import Product, describe, longest_description
from minilora.data.tasks import Batch, ProductsTask, check_indices, check_split
from minilora.data.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """Return the prompt for generation: all before the completion, or before the assistant's last turn."""
    if example.messages:
        return tokenizer.chat(example.messages[: example.last_turn])
    return [*tokenizer.begin, *tokenizer.encode(example.prompt or "", add_special=False)]


def encode_example(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[bool]]:
    """Return the ids of an example up to the last learnt one, and which of them are learnt.

    Prompt and completion are tokenized separately. So generation gets the same prompt tokens as training.
    (TRL tokenizes one text, and warns when a token spans the border.)

    Raises
    ------
    ConfigError
        There is no chat template for a conversation, or it rewrites earlier turns.

    Examples
    --------
    >>> from minilora.data.tokenizer import ByteTokenizer
    >>> encode_example(ByteTokenizer(), Example(prompt="a", completion="b"))
    ([256, 97, 98, 257], [False, False, True, True])
    """
    if not example.messages:
        prompt = prompt_ids(tokenizer, example)
        learnt = [*tokenizer.encode(example.completion, add_special=False), tokenizer.eos_id]
        return [*prompt, *learnt], [False] * len(prompt) + [True] * len(learnt)
    ids: list[int] = []
    targets: list[bool] = []
    done = ""
    for i, message in enumerate(example.messages):
        if i < example.given or message["role"] != "assistant":
            continue
        before = tokenizer.render(example.messages[:i], add_generation_prompt=True)
        after = tokenizer.render(example.messages[: i + 1])
        if not before.startswith(done) or not after.startswith(before):
            raise ConfigError(
                f"chat template: the text before messages[{i}] changes when it is added, so it is not known "
                "which tokens are the assistant's; use prompt and completion as raw text"
            )
        given = tokenizer.encode(before[len(done) :], add_special=False)
        said = tokenizer.encode(after[len(before) :], add_special=False)
        # learnt up to the last stop token: not the line break after <|im_end|>
        end = max((k + 1 for k, token in enumerate(said) if token in tokenizer.stop_ids), default=len(said))
        ids += [*given, *said]
        targets += [False] * len(given) + [True] * end + [False] * (len(said) - end)
        done = after
    if not any(targets):
        raise ConfigError(
            "messages: the assistant's turns are empty, and the chat template writes nothing after them: "
            "there is nothing to learn"
        )
    length = len(targets) - targets[::-1].index(True)
    return ids[:length], targets[:length]


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return rows of item numbers whose lengths add up to at most `size`.

    Best fit decreasing (TRL's "bfd"): the longest item first, each into the fullest row that has room.

    Raises
    ------
    ConfigError
        An item is longer than `size`, or empty.

    Examples
    --------
    >>> pack([3, 5, 2, 6], 8)
    [[3, 2], [1, 0]]
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the room left in them
    rooms = 0  # bit r is set if there is a row with room r
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[item]
        require(0 < need <= size, f"lengths[{item}]", need, f"must be 1..{size}")
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1  # the lowest bit is the least room that fits
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(item)
        open_rows[room - need].append(row)
        rooms |= 1 << (room - need)
    return rows


class SFTTask:
    """Fine-tuning data as a `minilora.data.tasks.Task`.

    Parameters
    ----------
    tokenizer : Tokenizer
        Makes the ids.
    examples : mapping of str to sequence of Example
        Examples of each split, "train" among them; `split_examples` makes them from a file's.
    max_length : int
        Longest example in tokens, and length of a packed row. Longer examples are cut at the end.
    packing : bool
        Put several examples into a row. They do not see each other (`Batch.segments`).
    seed : int
        Decides the order of the training examples, and so which of them share a row.
    name : str
        The task's name.
    score : callable, optional
        Scores the completions of a split; by default `exact`, the share that equals the file's.
    sha256 : str, optional
        The hash of what the task is made from; by default of the examples.

    Attributes
    ----------
    n_train : int
        Number of training rows, which are examples unless packed.
    max_new_tokens : int
        The longest completion in tokens, end included; 0 if there are only texts.
    report : str
        What was read, cut and left out, in one line.

    Raises
    ------
    ConfigError
        No token to learn is left in a split, `max_length` is below 2, or there is no chat template for
        messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        examples: Mapping[str, Sequence[Example]],
        *,
        max_length: int = 512,
        packing: bool = False,
        seed: int = 0,
        name: str = "jsonl",
        score: Callable[[str, list[str]], dict[str, float]] | None = None,
        sha256: str = "",
    ) -> None:
        require(max_length >= 2, "max_length", max_length, "must be at least 2")
        require("train" in examples, "splits", ", ".join(examples), "must have 'train' among them")
        self.name, self.max_length, self.packing = name, max_length, packing
        self.splits = tuple(split for split in examples if split != "train")
        self._tokenizer, self._score = tokenizer, score
        self._examples = {split: list(examples[split]) for split in self.splits}
        encoded = {}
        completion_lengths = [0]
        for split, part in examples.items():
            encoded[split] = [encode_example(tokenizer, example) for example in part]
            for example, (_, targets) in zip(part, encoded[split], strict=True):
                if example.reference is not None:
                    completion_lengths.append(_last_run(targets))
        self.max_new_tokens = min(max(completion_lengths), max_length)
        kept = {split: _cut(rows, max_length) for split, rows in encoded.items()}
        n_cut = {split: sum(len(ids) > max_length for ids, _ in rows) for split, rows in encoded.items()}
        for split in ("train", *self.splits):
            if not kept[split]:
                longest = max((len(ids) for ids, _ in encoded[split]), default=0)
                raise ConfigError(
                    f"{name}, {split}: no token to learn is left of {len(encoded[split])} examples; "
                    f"{n_cut[split]} were cut at max_length={max_length} tokens, and the longest has "
                    f"{longest}: raise max_length, or shorten the prompts"
                )
        self._kept = kept
        train = kept["train"]
        random.Random(f"sft {seed}").shuffle(train)
        lengths = [len(ids) - 1 for ids, _ in train]
        self._rows = pack(lengths, max_length) if packing else [[i] for i in range(len(train))]
        self.n_train = len(self._rows)
        total, n_kept = sum(map(len, encoded.values())), sum(map(len, kept.values()))
        self.report = (
            f"{total} examples ({len(train)} to train), {sum(n_cut.values())} cut to {max_length} tokens, "
            f"{total - n_kept} left out because nothing to learn remained; {self.n_train} rows"
        )
        if packing:
            self.report += f" of {max_length}, {sum(lengths) / (self.n_train * max_length):.0%} filled"
        if not sha256:
            rows = [asdict(example) for part in examples.values() for example in part]
            texts = [json.dumps(row, sort_keys=True, default=dict) for row in rows]
            sha256 = _hash(tokenizer.sha256, max_length, *texts)
        self.sha256 = sha256

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return training rows 0..n_train-1 by index."""
        chosen = check_indices(indices, self.n_train)
        rows = [[self._kept["train"][i] for i in self._rows[row]] for row in chosen]
        return collate(rows, self._tokenizer.pad_id, self.packing)

    def eval_batches(self, split: str, batch_size: int = 32) -> list[Batch]:
        """Return the fixed evaluation examples of a split, one per row."""
        check_split(split, self.splits)
        rows = [[row] for row in self._kept[split]]
        pad_id = self._tokenizer.pad_id
        return [collate(rows[i : i + batch_size], pad_id) for i in range(0, len(rows), batch_size)]

    def prompts(self, split: str) -> list[list[int]]:
        """Return the prompts to complete; texts have none."""
        return [prompt_ids(self._tokenizer, example) for example in self._with_reference(split)]

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        """Return the measures of one completion for each prompt.

        Raises
        ------
        ConfigError
            There is another number of completions.
        """
        expected = [example.reference or "" for example in self._with_reference(split)]
        require(
            len(completions) == len(expected),
            "number of completions",
            len(completions),
            f"give one for each of {len(expected)} prompts",
        )
        if self._score is not None:
            return self._score(split, completions)
        if not expected:
            return {}
        pairs = zip(completions, expected, strict=True)
        return {"exact": sum(text.strip() == reference.strip() for text, reference in pairs) / len(expected)}

    def _with_reference(self, split: str) -> list[Example]:
        """Return the examples with a reference, whose prompt is shorter than `max_length`."""
        check_split(split, self.splits)
        return [
            example
            for example in self._examples[split]
            if example.reference is not None and len(prompt_ids(self._tokenizer, example)) < self.max_length
        ]


def collate(
    rows: Sequence[Sequence[tuple[list[int], list[bool]]]], pad_id: int, packed: bool = False
) -> Batch:
    """Return a batch, filled on the right, of rows of examples.

    Parameters
    ----------
    rows : sequence of sequence
        The examples of each row: their ids, and which of them are learnt.
    pad_id : int
        Fills short rows.
    packed : bool
        Give the batch `segments`.

    Examples
    --------
    >>> row = [([7, 8, 9], [False, True, True]), ([5, 6], [False, True])]
    >>> collate([row], pad_id=0, packed=True).segments.tolist()
    [[0, 0, 1]]
    """
    shape = (len(rows), max(sum(len(ids) - 1 for ids, _ in row) for row in rows))
    ids_out, targets_out = np.full(shape, pad_id, np.int64), np.full(shape, pad_id, np.int64)
    mask, segments = np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids, targets) in enumerate(row):
            end = start + len(ids) - 1
            ids_out[b, start:end], targets_out[b, start:end] = ids[:-1], ids[1:]
            mask[b, start:end], segments[b, start:end] = targets[1:], number
            start = end
        segments[b, start:] = len(row)  # padding is a segment of its own
    return Batch(ids_out, targets_out, mask, segments if packed else None)


def _cut(rows: Sequence[tuple[list[int], list[bool]]], max_length: int) -> list[tuple[list[int], list[bool]]]:
    """Return the examples cut at the end, without those in which nothing is left to learn."""
    cut = [(ids[:max_length], targets[:max_length]) for ids, targets in rows]
    return [(ids, targets) for ids, targets in cut if any(targets[1:])]


def _last_run(targets: list[bool]) -> int:
    """Return the number of learnt tokens at the end."""
    return len(targets) if all(targets) else targets[::-1].index(False)


def _hash(*parts: Any) -> str:
    """Return the SHA-256 of the parts' hashes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(str(part).encode()).digest())
    return digest.hexdigest()


def products_chat(
    tokenizer: Tokenizer,
    n_train: int = 4096,
    n_eval: int = 256,
    seed: int = 0,
    *,
    max_length: int = 192,
    packing: bool = False,
) -> SFTTask:
    """Return the products task for a language model.

    Products, splits and scores are those of `minilora.data.tasks.ProductsTask`. The user writes the prompt,
    the assistant the description. Without a chat template both are raw text.

    Raises
    ------
    ConfigError
        `max_length` is too small for the prompts.
    """
    products = ProductsTask(n_train, n_eval, seed)

    def example(product: Product, plan: int) -> Example:
        prompt, text = product.prompt(), describe(product, plan)
        if not tokenizer.has_template:
            return Example(text, prompt)
        return Example(messages=({"role": "user", "content": prompt}, {"role": "assistant", "content": text}))

    examples = {"train": [example(*products.example(i)) for i in range(n_train)]}
    for split in products.splits:
        examples[split] = [example(*pair) for pair in zip(*products.evaluation(split), strict=True)]
    sha256 = _hash(products.sha256, tokenizer.sha256, max_length)
    task = SFTTask(
        tokenizer,
        examples,
        max_length=max_length,
        packing=packing,
        seed=seed,
        name="products",
        score=products.score,
        sha256=sha256,
    )
    task.max_new_tokens = 1 + longest_description(lambda text: len(tokenizer.encode(text, add_special=False)))
    return task
