"""Every model type of transformers, tiny: a conversion loads without a missing key, and is what an independent dequantization is.

Three types are part of the default run; `-m "slow or not slow"` tries all. All weights are compared, and all outputs of a forward
pass where the type computes on one of a few plain inputs.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mfptq
from tests.clients.dequantize import dequantize_checkpoint, read_tensors, write_twin
from tests.clients.known_transformers import KNOWN
from tests.clients.test_transformers import IS_CURRENT
from tests.models import Tensors, write_shards
from tests.sweep.test_sweep import MAMBA_1, NO_LINEAR
from tests.sweep.tiny import build, types

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]
SAMPLE = ("qwen3", "granite_speech", "glm4_moe")
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
STACKS = {"gate_up_proj": (GATE, UP), "input_linear": (GATE, UP), "down_proj": (DOWN,), "output_linear": (DOWN,), "gate_proj": (GATE,), "up_proj": (UP,)}  # fmt: skip


def every() -> list[Any]:
    """Return all types: those that are not a part of the default run, and those that transformers cannot load, are marked."""
    found = []
    for kind in types():
        marks = [] if kind in SAMPLE else [pytest.mark.slow]
        marks += [pytest.mark.xfail(reason=KNOWN[kind], strict=True)] if kind in KNOWN else []
        marks += [] if IS_CURRENT or kind in SAMPLE[:2] else [pytest.mark.skip(reason="needs transformers 5.24")]
        if kind not in MAMBA_1 | NO_LINEAR:
            found.append(pytest.param(kind, marks=marks))
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that does not outlive the test: hundreds of models would fill a disk."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("kind", every())
def test_a_conversion_is_what_its_twin_is(kind: str, folder: Path) -> None:
    try:
        model = build(kind)
        model.save_pretrained(folder / "source")
        keys = load(type(model), folder / "source")[1]
    except Exception as error:  # whatever a model's code raises for sizes that it does not expect
        pytest.skip(f"not built tiny, or not loaded as it is: {error}")
    if keys:
        pytest.skip(f"not loaded as it is: {keys}")
    mfptq.convert(folder / "source", folder / "out", method="minmax")
    found, keys = load(type(model), folder / "out")
    assert not keys
    twin, keys = load(type(model), twin_of(folder))
    assert not keys
    if hasattr(found, "hf_quantizer"):  # not dequantized yet
        found.hf_quantizer.compressor.decompress_model(found)
    divide_by_global_scales(found, folder / "out", dict(twin.named_parameters()))
    assert unequal(found.state_dict(), unstacked(twin.state_dict(), found.state_dict())) == []
    if twin.state_dict().keys() <= found.state_dict().keys():
        compare_outputs(found, twin)


def compare_outputs(found: Any, twin: Any) -> None:
    """Compare two models on the first of the plain inputs that the twin computes on."""
    for inputs in plain_inputs(twin.config):
        if (expected := outputs(twin, inputs)) is not None:
            computed = outputs(found, inputs)
            assert computed is not None
            assert [same(one, other) for one, other in zip(computed, expected, strict=True)] == [True] * len(expected)
            print("outputs compared on", *inputs)
            return


def load(cls: Any, folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """Return a model, and the keys that its checkpoint lacks or has too much.

    Some classes look for `weight` in layers that they have not dequantized yet: these are dequantized while they are loaded.
    """
    config = {"dtype": torch.bfloat16, "output_loading_info": True}
    try:
        model, info = cls.from_pretrained(folder, **config)
    except AttributeError:
        dense = transformers.CompressedTensorsConfig(dequantize=True)
        model, info = cls.from_pretrained(folder, **config, quantization_config=dense)
    return model.eval(), {what: sorted(map(str, keys)) for what, keys in info.items() if keys}


def twin_of(folder: Path) -> Path:
    """Write the BF16 twin of the conversion, its experts stacked as the source has them."""
    twin = write_twin(folder / "out", folder / "source", folder / "twin", stacked=False)
    tensors, source = dequantize_checkpoint(folder / "out", stacked=False), read_tensors(folder / "source")
    stacks = {name: stack for name, each in source.items() if name not in tensors and (stack := stacked(name, each.values.shape, tensors)) is not None}  # fmt: skip
    members = {name for name in tensors if name not in source}
    tensors = {name: values for name, values in tensors.items() if name not in members} | stacks
    write_shards(twin, tensors, [list(tensors)])
    return twin


def stacked(name: str, shape: tuple[int, ...], tensors: Tensors) -> torch.Tensor | None:
    """Return the experts of a layer in one tensor of this shape, or None if the tensor is no stack."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = parent if parent.endswith("experts") else f"{parent}.experts"
    if leaf not in STACKS or len(shape) != 3:
        return None
    rows = [torch.cat([tensors[f"{parent}.{number}.{part}.weight"] for part in STACKS[leaf]]) for number in range(shape[0])]  # fmt: skip
    whole = torch.stack(rows)
    return whole if whole.shape == torch.Size(shape) else whole.mT.contiguous()


def divide_by_global_scales(model: Any, out: Path, expected: dict[str, torch.Tensor]) -> None:
    """Finish what transformers 5.24 leaves undone: it dequantizes stacked experts without their global scale."""
    scales = {}
    for name, each in read_tensors(out).items():
        if match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight_global_scale", name):
            leaf = {"w1": GATE, "w2": DOWN}.get(match[3], match[3])
            scales[re.findall(r"\d+", match[1])[-1], int(match[2]), leaf] = each.values
    for name, parameter in model.named_parameters():
        stack, _, leaf = name.rpartition(".")
        if stack.endswith("experts") and name in expected and not same(parameter, expected[name]):
            layer = re.findall(r"\d+", stack)[-1]
            for number, expert in enumerate(parameter.data):
                scale = scales[layer, number, GATE if leaf == "gate_up_proj" else leaf]
                expert.div_(torch.from_numpy(np.array(scale)).to(expert.dtype))


def unstacked(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a twin's tensors with experts as modules of their own, where the class builds compressed ones so (Llama 4)."""
    result = {}
    for name, values in expected.items():
        stack, _, leaf = name.rpartition(".")
        if name in found or f"{stack}.0.{DOWN}.weight" not in found:
            result[name] = values
            continue
        for number, expert in enumerate(values.mT):
            parts = expert.chunk(len(STACKS[leaf]))
            result |= {f"{stack}.{number}.{part}.weight": each for part, each in zip(STACKS[leaf], parts, strict=True)}
    return result


def unequal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    names = [name for name in expected if name not in found or not same(found[name], expected[name])]
    return [*names, *(name for name in found if name not in expected and not re.search(r"weight_\w*scale$", name))]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def plain_inputs(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs of text, then of sound and images, as models may want them."""
    tokens = torch.arange(4, 36).reshape(2, 16)
    yield {"input_ids": tokens}
    yield {"input_ids": tokens, "decoder_input_ids": tokens}
    bins, steps = getattr(config, "num_mel_bins", 80), getattr(config, "max_source_positions", 32)
    torch.manual_seed(0)
    for name, shape in {
        "input_features": (2, bins, 2 * steps), "input_values": (2, 4000), "pixel_values": (2, 3, 32, 32)
    }.items():  # fmt: skip
        other = torch.randn(shape).to(torch.bfloat16)
        yield from ({name: other, key: tokens} for key in ("decoder_input_ids", "input_ids"))
        yield {name: other}


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """Return every tensor that a model computes; None if it does not compute on such inputs."""
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return list(tensors_in(model(**inputs)))
    except Exception:  # whatever a model's code raises for inputs that it does not expect
        return None


def tensors_in(found: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(found):
        yield found
    elif isinstance(found, (dict, list, tuple)):
        for each in found.values() if isinstance(found, dict) else found:
            yield from tensors_in(each)
