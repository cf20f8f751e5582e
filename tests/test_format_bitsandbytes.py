"""bitsandbytes' arrays: written and read bit by bit, against loops that know only the layout; damage is
refused by name."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from helpers import mutate
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from minilora.config import ConfigError
from minilora.formats.bitsandbytes import BLOCK_SIZES, from_arrays, is_quantized, to_arrays
from minilora.formats.files import FileError, read_tensors, write_tensors
from minilora.quant import CodebookWeight, DoubleQuant

NAME = "model.layers.0.self_attn.q_proj.weight"
STATES = [".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"]
STATE = NAME + STATES[0].removesuffix("nf4")
SHAPES = (
    (64, 64),
    (1, 1),
    (3, 7),
    (5, 13),
    (33, 96),
    (2, 1000),
    (130, 256),
)  # odd ends, short last blocks, many blocks
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = [sign * f / 12 for sign in (1, -1) for f in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def make(shape=(33, 96), quant_type="nf4", block_size=64, double_quant=True, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return CodebookWeight.quantize(w, quant_type, block_size, double_quant)


def read(arrays):
    return from_arrays(NAME, arrays, "f.safetensors")


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_weight(a, b):
    assert (a.quant_type, a.block_size, a.shape, a.double_quant) == (
        b.quant_type,
        b.block_size,
        b.shape,
        b.double_quant,
    )
    assert same_bits(a.codes, b.codes)
    for part in ("codes", "absmax", "offset") if a.double_quant else ("scales",):
        ours = (getattr(a.scales, part), getattr(b.scales, part)) if a.double_quant else (a.scales, b.scales)
        assert same_bits(*ours), part


def state_of(arrays):
    (key,) = [key for key in arrays if key.startswith(STATE)]
    return key, json.loads(bytes(arrays[key]).decode())


def with_state(arrays, **changes):
    """The arrays with some settings replaced; None takes one away."""
    key, state = state_of(arrays)
    state = {k: v for k, v in (state | changes).items() if v is not None}
    return arrays | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def decode_by_loops(arrays):
    """The weights in float32, from the stored bytes alone; each operation rounds once."""
    key, state = state_of(arrays)
    table = [f32(v) for v in (NF4 if key.endswith("nf4") else FP4)]
    packed, absmax = arrays[NAME].tobytes(), arrays[f"{NAME}.absmax"].tolist()
    scales = []
    for i in range(len(absmax)):
        if "nested_offset" in state:
            value = f32(
                float(arrays[f"{NAME}.nested_quant_map"][absmax[i]])
                * float(arrays[f"{NAME}.nested_absmax"][i // 256])
            )
            scales.append(f32(value + state["nested_offset"]))
        else:
            scales.append(absmax[i])
    out, columns = state["shape"]
    w = np.empty((out, columns), np.float32)
    for i in range(out * columns):
        byte = packed[i // 2]
        code = byte >> 4 if i % 2 == 0 else byte & 15
        w[i // columns, i % columns] = f32(table[code] * scales[i // state["blocksize"]])
    return w


# ---- right


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_exact_and_takes_only_its_own(shape, quant_type, double_quant):
    for block_size in BLOCK_SIZES:
        weight = make(shape, quant_type, block_size, double_quant)
        arrays = to_arrays(NAME, weight) | {"other.weight": np.ones(2)}
        assert is_quantized(arrays, NAME) and not is_quantized(arrays, "other.weight")
        assert_same_weight(read(arrays), weight)
        assert list(arrays) == ["other.weight"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (33, 96)])
def test_decoding_by_loops_from_the_bytes_is_equal(shape, quant_type, double_quant):
    weight = make(shape, quant_type, 32, double_quant)
    assert np.array_equal(decode_by_loops(to_arrays(NAME, weight)), weight.dense())


def test_the_layout_written_by_hand():
    """Two rows of 32; w = code map · absmax; the first code in the high half of a byte."""
    pairs = np.array([i % 16 << 4 | i % 16 + 1 for i in range(0, 64, 2)], np.uint8)
    weight = CodebookWeight(pairs, np.array([2, 4], np.float32), (2, 32), "nf4", 32)
    arrays = to_arrays("w", weight)
    assert list(arrays) == ["w", "w.absmax", "w.quant_map", "w.quant_state.bitsandbytes__nf4"]
    assert arrays["w"].shape == (32, 1) and arrays["w"][:3, 0].tolist() == [0x01, 0x23, 0x45]
    assert arrays["w.absmax"].tolist() == [2, 4] and arrays["w.quant_map"].tolist() == [f32(v) for v in NF4]
    expected = b'{"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [2, 32]}'
    assert arrays["w.quant_state.bitsandbytes__nf4"].tobytes() == expected
    assert from_arrays("w", arrays, "f").dense()[1, 15] == 4


def test_the_nested_layout_written_by_hand():
    scales = DoubleQuant(
        np.array([0, 255], np.uint8), np.array([0.5], np.float32), np.array([0.75], np.float32)
    )
    arrays = to_arrays("w", CodebookWeight(np.full(32, 0x77, np.uint8), scales, (2, 32), "fp4", 32))
    assert list(arrays) == [
        "w",
        *(f"w.{p}" for p in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
        "w.quant_state.bitsandbytes__fp4",
    ]
    assert arrays["w.absmax"].dtype == np.uint8 and arrays["w.absmax"].tolist() == [0, 255]
    expected = (
        b'{"quant_type": "fp4", "blocksize": 32, "dtype": "float32", "shape": [2, 32], '
        b'"nested_blocksize": 256, '
        b'"nested_dtype": "float32", "nested_offset": 0.75}'
    )
    assert arrays["w.quant_state.bitsandbytes__fp4"].tobytes() == expected
    assert from_arrays("w", arrays, "f").dense()[:, 0].tolist() == [
        f32(0.25 * (0.5 * -0.99296875 + 0.75)),
        0.25 * 1.25,
    ]


def test_zeros_of_the_fp4_map_are_positive_as_in_bitsandbytes():
    quant_map = to_arrays(NAME, make(quant_type="fp4"))[f"{NAME}.quant_map"]
    assert not np.signbit(quant_map[[0, 8]]).any() and np.signbit(quant_map[9:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_models_quantized_from_half_precision_are_read(dtype):
    weight = make()
    assert_same_weight(read(with_state(to_arrays(NAME, weight), dtype=dtype)), weight)


def test_through_a_file(tmp_path):
    weight = make()
    write_tensors(tmp_path / "m.safetensors", to_arrays(NAME, weight), {})
    assert_same_weight(read(read_tensors(tmp_path / "m.safetensors")[0]), weight)


def test_the_half_byte_after_an_odd_end_is_kept():
    """bitsandbytes fills it with the code of the number 0 (7), we with 0."""
    arrays = to_arrays(NAME, make((3, 7)))
    arrays[NAME] = arrays[NAME] | np.uint8([[0]] * 10 + [[7]])
    assert read(dict(arrays)).codes[-1] & 15 == 7
    assert np.array_equal(read(arrays).dense(), make((3, 7)).dense())


# ---- refused


@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "nf8"])
def test_codebooks_that_bitsandbytes_lacks_are_not_written(quant_type):
    with pytest.raises(ConfigError, match=f"quant_type='{quant_type}': bitsandbytes has nf4 and fp4 only"):
        to_arrays(NAME, make(quant_type=quant_type))


@pytest.mark.parametrize("block_size", [16, 48, 8192])
def test_block_sizes_that_bitsandbytes_lacks_are_not_written(block_size):
    with pytest.raises(ConfigError, match=f"block_size={block_size}: choose one of 32, 64"):
        to_arrays(NAME, make(block_size=block_size))


def without(part):
    return lambda a: {k: v for k, v in a.items() if k != part}


def replaced(part, function):
    return lambda a: a | {part: function(a[part].copy())}


def at(index, value):
    def change(array):
        array[index] = value
        return array

    return change


NESTED_DAMAGE = {
    "no codes": (without(NAME), rf"{NAME} is missing, must be uint8 \(1584, 1\)"),
    "no absmax": (without(f"{NAME}.absmax"), "absmax is missing"),
    "no map": (without(f"{NAME}.quant_map"), "quant_map is missing"),
    "no nested absmax": (without(f"{NAME}.nested_absmax"), "nested_absmax is missing"),
    "no nested map": (without(f"{NAME}.nested_quant_map"), "nested_quant_map is missing"),
    "no state": (without(STATE + "nf4"), "has no quant_state.bitsandbytes__…, needs exactly one"),
    "two states": (
        lambda a: a | {STATE + "fp4": a[STATE + "nf4"]},
        "nf4 and quant_state.bitsandbytes__fp4, needs exactly one",
    ),
    "state of fp4 under nf4": (
        lambda a: with_state(a, quant_type="fp4"),
        "quant_type='fp4', choose one of nf4",
    ),
    "block size": (lambda a: with_state(a, blocksize=48), "blocksize=48, choose one of 32, 64"),
    "block size is a float": (lambda a: with_state(a, blocksize=64.0), "blocksize=64.0"),
    "block size is true": (lambda a: with_state(a, blocksize=True), "blocksize=True"),
    "other block size": (
        lambda a: with_state(a, blocksize=128),
        r"absmax is uint8 \(50,\), must be uint8 \(25,\)",
    ),
    "dtype": (
        lambda a: with_state(a, dtype="float64"),
        "dtype='float64', choose one of float32, float16, bfloat16",
    ),
    "nested dtype": (
        lambda a: with_state(a, nested_dtype="bfloat16"),
        "nested_dtype='bfloat16', choose one of float32",
    ),
    "nested block size": (
        lambda a: with_state(a, nested_blocksize=128),
        "nested_blocksize=128, choose one of 256",
    ),
    "shape": (lambda a: with_state(a, shape=[33, 97]), r"\(1584, 1\), must be uint8 \(1601, 1\)"),
    "huge shape": (lambda a: with_state(a, shape=[10**40, 10**40]), "must be uint8 "),
    "shape of one": (lambda a: with_state(a, shape=[3168]), "shape=.3168., must be .out, in."),
    "shape of zero": (lambda a: with_state(a, shape=[0, 96]), "both at least 1"),
    "negative shape": (lambda a: with_state(a, shape=[-33, -96]), "both at least 1"),
    "float shape": (lambda a: with_state(a, shape=[33.0, 96]), "must be .out, in."),
    "true shape": (lambda a: with_state(a, shape=[True, 96]), "must be .out, in."),
    "shape is text": (lambda a: with_state(a, shape="ab"), "shape='ab'"),
    "offset nan": (
        lambda a: with_state(a, nested_offset=math.nan),
        "nested_offset=nan, must be a finite float32",
    ),
    "offset infinite": (lambda a: with_state(a, nested_offset=-math.inf), "nested_offset=-inf"),
    "offset beyond float32": (lambda a: with_state(a, nested_offset=1e39), "nested_offset=1e.39"),
    "offset is a long number": (lambda a: with_state(a, nested_offset=10**400), "must be a finite float32"),
    "offset is text": (lambda a: with_state(a, nested_offset="1"), "nested_offset='1'"),
    "offset is true": (lambda a: with_state(a, nested_offset=True), "nested_offset=True"),
    "a setting is missing": (lambda a: with_state(a, blocksize=None), "must hold .*blocksize"),
    "half nested": (lambda a: with_state(a, nested_offset=None), "must hold .*nested_offset"),
    "a setting too many": (lambda a: with_state(a, more=1), "holds .*'more'"),
    "not double quantized after all": (
        lambda a: with_state(a, nested_offset=None, nested_dtype=None, nested_blocksize=None),
        r"absmax is uint8 \(50,\), must be float32 \(50,\)",
    ),
    "codes int8": (
        replaced(NAME, lambda x: x.view(np.int8)),
        "int8 .*must be uint8 .*quant_storage must be uint8",
    ),
    "codes stored as float32": (
        replaced(NAME, lambda x: x.reshape(-1).view(np.float32)),
        "quant_storage must be uint8",
    ),
    "codes flat": (replaced(NAME, lambda x: x.reshape(-1)), r"uint8 \(1584,\), must be uint8 \(1584, 1\)"),
    "codes short": (replaced(NAME, lambda x: x[:-1]), r"\(1583, 1\)"),
    "map of fp4": (
        lambda a: a | {f"{NAME}.quant_map": to_arrays(NAME, make(quant_type="fp4"))[f"{NAME}.quant_map"]},
        r"quant_map\[0\]=0.0, the nf4 map has -1.0 \(1. of 16 values differ\): other codebooks",
    ),
    "map one bit off": (
        replaced(f"{NAME}.quant_map", lambda x: np.nextafter(x, np.float32([9] + [0] * 15))),
        r"quant_map\[0\]=-0.99999994.*, the nf4 map has -1.0",
    ),
    "map nan": (replaced(f"{NAME}.quant_map", at(3, np.nan)), r"quant_map\[3\]=nan"),
    "map float64": (replaced(f"{NAME}.quant_map", lambda x: x.astype(np.float64)), "quant_map is float64"),
    "map big-endian": (replaced(f"{NAME}.quant_map", lambda x: x.astype(">f4")), "quant_map is >f4"),
    "nested map": (
        replaced(f"{NAME}.nested_quant_map", at(200, 0)),
        r"map\[200\]=0.0, the 8-bit dynamic map has 0.233",
    ),
    "nested map short": (replaced(f"{NAME}.nested_quant_map", lambda x: x[1:]), r"\(255,\)"),
    "nested absmax nan": (
        replaced(f"{NAME}.nested_absmax", at(0, np.nan)),
        r"nested_absmax\[0\]=nan, must be from 0",
    ),
    "nested absmax negative": (replaced(f"{NAME}.nested_absmax", at(0, -1)), r"nested_absmax\[0\]=-1.0"),
    "scales that overflow": (
        lambda a: with_state(replaced(f"{NAME}.nested_absmax", at(0, 3e38))(a), nested_offset=3e38),
        "must be from 0 to 4.0.*e.37",
    ),
    "nested absmax too many": (
        replaced(f"{NAME}.nested_absmax", lambda x: np.append(x, x)),
        r"\(2,\), must be float32 \(1,\)",
    ),
}
PLAIN_DAMAGE = {
    "absmax uint8": (replaced(f"{NAME}.absmax", lambda x: x.astype(np.uint8)), "absmax is uint8"),
    "absmax float16": (replaced(f"{NAME}.absmax", lambda x: x.astype(np.float16)), "absmax is float16"),
    "absmax negative": (
        replaced(f"{NAME}.absmax", at(7, -0.5)),
        r"absmax\[7\]=-0.5, must be from 0 to 3.40282e\+38",
    ),
    "absmax nan": (replaced(f"{NAME}.absmax", at(7, np.nan)), r"absmax\[7\]=nan"),
    "absmax infinite": (replaced(f"{NAME}.absmax", at(7, np.inf)), r"absmax\[7\]=inf"),
    "nested array left over": (
        lambda a: a | {f"{NAME}.nested_absmax": np.ones(1, np.float32)},
        "nested_absmax does not belong",
    ),
    "nested settings": (
        lambda a: with_state(a, nested_blocksize=256, nested_dtype="float32", nested_offset=1.0),
        r"absmax is float32 \(50,\), must be uint8",
    ),
}
STATE_BYTES = {
    "empty": (b"", r"uint8 \(0,\), must be uint8, 1 to 1000 bytes"),
    "too long": (b" " * 1001, r"\(1001,\)"),
    "not JSON": (b"{", "is not JSON"),
    "no UTF-8": (b'{"\xff": 1}', "is not JSON"),
    "a pickle": (b"\x80\x04N.", "is not JSON"),
    "nested a thousand times": (b"[" * 1000, "is not JSON"),
    "a list": (b"[1]", "holds list, must hold"),
    "null": (b"null", "holds NoneType"),
    "a key twice": (b'{"quant_type": "nf4", "quant_type": "nf4"}', "a name comes twice"),
    "trailing text": (b"{} {}", "is not JSON"),
    "long number": (b'{"blocksize": ' + b"9" * 900 + b"}", "must hold"),
    "lone surrogate": (rb'{"\ud800": 1}', "must hold"),
}


def refused(arrays, message):
    with pytest.raises(FileError, match=message) as caught:
        read(arrays)
    assert str(caught.value).startswith(f"f.safetensors: {NAME}")


@pytest.mark.parametrize("damage, message", NESTED_DAMAGE.values(), ids=NESTED_DAMAGE.keys())
def test_damage_is_refused_by_name(damage, message):
    refused(damage(to_arrays(NAME, make())), message)


@pytest.mark.parametrize("damage, message", PLAIN_DAMAGE.values(), ids=PLAIN_DAMAGE.keys())
def test_damage_without_double_quantization_is_refused_by_name(damage, message):
    refused(damage(to_arrays(NAME, make(double_quant=False))), message)


@pytest.mark.parametrize("raw, message", STATE_BYTES.values(), ids=STATE_BYTES.keys())
def test_a_broken_json_text_is_refused(raw, message):
    refused(to_arrays(NAME, make()) | {STATE + "nf4": np.frombuffer(raw, np.uint8)}, message)


@pytest.mark.parametrize("bad", [np.zeros((1, 90), np.uint8), np.zeros(90, np.int8), np.array(7, np.uint8)])
def test_a_json_text_of_another_form_is_refused(bad):
    refused(to_arrays(NAME, make()) | {STATE + "nf4": bad}, "must be uint8, 1 to 1000 bytes")


# ---- fuzz

SETTINGS = settings(max_examples=80, deadline=None)
DTYPES = (
    np.uint8,
    np.int8,
    np.float32,
    np.float64,
    np.float16,
    np.int32,
    np.int64,
    bool,
    ">f4",
    "U3",
    object,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(BLOCK_SIZES),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def check_outcome(arrays):
    """A FileError that names the file, or a weight whose numbers are all finite."""
    with np.errstate(all="raise", under="ignore"):
        try:
            weight = read(arrays)
        except FileError as error:
            assert str(error).startswith(f"f.safetensors: {NAME}")
        else:
            assert np.isfinite(weight.dense()).all() and weight.nbytes["codes"] == weight.codes.nbytes


@SETTINGS
@given(st.data())
def test_mutated_arrays_are_refused_or_valid(data):
    arrays = to_arrays(
        NAME, make((5, 70), data.draw(st.sampled_from(["nf4", "fp4"])), 32, data.draw(st.booleans()))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        names = [NAME + part for part in ("", ".absmax", ".quant_map", *STATES)]
        if mutate(data, arrays, DTYPES, names, "state") == "state":
            text = {
                data.draw(st.sampled_from(["blocksize", "shape", "nested_offset", "dtype", "x"])): data.draw(
                    JSON
                )
            }
            state = [k for k in arrays if k.startswith(STATE) and arrays[k].dtype == np.uint8]
            if state:
                try:
                    old = json.loads(arrays[state[0]].tobytes())
                except ValueError:
                    old = {}
                text = (old if isinstance(old, dict) else {}) | text
                arrays[state[0]] = np.frombuffer(json.dumps(text).encode(), np.uint8)
    check_outcome(arrays)


@SETTINGS
@given(
    st.binary(max_size=300)
    | st.dictionaries(st.text(max_size=12), JSON, max_size=8).map(lambda d: json.dumps(d).encode())
)
def test_any_json_text_is_refused_or_valid(raw):
    check_outcome(to_arrays(NAME, make((5, 70))) | {STATE + "nf4": np.frombuffer(raw, np.uint8)})


@SETTINGS
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 60),
)
def test_mutated_files_are_refused_or_valid(tmp_path_factory, changes, double_quant, cut):
    raw = bytearray(save(to_arrays(NAME, make((5, 70), double_quant=double_quant))))
    for i, value in changes:
        raw[i % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(bytes(raw[: len(raw) - cut] if cut < 10 else raw))
    try:
        arrays, _ = read_tensors(path)
    except FileError:
        return
    if is_quantized(arrays, NAME):
        check_outcome(arrays)
