"""The sweeps that ship: the demonstration, the study, and the sweep over a real model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minilora.config import ADAPTERS, CONTROLS, TRAINED, require_in
from minilora.sweep.results import Row, check_one_corpus
from minilora.sweep.runner import SweepConfig, expand, run_sweep

if TYPE_CHECKING:
    from minilora.sweep.settings import RunConfig

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The grid on which the study chooses: half a decade per step, for full fine-tuning and adapters alike."""

RANKS = (1, 2, 8, 64)
STUDY_TASKS = ("products", "python")
SEARCH_SEED = 100
STUDY_SEEDS = (0, 1, 2)
LENGTHS = {
    "products": {"steps": 250, "batch_size": 8, "n_eval": 200},
    "python": {"steps": 200, "batch_size": 8, "n_eval": 256},
}
"""How long the study trains: all its runs take 90 minutes on 2 cores."""


class Choice(NamedTuple):
    """The learning rate that the search chose for one method and task, with all that it tried."""

    task: str
    method: str
    learning_rate: float
    loss: float
    on_edge: bool
    tried: tuple[tuple[float, float | None], ...]


def demo_runs(**settings: Any) -> list[RunConfig]:
    """Return the demonstration: task `products`, default learning rates, three ranks, three bit-widths.

    The runs are short, so that the whole takes minutes. Their losses differ as they should; their recall is
    still low, and only the adapter's texts are judged (`write_all`).

    Parameters
    ----------
    **settings
        Settings or axes of all runs that replace the demonstration's own, for example `steps=200`.
    """
    short = {"steps": 40, "batch_size": 8, "n_eval": 200, "write_all": False}
    shared = {"preset": "demo", "stage": "demo", "seed": (0, 1)} | short | settings
    return _together(
        {"method": ("full", "subset", "lora"), "r": (2, 8, 32)} | shared,
        {"method": ("qlora", "qalora", *CONTROLS), "bits": (2, 4, 8)} | shared,
    )


def pretrained_runs(model: str, **settings: Any) -> list[RunConfig]:
    """Return the sweep over a real model: three ranks, three bit-widths and the base in each form.

    It takes an hour on 2 cores. One seed at one learning rate make a picture with controls, not a study with
    intervals.
    """
    short = {"model": model, "steps": 40, "batch_size": 8, "n_eval": 50, "write_all": False}
    shared = {"preset": "pretrained", "stage": "pretrained"} | short | settings
    return _together(
        {"method": ("lora", "qalora"), "r": (2, 8, 32)} | shared,
        {"method": ("qlora", "qalora", *CONTROLS), "bits": (2, 3, 4)} | shared,
    )


def search_runs(tasks: Sequence[str] = STUDY_TASKS, **settings: Any) -> list[RunConfig]:
    """Return stage 1 of the study: every method at each learning rate of one grid, r = 8 and 4 bits.

    The runs are judged on the validation split and use a seed that the study does not.
    """
    shared = {"preset": "full", "stage": "search", "split": "validation", "seed": SEARCH_SEED}
    shared |= {"method": TRAINED, "learning_rate": LEARNING_RATES}
    return _together(*({"task": task} | shared | LENGTHS[task] | settings for task in tasks))


def choose_learning_rates(rows: Iterable[Mapping[str, Any]]) -> list[Choice]:
    """Choose the learning rate with the least mean validation loss, for each task and method of the search.

    A run that failed or whose loss is not finite does not compete. `on_edge` says that the best value is the
    least or the greatest of the grid, so that a better one may lie outside.

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
    """Return stage 2 of the study, at the learning rates of stage 1: test split, three seeds.

    Ranks 1 to 64 (4 bits, and full precision for LoRA), 2, 3, 4 and 8 bits at r = 8, and the controls.
    """
    parts: list[Mapping[str, Any]] = []
    tasks: dict[str, dict[str, Any]] = {}
    for choice in choices:
        shared: dict[str, Any] = {"preset": "full", "stage": "study", "split": "test", "seed": STUDY_SEEDS}
        shared |= {"task": choice.task} | LENGTHS[choice.task] | settings
        one = {"method": choice.method, "learning_rate": choice.learning_rate} | shared
        if choice.method in ADAPTERS:
            parts.append(one | {"r": RANKS})
        if choice.method in ("qlora", "qalora"):
            parts.append(one | {"bits": (2, 3, 4, 8)})
        if choice.method not in ADAPTERS:
            parts.append(one)
        tasks[choice.task] = shared
    parts += [{"method": CONTROLS, "bits": (2, 3, 4, 8)} | shared for shared in tasks.values()]
    return _together(*parts)


def planned_runs(tasks: Sequence[str] = STUDY_TASKS, **settings: Any) -> list[RunConfig]:
    """Return the runs of both stages before the search has chosen, for counting, timing and checking them."""
    choices = [
        Choice(task, method, LEARNING_RATES[1], math.nan, False, ()) for task in tasks for method in TRAINED
    ]
    return search_runs(tasks, **settings) + study_runs(choices, **settings)


def run_preset(
    name: str,
    out: str | Path,
    *,
    tasks: Sequence[str] = STUDY_TASKS,
    settings: Mapping[str, Any] | None = None,
    **how: Any,
) -> list[Row]:
    """Do all the runs of a preset in a folder and return their rows.

    Parameters
    ----------
    name
        `demo` or `full`. The rows of `full` begin with the search's.
    out
        Folder of the results.
    tasks
        Tasks of the study.
    settings
        Settings of all runs that replace the preset's own.
    **how
        Passed to `run_sweep`: run, executor, n_jobs, progress, retry_failed.
    """
    changed = settings or {}
    if name == "demo":
        return run_sweep(demo_runs(**changed), out, **how)
    require_in(name, ("demo", "full"), "preset")
    search = run_sweep(search_runs(tasks, **changed), out, **how)
    study = run_sweep(study_runs(choose_learning_rates(search), **changed), out, **how)
    return search + study


def _together(*parts: Mapping[str, Any]) -> list[RunConfig]:
    """Expand each part; a run of two parts is done once; controls, which do not train, come last."""
    runs = {run.key(): run for part in parts for run in expand(SweepConfig(part))}
    return sorted(runs.values(), key=lambda run: run.method in CONTROLS)
