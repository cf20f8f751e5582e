"""What a gradient check found for one array, and what its message says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


class GradientError(AssertionError, ValueError):
    """A gradient differs from its finite difference; the message names array, index and both values."""


@dataclass(frozen=True)
class Check:
    """What was found for one array; errors are relative to the array's largest gradient."""

    name: str
    size: int
    checked: int  # elements compared one by one
    direction_error: float  # along one random direction through the whole array
    worst_error: float  # of a single element
    worst_index: tuple[int, ...]
    analytic: float  # both values at that index
    numeric: float
    factor: float | None  # analytic / numeric, where that is one number for all elements but not 1
    passed: bool

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        text = (
            f"{mark} {self.name}: {self.checked}/{self.size} elements, direction {self.direction_error:.1e}, "
            f"worst {self.worst_error:.1e} at {self.worst_index} ({self.analytic:.6e} vs {self.numeric:.6e})"
        )
        if self.factor is not None:
            text += f"; analytic = {self.factor:#.4g} × numeric in all {self.checked} elements"
        return text


def constant_factor(analytic: Array, numeric: Array, rtol: float) -> float | None:
    """Return f if analytic = f · numeric in all elements, at least two of which are not 0, and f is not 1."""
    if not (np.isfinite(analytic).all() and np.isfinite(numeric).all()):
        return None
    size = float(np.abs(numeric).max())
    if np.count_nonzero(np.abs(numeric) > 10 * rtol * size) < 2:
        return None
    factor = float(analytic @ numeric / (numeric @ numeric))
    error = np.abs(analytic - factor * numeric).max()
    constant = error <= rtol * max(1.0, abs(factor)) * size
    return factor if constant and abs(factor - 1) > 1e-3 else None
