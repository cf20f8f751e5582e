"""Versions and machine, for every row of results."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

import minilora
from minilora.threads import available_threads


def environment() -> dict[str, str]:
    """Return versions and machine as columns of a row."""
    return {
        "python_version": platform.python_version(),
        "numpy_version": np.__version__,
        "numba_version": version("numba"),
        "minilora_version": minilora.__version__,
        "machine": f"{platform.machine()}, {available_threads()} cores, {cpu_name()}",
    }


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return the processor's name, if the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
