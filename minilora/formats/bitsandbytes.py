"""One weight in bitsandbytes' safetensors form: NF4 or FP4 codes, absmax and a JSON text of settings.

A tensor `X` of n = out·in weights in blocks of b becomes

    X                                 uint8   ((n+1)//2, 1)   two codes per byte, the first in the high half
    X.absmax                          float32 (⌈n/b⌉,)        max|w| of each block
    X.quant_map                       float32 (16,)           the codebook
    X.quant_state.bitsandbytes__nf4   uint8   (bytes,)        JSON; the key ends in fp4 for FP4

With double quantization absmax are uint8 codes, and there are two tensors more:

    X.nested_absmax                   float32 (⌈n/b/256⌉,)    max of each block of absmax
    X.nested_quant_map                float32 (256,)          the 8-bit dynamic map

Our codes and scales have the same layout, so both directions copy bytes and round nothing. Each file holds
the codebooks, but they are constants: one that differs from ours is refused. `dtype` in the JSON says what
the model was quantized from. bitsandbytes rounds decoded weights to it; we decode to float32.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from minilora.config import require, require_in
from minilora.formats.files import Array, FileError, without_repeats
from minilora.quant import codebooks
from minilora.quant.dynamic import DYNAMIC_BLOCK_SIZE
from minilora.quant.weights import CodebookWeight, DoubleQuant

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "float16", "bfloat16")
MAX_STATE_BYTES = 1000
"""Longest JSON text that is read; bitsandbytes writes fewer than 250 bytes."""
FLOAT32_MAX = float(np.finfo(np.float32).max)

_STATE_KEY = "quant_state.bitsandbytes__"
_PLAIN_STATE = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_STATE = (*_PLAIN_STATE, "nested_blocksize", "nested_dtype", "nested_offset")
_STATE_PARTS = tuple(_STATE_KEY + quant_type for quant_type in QUANT_TYPES)
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATE_PARTS)


def to_arrays(name: str, weight: CodebookWeight) -> dict[str, Array]:
    """Return the arrays that bitsandbytes stores for a weight (out, in), by name.

    Parameters
    ----------
    name : str
        The tensor's name, which ends in `.weight`.
    weight : CodebookWeight
        NF4 or FP4.

    Raises
    ------
    ConfigError
        bitsandbytes does not have this codebook or block size.

    Examples
    --------
    >>> weight = CodebookWeight.quantize(np.eye(8, 32, dtype=np.float32), "nf4", 64, double_quant=False)
    >>> {key: array.shape for key, array in to_arrays("w", weight).items()}
    {'w': (128, 1), 'w.absmax': (4,), 'w.quant_map': (16,), 'w.quant_state.bitsandbytes__nf4': (76,)}
    """
    require(
        weight.quant_type in QUANT_TYPES,
        f"{name}: quant_type",
        weight.quant_type,
        "bitsandbytes has nf4 and fp4 only: quantize with one of them, or save_model keeps it",
    )
    require_in(weight.block_size, BLOCK_SIZES, f"{name}: block_size")
    state: dict[str, Any] = {  # keys in bitsandbytes' order, for equal bytes
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": "float32",
        "shape": list(weight.shape),
    }
    quant_map = codebooks.code_map(weight.quant_type)
    if isinstance(weight.scales, DoubleQuant):
        state |= {
            "nested_blocksize": DYNAMIC_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.scales.offset.item(),
        }
        parts = {
            "absmax": weight.scales.codes,
            "quant_map": quant_map,
            "nested_absmax": weight.scales.absmax,
            "nested_quant_map": codebooks.dynamic_map(),
        }
    else:
        parts = {"absmax": weight.scales, "quant_map": quant_map}
    parts[_STATE_KEY + weight.quant_type] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name: weight.codes.reshape(-1, 1)} | {f"{name}.{part}": array for part, array in parts.items()}


def is_quantized(arrays: dict[str, Array], name: str) -> bool:
    """Say whether `arrays` holds any of bitsandbytes' arrays for the tensor `name`.

    Examples
    --------
    >>> is_quantized({"w": np.ones(2), "w.absmax": np.ones(1)}, "w"), is_quantized({"w": np.ones(2)}, "w")
    (True, False)
    """
    return any(f"{name}.{part}" in arrays for part in _PARTS)


def from_arrays(name: str, arrays: dict[str, Array], where: str) -> CodebookWeight:
    """Take the arrays of the tensor `name` out of `arrays`, and return the same bits as a weight.

    Parameters
    ----------
    name : str
        The tensor's name, which ends in `.weight`.
    arrays : dict of str to ndarray
        The arrays of a file; those of this tensor are removed.
    where : str
        The file, for messages.

    Raises
    ------
    FileError
        bitsandbytes would not have written this: an array is missing or left over, has another dtype or
        shape, a setting or codebook is unknown, a scale is negative or not finite.

    Examples
    --------
    >>> weight = CodebookWeight.quantize(np.eye(8, 32, dtype=np.float32), "fp4", 64)
    >>> bool((from_arrays("w", to_arrays("w", weight), "model.safetensors").codes == weight.codes).all())
    True
    """
    quant_type, state = _take_state(name, arrays, where)
    nested, block_size = len(state) == len(_NESTED_STATE), state["blocksize"]
    out_features, in_features = state["shape"]
    blocks = -(-out_features * in_features // block_size)

    def take(key: str, dtype: Any, *shape: int) -> Array:
        return _take(key, arrays, dtype, shape, where)

    codes = take(name, np.uint8, (out_features * in_features + 1) // 2, 1)
    absmax = take(f"{name}.absmax", np.uint8 if nested else np.float32, blocks)
    _check_map(
        f"{name}.quant_map",
        take(f"{name}.quant_map", np.float32, 16),
        codebooks.code_map(quant_type),
        quant_type,
        where,
    )
    scales: Array | DoubleQuant = absmax
    if nested:
        nested_absmax = take(f"{name}.nested_absmax", np.float32, -(-blocks // DYNAMIC_BLOCK_SIZE))
        nested_map = take(f"{name}.nested_quant_map", np.float32, 256)
        _check_map(f"{name}.nested_quant_map", nested_map, codebooks.dynamic_map(), "8-bit dynamic", where)
        _check_scales(f"{name}.nested_absmax", nested_absmax, state["nested_offset"], where)
        scales = DoubleQuant(absmax, nested_absmax, np.array([state["nested_offset"]], np.float32))
    else:
        _check_scales(f"{name}.absmax", absmax, 0.0, where)
    left = [part for part in _PARTS if f"{name}.{part}" in arrays]
    if left:
        raise FileError(
            f"{where}: {name}.{left[0]} does not belong beside {_STATE_KEY}{quant_type} without double "
            "quantization"
        )
    return CodebookWeight(codes.reshape(-1), scales, (out_features, in_features), quant_type, block_size)


# ---- the JSON text


def _take_state(name: str, arrays: dict[str, Array], where: str) -> tuple[str, dict[str, Any]]:
    """Take out the one JSON text of a tensor, and return (quant_type, settings), all checked."""
    found = [part for part in _STATE_PARTS if f"{name}.{part}" in arrays]
    if len(found) != 1:
        has = " and ".join(found) or f"no {_STATE_KEY}…"
        raise FileError(f"{where}: {name} has {has}, needs exactly one of {_STATE_PARTS}")
    key, quant_type = f"{name}.{found[0]}", found[0].removeprefix(_STATE_KEY)
    raw = arrays.pop(key)
    if raw.dtype != np.uint8 or raw.ndim != 1 or not 0 < raw.size <= MAX_STATE_BYTES:
        raise FileError(
            f"{where}: {key} is {raw.dtype} {raw.shape}, must be uint8, 1 to {MAX_STATE_BYTES} bytes of JSON"
        )
    try:
        state = json.loads(raw.tobytes().decode(), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: {key} is not JSON ({error})") from None
    if not isinstance(state, dict) or set(state) not in (set(_PLAIN_STATE), set(_NESTED_STATE)):
        keys = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise FileError(
            f"{where}: {key} holds {keys}, must hold {_PLAIN_STATE} or, for double quantization, "
            f"{_NESTED_STATE}"
        )
    allowed: dict[str, tuple[Any, ...]] = {
        "quant_type": (quant_type,),
        "blocksize": BLOCK_SIZES,
        "dtype": DTYPES,
        "nested_blocksize": (DYNAMIC_BLOCK_SIZE,),
        "nested_dtype": ("float32",),
    }
    for setting, values in allowed.items():
        if setting in state and not any(
            type(state[setting]) is type(v) and state[setting] == v for v in values
        ):
            raise FileError(
                f"{where}: {key}: {setting}={state[setting]!r}, choose one of {', '.join(map(str, values))}"
            )
    shape = state["shape"]
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise FileError(f"{where}: {key}: shape={shape!r}, must be [out, in], both at least 1")
    if "nested_offset" in state and not _is_float32(state["nested_offset"]):
        raise FileError(f"{where}: {key}: nested_offset={state['nested_offset']!r}, must be a finite float32")
    return quant_type, state


def _is_float32(value: Any) -> bool:
    """Say whether a JSON value is a finite number in float32's range."""
    return type(value) in (int, float) and -FLOAT32_MAX <= value <= FLOAT32_MAX


# ---- the arrays


def _take(key: str, arrays: dict[str, Array], dtype: Any, shape: tuple[int, ...], where: str) -> Array:
    """Take out one array, and raise FileError for another dtype or shape."""
    array = arrays.pop(key, None)
    if array is None:
        raise FileError(f"{where}: {key} is missing, must be {np.dtype(dtype)} {shape}")
    if array.dtype != dtype or array.shape != shape:
        hint = ""
        if array.dtype != dtype and len(shape) == 2:
            hint = "; bitsandbytes' quant_storage must be uint8"
        raise FileError(
            f"{where}: {key} is {array.dtype} {array.shape}, must be {np.dtype(dtype)} {shape}{hint}"
        )
    return array


def _check_map(key: str, found: Array, ours: Array, kind: str, where: str) -> None:
    """Raise FileError for a codebook that differs from ours; FP4's two zeros count as equal."""
    different = np.flatnonzero(found != ours)
    if different.size:
        i = int(different[0])
        raise FileError(
            f"{where}: {key}[{i}]={found[i]}, the {kind} map has {ours[i]} ({different.size} of {ours.size} "
            "values differ): other codebooks cannot be read, quantize the model again"
        )


def _check_scales(key: str, scales: Array, offset: float, where: str) -> None:
    """Raise FileError for a scale that is negative, not finite, or infinite with the offset added."""
    largest = FLOAT32_MAX - abs(offset)
    bad = np.flatnonzero(~((scales >= 0) & (scales <= np.float64(largest))))  # NaN is bad too
    if bad.size:
        i = int(bad[0])
        raise FileError(f"{where}: {key}[{i}]={scales[i]}, must be from 0 to {largest:g}")
