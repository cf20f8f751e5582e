"""Rank made visible: the spectrum of an update, and how far the subspaces of two adapters coincide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from minilora.report.drawing import new_figure
from minilora.report.labels import GREY, PALETTE, task_of
from minilora.sweep.results import ResultsError, successful
from minilora.threads import single_blas

Matrix = NDArray[np.floating[Any]]


def _matrix(value: ArrayLike, name: str) -> Matrix:
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{name}: shape {matrix.shape} is not a matrix; pass a 2-D array with at least one element"
        )
    if not np.isfinite(matrix).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(matrix))[0])
        raise ValueError(
            f"{name}{list(index)}: {matrix[index]} is not finite; a singular value decomposition needs "
            "finite numbers"
        )
    return matrix


def effective_rank(singular_values: ArrayLike) -> float:
    """Return the effective rank exp(-Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ.

    It is n for n equal singular values, 1 when one dominates, and 0 for the zero matrix.

    References
    ----------
    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007.

    Examples
    --------
    >>> round(effective_rank([2.0, 2.0, 2.0, 0.0]), 6)
    3.0
    """
    values = np.asarray(singular_values, dtype=np.float64)
    total = values.sum()
    if total == 0:
        return 0.0
    return float(np.exp(entr(values / total).sum()))


@single_blas()
def spectrum(delta_w: ArrayLike) -> tuple[Matrix, float]:
    """Return the singular values of ΔW, greatest first, and their `effective_rank`.

    Parameters
    ----------
    delta_w
        The update of one weight, (out, in): after - before for full fine-tuning, scaling · B A for an
        adapter.

    Examples
    --------
    >>> values, rank = spectrum(np.diag([3.0, 3.0, 0.0]))
    >>> values.tolist(), round(rank, 6)
    ([3.0, 3.0, 0.0], 2.0)
    """
    values = np.linalg.svd(_matrix(delta_w, "delta_w"), compute_uv=False)
    return values, effective_rank(values)


@single_blas()
def subspace_similarity(a1: ArrayLike, a2: ArrayLike) -> Matrix:
    """Return φ, (r1, r2): which share of the smaller subspace lies in the other, from 0 to 1.

    φ(i, j) = ‖V₁ᵢᵀ V₂ⱼ‖²_F / min(i, j), where V₁ᵢ holds the first i right-singular vectors of `a1`, and V₂ⱼ
    the first j of `a2`. 0 is orthogonal, 1 is contained. Element [i-1, j-1] is φ(i, j).

    Parameters
    ----------
    a1, a2
        The A of two adapters of one module, (r1, in) and (r2, in).

    Raises
    ------
    ValueError
        The inputs differ in width, or a row count exceeds it.

    References
    ----------
    LoRA, arXiv 2106.09685, section 7.2, equation 4, which calls the singular vectors U.

    Examples
    --------
    >>> subspace_similarity([[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]).tolist()
    [[0.0, 1.0]]
    """
    first, second = _matrix(a1, "a1"), _matrix(a2, "a2")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"a2: width {second.shape[1]} differs from a1's {first.shape[1]}; compare adapters of the same "
            "module"
        )
    for name, a in (("a1", first), ("a2", second)):
        if a.shape[0] > a.shape[1]:
            raise ValueError(
                f"{name}: shape {a.shape} has more rows than columns; pass A as (r, in), not its transpose"
            )
    v1 = np.linalg.svd(first, full_matrices=False)[2]  # (r1, in)
    v2 = np.linalg.svd(second, full_matrices=False)[2]  # (r2, in)
    overlap = (v1 @ v2.T) ** 2  # (r1, r2)
    cumulative = overlap.cumsum(axis=0).cumsum(axis=1)  # ‖V₁ᵢᵀ V₂ⱼ‖²_F for all i, j at once
    i, j = np.ogrid[1 : len(v1) + 1, 1 : len(v2) + 1]
    return cumulative / np.minimum(i, j)


def random_subspace_similarity(
    r1: int, r2: int, width: int, rng: np.random.Generator, repeats: int = 20
) -> Matrix:
    """Return the mean φ of two independent Gaussian matrices, (r1, r2): the similarity that chance gives.

    Its expectation is max(i, j) / width, the share of the space that the larger subspace fills.

    >>> phi = random_subspace_similarity(2, 4, 64, np.random.default_rng(0), repeats=200)
    >>> bool(abs(phi[1, 3] - 4 / 64) < 0.01)
    True
    """
    draws = [
        subspace_similarity(rng.standard_normal((r1, width)), rng.standard_normal((r2, width)))
        for _ in range(repeats)
    ]
    return np.mean(draws, axis=0)


def plot_spectra(updates: Mapping[str, ArrayLike], ax: Axes | None = None) -> Axes:
    """Draw the singular values of several updates of one weight; the legend gives each effective rank.

    Parameters
    ----------
    updates
        Label → ΔW, for example `{"full": dw, "LoRA r=8": scaling * b @ a}`. Singular values below the float32
        rounding of the largest are left out: they are noise.
    """
    ax = ax or new_figure().add_subplot()
    for number, (label, delta_w) in enumerate(updates.items()):
        values, rank = spectrum(delta_w)
        values = values[values > values[0] * np.finfo(np.float32).eps * max(np.shape(delta_w))]
        style: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "marker": "os^Dv<>"[number % 7]}
        ax.plot(
            np.arange(1, len(values) + 1),
            values,
            markersize=4 if len(values) <= 32 else 2.2,
            label=f"{label} (effective rank {rank:.1f})",
            **style,
        )
    ax.set(yscale="log", xlabel="index of the singular value", ylabel="singular value of ΔW")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return ax


def plot_similarity(
    phi: ArrayLike, ax: Axes | None = None, labels: tuple[str, str] = ("i", "j"), title: str = ""
) -> Axes:
    """Draw φ(i, j) as a heat map on a fixed scale from 0 to 1, with its value in the corners."""
    ax = ax or new_figure().add_subplot()
    values = _matrix(phi, "phi")
    rows, columns = values.shape
    ax.imshow(
        values,
        vmin=0,
        vmax=1,
        cmap="cividis",
        origin="lower",
        aspect="auto",
        extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
    )
    for i, j in {(1, 1), (rows, columns), (1, columns), (rows, 1)}:
        value = values[i - 1, j - 1]
        x, ha = _inside(j, columns, "left", "right")
        y, va = _inside(i, rows, "bottom", "top")
        colour = "black" if value > 0.6 else "white"
        ax.text(x, y, f"{value:.2f}", fontsize=8, color=colour, ha=ha, va=va)
    for axis, count in ((ax.xaxis, columns), (ax.yaxis, rows)):
        axis.set_ticks(
            sorted({1, *(2**k for k in range(1, 8) if 2**k * 8 >= count and 2**k <= count), count})
        )
    ax.set(xlabel=labels[1], ylabel=labels[0])
    ax.set_title(title, fontsize=9)
    return ax


def _inside(index: int, count: int, first: str, last: str) -> tuple[float, str]:
    """Return position and alignment of a text that stays inside the heat map, near a cell of one axis."""
    if count == 1:
        return index, "center"
    if index == 1:
        return 0.5 + 0.02 * count, first
    return count + 0.5 - 0.02 * count, last


def plot_rank(
    updates: Mapping[str, ArrayLike],
    two_ranks: tuple[ArrayLike, ArrayLike],
    two_seeds: tuple[ArrayLike, ArrayLike],
    rng: np.random.Generator,
    names: tuple[str, str, str, str] = ("smaller rank", "larger rank", "seed 0", "seed 1"),
) -> Figure:
    """Draw spectra of ΔW, and φ between two ranks, between two seeds and by chance.

    Parameters
    ----------
    updates
        Label → ΔW, see `plot_spectra`.
    two_ranks, two_seeds
        The A, (r, in), of two runs that differ in rank, and of two that differ in seed. The random control
        has the shapes of the latter.
    names
        What to call those four runs on the axes.
    """
    figure = new_figure(width=11.0, height=7.0)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.25, 1))
    plot_spectra(updates, figure.add_subplot(grid[0, :])).set_title("Spectrum of the update", fontsize=10)
    first, second = (_matrix(a, "two_seeds") for a in two_seeds)
    chance = random_subspace_similarity(len(first), len(second), first.shape[1], rng)
    similarity = [
        (subspace_similarity(*two_ranks), names[:2], "between two ranks"),
        (subspace_similarity(*two_seeds), names[2:], "between two seeds"),
        (chance, ("random", "random"), "between random matrices (control)"),
    ]
    panels = []
    for column, (phi, labels, title) in enumerate(similarity):
        panels.append(figure.add_subplot(grid[1, column]))
        axes = (f"i first directions, {labels[0]}", f"j first directions, {labels[1]}")
        plot_similarity(phi, panels[-1], axes, f"φ(i, j) {title}")
    bar = figure.colorbar(panels[-1].images[0], ax=panels, shrink=0.9, pad=0.01)
    bar.set_label("φ: 0 orthogonal, 1 contained")
    return figure


def learned(folder: str | Path, module: str) -> tuple[Matrix, Matrix | None]:
    """Return what a run learned for one module: ΔW, (out, in), and the adapter's A, (r, in/g), or None.

    Parameters
    ----------
    folder
        The folder of one run, such as `runs/<key>` in the folder of a sweep.
    module
        A module's name or the end of it, such as `layers.3.self_attn.q_proj`.

    Raises
    ------
    ValueError
        The folder is no run, or the name fits no module or more than one.
    """
    from minilora.config import matches
    from minilora.formats.checkpoint import load_base
    from minilora.lora import LoraLinear
    from minilora.sweep.saved_runs import load_run

    model = load_run(folder)[1]
    found = [(name, linear) for name, linear in model.linears() if matches(name, module)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in (found or model.linears()))
        raise ValueError(f"module={module!r}: fits {len(found)} modules; name one of {names}")
    name, linear = found[0]
    if isinstance(linear, LoraLinear):
        return linear.delta(), linear.lora_A.data.astype(np.float64)
    base = dict(load_base().linears())[name]
    return linear.weight.dense().astype(np.float64) - base.weight.dense(), None


def plot_rank_of_runs(
    rows: Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    task: str | None = None,
    module: str = "layers.3.self_attn.q_proj",
    seed: int = 0,
) -> Figure:
    """Draw `plot_rank` from the rows of a sweep and the runs that it kept in `out`.

    The spectra are those of full fine-tuning and of LoRA at up to four ranks. The similarities are those
    between the middle and the greatest rank, and between two seeds of the greatest rank.

    Raises
    ------
    ResultsError
        There are not two ranks and two seeds of LoRA, or their folders are gone.
    """
    rows = successful(rows)
    task = task_of(rows, task)
    runs: dict[tuple[int | None, int], Path] = {}
    for row in rows:
        folder = Path(out) / "runs" / row["key"]
        if row["task"] == task and row["method"] in ("full", "lora") and folder.is_dir():
            runs.setdefault((row["r"] if row["method"] == "lora" else None, row["seed"]), folder)
    ranks = sorted(r for r, s in runs if r is not None and s == seed)
    others = sorted(s for r, s in runs if ranks and r == ranks[-1] and s != seed)
    if len(ranks) < 2 or not others:
        raise ResultsError(
            f"task {task!r} needs LoRA at two ranks and with two seeds, and the files that those runs kept"
        )
    # of 1, 2, 8, 64 the pair of the LoRA paper: 8 and 64
    middle = ranks[len(ranks) // 2] if len(ranks) > 2 else ranks[0]
    shown = sorted({ranks[round(k * (len(ranks) - 1) / 3)] for k in range(4)})
    updates = {"full fine-tuning": learned(runs[None, seed], module)[0]} if (None, seed) in runs else {}
    updates |= {f"LoRA r={r}": learned(runs[r, seed], module)[0] for r in shown}
    places = ((middle, seed), (ranks[-1], seed), (ranks[-1], others[0]))
    low, high, again = (cast(Matrix, learned(runs[place], module)[1]) for place in places)
    names = (f"r = {middle}", f"r = {ranks[-1]}", f"seed {seed}", f"seed {others[0]}")
    figure = plot_rank(updates, (low, high), (high, again), np.random.default_rng(0), names)
    figure.suptitle(f"{task}, {module}", fontsize=10)
    return figure
