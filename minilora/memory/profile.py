"""What lives at the peak of a step, and what the forward pass keeps: a twin's step, watched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.data.tasks import Batch
from minilora.layers import Array
from minilora.memory.ledger import Entry, deepen, kept_entries, name_gradients, passing_entries
from minilora.memory.reasons import kept_by_attention, kept_by_mlp, kept_by_model
from minilora.memory.shapes import Meter
from minilora.memory.twin import run_step
from minilora.transformer import Transformer


@dataclass(frozen=True)
class Profile:
    """The peak of a step: what is alive, where that is, what the largest shard adds by itself, what its
    forward pass keeps."""

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

    With ``layers`` the twin stands for a model of so many blocks, all alike: what lives while the first or
    the last block, the head or the loss is at work is counted with the second block repeated. No other moment
    can be the peak, since what lives while block i is at work rises or falls steadily with i.
    """
    depth = len(twin.blocks)
    first_kept: list[Entry] = []

    def watch(what: str, value: Any) -> None:
        if what == "forward":
            kept = [
                k for k in kept_by_model(twin, value[1]) if not isinstance(k[0], np.ndarray)
            ]  # token ids are the batch's own
            if not first_kept:
                first_kept.extend(kept_entries(kept, set()))
            _name(kept, "activations")
        elif what.startswith("restored"):
            _, half, i = what.split()
            by_half = kept_by_mlp if half == "mlp" else kept_by_attention
            _name(by_half(twin.blocks[int(i)], value, f"layers.{i}"), "recomputed")
        elif what == "head":
            value[0].buffer.kind, value[0].buffer.reason = (
                "logits",
                "of the rows at hand, then their gradient",
            )

    meter = run_step(
        twin,
        batch,
        shards=shards,
        accumulation=accumulation,
        checkpoint=checkpoint,
        logits_chunk=logits_chunk,
        watch=watch,
    )
    trainable = twin.trainable()
    name_gradients(meter.log, trainable)
    gradients = [b.born for b in meter.log if b.kind == "gradients"]
    starts = gradients[:: len(trainable)]  # of each shard

    def entries_at(moment: int, since: int = 0) -> list[Entry]:
        found = passing_entries(b for b in meter.alive(moment) if b.born >= since)
        return found if layers is None else deepen(found, depth, layers)

    def objects_at(moment: int) -> list[Entry]:
        found = [
            Entry("objects", owner, "array objects, 96 bytes and 16 an axis", n)
            for owner, n in meter.headers_at(moment).items()
        ]
        return found if layers is None else deepen(found, depth, layers)

    curve = meter.curve()

    def live(moment: int, since: int = 0) -> int:
        if layers is not None:
            return sum(e.nbytes for e in entries_at(moment, since))
        return int(
            curve[moment] - (curve[since - 1] if since else 0)
        )  # what was there before stays: other shards' gradients

    moments = _moments(meter, curve, depth, layers)
    peak, name = max(moments, key=lambda m: live(m[0]))
    latest = max((b for b in meter.alive(peak) if b.nbytes), key=lambda b: b.born)
    own = max(live(m, max((s for s in starts if s <= m), default=0)) for m, _ in moments)
    kept = first_kept if layers is None else deepen(first_kept, depth, layers)
    return Profile(entries_at(peak) + objects_at(peak), f"{name}, {latest.site}", own, kept, meter)


def _name(kept: Any, kind: str) -> None:
    for array, layer, reason in kept:
        buffer = array.buffer
        if not buffer.kind:
            buffer.kind, buffer.owner, buffer.reason = kind, layer, reason


def _moments(meter: Meter, curve: Array, depth: int, layers: int | None) -> list[tuple[int, str]]:
    """(time of the most live bytes, what is at work) in each stretch between two marks that can hold the
    peak."""
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
