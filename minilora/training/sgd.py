"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora.config import TrainConfig
from minilora.parameters import Array, Gradients, Parameter
from minilora.threads import Workers
from minilora.training.schedule import parameter_rate
from minilora.training.states import piece, pieces, put_piece, state_layout


class SGD:
    """Stochastic gradient descent with momentum: u ← μu + g;  p ← p − lr·(u + λp).

    It keeps u for each trainable parameter, and no state without momentum (`config.momentum` = 0).
    """

    def __init__(self, parameters: Sequence[Parameter], config: TrainConfig):
        self.parameters = [p for p in parameters if p.trainable]
        self.config, self.t = config, 0
        layout = state_layout(self.parameters, "sgd", config.momentum > 0)
        self._arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}

    def state(self) -> dict[str, Array]:
        """Return the live state arrays by name."""
        return dict(self._arrays)

    def step(self, grads: Gradients, lr: float, workers: Workers | None = None) -> None:
        """Update every parameter in place, in this thread."""
        c = self.config
        self.t += 1
        for p in self.parameters:
            u, rate = self._arrays.get(f"u.{p.name}"), parameter_rate(p, lr, c)
            for where in pieces(p.data.size):
                x, step = piece(p.data, where), piece(grads[p], where)
                if u is not None:
                    momentum = piece(u, where)
                    momentum *= c.momentum
                    momentum += step
                    step = momentum
                update = c.weight_decay * x
                update += step
                update *= rate
                x -= update
                put_piece(p.data, where, x)
                del update  # one piece of scratch at a time
