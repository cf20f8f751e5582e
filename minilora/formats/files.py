"""What all formats share: safetensors in and out, checked on reading, atomic on writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Array = np.ndarray
METADATA = "minilora"


class FileError(ValueError):
    """A file that cannot be used; the message names the file, what is wrong and what to do."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes when it does not."""
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
    """Make a folder if it is not there; raises FileError, before any work is lost, if nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from None


def write_tensors(path: Path, arrays: dict[str, Array], metadata: dict[str, Any], plain: dict[str, str] | None = None) -> None:
    """Write a safetensors file; complete or not at all.

    ``metadata`` becomes one JSON text, because several entries would come in a random order and change the file's bytes;
    ``plain`` is for another program's entry, as it stands.
    """
    packed = {METADATA: json.dumps(metadata, sort_keys=True)} if metadata else {}
    with atomic(Path(path)) as temporary:
        save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, temporary, packed | (plain or {}))


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a safetensors file; raises FileError if it is missing, truncated, foreign or holds NaN or infinity."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            raw = file.metadata() or {}
    except (SafetensorError, OSError, TypeError) as error:
        raise FileError(f"{path}: not a complete safetensors file ({error}); write it again or fetch a fresh copy") from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FileError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")
    try:
        metadata = json.loads(raw.get(METADATA, "{}"))
    except ValueError as error:
        raise FileError(f"{path}: its {METADATA!r} metadata is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise FileError(f"{path}: its {METADATA!r} metadata is not a JSON object")
    return arrays, metadata


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises FileError if it is missing or something else."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_file(path: str | Path, data: str | bytes) -> Path:
    """Write a file, text as UTF-8; complete or not at all. Returns its path."""
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)
