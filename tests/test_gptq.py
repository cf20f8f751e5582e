"""GPTQ against an oracle that eliminates columns one by one, its invariants, and the walk through a model."""

from __future__ import annotations

from dataclasses import replace

import naive
import numpy as np
import pytest
from helpers import GQA, base_arrays, digest, make_model

import minilora
from minilora.config import ConfigError, LoraConfig, QuantConfig
from minilora.injection import inject_lora
from minilora.kernels import gptq_columns
from minilora.memory import peak_bytes, unique_bytes
from minilora.quant import AffineWeight, CodebookWeight, codebooks, quantize_weight, reference
from minilora.quant.gptq import Hessian, _Grid, gptq, inverse_factor
from minilora.quant.model import quantize_model

AFFINE = ("int2", "int3", "int4", "int8")
ALL = (*AFFINE, "nf2", "nf3", "nf4", "fp4")


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def hessian(n, seed=0, rows=200):
    """Inputs with strong correlations, as a layer's are."""
    x = matrix(rows, n, seed=seed) @ matrix(n, n, seed=seed + 1) / n**0.5 + 0.5
    h = Hessian(n)
    for part in np.array_split(x, 3):
        h.add(part)
    return h.value(), x


def settings(quant_type, **more):
    return QuantConfig(quant_type, 32, more.pop("double_quant", False), 8, "gptq", **more)


def output_error(weight, w, x):
    return float(((x @ (weight.dense() - w).T.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("quant_type", AFFINE)
@pytest.mark.parametrize("seed", range(3))
def test_codes_equal_those_of_the_oracle(quant_type, seed):
    w, (h, _) = matrix(5, 24, seed=seed), hessian(24, seed=seed)
    found, _ = gptq(w, h, settings(quant_type))
    assert np.array_equal(found.unpacked(), naive.obq(w, h, 0.01, found.bits, 8))


def test_the_hessian_is_that_of_the_squared_error():
    h, x = hessian(6)
    np.testing.assert_allclose(h, 2 * x.T.astype(np.float64) @ x / len(x), rtol=1e-5, atol=1e-6)
    u = inverse_factor(h, 0.01)
    damped = h + 0.01 * np.diag(h).mean() * np.eye(6)
    np.testing.assert_allclose(u.T @ u @ damped, np.eye(6), atol=1e-9)
    assert np.array_equal(u, np.triu(u))


@pytest.mark.parametrize("quant_type", ALL)
@pytest.mark.parametrize("how", [{}, {"static_groups": True}, {"static_groups": True, "desc_act": True}])
def test_uncorrelated_inputs_leave_round_to_nearest(quant_type, how):
    """No column can make up for another: bit for bit the same weight, whatever the order of the columns."""
    w = matrix(6, 64, seed=2)
    plain = quantize_weight(w, QuantConfig(quant_type, 32, False, 8))
    found, _ = gptq(w, np.diag(np.linspace(1, 9, 64)), settings(quant_type, **how))
    assert np.array_equal(found.codes, plain.codes) and np.array_equal(found.dense(), plain.dense())


def test_double_quantized_scales_are_those_of_round_to_nearest():
    w, (h, _) = matrix(6, 64, seed=2), hessian(64)
    plain = quantize_weight(w, QuantConfig("nf4", 32, True))
    found, _ = gptq(w, h, settings("nf4", double_quant=True))
    assert isinstance(found, CodebookWeight) and np.array_equal(found.scales.codes, plain.scales.codes)
    assert not np.array_equal(found.codes, plain.codes)


@pytest.mark.parametrize("quant_type", ALL)
def test_the_output_error_falls(quant_type):
    w, (h, x) = matrix(16, 64, seed=4), hessian(64, seed=5)
    plain = output_error(quantize_weight(w, QuantConfig(quant_type, 32, False, 8)), w, x)
    for how in ({}, {"static_groups": True}, {"static_groups": True, "desc_act": True}):
        assert output_error(gptq(w, h, settings(quant_type, **how))[0], w, x) < 0.8 * plain


@pytest.mark.parametrize("fit", ["minmax", "symmetric", "mse", "hqq"])
@pytest.mark.parametrize("store", ["float16", "float32", "zero"])
def test_every_fit_and_store_goes_with_it(fit, store):
    w, (h, x) = matrix(8, 32, seed=6), hessian(32, seed=7)
    found, loss = gptq(w, h, settings("int3", fit=fit, offset_dtype=store))
    assert isinstance(found, AffineWeight) and (found.zeros is not None) == (store == "zero") and loss > 0
    assert output_error(found, w, x) < output_error(AffineWeight.quantize(w, 3, 8, fit, store), w, x)


def test_the_loss_is_the_damped_quadratic_form():
    """Σ e²/2 = ½ Σ_rows d H_damped dᵀ with d = w − ŵ of the whole matrix: what is left cannot be compensated
    any more."""
    w, (h, _) = matrix(4, 16, seed=8), hessian(16, seed=9)
    found, loss = gptq(w, h, settings("int3"))
    d = w.astype(np.float64) - found.dense()
    damped = h + 0.01 * np.diag(h).mean() * np.eye(16)
    assert loss == pytest.approx(0.5 * np.einsum("ri,ij,rj->", d, damped, d), rel=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_a_dead_input_and_the_size_of_the_inputs_change_nothing_else(size):
    """What stands in for the dead input's curvature is as large as the others', so that the damping stays
    what it was."""
    w, (h, x) = matrix(8, 32, seed=20), hessian(32, seed=21)
    plain = gptq(w, h * size**2, settings("int3"))[0]
    assert np.array_equal(plain.codes, gptq(w, h, settings("int3"))[0].codes)
    h[5], h[:, 5], x[:, 5] = 0, 0, 0
    found = output_error(gptq(w, h * size**2, settings("int3"))[0], w, x)
    assert found < 0.8 * output_error(AffineWeight.quantize(w, 3, 8), w, x)


def test_an_input_that_is_never_used_gets_weight_zero():
    w, (h, _) = matrix(4, 16, seed=10), hessian(16, seed=11)
    h[3], h[:, 3] = 0, 0
    found, _ = gptq(w, h, settings("int4", offset_dtype="zero"))
    assert (found.dense()[:, 3] == 0).all()  # whole zero points hold 0 exactly


@pytest.mark.parametrize("quant_type", ["int3", "nf4", "nf8"])
def test_the_kernel_compiled_and_run_by_python_does_what_the_reference_does(quant_type):
    config, w, (h, _) = settings(quant_type), matrix(5, 32, seed=12), hessian(32, seed=13)
    grid = _Grid(config, 5, 32 // (8 if config.affine else 32))
    grid.fit(w.reshape(5, grid.scale.shape[1], -1), slice(None))
    groups = np.arange(32) // (32 // grid.scale.shape[1])
    scale, offset = grid.scale[:, groups], grid.offset[:, groups]
    given = inverse_factor(h, 0.01), scale, offset, grid.levels, grid.midpoints
    expected = reference.round_columns(w.astype(np.float64), *given)
    by_python = np.empty((5, 32), np.uint8), np.empty((5, 32))
    inverse = np.float32(1) / np.maximum(scale, np.float32(1e-38))
    gptq_columns._round_columns.py_func(
        w.astype(np.float64), given[0], scale, inverse, *given[2:], *by_python
    )
    for ranks, errors in (gptq_columns.round_columns(w.astype(np.float64), *given), by_python):
        assert ranks.dtype == np.uint8 and np.array_equal(ranks, expected[0])
        np.testing.assert_allclose(errors, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_beside_a_threshold_it_rounds_as_round_to_nearest_does(quant_type):
    """Each number is within an ulp of a tie: w·(1/absmax) and w/absmax would differ."""
    midpoints, _ = codebooks.thresholds(codebooks.code_map(quant_type))
    absmax = np.random.default_rng(0).uniform(0.01, 10, (200, 1)).astype(np.float32)
    w = np.tile(np.concatenate([absmax, midpoints * absmax], axis=1), 2)
    plain = CodebookWeight.quantize(w, quant_type, 32, double_quant=False)
    assert np.array_equal(gptq(w, np.eye(32), settings(quant_type))[0].codes, plain.codes)


@pytest.mark.parametrize("quant_type", ALL)
@pytest.mark.parametrize("how", [{}, {"static_groups": True, "desc_act": True}])
def test_plain_mode_makes_the_same_weight(quant_type, how):
    w, (h, _) = matrix(6, 64, seed=14), hessian(64, seed=15)
    found, loss = gptq(w, h, settings(quant_type, **how))
    with minilora.kernels.plain():
        plain, plain_loss = gptq(w, h, settings(quant_type, **how))
    assert np.array_equal(found.codes, plain.codes) and found.dense().tobytes() == plain.dense().tobytes()
    assert plain_loss == pytest.approx(loss, rel=1e-9)


def test_bad_input_is_refused():
    w, (h, _) = matrix(4, 16), hessian(16)
    with pytest.raises(ConfigError, match="block_size=32: must divide in=16"):
        gptq(w, h, settings("nf4"))
    with pytest.raises(ConfigError, match=r"hessian.shape=\(8, 8\)"):
        gptq(w, h[:8, :8], settings("int4"))
    with pytest.raises(
        ConfigError, match="damp_percent=1e-09: leaves a Hessian of 16 inputs without an inverse"
    ):
        gptq(w, np.ones((16, 16)) - 2 * np.eye(16), settings("int4", damp_percent=1e-9))
    h[0, 0] = np.nan
    with pytest.raises(ConfigError, match="inputs must be finite"):
        gptq(w, h, settings("int4"))


# --- through a model ----------------------------------------------------------------------------------------


def batches(seed=0, n=4):
    rng = np.random.default_rng(seed)
    return [rng.integers(GQA.vocab_size, size=(3, 7 + i)) for i in range(n)]


def quant(**more):
    return QuantConfig("int3", group_size=4, quantizer="gptq", **more)


def test_a_model_is_quantized_layer_by_layer(base):
    before = digest(base_arrays(base))
    found = quantize_model(base, quant(), batches())
    assert digest(base_arrays(base)) == before  # the base stays as it was
    head = {"lm_head"}
    kinds = {name: type(linear.weight) for name, linear in found.linears()}
    assert all(kind is AffineWeight for name, kind in kinds.items() if name not in head)
    assert found.head.weight is base.head.weight and found.embedding is base.embedding
    again = quantize_model(base, quant(), batches())
    assert all(
        np.array_equal(a.weight.dense(), b.weight.dense())
        for (_, a), (_, b) in zip(found.linears(), again.linears(), strict=True)
    )


def test_each_layer_sees_the_inputs_that_the_quantized_layers_below_make(base):
    """Redone by hand for the last projection of the last block: its Hessian is that of the quantized model's
    own inputs."""
    found = quantize_model(base, quant(), batches())
    block, h = found.blocks[-1], Hessian(GQA.intermediate_size)
    for ids in batches():
        x = found.embedding.forward(ids)[0]
        rope = found.rope(np.arange(ids.shape[1]))
        x = found.blocks[0].forward(x, rope)[0]
        mixed = block.attention.forward(block.input_norm.forward(x)[0], rope)[0] + x
        normed = block.post_norm.forward(mixed)[0]
        gate, up = block.mlp.gate_proj.forward(normed)[0], block.mlp.up_proj.forward(normed)[0]
        h.add(gate / (1 + np.exp(-gate)) * up)
    name, linear = [(n, w) for n, w in base.linears() if n.endswith("1.mlp.down_proj")][0]
    expected, _ = gptq(linear.weight.dense(), h.value(), quant())
    differ = (expected.unpacked() != block.mlp.down_proj.weight.unpacked()).mean()
    assert differ <= 0.01, name  # float32 sums in another order may turn a near-tie


def test_a_model_of_two_matrix_mlps_works_too():
    from helpers import CONFIGS

    model = make_model(CONFIGS["gelu tied"], dtype=np.float32, trainable=False)
    found = quantize_model(model, quant(), batches())
    assert found.tied and all(
        isinstance(w.weight, AffineWeight) for n, w in found.linears() if n != "lm_head"
    )


def test_models_and_data_that_cannot_be_are_refused(base):
    with pytest.raises(ConfigError, match="calibration='no tokens'"):
        quantize_model(base, quant())
    for bad in (
        [[0, -1]],
        [[0, GQA.vocab_size]],
        [[0.5]],
        [0, 1],
        np.zeros((1, GQA.context_length + 1), int),
    ):
        with pytest.raises(ConfigError, match="calibration=.*token ids"):
            quantize_model(base, quant(), [np.asarray(bad)])
    with pytest.raises(ConfigError, match="has an adapter"):
        quantize_model(inject_lora(base, LoraConfig(r=2), np.random.default_rng(0)), quant(), batches())


def test_memory_stays_at_one_layer():
    """Three times the layers, the same peak beyond what is kept: hidden states, one block, one Hessian."""
    peaks = {}
    for layers in (2, 6):
        config = replace(GQA, num_hidden_layers=layers, hidden_size=64, intermediate_size=128)
        model = make_model(config, dtype=np.float32, trainable=False)
        ids = batches()

        def work(model=model, ids=ids):
            found = quantize_model(model, quant(), ids)
            work.kept = unique_bytes(a for a in base_arrays(found) if a.dtype != np.float32)

        work()  # compiled before it is measured
        peaks[layers] = peak_bytes(work) - work.kept
    assert peaks[6] < 1.2 * peaks[2]
