"""Arrays in a mapped temporary file: the operating system keeps in memory what it has room for.

A *paged* optimizer keeps its states there (the idea is QLoRA's, arXiv 2305.14314, section 3, which pages to
the CPU's memory; here it is the disk).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.files import FileError
from minilora.parameters import Array

Layout = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Name → (shape, dtype)."""

WRITE_BYTES = 65536
"""Zeros written at a time, on a system that cannot reserve the space of a file."""


def zeros_in_memory(layout: Layout) -> dict[str, Array]:
    """Return an array of zeros for each name."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}


def zeros_in_file(layout: Layout, folder: Path | None) -> dict[str, Array]:
    """Return the same arrays, one after another in a mapped temporary file.

    Where the system allows it the file has no name, so nothing is left behind after a crash. Its space is
    reserved at once: a mapped page that finds the disk full would kill the process. A folder in memory
    (tmpfs) saves nothing.

    Parameters
    ----------
    layout : dict
        Name → (shape, dtype).
    folder : Path or None
        Where the file lies; None takes the system's folder for temporary files.

    Raises
    ------
    FileError
        If the disk has not enough room.
    """
    nbytes = {
        name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in layout.items()
    }
    file = _mapped_file(sum(nbytes.values()), folder)
    arrays, offset = {}, 0
    # the widest types come first, so that each array is aligned
    for name in sorted(layout, key=lambda name: -layout[name][1].itemsize):
        shape, dtype = layout[name]
        arrays[name] = np.ndarray(shape, dtype, buffer=file, offset=offset)
        offset += nbytes[name]
    return {name: arrays[name] for name in layout}


def _mapped_file(size: int, folder: Path | None) -> mmap.mmap:
    place, reserved = folder, max(1, size)
    try:
        place = place or Path(tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, reserved)
            else:
                for start in range(0, reserved, WRITE_BYTES):
                    file.write(bytes(min(WRITE_BYTES, reserved - start)))
                file.flush()
            return mmap.mmap(file.fileno(), reserved)  # keeps the file open
    except OSError as error:
        raise FileError(
            f"{place}: cannot hold {size:,} bytes of optimizer states ({error.strerror or error}). A paged "
            "optimizer keeps them on disk: make room, choose another folder (the default is TMPDIR), or take "
            "optimizer='adamw_8bit', which keeps about a quarter of adamw's states in memory"
        ) from None


def hand_back(array: Array) -> None:
    """Release the memory behind an array in a mapped file; other arrays are left alone.

    The numbers stay in the file. The system keeps changed pages in its cache, which does not count as this
    process's memory, until it writes them to the disk. A system without `madvise` decides by itself.
    """
    file = mapped_file_of(array)
    if file is not None and hasattr(mmap, "MADV_DONTNEED") and array.size:
        first = array.ctypes.data - np.frombuffer(file, np.uint8).ctypes.data
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        file.madvise(mmap.MADV_DONTNEED, start, first + array.nbytes - start)


def mapped_file_of(array: Array) -> mmap.mmap | None:
    """Return the mapped file that an array is a view of, or None."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, mmap.mmap) else None
