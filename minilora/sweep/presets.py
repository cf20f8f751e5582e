"""The two sweeps that ship: the demonstration of `minilora sweep` and the study of `minilora sweep --preset
full`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minilora.config import ADAPTERS, CONTROLS, TRAINED
from minilora.sweep.results import Row, check_one_corpus
from minilora.sweep.runner import SweepConfig, expand, run_sweep
from minilora.sweep.workers import RunFunction

if TYPE_CHECKING:
    from minilora.sweep.settings import RunConfig

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The one grid on which the study chooses: about half a decade a step, wide enough for full fine-tuning and
for adapters."""

RANKS = (1, 2, 8, 64)
SEARCH_SEED = 100
STUDY_SEEDS = (0, 1, 2)
LENGTHS = {
    "products": {"steps": 250, "batch_size": 8, "n_eval": 200},
    "python": {"steps": 200, "batch_size": 8, "n_eval": 256},
}
"""How long the study trains: as long as 90 minutes for all its runs allow on 2 cores."""


class Choice(NamedTuple):
    """The learning rate that the search chose for one method and task, and how it came to be chosen."""

    task: str
    method: str
    learning_rate: float
    loss: float
    on_edge: bool
    tried: tuple[tuple[float, float | None], ...]


def demo_runs(**settings: Any) -> list[RunConfig]:
    """Return the demonstration: task `products`, every method at its default learning rate, three ranks,
    three bit-widths.

    Short runs, so that the whole takes minutes: their losses differ as they should, their recall has not got
    far yet, and only the adapter's texts are judged (``write_all``). ``settings`` replaces fields of
    `SweepConfig` in all runs, for example ``steps=200``.
    """
    short = {"steps": 40, "batch_size": 8, "n_eval": 200, "write_all": False}
    shared: dict[str, Any] = (
        {"preset": "demo", "stage": "demo", "task": ("products",), "seed": (0, 1)} | short | settings
    )
    return _together(
        [
            SweepConfig(method=("full", "subset", "lora"), r=(2, 8, 32), **shared),
            SweepConfig(method=("qlora", "qalora", *CONTROLS), bits=(2, 4, 8), **shared),
        ]
    )


def pretrained_runs(model: str, **settings: Any) -> list[RunConfig]:
    """Return the sweep over a real model: three ranks, three bit-widths, and the base in each form, in an
    hour on 2 cores.

    One seed at one learning rate: a picture with controls, not a study with intervals.
    """
    short: dict[str, Any] = {"model": model, "steps": 40, "batch_size": 8, "n_eval": 50, "write_all": False}
    shared: dict[str, Any] = {"preset": "pretrained", "stage": "pretrained", "seed": (0,)} | short | settings
    return _together(
        [
            SweepConfig(method=("lora", "qalora"), r=(2, 8, 32), **shared),
            SweepConfig(method=("qlora", "qalora", *CONTROLS), bits=(2, 3, 4), **shared),
        ]
    )


def search_runs(tasks: Sequence[str] = ("products", "python"), **settings: Any) -> list[RunConfig]:
    """Return stage 1 of the study: every method at each learning rate of one grid, r = 8 and 4 bits.

    The runs are judged on the validation split and use a seed that the study does not.
    """
    shared: dict[str, Any] = {
        "preset": "full",
        "stage": "search",
        "split": "validation",
        "method": TRAINED,
        "learning_rate": LEARNING_RATES,
        "seed": (SEARCH_SEED,),
    }
    return _together([SweepConfig(task=(task,), **(shared | LENGTHS[task] | settings)) for task in tasks])


def choose_learning_rates(rows: Iterable[Mapping[str, Any]]) -> list[Choice]:
    """Choose, for each task and method of the search, the learning rate with the least mean validation loss.

    A run that failed or whose loss is not finite does not compete. ``on_edge`` says that the best value is
    the least or the greatest of the grid, so that a better one may lie outside.

    Raises
    ------
    ValueError
        A search row is not from the validation split, or no run of a method and task succeeded.
    """
    rows = [row for row in rows if row.get("stage") == "search"]
    check_one_corpus(rows)
    losses: dict[tuple[str, str], dict[float, list[float | None]]] = {}
    errors: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["split"] != "validation":
            raise ValueError(
                f"split={row['split']!r}: a learning rate is chosen on the validation split only"
            )
        case = row["task"], row["method"]
        good = row["status"] == "success" and row.get("loss") is not None and math.isfinite(row["loss"])
        losses.setdefault(case, {}).setdefault(row["learning_rate"], []).append(row["loss"] if good else None)
        if not good:
            errors[case] = row.get("error") or "the loss is not finite"
    return [_choose(*case, grid, errors.get(case)) for case, grid in losses.items()]


def _choose(
    task: str, method: str, grid: Mapping[float, Sequence[float | None]], error: str | None
) -> Choice:
    tried: list[tuple[float, float | None]] = []
    for rate in sorted(grid):
        good = [loss for loss in grid[rate] if loss is not None]
        tried.append((rate, math.fsum(good) / len(good) if len(good) == len(grid[rate]) else None))
    competing = [(loss, rate) for rate, loss in tried if loss is not None]
    if not competing:
        raise ValueError(
            f"learning_rate: no search run of {method} on {task} succeeded; the last error: {error}"
        )
    loss, rate = min(competing)
    return Choice(task, method, rate, loss, rate in (min(grid), max(grid)), tuple(tried))


def study_runs(choices: Iterable[Choice], **settings: Any) -> list[RunConfig]:
    """Return stage 2: ranks 1 to 64 (4 bits, and full precision for LoRA), 2/3/4/8 bits at r = 8, and the
    controls.

    Test split, three seeds, at the learning rates of stage 1.
    """
    parts, tasks = [], {}
    for choice in choices:
        shared: dict[str, Any] = {"preset": "full", "stage": "study", "split": "test", "seed": STUDY_SEEDS}
        shared |= LENGTHS[choice.task] | settings
        one = SweepConfig(
            method=(choice.method,), task=(choice.task,), learning_rate=(choice.learning_rate,), **shared
        )
        if choice.method in ADAPTERS:
            parts.append(replace(one, r=RANKS))
        if choice.method in ("qlora", "qalora"):
            parts.append(replace(one, bits=(2, 3, 4, 8)))
        if choice.method not in ADAPTERS:
            parts.append(one)
        tasks[choice.task] = shared
    for task, shared in tasks.items():
        parts.append(SweepConfig(method=CONTROLS, task=(task,), bits=(2, 3, 4, 8), **shared))
    return _together(parts)


def planned_runs(tasks: Sequence[str] = ("products", "python"), **settings: Any) -> list[RunConfig]:
    """Return the runs of both stages of the study before the search has chosen, for counting, timing and
    checking them."""
    choices = [
        Choice(task, method, LEARNING_RATES[1], math.nan, False, ()) for task in tasks for method in TRAINED
    ]
    return search_runs(tasks, **settings) + study_runs(choices, **settings)


def run_preset(
    name: str,
    out: str | Path,
    *,
    tasks: Sequence[str] = ("products", "python"),
    run: RunFunction | None = None,
    executor: Executor | None = None,
    n_jobs: int = 1,
    progress: bool = True,
    retry_failed: bool = False,
    **settings: Any,
) -> list[Row]:
    """Do all the runs of ``"demo"`` or ``"full"`` in ``out`` and return their rows (of ``full``: the search's
    first).

    ``settings`` replaces fields of `SweepConfig` in all runs; the rest is passed to `run_sweep`.
    """
    how: dict[str, Any] = {
        "run": run,
        "executor": executor,
        "n_jobs": n_jobs,
        "progress": progress,
        "retry_failed": retry_failed,
    }
    if name == "demo":
        return run_sweep(demo_runs(**settings), out, **how)
    if name != "full":
        raise ValueError(f"preset={name!r}: choose one of demo, full")
    search = run_sweep(search_runs(tasks, **settings), out, **how)
    study = run_sweep(study_runs(choose_learning_rates(search), **settings), out, **how)
    return search + study


def _together(parts: Iterable[SweepConfig]) -> list[RunConfig]:
    """Expand each part; what occurs in two of them is run once; controls, which do not train, come last."""
    runs = {run.key(): run for part in parts for run in expand(part)}
    return sorted(runs.values(), key=lambda run: run.method in CONTROLS)
