"""What is told to another machine, so that it makes the same plan."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import mfptq
from mfptq.execution.executors import Request
from tests.calibration.files import calibrate as write_calibration


def test_paths_are_absolute_and_secrets_stay(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_calibration(source, tmp_path / "x.calibration.safetensors")
    (tmp_path / "minmax").write_text("no path")
    monkeypatch.chdir(tmp_path)
    given = {"calibration": "x.calibration.safetensors", "method": "minmax", "token": "secret"}
    with mfptq.plan("source", **given) as plan:
        told = pickle.loads(pickle.dumps(plan._request))
    assert told.source == str(source)
    assert told.decisions == {"calibration": str(tmp_path / "x.calibration.safetensors"), "method": "minmax"}


def test_the_same_plan_follows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    patterns = (name for name in ["re:.*q_proj"])  # what can be gone through once only
    with mfptq.plan(".", ignore=(*patterns, "re:.*k_proj", "re:.*v_proj")) as plan:
        told = pickle.loads(pickle.dumps(plan._request))
        monkeypatch.chdir(tmp_path)
        with mfptq.plan(told.source, **told.decisions) as again:
            assert again._planned.digests == plan._planned.digests


def test_patterns_that_can_be_gone_through_once_are_kept(source: Path) -> None:
    with mfptq.plan(source, ignore=iter(["re:.*mlp.*"])) as plan:
        assert plan._request == Request(str(source), {"ignore": ("re:.*mlp.*",)})
