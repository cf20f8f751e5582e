"""Tokenizers of language models, on small vocabularies: a naive BPE is the oracle."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import CHATML, byte_alphabet, gguf_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from minilora.config import ConfigError
from minilora.data.chat import ChatTemplate, check_messages
from minilora.data.text import PRE_TOKENIZERS, TextTokenizer
from minilora.data.tokenizer import BOS, EOS, PAD, ByteTokenizer

HI = [{"role": "user", "content": "Hi"}]


@cache
def tokenizer(pre: str = "smollm") -> TextTokenizer:
    return TextTokenizer.from_gguf(gguf_tokenizer(pre))


# ---- ids ----

S = "[ \t\r\n]"
NOT_S = "[^ \t\r\n]"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^ \t\r\na-zA-Z0-9]+|{S}+(?!{NOT_S})|{S}+"
LLAMA3 = (
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}"
    rf"| ?[^ \t\r\na-zA-Z0-9]+[\r\n]*|{S}*[\r\n]+|{S}+(?!{NOT_S})|{S}+"
)


def words(pre: str, text: str) -> list[str]:
    """The words of an ASCII text."""
    if pre == "smollm":  # each digit apart, then what stands between as GPT-2
        return [word for part in re.split("([0-9])", text) for word in re.findall(GPT2, part)]
    expression = {"gpt-2": GPT2, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}[pre]
    return re.findall(expression, text)


def naive_bpe(metadata: dict[str, Any], text: str) -> list[int]:
    """Merge the pair that was learnt first, again and again."""
    tokens, alphabet = metadata["tokenizer.ggml.tokens"], byte_alphabet()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    ids = []
    for word in words(metadata["tokenizer.ggml.pre"], text):
        pieces = [alphabet[byte] for byte in word.encode()]
        if metadata["tokenizer.ggml.pre"] == "llama-bpe" and "".join(pieces) in tokens:
            pieces = ["".join(pieces)]  # Llama 3 takes a whole word that is a token, merges or not
        while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            at = next(i for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair == best)
            pieces[at : at + 2] = ["".join(best)]
        ids += [tokens.index(piece) for piece in pieces]
    return ids


ASCII = st.text("abcehilnorstTS' \n\r\t0123456789.,!=_", max_size=40)
KNOWN = ("smollm", "gpt-2", "llama-bpe", "qwen2")


@pytest.mark.parametrize("pre", KNOWN)
@given(text=ASCII)
@example(text="abc a  12\n\n123 hello's\tabc  the\r\n\r\n1234 12.\nre")
def test_ids_are_those_of_a_naive_bpe(pre, text):
    assert tokenizer(pre).encode(text, add_special=False) == naive_bpe(gguf_tokenizer(pre), text)


def test_pre_tokenizers_differ_where_they_should():
    text = "  12\n\n123 abc"
    ids = {pre: tuple(tokenizer(pre).encode(text, add_special=False)) for pre in KNOWN}
    assert len(set(ids.values())) == len(KNOWN)
    assert tokenizer("default").encode(text) == tokenizer("gpt-2").encode(text)


@given(st.text())
def test_text_round_trip(text):
    assert tokenizer().decode(tokenizer().encode(text, add_special=False), skip_special=False) == text


def test_qwen2_composes_characters_as_its_tokenizer_json_does():
    assert (
        tokenizer("qwen2").encode("e\u0301")
        == tokenizer("qwen2").encode("\xe9")
        != tokenizer().encode("e\u0301")
    )


def test_special_tokens_in_a_text():
    tokens = gguf_tokenizer()["tokenizer.ggml.tokens"]
    ids = tokenizer().encode("he<|im_end|>he<think> 1")
    assert [tokens[i] for i in ids] == ["he", "<|im_end|>", "he", "<think>", "Ġ", "1"]
    assert tokenizer().decode(ids) == "hehe<think> 1"  # a user-defined token is text, a control token is not
    assert tokenizer().decode(ids, skip_special=False) == "he<|im_end|>he<think> 1"


def test_specials_of_the_file():
    t = tokenizer()
    assert (t.bos_id, t.eos_id, t.pad_id, t.begin, t.vocab_size) == (1, 2, 0, (), 3 + 256 + 20 + 2)
    assert t.stop_ids == {0, 2}  # <|endoftext|> and <|im_end|>, not <|im_start|>
    assert TextTokenizer.from_gguf(gguf_tokenizer(eot_token_id=7)).stop_ids == {0, 2, 7}
    assert TextTokenizer.from_gguf(gguf_tokenizer(padding_token_id=None, unknown_token_id=None)).pad_id == 2


@pytest.mark.parametrize(
    ("pre", "changed", "begin", "end"),
    [
        ("smollm", {}, [], []),
        ("smollm", {"add_bos_token": True}, [1], []),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ("llama-bpe", {}, [1], []),  # llama.cpp's default for this pre-tokenizer
        ("llama-bpe", {"add_bos_token": False}, [], []),
    ],
)
def test_bos_and_eos_around_a_text(pre, changed, begin, end):
    t = TextTokenizer.from_gguf(gguf_tokenizer(pre, **changed))
    plain = t.encode("hello", add_special=False)
    assert t.encode("hello") == [*begin, *plain, *end]
    assert t.begin == tuple(begin)
    assert t.chat(HI)[0] == 1 and t.chat(HI)[1] != 1  # the template writes its own


def tokens_with(**at: str) -> list[str]:
    tokens = gguf_tokenizer()["tokenizer.ggml.tokens"]
    return [at.get(f"t{i}", token) for i, token in enumerate(tokens)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "llama"}, r"ggml\.model is 'llama'.*folder with tokenizer\.json"),
        ({"model": None}, r"ggml\.model is missing"),
        ({"pre": "tekken"}, r"ggml\.pre is 'tekken'; known are .*smollm"),
        ({"pre": 3}, r"ggml\.pre is 3"),
        ({"merges": None}, r"ggml\.merges is missing"),
        ({"merges": []}, r"ggml\.merges is \[\]"),
        ({"merges": ["h e", "h q q"]}, r"ggml\.merges has 'h q q' at 1; a merge is two tokens"),
        ({"merges": ["h e", "hq"]}, r"ggml\.merges has 'hq' at 1"),
        ({"merges": ["h e", "zz q"]}, r"has 'zz q' at 1, but 'zz' is no token"),
        ({"merges": ["z q"]}, r"has 'z q' at 0, but 'zq' is no token"),
        ({"merges": ["h e", b"l l"]}, r"ggml\.merges has b'l l' at 1; all must be strings"),
        ({"tokens": None}, r"ggml\.tokens is missing"),
        ({"tokens": 5}, r"ggml\.tokens is 5"),
        ({"tokens": tokens_with(t7="!", t8="!")}, r"ggml\.tokens has '!' twice"),
        ({"token_type": [1, 2]}, r"ggml\.token_type has 2 entries; there are 281 tokens"),
        ({"token_type": 1}, r"ggml\.token_type has 1 entries"),
        ({"bos_token_id": 281}, r"ggml\.bos_token_id is 281; a token id is 0\.\.280"),
        ({"eos_token_id": -1}, r"ggml\.eos_token_id is -1"),
        ({"eos_token_id": True}, r"ggml\.eos_token_id is True"),
        ({"eos_token_id": None}, r"no end-of-text token"),
        ({"add_bos_token": True, "bos_token_id": None}, r"add_bos_token=True: needs a bos_token_id"),
        ({"add_bos_token": "yes"}, r"ggml\.add_bos_token is 'yes'"),
        ({"chat_template": 4}, r"tokenizer\.chat_template is 4"),
    ],
)
def test_metadata_that_cannot_be(changed, message):
    with pytest.raises(ConfigError, match=message):
        TextTokenizer.from_gguf(gguf_tokenizer(**changed))


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)


@given(
    st.dictionaries(st.sampled_from(sorted(gguf_tokenizer())), JUNK | st.lists(JUNK, max_size=4), min_size=1),
    st.data(),
)
def test_damaged_metadata_are_refused_or_work(damage, data):
    """Nothing but ConfigError: no crash of the library, no half-made tokenizer."""
    metadata = gguf_tokenizer() | damage
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key not in damage and data.draw(st.booleans()):  # one entry among the right ones
            entries = list(metadata[key])
            entries[data.draw(st.integers(0, len(entries) - 1))] = data.draw(
                JUNK | st.text(st.characters(), max_size=5)
            )
            metadata[key] = entries
    try:
        made = TextTokenizer.from_gguf(metadata)
        ids = made.encode("hello 12<|im_end|>")
        assert all(0 <= i < made.vocab_size for i in ids)
        made.decode(ids)
        made.chat(HI)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize("text", [None, 3, b"x", "\ud800"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ConfigError, match="must be a string"):
        tokenizer().encode(text)


@pytest.mark.parametrize("bad", [-1, 281, 2**40])
def test_foreign_ids_are_refused(bad):
    with pytest.raises(ConfigError, match=rf"ids\[1\]={bad}"):
        tokenizer().decode([5, bad])


def test_the_hash_is_of_all_that_counts():
    base = gguf_tokenizer()
    hashes = {
        TextTokenizer.from_gguf(metadata).sha256
        for metadata in (
            base,
            gguf_tokenizer("gpt-2"),
            gguf_tokenizer(eos_token_id=0),
            gguf_tokenizer(chat_template="x"),
            gguf_tokenizer(add_bos_token=True),
            gguf_tokenizer(merges=base["tokenizer.ggml.merges"][::-1]),
        )
    }
    assert len(hashes) == 6
    assert TextTokenizer.from_gguf(base, "elsewhere.gguf").sha256 in hashes


@pytest.mark.parametrize("missing", ["tokenizers", "jinja2"])
def test_missing_packages_are_named(missing, monkeypatch):
    made = TextTokenizer.from_gguf(gguf_tokenizer())
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*minilora\[llm\]"):
        made.chat(HI) if missing == "jinja2" else TextTokenizer.from_gguf(gguf_tokenizer())


# ---- streams ----


@given(st.lists(st.integers(0, 280), max_size=30))
@example([2, *(3 + byte for byte in "né👍".encode()), 3 + 0xE2, 3 + 0x82, 3 + 65, 3 + 0xF0])
def test_a_stream_says_what_is_sure_and_no_more(ids):
    stream, said = tokenizer().stream(), ""
    everything = tokenizer().decode(ids)
    for i, token in enumerate(ids):
        said += stream.push(token)
        assert everything.startswith(said)
        now = tokenizer().decode(ids[: i + 1])
        assert said == now.rstrip("\ufffd")  # and all of it: only a broken end waits
    assert said + stream.flush() == everything


def test_a_stream_of_bytes_waits_for_whole_characters():
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in (*"né👍".encode(), EOS)] == ["n", "", "é", "", "", "", "👍", ""]
    assert stream.push(0xF0) == "" and stream.flush() == "\ufffd"


def test_a_run_of_byte_tokens_is_sure_when_it_has_ended():
    """SentencePiece's decoder takes a run of byte tokens as one: a wrong byte makes nonsense of all of
    them."""
    import tokenizers

    vocabulary = {"a": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    t = TextTokenizer(
        backend,
        where="test",
        special={"eos": 1},
        add_bos=False,
        add_eos=False,
        stops=(),
        template=None,
        sha256="",
    )
    good, bad = [0, 2 + 0xC3, 2 + 0xA9, 0], [0, 2 + 0xC3, 2 + 0xA9, 2 + 0xFF, 0]
    for ids in (good, bad):
        stream = t.stream()
        said = [stream.push(token) for token in ids]
        assert said[:3] == ["a", "", ""] and "".join(said) == t.decode(ids)
    assert "\ufffd" in t.decode(bad) and "é" not in t.decode(bad)


# ---- chat ----


def test_chat_renders_the_template():
    t = tokenizer()
    text = "<|im_start|>user\nHi<|im_end|>\n"
    assert t.render(HI) == text
    assert t.chat(HI) == t.encode(text + "<|im_start|>assistant\n")
    assert t.chat(HI, add_generation_prompt=False) == t.encode(text)
    assert t.has_template and not TextTokenizer.from_gguf(gguf_tokenizer(chat_template=None)).has_template


def test_templates_see_specials_and_helpers():
    source = "{{ bos_token }}{{ messages | tojson }}{% generation %}x{% endgeneration %}"
    source += "{{ strftime_now('%Y') | length }}"
    t = TextTokenizer.from_gguf(gguf_tokenizer(chat_template=source))
    assert (
        t.render([{"role": "user", "content": "<é>"}]) == '<|im_start|>[{"role": "user", "content": "<é>"}]x4'
    )


def test_templates_trim_blocks_and_break_loops():
    source = "{% for m in messages %}\n  {% if loop.index > 1 %}\n{% break %}{% endif %}"
    source += "{{ m.content }}\n{% endfor %}"
    assert ChatTemplate(source).render(HI * 3) == "Hi\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(9**9) %}{% endfor %}", r"\*\* "),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "loops turn more than",
        ),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ messages[7].content }}", "no element 7"),
        ("\n{% for %}", "line 2"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'x' * 9999999999 }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory"),
        ("{{ '{:9999999999d}'.format(1) }}", "unsafe"),
        ("{{ 'x'.ljust(9999999999) }}", "unsafe"),
        ("{{ 'x' | center(9999999999) }}", "center"),
        ("{{ 'a\\nb' | indent(9999999999) }}", "indent"),
        ("{{ [1] | batch(9999999999, 'x') | list }}", "batch"),
        ("{{ lipsum(n=9999999) }}", "lipsum"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% for i in range(300) %}{{ messages[0].content }}{% endfor %}", "more than 16000000 characters"),
    ],
)
def test_hostile_templates_are_stopped_and_named(source, message):
    template = ChatTemplate(source, "model.gguf")
    with pytest.raises(ConfigError, match=rf"(?s)^model\.gguf: the chat template cannot be used.*{message}"):
        template.render([{"role": "user", "content": "x" * 100_000}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "give a list of messages"),
        ("Hi", "give a list of messages"),
        ({"role": "user", "content": "Hi"}, "give a list of messages"),
        (["Hi"], r"messages\[0\] is 'Hi'"),
        ([*HI, {"content": "Hi"}], r"messages\[1\] has no 'role'"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content is None"),
        ([{"role": 1, "content": ""}], r"messages\[0\]\.role is 1"),
    ],
)
def test_messages_that_are_none(messages, message):
    for refuse in (check_messages, tokenizer().chat):
        with pytest.raises(ConfigError, match=message):
            refuse(messages)


# ---- folders ----


def folder(tmp_path: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    tokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | (config or {})))
    for name, content in files.items():
        path = tmp_path / (name.replace("__", "."))
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_a_folder_gives_the_same_tokenizer(tmp_path):
    t = TextTokenizer.from_folder(folder(tmp_path))
    text = "a  12 hello<|im_end|>\n\n1é"
    assert t.encode(text) == tokenizer().encode(text)
    assert (t.bos_id, t.eos_id, t.stop_ids, t.begin) == (1, 2, {0, 2}, ())
    assert t.chat(HI) == tokenizer().chat(HI)
    assert t.sha256 == TextTokenizer.from_folder(tmp_path).sha256 != tokenizer().sha256


def test_a_saved_tokenizer_is_the_same_one(tmp_path):
    for name, content in tokenizer().files().items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    t, text = TextTokenizer.from_folder(tmp_path), "a  12 hello<|im_end|>\n\n1é"
    assert t.encode(text) == tokenizer().encode(text) and t.chat(HI) == tokenizer().chat(HI)
    assert (t.bos_id, t.eos_id, t.pad_id, t.stop_ids, t.begin) == tuple(
        getattr(tokenizer(), name) for name in ("bos_id", "eos_id", "pad_id", "stop_ids", "begin")
    )


def test_what_other_files_of_a_folder_say(tmp_path):
    made = folder(
        tmp_path,
        {"eos_token": None, "bos_token": None, "chat_template": [{"name": "default", "template": "D"}]},
        special_tokens_map__json={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        generation_config__json={"eos_token_id": [2, 8]},
        config__json={"eos_token_id": 9},
    )
    t = TextTokenizer.from_folder(made)
    assert (t.bos_id, t.eos_id, t.stop_ids, t.render(HI)) == (0, 2, {0, 2, 8, 9}, "D")
    (made / "chat_template.jinja").write_text("J")
    assert TextTokenizer.from_folder(made).render(HI) == "J"
    (made / "special_tokens_map.json").unlink()
    assert TextTokenizer.from_folder(made).eos_id == 2  # generation_config's


@pytest.mark.parametrize(
    ("config", "begin", "end"),
    [({}, [1], []), ({"add_bos_token": False}, [], []), ({"add_eos_token": True}, [1], [2])],
)
def test_bos_of_a_folder_by_its_post_processor_unless_the_config_says_otherwise(config, begin, end, tmp_path):
    import tokenizers

    made = folder(tmp_path, config)
    backend = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(made / "tokenizer.json"))
    t = TextTokenizer.from_folder(made)
    assert t.encode("hello hello hello") == [*begin, *tokenizer().encode("hello hello hello"), *end]


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({}, {"tokenizer__json": "{"}, r"tokenizer\.json: not a tokenizer"),
        ({}, {"tokenizer__json": "{}"}, r"tokenizer\.json: not a tokenizer"),
        ({}, {"tokenizer_config__json": "{"}, r"tokenizer_config\.json: not a JSON file"),
        ({}, {"tokenizer_config__json": "[]"}, r"tokenizer_config\.json: is no JSON object"),
        ({}, {"tokenizer_config__json": "[" * 100_000}, r"tokenizer_config\.json: not a JSON file"),
        ({"eos_token": "<eos>"}, {}, r"eos_token is '<eos>', which tokenizer\.json does not have"),
        ({"eos_token": None}, {}, "no end-of-text token"),
        (
            {},
            {"generation_config__json": {"eos_token_id": 281}},
            r"eos_token_id is 281; a token id is 0\.\.280",
        ),
        ({}, {"generation_config__json": {"eos_token_id": "2"}}, "eos_token_id is '2'"),
        ({}, {"generation_config__json": {"eos_token_id": -1}}, "eos_token_id is -1"),
        ({}, {"generation_config__json": {"eos_token_id": 2**70}}, "eos_token_id is"),
        ({"chat_template": 3}, {}, "chat_template is 3"),
    ],
)
def test_folders_that_cannot_be(config, files, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        TextTokenizer.from_folder(folder(tmp_path, config, **files))


def test_a_folder_without_tokenizer_json(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file$"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ConfigError, match="no such file; a SentencePiece"):
        TextTokenizer.from_folder(tmp_path)


# ---- bytes ----


def test_bytes_have_the_same_interface():
    t = ByteTokenizer()
    assert (t.bos_id, t.eos_id, t.pad_id, t.stop_ids, t.begin, t.vocab_size) == (
        BOS,
        EOS,
        PAD,
        {EOS},
        (BOS,),
        259,
    )
    assert t.encode("hé") == [BOS, 104, 195, 169] and t.encode("h", add_special=False) == [104]
    for refuse in (t.render, t.chat):
        with pytest.raises(ConfigError, match="tiny base has none"):
            refuse(HI)


def test_every_known_pre_tokenizer_can_be_built():
    for pre in PRE_TOKENIZERS:
        assert tokenizer(pre).decode(tokenizer(pre).encode("hello 12", add_special=False)) == "hello 12"
