"""The ledger counts buffers, not views, and every class of bytes by arithmetic on shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import CONFIGS, GQA, adapters, make_model, random_batch

from minilora.building import parameter_shapes
from minilora.config import LoraConfig, ModelConfig, QuantConfig, TrainConfig
from minilora.injection import full, inject_lora
from minilora.kernels.microkernel import AVAILABLE
from minilora.memory import (
    activation_bytes,
    arrays_in,
    count_parameters,
    effective_bits,
    format_bytes,
    model_bytes,
    peak_bytes,
    trainable_line,
    unique_bytes,
)
from minilora.parameters import Gradients
from minilora.quant.model import quantize_model
from minilora.training.loss import shard_loss
from minilora.training.optimizers import make_optimizer

IDS = random_batch(GQA, B=2, T=6).ids
PROJECTIONS = {name: shape for name, shape in parameter_shapes(GQA).items() if "_proj" in name}
PROJECTED = sum(int(np.prod(shape)) for shape in PROJECTIONS.values())
OTHERS = sum(int(np.prod(shape)) for name, shape in parameter_shapes(GQA).items() if name not in PROJECTIONS)


def base(quant=None, config=GQA):
    model = make_model(config, dtype=np.float32, trainable=False)
    return model if quant is None else quantize_model(model, quant)


def lora(model, r=2, **changes):
    return inject_lora(model, LoraConfig(r=r, lora_alpha=3, **changes), np.random.default_rng(0))


def test_views_slices_and_repeats_count_once():
    a, b = np.zeros((10, 4), np.float32), np.zeros(3)
    assert unique_bytes([a, a, a[1:], a.T, a.reshape(5, 8)[::2], b]) == 160 + 24
    assert unique_bytes([]) == 0
    assert unique_bytes([a[:1]]) == 160  # a view keeps the whole buffer alive


def test_arrays_are_found_in_nested_tuples():
    a, b, c = np.zeros(1), np.zeros(2), np.zeros(3)
    assert [x.size for x in arrays_in((a, [None, (b, 3.0)], "text", ((c,),)))] == [1, 2, 3]


@pytest.mark.parametrize("dtype, size", [(np.float32, 4), (np.float64, 8)])
def test_a_dense_model_is_its_parameters(dtype, size):
    found = model_bytes(make_model(GQA, dtype=dtype))
    assert found == {
        "weights": size * (PROJECTED + OTHERS),
        "scales_offsets": 0,
        "code_maps": 0,
        "adapters": 0,
    }


def test_a_tied_head_costs_nothing():
    tied, untied = (model_bytes(base(config=CONFIGS[name])) for name in ("gelu tied", "gelu tied"))
    assert tied == untied
    config = CONFIGS["gelu tied"]
    assert (
        model_bytes(base(config=replace(config, tie_word_embeddings=False)))["weights"] - tied["weights"]
        == 4 * 19 * 16
    )


@pytest.mark.parametrize("quant_type, bits", [("nf2", 2), ("nf3", 3), ("nf4", 4), ("nf8", 8), ("fp4", 4)])
@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_a_codebook_model_by_formula(quant_type, bits, double):
    model = base(QuantConfig(quant_type, block_size=32, double_quant=double))
    sizes = [int(np.prod(shape)) for shape in PROJECTIONS.values()]
    codes = sum(-(-n // {2: 4, 3: 8, 4: 2, 8: 1}[bits]) * (3 if bits == 3 else 1) for n in sizes)
    blocks = [-(-n // 32) for n in sizes]
    # double: one byte a block, one float32 for each 256 blocks, one float32 mean
    scales = sum(b + 4 * -(-b // 256) + 4 for b in blocks) if double else 4 * sum(blocks)
    maps = 4 * 2**bits + (4 * 256 if double else 0)  # shared by all layers: counted once
    assert model_bytes(model) == {
        "weights": 4 * OTHERS + codes,
        "scales_offsets": scales,
        "code_maps": maps,
        "adapters": 0,
    }
    assert effective_bits(model) == pytest.approx(8 * (codes + scales) / PROJECTED)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [2, 4])
def test_bytes_of_an_affine_model_by_formula(bits, group):
    model = base(QuantConfig(f"int{bits}", group_size=group))
    codes = sum(int(np.prod(shape)) * bits // 8 for shape in PROJECTIONS.values())
    found = model_bytes(model)
    assert found == {
        "weights": 4 * OTHERS + codes,
        "scales_offsets": 2 * 2 * PROJECTED // group,
        "code_maps": 0,
        "adapters": 0,
    }
    assert effective_bits(model) == pytest.approx(bits + 32 / group)


def test_effective_bits_of_the_usual_settings():
    """NF4, blocks of 64: 4.5 bits, with double quantization 4 + 8/64 + 32/(64·256) and the one mean (QLoRA,
    section 3)."""
    config = ModelConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    assert effective_bits(base(QuantConfig("nf4", double_quant=False), config)) == 4.5
    assert effective_bits(base(QuantConfig("nf4"), config)) == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256) + 32 / 256**2
    )
    assert effective_bits(base(QuantConfig("int4"), config)) == 5.0
    assert effective_bits(base(config=config)) == 32.0


def test_effective_bits_are_those_of_the_base_whatever_the_adapter():
    for quant in (None, QuantConfig("nf4", block_size=32)):
        assert effective_bits(lora(base(quant))) == effective_bits(base(quant))


def test_a_merged_offset_costs_its_float32():
    from minilora.merging import merge

    model = lora(base(QuantConfig("int4", group_size=4)), use_qalora=True)
    assert effective_bits(merge(model)[0]) == 4 + (16 + 32) / 4


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize(
    "quant, group",
    [(None, 1), (QuantConfig("nf4"), 1), (QuantConfig("int4", group_size=4), 4)],
    ids=["lora", "qlora", "qalora"],
)
def test_bytes_of_adapters_gradients_and_optimizer_by_formula(r, quant, group):
    model = lora(base(quant), r, use_qalora=group > 1)
    expected = sum(r * (i // group + o) for o, i in PROJECTIONS.values())
    found = model_bytes(model)
    assert found["adapters"] == 4 * expected and found["weights"] == model_bytes(base(quant))["weights"]
    assert count_parameters(model) == (expected, PROJECTED + OTHERS + expected)
    assert unique_bytes(make_optimizer(model.trainable(), TrainConfig()).state().values()) == 2 * 4 * expected


def test_a_shared_base_is_not_counted_twice():
    model = base()
    first, second = lora(model), lora(model)
    arrays = [p.data for m in (first, second) for p in m.parameters()]
    assert (
        unique_bytes(arrays)
        == model_bytes(model)["weights"] + model_bytes(first)["adapters"] + model_bytes(second)["adapters"]
    )


def test_the_summary_is_pefts_line():
    model = lora(base(), 2)
    trainable, total = count_parameters(model)
    share = f"trainable%: {100 * trainable / total:.4f}"
    assert trainable_line(model) == f"trainable params: {trainable:,d} || all params: {total:,d} || {share}"
    assert trainable_line(full(base())).endswith("trainable%: 100.0000")


def test_the_summary_of_the_default_model_has_known_numbers():
    from minilora.building import init_model

    model = inject_lora(
        init_model(ModelConfig(), np.random.default_rng(0)), LoraConfig(r=8), np.random.default_rng(0)
    )
    # 4 layers of r·(in + out): 4·8·256 + 3·8·640; all: 259·128 + 4·(4·128² + 3·128·512 + 256) + 128 + those
    assert trainable_line(model) == "trainable params: 94,208 || all params: 1,177,088 || trainable%: 8.0035"


# --- activations --------------------------------------------------------------------------------------------


def test_activations_of_a_frozen_model_are_what_its_formulas_need():
    """Per block, B·T·(…): norms keep x and 1/rms, attention q, k, v and two numbers a head, SwiGLU gate, up;
    linears nothing."""
    model = lora(base(), target_modules=("layers.0.self_attn.q_proj",))  # keeps everything above it, too
    B, T, C, F_, L = 2, 6, 16, 20, 2
    probabilities = (
        2 if AVAILABLE else T
    )  # compiled attention keeps what gives them again, NumPy's keeps them
    block = B * T * (2 * (C + 1) + C + C // 2 + C // 2 + 4 * probabilities + 2 * F_)
    adapter = B * T * (C + 2)  # the normed input of q_proj, and h
    final = B * T * (C + 1)
    rope = 2 * T * 2
    assert activation_bytes(model, IDS) == 4 * (L * block + adapter + final + rope)


def test_adapting_q_k_and_v_keeps_one_input():
    def extra(*targets):
        return activation_bytes(lora(base(), target_modules=targets), IDS)

    h = 4 * 2 * 6 * 2 * 2  # float32 · B · T · r · two blocks
    assert extra("q_proj", "k_proj", "v_proj") - extra("q_proj") == 2 * h


def test_dropout_keeps_a_masked_input_and_a_bit_an_element_for_each_adapter():
    model = lora(base(), target_modules=("q_proj", "k_proj", "v_proj"), lora_dropout=0.1)
    elements = 2 * 6 * 16  # B · T · C
    masks, copies = 3 * elements // 8, 2 * 4 * elements  # without dropout the three keep one input together
    assert activation_bytes(model, IDS, key=(0, 0, 0)) - activation_bytes(model, IDS) == 2 * (masks + copies)


def test_pooling_keeps_one_number_a_group():
    quant = QuantConfig("int4", group_size=4)
    plain, pooled = (
        activation_bytes(lora(base(quant), target_modules=("q_proj",), use_qalora=flag), IDS)
        for flag in (False, True)
    )
    assert plain - pooled == 4 * 2 * 6 * (16 - 16 // 4) * 2


def test_adapters_keep_far_less_than_full_training_and_checkpointing_less_again():
    everything, adapted = (
        activation_bytes(full(base()), IDS),
        activation_bytes(lora(base(), target_modules=("q_proj",)), IDS),
    )
    assert adapted < 0.85 * everything
    assert activation_bytes(full(base()), IDS, checkpoint=True) < 0.5 * everything


def test_only_the_blocks_above_the_lowest_adapter_keep_anything():
    low = activation_bytes(lora(base(), target_modules=("layers.0.mlp.down_proj",)), IDS)
    high = activation_bytes(lora(base(), target_modules=("layers.1.mlp.down_proj",)), IDS)
    assert high < 0.6 * low


# --- the peak -----------------------------------------------------------------------------------------------


def test_peak_sees_what_was_held_at_once():
    def work():
        a = np.zeros(1_000_000, np.uint8)
        b = np.zeros(2_000_000, np.uint8)
        del a, b
        np.zeros(1_500_000, np.uint8)

    assert 3_000_000 <= peak_bytes(work) < 3_100_000
    assert peak_bytes(lambda: None) < 10_000


def test_peak_ignores_what_was_there_before_and_stops_tracing():
    import tracemalloc

    held = np.zeros(5_000_000, np.uint8)
    assert peak_bytes(lambda: held.sum()) < 100_000
    assert not tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        traced = np.zeros(5_000_000, np.uint8)
        assert peak_bytes(lambda: traced.sum()) < 100_000
        assert tracemalloc.is_tracing()  # somebody else's tracing goes on
    finally:
        tracemalloc.stop()
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 // 0)
    assert not tracemalloc.is_tracing()


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5120.00 GiB"),
    ],
)
def test_sizes_are_readable(n, text):
    assert format_bytes(n) == text


def test_quantized_weights_are_adapted_without_becoming_dense():
    """The memory lesson itself: no float array of a projection's size is left behind by a forward and a
    backward pass."""
    model = lora(base(QuantConfig("nf4")))
    batch, grads = random_batch(GQA), Gradients(model.trainable())
    shard_loss(model, batch, 1.0, grads)
    for linear in adapters(model):
        weight, size = linear.base.weight, linear.shape[0] * linear.shape[1]
        stored = [a for name, group in weight.arrays().items() if name != "code_maps" for a in group]
        kept = [
            v for v in vars(weight).values() if isinstance(v, np.ndarray) and v.shape[0] != 256
        ]  # tables are constants
        assert all(a.nbytes < size for a in stored + kept) and len(kept) >= 1
