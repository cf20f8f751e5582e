"""One training step with one thread and with all: the time of each, and whether the bytes are equal.

Both have the same shards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.timing import Remote, interleave, ratio, remote, summary

METHODS = ("lora", "qlora", "qalora")


def measure(sizes: tuple[str, ...], repeats: int, threads: int, say: Any) -> list[dict[str, Any]]:
    """Check, then time; return one row for each size and method."""
    rows = []
    with (
        remote("benchmarks.ours.Ours", 1, True, threads) as one,
        remote("benchmarks.ours.Ours", threads, True, threads) as many,
    ):
        for size in sizes:
            for method in METHODS:
                row = {
                    "size": size,
                    "method": method,
                    "threads": threads,
                    "arrays": _check(size, method, one, many),
                }
                steps = {"one": one, "many": many}
                found = interleave(
                    {name: partial(side.call, "timed", "step") for name, side in steps.items()}, repeats
                )
                row |= {name: summary(seconds) for name, seconds in found.items()} | {
                    "ratio": ratio(found["one"], found["many"])
                }
                rows.append(row)
                say(line(row))
    return rows


def _check(size: str, method: str, one: Remote, many: Remote) -> int:
    """Require the same bytes of loss and gradients, and return the number of arrays compared."""
    results = []
    for side in (one, many):
        side.call("build", size, method)
        loss, names = side.call("loss")
        results.append({"loss": loss} | {name: side.call("gradient", name).tobytes() for name in names})
    if different := [name for name in results[0] if results[0][name] != results[1].get(name)]:
        raise RuntimeError(f"{size} {method}: other bytes with more threads: {', '.join(different[:4])}")
    return len(results[0]) - 1


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal."""
    r = row["ratio"]
    times = [
        f"{n} threads {1e3 * row[name]['median']:8.1f} ms"
        for n, name in ((1, "one"), (row["threads"], "many"))
    ]
    return (
        f"{row['size']:6s} {row['method']:6s}   {'   '.join(times)}   1/{row['threads']}: {r['median']:.2f} "
        f"({r['p10']:.2f}-{r['p90']:.2f}), same bytes"
    )
