"""Greedy generation with the shipped tiny base, beside transformers' `generate` on the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.timing import Remote, interleave, open_sides, ratio, summary
from minilora.formats.checkpoint import base_path, load_base

TOKENS = 96


def measure(repeats: int, threads: int, peers: bool, say: Any) -> list[dict[str, Any]]:
    """Return one row for each batch size; none if the package has no base."""
    if not base_path().is_file():
        say("the package has no base (minilora/assets/base.safetensors): skipped")
        return []
    config, rows = load_base().config, []
    with open_sides(threads, peers) as sides:
        for batch in (1, 64):
            row: dict[str, Any] = {"batch": batch, "new_tokens": TOKENS, "peer": None}
            weights = sides["ours"].call("prepare_generation", batch, TOKENS)
            if "peer" in sides:
                sides["peer"].call("prepare_generation", config, weights, batch, TOKENS)
                row["check"] = _check(sides["ours"], sides["peer"])
            contestants = {side: partial(remote.call, "timed", "generate") for side, remote in sides.items()}
            found = interleave(contestants, repeats, warmup=1)
            for side, seconds in found.items():
                row[side] = summary(seconds) | {
                    "tokens_per_second": batch * TOKENS / float(np.median(seconds))
                }
            if "peer" in sides:
                row["ratio"] = ratio(found["peer"], found["ours"])
            rows.append(row)
            say(line(row))
    return rows


def _check(ours: Remote, theirs: Remote) -> dict[str, float]:
    """Require equal logits up to rounding, and return the share of equal tokens.

    Greedy tokens may part where two logits are that close.
    """
    a, b = ours.call("result", "logits"), theirs.call("result", "logits")
    error = workload.difference(a, b)
    if not error <= 1e-4:
        raise RuntimeError(f"generation: logits differ by {error:.1e} of the largest")
    same = np.mean(np.array(ours.call("result", "generate")) == np.array(theirs.call("result", "generate")))
    return {"worst_relative_error": error, "same_tokens": float(same)}


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal."""
    text = f"batch {row['batch']:2d}   ours {row['ours']['tokens_per_second']:8.0f} tokens/s"
    if row["peer"]:
        text += f"   transformers {row['peer']['tokens_per_second']:8.0f} tokens/s"
        text += f"   ratio {row['ratio']['median']:.2f}"
    return text
