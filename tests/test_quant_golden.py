"""What bitsandbytes stores and decodes, from files made by tests/golden/make_quant_golden.py: ours is the
same, without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minilora.quant import CodebookWeight, DoubleQuant, codebooks

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "golden" / "quant").glob("*.npz"))}
EPS = float(np.finfo(np.float32).eps)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FILES[name], allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def cases() -> list[tuple[str, str, int]]:
    """(file, type, block size) of every case."""
    found = []
    for name, path in FILES.items():
        with np.load(path, allow_pickle=False) as file:
            parts = [key.split(".") for key in file.files if key.endswith(".packed")]
        found += [(name, quant_type, int(block_size)) for quant_type, block_size, _ in parts]
    return found


CASES = cases()
every_case = pytest.mark.parametrize(("name", "quant_type", "block_size"), CASES)


class Golden:
    """The arrays of one case."""

    def __init__(self, name: str, quant_type: str, block_size: int):
        arrays = load(name)
        self.w, self.nested = arrays["w"], f"{quant_type}.{block_size}.codes" in arrays
        for key in ("packed", "absmax", "dense", "codes", "absmax2", "offset", "nested_dense"):
            setattr(self, key, arrays.get(f"{quant_type}.{block_size}.{key}"))


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    different = ours.reshape(-1).view(np.uint32) != theirs.reshape(-1).view(np.uint32)
    assert not different.any(), f"{different.sum()} of {different.size} differ"


def assert_decoded(ours: np.ndarray, theirs: np.ndarray, quant_type: str) -> None:
    """The same bits in the rows that the file holds; bitsandbytes' kernels decode FP4's code 8 as -0, its
    table says +0."""
    ours = ours if len(ours) == len(theirs) else ours[[0, -1]]
    assert_same_bits(ours, theirs + np.float32(0) if quant_type == "fp4" else theirs)


def test_files_say_who_made_them_and_are_small():
    assert set(FILES) == {"checkpoint", "normal", "edges_nf4", "edges_fp4"} and len(CASES) == 10
    assert sum(path.stat().st_size for path in FILES.values()) < 150_000
    for name in FILES:
        assert set(json.loads(str(load(name)["about"]))) == {"bitsandbytes", "torch"}


@every_case
def test_packed_bytes_scales_and_decoded_values(name, quant_type, block_size):
    golden = Golden(name, quant_type, block_size)
    q = CodebookWeight.quantize(golden.w, quant_type, block_size, double_quant=False)
    assert np.array_equal(q.codes, golden.packed)
    assert_same_bits(q.scales, golden.absmax)
    assert_decoded(q.dense(), golden.dense, quant_type)


@every_case
def test_double_quantization(name, quant_type, block_size):
    """Decoding their state is bit-equal. Ours has the same bytes but for what a float32 mean and their table
    of bins leave."""
    golden = Golden(name, quant_type, block_size)
    if not golden.nested:
        assert name.startswith("edges")
        return
    theirs = CodebookWeight(
        golden.packed,
        DoubleQuant(golden.codes, golden.absmax2, golden.offset),
        golden.w.shape,
        quant_type,
        block_size,
    )
    assert_decoded(theirs.dense(), golden.nested_dense, quant_type)

    q = CodebookWeight.quantize(golden.w, quant_type, block_size, double_quant=True)
    assert np.array_equal(q.codes, golden.packed)
    # torch adds float32 numbers in any order it likes: each of the n - 1 additions errs by eps/2 at most,
    # then one division
    difference = abs(float(q.scales.offset[0]) - float(golden.offset))
    assert difference <= (golden.absmax.size + 1) * EPS / 2 * float(golden.offset)
    largest = golden.absmax2.max()
    assert np.abs(q.scales.absmax - golden.absmax2).max() <= difference + EPS * largest
    if largest == 0:  # a single scale is its own mean: any code decodes to 0 beside it
        return
    # a code differs only if the scale lies within half a bin of 2/65535, and the difference of the means, of
    # a threshold
    scales, codes = golden.absmax, golden.codes
    x = (scales - golden.offset) / np.repeat(golden.absmax2, 256)[: scales.size]
    differs = q.scales.codes != codes
    midpoints, _ = codebooks.thresholds(codebooks.dynamic_map())
    reach = 1 / 65535 + 2 * difference / golden.absmax2.min() + 4 * EPS
    assert (
        np.abs(x[differs, None] - midpoints).min(axis=1) <= reach
    ).all() and differs.sum() <= 1 + codes.size // 100
