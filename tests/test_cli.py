"""The command line, called as a user calls it: in this process where that is enough, in a fresh one for
signals."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

import minilora
from minilora import cli
from minilora.composed import PlanConfig, PretrainConfig, settings_in
from minilora.formats.checkpoint import load_model
from minilora.sweep.settings import RunConfig


def call(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.mark.parametrize("command", sorted(cli.EXAMPLES))
def test_help_ends_in_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        call(command, "--help")
    assert stop.value.code == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "example: " + cli.EXAMPLES[command]
    assert last.split(" && ")[-1].removeprefix("example: ").startswith(f"minilora {command}")


@pytest.mark.parametrize("command", sorted(cli.EXAMPLES))
def test_each_example_is_accepted_by_the_parser(command):
    import tyro

    for line in cli.EXAMPLES[command].split(" && "):
        parsed = tyro.cli(cli.Command, args=shlex.split(line)[1:])
    assert type(parsed).__name__.lower() == command


RUN_FLAGS = """
    batch-size bits block-size data double-quant gradient-accumulation-steps gradient-checkpointing
    group-size learning-rate logits-chunk lora-alpha lora-dropout lora-plus-ratio max-length method model
    n-eval n-train optimizer out packing preset quantizer r seed split stage steps subset-modules
    target-modules task text-path use-dora use-rslora write-all
"""
FLAGS = {
    "train": RUN_FLAGS + " checkpoint-every eval-every init-lora-weights quant-type threads warmup-steps",
    "sweep": RUN_FLAGS + " n-jobs name quiet retry-failed",
    "plot": "",
    "generate": """
        adapter chat max-new-tokens model prompt run seed system task-prompts temperature top-k
        top-p
    """,
    "merge": "adapter compare how model offsets out quant-type quantizer run",
    "quantize": "block-size fit group-size model offset-dtype out quant-type quantizer save task weight",
    "memory": """
        batch-size bits block-size compare context double-quant dtype fit
        gradient-accumulation-steps gradient-checkpointing group-size json logits-chunk
        lora-dropout method model optimizer plot published quant-type r shards subset-modules
        target-modules use-dora
    """,
    "pretrain": "batch-size checkpoint-every learning-rate out seed steps text threads tokens warmup-steps",
    "info": "",
}
"""Options of each command, switches without their --no- form. Scripts use them: add, never take away."""


@pytest.mark.parametrize("command", sorted(cli.EXAMPLES))
def test_each_command_keeps_its_options(command, capsys):
    with pytest.raises(SystemExit):
        call(command, "--help")
    shown = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", capsys.readouterr().out))
    assert set(FLAGS[command].split()) <= shown


@pytest.mark.parametrize(
    ("command", "kind"), [("train", RunConfig), ("pretrain", PretrainConfig), ("memory", PlanConfig)]
)
def test_every_setting_is_an_option(command, kind, capsys):
    with pytest.raises(SystemExit):
        call(command, "--help")
    shown = capsys.readouterr().out
    assert [
        name for name in settings_in(kind) if f"--{name.replace('_', '-')} " not in shown.replace(",", " ")
    ] == []


def test_python_m_minilora_and_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"minilora {minilora.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "minilora", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"minilora {minilora.__version__}\n"


def test_train_generate_merge_in_a_row(tmp_path, capsys):
    out = tmp_path / "first"
    assert (
        call(
            "train",
            "--method",
            "qalora",
            "--bits",
            4,
            "--group-size",
            16,
            "--steps",
            3,
            "--n-eval",
            4,
            "--out",
            out,
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "trainable params: " in text and " || all params: " in text and " || trainable%: " in text
    assert {"adapter_config.json", "adapter_model.safetensors"} == {
        p.name for p in (out / "adapter").iterdir()
    }
    assert call("generate", "--run", out, "--task-prompts", 2, "--max-new-tokens", 5) == 0
    assert capsys.readouterr().out.count("Describe: ") == 2
    assert call("merge", "--run", out) == 0
    text = capsys.readouterr().out
    assert "merged 28 layers" in text and (out / "merged.safetensors").is_file()
    before, after = text.split("loss ")[1].split("\n")[0].split(" with the adapter, ")
    assert abs(float(before) - float(after.split()[0])) < 1e-4
    assert call("merge", "--run", out, "--compare") == 0
    text = capsys.readouterr().out
    for way in (
        "not merged",
        "full-precision base",
        "dequantized base",
        "re-quantized: int4, g = 16, gptq",
        "offsets, float32",
        "offsets, whole zero points",
    ):
        assert f"| {way} " in text
    assert (out / "merges.md").read_text() in text
    assert call("merge", "--run", out, "--offsets", "zero", "--out", tmp_path / "hf") == 0
    assert (
        tmp_path / "hf" / "config.json"
    ).is_file() and "6.000 before, 5.250 merged" in capsys.readouterr().out
    assert (
        call("merge", "--run", out, "--out", tmp_path / "float offsets") == 2
    )  # GPTQ's form holds whole zero points only
    assert "whole zero points" in capsys.readouterr().err


def test_merge_refuses_what_does_not_go_together(tmp_path, capsys):
    out = tmp_path / "run"
    assert call("train", "--method", "qlora", "--steps", 1, "--n-eval", 2, "--out", out) == 0
    for arguments, part in (
        (("--offsets", "zero"), "offsets='zero': only --how requantize or offsets"),
        (("--how", "dense", "--quant-type", "int4"), "quant_type='int4': only --how requantize"),
        (("--compare", "--out", tmp_path / "x"), "leave out --how, --offsets and --out"),
    ):
        assert call("merge", "--run", out, *arguments) == 2
        assert part in capsys.readouterr().err
    arguments = ("--how", "requantize", "--quant-type", "int4", "--quantizer", "hqq", "--offsets", "zero")
    assert call("merge", "--run", out, *arguments, "--out", tmp_path / "hf") == 0
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "gptq"
    )


def test_what_a_weight_loses_and_a_model_saved_in_each_form(tmp_path, capsys):
    out = tmp_path / "q"
    arguments = ["quantize", "--quant-type", "nf4", "int2", "--quantizer", "rtn", "gptq", "hqq", "--out", out]
    assert call(*arguments, "--weight", "layers.1.self_attn.q_proj", "--save", tmp_path / "hf") == 0
    text = capsys.readouterr().out
    assert "model.layers.1.self_attn.q_proj 128 × 128" in text and "loss " in text
    assert (out / "weight.md").is_file() and {p.stem for p in out.glob("*.png")} == {
        "levels",
        "blocks",
        "errors",
        "bytes",
    }
    assert (
        call(
            "quantize",
            "--model",
            tmp_path / "hf",
            "--quant-type",
            "int4",
            "--quantizer",
            "hqq",
            "--out",
            out,
            "--save",
            tmp_path / "m.safetensors",
        )
        == 0
    )
    assert load_model(tmp_path / "m.safetensors").blocks[0].mlp.up_proj.weight.quant_type == "int4"


def test_a_small_sweep_writes_everything_and_plot_does_it_again(tmp_path, capsys):
    grid = [
        "sweep",
        "--method",
        "lora",
        "base",
        "--r",
        2,
        "--seed",
        0,
        "--steps",
        2,
        "--n-eval",
        4,
        "--n-jobs",
        1,
        "--out",
        tmp_path,
        "--name",
        "small",
    ]
    assert call(*grid) == 0
    text = capsys.readouterr().out
    assert "2 runs in 1 process" in text and "LoRA" in text
    folder = tmp_path / "small"
    names = {p.name for p in folder.iterdir()}
    assert {"results.jsonl", "results.csv", "README.md"} <= names
    assert any(n.endswith(".png") for n in names | {p.name for p in folder.rglob("*.png")})
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"lora", "base"} and all(
        row["status"] == "success" for row in rows
    )
    assert call(*grid) == 0  # everything is there: nothing runs again
    assert (folder / "results.jsonl").read_text().count("\n") == 2
    (folder / "README.md").unlink()
    assert call("plot", folder) == 0
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--r", 0], ["r=0", "at least 1"]),
        (["train", "--r", 4096], ["r=4096", "at most 128"]),
        (["train", "--method", "qalora", "--group-size", 48], ["group_size=48", "divide", "32"]),
        (["train", "--target-modules", "query"], ["query", "q_proj"]),
        (["train", "--method", "qlora", "--bits", 5], ["nf5", "nf4"]),
        (["train", "--task", "text", "--text-path", "no/such/file.txt"], ["no/such/file.txt"]),
        (["generate"], ["--prompt"]),
        (["generate", "--prompt", "x", "--run", "no/such/run"], ["no/such/run"]),
        (["merge", "--run", "no/such/run"], ["no/such/run"]),
        (["plot", "no/such/folder"], ["no/such/folder"]),
        (["train", "--method", "lora", "--quantizer", "gptq"], ["quantizer='gptq'", "quantizes nothing"]),
        (["train", "--method", "qalora", "--use-dora"], ["use_dora=True", "use_qalora"]),
        (["quantize", "--weight", "proj", "--out", "{tmp}"], ["weight='proj'", "matches 0", "q_proj"]),
        (["quantize", "--weight", "q_proj", "--out", "{tmp}"], ["weight='q_proj'", "matches 4"]),
        (["quantize", "--model", "no/such/model", "--out", "{tmp}"], ["no/such/model"]),
        (["quantize", "--quant-type", "nf5", "--out", "{tmp}"], ["nf5", "nf4"]),
        (
            ["quantize", "--quant-type", "nf4", "--quantizer", "hqq", "--out", "{tmp}"],
            ["nothing to do for nf4"],
        ),
        (["pretrain", "--text", "no/such/file.txt", "--out", "{tmp}"], ["no/such/file.txt"]),
        (["sweep", "--method", "lora", "--r", 500, "--out", "{tmp}"], ["r=500", "at most"]),
        (["sweep", "--preset", "fulll"], ["fulll", "demo, full"]),
        (["sweep", "--preset", "full", "--task", "python"], ["full", "leave out --task"]),
        (["sweep", "--preset", "demo", "--split", "validation"], ["demo", "--split"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*(str(tmp_path) if a == "{tmp}" else a for a in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("minilora: error: ") and "\n" not in error
    for part in parts:
        assert part in error


def test_naming_an_axis_with_its_default_is_a_grid_of_ones_own(tmp_path, capsys):
    assert (
        call(
            "sweep",
            "--method",
            "base",
            "--r",
            8,
            "--steps",
            1,
            "--n-eval",
            2,
            "--n-jobs",
            1,
            "--out",
            tmp_path,
        )
        == 0
    )
    assert "Your own grid." in capsys.readouterr().out and (tmp_path / "custom" / "results.jsonl").is_file()


def test_a_folder_of_another_run_is_refused(tmp_path, capsys):
    settings = ["--steps", 1, "--batch-size", 2, "--n-eval", 2, "--out", tmp_path]
    assert call("train", "--method", "lora", *settings) == 0
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert call("train", "--method", "qlora", *settings) == 2
    error = capsys.readouterr().err
    assert "holds another run" in error and "method: 'lora' there, 'qlora' here" in error
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_is_one_line(tmp_path, capsys):
    assert (
        call(
            "train",
            "--learning-rate",
            1e30,
            "--steps",
            3,
            "--batch-size",
            2,
            "--n-eval",
            2,
            "--out",
            tmp_path,
        )
        == 2
    )
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "it/s" not in line and "step" in line and "error" in line
    ]
    assert len(lines) == 1 and "not finite" in lines[0]


def test_text_files_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_bytes(b"")
    latin.write_bytes("naïve ".encode("latin-1") * 2000)
    for path, word in ((empty, "empty"), (latin, "UTF-8")):
        assert call("train", "--task", "text", "--text-path", path) == 2
        assert word in capsys.readouterr().err


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0 and not os.path.exists("/proc"), reason="needs /proc"
)
def test_unwritable_folder_is_refused_before_work(capsys):
    assert call("sweep", "--method", "base", "--out", "/proc/nowhere") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_info(capsys):
    assert call("info") == 0
    text = capsys.readouterr().out
    for word in ("numpy_version", "numba_version", "blas", "threads", "numba layer", "numba cache"):
        assert word in text


def test_ctrl_c_keeps_finished_rows_and_says_how_to_continue(tmp_path):
    arguments = [
        "sweep",
        "--method",
        "base",
        "lora",
        "--r",
        "1",
        "2",
        "4",
        "--seed",
        "0",
        "1",
        "2",
        "3",
        "--steps",
        "20",
        "--batch-size",
        "4",
        "--n-eval",
        "8",
        "--n-jobs",
        "1",
        "--name",
        "cut",
        "--out",
        str(tmp_path),
    ]
    command = [sys.executable, "-m", "minilora", *arguments]
    results = tmp_path / "cut" / "results.jsonl"
    deadline = time.monotonic() + 90
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell in the background hands it on ignored
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while time.monotonic() < deadline and not (results.exists() and results.stat().st_size):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "continue" in errors
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert 1 <= len(rows) < 13 and all(row["status"] == "success" for row in rows)


def test_import_is_cheap():
    code = "import time; t = time.perf_counter(); import minilora; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert min(float(run.stdout) for run in runs) < 0.7
