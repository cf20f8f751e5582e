"""The commands that look and do not train: memory and info."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from minilora.cli.options import said
from minilora.config import TINY, ConfigError, require

if TYPE_CHECKING:
    from minilora.cli.options import Info, Memory


def memory(command: Memory, named: Collection[str]) -> int:
    """Print a plan, several side by side, what fits, or what was published."""
    settings = said(command.settings, named)
    model, method = settings.pop("model", TINY), settings.pop("method", None)
    several = bool(command.compare) or "compare" in named
    alone = command.plot is not None and not several
    if sum((several, command.fit is not None, command.published, alone)) > 1:
        raise ConfigError(
            "memory: choose one of --compare, --fit, --published and --plot; only --compare and --plot go "
            "together"
        )
    if command.published:
        others = sorted(settings.keys() | ({"model", "method"} & set(named)))
        require(not others, "published", True, f"has settings of its own; leave out {', '.join(others)}")
    if several:
        require(method is None, "method", method, "is what --compare names; leave it out")
    found = _ledgers(command, several, model, method, settings)
    figures = []
    if command.plot is not None:
        from minilora.report.memory_plots import save_memory_figures

        figures = save_memory_figures(
            model, command.plot, method or "lora", command.compare, progress=True, **settings
        )
    if command.json:
        document = found.to_dict()
        if figures:
            document |= {"figures": [str(path) for path in figures]}
        print(json.dumps(document, indent=1))
        return 0
    print(found)
    if figures:
        names = ", ".join(path.name for path in figures if path.suffix == ".png")
        print(f"figures ({names}) in {command.plot}")
    return 0


def _ledgers(command: Memory, several: bool, model: str, method: str | None, settings: dict[str, Any]) -> Any:
    """Return what is to be printed."""
    from minilora.memory.budget import FIT_METHODS, fit
    from minilora.memory.compare import check_taken, compare
    from minilora.memory.planner import plan
    from minilora.memory.published import published

    if command.published:
        return published()
    if several:
        return compare(model, command.compare, **settings)
    if command.fit is not None:
        methods = FIT_METHODS if method is None else (method,)
        own = dict(settings)
        ranks = (own.pop("r"),) if "r" in own else None
        return fit(command.fit, model, methods, ranks, progress=True, **own)
    check_taken(settings, (method or "lora",))
    return plan(model, method=method or "lora", **settings)


def info(command: Info, named: Collection[str]) -> int:
    """Print versions, libraries and threads."""
    import importlib.metadata as md

    from threadpoolctl import threadpool_info

    from minilora.kernels import describe
    from minilora.sweep.environment import environment
    from minilora.threads import available_threads

    for name, value in environment().items():
        print(f"{name:<16} {value}")
    for package in ("matplotlib", "safetensors", "tqdm", "tyro", "threadpoolctl", "llvmlite"):
        print(f"{package:<16} {md.version(package)}")
    for library in threadpool_info():
        details = " ".join(str(library.get(name, "")) for name in ("internal_api", "version", "architecture"))
        print(f"{library['user_api']:<16} {details}")
    print(f"{'threads':<16} {available_threads()} (shards of a batch, one BLAS thread each)")
    for name, value in describe().items():
        print(f"{name:<16} {value}")
    return 0
