"""Make the files of golden/quant: what bitsandbytes stores and decodes for a few matrices in 4 bits, also
doubly quantized.

    python tests/golden/make_quant_golden.py  # needs torch and bitsandbytes; the test neither

Rows are whole blocks, so that every code path of bitsandbytes agrees on them. Each file holds one matrix
``w`` and, for each type and block size, arrays named nf4.64.packed (bytes), .absmax, .dense (decoded; of a
large matrix two rows), and of double quantization .codes, .absmax2, .offset, .nested_dense. Numbers are
float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from minilora.quant import codebooks

FOLDER = Path(__file__).parent / "quant"
TYPES = ("nf4", "fp4")


def checkpoint_like(rows: int, columns: int, seed: int) -> np.ndarray:
    """Weights as in a bfloat16 checkpoint: N(0, 0.02²) times a factor a row, the 16 low bits of float32
    zero."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, columns)) * 0.02 * np.exp(rng.standard_normal((rows, 1)))).astype(
        np.float32
    )
    return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def edge_blocks(block_size: int, quant_type: str) -> np.ndarray:
    """One block of extremes a row, all finite: zeros of both signs, denormals, absmax around 1e-38 and near
    float32's largest, and ties with the thresholds (and their neighbours) under several scales.
    """
    f = np.float32
    normal = np.random.default_rng(1).standard_normal(block_size).astype(f)
    normal /= np.abs(normal).max()
    midpoints, _ = codebooks.thresholds(codebooks.code_map(quant_type))
    at = np.concatenate(
        [midpoints, np.nextafter(midpoints, f(2)), np.nextafter(midpoints, f(-2)), [0, -0.0, 1]]
    )
    ties = np.resize(at, (2, max(block_size, 64)))[:, :block_size].astype(f)
    ties[1] = np.resize(at[::-1], block_size)
    ties[:, 0] = 1  # absmax
    limits, tiny = np.finfo(f), f(1e-38)
    scales = [
        tiny,
        np.nextafter(tiny, f(0)),
        np.nextafter(tiny, f(1)),
        limits.tiny,
        1e-44,
        limits.max,
        f(1e38),
    ]
    blocks = [
        np.zeros(block_size),
        np.full(block_size, -0.0),
        np.where(normal > 0, 0.0, -0.0),
        np.sign(normal) * limits.max,
    ]
    blocks += [normal * f(scale) for scale in scales]
    blocks += [tie * f(scale) for tie in ties for scale in (1, -1, 2.0**-60, 2.0**100, 3, 1e-39)]
    blocks += [
        np.where(np.arange(block_size) == 5, extreme, normal * f(1e-30)) for extreme in (-1, 1, limits.max)
    ]
    return np.array(blocks, f)


def matrices() -> dict[str, tuple[np.ndarray, tuple[int, ...], bool]]:
    """File name -> (matrix, block sizes, whether to quantize its scales too)."""
    normal = np.random.default_rng(2).standard_normal((1, 4096)).astype(np.float32)
    normal[0, 64:128] = 0
    return {
        "checkpoint": (
            checkpoint_like(9, 1024, 0),
            (32, 64),
            True,
        ),  # 288 and 144 scales: more than a nested block, and less
        "normal": (normal, (128, 4096), True),
        # their mean overflows in float32: no double quantization
        "edges_nf4": (edge_blocks(64, "nf4"), (64,), False),
        "edges_fp4": (edge_blocks(64, "fp4"), (64,), False),
    }


def few_rows(w: np.ndarray) -> np.ndarray:
    """The whole of a small matrix, the first and the last row of a large one."""
    return w if w.size <= 4096 else w[[0, -1]]


def stored(w: np.ndarray, quant_type: str, block_size: int, double_quant: bool) -> dict[str, np.ndarray]:
    """bitsandbytes' arrays of one matrix."""
    import torch
    from bitsandbytes import functional

    if w.shape[1] % block_size:
        raise ValueError(f"w.shape={w.shape}: rows must be whole blocks of {block_size}")
    found = {}
    for nested in (False, True) if double_quant else (False,):
        packed, state = functional.quantize_4bit(
            torch.from_numpy(w.copy()),
            blocksize=block_size,
            quant_type=quant_type,
            compress_statistics=nested,
        )
        found["packed"] = packed.numpy().reshape(-1)
        found["nested_dense" if nested else "dense"] = few_rows(
            functional.dequantize_4bit(packed, state).numpy()
        )
        if nested:
            found |= {
                "codes": state.absmax.numpy(),
                "absmax2": state.state2.absmax.numpy(),
                "offset": state.offset.numpy(),
            }
        else:
            found["absmax"] = state.absmax.numpy()
    return {f"{quant_type}.{block_size}.{name}": array for name, array in found.items()}


def main() -> None:
    """Write one file a matrix."""
    import bitsandbytes
    import torch

    torch.set_num_threads(1)
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    total = 0
    for name, (w, block_sizes, double_quant) in matrices().items():
        arrays = {"w": w}
        for quant_type in [name[-3:]] if name[-3:] in TYPES else TYPES:
            for block_size in block_sizes:
                arrays |= stored(w, quant_type, block_size, double_quant)
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, about=np.array(json.dumps(versions)), **arrays)
        total += path.stat().st_size
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {len(arrays)} arrays")
    print(f"{total / 1000:.0f} kB in all")


if __name__ == "__main__":
    main()
