"""PEFT's adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` with PEFT's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import LoraConfig, expand_modules
from minilora.formats.files import FileError, read_json, read_tensors, write_file, write_tensors
from minilora.lora import LoraLinear, inject_lora, matches
from minilora.transformer import Transformer

PREFIX = "base_model.model."


def save_adapter(model: Transformer, config: LoraConfig, folder: str | Path) -> int:
    """Save A and B alone; returns the size of ``adapter_model.safetensors`` in bytes.

    LoRA and QLoRA folders load in PEFT. A QA-LoRA folder is ours: its A belongs to inputs *summed* over a group, while PEFT's
    ``use_qalora`` takes the mean times the number of groups, and GPTQ bases only.

    Raises ValueError if there is no adapter or ``config`` is not the one that was given to ``inject_lora``.
    """
    folder = Path(folder)
    adapted = [linear for _, linear in model.linears() if isinstance(linear, LoraLinear)]
    if not adapted:
        raise ValueError("model: has no adapter to save; inject_lora makes one")
    targets = {name for name, _ in model.linears() if any(matches(name, target) for target in config.target_modules)}
    made_with = {(len(linear.lora_A.data), linear.scaling, linear.dropout) for linear in adapted}
    if targets != {linear.name for linear in adapted} or made_with != {(config.r, config.scaling, config.lora_dropout)}:
        raise ValueError(f"config={config}: the adapters were made with another; pass the LoraConfig given to inject_lora")
    settings: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
        "fan_in_fan_out": False, "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules), "use_rslora": config.use_rslora, "use_dora": False,
        "use_qalora": config.use_qalora, "qalora_group_size": adapted[0].pool, "init_lora_weights": True,
        "rank_pattern": {}, "alpha_pattern": {},
    }
    arrays = {PREFIX + p.name: p.data for linear in adapted for p in (linear.lora_A, linear.lora_B)}
    file = folder / "adapter_model.safetensors"
    write_tensors(file, arrays, {}, plain={"format": "pt"})
    write_file(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    return file.stat().st_size


def load_adapter(model: Transformer, folder: str | Path) -> tuple[Transformer, LoraConfig]:
    """Inject a saved adapter into a base model: returns the injected model and its LoraConfig.

    Raises FileError if the folder's files are missing, truncated, foreign, or do not fit this base.
    """
    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise FileError(f"{folder}: peft_type={settings.get('peft_type')!r}, only LORA adapters can be read")
    for unsupported in ("use_dora", "rank_pattern", "alpha_pattern"):
        if settings.get(unsupported):
            raise FileError(f"{folder}: {unsupported}={settings[unsupported]!r} is not supported")
    targets = settings.get("target_modules")
    try:
        config = LoraConfig(
            r=settings.get("r", 8), lora_alpha=settings.get("lora_alpha", 8), lora_dropout=settings.get("lora_dropout", 0.0),
            target_modules=expand_modules(targets) if isinstance(targets, str) else tuple(sorted(targets or ())),
            use_rslora=bool(settings.get("use_rslora", False)), use_qalora=bool(settings.get("use_qalora", False)))
        injected = inject_lora(model, config, np.random.default_rng(0))
    except (ValueError, TypeError) as error:
        raise FileError(f"{folder}: {error}") from None
    arrays, _ = read_tensors(folder / "adapter_model.safetensors")
    for linear in (linear for _, linear in injected.linears() if isinstance(linear, LoraLinear)):
        for parameter in (linear.lora_A, linear.lora_B):
            array = arrays.pop(PREFIX + parameter.name, None)
            if array is None or array.shape != parameter.data.shape or array.dtype.kind != "f":
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise FileError(f"{folder}: {parameter.name} is {found}, this base needs a float array {parameter.data.shape}")
            parameter.data[...] = array
        copied = arrays.pop(f"{PREFIX}{linear.name}.base_layer.weight", None)  # PEFT adds an adapted head's own weight
        if copied is not None and not np.array_equal(copied, linear.base.weight.dense()):
            raise FileError(f"{folder}: was made over a base whose {linear.name} differs from this one's")
    if arrays:
        raise FileError(f"{folder}: unknown tensors {sorted(arrays)[:3]}")
    return injected, config
