"""A preview finds what would stop a run, says what it would take, and leaves nothing behind, here and on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mfptq
from mfptq.cli.text import preview_lines
from mfptq.execution.preview import Preview
from tests.hub.conftest import TOKEN, Run, client, hub, run  # noqa: F401 - fixtures
from tests.hub.server import REPO, LoopbackHub

TARGET = mfptq.PushTarget("me/made", token=TOKEN)


def test_a_plan_previews_its_run(source: Path, tmp_path: Path) -> None:
    with mfptq.plan(source) as plan:
        found = plan.preview(tmp_path / "out", max_workers=1, estimate=True)
        assert (found.kernel, found.workers, found.fetch_bytes, found.fetch_rate) == ("cpu", 1, 0, None)
        assert found.computing_seconds is not None
        assert found.computing_seconds > 0
        assert found.output is not None
        assert found.output.needed_bytes <= found.output.free_bytes
        assert not (tmp_path / "out").exists()
        report = plan.run(tmp_path / "out", max_workers=1)
        written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert (found.disk_bytes, report.output_bytes) == (written, plan.output_bytes)
        again = plan.preview(tmp_path / "out")
        assert again.output is not None
        assert again.output.complete
        assert again.computing_seconds is None


def test_a_preview_refuses_what_a_run_would(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with mfptq.plan(source) as plan:
        for destination, options, error in (
            (tmp_path / "full", {}, mfptq.DestinationExistsError),
            (tmp_path / "out", {"max_memory": "10MB"}, mfptq.MemoryBudgetError),
            (tmp_path / "out", {"device": "abacus"}, mfptq.UsageError),
            (tmp_path / "out", {"discard_output": True}, mfptq.UsageError),
        ):
            with pytest.raises(error):
                plan.preview(destination, **options)
            with pytest.raises(error):
                plan.run(destination, **options)


def test_a_plan_of_a_hub_repo_says_what_it_would_fetch(client: LoopbackHub, run: Run) -> None:  # noqa: F811
    client.reset_counts()
    text = run("plan", REPO, COLUMNS="200").stdout
    assert "to fetch from the Hub, about 1 s at 1 Gbit/s" in text
    assert client.sent < 100_000  # headers and small files: nothing was fetched to measure the network
    assert "Gbit/s" not in run("plan", REPO, "--no-estimate", COLUMNS="200").stdout
    values = json.loads(run("plan", REPO, "--json").stdout)
    assert values["fetch_bytes"] == values["source_bytes"]
    assert values["refetch_bytes"] == 0
    assert "fetch_rate" not in values


def test_a_dry_run_measures_the_network(client: LoopbackHub, run: Run, tmp_path: Path) -> None:  # noqa: F811
    client.bytes_per_second = 400_000  # of each connection
    done = run("convert", REPO, tmp_path / "out", "--dry-run", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "B/s measured now" in done.stdout
    with mfptq.plan(REPO) as plan:
        rate = plan.preview(estimate=True).fetch_rate
    assert rate is not None
    assert 10_000 < rate < 8 * 400_000
    assert not (tmp_path / "out").exists()


def test_what_comes_a_second_time_is_said() -> None:
    assert list(preview_lines(Preview("cpu", "as asked", 2, 10**8, 3_000_000, 1_000_000))) == [
        "3.00 MB to fetch from the Hub, 1.00 MB of it a second time for want of memory"
    ]


def test_only_the_shards_in_flight_need_room_where_each_is_discarded(
    client: LoopbackHub,  # noqa: F811
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mfptq.execution.preview.SHARDS_AT_ONCE", 1)
    with mfptq.plan(REPO, token=TOKEN) as plan:
        kept = plan.preview(tmp_path / "out", push_to=TARGET)
        gone = plan.preview(tmp_path / "out", push_to=TARGET, discard_output=True)
    assert kept.output is not None
    assert gone.output is not None
    assert gone.output.needed_bytes < kept.output.needed_bytes
    assert "me/made" not in client.repos


def test_a_dry_run_looks_at_the_repo_and_makes_none(
    client: LoopbackHub,  # noqa: F811
    run: Run,  # noqa: F811
    source: Path,
    tmp_path: Path,
) -> None:
    dry = ("convert", REPO, tmp_path / "out", "--dry-run", "--push-to-hub", "me/made")
    without = run(*dry)
    assert (without.returncode, "needs a token that may write" in without.stderr) == (7, True)
    assert run(*dry, "--token", TOKEN).returncode == 0
    assert "me/made" not in client.repos
    client.add(source, "me/made")
    foreign = run(*dry, "--token", TOKEN)
    assert (foreign.returncode, "holds other files" in foreign.stderr) == (7, True)
    assert not (tmp_path / "out").exists()
