"""Targets for the size: what the pass over the weights finds, and the outputs that follow from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mfptq
from mfptq.errors import UsageError
from mfptq.execution import size_target
from mfptq.execution.executors import Request
from mfptq.execution.format_errors import measure_errors
from mfptq.execution.memory_budget import INTERPRETER, resident_bytes
from mfptq.execution.prepare import Measuring, Resources
from mfptq.planner import make_plan
from mfptq.planning.allocation import NORM, REFERENCE
from mfptq.planning.size_units import changeable_layers
from tests.calibration.files import calibrate, random_inputs, statistics_of, stored
from tests.conftest import command, digests
from tests.smoothing.models import fold, smoothed_file, write_model

FP8 = "fp8-dynamic"


def measured(source: Path, resources: Resources | None = None, **decisions: object) -> dict[str, dict[str, float]]:
    plan = make_plan(source, **decisions)
    try:
        return measure_errors(
            plan,
            changeable_layers(plan),
            [FP8, "bf16"],
            Measuring(resources or Resources(), held=max(0, resident_bytes() - INTERPRETER)),
        )
    finally:
        plan.close()


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("method", ["search", "minmax"])
def test_errors_of_weights_are_those_that_a_conversion_reports(source: Path, tmp_path: Path, method: str) -> None:
    found = measured(source, method=method)
    assert {frozenset(each) for each in found.values()} == {frozenset({"nvfp4a16", FP8, REFERENCE, NORM})}
    for name, decisions in (("nvfp4a16", {}), (FP8, {"formats": [f"{FP8}=re:.*"]})):
        report = mfptq.convert(source, tmp_path / name, method=method, **decisions)
        total = (sum(each[name] for each in found.values()) / sum(each[NORM] for each in found.values())) ** 0.5
        assert total == pytest.approx(report.relative_error, rel=2e-3 if name == "nvfp4a16" else 1e-4)


def test_errors_of_outputs_are_those_of_the_inputs_that_were_seen(source: Path, tmp_path: Path) -> None:
    file = calibrate(source, tmp_path / "demo.calibration.safetensors")
    found = measured(source, calibration=file, scheme="NVFP4A16", method="search")
    mfptq.convert(source, tmp_path / "fp8", formats=[f"{FP8}=re:.*"])
    exact, made = stored(source), stored(tmp_path / "fp8")
    layers = sorted(found)
    for seed, name in enumerate(layers):
        members = [key.removesuffix(".weight_scale") for key in made if key.endswith(".weight_scale")]
        members = [each for each in members if _group(each) == name]
        x = None
        cost = norm = 0.0
        for member in members:
            weight = exact[f"{member}.weight"].double().numpy()
            values = (
                (made[f"{member}.weight"].to(torch.float32) * made[f"{member}.weight_scale"].float()).double().numpy()
            )
            x = random_inputs(weight.shape[1], seed=seed) if x is None else x
            known = statistics_of(x)
            errors = (values - weight).reshape(len(weight), -1, 16)
            cost += float(np.einsum("nbi,bij,nbj->", errors, known.hessian.astype(np.float64), errors))
            norm += float((np.square(weight) @ known.second_moment.astype(np.float64)).sum())
        assert found[name][FP8] == pytest.approx(cost, rel=1e-4)
        assert found[name][NORM] == pytest.approx(norm, rel=1e-5)


def _group(module: str) -> str:
    parent, _, leaf = module.rpartition(".")
    fused = {
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "in_proj_qkv": "in_proj_qkvz",
        "in_proj_z": "in_proj_qkvz",
    }
    fused |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    return f"{parent}.{fused.get(leaf, leaf)}"


@pytest.mark.parametrize("kind", ["source", "moe_source"])
def test_neither_memory_nor_threads_change_what_is_found(request: pytest.FixtureRequest, kind: str) -> None:
    source = request.getfixturevalue(kind)
    first = measured(source, Resources("4GiB", 1))
    assert measured(source, Resources("4GiB", 5)) == first
    assert measured(source, Resources("180MB", 3)) == first


@pytest.mark.parametrize("bits", [4.6, 5.2, 6.0, 8.2, 12.0, 15.0])
def test_an_output_has_the_size_that_was_predicted_and_not_more_than_asked(
    source: Path, tmp_path: Path, bits: float
) -> None:
    out = tmp_path / "out"
    with mfptq.plan(source, target_bits=bits) as plan:
        row = plan._planned.allocation.row
        assert row.bits <= bits
        assert row.error <= 1
        plan.run(out)
    assert shard_bytes(out) == row.nbytes
    assert mfptq.verify(out, source).ok
    assert mfptq.check(out).ok


def test_a_size_in_bytes_is_not_exceeded_and_used_as_far_as_layers_allow(source: Path, tmp_path: Path) -> None:
    with mfptq.plan(source) as least, mfptq.plan(source, formats=[f"{FP8}=re:.*"]) as most:
        size = (least._planned.output_bytes + most._planned.output_bytes) // 2
        largest = max(weight.size for weight in least._planned.weights())
    mfptq.convert(source, tmp_path / "out", target_size=size)
    assert size - largest < shard_bytes(tmp_path / "out") <= size


def test_a_choice_predicts_no_more_error_than_a_rule_of_the_same_size(source: Path) -> None:
    with mfptq.plan(source, formats=[f"{FP8}=re:.*(self_attn|linear_attn).*"]) as rule:
        size = rule._planned.output_bytes
    with mfptq.plan(source, target_size=size) as plan:
        allocation = plan._planned.allocation
        assert plan._planned.output_bytes <= size
    by_rule = sum(unit.options["attn" in unit.name].error for unit in allocation.units)
    assert [unit.options[1].format for unit in allocation.units] == [FP8] * len(allocation.units)
    assert allocation.row.error * allocation.base_error <= by_rule * (1 + 1e-12)


def test_the_least_target_is_the_plain_conversion_and_less_is_refused(source: Path, tmp_path: Path) -> None:
    with mfptq.plan(source) as plan:
        size = plan._planned.output_bytes
    mfptq.convert(source, tmp_path / "plain")
    mfptq.convert(source, tmp_path / "least", target_size=size)
    plain, least = digests(tmp_path / "plain"), digests(tmp_path / "least")
    assert {name: each for name, each in least.items() if "safetensors" in name or name == "config.json"} == {
        name: each for name, each in plain.items() if "safetensors" in name or name == "config.json"
    }
    with pytest.raises(UsageError, match="at least"), mfptq.plan(source, target_size=size - 1):
        pass


@pytest.mark.parametrize("kind", ["source", "moe_source"])
def test_more_bits_never_predict_more_error(request: pytest.FixtureRequest, kind: str) -> None:
    with mfptq.plan(request.getfixturevalue(kind), target_bits=15) as plan:
        rows = list(plan._planned.allocation.frontier([4.6, 5, 5.5, 6, 7, 8, 10, 12, 16]))
    assert [row.error for row in rows] == sorted((row.error for row in rows), reverse=True)
    assert rows[-1].error == 0


def test_what_a_rule_says_stays_and_experts_of_a_layer_have_one_format(moe_source: Path) -> None:
    rule = r"nvfp4a16=re:.*layers\.0\..*"
    with mfptq.plan(moe_source, target_bits=7, formats=[rule]) as plan:
        found = {tensor.name: tensor for tensor in plan.tensors if ".layers." in tensor.name and tensor.format}
        allocation = plan._planned.allocation
    assert all(tensor.format == "nvfp4a16" for name, tensor in found.items() if ".layers.0." in name)
    assert any(tensor.format == FP8 for tensor in found.values())
    assert not any(".layers.0." in module for unit in allocation.units for module in unit.modules)
    experts = [unit for unit in allocation.units if unit.name.endswith("mlp.experts")]
    assert all(
        {module.rpartition(".")[2] for module in unit.modules} == {"gate_up_proj", "down_proj"} for unit in experts
    )


@pytest.mark.parametrize("allowed", [[FP8], ["bf16"]])
def test_only_allowed_formats_are_given(source: Path, allowed: list[str]) -> None:
    with mfptq.plan(source, target_bits=7, target_formats=allowed) as plan:
        assert plan._planned.allocation.row.formats.keys() == {"nvfp4a16", *allowed}


def test_w4a4_keeps_its_input_scales_where_layers_stay_nvfp4(source: Path, tmp_path: Path) -> None:
    file = calibrate(source, tmp_path / "demo.calibration.safetensors")
    mfptq.convert(source, tmp_path / "out", calibration=file, target_bits=6)
    tensors = stored(tmp_path / "out")
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    scaled = {name.removesuffix(".input_global_scale") for name in tensors if name.endswith(".input_global_scale")}
    assert packed == scaled != set()
    assert mfptq.check(tmp_path / "out").ok


def test_errors_of_smoothed_weights_are_those_of_the_folded_model(tmp_path: Path) -> None:
    """With the statistics of its own inputs; a file that keeps them is not taken for errors without smoothing."""
    source = write_model(tmp_path / "source", "qwen3_moe")
    file, kept = calibrate(source, tmp_path / "demo.calibration.safetensors"), tmp_path / "errors.json"
    folded = fold(source, tmp_path / "folded", calibration=file)
    own = smoothed_file(source, file, tmp_path / "own.calibration.safetensors")
    rest = {"scheme": "NVFP4A16", "method": "search"}
    found = measured(source, calibration=file, smooth=True, **rest)
    expected = measured(folded, calibration=own, **rest)
    assert found.keys() == expected.keys()
    for name, errors in found.items():
        assert errors == pytest.approx(expected[name], rel=1e-3), name
    keys = []
    for smooth in (True, False, True):
        with mfptq.plan(source, calibration=file, smooth=smooth, target_bits=6, format_errors=kept, **rest):
            keys.append(json.loads(kept.read_text())["key"])
    assert keys[0] == keys[2] != keys[1]


def test_errors_are_kept_beside_the_output_and_found_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mfptq.convert(source, tmp_path / "out", target_bits=5)
    kept = tmp_path / "out.format-errors.json"
    assert json.loads(kept.read_text())["errors"]
    monkeypatch.setattr(size_target, "measure_errors", lambda *_: pytest.fail("found already"))
    mfptq.convert(source, tmp_path / "out", target_bits=5)
    mfptq.convert(source, tmp_path / "other", target_bits=6, format_errors=kept)


@pytest.mark.parametrize("damage", ["", "{", '{"key": 1}', "[]"])
def test_a_file_that_is_damaged_or_of_another_plan_is_made_anew(source: Path, tmp_path: Path, damage: str) -> None:
    kept = tmp_path / "errors.json"
    with mfptq.plan(source, target_bits=5, format_errors=kept) as plan:
        first, chosen = kept.read_text(), plan._planned.allocation.chosen
    kept.write_text(damage)
    with mfptq.plan(source, target_bits=5, format_errors=kept) as plan:
        assert plan._planned.allocation.chosen == chosen
    assert kept.read_text() == first
    with mfptq.plan(source, target_bits=5, method="minmax", format_errors=kept):
        assert json.loads(kept.read_text())["key"] != json.loads(first)["key"]


def test_another_machine_takes_over_what_was_chosen(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mfptq.plan(source, target_bits=5.5) as plan:
        request, expected = plan._request, plan._planned.digests
    assert isinstance(request, Request)
    monkeypatch.setattr(size_target, "measure_errors", lambda *_: pytest.fail("measured again"))
    again = make_plan(request.source, **request.decisions)
    assert again.digests == expected
    again.close()


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ({"target_bits": 5, "target_size": "1GB"}, "mutually exclusive"),
        ({"target_bits": 0}, "expected a number of bits"),
        ({"target_bits": 4.4}, "at least"),
        ({"target_bits": 16}, "leaves nothing to quantize"),
        ({"target_size": "many"}, "is not understood"),
        ({"target_formats": [FP8]}, "give target_bits or target_size"),
        ({"target_bits": 5, "target_formats": ["fp4"]}, "expected some of fp8-dynamic, bf16"),
    ],
)
def test_targets_that_make_no_sense_are_refused(source: Path, decisions: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message), mfptq.plan(source, **decisions):
        pass


def test_the_command_line_shows_the_frontier_and_explains_a_layer(source: Path, tmp_path: Path) -> None:
    options = ["--target-bits", "5.5", "--format-errors", tmp_path / "errors.json"]
    shown = command("plan", source, "--no-estimate", *options)
    assert shown.returncode == 0, shown.stderr
    assert "target 5.5 bits per weight: 5." in shown.stdout
    rows = [line for line in shown.stdout.splitlines() if line.startswith(("* ", "  ")) and line.count("%") == 4]
    assert len(rows) > 4
    assert sum(line.startswith("*") for line in rows) == 1
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    told = command("plan", source, "--explain", name, *options).stdout
    assert "mlp.down_proj, for 5.5 bits per weight:" in told
    assert sum("of the error without a target" in line for line in told.splitlines()) >= 3
    data = json.loads(command("plan", source, "--json", *options).stdout)["target"]
    assert data["chosen"]["model.language_model.layers.0.mlp.down_proj"] in ("nvfp4a16", FP8, "bf16")


def test_a_recipe_may_name_a_target_and_the_command_line_another(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("target_bits = 6\ntarget_formats = ['fp8-dynamic']\n")
    with mfptq.plan(source, recipe=recipe) as plan:
        assert plan._planned.allocation.target == "6 bits per weight"
    with mfptq.plan(source, recipe=recipe, target_size="1GB") as plan:
        assert plan._planned.allocation.target == "1.00 GB"
    saved = tmp_path / "saved.toml"
    done = command("plan", source, "--target-bits", 5.25, "--save-recipe", saved)
    assert done.returncode == 0, done.stderr
    assert saved.read_text() == "target_bits = 5.25\n"
