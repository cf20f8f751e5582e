"""The command line: train · sweep · plot · generate · merge · quantize · pretrain · info."""

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

from minilora.config import AFFINE_TYPES, ConfigError, QuantConfig, require, require_in
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
    "quantize": "minilora quantize --quant-type nf4 int4 int2 --quantizer rtn gptq",
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
    """Merge a trained adapter into its base, and say what that costs; with --compare in every way there is."""

    run: str  # a folder that `minilora train` wrote
    how: Literal["auto", "dense", "requantize", "offsets"] = "auto"  # auto: offsets for QA-LoRA, else dense
    compare: bool = False  # a table of all ways (loss, KL divergence, bytes), also in merges.md; no model is written
    quant_type: str | None = None  # what to re-quantize to; default: the run's own, nf4 for LoRA
    quantizer: Literal["rtn", "gptq", "hqq"] | None = None  # how; default: the run's own; --compare adds gptq to rtn
    offsets: Literal["float32", "float16", "zero"] | None = None  # of the result; default: merged ones float32, else float16
    out: str | None = None  # X.safetensors, ours, or a Hugging Face folder; default: merged.safetensors in the run's folder


@dataclass(frozen=True)
class Quantize:
    """Show what a weight loses in few bits: levels, error by block, error against bits; or quantize a model and save it."""

    model: str | None = None  # a model file of ours or a Hugging Face folder; default: the tiny base
    weight: str = "layers.0.mlp.up_proj"  # the weight to look at, by the end of its name
    quant_type: tuple[str, ...] = ("nf4", "fp4", "int4", "nf3", "int3", "nf2", "int2")
    block_size: tuple[int, ...] = (64,)  # for codebooks
    group_size: tuple[int, ...] = (32,)  # for integers
    quantizer: tuple[Literal["rtn", "gptq", "hqq"], ...] = ("rtn", "gptq", "hqq")
    fit: Literal["minmax", "symmetric", "mse"] = "minmax"  # of scale and offset
    offset_dtype: Literal["float16", "float32", "zero"] = "float16"
    task: Literal["products", "python"] = "products"  # its training examples calibrate GPTQ, its test split measures the loss
    out: str = "runs/quantize"  # folder for table and figures
    save: str | None = None  # quantize the whole model by the first of each setting, to X.safetensors or a Hugging Face folder


@dataclass(frozen=True)
class Info:
    """Print versions, BLAS, threads, Numba's threading layer and the folder of compiled kernels."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
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
        Quantize: _quantize, PretrainConfig: _pretrain, Info: _info}
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
SCALARS = ("steps", "batch_size", "n_train", "n_eval", "lora_alpha", "lora_dropout", "use_rslora", "lora_plus_ratio", "use_dora",
           "quantizer", "subset_modules", "block_size", "double_quant", "write_all")


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
    from minilora.formats.checkpoint import load_base
    from minilora.merging import merge, merge_errors
    from minilora.study.merging import compare_merges, format_merges, merge_offsets, quants_to_compare
    from minilora.study.results import ADAPTERS
    from minilora.study.run import calibration, load_run, make_run_task, requantize
    from minilora.training.loss import evaluate

    config, model = load_run(command.run)
    if config.method not in ADAPTERS:
        raise ConfigError(f"run={command.run!r}: method {config.method!r} has no adapter to merge")
    how = ("offsets" if config.method == "qalora" else "dense") if command.how == "auto" else command.how
    uses = {"quant_type": ("requantize",), "quantizer": ("requantize",), "offsets": ("requantize", "offsets")}
    for name, ways in uses.items():
        value = getattr(command, name)
        require(value is None or how in ways or command.compare, name, value, f"only --how {' or '.join(ways)} takes it")
    require(not command.compare or (command.how == "auto" and command.out is command.offsets is None), "compare", True,
            "shows every way and writes no model; leave out --how, --offsets and --out")
    kind, double = command.quant_type or config.quant_type or "nf4", config.double_quant is not False
    quant = QuantConfig(kind, config.block_size or 64, double, config.group_size or 32,
                        command.quantizer or ("rtn" if command.quant_type else config.quantizer),
                        offset_dtype=(how == "requantize" and command.offsets) or "float16")
    target = Path(command.out or Path(command.run) / "merged.safetensors")
    writable_folder(target.parent)
    batches = make_run_task(config).eval_batches("test")
    if command.compare:
        quants = quants_to_compare(quant, both=quant.quantizer == "rtn")
        rows = compare_merges(model, load_base(), batches, quants, calibration(config), progress=sys.stderr.isatty())
        table = format_merges(rows)
        print(table)
        print(f"written to {write_file(Path(command.run) / 'merges.md', table + chr(10))}")
        return 0
    if how == "requantize":
        merged = requantize(model, quant, calibration(config) if quant.quantizer == "gptq" else ())
    else:
        merged = merge_offsets(model, command.offsets or "float32") if how == "offsets" else merge(model, how)[0]
    errors = merge_errors(model, merged)
    worst = max(errors, key=lambda name: errors[name].relative)
    print(f"merged {len(errors)} layers; largest error relative to ΔW: {errors[worst].relative:.2e} in {worst}")
    before, after = evaluate(model, batches), evaluate(merged, batches)
    print(f"loss {before['loss']:.5f} with the adapter, {after['loss']:.5f} merged")
    print(f"effective bits per weight {memory.effective_bits(model):.3f} before, {memory.effective_bits(merged):.3f} merged")
    print(_save(merged, target))
    return 0


def _save(model: Any, target: Path) -> str:
    """Save a model in the form that the target's name asks for; returns what was written, in words."""
    from minilora.formats.checkpoint import save_model
    from minilora.formats.huggingface import save_huggingface
    from minilora.memory import format_bytes

    if target.suffix == ".safetensors":
        save_model(model, target)
        files = [target]
    else:
        files = save_huggingface(model, target)
    return f"written to {target}, {format_bytes(sum(file.stat().st_size for file in files))}"


def _quant_configs(command: Quantize) -> list[QuantConfig]:
    """Every combination that there is: hqq fits offsets, which codebooks have not."""
    found = []
    for kind in command.quant_type:
        for quantizer in command.quantizer:
            if kind not in AFFINE_TYPES and quantizer != "hqq":
                found += [QuantConfig(kind, size, quantizer=quantizer) for size in command.block_size]
            elif kind in AFFINE_TYPES:
                fit = "hqq" if quantizer == "hqq" else command.fit
                found += [QuantConfig(kind, group_size=size, quantizer=quantizer, fit=fit, offset_dtype=command.offset_dtype)
                          for size in command.group_size]
    if not found:
        raise ConfigError(f"quantizer={command.quantizer}: nothing to do for {', '.join(command.quant_type)}; add rtn")
    return found


def _quantize(command: Quantize) -> int:
    from tqdm import tqdm

    from minilora import memory
    from minilora.data.tasks import make_task
    from minilora.data.tokenizer import VOCAB_SIZE
    from minilora.formats.checkpoint import load_base, load_model
    from minilora.formats.huggingface import load_huggingface
    from minilora.quantize import find_linear, input_hessian, quantize_model
    from minilora.study.quantization import weight_configs
    from minilora.study.quantization_plots import write_weight_figures
    from minilora.study.run import CALIBRATION, unpadded
    from minilora.study.weight_errors import print_weight_table, weight_errors
    from minilora.training.loss import evaluate

    path = None if command.model is None else Path(command.model)
    model = load_base() if path is None else load_huggingface(path) if path.is_dir() else load_model(path)
    linear = find_linear(model, command.weight)
    configs = _quant_configs(command)
    own_text = model.config.vocab_size == VOCAB_SIZE
    if "gptq" in command.quantizer and not own_text:
        raise ConfigError(f"quantizer='gptq': calibrates on byte-level text, and this model has {model.config.vocab_size} tokens "
                          "of its own; choose rtn or hqq")
    task = make_task(command.task, n_train=512, n_eval=64)
    data = unpadded(task, range(CALIBRATION)) if own_text else []
    hessian = input_hessian(model, linear.name, data) if data else None
    writable_folder(Path(command.out))
    if command.save:
        writable_folder(Path(command.save).parent)
    w = linear.weight.dense()

    def errors(of: Sequence[Any], what: str) -> list[dict[str, Any]]:
        steps = tqdm(of, desc=what, unit="setting", disable=not sys.stderr.isatty())
        return [row for config in steps for row in weight_errors(w, [config], hessian)]

    rows = errors(configs, "quantizing")
    table = print_weight_table(rows)
    print(f"{linear.name} {linear.shape[0]} × {linear.shape[1]}\n{table}")
    write_file(Path(command.out) / "weight.md", f"{linear.name}\n\n{table}\n")
    grid = [config for config in weight_configs(w.shape[1]) if config.quantizer in command.quantizer]
    figures = write_weight_figures(w, rows, command.out, errors(grid, "error against bits"))
    print(f"table and figures ({', '.join(path.name for path in figures)}) in {command.out}")
    if command.save:
        quantized = quantize_model(model, configs[0], data if configs[0].quantizer == "gptq" else (), progress=True)
        if own_text:
            batches = task.eval_batches("test")
            print(f"loss {evaluate(model, batches)['loss']:.5f} before, {evaluate(quantized, batches)['loss']:.5f} quantized")
        print(f"{memory.effective_bits(quantized):.3f} bits a weight, " + _save(quantized, Path(command.save)))
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
