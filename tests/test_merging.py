"""Every way to merge an adapter: exact where it must be, refused with a reason where it is impossible."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import GQA, adapters, assert_close, fill_adapters, make_model, random_batch

from minilora.claims.merge_study import (
    compare_merges,
    describe,
    format_merges,
    merge_into_dense,
    merge_offsets,
    merge_study,
    quants_to_compare,
)
from minilora.config import ConfigError, LoraConfig, QuantConfig
from minilora.injection import inject_lora
from minilora.memory import effective_bits
from minilora.quant import AffineWeight
from minilora.quant.model import quantize_model
from minilora.sweep.deploying import requantize

INT4 = QuantConfig("int4", group_size=4)
NF4 = QuantConfig("nf4", 32)
# as in peers/test_peft: 4·eps·√(widest · 2·9·layers), and an adapter adds two sums to each of the 9
RTOL = (
    4 * float(np.finfo(np.float32).eps) * (GQA.intermediate_size * 2 * 9 * GQA.num_hidden_layers * 3) ** 0.5
)
BATCHES = [random_batch(seed=seed) for seed in range(3)]


@pytest.fixture
def dense():
    return make_model(GQA, dtype=np.float32, trainable=False)


def adapted(dense, quant=None, **settings):
    base = dense if quant is None else quantize_model(dense, quant)
    model = fill_adapters(
        inject_lora(base, LoraConfig(r=3, lora_alpha=5, **settings), np.random.default_rng(0))
    )
    for linear in adapters(model):
        linear.lora_B.data *= 0.2
    return model


def largest_logit(model):
    return max(float(np.abs(model.logits(batch.ids)).max()) for batch in BATCHES)


def by_way(rows):
    return {row["way"]: row for row in rows}


def test_qalora_takes_all_four_ways(dense):
    model = adapted(dense, INT4, use_qalora=True)
    rows = by_way(compare_merges(model, dense, BATCHES, [INT4, NF4]))
    assert list(rows) == [
        "not merged",
        "full-precision base",
        "dequantized base",
        "re-quantized: int4, g = 4",
        "re-quantized: nf4, block 32",
        "control: not merged, base on whole zero points",
        "offsets, float32",
        "offsets, float16",
        "offsets, whole zero points",
    ]
    assert not any("refused" in row for row in rows.values())
    assert rows["not merged"]["kl"] == rows["not merged"]["logit_error"] == 0
    rounding = RTOL * largest_logit(model)
    for exact in ("dequantized base", "offsets, float32"):
        assert (
            rows[exact]["logit_error"] <= rounding and rows[exact]["kl"] <= rounding**2
        )  # KL is of second order
    for lossy in ("full-precision base", "re-quantized: nf4, block 32", "offsets, whole zero points"):
        assert rows[lossy]["kl"] > 100 * rows["offsets, float16"]["kl"] > 0
    # a whole group moves together, so min/max groups find the same codes and the rounding of the offset is
    # all that is lost
    assert rows["re-quantized: int4, g = 4"]["logit_error"] == pytest.approx(
        rows["offsets, float16"]["logit_error"], rel=0.5
    )
    bits = {way: rows[way]["bits"] for way in rows}
    assert bits["offsets, float32"] == 4 + 16 / 4 + 32 / 4 and bits["offsets, float16"] == 4 + 32 / 4
    assert bits["offsets, whole zero points"] == 4 + 16 / 4 + 4 / 4 and bits["dequantized base"] == 32


@pytest.mark.parametrize("quant", [None, NF4, INT4])
def test_lora_and_qlora_are_refused_the_offsets_with_the_reason(dense, quant):
    model = adapted(dense, quant)
    rows = by_way(compare_merges(model, dense, BATCHES[:1], [NF4]))
    refused = {way: row["refused"] for way, row in rows.items() if "refused" in row}
    assert set(refused) == {way for way in rows if way.startswith("offsets")} and len(refused) == 3
    for reason in refused.values():
        assert ("constant within each group" if quant is INT4 else "has no float offset") in reason
    rounding = RTOL * largest_logit(model)
    assert rows["dequantized base"]["logit_error"] <= rounding
    assert (rows["full-precision base"]["logit_error"] <= rounding) == (quant is None)
    text = format_merges(list(rows.values()))
    assert text.count("Not possible: offsets") == 1


def test_loss_kl_and_logits_by_the_definition(dense):
    model = adapted(dense, NF4)
    row = by_way(compare_merges(model, dense, BATCHES, [NF4]))["re-quantized: nf4, block 32"]
    merged = requantize(model, NF4)
    loss = kl = largest = count = 0.0
    for batch in BATCHES:
        before, after = (
            model.logits(batch.ids).astype(np.float64),
            merged.logits(batch.ids).astype(np.float64),
        )
        for b, t in np.argwhere(batch.mask):
            p = np.exp(before[b, t]) / np.exp(before[b, t]).sum()
            q = np.exp(after[b, t]) / np.exp(after[b, t]).sum()
            loss -= np.log(q[batch.targets[b, t]])
            kl += (p * np.log(p / q)).sum()
            largest = max(largest, np.abs(before[b, t] - after[b, t]).max())
            count += 1
    assert row["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert row["kl"] == pytest.approx(kl / count, rel=1e-3)
    assert row["logit_error"] == pytest.approx(largest, rel=1e-4)
    assert row["bits"] == effective_bits(merged)


def test_bytes_are_those_of_the_projections_and_adapters(dense):
    model = adapted(dense, INT4, use_qalora=True)
    rows = by_way(compare_merges(model, dense, BATCHES[:1], []))
    weights = sum(
        linear.shape[0] * linear.shape[1] for block in dense.blocks for _, _, linear in block.linears()
    )
    learnt = 4 * sum(linear.lora_A.data.size + linear.lora_B.data.size for linear in adapters(model))
    assert rows["full-precision base"]["bytes"] == 4 * weights
    assert rows["not merged"]["bytes"] == weights * (4 + 32 / 4) / 8 + learnt
    assert rows["offsets, float16"]["bytes"] == weights * (4 + 32 / 4) / 8


def test_merging_into_another_base_adds_the_same_update(dense):
    model = adapted(dense, NF4)
    merged = merge_into_dense(model, dense)
    for linear, (_, plain), (_, found) in zip(
        adapters(model), dense.linears(), merged.linears(), strict=False
    ):
        assert_close(found.weight.dense(), plain.weight.dense() + linear.delta(), 2e-7)
    assert merged.head is dense.head


def test_offsets_stay_on_the_same_codes(dense):
    model = adapted(dense, INT4, use_qalora=True)
    for store in ("float32", "float16", "zero"):
        merged = merge_offsets(model, store)
        for linear, (_, found) in zip(adapters(model), merged.linears(), strict=False):
            assert isinstance(found.weight, AffineWeight) and found.weight.codes is linear.base.weight.codes


def test_gptq_requantizes_the_whole_merged_model_but_only_what_was_adapted(dense):
    model = adapted(dense, NF4, target_modules=("q_proj", "down_proj"))
    found = requantize(model, QuantConfig("nf4", 4096, quantizer="rtn"))
    assert found.head is model.head
    quant = QuantConfig("int3", group_size=4, quantizer="gptq")
    ids = [batch.ids for batch in BATCHES]
    found = dict(requantize(model, quant, ids).linears())
    for name, linear in model.linears():
        changed = name.endswith(("q_proj", "down_proj"))
        assert (getattr(found[name].weight, "quant_type", None) == "int3") == changed
        if not changed:
            assert found[name] is linear
    with pytest.raises(ConfigError, match="calibration"):
        requantize(model, quant)


def test_what_is_compared_and_how_it_is_called():
    assert [describe(q) for q in quants_to_compare(NF4)] == ["nf4, block 32", "nf4, block 32, gptq"]
    assert [describe(q) for q in quants_to_compare(QuantConfig("int2", quantizer="hqq"), both=False)] == [
        "int2, g = 32, hqq",
        "int2, g = 32, whole zero points, hqq",
    ]


def test_a_model_without_adapters_is_refused(dense):
    with pytest.raises(ConfigError, match="has no adapter to merge"):
        compare_merges(dense, dense, BATCHES, [NF4])


def test_the_study_writes_rows_and_a_page_with_means_over_seeds(tmp_path):
    page = merge_study(
        tmp_path, (0, 1), (("lora", None),), progress=False, steps=1, batch_size=2, n_train=32, n_eval=2
    )
    rows = [json.loads(line) for line in (tmp_path / "merging.jsonl").read_text().splitlines()]
    assert page == (tmp_path / "README.md").read_text() and {row["seed"] for row in rows} == {0, 1}
    losses = [row["loss"] for row in rows if row["way"] == "re-quantized: nf4, block 64"]
    assert f"| re-quantized: nf4, block 64 | {np.mean(losses):.5f} ± " in " ".join(page.split())
    assert all(row["numpy_version"] for row in rows) and "Not possible: offsets" in page


@pytest.mark.parametrize("init, quant", [("pissa", None), ("loftq", QuantConfig("nf2", 32))])
def test_starts_from_a_decomposition_are_taken_out_again_over_the_dense_base(dense, init, quant):
    """What has not been trained changes nothing: W + s·(B A − B₀A₀) = W."""
    model = inject_lora(
        dense, LoraConfig(r=3, lora_alpha=5, init_lora_weights=init), np.random.default_rng(0), quant=quant
    )
    for (_, found), (_, plain) in zip(merge_into_dense(model, dense).linears(), dense.linears(), strict=True):
        assert_close(found.weight.dense(), plain.weight.dense(), 2e-7)


def test_dora_over_the_dense_base_keeps_the_trained_lengths(dense):
    model = inject_lora(
        dense, LoraConfig(r=3, use_dora=True), np.random.default_rng(0), quant=QuantConfig("nf2", 32)
    )
    fill_adapters(model)
    merged = dict(merge_into_dense(model, dense).linears())
    for linear in adapters(model):
        if linear.magnitude is not None:
            lengths = np.linalg.norm(merged[linear.name].weight.dense(), axis=1)
            np.testing.assert_allclose(lengths, linear.magnitude.data, rtol=1e-5)
