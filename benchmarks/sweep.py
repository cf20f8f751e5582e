"""The whole demonstration, `minilora sweep`, as on a new machine: nothing compiled yet; its time and the largest process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(say: Any) -> list[dict[str, Any]]:
    """One row: seconds from start to the finished page, rows written, and the largest of its processes (Linux)."""
    import resource  # not on every system

    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": f"{folder}/numba"}
        command = [sys.executable, "-m", "minilora.cli", "sweep", "--out", folder, "--quiet"]
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(done.stderr)
        rows = len((Path(folder) / "demo" / "results.jsonl").read_text().splitlines())
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # the sweep's own workers are its children, and count
    say(f"{rows} rows in {seconds:.0f} s, largest process {largest:.0f} MiB")
    return [{"rows": rows, "seconds": seconds, "largest_process_mib": largest}]
