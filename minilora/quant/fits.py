"""How a group of weights gets its scale and offset: four fits, and three ways to store the offset.

    w = scale·q + offset,    q = clip(rint((w − offset)/scale), 0, 2^k − 1)

Arrays are (groups, g) weights and (groups,) parameters. The scale is float16 always. The offset is stored as
`float16`, as `float32`, or as `zero`: a whole number z of k bits, w = scale·(q − z), which is what GPTQ files
hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.config import FITS, OFFSET_STORES, require_in
from minilora.quant.packed import frozen
from minilora.quant.switch import implementation

Array = NDArray[Any]

# the defaults of the authors' code: GPTQ's Quantizer.configure and hqq's optimize_weights_proximal
MSE_GRID, MSE_SHRINK, MSE_NORM = 100, 0.8, 2.4
HQQ_NORM, HQQ_BETA, HQQ_GROWTH, HQQ_STEPS = 0.7, 10.0, 1.01, 20


def fit_groups(w: Array, bits: int, how: str = "minmax", store: str = "float16") -> tuple[Array, Array]:
    """Fit a scale and an offset to each group.

    Parameters
    ----------
    w : Array
        (groups, g) float32.
    bits : int
        k, of a code.
    how : str
        - `minmax`: offset = min, scale = (max − min)/(2^k − 1);
        - `symmetric`: zero point 2^(k−1);
        - `mse`: the min/max range, shrunk by the factor for which Σ|error|^2.4 is least;
        - `hqq`: the min/max scale, with the offset that half-quadratic splitting finds.
    store : str
        `float16`, `float32` or `zero`. A zero point needs a range that holds 0, so `zero` widens the range to
        it.

    Returns
    -------
    scale : Array
        (groups,) float16.
    offset : Array
        (groups,), as it is stored: zero points are uint8.

    Raises
    ------
    ValueError
        For a scale or offset beyond float16.

    Examples
    --------
    >>> w = np.array([[-1.0, 0.0, 2.0, 5.0]], np.float32)
    >>> [a.tolist() for a in fit_groups(w, 2)]
    [[2.0], [-1.0]]
    >>> fit_groups(w, 2, store="zero")[1].tolist()  # 0.5 goes to even
    [0]
    """
    require_in(how, FITS, "fit")
    require_in(store, OFFSET_STORES, "offset_dtype")
    low, high = implementation("codes").group_range(frozen(w.reshape(-1), np.float32), w.shape[1])
    if how == "symmetric":
        high = np.maximum(np.abs(low), np.abs(high))
        scale = stored_scale(high * np.float32(2), bits)
        offset = -np.float32(2 ** (bits - 1)) * scale.astype(np.float32)
        return scale, stored_offset(offset, scale, bits, store)
    if store == "zero":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    if how == "mse":
        return _fit_mse(w, low, high, bits, store)
    scale = stored_scale(high - low, bits)
    offset = _fit_hqq(w, scale.astype(np.float32), low, bits) if how == "hqq" else low
    return scale, stored_offset(offset, scale, bits, store)


def stored_scale(width: Array, bits: int) -> Array:
    """Return width/(2^k − 1) as float16, or 1 where it rounds to 0: there all weights are equal."""
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        scale = (width / np.float32(2**bits - 1)).astype(np.float16)
    _refuse_infinite(scale, "scale")
    scale[scale == 0] = 1
    return scale


def stored_offset(offset: Array, scale: Array, bits: int, store: str) -> Array:
    """Return float32 offsets as stored: float16, float32, or zero points rint(−offset/scale) of k bits."""
    if store == "zero":
        # a file may hold scale 0, which no zero point moves
        steps = -offset / np.where(scale == 0, 1, scale).astype(np.float32)
        return np.clip(np.rint(steps), 0, 2**bits - 1).astype(np.uint8)
    with np.errstate(over="ignore"):
        stored = offset.astype(store)
    _refuse_infinite(stored, "offset")
    return stored


def offset_of(stored: Array, scale: Array) -> Array:
    """Return what a stored offset stands for, float32: itself, or −scale·z, which is exact."""
    if stored.dtype == np.uint8:
        return -scale.astype(np.float32) * stored
    return stored.astype(np.float32)


def decoded(w: Array, scale: Array, offset: Array, bits: int) -> Array:
    """Return scale·q + offset for the nearest codes q of w (groups, g); parameters (groups,) float32."""
    codes = np.clip(np.rint((w - offset[:, None]) / scale[:, None]), 0, 2**bits - 1)
    return codes * scale[:, None] + offset[:, None]


def _fit_mse(w: Array, low: Array, high: Array, bits: int, store: str) -> tuple[Array, Array]:
    """Try the range times 1, 0.99, …, 0.21, and keep the one with the least Σ|error|^2.4; ties: the wider."""
    best = np.full(len(w), np.inf)
    scale, offset = np.ones(len(w), np.float16), np.zeros(len(w), np.uint8 if store == "zero" else store)
    for i in range(int(MSE_SHRINK * MSE_GRID)):
        p = np.float32(1 - i / MSE_GRID)
        tried = stored_scale(p * (high - low), bits)
        shifted = stored_offset(p * low, tried, bits, store)
        error = np.abs(decoded(w, tried.astype(np.float32), offset_of(shifted, tried), bits) - w)
        loss = np.power(error, np.float32(MSE_NORM)).sum(axis=1, dtype=np.float64)
        better = loss < best
        best[better], scale[better], offset[better] = loss[better], tried[better], shifted[better]
    return scale, offset


def _fit_hqq(w: Array, scale: Array, low: Array, bits: int) -> Array:
    """Return HQQ's offset: alternate a sparse error e ≈ w − ŵ with the offset that is best for w − e.

    Half-quadratic splitting (HQQ, Badri and Shaji 2023) minimises ‖e‖_p^p + β/2·‖w − e − ŵ(offset)‖². The
    e-step shrinks d = w − ŵ towards 0: e = sign(d)·max(|d| − |d|^(p−1)/β, 0). The offset-step is a mean over
    the group. It stops when the mean error of the whole matrix rises.
    """
    offset, best, least, beta = low, low, np.inf, HQQ_BETA
    for _ in range(HQQ_STEPS):
        codes = np.clip(np.rint((w - offset[:, None]) / scale[:, None]), 0, 2**bits - 1)
        d = w - (codes * scale[:, None] + offset[:, None])
        error = float(np.abs(d).mean(dtype=np.float64))
        if error >= least:
            break
        least, best = error, offset
        size = np.abs(d)
        with np.errstate(divide="ignore"):  # 0^(p−1) is inf, and 0 shrinks to 0
            e = np.sign(d) * np.maximum(size - size ** np.float32(HQQ_NORM - 1) / np.float32(beta), 0)
        offset = (w - e - codes * scale[:, None]).mean(axis=1)
        beta *= HQQ_GROWTH
    return best


def _refuse_infinite(values: Array, name: str) -> None:
    if not np.isfinite(values).all():
        group = int(np.flatnonzero(~np.isfinite(values))[0])
        largest = f"{values.dtype}'s {np.finfo(values.dtype).max:g}"
        raise ValueError(
            f"{name} of group {group} (row by row) exceeds {largest}: scale the weights down first"
        )
