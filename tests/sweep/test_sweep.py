"""Every model type of transformers that can be built tiny: what becomes FP4 is a linear layer, and the rest has a reason.

A dozen families are part of the default run; `-m "slow or not slow"` tries all. What transformers cannot build from small sizes is skipped.
"""

import re

import pytest

import mfptq
from mfptq.names.engine import experts_parent
from mfptq.planning.defaults import UNKNOWN
from tests.sweep.tiny import build, types

transformers = pytest.importorskip("transformers")

FAMILIES = (
    "llama", "qwen3_moe", "mixtral", "deepseek_v3", "gpt2", "bert", "t5", "whisper", "llava", "granitemoe", "gpt_oss",
    "nemotron_h", "jamba", "falcon", "qwen3_vl_moe",
)  # fmt: skip
MAMBA_1 = {"mamba", "falcon_mamba"}  # no engine takes a layer of these in FP4
NO_LINEAR = {"squeezebert", "omniasr_ctc"}  # convolutions only, an audio tower only
LINEAR = ("Linear", "Conv1D", "QuantLinear", "GroupedLinear")
TABLES = re.compile(
    r"(^|[._])(embed|embeds|embeddings?|wte|wpe)([._]|$)|(lm_head|\.shared)$|(^|\.)(router|gate)(\.|$)|norm\w*$"
)

pytestmark = pytest.mark.filterwarnings("ignore")


def every() -> list:
    """Return all types; those that are not a part of the default run are marked."""
    return [pytest.param(kind, marks=() if kind in FAMILIES else pytest.mark.slow) for kind in types()]


@pytest.mark.parametrize("kind", every())
def test_a_tiny_model_is_converted_as_it_should(kind: str, tmp_path) -> None:
    try:
        model = build(kind)
    except Exception as error:  # whatever a model's code raises for sizes that it does not expect
        pytest.skip(f"not built tiny: {error}")
    model.save_pretrained(tmp_path / "source")
    if kind in MAMBA_1 | NO_LINEAR:
        with pytest.raises(mfptq.MfptqError, match="nothing is left to quantize"):
            mfptq.plan(tmp_path / "source")
        return
    plan = mfptq.plan(tmp_path / "source")
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    heads = {name for name, module in modules.items() if module == "Embedding"}
    quantized = {item.candidate.module for item in plan.selection.tensors if item.decision.quantize}
    for name in quantized:
        assert modules.get(name, "Linear").endswith(LINEAR) or experts_parent(name) or ".experts" in name, name
        assert not TABLES.search(name), name
    assert quantized.isdisjoint(heads)
    lost = [
        i.candidate
        for i in plan.selection.tensors
        if i.decision.reason == UNKNOWN and len(i.candidate.tensor.info.shape) == 2
    ]
    known = [i.candidate for i in plan.selection.tensors if i.decision.quantize]
    left = sum(item.tensor.info.nbytes for item in lost)
    print(f"\n{kind}: {plan.share}; unknown: {sorted({item.module.rpartition('.')[2] for item in lost})}, {left} bytes")
    assert known
    plan.close()
    mfptq.convert(tmp_path / "source", tmp_path / "out", method="minmax")
    found = mfptq.verify(tmp_path / "out", tmp_path / "source")
    assert found.ok, found.faults[:5]
