"""A small language model in a GGUF, from the command line: trained, generated from, merged, opened again; and
what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import gguf_tokenizer
from test_llama_gguf import CONFIG, metadata_of, small

from minilora import cli
from minilora.config import ConfigError
from minilora.data.tasks import Batch
from minilora.formats.bases import load_pretrained, shape_of, stored_bytes
from minilora.formats.files import read_json
from minilora.formats.gguf import GGUFFile
from minilora.formats.gguf_writer import write_gguf
from minilora.formats.llama_gguf import load_gguf
from minilora.memory import available_bytes, measure
from minilora.sweep.inputs import base_of, check_memory, make_run_task, planned
from minilora.sweep.models import open_model, write_batch, write_streaming
from minilora.sweep.run_models import build, frozen_base, unpadded
from minilora.sweep.saved_runs import load_run
from minilora.sweep.settings import RunConfig

SHORT = (
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--n-train",
    "20",
    "--n-eval",
    "3",
    "--no-write-all",
    "--threads",
    "1",
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf")


def write_model(path: Path, seed: int = 0, kind: str = "Q4_1") -> Path:
    tokenizer = gguf_tokenizer()
    config = replace(CONFIG, vocab_size=len(tokenizer["tokenizer.ggml.tokens"]), context_length=320)
    write_gguf(path, small(config, kind, seed=seed)[0], metadata_of(config) | tokenizer)
    return path


@pytest.fixture
def run(capsys):
    def call(*arguments) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_train_generate_and_merge_as_the_readme_says(gguf, tmp_path, run):
    out = tmp_path / "run"
    code, said, err = run(
        "train",
        "--model",
        gguf,
        "--method",
        "qalora",
        "--r",
        2,
        "--learning-rate",
        0.05,
        *SHORT,
        "--out",
        out,
    )
    assert code == 0, err
    assert "trainable params" in said and "recall" in said
    assert {"adapter_config.json", "adapter_model.safetensors"} == {
        p.name for p in (out / "adapter").iterdir()
    }

    ask = ("generate", "--prompt", "This is a", "--max-new-tokens", 8)
    texts = {}
    for name, options in {
        "base": ("--model", gguf),
        "adapter": ("--model", gguf, "--adapter", out / "adapter"),
        "folder": ("--model", gguf, "--adapter", out),
        "run": ("--run", out),
    }.items():
        code, texts[name], err = run(*ask, *options)
        assert code == 0, err
    assert texts["adapter"] == texts["folder"] == texts["run"] != texts["base"]
    assert texts["base"].startswith("This is a")

    tuned = tmp_path / "tuned.gguf"
    code, said, err = run("merge", "--model", gguf, "--adapter", out / "adapter", "--out", tuned)
    assert code == 0, err
    assert "14 tensors Q4_1" in said and tuned.stat().st_size == gguf.stat().st_size
    before, after = GGUFFile(gguf), GGUFFile(tuned)
    assert list(before.tensors) == list(after.tensors) and all(
        before.entry(k) == after.entry(k) for k in before.metadata
    )
    changed = 0
    for name, info in before.tensors.items():
        if info.type == "Q4_1":
            old, new = before.weight(name), after.weight(name)
            np.testing.assert_array_equal(old.codes, new.codes)
            np.testing.assert_array_equal(old.scales, new.scales)
            changed += not np.array_equal(old.offsets, new.offsets)
    assert changed == 14
    _, model = load_run(out)
    ids = np.array([base_of(str(gguf)).tokenizer.encode("Describe this")])
    exact, merged = model.logits(ids), load_gguf(tuned).logits(ids)
    assert np.abs(exact - merged).max() < 2e-2 * np.ptp(exact)  # minima have 11 bits
    assert np.abs(exact - load_gguf(gguf).logits(ids)).max() > 5e-2 * np.ptp(exact)
    assert run(*ask, "--model", tuned)[0] == 0


@pytest.mark.parametrize(
    "method, quant_type, stored", [("lora", None, "F16"), ("lora", "Q8_0", "Q8_0"), ("qlora", "Q4_1", "Q4_1")]
)
def test_other_adapters_merge_into_the_type_asked_for(gguf, tmp_path, run, method, quant_type, stored):
    out, tuned = tmp_path / "run", tmp_path / "tuned.gguf"
    assert (
        run(
            "train",
            "--model",
            gguf,
            "--method",
            method,
            "--r",
            2,
            "--learning-rate",
            0.02,
            *SHORT,
            "--out",
            out,
        )[0]
        == 0
    )
    kind = () if quant_type is None else ("--quant-type", quant_type)
    code, said, err = run("merge", "--run", out, "--out", tuned, *kind)
    assert code == 0, err
    assert f"the file in {stored}" in said
    assert {
        info.type for name, info in GGUFFile(tuned).tensors.items() if "blk" in name and "norm" not in name
    } == {stored}


def test_a_folder_of_merged_weights_has_its_tokenizer(gguf, tmp_path, run):
    out, folder = tmp_path / "run", tmp_path / "hf"
    assert (
        run("train", "--model", gguf, "--method", "qalora", "--bits", 2, "--r", 2, *SHORT, "--out", out)[0]
        == 0
    )
    code, said, err = run("merge", "--run", out, "--out", folder)
    assert code == 0, err
    ask = ("--prompt", "This is", "--max-new-tokens", 6)
    texts = [run("generate", *of, *ask)[1] for of in (("--run", out), ("--model", folder))]
    assert texts[0] == texts[1]
    assert run("generate", "--model", folder, "--chat", "Hi", "--max-new-tokens", 2)[0] == 0
    code, said, err = run(
        "merge", "--run", out, "--out", tmp_path / "t.gguf"
    )  # two bits are no Q4_1: dense, in F16
    assert code == 0 and "the file in F16" in said, err
    assert (
        run("generate", "--model", tmp_path / "t.gguf", "--prompt", "This is", "--max-new-tokens", 2)[0] == 0
    )


def test_an_adapter_is_opened_from_its_own_folder(gguf, tmp_path, run, monkeypatch):
    out = tmp_path / "run"
    assert run("train", "--model", gguf, "--method", "qlora", "--r", 2, *SHORT, "--out", out)[0] == 0
    monkeypatch.chdir(out / "adapter")
    assert (
        type(open_model(str(gguf), ".").model.blocks[0].mlp.up_proj.base.weight).__name__ == "CodebookWeight"
    )


def test_lora_computes_on_the_blocks_it_stands_on(gguf, tmp_path, run):
    out = tmp_path / "run"
    assert run("train", "--model", gguf, "--method", "lora", "--r", 2, *SHORT, "--out", out)[0] == 0
    assert type(load_run(out)[1].blocks[0].mlp.up_proj.base.weight).__name__ == "BlockWeight"


def test_one_prompt_streams_the_text_that_a_batch_gives(gguf):
    opened = open_model(str(gguf))
    prompts = [opened.base.tokenizer.encode(text) for text in ("This is", "Hello né")]
    batch = write_batch(opened, prompts, 12)
    assert ["".join(write_streaming(opened, prompt, 12)) for prompt in prompts] == batch


def test_chat_prints_the_answer_alone(gguf, run):
    code, said, err = run(
        "generate", "--model", gguf, "--chat", "Hi", "--system", "Be brief.", "--max-new-tokens", 4
    )
    assert code == 0, err
    assert "im_start" not in said
    code, said, _ = run("generate", "--model", gguf, "--chat", "Hi", "Ho", "--max-new-tokens", 4)
    assert code == 0 and "> Hi\n" in said and "> Ho\n" in said


def test_a_file_of_conversations_trains_packed_and_accumulated(gguf, tmp_path, run):
    lines = [
        {"messages": [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": str(i)}]}
        for i in range(30)
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said, err = run(
        "train",
        "--model",
        gguf,
        "--method",
        "qalora",
        "--data",
        data,
        "--packing",
        "--max-length",
        256,
        "--gradient-accumulation-steps",
        2,
        "--gradient-checkpointing",
        "--logits-chunk",
        16,
        "--steps",
        2,
        "--batch-size",
        1,
        "--n-eval",
        4,
        "--threads",
        1,
        "--out",
        tmp_path / "run",
    )
    assert code == 0, err
    config, _ = load_run(tmp_path / "run")
    assert config.data.task == "jsonl" and config.data.packing
    assert make_run_task(config).batch([0]).segments is not None


def test_sweep_over_a_model_of_ones_own(gguf, tmp_path, run):
    code, said, err = run(
        "sweep",
        "--model",
        gguf,
        "--method",
        "qalora",
        "base",
        "--r",
        2,
        "--seed",
        0,
        "--steps",
        1,
        "--batch-size",
        2,
        "--n-train",
        8,
        "--n-eval",
        2,
        "--no-write-all",
        "--n-jobs",
        1,
        "--quiet",
        "--out",
        tmp_path,
    )
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "small" / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"qalora", "base"} and {row["model"] for row in rows} == {
        str(gguf)
    }
    assert all(row["status"] == "success" for row in rows)


def test_what_lies_under_each_method(gguf):
    base = base_of(str(gguf)).model
    forms = {
        m: type(frozen_base(RunConfig(method=m, model=str(gguf)), base).blocks[0].mlp.up_proj.weight).__name__
        for m in ("base", "lora", "qlora", "qalora")
    }
    assert forms == {
        "base": "BlockWeight",
        "lora": "DenseWeight",
        "qlora": "CodebookWeight",
        "qalora": "BlockWeight",
    }
    coarse = (
        frozen_base(RunConfig.of(method="qalora", bits=2, model=str(gguf)), base).blocks[0].mlp.up_proj.weight
    )
    assert coarse.quant_type == "int2"
    assert base_of(str(gguf)).sha256 != base_of("tiny").sha256


def test_examples_lose_their_padding_and_nothing_else(gguf):
    task = make_run_task(RunConfig.of(method="base", model=str(gguf), n_train=20, n_eval=3))
    batch = task.batch(range(5))
    for row, ids, mask in zip(unpadded(task, range(5)), batch.ids, batch.mask, strict=True):
        np.testing.assert_array_equal(row[0], ids[: row.shape[1]])
        assert mask[row.shape[1] - 1] and not mask[row.shape[1] :].any()


# ---- bad input ----


def test_bad_input_is_named(gguf, tmp_path, run):
    out = tmp_path / "run"
    assert run("train", "--model", gguf, "--method", "qalora", "--r", 2, *SHORT, "--out", out)[0] == 0
    other = write_model(tmp_path / "other.gguf", seed=1)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    cases = {
        "smollm2, or: no such file": (
            ("generate", "--model", "nowhere.gguf", "--prompt", "x"),
            ["nowhere.gguf", "no such file"],
        ),
        "adapter of another model": (
            ("generate", "--model", other, "--adapter", out / "adapter", "--prompt", "x"),
            ["was trained on model", str(gguf)],
        ),
        "long prompt": (("generate", "--model", gguf, "--prompt", "word " * 900), ["context", "320"]),
        "line of a file": (
            ("train", "--model", gguf, "--data", bad, "--out", tmp_path / "y"),
            ["bad.jsonl", "2", "completion"],
        ),
        "merge without out": (("merge", "--model", gguf, "--adapter", out), ["out=None", "--out X.gguf"]),
        "merge of a run without out": (("merge", "--run", out), ["out=None", "--out X.gguf"]),
        "a file without tokenizer": (
            ("merge", "--run", out, "--out", tmp_path / "x.safetensors"),
            ["holds no tokenizer"],
        ),
        "data and a preset": (
            ("sweep", "--model", gguf, "--preset", "pretrained", "--data", bad),
            ["leave out --data"],
        ),
        "merge onto itself": (
            ("merge", "--model", gguf, "--adapter", out, "--out", gguf),
            ["is the base itself"],
        ),
        "type of an exact merge": (
            ("merge", "--run", out, "--out", tmp_path / "t.gguf", "--quant-type", "F16"),
            ["quant_type='F16'", "leave it out"],
        ),
        "gguf of the tiny base": (
            ("merge", "--adapter", out, "--out", tmp_path / "t.gguf"),
            ["was trained on model"],
        ),
        "python task": (
            ("train", "--model", gguf, "--task", "python", "--out", tmp_path / "z"),
            ["task='python'", "bytes"],
        ),
        "chat with the tiny base": (("generate", "--chat", "hi"), ["chat"]),
        "preset": (
            ("sweep", "--model", gguf, "--preset", "full", "--out", tmp_path),
            ["preset='full'", "real model"],
        ),
    }
    for name, (arguments, parts) in cases.items():
        code, _, err = run(*arguments)
        assert code == 2, name
        assert len(err.strip().splitlines()) == 1, (name, err)
        for part in parts:
            assert part in err, (name, err)


def test_examples_longer_than_the_context_are_cut_to_it(tmp_path, run):
    data = tmp_path / "long.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": "p" * n, "completion": "c" * 40}) + "\n" for n in (5, 9, 7, 6, 8, 5, 9, 400)
        )
    )
    code, _, err = run(
        "train", "--data", data, "--steps", 2, "--batch-size", 2, "--threads", 1, "--out", tmp_path / "run"
    )
    assert code == 0, err


@pytest.mark.parametrize("method, rate", [("qalora", 2e-3), ("full", 1e-4)])
def test_what_is_not_said_is_the_methods_own(gguf, tmp_path, run, method, rate):
    """The parser's own default is a complete configuration of lora on the tiny base."""
    assert (
        run("train", "--model", gguf, "--method", method, *SHORT[:-3], "--threads", 1, "--out", tmp_path)[0]
        == 0
    )
    settings = read_json(tmp_path / "run.json")["config"]
    assert settings["learning_rate"] == rate and settings["r"] == (8 if method == "qalora" else None)


def test_a_missing_extra_is_one_line(gguf, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    base_of.cache_clear()
    code, _, err = run("generate", "--model", gguf, "--prompt", "x")
    assert code == 2 and "pip install" in err and len(err.strip().splitlines()) == 1


def test_a_run_that_does_not_fit_is_refused_before_it_is_loaded(gguf, monkeypatch):
    config = RunConfig.of(method="lora", model=str(gguf), batch_size=8)
    need = check_memory(config, available=2**40)
    with pytest.raises(
        ConfigError, match=r"method='lora', batch_size=8, max_length=320: needs about .* 1.0 MiB are free"
    ):
        check_memory(config, available=2**20)
    assert check_memory(config.changed(gradient_checkpointing=True, logits_chunk=16), available=2**40) < need
    assert check_memory(RunConfig.of(method="qalora", model=str(gguf), batch_size=8), available=2**40) < need
    monkeypatch.setattr("minilora.formats.bases.load_gguf", lambda path: pytest.fail("was loaded"))
    base_of.cache_clear()
    monkeypatch.setattr("minilora.memory.available_bytes", lambda: 2**20)
    from minilora.sweep.run import run as run_one

    with pytest.raises(ConfigError, match="of memory"):
        run_one(config)


@pytest.mark.parametrize("method", ["lora", "qlora", "qalora", "full"])
def test_what_is_planned_is_what_the_run_holds(gguf, method):
    """The planner's ledger from the file's head, beside the one of the model that the run would build: the
    same bytes."""
    config = RunConfig.of(method=method, model=str(gguf), batch_size=4, max_length=64)
    predicted = planned(config)
    model = build(config, base_of(str(gguf)).model)
    ids = np.zeros((4, 64), np.int64)
    real = measure(model, Batch(ids, ids, np.ones((4, 64), bool)), config.training())
    assert predicted.by_layer() == {layer: row for layer, row in real.by_layer().items()}
    assert predicted.kept == real.kept and predicted.trainable == real.trainable
    assert abs(real.measured - predicted.peak) <= max(2**16, 0.02 * predicted.rise)
    loaded = (
        0 if method == "qalora" else stored_bytes(str(gguf))
    )  # Q4_1 is trained over as it is, all others make new weights
    assert check_memory(config, available=2**40) == predicted.bound(2) + loaded
    assert available_bytes() is None or available_bytes() > 2**20


def test_shape_without_loading_and_models_of_our_own_file(gguf, tmp_path, run):
    assert shape_of(str(gguf)) == load_pretrained(gguf).model.config
    out = tmp_path / "run"
    assert (
        run("train", "--method", "qalora", "--steps", 2, "--n-eval", 2, "--no-write-all", "--out", out)[0]
        == 0
    )
    assert run("merge", "--run", out)[0] == 0
    code, said, err = run(
        "generate", "--model", out / "merged.safetensors", "--prompt", "lamp", "--max-new-tokens", 3
    )
    assert code == 0 and said.startswith("lamp"), err
    assert read_json(out / "run.json")["config"]["model"] == "tiny"
