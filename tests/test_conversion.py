"""`plan`, `Plan` and `convert` as a program meets them: decisions, events, descriptors."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import mfptq
from tests.calibration.files import calibrate
from tests.conftest import Stopped, digests, stopping_at


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_plan_and_run_is_convert(source: Path, tmp_path: Path) -> None:
    with mfptq.plan(source, method="minmax") as plan:
        assert not (tmp_path / "planned").exists()
        report = plan.run(tmp_path / "planned", max_workers=1)
    whole = mfptq.convert(source, tmp_path / "converted", method="minmax")
    assert digests(tmp_path / "planned") == digests(tmp_path / "converted")
    assert (report.method, report.quantized, report.output_bytes) == ("minmax", whole.quantized, whole.output_bytes)
    assert (plan.source_bytes, plan.output_bytes) == (report.source_bytes, report.output_bytes)
    assert plan.methods == {"minmax": report.quantized}


def test_one_plan_can_be_run_twice(source: Path, tmp_path: Path) -> None:
    with mfptq.plan(source) as plan:
        plan.run(tmp_path / "a")
        plan.run(tmp_path / "b", max_workers=3)
        assert plan.run(tmp_path / "a").already_complete
        assert plan.run(tmp_path / "a", overwrite=True).resumed_shards == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_plan_is_one_short_line(source: Path, tmp_path: Path) -> None:
    with mfptq.plan(source) as plan:
        assert str(plan) == repr(plan)
        assert str(plan).startswith("Plan: 25 weights to NVFP4 (W4A16), ")
        assert str(plan).endswith(", 3 shards")
        sizes = mfptq.Report.__annotations__  # the same figures as the report's
        assert {"source_bytes", "output_bytes"} <= sizes.keys()
    with mfptq.plan(source, calibration=calibrate(source, tmp_path / "c.calibration.safetensors")) as plan:
        assert "(W4A4)" in str(plan)


def test_tensors_say_what_becomes_of_each_by_which_rule_and_why(source: Path) -> None:
    with mfptq.plan(source, ignore="re:.*layers.0.mlp.*", targets=["mtp.fc"]) as plan:
        rows = {row.name: row for row in plan.tensors}
    names = [name for path in sorted(source.glob("*.safetensors")) for name in header_names(path)]
    assert sorted(rows) == sorted(names)
    assert rows["lm_head.weight"] == ("lm_head.weight", "keep", r"re:.*lm_head$", "output head", "")
    ignored = rows["model.language_model.layers.0.mlp.up_proj.weight"]
    assert (ignored.action, ignored.rule, ignored.reason) == ("keep", "re:.*layers.0.mlp.*", "ignored as asked")
    plain = rows["model.language_model.layers.1.mlp.up_proj.weight"]
    assert (plain.action, plain.rule, plain.reason, plain.format) == ("NVFP4", "", "linear weight", "nvfp4a16")
    assert rows["mtp.fc.weight"].rule == "mtp.fc"


def header_names(path: Path) -> list[str]:
    data = path.read_bytes()
    return [name for name in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if name != "__metadata__"]


def test_plans_leave_no_descriptor_open(source: Path, tmp_path: Path) -> None:
    path = calibrate(source, tmp_path / "c.calibration.safetensors")
    mfptq.plan(source).close()
    before = descriptors()
    for _ in range(3):
        with mfptq.plan(source, calibration=path):
            assert descriptors() > before
        plan = mfptq.plan(source)
        plan.close()
        plan.close()
        mfptq.inspect(source)
        for refused in ({"ignore": ["nothing"]}, {"scheme": "NVFP4"}, {"calibration": path, "ignore": ["nothing"]}):
            with pytest.raises(mfptq.UsageError):
                mfptq.plan(source, **refused)
        with pytest.raises(mfptq.ScaleError):
            mfptq.plan(source, like=source)
        with pytest.raises(mfptq.SourceError):
            mfptq.plan(tmp_path / "nowhere", calibration=path)
    mfptq.convert(source, tmp_path / "out", calibration=path)
    mfptq.verify(tmp_path / "out", source)
    assert descriptors() == before


def test_the_command_line_closes_its_plan(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from mfptq.cli.main import main

    CliRunner().invoke(main, ["plan", str(source)])
    before = descriptors()
    for arguments in (["plan", str(source)], ["convert", str(source), "out", "--dry-run"]):
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert descriptors() == before


def test_unknown_decisions_are_type_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'methode', expected one of scheme, method, ignore"
    ):
        mfptq.plan(source, methode="minmax")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'workers'"):
        mfptq.convert(source, tmp_path / "out", workers=3)  # type: ignore[call-arg]
    assert not (tmp_path / "out").exists()


def test_sources_of_input_scales_are_mutually_exclusive(source: Path) -> None:
    with pytest.raises(
        mfptq.UsageError, match=r"^calibration and like are mutually exclusive: both provide input scales$"
    ):
        mfptq.plan(source, calibration="a", like="b")
    with pytest.raises(mfptq.UsageError, match=r"calibration and input_scales and like .*: all provide"):
        mfptq.plan(source, calibration="a", like="b", input_scales="c")


@pytest.mark.parametrize(("given", "scheme"), [("w4a16", "NVFP4A16"), ("NvFp4A16", "NVFP4A16"), (None, "NVFP4A16")])
def test_schemes_go_by_their_other_names(given: str | None, scheme: str, source: Path) -> None:
    with mfptq.plan(source, scheme=given, method="SEARCH") as plan:
        assert (plan.scheme, plan.methods.keys()) == (scheme, {"search"})


def test_input_scales_are_a_path_or_what_was_read(source: Path, tmp_path: Path) -> None:
    with mfptq.plan(source) as plan:
        modules = [row.name.removesuffix(".weight") for row in plan.tensors if row.action == "NVFP4"]
    bare, typed = tmp_path / "bare.json", tmp_path / "typed.json"
    bare.write_text(json.dumps(dict.fromkeys(modules, 3.0)))
    typed.write_text(json.dumps({"kind": "amax", "values": dict.fromkeys(modules, 3.0)}))
    with pytest.raises(mfptq.ScaleError, match="the name does not tell the kind"):
        mfptq.plan(source, input_scales=bare)
    with make_one(source, mfptq.read_input_scales(bare, kind="amax")) as one, make_one(source, typed) as other:
        assert one.scheme == other.scheme == "NVFP4"
        assert one._planned.digests == other._planned.digests


def make_one(source: Path, scales: Path | mfptq.InputScales) -> mfptq.Plan:
    return mfptq.plan(source, input_scales=scales, scheme="W4A4")


def test_events_add_up(source: Path, tmp_path: Path) -> None:
    events: list[mfptq.Event] = []
    report = mfptq.convert(source, tmp_path / "out", on_event=events.append)
    assert events[0] == mfptq.Planned(report.source_bytes)
    assert sum(event.source_bytes for event in events if isinstance(event, mfptq.Advanced)) == report.source_bytes
    finished = [event for event in events if isinstance(event, mfptq.ShardFinished)]
    assert sorted(event.name for event in finished) == sorted(path.name for path in source.glob("*.safetensors"))
    assert not any(event.resumed for event in finished)
    assert len(events) == 1 + len(finished) + sum(isinstance(event, mfptq.Advanced) for event in events)


def test_events_come_in_the_calling_thread(source: Path, tmp_path: Path) -> None:
    threads: set[int] = set()
    mfptq.convert(source, tmp_path / "out", on_event=lambda _event: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def test_finished_shards_of_an_earlier_run_are_reported_as_resumed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        mfptq.convert(source, tmp_path / "out", on_event=stopping_at(mfptq.ShardFinished))
    events: list[mfptq.Event] = []
    report = mfptq.convert(source, tmp_path / "out", on_event=events.append)
    resumed = [event for event in events if isinstance(event, mfptq.ShardFinished) and event.resumed]
    assert len(resumed) == report.resumed_shards >= 1
    assert sum(event.source_bytes for event in events if isinstance(event, mfptq.Advanced)) == report.source_bytes


def test_home_is_expanded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    report = mfptq.convert(f"~/{source.name}", "~/out")
    assert report.destination == str(tmp_path / "out")
    assert mfptq.verify("~/out", f"~/{source.name}").ok
    assert mfptq.inspect("~/out").tensors == report.tensors


def test_hub_decisions_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, object] = {}

    def download(repo_id: str, **options: object) -> str:
        seen.update(options, repo_id=repo_id)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for call in (mfptq.plan, mfptq.inspect):
        with pytest.raises(mfptq.HubError):
            call("org/name", revision="v1", token="t", cache_dir="/c")
        assert {name: seen.pop(name) for name in ("repo_id", "revision", "token", "cache_dir")} == {
            "repo_id": "org/name", "revision": "v1", "token": "t", "cache_dir": "/c",
        }  # fmt: skip
