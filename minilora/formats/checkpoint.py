"""Our own model file: safetensors with transformers' tensor names, and the configuration as metadata."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from minilora.building import build_model, parameter_shapes
from minilora.config import AFFINE_TYPES, CODEBOOK_TYPES, ConfigError, ModelConfig, require_in
from minilora.formats.files import FileError, read_tensors, write_tensors
from minilora.parameters import DenseWeight
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BLOCK_BYTES, BlockWeight
from minilora.quant.packed import unpacked
from minilora.quant.weights import CodebookWeight, DoubleQuant
from minilora.quant.zero_points import ZeroPointWeight
from minilora.transformer import Transformer


def save_model(
    model: Transformer, path: str | Path, dtype: Any = np.float32, metadata: dict[str, Any] | None = None
) -> None:
    """Save a model without adapters.

    Parameters
    ----------
    model : Transformer
        The model. Merge adapters first, or save them alone with `save_adapter`.
    path : str or Path
        The `.safetensors` file.
    dtype : dtype, default float32
        What dense arrays are rounded to. Quantized weights are written bit for bit.
    metadata : dict, optional
        More entries of the file's metadata; `read_info` returns them.

    Raises
    ------
    ConfigError
        A layer has an adapter.
    """
    arrays = {p.name: p.data.astype(dtype) for p in model.parameters()}
    stored: dict[str, dict[str, Any]] = {}
    for name, layer in [(model.embedding.name, model.embedding), *model.linears()]:
        weight = getattr(layer, "weight", None)
        if model.tied and name == model.head.name:
            continue  # its weight is the embedding's
        if isinstance(weight, AffineWeight):
            stored[name] = {"quant_type": weight.quant_type, "group_size": weight.group_size}
            (offset,) = weight.arrays()["offsets"]  # whole zero points are packed uint8
            arrays |= {f"{name}.codes": weight.codes, f"{name}.scale": weight.scale, f"{name}.offset": offset}
        elif isinstance(weight, BlockWeight):
            stored[name] = {"quant_type": weight.quant_type}
            arrays[f"{name}.blocks"] = weight.blocks
        elif isinstance(weight, CodebookWeight):
            stored[name] = {
                "quant_type": weight.quant_type,
                "block_size": weight.block_size,
                "double_quant": weight.double_quant,
            }
            arrays[f"{name}.codes"] = weight.codes
            if isinstance(weight.scales, DoubleQuant):
                arrays |= {
                    f"{name}.scale.{part}": getattr(weight.scales, part)
                    for part in ("codes", "absmax", "offset")
                }
            else:
                arrays[f"{name}.scale"] = weight.scales
        elif not isinstance(weight, DenseWeight):
            raise ConfigError(
                f"{name}: has an adapter; merge(model) makes a model without, or save_adapter saves the "
                "adapter alone"
            )
    config = asdict(replace(model.config, tie_word_embeddings=model.tied))  # a merged head is no longer tied
    if config["rope_factors"] is None:
        del config["rope_factors"]  # older files have no such field
    write_tensors(
        Path(path), arrays, {"minilora_model": config, "minilora_quantized": stored} | (metadata or {})
    )


def load_model(path: str | Path) -> Transformer:
    """Load a frozen model; dense arrays become float32.

    Raises
    ------
    FileError
        The file is missing, truncated or not ours, or its arrays contradict its configuration.
    """
    path = Path(path)
    arrays, metadata = read_tensors(path)
    config, stored = metadata.get("minilora_model"), metadata.get("minilora_quantized", {})
    names = {field.name for field in fields(ModelConfig)}
    if not isinstance(config, dict) or {"rope_factors", *config} != names or not isinstance(stored, dict):
        raise FileError(f"{path}: no minilora model (its metadata lacks a complete 'minilora_model' entry)")
    try:
        model_config = ModelConfig(**config)
        layers = model_config.num_hidden_layers
        if layers > len(arrays):  # a huge number would make a huge list of names below
            raise ValueError(f"num_hidden_layers={layers}, but there are {len(arrays)} arrays in all")
        shapes = parameter_shapes(model_config)
        weights = {name: _quantized(name, shapes, how, arrays) for name, how in stored.items()}
        if any(array.dtype.kind != "f" for array in arrays.values()):
            raise ValueError("holds arrays that are not floating point")
        dense = {name: array.astype(np.float32) for name, array in arrays.items()}
        return build_model(
            model_config, dense | {f"{name}.weight": weight for name, weight in weights.items()}
        )
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise FileError(f"{path}: {error}") from None


def _quantized(
    name: str, shapes: dict[str, tuple[int, ...]], how: dict[str, Any], arrays: dict[str, Any]
) -> Any:
    """Take one quantized weight's arrays out of `arrays`; `load_model` names the file in errors.

    The weight classes check all sizes.
    """
    out_in = shapes.get(f"{name}.weight", ())
    if len(out_in) != 2 or (name == "model.embed_tokens" and how["quant_type"] not in BLOCK_BYTES):
        raise ValueError(f"{name}: is no projection of this model, so it cannot be quantized")
    shape = (out_in[0], out_in[1])

    def take(part: str, *kinds: str) -> Any:
        array = arrays.pop(f"{name}.{part}", None)
        if array is None or array.dtype.name not in kinds:
            found = "missing" if array is None else array.dtype
            raise ValueError(f"{name}.{part}: {found}, must be {' or '.join(kinds)}")
        return array

    def whole(setting: str) -> int:
        if type(how[setting]) is not int:
            raise ValueError(f"{name}: {setting}={how[setting]!r}, must be a whole number")
        return how[setting]

    require_in(how["quant_type"], (*CODEBOOK_TYPES, *AFFINE_TYPES, *BLOCK_BYTES), f"{name}.quant_type")
    if how["quant_type"] in BLOCK_BYTES:
        return BlockWeight(take("blocks", "uint8"), how["quant_type"], shape)
    codes = take("codes", "uint8")
    if how["quant_type"] in AFFINE_TYPES:
        scale, offset = take("scale", "float16"), take("offset", "float16", "float32", "uint8")
        bits = int(how["quant_type"][-1])
        if offset.dtype == np.uint8:
            offset = unpacked(offset, scale.size, bits).reshape(scale.shape)
            return ZeroPointWeight(codes, scale, offset, shape, bits, whole("group_size"))
        return AffineWeight(codes, scale, offset, shape, bits, whole("group_size"))
    if how["double_quant"] is True:
        nested = (
            take("scale.codes", "uint8"),
            take("scale.absmax", "float32"),
            take("scale.offset", "float32"),
        )
        return CodebookWeight(codes, DoubleQuant(*nested), shape, how["quant_type"], whole("block_size"))
    scales = take("scale", "float32")
    if scales.size and scales.min() < 0:
        raise ValueError(
            f"{name}.scale: {scales.min()}, must be at least 0: it is the largest |w| of a block"
        )
    return CodebookWeight(codes, scales, shape, how["quant_type"], whole("block_size"))


def base_path() -> Path:
    """Return the file of the pretrained tiny base, which is part of the package."""
    return Path(str(files("minilora") / "assets" / "base.safetensors"))


def load_base() -> Transformer:
    """Load the pretrained tiny base of the package: byte-level, 128 wide, 4 layers.

    Examples
    --------
    >>> load_base().config.hidden_size
    128
    """
    return load_model(base_path())


def read_info(path: str | Path) -> dict[str, Any]:
    """Return how a model file was made, from its metadata: command, corpus hash, held-out loss."""
    _, metadata = read_tensors(Path(path))
    return {
        key: value for key, value in metadata.items() if key not in ("minilora_model", "minilora_quantized")
    }


def sha256(model: Transformer) -> str:
    """Return the SHA-256 of all weights as stored, with their names; it tells bases apart."""
    digest = hashlib.sha256()
    arrays = [(p.name, p.data) for p in model.parameters()]
    for layer in (model.embedding, *(linear for _, linear in model.linears())):
        if not isinstance(layer.weight, DenseWeight):
            arrays += [
                (f"{layer.name}.{kind}", array)
                for kind in ("codes", "scales", "offsets")
                for array in layer.weight.arrays()[kind]
            ]
    for name, array in arrays:
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
