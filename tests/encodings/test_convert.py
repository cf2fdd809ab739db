"""Converting a quantized release equals converting its bfloat16 cast, tensor by tensor and byte by byte, for every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.demo import DemoShape, write_demo
from mfptq.errors import NonFiniteWeightError, SourceChangedError, UnsupportedTensorError
from mfptq.execution import memory_budget
from mfptq.kernels.calibrated import CALIBRATED_METHODS

from ..calibration.files import calibrate, described, stored
from ..conftest import command, sampled
from .checkpoints import (
    E8M0,
    Tensors,
    deepseek,
    fp8_block,
    int4,
    mxfp4,
    mxfp4_values,
    weight,
    write,
)

Encoded = tuple[Tensors, torch.Tensor]  # what is stored beside the module's name, and its values
DENSE = DemoShape(hidden=192, intermediate=320, layers=4, vocabulary=64)
SMALL = DemoShape(hidden=64, intermediate=160, layers=4, vocabulary=32)
TINY = DemoShape(hidden=32, intermediate=160, layers=4, vocabulary=16)
EXPERTS = DemoShape(hidden=192, intermediate=96, layers=4, experts=3, vocabulary=64)


def fp8(
    block: tuple[int, int] | None, leaf: str, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor], Encoded]:
    def encode(source: torch.Tensor) -> Encoded:
        size = (block[0] or source.shape[0], block[1] or source.shape[1])
        made = fp8_block(source, size, dtype)
        return {".weight": made["weight"], f".{leaf}": made["scale"]}, deepseek(made["weight"], made["scale"], size)

    return encode


def four_bits(codes: str, scale: str) -> Callable[[torch.Tensor], Encoded]:
    def encode(source: torch.Tensor) -> Encoded:
        made = mxfp4(source)
        deep = scale == "scale"
        packed, exponents = (made["packed"].view(torch.int8), made["scale"].view(E8M0)) if deep else made.values()
        return {f".{codes}": packed, f".{scale}": exponents}, mxfp4_values(made["packed"], made["scale"])

    return encode


def integers(source: torch.Tensor) -> Encoded:
    made = int4(source)
    values = (made["codes"].float() * made["scale"].float().repeat_interleave(32, 1)).to(torch.bfloat16)
    return {".weight_packed": made["packed"], ".weight_scale": made["scale"], ".weight_shape": made["shape"]}, values


FORMATS: dict[str, tuple[Callable[[torch.Tensor], Encoded], dict]] = {
    "blocks, F32": (fp8((128, 128), "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "blocks, BF16": (fp8((128, 128), "weight_scale_inv", torch.bfloat16), {"weight_block_size": [128, 128]}),
    "blocks, E8M0": (fp8((32, 32), "scale", E8M0), {"weight_block_size": [32, 32]}),
    "rows": (fp8((1, 0), "weight_scale", torch.bfloat16), {"quant_method": "compressed-tensors"}),
    "tensors": (fp8((0, 0), "weight_scale"), {"quant_method": "fp8", "activation_scheme": "static"}),
    "MXFP8": (fp8((1, 32), "weight_scale_inv", torch.uint8), {"quant_method": "mxfp8"}),
    "MXFP4": (four_bits("weight_packed", "weight_scale"), {"quant_method": "compressed-tensors"}),
    "MXFP4 of DeepSeek": (four_bits("weight", "scale"), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "INT4": (integers, {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32}}}}),
}  # fmt: skip


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    gate = name.endswith(("in_proj_a.weight", "in_proj_b.weight"))
    return tensor.dim() == 2 and not gate and (".self_attn." in name or "_proj" in name or name == "mtp.fc.weight")


def unstacked(tensors: Tensors) -> Tensors:
    """Return expert stacks as published FP8 releases have them: one matrix for each expert and projection."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if tensor.dim() != 3 or leaf not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = (
                zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
                if leaf == "gate_up_proj"
                else [(leaf, matrix)]
            )
            found |= {f"{parent}.{expert}.{part}.weight": value.contiguous() for part, value in parts}
    return found


def twins(folder: Path, shape: DemoShape, name: str) -> tuple[Path, Path]:
    """Write a release in a format, and its bfloat16 cast; scales lie in the last shard, apart from their weights."""
    encode, quantization = FORMATS[name]
    write_demo(folder / "demo", shape)
    shards = [unstacked(load_file(file)) for file in sorted((folder / "demo").glob("*.safetensors"))]
    release: list[Tensors] = [{} for _ in shards]
    cast: list[Tensors] = [{} for _ in shards]
    for number, tensors in enumerate(shards):
        for full, tensor in tensors.items():
            if not is_linear(full, tensor):
                release[number][full] = cast[number][full] = tensor
                continue
            parts, values = encode(tensor)
            for suffix, part in parts.items():
                away = "scale" in suffix and len(release[number]) % 2
                release[-1 if away else number][full.removesuffix(".weight") + suffix] = part.contiguous()
            cast[number][full] = values
    config = json.loads((folder / "demo" / "config.json").read_text())
    nested = config | {"text_config": {**config["text_config"], "quantization_config": quantization}}
    return write(folder / "release", *release, config=nested), write(folder / "cast", *cast, config=config)


def equal(one: Path, other: Path) -> bool:
    first, second = stored(one), stored(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8))
        for name in first
    )


WIDENED = ["bf16=re:mtp.*"]  # which FP8 would carry over
RELEASES = [*((name, SMALL) for name in FORMATS), ("blocks, F32", EXPERTS), ("MXFP4", EXPERTS)]
OFTEN = [("blocks, F32", SMALL), ("rows", SMALL), ("tensors", SMALL), ("INT4", SMALL), ("MXFP4", EXPERTS)]
TILES = [("blocks, F32", 2048), ("MXFP4", 256)]
OTHER_TILES = [("blocks, F32", 256), ("MXFP4", 2048), ("blocks, F32", 2**15), ("MXFP4", 2**15)]


@pytest.mark.parametrize("name", sampled(["blocks, F32"], ["MXFP4"]))
def test_every_method_makes_the_same_of_a_release_and_its_cast(name: str, tmp_path: Path) -> None:
    release, cast = twins(tmp_path, TINY, name)
    calibration = calibrate(cast, tmp_path / "calibration.safetensors", described("factors"))
    for method in ("minmax", *CALIBRATED_METHODS):
        known = calibration if method in CALIBRATED_METHODS else None
        for source in (release, cast):
            out = tmp_path / f"{source.name}-{method}"
            mfptq.convert(source, out, method=method, calibration=known, formats=WIDENED)
        assert equal(tmp_path / f"release-{method}", tmp_path / f"cast-{method}")


@pytest.mark.parametrize(
    ("name", "shape"),
    sampled(OFTEN, [each for each in RELEASES if each not in OFTEN]),
    ids=lambda each: ("experts" if each.experts else "dense") if isinstance(each, DemoShape) else each,
)
def test_a_release_converts_to_what_its_cast_converts_to(name: str, shape: DemoShape, tmp_path: Path) -> None:
    release, cast = twins(tmp_path, shape, name)
    for source in (release, cast):
        mfptq.convert(source, tmp_path / f"{source.name}-search", method="search", formats=WIDENED)
    out = tmp_path / "release-search"
    assert equal(out, tmp_path / "cast-search")
    assert mfptq.verify(out, release).ok, mfptq.verify(out, release).faults
    assert mfptq.verify(out, cast).ok
    fc = stored(out)["mtp.fc.weight"]
    assert fc.dtype == torch.bfloat16
    assert torch.equal(fc, stored(cast)["mtp.fc.weight"])
    made, expected = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "cast-search"))
    assert made == expected


@pytest.mark.parametrize(("name", "tile"), sampled(TILES, OTHER_TILES))
def test_bytes_do_not_depend_on_tiles(name: str, tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, cast = twins(tmp_path, TINY, name)
    mfptq.convert(release if name == "MXFP4" else cast, tmp_path / "expected", formats=WIDENED)
    monkeypatch.setattr(memory_budget, "MIN_TILE", tile)
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", tile)
    mfptq.convert(release, tmp_path / "out", max_workers=2, formats=WIDENED)
    assert equal(tmp_path / "out", tmp_path / "expected")


def test_a_stack_of_experts_in_fp8_is_split_like_one_in_bf16(tmp_path: Path) -> None:
    tensors: dict[str, Tensors] = {"release": {}, "cast": {}}
    for leaf, (rows, columns) in {"gate_up_proj": (2 * 192, 128), "down_proj": (128, 192)}.items():
        made = [fp8_block(weight(rows, columns, seed)) for seed in range(3)]
        name = f"model.layers.0.mlp.experts.{leaf}"
        tensors["release"][name] = torch.stack([each["weight"] for each in made])
        tensors["release"][f"{name}_scale_inv"] = torch.stack([each["scale"] for each in made])
        tensors["cast"][name] = torch.stack([deepseek(each["weight"], each["scale"]) for each in made])
    for name, held in tensors.items():
        write(tmp_path / name, held)
        mfptq.convert(tmp_path / name, tmp_path / f"{name}-out")
    assert equal(tmp_path / "release-out", tmp_path / "cast-out")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("poison", ["code", "scale"])
def test_nan_is_refused_with_its_place_whether_quantized_or_kept(kept: bool, poison: str, tmp_path: Path) -> None:
    made = fp8_block(weight(256, 128))
    if poison == "code":
        made["weight"].view(torch.uint8)[3, 5] = 0xFF
    else:
        made["scale"][1, 0] = torch.nan
    write(tmp_path / "source", {
        "a.weight": made["weight"], "a.weight_scale_inv": made["scale"], "b.weight": weight(16, 16),
    })  # fmt: skip
    place = 3 * 128 + 5 if poison == "code" else 128 * 128
    with pytest.raises(NonFiniteWeightError, match=rf"'a(.weight)?' .* nan at flat index {place}"):
        mfptq.convert(tmp_path / "source", tmp_path / "out", ignore=["a"] if kept else [])


def test_a_file_of_scales_alone_has_no_counterpart(tmp_path: Path) -> None:
    made = fp8_block(weight(48, 64))
    source = write(tmp_path / "source", {"a.weight": made["weight"]}, {"a.weight_scale_inv": made["scale"]})
    mfptq.convert(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert mfptq.verify(tmp_path / "out", source).ok


def test_scales_that_change_while_they_are_read_are_noticed(tmp_path: Path) -> None:
    made = fp8_block(weight(48, 64))
    source = write(tmp_path / "source", {"a.weight": made["weight"]}, {"a.weight_scale_inv": made["scale"]})
    changed: list[bool] = []

    def change(_event: object) -> None:
        if not changed:
            changed.append(True)
            save_file({"a.weight_scale_inv": made["scale"] * 2}, source / "model-00002-of-00002.safetensors")

    with pytest.raises(SourceChangedError):
        mfptq.convert(source, tmp_path / "out", on_event=change, max_workers=1)


def test_plan_and_inspect_say_what_is_stored_how(tmp_path: Path) -> None:
    release, _ = twins(tmp_path, SMALL, "MXFP4")
    done = command("plan", release, "--all")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())  # lines are as wide as the terminal
    assert "source: 33 weights are stored as MXFP4, E8M0 scale per 32 columns" in shown
    assert (
        "cast from MXFP4, E8M0 scale per 32 columns (lossless where exponents span at most 17: codes go over" in shown
    )
    searched = " ".join(command("plan", release, "--method", "search").stdout.split())
    assert "decoded from MXFP4, E8M0 scale per 32 columns (lossless where exponents span at most 14)" in searched
    assert "multi-token prediction head, widened from MXFP4, E8M0 scale per 32 columns" in shown
    assert "lossless" not in command("plan", release, "--method", "minmax").stdout
    found = mfptq.inspect(release)
    assert found.notes == ("33 weights are stored as MXFP4, E8M0 scale per 32 columns",)
    assert found.notes[0] in command("inspect", release).stdout
    broken = write(tmp_path / "broken", {"a.weight": fp8_block(weight(16, 16))["weight"]})
    [note] = mfptq.inspect(broken).notes
    assert note.startswith("it cannot be converted: 'a.weight'")


def test_a_static_fp8_release_gives_its_own_input_scales(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for number, leaf in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
        made = fp8_block(weight(32, 32, number), (32, 32))
        name = f"model.layers.0.self_attn.{leaf}"
        tensors |= {f"{name}.weight": made["weight"], f"{name}.weight_scale": made["scale"][0, 0]}
        tensors[f"{name}.input_scale"] = torch.tensor(0.0625)
    source = write(tmp_path / "source", tensors, config={"quantization_config": {"quant_method": "fp8"}})
    with mfptq.plan(source) as plan:
        assert plan.scheme == "NVFP4A16"
        assert "it holds 4 static input scales: given as input_scales too" in plan._planned.contents.notes[1]
    report = mfptq.convert(source, tmp_path / "out", input_scales=source)
    assert report.scheme == "NVFP4"
    assert stored(tmp_path / "out")["model.layers.0.self_attn.o_proj.input_global_scale"].item() == 6 / 0.0625
    assert mfptq.verify(tmp_path / "out", source).ok


def test_empty_codes_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(0, 16).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    with pytest.raises(UnsupportedTensorError, match="is empty"):
        mfptq.plan(write(tmp_path / "source", tensors))


def test_stale_files_are_left_out_and_named(tmp_path: Path) -> None:
    made = fp8_block(weight(48, 64))
    source = write(tmp_path / "source", {"a.weight": made["weight"], "a.weight_scale": made["scale"]})
    for name in ("recipe.yaml", "quantize_config.json", "params.json", "hf_quant_config.json"):
        (source / name).write_text("{}")
    plan = mfptq.plan(source)
    assert set(plan._planned.checkpoint.left_out) == {
        "recipe.yaml",
        "quantize_config.json",
        "params.json",
        "hf_quant_config.json",
    }
    assert not plan._planned.checkpoint.companions
    plan.close()


def test_progress_reaches_the_size_of_the_source(tmp_path: Path) -> None:
    from mfptq.execution.events import Advanced, Planned

    release, _ = twins(tmp_path, SMALL, "blocks, F32")
    events: list[object] = []
    mfptq.convert(release, tmp_path / "out", on_event=events.append)
    [total] = [event.total_bytes for event in events if isinstance(event, Planned)]
    assert sum(event.source_bytes for event in events if isinstance(event, Advanced)) == total
