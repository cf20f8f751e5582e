"""One optimizer step (forward, backward, clip, AdamW) of each method and size, beside the peers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.timing import Contestant, Remote, Sgemm, interleave, open_sides, ratio, remote, summary
from minilora.functional import group_sum

PEER = {
    "full": "torch",
    "lora": "torch + PEFT",
    "qlora": "torch + PEFT + bitsandbytes",
    "qalora": "torch + PEFT + bitsandbytes (QLoRA: PEFT's QA-LoRA needs a GPTQ base)",
}


def measure(
    sizes: tuple[str, ...], repeats: int, threads: int, peers: bool, say: Any
) -> list[dict[str, Any]]:
    """Check, then time; return one row for each size and method.

    The limit is taken from a product between the turns.
    """
    rows = []
    with open_sides(threads, peers) as sides, remote("benchmarks.timing.Sgemm", threads) as product:
        for name in sizes:
            for method in workload.METHODS:
                rows.append(_one(name, method, sides, partial(product.call, "timed"), repeats))
                say(line(rows[-1]))
    return rows


def _one(
    name: str, method: str, sides: dict[str, Remote], product: Contestant, repeats: int
) -> dict[str, Any]:
    size = workload.SIZES[name]
    row: dict[str, Any] = {
        "size": name,
        "method": method,
        "batch": size.batch,
        "time": size.time,
        "peer": None,
        "check": None,
    }
    if "peer" in sides:
        row["check"] = _check(name, method, sides["ours"], sides["peer"])
    else:
        _check_alone(name, method, sides["ours"])
    for side in sides.values():
        side.call("reset_peak")
    steps: dict[str, Contestant] = {name: partial(side.call, "timed", "step") for name, side in sides.items()}
    found = interleave(steps | {"sgemm": product}, repeats)
    products = found.pop("sgemm")
    flop = workload.flop(size, method)
    limits = Sgemm.seconds(flop, products)
    row |= {
        "flop": flop,
        "sgemm_gflops": Sgemm.gflops(products),
        "limit_ms": 1e3 * float(np.median(limits)),
        "limit_share": ratio(limits, found["ours"]),
    }
    for side, seconds in found.items():
        row[side] = summary(seconds) | {
            "tokens_per_second": size.tokens / float(np.median(seconds)),
            "peak_mib": sides[side].call("peak_mib"),
        }
    if row["peer"]:
        row["peer"]["name"] = PEER[method]
        row["ratio"] = ratio(found["peer"], found["ours"])
    return row


def _check_alone(name: str, method: str, ours: Remote) -> None:
    """Require finite loss and gradients, where there is no peer."""
    ours.call("build", name, method)
    loss, names = ours.call("loss")
    bad = [n for n in names if not np.isfinite(ours.call("gradient", n)).all()]
    if bad or not np.isfinite(loss):
        raise RuntimeError(f"{name} {method}: loss {loss}, gradients not finite: {bad}")


def _check(name: str, method: str, ours: Remote, theirs: Remote) -> dict[str, Any]:
    """Compare loss and every gradient on the same weights, adapters and batch.

    Both sides are then ready to be timed.
    """
    if method == "qalora":  # the same function in dense form: W = dequantized, A repeated over each group
        ours.call("build", name, method)
        adapters = workload.wide(workload.adapters(workload.SIZES[name], workload.GROUP_SIZE))
        theirs.call("build", name, "lora", ours.call("dense_weights"), adapters)
    else:
        theirs.call("build", name, method)
        ours.call("build", name, method, theirs.call("states") if method == "qlora" else None)
    found = compare(f"{name} {method}", ours, theirs, workload.rounding(workload.SIZES[name]))
    if method == "qalora":
        theirs.call("build", name, "qlora")
    return found


def compare(what: str, ours: Remote, theirs: Remote, bound: float) -> dict[str, Any]:
    """Compare loss and every gradient of both sides as they stand.

    Raises
    ------
    RuntimeError
        Something differs by more than `bound`.
    """
    (loss, names), (their_loss, their_names) = ours.call("loss"), theirs.call("loss")
    if set(names) != set(their_names):
        raise RuntimeError(f"{what}: different arrays train: {sorted(set(names) ^ set(their_names))[:4]}")
    worst, where = 0.0, ""
    for n in names:
        a, b = ours.call("gradient", n), theirs.call("gradient", n)
        if a.shape != b.shape:  # the repeated A of QA-LoRA: its gradients add up
            b = group_sum(b, workload.GROUP_SIZE)
        error = workload.difference(a, b)
        if error >= worst:
            worst, where = error, n
    if not (worst <= bound and abs(loss - their_loss) <= bound * abs(their_loss)):
        raise RuntimeError(
            f"{what}: loss {loss}, peer's {their_loss}; gradient of {where} differs by {worst:.1e}, "
            f"more than {bound:.1e}"
        )
    return {
        "loss": loss,
        "loss_difference": abs(loss - their_loss),
        "arrays": len(names),
        "worst_relative_error": worst,
        "worst_array": where,
        "bound": bound,
    }


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal."""
    text = f"{row['size']:6s} {row['method']:6s}"
    for side in ("ours", "peer"):
        if row[side]:
            text += f"   {side} {1e3 * row[side]['median']:8.1f} ms (best {1e3 * row[side]['min']:.1f})"
    text += f"   {100 * row['limit_share']['median']:.0f} % of the limit ({row['limit_ms']:.1f} ms)"
    if row["peer"]:
        r, error = row["ratio"], row["check"]["worst_relative_error"]
        text += f"   peer/ours {r['median']:.2f} ({r['p10']:.2f}-{r['p90']:.2f})"
        text += f"   gradients differ by {error:.0e}"
    return text
