"""The learning rate of each step."""

from __future__ import annotations

import math

from minilora.config import TrainConfig


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
