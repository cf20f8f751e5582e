"""Ledgers of several methods side by side, from one configuration; and which settings belong to which
method."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from minilora.config import (
    ADAPTERS,
    AFFINE_TYPES,
    CODEBOOK_TYPES,
    TRAINED,
    ConfigError,
    PlanConfig,
    require,
    require_in,
)
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
"""Settings that not every method has."""
WIDTH = 110
"""Characters of a line, up to which a table shows bytes in full."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Method → ledger; prints as one table, a column for each method."""

    ledgers: Mapping[str, Ledger]

    def table(self, full: bool = True) -> tuple[list[str], list[list[str]]]:
        """(heads, rows): the classes, the peak, and what belongs beside it; bytes in ``full``, or for a
        human."""
        ledgers, show = list(self.ledgers.values()), (lambda n: f"{n:,}") if full else format_bytes
        kinds = [x.by_kind() for x in ledgers]
        rows = [
            [kind, *(show(k[kind]) if kind in k else "" for k in kinds)]
            for kind in (*HELD, *PASSING)
            if any(kind in k for k in kinds)
        ]
        rows.append(["peak, one worker", *(show(x.peak) for x in ledgers)])
        if shards := max(x.shards for x in ledgers):
            rows += [[f"{shards} workers, at most", *(show(x.bound(shards)) for x in ledgers)]] * (shards > 1)
        if any(x.on_disk for x in ledgers):
            rows.append(["on disk", *(show(x.on_disk) for x in ledgers)])
        rows.append(["trainable parameters", *(f"{x.trainable:,}" for x in ledgers)])
        rows.append(["all parameters", *(f"{x.parameters:,}" for x in ledgers)])
        rows.append(["effective bits", *(f"{x.effective_bits:.3f}" for x in ledgers)])
        return ["bytes", *self.ledgers], rows

    def __getitem__(self, method: str) -> Ledger:
        return self.ledgers[method]

    def notes(self) -> list[str]:
        """What each column is."""
        return [x.title for x in self.ledgers.values()]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: method → its ledger."""
        return {method: ledger.to_dict() for method, ledger in self.ledgers.items()}

    def __str__(self) -> str:
        text = text_table(*self.table())
        if max(map(len, text.splitlines())) > WIDTH:
            text = text_table(*self.table(full=False))
        return "\n".join([*self.notes(), "", text])

    __repr__ = __str__  # a prompt shows the table

    def _repr_html_(self) -> str:
        notes = "<br>".join(map(html.escape, self.notes()))
        return f"<p>{notes}</p>" + html_table("Side by side", *self.table())


def compare(model: str = "tiny", methods: Sequence[str] = ("full", *ADAPTERS), **settings: Any) -> Comparison:
    """The ledger of each method with the same settings; one that a method does not take is left out of it.

    Raises ConfigError for a setting that none of the methods takes.

    >>> both = compare("llama-7b", ["lora", "qalora"], r=64, bits=3)
    >>> [ledger.trainable for ledger in both.ledgers.values()]
    [159907840, 89309184]
    """
    check_methods(methods, "compare")
    require(
        "method" not in settings,
        "method",
        settings.get("method"),
        "the methods to compare say it; leave it out",
    )
    check_taken(settings, methods)
    return Comparison({m: plan(PlanConfig(model, m, **settings_of(m, settings))) for m in methods})


def check_methods(methods: Sequence[str], field: str) -> None:
    """Raise unless each is a method, and named once."""
    require(len(methods) > 0, field, methods, "name at least one of " + ", ".join(TRAINED))
    for method in methods:
        require_in(method, TRAINED, field)
    require(
        len(set(methods)) == len(methods), field, " ".join(methods), "names a method twice; once is enough"
    )


def check_taken(settings: Iterable[str], methods: Collection[str]) -> None:
    """Raise ConfigError for a setting that none of the methods takes.

    >>> check_taken(["r", "bits"], ["full", "lora"])
    Traceback (most recent call last): minilora.config.ConfigError: bits: is for method qlora or qalora, not
    for full, lora; leave it out, or choose such a method
    """
    for name in settings:
        takers = TAKEN_BY.get(name, TRAINED)
        if not set(takers) & set(methods):
            raise ConfigError(
                f"{name}: is for method {' or '.join(takers)}, not for {', '.join(methods)}; leave it out, or "
                "choose such a method"
            )


def asked(c: PlanConfig, named: Collection[str]) -> dict[str, Any]:
    """The settings among the ``named`` options of a command line, ``no_`` before a switch that is off; not
    model and method.

    >>> asked(PlanConfig(r=4, double_quant=False), {"r", "no_double_quant", "json", "model"})
    {'r': 4, 'double_quant': False}
    """
    wanted = {name.removeprefix("no_") for name in named} - {"model", "method"}
    return {f.name: getattr(c, f.name) for f in fields(c) if f.name in wanted}


def settings_of(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a method takes; a ``quant_type`` of the other family is not for it.

    >>> settings_of("qalora", {"r": 4, "quant_type": "nf4", "block_size": 64, "context": 128})
    {'r': 4, 'context': 128}
    """
    found = {name: value for name, value in settings.items() if method in TAKEN_BY.get(name, TRAINED)}
    family = AFFINE_TYPES if method == "qalora" else CODEBOOK_TYPES
    known = AFFINE_TYPES + CODEBOOK_TYPES
    if found.get("quant_type") in known and found["quant_type"] not in family:
        del found["quant_type"]
    return found
