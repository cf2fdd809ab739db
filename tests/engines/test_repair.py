"""Checkpoints as llm-compressor writes them: `check` finds every unequal group and nothing else, `repair` mends them."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfptq
from mfptq.demo import DemoShape, write_demo
from tests.conftest import command, sampled
from tests.engines.llm_compressor import (
    as_served,
    layer_errors,
    read,
    unequal_groups,
    unstacked,
    write_as_llm_compressor,
)

torch = pytest.importorskip("torch")
SHAPES = {"dense": DemoShape(), "experts": DemoShape(experts=4, intermediate=128)}
GROUPS = {
    "dense": 3,
    "experts": 3 + 4 + 16 - 1,
}  # DeltaNet layers; shared and routed experts, one of them equal by chance


@pytest.fixture(scope="module", params=SHAPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The name of a shape, a source, and what llm-compressor makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    write_demo(folder / "source", SHAPES[request.param])
    return request.param, folder / "source", write_as_llm_compressor(folder / "source", folder / "llmc")


def test_every_unequal_group_is_found_and_nothing_else(made: tuple[str, Path, Path]) -> None:
    name, source, written = made
    expected = unequal_groups(read(written))
    assert len(expected) == GROUPS[name]
    for engine in ("vllm", "sglang"):
        found = mfptq.check(written, engines=[engine], source=source).findings
        assert {each.code for each in found} == {"unequal-weight-scales"}
        assert sum(each.count for each in found) == len(expected)


@pytest.mark.parametrize("with_source", [False, True])
def test_repaired_it_is_clean_and_no_layer_is_worse(
    made: tuple[str, Path, Path], with_source: bool, tmp_path: Path
) -> None:
    _, source, written = made
    words = ["repair", written, tmp_path / "out", *(["--source", source] if with_source else [])]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert mfptq.check(tmp_path / "out", source=source).findings == ()
    exact = unstacked(read(source))
    before, after = as_served(read(written)), as_served(read(tmp_path / "out"))
    assert before.keys() == after.keys()
    was, now = layer_errors(before, exact), layer_errors(after, exact)
    bound = 1 if with_source else 1.01  # partners whose scales were nearly equal are rounded a second time
    assert not [layer for layer in was if now[layer] > bound * was[layer]]
    assert sum(was[layer] > 1.5 * now[layer] for layer in was) >= GROUPS[made[0]] // 2  # wrong by far, as served before
    assert max(now.values()) < (0.09 if with_source else 0.105)
    if with_source:
        for module, weight in after.items():  # and no member of a fused layer either
            original = exact[f"{module}.weight"].float()
            assert (weight - original).norm() <= (before[module] - original).norm(), module
        assert mfptq.verify(tmp_path / "out", source).ok


def test_a_repair_resumes_and_gives_the_same_bytes(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, written = made
    for number in (1, 2):
        assert command("repair", written, tmp_path / f"out{number}").returncode == 0
    again = command("repair", written, tmp_path / "out2")
    assert "already complete" in again.stdout
    one, other = read(tmp_path / "out1"), read(tmp_path / "out2")
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


@pytest.mark.parametrize("value", sampled([0.0, 1.0, float("nan")], [float("inf")]))
def test_experts_that_calibration_never_reached_are_filled(value: float, moe_source: Path, tmp_path: Path) -> None:
    from tests.cli.test_check import set_scalar

    written = tmp_path / "w4a4"
    mfptq.convert(moe_source, written, input_scales="auto")
    projections = [
        f"model.language_model.layers.0.mlp.experts.{{}}.{leaf}.input_global_scale" for leaf in ("gate_proj", "up_proj")
    ]
    for number, scale in enumerate((90.0, value, 70.0, 80.0)):
        for name in projections:
            set_scalar(written, name.format(number), scale)
    assert {each.code for each in mfptq.check(written).findings} == {"uncalibrated"}
    report = mfptq.convert(written, tmp_path / "out", like=written)
    assert "1 expert was never calibrated: it takes the smallest input scale" in report.warnings[0]
    tensors = read(tmp_path / "out")
    for name in projections:
        assert [float(tensors[name.format(number)]) for number in range(4)] == [90.0, 70.0, 70.0, 80.0]
    assert mfptq.check(tmp_path / "out").findings == ()
    set_scalar(written, "model.language_model.layers.3.self_attn.o_proj.input_global_scale", 0.0)
    with pytest.raises(mfptq.SourceError, match=r"o_proj\.input_global_scale' .* is 0\.0, expected a positive number"):
        mfptq.convert(written, tmp_path / "out2", like=written)


def test_verify_and_compare_say_what_they_cannot(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, written = made
    assert "it is no output of mfptq: use check" in command("verify", written).stderr
    command("repair", written, tmp_path / "repaired")
    shown = command("compare", tmp_path / "repaired", tmp_path / "repaired").stdout
    assert "nothing is known of their errors" in shown
    assert "weight_global_scale: 0 of" in shown
