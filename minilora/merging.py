"""Merging: return new weights and the error of storing them. The model with adapters stays valid.

LoRA merges into float32, W + s·B A. QLoRA, merged and rounded again, loses part of ΔW. QA-LoRA's ΔW is one
number for each group, so it goes into the offsets, and the codes stay the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from minilora.adapter import Adapter, AnyLinear
from minilora.config import ConfigError, QuantConfig
from minilora.functional import group_repeat
from minilora.layers import Linear
from minilora.parameters import Array, DenseWeight, Parameter, Weight
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.weights import quantize_weight
from minilora.threads import single_blas

if TYPE_CHECKING:
    from minilora.transformer import Transformer


@dataclass(frozen=True)
class MergeError:
    """Difference between a merged weight and W + ΔW, computed in float64.

    `relative` is ‖merged − exact‖ / ‖ΔW‖: 1 means that the error is as large as what was learnt.
    """

    max_abs: float
    rms: float
    relative: float

    @classmethod
    def of(cls, merged: Weight, w: Array, delta: Array) -> MergeError:
        """Measure a merged weight against w + delta, both (out, in), delta in float64."""
        error = merged.dense() - (w + delta)
        norm = float(np.linalg.norm(delta))
        relative = float(np.linalg.norm(error)) / norm if norm else 0.0
        return cls(float(np.abs(error).max()), float(np.sqrt((error**2).mean())), relative)


@single_blas()
def merge_linear(
    adapted: Adapter, how: str = "auto", quant: QuantConfig | None = None
) -> tuple[Weight, MergeError]:
    """Return a new weight W + ΔW and its storage error. The adapted layer stays valid.

    `how` is one of:

    * `dense`: store W + ΔW in floating point.
    * `requantize`: round W + ΔW to `quant` again, which loses part of ΔW.
    * `offsets`: add ΔW to the offsets and keep the codes (QA-LoRA).
    * `auto`: `offsets` if the adapter pools its input, else `dense`.

    Raises ConfigError if `offsets` finds no float offsets, or `pool` is no multiple of the group size.
    """
    weight = adapted.base.weight
    if how == "auto":
        how = "offsets" if adapted.pool > 1 else "dense"
    w, delta = weight.dense(), adapted.delta()
    exact = w + delta  # float64
    merged: Weight
    if how == "dense":
        merged = DenseWeight(Parameter(f"{adapted.name}.weight", exact.astype(weight.dtype)))
    elif how == "requantize":
        if quant is None:
            raise ConfigError(
                "quant=None: merging with how='requantize' needs a QuantConfig, e.g. QuantConfig('nf4')"
            )
        merged = quantize_weight(exact.astype(np.float32), quant)
    elif how == "offsets":
        merged = _merge_offsets(adapted)
    else:
        raise ConfigError(f"how={how!r}: choose one of auto, dense, requantize, offsets")
    return merged, MergeError.of(merged, w, delta)


def _merge_offsets(adapted: Adapter) -> AffineWeight:
    weight = adapted.base.weight
    if isinstance(weight, BlockWeight) and weight.offsets is not None:
        weight = weight.affine()  # Q4_1 in the form whose offsets can be float32
    if not isinstance(weight, AffineWeight):
        raise ConfigError(
            f"how='offsets': {adapted.name} is stored as {type(weight).__name__}, which has no float offset; "
            "use dense or requantize"
        )
    if adapted.pool % weight.group_size:
        raise ConfigError(
            f"how='offsets': the adapter is constant over {adapted.pool} inputs, the weight's groups have "
            f"{weight.group_size}; only an adapter that is constant within each group merges exactly"
        )
    # w = scale·q + offset, so w + ΔW = scale·q + (offset + ΔW) where ΔW is one number for each group
    delta = adapted.delta()
    per_group = delta[:, :: weight.group_size]  # (out, in/g)
    if not np.array_equal(group_repeat(per_group, weight.group_size), delta):
        raise ConfigError(
            f"how='offsets': ΔW of {adapted.name} varies within groups of {weight.group_size} inputs; "
            "use dense or requantize"
        )
    return weight.with_offset((weight.offset + per_group).astype(np.float32))


def unmerge_linear(merged: Weight, adapted: Adapter) -> tuple[DenseWeight, float]:
    """Subtract ΔW again; return the base and its largest rounding error.

    Seldom needed: the model that was merged stays valid, and its base is exact.
    """
    base = (merged.dense().astype(np.float64) - adapted.delta()).astype(adapted.base.weight.dtype)
    error = float(np.abs(base - adapted.base.weight.dense()).max())
    return DenseWeight(Parameter(f"{adapted.name}.weight", base)), error


def merge(
    model: Transformer, how: str = "auto", quant: QuantConfig | None = None
) -> tuple[Transformer, dict[str, MergeError]]:
    """Merge every adapter into a new model without adapters; also return the error of each layer.

    A tied head that is merged is no longer tied. The injected model stays valid. `how` and `quant`: see
    `merge_linear`. Raises ConfigError if there is no adapter.
    """
    errors: dict[str, MergeError] = {}

    def change(linear: AnyLinear) -> AnyLinear:
        if not isinstance(linear, Adapter):
            return linear
        weight, errors[linear.name] = merge_linear(linear, how, quant)
        return Linear(linear.name, weight)

    merged = model.map_linears(change)
    if not errors:
        raise ConfigError("model: has no adapter to merge; inject_lora makes one")
    if model.config.tie_word_embeddings and not merged.tied:
        merged.config = replace(model.config, tie_word_embeddings=False)
    return merged, errors


def merge_errors(model: Transformer, merged: Transformer) -> dict[str, MergeError]:
    """Return each layer's error in `merged`, made in any way, against the model with adapters."""
    weights = {name: linear.base.weight for name, linear in merged.linears()}
    return {
        name: MergeError.of(weights[name], linear.base.weight.dense(), linear.delta())
        for name, linear in model.linears()
        if isinstance(linear, Adapter)
    }
