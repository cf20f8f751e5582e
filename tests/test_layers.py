"""One conformance suite for every layer, plain, quantized or adapted: what the contract of layers.py
promises, for each.

A case is a function of the dtype and of whether its own weights train; it returns the layer, an input, and
how to run it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from helpers import GQA, assert_close, close_rtol, digest, fill_adapters, make_linear, make_model

from minilora import functional as F
from minilora.config import LoraConfig, QuantConfig
from minilora.injection import inject_lora
from minilora.layers import MLP, Embedding, Linear, RMSNorm
from minilora.lora import LoraLinear
from minilora.memory import arrays_in, unique_bytes
from minilora.parameters import DenseWeight, Gradients, Parameter
from minilora.quant.model import quantize_model
from minilora.quant.weights import quantize_weight
from minilora.training.gradcheck import gradcheck

KEY = (7, 3, 1)  # seed, step, shard: dropout draws from it


@dataclass
class Case:
    layer: Any
    x: np.ndarray
    arguments: tuple[Any, ...] = ()

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        return self.layer.forward(x, *self.arguments)

    def backward(self, dy: np.ndarray, cache: Any, grads: Gradients) -> Any:
        return self.layer.backward(dy, cache, grads)

    @property
    def parameters(self) -> list[Parameter]:
        layer = self.layer
        if isinstance(layer, MLP) or hasattr(layer, "q_proj"):
            return list(
                dict.fromkeys(
                    p
                    for linear in vars(layer).values()
                    if hasattr(linear, "parameters")
                    for p in linear.parameters()
                )
            )
        return list(layer.parameters())

    @property
    def arrays(self) -> Iterator[np.ndarray]:
        for p in self.parameters:
            yield p.data
        weight = getattr(getattr(self.layer, "base", self.layer), "weight", None)
        if hasattr(weight, "arrays"):
            yield from (a for group in weight.arrays().values() for a in group)


def data(*shape: int, dtype: Any = np.float64, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def linear(dtype: Any, trainable: bool) -> Case:
    return Case(make_linear(6, 8, dtype=dtype, trainable=trainable), data(2, 3, 8, dtype=dtype))


def quantized(quant: QuantConfig) -> Callable[[Any, bool], Case]:
    def make(dtype: Any, trainable: bool) -> Case:
        return Case(
            Linear("q", quantize_weight(data(6, 8, dtype=np.float32), quant)), data(2, 3, 8, dtype=dtype)
        )

    return make


def adapted(quant: QuantConfig | None = None, **config: Any) -> Callable[[Any, bool], Case]:
    def make(dtype: Any, trainable: bool) -> Case:
        base = (
            make_linear(6, 8, dtype=dtype)
            if quant is None
            else Linear("q", quantize_weight(data(6, 8, dtype=np.float32), quant))
        )
        lora = LoraConfig(r=3, lora_alpha=5, use_qalora=quant is not None and quant.affine, **config)
        layer = LoraLinear(
            base, lora, np.random.default_rng(0), pool=quant.group_size if lora.use_qalora and quant else 1
        )
        return Case(
            fill_adapters(layer, dtype=dtype),
            data(2, 3, 8, dtype=dtype),
            (KEY,) if config.get("lora_dropout") else (),
        )

    return make


def embedding(dtype: Any, trainable: bool) -> Case:
    table = Parameter("embed.weight", data(9, 5, dtype=dtype), trainable)
    return Case(Embedding("embed", DenseWeight(table)), np.array([[0, 3, 3], [8, 0, 3]]))


def norm(dtype: Any, trainable: bool) -> Case:
    return Case(
        RMSNorm(Parameter("norm.weight", data(8, dtype=dtype), trainable), 1e-3), data(2, 3, 8, dtype=dtype)
    )


def part(
    of: str, lora: LoraConfig | None = None, quant: QuantConfig | None = None, **changes: Any
) -> Callable[[Any, bool], Case]:
    """The attention, the MLP or the whole first block of a small model."""
    config = replace(GQA, hidden_size=8, intermediate_size=12, **changes)

    def make(dtype: Any, trainable: bool) -> Case:
        model = make_model(config, dtype=dtype, trainable=trainable)
        if quant is not None:
            model = quantize_model(model, quant)
        if lora is not None:
            model = fill_adapters(inject_lora(model, lora, np.random.default_rng(0)), dtype=dtype)
        block = model.blocks[0]
        layer = block if of == "block" else getattr(block, of)
        key = (KEY,) if lora is not None and lora.lora_dropout else ()
        return Case(
            layer, data(2, 3, 8, dtype=dtype), key if of == "mlp" else (model.rope(np.arange(3)), *key)
        )

    return make


INT4 = QuantConfig("int4", group_size=4)
LORA = LoraConfig(r=2, lora_alpha=3)
CASES: dict[str, Callable[[Any, bool], Case]] = {
    "linear": linear,
    "linear nf4": quantized(QuantConfig("nf4", block_size=32)),
    "linear int3": quantized(QuantConfig("int3", group_size=4)),
    "lora": adapted(),
    "lora rslora": adapted(use_rslora=True),
    "lora dropout": adapted(lora_dropout=0.4),
    "qlora nf4": adapted(QuantConfig("nf4", block_size=32)),
    "qlora nf2 dropout": adapted(QuantConfig("nf2", block_size=32, double_quant=False), lora_dropout=0.4),
    "qalora int4": adapted(INT4),
    "qalora int2 one group": adapted(QuantConfig("int2", group_size=8)),
    "qalora dropout": adapted(INT4, lora_dropout=0.4),
    "embedding": embedding,
    "norm": norm,
    "attention mha": part("attention", num_key_value_heads=4),
    "attention gqa": part("attention", num_key_value_heads=2),
    "attention mqa lora": part("attention", LORA, num_key_value_heads=1),
    "mlp swiglu": part("mlp"),
    "mlp gelu": part("mlp", hidden_act="gelu_pytorch_tanh"),
    "mlp lora dropout": part("mlp", replace(LORA, lora_dropout=0.4)),
    "block swiglu": part("block"),
    "block gelu": part("block", hidden_act="gelu_pytorch_tanh"),
    "block lora": part("block", LORA),
    "block qlora dropout": part("block", replace(LORA, lora_dropout=0.3), QuantConfig("nf4", block_size=32)),
    "block qalora": part("block", replace(LORA, use_qalora=True), INT4),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def run(
    case: Case, x: np.ndarray, dy: np.ndarray, grads: Gradients | None = None
) -> tuple[np.ndarray, Any, Gradients]:
    """Forward and backward: y, dx, grads."""
    grads = Gradients(case.parameters) if grads is None else grads
    y, cache = case.forward(x)
    return y, case.backward(dy, cache, grads), grads


def like(case: Case, seed: int = 11) -> np.ndarray:
    """A random dy."""
    y, _ = case.forward(case.x)
    return data(*y.shape, dtype=y.dtype, seed=seed)


@every_case
def test_gradcheck_of_input_and_every_trainable_parameter(make):
    case = make(np.float64, True)
    dy = like(case)
    _, dx, grads = run(case, case.x, dy)
    arrays, gradients = {p.name: p.data for p in grads}, {p.name: g for p, g in grads.items()}
    assert set(grads) == {p for p in case.parameters if p.trainable}
    if dx is not None:
        arrays["x"], gradients["x"] = case.x, dx
    assert arrays
    gradcheck(lambda: float((case.forward(case.x)[0] * dy).sum()), arrays, gradients)
    assert all(np.abs(g).max() > 1e-3 for g in gradients.values())  # none is trivially zero


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_case
def test_dtype_is_kept_in_output_cache_and_gradients(make, dtype):
    case = make(dtype, True)
    dy = like(case)
    y, dx, grads = run(case, case.x, dy)
    found = {"y": y, **{p.name: g for p, g in grads.items()}} | ({} if dx is None else {"dx": dx})
    assert {name: a.dtype for name, a in found.items()} == dict.fromkeys(found, np.dtype(dtype))
    kinds = {a.dtype for a in arrays_in(case.forward(case.x)[1])} - {
        np.dtype(np.int64),
        np.dtype(np.uint8),
    }  # ids, packed masks
    assert kinds <= {np.dtype(dtype)}


@every_case
def test_inputs_parameters_and_codes_are_not_mutated(make):
    case = make(np.float64, True)
    dy = like(case)
    before = digest(case.arrays)
    case.x.flags.writeable = dy.flags.writeable = False  # writing into them raises
    attributes = dict(vars(case.layer))
    run(case, case.x, dy)
    assert digest(case.arrays) == before
    assert dict(vars(case.layer)) == attributes  # the layer remembers nothing: the cache does


@every_case
def test_output_is_a_fresh_array(make):
    case = make(np.float64, True)
    y, cache = case.forward(case.x)
    dx = case.backward(like(case), cache, Gradients(case.parameters))
    for array in case.arrays:
        assert not np.shares_memory(y, array)
    if dx is not None:
        assert not np.shares_memory(y, case.x) and not np.shares_memory(dx, case.x)


@every_case
def test_used_twice_adds_up(make):
    """Two forwards, then two backwards in the other order, into one accumulator: as for shared weights and
    shards."""
    case = make(np.float64, True)
    x2 = case.x[::-1].copy()
    dy1, dy2 = like(case), like(case, 12)
    (_, dx1, g1), (_, dx2, g2) = run(case, case.x, dy1), run(case, x2, dy2)
    grads = Gradients(case.parameters)
    (_, c1), (_, c2) = case.forward(case.x), case.forward(x2)
    again2, again1 = case.backward(dy2, c2, grads), case.backward(dy1, c1, grads)
    if dx1 is not None:
        assert np.array_equal(again1, dx1) and np.array_equal(again2, dx2)
    for p, total in grads.items():
        assert_close(total, g1[p] + g2[p], close_rtol(np.float64, 2), p.name)


@every_case
def test_backward_is_linear_in_dy(make):
    """Scaling dy by a power of two scales everything exactly; a hidden constant or a forgotten factor would
    show."""
    case = make(np.float64, True)
    dy = like(case)
    (_, dx, g1), (_, dx4, g4) = run(case, case.x, dy), run(case, case.x, 4 * dy)
    if dx is not None:
        assert np.array_equal(dx4, 4 * dx)
    assert all(np.array_equal(g4[p], 4 * g1[p]) for p in g1)


@every_case
def test_frozen_means_no_gradient_same_dx_and_no_larger_cache(make):
    trained, frozen = make(np.float64, True), make(np.float64, False)
    dy = like(trained)
    y, dx, _ = run(trained, trained.x, dy)
    y_frozen, dx_frozen, grads = run(frozen, frozen.x, dy)
    assert np.array_equal(y, y_frozen)
    assert (dx is None) == (dx_frozen is None) and (dx is None or np.array_equal(dx, dx_frozen))
    assert all(".lora_" in p.name for p in grads)
    assert kept(frozen) <= kept(trained)


def kept(case: Case) -> int:
    return unique_bytes(arrays_in(case.forward(case.x)[1]))


@every_case
def test_two_threads_at_once_get_the_same_bytes(make):
    case = make(np.float32, True)
    dy = like(case)
    expected = run(case, case.x, dy)
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = run(case, case.x, dy)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y, dx, grads in results:
        assert np.array_equal(y, expected[0]) and (dx is None or np.array_equal(dx, expected[1]))
        assert all(np.array_equal(grads[p], expected[2][p]) for p in grads)


# --- what each layer keeps ----------------------------------------------------------------------------------


def test_a_frozen_linear_keeps_nothing_and_passes_dx_on():
    case = linear(np.float64, False)
    y, cache = case.forward(case.x)
    assert cache == ()
    grads = Gradients(case.parameters)
    assert len(grads) == 0
    assert_close(
        case.backward(np.ones_like(y), cache, grads),
        np.ones_like(y) @ case.layer.weight.dense(),
        close_rtol(np.float64, 6),
    )


@pytest.mark.parametrize("quant", [QuantConfig("nf4"), INT4], ids=["nf4", "int4"])
def test_a_quantized_linear_keeps_nothing_and_has_no_parameters(quant):
    case = quantized(quant)(np.float32, False)
    assert case.forward(case.x)[1] == () and case.parameters == []


def test_a_trainable_linear_keeps_its_very_input():
    case = linear(np.float64, True)
    (x,) = case.forward(case.x)[1]
    assert x is case.x


def test_an_adapter_keeps_its_input_itself_and_h():
    case = adapted()(np.float64, False)
    p, h, mask = case.forward(case.x)[1]
    assert p is case.x and h.shape == (2, 3, 3) and mask is None


def test_a_pooled_adapter_keeps_one_number_a_group():
    case = adapted(INT4)(np.float64, False)
    p, h, mask = case.forward(case.x)[1]
    assert p.shape == (2, 3, 8 // 4) and mask is None
    assert sorted(a.nbytes for a in arrays_in((p, h))) == [p.nbytes, h.nbytes]
    assert p.base is None or p.base.nbytes == p.nbytes  # no view that holds the whole input


def test_dropout_keeps_one_bit_an_element():
    case = adapted(lora_dropout=0.4)(np.float64, False)
    mask = case.forward(case.x)[1][2]
    assert mask.dtype == np.uint8 and mask.size == -(-case.x.size // 8)


def test_attention_projections_share_one_kept_input():
    """q, k and v keep the same array by identity, which the ledger counts once."""
    case = part("attention", LORA)(np.float64, False)
    cache = case.forward(case.x)[1]
    assert cache.q_proj.p is case.x and cache.k_proj.p is case.x and cache.v_proj.p is case.x


def test_a_frozen_norm_builds_no_gradient():
    case = norm(np.float64, False)
    _, _, grads = run(case, case.x, like(case))
    assert len(grads) == 0


def test_a_frozen_embedding_keeps_no_ids():
    assert embedding(np.float64, False).forward(np.array([[1, 2]]))[1] == ()


# --- smaller matters ----------------------------------------------------------------------------------------


def test_embedding_adds_repeated_ids():
    case = embedding(np.float64, True)
    dy = np.ones((2, 3, 5))
    grads = run(case, case.x, dy)[2]
    (gradient,) = grads.values()
    assert gradient[:, 0].tolist() == [2, 0, 0, 3, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 2, 3, 8)])
def test_a_linear_takes_any_leading_axes(shape):
    case = linear(np.float64, True)
    x = data(*shape)
    y, dx, grads = run(Case(case.layer, x), x, data(*shape[:-1], 6))
    assert_close(y, np.einsum("...i,oi->...o", x, case.layer.weight.dense()), close_rtol(np.float64, 8))
    assert y.shape == (*shape[:-1], 6) and dx.shape == shape
    assert_close(
        grads[case.parameters[0]],
        np.einsum("no,ni->oi", data(*shape[:-1], 6).reshape(-1, 6), x.reshape(-1, 8)),
        close_rtol(np.float64, 12),
    )


def test_gradients_hold_arrays_for_trainable_parameters_only():
    a, b = Parameter("a", np.ones(2), trainable=True), Parameter("b", np.ones(3))
    grads = Gradients([a, b])
    assert list(grads) == [a] and not grads[a].any()
    grads.add(a, np.array([1.0, 2.0]))
    grads.add(a, np.array([1.0, 2.0]))
    assert grads[a].tolist() == [2, 4]


def test_parameters_are_compared_by_identity():
    a, b = Parameter("same", np.ones(2), True), Parameter("same", np.ones(2), True)
    assert a != b and len(Gradients([a, b])) == 2


def test_freeze_shares_the_array_and_makes_it_read_only():
    p = Parameter("w", np.ones(2), trainable=True)
    frozen = p.freeze()
    assert frozen.data is p.data and not frozen.trainable
    with pytest.raises(ValueError, match="read-only"):
        frozen.data[0] = 3


def test_thaw_copies():
    p = Parameter("w", np.ones(2)).freeze()
    thawed = p.thaw()
    thawed.data[0] = 3
    assert thawed.trainable and p.data[0] == 1
    assert "trainable" in repr(thawed) and "frozen" in repr(p)


def test_mlp_equals_its_formula():
    case = part("mlp")(np.float64, True)
    g, u, d = (getattr(case.layer, name).weight.dense() for name in ("gate_proj", "up_proj", "down_proj"))
    gate = case.x @ g.T
    assert_close(
        case.forward(case.x)[0],
        (gate / (1 + np.exp(-gate)) * (case.x @ u.T)) @ d.T,
        close_rtol(np.float64, 8, 12),
    )


def test_block_is_residual():
    """With o_proj and down_proj zero a block is the identity, forward and backward."""
    case = part("block")(np.float64, False)
    case.layer.attention.o_proj.weight.param.data[...] = 0
    case.layer.mlp.down_proj.weight.param.data[...] = 0
    dy = like(case)
    y, dx, _ = run(case, case.x, dy)
    assert np.array_equal(y, case.x) and np.array_equal(dx, dy)


def test_attention_is_causal_through_the_block():
    case = part("block", num_key_value_heads=2)(np.float64, False)
    x2 = case.x.copy()
    x2[:, -1] += 1
    y, y2 = case.forward(case.x)[0], case.forward(x2)[0]
    assert np.array_equal(y[:, :-1], y2[:, :-1]) and not np.allclose(y[:, -1], y2[:, -1])


def test_silu_is_the_gate_and_not_the_up_projection():
    y = F.swiglu_forward(np.array([-5.0]), np.array([2.0]))[0]
    assert abs(y[0] - 2 * -5 / (1 + np.exp(5))) < 1e-15
