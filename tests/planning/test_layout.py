"""Plans in small: what each tensor becomes, where its bytes go, what the output depends on."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mfptq
from mfptq.checkpoint import header
from mfptq.errors import SourceError, UsageError
from mfptq.planner import make_plan
from mfptq.planning import building, jobs
from mfptq.planning import plan as planning
from mfptq.planning.jobs import CopyTensor, Scalar, copy_runs
from mfptq.planning.quantization_config import config_text

WEIGHTS = {
    "m.q_proj.weight": np.ones((4, 32), np.float32),
    "m.k_proj.weight": np.ones((2, 32), np.float32),
    "m.o_proj.weight": np.ones((8, 16), np.float16),
    "m.norm.weight": np.ones(5, np.float32),
    "lm_head.weight": np.ones((2, 16), np.float32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards: q_proj apart from its partner."""
    place = tmp_path / "source"
    place.mkdir()
    first = {name: WEIGHTS[name] for name in ("m.q_proj.weight", "m.norm.weight")}
    save_file(first, place / "model-1.safetensors")
    save_file({name: WEIGHTS[name] for name in WEIGHTS if name not in first}, place / "model-2.safetensors")
    (place / "config.json").write_text('{"model_type": "x"}')
    return place


def scaled(folder: Path, tmp_path: Path, value: float = 2.0) -> planning.ConversionPlan:
    values = {name.removesuffix(".weight"): value for name in WEIGHTS if "_proj" in name}
    (tmp_path / "scales.json").write_text(json.dumps({"kind": "amax", "values": values}))
    return make_plan(folder, input_scales=tmp_path / "scales.json")


def test_a_job_says_where_every_byte_comes_from_and_goes(folder: Path, tmp_path: Path) -> None:
    plan = scaled(folder, tmp_path)
    shard = plan.checkpoint.shard("model-2.safetensors")
    job = plan.job(plan.shards[1])
    length = int.from_bytes(job.head[:8], "little")
    made = header.parse_header(job.head[8:], job.size)
    places = {info.name: len(job.head) + info.start for info in made.tensors}
    assert len(job.head) == 8 + length == made.data_start
    assert {info.name: (info.dtype, info.shape) for info in made.tensors} == {
        "m.k_proj.weight_packed": ("U8", (2, 16)), "m.k_proj.weight_scale": ("F8_E4M3", (2, 2)),
        "m.k_proj.weight_global_scale": ("F32", (1,)), "m.k_proj.input_global_scale": ("F32", (1,)),
        "m.o_proj.weight_packed": ("U8", (8, 8)), "m.o_proj.weight_scale": ("F8_E4M3", (8, 1)),
        "m.o_proj.weight_global_scale": ("F32", (1,)), "m.o_proj.input_global_scale": ("F32", (1,)),
        "lm_head.weight": ("F32", (2, 16)),
    }  # fmt: skip
    origin = {info.name: shard.header.data_start + info.start for info in shard.header.tensors}
    assert job.copies == (CopyTensor("lm_head.weight", origin["lm_head.weight"], places["lm_head.weight"], 128),)
    steps = {step.weight.module: step for step in job.weights}
    assert steps.keys() == {"m.k_proj", "m.o_proj"}
    step = steps["m.k_proj"]
    assert (step.group, step.weight.offset) == ("m.qkv_proj", origin["m.k_proj.weight"])
    assert (step.values, step.scale, step.global_scale) == tuple(
        places[f"m.k_proj.weight_{part}"] for part in ("packed", "scale", "global_scale")
    )
    assert step.input_scale == Scalar(places["m.k_proj.input_global_scale"], 2688 / 2)
    assert [weight.module for weight in plan.members(step.weight)] == ["m.k_proj", "m.q_proj"]


def test_tensors_lie_in_the_order_of_the_work(folder: Path) -> None:
    """Kept ones, then large weights group by group with their scales behind them; what is small, odd or scalar follows."""
    large, small, odd = (np.zeros((1024, size), np.float16) for size in (1024, 256, 16))
    tensors = {f"m.{name}.weight": large for name in ("a_proj", "k_proj", "o_proj", "q_proj")}
    tensors |= {
        "m.v_proj.weight": small,
        "n.down_proj.weight": odd[:6],
        "lm_head.weight": small,
        "m.norm.weight": odd[0],
    }
    tensors |= {"m.bias": odd[0, :7]}
    save_file(tensors, folder / "model-1.safetensors")
    save_file({"x.weight": odd}, folder / "model-2.safetensors")
    plan = make_plan(folder)
    job = plan.job(plan.shards[0])
    made = header.parse_header(job.head[8:], job.size)
    assert [info.name for info in made.tensors] == [
        "lm_head.weight", "m.norm.weight",
        "m.a_proj.weight_packed", "m.a_proj.weight_scale",
        "m.k_proj.weight_packed", "m.k_proj.weight_scale",
        "m.q_proj.weight_packed", "m.q_proj.weight_scale",
        "m.o_proj.weight_packed", "m.o_proj.weight_scale",
        "m.v_proj.weight_packed", "n.down_proj.weight_packed",
        "m.v_proj.weight_scale",
        *(f"{name}.weight_global_scale" for name in ("m.a_proj", "m.k_proj", "m.q_proj", "m.v_proj", "m.o_proj", "n.down_proj")),
        "m.bias", "n.down_proj.weight_scale",
    ]  # fmt: skip
    assert all(info.start % 4 == 0 for info in made.tensors if info.dtype == "F32")


def test_sizes_are_sums_of_what_is_written(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder)
    assert [shard.tensors for shard in plan.shards] == [4, 7]
    for shard in plan.shards:
        job = plan.job(shard)
        made = header.parse_header(job.head[8:], job.size)
        assert (job.size, made.data_bytes) == (shard.size, shard.tensor_bytes)
    assert plan.output_bytes == sum(shard.size for shard in plan.shards)
    assert plan.tensor_bytes == sum(shard.tensor_bytes for shard in plan.shards)
    assert [weight.module for weight in plan.weights()] == ["m.q_proj", "m.k_proj", "m.o_proj"]
    assert plan.warnings == ()
    assert plan.index_text is not None  # two shards without an index get one
    mfptq.convert(folder, tmp_path / "out")
    assert {path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")} == {s.size for s in plan.shards}


@pytest.mark.parametrize(
    ("size", "limit", "expected"), [(0, 4, []), (4, 4, [(0, 4)]), (9, 4, [(0, 4), (4, 4), (8, 1)])]
)
def test_copies_come_in_pieces_without_overlap_or_hole(size, limit, expected) -> None:
    runs = list(copy_runs([CopyTensor("a", 100, 1000, size)], limit))
    assert [(run.ranges[0][0] - 100, run.ranges[0][1]) for run in runs] == expected
    assert all(run.offset - 1000 == run.ranges[0][0] - 100 and len(run.ranges) == 1 for run in runs)


def test_small_copies_that_follow_each_other_are_one_run() -> None:
    copies = [
        CopyTensor("c", 50, 107, 4),
        CopyTensor("a", 10, 100, 5),
        CopyTensor("b", 30, 105, 2),
        CopyTensor("e", 0, 107, 0),
    ]
    assert [run[:2] for run in copy_runs(copies, 100)] == [(100, ((10, 5), (30, 2), (50, 4)))]
    assert [run[:2] for run in copy_runs(copies, 6)] == [(100, ((10, 5), (30, 1))), (106, ((31, 1), (50, 4)))]
    apart = [CopyTensor("a", 10, 100, 5), CopyTensor("b", 15, 200, 5)]
    assert [run[:2] for run in copy_runs(apart, 100)] == [(100, ((10, 5),)), (200, ((15, 5),))]


def test_digests_name_what_the_output_depends_on(folder: Path, tmp_path: Path) -> None:
    def changed(plan: planning.ConversionPlan) -> set[str]:
        return {part for part in base.digests if base.digests[part] != plan.digests[part]}

    base = make_plan(folder)
    assert base.digests["format"] == str(building.PLAN_FORMAT)
    assert base.digests["input scales"] == ""
    assert changed(make_plan(folder)) == set()
    assert changed(make_plan(folder, method="minmax")) == {"settings"}
    assert changed(make_plan(folder, ignore=["m.o_proj"])) == {"settings"}
    first, second = scaled(folder, tmp_path), scaled(folder, tmp_path, 3.0)
    assert changed(first) == {"settings", "input scales"}
    assert first.digests["input scales"] != second.digests["input scales"]
    assert len({plan.digest for plan in (base, first, second)}) == 3
    assert base.digest == hashlib.sha256(json.dumps(dict(base.digests), sort_keys=True).encode()).hexdigest()
    save_file({**WEIGHTS, "m.more.weight": np.ones((2, 16), np.float32)}, folder / "model-2.safetensors")
    (folder / "model-1.safetensors").unlink()
    assert changed(make_plan(folder)) == {"source"}


def test_unknown_methods_and_schemes_are_usage_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'best' is unknown, expected one of auto, search, minmax"):
        make_plan(folder, method="best")
    with pytest.raises(UsageError, match="'FP8' is unknown, expected one of NVFP4, NVFP4A16"):
        make_plan(folder, scheme="FP8")
    with pytest.raises(UsageError, match="needs input scales"):
        make_plan(folder, scheme="NVFP4")
    plan = scaled(folder, tmp_path)
    assert plan.scheme == "NVFP4"
    with pytest.raises(UsageError, match="takes no input_scales"):
        make_plan(folder, scheme="NVFP4A16", input_scales=tmp_path / "scales.json")
    assert make_plan(folder, scheme="NVFP4A16").scheme == make_plan(folder).scheme == "NVFP4A16"
    assert make_plan(folder, scheme="NVFP4", input_scales=tmp_path / "scales.json").scheme == "NVFP4"


LEFT_OVER = [
    ({"quantization_config": {"quant_method": "fp8"}}, "config.json: quantization_config says 'fp8'"),
    (
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        "config.json: text_config: quantization_config says 'awq'",
    ),
    ({"a": {"b": {"quantization_config": {"bits": 4}}}}, "config.json: a: b: quantization_config says 'unknown'"),
    ({"quantization_config": "gptq"}, "config.json: quantization_config says 'unknown'"),
    ({"compression_config": {"x": 1}}, "config.json: compression_config says 'compressed-tensors'"),
]


@pytest.mark.parametrize(("config", "named"), LEFT_OVER, ids=str)
@pytest.mark.case(52)
def test_a_config_left_over_on_plain_tensors_is_dropped_and_said(config, named, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    plan = make_plan(folder)
    assert plan.contents.notes == (f"{named}, but every tensor is plain: it is dropped",)
    made = json.loads(plan.config_text)
    assert made.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert "quantization_config" not in json.dumps(made)
    assert "compression_config" not in made


def test_what_told_of_eight_bits_leaves_the_config() -> None:
    config = {
        "torch_dtype": "float8_e4m3fn",
        "text_config": {"dtype": "bfloat16"},
        "expert_dtype": "fp4",
        "moe_quant_algo": "NVFP4",
    }
    made = json.loads(config_text(config, {}))
    assert made == {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "quantization_config": {}}


@pytest.mark.parametrize(
    "config", [{"quantization_config": None}, {"text_config": []}, {"text_config": {"a": 1}}], ids=str
)
def test_configs_without_quantization_are_taken(config, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    made = json.loads(make_plan(folder).config_text)
    assert made["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {key: value for key, value in made.items() if key != "quantization_config"} == {
        key: value for key, value in config.items() if key != "quantization_config"
    }


def test_the_inner_quantization_is_dropped_and_the_order_of_keys_kept() -> None:
    made = config_text({"b": 1, "text_config": {"z": 1, "quantization_config": None, "a": 2}, "a": 3}, {"x": 1})
    assert json.loads(made) == {"b": 1, "text_config": {"z": 1, "a": 2}, "a": 3, "quantization_config": {"x": 1}}
    assert list(json.loads(made)) == ["b", "text_config", "a", "quantization_config"]


def test_two_tensors_that_would_get_one_name(folder: Path) -> None:
    save_file(
        {"a.weight": np.ones((2, 16), np.float32), "a.weight_packed": np.ones(1, np.uint8)},
        folder / "model-1.safetensors",
    )
    with pytest.raises(SourceError, match=r"two tensors would be written as 'a\.weight_packed'"):
        make_plan(folder)


def test_headers_beyond_the_formats_limit_are_refused(folder: Path, monkeypatch) -> None:
    plan = make_plan(folder)
    longest = max(len(plan.job(shard).head) - 8 for shard in plan.shards)
    monkeypatch.setattr(jobs, "MAX_HEADER_BYTES", longest)
    make_plan(folder)
    monkeypatch.setattr(jobs, "MAX_HEADER_BYTES", longest - 1)
    with pytest.raises(SourceError, match="the format allows 100 MB"):
        make_plan(folder)


def test_scales_of_kept_modules_are_no_error_and_are_told(folder: Path, tmp_path: Path) -> None:
    values = {name.removesuffix(".weight"): 2.0 for name in WEIGHTS if "_proj" in name or "lm_head" in name}
    (tmp_path / "scales.json").write_text(json.dumps({"kind": "amax", "values": values}))
    [warning] = make_plan(folder, input_scales=tmp_path / "scales.json").warnings
    assert "kept" in warning
