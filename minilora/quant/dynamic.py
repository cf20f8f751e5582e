"""8-bit numbers by the dynamic map: block scales of double quantization, and Adam's moments.

    x = dynamic_map[code]·absmax[block],    blocks of 256 numbers

References: QLoRA, arXiv 2305.14314, section 3; 8-bit optimizers, arXiv 2110.02861, sections 2 and 3.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from minilora.kernels import is_plain, load
from minilora.quant import codebooks, reference
from minilora.quant.packed import NO_OFFSETS, Array, frozen
from minilora.quant.switch import implementation

DYNAMIC_BLOCK_SIZE = 256
"""Numbers that share one absmax."""


@cache
def _midpoints(signed: bool) -> Array:
    """Return the midpoints of a dynamic map; unsigned, all that is above 0 rounds to a value above 0."""
    midpoints, _ = codebooks.thresholds(codebooks.dynamic_map(signed))
    if not signed:
        midpoints[0] = 0
    return frozen(midpoints, np.float32)


def dynamic_encode(values: Array, codes: Array, absmax: Array, signed: bool = True) -> None:
    """Quantize float32 numbers to 8 bits: the nearest value of the dynamic map, times max|x| of the block.

    A tie takes the lower code. `signed=False` is for numbers from 0 on. Of these, one above 0 gets a code
    above 0 even where 0 is nearest, because Adam divides by their root.

    Parameters
    ----------
    values : Array
        (n,) float32.
    codes : Array
        (n,) uint8, written.
    absmax : Array
        (⌈n/256⌉,) float32, written.
    signed : bool
        False: spend the sign's bit on precision.

    Examples
    --------
    >>> codes, absmax = np.empty(3, np.uint8), np.empty(1, np.float32)
    >>> dynamic_encode(np.array([0, 1, -4], np.float32), codes, absmax)
    >>> print(dynamic_decode(codes, absmax).round(2))
    [ 0.    0.99 -3.97]
    """
    if is_plain():
        codes[:], absmax[:] = reference.quantize_codebook(values, _midpoints(signed), DYNAMIC_BLOCK_SIZE)
    else:  # in place: Adam's states are updated piece by piece
        quantize = load("codes").quantize_codebook
        quantize(values, _midpoints(signed), DYNAMIC_BLOCK_SIZE, (codes, absmax))


def dynamic_decode(
    codes: Array, absmax: Array, signed: bool = True, first: int = 0, last: int | None = None
) -> Array:
    """Return the numbers first … last - 1 (None: to the end) that `dynamic_encode` stored, float32."""
    out = np.empty((codes.size if last is None else last) - first, np.float32)
    scales, levels = absmax[first // DYNAMIC_BLOCK_SIZE :], codebooks.dynamic_map(signed)
    implementation("codes").dequantize(codes, levels, scales, NO_OFFSETS, DYNAMIC_BLOCK_SIZE, first, out)
    return out
