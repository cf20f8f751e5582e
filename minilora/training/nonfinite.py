"""Where NaN or infinity first appears: what an error message about a failed training says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from minilora.data.tasks import Batch
from minilora.parameters import Array, Gradients
from minilora.training.paging import hand_back
from minilora.training.states import piece, pieces
from minilora.transformer import Transformer


class NonFiniteError(ValueError):
    """Training met NaN or infinity; the message says at which step and in which layer."""


def nonfinite_in_step(model: Transformer, batches: Sequence[Batch], loss: float, grads: Gradients) -> str:
    """Name the first place of a step whose loss or gradient norm is not finite."""
    if not np.isfinite(loss):
        return nonfinite_in_forward(model, batches)
    for p, gradient in grads.items():
        if not np.isfinite(gradient).all():
            return f"gradient of {p.name}"
    return "gradient of all parameters: their norm overflows"


def nonfinite_in_forward(model: Transformer, batches: Sequence[Batch]) -> str:
    """Run the batches forward and name the first array that is not finite."""
    for parameter in model.parameters():
        if not np.isfinite(parameter.data).all():
            return f"parameter {parameter.name}"
    for batch in batches:
        x, _ = model.embedding.forward(batch.ids)
        rope = model.rope(np.arange(batch.ids.shape[1]))
        for i, block in enumerate(model.blocks):
            x, _ = block.forward(x, rope, segments=batch.segments)
            if not np.isfinite(x).all():
                return f"output of model.layers.{i}"
    return "output of model.norm or the head"


def nonfinite_in_arrays(arrays: Mapping[str, Array]) -> str | None:
    """Name the first trained parameter or optimizer state that is not finite, read piece by piece."""
    for name, array in arrays.items():
        finite = all(np.isfinite(piece(array, where)).all() for where in pieces(array.size))
        hand_back(array)
        if not finite:
            trained = name.startswith("param.")
            return f"parameter {name.removeprefix('param.')}" if trained else f"optimizer state {name}"
    return None
