"""Whole conversions of random checkpoints, killed at random calls and resumed; and outputs with one bit flipped."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mfptq.checkpoint.companions import CONFIG, INDEX, SINGLE
from mfptq.checkpoint.folder import Origin, read_checkpoint
from mfptq.checkpoint.header import TensorSpec, encode_header
from mfptq.errors import MfptqError
from mfptq.output.journal import Journal, JournalState, ShardResult, parse_journal
from mfptq.planning.quantization_config import index_text
from mfptq.verification import verify
from tests.conftest import digests
from tests.faults.faulty import FaultyFiles, kill, kill_in_the_middle
from tests.faults.malformed import flips
from tests.faults.warm import LAYOUTS, Ended, Tally, child, here, run, workplace

_LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a", "mlp.gate")  # fmt: skip
_SIZES = st.sampled_from([1, 2, 3, 5, 8, 16])
_COLUMNS = st.sampled_from([16, 16, 32, 48, 24, 0])


@dataclass(frozen=True)
class Example:
    """A random conversion: its tensors, the shard of each, the options, and where it is killed."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    homes: list[int]
    options: dict[str, object]
    companions: int
    kills: list[tuple[int, bool]]


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...]]]:
    dtype = st.sampled_from(["BF16", "BF16", "F16", "F32"])
    found: dict[str, tuple[str, tuple[int, ...]]] = {"model.layers.0.mlp.down_proj.weight": ("BF16", (3, 32))}
    for layer in range(draw(st.integers(1, 3))):
        for leaf in draw(st.lists(st.sampled_from(_LEAVES), unique=True, max_size=8)):
            found[f"model.layers.{layer}.{leaf}.weight"] = (draw(dtype), (draw(_SIZES), draw(_COLUMNS)))
        found[f"model.layers.{layer}.input_layernorm.weight"] = (draw(dtype), (draw(_SIZES),))
        if draw(st.booleans()):
            experts, inner = draw(st.integers(1, 3)), draw(st.sampled_from([16, 32]))
            found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = ("BF16", (experts, 2 * inner, 16))
            found[f"model.layers.{layer}.mlp.experts.down_proj"] = ("BF16", (experts, 16, inner))
    for name, kept in (
        ("lm_head.weight", "BF16"),
        ("counts", "I64"),
        ("mask", "BOOL"),
        ("codes", "F4"),
        ("scalar", "F64"),
    ):
        if draw(st.booleans()):
            found[name] = (kept, () if name == "scalar" else (draw(_SIZES), 16))
    return found


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Draw a conversion."""
    tensors = draw(_tensors())
    shards = draw(st.integers(1, min(6, len(tensors))))
    homes = [draw(st.integers(0, shards - 1)) for _ in tensors]
    options: dict[str, object] = {
        "method": draw(st.sampled_from(["search", "minmax"])),
        "max_workers": draw(st.integers(1, 3)),
    }
    if draw(st.booleans()):
        options["ignore"] = ["re:.*down_proj$"] if draw(st.integers(0, 9)) == 0 else ["model.layers.0.mlp.down_proj"]
    kills = draw(st.lists(st.tuples(st.integers(1, 180), st.booleans()), max_size=4))
    return Example(tensors, homes, options, draw(st.integers(0, 3)), kills)


def write(example: Example, folder: Path, chance: np.random.Generator) -> None:
    """Write the example's checkpoint."""
    folder.mkdir()
    places: dict[str, str] = {}
    shards = sorted(set(example.homes))
    for number in shards:
        name = f"model-{number:05d}.safetensors" if len(shards) > 1 else SINGLE
        specs = [
            TensorSpec(tensor, *what)
            for (tensor, what), home in zip(example.tensors.items(), example.homes, strict=True)
            if home == number
        ]
        head, header = encode_header(specs)
        blob = bytearray(head)
        for info in header.tensors:
            values = chance.standard_normal(info.nbytes // 2 + 1).astype(np.float32)
            wide = {"BF16": (values.view(np.uint32) >> 16).astype(np.uint16), "F16": values.astype(np.float16)}
            blob += wide.get(info.dtype, values).tobytes()[: info.nbytes].ljust(info.nbytes, b"\0")
            places[info.name] = name
        (folder / name).write_bytes(blob)
    if len(shards) > 1:
        (folder / INDEX).write_text(index_text(0, places))
    (folder / CONFIG).write_text("{}")
    for number in range(example.companions):
        (folder / f"tokens{number}.txt").write_bytes(b"word\n" * 100 * number)


def _convert(source: Path, out: Path, example: Example) -> Ended:
    return here(lambda: run(source, out, **example.options))


def _interrupted(source: Path, out: Path, example: Example, tally: Tally) -> None:
    for number, middle in example.kills:

        def dying(number: int = number, fault=kill_in_the_middle if middle else kill) -> None:
            with FaultyFiles((out,), at=lambda n: n == number, fault=fault):
                run(source, out, **example.options)

        code = child(dying, out.parent / "log").code
        tally.tried["kills in random conversions"] += code == -signal.SIGKILL


def attempt(example: Example, folder: Path, tally: Tally) -> None:
    """Convert undisturbed, then with the example's kills; compare the two outputs and check the output's own proof."""
    write(example, folder / "source", np.random.default_rng(len(example.tensors)))
    before = digests(folder / "source")
    undisturbed = _convert(folder / "source", folder / "expected", example)
    tally.tried["random conversions"] += 1
    if undisturbed.code:
        tally.tried["of these, refused with a reason"] += 1
        tally.check(undisturbed.code in (2, 3), f"{example}: {undisturbed}")
        tally.check(not (folder / "expected").exists(), f"{example}: refused, yet something was created")
        return
    expected = digests(folder / "expected")
    _interrupted(folder / "source", folder / "out", example, tally)
    out = folder / "out"
    if (out / CONFIG).exists():
        whole = {name: digest for name, digest in digests(out).items() if not name.startswith(".mfptq/")}
        tally.check(whole == expected, f"{example}: config.json in an output that is not whole")
    again = _convert(folder / "source", out, example)
    tally.check(again.code == 0 or "finished conversion" in again.text, f"{example}: {again}")
    shutil.rmtree(out / ".mfptq", ignore_errors=True)
    tally.check(digests(out) == expected, f"{example}: other bytes")
    found = verify(out, folder / "source")
    faults = [fault for fault in found.faults if "relative error" not in fault]
    tally.check(not faults, f"{example}: {faults}")
    tally.check(digests(folder / "source") == before, f"{example}: the source was touched")


def random_conversions(count: int, first: int) -> Tally:
    """Run `count` hypothesis examples, reproducible by `first`."""
    tally = Tally()
    work = workplace(LAYOUTS[0])

    @seed(first)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(examples())
    def one(example: Example) -> None:
        folder = work.new()
        try:
            attempt(example, folder, tally)
        finally:
            shutil.rmtree(folder)

    one()
    return tally


def flipped_outputs(count: int, first: int) -> Tally:
    """Flip one bit somewhere in a finished output, `count` times: `verify` must find it each time.

    The model card is there to be edited, so its bytes and its digest are left alone.
    """
    tally, chance = Tally(), random.Random(first)
    work = workplace(LAYOUTS[0])
    out = work.folder / "expected"
    files = sorted(path for path in out.iterdir())
    sums = (out / "SHA256SUMS").read_bytes()
    card = range(sums.index(b"  README.md\n") - 64, sums.index(b"  README.md\n"))
    places = [
        (path, place)
        for path in files
        for place in range(path.stat().st_size)
        if path.name != "README.md" and not (path.name == "SHA256SUMS" and place in card)
    ]
    chosen = [*(place for place in places if place[0].name == "SHA256SUMS"), *chance.choices(places, k=count)]
    tally.check(verify(out).ok, "the output has a fault before anything was flipped")
    for path, place in chosen[:count] if count < 1000 else chosen:
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
            file.flush()
            tally.check(not verify(out).ok, f"a flipped bit in byte {place} of {path.name} was not found")
            file.seek(place)
            file.write(bytes([byte]))
        tally.tried["flipped bits in finished outputs"] += 1
    tally.check(digests(out) == work.expected, "the flips were not taken back")
    return tally


def malformed_checkpoints() -> Tally:
    """Flip each bit of, and cut at each byte: a shard's header in its folder, and a journal."""
    tally = Tally()
    work = workplace(LAYOUTS[1])
    shard = work.source / SINGLE
    whole = shard.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for blob in flips(whole[:end]):
        shard.write_bytes(blob + whole[end:] if len(blob) == end else blob)
        tally.tried["malformed checkpoints"] += 1
        try:
            read_checkpoint(Origin(work.source)).source.close()
        except MfptqError as error:
            tally.check(error.exit_code == 3, f"{error}")
        except BaseException as error:
            tally.broken.append(f"{error!r} for {blob!r}")
    shard.write_bytes(whole)
    _journals(tally, work.folder)
    return tally


def _journals(tally: Tally, folder: Path) -> None:
    digest = {"source": "a" * 64, "settings": "b" * 64}
    results = {
        f"{n}.safetensors": ShardResult(f"{n}.safetensors", str(n) * 64, 9, {"x": {"weights": 1}}) for n in range(3)
    }
    Journal(folder / "journal", JournalState(digest, results, ("a", "b"))).close()
    whole = (folder / "journal").read_bytes()
    tally.check(parse_journal(whole) == JournalState(digest, results, ("a", "b")), "a journal is not read as written")
    damaged = [whole[:cut] for cut in range(len(whole))]
    damaged += [
        whole[: n // 8] + bytes([whole[n // 8] ^ 1 << n % 8]) + whole[n // 8 + 1 :] for n in range(8 * len(whole))
    ]
    for data in damaged:
        state = parse_journal(data)
        tally.tried["damaged journals"] += 1
        known = state.done.items() <= results.items() and state.digests in (None, digest)
        tally.check(known and state != JournalState(digest, results, ("a", "b")), f"damage believed: {data!r}")
