"""Every rule of the safetensors format: a result or HeaderError, nothing else."""

from contextlib import suppress

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mfptq.errors import HeaderError
from mfptq.header import ShardHeader, TensorSpec, encode_header, parse_header
from tests.faults.malformed import BAD, entry, read, shard


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
