"""One pool, one shard a worker, one BLAS thread: what makes results independent of the number of threads.

A matrix product can differ in its last bits between one and two BLAS threads, so every computation whose
result is promised (training, evaluation, generation, merging) runs with one, and parallelism comes from
shards of the batch instead.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

ENOUGH = 2**18
"""Numbers from which a second thread repays being woken: one takes 0.1 ms to add them."""
T = TypeVar("T")
R = TypeVar("R")


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looking for the loaded BLAS libraries takes milliseconds: once is enough


_blas_lock = threading.Lock()
_blas_users: list[
    Any
] = []  # the number of BLAS threads belongs to the process: the first sets it, the last gives it back


@contextmanager
def single_blas() -> Iterator[None]:
    """Run a block (or, as a decorator, a function) with one BLAS thread; blocks may nest and overlap in
    several threads."""
    with _blas_lock:
        _blas_users.append(_controller().limit(limits=1, user_api="blas") if not _blas_users else None)
    try:
        yield
    finally:
        with _blas_lock:
            if len(_blas_users) == 1:
                _blas_users[0].restore_original_limits()
            _blas_users.pop()


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool that maps a function over items and returns the results in the order of the items.

    >>> with Workers(2) as workers:
    ...     workers.map(abs, [-1, -2])
    [1, 2]
    """

    def __init__(self, threads: int | None = None):
        self.threads = available_threads() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads={threads}: must be at least 1")
        self._pool = ThreadPoolExecutor(self.threads - 1, "minilora") if self.threads > 1 else None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """[function(item) for item in items], in parallel where there are threads, of which the caller's is
        one."""
        if self._pool is None:
            return [function(item) for item in items]
        todo = [(item, self._pool.submit(function, item)) for item in items]
        try:
            own = {
                i: function(item) for i, (item, future) in reversed(list(enumerate(todo))) if future.cancel()
            }
            return [own[i] if i in own else future.result() for i, (_, future) in enumerate(todo)]
        finally:
            for _, future in todo:  # after an error nothing more is begun
                future.cancel()

    def map_arrays(self, function: Callable[[T], R], items: Sequence[T], sizes: Sequence[int]) -> list[R]:
        """``map`` for what is done in no time unless arrays are large: each thread takes neighbours, about as
        many numbers each.

        Below ENOUGH numbers in all it would take longer to hand them on.
        """
        ends = np.cumsum(sizes)
        if self._pool is None or not len(items) or ends[-1] < ENOUGH:
            return [function(item) for item in items]
        cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, self.threads) / self.threads), len(items)]
        parts = [items[first:end] for first, end in pairwise(cuts)]
        return list(chain.from_iterable(self.map(lambda part: [function(item) for item in part], parts)))

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@lru_cache(maxsize=1)
def keep_memory() -> bool:
    """Ask glibc to keep freed memory instead of handing it back; True if it agreed.

    A training step frees and takes the same large arrays again and again; returned pages would be faulted in
    anew each time.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
    # one arena: those of other threads are limited to 64 MiB, beyond which glibc maps (and faults in) each
    # array anew
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (M_ARENA_MAX, 1),
            (M_MMAP_THRESHOLD, 2**30),
            (M_TRIM_THRESHOLD, 2**31 - 1),
            (M_TOP_PAD, 2**26),
        )
    )
