"""Where the bytes are: counted, measured (``measure``) and predicted (``plan``)."""

from minilora.memory.architectures import ARCHITECTURES
from minilora.memory.counting import (
    activation_bytes,
    arrays_in,
    available_bytes,
    count_parameters,
    effective_bits,
    format_bytes,
    model_bytes,
    packed_weights,
    peak_bytes,
    projection_bytes,
    trainable_line,
    training_bytes,
    unique_bytes,
)
from minilora.memory.ledger import Entry, Ledger
from minilora.memory.measure import measure, resident_bytes
from minilora.memory.planner import PlanConfig, plan

__all__ = [
    "ARCHITECTURES", "Entry", "Ledger", "PlanConfig", "activation_bytes", "arrays_in", "available_bytes", "count_parameters",
    "effective_bits", "format_bytes", "measure", "model_bytes", "packed_weights", "peak_bytes", "plan", "projection_bytes",
    "resident_bytes", "trainable_line", "training_bytes", "unique_bytes",
]  # fmt: skip
