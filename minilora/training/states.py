"""What an optimizer keeps: the states' shapes and bytes, and Adam's moments in 32 or in 8 bits.

A moment is one running mean (Adam's m or v) of one parameter. `read` returns a piece of it as numbers, and
`write` takes them back; AdamW updates the piece in between. A piece has at most `CHUNK` elements, so the
working space does not grow with the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import OPTIMIZERS, require
from minilora.parameters import Array, Parameter
from minilora.quant.codebooks import dynamic_map
from minilora.quant.dynamic import DYNAMIC_BLOCK_SIZE, dynamic_decode, dynamic_encode
from minilora.training.paging import Layout, hand_back, mapped_file_of, zeros_in_file, zeros_in_memory

CHUNK = 65536
"""Elements that are updated at a time: whole blocks of 256, and 256 KiB an array in float32."""

MIN_8BIT_SIZE = 4096
"""Fewest elements of a parameter whose moments are quantized (bitsandbytes' `min_8bit_size`)."""

MOMENTS = ("m", "v")
"""Adam's running means of g and of g²."""


# ---- pieces


def pieces(size: int) -> list[slice]:
    """Cut `size` elements into slices of at most `CHUNK`.

    >>> [(where.start, where.stop) for where in pieces(CHUNK + 1)]
    [(0, 65536), (65536, 65537)]
    """
    return [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]


def piece(array: Array, where: slice) -> Array:
    """Return a piece of the flattened array: a view if the array is contiguous, else a copy."""
    return array.reshape(-1)[where] if array.flags.c_contiguous else array.flat[where]


def put_piece(array: Array, where: slice, values: Array) -> None:
    """Write an updated `piece` back, if it was a copy."""
    if not array.flags.c_contiguous:
        array.flat[where] = values


# ---- moments


class FloatMoment:
    """A moment in the parameter's own dtype; `read` returns a view, so updates are written at once."""

    def __init__(self, values: Array):
        self.flat, self.mapped = values.reshape(-1), mapped_file_of(values) is not None

    def read(self, where: slice) -> Array:
        """Return the piece itself."""
        return self.flat[where]

    def write(self, where: slice, values: Array) -> None:
        """Hand back the pages of a mapped file."""
        if self.mapped:
            hand_back(self.flat[where])


class BlockwiseMoment:
    """A moment in 8 bits: codes of the dynamic map, times max|x| of each block of 256 elements.

    A v above 0 keeps a code above 0. Rounded to 0, its next step would be m/eps, hundreds of times too long;
    that would happen to each v below 1.6e-7 of its block's largest. (bitsandbytes' CPU code gives such a v
    code 7.)

    Parameters
    ----------
    codes : Array
        uint8, of the parameter's shape.
    absmax : Array
        float32, (⌈size/256⌉,).
    signed : bool
        True for m. False for v, which is never negative and spends the sign's bit on precision.
    dtype : numpy.dtype
        What `read` returns.

    References
    ----------
    Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
    """

    def __init__(self, codes: Array, absmax: Array, signed: bool, dtype: Any):
        self.codes, self.absmax, self.signed, self.dtype = codes.reshape(-1), absmax, signed, dtype

    def read(self, where: slice) -> Array:
        """Decode a piece."""
        values = dynamic_decode(self.codes[where], self.absmax[_blocks(where)], self.signed)
        return values.astype(self.dtype, copy=False)

    def write(self, where: slice, values: Array) -> None:
        """Round the numbers to codes, and hand back the pages of a mapped file."""
        codes, absmax = self.codes[where], self.absmax[_blocks(where)]
        dynamic_encode(values.astype(np.float32, copy=False), codes, absmax, self.signed)
        hand_back(codes)
        hand_back(absmax)


Moment = FloatMoment | BlockwiseMoment


def make_moments(
    parameters: Sequence[Parameter], optimizer: str, folder: Path | None = None
) -> tuple[dict[str, Array], list[tuple[Moment, Moment]]]:
    """Return AdamW's state arrays by name, all zero, and (m, v) of each parameter over them."""
    layout = state_layout(parameters, optimizer)
    arrays = zeros_in_file(layout, folder) if optimizer.startswith("paged") else zeros_in_memory(layout)

    def moment(kind: str, p: Parameter) -> Moment:
        values, absmax = arrays[f"{kind}.{p.name}"], arrays.get(f"{kind}_absmax.{p.name}")
        if absmax is None:
            return FloatMoment(values)
        return BlockwiseMoment(values, absmax, kind == "m", p.data.dtype)

    return arrays, [(moment("m", p), moment("v", p)) for p in parameters]


def _blocks_of(size: int) -> int:
    """Return how many blocks `size` elements make; the last may be short."""
    return -(-size // DYNAMIC_BLOCK_SIZE)


def _blocks(where: slice) -> slice:
    return slice(where.start // DYNAMIC_BLOCK_SIZE, _blocks_of(where.stop))


# ---- shapes and bytes


def state_layout(parameters: Sequence[Parameter], optimizer: str, momentum: bool = False) -> Layout:
    """Return name → (shape, dtype) of each state array; a frozen parameter has none."""
    kinds: tuple[str, ...] = MOMENTS
    if optimizer == "sgd":
        kinds = ("u",) if momentum else ()
    layout: Layout = {}
    for kind in kinds:
        for p in parameters:
            if not p.trainable:
                continue
            if _in_8bit(optimizer, p.data.size):
                layout[f"{kind}.{p.name}"] = p.data.shape, np.dtype(np.uint8)
                layout[f"{kind}_absmax.{p.name}"] = (_blocks_of(p.data.size),), np.dtype(np.float32)
            else:
                layout[f"{kind}.{p.name}"] = p.data.shape, p.data.dtype
    return layout


def state_maps(state: Mapping[str, Any]) -> list[Array]:
    """Return the code maps that 8-bit states are decoded with, shared by all; none for other states."""
    if any(array.dtype == np.uint8 for array in state.values()):
        return [dynamic_map(signed) for signed in (True, False)]
    return []


def state_bytes(
    optimizer: str, sizes: Iterable[int], itemsize: int = 4, momentum: bool = False
) -> dict[str, int]:
    """Return what an optimizer holds, in bytes, without making it.

    AdamW keeps m and v for every element: 2·itemsize bytes. In 8 bits they take 2 bytes, and 2·4 for each
    block of 256: 2.03 bytes instead of 8.

    Parameters
    ----------
    optimizer : str
        One of `OPTIMIZERS`.
    sizes : iterable of int
        Number of elements of each parameter.
    itemsize : int
        Bytes of a parameter's element.
    momentum : bool
        Whether SGD has momentum, which takes one array for each parameter.

    Returns
    -------
    dict
        `states` and `absmax`, in memory or else `on_disk` · `maps`, two code maps of 256 float32 · `scratch`,
        the most that an update needs besides, for the piece it works on.

    Examples
    --------
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
        chunk, scratch = min(size, CHUNK), 0
        if optimizer == "sgd":
            found["states"] += size * itemsize if momentum else 0
            scratch = chunk * itemsize
        elif _in_8bit(optimizer, size):
            found["states"] += 2 * size
            found["absmax"] += 2 * _blocks_of(size) * 4
            found["maps"] = 2 * 256 * 4
            scratch = 2 * chunk * itemsize  # m and v decoded
            if itemsize != 4:
                scratch += chunk * 4  # the codes are made from float32
        else:
            found["states"] += 2 * size * itemsize
        found["scratch"] = max(found["scratch"], scratch)
    if optimizer.startswith("paged"):
        found |= {"on_disk": found["states"] + found["absmax"], "states": 0, "absmax": 0}
    return found


def _in_8bit(optimizer: str, size: int) -> bool:
    return optimizer.endswith("8bit") and size >= MIN_8BIT_SIZE
