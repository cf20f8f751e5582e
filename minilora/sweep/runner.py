"""Runs → rows: do them in independent processes, keep every finished row."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from minilora.config import require
from minilora.formats.files import writable_folder, write_file
from minilora.sweep.grid import SweepConfig, describe, expand, outline
from minilora.sweep.results import Row, append_row, clean_row, load_results, repair_results, write_csv
from minilora.sweep.workers import RunFunction, in_executor, in_process, run_folder

__all__ = ["SweepConfig", "describe", "expand", "load_results", "outline", "run_sweep", "write_csv"]


def run_sweep(
    configs: Sequence[Any],
    out: str | Path,
    *,
    run: RunFunction | None = None,
    executor: Executor | None = None,
    n_jobs: int = 1,
    progress: bool = True,
    retry_failed: bool = False,
) -> list[Row]:
    """Do the runs that ``out/results.jsonl`` does not have yet and return the rows of all, in the order of
    ``configs``.

    Parameters
    ----------
    configs
        Runs with ``key()``, as `expand` returns them.
    out
        Folder; each run may keep files in ``out/runs/<key>``, and the traceback of a failed one is
        ``error.txt`` there.
    run
        ``run(config, folder) -> row``, importable at top level. The default is `minilora.sweep.run.run`.
    executor
        Any ``concurrent.futures.Executor``; it is never shut down. Without one, ``n_jobs=1`` runs in this
        process and more in that many fresh processes with one BLAS and one Numba thread each.
    retry_failed
        Run again what failed before; else its failed row stands.

    A run that raises, or whose process dies, becomes a row with status ``failed`` and the sweep goes on. Only
    this process writes. On Ctrl-C what is running is dropped, finished rows stay and `KeyboardInterrupt` goes
    on to the caller.

    Raises
    ------
    ValueError
        The folder cannot be written, or its results file is foreign; before any work.
    """
    checked = run is None
    run = run or _default_run()
    require(n_jobs >= 1, "n_jobs", n_jobs, "must be at least 1")
    out = Path(out)
    writable_folder(out)
    path = out / "results.jsonl"
    done = {row["key"]: row for row in repair_results(path)}
    if retry_failed:
        done = {key: row for key, row in done.items() if row["status"] == "success"}
    if checked and done:
        from minilora.sweep.run import check_kept

        check_kept(list(done.values()))
    wanted = {config.key(): config for config in configs}
    todo = [config for key, config in wanted.items() if key not in done]
    with _Progress(total=len(todo), kept=len(wanted) - len(todo), show=progress) as report:
        here = not todo or (executor is None and n_jobs == 1)
        results = in_process(run, todo, out) if here else in_executor(run, todo, out, executor, n_jobs)
        try:
            with closing(results):
                for config, outcome in results:
                    row = _row(config, outcome, out)
                    append_row(path, row)
                    done[row["key"]] = row
                    report.update(config, row)
        except KeyboardInterrupt:
            text = f"interrupted: {len(done)} finished rows are in {path}; run the same command again to continue"
            report.say(text, always=True)
            raise
    return [done[key] for key in wanted]


def _default_run() -> RunFunction:
    from minilora.sweep.run import run

    return run


def _row(config: Any, outcome: Mapping[str, Any] | BaseException, out: Path) -> Row:
    """Return the row of a run's outcome; a failure keeps the configuration, and its traceback goes beside the
    results."""
    about = {field.name: getattr(config, field.name) for field in fields(config)}
    if not isinstance(outcome, BaseException):
        try:
            return clean_row(about | {"status": "success"} | dict(outcome) | {"key": config.key()})
        except TypeError as error:
            outcome = error
    message = f"{type(outcome).__name__}: {' '.join(str(outcome).split())}"
    folder = Path(run_folder(out, config))
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "error.txt", "".join(traceback.format_exception(outcome)))
    return clean_row(about | {"key": config.key(), "status": "failed", "error": message})


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # imported is not enough: it must be running this code
    return ipython is not None and ipython.get_ipython() is not None


class _Progress:
    """A bar with ETA on a terminal or in a notebook, one line a run elsewhere, nothing with
    ``show=False``."""

    def __init__(self, total: int, kept: int, show: bool) -> None:
        self.total, self.done, self.show, self.started = total, 0, show, time.perf_counter()
        self.bar = tqdm(
            total=total,
            unit="run",
            desc="sweep",
            disable=not (show and (_in_notebook() or sys.stderr.isatty())),
        )
        if kept:
            self.say(f"{kept} runs are done already, {total} to do")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def say(self, text: str, always: bool = False) -> None:
        if self.show or always:
            tqdm.write(text, file=sys.stderr)

    def update(self, config: Any, row: Row) -> None:
        self.done += 1
        loss = row.get("loss")
        result = "failed" if row["status"] == "failed" else f"loss {loss:.3f}" if loss is not None else "done"
        self.bar.set_postfix_str(f"{describe(config)}: {result}", refresh=False)
        self.bar.update()
        if row["status"] == "failed":
            self.say(f"failed: {describe(config)}: {row['error']}")
        if self.bar.disable:
            elapsed = time.perf_counter() - self.started
            left = elapsed / self.done * (self.total - self.done)
            self.say(
                f"[{self.done}/{self.total}] {describe(config)}: {result}; {elapsed:.0f} s so far, about {left:.0f} s to go"
            )
