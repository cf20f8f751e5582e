"""The ledger: where the bytes of a fine-tuning run are, by class, counted from the arrays themselves.

Arrays are counted once, by the identity of the buffer behind them: q, k and v share one input, and views cost
nothing.
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
from minilora.parameters import DenseWeight, Parameter
from minilora.transformer import Transformer

Array = np.ndarray

QUANT_CLASSES = {
    "codes": "weights",
    "scales": "scales_offsets",
    "offsets": "scales_offsets",
    "code_maps": "code_maps",
}


def unique_bytes(arrays: Iterable[Array]) -> int:
    """Total size of the distinct buffers behind the arrays.

    >>> a = np.zeros((4, 4), np.float32)
    >>> unique_bytes([a, a, a[1:], a.T])
    64
    """
    buffers = {id(buffer): buffer.nbytes for buffer in map(buffer_of, arrays)}
    return sum(buffers.values())


def buffer_of(array: Any) -> Any:
    """What owns the memory of an array, real or without data; it has ``nbytes``."""
    if not isinstance(array, np.ndarray):
        return array.buffer
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def arrays_in(value: Any) -> Iterator[Any]:
    """All arrays, real or without data, inside nested tuples and lists: what a backward cache keeps."""
    if isinstance(value, (np.ndarray, ShapeArray)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from arrays_in(item)


def packed_weights(model: Transformer) -> list[Any]:
    """Every weight of a model, adapted or not, that is stored in few bits; one that embedding and head share,
    once."""
    weights = [model.embedding.weight]
    weights += [linear.base.weight for _, linear in model.linears()]
    return list({id(weight): weight for weight in weights if not isinstance(weight, DenseWeight)}.values())


def adapter_parameters(model: Transformer) -> set[Parameter]:
    """Return the parameters of all adapters, whichever class they are of."""
    return {p for _, linear in model.linears() if isinstance(linear, Adapter) for p in linear.trained()}


def model_bytes(model: Transformer) -> dict[str, int]:
    """Bytes of a model by class: weights (dense arrays and codes), scales_offsets, code_maps, adapters."""
    found: dict[str, list[Array]] = {"weights": [], "scales_offsets": [], "code_maps": [], "adapters": []}
    own = adapter_parameters(model)
    for p in model.parameters():
        found["adapters" if p in own else "weights"].append(p.data)
    for weight in packed_weights(model):
        for kind, arrays in weight.arrays().items():
            found[QUANT_CLASSES[kind]].extend(arrays)
    return {kind: unique_bytes(arrays) for kind, arrays in found.items()}


def effective_bits(model: Transformer) -> float:
    """Bits a weight of the block projections, with scales and offsets; code maps are shared constants and not
    counted."""
    stored, weights = projection_bytes(model)
    return 8 * stored / weights


def projection_bytes(model: Transformer) -> tuple[int, int]:
    """(bytes as stored, number of weights) of the block projections; without adapters and shared code
    maps."""
    stored = weights = 0
    for block in model.blocks:
        for _, _, linear in block.linears():
            weight = linear.base.weight
            stored += sum(
                a.nbytes for kind, arrays in weight.arrays().items() if kind != "code_maps" for a in arrays
            )
            weights += weight.shape[0] * weight.shape[1]
    return stored, weights


def count_parameters(model: Transformer) -> tuple[int, int]:
    """(trainable, all) parameters. A quantized weight counts out·in whatever its packing, unlike counts from
    array sizes."""
    trainable = sum(p.data.size for p in model.trainable())
    total = sum(p.data.size for p in model.parameters())
    total += sum(weight.shape[0] * weight.shape[1] for weight in packed_weights(model))
    return trainable, total


def trainable_line(model: Transformer) -> str:
    """PEFT's line: ``trainable params: … || all params: … || trainable%: …``."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def activation_bytes(model: Transformer, ids: Array, checkpoint: bool = False, key: Key = None) -> int:
    """Bytes that a forward pass over ids (B, T) keeps for the backward pass, without the parameters
    themselves.

    With a ``key``, as in training, dropout is on and keeps its masks and masked inputs.
    """
    _, cache = model.forward(ids, key, checkpoint)
    weights = {id(buffer_of(p.data)) for p in model.parameters()}
    return unique_bytes(a for a in arrays_in(cache) if id(buffer_of(a)) not in weights)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Largest memory that ``work()`` held at once beyond what was there before, as Python's tracemalloc
    measures it."""
    running, collecting = tracemalloc.is_tracing(), gc.isenabled()
    gc.disable()  # what earlier work left is not torn down meanwhile: its finalizers take memory, too
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


def format_bytes(n: float) -> str:
    """Human-readable size in powers of 1024.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def available_bytes() -> int | None:
    """Memory that a process can still get, as far as the system tells: free memory, or what is left of a
    container's limit."""
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
