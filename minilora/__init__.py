"""minilora: LoRA, QLoRA and QA-LoRA from scratch in NumPy and Numba, for reading, sweeping and teaching.

>>> import minilora, numpy as np
>>> model = minilora.inject_lora(minilora.load_base(), minilora.LoraConfig(r=8), rng=np.random.default_rng(0))
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> module, loaded on first use: `import minilora` itself loads no NumPy
_EXPORTS = {
    "LoraConfig": "config",
    "ModelConfig": "config",
    "QuantConfig": "config",
    "TrainConfig": "config",
    "Transformer": "transformer",
    "init_model": "building",
    "build_model": "building",
    "generate": "generation",
    "gradcheck": "training.gradcheck",
    "full": "injection",
    "subset": "injection",
    "inject_lora": "injection",
    "inject": "injection",
    "Adapter": "adapter",
    "LoraLinear": "lora",
    "plain": "kernels",
    "quantize_model": "quant.model",
    "merge": "merging",
    "merge_errors": "merging",
    "compare_merges": "claims.merge_study",
    "AffineWeight": "quant",
    "BlockWeight": "quant",
    "CodebookWeight": "quant",
    "quantize_weight": "quant",
    "load_base": "formats.checkpoint",
    "load_model": "formats.checkpoint",
    "save_model": "formats.checkpoint",
    "load_huggingface": "formats.huggingface",
    "save_huggingface": "formats.huggingface",
    "GGUFFile": "formats.gguf",
    "write_gguf": "formats.gguf_writer",
    "load_adapter": "formats.peft",
    "save_adapter": "formats.peft",
    "Trainer": "training.trainer",
    "evaluate": "training.evaluation",
    "RunConfig": "sweep.settings",
    "SweepConfig": "sweep.grid",
    "run_sweep": "sweep.runner",
    "make_task": "data.tasks",
    "encode": "data.tokenizer",
    "decode": "data.tokenizer",
    "model_bytes": "memory",
    "effective_bits": "memory",
    "trainable_line": "memory",
    "format_bytes": "memory",
}
_PACKAGES = ("memory",)
__all__ = ["__version__", *_EXPORTS, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"minilora.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(import_module(f"minilora.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
