"""A byte is a token: 256 bytes and three specials, so nothing is ever out of vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

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
