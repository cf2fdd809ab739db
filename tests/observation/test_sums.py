"""Running sums equal what float64 says of all the activations at once; names are found; budgets are kept or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mfptq.calibration.file import LEVELS, InputInfo
from mfptq.calibration.reading import check_statistics
from mfptq.errors import MemoryBudgetError, ScaleError
from mfptq.execution.memory_budget import resident_bytes
from mfptq.observation import sums as collect
from mfptq.observation.inputs import Names
from mfptq.observation.residency import MAX_BATCH, Demand, Residency, choose_residency
from mfptq.observation.sums import InputSums

COLUMNS = 96


def activations(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 2, COLUMNS)
    return (torch.randn(*shape, COLUMNS, generator=generator) * spread + 0.1 * spread).to(dtype)


def direct(parts: list[torch.Tensor]) -> tuple[float, int, np.ndarray, np.ndarray]:
    rows = torch.cat([part.reshape(-1, COLUMNS) for part in parts]).double().numpy()
    blocks = rows.reshape(len(rows), -1, 16)
    hessian = np.einsum("tbi,tbj->bij", blocks, blocks) / len(rows)
    return float(np.abs(rows).max()), len(rows), (rows**2).mean(axis=0), hessian


@pytest.mark.parametrize("chunk", [COLUMNS, 7 * COLUMNS, 2**22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_equal_float64(chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "CHUNK_ELEMENTS", chunk)
    parts = [activations(1, 1, 40, dtype=dtype), activations(2, 13, dtype=dtype), activations(3, 2, 3, 5, dtype=dtype)]
    amax, tokens, moment, hessian = direct(parts)
    for level in LEVELS:
        sums = InputSums("x", COLUMNS, level)
        for part in parts:
            sums.add(part)
        found = sums.statistics()
        check_statistics(InputInfo("x", COLUMNS, ("x",)), found)
        assert (found.amax, found.tokens) == (amax, tokens)
        assert (found.second_moment is None) == (level == "amax")
        assert (found.hessian is None) == (level not in ("hessian", "factors"))
        assert (found.factors is None) == (level != "factors")
        if found.second_moment is not None:
            np.testing.assert_allclose(found.second_moment, moment, rtol=1e-6)
        if found.hessian is not None:
            scale = np.sqrt(np.einsum("bi,bj->bij", moment.reshape(-1, 16), moment.reshape(-1, 16)))
            assert (np.abs(found.hessian - hessian) / scale).max() < 1e-6


def test_a_negative_extreme_counts() -> None:
    sums = InputSums("x", 16, "amax")
    sums.add(torch.tensor([[-3.5, *[1.0] * 15]]))
    assert sums.statistics().amax == 3.5


@pytest.mark.parametrize("level", LEVELS)
def test_sums_go_on_from_what_a_file_holds(level: str) -> None:
    whole, first, second = (InputSums("x", COLUMNS, level) for _ in range(3))
    for part in (first, whole):
        part.add(activations(1, 40))
    second.restore(first.statistics())
    for part in (second, whole):
        part.add(activations(2, 50))
    found, expected = second.statistics(), whole.statistics()
    assert (found.amax, found.tokens) == (expected.amax, expected.tokens)
    for part in ("second_moment", "hessian", "factors"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    inputs = activations(1, 4)
    inputs[2, 5] = value
    with pytest.raises(ScaleError, match="not finite"):
        InputSums("x", COLUMNS, "moments").add(inputs)


def test_names_are_found_behind_other_prefixes() -> None:
    names = Names([
        "model.layers.0.mlp.up_proj",
        "model.layers.10.mlp.up_proj",
        "vision_tower.layers.0.self_attn.q_proj",
        "language_model.layers.0.self_attn.q_proj",
        "lm_head",
    ])  # fmt: skip
    assert names.find("model.language_model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert names.find("model.layers.10.mlp.up_proj") == "model.layers.10.mlp.up_proj"
    assert names.find("model.language_model.layers.0.self_attn.q_proj") == "language_model.layers.0.self_attn.q_proj"
    assert names.find("model.layers.0.self_attn.q_proj") == ""  # either tower could be meant
    assert names.find("model.layers.1.mlp.up_proj") == ""
    assert names.find("output") == ""


def demand(**changes: int) -> Demand:
    sizes = {"model": 10**12, "block": 10**6, "sums": 10**6, "sample": 10**6, "work": 10**6}
    return Demand(**(sizes | changes))


def test_what_fits_is_held_and_what_does_not_is_streamed() -> None:
    allowed = resident_bytes() + 500 * 10**6
    assert choose_residency(demand(model=10**8), allowed, None, "cpu") == Residency(False, 16)
    assert choose_residency(demand(), allowed, None, "cpu") == Residency(True, MAX_BATCH)
    assert choose_residency(demand(), allowed, 3, "cpu") == Residency(True, 3)
    few = choose_residency(demand(sample=10**8), allowed, None, "cpu")
    assert few.streamed
    assert 3 <= few.batch <= 4


def test_too_little_memory_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs about \d+ MB on cpu, 100 MB are allowed"):
        choose_residency(demand(), 10**8, None, "cpu")
    with pytest.raises(MemoryBudgetError, match="or batch_size"):
        choose_residency(demand(sample=10**8), resident_bytes() + 500 * 10**6, 50, "cpu")
