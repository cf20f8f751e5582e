"""Variants of LoRA, built on `LoraLinear`: DoRA, PiSSA and LoftQ.

DoRA trains the length of each row of W + ΔW separately. PiSSA starts A and B from the SVD of W, and LoftQ
from the SVD of W's rounding error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minilora import kernels as F
from minilora.adapter import Adapter
from minilora.config import ConfigError, LoraConfig, QuantConfig, require
from minilora.layers import Key, Linear
from minilora.lora import LoraCache, LoraLinear
from minilora.parameters import Array, DenseWeight, Gradients, Parameter, Weight
from minilora.quant.weights import quantize_weight

# --- DoRA --------------------------------------------------------------------------------------------------


class DoraCache(NamedTuple):
    """Cache of DoRA: LoRA's cache, z = base(x) + s·x Aᵀ Bᵀ (…, out), and the row lengths n (out,)."""

    lora: LoraCache
    z: Array
    n: Array


class DoraLinear(Adapter):
    """A LoraLinear whose rows keep their direction and train their length m (DoRA, arXiv 2402.09353, eq. 5).

        y = (m / n) ∘ (base(x) + s·x Aᵀ Bᵀ),   n = ‖W + s·B A‖ of each row

    Backward treats n as a constant (section 4.3).
    """

    def __init__(self, lora: LoraLinear):
        super().__init__(lora.base)
        self.lora = lora
        w = self.base.weight.dense().astype(np.float64)
        self.row_squares = (w**2).sum(axis=1).astype(self.base.weight.dtype)  # (out,)
        name = f"{self.name}.lora_magnitude_vector"
        self.magnitude = Parameter(name, self.row_norms(), trainable=True)  # m (out,)

    def trained(self) -> list[Parameter]:
        """Return A, B and m."""
        return [*self.lora.trained(), self.magnitude]

    def forward(self, x: Array, key: Key = None) -> tuple[Array, DoraCache]:
        """Map x (…, in) to y (…, out)."""
        z, cache = self.lora.forward(x, key)
        n = self.row_norms()
        return z * (self.magnitude.data / n), DoraCache(cache, z, n)

    def backward(
        self, dy: Array, cache: DoraCache, grads: Gradients, need_dx: bool = True, onto: Array | None = None
    ) -> Any:
        """Return dx (…, in) for dy (…, out), and add dA, dB and dm to `grads`."""
        # y = (m / n) ∘ z with n constant
        grads.add(self.magnitude, F.flat(dy * cache.z).sum(axis=0) / cache.n)
        dz = dy * (self.magnitude.data / cache.n)
        return self.lora.backward(dz, cache.lora, grads, need_dx, onto)

    def row_norms(self) -> Array:
        """Return n (out,) without a dense matrix: n² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (A Aᵀ) bᵀ for each row."""
        a, b = self.lora.lora_A.data, self.lora.lora_B.data
        s = b.dtype.type(self.lora.scaling)
        cross = self.base.weight.matmul(a).T  # W Aᵀ: (out, r)
        squares = self.row_squares + (b * (2 * s * cross + s * s * (b @ (a @ a.T)))).sum(axis=1)
        # avoid 0/0 in a row of zeros
        return np.sqrt(np.maximum(squares, np.finfo(b.dtype).tiny))

    def delta(self) -> Array:
        """Return ΔW = (m / n) ∘ (W + s·B A) − W (out, in) in float64."""
        w = self.base.weight.dense().astype(np.float64)
        return self.stretched(w + self.lora.delta()) - w

    def stretched(self, whole: Array) -> Array:
        """Return (m / n) ∘ V for V = W + ΔW (out, in)."""
        n = np.maximum(np.linalg.norm(whole, axis=1), np.finfo(self.magnitude.data.dtype).tiny ** 0.5)
        return (self.magnitude.data / n)[:, None] * whole


# --- starts from singular values ---------------------------------------------------------------------------


class SvdLinear(LoraLinear):
    """A LoraLinear with PiSSA's or LoftQ's first A, B and base."""

    def __init__(
        self, base: Linear, config: LoraConfig, rng: np.random.Generator, quant: QuantConfig | None = None
    ):
        config = config.of(base.name)
        new_base, a, b = _from_svd(base, config, quant)
        super().__init__(new_base, config, rng)
        self.lora_A.data, self.lora_B.data = a, b
        self.start = (a.copy(), b.copy())
        """The first A and B, (A₀, B₀). Relative to W, the update is s·(B A − B₀ A₀)."""


def adapt(
    base: Linear,
    config: LoraConfig,
    rng: np.random.Generator,
    pool: int = 1,
    quant: QuantConfig | None = None,
) -> LoraLinear | DoraLinear:
    """Return the adapter that a `LoraConfig` describes. `quant` quantizes the base of PiSSA and LoftQ."""
    if config.init_lora_weights in ("pissa", "loftq"):
        lora: LoraLinear = SvdLinear(base, config, rng, quant)
    else:
        lora = LoraLinear(base, config, rng, pool)
    return DoraLinear(lora) if config.use_dora else lora


def lora_of(linear: Any) -> LoraLinear | None:
    """Return the LoraLinear itself, or the one inside a DoraLinear; None for anything else."""
    if isinstance(linear, DoraLinear):
        return linear.lora
    return linear if isinstance(linear, LoraLinear) else None


def warn_if_it_cannot_train(adapter: Any) -> None:
    """Warn if A and B can never change: dA is a product with B, and dB with A. Other adapters pass."""
    lora = lora_of(adapter)
    if lora is None or not isinstance(lora.lora_A.data, np.ndarray):  # shapes without data (minilora.memory)
        return
    a, b = lora.lora_A, lora.lora_B
    moves = (a.trainable and b.data.any()) or (b.trainable and a.data.any())
    if moves or not (a.trainable or b.trainable):
        return
    if not a.data.any() and not b.data.any():
        why = "A = 0 and B = 0, so both gradients are 0"
    elif a.trainable:
        why = "B = 0 is frozen, so the gradient of A is 0"
    else:
        why = "A = 0 is frozen, so the gradient of B is 0"
    warnings.warn(
        f"{lora.name}: {why} and this adapter never trains; start one of them at random", stacklevel=2
    )


def merged_over(linear: LoraLinear | DoraLinear, w: Array) -> Array:
    """Return W + ΔW in float64, for the W (out, in) before it was quantized or split by PiSSA."""
    lora = linear.lora if isinstance(linear, DoraLinear) else linear
    whole = w.astype(np.float64) + lora.delta()
    if isinstance(lora, SvdLinear):
        a, b = (x.astype(np.float64) for x in lora.start)
        whole -= lora.scaling * (b @ a)
    return linear.stretched(whole) if isinstance(linear, DoraLinear) else whole


def svd_factors(matrix: Array, r: int, scaling: float) -> tuple[Array, Array]:
    """Return A (r, in) and B (out, r) in float64; s·B A is the best rank-r approximation of M.

    M = U S Vᵀ, A = √(S/s) Vᵀ, B = U √(S/s). Signs are arbitrary in a decomposition; here the largest element
    of each row of A is positive.

    >>> A, B = svd_factors(np.diag([8.0, 1.0]), 1, scaling=2.0)
    >>> (A.tolist(), B.tolist())
    ([[2.0, 0.0]], [[2.0], [0.0]])
    """
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    root = np.sqrt(s[:r] / scaling)
    sign = np.sign(vt[np.arange(r), np.abs(vt[:r]).argmax(axis=1)])
    sign[sign == 0] = 1
    return (root * sign)[:, None] * vt[:r] + 0.0, u[:, :r] * (root * sign) + 0.0


def pissa(w: Array, r: int, scaling: float) -> tuple[Array, Array, Array]:
    """Return (residual W − s·B A, A, B): the r principal directions of W train (arXiv 2404.02948, section 3).

    W = residual + s·B A, so the model's output does not change.
    """
    a, b = (x.astype(w.dtype) for x in svd_factors(w, r, scaling))
    residual = w - scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return residual.astype(w.dtype), a, b


def loftq(
    w: Array, r: int, scaling: float, quantize: Callable[[Array], Any], steps: int = 1
) -> tuple[Any, Array, Array]:
    """Return (quantized weight, A, B) with Q + s·B A ≈ W: A and B start as a fit of the rounding error.

    for t in 1 … steps:  Q = quantize(W − s·B A);  s·B A = svd_r(W − Q)    LoftQ (arXiv 2310.08659, Alg. 1)

    A and B are divided by √s each. PEFT does not do so, and its start is right only for s = 1, as with α = r.
    """
    low: Array = np.zeros_like(w)
    for _ in range(steps):
        weight = quantize((w - low).astype(np.float32))
        a, b = (x.astype(w.dtype) for x in svd_factors(w - weight.dense(), r, scaling))
        low = scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return weight, a, b


def _from_svd(base: Linear, config: LoraConfig, quant: QuantConfig | None) -> tuple[Linear, Array, Array]:
    """Return PiSSA's or LoftQ's new base, A and B."""
    if not isinstance(base.weight, DenseWeight):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r}: {base.name} is quantized already, and "
            "this start needs the weight in full precision; inject into the dense model and pass "
            "quant=QuantConfig(…)"
        )
    w, name = base.weight.dense(), base.name
    if config.init_lora_weights == "loftq":
        if quant is None:
            raise ConfigError(
                f"init_lora_weights='loftq': answers the error of a quantizer, and {name} gets none; pass "
                "quant=QuantConfig('nf4'), and leave lm_head, which stays dense, out of target_modules"
            )
        stored, a, b = loftq(
            w, config.r, config.scaling, lambda x: quantize_weight(x, quant), config.loftq_iter
        )
        return Linear(name, stored), a, b
    require(
        2 * config.r <= min(w.shape),
        "r",
        config.r,
        f"PiSSA on {name} {w.shape} takes at most {min(w.shape) // 2}: what it learns is saved as an "
        "ordinary adapter of rank 2r",
    )
    residual, a, b = pissa(w, config.r, config.scaling)
    weight: Weight
    if quant is None:
        weight = DenseWeight(Parameter(f"{name}.weight", residual).freeze())
    else:
        weight = quantize_weight(residual, quant)
    return Linear(name, weight), a, b
