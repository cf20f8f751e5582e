"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors` with PEFT's names.

PEFT has no form for two of our adapters. They are written as ordinary LoRA that computes the same function:

* QA-LoRA: s·BA on inputs summed over groups equals LoRA whose A repeats each column over its group. The
  file's metadata hold the group size. PEFT's own `use_qalora` is another function: the mean times the number
  of groups.
* PiSSA: its base is W − s·B₀A₀, so over W the adapter is s·(BA − B₀A₀), which is LoRA of rank 2r.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapter import Adapter
from minilora.config import SVD_INITS, ConfigError, LoraConfig, expand_modules, matches
from minilora.formats.files import (
    Array,
    FileError,
    inside,
    read_json,
    read_tensors,
    write_file,
    write_tensors,
)
from minilora.functional import group_repeat
from minilora.injection import inject_lora
from minilora.lora import LoraLinear
from minilora.parameters import DenseWeight
from minilora.transformer import Transformer
from minilora.variants import DoraLinear, SvdLinear, lora_of

PREFIX = "base_model.model."

# PEFT's settings that do not change what saved A and B compute
_IGNORED_SETTINGS = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "runtime_config",
    "megatron_config",
    "megatron_core",
    "layers_pattern",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
_READ_SETTINGS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
}
# Initialisations that leave the base's weights alone; pissa, olora, corda, loftq and lora_ga change them
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_MAX_ALPHA = 1e18
"""DoRA squares it, and the square must fit in float32."""
_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 200


def save_adapter(model: Transformer, config: LoraConfig, folder: str | Path) -> int:
    """Save the adapters alone, in PEFT's form.

    PEFT can use an adapter of a quantized base only with that base's own weights. LoftQ's base differs from
    the rounded model after more than one round.

    Parameters
    ----------
    model : Transformer
        An injected model.
    config : LoraConfig
        The one given to `inject_lora`.
    folder : str or Path
        The folder; it is created if needed.

    Returns
    -------
    int
        Size of `adapter_model.safetensors` in bytes.

    Raises
    ------
    ConfigError
        There is no adapter, `config` is another, or PiSSA's residual was quantized: then the adapter is no
        low-rank update of W.
    """
    folder = Path(folder)
    adapted = [(linear, lora) for _, linear in model.linears() if (lora := lora_of(linear)) is not None]
    others = [x for _, x in model.linears() if isinstance(x, Adapter) and lora_of(x) is None]
    if others:
        raise ConfigError(
            f"model: {others[0].name} has a {type(others[0]).__name__}, for which PEFT has no form; "
            "merge it and save the merged model"
        )
    if not adapted:
        raise ConfigError("model: has no adapter to save; inject_lora makes one")
    targets = {
        name for name, _ in model.linears() if any(matches(name, target) for target in config.target_modules)
    }
    same_modules = targets == {linear.name for linear, _ in adapted}
    if not same_modules or not all(_made_with(linear, lora, config) for linear, lora in adapted):
        raise ConfigError(
            f"config={config}: the adapters were made with another; pass the LoraConfig given to inject_lora"
        )
    is_pissa = config.init_lora_weights == "pissa"
    if is_pissa and not all(isinstance(lora.base.weight, DenseWeight) for _, lora in adapted):
        raise ConfigError(
            "init_lora_weights='pissa': the residual W - s·B A was quantized, and the adapter means nothing "
            "without it; merge and save_model, or inject PiSSA into the dense model"
        )
    twice = 2 if is_pissa else 1
    alpha = twice**0.5 if config.use_rslora else twice  # the scaling stays although the rank is 2r
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "r": twice * config.r,
        "lora_alpha": alpha * config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "use_qalora": False,
        "init_lora_weights": True,
        "rank_pattern": {k: twice * v for k, v in config.rank_pattern.items()},
        "alpha_pattern": {k: alpha * v for k, v in config.alpha_pattern.items()},
    }
    arrays: dict[str, Array] = {}
    for linear, lora in adapted:
        a, b = group_repeat(lora.lora_A.data, lora.pool), lora.lora_B.data
        if is_pissa and isinstance(lora, SvdLinear):
            a, b = np.concatenate([a, lora.start[0]]), np.concatenate([b, -lora.start[1]], axis=1)
        arrays |= {PREFIX + lora.lora_A.name: a, PREFIX + lora.lora_B.name: b}
        if isinstance(linear, DoraLinear):
            arrays[PREFIX + linear.magnitude.name] = linear.magnitude.data
    file = folder / "adapter_model.safetensors"
    metadata: dict[str, Any] = {}
    if config.use_qalora:
        metadata["group_size"] = adapted[0][1].pool
    if config.init_lora_weights == "loftq":
        metadata["loftq_iter"] = config.loftq_iter
    write_tensors(file, arrays, metadata, plain={"format": "pt"})
    write_file(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    return file.stat().st_size


def load_adapter(model: Transformer, folder: str | Path) -> tuple[Transformer, LoraConfig]:
    """Inject a saved adapter into a base model; return the injected model and its LoraConfig.

    Raises
    ------
    FileError
        The files are missing, truncated or foreign, or do not fit this base.
    """
    config, arrays, metadata = _read(Path(folder))
    if metadata.get("loftq_iter", 1) != 1:  # only after one round its base is quantize(W)
        raise FileError(
            f"{folder}: a LoftQ adapter of {_short.repr(metadata['loftq_iter'])} rounds, whose base is its "
            "own; inject it again with the same settings and use fill_adapter"
        )
    try:
        injected = inject_lora(model, config, np.random.default_rng(0))
    except ValueError as error:
        raise _refusal(folder, error) from None
    _fill(injected, arrays, Path(folder))
    return injected, config


def fill_adapter(injected: Transformer, folder: str | Path) -> None:
    """Overwrite an injected model's A and B with saved ones.

    For LoftQ, whose base is made together with the adapter's start.
    """
    _fill(injected, _read(Path(folder))[1], Path(folder))


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Array], dict[str, Any]]:
    settings = read_json(inside(folder, "adapter_config.json"))
    if settings.get("peft_type") != "LORA":
        raise FileError(
            f"{folder}: peft_type={_short.repr(settings.get('peft_type'))}, only LORA adapters can be read"
        )
    arrays, metadata = read_tensors(inside(folder, "adapter_model.safetensors"))
    return _read_config(folder, settings, pooled="group_size" in metadata), arrays, metadata


def _fill(injected: Transformer, arrays: dict[str, Array], folder: Path) -> None:
    for _, linear in injected.linears():
        lora = lora_of(linear)
        if lora is None:
            continue
        for parameter in linear.trained():
            array = arrays.pop(PREFIX + parameter.name, None)
            if array is not None and parameter is lora.lora_A:
                array = _pooled(array, lora, folder)
            if array is None or array.shape != parameter.data.shape or array.dtype.kind != "f":
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise FileError(
                    f"{folder}: {parameter.name} is {found}, this base needs a float array "
                    f"{parameter.data.shape}"
                )
            with np.errstate(over="ignore"):
                parameter.data[...] = array
            if not np.isfinite(parameter.data).all():
                raise FileError(f"{folder}: {parameter.name} holds numbers beyond {parameter.data.dtype}")
        # PEFT also saves the base weight of an adapted head
        copied = arrays.pop(f"{PREFIX}{linear.name}.base_layer.weight", None)
        if copied is not None and not np.array_equal(copied, linear.base.weight.dense()):
            raise FileError(f"{folder}: was made over a base whose {linear.name} differs from this one's")
    if arrays:
        raise FileError(f"{folder}: unknown tensors {_short.repr(sorted(arrays)[:3])}")


def _read_config(folder: Path, settings: dict[str, Any], pooled: bool) -> LoraConfig:
    """Return PEFT's settings as ours; raise FileError for a wrong type, or a setting whose effect we lack."""

    def refuse(name: str, why: str) -> FileError:
        return FileError(f"{folder}: {_short.repr(name)[1:-1]}={_short.repr(settings.get(name))} {why}")

    if settings.get("bias", "none") != "none":
        raise refuse("bias", "is not supported, only 'none'")
    for name in sorted(settings.keys() - _READ_SETTINGS - _IGNORED_SETTINGS - {"bias"}):
        if settings[name]:  # PEFT's other settings are off when false, null, 0 or empty
            raise refuse(name, "is not supported; merge the adapter in PEFT and read the merged model")
    for name in ("use_rslora", "use_dora"):
        if settings.get(name) not in (True, False, None):
            raise refuse(name, "must be true or false")
    for name in ("r", "lora_alpha", "lora_dropout"):
        if isinstance(settings.get(name), (list, dict)):
            raise refuse(name, "must be a number")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise refuse(
            "init_lora_weights",
            "changes the base weights, or is unknown; convert the adapter to plain LoRA in PEFT "
            "(path_initial_model_for_weight_conversion) and save it again",
        )
    targets = settings.get("target_modules") or []
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not isinstance(targets, str) and not is_list:
        raise refuse("target_modules", "must be a name or a list of names")
    patterns: dict[str, Any] = {name: settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict) or any(
            isinstance(value, (list, dict)) for value in pattern.values()
        ):
            raise refuse(name, "must be an object of numbers")
        for key in pattern:
            # PEFT takes regular expressions; we read names only, in which "." is a dot
            if not re.fullmatch(r"[A-Za-z0-9_.]{1,500}", key):
                raise FileError(
                    f"{folder}: {name} has the key {_short.repr(key)}; only module names are supported, no "
                    "regular expressions"
                )
    for alpha in (settings.get("lora_alpha"), *patterns["alpha_pattern"].values()):
        if isinstance(alpha, (int, float)) and alpha > _MAX_ALPHA:
            raise FileError(
                f"{folder}: lora_alpha or alpha_pattern has {_short.repr(alpha)}, must be at most "
                f"{_MAX_ALPHA:g}"
            )
    try:
        return LoraConfig(
            r=settings.get("r", 8),
            lora_alpha=settings.get("lora_alpha", 8),
            lora_dropout=settings.get("lora_dropout", 0.0),
            target_modules=expand_modules(targets) if isinstance(targets, str) else tuple(sorted(targets)),
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            use_qalora=pooled,
            **patterns,
        )
    except ValueError as error:
        raise _refusal(folder, error) from None


def _refusal(folder: str | Path, error: ValueError) -> FileError:
    """Put the folder before another error's message, and cut a very long one."""
    text = str(error)
    if len(text) > 1000:
        text = f"{text[:500]} … {text[-300:]}"
    return FileError(f"{folder}: {text}")


def _pooled(a: Array, linear: LoraLinear, folder: Path) -> Array:
    """Undo the repetition of A's columns over their groups."""
    if linear.pool == 1 or a.ndim != 2 or a.shape[1] != linear.shape[1]:
        return a
    narrow = a[:, :: linear.pool]
    if not np.array_equal(group_repeat(narrow, linear.pool), a):
        raise FileError(
            f"{folder}: {linear.lora_A.name} is not constant within the base's groups of {linear.pool}; this "
            "adapter belongs to another group size"
        )
    return narrow


def _made_with(linear: LoraLinear | DoraLinear, lora: LoraLinear, config: LoraConfig) -> bool:
    """Say whether an adapter is what `config` makes."""
    mine = config.of(linear.name)
    found = (
        len(lora.lora_A.data),
        lora.scaling,
        lora.dropout,
        isinstance(linear, DoraLinear),
        isinstance(lora, SvdLinear),
    )
    return found == (
        mine.r,
        mine.scaling,
        mine.lora_dropout,
        mine.use_dora,
        mine.init_lora_weights in SVD_INITS,
    )
