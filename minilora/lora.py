"""Low-rank adaptation: one adapter class for LoRA, QLoRA and QA-LoRA.

    y = base(x) + scaling · pool(x) Aᵀ Bᵀ        A (r, in/g), B (out, r)

* `pool` = identity over a dense base: LoRA (arXiv 2106.09685, eq. 3).
* `pool` = identity over a 4-bit NormalFloat base: QLoRA (arXiv 2305.14314, eq. 5).
* `pool` = sum over the groups of an affine base: QA-LoRA (arXiv 2309.14717, Algorithm 1).

The mathematics is in `functional.low_rank_forward` and `low_rank_backward`. `minilora.injection` puts
adapters into a model. `minilora.variants` builds DoRA, PiSSA and LoftQ on `LoraLinear`.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

from minilora import kernels as F  # the functions of minilora.functional, compiled for float32
from minilora.adapter import Adapter
from minilora.config import LoraConfig, require
from minilora.layers import Key, Linear
from minilora.parameters import Array, Gradients, Parameter


class LoraCache(NamedTuple):
    """Cache of LoRA: p = pool(x) after dropout (…, in/g), h = p Aᵀ (…, r), dropout's mask in bits or None."""

    p: Array
    h: Array
    mask: Array | None


class LoraLinear(Adapter):
    """A frozen Linear with a trainable low-rank update beside it.

    Parameters
    ----------
    base : Linear
        Frozen, dense or quantized.
    config : LoraConfig
        Rank, scaling, dropout and start of A and B.
    rng : numpy.random.Generator
        Draws A; B starts at zero.
    pool : int
        Number of neighbouring inputs that are summed before A. For QA-LoRA: the base's group size.

    Raises
    ------
    ConfigError
        If r exceeds the smaller side of the base.

    Examples
    --------
    >>> from minilora.layers import DenseWeight
    >>> base = Linear("q_proj", DenseWeight(Parameter("q_proj.weight", np.eye(4, dtype=np.float32))))
    >>> adapted = LoraLinear(base, LoraConfig(r=2), np.random.default_rng(0))
    >>> x = np.ones((1, 4), np.float32)
    >>> bool((adapted.forward(x)[0] == base.forward(x)[0]).all())   # B = 0: nothing has changed yet
    True
    """

    def __init__(self, base: Linear, config: LoraConfig, rng: np.random.Generator, pool: int = 1):
        super().__init__(base)
        out, in_ = base.shape
        config = config.of(base.name)
        # with pooling, ΔW has at most rank in/pool; a larger r is allowed, but adds only parameters
        require(
            config.r <= min(out, in_),
            "r",
            config.r,
            f"must be at most {min(out, in_)}, the smaller side of {base.name} ({out}, {in_}): a larger rank "
            "adds nothing",
        )
        self.pool, self.scaling, self.dropout = pool, config.scaling, config.lora_dropout
        a = init_a(config, (config.r, in_ // pool), in_, rng).astype(base.weight.dtype)
        b = np.zeros_like(a, shape=(out, config.r))
        self.lora_A = Parameter(f"{base.name}.lora_A.weight", a, trainable=True)  # (r, in/g)
        self.lora_B = Parameter(f"{base.name}.lora_B.weight", b, trainable=True)  # (out, r)

    def trained(self) -> list[Parameter]:
        """Return A and B."""
        return [self.lora_A, self.lora_B]

    def forward(self, x: Array, key: Key = None) -> tuple[Array, LoraCache]:
        """Map x (…, in) to y (…, out); `key` turns dropout on."""
        p, mask = self._adapter_input(x, key)
        low_rank, (p, h) = F.low_rank_forward(p, self.lora_A.data, self.lora_B.data, self.scaling)
        return self.base.weight.matmul(x, low_rank), LoraCache(p, h, mask)

    def cache_of(self, x: Array, key: Key = None) -> LoraCache:
        """Return the cache of `forward` without computing the base's product."""
        p, mask = self._adapter_input(x, key)
        return LoraCache(p, F.linear_forward(p, self.lora_A.data), mask)

    def backward(
        self, dy: Array, cache: LoraCache, grads: Gradients, need_dx: bool = True, onto: Array | None = None
    ) -> Any:
        """Return dx (…, in) for dy (…, out), and add dA and dB to `grads`. There is no dW."""
        p, h, mask = cache
        a, b, s = self.lora_A.data, self.lora_B.data, self.scaling
        # y = base(x) + s·p Aᵀ Bᵀ
        dp = F.low_rank_backward(dy, (p, h), a, b, s, grads.of(self.lora_A), grads.of(self.lora_B))
        if not need_dx:
            return None
        if mask is not None:
            # p = mask ∘ pool(x) / (1 − dropout)
            dp = F.multiplied(dp)
            dp *= np.unpackbits(mask, count=dp.size).reshape(dp.shape)
            dp *= dp.dtype.type(1 / (1 - self.dropout))
        # x reached y twice: through p = pool(x), and through the base
        return self.base.weight.matmul_t(dy, F.group_repeat(dp, self.pool), onto)

    def _adapter_input(self, x: Array, key: Key) -> tuple[Array, Array | None]:
        """Return p = pool(x), after dropout if there is a key, and the mask of dropout, packed into bits."""
        p = F.group_sum(x, self.pool)  # (…, in/g)
        if key is None or self.dropout == 0:
            return p, None
        mask = self.dropout_mask(p, key)
        p = p * mask
        p *= p.dtype.type(1 / (1 - self.dropout))
        return p, np.packbits(mask)

    def dropout_mask(self, p: Array, key: tuple[int, ...]) -> Array:
        """Draw which elements of p dropout keeps; each (seed, step, shard, layer) has its own stream."""
        rng = np.random.default_rng([*key, zlib.crc32(self.name.encode())])
        return rng.random(p.shape, np.float32) >= self.dropout

    def delta(self) -> Array:
        """Return ΔW = scaling · B A (out, in) in float64. With pooling, a group's inputs share one column."""
        a, b = (p.data.astype(np.float64) for p in (self.lora_A, self.lora_B))
        return F.group_repeat(self.scaling * (b @ a), self.pool)


def init_a(config: LoraConfig, shape: tuple[int, int], in_features: int, rng: np.random.Generator) -> Array:
    """Draw A (r, in/g). `in_features` is the layer's true width, also when its input is pooled.

    * `normal`: N(0, 1/(3·in)).
    * `kaiming`: U(−1/√in, 1/√in), PEFT's default, with the same variance.
    * `gaussian`: N(0, 1/r²).
    """
    if config.init_lora_weights == "kaiming":
        return rng.uniform(-1, 1, shape) / in_features**0.5
    std = 1 / config.r if config.init_lora_weights == "gaussian" else (3 * in_features) ** -0.5
    return rng.standard_normal(shape) * std
