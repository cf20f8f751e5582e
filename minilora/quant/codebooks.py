"""Codebooks: which 2^k values a k-bit code stands for, and how the NormalFloat ones are derived.

A code map is a float32 array of 2^k values in [-1, 1], indexed by the code. NF4 and FP4 are bitsandbytes' tables, digit for
digit; NF2, NF3 and NF8 come out of the same derivation, step by step below.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# QLoRA (arXiv 2305.14314), appendix E. normal_float(4) agrees to 1.1e-7, which is not bit by bit: hence the table.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# The 3 low bits choose the magnitude (in bitsandbytes' own order, not IEEE's), the high bit is the sign; largest value 12.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = _FP4_MAGNITUDES + tuple(-m for m in _FP4_MAGNITUDES)


def normal_float_offset(bits: int) -> float:
    """Return the largest probability whose normal quantile NF-k uses, before the scaling to 1.

    offset_k = 1 - 1/2 (1/(2·2^k) + 1/(2·(2^k - 1))): the mean of half a bin's probability with 2^k and with 2^k - 1 bins.
    For k = 4 it is the 0.9677083 of bitsandbytes' ``create_normal_map``.

    >>> round(normal_float_offset(4), 7)
    0.9677083
    """
    levels = 2**bits
    return 1.0 - 0.5 * (1.0 / (2 * levels) + 1.0 / (2 * (levels - 1)))


def normal_float_quantiles(bits: int) -> tuple[list[float], list[float]]:
    """Return NF-k's (negative, positive) values in ascending order, in units of the standard deviation.

    2^(k-1) positive values are quantiles at evenly spaced probabilities from offset_k down to 1/2, where 1/2 itself (the
    value 0) is left out; 2^(k-1) - 1 negative values are made alike. With one exact zero that is 2^k values: asymmetric, so
    that zero, the commonest weight, has no error (arXiv 2305.14314, section 3).

    >>> negative, positive = normal_float_quantiles(2)
    >>> [round(q, 3) for q in negative + positive]
    [-1.054, 0.46, 1.054]
    """
    offset, quantile = normal_float_offset(bits), NormalDist().inv_cdf

    def quantiles(count: int) -> list[float]:
        step = (offset - 0.5) / count
        return [quantile(offset - step * i) for i in range(count)]

    return [-q for q in quantiles(2 ** (bits - 1) - 1)], quantiles(2 ** (bits - 1))[::-1]


def normal_float(bits: int) -> Float32:
    """Return the NF-k code map: the quantiles and 0, divided by the largest, ascending; float32 (2^k,).

    >>> print(normal_float(2).round(3))
    [-1.     0.     0.436  1.   ]
    """
    negative, positive = normal_float_quantiles(bits)
    return (np.array([*negative, 0.0, *positive]) / positive[-1]).astype(np.float32)


@cache
def code_map(quant_type: str) -> Float32:
    """Return the shared, read-only float32 code map of a codebook type: ``nf2 nf3 nf4 nf8 fp4``.

    Raises ``ValueError`` for any other name.

    >>> code_map("nf4")[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    if quant_type == "nf4":
        values = np.array(NF4, np.float32)
    elif quant_type == "fp4":
        values = np.array(FP4, np.float32) / np.float32(12)
    elif quant_type in ("nf2", "nf3", "nf8"):
        values = normal_float(int(quant_type[2:]))
    else:
        raise ValueError(f"quant_type={quant_type!r}: choose one of nf2, nf3, nf4, nf8, fp4")
    return _read_only(values)


@cache
def dynamic_map() -> Float32:
    """Return the signed 8-bit dynamic map, 256 ascending values, in which double quantization stores absmax.

    Decade 10^(i-6), for i = 0..6, holds the 2^i midpoints of linspace(0.1, 1, 2^i + 1) with both signs; 0 and +1 complete it
    (arXiv 1511.04561; bitsandbytes' ``create_dynamic_map``, bit by bit). It is asymmetric: the smallest value is -0.993.

    >>> print(dynamic_map()[[0, 127, -1]].round(3))
    [-0.993  0.     1.   ]
    """
    values = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = _linspace_float32(0.1, 1.0, 2**i + 1)
        decade = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values.extend([*decade, *-decade])
    return _read_only(np.sort(np.array(values, np.float32)))


def _linspace_float32(low: float, high: float, count: int) -> Float32:
    """Return evenly spaced float32 values, each half stepped from its own end with one rounding, as ``torch.linspace`` does."""
    a, b = np.float32(low), np.float32(high)
    step = np.float64((b - a) / np.float32(count - 1))  # the step is rounded to float32; the product below is then exact
    i = np.arange(count)
    return np.where(i < count // 2, a + step * i, b - step * (count - 1 - i)).astype(np.float32)


def thresholds(values: Float32) -> tuple[Float32, NDArray[np.uint8]]:
    """Return the (2^k - 1,) midpoints between neighbouring values and the code of each of the 2^k ranks.

    A number x has as many thresholds t with x > t below it as its rank says; ``order[rank]`` is its code. A tie takes the lower
    rank. ``order`` is the identity except for FP4, whose codes are not in the order of their values.

    >>> midpoints, order = thresholds(np.array([0, 1, -1, -0.5], np.float32))
    >>> midpoints.tolist(), order.tolist()
    ([-0.75, -0.25, 0.5], [2, 3, 0, 1])
    """
    order = np.argsort(values, kind="stable").astype(np.uint8)
    ranked = values[order]
    return (ranked[:-1] + ranked[1:]) / np.float32(2), order


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
