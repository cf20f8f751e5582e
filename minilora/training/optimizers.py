"""AdamW, SGD, the learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minilora.config import TrainConfig
from minilora.layers import Array, Gradients, Parameter

FASTER = ("lora_B.weight", "lora_magnitude_vector")
"""Whose learning rate LoRA+ multiplies: B's, and as in PEFT that of DoRA's lengths."""


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101, Algorithm 2).

    m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  p ← p − lr·(m̂ / (√v̂ + eps) + λp),  m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ)

    State: two arrays for each trainable parameter, none for a frozen one.
    """

    def __init__(self, parameters: Sequence[Parameter], config: TrainConfig):
        self.parameters, self.config, self.t = list(parameters), config, 0
        self.m = [np.zeros_like(p.data) for p in self.parameters]
        self.v = [np.zeros_like(p.data) for p in self.parameters]

    def state(self) -> dict[str, Array]:
        """Named state arrays, the live ones."""
        named = {f"m.{p.name}": m for p, m in zip(self.parameters, self.m, strict=True)}
        return named | {f"v.{p.name}": v for p, v in zip(self.parameters, self.v, strict=True)}

    def step(self, grads: Gradients, lr: float) -> None:
        """Update every parameter in place."""
        c = self.config
        self.t += 1
        correct_m, correct_v = 1 - c.beta1**self.t, 1 - c.beta2**self.t
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            g, one = grads[p], p.data.dtype.type
            rate = one(lr * (c.lora_plus_ratio if p.name.endswith(FASTER) else 1.0))  # LoRA+
            m *= one(c.beta1)
            m += one(1 - c.beta1) * g
            v *= one(c.beta2)
            v += one(1 - c.beta2) * g * g
            update = np.sqrt(v / one(correct_v))
            update += one(c.eps)
            np.divide(m, update, out=update)
            update *= rate / one(correct_m)
            if c.weight_decay:
                update += rate * one(c.weight_decay) * p.data
            p.data -= update


class SGD:
    """Stochastic gradient descent with momentum: u ← μu + g;  p ← p − lr·(u + λp). Without momentum it keeps no state."""

    def __init__(self, parameters: Sequence[Parameter], config: TrainConfig):
        self.parameters, self.config, self.t = list(parameters), config, 0
        self.u = [np.zeros_like(p.data) for p in self.parameters] if config.momentum else []

    def state(self) -> dict[str, Array]:
        """Named state arrays, the live ones."""
        return {f"u.{p.name}": u for p, u in zip(self.parameters, self.u, strict=True)} if self.u else {}

    def step(self, grads: Gradients, lr: float) -> None:
        """Update every parameter in place."""
        c = self.config
        self.t += 1
        for i, p in enumerate(self.parameters):
            g, one = grads[p], p.data.dtype.type
            rate = one(lr * (c.lora_plus_ratio if p.name.endswith(FASTER) else 1.0))
            if self.u:
                self.u[i] *= one(c.momentum)
                self.u[i] += g
                g = self.u[i]
            p.data -= rate * (g + one(c.weight_decay) * p.data)


Optimizer = AdamW | SGD


def make_optimizer(parameters: Sequence[Parameter], config: TrainConfig) -> Optimizer:
    """The optimizer that the configuration names."""
    return (AdamW if config.optimizer == "adamw" else SGD)(parameters, config)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, …: linear warm-up, then constant or a cosine down to zero (arXiv 1608.03983, eq. 5).

    >>> [round(learning_rate(s, TrainConfig(steps=4, warmup_steps=2, learning_rate=1.0)), 2) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def clip_(grads: Gradients, max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm`` (arXiv 1211.5063); return the norm before."""
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
    if max_norm < norm < math.inf:  # infinity is left for the trainer to report
        for g in grads.values():
            g *= g.dtype.type(max_norm / norm)
    return norm
