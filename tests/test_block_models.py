"""Models whose weights lie in GGUF blocks: dequantized, adapted in their own groups, merged, counted."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.building import init_model
from minilora.config import ConfigError, LoraConfig, ModelConfig, QuantConfig
from minilora.injection import inject_lora
from minilora.layers import Embedding, Linear
from minilora.lora import LoraLinear
from minilora.memory import count_parameters, effective_bits, model_bytes
from minilora.merging import merge
from minilora.parameters import DenseWeight
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight
from minilora.quant.model import dequantize_model, quantize_model
from minilora.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    context_length=32,
)
IDS = np.arange(20).reshape(2, 10)


def block_model(quant_type: str = "Q4_1") -> Transformer:
    """As a GGUF holds a model: projections in 4 bits, a tied embedding in 8."""
    dense = init_model(CONFIG, np.random.default_rng(0), trainable=False)
    table = BlockWeight.quantize(dense.embedding.weight.dense(), "Q8_0")
    model = dense.map_linears(
        lambda x: Linear(
            x.name, table if x is dense.head else BlockWeight.quantize(20 * x.weight.dense(), quant_type)
        )
    )
    model.embedding = Embedding(dense.embedding.name, table)
    return model


def qalora(model: Transformer) -> Transformer:
    rng = np.random.default_rng(1)
    adapted = inject_lora(model, LoraConfig(r=4, use_qalora=True), rng)
    for p in adapted.trainable():
        if "lora_B" in p.name:
            p.data[...] = rng.standard_normal(p.data.shape) * 0.1
    return adapted


def test_dequantized_model_computes_the_same_and_stays_tied():
    blocks = block_model()
    dense = dequantize_model(blocks)
    assert blocks.tied and dense.tied
    assert all(isinstance(linear.weight, DenseWeight) for _, linear in dense.linears())
    np.testing.assert_array_equal(dense.embedding.weight.dense(), blocks.embedding.weight.dense())
    np.testing.assert_allclose(
        dense.logits(IDS), blocks.logits(IDS), rtol=0, atol=1e-4 * np.abs(dense.logits(IDS)).max()
    )


def test_the_table_may_stay_in_its_blocks():
    blocks = block_model()
    model = dequantize_model(blocks, table=False)
    assert model.tied and isinstance(model.embedding.weight, BlockWeight)
    assert not np.shares_memory(model.embedding.weight.blocks, blocks.embedding.weight.blocks)
    assert isinstance(model.blocks[0].mlp.up_proj.weight, DenseWeight)
    np.testing.assert_allclose(
        model.logits(IDS), blocks.logits(IDS), rtol=0, atol=1e-4 * np.abs(blocks.logits(IDS)).max()
    )


def test_quantizing_a_block_model_equals_quantizing_its_numbers():
    blocks = block_model()
    for quant in (QuantConfig("nf4"), QuantConfig("int3")):
        one, two = quantize_model(blocks, quant), quantize_model(dequantize_model(blocks), quant)
        for (name, a), (_, b) in zip(one.linears(), two.linears(), strict=True):
            np.testing.assert_array_equal(a.weight.dense(), b.weight.dense(), err_msg=name)
        assert one.tied and isinstance(one.embedding.weight, BlockWeight)


def test_qalora_on_blocks_is_qalora_on_the_same_groups():
    model = qalora(block_model())
    linear = model.blocks[0].mlp.down_proj
    assert (
        isinstance(linear, LoraLinear) and linear.pool == 32 and isinstance(linear.base.weight, BlockWeight)
    )
    assert linear.lora_A.data.shape == (4, 96 // 32)


def test_merging_into_blocks_keeps_every_code():
    blocks = block_model()
    model = qalora(blocks)
    merged, errors = merge(model)
    np.testing.assert_allclose(
        merged.logits(IDS), model.logits(IDS), rtol=0, atol=2e-5 * np.abs(model.logits(IDS)).max()
    )
    before = dict(blocks.linears())
    for name, linear in merged.linears():
        if name != "lm_head":
            assert isinstance(linear.weight, AffineWeight) and linear.weight.offset.dtype == np.float32
            np.testing.assert_array_equal(linear.weight.unpacked(), before[name].weight.affine().unpacked())
            again, change = BlockWeight.from_affine(linear.weight)
            np.testing.assert_array_equal(again.codes, before[name].weight.codes)
            assert 0 < change <= 2**-11 * float(np.abs(linear.weight.offset).max())
    assert max(e.relative for e in errors.values()) < 1e-5
    assert merged.tied


def test_a_q4_0_model_has_no_offsets_for_qalora():
    with pytest.raises(ConfigError, match="use_qalora=True: .*q_proj is stored as Q4_0"):
        inject_lora(block_model("Q4_0"), LoraConfig(r=2, use_qalora=True), np.random.default_rng(0))


def test_the_ledger_counts_a_shared_table_once():
    model = block_model()
    table = model.embedding.weight
    projections = [linear.weight for name, linear in model.linears() if name != "lm_head"]
    stored = sum(w.blocks.nbytes for w in projections) + table.blocks.nbytes
    norms = sum(p.data.nbytes for p in model.parameters())
    counted = model_bytes(model)
    assert counted["weights"] + counted["scales_offsets"] == stored + norms
    weights = sum(w.shape[0] * w.shape[1] for w in projections) + table.shape[0] * table.shape[1]
    assert count_parameters(model) == (0, weights + norms // 4)
    assert effective_bits(model) == 5.0
