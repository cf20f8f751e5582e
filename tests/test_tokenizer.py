import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, decode, encode


def test_specials_follow_the_bytes() -> None:
    assert (BOS, EOS, PAD, VOCAB_SIZE) == (256, 257, 258, 259)


@given(st.text())
def test_text_round_trip(text: str) -> None:
    ids = encode(text)
    assert bytes(ids) == text.encode("utf-8")
    assert decode(ids) == text


@given(st.binary())
def test_bytes_are_their_own_ids(data: bytes) -> None:
    assert encode(data) == list(data)
    assert decode(data) == data.decode("utf-8", errors="replace")


def test_specials_are_dropped() -> None:
    assert decode([BOS, *encode("é"), EOS, PAD, PAD]) == "é"


def test_a_cut_character_becomes_the_replacement_character() -> None:
    assert decode(encode("né")[:-1]) == "n\ufffd"


def test_accepts_numpy_ids() -> None:
    assert decode(np.array([104, 105, 257])) == "hi"


@pytest.mark.parametrize("bad", [-1, 259, 50256])
def test_foreign_ids_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"ids\[1\]={bad}"):
        decode([65, bad])


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        encode("\ud800")
