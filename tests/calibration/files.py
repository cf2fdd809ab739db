"""Calibration files for tests: statistics of random inputs of a checkpoint's weights, computed directly in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from mfptq.calibration.file import (
    CalibrationContents,
    Description,
    InputInfo,
    InputStatistics,
    factor_rank,
    includes,
    write_calibration,
)
from mfptq.checkpoint.weights import candidates
from mfptq.hub.opening import open_checkpoint
from mfptq.planning.rules import Rules, select

ABOUT = Description("demo", "main", "hessian", samples=2, requested=2, max_seq_length=64, dataset="a" * 64)


def described(statistics="hessian", **changes) -> Description:
    return replace(ABOUT, statistics=statistics, **changes)


def random_inputs(columns: int, tokens: int = 300, seed: int = 0):
    """Return activations `[tokens, columns]` with correlated columns of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, columns)) * rng.lognormal(0, 1, columns)
    x[:, 1:] += 0.5 * x[:, :-1]
    return x.astype(np.float32).astype(np.float64)


def statistics_of(x, level: str = "hessian") -> InputStatistics:
    """Return the statistics of activations, as a calibration pass of that level records them."""
    blocks = x.reshape(len(x), -1, 16)
    hessian = (np.einsum("tbi,tbj->bij", blocks, blocks) / len(x)).astype(np.float32)
    moment = np.ascontiguousarray(np.diagonal(hessian, axis1=1, axis2=2)).reshape(-1)
    amax = float(np.float32(np.abs(x).max()))
    factors = factors_of(x) if includes(level, "factors") else None
    parts = (("moments", moment), ("hessian", hessian), ("factors", factors))
    return InputStatistics(amax, len(x), *(values if includes(level, least) else None for least, values in parts))


@cache
def random_statistics(columns: int, seed: int, level: str) -> InputStatistics:
    """Return the statistics of random inputs, made once for all who only read them."""
    return statistics_of(random_inputs(columns, seed=seed), level)


def factors_of(x):
    """Return the largest directions of activations, `[r, K]`, and zeros where there are fewer."""
    result = np.zeros((factor_rank(x.shape[1]), x.shape[1]), np.float32)
    _, sizes, directions = np.linalg.svd(x / len(x) ** 0.5, full_matrices=False)
    found = (sizes[:, None] * directions)[: len(result)]
    result[: len(found)] = found * (1 - 1e-6)
    return result


def write_file(path: Path, inputs: dict[InputInfo, InputStatistics], about: Description = ABOUT, routed=None) -> Path:
    found = {info.name: statistics for info, statistics in inputs.items()}
    write_calibration(path, CalibrationContents(about, tuple(inputs), lambda info: found[info.name], routed or {}))
    return path


def layers_of(source: Path) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return the columns and members of every fused group that is quantized by default."""
    checkpoint = open_checkpoint(source)
    chosen = select(list(candidates(checkpoint.tensors())), Rules())
    checkpoint.source.close()
    weights = {w.module: w.columns for item in chosen.tensors if item.decision.quantize for w in item.candidate.weights}
    return {group.name: (weights[group.members[0]], group.members) for group in chosen.groups}


def calibrate(
    source: Path, path: Path, about: Description = ABOUT, *, without: Callable[[str], bool] = lambda name: False
) -> Path:
    """Write a calibration file for a checkpoint; one input for each fused group, none for those `without` accepts."""
    inputs = {}
    for seed, (name, (columns, members)) in enumerate(layers_of(source).items()):
        if not without(name):
            inputs[InputInfo(f"{name}.input", columns, members)] = random_statistics(columns, seed, about.statistics)
    return write_file(path, inputs, about)


def stored(folder: Path) -> dict:
    """Return every tensor of a checkpoint, read by the safetensors library, as torch."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
