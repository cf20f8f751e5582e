"""What several test files share: small models, a task in memory, tolerances. Functions, which parametrised
tests can call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minilora.adapter import Adapter
from minilora.building import build_model, parameter_shapes
from minilora.config import ModelConfig
from minilora.data.tasks import Batch
from minilora.layers import Linear
from minilora.parameters import DenseWeight, Parameter
from minilora.transformer import Transformer
from minilora.variants import lora_of

# The sizes are odd, and differ from one another, so that a transposed or mixed-up axis cannot fit by chance.
GQA = ModelConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    context_length=24,
    tie_word_embeddings=False,
)
CONFIGS = {
    "gqa untied": GQA,
    "mha tied": replace(GQA, num_key_value_heads=4, tie_word_embeddings=True),
    "mqa untied": replace(GQA, num_key_value_heads=1, rope_theta=500.0, rms_norm_eps=1e-3),
    "gelu tied": replace(GQA, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "gelu untied one head": replace(
        GQA, hidden_act="gelu_pytorch_tanh", hidden_size=6, num_attention_heads=1, num_key_value_heads=1
    ),
}


def close_rtol(dtype: Any, *lengths: int, factor: float = 8.0) -> float:
    """Relative error of a chain of sums of these lengths, in units of the largest term.

    A sum of n products errs by at most n·eps/2·Σ|ab| in any order (Higham, Accuracy and Stability, §3.1);
    independent roundings add up like a random walk, so √n·eps is what is met. ``factor`` is the safety margin
    on that.
    """
    return factor * float(np.finfo(dtype).eps) * sum(n**0.5 for n in lengths)


def assert_close(found: Any, expected: Any, rtol: float, what: str = "") -> None:
    """Compare relative to the largest expected magnitude, which is how the rounding of sums behaves."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    error = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale
    assert error <= rtol, f"{what}: relative error {error:.2e} > {rtol:.2e}"


def weights(config: ModelConfig, seed: int = 0, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Random arrays by name, large enough that every nonlinearity bends and every gradient is far from
    zero."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (1 + 0.3 * rng.standard_normal(shape))
            if len(shape) == 1
            else rng.standard_normal(shape) * (1.0 if "embed" in name else 1.5 / shape[1] ** 0.5)
        ).astype(dtype)
        for name, shape in parameter_shapes(config).items()
    }


def make_model(
    config: ModelConfig = GQA, seed: int = 0, dtype: Any = np.float64, trainable: bool = True
) -> Transformer:
    """A model of such arrays."""
    return build_model(config, weights(config, seed, dtype), trainable)


def make_linear(
    out: int, in_: int, seed: int = 0, dtype: Any = np.float64, trainable: bool = False, name: str = "q_proj"
) -> Linear:
    """A Linear over a random dense weight."""
    w = np.random.default_rng(seed).standard_normal((out, in_)).astype(dtype)
    return Linear(name, DenseWeight(Parameter(f"{name}.weight", w, trainable)))


def fill_adapters(model: Transformer | Adapter, seed: int = 1, dtype: Any = None) -> Any:
    """Give A and B random values, as if training had happened, and optionally another dtype; returns its
    argument."""
    rng = np.random.default_rng(seed)
    for linear in map(lora_of, adapters(model)):
        for p in (linear.lora_A, linear.lora_B):
            p.data = rng.standard_normal(p.data.shape).astype(dtype or p.data.dtype) * p.data.dtype.type(0.3)
    return model


def adapters(model: Transformer | Adapter) -> list[Any]:
    """The adapted linears."""
    if isinstance(model, Adapter):
        return [model]
    return [linear for _, linear in model.linears() if isinstance(linear, Adapter)]


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the bytes of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def base_arrays(model: Transformer) -> list[np.ndarray]:
    """Every array of the model that is no adapter: dense parameters, codes, scales, offsets."""
    found = [p.data for p in model.parameters() if ".lora_" not in p.name]
    for _, linear in model.linears():
        weight = linear.base.weight
        if not isinstance(weight, DenseWeight):
            found += [a for group in weight.arrays().values() for a in group]
    return found


def random_batch(
    config: ModelConfig = GQA, B: int = 3, T: int = 7, seed: int = 0, share: float = 0.6
) -> Batch:
    """Random ids, targets and mask (at least one target counts)."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < share
    mask[0, -1] = True
    return Batch(
        rng.integers(config.vocab_size, size=(B, T)), rng.integers(config.vocab_size, size=(B, T)), mask
    )


class FakeTask:
    """A task in memory with the protocol of minilora.data.tasks: short sequences whose next token is the last
    plus a step.

    The first two tokens are the prompt and do not count; lengths differ, so batches are padded on the right.
    """

    name = "fake"
    splits = ("validation", "test")
    max_new_tokens = 4

    def __init__(self, n_train: int = 12, vocab_size: int = 19, longest: int = 9, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.n_train = n_train

        def sequence() -> np.ndarray:
            start, step, length = rng.integers(vocab_size), rng.integers(1, 4), rng.integers(4, longest + 1)
            return (start + step * np.arange(length)) % vocab_size

        self.train = [sequence() for _ in range(n_train)]
        self.held_out = [sequence() for _ in range(6)]
        self.sha256 = digest(self.train + self.held_out)

    @staticmethod
    def _pad(sequences: Sequence[np.ndarray]) -> Batch:
        longest = max(map(len, sequences)) - 1
        ids, targets = (
            np.zeros((len(sequences), longest), np.int64),
            np.zeros((len(sequences), longest), np.int64),
        )
        mask = np.zeros((len(sequences), longest), bool)
        for i, s in enumerate(sequences):
            ids[i, : len(s) - 1], targets[i, : len(s) - 1] = s[:-1], s[1:]
            mask[i, 1 : len(s) - 1] = True
        return Batch(ids, targets, mask)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        return self._pad([self.train[int(i)] for i in indices])

    def eval_batches(self, split: str, batch_size: int = 32) -> list[Batch]:
        assert split in self.splits
        return [
            self._pad(self.held_out[i : i + batch_size]) for i in range(0, len(self.held_out), batch_size)
        ]

    def prompts(self, split: str) -> list[list[int]]:
        return [s[:2].tolist() for s in self.held_out]

    def score(self, split: str, completions: list[str]) -> dict[str, float]:
        return {}


def mutate(
    data: Any, arrays: dict[str, np.ndarray], dtypes: Sequence[Any], names: Sequence[str], extra: str
) -> str:
    """Damage one of a weight's named arrays as a file might be, by Hypothesis's ``data``; returns what was
    done.

    ``names`` are those that an array may also come under; ``extra`` is a kind that the caller carries out.
    """
    key = data.draw(st.sampled_from(sorted(arrays)))
    array = arrays[key].copy()
    kind = data.draw(st.sampled_from(["drop", "dtype", "shape", "value", "rename", "cut", "byte", extra]))
    if kind == "drop" and len(arrays) > 1:
        del arrays[key]
    elif kind == "dtype":
        with np.errstate(all="ignore"), suppress(ValueError):  # text may hold a number that is not whole
            arrays[key] = array.astype(data.draw(st.sampled_from(dtypes)))
    elif kind == "shape":
        shapes = [(-1,), (1, -1), (-1, 1), (1, 1, -1)] + [(2, -1)] * (array.size % 2 == 0)
        arrays[key] = array.reshape(data.draw(st.sampled_from(shapes)))
    elif kind == "value" and array.size:
        value = np.asarray(data.draw(st.sampled_from([0, 1, -1, 7, 100])))
        array.reshape(-1)[data.draw(st.integers(0, array.size - 1))] = value.astype(array.dtype)
        arrays[key] = array
    elif kind == "rename":
        arrays[data.draw(st.sampled_from(names))] = array
    elif kind == "cut" and array.ndim:
        axis = data.draw(st.integers(0, array.ndim - 1))
        arrays[key] = array.take(range(data.draw(st.integers(0, array.shape[axis]))), axis)
    elif kind == "byte" and array.dtype.kind in "fui" and array.size:
        raw = bytearray(array.tobytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        arrays[key] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    return kind


CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's 256 visible characters by byte: printable Latin-1 stands for itself, the others for U+0100 and
    on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def gguf_tokenizer(pre: str = "smollm", **changed: Any) -> dict[str, Any]:
    """Metadata of a GGUF with a small vocabulary: 3 control tokens, 256 bytes, merges, a user-defined and a
    whole word.

    ``changed``: keys behind ``tokenizer.ggml.`` (``chat_template`` behind ``tokenizer.``); None takes a key
    out.
    """
    merges = [
        "Ġ Ġ",
        "Ċ Ċ",
        "h e",
        "l l",
        "he ll",
        "hell o",
        "Ġ t",
        "Ġt h",
        "1 2",
        "Ġ 1",
        "12 3",
        "Ġ hello",
        "' s",
        "i n",
    ]
    merges += ["r e", "ĊĊ Ċ", "ĠĠ Ġ", "e Ċ", ". Ċ", "Ã ©"]
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *byte_alphabet(),
        *(merge.replace(" ", "") for merge in merges),
    ]
    tokens += ["<think>", "abc"]
    types = [3] * 3 + [1] * (len(tokens) - 5) + [4, 1]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 0,
        "chat_template": CHATML,
    }
    prefix = {
        key: "tokenizer." if key == "chat_template" else "tokenizer.ggml." for key in {**values, **changed}
    }
    return {prefix[key] + key: value for key, value in {**values, **changed}.items() if value is not None}
