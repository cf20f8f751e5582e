import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from minilora.data.corpora import python_source
from minilora.data.products import HELD_OUT_WORDS, describe, pair_split
from minilora.data.tasks import Batch, ProductsTask, Task, make_task, pad_batch
from minilora.data.tokenizer import BOS, EOS, PAD, decode


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} of the file.\n" for i in range(1000)))
    return path


@pytest.fixture(scope="module", params=["products", "python", "text"])
def task(request: pytest.FixtureRequest, text_file: Path) -> Task:
    return make_task(request.param, text_path=text_file if request.param == "text" else None, n_eval=40)


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("ids", "targets", "mask"))


# ---- what all tasks promise ----


def test_batches_have_the_promised_form(task: Task) -> None:
    for batch in [task.batch(np.arange(8)), *task.eval_batches("test", 16)]:
        assert batch.ids.dtype == batch.targets.dtype == np.int64 and batch.mask.dtype == np.bool_
        assert batch.ids.shape == batch.targets.shape == batch.mask.shape
        assert batch.ids.shape[1] <= 208
        inner = (batch.ids[:, 1:] != PAD) & (batch.targets[:, :-1] != PAD)
        np.testing.assert_array_equal(batch.ids[:, 1:][inner], batch.targets[:, :-1][inner])
        assert not np.any(batch.mask & (batch.targets == PAD))
        assert batch.mask.any(axis=1).all()


def test_examples_do_not_depend_on_their_batch(task: Task) -> None:
    single = task.batch([5])
    pair = task.batch([9, 5])
    n = single.ids.shape[1]
    np.testing.assert_array_equal(pair.ids[1, :n], single.ids[0])
    np.testing.assert_array_equal(pair.mask[1, :n], single.mask[0])


def test_evaluation_is_fixed_and_training_depends_on_the_seed(task: Task, text_file: Path) -> None:
    path = text_file if task.name == "text" else None
    other = make_task(task.name, text_path=path, n_eval=40, seed=1)
    assert other.sha256 == task.sha256 and len(task.sha256) == 64
    for split in task.splits:
        pairs = zip(task.eval_batches(split), other.eval_batches(split), strict=True)
        assert all(same(a, b) for a, b in pairs)
        assert task.prompts(split) == other.prompts(split)
    assert not same(task.batch(range(8)), other.batch(range(8)))
    assert same(task.batch(range(8)), make_task(task.name, text_path=path, n_eval=40).batch(range(8)))


def test_all_evaluation_examples_are_there(task: Task) -> None:
    for split in task.splits:
        sizes = [len(batch.ids) for batch in task.eval_batches(split, 16)]
        assert sizes == [16, 16, 8]


@pytest.mark.parametrize("indices", [[], [-1], [10**9]])
def test_bad_indices_are_refused(task: Task, indices: list[int]) -> None:
    with pytest.raises(ValueError, match=f"0..{task.n_train - 1}"):
        task.batch(indices)
    assert task.batch([task.n_train - 1]).ids.shape[0] == 1


def test_unknown_splits_are_refused(task: Task) -> None:
    for ask in (task.eval_batches, task.prompts, lambda split: task.score(split, [])):
        with pytest.raises(ValueError, match="split='train'.*validation, test"):
            ask("train")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": "poems"}, "task='poems'.*products, python, text"),
        ({"name": "products", "n_train": 0}, "n_train=0"),
        ({"name": "python", "n_eval": 0}, "n_eval=0"),
        ({"name": "python", "window": 0}, "window=0"),
        ({"name": "text"}, "text_path=None"),
        ({"name": "products", "text_path": "x.txt"}, "text_path='x.txt'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_task(**arguments)  # type: ignore[arg-type]


def test_pad_batch_masks_the_prompt_and_counts_the_end() -> None:
    batch = pad_batch([[BOS, 7, 8, 9, EOS], [BOS, 5, EOS]], n_prompt=[2, 1])
    assert batch.ids.tolist() == [[BOS, 7, 8, 9], [BOS, 5, PAD, PAD]]
    assert batch.targets.tolist() == [[7, 8, 9, EOS], [5, EOS, PAD, PAD]]
    assert batch.mask.tolist() == [[False, True, True, True], [True, True, False, False]]


# ---- products ----


@pytest.fixture(scope="module")
def products() -> ProductsTask:
    return ProductsTask()


def test_the_loss_counts_exactly_the_description(products: ProductsTask) -> None:
    batch = products.batch([3, 4])
    for b, index in enumerate((3, 4)):
        product, plan = products.example(index)
        counted = batch.targets[b][batch.mask[b]].tolist()
        assert decode(counted) == describe(product, plan) and counted[-1] == EOS
        seen = batch.ids[b][: np.argmax(batch.mask[b]) + 1].tolist()
        assert seen[0] == BOS and decode(seen) == product.prompt()


@pytest.mark.parametrize("split", ProductsTask.splits)
def test_prompts_fit_their_batches_and_their_score(products: ProductsTask, split: str) -> None:
    prompts, batches = products.prompts(split), products.eval_batches(split)
    assert len(prompts) == 256 >= 200
    rows = [
        (row, mask, targets)
        for batch in batches
        for row, mask, targets in zip(batch.ids, batch.mask, batch.targets, strict=True)
    ]
    answers = []
    for prompt, (row, mask, targets) in zip(prompts, rows, strict=True):
        assert row[: len(prompt)].tolist() == prompt and np.argmax(mask) == len(prompt) - 1
        answers.append(decode(targets[mask]))
        assert mask.sum() <= products.max_new_tokens
    assert products.score(split, answers) == {"recall": 1.0, "exact": 1.0}
    assert products.score(split, [decode(prompt) for prompt in prompts]) == {"recall": 0.0, "exact": 0.0}


def test_training_shows_no_held_out_word_or_pair(products: ProductsTask) -> None:
    train = [{value for _, value in products.example(i)[0].attributes} for i in range(products.n_train)]
    seen = {pair for values in train for pair in combinations(sorted(values), 2)}
    assert not set().union(*train) & HELD_OUT_WORDS
    assert {pair_split(a, b) for a, b in seen} == {"train"}
    for split in ("validation", "test"):
        for product in products.evaluation(split)[0]:
            pairs = set(combinations(sorted(value for _, value in product.attributes), 2))
            assert pairs - seen and {pair_split(a, b) for a, b in pairs - seen} >= {split}
    assert all(v in HELD_OUT_WORDS for x in products.evaluation("test_values")[0] for _, v in x.attributes)


def test_evaluation_splits_are_disjoint(products: ProductsTask) -> None:
    sets = {split: set(products.evaluation(split)[0]) for split in products.splits}
    assert all(len(found) == 256 for found in sets.values())
    assert not any(sets[a] & sets[b] for a, b in combinations(sets, 2))


def test_making_the_task_is_quick() -> None:
    start = time.perf_counter()
    make_task("products").batch(range(16))
    assert time.perf_counter() - start < 2.0


# ---- windows ----


def test_python_windows_come_from_their_split() -> None:
    task = make_task("python", n_train=64, n_eval=64)
    sources = {split: "\n".join(python_source(split).values()) for split in ("train", "validation", "test")}
    batches = {"train": [task.batch(range(64))], **{split: task.eval_batches(split) for split in task.splits}}
    for split, found in batches.items():
        for row in np.concatenate([batch.ids for batch in found]):
            parts = bytes(int(i) for i in row if i < BOS) if np.all(row < BOS) else b""
            assert parts.decode("utf-8", errors="ignore") in sources[split]
            assert len(row) == 128


def test_window_targets_are_bytes() -> None:
    batch = make_task("python", n_eval=64).eval_batches("validation", 64)[0]
    np.testing.assert_array_equal(batch.mask, batch.targets < 256)
    assert batch.mask.mean() > 0.99
    np.testing.assert_array_equal(batch.ids[:, 1:], batch.targets[:, :-1])


def test_python_task_has_no_prompts() -> None:
    task = make_task("python", n_train=10)
    assert task.n_train == 10 and task.max_new_tokens == 0
    assert task.prompts("test") == [] and task.score("test", []) == {}


def test_default_windows_do_not_overlap(text_file: Path) -> None:
    task = make_task("text", text_path=text_file, window=64)
    rows = task.batch(range(task.n_train)).ids
    train = text_file.read_bytes()[: text_file.stat().st_size * 8 // 10]
    assert task.n_train == (len(train) - 64) // 64
    starts = [train.find(bytes(row.tolist())) for row in rows]
    assert min(starts) >= 0 and min(np.diff(starts)) >= 64


def test_text_splits_are_the_ends_of_the_file(text_file: Path) -> None:
    data = text_file.read_bytes()
    task = make_task("text", text_path=text_file, n_eval=400, window=100)
    bounds = {
        "validation": (len(data) * 8 // 10, len(data) * 9 // 10),
        "test": (len(data) * 9 // 10, len(data)),
    }
    for split, (low, high) in bounds.items():
        covered = b"".join(
            bytes(row.tolist()) for batch in task.eval_batches(split) for row in (batch.ids[0], batch.ids[-1])
        )
        assert covered[:100] == data[low : low + 100]
        last = task.eval_batches(split)[-1].targets[-1]
        assert bytes(last.tolist()) == data[high - 100 : high]


def test_a_text_may_be_as_short_as_ten_windows(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 1290)
    assert make_task("text", text_path=path).n_train == 7
    path.write_bytes(b"x" * 1289)
    with pytest.raises(ValueError, match="short.txt.*1289 bytes: at least 1290"):
        make_task("text", text_path=path)
