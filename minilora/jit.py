"""The one policy by which Numba compiles our kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile on first use, without the interpreter lock, kept on disk."""
    compiled: Any = numba.njit(
        function,
        nogil=True,  # shards run in Python threads
        cache=True,  # compiled once a machine, not once a process
        error_model="numpy",  # no check for division by zero inside loops
        # reassoc: sums may be split over vector lanes. nsz: and may start at +0. Left out on purpose: nnan and ninf (NaN must
        # survive), arcp (x·(1/absmax) is part of the format) and contract (a fused multiply-add rounds unlike NumPy).
        fastmath={"reassoc", "nsz"},
    )
    return cast(F, compiled)
