"""What an adapter is: four methods around a frozen Linear. `docs/own_adapters.py` has two examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from minilora.layers import Cache, Key, Linear
from minilora.parameters import Array, Gradients, Parameter


class Adapter(ABC):
    """A frozen Linear with something trainable beside it: base class of LoRA and of adapters of your own.

    A subclass defines four methods. `forward(x, key)` returns y (…, out) and its cache. `backward(dy, cache,
    grads, need_dx, onto)` adds the adapter's gradients to `grads` and returns dx (…, in). With `onto` it adds
    dx to that array and returns it. `trained()` lists the parameters. `delta()` returns ΔW (out, in) in
    float64, for merging. `docs/adapter.md` has all rules.
    """

    pool = 1
    """Number of neighbouring inputs that are summed before A (QA-LoRA); 1 for no pooling."""

    def __init__(self, base: Linear):
        self.base = base

    @property
    def name(self) -> str:
        """The adapted module's name."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the base."""
        return self.base.shape

    def parameters(self) -> Iterator[Parameter]:
        """Yield the base's dense parameter, which is frozen, and the adapter's own."""
        yield from self.base.parameters()
        yield from self.trained()

    @abstractmethod
    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        """Map x (…, in) to y (…, out)."""

    def cache_of(self, x: Array, key: Key = None) -> Cache:
        """Return the cache of `forward`, to recompute a checkpointed block. An override may skip y."""
        return self.forward(x, key)[1]

    @abstractmethod
    def backward(
        self, dy: Array, cache: Any, grads: Gradients, need_dx: bool = True, onto: Array | None = None
    ) -> Any:
        """Add to `grads`; return dx (…, in) for dy (…, out), or None if not `need_dx`."""

    @abstractmethod
    def trained(self) -> list[Parameter]:
        """Return all parameters of the adapter, frozen ones too."""

    @abstractmethod
    def delta(self) -> Array:
        """Return ΔW (out, in) in float64."""


AnyLinear = Linear | Adapter
