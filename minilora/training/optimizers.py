"""AdamW, the choice of an optimizer, and gradient clipping.

`states` and `paging` say how states are kept in 8 bits or on disk; the step is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from minilora import functional
from minilora.config import TrainConfig
from minilora.kernels import is_plain
from minilora.parameters import Array, Gradients, Parameter
from minilora.threads import Workers
from minilora.training.schedule import parameter_rate
from minilora.training.sgd import SGD
from minilora.training.states import make_moments, piece, pieces, put_piece


class AdamW:
    """Adam with decoupled weight decay; the formula is `functional.adamw`.

    Two moments for each trainable parameter, none for a frozen one. 8-bit moments are rounded after each
    step: p moves by the numbers before rounding.

    Parameters
    ----------
    parameters : sequence of Parameter
        Those with `trainable=False` are left out.
    config : TrainConfig
        `optimizer` says how the moments are kept: adamw, adamw_8bit, paged_adamw, paged_adamw_8bit.
    folder : Path, optional
        Where a paged optimizer keeps its file; by default among the temporary files.

    References
    ----------
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, Algorithm 2.
    """

    def __init__(self, parameters: Sequence[Parameter], config: TrainConfig, folder: Path | None = None):
        self.parameters = [p for p in parameters if p.trainable]
        self.config, self.t = config, 0
        self._arrays, self._moments = make_moments(self.parameters, config.optimizer, folder)

    def state(self) -> dict[str, Array]:
        """Return the live state arrays by name."""
        return dict(self._arrays)

    def step(self, grads: Gradients, lr: float, workers: Workers | None = None) -> None:
        """Update every parameter in place.

        States in 8 bits or on disk are updated by one thread, since each thread would need memory for them.
        """
        self.t += 1
        c, t, update = self.config, self.t, _adamw()

        def one(index: int) -> None:
            p, (m, v) = self.parameters[index], self._moments[index]
            rate = parameter_rate(p, lr, c)
            for where in pieces(p.data.size):
                x, g = piece(p.data, where), piece(grads[p], where)
                m_piece, v_piece = m.read(where), v.read(where)
                update(x, g, m_piece, v_piece, t, rate, c)
                put_piece(p.data, where, x)
                m.write(where, m_piece)
                v.write(where, v_piece)
                del m_piece, v_piece  # decoded, they are gone before the next piece

        several = workers if workers is not None and c.optimizer == "adamw" else Workers(1)
        several.map_arrays(one, range(len(self.parameters)), [p.data.size for p in self.parameters])


def _adamw() -> Callable[..., None]:
    """Return `functional.adamw`, or the kernel that does the same in one pass over memory."""
    if is_plain():
        return functional.adamw
    from minilora.kernels.adamw import adamw

    return adamw


Optimizer = AdamW | SGD


def make_optimizer(
    parameters: Sequence[Parameter], config: TrainConfig, folder: Path | None = None
) -> Optimizer:
    """Return the optimizer that the configuration names; a paged one keeps its file in `folder`."""
    return SGD(parameters, config) if config.optimizer == "sgd" else AdamW(parameters, config, folder)


def clip_(grads: Gradients, max_norm: float, workers: Workers | None = None) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm`; return the norm before.

    Infinity is left as it is, for the trainer to report (arXiv 1211.5063).
    """
    several, arrays = workers or Workers(1), list(grads.values())
    sizes = [g.size for g in arrays]
    norm = math.sqrt(sum(several.map_arrays(lambda g: float(np.vdot(g, g)), arrays, sizes)))
    if max_norm < norm < math.inf:
        several.map_arrays(lambda g: np.multiply(g, g.dtype.type(max_norm / norm), out=g), arrays, sizes)
    return norm
