"""The sweep: expansion, resume, failures, dying processes, Ctrl-C; with a fake run that takes no time."""

import csv
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

from minilora.composed import DataConfig
from minilora.config import LoraConfig, QuantConfig, TrainConfig
from minilora.sweep.presets import (
    LEARNING_RATES,
    SEARCH_SEED,
    STUDY_SEEDS,
    choose_learning_rates,
    demo_runs,
    run_preset,
    search_runs,
    study_runs,
)
from minilora.sweep.results import ROW_KEYS, append_row, check_one_corpus, clean_row, group_rows, successful
from minilora.sweep.runner import SweepConfig, describe, expand, load_results, outline, run_sweep, write_csv
from minilora.sweep.settings import RunConfig

METHODS = ("full", "lora", "qlora", "qalora", "base", "quantized_base")


@dataclass(frozen=True)
class FakeConfig:
    """The part of a RunConfig that a sweep looks at."""

    method: str = "lora"
    r: int = 8
    bits: int = 32
    quant_type: str | None = None
    learning_rate: float | None = 1e-2
    task: str = "products"
    seed: int = 0
    marker: str = ""

    def row(self) -> dict:
        return asdict(self)

    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def fake_run(config, folder):
    """A row without any work; certain seeds misbehave."""
    if config.marker:
        with open(config.marker, "a") as file:
            file.write(f"{config.seed}\n")
    if config.seed == 13:
        raise FloatingPointError("loss is NaN at step 3\nin layer 2")
    if config.seed == 66:
        os._exit(7)
    return {
        "status": "success",
        "loss": 1.0 / config.r,
        "seed": config.seed,
        "recall": np.float32(0.5),
        "process": os.getpid(),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", ""),
    }


def runs_of(path):
    return Path(path).read_text().split() if Path(path).exists() else []


# expansion


def test_axes_that_do_not_matter_are_not_multiplied():
    config = SweepConfig(
        {
            "method": ("base", "quantized_base", "full", "subset", "lora", "qlora", "qalora"),
            "r": (1, 2, 4),
            "bits": (2, 4),
            "quant.group_size": (16, 32),
            "train.learning_rate": (1e-3, 1e-2),
            "seed": range(3),
        }
    )
    counts = {method: 0 for method in config.axes["method"]}
    for run in expand(config):
        counts[run.method] += 1
    trained = 2 * 3  # learning rates x seeds
    assert counts == {
        "base": 1,
        "quantized_base": 2 + 2 * 2,
        "full": trained,
        "subset": trained,
        "lora": 3 * trained,
        "qlora": 3 * 2 * trained,
        "qalora": 3 * 2 * 2 * trained,
    }


def test_expansion_is_deterministic_and_without_duplicates():
    config = SweepConfig({"method": METHODS, "r": (8, 8, 2), "seed": (0, 0, 1)})
    keys = [run.key() for run in expand(config)]
    assert keys == [run.key() for run in expand(config)]
    assert len(set(keys)) == len(keys)
    assert len([run for run in expand(config) if run.method == "lora"]) == 2 * 2


def test_each_method_stands_on_its_own_kind_of_weight():
    rows = [run.row() for run in expand(SweepConfig({"method": METHODS, "bits": (2, 3)}))]
    kinds = {(row["method"], row["bits"], row["quant_type"]) for row in rows}
    assert {kind for kind in kinds if kind[0] == "qlora"} == {("qlora", 2, "nf2"), ("qlora", 3, "nf3")}
    assert {kind for kind in kinds if kind[0] == "qalora"} == {("qalora", 2, "int2"), ("qalora", 3, "int3")}
    assert {kind[2] for kind in kinds if kind[0] == "quantized_base"} == {"nf2", "nf3", "int2", "int3"}
    assert {kind[1] for kind in kinds if kind[0] in ("lora", "full", "base")} == {32}


def test_shared_settings_reach_every_run():
    assert {run.train.steps for run in expand(SweepConfig({"method": METHODS, "steps": 7}))} == {7}
    base = RunConfig(train=TrainConfig(steps=7), data=DataConfig(split="validation"))
    runs = expand(SweepConfig({"method": METHODS}, base))
    assert {(run.train.steps, run.data.split) for run in runs} == {(7, "validation")}


def test_the_base_run_decides_what_no_axis_says():
    base = RunConfig(method="qlora", quant=QuantConfig("nf3", block_size=128), lora=LoraConfig(r=4))
    assert [run.row() for run in expand(SweepConfig(base=base))] == [base.row()]
    runs = {run.method: run for run in expand(SweepConfig({"method": ("lora", "qlora", "qalora")}, base))}
    assert runs["lora"].quant is None and runs["lora"].lora.r == 4
    assert runs["qlora"].storage() == base.quant
    assert runs["qalora"].storage() == QuantConfig("int3")
    rates = {method: run.training().learning_rate for method, run in runs.items()}
    assert rates == {"lora": 1e-2, "qlora": 1e-2, "qalora": 1e-2}


def test_any_setting_can_be_an_axis():
    axes = {"method": ("qlora", "qalora", "full"), "quant_type": ("nf4", "fp4", "int2"), "use_dora": (False,)}
    runs = expand(SweepConfig(axes | {"optimizer": ("adamw", "sgd")}))
    assert [(run.method, run.row()["quant_type"], run.train.optimizer) for run in runs] == [
        *(("qlora", kind, optimizer) for kind in ("nf4", "fp4") for optimizer in ("adamw", "sgd")),
        *(("qalora", "int2", optimizer) for optimizer in ("adamw", "sgd")),
        *(("full", None, optimizer) for optimizer in ("adamw", "sgd")),
    ]


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("method", ("dora",), "qalora"),
        ("bits", (5,), "2, 3, 4, 8"),
        ("r", (0,), "at least 1"),
        ("seed", (), "at least one"),
        ("split", "train", "validation, test"),
        ("colour", ("red",), "no such setting"),
        ("quant_type", ("int4",), "method 'qlora' stores nf2"),
    ],
)
def test_bad_axes_are_refused_by_name(field, value, hint):
    with pytest.raises(ValueError, match=field) as error:
        expand(SweepConfig({"method": "qlora"} | {field: value}))
    assert hint in str(error.value)


def test_outline_names_the_grid_and_the_number_of_runs():
    text = outline([FakeConfig(), FakeConfig(r=2), FakeConfig("full"), FakeConfig("full", seed=1)], n_jobs=2)
    assert (
        "4 runs" in text and "lora" in text and "r 2, 8" in text and "full" in text and "seeds 0, 1" in text
    )


# running


def test_every_row_has_every_column_and_is_on_disk(tmp_path):
    configs = [FakeConfig(seed=seed) for seed in range(3)]
    rows = run_sweep(configs, tmp_path, run=fake_run, progress=False)
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert all(set(ROW_KEYS) <= set(row) for row in rows)
    assert rows[0]["recall"] == 0.5 and type(rows[0]["recall"]) is float
    assert load_results(tmp_path / "results.jsonl") == rows == load_results(tmp_path)


def test_a_second_sweep_runs_only_what_is_missing(tmp_path):
    marker = str(tmp_path / "ran")
    run_sweep([FakeConfig(seed=0, marker=marker)], tmp_path, run=fake_run, progress=False)
    rows = run_sweep(
        [FakeConfig(seed=s, marker=marker) for s in (1, 0)], tmp_path, run=fake_run, progress=False
    )
    assert runs_of(marker) == ["0", "1"]
    assert [row["seed"] for row in rows] == [1, 0]


def test_a_failing_run_becomes_a_row_and_is_retried_only_on_request(tmp_path):
    marker = str(tmp_path / "ran")
    configs = [FakeConfig(seed=seed, marker=marker) for seed in (13, 0)]
    rows = run_sweep(configs, tmp_path, run=fake_run, progress=False)
    assert [row["status"] for row in rows] == ["failed", "success"]
    assert rows[0]["error"] == "FloatingPointError: loss is NaN at step 3 in layer 2"
    assert rows[0]["method"] == "lora" and rows[0]["seed"] == 13 and rows[0]["loss"] is None
    assert "fake_run" in (tmp_path / "runs" / configs[0].key() / "error.txt").read_text()
    run_sweep(configs, tmp_path, run=fake_run, progress=False)
    assert runs_of(marker) == ["13", "0"]
    run_sweep(configs, tmp_path, run=fake_run, progress=False, retry_failed=True)
    assert runs_of(marker) == ["13", "0", "13"]
    assert len(load_results(tmp_path)) == 2


def row_with_an_array(config, folder):
    return {"loss": np.zeros(3)}


def test_a_row_that_cannot_be_stored_is_a_failure(tmp_path):
    (row,) = run_sweep([FakeConfig()], tmp_path, run=row_with_an_array, progress=False)
    assert row["status"] == "failed" and "'loss' holds a ndarray" in row["error"]


def test_two_processes_with_one_thread_each(tmp_path):
    rows = run_sweep([FakeConfig(seed=s) for s in range(6)], tmp_path, run=fake_run, n_jobs=2, progress=False)
    assert [row["seed"] for row in rows] == list(range(6))
    assert os.getpid() not in {row["process"] for row in rows}
    assert {row["threads"] for row in rows} == {"1"}
    assert not multiprocessing.active_children()


def test_a_dying_process_costs_only_its_own_run(tmp_path):
    seeds = [0, 66, 1, 2, 3]
    rows = run_sweep([FakeConfig(seed=s) for s in seeds], tmp_path, run=fake_run, n_jobs=2, progress=False)
    assert [row["status"] for row in rows] == ["success", "failed", "success", "success", "success"]
    assert "BrokenProcessPool" in rows[1]["error"]
    assert len(load_results(tmp_path)) == len(seeds)


def test_an_executor_that_is_passed_in_stays_open(tmp_path):
    with ThreadPoolExecutor(2) as executor:
        configs = [FakeConfig(seed=s) for s in (0, 13, 1)]
        rows = run_sweep(configs, tmp_path, run=fake_run, executor=executor, progress=False)
        assert executor.submit(int, "5").result() == 5
    assert [row["status"] for row in rows] == ["success", "failed", "success"]


def interrupted(config, folder):
    if config.seed == 2:
        raise KeyboardInterrupt
    return {"loss": 1.0}


@pytest.mark.parametrize("threads", [False, True])
def test_ctrl_c_keeps_finished_rows_and_says_how_to_continue(tmp_path, capsys, threads):
    configs = [FakeConfig(seed=s) for s in range(5)]
    executor = ThreadPoolExecutor(1) if threads else None
    with pytest.raises(KeyboardInterrupt):
        run_sweep(configs, tmp_path, run=interrupted, executor=executor)
    if executor:
        executor.shutdown()
    assert [row["seed"] for row in load_results(tmp_path)] == [0, 1]
    assert "run the same command again to continue" in capsys.readouterr().err


def slow_run(config, folder):
    import time

    time.sleep(0.1 if config.seed == 0 else 60)
    return {"loss": 1.0}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to a process group")
def test_ctrl_c_from_the_terminal_ends_the_workers_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from {__name__} import FakeConfig, slow_run
        from minilora.sweep.runner import run_sweep
        if __name__ == "__main__":
            run_sweep([FakeConfig(seed=s) for s in range(4)], {str(tmp_path)!r}, run=slow_run, n_jobs=2)
    """)
    )
    process = subprocess.Popen(
        [sys.executable, script], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "[1/4]" in first, first + process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode not in (0, None)
    assert "1 finished rows" in err and "KeyboardInterrupt" in err
    assert [row["seed"] for row in load_results(tmp_path)] == [0]


def test_one_line_a_run_when_there_is_no_terminal(tmp_path, capsys):
    run_sweep([FakeConfig(seed=0), FakeConfig(seed=13)], tmp_path, run=fake_run)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/2] lora r=8 lr=0.01 seed=0 products: loss 0.125")
    assert any("failed" in line and "loss is NaN" in line for line in lines)
    run_sweep([FakeConfig(seed=0)], tmp_path, run=fake_run)
    assert "1 runs are done already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (FakeConfig("base"), "base products"),
        (FakeConfig("full", seed=3), "full lr=0.01 seed=3 products"),
        (FakeConfig("qlora", quant_type="nf4", learning_rate=None), "qlora nf4 r=8 seed=0 products"),
    ],
)
def test_describe(config, text):
    assert describe(config) == text


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    marker = str(tmp_path / "ran")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written"):
        run_sweep([FakeConfig(marker=marker)], tmp_path / "file" / "out", run=fake_run, progress=False)
    assert runs_of(marker) == []


# the file of results


def results_file(tmp_path, *tail):
    path = tmp_path / "results.jsonl"
    rows = [json.dumps({"key": key, "status": "success", "loss": 1.0}).encode() for key in ("a", "b")]
    path.write_bytes(b"\n".join(rows) + b"\n" + b"".join(tail))
    return path


@pytest.mark.parametrize(
    "cut", [b'{"key": "c", "sta', b"\xff\xfe", b"\x00" * 9, b'{"key": "c", "status": "success"}']
)
def test_a_cut_last_line_is_left_out_and_trimmed_before_appending(tmp_path, cut):
    path = results_file(tmp_path, cut)
    assert [row["key"] for row in load_results(path)] == ["a", "b"]
    config = FakeConfig()
    run_sweep([config], tmp_path, run=fake_run, progress=False)
    assert [row["key"] for row in load_results(path)] == ["a", "b", config.key()]


@pytest.mark.parametrize(
    "bad", [b"not json", b"\xff", b"[1, 2]", b'{"loss": 1}', b'{"key": "x", "status": "?"}', b""]
)
def test_a_foreign_line_is_an_error_with_its_number_and_nothing_is_changed(tmp_path, bad):
    path = results_file(tmp_path, bad + b"\n", b'{"key": "d", "status": "success"}\n')
    before = path.read_bytes()
    for use in (load_results, lambda p: run_sweep([FakeConfig()], p.parent, run=fake_run, progress=False)):
        with pytest.raises(ValueError, match="line 3"):
            use(path)
    assert path.read_bytes() == before


def test_missing_results_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_results(tmp_path / "results.jsonl")


def test_the_last_row_of_a_key_counts(tmp_path):
    path = results_file(tmp_path)
    append_row(path, clean_row({"key": "a", "status": "success", "loss": 2.0}))
    assert [(row["key"], row["loss"]) for row in load_results(path)] == [("a", 2.0), ("b", 1.0)]


def test_csv_holds_the_same_rows(tmp_path):
    rows = [clean_row({"key": "a", "loss": 0.5, "extra": "x,y"}), clean_row({"key": "b"})]
    path = write_csv(rows, tmp_path / "results.csv")
    with open(path, newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [*ROW_KEYS, "extra"]
    assert (
        read[0]["loss"] == "0.5"
        and read[0]["extra"] == "x,y"
        and read[1]["loss"] == ""
        and read[1]["extra"] == ""
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.csv"]


def test_clean_row_stores_only_what_json_holds():
    row = clean_row(
        {"key": "a", "loss": np.float64("inf"), "steps": np.int64(3), "target_modules": ("q", "v")}
    )
    assert row["loss"] is None and type(row["steps"]) is int and row["target_modules"] == "q,v"
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("column", ["corpus_sha256", "base_sha256"])
def test_rows_of_different_data_are_never_pooled(column):
    rows = [
        {"task": "products", column: "aaaa"},
        {"task": "python", column: "cccc"},
        {"task": "products", column: "bbbb"},
    ]
    with pytest.raises(ValueError, match="aaaa.*bbbb"):
        group_rows(rows, ("task",))
    check_one_corpus(rows[:2])
    assert list(group_rows(rows[:2], ("task",))) == [("products",), ("python",)]


def test_successful_leaves_failures_and_the_search_out():
    rows = [
        {"status": "success", "stage": "study", "r": 1},
        {"status": "failed", "stage": "study", "r": 1},
        {"status": "success", "stage": "search", "r": 1},
        {"status": "success", "stage": "demo", "r": 2},
    ]
    assert successful(rows) == [rows[0], rows[3]]
    assert successful(rows, r=2) == [rows[3]]
    assert successful(rows, stage="search") == [rows[2]]


# presets


def test_the_demonstration_covers_what_it_promises():
    runs = demo_runs()
    assert len(runs) >= 24
    assert {run.method for run in runs} == {
        "full",
        "subset",
        "lora",
        "qlora",
        "qalora",
        "base",
        "quantized_base",
    }
    assert len({run.lora.r for run in runs if run.method == "lora"}) >= 3
    for method in ("qlora", "qalora", "quantized_base"):
        assert len({run.row()["bits"] for run in runs if run.method == method}) >= 3
    assert {run.data.task for run in runs} == {"products"} and {run.seed for run in runs} == {0, 1}
    assert len({run.key() for run in runs}) == len(runs)
    assert {run.train.steps for run in demo_runs(steps=5)} == {5}


def search_row(rate, loss, method="lora", **more):
    return {
        "stage": "search",
        "split": "validation",
        "task": "python",
        "method": method,
        "learning_rate": rate,
        "status": "success",
        "loss": loss,
    } | more


def test_the_least_mean_validation_loss_wins():
    rows = [
        search_row(1e-3, 2.0),
        search_row(1e-3, 1.0),
        search_row(1e-2, 1.4),
        search_row(1e-1, None, status="failed"),
    ]
    (choice,) = choose_learning_rates(rows)
    assert (choice.learning_rate, choice.loss, choice.on_edge) == (1e-2, 1.4, False)
    assert choice.tried == ((1e-3, 1.5), (1e-2, 1.4), (1e-1, None))


@pytest.mark.parametrize("best", [1e-3, 1e-1])
def test_a_best_value_on_the_edge_is_flagged(best):
    rows = [search_row(rate, 1.0 if rate == best else 2.0) for rate in (1e-3, 1e-2, 1e-1)]
    assert choose_learning_rates(rows)[0].on_edge


def test_the_search_refuses_the_test_split_and_a_method_that_never_worked():
    with pytest.raises(ValueError, match="validation split only"):
        choose_learning_rates([search_row(1e-3, 1.0, split="test")])
    with pytest.raises(ValueError, match="lora on python.*diverged"):
        choose_learning_rates([search_row(1e-3, None, status="failed", error="diverged")])


def test_rows_of_the_study_do_not_choose():
    assert choose_learning_rates([search_row(1e-3, 1.0, stage="study", split="test")]) == []


def test_the_search_uses_one_grid_the_validation_split_and_its_own_seed():
    runs = search_runs()
    assert len(LEARNING_RATES) >= 4 and SEARCH_SEED not in STUDY_SEEDS
    assert {(run.data.split, run.seed, run.stage) for run in runs} == {("validation", SEARCH_SEED, "search")}
    grids = {}
    for run in runs:
        grids.setdefault((run.data.task, run.method), []).append(run.train.learning_rate)
    assert len(grids) == 2 * 5 and all(tuple(sorted(grid)) == LEARNING_RATES for grid in grids.values())


def chosen_at(rate):
    rows = [
        search_row(rate, 1.0, method, task=task)
        for task in ("products", "python")
        for method in ("full", "subset", "lora", "qlora", "qalora")
    ]
    return choose_learning_rates(rows)


def test_the_study_covers_ranks_bits_tasks_and_seeds():
    runs = study_runs(chosen_at(3e-3))
    assert {(run.data.split, run.stage, run.data.task) for run in runs} == {
        ("test", "study", t) for t in ("products", "python")
    }
    one = [run.row() for run in runs if run.data.task == "python"]
    for method, bits in (("lora", 32), ("qlora", 4), ("qalora", 4)):
        seen = {(row["r"], row["seed"]) for row in one if (row["method"], row["bits"]) == (method, bits)}
        assert seen == {(r, seed) for r in (1, 2, 8, 64) for seed in (0, 1, 2)}
    for method in ("qlora", "qalora"):
        assert {row["bits"] for row in one if row["method"] == method and row["r"] == 8} == {2, 3, 4, 8}
    assert (
        len([row for row in one if row["method"] == "full"])
        == len([row for row in one if row["method"] == "subset"])
        == 3
    )
    stored = {row["quant_type"] for row in one if row["method"] == "quantized_base"}
    assert stored == {f"{kind}{bits}" for kind in ("nf", "int") for bits in (2, 3, 4, 8)}
    assert {row["learning_rate"] for row in one} == {3e-3, None}
    assert len({run.key() for run in runs}) == len(runs) == 2 * (12 + 21 + 21 + 3 + 3 + 1 + 8)


def test_each_task_and_method_of_the_study_has_its_own_learning_rate():
    choices = [
        choice._replace(learning_rate=1e-3 if choice.method == "full" else 1e-2) for choice in chosen_at(1.0)
    ]
    runs = [run for run in study_runs(choices) if run.method in ("full", "lora")]
    rates = {(run.method, run.train.learning_rate) for run in runs}
    assert rates == {("full", 1e-3), ("lora", 1e-2)}


def preset_run(config, folder):
    """Loss is least at 3e-3 for every method; only the search may see the validation split."""
    rate = config.row()["learning_rate"]
    assert (config.data.split == "validation") == (config.stage == "search")
    return {"loss": abs(np.log10(rate / 3e-3)) if rate else 3.0}


def test_the_full_preset_searches_and_then_studies(tmp_path):
    rows = run_preset("full", tmp_path, tasks=("products",), run=preset_run, progress=False)
    assert {row["stage"] for row in rows} == {"search", "study"}
    study = [row for row in rows if row["stage"] == "study" and row["method"] in ("full", "lora", "qalora")]
    assert {row["learning_rate"] for row in study} == {3e-3}
    assert load_results(tmp_path) == rows


def test_unknown_preset(tmp_path):
    with pytest.raises(ValueError, match="demo, full"):
        run_preset("huge", tmp_path, run=preset_run)
