"""AdamW, SGD, the bytes that they keep, the learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.config import OPTIMIZERS, TrainConfig, require
from minilora.kernels.adamw import adamw
from minilora.layers import Array, Gradients, Parameter
from minilora.quant.codebooks import dynamic_map
from minilora.threads import Workers
from minilora.training.states import (
    CHUNK,
    MIN_8BIT_SIZE,
    BlockwiseMoment,
    FloatMoment,
    Layout,
    Moment,
    blocks_of,
    piece,
    pieces,
    zeros_in_file,
    zeros_in_memory,
)

FASTER = ("lora_B.weight", "lora_magnitude_vector")
"""Whose learning rate LoRA+ multiplies: B's, and as in PEFT that of DoRA's lengths."""


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101, Algorithm 2).

    m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  p ← p − lr·(m̂ / (√v̂ + eps) + λp),  m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ)

    State: two arrays for each trainable parameter, none for a frozen one. ``config.optimizer`` says how they
    are kept: in 8 bits, rounded after each step (p moves by what they were before); paged, in a file in
    ``folder``. The step is the same.
    """

    def __init__(self, parameters: Sequence[Parameter], config: TrainConfig, folder: Path | None = None):
        self.parameters, self.config, self.t = list(parameters), config, 0
        layout = state_layout(self.parameters, config.optimizer)
        self._arrays = (
            zeros_in_file(layout, folder) if config.optimizer.startswith("paged") else zeros_in_memory(layout)
        )
        self._cuts = [pieces(p.data.size) for p in self.parameters]
        self._m, self._v = ([self._moment(kind, p) for p in self.parameters] for kind in ("m", "v"))

    def _moment(self, kind: str, p: Parameter) -> Moment:
        values, absmax = self._arrays[f"{kind}.{p.name}"], self._arrays.get(f"{kind}_absmax.{p.name}")
        return (
            FloatMoment(values)
            if absmax is None
            else BlockwiseMoment(values, absmax, kind == "m", p.data.dtype)
        )

    def state(self) -> dict[str, Array]:
        """Named state arrays, the live ones."""
        return dict(self._arrays)

    def code_maps(self) -> list[Array]:
        """The maps that 8-bit states are decoded with, if any are: shared by all, and the first by double
        quantization, too."""
        quantized = any(a.dtype == np.uint8 for a in self._arrays.values())
        return [dynamic_map(signed) for signed in (True, False)] if quantized else []

    def step(self, grads: Gradients, lr: float, workers: Workers | None = None) -> None:
        """Update every parameter in place; states that are decoded by one thread, since each would need
        memory for it."""
        self.t += 1
        numbers: dict[Any, _Numbers] = {}  # once a step for each type and rate, not once a parameter
        for p in self.parameters:
            key = p.data.dtype, _rate(p, lr, self.config)
            if key not in numbers:
                numbers[key] = _Numbers.at(self.t, self.config, *key)

        def one(job: tuple[Parameter, Moment, Moment, list[slice]]) -> None:
            p, m, v, cuts = job
            for where in cuts:
                _step_piece(where, p.data, grads[p], m, v, numbers[p.data.dtype, _rate(p, lr, self.config)])

        jobs = list(zip(self.parameters, self._m, self._v, self._cuts, strict=True))
        several = workers if workers is not None and self.config.optimizer == "adamw" else Workers(1)
        several.map_arrays(one, jobs, [p.data.size for p in self.parameters])


class _Numbers(NamedTuple):
    """What a step of AdamW multiplies by, in the parameters' type: a float64 would make float64 of them."""

    beta1: Any
    rest1: Any
    beta2: Any
    rest2: Any
    correct_v: Any
    eps: Any
    rate: Any
    decay: Any

    @classmethod
    def at(cls, t: int, c: TrainConfig, dtype: Any, lr: float) -> _Numbers:
        one, rate = dtype.type, dtype.type(lr)
        return cls(
            one(c.beta1),
            one(1 - c.beta1),
            one(c.beta2),
            one(1 - c.beta2),
            one(1 - c.beta2**t),
            one(c.eps),
            rate / one(1 - c.beta1**t),
            rate * one(c.weight_decay),
        )


def _step_piece(where: slice, data: Array, grad: Array, m: Moment, v: Moment, n: _Numbers) -> None:
    """Decode, update, encode; what it decoded is gone before the next piece."""
    p, m_piece, v_piece = piece(data, where), m.read(where), v.read(where)
    adamw(piece(grad, where), *n, p, m_piece, v_piece)
    m.write(where, m_piece)
    v.write(where, v_piece)
    if p.base is None:  # a copy
        data.flat[where] = p


class SGD:
    """Stochastic gradient descent with momentum: u ← μu + g;  p ← p − lr·(u + λp). Without momentum it keeps no state."""

    def __init__(self, parameters: Sequence[Parameter], config: TrainConfig):
        self.parameters, self.config, self.t = list(parameters), config, 0
        self.u = [np.zeros(p.data.shape, p.data.dtype) for p in self.parameters] if config.momentum else []

    def state(self) -> dict[str, Array]:
        """Named state arrays, the live ones."""
        return {f"u.{p.name}": u for p, u in zip(self.parameters, self.u, strict=True)} if self.u else {}

    def code_maps(self) -> list[Array]:
        """None: nothing is quantized."""
        return []

    def step(self, grads: Gradients, lr: float, workers: Workers | None = None) -> None:
        """Update every parameter in place, in this thread."""
        c = self.config
        self.t += 1
        for i, p in enumerate(self.parameters):
            one, scratch = p.data.dtype.type, np.empty(min(p.data.size, CHUNK), p.data.dtype)
            rate = one(_rate(p, lr, c))
            for where in pieces(p.data.size):
                x, g = piece(p.data, where), piece(grads[p], where)
                if self.u:
                    u = piece(self.u[i], where)
                    u *= one(c.momentum)
                    u += g
                    g = u
                update = np.multiply(one(c.weight_decay), x, out=scratch[: x.size])
                update += g
                update *= rate
                x -= update
                if x.base is None:  # a copy
                    p.data.flat[where] = x


Optimizer = AdamW | SGD


def make_optimizer(
    parameters: Sequence[Parameter], config: TrainConfig, folder: Path | None = None
) -> Optimizer:
    """The optimizer that the configuration names; a paged one keeps its file in ``folder``, or among the
    temporary files."""
    return SGD(parameters, config) if config.optimizer == "sgd" else AdamW(parameters, config, folder)


def state_layout(parameters: Sequence[Parameter], optimizer: str, momentum: bool = False) -> Layout:
    """Shape and dtype of each state array, by its name in ``state()``."""
    layout: Layout = {}
    for kind in ("u",) * momentum if optimizer == "sgd" else ("m", "v"):
        for p in parameters:
            in_8bit = _in_8bit(optimizer, p.data.size)
            layout[f"{kind}.{p.name}"] = p.data.shape, np.dtype(np.uint8) if in_8bit else p.data.dtype
            if in_8bit:
                layout[f"{kind}_absmax.{p.name}"] = (blocks_of(p.data.size),), np.dtype(np.float32)
    return layout


def state_bytes(
    optimizer: str, sizes: Iterable[int], itemsize: int = 4, momentum: bool = False
) -> dict[str, int]:
    """What an optimizer holds for parameters of these numbers of elements, in bytes, without making it.

    AdamW has m and v for every element: 2·itemsize bytes, or in 8 bits 2, and 2·4 for each block of 256: 2.03
    instead of 8. ``states`` and ``absmax`` lie in memory, or else ``on_disk``; ``maps`` are the two code maps
    of 256 float32; ``scratch`` is the most that a step needs besides, for the one piece that it works on.
    ``momentum`` gives SGD one array.

    >>> state_bytes("adamw", [4096])
    {'states': 32768, 'absmax': 0, 'maps': 0, 'scratch': 0, 'on_disk': 0}
    >>> state_bytes("adamw_8bit", [4096])
    {'states': 8192, 'absmax': 128, 'maps': 2048, 'scratch': 32768, 'on_disk': 0}
    >>> state_bytes("adamw_8bit", [4095]) == state_bytes("adamw", [4095])  # too small to be quantized
    True
    """
    require(optimizer in OPTIMIZERS, "optimizer", optimizer, "choose one of " + ", ".join(OPTIMIZERS))
    found = dict.fromkeys(("states", "absmax", "maps", "scratch", "on_disk"), 0)
    for size in sizes:
        chunk = min(size, CHUNK)
        if optimizer == "sgd":
            found["states"] += size * itemsize if momentum else 0
            scratch = chunk * itemsize
        elif _in_8bit(optimizer, size):
            found["states"] += 2 * size
            found["absmax"] += 2 * blocks_of(size) * 4
            found["maps"] = 2 * 256 * 4
            scratch = 2 * chunk * itemsize + (chunk * 4 if itemsize != 4 else 0)  # m and v decoded
        else:
            found["states"] += 2 * size * itemsize
            scratch = 0
        found["scratch"] = max(found["scratch"], scratch)
    if optimizer.startswith("paged"):
        found |= {"on_disk": found["states"] + found["absmax"], "states": 0, "absmax": 0}
    return found


def _in_8bit(optimizer: str, size: int) -> bool:
    return optimizer.endswith("8bit") and size >= MIN_8BIT_SIZE


def _rate(p: Parameter, lr: float, config: TrainConfig) -> float:
    """The learning rate of one parameter: LoRA+ multiplies that of some."""
    return lr * (config.lora_plus_ratio if p.name.endswith(FASTER) else 1.0)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, …: linear warm-up, then constant or a cosine down to zero (arXiv 1608.03983, eq. 5).

    >>> [round(learning_rate(s, TrainConfig(steps=4, warmup_steps=2, learning_rate=1.0)), 2) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < config.warmup_steps:
        return config.peak_learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.peak_learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def clip_(grads: Gradients, max_norm: float, workers: Workers | None = None) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm`` (arXiv 1211.5063); return the norm
    before."""
    several, arrays = workers or Workers(1), list(grads.values())
    sizes = [g.size for g in arrays]
    norm = math.sqrt(sum(several.map_arrays(lambda g: float(np.vdot(g, g)), arrays, sizes)))
    if max_norm < norm < math.inf:  # infinity is left for the trainer to report
        several.map_arrays(lambda g: np.multiply(g, g.dtype.type(max_norm / norm), out=g), arrays, sizes)
    return norm
