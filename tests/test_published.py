"""Published figures beside ours: counts by hand from the papers' shapes, and what each assumption gives."""

from __future__ import annotations

import json

import pytest

from minilora.memory import plan, published

# hidden, intermediate, layers, key-value width, vocabulary, tied: written out once more, as the models' own
# pages have them
LLAMA = {
    "llama-7b": (4096, 11008, 32, 4096, 32000, False, 6_738_415_616),
    "llama-13b": (5120, 13824, 40, 5120, 32000, False, 13_015_864_320),
    "llama-33b": (6656, 17920, 60, 6656, 32000, False, 32_528_943_616),
    "llama-65b": (8192, 22016, 80, 8192, 32000, False, 65_285_660_672),
    "llama-3-8b": (4096, 14336, 32, 1024, 128256, False, 8_030_261_248),
    "llama-3-70b": (8192, 28672, 80, 1024, 128256, False, 70_553_706_496),
    "tinyllama-1.1b": (2048, 5632, 22, 256, 32000, False, 1_100_048_384),
    "smollm2-135m": (576, 1536, 30, 192, 49152, True, 134_515_008),
    "smollm2-360m": (960, 2560, 32, 320, 49152, True, 361_821_120),
    "smollm2-1.7b": (2048, 8192, 24, 2048, 49152, True, 1_711_376_384),
}
PROJECTIONS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # LLaMA-7B's
NF4 = 4 + 8 / 64 + 32 / (64 * 256)  # bits: code, 8-bit scale of 64, float32 of 256 of those


@pytest.mark.parametrize("name", LLAMA)
def test_architectures_have_the_published_number_of_parameters(name):
    C, F, L, K, V, tied, count = LLAMA[name]
    assert (
        L * (2 * C * C + 2 * C * K + 3 * C * F + 2 * C) + C + V * C * (2 - tied) == count
    )  # the list itself
    ledger = plan(name, method="full", context=8)
    assert ledger.parameters == ledger.trainable == count
    assert ledger.by_kind()["weights"] == 4 * count  # a head that is the embedding is there once


@pytest.mark.parametrize(
    ("name", "lora", "qalora"),
    [("llama-7b", 160, 89), ("llama-13b", 250, 140), ("llama-33b", 488, 272), ("llama-65b", 800, 447)],
)
def test_trainable_parameters_of_all_linear_layers_at_r_64(name, lora, qalora):
    """Millions of QA-LoRA's table 2; and, to the unit, each A (r, in or in/32) and B (out, r)."""
    C, F, L, *_ = LLAMA[name]
    for method, group, millions in (("lora", 1, lora), ("qalora", 32, qalora)):
        found = plan(name, method=method, r=64, context=8).trainable
        assert found == 64 * L * (4 * (C // group + C) + 2 * (C // group + F) + F // group + C)
        assert round(found / 1e6) == pytest.approx(millions, abs=0.5)


@pytest.fixture(scope="module")
def rows():
    return {row.what: row for row in published().rows}


def of(rows, part):
    (found,) = [row for what, row in rows.items() if part in what]
    return found


def test_counts_of_parameters(rows):
    assert of(rows, "LLaMA-7B, LoRA: trainable").ours == "159,907,840"
    assert of(rows, "LLaMA-7B, QA-LoRA: trainable").ours == "89,309,184"
    assert of(rows, "GPT-3 175B: trainable").value == 18_874_368 == 96 * 2 * 4 * (12288 + 12288)


def test_double_quantization(rows):
    blocks = PROJECTIONS // 64
    assert of(rows, "NF4, double quantization").value == pytest.approx(NF4, abs=1e-5)  # and one mean each
    assert plan("llama-7b", method="qlora", context=8).effective_bits == pytest.approx(
        (PROJECTIONS / 2 + blocks + 4 * blocks / 256 + 4 * 7 * 32) * 8 / PROJECTIONS, rel=1e-12
    )
    assert of(rows, "saves: bits per weight").value == pytest.approx(0.373, abs=5e-4)
    assert of(rows, "saves at 65B").value == pytest.approx(3e9, rel=0.02)


def test_gpt3_as_lora_has_it(rows):
    C, L, V = 12288, 96, 50257
    count = L * (12 * C * C + 2 * C) + C + V * C
    assert of(rows, "all / trainable").value == count / 18_874_368
    assert of(rows, "smallest, r = 1").value == 4 * count / 18_874_368
    assert (
        count == pytest.approx(175_255.8e6, rel=0.005) and "9,285.4" in of(rows, "all / trainable").assumption
    )
    full = of(rows, "full fine-tuning with Adam")
    assert (
        full.value == 3 * 2 * count < 1.2e12 < 4 * 2 * count
    )  # the printed number lies between the two assumptions
    assert full.ours == f"{6 * count / 1e12:.2f} TB to {8 * count / 1e12:.2f} TB"
    assert of(rows, "GPT-3 175B, LoRA").value == 2 * count + 6 * 18_874_368 == pytest.approx(350e9, rel=0.005)
    ratio = of(rows, "full / LoRA")
    assert ratio.value == pytest.approx(3, rel=1e-3) and ratio.ours == "3.00 to 4.00"
    assert of(rows, "checkpoint of the adapter").value == 2 * 18_874_368
    assert of(rows, "checkpoint of all weights").value == 2 * count


def test_llama_65b_as_qlora_has_it(rows):
    count = LLAMA["llama-65b"][-1]
    full = of(rows, "LLaMA-65B, full")
    assert full.value == 12 * count > 780e9 and f"{16 * count / 1e9:,.1f} GB" in full.assumption
    adamw, bits8, paged = (of(rows, f"QLoRA, {o}: peak") for o in ("adamw", "adamw_8bit", "paged_adamw"))
    trainable = plan("llama-65b", method="qlora", r=64, context=8).trainable
    maps = 4 * 256  # of the unsigned codes; the signed ones are the nested scales' too
    assert adamw.value - paged.value == 8 * trainable
    assert bits8.value - paged.value == pytest.approx(2 * trainable * (1 + 4 / 256) + maps, abs=2000)
    for row in (adamw, bits8, paged):  # what is said of 48 is so
        assert ("below 48 GiB" in row.assumption) == (row.value < 48 * 2**30)
        assert ("below 48·10⁹" in row.assumption) == (row.value < 48e9)
    assert paged.value < bits8.value < 48 * 2**30 < adamw.value
    half = of(rows, "dense arrays in 16 bits")
    codes = 80 * (4 * 8192**2 + 3 * 8192 * 22016) * NF4 / 8
    assert half.value == pytest.approx(codes + (paged.value - codes) / 2, rel=1e-5) and half.value < 48e9


def test_llama_7b_as_qlora_has_it(rows):
    T, C, F, L = 512, 4096, 11008, 32
    assert of(rows, "input gradients").value == 2 * T * L * (3 * C + F)  # q = k = v, o, gate = up; down
    assert of(rows, "with checkpointing").value == 2 * T * L * 5 * C
    dense = 2 * 32000 * C + (2 * L + 1) * C
    assert of(rows, "base in 4 bits").value == pytest.approx(PROJECTIONS * NF4 / 8 + 2 * dense, rel=1e-5)


def test_the_table_in_each_form():
    found = published()
    again = json.loads(json.dumps(found.to_dict()))
    assert len(again["rows"]) == len(found.rows) and again["rows"][0]["ours"] == "159,907,840"
    text, page = str(found), found._repr_html_()
    for row in found.rows:
        assert row.what in text and row.published in text and row.assumption
        assert row.ours in page
    assert max(map(len, text.splitlines())) <= 150
