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
"""Unit of a size, in small letters → bytes."""

FIT_METHODS = ("full", "lora", "qlora", "qalora")
FIT_RANKS = (8, 64)
FIT_BITS = {"qlora": (4, 3, 2), "qalora": (8, 4, 3, 2)}

LARGEST_BATCH = 4096
"""About the largest batch that is looked for."""

SAVINGS: dict[str, Any] = {
    "gradient_checkpointing": True,
    "logits_chunk": 256,
    "optimizer": "paged_adamw_8bit",
    "context": 128,
}
"""Settings that take less memory for the same model; the first cost least."""


def parse_size(text: str | int | float) -> int:
    """Return the bytes of a size.

    `8GB` and `8G` are 8·10⁹ bytes, as on a disk's label; `8GiB` and `8Gi` are 8·2³⁰; a plain number is bytes.

    >>> parse_size("8GB"), parse_size("1.5 gib"), parse_size("8e9"), parse_size(4096)
    (8000000000, 1610612736, 8000000000, 4096)
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
    """One setting: the largest batch that fits, or 0, and the bytes that it, or a batch of 1, needs."""

    method: str
    weights: str
    r: int | None
    batch: int
    needs: int


@dataclass(frozen=True, repr=False)
class Fit:
    """What fits into some memory; prints as a table.

    Attributes
    ----------
    title : str
        What was asked for.
    limit : int
        Bytes there are.
    own : int
        Bytes of them that Python and its libraries take.
    context : int
        Tokens of a sequence.
    rows : tuple of FitRow
        Each setting that was tried.
    ranks : dict
        Method → largest r at batch 1.
    most_r : int
        Largest rank that the model takes.
    advice : dict
        Where nothing fits: a setting that helps → bytes that the least of the rows needs with it and all
        settings before it.
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
        """Return (heads, rows)."""
        rows = [["Python and its libraries", "", "", "", f"{self.own:,}", format_bytes(self.own), ""]]
        for row in self.rows:
            left, batch, rank = self.limit - row.needs, f"{row.batch:,}", str(row.r or "")
            verdict = f"{format_bytes(left)} left"
            if row.batch == 0:
                verdict = f"{format_bytes(-left)} too much at batch 1"
            if row.batch >= LARGEST_BATCH:
                batch += " or more"
            needs = f"{row.needs:,}", format_bytes(row.needs)
            rows.append([row.method, row.weights, rank, batch, *needs, verdict])
        return ["method", "weights", "r", "largest batch", "needs, Python included", "", ""], rows

    def notes(self) -> list[str]:
        """Return the largest of each kind, or what would help."""
        fitting = [row for row in self.rows if row.batch]
        return self._largest(fitting) if fitting else self._help()

    def _largest(self, fitting: list[FitRow]) -> list[str]:
        lines = []
        for method in dict.fromkeys(row.method for row in fitting):
            best = max((row for row in fitting if row.method == method), key=lambda row: row.batch)
            rank = f" r = {best.r}" if best.r else ""
            batch = f"{best.batch:,} × {self.context} tokens"
            lines.append(f"largest batch of {method}: {batch}, with {best.weights}{rank}")
        for name, r in self.ranks.items():
            most = ", the most that this model takes" if r >= self.most_r else ""
            lines.append(f"largest rank of {name}: {r:,} at batch 1{most}")
        return [
            *lines,
            "needs: the bound of all workers at once, with 2 % for Python's objects; scoring texts after "
            "training may take more",
        ]

    def _help(self) -> list[str]:
        least = min(self.rows, key=lambda row: row.needs)
        what, needs = f"{least.method} {least.weights}", format_bytes(least.needs)
        lines = [f"Nothing fits. The least, {what}, needs {needs} at batch 1; with, one after another,"]
        for option, n in self.advice.items():
            if n <= self.limit:
                return [*lines, f"  {option}: {n:,} ({format_bytes(n)}), which fits"]
            lines.append(f"  {option}: {n:,} ({format_bytes(n)})")
        return [*lines, "None of that is enough: take a smaller model, or more memory."]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
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
    """Find which methods, bits and ranks train in `limit` bytes, and the largest batch of each.

    A run needs the bound of its ledger with a worker for each shard, as the trainer runs, and `own`.

    Parameters
    ----------
    limit : int or str
        A size, as `parse_size` reads it.
    model : str
        As in PlanConfig.
    methods, ranks : sequence
        What to try; by default r = 8 and 64, and the largest rank is looked for too.
    own : int, optional
        Bytes that Python and its libraries take; by default what this process has, kernels loaded.
    progress : bool
        Show a bar.
    **settings
        Fields of PlanConfig. `bits` or `quant_type` narrow the search.

    Raises
    ------
    ConfigError
        For a size or settings that cannot be.

    Examples
    --------
    >>> found = fit("24GB", "llama-7b", ["lora", "qlora"], [64], own=10**8, bits=4)
    >>> [(row.method, row.weights, row.batch) for row in found.rows]
    [('lora', 'float32', 0), ('qlora', 'nf4', 2)]
    """
    size = parse_size(limit)
    check_methods(methods, "method")
    batch = settings.get("batch_size")
    require("batch_size" not in settings, "batch_size", batch, "is what fit looks for; leave it out")
    check_taken([*settings, *(["r"] if ranks else [])], methods)
    require(len(set(ranks or ())) == len(ranks or ()), "ranks", ranks, "names a rank twice; once is enough")
    own = trainer_bytes() if own is None else own
    highest_r = most_r(model, settings)
    tried = ranks or [r for r in FIT_RANKS if r <= highest_r] or [highest_r]
    configs, needs = list(_grid(model, methods, tried, settings)), _Needs(own)
    rows, slopes = [], dict[tuple[str, int], int]()
    for c in tqdm(configs, desc="looking for what fits", unit="setting", disable=None if progress else True):
        rows.append(_row(c, size, needs, slopes))
    largest_ranks: dict[str, int] = {}
    advice: dict[str, int] = {}
    if not any(row.batch for row in rows):
        advice = _advice(configs[min(range(len(rows)), key=lambda i: rows[i].needs)], needs)
    elif ranks is None:
        # of each method, the first setting that fits with an adapter
        first: dict[str, PlanConfig] = {}
        for c, row in zip(configs, rows, strict=True):
            if row.batch and row.r:
                first.setdefault(c.method, c)
        for c in first.values():
            found = _largest(partial(_needs_with_rank, c, needs), size, highest_r, c.r)
            largest_ranks[f"{c.method} {c.quant_type or c.dtype}"] = found
    context = configs[0].context or min(512, model_shape(model)[0].context_length)
    title = f"{model} in {size:,} bytes ({format_bytes(size)}): batches of {context} tokens"
    title += f", {configs[0].optimizer}"
    return Fit(title, size, own, context, tuple(rows), largest_ranks, highest_r, advice)


def _grid(
    model: str, methods: Sequence[str], ranks: Sequence[int], settings: dict[str, Any]
) -> Iterator[PlanConfig]:
    """Yield the settings to try."""
    for method in methods:
        own = settings_of(method, settings)
        narrowed = own.get("bits") or own.get("quant_type")
        for bits in (None,) if narrowed else FIT_BITS.get(method, (None,)):
            if bits is not None:
                own["bits"] = bits
            for r in ranks if method in ADAPTERS else (8,):
                yield PlanConfig(model, method, **own | {"r": r})


class _Needs:
    """What a run needs with a worker for each shard, from the plan of the largest shard alone, made once."""

    def __init__(self, own: int):
        self.own, self.known = own, dict[PlanConfig, Ledger]()

    def __call__(self, c: PlanConfig, batch: int = 1) -> int:
        shards = min(c.shards, batch)
        largest = replace(c, batch_size=-(-batch // shards), shards=1)
        if largest not in self.known:
            self.known[largest] = plan(largest)
        return self.own + replace(self.known[largest], shards=shards).bound(shards)


def _row(c: PlanConfig, limit: int, needs: _Needs, slopes: dict[tuple[str, int], int]) -> FitRow:
    """Find the largest batch: k sequences for each shard, or fewer sequences than shards."""

    def with_shards_of(k: int) -> int:
        return needs(c, k * c.shards)

    if with_shards_of(1) <= limit:
        slope = slopes.get((c.method, c.r), 0)
        k = _largest(with_shards_of, limit, -(-LARGEST_BATCH // c.shards), slope=slope)
        batch = k * c.shards
        if k > 1:  # the weights' bits change nothing in what a sequence takes
            slopes[c.method, c.r] = (with_shards_of(k) - with_shards_of(1)) // (k - 1)
    else:
        batch = max((b for b in range(1, c.shards) if needs(c, b) <= limit), default=0)
    r = c.r if c.method in ADAPTERS else None
    return FitRow(c.method, c.quant_type or c.dtype, r, batch, needs(c, batch or 1))


def _largest(need: Callable[[int], int], limit: int, most: int, start: int = 1, slope: int = 0) -> int:
    """Find the largest n from `start`, which fits, to `most` with need(n) ≤ limit.

    `need` rises with n, nearly along a line. The line through what is known says where to look next, and
    halving does after a few tries; `slope` is a first guess.
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


def _needs_with_rank(c: PlanConfig, needs: _Needs, r: int) -> int:
    return needs(replace(c, r=r))


def most_r(model: str, settings: dict[str, Any]) -> int:
    """Return the largest rank that all targets take: the smaller side of the smallest."""
    targets = expand_modules(settings.get("target_modules", "all-linear"))
    sides = [
        min(size)
        for name, size in parameter_shapes(model_shape(model)[0]).items()
        if any(matches(name.removesuffix(".weight"), t) for t in targets)
    ]
    return min(sides, default=FIT_RANKS[0])  # plan refuses a target that matches no module


def _advice(c: PlanConfig, needs: _Needs) -> dict[str, int]:
    """Return option → what the plan needs with it and all before it, for options that have an effect."""
    found: dict[str, int] = {}
    for name, value in SAVINGS.items():
        has_it = getattr(c, name) == value
        if name == "context":
            has_it = (c.context or 512) <= value
        more = replace(c, **{name: value})
        if has_it or needs(more) >= needs(c):
            continue
        c = more
        flag = f"--{name.replace('_', '-')}"
        if value is not True:
            flag += f" {value}"
        found[f"and {flag}" if found else flag] = needs(c)
    return found
