"""Training checkpoints: what a run needs to go on, as one safetensors file.

param.<name>             each trained parameter
m.<name>, v.<name>, …    the optimizer's states, by the names of `state()`
history                  (steps, 3) float64: loss, learning rate, gradient norm
metadata                 step, configuration, hash of the task, evaluations
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import TrainConfig
from minilora.formats.files import FileError, read_tensors, write_tensors
from minilora.parameters import Array
from minilora.training.paging import hand_back

CHECKPOINT = "checkpoint.safetensors"
RECORDED = ("loss", "learning_rate", "grad_norm")
"""What is kept of each step. The seconds are not: two runs of the same steps write the same bytes."""
CHANGEABLE = ("eval_every", "checkpoint_every")
"""Settings that may differ when a run is resumed, because they do not change what it learns."""


@dataclass
class History:
    """What a run recorded: one entry for each step, and one for each evaluation."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and what it is a run of."""

    step: int
    config: TrainConfig
    task_sha256: str
    history: History


def write_checkpoint(path: Path, arrays: dict[str, Array], progress: Progress) -> None:
    """Write a checkpoint atomically, so that a crash leaves the previous one."""
    steps = [[info[name] for name in RECORDED] for info in progress.history.steps]
    saved = {
        "step": progress.step,
        "config": asdict(progress.config),
        "task": progress.task_sha256,
        "evaluations": progress.history.evaluations,
    }
    history = np.array(steps, np.float64).reshape(-1, len(RECORDED))
    write_tensors(path, arrays | {"history": history}, {"minilora_checkpoint": saved})


def read_checkpoint(path: Path, targets: dict[str, Array], config: TrainConfig, task_sha256: str) -> Progress:
    """Fill the target arrays from a checkpoint and return its progress.

    Parameters
    ----------
    path : Path
        A file that `write_checkpoint` wrote.
    targets : dict of Array
        Trained parameters and optimizer states by name, to be overwritten.
    config : TrainConfig
        Must equal the checkpoint's, but for `CHANGEABLE`.
    task_sha256 : str
        Must equal the checkpoint's.

    Raises
    ------
    FileError
        If the file belongs to another configuration, task or model; nothing is overwritten then.
    """
    arrays, metadata = read_tensors(path)
    saved = metadata.get("minilora_checkpoint")
    if not isinstance(saved, dict) or not {"step", "config", "task", "evaluations"} <= saved.keys():
        raise FileError(f"{path}: not a minilora training checkpoint")
    _check_config(path, saved["config"], config)
    if saved["task"] != task_sha256:
        raise FileError(
            f"{path}: made from other data (task hash {saved['task'][:12]}, here {task_sha256[:12]})"
        )
    history = arrays.pop("history", np.zeros((0, len(RECORDED))))
    _check_arrays(path, arrays, targets)
    for name, array in targets.items():
        array[...] = arrays.pop(name)
        hand_back(array)
    steps = [dict(zip(RECORDED, row, strict=True)) for row in history.tolist()]
    return Progress(int(saved["step"]), config, task_sha256, History(steps, saved["evaluations"]))


def _check_config(path: Path, saved: dict[str, Any], config: TrainConfig) -> None:
    different = [
        f"{name}: {saved.get(name)!r} there, {value!r} here"
        for name, value in asdict(config).items()
        if name not in CHANGEABLE and saved.get(name) != value
    ]
    if different:
        raise FileError(
            f"{path}: made with another configuration ({'; '.join(different)}); use the same one, "
            "or another folder"
        )


def _check_arrays(path: Path, arrays: dict[str, Array], targets: dict[str, Array]) -> None:
    missing, unknown = sorted(targets.keys() - arrays.keys()), sorted(arrays.keys() - targets.keys())
    problems = []
    if missing:
        problems.append(f"{missing[0]} trains here and is not in the file")
    if unknown:
        problems.append(f"{unknown[0]} is in the file and does not train here")
    for name in targets.keys() & arrays.keys():
        there, here = arrays[name], targets[name]
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            problems.append(f"{name}: {there.dtype} {there.shape} there, {here.dtype} {here.shape} here")
    if problems:
        raise FileError(f"{path}: its arrays do not fit what trains in this model: {'; '.join(problems[:3])}")
