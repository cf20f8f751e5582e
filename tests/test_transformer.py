"""The whole model: gradients, checkpointing, where backward stops, what is shared, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import (
    CONFIGS,
    GQA,
    adapters,
    assert_close,
    close_rtol,
    digest,
    fill_adapters,
    make_model,
    random_batch,
    weights,
)

from minilora.building import build_model, init_model, parameter_shapes
from minilora.config import LoraConfig, ModelConfig, QuantConfig
from minilora.injection import full, inject_lora, subset
from minilora.layers import Block
from minilora.memory import arrays_in, unique_bytes
from minilora.parameters import Gradients, Parameter
from minilora.quant.model import quantize_model
from minilora.training.gradcheck import gradcheck
from minilora.training.loss import shard_loss

SMALL = replace(
    GQA, vocab_size=11, hidden_size=8, intermediate_size=6
)  # few enough elements to check each one
IDS = np.array([[1, 2, 3, 4], [5, 4, 3, 9]])


def gradients_of(model, batch, checkpoint=False, key=None):
    grads = Gradients(model.trainable())
    loss = shard_loss(model, batch, float(batch.mask.sum()), grads, key, checkpoint)
    return loss, grads


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, num_key_value_heads=4, tie_word_embeddings=True),
        replace(SMALL, num_key_value_heads=1, hidden_act="gelu_pytorch_tanh"),
        replace(SMALL, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    ],
    ids=["gqa untied", "mha tied", "mqa gelu untied", "gqa gelu tied"],
)
def test_gradcheck_of_the_whole_model(config):
    model = make_model(config)
    batch = random_batch(config, B=2, T=5)
    _, grads = gradients_of(model, batch)
    assert len(grads) == len(parameter_shapes(config))
    checks = gradcheck(
        lambda: shard_loss(model, batch, float(batch.mask.sum())),
        {p.name: p.data for p in grads},
        {p.name: g for p, g in grads.items()},
    )
    assert all(np.abs(g).max() > 1e-4 for g in grads.values())
    assert {c.name for c in checks} == set(parameter_shapes(config))


METHODS = {
    "full": lambda m: full(m),
    "last block": lambda m: subset(m, ("layers.1",)),
    "norms": lambda m: subset(m, ("input_layernorm", "norm")),
    "final norm": lambda m: subset(m, ("model.norm",)),
    "embedding": lambda m: subset(m, ("embed_tokens",)),
    "head": lambda m: subset(m, ("lm_head",)),
    "lora all": lambda m: inject_lora(m, LoraConfig(r=2, lora_alpha=3), np.random.default_rng(0)),
    "lora head": lambda m: inject_lora(
        m, LoraConfig(r=2, lora_alpha=3, target_modules=("lm_head",)), np.random.default_rng(0)
    ),
    "lora last block": lambda m: inject_lora(
        m, LoraConfig(r=2, target_modules=("layers.1.mlp.up_proj",)), np.random.default_rng(0)
    ),
    "qlora": lambda m: inject_lora(
        quantize_model(m, QuantConfig("nf4")), LoraConfig(r=2, lora_alpha=3), np.random.default_rng(0)
    ),
    "qalora": lambda m: inject_lora(
        quantize_model(m, QuantConfig("int4", group_size=2)),
        LoraConfig(r=2, lora_alpha=3, use_qalora=True),
        np.random.default_rng(0),
    ),
}


@pytest.mark.parametrize(
    "method", ["last block", "norms", "final norm", "embedding", "head", "lora all", "lora head", "qalora"]
)
def test_gradcheck_of_what_trains(method):
    model = METHODS[method](make_model(SMALL, trainable=False))
    if "lora" in method:
        fill_adapters(model, dtype=np.float64)
    batch = random_batch(SMALL, B=2, T=4)
    _, grads = gradients_of(model, batch)
    assert list(grads) == model.trainable() and grads
    gradcheck(
        lambda: shard_loss(model, batch, float(batch.mask.sum())),
        {p.name: p.data for p in grads},
        {p.name: g for p, g in grads.items()},
    )


@pytest.mark.parametrize("method", ["last block", "norms", "embedding", "head"])
def test_what_trains_alone_gets_the_same_gradient_as_in_full_training(method):
    model = make_model(SMALL, trainable=False)
    batch = random_batch(SMALL)
    everything = {p.name: g for p, g in gradients_of(full(model), batch)[1].items()}
    for p, g in gradients_of(METHODS[method](model), batch)[1].items():
        assert np.array_equal(g, everything[p.name]), p.name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_checkpointing_gives_the_same_bytes(method, dtype):
    model = METHODS[method](make_model(GQA, dtype=dtype, trainable=False))
    if "lora" in method:
        fill_adapters(model)
    batch = random_batch(GQA)
    (loss, grads), (loss2, grads2) = gradients_of(model, batch), gradients_of(model, batch, checkpoint=True)
    assert loss == loss2 and digest(grads.values()) == digest(grads2.values())


def test_checkpointing_draws_the_same_dropout_again():
    model = fill_adapters(
        inject_lora(
            make_model(GQA, trainable=False), LoraConfig(r=2, lora_dropout=0.5), np.random.default_rng(0)
        )
    )
    batch = random_batch(GQA)
    (loss, grads), (loss2, grads2) = (
        gradients_of(model, batch, checkpoint, (1, 2, 3)) for checkpoint in (False, True)
    )
    assert loss == loss2 and digest(grads.values()) == digest(grads2.values())
    assert gradients_of(model, batch, key=(1, 3, 3))[0] != loss  # another step, other elements
    assert gradients_of(model, batch, key=(1, 2, 4))[0] != loss  # another shard
    assert gradients_of(model, batch, key=None)[0] != loss


def test_checkpointing_keeps_the_halves_inputs_and_q_k_v():
    model = make_model(GQA)
    _, plain = model.forward(IDS)
    _, checkpointed = model.forward(IDS, checkpoint=True)
    assert unique_bytes(arrays_in(checkpointed)) < unique_bytes(arrays_in(plain)) / 2
    for cache in checkpointed.blocks:
        x, mixed, q, k, v = cache
        assert (
            x.shape == mixed.shape == (2, 4, 16)
            and q.shape == (2, 4, 4, 4)
            and k.shape == v.shape == (2, 4, 2, 4)
        )
        assert unique_bytes(arrays_in(cache)) == 8 * 2 * 4 * (
            16 + 16 + 16 + 8 + 8
        )  # nothing larger behind a view


def test_a_forward_pass_without_backward_keeps_no_block():
    model = make_model(GQA)
    hidden, cache = model.forward(IDS, with_cache=False)
    assert cache.blocks == [None, None] and np.array_equal(hidden, model.forward(IDS)[0])


# --- where backward stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, lowest, backwards",
    [
        ("full", -1, [1, 0]),
        ("embedding", -1, [1, 0]),
        ("last block", 1, [1]),
        ("norms", 0, [1, 0]),
        ("final norm", 2, []),
        ("head", 2, []),
        ("lora all", 0, [1, 0]),
        ("lora head", 2, []),
        ("lora last block", 1, [1]),
    ],
)
def test_backward_stops_below_the_lowest_that_trains(method, lowest, backwards, monkeypatch):
    model = METHODS[method](make_model(GQA, trainable=False))
    visited = []
    original = Block.backward

    def spy(block, dy, cache, grads, need_dx):
        visited.append(model.blocks.index(block))
        assert need_dx == (model.blocks.index(block) != lowest)
        return original(block, dy, cache, grads, need_dx)

    monkeypatch.setattr(Block, "backward", spy)
    assert model.lowest_trainable() == lowest
    gradients_of(model, random_batch(GQA))
    assert visited == backwards


def test_blocks_below_the_lowest_that_trains_keep_nothing():
    model = METHODS["last block"](make_model(GQA, trainable=False))
    cache = model.forward(IDS)[1]
    assert cache.embedding == () and cache.blocks[0] is None and cache.blocks[1] is not None


def test_backward_frees_each_blocks_cache_on_the_way():
    model = make_model(GQA)
    hidden, cache = model.forward(IDS)
    model.backward(np.ones_like(hidden), cache, Gradients(model.trainable()))
    assert cache.blocks == []


# --- what the model computes --------------------------------------------------------------------------------


def test_future_tokens_do_not_change_the_past(config):
    model = make_model(config)
    changed = IDS % 5
    changed[:, 2:] += 1
    before, after = model.logits(IDS % 5), model.logits(changed)
    assert np.array_equal(before[:, :2], after[:, :2]) and not np.allclose(before[:, 2:], after[:, 2:])


def test_sequences_of_a_batch_do_not_mix(config):
    model = make_model(config)
    both = model.logits(IDS % 5)
    for b in range(2):
        assert_close(
            both[b : b + 1],
            model.logits(IDS[b : b + 1] % 5),
            close_rtol(np.float64, *[config.hidden_size] * 8),
        )


def test_positions_matter():
    """Attention alone cannot tell orders apart in a bag of tokens; the rotations must."""
    model = make_model(GQA)
    a, b = model.logits(np.array([[1, 2, 3, 7]])), model.logits(np.array([[2, 1, 3, 7]]))
    assert np.abs(a[0, -1] - b[0, -1]).max() > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_the_model_is_the_dtype_of_everything(config, dtype):
    model = make_model(config, dtype=dtype)
    hidden, cache = model.forward(IDS % 5)
    assert hidden.dtype == model.logits(IDS % 5).dtype == dtype
    assert {a.dtype for a in arrays_in(cache)} <= {np.dtype(dtype), np.dtype(np.int64)}
    assert {g.dtype for g in gradients_of(model, random_batch(config, T=4))[1].values()} == {np.dtype(dtype)}


def test_float32_agrees_with_float64(config):
    double, single = (
        make_model(config),
        build_model(config, {k: v.astype(np.float32) for k, v in weights(config).items()}),
    )
    # about 9 sums a block, of the width or the sequence, and errors pass through the residual stream
    rtol = close_rtol(np.float32, *[config.intermediate_size] * 9 * config.num_hidden_layers)
    assert_close(single.logits(IDS % 5), double.logits(IDS % 5), rtol)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_any_integer_ids_will_do(dtype):
    model = make_model(GQA)
    assert np.array_equal(model.logits(IDS.astype(dtype)), model.logits(IDS))


@pytest.mark.parametrize(
    "ids, message",
    [
        (np.array([[0.0, 1.0]]), "integer array"),
        (np.array([1, 2, 3]), r"integer array \(batch, time\), not int64 \(3,\)"),
        (np.zeros((1, 25), int), "25 tokens exceed context_length=24"),
        (np.array([[3, -1]]), r"-1…3 outside the vocabulary 0…18"),
        (np.array([[0, 19]]), r"0…19 outside the vocabulary 0…18"),
        (np.array([[True, False]]), "integer array"),
    ],
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=f"^ids: .*{message}"):
        make_model(GQA).logits(ids)


def test_the_whole_context_fits():
    assert make_model(GQA).logits(np.zeros((1, 24), int)).shape == (1, 24, 19)


# --- how it is built ----------------------------------------------------------------------------------------


def count(config: ModelConfig) -> int:
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


def test_parameter_count_of_llama_7b_is_the_published_one():
    """6,738,415,616: LLaMA-7B as released (arXiv 2302.13971, table 2), from shapes alone."""
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        context_length=2048,
        tie_word_embeddings=False,
    )
    assert count(config) == 6_738_415_616


def test_parameter_count_by_formula(config):
    C, F_, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    kv = C * config.num_key_value_heads // config.num_attention_heads
    matrices = 3 if config.hidden_act == "silu" else 2
    expected = (
        V * C * (1 if config.tie_word_embeddings else 2)
        + L * (2 * C * C + 2 * C * kv + matrices * C * F_ + 2 * C)
        + C
    )
    assert count(config) == expected == sum(p.data.size for p in make_model(config).parameters())


def test_parameters_come_once_and_under_their_own_names(config):
    model = make_model(config)
    names = [p.name for p in model.parameters()]
    assert len(names) == len(set(names)) and set(names) == set(parameter_shapes(config))
    assert model.tied is config.tie_word_embeddings


def test_a_tied_head_reads_and_trains_the_embedding():
    model = make_model(replace(GQA, tie_word_embeddings=True))
    assert model.head.weight is model.embedding.weight
    grads = gradients_of(model, random_batch(GQA))[1]
    (table,) = [p for p in grads if p.data.shape == (19, 16)]
    # the head's gradient reaches every row of the vocabulary, the embedding's only rows that occur
    assert (np.abs(grads[table]).max(axis=1) > 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("model.norm.weight"), "missing .*model.norm.weight.*unknown none"),
        (lambda a: a.update(extra=np.zeros(1)), "missing none, unknown .*extra"),
        (
            lambda a: a.update({"lm_head.weight": np.zeros((16, 19))}),
            r"lm_head.weight: shape \(16, 19\), but .* \(19, 16\)",
        ),
        (lambda a: a.pop("model.layers.1.mlp.gate_proj.weight"), "gate_proj"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    arrays = weights(GQA)
    change(arrays)
    with pytest.raises(ValueError, match=message):
        build_model(GQA, arrays)


def test_arrays_are_used_not_copied():
    arrays = weights(GQA)
    model = build_model(GQA, arrays)
    assert all(p.data is arrays[p.name] for p in model.parameters())


def test_fresh_models_have_the_documented_spread():
    config = ModelConfig()
    model = init_model(config, np.random.default_rng(0))
    for p in model.parameters():
        if p.data.ndim == 1:
            assert (p.data == 1).all()
            continue
        expected = 0.02 / (8**0.5 if p.name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        # the standard deviation of n normal numbers is known to 1/√(2n); five of these
        assert abs(p.data.std() / expected - 1) < 5 / (2 * p.data.size) ** 0.5, p.name
        assert p.data.dtype == np.float32 and p.trainable


def test_the_same_seed_gives_the_same_model():
    a, b, c = (init_model(GQA, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (
        digest(p.data for p in a.parameters())
        == digest(p.data for p in b.parameters())
        != digest(p.data for p in c.parameters())
    )


def test_an_untrained_model_is_near_uniform():
    config = ModelConfig(num_hidden_layers=1)
    model = init_model(config, np.random.default_rng(0))
    batch = random_batch(config, B=4, T=32)
    assert abs(shard_loss(model, batch, float(batch.mask.sum())) - np.log(259)) < 0.1


def test_map_linears_changes_a_copy_and_shares_the_rest():
    model = make_model(GQA)
    seen = []
    new = model.map_linears(lambda linear: seen.append(linear.name) or linear)
    assert seen == [name for name, _ in model.linears()] and len(seen) == 2 * 7 + 1
    assert new.blocks[0] is not model.blocks[0] and new.embedding is model.embedding
    other = model.map_linears(lambda linear: "changed")
    assert other.blocks[0].attention.q_proj == "changed" and model.blocks[0].attention.q_proj != "changed"
    assert other.head == "changed" and model.head != "changed"


@pytest.mark.parametrize("tied", [True, False])
def test_map_parameters_changes_each_once_and_keeps_the_tie(tied):
    model = make_model(replace(GQA, tie_word_embeddings=tied))
    seen = []
    new = model.map_parameters(lambda p: seen.append(p) or Parameter(p.name, p.data))
    assert len(seen) == len(set(seen)) == len(model.parameters()) == len(new.parameters())
    assert new.tied is tied and not new.trainable() and len(model.trainable()) == len(seen)
    assert np.array_equal(new.logits(IDS), model.logits(IDS))


def test_linears_are_named_as_in_transformers():
    names = [name for name, _ in make_model(CONFIGS["gelu tied"]).linears()]
    assert names[:6] == [
        f"model.layers.0.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert names[-1] == "lm_head"


def test_repr_says_what_is_inside():
    model = inject_lora(
        make_model(GQA), LoraConfig(r=2, target_modules=("q_proj",)), np.random.default_rng(0)
    )
    assert "LoraLinear, " in repr(model) or "Linear, LoraLinear" in repr(model)
    assert "trainable arrays: 4" in repr(model) and len(adapters(model)) == 2
