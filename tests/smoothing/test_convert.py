"""Conversions with smoothing: what is written equals what the plain converter makes of the folded checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.calibration.file import InputInfo, InputStatistics
from mfptq.calibration.reading import load_calibration
from mfptq.calibration.smoothed import smoothed
from mfptq.checkpoint.companions import SMOOTHING
from mfptq.demo import write_demo
from mfptq.errors import PlanMismatchError, ScaleError, SmoothingError, UsageError
from mfptq.planner import make_plan

from ..calibration.files import calibrate, described, layers_of, stored, write_file
from ..conftest import SMALL, SMALL_EXPERTS, Stopped, command, digests, sampled, stopping_at
from ..encodings.checkpoints import decoded
from ..models import MOE
from .models import fold, smoothed_file, write_model

pytestmark = pytest.mark.filterwarnings("ignore")
ONE_LAYER = replace(SMALL, layers=1)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", MOE])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("smoothed") / "source", request.param)


@pytest.fixture(scope="module")
def path(source: Path) -> Path:
    return calibrate(source, source.parent / "x.calibration.safetensors")


@pytest.fixture(scope="module")
def smoothed_output(source: Path, path: Path) -> Path:
    """What nobody changes: tests that do take a copy."""
    mfptq.convert(source, source.parent / "smoothed", calibration=path, smooth=True)
    return source.parent / "smoothed"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", "llama")


def tensors(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def folded(source: Path, path: Path) -> Path:
    return fold(source, source.parent / "folded", calibration=path)


@pytest.fixture(scope="module")
def own(source: Path, path: Path) -> Path:
    """The calibration file of the folded checkpoint."""
    return smoothed_file(source, path, source.parent / "y.calibration.safetensors")


@pytest.mark.parametrize("method", sampled(["search", "hessian+"], ["minmax", "weighted"]))
def test_the_output_is_that_of_the_folded_checkpoint_with_its_own_statistics(
    method, source, path, folded, own, tmp_path
):
    """Tensor by tensor to the bit, the input scales apart: they come from a bound instead of from a second pass."""
    report = mfptq.convert(source, tmp_path / "out", calibration=path, smooth=True, method=method)
    mfptq.convert(folded, tmp_path / "plain", calibration=own, method=method)
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name, values in found.items():
        if name.endswith("input_global_scale"):
            assert values <= expected[name], name
            assert values > expected[name] / 64, name
        else:
            assert torch.equal(values.view(torch.uint8), expected[name].view(torch.uint8)), name
    assert mfptq.verify(tmp_path / "out", source).ok
    assert report.scheme == "NVFP4"


def test_feedback_takes_factors_of_the_divided_inputs(tmp_path):
    """Low-rank factors follow by columns; those of divided activations would be other ones, as good."""
    source = write_model(tmp_path / "source", "llama")
    path = calibrate(source, tmp_path / "x.calibration.safetensors", described("factors"))
    folded = fold(source, tmp_path / "folded", calibration=path)
    mfptq.convert(source, tmp_path / "out", calibration=path, smooth=True, method="gptq")
    plan, file = make_plan(source, calibration=path, smooth=True), load_calibration(path)
    exponents = {name: each.astype(float) for name, each in plan.smoothing.inputs.items()}
    inputs = {}
    for info in file.inputs.values():
        found = file.read(info)
        divided = found.factors / 2 ** exponents.get(info.name, np.zeros(info.columns))
        inputs[info] = replace(
            smoothed(found, exponents[info.name].astype(np.int8)), factors=divided.astype(np.float32)
        )
    for opened in (plan, file):
        opened.close()
    own = write_file(tmp_path / "y.calibration.safetensors", inputs, described("factors"))
    mfptq.convert(folded, tmp_path / "plain", calibration=own, method="gptq")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "plain")


def test_weight_only_outputs_are_smoothed_too(source, path, smoothed_output, tmp_path):
    mfptq.convert(source, tmp_path / "out", calibration=path, smooth=True, scheme="W4A16")
    found, other = stored(tmp_path / "out"), stored(smoothed_output)
    assert found.keys() < other.keys()
    assert all(torch.equal(values.view(torch.uint8), other[name].view(torch.uint8)) for name, values in found.items())


@pytest.mark.parametrize("shape", [ONE_LAYER, replace(SMALL_EXPERTS, layers=1)], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["search", "hessian+"])
@pytest.mark.parametrize(("tile", "workers"), sampled([(64, 3)], [(64, 1), (512, 3), (4096, 2)]))
def test_tiles_and_workers_do_not_change_a_byte(shape, method, tile, workers, tmp_path, monkeypatch):
    """Tiles of 64 bytes are halves of a row: each part must meet the factors of its own columns."""
    source = tmp_path / "source"
    write_demo(source, shape)
    decisions = {"calibration": calibrate(source, tmp_path / "x.calibration.safetensors"), "method": method}
    mfptq.convert(source, tmp_path / "whole", smooth=True, **decisions)
    monkeypatch.setattr("mfptq.execution.memory_budget.MAX_TILE", tile)
    monkeypatch.setattr("mfptq.execution.memory_budget.MIN_TILE", tile)
    mfptq.convert(source, tmp_path / "cut", smooth=True, max_workers=workers, **decisions)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_torch_writes_the_same_bytes(tmp_path, monkeypatch):
    write_demo(tmp_path / "source", ONE_LAYER)
    path = calibrate(tmp_path / "source", tmp_path / "x.calibration.safetensors")
    mfptq.convert(tmp_path / "source", tmp_path / "compiled", calibration=path, smooth=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    mfptq.convert(tmp_path / "source", tmp_path / "torch", calibration=path, smooth=True)
    assert tensors(tmp_path / "torch") == tensors(tmp_path / "compiled")


def test_parts_make_the_same_and_a_run_is_resumed_with_the_same_factors_only(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_demo(source, ONE_LAYER)
    decisions = {"calibration": calibrate(source, tmp_path / "x.calibration.safetensors"), "scheme": "W4A16"}
    with mfptq.plan(source, **decisions, smooth=True) as plan:
        for number in (2, 1):
            plan.run_part(tmp_path / "parts", f"{number}/2")
        plan.finish(tmp_path / "parts")
    with pytest.raises(Stopped):
        mfptq.convert(source, out, **decisions, smooth=True, on_event=stopping_at(mfptq.ShardFinished))
    with pytest.raises(PlanMismatchError, match="unfinished conversion with other smoothing"):
        mfptq.convert(source, out, **decisions, smooth=False)
    assert mfptq.convert(source, out, **decisions, smooth=True).resumed_shards >= 1
    assert digests(out) == digests(tmp_path / "parts")
    assert mfptq.convert(source, out, **decisions, smooth=True).already_complete


def test_verify_checks_kept_tensors_and_that_factors_cancel(source, smoothed_output, tmp_path):
    out = shutil.copytree(smoothed_output, tmp_path / "out")
    (out / "SHA256SUMS").unlink()
    found = mfptq.verify(out, source)
    assert found.ok
    record = json.loads((out / SMOOTHING).read_text())
    kept = sorted(record["tensors"].keys() & stored(out).keys())
    assert found.scaled == len(kept) > 0
    norm = next(name for name in kept if name.endswith("input_layernorm.weight"))
    changed = shutil.copytree(out, tmp_path / "changed")
    [file] = changed.glob("*.safetensors")
    content = load_file(file)
    content[norm][1] *= 2
    save_file(content, file, {"format": "pt"})
    assert [fault.what for fault in mfptq.verify(changed, source).faults if fault.tensor == norm] == [
        "differs from the source times its factors, which it should be equal to"
    ]
    del record["tensors"][norm]
    (changed / SMOOTHING).write_text(json.dumps(record))
    content[norm] = stored(source)[norm]
    save_file(content, file, {"format": "pt"})
    assert {fault.tensor: fault.what for fault in mfptq.verify(changed, source).faults} == {
        norm: "has factors that change what the model computes"
    }
    (changed / SMOOTHING).write_text("{}")
    assert "format" in str(mfptq.verify(changed, source).faults[0])


def test_plan_report_and_card_list_what_is_scaled(source, path, smoothed_output):
    out = smoothed_output
    shown = command("plan", source, "--calibration", path, "--smooth").stdout
    assert "smoothing: the inputs of " in shown
    assert "kept, but scaled by smoothing: " in shown
    report = json.loads((out / "mfptq_report.json").read_text())
    pattern = next(name for name in report["smoothing"]["scaled_kept"] if "input_layernorm" in name)
    [row] = [row for row in report["tensors"] if row[0] == pattern]
    assert row[1] == "keep"
    assert row[-1].endswith("scaled by smoothing")
    assert "smoothed" in (out / "README.md").read_text()
    assert "--smooth" in (out / "README.md").read_text()


def test_what_is_not_certain_is_left_alone_and_told(tmp_path):
    source = write_model(tmp_path / "source", "llama")
    path = calibrate(source, tmp_path / "x.calibration.safetensors")
    [file] = source.glob("*.safetensors")
    original = load_file(file)

    def left(change: dict[str, torch.Tensor], config: dict[str, object] | None = None) -> dict[str, int]:
        save_file(original | change, file, {"format": "pt"})
        known = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(known | (config or {})))
        plan = make_plan(source, calibration=path, smooth=True)
        plan.close()
        (source / "config.json").write_text(json.dumps(known))
        return dict(plan.smoothing.left)

    layer = "model.layers.0."
    assert left({}) == {}
    assert left({f"{layer}self_attn.sinks": torch.zeros(4)}) == {
        "its block holds tensors that are not known, such as self_attn.sinks": 7
    }
    assert left({f"{layer}input_layernorm.weight": torch.ones(64, dtype=torch.float16)}) == {
        "factors of F16 tensors would not be exact": 3
    }
    assert left({}, {"num_key_value_heads": 3}) == {"what makes their input is not known for certain": 2}
    assert left({}, {"model_type": "phi3"}) == {"the model's type is none whose blocks are known": 14}


def test_inputs_of_a_layer_with_a_fixed_scale_in_another_format_are_left_alone(tmp_path):
    source = write_model(tmp_path / "source", MOE)
    path = calibrate(source, tmp_path / "x.calibration.safetensors")
    formats = ["fp8-static=re:.*shared_expert.*"]
    plan = make_plan(source, calibration=path, smooth=True, formats=formats)
    plain = make_plan(source, calibration=path, formats=formats)
    [(reason, count)] = plan.smoothing.left.items()
    assert reason == "a layer that reads the same input has a fixed scale in another format"
    assert count == 4 * 6 * 2  # gate and up of every routed expert
    scales = plan.input_scales.global_scales, plain.input_scales.global_scales
    names = [name for name in scales[0] if "shared_expert" in name]
    assert names
    assert all(scales[0][name] == scales[1][name] for name in names)
    plan.close()
    plain.close()


@pytest.mark.parametrize("amax", [40.0, 2400.0])
def test_input_scales_stay_as_good_as_they_were(amax, tmp_path):
    """However large a channel is: what all channels share is chosen so that ranges do not grow beyond what scales can hold."""
    source = write_model(tmp_path / "source", MOE)
    rng = np.random.default_rng(4)
    inputs = {}
    for name, (columns, members) in layers_of(source).items():
        moments = np.minimum(rng.lognormal(0, 4, columns), amax**2 / 2).astype(np.float32)
        inputs[InputInfo(name, columns, members)] = InputStatistics(amax, 10**6, moments)
    path = write_file(tmp_path / "x.calibration.safetensors", inputs, described("moments"))
    plan, plain = (make_plan(source, calibration=path, smooth=smooth) for smooth in (True, False))
    assert plan.smoothing.weights
    for group, scale in plan.input_scales.global_scales.items():
        assert scale >= min(plain.input_scales.global_scales[group], 2688 / 256 / 4)
    plan.close()
    plain.close()


def test_values_beyond_the_range_stop_a_conversion_that_was_asked_to_smooth(tmp_path):
    source = write_model(tmp_path / "source", "llama")
    path = calibrate(source, tmp_path / "x.calibration.safetensors")
    [file] = source.glob("*.safetensors")
    content = load_file(file)
    content["model.layers.1.self_attn.q_proj.weight"][3] = 3e38
    save_file(content, file, {"format": "pt"})
    with pytest.raises(SmoothingError, match=r"layers\.1\.self_attn\.q_proj.* is larger than any number of BF16"):
        mfptq.convert(source, tmp_path / "out", calibration=path, smooth=True)
    assert not (tmp_path / "out").exists()


def test_moments_and_a_calibration_file_are_needed(llama, tmp_path):
    with pytest.raises(UsageError, match="smooth takes its factors from a calibration file"):
        mfptq.convert(llama, tmp_path / "out", smooth=True)
    path = calibrate(llama, tmp_path / "x.calibration.safetensors", described("amax"))
    with pytest.raises(ScaleError, match="has no second moments: smoothing needs them"):
        mfptq.convert(llama, tmp_path / "out", calibration=path, smooth=True)


def test_without_smoothing_nothing_is_recorded(llama, tmp_path):
    path = calibrate(llama, tmp_path / "x.calibration.safetensors")
    mfptq.convert(llama, tmp_path / "out", calibration=path, smooth=False)
    assert not (tmp_path / "out" / SMOOTHING).exists()
    assert json.loads((tmp_path / "out" / "mfptq_report.json").read_text())["smoothing"] is None


def test_quantized_sources_give_what_their_casts_give(tmp_path):
    source = write_model(tmp_path / "source", "llama")
    mfptq.convert(source, tmp_path / "fp8", formats=["fp8-dynamic=re:.*_proj$"])
    cast = shutil.copytree(tmp_path / "fp8", tmp_path / "cast", ignore=shutil.ignore_patterns("*.safetensors"))
    kept = {name: values for name, values in stored(tmp_path / "fp8").items() if not name.endswith("_scale")}
    save_file(kept | decoded(tmp_path / "fp8"), cast / "model.safetensors", {"format": "pt"})
    (cast / "config.json").write_text((source / "config.json").read_text())
    path = calibrate(cast, tmp_path / "x.calibration.safetensors")
    mfptq.convert(cast, tmp_path / "a", calibration=path, smooth=True)
    mfptq.convert(tmp_path / "fp8", tmp_path / "b", calibration=path, smooth=True)
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    assert mfptq.verify(tmp_path / "b", tmp_path / "fp8").ok


def test_experts_that_are_kept_are_scaled_with_the_router(tmp_path):
    """The shared expert, which is quantized, reads the same norm; what only kept weights read stays."""
    source = write_model(tmp_path / "source", MOE)
    path = calibrate(source, tmp_path / "x.calibration.safetensors")
    mfptq.convert(source, tmp_path / "out", calibration=path, smooth=True, ignore=["re:.*mlp.experts$"])
    before, after = stored(source), stored(tmp_path / "out")
    layer = "model.language_model.layers.0.mlp."
    for name in ("experts.gate_up_proj", "gate.weight", "shared_expert_gate.weight"):
        ratio = (after[layer + name].float() / before[layer + name].float()).reshape(-1, before[layer + name].shape[-1])
        assert (ratio == ratio[0]).all()
        assert (ratio[0].log2() % 1 == 0).all()
        assert len(set(ratio[0].tolist())) > 1
    assert torch.equal(before[f"{layer}experts.down_proj"], after[f"{layer}experts.down_proj"])
    assert mfptq.verify(tmp_path / "out", source).ok
