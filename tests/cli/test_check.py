"""`mfptq check` on files: what mfptq writes is sound, and each thing done to it afterwards is found."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mfptq import conversion
from mfptq.checking import check
from mfptq.checkpoint.folder import Origin, read_checkpoint
from tests.conftest import command


@pytest.fixture
def converted_experts(moe_source: Path, tmp_path: Path) -> Path:
    conversion.convert(moe_source, tmp_path / "experts")
    return tmp_path / "experts"


def codes(folder: Path) -> dict[str, int]:
    """Return the findings of vLLM's judge by code, with their numbers of places."""
    return {finding.code: finding.count for finding in check(folder, engines=["vllm"]).findings}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def set_scalar(folder: Path, name: str, value: float) -> None:
    checkpoint = read_checkpoint(Origin(folder))
    (tensor,) = (each for each in checkpoint.tensors() if each.info.name == name)
    checkpoint.source.close()
    with (folder / tensor.shard).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(struct.pack("<f", value))


def test_what_mfptq_writes_is_sound(output: Path, converted_experts: Path) -> None:
    assert check(output).findings == ()
    assert check(converted_experts).findings == ()


def test_an_unquantized_model_is_told_apart(source: Path) -> None:
    assert set(codes(source)) == {"not-quantized"}
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert set(codes(source)) == {"not-quantized", "no-tokenizer"}


def test_every_unequal_group_is_found_and_nothing_else(output: Path, converted_experts: Path) -> None:
    changed = [f"model.language_model.layers.{number}.linear_attn.in_proj_z" for number in (0, 1, 2)]
    for module in changed:
        set_scalar(output, f"{module}.weight_global_scale", 1234.5)
    assert codes(output) == {"unequal-weight-scales": 3}
    pair = "model.language_model.layers.3.mlp.experts.2.up_proj"
    set_scalar(converted_experts, f"{pair}.weight_global_scale", 777.0)
    (finding,) = check(converted_experts, engines=["vllm"]).findings
    assert (finding.code, finding.example) == ("unequal-weight-scales", pair.rpartition(".")[0])
    set_scalar(converted_experts, "model.language_model.layers.3.mlp.experts.2.down_proj.weight_global_scale", 5.0)
    assert codes(converted_experts) == {"unequal-weight-scales": 1}  # down_proj has no partner


def test_kept_layers_that_no_entry_ignores(output: Path) -> None:
    edit_config(output, lambda config: config.update(ignore=[e for e in config["ignore"] if "in_proj_" not in e]))
    assert codes(output) == {"kept-not-ignored": 6}  # in_proj_a and in_proj_b of three layers
    edit_config(output, lambda config: config["ignore"].append(r"re:.*in_proj_a$"))
    assert codes(output) == {"refused": 3}


def test_files_beside_the_index_are_found(output: Path) -> None:
    first = next(output.glob("*.safetensors"))
    (output / "mtp.safetensors").write_bytes(first.read_bytes())
    assert codes(output) == {"not-in-index": 1}


def test_exit_code_and_one_line(output: Path) -> None:
    sound = command("check", output)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert sound.stdout.startswith("checked ")
    assert sound.stdout.rstrip().endswith("no fault")
    set_scalar(output, "model.language_model.layers.0.mlp.down_proj.weight_global_scale", 0.0)
    broken = command("check", output)
    assert broken.returncode == 6
    assert broken.stderr.startswith(f"mfptq: error: '{output}' has 1 error: the global scale is zero")


def test_json_is_what_the_library_returns(output: Path) -> None:
    edit_config(output, lambda config: config.update(quantization_status="frozen"))
    done = command("check", output, "--json", "--for", "vllm")
    assert done.returncode == 0  # a warning
    found = json.loads(done.stdout)
    assert (found["ok"], found["errors"], found["warnings"], found["engines"]) == (True, 0, 1, ["vllm"])
    assert found["findings"][0]["code"] == "not-compressed"


@pytest.mark.parametrize("columns", [60, 100])
def test_findings_fit_the_terminal(output: Path, columns: int) -> None:
    edit_config(output, lambda config: config.update(ignore=[]))
    done = command("check", output, COLUMNS=str(columns))
    assert done.returncode == 6
    assert max(map(len, done.stdout.splitlines())) <= columns


def test_a_memory_that_does_not_suffice(output: Path) -> None:
    assert command("check", output, "--gpu-memory", "24GB").returncode == 0
    done = command("check", output, "--gpu-memory", "100kB")
    assert done.returncode == 6
    assert "that engines use by default" in done.stdout.replace("\n  ", " ")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert command("check", tmp_path / "nowhere").returncode == 3
