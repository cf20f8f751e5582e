"""The ledger: every byte of a model in training by class, by layer and by reason, as it stands at the peak of
a step.

The same table comes from a real model (``measure``) and from a configuration alone (``plan``); see their
modules.
"""

from __future__ import annotations

import html
import linecache
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from minilora.adapter import Adapter
from minilora.memory.counting import adapter_parameters, buffer_of, format_bytes
from minilora.memory.shapes import Buffer, ShapeArray
from minilora.parameters import DenseWeight, Parameter
from minilora.tables import html_table, text_table
from minilora.transformer import Transformer

HELD = {
    "weights": "dense",
    "codes": "packed weights",
    "scales": "of groups, float16",
    "offsets": "of groups",
    "absmax": "scales of codebook blocks",
    "nested": "scales of the quantized absmax",
    "code maps": "tables that all weights share",
    "adapters": "A and B",
    "optimizer": "running means of the gradients",
    "tiles": "scratch for decoded weights, one a worker",
}
"""Classes that outlast a step."""

PASSING = {
    "gradients": "one array for each that trains, for each shard",
    "activations": "kept by the forward pass",
    "recomputed": "of the half of a block at work",
    "logits": "rows × vocabulary",
    "temporaries": "of the operation at the peak",
    "objects": "arrays as Python's objects, data apart",
}
"""Classes that come and go within a step."""

COLUMNS = {
    "scales …": ("scales", "offsets", "absmax", "nested", "code maps"),
    "scratch": ("tiles", "temporaries", "objects"),
}
COLUMN = {kind: column for column, kinds in COLUMNS.items() for kind in kinds}
"""Classes that share a column of the table by layer."""
WIDTH = 120
"""Characters of a line, up to which that table shows bytes in full."""


ADAPTER_ARRAYS = {"row_squares": "squared length of each row of W, for DoRA"}
"""What the arrays of an adapter are that are no parameters; others go by the attribute's name."""


@dataclass(frozen=True)
class Entry:
    """Bytes of one class in one layer, and what they are."""

    kind: str
    layer: str
    what: str
    nbytes: int


@dataclass(frozen=True, repr=False)
class Ledger:
    """Bytes of a training step; ``peak`` is the sum of the ``entries``: what outlasts a step, and what else
    lives at the peak.

    ``kept``: all that the forward pass of the largest shard keeps, by reason · ``shard``: the most that this
    shard adds to what outlasts a step, its gradients included · ``gradients``: of one shard ·
    ``accumulated``: the sum of earlier batches' · ``measured``: the peak as tracemalloc saw it, if it did ·
    ``resident`` and ``resident_peak``: the whole process's memory as the system counts it.
    """

    title: str
    entries: tuple[Entry, ...]
    kept: tuple[Entry, ...]
    moment: str
    trainable: int
    parameters: int
    effective_bits: float
    shards: int
    shard: int
    gradients: int
    accumulated: int = 0
    on_disk: int = 0
    measured: int | None = None
    resident: int | None = None
    resident_peak: int | None = None

    @property
    def held(self) -> int:
        """What outlasts a step."""
        return sum(e.nbytes for e in self.entries if e.kind in HELD)

    @property
    def rise(self) -> int:
        """What a step of one worker adds to that at its peak."""
        return sum(e.nbytes for e in self.entries if e.kind in PASSING)

    @property
    def peak(self) -> int:
        """The most that a step of one worker holds at once."""
        return self.held + self.rise

    def bound(self, workers: int) -> int:
        """At most so much with several workers: each in the worst moment of the largest shard at once, and a
        tile for each.

        A shard that is done, or waits, has its gradients at most; gradient accumulation has a sum of earlier
        ones. Beside what is in the entries each worker may have 2 %, or 64 KiB, of Python's own objects and
        of buffers inside NumPy.
        """
        at_once = min(workers, self.shards)
        tiles = sum(e.nbytes for e in self.entries if e.kind == "tiles")
        waiting = (self.shards - at_once) * self.gradients + self.accumulated
        shards = (at_once - 1) * tiles + at_once * _and_unseen(self.shard) + waiting
        return self.held + max(shards, _and_unseen(self.rise))

    def by_kind(self) -> dict[str, int]:
        """Class → bytes, in the order of the tables; classes without bytes are left out."""
        sums = {kind: sum(e.nbytes for e in self.entries if e.kind == kind) for kind in (*HELD, *PASSING)}
        return {kind: n for kind, n in sums.items() if n}

    def by_layer(self) -> dict[str, dict[str, int]]:
        """Layer (a block, the embedding, …) → class → bytes."""
        found: dict[str, dict[str, int]] = {}
        for e in sorted(self.entries, key=lambda e: _place(e.layer)):
            row = found.setdefault(_block(e.layer), {})
            row[e.kind] = row.get(e.kind, 0) + e.nbytes
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        first = {
            "title": self.title,
            "peak": self.peak,
            "bound": self.bound(self.shards),
            "held": self.held,
            "by_kind": self.by_kind(),
        }
        return first | asdict(self) | {"by_layer": self.by_layer()}

    # ---- tables

    def tables(self, full: bool = True) -> list[tuple[str, list[str], list[list[str]]]]:
        """(caption, heads, rows) of the three tables; by layer in bytes, or, not ``full``, in units that take
        less room."""
        kinds = self.by_kind()
        rows = [
            [kind, f"{n:,}", format_bytes(n), f"{100 * n / self.peak:.1f} %", (HELD | PASSING)[kind]]
            for kind, n in kinds.items()
        ]
        rows.append(
            ["peak", f"{self.peak:,}", format_bytes(self.peak), "100.0 %", f"one worker; {self.moment}"]
        )
        if self.shards > 1:
            bound = self.bound(self.shards)
            rows.append(
                [
                    f"{self.shards} workers",
                    f"{bound:,}",
                    format_bytes(bound),
                    f"{100 * bound / self.peak:.1f} %",
                    "at most, a shard each at its worst moment",
                ]
            )
        if self.measured is not None:
            off, share = self.measured - self.peak, 100 * self.measured / self.peak
            rows.append(
                [
                    "measured",
                    f"{self.measured:,}",
                    format_bytes(self.measured),
                    f"{share:.1f} %",
                    f"by tracemalloc; {off:+,} are Python's own objects and buffers inside NumPy",
                ]
            )
        by_class = ("By class", ["class", "bytes", "", "share", "what"], rows)
        columns = list(dict.fromkeys(COLUMN.get(kind, kind) for kind in kinds))
        layers = []
        for name, row in _alike(self.by_layer()):
            sums = [
                sum(n for kind, n in row.items() if COLUMN.get(kind, kind) == column) for column in columns
            ]
            layers.append([name, *((f"{n:,}" if full else format_bytes(n)) if n else "" for n in sums)])
        by_layer = ("By layer", ["layer", *columns], layers)
        reasons = [
            [what, f"{n:,}", str(times), f"{n * times:,}"]
            for what, n, times in _same_in_all_blocks(self.kept)
        ]
        reasons.append(["all", "", "", f"{sum(e.nbytes for e in self.kept):,}"])
        shard = f"What the forward pass of {'the batch' if self.shards == 1 else f'one shard of {self.shards}'} keeps, and why"
        return [by_class, by_layer, (shard, ["array", "bytes", "×", "together"], reasons)]

    def notes(self) -> list[str]:
        """What belongs beside the tables."""
        lines = [
            f"trainable params: {self.trainable:,d} || all params: {self.parameters:,d} || "
            f"trainable%: {100 * self.trainable / self.parameters:.4f}",
            f"effective bits of a block's weight: {self.effective_bits:.3f}",
        ]
        if self.on_disk:
            lines.append(
                f"on disk: {self.on_disk:,} of optimizer state, paged ({format_bytes(self.on_disk)})"
            )
        if self.resident is not None:
            high = (
                "" if self.resident_peak is None else f", at most {format_bytes(self.resident_peak)} so far"
            )
            lines.append(
                f"this process as the system sees it, Python and its libraries included: "
                f"{format_bytes(self.resident)}{high}"
            )
        return lines

    def short(self) -> str:
        """One line."""
        parts = " · ".join(
            f"{kind} {format_bytes(n)}" for kind, n in self.by_kind().items() if n >= self.peak / 1000
        )
        total = f"peak of one worker {format_bytes(self.peak)}"
        if self.measured is not None:
            total = f"peak of one worker {format_bytes(self.measured)}, {format_bytes(self.peak)} explained"
        if self.shards > 1:
            total += f"; {self.shards} workers at most {format_bytes(self.bound(self.shards))}"
        if self.on_disk:
            total += f"; on disk {format_bytes(self.on_disk)}"
        return f"{parts} · {total}"

    def __str__(self) -> str:
        by_class, by_layer, kept = (
            f"{caption}\n{text_table(heads, rows)}" for caption, heads, rows in self.tables()
        )
        if max(map(len, by_layer.splitlines())) > WIDTH:
            caption, heads, rows = self.tables(full=False)[1]
            by_layer = f"{caption}\n{text_table(heads, rows)}"
        return "\n".join([self.title, *self.notes(), f"\n{by_class}\n\n{by_layer}\n\n{kept}"])

    __repr__ = __str__  # a prompt shows the table

    def _repr_html_(self) -> str:
        notes = "".join(f"<br/>{html.escape(line)}" for line in self.notes())
        tables = "".join(html_table(caption, heads, rows) for caption, heads, rows in self.tables())
        return f"<p><b>{html.escape(self.title)}</b>{notes}</p>{tables}"


def _and_unseen(nbytes: int) -> int:
    return nbytes + max(64 * 1024, nbytes // 50)


# ---- entries


def held_entries(
    model: Transformer, states: dict[str, Any] | None = None, maps: Sequence[Any] = ()
) -> list[Entry]:
    """What a model, real or without data, and its optimizer's ``states`` and code ``maps`` hold: each buffer
    once."""
    seen: set[int] = set()
    entries: list[Entry] = []

    def add(kind: str, layer: str, what: str, array: Any) -> None:
        buffer = buffer_of(array)
        if id(buffer) not in seen:
            seen.add(id(buffer))
            entries.append(Entry(kind, layer.removeprefix("model."), what, buffer.nbytes))

    weights = [(model.embedding.name, model.embedding.weight)]
    weights += [(name, linear.base.weight) for name, linear in model.linears()]
    for layer, weight in weights:
        if isinstance(weight, DenseWeight):
            continue  # among the parameters
        nested = weight.arrays()["scales"][1:]
        for kind, arrays in weight.arrays().items():
            for array in arrays:
                name = "nested" if any(array is a for a in nested) else kind.replace("_", " ")
                if name == "scales" and (nested or array.dtype.itemsize != 2):
                    name = "absmax"
                add(
                    name, "shared" if kind == "code_maps" else layer, getattr(weight, "quant_type", ""), array
                )
    own = adapter_parameters(model)
    for p in model.parameters():
        layer = p.name.removesuffix(".weight")
        if p in own:
            layer, _, part = layer.rpartition(".")
            add("adapters", layer, part, p.data)
        else:
            add("weights", layer, str(p.data.dtype), p.data)
    for _, linear in model.linears():
        if isinstance(linear, Adapter):
            for name, value in vars(linear).items():
                if isinstance(value, np.ndarray | ShapeArray):
                    add("adapters", linear.name, ADAPTER_ARRAYS.get(name, name), value)
    for array in maps:
        add("code maps", "shared", "of 8-bit states", array)
    for name, array in (states or {}).items():
        layer = name.split(".", 1)[1].removesuffix(".weight").partition(".lora_")[0]
        add("optimizer", layer, name.split(".", 1)[0], array)
    return entries


def passing_entries(buffers: Iterable[Buffer]) -> list[Entry]:
    """Entries of what lived at a moment of a step."""
    return [
        Entry(b.kind or "temporaries", b.owner, b.reason or _source(b), b.nbytes) for b in buffers if b.nbytes
    ]


def name_gradients(log: Sequence[Buffer], trainable: Sequence[Parameter]) -> None:
    """Say of each gradient whose it is: they are made in the order of the parameters, for one shard after
    another."""
    made = [b for b in log if b.site.startswith("layers.Gradients.__init__")]
    for i, buffer in enumerate(made):
        name = trainable[i % len(trainable)].name
        buffer.kind, buffer.reason = "gradients", f"of {name.rsplit('.', 2)[-2]}"
        buffer.owner = name.removesuffix(".weight").partition(".lora_")[0].removeprefix("model.")


def kept_entries(kept: Iterable[tuple[Any, str, str]], skip: set[int]) -> list[Entry]:
    """One entry for each buffer that a cache keeps, those of ``skip`` (the parameters') left out; who shares
    it is said."""
    found: dict[int, tuple[str, str, int, list[str]]] = {}
    for array, layer, reason in kept:
        buffer = buffer_of(array)
        if id(buffer) in skip:
            continue
        if id(buffer) in found:
            if layer not in found[id(buffer)][3] and layer != found[id(buffer)][0]:
                found[id(buffer)][3].append(layer)
        else:
            found[id(buffer)] = (layer, reason, buffer.nbytes, [])
    entries = []
    for layer, reason, nbytes, others in found.values():
        shared = f"; shared with {', '.join(o.rsplit('.', 1)[-1] if _block(o) == _block(layer) else o for o in others)}"
        entries.append(Entry("activations", layer, reason + (shared if others else ""), nbytes))
    return entries


def _source(buffer: Buffer) -> str:
    """The line of source that made a temporary."""
    module, _, function = buffer.site.partition(".")
    while (
        f"minilora.{module}" not in sys.modules
        or f"minilora.{module}.{function.split('.')[0]}" in sys.modules
    ):
        part, _, function = function.partition(".")
        if not function:
            return buffer.site
        module = f"{module}.{part}"
    line = (
        linecache.getline(sys.modules[f"minilora.{module}"].__file__ or "", buffer.line).split("#")[0].strip()
    )
    return f"{function}: {line}" if line else function


# ---- depth and order


def _place(layer: str) -> tuple[int, str]:
    number = re.match(r"layers\.(\d+)", layer)
    if number:
        return int(number[1]), ""
    return (-1, "") if layer == "embed_tokens" else (10**9, layer)


def _block(layer: str) -> str:
    number = re.match(r"layers\.\d+", layer)
    return number[0] if number else layer or "step"


def deepen(entries: Iterable[Entry], depth: int, to: int) -> list[Entry]:
    """Entries of a model of ``depth`` like blocks as those of one with ``to``: the second block stands for
    all in the middle."""
    found = []
    for e in entries:
        number = re.match(r"layers\.(\d+)", e.layer)
        i = int(number[1]) if number else 0
        if not number or i == 0:
            found.append(e)
        elif i == depth - 1:
            found.append(replace(e, layer=_moved(e.layer, to - 1)))
        elif i == 1:
            found += [replace(e, layer=_moved(e.layer, j)) for j in range(1, to - 1)]
    return found


def _moved(layer: str, i: int) -> str:
    return re.sub(r"^layers\.\d+", f"layers.{i}", layer)


def _alike(rows: dict[str, dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """Neighbouring blocks of the same bytes as one row: layers 0-30 each."""
    found: list[tuple[list[str], dict[str, int]]] = []
    for name, row in rows.items():
        if (
            found
            and found[-1][1] == row
            and name.startswith("layers.")
            and found[-1][0][0].startswith("layers.")
        ):
            found[-1][0].append(name)
        else:
            found.append(([name], row))
    return [
        (names[0] if len(names) == 1 else f"{names[0]} to {names[-1].split('.')[1]}, each", row)
        for names, row in found
    ]


def _same_in_all_blocks(entries: Iterable[Entry]) -> list[tuple[str, int, int]]:
    """(array and reason, bytes, how often), the number of the block left out."""
    counts: dict[tuple[str, int], int] = {}
    for e in entries:
        layer = (
            re.sub(r"^layers\.\d+\.?", "", e.layer).removeprefix("self_attn.").removeprefix("mlp.") or "block"
        )
        what = re.sub(r"layers\.\d+\.?", "next block's ", e.what)
        key = f"{layer}: {what}", e.nbytes
        counts[key] = counts.get(key, 0) + 1
    return [(what, n, times) for (what, n), times in counts.items()]
