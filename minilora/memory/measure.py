"""The measured ledger of a real model: its own arrays counted, a step's peak taken by tracemalloc.

The model's twin takes the same step to name what lives at that peak. The two peaks stand side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minilora.config import TrainConfig
from minilora.data.tasks import Batch
from minilora.memory.counting import buffer_of, count_parameters, effective_bits, format_bytes, peak_bytes
from minilora.memory.entries import Entry, held_entries, kept_entries
from minilora.memory.ledger import Ledger
from minilora.memory.planner import with_update
from minilora.memory.profile import profile
from minilora.memory.reasons import kept_by_model
from minilora.memory.twin import BATCHES_ALIKE, tile_bytes, twin_of
from minilora.parameters import Gradients
from minilora.quant.compilation import compile_kernels
from minilora.quant.packed import reserve_tile
from minilora.threads import Workers, single_blas
from minilora.training.loss import loss_and_grads
from minilora.training.optimizers import Optimizer, clip_, make_optimizer
from minilora.training.shards import split_batch
from minilora.training.states import state_maps
from minilora.transformer import Transformer


def measure(
    model: Transformer,
    batch: Batch,
    config: TrainConfig,
    optimizer: Optimizer | None = None,
    *,
    title: str = "",
    run: bool = True,
    warm_up: bool = True,
) -> Ledger:
    """Return the ledger of a training step of a real model.

    What outlasts a step is the sum of the arrays' own `nbytes`; what the forward pass keeps, that of the
    buffers in a real cache.

    Parameters
    ----------
    model : Transformer
        Ready to train.
    batch : Batch
        With gradient accumulation this batch is taken each time.
    config : TrainConfig
        Shards, checkpointing, optimizer, …
    optimizer : Optimizer, optional
        The one that trains; without it the states are those that it would have.
    title : str
        By default the batch's shape.
    run : bool
        Take a real step in one worker, which updates only a copy of the largest parameter. False looks at
        shapes alone.
    warm_up : bool
        Take the same step once before, unless the process has trained already.

    Raises
    ------
    ValueError
        For a model in which nothing trains.
    """
    parameters = model.trainable()
    if not parameters:
        raise ValueError(
            "model: nothing is trainable; use full(model), subset(model, ...) or inject_lora(model, ...)"
        )
    twin, shards = twin_of(model), config.shards
    found = profile(
        twin,
        batch,
        shards=shards,
        accumulation=min(config.gradient_accumulation_steps, BATCHES_ALIKE),
        checkpoint=config.gradient_checkpointing,
        logits_chunk=config.logits_chunk,
    )
    # without an optimizer: zeros, which take memory only once they are touched
    states = (optimizer or make_optimizer(twin.trainable(), config)).state()
    paged = config.optimizer.startswith("paged")
    held = held_entries(model, {} if paged else states, state_maps(states))
    tile = tile_bytes(twin)
    if tile:
        held.append(Entry("tiles", "worker", "decoded weights", tile))
    gradients = sum(p.data.nbytes for p in parameters)
    entries, moment = with_update(found.entries, found.moment, gradients, config.optimizer, parameters)
    kept: Sequence[Entry] = found.kept
    measured = None
    if run:
        kept = _kept(model, batch, config)
        reserve_tile(tile // 4)
        measured = sum(e.nbytes for e in held) + _step_peak(model, batch, config, warm_up)
    trainable, total = count_parameters(model)
    resident, highest = resident_bytes()
    return Ledger(
        title=title or f"batch {batch.ids.shape[0]} × {batch.ids.shape[1]} tokens",
        entries=(*held, *entries),
        kept=tuple(kept),
        moment=moment,
        trainable=trainable,
        parameters=total,
        effective_bits=effective_bits(model),
        shards=min(shards, len(batch.ids)),
        shard=found.shard,
        gradients=gradients,
        accumulated=gradients if config.gradient_accumulation_steps > 1 else 0,
        on_disk=sum(a.nbytes for a in states.values()) if paged else 0,
        measured=measured,
        resident=resident,
        resident_peak=highest,
    )


def _step_peak(model: Transformer, batch: Batch, config: TrainConfig, warm_up: bool) -> int:
    """Return the bytes that a real step of one worker adds, as tracemalloc sees them.

    The update is of a copy of the largest parameter, so the model is not changed.
    """
    batches = [batch] * min(config.gradient_accumulation_steps, BATCHES_ALIKE)
    largest = max(model.trainable(), key=lambda p: p.data.size)
    copied = largest.thaw()
    optimizer = make_optimizer([copied], replace(config, optimizer=config.optimizer.removeprefix("paged_")))
    with single_blas(), Workers(1) as one:

        def step() -> None:
            _, grads = loss_and_grads(
                model,
                batches,
                one,
                shards=config.shards,
                stream=(config.seed, 0),
                checkpoint=config.gradient_checkpointing,
                logits_chunk=config.logits_chunk,
            )
            clip_(grads, config.max_grad_norm)
            of_copy = Gradients(())
            of_copy[copied] = grads[largest]
            optimizer.step(of_copy, 0.0)

        if warm_up:  # what is compiled, loaded or looked up once is there afterwards
            step()
        return peak_bytes(step)


def _kept(model: Transformer, batch: Batch, config: TrainConfig) -> Sequence[Entry]:
    """Return what a real forward pass of the largest shard keeps."""
    piece = split_batch(batch, config.shards)[0]
    with single_blas():
        _, cache = model.forward(
            piece.ids, (config.seed, 0, 0), config.gradient_checkpointing, piece.segments
        )
    weights = {id(buffer_of(p.data)) for p in model.parameters()} | {id(buffer_of(piece.ids))}
    return kept_entries(kept_by_model(model, cache), weights)


def trainer_bytes() -> int:
    """Return the memory of a process that trains before its model: Python, NumPy, Numba and the kernels.

    0 if the system does not tell.
    """
    compile_kernels()
    return resident_bytes()[0] or 0


def resident_line() -> str:
    """Return the process's memory in words."""
    now, highest = resident_bytes()
    parts = [f"{format_bytes(n)} {what}" for n, what in ((now, "now"), (highest, "at most")) if n is not None]
    return "the process, Python and libraries included: " + (", ".join(parts) or "the system does not tell")


def resident_bytes() -> tuple[int | None, int | None]:
    """Return this process's memory in RAM, (now, the most so far); None where the system does not tell."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        )
        return 1024 * int(lines["VmRSS"].split()[0]), 1024 * int(lines["VmHWM"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    if sys.platform == "win32":
        return None, None
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None, highest if sys.platform == "darwin" else 1024 * highest
