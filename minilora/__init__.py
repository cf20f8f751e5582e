"""minilora: LoRA, QLoRA and QA-LoRA from scratch in NumPy and Numba, for reading, sweeping and teaching.

>>> import minilora, numpy as np
>>> model = minilora.inject_lora(minilora.load_base(), minilora.LoraConfig(r=8), rng=np.random.default_rng(0))
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> module: loaded on first use, so that `import minilora` costs nothing
_EXPORTS = {
    "LoraConfig": "config",
    "ModelConfig": "config",
    "QuantConfig": "config",
    "TrainConfig": "config",
    "Transformer": "transformer",
    "init_model": "transformer",
    "build_model": "transformer",
    "generate": "generation",
    "gradcheck": "training.gradcheck",
    "full": "injection",
    "subset": "injection",
    "inject_lora": "injection",
    "inject": "injection",
    "Adapter": "layers",
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
    "write_gguf": "formats.gguf",
    "load_adapter": "formats.peft",
    "save_adapter": "formats.peft",
    "Trainer": "training.trainer",
    "evaluate": "training.loss",
    "make_task": "data.tasks",
    "encode": "data.tokenizer",
    "decode": "data.tokenizer",
    "model_bytes": "memory",
    "effective_bits": "memory",
    "trainable_line": "memory",
    "format_bytes": "memory",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(import_module(f"minilora.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
