"""Parameters, their gradient arrays, and dense weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from minilora import kernels as F  # the functions of minilora.functional, compiled for float32
from minilora.kernels import LowRank

Array = np.ndarray


class Parameter:
    """A named array that may or may not train; compared and hashed by identity."""

    __slots__ = ("name", "data", "trainable")

    def __init__(self, name: str, data: Array, trainable: bool = False):
        self.name, self.data, self.trainable = name, data, trainable

    def freeze(self) -> Parameter:
        """Return a frozen parameter over the same array, which becomes read-only."""
        self.data.flags.writeable = False
        return Parameter(self.name, self.data)

    def thaw(self) -> Parameter:
        """Return a trainable parameter over a copy of the array."""
        return Parameter(self.name, self.data.copy(), trainable=True)

    def __repr__(self) -> str:
        state = "trainable" if self.trainable else "frozen"
        return f"Parameter({self.name}, {self.data.shape}, {self.data.dtype}, {state})"


class Gradients(dict[Parameter, Array]):
    """One zeroed array for each trainable parameter.

    >>> w, frozen = Parameter("w", np.ones(2), trainable=True), Parameter("frozen", np.ones(2))
    >>> grads = Gradients([w, frozen])
    >>> grads.add(w, np.ones(2)); grads.add(w, np.ones(2)); grads.add(frozen, np.ones(2))
    >>> grads[w], grads.of(frozen)
    (array([2., 2.]), None)
    """

    def __init__(self, parameters: Iterable[Parameter]):
        super().__init__((p, np.zeros_like(p.data)) for p in parameters if p.trainable)

    def add(self, parameter: Parameter, gradient: Array) -> None:
        """Add to a parameter's gradient; do nothing for a frozen parameter."""
        if parameter.trainable:
            self[parameter] += gradient

    def of(self, parameter: Parameter) -> Array | None:
        """Return a parameter's gradient array, or None for a frozen parameter."""
        return self[parameter] if parameter.trainable else None


# --- weights -----------------------------------------------------------------------------------------------


class Weight(Protocol):
    """What `Linear` needs from a weight W (out, in), dense or quantized."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of W when it is dense."""

    @property
    def trainable(self) -> bool:
        """Whether W trains, so that `Linear` must keep its input."""

    @property
    def offset_group(self) -> int:
        """Number of inputs that share one float offset, into which QA-LoRA merges; 0 if there are none."""

    def matmul(self, x: Array, low_rank: LowRank | Array | None = None) -> Array:
        """Return x Wᵀ + low_rank: (…, in) → (…, out)."""

    def matmul_t(
        self, dy: Array, low_rank: LowRank | Array | None = None, onto: Array | None = None
    ) -> Array:
        """Return dy W + low_rank: (…, out) → (…, in), added to `onto` if that is given."""

    def rows(self, ids: Array) -> Array:
        """Return rows of W in floating point, for embeddings."""

    def dense(self) -> Array:
        """Return W as one (out, in) array."""

    def arrays(self) -> dict[str, list[Array]]:
        """Return the stored arrays by kind: weights, codes, scales, offsets or code_maps."""


class DenseWeight:
    """A weight stored as it is: one floating-point array."""

    offset_group = 0

    def __init__(self, param: Parameter):
        self.param = param

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.param.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's own dtype."""
        return self.param.data.dtype

    @property
    def trainable(self) -> bool:
        """Whether the array trains."""
        return self.param.trainable

    def matmul(self, x: Array, low_rank: LowRank | Array | None = None) -> Array:
        """Return x Wᵀ + low_rank."""
        return F.linear_forward(x, self.param.data, low_rank)

    def matmul_t(
        self, dy: Array, low_rank: LowRank | Array | None = None, onto: Array | None = None
    ) -> Array:
        """Return dy W + low_rank."""
        return F.linear_dx(dy, self.param.data, low_rank, onto)

    def rows(self, ids: Array) -> Array:
        """Return W[ids]."""
        return self.param.data[ids]

    def dense(self) -> Array:
        """Return the array itself, not a copy."""
        return self.param.data

    def arrays(self) -> dict[str, list[Array]]:
        """Return one kind: weights."""
        return {"weights": [self.param.data]}
