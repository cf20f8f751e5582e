"""What happens to one row or one number after the other, in one pass over memory instead of one an operation.

The formulas are those of ``minilora.functional``, whose names these kernels carry. All arrays are flat
float32; a row has ``C`` numbers. ``exp`` errs by at most 2 units in the last place and gives 0 below −88.02.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.kernels.jit import kernel
from minilora.kernels.microkernel import fma, from_bits, power_of_two, to_bits

Array = np.ndarray
ONE = np.float32(1)
EMPTY = np.empty(0, np.float32)


@kernel
def exp(x: Any) -> Any:
    """e^x = 2^n · e^r with n = round(x / ln 2), e^r for |r| ≤ ln 2 / 2 from a polynomial (Cephes, expf.c)."""
    x = np.float32(-88.0296919) if x < np.float32(-88.0296919) else x
    x = np.float32(88.7228394) if x > np.float32(88.7228394) else x
    n = np.rint(x * np.float32(1.44269504))
    r = fma(
        n, np.float32(-0.693359375), x
    )  # ln 2 in two parts: the first has few digits, so that n times it is exact
    r = fma(n, np.float32(2.12194440e-4), r)
    p = fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    return fma(p, r * r, r + ONE) * power_of_two(n)


@kernel
def largest(x: Array) -> Any:
    """max(x), of whole numbers in the same order, since of float32 LLVM would make no vectors.

    A NaN counts as +∞ or, if its sign is set, as −∞: what is then computed from all of x is NaN in either
    case.
    """
    best = np.int32(-(2**31))
    for i in range(x.size):
        bits = to_bits(x[i])
        ordered = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
        best = ordered if ordered > best else best
    return from_bits(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@kernel
def embedding_backward(ids: Array, dy: Array, C: int, dtable: Array) -> None:
    """dtable[ids[n]] += dy[n]."""
    for n in range(ids.size):
        row, out = dy[n * C : (n + 1) * C], dtable[ids[n] * C : (ids[n] + 1) * C]
        for c in range(C):
            out[c] += row[c]


@kernel
def rms_norm_forward(x: Array, weight: Array, eps: float, y: Array, rstd: Array) -> None:
    """y = weight · x · rstd, rstd = 1/√(mean(x²) + eps)."""
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
    """dx = rstd (dxhat − xhat · mean(dxhat · xhat)), dxhat = dy · weight; dweight = Σ dy · xhat unless empty;
    dx begins as dy."""
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
    """(first, second) → (first · cos − second · sin, second · cos + first · sin) in each head; ``sign`` −1
    turns back.

    The tables hold D/2 numbers for each position; a table of one sequence serves all.
    """
    half = D // 2
    places = cos.size // half
    turn = np.float32(sign)
    for n in range(x.size // (heads * D)):
        c = cos[n % places * half : (n % places + 1) * half]
        s = sin[n % places * half : (n % places + 1) * half]
        for h in range(n * heads, (n + 1) * heads):
            first, second = x[h * D : h * D + half], x[h * D + half : (h + 1) * D]
            for i in range(half):
                a, b, sine = first[i], second[i], turn * s[i]
                first[i] = a * c[i] - b * sine
                second[i] = b * c[i] + a * sine


@kernel
def swiglu_forward(gate: Array, up: Array, y: Array) -> None:
    """y = gate · σ(gate) · up."""
    for i in range(y.size):
        y[i] = gate[i] / (ONE + exp(-gate[i])) * up[i]


@kernel
def swiglu_backward(gate: Array, up: Array, dgate: Array, dup: Array) -> None:
    """dup = dy · silu(gate), dgate = dy · up · σ (1 + gate (1 − σ)); dup begins as dy."""
    for i in range(dup.size):
        sigma, dy = ONE / (ONE + exp(-gate[i])), dup[i]
        dup[i] = dy * gate[i] * sigma
        dgate[i] = dy * up[i] * sigma * (ONE + gate[i] * (ONE - sigma))


@kernel
def cross_entropy(targets: Array, V: int, logits: Array) -> float:
    """Make probabilities of each row of V logits, in place, and return Σ (log Σ exp logits − logits[target]),
    in float64.

    With two arrays LLVM would have to allow for an overlap, and where there is one, take its loop without
    vectors.
    """
    loss = 0.0
    for n in range(targets.size):
        row = logits[n * V : (n + 1) * V]
        top = largest(row)
        picked, total = np.float64(row[targets[n]] - top), np.float32(0)
        for v in range(V):
            row[v] = exp(row[v] - top)
            total += row[v]
        loss += np.log(np.float64(total)) - picked
        inverse = ONE / total
        for v in range(V):
            row[v] *= inverse
    return loss


@kernel
def group_sum(x: Array, g: int, y: Array) -> None:
    """Sum each group of g neighbours."""
    for i in range(y.size):
        total = np.float32(0)
        for j in range(i * g, (i + 1) * g):
            total += x[j]
        y[i] = total
