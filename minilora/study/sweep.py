"""The sweep: expand axes into runs, run them in independent processes, keep every finished row."""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from minilora.config import require, require_in
from minilora.formats.files import writable_folder, write_file
from minilora.study.results import (
    ADAPTERS,
    CONTROLS,
    METHODS,
    QUANTIZED,
    Row,
    append_row,
    clean_row,
    load_results,
    repair_results,
    write_csv,
)
from minilora.study.workers import RunFunction, in_executor, in_process, run_folder

if TYPE_CHECKING:
    from minilora.study.settings import RunConfig

__all__ = ["SweepConfig", "describe", "expand", "load_results", "outline", "run_sweep", "write_csv"]

ADAPTER_SETTINGS = ("lora_alpha", "lora_dropout", "use_rslora", "lora_plus_ratio", "use_dora")
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class SweepConfig:
    """Axes (tuples) whose every combination is one run, and settings that all runs share.

    An axis that does not matter to a method is not multiplied: `expand` says which. An empty ``learning_rate`` takes each
    method's own default. ``bits`` are those of quantized methods; ``lora`` always stands on full precision. ``lora_alpha`` is
    the same at all ranks: then lora_alpha / r keeps the size of the first updates of ΔW, and with it the best learning rate,
    nearly independent of r.

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
    """Return the runs of a sweep: the full factorial without axes that do not matter, each run once, the longest first.

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
    """Yield the axes that matter to a method; what is left out keeps `RunConfig`'s default, so that equal runs are equal."""
    trains = method not in CONTROLS
    adapters: list[dict[str, Any]] = [{}]
    if method in ADAPTERS:
        adapters = [
            {"r": r, "target_modules": modules, **{name: getattr(config, name) for name in ADAPTER_SETTINGS}}
            for r, modules in itertools.product(config.r, config.target_modules)
        ]
    rates: list[dict[str, Any]] = [{"learning_rate": rate} for rate in config.learning_rate] if trains else []
    seeds = config.seed if trains else config.seed[:1]
    for adapter, weights, rate, seed in itertools.product(adapters, _weights(config, method), rates or [{}], seeds):
        yield {**adapter, **weights, **rate, "seed": seed}


def _weights(config: SweepConfig, method: str) -> list[dict[str, Any]]:
    """Return the ways in which a method stores the frozen base."""
    codebook = [
        {"bits": bits, "quant_type": f"nf{bits}", "block_size": config.block_size, "double_quant": config.double_quant,
         "quantizer": config.quantizer}  # fmt: skip
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
    from minilora.study.settings import RunConfig

    shared = ["steps", "batch_size", "n_train", "n_eval", "split", "write_all", "preset", "stage"]
    shared += ["model", "max_length", "packing", "gradient_accumulation_steps", "gradient_checkpointing", "logits_chunk",
               "optimizer"]
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
    """Return what a sweep will do, one line a method: the number of runs, the axes, and the time if it is known."""
    lines = [f"{len(configs)} runs in {n_jobs} process{'es' if n_jobs > 1 else ''}"]
    if seconds_per_run:
        lines[0] += f", about {max(1, round(len(configs) * seconds_per_run / n_jobs / 60))} minutes"
    for method in (method for method in METHODS if any(config.method == method for config in configs)):
        mine = [config for config in configs if config.method == method]
        axes = [("tasks", "task")]
        axes += [("r", "r")] * (method in ADAPTERS) + [("weights", "quant_type")] * (method in QUANTIZED)
        axes += [("learning rates", "learning_rate"), ("seeds", "seed")] * (method not in CONTROLS)
        parts = [f"{label} {', '.join(map(str, values))}" for label, values in
                 ((label, _distinct(mine, name)) for label, name in axes) if values]  # fmt: skip
        lines.append(f"  {len(mine):3d} {method:<14} {' · '.join(parts)}")
    return "\n".join(lines)


def _distinct(configs: Sequence[Any], name: str) -> list[Any]:
    return sorted({value for config in configs if (value := getattr(config, name)) is not None})


def run_sweep(
    configs: Sequence[Any],
    out: str | Path,
    *,
    run: RunFunction | None = None,
    executor: Executor | None = None,
    n_jobs: int = 1,
    progress: bool = True,
    retry_failed: bool = False,
) -> list[Row]:
    """Do the runs that ``out/results.jsonl`` does not have yet and return the rows of all, in the order of ``configs``.

    Parameters
    ----------
    configs
        Runs with ``key()``, as `expand` returns them.
    out
        Folder; each run may keep files in ``out/runs/<key>``, and the traceback of a failed one is ``error.txt`` there.
    run
        ``run(config, folder) -> row``, importable at top level. The default is `minilora.study.run.run`.
    executor
        Any ``concurrent.futures.Executor``; it is never shut down. Without one, ``n_jobs=1`` runs in this process and more
        in that many fresh processes with one BLAS and one Numba thread each.
    retry_failed
        Run again what failed before; else its failed row stands.

    A run that raises, or whose process dies, becomes a row with status ``failed`` and the sweep goes on. Only this process
    writes. On Ctrl-C what is running is dropped, finished rows stay and `KeyboardInterrupt` goes on to the caller.

    Raises
    ------
    ValueError
        The folder cannot be written, or its results file is foreign; before any work.
    """
    checked = run is None
    run = run or _default_run()
    require(n_jobs >= 1, "n_jobs", n_jobs, "must be at least 1")
    out = Path(out)
    writable_folder(out)
    path = out / "results.jsonl"
    done = {row["key"]: row for row in repair_results(path)}
    if retry_failed:
        done = {key: row for key, row in done.items() if row["status"] == "success"}
    if checked and done:
        from minilora.study.run import check_kept

        check_kept(list(done.values()))
    wanted = {config.key(): config for config in configs}
    todo = [config for key, config in wanted.items() if key not in done]
    with _Progress(total=len(todo), kept=len(wanted) - len(todo), show=progress) as report:
        here = not todo or (executor is None and n_jobs == 1)
        results = in_process(run, todo, out) if here else in_executor(run, todo, out, executor, n_jobs)
        try:
            with closing(results):
                for config, outcome in results:
                    row = _row(config, outcome, out)
                    append_row(path, row)
                    done[row["key"]] = row
                    report.update(config, row)
        except KeyboardInterrupt:
            text = f"interrupted: {len(done)} finished rows are in {path}; run the same command again to continue"
            report.say(text, always=True)
            raise
    return [done[key] for key in wanted]


def _default_run() -> RunFunction:
    from minilora.study.run import run

    return run


def _row(config: Any, outcome: Mapping[str, Any] | BaseException, out: Path) -> Row:
    """Return the row of a run's outcome; a failure keeps the configuration, and its traceback goes beside the results."""
    about = {field.name: getattr(config, field.name) for field in fields(config)}
    if not isinstance(outcome, BaseException):
        try:
            return clean_row(about | {"status": "success"} | dict(outcome) | {"key": config.key()})
        except TypeError as error:
            outcome = error
    message = f"{type(outcome).__name__}: {' '.join(str(outcome).split())}"
    folder = Path(run_folder(out, config))
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "error.txt", "".join(traceback.format_exception(outcome)))
    return clean_row(about | {"key": config.key(), "status": "failed", "error": message})


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # imported is not enough: it must be running this code
    return ipython is not None and ipython.get_ipython() is not None


class _Progress:
    """A bar with ETA on a terminal or in a notebook, one line a run elsewhere, nothing with ``show=False``."""

    def __init__(self, total: int, kept: int, show: bool) -> None:
        self.total, self.done, self.show, self.started = total, 0, show, time.perf_counter()
        self.bar = tqdm(total=total, unit="run", desc="sweep", disable=not (show and (_in_notebook() or sys.stderr.isatty())))
        if kept:
            self.say(f"{kept} runs are done already, {total} to do")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def say(self, text: str, always: bool = False) -> None:
        if self.show or always:
            tqdm.write(text, file=sys.stderr)

    def update(self, config: Any, row: Row) -> None:
        self.done += 1
        loss = row.get("loss")
        result = "failed" if row["status"] == "failed" else f"loss {loss:.3f}" if loss is not None else "done"
        self.bar.set_postfix_str(f"{describe(config)}: {result}", refresh=False)
        self.bar.update()
        if row["status"] == "failed":
            self.say(f"failed: {describe(config)}: {row['error']}")
        if self.bar.disable:
            elapsed = time.perf_counter() - self.started
            left = elapsed / self.done * (self.total - self.done)
            self.say(f"[{self.done}/{self.total}] {describe(config)}: {result}; {elapsed:.0f} s so far, about {left:.0f} s to go")
