"""Supervised fine-tuning data in the shapes that TRL's SFTTrainer takes: JSON lines to batches, padded or
packed.

    {"prompt": "2+2=", "completion": "4"}                         the completion is learnt, and then to stop
    {"messages": [{"role": "user", "content": "Hi"}, …]}          every turn of the assistant is learnt, by the chat template
    {"prompt": [messages], "completion": [messages]}              the assistant's turns of the completion are learnt
    {"text": "…"}                                                 all of it is learnt
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import ConfigError, require
from minilora.data.chat import check_messages
from minilora.data.products import Product, describe, longest_description
from minilora.data.tasks import Batch, ProductsTask, check_indices, check_split
from minilora.data.tokenizer import Messages, Tokenizer

SHAPES = "prompt and completion, messages, or text"


@dataclass(frozen=True)
class Example:
    """One line: a text (`prompt` is None), a prompt and its completion, or a conversation (`messages` is not
    empty).

    Attributes:
        completion: what is learnt, without chat template.
        prompt: what stands before it and is not learnt.
        messages: a conversation, of which the assistant's turns are learnt.
        given: how many of the messages belong to the prompt.
    """

    completion: str = ""
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    given: int = 0

    @property
    def reference(self) -> str | None:
        """What the model should write after `prompt_ids`; None for a text."""
        return (
            self.messages[_last_turn(self)]["content"]
            if self.messages
            else None
            if self.prompt is None
            else self.completion
        )


def read_jsonl(path: str | os.PathLike[str]) -> list[Example]:
    """Return the examples of a file of JSON lines; blank lines are skipped, other fields are not looked at.

    Raises:
        ConfigError: the file cannot be read or has no example, a line is not JSON or lacks a field; the
        message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}); give a file of JSON lines"
        ) from None
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8"))
                json.dumps(row, ensure_ascii=False).encode(
                    "utf-8"
                )  # half of a surrogate pair is no character
                examples.append(_example(row))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
            except UnicodeEncodeError:
                raise ConfigError(
                    f"{path}, line {number}: holds half of a surrogate pair, which is no character"
                ) from None
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})"
                ) from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not JSON ({error}); each line is one JSON object"
                ) from None
    if not examples:
        raise ConfigError(f"{path}: no example; each line is a JSON object with {SHAPES}")
    return examples


def _example(row: Any) -> Example:
    if not isinstance(row, dict):
        raise ConfigError(f"{row!r:.80} is no JSON object; each line is one with {SHAPES}")
    shapes = [
        fields
        for fields in (("messages",), ("text",), ("prompt", "completion"))
        if any(field in row for field in fields)
    ]
    if len(shapes) != 1:
        found = (
            "has none of the fields that are read"
            if not shapes
            else f"mixes {' and '.join(s[0] for s in shapes)}"
        )
        raise ConfigError(f"{found} (its fields: {', '.join(map(repr, row)) or 'none'}); it needs {SHAPES}")
    for field in shapes[0]:
        if field not in row:
            raise ConfigError(f"lacks the field {field!r}; it needs {SHAPES}")
    if shapes[0] == ("messages",):
        return _conversation(check_messages(row["messages"]), 0)
    if shapes[0] == ("text",):
        return Example(_string(row, "text"))
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before, after = check_messages(prompt, "prompt"), check_messages(completion, "completion")
        return _conversation([*before, *after], len(before))
    return Example(_string(row, "completion"), _string(row, "prompt", may_be_empty=True))


def _string(row: Mapping[str, Any], field: str, may_be_empty: bool = False) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ConfigError(
            f"{field} is {value!r:.80}; it must be a string (prompt and completion may both be lists of messages)"
        )
    if not value and not may_be_empty:
        raise ConfigError(f"{field} is empty: there is nothing to learn; leave the line out")
    return value


def _conversation(messages: Messages, given: int) -> Example:
    if messages[0]["role"] == "assistant":
        raise ConfigError(
            "messages[0] is the assistant's; something must come before it: begin with a user's message"
        )
    if not any(message["role"] == "assistant" for message in messages[given:]):
        raise ConfigError(
            f"no message of the role 'assistant' among {len(messages) - given}: there is nothing to learn"
        )
    return Example(messages=tuple(messages), given=given)


def _last_turn(example: Example) -> int:
    return max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")


def prompt_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """Return what stands before the completion, or before the assistant's last turn: the prompt for
    generation."""
    if example.messages:
        return tokenizer.chat(example.messages[: _last_turn(example)])
    return [*tokenizer.begin, *tokenizer.encode(example.prompt or "", add_special=False)]


def encode_example(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[bool]]:
    """Return the ids of an example up to the last that is learnt, and which of them are.

    Prompt and completion become ids apart, so that what generation gets as its prompt is what stood there in
    training, to the token. (One text might merge across the border; TRL, which makes one text of them, warns
    when that happens.)

    >>> from minilora.data.tokenizer import ByteTokenizer
    >>> encode_example(ByteTokenizer(), Example(prompt="a", completion="b"))
    ([256, 97, 98, 257], [False, False, True, True])

    Raises:
        ConfigError: a conversation without chat template, or one that rewrites earlier turns.
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
                f"chat template: the text before messages[{i}] changes when it is added, so that it cannot be said "
                "which tokens are the assistant's; use prompt and completion as raw text"
            )
        given, said = (
            tokenizer.encode(text, add_special=False) for text in (before[len(done) :], after[len(before) :])
        )
        end = max((k + 1 for k, token in enumerate(said) if token in tokenizer.stop_ids), default=len(said))
        ids += [*given, *said]
        targets += [False] * len(given) + [
            k < end for k in range(len(said))
        ]  # a line break after <|im_end|> is not learnt
        done = after
    if not any(targets):
        raise ConfigError(
            "messages: the assistant's turns are empty, and the chat template puts nothing behind them: there is "
            "nothing to learn"
        )
    length = len(targets) - targets[::-1].index(True)
    return ids[:length], targets[:length]


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return rows of item numbers whose lengths add up to at most `size`: best fit, longest first (TRL's
    "bfd").

    >>> pack([3, 5, 2, 6], 8)
    [[3, 2], [1, 0]]

    Raises:
        ConfigError: an item longer than `size`.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the room left in them
    rooms = 0  # bit r: there is a row with room r
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[item]
        require(0 < need <= size, f"lengths[{item}]", need, f"must be 1..{size}")
        fitting = rooms >> need
        if fitting:
            room = (
                need + (fitting & -fitting).bit_length() - 1
            )  # the lowest bit: the least room that is enough
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


def split_examples(examples: Sequence[Example], n_eval: int = 256) -> dict[str, list[Example]]:
    """Return train, validation and test: a fixed permutation, at most a tenth each for validation and test.

    Raises:
        ConfigError: fewer than 3 examples.
    """
    require(
        len(examples) >= 3,
        "examples",
        len(examples),
        "at least 3 are needed: one each to train, to validate and to test",
    )
    n = min(n_eval, max(1, len(examples) // 10))
    order = random.Random("sft split").sample(range(len(examples)), len(examples))  # the same for every seed
    parts = {"validation": order[:n], "test": order[n : 2 * n], "train": order[2 * n :]}
    return {split: [examples[i] for i in sorted(part)] for split, part in parts.items()}


class SFTTask:
    """Fine-tuning data as a `minilora.data.tasks.Task`.

    Args:
        tokenizer: makes the ids. examples: all examples, which are split (`split_examples`), or the examples
        of each split by its name, "train" among them. max_length: tokens of an example, of which more are cut
        off at the end, and places of a packed row. packing: put several examples into a row; they do not see
        each other (`Batch.segments`). n_eval: examples of each evaluation split, at most. seed: the order of
        the training examples, and so which of them share a row. name: the task's name. score: measures of the
        completions of a split; by default `exact`, the share equal to the file's. sha256: the hash of what it
        is made from; by default that of the examples.

    Attributes:
        n_train: training rows, which are examples unless packed.
        max_new_tokens: the longest completion in tokens, end included; 0 if there are only texts.
        report: what was read, cut and left out, in one line.

    Raises:
        ConfigError: too few examples, no target left after cutting, a max_length below 2, messages without a
        chat template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        examples: Sequence[Example] | Mapping[str, Sequence[Example]],
        *,
        max_length: int = 512,
        packing: bool = False,
        n_eval: int = 256,
        seed: int = 0,
        name: str = "jsonl",
        score: Callable[[str, list[str]], dict[str, float]] | None = None,
        sha256: str = "",
    ) -> None:
        require(max_length >= 2, "max_length", max_length, "must be 2 or more")
        require(n_eval >= 1, "n_eval", n_eval, "must be 1 or more")
        parts = examples if isinstance(examples, Mapping) else split_examples(examples, n_eval)
        require("train" in parts, "examples", ", ".join(parts), "needs 'train' among its splits")
        self.name, self.max_length, self.packing = name, max_length, packing
        self.splits = tuple(split for split in parts if split != "train")
        self._tokenizer, self._score = tokenizer, score
        self._examples = {split: list(parts[split]) for split in self.splits}
        encoded = {
            split: [encode_example(tokenizer, example) for example in part] for split, part in parts.items()
        }
        self.max_new_tokens = max(
            (
                _last_run(targets)
                for part, rows in encoded.items()
                for example, (_, targets) in zip(parts[part], rows, strict=True)
                if example.reference is not None
            ),
            default=0,
        )
        self.max_new_tokens = min(self.max_new_tokens, max_length)
        kept = {split: _cut(rows, max_length) for split, rows in encoded.items()}
        n_cut = {split: sum(len(ids) > max_length for ids, _ in rows) for split, rows in encoded.items()}
        for split in ("train", *self.splits):
            rows = kept[split]
            require(
                bool(rows),
                f"{name}, {split}: targets",
                0,
                f"of {len(encoded[split])} examples, {n_cut[split]} were cut at "
                f"max_length={max_length} tokens and no token to learn is left; the longest has "
                f"{max((len(ids) for ids, _ in encoded[split]), default=0)}: raise max_length, or shorten the prompts",
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
            + (
                f" of {max_length}, {sum(lengths) / (self.n_train * max_length):.0%} filled"
                if packing
                else ""
            )
        )
        content = (
            json.dumps(asdict(e), sort_keys=True, default=dict) for part in parts.values() for e in part
        )
        self.sha256 = sha256 or _hash(tokenizer.sha256, max_length, *content)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return training rows 0..n_train-1 by index."""
        chosen = check_indices(indices, self.n_train)
        rows = [[self._kept["train"][i] for i in self._rows[row]] for row in chosen]
        return collate(rows, self._tokenizer.pad_id, self.packing)

    def eval_batches(self, split: str, batch_size: int = 32) -> list[Batch]:
        """Return the fixed evaluation examples of a split, one a row."""
        check_split(split, self.splits)
        rows = [[row] for row in self._kept[split]]
        return [
            collate(rows[i : i + batch_size], self._tokenizer.pad_id) for i in range(0, len(rows), batch_size)
        ]

    def prompts(self, split: str) -> list[list[int]]:
        """Return the prompts to complete: not those of texts."""
        return [prompt_ids(self._tokenizer, example) for example in self._with_reference(split)]

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        """Return the measures of one completion for each prompt.

        Raises:
            ConfigError: another number of completions.
        """
        expected = [example.reference or "" for example in self._with_reference(split)]
        require(
            len(completions) == len(expected),
            "completions",
            len(completions),
            f"one for each of {len(expected)} prompts",
        )
        if self._score is not None:
            return self._score(split, completions)
        right = [
            text.strip() == reference.strip() for text, reference in zip(completions, expected, strict=True)
        ]
        return {"exact": sum(right) / len(right)} if right else {}

    def _with_reference(self, split: str) -> list[Example]:
        """Examples whose completion can be judged: none of texts, and none whose prompt alone fills
        ``max_length``."""
        check_split(split, self.splits)
        return [
            example
            for example in self._examples[split]
            if example.reference is not None and len(prompt_ids(self._tokenizer, example)) < self.max_length
        ]


def collate(
    rows: Sequence[Sequence[tuple[list[int], list[bool]]]], pad_id: int, packed: bool = False
) -> Batch:
    """Return a batch of rows of examples (ids, which of them are learnt), filled on the right.

    >>> collate([[([7, 8, 9], [False, True, True]), ([5, 6], [False, True])]], pad_id=0, packed=True).segments.tolist()
    [[0, 0, 1]]
    """
    shape = (len(rows), max(sum(len(ids) - 1 for ids, _ in row) for row in rows))
    ids_out, targets_out = np.full(shape, pad_id, np.int64), np.full(shape, pad_id, np.int64)
    mask, segments = np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for number, (ids, targets) in enumerate(row):
            end = at + len(ids) - 1
            ids_out[b, at:end], targets_out[b, at:end] = ids[:-1], ids[1:]
            mask[b, at:end], segments[b, at:] = targets[1:], number
            at = end
        segments[b, at:] = len(row)  # what fills the row is no part of an example
    return Batch(ids_out, targets_out, mask, segments if packed else None)


def _cut(rows: Sequence[tuple[list[int], list[bool]]], max_length: int) -> list[tuple[list[int], list[bool]]]:
    """Return the examples cut at the end, without those of which nothing is learnt then."""
    cut = [(ids[:max_length], targets[:max_length]) for ids, targets in rows]
    return [(ids, targets) for ids, targets in cut if any(targets[1:])]


def _last_run(targets: list[bool]) -> int:
    """Return how many targets there are at the end."""
    return len(targets) if all(targets) else targets[::-1].index(False)


def _hash(*parts: Any) -> str:
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
    """Return the products task (`minilora.data.tasks.ProductsTask`: same products, splits and scores) for a
    language model.

    The user writes the product's prompt and the assistant its description, by the chat template; without one,
    both are raw text.

    Raises:
        ConfigError: max_length is too small for the prompts.
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
