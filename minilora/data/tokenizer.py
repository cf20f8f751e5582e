"""What a tokenizer is, and the tiny base's: a byte is a token, 256 bytes and three specials, nothing is out
of vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from minilora.config import ConfigError

Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``{"role": "user" | "assistant" | "system", "content": text}`` one after another."""

BOS = 256
"""Begins a document."""
EOS = 257
"""Ends a document."""
PAD = 258
"""Fills short rows of a batch on the right; never a target."""
VOCAB_SIZE = 259
"""256 bytes and the three specials."""


def encode(text: str | bytes) -> list[int]:
    """Return the UTF-8 bytes of a text as token ids 0..255, without specials.

    >>> encode("né")
    [110, 195, 169]
    """
    return list(text if isinstance(text, bytes) else text.encode("utf-8"))


def decode(ids: Iterable[int]) -> str:
    """Return the text of token ids; specials are dropped, broken UTF-8 becomes U+FFFD.

    >>> decode([BOS, 110, 195, 169, EOS])
    'né'

    Raises:
        ValueError: an id outside 0..258.
    """
    values = [int(i) for i in ids]
    for position, value in enumerate(values):
        if not 0 <= value < VOCAB_SIZE:
            raise ValueError(
                f"ids[{position}] is {value}: a token id is 0..{VOCAB_SIZE - 1}; these ids belong to another vocabulary"
            )
    return bytes(v for v in values if v < BOS).decode("utf-8", errors="replace")


class Tokenizer(Protocol):
    """What training data and generation need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of ids: 0..vocab_size-1."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document; None if there is none."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends a document or a turn."""
        ...

    @property
    def pad_id(self) -> int:
        """An id that fills short rows; never a target."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which generation ends: end of document, end of turn."""
        ...

    @property
    def begin(self) -> tuple[int, ...]:
        """What `encode` puts before a text with `add_special`: BOS, or nothing."""
        ...

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template: `render` and `chat` work."""
        ...

    @property
    def sha256(self) -> str:
        """The hash of all that makes ids of a text."""
        ...

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the ids of a text, with what the model wants around it (BOS, EOS) if `add_special`."""
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids."""
        ...

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, by the model's chat template."""
        ...

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation; by default the assistant is to speak next."""
        ...

    def stream(self) -> TextStream:
        """Return a decoder for ids that come one by one."""
        ...


class TextStream:
    """Text of ids that come one by one: what is sure is returned at once, half a character waits for its
    other half.

    All that `push` and `flush` return, joined, is `decode` of all ids.

    Args:
        decode: returns the text of ids.
        waits: whether the text after this id may still change what stands before it.

    >>> stream = ByteTokenizer().stream()
    >>> [stream.push(byte) for byte in "né".encode()], stream.flush()
    (['n', '', 'é'], '')
    """

    def __init__(
        self, decode: Callable[[list[int]], str], waits: Callable[[int], bool] = lambda _: False
    ) -> None:
        self._decode, self._waits = decode, waits
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token: int) -> str:
        """Return the text that is sure now and was not before."""
        self._ids.append(int(token))
        if self._waits(self._ids[-1]):
            return ""
        # Decoded from the beginning each time: what a token says may depend on those before it. It takes
        # microseconds.
        text = self._decode(self._ids)
        return self._send(text[: len(text.rstrip("\ufffd"))])  # a broken end may be a character's first bytes

    def flush(self) -> str:
        """Return what was held back; broken characters are U+FFFD now."""
        return self._send(self._decode(self._ids))

    def _send(self, text: str) -> str:
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        return new


class ByteTokenizer:
    """The tiny base's tokenizer, with the interface of `Tokenizer`.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("hi"), tokenizer.decode([BOS, 104, 105, EOS])
    ([256, 104, 105], 'hi')
    """

    vocab_size = VOCAB_SIZE
    bos_id, eos_id, pad_id = BOS, EOS, PAD
    stop_ids = frozenset({EOS})
    begin: tuple[int, ...] = (BOS,)
    has_template = False
    sha256 = hashlib.sha256(b"minilora bytes, BOS 256, EOS 257, PAD 258").hexdigest()

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return BOS, if `add_special`, and the text's bytes."""
        return [*self.begin * add_special, *encode(text)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids; specials have no text, with `skip_special` or without."""
        return decode(ids)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Raise ConfigError: the tiny base has no chat template."""
        raise ConfigError(
            "chat template: the tiny base has none, it was never taught to talk; give raw text "
            "(--prompt, or JSONL with prompt and completion), or use --model smollm2"
        )

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Raise ConfigError: the tiny base has no chat template."""
        return encode(self.render(messages))

    def stream(self) -> TextStream:
        """Return a decoder for ids that come one by one."""
        return TextStream(self.decode)
