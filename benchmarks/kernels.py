"""4-bit kernels beside bitsandbytes and dense float32: quantize, dequantize, multiply.

The memory bandwidth is the ceiling of the first two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.timing import Remote, interleave, open_sides, ratio, summary

BATCHES = (1, 8, 64, 512)


def measure(
    sizes: tuple[int, ...], repeats: int, threads: int, peers: bool, say: Any
) -> list[dict[str, Any]]:
    """Check, then time; return one row for each operation, matrix size, batch and number of threads."""
    rows = []
    with open_sides(threads, peers) as sides:
        for n in sizes:
            for t in sorted({1, threads}):
                for op, batch in [
                    ("bandwidth", 1),
                    ("quantize", 1),
                    ("dequantize", 1),
                    *(("product", b) for b in BATCHES),
                ]:
                    rows.append(_one(sides, op, n, batch, t, repeats))
                    say(line(rows[-1]))
    return rows


def _one(sides: dict[str, Remote], op: str, n: int, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    wanted = {"bandwidth": [("ours", "fill"), ("ours", "copy")]}.get(
        op, [("ours", "nf4"), ("ours", "int4"), ("peer", "nf4")]
    )
    if op == "product":
        wanted += [("ours", "dense"), ("peer", "dense")]
    wanted = [(side, kind) for side, kind in wanted if side in sides]
    for side, kind in wanted:
        sides[side].call(
            "prepare", f"{op} {kind}", kind if op == "bandwidth" else op, kind, n, batch, threads
        )
    row: dict[str, Any] = {"op": op, "n": n, "batch": batch, "threads": threads}
    if op != "bandwidth":
        row["check"] = _check(sides, op, n, batch)
    contestants = {
        f"{side} {kind}": partial(sides[side].call, "timed", f"{op} {kind}") for side, kind in wanted
    }
    found = interleave(contestants, repeats)
    row["seconds"] = {name: summary(seconds) for name, seconds in found.items()}
    row["gb_per_second"] = {name: 4e-9 * n * n / float(np.median(seconds)) for name, seconds in found.items()}
    row["ratio"] = {
        name: ratio(seconds, found["ours nf4"]) for name, seconds in found.items() if name.startswith("peer")
    }
    return row


def _check(sides: dict[str, Remote], op: str, n: int, batch: int) -> str:
    """Compare with bitsandbytes, or with what must hold anyway, and return what was compared."""
    results = {kind: sides["ours"].call("result", f"{op} {kind}") for kind in ("nf4", "int4")}
    theirs = sides["peer"].call("result", f"{op} nf4")[0] if "peer" in sides else None
    if op == "quantize":
        return _equal(
            "codes and scales", [np.concatenate(a) for a in zip(*results["nf4"], strict=True)], theirs
        )
    if op == "dequantize":
        return _equal("weights", [np.concatenate(results["nf4"])], None if theirs is None else [theirs])
    x = workload.matrices(n, batch)[1]
    errors = []
    for kind, parts in results.items():
        sides["ours"].call("prepare", "check", "dequantize", kind, n, batch, 1)
        w = sides["ours"].call("result", "check")[0]
        # Higham, Accuracy and Stability of Numerical Algorithms, section 3.1
        bound = 2 * (n + 1) * float(np.finfo(np.float32).eps) * (np.abs(x) @ np.abs(w).T)
        for y in (np.concatenate(parts), theirs if kind == "nf4" else None):
            if y is not None:
                errors.append(np.abs(y - x @ w.T) / bound)
    worst = float(np.max(errors))  # NaN stays NaN
    if not worst <= 1:
        raise RuntimeError(f"product {n} {batch}: error {worst:.1e} times what rounding allows")
    return f"products of all sides within rounding (largest error {worst:.1e} of the bound)"


def _equal(what: str, ours: Any, theirs: Any) -> str:
    if theirs is None:
        return "not compared: bitsandbytes is missing"
    for a, b in zip(ours, theirs, strict=True):
        if not np.array_equal(a, b):
            raise RuntimeError(f"{what}: {(a != b).sum()} of {a.size} differ from bitsandbytes")
    return f"{what} equal to bitsandbytes', bit by bit"


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal."""
    head = f"{row['n']:5d}² {row['threads']} thread{'s' if row['threads'] > 1 else ' '} {row['op']:10s}"
    if row["op"] == "product":
        values = [f"{k} {1e3 * s['median']:.2f} ms" for k, s in row["seconds"].items()]
        return f"{head} batch {row['batch']:3d}   " + "   ".join(values)
    return f"{head}   " + "   ".join(f"{k} {v:.2f} GB/s" for k, v in row["gb_per_second"].items())
