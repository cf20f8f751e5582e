"""Hugging Face's model folder: `config.json` with one `model.safetensors`, or with shards and their index.

    config.json                           the architecture (`LlamaConfig`) and how weights are quantized
    model.safetensors                     all tensors of a small model

A large model has these instead of `model.safetensors`:

    model-00001-of-00002.safetensors …    some of the tensors each
    model.safetensors.index.json          which tensor lies in which file

minilora names tensors in the same way. A quantized projection is several tensors: in bitsandbytes' 4-bit form
for NF4 and FP4, in GPTQ's for affine weights with whole zero points. `quantization_config` says which.

Every name, dtype and size is checked against `config.json` before the first array is read. Arrays are read
one at a time, so loading takes the memory of the model and of its largest tensor.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from minilora.building import build_model, parameter_shapes
from minilora.config import ConfigError, require, require_in
from minilora.formats import bitsandbytes, gptq_words
from minilora.formats.files import (
    MAX_HEADER_BYTES,
    Array,
    FileError,
    StoredTensor,
    inside,
    read_json,
    stored_tensors,
    write_file,
    write_tensors,
)
from minilora.formats.huggingface_config import Quantization, read_config, read_quantization, settings_of
from minilora.parameters import DenseWeight
from minilora.quant.affine import AffineWeight
from minilora.quant.weights import CodebookWeight
from minilora.transformer import Transformer

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


# ---- writing


def save_huggingface(
    model: Transformer, folder: str | Path, dtype: Any = np.float32, max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write a model as a folder that transformers opens.

    An earlier model's shards and index are removed once the new files are complete.

    Parameters
    ----------
    model : Transformer
        A model without adapters.
    folder : str or Path
        The folder; it is created if needed.
    dtype : {float32, float16}
        What dense arrays are rounded to. Quantized weights are written bit for bit.
    max_shard_bytes : int
        Largest size of one file's tensors, in bytes; a tensor that is larger has a file of its own.

    Returns
    -------
    list of Path
        The files, `config.json` last.

    Raises
    ------
    ConfigError
        The format cannot say it: adapters, the two-matrix MLP, projections that are not all quantized alike,
        codebooks or offsets that neither bitsandbytes nor GPTQ has, GGUF's blocks, or `rope_factors` that are
        neither linear nor Llama 3's. An array that holds NaN, infinity or more than `dtype` holds.
    """
    folder, dtype = Path(folder), np.dtype(dtype)
    require_in(dtype.name, ("float32", "float16"), "dtype")
    require(
        isinstance(max_shard_bytes, int) and max_shard_bytes >= 1,
        "max_shard_bytes",
        max_shard_bytes,
        "must be a whole number, at least 1",
    )
    settings = settings_of(model, dtype.name)
    quantization, quantized = _quantized_arrays(model)
    dense = {p.name: p.data for p in model.parameters()}
    sizes = {name: array.size * dtype.itemsize for name, array in dense.items()}
    sizes |= {name: array.nbytes for name, array in quantized.items()}
    shards = _shards(sizes, max_shard_bytes)
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    else:
        names = [SINGLE_FILE]
    for name, array in dense.items():  # raises before anything is written over an earlier model
        _rounded(array, dtype, name)
    for file, members in zip(names, shards, strict=True):
        arrays = {}
        for name in members:
            arrays[name] = quantized[name] if name in quantized else _rounded(dense[name], dtype, name)
        # transformers refuses files without a format
        write_tensors(folder / file, arrays, {}, plain={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_file(folder / INDEX_FILE, _json_text(index))
        names.append(INDEX_FILE)
    if quantization:
        settings["quantization_config"] = quantization
    write_file(folder / CONFIG_FILE, _json_text(settings))
    names.append(CONFIG_FILE)
    for old in folder.iterdir():
        is_ours = old.name in (SINGLE_FILE, INDEX_FILE) or _SHARD_NAME.fullmatch(old.name)
        if is_ours and old.name not in names:
            old.unlink()
    return [folder / name for name in names]


def _json_text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _rounded(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Round an array to the file's dtype, and raise ConfigError for a value that does not fit."""
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype, copy=False)
    if not np.isfinite(rounded).all():
        raise ConfigError(
            f"{name}: holds NaN, infinity or a value beyond {dtype}'s {np.finfo(dtype).max:g}; choose float32"
        )
    return rounded


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Fill shards in order, each up to the limit; a larger tensor has one of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _quantized_arrays(model: Transformer) -> tuple[dict[str, Any] | None, dict[str, Array]]:
    """Return (`quantization_config`, tensors of quantized weights), or (None, {}) for a dense model."""
    if not isinstance(model.embedding.weight, DenseWeight):
        raise ConfigError(
            f"{model.embedding.name}: {type(model.embedding.weight).__name__} has no form in a Hugging Face "
            "folder; save_gguf and save_model keep it"
        )
    kinds: dict[str, tuple[Any, ...]] = {}
    packed: dict[str, Any] = {}
    for name, linear in model.linears():
        weight = getattr(linear, "weight", None)
        if weight is None:
            raise ConfigError(
                f"{name}: has an adapter; merge(model) makes a model without, or save_adapter saves the "
                "adapter alone"
            )
        if isinstance(weight, CodebookWeight):
            kinds[name] = (
                weight.quant_type,
                f"blocks of {weight.block_size}",
                f"double_quant={weight.double_quant}",
            )
        elif isinstance(weight, AffineWeight):
            kinds[name] = (weight.quant_type, f"groups of {weight.group_size}")
            if weight.zeros is None:
                raise ConfigError(
                    f"{name}: has float offsets, but GPTQ stores whole zero points only; take offsets 'zero' "
                    "(QuantConfig's offset_dtype, merge --offsets zero), or keep them with save_model "
                    "(X.safetensors)"
                )
        elif not isinstance(weight, DenseWeight):
            raise ConfigError(
                f"{name}: {type(weight).__name__} has no form in a Hugging Face folder; quantize with nf4, "
                "fp4 or, for GPTQ, integers with offset_dtype='zero'"
            )
        else:
            kinds[name] = ("dense",)
            continue
        packed[name] = weight
    if not packed:
        return None, {}
    first = next(iter(packed))
    for name, kind in kinds.items():
        if kind != kinds[first] and not (name == model.head.name and kind == ("dense",)):
            raise ConfigError(
                f"{name} is {', '.join(kind)}, {first} is {', '.join(kinds[first])}: one quantization_config "
                "holds for all projections of the blocks; quantize all alike, or save_model keeps each as it "
                "is"
            )
    dense_head = model.head.name not in packed
    arrays: dict[str, Array] = {}
    if isinstance(packed[first], CodebookWeight):
        for name, weight in packed.items():
            arrays |= bitsandbytes.to_arrays(f"{name}.weight", weight)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": packed[first].quant_type,
            "bnb_4bit_use_double_quant": packed[first].double_quant,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [model.head.name] if dense_head else [],
        }, arrays
    # GPTQModel opens version 1, which stores zero - 1, only if all zero points are the middle one
    symmetric = all((weight.zeros == 2 ** (weight.bits - 1)).all() for weight in packed.values())
    for name, weight in packed.items():
        arrays |= gptq_words.to_arrays(name, weight, version=1 if symmetric else 2)
    return {
        "quant_method": "gptq",
        "bits": packed[first].bits,
        "group_size": packed[first].group_size,
        "desc_act": False,
        "sym": symmetric,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "lm_head": not dense_head,
    }, arrays


# ---- reading


def load_huggingface(folder: str | Path) -> Transformer:
    """Load a frozen Llama-family model.

    Dense arrays (F32, F16 or BF16) become float32, which is exact; quantized weights keep their bits. A tied
    head may be absent or equal to the embedding. The `rotary_emb.inv_freq` of old checkpoints is ignored.

    Raises
    ------
    FileError
        The architecture is another, or files are missing, truncated, damaged or contradict one another.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from minilora.formats.checkpoint import load_base
    >>> with TemporaryDirectory() as folder:
    ...     names = [path.name for path in save_huggingface(load_base(), folder)]
    ...     names, load_huggingface(folder).config == load_base().config
    (['model.safetensors', 'config.json'], True)
    """
    folder = Path(folder)
    where = inside(folder, CONFIG_FILE)
    settings = read_json(where)
    config = read_config(settings, where)
    quantization = read_quantization(settings.get("quantization_config"), where)
    tensors = _all_tensors(folder)
    layers = config.num_hidden_layers
    if layers > len(tensors):  # a huge number would make a huge list of names below
        raise FileError(f"{where}: num_hidden_layers={layers}, but there are {len(tensors)} tensors in all")
    shapes = parameter_shapes(config)
    groups = _by_module(tensors)
    if config.tie_word_embeddings and groups.get("lm_head") == ["lm_head.weight"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    quantized = _check(groups, shapes, tensors, quantization, folder)
    arrays: dict[str, Any] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name in quantized and quantization is not None:
            arrays[name] = _read_quantized(module, shape, groups[module], tensors, quantization)
        else:
            arrays[name] = tensors[name].read().astype(np.float32, copy=False)
    if config.tie_word_embeddings and "lm_head.weight" in arrays:
        if not np.array_equal(arrays["lm_head.weight"], arrays["model.embed_tokens.weight"]):
            raise FileError(
                f"{where}: tie_word_embeddings=True, but lm_head.weight differs from "
                "model.embed_tokens.weight: set it to false"
            )
        del arrays["lm_head.weight"]
    return build_model(config, arrays)


def _all_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a folder's one file, or of all shards in its index; return all tensors by name."""
    if inside(folder, SINGLE_FILE).is_file():  # transformers, too, prefers it to the index
        return stored_tensors(folder / SINGLE_FILE)
    where = inside(folder, INDEX_FILE)
    if not where.is_file():
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        hint = f"; {others[0]} is another format: save it as safetensors first" if others else ""
        raise FileError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    index = read_json(where, MAX_HEADER_BYTES)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FileError(
            f"{where}: weight_map={reprlib.repr(weight_map)}, metadata={reprlib.repr(metadata)}, must be "
            "objects of tensor and file names, and of sizes"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise FileError(
                f"{where}: weight_map[{name!r}]={reprlib.repr(file)}, must be the plain name of a "
                ".safetensors file in this folder"
            )
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in stored_tensors(inside(folder, file)).items():
            if weight_map.get(name) != file:
                said = f"lies in {weight_map[name]}" if name in weight_map else "is not there"
                raise FileError(f"{folder / file}: holds {name!r}, which according to {INDEX_FILE} {said}")
            found[name] = tensor
    lost = sorted(weight_map.keys() - found.keys())
    if lost:
        raise FileError(f"{where}: {lost[0]!r} should lie in {weight_map[lost[0]]}, which does not hold it")
    total, actual = metadata.get("total_size"), sum(tensor.nbytes for tensor in found.values())
    if total is not None and (isinstance(total, bool) or total != actual):
        raise FileError(f"{where}: total_size={reprlib.repr(total)}, but the tensors have {actual} bytes")
    return found


def _by_module(tensors: dict[str, StoredTensor]) -> dict[str, list[str]]:
    """Group tensor names by module: `X` has `X.weight`, `X.weight.absmax`, `X.qweight` and others."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        module, dot, _ = name.partition(".weight")
        if not dot:
            module = name.rpartition(".")[0]
        groups.setdefault(module, []).append(name)
    return groups


def _check(
    groups: dict[str, list[str]],
    shapes: dict[str, tuple[int, ...]],
    tensors: dict[str, StoredTensor],
    quantization: Quantization | None,
    folder: Path,
) -> set[str]:
    """Check the tensors against the configuration, and return the names of the quantized weights."""
    quantized = set()
    for name, shape in shapes.items():
        if _is_quantized(name, tensors, quantization):
            quantized.add(name)
        elif name not in tensors:
            hint = "; tie_word_embeddings=True if it is the embedding" if name == "lm_head.weight" else ""
            raise FileError(f"{folder}: {name} is missing, {CONFIG_FILE} asks for {shape}{hint}")
        elif tensors[name].dtype not in ("F32", "F16", "BF16") or tensors[name].shape != shape:
            found = tensors[name]
            raise FileError(
                f"{found.path}: {name} is {found.dtype} {found.shape}, {CONFIG_FILE} asks for F32, F16 or "
                f"BF16 {shape}"
            )
    known = {name.removesuffix(".weight") for name in quantized}
    extra: list[str] = []
    for module, members in groups.items():
        if module not in known:
            extra += [name for name in members if name not in shapes]
    extra.sort()
    if extra:
        raise FileError(
            f"{tensors[extra[0]].path}: unknown tensors {extra[:3]}, the configuration has no place for them"
        )
    return quantized


def _is_quantized(name: str, tensors: dict[str, StoredTensor], quantization: Quantization | None) -> bool:
    """Say whether a weight is stored in the form that `quantization_config` names."""
    if quantization is None or not name.endswith(("_proj.weight", "lm_head.weight")):
        return False
    if quantization.method == "bitsandbytes":
        return bitsandbytes.is_quantized(cast(Any, tensors), name)
    return f"{name.removesuffix('.weight')}.qweight" in tensors


def _read_quantized(
    module: str,
    shape: tuple[int, ...],
    names: list[str],
    tensors: dict[str, StoredTensor],
    quantization: Quantization,
) -> Any:
    """Read one quantized weight; `bitsandbytes` and `gptq_words` check its arrays."""
    arrays = {name: tensors[name].read() for name in names}
    where = str(tensors[names[0]].path)
    weight: Any
    try:
        if quantization.method == "gptq":
            group_size = quantization.group_size if quantization.group_size != -1 else shape[1]
            weight = gptq_words.from_arrays(
                module, arrays, quantization.bits, group_size, quantization.version, where
            )
        else:
            weight = bitsandbytes.from_arrays(f"{module}.weight", arrays, where)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{where}: {module}: {error}") from None
    if weight.shape != shape:
        raise FileError(
            f"{where}: {module}.weight is quantized from {weight.shape}, {CONFIG_FILE} asks for {shape}"
        )
    if quantization.quant_type and quantization.quant_type != weight.quant_type:
        raise FileError(
            f"{where}: {module} is {weight.quant_type}, {CONFIG_FILE} says "
            f"bnb_4bit_quant_type={quantization.quant_type}"
        )
    if arrays:
        raise FileError(f"{where}: unknown tensors {sorted(arrays)[:3]} beside {module}")
    return weight
