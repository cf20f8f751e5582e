"""A trained model → the model as one would ship it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minilora.adapter import Adapter
from minilora.config import QuantConfig
from minilora.merging import merge
from minilora.quant.model import quantize_model
from minilora.sweep.run_models import calibration
from minilora.sweep.settings import RunConfig
from minilora.transformer import Transformer


def deploy(config: RunConfig, model: Transformer) -> Transformer:
    """Return the model with its adapter merged, in as many bits as its base.

    LoRA is merged into dense weights. QLoRA is merged and rounded to the same bits again. QA-LoRA is merged
    into its offsets, exactly.
    """
    if config.method == "qlora":
        quant = config.storage()
        return requantize(model, quant, calibration(config) if quant.quantizer == "gptq" else ())
    return merge(model, {"lora": "dense", "qalora": "offsets"}[config.method])[0]


def requantize(model: Transformer, quant: QuantConfig, data: Sequence[Any] = ()) -> Transformer:
    """Merge, and quantize again what was adapted.

    Parameters
    ----------
    model
        Model with an adapter. An adapted head stays dense, as a head always does.
    quant
        Storage of the result.
    data
        Token ids (1, T) of training examples, for GPTQ.
    """
    adapted = {name for name, linear in model.linears() if isinstance(linear, Adapter)}
    return quantize_model(merge(model, "dense")[0], quant, data, only=adapted)
