"""The one policy by which Numba compiles our kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core import codegen
from numba.core.registry import cpu_target

F = TypeVar("F", bound=Callable[..., Any])

settings: Any = numba.config
if settings.CPU_FEATURES is None and "+avx512f" in codegen.get_host_cpu_features():
    # LLVM would fill only half of each vector, for the first processors that had such long ones: a step takes
    # 1 to 2 % longer
    settings.CPU_FEATURES = codegen.get_host_cpu_features() + ",-prefer-256-bit"
TRIPLE, _, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
FEATURES = frozenset(_FEATURES.split(","))
"""What is compiled for: LLVM's name of the machine, and its names of what the processor has, such as
"+avx2"."""


def kernel(function: F) -> F:
    """Compile on first use, without the interpreter lock, kept on disk."""
    compiled: Any = numba.njit(
        function,
        nogil=True,  # shards run in Python threads
        cache=True,  # compiled once a machine, not once a process
        error_model="numpy",  # no check for division by zero inside loops
        # reassoc: sums may be split over vector lanes. nsz: and may start at +0. Left out on purpose: nnan
        # and ninf (NaN must survive), arcp (x·(1/absmax) is part of the format) and contract (a fused
        # multiply-add rounds unlike NumPy).
        fastmath={"reassoc", "nsz"},
    )
    return cast(F, compiled)
