"""Layers: pairs of forward and backward that keep nothing but their parameters.

    y, cache = layer.forward(x)
    dx = layer.backward(dy, cache, grads)     # adds to grads; never touches the layer

With ``last`` nothing below trains: only grads are wanted, and dx, whose product with the weight is saved, is
None. With ``onto`` a linear adds its dx to that array, inside of the product, and returns it.

``cache`` is an explicit tuple: what a layer must remember is in its return statement, so a layer can run
twice or in two threads, and the memory it costs can be counted. ``grads`` holds arrays for *trainable*
parameters only. A frozen Linear keeps no input, builds no dW and still passes dx on. Letters of the shapes:
see :mod:`minilora.functional`.

``key`` is what random layers draw from, a tuple (seed, step, shard, …); ``None`` means evaluation. Only an
adapter's dropout uses it; because the numbers depend on the key alone, a recomputed forward draws the same
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from minilora import kernels as F  # the functions of minilora.functional, for float32 compiled
from minilora.config import ModelConfig
from minilora.kernels import LowRank

Array = np.ndarray
Cache = tuple[Any, ...]
Key = tuple[int, ...] | None


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
    """One zeroed array for each trainable parameter; ``add`` accumulates.

    >>> p = Parameter("w", np.ones(2), trainable=True)
    >>> grads = Gradients([p])
    >>> grads.add(p, np.ones(2)); grads.add(p, np.ones(2))
    >>> grads[p]
    array([2., 2.])
    """

    def __init__(self, parameters: Iterable[Parameter]):
        super().__init__((p, np.zeros_like(p.data)) for p in parameters if p.trainable)

    def add(self, parameter: Parameter, gradient: Array) -> None:
        """Add to the gradient of a trainable parameter."""
        self[parameter] += gradient


class Weight(Protocol):
    """What a Linear asks of its weight W (out, in); how the numbers are stored is the weight's own
    business."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    trainable: bool

    def matmul(self, x: Array, path: LowRank | None = None) -> Array:
        """x Wᵀ: (…, in) → (…, out); with a low-rank path (h, b, s) x Wᵀ + s·h bᵀ: h (…, r), b (out, r)."""

    def matmul_t(self, dy: Array, path: LowRank | None = None, onto: Array | None = None) -> Array:
        """dy W: (…, out) → (…, in); with a path (dh, a, s) dy W + s·dh a: dh (…, r), a (r, in). Added to
        ``onto``, if given."""

    def rows(self, ids: Array) -> Array:
        """Rows of W in floating point, for embeddings."""

    def dense(self) -> Array:
        """W as one (out, in) array."""

    def arrays(self) -> dict[str, list[Array]]:
        """The stored arrays by class of bytes: weights, codes, scales, offsets, code_maps."""


class DenseWeight:
    """A weight stored as it is: one floating-point array."""

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
        """Whether a Linear must keep its input for dW."""
        return self.param.trainable

    def matmul(self, x: Array, path: LowRank | None = None) -> Array:
        """x Wᵀ (+ s·h bᵀ)."""
        return F.product(x, self.param.data, path)

    def matmul_t(self, dy: Array, path: LowRank | None = None, onto: Array | None = None) -> Array:
        """dy W (+ s·dh a)."""
        return F.product_t(dy, self.param.data, path, onto)

    def rows(self, ids: Array) -> Array:
        """W[ids]."""
        return self.param.data[ids]

    def dense(self) -> Array:
        """The array itself, not a copy."""
        return self.param.data

    def arrays(self) -> dict[str, list[Array]]:
        """One class: weights."""
        return {"weights": [self.param.data]}


class Linear:
    """y = x Wᵀ, without bias, as everywhere in the Llama family."""

    def __init__(self, name: str, weight: Any):
        self.name, self.weight = name, weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    def parameters(self) -> Iterator[Parameter]:
        """The dense parameter; a quantized weight has none."""
        if isinstance(self.weight, DenseWeight):
            yield self.weight.param

    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        """x (…, in) → y (…, out). The input is kept only if W trains."""
        return self.weight.matmul(x), self.keep(x)

    def keep(self, x: Array, key: Key = None) -> Cache:
        """What ``forward`` keeps, without the product: for a checkpointed block, whose result is known when
        it runs again."""
        return (x,) if self.weight.trainable else ()

    def backward(
        self, dy: Array, cache: Cache, grads: Gradients, last: bool = False, onto: Array | None = None
    ) -> Any:
        """dy (…, out) → dx (…, in)."""
        if cache:
            (x,) = cache
            # y = x Wᵀ  →  dW = dyᵀ x
            F.outer(dy, x, grads[self.weight.param])
        return None if last else self.weight.matmul_t(dy, onto=onto)


class Embedding:
    """y = W[ids]: token ids (B, T) → (B, T, C)."""

    def __init__(self, name: str, weight: Any):
        self.name, self.weight = name, weight

    def parameters(self) -> Iterator[Parameter]:
        """The dense table; a quantized one has no parameter."""
        if isinstance(self.weight, DenseWeight):
            yield self.weight.param

    def forward(self, ids: Array) -> tuple[Array, Cache]:
        """Look the rows up."""
        return self.weight.rows(ids), (ids,) if self.weight.trainable else ()

    def backward(self, dy: Array, cache: Cache, grads: Gradients) -> None:
        """Token ids have no gradient; a trainable table adds each row's dy to that row."""
        if cache:
            (ids,) = cache
            grads.add(self.weight.param, F.embedding_backward(dy, ids, self.weight.shape[0]))


class RMSNorm:
    """y = weight · x / rms(x)."""

    def __init__(self, weight: Parameter, eps: float):
        self.weight, self.eps = weight, eps

    def parameters(self) -> Iterator[Parameter]:
        """The scale of each feature."""
        yield self.weight

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """x (…, C) → y (…, C)."""
        return F.rms_norm_forward(x, self.weight.data, self.eps)

    def backward(self, dy: Array, cache: Cache, grads: Gradients, in_place: bool = False) -> Array:
        """dy (…, C) → dx (…, C), which may take dy's place."""
        dx, dweight = F.rms_norm_backward(
            dy, self.weight.data, cache, self.weight.trainable, in_place=in_place
        )
        if dweight is not None:
            grads.add(self.weight, dweight)
        return dx


class Attention:
    """Causal grouped-query attention with rotary positions; projections q, k, v and o are separate."""

    def __init__(self, config: ModelConfig, q_proj: Any, k_proj: Any, v_proj: Any, o_proj: Any):
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj

    def project(
        self, x: Array, rope: tuple[Array, Array], key: Key = None
    ) -> tuple[Array, Array, Array, Cache]:
        """Queries (B, T, H, D), keys and values (B, T, K, D), the first two rotated."""
        B, T, _ = x.shape
        q, cache_q = self.q_proj.forward(x, key)
        k, cache_k = self.k_proj.forward(x, key)
        v, cache_v = self.v_proj.forward(x, key)
        q, k, v = (z.reshape(B, T, -1, self.config.head_dim) for z in (q, k, v))  # (B, T, H or K, D)
        q, k = F.rope_forward(q, *rope, in_place=True), F.rope_forward(k, *rope, in_place=True)
        return q, k, v, (cache_q, cache_k, cache_v)

    def forward(
        self, x: Array, rope: tuple[Array, Array], key: Key = None, segments: Array | None = None
    ) -> tuple[Array, Cache]:
        """x (B, T, C) → y (B, T, C); ``segments`` (B, T) keep packed examples apart."""
        q, k, v, cache_qkv = self.project(x, rope, key)
        mixed, cache_mix = F.attention_forward(q, k, v, segments)  # (B, T, H, D)
        y, cache_o = self.o_proj.forward(
            mixed.reshape(*x.shape[:2], -1), key
        )  # heads side by side: (B, T, H·D)
        return y, (rope, cache_qkv, cache_mix, cache_o)

    def restore(
        self,
        x: Array,
        qkv: tuple[Array, Array, Array],
        rope: tuple[Array, Array],
        key: Key,
        segments: Array | None,
    ) -> Cache:
        """The cache of ``forward(x)`` from its queries, keys and values: no product with a base weight."""
        cache_qkv = tuple(linear.keep(x, key) for linear in (self.q_proj, self.k_proj, self.v_proj))
        mixed, cache_mix = F.attention_again(*qkv, segments)
        return rope, cache_qkv, cache_mix, self.o_proj.keep(mixed.reshape(*x.shape[:2], -1), key)

    def backward(self, dy: Array, cache: Cache, grads: Gradients, last: bool = False) -> Any:
        """dy (B, T, C) → dx (B, T, C)."""
        rope, (cache_q, cache_k, cache_v), cache_mix, cache_o = cache
        B, T, _ = dy.shape
        dmixed = self.o_proj.backward(dy, cache_o, grads).reshape(B, T, -1, self.config.head_dim)
        dq, dk, dv = F.attention_backward(dmixed, cache_mix)
        dq, dk = F.rope_backward(dq, *rope, in_place=True), F.rope_backward(dk, *rope, in_place=True)
        # q, k and v read the same x, so their gradients add up
        dx = self.q_proj.backward(dq.reshape(B, T, -1), cache_q, grads, last)
        dx = self.k_proj.backward(dk.reshape(B, T, -1), cache_k, grads, last, onto=dx)
        return self.v_proj.backward(dv.reshape(B, T, -1), cache_v, grads, last, onto=dx)


class MLP:
    """SwiGLU, y = (silu(x Wgᵀ) · x Wuᵀ) Wdᵀ, or with ``gate_proj=None`` the two-matrix y = gelu(x Wuᵀ)
    Wdᵀ."""

    def __init__(self, gate_proj: Any, up_proj: Any, down_proj: Any):
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        """x (B, T, C) → y (B, T, C), through (B, T, F)."""
        hidden, cache = self._hidden(x, key)
        y, cache_down = self.down_proj.forward(hidden, key)
        return y, (*cache, cache_down)

    def keep(self, x: Array, key: Key = None) -> Cache:
        """What ``forward`` keeps, without the last product."""
        hidden, cache = self._hidden(x, key)
        return (*cache, self.down_proj.keep(hidden, key))

    def _hidden(self, x: Array, key: Key) -> tuple[Array, Cache]:
        up, cache_up = self.up_proj.forward(x, key)
        if self.gate_proj is None:
            hidden, cache_act = F.gelu_forward(up)
            return hidden, ((), cache_up, cache_act)
        gate, cache_gate = self.gate_proj.forward(x, key)
        hidden, cache_act = F.swiglu_forward(gate, up)
        return hidden, (cache_gate, cache_up, cache_act)

    def backward(self, dy: Array, cache: Cache, grads: Gradients) -> Array:
        """dy (B, T, C) → dx (B, T, C)."""
        cache_gate, cache_up, cache_act, cache_down = cache
        dhidden = self.down_proj.backward(dy, cache_down, grads)
        if self.gate_proj is None:
            return self.up_proj.backward(F.gelu_backward(dhidden, cache_act), cache_up, grads)
        dgate, dup = F.swiglu_backward(dhidden, cache_act, in_place=True)
        dx = self.gate_proj.backward(dgate, cache_gate, grads)
        return self.up_proj.backward(dup, cache_up, grads, onto=dx)


class Block:
    """Pre-norm residual block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_norm: RMSNorm, mlp: MLP):
        self.input_norm, self.attention, self.post_norm, self.mlp = input_norm, attention, post_norm, mlp

    def linears(self) -> Iterator[tuple[Any, str, Any]]:
        """(owner, attribute, linear) of each projection, in the order of computation."""
        for owner in (self.attention, self.mlp):
            for attribute in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                linear = getattr(owner, attribute, None)
                if linear is not None:
                    yield owner, attribute, linear

    def parameters(self) -> Iterator[Parameter]:
        """Norms and projections."""
        yield from self.input_norm.parameters()
        yield from self.post_norm.parameters()
        for _, _, linear in self.linears():
            yield from linear.parameters()

    def forward(
        self, x: Array, rope: tuple[Array, Array], key: Key = None, segments: Array | None = None
    ) -> tuple[Array, Cache]:
        """x (B, T, C) → y (B, T, C). The cache is a pair, one for each half."""
        normed, cache_n1 = self.input_norm.forward(x)
        mixed, cache_attention = self.attention.forward(normed, rope, key, segments)
        mixed += x
        normed, cache_n2 = self.post_norm.forward(mixed)
        y, cache_mlp = self.mlp.forward(normed, key)
        y += mixed
        return y, ((cache_n1, cache_attention), (cache_n2, cache_mlp))

    def backward(self, dy: Array, cache: Cache, grads: Gradients, last: bool = False) -> Any:
        """dy (B, T, C) → dx (B, T, C)."""
        attention_half, mlp_half = cache
        return self.backward_attention(self.backward_mlp(dy, mlp_half, grads), attention_half, grads, last)

    def backward_mlp(self, dy: Array, cache: Cache, grads: Gradients) -> Array:
        """dy (B, T, C) → dmixed (B, T, C)."""
        cache_norm, cache_mlp = cache
        # y = mixed + mlp(norm(mixed)): the gradient takes both ways
        dmixed = self.post_norm.backward(
            self.mlp.backward(dy, cache_mlp, grads), cache_norm, grads, in_place=True
        )
        dmixed += dy
        return dmixed

    def backward_attention(self, dmixed: Array, cache: Cache, grads: Gradients, last: bool = False) -> Any:
        """dmixed (B, T, C) → dx (B, T, C)."""
        cache_norm, cache_attention = cache
        last = last and not self.input_norm.weight.trainable
        # mixed = x + attention(norm(x))
        dnormed = self.attention.backward(dmixed, cache_attention, grads, last)
        if last:
            return None
        dx = self.input_norm.backward(dnormed, cache_norm, grads, in_place=True)
        dx += dmixed
        return dx

    @staticmethod
    def checkpoint(cache: Cache) -> Cache:
        """What a checkpointed block keeps: the inputs x and ``mixed`` of its halves (B, T, C), and q, k and
        v.

        That is the part of a cache (a quarter, of QA-LoRA's a third) whose recomputation would take four
        products with base weights; left to compute again are norms, probabilities and the wide part of the
        MLP (selective recomputation, arXiv 2205.05198).
        """
        ((x, _), (_, _, (q, k, v, _), _)), ((mixed, _), _) = cache
        return x, mixed, (q, k, v)

    def restore_mlp(self, mixed: Array, key: Key = None) -> Cache:
        """The cache of the MLP half again, bit by bit, from what ``checkpoint`` kept of it."""
        normed, cache_norm = self.post_norm.forward(mixed)
        return cache_norm, self.mlp.keep(normed, key)

    def restore_attention(
        self,
        x: Array,
        qkv: tuple[Array, Array, Array],
        rope: tuple[Array, Array],
        key: Key = None,
        segments: Array | None = None,
    ) -> Cache:
        """The cache of the attention half again, likewise."""
        normed, cache_norm = self.input_norm.forward(x)
        return cache_norm, self.attention.restore(normed, qkv, rope, key, segments)
