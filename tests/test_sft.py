"""Fine-tuning data: what is read, what is learnt, how rows are packed."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import gguf_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minilora.config import ConfigError
from minilora.data.examples import Example, read_jsonl, split_examples
from minilora.data.products import score_descriptions
from minilora.data.sft import SFTTask, encode_example, pack, products_chat, prompt_ids
from minilora.data.tasks import Batch, ProductsTask
from minilora.data.text import TextTokenizer
from minilora.data.tokenizer import BOS, EOS, PAD, ByteTokenizer, encode

BYTES = ByteTokenizer()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@cache
def chatty(**changed: Any) -> TextTokenizer:
    return TextTokenizer.from_gguf(gguf_tokenizer(**changed))


def written(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8"
    )
    return path


# ---- reading ----


def test_the_four_shapes(tmp_path):
    path = written(
        tmp_path,
        {"prompt": "a", "completion": "b", "id": 3},
        "",
        {"text": "né"},
        "   \r",
        {"messages": [user("Hi"), assistant("Yo")]},
        {"prompt": [user("Hi"), assistant("Yo"), user("So")], "completion": [assistant("No")]},
    )
    first, second, third, fourth = read_jsonl(path)
    assert first == Example("b", "a") and first.reference == "b"
    assert second == Example("né") and second.reference is None
    assert third.messages == (user("Hi"), assistant("Yo")) and third.given == 0 and third.reference == "Yo"
    assert len(fourth.messages) == 4 and fourth.given == 3 and fourth.reference == "No"


def test_line_breaks_of_windows_and_a_mark_at_the_beginning(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\xe2\x80\xa8c"}\r\n')
    assert [e.completion for e in read_jsonl(path)] == ["a", "b\u2028c"]  # U+2028 ends no line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[1]", r"\[1\] is no JSON object"),
        (
            {},
            r"has none of the fields that are read \(its fields: none\); "
            "it needs prompt and completion, messages, or text",
        ),
        ({"question": "a"}, r"its fields: 'question'"),
        ({"prompt": "a"}, "lacks the field 'completion'"),
        ({"completion": "a"}, "lacks the field 'prompt'"),
        ({"text": "a", "messages": []}, "mixes messages and text"),
        ({"text": 3}, "text is 3; it must be a string"),
        ({"text": ""}, "text is empty"),
        ({"prompt": "", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": None}, "completion is None"),
        ({"prompt": [user("Hi")], "completion": "b"}, "completion='b': give a list of messages"),
        ({"prompt": "a", "completion": [assistant("b")]}, "prompt='a': give a list of messages"),
        ({"messages": [user("Hi"), {"role": "assistant"}]}, r"messages\[1\] has no 'content'"),
        ({"messages": [user("Hi")]}, "no message of the role 'assistant'"),
        ({"messages": [assistant("Hi")]}, r"messages\[0\] is the assistant's"),
        (
            {"prompt": [user("a"), assistant("b")], "completion": [user("c")]},
            "no message of the role 'assistant' among 1",
        ),
    ],
)
def test_lines_that_cannot_be_are_named(line, message, tmp_path):
    path = written(tmp_path, {"text": "fine"}, "", line)
    with pytest.raises(ConfigError, match=rf"data\.jsonl, line 3: .*{message}"):
        read_jsonl(path)


def test_files_that_cannot_be(tmp_path):
    path = written(tmp_path, "", "  ")
    with pytest.raises(ConfigError, match=r"data\.jsonl: no example"):
        read_jsonl(path)
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}')
    with pytest.raises(ConfigError, match=r"line 2: not UTF-8 \(invalid start byte at byte 10\)"):
        read_jsonl(path)
    for missing in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_jsonl(missing)


# ---- what is learnt ----


def learnt(tokenizer: Any, example: Example) -> list[str]:
    """The runs of targets as text."""
    ids, targets = encode_example(tokenizer, example)
    runs: list[list[int]] = []
    for before, token, target in zip([False, *targets], ids, targets, strict=False):
        if target and not before:
            runs.append([])
        if target:
            runs[-1].append(token)
    assert targets[-1]
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def test_of_a_completion_all_is_learnt_and_its_end():
    ids, targets = encode_example(BYTES, Example("cd", "ab"))
    assert ids == [BOS, *b"abcd", EOS] and targets == [False] * 3 + [True] * 3
    assert encode_example(chatty(), Example("hello", "a"))[0] == [*chatty().encode("ahello"), 2]


def test_of_a_text_all_is_learnt():
    assert encode_example(BYTES, Example("ab")) == ([BOS, *b"ab", EOS], [False, True, True, True])
    assert learnt(chatty(), Example("ab hello")) == ["ab hello<|im_end|>"]
    assert encode_example(chatty(add_bos_token=True), Example("a"))[0] == [1, *chatty().encode("a"), 2]


def test_of_a_conversation_every_turn_of_the_assistant_is_learnt():
    chat = (user("Hi"), assistant("Yo"), user("So 12"), assistant("No"), user("Bye"))
    example = Example(messages=chat)
    assert learnt(chatty(), example) == ["Yo<|im_end|>", "No<|im_end|>"]  # the line breaks after them are not
    ids, _ = encode_example(chatty(), example)
    whole = chatty().chat(chat, add_generation_prompt=False)
    assert (
        ids == whole[: len(ids)]
        and chatty().decode(whole[len(ids) :], False) == "\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert learnt(chatty(), Example(messages=chat, given=3)) == ["No<|im_end|>"]


def test_the_prompt_of_training_is_that_of_generation():
    for example in (
        Example(messages=(user("Hi"), assistant(" \n yo"))),
        Example("b", "a "),
        Example("b", ""),
    ):
        for tokenizer in (chatty(), chatty(add_bos_token=True)):
            prompt = prompt_ids(tokenizer, example)
            ids, targets = encode_example(tokenizer, example)
            assert ids[: len(prompt)] == prompt and targets.index(True) == len(prompt)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = chatty(chat_template="{{ messages | length }}{{ messages[-1].content }}<|im_end|>")
    with pytest.raises(ConfigError, match=r"the text before messages\[1\] changes"):
        encode_example(forgetful, Example(messages=(user("Hi"), assistant("Yo"))))


def test_a_template_without_end_of_turn_is_learnt_to_its_end():
    plain = chatty(
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learnt(plain, Example(messages=(user("Hi"), assistant("Yo")))) == ["Yo\n"]


def test_an_empty_answer_without_end_of_turn_teaches_nothing():
    plain = chatty(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match="assistant's turns are empty"):
        encode_example(plain, Example(messages=(user("Hi"), assistant(""))))


def test_conversations_need_a_template():
    with pytest.raises(ConfigError, match="tiny base has none"):
        SFTTask(BYTES, {"train": [Example(messages=(user("Hi"), assistant("Yo")))]})
    with pytest.raises(ConfigError, match="no chat template"):
        SFTTask(chatty(chat_template=None), {"train": [Example(messages=(user("Hi"), assistant("Yo")))]})


# ---- packing ----


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_rows_hold_everything_and_are_well_filled(lengths, size):
    rows = pack(lengths, size)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert all(total <= size for total in filled)
    # no two rows would fit into one: what opened the later one had no room in the earlier, which only got
    # fuller
    assert all(a + b > size for i, a in enumerate(filled) for b in filled[:i])
    assert rows == pack(lengths, size)


def test_the_row_with_least_room_is_taken():
    assert pack([6, 7, 3], 10) == [[1, 2], [0]]


@pytest.mark.parametrize("lengths", [[3, 11], [0]])
def test_what_fits_no_row_is_refused(lengths):
    with pytest.raises(ConfigError, match=r"must be 1\.\.10"):
        pack(lengths, 10)


def numbered(n: int) -> list[Example]:
    rng = random.Random(0)
    return [Example("y" * rng.randrange(1, 9) + str(i), "x" * rng.randrange(9)) for i in range(n)]


def unpacked(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]]:
    """(ids, targets, mask) of the examples of a batch, by its segments; without what only fills."""
    assert batch.segments is not None
    found = []
    for ids, targets, mask, segments in zip(
        batch.ids, batch.targets, batch.mask, batch.segments, strict=True
    ):
        assert (np.diff(segments) >= 0).all()
        for number in np.unique(segments):
            here = segments == number
            if mask[here].any():
                found.append((tuple(ids[here]), tuple(targets[here]), tuple(mask[here])))
            else:
                assert number == segments.max() and (ids[here] == PAD).all()
    return found


def test_a_packed_row_holds_the_examples_unchanged():
    examples = split_examples(numbered(60))
    packed, padded = (SFTTask(BYTES, examples, max_length=32, packing=packing) for packing in (True, False))
    assert (
        padded.n_train == 48 > packed.n_train and "48 to train" in packed.report and "filled" in packed.report
    )
    batch = packed.batch(range(packed.n_train))
    assert batch.ids.shape[1] <= 32 and not (batch.mask & (batch.targets == PAD)).any()
    rows = padded.batch(range(48))
    assert rows.segments is None
    expected = []
    for ids, targets, mask in zip(rows.ids, rows.targets, rows.mask, strict=True):
        end = int(np.flatnonzero(mask)[-1]) + 1
        expected.append((tuple(ids[:end]), tuple(targets[:end]), tuple(mask[:end])))
    assert sorted(unpacked(batch)) == sorted(expected)


# ---- the task ----


def test_splits_are_the_same_for_every_seed():
    examples = split_examples(numbered(60), 5)
    tasks = [SFTTask(BYTES, examples, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([row.tobytes() for row in task.batch(range(task.n_train)).ids] for task in tasks)
    assert first == again != other and sorted(first) == sorted(other)
    for split in ("validation", "test"):
        assert len({str(task.prompts(split)) for task in tasks}) == 1
        assert len({task.eval_batches(split)[0].ids.tobytes() for task in tasks}) == 1
    assert len({task.sha256 for task in tasks}) == 1
    fewer = SFTTask(BYTES, split_examples(numbered(60)[:-1], 5))
    assert fewer.sha256 != tasks[0].sha256 != SFTTask(chatty(), examples).sha256


@pytest.mark.parametrize(
    ("n", "n_eval", "sizes"),
    [(3, 256, (1, 1, 1)), (19, 256, (17, 1, 1)), (50, 256, (40, 5, 5)), (50, 2, (46, 2, 2))],
)
def test_sizes_of_splits(n, n_eval, sizes):
    parts = split_examples(numbered(n), n_eval)
    assert tuple(len(parts[split]) for split in ("train", "validation", "test")) == sizes
    assert sorted(e.completion for part in parts.values() for e in part) == sorted(
        e.completion for e in numbered(n)
    )


def test_too_few_examples_are_refused():
    message = "number of examples=2: must be at least 3: one each to train, to validate and to test"
    with pytest.raises(ConfigError, match=message):
        split_examples(numbered(2))


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="max_length=1: must be at least 2"):
        SFTTask(BYTES, split_examples(numbered(5)), max_length=1)
    with pytest.raises(ConfigError, match="n_eval=0: must be at least 1"):
        split_examples(numbered(5), 0)
    with pytest.raises(ConfigError, match="splits='validation': must have 'train' among them"):
        SFTTask(BYTES, {"validation": numbered(5)})


def test_long_examples_are_cut_at_the_end_and_counted():
    examples = [Example("yyyy", "xx")] * 20 + [Example("y", "x" * 20)] * 20 + [Example("yy", "x")] * 5
    task = SFTTask(BYTES, {"train": examples, "validation": examples[:1], "test": examples[:1]}, max_length=5)
    assert (
        task.n_train == 25 and "42 cut to 5 tokens, 20 left out" in task.report
    )  # BOS xx yy and BOS x yy EOS; 40 + 1 + 1 cut
    batch = task.batch(range(25))
    assert batch.ids.shape == (25, 4) and batch.mask.sum() == 20 * 2 + 5 * 3


def test_a_single_token_without_bos_teaches_nothing():
    examples = [Example(""), Example("a"), Example("", "")]  # only the end; a and the end
    assert SFTTask(chatty(), {"train": examples, "test": examples}).batch([0]).ids.shape == (1, 1)


@pytest.mark.parametrize("packing", [True, False])
def test_nothing_left_to_learn_is_refused_with_the_numbers(packing):
    message = (
        r"train: no token to learn is left of 1 examples; 1 were cut at max_length=8 .* the longest has 23"
    )
    with pytest.raises(ConfigError, match=message):
        SFTTask(BYTES, {"train": [Example("y", "x" * 20)]}, max_length=8, packing=packing)


def test_prompts_references_and_scores():
    examples = [Example("Text."), Example("b", "a"), Example("cc", "a")]
    task = SFTTask(BYTES, {"train": examples, "validation": examples})
    assert task.splits == ("validation",) and task.max_new_tokens == 3
    assert task.prompts("validation") == [[BOS, *b"a"], [BOS, *b"a"]]  # a text has none
    assert task.score("validation", [" b\n", "c"]) == {"exact": 0.5}
    assert [batch.ids.shape for batch in task.eval_batches("validation", 2)] == [(2, 6), (1, 4)]
    with pytest.raises(ConfigError, match="number of completions=1: give one for each of 2 prompts"):
        task.score("validation", ["b"])
    with pytest.raises(ValueError, match="split='test'"):
        task.prompts("test")
    with pytest.raises(ValueError, match="indices=3: give"):
        task.batch([3])
    assert SFTTask(BYTES, {"train": examples[:1], "test": examples[:1]}).max_new_tokens == 0


def test_what_max_length_cannot_hold_is_not_asked_for():
    examples = [Example("b" * 30, "a"), Example("b", "a" * 9), Example("b", "a" * 8), Example("Text.")]
    task = SFTTask(BYTES, {"train": examples, "validation": examples}, max_length=10)
    assert task.prompts("validation") == [[BOS, *b"a"], [BOS, *b"aaaaaaaa"]] and task.max_new_tokens == 10
    assert task.score("validation", ["b", "b"]) == {"exact": 0.5}


# ---- products ----


def test_products_of_bytes_are_the_products_task():
    """Without a template the rows are those of `ProductsTask`, in another order."""
    theirs, ours = ProductsTask(20, 6, seed=3), products_chat(BYTES, 20, 6, seed=3, max_length=256)
    assert (
        ours.splits == theirs.splits
        and ours.name == theirs.name
        and ours.max_new_tokens == theirs.max_new_tokens
    )
    for split in theirs.splits:
        assert ours.prompts(split) == theirs.prompts(split)
        for a, b in zip(ours.eval_batches(split, 4), theirs.eval_batches(split, 4), strict=True):
            assert all((getattr(a, field) == getattr(b, field)).all() for field in ("ids", "targets", "mask"))
    a, b = ours.batch(range(20)), theirs.batch(range(20))
    assert sorted(zip(a.ids.tolist(), a.mask.tolist(), strict=True)) == sorted(
        zip(b.ids.tolist(), b.mask.tolist(), strict=True)
    )


def test_products_by_the_chat_template():
    base, task = ProductsTask(20, 6, seed=3), products_chat(chatty(), 20, 6, seed=3, max_length=400)
    products, _ = base.evaluation("test")
    prompt = chatty().decode(task.prompts("test")[0], skip_special=False)
    assert prompt == f"<|im_start|>user\n{products[0].prompt()}<|im_end|>\n<|im_start|>assistant\n"
    batch = task.eval_batches("test", 6)[0]
    texts = [chatty().decode(targets[mask]) for targets, mask in zip(batch.targets, batch.mask, strict=True)]
    assert task.score("test", texts) == {"recall": 1.0, "exact": 1.0}
    assert task.score("test", texts[::-1]) == score_descriptions(products, texts[::-1])
    assert (
        max(len(chatty().encode(text)) for text in texts)
        < task.max_new_tokens
        <= max(len(encode(t)) for t in texts) + 40
    )
    assert all(batch.targets[b][batch.mask[b]][-1] == 2 for b in range(6))
    assert task.sha256 == products_chat(chatty(), 4, 6, seed=9, max_length=400).sha256 != base.sha256
    with pytest.raises(ConfigError, match="raise max_length"):
        products_chat(chatty(), 20, 6, max_length=30)
