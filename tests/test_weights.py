"""Quantized weights: products, storage, exactness, refusals."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.config import QuantConfig
from minilora.quant import AffineWeight, CodebookWeight, DoubleQuant, codebooks, packed, quantize_weight

EPS = np.finfo(np.float32).eps
HALF_EPS = float(np.finfo(np.float16).eps)
CODEBOOKS = ("nf2", "nf3", "nf4", "nf8", "fp4")
AFFINE = ("int2", "int3", "int4", "int8")


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def config(quant_type, double_quant=True, block_size=32, group_size=8):
    return QuantConfig(quant_type, block_size, double_quant, group_size)


ALL = [pytest.param(config(t, dq), id=f"{t}{'-dq' * dq}") for t in CODEBOOKS for dq in (False, True)]
ALL += [pytest.param(config(t), id=t) for t in AFFINE]


@pytest.fixture(params=ALL)
def quantized(request):
    """A weight whose rows (24 wide) neither fill nor divide the codebook blocks of 32: 19·24 leaves a short
    last block."""
    return quantize_weight(matrix(19, 24), request.param)


def assert_product(actual, a, b):
    """actual = a b up to float32 rounding of a sum of k products, in any order."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = (a.shape[-1] + 1) * EPS * (np.abs(a).astype(np.float64) @ np.abs(b))
    assert actual.shape == exact.shape and (np.abs(actual - exact) <= bound).all()


# ---- the interface


def test_products_equal_those_of_the_dense_matrix(quantized):
    w = quantized.dense()
    for lead in ((), (1,), (5,), (2, 3), (1, 1), (0,)):
        x, dy = matrix(*lead, 24, seed=1), matrix(*lead, 19, seed=2)
        assert_product(quantized.matmul(x), x, w.T)
        assert_product(quantized.matmul_t(dy), dy, w)
        assert quantized.matmul(x).dtype == quantized.matmul_t(dy).dtype == np.float32


def test_products_against_the_loop_oracle(quantized):
    x, dy, w = matrix(2, 24, seed=3), matrix(2, 19, seed=4), quantized.dense()
    np.testing.assert_allclose(
        quantized.matmul(x), naive.matmul(x, w.T), rtol=0, atol=25 * EPS * np.abs(w).max() * 24
    )
    np.testing.assert_allclose(
        quantized.matmul_t(dy), naive.matmul(dy, w), rtol=0, atol=20 * EPS * np.abs(w).max() * 19
    )


def test_products_in_many_tiles(quantized, monkeypatch):
    x, dy, w = matrix(3, 24, seed=5), matrix(3, 19, seed=6), quantized.dense()
    monkeypatch.setattr(packed, "TILE", 8)  # 8 rows a tile; the last tile has 3
    assert len(quantized._tiles(packed.TILE)) == 3
    assert_product(quantized.matmul(x), x, w.T)
    assert_product(quantized.matmul(x[:1]), x[:1], w.T)
    assert_product(quantized.matmul_t(dy), dy, w)


def test_float64_input_gives_float64_products(quantized):
    x, w = matrix(4, 24, seed=7).astype(np.float64), quantized.dense().astype(np.float64)
    for rows in (x, x[:1]):
        y = quantized.matmul(rows)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, rows @ w.T, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(quantized.matmul_t(y), y @ w, rtol=1e-12, atol=1e-12)


def test_inputs_may_be_strided_or_read_only_and_are_not_changed(quantized):
    wide = matrix(3, 48, seed=8)
    wide.flags.writeable = False
    x, before = wide[:, ::2], wide.copy()
    assert_product(quantized.matmul(x), x, quantized.dense().T)
    assert_product(quantized.matmul(x[1]), x[1], quantized.dense().T)
    assert np.array_equal(wide, before)


def test_rows_equal_the_dense_rows(quantized):
    w = quantized.dense()
    for ids in ([3], [[0, 18], [18, 7]], [5, 6, 7, 5, 9], np.arange(19), np.zeros((0,), np.int64), 4):
        rows = quantized.rows(np.asarray(ids))
        assert rows.dtype == np.float32 and np.array_equal(rows, w[np.asarray(ids)])
    for bad in ([0, 19], [-1]):
        with pytest.raises(ValueError, match=f"{bad[-1]}: choose rows from 0 to 18"):
            quantized.rows(np.array(bad))


def test_wrong_width_is_refused_not_reshaped(quantized):
    with pytest.raises(ValueError, match=r"\(24, 3\).*24 long"):
        quantized.matmul(np.zeros((24, 3), np.float32))
    with pytest.raises(ValueError, match=r"19 long"):
        quantized.matmul_t(np.zeros((2, 24), np.float32))
    with pytest.raises(ValueError, match="24 long"):
        quantized.matmul(np.float32(1))


def test_dense_is_fresh_and_everything_stored_is_read_only(quantized):
    first = quantized.dense()
    first[:] = 0
    assert quantized.dense().any() and quantized.dense().shape == quantized.shape
    stored = [a for arrays in quantized.arrays().values() for a in arrays]
    assert set(quantized.arrays()) == {"codes", "scales", "offsets", "code_maps"} and not any(
        a.flags.writeable for a in stored
    )
    assert quantized.trainable is False and quantized.dtype == np.float32


def test_bytes_are_those_of_the_arrays_and_of_the_formula(quantized):
    n, b = 19 * 24, quantized.block_size
    nbytes, blocks = quantized.nbytes, -(-n // b)
    assert nbytes == {name: sum(a.nbytes for a in arrays) for name, arrays in quantized.arrays().items()}
    assert nbytes["codes"] == naive.packed_size(n, quantized.bits)
    if isinstance(quantized, AffineWeight):
        assert (nbytes["scales"], nbytes["offsets"], nbytes["code_maps"]) == (2 * blocks, 2 * blocks, 0)
    else:
        assert nbytes["scales"] == (
            blocks + 4 * -(-blocks // 256) + 4 if quantized.double_quant else 4 * blocks
        )
        assert (
            nbytes["code_maps"] == 4 * (2**quantized.bits + 256 * quantized.double_quant)
            and nbytes["offsets"] == 0
        )
    assert quantized.bits_per_weight == 8 * (nbytes["codes"] + nbytes["scales"] + nbytes["offsets"]) / n


def test_effective_bits_of_the_literature():
    w = np.zeros((512, 512), np.float32)
    assert CodebookWeight.quantize(w, double_quant=False).bits_per_weight == 4.5
    double = 4 + 8 / 64 + 32 / (64 * 256)  # 4.127, and the one scalar
    assert CodebookWeight.quantize(w).bits_per_weight == pytest.approx(double + 32 / w.size, rel=1e-12)
    assert AffineWeight.quantize(w, 4, 32).bits_per_weight == 5.0
    assert AffineWeight.quantize(w, 2, 32).bits_per_weight == 3.0
    merged = AffineWeight.quantize(w, 4, 32).with_offset(np.zeros((512, 16), np.float32))
    assert merged.bits_per_weight == 5.5


def test_threads_multiply_by_one_weight_and_by_several_at_once():
    both = [CodebookWeight.quantize(matrix(256, 256, seed=s)) for s in (9, 10)]
    x = matrix(16, 256, seed=11)
    expected = [(q.matmul(x), q.matmul_t(x), q.matmul(x[0])) for q in both]

    def job(i):
        q = both[i % 2]
        return all(map(np.array_equal, (q.matmul(x), q.matmul_t(x), q.matmul(x[0])), expected[i % 2]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(100)))


def test_products_never_hold_the_dense_matrix(monkeypatch):
    monkeypatch.setattr(packed, "TILE", 256 * 1024)
    q = CodebookWeight.quantize(matrix(2048, 1024))
    x, dy = matrix(4, 1024), matrix(4, 2048)
    q.matmul(x[:1])  # its kernel is compiled
    with ThreadPoolExecutor(1) as pool:  # a fresh thread, so that its scratch is counted

        def peak():
            tracemalloc.start()
            try:
                q.matmul(x), q.matmul(x[:1]), q.matmul_t(dy), q.rows(np.array([1, 7]))
                return tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()

        kept, most = pool.submit(peak).result()
    scratch, dense = 4 * packed.TILE, 4 * 2048 * 1024
    assert scratch <= most < dense / 4 and kept < scratch + 10_000


# ---- codebooks


@pytest.mark.parametrize("quant_type", CODEBOOKS)
def test_codebook_stores_what_the_oracle_says(quant_type):
    w = matrix(5, 13, seed=11)
    code_map = codebooks.code_map(quant_type)
    codes, absmax = naive.quantize_codebook(w.reshape(-1), code_map, 16)
    q = CodebookWeight.quantize(w, quant_type, 16, double_quant=False)
    assert q.codes.tolist() == naive.pack(codes, q.bits) and q.unpacked().reshape(-1).tolist() == codes
    assert q.scales.tolist() == [float(a) for a in absmax]
    assert np.array_equal(q.dense().reshape(-1), naive.dequantize_codebook(codes, absmax, code_map, 16))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(CODEBOOKS),
    st.integers(1, 80),
    st.integers(0, 2**32 - 1),
)
def test_each_weight_becomes_the_nearest_value_of_its_block(rows, width, quant_type, block_size, seed):
    w = matrix(rows, width, seed=seed)
    q = CodebookWeight.quantize(w, quant_type, block_size, double_quant=False)
    absmax = np.repeat(q.scales, block_size)[: w.size].astype(np.float64)
    values = q.code_map.astype(np.float64)
    nearest = np.abs(w.reshape(-1, 1).astype(np.float64) / absmax[:, None] - values).min(axis=1) * absmax
    error = np.abs(q.dense().reshape(-1).astype(np.float64) - w.reshape(-1))
    assert (error <= nearest + 4 * EPS * absmax).all()


def test_quantizing_the_dense_result_again_changes_nothing():
    for quant_type in CODEBOOKS:
        once = CodebookWeight.quantize(matrix(8, 64), quant_type, 64, double_quant=False)
        again = CodebookWeight.quantize(once.dense(), quant_type, 64, double_quant=False)
        assert np.array_equal(again.dense(), once.dense())


def test_zero_block_is_exactly_zero():
    for quant_type in CODEBOOKS:
        q = CodebookWeight.quantize(np.zeros((4, 16), np.float32), quant_type, 16, double_quant=False)
        assert not q.dense().any() and not q.scales.any()


def test_double_quant_is_the_8_bit_map_around_the_mean():
    w = matrix(300, 70, seed=12) * np.linspace(0.5, 2, 300, dtype=np.float32)[:, None]
    plain, double = (CodebookWeight.quantize(w, "nf4", 64, double_quant=dq) for dq in (False, True))
    assert np.array_equal(plain.codes, double.codes)  # codes are chosen with the exact scales
    nested = double.scales
    assert nested.offset[0] == np.float32(plain.scales.mean(dtype=np.float64))
    codes, absmax2 = naive.quantize_codebook(plain.scales - nested.offset[0], codebooks.dynamic_map(), 256)
    assert nested.codes.tolist() == codes and nested.absmax.tolist() == [float(a) for a in absmax2]
    scales = np.array(naive.dequantize_codebook(codes, absmax2, codebooks.dynamic_map(), 256)) + nested.offset
    assert np.array_equal(nested.decode(0, len(scales)), scales) and np.array_equal(
        nested.decode(250, 270), scales[250:270]
    )
    expected = naive.dequantize_codebook(double.unpacked().reshape(-1), scales, codebooks.code_map("nf4"), 64)
    assert np.array_equal(double.dense().reshape(-1), expected)
    # The map's coarsest step is 0.9/64 of absmax2 (0.72 % at its negative end), half of which a scale can be
    # off.
    assert np.abs(scales - plain.scales).max() <= 0.9 / 64 / 2 * nested.absmax.max() * 1.01


def test_a_weight_can_be_built_from_its_stored_arrays(quantized):
    q = quantized
    if isinstance(q, AffineWeight):
        copy = AffineWeight(q.codes, q.scale, q.offset, q.shape, q.bits, q.group_size)
    else:
        copy = CodebookWeight(q.codes, q.scales, q.shape, q.quant_type, q.block_size)
    assert np.array_equal(copy.dense(), q.dense()) and copy.codes is q.codes


# ---- affine groups


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 5.0])
def test_affine_stores_what_the_oracle_says(bits, shift):
    w = matrix(5, 12, seed=13) * np.float32(0.1) + np.float32(
        shift
    )  # far from zero: the range need not include it
    codes, scales, offsets = naive.quantize_affine(w.reshape(-1), bits, 6)
    q = AffineWeight.quantize(w, bits, 6)
    assert q.codes.tolist() == naive.pack(codes, bits)
    assert q.scale.dtype == q.offset.dtype == np.float16 and q.scale.shape == q.offset.shape == (5, 2)
    assert q.scale.reshape(-1).tolist() == [float(s) for s in scales]
    assert q.offset.reshape(-1).tolist() == [float(o) for o in offsets]
    assert np.array_equal(q.dense().reshape(-1), naive.dequantize_affine(codes, scales, offsets, 6))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([1, 2, 5, 33]),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 9999),
)
def test_affine_error_is_half_a_step_plus_the_rounding_of_scale_and_offset(
    rows, groups, group_size, bits, seed
):
    rng = np.random.default_rng(seed)
    w = (
        rng.standard_normal((rows, groups * group_size)) * 10.0 ** rng.uniform(-2, 2) + rng.standard_normal()
    ).astype(np.float32)
    q = AffineWeight.quantize(w, bits, group_size)
    split = w.reshape(rows, groups, group_size).astype(np.float64)
    span, low = split.max(-1) - split.min(-1), np.abs(split.min(-1))
    bound = 0.5 * span / (2**bits - 1) * (1 + HALF_EPS) + HALF_EPS * (span + low) + 2.0**-24 * 2**bits
    error = np.abs(q.dense().reshape(rows, groups, group_size) - split).max(-1)
    assert (error <= bound).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_constant_groups_divide_by_nothing(bits):
    w = np.repeat(np.array([[0.0, 1.5, -2.25, 0.1]], np.float32), 8, axis=1)
    q = AffineWeight.quantize(w, bits, 8)
    assert (q.scale == 1).all() and not q.unpacked().any()
    assert np.array_equal(q.dense(), w.astype(np.float16).astype(np.float32))


def test_with_offset_shares_codes_and_scale_and_shifts_exactly_its_groups():
    q = AffineWeight.quantize(matrix(6, 16), 4, 8)
    offset = q.offset.astype(np.float32) + matrix(6, 2, seed=14)
    merged = q.with_offset(offset)
    assert merged.codes is q.codes and merged.scale is q.scale and merged.offset.dtype == np.float32
    scaled = (q.unpacked() * np.repeat(q.scale.astype(np.float32), 8, axis=1)).astype(np.float32)
    assert np.array_equal(merged.dense(), scaled + np.repeat(offset, 8, axis=1))
    x, before = matrix(3, 16, seed=15), q.dense()
    assert_product(merged.matmul(x), x, merged.dense().T)
    offset[:] = 99
    assert merged.offset.max() < 99 and np.array_equal(
        q.dense(), before
    )  # a copy of the caller's array, and q is untouched


def test_with_offset_keeps_float32_that_float16_could_not():
    q = AffineWeight.quantize(matrix(2, 8), 4, 8)
    tiny = q.offset.astype(np.float32) + np.float32(1e-6)
    assert np.array_equal(q.with_offset(tiny).offset, tiny)
    assert q.with_offset(q.offset).offset.dtype == np.float32


# ---- refusals


def test_group_size_that_does_not_divide_lists_those_that_do():
    with pytest.raises(
        ValueError, match=r"group_size=32: must divide in=24; these do: 1, 2, 3, 4, 6, 8, 12, 24"
    ):
        AffineWeight.quantize(matrix(4, 24), 4, 32)
    with pytest.raises(ValueError, match="group_size=0"):
        AffineWeight.quantize(matrix(4, 24), 4, 0)


@pytest.mark.parametrize("bits", [1, 5, 16, "4", None])
def test_bits_outside_the_list(bits):
    with pytest.raises(ValueError, match="2, 3, 4, 8"):
        AffineWeight.quantize(matrix(4, 24), bits, 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant_config", [config("nf4"), config("int4")])
def test_weights_that_are_not_finite_are_named(bad, quant_config):
    w = matrix(4, 24)
    w[2, 5] = bad
    w[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"w\[2, 5\]=.*finite"):
        quantize_weight(w, quant_config)


def test_affine_refuses_what_float16_cannot_hold():
    w = matrix(4, 24)
    w[1, 8:16] = np.linspace(-7e4, 0, 8)
    with pytest.raises(ValueError, match="offset of group 4 .* exceeds float16"):
        AffineWeight.quantize(w, 4, 8)
    w[1, 8:16] = np.linspace(0, 3e6, 8)
    with pytest.raises(ValueError, match="scale of group 4 .* exceeds float16"):
        AffineWeight.quantize(w, 4, 8)
    q = AffineWeight.quantize(matrix(4, 24), 4, 8)
    offset = q.offset.astype(np.float32)
    offset[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"offset\[2, 1\]=nan"):
        q.with_offset(offset)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 4), (0, 8), (8, 0)])
def test_weights_must_be_matrices(shape):
    for quant_config in (config("nf4"), config("int4")):
        with pytest.raises(ValueError, match="w.shape"):
            quantize_weight(np.zeros(shape, np.float32), quant_config)


def test_stored_arrays_of_the_wrong_size_are_refused():
    q = CodebookWeight.quantize(matrix(4, 24), "nf4", 32, double_quant=False)
    a = AffineWeight.quantize(matrix(4, 24), 4, 8)
    with pytest.raises(ValueError, match="codes.shape"):
        CodebookWeight(q.codes[:-1], q.scales, q.shape, "nf4", 32)
    with pytest.raises(ValueError, match="scales.shape"):
        CodebookWeight(q.codes, q.scales[:-1], q.shape, "nf4", 32)
    with pytest.raises(ValueError, match="block_size=0"):
        CodebookWeight(q.codes, q.scales, q.shape, "nf4", 0)
    with pytest.raises(ValueError, match="nf2, nf3"):
        CodebookWeight(q.codes, q.scales, q.shape, "nf5", 32)
    with pytest.raises(ValueError, match="offset.shape"):
        a.with_offset(np.zeros((4, 24), np.float32))
    with pytest.raises(ValueError, match="scale.shape"):
        AffineWeight(a.codes, a.scale.T, a.offset, a.shape, 4, 8)
    with pytest.raises(ValueError, match="absmax.size"):
        DoubleQuant(np.zeros(257, np.uint8), np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_stored_arrays_are_copies_of_writable_ones():
    w = matrix(4, 24)
    before = w.copy()
    q = AffineWeight.quantize(w, 8, 8)
    codes = q.codes.copy()
    rebuilt = AffineWeight(codes, q.scale, q.offset, q.shape, 8, 8)
    codes[:] = 0
    assert np.array_equal(rebuilt.dense(), q.dense()) and np.array_equal(w, before) and w.flags.writeable


def test_quantize_weight_passes_the_whole_configuration():
    w = matrix(8, 64)
    q = quantize_weight(w, QuantConfig("fp4", 128, False))
    assert isinstance(q, CodebookWeight) and (q.quant_type, q.block_size, q.double_quant) == (
        "fp4",
        128,
        False,
    )
    a = quantize_weight(w.astype(np.float64), QuantConfig("int3", group_size=16))
    assert isinstance(a, AffineWeight) and (a.bits, a.group_size) == (3, 16)
