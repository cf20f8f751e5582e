"""Where the time of one training step goes: the self time of every function, with one thread and one shard.

Functions are found, not listed: all public ones of the modules that compute, and the methods by which layers,
weights and optimizers are called. Compiled code counts where it is called from.
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.ours import Ours
from benchmarks.timing import remote

METHODS = ("lora", "qlora")
COMPUTE = tuple(
    f"minilora.{name}"
    for name in ("functional", "kernels", "layers", "lora", "transformer", "quant", "training")
)
CALLED = ("forward", "backward", "matmul", "matmul_t", "rows", "step")
SHOWN = 0.01
"""Smallest share of a step with which a function gets a line of its own."""


class Clock:
    """Self times: the duration of each call without the watched calls inside it."""

    def __init__(self) -> None:
        # keys: (caller of a function, its name)
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        # [key of what is running, seconds of the calls inside it so far]
        self.stack: list[list[Any]] = [[("", ""), 0.0]]

    def watch(self, function: Callable[..., Any], name: str, method: bool) -> Callable[..., Any]:
        """Return the function, timed at each call; the name of a method is that of the object's class."""
        stack = self.stack

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            label = f"{type(args[0]).__name__}.{name}" if method else name
            caller = stack[-1]
            running = caller[0][1]
            key = "" if method else running, label
            if label == running:  # a function that calls itself keeps its line
                key = caller[0]
            stack.append([key, 0.0])
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                inside = stack.pop()[1]
                caller[1] += elapsed
                self.seconds[key] += elapsed - inside
                self.calls[key] += 1

        return watched


@contextmanager
def watched() -> Iterator[Clock]:
    """Time all functions of the modules that compute, wherever they were imported to, inside the block."""
    clock = Clock()
    loaded = {
        name: module for name, module in sys.modules.items() if name.startswith(("minilora", "benchmarks"))
    }
    computing = [module for name, module in loaded.items() if name.startswith(COMPUTE)]
    functions: dict[int, Callable[..., Any]] = {}
    changed: list[tuple[Any, str, Any]] = []
    for module in computing:
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            if inspect.isfunction(value):
                functions[id(value)] = clock.watch(value, name, method=False)
            if inspect.isclass(value):
                changed += [
                    (value, name, own) for name in CALLED if inspect.isfunction(own := vars(value).get(name))
                ]
    watching = [clock.watch(value, name, method=True) for _, name, value in changed]
    for module in loaded.values():
        places = [(module, name, value) for name, value in vars(module).items() if id(value) in functions]
        changed += places
        watching += [functions[id(value)] for _, _, value in places]
    try:
        for (owner, name, _), wrapper in zip(changed, watching, strict=True):
            setattr(owner, name, wrapper)
        yield clock
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


class Profiled(Ours):
    """Our side with one thread and one shard, its steps taken apart."""

    def __init__(self) -> None:
        super().__init__(threads=1)

    def parts(self, repeats: int) -> dict[str, Any]:
        """Return the median seconds of a step, watched and not, and of each of its functions."""
        self.timed("step", 2)
        plain, whole, found = [], [], list[dict[tuple[str, str], float]]()
        calls: dict[tuple[str, str], int] = {}
        for _ in range(repeats):
            plain.append(self.timed("step", 1))
            with watched() as clock:
                whole.append(self.timed("step", 1))
            found.append(clock.seconds)
            calls = clock.calls
        seconds = {key: float(np.median([times.get(key, 0.0) for times in found])) for key in calls}
        return {
            "step": float(np.median(plain)),
            "watched": float(np.median(whole)),
            "parts": named(seconds, calls),
        }


def named(seconds: dict[tuple[str, str], float], calls: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Return a line for each function, the longest first, or for each of its callers if it has several."""
    callers: dict[str, set[str]] = defaultdict(set)
    for caller, function in seconds:
        callers[function].add(caller)
    lines = [
        {
            "name": function if len(callers[function]) == 1 else f"{function}, in {caller or 'the step'}",
            "seconds": value,
            "calls": calls[caller, function],
        }
        for (caller, function), value in seconds.items()
    ]
    return sorted(lines, key=lambda part: -part["seconds"])


def measure(sizes: tuple[str, ...], repeats: int, say: Any) -> list[dict[str, Any]]:
    """Return one row for each size and method."""
    rows = []
    for size in sizes:
        for method in METHODS:
            with remote("benchmarks.profile.Profiled") as side:
                side.call("build", size, method)
                rows.append({"size": size, "method": method} | side.call("parts", repeats))
            say(line(rows[-1]))
    return rows


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal: its largest parts."""
    parts = (f"{part['name']} {100 * part['seconds'] / row['watched']:.0f} %" for part in row["parts"][:6])
    return f"{row['size']:6s} {row['method']:6s} {1e3 * row['step']:8.1f} ms   " + "   ".join(parts)


def shares(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return function → its share of the step in each row, for large shares, and "all else"."""
    found: dict[str, list[float]] = {}
    for i, row in enumerate(rows):
        for part in row["parts"]:
            found.setdefault(part["name"], [0.0] * len(rows))[i] += part["seconds"] / row["watched"]
    large = {name: values for name, values in found.items() if max(values) >= SHOWN}
    ordered = dict(sorted(large.items(), key=lambda item: -sum(item[1])))
    return ordered | {
        "all else": [1 - sum(values[i] for values in ordered.values()) for i in range(len(rows))]
    }
