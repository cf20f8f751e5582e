"""Where the runs of a sweep happen: in this process, in our own processes, or in a caller's executor."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

# OpenBLAS, MKL, Accelerate, OpenMP and Numba read these when they load: set before a worker starts.
SINGLE_THREAD = {
    name: "1"
    for name in (
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "OMP_NUM_THREADS",
        "NUMBA_NUM_THREADS",
    )
}

RunFunction = Callable[[Any, "str | None"], Mapping[str, Any]]
Outcome = tuple[Any, "Mapping[str, Any] | BaseException"]


def run_folder(out: Path, config: Any) -> str:
    """Return the folder in which a run may keep files."""
    return str(out / "runs" / config.key())


def in_process(run: RunFunction, todo: Sequence[Any], out: Path) -> Generator[Outcome, None, None]:
    """Do the runs one after the other in this process, and yield (config, row or exception)."""
    for config in todo:
        outcome: Mapping[str, Any] | BaseException
        try:
            outcome = run(config, run_folder(out, config))
        except Exception as error:
            outcome = error
        yield config, outcome


def in_executor(
    run: RunFunction, todo: Sequence[Any], out: Path, executor: Executor | None, n_jobs: int
) -> Generator[Outcome, None, None]:
    """Do the runs in an executor and yield (config, row or exception).

    Without an executor, `n_jobs` processes of our own do them. Only as many runs are in flight as there are
    workers, so that a dying worker costs few of them.
    """
    pool = executor or _new_pool(n_jobs)
    in_flight = n_jobs if executor is None else max(n_jobs, getattr(executor, "_max_workers", n_jobs))
    waiting, running = deque(todo), dict[Future[Any], Any]()
    try:
        while waiting or running:
            while waiting and len(running) < in_flight:
                config = waiting.popleft()
                running[_submit(pool, run, config, out)] = config
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            outcomes = [(running.pop(future), _outcome(future)) for future in finished]
            if any(isinstance(outcome, BrokenExecutor) for _, outcome in outcomes):
                # A broken pool ends all its futures at once.
                wait(running)
                outcomes += [(config, _outcome(future)) for future, config in running.items()]
                running.clear()
            died = [pair for pair in outcomes if isinstance(pair[1], BrokenExecutor)]
            yield from (pair for pair in outcomes if not isinstance(pair[1], BrokenExecutor))
            if died and executor is not None:
                yield from died
                raise RuntimeError(
                    f"the executor passed in is broken and {len(waiting)} runs are left; "
                    "finished rows are kept: pass a new executor to continue"
                )
            if died:
                _stop(pool, at_once=True)
                # Any of these runs may have killed its process: run each in a process of its own.
                for config, _ in died:
                    yield config, _alone(run, config, out)
                pool = _new_pool(n_jobs)
    finally:
        for future in running:
            future.cancel()
        if executor is None:
            _stop(pool, at_once=bool(running))


def _new_pool(n_jobs: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with _environment(SINGLE_THREAD):
            pool.submit(os.getpid).result()
    except BrokenExecutor:
        raise RuntimeError(
            "worker processes do not start; in a script, call the sweep under "
            "`if __name__ == '__main__':`, or use n_jobs=1"
        ) from None
    return pool


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's default lock is a semaphore of the system, which a stopped process would leave behind
    tqdm.set_lock(threading.RLock())


def _submit(pool: Executor, run: RunFunction, config: Any, out: Path) -> Future[Any]:
    try:
        with _environment(SINGLE_THREAD):  # the pool starts a process when it needs one: on any submit
            return pool.submit(run, config, run_folder(out, config))
    except BrokenExecutor as error:  # it broke before this submit rather than after it
        future: Future[Any] = Future()
        future.set_exception(error)
        return future


def _outcome(future: Future[Any]) -> Mapping[str, Any] | BaseException:
    try:
        return future.result()
    except Exception as error:
        return error


def _alone(run: RunFunction, config: Any, out: Path) -> Mapping[str, Any] | BaseException:
    pool = _new_pool(1)
    try:
        return _outcome(_submit(pool, run, config, out))
    finally:
        _stop(pool, at_once=True)


def _stop(pool: Executor, at_once: bool) -> None:
    """Stop our own pool; with `at_once`, do not wait for the runs in it, which may take minutes."""
    if at_once:
        # Python 3.14 has terminate_workers() for this
        processes = dict(getattr(pool, "_processes", None) or {})
        for process in processes.values():
            process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
