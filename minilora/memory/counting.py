"""Bytes and parameters, counted from the arrays themselves.

A buffer is counted once, by identity: q, k and v share one input, and views cost nothing.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapter import Adapter
from minilora.layers import Key
from minilora.memory.shapes import ShapeArray
from minilora.parameters import DenseWeight, Parameter, Weight
from minilora.transformer import Transformer

Array = np.ndarray

QUANT_CLASSES = {
    "codes": "weights",
    "scales": "scales_offsets",
    "offsets": "scales_offsets",
    "code_maps": "code_maps",
}
"""Class of a packed weight's arrays → class in `model_bytes`."""


# ---- arrays


def buffer_of(array: Any) -> Any:
    """Return what owns the memory of an array, real or without data; it has `nbytes`."""
    if not isinstance(array, np.ndarray):
        return array.buffer
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def unique_bytes(arrays: Iterable[Array]) -> int:
    """Return the total size of the distinct buffers behind the arrays.

    >>> a = np.zeros((4, 4), np.float32)
    >>> unique_bytes([a, a, a[1:], a.T])
    64
    """
    buffers = {id(buffer): buffer.nbytes for buffer in map(buffer_of, arrays)}
    return sum(buffers.values())


def arrays_in(value: Any) -> Iterator[Any]:
    """Yield all arrays, real or without data, inside nested tuples and lists, such as a backward cache."""
    if isinstance(value, (np.ndarray, ShapeArray)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from arrays_in(item)


# ---- models


def packed_weights(model: Transformer) -> list[Any]:
    """Return every quantized weight, below adapters too; one that embedding and head share comes once."""
    weights: list[Weight] = [model.embedding.weight]
    weights += [linear.base.weight for _, linear in model.linears()]
    return list({id(weight): weight for weight in weights if not isinstance(weight, DenseWeight)}.values())


def adapter_parameters(model: Transformer) -> dict[Parameter, str]:
    """Return the parameters of all adapters, whichever class they are of, with the adapted module's name."""
    return {
        p: linear.name
        for _, linear in model.linears()
        if isinstance(linear, Adapter)
        for p in linear.trained()
    }


def adapter_constants(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """Yield (attribute, array) of what an adapter holds beside its base and its parameters."""
    for name, value in vars(adapter).items():
        if isinstance(value, Adapter):
            yield from adapter_constants(value)
        else:
            for array in arrays_in(value):
                yield name, array


def model_bytes(model: Transformer) -> dict[str, int]:
    """Return a model's bytes by class.

    Returns
    -------
    dict
        `weights`, dense arrays and codes · `scales_offsets` · `code_maps` · `adapters`, their parameters,
        whether they train or not.
    """
    found: dict[str, list[Array]] = {"weights": [], "scales_offsets": [], "code_maps": [], "adapters": []}
    own = adapter_parameters(model)
    for p in model.parameters():
        found["adapters" if p in own else "weights"].append(p.data)
    for weight in packed_weights(model):
        for kind, arrays in weight.arrays().items():
            found[QUANT_CLASSES[kind]].extend(arrays)
    return {kind: unique_bytes(arrays) for kind, arrays in found.items()}


def effective_bits(model: Transformer) -> float:
    """Return the bits per weight of the block projections, scales and offsets included.

    Code maps are constants that all weights share, and are not counted.
    """
    stored, weights = projection_bytes(model)
    return 8 * stored / weights


def projection_bytes(model: Transformer) -> tuple[int, int]:
    """Return (bytes as stored, weights) of the block projections, without adapters and code maps."""
    stored = weights = 0
    for block in model.blocks:
        for _, _, linear in block.linears():
            weight = linear.base.weight
            for kind, arrays in weight.arrays().items():
                if kind != "code_maps":
                    stored += sum(a.nbytes for a in arrays)
            weights += weight.shape[0] * weight.shape[1]
    return stored, weights


def count_parameters(model: Transformer) -> tuple[int, int]:
    """Return (trainable, all) parameters; a quantized weight counts out·in, whatever its packing."""
    trainable = sum(p.data.size for p in model.trainable())
    total = sum(p.data.size for p in model.parameters())
    total += sum(weight.shape[0] * weight.shape[1] for weight in packed_weights(model))
    return trainable, total


def trainable_line(model: Transformer) -> str:
    """Return PEFT's line: `trainable params: … || all params: … || trainable%: …`."""
    return format_trainable(*count_parameters(model))


def format_trainable(trainable: int, total: int) -> str:
    """Return PEFT's line for these numbers of parameters."""
    share = f"{100 * trainable / total:.4f}"
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}"


# ---- a pass, a process


def activation_bytes(model: Transformer, ids: Array, checkpoint: bool = False, key: Key = None) -> int:
    """Return the bytes that a forward pass over ids (B, T) keeps for the backward pass.

    Parameters of the model are not counted. With a `key`, as in training, dropout is on and keeps its masks
    and masked inputs.
    """
    _, cache = model.forward(ids, key, checkpoint)
    weights = {id(buffer_of(p.data)) for p in model.parameters()}
    return unique_bytes(a for a in arrays_in(cache) if id(buffer_of(a)) not in weights)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the most memory that `work()` held at once beyond what was there before, by tracemalloc."""
    running, collecting = tracemalloc.is_tracing(), gc.isenabled()
    gc.disable()  # finalizers of earlier work would take memory in the middle of this work
    if not running:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        work()
        return max(0, tracemalloc.get_traced_memory()[1] - before)
    finally:
        if not running:
            tracemalloc.stop()
        if collecting:
            gc.enable()


def available_bytes() -> int | None:
    """Return the memory that this process can still get, or None if the system does not tell.

    That is the machine's free memory, or what is left of a container's limit.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError, StopIteration):
        pass
    return min(found) if found else None


def format_bytes(n: float) -> str:
    """Return a size in powers of 1024.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
