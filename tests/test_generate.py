"""Generation: the key/value cache must change the speed and nothing else; sampling must follow the
distribution it claims."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import GQA, assert_close, close_rtol, fill_adapters, make_model

from minilora import functional as F
from minilora import generation
from minilora.config import LoraConfig, QuantConfig
from minilora.decoding import plan as decoding_plan
from minilora.decoding.kv_cache import KVCache
from minilora.decoding.sampling import sample
from minilora.generation import decode, generate, prefill, stream
from minilora.injection import inject_lora
from minilora.quant.model import quantize_model
from minilora.threads import Workers

LENGTH = GQA.context_length
PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 7, 8, 2], [2, 2]]


def full_hidden(model, sequence):
    return model.forward(np.array([sequence]))[0][0]


def greedy_by_hand(model, prompt, n, eos=None):
    """The definition: run everything again for each token."""
    sequence = list(prompt)
    for _ in range(n):
        token = int(model.logits(np.array([sequence[-LENGTH:]]))[0, -1].argmax())
        if token == eos:
            break
        sequence.append(token)
        if len(sequence) > LENGTH:
            break
    return sequence[len(prompt) :]


def variants():
    yield "dense", lambda: make_model(GQA)
    yield (
        "lora",
        lambda: fill_adapters(
            inject_lora(
                make_model(GQA), LoraConfig(r=2, lora_alpha=3, lora_dropout=0.5), np.random.default_rng(0)
            )
        ),
    )
    yield (
        "qlora",
        lambda: fill_adapters(
            inject_lora(
                quantize_model(make_model(GQA), QuantConfig("nf4")),
                LoraConfig(r=2, lora_alpha=3),
                np.random.default_rng(0),
            )
        ),
    )
    yield (
        "qalora",
        lambda: fill_adapters(
            inject_lora(
                quantize_model(make_model(GQA), QuantConfig("int4", group_size=4)),
                LoraConfig(r=2, lora_alpha=3, use_qalora=True),
                np.random.default_rng(0),
            )
        ),
    )


every_variant = pytest.mark.parametrize("make", [v for _, v in variants()], ids=[n for n, _ in variants()])


def test_decoding_with_the_cache_equals_a_full_forward(config):
    """Teacher forcing: prefill a prefix, feed the rest token by token; each hidden state equals the full
    forward's row."""
    model = make_model(config)
    sequence = np.random.default_rng(1).integers(config.vocab_size, size=12)
    expected = full_hidden(model, sequence)
    rtol = close_rtol(np.float64, *[config.intermediate_size] * 9 * config.num_hidden_layers)
    for start in (1, 5):
        kv_cache = KVCache(model, 1, 12)
        hidden = prefill(model, sequence[None, :start], kv_cache)
        assert_close(hidden[0], expected[:start], rtol)
        for t in range(start, 12):
            hidden = decode(model, sequence[t : t + 1], np.array([t]), kv_cache)
            assert_close(hidden[0], expected[t], rtol, f"position {t}")


@pytest.mark.parametrize("wide", [False, True])
def test_sequences_at_different_positions_decode_together(config, wide, monkeypatch):
    monkeypatch.setattr(decoding_plan, "WIDE_HIDDEN_SIZE", 1 if wide else 10**9)
    model = make_model(config)
    a, b = np.random.default_rng(1).integers(config.vocab_size, size=(2, 9))
    ids = np.zeros((2, 5), int)
    ids[0, :2], ids[1] = a[:2], b[:5]
    kv_cache = KVCache(model, 2, 9)
    prefill(model, ids, kv_cache)
    rtol = close_rtol(np.float64, *[config.intermediate_size] * 9 * config.num_hidden_layers)
    for step in range(4):
        hidden = decode(model, np.array([a[2 + step], b[5 + step]]), np.array([2 + step, 5 + step]), kv_cache)
        assert_close(hidden[0], full_hidden(model, a)[2 + step], rtol)
        assert_close(hidden[1], full_hidden(model, b)[5 + step], rtol)


@every_variant
def test_greedy_equals_the_argmax_of_a_full_forward(make):
    model = make()
    for prompt in PROMPTS:
        assert generate(model, [prompt], 8) == [greedy_by_hand(model, prompt, 8)]


@every_variant
def test_ragged_prompts_together_equal_each_alone(make):
    model = make()
    assert generate(model, PROMPTS, 8) == [generate(model, [p], 8)[0] for p in PROMPTS]


def test_order_of_prompts_is_kept_when_some_end_early():
    model = make_model(GQA)
    plain = generate(model, PROMPTS, 10)
    eos = plain[2][3]  # a token that ends at least one of them early
    expected = [row[: row.index(eos)] if eos in row else row for row in plain]
    assert generate(model, PROMPTS, 10, eos=eos) == expected
    assert len({len(row) for row in expected}) > 1
    assert expected == [greedy_by_hand(model, p, 10, eos) for p in PROMPTS]


def test_an_end_at_once_gives_nothing():
    model = make_model(GQA)
    first = generate(model, [[1, 2]], 1)[0][0]
    assert generate(model, [[1, 2]], 5, eos=first) == [[]]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_never_more_than_asked_for(n):
    assert [len(row) for row in generate(make_model(GQA), PROMPTS, n)] == [n] * 4


def test_a_full_context_stops_each_sequence_by_itself():
    model = make_model(GQA)
    prompts = [[1] * (LENGTH - 1), [2] * (LENGTH - 4), [3]]
    results = generate(model, prompts, 100)
    # the last token is predicted from a full context and is not fed back
    assert [len(p) + len(r) for p, r in zip(prompts, results, strict=True)] == [LENGTH + 1] * 3
    assert results == [greedy_by_hand(model, p, 100) for p in prompts]


def test_any_of_several_stop_tokens_ends_a_text():
    model = make_model(GQA)
    plain = generate(model, PROMPTS, 10)
    stops = {plain[2][3], plain[0][5]}
    expected = [row[: min((i for i, t in enumerate(row) if t in stops), default=len(row))] for row in plain]
    assert len({len(row) for row in expected}) > 1
    for eos in (stops, list(stops), np.array(list(stops)).tolist(), tuple(np.array(list(stops)))):
        assert generate(model, PROMPTS, 10, eos=eos) == expected
    assert generate(model, PROMPTS, 10, eos=np.int64(plain[2][3])) == generate(
        model, PROMPTS, 10, eos=[plain[2][3]]
    )
    assert generate(model, PROMPTS, 10, eos=()) == generate(model, PROMPTS, 10, eos=None) == plain
    for bad in ("</s>", ["</s>"], 1.5):
        with pytest.raises(ValueError, match="^eos=.*must be a token's number"):
            generate(model, PROMPTS, 10, eos=bad)


@every_variant
def test_a_stream_yields_what_generate_returns(make):
    model = make()
    for prompt in PROMPTS:
        (whole,) = generate(model, [prompt], 8)
        assert list(stream(model, prompt, 8)) == whole
        assert list(stream(model, prompt, 8, eos=whole[3])) == whole[: whole.index(whole[3])]
    sampled = generate(model, [[1]], 8, temperature=2.0, top_k=9, rng=np.random.default_rng(5))[0]
    assert list(stream(model, [1], 8, temperature=2.0, top_k=9, rng=np.random.default_rng(5))) == sampled


def test_a_stream_makes_a_token_only_when_it_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(generation, "decode", lambda *a: calls.append(1) or decode(*a))
    tokens = stream(make_model(GQA), [1, 2], 8)
    assert [next(tokens), len(calls)] == [generate(make_model(GQA), [[1, 2]], 1)[0][0], 0]
    next(tokens)
    assert len(calls) == 1


def test_a_stream_refuses_before_it_is_read():
    with pytest.raises(ValueError, match="leave no room"):
        stream(make_model(GQA), [1] * LENGTH, 2)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_a_prompt_in_pieces_gives_the_hidden_states_of_the_whole(config, chunk, monkeypatch):
    model = make_model(config)
    ids = np.random.default_rng(2).integers(config.vocab_size, size=(2, 9))
    whole, cache = KVCache(model, 2, 9), KVCache(model, 2, 9)
    expected = prefill(model, ids, whole)
    monkeypatch.setattr(decoding_plan, "PREFILL_POSITIONS", chunk)
    rtol = close_rtol(np.float64, *[config.intermediate_size] * 9 * config.num_hidden_layers)
    assert_close(prefill(model, ids, cache), expected, rtol)
    for a, b in ((cache.keys, whole.keys), (cache.values, whole.values)):
        assert_close(a, b, rtol)


def test_the_cache_holds_what_is_asked_for_and_not_the_whole_context(monkeypatch):
    slots = []
    monkeypatch.setattr(
        generation, "KVCache", lambda model, batch, n: slots.append(n) or KVCache(model, batch, n)
    )
    generate(make_model(GQA), [[1, 2, 3], [4]], 5)
    generate(make_model(GQA), [[1, 2, 3]], 500)
    assert slots == [8, LENGTH]


def test_results_are_plain_lists_of_ints():
    (row,) = generate(make_model(GQA), [np.array([1, 2])], 3)
    assert type(row) is list and all(type(token) is int for token in row)


def test_generation_changes_nothing_in_the_model():
    model = make_model(GQA)
    for p in model.parameters():
        p.data.flags.writeable = False
    assert generate(model, [[1]], 4) == generate(model, [[1]], 4)


def test_dropout_is_off_in_generation():
    model = inject_lora(make_model(GQA), LoraConfig(r=2, lora_dropout=0.9), np.random.default_rng(0))
    assert generate(fill_adapters(model), [[1, 2]], 6) == generate(model, [[1, 2]], 6)


# --- sampling -----------------------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15]))
N = 20000


def frequencies(**settings):
    tokens = sample(np.tile(LOGITS, (N, 1)), np.random.default_rng(3), **settings)
    return np.bincount(tokens, minlength=5) / N


def assert_frequencies(found, expected):
    """Each share is binomial: five standard deviations, and what is excluded never occurs."""
    expected = np.array(expected)
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / N)).all(), (found, expected)


def test_temperature_one_follows_softmax():
    assert_frequencies(frequencies(temperature=1.0), F.softmax(LOGITS))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    assert_frequencies(frequencies(temperature=temperature), F.softmax(LOGITS / temperature))


@pytest.mark.parametrize(
    "k, expected",
    [
        (1, [0, 1, 0, 0, 0]),
        (2, [0, 4 / 7, 0, 3 / 7, 0]),
        (3, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (5, [0.05, 0.4, 0.1, 0.3, 0.15]),
        (99, [0.05, 0.4, 0.1, 0.3, 0.15]),
    ],
)
def test_top_k_keeps_the_k_largest_renormalised(k, expected):
    assert_frequencies(frequencies(temperature=1.0, top_k=k), expected)


@pytest.mark.parametrize(
    "p, expected",
    [
        (1e-9, [0, 1, 0, 0, 0]),
        (0.39, [0, 1, 0, 0, 0]),
        (0.41, [0, 4 / 7, 0, 3 / 7, 0]),
        (0.69, [0, 4 / 7, 0, 3 / 7, 0]),
        (0.71, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (1.0, [0.05, 0.4, 0.1, 0.3, 0.15]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    assert_frequencies(frequencies(temperature=1.0, top_p=p), expected)


def test_top_p_counts_after_top_k():
    # of the 3 largest (8, 6, 3 of 17) the first two reach 0.8
    assert_frequencies(frequencies(temperature=1.0, top_k=3, top_p=0.8), [0, 4 / 7, 0, 3 / 7, 0])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1e-4},
        {"temperature": 1e-300},
    ],
    ids=str,
)
def test_all_ways_to_be_greedy_agree(settings):
    logits = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    assert np.array_equal(sample(logits, np.random.default_rng(0), **settings), logits.argmax(-1))


def test_equal_logits_are_greedily_the_first():
    assert sample(np.zeros((2, 4)), None).tolist() == [0, 0]
    assert sample(np.zeros((2, 4)), np.random.default_rng(0), temperature=1.0, top_k=1).tolist() == [0, 0]


def test_rows_are_sampled_independently():
    logits = np.array([[0.0, 50.0], [50.0, 0.0]])
    assert sample(logits, np.random.default_rng(0), temperature=1.0).tolist() == [1, 0]
    many = sample(np.zeros((2, 1000)), np.random.default_rng(0), temperature=1.0)
    assert many[0] != many[1]


def test_forbidden_tokens_are_never_drawn():
    logits = np.tile(np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32), (500, 1))
    assert set(sample(logits, np.random.default_rng(0), temperature=1.0).tolist()) == {1, 3}


def test_sampling_is_seeded():
    model = make_model(GQA)
    texts = [
        generate(model, PROMPTS, 8, temperature=1.5, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampled_text_stays_inside_top_k():
    model = make_model(GQA)
    (row,) = generate(model, [[1, 2]], 12, temperature=3.0, top_k=3, rng=np.random.default_rng(0))
    sequence = [1, 2]
    for token in row:
        assert token in np.argsort(-model.logits(np.array([sequence]))[0, -1])[:3]
        sequence.append(token)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": []}, "prompts: each must hold at least one token"),
        ({"prompts": [[1], []]}, "prompts: each must hold at least one token"),
        (
            {"prompts": [[1] * LENGTH]},
            "prompts: 24 tokens leave no room in context_length=24: shorten the prompt by 1 or more",
        ),
        (
            {"prompts": [[1], [1] * 30]},
            "prompts: 30 tokens leave no room in context_length=24: shorten the prompt by 7 or more",
        ),
        ({"prompts": [[1, 19]]}, "prompts: token 19 outside the vocabulary 0…18"),
        ({"prompts": [[-1]]}, "prompts: token -1 outside"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"temperature": 1.0, "rng": None}, "rng=None: sampling with temperature > 0 needs"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes, message):
    settings = {"prompts": [[1]], "max_new_tokens": 2, "rng": np.random.default_rng(0)} | changes
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(make_model(GQA), settings.pop("prompts"), settings.pop("max_new_tokens"), **settings)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_share_prompts_and_sequences_and_change_no_byte(config, dtype, monkeypatch):
    """However a wide model's work is cut, hidden states are those of one piece; who takes which piece never
    matters."""
    cut = decoding_plan.cut
    monkeypatch.setattr(decoding_plan, "WIDE_HIDDEN_SIZE", 1)
    monkeypatch.setattr(
        decoding_plan, "cut", lambda count, fewest, most: cut(count, 3, 5)
    )  # small models have short contexts
    model = make_model(config, dtype=dtype)
    ids = np.random.default_rng(3).integers(config.vocab_size, size=(7, 11))
    assert [piece.start for piece in decoding_plan.cut(11, 32, 128)] == [0, 3, 7]
    caches, found = [KVCache(model, 7, 12) for _ in range(3)], []
    for threads, cache in enumerate(caches, start=1):
        with Workers(threads) as workers:
            found.append(prefill(model, ids, cache, workers))
            assert (
                cache.keys.tobytes() == caches[0].keys.tobytes()
                and cache.values.tobytes() == caches[0].values.tobytes()
            )
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    texts = [
        generate(
            model,
            [row[:n] for row, n in zip(ids.tolist(), (4, 11, 7, 1, 9, 10, 2), strict=True)],
            12,
            threads=n,
        )
        for n in (1, 2, 3)
    ]
    assert texts[0] == texts[1] == texts[2]
    monkeypatch.setattr(decoding_plan, "WIDE_HIDDEN_SIZE", 10**9)
    whole = KVCache(model, 7, 12)
    rtol = close_rtol(dtype, *[config.intermediate_size] * 9 * config.num_hidden_layers)
    assert_close(found[0], prefill(model, ids, whole), rtol)
    assert_close(caches[0].keys, whole.keys, rtol)
