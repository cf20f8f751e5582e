"""Hugging Face's model folder: ``config.json`` beside ``model.safetensors``, or beside shards and their
index.

    config.json                           the architecture (``LlamaConfig``) and how weights are quantized
    model.safetensors                     all tensors, or, of a large model,
    model-00001-of-00002.safetensors …    some of them in each, and
    model.safetensors.index.json          which tensor lies in which

Names of tensors are the ones this package uses anyway. Quantized projections are several tensors each:
bitsandbytes' 4-bit form for NF4 and FP4, GPTQ's for affine weights with whole zero points;
``quantization_config`` says which.

A folder is foreign until every name, dtype and size in it has been checked against ``config.json``; only then
is an array read, one at a time, so that loading needs the memory of the model and of its largest tensor.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from minilora.config import require, require_in
from minilora.formats import bitsandbytes
from minilora.formats import gptq_words as gptq
from minilora.formats.files import (
    LONGEST_HEADER,
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
from minilora.layers import DenseWeight
from minilora.quant.affine import AffineWeight
from minilora.quant.weights import CodebookWeight
from minilora.transformer import Transformer, build_model, parameter_shapes

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


# ---- writing


def save_huggingface(
    model: Transformer, folder: str | Path, dtype: Any = np.float32, max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write a model without adapters as a folder that transformers opens; returns the files, ``config.json``
    last.

    Dense arrays are written in ``dtype``, float32 or float16; quantized weights bit for bit. A folder's
    earlier shards and index are removed once the new ones are there. Raises ValueError for what the format
    cannot say: adapters, the two-matrix MLP, projections that are not all quantized alike, codebooks or
    offsets that neither bitsandbytes nor GPTQ knows, GGUF's blocks, ``rope_factors`` that are neither linear
    nor Llama 3's.
    """
    folder, dtype = Path(folder), np.dtype(dtype)
    require_in(dtype.name, ("float32", "float16"), "dtype")
    ok = isinstance(max_shard_bytes, int) and max_shard_bytes >= 1
    require(ok, "max_shard_bytes", max_shard_bytes, "must be a whole number, at least 1")
    settings = settings_of(model, dtype.name)
    quantization, quantized = _quantized_arrays(model)
    dense = {p.name: p.data for p in model.parameters()}
    sizes = {name: a.size * dtype.itemsize for name, a in dense.items()} | {
        name: a.nbytes for name, a in quantized.items()
    }
    shards = _shards(sizes, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, array in dense.items():  # before anything is written over an earlier model
        _as(array, dtype, name)
    for file, members in zip(names, shards, strict=True):
        arrays = {
            name: quantized[name] if name in quantized else _as(dense[name], dtype, name) for name in members
        }
        write_tensors(
            folder / file, arrays, {}, plain={"format": "pt"}
        )  # transformers refuses files without a format
    if len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        names.append(INDEX)
        write_file(
            folder / INDEX, _text({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        )
    names.append(CONFIG)
    write_file(
        folder / CONFIG, _text(settings | ({"quantization_config": quantization} if quantization else {}))
    )
    for old in folder.iterdir():
        if old.name not in names and (old.name in (SINGLE, INDEX) or _SHARD.fullmatch(old.name)):
            old.unlink()
    return [folder / name for name in names]


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _as(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Round an array to the file's dtype, refusing what does not fit in it."""
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype, copy=False)
    if not np.isfinite(rounded).all():
        raise ValueError(
            f"{name}: holds NaN, infinity or a value beyond {dtype}'s {np.finfo(dtype).max:g}; choose float32"
        )
    return rounded


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Fill shards in order, none above the limit; a tensor that is larger has one of its own."""
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
    """Return (``quantization_config``, the tensors of quantized weights), or (None, {}) of a dense model."""
    if not isinstance(model.embedding.weight, DenseWeight):
        raise ValueError(
            f"{model.embedding.name}: {type(model.embedding.weight).__name__} has no form in a Hugging Face folder; "
            "save_gguf and save_model keep it"
        )
    kinds: dict[str, tuple[Any, ...]] = {}
    packed: dict[str, Any] = {}
    for name, linear in model.linears():
        weight = getattr(linear, "weight", None)
        if weight is None:
            raise ValueError(
                f"{name}: has an adapter; merge(model) makes a model without, save_adapter saves the adapter alone"
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
                raise ValueError(
                    f"{name}: has float offsets, GPTQ stores whole zero points only; take offsets 'zero' "
                    "(QuantConfig's offset_dtype, merge --offsets zero), or save_model, X.safetensors, keeps them"
                )
        elif not isinstance(weight, DenseWeight):
            raise ValueError(
                f"{name}: {type(weight).__name__} has no form in a Hugging Face folder; quantize with nf4, fp4 or, "
                "for GPTQ, integers with offset_dtype='zero'"
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
            raise ValueError(
                f"{name} is {', '.join(kind)}, {first} is {', '.join(kinds[first])}: quantization_config is one for "
                "all projections of the blocks; quantize all alike, or save_model keeps each as it is"
            )
    dense_head = model.head.name not in packed
    if isinstance(packed[first], CodebookWeight):
        arrays = {
            key: a
            for name, w in packed.items()
            for key, a in bitsandbytes.to_arrays(f"{name}.weight", w).items()
        }
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
    # version 1 stores zero - 1, where a zero of 0 is lost to some readers: GPTQModel opens it only if all are
    # symmetric
    symmetric = all((weight.zeros == 2 ** (weight.bits - 1)).all() for weight in packed.values())
    arrays = {
        key: a
        for name, w in packed.items()
        for key, a in gptq.to_arrays(name, w, 1 if symmetric else 2).items()
    }
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
    """Load a frozen Llama-family model; dense arrays as float32 (from F32, F16 or BF16, exactly), quantized
    ones bit for bit.

    A tied head may be absent or equal to the embedding; the ``rotary_emb.inv_freq`` of old checkpoints is
    ignored. Raises FileError for another architecture and for files that are missing, truncated, damaged or
    contradict one another.

    >>> from tempfile import TemporaryDirectory
    >>> from minilora.formats.checkpoint import load_base
    >>> with TemporaryDirectory() as folder:
    ...     names = [path.name for path in save_huggingface(load_base(), folder)]
    ...     names, load_huggingface(folder).config == load_base().config
    (['model.safetensors', 'config.json'], True)
    """
    folder = Path(folder)
    where = inside(folder, CONFIG)
    settings = read_json(where)
    config = read_config(settings, where)
    quantization = read_quantization(settings.get("quantization_config"), where)
    tensors = _all_tensors(folder)
    layers = config.num_hidden_layers
    if layers > len(tensors):  # before a name is made for each array of each layer
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
                f"{where}: tie_word_embeddings=True, but lm_head.weight differs from model.embed_tokens.weight"
            )
        del arrays["lm_head.weight"]
    return build_model(config, arrays)


def _all_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by name, from the headers of its one file or of all shards that its
    index lists."""
    if inside(folder, SINGLE).is_file():  # before the index, as in transformers
        return stored_tensors(folder / SINGLE)
    where = inside(folder, INDEX)
    if not where.is_file():
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        hint = f"; {others[0]} is another format: save it as safetensors first" if others else ""
        raise FileError(f"{folder}: has neither {SINGLE} nor {INDEX}{hint}")
    index = read_json(where, LONGEST_HEADER)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FileError(
            f"{where}: weight_map={reprlib.repr(weight_map)}, metadata={reprlib.repr(metadata)}, must be objects of "
            "tensor and file names, and of sizes"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise FileError(
                f"{where}: weight_map[{name!r}]={reprlib.repr(file)}, must be the plain name of a .safetensors file "
                "in this folder"
            )
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in stored_tensors(inside(folder, file)).items():
            if weight_map.get(name) != file:
                said = f"lies in {weight_map[name]}" if name in weight_map else "is not there"
                raise FileError(f"{folder / file}: holds {name!r}, which according to {INDEX} {said}")
            found[name] = tensor
    lost = sorted(weight_map.keys() - found.keys())
    if lost:
        raise FileError(f"{where}: {lost[0]!r} should lie in {weight_map[lost[0]]}, which does not hold it")
    total, actual = metadata.get("total_size"), sum(tensor.nbytes for tensor in found.values())
    if total is not None and (isinstance(total, bool) or total != actual):
        raise FileError(f"{where}: total_size={reprlib.repr(total)}, but the tensors have {actual} bytes")
    return found


def _by_module(tensors: dict[str, StoredTensor]) -> dict[str, list[str]]:
    """Module → its tensors: ``X`` has ``X.weight``, ``X.weight.absmax``, ``X.qweight`` …; inv_freq buffers
    are left out."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if not name.endswith("rotary_emb.inv_freq"):
            module, dot, _ = name.partition(".weight")
            groups.setdefault(module if dot else name.rpartition(".")[0], []).append(name)
    return groups


def _check(
    groups: dict[str, list[str]],
    shapes: dict[str, tuple[int, ...]],
    tensors: dict[str, StoredTensor],
    quantization: Quantization | None,
    folder: Path,
) -> set[str]:
    """Check that there is what the configuration asks for and nothing else; returns the names of quantized
    weights."""
    quantized = set()
    for name, shape in shapes.items():
        packed = (
            quantization is not None
            and name.endswith(("_proj.weight", "lm_head.weight"))
            and (
                bitsandbytes.is_quantized(cast(Any, tensors), name)
                if quantization.method == "bitsandbytes"
                else f"{name.removesuffix('.weight')}.qweight" in tensors
            )
        )
        if packed:
            quantized.add(name)
        elif name not in tensors:
            hint = "; tie_word_embeddings=True if it is the embedding" if name == "lm_head.weight" else ""
            raise FileError(f"{folder}: {name} is missing, {CONFIG} asks for {shape}{hint}")
        elif tensors[name].dtype not in ("F32", "F16", "BF16") or tensors[name].shape != shape:
            found = tensors[name]
            raise FileError(
                f"{found.path}: {name} is {found.dtype} {found.shape}, {CONFIG} asks for F32, F16 or BF16 {shape}"
            )
    known = {name.removesuffix(".weight") for name in quantized}
    extra = sorted(
        n for module, members in groups.items() if module not in known for n in members if n not in shapes
    )
    if extra:
        raise FileError(
            f"{tensors[extra[0]].path}: unknown tensors {extra[:3]}, the configuration has no place for them"
        )
    return quantized


def _read_quantized(
    module: str,
    shape: tuple[int, ...],
    names: list[str],
    tensors: dict[str, StoredTensor],
    quantization: Quantization,
) -> Any:
    """Read one quantized weight; the formats' own modules check its arrays."""
    arrays, where = {name: tensors[name].read() for name in names}, str(tensors[names[0]].path)
    weight: Any
    try:
        if quantization.method == "gptq":
            group_size = quantization.group_size if quantization.group_size != -1 else shape[1]
            weight = gptq.from_arrays(
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
            f"{where}: {module}.weight is quantized from {weight.shape}, {CONFIG} asks for {shape}"
        )
    if quantization.quant_type and quantization.quant_type != weight.quant_type:
        raise FileError(
            f"{where}: {module} is {weight.quant_type}, {CONFIG} says bnb_4bit_quant_type={quantization.quant_type}"
        )
    if arrays:
        raise FileError(f"{where}: unknown tensors {sorted(arrays)[:3]} beside {module}")
    return weight
