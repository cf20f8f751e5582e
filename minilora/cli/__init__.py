"""The command line: train · sweep · plot · generate · merge · quantize · memory · pretrain · info.

`options` says what can be asked. What each command does is in one file per group: `training_commands`,
`sweep_commands`, `model_commands` and `memory_commands`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import tyro

import minilora
from minilora.cli.options import (
    EXAMPLES,
    Command,
    Generate,
    Info,
    Memory,
    Merge,
    Plot,
    Pretrain,
    Quantize,
    Sweep,
    Train,
)
from minilora.config import ConfigError

DESCRIPTION = "LoRA, QLoRA and QA-LoRA from scratch, on a CPU. `minilora --version` prints the version."


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command: 0 done, 1 some runs failed, 2 bad input, 130 interrupted.

    Parameters
    ----------
    argv
        Words after `minilora`. Default: those of this process.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        # the reader, such as head, has seen enough: send what Python still wants to print nowhere
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"minilora {minilora.__version__}")
        return 0
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            kind: Any = Command
            command = tyro.cli(kind, prog="minilora", args=arguments, description=DESCRIPTION)
    except SystemExit as stop:
        if (error := _refusal(stop)) is not None:
            return _fail(error)
        sys.stderr.write(errors.getvalue())
        if stop.code in (0, None):  # --help ends in an example that runs
            name = next((word for word in arguments if word in EXAMPLES), "sweep")
            print("example:", EXAMPLES[name])
        raise
    except ValueError as error:
        return _fail(error)
    options = (word.split("=")[0] for word in arguments if word.startswith("--"))
    named = {option.removeprefix("--").replace("-", "_") for option in options}
    try:
        return _handler(command)(command, named)
    except KeyboardInterrupt:
        advice = "repeat a training or a sweep to continue from its last checkpoint or row"
        print(f"\nminilora: interrupted; {advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _fail(error)


def _handler(command: Any) -> Callable[[Any, Collection[str]], int]:
    """Return the function of a command, which takes it and the names of the options that were given."""
    from minilora.cli import memory_commands, model_commands, sweep_commands, training_commands

    handlers: dict[type, Callable[[Any, Collection[str]], int]] = {
        Train: training_commands.train,
        Pretrain: training_commands.pretrain,
        Sweep: sweep_commands.sweep,
        Plot: sweep_commands.plot,
        Generate: model_commands.generate,
        Merge: model_commands.merge,
        Quantize: model_commands.quantize,
        Memory: memory_commands.memory,
        Info: memory_commands.info,
    }
    return handlers[type(command)]


def _refusal(stop: BaseException) -> ConfigError | None:
    """Return our own refusal of a setting, which tyro turns into a box of its own and an exit."""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__context__
    return cause


def _fail(error: Exception) -> int:
    print("minilora: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2
