"""Low-rank adaptation: one adapter class for LoRA, QLoRA and QA-LoRA, and injection.

    y = base(x) + scaling · pool(x) Aᵀ Bᵀ        A (r, in/g), B (out, r)

With ``pool`` = identity over a dense base this is LoRA (arXiv 2106.09685, eq. 3); over a 4-bit NormalFloat
base QLoRA (arXiv 2305.14314, eq. 5); with ``pool`` = sum over the groups of an affine base QA-LoRA (arXiv
2309.14717, Algorithm 1).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.config import LINEAR_MODULES, SVD_INITS, ConfigError, LoraConfig, QuantConfig, matches, require
from minilora.initial import init_a, loftq, pissa
from minilora.kernels import adapter_backward, group_repeat, group_sum, product, product_t
from minilora.layers import Array, Cache, DenseWeight, Gradients, Key, Linear, Parameter
from minilora.quant.model import quantize_model
from minilora.quant.weights import quantize_weight
from minilora.threads import single_blas

if TYPE_CHECKING:
    from minilora.transformer import Transformer


class LoraLinear:
    """A frozen Linear with a trainable low-rank path beside it.

    With ``use_dora`` the rows of W + s·B A keep their direction and get a trained length m (DoRA, arXiv
    2402.09353, eq. 5):

        y = (m / n) ∘ (base(x) + s · x Aᵀ Bᵀ),   n = ‖W + s·B A‖ of each row, a constant for the gradient (its section 4.3)

    >>> base = Linear("q_proj", DenseWeight(Parameter("q_proj.weight", np.eye(4, dtype=np.float32))))
    >>> adapted = LoraLinear(base, LoraConfig(r=2), np.random.default_rng(0))
    >>> x = np.ones((1, 4), np.float32)
    >>> bool((adapted.forward(x)[0] == base.forward(x)[0]).all())   # B = 0: nothing has changed yet
    True
    """

    def __init__(
        self,
        base: Linear,
        config: LoraConfig,
        rng: np.random.Generator,
        pool: int = 1,
        quant: QuantConfig | None = None,
    ):
        out, in_ = base.shape
        config = config.of(base.name)
        # with pooling the rank of ΔW is capped at in/pool already; a larger r trains, but only adds
        # parameters
        require(
            config.r <= min(out, in_),
            "r",
            config.r,
            f"must be at most {min(out, in_)}, the smaller side of {base.name} ({out}, {in_}): a larger rank adds nothing",
        )
        self.pool, self.scaling, self.dropout = pool, config.scaling, config.lora_dropout
        dtype = base.weight.dtype
        if config.init_lora_weights in SVD_INITS:
            self.base, a, b = _from_svd(base, config, quant)
        else:
            self.base = base
            a = init_a(config, (config.r, in_ // pool), in_, rng).astype(dtype)
            b = np.zeros_like(a, shape=(out, config.r))
        self.start = (a.copy(), b.copy()) if config.init_lora_weights in SVD_INITS else None
        """The first A and B of PiSSA and LoftQ: with them the adapter is no update of W itself, but of W −
        s·B₀A₀."""
        self.lora_A = Parameter(f"{base.name}.lora_A.weight", a, trainable=True)  # (r, in/g)
        self.lora_B = Parameter(f"{base.name}.lora_B.weight", b, trainable=True)  # (out, r)
        self.magnitude: Parameter | None = None
        if config.use_dora:
            self.row_squares = (
                (self.base.weight.dense().astype(np.float64) ** 2).sum(axis=1).astype(dtype)
            )  # (out,)
            self.magnitude = Parameter(
                f"{base.name}.lora_magnitude_vector", self.row_norms(), trainable=True
            )  # (out,)

    @property
    def name(self) -> str:
        """The adapted module's name."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the base."""
        return self.base.shape

    def trained(self) -> list[Parameter]:
        """A, B and, with DoRA, the lengths m."""
        return [self.lora_A, self.lora_B, *([] if self.magnitude is None else [self.magnitude])]

    def parameters(self) -> Iterator[Parameter]:
        """The base's dense parameter (frozen), and what trains."""
        yield from self.base.parameters()
        yield from self.trained()

    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        """x (…, in) → y (…, out). Kept: the adapter's input p (…, in/g), h (…, r) and, with dropout, one bit
        an element.

        DoRA also keeps its result before it is stretched: the price of the lengths.
        """
        p, h, mask = self._down(x, key)
        y = self.base.weight.matmul(x, (h, self.lora_B.data, self.scaling))  # base(x) + s·h Bᵀ in one product
        if self.magnitude is None:
            return y, (p, h, mask)
        n = self.row_norms()  # (out,)
        return y * (self.magnitude.data / n), (p, h, mask, y, n)

    def keep(self, x: Array, key: Key = None) -> Cache:
        """What ``forward`` keeps, without the product with the base where it is not needed for that."""
        return self._down(x, key) if self.magnitude is None else self.forward(x, key)[1]

    def _down(self, x: Array, key: Key) -> tuple[Array, Array, Array | None]:
        p = group_sum(x, self.pool)  # (…, in/g)
        mask = None
        if key is not None and self.dropout > 0:
            keep = self.dropout_mask(p, key)
            mask = np.packbits(keep)
            p = p * keep
            p *= p.dtype.type(1 / (1 - self.dropout))
        return p, product(p, self.lora_A.data), mask  # h = p Aᵀ (…, r)

    def dropout_mask(self, p: Array, key: tuple[int, ...]) -> Array:
        """Which elements of p stay: a stream of its own for each (seed, step, shard, layer)."""
        rng = np.random.default_rng([*key, zlib.crc32(self.name.encode())])
        return rng.random(p.shape, np.float32) >= self.dropout

    def backward(
        self, dy: Array, cache: Cache, grads: Gradients, last: bool = False, onto: Array | None = None
    ) -> Any:
        """dy (…, out) → dx (…, in); adds dA and dB. There is no dW."""
        p, h, mask, *stretched = cache
        if self.magnitude is not None:
            # y = (m / n) ∘ z with n constant
            z, n = stretched
            grads.add(self.magnitude, (dy * z).reshape(-1, dy.shape[-1]).sum(axis=0) / n)
            dy = dy * (self.magnitude.data / n)
        # y = base(x) + s·h Bᵀ with h = p Aᵀ; dh is the gradient of s·h
        dh = adapter_backward(
            dy, h, p, self.lora_B.data, self.scaling, grads[self.lora_B], grads[self.lora_A]
        )
        if last:
            return None
        # p = pool(x), and x also went through the base
        if mask is None:
            return self.base.weight.matmul_t(
                dy, (dh, group_repeat(self.lora_A.data, self.pool), self.scaling), onto
            )
        # p = keep ∘ p / (1 − dropout)
        dp = product_t(dh, self.lora_A.data)
        dp *= np.unpackbits(mask, count=p.size).reshape(p.shape)
        dp *= dp.dtype.type(self.scaling / (1 - self.dropout))
        dx = self.base.weight.matmul_t(dy, onto=onto)
        dx += group_repeat(dp, self.pool)
        return dx

    def row_norms(self) -> Array:
        """n (out,) = ‖w + s·b A‖ of each row, without a dense matrix: ‖w‖² + 2s·b·(A wᵀ) + s²·b (A Aᵀ) bᵀ."""
        a, b = self.lora_A.data, self.lora_B.data
        s = b.dtype.type(self.scaling)
        cross = self.base.weight.matmul(a).T  # W Aᵀ: (out, r)
        squares = self.row_squares + (b * (2 * s * cross + s * s * (b @ (a @ a.T)))).sum(axis=1)
        return np.sqrt(
            np.maximum(squares, np.finfo(b.dtype).tiny)
        )  # a row of zeros has no direction, and must not divide by 0

    def delta(self, dtype: Any = np.float64) -> Array:
        """ΔW = scaling · B A, each column repeated over its group: (out, in). With DoRA (m / n) ∘ (W +
        scaling · B A) − W."""
        delta = group_repeat(
            self.scaling * (self.lora_B.data.astype(dtype) @ self.lora_A.data.astype(dtype)), self.pool
        )
        if self.magnitude is None:
            return delta
        w = self.base.weight.dense().astype(dtype)
        return self._stretched(w + delta) - w

    def over(self, w: Array) -> Array:
        """The merged weight over another W (out, in), the dense one that a quantized or PiSSA base came from:
        float64."""
        a, b = self.lora_A.data.astype(np.float64), self.lora_B.data.astype(np.float64)
        product = b @ a - (0 if self.start is None else self.start[1].astype(np.float64) @ self.start[0])
        return self._stretched(w.astype(np.float64) + group_repeat(self.scaling * product, self.pool))

    def _stretched(self, whole: Array) -> Array:
        """(m / n) ∘ V for V = W + ΔW (out, in); V itself without DoRA."""
        if self.magnitude is None:
            return whole
        n = np.maximum(np.linalg.norm(whole, axis=1), np.finfo(self.magnitude.data.dtype).tiny ** 0.5)
        return (self.magnitude.data / n)[:, None] * whole


def _from_svd(base: Linear, config: LoraConfig, quant: QuantConfig | None) -> tuple[Linear, Array, Array]:
    """PiSSA's or LoftQ's new base, A and B."""
    if not isinstance(base.weight, DenseWeight):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r}: {base.name} is quantized already, and this start "
            "needs the weight in full precision; inject into the dense model and pass quant=QuantConfig(…)"
        )
    w, name = base.weight.dense(), base.name
    if config.init_lora_weights == "loftq":
        if quant is None:
            raise ConfigError(
                f"init_lora_weights='loftq': answers the error of a quantizer, and {name} gets none; pass "
                "quant=QuantConfig('nf4'), and leave lm_head, which stays dense, out of target_modules"
            )
        weight, a, b = loftq(
            w, config.r, config.scaling, lambda x: quantize_weight(x, quant), config.loftq_iter
        )
        return Linear(name, weight), a, b
    require(
        2 * config.r <= min(w.shape),
        "r",
        config.r,
        f"PiSSA on {name} {w.shape} takes at most {min(w.shape) // 2}: what it "
        "learns is saved as an ordinary adapter of rank 2r",
    )
    residual, a, b = pissa(w, config.r, config.scaling)
    weight = (
        DenseWeight(Parameter(f"{name}.weight", residual).freeze())
        if quant is None
        else quantize_weight(residual, quant)
    )
    return Linear(name, weight), a, b


# --- which parts of a model train ---------------------------------------------------------------------------


@single_blas()
def inject_lora(
    model: Transformer, config: LoraConfig, rng: np.random.Generator, quant: QuantConfig | None = None
) -> Transformer:
    """Return a new model with adapters on ``target_modules``; it shares the base's arrays, which become
    read-only.

    A target matches a module's own name (``q_proj``) or the end of its full name
    (``layers.3.self_attn.q_proj``). With ``quant`` the projections of a dense base are quantized in the same
    step, which LoftQ needs (PiSSA may have it). Several adapters over one base are several injected models.
    Raises ConfigError if nothing matches, if the model is already injected, or if QA-LoRA finds a base
    without a float offset.
    """
    names = [name for name, _ in model.linears()]
    for name, linear in model.linears():
        if isinstance(linear, LoraLinear):
            raise ConfigError(
                f"model: already injected ({name} has an adapter); inject into the base, once for each adapter"
            )
    for field in ("target_modules", "rank_pattern", "alpha_pattern"):
        _check_targets(field, tuple(getattr(config, field)), names)
    if quant is not None and any(not isinstance(linear.weight, DenseWeight) for _, linear in model.linears()):
        raise ConfigError(
            "quant: the base is quantized already, and would be rounded twice; leave it out, or give a dense model"
        )
    frozen = model.map_parameters(Parameter.freeze)
    chosen = {name for name in names if any(matches(name, target) for target in config.target_modules)}
    if quant is not None:  # PiSSA and LoftQ start from the dense weight, and quantize it themselves
        frozen = quantize_model(
            frozen, quant, only=set(names) - chosen if config.init_lora_weights in SVD_INITS else None
        )

    def adapt(linear: Linear) -> Linear | LoraLinear:
        if linear.name not in chosen:
            return linear
        if not config.use_qalora:
            return LoraLinear(linear, config, rng, quant=None if linear is frozen.head else quant)
        group_size = offset_groups(linear.weight)
        if not group_size:
            why = (
                "a tied head shares the embedding's table"
                if linear.weight is frozen.embedding.weight
                else f"{linear.name} is stored as {getattr(linear.weight, 'quant_type', type(linear.weight).__name__)}"
            )
            raise ConfigError(
                f"use_qalora=True: needs a base weight with a float offset for each group, but {why}; quantize "
                "the base to int2, int3, int4 or int8 (Q4_1 will do as it is), or leave it out of target_modules"
            )
        return LoraLinear(linear, config, rng, pool=group_size)

    return frozen.map_linears(adapt)


def offset_groups(weight: Any) -> int:
    """Inputs that share one float offset, into which QA-LoRA merges; 0 for a weight without offsets."""
    return getattr(weight, "offset_group", 0)


def full(model: Transformer) -> Transformer:
    """Full fine-tuning: a new model in which every parameter is a trainable copy."""
    _refuse_quantized(model, "full")
    return model.map_parameters(Parameter.thaw)


def subset(model: Transformer, modules: tuple[str, ...]) -> Transformer:
    """Fine-tune chosen modules only: trainable copies of the parameters whose name contains one of
    ``modules`` as whole parts.

    ``("layers.3",)`` is the last block of four; ``("q_proj", "v_proj")`` are two projections of every block.
    """
    _refuse_quantized(model, "subset")
    names = [p.name.removesuffix(".weight") for p in model.parameters()]
    for module in modules:
        if not any(f".{module}." in f".{name}." for name in names):
            raise ConfigError(f"modules={module!r}: matches nothing; there are {', '.join(names)}")
    require(len(modules) > 0, "modules", modules, "name at least one module")

    def choose(p: Parameter) -> Parameter:
        name = p.name.removesuffix(".weight")
        return p.thaw() if any(f".{module}." in f".{name}." for module in modules) else p.freeze()

    return model.map_parameters(choose)


def _check_targets(field: str, targets: tuple[str, ...], names: list[str]) -> None:
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for target in targets:
        if targets == LINEAR_MODULES and target == "gate_proj":
            continue  # "all-linear" means all that there are: the two-matrix MLP has no gate
        if not any(matches(name, target) for name in names):
            raise ConfigError(
                f"{field}={target!r}: matches no module; there are {', '.join(kinds)} "
                f"(or full names such as {names[0]})"
            )


def _refuse_quantized(model: Transformer, method: str) -> None:
    for name, linear in model.linears():
        if not isinstance(getattr(linear, "weight", None), DenseWeight):
            raise ConfigError(
                f"method={method!r}: {name} is {'adapted' if isinstance(linear, LoraLinear) else 'quantized'}; "
                "gradients of W need a dense base model"
            )
