"""Write GGUF, llama.cpp's model file; `gguf` describes its layout."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import require
from minilora.formats.files import Array, atomic
from minilora.formats.gguf import ALIGNMENT_RULE, ARRAY, GGML_TYPES, SCALARS, STRING, is_alignment
from minilora.parameters import DenseWeight
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BLOCK_BYTES, BlockWeight

VERSION = 3
"""Version of the file format that is written."""
QUANTIZATION_VERSION = 2
"""Version of the block formats in it."""

MAX_TENSOR_NAME = 63
"""Longest name of a tensor in bytes: ggml keeps 64, a zero byte among them."""

_SCALAR_TYPES = {np.dtype(letters): number for number, letters in SCALARS.items()}
_TENSOR_TYPES = {name: number for number, (name, _, _) in GGML_TYPES.items()}


def write_gguf(
    path: str | Path,
    tensors: dict[str, DenseWeight | BlockWeight | AffineWeight | Array],
    metadata: dict[str, Any],
    arch: str = "llama",
) -> dict[str, float]:
    """Write a GGUF file, complete or not at all.

    Parameters
    ----------
    path : str or Path
        The file.
    tensors : dict of str to weight or ndarray
        Arrays and dense weights are written as F32 or F16, by their dtype. Blocks stay as they are. Int4
        groups of 32 become Q4_1.
    metadata : dict
        A NumPy number or array keeps its type. An int becomes UINT32 if it fits, else INT32 or 64 bits; a
        float becomes FLOAT32. Bytes are a value from another file, `GGUFFile.entry(key)`.
    arch : str
        `general.architecture`.

    Returns
    -------
    dict of str to float
        For each affine weight, the largest change of an offset by rounding to float16: 0 unless it was
        merged.

    Raises
    ------
    ConfigError
        GGUF cannot hold a tensor or a value.
    """
    require(
        metadata.get("general.architecture", arch) == arch,
        "arch",
        arch,
        "metadata['general.architecture'] says otherwise",
    )
    stored = {name: _stored(name, tensor) for name, tensor in tensors.items()}
    entries = {"general.architecture": arch} | metadata
    if any(quant_type in BLOCK_BYTES for _, quant_type, _ in stored.values()):
        entries.setdefault("general.quantization_version", QUANTIZATION_VERSION)
    alignment = entries.get("general.alignment", 32)
    require(is_alignment(alignment), "general.alignment", alignment, ALIGNMENT_RULE)
    header = [b"GGUF", struct.pack("<IQQ", VERSION, len(stored), len(entries))]
    for key, value in entries.items():
        header += [_text(key), _typed(key, value)]
    offset = 0
    for name, (array, quant_type, _) in stored.items():
        shape = tensors[name].shape  # counts weights, not bytes
        header += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        header += [struct.pack("<IQ", _TENSOR_TYPES[quant_type], offset)]
        offset += -(-array.nbytes // alignment) * alignment
    with atomic(Path(path)) as temporary, open(temporary, "wb") as file:
        for part in (b"".join(header), *(array for array, _, _ in stored.values())):
            written = file.write(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
            file.write(bytes(-written % alignment))
    return {
        name: change for name, (_, _, change) in stored.items() if isinstance(tensors[name], AffineWeight)
    }


def _stored(name: str, tensor: Any) -> tuple[Array, str, float]:
    """Return what is written for a tensor: its array, its type, and the largest change of an offset."""
    require(
        0 < len(name.encode()) <= MAX_TENSOR_NAME,
        "tensors",
        name,
        f"a name has 1 to {MAX_TENSOR_NAME} bytes: llama.cpp refuses others",
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
    """Return a metadata value in the file's form: its type, an array's item type and length, its bytes."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    numbers = np.asarray(value)
    is_number = numbers.dtype.kind in "biuf" and numbers.dtype != np.float16
    require(
        is_number and numbers.ndim <= 1 and numbers.size > 0,
        key,
        value,
        "must be a string, a number, or a list of strings or of numbers, not empty",
    )
    if not isinstance(value, (np.ndarray, np.generic)) and numbers.dtype != np.bool_:
        numbers = _narrowed(numbers)
    kind = _SCALAR_TYPES[numbers.dtype.newbyteorder("<")]
    start = struct.pack("<I", kind) if numbers.ndim == 0 else struct.pack("<IIQ", ARRAY, kind, len(numbers))
    return start + numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()


def _narrowed(numbers: Array) -> Array:
    """Give Python numbers the first type that holds them, in the order that llama.cpp expects."""
    dtype: Any
    if numbers.dtype.kind == "f":
        dtypes = ["f4", "f8"]
    elif numbers.ndim:
        dtypes = ["i4", "i8", "u8"]
    else:
        dtypes = ["u4", "i4", "i8", "u8"]
    for dtype in map(np.dtype, dtypes):
        limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
        if limits.min <= numbers.min() and numbers.max() <= limits.max:
            return numbers.astype(dtype)
    return numbers
