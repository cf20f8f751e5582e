"""What all formats share: safetensors in and out, checked on reading, atomic on writing."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Array = np.ndarray
METADATA = "minilora"


class FileError(ValueError):
    """A file that cannot be used; the message names the file, what is wrong and what to do."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes when it does
    not."""
    writable_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors makes its files private
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(folder: Path) -> None:
    """Make a folder if it is not there; raises FileError, before any work is lost, if nothing can be written
    in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder"
        ) from None


def write_tensors(
    path: Path, arrays: dict[str, Array], metadata: dict[str, Any], plain: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; complete or not at all.

    ``metadata`` becomes one JSON text, because several entries would come in a random order and change the
    file's bytes; ``plain`` is for another program's entry, as it stands.
    """
    packed = {METADATA: json.dumps(metadata, sort_keys=True)} if metadata else {}
    with atomic(Path(path)) as temporary:
        save_file(
            {name: np.asarray(a, order="C") for name, a in arrays.items()}, temporary, packed | (plain or {})
        )


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a safetensors file, BF16 as float32; raises FileError if it is missing, cut short, foreign, or
    holds NaN or inf."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (it is no dict)
            for name, kind in kinds.items():
                if kind not in _KNOWN_TYPES:
                    raise FileError(
                        f"{path}: {name!r} has dtype={kind}, can read {', '.join(sorted(_KNOWN_TYPES))}: convert it"
                    )
            arrays = {
                name: file.get_tensor(name) for name, kind in kinds.items() if kind != "BF16"
            }  # NumPy has no such type
            raw = file.metadata() or {}
        if len(arrays) < len(kinds):
            stored = stored_tensors(path)
            arrays |= {name: stored[name].read() for name in kinds.keys() - arrays.keys()}
    except (SafetensorError, OSError, TypeError) as error:
        raise FileError(
            f"{path}: not a complete safetensors file ({error}); write it again or fetch a fresh copy"
        ) from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FileError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")
    try:
        metadata = json.loads(raw.get(METADATA, "{}"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: its {METADATA!r} metadata is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise FileError(f"{path}: its {METADATA!r} metadata is not a JSON object")
    return arrays, metadata


# ---- one tensor at a time: for files larger than memory allows to hold twice, and for BF16, which NumPy does

LONGEST_HEADER = 16_000_000
"""Bytes of a safetensors header that are read, enough for 100,000 tensors; JSON may take twenty times its
size in memory."""

LONGEST_JSON = 4_000_000
"""Bytes of a JSON file that are read, unless the caller says otherwise."""

_KNOWN_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_TENSOR_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "|u1", "I32": "<i4"}


class StoredTensor(NamedTuple):
    """Where a tensor lies in a safetensors file; ``dtype`` is the file's own name of it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * np.dtype(_TENSOR_TYPES[self.dtype]).itemsize

    def read(self) -> Array:
        """Read it: BF16 comes widened to float32, which is exact; raises FileError for NaN, infinity or a
        file cut short."""
        size, dtype = math.prod(self.shape), np.dtype(_TENSOR_TYPES[self.dtype])
        try:
            array = np.fromfile(self.path, dtype, size, offset=self.offset)
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        if array.size != size:
            raise FileError(f"{self.path}: ends within {self.name!r}; fetch a fresh copy")
        array = array.reshape(self.shape).astype(dtype.newbyteorder("="), copy=False)
        if self.dtype == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FileError(f"{self.path}: {self.name} holds NaN or infinity; use an earlier checkpoint")
        return array


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read a safetensors file's header alone: 8 bytes of length, JSON, then the tensors' bytes without gap or
    overlap.

    Raises FileError if any of this does not hold, or for a dtype other than F32, F16, BF16, U8 and I32.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")

    def refuse(what: str) -> FileError:
        return FileError(
            f"{path}: not a complete safetensors file ({what}); write it again or fetch a fresh copy"
        )

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, LONGEST_HEADER):
                raise refuse(f"a header of {length} bytes in a file of {size}, the limit is {LONGEST_HEADER}")
            header = json.loads(file.read(length).decode(), object_pairs_hook=without_repeats)
    except FileError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise refuse(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise refuse("its header is no JSON object")
    header.pop("__metadata__", None)
    found, ranges = {}, [(0, 0)]
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise refuse(f"{name!r} is {reprlib.repr(entry)}, needs dtype, shape and data_offsets")
        dtype, shape, ends = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _TENSOR_TYPES:
            raise FileError(
                f"{path}: {name!r} has dtype={reprlib.repr(dtype)}, can read {', '.join(_TENSOR_TYPES)}: convert it"
            )
        if not (
            _are_sizes(shape)
            and len(shape) <= 8
            and _are_sizes(ends)
            and len(ends) == 2
            and max(shape, default=0) <= size
        ):
            raise refuse(f"{name!r} has shape={reprlib.repr(shape)}, data_offsets={reprlib.repr(ends)}")
        found[name] = StoredTensor(path, name, dtype, tuple(shape), 8 + length + ends[0])
        if ends[1] - ends[0] != found[name].nbytes:
            raise refuse(
                f"{name!r} has {ends[1] - ends[0]} bytes, {dtype} {shape} needs {found[name].nbytes}"
            )
        ranges.append((ends[0], ends[1]))
    ranges.sort()
    for (_, last), (first, _) in pairwise([*ranges, (size - 8 - length, 0)]):
        if first != last:
            raise refuse(
                f"byte {last} of its data ends a tensor, byte {first} begins the next or the end of the file"
            )
    return found


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, refusing one that says something twice: for ``json.loads(…,
    object_pairs_hook=…)``."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a folder's file, refusing a link that leads out of it, except to the blobs of the
    hub's own cache."""
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise FileError(f"{folder / name}: cannot be opened ({error})") from None
    blobs = (
        root.parent.parent / "blobs"
    )  # models--org--name/{snapshots/<revision>/config.json -> ../../blobs/<hash>}
    if target.parent != root and not (root.parent.name == "snapshots" and target.parent == blobs):
        raise FileError(f"{folder / name}: is a link to {target}, outside the folder; copy the file itself")
    return folder / name


def read_json(path: Path, longest: int = LONGEST_JSON) -> dict[str, Any]:
    """Read a JSON object; raises FileError if it is missing, longer than ``longest`` bytes, says a name twice
    or is none."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        if (size := path.stat().st_size) > longest:
            raise FileError(f"{path}: has {size} bytes, such a file is read up to {longest}")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except FileError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise FileError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_file(path: str | Path, data: str | bytes) -> Path:
    """Write a file, text as UTF-8; complete or not at all. Returns its path."""
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)
