"""Invented rows of a whole study, for the tests of figures, tables and reports; nothing is trained."""

import math

import numpy as np

from minilora.sweep.results import clean_row

RANKS = (1, 2, 4, 8, 16, 32, 64)
BITS = (2, 3, 4, 8)
PARAMS = 1_000_000


def study_rows(tasks=("products", "python"), seeds=(0, 1, 2), stage="study"):
    """Rows as `minilora sweep --preset full` writes them, the learning-rate search included."""
    rows = []
    for task in tasks:
        settings = [("full", None, 32, None), ("subset", None, 32, None)]
        settings += [("lora", r, 32, None) for r in RANKS]
        settings += [("qlora", r, 4, "nf4") for r in RANKS] + [
            ("qlora", 8, b, f"nf{b}") for b in BITS if b != 4
        ]
        settings += [("qalora", r, 4, "int4") for r in RANKS] + [
            ("qalora", 8, b, f"int{b}") for b in BITS if b != 4
        ]
        rows += [one_row(task, *setting, seed, stage) for setting in settings for seed in seeds]
        rows.append(one_row(task, "base", None, 32, None, 0, stage))
        rows += [
            one_row(task, "quantized_base", None, b, f"{kind}{b}", 0, stage)
            for b in BITS
            for kind in ("nf", "int")
        ]
        rows += search_rows(task)
    return rows


def search_rows(task, methods=("full", "subset", "lora", "qlora", "qalora")):
    rows = []
    for method in methods:
        for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
            best = 1e-3 if method == "full" else 3e-2 if method == "subset" else 1e-2
            loss = 0.3 + 0.3 * math.log10(rate / best) ** 2
            row = one_row(task, method, 8 if method.endswith("lora") else None, 32, None, 100, "search")
            search = {
                "key": f"search {task} {method} {rate}",
                "split": "validation",
                "learning_rate": rate,
                "loss": loss,
            }
            rows.append(row | search)
    return rows


def one_row(task, method, r, bits, quant_type, seed, stage="study"):
    """One row with plausible numbers: a better loss with more rank and more bits, and noise between seeds."""
    rng = np.random.default_rng([sum(map(ord, task + method)), r or 0, bits, seed])
    noise = rng.normal(0, 0.006)
    trains = method not in ("base", "quantized_base")
    loss = {"full": 0.30, "subset": 0.45, "base": 2.6, "quantized_base": 2.6}.get(
        method, 0.31 + 0.10 / math.sqrt(r or 1)
    )
    loss += (
        0.25 / 2 ** (2 * (bits - 2)) * (0.6 if method == "qalora" else 1.0) * (bits != 32) + noise * trains
    )
    lost = {"qlora": 0.6 / 2 ** (2 * (bits - 2))}.get(method, 0.0)
    adapter = 18_000 * (r or 0) if method in ("lora", "qlora", "qalora") else 0
    trainable = PARAMS if method == "full" else PARAMS // 4 if method == "subset" else adapter
    effective = 32 if bits == 32 else bits + (0.13 if quant_type[:2] == "nf" else 1.0)
    row = {
        "key": f"{task} {method} {r} {quant_type} {seed}",
        "preset": "full",
        "stage": stage,
        "method": method,
        "r": r,
        "bits": bits,
        "quant_type": quant_type,
        "group_size": 32 if method == "qalora" else None,
        "lora_alpha": 16 if r else None,
        "learning_rate": 1e-2 if trains else None,
        "task": task,
        "seed": seed,
        "steps": 200,
        "batch_size": 16,
        "split": "test",
        "status": "success",
        "loss": loss,
        "train_loss": loss - 0.03,
        "trainable_params": trainable,
        "all_params": PARAMS + adapter,
        "effective_bits": effective,
        "bytes_weights": PARAMS * bits // 8,
        "bytes_scales_offsets": 0 if bits == 32 else PARAMS // 60,
        "bytes_code_maps": 2048 if quant_type and quant_type[:2] == "nf" else 0,
        "bytes_adapters": 4 * adapter,
        "bytes_gradients": 4 * trainable,
        "bytes_optimizer": 8 * trainable,
        "bytes_activations": (9 if method == "full" else 5) * 2**20 if trains else 0,
        "bytes_peak": 16 * 2**20,
        "seconds": 20.0 + noise,
        "step_seconds": 0.08,
        "corpus_sha256": f"{task}-corpus",
        "base_sha256": "base",
        "python_version": "3.11.7",
        "numpy_version": "2.1.0",
        "numba_version": "0.60.0",
        "minilora_version": "0.1.0",
        "machine": "x86_64, 2 cores",
    }
    if task == "products":
        row |= {
            "recall": max(0.02, 1.25 - loss),
            "exact": max(0.0, 1.1 - loss),
            "recall_values": max(0.01, 1.0 - loss),
        }
    else:
        row |= {"bpb": loss / math.log(2)}
    if method in ("lora", "qlora", "qalora"):
        row |= {"deployed_loss": loss + lost, "deployed_effective_bits": effective}
        for name, slope in (("recall", -1.0), ("bpb", 1 / math.log(2))):
            if name in row:
                row[f"deployed_{name}"] = max(0.0, row[name] + slope * lost)
    return clean_row(row)
