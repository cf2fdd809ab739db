"""Calibration in parts, on a cluster made of Python: the merged file is the sequential one, and nothing partial passes for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import mfptq  # noqa: E402
from mfptq.calibration.reading import Calibration, load_calibration  # noqa: E402
from mfptq.cluster import attempts, calibrating  # noqa: E402
from mfptq.cluster.connection import TaskLostError  # noqa: E402
from mfptq.cluster.ray_executor import RayExecutor  # noqa: E402
from mfptq.errors import (  # noqa: E402
    DestinationError,
    DestinationLockedError,
    MemoryBudgetError,
    PlanMismatchError,
    UsageError,
)
from mfptq.observation import calibration_parts, calibration_pass  # noqa: E402
from mfptq.observation.calibration_parts import parts_of, samples_kept  # noqa: E402
from tests.cluster.fake import FakeCluster  # noqa: E402
from tests.conftest import command  # noqa: E402
from tests.smoothing.models import write_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS: dict[str, Any] = {"samples": 7, "max_seq_length": 40, "batch_size": 1}
EVERYTHING = {**OPTIONS, "sensitivities": True, "statistics": "factors", "ignore": [r"re:.*layers\.0\..*"]}
CHEAP = {**OPTIONS, "statistics": "amax"}
RAY = RayExecutor(cpus_per_task=1)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Give torch back the threads that it had: a task sets its own, and there it has a process of its own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "made", "qwen3_moe")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven texts, the last of them as the first: two parts may hold the same text."""
    generator = np.random.default_rng(7)
    rows = [generator.integers(0, 160, length).tolist() for length in (30, 12, 40, 5, 33, 20)]
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path


@pytest.fixture(scope="module")
def sequential(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    output = tmp_path_factory.mktemp("sequential") / "whole.safetensors"
    mfptq.calibrate(model, dataset, output, **EVERYTHING)
    return load_calibration(output)


def captured(factors: np.ndarray) -> float:
    return float((factors.astype(np.float64) ** 2).sum())


def check_same(found: Calibration, expected: Calibration) -> None:
    """Everything is equal but for rounding; factors, which are found on the way, say as much of the input."""
    assert (found.description, list(found.inputs.items())) == (expected.description, list(expected.inputs.items()))
    assert {name: each.tolist() for name, each in found.routed().items()} == {
        name: each.tolist() for name, each in expected.routed().items()
    }
    assert found.key_value_ranges() == expected.key_value_ranges() != {}
    assert found.sensitivities == pytest.approx(expected.sensitivities, rel=1e-6)
    for info in expected.inputs.values():
        ours, theirs = found.read(info), expected.read(info)
        assert (ours.amax, ours.tokens) == (theirs.amax, theirs.tokens)
        np.testing.assert_allclose(ours.second_moment, theirs.second_moment, rtol=3e-7)
        limit = 3e-7 * np.abs(theirs.hessian).max(axis=(1, 2), keepdims=True)
        assert (np.abs(ours.hessian - theirs.hessian) <= limit).all()
        if theirs.factors is not None:
            assert captured(ours.factors) >= 0.98 * captured(theirs.factors)  # and load_calibration bounds it


def test_the_merged_file_is_the_sequential_one(model, dataset, tmp_path, cluster: FakeCluster, sequential) -> None:
    output, events, cluster.slots = tmp_path / "a.safetensors", [], 1
    description = mfptq.calibrate(model, dataset, output, **EVERYTHING, executor=RAY, on_event=events.append)
    found = load_calibration(output)
    check_same(found, sequential)
    assert description == found.description
    assert cluster.submitted == [(f"part-0000{n}-of-00002.calibration.safetensors",) for n in (1, 2)]
    assert not parts_of(output).exists()
    assert (events[-1].samples, events[-1].requested) == (7, 7)
    assert events[-1].steps == events[-1].total_steps > 7
    assert cluster.needs == {"num_cpus": 1, "num_gpus": 0, "memory": 0}


def test_experts_that_only_some_parts_reach(model, dataset, tmp_path, cluster) -> None:
    asked = {**OPTIONS, "all_experts": False, "statistics": "moments", "max_seq_length": 2}
    for name, executor in (("a", RAY), ("b", None)):
        mfptq.calibrate(model, dataset, tmp_path / f"{name}.safetensors", **asked, executor=executor)
    found, expected = (load_calibration(tmp_path / f"{name}.safetensors") for name in "ab")
    assert list(found.inputs.items()) == list(expected.inputs.items())
    assert [found.read(info).tokens for info in found.inputs.values()] == [
        expected.read(info).tokens for info in expected.inputs.values()
    ]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], dict[str, list[int]]]:
    """Return what makes every first attempt at a part end after its first batch, and notes where attempts begin."""
    begun: dict[str, list[int]] = {}
    real = calibration_pass.run_pass

    def die_by(error: BaseException) -> dict[str, list[int]]:
        def run_pass(plan: Any, share: Any, path: Path, options: Any, *, on_event: Any) -> Any:
            first, seen = path.name not in begun, []
            found = calibration_parts.description_of(path)
            begun.setdefault(path.name, []).append(found.samples if found else 0)

            def tell(event: mfptq.CalibrationProgress) -> None:
                on_event(event)
                seen.append(event.samples)
                if first and event.samples == 1:
                    raise error

            return real(plan, share, path, options, on_event=tell)

        monkeypatch.setattr(calibration_pass, "run_pass", run_pass)
        return begun

    return die_by


def test_a_lost_task_goes_on_where_it_was(model, dataset, tmp_path, cluster, dying) -> None:
    begun = dying(TaskLostError("NodeDiedError"))
    cluster.slots = 1
    output = tmp_path / "a.safetensors"
    mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    assert begun == {name: [0, 1] for [name] in cluster.submitted}
    assert load_calibration(output).description.is_complete


def test_a_stop_keeps_what_is_done_for_the_same_command(model, dataset, tmp_path, cluster, dying) -> None:
    """Also where the cluster has become larger: the parts stay those that were begun."""
    output = tmp_path / "a.safetensors"
    cluster.slots = 1
    begun = dying(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    assert len(cluster.left) == 1, "the other part was in flight, and is cancelled"
    assert not output.exists()
    assert samples_kept(output) == 1
    for changes, other in (
        ({"statistics": "moments"}, "statistics"),
        ({"samples": 6}, "text"),
        ({"ignore": ["re:.*self_attn.*"]}, "settings"),
    ):
        with pytest.raises(PlanMismatchError, match=f"holds an unfinished calibration with other .*{other}"):
            mfptq.calibrate(model, dataset, output, **CHEAP | changes, executor=RAY)
    cluster.slots = 3
    begun["part-00002-of-00002.calibration.safetensors"] = []
    mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    assert begun == {
        "part-00001-of-00002.calibration.safetensors": [0, 1],
        "part-00002-of-00002.calibration.safetensors": [0],
    }
    assert load_calibration(output).description.is_complete


def test_finished_parts_are_not_made_again_unless_asked(model, dataset, tmp_path, cluster) -> None:
    bad, output = "part-00002-of-00002.calibration.safetensors", tmp_path / "a.safetensors"
    cluster.slots = 1
    cluster.break_ = lambda _number, names: TaskLostError("OutOfMemoryError") if bad in names else None
    with pytest.raises(DestinationError, match=f"{bad}.*lost: OutOfMemoryError"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    assert cluster.submitted.count((bad,)) == attempts.ATTEMPTS
    assert not output.exists()
    cluster.break_ = lambda _number, _names: None
    del cluster.submitted[:]
    mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    assert cluster.submitted == [(bad,)]
    with pytest.raises(UsageError, match="exists"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY, overwrite=True)
    assert len(cluster.submitted) == 3


def test_a_part_that_is_not_whole_never_passes_for_it(model, dataset, tmp_path, cluster, dying, monkeypatch) -> None:
    """A node given up as dead may write an older state over what another has finished."""
    output = tmp_path / "a.safetensors"
    cluster.slots, cluster.names = 1, ("red",)
    dying(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    [part] = parts_of(output).glob("part-*.safetensors")
    older, real = part.read_bytes(), calibrating.CalibrationRun.make_all

    def make_all(run: Any, resources: Any) -> None:
        real(run, resources)
        part.write_bytes(older)

    monkeypatch.setattr(calibrating.CalibrationRun, "make_all", make_all)
    with pytest.raises(DestinationError, match="is not the whole part: rerun"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)
    assert not output.exists()
    monkeypatch.setattr(attempts, "SEEN_SECONDS", 0.0)
    cluster.break_ = lambda _number, _names: {"ok": True, "part": part.name, "seconds": 0.0}
    with pytest.raises(DestinationError, match=r"node 'red' has finished .*not seen here whole"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)


def test_two_runs_for_one_output_are_refused(model, dataset, tmp_path, cluster) -> None:
    output = tmp_path / "a.safetensors"

    def another(_event: mfptq.CalibrationProgress) -> None:
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY)

    with pytest.raises(DestinationLockedError, match="is in use by pid"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY, on_event=another)
    assert not parts_of(output).exists(), "nothing was kept"


def test_errors_of_a_node_name_it_and_leave_nothing(model, dataset, tmp_path, cluster) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(MemoryBudgetError, match=r"^node '(red|blue)': .*raise max_memory"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY, max_memory="10MB")
    assert cluster.needs["memory"] == 10_000_000
    with pytest.raises(UsageError, match=r"^node '(red|blue)': device 'cuda' cannot be used"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RayExecutor(gpus_per_task=1))
    with pytest.raises(UsageError, match="device cuda:0 needs gpus_per_task"):
        mfptq.calibrate(model, dataset, output, **CHEAP, executor=RAY, device="cuda:0")
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_options_of_a_cluster_need_it(model, dataset, tmp_path) -> None:
    refused = command(
        "calibrate", model, "--dataset", dataset, "--output", tmp_path / "a.safetensors", "--cpus-per-task", 2
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "--cpus-per-task says nothing without --executor ray" in refused.stderr
