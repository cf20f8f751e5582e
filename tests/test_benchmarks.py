"""The benchmark command: our side alone at a micro size, its page and its statistics. Nothing here judges a speed."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from benchmarks import timing, workload
from benchmarks.__main__ import Options, run
from benchmarks.ours import Ours
from minilora.threads import Workers
from minilora.training.loss import loss_and_grads


def test_our_side_alone_writes_json_and_page_and_keeps_other_parts(tmp_path: Path) -> None:
    old = {"startup": {"command": "old", "machine": timing.machine(), "threads": 2, "peers": False,
                       "rows": [{"what": "import minilora", "median": 0.25, "min": 0.2, "turns": 3}]}}
    (tmp_path / "speed.json").write_text(json.dumps(old))
    said: list[str] = []
    parts = ("training_step", "kernels")
    options = Options(parts, ("micro",), kernel_sizes=(64,), repeats=2, threads=1, peers=False, out=str(tmp_path))
    files = run(options, "python -m benchmarks --no-peers", said.append)
    assert [f.name for f in files] == ["speed.json", "speed.md"]
    results = json.loads(files[0].read_text())
    assert set(results) == {"training_step", "kernels", "startup"} and results["startup"] == old["startup"]
    rows = results["training_step"]["rows"]
    assert [r["method"] for r in rows] == list(workload.METHODS)
    assert all(r["ours"]["turns"] == 2 and 0 < r["ours"]["min"] <= r["ours"]["median"] and r["peer"] is None for r in rows)
    assert {r["op"] for r in results["kernels"]["rows"]} == {"bandwidth", "quantize", "dequantize", "product"}
    text = files[1].read_text()
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
