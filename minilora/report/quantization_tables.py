"""Tables of quantized weights and models, and what to call the ways of quantizing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from minilora.tables import markdown_table


def quantizer_name(row: Mapping[str, Any]) -> str:
    """Say in a few words how a weight was quantized.

    >>> from minilora.config import QuantConfig
    >>> from minilora.sweep.weight_errors import settings
    >>> quantizer_name(settings(QuantConfig("nf4")))
    'nf4 double-quantized, rtn'
    >>> quantizer_name(settings(QuantConfig("int4", fit="mse", offset_dtype="zero")))
    'int4, rtn mse, zero offsets'
    """
    if row["quant_type"] is None:
        return "float32"
    words = row["quant_type"]
    if row["double_quant"]:
        words += " double-quantized"
    words += f", {row['quantizer']}"
    if row["fit"] not in (None, "minmax", row["quantizer"]):
        words += f" {row['fit']}"
    if row["offset_dtype"] not in (None, "float16"):
        words += f", {row['offset_dtype']} offsets"
    return words


def number(value: float | None, form: str) -> str:
    """Return a number as text, and a dash for None, NaN and infinity."""
    return "–" if value is None or not np.isfinite(value) else format(value, form)


def format_weight_errors(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the rows of `weight_errors` as a Markdown table; a dash stands for None."""
    columns = {
        "bits/w": ("bits_per_weight", ".3f"),
        "file bits/w": ("file_bits_per_weight", ".3f"),
        "mean abs": ("mean_abs", ".3g"),
        "rms": ("rms", ".3g"),
        "max abs": ("max_abs", ".3g"),
        "relative": ("relative", ".4f"),
        "SNR dB": ("snr_db", ".1f"),
        "output": ("output_error", ".4f"),
    }
    cells = []
    for row in rows:
        numbers = [number(row[name], form) for name, form in columns.values()]
        cells.append([quantizer_name(row), str(row["group_size"] or row["block_size"]), *numbers])
    return markdown_table(["weights", "block", *columns], cells)


def format_model_losses(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the rows of `model_table` as a Markdown table.

    ± is half a 95 % t-interval. Losses are in nats per token.
    """
    columns = [
        ("bits/w", "effective_bits", ".2f"),
        ("loss", "loss", ".4f"),
        ("± seeds", "loss_half", ".4f"),
        ("above float32", "above", "+.4f"),
        ("± batches", "above_half", ".4f"),
        ("better than rtn", "improvement", "+.4f"),
        ("± batches", "improvement_half", ".4f"),
        ("± seeds", "improvement_seeds_half", ".4f"),
    ]
    cells = []
    for row in rows:
        block = str(row["group_size"] or row["block_size"] or "–")
        numbers = [number(row.get(name), form) for _, name, form in columns]
        cells.append([quantizer_name(row), block, *numbers, row.get("verdict") or ""])
    return markdown_table(["weights", "block", *(head for head, _, _ in columns), ""], cells)
