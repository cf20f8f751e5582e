"""Folders of runs and rows of earlier sweeps: what is kept, opened again or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.composed import settings_in
from minilora.config import ADAPTERS, LABEL, TINY, TRAINED, ConfigError
from minilora.formats.checkpoint import load_model
from minilora.formats.files import FileError, read_json, write_file
from minilora.formats.peft import fill_adapter, load_adapter
from minilora.sweep.inputs import base_of, make_run_task
from minilora.sweep.run_models import build, under_adapter
from minilora.sweep.settings import RunConfig
from minilora.transformer import Transformer

ADAPTER = "adapter"
"""Where a run's folder keeps its adapter, as PEFT does."""


def claim_folder(folder: Path, config: RunConfig, base_hash: str) -> None:
    """Write what the folder is for, before any work; refuse one in which another run has begun."""
    path, mine = folder / "run.json", config.row()
    if path.is_file():
        found, found_base = read_run(path)
        theirs, known = found.row(), settings_in(RunConfig)
        different = [
            f"{name}: {theirs[name]!r} there, {mine[name]!r} here"
            for name in mine
            if theirs[name] != mine[name] and (name not in known or known[name].role != LABEL)
        ]
        if found_base != base_hash:
            different.append("the base model")
        if different:
            what = "; ".join(different)
            raise FileError(f"{folder}: holds another run ({what}); choose another folder or delete this one")
    write_file(path, json.dumps({"config": mine, "base_sha256": base_hash}, indent=2) + "\n")


def read_run(path: Path) -> tuple[RunConfig, str]:
    """Return the configuration in a run's `run.json`, and the hash of the base that it was made on."""
    try:
        saved = read_json(path)
        return RunConfig.of(**saved["config"]), str(saved["base_sha256"])
    except (KeyError, TypeError, ConfigError) as error:
        raise FileError(
            f"{path}: not the configuration of a run ({error}); train again into another folder"
        ) from None


def load_run(folder: str | Path) -> tuple[RunConfig, Transformer]:
    """Return the configuration and the trained model of a folder that `run` has written.

    Raises
    ------
    FileError
        The folder holds no run, an unfinished one, or one on another base.
    """
    folder = Path(folder)
    config, made_on = read_run(folder / "run.json")
    base = base_of(config.model)
    if made_on != base.sha256:
        hashes = f"SHA-256 {made_on[:12]}, here {base.sha256[:12]}"
        raise FileError(f"{folder}: was trained on another base ({hashes}); train again")
    if config.method in ADAPTERS:
        if not (folder / ADAPTER).is_dir():
            raise FileError(
                f"{folder}: has no adapter: its training is not finished; repeat the command that began it"
            )
        if config.lora.init_lora_weights == "loftq":
            model = build(config, base.model)
            fill_adapter(model, folder / ADAPTER)
            return config, model
        return config, load_adapter(under_adapter(config, base.model), folder / ADAPTER)[0]
    if config.method in TRAINED:
        return config, load_model(folder / "model.safetensors")
    return config, build(config, base.model)


def check_kept(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to add to rows of another base or other data (another Python), which do not compare."""
    for row in rows:
        base_hash = base_of(row.get("model") or TINY).sha256
        if row.get("base_sha256") not in (None, base_hash):
            hashes = f"SHA-256 {row['base_sha256'][:12]}, here {base_hash[:12]}"
            raise FileError(
                f"results: row {row['key']} was made on another base ({hashes}); choose another name or "
                "delete the old folder"
            )
    tasks: dict[tuple[Any, ...], tuple[RunConfig, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("corpus_sha256"):
            config = RunConfig.from_row(row)
            tasks[config.model, config.data] = config, row
    for config, row in tasks.values():
        task = make_run_task(config)
        if row["corpus_sha256"] != task.sha256:
            hashes = f"SHA-256 {row['corpus_sha256'][:12]}, here {task.sha256[:12]}"
            raise FileError(
                f"results: row {row['key']} was made from other data ({hashes}; Python "
                f"{row.get('python_version')}); choose another name or delete the old folder"
            )
