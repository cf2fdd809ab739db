"""Every rule of the safetensors format: a result or HeaderError, nothing else."""

import json
import struct
from contextlib import suppress

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mfptq.errors import HeaderError
from mfptq.header import ShardHeader, TensorSpec, encode_header, header_length, parse_header


def shard(entries: object, data: int = 0, *, raw: bytes | None = None) -> bytes:
    text = raw if raw is not None else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def read(blob: bytes) -> ShardHeader:
    length = header_length(blob[:8], len(blob))
    return parse_header(blob[8 : 8 + length], len(blob))


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD = {
    "01_empty": b"",
    "02_seven_bytes": b"\0" * 7,
    "03_huge_length": struct.pack("<Q", 2**64 - 1) + b"{}",
    "04_one_past_end": struct.pack("<Q", 3) + b"{}",
    "05_over_limit": struct.pack("<Q", 100_000_001) + b"{}",
    "06_spaces": shard(None, raw=b" " * 1000),
    "07_cut_json": shard(None, raw=b'{"a":{"dtype"'),
    "08_not_utf8": shard(None, raw=b'{"\xff":1}'),
    "09_surrogate": shard({"\ud800": entry()}, 8),
    "10_array": shard([], 0),
    "10_null": shard(None),
    "11_duplicate": shard(None, 8, raw=b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "12_inner_duplicate": shard(None, 8, raw=b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "13_nan": shard({"a": entry(shape=(float("nan"),))}, 8),
    "13_float": shard({"a": entry(shape=(2.0,))}, 8),
    "13_bool": shard({"a": entry(shape=(True, 2))}, 8),
    "13_negative": shard({"a": entry(shape=(-2, -1))}, 8),
    "14_digits": shard(None, raw=b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000)),
    "15_nested": shard(None, raw=b'{"a":' + b"[" * 200_000),
    "16_overlap": shard({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "17_hole": shard({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "18_reversed": shard({"a": entry(offsets=(8, 0))}, 8),
    "19_past_end": shard({"a": entry()}, 4),
    "20_trailing": shard({"a": entry()}, 9),
    "23_overflow": shard({"a": entry(shape=(2**32, 2**32))}, 8),
    "24_zero_product": shard({"a": entry(shape=(2**62, 0))}, 8),
    "25_disagree": shard({"a": entry(dtype="F16")}, 8),
    "26_unknown_dtype": shard({"a": entry(dtype="F7")}, 8),
    "27_odd_f4": shard({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, 1),
    "28_metadata": shard({"__metadata__": {"a": 1}}),
    "30_leading_space": shard(None, raw=b" {}"),
    "31_zero_size_inside": shard({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, 8),
    "32_long_name": shard({"a" * 1025: entry()}, 8),
    "extra_key": shard({"a": {**entry(), "more": 1}}, 8),
    "nine_dimensions": shard({"a": entry(shape=(1,) * 8 + (2,))}, 8),
}


@pytest.mark.parametrize("name", BAD)
def test_case_malformed(name: str) -> None:
    with pytest.raises(HeaderError) as caught:
        read(BAD[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_case_22_truncated_anywhere(cut: int) -> None:
    blob = shard({"a": entry(shape=(16,), offsets=(0, 64))}, 64)
    with pytest.raises(HeaderError):
        read(blob[: len(blob) - 1 - cut])


@pytest.mark.parametrize("name", ["", "a/b", "../x", "\0", "\u202eabc", "🙂", "é", "e\u0301", "a" * 1024])
def test_case_32_names_are_data(name: str) -> None:
    assert read(shard({name: entry()}, 8)).tensors[0].name == name


def test_canonical_zero_size_is_accepted() -> None:
    header = read(shard({"a": entry(), "b": entry(shape=(0,), offsets=(8, 8))}, 8))
    assert [tensor.nbytes for tensor in header.tensors] == [8, 0]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_give_a_result_or_header_error(raw: bytes, size: int) -> None:
    with suppress(HeaderError):
        assert isinstance(parse_header(raw, size), ShardHeader)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "__metadata__", "dtype", "b"]), json_values, max_size=3))
def test_any_json_gives_a_result_or_header_error(value: dict) -> None:
    blob = shard(value, 16)
    with suppress(HeaderError):
        read(blob)


def test_output_equals_the_format_authority() -> None:
    import numpy as np

    tensors = {
        "b.weight": np.ones((2, 3), np.float16), "a": np.ones(4, np.uint8), "c": np.ones((1,), np.float32),
        "é": np.zeros((0, 5), np.int64), 'quo"te\n': np.ones(2, np.bool_), "a.b": np.ones(3, np.int32),
    }  # fmt: skip
    names = {"float16": "F16", "uint8": "U8", "float32": "F32", "int64": "I64", "bool": "BOOL", "int32": "I32"}
    head, header = encode_header(TensorSpec(n, names[t.dtype.name], t.shape) for n, t in tensors.items())
    data = b"".join(tensors[info.name].tobytes() for info in header.tensors)
    assert head + data == save(tensors, {"format": "pt"})
    assert len(safetensors.deserialize(head + data)) == len(tensors)
