"""Calibration on a real Ray cluster: the sequential file but for rounding, a node lost in the middle, Ctrl-C and a rerun.

Slow, and skipped where ray or transformers are not installed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import mfptq  # noqa: E402
from mfptq.calibration.reading import load_calibration  # noqa: E402
from mfptq.observation.calibration_parts import parts_of, samples_kept  # noqa: E402
from tests.cluster.real import STORE, three_nodes  # noqa: E402
from tests.models import DENSE, write_checkpoint  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

OPTIONS = {"samples": 24, "max_seq_length": 32, "batch_size": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    with three_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / DENSE, DENSE)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps(generator.integers(0, 256, 32).tolist()) + "\n" for _ in range(24)))
    return path


@pytest.fixture(scope="module")
def sequential(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, threads = tmp_path_factory.mktemp("sequential") / "whole.safetensors", torch.get_num_threads()
    torch.set_num_threads(1)  # as a task has
    mfptq.calibrate(model, dataset, output, **OPTIONS)
    torch.set_num_threads(threads)
    return output


def check_same(output: Path, expected: Path) -> None:
    found, other = load_calibration(output), load_calibration(expected)
    assert (found.description, found.inputs) == (other.description, other.inputs)
    assert found.key_value_ranges() == other.key_value_ranges() != {}
    for info in other.inputs.values():
        ours, theirs = found.read(info), other.read(info)
        assert (ours.amax, ours.tokens) == (theirs.amax, theirs.tokens)
        np.testing.assert_allclose(ours.second_moment, theirs.second_moment, rtol=3e-7)
        limit = 3e-7 * np.abs(theirs.hessian).max(axis=(1, 2), keepdims=True)
        assert (np.abs(ours.hessian - theirs.hessian) <= limit).all()
    assert not parts_of(output).exists()


def test_the_file_is_the_sequential_one(cluster, model, dataset, tmp_path, sequential) -> None:
    output = tmp_path / "a.safetensors"
    mfptq.calibrate(model, dataset, output, **OPTIONS, executor=mfptq.RayExecutor(cluster.address, cpus_per_task=1))
    check_same(output, sequential)


def test_a_node_that_dies_in_the_middle(cluster, model, dataset, tmp_path, sequential, caplog) -> None:
    doomed = cluster.add_node(num_cpus=1, object_store_memory=STORE, node_name="doomed")
    killed: list[int] = []

    def kill(event: mfptq.CalibrationProgress) -> None:
        if event.samples >= 4 and not killed:
            killed.append(event.samples)
            cluster.remove_node(doomed, allow_graceful=False)

    output = tmp_path / "a.safetensors"
    executor = mfptq.RayExecutor(cluster.address, cpus_per_task=1)
    with caplog.at_level(logging.WARNING, "mfptq"):
        mfptq.calibrate(model, dataset, output, **OPTIONS, executor=executor, on_event=kill)
    assert killed
    assert "attempt 1 at 'part-" in caplog.text
    check_same(output, sequential)


@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_keeps_what_is_done_for_the_same_command(cluster, model, dataset, tmp_path, sequential) -> None:
    output = tmp_path / "a.safetensors"
    words = ["calibrate", model, "--dataset", dataset, "--output", output, "--executor", "ray", "--cpus-per-task", 1]
    words += ["--ray-address", cluster.address, *(f"--{n.replace('_', '-')}={value}" for n, value in OPTIONS.items())]
    command = [sys.executable, "-c", "from mfptq.cli.main import run; run()", *map(str, words)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not samples_kept(output) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    stderr = running.communicate(timeout=200)[1]
    assert running.returncode == 130, stderr
    assert "of 24 samples are kept in" in stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    kept = samples_kept(output)
    time.sleep(2)
    assert 0 < samples_kept(output) == kept < 24, "no task goes on"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    check_same(output, sequential)
