"""Parameter counts of the built-in architectures against transformers', built without data on torch's meta
device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import peer

from minilora.building import parameter_shapes
from minilora.config import ModelConfig
from minilora.memory import ARCHITECTURES, plan

pytestmark = pytest.mark.peers
LLAMAS = [name for name in ARCHITECTURES if name != "gpt3-175b"]


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is named once


def llama(c: ModelConfig):
    torch, transformers = peer("torch"), peer("transformers")
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.context_length,
        tie_word_embeddings=c.tie_word_embeddings,
        hidden_act=c.hidden_act,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_has_the_parameters_of_transformers_model(name):
    shape = ARCHITECTURES[name]
    model = llama(shape)
    assert shapes_of(model) == parameter_shapes(shape)
    assert plan(name, method="lora", r=1, context=4, target_modules="q_proj").parameters == (
        sum(p.numel() for p in model.parameters()) + shape.num_hidden_layers * 2 * shape.hidden_size
    )  # A and B of r = 1


def test_gpt_3_differs_by_biases_positions_and_two_vectors_a_norm():
    torch, transformers = peer("torch"), peer("transformers")
    shape = replace(
        ARCHITECTURES["gpt3-175b"], num_hidden_layers=2
    )  # blocks are alike: two tell what ninety-six are
    C, F, L, V, T = shape.hidden_size, shape.intermediate_size, 2, shape.vocab_size, shape.context_length
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=V, n_positions=T, n_embd=C, n_inner=F, n_layer=L, n_head=shape.num_attention_heads
            )
        )
    theirs = sum(p.numel() for p in model.parameters())
    ours = sum(a * (b[0] if b else 1) for a, *b in parameter_shapes(shape).values())
    biases = L * (3 * C + C + F + C)  # q, k, v · o · up · down
    norms = (2 * L + 1) * C  # the shift beside the scale
    assert theirs == ours + biases + norms + T * C


def test_gpt_3_has_what_its_paper_says():
    """arXiv 2005.14165, table 2.1, rounds 174.6 billion up to "175.0B"; what is left out is under 0.03 %."""
    shape = ARCHITECTURES["gpt3-175b"]
    C, L, V, T = shape.hidden_size, shape.num_hidden_layers, shape.vocab_size, shape.context_length
    ours = plan("gpt3-175b", method="lora", r=1, target_modules="q_proj", context=4).parameters - L * 2 * C
    assert ours == 12 * L * C * C + (2 * L + 1) * C + V * C
    whole = ours + L * 9 * C + (2 * L + 1) * C + T * C
    assert round(whole / 1e9, 1) == 174.6
    assert (whole - ours) / whole < 3e-4
