"""Against bitsandbytes on the CPU: packed bytes, scales, decoded values equal bit by bit; its deviations from
itself, counted.

Its definition is the PyTorch code of ``bitsandbytes/backends/default/ops.py``. On a CPU that code quantizes
to 4 bits; kernels in C++ decode 4 bits, and quantize and decode 8 bits (the block scales of double
quantization). Four things are not as defined; each is described by a test that passes whether or not the
installed version does it:

1. 8-bit codes come from a table of 65536 bins, so near a threshold, and near zero, the code is not the
  nearest one's;
2. with AVX-512 the 4-bit decoder is said to read wrong scales where rows are not whole blocks;
3. a short last block is divided by absmax, whole blocks and CUDA's blocks are multiplied by 1/absmax;
4. FP4's code 8 is +0 in its table and -0 from its kernels.

Counts go to ``record_property`` (``--junitxml``) and to the output (``-s``).
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_quant_golden import edge_blocks, stored

from minilora.quant import CodebookWeight, DoubleQuant, codebooks
from minilora.quant.dynamic import dynamic_encode

pytestmark = pytest.mark.peers
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
EPS = float(np.finfo(np.float32).eps)
BIN = 2 / 65535  # the width of a bin of the 8-bit table
both_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
every_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@pytest.fixture(scope="module")
def bnb(torch):
    """bitsandbytes.functional."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def record(record_property, request):
    """Keep a count: in the report, and on the screen with -s."""

    def keep(name, value):
        record_property(name, value)
        print(f"\n{request.node.name}: {name} = {value}", end="")

    return keep


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_bits(ours, theirs):
    """Equal as bit patterns: also the sign of a zero."""
    ours, theirs = (
        np.ascontiguousarray(np.asarray(a, np.float32)).reshape(-1).view(np.uint32) for a in (ours, theirs)
    )
    assert ours.shape == theirs.shape
    different = np.flatnonzero(ours != theirs)
    assert different.size == 0, (
        f"{different.size} of {ours.size} differ, first at {different[0]}: "
        f"{ours[different[:1]].view(np.float32)} and {theirs[different[:1]].view(np.float32)}"
    )


def assert_same_decoded(ours, theirs, quant_type):
    """The same bits, but for the sign of FP4's zeros, which the peer's kernels take from the code and its
    table does not."""
    assert_same_bits(
        *(np.add(a, np.float32(0) if quant_type == "fp4" else np.float32(-0.0)) for a in (ours, theirs))
    )


def theirs_4bit(torch, bnb, w, quant_type, block_size, double_quant=False):
    """(packed bytes (n,), QuantState)."""
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(np.array(w)),
        blocksize=block_size,
        quant_type=quant_type,
        compress_statistics=double_quant,
    )
    return packed.numpy().reshape(-1), state


def decoded_by_definition(torch, packed, scales, quant_type, block_size, shape):
    """backends/default/ops.py, without torch.compile, which takes 20 seconds to do the same."""
    from bitsandbytes.backends.default import ops
    from bitsandbytes.functional import get_4bit_type

    function = getattr(ops._dequantize_4bit_compute, "__wrapped__", ops._dequantize_4bit_compute)
    code = get_4bit_type(quant_type, device="cpu")
    scales = torch.from_numpy(np.array(scales))
    return function(
        torch.from_numpy(packed), scales, code, block_size, torch.Size(shape), torch.float32
    ).numpy()


def ours_of(packed, state, quant_type, block_size, shape):
    """Our weight, built from the peer's arrays."""
    scales = state.absmax.numpy()
    if state.nested:
        scales = DoubleQuant(scales, state.state2.absmax.numpy(), state.offset.numpy())
    return CodebookWeight(packed, scales, shape, quant_type, block_size)


# ---- code maps


@both_types
def test_code_maps_are_equal(bnb, quant_type):
    assert_same_bits(codebooks.code_map(quant_type), bnb.get_4bit_type(quant_type, device="cpu").numpy())


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_equal(bnb, signed):
    assert_same_bits(codebooks.dynamic_map(signed), bnb.create_dynamic_map(signed=signed).numpy())


def test_derived_nf4_is_create_normal_map(bnb):
    theirs = np.unique(bnb.create_normal_map().numpy())  # 256 numbers, of which 241 are 0
    assert_same_bits(codebooks.normal_float(4, codebooks.LOFTQ_OFFSET, np.float32), theirs)
    assert np.abs(codebooks.normal_float(4) - theirs).max() < 3e-7


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_derived_normal_float_is_loftqs(torch, bits):
    """LoftQ's recipe for any width: the lines of create_normal_map with 2^(k-1) instead of 8, in torch and
    scipy."""
    from scipy.stats import norm

    half, offset = 2 ** (bits - 1), codebooks.LOFTQ_OFFSET
    positive = norm.ppf(torch.linspace(offset, 0.5, half + 1)[:-1].double()).tolist()
    negative = (-norm.ppf(torch.linspace(offset, 0.5, half)[:-1].double())).tolist()
    values = torch.tensor([*positive, 0.0, *negative], dtype=torch.float32).sort().values
    assert_same_bits(codebooks.normal_float(bits, offset, np.float32), (values / values.max()).numpy())


def test_create_fp8_map_is_not_the_fp4_table_but_has_another_bias(bnb, record):
    """The comment in get_4bit_type has create_fp8_map regenerate the table: its smallest value is 1/48, the
    table's 1/192."""
    theirs = np.unique(
        bnb.create_fp8_map(signed=True, exponent_bits=2, precision_bits=1, total_bits=4).numpy()
    )
    table, bias2 = (
        codebooks.code_map("fp4"),
        np.array([codebooks.fp4_value(c, bias=2) for c in range(16)], np.float32),
    )
    assert np.array_equal(np.unique(bias2 / bias2.max()), theirs)
    record("values of create_fp8_map that are not in the FP4 table", int((~np.isin(theirs, table)).sum()))


# ---- quantizing: whole blocks


@both_types
@every_block_size
@pytest.mark.parametrize("shape", [(16, 4096), (64, 128), (33, 96), (128, 3)])
def test_packed_bytes_and_absmax_are_equal(torch, bnb, quant_type, block_size, shape):
    """Whole blocks, and the whole blocks before a short one."""
    w = matrix(*shape)
    w.reshape(-1)[:block_size] = 0  # a block of zeros
    w[-1, ::7] = 0
    w[-1, ::5] *= np.float32(1e-4)  # near zero FP4's two zeros meet
    packed, state = theirs_4bit(torch, bnb, w, quant_type, block_size)
    whole = w.size // block_size
    for double_quant in (False, True):
        q = CodebookWeight.quantize(w, quant_type, block_size, double_quant)
        assert np.array_equal(q.codes[: whole * block_size // 2], packed[: whole * block_size // 2])
        if not double_quant:
            assert_same_bits(q.scales[:whole], state.absmax.numpy()[:whole])
        if whole * block_size == w.size:
            assert np.array_equal(q.codes, packed)
    nested, _ = theirs_4bit(torch, bnb, w, quant_type, block_size, double_quant=True)
    assert np.array_equal(nested, packed)


@both_types
@every_block_size
def test_extremes(torch, bnb, quant_type, block_size, record):
    """Zeros of both signs, denormals, absmax around 1e-38, numbers near float32's largest, ties on a
    threshold and beside one."""
    w = edge_blocks(block_size, quant_type)
    assert np.isfinite(w).all()
    packed, state = theirs_4bit(torch, bnb, w, quant_type, block_size)
    q = CodebookWeight.quantize(w, quant_type, block_size, double_quant=False)
    assert np.array_equal(q.codes, packed)
    assert_same_bits(q.scales, state.absmax.numpy())
    definition = decoded_by_definition(torch, packed, q.scales, quant_type, block_size, w.shape)
    assert_same_bits(q.dense(), definition)
    kernel = bnb.dequantize_4bit(torch.from_numpy(packed)[:, None], state).numpy()  # rows are whole blocks
    assert_same_decoded(kernel, definition, quant_type)
    signs = int((np.signbit(kernel) != np.signbit(definition)).sum())
    record("zeros that the peer's kernel decodes as -0 and its definition as +0", signs)


@both_types
def test_every_float16(torch, bnb, quant_type):
    """All 63488 finite float16 numbers, in blocks of neighbours and clipped to a common absmax of 1, 3 or
    7."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    w = np.resize(every[np.isfinite(every)].astype(np.float32), (992, 64))
    for absmax in (None, 1, 3, 7):
        x = w if absmax is None else np.clip(w, -absmax, absmax)
        if absmax is not None:
            x[:, 0] = absmax
        packed, state = theirs_4bit(torch, bnb, x, quant_type, 64)
        q = CodebookWeight.quantize(x, quant_type, 64, double_quant=False)
        assert np.array_equal(q.codes, packed)
        assert_same_bits(q.scales, state.absmax.numpy())


# ---- quantizing: a short last block


def tail_codes(tail, quant_type, divide):
    """Codes of one block by hand: the rank of x/absmax, where / is a division or a product with 1/absmax."""
    midpoints, order = codebooks.thresholds(codebooks.code_map(quant_type))
    absmax = max(np.abs(tail).max(), np.float32(1e-38))
    x = tail / absmax if divide else tail * (np.float32(1) / absmax)
    return order[(x[:, None] > midpoints).sum(axis=1)], absmax


def codes_of(packed, count):
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]


@both_types
@every_block_size
@pytest.mark.parametrize("shape", [(5, 13), (7, 33), (3, 1001), (1, 1), (63, 65), (2, 4097)])
def test_short_last_block_and_odd_size(torch, bnb, quant_type, shape, block_size):
    """Their CPU code divides a short block by absmax; we, and their CUDA kernel, multiply by 1/absmax as in
    whole blocks.

    The half byte after an odd end is code 0 here and the code of the number 0 there; nobody reads it.
    """
    w = matrix(*shape, seed=sum(shape))
    packed, state = theirs_4bit(torch, bnb, w, quant_type, block_size)
    q = CodebookWeight.quantize(w, quant_type, block_size, double_quant=False)
    assert_same_bits(q.scales, state.absmax.numpy())
    whole = w.size // block_size * block_size
    ours, theirs = codes_of(q.codes, w.size), codes_of(packed, w.size)
    assert np.array_equal(ours[:whole], theirs[:whole])
    if whole < w.size:
        tail = w.reshape(-1)[whole:]
        assert np.array_equal(ours[whole:], tail_codes(tail, quant_type, divide=False)[0])
        assert np.array_equal(theirs[whole:], tail_codes(tail, quant_type, divide=True)[0])
    definition = decoded_by_definition(torch, packed, q.scales, quant_type, block_size, shape)
    assert_same_bits(ours_of(packed, state, quant_type, block_size, shape).dense(), definition)


@both_types
def test_dividing_and_multiplying_differ_next_to_a_threshold_only(torch, bnb, quant_type, record):
    """Short blocks of numbers within an ulp of a threshold: how often the peer's two rules disagree with each
    other."""
    midpoints, _ = codebooks.thresholds(codebooks.code_map(quant_type))
    rng = np.random.default_rng(2)
    differ = total = 0
    for absmax in rng.uniform(0.01, 10, 200).astype(np.float32):
        tail = np.concatenate([[absmax], midpoints * absmax])[np.newaxis]
        packed, _ = theirs_4bit(torch, bnb, tail, quant_type, 64)
        ours = CodebookWeight.quantize(tail, quant_type, 64, double_quant=False).unpacked().reshape(-1)
        theirs = codes_of(packed, tail.size)
        assert np.array_equal(ours, tail_codes(tail[0], quant_type, divide=False)[0])
        assert np.array_equal(theirs, tail_codes(tail[0], quant_type, divide=True)[0])
        differ, total = differ + int((ours != theirs).sum()), total + tail.size
    record("codes that differ beside thresholds in a short block", f"{differ} of {total}")


@both_types
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40])
def test_short_block_below_the_smallest_absmax(torch, bnb, quant_type, scale):
    """Their absmax of a short block is at least 1e-38, of a whole block not; ours is max|w| always."""
    w = np.concatenate([matrix(64), matrix(36) * np.float32(scale)])[np.newaxis]
    packed, state = theirs_4bit(torch, bnb, w, quant_type, 64)
    q = CodebookWeight.quantize(w, quant_type, 64, double_quant=False)
    assert np.array_equal(q.codes, packed)
    assert_same_bits(q.scales[0], state.absmax.numpy()[0])
    assert q.scales[1] == np.abs(w[0, 64:]).max() and state.absmax.numpy()[1] in (
        np.float32(1e-38),
        q.scales[1],
    )


# ---- double quantization


def nearest(x, values):
    """Code of the value nearest to each x, by trying all values in float64 (the differences are exact); the
    lower on a tie with their float32 midpoint, which may be half an ulp beside the middle.
    """
    parts = np.array_split(x.astype(np.float64), 1 + x.size // 2048)
    codes = np.concatenate([np.abs(part[:, None] - values).argmin(axis=1) for part in parts])
    return codes - ((codes > 0) & (x == (values[codes - 1] + values[codes]) / np.float32(2)))


def normalised(scales, offset):
    """((scales - offset)·(1/absmax2), absmax2) of each nested block of 256."""
    centred = (scales - offset).astype(np.float32)
    absmax2 = np.array([np.abs(centred[i : i + 256]).max() for i in range(0, centred.size, 256)], np.float32)
    inverse = np.float32(1) / np.maximum(absmax2, np.float32(1e-38))
    return np.clip(centred * np.repeat(inverse, 256)[: centred.size], -1, 1), absmax2


def mean_bound(count, mean):
    """How far torch's float32 mean of positive numbers may be from ours, the exact mean rounded once.

    torch adds in a cascade of 4 levels, each of 2^max(4, log2(n)/4) numbers, in up to 32 lanes: no number
    takes part in more than ``depth`` additions, each of which errs by eps/2 of its result. Then a division
    and our rounding.
    """
    depth = min(count, 4 * max(16, 2 ** int(np.ceil(np.log2(max(count, 2)) / 4))) + 32)
    return (depth + 2) * EPS / 2 * mean


@both_types
@every_block_size
@pytest.mark.parametrize("shape", [(64, 4096), (40, 1300)])
def test_double_quantization_is_the_definition(torch, bnb, quant_type, block_size, shape, record):
    w = matrix(*shape, seed=3) * np.linspace(0.5, 2, shape[0], dtype=np.float32)[:, None]
    absmax = CodebookWeight.quantize(w, quant_type, block_size, double_quant=False).scales
    ours = CodebookWeight.quantize(w, quant_type, block_size, double_quant=True).scales
    packed, state = theirs_4bit(torch, bnb, w, quant_type, block_size, double_quant=True)
    offset, codes, absmax2 = state.offset.numpy(), state.absmax.numpy(), state.state2.absmax.numpy()

    # ours: exactly the definition, around the exact mean
    assert ours.offset[0] == np.float32(np.mean(absmax.astype(np.float64)))
    x, expected_absmax2 = normalised(absmax, ours.offset)
    assert_same_bits(ours.absmax, expected_absmax2)
    assert np.array_equal(ours.codes, nearest(x, codebooks.dynamic_map()))

    # theirs: the mean within float32 summation; the same definition around that mean
    difference = abs(float(ours.offset[0]) - float(offset))
    assert difference <= mean_bound(absmax.size, float(offset))
    x, expected_absmax2 = normalised(absmax, offset)
    assert_same_bits(absmax2, expected_absmax2)
    expected = nearest(x, codebooks.dynamic_map())
    wrong = codes != expected
    # except that the code is the one of the bin's middle, at most half a bin (and the rounding of its number)
    # away
    midpoints, _ = codebooks.thresholds(codebooks.dynamic_map())
    assert wrong.mean() < 0.01 or wrong.sum() <= 2
    assert (np.abs(x[wrong, None] - midpoints).min(axis=1) <= BIN / 2 + 2 * EPS).all()
    # and our kernel around their mean
    ranks, again = np.empty(absmax.size, np.uint8), np.empty_like(absmax2)
    dynamic_encode((absmax - offset).astype(np.float32), ranks, again)
    assert np.array_equal(ranks, expected) and np.array_equal(again, absmax2)

    # decoding their state
    q = ours_of(packed, state, quant_type, block_size, shape)
    scales = bnb.dequantize_blockwise(state.absmax, state.state2).numpy() + offset
    assert_same_bits(q.scales.decode(0, absmax.size), scales)
    assert_same_bits(q.dense(), decoded_by_definition(torch, packed, scales, quant_type, block_size, shape))
    record("peer's nested codes that are not the nearest", f"{wrong.sum()} of {wrong.size}")
    record("difference of the offsets, in eps of the mean", difference / float(offset) / EPS)


def test_their_8_bit_table_misses_the_values_near_zero(torch, bnb, record):
    """Each value of the dynamic map is its own nearest value; through bins of width 3e-5 the smallest, even
    0, are not all found.

    Below 1e-4 the values are at most 2.25e-5 apart: closer than the bins. The error that this adds is half a
    bin.
    """
    values = codebooks.dynamic_map()
    block = values.copy()
    block[0] = -1  # else absmax is 1 anyway
    codes, _ = bnb.quantize_blockwise(torch.from_numpy(block[np.newaxis]), blocksize=256)
    ranks, absmax = np.empty(256, np.uint8), np.empty(1, np.float32)
    dynamic_encode(block, ranks, absmax)
    assert np.array_equal(ranks, np.arange(256))
    wrong = codes.numpy().reshape(-1) != ranks
    assert (np.abs(values[wrong]) < 1e-4).all()
    assert (np.abs(values[codes.numpy().reshape(-1)] - values) <= BIN / 2 + 2.25e-5 / 2).all()
    record(
        "values of the dynamic map that the peer's 8-bit table does not map to themselves", int(wrong.sum())
    )


def test_equal_scales(torch, bnb):
    """All scales equal: nothing is left around the mean, absmax2 is 0, and whatever the code, each scale is
    the mean."""
    w = np.ones((8, 64), np.float32)
    packed, state = theirs_4bit(torch, bnb, w, "nf4", 64, double_quant=True)
    q = CodebookWeight.quantize(w, "nf4", 64)
    assert not q.scales.absmax.any() and not state.state2.absmax.numpy().any()
    assert np.array_equal(q.scales.codes, np.full(8, 127))  # the number 0; theirs is code 0, without looking
    assert_same_bits(q.dense(), w)
    assert_same_bits(ours_of(packed, state, "nf4", 64, w.shape).dense(), w)


def test_scales_whose_sum_overflows(torch, bnb, record):
    """Our mean is computed in float64 and stays finite; a float32 sum is inf."""
    w = np.full((4, 64), 3e38, np.float32) * np.array([[1], [0.5], [-1], [0.25]], np.float32)
    assert np.isfinite(CodebookWeight.quantize(w, "nf4", 64).dense()).all()
    _, state = theirs_4bit(torch, bnb, w, "nf4", 64, double_quant=True)
    record("peer's offset for four scales up to 3e38", float(state.offset))


# ---- decoding


@both_types
@every_block_size
@pytest.mark.parametrize("double_quant", [False, True])
def test_decoding_the_same_state_is_bit_equal(torch, bnb, quant_type, block_size, double_quant):
    """Rows are whole blocks: the definition, the C++ kernel (with or without AVX-512) and ours."""
    w = matrix(64, 4096, seed=2)
    w[0] = 0
    packed, state = theirs_4bit(torch, bnb, w, quant_type, block_size, double_quant)
    ours = ours_of(packed, state, quant_type, block_size, w.shape)
    assert_same_decoded(
        ours.dense(), bnb.dequantize_4bit(torch.from_numpy(packed)[:, None], state).numpy(), quant_type
    )
    scales = ours.scales.decode(0, w.size // block_size) if double_quant else ours.scales
    assert_same_bits(
        ours.dense(), decoded_by_definition(torch, packed, scales, quant_type, block_size, w.shape)
    )
    ids = np.array([63, 0, 7, 7])
    assert_same_bits(ours.rows(ids), ours.dense()[ids])


def row_scales(shape, block_size):
    """For each weight the block whose scale the AVX-512 decoder is said to take: row·⌊n/b⌋ + ⌊column/b⌋."""
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
    return rows * (shape[1] // block_size) + columns // block_size


@both_types
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((48, 96), 64),
        ((64, 32), 64),
        ((5, 16), 64),
        ((7, 80), 32),
        ((3, 1008), 512),
        ((9, 48), 1024),
        ((16, 64), 128),
    ]
    + [((8, 128), 64)],
)
def test_rows_that_are_not_whole_blocks(torch, bnb, quant_type, shape, block_size, record):
    """Ours is the definition always. Their C++ decoder is the definition, or the suspected fault exactly;
    which, is recorded.

    The AVX-512 branch runs when a row is a multiple of 16 long; it counts ⌊n/b⌋ scales a row, so a row
    shorter than a block takes the scales of the first ones, and scales drift where a row ends within a block.
    The last shape is not affected. The branch is in the library of 0.50.2, by its machine code; a processor
    without AVX-512 does not run it and decodes by the definition.
    """
    from bitsandbytes.cextension import lib

    w = matrix(*shape, seed=4) * np.linspace(0.1, 5, shape[0], dtype=np.float32)[:, None]
    packed, state = theirs_4bit(torch, bnb, w, quant_type, block_size)
    absmax = state.absmax.numpy()
    ours = CodebookWeight.quantize(w, quant_type, block_size, double_quant=False).dense()
    definition = decoded_by_definition(torch, packed, absmax, quant_type, block_size, shape)
    if w.size % block_size == 0:
        assert_same_bits(ours, definition)
    assert_same_bits(ours_of(packed, state, quant_type, block_size, shape).dense(), definition)

    kernel = bnb.dequantize_4bit(torch.from_numpy(packed)[:, None], state).numpy()
    levels = codebooks.code_map(quant_type)[codes_of(packed, w.size)].reshape(shape)
    fault = levels * absmax[row_scales(shape, block_size)]
    assert np.array_equal(kernel, definition) or np.array_equal(kernel, fault), "a third thing"
    wrong = int((kernel != definition).sum())
    assert shape[1] % block_size != 0 or wrong == 0
    record("AVX-512", bool(getattr(lib, "has_avx512f_cpu", lambda: 0)()))
    record("weights that the peer's kernel decodes otherwise than its definition", f"{wrong} of {w.size}")
    record("weights that the suspected fault would change", int((fault != definition).sum()))


# ---- the golden files


@pytest.mark.parametrize("name", ["checkpoint", "normal", "edges_nf4", "edges_fp4"])
def test_this_version_stores_what_the_golden_files_hold(bnb, name):
    """Packed bytes, absmax and decoded values; nested codes may depend on the processor, next to a
    threshold."""
    with np.load(Path(__file__).parents[1] / "golden" / "quant" / f"{name}.npz") as file:
        for quant_type, block_size in [key.split(".")[:2] for key in file if key.endswith(".packed")]:
            for key, array in stored(file["w"], quant_type, int(block_size), double_quant=False).items():
                assert np.array_equal(file[key], array), key


# ---- products


@both_types
def test_products_agree_with_matmul_4bit(torch, bnb, quant_type):
    import bitsandbytes

    w, x = matrix(96, 256, seed=4), matrix(5, 256, seed=5)
    packed, state = theirs_4bit(torch, bnb, w, quant_type, 64)
    expected = bitsandbytes.matmul_4bit(
        torch.from_numpy(x), torch.from_numpy(packed)[:, None], quant_state=state
    ).numpy()
    q = CodebookWeight.quantize(w, quant_type, 64, double_quant=False)
    bound = 2 * 257 * EPS * (np.abs(x) @ np.abs(q.dense()).T)
    assert (np.abs(q.matmul(x) - expected) <= bound).all()
