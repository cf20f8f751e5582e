"""Axes → runs: what a sweep is asked for, and the list of what it will do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from minilora.composed import flatten, setting_named, settings_in
from minilora.config import (
    ADAPTERS,
    AFFINE_TYPES,
    CODEBOOK_TYPES,
    CONTROLS,
    METHODS,
    QUANTIZED,
    QuantConfig,
    require,
    require_in,
)
from minilora.sweep.settings import RunConfig, quant_family, reads

BITS = (2, 3, 4, 8)
FAMILIES = {"nf": CODEBOOK_TYPES, "int": AFFINE_TYPES}
"""How the types of a method's own kind begin, and all types of that kind."""
Axes = Mapping[str, tuple[Any, ...]]


class Run(Protocol):
    """What `run_sweep` needs to know of a run: its fingerprint, and its settings as columns of a row."""

    def key(self) -> str:
        """Return what tells this run from all others, fit for a folder's name."""

    def row(self) -> Mapping[str, Any]:
        """Return the settings as columns."""


@dataclass(frozen=True)
class SweepConfig:
    """Axes whose every combination is one run, over settings that all runs share.

    Parameters
    ----------
    axes
        Setting → its values. A setting is called by its flat name (`r`) or its path (`lora.r`), and `bits`
        stands for the quant_type of each method's own kind. A single value is a setting that all runs share.
    base
        The run whose settings hold where no axis says otherwise.

    Notes
    -----
    An axis that does not matter to a method is not multiplied: `expand` says which. `lora_alpha` is the same
    at all ranks unless it is an axis. Then α / r keeps the size of the first updates of ΔW, and with it the
    best learning rate, nearly independent of r.

    Examples
    --------
    >>> axes = {"method": ("lora", "qlora"), "r": (2, 8), "bits": (2, 4), "steps": 50}
    >>> [(run.method, run.lora.r) for run in expand(SweepConfig(axes))]
    [('lora', 2), ('lora', 8), ('qlora', 2), ('qlora', 2), ('qlora', 8), ('qlora', 8)]
    >>> base = RunConfig(method="qalora", quant=QuantConfig("int4", group_size=16))
    >>> [run.storage().quant_type for run in expand(SweepConfig({"bits": (2, 3)}, base))]
    ['int2', 'int3']
    """

    axes: Mapping[str, Any] = field(default_factory=dict)
    base: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        axes: dict[str, tuple[Any, ...]] = {}
        for name, given in self.axes.items():
            values = tuple(given) if isinstance(given, (list, tuple, range)) else (given,)
            short = name.rpartition(".")[2]
            if name not in ("bits", "quant.bits"):
                setting_named(RunConfig, name, given)
            require(len(values) > 0, name, given, "give at least one value")
            require(short not in axes, name, given, "is given twice, by name and by path")
            axes[short] = values
        for method in axes.get("method", ()):
            require_in(method, METHODS, "method")
        for bits in axes.get("bits", ()):
            require_in(bits, BITS, "bits")
        require(
            not {"bits", "quant_type"} <= axes.keys(),
            "bits",
            axes.get("bits"),
            "quant_type says it; give one",
        )
        object.__setattr__(self, "axes", axes)

    def all_axes(self) -> Axes:
        """Return the axes and, as axes of one value, what the base run sets."""
        own = flatten(self.base)
        shared = {
            name: (own[name],)
            for name, setting in settings_in(RunConfig).items()
            if own[name] not in (None, setting.default) and name != "quant_type"
        }
        return {"method": (self.base.method,)} | shared | dict(self.axes)


def expand(config: SweepConfig) -> list[RunConfig]:
    """Return the runs of a sweep, each once, controls last.

    It is the full factorial without the axes that do not matter to a method:

    | method         | r, alpha, modules | bits                  | learning rate | seed       |
    |----------------|-------------------|-----------------------|---------------|------------|
    | full, subset   | no                | no (32)               | yes           | yes        |
    | lora           | yes               | no (32)               | yes           | yes        |
    | qlora          | yes               | NormalFloat           | yes           | yes        |
    | qalora         | yes               | integers, group sizes | yes           | yes        |
    | base           | no                | no (32)               | no            | first only |
    | quantized_base | no                | kinds of the sweep    | no            | first only |

    The kinds of quantized_base are those of qlora and qalora, as far as they are in the sweep, else both.

    Parameters
    ----------
    config
        The sweep.

    Returns
    -------
    list of RunConfig
        Every run is validated here, before any work starts.

    Raises
    ------
    ConfigError
        A value that `RunConfig` refuses.
    """
    runs: dict[str, RunConfig] = {}
    axes = config.all_axes()
    for shared in _combinations(_axes_of(axes, "", "data")):
        for method in axes["method"]:
            if shared.get("task", "products") != "text":
                shared.pop("text_path", None)
            adapters = _combinations(_axes_of(axes, "lora")) if method in ADAPTERS else [{}]
            weights = _weights(config, method, axes) if method in QUANTIZED else [{}]
            training = list(_combinations(_training_axes(axes, method)))
            for settings in itertools.product(adapters, weights, training):
                own = {name: value for part in settings for name, value in part.items()}
                run = RunConfig.of(method=method, **shared, **own)
                runs.setdefault(run.key(), run)
    # Controls do not train. Last, they leave no core idle behind a long run. The sort is stable.
    return sorted(runs.values(), key=lambda run: run.method in CONTROLS)


def _part_of(name: str) -> str:
    """Return the part of a run that holds a setting, or nothing for the run's own."""
    return "quant" if name == "bits" else settings_in(RunConfig)[name].path.rpartition(".")[0]


def _axes_of(axes: Axes, *parts: str) -> Axes:
    """Return the axes of some parts in the order of their fields; the last varies fastest."""
    order = list(settings_in(RunConfig))
    names = [
        name for name in axes if _part_of(name) in parts and name not in ("method", "bits", "quant_type")
    ]
    return {name: axes[name] for name in sorted(names, key=order.index)}


def _combinations(axes: Axes) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _training_axes(axes: Axes, method: str) -> Axes:
    """Return the axes of training that matter to a method; a control takes the first value of each."""
    own = dict(_axes_of(axes, "train"))
    if method not in ADAPTERS:
        own = {name: values for name, values in own.items() if settings_in(RunConfig)[name].used_by is None}
    if method in CONTROLS:
        own = {name: values[:1] for name, values in own.items() if name != "learning_rate"}
    return own


def _weights(config: SweepConfig, method: str, axes: Axes) -> list[dict[str, Any]]:
    """Return the ways in which a method stores its base, each once."""
    known, found = settings_in(RunConfig), []
    control_of_qlora = method == "quantized_base" and "qlora" in axes["method"]
    for quant_type in _quant_types(config, method):
        for chosen in _combinations(_axes_of(axes, "quant")):
            if control_of_qlora and quant_type not in AFFINE_TYPES:
                chosen["quantizer"] = "rtn"  # as QLoRA's own base is
            plain = QuantConfig(quant_type, quantizer=chosen.get("quantizer", "rtn"))
            settings = {name: value for name, value in chosen.items() if reads(plain, known[name].used_by)}
            if (one := {"quant_type": quant_type} | settings) not in found:
                found.append(one)
    return found


def _quant_types(config: SweepConfig, method: str) -> list[str]:
    """Return the types of a method's base: those of the axes, or the base run's, or 4 bits."""
    families = [quant_family(method)]
    if method == "quantized_base":  # the control of each method over a quantized base
        methods = config.axes.get("method", (config.base.method,))
        families = [quant_family(other) for other in ("qlora", "qalora") if other in methods] or ["nf", "int"]
    if (given := config.axes.get("quant_type")) is not None:
        allowed = [kind for family in families for kind in FAMILIES[family]]
        types = [kind for kind in given if kind in allowed]
        stores = f"method {method!r} stores {', '.join(allowed)}; add one of them"
        require(len(types) > 0, "quant_type", given, stores)
        return types
    quant = config.base.quant
    if (widths := config.axes.get("bits")) is None and quant is not None:
        return [quant.quant_type if quant.quant_type in FAMILIES[f] else f"{f}{quant.bits}" for f in families]
    return [f"{family}{bits}" for family in families for bits in widths or (4,)]


def describe(config: Run) -> str:
    """Return one run in a few words, for progress lines: method, weights, rank, learning rate, task, seed."""
    row = config.row()
    method = row["method"]
    parts = [method]
    if method in QUANTIZED:
        parts.append(str(row["quant_type"]))
    if method in ADAPTERS:
        parts.append(f"r={row['r']}")
    if method not in CONTROLS:
        if row["learning_rate"] is not None:
            parts.append(f"lr={row['learning_rate']:g}")
        parts.append(f"seed={row['seed']}")
    return " ".join([*parts, row["task"]])


def outline(configs: Sequence[Run], n_jobs: int = 1, seconds_per_run: float | None = None) -> str:
    """Return what a sweep will do, one line per method: number of runs, axes, and the time if it is known."""
    head = f"{len(configs)} runs in {n_jobs} process{'es' if n_jobs > 1 else ''}"
    if seconds_per_run:
        head += f", about {max(1, round(len(configs) * seconds_per_run / n_jobs / 60))} minutes"
    rows = [config.row() for config in configs]
    lines = [head]
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        axes = {"tasks": "task"}
        if method in ADAPTERS:
            axes["r"] = "r"
        if method in QUANTIZED:
            axes["weights"] = "quant_type"
        if method not in CONTROLS:
            axes |= {"learning rates": "learning_rate", "seeds": "seed"}
        parts = []
        for label, name in axes.items():
            if values := sorted({row[name] for row in mine if row.get(name) is not None}):
                parts.append(f"{label} {', '.join(map(str, values))}")
        lines.append(f"  {len(mine):3d} {method:<14} {' · '.join(parts)}")
    return "\n".join(lines)
