"""Malformed headers and checkpoints: named ones, every bit flipped, every length; and a mutator for fuzzing."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress

import safetensors

from mfptq.checkpoint.header import ShardHeader, TensorSpec, encode_header, header_length, parse_header
from mfptq.dtypes import DTYPE_BITS
from mfptq.errors import HeaderError
from tests.faults.warm import Tally


def shard(entries: object, data: int = 0, *, raw: bytes | None = None) -> bytes:
    """Return a shard with the given header, right or wrong, and `data` zero bytes."""
    text = raw if raw is not None else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def read(blob: bytes) -> ShardHeader:
    """Parse a shard in memory, as a file of those bytes is read."""
    length = header_length(blob[:8], len(blob))
    return parse_header(blob[8 : 8 + length], len(blob))


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    """Return a tensor's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


_ONE = json.dumps(entry()).encode()

BAD: dict[str, bytes] = {
    "01_empty": b"",
    "02_seven_bytes": b"\0" * 7,
    "03_huge_length": struct.pack("<Q", 2**64 - 1) + b"{}",
    "03_half_of_all": struct.pack("<Q", 2**63) + b"{}",
    "04_one_past_end": struct.pack("<Q", 3) + b"{}",
    "05_over_limit": struct.pack("<Q", 100_000_001) + b"{}",
    "06_spaces": shard(None, raw=b" " * 1000),
    "07_cut_json": shard(None, raw=b'{"a":{"dtype"'),
    "07_no_json": shard(None, raw=b""),
    "07_only_brace": shard(None, raw=b"{"),
    "07_two_objects": shard(None, raw=b"{}{}"),
    "07_comma": shard(None, raw=b'{"__metadata__":{},}'),
    "08_not_utf8": shard(None, raw=b'{"\xff":1}'),
    "08_overlong": shard(None, raw=b'{"\xc0\xaf":1}'),
    "08_utf16": shard(None, raw="{}".encode("utf-16")),
    "08_bom": shard(None, raw=b"\xef\xbb\xbf{}"),
    "09_surrogate": shard({"\ud800": entry()}, 8),
    "10_array": shard([], 0),
    "10_number": shard(12345678),
    "10_string": shard("{}"),
    "10_null": shard(None),
    "11_duplicate": shard(None, 8, raw=b'{"a":%s,"a":%s}' % (_ONE, _ONE)),
    "11_duplicate_escaped": shard(None, 8, raw=b'{"a":%s,"\\u0061":%s}' % (_ONE, _ONE)),
    "12_inner_duplicate": shard(None, 8, raw=b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "13_nan": shard({"a": entry(shape=(float("nan"),))}, 8),
    "13_infinity": shard({"a": entry(shape=(float("inf"),))}, 8),
    "13_overflowing_float": shard(None, 8, raw=b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'),
    "13_float": shard({"a": entry(shape=(2.0,))}, 8),
    "13_exponent": shard(None, 8, raw=b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}'),
    "13_bool": shard({"a": entry(shape=(True, 2))}, 8),
    "13_text": shard({"a": entry(shape=("2",))}, 8),
    "13_negative": shard({"a": entry(shape=(-2, -1))}, 8),
    "13_negative_zero_offset": shard({"a": entry(offsets=(-8, 0))}, 8),
    "13_float_offset": shard({"a": entry(offsets=(0, 8.0))}, 8),
    "13_bool_offset": shard({"a": entry(dtype="U8", shape=(1,), offsets=(False, True))}, 1),
    "14_digits": shard(None, raw=b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000)),
    "14_twenty_digits": shard(None, raw=b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 20)),
    "14_above_limit": shard({"a": entry(shape=(2**63,))}, 8),
    "15_nested": shard(None, raw=b'{"a":' + b"[" * 200_000),
    "15_nested_objects": shard(None, raw=b'{"a":' * 100_000),
    "16_overlap": shard({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "16_same_range": shard({"a": entry(), "b": entry()}, 8),
    "17_hole": shard({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "17_hole_first": shard({"a": entry(offsets=(8, 16))}, 16),
    "18_reversed": shard({"a": entry(offsets=(8, 0))}, 8),
    "19_past_end": shard({"a": entry()}, 4),
    "20_trailing": shard({"a": entry()}, 9),
    "20_trailing_no_tensors": shard({}, 1),
    "23_overflow": shard({"a": entry(shape=(2**32, 2**32))}, 8),
    "23_overflow_to_zero": shard({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "24_zero_product": shard({"a": entry(shape=(2**62, 0))}, 8),
    "25_disagree": shard({"a": entry(dtype="F16")}, 8),
    "26_unknown_dtype": shard({"a": entry(dtype="F7")}, 8),
    "26_dtype_list": shard({"a": entry(dtype=["F32"])}, 8),
    "26_lower_case": shard({"a": entry(dtype="f32")}, 8),
    "27_odd_f4": shard({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, 1),
    "27_odd_f6": shard({"a": entry(dtype="F6_E2M3", shape=(3,), offsets=(0, 2))}, 2),
    "28_metadata": shard({"__metadata__": {"a": 1}}),
    "28_metadata_null": shard({"__metadata__": None}),
    "28_metadata_list": shard({"__metadata__": []}),
    "28_metadata_nested": shard({"__metadata__": {"a": {"b": "c"}}}),
    "28_metadata_is_a_tensor": shard({"__metadata__": entry()}, 8),
    "30_leading_space": shard(None, raw=b" {}"),
    "30_leading_newline": shard(None, raw=b"\n{}"),
    "31_zero_size_inside": shard({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, 8),
    "31_zero_size_past_end": shard({"a": entry(), "b": entry(shape=(0,), offsets=(9, 9))}, 8),
    "32_long_name": shard({"a" * 1025: entry()}, 8),
    "32_long_name_in_bytes": shard({"é" * 513: entry()}, 8),
    "extra_key": shard({"a": {**entry(), "more": 1}}, 8),
    "missing_key": shard({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "entry_is_null": shard({"a": None}),
    "entry_is_a_list": shard({"a": [1, 2]}),
    "shape_is_a_number": shard({"a": entry(shape=2)}, 8),
    "shape_is_an_object": shard({"a": entry(shape={})}, 8),
    "three_offsets": shard({"a": entry(offsets=(0, 4, 8))}, 8),
    "one_offset": shard({"a": entry(offsets=(8,))}, 8),
    "nine_dimensions": shard({"a": entry(shape=(1,) * 8 + (2,))}, 8),
}  # fmt: skip


def valid() -> bytes:
    """Return a small valid shard of several dtypes."""
    specs = [
        TensorSpec("model.layers.0.q_proj.weight", "BF16", (4, 16)), TensorSpec("a", "F32", ()),
        TensorSpec("é", "F4", (2, 16)), TensorSpec("empty", "I64", (0, 3)), TensorSpec("b", "U8", (3,)),
    ]  # fmt: skip
    head, header = encode_header(specs)
    return head + bytes(header.data_bytes)


def outcome(blob: bytes) -> str:
    """Return "" if a shard is read, or the refusal with its numbers and quotes removed; what the reader must not do, raises.

    What we accept, safetensors must accept too, as long as it is small enough to give it.
    """
    try:
        header = read(blob)
    except HeaderError as error:
        text = str(error)
        assert "\n" not in text
        assert text.isprintable()
        assert len(text) < 1000
        return re.sub(r"'[^']*'|\d+", "#", text)[:60]
    assert header.data_start + header.data_bytes == len(blob)
    if len(blob) < 2**16:
        found = safetensors.deserialize(blob)
        assert {name for name, _ in found} == {info.name for info in header.tensors}
    return ""


def flips(blob: bytes) -> Iterator[bytes]:
    """Yield a shard with each bit of its header flipped, and cut off at each of its bytes."""
    end = 8 + int.from_bytes(blob[:8], "little")
    for place in range(end * 8):
        changed = bytearray(blob)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)
    for cut in range(len(blob)):
        yield blob[:cut]


def malformed_headers() -> Tally:
    """Try every named malformed header, and every flip and cut of a valid one."""
    tally = Tally()
    for name, blob in BAD.items():
        tally.tried["malformed shards, named"] += 1
        tally.check(_refused(blob), f"malformed {name} was accepted")
    for blob in flips(valid()):
        tally.tried["malformed shards, flipped or cut"] += 1
        try:
            outcome(blob)
        except BaseException as error:
            tally.broken.append(f"{error!r} for {blob!r}")
    return tally


def _refused(blob: bytes) -> bool:
    with suppress(HeaderError):
        read(blob)
        return False
    return True


_TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"true", b"NaN", b"-1", b"1e999", b"0", b"9223372036854775808",
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"\\ud800"', b'"a"', b"\xff", b" ", b"2.0", b"[0,8]",
    b"[" * 500, *(f'"{dtype}"'.encode() for dtype in DTYPE_BITS),
)  # fmt: skip


def mutate(blob: bytes, chance: random.Random, *, limit: int = 4096) -> bytes:
    """Return a shard changed in one to four ways; mostly with a right length again, so that the JSON is reached."""
    text, data = bytearray(blob[8 : 8 + int.from_bytes(blob[:8], "little")]), len(blob) % 64
    for _ in range(chance.randrange(1, 5)):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.choice((0, 1, 1, 2, 8, 40)))
        way = chance.randrange(6)
        if way == 0:
            text[start:end] = chance.choice(_TOKENS)
        elif way == 1:
            text[start:end] = b""
        elif way == 2:
            text[start:start] = text[start:end]
        elif way == 3 and text:
            text[min(start, len(text) - 1)] ^= 1 << chance.randrange(8)
        elif way == 4:
            numbers = list(re.finditer(rb"\d+", bytes(text)))
            if numbers:
                found = chance.choice(numbers)
                text[found.start() : found.end()] = str(
                    chance.choice((0, 1, 2, 4, 8, 16, 2**31, 2**62, 2**63))
                ).encode()
        else:
            data = chance.choice((0, 1, 2, 8, 12, 16, 64, 100, data))
    length = len(text) if chance.random() < 0.9 else chance.choice((0, 1, len(text) + 1, 2**32, 2**63, 100_000_001))
    return (struct.pack("<Q", length) + bytes(text) + bytes(data))[:limit]


def seeds() -> list[bytes]:
    """Return what fuzzing begins with."""
    return [valid(), shard({"a": entry()}, 8), shard({}), *(blob for blob in BAD.values() if len(blob) < 4096)]


def fuzz(count: int, seed: int, corpus: Iterable[bytes] = ()) -> Tally:
    """Try `count` mutated headers, mutating further whatever led to a refusal that was not seen before."""
    tally, chance = Tally(), random.Random(seed)
    known = [*seeds(), *corpus]
    seen: set[str] = set()
    for _ in range(count):
        blob = mutate(chance.choice(known), chance)
        tally.tried["fuzz inputs"] += 1
        try:
            found = outcome(blob)
        except BaseException as error:
            tally.broken.append(f"{error!r} for {blob!r}")
            continue
        if found not in seen:
            seen.add(found)
            known.append(blob)
    tally.notes["kinds of outcome"] = len(seen)
    return tally
