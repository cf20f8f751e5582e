"""Adapters: what they start as, what they train, what they merge to. Each mistake known from other codebases
has its test."""

from __future__ import annotations

from dataclasses import replace

import naive
import numpy as np
import pytest
from helpers import (
    CONFIGS,
    GQA,
    FakeTask,
    adapters,
    assert_close,
    base_arrays,
    close_rtol,
    digest,
    fill_adapters,
    make_linear,
    make_model,
    random_batch,
)

from minilora.building import parameter_shapes
from minilora.config import ConfigError, LoraConfig, ModelConfig, QuantConfig, TrainConfig, matches
from minilora.injection import full, inject_lora, subset
from minilora.layers import Linear
from minilora.lora import LoraLinear, init_a
from minilora.memory import count_parameters
from minilora.merging import merge, merge_linear, unmerge_linear
from minilora.parameters import DenseWeight, Gradients, Parameter
from minilora.quant.affine import AffineWeight
from minilora.quant.model import quantize_model
from minilora.quant.weights import CodebookWeight
from minilora.training.loss import shard_loss
from minilora.training.trainer import Trainer

IDS = np.array([[1, 2, 3, 4], [5, 4, 3, 9]])
NF4, INT4 = QuantConfig("nf4", block_size=32), QuantConfig("int4", group_size=4)
LORA = LoraConfig(r=3, lora_alpha=5)
QALORA = replace(LORA, use_qalora=True)
METHODS = {
    "lora": (None, LORA),
    "qlora nf4": (NF4, LORA),
    "qlora fp4": (replace(NF4, quant_type="fp4", double_quant=False), LORA),
    "qlora nf3": (replace(NF4, quant_type="nf3"), LORA),
    "lora on int8": (replace(INT4, quant_type="int8"), LORA),
    "qalora int2": (replace(INT4, quant_type="int2"), QALORA),
    "qalora int3": (replace(INT4, quant_type="int3"), QALORA),
    "qalora int4": (INT4, QALORA),
    "qalora int8 rslora": (replace(INT4, quant_type="int8"), replace(QALORA, use_rslora=True)),
}
every_method = pytest.mark.parametrize("quant, config", METHODS.values(), ids=METHODS.keys())


def rng(seed=0):
    return np.random.default_rng(seed)


def base_model(quant=None, dtype=np.float32, config=GQA):
    model = make_model(config, dtype=dtype, trainable=False)
    return model if quant is None else quantize_model(model, quant)


def batch_gradients(model):
    batch = random_batch(GQA)
    grads = Gradients(model.trainable())
    shard_loss(model, batch, float(batch.mask.sum()), grads)
    return grads


# --- the start ----------------------------------------------------------------------------------------------


@every_method
def test_adapted_equals_base_bitwise_at_the_start(quant, config):
    base = base_model(quant)
    assert base.logits(IDS).tobytes() == inject_lora(base, config, rng()).logits(IDS).tobytes()


@every_method
def test_at_step_zero_only_b_has_a_gradient(quant, config):
    """A = B = 0 would never train; B = 0 alone stops A for one step only."""
    grads = batch_gradients(inject_lora(base_model(quant), config, rng()))
    for p, g in grads.items():
        if p.name.endswith("lora_A.weight"):
            assert p.data.any() and not g.any(), p.name
        else:
            assert not p.data.any() and np.abs(g).max() > 0, p.name


@every_method
def test_only_a_and_b_train(quant, config):
    model = inject_lora(base_model(quant), config, rng())
    assert {p.name.rsplit(".", 2)[1] for p in model.trainable()} == {"lora_A", "lora_B"}
    assert len(model.trainable()) == 2 * 7 * GQA.num_hidden_layers
    assert set(batch_gradients(model)) == set(model.trainable())


@pytest.mark.parametrize("kind, width", [("normal", 768), ("kaiming", 768), ("normal", 64), ("kaiming", 64)])
def test_spread_of_a_depends_on_the_input_width_only(kind, width):
    """1/√(3·in), for any rank and pooling: not in = r (A stored transposed), not in/g (fan-in taken after
    pooling)."""
    for r, pool in ((4, 1), (32, 1), (4, 32), (32, 32)):
        n = 400_000
        a = init_a(LoraConfig(r=r, init_lora_weights=kind), (n // 100, 100), width, rng(r + pool))
        assert abs(a.std() * (3 * width) ** 0.5 - 1) < 5 / (2 * n) ** 0.5
        assert abs(a.mean()) < 5 * a.std() / n**0.5
    if kind == "kaiming":
        assert np.abs(a).max() <= width**-0.5 < np.abs(a).max() * 1.001  # uniform reaches its bound


def test_gaussian_is_normal_and_kaiming_is_not():
    fourth = {
        kind: float((a**4).mean() / (a**2).mean() ** 2)
        for kind in ("normal", "kaiming", "gaussian")
        for a in [init_a(LoraConfig(r=8, init_lora_weights=kind), (400, 1000), 64, rng())]
    }
    assert (
        abs(fourth["normal"] - 3) < 0.05
        and abs(fourth["gaussian"] - 3) < 0.05
        and abs(fourth["kaiming"] - 9 / 5) < 0.05
    )


@pytest.mark.parametrize("r", [2, 8])
def test_pefts_gaussian_depends_on_r(r):
    a = init_a(LoraConfig(r=r, init_lora_weights="gaussian"), (400, 1000), 64, rng())
    assert abs(a.std() * r - 1) < 5 / 800_000**0.5


@pytest.mark.parametrize("r, pool", [(4, 1), (16, 1), (16, 8)])
def test_injected_a_has_that_spread(r, pool):
    wide = replace(GQA, hidden_size=256, intermediate_size=64)
    base = base_model(QuantConfig("int4", group_size=pool) if pool > 1 else None, config=wide)
    model = inject_lora(
        base, LoraConfig(r=r, target_modules=("q_proj", "o_proj"), use_qalora=pool > 1), rng()
    )
    a = np.concatenate([linear.lora_A.data.reshape(-1) for linear in adapters(model)])
    assert a.dtype == np.float32
    assert abs(a.std() * (3 * 256) ** 0.5 - 1) < 5 / (2 * a.size) ** 0.5


def test_a_is_seeded_by_the_generator_that_is_passed_in():
    base = base_model()
    found = [digest(p.data for p in inject_lora(base, LORA, rng(seed)).trainable()) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_shapes_are_r_by_in_and_out_by_r():
    base = make_linear(6, 8)
    layer = LoraLinear(base, LoraConfig(r=3), rng())
    assert layer.lora_A.data.shape == (3, 8) and layer.lora_B.data.shape == (6, 3) and layer.shape == (6, 8)
    affine = Linear("q", AffineWeight.quantize(base.weight.dense().astype(np.float32), 4, 4))
    assert LoraLinear(affine, LoraConfig(r=3), rng(), pool=4).lora_A.data.shape == (3, 2)


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("r, alpha, rslora", [(1, 1, False), (4, 8, False), (4, 8, True), (2, 0.5, False)])
def test_output_is_base_plus_the_scaled_low_rank_path(r, alpha, rslora):
    layer = fill_adapters(
        LoraLinear(make_linear(6, 8), LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora), rng())
    )
    x = rng(3).standard_normal((5, 8))
    delta = naive.lora_delta(layer.lora_A.data, layer.lora_B.data, alpha / (r**0.5 if rslora else r))
    assert_close(
        layer.forward(x)[0],
        naive.matmul(x, (layer.base.weight.dense() + delta).T),
        close_rtol(np.float64, 8, r),
    )
    assert_close(layer.delta(), delta, close_rtol(np.float64, r))


def test_pooled_output_sums_each_group_not_averages():
    affine = AffineWeight.quantize(rng().standard_normal((6, 8)).astype(np.float32), 4, 4)
    layer = fill_adapters(LoraLinear(Linear("q", affine), QALORA, rng(), pool=4), dtype=np.float64)
    x = rng(3).standard_normal((5, 8))
    delta = naive.lora_delta(layer.lora_A.data, layer.lora_B.data, 5 / 3, pool=4)
    assert_close(
        layer.forward(x)[0] - x @ affine.dense().T, naive.matmul(x, delta.T), close_rtol(np.float64, 8, 3)
    )
    assert_close(layer.delta(), delta, close_rtol(np.float64, 3))
    assert np.array_equal(layer.delta()[:, 0], layer.delta()[:, 3]) and not np.array_equal(
        layer.delta()[:, 0], layer.delta()[:, 4]
    )


def test_scaling_is_a_python_float_that_does_not_widen_float32():
    layer = fill_adapters(
        LoraLinear(make_linear(6, 8, dtype=np.float32), LoraConfig(r=3, lora_alpha=np.float64(5)), rng())
    )
    assert layer.forward(np.ones((2, 8), np.float32))[0].dtype == np.float32


# --- dropout ------------------------------------------------------------------------------------------------


def dropped(dropout=0.4, key=(0, 0, 0), x=None, pool=1):
    """Output of the adapter's path alone, over a base of zeros, with A = identity and B = identity: what
    reached the adapter."""
    n = 200
    weight = (
        DenseWeight(Parameter("w", np.zeros((n, n))))
        if pool == 1
        else AffineWeight(
            np.zeros(n * n // 2, np.uint8), np.ones((n, n // pool)), np.zeros((n, n // pool)), (n, n), 4, pool
        )
    )
    layer = LoraLinear(
        Linear("q", weight), LoraConfig(r=n // pool, lora_alpha=n // pool, lora_dropout=dropout), rng(), pool
    )
    layer.lora_A.data, layer.lora_B.data = np.eye(n // pool), np.eye(n, n // pool)
    return layer.forward(np.ones((100, n)) if x is None else x, key)[0]


def test_dropout_zeroes_that_share_and_scales_the_rest():
    y = dropped(0.4)
    share = (y == 0).mean()
    assert abs(share - 0.4) < 5 * (0.4 * 0.6 / y.size) ** 0.5
    assert np.allclose(y[y != 0], 1 / 0.6, rtol=close_rtol(np.float64, 1))


def test_dropout_is_drawn_for_each_token_not_once_for_a_column():
    zero = dropped(0.4) == 0
    assert (
        zero.mean(0).min() > 0.2
        and zero.mean(0).max() < 0.65
        and zero.mean(1).min() > 0.2
        and zero.mean(1).max() < 0.65
    )


def test_dropout_touches_the_adapters_path_only():
    model = inject_lora(
        base_model(), replace(LORA, lora_dropout=0.9), rng()
    )  # B = 0: the adapter adds nothing
    assert np.array_equal(model.forward(IDS, (0, 0, 0))[0], base_model().forward(IDS)[0])
    fill_adapters(model)
    assert not np.array_equal(model.forward(IDS, (0, 0, 0))[0], model.forward(IDS)[0])


def test_no_key_means_no_dropout():
    assert (dropped(0.4, key=None) == 1).all()


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "step", "shard"])
def test_dropout_depends_on_seed_step_and_shard(other):
    assert np.array_equal(dropped(), dropped()) and not np.array_equal(dropped(), dropped(key=other))


def test_dropout_differs_from_layer_to_layer():
    model = fill_adapters(inject_lora(base_model(), replace(LORA, lora_dropout=0.5), rng()))
    x = np.ones((3, 16), np.float32)
    masks = [
        linear.forward(x, (0, 0, 0))[1][2].tobytes() for linear in adapters(model) if linear.shape[1] == 16
    ]
    assert len(masks) == 12 and len(set(masks)) == 12


def test_pooled_dropout_acts_on_the_pooled_input():
    y = dropped(0.5, pool=4)[:, :50]
    assert set(np.round(np.unique(y), 12)) == {0.0, 8.0}  # a whole group of four ones, doubled, or nothing


# --- injection ----------------------------------------------------------------------------------------------


def test_injected_models_share_the_bases_arrays():
    base = base_model(NF4)
    first, second = inject_lora(base, LORA, rng(0)), inject_lora(base, replace(LORA, r=2), rng(1))
    for model in (first, second):
        assert [id(a) for a in base_arrays(model)] == [id(a) for a in base_arrays(base)]
    assert not {id(p.data) for p in first.trainable()} & {id(p.data) for p in second.trainable()}


def test_several_adapters_over_one_base_do_not_disturb_one_another():
    base = base_model()
    expected = base.logits(IDS)
    first = fill_adapters(inject_lora(base, LORA, rng(0)))
    lone = first.logits(IDS)
    second = fill_adapters(inject_lora(base, LORA, rng(1)), seed=9)
    second.logits(IDS)
    assert np.array_equal(base.logits(IDS), expected) and np.array_equal(first.logits(IDS), lone)
    assert not np.allclose(second.logits(IDS), lone)


def test_injection_freezes_the_base_and_makes_it_read_only():
    trained = make_model(GQA, dtype=np.float32, trainable=True)
    model = inject_lora(trained, LORA, rng())
    assert all(".lora_" in p.name for p in model.trainable())
    for array in base_arrays(model):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_the_base_model_object_is_not_changed_by_injection():
    base = base_model()
    linears = [linear for _, linear in base.linears()]
    inject_lora(base, LORA, rng())
    assert [linear for _, linear in base.linears()] == linears and not any(
        isinstance(x, LoraLinear) for x in linears
    )


@every_method
def test_double_injection_is_refused(quant, config):
    with pytest.raises(ConfigError, match="already injected"):
        inject_lora(inject_lora(base_model(quant), config, rng()), config, rng())


@pytest.mark.parametrize(
    "targets", [("attn",), ("q_proj", "query"), ("proj",), ("q",), ("model",), ("Q_PROJ",), ("",)]
)
def test_unmatched_targets_list_what_there_is(targets):
    with pytest.raises(ConfigError) as caught:
        inject_lora(base_model(), LoraConfig(r=2, target_modules=targets), rng())
    message = str(caught.value)
    assert f"target_modules={targets[-1]!r}" in message
    assert all(
        name in message
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    )


def test_a_model_without_gate_lists_no_gate():
    with pytest.raises(ConfigError) as caught:
        inject_lora(make_model(CONFIGS["gelu tied"]), LoraConfig(r=2, target_modules=("gate_proj",)), rng())
    assert "there are q_proj, k_proj, v_proj, o_proj, up_proj, down_proj, lm_head" in str(caught.value)


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("q_proj",), 2),
        (("q_proj", "v_proj"), 4),
        (("layers.1.self_attn.q_proj",), 1),
        (("model.layers.0.mlp.up_proj",), 1),
        (("lm_head",), 1),
        (("all-linear"), 14),
        (("attention"), 8),
        (("mlp"), 6),
        (("q_proj", "self_attn.q_proj"), 2),
    ],
)
def test_targets_choose_whole_names(targets, expected):
    model = inject_lora(base_model(), LoraConfig(r=2, target_modules=targets), rng())
    assert len(adapters(model)) == expected


@pytest.mark.parametrize(
    "name, target, expected",
    [
        ("model.layers.0.self_attn.q_proj", "q_proj", True),
        ("model.layers.0.self_attn.q_proj", "proj", False),
        ("model.layers.11.mlp.up_proj", "1.mlp.up_proj", False),
        ("model.layers.1.mlp.up_proj", "1.mlp.up_proj", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "head", False),
        ("a.b", "", False),
    ],
)
def test_matching_is_by_whole_parts(name, target, expected):
    assert matches(name, target) is expected


@pytest.mark.parametrize("r, fits", [(16, True), (17, False), (1000, False)])
def test_rank_above_the_smaller_side_is_refused(r, fits):
    config = LoraConfig(r=r, target_modules=("q_proj",))
    if fits:
        inject_lora(base_model(), config, rng())
    else:
        with pytest.raises(ConfigError, match=rf"r={r}: must be at most 16.*q_proj \(16, 16\)"):
            inject_lora(base_model(), config, rng())


@pytest.mark.parametrize("quant, storage", [(None, "DenseWeight"), (NF4, "stored as nf4")])
def test_qalora_needs_a_float_offset(quant, storage):
    with pytest.raises(ConfigError, match=f"use_qalora=True: .*{storage}.*int2, int3, int4 or int8"):
        inject_lora(base_model(quant), QALORA, rng())


def test_qalora_refuses_a_tied_head_by_name():
    base = quantize_model(make_model(CONFIGS["mha tied"], dtype=np.float32), INT4)
    with pytest.raises(ConfigError, match="a tied head shares the embedding's table"):
        inject_lora(base, replace(QALORA, target_modules=("lm_head",)), rng())


def test_qalora_pools_over_the_weights_own_groups():
    model = inject_lora(base_model(replace(INT4, group_size=2)), QALORA, rng())
    assert {linear.pool for linear in adapters(model)} == {2}
    plain = inject_lora(base_model(INT4), LORA, rng())
    assert {linear.pool for linear in adapters(plain)} == {1}  # LoRA over an affine base does not pool


def test_a_tied_head_can_be_adapted_without_touching_the_embedding():
    base = make_model(CONFIGS["mha tied"], dtype=np.float32, trainable=False)
    model = fill_adapters(inject_lora(base, replace(LORA, target_modules=("lm_head",)), rng()))
    assert np.array_equal(model.forward(IDS)[0], base.forward(IDS)[0]) and not np.allclose(
        model.logits(IDS), base.logits(IDS)
    )


# --- full and subset ----------------------------------------------------------------------------------------


def test_full_trains_copies_of_everything():
    base = base_model()
    model = full(base)
    assert len(model.trainable()) == len(model.parameters()) == len(parameter_shapes(GQA))
    assert not any(np.shares_memory(a, b) for a, b in zip(base_arrays(model), base_arrays(base), strict=True))
    assert np.array_equal(model.logits(IDS), base.logits(IDS))
    assert all(p.data.flags.writeable for p in model.trainable())


def test_full_works_after_the_base_was_injected():
    base = base_model()
    inject_lora(base, LORA, rng())
    full(base).trainable()[0].data[...] = 0


@pytest.mark.parametrize(
    "modules, expected",
    [
        (("layers.1",), 9),
        (("q_proj", "v_proj"), 4),
        (("model.norm",), 1),
        (("lm_head",), 1),
        (("mlp",), 6),
        (("layers.0.mlp.up_proj", "layers.1"), 10),
    ],
)
def test_subset_trains_copies_of_the_chosen_and_shares_the_rest(modules, expected):
    base = base_model()
    model = subset(base, modules)
    trained = {p.name for p in model.trainable()}
    assert len(trained) == expected and all(any(m in name for m in modules) for name in trained)
    for mine, theirs in zip(model.parameters(), base.parameters(), strict=True):
        assert (mine.data is theirs.data) is (mine.name not in trained)


@pytest.mark.parametrize(
    "modules", [("layers.2",), ("proj",), ("q_proj", "layer"), ("",), ("layers.1.q_proj",)]
)
def test_subset_refuses_names_that_match_nothing_and_lists_those_there_are(modules):
    with pytest.raises(
        ConfigError, match=r"modules='.*': matches nothing; there are .*layers.0.self_attn.q_proj.*model.norm"
    ):
        subset(base_model(), modules)


def test_subset_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="name at least one module"):
        subset(base_model(), ())


def test_subset_does_not_choose_layer_11_for_layer_1():
    config = replace(GQA, num_hidden_layers=12, hidden_size=4, intermediate_size=4, num_attention_heads=2)
    model = subset(make_model(config, trainable=False), ("layers.1",))
    assert {p.name.split(".")[2] for p in model.trainable()} == {"1"}


@pytest.mark.parametrize("choose", [full, lambda m: subset(m, ("q_proj",))], ids=["full", "subset"])
@pytest.mark.parametrize(
    "make, word",
    [(lambda: base_model(NF4), "quantized"), (lambda: inject_lora(base_model(), LORA, rng()), "adapted")],
)
def test_full_and_subset_need_a_dense_base(choose, make, word):
    with pytest.raises(ConfigError, match=f"is {word}"):
        choose(make())


# --- quantizing a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant, cls", [(NF4, CodebookWeight), (INT4, AffineWeight)])
def test_quantize_model_stores_the_projections_in_few_bits_and_nothing_else(quant, cls):
    dense = base_model()
    model = quantize_model(dense, quant)
    assert all(isinstance(linear.weight, cls) for name, linear in model.linears() if name != "lm_head")
    assert model.head is dense.head and model.embedding is dense.embedding and model.norm is dense.norm
    assert all(isinstance(linear.weight, DenseWeight) for _, linear in dense.linears())


def test_quantized_logits_equal_a_dense_model_of_the_rounded_weights():
    model = base_model(NF4)
    dense = model.map_linears(
        lambda linear: Linear(linear.name, DenseWeight(Parameter(linear.name, linear.weight.dense())))
    )
    assert_close(model.logits(IDS), dense.logits(IDS), close_rtol(np.float32, *[20] * 18))


def test_quantizing_refuses_a_group_that_does_not_divide_and_says_which_do():
    with pytest.raises(ConfigError, match="group_size=3: must divide in=16; these do: 1, 2, 4, 8, 16"):
        quantize_model(base_model(), replace(INT4, group_size=3))


def test_quantizing_an_injected_model_is_refused():
    with pytest.raises(ConfigError, match="adapter"):
        quantize_model(inject_lora(base_model(), LORA, rng()), NF4)


def test_quantizing_nan_is_refused():
    model = base_model()
    model.blocks[1].mlp.up_proj.weight.param.data[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"w\[2, 3\]=nan"):
        quantize_model(model, NF4)


# --- merging ------------------------------------------------------------------------------------------------


def independent_merge(linear):
    """W + ΔW by loops in double precision."""
    return linear.base.weight.dense().astype(np.float64) + naive.lora_delta(
        linear.lora_A.data.astype(float), linear.lora_B.data.astype(float), linear.scaling, linear.pool
    )


@every_method
def test_merged_weights_equal_an_independent_w_plus_delta(quant, config):
    """Round trips alone would hide a ΔW that is merged twice."""
    model = fill_adapters(inject_lora(base_model(quant), config, rng()))
    merged, errors = merge(model)
    exact = {linear.name: independent_merge(linear) for linear in adapters(model)}
    assert set(errors) == set(exact) and not adapters(merged)
    for name, linear in merged.linears():
        if name in exact:
            # stored in float32: one rounding of W + ΔW, for offsets one of the sum scale·q + offset and one
            # of the offset
            assert_close(linear.weight.dense(), exact[name], 4 * np.finfo(np.float32).eps, name)
            assert errors[name].max_abs <= 4 * np.finfo(np.float32).eps * np.abs(exact[name]).max()
            assert errors[name].max_abs == pytest.approx(
                np.abs(linear.weight.dense() - exact[name]).max(), rel=1e-6
            )


@every_method
def test_merged_outputs_agree_to_float_rounding(quant, config):
    model = fill_adapters(inject_lora(base_model(quant), config, rng()))
    # 2 blocks of about 9 sums of up to 20 terms, in both models, and the residual stream carries errors on
    rtol = close_rtol(np.float32, *[20] * 36)
    assert_close(merge(model)[0].logits(IDS), model.logits(IDS), rtol)
    assert (
        np.abs(model.logits(IDS) - base_model(quant).logits(IDS)).max() > 1000 * rtol
    )  # so that agreeing says something


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [2, 4, 16])
def test_qalora_merge_keeps_the_codes_object_and_moves_the_offsets(bits, group):
    base = Linear("q", AffineWeight.quantize(rng().standard_normal((6, 16)).astype(np.float32), bits, group))
    layer = fill_adapters(LoraLinear(base, replace(QALORA, r=2), rng(), pool=group))
    merged, error = merge_linear(layer)
    assert (
        isinstance(merged, AffineWeight)
        and merged.codes is base.weight.codes
        and merged.scale is base.weight.scale
    )
    assert merged.offset.dtype == np.float32 and base.weight.offset.dtype == np.float16
    delta = naive.lora_delta(layer.lora_A.data.astype(float), layer.lora_B.data.astype(float), layer.scaling)
    assert_close(merged.offset, base.weight.offset + delta, np.finfo(np.float32).eps)
    assert error.relative < 1e-5


@every_method
def test_the_unmerged_model_stays_valid(quant, config):
    model = fill_adapters(inject_lora(base_model(quant), config, rng()))
    before, arrays = model.logits(IDS), digest([*base_arrays(model), *(p.data for p in model.trainable())])
    once, twice = merge(model)[0], merge(model)[0]
    assert np.array_equal(model.logits(IDS), before)
    assert digest([*base_arrays(model), *(p.data for p in model.trainable())]) == arrays
    assert np.array_equal(
        once.logits(IDS), twice.logits(IDS)
    )  # merging again starts from the base, not from the merged


def test_merging_a_merged_model_is_refused():
    merged, _ = merge(fill_adapters(inject_lora(base_model(), LORA, rng())))
    with pytest.raises(ConfigError, match="no adapter to merge"):
        merge(merged)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "nf3", "int4", "int8"])
def test_requantizing_rounds_w_plus_delta_and_reports_the_error(quant_type):
    quant = QuantConfig(quant_type, block_size=32, group_size=4, double_quant=False)
    model = fill_adapters(inject_lora(base_model(quant), LORA, rng()))
    merged, errors = merge(model, "requantize", quant)
    for linear, (_, after) in zip(adapters(model), merged.linears(), strict=False):
        exact = independent_merge(linear)
        error = after.weight.dense() - exact
        assert type(after.weight) is type(linear.base.weight)
        assert errors[linear.name].max_abs == pytest.approx(np.abs(error).max(), rel=1e-6)
        assert errors[linear.name].rms == pytest.approx((error**2).mean() ** 0.5, rel=1e-6)
        assert errors[linear.name].relative == pytest.approx(
            np.linalg.norm(error) / np.linalg.norm(linear.delta()), rel=1e-6
        )
        assert 0 < errors[linear.name].rms < 0.2 * exact.std() * (4 if quant_type == "nf3" else 1)


def test_requantizing_needs_to_know_how():
    with pytest.raises(ConfigError, match="quant=None: .*needs a QuantConfig"):
        merge(fill_adapters(inject_lora(base_model(NF4), LORA, rng())), "requantize")


@pytest.mark.parametrize("how", ["Offsets", "", "exact"])
def test_unknown_ways_to_merge_are_refused(how):
    with pytest.raises(ConfigError, match=f"how='{how}': choose one of auto, dense, requantize, offsets"):
        merge(inject_lora(base_model(), LORA, rng()), how)


@pytest.mark.parametrize(
    "pool, group, fits", [(4, 4, True), (8, 4, True), (2, 4, False), (1, 4, False), (1, 1, True)]
)
def test_offsets_take_only_what_is_constant_within_each_group(pool, group, fits):
    base = Linear("q", AffineWeight.quantize(rng().standard_normal((6, 8)).astype(np.float32), 4, group))
    layer = fill_adapters(LoraLinear(base, replace(LORA, r=1), rng(), pool))
    if fits:
        assert_close(
            merge_linear(layer, "offsets")[0].dense(), independent_merge(layer), 4 * np.finfo(np.float32).eps
        )
    else:
        with pytest.raises(
            ConfigError, match=f"constant over {pool} inputs, the weight's groups have {group}"
        ):
            merge_linear(layer, "offsets")


@pytest.mark.parametrize("quant", [None, NF4])
def test_offsets_need_a_weight_that_has_them(quant):
    with pytest.raises(ConfigError, match="no float offset"):
        merge(inject_lora(base_model(quant), LORA, rng()), "offsets")


def test_a_pooled_adapter_merges_densely_too():
    model = fill_adapters(inject_lora(base_model(INT4), QALORA, rng()))
    merged, _ = merge(model, "dense")
    assert all(isinstance(linear.weight, DenseWeight) for _, linear in merged.linears())
    assert_close(merged.logits(IDS), model.logits(IDS), close_rtol(np.float32, *[20] * 36))


@every_method
def test_unmerging_gives_the_base_back_to_rounding_and_says_how_far(quant, config):
    model = fill_adapters(inject_lora(base_model(quant), config, rng()))
    linear = adapters(model)[0]
    base, error = unmerge_linear(merge_linear(linear)[0], linear)
    found = np.abs(base.dense() - linear.base.weight.dense()).max()
    assert error == found <= 4 * np.finfo(np.float32).eps * np.abs(independent_merge(linear)).max()
    assert base.dense().dtype == np.float32


def test_merging_an_untrained_adapter_changes_nothing():
    model = inject_lora(base_model(), LORA, rng())
    merged, errors = merge(model)
    assert digest(p.data for p in merged.parameters()) == digest(p.data for p in base_model().parameters())
    assert all(e.max_abs == e.rms == e.relative == 0 for e in errors.values())


def test_merged_parameters_have_their_names_back():
    merged, _ = merge(inject_lora(base_model(), LORA, rng()))
    assert {p.name for p in merged.parameters()} == set(parameter_shapes(GQA)) and not merged.trainable()


def test_a_merged_tied_head_becomes_a_head_of_its_own():
    base = make_model(CONFIGS["mha tied"], dtype=np.float32, trainable=False)
    model = fill_adapters(inject_lora(base, replace(LORA, target_modules=("lm_head",)), rng()))
    merged, _ = merge(model)
    assert (
        not merged.tied and not merged.config.tie_word_embeddings
    )  # or a saved file could not be read again
    assert np.array_equal(merged.embedding.weight.dense(), base.embedding.weight.dense())
    assert_close(merged.logits(IDS), model.logits(IDS), close_rtol(np.float32, *[20] * 36))
    untouched, _ = merge(inject_lora(base, LORA, rng()))
    assert untouched.tied and untouched.config.tie_word_embeddings


# --- training leaves the base alone -------------------------------------------------------------------------


@every_method
def test_base_bytes_are_the_same_after_training(quant, config):
    base = base_model(quant)
    model = inject_lora(base, replace(config, lora_dropout=0.1), rng())
    before, start = digest(base_arrays(base)), [p.data.copy() for p in model.trainable()]
    Trainer(model, FakeTask(), TrainConfig(steps=3, batch_size=4, warmup_steps=0), threads=1).train()
    assert digest(base_arrays(base)) == before == digest(base_arrays(model))
    assert all(not np.array_equal(p.data, old) for p, old in zip(model.trainable(), start, strict=True))
    assert all(p.data.dtype == np.float32 for p in model.trainable())


def test_full_training_leaves_its_base_alone():
    base = base_model()
    before = digest(base_arrays(base))
    Trainer(full(base), FakeTask(), TrainConfig(steps=2, batch_size=4), threads=1).train()
    assert digest(base_arrays(base)) == before


# --- parameter counts ---------------------------------------------------------------------------------------


def lora_parameters(config: ModelConfig, r: int, group: int = 1) -> int:
    """Σ r·(in/g + out) over the projections, from shapes alone."""
    return sum(
        r * (shape[1] // group + shape[0])
        for name, shape in parameter_shapes(config).items()
        if "_proj" in name
    )


LLAMA_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    context_length=2048,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("group, expected", [(1, 159_907_840), (32, 89_309_184)])
def test_published_adapter_sizes_of_llama_7b(group, expected):
    """160M and 89M in QA-LoRA's table 2 (r = 64 on all projections)."""
    assert lora_parameters(LLAMA_7B, 64, group) == expected


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("quant, group", [(None, 1), (NF4, 1), (INT4, 4)])
def test_trainable_parameters_by_formula_and_all_whatever_the_storage(r, quant, group):
    model = inject_lora(base_model(quant), LoraConfig(r=r, use_qalora=group > 1), rng())
    dense = sum(int(np.prod(shape)) for shape in parameter_shapes(GQA).values())
    expected = lora_parameters(GQA, r, group)
    assert count_parameters(model) == (expected, dense + expected)  # not halved by packing
