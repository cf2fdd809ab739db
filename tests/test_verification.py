"""`verify` as an audit: whatever is changed in an output is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mfptq
from tests.conftest import command, digests


@pytest.fixture
def output(source: Path, tmp_path: Path) -> Path:
    mfptq.convert(source, tmp_path / "out")
    return tmp_path / "out"


def test_a_sound_output_has_no_fault(source: Path, output: Path) -> None:
    found = mfptq.verify(output, source)
    assert found.faults == ()
    assert found.tensors == sum(len(load_file_names(path)) for path in output.glob("*.safetensors"))
    assert found.digests == len(digests(output)) - 1  # all but the manifest itself
    assert found.quantized == 25
    assert all(0.05 < error < 0.1 for error in found.errors.values())


def load_file_names(path: Path) -> list[str]:
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    return [name for name in json.loads(header) if name != "__metadata__"]


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_anywhere_is_found(seed: int, output: Path) -> None:
    rng = np.random.default_rng(seed)
    files = sorted(path for path in output.iterdir() if path.is_file() and path.name != "README.md")
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    done = command("verify", output)
    assert done.returncode == 6, (path.name, done.stdout)
    assert "Traceback" not in done.stderr


def test_the_card_may_be_edited(output: Path) -> None:
    (output / "README.md").write_text("my own words")
    assert mfptq.verify(output).ok
    (output / "README.md").unlink()
    assert not mfptq.verify(output).ok


def test_what_is_no_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(mfptq.SourceError, match="is no folder"):
        mfptq.verify(tmp_path / "nowhere")
    assert command("verify", tmp_path / "nowhere").returncode == 3


def test_a_missing_manifest_is_said(output: Path) -> None:
    assert "no SHA256SUMS" not in command("verify", output).stdout
    (output / "SHA256SUMS").unlink()
    done = command("verify", output)
    assert done.returncode == 0
    assert "no SHA256SUMS here" in done.stdout


def test_without_the_manifest_a_changed_kept_tensor_is_found_by_the_source(source: Path, output: Path) -> None:
    (output / "SHA256SUMS").unlink()
    name = next(n for path in output.glob("*.safetensors") for n in load_file_names(path) if n.endswith("A_log"))
    for path in output.glob("*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + size]).get(name)
        if entry:
            place = 8 + size + entry["data_offsets"][0]
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert mfptq.verify(output).ok
    [fault] = mfptq.verify(output, source).faults
    assert fault.tensor == name
    assert str(fault) == f"'{name}' in '{fault.file}' differs from the source, which it should be equal to"
    assert name in load_file_names(output / fault.file)


def test_unequal_global_scales_in_a_fused_group_are_found(output: Path) -> None:
    (output / "SHA256SUMS").unlink()
    for path in output.glob("*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name.endswith("layers.3.self_attn.k_proj.weight_global_scale"):
                place = 8 + size + entry["data_offsets"][0]
                data = data[:place] + np.float32(3.0).tobytes() + data[place + 4 :]
        path.write_bytes(data)
    [fault] = mfptq.verify(output).faults
    assert fault.tensor.endswith("layers.3.self_attn.qkv_proj")
    assert "weight_global_scale" in fault.what


def test_what_the_safetensors_library_refuses_is_a_fault(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is stricter than any header we write: here it is made to refuse, and to find another number."""
    import safetensors

    class Fewer:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Fewer:
            return self

        def __exit__(self, *_: object) -> None: ...
        def keys(self) -> list[str]:
            return ["a"]

    def refuse(*_: object) -> None:
        raise safetensors.SafetensorError("no\n\x1b[31m")

    for stand_in, what in ((refuse, r"refuses it: 'no\n\x1b[31m'"), (Fewer, "finds 1 tensor in it, expected")):
        monkeypatch.setattr(safetensors, "safe_open", stand_in)
        faults = mfptq.verify(output).faults
        assert {fault.file for fault in faults} == {path.name for path in output.glob("*.safetensors")}
        assert all(what in fault.what for fault in faults)


def test_the_end_of_a_conversion_asks_the_safetensors_library(source, tmp_path, monkeypatch) -> None:
    import safetensors

    opened: list[Path] = []
    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, *more: opened.append(path) or real(path, *more))
    mfptq.convert(source, tmp_path / "out")
    assert sorted(opened) == sorted((tmp_path / "out").glob("*.safetensors"))

    def refuse(*_: object) -> None:
        raise safetensors.SafetensorError("no")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with pytest.raises(mfptq.VerificationError, match=r"model-00001-of-00003.safetensors' .*refuses it: 'no'"):
        mfptq.convert(source, tmp_path / "refused")
    assert not (tmp_path / "refused" / "config.json").exists()


def test_a_verification_is_frozen_and_one_fault_is_singular(output: Path) -> None:
    (output / "generation_config.json").write_text("{}")
    done = command("verify", output)
    assert "'generation_config.json' is not what SHA256SUMS says" in done.stderr
    assert f"{str(output)!r} has 1 fault: " in done.stderr
    assert done.stdout.rstrip().endswith("\n1 fault")
    found = json.loads(command("verify", output, "--json").stdout)
    assert [fault["file"] for fault in found["faults"]] == ["generation_config.json"]
    with pytest.raises(AttributeError):
        mfptq.verify(output).tensors = 3  # type: ignore[misc]


def test_a_lost_shard_and_a_foreign_folder(source: Path, output: Path, tmp_path: Path) -> None:
    (output / "model-00002-of-00003.safetensors").unlink()
    assert command("verify", output).returncode == 6
    assert command("verify", source).returncode == 6
    assert command("verify", tmp_path / "nowhere").returncode == 3


def test_config_and_tensors_must_agree(output: Path) -> None:
    (output / "SHA256SUMS").unlink()
    config = json.loads((output / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    ignored.append("model.language_model.layers.0.mlp.down_proj")
    (output / "config.json").write_text(json.dumps(config))
    assert any("layers.0.mlp.down_proj" in f.tensor and "ignores" in f.what for f in mfptq.verify(output).faults)
    config["quantization_config"]["ignore"] = []
    (output / "config.json").write_text(json.dumps(config))
    assert any(fault.tensor == "lm_head" for fault in mfptq.verify(output).faults)


def test_a_quantized_head_must_be_a_target(source: Path, tmp_path: Path) -> None:
    mfptq.convert(source, tmp_path / "out", targets=("lm_head",))
    assert mfptq.verify(tmp_path / "out", source).ok
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["targets"] == ["Linear", r"re:(.*\.)?lm_head$"]
    group["targets"] = ["Linear"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert any("lacks the target" in fault.what for fault in mfptq.verify(tmp_path / "out").faults)
