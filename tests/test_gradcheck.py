"""The gradient checker must catch what goes wrong in hand-written backward passes; one that always passes
proves nothing."""

import numpy as np
import pytest

from minilora import functional as F
from minilora.training.gradcheck import Check, GradientError, gradcheck


@pytest.fixture(params=[(5, 7), (40, 30)], ids=["every element", "64 of 1200 elements"])
def quadratic(request, rng):
    """loss = Σ c·w² + w·(M w), with its true gradient; w is square where it must be transposed."""
    shape = request.param
    w, c = rng.standard_normal(shape), rng.standard_normal(shape)
    return w, lambda: float((c * w**3 + w).sum()), 3 * c * w**2 + 1


def test_true_gradient_passes_with_full_coverage_reported(quadratic):
    w, loss, gradient = quadratic
    before = w.copy()
    (check,) = gradcheck(loss, {"w": w}, {"w": gradient})
    assert isinstance(check, Check) and check.passed and check.name == "w" and check.size == w.size
    assert check.checked == (w.size if w.size <= 256 else 64)
    assert check.worst_error < 1e-7 and check.direction_error < 1e-7
    assert "ok" in str(check) and f"{check.checked}/{w.size}" in str(check)
    assert w.tobytes() == before.tobytes()  # restored to the last bit


def wrong_element(g):
    g.reshape(-1)[np.abs(g).argmax()] *= 1 + 1e-4
    return g


def swapped(g):
    g[[0, 1]] = g[[1, 0]]
    return g


WRONG = {
    "one element": wrong_element,
    "factor": lambda g: g * (1 + 1e-5),
    "sign": lambda g: -g,
    "two rows swapped": swapped,
    "zero": np.zeros_like,
    "summed twice": lambda g: 2 * g,
    "order of axes": lambda g: g.T.reshape(g.shape),
    "NaN": lambda g: np.where(np.arange(g.size).reshape(g.shape) == 3, np.nan, g),
    "infinity": lambda g: np.where(np.arange(g.size).reshape(g.shape) == 3, np.inf, g),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("break_it", WRONG.values(), ids=WRONG.keys())
def test_wrong_gradient_is_caught(quadratic, break_it):
    w, loss, gradient = quadratic
    with pytest.raises(GradientError, match="FAIL w"):
        gradcheck(loss, {"w": w}, {"w": break_it(gradient.copy())})


def test_transposed_gradient_is_caught():
    w = np.random.default_rng(0).standard_normal((6, 6))
    c = np.random.default_rng(1).standard_normal((6, 6))
    gradcheck(lambda: float((c * w).sum()), {"w": w}, {"w": c})
    with pytest.raises(GradientError):
        gradcheck(lambda: float((c * w).sum()), {"w": w}, {"w": c.T})


def test_one_wrong_element_is_located(rng):
    w = rng.standard_normal((6, 5))
    gradient = 2 * w
    gradient[4, 2] += 0.5
    (check,) = gradcheck(lambda: float((w**2).sum()), {"w": w}, {"w": gradient}, raises=False)
    assert not check.passed and check.worst_index == (4, 2)
    assert check.analytic == gradient[4, 2] and abs(check.numeric - 2 * w[4, 2]) < 1e-8


def test_a_few_wrong_elements_that_no_sample_finds_are_caught_by_the_random_direction(rng):
    w, c = rng.standard_normal(4000), rng.uniform(0.5, 1, 4000)
    gradient = c.copy()
    gradient[c < 0.5005] *= 1.02
    (check,) = gradcheck(lambda: float((c * w).sum()), {"w": w}, {"w": gradient}, raises=False)
    assert (
        1 <= (gradient != c).sum() < 10
        and check.worst_error < 1e-6 < check.direction_error
        and not check.passed
    )


def test_loss_that_is_nan_at_a_single_element_fails(rng):
    w = np.ones(5)

    def loss() -> float:
        return float("nan") if w[1] != 1 and np.count_nonzero(w != 1) == 1 else float((w**2).sum())

    (check,) = gradcheck(loss, {"w": w}, {"w": 2 * w}, raises=False)
    assert not check.passed and check.worst_index == (1,)


@pytest.mark.parametrize("shape", [(5, 7), (40, 30)])
def test_nan_in_a_gradient_is_located(rng, shape):
    w = rng.standard_normal(shape)
    gradient = 2 * w
    gradient[3, 1] = np.nan
    (check,) = gradcheck(lambda: float((w**2).sum()), {"w": w}, {"w": gradient}, raises=False)
    assert not check.passed and check.worst_index == (3, 1)


def test_only_the_wrong_array_fails_and_all_are_reported(rng):
    a, b = rng.standard_normal(3), rng.standard_normal(4)
    checks = gradcheck(
        lambda: float((a**2).sum() + (b**3).sum()),
        {"a": a, "b": b},
        {"a": 2 * a, "b": 2 * b**2},
        raises=False,
    )
    assert [c.passed for c in checks] == [True, False]
    with pytest.raises(GradientError) as caught:
        gradcheck(lambda: float((a**2).sum() + (b**3).sum()), {"a": a, "b": b}, {"a": 2 * a, "b": 2 * b**2})
    assert "FAIL b" in str(caught.value) and "a:" not in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, AssertionError)


def test_float32_and_wrong_shapes_are_refused():
    w = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="w: gradcheck needs float64, not float32"):
        gradcheck(lambda: 0.0, {"w": w}, {"w": w})
    with pytest.raises(GradientError, match=r"gradient \(1, 3\) does not have the array's shape \(3,\)"):
        gradcheck(lambda: 0.0, {"w": np.ones(3)}, {"w": np.ones((1, 3))})


def test_a_loss_that_does_not_depend_on_the_array_has_gradient_zero():
    w = np.ones((2, 3))
    (check,) = gradcheck(lambda: 1.0, {"w": w}, {"w": np.zeros((2, 3))})
    assert check.passed and check.worst_error == 0


def test_same_seed_checks_the_same_elements(rng):
    w = rng.standard_normal(1000)
    results = [gradcheck(lambda: float((w**2).sum()), {"w": w}, {"w": 2 * w}, seed=3) for _ in range(2)]
    assert results[0] == results[1]


def test_catches_a_backward_that_forgets_the_mean(rng):
    """A mistake as it happens: RMSNorm without the term that flows through the mean square."""
    x, weight, dy = rng.standard_normal((2, 6)), rng.standard_normal(6), rng.standard_normal((2, 6))

    def loss() -> float:
        return float((F.rms_norm_forward(x, weight, 1e-5)[0] * dy).sum())

    rstd = F.rms_norm_forward(x, weight, 1e-5)[1][1]
    gradcheck(loss, {"x": x}, {"x": F.rms_norm_backward(dy, weight, (x, rstd))[0]})
    with pytest.raises(GradientError):
        gradcheck(loss, {"x": x}, {"x": dy * weight * rstd})


@pytest.mark.parametrize(
    "factor, said",
    [(2.0, "2.000"), (-1.0, "-1.000"), (0.0, "0.000"), (1 / 64, "0.01562")],
    ids=["twice", "sign", "zero", "divided by 64"],
)
def test_a_constant_factor_is_named(quadratic, factor, said):
    w, loss, gradient = quadratic
    (check,) = gradcheck(loss, {"w": w}, {"w": factor * gradient}, raises=False)
    assert not check.passed and abs(check.factor - factor) < 1e-6
    assert str(check).endswith(f"; analytic = {said} × numeric in all {check.checked} elements")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    "name", ["one element", "two rows swapped", "order of axes", "NaN", "infinity", "factor"]
)
def test_no_factor_is_named_where_there_is_none(quadratic, name):
    w, loss, gradient = quadratic
    (check,) = gradcheck(loss, {"w": w}, {"w": WRONG[name](gradient.copy())}, raises=False)
    assert not check.passed and check.factor is None and "numeric in all" not in str(check)


def test_one_element_alone_has_no_constant_factor():
    w = np.array([3.0])
    (check,) = gradcheck(lambda: float((w**2).sum()), {"w": w}, {"w": 4 * w}, raises=False)
    assert not check.passed and check.factor is None
