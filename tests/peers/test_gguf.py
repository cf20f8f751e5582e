"""The gguf package as oracle: its files read by us, ours by it, its quantizers byte by byte, its decoders bit
by bit."""

from __future__ import annotations

import time

import numpy as np
import pytest

from minilora.formats.gguf import GGML_TYPES, GGUFFile
from minilora.formats.gguf_writer import write_gguf
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.affine import AffineWeight
from minilora.quant.blocks import BlockWeight

gguf = pytest.importorskip("gguf")

TYPES = ("Q4_0", "Q4_1", "Q8_0")
EPS = np.finfo(np.float32).eps


def matrix(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def kind(name):
    return gguf.GGMLQuantizationType[name]


def same_bits(a, b):
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def hard_inputs(trial, rng):
    """Matrices of 5 rows and 96 columns: random, of any size, of ties, sparse, subnormal, zeros of both
    signs."""
    w = rng.standard_normal((5, 96)).astype(np.float32)
    match trial % 6:
        case 1:
            w = (w * 10.0 ** rng.integers(-45, 4)).astype(np.float32)
        case 2:
            w = rng.integers(-20, 20, w.shape).astype(np.float32) / np.float32(rng.choice([1, 2, 4, 7]))
        case 3:
            w *= rng.random(w.shape) < 0.1
        case 4:
            w = rng.integers(-300, 300, w.shape).astype(np.float32) * np.float32(1e-45)
        case 5:
            w = np.copysign(np.float32(0), w)
            w[rng.integers(5)] = rng.choice([0, 1e-40, 1])
    return w


@pytest.mark.parametrize("quant_type", TYPES)
def test_quantize_gives_their_bytes_and_dense_their_bits(quant_type):
    rng = np.random.default_rng(1)
    for trial in range(600):
        w = hard_inputs(trial, rng)
        ours, theirs = BlockWeight.quantize(w, quant_type), gguf.quants.quantize(w, kind(quant_type))
        assert np.array_equal(ours.blocks, theirs), trial
        assert same_bits(ours.dense(), gguf.quants.dequantize(theirs, kind(quant_type))), trial


@pytest.mark.parametrize("quant_type", TYPES)
def test_any_bytes_decode_to_their_bits(quant_type):
    raw = np.random.default_rng(2).integers(
        0, 256, (256, 8, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[quant_type]), np.uint8
    )
    raw[..., 1] &= 0xBF  # finite
    raw[..., 3] &= 0xBF if quant_type == "Q4_1" else 0xFF
    raw = raw.reshape(256, -1)
    assert same_bits(
        BlockWeight(raw, quant_type, (256, 256)).dense(), gguf.quants.dequantize(raw, kind(quant_type))
    )


@pytest.mark.parametrize(("out", "in_"), [(1, 32), (5, 96), (64, 256)])
def test_int4_in_groups_of_32_is_q4_1(out, in_):
    weight = AffineWeight.quantize(matrix(out, in_, seed=out), bits=4, group_size=32)
    block, change = BlockWeight.from_affine(weight)
    theirs = gguf.quants.dequantize(block.blocks, kind("Q4_1"))
    # d·q is exact in float32 (11 bits times 4), so that d·q + m is rounded once, however it is computed
    assert change == 0 and same_bits(weight.dense(), theirs) and same_bits(block.dense(), theirs)


def test_types_and_sizes_are_theirs():
    theirs = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {number: theirs[number] for number in theirs if number in GGML_TYPES} == {
        number: sizes for number, sizes in GGML_TYPES.items() if number in theirs
    }
    assert len(set(theirs) & set(GGML_TYPES)) >= 30


@pytest.fixture
def their_file(tmp_path):
    """All types that we read, and one that we do not, and metadata of all types."""
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "uint8": 200,
        "int8": -2,
        "uint16": 60000,
        "int16": -3,
        "uint32": 2**32 - 1,
        "int32": -4,
        "uint64": 2**64 - 1,
        "int64": -(2**60),
        "float32": 0.1,
        "float64": 0.1,
        "bool": True,
        "string": "ä▁",
    }.items():
        getattr(writer, f"add_{name}")(f"k.{name}", value)
    writer.add_token_list(["<s>", "▁a", "\n"])
    writer.add_token_scores([0.5, -1.0, 3.0])
    writer.add_token_types([1, 3, 6])
    writer.add_array("k.floats", [1.5, 2.5])
    writer.add_array("k.bools", [True, False])
    w = matrix(6, 256)
    writer.add_tensor("F32", w)
    writer.add_tensor("F16", w.astype(np.float16))
    writer.add_tensor("vector", w[0])
    writer.add_tensor("cube", matrix(2, 3, 32))
    for name in ("BF16", *TYPES):
        writer.add_tensor(name, gguf.quants.quantize(w, kind(name)), raw_dtype=kind(name))
    writer.add_tensor("Q6_K", np.zeros((6, 210), np.uint8), raw_dtype=kind("Q6_K"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_we_read_their_file_as_they_do(their_file):
    ours, theirs = GGUFFile(their_file), gguf.GGUFReader(their_file)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields) and len(fields) == 18
    for name, field in fields.items():
        found = ours.metadata[name]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), name
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    x, dy = matrix(3, 256, seed=1), matrix(3, 6, seed=2)
    for t in theirs.tensors:
        info = ours.tensors[t.name]
        assert info.shape == tuple(t.shape.tolist()[::-1]) and info.type == t.tensor_type.name
        assert (info.offset, info.nbytes) == (t.data_offset, t.n_bytes)
        if info.type == "Q6_K":
            with pytest.raises(ValueError, match="'Q6_K' is Q6_K"):
                ours.weight(t.name)
            continue
        expected = gguf.quants.dequantize(t.data, t.tensor_type).reshape(info.shape)
        if info.type in ("F32", "F16", "BF16"):
            assert same_bits(ours.array(t.name).astype(np.float32), expected)
        if len(info.shape) == 2:
            weight = ours.weight(t.name)
            assert same_bits(np.ascontiguousarray(weight.dense()), expected)
            for product, a, b in (
                (weight.matmul(x), x, expected.T),
                (weight.matmul(x[:1]), x[:1], expected.T),
                (weight.matmul_t(dy), dy, expected),
            ):
                exact = a.astype(np.float64) @ b
                assert (
                    np.abs(product - exact) <= (len(b) + 1) * EPS * (np.abs(a).astype(np.float64) @ np.abs(b))
                ).all()


def test_they_read_our_file(tmp_path):
    w = matrix(6, 64)
    affine = AffineWeight.quantize(w, 4, 32)
    merged = affine.with_offset(affine.offset + matrix(6, 2, scale=0.01, seed=1))
    tensors = {
        "dense": DenseWeight(Parameter("dense", w)),
        "half": w.astype(np.float16),
        "norm": w[0],
        "turned": w.T,
        "affine": affine,
        "merged": merged,
        **{t: BlockWeight.quantize(w, t) for t in TYPES},
    }
    metadata = {
        "llama.block_count": 3,
        "eps": 1e-5,
        "flag": True,
        "name": "ä",
        "nothing": "",
        "negative": -5,
        "large": 2**40,
        "largest": 2**63,
        "double": np.float64(0.1),
        "byte": np.uint8(7),
        "far": 1e300,
        "tokens": ["a", "b\0", ""],
        "ids": [1, -2],
        "wide": [1, 2**40],
        "scores": [0.1, 2.0],
        "exact": np.array([1, 2], np.uint16),
        "flags": [True, False],
    }
    path = tmp_path / "ours.gguf"
    changes = write_gguf(path, tensors, metadata)
    assert changes["affine"] == 0 < changes["merged"] < 2**-10 and set(changes) == {"affine", "merged"}
    reader, ours = gguf.GGUFReader(path), GGUFFile(path)
    expected = {
        "dense": w,
        "half": w.astype(np.float16).astype(np.float32),
        "norm": w[0],
        "turned": w.T,
        "affine": affine.dense(),
        "merged": BlockWeight.from_affine(merged)[0].dense(),
        **{t: tensors[t].dense() for t in TYPES},
    }
    assert [t.name for t in reader.tensors] == list(tensors) == list(ours.tensors)
    for t in reader.tensors:
        theirs = gguf.quants.dequantize(t.data, t.tensor_type).reshape(expected[t.name].shape)
        assert np.array_equal(theirs, expected[t.name]), t.name
        assert ours.tensors[t.name].offset == t.data_offset
        if t.name in TYPES:
            assert np.array_equal(ours.weight(t.name).blocks, tensors[t.name].blocks)
    kinds = {
        name: [v.name for v in field.types]
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert kinds == {
        "general.architecture": ["STRING"],
        "general.quantization_version": ["UINT32"],
        "llama.block_count": ["UINT32"],
        "eps": ["FLOAT32"],
        "flag": ["BOOL"],
        "name": ["STRING"],
        "nothing": ["STRING"],
        "negative": ["INT32"],
        "large": ["INT64"],
        "largest": ["UINT64"],
        "double": ["FLOAT64"],
        "byte": ["UINT8"],
        "far": ["FLOAT64"],
        "tokens": ["ARRAY", "STRING"],
        "ids": ["ARRAY", "INT32"],
        "wide": ["ARRAY", "INT64"],
        "scores": ["ARRAY", "FLOAT32"],
        "exact": ["ARRAY", "UINT16"],
        "flags": ["ARRAY", "BOOL"],
    }
    for name, value in metadata.items():
        found = ours.metadata[name]
        plain = found.tolist() if isinstance(found, np.ndarray) else found
        assert plain == reader.fields[name].contents()
        np.testing.assert_array_equal(plain, np.float32(value) if kinds[name][-1] == "FLOAT32" else value)


def test_our_file_with_another_alignment(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"a": matrix(1, 3), "b": matrix(2, 32)}, {"general.alignment": 4096})
    reader, ours = gguf.GGUFReader(tmp_path / "m.gguf"), GGUFFile(tmp_path / "m.gguf")
    assert ours.alignment == reader.alignment == 4096 and ours.tensors["b"].offset % 4096 == 0
    assert np.array_equal(reader.tensors[1].data, matrix(2, 32)) and np.array_equal(
        ours.array("b"), matrix(2, 32)
    )


def test_what_is_read_can_be_written_again(their_file, tmp_path):
    first = GGUFFile(their_file)
    tensors = {
        n: first.weight(n) if len(i.shape) == 2 else first.array(n)
        for n, i in first.tensors.items()
        if i.type != "Q6_K"
    }
    write_gguf(tmp_path / "again.gguf", tensors, first.metadata)
    second = GGUFFile(tmp_path / "again.gguf")
    for name in TYPES:
        assert np.array_equal(second.weight(name).blocks, first.weight(name).blocks)
    assert {k: np.asarray(v).tolist() for k, v in second.metadata.items()} == {
        "general.quantization_version": 2
    } | {k: np.asarray(v).tolist() for k, v in first.metadata.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"w": np.ones(3)}, {}, "w='float64': must be float32 or float16"),
        ({"w": np.ones((1,) * 5, np.float32)}, {}, r"w=\(1, 1, 1, 1, 1\): must have 1 to 4 dimensions"),
        ({"w": np.ones((0, 2), np.float32)}, {}, "none of them 0"),
        ({"w": np.array([np.inf], np.float32)}, {}, "must be finite"),
        ({"n" * 64: np.ones(3, np.float32)}, {}, "a name has 1 to 63 bytes"),
        ({"w": AffineWeight.quantize(matrix(2, 32), 3, 32)}, {}, "bits=3"),
        ({}, {"k": []}, r"k=\[\]: must be a string, a number, or a list"),
        ({}, {"k": None}, "k=None"),
        ({}, {"k": ["a", 1]}, "k=.*'a', 1"),
        ({}, {"k": [[1, 2], [3, 4]]}, "k="),
        ({}, {"k": 2**64}, "k=18446744073709551616"),
        ({}, {"k": np.float16(1)}, "k="),
        ({}, {"general.alignment": 12}, "general.alignment=12: must be a power of two"),
        ({}, {"general.architecture": "qwen2"}, "arch='llama'"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_nothing_is_left(tmp_path, tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "m.gguf", tensors, metadata)
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"w": matrix(2, 32)}, {})
    before = path.read_bytes()

    def fails(array):
        raise OSError("disk full")

    monkeypatch.setattr(np, "ascontiguousarray", fails)  # with the header written, and no tensor yet
    with pytest.raises(OSError, match="disk full"):
        write_gguf(path, {"w": matrix(4, 32)}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_opening_a_vocabulary_is_quicker_than_theirs(tmp_path):
    """49,152 tokens with scores and types: measured 0.12 s against 2.8 s, best of several, with both cores
    busy."""
    path, n = tmp_path / "m.gguf", 49152
    tokens = {
        "tokenizer.ggml.tokens": [f"▁{i}" for i in range(n)],
        "tokenizer.ggml.scores": np.zeros(n, np.float32),
        "tokenizer.ggml.token_type": np.ones(n, np.int32),
    }
    write_gguf(path, {"w": matrix(2, 32)}, tokens)
    seconds = []
    for opens in (GGUFFile, gguf.GGUFReader):
        start = time.perf_counter()
        opens(path)
        seconds.append(time.perf_counter() - start)
    print(f"open: ours {seconds[0]:.3f} s, theirs {seconds[1]:.3f} s")
    assert seconds[0] < seconds[1]
