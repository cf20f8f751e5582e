"""Start-up, each in a fresh process: imports, help, and compiling all kernels of the default sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.timing import summary

IMPORTS = {
    "import minilora": "import minilora",
    "everything the sweep needs": "import minilora.sweep.run, minilora.sweep.runner",
    "the same, and the tiny base read": (
        "import minilora.sweep.run, minilora.sweep.runner, minilora; minilora.load_base()"
    ),
}
PEER_IMPORTS = {
    "import torch, transformers, peft": (
        "import torch, transformers, peft; transformers.LlamaForCausalLM; peft.get_peft_model"
    )
}
TIMED = """
import time, json
start = time.perf_counter()
{code}
print(json.dumps(time.perf_counter() - start))
"""
COMPILE = """
from minilora.sweep.warm import warm_kernels
import json
print(json.dumps(warm_kernels()))
"""


def measure(repeats: int, peers: bool, say: Any) -> list[dict[str, Any]]:
    """Return one row for help, for each import and for compiling.

    The first process of each fills the disk cache and does not count.
    """
    rows = [
        {"what": "minilora --help, the whole process"}
        | summary([_help() for _ in range(min(repeats, 5) + 1)][1:])
    ]
    say(line(rows[-1]))
    for name, code in (IMPORTS | (PEER_IMPORTS if peers else {})).items():
        runs = min(repeats, 5)
        rows.append({"what": name} | summary([_python(TIMED.format(code=code)) for _ in range(runs + 1)][1:]))
        say(line(rows[-1]))
    cold, warm = [], []
    for _ in range(min(repeats, 3)):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_python(COMPILE, NUMBA_CACHE_DIR=folder))
            warm.append(_python(COMPILE, NUMBA_CACHE_DIR=folder))
    kernels = {
        "compile all that the default sweep needs (first run on a machine)": cold,
        "load it from Numba's cache (later runs)": warm,
    }
    for name, seconds in kernels.items():
        rows.append({"what": name} | summary(seconds))
        say(line(rows[-1]))
    return rows


def _help() -> float:
    start = time.perf_counter()
    _process("-m", "minilora", "--help")
    return time.perf_counter() - start


def _python(code: str, **environment: str) -> float:
    return float(json.loads(_process("-c", code, **environment).splitlines()[-1]))


def _process(*arguments: str, **environment: str) -> str:
    # users have compiled bytecode
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, *arguments], env=env | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def line(row: dict[str, Any]) -> str:
    """Return one row for the terminal."""
    return f"{row['what']:65s} {row['median']:7.2f} s (best {row['min']:.2f} of {row['turns']})"
