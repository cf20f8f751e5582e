"""The examples and the learning rate of each step."""

from __future__ import annotations

import math

import numpy as np

from minilora.config import TrainConfig
from minilora.parameters import Parameter

LORA_PLUS = ("lora_B.weight", "lora_magnitude_vector")
"""Ends of the names whose rate LoRA+ multiplies (arXiv 2402.12354): B and, as in PEFT, DoRA's lengths."""


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return the examples of one step: each epoch is a fresh permutation of 0…n−1, cut into batches.

    >>> sorted(np.concatenate([batch_indices(6, 2, s, seed=0) for s in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, 1, epoch]).permutation(n) for epoch in set((places // n).tolist())
    }
    return np.array([orders[place // n][place % n] for place in places.tolist()])


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then constant or a cosine to zero.

    The cosine is eq. 5 of arXiv 1608.03983.

    >>> config = TrainConfig(steps=4, warmup_steps=2, learning_rate=1.0)
    >>> [round(learning_rate(step, config), 2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < config.warmup_steps:
        return config.peak_learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.peak_learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def parameter_rate(p: Parameter, lr: float, config: TrainConfig) -> float:
    """Return the learning rate of one parameter: LoRA+ multiplies B's."""
    return float(lr) * (config.lora_plus_ratio if p.name.endswith(LORA_PLUS) else 1.0)
