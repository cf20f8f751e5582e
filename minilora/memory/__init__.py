"""Where the bytes are: counted, measured (`measure`) and predicted (`plan`)."""

from minilora.composed import PlanConfig
from minilora.memory.architectures import ARCHITECTURES
from minilora.memory.budget import Fit, fit, parse_size
from minilora.memory.compare import Comparison, compare
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
    unique_bytes,
)
from minilora.memory.entries import Entry
from minilora.memory.ledger import Ledger
from minilora.memory.measure import measure, resident_bytes, resident_line
from minilora.memory.planner import model_shape, plan
from minilora.memory.published import Published, published

__all__ = [
    "ARCHITECTURES",
    "Comparison",
    "Entry",
    "Fit",
    "Ledger",
    "PlanConfig",
    "Published",
    "activation_bytes",
    "arrays_in",
    "available_bytes",
    "compare",
    "count_parameters",
    "effective_bits",
    "fit",
    "format_bytes",
    "measure",
    "model_bytes",
    "model_shape",
    "packed_weights",
    "parse_size",
    "peak_bytes",
    "plan",
    "projection_bytes",
    "published",
    "resident_bytes",
    "resident_line",
    "trainable_line",
    "unique_bytes",
]
