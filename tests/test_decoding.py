"""The compiled way of one token: equal to the plain path, the same bytes for any number of threads, never
left waiting."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers import GQA, assert_close, close_rtol, fill_adapters, make_model

from minilora.config import LoraConfig
from minilora.decoding import token_decoder as decoding
from minilora.decoding.kv_cache import KVCache
from minilora.decoding.token_decoder import Decoder
from minilora.generation import decode, generate, prefill, stream
from minilora.injection import inject_lora
from minilora.kernels import block_vectors, plain
from minilora.kernels import decode as decode_kernels
from minilora.layers import Linear
from minilora.quant.blocks import BlockWeight

pytestmark = pytest.mark.skipif(
    not block_vectors.available(), reason="this processor lacks AVX2, FMA or F16C"
)

CONFIG = replace(
    GQA,
    vocab_size=61,
    hidden_size=96,
    intermediate_size=160,
    num_attention_heads=6,
    num_key_value_heads=3,
    num_hidden_layers=3,
    context_length=40,
)
ROTATIONS = {  # which type each matrix has: all alike, and all kinds within a block
    "Q4_1": ("Q4_1",),
    "Q8_0": ("Q8_0",),
    "mixed": ("Q4_0", "Q8_0", "Q4_1"),
}
LENGTHS = [n for _ in range(CONFIG.num_hidden_layers) for n in (96, 96, 16, 40, 96, 96, 160)]


def block_model(types=("Q4_1",), config=CONFIG):
    left = list(types) * 99
    model = make_model(config, dtype=np.float32, trainable=False)
    return model.map_linears(
        lambda linear: Linear(linear.name, BlockWeight.quantize(linear.weight.dense(), left.pop(0)))
    )


def stored(model, prompt, slots=40):
    cache = KVCache(model, 1, slots)
    prefill(model, np.array([prompt]), cache)
    return cache


def decoder_of(model, cache, threads=1):
    return Decoder(model, cache.keys[:, 0].copy(), cache.values[:, 0].copy(), threads)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("heads", [(6, 3), (3, 3), (6, 1)], ids=str)
def test_each_token_equals_the_plain_path(name, heads):
    model = block_model(
        ROTATIONS[name], replace(CONFIG, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    )
    cache = stored(model, [3, 1, 4, 1, 5])
    decoder = decoder_of(model, cache)
    rtol = close_rtol(np.float32, *LENGTHS, factor=1)
    for position, token in enumerate([9, 2, 6, 5, 3, 5], start=5):
        expected = model.head.forward(decode(model, np.array([token]), np.array([position]), cache))[0][0]
        found = decoder.step(token, position)
        assert found.dtype == np.float32
        assert_close(found, expected, rtol, f"logits at {position}")
        assert_close(decoder.keys[:, :, position], cache.keys[:, 0, :, position], rtol)
        assert_close(decoder.values[:, :, position], cache.values[:, 0, :, position], rtol)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_any_number_of_threads_gives_the_same_bytes(threads, monkeypatch):
    monkeypatch.setattr(Decoder, "_together", lambda self: True)
    model = block_model(ROTATIONS["mixed"])
    cache = stored(model, [3, 1, 4])
    one, several = decoder_of(model, cache), decoder_of(model, cache, threads)
    assert several.threads == threads
    for position in range(3, 40):
        assert np.array_equal(one.step(position, position), several.step(position, position))
    assert np.array_equal(one.keys, several.keys) and np.array_equal(one.values, several.values)
    several.close()


@pytest.mark.parametrize("name", ["Q4_1", "mixed"])
@pytest.mark.parametrize(
    "options",
    [{"r": 4}, {"r": 3, "lora_alpha": 2, "target_modules": ("q_proj", "down_proj", "lm_head")}],
    ids=["all", "some"],
)
@pytest.mark.parametrize("use_qalora", [False, True])
def test_adapters_are_added(name, options, use_qalora):
    if use_qalora and name != "Q4_1":
        pytest.skip("QA-LoRA needs offsets")
    base = block_model(ROTATIONS[name])
    model = fill_adapters(
        inject_lora(base, LoraConfig(**options, use_qalora=use_qalora), np.random.default_rng(0))
    )
    assert Decoder.fits(model)
    cache = stored(model, [3, 1, 4])
    one, two = decoder_of(model, cache), decoder_of(model, cache, 2)
    without = decoder_of(base, cache).step(7, 3)
    expected = model.head.forward(decode(model, np.array([7]), np.array([3]), cache))[0][0]
    found = one.step(7, 3)
    assert np.array_equal(two.step(7, 3), found)
    rtol = close_rtol(np.float32, *LENGTHS, factor=1)
    assert_close(found, expected, rtol)
    assert np.abs(without - expected).max() > 1000 * rtol * np.abs(expected).max()
    two.close()


def test_generation_takes_it_and_says_what_the_plain_path_says(monkeypatch):
    model = block_model()
    prompts = [[1, 2, 3], [4], [5, 6, 0, 7, 8, 2]]
    steps = []
    monkeypatch.setattr(
        Decoder, "step", lambda self, *a, step=Decoder.step: steps.append(a) or step(self, *a)
    )
    alone = [generate(model, [p], 20)[0] for p in prompts]
    assert len(steps) == 3 * 19 and steps[0] == (alone[0][0], 3)
    assert [list(stream(model, p, 20, threads=2)) for p in prompts] == alone
    stops = [row[4] for row in alone[:2]]  # two end early, and the third goes on alone
    steps.clear()
    together = generate(model, prompts, 20, eos=stops)
    assert 0 < len(steps) < 20
    monkeypatch.setattr(Decoder, "fits", lambda model: False)
    assert [generate(model, [p], 20)[0] for p in prompts] == alone
    assert generate(model, prompts, 20, eos=stops) == together


def test_what_does_not_fit_takes_the_plain_path(monkeypatch):
    model = block_model()
    assert Decoder.fits(model)
    dora = inject_lora(model, LoraConfig(r=2, use_dora=True), np.random.default_rng(0))
    gelu = replace(CONFIG, hidden_act="gelu_pytorch_tanh")
    for other in (
        dora,
        make_model(CONFIG, dtype=np.float32),
        block_model(config=gelu),
        model.map_linears(to_float64),
    ):
        assert not Decoder.fits(other)
    with plain():
        assert not Decoder.fits(model)
    monkeypatch.setattr(block_vectors, "available", lambda: False)
    assert not Decoder.fits(model)


def to_float64(linear):
    return make_model(CONFIG).head if linear.name == "lm_head" else linear


def test_threads_end_with_the_text():
    before = threading.active_count()
    generate(block_model(), [[1]], 5, threads=4)
    tokens = stream(block_model(), [1], 30, threads=4)
    for _ in range(3):
        next(tokens)
    assert threading.active_count() > before
    tokens.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_interrupted_step_leaves_nobody_waiting(monkeypatch):
    model = block_model()
    decoder = decoder_of(model, stored(model, [1, 2]), 2)
    decoder.step(3, 2)
    kernel = decode_kernels.decode_token

    def interrupted(*arguments):
        if arguments[-3] == 0:  # the first thread never comes to a barrier
            raise KeyboardInterrupt
        kernel(*arguments)

    monkeypatch.setattr(decode_kernels, "decode_token", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.step(3, 3)
    decoder.close()  # would wait for ever


@pytest.mark.parametrize("slow", [True, False])
def test_the_faster_way_is_kept_until_it_is_tried_again(slow, monkeypatch):
    clock = [0.0]
    crews = []

    def kernel(*arguments):
        if arguments[-3] == 0:
            crews.append(arguments[-2])
            first = (
                len(crews) % decoding.TRIAL_PERIOD == 1
            )  # which may load the compiled code: as if it took very long
            clock[0] += 1000 if first else 3 if (arguments[-2] == 2) == slow else 1

    monkeypatch.setattr(decode_kernels, "decode_token", kernel)
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])
    model = block_model()
    decoder = decoder_of(model, stored(model, [1]), 2)
    for _ in range(2 * decoding.TRIAL_PERIOD):
        decoder.step(1, 1)
    decoder.close()
    assert crews == 2 * ([2] * 4 + [1] * 3 + [1 if slow else 2] * (decoding.TRIAL_PERIOD - 7))


def test_a_missing_thread_is_waited_for(monkeypatch):
    model = block_model()
    cache = stored(model, [1, 2])
    one, two = decoder_of(model, cache), decoder_of(model, cache, 2)
    kernel = decode_kernels.decode_token
    monkeypatch.setattr(decode_kernels, "decode_token", lambda *a: (time.sleep(0.05 * a[-3]), kernel(*a))[1])
    assert np.array_equal(two.step(3, 2), one.step(3, 2))
    two.close()


def test_nan_stays_nan():
    model = block_model()
    table = model.embedding.weight.param.data.copy()
    table[7] = np.nan
    model.embedding.weight.param.data = table
    assert np.isnan(decoder_of(model, stored(model, [1])).step(7, 1)).all()
