"""The one policy by which Numba compiles our kernels, and what the processor offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core import codegen, types
from numba.core.registry import cpu_target

F = TypeVar("F", bound=Callable[..., Any])

settings: Any = numba.config
if settings.CPU_FEATURES is None and "+avx512f" in codegen.get_host_cpu_features():
    # By default LLVM fills only half of each AVX-512 vector, which suits the first such processors.
    settings.CPU_FEATURES = codegen.get_host_cpu_features() + ",-prefer-256-bit"
TRIPLE, _, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
FEATURES = frozenset(_FEATURES.split(","))
"""The instruction sets that we compile for, in LLVM's names, such as "+avx2"."""

AVX512 = {"+avx512f", "+fma"} <= FEATURES
AVX2 = {"+avx2", "+fma"} <= FEATURES
F16C = "+f16c" in FEATURES  # conversion of float16
NEON = TRIPLE.startswith(("aarch64", "arm64"))


def kernel(function: F, inline: bool = False) -> F:
    """Compile on first use, without the interpreter lock, and keep the result on disk."""
    compiled: Any = numba.njit(
        function,
        forceinline=inline,
        nogil=True,  # shards run in Python threads
        cache=True,  # compile once per machine, not once per process
        error_model="numpy",  # no check for division by zero inside loops
        # reassoc: a sum may be split over vector lanes. nsz: and may start at +0. Left out on purpose: nnan
        # and ninf (NaN must survive), arcp (x·(1/absmax) is part of the format) and contract (a fused
        # multiply-add rounds unlike NumPy).
        fastmath={"reassoc", "nsz"},
    )
    if not settings.DISABLE_JIT:
        # A kernel that passes a literal, as in f(x, 0), would compile f once more for the type "literal 0".
        # Here f sees an int64, as from Python.
        specialized = compiled.get_call_template
        compiled.get_call_template = lambda args, kws: specialized(tuple(map(types.unliteral, args)), kws)
    return cast(F, compiled)


def inlined_kernel(function: F) -> F:
    """Compile as `kernel` does, and always inline: for a helper with a sum whose order is left to LLVM.

    A process that compiles the caller calls the helper's own copy. A process that loads the caller from disk
    calls the copy that is stored with it. The two may order the sum differently, and differ in the last bits.
    """
    return kernel(function, inline=True)
