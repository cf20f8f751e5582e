"""What both sides compute: sizes, weights, batches, adapters and runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minilora.building import parameter_shapes
from minilora.config import LINEAR_MODULES, ModelConfig, TrainConfig
from minilora.data.tasks import Batch

METHODS = ("full", "lora", "qlora", "qalora")
R, ALPHA, GROUP_SIZE = 8, 16.0, 32
LEARNING_RATE, MAX_NORM = 1e-3, 1.0
EVAL_BATCHES = 4


@dataclass(frozen=True)
class Size:
    """A model and the batch (sequences × tokens) that it is trained on."""

    config: ModelConfig
    batch: int
    time: int

    @property
    def tokens(self) -> int:
        return self.batch * self.time


def _size(
    batch: int, time: int, vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int
) -> Size:
    return Size(ModelConfig(vocab, hidden, mlp, layers, heads, kv_heads, context_length=time), batch, time)


SIZES = {
    "micro": _size(2, 8, 64, 64, 128, 2, 2, 1),  # for the tests
    "tiny": _size(16, 128, 256, 128, 512, 4, 4, 4),
    "small": _size(8, 256, 1024, 256, 1024, 6, 8, 8),
    "smollm": _size(2, 128, 49152, 576, 1536, 30, 9, 3),  # the shape of SmolLM2-135M
}


def weights(size: Size) -> dict[str, np.ndarray]:
    """Return random weights that make every layer's output and gradient of order one.

    Rounding is then compared fairly.
    """
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in parameter_shapes(size.config).items():
        array = rng.standard_normal(shape, np.float32)
        found[name] = 1 + np.float32(0.1) * array if len(shape) == 1 else array * np.float32(shape[1] ** -0.5)
    return found


def projections(size: Size) -> dict[str, tuple[int, int]]:
    """Return module name → (out, in) of what is quantized and adapted."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in parameter_shapes(size.config).items()
        if name.split(".")[-2] in LINEAR_MODULES
    }


def wide(values: dict[str, np.ndarray], group_size: int = GROUP_SIZE) -> dict[str, np.ndarray]:
    """Return QA-LoRA's adapters as LoRA's that compute the same: A is repeated over each group."""
    return {name: np.repeat(a, group_size, axis=-1) if "lora_A" in name else a for name, a in values.items()}


def adapters(size: Size, pool: int = 1, r: int = R, seed: int = 1) -> dict[str, np.ndarray]:
    """Return A (r, in/pool) and B (out, r) of each projection; with B = 0, A would have no gradient."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (out, in_) in projections(size).items():
        found[f"{name}.lora_A.weight"] = rng.standard_normal((r, in_ // pool), np.float32) * np.float32(
            (3 * in_) ** -0.5
        )
        found[f"{name}.lora_B.weight"] = rng.standard_normal((out, r), np.float32) * np.float32(0.02)
    return found


def flop(size: Size, method: str, r: int = R) -> int:
    """Return the floating-point operations that one training step cannot avoid.

    A product takes 2 for each weight and token: forward, for the gradient of its input and, where the weight
    trains, for its own. So 4 for each linear and head weight (6 with `full`) and 6 for each adapter weight.
    Causal attention has two products forward and four backward, over half of T × T: 6·T²·heads·head_dim for
    each sequence and layer.

    >>> round(flop(SIZES["tiny"], "lora") / 1e9, 3)
    10.821
    """
    c, pool = size.config, GROUP_SIZE if method == "qalora" else 1
    shapes = projections(size).values()
    weights = sum(out * in_ for out, in_ in shapes) + c.vocab_size * c.hidden_size
    adapted = 0 if method == "full" else sum(r * (in_ // pool + out) for out, in_ in shapes)
    attention = 6 * size.time**2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * size.batch
    return ((6 if method == "full" else 4) * weights + 6 * adapted) * size.tokens + attention


def batch(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and targets (B, T); every target counts."""
    rng = np.random.default_rng(2)
    shape = (size.batch, size.time)
    return rng.integers(size.config.vocab_size, size=shape), rng.integers(size.config.vocab_size, size=shape)


def rounding(size: Size) -> float:
    """Return the relative error that float32 allows a gradient: eps · Σ √n over the sums of n products.

    Independent roundings of eps/2 add up like a random walk.
    """
    c = size.config
    layer = 8 * c.hidden_size**0.5 + 2 * c.intermediate_size**0.5 + 4 * size.time**0.5
    chain = c.num_hidden_layers * layer + c.vocab_size**0.5 + size.tokens**0.5
    return float(np.finfo(np.float32).eps) * chain


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference in units of the largest expected element.

    It is infinite if anything is not finite or the shapes differ.

    >>> difference(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    0.5
    >>> difference(np.array([np.nan]), np.array([1.0]))
    inf
    """
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    scale = float(np.abs(expected).max())
    return float(np.abs(found - expected).max()) / scale if scale else float("inf")


def matrices(n: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight (n, n) and an input (batch, n) for the kernels."""
    rng = np.random.default_rng(3)
    return rng.standard_normal((n, n), np.float32), rng.standard_normal((batch, n), np.float32)


def real_text() -> str:
    """Return prose: the chapter "Execution model" of Python's language reference, which every Python has."""
    from pydoc_data.topics import topics

    return topics["execmodel"]


def prompts(n: int, length: int = 32) -> list[list[int]]:
    """Return byte prompts for generation: lower-case letters and spaces."""
    rng = np.random.default_rng(4)
    return [
        rng.choice(np.frombuffer(b"abcdefghijklmnopqrstuvwxyz    ", np.uint8), length).tolist()
        for _ in range(n)
    ]


# ---- the grid of runs


@dataclass(frozen=True)
class Run:
    """One run of the grid, as `run_sweep` takes it: columns, and a key."""

    method: str
    r: int
    learning_rate: float
    seed: int
    size: str = "tiny"
    steps: int = 100
    task: str = "text"

    def key(self) -> str:
        return f"{self.size}-{self.steps}-{self.method}-{self.r}-{self.learning_rate:g}-{self.seed}"

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"quant_type": "nf4" if self.method == "qlora" else None}

    def train(self) -> TrainConfig:
        """Return the settings of the trainer; the batch is that of the size."""
        return TrainConfig(
            self.steps,
            SIZES[self.size].batch,
            self.learning_rate,
            schedule="constant",
            warmup_steps=0,
            max_grad_norm=MAX_NORM,
            seed=self.seed,
        )

    def adapters(self) -> dict[str, np.ndarray]:
        """Return the adapters that both sides start from."""
        return adapters(SIZES[self.size], r=self.r, seed=self.seed)


class Text:
    """Windows of prose, one byte per token: both sides train on nine tenths and are judged by the rest."""

    name, sha256, splits, max_new_tokens = "text", "", ("test",), 0

    def __init__(self, size: Size, n_train: int = 1600):
        text = np.frombuffer(real_text().encode(), np.uint8).astype(np.int64) % size.config.vocab_size
        self.size, self.n_train = size, n_train
        held_out = len(text) // 10
        self.rows, self.held_out = (
            self._windows(text[held_out:], n_train),
            self._windows(text[:held_out], EVAL_BATCHES * size.batch),
        )

    def _windows(self, text: np.ndarray, n: int) -> np.ndarray:
        starts = np.linspace(0, len(text) - self.size.time - 1, n).astype(int)
        return text[starts[:, None] + np.arange(self.size.time + 1)]

    def batch(self, indices: Any) -> Batch:
        return self._batch(self.rows[np.asarray(indices)])

    def eval_batches(self, split: str, batch_size: int = 0) -> list[Batch]:
        return [self._batch(rows) for rows in np.split(self.held_out, EVAL_BATCHES)]

    @staticmethod
    def _batch(rows: np.ndarray) -> Batch:
        return Batch(rows[:, :-1], rows[:, 1:], np.ones((len(rows), rows.shape[1] - 1), bool))

    def prompts(self, split: str) -> list[list[int]]:
        return []

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        return {}
