"""The measured ledger of a model that is ready to train: its own arrays counted, a step's peak taken by
tracemalloc.

What lives at that peak is named by the model's twin, whose step takes the same course; the two peaks stand
side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minilora.config import TrainConfig
from minilora.data.tasks import Batch
from minilora.memory.counting import buffer_of, count_parameters, effective_bits, format_bytes, peak_bytes
from minilora.memory.ledger import Entry, Ledger, held_entries, kept_entries
from minilora.memory.planner import SAME, with_update
from minilora.memory.profile import profile
from minilora.memory.reasons import kept_by_model
from minilora.memory.twin import tile_bytes, twin_of
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
    """The ledger of a training step on a batch (with accumulation: on that batch each time).

    What outlasts a step is the sum of the arrays' own ``nbytes``; what the forward pass keeps, that of the
    buffers in a real cache. With ``run`` a step is measured in one worker, which changes nothing, since it
    updates a copy of the largest parameter only; ``warm_up`` takes the same step once before, unless the
    process has trained already. Without ``run`` only shapes are used, and nothing of size is computed.
    ``optimizer``: the one that trains; without it its states are those it would have. Raises ValueError for a
    model in which nothing trains.
    """
    if not model.trainable():
        raise ValueError(
            "model: nothing is trainable; use full(model), subset(model, ...) or inject_lora(model, ...)"
        )
    accumulation = min(config.gradient_accumulation_steps, SAME)
    twin = twin_of(model)
    found = profile(
        twin,
        batch,
        shards=config.shards,
        accumulation=accumulation,
        checkpoint=config.gradient_checkpointing,
        logits_chunk=config.logits_chunk,
    )
    parameters, paged = model.trainable(), config.optimizer.startswith("paged")
    own = (
        make_optimizer(twin.trainable(), config) if optimizer is None else optimizer
    )  # zeros, made when they are touched
    held = held_entries(model, {} if paged else own.state(), state_maps(own.state()))
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
        largest = max(parameters, key=lambda p: p.data.size)
        copied = largest.thaw()
        update = make_optimizer([copied], replace(config, optimizer=config.optimizer.removeprefix("paged_")))
        with single_blas(), Workers(1) as one:
            batches = [batch] * accumulation

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
                update.step(of_copy, 0.0)

            if warm_up:  # what is compiled, loaded or looked up once is there afterwards
                step()
            measured = sum(e.nbytes for e in held) + peak_bytes(step)
    trainable, total = count_parameters(model)
    resident, highest = resident_bytes()
    return Ledger(
        title or f"batch {batch.ids.shape[0]} × {batch.ids.shape[1]} tokens",
        (*held, *entries),
        tuple(kept),
        moment,
        trainable,
        total,
        effective_bits(model),
        min(config.shards, len(batch.ids)),
        found.shard,
        gradients,
        gradients * (config.gradient_accumulation_steps > 1),
        sum(a.nbytes for a in own.state().values()) * paged,
        measured,
        resident,
        highest,
    )


def _kept(model: Transformer, batch: Batch, config: TrainConfig) -> Sequence[Entry]:
    """What a real forward pass of the largest shard keeps."""
    piece = split_batch(batch, config.shards)[0]
    with single_blas():
        _, cache = model.forward(
            piece.ids, (config.seed, 0, 0), config.gradient_checkpointing, piece.segments
        )
    weights = {id(buffer_of(p.data)) for p in model.parameters()} | {id(buffer_of(piece.ids))}
    return kept_entries(kept_by_model(model, cache), weights)


def trainer_bytes() -> int:
    """What a process that trains has in memory before its model: Python, NumPy, Numba and the kernels; 0 if
    unknown."""
    compile_kernels()
    return resident_bytes()[0] or 0


def resident_line() -> str:
    """The process's memory in words."""
    now, highest = resident_bytes()
    parts = [f"{format_bytes(n)} {what}" for n, what in ((now, "now"), (highest, "at most")) if n is not None]
    return "the process, Python and libraries included: " + (", ".join(parts) or "the system does not tell")


def resident_bytes() -> tuple[int | None, int | None]:
    """(now, the most so far) of this process's memory that lies in RAM, libraries included, where the system
    tells."""
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
