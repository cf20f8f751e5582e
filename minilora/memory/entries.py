"""Entries of the ledger: the bytes of one class in one layer, and what they are for.

held_entries      of a model and its optimizer's states, from their arrays
kept_entries      of a cache, from the reasons for its arrays
passing_entries   of a moment of a step, from the buffers that lived then
deepen            of a deep model, from those of one with a few blocks
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minilora.adapter import Adapter
from minilora.memory.counting import adapter_constants, adapter_parameters, buffer_of
from minilora.memory.shapes import Buffer
from minilora.parameters import DenseWeight, Parameter
from minilora.transformer import Transformer

CONSTANTS = {
    "row_squares": "squared length of each row of W, for DoRA",
    "start": "first A or B, which merging subtracts",
}
"""Attribute of an adapter → what it is; arrays under other names go by the name."""


@dataclass(frozen=True)
class Entry:
    """Bytes of one class in one layer, and what they are."""

    kind: str
    layer: str
    what: str
    nbytes: int


def block_of(layer: str) -> str:
    """Return the block that a layer is in, or the layer itself.

    >>> block_of("layers.3.self_attn.q_proj"), block_of("norm"), block_of("")
    ('layers.3', 'norm', 'step')
    """
    number = re.match(r"layers\.\d+", layer)
    return number[0] if number else layer or "step"


# ---- what outlasts a step


def held_entries(
    model: Transformer, states: dict[str, Any] | None = None, maps: Sequence[Any] = ()
) -> list[Entry]:
    """Return what outlasts a step, each buffer once.

    Parameters
    ----------
    model : Transformer
        Real, or over arrays without data.
    states : dict, optional
        The optimizer's states by name, m.<parameter> and so on.
    maps : sequence of Array
        Code maps that 8-bit states are decoded with.
    """
    seen: set[int] = set()
    entries: list[Entry] = []

    def add(kind: str, layer: str, what: str, array: Any) -> None:
        buffer = buffer_of(array)
        if id(buffer) not in seen:
            seen.add(id(buffer))
            entries.append(Entry(kind, layer.removeprefix("model."), what, buffer.nbytes))

    weights = [(model.embedding.name, model.embedding.weight)]
    weights += [(name, linear.base.weight) for name, linear in model.linears()]
    for layer, weight in weights:
        if isinstance(weight, DenseWeight):
            continue  # among the parameters
        quant_type = getattr(weight, "quant_type", "")
        for kind, array in _packed_arrays(weight):
            add(kind, "shared" if kind == "code maps" else layer, quant_type, array)
    own = adapter_parameters(model)
    for p in model.parameters():
        if p in own:
            add("adapters", own[p], _part(p, own[p]), p.data)
        else:
            add("weights", p.name.removesuffix(".weight"), str(p.data.dtype), p.data)
    for _, linear in model.linears():
        if isinstance(linear, Adapter):
            for name, array in adapter_constants(linear):
                add("adapters", linear.name, CONSTANTS.get(name, name), array)
    for array in maps:
        add("code maps", "shared", "of 8-bit states", array)
    layers = {p.name: own.get(p, p.name.removesuffix(".weight")) for p in model.parameters()}
    for name, array in (states or {}).items():
        kind, _, parameter = name.partition(".")
        add("optimizer", layers.get(parameter, parameter), kind, array)
    return entries


def _packed_arrays(weight: Any) -> list[tuple[str, Any]]:
    """Return (class, array) of a packed weight; scales are `absmax` in a codebook weight, or `nested`."""
    found = []
    for kind, arrays in weight.arrays().items():
        for i, array in enumerate(arrays):
            name = kind.replace("_", " ")
            if kind == "scales" and i > 0:
                name = "nested"
            elif kind == "scales" and (len(arrays) > 1 or array.dtype.itemsize != 2):
                name = "absmax"
            found.append((name, array))
    return found


def _part(p: Parameter, layer: str) -> str:
    """Return an adapter's parameter without the module's name: lora_A."""
    return p.name.removeprefix(f"{layer}.").removesuffix(".weight")


# ---- what comes and goes within a step


def passing_entries(buffers: Iterable[Buffer]) -> list[Entry]:
    """Return what lived at a moment of a step."""
    return [
        Entry(b.kind or "temporaries", b.owner, b.reason or _source(b), b.nbytes) for b in buffers if b.nbytes
    ]


def name_gradients(log: Sequence[Buffer], model: Transformer) -> list[Buffer]:
    """Write into each gradient's buffer whose it is; return those buffers.

    They are made in the order of the trainable parameters, for one shard after another.
    """
    trainable, own = model.trainable(), adapter_parameters(model)
    made = [b for b in log if "Gradients.__init__" in b.site]
    for i, buffer in enumerate(made):
        p = trainable[i % len(trainable)]
        layer = own.get(p, p.name.removesuffix(".weight"))
        buffer.kind, buffer.owner = "gradients", layer.removeprefix("model.")
        buffer.reason = f"of {_part(p, layer) if p in own else layer.rsplit('.', 1)[-1]}"
    return made


def kept_entries(kept: Iterable[tuple[Any, str, str]], skip: set[int]) -> list[Entry]:
    """Return one entry for each buffer that a cache keeps, with the layers that share it.

    Parameters
    ----------
    kept : iterable of tuple
        (array, layer, reason) of each array, from `reasons.kept_by_model`.
    skip : set of int
        Ids of buffers that do not count, those of the parameters.
    """
    found: dict[int, tuple[str, str, int, list[str]]] = {}
    for array, layer, reason in kept:
        buffer = buffer_of(array)
        if id(buffer) in skip:
            continue
        if id(buffer) not in found:
            found[id(buffer)] = (layer, reason, buffer.nbytes, [])
            continue
        first, _, _, others = found[id(buffer)]
        if layer != first and layer not in others:
            others.append(layer)
    entries = []
    for layer, reason, nbytes, others in found.values():
        if others:
            reason += f"; shared with {', '.join(_seen_from(layer, other) for other in others)}"
        entries.append(Entry("activations", layer, reason, nbytes))
    return entries


def _seen_from(layer: str, other: str) -> str:
    """Return a layer's name, without its block if that is the same one."""
    return other.rsplit(".", 1)[-1] if block_of(other) == block_of(layer) else other


def _source(buffer: Buffer) -> str:
    """Return the function and line of source that made a temporary."""
    module, _, function = buffer.site.partition(".")
    while (
        f"minilora.{module}" not in sys.modules
        or f"minilora.{module}.{function.split('.')[0]}" in sys.modules
    ):
        part, _, function = function.partition(".")
        if not function:
            return buffer.site
        module = f"{module}.{part}"
    path = sys.modules[f"minilora.{module}"].__file__ or ""
    line = linecache.getline(path, buffer.line).split("#")[0].strip()
    return f"{function}: {line}" if line else function


# ---- depth


def deepen(entries: Iterable[Entry], depth: int, to: int) -> list[Entry]:
    """Turn entries of `depth` like blocks into those of `to`; the second stands for all in the middle."""
    found = []
    for e in entries:
        number = re.match(r"layers\.(\d+)", e.layer)
        i = int(number[1]) if number else 0
        if not number or i == 0:
            found.append(e)
        elif i == depth - 1:
            found.append(replace(e, layer=_moved(e.layer, to - 1)))
        elif i == 1:
            found += [replace(e, layer=_moved(e.layer, j)) for j in range(1, to - 1)]
    return found


def _moved(layer: str, i: int) -> str:
    return re.sub(r"^layers\.\d+", f"layers.{i}", layer)
