"""Smoothing that nobody asked for: where it is the default, where it is not, and that it never stops a conversion."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.calibration.file import InputInfo
from mfptq.checkpoint.companions import SMOOTHING
from mfptq.errors import PlanMismatchError, ScaleError, SmoothingError
from mfptq.planner import make_plan
from mfptq.planning.plan import ConversionPlan

from ..calibration.files import calibrate, described, layers_of, random_inputs, statistics_of, stored, write_file
from ..conftest import SMALL, Stopped, command, digests, sampled, stopping_at
from ..encodings.checkpoints import mxfp4
from ..models import MOE
from .models import write_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", "llama")


@pytest.fixture
def path(llama: Path, tmp_path: Path) -> Path:
    return calibrate(llama, tmp_path / "x.calibration.safetensors")


def planned(source: Path, **decisions: object) -> ConversionPlan:
    with closing(make_plan(source, **decisions)) as plan:  # type: ignore[arg-type]
        return plan


def changed(source: Path, values: dict[str, torch.Tensor], *, without: str = "nothing") -> Path:
    """Change tensors of a checkpoint in one file."""
    [file] = source.glob("*.safetensors")
    kept = {name: each for name, each in load_file(file).items() if without not in name}
    save_file(kept | values, file, {"format": "pt"})
    return source


@pytest.mark.parametrize("kind", sampled(["llama"], [MOE]))
def test_w4a4_is_smoothed_where_the_method_is_left_open(kind, tmp_path):
    """All files are those of a conversion that was asked to smooth, and the report says so."""
    source = write_model(tmp_path / "source", kind)
    path = calibrate(source, tmp_path / "x.calibration.safetensors")
    report = mfptq.convert(source, tmp_path / "out", calibration=path)
    mfptq.convert(source, tmp_path / "asked", calibration=path, smooth=True)
    mfptq.convert(source, tmp_path / "auto", calibration=path, method="auto", smooth=None)
    assert digests(tmp_path / "out") == digests(tmp_path / "asked") == digests(tmp_path / "auto")
    assert report.smoothed == json.loads((tmp_path / "out" / "mfptq_report.json").read_text())["smoothing"]["weights"]
    assert report.smoothed > 0
    assert "--smooth" in (tmp_path / "out" / "README.md").read_text()
    assert mfptq.verify(tmp_path / "out", source).ok


def test_false_turns_it_off(llama, path, tmp_path):
    report = mfptq.convert(llama, tmp_path / "out", calibration=path, smooth=False)
    named = mfptq.convert(llama, tmp_path / "named", calibration=path, method="hessian+")
    assert report.smoothed == named.smoothed == 0
    assert not (tmp_path / "out" / SMOOTHING).exists()
    assert "--no-smooth" in (tmp_path / "out" / "README.md").read_text()
    one, other = stored(tmp_path / "out"), stored(tmp_path / "named")
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in other)


@pytest.mark.parametrize(
    "decisions",
    [{"scheme": "W4A16"}, {"method": "search"}, {"method": "minmax"}, {"method": "hessian+"}],
    ids=lambda each: " ".join(each.values()),
)
def test_neither_weights_alone_nor_a_method_by_name_is_smoothed(decisions, llama, path):
    assert planned(llama, calibration=path, **decisions).smoothing is None


def test_input_scales_from_elsewhere_are_not_smoothed(llama, path, tmp_path):
    ranges = calibrate(llama, tmp_path / "amax.calibration.safetensors", described("amax"))
    mfptq.convert(llama, tmp_path / "theirs", calibration=path, smooth=False)
    for decisions in (
        {"calibration": ranges},
        {"input_scales": tmp_path / "theirs"},
        {"like": tmp_path / "theirs"},
        {"input_scales": "auto"},
    ):
        plan = planned(llama, **decisions)
        assert plan.scheme == "NVFP4"
        assert plan.smoothing is None


def test_layers_whose_inputs_stay_in_16_bits_are_left_alone(llama, path):
    plan = planned(llama, calibration=path, formats=["nvfp4a16=re:.*mlp.*"])
    assert plan.smoothing.left == {"their inputs stay in 16 bits": 6}
    assert plan.smoothing.weights == 8


def test_an_unknown_model_is_converted_as_without_smoothing_and_the_plan_says_so(llama, path, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    mfptq.convert(llama, tmp_path / "out", calibration=path)
    mfptq.convert(llama, tmp_path / "plain", calibration=path, smooth=False)
    names = {"README.md", "mfptq_report.json", "SHA256SUMS"}
    one, other = ({k: v for k, v in digests(tmp_path / each).items() if k not in names} for each in ("out", "plain"))
    assert one == other
    assert "smoothed" not in (tmp_path / "out" / "README.md").read_text()
    shown = command("plan", llama, "--calibration", path, "--no-estimate").stdout
    assert "not smoothed: 14 weights, the model's type is none whose blocks are known" in shown
    assert "--no-smooth" not in shown


def test_the_command_says_that_it_smooths_and_how_to_turn_it_off(llama, path, tmp_path):
    text = " ".join(command("plan", llama, "--calibration", path, "--no-estimate").stdout.split())
    assert "smoothing: the inputs of 14 quantized weights, factors from 2^" in text
    assert "(by default for W4A4; --no-smooth turns it off)" in text
    asked = " ".join(command("plan", llama, "--calibration", path, "--no-estimate", "--smooth").stdout.split())
    assert "smoothing: the inputs of 14 quantized weights" in asked
    assert "by default" not in asked
    off = json.loads(command("plan", llama, "--calibration", path, "--no-smooth", "--json").stdout)
    assert off["smoothing"] is None
    done = " ".join(command("convert", llama, tmp_path / "out", "--calibration", path).stdout.split())
    assert "inputs of 14 weights smoothed, their factors are in the norms before: --no-smooth turns it off" in done
    assert "smoothed" not in command("convert", llama, tmp_path / "off", "--calibration", path, "--no-smooth").stdout


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "post_attention_layernorm.weight"])
def test_a_weight_beyond_the_range_stops_no_conversion_unless_smoothing_was_asked_for(name, llama, path, tmp_path):
    """A matrix that becomes FP4, and a norm that is kept and becomes the largest number there is."""
    full = f"model.layers.1.{name}"
    values = stored(llama)[full]
    values[...] = 3e38
    changed(llama, {full: values})
    mfptq.convert(llama, tmp_path / "out", calibration=path)
    assert all(torch.isfinite(each.float()).all() for each in stored(tmp_path / "out").values())
    if "norm" in name:
        assert mfptq.verify(tmp_path / "out", llama).ok
        assert stored(tmp_path / "out")[full].max() == torch.finfo(torch.bfloat16).max
    with pytest.raises(SmoothingError, match="is larger than any number of BF16"):
        mfptq.convert(llama, tmp_path / "asked", calibration=path, smooth=True)


@pytest.mark.parametrize("smooth", [None, True])
def test_weights_at_the_lower_end_are_rounded_to_what_there_is(smooth, tmp_path):
    """The router, which is kept, holds numbers below the normal ones; it is off by 2^-134 at most, and verified."""
    source = write_model(tmp_path / "source", MOE)
    path = calibrate(source, tmp_path / "x.calibration.safetensors")
    name = "model.language_model.layers.0.mlp.gate.weight"
    values = stored(source)[name]
    values[:, ::2] = (values[:, ::2].double() * 2.0**-125).bfloat16()
    changed(source, {name: values})
    mfptq.convert(source, tmp_path / "out", calibration=path, smooth=smooth)
    [exponents] = planned(source, calibration=path).smoothing.powers[name].columns
    exact = values.double() * 2.0 ** torch.from_numpy(exponents.astype(np.float64))
    off = (stored(tmp_path / "out")[name].double() - exact).abs()
    assert 0 < off.max() <= 2.0**-134
    assert mfptq.verify(tmp_path / "out", source).ok


def test_codes_that_go_over_as_they_are_stay(llama, path, tmp_path):
    """MXFP4 loses nothing in NVFP4: what reads the same norm, and what it makes, are left alone."""
    gate, up = (f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up"))
    coded = {}
    for name in (gate, up):
        parts = mxfp4(stored(llama)[f"{name}.weight"])
        coded |= {f"{name}.weight_packed": parts["packed"], f"{name}.weight_scale": parts["scale"]}
    changed(llama, coded, without="layers.0.mlp")
    changed(llama, {"model.layers.0.mlp.down_proj.weight": torch.randn(64, 96).bfloat16()})
    mfptq.convert(llama, tmp_path / "out", calibration=path)
    found = stored(tmp_path / "out")
    for name in (gate, up):
        assert torch.equal(found[f"{name}.weight_packed"], coded[f"{name}.weight_packed"])
    left = json.loads((tmp_path / "out" / "mfptq_report.json").read_text())["smoothing"]["left"]
    assert left == {"codes of theirs, or of what makes their input, go over as they are": 3}
    assert mfptq.verify(tmp_path / "out", llama).ok


def test_fp8_that_is_kept_stays_fp8(llama, path, tmp_path):
    """v_proj, which is kept, makes the input of o_proj, which is not."""
    mfptq.convert(llama, tmp_path / "fp8", formats=["fp8-dynamic=re:.*_proj$"])
    mfptq.convert(tmp_path / "fp8", tmp_path / "out", calibration=path, ignore=["re:.*layers.0.*[qkv]_proj"])
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "fp8")
    for leaf in "qkv":
        name = f"model.layers.0.self_attn.{leaf}_proj.weight"
        assert expected[name].dtype == torch.float8_e4m3fn
        assert torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))
    report = json.loads((tmp_path / "out" / "mfptq_report.json").read_text())["smoothing"]
    assert report["left"] == {"codes of theirs, or of what makes their input, go over as they are": 1}
    assert report["weights"] == 10


def test_one_input_of_the_file_for_layers_with_different_ones_is_left_alone(llama, tmp_path):
    """q_proj has the statistics of the MLP's input, k_proj and v_proj others: two norms would need factors of one input."""
    inputs = {}
    for seed, (name, (columns, members)) in enumerate(layers_of(llama).items()):
        found, q_proj = statistics_of(random_inputs(columns, seed=seed)), "model.layers.0.self_attn.q_proj"
        more = (q_proj,) if name.startswith("model.layers.0.mlp.gate") else ()
        rest = tuple(each for each in members if each != q_proj)
        inputs[InputInfo(name, columns, rest + more)] = found
    path = write_file(tmp_path / "x.calibration.safetensors", inputs)
    plan = planned(llama, calibration=path)
    assert plan.smoothing.left == {"the calibration file has one input for them and others": 5}
    assert plan.smoothing.weights == 9
    mfptq.convert(llama, tmp_path / "out", calibration=path)
    assert mfptq.verify(tmp_path / "out", llama).ok


def test_scales_of_a_smoothed_output_are_not_taken_for_those_of_others(llama, path, tmp_path):
    """Its choice of layers may be, and it can be repaired as any NVFP4 checkpoint."""
    out = tmp_path / "out"
    mfptq.convert(llama, out, calibration=path, ignore=["re:.*o_proj"])
    for decisions in ({"input_scales": out}, {"like": out}):
        with pytest.raises(ScaleError, match=r"are of smoothed inputs, see its mfptq_smoothing\.json"):
            planned(llama, **decisions)
    done = command("calibration", "extract", out, "--output", tmp_path / "taken.calibration.safetensors")
    assert done.returncode == 4
    assert "has smoothed inputs" in done.stderr
    assert planned(llama, like=out, scheme="W4A16").formats == {"nvfp4a16": 12}
    mfptq.convert(out, tmp_path / "repaired", like=out)  # as `repair` does
    assert mfptq.verify(tmp_path / "repaired", out).ok
    one, other = stored(tmp_path / "repaired"), stored(out)
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in other)


def test_parts_and_a_resumed_run_make_the_same(tmp_path):
    from mfptq.demo import write_demo

    source, out = tmp_path / "source", tmp_path / "out"
    write_demo(source, replace(SMALL, layers=1))
    decisions = {"calibration": calibrate(source, tmp_path / "x.calibration.safetensors")}
    for number in (2, 1):
        with mfptq.plan(source, **decisions) as plan:
            plan.run_part(tmp_path / "parts", f"{number}/2")
    with mfptq.plan(source, **decisions) as plan:
        plan.finish(tmp_path / "parts")
    with pytest.raises(Stopped):
        mfptq.convert(source, out, **decisions, on_event=stopping_at(mfptq.ShardFinished))
    with pytest.raises(PlanMismatchError, match=r"unfinished conversion with other .*smoothing"):
        mfptq.convert(source, out, **decisions, smooth=False)
    assert mfptq.convert(source, out, **decisions).resumed_shards >= 1
    assert digests(out) == digests(tmp_path / "parts")
    again = mfptq.convert(source, out, **decisions)
    assert again.already_complete
    assert again.smoothed > 0
