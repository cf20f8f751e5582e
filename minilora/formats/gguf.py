"""Read GGUF, llama.cpp's model file: the file is mapped, and every byte is checked. `gguf_writer` writes it.

    "GGUF" · version u32 · number of tensors u64 · number of metadata entries u64
    each entry:   key string · type u32 · value
    each tensor:  name string · number of dimensions u32 · dimensions u64 · type u32 · offset u64
    padding to `general.alignment` (32), then the tensors' data

The fastest dimension comes first, and offsets count from the start of the data.

A string is its length u64 and UTF-8. An array is its item type u32, its length u64 and its items. Everything
is little-endian (ggml's docs/gguf.md).

Opening a file reads its header only. Tensors are views of the mapped file, which lives as long as a view
does. As with every memory map, the process ends if another program shortens the file meanwhile.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.files import Array, FileError
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.blocks import BLOCK_BYTES, BlockWeight

MAX_HEADER = 64 * 2**20
"""Most bytes of metadata and tensor infos; a vocabulary of 2^18 tokens with as many merges takes 18 MiB."""
MAX_STRINGS, MAX_ARRAYS = 2**21, 2**12
"""Most strings and arrays in the metadata; in memory an empty array takes 50 times its bytes in the file."""
MAX_ENTRIES = 2**16
"""Most metadata entries, and most tensors."""
MAX_DEPTH = 4
"""Deepest nesting of arrays."""
MAX_NAME = 2**16 - 1
"""Longest key or tensor name in bytes (docs/gguf.md says so for keys)."""

# type of a metadata value → its letters in `struct` and NumPy
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
BOOL, STRING, ARRAY = 7, 8, 9

# type of a tensor → name, weights per block, bytes per block (ggml.h; 4, 5, 31-33 and 36-38 were withdrawn)
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

ALIGNMENT_RULE = "must be a power of two, at least 8"


def is_alignment(value: Any) -> bool:
    """Say whether a value can be `general.alignment`."""
    return type(value) is int and value >= 8 and value & (value - 1) == 0


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes
    ----------
    shape : tuple of int
        In NumPy's order: (out, in).
    type : str
        ggml's name, such as Q4_0, or "type 99" for an unknown type.
    offset : int
        From the start of the file, in bytes.
    nbytes : int or None
        Size in the file; None for an unknown type.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int | None


class GGUFFile:
    """An open GGUF file.

    Attributes
    ----------
    metadata : dict
        Values by key: int, float, bool, str, lists of str or of arrays, and read-only NumPy views for arrays
        of numbers. A 64-bit float is np.float64, which `write_gguf` keeps.
    tensors : dict of str to TensorInfo
        Where each tensor lies.
    version, alignment : int
        From the header.

    Raises
    ------
    FileError
        Anything is missing, truncated, contradictory, out of range or of an unknown version. Sizes are
        checked before memory is taken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._map = _mapped(self.path)
        header = _Header(self.path, self._map)
        self.version = header.version()
        n_tensors = header.count("tensor count", 32, MAX_ENTRIES)
        n_entries = header.count("metadata count", 13, MAX_ENTRIES)
        self.metadata: dict[str, Any] = {}
        self._entries: dict[str, tuple[int, int]] = {}
        for i in range(n_entries):
            key = header.text(f"key {i}", MAX_NAME)
            if key in self.metadata:
                raise header.error(f"metadata {key[:80]!r}", "appears twice")
            start = header.pos
            self.metadata[key] = header.value(
                header.number("<I", f"type of {key[:80]!r}"), f"metadata {key[:80]!r}"
            )
            self._entries[key] = start, header.pos
        self.alignment = self.metadata.get("general.alignment", 32)
        if not is_alignment(self.alignment):
            raise header.error("general.alignment", f"is {self.alignment!r}; it {ALIGNMENT_RULE}")
        self.tensors = header.placed([header.tensor(i) for i in range(n_tensors)], self.alignment)

    def entry(self, key: str) -> bytes:
        """Return a metadata value's type and bytes, which `write_gguf` can write again."""
        start, end = self._entries[key]
        return self._map[start:end]

    def array(self, name: str) -> Array:
        """Return an F32 or F16 tensor as a read-only view of the file, or a BF16 tensor as float32.

        Raises
        ------
        FileError
            The name is unknown, the type is another, or the tensor holds NaN or infinity.
        """
        info = self._info(name)
        if info.type == "BF16":
            bits = self._view(info, "<u2")
            array = np.empty(info.shape, np.float32)
            array.view(np.uint32)[...] = bits  # BF16 is float32's upper half
            array.view(np.uint32)[...] <<= np.uint32(16)
        elif info.type in ("F32", "F16"):
            array = self._view(info, "<f4" if info.type == "F32" else "<f2")
        else:
            fix = "convert the file to F16, Q8_0, Q4_0 or Q4_1"
            if info.type in BLOCK_BYTES:
                fix = "weight(name) reads it"
            raise FileError(
                f"{self.path}: tensor {name!r} is {info.type}; array(name) reads F32, F16 and BF16; {fix}"
            )
        flat = array.reshape(-1)
        for first in range(0, flat.size, 2**18):
            if not np.isfinite(flat[first : first + 2**18]).all():
                raise FileError(
                    f"{self.path}: tensor {name!r} holds NaN or infinity; convert the model again"
                )
        return array

    def weight(self, name: str) -> BlockWeight | DenseWeight:
        """Return a matrix (out, in) as a weight.

        Q4_0, Q4_1 and Q8_0 become a BlockWeight over the file's own bytes. F32, F16 and BF16 become dense
        float32.

        Raises
        ------
        FileError
            The name is unknown, the type or the number of dimensions is another, or a scale is not finite.
        """
        info = self._info(name)
        if len(info.shape) != 2:
            raise FileError(
                f"{self.path}: tensor {name!r} has shape {info.shape}; a weight has two dimensions, (out, in)"
            )
        shape = (info.shape[0], info.shape[1])
        if info.type not in BLOCK_BYTES:
            dense = self.array(name).astype(np.float32, copy=False)
            return DenseWeight(Parameter(name, dense).freeze())
        try:
            return BlockWeight(self._view(info, "u1", (shape[0], -1)), info.type, shape)
        except ValueError as error:
            raise FileError(f"{self.path}: tensor {name!r}: {error}") from None

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            examples = list(self.tensors)[:5]
            if len(self.tensors) > 5:
                examples.append("…")
            raise FileError(
                f"{self.path}: no tensor {name!r} among its {len(self.tensors)} ({', '.join(examples)})"
            )
        return self.tensors[name]

    def _view(self, info: TensorInfo, dtype: str, shape: tuple[int, ...] | None = None) -> Array:
        items = (info.nbytes or 0) // np.dtype(dtype).itemsize
        return np.frombuffer(self._map, dtype, items, info.offset).reshape(shape or info.shape)


def _mapped(path: Path) -> mmap.mmap:
    """Map a file that is at least as long as the fixed part of the header."""
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(24)
            if start[:4] not in (b"GGUF", b"FUGG"):
                raise FileError(f"{path}: not a GGUF file: it begins with {start[:4]!r}, not b'GGUF'")
            if len(start) < 24:
                raise FileError(
                    f"{path}: {len(start)} bytes long; a GGUF header has at least 24: fetch a fresh copy"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, OverflowError) as error:
        raise FileError(f"{path}: cannot be read ({error})") from None


class _Header:
    """A reader of the header, front to back, that never goes beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.pos = path, data, 4
        self.left = {STRING: MAX_STRINGS, ARRAY: MAX_ARRAYS}  # how many more may come
        self.end = min(len(data), MAX_HEADER)

    def error(self, what: str, problem: str) -> FileError:
        return FileError(f"{self.path}: {what} {problem}")

    def skip(self, size: int, what: str) -> int:
        """Move on by `size` bytes, if so many are left, and return the position before."""
        if size > self.end - self.pos:
            limit = "a header may have"
            if self.end == len(self.data):
                limit = "the file has"
            raise self.error(what, f"takes {size} bytes from byte {self.pos} on, but {limit} {self.end}")
        self.pos += size
        return self.pos - size

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack_from(letter, self.data, self.skip(struct.calcsize(letter), what))[0]

    def version(self) -> int:
        version: int = self.number("<I", "version")
        if self.data[:4] == b"FUGG" or (version & 0xFFFF == 0 and version >> 24 in (1, 2, 3)):
            raise self.error(
                "byte order", "is big-endian; little-endian is read: convert it with gguf_convert_endian.py"
            )
        if version not in (2, 3):
            raise self.error(
                "version", f"is {version}; 2 and 3 are read: convert the model again with a current llama.cpp"
            )
        return version

    def count(self, what: str, least: int, most: int = MAX_HEADER) -> int:
        """Return a number of items that take at least `least` bytes each."""
        count: int = self.number("<Q", what)
        if count > most or count * least > self.end - self.pos:
            left = f"{self.end - self.pos} bytes of the header are left for them"
            raise self.error(what, f"is {count}; at most {most} are read, and {left}")
        return count

    def text(self, what: str, longest: int = MAX_HEADER) -> str:
        start = self.skip(self.count(f"length of {what}", 1, longest), what)
        try:
            return self.data[start : self.pos].decode()
        except UnicodeDecodeError as error:
            raise self.error(what, f"is not UTF-8 ({error.reason} at its byte {error.start})") from None

    def texts(self, count: int, what: str) -> list[str]:
        """Return `count` strings, three times as fast as `text`: a vocabulary has 10^5 of them."""
        self.left[STRING] -= count
        length, data, end, pos = struct.Struct("<Q").unpack_from, self.data, self.end, self.pos
        found = []
        for _ in range(count):
            stop = pos + 8 + length(data, pos)[0] if pos + 8 <= end else end + 1
            try:
                if stop > end:
                    raise ValueError("goes beyond the end")
                found.append(data[pos + 8 : stop].decode())
            except ValueError:
                self.pos = pos
                self.text(what)  # raises the error that says what is wrong
                raise
            pos = stop
        self.pos = pos
        return found

    def value(self, kind: int, what: str, depth: int = MAX_DEPTH) -> Any:
        """Return one metadata value; arrays may still nest `depth` deep in it."""
        if kind in SCALARS:
            number = self.numbers(kind, 1, what)[0]
            return number if number.dtype == np.float64 else number.item()
        if kind not in (STRING, ARRAY):
            raise self.error(what, f"has type {kind}; the types are 0 to 12")
        if self.left[kind] == 0:
            raise self.error(
                what, f"is too much: at most {MAX_STRINGS} strings and {MAX_ARRAYS} arrays are read"
            )
        self.left[kind] -= 1
        if kind == STRING:
            return self.text(what)
        if depth == 0:
            raise self.error(what, f"holds arrays in arrays, more than {MAX_DEPTH} deep")
        item = self.number("<I", f"item type of {what}")
        if item in SCALARS:
            return self.numbers(item, self.count(f"length of {what}", struct.calcsize(SCALARS[item])), what)
        count = self.count(f"length of {what}", 12 if item == ARRAY else 8, self.left.get(item, MAX_HEADER))
        if item == STRING:
            return self.texts(count, what)
        return [self.value(item, what, depth - 1) for _ in range(count)]

    def numbers(self, kind: int, count: int, what: str) -> Array:
        """Return numbers as a view of the file."""
        dtype = np.dtype(SCALARS[kind])
        raw = np.frombuffer(
            self.data, np.uint8, count * dtype.itemsize, self.skip(count * dtype.itemsize, what)
        )
        if kind == BOOL and raw.size and raw.max() > 1:
            raise self.error(what, f"holds a bool that is {raw.max()}; it is 0 or 1")
        return raw.view(dtype)

    def tensor(self, i: int) -> tuple[str, TensorInfo]:
        """Return one tensor's name and info; its offset still counts from the start of the data."""
        name = self.text(f"name of tensor {i}", MAX_NAME)
        what = f"tensor {name[:80]!r}"
        n_dims = self.number("<I", f"number of dimensions of {what}")
        if not 1 <= n_dims <= 4:
            raise self.error(what, f"has {n_dims} dimensions; there may be 1 to 4")
        shape = tuple(self.number("<Q", f"shape of {what}") for _ in range(n_dims))[::-1]
        size = math.prod(shape)  # Python's whole numbers do not overflow
        if not 0 < size < 2**63:
            raise self.error(
                what, f"has shape {shape}; dimensions must be positive, and their product below 2^63"
            )
        kind, offset = self.number("<I", f"type of {what}"), self.number("<Q", f"offset of {what}")
        if kind not in GGML_TYPES:
            return name, TensorInfo(shape, f"type {kind}", offset, None)
        type_name, block, nbytes = GGML_TYPES[kind]
        if shape[-1] % block:
            raise self.error(what, f"has rows of {shape[-1]}; {type_name} needs a multiple of {block}")
        return name, TensorInfo(shape, type_name, offset, size // block * nbytes)

    def placed(self, infos: list[tuple[str, TensorInfo]], alignment: int) -> dict[str, TensorInfo]:
        """Count offsets from the start of the file, and check that tensors lie in it without overlap."""
        start = -(-self.pos // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, info in infos:
            what = f"tensor {name[:80]!r}"
            if name in tensors:
                raise self.error(what, "appears twice")
            if info.offset % alignment:
                raise self.error(
                    what, f"has offset {info.offset}; it must be a multiple of the alignment {alignment}"
                )
            first, nbytes = start + info.offset, info.nbytes or 0
            if first + nbytes > len(self.data):
                raise self.error(
                    what, f"takes {nbytes} bytes from byte {first} on, but the file has {len(self.data)}"
                )
            tensors[name] = TensorInfo(info.shape, info.type, first, info.nbytes)
        end, before = start, ""
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                raise self.error(
                    f"tensor {name[:80]!r}",
                    f"begins at byte {info.offset}, before the end of {before!r} at {end}",
                )
            end, before = info.offset + (info.nbytes or 0), name[:80]
        return tensors
