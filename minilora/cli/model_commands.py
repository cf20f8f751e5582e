"""The commands that use a trained or quantized model: generate, merge and quantize."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.config import ADAPTERS, AFFINE_TYPES, QUANTIZERS, TINY, ConfigError, QuantConfig, require
from minilora.formats.files import writable_folder, write_file
from minilora.sweep.settings import RunConfig, rounded_to_nearest

if TYPE_CHECKING:
    from minilora.cli.options import Generate, Merge, Quantize
    from minilora.sweep.models import Opened


# ---- generate


def generate(command: Generate, named: Collection[str]) -> int:
    """Print what a model writes."""
    import numpy as np

    from minilora.sweep.models import open_model, write_batch, write_streaming

    if sum(map(bool, (command.prompt, command.chat, command.task_prompts))) != 1:
        raise ConfigError("prompt: give one of --prompt TEXT, --chat MESSAGE and --task-prompts N")
    require(command.system is None or bool(command.chat), "system", command.system, "is for --chat")
    opened = open_model(command.model, command.adapter, command.run)
    shown, prompts = _prompts(command, opened)
    sampling: dict[str, Any] = {
        "temperature": command.temperature,
        "top_k": command.top_k,
        "top_p": command.top_p,
        "rng": np.random.default_rng(command.seed),
    }
    if len(prompts) > 1:
        with _note_if_slow("(writing …)"):
            texts = write_batch(opened, prompts, command.max_new_tokens, **sampling)
        for prompt, text in zip(shown, texts, strict=True):
            print(prompt + text, end="\n\n")
        return 0
    with _note_if_slow("(compiling kernels, once on this machine, or reading a long prompt …)") as note:
        pieces = write_streaming(opened, prompts[0], command.max_new_tokens, **sampling)
        print(shown[0], end="", flush=True)
        for piece in pieces:
            note.cancel()
            print(piece, end="", flush=True)
        print("\n")
    return 0


def _prompts(command: Generate, opened: Opened) -> tuple[Sequence[str], list[list[int]]]:
    """Return what is shown before each text, and the token ids to continue."""
    from minilora.sweep.inputs import make_run_task

    tokenizer = opened.base.tokenizer
    if command.prompt:
        ids = [tokenizer.encode(text, add_special=False) for text in command.prompt]
        return command.prompt, [[*tokenizer.begin, *tokens] for tokens in ids]
    if command.chat:
        system = [] if command.system is None else [{"role": "system", "content": command.system}]
        messages = [[*system, {"role": "user", "content": text}] for text in command.chat]
        shown = [""] if len(command.chat) == 1 else [f"> {text}\n" for text in command.chat]
        return shown, [tokenizer.chat(each) for each in messages]
    config = opened.run or RunConfig(method="base", model=command.model)
    prompts = make_run_task(config).prompts("test")[: command.task_prompts]
    if not prompts:
        raise ConfigError(
            f"task_prompts={command.task_prompts}: task {config.data.task!r} has no prompts; use --prompt"
        )
    return [tokenizer.decode(tokens) for tokens in prompts], prompts


@contextmanager
def _note_if_slow(text: str, seconds: float = 3.0) -> Iterator[threading.Timer]:
    """Print a note to stderr if the work takes longer, unless it is cancelled."""
    timer = threading.Timer(seconds, print, [text], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


# ---- merge


def merge(command: Merge, named: Collection[str]) -> int:
    """Merge an adapter and print the error; a run of the tiny base can be merged in several ways."""
    from minilora.sweep.saved_runs import read_run

    if command.run is None or (command.out or "").endswith(".gguf"):
        return _merge_and_export(command)
    real = read_run(Path(command.run) / "run.json")[0].model != TINY
    if real and not command.compare:
        return _merge_and_export(command)
    return _merge_run(command)


def _merge_and_export(command: Merge) -> int:
    """Merge an adapter over any base into a GGUF, a model file of ours or a Hugging Face folder."""
    from minilora.sweep.models import export, open_model

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
    opened = open_model(command.model or TINY, command.adapter, command.run)
    print("\n".join(export(opened, command.out or "", command.quant_type)))
    return 0


def _merge_run(command: Merge) -> int:
    """Merge the adapter of a run in one way or, to compare, in every way."""
    from minilora.sweep.saved_runs import load_run

    require(
        command.model is command.adapter is None,
        "model",
        command.model,
        "a run knows its own; leave it and --adapter out",
    )
    folder = Path(command.run or "")
    config, model = load_run(folder)
    if config.method not in ADAPTERS:
        raise ConfigError(f"run={str(folder)!r}: method {config.method!r} has no adapter to merge")
    how: str = command.how
    if how == "auto":
        how = "offsets" if config.method == "qalora" else "dense"
    _check_merge_options(command, how)
    quant = _merged_storage(command, config, how)
    target = Path(command.out or folder / "merged.safetensors")
    writable_folder(target.parent)
    if command.compare:
        return _compare_merges(folder, config, model, quant)
    return _merge_one_way(command, config, model, how, quant, target)


def _check_merge_options(command: Merge, how: str) -> None:
    """Refuse options that the chosen way to merge does not take."""
    ways = {"quant_type": ("requantize",), "quantizer": ("requantize",), "offsets": ("requantize", "offsets")}
    for name, taking in ways.items():
        value = getattr(command, name)
        good = value is None or how in taking or command.compare
        require(good, name, value, f"only --how {' or '.join(taking)} takes it")
    require(
        not command.compare or (command.how == "auto" and command.out is command.offsets is None),
        "compare",
        True,
        "shows every way and writes no model; leave out --how, --offsets and --out",
    )


def _merged_storage(command: Merge, config: RunConfig, how: str) -> QuantConfig:
    """Return what to re-quantize to: the run's own storage, unless the command says otherwise."""
    quant = config.storage()
    if command.quant_type is not None:
        quant = QuantConfig(command.quant_type, quant.block_size, quant.double_quant, quant.group_size)
    if command.quantizer not in (None, quant.quantizer):
        nearest = rounded_to_nearest(quant)
        fit = "minmax" if command.quantizer == "hqq" else nearest.fit
        quant = replace(nearest, fit=fit, quantizer=command.quantizer)
    if how == "requantize" and command.offsets is not None:
        quant = replace(quant, offset_dtype=command.offsets)
    return quant


def _compare_merges(folder: Path, config: RunConfig, model: Any, quant: QuantConfig) -> int:
    """Print a table of all ways to merge, and keep it in the run's folder."""
    from minilora.claims.merge_study import compare_merges, format_merges, quants_to_compare
    from minilora.quant.model import dequantize_model
    from minilora.sweep.inputs import base_of, make_run_task
    from minilora.sweep.run_models import calibration

    batches = make_run_task(config).eval_batches("test")
    quants = quants_to_compare(quant, both=quant.quantizer == "rtn")
    dense = dequantize_model(base_of(config.model).model)
    rows = compare_merges(model, dense, batches, quants, calibration(config), progress=sys.stderr.isatty())
    table = format_merges(rows)
    print(table)
    print(f"written to {write_file(folder / 'merges.md', table + chr(10))}")
    return 0


def _merge_one_way(
    command: Merge, config: RunConfig, model: Any, how: str, quant: QuantConfig, target: Path
) -> int:
    """Merge, print the error and the losses, and save the model."""
    from minilora import memory
    from minilora.claims.merge_study import merge_offsets
    from minilora.merging import merge, merge_errors
    from minilora.sweep.deploying import requantize
    from minilora.sweep.inputs import make_run_task
    from minilora.sweep.run_models import calibration
    from minilora.training.evaluation import evaluate

    if how == "requantize":
        merged = requantize(model, quant, calibration(config) if quant.quantizer == "gptq" else ())
    elif how == "offsets":
        merged = merge_offsets(model, command.offsets or "float32")
    else:
        merged = merge(model, how)[0]
    errors = merge_errors(model, merged)
    worst = max(errors, key=lambda name: errors[name].relative)
    largest = f"largest error relative to ΔW: {errors[worst].relative:.2e} in {worst}"
    print(f"merged {len(errors)} layers; {largest}")
    batches = make_run_task(config).eval_batches("test")
    before, after = evaluate(model, batches), evaluate(merged, batches)
    print(f"loss {before['loss']:.5f} with the adapter, {after['loss']:.5f} merged")
    bits = [memory.effective_bits(each) for each in (model, merged)]
    print(f"effective bits per weight {bits[0]:.3f} before, {bits[1]:.3f} merged")
    print(_save(merged, target))
    return 0


def _save(model: Any, target: Path) -> str:
    """Save a model in the form that the target's name asks for; return what was written, in words."""
    from minilora.formats.checkpoint import save_model
    from minilora.formats.huggingface import save_huggingface
    from minilora.memory import format_bytes

    if target.suffix == ".safetensors":
        save_model(model, target)
        files = [target]
    else:
        files = save_huggingface(model, target)
    return f"written to {target}, {format_bytes(sum(file.stat().st_size for file in files))}"


# ---- quantize


def quantize(command: Quantize, named: Collection[str]) -> int:
    """Print a table and draw figures of a quantized weight; perhaps quantize and save the model."""
    from minilora.data.tasks import make_task
    from minilora.data.tokenizer import VOCAB_SIZE
    from minilora.quant.model import find_linear, input_hessian
    from minilora.sweep.run_models import CALIBRATION_EXAMPLES, unpadded

    model = _load_weights(command.model)
    linear = find_linear(model, command.weight)
    own_text = model.config.vocab_size == VOCAB_SIZE
    if not own_text:
        command = _without_calibration(command, model.config.vocab_size)
    configs = _quant_configs(command)
    task = make_task(command.task, n_train=512, n_eval=64)
    data = unpadded(task, range(CALIBRATION_EXAMPLES)) if own_text else []
    hessian = input_hessian(model, linear.name, data) if data else None
    writable_folder(Path(command.out))
    if command.save:
        writable_folder(Path(command.save).parent)
    _show_weight(command, linear, configs, hessian)
    if command.save:
        batches = task.eval_batches("test") if own_text else []
        calibration = data if configs[0].quantizer == "gptq" else []
        _save_quantized(model, configs[0], calibration, batches, Path(command.save))
    return 0


def _without_calibration(command: Quantize, vocab_size: int) -> Quantize:
    """Leave gptq out of the default quantizers; refuse it if it was asked for."""
    if command.quantizer == QUANTIZERS:
        print("gptq is left out: it calibrates on byte-level text, and this model has tokens of its own")
        return replace(command, quantizer=("rtn", "hqq"))
    if "gptq" in command.quantizer:
        raise ConfigError(
            f"quantizer='gptq': calibrates on byte-level text, and this model has {vocab_size} tokens of its "
            "own; choose rtn or hqq"
        )
    return command


def _quant_configs(command: Quantize) -> list[QuantConfig]:
    """Return every combination that exists: HQQ fits offsets, and codebooks have none."""
    found = []
    for kind in command.quant_type:
        for quantizer in command.quantizer:
            if kind not in AFFINE_TYPES and quantizer != "hqq":
                found += [QuantConfig(kind, size, quantizer=quantizer) for size in command.block_size]
            elif kind in AFFINE_TYPES:
                fit = "hqq" if quantizer == "hqq" else command.fit
                how: dict[str, Any] = {
                    "quantizer": quantizer,
                    "fit": fit,
                    "offset_dtype": command.offset_dtype,
                }
                found += [QuantConfig(kind, group_size=size, **how) for size in command.group_size]
    if not found:
        raise ConfigError(
            f"quantizer={command.quantizer}: nothing to do for {', '.join(command.quant_type)}; add rtn"
        )
    return found


def _load_weights(name: str | None) -> Any:
    """Load a model without its tokenizer; by default the tiny base."""
    from minilora.formats.bases import base_path
    from minilora.formats.checkpoint import load_model
    from minilora.formats.huggingface import load_huggingface
    from minilora.formats.llama_gguf import find_model, load_gguf

    path = base_path() if name is None else find_model(name)
    if path.is_dir():
        return load_huggingface(path)
    return load_gguf(path) if path.suffix == ".gguf" else load_model(path)


def _show_weight(command: Quantize, linear: Any, configs: list[QuantConfig], hessian: Any) -> None:
    """Print the errors of one weight, and draw them."""
    from tqdm import tqdm

    from minilora.claims.quantization_study import weight_configs
    from minilora.report.quantization_plots import write_weight_figures
    from minilora.report.quantization_tables import format_weight_errors
    from minilora.sweep.weight_errors import weight_errors

    w = linear.weight.dense()

    def errors(of: Sequence[QuantConfig], doing: str) -> list[dict[str, Any]]:
        steps = tqdm(of, desc=doing, unit="setting", disable=not sys.stderr.isatty())
        return [row for config in steps for row in weight_errors(w, [config], hessian)]

    rows = errors(configs, "quantizing")
    table = format_weight_errors(rows)
    print(f"{linear.name} {linear.shape[0]} × {linear.shape[1]}\n{table}")
    write_file(Path(command.out) / "weight.md", f"{linear.name}\n\n{table}\n")
    grid = [config for config in weight_configs(w.shape[1]) if config.quantizer in command.quantizer]
    figures = write_weight_figures(w, rows, command.out, errors(grid, "error against bits"))
    print(f"table and figures ({', '.join(path.name for path in figures)}) in {command.out}")


def _save_quantized(
    model: Any, config: QuantConfig, data: list[Any], batches: list[Any], target: Path
) -> None:
    """Quantize the whole model, print its loss before and after, and save it."""
    from minilora import memory
    from minilora.quant.model import quantize_model
    from minilora.training.evaluation import evaluate

    quantized = quantize_model(model, config, data, progress=True)
    if batches:
        before, after = (evaluate(each, batches)["loss"] for each in (model, quantized))
        print(f"loss {before:.5f} before, {after:.5f} quantized")
    print(f"{memory.effective_bits(quantized):.3f} bits per weight, {_save(quantized, target)}")
