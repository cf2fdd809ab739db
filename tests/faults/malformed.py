"""Malformed headers and checkpoints: named ones, every bit flipped, every length; and a mutator for fuzzing."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Malformed:
    """A shard that must be refused, and the number of the case in docs/fault-model.md that it belongs to."""

    case: int
    blob: bytes


BAD: dict[str, Malformed] = {
    "empty": Malformed(1, b""),
    "seven_bytes": Malformed(2, b"\0" * 7),
    "huge_length": Malformed(3, struct.pack("<Q", 2**64 - 1) + b"{}"),
    "half_of_all": Malformed(3, struct.pack("<Q", 2**63) + b"{}"),
    "one_past_end": Malformed(4, struct.pack("<Q", 3) + b"{}"),
    "over_limit": Malformed(5, struct.pack("<Q", 100_000_001) + b"{}"),
    "spaces": Malformed(6, shard(None, raw=b" " * 1000)),
    "cut_json": Malformed(7, shard(None, raw=b'{"a":{"dtype"')),
    "no_json": Malformed(7, shard(None, raw=b"")),
    "only_brace": Malformed(7, shard(None, raw=b"{")),
    "two_objects": Malformed(7, shard(None, raw=b"{}{}")),
    "comma": Malformed(7, shard(None, raw=b'{"__metadata__":{},}')),
    "not_utf8": Malformed(8, shard(None, raw=b'{"\xff":1}')),
    "overlong": Malformed(8, shard(None, raw=b'{"\xc0\xaf":1}')),
    "utf16": Malformed(8, shard(None, raw="{}".encode("utf-16"))),
    "bom": Malformed(8, shard(None, raw=b"\xef\xbb\xbf{}")),
    "surrogate": Malformed(9, shard({"\ud800": entry()}, 8)),
    "array": Malformed(10, shard([], 0)),
    "number": Malformed(10, shard(12345678)),
    "string": Malformed(10, shard("{}")),
    "null": Malformed(10, shard(None)),
    "duplicate": Malformed(11, shard(None, 8, raw=b'{"a":%s,"a":%s}' % (_ONE, _ONE))),
    "duplicate_escaped": Malformed(11, shard(None, 8, raw=b'{"a":%s,"\\u0061":%s}' % (_ONE, _ONE))),
    "inner_duplicate": Malformed(12, shard(None, 8, raw=b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}')),
    "nan": Malformed(13, shard({"a": entry(shape=(float("nan"),))}, 8)),
    "infinity": Malformed(13, shard({"a": entry(shape=(float("inf"),))}, 8)),
    "overflowing_float": Malformed(13, shard(None, 8, raw=b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}')),
    "float": Malformed(13, shard({"a": entry(shape=(2.0,))}, 8)),
    "exponent": Malformed(13, shard(None, 8, raw=b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}')),
    "bool": Malformed(13, shard({"a": entry(shape=(True, 2))}, 8)),
    "text": Malformed(13, shard({"a": entry(shape=("2",))}, 8)),
    "negative": Malformed(13, shard({"a": entry(shape=(-2, -1))}, 8)),
    "negative_zero_offset": Malformed(13, shard({"a": entry(offsets=(-8, 0))}, 8)),
    "float_offset": Malformed(13, shard({"a": entry(offsets=(0, 8.0))}, 8)),
    "negative_zero": Malformed(13, shard(None, 8, raw=b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}')),
    "bool_offset": Malformed(13, shard({"a": entry(dtype="U8", shape=(1,), offsets=(False, True))}, 1)),
    "digits": Malformed(14, shard(None, raw=b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000))),
    "twenty_digits": Malformed(14, shard(None, raw=b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 20))),
    "above_limit": Malformed(14, shard({"a": entry(shape=(2**63,))}, 8)),
    "nested": Malformed(15, shard(None, raw=b'{"a":' + b"[" * 200_000)),
    "nested_objects": Malformed(15, shard(None, raw=b'{"a":' * 100_000)),
    "overlap": Malformed(16, shard({"a": entry(), "b": entry(offsets=(4, 12))}, 12)),
    "same_range": Malformed(16, shard({"a": entry(), "b": entry()}, 8)),
    "hole": Malformed(17, shard({"a": entry(), "b": entry(offsets=(12, 20))}, 20)),
    "hole_first": Malformed(17, shard({"a": entry(offsets=(8, 16))}, 16)),
    "reversed": Malformed(18, shard({"a": entry(offsets=(8, 0))}, 8)),
    "past_end": Malformed(19, shard({"a": entry()}, 4)),
    "trailing": Malformed(20, shard({"a": entry()}, 9)),
    "trailing_no_tensors": Malformed(20, shard({}, 1)),
    "overflow": Malformed(23, shard({"a": entry(shape=(2**32, 2**32))}, 8)),
    "overflow_to_zero": Malformed(23, shard({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))})),
    "zero_product": Malformed(24, shard({"a": entry(shape=(2**62, 0))}, 8)),
    "disagree": Malformed(25, shard({"a": entry(dtype="F16")}, 8)),
    "unknown_dtype": Malformed(26, shard({"a": entry(dtype="F7")}, 8)),
    "dtype_list": Malformed(26, shard({"a": entry(dtype=["F32"])}, 8)),
    "lower_case": Malformed(26, shard({"a": entry(dtype="f32")}, 8)),
    "odd_f4": Malformed(27, shard({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, 1)),
    "odd_f6": Malformed(27, shard({"a": entry(dtype="F6_E2M3", shape=(3,), offsets=(0, 2))}, 2)),
    "metadata": Malformed(28, shard({"__metadata__": {"a": 1}})),
    "metadata_null": Malformed(28, shard({"__metadata__": None})),
    "metadata_list": Malformed(28, shard({"__metadata__": []})),
    "metadata_nested": Malformed(28, shard({"__metadata__": {"a": {"b": "c"}}})),
    "metadata_is_a_tensor": Malformed(28, shard({"__metadata__": entry()}, 8)),
    "leading_space": Malformed(30, shard(None, raw=b" {}")),
    "leading_newline": Malformed(30, shard(None, raw=b"\n{}")),
    "zero_size_inside": Malformed(31, shard({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, 8)),
    "zero_size_past_end": Malformed(31, shard({"a": entry(), "b": entry(shape=(0,), offsets=(9, 9))}, 8)),
    "long_name": Malformed(32, shard({"a" * 1025: entry()}, 8)),
    "long_name_in_bytes": Malformed(32, shard({"é" * 513: entry()}, 8)),
    "extra_key": Malformed(121, shard({"a": {**entry(), "more": 1}}, 8)),
    "missing_key": Malformed(121, shard({"a": {"dtype": "F32", "shape": [2]}}, 8)),
    "entry_is_null": Malformed(121, shard({"a": None})),
    "entry_is_a_list": Malformed(121, shard({"a": [1, 2]})),
    "shape_is_a_number": Malformed(121, shard({"a": entry(shape=2)}, 8)),
    "shape_is_an_object": Malformed(121, shard({"a": entry(shape={})}, 8)),
    "three_offsets": Malformed(121, shard({"a": entry(offsets=(0, 4, 8))}, 8)),
    "one_offset": Malformed(121, shard({"a": entry(offsets=(8,))}, 8)),
    "nine_dimensions": Malformed(121, shard({"a": entry(shape=(1,) * 8 + (2,))}, 8)),
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
    for name, bad in BAD.items():
        tally.tried["malformed shards, named"] += 1
        tally.check(_refused(bad.blob), f"malformed {name} was accepted")
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
    return [valid(), shard({"a": entry()}, 8), shard({}), *(bad.blob for bad in BAD.values() if len(bad.blob) < 4096)]


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
