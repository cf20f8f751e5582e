"""Start-up: imports, and the compilation of all kernels that a sweep needs, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.timing import summary

IMPORTS = {
    "import minilora": "import minilora",
    "everything the sweep needs": "import minilora.study.run, minilora.study.sweep",
    "the same, and the tiny base read": "import minilora.study.run, minilora.study.sweep, minilora; minilora.load_base()",
}
PEER_IMPORTS = {
    "import torch, transformers, peft": "import torch, transformers, peft; transformers.LlamaForCausalLM; peft.get_peft_model",
}
COMPILE = """
from minilora.config import ModelConfig
from minilora.study.run import warm_kernels
from minilora.transformer import init_model
import json, numpy
config = ModelConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = init_model(config, numpy.random.default_rng(0))
print(json.dumps(warm_kernels(model)))
"""


def measure(repeats: int, peers: bool, say: Any) -> list[dict[str, Any]]:
    """One row for each import and for compiling; the first process of each is not counted (disk cache)."""
    rows = []
    for name, code in (IMPORTS | (PEER_IMPORTS if peers else {})).items():
        timed = f"import time, json; start = time.perf_counter()\n{code}\nprint(json.dumps(time.perf_counter() - start))"
        runs = min(repeats, 5)
        rows.append({"what": name} | summary([_python(timed) for _ in range(runs + 1)][1:]))
        say(line(rows[-1]))
    cold, warm = [], []
    for _ in range(min(repeats, 3)):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_python(COMPILE, NUMBA_CACHE_DIR=folder))
            warm.append(_python(COMPILE, NUMBA_CACHE_DIR=folder))
    kernels = {"compile all kernels (first run on a machine)": cold, "load them from Numba's cache (later runs)": warm}
    for name, seconds in kernels.items():
        rows.append({"what": name} | summary(seconds))
        say(line(rows[-1]))
    return rows


def _python(code: str, **environment: str) -> float:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # users have compiled bytecode
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{code}\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    return f"{row['what']:45s} {row['median']:7.2f} s (best {row['min']:.2f} of {row['turns']})"
