"""The command line: train · sweep · plot · generate · merge · pretrain · info."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from minilora.config import ConfigError, require_in
from minilora.formats.files import read_json, writable_folder, write_file
from minilora.study.settings import RunConfig
from minilora.study.sweep import SweepConfig
from minilora.training.pretrain import PretrainConfig

EXAMPLES = {
    "train": "minilora train --method qlora --bits 4 --r 8 --steps 100 --out runs/first",
    "sweep": "minilora sweep --method lora qlora --r 1 8 --bits 4 2 --seed 0 --steps 50 --name small",
    "plot": "minilora sweep --method lora base --r 2 --seed 0 --steps 5 --n-eval 20 --name mine && minilora plot runs/mine",
    "generate": "minilora generate --prompt 'lamp card. style is modern. trim is teal.' --max-new-tokens 60",
    "merge": "minilora train --method qalora --steps 20 --n-eval 20 --out runs/qa && minilora merge --run runs/qa",
    "pretrain": "minilora pretrain --steps 20 --out runs/base",
    "info": "minilora info",
}


@dataclass(frozen=True)
class Train:
    """Fine-tune the tiny base with one method and measure it; an interrupted run continues when the command is repeated."""

    config: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    out: str = "runs/train"  # folder for the adapter (or model), its configuration and the checkpoint
    threads: int | None = None  # changes the speed, never the result; default: all cores
    checkpoint_every: int = 50  # steps between checkpoints; 0 for none


@dataclass(frozen=True)
class Sweep:
    """Run a grid of methods, ranks, bit-widths and seeds; rerunning continues where it stopped.

    Without axes it is a demonstration of a few minutes. ``--preset full`` is the study. Naming any axis (--method, --r, --bits,
    --group-size, --target-modules, --learning-rate, --task, --seed, --split, --text-path) makes a grid
    of your own.
    """

    config: tyro.conf.OmitArgPrefixes[SweepConfig] = field(default_factory=SweepConfig)
    n_jobs: int | None = None  # processes of one thread each; default: one a core
    retry_failed: bool = False  # run again what failed before
    quiet: bool = False  # no progress


@dataclass(frozen=True)
class Plot:
    """Draw the figures and write the report of a finished sweep again from its results.jsonl."""

    folder: Annotated[str, tyro.conf.Positional]  # the sweep's folder


@dataclass(frozen=True)
class Generate:
    """Continue a text with the tiny base or with a trained run."""

    prompt: str | None = None  # text to continue
    task_prompts: int = 0  # instead: this many held-out prompts of the run's task
    run: str | None = None  # a folder that `minilora train` wrote; without it the base
    max_new_tokens: int = 120
    temperature: float = 0.0  # 0 takes the likeliest byte
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Merge:
    """Merge a trained adapter into its base, and say what that costs."""

    run: str  # a folder that `minilora train` wrote
    how: Literal["auto", "dense", "requantize", "offsets"] = "auto"  # auto: offsets for QA-LoRA, else dense
    out: str | None = None  # file to write; default: merged.safetensors in the run's folder


@dataclass(frozen=True)
class Info:
    """Print versions, BLAS, threads, Numba's threading layer and the folder of compiled kernels."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 some runs failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Any = tyro.cli(Command, prog="minilora", args=arguments, description=__doc__)
    except SystemExit as stop:
        if (error := _refusal(stop)) is not None:
            return _fail(error)
        sys.stderr.write(said.getvalue())
        name = next((a for a in arguments if a in EXAMPLES), None)
        if stop.code in (0, None):  # --help ends in an example that runs
            print("example:", EXAMPLES[name] if name else EXAMPLES["sweep"])
        raise
    except ValueError as error:
        return _fail(error)
    named = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in arguments if a.startswith("--")}
    handlers: dict[type, Callable[[Any], int]] = {
        Train: _train, Sweep: partial(_sweep, named=named), Plot: _plot, Generate: _generate, Merge: _merge,
        PretrainConfig: _pretrain, Info: _info}
    try:
        return handlers[type(command)](command)
    except KeyboardInterrupt:
        print("minilora: interrupted; repeat the same command to continue", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        return _fail(error)


def _refusal(stop: BaseException) -> ConfigError | None:
    """Our own refusal of a setting, which tyro turns into a box of its own and an exit: one line says it better."""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__context__
    return cause


def _fail(error: Exception) -> int:
    print("minilora: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def _train(command: Train) -> int:
    from minilora import memory
    from minilora.formats.checkpoint import load_base
    from minilora.study.run import build, run
    from minilora.threads import available_threads

    config = command.config
    writable_folder(Path(command.out))
    model = build(config, load_base())
    print(memory.trainable_line(model))
    print(" · ".join(f"{kind} {memory.format_bytes(n)}" for kind, n in memory.model_bytes(model).items() if n))
    row = run(config, command.out, command.threads or available_threads(), command.checkpoint_every, progress=True)
    for name in ("loss", "bpb", "recall", "exact", "recall_values", "deployed_loss", "deployed_recall", "train_loss"):
        if row.get(name) is not None:
            print(f"{name:>16} {row[name]:.4f}")
    held = {k.removeprefix("bytes_"): v for k, v in row.items() if k.startswith("bytes_") and v}
    print("bytes: " + " · ".join(f"{kind} {memory.format_bytes(n)}" for kind, n in held.items()))
    print(f"saved in {command.out}; {row['seconds']:.1f} s")
    return 0


WHAT = {
    "demo": "A demonstration: short runs, two seeds, no intervals, default learning rates. "
            "The study is `minilora sweep --preset full`.",
    "full": "The study: learning rates are searched on the validation split first, then three seeds on the test split.",
    "custom": "Your own grid.",
}
AXES = ("method", "r", "bits", "group_size", "target_modules", "learning_rate", "task", "seed", "split", "text_path")
SCALARS = ("steps", "batch_size", "n_train", "n_eval", "lora_alpha", "lora_dropout", "use_rslora", "lora_plus_ratio",
           "subset_modules", "block_size", "double_quant", "write_all")


def _sweep(command: Sweep, named: Collection[str]) -> int:
    from minilora.study import presets, report
    from minilora.study.results import write_csv
    from minilora.study.run import check_buildable
    from minilora.study.sweep import expand, outline, run_sweep
    from minilora.threads import available_threads

    config, plain = command.config, SweepConfig()
    preset = config.preset
    axes = [axis for axis in AXES if axis in named]
    if "preset" not in named:
        preset = "custom" if axes else "demo"
    require_in(preset, tuple(WHAT), "preset")
    if preset != "custom" and axes:
        flags = ", ".join("--" + axis.replace("_", "-") for axis in axes)
        raise ConfigError(f"preset={preset!r}: has a grid of its own; leave out {flags}, or --preset for a grid of yours")
    settings = {name: getattr(config, name) for name in SCALARS if getattr(config, name) != getattr(plain, name)}
    name = config.name if config.name != plain.name else preset
    out = Path(config.out) / name
    n_jobs = command.n_jobs or available_threads()
    writable_folder(out)
    first = {"demo": lambda: presets.demo_runs(**settings), "full": lambda: presets.planned_runs(**settings)}
    runs = first.get(preset, lambda: expand(replace(config, preset=preset)))()
    check_buildable(runs)
    print(WHAT[preset])
    print(outline(runs, n_jobs, _seconds_per_run(runs)))
    how: dict[str, Any] = {"n_jobs": n_jobs, "progress": not command.quiet, "retry_failed": command.retry_failed}
    rows = run_sweep(runs, out, **how) if preset == "custom" else presets.run_preset(preset, out, **how, **settings)
    write_csv(rows, out / "results.csv")
    print(report.format_table(rows))
    minutes = sum(row.get("seconds") or 0 for row in rows) / 60  # also of what an earlier session did
    intro = f"{WHAT[preset]} Its runs took {minutes / n_jobs:.1f} minutes in {n_jobs} processes."
    about = {"title": f"Sweep {name}", "intro": intro, "command": _command_line()}
    write_file(out / "sweep.json", json.dumps(about, indent=2) + "\n")  # for `minilora plot`
    page = report.write_report(rows, out, **about)
    failed = sum(row["status"] == "failed" for row in rows)
    note = f"; {failed} failed, see their errors there" if failed else ""
    print(f"{len(rows)} rows in {out / 'results.jsonl'}, report in {page}{note}")
    return 1 if failed else 0


def _command_line() -> str:
    return "minilora " + " ".join(sys.argv[1:])


def _seconds_per_run(runs: Sequence[RunConfig]) -> float:
    """Time a few steps on this machine, which also compiles the kernels once for all processes, and scale them up."""
    from minilora.study.run import estimate_seconds

    print("compiling kernels and timing a step …", flush=True)
    return estimate_seconds(runs)


def _plot(command: Plot) -> int:
    from minilora.study import report
    from minilora.study.results import load_results, write_csv

    folder = Path(command.folder)
    rows = load_results(folder)
    write_csv(rows, folder / "results.csv")
    print(report.format_table(rows))
    about = read_json(folder / "sweep.json") if (folder / "sweep.json").is_file() else {"title": f"Sweep {folder.name}"}
    known = {name: str(about[name]) for name in ("title", "intro", "command") if about.get(name)}
    print(f"report in {report.write_report(rows, folder, **known)}")
    return 0


def _generate(command: Generate) -> int:
    import numpy as np

    from minilora.data.tasks import make_task
    from minilora.data.tokenizer import BOS, EOS, decode, encode
    from minilora.formats.checkpoint import load_base
    from minilora.generation import generate
    from minilora.study.run import load_run

    if (command.prompt is None) == (command.task_prompts == 0):
        raise ConfigError("prompt: give either --prompt TEXT or --task-prompts N")
    config, model = load_run(command.run) if command.run else (RunConfig(), load_base())
    if command.prompt is not None:
        prompts = [[BOS, *encode(command.prompt)]]
    else:
        prompts = make_task(config.task, text_path=config.text_path).prompts("test")[: command.task_prompts]
        if not prompts:
            raise ConfigError(f"task_prompts={command.task_prompts}: task {config.task!r} has no prompts; use --prompt")
    texts = generate(model, prompts, command.max_new_tokens, temperature=command.temperature, top_k=command.top_k,
                     top_p=command.top_p, rng=np.random.default_rng(command.seed), eos=EOS)
    for prompt, text in zip(prompts, texts, strict=True):
        print(decode(prompt) + decode(text), end="\n\n")
    return 0


def _merge(command: Merge) -> int:
    from minilora import memory
    from minilora.formats.checkpoint import save_model
    from minilora.lora import merge
    from minilora.study.results import ADAPTERS
    from minilora.study.run import load_run, make_run_task
    from minilora.training.loss import evaluate

    config, model = load_run(command.run)
    if config.method not in ADAPTERS:
        raise ConfigError(f"run={command.run!r}: method {config.method!r} has no adapter to merge")
    merged, errors = merge(model, command.how, config.quant() if config.quantized else None)
    worst = max(errors, key=lambda name: errors[name].relative)
    batches = make_run_task(config).eval_batches("test")
    before, after = evaluate(model, batches), evaluate(merged, batches)
    print(f"merged {len(errors)} layers; largest error relative to ΔW: {errors[worst].relative:.2e} in {worst}")
    print(f"loss {before['loss']:.5f} with the adapter, {after['loss']:.5f} merged")
    print(f"effective bits per weight {memory.effective_bits(model):.3f} before, {memory.effective_bits(merged):.3f} merged")
    path = Path(command.out or Path(command.run) / "merged.safetensors")
    save_model(merged, path)
    print(f"written to {path}, {memory.format_bytes(path.stat().st_size)}")
    return 0


def _pretrain(command: PretrainConfig) -> int:
    from minilora.formats.checkpoint import read_info
    from minilora.training.pretrain import pretrain

    writable_folder(Path(command.out))
    path = pretrain(command)
    print(json.dumps(read_info(path), indent=2))
    print(f"written to {path}, {path.stat().st_size / 1e6:.2f} MB; the package keeps its own base in minilora/assets")
    return 0


def _info(command: Info) -> int:
    import importlib.metadata as md

    import numba
    from threadpoolctl import threadpool_info

    from minilora.quant import kernels
    from minilora.study.run import environment
    from minilora.threads import available_threads

    print("\n".join(f"{name:<16} {value}" for name, value in environment().items()))
    for package in ("matplotlib", "safetensors", "tqdm", "tyro", "threadpoolctl", "llvmlite"):
        print(f"{package:<16} {md.version(package)}")
    for library in threadpool_info():
        details = " ".join(str(library.get(name, "")) for name in ("internal_api", "version", "architecture"))
        print(f"{library['user_api']:<16} {details}")
    cache = cast(Any, kernels.dequantize).stats.cache_path or "not on disk"
    print(f"{'threads':<16} {available_threads()} (shards of a batch, one BLAS thread each)")
    print(f"{'numba layer':<16} {cast(Any, numba.config).THREADING_LAYER} (kernels themselves are single-threaded)")
    print(f"{'numba cache':<16} {cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
