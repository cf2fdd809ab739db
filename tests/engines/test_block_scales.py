"""Block scales that no sound weight has are found, in their number, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mfptq
from mfptq.checkpoint.folder import Origin, read_checkpoint
from tests.conftest import command

MODULE = "model.language_model.layers.0.mlp.down_proj"


def patch(folder: Path, name: str, at: int, data: bytes) -> None:
    """Write bytes into a tensor of a checkpoint."""
    checkpoint = read_checkpoint(Origin(folder))
    (tensor,) = (each for each in checkpoint.tensors() if each.info.name == name)
    checkpoint.source.close()
    with (folder / tensor.shard).open("r+b") as file:
        file.seek(tensor.offset + at)
        file.write(data)


def scale(folder: Path, *codes: int) -> None:
    """Put codes in the place of the first block scales of one layer."""
    patch(folder, f"{MODULE}.weight_scale", 0, bytes(codes))


def found(folder: Path, **options: object) -> dict[str, str]:
    """Return what is said of each code."""
    return {each.code: each.what for each in mfptq.check(folder, **options).findings}


@pytest.mark.parametrize(
    ("codes", "code", "count"),
    [
        ((0x7F,), "nan-block-scale", "1 block"),
        ((0xFF, 0x7F), "nan-block-scale", "2 blocks"),
        ((0x81, 0xFE), "nan-block-scale", "2 blocks"),
        ((0x01, 0x07, 0x08), "subnormal-block-scale", "2 blocks"),
        ((0x00, 0x80), "lost-blocks", "2 blocks"),
    ],
)
def test_each_kind_is_found_and_counted(output: Path, codes: tuple[int, ...], code: str, count: str) -> None:
    assert found(output) == {}
    scale(output, *codes)
    findings = found(output)
    assert findings.keys() == {code}
    assert findings[code].endswith(f"({count})")
    assert found(output, block_scales=False) == {}


def test_a_zero_scale_of_zeros_is_no_fault_unless_the_source_has_values(output: Path, source: Path) -> None:
    scale(output, 0, 0, 0)
    patch(output, f"{MODULE}.weight_packed", 0, bytes([0x80, 0x08] * 12))  # zeros with signs
    assert found(output) == {}
    assert found(output, source=source).keys() == {"zero-blocks"}
    assert found(output, source=source)["zero-blocks"].endswith("(3 blocks)")
    patch(source, f"{MODULE}.weight", 0, np.full(48, 0x8000, np.uint16).tobytes())  # -0 in bfloat16
    assert found(output, source=source) == {}


def test_tiles_of_rows_are_counted_once(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(output, f"{MODULE}.weight_scale", 4 * 63 + 3, b"\x7f")  # the last of 64 rows of 4 blocks
    monkeypatch.setattr("mfptq.engines.block_scales.TILE_BYTES", 8)
    assert found(output)["nan-block-scale"].endswith("(1 block)")


def test_experts_are_compared_with_their_slice_of_the_stack(moe_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "experts"
    mfptq.convert(moe_source, out)
    expert = "model.language_model.layers.1.mlp.experts.2.up_proj"
    patch(out, f"{expert}.weight_scale", 0, b"\0")
    patch(out, f"{expert}.weight_packed", 0, bytes(8))
    assert found(out) == {}
    (finding,) = mfptq.check(out, source=moe_source).findings
    assert (finding.code, finding.example, finding.count) == ("zero-blocks", expert, 1)


def test_the_command_has_both_options(output: Path, source: Path) -> None:
    scale(output, 0x7F)
    assert command("check", output).returncode == 6
    assert command("check", output, "--no-block-scales").returncode == 0
    assert "block scales are NaN" in command("check", output, "--source", source).stdout
