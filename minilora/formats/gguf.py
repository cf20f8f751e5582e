"""GGUF, llama.cpp's model file: a reader, which maps the file and takes no byte on trust, and a writer.

    "GGUF" · version u32 · number of tensors u64 · number of metadata entries u64
    each entry:   key string · type u32 · value
    each tensor:  name string · number of dimensions u32 · dimensions u64, the fastest first · type u32 · offset u64
    padding to ``general.alignment`` (32), and then the tensors' data, to which the offsets refer

A string is its length u64 and UTF-8; an array its items' type u32, their number u64 and the items; all is
little-endian (ggml's docs/gguf.md). Opening reads the header only. Tensors are views of the mapped file,
which lives as long as a view does; a file that another program shortens meanwhile ends this process, as with
every memory map.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import require
from minilora.formats.files import FileError, atomic
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BLOCK_BYTES, BlockWeight

Array = np.ndarray

MAX_HEADER = 64 * 2**20
"""Bytes of metadata and tensor infos at most; 2^18 tokens of 16 bytes, as many merges of 32, scores and types
take 18 MiB."""
MAX_STRINGS, MAX_ARRAYS = 2**21, 2**12
"""Strings, and arrays, in the metadata at most: in Python an empty array takes fifty times its 12 bytes in
the file."""
MAX_ENTRIES = 2**16
"""Metadata entries, and tensors, at most."""
MAX_DEPTH = 4
"""Arrays in arrays at most."""
MAX_NAME = 2**16 - 1
"""Bytes of a key or a tensor's name at most (docs/gguf.md, for keys)."""

# types of metadata values; the letters are struct's and NumPy's
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

VERSION, QUANTIZATION_VERSION = 3, 2
"""Versions of the file, and of the blocks in it, that are written."""

# type → name, weights of a block, bytes of a block (ggml.h; 4, 5, 31-33 and 36-38 were withdrawn)
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

_KINDS = {np.dtype(letters): kind for kind, letters in SCALARS.items()}
_TYPES = {name: kind for kind, (name, _, _) in GGML_TYPES.items()}

ALIGNMENTS = "must be a power of two, at least 8"


def _is_alignment(value: Any) -> bool:
    return type(value) is int and value >= 8 and value & (value - 1) == 0


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape as NumPy has it, (out, in); ``offset`` from the start of the file.

    ``type`` is ggml's name, or "type 99" for one that this list does not know, whose ``nbytes`` is None.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int | None


class GGUFFile:
    """An open GGUF file: ``metadata`` by key, ``tensors`` (TensorInfo) by name, and their data as they are
    asked for.

    Metadata are int, float (np.float64 for 64 bits, which write_gguf keeps), bool, str, lists of str or of
    arrays, and for arrays of numbers read-only NumPy views. Raises FileError, before it takes memory, for
    whatever is missing, truncated, contradictory, out of range or of an unknown version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._map = _mapped(self.path)
        header = _Header(self.path, self._map)
        self.version = header.version()
        n_tensors, n_entries = (
            header.count("tensor count", 32, MAX_ENTRIES),
            header.count("metadata count", 13, MAX_ENTRIES),
        )
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
        if not _is_alignment(self.alignment):
            raise header.error("general.alignment", f"is {self.alignment!r}; it {ALIGNMENTS}")
        self.tensors = header.placed([header.tensor(i) for i in range(n_tensors)], self.alignment)

    def entry(self, key: str) -> bytes:
        """Return one metadata value as it stands in the file, its type and its bytes, for write_gguf to write
        again."""
        start, end = self._entries[key]
        return self._map[start:end]

    def array(self, name: str) -> Array:
        """Return an F32 or F16 tensor as a read-only view of the file, a BF16 tensor as float32.

        Raises FileError for an unknown name, another type, and for a tensor that holds NaN or infinity.
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
            can = (
                "weight(name) can"
                if info.type in BLOCK_BYTES
                else "convert the file to F16, Q8_0, Q4_0 or Q4_1"
            )
            raise FileError(
                f"{self.path}: tensor {name!r} is {info.type}; array(name) reads F32, F16 and BF16; {can}"
            )
        flat = array.reshape(-1)
        for first in range(0, flat.size, 2**18):
            if not np.isfinite(flat[first : first + 2**18]).all():
                raise FileError(
                    f"{self.path}: tensor {name!r} holds NaN or infinity; convert the model again"
                )
        return array

    def weight(self, name: str) -> BlockWeight | DenseWeight:
        """Return a matrix: Q4_0, Q4_1 and Q8_0 as a BlockWeight over the file's own bytes, F32, F16 and BF16
        dense in float32.

        Raises FileError for an unknown name, another type or number of dimensions, and for scales that are
        not finite.
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
            some = ", ".join([*list(self.tensors)[:5], *["…"] * (len(self.tensors) > 5)])
            raise FileError(f"{self.path}: no tensor {name!r} among its {len(self.tensors)} ({some})")
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
    """Reads the header from front to back, and never a byte that is not there."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.pos = path, data, 4
        self.left = {STRING: MAX_STRINGS, ARRAY: MAX_ARRAYS}
        self.end = min(len(data), MAX_HEADER)

    def error(self, what: str, problem: str) -> FileError:
        return FileError(f"{self.path}: {what} {problem}")

    def skip(self, size: int, what: str) -> int:
        """Return the present position and move on, if ``size`` bytes are left."""
        if size > self.end - self.pos:
            limit = "the file has" if self.end == len(self.data) else "a header may have"
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
                "version", f"is {version}; 2 and 3 are read: convert the model again with a present llama.cpp"
            )
        return version

    def count(self, what: str, least: int, most: int = MAX_HEADER) -> int:
        """Return a number of things that take at least so many bytes each."""
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
        """Return ``text``'s results many times over, in a third of the time: a vocabulary has 10^5
        strings."""
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
                self.text(what)  # says what is wrong
                raise
            pos = stop
        self.pos = pos
        return found

    def value(self, kind: int, what: str, depth: int = MAX_DEPTH) -> Any:
        """Return one metadata value of a type; ``depth`` is how deep arrays may still lie in arrays."""
        if kind in SCALARS:
            number = self.numbers(kind, 1, what)[0]
            return number if number.dtype == np.float64 else number.item()
        if kind not in (STRING, ARRAY):
            raise self.error(what, f"has type {kind}; the types are 0 to 12")
        if self.left[kind] == 0:
            raise self.error(
                what, f"has a string or an array too many: {MAX_STRINGS} and {MAX_ARRAYS} are read"
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
        """Read one tensor info, whose offset counts from the beginning of the data."""
        name = self.text(f"name of tensor {i}", MAX_NAME)
        what = f"tensor {name[:80]!r}"
        n_dims = self.number("<I", f"number of dimensions of {what}")
        if not 1 <= n_dims <= 4:
            raise self.error(what, f"has {n_dims} dimensions; there may be 1 to 4")
        shape = tuple(self.number("<Q", f"shape of {what}") for _ in range(n_dims))[::-1]
        size = math.prod(shape)  # whole numbers of Python: no overflow
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
        """Return the tensors with offsets from the start of the file, if each lies in the file and none on
        another."""
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


def write_gguf(
    path: str | Path,
    tensors: dict[str, DenseWeight | BlockWeight | AffineWeight | Array],
    metadata: dict[str, Any],
    arch: str = "llama",
) -> dict[str, float]:
    """Write a GGUF file; complete or not at all.

    Arrays and dense weights become F32 or F16 by their dtype, int4 groups of 32 become Q4_1. A NumPy number
    or array of the metadata keeps its type; an int becomes UINT32 if it fits, else INT32 or 64 bits, a float
    FLOAT32; bytes are a value as another file has it, ``GGUFFile.entry(key)``. Returns, for each affine
    weight, the largest change of an offset by rounding to float16: 0 unless it was merged. Raises ValueError
    for what a file cannot hold.
    """
    require(
        metadata.get("general.architecture", arch) == arch,
        "arch",
        arch,
        "metadata['general.architecture'] says otherwise",
    )
    stored = {name: _stored(name, tensor) for name, tensor in tensors.items()}
    if any(quant_type in BLOCK_BYTES for _, quant_type, _ in stored.values()):
        metadata = metadata | {
            "general.quantization_version": metadata.get("general.quantization_version", QUANTIZATION_VERSION)
        }
    alignment = metadata.get("general.alignment", 32)
    require(_is_alignment(alignment), "general.alignment", alignment, ALIGNMENTS)
    entries = {"general.architecture": arch} | metadata
    header = [b"GGUF", struct.pack("<IQQ", VERSION, len(stored), len(entries))]
    header += [part for key, value in entries.items() for part in (_text(key), _typed(key, value))]
    at = 0
    for name, (array, quant_type, _) in stored.items():
        shape = tensors[name].shape  # of weights, not of their bytes
        header += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        header += [struct.pack("<IQ", _TYPES[quant_type], at)]
        at += -(-array.nbytes // alignment) * alignment
    with atomic(Path(path)) as temporary, open(temporary, "wb") as file:
        for part in (b"".join(header), *(array for array, _, _ in stored.values())):
            written = file.write(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
            file.write(bytes(-written % alignment))
    return {
        name: change for name, (_, _, change) in stored.items() if isinstance(tensors[name], AffineWeight)
    }


def _stored(name: str, tensor: Any) -> tuple[Array, str, float]:
    """Return what is written of a tensor: its array, its type, the largest change of an offset."""
    longest = 63  # ggml's names end with a zero byte, within 64
    require(
        0 < len(name.encode()) <= longest,
        "tensors",
        name,
        f"a name has 1 to {longest} bytes: llama.cpp refuses others",
    )
    if isinstance(tensor, AffineWeight):
        blocks, change = BlockWeight.from_affine(tensor)
        return blocks.blocks, blocks.quant_type, change
    if isinstance(tensor, BlockWeight):
        return tensor.blocks, tensor.quant_type, 0.0
    array = np.asarray(tensor.param.data if isinstance(tensor, DenseWeight) else tensor)
    require(array.dtype in (np.float32, np.float16), name, str(array.dtype), "must be float32 or float16")
    require(
        1 <= array.ndim <= 4 and array.size > 0,
        name,
        array.shape,
        "must have 1 to 4 dimensions, none of them 0",
    )
    require(bool(np.isfinite(array).all()), name, "NaN or infinity", "must be finite")
    return array.astype(array.dtype.newbyteorder("<"), copy=False), f"F{8 * array.itemsize}", 0.0


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(key: str, value: Any) -> bytes:
    """Return a metadata value as it stands in a file: its type, for an array its items' type and number, and
    its bytes."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    numbers = np.asarray(value)
    require(
        numbers.dtype.kind in "biuf"
        and numbers.dtype != np.float16
        and numbers.ndim <= 1
        and numbers.size > 0,
        key,
        value,
        "must be a string, a number, or a list of strings or of numbers, not empty",
    )
    if not isinstance(value, (np.ndarray, np.generic)) and numbers.dtype != np.bool_:
        whole = (np.int32, np.int64, np.uint64)  # llama.cpp wants arrays of INT32, and single numbers UINT32
        fits: tuple[Any, ...] = whole if numbers.ndim else (np.uint32, *whole)
        for dtype in (np.float32, np.float64) if numbers.dtype.kind == "f" else fits:
            limits = np.finfo(dtype) if numbers.dtype.kind == "f" else np.iinfo(dtype)
            if limits.min <= numbers.min() and numbers.max() <= limits.max:
                numbers = numbers.astype(dtype)
                break
    kind = _KINDS[numbers.dtype.newbyteorder("<")]
    start = struct.pack("<I", kind) if numbers.ndim == 0 else struct.pack("<IIQ", ARRAY, kind, len(numbers))
    return start + numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
