"""Shared by all formats: safetensors and JSON, checked when read and atomic when written."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Array = np.ndarray
METADATA_KEY = "minilora"
"""Entry of a safetensors header that holds our own metadata, as one JSON text."""

MAX_HEADER_BYTES = 16_000_000
"""Longest safetensors header that is read, enough for 100,000 tensors; parsed JSON may take 20 times that."""

MAX_JSON_BYTES = 4_000_000
"""Longest JSON file that is read, unless the caller says otherwise."""

# dtypes of safetensors: all that the library reads, and those that `StoredTensor` reads, as NumPy spells them
_LIBRARY_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_STORED_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "|u1", "I32": "<i4"}


class FileError(ValueError):
    """A file that cannot be used; the message names the file, what is wrong and what to do."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block succeeds.

    A block that raises leaves `path` as it was and removes the temporary file.
    """
    writable_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask allows; safetensors makes its files private
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(folder: Path) -> None:
    """Create a folder if needed, and raise FileError at once if nothing can be written into it."""
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
    """Write a safetensors file, complete or not at all.

    Parameters
    ----------
    path : Path
        The file.
    arrays : dict of str to ndarray
        Tensors by name.
    metadata : dict
        Our own metadata. It becomes one JSON text: safetensors writes several entries in a random order,
        which would change the file's bytes.
    plain : dict of str to str, optional
        Header entries that other programs expect, written as they are.
    """
    header = dict(plain or {})
    if metadata:
        header[METADATA_KEY] = json.dumps(metadata, sort_keys=True)
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic(Path(path)) as temporary:
        save_file(contiguous, temporary, header)


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a safetensors file and our metadata; BF16 tensors become float32.

    Raises
    ------
    FileError
        The file is missing, cut short or no safetensors file, or a tensor holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
            for name, kind in kinds.items():
                if kind not in _LIBRARY_DTYPES:
                    raise _wrong_dtype(path, name, kind, sorted(_LIBRARY_DTYPES))
            # NumPy has no BF16: those tensors are read below
            arrays = {name: file.get_tensor(name) for name, kind in kinds.items() if kind != "BF16"}
            raw = file.metadata() or {}
        if len(arrays) < len(kinds):
            stored = stored_tensors(path)
            arrays |= {name: stored[name].read() for name in kinds.keys() - arrays.keys()}
    except (SafetensorError, OSError, TypeError) as error:
        raise _incomplete(path, error) from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FileError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")
    try:
        metadata = json.loads(raw.get(METADATA_KEY, "{}"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: its {METADATA_KEY!r} metadata is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise FileError(f"{path}: its {METADATA_KEY!r} metadata is not a JSON object")
    return arrays, metadata


def _incomplete(path: Path, problem: object) -> FileError:
    return FileError(
        f"{path}: not a complete safetensors file ({problem}); write it again or fetch a fresh copy"
    )


def _wrong_dtype(path: Path, name: str, dtype: object, readable: Iterable[str]) -> FileError:
    return FileError(f"{path}: {name!r} has dtype={dtype}, can read {', '.join(readable)}: convert it")


# ---- one tensor at a time: memory cannot hold a large file twice, and NumPy has no BF16


class StoredTensor(NamedTuple):
    """Where a tensor lies in a safetensors file; `dtype` is safetensors' name for it, such as BF16."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * np.dtype(_STORED_DTYPES[self.dtype]).itemsize

    def read(self) -> Array:
        """Read the tensor; BF16 is widened to float32, which is exact.

        Raises
        ------
        FileError
            The tensor holds NaN or infinity, or the file ends within it.
        """
        size, dtype = math.prod(self.shape), np.dtype(_STORED_DTYPES[self.dtype])
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
    """Read the header of a safetensors file, and return where each tensor lies.

    A file is 8 bytes of header length, the header in JSON, and the tensors' bytes without gap or overlap.

    Raises
    ------
    FileError
        The file has another layout, or a dtype is none of F32, F16, BF16, U8 and I32.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise _incomplete(
                    path, f"a header of {length} bytes in a file of {size}, the limit is {MAX_HEADER_BYTES}"
                )
            header = json.loads(file.read(length).decode(), object_pairs_hook=without_repeats)
    except FileError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise _incomplete(path, f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise _incomplete(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    found = {}
    ranges = [(0, 0)]
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _incomplete(path, f"{name!r} is {reprlib.repr(entry)}, needs dtype, shape and data_offsets")
        dtype, shape, ends = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _STORED_DTYPES:
            raise _wrong_dtype(path, name, reprlib.repr(dtype), _STORED_DTYPES)
        shape_ok = _are_sizes(shape) and len(shape) <= 8 and max(shape, default=0) <= size
        if not (shape_ok and _are_sizes(ends) and len(ends) == 2):
            raise _incomplete(
                path, f"{name!r} has shape={reprlib.repr(shape)}, data_offsets={reprlib.repr(ends)}"
            )
        found[name] = StoredTensor(path, name, dtype, tuple(shape), 8 + length + ends[0])
        if ends[1] - ends[0] != found[name].nbytes:
            raise _incomplete(
                path, f"{name!r} has {ends[1] - ends[0]} bytes, {dtype} {shape} needs {found[name].nbytes}"
            )
        ranges.append((ends[0], ends[1]))
    ranges.sort()
    for (_, end), (start, _) in pairwise([*ranges, (size - 8 - length, 0)]):
        if start != end:
            raise _incomplete(
                path,
                f"a tensor ends at byte {end} of its data, but the next, or the file's end, is at {start}",
            )
    return found


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict, and raise ValueError for a repeated name: for `json.loads(object_pairs_hook=…)`."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, and raise FileError for a link that leads out of it.

    The hub's cache is an exception. There, `models--org--name/snapshots/<revision>/config.json` links to
    `models--org--name/blobs/<hash>`.
    """
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise FileError(f"{folder / name}: cannot be opened ({error})") from None
    in_hub_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if target.parent != root and not in_hub_cache:
        raise FileError(f"{folder / name}: is a link to {target}, outside the folder; copy the file itself")
    return folder / name


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    FileError
        The file is missing or longer than `max_bytes`, is no JSON object, or repeats a name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise FileError(f"{path}: has {size} bytes, at most {max_bytes} are read")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except FileError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise FileError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_file(path: str | Path, data: str | bytes) -> Path:
    """Write a file, complete or not at all, and return its path; text is UTF-8."""
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)
