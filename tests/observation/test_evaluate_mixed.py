"""Evaluations of outputs with several formats, against a direct computation with the same weights and rounded inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mfptq
from mfptq.calibration.file import CalibrationContents
from mfptq.calibration.file import write_calibration as write_file
from mfptq.calibration.reading import load_calibration
from mfptq.errors import SourceError
from mfptq.observation.evaluate import evaluate
from tests.calibration.files import calibrate as write_calibration
from tests.clients.dequantize import read_tensors
from tests.models import DENSE, MOE
from tests.observation.cases import OPTIONS, Case, load, windows
from tests.observation.test_rounded_fp8 import reference as fp8
from tests.observation.test_rounded_nvfp4 import reference as nvfp4

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = (
    "fp8-dynamic=re:.*self_attn.*", "fp8-static=re:.*linear_attn.out_proj", "fp8-block=re:.*layers.0.mlp.*down_proj",
    "nvfp4a16=re:.*linear_attn.*",
)  # fmt: skip


def rounding_of(module: str, stored: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return what a quantized module's inputs become, by the rules above and what is stored."""
    if f"{module}.input_global_scale" in stored:
        return lambda x: nvfp4(x, float(stored[f"{module}.input_global_scale"].values[0]))
    if f"{module}.weight_packed" in stored or f"{module}.weight_scale" not in stored:
        return None
    if f"{module}.input_scale" in stored:
        return lambda x: fp8(x, np.float32(stored[f"{module}.input_scale"].values[0]))
    width = 128 if "down_proj" in module else 10**6

    def dynamic(x: np.ndarray) -> np.ndarray:
        parts = [x[..., start : start + width] for start in range(0, x.shape[-1], width)]
        scales = [np.abs(part).max(axis=-1, keepdims=True) / np.float32(448) for part in parts]
        return np.concatenate([fp8(part, scale) for part, scale in zip(parts, scales, strict=True)], axis=-1)

    return dynamic


@contextmanager
def rounded(model: Any, output: Path) -> Iterator[None]:
    """Round what meets a quantized matrix, wherever the model multiplies."""
    stored, original, places = read_tensors(output), torch.nn.functional.linear, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            places[module.weight.data_ptr()] = rounding_of(name, stored)
        if name.endswith("mlp.experts"):
            for number in range(len(module.down_proj)):
                places[module.gate_up_proj[number].data_ptr()] = rounding_of(f"{name}.{number}.gate_proj", stored)
                places[module.down_proj[number].data_ptr()] = rounding_of(f"{name}.{number}.down_proj", stored)

    def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        change = places.get(weight.data_ptr())
        given = inputs if change is None else torch.from_numpy(change(inputs.numpy()))
        return original(given, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        yield


def logits(folder: Path, text: list[list[int]], output: Path | None = None) -> list[torch.Tensor]:
    model = load(folder)
    with torch.no_grad(), rounded(model, output or folder):
        return [model(torch.tensor([ids])).logits[0].double() for ids in text]


@pytest.mark.parametrize("kind", [DENSE, MOE])
def test_figures_are_those_of_a_direct_computation(kind: str, dataset: Path, tmp_path: Path) -> None:
    rules = RULES if kind == DENSE else ("fp8-dynamic=re:.*mlp.experts.*", *RULES[:2])
    case = Case(tmp_path, kind, calibrated=True, formats=rules)
    text = windows(dataset)
    found = evaluate(case.output, case.source, dataset, **OPTIONS)
    divergence = 0.0
    for exact, given in zip(logits(case.source, text, case.source), logits(case.twin, text, case.output), strict=True):
        p, q = exact.log_softmax(-1)[:-1], given.log_softmax(-1)[:-1]
        divergence += (p.exp() * (p - q)).sum().item()
    assert found.kl_divergence.value == pytest.approx(divergence / found.tokens, rel=2e-2)
    assert found.kl_divergence.value > 0.001
    names = {part.rpartition(" ")[0] for part in found.scheme.split(", ")}
    assert names == {"nvfp4", "fp8-dynamic", "fp8-static"} | ({"fp8-block", "nvfp4a16"} if kind == DENSE else set())


def test_all_fp8_is_nearer_to_the_source_than_nvfp4(
    dense: Case, evaluated: mfptq.Evaluation, dataset: Path, tmp_path: Path
) -> None:
    mfptq.convert(dense.source, tmp_path / "fp8", formats=["fp8-dynamic=re:.*"])
    found = evaluate(tmp_path / "fp8", dense.source, dataset, **OPTIONS)
    assert found.kl_divergence.value < 0.5 * evaluated.kl_divergence.value
    assert found.scheme.startswith("fp8-dynamic ")


def test_a_config_that_does_not_say_what_is_stored_is_refused(dataset: Path, tmp_path: Path) -> None:
    case = Case(tmp_path, DENSE, formats=["fp8-dynamic=re:.*self_attn.*"])
    config = case.output / "config.json"
    config.write_text(config.read_text().replace('"strategy": "channel"', '"strategy": "row"'))
    with pytest.raises(SourceError, match="of no known format: verify the output"):
        evaluate(case.output, case.source, dataset, **OPTIONS)


def test_scales_of_the_cache_are_no_fault(
    dense: Case, evaluated: mfptq.Evaluation, dataset: Path, tmp_path: Path
) -> None:
    layer = "model.language_model.layers.3.self_attn"
    known = load_calibration(write_calibration(dense.source, tmp_path / "inputs.safetensors"))
    contents = CalibrationContents(
        known.description, tuple(known.inputs.values()), known.read, {}, key_values={f"{layer}.k_proj": (1, 2)}
    )
    write_file(tmp_path / "c.safetensors", contents)
    known.close()
    decisions = {"calibration": tmp_path / "c.safetensors", "scheme": "NVFP4A16", "method": "search"}
    mfptq.convert(dense.source, tmp_path / "cached", kv_cache="fp8", **decisions)
    assert any(name == f"{layer}.v_scale" for name in read_tensors(tmp_path / "cached"))
    found = evaluate(tmp_path / "cached", dense.source, dataset, **OPTIONS)
    assert found.kl_divergence == evaluated.kl_divergence
