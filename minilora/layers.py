"""Layers: pairs of forward and backward that keep nothing but their parameters.

    y, cache = layer.forward(x)
    dx = layer.backward(dy, cache, grads)     # adds to grads; never touches the layer

Forward returns its cache and stores nothing in the layer. So a layer can run twice, or in two threads, and
its memory can be counted. `grads` holds arrays for *trainable* parameters only. A frozen Linear keeps no
input, builds no dW and still passes dx on. The letters of the shapes are those of `minilora.functional`.
Parameters, gradients and weights are in `minilora.parameters`; adapters wrap a Linear (`minilora.adapter`).

Three arguments recur:

* `key`: the seed of an adapter's dropout, a tuple (seed, step, shard, …), or None in evaluation. A recomputed
  forward pass draws the same numbers from the same key.
* `need_dx=False`: nothing below trains, so backward fills `grads`, skips the product with W and returns None.
* `onto`: an array. Backward adds dx to it, in the same pass as the product, and returns it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from minilora import kernels as F  # the functions of minilora.functional, compiled for float32
from minilora.config import ModelConfig
from minilora.parameters import Array, DenseWeight, Gradients, Parameter, Weight

Cache = tuple[Any, ...]
Caches3 = tuple[Cache, Cache, Cache]
Key = tuple[int, ...] | None
Rope = tuple[Array, Array]  # cosines and sines of the positions: `functional.rope_tables`


class Linear:
    """y = x Wᵀ, without bias, as everywhere in the Llama family."""

    def __init__(self, name: str, weight: Weight):
        self.name, self.weight = name, weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    @property
    def base(self) -> Linear:
        """Itself; an adapter's base is the Linear that it wraps."""
        return self

    def parameters(self) -> Iterator[Parameter]:
        """Yield the dense parameter; a quantized weight has none."""
        if isinstance(self.weight, DenseWeight):
            yield self.weight.param

    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        """Map x (…, in) to y (…, out). The cache holds x only if W trains."""
        return self.weight.matmul(x), self.cache_of(x)

    def cache_of(self, x: Array, key: Key = None) -> Cache:
        """Return the cache of `forward` without computing y, to recompute a checkpointed block."""
        return (x,) if self.weight.trainable else ()

    def backward(
        self, dy: Array, cache: Cache, grads: Gradients, need_dx: bool = True, onto: Array | None = None
    ) -> Any:
        """Return dx (…, in) for dy (…, out)."""
        if isinstance(self.weight, DenseWeight) and cache:
            (x,) = cache
            # y = x Wᵀ
            F.linear_dw(dy, x, grads[self.weight.param])
        return self.weight.matmul_t(dy, onto=onto) if need_dx else None


class Embedding:
    """y = W[ids]: token ids (B, T) → (B, T, C)."""

    def __init__(self, name: str, weight: Weight):
        self.name, self.weight = name, weight

    def parameters(self) -> Iterator[Parameter]:
        """Yield the dense table; a quantized one has no parameter."""
        if isinstance(self.weight, DenseWeight):
            yield self.weight.param

    def forward(self, ids: Array) -> tuple[Array, Cache]:
        """Look the rows up. The ids are kept only if the table trains."""
        return self.weight.rows(ids), (ids,) if self.weight.trainable else ()

    def backward(self, dy: Array, cache: Cache, grads: Gradients) -> None:
        """Add dy of each position to the gradient of its token's row. Token ids have no gradient."""
        if isinstance(self.weight, DenseWeight) and cache:
            (ids,) = cache
            grads.add(self.weight.param, F.embedding_backward(dy, ids, self.weight.shape[0]))


class RMSNorm:
    """y = weight · x / rms(x)."""

    def __init__(self, weight: Parameter, eps: float):
        self.weight, self.eps = weight, eps

    def parameters(self) -> Iterator[Parameter]:
        """Yield the scale of each feature."""
        yield self.weight

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """Map x (…, C) to y (…, C)."""
        return F.rms_norm_forward(x, self.weight.data, self.eps)

    def backward(self, dy: Array, cache: Cache, grads: Gradients, in_place: bool = False) -> Array:
        """Return dx (…, C) for dy (…, C). With `in_place`, dx may overwrite dy."""
        w = self.weight
        dx, dweight = F.rms_norm_backward(dy, w.data, cache, w.trainable, in_place=in_place)
        if dweight is not None:
            grads.add(w, dweight)
        return dx


class AttentionCache(NamedTuple):
    """What `Attention` keeps: rotation tables, the caches of its projections and of the attention itself."""

    rope: Rope
    q_proj: Cache
    k_proj: Cache
    v_proj: Cache
    mix: F.AttentionCache
    o_proj: Cache


class Attention:
    """Causal grouped-query attention with rotary positions; projections q, k, v and o are separate."""

    def __init__(self, config: ModelConfig, q_proj: Any, k_proj: Any, v_proj: Any, o_proj: Any):
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj

    def project(self, x: Array, rope: Rope, key: Key = None) -> tuple[Array, Array, Array, Caches3]:
        """Return rotated queries (B, T, H, D) and keys, values (B, T, K, D), and the projections' caches."""
        B, T, _ = x.shape
        q, cache_q = self.q_proj.forward(x, key)
        k, cache_k = self.k_proj.forward(x, key)
        v, cache_v = self.v_proj.forward(x, key)
        q, k, v = (z.reshape(B, T, -1, self.config.head_dim) for z in (q, k, v))  # (B, T, H or K, D)
        q, k = F.rope_forward(q, *rope, in_place=True), F.rope_forward(k, *rope, in_place=True)
        return q, k, v, (cache_q, cache_k, cache_v)

    def forward(
        self, x: Array, rope: Rope, key: Key = None, segments: Array | None = None
    ) -> tuple[Array, AttentionCache]:
        """Map x (B, T, C) to y (B, T, C); `segments` (B, T) keep packed examples apart."""
        q, k, v, (cache_q, cache_k, cache_v) = self.project(x, rope, key)
        mixed, mix = F.attention_forward(q, k, v, segments)  # (B, T, H, D)
        y, cache_o = self.o_proj.forward(mixed.reshape(*x.shape[:2], -1), key)  # (B, T, H·D)
        return y, AttentionCache(rope, cache_q, cache_k, cache_v, mix, cache_o)

    def restore(self, x: Array, kept: Checkpoint, rope: Rope, key: Key, segments: Any) -> AttentionCache:
        """Return the cache of `forward(x)` from the kept q, k and v, without a product with a base weight."""
        cache_q, cache_k, cache_v = (p.cache_of(x, key) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed, mix = F.attention_from_scaled(kept.q, kept.k, kept.v, segments)
        cache_o = self.o_proj.cache_of(mixed.reshape(*x.shape[:2], -1), key)
        return AttentionCache(rope, cache_q, cache_k, cache_v, mix, cache_o)

    def backward(self, dy: Array, cache: AttentionCache, grads: Gradients, need_dx: bool = True) -> Any:
        """Return dx (B, T, C) for dy (B, T, C)."""
        B, T, _ = dy.shape
        dmixed = self.o_proj.backward(dy, cache.o_proj, grads).reshape(B, T, -1, self.config.head_dim)
        dq, dk, dv = F.attention_backward(dmixed, cache.mix)
        dq, dk = (F.rope_backward(z, *cache.rope, in_place=True) for z in (dq, dk))
        # q, k and v read the same x, so their gradients add up
        dx = self.q_proj.backward(dq.reshape(B, T, -1), cache.q_proj, grads, need_dx)
        dx = self.k_proj.backward(dk.reshape(B, T, -1), cache.k_proj, grads, need_dx, onto=dx)
        return self.v_proj.backward(dv.reshape(B, T, -1), cache.v_proj, grads, need_dx, onto=dx)


class MLPCache(NamedTuple):
    """Cache of `MLP`: those of its projections and of SwiGLU or GELU. Without a gate, `gate_proj` is ()."""

    gate_proj: Cache
    up_proj: Cache
    activation: Cache
    down_proj: Cache


class MLP:
    """SwiGLU, y = (silu(x Wgᵀ) · x Wuᵀ) Wdᵀ, or with `gate_proj=None` the two-matrix y = gelu(x Wuᵀ) Wdᵀ."""

    def __init__(self, gate_proj: Any, up_proj: Any, down_proj: Any):
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Array, key: Key = None) -> tuple[Array, MLPCache]:
        """Map x (B, T, C) to y (B, T, C), through (B, T, F)."""
        hidden, (gate, up, activation) = self._hidden(x, key)
        y, cache_down = self.down_proj.forward(hidden, key)
        return y, MLPCache(gate, up, activation, cache_down)

    def cache_of(self, x: Array, key: Key = None) -> MLPCache:
        """Return the cache of `forward` without its last product."""
        hidden, (gate, up, activation) = self._hidden(x, key)
        return MLPCache(gate, up, activation, self.down_proj.cache_of(hidden, key))

    def _hidden(self, x: Array, key: Key) -> tuple[Array, Caches3]:
        up, cache_up = self.up_proj.forward(x, key)
        if self.gate_proj is None:
            hidden, cache_act = F.gelu_forward(up)
            return hidden, ((), cache_up, cache_act)
        gate, cache_gate = self.gate_proj.forward(x, key)
        hidden, cache_act = F.swiglu_forward(gate, up)
        return hidden, (cache_gate, cache_up, cache_act)

    def backward(self, dy: Array, cache: MLPCache, grads: Gradients) -> Array:
        """Return dx (B, T, C) for dy (B, T, C)."""
        dhidden = self.down_proj.backward(dy, cache.down_proj, grads)
        if self.gate_proj is None:
            return self.up_proj.backward(F.gelu_backward(dhidden, cache.activation), cache.up_proj, grads)
        dgate, dup = F.swiglu_backward(dhidden, cache.activation, in_place=True)
        dx = self.gate_proj.backward(dgate, cache.gate_proj, grads)
        return self.up_proj.backward(dup, cache.up_proj, grads, onto=dx)


class HalfCache(NamedTuple):
    """Cache of one half of a block: of its norm, and of its attention or MLP."""

    norm: Cache
    inner: Any


class BlockCache(NamedTuple):
    """Cache of a block: its attention half and its MLP half."""

    attention: HalfCache
    mlp: HalfCache


class Checkpoint(NamedTuple):
    """What a checkpointed block keeps: x and mixed (B, T, C), the inputs of its two halves; q, k and v."""

    x: Array
    mixed: Array
    q: Array
    k: Array
    v: Array


class Block:
    """Pre-norm residual block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_norm: RMSNorm, mlp: MLP):
        self.input_norm, self.attention, self.post_norm, self.mlp = input_norm, attention, post_norm, mlp

    def linears(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield (owner, attribute, linear) of each projection, in the order of computation."""
        for owner in (self.attention, self.mlp):
            for attribute in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                linear = getattr(owner, attribute, None)
                if linear is not None:
                    yield owner, attribute, linear

    def parameters(self) -> Iterator[Parameter]:
        """Yield norms and projections."""
        yield from self.input_norm.parameters()
        yield from self.post_norm.parameters()
        for _, _, linear in self.linears():
            yield from linear.parameters()

    def forward(
        self, x: Array, rope: Rope, key: Key = None, segments: Array | None = None
    ) -> tuple[Array, BlockCache]:
        """Map x (B, T, C) to y (B, T, C)."""
        normed, cache_norm = self.input_norm.forward(x)
        mixed, cache_attention = self.attention.forward(normed, rope, key, segments)
        mixed += x
        normed, cache_norm2 = self.post_norm.forward(mixed)
        y, cache_mlp = self.mlp.forward(normed, key)
        y += mixed
        return y, BlockCache(HalfCache(cache_norm, cache_attention), HalfCache(cache_norm2, cache_mlp))

    def backward(self, dy: Array, cache: BlockCache, grads: Gradients, need_dx: bool = True) -> Any:
        """Return dx (B, T, C) for dy (B, T, C)."""
        dmixed = self.backward_mlp(dy, cache.mlp, grads)
        return self.backward_attention(dmixed, cache.attention, grads, need_dx)

    def backward_mlp(self, dy: Array, cache: HalfCache, grads: Gradients) -> Array:
        """Return dmixed (B, T, C) for dy (B, T, C)."""
        # y = mixed + mlp(norm(mixed)): the gradient flows through both terms
        dnormed = self.mlp.backward(dy, cache.inner, grads)
        dmixed = self.post_norm.backward(dnormed, cache.norm, grads, in_place=True)
        dmixed += dy
        return dmixed

    def backward_attention(self, dmixed: Array, cache: HalfCache, grads: Gradients, need_dx: bool) -> Any:
        """Return dx (B, T, C) for dmixed (B, T, C)."""
        need_dx = need_dx or self.input_norm.weight.trainable
        # mixed = x + attention(norm(x))
        dnormed = self.attention.backward(dmixed, cache.inner, grads, need_dx)
        if not need_dx:
            return None
        dx = self.input_norm.backward(dnormed, cache.norm, grads, in_place=True)
        dx += dmixed
        return dx

    @staticmethod
    def checkpoint(cache: BlockCache) -> Checkpoint:
        """Return what a checkpoint keeps: the arrays that are expensive to recompute.

        They are a quarter of the cache (QA-LoRA: a third), and would take four products with base weights.
        Norms, probabilities and the wide part of the MLP are recomputed (selective recomputation, arXiv
        2205.05198, §4).
        """
        mix = cache.attention.inner.mix
        return Checkpoint(cache.attention.norm[0], cache.mlp.norm[0], mix.q, mix.k, mix.v)

    def restore_mlp(self, kept: Checkpoint, key: Key = None) -> HalfCache:
        """Recompute the cache of the MLP half, with the same bits."""
        normed, cache_norm = self.post_norm.forward(kept.mixed)
        return HalfCache(cache_norm, self.mlp.cache_of(normed, key))

    def restore_attention(
        self, kept: Checkpoint, rope: Rope, key: Key = None, segments: Array | None = None
    ) -> HalfCache:
        """Recompute the cache of the attention half, with the same bits."""
        normed, cache_norm = self.input_norm.forward(kept.x)
        return HalfCache(cache_norm, self.attention.restore(normed, kept, rope, key, segments))
