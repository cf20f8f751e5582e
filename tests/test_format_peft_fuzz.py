"""Adapter folders of strangers: whatever the two files hold, they are refused by FileError or give a valid
model."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from helpers import adapters, fill_adapters, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from minilora.config import LoraConfig, QuantConfig
from minilora.formats.files import FileError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.injection import inject_lora
from minilora.quant.model import quantize_model
from minilora.variants import DoraLinear, lora_of

DENSE = make_model(dtype=np.float32, trainable=False)
INT4 = quantize_model(DENSE, QuantConfig("int4", group_size=4))
CONFIGS = {
    "lora": (
        DENSE,
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=("q_proj", "lm_head"),
            use_rslora=True,
            rank_pattern={"lm_head": 2},
            alpha_pattern={"0.self_attn.q_proj": 7},
        ),
    ),
    "dora": (DENSE, LoraConfig(r=2, lora_alpha=5, target_modules=("v_proj", "up_proj"), use_dora=True)),
    "qalora": (INT4, LoraConfig(r=2, lora_alpha=5, target_modules=("q_proj", "down_proj"), use_qalora=True)),
}
MEMORY = 4 << 20
"""Bytes that reading may take: the base of these tests has 20 kB, its adapters less."""
SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
fuzz = settings(max_examples=80, deadline=None)
kinds = st.sampled_from(list(CONFIGS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A valid folder of each kind, and the bytes of its files."""

    class Folders(dict):
        __repr__ = object.__repr__  # hypothesis prints it

    found = Folders()
    for kind, (model, config) in CONFIGS.items():
        folder = tmp_path_factory.mktemp(kind)
        save_adapter(fill_adapters(inject_lora(model, config, np.random.default_rng(0))), config, folder)
        found[kind] = folder, (folder / SETTINGS).read_bytes(), (folder / TENSORS).read_bytes()
    return found


def survives(kind, folders, config=None, tensors=None):
    """Read a folder of these bytes: True if it gives a valid model, False if it is refused; anything else
    fails the test."""
    folder, *originals = folders[kind]
    (folder / SETTINGS).write_bytes(originals[0] if config is None else config)
    (folder / TENSORS).write_bytes(originals[1] if tensors is None else tensors)
    tracemalloc.start()
    try:
        model, loaded = load_adapter(CONFIGS[kind][0], folder)
    except FileError as error:
        assert str(folder) in str(error) and len(str(error)) < 3000
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
    for linear in adapters(model):
        own, lora = loaded.of(linear.name), lora_of(linear)
        assert lora.lora_A.data.shape == (own.r, linear.shape[1] // lora.pool)
        assert lora.lora_B.data.shape[1] == own.r
        assert np.isfinite(np.float32(lora.scaling))
        assert isinstance(linear, DoraLinear) == loaded.use_dora
        assert all(p.data.dtype == np.float32 and np.isfinite(p.data).all() for p in linear.trained())
    save_adapter(model, loaded, folder)  # what is valid is written, and comes back
    again, reloaded = load_adapter(CONFIGS[kind][0], folder)
    assert reloaded == loaded
    for p, q in zip(again.trainable(), model.trainable(), strict=True):
        assert p.name == q.name and np.array_equal(p.data, q.data)
    return True


# --- adapter_config.json ------------------------------------------------------------------------------------

NAMES = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    "lm_head",
    "v_proj",
    ".q_proj",
    "q_proj.",
    ".",
    "",
    "..",
    "proj",
    "all-linear",
    "a,b",
]
TEXT = st.sampled_from(
    NAMES + ["(a+)+$", ".*", "[", "\\", "^model", "é́", "\ud800", "\x00", "NaN", "LORA", "../x", "__class__"]
) | st.text(max_size=8)
NUMBERS = (
    st.sampled_from(
        [
            0,
            -1,
            1,
            2,
            3,
            16,
            17,
            10**9,
            2**63,
            -(2**63),
            10**25,
            10**400,
            -(10**400),
            0.0,
            -0.0,
            1.5,
            1e-320,
            1e30,
            3e38,
            1e39,
            1e308,
            float("nan"),
            float("inf"),
            float("-inf"),
        ]
    )
    | st.integers()
    | st.floats()
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
PATTERNS = st.dictionaries(st.sampled_from(NAMES) | TEXT, NUMBERS | SCALARS, max_size=3)
KEYS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "use_qalora",
    "rank_pattern",
    "bias",
    "alpha_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
    "peft_type",
    "modules_to_save",
    "layers_to_transform",
    "lora_bias",
    "alora_invocation_tokens",
    "inference_mode",
    "task_type",
    "exclude_modules",
    "loftq_config",
)


@fuzz
@given(
    kind=kinds,
    removed=st.sets(st.sampled_from(KEYS), max_size=2),
    changes=st.dictionaries(
        st.sampled_from(KEYS) | TEXT, JSON | PATTERNS | st.lists(TEXT, max_size=3), min_size=1, max_size=3
    ),
)
def test_any_settings_are_refused_or_valid(folders, kind, changes, removed):
    values = json.loads(folders[kind][1]) | changes
    survives(
        kind,
        folders,
        json.dumps({k: v for k, v in values.items() if k not in removed or k in changes}).encode(),
    )


@fuzz
@given(
    kind=kinds,
    field=st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"]),
    data=st.data(),
)
def test_any_number_or_name_where_one_belongs_is_refused_or_valid(folders, kind, field, data):
    values = {
        "r": NUMBERS,
        "lora_alpha": NUMBERS,
        "target_modules": st.lists(TEXT | SCALARS, max_size=3) | TEXT,
    }
    survives(
        kind,
        folders,
        json.dumps(json.loads(folders[kind][1]) | {field: data.draw(values.get(field, PATTERNS))}).encode(),
    )


DEEP = ["[" * 900 + "]" * 900, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "1" * 5000, "-" + "9" * 4000]


@pytest.mark.parametrize("deep", DEEP, ids=lambda text: text[:5])
@pytest.mark.parametrize(
    "field",
    [
        "r",
        "bias",
        "target_modules",
        "rank_pattern",
        "modules_to_save",
        "init_lora_weights",
        "peft_type",
        "lora_alpha",
        "lora_dropout",
        "unknown",
    ],
)
def test_deep_and_long_values_are_refused(folders, field, deep):
    assert not survives(
        "lora", folders, folders["lora"][1].replace(b"{", f'{{"{field}": {deep}, "x": '.encode(), 1)
    )
    values = {k: v for k, v in json.loads(folders["lora"][1]).items() if k != field}
    assert not survives("lora", folders, json.dumps(values)[:-1].encode() + f', "{field}": {deep}}}'.encode())


@fuzz
@given(raw=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_other_settings_file_is_refused(folders, raw):
    assert not survives("lora", folders, raw)


EDITS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.sampled_from(["set", "insert", "delete"]),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"9" * 20, b"[", b'"', b"-", b"\xff" * 8, b"F16", b"1e999"]),
    ),
    min_size=1,
    max_size=4,
)


def edited(raw, edits, within, keep):
    """Bytes set, inserted and deleted near the beginning, then cut."""
    raw = bytearray(raw)
    for at, how, new in edits:
        at %= min(within, len(raw)) or 1
        raw[at : at + (0 if how == "insert" else len(new))] = b"" if how == "delete" else new
    return bytes(raw[:keep])


@fuzz
@given(kind=kinds, edits=EDITS, keep=st.none() | st.integers(0, 1000))
def test_settings_of_changed_bytes_are_refused_or_valid(folders, kind, edits, keep):
    survives(kind, folders, edited(folders[kind][1], edits, 10**6, keep))


# --- adapter_model.safetensors ------------------------------------------------------------------------------


@fuzz
@given(kind=kinds, edits=EDITS, keep=st.none() | st.integers(0, 4000), everywhere=st.booleans())
def test_tensors_of_changed_bytes_are_refused_or_valid(folders, kind, edits, keep, everywhere):
    raw = folders[kind][2]
    header = 8 + int.from_bytes(raw[:8], "little")
    survives(kind, folders, tensors=edited(raw, edits, len(raw) if everywhere else header, keep))


SIZES = st.sampled_from([0, 1, 2, 3, 4, 16, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30]) | st.integers(
    0, 100
)
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F4",
    "I64",
    "I32",
    "I8",
    "U8",
    "U64",
    "BOOL",
    "C64",
    "X",
    "",
    None,
    4,
]


@fuzz
@given(kind=kinds, data=st.data())
def test_any_header_is_refused_or_valid(folders, kind, data):
    raw = folders[kind][2]
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        what = data.draw(
            st.sampled_from(["dtype", "shape", "data_offsets", "rename", "remove", "copy", "metadata", "any"])
        )
        if what == "remove":
            header.pop(name)
            if not header:
                break
        elif what in ("rename", "copy"):
            other = data.draw(
                TEXT | st.sampled_from(sorted(header)) | st.just(name.replace("lora_A", "lora_B"))
            )
            header[other] = header[name] if what == "copy" else header.pop(name)
        elif what == "metadata":
            text = data.draw(
                TEXT | st.sampled_from(['{"group_size": 4}', "{}", "[]", '{"group_size": NaN}', "[" * 9999])
            )
            header["__metadata__"] = {"minilora": text}
        elif what == "any":
            header[name] = data.draw(JSON)
        elif isinstance(header[name], dict) and name != "__metadata__":
            new = st.sampled_from(DTYPES) if what == "dtype" else st.lists(SIZES, max_size=4)
            header[name] = header[name] | {what: data.draw(new)}
    text = json.dumps(header).encode()
    survives(
        kind,
        folders,
        tensors=len(text).to_bytes(8, "little") + text + data.draw(st.just(body) | st.binary(max_size=40)),
    )


@fuzz
@given(kind=kinds, data=st.data())
def test_tensors_of_any_type_and_shape_are_refused_or_valid(folders, kind, data):
    """A whole safetensors file whose arrays are of other types, shapes and sizes, up to the ends of
    float64."""
    arrays = load(folders[kind][2])
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=2, unique=True)):
        a = arrays[name]
        dtype = data.draw(st.sampled_from(["f2", "f4", "f8", "i4", "u1", "?"]))
        shapes = [a.shape[::-1], (a.size,), (*a.shape, 1), (), (0,), (0, a.shape[-1])]
        shape = data.draw(st.just(a.shape) | st.sampled_from(shapes))
        value = data.draw(st.sampled_from([0.0, 1.0, -1.0, 1e-320, 6e4, 1e38, 1e39, 1e308]))
        with np.errstate(all="ignore"):
            arrays[name] = np.full(shape, value).astype(dtype)
    survives(
        kind, folders, tensors=save(arrays, {"minilora": '{"group_size": 4}'} if kind == "qalora" else None)
    )


def test_settings_of_any_length_are_not_read(folders):
    config = b'{"peft_type": "LORA", "target_modules": [' + b"[], " * 1_200_000 + b"[]]}"
    assert not survives("lora", folders, config)
    with pytest.raises(FileError, match=f"has {len(config)} bytes, at most 4000000 are read"):
        load_adapter(DENSE, folders["lora"][0])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* is not supported"),
        ({"exclude_modules": "lm_head"}, "exclude_modules='lm_head' is not supported"),
        ({"a_setting_of_tomorrow": True}, "a_setting_of_tomorrow=True is not supported"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights='OLoRA' changes the base weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' changes the base weights"),
        ({"use_dora": "no"}, "use_dora='no' must be true or false"),
        ({"target_modules": ["q_proj", 1]}, "target_modules=.* must be a name or a list of names"),
        ({"alpha_pattern": {"lm_head": 10**400}}, "must be at most 1e\\+18"),
        ({"lora_alpha": 1e30}, "must be at most 1e\\+18"),
    ],
)
def test_what_would_be_another_function_is_refused_by_name(folders, values, message):
    folder, config, tensors = folders["lora"]
    (folder / SETTINGS).write_text(json.dumps(json.loads(config) | values))
    (folder / TENSORS).write_bytes(tensors)
    with pytest.raises(FileError, match=message):
        load_adapter(DENSE, folder)


def test_a_tensor_beyond_float32_is_refused(folders):
    folder, config, tensors = folders["lora"]
    arrays = {k: a.astype(np.float64) for k, a in load(tensors).items()}
    (folder / SETTINGS).write_bytes(config)
    (folder / TENSORS).write_bytes(save(arrays))
    load_adapter(DENSE, folder)  # float64 in itself is welcome
    next(iter(arrays.values()))[0, 0] = 1e39
    (folder / TENSORS).write_bytes(save(arrays))
    with pytest.raises(FileError, match="holds numbers beyond float32"):
        load_adapter(DENSE, folder)


def test_the_folders_themselves_are_valid(folders):
    assert all(survives(kind, folders) for kind in CONFIGS)
