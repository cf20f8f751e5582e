"""Our own model file: safetensors with transformers' names and the model's configuration in the metadata."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import ModelConfig
from minilora.formats.files import FileError, read_tensors, write_tensors
from minilora.layers import DenseWeight
from minilora.transformer import Transformer, build_model


def save_model(model: Transformer, path: str | Path, dtype: Any = np.float32, metadata: dict[str, Any] | None = None) -> None:
    """Save a dense model without adapters. Merge adapters first, or save them alone with ``save_adapter``."""
    for name, linear in model.linears():
        if not isinstance(getattr(linear, "weight", None), DenseWeight):
            raise ValueError(f"{name}: only dense models can be saved; merge(model, how='dense') makes one")
    arrays = {p.name: p.data.astype(dtype) for p in model.parameters()}
    write_tensors(Path(path), arrays, {"minilora_model": asdict(model.config)} | (metadata or {}))


def load_model(path: str | Path) -> Transformer:
    """Load a frozen float32 model; raises FileError for a file that is missing, truncated or not ours."""
    path = Path(path)
    arrays, metadata = read_tensors(path)
    config = metadata.get("minilora_model")
    names = {field.name for field in fields(ModelConfig)}
    if not isinstance(config, dict) or set(config) != names:
        raise FileError(f"{path}: no minilora model (its metadata lacks a complete 'minilora_model' entry)")
    if any(array.dtype.kind != "f" for array in arrays.values()):
        raise FileError(f"{path}: holds arrays that are not floating point")
    try:
        model = build_model(ModelConfig(**config), {name: a.astype(np.float32) for name, a in arrays.items()})
    except (ValueError, TypeError) as error:
        raise FileError(f"{path}: {error}") from None
    return model


def base_path() -> Path:
    """Where the pretrained tiny base lies in the package."""
    return Path(str(files("minilora") / "assets" / "base.safetensors"))


def load_base() -> Transformer:
    """The pretrained tiny base that ships in the package: byte-level, 128 wide, 4 layers.

    >>> load_base().config.hidden_size
    128
    """
    return load_model(base_path())


def read_info(path: str | Path) -> dict[str, Any]:
    """How a model file was made, as far as its metadata says: command, corpus hash, Python version, held-out loss."""
    return {k: v for k, v in read_tensors(Path(path))[1].items() if k != "minilora_model"}


def sha256(model: Transformer) -> str:
    """Hash of all parameter bytes and names, to tell bases apart."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(f"{p.name}{p.data.shape}{p.data.dtype}".encode())
        digest.update(np.ascontiguousarray(p.data).data)
    return digest.hexdigest()
