"""A sweep of 24 short runs by `run_sweep`, beside the same runs with torch + PEFT + bitsandbytes.

Both sides have two processes of one thread, and each process takes the next run when it has ended one. A run
makes its model anew from the same weights and initial adapters, takes its steps on the same batches, and ends
in a loss over the same held-out text.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import workload
from benchmarks.timing import ratio
from benchmarks.workload import Run, Text
from minilora.sweep.runner import run_sweep
from minilora.sweep.workers import SINGLE_THREAD

PROCESSES = 2
PIECES = 4
"""Pieces of the grid; in each of them the sides take turns."""


def grid(**settings: Any) -> list[Run]:
    """Return 24 runs: lora and qlora × three ranks × two learning rates × two seeds."""
    combinations = itertools.product((0, 1), (1e-3, 4e-3), (2, 8, 32), ("lora", "qlora"))
    return [Run(method, r, rate, seed, **settings) for seed, rate, r, method in combinations]


def axes(runs: list[Run]) -> dict[str, list[Any]]:
    """Return what differs between the runs, and its values."""
    values = {
        field.name: list(dict.fromkeys(getattr(run, field.name) for run in runs)) for field in fields(Run)
    }
    return {name: those for name, those in values.items() if len(those) > 1}


@lru_cache(maxsize=1)
def shared(size: str) -> tuple[dict[str, np.ndarray], Text]:
    """Return weights and text, made once in a process, as a sweep loads its base once."""
    return workload.weights(workload.SIZES[size]), Text(workload.SIZES[size])


def ours(run: Run, folder: str | None = None) -> dict[str, Any]:
    """Run once with minilora, and return the row of `run_sweep`."""
    # imported here, as the peers are in `peer`: no process loads what the other side needs
    from minilora.building import build_model
    from minilora.config import LoraConfig, QuantConfig
    from minilora.injection import inject_lora
    from minilora.quant.model import quantize_model
    from minilora.training.evaluation import evaluate
    from minilora.training.trainer import Trainer

    weights, task = shared(run.size)
    base = build_model(workload.SIZES[run.size].config, weights)
    if run.method == "qlora":
        base = quantize_model(base, QuantConfig("nf4", double_quant=False))
    model = inject_lora(base, LoraConfig(run.r, workload.ALPHA), np.random.default_rng(0))
    adapters = run.adapters()
    for p in model.trainable():
        p.data[...] = adapters[p.name]
    history = Trainer(model, task, run.train(), threads=1).train()
    return {
        "loss": evaluate(model, task.eval_batches("test"))["loss"],
        "train_loss": float(np.mean([step["loss"] for step in history.steps])),
        "first_loss": history.steps[0]["loss"],
    }


def peer(run: Run, folder: str | None = None) -> dict[str, Any]:
    """Run the same with torch + PEFT (+ bitsandbytes)."""
    from benchmarks.grid_peers import run_of_grid

    return run_of_grid(run, *shared(run.size))


SIDES: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "peer": peer}
MODULES = {"ours": "minilora.sweep.run", "peer": "benchmarks.grid_peers"}
"""What a process of each side imports."""
LOSSES = ("first_loss", "train_loss", "loss")


def measure(
    peers: bool, say: Any, runs: list[Run] | None = None, pieces: int = PIECES
) -> list[dict[str, Any]]:
    """Return one row: what each side took, piece by piece, and how far apart their losses are."""
    runs = runs or grid()
    names = ["ours", "peer"] if peers else ["ours"]
    start: dict[str, dict[str, float]] = {name: {} for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    first = list({run.method: replace(run, steps=1) for run in runs}.values())
    with tempfile.TemporaryDirectory() as folder, pools(names) as pool:
        for name in names:
            start[name]["import"] = everywhere(pool[name], import_module, [MODULES[name]])
            start[name]["first_steps"] = everywhere(pool[name], SIDES[name], first)
            say(
                f"{name}: started and imported in {start[name]['import']:.1f} s, then the first run of each "
                f"method, one step (kernels compiled or loaded): {start[name]['first_steps']:.1f} s"
            )
        for i in range(pieces):
            for name in names[:: -1 if i % 2 else 1]:
                began = time.perf_counter()
                rows = run_sweep(
                    runs[i::pieces],
                    f"{folder}/{name}{i}",
                    run=SIDES[name],
                    executor=pool[name],
                    n_jobs=PROCESSES,
                    progress=False,
                )
                seconds[name].append(time.perf_counter() - began)
                if failed := [row["error"] for row in rows if row["status"] != "success"]:
                    raise RuntimeError(f"{name}: {failed[0]}")
                found[name] |= {row["key"]: row for row in rows}
            say(f"piece {i + 1}: " + ", ".join(f"{name} {seconds[name][-1]:.1f} s" for name in names))
    losses = [row["loss"] for row in found["ours"].values()]
    row: dict[str, Any] = {
        "runs": len(runs),
        "steps": runs[0].steps,
        "size": runs[0].size,
        "axes": axes(runs),
        "processes": PROCESSES,
        "start": start,
        "seconds": seconds,
        "losses": [min(losses), max(losses)],
        "check": None,
    }
    if peers:
        row |= {
            "ratio": ratio(seconds["peer"], seconds["ours"]),
            "check": check(runs, found["ours"], found["peer"]),
        }
    say(line(row))
    return [row]


@contextmanager
def pools(names: list[str]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """Start processes of one thread each for every side; they sleep while the other side works."""
    context = get_context("spawn")
    # processes start at the first jobs, and inherit the environment
    with patch.dict(os.environ, SINGLE_THREAD), ExitStack() as stack:
        yield {
            name: stack.enter_context(
                ProcessPoolExecutor(PROCESSES, context, _keep, (context.Barrier(PROCESSES),))
            )
            for name in names
        }


def _keep(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def everywhere(pool: ProcessPoolExecutor, function: Callable[[Any], Any], arguments: list[Any]) -> float:
    """Return the seconds until every process has called the function with each argument."""
    start = time.perf_counter()
    for job in [pool.submit(_met, function, arguments) for _ in range(PROCESSES)]:
        job.result()
    return time.perf_counter() - start


def _met(function: Callable[[Any], Any], arguments: list[Any]) -> None:
    _barrier.wait(600)  # none takes a second job before each has one
    for argument in arguments:
        function(argument)


def check(runs: list[Run], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Require that the losses of each run agree: at the first step, on average, and on held-out text.

    A gradient may err by `workload.rounding`. An update of Adam, a quotient of gradients, may err by as much.
    Independent errors add up over the steps like a random walk.
    """
    worst = {
        name: float(np.max([abs(ours[run.key()][name] / theirs[run.key()][name] - 1) for run in runs]))
        for name in LOSSES
    }
    bound = workload.rounding(workload.SIZES[runs[0].size]) * max(run.steps for run in runs) ** 0.5
    if not all(difference <= bound for difference in worst.values()):  # NaN is no agreement
        raise RuntimeError(f"grid: losses differ by {worst}, more than {bound:.1e}: not the same training")
    return worst | {"bound": bound}


def line(row: dict[str, Any]) -> str:
    """Return the row for the terminal."""
    text = f"{row['runs']} runs of {row['steps']} steps: " + ", ".join(
        f"{k} {sum(v):.0f} s" for k, v in row["seconds"].items()
    )
    if row["check"]:
        r = row["ratio"]
        text += f"; peer/ours {r['median']:.2f} ({r['p10']:.2f}-{r['p90']:.2f})"
        text += f"; losses differ by {row['check']['loss']:.0e}"
    return text
