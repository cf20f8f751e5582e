"""A pool with one shard per worker and one BLAS thread: any number of threads gives the same bytes.

A matrix product can differ in its last bits between one and two BLAS threads. So training, evaluation,
generation and merging run with one, and shards of the batch run in parallel instead.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

FEWEST_TO_SHARE = 2**18
"""Elements below which waking a second thread costs more than it saves: one adds them in 0.1 ms."""
T = TypeVar("T")
R = TypeVar("R")


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # finding the loaded BLAS libraries takes milliseconds


# the number of BLAS threads belongs to the process: the first user sets it, the last one restores it
_blas_lock = threading.Lock()
_blas_users: list[Any] = []


@contextmanager
def single_blas() -> Iterator[None]:
    """Run a block, or as a decorator a function, with one BLAS thread.

    Blocks may nest, and overlap in several threads.
    """
    with _blas_lock:
        _blas_users.append(None if _blas_users else _controller().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _blas_lock:
            if len(_blas_users) == 1:
                _blas_users[0].restore_original_limits()
            _blas_users.pop()


def available_threads() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of threads that maps a function over items and returns the results in their order.

    Parameters
    ----------
    threads : int, optional
        The caller's thread is one of them; by default one for each core.

    Examples
    --------
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
        """Return [function(item) for item in items], computed in parallel.

        After an error no further item is begun.
        """
        if self._pool is None:
            return [function(item) for item in items]
        todo = [(item, self._pool.submit(function, item)) for item in items]
        try:
            own: dict[int, R] = {}
            for i, (item, future) in reversed(list(enumerate(todo))):
                if future.cancel():  # no other thread has begun it
                    own[i] = function(item)
            return [own[i] if i in own else future.result() for i, (_, future) in enumerate(todo)]
        finally:
            for _, future in todo:
                future.cancel()

    def map_arrays(self, function: Callable[[T], R], items: Sequence[T], sizes: Sequence[int]) -> list[R]:
        """`map` for cheap work: each thread gets a run of neighbours with about the same number of elements.

        `sizes` are the elements of each item. Below `FEWEST_TO_SHARE` in all, the caller does everything.
        """
        ends = np.cumsum(sizes)
        if self._pool is None or not len(items) or ends[-1] < FEWEST_TO_SHARE:
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
