"""One run of the sweep: its row, its models, and what it leaves in its folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from minilora.composed import DataConfig, PretrainConfig, settings_in
from minilora.config import ConfigError, LoraConfig, QuantConfig, TrainConfig
from minilora.data.tokenizer import ByteTokenizer
from minilora.formats.checkpoint import load_base
from minilora.formats.files import FileError
from minilora.sweep.deploying import deploy
from minilora.sweep.inputs import make_run_task
from minilora.sweep.judging import write
from minilora.sweep.presets import demo_runs, planned_runs, pretrained_runs
from minilora.sweep.results import COLUMNS, clean_row
from minilora.sweep.run import run
from minilora.sweep.run_models import build, calibration, check_buildable
from minilora.sweep.saved_runs import check_kept, load_run, read_run
from minilora.sweep.settings import RunConfig
from minilora.sweep.warm import warm_kernels

TINY = {"steps": 3, "n_eval": 4, "batch_size": 4}
PRESET_DIGESTS = {
    "demo": "8f5bb84284d85e3d",
    "demo with settings": "d2ecc585eeaa23d9",
    "pretrained": "135283f3ff047705",
    "full": "e2d1819153ec7443",
}
METHODS = ("base", "quantized_base", "full", "subset", "lora", "qlora", "qalora")


@pytest.mark.parametrize("method", METHODS)
def test_row_of_each_method(method, tmp_path):
    config = RunConfig.of(method=method, **TINY)
    row = clean_row(run(config, tmp_path))
    assert list(row) == list(COLUMNS)
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
    config = RunConfig.of(method="lora", r=2, lora_dropout=0.1, **TINY)
    rows = [run(config, threads=threads) for threads in (1, 2, 3)]
    changes = {"seconds", "step_seconds", "bytes_peak"}
    kept = [{k: v for k, v in row.items() if k not in changes} for row in rows]
    assert kept[0] == kept[1] == kept[2]


def test_deployed_weights():
    base = load_base()
    config = RunConfig.of(method="qalora", group_size=16)
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
    q = config.changed(method="qlora", quant_type="nf2")
    rough = build(q, base)
    for _, linear in rough.linears():
        if hasattr(linear, "lora_B"):
            linear.lora_B.data += 0.01
    assert (
        np.abs(deploy(q, rough).logits(ids) - rough.logits(ids)).max() > 1e-3 * scale
    )  # two bits cannot hold ΔW


def test_a_saved_run_loads_again(tmp_path):
    config = RunConfig.of(method="qlora", r=3, **TINY)
    run(config, tmp_path)
    loaded_config, model = load_run(tmp_path)
    assert loaded_config.row() == config.row()
    again = run(config)
    from minilora.training.evaluation import evaluate

    assert evaluate(model, make_run_task(config).eval_batches("test"))["loss"] == again["loss"]
    settings = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(settings | {"config": {"colour": 1}}))
    with pytest.raises(FileError, match="not the configuration"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(settings | {"base_sha256": "0" * 64}))
    with pytest.raises(FileError, match="another base"):
        load_run(tmp_path)


def test_rows_of_another_base_or_other_data_are_not_added_to():
    config = RunConfig.of(method="base", **TINY)
    row = {"key": config.key(), **run(config)}
    check_kept([row])
    for column, words in (("base_sha256", "another base"), ("corpus_sha256", "other data")):
        with pytest.raises(FileError, match=words):
            check_kept([row | {column: "0" * 64}])


def test_interrupted_run_continues(tmp_path):
    config = RunConfig.of(method="lora", r=2, checkpoint_every=2, **TINY)
    whole = run(config, tmp_path / "a")
    assert (tmp_path / "a" / "checkpoint.safetensors").is_file()
    resumed = run(config, tmp_path / "a")  # continues from step 2
    assert resumed["loss"] == whole["loss"] and resumed["train_loss"] == whole["train_loss"]


def test_key_changes_with_what_matters_only():
    config = RunConfig()
    assert config.key() == RunConfig.of(preset="demo", stage="demo").key()
    changes = ({}, {"r": 4}, {"seed": 1}, {"learning_rate": 1e-4}, {"n_eval": 9}, {"beta2": 0.95})
    assert len({config.changed(**change).key() for change in changes}) == 6
    assert config.key() == config.changed(checkpoint_every=5, eval_every=5).key()
    assert config.key() == config.changed(learning_rate=1e-2, target_modules="all-linear").key()
    full = RunConfig(method="full")
    assert full.key() == full.changed(r=4, lora_dropout=0.5, subset_modules="layers.0").key()


def test_the_parts_of_a_run_are_what_python_users_write():
    config = RunConfig(method="qlora", lora=LoraConfig(r=3), train=TrainConfig(steps=5, seed=2))
    assert config == RunConfig.of(method="qlora", r=3, steps=5, seed=2)
    assert config == RunConfig.of(**{"method": "qlora", "lora.r": 3, "train.steps": 5, "train.seed": 2})
    assert RunConfig.from_row(config.row()).row() == config.row()
    assert config.training().warmup_steps == 5 and config.training().learning_rate == 1e-2
    assert config.adapter().use_qalora is False and config.changed(method="qalora").adapter().use_qalora
    assert RunConfig.of(rank_pattern="q_proj=2,up_proj=4").lora.rank_pattern == {"q_proj": 2, "up_proj": 4}
    hqq = RunConfig.of(method="qalora", quantizer="hqq")
    assert hqq.storage().fit == "hqq" and hqq.changed(quantizer="rtn").storage().fit == "minmax"
    assert RunConfig.of(rank_pattern="q_proj=2").row()["rank_pattern"] == "q_proj=2"


def test_each_setting_has_one_name_a_meaning_and_a_column():
    for kind in (RunConfig, PretrainConfig):
        for name, setting in settings_in(kind).items():
            assert setting.help.endswith("."), f"{kind.__name__}.{name} has no entry in Parameters"
            assert setting.path.endswith(name)
    parts = (LoraConfig, QuantConfig, TrainConfig, DataConfig)
    own = {f.name for part in parts for f in fields(part) if f.metadata.get("role") != "derived"}
    assert own <= settings_in(RunConfig).keys()
    progress = {"checkpoint_every", "eval_every"}
    assert own - progress <= COLUMNS.keys() and not progress & COLUMNS.keys()
    assert all(meaning.endswith(".") for meaning in COLUMNS.values())


def test_two_settings_of_one_name_are_refused():
    @dataclass(frozen=True)
    class Twice:
        train: TrainConfig = TrainConfig()
        seed: int = 0

    with pytest.raises(TypeError, match="Twice: two settings are called seed"):
        settings_in(Twice)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dora"}, "method='dora'"),
        ({"task": "mnist"}, "task='mnist'"),
        ({"r": 0}, "r=0"),
        ({"method": "lora", "bits": 4}, "bits=4"),
        (
            {"method": "lora", "quant_type": "nf4"},
            "quant_type='nf4': method 'lora' needs a full-precision base",
        ),
        ({"method": "qlora", "bits": 3, "quant_type": "nf4"}, "bits=3: quant_type='nf4' has 4"),
        ({"colour": 1}, "colour=1: no such setting; there are method, model, r,"),
        ({"train.r": 1}, "train.r=1: no such setting"),
        ({"rank_pattern": "q_proj"}, "rank_pattern='q_proj': give module names with numbers"),
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
        RunConfig.of(**settings)
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
    config = RunConfig.of(method="lora", split="validation", checkpoint_every=1, **TINY)
    first, again = (run(config, tmp_path) for _ in range(2))
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
    config = RunConfig.of(**settings, steps=2, n_train=40, n_eval=2, batch_size=4, write_all=False)
    row = run(config, tmp_path)
    plain = config.changed(quantizer="rtn", use_dora=False, init_lora_weights="normal")
    assert row["status"] == "success" and config.key() != plain.key()
    found, model = load_run(tmp_path)
    assert found.row() == config.row()
    base, ids = load_base(), np.arange(20)[None]
    assert np.abs(model.logits(ids) - build(plain, base).logits(ids)).max() > 1e-3
    if config.method == "quantized_base":
        assert np.array_equal(model.logits(ids), build(config, base).logits(ids))
    elif config.method == "qlora":
        assert row["deployed_effective_bits"] < 2.2


def test_a_gptq_base_is_the_same_bytes_every_time_and_never_sees_the_test_split():
    config, base = (
        RunConfig.of(method="qalora", quant_type="int3", quantizer="gptq", n_train=64, n_eval=4),
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


RESULTS = sorted(Path("benchmarks/results").glob("*/results.jsonl"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_rows_keep_their_fingerprints(path):
    """Made again from its row, a run has the same key and the same settings."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        config = RunConfig.from_row(row)
        assert config.key() == row["key"]
        assert {name: row[name] for name in config.row() if name in row}.items() <= config.row().items()


def test_the_presets_are_the_runs_that_they_were():
    """The keys of all runs, in their order, as they were when settings were one flat list."""
    runs = {
        "demo": demo_runs(),
        "demo with settings": demo_runs(steps=5, quantizer="gptq", lora_dropout=0.1),
        "pretrained": pretrained_runs("smollm2", max_length=64, packing=True, optimizer="adamw_8bit"),
        "full": planned_runs(),
    }
    found = {
        name: hashlib.sha256("".join(run.key() for run in those).encode()) for name, those in runs.items()
    }
    assert {name: digest.hexdigest()[:16] for name, digest in found.items()} == PRESET_DIGESTS


def test_an_older_run_folder_opens_and_one_that_cannot_be_read_says_what_to_do(tmp_path):
    """Settings were one flat list, without those that came later."""
    old = {"method": "qlora", "task": "products", "r": 2, "lora_alpha": 16.0, "bits": 4, "quant_type": "nf4"}
    old |= {"block_size": 64, "double_quant": True, "group_size": None, "learning_rate": 0.01, "seed": 3}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": old | {"text_path": None}, "base_sha256": "0" * 64}))
    config, made_on = read_run(path)
    assert config.key() == RunConfig.of(method="qlora", r=2, seed=3).key() and made_on == "0" * 64
    path.write_text(json.dumps({"config": {"colour": 1}, "base_sha256": "0" * 64}))
    with pytest.raises(FileError, match="colour=1: no such setting.*train again into another folder"):
        read_run(path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "lora", "quantizer": "gptq"}, "quantizer='gptq': method 'lora' quantizes nothing"),
        ({"method": "qlora", "quantizer": "hqq"}, "nf4 has no offsets to fit"),
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
        build(RunConfig.of(**settings), load_base())


def test_blocks_that_gptq_cannot_take_are_refused_before_training():
    config = RunConfig.of(method="qlora", block_size=256, quantizer="gptq", **TINY)
    for refuse in (lambda: check_buildable([config]), lambda: run(config)):
        with pytest.raises(ConfigError, match="block_size=256: quantizer='gptq' needs a divisor of in=128"):
            refuse()
    with pytest.raises(
        ConfigError, match="r=4096"
    ):  # a config that cannot be built is found behind one that can
        check_buildable([RunConfig.of(method="lora"), RunConfig.of(method="lora", r=4096)])
