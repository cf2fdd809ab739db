"""Hostile folders: links, special files, names, code; nothing is followed out, run, or shown raw."""

import errno
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

import mfptq
from mfptq.checkpoint.companions import INDEX, SINGLE
from mfptq.checkpoint.folder import Origin, read_checkpoint
from mfptq.checkpoint.header import TensorSpec, encode_header
from mfptq.errors import HeaderError, IndexMismatchError, SourceError, UnsafePathError, UnsupportedTensorError
from tests.conftest import command, digests, sampled
from tests.faults.malformed import BAD, entry, shard
from tests.faults.test_bad_input import SHARD, edit_config, edit_index


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file without an index."""
    folder = tmp_path / "single"
    folder.mkdir()
    save_file({"a.weight": np.ones((8, 16), np.float32)}, folder / SINGLE)
    (folder / "config.json").write_text("{}")
    return folder


def refused(source: Path, out: Path, message: str, error: type[SourceError] = SourceError) -> None:
    """Assert that the source is refused with exit code 3 and that nothing is created."""
    with pytest.raises(error, match=message) as caught:
        mfptq.convert(source, out)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.case(bad.case)) for name, bad in BAD.items()])
def test_malformed_shards_are_refused_in_a_folder(name: str, single: Path, tmp_path: Path) -> None:
    (single / SINGLE).write_bytes(BAD[name].blob)
    refused(single, tmp_path / "out", "model.safetensors", HeaderError)


_MEASURED = """
import sys
from pathlib import Path
from mfptq.checkpoint.folder import Origin, read_checkpoint
from mfptq.errors import HeaderError
from mfptq.execution.memory_budget import peak_bytes

calls = 0

def count(_frame, event, _argument):
    global calls
    calls += event in ("call", "c_call")

if sys.argv[2:] == ["calls"]:
    sys.setprofile(count)
try:
    found = len(read_checkpoint(Origin(Path(sys.argv[1]))).shards[0].header.tensors)
except HeaderError as error:
    found = str(error)
sys.setprofile(None)
print(found, calls, peak_bytes() // 10**6, sep="|")
"""


def measured(folder: Path, *what: str) -> tuple[str, int, int]:
    """Return (outcome, function calls if `what` is "calls", peak MB) of reading a checkpoint in a process of its own."""
    import subprocess

    line = [sys.executable, "-c", _MEASURED, str(folder), *what]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    found, calls, peak = done.stdout.strip().split("|")
    return found, int(calls), int(peak)


def write_tensors(path: Path, count: int) -> None:
    """Write a shard of tensors of one byte."""
    entries = ",".join(f'"t{n}":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}}' for n in range(count))
    path.write_bytes(shard(None, count, raw=f"{{{entries}}}".encode()))


@pytest.mark.parametrize("first", sampled([b"{"], [b" "]))
@pytest.mark.case(6)
def test_a_hundred_million_spaces(first: bytes, single: Path) -> None:
    (single / SINGLE).write_bytes(shard(None, raw=first.ljust(100_000_000)))
    found, _, peak = measured(single)
    assert "header" in found
    assert peak < 400


@pytest.mark.case(29)
def test_metadata_of_50_megabytes(single: Path) -> None:
    (single / SINGLE).write_bytes(shard({"__metadata__": {"x": "y" * 50_000_000}, "a": entry()}, 8))
    found, _, peak = measured(single)
    assert found == "1"
    assert peak < 600


@pytest.mark.case(117)
def test_the_work_for_a_header_grows_with_its_tensors_and_no_faster(single: Path) -> None:
    calls = []
    for count in (2_000, 20_000):
        write_tensors(single / SINGLE, count)
        found, made, _ = measured(single, "calls")
        assert found == str(count)
        calls.append(made)
    assert 20_000 < calls[1] < 10.5 * calls[0]


@pytest.mark.slow
@pytest.mark.case(117)
def test_a_million_tensors(single: Path) -> None:
    write_tensors(single / SINGLE, 1_000_000)
    found, _, peak = measured(single)
    assert found == "1000000"
    assert peak < 2000


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "I64", "F64", "F8_E8M0", "C64", "F6_E2M3", "BOOL"])
@pytest.mark.case(26)
def test_kept_tensors_of_any_known_dtype_are_copied(dtype: str, single: Path, tmp_path: Path) -> None:
    head, header = encode_header([TensorSpec("a.weight", "F32", (8, 16)), TensorSpec("state", dtype, (3, 16))])
    data = np.random.default_rng(0).standard_normal(header.data_bytes // 4).astype(np.float32).tobytes()
    (single / SINGLE).write_bytes(head + data)
    mfptq.convert(single, tmp_path / "out")
    [source, made] = [read_checkpoint(Origin(folder)).shards[0] for folder in (single, tmp_path / "out")]
    bytes_of = [
        (folder / SINGLE).read_bytes()[shard.header.data_start :][info.start : info.end]
        for folder, shard in ((single, source), (tmp_path / "out", made))
        for info in shard.header.tensors
        if info.name == "state"
    ]
    assert bytes_of[0] == bytes_of[1]
    assert bytes_of[0]


@pytest.mark.case(26, 61)
def test_a_weight_of_another_dtype_is_named(single: Path, tmp_path: Path) -> None:
    for dtype in ("F8_E4M3", "F64"):
        head, header = encode_header([TensorSpec("a.weight", dtype, (8, 16))])
        (single / SINGLE).write_bytes(head + bytes(header.data_bytes))
        refused(single, tmp_path / "out", dtype, UnsupportedTensorError)


NAMES = ["", "a/b", "../x", "\0", "\u202eabc", "🙂", "é", "e\u0301", "A", "a", "n" * 1024, "\x1b[31mred", "line\nbreak"]


@pytest.mark.case(32)
def test_names_are_copied_exactly_and_lead_nowhere(single: Path, tmp_path: Path) -> None:
    specs = [TensorSpec(name, "F32", (2,)) for name in NAMES] + [TensorSpec("w.weight", "F32", (16, 16))]
    head, header = encode_header(specs)
    (single / SINGLE).write_bytes(head + np.ones(header.data_bytes // 4, np.float32).tobytes())
    before = digests(tmp_path)
    mfptq.convert(single, tmp_path / "out")
    names = {tensor.info.name for tensor in read_checkpoint(Origin(tmp_path / "out")).tensors()}
    assert set(NAMES) < names
    created = digests(tmp_path).keys() - before.keys()
    assert all(name.startswith("out/") for name in created)
    assert mfptq.verify(tmp_path / "out", single).ok


@pytest.mark.case(33)
def test_control_characters_stay_off_the_terminal(single: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J.weight"
    head, header = encode_header([TensorSpec(evil, "F32", (8, 24)), TensorSpec("b.weight", "F32", (8, 16))])
    (single / SINGLE).write_bytes(head + bytes(header.data_bytes))
    for arguments in (["plan", single], ["inspect", single], ["convert", single, tmp_path / "out", "--target", "re:.*2J"],
                      ["convert", single, tmp_path / "out"], ["verify", tmp_path / "out", "--source", single]):  # fmt: skip
        done = command(*arguments)
        assert "\x1b" not in done.stdout + done.stderr, arguments
        assert "\x07" not in done.stdout + done.stderr, arguments


@pytest.mark.case(37)
def test_no_url_of_an_index_is_ever_asked_for(source: Path, tmp_path: Path) -> None:
    edit_index(source, lambda index: index["weight_map"].update(x="https://127.0.0.1:9/x.safetensors"))
    refused(source, tmp_path / "out", "plain name", UnsafePathError)


@pytest.mark.case(38)
def test_a_shard_that_is_a_link(source: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    mfptq.convert(source, whole)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(source / SHARD, tmp_path / "elsewhere" / SHARD)
    (source / SHARD).symlink_to(tmp_path / "elsewhere" / SHARD)
    refused(source, tmp_path / "out", "leads out of", UnsafePathError)
    (source / SHARD).unlink()
    shutil.move(tmp_path / "elsewhere" / SHARD, source / "inside.bin")
    (source / SHARD).symlink_to(source / "inside.bin")
    mfptq.convert(source, tmp_path / "out")
    assert digests(tmp_path / "out")[SHARD] == digests(whole)[SHARD]


@pytest.mark.case(38)
def test_blobs_of_the_same_repo_are_allowed_and_no_others(source: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--a--b"
    snapshot = repo / "snapshots" / ("1" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.move(path, repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    mfptq.convert(snapshot, tmp_path / "out")
    other = tmp_path / "hub" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    shutil.move(repo / "blobs" / "0", other / "0")
    path = next(path for path in snapshot.iterdir() if not path.exists())
    path.unlink()
    path.symlink_to(other / "0")
    refused(snapshot, tmp_path / "out2", "leads out of", UnsafePathError)


@pytest.mark.case(39)
def test_links_in_a_circle(source: Path, tmp_path: Path) -> None:
    (source / SHARD).unlink()
    (source / SHARD).symlink_to(source / "other.safetensors")
    (source / "other.safetensors").symlink_to(source / SHARD)
    refused(source, tmp_path / "out", SHARD)


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
@pytest.mark.timeout(30)
@pytest.mark.case(40)
def test_special_files_never_block(kind: str, single: Path, tmp_path: Path, monkeypatch) -> None:
    place = single / SINGLE
    place.unlink()
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(single)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(SINGLE)
    else:
        try:
            os.mknod(place, 0o666 | 0o020000, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("devices need root")
    refused(single, tmp_path / "out", "not a regular file|cannot open|no safetensors file")


@pytest.mark.case(44, 48)
def test_a_tensor_in_two_shards(single: Path, tmp_path: Path) -> None:
    shutil.move(single / SINGLE, single / "model-1.safetensors")
    save_file({"b.weight": np.ones((8, 16), np.float32)}, single / "model-2.safetensors")
    mfptq.convert(single, tmp_path / "union")
    assert mfptq.verify(tmp_path / "union", single).quantized == 2
    shutil.copy(single / "model-1.safetensors", single / "model-3.safetensors")
    refused(single, tmp_path / "out", "in two shards", IndexMismatchError)


@pytest.mark.case(44)
def test_of_two_copies_of_a_tensor_the_index_counts(single: Path, tmp_path: Path) -> None:
    ones, twos = np.ones((8, 16), np.float32), np.full((8, 16), 2, np.float32)
    (single / SINGLE).unlink()
    save_file({"a.weight": ones, "b.weight": ones}, single / "model-1.safetensors")
    save_file({"a.weight": twos}, single / "overlay.safetensors")
    places = {"a.weight": "overlay.safetensors", "b.weight": "model-1.safetensors"}
    (single / INDEX).write_text(json.dumps({"weight_map": places}))
    with mfptq.plan(single) as plan:
        assert plan.left_out == {"a.weight in model-1.safetensors": 8 * 16 * 4}
    mfptq.convert(single, tmp_path / "out", method="minmax")
    assert mfptq.verify(tmp_path / "out", single).ok
    found = {name: load_file(tmp_path / "out" / name) for name in places.values()}
    assert "a.weight_packed" not in found["model-1.safetensors"]
    assert found["overlay.safetensors"]["a.weight_global_scale"].item() == 2688 / 2


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "[]", "",
                                  '{"weight_map": {"a": null}}', '{"weight_map": {"a": "x.bin"}}'])  # fmt: skip
@pytest.mark.case(45)
def test_what_is_no_weight_map(text: str, source: Path, tmp_path: Path) -> None:
    (source / INDEX).write_text(text)
    refused(source, tmp_path / "out", "weight_map|safetensors")


@pytest.mark.case(47)
def test_a_pickle_beside_safetensors_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with mfptq.plan(source) as plan:
        assert "pytorch_model.bin" in plan.left_out
    mfptq.convert(source, tmp_path / "out")
    assert "pytorch_model.bin" not in digests(tmp_path / "out")


@pytest.mark.parametrize("name", ["Config.json", "GENERATION_CONFIG.json"])
@pytest.mark.case(49)
def test_names_that_differ_in_case_only(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).write_text("{}")
    refused(source, tmp_path / "out", "differ in case only")
    (source / name).rename(source / "readme.md")
    mfptq.convert(source, tmp_path / "out")
    assert "readme.md" not in digests(tmp_path / "out")


@pytest.mark.case(51, 52)
def test_code_is_neither_imported_nor_run(source: Path, tmp_path: Path) -> None:
    edit_config(source, auto_map={"AutoModel": "modeling_evil.Evil"}, trust_remote_code=True)
    (source / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    modules = set(sys.modules)
    mfptq.convert(source, tmp_path / "out")
    mfptq.verify(tmp_path / "out", source)
    assert not (tmp_path / "ran").exists()
    assert not {name for name in set(sys.modules) - modules if "evil" in name}


@pytest.mark.case(53)
def test_folders_where_files_are_expected(source: Path, tmp_path: Path) -> None:
    (source / ".mfptq").mkdir()
    (source / ".mfptq" / "journal").write_text("hostile")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").mkdir()
    mfptq.convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / ".mfptq").exists()
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    refused(source, tmp_path / "out2", "config.json")


@pytest.mark.parametrize("place", ["first", "last", "member of another shard"])
@pytest.mark.case(57)
def test_non_finite_anywhere_is_found_and_leaves_nothing(place: str, source: Path, tmp_path: Path) -> None:
    names = {"first": "mlp.down_proj", "last": "mlp.down_proj", "member of another shard": "self_attn.k_proj"}
    tensor = next(t for t in read_checkpoint(Origin(source)).tensors() if f"layers.3.{names[place]}" in t.info.name)
    index = tensor.info.nbytes // 2 - 1 if place == "last" else 0
    with (source / tensor.shard).open("r+b") as file:
        file.seek(tensor.offset + 2 * index)
        file.write(b"\xc0\x7f")
    refused(source, tmp_path / "out", f"holds nan at flat index {index}:")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0.0, id="zero", marks=pytest.mark.case(58)),
        pytest.param(1e-40, id="denormal", marks=pytest.mark.case(59)),
        pytest.param(3.3895e38, id="largest bf16", marks=pytest.mark.case(60)),
        pytest.param(-0.0, id="minus zero", marks=pytest.mark.case(60)),
    ],
)
def test_extreme_values_stay_finite_and_equal_the_library(value: float) -> None:
    import torch
    from compressed_tensors.quantization.utils import generate_gparam

    weight = torch.full((4, 16), value, dtype=torch.bfloat16)
    made = mfptq.quantize_nvfp4(weight, method="minmax")
    expected = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
    assert made.global_scale == float(expected)
    for method in ("search", "minmax"):
        made = mfptq.quantize_nvfp4(weight, method=method)
        stored = made.scale.double() / made.global_scale
        assert torch.isfinite(stored).all()
        found = stored * 6 if value > 1e-30 else mfptq.dequantize_nvfp4(made)
        assert torch.isfinite(found).all()
        assert method == "minmax" or torch.allclose(found.double(), weight.double(), rtol=0.2, atol=1e-30)


@pytest.mark.case(62)
def test_a_group_across_shards_has_one_scale_whatever_the_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    leaves = ("q_proj", "k_proj", "v_proj")
    weights = {
        f"l.{leaf}.weight": rng.standard_normal((16, 16)).astype(np.float32) * (i + 1) for i, leaf in enumerate(leaves)
    }
    found = []
    for number, order in enumerate([(0, 1, 2), (2, 0, 1), (0, 0, 0)]):
        folder = tmp_path / f"s{number}"
        folder.mkdir()
        for part in sorted(set(order)):
            names = [name for name, home in zip(weights, order, strict=True) if home == part]
            save_file({name: weights[name] for name in names}, folder / f"model-{part}.safetensors")
        (folder / "config.json").write_text("{}")
        mfptq.convert(folder, tmp_path / f"o{number}")
        tensors = {k: v for path in (tmp_path / f"o{number}").glob("*.safetensors") for k, v in load_raw(path).items()}
        scales = {bytes(data) for name, data in tensors.items() if name.endswith("weight_global_scale")}
        assert len(scales) == 1
        found.append(tensors)
    assert found[0] == found[1] == found[2]


def load_raw(path: Path) -> dict[str, bytes]:
    import safetensors

    return {name: bytes(what["data"]) for name, what in safetensors.deserialize(path.read_bytes())}


@pytest.mark.case(106)
def test_a_source_that_changes_while_it_is_read(source: Path, tmp_path: Path) -> None:
    for number, change in enumerate((truncate_all, grow_all, replace_all)):
        begun: list[bool] = []

        def progress(_event: object, change=change, begun=begun) -> None:
            if not begun:
                begun.append(True)
                change(source)

        with pytest.raises(SourceError, match=r"start again|truncated") as caught:
            mfptq.convert(source, tmp_path / f"out{number}", on_event=progress, max_workers=1)
        assert type(caught.value).__name__ == "SourceChangedError"
        assert not (tmp_path / f"out{number}").exists()
        shutil.rmtree(source)
        from tests.conftest import SMALL, write_demo

        write_demo(source, SMALL)


def truncate_all(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        os.truncate(path, path.stat().st_size - 64)


def grow_all(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        with path.open("ab") as file:
            file.write(b"more")


def replace_all(source: Path) -> None:
    """Put other files of the same size and time in their place."""
    for path in source.glob("*.safetensors"):
        before = path.stat()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.with_suffix(".new").write_bytes(data)
        os.utime(path.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
        path.with_suffix(".new").replace(path)


@pytest.mark.case(119)
def test_companions_that_are_absent_are_no_error(single: Path, tmp_path: Path) -> None:
    report = mfptq.convert(single, tmp_path / "out")
    assert report.quantized == 1
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.case(90)
def test_a_source_that_cannot_be_opened_for_want_of_descriptors(single: Path, tmp_path: Path, monkeypatch) -> None:
    from mfptq.errors import StorageError
    from mfptq.storage import files

    def no_more(*_args: object, **_kwargs: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(files.os, "open", no_more)
    with pytest.raises(StorageError, match=r"EMFILE.*rerun the same command") as caught:
        mfptq.convert(single, tmp_path / "out")
    assert caught.value.exit_code == 5


def test_open_files_are_closed_when_a_checkpoint_is_refused(source: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["ghost"] = SHARD
    (source / INDEX).write_text(json.dumps(index))
    for _ in range(20):
        with pytest.raises(IndexMismatchError):
            read_checkpoint(Origin(source))
    assert not before or len(list(descriptors.iterdir())) <= before
