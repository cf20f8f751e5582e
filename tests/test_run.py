"""One run of the sweep: its row, its models, and what it leaves in its folder."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from minilora.config import ConfigError
from minilora.data.tokenizer import ByteTokenizer
from minilora.formats.checkpoint import load_base
from minilora.formats.files import FileError
from minilora.sweep.results import clean_row
from minilora.sweep.run import (
    build,
    calibration,
    check_buildable,
    check_kept,
    deploy,
    load_run,
    make_run_task,
    run,
    write,
)
from minilora.sweep.settings import RunConfig
from minilora.sweep.warm import warm_kernels

TINY = {"steps": 3, "n_eval": 4, "batch_size": 4}
METHODS = ("base", "quantized_base", "full", "subset", "lora", "qlora", "qalora")


@pytest.mark.parametrize("method", METHODS)
def test_row_of_each_method(method, tmp_path):
    config = RunConfig(method=method, **TINY)
    row = clean_row(run(config, tmp_path))
    assert row["status"] == "success" and row["key"] == config.key()
    assert row["all_params"] - (row["trainable_params"] if method.endswith("lora") else 0) == 1_082_880
    assert 0 < row["loss"] < 6 and row["bpb"] == pytest.approx(row["loss"] / np.log(2))
    assert 0 <= row["recall"] <= 1 and 0 <= row["recall_values"] <= 1
    bits = {"quantized_base": 4.127, "qlora": 4.127, "qalora": 5.0}.get(method, 32.0)
    assert row["effective_bits"] == pytest.approx(bits, abs=0.02)
    trains = method not in ("base", "quantized_base")
    assert (row["bytes_gradients"] == 4 * row["trainable_params"] > 0) == trains
    assert row["bytes_optimizer"] == 8 * row["trainable_params"]
    if trains:
        held = sum(
            row[f"bytes_{k}"] for k in ("weights", "scales_offsets", "code_maps", "adapters", "optimizer")
        )
        assert row["bytes_peak"] >= held + row["bytes_gradients"] + row["bytes_activations"]
    assert (row["deployed_loss"] is not None) == method.endswith("lora")
    assert (row["bytes_adapter_file"] is not None) == method.endswith("lora")
    assert row["corpus_sha256"] and row["python_version"]


def test_same_configuration_same_row_whatever_the_threads():
    config = RunConfig(method="lora", r=2, lora_dropout=0.1, **TINY)
    rows = [run(config, threads=threads) for threads in (1, 2, 3)]
    changes = {"seconds", "step_seconds", "bytes_peak"}
    kept = [{k: v for k, v in row.items() if k not in changes} for row in rows]
    assert kept[0] == kept[1] == kept[2]


def test_deployed_weights():
    base = load_base()
    config = RunConfig(method="qalora", group_size=16)
    model = build(config, base)
    for _, linear in model.linears():
        if hasattr(linear, "lora_B"):
            linear.lora_B.data += (
                np.random.default_rng(0).standard_normal(linear.lora_B.data.shape).astype(np.float32) * 0.01
            )
    ids = np.arange(20)[None]
    exact = deploy(config, model)
    scale = np.abs(model.logits(ids)).max()
    assert (
        np.abs(exact.logits(ids) - model.logits(ids)).max() < 1e-4 * scale
    )  # float32 rounding through 4 blocks
    q = replace(config, method="qlora", quant_type="nf2", bits=2, group_size=None)
    rough = build(q, base)
    for _, linear in rough.linears():
        if hasattr(linear, "lora_B"):
            linear.lora_B.data += 0.01
    assert (
        np.abs(deploy(q, rough).logits(ids) - rough.logits(ids)).max() > 1e-3 * scale
    )  # two bits cannot hold ΔW


def test_a_saved_run_loads_again(tmp_path):
    config = RunConfig(method="qlora", r=3, **TINY)
    run(config, tmp_path)
    loaded_config, model = load_run(tmp_path)
    assert loaded_config == config
    again = run(config)
    from minilora.sweep.run import make_run_task
    from minilora.training.loss import evaluate

    assert evaluate(model, make_run_task(config).eval_batches("test"))["loss"] == again["loss"]
    settings = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(settings | {"config": {"colour": 1}}))
    with pytest.raises(FileError, match="not the configuration"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(settings | {"base_sha256": "0" * 64}))
    with pytest.raises(FileError, match="another base"):
        load_run(tmp_path)


def test_rows_of_another_base_or_other_data_are_not_added_to():
    config = RunConfig(method="base", **TINY)
    row = {"key": config.key(), **run(config)}
    check_kept([row])
    for column, words in (("base_sha256", "another base"), ("corpus_sha256", "other data")):
        with pytest.raises(FileError, match=words):
            check_kept([row | {column: "0" * 64}])


def test_interrupted_run_continues(tmp_path):
    config = RunConfig(method="lora", r=2, **TINY)
    whole = run(config, tmp_path / "a", checkpoint_every=2)
    assert (tmp_path / "a" / "checkpoint.safetensors").is_file()
    resumed = run(config, tmp_path / "a", checkpoint_every=2)  # continues from step 2
    assert resumed["loss"] == whole["loss"] and resumed["train_loss"] == whole["train_loss"]


def test_key_changes_with_what_matters_only():
    config = RunConfig()
    assert config.key() == RunConfig(preset="demo", stage="demo").key()
    changes = ({}, {"r": 4}, {"seed": 1}, {"learning_rate": 1e-4}, {"n_eval": 9})
    assert len({replace(config, **change).key() for change in changes}) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dora"}, "method='dora'"),
        ({"task": "mnist"}, "task='mnist'"),
        ({"r": 0}, "r=0"),
        ({"method": "lora", "bits": 4}, "bits=4"),
        ({"method": "qlora", "bits": 5}, "nf5"),
        ({"method": "qalora", "quant_type": "nf4"}, "quant_type='nf4'"),
        ({"task": "text"}, "text_path"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"n_eval": 0}, "n_eval=0"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"split": "train"}, "split='train'"),
    ],
)
def test_refused_before_work_starts(settings, message):
    with pytest.raises(ConfigError) as error:
        RunConfig(**settings)
    assert message in str(error.value)


def test_kernels_compile_within_the_budget():
    assert warm_kernels() < 15  # from the disk cache or cold


def test_texts_do_not_depend_on_the_pieces():
    base, prompts = load_base(), [[256, 65 + i] for i in range(70)]
    tokens = ByteTokenizer()
    assert write(base, prompts, 3, tokens) == [
        t for i in range(70) for t in write(base, prompts[i : i + 1], 3, tokens)
    ]


def test_running_again_into_a_finished_folder_continues_from_its_checkpoint(tmp_path):
    """Steps that come from a checkpoint carry no time."""
    config = RunConfig(method="lora", split="validation", **TINY)
    first, again = (run(config, tmp_path, checkpoint_every=1) for _ in range(2))
    assert again["loss"] == first["loss"] and again["train_loss"] == first["train_loss"]
    assert first["step_seconds"] > 0 and again["step_seconds"] is None


VARIANTS = [
    {"method": "qalora", "quant_type": "int2", "quantizer": "gptq"},
    {"method": "qalora", "quant_type": "int2", "quantizer": "hqq"},
    {"method": "qlora", "quant_type": "nf2", "quantizer": "gptq"},
    {"method": "qlora", "quant_type": "nf2", "init_lora_weights": "loftq"},
    {"method": "quantized_base", "quant_type": "int2", "quantizer": "gptq"},
    {"method": "lora", "use_dora": True},
    {"method": "lora", "init_lora_weights": "pissa"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: " ".join(map(str, s.values())))
def test_quantizers_and_variants_run_are_saved_and_load_again(settings, tmp_path):
    config = RunConfig(**settings, steps=2, n_train=40, n_eval=2, batch_size=4, write_all=False)
    row = run(config, tmp_path)
    plain = replace(config, quantizer="rtn", use_dora=False, init_lora_weights="normal")
    assert row["status"] == "success" and config.key() != plain.key()
    found, model = load_run(tmp_path)
    assert found == config
    base, ids = load_base(), np.arange(20)[None]
    assert np.abs(model.logits(ids) - build(plain, base).logits(ids)).max() > 1e-3
    if config.method == "quantized_base":
        assert np.array_equal(model.logits(ids), build(config, base).logits(ids))
    elif config.method == "qlora":
        assert row["deployed_effective_bits"] < 2.2


def test_a_gptq_base_is_the_same_bytes_every_time_and_never_sees_the_test_split():
    config, base = (
        RunConfig(method="qalora", quant_type="int3", quantizer="gptq", n_train=64, n_eval=4),
        load_base(),
    )
    logits = [build(config, base).logits(np.arange(20)[None]) for _ in range(2)]
    assert np.array_equal(*logits)
    task = make_run_task(config)
    training = {bytes(row) for i in range(64) for row in task.batch([i]).ids.astype(np.int32)}
    seen = [ids for ids in calibration(config)]
    assert sum(map(len, seen)) == 64
    # each calibration sequence begins as one of the training examples does, padding apart
    for ids in seen:
        for row in ids.astype(np.int32):
            assert any(bytes(row).startswith(t) or t.startswith(bytes(row)) for t in training)


def test_settings_that_came_later_leave_old_fingerprints_as_they_were():
    """The rows of the committed study keep their keys."""
    rows = [
        json.loads(line)
        for line in Path("benchmarks/results/study/results.jsonl").read_text().splitlines()[:40]
    ]
    names = {field.name for field in fields(RunConfig)}
    for row in rows:
        assert RunConfig(**{k: v for k, v in row.items() if k in names}).key() == row["key"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "lora", "quantizer": "gptq"}, "quantizer='gptq': method 'lora' quantizes nothing"),
        ({"method": "qlora", "quantizer": "hqq"}, "fits offsets, and nf4 has none"),
        ({"method": "full", "use_dora": True}, "use_dora=True: method 'full' has no adapter"),
        ({"method": "lora", "init_lora_weights": "loftq"}, "answers the rounding of a QLoRA base"),
        (
            {"method": "qlora", "init_lora_weights": "pissa"},
            "out of a full-precision base; take method 'lora'",
        ),
        ({"method": "lora", "init_lora_weights": "pissa", "r": 96}, "r=96: PiSSA on .* takes at most 64"),
    ],
)
def test_variants_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(RunConfig(**settings), load_base())


def test_blocks_that_gptq_cannot_take_are_refused_before_training():
    config = RunConfig(method="qlora", block_size=256, quantizer="gptq", **TINY)
    for refuse in (lambda: check_buildable([config]), lambda: run(config)):
        with pytest.raises(ConfigError, match="block_size=256: quantizer='gptq' needs a divisor of in=128"):
            refuse()
    with pytest.raises(
        ConfigError, match="r=4096"
    ):  # a config that cannot be built is found behind one that can
        check_buildable([RunConfig(method="lora"), RunConfig(method="lora", r=4096)])
