"""Ledgers of several methods side by side, from one configuration."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from minilora.composed import PlanConfig
from minilora.config import ADAPTERS, AFFINE_TYPES, CODEBOOK_TYPES, TRAINED, ConfigError, require, require_in
from minilora.memory.counting import format_bytes
from minilora.memory.ledger import HELD, PASSING, Ledger
from minilora.memory.planner import plan
from minilora.tables import html_table, text_table

TAKEN_BY = {
    "r": ADAPTERS,
    "target_modules": ADAPTERS,
    "lora_dropout": ADAPTERS,
    "use_dora": ("lora", "qlora"),
    "bits": ("qlora", "qalora"),
    "quant_type": ("qlora", "qalora"),
    "block_size": ("qlora",),
    "double_quant": ("qlora",),
    "group_size": ("qalora",),
    "subset_modules": ("subset",),
}
"""Setting → the methods that take it, for settings that some methods lack."""
LINE_WIDTH = 110
"""A wider table shows bytes as kB, MB or GB, in characters per line."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Ledgers by method, which print as one table with a column for each."""

    ledgers: Mapping[str, Ledger]

    def table(self, full: bool = True) -> tuple[list[str], list[list[str]]]:
        """Return (heads, rows): bytes by kind, peaks and counts; `full` shows every digit of bytes."""
        ledgers = list(self.ledgers.values())
        show = "{:,}".format if full else format_bytes
        kinds = [x.by_kind() for x in ledgers]
        rows = []
        for kind in (*HELD, *PASSING):
            if any(kind in k for k in kinds):
                rows.append([kind, *(show(k[kind]) if kind in k else "" for k in kinds)])
        rows.append(["peak, one worker", *(show(x.peak) for x in ledgers)])
        shards = max(x.shards for x in ledgers)
        if shards > 1:
            rows.append([f"{shards} workers, at most", *(show(x.bound(shards)) for x in ledgers)])
        if any(x.on_disk for x in ledgers):
            rows.append(["on disk", *(show(x.on_disk) for x in ledgers)])
        rows.append(["trainable parameters", *(f"{x.trainable:,}" for x in ledgers)])
        rows.append(["all parameters", *(f"{x.parameters:,}" for x in ledgers)])
        rows.append(["effective bits", *(f"{x.effective_bits:.3f}" for x in ledgers)])
        return ["bytes", *self.ledgers], rows

    def __getitem__(self, method: str) -> Ledger:
        return self.ledgers[method]

    def notes(self) -> list[str]:
        """Return a line for each column that says what it is."""
        return [x.title for x in self.ledgers.values()]

    def to_dict(self) -> dict[str, Any]:
        """Return the ledgers as JSON values, by method."""
        return {method: ledger.to_dict() for method, ledger in self.ledgers.items()}

    def __str__(self) -> str:
        text = text_table(*self.table())
        if max(map(len, text.splitlines())) > LINE_WIDTH:
            text = text_table(*self.table(full=False))
        return "\n".join([*self.notes(), "", text])

    __repr__ = __str__  # a prompt shows the table

    def _repr_html_(self) -> str:
        notes = "<br>".join(map(html.escape, self.notes()))
        return f"<p>{notes}</p>" + html_table("Side by side", *self.table())


def compare(model: str = "tiny", methods: Sequence[str] = ("full", *ADAPTERS), **settings: Any) -> Comparison:
    """Plan several methods with the same settings.

    Parameters
    ----------
    model : str
        As in `plan`.
    methods : sequence of str
        The methods to compare.
    **settings
        Fields of PlanConfig. A method that does not take one is planned without it.

    Raises
    ------
    ConfigError
        None of the methods takes a setting, or a method is unknown or named twice.

    Examples
    --------
    >>> both = compare("llama-7b", ["lora", "qalora"], r=64, bits=3)
    >>> [ledger.trainable for ledger in both.ledgers.values()]
    [159907840, 89309184]
    """
    check_methods(methods, "compare")
    require(
        "method" not in settings,
        "method",
        settings.get("method"),
        "leave it out: `methods` names what is compared",
    )
    check_taken(settings, methods)
    return Comparison({m: plan(PlanConfig(model, m, **settings_of(m, settings))) for m in methods})


def check_methods(methods: Sequence[str], field: str) -> None:
    """Raise ConfigError unless each is a known method, and named once."""
    require(len(methods) > 0, field, methods, "name at least one of " + ", ".join(TRAINED))
    for method in methods:
        require_in(method, TRAINED, field)
    require(
        len(set(methods)) == len(methods), field, " ".join(methods), "names a method twice; once is enough"
    )


def check_taken(settings: Iterable[str], methods: Collection[str]) -> None:
    """Raise ConfigError for a setting that none of the methods takes.

    Examples
    --------
    >>> check_taken(["bits"], ["full", "lora"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    minilora.config.ConfigError: bits: is for method qlora or qalora, not for full, lora; leave it out, ...
    """
    for name in settings:
        takers = TAKEN_BY.get(name, TRAINED)
        if not set(takers) & set(methods):
            raise ConfigError(
                f"{name}: is for method {' or '.join(takers)}, not for {', '.join(methods)}; leave it out, "
                "or choose such a method"
            )


def asked(c: PlanConfig, named: Collection[str]) -> dict[str, Any]:
    """Return the settings that a command line names, without model and method.

    Parameters
    ----------
    c : PlanConfig
        The parsed command line.
    named : collection of str
        Names of its options; a switch that is off has `no_` before its name.

    Examples
    --------
    >>> asked(PlanConfig(r=4, double_quant=False), {"r", "no_double_quant", "json", "model"})
    {'r': 4, 'double_quant': False}
    """
    wanted = {name.removeprefix("no_") for name in named} - {"model", "method"}
    return {f.name: getattr(c, f.name) for f in fields(c) if f.name in wanted}


def settings_of(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a method takes, without a `quant_type` of the other family.

    Examples
    --------
    >>> settings_of("qalora", {"r": 4, "quant_type": "nf4", "block_size": 64, "context": 128})
    {'r': 4, 'context': 128}
    """
    found = {name: value for name, value in settings.items() if method in TAKEN_BY.get(name, TRAINED)}
    family = AFFINE_TYPES if method == "qalora" else CODEBOOK_TYPES
    known = AFFINE_TYPES + CODEBOOK_TYPES
    if found.get("quant_type") in known and found["quant_type"] not in family:
        del found["quant_type"]
    return found
