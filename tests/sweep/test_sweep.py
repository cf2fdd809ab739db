"""Every model type of transformers that can be built tiny: what becomes FP4 is a linear layer, and the rest has a reason.

A dozen families are part of the default run; `-m "slow or not slow"` tries all. What transformers cannot build from small sizes is skipped.
"""

import re

import pytest

import mfptq
from mfptq.names.block_numbers import block_warnings
from mfptq.names.engine import experts_parent
from mfptq.planner import make_plan
from mfptq.planning.defaults import UNKNOWN
from tests.sweep.tiny import build, types

transformers = pytest.importorskip("transformers")

FAMILIES = (
    "llama", "mixtral", "deepseek_v3", "gpt2", "bert", "t5", "whisper", "llava", "gpt_oss", "nemotron_h", "jamba", "falcon",
    "qwen3_vl_moe",
)  # fmt: skip
MAMBA_1 = {"mamba", "falcon_mamba"}  # no engine takes a layer of these in FP4
NO_LINEAR = {"squeezebert", "omniasr_ctc"}  # convolutions only, an audio tower only
# Types of which more than a hundredth of the decoder stays since no engine is known to have a layer of that name, and what it is.
UNNAMED = {
    "convbert": "convolution kernels", "evolla": "attention to proteins", "gradium_phonon_tts": "weighting of losses",
    "kyutai_speech_to_text": "linear layers inside of others", "wav2vec2-conformer": "relative positions", "zamba": "layers behind attention",
    "granite_speech5_ctc": "pointwise layers", "inkling2": "gates", "inkling2_loop": "gates", "inkling2_loop_text": "gates",
    "inkling2_text": "gates", "inkling_mm_model": "attention's output", "moshi": "linear layers inside of others",
    "parakeet_ctc": "relative positions",
}  # fmt: skip
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
    plan = make_plan(tmp_path / "source")
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
    blocks = [i.candidate for i in plan.selection.tensors if not plan.selection.structure.outside(i.candidate.module)]
    decoder = sum(item.tensor.info.nbytes for item in blocks if len(item.tensor.info.shape) > 1)
    left = sum(item.tensor.info.nbytes for item in lost)
    print(f"\n{kind}: {plan.share}; unknown: {sorted({item.module.rpartition('.')[2] for item in lost})}, {left} bytes")
    assert known
    assert left <= decoder / 100 or kind in UNNAMED
    assert bool(plan.share.warning) == (plan.share.inside < plan.share.decoder / 2)
    assert plan.share.warning in ("", *plan.warnings)
    assert block_warnings(plan.selection.structure, quantized) == ()
    plan.close()
    mfptq.convert(tmp_path / "source", tmp_path / "out", method="minmax")
    found = mfptq.verify(tmp_path / "out", tmp_path / "source")
    assert found.ok, found.faults[:5]


# Types whose names in files are those of their modules, and whose compressed layers transformers 5.24 can load.
LOADED = (
    "llama",
    "bert",
    "whisper",
    "gpt_neox",
    "qwen3",
    "gemma2",
    "phi3",
    "opt",
    "roberta",
    "olmo2",
    "granite",
    "starcoder2",
)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in LOADED[:4] else pytest.mark.slow) for k in LOADED])
def test_transformers_loads_a_conversion_and_computes_the_same(kind: str, tmp_path) -> None:
    """Every layer that the config does not ignore is compressed when it is loaded, heads without a tensor included."""
    import torch

    model = build(kind)
    model.save_pretrained(tmp_path / "source")
    mfptq.convert(tmp_path / "source", tmp_path / "out", method="minmax")
    loaded, info = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored = dict(load_file(tmp_path / "out"))
    reference = type(model).from_pretrained(tmp_path / "source", dtype=torch.bfloat16).eval()
    modules = dict(reference.named_modules())
    names = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    for name in names:
        packed, scale, divisor = (stored[f"{name}.weight_{part}"] for part in ("packed", "scale", "global_scale"))
        modules[name].weight.data = dequantized(packed, scale, divisor).to(torch.bfloat16)
    assert names
    tokens = torch.arange(2, 34).reshape(2, 16)
    if kind == "whisper":
        sound = torch.randn(2, loaded.config.num_mel_bins, 2 * loaded.config.max_source_positions)
        inputs = {"input_features": sound.to(torch.bfloat16), "decoder_input_ids": tokens}
    else:
        inputs = {"input_ids": tokens}
    with torch.no_grad():
        found, wanted = loaded.eval()(**inputs).logits, reference(**inputs).logits
    assert torch.equal(found, wanted)


def load_file(folder):
    """Yield the tensors of a folder's files."""
    from safetensors.torch import load_file as load

    for file in sorted(folder.glob("*.safetensors")):
        yield from load(file).items()


def dequantized(packed, scale, divisor):
    import torch

    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    signed = values[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return signed * (scale.float() / divisor).repeat_interleave(16, -1)
