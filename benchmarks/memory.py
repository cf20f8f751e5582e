"""Memory of a training step beside the peers, and of the workers of a sweep: `results/memory.md`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from benchmarks import plan_grid, smollm2, workload
from benchmarks.page import conditions
from benchmarks.timing import Remote, peak_mib, reset_peak, resident_mib
from minilora.formats.llama_gguf import load_gguf
from minilora.tables import markdown_table

REPEATS, STEPS = 5, 3
METHODS = ("qlora", "lora", "qalora")
GOALS = {"fast": 60, "small": 25}  # per cent of the peers' QLoRA step without checkpoints
WORKER_MB, N_JOBS, SWEEP_STEPS = 300, 2, 5
Rows = list[dict[str, Any]]
Measurement = dict[str, Any]

INTRO = """# Memory beside the peers

Written by `python -m benchmarks --only memory ledger`. MiB = 2^20 bytes, MB = 10^6. Resident memory is
that of the whole process as Linux counts it (`VmRSS`; its high-water mark is `VmHWM`), interpreter and
libraries included.
"""

RISES = """How far the high-water mark rises, in {steps} training steps (forward, backward, clipping,
AdamW), above what is resident once everything is loaded. Optimizer states count, and so does code that is
loaded at its first use (for qalora on a GGUF that is LLVM, about 50 MiB; where weights were quantized
before, it is there already). Kernels were compiled before. Each measurement is a fresh process, the sides
in turn; median of {repeats} (least-largest). Before the first step both sides read every stored array
once, because what a file's mapping brings in belongs to loading. They then hand freed memory back
(`malloc_trim`), and forget the high-water mark of loading, which is higher ({reset}). r = {r} on all
linear layers; qlora is NF4, double quantized, float32. *Fast*: nothing checkpointed. *Small*: checkpointed
blocks, logits 32 rows at a time. Peers: PEFT + bitsandbytes' QLoRA, with the allocator as its users have
it; ours keeps freed memory, as the Trainer does. Shares are ours in per cent of the peers' QLoRA step
without checkpoints, turn by turn; those of lora and qalora are for information. Loss after the steps, from
the same adapters and batch: {losses}."""

SWEEP = """The demonstration's runs ({runs}), {steps} steps each, in {jobs} worker processes. Each worker
reads its own high-water mark at the end of each run, and forgets it before the next. Largest worker:
**{worst:.0f} MB**; the goal is at most {goal} MB. Before its first run a worker holds only code, at most
{imported:.0f} MB."""

GRID = """{runs} runs, chosen pairwise over model, method, rank, targets, bits, groups and blocks,
optimizer, batch, context, checkpointing, chunks, shards, accumulation and type. Each was planned from the
configuration alone, then built and run. What outlasts a step is equal to the byte in {held} of {runs}. The
rise is what one worker's step adds at its peak. It is explained within 64 KiB or 2 % in {within} of
{runs}. The measurement (tracemalloc) lies {least:,} to {most:,} bytes above the prediction: Python's own
objects take them. The {worst} runs that use most of that allowance:"""
WORST = 12


def measure(repeats: int, threads: int, peers: bool, say: Any) -> Rows:
    """Return all rows: rises of both models, and the workers of a sweep."""
    if resident_mib() is None:
        say("resident memory is read from Linux's /proc: skipped")
        return []
    rows = rises("small", *own_model("small", threads, peers), repeats, say)
    with smollm2.prepared(threads, peers, say) as (sides, ids):
        if sides:
            rows += rises("SmolLM2-135M", *gguf_model(sides, ids, threads), repeats, say)
    return rows + workers(say)


# ---- a training step


Open = Callable[[str], Any]  # side → a context with its Remote
Load = Callable[[str, str, bool], tuple[Any, ...]]  # side, method, checkpoint → the call that makes it ready


def own_model(name: str, threads: int, peers: bool) -> tuple[list[str], Open, Load]:
    """Return the sides of a model of `workload.SIZES`, how each is opened, and the call that loads it."""
    paths = {"ours": "benchmarks.ours.Ours", "peer": "benchmarks.peers.Peers"}

    def load(side: str, method: str, checkpoint: bool) -> tuple[Any, ...]:
        return ("build", name, method) if side == "ours" else ("build", name, method, None, None, checkpoint)

    return list(paths)[: 1 + peers], lambda side: _remote(paths[side], threads, False), load


def gguf_model(sides: dict[str, str], ids: np.ndarray, threads: int) -> tuple[list[str], Open, Load]:
    """Return the same for SmolLM2's file."""
    size = workload.Size(load_gguf(sides["ours"]).config, smollm2.BATCH, smollm2.TIME)

    def load(side: str, method: str, checkpoint: bool) -> tuple[Any, ...]:
        adapters = workload.adapters(size, workload.GROUP_SIZE if method == "qalora" else 1)
        call = ("load", method, *smollm2.batch_of(ids), adapters)
        return call if side == "ours" else (*call, checkpoint, False)

    return list(sides), lambda side: _remote(smollm2.SIDES[side], sides[side], threads), load


@contextmanager
def _remote(*args: Any) -> Iterator[Remote]:
    remote = Remote(*args)
    try:
        yield remote
    finally:
        remote.close()


def rises(model: str, sides: list[str], opened: Open, load: Load, repeats: int, say: Any) -> Rows:
    """Return one row for each method: MiB loaded, and the rise above them, in each mode and turn."""
    jobs: dict[tuple[str, str], Callable[[], Measurement]] = {}
    for mode in ("fast", "small"):
        jobs |= {
            (method, mode): partial(once, opened, "ours", load("ours", method, False), mode)
            for method in METHODS
        }
        if "peer" in sides:
            name = "peer" if mode == "fast" else "peer small"
            jobs["qlora", name] = partial(
                once, opened, "peer", load("peer", "qlora", mode == "small"), "step"
            )
    found: dict[tuple[str, str], list[Measurement]] = {job: [] for job in jobs}
    for method in METHODS:  # compile first: a compiler's memory is not a step's
        jobs[method, "fast"]()
    for turn in range(repeats):
        for job in list(jobs)[:: -1 if turn % 2 else 1]:
            mib = jobs[job]()
            found[job].append(mib)
            name = f"{model:12s} {job[0]:6s} {job[1]:10s}"
            say(f"{name} loaded {mib['loaded_mib']:6.0f}   rise {mib['rise_mib']:6.1f} MiB")
    rows = []
    for method in METHODS:
        mine = {mode: values for (m, mode), values in found.items() if m == method}
        rows.append(
            {"what": "rise", "model": model, "method": method}
            | {
                key: {mode: [v[key] for v in values] for mode, values in mine.items()}
                for key in ("loaded_mib", "rise_mib", "loss", "peak_forgotten")
            }
        )
    return rows


def once(opened: Open, side: str, call: tuple[Any, ...], work: str) -> Measurement:
    """Load and step in one fresh process, and return how far the peak rose."""
    with opened(side) as remote:
        remote.call(*call)
        loaded = remote.call("loaded_mib")
        forgotten = remote.call("peak_mib") - loaded < 1.0
        remote.call("timed", work, STEPS)
        return {
            "loaded_mib": loaded,
            "rise_mib": remote.call("peak_mib") - loaded,
            "peak_forgotten": forgotten,
            "loss": remote.call("loss")[0],
        }


def share(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return ours in per cent of theirs, turn by turn: median, least and largest.

    >>> share([1.0, 3.0, 2.0], [4.0, 4.0, 4.0])
    {'median': 50.0, 'min': 25.0, 'max': 75.0}
    """
    percent = 100 * np.array(ours) / np.array(theirs)
    return {"median": float(np.median(percent)), "min": float(percent.min()), "max": float(percent.max())}


# ---- the workers of a sweep


def workers(say: Any, runs: list[Any] | None = None, n_jobs: int = N_JOBS) -> Rows:
    """Return one row for each run of a short demonstration: its process, memory before it, and its peak."""
    from minilora.sweep.presets import demo_runs
    from minilora.sweep.runner import run_sweep
    from minilora.sweep.warm import warm_kernels

    runs = demo_runs(steps=SWEEP_STEPS) if runs is None else runs
    warm_kernels()  # as `minilora sweep` does before it starts workers: they load what is compiled
    with tempfile.TemporaryDirectory() as folder:
        found = run_sweep(runs, folder, run=watched, n_jobs=n_jobs, progress=False)
    failed = [row["error"] for row in found if row["status"] != "success"]
    if failed:
        raise RuntimeError(f"runs of the sweep failed: {failed[0]}")
    keys = ("method", "r", "bits", "process", "order", "start_mib", "peak_mib")
    rows = [{"what": "worker"} | {key: row[key] for key in keys} for row in found]
    say(f"sweep: {len(rows)} runs, largest worker {megabytes(max(row['peak_mib'] for row in rows)):.0f} MB")
    return rows


_order = 0  # runs that this process has seen


def watched(config: Any, folder: str | None) -> dict[str, Any]:
    """Run in a worker, and add the worker's memory before the run and its peak."""
    global _order
    from minilora.sweep.run import run

    _order += 1
    reset_peak(trim=False)
    start = resident_mib()
    row = run(config, folder)
    return row | {"process": os.getpid(), "order": _order, "start_mib": start, "peak_mib": peak_mib()}


def megabytes(mib: float) -> float:
    """Convert MiB to MB.

    >>> megabytes(1)
    1.048576
    """
    return mib * 2**20 / 1e6


# ---- the page


def page(results: dict[str, Any]) -> str:
    """Return the whole page as Markdown."""
    parts = [INTRO]
    for name, body in {"memory": _memory, "ledger": predicted}.items():
        if name in results:
            parts.append(body(results[name]["rows"], conditions(results[name])))
    return "\n".join(parts)


def predicted(rows: Rows, about: str) -> str:
    """Return predicted beside measured bytes of the planner's grid, and published figures beside ours."""
    grid, papers = ([r for r in rows if (r["kind"] == "published") == p] for p in (False, True))
    within = [plan_grid.used(r) <= 1 for r in grid]
    text = GRID.format(
        runs=len(grid),
        held=sum(r["persistent"] for r in grid),
        within=sum(within),
        worst=WORST,
        least=min(r["difference"] for r in grid),
        most=max(r["difference"] for r in grid),
    )
    columns = {"what": "figure", "paper": "whose", "published": "published", "ours": "ours"}
    columns["assumption"] = "assumption"
    published = markdown_table(list(columns.values()), [[row[key] for key in columns] for row in papers])
    return (
        f"## Predicted against measured\n\n{about}\n\n{text}\n\n{plan_grid.worst_cases(grid, WORST)}\n\n"
        f"## Published figures beside ours\n\nAlso `minilora memory --published`.\n\n{published}\n"
    )


def _memory(rows: Rows, about: str) -> str:
    found = [r for r in rows if r["what"] == "rise"]
    parts = [f"## A training step\n\n{about}\n"]
    for model in dict.fromkeys(r["model"] for r in found):
        parts.append(f"### {model}\n\n" + _rises([r for r in found if r["model"] == model]) + "\n")
    if found:
        parts.append(_about_rises(found) + "\n")
    mine = [r for r in rows if r["what"] == "worker"]
    return "\n".join(parts + ([f"## The workers of a sweep\n\n{_workers(mine)}\n"] if mine else []))


def _rises(rows: Rows) -> str:
    names = {
        "fast": "fast, MiB",
        "small": "small, MiB",
        "peer": "peer, MiB",
        "peer small": "peer checkpointed, MiB",
    }
    peer = next((r["rise_mib"]["peer"] for r in rows if "peer" in r["rise_mib"]), None)
    goals = [f"{mode}/peer (goal {goal} %)" for mode, goal in GOALS.items()]
    body = []
    for r in rows:
        cells = [_spread(r["rise_mib"].get(mode)) for mode in names]
        shares = [share(r["rise_mib"][mode], peer) if peer else None for mode in GOALS]
        body.append(
            [
                r["method"],
                *cells,
                *(
                    "" if s is None else f"{s['median']:.0f} % ({s['min']:.0f}-{s['max']:.0f})"
                    for s in shares
                ),
            ]
        )
    loaded = "; ".join(
        f"{r['method']}, {mode}: {np.median(values):,.0f}"
        for r in rows
        for mode, values in r["loaded_mib"].items()
        if mode in ("fast", "peer")
    )
    return (
        markdown_table(["method", *names.values(), *goals], body)
        + f"\n\nResident when loaded, MiB: {loaded}."
    )


def _spread(values: list[float] | None) -> str:
    return "" if not values else f"{np.median(values):,.1f} ({min(values):,.1f}-{max(values):,.1f})"


def _about_rises(rows: Rows) -> str:
    forgotten = all(flag for r in rows for flags in r["peak_forgotten"].values() for flag in flags)
    reset = (
        "`5` to `/proc/self/clear_refs`"
        if forgotten
        else "refused by the system in some processes, so rises are upper bounds that may hold loading's peak"
    )
    losses = "; ".join(
        f"{r['model']} {r['method']}: "
        + ", ".join(f"{mode} {np.median(v):.4f}" for mode, v in r["loss"].items())
        for r in rows
    )
    repeats = len(next(iter(rows[0]["rise_mib"].values())))
    return RISES.format(steps=STEPS, repeats=repeats, reset=reset, r=workload.R, losses=losses)


def _workers(rows: Rows) -> str:
    body = []
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        body.append(
            [
                method,
                str(len(mine)),
                f"{megabytes(float(np.median([r['start_mib'] for r in mine]))):.0f}",
                f"{megabytes(max(r['peak_mib'] for r in mine)):.0f}",
            ]
        )
    text = SWEEP.format(
        runs=f"{len(rows)} runs",
        steps=SWEEP_STEPS,
        jobs=len({r["process"] for r in rows}),
        goal=WORKER_MB,
        worst=megabytes(max(r["peak_mib"] for r in rows)),
        imported=megabytes(max(r["start_mib"] for r in rows if r["order"] == 1)),
    )
    return (
        text + "\n\n" + markdown_table(["method", "runs", "before a run, MB (median)", "highest, MB"], body)
    )
