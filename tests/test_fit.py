"""What fits: the largest batch and rank against a search one by one, sizes, advice, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest

from minilora.config import ConfigError
from minilora.memory import PlanConfig, fit, parse_size, plan
from minilora.memory.budget import LARGEST_BATCH, _largest

OWN = 10**8


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of one block, of which there is nothing but its config.json."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 300,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "hidden_act": "silu",
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": True,
            }
        )
    )
    return str(path)


# ---- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8G", 8 * 10**9),
        ("8g", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8Gi", 8 * 2**30),
        (" 8 gib ", 8 * 2**30),
        ("8e9", 8 * 10**9),
        ("8E+9", 8 * 10**9),
        ("8000000000", 8 * 10**9),
        (8 * 10**9, 8 * 10**9),
        (8e9, 8 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        (".5M", 500_000),
        ("512K", 512_000),
        ("512KiB", 2**19),
        ("2TB", 2 * 10**12),
        ("2TiB", 2**41),
        ("1", 1),
        ("7B", 7),
        ("1e0MB", 10**6),
        ("3.", 3),
    ],
)
def test_sizes_that_are_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "lots",
        "-3GB",
        "0",
        "0GB",
        "8XB",
        "nan",
        "inf",
        "",
        "GB",
        "8GBB",
        "8 G B",
        "8,5GB",
        "1e400",
        "1e99",
        "٨GB",
        "8GB8",
        "0x10",
        "1_000",
        float("nan"),
        float("inf"),
        -1,
        True,
        None,
        "9" * 400,
        "8e9 e9",
        "1/2G",
        "0.4",
    ],
)
def test_nonsense_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"^fit=.*such as 8GB \(8·10⁹ bytes\), 8GiB"):
        parse_size(text)


# ---- the search


@pytest.mark.parametrize(
    "need",
    [
        lambda n: 10 * n,
        lambda n: 1000 + n * n,
        lambda n: 100 * (n // 7),
        lambda n: int(50 * n**0.5),
        lambda n: 5 if n < 40 else 10**9,
    ],
    ids=["line", "square", "steps", "root", "cliff"],
)
@pytest.mark.parametrize("slope", [0, 1, 10, 10**6])
def test_the_largest_is_what_a_search_one_by_one_finds(need, slope):
    for limit in (need(1), need(1) + 1, 500, 1400, 2000, 10**6):
        if need(1) <= limit:
            assert _largest(need, limit, 300, 1, slope) == max(n for n in range(1, 301) if need(n) <= limit)


def test_along_a_line_it_looks_four_times_at_most():
    seen = []

    def need(n):
        seen.append(n)
        return 12345 + 678 * n

    assert _largest(need, 10**6, LARGEST_BATCH, 1) == (10**6 - 12345) // 678
    assert len(set(seen)) <= 5  # 1, 2, the answer, and the one above it; once more where rounding was off


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("full", {"shards": 1}),
        ("lora", {}),
        ("lora", {"shards": 3}),
        ("qlora", {"gradient_checkpointing": True, "bits": 4}),
        ("qalora", {"bits": 3, "gradient_accumulation_steps": 2}),
    ],
)
def test_the_batch_fits_and_one_more_does_not(small, method, changes):
    @cache
    def need(batch):  # the whole batch planned, where fit plans its largest shard
        ledger = plan(small, method=method, context=32, batch_size=batch, **changes)
        return OWN + ledger.bound(changes.get("shards", 2))

    for limit in (need(1) - 1, need(1), need(2), need(7) - 1, need(7)):
        ranks = None if method == "full" else [8]
        (row,) = fit(limit, small, [method], ranks, own=OWN, context=32, **changes).rows
        assert row.needs == need(row.batch or 1)
        assert need(row.batch + 1) > limit and (row.batch == 0 or row.needs <= limit)
        assert (row.batch == 0) == (limit < need(1))


@pytest.mark.parametrize(
    ("methods", "ranks", "match"), [(["full"], [3], "r: is for method lora"), (["lora"], [8, 8], "twice")]
)
def test_ranks_that_mean_nothing_are_refused(methods, ranks, match):
    with pytest.raises(ConfigError, match=match):
        fit("8GB", "tiny", methods, ranks, own=0)


def test_the_grid_and_what_narrows_it(small):
    found = fit("1kB", small, own=0, context=64)
    assert [(r.method, r.weights, r.r) for r in found.rows] == [
        ("full", "float32", None),
        *(("lora", "float32", r) for r in (8, 64)),
        *(("qlora", f"nf{b}", r) for b in (4, 3, 2) for r in (8, 64)),
        *(("qalora", f"int{b}", r) for b in (8, 4, 3, 2) for r in (8, 64)),
    ]
    narrow = fit("1kB", small, ["lora", "qlora"], [4], own=0, context=64, bits=3, use_dora=True)
    assert [(r.method, r.weights, r.r) for r in narrow.rows] == [("lora", "float32", 4), ("qlora", "nf3", 4)]
    assert narrow.ranks == {}


def test_more_memory_never_fits_less_and_own_memory_counts_as_need(small):
    lora, less, more = (
        fit(n, small, [method], [8], own=0).rows[0]
        for n, method in ((10**8, "lora"), (10**8, "qalora"), (3 * 10**8, "qalora"))
    )
    assert lora.batch < less.batch < more.batch  # QA-LoRA keeps sums of groups, not inputs
    with_own = fit(120 * 10**6, small, ["qlora"], [8], own=20 * 10**6, bits=4).rows[0]
    without = fit(100 * 10**6, small, ["qlora"], [8], own=0, bits=4).rows[0]
    assert with_own.batch == without.batch and with_own.needs == without.needs + 20 * 10**6


def test_the_largest_rank_of_each_method(small):
    limit = plan(small, method="lora", r=100).bound(2)
    found = fit(limit, small, ["lora", "qlora"], own=0)
    r = found.ranks["lora float32"]
    assert r == 100
    r = found.ranks["qlora nf4"]
    assert plan(small, method="qlora", r=r).bound(2) <= limit
    assert r == 128 or plan(small, method="qlora", r=r + 1).bound(2) > limit
    assert "largest rank of lora float32: 100 at batch 1" in str(found)


def test_where_nothing_fits_it_says_what_would_help():
    least = plan("tiny", method="lora", context=200).bound(2)
    limit = int(0.6 * least)
    found = fit(limit, "tiny", ["lora"], [8], own=0, context=200)
    assert [r.batch for r in found.rows] == [0] and found.rows[0].needs == least
    c = PlanConfig("tiny", "lora", 8, context=200)
    expected = {}
    options = {
        "gradient_checkpointing": True,
        "logits_chunk": 256,
        "optimizer": "paged_adamw_8bit",
        "context": 128,
    }
    for name, value in options.items():
        more = replace(c, **{name: value})
        if plan(more).bound(2) < plan(c).bound(2):  # 200 rows of logits are one chunk of 256 anyway
            c, flag = more, "--" + name.replace("_", "-") + ("" if value is True else f" {value}")
            expected[("and " if expected else "") + flag] = plan(c).bound(2)
    assert found.advice == expected and not any("logits" in flag for flag in expected)
    text = str(found)
    assert "Nothing fits. The least, lora float32, needs " in text
    assert text.count(", which fits") == 1 and text.splitlines()[-1].endswith(
        ", which fits"
    )  # the first that does is enough
    hopeless = str(fit(1000, "tiny", ["lora"], [8], own=0, gradient_checkpointing=True, context=100))
    assert (
        "take a smaller model" in hopeless
        and "--gradient-checkpointing" not in hopeless
        and "--context" not in hopeless
    )


def test_a_limit_that_is_never_reached(small):
    found = fit("8TB", small, ["qalora"], [8], own=0, bits=4, context=8)
    assert found.rows[0].batch == LARGEST_BATCH and f"{LARGEST_BATCH:,} or more" in str(found)


def test_text_json_and_html_say_the_same(small):
    found = fit("150MB", small, ["full", "qlora"], [8], own=OWN, bits=4)
    again = json.loads(json.dumps(found.to_dict()))
    assert [r["batch"] for r in again["rows"]] == [r.batch for r in found.rows] and again[
        "limit"
    ] == 150 * 10**6
    for text in (str(found), found._repr_html_()):
        assert "Python and its libraries" in text and f"{OWN:,}" in text
        for row in found.rows:
            assert (
                f"{row.needs:,}" in text
                and f"largest batch of {row.method}: {row.batch:,} × 256 tokens" in text
            )


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("8GB", "tiny"), {"batch_size": 4}, "batch_size=4: is what fit looks for"),
        (("8GB", "tiny", ["lora"]), {"bits": 4}, "bits: is for method qlora or qalora, not for lora"),
        (("8GB", "tiny", ["lora", "lora"]), {}, "twice"),
        (("8GB", "tiny", []), {}, "at least one"),
        (("8GB", "tiny", ["LoRA"]), {}, "choose one of full, subset, lora"),
        (("8GB", "llama-8b"), {}, "there are tiny, smollm2-135m"),
        (("8GB", "tiny", ["lora"], [129]), {}, "r=129: must be at most 128"),
        (("8GB", "tiny"), {"context": 257}, "context=257"),
        (("8GB", "tiny", ["qalora"]), {"group_size": 48}, "group_size=48: must divide"),
        (("many", "tiny"), {}, "such as 8GB"),
        (("8GB", "tiny", ["qlora"]), {"bits": 5}, "bits=5: method 'qlora' stores nf2"),
    ],
)
def test_what_cannot_be_is_refused(arguments, settings, message):
    with pytest.raises(ConfigError, match=message):
        fit(*arguments, own=0, **settings)
