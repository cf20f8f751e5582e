"""What the planner says of a configuration is what the same model, built for real, takes."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_llama_gguf import metadata_of, small

from benchmarks import plan_grid
from minilora.config import ConfigError, LoraConfig, ModelConfig, QuantConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.formats.gguf_writer import write_gguf
from minilora.formats.llama_gguf import load_gguf
from minilora.injection import inject_lora
from minilora.memory import ARCHITECTURES, PlanConfig, measure, plan
from minilora.memory.ledger import PASSING
from minilora.memory.planner import BLOCKS_RUN, planned_twin
from minilora.memory.profile import profile
from minilora.memory.shapes import Meter, metered
from minilora.memory.twin import shape_batch
from minilora.quant.model import dequantize_model, quantize_model

CASES = plan_grid.cases()


@pytest.fixture(autouse=True)
def shapes_by_name():
    with plan_grid.shapes():
        yield


def as_counts(entries):
    return Counter((e.kind, e.layer, e.what, e.nbytes) for e in entries)


# ---- the grid


def test_every_value_of_every_axis_occurs_in_the_grid():
    assert len(CASES) == len(set(CASES)) >= 100
    for axis, values in plan_grid.AXES.items():
        names = ("batch_size", "context") if axis == "batch" else (axis,)
        seen = {tuple(getattr(c, name) for name in names) for c in CASES}
        assert {value if axis == "batch" else (value,) for value in values} - seen <= {(None,)}, (
            axis
        )  # nf4 for None
    depths = {plan_grid.SHAPES[c.model].num_hidden_layers for c in CASES}
    assert min(depths) < BLOCKS_RUN < max(depths) and BLOCKS_RUN in depths


@pytest.mark.parametrize("c", CASES, ids=[f"{i} {c.method} {c.model}" for i, c in enumerate(CASES)])
def test_planned_and_measured(c):
    model, batch, settings = plan_grid.built(c)
    planned, found = plan(c), measure(model, batch, settings)
    # to the byte: all that outlasts a step, all that the forward pass keeps, and what the same shapes add at
    # the peak
    assert plan_grid.held_by_layer(planned) == plan_grid.held_by_layer(found)
    assert as_counts(planned.kept) == as_counts(found.kept)
    for field in (
        "trainable",
        "parameters",
        "effective_bits",
        "shards",
        "shard",
        "gradients",
        "accumulated",
        "on_disk",
        "rise",
        "moment",
    ):
        assert getattr(planned, field) == getattr(found, field), field
    # the peak: nothing is predicted that is not there, and what is not predicted is little, of the rise, not
    # of the whole
    rise = found.measured - found.held
    assert 0 <= rise - planned.rise <= max(plan_grid.LEAST, plan_grid.SHARE * rise)


def test_the_table_of_the_grid_names_the_worst_case_first():
    rows = [plan_grid.row_of(c) for c in CASES[:3]]
    worst = max(rows, key=plan_grid.used)
    lines = [" ".join(line.split()) for line in plan_grid.worst_cases(rows, count=2).splitlines()]
    assert len(lines) == 4 and lines[2].startswith(
        f"| {worst['what']} | {worst['predicted']:,} | {worst['measured']:,} |"
    )
    assert all(r["measured"] - r["predicted"] == r["difference"] and r["persistent"] for r in rows)
    assert plan_grid.worst_cases([rows[0] | {"persistent": False}]).endswith(" NO                 |")


# ---- blocks that are all alike


OPTIONS = [
    {},
    {"gradient_checkpointing": True},
    {"logits_chunk": 16},
    {"shards": 1},
    {"shards": 3, "batch_size": 4},
    {"gradient_accumulation_steps": 3},
    {"gradient_checkpointing": True, "logits_chunk": 8, "gradient_accumulation_steps": 2},
    {"batch_size": 1, "context": 1},
    {"dtype": "float64", "gradient_checkpointing": True},
]


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qalora"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_four_blocks_stand_for_seven(method, options):
    c = PlanConfig("grid-deep", method, r=2, **({"batch_size": 2, "context": 40} | options))
    shape = ARCHITECTURES[c.model]
    assert shape.num_hidden_layers == 7 > BLOCKS_RUN
    planned = plan(c)
    with metered(Meter()):
        twin = planned_twin(c, shape)
    whole = profile(
        twin,
        shape_batch(shape, c.batch_size, c.context),
        shards=c.shards,
        checkpoint=c.gradient_checkpointing,
        accumulation=c.gradient_accumulation_steps,
        logits_chunk=c.logits_chunk,
    )
    assert as_counts(planned.kept) == as_counts(whole.kept)
    assert planned.shard == whole.shard and planned.gradients == sum(p.data.nbytes for p in twin.trainable())
    if planned.moment == "the optimizer's update":
        assert planned.rise > whole.peak
    else:
        assert planned.moment == whole.moment and planned.rise == whole.peak
        assert as_counts(e for e in planned.entries if e.kind in PASSING) == as_counts(whole.entries)


def test_the_peak_lies_where_it_must():
    """Each of these is the largest by arithmetic: logits of 4000 words, the widest block, gradients of
    everything."""
    found = {
        "head": plan(
            "grid-vocabulary", method="lora", r=1, target_modules="q_proj", context=64, batch_size=4
        ),
        "last block": plan("grid-deep", method="lora", r=2, context=200),
        "first block": plan("grid-deep", method="full", context=64, gradient_checkpointing=True, shards=1),
        "update": plan("tiny", method="full", context=2, shards=1, optimizer="adamw_8bit"),
    }
    starts = {
        "head": "head and loss",
        "last block": "backward pass of layers.6",
        "first block": "backward pass of layers.",
        "update": "the optimizer's update",
    }
    assert {name: ledger.moment.startswith(starts[name]) for name, ledger in found.items()} == dict.fromkeys(
        starts, True
    )


def test_a_block_that_is_named_is_no_block_like_the_others():
    one, all_ = (
        plan("grid-deep", method="lora", r=2, target_modules=t)
        for t in ("layers.1.mlp.down_proj", "mlp.down_proj")
    )
    assert 7 * one.trainable == all_.trainable
    assert {e.layer for e in one.entries if e.kind == "adapters"} == {"layers.1.mlp.down_proj"}


# ---- large models


def test_sixty_five_billion_parameters_take_seconds_and_no_memory():
    plan("tiny", method="qlora")  # imports
    tracemalloc.start()
    try:
        start = time.perf_counter()
        ledger = plan("llama-65b", method="qlora", r=64, gradient_checkpointing=True)
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ledger.peak > 30e9 and ledger.parameters > 65e9
    assert peak < 100e6
    assert seconds < 30  # 5 on an idle core without tracing


COUNTS = {  # as the models' own pages and files have them
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


def test_built_in_architectures_have_the_counts_that_are_known():
    adapted = {name: plan(name, method="lora", r=1, target_modules="o_proj", context=4) for name in COUNTS}
    assert {name: found.parameters - found.trainable for name, found in adapted.items()} == COUNTS


PUBLISHED = {
    "LLaMA-7B, LoRA (QA-LoRA, table 2)": (("llama-7b", "lora", 64), 159_907_840),
    "LLaMA-7B, QA-LoRA (the same)": (("llama-7b", "qalora", 64), 89_309_184),
}


@pytest.mark.parametrize("c, expected", PUBLISHED.values(), ids=PUBLISHED)
def test_published_counts(c, expected):
    model, method, r = c
    assert plan(model, method=method, r=r, context=8).trainable == expected


def test_gpt_3s_published_count():
    ledger = plan("gpt3-175b", method="lora", r=4, target_modules="q_proj,v_proj", context=8)
    assert ledger.trainable == 96 * 2 * 4 * (12288 + 12288) == 18_874_368


def test_published_bits():
    """4 + 8/64 + 32/(64·256) (QLoRA, section 3), and one float32 mean for each matrix, which is not seen in
    the third digit."""
    assert plan("llama-7b", method="qlora", context=8).effective_bits == pytest.approx(4.127, abs=5e-4)


# ---- files


SHAPE = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    context_length=64,
    rope_theta=500.0,
)


def mixed_gguf(path, odd="Q8_0", config=SHAPE, table="Q8_0"):
    """A file in Q4_1 whose down_proj, in block 2 only, is stored otherwise, and whose embedding is, too."""
    tensors = small(config, "Q4_1", table)[0]
    tensors["blk.2.ffn_down.weight"] = small(config, odd, table)[0]["blk.2.ffn_down.weight"]
    write_gguf(path, tensors, metadata_of(config))
    return path


def ready(model, method, r=2):
    """As `minilora train` does it: full precision for lora, NF4 for qlora, for qalora the file's own offsets
    or int4."""
    lora = LoraConfig(r, use_qalora=method == "qalora")
    if method == "qalora" and all(
        getattr(x.weight, "offset_group", 0) for b in model.blocks for _, _, x in b.linears()
    ):
        return inject_lora(model, lora, np.random.default_rng(0))
    model = dequantize_model(model, table=False)
    if method != "lora":
        model = quantize_model(model, QuantConfig("nf4" if method == "qlora" else "int4"))
    return inject_lora(model, lora, np.random.default_rng(0))


@pytest.mark.parametrize("method", ["lora", "qlora", "qalora"])
@pytest.mark.parametrize("odd", ["Q4_1", "Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("table", ["Q8_0", "F16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_is_planned_as_it_is_loaded(tmp_path, method, odd, table, tied):
    config = replace(SHAPE, tie_word_embeddings=tied)
    path = mixed_gguf(tmp_path / "m.gguf", odd, config, table)
    model = ready(load_gguf(path), method)
    batch = Batch(*(np.arange(2 * 40).reshape(2, 40) % 96,) * 2, np.ones((2, 40), bool))
    planned = plan(str(path), method=method, r=2, batch_size=2, context=40)
    found = measure(model, batch, TrainConfig(batch_size=2))
    assert plan_grid.held_by_layer(planned) == plan_grid.held_by_layer(found)
    assert (planned.trainable, planned.parameters, planned.effective_bits) == (
        found.trainable,
        found.parameters,
        found.effective_bits,
    )
    assert planned.rise == found.rise and planned.moment == found.moment
    assert -96 * 64 * 4 <= found.measured - found.held - planned.rise <= plan_grid.LEAST


@pytest.mark.parametrize("folder", [True, False])
def test_a_hugging_face_configuration_is_planned_as_the_built_in_shape(tmp_path, folder):
    c = ARCHITECTURES["grid-grouped"]
    found = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "rms_norm_eps": c.rms_norm_eps,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "max_position_embeddings": c.context_length,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(found))
    for method in ("full", "lora", "qlora", "qalora"):
        of_file = plan(
            str(tmp_path if folder else tmp_path / "config.json"), method=method, batch_size=2, context=16
        )
        built_in = plan("grid-grouped", method=method, batch_size=2, context=16)
        assert replace(of_file, title="") == replace(built_in, title="")


# ---- what cannot be


@pytest.mark.parametrize(
    "model, changes, words",
    [
        (
            "llama-8b",
            {},
            "model='llama-8b': did you mean llama-7b?|model='llama-8b': did you mean llama-3-8b",
        ),
        ("tiny", {"context": 257}, "context=257: tiny has positions for 256 tokens"),
        ("tiny", {"method": "lora", "bits": 4}, "bits=4: method 'lora' needs dense weights"),
        ("tiny", {"method": "qlora", "bits": 5}, "bits=5: method 'qlora' stores nf2"),
        ("tiny", {"method": "qlora", "quant_type": "nf4", "bits": 3}, "bits=3: quant_type='nf4' has 4"),
        ("tiny", {"method": "qalora", "use_dora": True}, "use_dora=True: "),
        ("tiny", {"method": "qalora", "group_size": 48}, "group_size=48: must divide in=128"),
        ("tiny", {"r": 200}, "r=200: must be at most 128"),
        (
            "tiny",
            {"method": "lora", "subset_modules": "q_proj"},
            "subset_modules='q_proj': is for method 'subset'",
        ),
        ("tiny", {"target_modules": "w_proj"}, "target_modules='w_proj': matches no module"),
        ("tiny", {"optimizer": "adam"}, "optimizer='adam': choose one of adamw"),
        ("tiny", {"shards": 0}, "shards=0: must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused_in_words(model, changes, words):
    with pytest.raises(ConfigError) as error:
        plan(model, **changes)
    assert any(str(error.value).startswith(w) for w in words.split("|"))
