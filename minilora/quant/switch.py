"""The one switch between readable NumPy and compiled kernels."""

from __future__ import annotations

from typing import Any

from minilora.kernels import is_plain, load
from minilora.quant import reference


def implementation(kernels: str) -> Any:
    """Return `quant.reference` under `minilora.plain()`, else the module of `minilora.kernels` of this name.

    A function of `reference` has the same name in the kernels, and takes the same arguments. Kernels may have
    more functions, and optional arguments. Callers ask each time: plain mode may begin or end in between.
    """
    return reference if is_plain() else load(kernels)
