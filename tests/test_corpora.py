import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from minilora.data import corpora
from minilora.data.corpora import pretraining_tokens, python_source, read_text
from minilora.data.products import HELD_OUT_WORDS, stated_values
from minilora.data.tokenizer import BOS, EOS, decode


@pytest.fixture
def empty_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Python installation without source."""
    corpora._module_files.cache_clear()
    corpora._read_modules.cache_clear()
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    yield tmp_path
    corpora._module_files.cache_clear()
    corpora._read_modules.cache_clear()


# ---- standard library source ----


def test_splits_are_disjoint_and_about_80_10_10() -> None:
    names = {split: set(python_source(split, 1 << 40)) for split in corpora.SPLITS}
    total = sum(map(len, names.values()))
    assert len(set().union(*names.values())) == total > 200
    assert 0.7 < len(names["train"]) / total < 0.9
    assert 0.04 < len(names["validation"]) / total < 0.2
    assert 0.04 < len(names["test"]) / total < 0.2


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_source_is_budgeted_and_deterministic(split: str) -> None:
    source = python_source(split)
    assert all(corpora.module_split(name) == split for name in source)
    limit = corpora.MAX_TRAIN_BYTES if split == "train" else corpora.MAX_EVAL_BYTES
    assert 150_000 < sum(len(text.encode()) for text in source.values()) <= limit
    assert all(len(text.encode()) <= corpora.MAX_FILE_BYTES for text in source.values())
    assert list(source.items()) == list(python_source(split).items())


def test_no_module_text_is_in_two_splits() -> None:
    texts = {split: set(python_source(split).values()) for split in corpora.SPLITS}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]


def test_tests_tools_and_machine_files_are_left_out() -> None:
    names = [name for name, _ in corpora._module_files()]
    assert len(set(names)) == len(names)
    assert "json.decoder" in names and "json" in names
    skipped = re.compile(
        r"(^|\.)(test|tests|idlelib|lib2to3|encodings|pydoc_data)(\.|$)|_sysconfigdata|__pycache__|-packages"
    )
    assert not [name for name in names if skipped.search(name)]


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split='dev'.*train, validation, test"):
        python_source("dev")


def test_missing_source_has_a_clear_error(empty_library: Path) -> None:
    with pytest.raises(ValueError, match="no Python source under"):
        python_source("train")


def test_files_that_are_not_utf8_too_large_or_empty_are_skipped(empty_library: Path) -> None:
    train = [name for name in (f"m{i}" for i in range(40)) if corpora.module_split(name) == "train"]
    (empty_library / f"{train[0]}.py").write_bytes(b"x = '\xff'")
    (empty_library / f"{train[1]}.py").write_bytes(b"#" * (corpora.MAX_FILE_BYTES + 1))
    (empty_library / f"{train[2]}.py").write_bytes(b"")
    (empty_library / f"{train[3]}.py").write_bytes(b"x = 1\r\n")
    (empty_library / "test").mkdir()
    (empty_library / "test" / f"{train[4]}.py").write_bytes(b"x = 1\n")
    assert python_source("train") == {train[3]: "x = 1\n"}


# ---- docstrings and documents ----


def test_docstrings_take_no_code() -> None:
    source = (
        '"""Module."""\n\nclass A:\n    """A class."""\n    secret = 1\n\n'
        '    async def f(self):\n        """Do it."""\n'
    )
    assert corpora.docstrings(source, "mod") == "mod: Module.\n\nA: A class.\n\nf: Do it."
    assert corpora.docstrings("def broken(:") == ""


def test_real_documents_come_from_train_modules_only() -> None:
    text = "\n".join(corpora.real_documents())
    assert len(text) > 500_000
    names = set(re.findall(r"^([\w.]+): ", text, re.MULTILINE))  # each docstring stands under its name
    # Short names are also those of functions.
    modules = {split: {n for n in python_source(split) if "." in n or len(n) > 6} for split in corpora.SPLITS}
    assert len(modules["train"] & names) > 20
    assert not (modules["validation"] | modules["test"]) & names


def test_real_documents_hold_no_held_out_word() -> None:
    words = set(re.findall(r"\w+", " ".join(corpora.real_documents()).lower()))
    assert not words & HELD_OUT_WORDS


def test_paragraphs_with_a_held_out_word_are_dropped() -> None:
    word = min(HELD_OUT_WORDS)
    assert corpora._without_held_out(f"a\n\nb {word.upper()}, b\n\nc {word}x") == f"a\n\nc {word}x"


# ---- the pretraining mixture ----


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return pretraining_tokens(0, 400_000, window=209)


def test_pretraining_tokens_are_whole_rows(tokens: np.ndarray) -> None:
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    assert len(tokens) == 400_000 // 209 * 209
    assert tokens.max() == EOS


def test_half_of_the_rows_are_catalogue_and_begin_with_a_document(tokens: np.ndarray) -> None:
    rows = tokens.reshape(-1, 209)
    assert abs(np.mean(rows[:, 0] == BOS) - 0.5) < 0.03
    assert np.all(rows[:, 1:][rows[:, :-1] == EOS] == BOS)


def test_pretraining_tokens_depend_on_the_seed_only(tokens: np.ndarray) -> None:
    again = pretraining_tokens(0, 400_000, window=209)
    np.testing.assert_array_equal(again, tokens)
    assert not np.array_equal(pretraining_tokens(1, 400_000, window=209), tokens)


def test_pretraining_tokens_leak_nothing(tokens: np.ndarray) -> None:
    texts = [decode(row) for row in tokens.reshape(-1, 209)]
    # The first and last word of a row may be cut.
    words = {word for text in texts for word in re.findall(r"(?<=\W)[a-z]+(?=\W)", text.lower())}
    assert len(words) > 2000 and not words & HELD_OUT_WORDS
    assert not any("Describe: " in text or "\nText:" in text for text in texts)
    assert all(stated_values(text) == {} for text in texts if text.startswith("* "))


def test_catalogue_share() -> None:
    catalogue = pretraining_tokens(0, 20_000, window=100, catalogue_share=1.0).reshape(-1, 100)
    assert np.all(catalogue[:, 0] == BOS) and len(catalogue) == 200
    real = pretraining_tokens(0, 20_000, window=100, catalogue_share=0.0)
    assert "labels: " not in decode(real) and len(real) == 20_000


def test_real_text_goes_round_again_when_it_is_short(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("only a few words\n\n" * 20)
    tokens = pretraining_tokens(0, 3000, window=100, catalogue_share=0.0, text_path=path)
    assert len(tokens) == 3000 and np.count_nonzero(tokens == BOS) > 5


def test_text_file_replaces_the_real_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("wörter " * 500)
    text = decode(pretraining_tokens(0, 1000, window=100, catalogue_share=0.0, text_path=path))
    assert set(text.replace("\ufffd", "")) <= set("wörter ")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n_tokens": 10}, "n_tokens=10"),
        ({"window": 1}, "window=1"),
        ({"catalogue_share": 1.5}, "catalogue_share=1.5"),
        ({"catalogue_share": float("nan")}, "catalogue_share=nan"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pretraining_tokens(0, **arguments)  # type: ignore[arg-type]


def test_corpus_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text\n\n" * 30)
    first = corpora.corpus_sha256(path)
    assert re.fullmatch("[0-9a-f]{64}", first) and first == corpora.corpus_sha256(path)
    path.write_text("two text\n\n" * 30)
    assert corpora.corpus_sha256(path) != first != corpora.corpus_sha256()


# ---- text files ----


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße\n".encode())
    assert read_text(path) == read_text(str(path)) == "Grüße\n"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\xff\xfe", "not UTF-8 .byte 3 is 0xff"),
        ("abc".encode("utf-16"), "not UTF-8"),
        (b"short", "has 5 bytes: at least 100"),
    ],
)
def test_unusable_text_files_name_their_path(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.txt.*{match}"):
        read_text(path, 100)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.txt.*No such file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(
        ValueError, match=re.escape(repr(str(tmp_path))) if sys.platform != "win32" else "text file"
    ):
        read_text(tmp_path)
