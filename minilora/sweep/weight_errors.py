"""What one weight loses when it is quantized: its errors, its bytes in memory and in a file.

Ŵ is the quantized weight, E = W − Ŵ. `claims.quantization_study` measures whole models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora.config import QuantConfig, require
from minilora.formats.bitsandbytes import BLOCK_SIZES, QUANT_TYPES, to_arrays
from minilora.parameters import Array
from minilora.quant import codebooks
from minilora.quant.affine import AffineWeight
from minilora.quant.dynamic import DYNAMIC_BLOCK_SIZE
from minilora.quant.gptq import gptq
from minilora.quant.packed import checked
from minilora.quant.weights import CodebookWeight, quantize_weight
from minilora.sweep.results import Row
from minilora.threads import single_blas


def settings(config: QuantConfig) -> Row:
    """Return the columns that say how a weight was quantized; None where a setting does not apply.

    >>> settings(QuantConfig("nf4"))["block_size"], settings(QuantConfig("int4"))["block_size"]
    (64, None)
    """
    affine = config.affine
    return {
        "quant_type": config.quant_type,
        "bits": config.bits,
        "block_size": None if affine else config.block_size,
        "group_size": config.group_size if affine else None,
        "double_quant": None if affine else config.double_quant,
        "quantizer": config.quantizer,
        "fit": config.fit if affine else None,
        "offset_dtype": config.offset_dtype if affine else None,
    }


def quantized(w: Array, config: QuantConfig, hessian: Array | None = None) -> CodebookWeight | AffineWeight:
    """Quantize w (out, in); `gptq` needs the Hessian (in, in) of the layer's inputs."""
    if config.quantizer != "gptq":
        return quantize_weight(w, config)
    require(
        hessian is not None,
        "calibration_hessian",
        None,
        "quantizer='gptq' needs the Hessian of the layer's inputs",
    )
    return gptq(w, np.asarray(hessian), config)[0]


@single_blas()
def weight_errors(
    w: Array, configs: Sequence[QuantConfig], calibration_hessian: Array | None = None
) -> list[Row]:
    """Return the errors E = W − Ŵ of one matrix (out, in), a row for each configuration.

    Parameters
    ----------
    calibration_hessian
        H = 2·XᵀX/n (in, in) of the inputs X (n, in), for `gptq` and for `output_error`.

    Returns
    -------
    rows
        Columns of `settings`, and with Frobenius' norm ‖·‖:

        - `mean_abs` = mean |E|, `rms` = √mean E², `max_abs` = max |E|
        - `relative` = ‖E‖/‖W‖, `snr_db` = −20·log₁₀(relative)
        - `output_error` = ‖X·Eᵀ‖/‖X·Wᵀ‖ = √(tr E·H·Eᵀ / tr W·H·Wᵀ); None without H
        - `bits_per_weight` counts codes, scales and offsets in memory
        - `file_bits_per_weight` counts all arrays of this tensor in bitsandbytes' file, code maps included,
          without the JSON text; None for what bitsandbytes cannot store

    Raises
    ------
    ValueError
        Weights are not finite, or settings do not fit their shape.

    Examples
    --------
    >>> w = np.array([[0.0, 0.4, 1.0, 3.0]], np.float32)
    >>> row = weight_errors(w, [QuantConfig("int2", group_size=4)])[0]
    >>> round(row["max_abs"], 3), round(row["relative"], 3), row["bits_per_weight"]
    (0.4, 0.125, 10.0)
    """
    w = checked(w)
    exact = w.astype(np.float64)
    h = None if calibration_hessian is None else np.asarray(calibration_hessian, np.float64)
    if h is not None:
        require(
            h.shape == (w.shape[1],) * 2,
            "calibration_hessian.shape",
            h.shape,
            f"must be (in, in) = {(w.shape[1],) * 2}",
        )
    rows = []
    for config in configs:
        weight = quantized(w, config, h)
        error = exact - weight.dense()
        relative = _ratio(float(np.linalg.norm(error)), float(np.linalg.norm(exact)))
        rows.append(
            settings(config)
            | {
                "bits_per_weight": weight.bits_per_weight,
                "file_bits_per_weight": _file_bits(weight),
                "mean_abs": float(np.abs(error).mean()),
                "rms": float(np.sqrt((error**2).mean())),
                "max_abs": float(np.abs(error).max()),
                "relative": relative,
                "snr_db": -20 * float(np.log10(relative)) if relative else float("inf"),
                "output_error": None if h is None else _ratio(_output_norm(error, h), _output_norm(exact, h)),
            }
        )
    return rows


def _output_norm(w: Array, h: Array) -> float:
    """Return ‖X·Wᵀ‖·√(2/n) = √(tr W·H·Wᵀ); rounding may leave a tiny negative sum."""
    return float(np.sqrt(max(0.0, float(((w @ h) * w).sum()))))


def _ratio(part: float, whole: float) -> float:
    return part / whole if part else 0.0  # an all-zero weight loses nothing


def _file_bits(weight: CodebookWeight | AffineWeight) -> float | None:
    if (
        weight.quant_type not in QUANT_TYPES
        or weight.block_size not in BLOCK_SIZES
        or isinstance(weight, AffineWeight)
    ):
        return None
    stored = sum(array.nbytes for name, array in to_arrays("w", weight).items() if "quant_state" not in name)
    return 8 * stored / (weight.shape[0] * weight.shape[1])


def file_bytes(weights: int, block_size: int = 64, double_quant: bool = True) -> int:
    """Return the bytes of one 4-bit tensor in bitsandbytes' file, without its JSON text.

    With B = ⌈n/b⌉ blocks these are ⌈n/2⌉ of codes, 64 of the code map, and 4·B of scales. Double-quantized
    scales take B + 4·⌈B/256⌉, and 1024 for the 8-bit map: in a small tensor the map costs more than it saves.

    >>> file_bytes(16384, double_quant=False), file_bytes(16384)
    (9280, 9540)
    """
    blocks = -(-weights // block_size)
    scales = blocks + 4 * -(-blocks // DYNAMIC_BLOCK_SIZE) + 4 * 256 if double_quant else 4 * blocks
    return (weights + 1) // 2 + 4 * 16 + scales


def crossover(block_size: int = 64) -> int:
    """Return how many weights a tensor needs for double quantization to make its part of the file smaller.

    It must save the 1024 bytes of the map: 3 bytes for each block, less 4 bytes for every 256 blocks.

    >>> crossover(64)
    22017
    """
    blocks = 1
    while file_bytes(blocks * block_size, block_size) >= file_bytes(blocks * block_size, block_size, False):
        blocks += 1
    return (blocks - 1) * block_size + 1  # the first tensor with that many blocks


def size_rows(block_size: int = 64) -> list[Row]:
    """Return bits per weight of real NF4 arrays: in memory against block size, in a file against tensor size.

    Each row has `double_quant` and `weights`, and either `block_size` and `bits_per_weight`, or
    `file_bits_per_weight`.
    """
    rows: list[Row] = []
    for double_quant in (False, True):
        for block in BLOCK_SIZES:
            weight = CodebookWeight.quantize(np.ones((1, 2**20), np.float32), "nf4", block, double_quant)
            rows.append(
                {
                    "double_quant": double_quant,
                    "weights": 2**20,
                    "block_size": block,
                    "bits_per_weight": weight.bits_per_weight,
                }
            )
        for n in (2 ** (k / 2) for k in range(22, 41)):
            n = round(n / block_size) * block_size
            weight = CodebookWeight.quantize(np.ones((1, n), np.float32), "nf4", block_size, double_quant)
            rows.append(
                {"double_quant": double_quant, "weights": n, "file_bits_per_weight": _file_bits(weight)}
            )
    return rows


def level_data(w: Array, config: QuantConfig) -> dict[str, Any]:
    """Return where the weights (out, in) lie between the levels of a type.

    Returns
    -------
    data
        `values` (out·in,), `levels` (≤ 2^k,), `name`, `relative`, `affine`. Codebook: values are w/absmax of
        their block, levels the code map. Affine: values are (w − offset)/(scale·(2^k − 1)) of their group,
        levels q/(2^k − 1).
    """
    w = checked(w)
    weight = quantize_weight(w, config)
    error = weight_errors(w, [config])[0]["relative"]
    if isinstance(weight, AffineWeight):
        groups, top = w.reshape(*weight.scale.shape, -1), 2**config.bits - 1
        values = (groups - weight.offset[..., None]) / (weight.scale[..., None].astype(np.float32) * top)
        levels = np.arange(top + 1) / top
    else:
        starts = np.arange(0, w.size, config.block_size)
        absmax = np.maximum.reduceat(np.abs(w.reshape(-1)), starts)
        each = np.repeat(np.where(absmax > 0, absmax, 1), np.diff([*starts, w.size]))
        values, levels = w.reshape(-1) / each, np.unique(codebooks.code_map(config.quant_type))
    return {
        "values": values.reshape(-1),
        "levels": levels,
        "name": _kind(config),
        "relative": error,
        "affine": config.affine,
    }


def _kind(config: QuantConfig) -> str:
    return config.quant_type if config.fit == "minmax" else f"{config.quant_type} {config.fit}"


def block_errors(w: Array, config: QuantConfig, hessian: Array | None = None) -> dict[str, Any]:
    """Return the error of each block or group beside its largest weight.

    Returns
    -------
    data
        `absmax` = max |w| and `rms` = √mean (w − ŵ)², both (blocks,), `name` and `affine`.
    """
    w = checked(w)
    flat = w.reshape(-1).astype(np.float64)
    size = config.group_size if config.affine else config.block_size
    starts = np.arange(0, w.size, size)
    squares = np.add.reduceat((flat - quantized(w, config, hessian).dense().reshape(-1)) ** 2, starts)
    return {
        "absmax": np.maximum.reduceat(np.abs(flat), starts),
        "rms": np.sqrt(squares / np.diff([*starts, w.size])),
        "name": f"{_kind(config)}, {'groups' if config.affine else 'blocks'} of {size}",
        "affine": config.affine,
    }
