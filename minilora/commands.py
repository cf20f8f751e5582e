"""What each command of the command line does; what can be asked for is in ``cli``.

Imports stand in the functions: a command must not wait for what another needs.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minilora.config import (
    ADAPTERS,
    AFFINE_TYPES,
    QUANTIZERS,
    ConfigError,
    PretrainConfig,
    QuantConfig,
    require,
    require_in,
)
from minilora.formats.files import read_json, writable_folder, write_file
from minilora.sweep.grid import SweepConfig
from minilora.sweep.settings import RunConfig

if TYPE_CHECKING:
    from minilora.cli import Generate, Info, Memory, Merge, Plot, Quantize, Sweep, Train


def train(command: Train, named: Collection[str]) -> int:
    """Fine-tune, and print what it came to."""
    from minilora import memory
    from minilora.sweep.run import ADAPTER, run
    from minilora.sweep.settings import PRETRAINED, TINY
    from minilora.threads import available_threads

    config, checkpoint_every = command.config, command.checkpoint_every
    if config.model != TINY:
        config = replace(config, **{name: value for name, value in PRETRAINED.items() if name not in named})
        checkpoint_every = checkpoint_every if "checkpoint_every" in named else 10  # such steps take seconds
    # the parser's default is a complete configuration, of lora on the tiny base: what was not said is the
    # method's own
    by_method: dict[str, Any] = {"r": None, "lora_alpha": None, "target_modules": None, "learning_rate": None}
    config = replace(config, **{name: value for name, value in by_method.items() if name not in named})
    writable_folder(Path(command.out))

    def built(model: Any) -> None:
        print(memory.trainable_line(model), flush=True)

    row = run(
        config,
        command.out,
        command.threads or available_threads(),
        checkpoint_every,
        progress=True,
        built=built,
        eval_every=command.eval_every,
    )
    for name in (
        "loss",
        "bpb",
        "recall",
        "exact",
        "recall_values",
        "deployed_loss",
        "deployed_recall",
        "train_loss",
    ):
        if row.get(name) is not None:
            print(f"{name:>16} {row[name]:.4f}")
    where = f"{command.out}/{ADAPTER}" if row["bytes_adapter_file"] else command.out
    print(f"saved in {where}; {row['seconds']:.1f} s")
    return 0


WHAT = {
    "demo": "A demonstration: short runs, two seeds, no intervals, default learning rates. "
    "The study is `minilora sweep --preset full`.",
    "full": "The study: learning rates are searched on the validation split first, then three seeds on the test split.",
    "pretrained": "A small sweep over a real model: one seed, one learning rate for all adapters, no intervals. Deployed: "
    "rounded to the same bits again (QLoRA) or merged into its offsets (QA-LoRA).",
    "custom": "Your own grid.",
}
AXES = (
    "method",
    "r",
    "bits",
    "group_size",
    "target_modules",
    "learning_rate",
    "task",
    "seed",
    "split",
    "text_path",
)
SCALARS = (
    "steps",
    "batch_size",
    "n_train",
    "n_eval",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "lora_plus_ratio",
    "use_dora",
    "quantizer",
    "subset_modules",
    "block_size",
    "double_quant",
    "write_all",
    "max_length",
    "packing",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "logits_chunk",
    "optimizer",
)


def sweep(command: Sweep, named: Collection[str]) -> int:
    """Expand, estimate, run, report."""
    from minilora.sweep import presets, report
    from minilora.sweep.inputs import check_memory
    from minilora.sweep.results import write_csv
    from minilora.sweep.run import check_buildable
    from minilora.sweep.runner import expand, outline, run_sweep
    from minilora.sweep.settings import PRETRAINED, TINY
    from minilora.threads import available_threads

    config, plain = command.config, SweepConfig()
    preset = config.preset
    axes = [axis for axis in AXES if axis in named]
    if "preset" not in named:
        preset = "custom" if axes or config.data else "demo" if config.model == TINY else "pretrained"
    require_in(preset, tuple(WHAT), "preset")
    axes += ["data"] if config.data else []
    if preset != "custom" and axes:
        flags = ", ".join("--" + axis.replace("_", "-") for axis in axes)
        raise ConfigError(
            f"preset={preset!r}: has a grid of its own; leave out {flags}, or --preset for a grid of yours"
        )
    require(
        preset == "custom" or (preset == "pretrained") == (config.model != TINY),
        "preset",
        preset,
        f"does not go with model={config.model!r}: demo and full sweep the tiny base, pretrained a real model",
    )
    settings = {
        name: getattr(config, name) for name in SCALARS if getattr(config, name) != getattr(plain, name)
    }
    if config.model != TINY:
        config = replace(config, **{name: value for name, value in PRETRAINED.items() if name not in named})
    name = (
        config.name
        if config.name != plain.name
        else preset
        if config.model == TINY
        else Path(config.model).stem
    )
    out = Path(config.out) / name
    n_jobs = command.n_jobs or available_threads()
    writable_folder(out)
    first = {
        "demo": lambda: presets.demo_runs(**settings),
        "full": lambda: presets.planned_runs(**settings),
        "pretrained": lambda: presets.pretrained_runs(config.model, **settings),
    }
    runs = first.get(preset, lambda: expand(replace(config, preset=preset)))()
    if config.model != TINY:
        for run in runs:
            check_memory(run, processes=n_jobs)
    check_buildable(runs)
    print(WHAT[preset])
    print(outline(runs, n_jobs, _seconds_per_run(runs)))
    how: dict[str, Any] = {
        "n_jobs": n_jobs,
        "progress": not command.quiet,
        "retry_failed": command.retry_failed,
    }
    stages = preset in ("demo", "full")
    rows = presets.run_preset(preset, out, **how, **settings) if stages else run_sweep(runs, out, **how)
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
    """Time a few steps on this machine, which also compiles the kernels once for all processes, and scale
    them up."""
    from minilora.sweep.run import estimate_seconds

    print("compiling kernels and timing a step …", flush=True)
    return estimate_seconds(runs)


def plot(command: Plot) -> int:
    """Draw a finished sweep again."""
    from minilora.sweep import report
    from minilora.sweep.results import load_results, write_csv

    folder = Path(command.folder)
    rows = load_results(folder)
    write_csv(rows, folder / "results.csv")
    print(report.format_table(rows))
    about = (
        read_json(folder / "sweep.json")
        if (folder / "sweep.json").is_file()
        else {"title": f"Sweep {folder.name}"}
    )
    known = {name: str(about[name]) for name in ("title", "intro", "command") if about.get(name)}
    print(f"report in {report.write_report(rows, folder, **known)}")
    return 0


def generate(command: Generate) -> int:
    """Print what a model writes."""
    import numpy as np

    from minilora.sweep.models import open_model, write_batch, write_streaming
    from minilora.sweep.run import make_run_task

    if sum(map(bool, (command.prompt, command.chat, command.task_prompts))) != 1:
        raise ConfigError("prompt: give one of --prompt TEXT, --chat MESSAGE and --task-prompts N")
    require(command.system is None or bool(command.chat), "system", command.system, "is for --chat")
    opened = open_model(command.model, command.adapter, command.run)
    tokenizer = opened.base.tokenizer
    if command.prompt:
        shown: Sequence[str] = command.prompt
        prompts = [[*tokenizer.begin, *tokenizer.encode(text, add_special=False)] for text in command.prompt]
    elif command.chat:
        system = [] if command.system is None else [{"role": "system", "content": command.system}]
        shown = [""] if len(command.chat) == 1 else [f"> {text}\n" for text in command.chat]
        prompts = [tokenizer.chat([*system, {"role": "user", "content": text}]) for text in command.chat]
    else:
        config = opened.run or RunConfig(method="base", model=command.model)
        prompts = make_run_task(config).prompts("test")[: command.task_prompts]
        if not prompts:
            raise ConfigError(
                f"task_prompts={command.task_prompts}: task {config.task!r} has no prompts; use --prompt"
            )
        shown = [tokenizer.decode(ids) for ids in prompts]
    sampling = {
        "temperature": command.temperature,
        "top_k": command.top_k,
        "top_p": command.top_p,
        "rng": np.random.default_rng(command.seed),
    }
    note = (
        "(compiling kernels, once on this machine, or reading a long prompt …)"
        if len(prompts) == 1
        else "(writing …)"
    )
    late = threading.Timer(3.0, print, [note], {"file": sys.stderr})
    late.daemon = True
    late.start()
    try:
        if len(prompts) == 1:
            texts = write_streaming(opened, prompts[0], command.max_new_tokens, **sampling)
            print(shown[0], end="", flush=True)
            for text in texts:
                late.cancel()
                print(text, end="", flush=True)
            print("\n")
            return 0
        for prompt, text in zip(
            shown, write_batch(opened, prompts, command.max_new_tokens, **sampling), strict=True
        ):
            print(prompt + text, end="\n\n")
        return 0
    finally:
        late.cancel()


def merge(command: Merge) -> int:
    """Merge an adapter and say what it cost."""
    from minilora import memory
    from minilora.claims.merge_study import compare_merges, format_merges, merge_offsets, quants_to_compare
    from minilora.merging import merge, merge_errors
    from minilora.quant.model import dequantize_model
    from minilora.sweep.models import export, open_model
    from minilora.sweep.run import base_of, calibration, load_run, make_run_task, read_run, requantize
    from minilora.sweep.settings import TINY
    from minilora.training.loss import evaluate

    real = (
        command.run is not None
        and read_run(Path(command.run) / "run.json")[0].model != TINY
        and not command.compare
    )
    if command.run is None or real or (command.out or "").endswith(".gguf"):
        require(
            command.out is not None and (command.run is not None or command.adapter is not None),
            "out",
            command.out,
            "give --run FOLDER or --model NAME --adapter FOLDER, and --out X.gguf or a folder",
        )
        unused = {
            "how": command.how != "auto",
            "compare": command.compare,
            "quantizer": command.quantizer is not None,
            "offsets": command.offsets is not None,
        }
        for name, used in unused.items():
            require(not used, name, getattr(command, name), "is for --run of the tiny base, without a GGUF")
        opened = open_model(command.model or "tiny", command.adapter, command.run)
        print("\n".join(export(opened, command.out or "", command.quant_type)))
        return 0
    require(
        command.model is command.adapter is None,
        "model",
        command.model,
        "a run knows its own; leave it and --adapter out",
    )
    config, model = load_run(command.run)
    if config.method not in ADAPTERS:
        raise ConfigError(f"run={command.run!r}: method {config.method!r} has no adapter to merge")
    how = ("offsets" if config.method == "qalora" else "dense") if command.how == "auto" else command.how
    uses = {"quant_type": ("requantize",), "quantizer": ("requantize",), "offsets": ("requantize", "offsets")}
    for name, ways in uses.items():
        value = getattr(command, name)
        require(
            value is None or how in ways or command.compare,
            name,
            value,
            f"only --how {' or '.join(ways)} takes it",
        )
    require(
        not command.compare or (command.how == "auto" and command.out is command.offsets is None),
        "compare",
        True,
        "shows every way and writes no model; leave out --how, --offsets and --out",
    )
    kind, double = command.quant_type or config.quant_type or "nf4", config.double_quant is not False
    quant = QuantConfig(
        kind,
        config.block_size or 64,
        double,
        config.group_size or 32,
        command.quantizer or ("rtn" if command.quant_type else config.quantizer),
        offset_dtype=(how == "requantize" and command.offsets) or "float16",
    )
    target = Path(command.out or Path(command.run) / "merged.safetensors")
    writable_folder(target.parent)
    batches = make_run_task(config).eval_batches("test")
    if command.compare:
        quants = quants_to_compare(quant, both=quant.quantizer == "rtn")
        dense = dequantize_model(base_of(config.model).model)
        rows = compare_merges(
            model, dense, batches, quants, calibration(config), progress=sys.stderr.isatty()
        )
        table = format_merges(rows)
        print(table)
        print(f"written to {write_file(Path(command.run) / 'merges.md', table + chr(10))}")
        return 0
    if how == "requantize":
        merged = requantize(model, quant, calibration(config) if quant.quantizer == "gptq" else ())
    else:
        merged = (
            merge_offsets(model, command.offsets or "float32") if how == "offsets" else merge(model, how)[0]
        )
    errors = merge_errors(model, merged)
    worst = max(errors, key=lambda name: errors[name].relative)
    print(
        f"merged {len(errors)} layers; largest error relative to ΔW: {errors[worst].relative:.2e} in {worst}"
    )
    before, after = evaluate(model, batches), evaluate(merged, batches)
    print(f"loss {before['loss']:.5f} with the adapter, {after['loss']:.5f} merged")
    print(
        f"effective bits per weight {memory.effective_bits(model):.3f} before, {memory.effective_bits(merged):.3f} merged"
    )
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
                found += [
                    QuantConfig(
                        kind, group_size=size, quantizer=quantizer, fit=fit, offset_dtype=command.offset_dtype
                    )
                    for size in command.group_size
                ]
    if not found:
        raise ConfigError(
            f"quantizer={command.quantizer}: nothing to do for {', '.join(command.quant_type)}; add rtn"
        )
    return found


def _weights_of(name: str | None) -> Any:
    """A model without the tokenizer that quantizing needs not."""
    from minilora.formats.bases import base_path
    from minilora.formats.checkpoint import load_model
    from minilora.formats.huggingface import load_huggingface
    from minilora.formats.llama_gguf import find_model, load_gguf

    path = base_path() if name is None else find_model(name)
    read: Any = load_huggingface if path.is_dir() else load_gguf if path.suffix == ".gguf" else load_model
    return read(path)


def quantize(command: Quantize) -> int:
    """Table, figures and perhaps a model of quantized weights."""
    from tqdm import tqdm

    from minilora import memory
    from minilora.claims.quantization_study import weight_configs
    from minilora.data.tasks import make_task
    from minilora.data.tokenizer import VOCAB_SIZE
    from minilora.quant.model import find_linear, input_hessian, quantize_model
    from minilora.report.quantization_plots import write_weight_figures
    from minilora.report.quantization_tables import format_weight_errors
    from minilora.sweep.run import CALIBRATION, unpadded
    from minilora.sweep.weight_errors import weight_errors
    from minilora.training.loss import evaluate

    model = _weights_of(command.model)
    linear = find_linear(model, command.weight)
    own_text = model.config.vocab_size == VOCAB_SIZE
    if not own_text and command.quantizer == QUANTIZERS:
        print(
            "quantizer gptq is left out: it calibrates on byte-level text, and this model has tokens of its own"
        )
        command = replace(command, quantizer=("rtn", "hqq"))
    configs = _quant_configs(command)
    if "gptq" in command.quantizer and not own_text:
        raise ConfigError(
            f"quantizer='gptq': calibrates on byte-level text, and this model has {model.config.vocab_size} tokens "
            "of its own; choose rtn or hqq"
        )
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
    table = format_weight_errors(rows)
    print(f"{linear.name} {linear.shape[0]} × {linear.shape[1]}\n{table}")
    write_file(Path(command.out) / "weight.md", f"{linear.name}\n\n{table}\n")
    grid = [config for config in weight_configs(w.shape[1]) if config.quantizer in command.quantizer]
    figures = write_weight_figures(w, rows, command.out, errors(grid, "error against bits"))
    print(f"table and figures ({', '.join(path.name for path in figures)}) in {command.out}")
    if command.save:
        quantized = quantize_model(
            model, configs[0], data if configs[0].quantizer == "gptq" else (), progress=True
        )
        if own_text:
            batches = task.eval_batches("test")
            print(
                f"loss {evaluate(model, batches)['loss']:.5f} before, {evaluate(quantized, batches)['loss']:.5f} quantized"
            )
        print(
            f"{memory.effective_bits(quantized):.3f} bits a weight, " + _save(quantized, Path(command.save))
        )
    return 0


def memory(command: Memory, named: Collection[str]) -> int:
    """Print a plan, or several side by side, or what fits, or what was published."""
    from minilora.memory.budget import FIT_METHODS, fit
    from minilora.memory.compare import asked, check_taken, compare
    from minilora.memory.planner import plan
    from minilora.memory.published import published

    c = command.config
    settings = asked(c, named)
    several = bool(command.compare) or "compare" in named
    if (
        several + (command.fit is not None) + command.published + (command.plot is not None and not several)
        > 1
    ):
        raise ConfigError(
            "memory: choose one of --compare, --fit, --published and --plot; only --compare and --plot go together"
        )
    found: Any
    if command.published:
        others = sorted(settings.keys() | ({"model", "method"} & set(named)))
        require(not others, "published", True, f"has settings of its own; leave out {', '.join(others)}")
        found = published()
    elif several:
        require("method" not in named, "method", c.method, "is what --compare names; leave it out")
        found = compare(c.model, command.compare, **settings)
    elif command.fit is not None:
        methods = (c.method,) if "method" in named else FIT_METHODS
        ranks = (settings.pop("r"),) if "r" in settings else None
        found = fit(command.fit, c.model, methods, ranks, progress=True, **settings)
    else:
        check_taken(settings, (c.method,))
        found = plan(c.model, method=c.method, **settings)
    figures = []
    if command.plot is not None:
        from minilora.report.memory_plots import save_memory_figures

        figures = save_memory_figures(
            c.model, command.plot, c.method, command.compare, progress=True, **settings
        )
    if command.json:
        print(
            json.dumps(
                found.to_dict() | ({"figures": [str(path) for path in figures]} if figures else {}), indent=1
            )
        )
        return 0
    print(found)
    if figures:
        print(
            f"figures ({', '.join(path.name for path in figures if path.suffix == '.png')}) in {command.plot}"
        )
    return 0


def pretrain(command: PretrainConfig) -> int:
    """Make the tiny base."""
    from minilora.formats.checkpoint import read_info
    from minilora.training.pretrain import pretrain

    writable_folder(Path(command.out))
    path = pretrain(command)
    print(json.dumps(read_info(path), indent=2))
    print(
        f"written to {path}, {path.stat().st_size / 1e6:.2f} MB; the package keeps its own base in minilora/assets"
    )
    return 0


def info(command: Info) -> int:
    """Print versions."""
    import importlib.metadata as md

    import numba
    from threadpoolctl import threadpool_info

    from minilora.kernels import codes as kernels
    from minilora.sweep.run import environment
    from minilora.threads import available_threads

    print("\n".join(f"{name:<16} {value}" for name, value in environment().items()))
    for package in ("matplotlib", "safetensors", "tqdm", "tyro", "threadpoolctl", "llvmlite"):
        print(f"{package:<16} {md.version(package)}")
    for library in threadpool_info():
        details = " ".join(str(library.get(name, "")) for name in ("internal_api", "version", "architecture"))
        print(f"{library['user_api']:<16} {details}")
    cache = cast(Any, kernels._dequantize).stats.cache_path or "not on disk"
    print(f"{'threads':<16} {available_threads()} (shards of a batch, one BLAS thread each)")
    print(
        f"{'numba layer':<16} {cast(Any, numba.config).THREADING_LAYER} (kernels themselves are single-threaded)"
    )
    print(f"{'numba cache':<16} {cache}")
    return 0
