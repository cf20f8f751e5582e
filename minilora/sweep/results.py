"""Rows of results: their columns, and their file, one flat JSON object per line.

`COLUMNS` says what is in a row. A row is appended to disk as soon as its run ends.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.composed import settings_in
from minilora.config import PROGRESS
from minilora.formats.files import write_file
from minilora.sweep.settings import RunConfig

Row = dict[str, Any]

MEMORY_CLASSES = {  # column: label, in the order in which they are stacked and listed
    "bytes_weights": "weights",
    "bytes_scales_offsets": "scales and offsets",
    "bytes_code_maps": "code maps",
    "bytes_adapters": "adapters",
    "bytes_gradients": "gradients",
    "bytes_optimizer": "optimizer",
    "bytes_activations": "activations",
}


def _setting_columns() -> dict[str, str]:
    """Return the settings of a run with the meanings that their configurations give them."""
    columns = {}
    for name, setting in settings_in(RunConfig).items():
        if name == "quant_type":
            columns["bits"] = "Bits of the base's codes; 32: full precision."
        if setting.role != PROGRESS:
            columns[name] = setting.help
    return columns


COLUMNS: dict[str, str] = {
    "key": "Fingerprint of the settings: 16 hex digits.",
    **_setting_columns(),
    "status": "success or failed.",
    "error": "What a failed run raised, in one line.",
    "loss": "Held-out loss, in nats per token.",
    "bpb": "Held-out loss of the tiny base, in bits per byte.",
    "recall": "Share of the attributes of held-out products that the written text states rightly, 0 to 1.",
    "exact": "Share of held-out products whose text is right word for word, 0 to 1.",
    "recall_values": "As recall, for products with values that training never showed.",
    "exact_values": "As exact, for products with values that training never showed.",
    "train_loss": "Mean training loss of the last 20 steps, in nats per token.",
    "deployed_loss": "As loss, of the deployed weights: the adapter merged, in as many bits as the base.",
    "deployed_bpb": "As bpb, of the deployed weights.",
    "deployed_recall": "As recall, of the deployed weights.",
    "deployed_exact": "As exact, of the deployed weights.",
    "trainable_params": "Number of trained parameters.",
    "all_params": "Number of all parameters, adapters included.",
    "effective_bits": "Bits per weight of the linear layers, scales and offsets included.",
    "deployed_effective_bits": "As effective_bits, of the deployed weights.",
    "bytes_weights": "Bytes of weights and codes.",
    "bytes_scales_offsets": "Bytes of scales and offsets.",
    "bytes_code_maps": "Bytes of codebooks.",
    "bytes_adapters": "Bytes of A and B.",
    "bytes_gradients": "Bytes of gradients.",
    "bytes_optimizer": "Bytes of the optimizer's state in memory.",
    "bytes_activations": "Bytes kept for backward, of a whole batch.",
    "bytes_logits": "Bytes of logits at the peak of a step.",
    "bytes_tiles": "Bytes of decoded tiles of weights at the peak of a step.",
    "bytes_temporaries": "Bytes of other temporary arrays at the peak of a step.",
    "bytes_on_disk": "Bytes of optimizer state in a file (paged optimizers).",
    "bytes_peak": "Largest number of bytes at once in a training step, measured.",
    "bytes_peak_predicted": "The same, predicted by the ledger.",
    "bytes_adapter_file": "Bytes of the saved adapter.",
    "seconds": "Seconds of the whole run, evaluation included.",
    "step_seconds": "Median seconds of a training step.",
    "corpus_sha256": "SHA-256 of the data.",
    "base_sha256": "SHA-256 of the base model.",
    "python_version": "Version of Python.",
    "numpy_version": "Version of NumPy.",
    "numba_version": "Version of Numba.",
    "minilora_version": "Version of minilora.",
    "machine": "Architecture, number of cores and processor.",
}
"""Every column of a row → what it is, in the order of a row. None: does not apply, or was not measured."""

ROW_KEYS = tuple(COLUMNS)


class ResultsError(ValueError):
    """A results file or a set of rows that cannot be used; the message says which and what to do."""


def clean_row(row: Mapping[str, Any]) -> Row:
    """Return the row with every known column present and only what JSON can hold.

    NumPy scalars become Python's, NaN and infinity become None, sequences become comma-joined strings (a
    row is flat).

    >>> row = clean_row({"key": "a", "loss": float("nan"), "target_modules": ("q_proj", "v_proj")})
    >>> row["loss"], row["target_modules"], row["recall"]
    (None, 'q_proj,v_proj', None)
    """
    unknown = sorted(set(row) - set(ROW_KEYS))
    return {name: _plain(name, row.get(name)) for name in (*ROW_KEYS, *unknown)}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"column {name!r} holds a {type(value).__name__}; a row holds numbers, strings, booleans and None"
    )


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append one line and force it to disk before returning, so that no finished run is lost."""
    with open(path, "ab") as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def load_results(path: str | Path) -> list[Row]:
    """Read `results.jsonl`, or the folder that holds it: one row per key, the last one written.

    A last line without its newline is a write that was interrupted, and is left out.

    Raises
    ------
    ResultsError
        The file is missing, or a line is no row of results (the message gives its number).
    """
    path = Path(path)
    path = path / "results.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ResultsError(f"{path}: no such file; `minilora sweep` writes one")
    rows, _ = _parse(path)
    return list({row["key"]: row for row in rows}.values())


def repair_results(path: str | Path) -> list[Row]:
    """Read as `load_results` does, and cut an interrupted last line off the file before appending."""
    path = Path(path)
    if not path.exists():
        return []
    rows, good = _parse(path)
    if good < path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(good)
    return list({row["key"]: row for row in rows}.values())


def _parse(path: Path) -> tuple[list[Row], int]:
    """Return the rows and the number of bytes, from the start, that whole lines take."""
    lines = path.read_bytes().split(b"\n")
    cut = lines.pop()  # b"" after a complete last line
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
            raise ResultsError(
                f"{path}, line {number}: not JSON ({error}); mend or delete it, or choose another folder"
            ) from None
        if not (
            isinstance(row, dict)
            and isinstance(row.get("key"), str)
            and row.get("status") in ("success", "failed")
        ):
            raise ResultsError(
                f"{path}, line {number}: not a row of minilora's results (no key or status); "
                "choose another folder"
            )
        rows.append(row)
    return rows, sum(len(line) + 1 for line in lines) if cut else path.stat().st_size


def write_csv(rows: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write the rows as CSV (an empty cell for null), whole or not at all."""
    rows = list(rows)
    columns = [*ROW_KEYS, *sorted({name for row in rows for name in row} - set(ROW_KEYS))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_file(Path(path), text.getvalue())


def check_one_corpus(rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse rows whose data differ: within a task all must carry the same corpus and base hashes.

    Another version of Python has another standard library, hence another corpus. A mean over both would mean
    nothing.

    Raises
    ------
    ResultsError
        Two hashes are mixed; the message names both.
    """
    seen: dict[tuple[str, Any], Mapping[str, Any]] = {}
    for row in rows:
        for column in ("corpus_sha256", "base_sha256"):
            if row.get(column) is None:
                continue
            first = seen.setdefault((column, row.get("task")), row)
            if first[column] != row[column]:
                one, other = (f"{r[column]} (Python {r.get('python_version')})" for r in (first, row))
                raise ResultsError(
                    f"{column}: rows of task {row.get('task')!r} mix {one} and {other}; they are not "
                    "comparable: keep one of them"
                )


def successful(rows: Iterable[Mapping[str, Any]], **where: Any) -> list[Row]:
    """Return the rows of finished runs outside the learning-rate search whose columns have the values given.

    >>> rows = [{"status": "success", "task": "products"}, {"status": "failed", "task": "products"}]
    >>> len(successful(rows, task="products"))
    1
    """
    where.setdefault("status", "success")
    chosen = [dict(row) for row in rows if all(row.get(name) == value for name, value in where.items())]
    return [row for row in chosen if row.get("stage") != "search" or "stage" in where]


def group_rows(rows: Iterable[Mapping[str, Any]], by: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Collect rows with equal values in the columns `by`, after `check_one_corpus`; insertion order."""
    rows = list(rows)
    check_one_corpus(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(dict(row))
    return groups
