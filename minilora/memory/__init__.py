"""Where the bytes are: counted, measured, predicted."""

from minilora.memory.counting import (
    activation_bytes as activation_bytes,
    arrays_in as arrays_in,
    available_bytes as available_bytes,
    count_parameters as count_parameters,
    effective_bits as effective_bits,
    format_bytes as format_bytes,
    model_bytes as model_bytes,
    packed_weights as packed_weights,
    peak_bytes as peak_bytes,
    projection_bytes as projection_bytes,
    trainable_line as trainable_line,
    training_bytes as training_bytes,
    unique_bytes as unique_bytes,
)
