"""GGUF: files built byte by byte are read to the bit, and every byte that lies is refused by name."""

from __future__ import annotations

import gc
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.formats import gguf as ours
from minilora.formats.files import FileError
from minilora.formats.gguf import GGUFFile, TensorInfo
from minilora.formats.gguf_writer import write_gguf
from minilora.parameters import DenseWeight
from minilora.quant.blocks import BlockWeight

# ---- an independent little writer: everything is bytes, so that a test can put in what no writer would


def u32(n):
    return struct.pack("<I", n)


def u64(n):
    return struct.pack("<Q", n)


def text(s):
    raw = s if isinstance(s, bytes) else s.encode()
    return u64(len(raw)) + raw


def entry(key, kind, value):
    return text(key) + u32(kind) + value


def array(kind, count, items):
    return u32(kind) + u64(count) + items


def info(name, dims, kind, offset):
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def build(
    entries=(), infos=(), data=b"", *, magic=b"GGUF", version=3, n_entries=None, n_infos=None, alignment=32
):
    header = magic + u32(version) + u64(len(infos) if n_infos is None else n_infos)
    header += u64(len(entries) if n_entries is None else n_entries) + b"".join(entries) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + data


def pad(raw):
    return raw + bytes(-len(raw) % 32)


RNG = np.random.default_rng(0)
F32 = RNG.standard_normal((3, 32)).astype("<f4")
Q4_1 = struct.pack("<ee", 0.5, -3) + bytes(range(16)) + struct.pack("<ee", -2, 1) + bytes(range(16, 32))
KEYS = [
    entry("general.architecture", 8, text("llama")),
    entry("u8", 0, b"\xff"),
    entry("i8", 1, b"\xff"),
    entry("u16", 2, b"\xfe\xff"),
    entry("i16", 3, b"\xfe\xff"),
    entry("u32", 4, u32(2**32 - 1)),
    entry("i32", 5, struct.pack("<i", -7)),
    entry("f32", 6, struct.pack("<f", 0.1)),
    entry("yes", 7, b"\1"),
    entry("no", 7, b"\0"),
    entry("empty", 8, text("")),
    entry("ä", 8, text("ö\0ü")),
    entry("u64", 10, u64(2**64 - 1)),
    entry("i64", 11, struct.pack("<q", -(2**63))),
    entry("f64", 12, struct.pack("<d", 0.1)),
    entry("tokens", 9, array(8, 3, text("a") + text("") + text("▁c"))),
    entry("scores", 9, array(6, 2, struct.pack("<ff", -1.5, 2))),
    entry("bools", 9, array(7, 3, b"\1\0\1")),
    entry("none", 9, array(4, 0, b"")),
    entry("no strings", 9, array(8, 0, b"")),
    entry("nested", 9, array(9, 2, array(5, 2, struct.pack("<ii", 1, -2)) + array(8, 1, text("x")))),
]
INFOS = [
    info("norm.weight", [32], 0, 0),
    info("w", [32, 3], 0, 128),
    info("q", [32, 2], 3, 512),
    info("half", [2, 3], 1, 576),
    info("bf", [4, 1], 30, 608),
    info("cube", [2, 1, 2], 0, 640),
    info("k", [256, 1], 14, 672),
    info("q8", [32, 1], 8, 896),
    info("q4", [32, 1], 2, 960),
    info("future", [7, 7], 99, 992),
]
DATA_PARTS = list(
    map(
        pad,
        [
            F32[0].tobytes(),
            F32.tobytes(),
            Q4_1,
            np.arange(6, dtype="<f2").tobytes(),
            np.array([0x3F80, 0xC040, 0x0001, 0x8000], "<u2").tobytes(),
            np.arange(4, dtype="<f4").tobytes(),
            bytes(210),
            struct.pack("<e32b", 0.25, *range(-16, 16)),
            struct.pack("<e", 2) + bytes(range(16)),
            bytes(20),
        ],
    )
)
DATA = b"".join(DATA_PARTS)
VALID = build(KEYS, INFOS, DATA)


@pytest.fixture
def make(tmp_path):
    def write(raw):
        (tmp_path / "m.gguf").write_bytes(raw)
        return tmp_path / "m.gguf"

    return write


# ---- what is there is read


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_all_types(make, version):
    file = GGUFFile(make(build(KEYS, INFOS, DATA, version=version)))
    found = file.metadata
    assert file.version == version and len(found) == len(KEYS)
    plain = {
        "general.architecture": "llama",
        "u8": 255,
        "i8": -1,
        "u16": 65534,
        "i16": -2,
        "u32": 2**32 - 1,
        "i32": -7,
        "f32": float(np.float32(0.1)),
        "yes": True,
        "no": False,
        "empty": "",
        "ä": "ö\0ü",
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": np.float64(0.1),
        "tokens": ["a", "", "▁c"],
        "no strings": [],
    }
    for key, value in plain.items():
        assert found[key] == value and type(found[key]) is type(value), key
    assert (
        found["scores"].tolist() == [-1.5, 2]
        and found["scores"].dtype == np.float32
        and not found["scores"].flags.writeable
    )
    assert (
        found["bools"].tolist() == [True, False, True]
        and found["none"].dtype == np.uint32
        and found["none"].size == 0
    )
    numbers, words = found["nested"]
    assert numbers.tolist() == [1, -2] and words == ["x"]


def test_tensors_are_listed_with_numpys_shapes(make):
    tensors = GGUFFile(make(VALID)).tensors
    start = len(VALID) - len(DATA)
    assert list(tensors) == ["norm.weight", "w", "q", "half", "bf", "cube", "k", "q8", "q4", "future"]
    assert tensors["w"] == TensorInfo((3, 32), "F32", start + 128, 384)
    assert tensors["q"] == TensorInfo((2, 32), "Q4_1", start + 512, 40)
    assert tensors["cube"] == TensorInfo((2, 1, 2), "F32", start + 640, 16)
    assert tensors["k"] == TensorInfo((1, 256), "Q6_K", start + 672, 210)
    assert tensors["future"] == TensorInfo((7, 7), "type 99", start + 992, None)


def test_arrays_are_views_of_the_file_and_outlive_it(make):
    file = GGUFFile(make(VALID))
    w, half, bf, cube = (file.array(name) for name in ("w", "half", "bf", "cube"))
    again = file.array("w")
    assert np.shares_memory(w, again) and not w.flags.writeable and w.flags.aligned
    del file, again
    gc.collect()
    assert np.array_equal(w, F32) and w.dtype == np.float32
    assert half.tolist() == [[0, 1], [2, 3], [4, 5]] and half.dtype == np.float16
    assert bf.tolist() == [[1.0, -3.0, 2.0**-133, -0.0]] and bf.dtype == np.float32
    assert cube.tolist() == [[[0, 1]], [[2, 3]]]


def test_weights_are_blocks_of_the_file_or_dense_float32(make):
    file = GGUFFile(make(VALID))
    q, w, half, bf = (file.weight(name) for name in ("q", "w", "half", "bf"))
    assert (
        isinstance(q, BlockWeight)
        and q.quant_type == "Q4_1"
        and np.shares_memory(q.blocks, file.weight("q").blocks)
    )
    codes = [[j & 15 for j in range(16)] + [0] * 16, [j & 15 for j in range(16)] + [1] * 16]
    assert q.dense().tolist() == [[0.5 * c - 3 for c in codes[0]], [-2.0 * c + 1 for c in codes[1]]]
    assert file.weight("q8").dense().tolist() == [[q / 4 for q in range(-16, 16)]]
    assert file.weight("q4").dense().tolist() == [[2.0 * (q - 8) for q in range(16)] + [-16.0] * 16]
    for dense, shape in ((w, (3, 32)), (half, (3, 2)), (bf, (1, 4))):
        assert (
            isinstance(dense, DenseWeight)
            and dense.shape == shape
            and dense.dtype == np.float32
            and not dense.trainable
        )
    x = RNG.standard_normal((1, 32)).astype(np.float32)
    np.testing.assert_allclose(q.matmul(x), x @ q.dense().T, rtol=1e-5)
    assert np.array_equal(w.matmul(x), x @ F32.T)


def test_what_cannot_be_read_is_refused_only_when_it_is_asked_for(make):
    file = GGUFFile(make(VALID))
    for read, name, message in (
        (
            file.array,
            "k",
            r"m.gguf: tensor 'k' is Q6_K; array\(name\) reads F32, F16 and BF16; convert the file",
        ),
        (file.weight, "k", "tensor 'k' is Q6_K"),
        (file.weight, "future", "tensor 'future' is type 99"),
        (file.array, "q", r"tensor 'q' is Q4_1; .*; weight\(name\) reads it"),
        (file.weight, "norm.weight", r"tensor 'norm.weight' has shape \(32,\); a weight has two dimensions"),
        (file.weight, "cube", r"shape \(2, 1, 2\)"),
        (file.array, "nothing", r"no tensor 'nothing' among its 10 \(norm.weight, w, q, half, bf, …\)"),
    ):
        with pytest.raises(FileError, match=message):
            read(name)


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_other_alignments(make, alignment):
    key = entry("general.alignment", 4, u32(alignment))
    raw = build(
        [key],
        [info("a", [2], 0, 0), info("b", [2], 0, alignment)],
        bytes(alignment) + bytes(8),
        alignment=alignment,
    )
    file = GGUFFile(make(raw))
    assert (
        file.alignment == alignment and file.tensors["b"].offset == len(raw) - 8 and not file.array("b").any()
    )


def test_a_file_without_tensors_or_metadata(make):
    assert GGUFFile(make(build())).tensors == {}
    assert GGUFFile(make(build(KEYS[:1], alignment=1))).metadata == {"general.architecture": "llama"}


def test_gaps_and_any_order_are_fine(make):
    file = GGUFFile(
        make(
            build(
                (), [info("b", [1], 0, 64), info("a", [1], 0, 0)], bytes(64) + struct.pack("<f", 7) + b"more"
            )
        )
    )
    assert file.array("b").tolist() == [7] and list(file.tensors) == ["b", "a"]


def test_opening_is_quick_and_reads_no_tensor(make):
    """49,152 tokens and as many merges, a score each, over 64 MB of tensors."""
    tokens = b"".join(text(f"token{i}") for i in range(49152))
    keys = [entry(key, 9, array(8, 49152, tokens)) for key in ("tokens", "merges")]
    keys.append(entry("scores", 9, array(6, 49152, bytes(4 * 49152))))
    path = make(build(keys, [info("w", [2**20, 16], 0, 0)]))
    with open(path, "ab") as file:
        file.truncate(path.stat().st_size + 2**26)  # a hole: no disk is written
    start = time.perf_counter()
    opened = GGUFFile(path)
    assert time.perf_counter() - start < 2.0  # measured 0.16 s with both cores busy
    assert opened.metadata["tokens"][-1] == "token49151"
    del opened
    tracemalloc.start()
    GGUFFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


# ---- what lies is refused

ONE = [info("w", [32, 3], 0, 0)]
TOKENS = entry("t", 9, array(8, 1, text("a")))
CORRUPT = {
    "empty": (b"", "not a GGUF file: it begins with b''"),
    "foreign": (b"PK\x03\x04" + bytes(60), r"not a GGUF file: it begins with b'PK"),
    "short": (VALID[:20], "20 bytes long; a GGUF header has at least 24"),
    "version 1": (build(version=1), "version is 1; 2 and 3 are read"),
    "version 4": (build(version=4), "version is 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian; little-endian is read"),
    "big-endian magic": (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (build(n_infos=2**63), f"tensor count is {2**63}; at most 65536 are read"),
    "more tensors than bytes": (
        build((), ONE, bytes(384), n_infos=100),
        "tensor count is 100; .* 464 bytes .* are left",
    ),
    "one tensor more": (build(KEYS, ONE, bytes(384), n_infos=2), "length of name|name of tensor 1|tensor ''"),
    "many keys": (build(n_entries=2**64 - 1), f"metadata count is {2**64 - 1}"),
    "one key more": (build(KEYS, n_entries=len(KEYS) + 1), "length of key 21|key 21"),
    "key too long": (build([entry("k" * 65536, 0, b"\1")]), "length of key 0 is 65536; at most 65535"),
    "key beyond the end": (
        build([u64(500) + bytes(30)], n_entries=1),
        "length of key 0 is 500; .* bytes of the header are left",
    ),
    "key not UTF-8": (build([entry(b"a\xff", 0, b"\1")]), "key 0 is not UTF-8 .*at its byte 1"),
    "key twice": (build([KEYS[1], KEYS[1]]), "metadata 'u8' appears twice"),
    "type 13": (build([entry("k", 13, bytes(8))]), "metadata 'k' has type 13; the types are 0 to 12"),
    "bool 2": (build([entry("k", 7, b"\2")]), "metadata 'k' holds a bool that is 2"),
    "bool 3 in an array": (
        build([entry("k", 9, array(7, 2, b"\0\3"))]),
        "metadata 'k' holds a bool that is 3",
    ),
    "number cut": (
        build([entry("k", 10, b"\1")], alignment=1),
        "metadata 'k' takes 8 bytes from byte 37 on, .* has 38",
    ),
    "string of 2^64": (build([entry("k", 8, u64(2**64 - 1))]), f"length of metadata 'k' is {2**64 - 1}"),
    "string not UTF-8": (build([entry("k", 8, text(b"\xc3\x28"))]), "metadata 'k' is not UTF-8"),
    "array of type 77": (build([entry("k", 9, array(77, 1, bytes(8)))]), "metadata 'k' has type 77"),
    "array of 2^61 numbers": (
        build([entry("k", 9, array(10, 2**61, b""))]),
        f"length of metadata 'k' is {2**61}",
    ),
    "array of 2^40 strings": (
        build([entry("k", 9, array(8, 2**40, b""))]),
        f"length of metadata 'k' is {2**40}",
    ),
    "array cut": (
        build([entry("k", 9, array(4, 9, bytes(20)))], alignment=1),
        "length of metadata 'k' is 9; .* 20 bytes",
    ),
    "token not UTF-8": (build([entry("k", 9, array(8, 1, text(b"\xf0")))]), "metadata 'k' is not UTF-8"),
    "arrays 5 deep": (
        build([entry("k", 9, array(9, 1, array(9, 1, array(9, 1, array(9, 1, array(0, 0, b""))))))]),
        "arrays in arrays, more than 4 deep",
    ),
    "alignment 0": (
        build([entry("general.alignment", 4, u32(0))]),
        "general.alignment is 0; it must be a power of two",
    ),
    "alignment 4": (build([entry("general.alignment", 4, u32(4))]), "general.alignment is 4"),
    "alignment 24": (build([entry("general.alignment", 4, u32(24))]), "general.alignment is 24"),
    "alignment -8": (
        build([entry("general.alignment", 5, struct.pack("<i", -8))]),
        "general.alignment is -8",
    ),
    "alignment true": (build([entry("general.alignment", 7, b"\1")]), "general.alignment is True"),
    "alignment text": (build([entry("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
    "alignment list": (
        build([entry("general.alignment", 9, array(4, 1, u32(32)))]),
        r"general.alignment is array\(\[32\]",
    ),
    "tensor name too long": (
        build((), [info("n" * 65536, [1], 0, 0)], bytes(4)),
        "length of name of tensor 0 is 65536",
    ),
    "tensor name not UTF-8": (
        build((), [info(b"\x80", [1], 0, 0)], bytes(4)),
        "name of tensor 0 is not UTF-8",
    ),
    "tensor twice": (build((), [*ONE, info("w", [1], 0, 384)], bytes(388)), "tensor 'w' appears twice"),
    "no dimensions": (
        build((), [info("w", [], 0, 0)], bytes(32)),
        "tensor 'w' has 0 dimensions; there may be 1 to 4",
    ),
    "5 dimensions": (build((), [info("w", [1] * 5, 0, 0)], bytes(4)), "tensor 'w' has 5 dimensions"),
    "2^32 - 1 dimensions": (
        build((), [text("w") + u32(2**32 - 1) + bytes(32)]),
        "tensor 'w' has 4294967295 dimensions",
    ),
    "dimension 0": (
        build((), [info("w", [32, 0], 0, 0)], bytes(4)),
        r"'w' has shape \(0, 32\); dimensions must be positive",
    ),
    "dimension -1": (build((), [info("w", [2**64 - 1], 0, 0)], bytes(4)), "tensor 'w' has shape"),
    "product wraps to 0": (build((), [info("w", [2**32, 2**32], 0, 0)], bytes(4)), r"product below 2\^63"),
    "product wraps to 4": (build((), [info("w", [2**62 + 1, 4], 0, 0)], bytes(16)), r"product below 2\^63"),
    "half a block": (
        build((), [info("w", [48], 2, 0)], bytes(64)),
        "tensor 'w' has rows of 48; Q4_0 needs a multiple of 32",
    ),
    "offset not aligned": (
        build((), [info("w", [1], 0, 4)], bytes(64)),
        "tensor 'w' has offset 4; .* of the alignment 32",
    ),
    "offset beyond the end": (
        build((), [info("w", [1], 0, 64)], bytes(64)),
        "takes 4 bytes from byte 128 on, .* has 128",
    ),
    "offset of 2^64": (
        build((), [info("w", [1], 0, 2**64 - 32)], bytes(64)),
        "tensor 'w' takes 4 bytes from byte 1844",
    ),
    "unknown type beyond the end": (
        build((), [info("w", [1], 99, 640)], bytes(64)),
        "tensor 'w' takes 0 bytes from byte 704",
    ),
    "data cut": (
        build((), ONE, bytes(383)),
        "tensor 'w' takes 384 bytes from byte 96 on, but the file has 479",
    ),
    "no data": (build((), ONE), "tensor 'w' takes 384 bytes"),
    "overlap": (
        build((), [*ONE, info("v", [32], 0, 352)], bytes(480)),
        "tensor 'v' begins at byte 480, before the end of 'w' at 512",
    ),
    "same place": (
        build((), [*ONE, info("v", [1], 0, 0)], bytes(480)),
        "tensor 'v' begins at byte 128, before the end of 'w'",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_refused_by_name(make, case):
    raw, message = CORRUPT[case]
    with pytest.raises(FileError, match=message) as caught:
        GGUFFile(make(raw))
    assert str(caught.value).startswith(str(make(raw)))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FileError, match="no such file"):
            GGUFFile(path)


@pytest.mark.parametrize(
    ("name", "kind", "raw"),
    [("w", 0, struct.pack("<f", np.nan)), ("h", 1, struct.pack("<e", -np.inf)), ("b", 30, b"\x80\x7f")],
)
def test_nan_and_infinity_are_refused_when_read(make, name, kind, raw):
    file = GGUFFile(make(build((), [info(name, [4, 1], kind, 0)], raw * 4)))
    for read in (file.array, file.weight):
        with pytest.raises(FileError, match=f"tensor '{name}' holds NaN or infinity"):
            read(name)


def test_a_scale_that_is_not_finite_is_refused_when_read(make):
    raw = struct.pack("<e", np.inf) + bytes(16)
    file = GGUFFile(make(build((), [info("w", [32, 1], 2, 0)], raw)))
    with pytest.raises(FileError, match=r"m.gguf: tensor 'w': d of Q4_0 block \[0, 0\]=inf"):
        file.weight("w")


def test_the_limits_of_a_header(make, monkeypatch):
    path = make(VALID)
    monkeypatch.setattr(ours, "MAX_HEADER", 200)
    with pytest.raises(FileError, match="bytes of the header are left|but a header may have 200"):
        GGUFFile(path)
    monkeypatch.undo()
    monkeypatch.setattr(ours, "MAX_STRINGS", 3)
    with pytest.raises(FileError, match="metadata 'tokens' is 3; at most 0 are read"):
        GGUFFile(path)
    three = [entry("a", 8, text("")), entry("b", 8, text("")), entry("c", 8, text(""))]
    GGUFFile(make(build(three)))
    with pytest.raises(
        FileError, match="metadata 'd' is too much: at most 3 strings and 4096 arrays are read"
    ):
        GGUFFile(make(build([*three, entry("d", 8, text(""))])))


def test_a_crowd_of_empty_arrays_is_refused_at_once(make):
    """Each takes 12 bytes in the file and 600 in Python."""
    path = make(build([entry("k", 9, array(9, 2**20, array(4, 0, b"") * 2**20))]))
    with pytest.raises(FileError, match="length of metadata 'k' is 1048576; at most 4095 are read"):
        GGUFFile(path)
    inner = array(9, 2**11, array(4, 0, b"") * 2**11)
    with pytest.raises(FileError, match="length of metadata 'k' is 2048; at most 20[0-9][0-9] are read"):
        GGUFFile(make(build([entry("k", 9, array(9, 2, inner * 2))])))


def test_a_huge_count_takes_no_memory(make):
    """Each field of 8 bytes in turn says 2^62: nothing of that size is asked for."""
    tracemalloc.start()
    for at in range(8, len(VALID) - len(DATA), 5):
        survives(make(VALID[:at] + u64(2**62) + VALID[at + 8 :]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def survives(path):
    """A file is refused as a whole, or opens and each tensor is read or refused; nothing else happens."""
    try:
        file = GGUFFile(path)
    except FileError as error:
        assert str(error).startswith(str(path))
        return False
    for name in file.tensors:
        for read in (file.array, file.weight):
            try:
                found = read(name)
            except FileError:
                continue
            dense = found if isinstance(found, np.ndarray) else found.dense()
            assert dense.shape == file.tensors[name].shape and dense.dtype.kind == "f"
    return True


def mutations():
    header = len(VALID) - len(DATA)
    at = st.one_of(st.integers(0, header - 1), st.integers(0, len(VALID) - 1))
    huge = st.sampled_from(
        [0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, len(VALID), len(VALID) - 1]
    )
    return st.lists(
        st.one_of(
            st.tuples(st.just("flip"), at, st.integers(1, 255)),
            st.tuples(st.just("field"), at, huge),
            st.tuples(st.just("cut"), at, st.just(0)),
            st.tuples(st.just("insert"), at, st.integers(1, 40)),
            st.tuples(st.just("remove"), at, st.integers(1, 40)),
            st.tuples(st.just("extend"), st.just(0), st.integers(1, 99)),
        ),
        min_size=1,
        max_size=3,
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations())
def test_mutated_files_are_refused_or_read(tmp_path, changes):
    raw = VALID
    for kind, at, value in changes:
        if kind == "flip" and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ value]) + raw[at + 1 :]
        elif kind == "field":
            raw = raw[:at] + u64(value) + raw[at + 8 :]
        elif kind == "cut":
            raw = raw[:at]
        elif kind == "insert":
            raw = raw[:at] + bytes(range(value)) + raw[at:]
        elif kind == "remove":
            raw = raw[:at] + raw[at + value :]
        else:
            raw += bytes(value)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    survives(path)


def test_every_cut_is_refused_or_read(make):
    whole = [keep for keep in range(0, len(VALID), 7) if survives(make(VALID[:keep]))]
    assert all(keep >= len(VALID) - 32 for keep in whole)  # only what pads the last tensor may be missing


# ---- writing; that the gguf package reads what is written is among the peers


def test_what_was_read_is_written_again_byte_by_byte(make, tmp_path):
    """The file that the little writer above made, with metadata of all types: empty and nested arrays too."""
    readable = [
        (i, d) for i, d in zip(INFOS, DATA_PARTS, strict=True) if i not in (INFOS[4], INFOS[6], INFOS[9])
    ]
    infos, at = [], 0
    for old, raw in readable:
        infos.append(old[:-8] + u64(at))
        at += len(raw)
    original = build(
        [*KEYS, entry("general.quantization_version", 4, u32(2))], infos, b"".join(raw for _, raw in readable)
    )
    file = GGUFFile(make(original))
    tensors = {
        name: file.weight(name) if info.type.startswith("Q") else file.array(name)
        for name, info in file.tensors.items()
    }
    metadata = {key: file.entry(key) for key in file.metadata if key != "general.architecture"}
    assert write_gguf(tmp_path / "again.gguf", tensors, metadata) == {}
    assert (tmp_path / "again.gguf").read_bytes() == original
