"""The measured ledger: its bytes are those of the arrays, its reasons cover the cache, its bound holds."""

from __future__ import annotations

import gc
import json
import threading
import tracemalloc
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from helpers import CONFIGS, make_model, random_batch

from minilora.adapter import Adapter
from minilora.building import init_model
from minilora.config import LoraConfig, ModelConfig, QuantConfig, TrainConfig
from minilora.data.tasks import Batch
from minilora.injection import full, inject, inject_lora, subset
from minilora.memory import arrays_in, measure, peak_bytes
from minilora.memory.counting import buffer_of
from minilora.memory.entries import Entry, held_entries, kept_entries
from minilora.memory.ledger import HELD, PASSING
from minilora.memory.reasons import kept_by_linear, kept_by_model
from minilora.parameters import Parameter
from minilora.quant.codebooks import dynamic_map
from minilora.quant.model import quantize_model
from minilora.quant.packed import _scratch
from minilora.threads import Workers, single_blas
from minilora.training.loss import loss_and_grads
from minilora.training.optimizers import make_optimizer
from minilora.variants import DoraLinear

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    context_length=128,
    tie_word_embeddings=False,
)
TIED = replace(SMALL, tie_word_embeddings=True)
GELU = replace(SMALL, hidden_act="gelu_pytorch_tanh")


def dense(config=SMALL, dtype=np.float32):
    return make_model(config, dtype=dtype, trainable=False)


def adapted(config=SMALL, quant=None, r=2, dtype=np.float32, **options):
    model = dense(config, dtype)
    model = model if quant is None else quantize_model(model, quant)
    return inject_lora(model, LoraConfig(r=r, **options), np.random.default_rng(0))


def with_frozen(model, ending):
    """Freeze one factor of every adapter."""
    for p in model.trainable():
        if p.name.endswith(ending):
            p.trainable = False
    return model


def with_scale_adapters():
    return inject(dense(), ScaleLinear, ("q_proj", "down_proj"))


class ScaleLinear(Adapter):
    """y = base(x) · scale, a trained number for each output; an adapter that the package does not know."""

    def __init__(self, base):
        super().__init__(base)
        self.table = np.ones((3, base.shape[1]), np.float32)  # a constant of its own
        self.scale = Parameter(f"{base.name}.scale", np.ones(base.shape[0], np.float32), trainable=True)

    def trained(self):
        return [self.scale]

    def forward(self, x, key=None):
        z = self.base.weight.matmul(x)
        return z * self.scale.data, (z,)

    def backward(self, dy, cache, grads, need_dx=True, onto=None):
        grads.add(self.scale, (dy * cache[0]).reshape(-1, dy.shape[-1]).sum(axis=0))
        return self.base.weight.matmul_t(dy * self.scale.data, onto=onto) if need_dx else None

    def delta(self):
        return (self.scale.data - 1.0)[:, None] * self.base.weight.dense()


MODELS = {
    "full": lambda: full(dense()),
    "full, tied": lambda: full(dense(TIED)),
    "full, float64": lambda: full(dense(dtype=np.float64)),
    "full, two-matrix MLP": lambda: full(dense(GELU)),
    "last block": lambda: subset(dense(), ("layers.2",)),
    "embedding": lambda: subset(dense(), ("embed_tokens",)),
    "tied embedding": lambda: subset(dense(TIED), ("embed_tokens",)),
    "last norm": lambda: subset(dense(), ("model.norm",)),
    "lora": adapted,
    "lora on q and v": lambda: adapted(target_modules=("q_proj", "v_proj")),
    "lora on the head": lambda: adapted(TIED, target_modules=("lm_head", "q_proj")),
    "dropout": lambda: adapted(lora_dropout=0.25),
    "dora": lambda: adapted(use_dora=True),
    "dora and dropout, two-matrix MLP": lambda: adapted(GELU, use_dora=True, lora_dropout=0.25),
    "lora, A frozen": lambda: with_frozen(adapted(), "lora_A.weight"),
    "dora, B frozen": lambda: with_frozen(adapted(use_dora=True), "lora_B.weight"),
    "an adapter of one's own": with_scale_adapters,
    "qlora": lambda: adapted(TIED, QuantConfig("nf4")),
    "qlora, dora": lambda: adapted(quant=QuantConfig("nf3", double_quant=False), use_dora=True),
    "qalora": lambda: adapted(quant=QuantConfig("int4", group_size=16), use_qalora=True),
    "qalora, dropout": lambda: adapted(
        GELU, QuantConfig("int2", group_size=32), use_qalora=True, lora_dropout=0.5
    ),
    "whole zero points": lambda: adapted(quant=QuantConfig("int4", group_size=32, offset_dtype="zero")),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def batch_of(config=SMALL, B=2, T=24, **changes):
    ids = np.arange(B * T).reshape(B, T) * 7 % config.vocab_size
    return replace_batch(Batch(ids, ids, np.ones(ids.shape, bool)), **changes)


def replace_batch(batch, **changes):
    return Batch(
        *(changes.get(name, getattr(batch, name)) for name in ("ids", "targets", "mask", "segments"))
    )


def of_kind(ledger, *kinds):
    return sum(e.nbytes for e in ledger.entries if e.kind in kinds)


# ---- what outlasts a step


def by_hand(model, optimizer):
    """Bytes by class, each array once, from the model's attributes; code maps and whatever else is shared by
    identity."""
    found = {
        "weights": {},
        "adapters": {},
        "codes": {},
        "scales": {},
        "code maps": {},
        "optimizer": {},
        "offsets": {},
    }

    def add(kind, array):
        assert (
            array.base is None or not isinstance(array.base, np.ndarray) or array.base.nbytes == array.nbytes
        )
        found[kind][array.__array_interface__["data"][0]] = array.nbytes

    def add_weight(weight):
        if hasattr(weight, "param"):
            return add("weights", weight.param.data)
        for name, group in weight.arrays().items():
            for array in group:
                add(name.replace("_", " "), array)
        return None

    add_weight(model.embedding.weight)
    norms = [n for b in model.blocks for n in (b.input_norm, b.post_norm)]
    for norm in (*norms, model.norm):
        add("weights", norm.weight.data)
    for linear in [x for b in model.blocks for _, _, x in b.linears()] + [model.head]:
        if isinstance(linear, Adapter):
            for p in linear.trained():
                add("adapters", p.data)
            if isinstance(linear, DoraLinear):
                add("adapters", linear.row_squares)
            if isinstance(linear, ScaleLinear):
                add("adapters", linear.table)
        add_weight(linear.base.weight)
    for array in optimizer.state().values():
        add("optimizer", array)
    return {kind: sum(arrays.values()) for kind, arrays in found.items() if arrays}


@every_model
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_what_outlasts_a_step_is_the_arrays_own_bytes(make, name):
    model = make()
    settings = TrainConfig(batch_size=2, optimizer=name)
    optimizer = make_optimizer(model.trainable(), settings)
    expected = by_hand(model, optimizer)
    ledger = measure(model, batch_of(), settings, optimizer, run=False)
    found = ledger.by_kind()
    scales = sum(found.get(kind, 0) for kind in ("scales", "absmax", "nested"))
    assert scales == expected.pop("scales", 0)
    assert {kind: found.get(kind, 0) for kind in expected} == expected
    assert ledger.held == scales + sum(expected.values()) + found.get("tiles", 0)
    layers = [n for row in ledger.by_layer().values() for n in row.values()]
    assert sum(layers) == ledger.peak == ledger.held + ledger.rise == sum(e.nbytes for e in ledger.entries)


def test_a_tied_head_and_a_shared_base_are_held_once():
    untied, tied = (
        of_kind(measure(full(dense(c)), batch_of(), TrainConfig(batch_size=2), run=False), "weights")
        for c in (SMALL, TIED)
    )
    assert untied - tied == 4 * 61 * 64
    base = dense()
    first, second = (inject_lora(base, LoraConfig(r=r), np.random.default_rng(0)) for r in (2, 3))
    buffers = {
        id(buffer_of(p.data))
        for model in (first, second)
        for p in model.parameters()
        if ".lora_" not in p.name
    }
    assert len(buffers) == len(base.parameters())
    for model in (first, second):
        weights = [e for e in held_entries(model) if e.kind == "weights"]
        assert sum(e.nbytes for e in weights) == sum(p.data.nbytes for p in base.parameters())


def test_8_bit_states_share_the_map_of_nested_scales():
    assert dynamic_map() is dynamic_map(True)


def test_code_maps_are_held_once_for_all_weights_and_8_bit_states():
    """A table of 16 levels for nf4, and of 256 for the nested scales; m and v in 8 bits have one each."""

    def maps(quant, optimizer):
        config = replace(SMALL, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
        model = adapted(config, quant, r=16)
        return of_kind(
            measure(model, batch_of(config), TrainConfig(batch_size=2, optimizer=optimizer), run=False),
            "code maps",
        )

    assert maps(None, "adamw") == 0
    assert maps(None, "adamw_8bit") == 2 * 4 * 256
    assert maps(QuantConfig("nf4", double_quant=False), "adamw") == 4 * 16
    assert maps(QuantConfig("nf4"), "adamw") == 4 * 16 + 4 * 256
    assert maps(QuantConfig("nf4"), "adamw_8bit") == 4 * 16 + 2 * 4 * 256
    assert maps(QuantConfig("int4"), "adamw_8bit") == 2 * 4 * 256


def test_a_frozen_factor_is_held_without_gradient_or_state():
    """B trains, A does not: A's bytes stay, its gradient and its two moments are gone."""
    batch, settings = batch_of(), TrainConfig(batch_size=2, shards=1)
    both = measure(adapted(), batch, settings, run=False)
    model = with_frozen(adapted(), "lora_A.weight")
    b_alone = measure(model, batch, settings, run=False)
    a = sum(p.data.nbytes for p in model.parameters() if p.name.endswith("lora_A.weight"))
    assert b_alone.by_kind()["adapters"] == both.by_kind()["adapters"]
    assert both.by_kind()["optimizer"] - b_alone.by_kind()["optimizer"] == 2 * a
    assert both.gradients - b_alone.gradients == a
    assert (both.trainable - b_alone.trainable) * 4 == a and both.parameters == b_alone.parameters
    states = {e.what for e in held_entries(model, make_optimizer(model.trainable(), settings).state())}
    assert {"m", "v"} <= states
    layers = [e for e in b_alone.entries if e.kind == "optimizer"]
    assert layers and all(e.layer.endswith("_proj") for e in layers)


def test_an_adapter_of_ones_own_is_named_by_layer_and_field():
    model = with_scale_adapters()
    entries = [e for e in held_entries(model) if e.kind == "adapters"]
    assert {e.what for e in entries} == {"scale", "table"}
    assert {e.layer.rsplit(".", 1)[1] for e in entries} == {"q_proj", "down_proj"}
    ledger = measure(model, batch_of(), TrainConfig(batch_size=2, shards=1), run=False)
    assert "q_proj: kept by ScaleLinear" in str(ledger)
    gradients = {(e.layer, e.what) for e in ledger.entries if e.kind == "gradients"}
    assert ("layers.0.self_attn.q_proj", "of scale") in gradients


# ---- what the forward pass keeps, and why


@every_model
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reasons_cover_exactly_what_the_cache_keeps(make, checkpoint, packed):
    model, ids = make(), batch_of().ids
    segments = np.cumsum(ids % 5 == 0, axis=1) if packed else None
    _, cache = model.forward(ids, (0, 0, 0), checkpoint, segments)
    given = {id(buffer_of(a)) for a in (ids, segments) if a is not None}
    expected = {id(buffer_of(a)): buffer_of(a).nbytes for a in arrays_in(cache)}
    walked = list(kept_by_model(model, cache))
    assert {id(buffer_of(a)) for a, _, _ in walked} - given == set(expected) - given
    parameters = {id(buffer_of(p.data)) for p in model.parameters()}
    entries = kept_entries(walked, given | parameters)
    assert sum(e.nbytes for e in entries) == sum(
        n for key, n in expected.items() if key not in given | parameters
    )
    assert len(entries) == len(set(expected) - given - parameters)
    assert all(e.what and e.layer for e in entries)


def test_an_input_that_three_adapters_read_is_kept_once_and_they_are_named():
    ledger = measure(adapted(), batch_of(), TrainConfig(batch_size=2), run=False)
    found = [e for e in ledger.kept if e.layer == "layers.0.self_attn.q_proj" and "input" in e.what]
    assert found == [
        Entry(
            "activations",
            "layers.0.self_attn.q_proj",
            "input kept for dA; shared with k_proj, v_proj",
            4 * 24 * 64,
        )
    ]
    assert "q_proj: input kept for dA; shared with k_proj, v_proj" in str(ledger)
    assert not any(e.layer.endswith(("k_proj", "v_proj")) and "input" in e.what for e in ledger.kept)
    # with dropout each has an input of its own
    ledger = measure(adapted(lora_dropout=0.5), batch_of(), TrainConfig(batch_size=2), run=False)
    alone = {e.layer.rsplit(".", 1)[1] for e in ledger.kept if e.what == "input after dropout kept for dA"}
    assert alone == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_frozen_linears_keep_nothing():
    model = adapted(target_modules=("v_proj",))
    ledger = measure(model, batch_of(), TrainConfig(batch_size=2), run=False)
    assert {e.layer.rsplit(".", 1)[1] for e in ledger.kept if "_proj" in e.layer} == {"v_proj"}
    for _, linear in dense().linears():
        _, cache = linear.forward(np.ones((2, linear.shape[1]), np.float32))
        assert list(kept_by_linear(linear, cache)) == []


@every_model
def test_the_real_cache_and_the_one_of_shapes_agree(make):
    batch, settings = batch_of(B=3), TrainConfig(batch_size=3, shards=2)
    real, shapes = (measure(make(), batch, settings, run=run).kept for run in (True, False))
    assert sorted((e.layer, e.what, e.nbytes) for e in real) == sorted(
        (e.layer, e.what, e.nbytes) for e in shapes
    )


def test_packed_segments_cost_a_mask_for_each_sequence_while_attention_runs():
    plain, packed = batch_of(B=2, T=96), batch_of(B=2, T=96)
    packed = replace_batch(packed, segments=np.cumsum(packed.ids % 5 == 0, axis=1))
    for batch in (plain, packed):
        ledger = measure(adapted(), batch, TrainConfig(batch_size=2, shards=1))
        assert 0 <= ledger.measured - ledger.peak <= max(64 * 1024, 0.02 * ledger.rise)


# ---- the peak


@every_model
def test_measuring_changes_nothing(make):
    model = make()
    before = [p.data.copy() for p in model.parameters()]
    measure(model, batch_of(), TrainConfig(batch_size=2))
    assert all((p.data == b).all() for p, b in zip(model.parameters(), before, strict=True))
    assert not tracemalloc.is_tracing()


def test_the_update_is_the_peak_when_there_is_little_else():
    """Two tokens, and 8-bit states: twice the piece that is updated, for m and v, decoded."""
    config = replace(SMALL, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    model = full(init_model(config, np.random.default_rng(0), trainable=False))
    ledger = measure(
        model, batch_of(config, 1, 2), TrainConfig(batch_size=1, shards=1, optimizer="adamw_8bit")
    )
    assert ledger.moment == "the optimizer's update"
    assert ledger.rise == 4 * sum(p.data.size for p in model.parameters()) + 2 * 4 * 65536
    assert 0 <= ledger.measured - ledger.peak <= 64 * 1024
    # with more tokens it is not
    assert (
        measure(model, batch_of(config, 4, 128), TrainConfig(batch_size=4), run=False).moment != ledger.moment
    )


BOUND_CASES = {
    "lora": (lambda c: adapted(c), {}),
    "qlora": (lambda c: adapted(c, QuantConfig("nf4")), {}),
    "full": (lambda c: full(dense(c)), {}),
    "qalora, accumulated": (
        lambda c: adapted(c, QuantConfig("int4"), use_qalora=True),
        {"gradient_accumulation_steps": 2},
    ),
    "checkpointed": (lambda c: adapted(c), {"gradient_checkpointing": True, "logits_chunk": 16}),
}


@pytest.mark.parametrize("make, options", BOUND_CASES.values(), ids=BOUND_CASES.keys())
@pytest.mark.parametrize("n, B, shards", [(1, 6, 3), (2, 6, 2), (2, 5, 3), (3, 6, 3), (3, 7, 3), (3, 2, 3)])
def test_so_many_workers_stay_below_the_bound(make, options, n, B, shards):
    config = replace(
        SMALL, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_key_value_heads=4
    )
    model, batch = make(config), batch_of(config, B, 120)
    settings = TrainConfig(batch_size=B, shards=shards, **options)
    ledger = measure(model, batch, settings, run=False)
    tile = of_kind(ledger, "tiles")
    batches = [batch] * settings.gradient_accumulation_steps

    def step(workers):
        return loss_and_grads(
            model,
            batches,
            workers,
            shards=shards,
            stream=(0, 0),
            checkpoint=settings.gradient_checkpointing,
            logits_chunk=settings.logits_chunk,
        )

    def fresh():  # threads of its own, so that their tiles are made while it is watched
        with Workers(max(n, 2)) as workers, single_blas():
            if n > 1:
                return step(workers)
            with Workers(1) as one:
                return workers._pool.submit(step, one).result()

    gc.collect()
    step(Workers(1))  # fills Python's free lists, which gc.collect() empties
    peaks = [peak_bytes(fresh) for _ in range(2)]  # workers do not always meet in their worst moments
    most = max(peaks) + ledger.held - tile  # the tile of the ledger is the first worker's
    assert most <= ledger.bound(n)
    equal = B % shards == 0 and n == shards
    assert not equal or ledger.bound(n) < 1.35 * most
    assert ledger.bound(n) <= ledger.bound(n + 1)


@pytest.mark.parametrize(
    "config, quant",
    [
        (SMALL, QuantConfig("nf4")),
        (SMALL, QuantConfig("int3", group_size=32)),
        (replace(SMALL, hidden_size=1024, intermediate_size=2048, num_hidden_layers=1), QuantConfig("nf4")),
    ],
    ids=str,
)
@pytest.mark.parametrize("B, T", [(1, 1), (1, 4), (2, 128), (6, 128)])
def test_a_fresh_workers_scratch_is_the_tile_of_the_ledger(config, quant, B, T):
    model, batch = adapted(config, quant), batch_of(config, B, T)
    ledger = measure(model, batch, TrainConfig(batch_size=B, shards=1), run=False)
    found = []

    def work():
        with Workers(1) as one:
            loss_and_grads(model, batch, one, shards=1, stream=(0, 0))
        found.append(_scratch.buffer.nbytes if hasattr(_scratch, "buffer") else 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [of_kind(ledger, "tiles")] and found[0] > 0


# ---- options that save memory


BIG = replace(SMALL, vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=4)


def ledger_of(make=lambda: adapted(BIG, r=8), B=4, T=100, **options):
    return measure(make(), batch_of(BIG, B, T), TrainConfig(batch_size=B, shards=1, **options), run=False)


def test_checkpoints_keep_less_by_what_is_computed_again():
    plain, saved = ledger_of(), ledger_of(gradient_checkpointing=True)
    B, T, C, F, H, K = 4, 100, 128, 384, 4, 2
    kept = [sum(e.nbytes for e in ledger.kept if e.layer.startswith("layers.")) for ledger in (plain, saved)]
    assert kept[1] == 4 * 4 * B * T * (2 * C + C + 2 * C * K // H)  # four blocks: x, mixed and q, k, v
    # gate and up, the inputs of the projections and of nothing else: 1/rms, h and what attention normalizes
    # by are beside
    assert kept[0] - kept[1] >= 4 * 4 * B * T * (2 * F + C + C + C + F)
    assert saved.rise < plain.rise and of_kind(saved, "activations") < of_kind(plain, "activations")


def test_logits_in_chunks_are_so_many_rows():
    whole, chunked = ledger_of(T=20), ledger_of(T=20, logits_chunk=8)
    assert of_kind(whole, "logits") == 4 * 4 * 20 * 2000
    assert of_kind(chunked, "logits") <= 4 * 8 * 2000
    assert whole.rise - chunked.rise > 0


def test_accumulation_adds_one_sum_of_gradients_and_no_activations():
    def make():
        return full(dense(BIG))

    one, three = ledger_of(make), ledger_of(make, gradient_accumulation_steps=3)
    size = 4 * sum(p.data.size for p in make().parameters())
    assert one.gradients == three.gradients == size and (one.accumulated, three.accumulated) == (0, size)
    assert three.rise - one.rise >= size and three.shard == one.shard
    assert sum(e.nbytes for e in one.kept) == sum(e.nbytes for e in three.kept)
    whole_batch = ledger_of(make, B=12)
    assert three.rise < whole_batch.rise


def test_accumulation_holds_no_gradients_but_the_sum():
    one, three = (ledger_of(lambda: full(dense(BIG)), gradient_accumulation_steps=n) for n in (1, 3))
    rises = [x.rise - x.by_kind()["objects"] for x in (one, three)]
    assert rises[1] - rises[0] == one.gradients


def test_8_bit_and_paged_states_take_what_they_should():
    def make():
        return full(dense(BIG))

    sizes = [p.data.size for p in make().parameters()]
    found = {
        name: ledger_of(make, optimizer=name)
        for name in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd")
    }
    states = {name: of_kind(ledger, "optimizer") for name, ledger in found.items()}
    in_8bit = sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in sizes)
    assert states == {
        "adamw": 8 * sum(sizes),
        "adamw_8bit": in_8bit,
        "paged_adamw": 0,
        "paged_adamw_8bit": 0,
        "sgd": 0,
    }
    assert {name: ledger.on_disk for name, ledger in found.items()} == {
        "adamw": 0,
        "adamw_8bit": 0,
        "paged_adamw": 8 * sum(sizes),
        "paged_adamw_8bit": in_8bit,
        "sgd": 0,
    }
    assert found["adamw"].held - found["paged_adamw"].held == 8 * sum(sizes)


# ---- how it reads


@pytest.fixture(scope="module")
def ledger():
    return measure(
        adapted(quant=QuantConfig("nf4")), batch_of(), TrainConfig(batch_size=2), title="<b>&q\"' · ×"
    )


def test_it_prints_all_classes_and_every_number(ledger):
    text = str(ledger)
    for kind, n in ledger.by_kind().items():
        assert any(
            line.split()[: len(kind.split())] == kind.split() and f"{n:,}" in line
            for line in text.splitlines()
        ), kind
    assert f"{ledger.peak:,}" in text and f"{ledger.measured:,}" in text and ledger.title in text
    assert (
        "trainable params:" in text
        and "effective bits" in text
        and "2 workers" in text
        and f"{ledger.bound(2):,}" in text
    )
    assert all(kind in HELD or kind in PASSING for kind in ledger.by_kind())


def test_its_html_is_well_formed_and_escaped(ledger):
    found = ElementTree.fromstring(f"<div>{ledger._repr_html_()}</div>")
    assert found.find("p/b").text == ledger.title and found.find(".//q") is None
    tables = found.findall("table")
    assert [t.find("caption").text for t in tables][:2] == ["By class", "By layer"] and len(tables) == 3
    for table in tables:
        widths = {len(row) for row in table.iter("tr")}
        assert len(widths) == 1
    cells = {cell.text for cell in tables[0].iter("td")}
    assert f"{ledger.peak:,}" in cells and {f"{n:,}" for n in ledger.by_kind().values()} <= cells


def test_it_becomes_json_and_keeps_its_sums(ledger):
    found = json.loads(json.dumps(ledger.to_dict(), allow_nan=False))
    assert found["peak"] == sum(e["nbytes"] for e in found["entries"]) == sum(found["by_kind"].values())
    assert sum(n for row in found["by_layer"].values() for n in row.values()) == found["peak"]
    assert found["measured"] == ledger.measured and found["title"] == ledger.title


def test_the_short_form_is_one_line(ledger):
    short = ledger.short()
    assert (
        "\n" not in short
        and "peak of one worker " in short
        and " explained" in short
        and "2 workers at most" in short
    )
    assert "explained" not in replace(ledger, measured=None, shards=1).short()


def test_like_blocks_are_one_row():
    names = [
        row[0]
        for row in measure(full(dense()), batch_of(), TrainConfig(batch_size=2), run=False).tables()[1][2]
    ]
    assert names[0] == "embed_tokens" and any(name.startswith("layers.0") for name in names)
    assert len(names) < 3 + 3 + 3


def test_a_single_token_is_explained_and_below_the_bound():
    """In a process that has not trained yet too: what is compiled or loaded at the first step is not the
    step's."""
    config = replace(SMALL, hidden_size=128, intermediate_size=384)
    model = adapted(config, QuantConfig("nf4"), r=4)
    ids = np.zeros((1, 1), np.int64)
    found = measure(model, Batch(ids, ids, np.ones((1, 1), bool)), TrainConfig(batch_size=1))
    assert 0 <= found.measured - found.peak <= 64 * 1024 and found.measured <= found.bound(1)


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing is trainable"):
        measure(dense(), batch_of(), TrainConfig(batch_size=2))


def test_every_config_of_the_suite_measures():
    for config in CONFIGS.values():
        model = inject_lora(
            make_model(config, dtype=np.float32, trainable=False), LoraConfig(r=2), np.random.default_rng(0)
        )
        ledger = measure(model, random_batch(config), TrainConfig(batch_size=3))
        assert 0 <= ledger.measured - ledger.peak <= 64 * 1024
