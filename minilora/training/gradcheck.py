"""Gradient checking in float64: is the hand-written backward the derivative of the forward?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


class GradientError(AssertionError, ValueError):
    """A gradient that differs from its finite difference; the message names the array, the index and both
    values."""


@dataclass(frozen=True)
class Check:
    """What was found for one array."""

    name: str
    size: int
    checked: int  # elements compared one by one
    direction_error: float  # relative error along one random direction through the whole array
    worst_error: float  # largest relative error of a single element
    worst_index: tuple[int, ...]
    analytic: float  # both values at that index
    numeric: float
    passed: bool

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        return (
            f"{mark} {self.name}: {self.checked}/{self.size} elements, direction {self.direction_error:.1e}, "
            f"worst {self.worst_error:.1e} at {self.worst_index} ({self.analytic:.6e} vs {self.numeric:.6e})"
        )


def gradcheck(
    loss: Callable[[], float],
    arrays: Mapping[str, Array],
    gradients: Mapping[str, Array],
    *,
    rtol: float = 1e-6,
    step: float = 1e-5,
    seed: int = 0,
    raises: bool = True,
) -> list[Check]:
    """Compare gradients with central differences, (loss(w + h) − loss(w − h)) / 2h, for each array.

    ``loss()`` reads the arrays, which are changed in place and restored. First a random direction over the
    whole array, then every element of arrays of up to 256 elements, and 64 of larger ones, the largest
    gradients among them. Errors are relative to the largest gradient of the array: a central difference in
    float64 has an error of about step² + eps/step, whatever the element's own size. Returns a :class:`Check`
    an array; raises GradientError for the worst that fails.

    >>> w = np.array([1.0, 2.0])
    >>> print(gradcheck(lambda: float((w**2).sum()), {"w": w}, {"w": 2 * w})[0].passed)
    True
    """
    checks = [
        _check_one(
            name, loss, array, np.asarray(gradients[name]), rtol, step, np.random.default_rng([seed, i])
        )
        for i, (name, array) in enumerate(arrays.items())
    ]
    failed = [check for check in checks if not check.passed]
    if failed and raises:
        raise GradientError("\n".join(str(check) for check in failed))
    return checks


def _check_one(
    name: str,
    loss: Callable[[], float],
    array: Array,
    gradient: Array,
    rtol: float,
    step: float,
    rng: np.random.Generator,
) -> Check:
    if array.dtype != np.float64:
        raise ValueError(
            f"{name}: gradcheck needs float64, not {array.dtype}; differences drown in float32's rounding"
        )
    if gradient.shape != array.shape:
        raise GradientError(
            f"{name}: gradient {gradient.shape} does not have the array's shape {array.shape}"
        )
    original = array.copy()

    def difference(direction: Array) -> float:
        array[...] = original + step * direction
        high = loss()
        array[...] = original - step * direction
        low = loss()
        array[...] = original
        return (high - low) / (2 * step)

    direction = rng.standard_normal(array.shape)
    direction /= np.linalg.norm(direction) or 1.0
    numeric = difference(direction)
    analytic = float(np.vdot(gradient, direction))
    # a nearly orthogonal direction has a tiny derivative: its rounding is that of the gradient's length over
    # √size
    typical = float(np.linalg.norm(gradient)) / max(1.0, array.size) ** 0.5
    direction_error = abs(numeric - analytic) / max(abs(numeric), abs(analytic), typical, 1e-12)

    flat = gradient.reshape(-1)
    chosen = np.arange(array.size)
    if array.size > 256:
        largest = np.argsort(-np.nan_to_num(np.abs(flat), nan=np.inf))[:32]
        others = rng.choice(np.setdiff1d(chosen, largest), 32, replace=False)
        chosen = np.concatenate([largest, others])
    scale = max(float(np.abs(flat[np.isfinite(flat)]).max(initial=0.0)), 1e-12)
    worst = (-1.0, 0, 0.0, 0.0)
    for index in chosen:
        one = np.zeros(array.shape)
        one.reshape(-1)[index] = 1.0
        found = difference(one)
        error = float(abs(found - flat[index]) / max(scale, abs(found)))
        error = np.inf if np.isnan(error) else error  # NaN compares with nothing, and would be forgotten
        if error > worst[0]:
            worst = (error, int(index), float(flat[index]), found)
    position = tuple(int(i) for i in np.unravel_index(worst[1], array.shape))
    passed = bool(direction_error <= rtol and worst[0] <= rtol)
    return Check(
        name, array.size, len(chosen), direction_error, worst[0], position, worst[2], worst[3], passed
    )
