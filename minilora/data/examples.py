"""Examples for supervised fine-tuning: JSON lines in the shapes that TRL's SFTTrainer takes.

A line is one of these; what is learnt stands beside it:

    {"prompt": "2+2=", "completion": "4"}                   the completion and its end
    {"messages": [{"role": "user", "content": "Hi"}, …]}    every turn of the assistant
    {"prompt": [messages], "completion": [messages]}        every turn of the assistant in the completion
    {"text": "…"}                                           everything

Messages become text by the model's chat template.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.config import ConfigError, require
from minilora.data.chat import check_messages
from minilora.data.tokenizer import Messages

FIELDS = "prompt and completion, messages, or text"
"""The fields of a line, as errors name them."""


@dataclass(frozen=True)
class Example:
    """One line: a text, a prompt with its completion, or a conversation.

    Attributes
    ----------
    completion : str
        The learnt text, if there are no messages.
    prompt : str or None
        What stands before the completion and is not learnt; None for a text.
    messages : tuple of mapping
        A conversation; the assistant's turns are learnt.
    given : int
        How many of the messages belong to the prompt.
    """

    completion: str = ""
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    given: int = 0

    @property
    def last_turn(self) -> int:
        """Index of the assistant's last message."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def reference(self) -> str | None:
        """What the model should write after `prompt_ids`; None for a text."""
        if self.messages:
            return self.messages[self.last_turn]["content"]
        if self.prompt is None:
            return None
        return self.completion


def read_jsonl(path: str | os.PathLike[str]) -> list[Example]:
    """Return the examples of a file of JSON lines; blank lines and other fields are ignored.

    Raises
    ------
    ConfigError
        The file cannot be read or has no example, a line is no JSON object or lacks a field. The message
        names the line.
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
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # raises for half of a surrogate pair
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
        raise ConfigError(f"{path}: no example; each line is a JSON object with {FIELDS}")
    return examples


def _example(row: Any) -> Example:
    """Return the example of one line's JSON."""
    if not isinstance(row, dict):
        raise ConfigError(f"{row!r:.80} is no JSON object; each line is one with {FIELDS}")
    shapes = []
    for fields in (("messages",), ("text",), ("prompt", "completion")):
        if any(field in row for field in fields):
            shapes.append(fields)
    has = ", ".join(map(repr, row)) or "none"
    if not shapes:
        raise ConfigError(f"has none of the fields that are read (its fields: {has}); it needs {FIELDS}")
    if len(shapes) > 1:
        mixed = " and ".join(fields[0] for fields in shapes)
        raise ConfigError(f"mixes {mixed} (its fields: {has}); it needs {FIELDS}")
    for field in shapes[0]:
        if field not in row:
            raise ConfigError(f"lacks the field {field!r}; it needs {FIELDS}")
    if "messages" in row:
        return _conversation(check_messages(row["messages"]), 0)
    if "text" in row:
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
            f"{field} is {value!r:.80}; it must be a string (or prompt and completion both lists of messages)"
        )
    if not value and not may_be_empty:
        raise ConfigError(f"{field} is empty: there is nothing to learn; leave the line out")
    return value


def _conversation(messages: Messages, given: int) -> Example:
    if messages[0]["role"] == "assistant":
        raise ConfigError(
            "messages[0] is the assistant's, but something must come before it: begin with a user's message"
        )
    if not any(message["role"] == "assistant" for message in messages[given:]):
        raise ConfigError(
            f"no message of the role 'assistant' among {len(messages) - given}: there is nothing to learn"
        )
    return Example(messages=tuple(messages), given=given)


def split_examples(examples: Sequence[Example], n_eval: int = 256) -> dict[str, list[Example]]:
    """Split examples into train, validation and test, by a fixed permutation.

    Validation and test get a tenth each, at least one example and at most `n_eval`.

    Raises
    ------
    ConfigError
        There are fewer than 3 examples, or `n_eval` is below 1.
    """
    require(n_eval >= 1, "n_eval", n_eval, "must be at least 1")
    require(
        len(examples) >= 3,
        "number of examples",
        len(examples),
        "must be at least 3: one each to train, to validate and to test",
    )
    n = min(n_eval, max(1, len(examples) // 10))
    order = random.Random("sft split").sample(range(len(examples)), len(examples))  # the same for every seed
    parts = {"validation": order[:n], "test": order[n : 2 * n], "train": order[2 * n :]}
    return {split: [examples[i] for i in sorted(part)] for split, part in parts.items()}
