"""Code maps: which 2^k values a k-bit code stands for. Derived step by step, then frozen.

A code map (codebook) is a float32 array of 2^k values in [-1, 1], indexed by the code. There are three kinds:

- NormalFloat (NF-k): quantiles of the normal distribution (`normal_float_quantiles`) over the largest of them
  (`normal_float`);
- FP4: sign, exponent and mantissa of the code itself (`fp4_value`);
- dynamic 8 bits: the larger the decade, the more values it holds (`dynamic_map`). It stores block scales.

`thresholds` turns a code map into the comparisons that quantize. NF4 and FP4 are also written out as
bitsandbytes' tables; the tests hold that the derivations end in the same bits.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minilora.config import require

Float32 = NDArray[np.float32]

# QLoRA (arXiv 2305.14314), appendix E. Bit by bit normal_float(4, LOFTQ_OFFSET, np.float32); the exact
# normal_float(4) is up to 1.8e-7 away, because bitsandbytes rounds the probabilities to float32.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# fp4_value(0), …, fp4_value(15); the code map divides by 12, the largest. Code 8 is +0, as in bitsandbytes.
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

LOFTQ_OFFSET = 0.9677083
"""offset_4, rounded: the constant of bitsandbytes' `create_normal_map`.

LoftQ (arXiv 2310.08659) keeps it for 2 and 3 bits too, where offset_k is .854167 and .933036. Its NF2 is
-1 0 .3379 1, and the formula's is -1 0 .4358 1."""


# ---- NormalFloat


def normal_float_offset(bits: int) -> float:
    """Return the largest probability whose normal quantile NF-k uses, before the scaling to 1.

    offset_k = 1 - 1/2 (1/(2·2^k) + 1/(2·(2^k - 1))): the mean of half a bin's probability with 2^k and with
    2^k - 1 bins.

    >>> [round(normal_float_offset(bits), 6) for bits in (2, 3, 4)]
    [0.854167, 0.933036, 0.967708]
    """
    require(2 <= bits <= 8, "bits", bits, "must be from 2 to 8")
    levels: int = 2**bits
    return 1.0 - 0.5 * (1.0 / (2 * levels) + 1.0 / (2 * (levels - 1)))


def normal_float_quantiles(
    bits: int, offset: float | None = None, dtype: DTypeLike = np.float64
) -> tuple[list[float], list[float]]:
    """Return NF-k's negative and positive values, ascending, in units of the standard deviation.

    The 2^(k-1) positive values are quantiles at evenly spaced probabilities from `offset` (None: offset_k)
    down to 1/2, without 1/2 itself, whose quantile is 0. The 2^(k-1) - 1 negative values are made likewise.
    With one exact zero that is 2^k values: asymmetric, so that zero, the commonest weight, has no error
    (QLoRA, arXiv 2305.14314, section 3). `dtype` is that of the probabilities: float32 makes the bits of
    bitsandbytes and LoftQ, float64 those of the formula.

    >>> negative, positive = normal_float_quantiles(2)
    >>> [round(q, 3) for q in negative + positive]
    [-1.054, 0.46, 1.054]
    """
    top, quantile = normal_float_offset(bits) if offset is None else offset, NormalDist().inv_cdf
    require(0.5 < top < 1, "offset", top, "must be a probability above 1/2 and below 1")

    def quantiles(count: int) -> list[float]:
        if np.dtype(dtype) == np.float32:
            probabilities = _linspace_float32(top, 0.5, count + 1)[:-1].tolist()
        else:
            probabilities = [top - (top - 0.5) / count * i for i in range(count)]
        return [quantile(p) for p in probabilities]

    return [-q for q in quantiles(2 ** (bits - 1) - 1)], quantiles(2 ** (bits - 1))[::-1]


def normal_float(bits: int, offset: float | None = None, dtype: DTypeLike = np.float64) -> Float32:
    """Return the NF-k code map (2^k,) float32: the quantiles and 0, divided by the largest, ascending.

    Arguments as for `normal_float_quantiles`; `dtype` is that of the division, too.

    >>> print(normal_float(2).round(3), normal_float(2, LOFTQ_OFFSET).round(3))
    [-1.     0.     0.436  1.   ] [-1.     0.     0.338  1.   ]
    >>> bool((normal_float(4, LOFTQ_OFFSET, np.float32) == code_map("nf4")).all())
    True
    """
    negative, positive = normal_float_quantiles(bits, offset, dtype)
    values = np.array([*negative, 0.0, *positive], dtype)
    return np.asarray(values / values[-1], np.float32)


# ---- FP4


def fp4_value(code: int, bias: int = 3) -> float:
    """Return what an FP4 code stands for, from its bits: sign, two exponent bits e, one mantissa bit m.

    For e = 0 (subnormal) that is ±m/2·2^-bias, else ±(1 + m/2)·2^(bias + 1 - e). Contrary to IEEE 754 a
    larger e is a smaller number. A bias of 3 makes bitsandbytes' table. Its `create_fp8_map` has 2: the
    smallest value is then 1/48 of the largest instead of 1/192.

    >>> [fp4_value(code) for code in (0b0000, 0b0001, 0b0010, 0b0011, 0b0110, 0b1011)]
    [0.0, 0.0625, 8.0, 12.0, 2.0, -12.0]
    """
    require(0 <= code < 16, "code", code, "must be from 0 to 15")
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (bias + 1 - exponent) if exponent else mantissa / 2 * 2.0**-bias
    return -magnitude if sign and magnitude else magnitude  # zero has no sign: a code map holds +0 twice


# ---- the shared code maps


@cache
def code_map(quant_type: str) -> Float32:
    """Return the shared, read-only float32 code map of `nf2`, `nf3`, `nf4`, `nf8` or `fp4`.

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


def dynamic_map(signed: bool = True) -> Float32:
    """Return the 8-bit dynamic map, 256 ascending values: signed, or unsigned for Adam's v.

    Decade 10^(i-6), for i = 0..6, holds the 2^i midpoints of linspace(0.1, 1, 2^i + 1) with both signs; 0 and
    +1 complete it. It is asymmetric: the smallest value is -0.993. Unsigned, the sign's bit goes to the
    fraction: 2^(i+1) midpoints a decade. Both are bitsandbytes' `create_dynamic_map`, bit by bit
    (arXiv 1511.04561; 8-bit optimizers, arXiv 2110.02861, section 2).

    >>> print(dynamic_map()[[0, 127, -1]].round(3), dynamic_map(signed=False)[[0, 1, -2]])
    [-0.993  0.     1.   ] [0.0000000e+00 3.2500003e-07 9.9648440e-01]
    """
    return _dynamic_map(signed)


@cache
def _dynamic_map(signed: bool) -> Float32:  # one array, however it is asked for
    values = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = _linspace_float32(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        decade = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values.extend([*decade, *-decade] if signed else decade)
    return _read_only(np.sort(np.array(values, np.float32)))


# ---- quantizing with a code map


def thresholds(values: Float32) -> tuple[Float32, NDArray[np.uint8]]:
    """Return the (2^k - 1,) midpoints between neighbouring values, and the code of each of the 2^k ranks.

    The rank (position among the sorted values) of a number x is how many midpoints t have x > t, so a tie
    takes the lower rank. `order[rank]` is its code. The order is the identity except for FP4, whose codes are
    not in the order of their values.

    >>> midpoints, order = thresholds(np.array([0, 1, -1, -0.5], np.float32))
    >>> midpoints.tolist(), order.tolist()
    ([-0.75, -0.25, 0.5], [2, 3, 0, 1])
    """
    order = np.argsort(values, kind="stable").astype(np.uint8)
    ranked = values[order]
    return (ranked[:-1] + ranked[1:]) / np.float32(2), order


def _linspace_float32(low: float, high: float, count: int) -> Float32:
    """Return evenly spaced float32 values as `torch.linspace` does: each half steps from its own end."""
    a, b = np.float32(low), np.float32(high)
    step = np.float64((b - a) / np.float32(count - 1))  # rounded to float32, so that products below are exact
    i = np.arange(count)
    return np.where(i < count // 2, a + step * i, b - step * (count - 1 - i)).astype(np.float32)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
