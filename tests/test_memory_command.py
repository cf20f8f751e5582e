"""``minilora memory``, called as a user calls it: tables, JSON, combinations, and everything that is
refused."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
from helpers import GQA, make_model
from test_llama_gguf import CONFIG, metadata_of, small

from minilora import cli
from minilora.config import ConfigError
from minilora.formats.files import FileError
from minilora.formats.gguf_writer import write_gguf
from minilora.memory import compare, fit, plan, published
from minilora.memory.architectures import ARCHITECTURES


def call(*arguments):
    return cli.main(["memory", *map(str, arguments)])


def answer(capsys, *arguments):
    assert call(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


# ---- what it prints


def test_the_issues_example_counts_in_full(capsys):
    assert call("--model", "llama-7b", "--method", "lora", "--r", 64) == 0
    text = capsys.readouterr().out
    assert text == f"{plan('llama-7b', method='lora', r=64)}\n"
    for part in (
        "trainable params: 159,907,840 || all params: 6,898,323,456",
        "26,953,662,464",
        "639,631,360",
        "layers.0 to 31, each",
        "q_proj: input kept for dA; shared with k_proj, v_proj",
    ):
        assert part in text


def test_without_options_it_is_the_tiny_base_with_lora(capsys):
    assert call() == 0
    assert capsys.readouterr().out == f"{plan()}\n"


def test_the_example_of_its_help_runs(capsys):
    assert cli.main(shlex.split(cli.EXAMPLES["memory"])[1:]) == 0
    expected = plan("llama-7b", method="qlora", r=64, gradient_checkpointing=True)
    assert f"{expected.peak:,}" in capsys.readouterr().out


def test_every_option_reaches_the_plan(capsys):
    options = {
        "method": "qlora",
        "r": 4,
        "target_modules": "q_proj,v_proj",
        "bits": 3,
        "block_size": 128,
        "double_quant": False,
        "optimizer": "paged_adamw",
        "batch_size": 4,
        "context": 48,
        "shards": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "logits_chunk": 16,
        "lora_dropout": 0.1,
        "use_dora": True,
    }
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += (
            [f"--{flag}" if value is True else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", value]
        )
    found = answer(capsys, *words)
    assert found == json.loads(json.dumps(plan("tiny", **options).to_dict()))
    assert found["title"] != plan("tiny", method="qlora").title


def test_methods_side_by_side(capsys):
    assert (
        call(
            "--model",
            "gpt3-175b",
            "--compare",
            "full",
            "lora",
            "qlora",
            "qalora",
            "--bits",
            4,
            "--context",
            64,
        )
        == 0
    )
    text = capsys.readouterr().out
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("bytes "))
    assert lines[head].split() == ["bytes", "full", "lora", "qlora", "qalora"]
    rows = {line[:22].strip(): line[22:].split() for line in lines[head + 2 :]}
    by = [plan("gpt3-175b", method=m, context=64) for m in ("full", "lora", "qlora", "qalora")]
    assert rows["peak, one worker"] == [f"{x.peak:,}" for x in by]
    assert rows["trainable parameters"] == [f"{x.trainable:,}" for x in by]
    assert rows["effective bits"] == ["32.000", "32.000", "4.127", "5.000"]
    assert rows["optimizer"] == [f"{x.by_kind()['optimizer']:,}" for x in by]
    assert max(map(len, lines)) <= 110


def test_where_bytes_in_full_would_be_too_wide_they_are_for_a_human(monkeypatch):
    found = compare(
        "tiny", ["full", "subset", "lora", "qalora"], context=16, optimizer="paged_adamw", batch_size=2
    )
    width = max(map(len, str(found).splitlines()[5:]))
    assert "MiB" not in str(found)
    monkeypatch.setattr(sys.modules["minilora.memory.compare"], "LINE_WIDTH", width - 1)
    lines = str(found).splitlines()[5:]
    assert max(map(len, lines)) < width and sum("MiB" in line for line in lines) > 4
    labels = [row[0] for row in found.table()[1]]
    assert labels.index("2 workers, at most") == labels.index("peak, one worker") + 1 and "on disk" in labels
    full, lora = found.ledgers["full"], found.ledgers["lora"]
    row = found.table()[1][labels.index("on disk")]
    assert row[1] == f"{full.on_disk:,}" == f"{8 * full.trainable:,}" and row[3] == f"{8 * lora.trainable:,}"
    page = found._repr_html_()
    assert f"{full.peak:,}" in page and page.count("<tr>") == len(labels) + 1


def test_compare_and_fit_and_published_as_json(capsys):
    found = answer(capsys, "--compare", "lora", "qalora", "--r", 4, "--context", 32)
    assert list(found) == ["lora", "qalora"] and found["lora"]["peak"] == plan("tiny", r=4, context=32).peak
    found = answer(capsys, "--fit", "1MB", "--method", "qlora", "--r", 8, "--bits", 4, "--context", 32)
    needs = plan("tiny", method="qlora", context=32).bound(2) + found["own"]
    assert found["rows"] == [{"method": "qlora", "weights": "nf4", "r": 8, "batch": 0, "needs": needs}]
    assert found["own"] > 50 * 2**20  # Python, NumPy, Numba
    found = answer(capsys, "--published")
    assert found["rows"][0]["value"] == 159_907_840
    assert call("--published") == 0
    assert capsys.readouterr().out == f"{published()}\n"


def test_fit_prints_what_the_function_says(capsys):
    assert call("--fit", "4 MiB", "--method", "full", "--context", 16) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("tiny in 4,194,304 bytes (4.0 MiB): batches of 16 tokens, adamw")
        and "Nothing fits." in text
    )


def test_figures_beside_the_table(tmp_path, capsys, monkeypatch):
    from minilora.report import memory_plots

    asked = []
    monkeypatch.setattr(
        memory_plots,
        "save_memory_figures",
        lambda *a, **k: asked.append((a, k)) or [tmp_path / "methods.png"],
    )
    assert call("--plot", tmp_path, "--r", 4, "--context", 16) == 0
    assert capsys.readouterr().out.endswith(f"figures (methods.png) in {tmp_path}\n")
    assert asked == [(("tiny", str(tmp_path), "lora", ()), {"progress": True, "r": 4, "context": 16})]
    assert answer(capsys, "--plot", tmp_path, "--compare", "lora", "--context", 16)["figures"] == [
        str(tmp_path / "methods.png")
    ]


# ---- other models


def test_a_gguf_and_a_folder(tmp_path, capsys):
    from minilora.formats.huggingface import save_huggingface

    model = make_model(GQA, trainable=False)
    save_huggingface(model, tmp_path / "hf")
    tensors, arrays = small(kind="F32", embedding="F32")
    write_gguf(tmp_path / "m.gguf", tensors, metadata_of(CONFIG))
    sizes = [
        answer(capsys, "--model", path, "--method", "full", "--context", 8)
        for path in (tmp_path / "hf", tmp_path / "hf" / "config.json", tmp_path / "m.gguf")
    ]
    counts = [sum(p.data.size for p in model.parameters())] * 2 + [sum(a.size for a in arrays.values())]
    assert [found["parameters"] for found in sizes] == counts
    assert [found["by_kind"]["weights"] for found in sizes] == [4 * n for n in counts]


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "nope"], ["model='nope': there are ", *ARCHITECTURES, "config.json"]),
        (["--model", "lama-7b"], ["did you mean llama-7b?"]),
        (["--context", 257], ["context=257", "256 tokens"]),
        (["--context", 0], ["context=0", "at least 1"]),
        (["--method", "qalora", "--group-size", 48], ["group_size=48", "divide"]),
        (["--bits", 4], ["bits: ", "qlora or qalora, not for lora"]),
        (["--method", "full", "--r", 8], ["r: ", "not for full"]),
        (["--r", 4096], ["r=4096", "at most 128"]),
        (["--r", 0], ["r=0"]),
        (["--method", "LoRA"], ["method='LoRA'", "full, subset, lora"]),
        (["--method", "qlora", "--bits", 5], ["bits=5", "nf2, nf3, nf4"]),
        (["--method", "qlora", "--quant-type", "int4"], ["quant_type='int4'", "nf4"]),
        (["--method", "qlora", "--quant-type", "nf4", "--bits", 3], ["bits=3", "nf4"]),
        (["--method", "qlora", "--group-size", 32], ["group_size: is for method qalora"]),
        (["--method", "qalora", "--no-double-quant"], ["double_quant: is for method qlora"]),
        (["--method", "qalora", "--use-dora"], ["use_dora: is for method lora or qlora"]),
        (["--subset-modules", "layers.1"], ["subset_modules: is for method subset"]),
        (["--method", "qlora", "--block-size", 48], ["block_size=48", "32, 64"]),
        (["--target-modules", "query"], ["query", "q_proj"]),
        (["--optimizer", "adam"], ["optimizer='adam'", "paged_adamw"]),
        (["--dtype", "int8"], ["dtype='int8'", "float32"]),
        (["--batch-size", 0], ["batch_size=0"]),
        (["--shards", -1], ["shards=-1"]),
        (["--logits-chunk", -1], ["logits_chunk=-1"]),
        (["--lora-dropout", "nan"], ["lora_dropout=nan"]),
        (["--compare"], ["compare=()", "at least one"]),
        (["--compare", "lora", "lora"], ["twice"]),
        (["--compare", "lora", "nope"], ["compare='nope'"]),
        (["--compare", "lora", "--method", "lora"], ["method='lora'", "--compare"]),
        (["--compare", "full", "lora", "--bits", 4], ["bits: ", "not for full, lora"]),
        (["--compare", "lora", "--fit", "8GB"], ["choose one of --compare, --fit, --published"]),
        (["--published", "--fit", "8GB"], ["choose one of"]),
        (["--plot", "x", "--fit", "8GB"], ["choose one of"]),
        (["--published", "--model", "tiny", "--r", 4], ["published=True", "leave out model, r"]),
        (["--fit", "lots"], ["fit='lots'", "such as 8GB", "8GiB"]),
        (["--fit=-3GB"], ["fit='-3GB'"]),
        (["--fit", "0"], ["fit='0'"]),
        (["--fit", "8XB"], ["fit='8XB'"]),
        (["--fit", "nan"], ["fit='nan'"]),
        (["--fit", "inf"], ["fit='inf'"]),
        (["--fit", "8GB", "--batch-size", 2], ["batch_size=2", "leave it out"]),
        (["--fit", "8GB", "--method", "lora", "--bits", 4], ["bits: "]),
        (["--plot", "{file}"], ["cannot be written"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, parts, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert call(*(str(tmp_path / "file") if a == "{file}" else a for a in arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("minilora: error: ") and err.count("\n") == 1 and out == ""
    for part in parts:
        assert part in err


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", {"model_type": "bert", "hidden_size": 768}, "model_type='bert'"),
        ("config.json", b"[1, 2", "not JSON"),
        ("config.json", b"[1, 2]", "config.json"),
        ("config.json", b"\xff\xfe\x00", "config.json"),
        ("config.json", {k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size"),
        ("config.json", LLAMA | {"num_attention_heads": 5}, "num_attention_heads=5"),
        ("config.json", LLAMA | {"num_hidden_layers": "many"}, "num_hidden_layers='many'"),
        ("config.json", LLAMA | {"hidden_size": -64}, "hidden_size=-64"),
        ("m.gguf", b"GGUF\x03\x00\x00\x00", "8 bytes long"),
        ("m.gguf", b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        ("m.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "m.gguf"),
    ],
)
def test_files_that_say_something_else_are_refused(name, content, part, tmp_path, capsys):
    path = written(tmp_path, name, content)
    assert call("--model", path) == 2
    error = capsys.readouterr().err
    assert str(path) in error and part in error and error.count("\n") == 1
    for use in (lambda: compare(path, ["lora"]), lambda: fit("8GB", path, own=0)):
        with pytest.raises((ConfigError, FileError)):
            use()


def test_a_cut_gguf_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", small()[0], metadata_of(CONFIG))
    whole = (tmp_path / "m.gguf").read_bytes()
    for end in (10, 30, 200, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut{end}.gguf"
        path.write_bytes(whole[:end])
        with pytest.raises(FileError, match=f"cut{end}.gguf"):
            plan(str(path))
