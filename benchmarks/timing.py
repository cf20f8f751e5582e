"""How things are timed: each side in a process of its own, turn by turn.

Results are medians, and ratios of neighbouring turns.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import minilora
from minilora.threads import Workers, available_threads, single_blas

PAUSE = 0.03
"""Seconds before each turn: OpenMP's threads of the other side spin for a while after their work."""
TURN = 0.02
"""Seconds that a turn takes at least, by repeating the work."""
PEER_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
Contestant = Callable[[int], float]  # n → seconds of one call, from n in a row


class Remote:
    """An object of a class ("package.module.Class") in a process of its own.

    Two libraries in one process would share the allocator, its settings, and the memory that is reported.
    """

    def __init__(self, path: str, *args: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, path, args), daemon=True)
        self._process.start()
        theirs.close()  # so that the death of the process is seen as the end of the pipe

    def call(self, method: str, *args: Any) -> Any:
        """Return what the method of the remote object returns; its exception becomes a RuntimeError here."""
        self._connection.send((method, args))
        try:
            ok, result = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"{method}: the benchmark's process ended (out of memory?)") from None
        if not ok:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5)
        self._process.terminate()


def _serve(connection: Any, path: str, args: tuple[Any, ...]) -> None:
    module, _, name = path.rpartition(".")
    side: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            side = getattr(import_module(module), name)(*args) if side is None else side
            connection.send((True, getattr(side, method)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


@contextmanager
def remote(path: str, *args: Any) -> Iterator[Remote]:
    """Open a remote object and close it in the end."""
    side = Remote(path, *args)
    try:
        yield side
    finally:
        side.close()


@contextmanager
def open_sides(threads: int, peers: bool) -> Iterator[dict[str, Remote]]:
    """Start "ours" and, if asked for, "peer"."""
    sides = {"ours": Remote("benchmarks.ours.Ours", threads)}
    if peers:
        sides["peer"] = Remote("benchmarks.peers.Peers", threads)
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


class Sgemm:
    """NumPy's product of float32 matrices, its rows split over the threads: no training step is faster.

    Each thread calls a BLAS of one thread. OpenBLAS's own threads would go on spinning after their work, at
    the next contestant's cost.
    """

    N = 2048
    FLOP = 2 * N**3

    def __init__(self, threads: int):
        a, b = np.random.default_rng(0).standard_normal((2, self.N, self.N), np.float32)
        rows, outs = np.array_split(a, threads), np.array_split(np.empty_like(a), threads)
        workers = Workers(threads)

        @single_blas()
        def work() -> None:
            workers.map(lambda i: np.matmul(rows[i], b, out=outs[i]), range(threads))

        self.work = work

    def timed(self, n: int) -> float:
        """Return the seconds of one product, from n in a row."""
        return timed(self.work, n)

    @classmethod
    def seconds(cls, flop: int, products: list[float]) -> list[float]:
        """Return what `flop` operations would take at the rate of each product."""
        return [flop * seconds / cls.FLOP for seconds in products]

    @classmethod
    def gflops(cls, products: list[float]) -> float:
        """Return the median rate in GFLOP/s."""
        return cls.FLOP / float(np.median(products)) / 1e9


def timed(work: Callable[[], Any], n: int) -> float:
    """Return the seconds of one call, from n in a row."""
    start = time.perf_counter()
    for _ in range(n):
        work()
    return (time.perf_counter() - start) / n


def interleave(contestants: dict[str, Contestant], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Let contestants take turns, and return the seconds of each, turn by turn.

    The order is reversed at every other turn, so that a slow minute of the machine meets all sides alike.
    """
    count = {}
    for name, contestant in contestants.items():
        seconds = [contestant(1) for _ in range(max(1, warmup))]
        count[name] = max(1, round(TURN / max(seconds[-1], 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            time.sleep(PAUSE)
            found[name].append(contestants[name](count[name]))
    return found


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median, least and number of turns."""
    return {"median": float(np.median(seconds)), "min": min(seconds), "turns": len(seconds)}


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Return `slower` / `faster`, turn by turn: median, and the range of 80 % of the turns."""
    low, middle, high = np.quantile(np.array(slower) / np.array(faster), [0.1, 0.5, 0.9]).tolist()
    return {"median": middle, "p10": low, "p90": high}


def peers_installed() -> bool:
    """Return whether the extra `peers` is installed."""
    return all(find_spec(name) is not None for name in PEER_PACKAGES)


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, memory, load, versions."""
    from minilora.sweep.environment import cpu_name

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": cpu_name(),
        "machine": platform.machine(),
        "cores": available_threads(),
        "memory_gib": round(_memory_gib(), 1),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "minilora": minilora.__version__,
        **{name: installed(name) for name in ("numpy", "numba", *PEER_PACKAGES, "llama-cpp-python")},
    }


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return float("nan")


def reset_peak(trim: bool = True) -> None:
    """Forget the largest memory of this process so far (Linux).

    With `trim`, freed memory is handed back first.
    """
    gc.collect()
    if sys.platform.startswith("linux"):
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim and malloc_trim is not None:
            malloc_trim(0)
        with suppress(OSError):  # not in every sandbox: then the peak is that of the whole run
            Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float | None:
    """Return the largest resident memory of this process since `reset_peak` (Linux).

    Interpreter and libraries are included.
    """
    return _status_mib("VmHWM")


def resident_mib() -> float | None:
    """Return the resident memory of this process now, interpreter and libraries included (Linux)."""
    return _status_mib("VmRSS")


def _status_mib(field: str) -> float | None:
    if not sys.platform.startswith("linux"):
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
