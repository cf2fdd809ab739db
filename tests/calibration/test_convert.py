"""Converting with a calibration file: its scales, its methods, the same bytes however the work is cut."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam

import mfptq
from mfptq.calibration.file import InputInfo, InputStatistics
from mfptq.calibration.reading import load_calibration
from mfptq.checkpoint.header import TensorSpec, encode_header
from mfptq.demo import write_demo
from mfptq.errors import MemoryBudgetError, PlanMismatchError, ScaleError, SourceChangedError, UsageError
from mfptq.execution.memory_budget import MAX_TILE, MIN_TILE, RESERVE, plan_memory, worker_bytes
from mfptq.execution.prepare import longest_row
from mfptq.kernels import QuantizeArgs, load_kernel
from mfptq.kernels.calibrated import CALIBRATED_METHODS, FEEDBACK
from mfptq.planner import make_plan

from ..conftest import SMALL, Stopped, command, command_apart, digests, sampled, stopping_at
from .files import calibrate, described, layers_of, stored, write_file

MERGED = "abcd" * 16


@pytest.fixture
def path(source: Path, tmp_path: Path) -> Path:
    return calibrate(source, tmp_path / "demo.calibration.safetensors")


@pytest.fixture(scope="module")
def full(source: Path) -> Path:
    """A file that every method can use."""
    return calibrate(source, source.with_name("full.calibration.safetensors"), described("factors"))


@pytest.fixture(scope="module")
def converted(source: Path, full: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Convert by a method, once for all tests that read the output."""

    @cache
    def output(method: str) -> Path:
        folder = tmp_path_factory.mktemp("converted") / "output"
        assert mfptq.convert(source, folder, calibration=full, method=method).method == method
        return folder

    return output


def shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(("decisions", "margin"), [({}, 4), ({"input_margin": 1}, 1), ({"method": "minmax"}, 1)])
def test_input_scales_are_those_that_compressed_tensors_computes_from_amax(decisions, margin, source, path, tmp_path):
    """By default for a range four times as wide, which is exact: a power of two."""
    report = mfptq.convert(source, tmp_path / "out", calibration=path, smooth=False, **decisions)
    assert report.scheme == "NVFP4"
    found, calibration = stored(tmp_path / "out"), load_calibration(path)
    for info in calibration.inputs.values():
        amax = calibration.read(info).amax
        expected = generate_gparam(torch.tensor([-amax / 2]), torch.tensor([amax])).item() / margin
        assert expected > 2
        for module in info.modules:
            assert found[f"{module}.input_global_scale"].item() == expected
    calibration.close()
    assert mfptq.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("method", CALIBRATED_METHODS)
def test_every_weight_is_what_the_kernel_makes_of_it_with_its_own_statistics(method, source, full, converted):
    before, after, calibration = stored(source), stored(converted(method)), load_calibration(full)
    kernel = load_kernel()
    for columns, members in layers_of(source).values():
        for module in members:
            weight = before[f"{module}.weight"].view(torch.uint16).numpy()
            known, scale = calibration.statistics(module, method), after[f"{module}.weight_global_scale"].item()
            packed = np.empty((len(weight), columns // 2), np.uint8)
            scales = np.empty((len(weight), columns // 16), np.uint8)
            kernel.quantize(weight, QuantizeArgs(method, scale, known), packed, scales)
            assert np.array_equal(packed, after[f"{module}.weight_packed"].numpy())
            assert np.array_equal(scales, after[f"{module}.weight_scale"].view(torch.uint8).numpy())
    calibration.close()


def test_the_methods_differ_and_the_global_scale_does_not(source, converted):
    seen = {method: stored(converted(method)) for method in ("search", *CALIBRATED_METHODS)}
    module = next(iter(layers_of(source).values()))[1][0]
    assert len({seen[method][f"{module}.weight_packed"].numpy().tobytes() for method in seen}) == 5
    assert len({seen[method][f"{module}.weight_global_scale"].item() for method in seen}) == 1


@pytest.mark.parametrize(("tile", "workers"), sampled([(64, 1), (512, 3)], [(64, 3), (512, 1), (4096, 1), (4096, 3)]))
@pytest.mark.parametrize("method", ["hessian+", FEEDBACK])
def test_bytes_do_not_depend_on_tiles_or_workers(method, tile, workers, source, full, converted, tmp_path, monkeypatch):
    """Tiles of 64 bytes are halves of a row: each part must meet the statistics of its own columns, or be whole."""
    whole = converted(method)
    monkeypatch.setattr("mfptq.execution.memory_budget.MIN_TILE", tile)
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", tile)
    mfptq.convert(source, tmp_path / "cut", calibration=full, method=method, max_workers=workers)
    assert shards(tmp_path / "cut") == shards(whole)


@pytest.mark.parametrize("method", ["hessian+", FEEDBACK])
def test_torch_writes_the_same_bytes(method, tmp_path, monkeypatch):
    source = tmp_path / "source"
    write_demo(source, replace(SMALL, hidden=32, intermediate=32, layers=1))
    full = calibrate(source, tmp_path / "full.calibration.safetensors", described("factors"))
    mfptq.convert(source, tmp_path / "compiled", calibration=full, method=method)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert mfptq.convert(source, tmp_path / "torch", calibration=full, method=method).kernel.startswith("torch")
    assert shards(tmp_path / "torch") == shards(tmp_path / "compiled")


def test_weight_only_takes_the_statistics_and_leaves_the_scales(source, path, tmp_path):
    report = mfptq.convert(source, tmp_path / "weights", calibration=path, scheme="NVFP4A16")
    mfptq.convert(source, tmp_path / "both", calibration=path, smooth=False)
    assert (report.scheme, report.method) == ("NVFP4A16", "hessian+")
    weights, both = stored(tmp_path / "weights"), stored(tmp_path / "both")
    assert {name for name in both if name not in weights} == {n for n in both if n.endswith("input_global_scale")}
    assert all(torch.equal(weights[name].view(torch.uint8), both[name].view(torch.uint8)) for name in weights)


@pytest.mark.parametrize(
    ("level", "method"), [("amax", "search"), ("moments", "weighted"), ("hessian", "hessian+"), ("factors", FEEDBACK)]
)
def test_auto_is_the_strongest_that_the_file_allows(level, method, source, tmp_path):
    path = calibrate(source, tmp_path / "a.calibration.safetensors", described(level))
    for asked in (None, "auto"):
        assert mfptq.plan(source, calibration=path, method=asked).methods.keys() == {method}


@pytest.mark.parametrize(
    ("level", "method"), [("amax", "weighted"), ("amax", "hessian"), ("moments", "hessian+"), ("hessian", FEEDBACK)]
)
def test_a_method_that_needs_more_than_the_file_holds_is_refused(level, method, source, tmp_path):
    path = calibrate(source, tmp_path / "a.calibration.safetensors", described(level))
    with pytest.raises(ScaleError, match=f"method {method.replace('+', '.')} needs a calibration file with"):
        mfptq.convert(source, tmp_path / "out", calibration=path, method=method)
    assert not (tmp_path / "out").exists()


def test_methods_and_files_that_do_not_go_together_are_refused(source, path, tmp_path):
    with pytest.raises(UsageError, match="method weighted needs a calibration file"):
        mfptq.convert(source, tmp_path / "out", method="weighted")
    with pytest.raises(
        UsageError, match="calibration and input_scales are mutually exclusive: both provide input scales"
    ):
        mfptq.convert(source, tmp_path / "out", calibration=path, input_scales=source)
    assert mfptq.plan(source).methods.keys() == mfptq.plan(source, method="auto").methods.keys() == {"search"}
    assert not (tmp_path / "out").exists()


def test_experts_that_no_text_reached_are_searched_and_counted(moe_source, tmp_path):
    path = calibrate(moe_source, tmp_path / "a.safetensors", without=lambda name: ".experts.2." in name)
    report = mfptq.convert(moe_source, tmp_path / "out", calibration=path, method="hessian")
    mfptq.convert(moe_source, tmp_path / "search", calibration=path, method="search")
    found, searched = stored(tmp_path / "out"), stored(tmp_path / "search")
    lost = [name for name in found if ".experts.2." in name and name.endswith("weight_packed")]
    assert len(lost) == 12
    assert (
        f"12 of {report.quantized} weights use `search`: their experts received no calibration tokens"
        in report.warnings[-1]
    )
    assert all(torch.equal(found[name], searched[name]) for name in lost)
    others = [name for name in found if ".experts.1." in name and name.endswith("weight_packed")]
    assert not any(torch.equal(found[name], searched[name]) for name in others)
    for projection in ("down_proj", "up_proj"):  # their input scales are filled, as from any other source
        scales = [
            found[f"model.language_model.layers.0.mlp.experts.{e}.{projection}.input_global_scale"] for e in range(4)
        ]
        assert scales[2] == min(scales[:2] + scales[3:])


@pytest.mark.parametrize("method", ["hessian+", FEEDBACK])
def test_a_resumed_run_refuses_another_file(method, source, tmp_path):
    level = "factors" if method == FEEDBACK else "hessian"
    path = calibrate(source, tmp_path / "a.safetensors", described(level))
    other = calibrate(source, tmp_path / "b.safetensors", described(level, dataset=MERGED))
    assert path.read_bytes() != other.read_bytes()
    with pytest.raises(Stopped):
        mfptq.convert(source, tmp_path / "out", calibration=path, on_event=stopping_at(mfptq.ShardFinished))
    before = digests(tmp_path / "out")
    with pytest.raises(PlanMismatchError, match="unfinished conversion with other calibration"):
        mfptq.convert(source, tmp_path / "out", calibration=other)
    with pytest.raises(PlanMismatchError, match="unfinished conversion with other settings"):
        mfptq.convert(source, tmp_path / "out")
    assert digests(tmp_path / "out") == before
    report = mfptq.convert(source, tmp_path / "out", calibration=path)
    assert (report.method, report.resumed_shards >= 1) == (method, True)
    mfptq.convert(source, tmp_path / "whole", calibration=path)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_file_that_changes_during_the_run_is_noticed(source, path, tmp_path):
    def touch(event: mfptq.Event) -> None:
        if isinstance(event, mfptq.Advanced):
            os.utime(path, ns=(1, 1))

    with pytest.raises(SourceChangedError, match="changed while it was being converted"):
        mfptq.convert(source, tmp_path / "out", calibration=path, on_event=touch)
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_report_names_the_file_and_the_methods(source, path, tmp_path):
    mfptq.convert(source, tmp_path / "out", calibration=path)
    report = json.loads((tmp_path / "out" / "mfptq_report.json").read_text())
    calibration = load_calibration(path)
    assert report["calibration"] == calibration.digest
    assert report["methods"] == {"hessian+": sum(len(members) for _, members in layers_of(source).values())}
    calibration.close()
    assert "(`hessian+`)" in (tmp_path / "out" / "README.md").read_text()


def test_plan_shows_the_method_of_each_pattern(moe_source, tmp_path):
    path = calibrate(moe_source, tmp_path / "a.safetensors", without=lambda name: ".experts.2." in name)
    shown = json.loads(command("plan", moe_source, "--calibration", path, "--json").stdout)
    methods = {row["pattern"]: row["method"] for row in shown["patterns"] if row["action"] == "NVFP4"}
    assert methods["model.language_model.layers.*.self_attn.o_proj.weight"] == "hessian+"
    assert methods["model.language_model.layers.*.mlp.experts.down_proj"] == "hessian+, search"
    assert {row["method"] for row in shown["patterns"] if row["action"] == "keep"} == {""}
    assert shown["methods"]["search"] == 12
    text = " ".join(command("plan", moe_source, "--calibration", path, "--no-estimate").stdout.split())
    assert "linear weight; hessian+" in text
    assert f"method auto (hessian+ {shown['methods']['hessian+']}, search 12)" in text
    assert "warning: 12 of" in text


# Memory


def test_statistics_are_part_of_the_memory_plan(source, full):
    # K * 16 float32; K float32; for each 16 columns, 16 times 16 and twice 64 float32, and a place
    sizes = {"hessian+": 64 * 64, "weighted": 64 * 4, "search": 0, None: 4 * 4 * (16 * (16 + 2 * 64) + 1)}
    for method, size in sizes.items():
        with closing(make_plan(source, calibration=full, method=method)) as plan:
            assert plan.statistics_bytes == size
    budget = 10**9
    without, large = plan_memory(budget, 10**8, 8), plan_memory(budget, 10**8, 8, statistics=50 * 10**6)
    assert without.workers == 8
    assert large.workers < 8
    assert large.peak <= budget
    with pytest.raises(MemoryBudgetError):
        plan_memory(2 * 10**8, 10**8, 8, statistics=50 * 10**6)


def test_a_tile_holds_a_whole_row_where_its_columns_depend_on_each_other(source, full):
    with closing(make_plan(source, calibration=full)) as plan:
        assert longest_row(plan) == 64 * 2
    with closing(make_plan(source, calibration=full, method="hessian+")) as plan:
        assert longest_row(plan) == 0
    small = plan_memory(10**9, 10**8, 8)
    assert plan_memory(10**9, 10**8, 8, row=MAX_TILE + 2).tile_bytes == MAX_TILE + 2
    assert plan_memory(small.peak, 10**8, 8, row=2 * MIN_TILE) == replace(small, spare=0)
    with pytest.raises(MemoryBudgetError):
        plan_memory(10**8 + RESERVE + worker_bytes(MIN_TILE), 10**8, 8, row=MIN_TILE + 2)
    plan_memory(10**8 + RESERVE + worker_bytes(MIN_TILE + 2), 10**8, 8, row=MIN_TILE + 2)


def write_wide(folder: Path, level: str, columns: int) -> None:
    """Write a model of two layers with few rows, and its calibration file beside it."""
    folder.mkdir()
    head, _ = encode_header([TensorSpec(f"layers.{n}.down_proj.weight", "BF16", (16, columns)) for n in range(2)])
    values = np.random.default_rng(0).integers(15000, 16000, (16, columns), np.uint16)
    (folder / "model.safetensors").write_bytes(head + values.tobytes() * 2)
    (folder / "config.json").write_text("{}")
    block = np.eye(16, dtype=np.float32) + 0.5
    found = [4.0, 500, np.full(columns, 1.5, np.float32), np.broadcast_to(block, (columns // 16, 16, 16))]
    if level == "factors":
        found.append(np.random.default_rng(0).standard_normal((64, columns), np.float32) * 0.03)
    inputs = {InputInfo(f"{n}", columns, (f"layers.{n}.down_proj",)): InputStatistics(*found) for n in range(2)}
    write_file(folder.with_name("wide.calibration.safetensors"), inputs, described(level))


@pytest.mark.parametrize(("level", "columns"), sampled([("hessian", 2**16), ("factors", 2**13)], [("factors", 2**16)]))
def test_a_run_with_wide_inputs_keeps_its_ceiling(level, columns, tmp_path):
    """Hessians of 4 MB, or records of 5 or 38 MB, for each input, which a worker holds in two forms, beside tiles of at most 4 MB."""
    write_wide(tmp_path / "wide", level, columns)
    options = ("--calibration", tmp_path / "wide.calibration.safetensors", "--max-workers", 4, "--json")
    refused = command_apart("convert", tmp_path / "wide", tmp_path / "out", *options, "--max-memory", "50MB")
    assert refused.returncode == 8
    least = (
        int(float(refused.stderr.rpartition("here is ")[2].split()[0])) + 3
    )  # what a process begins with varies a little
    done = command_apart("convert", tmp_path / "wide", tmp_path / "out", *options, "--max-memory", f"{least}MB")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["method"] == ("hessian+" if level == "hessian" else FEEDBACK)
    assert report["peak_memory"] <= least * 10**6


def test_memory_that_would_not_do_is_refused_at_once(source, path, tmp_path):
    with mfptq.plan(source, calibration=path) as plan, pytest.raises(MemoryBudgetError):
        plan.run(tmp_path / "out", max_memory="1MB")
    assert not (tmp_path / "out").exists()
