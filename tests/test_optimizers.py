"""Optimizer states: the same bits in pieces, in 8 bits within half a step of the code map, paged without
resident memory."""

from __future__ import annotations

import errno
import os
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import GQA, FakeTask, digest, make_model

from minilora.config import OPTIMIZERS, ConfigError, TrainConfig
from minilora.formats.files import FileError
from minilora.injection import full
from minilora.kernels import plain
from minilora.parameters import Gradients, Parameter
from minilora.quant import codebooks
from minilora.quant.dynamic import dynamic_decode, dynamic_encode
from minilora.training.optimizers import AdamW, make_optimizer
from minilora.training.paging import hand_back
from minilora.training.resume import CHECKPOINT
from minilora.training.states import CHUNK, BlockwiseMoment, state_bytes, state_maps
from minilora.training.trainer import Trainer

ADAMW = [name for name in OPTIMIZERS if name != "sgd"]
PAGED = [name for name in ADAMW if name.startswith("paged")]
SIZES = (1, 255, 256, 4095, 4096, 4097, 5000, CHUNK - 1, CHUNK, CHUNK + 300)
linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the resident set is read from /proc"
)


def parameters_of(shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Parameter(f"w{i}.lora_{'AB'[i % 2]}.weight", rng.standard_normal(shape).astype(dtype), True)
        for i, shape in enumerate(shapes)
    ]


def gradients_of(parameters, step):
    rng, grads = np.random.default_rng([step, 7]), Gradients(parameters)
    for p in grads:
        grads[p][...] = rng.standard_normal(p.data.shape) * 10.0 ** rng.uniform(-4, 0, p.data.shape)
    return grads


def run(optimizer, parameters, steps=4, first=0):
    for step in range(first, first + steps):
        optimizer.step(gradients_of(parameters, step), 0.01 * (step + 1))
    return digest([*(p.data for p in parameters), *optimizer.state().values()])


# --- in pieces: nothing changes -----------------------------------------------------------------------------


def whole_adamw(p, grads, rates, c):
    """The formula over whole arrays, each intermediate result an array of its own."""
    one = p.dtype.type
    p, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m = m * one(c.beta1) + one(1 - c.beta1) * g
        v = v * one(c.beta2) + one(1 - c.beta2) * g * g
        root = np.sqrt(v / one(1 - c.beta2**t)) + one(c.eps)
        p = p - (m / root * (one(rate) / one(1 - c.beta1**t)) + one(rate) * one(c.weight_decay) * p)
    return p, m, v


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["rows", "columns", "every other row"])
@pytest.mark.parametrize("shape", [(3, 5), (2, CHUNK), (CHUNK // 100 + 1, 200), (2 * CHUNK + 1, 1)])
def test_pieces_give_what_whole_arrays_give(dtype, decay, layout, shape):
    config = TrainConfig(weight_decay=decay, lora_plus_ratio=4)
    parameters = parameters_of([shape, shape], dtype)
    for p in parameters:
        if layout == "columns":
            p.data = np.asfortranarray(p.data)
        if layout == "every other row":
            p.data = np.repeat(p.data, 2, axis=0)[::2]
    start = [p.data.copy() for p in parameters]
    optimizer = make_optimizer(parameters, config)
    run(optimizer, parameters, steps=3)
    for p, before, ratio in zip(parameters, start, (1, 4), strict=True):
        grads = [gradients_of(parameters, step)[p] for step in range(3)]
        data, m, v = whole_adamw(before, grads, [ratio * 0.01 * (step + 1) for step in range(3)], config)
        # a step rounds each of m and v three times, p ten times, in whatever order the compiler found best
        assert (
            p.data.dtype == dtype
            and np.abs(p.data - data).max() <= 30 * np.finfo(dtype).eps * np.abs(data).max()
        )
        for name, expected in ((f"m.{p.name}", m), (f"v.{p.name}", v)):
            assert (
                np.abs(optimizer.state()[name] - expected).max()
                <= 9 * np.finfo(dtype).eps * np.abs(expected).max()
            )


# --- both ways: the six lines and the kernel ----------------------------------------------------------------

STEPS, SIZE = 50, 5000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["adamw", "paged_adamw", "sgd"])
def test_plain_and_compiled_agree_to_rounding(name, dtype, tmp_path):
    config = TrainConfig(optimizer=name, momentum=0.9, weight_decay=0.1, lora_plus_ratio=2)
    found = []
    for switch in (plain, nullcontext):
        parameters = parameters_of([(SIZE,), (50, 7)], dtype)
        with switch():
            optimizer = make_optimizer(parameters, config, tmp_path)
            run(optimizer, parameters, steps=STEPS)
        found.append([*(p.data for p in parameters), *optimizer.state().values()])
    # a step rounds p and each mean up to ten times, and all errors may add up
    rtol = 10 * STEPS * np.finfo(dtype).eps
    for a, b in zip(*found, strict=True):
        assert np.abs(a - b).max() <= rtol * np.abs(a).max()


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_plain_and_compiled_8_bit_states_agree_but_for_ties(name, tmp_path):
    """Where rounding tips a value over to the next code, the moment moves by one step of the map."""
    config, found = TrainConfig(optimizer=name, weight_decay=0.1), []
    for switch in (plain, nullcontext):
        parameters = parameters_of([(SIZE,)])
        with switch():
            optimizer = make_optimizer(parameters, config, tmp_path)
            run(optimizer, parameters, steps=STEPS)
        found.append((parameters[0].data, optimizer.state()))
    (p, state), (q, again) = found
    same = np.abs(p - q) <= 10 * STEPS * np.finfo(np.float32).eps * np.abs(p).max()
    assert same.mean() > 0.99
    for kind in "mv":
        codes, others = (s[f"{kind}.w0.lora_A.weight"].astype(int) for s in (state, again))
        assert np.abs(codes - others).max() <= 1 and (codes != others).mean() < 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_parameter_has_no_state_and_does_not_move(name):
    parameters = parameters_of([(4096,), (4096,)])
    parameters[0].trainable = False
    before = parameters[0].data.copy()
    optimizer = make_optimizer(parameters, TrainConfig(optimizer=name, momentum=0.9))
    run(optimizer, parameters, steps=2)
    assert optimizer.parameters == parameters[1:] and (parameters[0].data == before).all()
    assert all(key.endswith(parameters[1].name) for key in optimizer.state())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("transposed", [False, True])
def test_sgd_in_pieces_gives_the_bits_of_whole_arrays(momentum, transposed):
    (p,) = parameters_of([(CHUNK // 100, 201)])
    if transposed:
        p.data = p.data.T
    expected, u = p.data.copy(), np.zeros_like(p.data)
    optimizer = make_optimizer([p], TrainConfig(optimizer="sgd", momentum=momentum, weight_decay=0.1))
    run(optimizer, [p], steps=3)
    for step in range(3):
        u = np.float32(momentum) * u + gradients_of([p], step)[p]
        expected = expected - np.float32(0.01 * (step + 1)) * (u + np.float32(0.1) * expected)
    assert np.array_equal(p.data, expected)


def traced_peak(optimizer, grads):
    optimizer.step(grads, 0.01)  # kernels and code maps are made
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        optimizer.step(grads, 0.01)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_needs_the_scratch_of_one_piece(name, dtype):
    for sizes in ([CHUNK], [3 * CHUNK + 17, 300, 5000]):
        parameters = parameters_of([(n,) for n in sizes], dtype)
        peak = traced_peak(
            make_optimizer(parameters, TrainConfig(optimizer=name)), gradients_of(parameters, 0)
        )
        expected = state_bytes(name, sizes, np.dtype(dtype).itemsize)["scratch"]
        assert expected <= peak + 4096 and peak <= expected + 16384, (
            peak,
            expected,
        )  # Python's own small objects


# --- how much is kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_bytes_are_those_of_the_real_arrays(name, dtype, tmp_path):
    shapes = [(n,) for n in SIZES] + [(8, 512), (7, 586), (1, 1)]
    parameters = parameters_of(shapes, dtype)
    optimizer = make_optimizer(parameters, TrainConfig(optimizer=name), tmp_path)
    predicted = state_bytes(name, (p.data.size for p in parameters), np.dtype(dtype).itemsize)
    absmax = sum(a.nbytes for key, a in optimizer.state().items() if "_absmax." in key)
    states = sum(a.nbytes for a in optimizer.state().values()) - absmax
    expected = (0, 0, states + absmax) if name in PAGED else (states, absmax, 0)
    assert (predicted["states"], predicted["absmax"], predicted["on_disk"]) == expected
    assert predicted["maps"] == sum(a.nbytes for a in state_maps(optimizer.state()))


def test_sgd_keeps_an_array_for_its_momentum():
    parameters = parameters_of([(5, 7), (3,)])
    state = make_optimizer(parameters, TrainConfig(optimizer="sgd", momentum=0.9)).state()
    assert (
        state_bytes("sgd", [35, 3], momentum=True)["states"]
        == sum(a.nbytes for a in state.values())
        == 4 * 38
    )


def test_small_parameters_are_not_quantized():
    parameters = parameters_of([(4095,), (4096,)])
    state = make_optimizer(parameters, TrainConfig(optimizer="adamw_8bit")).state()
    small, large = (p.name for p in parameters)
    assert [state[f"{k}.{small}"].dtype for k in "mv"] == [
        np.float32
    ] * 2 and f"m_absmax.{small}" not in state
    assert [state[f"{k}.{large}"].dtype for k in "mv"] == [np.uint8] * 2
    assert state[f"v_absmax.{large}"].shape == (16,) and state[f"m.{large}"].shape == (4096,)
    assert run(make_optimizer(parameters[:1], TrainConfig()), parameters[:1]) == run(
        make_optimizer(again := parameters_of([(4095,)]), TrainConfig(optimizer="adamw_8bit")), again
    )


def test_8_bits_take_a_quarter_of_the_memory():
    parameters = parameters_of([(2**20,)])
    measured = {}
    for name in ("adamw", "adamw_8bit"):
        tracemalloc.start()
        optimizer = make_optimizer(parameters, TrainConfig(optimizer=name))
        measured[name] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(optimizer.state()) in (2, 4)
        assert abs(measured[name] - sum(a.nbytes for a in optimizer.state().values())) < 8192
    assert measured["adamw_8bit"] / measured["adamw"] == pytest.approx((2 + 2 * 4 / 256) / 8, abs=2e-3)


@pytest.mark.parametrize("value", ["adam", "adamw_torch", "paged_adamw_32bit", "AdamW", None, 8])
def test_unknown_optimizers_are_refused(value):
    for call in (lambda: TrainConfig(optimizer=value), lambda: state_bytes(value, [1])):
        with pytest.raises(
            ConfigError, match="choose one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, sgd"
        ) as caught:
            call()
        assert str(caught.value).startswith(f"optimizer={value!r}: ")


# --- 8 bits -------------------------------------------------------------------------------------------------


def numbers(signed, n=4 * CHUNK + 77, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 10.0 ** rng.uniform(-9, 0, n)).astype(np.float32)
    x[256:512] = 0  # a block of nothing
    return x if signed else np.abs(x)


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_value_and_the_error_half_a_gap(signed):
    x = numbers(signed, 5000)
    codes, absmax = np.empty(x.size, np.uint8), np.empty(20, np.float32)
    dynamic_encode(x, codes, absmax, signed)
    values = codebooks.dynamic_map(signed).astype(np.float64)
    found = dynamic_decode(codes, absmax, signed)
    for i in range(x.size):  # one number at a time, in double precision
        block = x[i // 256 * 256 : i // 256 * 256 + 256]
        largest = max(abs(float(v)) for v in block)
        assert absmax[i // 256] == largest
        distance = np.abs(values * largest - float(x[i]))
        raised = not signed and codes[i] == 1 and x[i] > 0  # above 0 stays above 0
        assert raised or distance[codes[i]] <= distance.min() + 1e-7 * largest
        assert abs(float(found[i]) - values[codes[i]] * largest) <= 1e-7 * largest
    # the widest gaps: 0.9/64 signed (as -1 to the least value, nearly), 0.9/128 unsigned
    error = np.abs(found - x) / np.maximum(np.repeat(absmax, 256)[: x.size], 1e-38)
    gap = 0.9 / (64 if signed else 128)
    assert gap / 4 < error.max() <= gap / 2 * (1 + 1e-4)


def test_a_v_above_zero_never_becomes_zero():
    moment = BlockwiseMoment(np.zeros(4096, np.uint8), np.zeros(16, np.float32), False, np.float32)
    v = np.full(4096, 1e-12, np.float32)
    v[::256], v[1::256] = 1.0, 0.0
    moment.write(slice(0, 4096), v)
    back = moment.read(slice(0, 4096))
    assert (back[1::256] == 0).all() and (back[v > 0] > 0).all()
    nearest = np.abs(codebooks.dynamic_map(False) - np.float32(1e-12)).argmin()
    assert nearest == 0  # the plain rule would make it zero, and the next step m/eps


def test_a_rare_small_gradient_makes_no_giant_step():
    """As a token's row in an embedding: seen once, faintly, then not. v/max|v| is 1e-8, which the nearest
    code would make 0."""
    steps = {}
    for name in ("adamw", "adamw_8bit"):
        p = Parameter("w", np.zeros(4096, np.float32), True)
        optimizer, grads = AdamW([p], TrainConfig(optimizer=name)), Gradients([p])
        grads[p][...] = 1
        grads[p][::256] = 1e-4
        optimizer.step(grads, 0.01)
        before = p.data[::256].copy()
        grads[p][::256] = 0
        optimizer.step(grads, 0.01)
        steps[name] = np.abs(p.data[::256] - before).max() / 0.01
    assert 0.5 < steps["adamw"] < 1
    assert (
        0 < steps["adamw_8bit"] < 1
    )  # as 0, v would make it m̂/eps = 0.9e-5/0.19/1e-8, 4700 times the learning rate
    assert optimizer.state()["v.w"][::256].tolist() == [1] * 16


def test_an_8_bit_step_equals_a_loop():
    """Decode, update in double precision, encode: one number at a time, each step from the states that ours
    had before it."""
    c = TrainConfig(optimizer="adamw_8bit", weight_decay=0.1)
    (p,) = parameters = parameters_of([(16, 300)])
    optimizer = AdamW(parameters, c)
    maps = {"m": codebooks.dynamic_map(True).tolist(), "v": codebooks.dynamic_map(False).tolist()}
    for step in range(3):
        before = {key: a.copy().reshape(-1).tolist() for key, a in optimizer.state().items()}
        data, g = p.data.reshape(-1).tolist(), gradients_of(parameters, step)[p].reshape(-1).tolist()
        optimizer.step(gradients_of(parameters, step), 0.01)
        after = {
            k: (optimizer.state()[f"{k}.{p.name}"].reshape(-1), optimizer.state()[f"{k}_absmax.{p.name}"])
            for k in "mv"
        }
        new = {"m": [], "v": []}
        for i in range(p.data.size):
            m, v = (
                maps[k][before[f"{k}.{p.name}"][i]] * before[f"{k}_absmax.{p.name}"][i // 256] for k in "mv"
            )
            new["m"].append(m := c.beta1 * m + (1 - c.beta1) * g[i])
            new["v"].append(v := c.beta2 * v + (1 - c.beta2) * g[i] ** 2)
            m, v = m / (1 - c.beta1 ** (step + 1)), v / (1 - c.beta2 ** (step + 1))
            expected = data[i] - 0.01 * (m / (v**0.5 + c.eps) + 0.1 * data[i])
            # a dozen roundings of 6e-8: of p, and of a step of at most 0.01·|m|/√v; where √v is tiny that is
            # no longer small
            assert abs(float(p.data.reshape(-1)[i]) - expected) <= 1e-6 * (
                abs(data[i]) + 0.01 * abs(m) / (v**0.5 + c.eps) + 1e-3
            )
        for k, signed in (("m", True), ("v", False)):
            codes, absmax = after[k]
            gap = 0.9 / (64 if signed else 128)
            decoded = np.array(maps[k])[codes] * np.repeat(absmax, 256)[: codes.size]
            assert (np.abs(decoded - new[k]) <= (gap / 2 + 1e-5) * np.repeat(absmax, 256)[: codes.size]).all()


# --- what 8 bits do to a result -----------------------------------------------------------------------------

WIDE = replace(GQA, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
TRAIN = TrainConfig(steps=40, batch_size=8, warmup_steps=4, learning_rate=3e-3, shards=1)


def losses(optimizer="adamw", folder=None, **changed):
    model = full(make_model(WIDE, dtype=np.float32))
    config = replace(TRAIN, optimizer=optimizer, **changed)
    history = Trainer(model, FakeTask(n_train=64), config, threads=1, folder=folder).train()
    return np.array([info["loss"] for info in history.steps])


def test_training_in_8_bits_ends_where_it_ends_in_32():
    """The bound: 8 bits change the losses less than 1 % of the learning rate does, and nobody chooses that so
    sharply.

    Why that much at most: a step is lr·m/√v; m errs by up to half a gap, 0.7 % of its block's largest, v by
    0.35 %, and half of that counts under the root. So most steps are right to a few per cent, with errors of
    either sign, that do not add up.
    """
    exact, rounded = losses(), losses("adamw_8bit")
    assert exact[-5:].mean() < 0.6 * exact[:5].mean()  # it did learn
    difference = np.abs(rounded - exact)
    assert (
        difference[0] == 0 and difference.max() > 0
    )  # before any rounding the same, and the option does something
    control = np.abs(losses(learning_rate=0.99 * TRAIN.learning_rate) - exact)
    assert difference.mean() < control.mean(), (difference.mean(), control.mean())
    assert difference.max() < control.max()


# --- paged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PAGED)
def test_paged_gives_the_same_bytes(name, dtype, tmp_path):
    results = []
    for which in (name, name.removeprefix("paged_")):
        parameters = parameters_of([(n,) for n in SIZES] + [(300, 17)], dtype)
        parameters[-1].data = parameters[-1].data.T
        results.append(
            run(
                make_optimizer(parameters, TrainConfig(optimizer=which, weight_decay=0.1), tmp_path),
                parameters,
            )
        )
    assert results[0] == results[1]


@pytest.mark.parametrize("name", PAGED)
def test_paged_states_lie_aligned_in_one_file_that_leaves_nothing_behind(name, tmp_path):
    parameters = parameters_of([(n,) for n in SIZES])
    optimizer = make_optimizer(parameters, TrainConfig(optimizer=name), tmp_path / "new")
    arrays = sorted(optimizer.state().values(), key=lambda a: a.ctypes.data)
    assert all(a.ctypes.data % a.itemsize == 0 and not a.any() for a in arrays)
    assert all(a.ctypes.data + a.nbytes == b.ctypes.data for a, b in pairwise(arrays))  # no gaps, no overlaps
    assert os.name != "posix" or not list((tmp_path / "new").iterdir())


def test_paged_states_are_not_traced_memory(tmp_path):
    parameters = parameters_of([(2**20,)])
    tracemalloc.start()
    optimizer = make_optimizer(parameters, TrainConfig(optimizer="paged_adamw"), tmp_path)
    assert (
        tracemalloc.get_traced_memory()[0]
        < 16384
        < 2**23
        == sum(a.nbytes for a in optimizer.state().values())
    )
    tracemalloc.stop()


def resident():
    """Bytes of mapped files (and of files in memory) in this process's resident set."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(lines[name].split()[0]) for name in ("RssFile", "RssShmem"))


@linux
@pytest.mark.parametrize("name, held", [("paged_adamw", 2**25), ("paged_adamw_8bit", 2**23 + 2**17)])
def test_paged_states_do_not_stay_resident(name, held, tmp_path):
    parameters = parameters_of([(2**21,), (2**21,)])
    grads = gradients_of(parameters, 0)
    optimizer = make_optimizer(parameters, TrainConfig(optimizer=name), tmp_path)
    optimizer.step(grads, 0.01)  # code pages of NumPy and Numba are mapped files, too: now they are in
    before = resident()
    optimizer.step(grads, 0.01)
    assert resident() - before < 2**20
    state = optimizer.state()
    assert sum(a.nbytes for a in state.values()) == held
    touched = digest(state.values())  # the control: reading makes them resident …
    assert resident() - before > held * 3 // 4
    for array in state.values():
        hand_back(array)
    assert resident() - before < 2**20  # … and handing back lets go of them, and loses nothing
    assert digest(state.values()) == touched


def test_hand_back_leaves_other_arrays_alone():
    a = np.arange(10000.0)
    hand_back(a[5:])
    hand_back(np.zeros(0))
    assert np.array_equal(a, np.arange(10000.0))


def test_a_disk_without_room_is_refused_before_work_starts(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    config = replace(TRAIN, optimizer="paged_adamw")
    with pytest.raises(
        FileError, match="cannot hold [0-9,]+ bytes .*No space left.*TMPDIR.*adamw_8bit"
    ) as caught:
        Trainer(full(make_model(WIDE, dtype=np.float32)), FakeTask(), config, folder=tmp_path)
    assert str(tmp_path) in str(caught.value) and "make room" in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        FileError, match="file.*cannot hold .* bytes of optimizer states .*choose another folder"
    ):
        make_optimizer(parameters_of([(5,)]), TrainConfig(optimizer="paged_adamw_8bit"), tmp_path / "file")


def test_without_posix_fallocate_the_room_is_taken_by_writing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    parameters = parameters_of([(CHUNK + 5,)])
    again = parameters_of([(CHUNK + 5,)])
    optimizer = make_optimizer(parameters, TrainConfig(optimizer="paged_adamw"), tmp_path)
    assert run(optimizer, parameters) == run(make_optimizer(again, TrainConfig()), again)


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAMW)
def test_interrupted_and_resumed_ends_in_the_same_bytes(name, tmp_path):
    config = replace(TRAIN, steps=6, optimizer=name)

    def trainer(folder, **changed):
        model = full(make_model(WIDE, dtype=np.float32))
        return Trainer(model, FakeTask(), replace(config, **changed), threads=1, folder=folder)

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "first", checkpoint_every=4).train()
    resumed = trainer(tmp_path / "second")
    resumed.load(tmp_path / "first" / CHECKPOINT)
    assert resumed.step == 4
    resumed.train()
    for t, file in ((whole, "a"), (resumed, "b")):
        t.save(tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    quantized = [key for key, a in resumed.optimizer.state().items() if a.dtype == np.uint8]
    assert bool(quantized) == name.endswith("8bit")


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    def trainer(name):
        return Trainer(
            full(make_model(GQA, dtype=np.float32)),
            FakeTask(),
            replace(TRAIN, steps=2, optimizer=name),
            threads=1,
        )

    trainer("adamw").save(tmp_path / "c.safetensors")
    with pytest.raises(FileError, match="optimizer: 'adamw' there, 'adamw_8bit' here"):
        trainer("adamw_8bit").load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_states_that_overflow_are_reported_by_name(name, tmp_path):
    trainer = Trainer(
        full(make_model(WIDE, dtype=np.float32)), FakeTask(), replace(TRAIN, optimizer=name), threads=1
    )
    key = next(key for key in trainer.optimizer.state() if key.startswith("v_absmax."))
    trainer.optimizer.state()[key][0] = np.inf
    with pytest.raises(ValueError, match=f"optimizer state {key} is not finite"):
        trainer.save(tmp_path / "c.safetensors")
