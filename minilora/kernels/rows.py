"""Functions of one row or one number, each in one pass over memory where NumPy needs one pass per operation.

The formulas are those of `minilora.functional`, whose names these kernels carry. All arrays are flat float32;
a row has C numbers. tests/test_compiled_math.py compares every kernel with
`functional` in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.intrinsics import fma, from_bits, power_of_two, to_bits
from minilora.kernels.jit import kernel

Array = np.ndarray
ONE = np.float32(1)
EMPTY = np.empty(0, np.float32)


@kernel
def exp(x: Any) -> Any:
    """Return e^x, within 2 units in the last place; 0 below −88.02.

    e^x = 2^n · e^r with n = round(x / ln 2) and a polynomial for |r| ≤ ln 2 / 2 (Cephes, expf.c).
    """
    x = np.float32(-88.0296919) if x < np.float32(-88.0296919) else x
    x = np.float32(88.7228394) if x > np.float32(88.7228394) else x
    n = np.rint(x * np.float32(1.44269504))
    # ln 2 in two parts: the first has few digits, so that n times it is exact
    r = fma(n, np.float32(-0.693359375), x)
    r = fma(n, np.float32(2.12194440e-4), r)
    p = fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    return fma(p, r * r, r + ONE) * power_of_two(n)


@kernel
def largest(x: Array) -> Any:
    """Return max(x).

    It compares int32 numbers in the same order: LLVM makes no vectors of a float32 maximum. A NaN counts as
    ±∞ by its sign; what is then computed from all of x is NaN in either case.
    """
    best = np.int32(-(2**31))
    for i in range(x.size):
        bits = to_bits(x[i])
        ordered = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
        best = ordered if ordered > best else best
    return from_bits(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@kernel
def rms_norm_forward(x: Array, weight: Array, eps: float, y: Array, rstd: Array) -> None:
    """Write y = weight · x · rstd with rstd = 1/√(mean(x²) + eps): x and y (N, C), rstd (N,)."""
    C = weight.size
    for n in range(rstd.size):
        row, out = x[n * C : (n + 1) * C], y[n * C : (n + 1) * C]
        squares = np.float32(0)
        for c in range(C):
            squares += row[c] * row[c]
        scale = ONE / np.sqrt(squares / np.float32(C) + np.float32(eps))
        rstd[n] = scale
        for c in range(C):
            out[c] = row[c] * scale * weight[c]


@kernel
def rms_norm_backward(weight: Array, x: Array, rstd: Array, dx: Array, dweight: Array) -> None:
    """Turn dy, which dx (N, C) holds at first, into dx; add to dweight (C,) unless it is empty.

    dx = rstd (dxhat − xhat · mean(dxhat · xhat)), dweight = Σ dy · xhat; dxhat = dy · weight, xhat = x · rstd
    """
    C = weight.size
    for n in range(rstd.size):
        row, out = x[n * C : (n + 1) * C], dx[n * C : (n + 1) * C]
        scale, pull = rstd[n], np.float32(0)
        for c in range(C):
            pull += out[c] * weight[c] * row[c]
        pull *= scale * scale / np.float32(C)
        for c in range(dweight.size):
            dweight[c] += out[c] * row[c] * scale
        for c in range(C):
            out[c] = scale * (out[c] * weight[c] - row[c] * pull)


@kernel
def rope(cos: Array, sin: Array, heads: int, D: int, sign: float, x: Array) -> None:
    """Rotate every head of x (N, heads, D) in place; `sign` −1 rotates back.

    (first, second) → (first · cos − second · sin, second · cos + first · sin), the two halves of a head. The
    tables hold D/2 numbers per position; those of one sequence serve all sequences.
    """
    half = D // 2
    positions = cos.size // half
    turn = np.float32(sign)
    for n in range(x.size // (heads * D)):
        c = cos[n % positions * half : (n % positions + 1) * half]
        s = sin[n % positions * half : (n % positions + 1) * half]
        for h in range(n * heads, (n + 1) * heads):
            first, second = x[h * D : h * D + half], x[h * D + half : (h + 1) * D]
            for i in range(half):
                a, b, sine = first[i], second[i], turn * s[i]
                first[i] = a * c[i] - b * sine
                second[i] = b * c[i] + a * sine


@kernel
def swiglu_forward(gate: Array, up: Array, y: Array) -> None:
    """Write y = gate · σ(gate) · up."""
    for i in range(y.size):
        y[i] = gate[i] / (ONE + exp(-gate[i])) * up[i]


@kernel
def swiglu_backward(gate: Array, up: Array, dgate: Array, dup: Array) -> None:
    """Write dgate = dy · up · σ (1 + gate (1 − σ)) and dup = dy · gate · σ; dup holds dy at first."""
    for i in range(dup.size):
        sigma, dy = ONE / (ONE + exp(-gate[i])), dup[i]
        dup[i] = dy * gate[i] * sigma
        dgate[i] = dy * up[i] * sigma * (ONE + gate[i] * (ONE - sigma))


@kernel
def group_sum(x: Array, g: int, y: Array) -> None:
    """Write the sums of groups of g neighbours: x (n·g,) → y (n,)."""
    for i in range(y.size):
        total = np.float32(0)
        for j in range(i * g, (i + 1) * g):
            total += x[j]
        y[i] = total
