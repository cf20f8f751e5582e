"""The commands about many runs: sweep and plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minilora.cli.options import GRID_AXES, said
from minilora.config import TINY, ConfigError, require, require_in
from minilora.formats.files import read_json, writable_folder, write_file
from minilora.sweep.grid import SweepConfig, expand
from minilora.sweep.settings import PRETRAINED, RunConfig

if TYPE_CHECKING:
    from minilora.cli.options import Plot, Sweep
    from minilora.sweep.results import Row

PRESETS = {
    "demo": "A demonstration: short runs, two seeds, no intervals, default learning rates. "
    "The study is `minilora sweep --preset full`.",
    "full": "The study: learning rates are searched on the validation split first, then three seeds on the "
    "test split.",
    "pretrained": "A small sweep over a real model: one seed, one learning rate for all adapters, no "
    "intervals. Deployed: rounded to the same bits again (QLoRA) or merged into its offsets (QA-LoRA).",
    "custom": "Your own grid.",
}
"""Preset → what a sweep says about itself."""
OWN_GRID = (*GRID_AXES, "split", "text_path", "data")
"""Settings that make a grid of one's own."""


class Plan(NamedTuple):
    """What a sweep is going to do."""

    preset: str
    settings: dict[str, Any]
    """Settings of all runs that replace the preset's own."""
    runs: list[RunConfig]
    out: Path
    n_jobs: int


def sweep(command: Sweep, named: Collection[str]) -> int:
    """Plan, run and report a sweep."""
    plan = _plan(command, said(command.settings, named))
    _announce(plan)
    rows = _run(plan, command)
    return _report(plan, rows)


def _plan(command: Sweep, settings: dict[str, Any]) -> Plan:
    """Return what is going to be done; whatever cannot be is refused here."""
    from minilora.sweep.inputs import check_memory
    from minilora.sweep.run_models import check_buildable
    from minilora.threads import available_threads

    model = settings.get("model", TINY)
    preset = _preset(settings, model)
    name = command.name
    if name == type(command).name:  # not given
        name = preset if model == TINY else Path(model).stem
    plan = Plan(preset, settings, [], Path(command.out) / name, command.n_jobs or available_threads())
    writable_folder(plan.out)
    runs = _runs(plan, model)
    if model != TINY:
        for run in runs:
            check_memory(run, processes=plan.n_jobs)
    check_buildable(runs)
    return plan._replace(runs=runs)


def _preset(settings: dict[str, Any], model: str) -> str:
    """Return the preset that is asked for, by name or by what is said of the grid."""
    axes = [name for name in OWN_GRID if settings.get(name) not in (None, ())]
    preset = settings.pop("preset", None)
    if preset is None:
        default = "demo" if model == TINY else "pretrained"
        preset = "custom" if axes else default
    require_in(preset, tuple(PRESETS), "preset")
    if preset != "custom" and axes:
        flags = ", ".join("--" + axis.replace("_", "-") for axis in axes)
        raise ConfigError(
            f"preset={preset!r}: has a grid of its own; leave out {flags}, or --preset for a grid of yours"
        )
    require(
        preset == "custom" or (preset == "pretrained") == (model != TINY),
        "preset",
        preset,
        f"does not go with model={model!r}: demo and full sweep the tiny base, pretrained a real model",
    )
    return str(preset)


def _runs(plan: Plan, model: str) -> list[RunConfig]:
    """Return the runs, of the study both stages before the search has chosen."""
    from minilora.sweep import presets

    if plan.preset == "demo":
        return presets.demo_runs(**plan.settings)
    if plan.preset == "full":
        return presets.planned_runs(**plan.settings)
    if plan.preset == "pretrained":
        own = {name: value for name, value in plan.settings.items() if name != "model"}
        return presets.pretrained_runs(model, **own)
    axes = GRID_AXES | ({} if model == TINY else PRETRAINED) | {"preset": plan.preset} | plan.settings
    if "quant_type" in plan.settings and "bits" not in plan.settings:
        del axes["bits"]
    return expand(SweepConfig({name: values for name, values in axes.items() if values != ()}))


def _announce(plan: Plan) -> None:
    """Say what is going to be done and how long it takes; timing a step compiles the kernels once for all."""
    from minilora.sweep.estimates import estimate_seconds
    from minilora.sweep.grid import outline

    print(PRESETS[plan.preset])
    print("compiling kernels and timing a step …", flush=True)
    print(outline(plan.runs, plan.n_jobs, estimate_seconds(plan.runs)))


def _run(plan: Plan, command: Sweep) -> list[Row]:
    """Do the runs that are not done yet."""
    from minilora.sweep.presets import run_preset
    from minilora.sweep.runner import run_sweep

    how: dict[str, Any] = {
        "n_jobs": plan.n_jobs,
        "progress": not command.quiet,
        "retry_failed": command.retry_failed,
    }
    if plan.preset in ("demo", "full"):
        return run_preset(plan.preset, plan.out, settings=plan.settings, **how)
    return run_sweep(plan.runs, plan.out, **how)


def _report(plan: Plan, rows: list[Row]) -> int:
    """Write rows, figures and page; return 1 if runs failed."""
    from minilora.report import page
    from minilora.sweep.results import write_csv

    out = plan.out
    write_csv(rows, out / "results.csv")
    print(page.format_table(rows))
    minutes = sum(row.get("seconds") or 0 for row in rows) / 60  # earlier sessions included
    took = f"Its runs took {minutes / plan.n_jobs:.1f} minutes in {plan.n_jobs} processes."
    about = {
        "title": f"Sweep {out.name}",
        "intro": f"{PRESETS[plan.preset]} {took}",
        "command": "minilora " + " ".join(sys.argv[1:]),
    }
    write_file(out / "sweep.json", json.dumps(about, indent=2) + "\n")  # for `minilora plot`
    written = page.write_report(rows, out, **about)
    failed = sum(row["status"] == "failed" for row in rows)
    note = f"; {failed} failed, see their errors there" if failed else ""
    print(f"{len(rows)} rows in {out / 'results.jsonl'}, report in {written}{note}")
    return 1 if failed else 0


def plot(command: Plot, named: Collection[str]) -> int:
    """Draw a finished sweep again."""
    from minilora.report import page
    from minilora.sweep.results import load_results, write_csv

    folder = Path(command.folder)
    rows = load_results(folder)
    write_csv(rows, folder / "results.csv")
    print(page.format_table(rows))
    about: Mapping[str, Any] = {"title": f"Sweep {folder.name}"}
    if (folder / "sweep.json").is_file():
        about = read_json(folder / "sweep.json")
    known = {name: str(about[name]) for name in ("title", "intro", "command") if about.get(name)}
    print(f"report in {page.write_report(rows, folder, **known)}")
    return 0
