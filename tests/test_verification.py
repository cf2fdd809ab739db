"""`verify` as an audit: whatever is changed in an output is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mfptq
from tests.conftest import Stopped, command, digests, stopping_at


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


def change_stored(folder: Path, ending: str, change) -> str:
    """Change the bytes of the first tensor whose name ends so, under equal size and header; return its name."""
    for path in sorted(folder.glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name.endswith(ending):
                begin, end = (8 + size + each for each in entry["data_offsets"])
                data[begin:end] = change(bytes(data[begin:end]))
                path.write_bytes(data)
                return name
    raise AssertionError(ending)


def one_bit(data: bytes) -> bytes:
    """Change the last place of one number, which seldom changes a code of 4 bits."""
    return bytes([data[0] ^ 1]) + data[1:]


def turned_round(data: bytes) -> bytes:
    """Keep all numbers, in another order."""
    return np.frombuffer(data, np.uint16)[::-1].tobytes()


@pytest.mark.parametrize("change", [one_bit, turned_round])
@pytest.mark.parametrize(
    "ending", ["language_model.layers.0.mlp.down_proj.weight", "language_model.layers.3.self_attn.k_proj.weight"]
)
def test_a_source_that_changed_under_the_same_header_is_found(ending: str, change, source: Path, output: Path) -> None:
    assert mfptq.verify(output, source).checksums == 25
    name = change_stored(source, ending, change)
    faults = mfptq.verify(output, source).faults
    assert faults[-1].tensor == name.removesuffix(".weight")
    assert "other values in the source than those that were converted" in faults[-1].what
    assert [fault.tensor for fault in faults if "other values" in fault.what] == [faults[-1].tensor]


def test_experts_that_changed_places_are_found(moe_source: Path, tmp_path: Path) -> None:
    mfptq.convert(moe_source, tmp_path / "out")
    assert mfptq.verify(tmp_path / "out", moe_source).ok

    def exchanged(data: bytes) -> bytes:
        quarter = len(data) // 4
        return data[quarter : 2 * quarter] + data[:quarter] + data[2 * quarter :]

    name = change_stored(moe_source, "experts.down_proj", exchanged)
    faults = mfptq.verify(tmp_path / "out", moe_source).faults
    assert faults[-1].tensor == name.replace("experts.down_proj", "experts.*.down_proj")


@pytest.mark.parametrize("target", ["fp8-dynamic", "fp8-block", "fp8-static"])
def test_other_formats_have_checksums_too(target: str, source: Path, tmp_path: Path) -> None:
    given = {"input_scales": "auto"} if target == "fp8-static" else {}
    mfptq.convert(source, tmp_path / "out", formats=[f"{target}=re:.*mlp.down_proj"], **given)
    assert mfptq.verify(tmp_path / "out", source).faults == ()
    change_stored(source, "language_model.layers.0.mlp.down_proj.weight", one_bit)
    [fault] = mfptq.verify(tmp_path / "out", source).faults
    assert "other values" in fault.what


def test_checksums_do_not_depend_on_how_the_work_was_cut(
    source: Path, output: Path, tmp_path: Path, monkeypatch
) -> None:
    from mfptq.execution import memory_budget

    monkeypatch.setattr(memory_budget, "MIN_TILE", 512)
    monkeypatch.setattr(memory_budget, "MAX_TILE", 512)
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", 512)
    mfptq.convert(source, tmp_path / "small", max_workers=1)
    assert (tmp_path / "small" / "mfptq_report.json").read_bytes() == (output / "mfptq_report.json").read_bytes()


def test_a_report_without_checksums_is_said(source: Path, output: Path) -> None:
    report = json.loads((output / "mfptq_report.json").read_text())
    report["layers"] = [row[:7] for row in report["layers"]]
    (output / "mfptq_report.json").write_text(json.dumps(report))
    (output / "SHA256SUMS").unlink()
    done = command("verify", output, "--source", source)
    assert done.returncode == 0
    assert "no checksums in the report" in done.stdout


def test_progress_counts_every_byte(source: Path, output: Path) -> None:
    seen = []
    mfptq.verify(output, source, on_event=seen.append)
    planned = seen.pop(0)
    assert isinstance(planned, mfptq.Planned)
    assert sum(each.source_bytes for each in seen) <= planned.total_bytes
    tensors = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    files = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert planned.total_bytes > files + tensors * 0.9


def test_off_a_terminal_verify_writes_lines_unless_it_is_quiet(source: Path, output: Path) -> None:
    assert "Traceback" not in command("verify", output, "--source", source).stderr
    assert command("verify", output, "--source", source, "--quiet").stderr == ""


def test_a_callback_that_raises_stops_the_comparison(source: Path, output: Path) -> None:
    with pytest.raises(Stopped):
        mfptq.verify(output, source, on_event=stopping_at(mfptq.Advanced))
