"""The whole demonstration, `minilora sweep`, as on a new machine with nothing compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(out: Path, say: Any) -> list[dict[str, Any]]:
    """Return one row: seconds from start to finished page, rows written, and the largest process (Linux).

    The page, its rows and figures become `out/demo`. The adapters are not kept.
    """
    import resource  # not on every system

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "minilora", "sweep"]
        start = time.perf_counter()
        subprocess.run(
            command, env=os.environ | {"NUMBA_CACHE_DIR": f"{folder}/numba"}, cwd=folder, check=True
        )
        seconds = time.perf_counter() - start
        demo = Path(folder) / "runs" / "demo"
        rows = len((demo / "results.jsonl").read_text().splitlines())
        shutil.rmtree(out / "demo", ignore_errors=True)
        shutil.copytree(demo, out / "demo", ignore=shutil.ignore_patterns("runs"))
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the workers too
    say(f"{rows} rows in {seconds:.0f} s, largest process {largest:.0f} MiB")
    return [{"rows": rows, "seconds": seconds, "largest_process_mib": largest}]
