"""The commands that train: train and pretrain.

Imports stand in the functions: a command does not wait for what another needs.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.cli.options import said
from minilora.composed import PretrainConfig, change
from minilora.config import TINY
from minilora.formats.files import writable_folder
from minilora.sweep.settings import PRETRAINED, RunConfig

if TYPE_CHECKING:
    from minilora.cli.options import Pretrain, Train

SHOWN_MEASURES = (
    *("loss", "bpb", "recall", "exact", "recall_values"),
    *("deployed_loss", "deployed_recall", "train_loss"),
)
"""Columns of the row that `train` prints."""


def train(command: Train, named: Collection[str]) -> int:
    """Fine-tune a model and print its measures."""
    from minilora import memory
    from minilora.sweep.run import run
    from minilora.sweep.saved_runs import ADAPTER
    from minilora.threads import available_threads

    settings = said(command.settings, named)
    if settings.get("model", TINY) == TINY:
        defaults: dict[str, Any] = {"checkpoint_every": 50}
    else:
        defaults = PRETRAINED | {"checkpoint_every": 10}  # steps of a real model take seconds
    config = RunConfig.of(**(defaults | settings))
    writable_folder(Path(command.out))

    def built(model: Any) -> None:
        print(memory.trainable_line(model), flush=True)

    threads = command.threads or available_threads()
    row = run(config, command.out, threads, progress=True, built=built)
    for name in SHOWN_MEASURES:
        if row.get(name) is not None:
            print(f"{name:>16} {row[name]:.4f}")
    where = f"{command.out}/{ADAPTER}" if row["bytes_adapter_file"] else command.out
    print(f"saved in {where}; {row['seconds']:.1f} s")
    return 0


def pretrain(command: Pretrain, named: Collection[str]) -> int:
    """Make the tiny base and print what its file says of itself."""
    from minilora.formats.checkpoint import read_info
    from minilora.training.pretrain import pretrain

    config = change(PretrainConfig(), said(command.settings, named))
    writable_folder(Path(config.out))
    path = pretrain(config)
    print(json.dumps(read_info(path), indent=2))
    size = path.stat().st_size / 1e6
    print(f"written to {path}, {size:.2f} MB; the package keeps its own base in minilora/assets")
    return 0
