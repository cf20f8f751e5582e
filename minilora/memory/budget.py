"""What fits into a given memory: methods, bits and ranks, each with the largest batch that it can train."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from tqdm import tqdm

from minilora.building import parameter_shapes
from minilora.composed import PlanConfig
from minilora.config import ADAPTERS, expand_modules, matches, require
from minilora.memory.compare import check_methods, check_taken, settings_of
from minilora.memory.counting import format_bytes
from minilora.memory.ledger import Ledger
from minilora.memory.measure import trainer_bytes
from minilora.memory.planner import model_shape, plan
from minilora.tables import html_table, text_table

UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", 1)
    for base, ends in ((1000, ("", "b")), (1024, ("i", "ib")))
    for end in ends
}
FIT_METHODS = ("full", "lora", "qlora", "qalora")
RANKS = (8, 64)
BITS = {"qlora": (4, 3, 2), "qalora": (8, 4, 3, 2)}
MOST = 4096
"""About the largest batch that is looked for."""
HELP: dict[str, Any] = {
    "gradient_checkpointing": True,
    "logits_chunk": 256,
    "optimizer": "paged_adamw_8bit",
    "context": 128,
}
"""What takes less memory for the same model, from the least that is given up to the most."""


def parse_size(text: str | int | float) -> int:
    """Bytes of a size: ``8GB`` and ``8G`` are 8·10⁹ as on a disk's label, ``8GiB`` and ``8Gi`` 8·2³⁰; a plain
    number is bytes.

    >>> parse_size("8GB"), parse_size("1.5 gib"), parse_size("8e9"), parse_size(4096)
    (8000000000, 1610612736, 8000000000, 4096)
    >>> parse_size("lots")
    Traceback (most recent call last): minilora.config.ConfigError: fit='lots': a size above zero, such as 8GB
    (8·10⁹ bytes), 8GiB (8·2³⁰), 512M or 8e9
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(e[+]?\d{1,2})?\s*([a-z]*)\s*", str(text).lower(), re.ASCII)
    size = float(found[1] + (found[2] or "")) * UNITS.get(found[3], 0) if found else 0.0
    require(
        not isinstance(text, bool) and 1 <= size < 2**63,
        "fit",
        text,
        "a size above zero, such as 8GB (8·10⁹ bytes), 8GiB (8·2³⁰), 512M or 8e9",
    )
    return int(size)


@dataclass(frozen=True)
class FitRow:
    """One setting: the largest ``batch`` that fits (0: none) and the bytes that this, or with 0 a batch of
    one, ``needs``."""

    method: str
    weights: str
    r: int | None
    batch: int
    needs: int


@dataclass(frozen=True, repr=False)
class Fit:
    """What fits into ``limit`` bytes, of which ``own`` are Python's and its libraries'; ``ranks``: method →
    largest r at batch 1.

    ``most_r``: the largest rank that the model takes · ``advice``: where nothing fits, what would help → what
    the least of the settings needs with this and all before it.
    """

    title: str
    limit: int
    own: int
    context: int
    rows: tuple[FitRow, ...]
    ranks: dict[str, int]
    most_r: int
    advice: dict[str, int]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(heads, rows)."""
        rows = [["Python and its libraries", "", "", "", f"{self.own:,}", format_bytes(self.own), ""]]
        for row in self.rows:
            left = self.limit - row.needs
            verdict = (
                f"{format_bytes(left)} left" if row.batch else f"{format_bytes(-left)} too much at batch 1"
            )
            batch = f"{row.batch:,}" + " or more" * (row.batch >= MOST)
            rows.append(
                [
                    row.method,
                    row.weights,
                    str(row.r or ""),
                    batch,
                    f"{row.needs:,}",
                    format_bytes(row.needs),
                    verdict,
                ]
            )
        return ["method", "weights", "r", "largest batch", "needs, Python included", "", ""], rows

    def notes(self) -> list[str]:
        """The largest of each kind; or what would help."""
        fitting = [row for row in self.rows if row.batch]
        if fitting:
            lines = []
            for method in dict.fromkeys(row.method for row in fitting):
                best = max((row for row in fitting if row.method == method), key=lambda row: row.batch)
                rank = f" r = {best.r}" if best.r else ""
                lines.append(
                    f"largest batch of {method}: {best.batch:,} × {self.context} tokens, with {best.weights}{rank}"
                )
            lines += [
                f"largest rank of {name}: {r:,} at batch 1"
                + ", the most that this model takes" * (r >= self.most_r)
                for name, r in self.ranks.items()
            ]
            return [
                *lines,
                "needs: the bound of all workers at once, 2 % for Python's objects included; judging texts after "
                "training may take more",
            ]
        least = min(self.rows, key=lambda row: row.needs)
        what, needs = f"{least.method} {least.weights}", format_bytes(least.needs)
        lines = [f"Nothing fits. The least, {what}, needs {needs} at batch 1; with, one after another,"]
        for option, n in self.advice.items():
            lines.append(f"  {option}: {n:,} ({format_bytes(n)})" + ", which fits" * (n <= self.limit))
            if n <= self.limit:
                break
        if not any(needs <= self.limit for needs in self.advice.values()):
            lines.append("None of that is enough: take a smaller model, or more memory.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([self.title, "", text_table(*self.table()), "", *self.notes()])

    __repr__ = __str__  # a prompt shows the table

    def _repr_html_(self) -> str:
        notes = "<br>".join(map(html.escape, self.notes()))
        return html_table(self.title, *self.table()) + f"<p>{notes}</p>"


def fit(
    limit: int | str,
    model: str = "tiny",
    methods: Sequence[str] = FIT_METHODS,
    ranks: Sequence[int] | None = None,
    *,
    own: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> Fit:
    """Which methods, bits and ranks train in ``limit`` bytes, and the largest batch of each.

    What a run needs is the bound of its ledger with a worker for each shard, as the trainer runs, and
    ``own``: what Python and the libraries take; default: what this process has in memory, kernels loaded.
    ``settings`` are fields of PlanConfig; ``bits`` or ``quant_type`` narrow the search. Raises ConfigError
    for a size or settings that cannot be.

    >>> found = fit("24GB", "llama-7b", ["lora", "qlora"], [64], own=10**8, bits=4)
    >>> [(row.method, row.weights, row.batch) for row in found.rows]
    [('lora', 'float32', 0), ('qlora', 'nf4', 2)]
    """
    size = parse_size(limit)
    check_methods(methods, "method")
    require(
        "batch_size" not in settings,
        "batch_size",
        settings.get("batch_size"),
        "is what fit looks for; leave it out",
    )
    check_taken([*settings, *(["r"] if ranks else [])], methods)
    require(len(set(ranks or ())) == len(ranks or ()), "ranks", ranks, "names a rank twice; once is enough")
    own = trainer_bytes() if own is None else own
    highest_r = most_r(model, settings)
    configs = list(
        _grid(model, methods, ranks or [r for r in RANKS if r <= highest_r] or [highest_r], settings)
    )
    needs = _Needs(own)
    rows, slopes = [], dict[tuple[str, int], int]()
    for c in tqdm(configs, desc="looking for what fits", unit="setting", disable=None if progress else True):
        rows.append(_row(c, size, needs, slopes))
    if not any(row.batch for row in rows):
        least = configs[min(range(len(rows)), key=lambda i: rows[i].needs)]
        return _result(model, size, own, configs[0], rows, {}, highest_r, _advice(least, needs))
    highest: dict[str, int] = {}
    fitting = {
        c.method: c for c, row in zip(reversed(configs), reversed(rows), strict=True) if row.batch and row.r
    }
    for c in reversed(fitting.values()) if ranks is None else ():
        highest[f"{c.method} {c.quant_type or c.dtype}"] = _largest(
            partial(_of_rank, c, needs), size, highest_r, c.r
        )
    return _result(model, size, own, configs[0], rows, highest, highest_r, {})


def _result(
    model: str,
    size: int,
    own: int,
    c: PlanConfig,
    rows: list[FitRow],
    ranks: dict[str, int],
    highest_r: int,
    advice: dict[str, int],
) -> Fit:
    context = c.context or min(512, model_shape(model)[0].context_length)
    title = f"{model} in {size:,} bytes ({format_bytes(size)}): batches of {context} tokens, {c.optimizer}"
    return Fit(title, size, own, context, tuple(rows), ranks, highest_r, advice)


def _grid(
    model: str, methods: Sequence[str], ranks: Sequence[int], settings: dict[str, Any]
) -> Iterator[PlanConfig]:
    for method in methods:
        own = settings_of(method, settings)
        asked = own.get("bits") or own.get("quant_type")
        for bits in (None,) if asked else BITS.get(method, (None,)):
            for r in ranks if method in ADAPTERS else (8,):
                yield PlanConfig(model, method, **own | {"r": r} | ({"bits": bits} if bits else {}))


class _Needs:
    """What a run needs with a worker for each shard, from the plan of the largest shard alone; each is made
    once."""

    def __init__(self, own: int):
        self.own, self.known = own, dict[PlanConfig, Ledger]()

    def __call__(self, c: PlanConfig, batch: int = 1) -> int:
        shards = min(c.shards, batch)
        largest = replace(c, batch_size=-(-batch // shards), shards=1)
        if largest not in self.known:
            self.known[largest] = plan(largest)
        return self.own + replace(self.known[largest], shards=shards).bound(shards)


def _row(c: PlanConfig, limit: int, needs: _Needs, slopes: dict[tuple[str, int], int]) -> FitRow:
    """The largest batch: whole sets of shards of k sequences each, or fewer sequences than shards."""

    def of_set(k: int) -> int:
        return needs(c, k * c.shards)

    if of_set(1) <= limit:
        k = _largest(of_set, limit, -(-MOST // c.shards), slope=slopes.get((c.method, c.r), 0))
        batch = k * c.shards
        if k > 1:  # the weights' bits change nothing in what a sequence takes
            slopes[c.method, c.r] = (of_set(k) - of_set(1)) // (k - 1)
    else:
        batch = max((b for b in range(1, c.shards) if needs(c, b) <= limit), default=0)
    r = c.r if c.method in ADAPTERS else None
    return FitRow(c.method, c.quant_type or c.dtype, r, batch, needs(c, batch or 1))


def _largest(need: Callable[[int], int], limit: int, most: int, start: int = 1, slope: int = 0) -> int:
    """The largest n of ``start`` (which fits) to ``most`` with need(n) ≤ limit, where need rises with n,
    nearly along a line.

    The line through what is known says where to look next, and by halves after that; ``slope`` is a first
    guess.
    """
    low, high = start, most + 1
    for probes in range(64 + most.bit_length()):
        if high - low <= 1:
            break
        step = (limit - need(low)) // slope if slope else low
        guess = min(low + max(step, 1), high - 1) if probes < 8 else (low + high) // 2
        value = need(guess)
        slope = max(1, (value - need(low)) // (guess - low))
        low, high = (guess, high) if value <= limit else (low, guess)
    return low


def _of_rank(c: PlanConfig, needs: _Needs, r: int) -> int:
    return needs(replace(c, r=r))


def most_r(model: str, settings: dict[str, Any]) -> int:
    """The largest rank that all targets take: the smaller side of the smallest."""
    targets = expand_modules(settings.get("target_modules", "all-linear"))
    sides = [
        min(size)
        for name, size in parameter_shapes(model_shape(model)[0]).items()
        if any(matches(name.removesuffix(".weight"), t) for t in targets)
    ]
    return min(sides, default=RANKS[0])  # without a module of that name, which plan refuses


def _advice(c: PlanConfig, needs: _Needs) -> dict[str, int]:
    """Option → what the plan needs with it and all before it; options that it has already are left out."""
    found: dict[str, int] = {}
    for name, value in HELP.items():
        if getattr(c, name) != value and not (name == "context" and (c.context or 512) <= value):
            more = replace(c, **{name: value})
            if needs(more) < needs(c):  # what has no effect here is no advice
                c = more
                flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                found[("and " if found else "") + flag] = needs(c)
    return found
