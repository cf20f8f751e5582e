"""Axes → runs: what a sweep is asked for, and the list of what it will do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.config import ADAPTERS, CONTROLS, METHODS, QUANTIZED, require, require_in
from minilora.sweep.settings import RunConfig

ADAPTER_SETTINGS = ("lora_alpha", "lora_dropout", "use_rslora", "lora_plus_ratio", "use_dora")
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class SweepConfig:
    """Axes (tuples) whose every combination is one run, and settings that all runs share.

    An axis that does not matter to a method is not multiplied: `expand` says which. An empty
    ``learning_rate`` takes each method's own default. ``bits`` are those of quantized methods; ``lora``
    always stands on full precision. ``lora_alpha`` is the same at all ranks: then lora_alpha / r keeps the
    size of the first updates of ΔW, and with it the best learning rate, nearly independent of r.

    >>> len(expand(SweepConfig(method=("lora", "qlora"), r=(2, 8), bits=(2, 4), seed=(0,))))
    6
    """

    method: tuple[str, ...] = ("full", "lora", "qlora", "qalora", "base", "quantized_base")
    r: tuple[int, ...] = (8,)
    bits: tuple[int, ...] = (4,)
    group_size: tuple[int, ...] = (32,)
    target_modules: tuple[str, ...] = ("all-linear",)
    learning_rate: tuple[float, ...] = ()
    task: tuple[str, ...] = ("products",)
    seed: tuple[int, ...] = (0, 1)
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_plus_ratio: float = 1.0
    use_dora: bool = False
    quantizer: str = "rtn"
    subset_modules: str | None = None
    block_size: int = 64
    double_quant: bool = True
    steps: int | None = None
    batch_size: int | None = None
    n_train: int | None = None
    n_eval: int | None = None
    split: str = "test"
    write_all: bool = True
    text_path: str | None = None
    model: str = "tiny"
    data: str | None = None
    max_length: int = 512
    packing: bool = False
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    logits_chunk: int = 0
    optimizer: str = "adamw"
    preset: str = "custom"
    stage: str = "study"
    name: str = "sweep"
    out: str = "runs"

    def __post_init__(self) -> None:
        for axis in ("method", "r", "bits", "group_size", "target_modules", "task", "seed"):
            require(len(getattr(self, axis)) > 0, axis, getattr(self, axis), "give at least one value")
        for method in self.method:
            require_in(method, METHODS, "method")
        for bits in self.bits:
            require_in(bits, BITS, "bits")
        for r in self.r:
            require(r >= 1, "r", r, "must be at least 1")
        require_in(self.split, ("validation", "test"), "split")


def expand(config: SweepConfig) -> list[RunConfig]:
    """Return the runs of a sweep: the full factorial without axes that do not matter, each run once, the
    longest first.

    | method         | r, alpha, modules | bits        | learning rate | seed       |
    | full, subset   | no                | no (32)     | yes           | yes        |
    | lora           | yes               | no (32)     | yes           | yes        |
    | qlora          | yes               | NormalFloat | yes           | yes        |
    | qalora         | yes               | affine, by group size | yes | yes        |
    | base           | no                | no (32)     | no            | first only |
    | quantized_base | no                | both kinds, as far as their methods are in the sweep | no | first only |

    Every run is validated here, before any work starts.

    Raises
    ------
    ConfigError
        A value that `RunConfig` refuses.
    """
    runs: dict[str, RunConfig] = {}
    for task, method in itertools.product(config.task, config.method):
        for settings in _settings(config, method):
            run = _run_config(config, task=task, method=method, **settings)
            runs.setdefault(run.key(), run)
    # Longest first keeps both cores busy to the end; controls do not train and come last. The sort is stable.
    return sorted(runs.values(), key=lambda run: run.method in CONTROLS)


def _settings(config: SweepConfig, method: str) -> Iterator[dict[str, Any]]:
    """Yield the axes that matter to a method; what is left out keeps `RunConfig`'s default, so that equal
    runs are equal."""
    trains = method not in CONTROLS
    adapters: list[dict[str, Any]] = [{}]
    if method in ADAPTERS:
        adapters = [
            {"r": r, "target_modules": modules, **{name: getattr(config, name) for name in ADAPTER_SETTINGS}}
            for r, modules in itertools.product(config.r, config.target_modules)
        ]
    rates: list[dict[str, Any]] = [{"learning_rate": rate} for rate in config.learning_rate] if trains else []
    seeds = config.seed if trains else config.seed[:1]
    for adapter, weights, rate, seed in itertools.product(
        adapters, _weights(config, method), rates or [{}], seeds
    ):
        yield {**adapter, **weights, **rate, "seed": seed}


def _weights(config: SweepConfig, method: str) -> list[dict[str, Any]]:
    """Return the ways in which a method stores the frozen base."""
    codebook = [
        {
            "bits": bits,
            "quant_type": f"nf{bits}",
            "block_size": config.block_size,
            "double_quant": config.double_quant,
            "quantizer": config.quantizer,
        }
        for bits in config.bits
    ]
    affine = [
        {"bits": bits, "quant_type": f"int{bits}", "group_size": group_size, "quantizer": config.quantizer}
        for bits, group_size in itertools.product(config.bits, config.group_size)
    ]
    if method == "quantized_base":  # the control of each method that stands on a quantized base
        nearest = [weights | {"quantizer": "rtn"} for weights in codebook]  # as QLoRA's own base is
        kinds = [nearest] * ("qlora" in config.method) + [affine] * ("qalora" in config.method)
        return [weights for kind in kinds or [codebook, affine] for weights in kind]
    return {"qlora": codebook, "qalora": affine}.get(method, [{"bits": 32}])


def _run_config(config: SweepConfig, **settings: Any) -> RunConfig:
    shared = ["steps", "batch_size", "n_train", "n_eval", "split", "write_all", "preset", "stage"]
    shared += [
        "model",
        "max_length",
        "packing",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "logits_chunk",
        "optimizer",
    ]
    shared += ["text_path"] * (settings["task"] == "text") + ["data"]
    shared += ["subset_modules"] * (settings["method"] == "subset")
    given = {name: getattr(config, name) for name in shared if getattr(config, name) is not None}
    return RunConfig(**given, **settings)


def describe(config: Any) -> str:
    """Return one run in a few words, for progress lines: method, weights, rank, learning rate, task, seed."""
    parts = [config.method]
    if config.method in QUANTIZED:
        parts.append(str(config.quant_type))
    if config.method in ADAPTERS:
        parts.append(f"r={config.r}")
    if config.method not in CONTROLS:
        rate = config.learning_rate
        parts += ([] if rate is None else [f"lr={rate:g}"]) + [f"seed={config.seed}"]
    return " ".join([*parts, config.task])


def outline(configs: Sequence[Any], n_jobs: int = 1, seconds_per_run: float | None = None) -> str:
    """Return what a sweep will do, one line a method: the number of runs, the axes, and the time if it is
    known."""
    lines = [f"{len(configs)} runs in {n_jobs} process{'es' if n_jobs > 1 else ''}"]
    if seconds_per_run:
        lines[0] += f", about {max(1, round(len(configs) * seconds_per_run / n_jobs / 60))} minutes"
    for method in (method for method in METHODS if any(config.method == method for config in configs)):
        mine = [config for config in configs if config.method == method]
        axes = [("tasks", "task")]
        axes += [("r", "r")] * (method in ADAPTERS) + [("weights", "quant_type")] * (method in QUANTIZED)
        axes += [("learning rates", "learning_rate"), ("seeds", "seed")] * (method not in CONTROLS)
        parts = [
            f"{label} {', '.join(map(str, values))}"
            for label, values in ((label, _distinct(mine, name)) for label, name in axes)
            if values
        ]
        lines.append(f"  {len(mine):3d} {method:<14} {' · '.join(parts)}")
    return "\n".join(lines)


def _distinct(configs: Sequence[Any], name: str) -> list[Any]:
    return sorted({value for config in configs if (value := getattr(config, name)) is not None})
