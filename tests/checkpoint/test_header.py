"""Every rule of the safetensors format: a result or HeaderError, nothing else."""

from contextlib import suppress

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mfptq.checkpoint.header import ShardHeader, TensorSpec, encode_header, header_length, parse_header
from mfptq.dtypes import DTYPE_BITS
from mfptq.errors import HeaderError
from tests.conftest import sampled
from tests.faults.malformed import BAD, entry, read, shard

PARTS = sampled([0], [1, 2, 3])  # of the examples: each part draws its own


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.case(bad.case)) for name, bad in BAD.items()])
def test_malformed_headers_are_refused(name: str) -> None:
    with pytest.raises(HeaderError) as caught:
        read(BAD[name].blob)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("cut", range(0, 120, 7))
@pytest.mark.case(22)
def test_truncated_anywhere(cut: int) -> None:
    blob = shard({"a": entry(shape=(16,), offsets=(0, 64))}, 64)
    with pytest.raises(HeaderError):
        read(blob[: len(blob) - 1 - cut])


@pytest.mark.parametrize("name", ["", "a/b", "../x", "\0", "\u202eabc", "🙂", "é", "e\u0301", "a" * 1024])
@pytest.mark.case(32)
def test_names_are_data(name: str) -> None:
    assert read(shard({name: entry()}, 8)).tensors[0].name == name


def test_canonical_zero_size_is_accepted() -> None:
    header = read(shard({"a": entry(), "b": entry(shape=(0,), offsets=(8, 8))}, 8))
    assert [tensor.nbytes for tensor in header.tensors] == [8, 0]


@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=75, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_give_a_result_or_header_error(part: int, raw: bytes, size: int) -> None:
    with suppress(HeaderError):
        assert isinstance(parse_header(raw, size), ShardHeader)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "__metadata__", "dtype", "b"]), json_values, max_size=3))
def test_any_json_gives_a_result_or_header_error(part: int, value: dict) -> None:
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


def test_too_many_tensors(monkeypatch) -> None:
    from mfptq.checkpoint import header

    blob = shard({"a": entry(), "b": entry(offsets=(8, 16))}, 16)
    monkeypatch.setattr(header, "MAX_TENSORS", 2)
    assert len(read(blob).tensors) == 2
    monkeypatch.setattr(header, "MAX_TENSORS", 1)
    with pytest.raises(HeaderError, match="2 tensors, expected at most 1"):
        read(blob)


def test_limits_are_exact() -> None:
    assert read(shard({"a" * 1024: entry(shape=(1,) * 7 + (2,))}, 8)).tensors[0].shape == (1, 1, 1, 1, 1, 1, 1, 2)
    assert header_length((100_000_000).to_bytes(8, "little"), 100_000_008) == 100_000_000
    with pytest.raises(HeaderError, match="at most 100000000"):
        header_length((100_000_001).to_bytes(8, "little"), 2**40)
    assert read(shard({"a": entry(shape=(2**63 - 1, 0), offsets=(0, 0))})).data_bytes == 0
    assert (read(shard({})).tensors, read(shard({})).data_bytes) == ((), 0)
    assert header_length(bytes(8), 8) == 0
    with pytest.raises(HeaderError, match="7 bytes, need at least 8"):
        header_length(bytes(7), 7)
    with pytest.raises(HeaderError, match="need at least 8"):
        header_length(bytes(7), 100)


def test_a_header_says_where_the_data_lies() -> None:
    blob = shard({"__metadata__": {"a": "b"}, "x": entry(offsets=(8, 16)), "y": entry()}, 16)
    found = read(blob)
    assert found.data_start == len(blob) - 16
    assert found.data_bytes == 16
    assert found.metadata == {"a": "b"}
    assert [(t.name, t.start, t.end, t.nbytes) for t in found.tensors] == [("y", 0, 8, 8), ("x", 8, 16, 8)]
    assert read(shard(None, raw=b"{}      ")).metadata == {}


MESSAGES = {
    "overlap": "overlaps the tensor before it", "hole": "leaves a hole before it", "past_end": r"hold|only|truncated",
    "trailing": "bytes that belong to no tensor", "one_past_end": "truncated", "duplicate": "appears twice",
    "unknown_dtype": "unsupported dtype 'F7'", "digits": "5000 digits", "not_utf8": "not UTF-8 at byte 2",
    "nested": "nested too deeply", "nan": "NaN is not JSON", "overflowing_float": "out of range",
    "leading_space": "does not begin with", "metadata": "not an object of strings", "disagree": "needs 4 bytes",
    "surrogate": "not valid Unicode", "long_name": "longer than 1024 bytes", "reversed": "begin <= end",
    "nine_dimensions": "at most 8 whole numbers", "extra_key": "expected exactly dtype, shape and data_offsets",
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_a_refusal_names_the_rule(name: str) -> None:
    with pytest.raises(HeaderError, match=MESSAGES[name]):
        read(BAD[name].blob)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_dtypes_are_those_of_the_format_authority(dtype: str) -> None:
    head, header = encode_header([TensorSpec("a", dtype, (16,))])
    blob = head + bytes(header.data_bytes)
    [(name, found)] = safetensors.deserialize(blob)
    assert (name, found["dtype"], found["shape"], len(found["data"])) == ("a", dtype, [16], 2 * DTYPE_BITS[dtype])
    assert read(blob) == header
