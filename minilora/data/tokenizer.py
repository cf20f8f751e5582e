"""The tokenizer protocol, and the tiny base's byte tokenizer: 256 bytes and three special tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from minilora.config import ConfigError

Messages = Sequence[Mapping[str, Any]]
"""A conversation: a list of `{"role": "user" | "assistant" | "system", "content": text}`."""

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

    Examples
    --------
    >>> encode("né")
    [110, 195, 169]
    """
    return list(text if isinstance(text, bytes) else text.encode("utf-8"))


def decode(ids: Iterable[int]) -> str:
    """Return the text of token ids; specials are dropped, broken UTF-8 becomes U+FFFD.

    Raises
    ------
    ConfigError
        An id is outside 0..258.

    Examples
    --------
    >>> decode([BOS, 110, 195, 169, EOS])
    'né'
    """
    values = [int(i) for i in ids]
    check_ids(values, VOCAB_SIZE)
    return bytes(v for v in values if v < BOS).decode("utf-8", errors="replace")


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise ConfigError for an id outside 0..vocab_size-1."""
    bad = next((i for i, token in enumerate(ids) if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise ConfigError(
            f"ids[{bad}]={ids[bad]}: a token id is 0..{vocab_size - 1}; these ids belong to another "
            "vocabulary"
        )


class Tokenizer(Protocol):
    """What training data and generation need from a tokenizer."""

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
        """The id that fills short rows; never a target."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end generation: end of document, end of turn."""
        ...

    @property
    def begin(self) -> tuple[int, ...]:
        """The tokens that `encode` puts before a text with `add_special`: BOS, or nothing."""
        ...

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, so that `render` and `chat` work."""
        ...

    @property
    def sha256(self) -> str:
        """The hash of everything that decides a text's ids."""
        ...

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the ids of a text; `add_special` puts the model's BOS and EOS around it."""
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids."""
        ...

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, by the model's chat template."""
        ...

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation; by default the assistant speaks next."""
        ...

    def stream(self) -> TextStream:
        """Return a decoder for ids that come one by one."""
        ...


class TextStream:
    """Decode ids that come one by one; half a character waits for its other half.

    The texts that `push` and `flush` return, joined, equal `decode` of all ids.

    Parameters
    ----------
    decode : callable
        Returns the text of a list of ids.
    waits : callable
        Says whether the ids after this one may still change its text.

    Examples
    --------
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
        """Return the text that this id completes."""
        self._ids.append(int(token))
        if self._waits(self._ids[-1]):
            return ""
        # Decode all ids each time, in microseconds: a token's text may depend on those before it.
        text = self._decode(self._ids)
        return self._send(text.rstrip("\ufffd"))  # a broken end may be a character's first bytes

    def flush(self) -> str:
        """Return the text that was held back; broken characters become U+FFFD."""
        return self._send(self._decode(self._ids))

    def _send(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new


class ByteTokenizer:
    """The tiny base's tokenizer: a byte is a token.

    Examples
    --------
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
        """Return the text's bytes, after BOS with `add_special`."""
        if add_special:
            return [*self.begin, *encode(text)]
        return encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids; specials have no text, whatever `skip_special` says."""
        return decode(ids)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Raise ConfigError: the tiny base has no chat template."""
        raise ConfigError(
            "chat template: the tiny base has none, because it never learnt to chat; give raw text "
            "(--prompt, or JSONL with prompt and completion), or use --model smollm2"
        )

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Raise ConfigError: the tiny base has no chat template."""
        return encode(self.render(messages))

    def stream(self) -> TextStream:
        """Return a decoder for ids that come one by one."""
        return TextStream(self.decode)
