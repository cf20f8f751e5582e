"""Runs → rows: run in independent processes, and keep every finished row."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from minilora.config import require
from minilora.formats.files import writable_folder, write_file
from minilora.sweep.grid import Run, SweepConfig, describe, expand, outline
from minilora.sweep.results import Row, append_row, clean_row, load_results, repair_results, write_csv
from minilora.sweep.workers import RunFunction, in_executor, in_process, run_folder

__all__ = ["Run", "SweepConfig", "describe", "expand", "load_results", "outline", "run_sweep", "write_csv"]


def run_sweep(
    configs: Sequence[Run],
    out: str | Path,
    *,
    run: RunFunction | None = None,
    executor: Executor | None = None,
    n_jobs: int = 1,
    progress: bool = True,
    retry_failed: bool = False,
) -> list[Row]:
    """Do the runs that a folder does not have yet and return the rows of all.

    Parameters
    ----------
    configs
        Runs as `expand` returns them, or objects of your own with `key()` and `row()`.
    out
        Folder. Rows are appended to `out/results.jsonl`. Each run may keep files in `out/runs/<key>`; the
        traceback of a failed one is `error.txt` there.
    run
        `run(config, folder) -> row`, importable at top level. The default is `minilora.sweep.run.run`.
    executor
        Any `concurrent.futures.Executor`; it is never shut down. Without one, `n_jobs=1` runs in this process
        and more in that many fresh processes with one BLAS and one Numba thread each.
    n_jobs
        Number of processes.
    progress
        Show a bar in a terminal or notebook, and lines elsewhere.
    retry_failed
        Run again what failed before. Otherwise its failed row stays.

    Returns
    -------
    list of dict
        One flat row per run, in the order of `configs`; `minilora.sweep.results.COLUMNS` says what is in it.

    Raises
    ------
    ValueError
        The folder cannot be written, or its results file is foreign. Nothing has run then.

    Notes
    -----
    A run that raises, or whose process dies, becomes a row with status `failed`, and the sweep goes on. Only
    this process writes. On Ctrl-C running work is dropped, finished rows stay and `KeyboardInterrupt` reaches
    the caller.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> from minilora.sweep.settings import RunConfig
    >>> runs = expand(SweepConfig({"method": "lora", "r": (1, 2)}, RunConfig.of(steps=1, n_eval=2)))
    >>> rows = run_sweep(runs, mkdtemp(), run=lambda config, folder: {"loss": 1.0 / config.lora.r})
    >>> [(row["r"], row["loss"]) for row in rows]
    [(1, 1.0), (2, 0.5)]
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
        from minilora.sweep.saved_runs import check_kept

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
            kept = f"interrupted: {len(done)} finished rows are in {path}"
            report.say(f"{kept}; run the same command again to continue", always=True)
            raise
    return [done[key] for key in wanted]


def _default_run() -> RunFunction:
    from minilora.sweep.run import run

    return run


def _row(config: Run, outcome: Mapping[str, Any] | BaseException, out: Path) -> Row:
    """Return the row of a run's outcome; a failure keeps the settings, and writes its traceback to a file."""
    about = dict(config.row())
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
    ipython = sys.modules.get("IPython")  # it may be imported without running this code
    return ipython is not None and ipython.get_ipython() is not None


class _Progress:
    """A bar with ETA on a terminal or in a notebook, one line per run elsewhere."""

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
        result = "done" if loss is None else f"loss {loss:.3f}"
        if row["status"] == "failed":
            result = "failed"
        self.bar.set_postfix_str(f"{describe(config)}: {result}", refresh=False)
        self.bar.update()
        if row["status"] == "failed":
            self.say(f"failed: {describe(config)}: {row['error']}")
        if self.bar.disable:
            elapsed = time.perf_counter() - self.started
            left = elapsed / self.done * (self.total - self.done)
            times = f"{elapsed:.0f} s so far, about {left:.0f} s to go"
            self.say(f"[{self.done}/{self.total}] {describe(config)}: {result}; {times}")
