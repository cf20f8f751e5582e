"""Two adapters of one's own: LoRA-FA and VeRA. `docs/adapter.md` explains them, and a test trains them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import minilora
from minilora.adapter import Adapter
from minilora.functional import flat
from minilora.layers import Cache, Key, Linear
from minilora.parameters import Array, Gradients, Parameter


class LoraFALinear(Adapter):
    """LoRA with A frozen (LoRA-FA, arXiv 2308.03303): it keeps h = x Aᵀ, r numbers for each token."""

    def __init__(self, base: Linear, r: int, scaling: float, rng: np.random.Generator):
        super().__init__(base)
        (out, in_), dtype = base.shape, base.weight.dtype
        self.scaling = scaling
        self.a = (rng.standard_normal((r, in_)) / in_**0.5).astype(dtype)
        self.lora_B = Parameter(f"{base.name}.lora_B.weight", np.zeros((out, r), dtype), trainable=True)

    def trained(self) -> list[Parameter]:
        """Return B."""
        return [self.lora_B]

    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        """Return base(x) + s·x Aᵀ Bᵀ."""
        h = self.scaling * (x @ self.a.T)
        return self.base.weight.matmul(x, h @ self.lora_B.data.T), (h,)

    def backward(
        self, dy: Array, cache: Cache, grads: Gradients, need_dx: bool = True, onto: Array | None = None
    ) -> Any:
        """Add dB and return dx."""
        (h,) = cache
        # y = base(x) + h Bᵀ
        grads.add(self.lora_B, flat(dy).T @ flat(h))
        if not need_dx:
            return None
        # h = s·x Aᵀ
        return self.base.weight.matmul_t(dy, self.scaling * (dy @ self.lora_B.data) @ self.a, onto)

    def delta(self) -> Array:
        """Return s·B A."""
        return self.scaling * self.lora_B.data.astype(np.float64) @ self.a


class VeraLinear(Adapter):
    """VeRA (arXiv 2310.11454): y = base(x) + v ∘ B (d ∘ A x), with shared random A and B."""

    def __init__(self, base: Linear, a: Array, b: Array):
        super().__init__(base)
        out, in_ = base.shape
        self.a, self.b = a[:, :in_], b[:out]  # parts of one A and one B for the whole model
        self.d = Parameter(f"{base.name}.vera_d", np.full(len(a), 0.1, a.dtype), trainable=True)
        self.v = Parameter(f"{base.name}.vera_v", np.zeros(out, a.dtype), trainable=True)

    def trained(self) -> list[Parameter]:
        """Return d and v."""
        return [self.d, self.v]

    def forward(self, x: Array, key: Key = None) -> tuple[Array, Cache]:
        """Return base(x) + v ∘ z."""
        h = x @ self.a.T
        z = (self.d.data * h) @ self.b.T
        return self.base.weight.matmul(x, self.v.data * z), (h, z)

    def backward(
        self, dy: Array, cache: Cache, grads: Gradients, need_dx: bool = True, onto: Array | None = None
    ) -> Any:
        """Add dd and dv, and return dx."""
        h, z = cache
        # y = base(x) + v ∘ z
        grads.add(self.v, flat(dy * z).sum(axis=0))
        dz = dy * self.v.data
        # z = (d ∘ h) bᵀ
        dh = dz @ self.b
        grads.add(self.d, flat(dh * h).sum(axis=0))
        if not need_dx:
            return None
        # h = x aᵀ
        return self.base.weight.matmul_t(dy, (self.d.data * dh) @ self.a, onto)

    def delta(self) -> Array:
        """Return diag(v) B diag(d) A."""
        d, v = (p.data.astype(np.float64) for p in (self.d, self.v))
        return (v[:, None] * self.b) @ (d[:, None] * self.a)


def vera_matrices(r: int, widest: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw the shared A (r, widest) and B (widest, r), kaiming-uniform as in the paper."""
    bound = (6 / widest) ** 0.5
    a, b = rng.uniform(-bound, bound, (r, widest)), rng.uniform(-bound, bound, (widest, r))
    return a.astype(np.float32), b.astype(np.float32)


@dataclass(frozen=True)
class VeraRun:
    """One run of a sweep over VeRA's rank: `run_sweep` asks for its key and for the columns of its row."""

    r: int
    seed: int = 0
    steps: int = 120
    learning_rate: float = 3e-2
    n_eval: int = 100

    def key(self) -> str:
        """Return what tells this run from any other."""
        return f"vera-{self.r}-{self.seed}-{self.steps}-{self.learning_rate:g}-{self.n_eval}"

    def row(self) -> dict[str, Any]:
        """Return the run's settings as columns."""
        return asdict(self) | {"method": "vera", "task": "products"}


def run_vera(config: VeraRun, folder: str | None = None) -> dict[str, Any]:
    """Train, merge and measure one run; return the measured columns of its row."""
    rng = np.random.default_rng([config.seed, config.r])
    task = minilora.make_task("products", n_eval=config.n_eval)
    a, b = vera_matrices(config.r, 512, rng)
    model = minilora.inject(minilora.load_base(), lambda linear: VeraLinear(linear, a, b))
    settings = minilora.TrainConfig(config.steps, learning_rate=config.learning_rate, seed=config.seed)
    minilora.Trainer(model, task, settings).train()
    batches = task.eval_batches("test")
    return {
        "loss": minilora.evaluate(model, batches)["loss"],
        "deployed_loss": minilora.evaluate(minilora.merge(model)[0], batches)["loss"],
        "trainable_params": minilora.memory.count_parameters(model)[0],
    }
