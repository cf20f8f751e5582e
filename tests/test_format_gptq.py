"""GPTQ's arrays: written and read exactly, against loops that set single bits; the zero point's trap; damage
refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import mutate
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from minilora.config import ConfigError
from minilora.formats.files import FileError, read_tensors, write_tensors
from minilora.formats.gptq_words import from_arrays, is_quantized, to_arrays
from minilora.quant import AffineWeight
from minilora.quant.packed import packed
from minilora.quant.zero_points import ZeroPointWeight

NAME = "model.layers.0.mlp.up_proj"
BITS = (2, 3, 4, 8)
# (out, in, group_size): the smallest that fill words, and some whose words straddle rows of 8, 10, 21 values
SHAPES = {
    2: [(16, 16, 16), (32, 48, 16), (48, 64, 8)],
    3: [(32, 32, 32), (64, 96, 32), (32, 160, 8)],
    4: [(8, 8, 8), (24, 40, 8), (72, 128, 32), (16, 24, 1)],
    8: [(4, 4, 4), (12, 20, 5), (36, 64, 32)],
}
CASES = [(bits, version, *shape) for bits in BITS for version in (1, 2) for shape in SHAPES[bits]]


def random_weight(bits, out, columns, group_size, seed=0, least_zero=1):
    """Codes and zero points that take every value, scales of any size and sign."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (out, columns)).astype(np.uint8)
    zeros = rng.integers(least_zero, 2**bits, (out, columns // group_size))
    scale = rng.standard_normal(zeros.shape).astype(np.float16)
    return ZeroPointWeight(packed(codes.reshape(-1), bits), scale, zeros, (out, columns), bits, group_size)


def make(bits=4, out=32, columns=64, group_size=32, version=1):
    return to_arrays(NAME, random_weight(bits, out, columns, group_size), version)


def read(arrays, bits=4, group_size=32, version=1):
    return from_arrays(NAME, arrays, bits, group_size, version, "f.safetensors")


def assert_same_weight(a, b):
    assert (a.bits, a.shape, a.group_size) == (b.bits, b.shape, b.group_size)
    assert np.array_equal(a.codes, b.codes) and np.array_equal(a.zeros, b.zeros)
    assert a.scale.tobytes() == b.scale.tobytes()


def pack_by_loops(values, bits):
    """One column or row of values as signed 32-bit words, bit by bit."""
    words = [0] * (len(values) * bits // 32)
    for i, value in enumerate(values):
        for k in range(bits):
            if value >> k & 1:
                place = i * bits + k
                words[place // 32] |= 1 << place % 32
    return [word - 2**32 if word >= 2**31 else word for word in words]


# ---- right


@pytest.mark.parametrize("bits, version, out, columns, group_size", CASES)
def test_round_trip_is_exact_and_takes_only_its_own(bits, version, out, columns, group_size):
    weight = random_weight(bits, out, columns, group_size, least_zero=2 - version)
    arrays = to_arrays(NAME, weight, version) | {f"{NAME}.bias": np.ones(2), "other.weight": np.ones(2)}
    assert is_quantized(arrays, NAME) and not is_quantized(arrays, "other")
    found = read(arrays, bits, group_size, version)
    assert_same_weight(found, weight)
    assert np.array_equal(found.dense(), weight.dense()) and list(arrays) == [f"{NAME}.bias", "other.weight"]


@pytest.mark.parametrize("bits, version, out, columns, group_size", CASES)
def test_the_words_are_those_of_loops_over_bits(bits, version, out, columns, group_size):
    weight = random_weight(bits, out, columns, group_size, seed=1)
    codes, zeros = weight.unpacked().tolist(), weight.zeros.tolist()
    arrays = to_arrays(NAME, weight, version)
    for row in range(out):
        assert arrays[f"{NAME}.qweight"][:, row].tolist() == pack_by_loops(codes[row], bits)
        assert arrays[f"{NAME}.scales"][:, row].tolist() == weight.scale[row].tolist()
    for group in range(columns // group_size):
        stored = [zeros[row][group] - (version == 1) for row in range(out)]
        assert arrays[f"{NAME}.qzeros"][group].tolist() == pack_by_loops(stored, bits)
    assert arrays[f"{NAME}.g_idx"].tolist() == [i // group_size for i in range(columns)]
    dtypes = {key.removeprefix(f"{NAME}."): array.dtype for key, array in arrays.items()}
    assert dtypes == {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}
    assert all(array.flags.c_contiguous for array in arrays.values())


@pytest.mark.parametrize("bits", BITS)
def test_decoding_is_scale_times_code_minus_zero(bits):
    out, columns, group_size = SHAPES[bits][-1]
    weight = random_weight(bits, out, columns, group_size, seed=2)
    codes, scale, zeros = weight.unpacked().astype(int), weight.scale.astype(float), weight.zeros.astype(int)
    w = read(to_arrays(NAME, weight), bits, group_size).dense()
    for row in range(out):
        for i in range(columns):
            group = i // group_size
            assert w[row, i] == scale[row, group] * (
                codes[row, i] - zeros[row, group]
            )  # exact: 11 + 8 bits fit in float32


def test_in_3_bits_values_10_and_21_straddle_words():
    codes = np.zeros((32, 32), np.uint8)
    codes[0, 10], codes[1, 21], codes[2, 31] = 0b101, 0b110, 0b111
    weight = ZeroPointWeight(
        packed(codes.reshape(-1), 3), np.ones((32, 1)), np.ones((32, 1), int), (32, 32), 3, 32
    )
    words = to_arrays("m", weight)["m.qweight"].view(np.uint32)
    assert words[:, 0].tolist() == [0b01 << 30, 1, 0]
    assert words[:, 1].tolist() == [0, 0, 0b11]
    assert words[:, 2].tolist() == [0, 0, 0b111 << 29]


def test_the_usual_symmetric_zero_point_by_hand():
    """AutoGPTQ's symmetric 4-bit files hold zero 8 as 0x77777777, version 2 as 0x88888888."""
    weight = ZeroPointWeight(np.full(64, 0x12, np.uint8), np.ones((8, 1)), np.full((8, 1), 8), (8, 16), 4, 16)
    for version, word in ((1, 0x77777777), (2, 0x88888888)):
        arrays = to_arrays("m", weight, version)
        assert arrays["m.qzeros"].view(np.uint32).tolist() == [[word]]
        assert arrays["m.qweight"].view(np.uint32).tolist() == [[0x21212121] * 8] * 2
        assert from_arrays("m", arrays, 4, 16, version, "f").zeros.tolist() == [[8]] * 8


@pytest.mark.parametrize("bits", BITS)
def test_version_1_reads_modulo(bits):
    """All ones is -1 in this width, a zero point of 0; version 2 takes it as it stands."""
    arrays = make(bits, 32, 64, 32)
    arrays[f"{NAME}.qzeros"][:] = -1
    assert (read(dict(arrays), bits, version=1).zeros == 0).all()
    assert (read(arrays, bits, version=2).zeros == 2**bits - 1).all()


@pytest.mark.parametrize("bits", BITS)
def test_group_size_minus_one_is_the_whole_row(bits):
    weight = random_weight(bits, 32, 64, 64)
    assert_same_weight(read(to_arrays(NAME, weight), bits, -1), weight)


def test_quantized_matrices_through_a_file(tmp_path):
    w = np.random.default_rng(3).standard_normal((64, 96)).astype(np.float32)
    for bits in BITS:
        weight = AffineWeight.quantize(w, bits, 32, store="zero")
        write_tensors(tmp_path / "m", to_arrays(NAME, weight, 2), {})
        assert_same_weight(read(read_tensors(tmp_path / "m")[0], bits, version=2), weight)


def test_large_matrices_are_packed_in_tiles():
    weight = random_weight(3, 32, 2**16, 2**15)  # a tile holds 16 of its rows
    assert_same_weight(read(to_arrays(NAME, weight), 3, 2**15), weight)
    weight = random_weight(3, 1056, 1056, 32)  # tiles of 992 rows, and a rest
    assert_same_weight(read(to_arrays(NAME, weight), 3, 32), weight)


def test_real_offsets_are_rounded_by_stored_and_then_written():
    weight = AffineWeight.quantize(
        np.random.default_rng(4).standard_normal((32, 64)).astype(np.float32), 4, 32
    )
    with pytest.raises(
        ValueError, match=r"up_proj: its offsets are real numbers, .* weight.stored\('zero'\) rounds them"
    ):
        to_arrays(NAME, weight)
    rounded, error = weight.stored("zero")
    found = read(to_arrays(NAME, rounded, 2), version=2)
    assert np.abs(found.dense() - weight.dense()).max() <= error * (1 + 1e-6) and error > 0


# ---- refused


def test_a_zero_of_0_is_not_written_in_version_1():
    zeros = np.full((32, 2), 5)
    zeros[7, 1] = 0
    weight = ZeroPointWeight(np.zeros(32 * 32, np.uint8), np.ones((32, 2)), zeros, (32, 64), 4, 32)
    with pytest.raises(
        ConfigError, match=r"up_proj: zeros\[7, 1\]=0: version 1 stores zero - 1 .* write version=2"
    ):
        to_arrays(NAME, weight)
    assert_same_weight(read(to_arrays(NAME, weight, 2), version=2), weight)


@pytest.mark.parametrize(
    "bits, out, columns, message",
    [
        (2, 16, 24, "in=24: must be a multiple of 16: 2-bit"),
        (2, 24, 16, "out=24: must be a multiple of 16"),
        (3, 32, 48, "in=48: must be a multiple of 32"),
        (3, 16, 32, "out=16: must be a multiple of 32"),
        (4, 8, 12, "in=12: must be a multiple of 8"),
        (8, 5, 8, "out=5: must be a multiple of 4"),
    ],
)
def test_widths_that_do_not_fill_words_are_not_written(bits, out, columns, message):
    with pytest.raises(ConfigError, match=message):
        to_arrays(NAME, random_weight(bits, out, columns, 4))


@pytest.mark.parametrize("version", [0, 3, "gptq"])
def test_unknown_versions_are_not_written(version):
    with pytest.raises(ConfigError, match=f"version={version!r}: choose one of 1, 2"):
        make(version=version)


def without(part):
    return lambda a: {k: v for k, v in a.items() if k != f"{NAME}.{part}"}


def replaced(part, function):
    return lambda a: a | {f"{NAME}.{part}": function(a[f"{NAME}.{part}"].copy())}


def at(index, value):
    def change(array):
        array[index] = value
        return array

    return change


DAMAGE = {
    **{
        f"no {part}": (without(part), f"{part} is missing")
        for part in ("qweight", "qzeros", "scales", "g_idx")
    },
    "AWQ": (without("g_idx"), "AWQ files have none"),
    "qweight int64": (
        replaced("qweight", lambda x: x.astype(np.int64)),
        r"qweight is int64 with shape \(8, 32\), must be int32",
    ),
    "qweight unsigned": (replaced("qweight", lambda x: x.view(np.uint32)), "qweight is uint32"),
    "qweight big-endian": (replaced("qweight", lambda x: x.astype(">i4")), "qweight is >i4"),
    "qweight flat": (
        replaced("qweight", lambda x: x.reshape(-1)),
        r"shape \(256,\), must be int32 with 2 axes",
    ),
    "qweight transposed": (
        replaced("qweight", lambda x: x.T),
        r"qweight has shape \(32, 8\), must be \(8, 8\) for 8 outputs",
    ),
    "qweight short": (
        replaced("qweight", lambda x: x[:-1]),
        r"qweight has shape \(7, 32\), must be \(8, 32\)",
    ),
    "qweight without outputs": (
        replaced("qweight", lambda x: x[:, :0]),
        "has 0 outputs, must be a multiple of 8",
    ),
    "qweight of odd outputs": (
        replaced("qweight", lambda x: x[:, :12]),
        "has 12 outputs, must be a multiple of 8 for 4 bits",
    ),
    "qzeros int16": (replaced("qzeros", lambda x: x.view(np.int16)), "qzeros is int16"),
    "qzeros as float": (replaced("qzeros", lambda x: x.view(np.float16)), "qzeros is float16"),
    "qzeros wide": (
        replaced("qzeros", lambda x: np.hstack([x, x])),
        r"qzeros has shape \(2, 8\), must be \(2, 4\)",
    ),
    "scales float32": (
        replaced("scales", lambda x: x.astype(np.float32)),
        "scales is float32 .* must be float16",
    ),
    "scales too many": (
        replaced("scales", lambda x: np.vstack([x, x])),
        r"scales has shape \(4, 32\), must be \(2, 32\)",
    ),
    "scales nan": (replaced("scales", at((1, 7), np.nan)), r"scales\[1, 7\]=nan, must be finite"),
    "scales infinite": (replaced("scales", at((0, 3), np.inf)), r"scales\[0, 3\]=inf"),
    "g_idx int64": (replaced("g_idx", lambda x: x.astype(np.int64)), "g_idx is int64"),
    "g_idx 2-D": (replaced("g_idx", lambda x: x[None]), "must be int32 with 1 axes"),
    "g_idx scalar": (replaced("g_idx", lambda x: x[0, ...]), "must be int32 with 1 axes"),
    "g_idx empty": (replaced("g_idx", lambda x: x[:0]), "has 0 inputs"),
    "g_idx short": (replaced("g_idx", lambda x: x[:32]), r"qweight has shape \(8, 32\), must be \(4, 32\)"),
    "act-order": (
        replaced("g_idx", at([5, 40], [1, 0])),
        r"g_idx\[5\]=1, must be 0 = 5 // 32: .*\(act-order\)",
    ),
    "groups in another order": (replaced("g_idx", lambda x: 1 - x), r"g_idx\[0\]=1, must be 0"),
    "g_idx too large": (replaced("g_idx", at(63, 2**31 - 1)), r"g_idx\[63\]=2147483647, must be 1"),
    "g_idx negative": (replaced("g_idx", at(33, -1)), r"g_idx\[33\]=-1, must be 1 = 33 // 32"),
}
SETTINGS_DAMAGE = {
    "bits": ({"bits": 5}, "bits=5, choose one of 2, 3, 4, 8"),
    "bits as float": ({"bits": 4.0}, "bits=4.0"),
    "bits as text": ({"bits": "4"}, "bits='4'"),
    "bits is nothing": ({"bits": None}, "bits=None"),
    "other bits": ({"bits": 8}, r"qweight has shape \(8, 32\), must be \(16, 32\)"),
    "version": ({"version": 3}, "version=3, choose one of 1, 2"),
    "version true": ({"version": True}, "version=True"),
    "version is a list": ({"version": [1]}, r"version=\[1\]"),
    "group size": ({"group_size": 48}, "group_size=48, must be -1 or divide the 64 inputs"),
    "group size 0": ({"group_size": 0}, "group_size=0"),
    "group size -2": ({"group_size": -2}, "group_size=-2"),
    "group size huge": ({"group_size": 10**30}, "group_size=10+, must"),
    "group size as float": ({"group_size": 32.0}, "group_size=32.0"),
    "group size true": ({"group_size": True}, "group_size=True"),
    "group size is nothing": ({"group_size": None}, "group_size=None"),
    "other group size": ({"group_size": 16}, r"qzeros has shape \(2, 4\), must be \(4, 4\) .* group_size=16"),
}


def refused(arrays, message, **how):
    with pytest.raises(FileError, match=message) as caught:
        read(arrays, **how)
    assert str(caught.value).startswith(f"f.safetensors: {NAME}")


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_by_name(damage, message):
    refused(damage(make()), message)


@pytest.mark.parametrize("how, message", SETTINGS_DAMAGE.values(), ids=SETTINGS_DAMAGE.keys())
def test_settings_that_cannot_be_are_refused_by_name(how, message):
    refused(make(), message, **how)


def test_in_3_bits_inputs_and_outputs_are_multiples_of_32():
    arrays = make(3)
    refused(
        arrays | {f"{NAME}.g_idx": np.arange(48, dtype=np.int32) // 16},
        "has 48 inputs, must be a multiple of 32",
        bits=3,
        group_size=16,
    )
    refused(
        replaced("qweight", lambda x: x[:, :16])(make(3)),
        "has 16 outputs, must be a multiple of 32 for 3 bits",
        bits=3,
    )


# ---- fuzz

SETTINGS = settings(max_examples=80, deadline=None)
DTYPES = (np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64, bool, ">i4", "U3", object)
ODD = st.sampled_from([None, True, -1, 0, 1, 2, 3, 4, 8, 16, 32, 64, 2.0, "4", [4], 10**20])


def check_outcome(arrays, bits, group_size, version):
    """A FileError that names the file, or a weight whose numbers are all finite."""
    with np.errstate(all="raise", under="ignore"):
        try:
            weight = from_arrays(NAME, arrays, bits, group_size, version, "f.safetensors")
        except FileError as error:
            assert str(error).startswith(f"f.safetensors: {NAME}")
        else:
            assert np.isfinite(weight.dense()).all() and weight.zeros.max() < 2**weight.bits


@SETTINGS
@given(st.data(), st.sampled_from(BITS), st.sampled_from([1, 2]))
def test_mutated_arrays_are_refused_or_valid(data, bits, version):
    arrays, group_size = make(bits, version=version), 32
    for _ in range(data.draw(st.integers(1, 2))):
        names = [f"{NAME}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
        if mutate(data, arrays, DTYPES, names, "settings") == "settings":
            bits, group_size, version = data.draw(ODD), data.draw(ODD), data.draw(ODD)
    check_outcome(arrays, bits, group_size, version)


@SETTINGS
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    st.sampled_from(BITS),
    st.integers(0, 60),
)
def test_mutated_files_are_refused_or_valid(tmp_path_factory, changes, bits, cut):
    raw = bytearray(save(make(bits)))
    for i, value in changes:
        raw[i % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz_gptq.safetensors"
    path.write_bytes(bytes(raw[: len(raw) - cut] if cut < 10 else raw))
    try:
        arrays, _ = read_tensors(path)
    except FileError:
        return
    if is_quantized(arrays, NAME):
        check_outcome(arrays, bits, 32, 1)
