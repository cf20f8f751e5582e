"""One weight in GPTQ's form (AutoGPTQ, GPTQModel): Wᵀ in 32-bit words, with w = scale·(q − zero).

A module `X` with b bits and L = in/g groups of g inputs becomes

    X.qweight   int32   (in·b/32, out)   codes, packed along the input
    X.qzeros    int32   (L, out·b/32)    zero points, packed along the output
    X.scales    float16 (L, out)
    X.g_idx     int32   (in,)            the group of each input: i // g

Values are packed as one stream of bits, lowest bit of the lowest value first: value i lies in bits i·b to
i·b + b − 1. With 3 bits, 32 values fill 3 words, and values 10 and 21 straddle two words.

**Zero points minus one.** Version 1 (`checkpoint_format: gptq`) stores zero − 1. Version 2 (`gptq_v2`) stores
the zero itself. In version 1 a zero of 0 wraps to 2^b − 1. Some readers compute (z + 1) mod 2^b and get 0
back; others, early AutoGPTQ among them, get 2^b. So we read version 1 modulo 2^b, and never write a zero of 0
in it.

**Groups must be contiguous.** With act-order (`desc_act=True`) `g_idx` scatters a group over the input. A
QA-LoRA adapter sums g neighbouring inputs, so such a file is refused.
"""

from __future__ import annotations

from math import gcd

import numpy as np

from minilora.config import ConfigError, require, require_in
from minilora.formats.files import Array, FileError
from minilora.quant.affine import AffineWeight
from minilora.quant.packed import packed
from minilora.quant.zero_points import ZeroPointWeight

BITS = (2, 3, 4, 8)
VERSIONS = (1, 2)

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_TILE = 1 << 20
"""Number of values packed at once; each bit takes a byte meanwhile."""


def to_arrays(name: str, weight: AffineWeight, version: int = 1) -> dict[str, Array]:
    """Return the arrays that GPTQ stores for a weight (out, in), by name.

    Parameters
    ----------
    name : str
        The module's name, without `.weight`.
    weight : AffineWeight
        2, 3, 4 or 8 bits, with whole zero points.
    version : {1, 2}
        1 stores zero − 1, 2 the zero itself.

    Raises
    ------
    ConfigError
        Offsets are real numbers, a row or column of codes does not fill 32-bit words, or version 1 would
        store a zero point of 0.

    Examples
    --------
    >>> weight = AffineWeight.quantize(np.eye(16, 64, dtype=np.float32), 4, 32, store="zero")
    >>> {key: array.shape for key, array in to_arrays("m", weight, version=2).items()}
    {'m.qweight': (8, 16), 'm.qzeros': (2, 2), 'm.scales': (2, 16), 'm.g_idx': (64,)}
    """
    require_in(version, VERSIONS, "version")
    bits, (out_features, in_features), zeros = weight.bits, weight.shape, weight.zeros
    multiple = _values_per_words(bits)
    for axis, size in (("in", in_features), ("out", out_features)):
        require(
            size % multiple == 0,
            f"{name}: {axis}",
            size,
            f"must be a multiple of {multiple}: {bits}-bit values have to fill words of 32 bits",
        )
    if zeros is None:
        raise ConfigError(
            f"{name}: its offsets are real numbers, GPTQ has whole zero points: weight.stored('zero') rounds "
            "them"
        )
    if version == 1:
        if not zeros.all():
            row, group = np.argwhere(zeros == 0)[0].tolist()
            raise ConfigError(
                f"{name}: zeros[{row}, {group}]=0: version 1 stores zero - 1 and cannot hold it: write "
                "version=2"
            )
        zeros = zeros - np.uint8(1)
    return {
        f"{name}.qweight": np.ascontiguousarray(_to_words(weight.unpacked(), bits).T),
        f"{name}.qzeros": _to_words(zeros.T, bits),
        f"{name}.scales": np.ascontiguousarray(weight.scale.T),
        f"{name}.g_idx": (np.arange(in_features) // weight.group_size).astype(np.int32),
    }


def is_quantized(arrays: dict[str, Array], name: str) -> bool:
    """Say whether `arrays` holds any of GPTQ's arrays for the module `name`.

    Examples
    --------
    >>> is_quantized({"m.qweight": np.ones(2)}, "m"), is_quantized({"m.weight": np.ones(2)}, "m")
    (True, False)
    """
    return any(f"{name}.{part}" in arrays for part in _PARTS)


def from_arrays(
    name: str, arrays: dict[str, Array], bits: int, group_size: int, version: int, where: str
) -> AffineWeight:
    """Take the arrays of the module `name` out of `arrays`, and return exactly these values as a weight.

    Parameters
    ----------
    name : str
        The module's name, without `.weight`.
    arrays : dict of str to ndarray
        The arrays of a file; those of this module are removed.
    bits, group_size, version : int
        From the file's configuration; a `group_size` of −1 means one group per row.
    where : str
        The file, for messages.

    Raises
    ------
    FileError
        A setting is not allowed, an array is missing, dtypes or shapes do not fit together, a scale is not
        finite (any sign is allowed), or groups are not contiguous.

    Examples
    --------
    >>> weight = AffineWeight.quantize(np.eye(16, 64, dtype=np.float32), 4, 32, store="zero")
    >>> read = from_arrays("m", to_arrays("m", weight, version=2), 4, 32, 2, "model.safetensors")
    >>> bool((read.codes == weight.codes).all() and (read.zeros == weight.zeros).all())
    True
    """
    for setting, value, allowed in (("bits", bits, BITS), ("version", version, VERSIONS)):
        if type(value) is not int or value not in allowed:
            raise FileError(
                f"{where}: {name}: {setting}={value!r}, choose one of {', '.join(map(str, allowed))}"
            )
    qweight, qzeros, scales, g_idx = (_take(f"{name}.{part}", arrays, where) for part in _PARTS)
    in_features, out_features = g_idx.size, qweight.shape[1]
    if type(group_size) is int and group_size == -1:
        group_size = in_features
    if type(group_size) is not int or group_size < 1 or in_features % group_size:
        raise FileError(
            f"{where}: {name}: group_size={group_size!r}, must be -1 or divide the {in_features} inputs of "
            "g_idx"
        )
    multiple = _values_per_words(bits)
    for axis, size in (("inputs", in_features), ("outputs", out_features)):
        if size == 0 or size % multiple:
            raise FileError(
                f"{where}: {name} has {size} {axis}, must be a multiple of {multiple} for {bits} bits"
            )
    groups = in_features // group_size
    for part, array, shape in (
        ("qweight", qweight, (in_features * bits // 32, out_features)),
        ("qzeros", qzeros, (groups, out_features * bits // 32)),
        ("scales", scales, (groups, out_features)),
    ):
        if array.shape != shape:
            raise FileError(
                f"{where}: {name}.{part} has shape {array.shape}, must be {shape} for {out_features} "
                f"outputs, {in_features} inputs, bits={bits} and group_size={group_size}"
            )
    _check_groups(name, g_idx, group_size, where)
    if not np.isfinite(scales).all():
        group, row = np.argwhere(~np.isfinite(scales))[0].tolist()
        raise FileError(f"{where}: {name}.scales[{group}, {row}]={scales[group, row]}, must be finite")
    codes = packed(_from_words(qweight.T, bits).reshape(-1), bits)
    zeros = _from_words(qzeros, bits).T
    if version == 1:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    return ZeroPointWeight(codes, scales.T, zeros, (out_features, in_features), bits, group_size)


def _take(key: str, arrays: dict[str, Array], where: str) -> Array:
    """Take out one array, and raise FileError for another dtype or number of axes than its part has."""
    array = arrays.pop(key, None)
    dtype = np.dtype(np.float16 if key.endswith(".scales") else np.int32)
    axes = 1 if key.endswith(".g_idx") else 2
    if array is None:
        hint = " (AWQ files have none: they are not GPTQ)" if key.endswith(".g_idx") else ""
        raise FileError(f"{where}: {key} is missing{hint}")
    if array.dtype != dtype or array.ndim != axes:
        raise FileError(
            f"{where}: {key} is {array.dtype} with shape {array.shape}, must be {dtype} with {axes} axes"
        )
    return array


def _check_groups(name: str, g_idx: Array, group_size: int, where: str) -> None:
    """Raise FileError at the first input that is out of its group's order."""
    expected = np.arange(g_idx.size) // group_size
    wrong = np.flatnonzero(g_idx != expected)
    if wrong.size:
        i = int(wrong[0])
        raise FileError(
            f"{where}: {name}.g_idx[{i}]={g_idx[i]}, must be {expected[i]} = {i} // {group_size}: inputs are "
            "out of order (act-order), but QA-LoRA's groups are neighbours; quantize with desc_act=False"
        )


# ---- words of 32 bits


def _values_per_words(bits: int) -> int:
    """Return the fewest values that fill whole words: 32/bits for 2, 4 and 8 bits, 32 for 3 bits."""
    return 32 // gcd(32, bits)


def _to_words(values: Array, bits: int) -> Array:
    """Pack each row of values (rows, n) uint8 into words (rows, n·bits/32) int32, the lowest bit first."""
    rows, n = values.shape
    packed_bytes = np.empty((rows, n * bits // 8), np.uint8)
    step = max(1, _TILE // n)
    for first in range(0, rows, step):
        single = np.unpackbits(values[first : first + step, :, None], axis=2, count=bits, bitorder="little")
        packed_bytes[first : first + step] = np.packbits(
            single.reshape(len(single), -1), axis=1, bitorder="little"
        )
    return packed_bytes.view("<i4").astype(np.int32, copy=False)


def _from_words(words: Array, bits: int) -> Array:
    """Unpack words (rows, n·bits/32) int32 into values (rows, n) uint8: the inverse of `_to_words`."""
    rows, n = words.shape[0], words.shape[1] * 32 // bits
    values = np.empty((rows, n), np.uint8)
    step = max(1, _TILE // n)
    for first in range(0, rows, step):
        stored = np.ascontiguousarray(words[first : first + step], "<i4").view(np.uint8)
        single = np.unpackbits(stored, axis=1, bitorder="little").reshape(len(stored), n, bits)
        values[first : first + step] = np.packbits(single, axis=2, bitorder="little")[:, :, 0]
    return values
