"""Figures from papers beside the planner's figures for the same setting, with the assumptions of each.

Only the papers' own numbers are written here. Ours all come from `plan`, and none is tuned to come nearer.
"""

from __future__ import annotations

import html
import textwrap
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from minilora.memory.counting import format_bytes
from minilora.memory.planner import plan
from minilora.tables import html_table, text_table

LORA, QLORA, QALORA = "LoRA, 2106.09685", "QLoRA, 2305.14314", "QA-LoRA, 2309.14717"
QUANTIZED_KINDS = ("codes", "absmax", "nested", "code maps")
"""The ledger's kinds that make up a 4-bit base."""
GPT3_PARAMETERS = 175_255_800_000
"""The LoRA paper's count, from its table of results with GPT-3."""


@dataclass(frozen=True)
class Row:
    """One figure of a paper, and ours.

    Attributes
    ----------
    what : str
        The quantity.
    paper : str
        The paper, and the place in it.
    published, ours : str
        Both figures, as printed.
    value : float
        Our figure.
    assumption : str
        What ours assumes.
    """

    what: str
    paper: str
    published: str
    ours: str
    value: float
    assumption: str


@dataclass(frozen=True, repr=False)
class Published:
    """Rows that print as one table, with their assumptions below it."""

    rows: tuple[Row, ...]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return (heads, rows); assumptions are referred to by number."""
        rows = [[str(i), row.what, row.paper, row.published, row.ours] for i, row in enumerate(self.rows, 1)]
        return ["", "figure", "whose", "published", "ours"], rows

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        below = []
        for i, row in enumerate(self.rows, 1):
            below.append(textwrap.fill(f"{i:>2}  {row.assumption}", 130, subsequent_indent="    "))
        return "\n".join([text_table(*self.table()), "", *below])

    __repr__ = __str__  # a prompt shows the table

    def _repr_html_(self) -> str:
        heads = ["figure", "whose (arXiv)", "published", "ours", "assumption"]
        rows = [[row.what, row.paper, row.published, row.ours, row.assumption] for row in self.rows]
        table = html_table("Published figures", heads, rows)
        return f"{table}<p>{html.escape('GB are 10⁹ bytes, GiB 2³⁰.')}</p>"


@cache
def published() -> Published:
    """Return the table; the first call takes a few seconds.

    Examples
    --------
    >>> published().rows[0].ours
    '159,907,840'
    """
    return Published((*_counts(), *_bits(), *_gpt3(), *_llama65(), *_llama7()))


def _counts() -> list[Row]:
    lora, qa = plan("llama-7b", method="lora", r=64), plan("llama-7b", method="qalora", r=64)
    same = "r = 64 on all linear layers of the blocks, no biases"
    return [
        Row(
            "LLaMA-7B, LoRA: trainable parameters",
            QALORA + ", table 2",
            "160 M",
            f"{lora.trainable:,}",
            lora.trainable,
            same,
        ),
        Row(
            "LLaMA-7B, QA-LoRA: trainable parameters",
            QALORA + ", table 2",
            "89 M",
            f"{qa.trainable:,}",
            qa.trainable,
            same + "; groups of 32: A has in/32 columns",
        ),
    ]


def _bits() -> list[Row]:
    double = plan("llama-65b", method="qlora", r=64)
    single = plan("llama-65b", method="qlora", r=64, double_quant=False)
    saved = single.held - double.held
    saved_bits = single.effective_bits - double.effective_bits
    return [
        Row(
            "NF4, double quantization: bits per weight",
            QLORA + ", section 3",
            "4 + 0.127",
            f"{double.effective_bits:.4f}",
            double.effective_bits,
            "LLaMA-65B's block projections, blocks of 64, one float32 per 256 blocks; ours also counts the "
            "mean of each matrix, but not the table of 16 values, which all share",
        ),
        Row(
            "what double quantization saves: bits per weight",
            QLORA + ", section 3",
            "0.373",
            f"{saved_bits:.4f}",
            saved_bits,
            "as above",
        ),
        Row(
            "what it saves at 65B",
            QLORA + ", section 1",
            "about 3 GB",
            _gb(saved),
            saved,
            "LLaMA-65B's block projections; embedding and head are not quantized",
        ),
    ]


def _gpt3() -> list[Row]:
    small: dict[str, Any] = {"target_modules": "q_proj,v_proj", "dtype": "float16"}
    full = plan("gpt3-175b", method="full", dtype="float16")
    r4 = plan("gpt3-175b", method="lora", r=4, **small)
    r1 = plan("gpt3-175b", method="lora", r=1, **small)
    kinds = full.by_kind()
    states = kinds["weights"] + kinds["optimizer"]
    all_of_it = states + kinds["gradients"]
    frozen = r4.held
    adapter = r4.by_kind()["adapters"]
    stand_in = (
        "GPT-3's matrices without biases and position table (0.02 %; the paper counts 0.39 % more, and does "
        "not say what)"
    )
    return [
        Row(
            "GPT-3 175B: trainable parameters",
            LORA + ", section 7.1",
            "18 M",
            f"{r4.trainable:,}",
            r4.trainable,
            "r = 4 on q and v; 2·r·12288 for each of 2·96 matrices",
        ),
        Row(
            "GPT-3 175B: all / trainable parameters, r = 4",
            LORA + ", abstract",
            "10,000",
            f"{full.parameters / r4.trainable:,.1f}",
            full.parameters / r4.trainable,
            f"{stand_in}; with the paper's own 175,255.8 M it is {GPT3_PARAMETERS / r4.trainable:,.1f}",
        ),
        Row(
            "the same at the paper's smallest, r = 1",
            LORA + ", abstract",
            "10,000",
            f"{full.parameters / r1.trainable:,.1f}",
            full.parameters / r1.trainable,
            f"{stand_in}; r = 1 on q and v, {r1.trainable:,} trainable; with 175,255.8 M it is "
            f"{GPT3_PARAMETERS / r1.trainable:,.1f}: the printed 10,000 is a round number for r = 4",
        ),
        Row(
            "GPT-3 175B, full fine-tuning with Adam",
            LORA + ", section 4.2",
            "1.2 TB",
            f"{_tb(states)} to {_tb(all_of_it)}",
            states,
            "float16 throughout, no activations: the lower number is weights and Adam's two means, the "
            "higher one adds the gradients; the paper does not say which, and its number lies between",
        ),
        Row(
            "GPT-3 175B, LoRA",
            LORA + ", section 4.2",
            "350 GB",
            _gb(frozen),
            frozen,
            "float16 weights, r = 4 on q and v with optimizer states; no activations",
        ),
        Row(
            "full / LoRA",
            LORA + ", abstract and section 4.2",
            "3 (by up to 2/3), 3.4",
            f"{states / frozen:.2f} to {all_of_it / frozen:.2f}",
            states / frozen,
            "the two rows above: three numbers per parameter give a third, four with gradients a quarter",
        ),
        Row(
            "GPT-3 175B: checkpoint of all weights",
            LORA + ", section 4.2",
            "350 GB",
            _gb(kinds["weights"]),
            kinds["weights"],
            "float16; " + stand_in,
        ),
        Row(
            "GPT-3 175B: checkpoint of the adapter",
            LORA + ", section 4.2",
            "35 MB",
            f"{adapter / 1e6:.1f} MB",
            adapter,
            f"float16, r = 4 on q and v; {adapter / 2**20:.1f} MiB",
        ),
    ]


def _llama65() -> list[Row]:
    half, single = (
        plan("llama-65b", method="full", dtype=dtype).by_kind() for dtype in ("float16", "float32")
    )
    mixed = half["weights"] + half["gradients"] + single["optimizer"]
    all_float32 = single["weights"] + single["gradients"] + single["optimizer"]
    rows = [
        Row(
            "LLaMA-65B, full fine-tuning",
            QLORA + ", abstract",
            "more than 780 GB",
            _gb(mixed),
            mixed,
            "weights and gradients in 16 bits, Adam's two means in float32: 12 bytes per parameter, no "
            f"activations; ours in float32 takes 16, {_gb(all_float32)}",
        )
    ]
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw"):
        ledger = plan(
            "llama-65b",
            method="qlora",
            r=64,
            gradient_checkpointing=True,
            logits_chunk=128,
            optimizer=optimizer,
        )
        need = ledger.peak
        paged = f"; {_gb(ledger.on_disk)} of states on disk" if ledger.on_disk else ""
        rows.append(
            Row(
                f"LLaMA-65B, QLoRA, {optimizer}: peak",
                QLORA + ", abstract",
                "less than 48 GB",
                _gb(need),
                need,
                "NF4 with double quantization, r = 64 on all linear layers, 1 × 512 tokens, blocks "
                f"checkpointed, logits by 128 rows, dense arrays in float32{paged}; a GPU of 48 GB has 2³⁰ "
                f"bytes in each: {_fits(need)}",
            )
        )
        if optimizer == "paged_adamw":
            kinds = ledger.by_kind()
            dense = need - sum(kinds.get(kind, 0) for kind in QUANTIZED_KINDS)
            rows.append(
                Row(
                    "the same, dense arrays in 16 bits",
                    QLORA + ", abstract",
                    "less than 48 GB",
                    _gb(need - dense / 2),
                    need - dense / 2,
                    "as above, with half the bytes for weights that are not quantized, adapters, "
                    f"gradients and activations, as bfloat16 on a GPU has them: {_fits(need - dense / 2)}",
                )
            )
    return rows


def _llama7() -> list[Row]:
    plain = plan("llama-7b", method="qlora", r=64)
    checkpointed = plan("llama-7b", method="qlora", r=64, gradient_checkpointing=True)
    inputs = sum(e.nbytes for e in plain.kept if "kept for dA" in e.what) // 2
    left = sum(e.nbytes for e in checkpointed.kept if e.layer.startswith("layers.")) // 2
    kinds = plain.by_kind()
    base = kinds["weights"] // 2 + sum(kinds[kind] for kind in QUANTIZED_KINDS)
    return [
        Row(
            "LLaMA-7B, LoRA's input gradients",
            QLORA + ", section 2",
            "567 MB",
            f"{inputs / 1e6:,.0f} MB",
            inputs,
            "1 × 512 tokens; ours: the distinct inputs that adapters on all linear layers keep for dA, at 2 "
            "bytes per number; the paper does not say which arrays it counts",
        ),
        Row(
            "the same with checkpointing, per sequence",
            QLORA + ", section 2",
            "18 MB",
            f"{left / 1e6:,.0f} MB",
            left,
            "all that ours keeps between the passes, at 2 bytes per number: each block's two inputs and q, "
            f"k, v, so no product with the quantized base is done twice; {left / 32 / 1e6:.0f} MB per block; "
            "the paper counts otherwise",
        ),
        Row(
            "LLaMA-7B, base in 4 bits",
            QLORA + ", section 2",
            "5,048 MB",
            f"{base / 1e6:,.0f} MB",
            base,
            "NF4 with double quantization; embedding, head and norms in 16 bits; nothing else is in our "
            "base, and the paper does not say what else is in its",
        ),
    ]


def _fits(n: float) -> str:
    """Compare a number of bytes with both readings of 48 GB."""
    binary = "below" if n < 48 * 2**30 else "above"
    decimal = "below" if n < 48e9 else "above"
    return f"{format_bytes(n)}, {binary} 48 GiB, {decimal} 48·10⁹"


def _gb(n: float) -> str:
    return f"{n / 1e9:,.1f} GB"


def _tb(n: float) -> str:
    return f"{n / 1e12:.2f} TB"
