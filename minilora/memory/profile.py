"""What lives at the peak of a step, and what the forward pass keeps: a twin's step, watched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.data.tasks import Batch
from minilora.memory.entries import Entry, deepen, kept_entries, name_gradients, passing_entries
from minilora.memory.reasons import Kept, kept_by_attention, kept_by_mlp, kept_by_model
from minilora.memory.shapes import Meter
from minilora.memory.twin import run_step
from minilora.parameters import Array
from minilora.transformer import Transformer


@dataclass(frozen=True)
class Profile:
    """The peak of a step.

    Attributes
    ----------
    entries : list of Entry
        What is alive at the peak.
    moment : str
        What is at work then.
    shard : int
        Most bytes that the largest shard adds by itself.
    kept : list of Entry
        What the largest shard's forward pass keeps.
    meter : Meter
        All births and deaths of the step.
    """

    entries: list[Entry]
    moment: str
    shard: int
    kept: list[Entry]
    meter: Meter

    @property
    def peak(self) -> int:
        """Bytes beyond what outlasts a step."""
        return sum(e.nbytes for e in self.entries)


def profile(
    twin: Transformer,
    batch: Batch,
    *,
    shards: int = 2,
    accumulation: int = 1,
    checkpoint: bool = False,
    logits_chunk: int = 0,
    layers: int | None = None,
) -> Profile:
    """Run a step of a twin in one worker and look at its peak.

    Parameters
    ----------
    twin : Transformer
        A model over arrays without data.
    shards, accumulation, checkpoint, logits_chunk
        As in training; `accumulation` batches of the same shape.
    layers : int, optional
        Depth of the model that the twin stands for, if it has fewer blocks, all alike. The second block is
        then counted for all in the middle. What lives while block i is at work rises or falls steadily with
        i, so the peak is at the first block, the last one, the head or the loss.
    """
    depth = len(twin.blocks)
    watch = _Watch(twin)
    meter = run_step(
        twin,
        batch,
        shards=shards,
        accumulation=accumulation,
        checkpoint=checkpoint,
        logits_chunk=logits_chunk,
        watch=watch,
    )
    gradients = name_gradients(meter.log, twin)
    starts = [b.born for b in gradients[:: len(twin.trainable())]]  # of each shard
    curve = meter.curve()

    def as_deep(entries: list[Entry]) -> list[Entry]:
        return entries if layers is None else deepen(entries, depth, layers)

    def entries_at(moment: int, since: int = 0) -> list[Entry]:
        return as_deep(passing_entries(b for b in meter.alive(moment) if b.born >= since))

    def live(moment: int, since: int = 0) -> int:
        if layers is not None:
            return sum(e.nbytes for e in entries_at(moment, since))
        # what was there before stays: other shards' gradients
        return int(curve[moment] - (curve[since - 1] if since else 0))

    moments = _moments(meter, curve, depth, layers)
    peak, name = max(moments, key=lambda m: live(m[0]))
    latest = max((b for b in meter.alive(peak) if b.nbytes), key=lambda b: b.born)
    shard = max(live(m, max((s for s in starts if s <= m), default=0)) for m, _ in moments)
    objects = [
        Entry("objects", owner, "array objects, 96 bytes and 16 for each axis", n)
        for owner, n in meter.headers_at(peak).items()
    ]
    entries = entries_at(peak) + as_deep(objects)
    return Profile(entries, f"{name}, {latest.site}", shard, as_deep(watch.kept), meter)


class _Watch:
    """Names the buffers behind caches and logits as they come, and notes the first shard's cache."""

    def __init__(self, twin: Transformer):
        self.twin, self.kept = twin, list[Entry]()

    def __call__(self, what: str, value: Any) -> None:
        if what == "forward":
            # token ids are real arrays, the batch's own
            kept = [k for k in kept_by_model(self.twin, value[1]) if not isinstance(k[0], np.ndarray)]
            if not self.kept:
                self.kept = kept_entries(kept, set())
            _name(kept, "activations")
        elif what.startswith("restored"):
            _, half, i = what.split()
            by_half = kept_by_mlp if half == "mlp" else kept_by_attention
            _name(by_half(self.twin.blocks[int(i)], value, f"layers.{i}"), "recomputed")
        elif what == "head":
            buffer = value[0].buffer
            buffer.kind, buffer.reason = "logits", "of the rows at hand, then their gradient"


def _name(kept: Iterable[Kept], kind: str) -> None:
    for array, layer, reason in kept:
        buffer = array.buffer
        if not buffer.kind:
            buffer.kind, buffer.owner, buffer.reason = kind, layer, reason


def _moments(meter: Meter, curve: Array, depth: int, layers: int | None) -> list[tuple[int, str]]:
    """Return (time of the most live bytes, what is at work) of each stretch that can hold the peak."""
    found = []
    ends = [start for start, _ in meter.marks[1:]] + [meter.clock]
    for (start, name), end in zip(meter.marks, ends, strict=True):
        number = re.search(r"layers\.(\d+)", name)
        if layers is not None and number:
            if int(number[1]) not in (0, depth - 1):
                continue
            name = name.replace(f"layers.{depth - 1}", f"layers.{layers - 1}")
        if end > start:
            found.append((start + 1 + int(curve[start + 1 : end + 1].argmax()), name))
    return found
