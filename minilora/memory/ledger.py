"""The ledger: every byte of a model in training, by class, by layer and by reason, at the peak of a step.

The same table comes from a real model (`measure`) and from a configuration alone (`plan`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from minilora.memory.counting import format_bytes, format_trainable
from minilora.memory.entries import Entry, block_of
from minilora.tables import html_table, text_table

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
    "tiles": "scratch for decoded weights, one for each worker",
}
"""Classes that outlast a step."""

PASSING = {
    "gradients": "one array for each trained parameter, for each shard",
    "activations": "kept by the forward pass",
    "recomputed": "of the half of a block at work",
    "logits": "rows × vocabulary",
    "temporaries": "of the operation at the peak",
    "objects": "arrays as Python's objects, without their data",
}
"""Classes that come and go within a step."""

SHARED_COLUMNS = {
    "scales": "scales …",
    "offsets": "scales …",
    "absmax": "scales …",
    "nested": "scales …",
    "code maps": "scales …",
    "tiles": "scratch",
    "temporaries": "scratch",
    "objects": "scratch",
}
"""Class → column of the table by layer, where it does not have its own."""

FULL_BYTES_WIDTH = 120
"""Characters of a line up to which the table by layer shows bytes in full."""

Table = tuple[str, list[str], list[list[str]]]
"""(caption, heads, rows)."""


@dataclass(frozen=True, repr=False)
class Ledger:
    """Bytes of a training step at its peak; prints as three tables.

    Attributes
    ----------
    title : str
        What was planned or measured.
    entries : tuple of Entry
        What outlasts a step, and what else lives at the peak of one worker's step.
    kept : tuple of Entry
        All that the forward pass of the largest shard keeps, by reason.
    moment : str
        What is at work at the peak.
    trainable, parameters : int
        Numbers of parameters.
    effective_bits : float
        Bits per weight of the block projections, scales and offsets included.
    shards : int
        Pieces of a batch.
    shard : int
        Most bytes that the largest shard adds to what outlasts a step, its gradients included.
    gradients : int
        Bytes of one shard's gradients.
    accumulated : int
        Bytes of the sum of earlier batches' gradients.
    on_disk : int
        Bytes of paged optimizer states.
    measured : int, optional
        The peak as tracemalloc saw it.
    resident, resident_peak : int, optional
        Memory of the whole process as the system counts it, now and at most.
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
        """Return an upper bound with several workers: each at the worst moment of the largest shard at once.

        Each worker has a tile of its own. A shard that is done, or waits, has its gradients at most, and
        gradient accumulation the sum of earlier ones. Beside the entries each worker may have 2 %, or
        64 KiB, of Python's own objects and of buffers inside NumPy.
        """
        at_once = min(workers, self.shards)
        tiles = sum(e.nbytes for e in self.entries if e.kind == "tiles")
        waiting = (self.shards - at_once) * self.gradients + self.accumulated
        shards = (at_once - 1) * tiles + at_once * _with_unseen(self.shard) + waiting
        return self.held + max(shards, _with_unseen(self.rise))

    def by_kind(self) -> dict[str, int]:
        """Return class → bytes, in the order of the tables, without empty classes."""
        sums = {kind: sum(e.nbytes for e in self.entries if e.kind == kind) for kind in (*HELD, *PASSING)}
        return {kind: n for kind, n in sums.items() if n}

    def by_layer(self) -> dict[str, dict[str, int]]:
        """Return layer (a block, the embedding, …) → class → bytes."""
        found: dict[str, dict[str, int]] = {}
        for e in sorted(self.entries, key=lambda e: _place(e.layer)):
            row = found.setdefault(block_of(e.layer), {})
            row[e.kind] = row.get(e.kind, 0) + e.nbytes
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        first = {
            "title": self.title,
            "peak": self.peak,
            "bound": self.bound(self.shards),
            "held": self.held,
            "by_kind": self.by_kind(),
        }
        return first | asdict(self) | {"by_layer": self.by_layer()}

    # ---- tables

    def tables(self, full: bool = True) -> list[Table]:
        """Return the tables by class, by layer and by reason; `full` writes all bytes of that by layer."""
        return [self._by_class(), self._by_layer(full), self._by_reason()]

    def _by_class(self) -> Table:
        rows = []

        def add(name: str, n: int, what: str) -> None:
            rows.append([name, f"{n:,}", format_bytes(n), f"{100 * n / self.peak:.1f} %", what])

        for kind, n in self.by_kind().items():
            add(kind, n, (HELD | PASSING)[kind])
        add("peak", self.peak, f"one worker; {self.moment}")
        if self.shards > 1:
            bound = self.bound(self.shards)
            add(f"{self.shards} workers", bound, "at most, a shard each at its worst moment")
        if self.measured is not None:
            off = self.measured - self.peak
            unseen = f"by tracemalloc; {off:+,} are Python's own objects and buffers inside NumPy"
            add("measured", self.measured, unseen)
        return "By class", ["class", "bytes", "", "share", "what"], rows

    def _by_layer(self, full: bool) -> Table:
        show = "{:,}".format if full else format_bytes
        columns = list(dict.fromkeys(SHARED_COLUMNS.get(kind, kind) for kind in self.by_kind()))
        rows = []
        for name, row in _merge_alike(self.by_layer()):
            sums = dict.fromkeys(columns, 0)
            for kind, n in row.items():
                sums[SHARED_COLUMNS.get(kind, kind)] += n
            rows.append([name, *("" if n == 0 else show(n) for n in sums.values())])
        return "By layer", ["layer", *columns], rows

    def _by_reason(self) -> Table:
        rows = [[what, f"{n:,}", str(times), f"{n * times:,}"] for what, n, times in _count_alike(self.kept)]
        rows.append(["all", "", "", f"{sum(e.nbytes for e in self.kept):,}"])
        shard = "the batch" if self.shards == 1 else f"one shard of {self.shards}"
        caption = f"What the forward pass of {shard} keeps, and why"
        return caption, ["array", "bytes", "×", "together"], rows

    def notes(self) -> list[str]:
        """Return what belongs beside the tables."""
        lines = [
            format_trainable(self.trainable, self.parameters),
            f"effective bits per weight of a block: {self.effective_bits:.3f}",
        ]
        if self.on_disk:
            lines.append(
                f"on disk: {self.on_disk:,} of optimizer state, paged ({format_bytes(self.on_disk)})"
            )
        if self.resident is not None:
            line = (
                "this process as the system sees it, Python and its libraries included: "
                f"{format_bytes(self.resident)}"
            )
            if self.resident_peak is not None:
                line += f", at most {format_bytes(self.resident_peak)} so far"
            lines.append(line)
        return lines

    def short(self) -> str:
        """Return one line; classes below a thousandth of the peak are left out."""
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
        by_class, by_layer, kept = map(_text, self.tables())
        if max(map(len, by_layer.splitlines())) > FULL_BYTES_WIDTH:
            by_layer = _text(self._by_layer(full=False))
        return "\n".join([self.title, *self.notes(), f"\n{by_class}\n\n{by_layer}\n\n{kept}"])

    __repr__ = __str__  # a prompt shows the table

    def _repr_html_(self) -> str:
        notes = "".join(f"<br/>{html.escape(line)}" for line in self.notes())
        tables = "".join(html_table(caption, heads, rows) for caption, heads, rows in self.tables())
        return f"<p><b>{html.escape(self.title)}</b>{notes}</p>{tables}"


def _with_unseen(nbytes: int) -> int:
    """Add what a worker may need beside its entries: 2 %, or 64 KiB."""
    return nbytes + max(64 * 1024, nbytes // 50)


def _text(table: Table) -> str:
    caption, heads, rows = table
    return f"{caption}\n{text_table(heads, rows)}"


def _place(layer: str) -> tuple[int, str]:
    """Return what layers are sorted by: the embedding, the blocks by number, the others by name."""
    number = re.match(r"layers\.(\d+)", layer)
    if number:
        return int(number[1]), ""
    return (-1, "") if layer == "embed_tokens" else (10**9, layer)


def _merge_alike(rows: dict[str, dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """Merge neighbouring blocks of the same bytes into one row: layers.0 to 30, each."""
    runs: list[tuple[list[str], dict[str, int]]] = []
    for name, row in rows.items():
        if runs:
            names, last = runs[-1]
            if last == row and name.startswith("layers.") and names[0].startswith("layers."):
                names.append(name)
                continue
        runs.append(([name], row))
    return [
        (names[0] if len(names) == 1 else f"{names[0]} to {names[-1].split('.')[1]}, each", row)
        for names, row in runs
    ]


def _count_alike(entries: Iterable[Entry]) -> list[tuple[str, int, int]]:
    """Return (array and reason, bytes, how often), whichever block it is in."""
    counts: dict[tuple[str, int], int] = {}
    for e in entries:
        inside = re.sub(r"^layers\.\d+\.?", "", e.layer)
        layer = inside.removeprefix("self_attn.").removeprefix("mlp.") or "block"
        what = re.sub(r"layers\.\d+\.?", "next block's ", e.what)
        key = f"{layer}: {what}", e.nbytes
        counts[key] = counts.get(key, 0) + 1
    return [(what, n, times) for (what, n), times in counts.items()]
