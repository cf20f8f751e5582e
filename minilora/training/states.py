"""How an optimizer keeps its running means: in the parameter's own type or in 8 bits, in memory or in a
mapped file.

A moment is one running mean (Adam's m or v) of one parameter. ``read`` gives a piece of it as numbers,
``write`` takes them back; AdamW updates a piece in between and knows nothing of what is below. A piece has at
most ``CHUNK`` elements, so that working space does not grow with the parameter.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.files import FileError
from minilora.layers import Array
from minilora.quant.dynamic import DYNAMIC_BLOCK_SIZE, dynamic_decode, dynamic_encode

CHUNK = 65536
"""Elements that are updated at a time: whole blocks of 256, and in float32 256 KiB an array."""

MIN_8BIT_SIZE = 4096
"""bitsandbytes' ``min_8bit_size``: a parameter with fewer elements keeps its moments unquantized, for there
is little to save."""

Layout = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


# ---- pieces


def pieces(size: int) -> list[slice]:
    """Cut ``size`` elements into slices of at most CHUNK.

    >>> [(where.start, where.stop) for where in pieces(CHUNK + 1)]
    [(0, 65536), (65536, 65537)]
    """
    return [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]


def piece(array: Array, where: slice) -> Array:
    """Return a piece of the flattened row-major array: a view, or a copy where the elements do not lie in a
    row."""
    return array.reshape(-1)[where] if array.flags.c_contiguous else array.flat[where]


# ---- moments


class FloatMoment:
    """A moment in the parameter's own type: ``read`` gives the live numbers, so what is done to them is
    already written."""

    def __init__(self, values: Array):
        self.flat, self.mapped = values.reshape(-1), _file_of(values) is not None

    def read(self, where: slice) -> Array:
        """Return the piece itself."""
        return self.flat[where]

    def write(self, where: slice, values: Array) -> None:
        """Hand back the pages of a mapped file."""
        if self.mapped:
            hand_back(self.flat[where])


class BlockwiseMoment:
    """A moment in 8 bits (arXiv 2110.02861): each block of 256 elements divided by its max|x|, in the codes
    of the dynamic map.

    ``codes`` has the parameter's shape, uint8 · ``absmax`` (⌈size/256⌉,) float32 · ``signed``: True for m,
    False for v, which is never negative and spends the sign's bit on precision. ``read`` decodes a piece,
    ``write`` rounds it again.

    A v above 0 keeps a code above 0. Rounded to 0, as a v below 1.6e-7 of its block's largest would be, its
    next step would be m/eps, hundreds of times too long. (The table in which bitsandbytes' CPU code looks
    codes up gives such a v code 7.)
    """

    def __init__(self, codes: Array, absmax: Array, signed: bool, dtype: Any):
        self.codes, self.absmax, self.signed, self.dtype = codes.reshape(-1), absmax, signed, dtype

    def read(self, where: slice) -> Array:
        """Return the piece's numbers, in the parameter's type."""
        values = dynamic_decode(self.codes[where], self.absmax[_blocks(where)], self.signed)
        return values.astype(self.dtype, copy=False)

    def write(self, where: slice, values: Array) -> None:
        """Round the numbers to codes, and hand back the pages of a mapped file."""
        codes, absmax = self.codes[where], self.absmax[_blocks(where)]
        dynamic_encode(values.astype(np.float32, copy=False), codes, absmax, self.signed)
        hand_back(codes)
        hand_back(absmax)


Moment = FloatMoment | BlockwiseMoment


def blocks_of(size: int) -> int:
    """Return how many blocks ``size`` elements make; the last may be short."""
    return -(-size // DYNAMIC_BLOCK_SIZE)


def _blocks(where: slice) -> slice:
    return slice(where.start // DYNAMIC_BLOCK_SIZE, blocks_of(where.stop))


# ---- arrays in memory, or in a file that is mapped into it


def zeros_in_memory(layout: Layout) -> dict[str, Array]:
    """Return an array of zeros for each name: (shape, dtype)."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}


def zeros_in_file(layout: Layout, folder: Path | None) -> dict[str, Array]:
    """Return the same arrays as one mapped temporary file without gaps, in ``folder`` or the system's folder
    for such files.

    The file has no name (where the system allows that), so nothing is left behind whatever happens. Its space
    is taken at once: raises FileError if the disk has not got it, since a mapped page that finds no room
    later would kill the process. Where the folder for temporary files lies in memory (tmpfs), nothing is
    saved.
    """
    nbytes = {
        name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in layout.items()
    }
    file = _mapped_file(sum(nbytes.values()), folder)
    arrays, offset = {}, 0
    for name in sorted(
        layout, key=lambda name: -layout[name][1].itemsize
    ):  # wide types first: each lies on its own multiple
        shape, dtype = layout[name]
        arrays[name] = np.ndarray(shape, dtype, buffer=file, offset=offset)
        offset += nbytes[name]
    return {name: arrays[name] for name in layout}


def _mapped_file(size: int, folder: Path | None) -> mmap.mmap:
    place = folder
    try:
        place = place or Path(tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            else:
                for start in range(0, max(1, size), CHUNK):
                    file.write(bytes(min(CHUNK, max(1, size) - start)))
                file.flush()
            return mmap.mmap(file.fileno(), max(1, size))  # keeps the file open
    except OSError as error:
        raise FileError(
            f"{place}: cannot hold {size:,} bytes of optimizer states ({error.strerror or error}). A paged optimizer "
            "keeps them on disk: make room, choose another folder (without one, TMPDIR says where), or take "
            "optimizer='adamw_8bit', which keeps about a quarter of adamw's in memory"
        ) from None


def hand_back(array: Array) -> None:
    """Let go of the memory behind an array in a mapped file; its numbers stay in the file. Does nothing to
    other arrays.

    The system writes pages that were changed to the disk when it wants the room; until then they lie in its
    cache, which is not this process's memory. Systems without ``madvise`` decide by themselves.
    """
    file = _file_of(array)
    if file is not None and hasattr(mmap, "MADV_DONTNEED") and array.size:
        first = array.ctypes.data - np.frombuffer(file, np.uint8).ctypes.data
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        file.madvise(mmap.MADV_DONTNEED, start, first + array.nbytes - start)


def _file_of(array: Array) -> mmap.mmap | None:
    """Return the mapped file whose bytes an array is a view of, if it is one."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, mmap.mmap) else None
