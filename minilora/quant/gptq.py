"""GPTQ: round one column after another, and let the columns still to come make up for each error.

The layer's inputs X (n, in) say what matters: rounding changes the output by ‖X(W − Ŵ)ᵀ‖². For every row of W
its Hessian is H = 2·XᵀX/n. With U the upper Cholesky factor of H⁻¹, column i leaves the error e = (w −
ŵ)/U[i, i], and the columns j > i move by −e·U[i, j]:

    for each group of columns:  fit scale and offset to the *updated* weights
        for each column i:      ŵ = round(w);  e = (w − ŵ)/U[i, i];  w[i+1:] −= e·U[i, i+1:]

With `static_groups` all groups are fitted to the first weights. The authors' code fits a group from weights
that its current block of 128 columns has not updated yet. Here a block is one group, so the fit sees all
updates. All is float64, so that an independent oracle finds the same codes. Only the rounding takes the
float32 steps of round-to-nearest: with H diagonal the two agree bit by bit.

Reference: Frantar et al., "GPTQ", arXiv 2210.17323, section 3 and Algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.config import ConfigError, QuantConfig, require
from minilora.quant import codebooks, fits
from minilora.quant.affine import AffineWeight
from minilora.quant.packed import checked, frozen, levels_of, packed
from minilora.quant.switch import implementation
from minilora.quant.weights import CodebookWeight, DoubleQuant

Array = NDArray[Any]

UPDATE_COLUMNS = 128
"""Columns between two products that update the rest, where groups do not set it (static groups)."""


class Hessian:
    """H = 2·XᵀX/n of a layer's inputs: a product in their own dtype for each batch, summed in float64.

    >>> h = Hessian(2)
    >>> h.add(np.array([[1.0, 0.0], [1.0, 2.0]]))
    >>> h.value().tolist()
    [[2.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, in_features: int):
        self.sum, self.count = np.zeros((in_features, in_features)), 0

    def add(self, x: Array) -> None:
        """Add inputs x (…, in)."""
        rows = x.reshape(-1, x.shape[-1])
        self.sum += rows.T @ rows
        self.count += len(rows)

    def value(self) -> Array:
        """Return H (in, in) float64."""
        return 2 / max(self.count, 1) * self.sum


def gptq(w: Array, hessian: Array, config: QuantConfig) -> tuple[CodebookWeight | AffineWeight, float]:
    """Quantize a weight so that the layer's output changes least.

    Parameters
    ----------
    w : Array
        The weight (out, in). Codebook blocks must lie within rows.
    hessian : Array
        The Hessian (in, in) of the layer's inputs. An input that is always 0 gets the value nearest to 0.
    config : QuantConfig
        `damp_percent` of the mean diagonal is added to the Hessian's diagonal. `desc_act` takes the columns
        with the largest diagonal first; it needs `static_groups`. Double-quantized scales are always static,
        because all of them must be known before the first is stored.

    Returns
    -------
    weight : CodebookWeight or AffineWeight
        The quantized weight.
    loss : float
        Σ e²/2, GPTQ's own loss.
    """
    w = checked(w)
    out, in_ = w.shape
    name, group = ("group_size", config.group_size) if config.affine else ("block_size", config.block_size)
    allowed = f"must divide in={in_}: GPTQ rounds column by column, and a scale must belong to one row"
    require(in_ % group == 0, name, group, allowed)
    require(hessian.shape == (in_, in_), "hessian.shape", hessian.shape, f"must be ({in_}, {in_})")
    finite = bool(np.isfinite(hessian).all())
    require(finite, "hessian", "NaN or infinity", "the layer's inputs must be finite")
    grid = _Grid(config, out, in_ // group)
    h, work = hessian.astype(np.float64), w.astype(np.float64)
    dead = np.diag(h) == 0
    # as large as the others, because their mean is the damping
    h[dead, dead] = h[~dead, ~dead].mean() if not dead.all() else 1.0
    work[:, dead] = 0
    static = config.static_groups or grid.double_quant
    if static:
        grid.fit(work.astype(np.float32).reshape(out, -1, group), slice(None))
    order = np.argsort(-np.diag(h), kind="stable") if config.desc_act else np.arange(in_)
    work, groups = work[:, order], order // group
    upper = inverse_factor(h[np.ix_(order, order)], config.damp_percent)
    codes, loss = np.empty((out, in_), np.uint8), 0.0
    step = UPDATE_COLUMNS if static else group
    for first in range(0, in_, step):
        last = min(first + step, in_)
        block = np.ascontiguousarray(work[:, first:last])
        if not static:
            grid.fit(block.astype(np.float32)[:, None], slice(first // group, first // group + 1))
        ranks, errors = grid.round_columns(block, upper[first:last, first:last], groups[first:last])
        codes[:, order[first:last]] = ranks
        work[:, last:] -= errors @ upper[first:last, last:]
        loss += float((errors**2).sum()) / 2
    return grid.weight(codes, (out, in_)), loss


def inverse_factor(hessian: Array, damp_percent: float) -> Array:
    """Return U (in, in), upper triangular with UᵀU = (H + λI)⁻¹, λ = damp_percent · mean(diag H).

    >>> inverse_factor(np.diag([4.0, 1.0]), 1e-9).round(3).tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    damped = hessian + damp_percent * np.diag(hessian).mean() * np.eye(len(hessian))
    try:
        inverse = np.linalg.inv(damped)
        return np.ascontiguousarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)
    except np.linalg.LinAlgError:
        raise ConfigError(
            f"damp_percent={damp_percent}: leaves a Hessian of {len(hessian)} inputs without an inverse; "
            "raise it or calibrate on more tokens"
        ) from None


class _Grid:
    """The values that codes stand for, fitted group by group or all at once.

    `scale` and `offset` (out, groups) are float32, what decoding will use.
    """

    def __init__(self, config: QuantConfig, out: int, groups: int):
        self.config = config
        self.scale, self.offset = np.ones((out, groups), np.float32), np.zeros((out, groups), np.float32)
        self.double_quant = not config.affine and config.double_quant
        if config.affine:
            self.levels, self.midpoints = levels_of(config.quant_type), np.empty(0, np.float32)
            self.stored_scale = np.empty((out, groups), np.float16)
            kept = np.uint8 if config.offset_dtype == "zero" else config.offset_dtype
            self.stored_offset = np.empty((out, groups), kept)
        else:
            values = codebooks.code_map(config.quant_type)
            self.midpoints, self.order = codebooks.thresholds(values)
            self.levels = values[self.order]
        self.absmax: Array | DoubleQuant = self.scale

    def fit(self, w: Array, where: slice) -> None:
        """Fit the groups `where` to w (out, groups, g) float32."""
        config = self.config
        out, groups, g = w.shape
        if config.affine:
            scale, offset = fits.fit_groups(w.reshape(-1, g), config.bits, config.fit, config.offset_dtype)
            self.stored_scale[:, where] = self.scale[:, where] = scale.reshape(out, groups)
            self.stored_offset[:, where] = offset.reshape(out, groups)
            self.offset[:, where] = fits.offset_of(offset, scale).reshape(out, groups)
        elif self.double_quant:
            self.absmax = DoubleQuant.quantize(frozen(np.abs(w).max(axis=2).reshape(-1), np.float32))
            self.scale[...] = self.absmax.decode(0, self.scale.size).reshape(self.scale.shape)
        else:
            self.scale[:, where] = np.abs(w).max(axis=2)

    def round_columns(self, w: Array, upper: Array, groups: Array) -> tuple[Array, Array]:
        """Return ranks and errors (out, n) of columns w (out, n) that belong to `groups` (n,)."""
        scale, offset = (np.take(a, groups, axis=1) for a in (self.scale, self.offset))
        return implementation("gptq_columns").round_columns(
            w, upper, scale, offset, self.levels, self.midpoints
        )

    def weight(self, codes: Array, shape: tuple[int, int]) -> CodebookWeight | AffineWeight:
        """Return the finished weight."""
        config = self.config
        if config.affine:
            flat, scale, offset = (
                packed(codes.reshape(-1), config.bits),
                self.stored_scale,
                self.stored_offset,
            )
            return AffineWeight.from_stored(flat, scale, offset, shape, config.bits, config.group_size)
        scales = self.absmax if isinstance(self.absmax, DoubleQuant) else self.scale.reshape(-1)
        flat = packed(self.order[codes].reshape(-1), config.bits)
        return CodebookWeight(flat, scales, shape, config.quant_type, config.block_size)
