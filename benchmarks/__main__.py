"""The command `python -m benchmarks`: check, then time, minilora beside torch + PEFT and bitsandbytes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

Part = Literal[
    "sweep",
    "startup",
    "training_step",
    "threads",
    "grid",
    "growth",
    "profile",
    "kernels",
    "generation",
    "smollm2",
    "memory",
    "ledger",
]
"""In the order in which they are measured."""
SizeName = Literal["micro", "tiny", "small", "smollm"]


@dataclass(frozen=True)
class Options:
    """Measure minilora beside torch + PEFT and bitsandbytes, if the extra `peers` is installed."""

    only: tuple[Part, ...] = get_args(Part)
    """Parts to measure."""
    sizes: tuple[SizeName, ...] = ("tiny", "small", "smollm")
    """Models of the training step, the threads and the profile."""
    kernel_sizes: tuple[int, ...] = (1024, 4096)
    """Width of square weights, a multiple of 64."""
    repeats: int = 15
    """Turns of each side."""
    threads: int = 2
    peers: bool = True
    """`--no-peers` measures our side alone."""
    out: str = "benchmarks/results"


def run(options: Options, command: str, say: Any = print) -> list[Path]:
    """Measure the parts asked for, write each as soon as it is done, and return the files."""
    from benchmarks import (
        generation,
        grid,
        growth,
        kernels,
        memory,
        page,
        plan_grid,
        profile,
        smollm2,
        startup,
        sweep,
        threads,
        timing,
        training_step,
    )

    peers = options.peers and timing.peers_installed()
    machine = timing.machine()
    say("   ".join(f"{k} {v}" for k, v in machine.items()) + f"   threads {options.threads}")
    if options.peers and not peers:
        say("the extra `peers` is not installed (pip install -e '.[peers]'): our side alone")
    if (machine["load_before"] or 0) > 0.5:
        say(f"the machine is busy (load {machine['load_before']}): do not quote these numbers")
    measure = {
        "sweep": lambda: sweep.measure(Path(options.out), say),
        "startup": lambda: startup.measure(options.repeats, peers, say),
        "training_step": lambda: training_step.measure(
            options.sizes, options.repeats, options.threads, peers, say
        ),
        "threads": lambda: threads.measure(options.sizes, options.repeats, options.threads, say),
        "growth": lambda: growth.measure(options.repeats, options.threads, Path(options.out), say),
        "profile": lambda: profile.measure(options.sizes, options.repeats, say),
        "grid": lambda: grid.measure(peers, say),
        "kernels": lambda: kernels.measure(
            options.kernel_sizes, options.repeats, options.threads, peers, say
        ),
        "generation": lambda: generation.measure(options.repeats, options.threads, peers, say),
        "smollm2": lambda: smollm2.measure(options.repeats, options.threads, peers, say),
        "memory": lambda: memory.measure(min(options.repeats, memory.REPEATS), options.threads, peers, say),
        "ledger": lambda: plan_grid.measured(say),
    }
    files = []
    for part in options.only:
        say(f"\n== {part}")
        rows = measure[part]()
        about = {
            "command": command,
            "machine": machine,
            "threads": options.threads,
            "repeats": options.repeats,
            "peers": peers,
        }
        results = {part: about | {"rows": rows}}
        if part in ("memory", "ledger"):
            files += page.save(results, Path(options.out), stem="memory", write=memory.page)
        else:
            files += page.save(results, Path(options.out))
    files = list(dict.fromkeys(files))
    say("\n" + "\n".join(map(str, files)))
    return files


if __name__ == "__main__":
    options = tyro.cli(Options, prog="python -m benchmarks")
    run(options, " ".join(["python -m benchmarks", *sys.argv[1:]]), partial(print, flush=True))
