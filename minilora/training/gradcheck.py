"""Check in float64 that a hand-written backward is the derivative of its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from minilora.training.gradient_report import Array, Check, GradientError, constant_factor


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

    First comes a random direction through the whole array, then single elements: all of an array of up to
    256, and 64 of a larger one, the 32 largest gradients among them. A central difference errs by about
    step² + eps/step, whatever the element's own size, so errors are relative to the largest gradient.

    Parameters
    ----------
    loss : callable
        Reads the arrays, which are changed in place and restored.
    arrays, gradients : mapping of str to Array
        float64 arrays, and the gradient of the loss by each.
    rtol, step : float
        Largest relative error that passes; h.
    raises : bool
        Raise GradientError for what fails, instead of returning it.

    Examples
    --------
    >>> w = np.array([1.0, 2.0])
    >>> print(gradcheck(lambda: float((w**2).sum()), {"w": w}, {"w": 2 * w})[0].passed)
    True
    """
    checks = []
    for i, (name, array) in enumerate(arrays.items()):
        rng = np.random.default_rng([seed, i])
        checks.append(_check_one(name, loss, array, np.asarray(gradients[name]), rtol, step, rng))
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
        raise ValueError(f"{name}: gradcheck needs float64, not {array.dtype}, whose rounding hides errors")
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

    def difference_at(index: int) -> float:
        one = np.zeros(array.shape)
        one.reshape(-1)[index] = 1.0
        return difference(one)

    direction = rng.standard_normal(array.shape)
    direction /= np.linalg.norm(direction) or 1.0
    along, expected = difference(direction), float(np.vdot(gradient, direction))
    # a nearly orthogonal direction has a tiny derivative, but the rounding of a typical one, ‖gradient‖/√size
    typical = float(np.linalg.norm(gradient)) / max(1.0, array.size) ** 0.5
    direction_error = abs(along - expected) / max(abs(along), abs(expected), typical, 1e-12)

    flat, chosen = gradient.reshape(-1), np.arange(array.size)
    if array.size > 256:
        largest = np.argsort(-np.nan_to_num(np.abs(flat), nan=np.inf))[:32]
        others = rng.choice(np.setdiff1d(chosen, largest), 32, replace=False)
        chosen = np.concatenate([largest, others])
    analytic, numeric = flat[chosen], np.array([difference_at(int(index)) for index in chosen])
    scale = max(float(np.abs(flat[np.isfinite(flat)]).max(initial=0.0)), 1e-12)
    with np.errstate(invalid="ignore"):
        errors = np.abs(numeric - analytic) / np.maximum(scale, np.abs(numeric))
    errors[np.isnan(errors)] = np.inf
    worst = int(errors.argmax())
    passed = bool(direction_error <= rtol and errors[worst] <= rtol)
    return Check(
        name,
        array.size,
        len(chosen),
        direction_error,
        float(errors[worst]),
        tuple(int(i) for i in np.unravel_index(chosen[worst], array.shape)),
        float(analytic[worst]),
        float(numeric[worst]),
        None if passed else constant_factor(analytic, numeric, rtol),
        passed,
    )
