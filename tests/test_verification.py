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
    assert found.faults == []
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
    files = sorted(path for path in output.iterdir() if path.is_file())
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    done = command("verify", output)
    assert done.returncode == 6, (path.name, done.stdout)
    assert "Traceback" not in done.stderr


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
    assert mfptq.verify(output, source).faults == [f"kept tensor '{name}' differs from the source"]


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
    assert "layers.3.self_attn.qkv_proj" in fault
    assert "weight_global_scale" in fault


def test_a_lost_shard_and_a_foreign_folder(source: Path, output: Path, tmp_path: Path) -> None:
    (output / "model-00002-of-00003.safetensors").unlink()
    assert command("verify", output).returncode == 6
    assert command("verify", source).returncode == 6
    assert command("verify", tmp_path / "nowhere").returncode == 6


def test_config_and_tensors_must_agree(output: Path) -> None:
    (output / "SHA256SUMS").unlink()
    config = json.loads((output / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    ignored.append("model.language_model.layers.0.mlp.down_proj")
    (output / "config.json").write_text(json.dumps(config))
    assert any("layers.0.mlp.down_proj" in fault and "ignores" in fault for fault in mfptq.verify(output).faults)
    config["quantization_config"]["ignore"] = []
    (output / "config.json").write_text(json.dumps(config))
    assert any("lm_head" in fault for fault in mfptq.verify(output).faults)
