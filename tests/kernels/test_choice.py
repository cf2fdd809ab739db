"""`--device auto` takes what was measured to be faster, for every method."""

from __future__ import annotations

import pytest

from mfptq.kernels import choice
from mfptq.kernels.choice import choose_device

# Whole processes of 1.3 billion weights on an H100 and its host: cores, method, seconds on the CPU, seconds with the GPU.
MEASURED = [
    (2, "search", 3.64, 2.56),
    (4, "search", 2.30, 2.16),
    (8, "search", 1.70, 1.95),
    (16, "search", 1.48, 1.83),
    (2, "minmax", 2.74, 2.88),
    (16, "minmax", 1.36, 1.71),
    (2, "weighted", 4.93, 2.57),
    (16, "weighted", 1.57, 2.30),
    (2, "hessian", 8.56, 3.07),
    (4, "hessian", 5.21, 2.42),
    (8, "hessian", 3.00, 2.08),
    (16, "hessian", 2.30, 2.07),
    (2, "hessian+", 12.31, 2.89),
    (4, "hessian+", 7.18, 2.44),
    (8, "hessian+", 4.04, 2.18),
    (16, "hessian+", 2.81, 2.14),
]


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "cuda_devices", lambda: 1)


@pytest.mark.parametrize(("cores", "method", "on_cores", "on_gpu"), MEASURED)
def test_what_was_faster_is_chosen(cores: int, method: str, on_cores: float, on_gpu: float) -> None:
    assert choose_device("auto", {method: 1_300_234_240}, cores).device == ("cpu" if on_cores < on_gpu else "cuda")


@pytest.mark.parametrize("method", choice.CORE_SECONDS)
def test_little_work_stays_on_the_cores(method: str) -> None:
    assert choose_device("auto", {method: 10**7}, 2).device == "cpu"
    assert choose_device("auto", {}, 1).device == "cpu"


def test_every_method_of_a_run_counts() -> None:
    assert choose_device("auto", {"search": 2 * 10**8, "hessian+": 10**6}, 4).device == "cpu"
    assert choose_device("auto", {"search": 2 * 10**8, "hessian+": 2 * 10**8}, 4).device == "cuda"


def test_what_was_never_timed_on_a_gpu_stays_on_the_cores() -> None:
    assert choose_device("auto", {"gptq": 10**12, "search": 10**12}, 1).device == "cpu"
    assert choose_device("cuda", {"gptq": 10**12}, 1).device == "cuda"


def test_where_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    much = {"search": 10**12}
    assert choose_device("cuda:1", {"search": 1}, 1).device == "cuda:1"
    assert choose_device("auto", much, 1).device == "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(choice, "has_compiler", lambda: False)
        assert choose_device("auto", much, 1).device == "cpu"
    monkeypatch.setattr(choice, "cuda_devices", lambda: 0)
    assert choose_device("auto", much, 1).device == "cpu"
